//! Who gets in, and what those hear who do not.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use ebb_proxy::GivenFiles;
use ebb_types::{AllowList, parse_network};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::connect::{connect_tls, tls_config};
use crate::harness::{BRANCH, ENDPOINT, Ebb, PASSWORD, code, connect, until};
use crate::raw;

/// The header of version 2 by which a load balancer tells of a client, or of itself.
pub fn header(client: Option<SocketAddr>) -> Vec<u8> {
    let mut out = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    match client {
        None => out.extend_from_slice(&[0x20, 0, 0, 0]),
        Some(SocketAddr::V4(client)) => {
            out.extend_from_slice(&[0x21, 0x11, 0, 12]);
            out.extend_from_slice(&client.ip().octets());
            out.extend_from_slice(&[127, 0, 0, 1]);
            out.extend_from_slice(&client.port().to_be_bytes());
            out.extend_from_slice(&5432_u16.to_be_bytes());
        }
        Some(SocketAddr::V6(client)) => {
            out.extend_from_slice(&[0x21, 0x21, 0, 36]);
            out.extend_from_slice(&client.ip().octets());
            out.extend_from_slice(&[0; 16]);
            out.extend_from_slice(&client.port().to_be_bytes());
            out.extend_from_slice(&5432_u16.to_be_bytes());
        }
    }
    out
}

/// A load balancer on loopback: begins every connection to the proxy with these bytes.
async fn balancer(to: SocketAddr, first: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let first = first.clone();
            tokio::spawn(async move {
                let mut proxy = TcpStream::connect(to).await.unwrap();
                let _ = proxy.write_all(&first).await;
                let _ = tokio::io::copy_bidirectional(&mut client, &mut proxy).await;
            });
        }
    });
    addr
}

async fn behind_balancer() -> Ebb {
    Ebb::with(|config| config.proxy_protocol = vec![parse_network("127.0.0.1").unwrap()]).await
}

fn client(text: &str) -> Option<SocketAddr> {
    Some(text.parse().unwrap())
}

fn route() -> String {
    format!("options=endpoint={ENDPOINT}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_tells_for_whom_it_speaks() {
    let ebb = behind_balancer().await;
    for peer in ["192.0.2.7:4711", "[2001:db8::7]:4711"] {
        let through = balancer(ebb.addr, header(client(peer))).await;
        let mut config = tokio_postgres::Config::new();
        config.host("localhost").hostaddr(through.ip()).port(through.port()).user("app").password(PASSWORD);
        config.dbname("app").options(format!("endpoint={ENDPOINT}"));
        let held = connect_tls(&ebb, &mut config).await.unwrap();
        let peers: Vec<_> = ebb.handle.sessions(BRANCH).into_iter().map(|session| session.peer).collect();
        assert_eq!(peers, [peer]);
        drop(held);
        until("it is gone", || async { ebb.handle.sessions(BRANCH).is_empty() }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_behind_a_balancer_is_not_of_this_machine() {
    let ebb = behind_balancer().await;
    for peer in ["192.0.2.7:4711", "127.0.0.1:4711"] {
        let through = balancer(ebb.addr, header(client(peer))).await;
        let said = ebb.psql_at(through, &format!("host=localhost sslmode=disable {}", route()), "select 1").await;
        assert!(said.unwrap_err().contains("must be encrypted"));
    }
    // A health check of the balancer's own is what it is.
    let through = balancer(ebb.addr, header(None)).await;
    let said = ebb.psql_at(through, &format!("host=localhost sslmode=disable {}", route()), "select 1").await;
    assert_eq!(said.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_is_wanted_of_balancers_and_of_nobody_else() {
    let ebb = behind_balancer().await;
    let startup = raw::packet(3 << 16, b"user\0app\0\0");
    assert_eq!(raw::code(&raw::send(ebb.addr, &startup).await), "08P01");
    assert_eq!(raw::code(&raw::send(ebb.addr, b"PROXY TCP4 192.0.2.7 10.0.0.1 8080 5432\r\n").await), "08P01");
    // What follows the header is the client's, however the bytes arrive.
    let whole = [header(None), startup].concat();
    for at in [1, 12, 15, 16, 17, whole.len() - 1] {
        let mut socket = TcpStream::connect(ebb.addr).await.unwrap();
        socket.set_nodelay(true).unwrap();
        socket.write_all(&whole[..at]).await.unwrap();
        tokio::task::yield_now().await;
        socket.write_all(&whole[at..]).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        assert_eq!(raw::code(&answer), "28000", "split at {at}: no endpoint is named");
    }

    let plain = Ebb::asleep().await;
    let forged = [header(client("192.0.2.7:1")), raw::packet(3 << 16, b"user\0app\0\0")].concat();
    assert_eq!(raw::code(&raw::send(plain.addr, &forged).await), "08P01");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_not_allowed_is_refused_before_it_can_try_a_password() {
    let ebb = behind_balancer().await;
    *ebb.world.allowed.lock().unwrap() = AllowList::from(vec![parse_network("192.0.2.0/24").unwrap()]);
    let inside = balancer(ebb.addr, header(client("192.0.2.7:1"))).await;
    let outside = balancer(ebb.addr, header(client("198.51.100.7:1"))).await;
    let tls = format!("host=localhost sslmode=require {}", route());
    let mut heard = Vec::new();
    for user in ["app", "nobody"] {
        heard.push(ebb.psql_at(outside, &format!("{tls} user={user}"), "select 1").await.unwrap_err());
    }
    assert_eq!(heard[0], heard[1], "it does not tell whether the role exists");
    assert!(heard[0].contains("does not take connections from address 198.51.100.7"), "{}", heard[0]);
    assert_eq!(ebb.wakes(), 0);
    assert_eq!(ebb.psql_at(inside, &tls, "select 1").await.unwrap(), "1");
    // On the machine itself one is always let in.
    let local = balancer(ebb.addr, header(None)).await;
    assert_eq!(ebb.psql_at(local, &tls, "select 1").await.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_is_full_is_told_whose_limit_it_is() {
    let ebb = Ebb::with(|config| config.sessions_per_role_max = 1).await;
    let held = ebb.connect().await;
    ebb.suspend_when_idle().await;
    let error = connect(&ebb.config()).await.err().unwrap();
    assert_eq!(code(&error), "53300");
    let said = error.as_db_error().unwrap();
    assert_eq!(said.message(), "too many connections for role \"app\" at endpoint \"prod--shop\"");
    assert!(said.detail().unwrap().contains("the proxy's limit: 1 connections per role"), "{said:?}");
    drop(held);
    until("a place is free again", || async { connect(&ebb.config()).await.is_ok() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guesser_is_held_up_and_others_are_not() {
    let ebb = Ebb::with(|config| {
        config.proxy_protocol = vec![parse_network("127.0.0.1").unwrap()];
        config.rates.address_failures = "1/h,2".parse().unwrap();
    })
    .await;
    let guesser = balancer(ebb.addr, header(client("192.0.2.7:1"))).await;
    let other = balancer(ebb.addr, header(client("192.0.2.8:1"))).await;
    let tls = format!("host=localhost sslmode=require {}", route());
    for _ in 0..3 {
        let said = ebb.psql_at(guesser, &format!("{tls} password=wrong"), "select 1").await.unwrap_err();
        assert!(said.contains("password authentication failed"), "{said}");
    }
    let said = ebb.psql_at(guesser, &tls, "select 1").await.unwrap_err();
    assert!(said.contains("too many failed logins from this address"), "{said}");
    assert_eq!(ebb.psql_at(other, &tls, "select 1").await.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_comes_too_often_is_told_so_before_any_handshake() {
    let ebb = Ebb::with(|config| {
        config.proxy_protocol = vec![parse_network("127.0.0.1").unwrap()];
        config.rates.address = "1/h,1".parse().unwrap();
    })
    .await;
    let through = balancer(ebb.addr, header(client("192.0.2.7:1"))).await;
    let tls = format!("host=localhost sslmode=require {}", route());
    assert_eq!(ebb.psql_at(through, &tls, "select 1").await.unwrap(), "1");
    let answer = raw::send(ebb.addr, &header(client("192.0.2.7:2"))).await;
    assert_eq!(raw::code(&answer), "53300");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_was_told_of_no_channel_binding_is_cut_off() {
    let ebb = Ebb::asleep().await;
    // The certificate is looked at here; what is between would have its own.
    let mut stream = encrypted(&ebb).await;
    let body = format!("user\0app\0{}\0\0", route().replacen('=', "\0", 1));
    stream.write_all(&raw::packet(3 << 16, body.as_bytes())).await.unwrap();
    let (tag, offer) = read(&mut stream).await;
    assert_eq!((tag, &offer[4..]), (b'R', &b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"[..]));
    // "y": I could bind, but you cannot.
    let scram = ScramSha256::new(PASSWORD.as_bytes(), ChannelBinding::unrequested());
    assert!(scram.message().starts_with(b"y,,"));
    let body = [b"SCRAM-SHA-256\0", &(scram.message().len() as u32).to_be_bytes()[..], scram.message()].concat();
    stream.write_all(&[&b"p"[..], &(body.len() as u32 + 4).to_be_bytes(), &body].concat()).await.unwrap();
    let (tag, said) = read(&mut stream).await;
    assert_eq!((tag, &*raw::code(&said)), (b'E', "08P01"));
    assert_eq!(ebb.wakes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_role_has_one_salt_for_ever_and_what_is_no_scram_looks_like_it() {
    let ebb = Ebb::asleep().await;
    let dir = ebb.tls.path().to_owned();
    let first = [challenge(ebb.addr, "nobody").await, challenge(ebb.addr, "app").await];
    let mut config = ebb_proxy::ProxyConfig::new("127.0.0.1:0".parse().unwrap(), &dir);
    config.drain_deadline = std::time::Duration::ZERO;
    let again = ebb_proxy::Proxy::bind(config, ebb.world.clone()).unwrap();
    let addr = again.local_addr();
    let running = tokio::spawn(again.run(ebb.shutdown.clone()));
    let second = [challenge(addr, "nobody").await, challenge(addr, "app").await];
    assert_eq!(first, second, "a restart changes no salt");
    assert_ne!(first[0], challenge(addr, "somebody").await);
    assert_eq!(first[0].len(), first[1].len(), "{first:?}");

    *ebb.world.verifier.lock().unwrap() = Some("md5".to_owned());
    assert_eq!(challenge(addr, "app").await.len(), first[0].len());
    let error = connect(&ebb.config()).await.err().unwrap();
    assert_eq!(code(&error), "28P01");
    assert!(error.as_db_error().unwrap().hint().unwrap().contains("md5"));
    assert_eq!(ebb.world.wakes.load(Ordering::SeqCst), 0);
    running.abort();
}

/// The salt and iterations that a role is asked to prove its password with.
async fn challenge(addr: SocketAddr, role: &str) -> String {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    let body = format!("user\0{role}\0options\0endpoint={ENDPOINT}\0\0");
    socket.write_all(&raw::packet(3 << 16, body.as_bytes())).await.unwrap();
    read(&mut socket).await;
    let first = b"n,,n=,r=abc";
    let body = [b"SCRAM-SHA-256\0", &(first.len() as u32).to_be_bytes()[..], first].concat();
    socket.write_all(&[&b"p"[..], &(body.len() as u32 + 4).to_be_bytes(), &body].concat()).await.unwrap();
    let (_, answer) = read(&mut socket).await;
    let text = String::from_utf8(answer[4..].to_vec()).unwrap();
    text.split_once(",s=").unwrap().1.to_owned()
}

async fn read(from: &mut (impl AsyncRead + Unpin)) -> (u8, Vec<u8>) {
    let tag = from.read_u8().await.unwrap();
    let mut body = vec![0; from.read_u32().await.unwrap() as usize - 4];
    from.read_exact(&mut body).await.unwrap();
    (tag, body)
}

async fn encrypted(ebb: &Ebb) -> impl AsyncRead + AsyncWrite + Unpin + use<> {
    let mut socket = TcpStream::connect(ebb.addr).await.unwrap();
    socket.write_all(&raw::packet(80_877_103, b"")).await.unwrap();
    assert_eq!(socket.read_u8().await.unwrap(), b'S');
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(tls_config(ebb)));
    connector.connect(ServerName::try_from("localhost").unwrap(), socket).await.unwrap()
}

/// An authority that signs certificates for a test, and where it puts them.
struct Authority<'a> {
    dir: &'a Path,
    name: &'static str,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl<'a> Authority<'a> {
    fn new(dir: &'a Path, name: &'static str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(dir.join(format!("{name}.pem")), issuer.pem()).unwrap();
        Self { dir, name, issuer }
    }

    fn pem(&self) -> PathBuf {
        self.dir.join(format!("{}.pem", self.name))
    }

    /// Writes a certificate and its key, to be used under this name.
    fn sign(&self, file: &str, common_name: &str, hosts: &[&str]) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let paths = (self.dir.join(format!("{file}.crt")), self.dir.join(format!("{file}.key")));
        // libpq wants keys that nobody else may read.
        fs::write(&paths.1, key.serialize_pem()).unwrap();
        fs::set_permissions(&paths.1, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        fs::write(&paths.0, certificate.pem()).unwrap();
        paths
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_given_certificate_is_shown_and_read_again_when_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (Authority::new(dir.path(), "one"), Authority::new(dir.path(), "two"));
    let pair = one.sign("server", "db", &["db.example.com"]);
    let files = GivenFiles { certificate: Some(pair), client_ca: None };
    let ebb = Ebb::with(|config| config.files = files).await;
    let verify = |authority: &Authority<'_>| {
        format!(
            "host=db.example.com sslmode=verify-full channel_binding=require sslrootcert={} {}",
            authority.pem().display(),
            route()
        )
    };
    let (by_one, by_two) = (verify(&one), verify(&two));
    assert_eq!(ebb.psql(&by_one, "select 1").await.unwrap(), "1");
    let said = ebb.psql(&by_two, "select 1").await.unwrap_err();
    assert!(said.contains("certificate verify failed"), "{said}");
    // Whoever is connected stays so, on the old one.
    let held = ebb.connect().await;
    two.sign("server", "db", &["db.example.com"]);
    until("the new certificate is shown", || async { ebb.psql(&by_two, "select 1").await.is_ok() }).await;
    held.simple_query("select 1").await.unwrap();
    // What is no pair changes nothing: the old one is shown on.
    fs::write(dir.path().join("server.key"), "not a key").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    assert_eq!(ebb.psql(&by_two, "select 1").await.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_from_afar_show_a_certificate_of_their_role_besides_the_password() {
    let dir = tempfile::tempdir().unwrap();
    let (trusted, stranger) = (Authority::new(dir.path(), "trusted"), Authority::new(dir.path(), "stranger"));
    let files = GivenFiles { certificate: None, client_ca: Some(trusted.pem()) };
    let ebb = Ebb::with(|config| {
        config.files = files;
        config.proxy_protocol = vec![parse_network("127.0.0.1").unwrap()];
    })
    .await;
    let afar = balancer(ebb.addr, header(client("192.0.2.7:1"))).await;
    let with = |(certificate, key): (PathBuf, PathBuf)| {
        format!(
            "host=localhost sslmode=verify-full sslcert={} sslkey={} {}",
            certificate.display(),
            key.display(),
            route()
        )
    };
    let app = with(trusted.sign("app", "app", &[]));
    assert_eq!(ebb.psql_at(afar, &app, "select current_user").await.unwrap(), "app");
    let heard = |parameters: String| {
        let ebb = &ebb;
        async move { ebb.psql_at(afar, &parameters, "select 1").await.unwrap_err() }
    };
    let said = heard(format!("{app} password=wrong")).await;
    assert!(said.contains("password authentication failed"), "{said}");
    let said = heard(with(trusted.sign("eve", "eve", &[]))).await;
    assert!(said.contains("certificate authentication failed for user \"app\""), "{said}");
    let said = heard(format!("host=localhost sslmode=require sslcert=none {}", route())).await;
    assert!(said.contains("connection requires a valid client certificate"), "{said}");
    let said = heard(with(stranger.sign("fake", "app", &[]))).await;
    assert!(said.to_lowercase().contains("unknown ca") || said.contains("certificate"), "{said}");
    // On the machine itself the password is enough, but a certificate that is shown must be right.
    let local = balancer(ebb.addr, header(None)).await;
    let plain = format!("host=localhost sslmode=require sslcert=none {}", route());
    assert_eq!(ebb.psql_at(local, &plain, "select 1").await.unwrap(), "1");
    let eve = with(trusted.sign("eve", "eve", &[]));
    assert!(ebb.psql_at(local, &eve, "select 1").await.is_err());
}
