//! Routes, encryption, authentication, and the one wake they may end in.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ebb_proxy::EndpointError;
use ebb_types::SqlState;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::harness::{BRANCH, ENDPOINT, Ebb, OnWake, PASSWORD, VISIT, code, connect, until, value};
use crate::raw;

const GSS_REQUEST: u32 = 80_877_104;

/// A client's TLS that trusts the proxy and nobody else.
pub fn tls_config(ebb: &Ebb) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&ebb.ca_pem).unwrap()).unwrap();
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

pub fn tls(ebb: &Ebb) -> MakeRustlsConnect {
    MakeRustlsConnect::new(tls_config(ebb))
}

/// Connects with TLS and nothing less.
pub async fn connect_tls(ebb: &Ebb, config: &mut Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.ssl_mode(SslMode::Require).connect(tls(ebb)).await?;
    tokio::spawn(connection);
    Ok(client)
}

#[tokio::test(flavor = "multi_thread")]
async fn three_routes_lead_to_the_same_endpoint() {
    let ebb = Ebb::asleep().await;
    let by_options = ebb.connect().await;
    assert_eq!(value(&by_options, "SELECT current_database()::text").await, "app");

    let mut config = ebb.config();
    config.options("-c statement_timeout=5s endpoint=prod--shop -c lock_timeout=7s");
    let with_others = connect(&config).await.unwrap();
    assert_eq!(value(&with_others, "SHOW statement_timeout").await, "5s");
    assert_eq!(value(&with_others, "SHOW lock_timeout").await, "7s");

    let mut config = ebb.config();
    config.options("").dbname(format!("postgres@{ENDPOINT}"));
    let by_database = connect(&config).await.unwrap();
    assert_eq!(value(&by_database, "SELECT current_database()::text").await, "postgres");

    let mut config = Config::new();
    let host = format!("{ENDPOINT}.localhost");
    config.host(&host).hostaddr(ebb.addr.ip()).port(ebb.addr.port()).user("app").password(PASSWORD).dbname("app");
    let by_host = connect_tls(&ebb, &mut config).await.unwrap();
    assert_eq!(value(&by_host, "SELECT current_user::text").await, "app");
    assert_eq!(ebb.world.overlaps.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_database_gets_the_endpoints_default() {
    let ebb = Ebb::asleep().await;
    let mut config = Config::new();
    config.host("127.0.0.1").port(ebb.addr.port()).user("app").password(PASSWORD);
    config.options(format!("endpoint={ENDPOINT}"));
    let client = connect(&config).await.unwrap();
    assert_eq!(value(&client, "SELECT current_database()::text").await, "app");
}

#[tokio::test(flavor = "multi_thread")]
async fn libpq_verifies_the_certificate_and_binds_the_channel() {
    let ebb = Ebb::asleep().await;
    let name = format!("sslmode=verify-full options=endpoint={ENDPOINT}");
    let sql = "SELECT current_user";
    assert_eq!(ebb.psql(&format!("host=localhost channel_binding=require {name}"), sql).await.unwrap(), "app");
    let by_host = format!("host={ENDPOINT}.localhost sslmode=verify-full channel_binding=require");
    assert_eq!(ebb.psql(&by_host, sql).await.unwrap(), "app");
    assert_eq!(
        ebb.psql(&format!("host=localhost sslmode=disable options=endpoint={ENDPOINT}"), sql).await.unwrap(),
        "app"
    );
    let wrong_host = ebb.psql(&format!("host=example.org {name}"), sql).await.unwrap_err();
    assert!(wrong_host.contains("does not match host name"), "{wrong_host}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_leads_nowhere_is_told_how_to_get_somewhere() {
    let ebb = Ebb::asleep().await;
    let mut config = ebb.config();
    config.options("endpoint=prdo--shop");
    let error = connect(&config).await.err().unwrap();
    assert_eq!(code(&error), "3D000");
    assert_eq!(error.as_db_error().unwrap().hint(), Some("Did you mean prod--shop?"));

    config.options("");
    let error = connect(&config).await.err().unwrap();
    assert_eq!(code(&error), "28000");
    assert!(error.as_db_error().unwrap().hint().unwrap().contains("BRANCH--PROJECT"));

    config.options("endpoint=shop");
    assert_eq!(code(&connect(&config).await.err().unwrap()), "3D000");
    assert_eq!(ebb.wakes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_and_an_unknown_role_look_alike_and_wake_nothing() {
    let ebb = Ebb::asleep().await;
    let mut seen = Vec::new();
    for (user, password) in [("app", "wrong"), ("nobody", PASSWORD), ("postgres", ""), ("postgres", "x")] {
        let mut config = ebb.config();
        config.user(user).password(password);
        let error = connect(&config).await.err().unwrap();
        let error = error.as_db_error().unwrap();
        let said = error.message().replace(user, "USER");
        seen.push((error.code().code().to_owned(), error.severity().to_owned(), said, error.hint().map(str::to_owned)));
    }
    let expect = "password authentication failed for user \"USER\"".to_owned();
    assert_eq!((&*seen[0].0, &*seen[0].1, &seen[0].2), ("28P01", "FATAL", &expect));
    assert!(seen[0].3.as_ref().is_some_and(|hint| hint.contains("md5")), "the hint is the same for all: {seen:?}");
    assert!(seen.iter().all(|said| *said == seen[0]), "{seen:?}");
    assert_eq!(ebb.wakes(), 0);
    assert!(!ebb.world.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_at_once_make_one_wake() {
    let ebb = Ebb::asleep().await;
    *ebb.world.delay.lock().unwrap() = Duration::from_millis(100);
    let config = ebb.config();
    let clients: Vec<_> = (0..200)
        .map(|i| {
            let config = config.clone();
            tokio::spawn(async move {
                let client = connect(&config).await.unwrap();
                let row = client.query_one("SELECT $1::int4", &[&i]).await.unwrap();
                assert_eq!(row.get::<_, i32>(0), i);
                client
            })
        })
        .collect();
    let mut held = Vec::new();
    for client in clients {
        held.push(client.await.unwrap());
    }
    assert_eq!(ebb.wakes(), 1);
    assert_eq!(ebb.states().len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wake_that_fails_is_told_as_it_is() {
    let ebb = Ebb::asleep().await;
    let told = EndpointError {
        sqlstate: SqlState::DISK_FULL,
        message: "the disk is too full to wake".to_owned(),
        detail: Some("There are 3 MB left.".to_owned()),
        hint: Some("Free some space.".to_owned()),
    };
    *ebb.world.on_wake.lock().unwrap() = OnWake::Fail(told);
    let error = connect(&ebb.config()).await.err().unwrap();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "53100");
    assert_eq!(error.severity(), "FATAL");
    assert_eq!(error.message(), "the disk is too full to wake");
    assert_eq!(error.detail(), Some("There are 3 MB left."));
    assert_eq!(error.hint(), Some("Free some space."));

    *ebb.world.on_wake.lock().unwrap() = OnWake::Start;
    ebb.connect().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wake_beyond_the_budget_ends_with_57p03_after_a_notice() {
    let ebb = Ebb::with(|config| config.wake_budget = Duration::from_millis(1500)).await;
    *ebb.world.on_wake.lock().unwrap() = OnWake::Hang;
    let said = ebb.psql(&format!("options=endpoint={ENDPOINT}"), "SELECT 1").await.unwrap_err();
    assert!(said.contains("NOTICE:  waiting for the compute to wake"), "{said}");
    assert!(said.contains("the compute is still waking"), "{said}");
    let error = connect(&ebb.config()).await.err().unwrap();
    assert_eq!(code(&error), "57P03");
    assert!(error.as_db_error().unwrap().hint().is_some());
    assert_eq!(ebb.wakes(), 1, "all who wait share one wake, even one that hangs");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_database_is_postgres_own_error() {
    let ebb = Ebb::asleep().await;
    let mut config = ebb.config();
    config.dbname("none");
    let error = connect(&config).await.err().unwrap();
    assert_eq!(code(&error), "3D000");
    assert_eq!(error.as_db_error().unwrap().message(), "database \"none\" does not exist");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_full_says_so() {
    let ebb = Ebb::with(|config| config.sessions_per_endpoint_max = 2).await;
    let _held = (ebb.connect().await, ebb.connect().await);
    let error = connect(&ebb.config()).await.err().unwrap();
    assert_eq!(code(&error), "53300");
    let detail = "This is the proxy's limit: 2 connections per endpoint, sleeping ones included.";
    assert_eq!(error.as_db_error().unwrap().detail(), Some(detail));
    drop(_held);
    until("a place is free again", || async { connect(&ebb.config()).await.is_ok() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_first_packets_are_answered_or_cut_but_wake_nothing() {
    let ebb = Ebb::with(|config| config.login_timeout = Duration::from_secs(2)).await;
    let startup = |version: u32| raw::packet(version, b"user\0app\0\0");
    for (bytes, expect) in [
        (raw::packet(2 << 16, b""), "0A000"),
        (startup(4 << 16), "0A000"),
        (raw::packet(3 << 16, b"user\0app"), "08P01"),
        (raw::packet(3 << 16, b"database\0app@prod--shop\0\0"), "28000"),
        (raw::packet(3 << 16, b"user\0app\0\0"), "28000"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "08P01"),
        (vec![0, 0, 0, 4], "08P01"),
        ([&[0, 0, 0x40, 0][..], &[0; 100]].concat(), "08P01"),
        // A password before any start-up.
        (b"p\0\0\0\x08abc\0".to_vec(), "08P01"),
    ] {
        assert_eq!(raw::code(&raw::send(ebb.addr, &bytes).await), expect, "for {bytes:?}");
    }
    // Half a packet, and nothing: cut when the time is over.
    assert_eq!(raw::send(ebb.addr, &[0, 0, 0]).await, b"");
    assert_eq!(raw::send(ebb.addr, b"").await, b"");
    // Encryption requests are answered by one letter.
    let two = [raw::packet(GSS_REQUEST, b""), raw::packet(3 << 16, b"\0")].concat();
    let answer = raw::send(ebb.addr, &two).await;
    assert_eq!((answer[0], &*raw::code(&answer)), (b'N', "28000"));
    // A query in place of a password.
    let route = raw::packet(3 << 16, b"user\0app\0options\0endpoint=prod--shop\0\0");
    let answer = raw::send(ebb.addr, &[&route[..], b"Q\0\0\0\x0dselect 1\0"].concat()).await;
    assert_eq!((answer[0], &*raw::code(&answer)), (b'R', "08P01"));
    assert_eq!(ebb.wakes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_requests_reach_the_backend_of_the_moment_plain_and_encrypted() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    ebb.suspend_when_idle().await;
    for encrypted in [false, true] {
        let token = client.cancel_token();
        let sleeping = client.batch_execute("SELECT pg_sleep(600)");
        tokio::pin!(sleeping);
        let cancelling = async {
            loop {
                // Before the query has begun, cancelling it does nothing.
                if encrypted {
                    token.cancel_query(tls(&ebb)).await.unwrap();
                } else {
                    token.cancel_query(NoTls).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let error = tokio::select! {
            result = &mut sleeping => result.unwrap_err(),
            () = cancelling => unreachable!("it never ends"),
        };
        assert_eq!(code(&error), "57014");
    }
    // A wrong secret cancels nobody, and is told nothing.
    assert_eq!(raw::send(ebb.addr, &raw::packet(80_877_102, &[0, 0, 0, 1, 0, 0, 0, 2])).await, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_leads_to_a_visit_once_the_client_has_proved_who_it_is() {
    let ebb = Ebb::asleep().await;
    let visits = || ebb.world.visits.load(Ordering::SeqCst);
    let mut config = ebb.config();
    config.options("endpoint=prod--shop point=v1").password("wrong");
    assert_eq!(code(&connect(&config).await.unwrap_err()), "28P01");
    assert_eq!((visits(), ebb.wakes()), (0, 0), "nothing was named, nothing woken");

    config.password(PASSWORD);
    let visitor = connect(&config).await.unwrap();
    assert_eq!(value(&visitor, "SELECT current_database()::text").await, "app");
    assert_eq!((ebb.handle.sessions(VISIT).len(), ebb.handle.sessions(BRANCH).len()), (1, 0));
    config.options("endpoint=prod--shop").dbname("app@v1");
    let second = connect(&config).await.unwrap();
    assert_eq!((ebb.handle.sessions(VISIT).len(), ebb.wakes()), (2, 1), "one visit for both");

    config.options("endpoint=prod--shop point=v7").dbname("app");
    let error = connect(&config).await.unwrap_err();
    assert_eq!(code(&error), "3D000");
    assert_eq!(error.as_db_error().and_then(|said| said.hint()), Some("Did you mean v1?"));

    // It is not forgotten while someone is connected.
    ebb.handle.forget(VISIT);
    assert_eq!(ebb.handle.sessions(VISIT).len(), 2);
    drop((visitor, second));
    until("they are gone", || async { ebb.handle.sessions(VISIT).is_empty() }).await;
    ebb.handle.forget(VISIT);
    assert!(ebb.handle.activity(VISIT).idle_for.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_could_not_log_in_then_is_not_let_in() {
    let ebb = Ebb::asleep().await;
    ebb.world.nobody_then.store(true, Ordering::SeqCst);
    let mut config = ebb.config();
    config.options("endpoint=prod--shop point=v1");
    assert_eq!(code(&connect(&config).await.unwrap_err()), "28000");
    ebb.connect().await;
}
