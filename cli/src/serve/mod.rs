//! `ebb serve`: proxy, timeline service and API in one process.
//!
//! Start: settings, checks, lock, addresses, service, ready. Stop, at the first SIGINT or SIGTERM: the API takes no
//! more requests, the proxy drains, every compute is suspended, all within a deadline; the second signal ends the
//! process at once. Stop, because another process takes over (`handover`): the same, but the computes go on, and its
//! sockets stay open.
//!
//! **Crash.** A killed server leaves its units running and its lock free; the next start adopts them.

pub mod access;
mod adapters;
mod checks;
mod config;
mod handover;
pub mod lock;
mod peers;
mod welcome;

use std::future::IntoFuture as _;
use std::net::SocketAddr;
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_proxy::{Proxy, ProxyConfig};
use ebb_storage::object_store::{self, Bucket, BucketAt};
use ebb_timeline::nodes::Addresses;
use ebb_timeline::{CollectPolicy, LayerPolicy, Service, ServiceConfig, api};
use ebb_types::{ErrorKind, Hint as _};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Level;
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::args::{ConfigCommand, ServeArgs};
use crate::failure::Failure;
use crate::output::Output;
use adapters::{ProxyClients, ServiceEndpoints};
use axum::middleware::from_fn_with_state;
use config::Settings;
use handover::{Listeners, Successor, fits};
use lock::{Announced, DataLock, NodeFile};
use peers::{Identity, Links, PeerServer, Peers};

/// LIMIT: a fast shutdown of a Postgres with much to write takes seconds; process managers kill after 90 s or so.
const SUSPEND_WITHIN: Duration = Duration::from_secs(45);

/// LIMIT: the one before drains its clients and ends its requests, each within seconds.
const LOCK_WITHIN: Duration = Duration::from_secs(60);

/// LIMIT: requests under way at a stop; an act that is cut off here goes on in its own task and is recovered later.
const API_DRAIN_WITHIN: Duration = Duration::from_secs(5);

/// LIMIT: clients of other nodes set aside, and what is under way; transactions have had their time by then.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// LIMIT: what the proxy takes on at most (60,000), twice, and some.
const DESCRIPTORS: u64 = 130_000;

const STOPPING: &str = "stopping: suspending every compute; a second Ctrl-C ends this at once";

/// How often counters and histograms are folded, which bounds their memory.
const METRICS_UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// From half a millisecond to a minute: a thaw, a wake, an upload.
const SECONDS_BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Runs the server until it is told to stop.
pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    let begun = Instant::now();
    let settings = Settings::read(args)?;
    checks::run(&settings)?;
    start_logging();
    raise_descriptor_limit();
    let metrics = install_metrics()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::internal("cannot start worker threads", &error))?;
    // Whatever keeps this server from running is found out before the one that runs stops.
    let checked = if args.take_over { Some(runtime.block_on(open_bucket(&settings))?) } else { None };
    let inherited = if args.take_over { handover::take(&settings.data)? } else { None };
    let lock = match &inherited {
        Some(_) => DataLock::take_within(&settings.data, LOCK_WITHIN)?,
        None => DataLock::take(&settings.data)?,
    };
    Announced::clear(&settings.data);
    let served = runtime.block_on(serve(&settings, checked, inherited, metrics, begun));
    // LIMIT: blocking calls still on the way (an fsync, a hash) are given this long; they leave nothing half-done.
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(lock);
    served
}

/// Prints the settings a start with the same options would use.
pub fn print_config(command: ConfigCommand, output: Output) -> Result<(), Failure> {
    let ConfigCommand::Print(args) = command;
    let settings = Settings::read(&args)?;
    output.show(&settings, || toml::to_string(&settings).expect("settings are plain TOML"));
    Ok(())
}

async fn serve(
    settings: &Settings,
    checked: Option<Bucket>,
    inherited: Option<Listeners>,
    metrics: PrometheusHandle,
    begun: Instant,
) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let bucket = match checked {
        Some(bucket) => bucket,
        None => open_bucket(settings).await?,
    };
    let endpoints = Arc::new(ServiceEndpoints::default());
    let (old_proxy, old_api, old_peers) = match inherited {
        Some(Listeners { proxy, api, peers }) => (Some(proxy), Some(api), Some(peers)),
        None => (None, None, None),
    };
    let proxy = bind_proxy(settings, old_proxy, endpoints.clone())?;
    let (api_listener, api_shared) = bind("the API", "--api-listen", settings.api_listen, old_api)?;
    let api_addr = api_listener.local_addr().map_err(|error| Failure::internal("cannot listen for the API", &error))?;
    let proxy_addr = proxy.local_addr();
    let ca = proxy.ca_pem_path().to_owned();

    let (peer_listener, peers_shared) = bind("other nodes", "--node-listen", settings.node_listen, old_peers)?;
    let peer_addr = peer_listener.local_addr().map_err(|error| Failure::internal("cannot listen for nodes", &error))?;

    let (clients, node) = (proxy.handle(), settings.node_name.clone());
    let own_clients = Arc::new(ProxyClients { proxy: clients.clone(), node });
    let links = Arc::new(Links::new(own_clients.clone()));
    let config = service_config(settings, &proxy)?;
    let service = Service::open(config, bucket, links.clone()).await.map_err(service_failure)?;
    let stop = Stop::default();
    let identity = Identity::derive(service.peer_secret(), service.node_id())
        .map_err(|error| Failure::new(ErrorKind::Internal, format!("cannot make this node's identity: {error:#}")))?;
    let peers = Peers::new(identity.clone(), settings.data.join("peers"), own_clients, stop.service.clone())
        .map_err(|error| Failure::internal("cannot make a directory for other nodes' sockets", &error))?;
    let peers = Arc::new(peers);
    service.set_others(peers.clone());
    endpoints.fill(service.clone(), peers.clone());
    tokio::spawn({
        let (peers, service, stop) = (peers.clone(), service.clone(), stop.service.clone());
        async move { stop.run_until_cancelled(peers.watch(|node| service.is_gone(node))).await }
    });
    let peer_server = PeerServer { identity, service: service.clone(), links, api: api_addr };
    let peer_run = tokio::spawn(peer_server.run(peer_listener, stop.peers.clone()));
    let addresses = Addresses { api: Some(format!("http://{api_addr}")), peer: Some(peer_addr.to_string()) };
    service.announce(addresses).await.map_err(service_failure)?;

    let unable = |error: std::io::Error| Failure::internal("cannot share the proxy's port", &error);
    let shared = Listeners { proxy: proxy.share_listener().map_err(unable)?, api: api_shared, peers: peers_shared };
    let proxy_run = tokio::spawn(proxy.run(stop.proxy.clone()));
    let service_run = tokio::spawn({
        let (service, stop) = (service.clone(), stop.service.clone());
        async move { service.run(stop).await }
    });
    let upkeep = tokio::spawn(keep_up(metrics.clone(), stop.service.clone()));
    let router = api::router_with_metrics(
        service.clone(),
        Some(Arc::new(move || {
            clients.census().publish();
            metrics.render()
        })),
    )
    .layer(from_fn_with_state((service.clone(), peers), peers::forward));
    let api_run = axum::serve(api_listener, router).with_graceful_shutdown(stop.api.clone().cancelled_owned());
    let api_run = tokio::spawn(api_run.into_future());

    let node = NodeFile {
        pid: process::id(),
        version: env!("CARGO_PKG_VERSION"),
        proxy: proxy_addr.to_string(),
        api: format!("http://{api_addr}"),
        ca: &ca,
        ready_at: jiff::Timestamp::now(),
    };
    let announced = Announced::write(&settings.data, &node)?;
    let mut successor = Successor::listen(&settings.data, shared)?;
    tracing::info!(proxy = %proxy_addr, api = %api_addr, "ready");
    let welcomed = welcome::show(settings, &node, &service, begun).await;

    let mut followed = false;
    if welcomed.is_ok() {
        followed = tokio::select! {
            () = signals.next() => false,
            () = successor.taken() => true,
        };
        eprintln!("{}", if followed { "another process takes over" } else { STOPPING });
        tokio::spawn(async move {
            signals.next().await;
            eprintln!("stopped at once; running computes go on, and the next start finds them");
            process::exit(130);
        });
    }
    drop((announced, successor));
    stop.in_order(&service, followed, api_run, proxy_run, peer_run, service_run).await;
    let _ = upkeep.await;
    tracing::info!("stopped");
    welcomed
}

async fn open_bucket(settings: &Settings) -> Result<Bucket, Failure> {
    object_store::open_with(&settings.bucket, &settings.s3()).await.map_err(|error| {
        let failure = Failure::new(error.kind(), format!("cannot open the bucket {:?}", settings.bucket));
        Failure { hint: error.hint(), ..failure.because(&error) }
    })
}

/// The tokens of the parts, in the order they are stopped.
#[derive(Debug, Default)]
struct Stop {
    api: CancellationToken,
    proxy: CancellationToken,
    peers: CancellationToken,
    service: CancellationToken,
}

impl Stop {
    /// Stops taking work, then the clients, then the computes, then what keeps them. `followed`: computes go on.
    async fn in_order(
        self,
        service: &Arc<Service>,
        followed: bool,
        api_run: JoinHandle<std::io::Result<()>>,
        proxy_run: JoinHandle<()>,
        peer_run: JoinHandle<()>,
        service_run: JoinHandle<()>,
    ) {
        self.api.cancel();
        match tokio::time::timeout(API_DRAIN_WITHIN, api_run).await {
            Ok(ended) => report_join("API", ended.map(drop)),
            Err(_) => tracing::warn!("requests were still being answered when the API stopped"),
        }
        self.proxy.cancel();
        // The proxy bounds its own draining.
        report_join("proxy", proxy_run.await);
        // Other nodes' clients are held by suspending, as this one's were.
        if followed {
            service.leave_running(LEAVE_WITHIN).await;
        } else {
            service.suspend_all(SUSPEND_WITHIN).await;
        }
        self.peers.cancel();
        report_join("server for other nodes", peer_run.await);
        self.service.cancel();
        report_join("timeline service", service_run.await);
    }
}

fn report_join(part: &'static str, ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(part, %error, "a part of the server ended by a panic");
    }
}

fn bind_proxy(
    settings: &Settings,
    inherited: Option<std::net::TcpListener>,
    endpoints: Arc<ServiceEndpoints>,
) -> Result<Proxy, Failure> {
    let mut config = ProxyConfig::new(settings.listen, settings.data.join("tls"));
    config.domain.clone_from(&settings.domain);
    settings.access.apply(&mut config);
    config.wake_budget = settings.wake_budget;
    config.answer_pings = settings.answer_pings;
    config.pool_size = settings.pool_size.map(|size| usize::try_from(size).unwrap_or(usize::MAX));
    config.slow_wake = settings.slow_wake;
    let proxy = match inherited.filter(|socket| fits(settings.listen, socket)) {
        Some(socket) => Proxy::over(socket, config, endpoints),
        None => Proxy::bind(config, endpoints),
    };
    proxy.map_err(|error| {
        let failure = Failure::internal("cannot start the proxy", &error);
        Failure { hint: error.hint(), ..failure }
    })
}

/// A port for tokio, and the same to be handed over one day. `inherited` is used if it is the one that is wanted.
fn bind(
    whom: &'static str,
    option: &'static str,
    addr: SocketAddr,
    inherited: Option<std::net::TcpListener>,
) -> Result<(TcpListener, std::net::TcpListener), Failure> {
    let listen = || {
        let listener = match inherited.filter(|socket| fits(addr, socket)) {
            Some(listener) => listener,
            None => std::net::TcpListener::bind(addr)?,
        };
        listener.set_nonblocking(true)?;
        Ok((TcpListener::from_std(listener.try_clone()?)?, listener))
    };
    listen().map_err(|error: std::io::Error| {
        Failure::internal(format!("cannot listen on {addr} for {whom}"), &error)
            .hint(format!("Is another server on that port? {option} names another address."))
    })
}

fn service_config(settings: &Settings, proxy: &Proxy) -> Result<ServiceConfig, Failure> {
    let exe = std::env::current_exe().map_err(|error| Failure::internal("cannot find this program's file", &error))?;
    let bucket = BucketAt::new(&settings.bucket, &settings.s3()).map_err(|error| {
        Failure::new(error.kind(), format!("cannot use the bucket {:?}", settings.bucket)).because(&error)
    })?;
    let (hydrate, cache_limit) = (settings.hydrate, settings.cache_limit);
    Ok(ServiceConfig {
        data_dir: settings.data.clone(),
        exe,
        default_idle_suspend: settings.idle_suspend,
        proxy_public_host: settings.public_host.clone(),
        proxy_public_port: proxy.local_addr().port(),
        proxy_domain: settings.domain.clone(),
        // A certificate that was given is of an authority that clients know, or were told of by whoever gave it.
        ca_pem: settings.access.tls_cert.is_none().then(|| proxy.ca_pem_path().to_owned()),
        min_free_bytes: settings.min_free_bytes,
        node_name: settings.node_name.clone(),
        node_ttl: settings.node_ttl,
        layers: LayerPolicy { bucket: Some(bucket), hydrate, cache_limit },
        collect: CollectPolicy { grace: settings.collect_grace, interval: settings.collect_interval },
    })
}

/// A failure of the service as a failure of the command.
fn service_failure(error: ebb_timeline::Error) -> Failure {
    let failure = Failure::new(error.kind(), "the timeline service cannot start").because(&error);
    Failure { hint: error.hint(), ..failure }
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> Result<Self, Failure> {
        let on = |kind| {
            signal(kind).map_err(|error| Failure::new(ErrorKind::Internal, "cannot listen for signals").because(&error))
        };
        Ok(Self { interrupt: on(SignalKind::interrupt())?, terminate: on(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Logs to stderr; `EBB_LOG` filters it (`debug`, `ebb_proxy=trace,info`).
///
/// INVARIANT: what the S3 client says below `INFO` is never logged: it shows whole requests, session tokens included.
pub fn start_logging() {
    let filter = EnvFilter::try_from_env("EBB_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let unsigned = filter_fn(|event| !event.target().starts_with("aws_") || *event.level() <= Level::INFO);
    let to_stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(filter).with(unsigned).with(to_stderr).init();
}

/// Two descriptors per client, and those of everything else, as far as the system lets.
fn raise_descriptor_limit() {
    let limit = |count| Rlimit { current: Some(count), maximum: Some(count) };
    let allowed = getrlimit(Resource::Nofile).maximum;
    if allowed.is_none_or(|allowed| allowed >= DESCRIPTORS) || setrlimit(Resource::Nofile, limit(DESCRIPTORS)).is_err()
    {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: allowed, maximum: allowed });
    }
}

fn install_metrics() -> Result<PrometheusHandle, Failure> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| Failure::internal("cannot record metrics", &error))
}

async fn keep_up(metrics: PrometheusHandle, stop: CancellationToken) {
    let mut tick = tokio::time::interval(METRICS_UPKEEP_EVERY);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        metrics.run_upkeep();
    }
}
