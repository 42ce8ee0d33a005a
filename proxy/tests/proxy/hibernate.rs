//! Sessions that outlive their backends.

use ebb_proxy::SessionState;
use tokio_postgres::types::Type;

use crate::harness::{BRANCH, ENDPOINT, Ebb, OnWake, PASSWORD, code, until, value};

#[tokio::test(flavor = "multi_thread")]
async fn settings_role_and_statements_outlive_three_suspends() {
    let ebb = Ebb::asleep().await;
    let mut config = ebb.config();
    config.options(format!("-c lock_timeout=7s endpoint={ENDPOINT}"));
    let client = crate::harness::connect(&config).await.unwrap();
    client
        .batch_execute(
            "CREATE TABLE t (a int, b text); INSERT INTO t VALUES (1, 'one');
             GRANT SELECT ON t TO reader;
             CREATE FUNCTION be(who text) RETURNS text LANGUAGE plpgsql AS
               $$ BEGIN RETURN set_config('app.quiet', who, false); END $$;",
        )
        .await
        .unwrap();
    for sql in [
        "SET statement_timeout = '9s'",
        "SET TimeZone = 'Asia/Tokyo'",
        "SET search_path = public, \"my schema\"",
        "SET myapp.user_id = 'o''neil, ünï'",
        "SET lock_timeout = '3s'",
        "SELECT be('hushed')",
        "SET ROLE reader",
        "/* mine */ PREPARE by_sql (int) AS SELECT b FROM t WHERE a = $1;",
    ] {
        client.batch_execute(sql).await.unwrap();
    }
    let statement = client.prepare_typed("SELECT b, $2 FROM t WHERE a = $1", &[Type::INT4, Type::TEXT]).await.unwrap();
    let mut backends = vec![value(&client, "SELECT pg_backend_pid()").await];
    for round in 1..=3 {
        ebb.suspend_when_idle().await;
        assert!(!ebb.world.is_running());
        assert_eq!(ebb.states(), [SessionState::Hibernated]);

        let row = client.query_one(&statement, &[&1, &"two"]).await.unwrap();
        assert_eq!((row.get(0), row.get(1)), ("one", "two"));
        assert_eq!(ebb.wakes(), round + 1);
        for (sql, expect) in [
            ("EXECUTE by_sql(1)", "one"),
            ("SHOW statement_timeout", "9s"),
            ("SHOW TimeZone", "Asia/Tokyo"),
            ("SHOW search_path", "public, \"my schema\""),
            ("SHOW myapp.user_id", "o'neil, ünï"),
            ("SHOW app.quiet", "hushed"),
            ("SHOW lock_timeout", "3s"),
            ("SELECT current_user::text", "reader"),
            ("SELECT session_user::text", "app"),
            ("SELECT source FROM pg_settings WHERE name = 'lock_timeout'", "session"),
        ] {
            assert_eq!(value(&client, sql).await, expect, "{sql} in round {round}");
        }
        backends.push(value(&client, "SELECT pg_backend_pid()").await);
    }
    backends.dedup();
    assert_eq!(backends.len(), 4, "each round had its own backend: {backends:?}");
    // What the start-up packet set is what RESET goes back to.
    client.batch_execute("RESET lock_timeout").await.unwrap();
    assert_eq!(value(&client, "SHOW lock_timeout").await, "7s");
    ebb.suspend_when_idle().await;
    assert_eq!(value(&client, "SHOW lock_timeout").await, "7s");
    assert_eq!(value(&client, "SELECT source FROM pg_settings WHERE name = 'lock_timeout'").await, "client");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_encodings_and_hostile_search_paths_survive() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    for sql in [
        "CREATE SCHEMA evil",
        "CREATE FUNCTION evil.lies(text, text) RETURNS bool LANGUAGE sql AS 'SELECT false'",
        "CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.lies)",
        "CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE sql AS $$SELECT 'lie'$$",
        "CREATE VIEW evil.pg_settings AS SELECT 'a'::text AS name, 'b'::text AS source, 'c'::text AS context",
        "SET search_path = evil, pg_catalog",
        "SET standard_conforming_strings = off",
        "SET default_transaction_read_only = on",
    ] {
        client.batch_execute(sql).await.unwrap();
    }
    for _ in 0..2 {
        ebb.suspend_when_idle().await;
        assert_eq!(value(&client, "SHOW search_path").await, "evil, pg_catalog");
        assert_eq!(value(&client, "SHOW standard_conforming_strings").await, "off");
        assert_eq!(value(&client, "SHOW default_transaction_read_only").await, "on");
    }
    // The driver reads UTF-8 only; ASCII is the same in both, and the server tells which it sends.
    let latin = ebb.connect().await;
    latin.batch_execute("SET client_encoding = 'LATIN1'").await.unwrap();
    latin.batch_execute("PREPARE p AS SELECT convert_to('x', 'UTF8')").await.unwrap();
    ebb.suspend_when_idle().await;
    assert_eq!(value(&latin, "SHOW client_encoding").await, "LATIN1");
    latin.batch_execute("EXECUTE p").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_given_back_keeps_the_compute_awake_and_is_named() {
    let ebb = Ebb::asleep().await;
    for (sql, reason, undo) in [
        ("CREATE TEMP TABLE x (a int)", "temporary table", "DROP TABLE x"),
        ("SELECT pg_advisory_lock(7)", "advisory lock", "SELECT pg_advisory_unlock(7)"),
        ("LISTEN news", "LISTEN", "UNLISTEN *"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "holdable cursor", "CLOSE c"),
        (
            "SET statement_timeout = 0; PREPARE p AS SELECT 1",
            "prepared statement \"p\" made together with other commands",
            "DEALLOCATE p",
        ),
    ] {
        let (client, innocent) = (ebb.connect().await, ebb.connect().await);
        client.batch_execute(sql).await.unwrap();
        innocent.batch_execute("SELECT 1").await.unwrap();
        until("all but it are idle", || async { ebb.handle.activity(BRANCH).busy == 0 }).await;
        let blocked = ebb.suspend().await.unwrap_err().0;
        let expect = SessionState::Pinned { reason: reason.to_owned() };
        assert_eq!(blocked.iter().map(|session| &session.state).collect::<Vec<_>>(), [&expect], "for {sql}");
        assert_eq!(ebb.states().iter().filter(|state| **state == expect).count(), 1);
        assert!(ebb.world.is_running());
        // Both go on as if nothing had been, and without the obstacle they can be put away.
        innocent.batch_execute("SELECT 1").await.unwrap();
        client.batch_execute(undo).await.unwrap();
        ebb.suspend_when_idle().await;
        client.batch_execute("SELECT 1").await.unwrap();
        drop((client, innocent));
        until("both have left", || async { ebb.states().is_empty() }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_keeps_the_compute_awake() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    client.batch_execute("BEGIN").await.unwrap();
    let blocked = ebb.suspend().await.unwrap_err().0;
    assert_eq!(blocked.len(), 1);
    assert_eq!(blocked[0].state, SessionState::Active);
    client.batch_execute("COMMIT").await.unwrap();
    ebb.suspend_when_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unnamed_statement_is_given_back() {
    let ebb = Ebb::asleep().await;
    let mut client = crate::raw::Session::open(&ebb).await;
    // As some drivers do: parse and describe in one round trip, bind and execute in the next.
    client.exchange(&[(b'P', b"\0SELECT 'kept'\0\0\0"), (b'S', b"")], b"1Z").await;
    ebb.suspend_when_idle().await;
    let run: [(u8, &[u8]); 3] = [(b'B', b"\0\0\0\0\0\0\0\0"), (b'E', b"\0\0\0\0\0"), (b'S', b"")];
    let answers = client.exchange(&run, b"2DCZ").await;
    assert!(answers.windows(4).any(|bytes| bytes == b"kept"));
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_sessions_are_put_away_like_others() {
    let ebb = Ebb::asleep().await;
    let mut tls = tokio_postgres::Config::new();
    tls.host("localhost").hostaddr(ebb.addr.ip()).port(ebb.addr.port()).user("app").password(PASSWORD).dbname("app");
    tls.options(format!("endpoint={ENDPOINT}"));
    let client = crate::connect::connect_tls(&ebb, &mut tls).await.unwrap();
    client.batch_execute("SET TimeZone = 'Asia/Tokyo'").await.unwrap();
    for _ in 0..2 {
        ebb.suspend_when_idle().await;
        assert_eq!(value(&client, "SHOW TimeZone").await, "Asia/Tokyo");
        let long = value(&client, "SELECT repeat('x', 5000000)").await;
        assert_eq!(long.len(), 5_000_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_while_hibernated_wakes_nothing() {
    let ebb = Ebb::asleep().await;
    let polite = ebb.connect().await;
    let mut abrupt = crate::raw::Session::open(&ebb).await;
    abrupt.exchange(&[(b'Q', b"SELECT 1\0")], b"TDCZ").await;
    polite.batch_execute("SELECT 1").await.unwrap();
    ebb.suspend_when_idle().await;
    let wakes = ebb.wakes();
    drop(polite);
    drop(abrupt);
    until("both have left", || async { ebb.states().is_empty() }).await;
    assert_eq!(ebb.wakes(), wakes);
    assert!(!ebb.world.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_no_longer_fits_is_missed_only_when_used() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    client.batch_execute("CREATE TABLE t (a int)").await.unwrap();
    let gone = client.prepare("SELECT a FROM t").await.unwrap();
    let stays = client.prepare("SELECT 'here'").await.unwrap();
    // Other data behind the same endpoint, as after a restore.
    ebb.handle.fence(BRANCH, crate::harness::PATIENCE, ebb_proxy::Unreplayable::End).await.unwrap();
    ebb.world.superuser().await.unwrap().batch_execute("DROP TABLE t").await.unwrap();
    ebb.world.stop("INT");
    ebb.handle.release(BRANCH);
    assert_eq!(client.query_one(&stays, &[]).await.unwrap().get::<_, &str>(0), "here");
    assert_eq!(code(&client.query(&gone, &[]).await.unwrap_err()), "26000");
    client.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_are_refused_end_the_session_with_the_reason() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    client.batch_execute("SET ROLE reader").await.unwrap();
    ebb.handle.fence(BRANCH, crate::harness::PATIENCE, ebb_proxy::Unreplayable::End).await.unwrap();
    ebb.world.superuser().await.unwrap().batch_execute("REVOKE reader FROM app").await.unwrap();
    ebb.handle.release(BRANCH);
    let error = client.batch_execute("SELECT 1").await.unwrap_err();
    assert_eq!(code(&error), "08006");
    assert!(error.as_db_error().unwrap().detail().unwrap().contains("reader"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wake_that_fails_ends_a_hibernated_session_with_its_reason() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    ebb.suspend_when_idle().await;
    *ebb.world.on_wake.lock().unwrap() = OnWake::Fail(ebb_proxy::EndpointError {
        sqlstate: ebb_types::SqlState::OBJECT_IN_USE,
        message: "branch is being restored".to_owned(),
        detail: None,
        hint: None,
    });
    assert_eq!(code(&client.batch_execute("SELECT 1").await.unwrap_err()), "55006");
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_changed_meanwhile_are_told() {
    let ebb = Ebb::asleep().await;
    let mut client = crate::raw::Session::open(&ebb).await;
    client.exchange(&[(b'Q', b"SET TimeZone = 'UTC'\0")], b"CSZ").await;
    ebb.suspend_when_idle().await;
    // Nothing changed: the answer comes without a preface.
    client.exchange(&[(b'Q', b"SELECT 1\0")], b"TDCZ").await;
    client.exchange(&[(b'Q', b"RESET TimeZone\0")], b"CSZ").await;
    ebb.suspend_when_idle().await;
    let conf = ebb.world.data().join("postgresql.auto.conf");
    std::fs::write(conf, "TimeZone = 'Asia/Tokyo'\n").unwrap();
    let answers = client.exchange(&[(b'Q', b"SELECT 1\0")], b"STDCZ").await;
    assert!(answers.windows(10).any(|bytes| bytes == b"Asia/Tokyo"));
}
