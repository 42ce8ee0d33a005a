use std::time::Duration;

use futures::FutureExt;
use tokio::net::{UnixListener, UnixStream};

use super::*;
use crate::branch::Sitter;

const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// A postmaster that keeps the requests it gets open, and a seat whose backend is behind it.
struct Stage {
    postmaster: UnixListener,
    keys: Arc<CancelKeys>,
    seat: Arc<Seat>,
    tasks: TaskTracker,
    _dir: tempfile::TempDir,
}

fn backends_key() -> CancelKey {
    CancelKey { id: 4711, secret: vec![1, 2, 3, 4].into() }
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let postmaster = UnixListener::bind(&socket).unwrap();
        let sitter = Sitter {
            conn: 1,
            role: String::new(),
            database: String::new(),
            application: String::new(),
            peer: String::new(),
        };
        let seat = Seat::new(sitter);
        seat.set_backend(1, Some(CancelTarget { socket, key: backends_key(), _lease: None }));
        Self { postmaster, keys: Arc::new(CancelKeys::new()), seat, tasks: TaskTracker::new(), _dir: dir }
    }

    /// Asks in a task of its own.
    fn ask(&self, key: &CancelKey) -> tokio::task::JoinHandle<()> {
        let (keys, key, tasks) = (self.keys.clone(), key.clone(), self.tasks.clone());
        tokio::spawn(async move { keys.cancel(key, PEER, &tasks).await })
    }

    /// The next request that the postmaster gets, still open.
    async fn received(&self) -> UnixStream {
        let (mut stream, _) = self.postmaster.accept().await.unwrap();
        let mut packet = vec![0; 16];
        stream.read_exact(&mut packet).await.unwrap();
        assert_eq!(packet, backends_key().request());
        stream
    }

    async fn nothing_is_received(&self) {
        // Whatever was on its way has ended.
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
        assert!(self.postmaster.accept().now_or_never().is_none(), "a request has arrived");
    }
}

#[tokio::test]
async fn keys_are_as_long_as_the_protocol_allows_and_void_after_the_session() {
    let stage = Stage::new();
    let short = stage.keys.issue(&stage.seat, Version::V3_0);
    let long = stage.keys.issue(&stage.seat, Version::V3_2);
    assert_eq!((short.key.secret.len(), long.key.secret.len()), (4, 32));
    assert_ne!(short.key.id, long.key.id);
    for key in [&short.key, &long.key] {
        let asked = stage.ask(key);
        drop(stage.received().await);
        asked.await.unwrap();
    }
    let void = short.key.clone();
    drop(short);
    stage.ask(&void).await.unwrap();
    stage.nothing_is_received().await;
}

#[tokio::test]
async fn only_the_whole_secret_of_the_same_session_is_taken() {
    let stage = Stage::new();
    let long = stage.keys.issue(&stage.seat, Version::V3_2);
    let right = &long.key;
    let mut near = right.clone();
    near.secret[31] ^= 1;
    let mut longer = right.secret.to_vec();
    longer.push(0);
    for wrong in [
        near,
        CancelKey { id: right.id, secret: right.secret[..4].into() },
        CancelKey { id: right.id, secret: longer.into() },
        CancelKey { id: right.id ^ 1, secret: right.secret.clone() },
        CancelKey { id: right.id, secret: Box::default() },
    ] {
        stage.ask(&wrong).await.unwrap();
    }
    stage.nothing_is_received().await;
}

#[tokio::test]
async fn the_shield_waits_for_requests_on_their_way_and_lets_none_through() {
    let stage = Stage::new();
    let issued = stage.keys.issue(&stage.seat, Version::V3_0);
    let asked = stage.ask(&issued.key);
    let on_its_way = stage.received().await;
    let mut shielding = std::pin::pin!(stage.seat.shield());
    assert!(shielding.as_mut().now_or_never().is_none(), "one is on its way");
    stage.ask(&issued.key).await.unwrap();
    drop(on_its_way);
    shielding.await;
    asked.await.unwrap();
    stage.ask(&issued.key).await.unwrap();
    stage.nothing_is_received().await;

    stage.seat.unshield();
    let asked = stage.ask(&issued.key);
    drop(stage.received().await);
    asked.await.unwrap();
}

#[tokio::test]
async fn a_request_goes_on_without_its_asker() {
    let stage = Stage::new();
    let issued = stage.keys.issue(&stage.seat, Version::V3_0);
    let asked = stage.ask(&issued.key);
    let on_its_way = stage.received().await;
    asked.abort();
    assert!(asked.await.is_err());
    assert!(stage.seat.shield().now_or_never().is_none(), "it is on its way still");
    drop(on_its_way);
    stage.seat.shield().await;
}

#[tokio::test]
async fn a_session_that_has_no_backend_has_nothing_to_cancel() {
    let stage = Stage::new();
    let issued = stage.keys.issue(&stage.seat, Version::V3_0);
    stage.seat.set_backend(0, None);
    stage.ask(&issued.key).await.unwrap();
    stage.nothing_is_received().await;
}

#[tokio::test]
async fn requests_beyond_the_rate_are_dropped_of_one_session_and_of_one_address() {
    let stage = Stage::new();
    let issued = stage.keys.issue(&stage.seat, Version::V3_0);
    let other = stage.keys.issue(&stage.seat, Version::V3_0);
    stage.seat.set_backend(0, None);
    let limited = |key: &CancelKey, from| stage.keys.admit(key, from).err() == Some("limited");
    let tries = |key: &CancelKey, from| (0..).take_while(|_| !limited(key, from)).count();
    assert!((20..100).contains(&tries(&issued.key, PEER)));
    assert!(!limited(&other.key, PEER), "another session is not limited");

    let elsewhere = IpAddr::from([192, 0, 2, 1]);
    let unknown = CancelKey { id: other.key.id ^ 1, secret: other.key.secret.clone() };
    assert!((1000..5000).contains(&tries(&unknown, elsewhere)));
    assert!(limited(&other.key, elsewhere), "the address is limited whatever its key");
    assert!(!limited(&other.key, PEER), "another address is not");
}

#[tokio::test]
async fn a_postmaster_that_does_not_answer_is_asked_a_few_times_only() {
    let stage = Stage::new();
    let issued = stage.keys.issue(&stage.seat, Version::V3_0);
    let asked: Vec<_> = (0..6).map(|_| stage.ask(&issued.key)).collect();
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(stage.received().await);
    }
    assert!(tokio::time::timeout(Duration::from_millis(10), stage.postmaster.accept()).await.is_err());
    drop(held);
    for asking in asked {
        asking.await.unwrap();
    }
}
