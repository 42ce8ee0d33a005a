//! A branch is taken back while clients are connected.

use ebb_tests::{Node, Writer};

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_under_load_is_a_pause_and_no_error() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t as select 'before' as word");
    let writer = Writer::start(node.url("shop/prod")).await;
    writer.progress(20).await;
    node.ok(&["checkpoint", "create", "shop/prod", "good"]);
    let at_checkpoint = writer.last();
    let reader = node.connect("shop/prod").await;
    reader.batch_execute("update t set word = 'after'").await.expect("the table can be changed");
    writer.progress(20).await;

    let restored = node.json(&["branch", "restore", "shop/prod", "--to", "good"]);
    writer.progress(20).await;
    let row = reader.query_one("select word from t", &[]).await.expect("the reader was kept");
    assert_eq!(row.get::<_, String>(0), "before", "never the old data after a restore");
    let (_, errors) = writer.stop().await;
    assert_eq!(errors, Vec::<String>::new(), "clients see a pause, not an error");

    let rescue = restored["rescue"]["name"].as_str().expect("a restore names its rescue branch");
    let rescue_ref = format!("shop/{rescue}");
    assert_eq!(node.psql(&rescue_ref, "select word from t"), "after", "what was set aside is kept");
    let kept: i64 = node.psql(&rescue_ref, "select max(n) from acknowledged").parse().expect("a number");
    assert!(kept >= at_checkpoint + 20, "every row written before the restore is in the rescue branch");
    let ran = node.ebb(&["branch", "delete", &rescue_ref]);
    assert_eq!(ran.code, 4, "a rescue branch is kept until its date: {ran:?}");
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[test]
fn a_branch_can_be_restored_again_and_again_and_exported_at_any_checkpoint() {
    let node = Node::with_shop();
    for n in 1..=3 {
        node.psql("shop/dev", &format!("drop table if exists t; create table t as select {n} as n"));
        node.ok(&["checkpoint", "create", "shop/dev", &format!("c{n}")]);
    }
    for n in [1, 3, 2] {
        node.ok(&["branch", "restore", "shop/dev", "--to", &format!("c{n}")]);
        assert_eq!(node.psql("shop/dev", "select n from t"), n.to_string());
    }
    let dir = node.scratch().join("export");
    node.ok(&["export", "shop/dev@c1", dir.to_str().expect("test paths are UTF-8")]);
    assert!(dir.join("PG_VERSION").exists() && dir.join("pg_wal").is_dir());
    let ran = node.ebb(&["export", "shop/dev@c1", dir.to_str().expect("test paths are UTF-8")]);
    assert_ne!(ran.code, 0, "an export does not overwrite");
    let ran = node.ebb(&["branch", "restore", "shop/dev", "--to", "c9"]);
    assert_eq!(ran.code, 3, "{ran:?}");
}

#[test]
fn pgbench_sees_latency_and_no_error_while_its_branch_is_taken_back() {
    let node = Node::with_shop();
    let url = node.url("shop/prod");
    let made = node.tool("pgbench", &["-iq", "-s", "1", &url]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    node.ok(&["checkpoint", "create", "shop/prod", "begin"]);
    for mode in ["simple", "extended", "prepared"] {
        let wakes = node.wakes("shop/prod");
        let ran = std::thread::scope(|threads| {
            let bench =
                threads.spawn(|| node.tool("pgbench", &["-n", "-M", mode, "-c", "4", "-j", "4", "-t", "1000", &url]));
            for _ in 0..3 {
                node.ok(&["branch", "restore", "shop/prod", "--to", "begin"]);
            }
            assert!(!bench.is_finished(), "pgbench has more to do than that");
            bench.join().expect("pgbench ends")
        });
        assert_eq!(ran.code, 0, "{mode}: {}", ran.stderr);
        assert!(ran.stdout.contains("number of transactions actually processed: 4000/4000"), "{mode}: {}", ran.stdout);
        assert!(!ran.stderr.contains("ERROR") && !ran.stderr.contains("FATAL"), "{mode}: {}", ran.stderr);
        assert!(node.wakes("shop/prod") > wakes, "it was taken back under way");
    }
}
