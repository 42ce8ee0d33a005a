//! A server ends: transactions finish first. Another one takes over: nobody who knocks meanwhile is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ebb_tests::{Node, wait_for};
use tokio_postgres::NoTls;

/// Transactions of pgbench that take a moment.
fn slow_transactions(node: &Node) -> std::path::PathBuf {
    let script = node.scratch().join("slow.sql");
    let text = "begin;\ninsert into t values (1);\n\\sleep 700 ms\ninsert into t values (1);\ncommit;\n";
    std::fs::write(&script, text).expect("a script can be written");
    script
}

#[test]
fn a_server_that_stops_lets_pgbench_finish_its_transactions() {
    let mut node = Node::with_shop();
    node.psql("shop/prod", "create table t (n int)");
    let (url, script) = (node.url("shop/prod"), slow_transactions(&node));
    let bench = std::thread::spawn({
        let script = script.to_string_lossy().into_owned();
        let pgbench = ebb_tests::pg_bin().join("pgbench");
        move || std::process::Command::new(pgbench).args(["-n", "-c", "4", "-t", "1", "-f", &script, &url]).output()
    });
    let begun = || node.superuser_tool("shop/prod", "psql", &["-XAtq", "app", "-c", IN_TRANSACTION]).stdout;
    wait_for("pgbench to be in its transactions", || begun().trim() == "4");
    node.stop();
    let output = bench.join().expect("the thread does not panic").expect("pgbench can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    node.serve();
    assert_eq!(node.psql("shop/prod", "select count(*) from t"), "8");
}

const IN_TRANSACTION: &str = "select count(*) from pg_stat_activity where state = 'idle in transaction'";

/// Something done over and over until the end, and how often.
#[derive(Default)]
struct Knocks {
    over: AtomicBool,
    done: AtomicUsize,
}

impl Knocks {
    fn more(&self) -> bool {
        !self.over.load(Ordering::SeqCst)
    }

    fn was_answered(&self) {
        self.done.fetch_add(1, Ordering::SeqCst);
    }

    fn wait_for_more(&self, what: &str) {
        let before = self.done.load(Ordering::SeqCst);
        wait_for(what, || self.done.load(Ordering::SeqCst) > before + 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_over_refuses_nobody_and_cuts_no_transaction() {
    let mut node = Node::with_shop();
    node.psql("shop/prod", "create table t (n int)");
    let (postmaster, url) = (node.postmaster_pid("shop/prod"), node.url("shop/prod"));
    let [plain, tls, api]: [Arc<Knocks>; 3] = Default::default();

    let knocking = tokio::spawn({
        let (knocks, url) = (plain.clone(), url.clone());
        async move {
            while knocks.more() {
                let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
                let driven = tokio::spawn(connection);
                client.simple_query("select 1").await?;
                drop(client);
                let _ = driven.await;
                knocks.was_answered();
            }
            Ok::<_, tokio_postgres::Error>(())
        }
    });
    let knocking_over_tls = tokio::task::spawn_blocking({
        let (knocks, psql) = (tls.clone(), ebb_tests::pg_bin().join("psql"));
        let url = format!("{url}{}sslmode=require", if url.contains('?') { '&' } else { '?' });
        move || {
            while knocks.more() {
                let output = std::process::Command::new(&psql).args(["-XAtq", &url, "-c", "select 1"]).output();
                let output = output.expect("psql can be run");
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                knocks.was_answered();
            }
        }
    });
    let knocking_at_the_api = tokio::task::spawn_blocking({
        let (knocks, health) = (api.clone(), format!("http://127.0.0.1:{}/v1/health", node.api_port));
        move || {
            while knocks.more() {
                ureq::get(&health).call().expect("the API is never away");
                knocks.was_answered();
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    let everybody = [&plain, &tls, &api];
    let _ = everybody.map(|knocks| knocks.wait_for_more("the first server to answer"));

    let mut client = node.connect("shop/prod").await;
    let open = client.transaction().await.expect("a transaction can be begun");
    open.batch_execute("insert into t values (1)").await.expect("a row can be inserted");
    let mut old = node.begin_take_over();
    wait_for("the first server to step back", || node.server_log().contains("another process takes over"));
    open.batch_execute("insert into t values (2)").await.expect("the transaction goes on");
    open.commit().await.expect("the transaction can be committed");
    tokio::task::block_in_place(|| node.end_take_over(&mut old));

    let _ = everybody.map(|knocks| knocks.wait_for_more("the second server to answer"));
    let _ = everybody.map(|knocks| knocks.over.store(true, Ordering::SeqCst));
    knocking.await.expect("no panic").expect("nobody is refused");
    knocking_over_tls.await.expect("nobody is refused over TLS");
    knocking_at_the_api.await.expect("nobody is refused at the API");
    assert_eq!(node.psql("shop/prod", "select sum(n) from t"), "3");
    assert_eq!(node.postmaster_pid("shop/prod"), postmaster, "the compute went on");
    let error = client.simple_query("select 1").await.expect_err("an idle session is told to come back");
    assert!(error.is_closed() || error.code().is_some_and(|code| code.code() == "57P01"), "{error:?}");
}

#[test]
fn taking_over_from_nobody_is_a_start() {
    let mut node = Node::prepare().arg("--take-over");
    node.serve();
    node.ok(&["project", "create", "shop"]);
    assert_eq!(node.psql("shop/prod", "select 1"), "1");
}
