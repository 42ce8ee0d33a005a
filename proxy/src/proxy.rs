//! The listening proxy: binds, accepts, drains.
//!
//! **Cancellation**: [`Proxy::run`] is ended by its token, in this order: no new connections; those that have only just
//! come are served; idle sessions end with `57P01`, active ones when their transaction does; at the drain deadline all
//! others end. Dropping it instead cuts everyone off.
//!
//! The listener may be shared with the process that follows ([`Proxy::share_listener`], [`Proxy::over`]): whoever
//! connects between this proxy's last `accept` and the next one's first waits in its queue, and is never refused.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use dashmap::DashMap;
use ebb_types::BranchId;
use ebb_types::Hint;
use ipnet::IpNet;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::branch::{Branch, Order};
use crate::cancel::CancelKeys;
use crate::certificates::{Certificates, GivenFiles};
use crate::endpoints::{Activity, Blocked, Census, Endpoints, ProxyHandle, SessionInfo, Sessions, Unreplayable};
use crate::lanes::{Elsewhere, Lanes};
use crate::limits::{Limits, Rates};
use crate::session::{GaugeGuard, serve};
use crate::strangers::Strangers;
use crate::tls::{Authority, TlsError};

/// LIMIT: connections at once, far above what one machine's Postgres serves; more wait in the listen queue.
const CONNECTIONS_MAX: usize = 60_000;
/// LIMIT: the kernel's queue of connections not yet accepted, which it bounds itself (`somaxconn`, 4,096): thousands may
/// come at once, or wait for the next process.
const BACKLOG: i32 = 65_535;
/// When the system has no descriptor or memory for a connection, it is asked again after this.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// A client that has connected and asks for nothing for so long is not about to; it may be told to come back.
const NEWCOMER_PATIENCE: Duration = Duration::from_secs(1);
/// How often it is looked whether there are any left.
const NEWCOMERS_EVERY: Duration = Duration::from_millis(10);
/// LIMIT: after the drain deadline, how long last words may take.
const DRAIN_GRACE: Duration = Duration::from_secs(2);
/// Idle connections are probed after this, so that a client that vanished does not hold its seat for ever.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// How a proxy is set up.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Where to listen. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// Where the proxy's own certificate authority lives (`ca.pem`, `ca.key`); made at the first start.
    pub tls_dir: PathBuf,
    /// Endpoints answer to `branch--project.<domain>`. Default `localhost`.
    pub domain: String,
    /// How long a client is held while its compute wakes or its endpoint is fenced. Default 30 s; then `57P03`.
    pub wake_budget: Duration,
    /// Whether `SELECT 1` of a client whose session sleeps is answered here instead of waking its compute. Default no; a
    /// client may wish otherwise (`ebb.pings`). Empty queries are always answered here.
    pub answer_pings: bool,
    /// How long a peer may take to say who it is. Default 15 s; then it is cut.
    pub login_timeout: Duration,
    /// How long active sessions may go on when the proxy drains. Default 5 s; then `57P01`.
    pub drain_deadline: Duration,
    /// Sessions one endpoint may hold, hibernated ones included. Default 10,000; then `53300`.
    pub sessions_per_endpoint_max: usize,
    /// Sessions one role may hold at one endpoint, hibernated ones included. Default 10,000; then `53300`.
    pub sessions_per_role_max: usize,
    /// Connections that have not logged in yet. Default 10,000, far below what there is room for in all; then one of them,
    /// drawn by lot, is cut for each that comes.
    pub unauthenticated_max: usize,
    /// … of one address (of IPv6: one network of 64 bits). Default 1,000; then `53300`.
    pub unauthenticated_per_address_max: usize,
    /// How often one may try to log in.
    pub rates: Rates,
    /// Load balancers, which must begin every connection by telling for whom they speak (PROXY protocol, version 2).
    /// Default none.
    pub proxy_protocol: Vec<IpNet>,
    /// Certificates to use instead of the own authority's, and the authorities of clients'. Default neither.
    pub files: GivenFiles,
    /// Backends that a branch's clients in transaction mode share, where the branch has no number of its own. Default: a
    /// quarter of the connections that its Postgres takes.
    pub pool_size: Option<usize>,
    /// How long a client in transaction mode waits for one of them. Default 30 s; then `53300`.
    pub pool_wait: Duration,
    /// A client that waits for longer is written to the log, with what it waited for. Default 2 s.
    pub slow_wake: Duration,
    /// Threads that carry the sessions. Default: one for four processors; they are shared with whatever else runs here.
    pub lanes: usize,
}

impl ProxyConfig {
    /// The default settings.
    pub fn new(listen: SocketAddr, tls_dir: impl Into<PathBuf>) -> Self {
        Self {
            listen,
            tls_dir: tls_dir.into(),
            domain: "localhost".to_owned(),
            wake_budget: Duration::from_secs(30),
            answer_pings: false,
            login_timeout: Duration::from_secs(15),
            drain_deadline: Duration::from_secs(5),
            sessions_per_endpoint_max: 10_000,
            sessions_per_role_max: 10_000,
            unauthenticated_max: 10_000,
            unauthenticated_per_address_max: 1_000,
            rates: Rates::default(),
            proxy_protocol: Vec::new(),
            files: GivenFiles::default(),
            pool_size: None,
            pool_wait: Duration::from_secs(30),
            slow_wake: Duration::from_secs(2),
            lanes: Lanes::usual(),
        }
    }
}

/// Why a proxy could not start.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The address is taken or not ours.
    #[error("proxy cannot listen on {addr}")]
    Listen {
        /// The address wanted.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The system has no threads left.
    #[error("proxy cannot start its threads")]
    Threads(#[source] io::Error),
    /// There is no certificate authority to encrypt with.
    #[error("proxy cannot set up TLS")]
    Tls(#[from] TlsError),
}

impl Hint for ProxyError {
    fn hint(&self) -> Option<String> {
        match self {
            ProxyError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                Some("Choose another address with --listen, or stop what listens there.".to_owned())
            }
            ProxyError::Listen { .. } | ProxyError::Threads(_) => None,
            ProxyError::Tls(TlsError::Given { .. }) => {
                Some("Certificates and keys are given as PEM files that this server may read.".to_owned())
            }
            ProxyError::Tls(_) => Some(
                "Mend the permissions of the directory or restore its files; if it is deleted, a new authority is \
                 made, and clients that verify must be given its ca.pem."
                    .to_owned(),
            ),
        }
    }
}

/// A bound proxy. Clients wait in the listen queue until [`Proxy::run`].
#[derive(Debug)]
pub struct Proxy {
    listener: TcpListener,
    addr: SocketAddr,
    lanes: Lanes,
    shared: Arc<Shared>,
}

/// What all connections share.
#[derive(Debug)]
pub struct Shared {
    pub config: ProxyConfig,
    pub endpoints: Arc<dyn Endpoints>,
    pub authority: Arc<Authority>,
    pub certificates: Arc<Certificates>,
    pub keys: Arc<CancelKeys>,
    pub limits: Limits,
    pub strangers: Arc<Strangers>,
    /// Where handshakes are made: strangers' arithmetic must not hold up the sessions on the lanes.
    pub home: Handle,
    /// Wakes and cancel requests, which outlive those who ask for them.
    pub tasks: TaskTracker,
    /// No new sessions: the proxy stops.
    pub shutdown: CancellationToken,
    branches: DashMap<BranchId, Arc<Branch>>,
}

impl Shared {
    /// The sessions of a branch that has, or is about to have, some.
    pub fn branch(&self, id: BranchId) -> Arc<Branch> {
        self.branches.entry(id).or_insert_with(|| Branch::new(id, self.endpoints.clone())).clone()
    }

    fn known_branch(&self, id: BranchId) -> Option<Arc<Branch>> {
        self.branches.get(&id).map(|branch| branch.clone())
    }

    /// Whether any of so many connections logs in, or has only just done so.
    fn has_newcomers(&self, connections: usize) -> bool {
        let (mut sessions, mut new) = (0, 0);
        for branch in &self.branches {
            let counted = branch.newcomers(NEWCOMER_PATIENCE);
            sessions += counted.0;
            new += counted.1;
        }
        new > 0 || sessions < connections
    }

    fn order_all(&self, order: Order) {
        for branch in &self.branches {
            branch.order(order, None);
        }
    }
}

impl Proxy {
    /// Takes the address and reads, or makes, the certificate authority. The endpoints are asked in the current runtime.
    ///
    /// # Errors
    /// If the address cannot be had, a file of a certificate, a key or an authority cannot be read, written or used, or
    /// there are no threads.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(config: ProxyConfig, endpoints: Arc<dyn Endpoints>) -> Result<Self, ProxyError> {
        let listener = listen(config.listen).map_err(|source| ProxyError::Listen { addr: config.listen, source })?;
        Self::over(listener, config, endpoints)
    }

    /// Takes over a listener that does not block, whatever `config.listen` says. As [`Proxy::bind`] otherwise.
    ///
    /// # Errors
    /// As [`Proxy::bind`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn over(listener: TcpListener, config: ProxyConfig, endpoints: Arc<dyn Endpoints>) -> Result<Self, ProxyError> {
        let authority = Arc::new(Authority::open(&config.tls_dir, &config.domain)?);
        let certificates = Arc::new(Certificates::open(authority.clone(), config.files.clone())?);
        let unable = |source| ProxyError::Listen { addr: config.listen, source };
        let addr = listener.local_addr().map_err(unable)?;
        let lanes = Lanes::start(config.lanes).map_err(ProxyError::Threads)?;
        let shared = Arc::new(Shared {
            limits: Limits::new(&config.rates),
            strangers: Strangers::new(config.unauthenticated_max, config.unauthenticated_per_address_max),
            config,
            endpoints: Elsewhere::new(endpoints),
            authority,
            certificates,
            keys: Arc::new(CancelKeys::new()),
            home: Handle::current(),
            tasks: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            branches: DashMap::new(),
        });
        Ok(Self { listener, addr, lanes, shared })
    }

    /// What the proxy offers to whoever runs computes.
    pub fn handle(&self) -> ProxyHandle {
        self.shared.clone()
    }

    /// The listener, for another process to take over: it goes on listening when this proxy stops.
    ///
    /// # Errors
    /// If the system has no descriptors left.
    pub fn share_listener(&self) -> io::Result<TcpListener> {
        self.listener.try_clone()
    }

    /// The address clients reach.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The certificate a client verifies this proxy against (`sslrootcert`).
    pub fn ca_pem_path(&self) -> &Path {
        self.shared.authority.ca_pem_path()
    }

    /// Serves until cancelled, then drains: newcomers are served, idle clients get `57P01`, active ones the drain deadline.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O and time.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { listener, addr, lanes, shared } = self;
        let listener = tokio::net::TcpListener::from_std(listener).expect("the listener is open and non-blocking");
        let connections = TaskTracker::new();
        // Cut in the end, whatever they are doing.
        let cut = CancellationToken::new();
        let _cut_on_drop = cut.clone().drop_guard();
        tracing::info!(%addr, "proxy listens");
        let keeping = tokio::spawn(shared.certificates.clone().keep(shutdown.clone()));
        let _keeping = AbortOnDropHandle::new(keeping);
        accept(&listener, &shared, &lanes, &connections, &cut, &shutdown).await;
        drop(listener);

        connections.close();
        tracing::info!(connections = connections.len(), "proxy drains");
        let begun = Instant::now();
        let deadline = begun + shared.config.drain_deadline;
        // Half of the time is left to those who then have to be told.
        while begun.elapsed() < shared.config.drain_deadline / 2 && shared.has_newcomers(connections.len()) {
            sleep(NEWCOMERS_EVERY).await;
        }
        shared.shutdown.cancel();
        shared.order_all(Order::Drain);
        if timeout_at(deadline, connections.wait()).await.is_err() {
            tracing::info!(connections = connections.len(), "drain deadline has passed");
            shared.order_all(Order::DrainNow);
            let _ = timeout(DRAIN_GRACE, connections.wait()).await;
            cut.cancel();
            connections.wait().await;
        }
    }
}

/// Accepts until told to stop.
async fn accept(
    listener: &tokio::net::TcpListener,
    shared: &Arc<Shared>,
    lanes: &Lanes,
    connections: &TaskTracker,
    cut: &CancellationToken,
    shutdown: &CancellationToken,
) {
    static CONN: AtomicU64 = AtomicU64::new(1);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = async {
                let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
                listener.accept().await.map(|accepted| (accepted, place))
            } => accepted,
        };
        let ((socket, peer), place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "connection could not be accepted");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let socket = match tune(&socket).and_then(|()| socket.into_std()) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(%error, "connection was gone at once");
                continue;
            }
        };
        let conn = CONN.fetch_add(1, Ordering::Relaxed);
        let (shared, cut) = (shared.clone(), cut.clone());
        let (lane, on_lane) = lanes.pick();
        let carry = async move {
            let _held = (place, on_lane, GaugeGuard::new("ebb_proxy_connections"));
            metrics::counter!("ebb_proxy_connections_total").increment(1);
            let Ok(socket) = TcpStream::from_std(socket) else { return };
            tokio::select! {
                () = serve(shared, socket, peer, conn) => {}
                () = cut.cancelled() => {}
            }
        };
        connections.spawn_on(carry, lane);
    }
}

fn tune(socket: &TcpStream) -> io::Result<()> {
    // Messages go out when they are whole; waiting for more only adds delay.
    socket.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4);
    socket2::SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(addr), socket2::Type::STREAM, None)?;
    // A restart must not wait for the last proxy's connections to time out.
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[async_trait]
impl Sessions for Shared {
    fn activity(&self, branch: BranchId) -> Activity {
        self.known_branch(branch).map(|branch| branch.activity()).unwrap_or_default()
    }

    fn sessions(&self, branch: BranchId) -> Vec<SessionInfo> {
        self.known_branch(branch).map(|branch| branch.sessions()).unwrap_or_default()
    }

    fn census(&self) -> Census {
        let mut census = Census::default();
        self.branches.iter().for_each(|branch| branch.count(&mut census));
        census
    }

    async fn fence(&self, branch: BranchId, deadline: Duration, rule: Unreplayable) -> Result<(), Blocked> {
        let result = self.branch(branch).fence(deadline, rule).await;
        let outcome = if result.is_ok() { "ok" } else { "blocked" };
        metrics::counter!("ebb_proxy_fences_total", "result" => outcome).increment(1);
        result
    }

    fn release(&self, branch: BranchId) {
        if let Some(branch) = self.known_branch(branch) {
            branch.release();
        }
    }

    fn forget(&self, branch: BranchId) {
        self.branches.remove_if(&branch, |_, known| known.is_deserted());
    }

    fn lost(&self, branch: BranchId, generation: u64) {
        if let Some(branch) = self.known_branch(branch) {
            branch.lost(generation);
        }
    }
}
