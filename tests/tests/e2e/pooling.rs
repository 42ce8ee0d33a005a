//! Transaction mode, end to end: how many backends, who may sleep, which names.

use std::collections::BTreeSet;
use std::sync::Arc;

use ebb_tests::Node;
use tokio::task::JoinSet;

/// The URL of a branch's pooler.
fn pooler(node: &Node, branch: &str) -> String {
    node.url(branch).replace("--shop", "--shop-pooler")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branchs_pool_is_as_large_as_it_is_set_and_sleeps_when_its_clients_do() {
    let node = Node::with_shop();
    let url = pooler(&node, "shop/prod");
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(Arc::new(node.try_connect(&url).await.expect("the pooler answers")));
    }
    let backends = async || {
        let mut asking = JoinSet::new();
        for client in clients.clone() {
            asking.spawn(async move { client.query_one("select pg_backend_pid(), pg_sleep(0.02)", &[]).await });
        }
        let answers = asking.join_all().await.into_iter();
        answers.map(|row| row.expect("it is answered").get::<_, i32>(0)).collect::<BTreeSet<_>>().len()
    };
    assert!(backends().await > 2, "a quarter of what Postgres takes");
    node.ok(&["branch", "set", "shop/prod", "--pool-size", "2"]);
    assert!(node.ok(&["branch", "show", "shop/prod"]).contains("2 backends"));
    // The next login brings the news.
    let newcomer = node.try_connect(&url).await.expect("the pooler answers");
    newcomer.batch_execute("select 1").await.expect("it is answered");
    while backends().await > 2 {}
    node.suspend("shop/prod");
    assert_eq!(node.compute("shop/prod")["state"], "suspended");
    assert!(backends().await <= 2);
    let who = node.json(&["who", "shop/prod"]);
    assert_eq!(who["clients"].as_array().map(Vec::len), Some(21), "{who}");
}

#[test]
fn names_that_would_be_taken_for_poolers_are_refused_for_projects_only() {
    let node = Node::with_shop();
    let refused = node.ebb(&["project", "create", "shop-pooler"]);
    assert!(refused.code != 0 && refused.stderr.contains("-pooler"), "{refused:?}");
    node.ok(&["branch", "create", "shop/x-pooler", "--from", "shop/prod"]);
    assert_eq!(node.psql("shop/x-pooler", "select 1"), "1");
}
