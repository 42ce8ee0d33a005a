//! Migrations on a real Postgres of the test's own.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::test_postgres::{initdb, unprivileged};
use ebb_types::{ErrorKind, Hint as _};

#[test]
fn places_are_counted_in_characters() {
    assert_eq!(line_and_column("select 1;\nsélect 2", 11), Some((2, 1)));
    assert_eq!(line_and_column("é\nx y", 5), Some((2, 3)));
    assert_eq!(line_and_column("", 1), None);
    assert_eq!(line_and_column("x", 0), None);
}

/// A Postgres in a temporary directory, stopped and removed when dropped.
struct Cluster {
    _dir: tempfile::TempDir,
    postgres: Child,
    socket: PathBuf,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SIGQUIT by its own number: immediate shutdown, children included.
        let pid = self.postgres.id().to_string();
        let _ = Command::new("kill").args(["-QUIT", &pid]).status();
        let _ = self.postgres.wait();
    }
}

impl Cluster {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = initdb(dir.path());
        let postgres = unprivileged("postgres")
            .args(["-F", "-c", "listen_addresses=", "-c", "log_min_messages=fatal", "-k"])
            .arg(dir.path())
            .arg("-D")
            .arg(&data)
            .current_dir(dir.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let cluster = Self { socket: dir.path().join(".s.PGSQL.5432"), _dir: dir, postgres };
        cluster.superuser("create role app login; create database app owner app").await;
        cluster
    }

    /// Runs each statement by itself, waiting for the server to come up.
    async fn superuser(&self, statements: &str) {
        let mut config = tokio_postgres::Config::new();
        config.user("postgres").dbname("postgres").host_path(self.socket.parent().unwrap());
        let (client, connection) = tokio::time::timeout(std::time::Duration::from_secs(60), async {
            loop {
                match config.connect(NoTls).await {
                    Ok(connected) => return connected,
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                }
            }
        })
        .await
        .expect("postgres starts");
        let driver = tokio::spawn(connection);
        for statement in statements.split("; ") {
            client.batch_execute(statement).await.unwrap();
        }
        drop(client);
        driver.await.unwrap().unwrap();
    }

    async fn run(&self, release: &str, files: &[(&str, &str)]) -> Result<Vec<String>> {
        let migrated = run(&self.socket, &order(release, files)).await?;
        match migrated.fault {
            None => Ok(migrated.runs.into_iter().map(|run| run.file).collect()),
            Some(fault) => Err(fault),
        }
    }

    async fn one(&self, query: &str) -> String {
        let session = Session::open(&self.socket).await.unwrap();
        session.client.query_one(query, &[]).await.unwrap().get(0)
    }
}

fn order(release: &str, files: &[(&str, &str)]) -> Order {
    let migrations = files
        .iter()
        .map(|(name, sql)| Migration {
            name: (*name).to_owned(),
            hash: blake3::hash(sql.as_bytes()).to_hex().to_string(),
            sql: (*sql).to_owned(),
        })
        .collect();
    Order::new(release, migrations)
}

#[tokio::test]
async fn migrations_run_once_in_order_and_all_or_nothing() {
    let cluster = Cluster::start().await;
    let first = ("1.sql", "create table t (n int); insert into t values (1);");
    assert_eq!(cluster.run("v1", &[first]).await.unwrap(), ["1.sql"]);
    assert!(cluster.run("v1", &[first]).await.unwrap().is_empty());

    // The second of three fails half-way: the first stays, the second leaves nothing, the third is not tried.
    let files = [
        first,
        ("2.sql", "insert into t values (2)"),
        ("3.sql", "insert into t values (3);\ninsert into nowhere values (1);"),
        ("4.sql", "insert into t values (4)"),
    ];
    let error = cluster.run("v2", &files).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(
        error.to_string(),
        "migration \"3.sql\" failed: relation \"nowhere\" does not exist (SQLSTATE 42P01) at line 2, column 13"
    );
    assert_eq!(cluster.one("select string_agg(n::text, ',' order by n) from t").await, "1,2");
    assert_eq!(
        cluster.one("select string_agg(name || release, ',' order by name) from ebb.migrations").await,
        "1.sqlv1,2.sqlv2"
    );

    // Mended, the rest follows.
    let files = [first, files[1], ("3.sql", "insert into t values (3)"), files[3]];
    assert_eq!(cluster.run("v3", &files).await.unwrap(), ["3.sql", "4.sql"]);
    assert_eq!(cluster.one("select string_agg(n::text, ',' order by n) from t").await, "1,2,3,4");
}

#[tokio::test]
async fn what_a_migration_may_not_do_is_said() {
    let cluster = Cluster::start().await;
    let message = |outcome: Result<Vec<String>>| outcome.unwrap_err().to_string();
    cluster.run("v1", &[("1.sql", "create table t (n int)")]).await.unwrap();
    assert_eq!(
        message(cluster.run("v2", &[("1.sql", "create table t (n int, m int)")]).await),
        "migration \"1.sql\" failed: it was changed after it had been applied"
    );
    assert_eq!(
        message(cluster.run("v2", &[("2.sql", "insert into t values (2); commit; begin; select 1")]).await),
        "migration \"2.sql\" failed: it has COMMIT"
    );
    let superuser = message(cluster.run("v2", &[("3.sql", "copy t to program 'id'")]).await);
    assert!(superuser.contains("SQLSTATE 42501"), "{superuser}");
    let nameless = message(cluster.run("v2", &[("4.sql", "create index concurrently on t (n)")]).await);
    assert!(nameless.contains("without a name"), "{nameless}");
    // Where it cannot be seen, Postgres tells.
    let hidden = "do $$ begin execute 'vacuum'; end $$";
    let hidden = cluster.run("v2", &[("4.sql", hidden)]).await.unwrap_err();
    assert!(hidden.to_string().contains("SQLSTATE 25001") && advice(&hidden.to_string()).contains("of its own"));
    let ended = cluster.run("v2", &[("4.sql", "do $$ begin commit; end $$")]).await.unwrap_err().to_string();
    assert!(ended.contains("2D000"), "{ended}");
    cluster.run("v2", &[("4a.sql", "create type mood as enum ('sad')")]).await.unwrap();
    let unsafe_use = "alter type mood add value 'glad'; create table moods (m mood default 'glad')";
    let unsafe_use = cluster.run("v2", &[("4b.sql", unsafe_use)]).await.unwrap_err();
    assert!(unsafe_use.to_string().contains("55P04") && unsafe_use.hint().unwrap().contains("before"));
    // What a file sets does not reach the next one.
    let files = [("5.sql", "set search_path = nowhere"), ("6.sql", "insert into t values (6)")];
    cluster.run("v2", &files).await.unwrap();
}

#[tokio::test]
async fn positions_are_of_the_running_server() {
    let cluster = Cluster::start().await;
    let before = positions(&cluster.socket).await.unwrap();
    cluster.run("v1", &[("1.sql", "create table t (n int)")]).await.unwrap();
    let after = positions(&cluster.socket).await.unwrap();
    assert!(after.lsn > before.lsn && after.next_xid > before.next_xid, "{before:?} {after:?}");
}

const INDEX: (&str, &str) = ("2.sql", "create index concurrently by_n on t (n)");

#[tokio::test]
async fn what_cannot_run_in_a_transaction_runs_by_itself_and_once() {
    let cluster = Cluster::start().await;
    let first = ("1.sql", "create table t (n int); insert into t select generate_series(1, 1000)");
    let migrated = run(&cluster.socket, &order("v1", &[first, INDEX, ("3.sql", "vacuum t")])).await.unwrap();
    assert!(migrated.fault.is_none(), "{migrated:?}");
    assert_eq!(migrated.runs.iter().map(|run| run.outside).collect::<Vec<_>>(), [false, true, true]);
    assert_eq!(cluster.one("select indisvalid::text from pg_index where indexrelid = 'by_n'::regclass").await, "true");
    assert!(cluster.run("v2", &[first, INDEX]).await.unwrap().is_empty(), "it ran again");
    assert_eq!(cluster.run("v2", &[("4.sql", "drop index concurrently by_n")]).await.unwrap(), ["4.sql"]);
    assert_eq!(cluster.one("select count(*)::text from ebb.outside").await, "0");
}

/// A process that is gone had begun the index: it is there, or a part of it is, or nothing.
#[tokio::test]
async fn what_a_crash_left_of_it_is_found() {
    let cluster = Cluster::start().await;
    cluster.run("v1", &[("1.sql", "create table t (n int)")]).await.unwrap();
    let begun = "insert into ebb.outside (name) values ('2.sql')";
    let sql = |text: &'static str| {
        let session = Session::open(&cluster.socket);
        async move { session.await.unwrap().client.batch_execute(text).await.unwrap() }
    };
    // It had come to its end: it is not made again.
    sql("create index by_n on t (n)").await;
    sql(begun).await;
    let before = cluster.one("select 'by_n'::regclass::oid::text").await;
    assert_eq!(cluster.run("v2", &[INDEX]).await.unwrap(), ["2.sql"]);
    assert_eq!(cluster.one("select 'by_n'::regclass::oid::text").await, before);
    // A part of it is there: a unique index that found duplicates is left invalid.
    sql("delete from ebb.migrations where name = '2.sql'; drop index by_n; insert into t values (1), (1)").await;
    let session = Session::open(&cluster.socket).await.unwrap();
    session.client.batch_execute("create unique index concurrently by_n on t (n)").await.unwrap_err();
    sql(begun).await;
    assert_eq!(cluster.run("v2", &[INDEX]).await.unwrap(), ["2.sql"]);
    assert_eq!(
        cluster
            .one("select (indisvalid and not indisunique)::text from pg_index where indexrelid = 'by_n'::regclass")
            .await,
        "true"
    );
    // One that fails leaves nothing.
    let unique = ("3.sql", "create unique index concurrently once on t (n)");
    assert!(cluster.run("v2", &[unique]).await.unwrap_err().to_string().contains("23505"));
    assert_eq!(cluster.one("select (to_regclass('once') is null)::text").await, "true");
    assert_eq!(cluster.one("select count(*)::text from ebb.outside").await, "0");
}

#[tokio::test]
async fn what_an_interrupted_process_left_running_is_ended() {
    let cluster = Cluster::start().await;
    cluster.run("v1", &[("1.sql", "create table t (n int)")]).await.unwrap();
    let left = Session::open_as(&cluster.socket, OWNER, DATABASE, APPLICATION).await.unwrap();
    left.client.batch_execute("begin; insert into t values (1); lock table t").await.unwrap();
    assert_eq!(applied(&cluster.socket, "v1").await.unwrap(), 1);
    assert_eq!(cluster.run("v2", &[("2.sql", "alter table t add m int")]).await.unwrap(), ["2.sql"]);
    assert!(left.client.batch_execute("commit").await.is_err(), "it went on");
}

#[tokio::test]
async fn a_lock_is_waited_for_no_longer_than_the_policy_says() {
    let cluster = Cluster::start().await;
    cluster.run("v1", &[("1.sql", "create table t (n int)")]).await.unwrap();
    let holder = Session::open(&cluster.socket).await.unwrap();
    holder.client.batch_execute("begin; select * from t").await.unwrap();
    let order = Order { lock_timeout_ms: 50, ..order("v2", &[("2.sql", "alter table t add m int")]) };
    let fault = run(&cluster.socket, &order).await.unwrap().fault.unwrap();
    assert!(fault.to_string().contains("55P03") && fault.hint().unwrap().contains("lock_timeout"), "{fault}");
}

#[tokio::test]
async fn a_rehearsal_tells_what_is_locked_rewritten_and_written() {
    let cluster = Cluster::start().await;
    let tables = "create table t (n int); insert into t select generate_series(1, 500); create table u (n int)";
    cluster.run("v1", &[("1.sql", tables)]).await.unwrap();
    let files = [
        ("2.sql", "alter table t alter n type bigint; update t set n = n + 1 where n <= 20; insert into u values (1)"),
        ("3.sql", "create index concurrently by_n on t (n)"),
    ];
    let order = Order { observed: true, alone: true, ..order("v2", &files) };
    let migrated = run(&cluster.socket, &order).await.unwrap();
    assert!(migrated.fault.is_none() && migrated.transactions >= 3, "{migrated:?}");
    let [alter, index] = &migrated.runs[..] else { panic!("{migrated:?}") };
    assert_eq!((alter.locks[0].relation.as_str(), alter.locks[0].mode.as_str()), ("t", "AccessExclusiveLock"));
    assert_eq!(alter.locks.iter().find(|lock| lock.relation == "u").unwrap().mode, "RowExclusiveLock");
    assert_eq!(alter.rewritten.iter().map(|one| one.table.as_str()).collect::<Vec<_>>(), ["t"]);
    let rows: Vec<_> = alter.rows.iter().map(|rows| (rows.table.as_str(), rows.inserted, rows.updated)).collect();
    assert_eq!(rows, [("public.t", 0, 20), ("public.u", 1, 0)]);
    assert!(index.outside && index.rewritten.is_empty());
}
