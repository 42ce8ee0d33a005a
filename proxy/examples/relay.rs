//! The proxy alone, before a Postgres that is always awake: what `scripts/driver-suites` runs the suites of drivers through.
//!
//! ```text
//! relay LISTEN SOCKET VERIFIER [MS]   # relay 127.0.0.1:6432 /tmp/.s.PGSQL.5432 'SCRAM-SHA-256$4096:…'
//! ```
//!
//! Every role logs in with the password of the verifier, and every endpoint leads to the socket. With MS, every so many
//! milliseconds the sessions that are at rest lose their backends, and get others when they go on.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ebb_proxy::{Awake, Endpoint, EndpointError, Endpoints, Proxy, ProxyConfig, ProxyHandle, Unreplayable};
use ebb_types::{AllowList, BranchId, EndpointName, Point};
use tokio_util::sync::CancellationToken;

const BRANCH: BranchId = BranchId::for_test(1);

#[derive(Debug)]
struct AlwaysAwake {
    socket: PathBuf,
    verifier: String,
}

#[async_trait]
impl Endpoints for AlwaysAwake {
    async fn find(&self, name: &EndpointName) -> Result<Endpoint, EndpointError> {
        Ok(Endpoint { branch: BRANCH, name: name.clone(), default_database: "postgres".to_owned(), pool_size: None })
    }

    async fn allowed(&self, _: BranchId) -> Result<AllowList, EndpointError> {
        Ok(AllowList::default())
    }

    fn mock_secret(&self) -> Option<[u8; 32]> {
        None
    }

    async fn verifier(&self, _: BranchId, _: &str) -> Result<Option<String>, EndpointError> {
        Ok(Some(self.verifier.clone()))
    }

    async fn visit(&self, branch: BranchId, _: &Point) -> Result<BranchId, EndpointError> {
        Ok(branch)
    }

    fn may_answer(&self) -> bool {
        true
    }

    async fn wake(&self, _: BranchId) -> Result<Awake, EndpointError> {
        Ok(Awake { generation: 1, socket: self.socket.clone(), admits: None })
    }
}

/// Takes sessions' backends away, unless one of them has work.
async fn exchange(sessions: ProxyHandle, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if sessions.fence(BRANCH, Duration::from_secs(5), Unreplayable::Refuse).await.is_ok() {
            sessions.release(BRANCH);
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [listen, socket, verifier, rest @ ..] = &arguments[..] else {
        return Err("usage: relay LISTEN SOCKET VERIFIER [MS]".into());
    };
    let exchange_every: u64 = rest.first().map_or(Ok(0), |every| every.parse())?;
    let endpoints = AlwaysAwake { socket: socket.into(), verifier: verifier.clone() };
    let tls_dir = tempfile::tempdir()?;
    let proxy = Proxy::bind(ProxyConfig::new(listen.parse()?, tls_dir.path()), Arc::new(endpoints))?;
    println!("listening on {}", proxy.local_addr());
    let shutdown = CancellationToken::new();
    let handle = proxy.handle();
    let stop = shutdown.clone().drop_guard();
    tokio::select! {
        () = proxy.run(shutdown) => {}
        () = exchange(handle, Duration::from_millis(exchange_every)), if exchange_every > 0 => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    drop(stop);
    Ok(())
}
