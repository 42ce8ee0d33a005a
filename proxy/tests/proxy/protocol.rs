//! Versions, encryption and start-up parameters: what is agreed on before the first query.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::connect::tls_config;
use crate::harness::{ENDPOINT, Ebb, until};
use crate::raw::{self, packet};
use crate::wire::{Wire, connect, query, startup};

const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;

/// A TLS handshake at once, offering these protocols.
async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    ebb: &Ebb,
    stream: S,
    alpn: &[&str],
    host: &str,
) -> std::io::Result<TlsStream<S>> {
    let mut config = tls_config(ebb);
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(host.to_owned()).unwrap(), stream).await
}

/// Asks for TLS first.
async fn asked(ebb: &Ebb) -> TcpStream {
    let mut stream = connect(ebb).await;
    stream.write_all(&packet(SSL_REQUEST, b"")).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'S');
    stream
}

async fn rest(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut rest = Vec::new();
    // How it ends, in order or by a reset, does not matter here.
    let _ = stream.read_to_end(&mut rest).await;
    rest
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_are_agreed_on_and_cancel_keys_are_as_long_as_they_allow() {
    let ebb = Ebb::asleep().await;
    let told = |minor: u8, options: &[&str]| {
        let count = (options.len() as u32).to_be_bytes();
        let names: Vec<u8> = options.iter().flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect();
        Some([&[0, 3, 0, minor][..], &count, &names].concat())
    };
    for (minor, options, negotiated, key_length) in [
        (0, &[][..], None, 8),
        (1, &[], None, 8),
        (2, &[], None, 36),
        (3, &[], told(2, &[]), 36),
        (9999, &["_pq_.grease"], told(2, &["_pq_.grease"]), 36),
        (2, &["_pq_.a", "_pq_.b"], told(2, &["_pq_.a", "_pq_.b"]), 36),
        (0, &["_pq_.a"], told(0, &["_pq_.a"]), 8),
    ] {
        let parameters: Vec<_> = options.iter().map(|name| (*name, "1")).collect();
        let mut wire = Wire::start(connect(&ebb).await, &startup(minor, &parameters)).await;
        assert_eq!(wire.negotiated, negotiated, "for 3.{minor}");
        assert_eq!(wire.key.len(), key_length, "for 3.{minor}");
        assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
    }
    let old = raw::send(ebb.addr, &packet(2 << 16, b"user\0app\0\0")).await;
    assert_eq!((old[0], raw::code(&old)), (b'E', "0A000".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_agreed_on_is_told_before_the_password_is_asked_for() {
    let ebb = Ebb::asleep().await;
    let mut stream = connect(&ebb).await;
    stream.write_all(&startup(7, &[("_pq_.later", "on")])).await.unwrap();
    let mut answer = [0; 25];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"v\0\0\0\x17\0\x03\0\x02\0\0\0\x01_pq_.later\0R");
    assert_eq!(ebb.wakes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_begins_at_once_if_the_client_names_the_protocol() {
    let ebb = Ebb::asleep().await;
    let host = format!("{ENDPOINT}.localhost");
    let stream = handshake(&ebb, connect(&ebb).await, &["h2", "postgresql"], &host).await.unwrap();
    let packet = packet(3 << 16 | 2, b"user\0app\0database\0app\0\0");
    let mut wire = Wire::start(stream, &packet).await;
    assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
    assert_eq!(wire.stream.get_ref().1.alpn_protocol(), Some(&b"postgresql"[..]));

    // One that is encrypted has no more to ask for.
    let mut stream = handshake(&ebb, connect(&ebb).await, &["postgresql"], &host).await.unwrap();
    stream.write_all(&raw::packet(SSL_REQUEST, b"")).await.unwrap();
    assert_eq!(raw::code(&rest(stream).await), "08P01");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_records_are_no_longer_than_libpq_reads_at_once() {
    let ebb = Ebb::asleep().await;
    // Between client and proxy: tells how long the records are that go to the client.
    let (near, far) = tokio::io::duplex(1 << 16);
    let (mut from_client, mut to_client) = tokio::io::split(far);
    let (mut from_proxy, mut to_proxy) = connect(&ebb).await.into_split();
    let longest = Arc::new(AtomicUsize::new(0));
    let seen = longest.clone();
    tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_proxy).await });
    tokio::spawn(async move {
        let mut record = vec![0; 5];
        while from_proxy.read_exact(&mut record[..5]).await.is_ok() {
            let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
            record.resize(5 + length, 0);
            from_proxy.read_exact(&mut record[5..]).await.unwrap();
            seen.fetch_max(length, Ordering::SeqCst);
            to_client.write_all(&record).await.unwrap();
        }
    });
    let host = format!("{ENDPOINT}.localhost");
    let stream = handshake(&ebb, near, &["postgresql"], &host).await.unwrap();
    let mut wire = Wire::start(stream, &startup(0, &[])).await;
    assert_eq!(wire.ask(&query("SELECT repeat('x', 1000000)")).await.0, "TDCZ");
    // With a tag, the kind of record and what pads it; and no shorter than they need be.
    let longest = longest.load(Ordering::SeqCst);
    assert!((8192..8192 + 32).contains(&longest), "{longest} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn direct_tls_without_the_protocols_name_is_refused() {
    let ebb = Ebb::asleep().await;
    let mut stream = handshake(&ebb, connect(&ebb).await, &[], "localhost").await.unwrap();
    let _ = stream.write_all(&startup(0, &[])).await;
    assert_eq!(rest(stream).await, b"", "as Postgres 17 does, without a word");
    let error = handshake(&ebb, connect(&ebb).await, &["h2", "http/1.1"], "localhost").await.unwrap_err();
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");

    // Who has asked for TLS in Postgres' own way has named the protocol by that; but must not name another.
    let stream = handshake(&ebb, asked(&ebb).await, &[], "localhost").await.unwrap();
    Wire::start(stream, &startup(0, &[])).await;
    let stream = handshake(&ebb, asked(&ebb).await, &["postgresql"], "localhost").await.unwrap();
    Wire::start(stream, &startup(0, &[])).await;
    assert!(handshake(&ebb, asked(&ebb).await, &["http/1.1"], "localhost").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn gss_is_refused_and_tls_or_none_may_follow() {
    let ebb = Ebb::asleep().await;
    let refused = async || {
        let mut stream = connect(&ebb).await;
        stream.write_all(&packet(GSS_REQUEST, b"")).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'N');
        stream
    };
    Wire::start(refused().await, &startup(0, &[])).await;

    let mut stream = refused().await;
    stream.write_all(&packet(SSL_REQUEST, b"")).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'S');
    let stream = handshake(&ebb, stream, &[], "localhost").await.unwrap();
    Wire::start(stream, &startup(0, &[])).await;

    // Twice, after TLS, or within: refused.
    let mut stream = refused().await;
    stream.write_all(&packet(GSS_REQUEST, b"")).await.unwrap();
    assert_eq!(raw::code(&rest(stream).await), "08P01");
    for request in [SSL_REQUEST, GSS_REQUEST] {
        let mut stream = handshake(&ebb, asked(&ebb).await, &[], "localhost").await.unwrap();
        stream.write_all(&packet(request, b"")).await.unwrap();
        assert_eq!(raw::code(&rest(stream).await), "08P01");
    }
    // libpq tries it of itself where it has a ticket, and goes on.
    let said = ebb.psql(&format!("gssencmode=prefer options=endpoint={ENDPOINT}"), "SELECT 1").await;
    assert_eq!(said.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_smuggled_in_before_the_handshake_are_never_taken_for_encrypted_ones() {
    let ebb = Ebb::asleep().await;
    // What someone in the middle might put behind the client's request (CVE-2021-23214).
    for smuggled in
        [startup(0, &[]), packet(SSL_REQUEST, b""), query("DROP TABLE t"), vec![0x16, 3, 1, 0, 4, 9, 9, 9, 9]]
    {
        let mut stream = connect(&ebb).await;
        stream.write_all(&[packet(SSL_REQUEST, b""), smuggled].concat()).await.unwrap();
        let rest = rest(stream).await;
        // The letter, and at most an alert of TLS.
        assert_eq!(rest[0], b'S');
        assert!(rest.len() == 1 || rest[1] == 0x15, "answered: {rest:?}");
    }
    // A request that has something within itself.
    let odd = [&[0, 0, 0, 9][..], &SSL_REQUEST.to_be_bytes(), b"x"].concat();
    assert_eq!(raw::code(&raw::send(ebb.addr, &odd).await), "08P01");
    assert_eq!(ebb.wakes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_may_come_byte_by_byte() {
    let ebb = Ebb::asleep().await;
    for size in [1, 2, 3, 5] {
        let mut stream = connect(&ebb).await;
        for (request, expect) in [(GSS_REQUEST, b'N'), (SSL_REQUEST, b'S')] {
            for piece in packet(request, b"").chunks(size) {
                stream.write_all(piece).await.unwrap();
            }
            assert_eq!(stream.read_u8().await.unwrap(), expect);
        }
        let stream = handshake(&ebb, stream, &[], "localhost").await.unwrap();
        let mut wire = Wire::start_in_pieces(stream, &startup(2, &[("_pq_.x", "")]), size).await;
        assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn start_up_parameters_reach_postgres_and_stay_what_reset_returns_to() {
    let ebb = Ebb::asleep().await;
    let route = format!("-c lock_timeout=7s endpoint={ENDPOINT} -c work_mem=5MB");
    let given = [
        ("application_name", "billing"),
        ("client_encoding", "LATIN1"),
        ("DateStyle", "German, DMY"),
        ("search_path", "\"a b\",\"C\""),
        ("my.own", "thing"),
        ("options", &*route),
    ];
    let mut wire = Wire::start(connect(&ebb).await, &startup(0, &given)).await;
    assert!(wire.parameters.contains(&("application_name".to_owned(), "billing".to_owned())));
    assert!(wire.parameters.contains(&("DateStyle".to_owned(), "German, DMY".to_owned())));
    let shown = query(
        "SELECT concat_ws('|', current_setting('application_name'), current_setting('client_encoding'), \
         current_setting('datestyle'), current_setting('search_path'), current_setting('my.own'), \
         current_setting('lock_timeout'), current_setting('work_mem'), (SELECT application_name FROM pg_stat_activity \
         WHERE pid = pg_backend_pid()))",
    );
    let expect = "billing|LATIN1|German, DMY|\"a b\",\"C\"|thing|7s|5MB|billing";
    let text = |bodies: Vec<u8>| String::from_utf8_lossy(&bodies).into_owned();
    assert!(text(wire.ask(&shown).await.1).contains(expect));
    // Changed, put away, given back, and reset.
    wire.ask(&query("SET application_name = 'other'; SET lock_timeout = '1s'; SET my.own = 'changed'")).await;
    ebb.suspend_when_idle().await;
    let (tags, bodies) = wire.ask(&shown).await;
    assert_eq!(tags, "TDCZ", "of parameters, the client is told only what is news");
    assert!(text(bodies).contains("other|LATIN1|German, DMY|\"a b\",\"C\"|changed|1s|5MB|other"));
    wire.ask(&query("RESET ALL")).await;
    assert!(text(wire.ask(&shown).await.1).contains(expect));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_thinks_of_a_parameter_is_told_in_its_own_words() {
    let ebb = Ebb::asleep().await;
    for (name, value, code) in [("no_such_setting", "1", "42704"), ("work_mem", "much", "22023")] {
        let error = Wire::try_start(connect(&ebb).await, &startup(0, &[(name, value)]), usize::MAX).await.unwrap_err();
        assert_eq!(raw::code(&error), code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_says_nothing_at_all_is_let_go() {
    let ebb = Ebb::asleep().await;
    let stream = connect(&ebb).await;
    drop(stream);
    let mut wire = Wire::open(&ebb).await;
    assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
    drop(wire);
    until("its session has left", || async { ebb.states().is_empty() }).await;
}
