//! The proxy in a process of its own, over a socket that is always awake.
//!
//! Its standard input takes one command a line, each answered by a line: `stats` (JSON), `suspend` (every session is
//! hibernated, or the answer says what keeps it), `hold` (computes wake no more), `go` (they do again).

use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use clap::Args;
use ebb_proxy::{Awake, Endpoint, EndpointError, Endpoints, Proxy, ProxyConfig, ProxyHandle, Unreplayable};
use ebb_types::{AllowList, BranchId, EndpointName, Point};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{ALLOCATOR, world};

/// The proxy of one socket.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct ServeArgs {
    #[arg(long)]
    socket: PathBuf,
    /// Every role logs in with the password of this.
    #[arg(long)]
    verifier: String,
    #[arg(long)]
    tls_dir: PathBuf,
    /// Every so many milliseconds, the sessions that are at rest lose their backends, and get others when they go on.
    #[arg(long)]
    exchange_ms: Option<u64>,
    #[arg(long)]
    lanes: Option<usize>,
}

/// What the process is and holds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Stats {
    /// Allocations made since the start, reallocations included.
    pub allocations: usize,
    /// Bytes allocated and not freed.
    pub live_bytes: usize,
    /// Sessions.
    pub sessions: usize,
}

#[derive(Debug)]
struct AlwaysAwake {
    socket: PathBuf,
    verifier: String,
    awake: watch::Sender<bool>,
}

const BRANCH: BranchId = BranchId::for_test(1);

#[async_trait]
impl Endpoints for AlwaysAwake {
    async fn find(&self, name: &EndpointName) -> Result<Endpoint, EndpointError> {
        Ok(Endpoint { branch: BRANCH, name: name.clone(), default_database: "app".to_owned(), pool_size: None })
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
        let _ = self.awake.subscribe().wait_for(|awake| *awake).await;
        Ok(Awake { generation: 1, socket: self.socket.clone(), admits: None })
    }
}

/// Serves until standard input ends.
pub fn run(args: &ServeArgs) -> Result<()> {
    world::raise_descriptor_limit();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(args))
}

async fn serve(args: &ServeArgs) -> Result<()> {
    let endpoints = Arc::new(AlwaysAwake {
        socket: args.socket.clone(),
        verifier: args.verifier.clone(),
        awake: watch::Sender::new(true),
    });
    let mut config = ProxyConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)), &args.tls_dir);
    config.sessions_per_endpoint_max = usize::MAX;
    config.sessions_per_role_max = usize::MAX;
    config.wake_budget = Duration::from_secs(600);
    config.login_timeout = Duration::from_secs(120);
    if let Some(lanes) = args.lanes {
        config.lanes = lanes;
    }
    let proxy = Proxy::bind(config, endpoints.clone())?;
    let handle = proxy.handle();
    println!("{}", proxy.local_addr());
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(proxy.run(shutdown.clone()));
    let exchange_every = args.exchange_ms.map(Duration::from_millis);
    tokio::select! {
        obeyed = obey(&handle, &endpoints) => obeyed?,
        () = exchange(&handle, exchange_every.unwrap_or_default()), if exchange_every.is_some() => {}
    }
    shutdown.cancel();
    running.await?;
    Ok(())
}

/// Takes sessions' backends away, unless one of them has work.
async fn exchange(sessions: &ProxyHandle, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if sessions.fence(BRANCH, Duration::from_secs(5), Unreplayable::Refuse).await.is_ok() {
            sessions.release(BRANCH);
        }
    }
}

/// Does what is asked for on standard input, until that ends.
async fn obey(handle: &ProxyHandle, endpoints: &AlwaysAwake) -> Result<()> {
    let (sender, mut commands) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let _ = sender.blocking_send(line);
        }
    });
    while let Some(command) = commands.recv().await {
        let answer = match command.as_str() {
            "stats" => {
                let now = ALLOCATOR.stats();
                serde_json::to_string(&Stats {
                    allocations: now.allocations + now.reallocations,
                    live_bytes: now.bytes_allocated - now.bytes_deallocated,
                    sessions: handle.activity(BRANCH).sessions,
                })?
            }
            "suspend" => {
                let fenced = handle.fence(BRANCH, Duration::from_secs(60), Unreplayable::Refuse).await;
                handle.release(BRANCH);
                match fenced {
                    Ok(()) => "ok".to_owned(),
                    Err(blocked) => format!("blocked by {} sessions", blocked.0.len()),
                }
            }
            "hold" | "go" => {
                endpoints.awake.send_replace(command == "go");
                "ok".to_owned()
            }
            other => format!("unknown: {other}"),
        };
        let mut out = std::io::stdout();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
