//! Scale to zero: computes stop, clients stay.

use ebb_tests::{Node, python, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_branch_has_no_process_left() {
    let node = Node::with_shop();
    node.ok(&["branch", "set", "shop/prod", "--idle-suspend", "1s"]);
    let client = node.connect("shop/prod").await;
    client.batch_execute("create table t as select 1 as n").await.expect("a table can be made");
    node.wait_state("shop/prod", "suspended");
    assert!(!node.postgres_runs("shop/prod"));
    assert_eq!(node.processes(), []);
    assert_eq!(client.query_one("select n from t", &[]).await.expect("the client was kept").get::<_, i32>(0), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_lives_through_three_rounds_with_all_it_had_set() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t as select generate_series(1, 10) as n");
    let client = node.connect("shop/prod").await;
    client
        .batch_execute(
            "set application_name = 'three rounds'; set search_path = pg_catalog, public; set timezone = 'Asia/Tokyo'; \
             set myapp.tenant = 'blue'; set statement_timeout = '47s'",
        )
        .await
        .expect("settings can be set");
    client.batch_execute("prepare twice(int) as select $1 * 2").await.expect("a statement can be prepared");
    let named = client.prepare("select count(*) from t where n > $1").await.expect("a statement can be prepared");
    for round in 1..=3 {
        node.suspend("shop/prod");
        let row = client.query_one(&named, &[&4_i32]).await.expect("the prepared statement is still there");
        assert_eq!(row.get::<_, i64>(0), 6);
        let settings = client
            .query_one(
                "select current_setting('application_name'), current_setting('search_path'), current_setting('timezone'), \
                 current_setting('myapp.tenant'), current_setting('statement_timeout')",
                &[],
            )
            .await
            .expect("settings can be read");
        let settings: Vec<String> = (0..5).map(|i| settings.get(i)).collect();
        assert_eq!(settings, ["three rounds", "pg_catalog, public", "Asia/Tokyo", "blue", "47s"]);
        let doubled = client.simple_query("execute twice(21)").await.expect("the SQL-level statement is still there");
        assert!(format!("{doubled:?}").contains("42"), "{doubled:?}");
        assert_eq!(node.wakes("shop/prod"), round + 1);
    }
    client.batch_execute("reset application_name").await.expect("a setting can be reset");
}

#[test]
fn psycopg_does_not_notice_three_rounds() {
    let node = Node::with_shop();
    let api = format!("http://127.0.0.1:{}", node.api_port);
    let program = r#"
import sys, urllib.request, psycopg
url, api = sys.argv[1:]
def suspend():
    request = urllib.request.Request(api + "/v1/projects/shop/branches/prod/compute/suspend", b"{}",
                                     {"Content-Type": "application/json"}, method="POST")
    urllib.request.urlopen(request).read()
with psycopg.connect(url, prepare_threshold=0, autocommit=True) as c:
    c.execute("set timezone = 'Asia/Tokyo'")
    c.execute("create table notes (n int, t text)")
    for n in range(4):
        c.execute("insert into notes values (%s, %s)", (n, "note"))
        assert c.execute("select count(*) from notes where n <= %s", (n,)).fetchone()[0] == n + 1
        assert c.execute("show timezone").fetchone()[0] == "Asia/Tokyo"
        pid = c.info.backend_pid
        suspend()
    with c.transaction():
        c.execute("insert into notes values (%s, %s)", (9, "in a transaction"))
    print(c.execute("select count(*) from notes").fetchone()[0])
"#;
    assert_eq!(python(program, &[&node.url("shop/prod"), &api]).trim(), "5");
    assert!(node.wakes("shop/prod") >= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_given_back_keeps_the_compute_awake_and_says_so() {
    let node = Node::with_shop();
    for (sql, undo, word) in [
        ("create temp table scratch (n int)", "drop table scratch", "temp"),
        ("select pg_advisory_lock(7)", "select pg_advisory_unlock(7)", "advisory"),
        ("listen news", "unlisten *", "listen"),
        ("begin; declare c cursor with hold for select 1; commit", "close c", "cursor"),
        ("begin", "rollback", "transaction"),
    ] {
        let client = node.connect("shop/prod").await;
        client.batch_execute(sql).await.expect("the statement is good");
        let ran = node.ebb(&["compute", "suspend", "shop/prod"]);
        assert_ne!(ran.code, 0, "{sql:?} did not keep it awake");
        assert!(ran.stderr.to_lowercase().contains(word), "{sql:?}: {}", ran.stderr);
        assert_eq!(node.compute("shop/prod")["state"], "active");
        client.batch_execute(undo).await.expect("the session was not touched");
        node.suspend("shop/prod");
        client.batch_execute("select 1").await.expect("the session was kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_names_who_keeps_a_compute_awake() {
    let node = Node::with_shop();
    node.ok(&["branch", "set", "shop/prod", "--idle-suspend", "1s"]);
    let client = node.connect("shop/prod").await;
    client.batch_execute("set application_name = 'the culprit'; create temp table t (n int)").await.expect("good SQL");
    wait_for("the reason to be known", || {
        let status = node.compute("shop/prod").to_string();
        status.contains("temp") && status.contains("keeps_awake")
    });
    assert_eq!(node.compute("shop/prod")["state"], "active");
    drop(client);
    node.wait_state("shop/prod", "suspended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_changed_in_sql_is_valid_at_the_next_login() {
    let node = Node::with_shop();
    let old = node.url("shop/prod");
    let password = old.split(':').nth(2).and_then(|rest| rest.split('@').next()).expect("the URL has a password");
    node.psql("shop/prod", "alter role app password 'a-new-one'");
    node.suspend("shop/prod");
    let new = old.replace(password, "a-new-one");
    node.try_connect(&new).await.expect("the new password is good while the compute sleeps");
    node.try_connect(&old).await.expect_err("the old one is not");
}

#[test]
fn the_newest_wakes_are_told_with_their_stages() {
    let node = Node::with_shop();
    for branch in ["shop/prod", "shop/dev", "shop/prod"] {
        node.psql(branch, "select 1");
        node.suspend(branch);
    }
    let of = |args: &[&str]| node.json(args)["wakes"].as_array().expect("a list").clone();
    wait_for("three wakes to be noted", || of(&["compute", "wakes"]).len() >= 3);
    let wakes = of(&["compute", "wakes", "shop/prod"]);
    assert_eq!(wakes.len(), 2, "{wakes:?}");
    for wake in &wakes {
        let stages = wake["stages"].as_array().expect("it has stages");
        let names: Vec<_> = stages.iter().filter_map(|stage| stage["name"].as_str()).collect();
        assert_eq!(names, ["resolve", "prepare", "spawn", "isolate", "open", "mount", "start", "recover"]);
        let sum: f64 = stages.iter().filter_map(|stage| stage["milliseconds"].as_f64()).sum();
        let whole = wake["milliseconds"].as_f64().expect("it took a time");
        assert!((sum - whole).abs() < 5.0, "stages take {sum} ms of {whole}");
    }
    assert!(wakes[0]["at"].as_str() > wakes[1]["at"].as_str(), "the newest first");
    let shown = node.ok(&["compute", "wakes"]);
    assert!(shown.contains("RECOVER") && shown.contains("shop/dev"), "{shown}");
    assert_ne!(node.ebb(&["compute", "wakes", "shop/none"]).code, 0);
}
