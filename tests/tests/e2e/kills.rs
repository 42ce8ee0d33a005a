//! `kill -9` of everything, each with a client writing: every acknowledged row is there.

use ebb_tests::{Node, Writer};

fn assert_all_there(node: &Node, branch: &str, last: i64) {
    let count = node.psql(branch, &format!("select count(*) from acknowledged where n <= {last}"));
    assert_eq!(count, last.to_string(), "an acknowledged row of {branch} is lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_killed() {
    let node = Node::with_shop();
    let writer = Writer::start(node.url("shop/prod")).await;
    for _ in 0..3 {
        writer.progress(30).await;
        node.kill_9(node.postmaster_pid("shop/prod"));
        writer.progress(10).await;
    }
    let (last, errors) = writer.stop().await;
    assert_all_there(&node, "shop/prod", last);
    assert!(errors.iter().all(|error| !error.starts_with("XX")), "the errors are truthful: {errors:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unit_killed() {
    let node = Node::with_shop();
    let writer = Writer::start(node.url("shop/prod")).await;
    for _ in 0..3 {
        writer.progress(30).await;
        node.kill_9(node.unit_pid("shop/prod"));
        writer.progress(10).await;
    }
    let (last, _) = writer.stop().await;
    assert_all_there(&node, "shop/prod", last);
    let ran = node.superuser_tool("shop/prod", "pg_amcheck", &["--install-missing", "--heapallindexed", "-d", "app"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_killed() {
    let mut node = Node::with_shop();
    let writer = Writer::start(node.url("shop/prod")).await;
    let mut postmaster = None;
    for _ in 0..3 {
        writer.progress(30).await;
        let pid = node.postmaster_pid("shop/prod");
        assert!(postmaster.is_none_or(|before| before == pid), "the running compute was adopted, not replaced");
        postmaster = Some(pid);
        node.kill_server();
        node.serve();
        writer.progress(10).await;
    }
    let (last, _) = writer.stop().await;
    assert_all_there(&node, "shop/prod", last);
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_killed_at_once() {
    let mut node = Node::with_shop();
    let writer = Writer::start(node.url("shop/prod")).await;
    writer.progress(50).await;
    let unit = node.unit_pid("shop/prod");
    node.kill_server();
    node.kill_9(unit);
    node.serve();
    writer.progress(10).await;
    let (last, _) = writer.stop().await;
    assert_all_there(&node, "shop/prod", last);
}

/// Operations are cut off by killing the server at many moments; each comes to done or undone, and the ledger holds.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_killed_in_the_middle_of_operations() {
    let mut node = Node::with_shop();
    node.psql("shop/prod", "create table t as select 1 as n");
    node.ok(&["checkpoint", "create", "shop/prod", "start"]);
    for (round, delay_ms) in [1, 5, 15, 40, 80, 150].into_iter().enumerate() {
        node.psql("shop/prod", &format!("create table if not exists r{round} (n int)"));
        let (name, branch) = (format!("c{round}"), format!("shop/b{round}"));
        let checkpoint = ["checkpoint", "create", "shop/prod", &name];
        let create = ["branch", "create", &branch, "--from", "shop/prod"];
        let restore = ["branch", "restore", "shop/prod", "--to", "start"];
        std::thread::scope(|scope| {
            let asked = &node;
            for args in [&checkpoint[..], &create[..], &restore[..]] {
                scope.spawn(move || asked.ebb(args));
            }
            std::thread::sleep(std::time::Duration::from_millis(delay_ms));
            ebb_tests::kill("KILL", asked.server_pid());
        });
        node.kill_server();
        node.serve();
        assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
        assert_eq!(node.psql("shop/prod", "select n from t"), "1");
        for listed in node.json(&["branch", "list", "shop"])["branches"].as_array().expect("a list") {
            let listed = format!("shop/{}", listed["name"].as_str().expect("a branch has a name"));
            assert_eq!(node.ebb(&["branch", "show", &listed]).code, 0);
        }
        if node.ebb(&["branch", "show", &branch]).code == 0 {
            assert_eq!(node.psql(&branch, "select n from t"), "1", "a branch that exists is whole");
            node.ok(&["branch", "delete", &branch]);
        }
    }
}
