//! What a session outlives, and what it is told where it does not.

use std::time::Duration;

use ebb_proxy::{EndpointError, SessionState, Unreplayable};
use ebb_types::SqlState;

use crate::harness::{BRANCH, ENDPOINT, Ebb, OnWake, PATIENCE, code, until, value};

#[tokio::test(flavor = "multi_thread")]
async fn pinned_sessions_end_with_57p05_where_their_branch_does_not_wait_for_them() {
    let ebb = Ebb::asleep().await;
    let (pinned, working, innocent) = (ebb.connect().await, ebb.connect().await, ebb.connect().await);
    pinned.batch_execute("LISTEN news").await.unwrap();
    innocent.batch_execute("SET TimeZone = 'Asia/Tokyo'").await.unwrap();
    working.batch_execute("BEGIN").await.unwrap();
    // Whoever works refuses, and then nobody is ended.
    let blocked = ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::EndPinned).await.unwrap_err().0;
    assert_eq!(blocked.iter().map(|session| &session.state).collect::<Vec<_>>(), [&SessionState::Active]);
    pinned.batch_execute("SELECT 1").await.unwrap();
    working.batch_execute("ROLLBACK").await.unwrap();

    until("nobody works", || async { ebb.handle.activity(BRANCH).busy == 0 }).await;
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::EndPinned).await.unwrap();
    ebb.world.stop("INT");
    ebb.handle.release(BRANCH);
    until("it is ended", || async { pinned.is_closed() }).await;
    assert_eq!(ebb.states(), [SessionState::Hibernated, SessionState::Hibernated]);
    assert_eq!(value(&innocent, "SHOW TimeZone").await, "Asia/Tokyo");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_evicted_is_told_what_it_held() {
    let ebb = Ebb::asleep().await;
    let mut client = crate::raw::Session::open(&ebb).await;
    client.exchange(&[(b'Q', b"CREATE TEMP TABLE t (a int)\0")], b"CZ").await;
    until("it is idle", || async { ebb.handle.activity(BRANCH).busy == 0 }).await;
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::EndPinned).await.unwrap();
    let words = client.read_to_end().await;
    assert_eq!(crate::raw::code(&words), "57P05");
    let words = String::from_utf8_lossy(&words);
    assert!(words.contains("temporary table") && words.contains("--pinned keep"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_ends_only_sessions_whose_state_it_took_with_it() {
    let ebb = Ebb::asleep().await;
    let (untouched, resumed, changed) = (ebb.connect().await, ebb.connect().await, ebb.connect().await);
    resumed.batch_execute("SET TimeZone = 'Asia/Tokyo'").await.unwrap();
    changed.batch_execute("SELECT 1").await.unwrap();
    // A suspend that is refused has read the states of those that are at rest.
    let pinned = ebb.connect().await;
    pinned.batch_execute("LISTEN news").await.unwrap();
    until("all are idle", || async { ebb.handle.activity(BRANCH).busy == 0 }).await;
    ebb.suspend().await.unwrap_err();
    changed.batch_execute("SET TimeZone = 'Asia/Tokyo'").await.unwrap();

    ebb.world.stop("KILL");
    ebb.handle.lost(BRANCH, u64::MAX);
    until("two are ended", || async { changed.is_closed() && pinned.is_closed() }).await;
    until("two are kept", || async { ebb.states() == [SessionState::Hibernated, SessionState::Hibernated] }).await;
    assert_eq!(value(&untouched, "SELECT 1").await, "1");
    assert_eq!(value(&resumed, "SHOW TimeZone").await, "Asia/Tokyo");
    // And again, for one that was given its state back and has sent nothing since.
    ebb.suspend_when_idle().await;
    assert_eq!(value(&untouched, "SELECT 1").await, "1");
    ebb.world.stop("KILL");
    until("who spoke is ended", || async { untouched.is_closed() }).await;
    assert_eq!(value(&resumed, "SHOW TimeZone").await, "Asia/Tokyo");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_long_is_told_unless_it_does_not_want_to_be() {
    let ebb = Ebb::asleep().await;
    *ebb.world.delay.lock().unwrap() = Duration::from_millis(1300);
    let said =
        ebb.psql(&format!("options='endpoint={ENDPOINT}'"), "DO $$ BEGIN RAISE 'loud'; END $$").await.unwrap_err();
    assert!(said.contains("NOTICE:  waiting for the compute to wake"), "{said}");
    let mut client = crate::raw::Session::open_with(&ebb, &format!("endpoint={ENDPOINT} -c ebb.notice=off")).await;
    ebb.suspend_when_idle().await;
    client.exchange(&[(b'Q', b"SELECT 1\0")], b"TDCZ").await;
    assert_eq!(ebb.wakes(), 2);
    let mut client = crate::raw::Session::open(&ebb).await;
    ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::End).await.unwrap();
    client.write(&[(b'Q', b"SELECT 1\0")]).await;
    let (tag, notice) = client.read().await;
    assert_eq!(tag, b'N');
    assert!(notice.windows(18).any(|bytes| bytes == b"branch's operation"));
    ebb.handle.release(BRANCH);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wake_is_tried_again_only_where_that_may_help() {
    let ebb = Ebb::with(|config| config.wake_budget = Duration::from_secs(20)).await;
    let fail = |sqlstate| {
        OnWake::Fail(EndpointError {
            sqlstate,
            message: "no room in the node's memory".to_owned(),
            detail: None,
            hint: Some("Try again in a minute.".to_owned()),
        })
    };
    *ebb.world.on_wake.lock().unwrap() = fail(SqlState::CANNOT_CONNECT_NOW);
    let config = ebb.config();
    let waiting = tokio::spawn(async move { crate::harness::connect(&config).await });
    until("it was tried again", || async { ebb.wakes() >= 2 }).await;
    *ebb.world.on_wake.lock().unwrap() = OnWake::Start;
    let client = waiting.await.unwrap().unwrap();

    // What trying again does not change is told at once, in its own words.
    ebb.suspend_when_idle().await;
    let wakes = ebb.wakes();
    *ebb.world.on_wake.lock().unwrap() = fail(SqlState::OUT_OF_MEMORY);
    let error = client.batch_execute("SELECT 1").await.unwrap_err();
    assert_eq!((code(&error), ebb.wakes()), ("53200", wakes + 1));
    assert_eq!(error.as_db_error().unwrap().hint(), Some("Try again in a minute."));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_budget_is_spent_the_last_refusal_is_what_is_told() {
    let ebb = Ebb::with(|config| config.wake_budget = Duration::from_millis(400)).await;
    *ebb.world.on_wake.lock().unwrap() = OnWake::Fail(EndpointError {
        sqlstate: SqlState::CANNOT_CONNECT_NOW,
        message: "the bucket does not answer".to_owned(),
        detail: None,
        hint: None,
    });
    let error = crate::harness::connect(&ebb.config()).await.unwrap_err();
    assert_eq!((code(&error), error.as_db_error().unwrap().message()), ("57P03", "the bucket does not answer"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_user_is_given_back_and_can_be_reset() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    ebb.world.superuser().await.unwrap().batch_execute("ALTER ROLE app SUPERUSER").await.unwrap();
    let client = {
        drop(client);
        ebb.connect().await
    };
    client.batch_execute("SET SESSION AUTHORIZATION reader; SET TimeZone = 'Asia/Tokyo'").await.unwrap();
    for _ in 0..2 {
        ebb.suspend_when_idle().await;
        assert_eq!(value(&client, "SELECT session_user || ' ' || current_user").await, "reader reader");
        assert_eq!(value(&client, "SHOW TimeZone").await, "Asia/Tokyo");
    }
    client.batch_execute("RESET SESSION AUTHORIZATION").await.unwrap();
    assert_eq!(value(&client, "SELECT session_user || ' ' || current_user").await, "app app");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_its_leave_while_the_gate_moves_is_told_nothing() {
    let ebb = Ebb::asleep().await;
    for _ in 0..100 {
        let mut client = crate::raw::Session::open(&ebb).await;
        let fence = ebb.handle.fence(BRANCH, PATIENCE, Unreplayable::Refuse);
        let leave = client.send(b"X\0\0\0\x04");
        let (fenced, ()) = tokio::join!(fence, leave);
        if fenced.is_ok() {
            ebb.handle.release(BRANCH);
        }
        assert_eq!(client.read_to_end().await, b"");
    }
}
