//! Cancelling, at moments where it is easy to strike the wrong one.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ebb_proxy::{SessionState, Unreplayable};
use tokio::net::TcpStream;

use crate::harness::{BRANCH, ENDPOINT, Ebb, OnWake, PATIENCE, until, value};
use crate::raw;
use crate::wire::{Wire, bind, connect, execute, parse, query, startup, sync};

/// Asks for cancelling, until Postgres has been told.
async fn cancel(ebb: &Ebb, wire: &Wire<TcpStream>) {
    assert_eq!(raw::send(ebb.addr, &wire.cancel_packet()).await, b"");
}

/// Waits until this many backends sleep in a query.
async fn sleeping(ebb: &Ebb, count: usize) {
    let superuser = ebb.world.superuser().await.unwrap();
    until("the query runs", || async {
        let sql = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        value(&superuser, sql).await == count.to_string()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_both_lengths_cancel_their_own_query_and_no_other() {
    let ebb = Ebb::asleep().await;
    let mut other = Wire::open(&ebb).await;
    other.write(&query("SELECT pg_sleep(600)")).await;
    for minor in [0, 2] {
        let mut wire = Wire::start(connect(&ebb).await, &startup(minor, &[])).await;
        wire.write(&query("SELECT pg_sleep(600)")).await;
        sleeping(&ebb, 2).await;
        cancel(&ebb, &wire).await;
        assert_eq!(raw::code(&wire.read_until(b'E').await.pop().unwrap().1), "57014");
        wire.read_until(b'Z').await;
        assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
    }
    sleeping(&ebb, 1).await;
    cancel(&ebb, &other).await;
    assert_eq!(raw::code(&other.read_until(b'E').await.pop().unwrap().1), "57014");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_leads_to_the_backend_of_the_moment_after_each_wake() {
    let ebb = Ebb::asleep().await;
    let mut wire = Wire::start(connect(&ebb).await, &startup(2, &[])).await;
    for _ in 0..3 {
        ebb.suspend_when_idle().await;
        wire.write(&query("SELECT pg_sleep(600)")).await;
        until("it has been woken", || async { ebb.world.is_running() }).await;
        until("Postgres answers", || async { ebb.world.superuser().await.is_ok() }).await;
        sleeping(&ebb, 1).await;
        cancel(&ebb, &wire).await;
        assert_eq!(raw::code(&wire.read_until(b'E').await.pop().unwrap().1), "57014");
        wire.read_until(b'Z').await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_session_is_neither_cancelled_nor_woken() {
    let ebb = Ebb::asleep().await;
    let mut wire = Wire::open(&ebb).await;
    ebb.suspend_when_idle().await;
    let wakes = ebb.wakes();
    for _ in 0..5 {
        cancel(&ebb, &wire).await;
    }
    assert_eq!(ebb.wakes(), wakes);
    assert!(!ebb.world.is_running());
    assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_waits_for_its_compute_is_called_off_at_once() {
    let ebb = Ebb::asleep().await;
    let mut wire = Wire::open(&ebb).await;
    wire.ask(&query("SET my.own = 'kept'")).await;
    ebb.suspend_when_idle().await;
    *ebb.world.on_wake.lock().unwrap() = OnWake::Hang;
    let extended = [parse("", "SELECT 1"), bind("", "", &[]), execute("", 0), sync()].concat();
    for turn in [query("SELECT pg_sleep(600)"), extended.clone(), [&extended[..], &query("SELECT 2")].concat()] {
        wire.write(&turn).await;
        until("it waits", || async { ebb.states() == [SessionState::Waiting] }).await;
        cancel(&ebb, &wire).await;
        let answers = wire.read_until(b'Z').await;
        let tags: String = answers.iter().map(|(tag, _)| char::from(*tag)).collect();
        assert_eq!((&*tags, &*raw::code(&answers[0].1)), ("EZ", "57014"));
    }
    // What was sent behind the last of them still waits, for the one wake that all have waited for.
    until("it waits", || async { ebb.states() == [SessionState::Waiting] }).await;
    assert_eq!(ebb.wakes(), 2);
    drop(wire);

    // At a fence it is the same.
    let ebb = Ebb::asleep().await;
    let mut wire = Wire::open(&ebb).await;
    wire.ask(&query("SET my.own = 'kept'")).await;
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::Refuse).await.unwrap();
    wire.write(&query("SELECT 1")).await;
    until("it waits", || async { ebb.states() == [SessionState::Waiting] }).await;
    cancel(&ebb, &wire).await;
    assert_eq!(raw::code(&wire.read_until(b'Z').await[0].1), "57014");
    until("it sleeps again", || async { ebb.states() == [SessionState::Hibernated] }).await;
    ebb.handle.release(BRANCH);
    let (tags, bodies) = wire.ask(&query("SHOW my.own")).await;
    assert_eq!(tags, "TDCZ");
    assert!(bodies.windows(4).any(|bytes| bytes == b"kept"));
}

#[tokio::test(flavor = "multi_thread")]
async fn late_cancels_strike_neither_a_suspend_nor_the_session_that_wakes() {
    let ebb = Ebb::asleep().await;
    // A new session each time, whose key has not been used too often.
    for _ in 0..8 {
        let mut wire = Wire::open(&ebb).await;
        let (key, addr) = (wire.cancel_packet(), ebb.addr);
        let nagging = tokio::spawn(async move {
            loop {
                raw::send(addr, &key).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        for _ in 0..3 {
            wire.write(&query("SELECT pg_sleep(0.01)")).await;
            wire.read_until(b'Z').await;
            // Where it was called off, the wake goes on; what it starts is not to be stopped half-way.
            until("no wake is under way", || async { ebb.world.waking.load(Ordering::SeqCst) == 0 }).await;
            // The state is read and given back by queries of the proxy's own: were one of them cancelled, the session would
            // be pinned, or end.
            ebb.suspend_when_idle().await;
        }
        nagging.abort();
        assert!(wire.ask(&query("SELECT 1")).await.0.ends_with('Z'));
        until("only this session is left", || async { ebb.states().len() == 1 }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_packet_with_a_wrong_length_is_malformed() {
    let ebb = Ebb::asleep().await;
    for secret in [&[][..], &[0; 3], &[0; 257]] {
        let packet = raw::packet(80_877_102, &[&[0, 0, 0, 1], secret].concat());
        assert_eq!(raw::code(&raw::send(ebb.addr, &packet).await), "08P01");
    }
    for secret in [&[0; 4][..], &[0; 32], &[0; 256]] {
        let packet = raw::packet(80_877_102, &[&[0, 0, 0, 1], secret].concat());
        assert_eq!(raw::send(ebb.addr, &packet).await, b"", "an unknown key is told nothing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_waits_for_a_connection_of_the_pool_is_called_off_and_the_others_keep_their_places() {
    let ebb = Ebb::with(|config| config.pool_size = Some(1)).await;
    let pooled = startup(2, &[("options", &format!("endpoint={ENDPOINT}-pooler"))]);
    let open = async || Wire::start(connect(&ebb).await, &pooled).await;
    let (mut holder, mut before, mut wire, mut behind) = (open().await, open().await, open().await, open().await);
    wire.ask(&[query("SET my.own = 'kept'"), query("CREATE TABLE t (turn serial, who text)")].concat()).await;
    wire.read_until(b'Z').await;
    holder.write(&query("BEGIN")).await;
    holder.read_until(b'Z').await;
    let waits = |count: usize| {
        let states = ebb.states();
        async move { states.iter().filter(|state| **state == SessionState::Waiting).count() == count }
    };
    let insert = |who: &str| query(&format!("INSERT INTO t (who) VALUES ('{who}')"));
    before.write(&insert("before")).await;
    until("one waits", || waits(1)).await;

    let extended = [parse("s", "SELECT 1"), bind("", "s", &[]), execute("", 0), sync()].concat();
    // In one packet, and longer than what is read of it before there is a backend.
    let long = query(&format!("SELECT '{}'", "x".repeat(100_000)));
    for turn in [insert("wire"), extended, long] {
        wire.write(&turn).await;
        until("it waits, too", || waits(2)).await;
        cancel(&ebb, &wire).await;
        let answers = wire.read_until(b'Z').await;
        let tags: String = answers.iter().map(|(tag, _)| char::from(*tag)).collect();
        assert_eq!((&*tags, &*raw::code(&answers[0].1), &answers[1].1[..]), ("EZ", "57014", &b"I"[..]));
        until("it has left the queue", || waits(1)).await;
    }

    // It has lost its place, and what it sends behind a turn that it gives up is its next one.
    behind.write(&insert("behind")).await;
    until("another waits", || waits(2)).await;
    wire.write(&[insert("given up"), insert("wire")].concat()).await;
    until("it waits again", || waits(3)).await;
    cancel(&ebb, &wire).await;
    let answers = wire.read_until(b'Z').await;
    assert_eq!(raw::code(&answers[0].1), "57014");
    until("it waits with the next one", || waits(3)).await;
    holder.write(&query("COMMIT")).await;
    for client in [&mut holder, &mut before, &mut behind, &mut wire] {
        assert!(client.read_until(b'Z').await.iter().all(|(tag, _)| *tag != b'E'));
    }
    let (_, order) = wire.ask(&query("SELECT string_agg(who, ' ' ORDER BY turn) FROM t")).await;
    assert!(String::from_utf8_lossy(&order).contains("before behind wire"), "{}", order.escape_ascii());
    let (tags, bodies) = wire.ask(&query("SHOW my.own")).await;
    assert_eq!(tags, "TDCZ");
    assert!(bodies.windows(4).any(|bytes| bytes == b"kept"), "the session is what it was");
    // What was never parsed is not there.
    let (tags, error) = wire.ask(&[bind("", "s", &[]), sync()].concat()).await;
    assert_eq!((&*tags, &*raw::code(&error)), ("EZ", "26000"));
}
