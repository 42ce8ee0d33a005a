//! Asking "are you there?" wakes nothing, and keeps nothing awake.

use std::time::Duration;

use crate::harness::{BRANCH, ENDPOINT, Ebb, until};
use crate::raw::Session;

type Turn<'a> = &'a [(u8, &'a [u8])];

const BIND: &[u8] = b"\0\0\0\0\0\0\0\0";
const EXECUTE: &[u8] = b"\0\0\0\0\0";

/// As drivers and pools send them.
const EMPTY: [Turn<'_>; 6] = [
    &[(b'Q', b"\0")],
    &[(b'Q', b";\0")],
    &[(b'Q', b"-- ping\0")],
    &[(b'S', b"")],
    &[(b'P', b"\0\0\0\0"), (b'B', BIND), (b'D', b"P\0"), (b'E', EXECUTE), (b'S', b"")],
    &[(b'P', b"\0/* are you there? */\0\0\0"), (b'D', b"S\0"), (b'C', b"S\0"), (b'S', b"")],
];
const SELECT_1: [Turn<'_>; 3] = [
    &[(b'Q', b"SELECT 1\0")],
    &[(b'P', b"\0select 1;\0\0\0"), (b'B', BIND), (b'D', b"P\0"), (b'E', EXECUTE), (b'S', b"")],
    &[
        (b'P', b"\0/* pool */ SELECT 1\0\0\0"),
        (b'D', b"S\0"),
        (b'B', b"\0\0\0\0\0\0\0\x01\0\x01"),
        (b'E', EXECUTE),
        (b'S', b""),
    ],
];

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_client_is_answered_as_postgres_would_and_nothing_wakes() {
    let ebb = Ebb::with(|config| config.answer_pings = true).await;
    let mut client = Session::open(&ebb).await;
    let turns: Vec<_> = EMPTY.iter().chain(&SELECT_1).collect();
    let mut by_postgres = Vec::new();
    for turn in &turns {
        by_postgres.push(client.turn(turn).await);
    }
    ebb.suspend_when_idle().await;
    let wakes = ebb.wakes();
    for (turn, expect) in turns.iter().zip(&by_postgres) {
        assert_eq!(client.turn(turn).await, *expect, "for {turn:?}");
    }
    // Several at once, and one byte by byte.
    client.write(&[EMPTY[0], SELECT_1[0]].concat()).await;
    assert_eq!(client.read_turn().await, by_postgres[0]);
    assert_eq!(client.read_turn().await, by_postgres[EMPTY.len()]);
    for byte in b"Q\0\0\0\x05\0" {
        client.send(&[*byte]).await;
    }
    assert_eq!(client.read_turn().await, by_postgres[0]);
    assert_eq!((ebb.wakes(), ebb.world.is_running()), (wakes, false));
    // Work after a ping wakes as ever.
    client.write(&[EMPTY[0], &[(b'Q', b"SELECT 2\0")]].concat()).await;
    assert_eq!(client.read_turn().await, by_postgres[0]);
    assert!(client.read_turn().await.windows(8).any(|bytes| bytes == b"SELECT 1"));
    assert_eq!(ebb.wakes(), wakes + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn select_1_wakes_unless_the_client_or_the_operator_wants_it_answered() {
    let ebb = Ebb::asleep().await;
    let mut client = Session::open(&ebb).await;
    client.turn(EMPTY[0]).await;
    ebb.suspend_when_idle().await;
    client.turn(EMPTY[0]).await;
    assert!(!ebb.world.is_running());
    client.turn(SELECT_1[0]).await;
    assert!(ebb.world.is_running());

    let mut wishing = Session::open_with(&ebb, &format!("endpoint={ENDPOINT} -c ebb.pings=on")).await;
    wishing.turn(SELECT_1[0]).await;
    ebb.suspend_when_idle().await;
    wishing.turn(SELECT_1[0]).await;
    assert!(!ebb.world.is_running());
    let shown = wishing.turn(&[(b'Q', b"SELECT current_setting('ebb.pings', true) IS NULL\0")]).await;
    assert!(shown.windows(5).any(|bytes| bytes == b"\0\0\0\x01t"), "Postgres is not told of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_prepared_by_a_ping_is_there_for_work() {
    let ebb = Ebb::asleep().await;
    let mut client = Session::open(&ebb).await;
    ebb.suspend_when_idle().await;
    client.exchange(&[(b'P', b"\0;\0\0\0"), (b'S', b"")], b"1Z").await;
    assert!(!ebb.world.is_running());
    // A Flush wants its answers at once: that is no ping any more.
    client.exchange(&[(b'B', BIND), (b'E', EXECUTE), (b'H', b""), (b'S', b"")], b"2IZ").await;
    assert!(ebb.world.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_keep_no_compute_awake() {
    let ebb = Ebb::asleep().await;
    let mut client = Session::open(&ebb).await;
    client.turn(&[(b'Q', b"SELECT 2\0")]).await;
    let idle_for = || ebb.handle.activity(BRANCH).idle_for.unwrap();
    loop {
        for turn in EMPTY {
            client.turn(turn).await;
        }
        if idle_for() >= Duration::from_secs(1) {
            break;
        }
    }
    client.turn(SELECT_1[0]).await;
    until("the answer is noticed", || async { ebb.handle.activity(BRANCH).busy == 0 }).await;
    assert!(idle_for() < Duration::from_secs(1), "SELECT 1 is work, where nobody wished otherwise");
}
