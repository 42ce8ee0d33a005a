//! Several nodes on one bucket: clients of any reach every branch, and a node that is lost is taken over.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ebb_tests::{Node, wait_for};

/// Long enough for a busy machine to renew a record in time, short enough to wait for.
const TTL: &str = "3s";

/// Nodes of one bucket, which have one `secret.key`, too.
fn nodes(bucket: &Path, names: &[&str]) -> Vec<Node> {
    let mut made: Vec<Node> = Vec::new();
    for name in names {
        let mut node = Node::prepare().bucket(bucket).env("EBB_NODE_NAME", name).env("EBB_NODE_TTL", TTL);
        if let Some(first) = made.first() {
            std::fs::create_dir_all(node.data()).expect("a data directory can be made");
            std::fs::copy(first.data().join("secret.key"), node.data().join("secret.key"))
                .expect("a key can be copied");
        }
        node.serve();
        made.push(node);
    }
    for node in &made {
        wait_for("the nodes to see each other", || {
            node.json(&["node", "list"])["nodes"].as_array().is_some_and(|nodes| nodes.len() == names.len())
        });
    }
    made
}

/// The URL of a branch as another node's proxy takes it.
fn through(node: &Node, owner: &Node, url: &str) -> String {
    url.replace(&format!(":{}/", owner.proxy_port), &format!(":{}/", node.proxy_port))
}

fn owner_of(node: &Node, project: &str) -> String {
    let nodes = node.json(&["node", "list"]);
    let owns = |node: &&serde_json::Value| {
        node["projects"].as_array().is_some_and(|projects| projects.iter().any(|one| one == project))
    };
    let found = nodes["nodes"].as_array().and_then(|nodes| nodes.iter().find(owns));
    found.and_then(|node| node["name"].as_str()).unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_any_node_reaches_a_branch_and_stays_through_hand_overs() {
    let bucket = tempfile::tempdir().expect("a directory for the bucket");
    let nodes = nodes(bucket.path(), &["a", "b"]);
    let (a, b) = (&nodes[0], &nodes[1]);
    a.ok(&["project", "create", "shop"]);
    a.psql("shop/prod", "create table t (n int primary key, at text)");
    let url = a.url("shop/prod");
    let guest = b.try_connect(&through(b, a, &url)).await.expect("another node's proxy takes the client");
    guest.batch_execute("set application_name = 'guest'; insert into t values (1, 'through b')").await.unwrap();
    let home = a.try_connect(&url).await.unwrap();
    home.batch_execute("prepare q as select count(*) from t").await.unwrap();
    wait_for("the owner to know both sessions", || {
        a.compute("shop/prod")["sessions"].as_array().is_some_and(|sessions| sessions.len() == 2)
    });

    // Who asks at either hears of both.
    for asked in [a, b] {
        let who = asked.json(&["who", "shop/prod"]);
        let rows = who["clients"].as_array().expect("clients are listed").iter();
        let mut at: Vec<_> =
            rows.map(|row| (row["node"].as_str(), row["role"].as_str(), row["state"].as_str())).collect();
        at.sort_unstable();
        assert_eq!(at, ["a", "b"].map(|node| (Some(node), Some("app"), Some("idle"))));
    }

    // A wrong password is refused by whoever is asked, and wakes nothing.
    a.suspend("shop/prod");
    let wakes = a.wakes("shop/prod");
    let password = url.split(['@', ':']).nth(2).expect("a URL has a password");
    assert!(b.try_connect(&through(b, a, &url).replace(password, "wrong")).await.is_err());
    assert_eq!((a.wakes("shop/prod"), a.compute("shop/prod")["state"].as_str()), (wakes, Some("suspended")));

    // A session through another node sleeps and wakes like any other.
    let name: String = guest.query_one("show application_name", &[]).await.unwrap().get(0);
    assert_eq!(name, "guest");
    assert_eq!(a.wakes("shop/prod"), wakes + 1);

    // Acts are answered wherever they are asked for.
    b.ok(&["checkpoint", "create", "shop/prod", "early"]);
    assert!(a.ok(&["checkpoint", "list", "shop/prod"]).contains("early"));
    assert_eq!(b.wakes("shop/prod"), a.wakes("shop/prod"));

    for (n, to) in [(2, "b"), (3, "a"), (4, "b")] {
        // Either node takes the order.
        a.ok(&["compute", "move", "shop", "--to", to]);
        let insert = format!("insert into t values ({n}, 'at {to}')");
        guest
            .batch_execute(&insert)
            .await
            .unwrap_or_else(|error| panic!("{error}\n{}\n{}", a.server_log(), b.server_log()));
        let count: i64 = home.query_one("execute q", &[]).await.unwrap().get(0);
        assert_eq!(count, n, "the session's prepared statement runs at {to}");
        let name: String = guest.query_one("show application_name", &[]).await.unwrap().get(0);
        assert_eq!(name, "guest");
        let (here, there) = if to == "b" { (b, a) } else { (a, b) };
        wait_for("both to know the owner", || owner_of(here, "shop") == to && owner_of(there, "shop") == to);
        assert!(here.postgres_runs("shop/prod") && !there.postgres_runs("shop/prod"));
    }
    assert_eq!(a.json(&["ledger", "verify", "shop"])["ok"], true);
    let unknown = b.ebb(&["compute", "move", "shop", "--to", "c"]);
    assert_eq!(unknown.code, 3, "{}", unknown.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_other_nodes_stay_when_an_owner_is_followed_by_a_new_server() {
    let bucket = tempfile::tempdir().expect("a directory for the bucket");
    let mut nodes = nodes(bucket.path(), &["a", "b"]);
    nodes[0].ok(&["project", "create", "shop"]);
    let url = nodes[0].url("shop/prod");
    let guest = nodes[1].try_connect(&through(&nodes[1], &nodes[0], &url)).await.expect("the client is taken");
    guest.batch_execute("set application_name = 'guest'; create table t ()").await.unwrap();
    let mut old = nodes[0].begin_take_over();
    nodes[0].end_take_over(&mut old);
    let name: String = guest.query_one("show application_name", &[]).await.unwrap().get(0);
    assert_eq!(name, "guest");
}

#[test]
fn a_lost_node_is_taken_over_with_every_commit_that_was_acknowledged() {
    let bucket = tempfile::tempdir().expect("a directory for the bucket");
    let mut nodes = nodes(bucket.path(), &["a", "b"]);
    let (mut b, mut a) = (nodes.pop().expect("two"), nodes.pop().expect("two"));
    a.ok(&["project", "create", "shop"]);
    a.ok(&["branch", "set", "shop/prod", "--durability", "bucket"]);
    a.psql("shop/prod", "create table t (n int primary key)");
    let url = a.url("shop/prod");
    for n in 1..=20 {
        a.psql("shop/prod", &format!("insert into t values ({n})"));
    }
    let (unit, branch) = (a.unit_pid("shop/prod"), a.branch_dir("shop/prod"));
    a.kill_server();
    // The unit runs on, and its Postgres with it: cut off from everybody but who reaches its socket.
    let asked = Instant::now();
    let there = through(&b, &a, &url);
    let ran = b.tool("psql", &["-XAtq", &there, "-c", "insert into t values (100) returning (select count(*) from t)"]);
    assert_eq!((ran.code, ran.stdout.trim()), (0, "20"), "{}\n{}", ran.stderr, b.server_log());
    assert!(asked.elapsed() > Duration::from_secs(1), "it was not known at once that the owner is gone");
    assert_eq!(owner_of(&b, "shop"), "b");

    // The old unit is alive, and can acknowledge nothing any more.
    let socket = branch.join("run");
    let late = Command::new("timeout")
        .args(["3", "psql", "-XAtq", "-U", "postgres", "-d", "app", "-c", "insert into t values (101)", "-h"])
        .arg(&socket)
        .output()
        .expect("psql can be started");
    assert!(!late.status.success(), "a node that was taken over acknowledged a commit: {late:?}");

    // When its server comes back, it ends what it finds, and passes its clients on.
    a.serve();
    wait_for("the old unit to end", || !Path::new(&format!("/proc/{unit}")).exists());
    assert_eq!(a.psql("shop/prod", "select count(*), max(n) from t"), "21|100");
    assert_eq!(b.psql("shop/prod", "select count(*), max(n) from t"), "21|100");

    // One that stops in order need not be waited for.
    b.stop();
    assert_eq!(a.psql("shop/prod", "select count(*), max(n) from t"), "21|100");
    assert_eq!(owner_of(&a, "shop"), "a");
    assert_eq!(a.json(&["ledger", "verify", "shop"])["ok"], true);
}
