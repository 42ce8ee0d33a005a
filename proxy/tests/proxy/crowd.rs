//! Crowds that do not say who they are: slow, silent, broken, endless. Nothing wakes, and nobody else notices.

use std::net::SocketAddr;
use std::time::Duration;

use ebb_types::parse_network;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::door::header;
use crate::harness::{ENDPOINT, Ebb, connect, until, value};
use crate::raw;

/// A connection from another address of loopback.
async fn from(source: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{source}:0").parse().unwrap()).unwrap();
    socket.connect(to).await.unwrap()
}

/// Whether the proxy has closed this connection.
fn is_closed(socket: &TcpStream) -> bool {
    !matches!(socket.try_read(&mut [0; 512]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// A proxy that takes the word of 127.0.0.2 for where its clients are.
async fn crowded(change: impl FnOnce(&mut ebb_proxy::ProxyConfig)) -> Ebb {
    Ebb::with(|config| {
        config.proxy_protocol = vec![parse_network("127.0.0.2").unwrap()];
        config.login_timeout = Duration::from_secs(60);
        change(config);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_holds_so_many_places_and_no_more() {
    let ebb = crowded(|config| config.unauthenticated_per_address_max = 20).await;
    let slow = [header(Some("192.0.2.7:1".parse().unwrap())), vec![0, 0, 0]].concat();
    let mut held = Vec::new();
    for _ in 0..20 {
        let mut socket = from("127.0.0.2", ebb.addr).await;
        socket.write_all(&slow).await.unwrap();
        held.push(socket);
    }
    let refused = loop {
        let mut socket = from("127.0.0.2", ebb.addr).await;
        socket.write_all(&slow).await.unwrap();
        let mut answer = Vec::new();
        match tokio::time::timeout(Duration::from_millis(500), socket.read_to_end(&mut answer)).await {
            Ok(read) => break read.map(|_| raw::code(&answer)).unwrap(),
            // It was seen before one of the first: it holds a place, and that one does not.
            Err(_) => held.push(socket),
        }
        assert!(held.len() < 40, "there are more than 20 places");
    };
    assert_eq!(refused, "53300");
    // Other addresses, and those who are connected, do not notice.
    let client = ebb.connect().await;
    assert_eq!(value(&client, "select 1").await, "1");
    let other = [header(Some("192.0.2.8:1".parse().unwrap())), raw::packet(3 << 16, b"user\0app\0\0")].concat();
    let mut socket = from("127.0.0.2", ebb.addr).await;
    socket.write_all(&other).await.unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.unwrap();
    assert_eq!(raw::code(&answer), "28000", "it is asked to encrypt");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_from_everywhere_keeps_nobody_out() {
    let ebb = crowded(|config| {
        config.unauthenticated_max = 200;
        config.unauthenticated_per_address_max = 5;
    })
    .await;
    let paid = ebb.connect().await;
    let mut crowd = Vec::new();
    for n in 0..600_u32 {
        let address = SocketAddr::from((std::net::Ipv4Addr::from(0xc633_6400 + n), 1));
        let mut socket = from("127.0.0.2", ebb.addr).await;
        socket.write_all(&header(Some(address))).await.unwrap();
        crowd.push(socket);
    }
    until("no more than there are places for are left", || async {
        crowd.iter().filter(|socket| !is_closed(socket)).count() <= 200
    })
    .await;
    assert_eq!(value(&paid, "select 1").await, "1");
    // All places are taken, and still whoever knows a password gets in: now and then one is drawn, never often.
    let mut refused = 0;
    for _ in 0..40 {
        refused += usize::from(connect(&ebb.config()).await.is_err());
    }
    assert!(refused < 10, "{refused} of 40 were not let in");
    assert!(crowd.iter().filter(|socket| !is_closed(socket)).count() >= 150, "the crowd is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_ends_is_cut_and_wakes_nothing() {
    let ebb = Ebb::with(|config| config.login_timeout = Duration::from_secs(2)).await;
    let route = raw::packet(3 << 16, format!("user\0app\0options\0endpoint={ENDPOINT}\0\0").as_bytes());
    let slow: Vec<Vec<u8>> = vec![
        // Silence; a packet that never ends; a handshake that never begins; a password that never comes, or never ends.
        vec![],
        vec![0, 0, 0x27, 0],
        [&raw::packet(80_877_103, b"")[..], &[0x16, 3, 1, 2, 0]].concat(),
        route.clone(),
        [&route[..], b"p\0\0\x04\0SCRAM"].concat(),
    ];
    let mut held = Vec::new();
    for first in &slow {
        for _ in 0..50 {
            let mut socket = TcpStream::connect(ebb.addr).await.unwrap();
            socket.write_all(first).await.unwrap();
            held.push(socket);
        }
    }
    // Drip by drip is no faster.
    let mut dripping = TcpStream::connect(ebb.addr).await.unwrap();
    let drip = tokio::spawn(async move {
        for byte in route.iter().cycle() {
            if dripping.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let client = ebb.connect().await;
    until("all of them are cut", || async { drip.is_finished() && held.iter().all(is_drained_and_closed) }).await;
    assert_eq!(value(&client, "select 1").await, "1");
    assert_eq!(ebb.wakes(), 1, "only the one with a password woke anything");
}

/// Whether the proxy has closed this connection, whatever it said before.
fn is_drained_and_closed(socket: &TcpStream) -> bool {
    loop {
        match socket.try_read(&mut [0; 512]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_answered_and_cut_and_wakes_nothing() {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    ebb.suspend_when_idle().await;
    let mut garbage: Vec<Vec<u8>> = vec![vec![0xff; 64 * 1024], vec![0; 64 * 1024], b"GET / HTTP/1.1\r\n\r\n".to_vec()];
    // Lengths of every size, and handshakes with nonsense in them.
    garbage.extend((0..32).map(|bit| [&(1_u32 << bit).to_be_bytes()[..], &[7; 2000]].concat()));
    garbage.extend((0..20).map(|n| [&raw::packet(80_877_103, b"")[..], &[n; 3000]].concat()));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..10 {
        for bytes in garbage.clone() {
            let addr = ebb.addr;
            tasks.spawn(async move {
                let mut socket = TcpStream::connect(addr).await.unwrap();
                // It may be cut while there is still something to send.
                let _ = socket.write_all(&bytes).await;
                let _ = socket.shutdown().await;
                let mut answer = Vec::new();
                let _ = socket.read_to_end(&mut answer).await;
            });
        }
    }
    tokio::time::timeout(crate::harness::PATIENCE, tasks.join_all()).await.expect("all are cut");
    assert_eq!(ebb.wakes(), 1, "the compute sleeps");
    assert_eq!(value(&client, "select 1").await, "1");
}
