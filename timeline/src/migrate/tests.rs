//! Migrations on a real Postgres of the test's own.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::test_postgres::{initdb, unprivileged};
use ebb_types::ErrorKind;

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
        let migrations: Vec<_> = files
            .iter()
            .map(|(name, sql)| Migration {
                name: (*name).to_owned(),
                hash: blake3::hash(sql.as_bytes()).to_hex().to_string(),
                sql: (*sql).to_owned(),
            })
            .collect();
        run(&self.socket, release, &migrations).await
    }

    async fn one(&self, query: &str) -> String {
        let session = Session::open(&self.socket).await.unwrap();
        session.client.query_one(query, &[]).await.unwrap().get(0)
    }
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
        "migration \"2.sql\" failed: it ends its transaction by itself (COMMIT or ROLLBACK): take that out"
    );
    let superuser = message(cluster.run("v2", &[("3.sql", "copy t to program 'id'")]).await);
    assert!(superuser.contains("SQLSTATE 42501"), "{superuser}");
    let outside = message(cluster.run("v2", &[("4.sql", "create index concurrently on t (n)")]).await);
    assert!(outside.contains("SQLSTATE 25001"), "{outside}");
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
