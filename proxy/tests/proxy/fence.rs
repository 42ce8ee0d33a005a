//! Holding everyone while something changes behind the endpoint.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use ebb_proxy::{SessionState, Unreplayable};
use futures::future;

use crate::harness::{BRANCH, Ebb, PATIENCE, code, connect, until, value};

#[tokio::test(flavor = "multi_thread")]
async fn under_load_a_restart_is_a_pause_and_not_an_error() {
    let ebb = Ebb::asleep().await;
    let setup = ebb.connect().await;
    setup.batch_execute("CREATE TABLE t (n int8); INSERT INTO t VALUES (0)").await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicI64::new(0));
    let mut workers = Vec::new();
    for worker in 0..8 {
        let client = ebb.connect().await;
        let (stop, done) = (stop.clone(), done.clone());
        workers.push(tokio::spawn(async move {
            let add = client.prepare("UPDATE t SET n = n + 1 RETURNING n").await.unwrap();
            let read = client.prepare("SELECT n FROM t").await.unwrap();
            while !stop.load(Ordering::Relaxed) {
                match worker % 4 {
                    0 => drop(client.query_one(&add, &[]).await.unwrap()),
                    1 => {
                        client.batch_execute("BEGIN").await.unwrap();
                        client.query_one(&add, &[]).await.unwrap();
                        client.batch_execute("COMMIT").await.unwrap();
                    }
                    2 => {
                        client.query_one(&read, &[]).await.unwrap();
                        continue;
                    }
                    // Never without a query on its way.
                    _ => {
                        let many = (0..50).map(|_| client.query_one(&read, &[]));
                        future::try_join_all(many).await.unwrap();
                        continue;
                    }
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for round in 1..=5 {
        let before = done.load(Ordering::Relaxed);
        until("work goes on", || async { done.load(Ordering::Relaxed) > before + 20 }).await;
        ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::End).await.unwrap();
        let inside = value(&ebb.world.superuser().await.unwrap(), BACKENDS).await;
        assert_eq!(inside, "0", "no session holds a backend in round {round}");
        let wakes = ebb.wakes();
        ebb.world.stop("INT");
        assert_eq!(ebb.wakes(), wakes, "nobody wakes behind a fence");
        ebb.handle.release(BRANCH);
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await.unwrap();
    }
    assert_eq!(value(&setup, "SELECT n::text FROM t").await, done.load(Ordering::Relaxed).to_string());
    assert_eq!(ebb.world.overlaps.load(Ordering::SeqCst), 0);
}

const BACKENDS: &str = "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'app'";

#[tokio::test(flavor = "multi_thread")]
async fn at_the_deadline_open_transactions_end_with_57p01_and_pins_with_their_reason() {
    let ebb = Ebb::asleep().await;
    let (open, pinned, idle) = (ebb.connect().await, ebb.connect().await, ebb.connect().await);
    open.batch_execute("BEGIN; CREATE TABLE t ()").await.unwrap();
    pinned.batch_execute("CREATE TEMP TABLE x ()").await.unwrap();
    let running = ebb.connect().await;
    let query = tokio::spawn(async move { running.batch_execute("SELECT pg_sleep(600)").await });
    let streaming = ebb.connect().await;
    let stream = tokio::spawn(async move {
        streaming.simple_query("SELECT repeat('x', 1000) FROM generate_series(1, 100000000)").await.map(drop)
    });
    until("both run", || async { ebb.states().iter().filter(|state| **state == SessionState::Active).count() == 3 })
        .await;

    ebb.handle.fence(BRANCH, Duration::from_secs(3), Unreplayable::End).await.unwrap();
    let superuser = ebb.world.superuser().await.unwrap();
    // What was running is cancelled, not left to itself.
    until("no backend is left", || async { value(&superuser, BACKENDS).await == "0" }).await;
    for ended in [query, stream] {
        let error = ended.await.unwrap().unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!((error.code().code(), error.severity()), ("57P01", "FATAL"));
        assert!(error.hint().unwrap().contains("Reconnect"));
    }
    until("the others are told", || async { open.is_closed() && pinned.is_closed() }).await;
    assert_eq!(ebb.states(), [SessionState::Hibernated]);
    ebb.handle.release(BRANCH);
    idle.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_during_a_fence_waits_and_is_served_after_it() {
    let ebb = Ebb::asleep().await;
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::End).await.unwrap();
    let config = ebb.config();
    let newcomer = tokio::spawn(async move { connect(&config).await.unwrap() });
    until("it waits", || async { ebb.states() == [SessionState::Waiting] }).await;
    assert_eq!(ebb.wakes(), 0);
    // Fencing what is fenced already changes nothing.
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::Refuse).await.unwrap();
    ebb.handle.release(BRANCH);
    newcomer.await.unwrap().batch_execute("SELECT 1").await.unwrap();
    assert_eq!(ebb.wakes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_beyond_the_wake_budget_is_told() {
    let ebb = Ebb::with(|config| config.wake_budget = Duration::from_millis(100)).await;
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::End).await.unwrap();
    let error = connect(&ebb.config()).await.err().unwrap();
    assert_eq!(code(&error), "57P03");
    assert_eq!(error.as_db_error().unwrap().message(), "the branch is busy with an operation");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_is_dropped_lets_everyone_go_on() {
    let ebb = Ebb::asleep().await;
    let (open, idle) = (ebb.connect().await, ebb.connect().await);
    open.batch_execute("BEGIN").await.unwrap();
    let fencing = ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::End);
    assert!(tokio::time::timeout(Duration::from_millis(100), fencing).await.is_err());
    idle.batch_execute("SELECT 1").await.unwrap();
    open.batch_execute("COMMIT").await.unwrap();
    ebb.suspend_when_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_called_off_by_the_compute_waits_for_no_wake() {
    let ebb = Ebb::asleep().await;
    *ebb.world.delay.lock().unwrap() = Duration::from_millis(500);
    let config = ebb.config();
    let client = tokio::spawn(async move { connect(&config).await.unwrap() });
    until("the wake has begun", || async { ebb.wakes() == 1 }).await;
    // Who waits for the compute is a reason not to suspend it, but none not to restore it.
    let blocked = ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::Refuse).await.unwrap_err();
    assert_eq!(blocked.0[0].state, SessionState::Waiting);
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::End).await.unwrap();
    ebb.handle.release(BRANCH);
    client.await.unwrap().batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn activity_tells_work_from_presence() {
    let ebb = Ebb::asleep().await;
    assert_eq!(ebb.handle.activity(BRANCH).idle_for, None);
    let client = ebb.connect().await;
    until("it is idle", || async { ebb.handle.activity(BRANCH).busy == 0 }).await;
    let idle_for = || ebb.handle.activity(BRANCH).idle_for.unwrap();
    until("presence alone is no work", || async { idle_for() >= Duration::from_secs(1) }).await;
    client.batch_execute("SELECT 1").await.unwrap();
    assert!(idle_for() < Duration::from_secs(1));
    ebb.suspend_when_idle().await;
    let activity = ebb.handle.activity(BRANCH);
    assert_eq!((activity.busy, activity.sessions), (0, 1));
    let session = &ebb.handle.sessions(BRANCH)[0];
    assert_eq!((&*session.role, &*session.database), ("app", "app"));
}
