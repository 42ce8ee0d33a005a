//! The service: carries out acts, keeps computes as they should be, recovers what was interrupted.
//!
//! [`Service`] is one per node. An act is an operation in its project's ledger ([`crate::event::Plan`]), driven by
//! `saga`; computes are started and stopped by `compute`; `reconcile` compares what should be with what is, for ever.
//!
//! **Invariants.** Nothing lasting happens without an entry that begins it. A branch is sealed, stopped, moved or
//! deleted only under its lock. What a compute is doing is not recorded but found by looking.
//!
//! **Crash.** [`Service::open`] brings every operation that was begun to done (past its point of no return) or undone,
//! and adopts computes that still run.
//!
//! **Cancellation.** Acts run in tasks of their own: a caller that goes away does not stop them half-way.
//!
//! LOCK ORDER: the lock of a branch, then the tail of a ledger. No operation takes the locks of two branches, except
//! deleting a project, which takes them in the order of identifiers.

mod branches;
pub(crate) mod collect;
mod compute;
mod deploy;
mod diff;
mod drills;
#[cfg(test)]
pub(crate) mod fake;
mod imports;
mod owners;
mod past;
mod projects;
mod reconcile;
mod releases;
mod saga;
mod template;
#[cfg(test)]
mod tests;
mod upkeep;
mod uploads;
mod views;
mod visits;
mod wakes;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ebb_compute::postgres::{DATABASE, OWNER};
use ebb_storage::object_store::Bucket;
use ebb_types::{
    AllowList, BranchId, Clock, EndpointName, LayerId, NodeId, OperationId, ProjectId, ProjectName, SystemClock,
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::artifact::Artifacts;
use crate::catalog::{CATALOG, Catalog, ledger_name};
use crate::clients::SharedClients;
use crate::error::LocalContext as _;
use crate::event::Key;
use crate::ledger::Ledger;
use crate::machine::Standing;
use crate::node::{LayerPolicy, Line, LocalNode, Node};
use crate::nodes::{Nodes, Others};
use crate::secrets::SecretStore;
use crate::state::ProjectState;
use crate::{Error, Refusal, Result};

pub use collect::CollectPolicy;
use collect::Collector;
pub use compute::AwakeUnit;
use compute::Cell;
pub use diff::DiffRequest;
pub use owners::Place;
pub(crate) use views::{Reader, seconds_to_ms};

/// LIMIT: enough for the ledger, the journal and the WAL of one more shutdown; below it nothing new is begun.
pub const MIN_FREE_BYTES: u64 = 64 << 20;

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
    /// Bytes that must stay free on the disk of `data_dir`; work is refused below. Usually [`MIN_FREE_BYTES`].
    pub min_free_bytes: u64,
    /// What people call this node.
    pub node_name: String,
    /// How long after this node last renewed its record others may take over what it owns.
    pub node_ttl: Duration,
    /// How this machine keeps layers.
    pub layers: LayerPolicy,
    /// When what nothing needs is deleted.
    pub collect: CollectPolicy,
}

/// A branch that clients asked for by its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundEndpoint {
    /// The branch.
    pub branch: BranchId,
    /// The database meant where a client names none.
    pub default_database: String,
    /// How many backends its clients in transaction mode share, if it has its own number.
    pub pool_size: Option<u32>,
}

/// Who asks for an act.
#[derive(Debug, Clone)]
pub struct Caller {
    /// As receipts name them.
    pub actor: String,
    /// Their idempotency key.
    pub key: Option<Key>,
}

impl Caller {
    /// Ebb itself.
    pub fn ebb() -> Self {
        Self { actor: "ebb".to_owned(), key: None }
    }
}

/// An answer, and whether it is new: an idempotent repetition is not.
#[derive(Debug, Clone)]
pub struct Answer<T> {
    /// The answer.
    pub value: T,
    /// `false`: this was done before; nothing happened now.
    pub new: bool,
}

/// The timeline service of one node. Shared by the API, the proxy's adapter and the reconciler.
#[derive(Debug)]
pub struct Service {
    config: ServiceConfig,
    bucket: Bucket,
    clients: SharedClients,
    node: Arc<dyn Node>,
    nodes: Nodes,
    others: OnceLock<Arc<dyn Others>>,
    clock: Arc<dyn Clock>,
    catalog: Ledger<Catalog>,
    projects: RwLock<BTreeMap<ProjectId, Arc<Project>>>,
    /// Projects that a call is making or deleting right now: the reconciler keeps away from them.
    moving: Mutex<HashSet<ProjectId>>,
    secrets: SecretStore,
    artifacts: Artifacts,
    /// Layers known to be in the bucket.
    uploaded: Mutex<HashSet<LayerId>>,
    collector: Collector,
    /// When it was last looked for what other nodes have made.
    looked_at: tokio::sync::Mutex<Option<Instant>>,
    imports: imports::Imports,
    /// One drill at a time: each takes the room of a whole database.
    drilling: tokio::sync::Mutex<()>,
    /// Bytes of the files of images, which never change.
    image_sizes: Mutex<HashMap<LayerId, u64>>,
    visits: visits::Visits,
    wakes: wakes::Wakes,
    /// Something changed that the reconciler should look at.
    changed: Notify,
    /// The other nodes' records are to be looked at now.
    look_now: Notify,
    /// There may be operations that nobody carries out any more.
    left_behind: Notify,
    /// A layer was recorded that may have to be uploaded.
    layers_changed: Notify,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

/// A project that exists, as this node knows it.
#[derive(Debug)]
struct Project {
    id: ProjectId,
    name: ProjectName,
    /// This node.
    node: NodeId,
    /// The term ([`crate::nodes`]) in which this node was last seen to be the owner.
    term: AtomicU64,
    /// Held by whoever finds out whose it is.
    claiming: tokio::sync::Mutex<()>,
    /// When it was last looked for what other nodes have recorded.
    looked_at: tokio::sync::Mutex<Option<Instant>>,
    ledger: Ledger<ProjectState>,
    /// How many entries it had then. What came after, while this node was the owner, this process has recorded.
    entries_when_opened: u64,
    cells: Mutex<HashMap<BranchId, Arc<Cell>>>,
    /// Operations that tasks of this process carry out, and how many say so: see [`saga::Driven`].
    driven: Mutex<HashMap<OperationId, usize>>,
}

impl Project {
    fn cell(&self, branch: BranchId) -> Arc<Cell> {
        self.cells.lock().entry(branch).or_default().clone()
    }

    /// The branch's data as recorded.
    fn line(&self, branch: BranchId) -> Result<Line> {
        let state = self.ledger.state();
        let known = state.branch_by_id(branch)?;
        Ok(Line { branch, line: known.line, head: known.head, epoch: state.epoch() })
    }
}

impl Service {
    /// Opens the bucket's catalog and ledgers, finishes or undoes what was interrupted, adopts running computes.
    ///
    /// # Errors
    /// If the bucket or a ledger cannot be read. A single operation that cannot be finished yet is only logged.
    pub async fn open(config: ServiceConfig, bucket: Bucket, clients: SharedClients) -> Result<Arc<Self>> {
        let node = LocalNode::new(config.data_dir.clone(), config.exe.clone(), bucket.clone());
        let node = node.with_layers(config.layers.clone());
        Self::open_on(config, bucket, clients, Arc::new(node), Arc::new(SystemClock)).await
    }

    /// [`Service::open`] over a given machine and clock.
    ///
    /// # Errors
    /// As [`Service::open`].
    pub async fn open_on(
        config: ServiceConfig,
        bucket: Bucket,
        clients: SharedClients,
        node: Arc<dyn Node>,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>> {
        std::fs::create_dir_all(&config.data_dir).on("create", &config.data_dir)?;
        // What was being made when the last service ended is of no use to anyone.
        crate::files::remove_dir(&config.data_dir.join("tmp"))?;
        crate::node::remove_import_stages(&config.data_dir).await?;
        let secrets = SecretStore::open(&config.data_dir, bucket.clone())?;
        let artifacts = Artifacts::new(&config.data_dir, bucket.clone());
        artifacts.sweep()?;
        let nodes = Nodes::open(&config.data_dir, config.node_name.clone(), bucket.clone(), config.node_ttl)?;
        nodes.renew().await?;
        nodes.look().await?;
        let catalog = Ledger::open(bucket.clone(), CATALOG, clock.clone()).await?;
        let service = Arc::new(Self {
            config,
            bucket,
            clients,
            node,
            nodes,
            others: OnceLock::new(),
            clock,
            catalog,
            projects: RwLock::default(),
            moving: Mutex::default(),
            secrets,
            artifacts,
            uploaded: Mutex::default(),
            collector: Collector::default(),
            looked_at: tokio::sync::Mutex::default(),
            imports: imports::Imports::default(),
            drilling: tokio::sync::Mutex::default(),
            image_sizes: Mutex::default(),
            visits: visits::Visits::default(),
            wakes: wakes::Wakes::default(),
            changed: Notify::new(),
            look_now: Notify::new(),
            left_behind: Notify::new(),
            layers_changed: Notify::new(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        service.open_projects().await?;
        if let Err(error) = service.node.end_drills().await {
            service.report("removing interrupted drills", &error);
        }
        service.adopt_computes().await;
        service.claim_known().await?;
        service.recover().await;
        service.prepare_template();
        Ok(service)
    }

    async fn open_projects(&self) -> Result<()> {
        let catalog = self.catalog.state();
        for (id, listed) in &catalog.projects {
            if listed.standing != Standing::Reserved {
                let project = self.open_project(*id, listed.name.clone()).await?;
                self.projects.write().insert(*id, Arc::new(project));
            }
        }
        Ok(())
    }

    async fn open_project(&self, id: ProjectId, name: ProjectName) -> Result<Project> {
        let ledger = Ledger::open(self.bucket.clone(), ledger_name(id), self.clock.clone()).await?;
        Ok(Project {
            id,
            name,
            node: self.nodes.me(),
            term: AtomicU64::new(u64::MAX),
            claiming: tokio::sync::Mutex::default(),
            looked_at: tokio::sync::Mutex::default(),
            entries_when_opened: ledger.entries().await,
            ledger,
            cells: Mutex::default(),
            driven: Mutex::default(),
        })
    }

    /// Finds a branch by its address. Reads memory only, unless it is not there and another node may have made it.
    ///
    /// # Errors
    /// `NotFound` with the nearest names.
    pub async fn find(&self, endpoint: &EndpointName) -> Result<FoundEndpoint> {
        match self.find_known(endpoint) {
            Err(error) if !self.look_for(endpoint).await? => Err(error),
            Err(_) => self.find_known(endpoint),
            found => found,
        }
    }

    fn find_known(&self, endpoint: &EndpointName) -> Result<FoundEndpoint> {
        let at = endpoint.branch_ref();
        let project = self.project(at.project.as_str())?;
        let state = project.ledger.state();
        let (branch, known) = state.branch(at.branch.as_str())?;
        Ok(FoundEndpoint { branch, default_database: DATABASE.to_owned(), pool_size: known.pool_size })
    }

    /// From where clients may connect to a branch. Where another node owns it, no older than [`Service::place`] makes it.
    ///
    /// # Errors
    /// If the branch does not exist.
    pub fn allowed(&self, branch: BranchId) -> Result<AllowList> {
        Ok(self.project_of(branch)?.ledger.state().branch_by_id(branch)?.allow.clone())
    }

    /// The SCRAM-SHA-256 verifier of a role on a branch; `None` if it is unknown or may not log in.
    ///
    /// The image's own roles count: a restore brings its passwords back with it. Only a cluster that has never run
    /// yet has none; then the owner's first verifier is the one it will get.
    ///
    /// # Errors
    /// If the branch does not exist, or its image cannot be reached.
    pub async fn verifier(&self, branch: BranchId, role: &str) -> Result<Option<String>> {
        let project = self.project_of(branch)?;
        let roles = self.node.roles(&project.line(branch)?).await?;
        let first = || project.ledger.state().facts().map(|facts| facts.verifier.clone());
        match roles.as_ref().map(|roles| roles.get(role)) {
            Some(Some(Some(verifier))) => Ok(Some(verifier.clone())),
            // Known, without a password yet: the owner gets the first one at the next wake.
            None | Some(Some(None)) if role == OWNER => Ok(Some(first()?)),
            _ => Ok(None),
        }
    }

    /// A project that exists, by name.
    fn project(&self, name: &str) -> Result<Arc<Project>> {
        let id = self.catalog.state().find(name)?;
        let found = self.projects.read().get(&id).cloned();
        found.ok_or_else(|| Refusal::NoProject { name: name.to_owned(), near: Vec::new() }.into())
    }

    /// The project a branch is in.
    fn project_of(&self, branch: BranchId) -> Result<Arc<Project>> {
        let projects = self.projects.read();
        let found = projects.values().find(|project| project.ledger.state().branches.contains_key(&branch)).cloned();
        found.ok_or_else(|| Refusal::Gone(branch).into())
    }

    fn all_projects(&self) -> Vec<Arc<Project>> {
        self.projects.read().values().cloned().collect()
    }

    /// The projects that this node acts for, as far as it knows.
    fn own_projects(&self) -> Vec<Arc<Project>> {
        self.projects.read().values().filter(|project| project.is_ours()).cloned().collect()
    }

    /// Refuses to begin what needs room on disk when there is little left.
    fn check_disk(&self) -> Result<()> {
        let free = self.node.free_bytes()?;
        metrics::gauge!("ebb_timeline_disk_free_bytes").set(free as f64);
        if free >= self.config.min_free_bytes {
            return Ok(());
        }
        Err(Error::DiskFull { path: self.config.data_dir.clone(), free, wanted: self.config.min_free_bytes })
    }

    /// Runs an act in a task of its own, so that it goes on if the caller goes away.
    async fn tracked<T: Send + 'static>(
        &self,
        act: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        if self.stopping.is_cancelled() {
            return Err(Error::Stopping);
        }
        self.tasks.spawn(work).await.map_err(|_| Error::Lost(act))?
    }

    /// The fault of a panicked or failed part, said once.
    fn report(&self, what: &'static str, error: &Error) {
        metrics::counter!("ebb_timeline_background_failures_total").increment(1);
        tracing::warn!(what, error = error.chain(), "background work failed; it will be tried again");
    }
}
