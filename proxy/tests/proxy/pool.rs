//! Transaction mode: many clients, few backends.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ebb_proxy::{SessionState, Unreplayable};
use futures::future::{join_all, try_join_all};
use tokio_postgres::{AsyncMessage, NoTls};

use crate::harness::{BRANCH, ENDPOINT, Ebb, PATIENCE, code, connect, until, value};

async fn pool_of(size: usize) -> Ebb {
    Ebb::with(|config| config.pool_size = Some(size)).await
}

const PID: &str = "SELECT pg_backend_pid()";

#[tokio::test(flavor = "multi_thread")]
async fn clients_take_turns_on_few_backends() {
    let ebb = pool_of(2).await;
    let clients = join_all((0..20).map(|_| ebb.connect_pooled())).await;
    let mut pids = BTreeSet::new();
    for _ in 0..5 {
        pids.extend(join_all(clients.iter().map(|client| value(client, PID))).await);
    }
    assert_eq!(pids.len(), 2, "{pids:?}");
    // The last answers may be here before their sessions have given their backends back.
    let asleep = [const { SessionState::Hibernated }; 20];
    until("all have given their backends back", || async { ebb.states() == asleep }).await;
    // In a transaction the backend is one's own.
    for client in &clients {
        client.batch_execute("BEGIN").await.unwrap();
        let first = value(client, PID).await;
        assert_eq!(value(client, PID).await, first);
        client.batch_execute("COMMIT").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ways_to_ask_for_transaction_mode() {
    let ebb = pool_of(1).await;
    // Two clients that ask for the same share the one backend.
    let is_pooled = async |config: &tokio_postgres::Config| {
        let (one, other) = (connect(config).await.unwrap(), connect(config).await.unwrap());
        value(&one, PID).await == value(&other, PID).await
    };
    let mut config = ebb.config();
    for (options, database, expect) in [
        (Some(format!("endpoint={ENDPOINT}-pooler")), "app".to_owned(), true),
        (Some(format!("endpoint={ENDPOINT} pool=transaction")), "app".to_owned(), true),
        (Some(format!("endpoint={ENDPOINT}-pooler pool=session")), "app".to_owned(), false),
        (None, format!("app@{ENDPOINT}-pooler"), true),
        (None, format!("app@{ENDPOINT}"), false),
    ] {
        config.options(options.unwrap_or_default()).dbname(database.clone());
        assert_eq!(is_pooled(&config).await, expect, "{config:?}");
    }
    config.options("endpoint=prod--shop-pooler-pooler").dbname("app");
    assert_eq!(code(&connect(&config).await.err().unwrap()), "3D000");
    config.options(format!("endpoint={ENDPOINT} pool=x"));
    assert_eq!(code(&connect(&config).await.err().unwrap()), "22023");
    let by_options = format!("options=endpoint={ENDPOINT}-pooler");
    let by_host = format!("host={ENDPOINT}-pooler.localhost sslmode=require");
    for way in [by_options, by_host] {
        let error = ebb.psql(&format!("{way} replication=database"), "IDENTIFY_SYSTEM").await.unwrap_err();
        assert!(error.contains("not available in transaction mode") && error.contains("without -pooler"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_come_one_after_another_share_the_backend_of_a_pool_of_one() {
    let ebb = pool_of(1).await;
    let mut pids = BTreeSet::new();
    for way in
        [format!("host={ENDPOINT}-pooler.localhost sslmode=require"), format!("options=endpoint={ENDPOINT}-pooler")]
    {
        for _ in 0..5 {
            pids.insert(ebb.psql(&way, PID).await.unwrap());
        }
    }
    assert_eq!(pids.len(), 1, "{pids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn prepared_statements_work_on_whichever_backend() {
    let ebb = pool_of(2).await;
    let (client, other) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
    let statement = client.prepare("SELECT $1::int + 1, pg_backend_pid()").await.unwrap();
    let mut pids = BTreeSet::new();
    for i in 0..4 {
        // A newcomer takes the backend that was used last.
        let newcomer = ebb.connect_pooled().await;
        newcomer.batch_execute("BEGIN").await.unwrap();
        let row = client.query_one(&statement, &[&i]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), i + 1);
        pids.insert(row.get::<_, i32>(1));
    }
    assert!(pids.len() > 1, "{pids:?}");
    // Another client's statement of the same name is another.
    let theirs = other.prepare("SELECT 'theirs'").await.unwrap();
    assert_eq!(other.query_one(&theirs, &[]).await.unwrap().get::<_, &str>(0), "theirs");
    assert_eq!(client.query_one(&statement, &[&1]).await.unwrap().get::<_, i32>(0), 2);
    // Many of them at once, in pipelines.
    let statements = try_join_all((0..300).map(|i| client.prepare(Box::leak(format!("SELECT {i}").into_boxed_str()))));
    for (i, statement) in statements.await.unwrap().iter().enumerate() {
        assert_eq!(client.query_one(statement, &[]).await.unwrap().get::<_, i32>(0), i as i32);
    }
    let held = "SELECT count(*)::text FROM pg_prepared_statements";
    assert!(value(&other, held).await.parse::<usize>().unwrap() <= 200);
    assert_eq!(code(&client.prepare("SELECT broken FROM nowhere").await.unwrap_err()), "42P01");
    client.batch_execute("DISCARD ALL").await.unwrap();
    assert_eq!(code(&client.query(&statement, &[&1]).await.unwrap_err()), "26000");
    assert_eq!(other.query_one(&theirs, &[]).await.unwrap().get::<_, &str>(0), "theirs");
}

/// What one client does, what asks for it, and the answer of a session in which it was not done.
const LEFTOVERS: [(&str, &str, &str); 16] = [
    ("SET search_path = elsewhere", "SHOW search_path", "\"$user\", public"),
    ("SET statement_timeout = '77s'", "SHOW statement_timeout", "0"),
    ("SET TimeZone = 'Asia/Tokyo'", "SHOW TimeZone", "Etc/UTC"),
    ("SET ROLE reader", "SELECT current_user::text", "app"),
    ("SET SESSION AUTHORIZATION app", "SELECT session_user::text", "app"),
    ("SET myapp.tenant = '7'", "SELECT coalesce(current_setting('myapp.tenant', true), '')", ""),
    ("SELECT set_config('myapp.other', '7', false)", "SELECT coalesce(current_setting('myapp.other', true), '')", ""),
    ("SET default_transaction_isolation = serializable", "SHOW default_transaction_isolation", "read committed"),
    ("SET application_name = 'mine'", "SHOW application_name", ""),
    // What no text tells.
    ("SELECT hidden('se~t myapp.hidden = 7')", "SELECT coalesce(current_setting('myapp.hidden', true), '')", ""),
    ("SELECT hidden('se~t role reader')", "SELECT current_user::text", "app"),
    ("SELECT hidden('select pg_advi~sory_lock(7)')", LOCKS, "0"),
    (
        "SELECT hidden('create te~mp table hidden_table ()')",
        "SELECT coalesce(to_regclass('hidden_table')::text, '')",
        "",
    ),
    ("SELECT hidden('li~sten hidden_channel')", "SELECT count(*)::text FROM pg_listening_channels()", "0"),
    (
        "SELECT hidden('declare hidden_cursor cursor with ho~ld for select 1')",
        "SELECT count(*)::text FROM pg_cursors",
        "0",
    ),
    ("BEGIN; SET LOCAL work_mem = '7MB'; COMMIT", "SHOW work_mem", "4MB"),
];

const LOCKS: &str = "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory'";

#[tokio::test(flavor = "multi_thread")]
async fn nothing_leaks_from_one_client_to_another() {
    let ebb = pool_of(1).await;
    let setup = ebb.connect().await;
    setup
        .batch_execute(
            "CREATE FUNCTION hidden(what text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE replace(what, '~', ''); END $$",
        )
        .await
        .unwrap();
    for (leave, ask, clean) in LEFTOVERS {
        let (leaver, other) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
        assert_eq!(value(&other, ask).await, clean, "before {leave}");
        leaver.batch_execute(leave).await.unwrap_or_else(|error| panic!("{leave}: {error:?}"));
        assert_eq!(value(&other, ask).await, clean, "after {leave}");
        leaver.batch_execute(leave).await.unwrap();
        drop(leaver);
        until("it has left", || async { ebb.states().len() == 2 }).await;
        let newcomer = ebb.connect_pooled().await;
        assert_eq!(value(&newcomer, ask).await, clean, "after {leave}, for a newcomer");
    }
    // A sequence of another's is nobody's last value.
    let (leaver, other) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
    leaver.batch_execute("CREATE SEQUENCE s; SELECT nextval('s')").await.unwrap();
    assert_eq!(code(&other.simple_query("SELECT lastval()").await.unwrap_err()), "55000");
    // What the last client of a backend took and nobody saw, goes with it.
    leaver.batch_execute("SELECT hidden('select pg_advi~sory_lock(7)')").await.unwrap();
    drop(leaver);
    until("the lock is free", || async { value(&setup, LOCKS).await == "0" }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_sets_stays_with_it() {
    let ebb = pool_of(1).await;
    ebb.connect().await.batch_execute("CREATE SCHEMA mine; CREATE TABLE mine.t (a int)").await.unwrap();
    let (one, two) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
    for sql in [
        "SET search_path = mine",
        "SET myapp.tenant = 'o''neil'",
        "SET TimeZone = 'Asia/Tokyo'",
        "SET application_name = 'it''s me'",
        "PREPARE by_sql AS SELECT 'by SQL'",
        "SET ROLE reader",
    ] {
        one.batch_execute(sql).await.unwrap();
        two.batch_execute("SELECT 1").await.unwrap();
    }
    for _ in 0..3 {
        for (sql, mine, theirs) in [
            ("SHOW search_path", "mine", "\"$user\", public"),
            ("SHOW TimeZone", "Asia/Tokyo", "Etc/UTC"),
            ("SHOW application_name", "it's me", ""),
            ("SELECT current_setting('myapp.tenant', true)", "o'neil", ""),
            ("SELECT current_user::text", "reader", "app"),
        ] {
            assert_eq!(value(&two, sql).await, theirs, "{sql}");
            assert_eq!(value(&one, sql).await, mine, "{sql}");
        }
        assert_eq!(value(&one, "EXECUTE by_sql").await, "by SQL");
        assert_eq!(code(&two.simple_query("EXECUTE by_sql").await.unwrap_err()), "26000");
    }
    ebb.suspend_when_idle().await;
    assert_eq!(value(&one, "SHOW search_path").await, "mine");
    assert_eq!(value(&two, "SHOW search_path").await, "\"$user\", public");
    one.batch_execute("RESET ROLE").await.unwrap();
    // The same text means another table for each of them.
    assert!(one.prepare("SELECT a FROM t").await.is_ok());
    assert_eq!(code(&two.prepare("SELECT a FROM t").await.unwrap_err()), "42P01");
}

#[tokio::test(flavor = "multi_thread")]
async fn start_up_parameters_are_each_clients_own() {
    let ebb = pool_of(1).await;
    let with = async |options: &str, application: &str| {
        let mut config = ebb.pooled();
        config.options(format!("endpoint={ENDPOINT}-pooler {options}")).application_name(application);
        connect(&config).await.unwrap()
    };
    let clients = [
        (with("", "first").await, "first", "0", "app"),
        (with("", "second's").await, "second's", "0", "app"),
        (with("-c lock_timeout=7s", "").await, "", "7s", "app"),
        (with("-c role=reader", "").await, "", "0", "reader"),
        (with("-c role=reader", "").await, "", "0", "reader"),
    ];
    for _ in 0..2 {
        for (client, application, timeout, role) in &clients {
            assert_eq!(value(client, "SHOW application_name").await, *application);
            assert_eq!(value(client, "SHOW lock_timeout").await, *timeout);
            assert_eq!(value(client, "SELECT current_user::text").await, *role);
        }
    }
}

/// What a session has that lives in its backend alone, how it gives that up, and what is said of it meanwhile.
const PINS: [(&str, &str, &str); 4] = [
    ("CREATE TEMP TABLE x ()", "DISCARD TEMP", "temporary table"),
    ("SELECT pg_advisory_lock(pg_backend_pid())", "SELECT pg_advisory_unlock(pg_backend_pid())", "advisory lock"),
    ("LISTEN news", "UNLISTEN news", "LISTEN"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "CLOSE c", "holdable cursor"),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_lives_in_a_backend_alone_keeps_it_and_not_too_many_may() {
    let ebb = pool_of(2).await;
    for (take, give_up, reason) in PINS {
        let (keeper, other) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
        let pid = value(&keeper, PID).await;
        keeper.batch_execute(take).await.unwrap();
        let pinned = SessionState::Pinned { reason: reason.to_owned() };
        until("it is seen", || async { ebb.states().contains(&pinned) }).await;
        for _ in 0..3 {
            assert_eq!(value(&keeper, PID).await, pid, "{reason}");
            assert_ne!(value(&other, PID).await, pid, "{reason}");
        }
        // Half of the pool is taken: the next is told so, and why.
        let (next, connection) = ebb.pooled().connect(NoTls).await.unwrap();
        let connection = tokio::spawn(connection);
        next.batch_execute(take).await.unwrap();
        let asked = next.batch_execute("SELECT 1").await.unwrap_err();
        // As the answer to that, or before it was asked.
        let told = if asked.as_db_error().is_some() { asked } else { connection.await.unwrap().unwrap_err() };
        let error = told.as_db_error().unwrap();
        assert_eq!(error.code().code(), "53300");
        assert!(error.detail().unwrap().contains(reason), "{error:?}");
        // It keeps the compute awake, as in session mode.
        until("the others are done", || async { ebb.handle.activity(BRANCH).busy == 0 }).await;
        let blocked = ebb.suspend().await.unwrap_err().0;
        assert_eq!(blocked.iter().map(|session| &session.state).collect::<Vec<_>>(), [&pinned]);
        // Given up, it is shared again.
        keeper.batch_execute(give_up).await.unwrap();
        ebb.suspend_when_idle().await;
        drop((keeper, other, next));
        until("all have left", || async { ebb.states().is_empty() }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn notifications_arrive_at_who_listens() {
    let ebb = pool_of(2).await;
    let (listener, mut connection) = ebb.pooled().connect(NoTls).await.unwrap();
    let (told, mut tell) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(notification) = message {
                told.send(notification.payload().to_owned()).unwrap();
            }
        }
    });
    listener.batch_execute("LISTEN news").await.unwrap();
    let other = ebb.connect_pooled().await;
    for i in 0..3 {
        other.batch_execute(&format!("NOTIFY news, '{i}'")).await.unwrap();
        let payload = tokio::time::timeout(PATIENCE, tell.recv()).await.unwrap().unwrap();
        assert_eq!(payload, i.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_too_long_ends_with_the_truth() {
    let ebb = Ebb::with(|config| {
        config.pool_size = Some(1);
        config.pool_wait = Duration::from_millis(300);
    })
    .await;
    let (holder, waiter) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
    holder.batch_execute("BEGIN").await.unwrap();
    let error = waiter.batch_execute("SELECT 1").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!((error.code().code(), error.severity()), ("53300", "FATAL"));
    assert_eq!(error.message(), "no connection of the pool became free");
    assert_eq!(error.detail(), Some("The pool has 1 connections; the session waited 0.3 s for one."));
    assert!(error.hint().unwrap().contains("--pool-size"));
    holder.batch_execute("COMMIT").await.unwrap();
    ebb.connect_pooled().await.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_pauses_does_not_starve_others() {
    let ebb = pool_of(1).await;
    let (busy, modest) = (Arc::new(ebb.connect_pooled().await), ebb.connect_pooled().await);
    let pipelining = {
        let busy = busy.clone();
        tokio::spawn(async move { while try_join_all((0..200).map(|_| busy.query("SELECT 1", &[]))).await.is_ok() {} })
    };
    for _ in 0..20 {
        tokio::time::timeout(PATIENCE, modest.batch_execute("SELECT 1")).await.unwrap().unwrap();
    }
    pipelining.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_reaches_the_query_of_its_own_client_and_no_other() {
    let ebb = pool_of(1).await;
    let (one, two) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
    let (cancel_one, cancel_two) = (one.cancel_token(), two.cancel_token());
    one.batch_execute("SELECT 1").await.unwrap();
    let superuser = ebb.world.superuser().await.unwrap();
    let sleeps = "SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND state = 'active' AND usename = 'app'";
    for round in 0..3 {
        let two_sleeps = two.batch_execute("SELECT pg_sleep(600)");
        let cancelling = async {
            until("it sleeps", || async { value(&superuser, sleeps).await == "1" }).await;
            // Its own backend of a moment ago is another's now.
            cancel_one.cancel_query(NoTls).await.unwrap();
            assert_eq!(value(&superuser, sleeps).await, "1", "in round {round}");
            cancel_two.cancel_query(NoTls).await.unwrap();
        };
        let (slept, ()) = tokio::join!(two_sleeps, cancelling);
        assert_eq!(code(&slept.unwrap_err()), "57014");
        // Requests that come too late hit nothing.
        for _ in 0..5 {
            one.batch_execute("SELECT 1").await.unwrap();
            let (cancelled, answered) =
                tokio::join!(cancel_one.cancel_query(NoTls), two.batch_execute("SELECT pg_sleep(0.005)"));
            cancelled.unwrap();
            answered.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_clients_hold_no_compute_awake_and_their_statements_outlive_it() {
    let ebb = pool_of(4).await;
    let clients = join_all((0..10).map(|_| ebb.connect_pooled())).await;
    let statements = try_join_all(clients.iter().map(|client| client.prepare("SELECT 'still here'"))).await.unwrap();
    assert!(ebb.handle.activity(BRANCH).idle_for.unwrap() < PATIENCE);
    for round in 1..=2 {
        ebb.suspend_when_idle().await;
        assert!(!ebb.world.is_running());
        for (client, statement) in clients.iter().zip(&statements) {
            assert_eq!(client.query_one(statement, &[]).await.unwrap().get::<_, &str>(0), "still here");
        }
        assert_eq!(ebb.wakes(), round + 1);
    }
    // A newcomer wakes nothing until it has something to do.
    ebb.suspend_when_idle().await;
    let wakes = ebb.wakes();
    let open = clients[0].batch_execute("BEGIN");
    open.await.unwrap();
    assert_eq!(ebb.wakes(), wakes + 1);
    assert_eq!(ebb.suspend().await.unwrap_err().0.len(), 1);
    clients[0].batch_execute("COMMIT").await.unwrap();
    ebb.suspend_when_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_a_fence_is_a_pause_and_not_an_error() {
    let ebb = pool_of(3).await;
    let setup = ebb.connect().await;
    setup.batch_execute("CREATE TABLE t (n int8); INSERT INTO t VALUES (0)").await.unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut workers = Vec::new();
    for _ in 0..12 {
        let client = ebb.connect_pooled().await;
        let stop = stop.clone();
        workers.push(tokio::spawn(async move {
            let add = client.prepare("UPDATE t SET n = n + 1").await.unwrap();
            let mut done = 0_i64;
            while !stop.load(Ordering::Relaxed) {
                client.batch_execute("BEGIN").await.unwrap();
                client.execute(&add, &[]).await.unwrap();
                client.batch_execute("COMMIT").await.unwrap();
                done += 1;
            }
            done
        }));
    }
    let superuser = async || ebb.world.superuser().await.unwrap();
    for _ in 0..4 {
        let count = async || value(&superuser().await, "SELECT n::text FROM t").await.parse::<i64>().unwrap();
        let before = count().await;
        until("work goes on", || async { count().await > before + 20 }).await;
        ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::End).await.unwrap();
        let inside = "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'app'";
        assert_eq!(value(&superuser().await, inside).await, "0");
        ebb.world.stop("INT");
        ebb.handle.release(BRANCH);
        until("it is back", || async { ebb.world.superuser().await.is_ok() }).await;
    }
    stop.store(true, Ordering::Relaxed);
    let done: i64 = join_all(workers).await.into_iter().map(Result::unwrap).sum();
    assert_eq!(value(&setup, "SELECT n::text FROM t").await, done.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_compute_dies_those_at_work_are_told_and_the_others_notice_nothing() {
    let ebb = pool_of(3).await;
    let (open, idle) = (ebb.connect_pooled().await, ebb.connect_pooled().await);
    let statement = idle.prepare("SELECT 'as ever'").await.unwrap();
    open.batch_execute("BEGIN").await.unwrap();
    for lost in [false, true] {
        ebb.world.stop("KILL");
        if lost {
            ebb.handle.lost(BRANCH, 100);
        }
        assert_eq!(idle.query_one(&statement, &[]).await.unwrap().get::<_, &str>(0), "as ever");
    }
    // Told by Postgres's own last words, or else by the proxy's.
    let error = open.batch_execute("SELECT 1").await.unwrap_err();
    assert!(error.is_closed() || ["08006", "57P01"].contains(&code(&error)), "{error:?}");
    idle.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn backends_that_were_ended_are_replaced() {
    let ebb = pool_of(3).await;
    let clients = join_all((0..3).map(|_| ebb.connect_pooled())).await;
    join_all(clients.iter().map(|client| client.batch_execute("SELECT pg_sleep(0.05)"))).await;
    let superuser = ebb.world.superuser().await.unwrap();
    superuser
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
        .await
        .unwrap();
    let left = "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'app'";
    until("they are gone", || async { value(&superuser, left).await == "0" }).await;
    for client in &clients {
        client.batch_execute("SELECT 1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_on_twenty_backends() {
    let ebb = Ebb::with(|config| {
        config.pool_size = Some(20);
        // A thousand proofs of passwords at once take a while in a debug build.
        config.login_timeout = PATIENCE;
    })
    .await;
    ebb.connect()
        .await
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT i, 0 FROM generate_series(1, 1000) i",
        )
        .await
        .unwrap();
    let clients = join_all((0..1000).map(|_| ebb.connect_pooled())).await;
    let work = clients.iter().enumerate().map(|(i, client)| async move {
        let add = client.prepare("UPDATE t SET n = n + 1 WHERE id = $1 RETURNING n").await.unwrap();
        for round in 1..=3 {
            assert_eq!(client.query_one(&add, &[&(i as i32 + 1)]).await.unwrap().get::<_, i32>(0), round);
        }
    });
    let superuser = ebb.world.superuser().await.unwrap();
    let backends =
        "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'app' AND backend_type = 'client backend'";
    let mut most = 0;
    tokio::select! {
        _ = join_all(work) => {}
        () = async {
            loop {
                most = most.max(value(&superuser, backends).await.parse::<usize>().unwrap());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
    assert!(most <= 21, "{most} backends");
    assert_eq!(ebb.handle.activity(BRANCH).sessions, 1000);
    assert_eq!(value(&superuser, "SELECT sum(n)::text FROM t").await, "3000");
}
