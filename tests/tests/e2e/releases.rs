//! Code and data go forward together, and back together.

use std::fs;
use std::path::{Path, PathBuf};

use ebb_tests::{Node, Writer};

/// An artifact with one file of code and the given migrations.
fn artifact(node: &Node, name: &str, code: &str, migrations: &[(&str, &str)]) -> PathBuf {
    let dir = node.scratch().join(name);
    fs::create_dir_all(dir.join("migrations")).expect("a directory can be made");
    fs::write(dir.join("app.txt"), code).expect("a file can be written");
    for (file, sql) in migrations {
        fs::write(dir.join("migrations").join(file), sql).expect("a file can be written");
    }
    dir
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

const FIRST: (&str, &str) = ("001_items.sql", "create table items (id int primary key, name text)");
const SECOND: (&str, &str) = ("002_price.sql", "alter table items add column price int not null default 0");

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_under_load_takes_code_and_data_back_together() {
    let node = Node::start();
    let current = node.scratch().join("current");
    node.ok(&["project", "create", "shop", "--current", text(&current)]);
    let v1 = artifact(&node, "a1", "one", &[FIRST]);
    let v2 = artifact(&node, "a2", "two", &[FIRST, SECOND]);
    let made = node.json(&["release", "create", "shop", "--artifact", text(&v1)]);
    assert_eq!(made["name"], "v1");
    assert_eq!(fs::read_to_string(current.join("app.txt")).expect("the code is there"), "one");
    node.psql("shop/prod", "insert into items values (1, 'kept')");
    let client = node.connect("shop/prod").await;
    let writer = Writer::start(node.url("shop/prod")).await;
    writer.progress(10).await;

    node.ok(&["release", "create", "shop", "--artifact", text(&v2)]);
    assert_eq!(fs::read_to_string(current.join("app.txt")).expect("the code is there"), "two");
    client.batch_execute("insert into items values (2, 'after v2', 5)").await.expect("the migration ran");
    writer.progress(10).await;

    let plan = node.ok(&["rollback", "shop", "--to", "v1", "--plan"]);
    assert!(plan.contains("v1"), "{plan}");
    assert_eq!(
        fs::read_to_string(current.join("app.txt")).expect("the code is there"),
        "two",
        "a plan changes nothing"
    );

    node.ok(&["rollback", "shop", "--to", "v1"]);
    assert_eq!(fs::read_to_string(current.join("app.txt")).expect("the code is there"), "one");
    let names = client.query("select name from items", &[]).await.expect("the client was kept");
    assert_eq!(names.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>(), ["kept"]);
    writer.progress(10).await;
    let (_, errors) = writer.stop().await;
    assert_eq!(errors, Vec::<String>::new(), "clients see a pause, not an error");
    let branches = node.json(&["branch", "list", "shop"]);
    let rescue = branches["branches"]
        .as_array()
        .expect("a list")
        .iter()
        .find_map(|branch| branch["name"].as_str().filter(|name| name.starts_with("rescue")));
    let rescue = format!("shop/{}", rescue.expect("the old head is a rescue branch"));
    assert_eq!(node.psql(&rescue, "select count(*) from items where price = 5"), "1");
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[test]
fn a_broken_migration_changes_neither_code_nor_data() {
    let node = Node::start();
    let current = node.scratch().join("current");
    node.ok(&["project", "create", "shop", "--current", text(&current)]);
    let v1 = artifact(&node, "a1", "one", &[FIRST]);
    node.ok(&["release", "create", "shop", "--artifact", text(&v1)]);
    let broken = artifact(
        &node,
        "a2",
        "two",
        &[FIRST, ("002_bad.sql", "create table half (n int); select nonsense from nowhere")],
    );
    let ran = node.ebb(&["release", "create", "shop", "--artifact", text(&broken)]);
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("002_bad.sql") && ran.stderr.contains("42P01"), "{}", ran.stderr);
    assert_eq!(fs::read_to_string(current.join("app.txt")).expect("the code is there"), "one");
    assert_eq!(node.psql("shop/prod", "select count(*) from pg_tables where tablename = 'half'"), "0");
    assert!(node.ok(&["release", "list", "shop"]).contains("failed"));
}

#[test]
fn the_same_artifact_twice_is_one_release() {
    let node = Node::with_shop();
    let v1 = artifact(&node, "a1", "one", &[FIRST]);
    let first = node.json(&["release", "create", "shop", "--artifact", text(&v1)]);
    let again = node.json(&["release", "create", "shop", "--artifact", text(&v1)]);
    assert_eq!(first["id"], again["id"]);
    let ran = node.ebb(&["rollback", "shop", "--to", "v7"]);
    assert_eq!(ran.code, 3, "{ran:?}");
}

#[test]
fn a_migration_does_not_run_as_superuser() {
    let node = Node::with_shop();
    let sly = artifact(&node, "a1", "one", &[("001.sql", "reset role; create role boss superuser")]);
    let ran = node.ebb(&["release", "create", "shop", "--artifact", text(&sly)]);
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("42501") || ran.stderr.contains("superuser"), "{}", ran.stderr);
}
