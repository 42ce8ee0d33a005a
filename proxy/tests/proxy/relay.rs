//! What passes through a session: bulk, pipelines, copies, notifications, and the ends of it.

use std::time::Duration;

use futures::{SinkExt, StreamExt, future};
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, NoTls};

use crate::harness::{BRANCH, ENDPOINT, Ebb, code, until, value};

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_and_many_rows_come_whole() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    let row = client.query_one("SELECT repeat('x', 20000000)", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0).len(), 20_000_000);
    let rows = client.query("SELECT i, repeat('y', i % 100) FROM generate_series(1, 200000) i", &[]).await.unwrap();
    assert_eq!(rows.len(), 200_000);
    assert!(rows.iter().enumerate().all(|(at, row)| row.get::<_, i32>(0) == at as i32 + 1));
    let sent = "z".repeat(10_000_000);
    let length: i32 = client.query_one("SELECT length($1)", &[&sent]).await.unwrap().get(0);
    assert_eq!(length, 10_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_queries_are_answered_in_order() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    let statement = client.prepare("SELECT $1::int4").await.unwrap();
    let queries = (0..5000_i32).map(|i| {
        let (client, statement) = (&client, &statement);
        async move { client.query_one(statement, &[&i]).await.unwrap().get::<_, i32>(0) }
    });
    assert_eq!(future::join_all(queries).await, (0..5000).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_go_both_ways_and_leave_the_session_at_rest() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    client.batch_execute("CREATE TABLE t (a int, b text)").await.unwrap();
    let sink = client.copy_in("COPY t FROM STDIN").await.unwrap();
    tokio::pin!(sink);
    for part in 0..100 {
        let lines: String = (0..1000).map(|i| format!("{}\tline\n", part * 1000 + i)).collect();
        sink.send(tokio_util::bytes::Bytes::from(lines)).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 100_000);
    ebb.suspend_when_idle().await;

    let out = client.copy_out("COPY t TO STDOUT").await.unwrap();
    tokio::pin!(out);
    let mut bytes = 0;
    while let Some(chunk) = out.next().await {
        bytes += chunk.unwrap().len();
    }
    assert!(bytes > 900_000, "{bytes}");
    ebb.suspend_when_idle().await;

    // A copy that fails in the middle.
    let sink = client.copy_in("COPY t FROM STDIN").await.unwrap();
    tokio::pin!(sink);
    sink.send(tokio_util::bytes::Bytes::from_static(b"no number\tx\n")).await.unwrap();
    assert_eq!(code(&sink.finish().await.unwrap_err()), "22P02");
    assert_eq!(value(&client, "SELECT count(*)::text FROM t").await, "100000");
    ebb.suspend_when_idle().await;
    assert_eq!(value(&client, "SELECT count(*)::text FROM t").await, "100000");
}

#[tokio::test(flavor = "multi_thread")]
async fn libpq_copies_both_ways() {
    let ebb = Ebb::asleep().await;
    let route = format!("options=endpoint={ENDPOINT}");
    ebb.psql(&route, "CREATE TABLE t (a int)").await.unwrap();
    ebb.psql(&route, "\\copy t FROM PROGRAM 'seq 100000'").await.unwrap();
    let out = ebb.psql(&route, "\\copy t TO STDOUT").await.unwrap();
    assert_eq!(out.lines().count(), 100_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn notifications_arrive_at_an_idle_client() {
    let ebb = Ebb::asleep().await;
    let (listener, mut connection) = ebb.config().connect(NoTls).await.unwrap();
    let (heard, mut hear) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(notification) = message {
                heard.send(notification.payload().to_owned()).unwrap();
            }
        }
    });
    listener.batch_execute("LISTEN news").await.unwrap();
    let teller = ebb.connect().await;
    teller.batch_execute("NOTIFY news, 'first'").await.unwrap();
    assert_eq!(hear.recv().await.unwrap(), "first");
    // A fence that is refused because of it loses none.
    assert!(ebb.suspend().await.is_err());
    teller.batch_execute("NOTIFY news, 'second'").await.unwrap();
    assert_eq!(hear.recv().await.unwrap(), "second");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_stops_its_query() {
    let ebb = Ebb::asleep().await;
    let mut slow = crate::raw::Session::open(&ebb).await;
    slow.send(b"Q\0\0\0\x3eSELECT repeat('x', 1000) FROM generate_series(1, 1000000)").await;
    slow.send(b"\0").await;
    let superuser = ebb.world.superuser().await.unwrap();
    until("the backend waits for its client", || async {
        let waiting = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'ClientWrite'";
        value(&superuser, waiting).await == "1"
    })
    .await;
    drop(slow);
    until("its session has left", || async { ebb.states().is_empty() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_end_the_session_and_no_other() {
    let ebb = Ebb::asleep().await;
    let other = ebb.connect().await;
    for bytes in [&b"!\0\0\0\x04"[..], b"Q\0\0\0\x03", b"Q\xff\xff\xff\xff"] {
        let mut odd = crate::raw::Session::open(&ebb).await;
        odd.send(bytes).await;
        assert_eq!(crate::raw::code(&odd.read_to_end().await), "08P01");
    }
    other.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_a_compute_is_told_truthfully() {
    let ebb = Ebb::asleep().await;
    let (idle, busy) = (ebb.connect().await, ebb.connect().await);
    // Who has sent nothing loses nothing; this one might have set something.
    idle.batch_execute("SELECT 1").await.unwrap();
    busy.batch_execute("BEGIN; CREATE TABLE t ()").await.unwrap();
    let running = ebb.connect().await;
    let query = tokio::spawn(async move { running.batch_execute("SELECT pg_sleep(600)").await });
    until("the query runs", || async {
        ebb.states().iter().filter(|state| **state == ebb_proxy::SessionState::Active).count() == 2
    })
    .await;
    ebb.world.stop("KILL");
    ebb.handle.lost(BRANCH, u64::MAX);
    let error = query.await.unwrap().unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "08006");
    assert!(error.detail().unwrap().contains("is not known"), "{error:?}");
    until("all are told", || async { idle.is_closed() && busy.is_closed() }).await;
    until("all have left", || async { ebb.states().is_empty() }).await;
    assert_eq!(ebb.handle.activity(BRANCH).sessions, 0);
    assert!(ebb.handle.activity(BRANCH).idle_for.unwrap() < Duration::from_secs(30));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_is_terminated_speaks_for_itself() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    let other = ebb.connect().await;
    client.batch_execute("BEGIN").await.unwrap();
    ebb.world
        .superuser()
        .await
        .unwrap()
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'")
        .await
        .unwrap();
    until("it is told", || async { client.is_closed() }).await;
    other.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_ends_idle_clients_at_once_and_lets_transactions_finish() {
    let ebb = Ebb::asleep().await;
    let (idle, busy) = (ebb.connect().await, ebb.connect().await);
    busy.batch_execute("CREATE TABLE t (a int); BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let world = ebb.world.clone();
    let addr = ebb.addr;
    ebb.shutdown.cancel();
    until("the idle one is ended", || async { idle.is_closed() }).await;
    busy.batch_execute("INSERT INTO t VALUES (2); COMMIT").await.unwrap();
    ebb.stop().await;
    until("the other is ended, too", || async { busy.is_closed() }).await;
    assert!(tokio::net::TcpStream::connect(addr).await.is_err());
    assert_eq!(value(&world.superuser().await.unwrap(), "SELECT count(*)::text FROM t").await, "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_drain_deadline_transactions_end_with_57p01() {
    let ebb = Ebb::with(|config| config.drain_deadline = Duration::from_millis(200)).await;
    let busy = ebb.connect().await;
    let query = tokio::spawn(async move { busy.batch_execute("SELECT pg_sleep(600)").await });
    until("the query runs", || async { ebb.handle.activity(BRANCH).busy == 1 }).await;
    ebb.stop().await;
    assert_eq!(code(&query.await.unwrap().unwrap_err()), "57P01");
}
