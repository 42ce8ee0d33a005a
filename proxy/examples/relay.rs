//! The proxy alone, before a Postgres that is always awake: what benchmarks compare with other poolers.
//!
//! ```text
//! relay LISTEN SOCKET VERIFIER        # relay 127.0.0.1:6432 /tmp/.s.PGSQL.5432 'SCRAM-SHA-256$4096:…'
//! ```
//!
//! Every role logs in with the password of the verifier, and every endpoint leads to the socket.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use ebb_proxy::{Awake, Endpoint, EndpointError, Endpoints, Proxy, ProxyConfig};
use ebb_types::{BranchId, EndpointName, Point};
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
struct AlwaysAwake {
    socket: PathBuf,
    verifier: String,
}

#[async_trait]
impl Endpoints for AlwaysAwake {
    async fn find(&self, name: &EndpointName) -> Result<Endpoint, EndpointError> {
        Ok(Endpoint { branch: BranchId::for_test(1), name: name.clone(), default_database: "postgres".to_owned(), pool_size: None })
    }

    async fn verifier(&self, _: BranchId, _: &str) -> Result<Option<String>, EndpointError> {
        Ok(Some(self.verifier.clone()))
    }

    async fn visit(&self, branch: BranchId, _: &Point) -> Result<BranchId, EndpointError> {
        Ok(branch)
    }

    async fn wake(&self, _: BranchId) -> Result<Awake, EndpointError> {
        Ok(Awake { generation: 1, socket: self.socket.clone(), admits: None })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [listen, socket, verifier] = &arguments[..] else {
        return Err("usage: relay LISTEN SOCKET VERIFIER".into());
    };
    let endpoints = AlwaysAwake { socket: socket.into(), verifier: verifier.clone() };
    let tls_dir = tempfile::tempdir()?;
    let proxy = Proxy::bind(ProxyConfig::new(listen.parse()?, tls_dir.path()), Arc::new(endpoints))?;
    println!("listening on {}", proxy.local_addr());
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone().drop_guard();
    tokio::select! {
        () = proxy.run(shutdown) => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    drop(stop);
    Ok(())
}
