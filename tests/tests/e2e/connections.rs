//! Ways in: routes, TLS, passwords, cancelling, crowds.

use std::time::{Duration, Instant};

use ebb_tests::Node;
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

#[tokio::test(flavor = "multi_thread")]
async fn a_client_wakes_a_suspended_branch_and_waits_for_it() {
    let node = Node::with_shop();
    assert_eq!(node.compute("shop/prod")["state"], "suspended");
    let client = node.connect("shop/prod").await;
    let row = client.query_one("select 1 + 1", &[]).await.expect("the branch is awake");
    assert_eq!(row.get::<_, i32>(0), 2);
    assert_eq!(node.wakes("shop/prod"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_at_once_make_one_wake() {
    let node = Node::with_shop();
    node.ok(&["compute", "wake", "shop/prod"]);
    node.suspend("shop/prod");
    let before = node.wakes("shop/prod");
    let url = node.url("shop/prod");
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..200_i32 {
        let url = url.clone();
        clients.spawn(async move {
            let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
            let driven = tokio::spawn(connection);
            let row = client.query_one("select $1::int4", &[&n]).await?;
            drop(client);
            driven.await.expect("a connection does not panic")?;
            Ok::<i32, tokio_postgres::Error>(row.get(0))
        });
    }
    let mut answered = Vec::new();
    while let Some(ended) = clients.join_next().await {
        match ended.expect("a client does not panic") {
            Ok(n) => answered.push(n),
            // Postgres itself has fewer places than that; it says so truthfully.
            Err(error) => assert_eq!(error.code(), Some(&SqlState::TOO_MANY_CONNECTIONS), "{error:?}"),
        }
    }
    assert!(answered.len() >= 90, "only {} of 200 were served", answered.len());
    assert_eq!(node.wakes("shop/prod"), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_or_an_unknown_role_wakes_nothing() {
    let node = Node::with_shop();
    let url = node.url("shop/prod");
    let (before_at, after_at) = url.split_once('@').expect("the URL names a host");
    let (scheme, _) = before_at.rsplit_once(':').expect("the URL has a password");
    let wrong_password = format!("{scheme}:wrong@{after_at}");
    let unknown_role = wrong_password.replace("//app:", "//nobody:");
    let superuser = wrong_password.replace("//app:", "//postgres:");
    for wrong in [wrong_password, unknown_role, superuser] {
        let error = node.try_connect(&wrong).await.expect_err("a wrong login is refused");
        assert_eq!(error.code(), Some(&SqlState::INVALID_PASSWORD), "{error:?}");
    }
    assert_eq!(node.wakes("shop/prod"), 0);
    assert_eq!(node.compute("shop/prod")["state"], "suspended");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_endpoint_is_3d000_with_near_names() {
    let node = Node::with_shop();
    let url = node.url("shop/prod").replace("prod--shop", "prdo--shop");
    let error = node.try_connect(&url).await.expect_err("there is no such branch");
    let db = error.as_db_error().expect("the proxy answers with an error message");
    assert_eq!(db.code(), &SqlState::INVALID_CATALOG_NAME);
    assert!(db.hint().is_some_and(|hint| hint.contains("prod")), "{db:?}");
}

#[test]
fn every_route_leads_to_the_branch() {
    let node = Node::with_shop();
    node.psql("shop/dev", "create table here as select 'dev' as branch");
    let shown = node.json(&["url", "shop/dev"]);
    let url = shown["url"].as_str().expect("there is a URL");
    let password = url.split(':').nth(2).and_then(|rest| rest.split('@').next()).expect("the URL has a password");
    let port = node.proxy_port;
    let ca = node.data().join("tls/ca.pem");
    let ca = ca.display();
    let by_database = format!("host=127.0.0.1 port={port} user=app password={password} dbname=app@dev--shop");
    let by_options = format!(
        "host=127.0.0.1 port={port} user=app password={password} dbname=app options='endpoint=dev--shop -c work_mem=5MB'"
    );
    let by_sni = format!(
        "host=dev--shop.localhost hostaddr=127.0.0.1 port={port} user=app password={password} dbname=app \
         sslmode=verify-full sslrootcert={ca}"
    );
    let required = format!("{by_database} sslmode=require");
    for conninfo in [by_database, by_options.clone(), by_sni, required] {
        let ran = node.tool("psql", &["-XAtq", &conninfo, "-c", "select branch from here"]);
        assert_eq!(ran.stdout.trim(), "dev", "{conninfo}: {}", ran.stderr);
    }
    let ran = node.tool("psql", &["-XAtq", &by_options, "-c", "show work_mem"]);
    assert_eq!(ran.stdout.trim(), "5MB", "other options are passed on: {}", ran.stderr);
    let nowhere = format!("host=127.0.0.1 port={port} user=app password={password} dbname=app");
    let ran = node.tool("psql", &["-XAtq", &nowhere, "-c", "select 1"]);
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.to_lowercase().contains("endpoint"), "the error says what is missing: {}", ran.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_can_be_cancelled() {
    let node = Node::with_shop();
    let client = node.connect("shop/prod").await;
    let token = client.cancel_token();
    let begun = Instant::now();
    let (outcome, ()) = tokio::join!(client.batch_execute("select pg_sleep(60)"), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        token.cancel_query(NoTls).await.expect("a cancel request is taken");
    });
    assert_eq!(outcome.expect_err("it was cancelled").code(), Some(&SqlState::QUERY_CANCELED));
    assert!(begun.elapsed() < Duration::from_secs(30));
    client.query_one("select 1", &[]).await.expect("the session goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_goes_through_both_ways() {
    use tokio_postgres::SimpleQueryMessage;
    let node = Node::with_shop();
    let url = node.url("shop/prod");
    node.psql("shop/prod", "create table numbers (n bigint, t text)");
    let file = node.scratch().join("numbers.csv");
    let rows: String = (0..200_000).map(|n| format!("{n},row number {n}\n")).collect();
    std::fs::write(&file, &rows).expect("a file can be written");
    let back = node.scratch().join("back.csv");
    let copy_in = format!("\\copy numbers from '{}' with (format csv)", file.display());
    let copy_out = format!("\\copy (select * from numbers order by n) to '{}' with (format csv)", back.display());
    for command in [copy_in, copy_out] {
        let ran = node.tool("psql", &["-Xq", &url, "-c", &command]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    assert!(std::fs::read_to_string(back).expect("the copy is there") == rows, "what came back is what went in");
    let client = node.connect("shop/prod").await;
    let answers = client.simple_query("select count(*), sum(n) from numbers").await.expect("the table can be read");
    let row = answers.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((row.get(0).map(str::to_owned), row.get(1).map(str::to_owned))),
        _ => None,
    });
    assert_eq!(row, Some((Some("200000".to_owned()), Some("19999900000".to_owned()))));
}
