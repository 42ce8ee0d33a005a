//! The service: carries out acts, keeps computes as they should be, recovers what was interrupted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ebb_storage::object_store::Bucket;
use ebb_types::{BranchId, EndpointName};
use tokio_util::sync::CancellationToken;

use crate::Result;
use crate::clients::SharedClients;

/// What the service must be told.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// The node's data directory.
    pub data_dir: PathBuf,
    /// The `ebb` program, started with `compute` for every awake branch.
    pub exe: PathBuf,
    /// Idle time after which a compute is suspended, for branches without their own.
    pub default_idle_suspend: Duration,
    /// Host that connection URLs name.
    pub proxy_public_host: String,
    /// Port that connection URLs name.
    pub proxy_public_port: u16,
    /// Domain below which every endpoint is a host (`prod--shop.<domain>`): for connection URLs by SNI.
    pub proxy_domain: String,
    /// The proxy's CA certificate, named in connection URLs that verify it.
    pub ca_pem: Option<PathBuf>,
    /// Bytes that must stay free on the disk of `data_dir`; work is refused below.
    pub min_free_bytes: u64,
}

/// A branch that clients asked for by its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundEndpoint {
    /// The branch.
    pub branch: BranchId,
    /// The database meant where a client names none.
    pub default_database: String,
}

/// A compute that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwakeUnit {
    /// Counts the computes of this branch since the service started.
    pub generation: u64,
    /// The Unix socket of its Postgres.
    pub socket: PathBuf,
}

/// The timeline service of one node. Shared by the API, the proxy's adapter and the reconciler.
#[derive(Debug)]
pub struct Service {}

impl Service {
    /// Opens the bucket's catalog and ledgers, finishes or undoes what was interrupted, adopts running computes.
    pub async fn open(_config: ServiceConfig, _bucket: Bucket, _clients: SharedClients) -> Result<Arc<Self>> {
        todo!("open")
    }

    /// Finds a branch by its address. Reads memory only.
    ///
    /// # Errors
    /// `NotFound` with the nearest names.
    pub async fn find(&self, _endpoint: &EndpointName) -> Result<FoundEndpoint> {
        todo!("find")
    }

    /// The SCRAM-SHA-256 verifier of a role on a branch; `None` if it is unknown or may not log in.
    pub async fn verifier(&self, _branch: BranchId, _role: &str) -> Result<Option<String>> {
        todo!("verifier")
    }

    /// Makes the branch's compute answer, waking it if need be; any number of calls make one wake.
    ///
    /// # Cancel safety
    /// Safe: a wake once begun goes on.
    pub async fn wake(&self, _branch: BranchId) -> Result<AwakeUnit> {
        todo!("wake")
    }

    /// Keeps computes, uploads and unfinished operations moving until cancelled.
    pub async fn run(&self, _stop: CancellationToken) {
        todo!("run")
    }

    /// Suspends every compute, within the deadline as far as that is possible.
    pub async fn suspend_all(&self, _deadline: Duration) {
        todo!("suspend_all")
    }
}
