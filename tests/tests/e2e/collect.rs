//! What nothing needs goes; what anything needs stays, whatever happens meanwhile.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use ebb_tests::{Node, wait_for};

fn names(dir: std::path::PathBuf) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| !name.starts_with('.')).collect()
}

fn stored(node: &Node) -> BTreeSet<String> {
    names(node.data().join("bucket/layers"))
}

fn node_without_grace() -> Node {
    let mut node = Node::prepare().env("EBB_COLLECT_GRACE", "0s");
    node.serve();
    node.ok(&["project", "create", "shop"]);
    node
}

fn assert_fsck_clean(node: &Node) {
    let bucket = node.data().join("bucket");
    let ran = node.ebb(&["fsck", "--bucket", bucket.to_str().expect("test paths are UTF-8")]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
}

#[test]
fn a_deleted_branch_leaves_the_bucket_and_the_node_and_why_tells_all_along() {
    let node = node_without_grace();
    node.psql("shop/prod", "create table t as select generate_series(1, 20000) as n");
    // So that the pages are in the layer, and not only WAL that each branch would write out anew.
    node.suspend("shop/prod");
    node.ok(&["checkpoint", "create", "shop/prod", "one"]);
    node.ok(&["branch", "create", "shop/pr-1", "--from", "shop/prod@one"]);
    node.psql("shop/pr-1", "update t set n = -n");
    node.suspend("shop/pr-1");
    node.suspend("shop/prod");
    let shown = node.json(&["branch", "show", "shop/pr-1"]);
    let head = shown["head"].as_str().expect("a branch has a head").to_owned();
    wait_for("the upload", || stored(&node).contains(&head));
    let kept = node.ok(&["why", &head]);
    assert!(kept.contains("kept by head of shop/pr-1"), "{kept}");
    let checkpoint = node.json(&["checkpoint", "list", "shop/prod"])["checkpoints"][0]["layer"].clone();
    let kept = node.ok(&["why", checkpoint.as_str().expect("a checkpoint has a layer")]);
    assert!(kept.contains("kept by checkpoint one of shop/prod"), "{kept}");
    assert!(kept.contains(&format!("kept by head of shop/pr-1, through layer {head}")), "{kept}");

    let accounts = |name: &str| node.json(&["branch", "show", name])["stored"].clone();
    let own = accounts("shop/pr-1")["own_bytes"].as_u64().expect("bytes are counted");
    assert_eq!(own, std::fs::metadata(node.data().join("bucket/layers").join(&head)).expect("it is there").len());
    assert!(accounts("shop/pr-1")["shared_bytes"].as_u64() > Some(0));
    assert!(node.ok(&["branch", "show", "shop/pr-1"]).contains("stored"));
    assert!(node.json(&["project", "show", "shop"])["stored"]["own_bytes"].as_u64() >= Some(own));

    assert_eq!(node.json(&["collect", "--dry-run"])["marked"].as_array().map(Vec::len), Some(0));
    node.ok(&["branch", "delete", "shop/pr-1"]);
    let dry = node.json(&["collect", "--dry-run"]);
    assert_eq!(dry["marked"][0]["object"], format!("layers/{head}"), "{dry}");
    assert_eq!(dry["marked"][0]["bytes"], own);
    assert!(stored(&node).contains(&head), "a dry run deletes nothing");
    assert_fsck_clean(&node);
    let done = node.json(&["collect"]);
    assert_eq!(done["deleted"][0]["object"], format!("layers/{head}"), "{done}");
    assert!(!stored(&node).contains(&head));
    assert!(!names(node.data().join("layers")).contains(&head), "the node keeps nothing of it either");
    let gone = node.ok(&["why", &head]);
    assert!(gone.contains("deleted") && gone.contains("let go by delete branch pr-1"), "{gone}");
    assert_eq!(node.psql("shop/prod", "select count(*) from t where n > 0"), "20000");
    node.ok(&["branch", "create", "shop/again", "--from", "shop/prod@one"]);
    assert_eq!(node.psql("shop/again", "select sum(n) from t"), "200010000");
    assert_fsck_clean(&node);
    assert_eq!(node.ebb(&["why", "a b"]).code, 2);
}

#[test]
fn the_server_collects_by_itself_and_keeps_its_grace() {
    let mut node = Node::prepare().env("EBB_COLLECT_GRACE", "3s").env("EBB_COLLECT_INTERVAL", "1s");
    node.serve();
    node.ok(&["project", "create", "shop"]);
    node.ok(&["branch", "create", "shop/pr-1", "--from", "shop/prod"]);
    node.psql("shop/pr-1", "create table t (n int)");
    node.suspend("shop/pr-1");
    let head = node.json(&["branch", "show", "shop/pr-1"])["head"].as_str().expect("a head").to_owned();
    wait_for("the upload", || stored(&node).contains(&head));
    // It must be older than the grace period to be looked at; then it waits for another.
    node.ok(&["branch", "delete", "shop/pr-1"]);
    let begun = Instant::now();
    wait_for("the mark", || node.json(&["why", &head])["verdict"] == "marked");
    wait_for("the object to go", || !stored(&node).contains(&head));
    assert!(begun.elapsed() >= Duration::from_secs(3), "it went after {:?}", begun.elapsed());
    wait_for("the receipt", || node.json(&["why", &head])["verdict"] == "deleted");
    assert_fsck_clean(&node);
}

#[test]
fn collecting_without_pause_under_load_and_kills_loses_nothing() {
    let mut node = node_without_grace();
    let ran = node.tool("pgbench", &["-q", "-i", "-s", "1", &node.url("shop/prod")]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for round in 0..6 {
        let ran = node.tool("pgbench", &["-n", "-c", "2", "-t", "50", &node.url("shop/prod")]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let (name, from) = (format!("shop/b-{round}"), format!("shop/prod@c-{round}"));
        node.ok(&["checkpoint", "create", "shop/prod", &format!("c-{round}")]);
        node.ok(&["branch", "create", &name, "--from", &from]);
        node.psql(&name, "delete from pgbench_history");
        node.suspend(&name);
        // Collection meets whatever the rest is doing; one round in two is cut off in the middle.
        let collecting = std::thread::scope(|scope| {
            let collecting = scope.spawn(|| node.ebb(&["collect"]).code);
            if round % 2 == 1 {
                node.ok(&["branch", "delete", &name]);
                node.ok(&["checkpoint", "delete", "shop/prod", &format!("c-{round}")]);
            }
            node.psql("shop/prod", "select 1");
            if round % 3 == 2 {
                node.kill_9(node.server_pid());
            }
            collecting.join().expect("the command ran")
        });
        if round % 3 == 2 {
            node.kill_server();
            node.serve();
        } else {
            assert_eq!(collecting, 0);
        }
    }
    node.ok(&["collect"]);
    for round in [0, 2, 4] {
        let name = format!("shop/b-{round}");
        assert_eq!(node.psql(&name, "select count(*) from pgbench_history"), "0");
        node.ok(&["branch", "create", &format!("shop/look-{round}"), "--from", &format!("shop/prod@c-{round}")]);
        let rows = node.psql(&format!("shop/look-{round}"), "select count(*) from pgbench_history");
        assert_eq!(rows, ((round + 1) * 100).to_string());
    }
    assert_eq!(node.psql("shop/prod", "select count(*) from pgbench_history"), "600");
    let ran = node.superuser_tool("shop/prod", "pg_amcheck", &["--install-missing", "--heapallindexed", "-d", "app"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    node.stop();
    assert_fsck_clean(&node);

    // And the bucket alone has it all.
    let copy = node.scratch().join("copy");
    let copied = Command::new("cp").arg("-a").arg(node.data().join("bucket")).arg(&copy).status();
    assert!(copied.expect("cp can be started").success());
    let mut second = Node::prepare().bucket(&copy).env("EBB_COLLECT_GRACE", "0s");
    second.serve();
    second.ok(&["collect"]);
    for (branch, rows) in [("shop/prod", "600"), ("shop/b-4", "0"), ("shop/look-2", "300")] {
        second.ok(&["compute", "wake", branch]);
        let asked = ["-XAtq", "-d", "app", "-c", "select count(*) from pgbench_history"];
        assert_eq!(second.superuser_tool(branch, "psql", &asked).stdout.trim(), rows, "{branch}");
    }
}
