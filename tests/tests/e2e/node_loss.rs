//! The node is gone; the bucket is not.

use std::fs;
use std::path::{Path, PathBuf};
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

    let copy = copy_of_bucket(&first);
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

/// A copy of a stopped node's bucket, as another node may find it.
fn copy_of_bucket(node: &Node) -> PathBuf {
    let copy = node.scratch().join("copy");
    let copied = Command::new("cp").arg("-a").arg(node.data().join("bucket")).arg(&copy).status();
    assert!(copied.expect("cp can be started").success());
    copy
}

/// The largest layer in a bucket.
fn largest_layer(bucket: &Path) -> PathBuf {
    let layers = fs::read_dir(bucket.join("layers")).expect("there are layers").flatten().map(|entry| entry.path());
    layers.max_by_key(|path| path.metadata().expect("a layer has a size").len()).expect("there is a layer")
}

/// Whether a node lacks anything of any layer that it has begun to fetch.
fn has_partial_layers(node: &Node) -> bool {
    let layers = fs::read_dir(node.data().join("layers")).expect("there are layers").flatten();
    layers.into_iter().any(|entry| entry.path().join("index").exists())
}

fn fetched(node: &Node, what: &str) -> u64 {
    node.compute("shop/prod")["unit"]["fetched"][what].as_u64().expect("a unit counts what it fetches")
}

#[test]
fn a_node_that_has_nothing_reads_a_large_branch_piece_by_piece() {
    let mut first = Node::with_shop();
    first.psql(
        "shop/prod",
        "create table big as select n, md5(n::text) as text from generate_series(1, 600000) n; \
         alter table big add primary key (n)",
    );
    first.suspend("shop/prod");
    // The second wake begins from a layer like the one a node finds later, so its reads make the boot set.
    assert_eq!(first.psql("shop/prod", "select text from big where n = 77"), "28dd2c7955ce926456240b2ff0100bde");
    let sum = first.psql("shop/prod", "select sum(n), md5(string_agg(text, '' order by n)) from big");
    first.suspend("shop/prod");
    wait_for("the boot set", || fs::read_dir(first.data().join("bucket/boot")).is_ok_and(|dir| dir.count() >= 2));
    let url = first.url("shop/prod");
    first.stop();
    let copy = copy_of_bucket(&first);
    let whole = largest_layer(&copy).metadata().expect("a layer has a size").len();
    assert!(whole > 10 << 20, "the branch is large enough to tell: {whole}");

    let mut second = Node::prepare().bucket(&copy).env("EBB_HYDRATE", "false");
    second.serve();
    let url = url.replace(&first.proxy_port.to_string(), &second.proxy_port.to_string());
    let ask = |node: &Node, sql: &str| {
        let ran = node.tool("psql", &["-XAtq", &url, "-c", sql]);
        assert_eq!(ran.code, 0, "{sql}: {}", ran.stderr);
        ran.stdout.trim().to_owned()
    };
    assert_eq!(ask(&second, "select text from big where n = 77"), "28dd2c7955ce926456240b2ff0100bde");
    assert!(has_partial_layers(&second), "the branch was fetched whole");
    let bytes = fetched(&second, "bytes");
    assert!(bytes < whole / 4, "{bytes} bytes of {whole} were fetched for one row");
    assert!(fetched(&second, "boot_pages") > 20, "the wake read from the boot set");
    assert_eq!(ask(&second, "select sum(n), md5(string_agg(text, '' order by n)) from big"), sum);
    let ran = second.superuser_tool("shop/prod", "pg_amcheck", &["--install-missing", "--heapallindexed", "-d", "app"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{}", ran.stderr);

    // A unit goes on reading while the server is away, and wakes again from what it has.
    let unit = second.unit_pid("shop/prod");
    second.kill_server();
    second.serve();
    assert_eq!(second.unit_pid("shop/prod"), unit);
    second.suspend("shop/prod");
    assert_eq!(ask(&second, "select count(*) from big"), "600000");
}

#[test]
fn an_awake_branch_gets_independent_of_the_bucket() {
    let mut first = Node::with_shop();
    first.psql("shop/prod", "create table t as select n, md5(n::text) as text from generate_series(1, 100000) n");
    first.suspend("shop/prod");
    wait_for("the upload", || fs::read_dir(first.data().join("bucket/layers")).is_ok_and(|dir| dir.count() >= 2));
    let url = first.url("shop/prod");
    first.stop();
    let copy = copy_of_bucket(&first);
    let mut second = Node::prepare().bucket(&copy);
    second.serve();
    let url = url.replace(&first.proxy_port.to_string(), &second.proxy_port.to_string());
    let ran = second.tool("psql", &["-XAtq", &url, "-c", "select 1"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    wait_for("all layers to be whole", || !has_partial_layers(&second));
    fs::rename(copy.join("layers"), copy.join("layers-away")).expect("a directory can be renamed");
    let ran = second.tool("psql", &["-XAtq", &url, "-c", "select count(distinct text) from t"]);
    assert_eq!(ran.stdout.trim(), "100000", "{}", ran.stderr);
    fs::rename(copy.join("layers-away"), copy.join("layers")).expect("a directory can be renamed");
}

#[test]
fn a_flipped_bit_in_the_bucket_is_an_error_and_never_data() {
    let mut first = Node::with_shop();
    first.psql("shop/prod", "create table t as select generate_series(1, 50000) as n");
    first.suspend("shop/prod");
    wait_for("the upload", || fs::read_dir(first.data().join("bucket/layers")).is_ok_and(|dir| dir.count() >= 2));
    let url = first.url("shop/prod");
    first.stop();
    let copy = copy_of_bucket(&first);
    let layers = fs::read_dir(copy.join("layers")).expect("there are layers").flatten().map(|entry| entry.path());
    let newest = layers.max().expect("there is a layer");
    let good = fs::read(&newest).expect("a layer can be read");

    // In what leads to everything else: the wake fails.
    let mut bytes = good.clone();
    let at = bytes.len() - 200;
    bytes[at] ^= 0x10;
    fs::write(&newest, bytes).expect("a layer can be written");
    let mut second = Node::prepare().bucket(&copy);
    second.serve();
    let ran = second.ebb(&["compute", "wake", "shop/prod"]);
    assert_ne!(ran.code, 0, "corrupt bytes were served");
    assert!(ran.stderr.contains("corrupt"), "{}", ran.stderr);
    assert_eq!(second.compute("shop/prod")["state"], "suspended");
    second.stop();

    // In its pages, which come first: whoever reads them gets an error.
    let mut bytes = good;
    let half = bytes.len() / 2;
    bytes[..half].iter_mut().skip(64).step_by(2048).for_each(|byte| *byte ^= 0x10);
    fs::write(&newest, bytes).expect("a layer can be written");
    let mut third = Node::prepare().bucket(&copy);
    third.serve();
    let url = url.replace(&first.proxy_port.to_string(), &third.proxy_port.to_string());
    let ran = third.tool("psql", &["-XAtq", &url, "-c", "select sum(n) from t"]);
    assert_ne!(ran.code, 0, "corrupt bytes were served: {}", ran.stdout);
}
