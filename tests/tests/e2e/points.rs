//! Any moment of a branch: by position and by time, exactly.

use ebb_tests::{Node, kill, write_history as write};

fn numbers(node: &Node, branch: &str) -> String {
    node.psql(branch, "select coalesce(max(n), 0) || ' of ' || count(*) from history")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_position_and_time_holds_exactly_what_was_committed_by_then() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key)");
    // A seal that is behind all that follows: positions before a branch's first seal cannot be reached.
    node.ok(&["checkpoint", "create", "shop/prod", "begin"]);
    let client = node.connect("shop/prod").await;
    let mut written = write(&client, 1..=40).await;
    // Replay begins at whatever seal is before: there are some in between.
    node.ok(&["checkpoint", "create", "shop/prod", "middle"]);
    written.extend(write(&client, 41..=80).await);
    drop(client);
    node.suspend("shop/prod");
    let client = node.connect("shop/prod").await;
    written.extend(write(&client, 81..=100).await);

    let tries: usize = std::env::var("EBB_POINTS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    for number in 0..tries {
        let row = &written[(number * 61 + 7) % written.len()];
        for (kind, point) in [("lsn", &row.lsn), ("time", &row.at)] {
            let branch = format!("shop/{kind}-{number}");
            node.ok(&["branch", "create", &branch, "--from", &format!("shop/prod@{point}")]);
            assert_eq!(numbers(&node, &branch), format!("{} of {}", row.n, row.n), "at {kind} {point}");
            node.ok(&["branch", "delete", &branch]);
        }
    }
    assert_eq!(numbers(&node, "shop/prod"), "100 of 100", "the source goes on as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_is_restored_to_a_time_and_its_history_goes_on_from_there() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key)");
    node.ok(&["checkpoint", "create", "shop/prod", "begin"]);
    let client = node.connect("shop/prod").await;
    let first = write(&client, 1..=20).await;

    node.ok(&["branch", "restore", "shop/prod", "--to", &first[9].at]);
    assert_eq!(numbers(&node, "shop/prod"), "10 of 10");
    // The client was kept, and writes another history.
    let second = write(&client, 101..=110).await;
    node.ok(&["branch", "create", "shop/second", "--from", &format!("shop/prod@{}", second[4].lsn)]);
    assert_eq!(numbers(&node, "shop/second"), "105 of 15", "a position on the new line");
    node.ok(&["branch", "create", "shop/first", "--from", &format!("shop/prod@{}", first[14].at)]);
    assert_eq!(numbers(&node, "shop/first"), "15 of 15", "a time is what clients saw then");

    // A branch of a moment has a history of its own.
    let client = node.connect("shop/second").await;
    let third = write(&client, 201..=210).await;
    node.ok(&["branch", "create", "shop/third", "--from", &format!("shop/second@{}", third[2].at)]);
    assert_eq!(numbers(&node, "shop/third"), "203 of 18");
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moment_is_exported_and_an_empty_node_reaches_it_out_of_the_bucket() {
    let bucket = tempfile::tempdir().expect("a directory for the bucket");
    let mut node = Node::prepare().bucket(bucket.path());
    node.serve();
    node.ok(&["project", "create", "shop"]);
    node.psql("shop/prod", "create table history (n bigint primary key)");
    node.ok(&["checkpoint", "create", "shop/prod", "begin"]);
    let client = node.connect("shop/prod").await;
    let written = write(&client, 1..=20).await;
    drop(client);
    let dir = node.scratch().join("export");
    node.ok(&["export", &format!("shop/prod@{}", written[11].lsn), dir.to_str().expect("test paths are UTF-8")]);
    assert!(dir.join("PG_VERSION").exists() && !dir.join("recovery.signal").exists());
    node.stop();

    let other = node.scratch().join("other-node");
    let mut node = node.data_dir(&other);
    node.serve();
    node.ok(&["branch", "create", "shop/past", "--from", &format!("shop/prod@{}", written[7].at)]);
    // Its passwords cannot be read without the first node's key.
    node.ok(&["compute", "wake", "shop/past"]);
    let sql = "select max(n) || ' of ' || count(*) from history";
    assert_eq!(node.superuser_tool("shop/past", "psql", &["-XAtq", "-d", "app", "-c", sql]).stdout.trim(), "8 of 8");
}

#[test]
fn a_moment_outside_of_the_window_is_refused_with_its_bounds() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t ()");
    let from = node.json(&["branch", "show", "shop/prod"])["window_from"].as_str().expect("a time").to_owned();
    for point in ["2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z", "0/1"] {
        let ran = node.ebb(&["branch", "create", "shop/past", "--from", &format!("shop/prod@{point}")]);
        assert_ne!(ran.code, 0, "{point}: {ran:?}");
        assert!(ran.stderr.contains("any moment from"), "{point}: {ran:?}");
    }
    node.ok(&["branch", "set", "shop/prod", "--window", "0s"]);
    let ran = node.ebb(&["branch", "create", "shop/past", "--from", &format!("shop/prod@{from}")]);
    assert_ne!(ran.code, 0, "{ran:?}");
}

/// The node dies as a whole, in the middle of work: what clients were told is in the bucket.
#[tokio::test(flavor = "multi_thread")]
async fn no_commit_acknowledged_at_durability_bucket_is_lost_with_the_node() {
    let bucket = tempfile::tempdir().expect("a directory for the bucket");
    let mut node = Node::prepare().bucket(bucket.path());
    node.serve();
    node.ok(&["project", "create", "shop"]);
    node.ok(&["branch", "set", "shop/prod", "--durability", "bucket"]);
    on_prod(&node, "create table history (n bigint primary key)");
    let mut acknowledged = 0;
    // Each node finds what the one before it was told, on whatever Postgres timeline, and goes on.
    for round in 0..3 {
        for n in acknowledged + 1..=acknowledged + 25 {
            on_prod(&node, &format!("insert into history values ({n})"));
        }
        acknowledged += 25;
        let unit = node.unit_pid("shop/prod");
        node.kill_server();
        kill("KILL", unit);
        // Dropping the node deletes its disk.
        node = Node::prepare().bucket(bucket.path());
        node.serve();
        let woken = node.ebb(&["compute", "wake", "shop/prod"]);
        assert_eq!(woken.code, 0, "after node {round}: {woken:?}\n{}", node.server_log());
        let found = on_prod(&node, "select max(n) || ' of ' || count(*) from history");
        assert_eq!(found, format!("{acknowledged} of {acknowledged}"), "after node {round}");
    }
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

/// Each call is a session, and a commit, of its own.
fn on_prod(node: &Node, sql: &str) -> String {
    node.ok(&["compute", "wake", "shop/prod"]);
    let ran = node.superuser_tool("shop/prod", "psql", &["-XAtq", "-d", "app", "-c", sql]);
    let log = |name: &str| std::fs::read_to_string(node.branch_dir("shop/prod").join(name)).unwrap_or_default();
    assert_eq!(ran.code, 0, "{sql}: {}\n{}\n{}", ran.stderr, log("unit.log"), log("postgres.log"));
    ran.stdout.trim().to_owned()
}
