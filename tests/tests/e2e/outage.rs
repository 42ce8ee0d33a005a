//! A bucket that is away stops no branch that this node has.

use std::fs;

use ebb_tests::{Node, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn branches_wake_and_sleep_on_while_the_bucket_is_away() {
    let bucket = tempfile::tempdir().expect("a directory can be made");
    let (at, away) = (bucket.path().join("bucket"), bucket.path().join("away"));
    let mut node = Node::prepare().bucket(&at);
    node.serve();
    node.ok(&["project", "create", "shop"]);
    node.ok(&["branch", "set", "shop/prod", "--idle-suspend", "1s"]);
    let url = node.url("shop/prod");
    let client = node.connect("shop/prod").await;
    client.batch_execute("create table t (n int)").await.expect("a table can be made");
    node.wait_state("shop/prod", "suspended");
    wait_for("the upload", || fs::read_dir(at.join("layers")).is_ok_and(|dir| dir.count() >= 2));

    fs::rename(&at, &away).expect("a directory can be renamed");
    // Nor can one be made in its place.
    fs::write(&at, "").expect("a file can be written");
    // For longer than this node's record in the bucket is good for.
    for n in 1..=3 {
        let inserted = client.execute("insert into t values ($1)", &[&n]).await;
        inserted.unwrap_or_else(|error| panic!("in round {n}: {error:?}"));
        node.wait_state("shop/prod", "suspended");
        let newcomer = node.try_connect(&url).await.unwrap_or_else(|error| panic!("in round {n}: {error:?}"));
        let row = newcomer.query_one("select count(*)::int from t", &[]).await.expect("the branch is awake");
        assert_eq!(row.get::<_, i32>(0), n);
        node.wait_state("shop/prod", "suspended");
    }

    fs::remove_file(&at).expect("a file can be removed");
    fs::rename(&away, &at).expect("a directory can be renamed");
    wait_for("what was sealed meanwhile to be recorded", || {
        node.ebb(&["checkpoint", "create", "shop/prod", "after"]).code == 0
    });
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
    assert_eq!(client.query_one("select count(*) from t", &[]).await.expect("it was kept").get::<_, i64>(0), 3);
    drop(client);
}
