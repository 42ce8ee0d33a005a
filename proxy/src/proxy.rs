//! The listening proxy: binds, accepts, drains.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::endpoints::{Endpoints, ProxyHandle};

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
    /// How long a peer may take to say who it is. Default 15 s; then it is cut.
    pub login_timeout: Duration,
    /// How long active sessions may go on when the proxy drains. Default 5 s; then `57P01`.
    pub drain_deadline: Duration,
    /// Sessions one endpoint may hold, hibernated ones included. Default 10,000; then `53300`.
    pub sessions_per_endpoint_max: usize,
}

impl ProxyConfig {
    /// The default settings.
    pub fn new(listen: SocketAddr, tls_dir: impl Into<PathBuf>) -> Self {
        Self {
            listen,
            tls_dir: tls_dir.into(),
            domain: "localhost".to_owned(),
            wake_budget: Duration::from_secs(30),
            login_timeout: Duration::from_secs(15),
            drain_deadline: Duration::from_secs(5),
            sessions_per_endpoint_max: 10_000,
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
        source: std::io::Error,
    },
}

/// A bound proxy. Clients wait in the listen queue until [`Proxy::run`].
#[derive(Debug)]
pub struct Proxy {}

impl Proxy {
    /// Takes the address and reads, or makes, the certificate authority.
    ///
    /// # Errors
    /// If the address cannot be had or the certificate authority cannot be read or written.
    pub fn bind(_config: ProxyConfig, _endpoints: Arc<dyn Endpoints>) -> Result<Self, ProxyError> {
        todo!()
    }

    /// What the proxy offers to whoever runs computes.
    pub fn handle(&self) -> ProxyHandle {
        todo!()
    }

    /// The address clients reach.
    pub fn local_addr(&self) -> SocketAddr {
        todo!()
    }

    /// The certificate a client verifies this proxy against (`sslrootcert`).
    pub fn ca_pem_path(&self) -> &Path {
        todo!()
    }

    /// Serves until cancelled, then drains: idle clients get `57P01`, active ones the drain deadline.
    pub async fn run(self, _shutdown: CancellationToken) {
        todo!()
    }
}
