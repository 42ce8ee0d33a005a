//! Visits to moments: exact, read-only, shared, beside a branch that sleeps or works, and gone behind the last client.

use std::fs;
use std::time::{Duration, Instant};

use ebb_tests::{Node, wait_for, wait_until, write_history as write};
use serde_json::Value;
use tokio_postgres::{Client, NoTls};

async fn connect(url: String) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn numbers(client: &Client) -> String {
    let sql = "select coalesce(max(n), 0) || ' of ' || count(*) from history";
    client.query_one(sql, &[]).await.expect("the past can be read").get(0)
}

async fn numbers_at(node: &Node, place: &str) -> String {
    numbers(&node.try_connect(&node.url(place)).await.unwrap_or_else(|error| panic!("{place}: {error:?}"))).await
}

fn visits(node: &Node) -> Vec<Value> {
    node.compute("shop/prod")["visits"].as_array().cloned().unwrap_or_default()
}

/// What the node's disk has of visits, and of branches.
fn marks(node: &Node) -> usize {
    fs::read_dir(node.data().join("visits")).map_or(0, Iterator::count)
}

fn directories(node: &Node) -> usize {
    fs::read_dir(node.data().join("branches")).map_or(0, Iterator::count)
}

fn said(error: &tokio_postgres::Error) -> (&str, &str) {
    let said = error.as_db_error().unwrap_or_else(|| panic!("not said by a server: {error:?}"));
    (said.code().code(), said.hint().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_moment_shows_exactly_what_was_committed_by_then_beside_a_writer() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key)");
    node.ok(&["branch", "set", "shop/prod", "--idle-suspend", "1h"]);
    node.ok(&["checkpoint", "create", "shop/prod", "begin"]);
    let client = node.connect("shop/prod").await;
    let mut written = write(&client, 1..=40).await;
    node.ok(&["checkpoint", "create", "shop/prod", "middle"]);
    let names = || {
        let listed = node.ok(&["branch", "list", "shop"]);
        listed.lines().filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect::<Vec<_>>()
    };
    let branches = names();
    written.extend(write(&client, 41..=80).await);
    let writer = tokio::spawn(async move { write(&client, 81..=400).await });
    let tries: usize = std::env::var("EBB_POINTS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    for number in 0..tries {
        let row = &written[(number * 61 + 7) % written.len()];
        let point = if number % 2 == 0 { &row.lsn } else { &row.at };
        let begun = Instant::now();
        let found = numbers_at(&node, &format!("shop/prod@{point}")).await;
        println!("visit of {point}: {:?}", begun.elapsed());
        assert_eq!(found, format!("{} of {}", row.n, row.n), "at {point}");
    }
    let more = writer.await.expect("the writer does not panic");
    assert_eq!(more.len(), 320);
    // What was written a moment ago is shipped first.
    let last = &more[319];
    assert_eq!(numbers_at(&node, &format!("shop/prod@{}", last.at)).await, "400 of 400");
    assert_eq!(numbers_at(&node, "shop/prod@middle").await, "40 of 40");
    assert_eq!(names(), branches, "no visit is a branch");
    assert_eq!(node.wakes("shop/prod"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visit_is_read_only_and_wakes_nobody() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key); insert into history values (1)");
    node.ok(&["checkpoint", "create", "shop/prod", "v1"]);
    node.psql("shop/prod", "insert into history values (2)");
    node.suspend("shop/prod");
    let wakes = node.wakes("shop/prod");

    let visitor = node.try_connect(&node.url("shop/prod@v1")).await.expect("a checkpoint can be visited");
    assert_eq!(numbers(&visitor).await, "1 of 1");
    for sql in ["insert into history values (3)", "create table t ()", "create temp table t ()", "truncate history"] {
        let error = visitor.batch_execute(sql).await.expect_err("the past is written to");
        assert_eq!(said(&error).0, "25006", "{sql}: {error:?}");
    }
    // Nor by asking for it.
    let writable = "set default_transaction_read_only = off; begin read write; insert into history values (3)";
    visitor.batch_execute(writable).await.expect_err("the past is written to");
    visitor.batch_execute("rollback").await.expect("the session goes on");
    assert_eq!(numbers(&visitor).await, "1 of 1");

    // A database's name says it, too; and the head is not the past.
    let by_database = node.url("shop/prod").replace("/app?options=endpoint%3Dprod--shop", "/app@prod--shop@v1");
    let second = node.try_connect(&by_database).await.expect("a moment can be named with the database");
    assert_eq!(numbers(&second).await, "1 of 1");
    assert_eq!(visits(&node).len(), 1);
    assert_eq!(visits(&node)[0]["sessions"].as_array().map(Vec::len), Some(2));
    let psql = node.tool("psql", &["-XAtq", &node.url("shop/prod@v1"), "-c", "show transaction_read_only"]);
    assert_eq!(psql.stdout.trim(), "on", "{psql:?}");
    assert_eq!(node.compute("shop/prod")["state"], "suspended");
    assert_eq!(node.wakes("shop/prod"), wakes);
    assert_eq!(node.psql("shop/prod", "select count(*) from history"), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visit_vanishes_behind_its_last_client() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key)");
    node.ok(&["checkpoint", "create", "shop/prod", "v1"]);
    node.ok(&["branch", "set", "shop/prod", "--idle-suspend", "2s"]);
    let branches = directories(&node);
    let visitor = node.try_connect(&node.url("shop/prod@v1")).await.expect("a checkpoint can be visited");
    assert_eq!((marks(&node), directories(&node)), (1, branches + 1));
    // Longer than it is kept without anyone.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(numbers(&visitor).await, "0 of 0", "an idle client keeps it");
    drop(visitor);
    wait_for("the visit to vanish", || marks(&node) == 0);
    assert_eq!(directories(&node), branches);
    assert!(visits(&node).is_empty());
    assert_eq!(numbers_at(&node, "shop/prod@v1").await, "0 of 0", "and it can be visited again");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_clients_share_one_visit() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key); insert into history values (1)");
    node.ok(&["checkpoint", "create", "shop/prod", "v1"]);
    let url = node.url("shop/prod@v1");
    let connecting: Vec<_> = (0..50).map(|_| tokio::spawn(connect(url.clone()))).collect();
    let mut clients = Vec::new();
    for client in connecting {
        clients.push(client.await.expect("a client does not panic").expect("all come in"));
    }
    for client in &clients {
        assert_eq!(numbers(client).await, "1 of 1");
    }
    assert_eq!((marks(&node), visits(&node).len()), (1, 1));
    assert_eq!(visits(&node)[0]["sessions"].as_array().map(Vec::len), Some(50));
    let metrics = ureq::get(&format!("http://127.0.0.1:{}/metrics", node.api_port)).call();
    let metrics = metrics.and_then(|mut answer| answer.body_mut().read_to_string()).expect("metrics");
    assert!(metrics.contains("ebb_timeline_visits_total{result=\"ok\"} 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_come_in_now_cannot_come_into_the_past() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key)");
    let old = node.url("shop/prod");
    node.ok(&["checkpoint", "create", "shop/prod", "v1"]);
    let wrong = node.url("shop/prod@v1").replacen("app:", "app:not", 1);
    let error = node.try_connect(&wrong).await.expect_err("a wrong password is let in");
    assert_eq!(said(&error).0, "28P01");
    assert!(visits(&node).is_empty() && marks(&node) == 0, "nothing was made for it");

    // The password of today opens the past, and the one of then does not.
    node.psql("shop/prod", "alter role app password 'today'");
    let password = old.split(['/', ':', '@']).nth(4).expect("a URL has a password").to_owned();
    let today = |place: &str| node.url(place).replace(&password, "today");
    wait_until("the new password to be known", || async { node.try_connect(&today("shop/prod")).await.is_ok() }).await;
    let error = node.try_connect(&node.url("shop/prod@v1")).await.expect_err("a revoked password is let in");
    assert_eq!(said(&error).0, "28P01");
    let visitor = node.try_connect(&today("shop/prod@v1")).await.expect("today's password opens the past");
    assert_eq!(numbers(&visitor).await, "0 of 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_visited_is_told_with_what_can() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key)");
    node.ok(&["checkpoint", "create", "shop/prod", "before-release"]);
    let refused = async |point: &str| {
        let error = node.try_connect(&node.url(&format!("shop/prod@{point}"))).await.expect_err("is let in");
        let (code, hint) = said(&error);
        (code.to_owned(), hint.to_owned())
    };
    let (code, hint) = refused("before-relase").await;
    assert_eq!((code.as_str(), hint.as_str()), ("3D000", "Did you mean before-release?"));
    for point in ["2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z", "0/1"] {
        let (code, hint) = refused(point).await;
        assert_eq!(code, "22023", "{point}");
        assert!(hint.contains("any moment from"), "{point}: {hint}");
    }
    assert_eq!(marks(&node), 0);
    // A position that nothing was written to yet is found out when it is looked for.
    let (code, hint) = refused("0/7FFFFFFF").await;
    assert!(code == "22023" && hint.contains("any moment from"), "{code} {hint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_node_opens_the_past_out_of_the_bucket() {
    let bucket = tempfile::tempdir().expect("a directory for the bucket");
    let mut node = Node::prepare().bucket(bucket.path());
    node.serve();
    node.ok(&["project", "create", "shop"]);
    node.psql("shop/prod", "create table history (n bigint primary key)");
    node.ok(&["checkpoint", "create", "shop/prod", "begin"]);
    let client = node.connect("shop/prod").await;
    let written = write(&client, 1..=20).await;
    drop(client);
    // Its passwords cannot be read without the first node's key, but be held against what is in the bucket.
    let places = ["shop/prod@begin".to_owned(), format!("shop/prod@{}", written[7].at)];
    let (urls, port) = (places.map(|place| node.url(&place)), node.proxy_port);
    node.stop();
    let other = node.scratch().join("other-node");
    let mut node = node.data_dir(&other);
    node.serve();
    for (url, expect) in urls.iter().zip(["0 of 0", "8 of 8"]) {
        let url = url.replace(&format!(":{port}/"), &format!(":{}/", node.proxy_port));
        assert_eq!(numbers(&node.try_connect(&url).await.expect("the past is open")).await, expect);
    }
    assert_eq!(node.compute("shop/prod")["wakes"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_leaves_no_visit_behind() {
    let mut node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key); insert into history values (1)");
    node.ok(&["checkpoint", "create", "shop/prod", "v1"]);
    let (at, branches) = (node.url("shop/prod@v1"), directories(&node));
    let visitor = node.try_connect(&at).await.expect("a checkpoint can be visited");
    assert_eq!((numbers(&visitor).await.as_str(), marks(&node)), ("1 of 1", 1));
    node.kill_server();
    node.serve();
    wait_for("the visit to be removed", || marks(&node) == 0);
    assert_eq!(directories(&node), branches);
    assert_eq!(numbers_at(&node, "shop/prod@v1").await, "1 of 1");
    // Its unit lost, a visit is opened anew.
    let mark = fs::read_dir(node.data().join("visits")).expect("marks").flatten().next().expect("a mark");
    let unit =
        fs::read_to_string(node.data().join("branches").join(mark.file_name()).join("unit.pid")).expect("a unit");
    node.kill_9(unit.trim().parse().expect("unit.pid holds a number"));
    wait_until("the visit to answer again", || async {
        match node.try_connect(&at).await {
            Ok(client) => client.simple_query("select n from history").await.is_ok(),
            Err(_) => false,
        }
    })
    .await;
}

/// A server that stays in recovery cannot know all numbers of a transaction with very many parts.
#[tokio::test(flavor = "multi_thread")]
async fn a_moment_within_a_transaction_of_many_parts_is_visited_all_the_same() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n bigint primary key); insert into history values (1)");
    let client = node.connect("shop/prod").await;
    let mut parts = "begin;".to_owned();
    for n in 100..200 {
        parts.push_str(&format!("savepoint s{n}; insert into history values ({n});"));
    }
    client.batch_execute(&parts).await.expect("a transaction of many parts");
    node.superuser_tool("shop/prod", "psql", &["-Xq", "-c", "checkpoint"]);
    node.ok(&["checkpoint", "create", "shop/prod", "amidst"]);
    assert_eq!(numbers_at(&node, "shop/prod@amidst").await, "1 of 1");
    client.batch_execute("commit").await.expect("the transaction goes on");
    assert_eq!(numbers_at(&node, "shop/prod@amidst").await, "1 of 1");
    let visitor = node.try_connect(&node.url("shop/prod@amidst")).await.expect("a visit");
    let error = visitor.batch_execute("create table t ()").await.expect_err("the past is written to");
    assert_eq!(said(&error).0, "25006");
}
