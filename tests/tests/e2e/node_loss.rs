//! The node is gone; the bucket is not.

use std::process::Command;

use ebb_tests::{Node, wait_for};

#[test]
fn an_empty_node_with_a_copy_of_the_bucket_serves_everything() {
    let mut first = Node::with_shop();
    first.ok(&["project", "create", "blog"]);
    first.psql("shop/prod", "create table t as select generate_series(1, 50000) as n");
    first.ok(&["checkpoint", "create", "shop/prod", "full"]);
    first.psql("shop/prod", "delete from t where n > 10");
    first.ok(&["branch", "create", "shop/pr-1", "--from", "shop/prod"]);
    first.psql("shop/pr-1", "insert into t values (-1)");
    first.psql("blog/prod", "create table posts as select 'hello' as title");
    let urls = ["shop/prod", "shop/pr-1", "blog/prod"].map(|branch| (branch, first.url(branch)));
    first.stop();

    let copy = first.scratch().join("copy");
    let copied = Command::new("cp").arg("-a").arg(first.data().join("bucket")).arg(&copy).status();
    assert!(copied.expect("cp can be started").success());
    let mut second = Node::prepare().bucket(&copy);
    second.serve();
    let ask = |node: &Node, branch: &str, sql: &str| {
        // The passwords are the old ones; only the key that encrypts their copies stayed behind.
        let (_, url) = urls.iter().find(|(name, _)| *name == branch).expect("the branch has a URL");
        let url = url.replace(&first.proxy_port.to_string(), &node.proxy_port.to_string());
        let ran = node.tool("psql", &["-XAtq", &url, "-c", sql]);
        assert_eq!(ran.code, 0, "{branch}: {}", ran.stderr);
        ran.stdout.trim().to_owned()
    };
    assert_eq!(ask(&second, "shop/prod", "select count(*) from t"), "10");
    assert_eq!(ask(&second, "shop/pr-1", "select count(*), min(n) from t"), "11|-1");
    assert_eq!(ask(&second, "blog/prod", "select title from posts"), "hello");
    assert!(second.ok(&["checkpoint", "list", "shop/prod"]).contains("full"));
    second.ok(&["branch", "create", "shop/whole", "--from", "shop/prod@full"]);
    let ran = second.superuser_tool("shop/prod", "psql", &["-XAtq", "-d", "app", "-c", "select count(*) from t"]);
    assert_eq!(ran.stdout.trim(), "10");
    second.ok(&["compute", "wake", "shop/whole"]);
    let ran = second.superuser_tool("shop/whole", "psql", &["-XAtq", "-d", "app", "-c", "select count(*) from t"]);
    assert_eq!(ran.stdout.trim(), "50000");
    assert_eq!(second.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[test]
fn a_flipped_bit_in_the_bucket_is_an_error_and_never_data() {
    let mut first = Node::with_shop();
    first.psql("shop/prod", "create table t as select generate_series(1, 50000) as n");
    first.suspend("shop/prod");
    wait_for("the upload", || std::fs::read_dir(first.data().join("bucket/layers")).is_ok_and(|dir| dir.count() >= 2));
    first.stop();
    let copy = first.scratch().join("copy");
    let copied = Command::new("cp").arg("-a").arg(first.data().join("bucket")).arg(&copy).status();
    assert!(copied.expect("cp can be started").success());
    let newest = std::fs::read_dir(copy.join("layers")).expect("there are layers").flatten().map(|entry| entry.path());
    let newest = newest.max().expect("there is a layer");
    let mut bytes = std::fs::read(&newest).expect("a layer can be read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&newest, bytes).expect("a layer can be written");
    let mut second = Node::prepare().bucket(&copy);
    second.serve();
    let ran = second.ebb(&["compute", "wake", "shop/prod"]);
    assert_ne!(ran.code, 0, "corrupt bytes were served");
    assert!(ran.stderr.contains("corrupt"), "{}", ran.stderr);
    assert_eq!(second.compute("shop/prod")["state"], "suspended");
}
