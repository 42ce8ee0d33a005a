//! What do paying clients notice of a flood of strangers, and what does each stranger cost?
//!
//! Strangers come from as many addresses as there are of them: a load balancer on loopback tells so. Expected beforehand: a
//! query takes as long as ever but for the processor time that the flood takes; a login takes some more; a stranger that is
//! held costs a few KiB, one in the middle of a handshake some tens.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ebb_measure::stats::{Samples, heading};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio_postgres::NoTls;

use crate::Common;
use crate::node::Node;
use crate::pgbench::{self, over_socket};

/// The load balancer's address.
const BALANCER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Strangers held at once.
const HELD: usize = 5_000;
/// Strangers that come in a second.
const PER_SECOND: u32 = 1_000;
/// Logins of paying clients in a second, beside those of pgbench.
const LOGINS_PER_SECOND: u32 = 20;
/// pgbench clients.
const CLIENTS: u32 = 8;

/// What strangers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flood {
    /// Nothing: they connect and stay.
    Silent,
    /// They name a role and a branch and never send a password.
    NoPassword,
    /// They begin a handshake and do not end it.
    Handshake,
    /// They send what is no message.
    Garbage,
    /// They send wrong passwords; from this machine, so that they need not encrypt.
    Guess,
}

/// Runs all floods.
pub fn run(common: &Common) -> Result<()> {
    heading(
        "flood: pgbench select-only and logins of paying clients beside a flood of strangers, against the same in peace",
        &format!(
            "{} s each, {CLIENTS} pgbench clients, {LOGINS_PER_SECOND} logins a second; {HELD} strangers held, or {PER_SECOND} a \
             second, each of an address of its own; attackers on the same processors",
            common.seconds
        ),
    );
    let node = Node::open(common, |command| {
        command.args(["--proxy-protocol", &BALANCER.to_string()]);
    })?;
    let node = node.with_project()?;
    let socket = node.wake("prod")?;
    pgbench::initialise(common, &over_socket(&socket, "app"), common.scale.unwrap_or(10))?;
    let grant = "grant all on all tables in schema public to app";
    pgbench::psql(common, &over_socket(&socket, "app"), grant)?;
    let wakes = |node: &Node| -> Result<u64> {
        let shown = node.get("/v1/projects/bench/branches/dev/compute")?;
        shown["wakes"].as_u64().context("a compute counts its wakes")
    };
    let attackers = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let hello: Arc<[u8]> = client_hello()?.into();

    let peace = measure(common, &node)?;
    print("in peace", &peace, None);
    for flood in [Flood::Silent, Flood::NoPassword, Flood::Handshake] {
        let before = node.memory_kib()?;
        let held = hold(&attackers, &node, flood, &hello)?;
        let cost = (node.memory_kib()? - before) / held.len() as f64;
        println!("{flood:?}: {} strangers held cost {cost:.1} KiB each", held.len());
        let seen = measure(common, &node)?;
        print(&format!("{} held: {flood:?}", held.len()), &seen, Some(&peace));
    }
    for flood in [Flood::Garbage, Flood::Handshake, Flood::Guess] {
        let stop = Arc::new(AtomicBool::new(false));
        let sent = come_and_go(&attackers, &node, flood, &hello, stop.clone());
        let begun = Instant::now();
        let seen = measure(common, &node)?;
        let rate = sent.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        print(&format!("{rate:.0}/s: {flood:?}"), &seen, Some(&peace));
    }
    anyhow::ensure!(wakes(&node)? == 0, "a stranger woke a branch");
    println!("no stranger woke the branch they knocked at");
    println!("{}", refusals(&node.text("/metrics")?));
    Ok(())
}

/// What paying clients see.
struct Seen {
    tps: f64,
    latency_ms: f64,
    logins: Samples,
    failed: usize,
}

fn print(what: &str, seen: &Seen, peace: Option<&Seen>) {
    let Seen { tps, latency_ms, logins, failed } = seen;
    let ratio = peace.map(|peace| format!("  tps ratio {:.3}", tps / peace.tps)).unwrap_or_default();
    println!(
        "{what:<28} query {latency_ms:>7.3} ms  tps {tps:>8.0}  login p50 {:>7.2} p99 {:>8.2} ms  {failed} logins failed{ratio}",
        logins.median(),
        logins.percentile(99.0),
    );
}

/// pgbench and logins beside it.
fn measure(common: &Common, node: &Node) -> Result<Seen> {
    let (conninfo, seconds) = (node.conninfo("prod"), common.seconds);
    let logging_in = std::thread::spawn(move || -> Result<(Samples, usize)> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut logins, mut failed) = (Samples::default(), 0);
        let until = Instant::now() + Duration::from_secs(seconds.into());
        while Instant::now() < until {
            let begun = Instant::now();
            match runtime.block_on(login(&conninfo)) {
                Ok(()) => logins.add_time(begun.elapsed()),
                Err(_) => failed += 1,
            }
            std::thread::sleep((Duration::from_secs(1) / LOGINS_PER_SECOND).saturating_sub(begun.elapsed()));
        }
        Ok((logins, failed))
    });
    let round = pgbench::round(common, &[node.conninfo("prod")], &["-S"], CLIENTS)?;
    let (logins, failed) = logging_in.join().map_err(|_| anyhow::anyhow!("the logins panicked"))??;
    Ok(Seen { tps: round.tps, latency_ms: round.latency_ms, logins, failed })
}

async fn login(conninfo: &str) -> Result<()> {
    let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await?;
    let connection = tokio::spawn(connection);
    client.simple_query("select 1").await?;
    drop(client);
    Ok(connection.await??)
}

/// Connects as the `n`th stranger and does the first of what it does.
async fn knock(to: SocketAddr, n: u64, flood: Flood, hello: &[u8]) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    let local = matches!(flood, Flood::Guess | Flood::NoPassword);
    if !local {
        socket.bind((BALANCER, 0).into())?;
    }
    let mut stream = socket.connect(to).await?;
    let mut bytes = Vec::new();
    if !local {
        bytes.extend_from_slice(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
        // 198.18.0.0/15 is for benchmarks (RFC 2544).
        bytes.extend_from_slice(&(0xc612_0000 + (n % 131_072) as u32).to_be_bytes());
        bytes.extend_from_slice(&[127, 0, 0, 1, 0x1f, 0x90, 0x15, 0x38]);
    }
    match flood {
        Flood::Silent => {}
        Flood::Garbage => bytes.extend_from_slice(&[0xff; 512]),
        Flood::Handshake => {
            bytes.extend_from_slice(&[0, 0, 0, 8, 4, 210, 22, 47]);
            bytes.extend_from_slice(hello);
        }
        Flood::NoPassword | Flood::Guess => {
            let body = b"\0\x03\0\0user\0app\0options\0endpoint=dev--bench\0\0";
            bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
            bytes.extend_from_slice(body);
        }
    }
    stream.write_all(&bytes).await?;
    Ok(stream)
}

/// Holds strangers.
fn hold(attackers: &Runtime, node: &Node, flood: Flood, hello: &Arc<[u8]>) -> Result<Vec<TcpStream>> {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, node.proxy_port));
    let mut held = Vec::new();
    attackers.block_on(async {
        for n in 0..HELD as u64 {
            held.push(knock(to, n, flood, hello).await?);
        }
        // So that all of them are where they stay.
        tokio::time::sleep(Duration::from_secs(2)).await;
        Ok(held)
    })
}

/// Lets strangers come, and go when they are cut.
fn come_and_go(
    attackers: &Runtime,
    node: &Node,
    flood: Flood,
    hello: &Arc<[u8]>,
    stop: Arc<AtomicBool>,
) -> Arc<AtomicU64> {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, node.proxy_port));
    let (sent, hello) = (Arc::new(AtomicU64::new(0)), hello.clone());
    let counted = sent.clone();
    attackers.spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_secs(1) / PER_SECOND);
        while !stop.load(Ordering::Relaxed) {
            tick.tick().await;
            let n = counted.fetch_add(1, Ordering::Relaxed);
            let hello = hello.clone();
            tokio::spawn(async move {
                let ended = tokio::time::timeout(Duration::from_secs(5), async {
                    let mut stream = knock(to, n, flood, &hello).await?;
                    if flood == Flood::Guess {
                        guess(&mut stream).await?;
                    }
                    let mut scrap = [0; 4096];
                    if flood == Flood::Handshake {
                        // The server has done its part of the work by then.
                        return stream.read(&mut scrap).await.map(drop);
                    }
                    while stream.read(&mut scrap).await? > 0 {}
                    Ok(())
                });
                // Cut off, or not even let in: that is what strangers are for.
                let _ = ended.await;
            });
        }
    });
    sent
}

/// SCRAM with a proof of nothing.
async fn guess(stream: &mut TcpStream) -> std::io::Result<()> {
    async fn answer(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
        let tag = stream.read_u8().await?;
        let mut body = vec![0; (stream.read_u32().await? as usize).saturating_sub(4)];
        stream.read_exact(&mut body).await?;
        if tag == b'R' { Ok(body) } else { Err(std::io::ErrorKind::ConnectionRefused.into()) }
    }
    async fn send(stream: &mut TcpStream, body: &[u8]) -> std::io::Result<()> {
        let message = [&b"p"[..], &(body.len() as u32 + 4).to_be_bytes(), body].concat();
        stream.write_all(&message).await
    }
    answer(stream).await?;
    let first = b"n,,n=,r=abcdefgh";
    send(stream, &[b"SCRAM-SHA-256\0", &(first.len() as u32).to_be_bytes()[..], first].concat()).await?;
    let challenge = answer(stream).await?;
    let challenge = String::from_utf8_lossy(&challenge[4..]).into_owned();
    let nonce = challenge.split(',').next().unwrap_or_default();
    let proof = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    send(stream, format!("c=biws,{nonce},p={proof}").as_bytes()).await
}

/// The first flight of a client, to be sent again and again.
fn client_hello() -> Result<Vec<u8>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let mut client = rustls::ClientConnection::new(Arc::new(config), ServerName::try_from("localhost")?)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    Ok(hello)
}

fn refusals(metrics: &str) -> String {
    let of_interest = |line: &&str| line.starts_with("ebb_proxy_refusals_total") || line.contains("_logins_total");
    metrics.lines().filter(of_interest).collect::<Vec<_>>().join("\n")
}
