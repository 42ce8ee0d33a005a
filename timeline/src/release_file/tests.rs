use super::*;

#[test]
fn an_empty_file_is_the_defaults() {
    assert_eq!(read("").unwrap(), ReleaseFile::default());
    let again: ReleaseFile = serde_json::from_str("{}").unwrap();
    assert_eq!(again, ReleaseFile::default());
}

#[test]
fn a_whole_file_is_read_and_stored_as_it_was() {
    let text = r#"
        migrations = "db/changes"
        secrets = ["STRIPE_KEY", "smtp.password"]

        [policy]
        fence = true
        fence_timeout = "2s"
        lock_timeout = "500ms"
        statement_timeout = "1h"
        rollback = "data"
        max_lost_transactions = 1_000

        [[probe]]
        sql = "select count(*) > 0 from orders"
        expect = "t"

        [[probe]]
        name = "health"
        http = "http://127.0.0.1:8080/health"
        json = "/db/rows"
        expect = 3
        timeout = "1s"
        retries = 10
        wait = "200ms"

        [[probe]]
        command = ["./check.sh", "--fast"]
        exit = 7
    "#;
    let file = read(text).unwrap();
    assert_eq!((file.migrations.as_str(), file.secrets.len()), ("db/changes", 2));
    assert_eq!(
        file.policy,
        Policy {
            rehearse: true,
            fence: true,
            fence_timeout_ms: 2000,
            lock_timeout_ms: 500,
            statement_timeout_ms: 3_600_000,
            rollback: Automatic::Data,
            max_lost_transactions: 1000,
        }
    );
    let probe = |name: &str, question, timeout_ms, retries, wait_ms| Probe {
        name: name.to_owned(),
        question,
        timeout_ms,
        retries,
        wait_ms,
    };
    let (sql, url) = ("select count(*) > 0 from orders", "http://127.0.0.1:8080/health".to_owned());
    let json = (Some("/db/rows".to_owned()), Some("3".to_owned()));
    assert_eq!(
        file.probes,
        [
            probe(sql, Question::Sql { sql: sql.to_owned(), expect: "t".to_owned() }, 5000, 2, 1000),
            probe("health", Question::Http { url, status: 200, json: json.0, expect: json.1 }, 1000, 10, 200),
            probe(
                "probe 3",
                Question::Command { command: vec!["./check.sh".to_owned(), "--fast".to_owned()], exit: 7 },
                5000,
                2,
                1000
            ),
        ]
    );
    let stored = serde_json::to_string(&file).unwrap();
    assert_eq!(serde_json::from_str::<ReleaseFile>(&stored).unwrap(), file);
}

#[test]
fn everything_that_is_wrong_is_told_with_its_place() {
    let text = r#"migratoins = "m"
secrets = ["ok", "../passwd", 3]

[policy]
rollbak = "data"
rollback = "all"
fence = "yes"
lock_timeout = 10
fence_timeout = "2h"
max_lost_transactions = -1

[[probe]]
name = "é"
sql = "select 1"

[[probe]]
http = "https://example.org/"

[[probe]]
http = "http://127.0.0.1:1/"
json = "ok"
exit = 3

[[probe]]
sql = "select 1"
command = ["x"]

[[probe]]
command = []
"#;
    let faults: Vec<_> = read(text).unwrap_err().iter().map(ToString::to_string).collect();
    insta::assert_snapshot!(faults.join("\n"));
}

#[test]
fn what_is_no_toml_is_told_with_its_place() {
    let faults = read("migrations = \"m\"\n[policy\nfence = true\n").unwrap_err();
    assert_eq!(faults[0].line, 2, "{faults:?}");
    assert!(read("migrations = \"/etc\"").is_err() && read("migrations = \"../up\"").is_err());
    assert!(read("policy = 3").is_err() && read("probe = 3").is_err());
}

#[test]
fn a_directory_is_looked_at_as_a_release_would() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("migrations/1.sql", "create table t (n int)");
    write("migrations/2.sql", "create index concurrently i on t (n)");
    let checked = check(dir.path()).unwrap();
    assert!(checked.ok && !checked.described && checked.migrations[1].outside, "{checked:?}");
    write("ebb.toml", "migrations = \"db\"\n[[probe]]\ncommand = [\"./check.sh\"]");
    write("migrations/3.sql", "begin; select 1; commit");
    let checked = check(dir.path()).unwrap();
    assert!(!checked.ok && checked.findings.len() == 2, "{checked:?}");
    write("ebb.toml", "fence = true");
    let checked = check(dir.path()).unwrap();
    assert_eq!((checked.ok, checked.faults.len(), checked.findings.len()), (false, 1, 1), "{checked:?}");
}
