//! What one machine does with data: volumes, layers and processes, behind one seam.
//!
//! [`Node`] is all that operations need of the machine they run on; [`LocalNode`] does it for real. Operations are
//! tested over a node in memory.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ebb_compute::control::{Durability, Status};
use ebb_compute::manager::{ArchiveSpec, Unit, UnitSpec};
use ebb_compute::postgres::{self, Installation, OWNER};
use ebb_storage::archive::{Archive, Owner};
use ebb_storage::layer::Manifest;
use ebb_storage::node::NodeStore;
use ebb_storage::object_store::{Bucket, BucketAt, Put};
pub use ebb_storage::volume::Sealed;
use ebb_storage::volume::{Volume, VolumeDirs};
use ebb_types::{BranchId, LayerId, Lsn};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;

use crate::decide::Found;
use crate::error::LocalContext as _;
use crate::event::Replay;
use crate::{Error, Refusal, Result, files, migrate};

pub mod drill;
mod dump;
mod foreign;
mod import;
mod pending;
mod rehearse;
mod replay;
mod visit;

pub use rehearse::Rehearsing;
pub use visit::{Visited, Visiting};

pub(crate) use dump::remove_unfinished_dump;
pub use foreign::Foreign;
pub(crate) use import::remove_import_stages;
pub use import::{ImportFrom, ImportJob, ImportRequest};

/// SCRAM verifiers by role; `None` for a role without a password.
pub type Roles = BTreeMap<String, Option<String>>;

/// A branch's data as the ledger has it: what a volume is made from, and which volumes are stale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The branch.
    pub branch: BranchId,
    /// Which of its lines of history; a volume of another line is stale.
    pub line: u64,
    /// The newest recorded seal on it.
    pub head: LayerId,
    /// The owner's epoch; a volume of another epoch is stale, too: another node may have been awake since.
    pub epoch: u64,
}

/// What a compute is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Where its data is.
    pub data: Line,
    /// Major version of its Postgres.
    pub pg_major: u32,
    /// A position that all WAL of its head lies before, where known.
    pub head_end: Option<Lsn>,
    /// The line's seals before the head, newest first, each with such a position where it is known.
    pub earlier: Vec<(LayerId, Option<Lsn>)>,
    /// Whether this process has begun the line: then no other node was ever awake on it.
    pub begun_here: bool,
    /// Whether its head is another branch's image: this branch has sealed nothing yet.
    pub fork: bool,
    /// What its commits wait for.
    pub durability: Durability,
    /// The owner's first verifier, for a cluster in which that role has none.
    pub verifier: String,
}

/// What operations need of a machine. Every method may be called again after it failed or was cut off.
#[async_trait]
pub trait Node: drill::Drills + Foreign + Rehearsing + Visiting + Debug + Send + Sync + 'static {
    /// The newest installed major version of Postgres, or the wanted one if it is installed.
    fn pg_major(&self, wanted: Option<u32>) -> Result<u32>;

    /// The layer that projects of this version start from: in the bucket, the same for every node.
    async fn template(&self, pg_major: u32) -> Result<LayerId>;

    /// Finds the running compute of a branch: its socket.
    async fn adopt(&self, branch: BranchId) -> Result<Option<PathBuf>>;

    /// Starts a compute and waits until it answers: its socket. A stale volume is replaced by a fresh one on the head.
    async fn start(&self, start: &Start) -> Result<PathBuf>;

    /// Makes a layer of what the branch's volume holds, whether or not its compute runs: the layer that now holds it
    /// all, or `None` if this node has no volume of that line (the recorded head is all there is).
    async fn seal(&self, data: &Line, id: LayerId) -> Result<Option<Sealed>>;

    /// Stops the compute, if one runs, and seals.
    async fn stop(&self, data: &Line, id: LayerId) -> Result<Option<Sealed>>;

    /// Waits until the archive has all WAL that the running compute has written so far.
    async fn ship(&self, branch: BranchId) -> Result<()>;

    /// Changes what commits of the running compute wait for. When this returns, those acknowledged from then on have it.
    async fn set_durability(&self, branch: BranchId, durability: Durability) -> Result<()>;

    /// Shuts owners of earlier epochs out of the archive of a line.
    async fn fence_wal(&self, data: &Line) -> Result<()>;

    /// Deletes what the archive of a line has from before everything that is replayed from this position on.
    async fn forget_wal(&self, branch: BranchId, line: u64, needed: Lsn) -> Result<()>;

    /// Makes the layer of a moment between seals, complete on this node: a position that all its WAL lies before.
    async fn replay(&self, replay: &Replay, like: &Start) -> Result<Option<Lsn>>;

    /// Ends the compute, if one runs, without sealing.
    async fn discard(&self, branch: BranchId) -> Result<()>;

    /// Returns when the compute that was started or adopted last is gone.
    async fn gone(&self, branch: BranchId);

    /// How the compute is, if it answers.
    async fn status(&self, branch: BranchId) -> Option<Status>;

    /// Where the running compute is in its WAL and its transactions.
    async fn positions(&self, branch: BranchId) -> Result<Found>;

    /// Runs the pending migrations on the running compute.
    async fn migrate(&self, branch: BranchId, order: &migrate::Order) -> Result<migrate::Migrated>;

    /// Removes the branch's volume (its sealed layers stay). The compute must not run.
    async fn remove_volume(&self, branch: BranchId) -> Result<()>;

    /// Removes all that this node has of the branch (its sealed layers stay). The compute must not run.
    async fn remove_branch(&self, branch: BranchId) -> Result<()>;

    /// The roles of a branch, awake or not; `None` if its image never published any.
    async fn roles(&self, data: &Line) -> Result<Option<Roles>>;

    /// Makes a layer's whole chain present on this node.
    async fn fetch(&self, layer: LayerId) -> Result<()>;

    /// Writes a layer's image out as a plain data directory: its bytes.
    async fn export(&self, layer: LayerId, dir: &Path) -> Result<u64>;

    /// The layers of a chain that this node might have to upload, oldest first: empty if the layer is not local.
    async fn chain(&self, layer: LayerId) -> Result<Vec<LayerId>>;

    /// Uploads a local layer, unless the bucket has it.
    async fn upload(&self, layer: LayerId) -> Result<()>;

    /// Where recovery of a layer's image begins, if the layer is local.
    async fn redo(&self, layer: LayerId) -> Option<Lsn>;

    /// Bytes free for data on this machine.
    fn free_bytes(&self) -> Result<u64>;

    /// The templates in the bucket, by Postgres major version. Waits until none is being made: the layer of one that was
    /// begun before is answered, or was given up.
    async fn templates(&self) -> Result<Vec<(u32, LayerId)>>;

    /// The layers that are complete on this machine.
    async fn local_layers(&self) -> Result<BTreeSet<LayerId>>;

    /// The branches that this machine has anything of.
    async fn local_branches(&self) -> Result<BTreeSet<BranchId>>;

    /// The layers that the branch's volume lies on, or is about to: see [`ebb_storage::node::volume_bases`].
    async fn volume_bases(&self, branch: BranchId) -> Result<BTreeSet<LayerId>>;

    /// The whole chain of a layer, oldest first, wherever it can be read.
    async fn whole_chain(&self, layer: LayerId) -> Result<Vec<LayerId>>;

    /// Removes this machine's copy of a layer.
    async fn remove_layer(&self, layer: LayerId) -> Result<()>;

    /// Bytes that the branch's volume has on disk beyond its newest seal.
    async fn unsealed_bytes(&self, branch: BranchId) -> Result<u64>;
}

/// How this machine keeps layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPolicy {
    /// Where computes fetch what this machine lacks. Without it an image is made whole before it wakes.
    pub bucket: Option<BucketAt>,
    /// Whether what an awake branch lacks is fetched in the background, so that it gets independent of the bucket.
    pub hydrate: bool,
    /// Bytes that layers may take on disk; those in use, and those the bucket does not have, may take more. `None`: half of
    /// the file system.
    pub cache_limit: Option<u64>,
}

impl Default for LayerPolicy {
    fn default() -> Self {
        Self { bucket: None, hydrate: true, cache_limit: None }
    }
}

/// LIMIT: looking through all layers reads every directory of theirs.
const TRIM_EVERY: Duration = Duration::from_secs(60);

/// Beside a volume that still lacks WAL which it is to replay.
const UNFINISHED: &str = "unfinished";

/// LIMIT: the shipper is a second behind, and a bucket that hiccups is tried again.
const SHIP_DEADLINE: Duration = Duration::from_secs(30);

/// How often it is looked whether WAL has arrived.
const SHIP_LOOK_AGAIN: Duration = Duration::from_millis(25);

/// The machine this process runs on.
#[derive(Debug)]
pub struct LocalNode {
    data_dir: PathBuf,
    exe: PathBuf,
    bucket: Bucket,
    store: NodeStore,
    units: Mutex<HashMap<BranchId, Unit>>,
    /// Whose turn it is to open a branch's volume, to start a unit that will, or to remove it. See [`LocalNode::turn`].
    turns: Mutex<HashMap<BranchId, Arc<tokio::sync::Mutex<()>>>>,
    /// Layers sealed here that may not be complete, and whose volume they come from.
    pending: Mutex<HashMap<LayerId, BranchId>>,
    /// Looked for once: asking each server for its version is a process, and has no place in a wake.
    installations: OnceLock<Vec<Installation>>,
    policy: LayerPolicy,
    /// When layers were last looked through for what may be given up. Held by whoever does it.
    trimmed: tokio::sync::Mutex<Option<Instant>>,
    /// One template is made at a time.
    templates: tokio::sync::Mutex<HashMap<u32, LayerId>>,
}

/// What `templates/<major>` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Template {
    layer: LayerId,
    version: String,
}

impl LocalNode {
    /// Names a machine's parts; touches nothing.
    pub fn new(data_dir: PathBuf, exe: PathBuf, bucket: Bucket) -> Self {
        let store = NodeStore::new(&data_dir, bucket.clone());
        Self {
            data_dir,
            exe,
            bucket,
            store,
            units: Mutex::default(),
            turns: Mutex::default(),
            pending: Mutex::default(),
            installations: OnceLock::new(),
            policy: LayerPolicy::default(),
            trimmed: tokio::sync::Mutex::default(),
            templates: tokio::sync::Mutex::default(),
        }
    }

    /// Keeps layers in this way.
    pub fn with_layers(self, policy: LayerPolicy) -> Self {
        Self { policy, ..self }
    }

    fn branch_dir(&self, branch: BranchId) -> PathBuf {
        self.data_dir.join("branches").join(branch.to_string())
    }

    fn dirs(&self, branch: BranchId) -> VolumeDirs {
        VolumeDirs {
            layers: self.store.layers_dir().to_owned(),
            branch: self.branch_dir(branch),
            source: Some(self.store.lazy_layers().clone()),
        }
    }

    fn unit(&self, branch: BranchId) -> Option<Unit> {
        self.units.lock().get(&branch).cloned()
    }

    /// Waits until nobody else on this machine is about to open the branch's volume, to start a unit on it, or to remove
    /// it: only one process, and only one part of it, can have a volume open, and whoever comes second would fail.
    ///
    /// LOCK ORDER: nobody who holds a turn waits for a layer, or for another branch's turn.
    async fn turn(&self, branch: BranchId) -> OwnedMutexGuard<()> {
        let turn = self.turns.lock().entry(branch).or_default().clone();
        turn.lock_owned().await
    }

    /// Forgets a unit that failed to answer because it is gone; otherwise its failure stands.
    async fn unless_gone(&self, branch: BranchId, error: ebb_compute::Error) -> Result<()> {
        let gone = matches!(error, ebb_compute::Error::Gone)
            || matches!(Unit::adopt(&self.branch_dir(branch)).await, Ok(None));
        if !gone {
            return Err(error.into());
        }
        self.units.lock().remove(&branch);
        Ok(())
    }

    fn installations(&self) -> &[Installation] {
        self.installations.get_or_init(postgres::installations)
    }

    fn installation(&self, pg_major: u32) -> Result<Installation> {
        let found = self.installations();
        let have = found.iter().map(|one| one.major.to_string()).collect::<Vec<_>>().join(", ");
        found.iter().find(|one| one.major == pg_major).cloned().ok_or_else(|| {
            Refusal::Invalid(format!("PostgreSQL {pg_major} is not installed on this node (it has: {have})")).into()
        })
    }

    async fn make_template(&self, pg_major: u32) -> Result<LayerId> {
        let key = template_key(pg_major);
        match self.bucket.get(&key).await {
            Ok(bytes) => return read_template(&key, &bytes),
            Err(ebb_storage::Error::NoSuchObject { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let installation = self.installation(pg_major)?;
        let temp = self.data_dir.join("tmp");
        fs::create_dir_all(&temp).on("create", &temp)?;
        let cluster = temp.join(format!("template-{pg_major}-{:016x}", rand::random::<u64>()));
        let imported = async {
            postgres::make_template(&installation, &cluster).await?;
            Ok::<_, Error>(self.store.import(&cluster).await?)
        };
        let imported = imported.await;
        files::remove_dir(&cluster)?;
        let layer = imported?;
        self.store.upload(layer).await?;
        let template = Template { layer, version: installation.version };
        let bytes = serde_json::to_vec(&template).expect("a template is plain data");
        match self.bucket.put_if_absent(&key, bytes.into()).await? {
            Put::Created => Ok(layer),
            // Another node was first: its template is everybody's.
            Put::Exists => read_template(&key, &self.bucket.get(&key).await?),
        }
    }

    /// Whether the branch has a volume of this line and epoch on this node.
    ///
    /// INVARIANT: `line` is written before a volume is made, and changed only while there is none. A volume without it
    /// is therefore no crash of ours; it may hold commits, so it is reported rather than replaced.
    fn has_volume(&self, data: &Line) -> Result<bool> {
        if !Volume::exists(&self.dirs(data.branch)) {
            return Ok(false);
        }
        let file = self.line_file(data.branch);
        let text = fs::read_to_string(&file).on("read", &file)?;
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(line)), Some(Ok(epoch))) => Ok((line, epoch) == (data.line, data.epoch)),
            // From before there were epochs, hence of the first.
            (Some(Ok(line)), None) => Ok((line, 1) == (data.line, data.epoch)),
            _ => {
                let why = "it does not hold the numbers of a line and an epoch".to_owned();
                Err(Error::Storage(ebb_storage::Error::Corrupt { what: file.to_string_lossy().into_owned(), why }))
            }
        }
    }

    fn line_file(&self, branch: BranchId) -> PathBuf {
        self.branch_dir(branch).join("line")
    }

    /// Removes the volume, and the roles that its compute had published: a new volume would keep them otherwise.
    async fn clear(&self, branch: BranchId) -> Result<()> {
        let (dirs, turn) = (self.dirs(branch), self.turn(branch).await);
        blocking("removing a volume", move || {
            let _turn = turn;
            Volume::remove(&dirs)?;
            files::remove_file(&dirs.branch.join("roles.json"))
        })
        .await
    }

    /// Makes the volume, unless there is one of this line and epoch. What is there of another is stale, and removed.
    ///
    /// A line whose archive goes on behind its head was awake on a node that is gone: its last commits are replayed.
    async fn ensure_volume(&self, start: &Start) -> Result<()> {
        let data = &start.data;
        let unfinished = self.branch_dir(data.branch).join(UNFINISHED);
        if self.has_volume(data)? && !unfinished.exists() {
            return self.find_base(data.branch).await;
        }
        let (openable, archived) = tokio::join!(self.make_openable(data.head), self.archived(start));
        let (head, tail) = match openable {
            Err(Error::Storage(ebb_storage::Error::NoSuchLayer(lost))) => {
                self.without_head(start, lost, archived?).await?
            }
            openable => {
                openable?;
                (data.head, self.tail(start, archived?).await?)
            }
        };
        let dir = self.branch_dir(data.branch);
        fs::create_dir_all(&dir).on("create", &dir)?;
        self.clear(data.branch).await?;
        let Some(tail) = tail else {
            files::remove_file(&unfinished)?;
            return self.make_volume(data, head, start.fork).await;
        };
        // CRASH: a volume with this beside it is made anew.
        files::replace(&unfinished, b"")?;
        self.make_volume(data, head, start.fork).await?;
        self.prepare_replay(data.branch, Some(&tail), "recovery.signal").await?;
        files::remove_file(&unfinished)
    }

    /// Makes a volume of this line on a layer, in the branch's directory, which has none.
    async fn make_volume(&self, data: &Line, base: LayerId, fork: bool) -> Result<()> {
        files::replace(&self.line_file(data.branch), format!("{} {}", data.line, data.epoch).as_bytes())?;
        let dirs = self.dirs(data.branch);
        let make = if fork { Volume::create_fork } else { Volume::create };
        blocking("making a volume", move || Ok(make(&dirs, base)?)).await
    }

    /// Brings what is needed to start from a layer, its roles among it; pages come when they are read.
    async fn make_openable(&self, layer: LayerId) -> Result<()> {
        self.settle(layer).await?;
        match self.policy.bucket {
            Some(_) => Ok(self.store.ensure_openable(layer).await?),
            None => Ok(self.store.ensure_local(layer).await?),
        }
    }

    /// Brings back what a volume lies on, if this machine does not have it any more.
    async fn find_base(&self, branch: BranchId) -> Result<()> {
        for base in self.volume_bases(branch).await? {
            if self.store.layers_dir().join(base.to_string()).join("manifest").exists() {
                continue;
            }
            // A seal that is not finished has none yet. If it is another that lacks, opening the volume tells.
            if let Err(error) = self.store.ensure_openable(base).await {
                tracing::debug!(%branch, %base, %error, "a layer that a volume lies on is not here");
            }
        }
        Ok(())
    }

    /// Gives up layers if they take too much room.
    async fn trim(&self) -> Result<()> {
        let Ok(mut trimmed) = self.trimmed.try_lock() else { return Ok(()) };
        if trimmed.is_some_and(|last| last.elapsed() < TRIM_EVERY) {
            return Ok(());
        }
        let limit = match self.policy.cache_limit {
            Some(limit) => limit,
            None => {
                let found = rustix::fs::statvfs(&self.data_dir).map_err(std::io::Error::from);
                let found = found.on("look at", &self.data_dir)?;
                found.f_blocks.saturating_mul(found.f_frsize) / 2
            }
        };
        let mut kept = BTreeSet::new();
        for branch in self.local_branches().await? {
            kept.extend(self.volume_bases(branch).await?);
        }
        self.store.trim(limit, &kept).await?;
        *trimmed = Some(Instant::now());
        Ok(())
    }

    /// Where a line's WAL is shipped to.
    fn archive(&self, data: &Line) -> Option<ArchiveSpec> {
        let bucket = self.policy.bucket.clone()?;
        Some(ArchiveSpec { bucket, branch: data.branch, line: data.line, epoch: data.epoch })
    }

    fn spec(&self, start: &Start, installation: Installation) -> UnitSpec {
        UnitSpec {
            branch: start.data.branch,
            branch_dir: self.branch_dir(start.data.branch),
            layers_dir: self.store.layers_dir().to_owned(),
            pg_bin: installation.bin,
            settings: Vec::new(),
            fork: start.fork,
            recovery: None,
            bucket: self.policy.bucket.clone(),
            hydrate: self.policy.hydrate,
            archive: self.archive(&start.data),
            durability: start.durability,
            initial_roles: vec![(OWNER.to_owned(), start.verifier.clone())],
        }
    }

    async fn manifest(&self, layer: LayerId) -> Result<Option<Manifest>> {
        match self.store.manifest(layer).await {
            Ok(manifest) => Ok(Some(manifest)),
            Err(ebb_storage::Error::NoSuchLayer(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[async_trait]
impl Node for LocalNode {
    fn pg_major(&self, wanted: Option<u32>) -> Result<u32> {
        match wanted {
            Some(wanted) => Ok(self.installation(wanted)?.major),
            None => match self.installations().last() {
                Some(newest) => Ok(newest.major),
                None => Err(ebb_compute::Error::NoPostgres { looked: Vec::new() }.into()),
            },
        }
    }

    async fn template(&self, pg_major: u32) -> Result<LayerId> {
        let mut known = self.templates.lock().await;
        if let Some(layer) = known.get(&pg_major) {
            return Ok(*layer);
        }
        let layer = self.make_template(pg_major).await?;
        known.insert(pg_major, layer);
        Ok(layer)
    }

    async fn adopt(&self, branch: BranchId) -> Result<Option<PathBuf>> {
        self.find_pending(branch).await?;
        let unit = Unit::adopt(&self.branch_dir(branch)).await?;
        let socket = unit.as_ref().map(Unit::socket);
        match unit {
            Some(unit) => self.units.lock().insert(branch, unit),
            None => self.units.lock().remove(&branch),
        };
        Ok(socket)
    }

    async fn start(&self, start: &Start) -> Result<PathBuf> {
        let branch = start.data.branch;
        let installation = self.installation(start.pg_major)?;
        self.ensure_volume(start).await?;
        let mut spec = self.spec(start, installation);
        let replay = Some(self.replay_dir(branch)).filter(|dir| dir.exists());
        if let Some(dir) = &replay {
            spec.recovery = Some(replay::recovery(dir, None)?);
        }
        // Someone may be finishing what the last unit had begun to seal when it was lost.
        let _turn = self.turn(branch).await;
        let unit = Unit::start(&self.exe, &spec).await?;
        if let Some(dir) = replay {
            // Postgres has recovered, and never asks for it again.
            files::remove_dir(&dir)?;
        }
        let socket = unit.socket();
        self.units.lock().insert(branch, unit);
        Ok(socket)
    }

    async fn seal(&self, data: &Line, id: LayerId) -> Result<Option<Sealed>> {
        if let Some(unit) = self.unit(data.branch) {
            match unit.seal(id).await {
                Ok(sealed) => {
                    self.note_sealed(sealed.layer, data.branch);
                    return Ok(Some(sealed));
                }
                Err(error) => self.unless_gone(data.branch, error).await?,
            }
        }
        // What is still to be replayed is in the archive, and no image yet.
        if !self.has_volume(data)? || self.replay_dir(data.branch).exists() {
            return Ok(None);
        }
        // A compute that was lost leaves a volume with more than its last seal: crash-consistent, so a layer as it is.
        let (dirs, turn) = (self.dirs(data.branch), self.turn(data.branch).await);
        blocking("sealing a volume", move || {
            let _turn = turn;
            Ok(Some(Volume::open(&dirs)?.seal(id)?))
        })
        .await
    }

    async fn stop(&self, data: &Line, id: LayerId) -> Result<Option<Sealed>> {
        let Some(unit) = self.unit(data.branch) else {
            return self.seal(data, id).await;
        };
        match unit.stop(id).await {
            Ok(sealed) => {
                self.units.lock().remove(&data.branch);
                Ok(Some(sealed))
            }
            Err(error) => {
                self.unless_gone(data.branch, error).await?;
                self.seal(data, id).await
            }
        }
    }

    async fn ship(&self, branch: BranchId) -> Result<()> {
        // What is shut down has shipped all it had.
        let Some(unit) = self.unit(branch) else { return Ok(()) };
        let written = migrate::flushed(&unit.socket()).await?;
        let deadline = Instant::now() + SHIP_DEADLINE;
        while Instant::now() < deadline {
            let Some(shipping) = unit.status().await?.shipping else { return Ok(()) };
            if shipping.shipped.is_some_and(|shipped| shipped >= written) {
                return Ok(());
            }
            tokio::time::sleep(SHIP_LOOK_AGAIN).await;
        }
        Err(Error::Deadline("waiting until the bucket has all WAL"))
    }

    async fn fence_wal(&self, data: &Line) -> Result<()> {
        let archive = Archive::new(self.bucket.clone(), data.branch, data.line);
        Ok(archive.fence(Owner::new(data.epoch)).await?)
    }

    async fn forget_wal(&self, branch: BranchId, line: u64, needed: Lsn) -> Result<()> {
        let archive = Archive::new(self.bucket.clone(), branch, line);
        let stretches = archive.stretches().await?;
        if let Some(first) = stretches.iter().rev().find(|stretch| stretch.start <= needed) {
            archive.remove_before(first.number).await?;
        }
        Ok(())
    }

    async fn set_durability(&self, branch: BranchId, durability: Durability) -> Result<()> {
        match self.unit(branch) {
            Some(unit) => Ok(unit.set_durability(durability).await?),
            None => Ok(()),
        }
    }

    async fn replay(&self, replay: &Replay, like: &Start) -> Result<Option<Lsn>> {
        self.replay_here(replay, like).await
    }

    async fn discard(&self, branch: BranchId) -> Result<()> {
        let unit = match self.unit(branch) {
            Some(unit) => Some(unit),
            None => Unit::adopt(&self.branch_dir(branch)).await?,
        };
        if let Some(unit) = unit {
            match unit.discard().await {
                Ok(()) => {}
                Err(error) => self.unless_gone(branch, error).await?,
            }
        }
        self.units.lock().remove(&branch);
        Ok(())
    }

    async fn gone(&self, branch: BranchId) {
        if let Some(unit) = self.unit(branch) {
            unit.gone().await;
        }
    }

    async fn status(&self, branch: BranchId) -> Option<Status> {
        self.unit(branch)?.status().await.ok()
    }

    async fn positions(&self, branch: BranchId) -> Result<Found> {
        match self.unit(branch) {
            Some(unit) => migrate::positions(&unit.socket()).await,
            None => Err(ebb_compute::Error::Gone.into()),
        }
    }

    async fn migrate(&self, branch: BranchId, order: &migrate::Order) -> Result<migrate::Migrated> {
        match self.unit(branch) {
            Some(unit) => migrate::run(&unit.socket(), order).await,
            None => Err(ebb_compute::Error::Gone.into()),
        }
    }

    async fn remove_volume(&self, branch: BranchId) -> Result<()> {
        self.clear(branch).await
    }

    async fn remove_branch(&self, branch: BranchId) -> Result<()> {
        self.clear(branch).await?;
        files::remove_dir(&self.branch_dir(branch))?;
        self.turns.lock().remove(&branch);
        Ok(())
    }

    async fn roles(&self, data: &Line) -> Result<Option<Roles>> {
        let of_branch = self.branch_dir(data.branch).join("roles.json");
        if let Some(unit) = self.unit(data.branch)
            && let Err(error) = unit.publish_roles().await
        {
            // One that ends has published them already.
            tracing::debug!(%error, "roles are taken as they were published last");
        }
        if self.has_volume(data)?
            && let Some(roles) = read_roles(&of_branch)?
        {
            return Ok(Some(roles));
        }
        // On a node that has nothing yet, or a part: without the image's own verifiers an old password might be let in.
        self.make_openable(data.head).await?;
        read_roles(&self.store.layers_dir().join(data.head.to_string()).join("roles.json"))
    }

    async fn fetch(&self, layer: LayerId) -> Result<()> {
        self.settle(layer).await?;
        Ok(self.store.ensure_local(layer).await?)
    }

    async fn export(&self, layer: LayerId, dir: &Path) -> Result<u64> {
        self.fetch(layer).await?;
        self.store.export(layer, dir).await?;
        let dir = dir.to_owned();
        blocking("counting an export", move || files::tree_bytes(&dir)).await
    }

    async fn chain(&self, layer: LayerId) -> Result<Vec<LayerId>> {
        self.settle(layer).await?;
        Ok(self.manifest(layer).await?.map(|manifest| manifest.chain).unwrap_or_default())
    }

    async fn upload(&self, layer: LayerId) -> Result<()> {
        self.settle(layer).await?;
        self.store.upload(layer).await?;
        if let Err(error) = self.trim().await {
            tracing::warn!(error = error.chain(), "layers that may be given up were not looked for");
        }
        Ok(())
    }

    async fn redo(&self, layer: LayerId) -> Option<Lsn> {
        self.settle(layer).await.ok()?;
        self.manifest(layer).await.ok()?.map(|manifest| manifest.image.redo)
    }

    fn free_bytes(&self) -> Result<u64> {
        let found = rustix::fs::statvfs(&self.data_dir).map_err(std::io::Error::from).on("look at", &self.data_dir)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    async fn templates(&self) -> Result<Vec<(u32, LayerId)>> {
        let known = self.templates.lock().await;
        let mut templates: BTreeMap<u32, LayerId> = known.iter().map(|(&major, &layer)| (major, layer)).collect();
        // Every version is asked for by name, besides the listing: a template that a listing lacks must not be lost.
        let listed = self.bucket.list("templates/", None).await?;
        let listed = listed.iter().filter_map(|object| object.key.strip_prefix("templates/")?.parse().ok());
        let majors: BTreeSet<u32> = listed.chain(ebb_storage::pg_files::PG_MAJORS).collect();
        for major in majors {
            if let Entry::Vacant(unknown) = templates.entry(major) {
                let key = template_key(major);
                match self.bucket.get(&key).await {
                    Ok(bytes) => drop(unknown.insert(read_template(&key, &bytes)?)),
                    Err(ebb_storage::Error::NoSuchObject { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(templates.into_iter().collect())
    }

    async fn local_layers(&self) -> Result<BTreeSet<LayerId>> {
        Ok(self.store.local_layers().await?)
    }

    async fn local_branches(&self) -> Result<BTreeSet<BranchId>> {
        let branches = self.data_dir.join("branches");
        blocking("listing branches", move || Ok(ebb_storage::node::local_branches(&branches)?)).await
    }

    async fn volume_bases(&self, branch: BranchId) -> Result<BTreeSet<LayerId>> {
        let dir = self.branch_dir(branch);
        blocking("looking at a volume", move || Ok(ebb_storage::node::volume_bases(&dir)?)).await
    }

    async fn whole_chain(&self, layer: LayerId) -> Result<Vec<LayerId>> {
        self.settle(layer).await?;
        Ok(self.store.chain(layer).await?)
    }

    async fn remove_layer(&self, layer: LayerId) -> Result<()> {
        Ok(self.store.remove_local(layer).await?)
    }

    async fn unsealed_bytes(&self, branch: BranchId) -> Result<u64> {
        let dir = self.branch_dir(branch);
        blocking("measuring a volume", move || Ok(ebb_storage::node::upper_bytes(&dir)?)).await
    }
}

fn template_key(pg_major: u32) -> String {
    format!("templates/{pg_major}")
}

pub(crate) fn read_template(key: &str, bytes: &[u8]) -> Result<LayerId> {
    let template: Template = serde_json::from_slice(bytes).map_err(|error| {
        Error::Storage(ebb_storage::Error::Corrupt { what: format!("object {key:?}"), why: error.to_string() })
    })?;
    Ok(template.layer)
}

fn read_roles(path: &Path) -> Result<Option<Roles>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            let what = path.to_string_lossy().into_owned();
            Error::Storage(ebb_storage::Error::Corrupt { what, why: error.to_string() })
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).on("read", path),
    }
}

async fn blocking<T: Send + 'static>(
    act: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Lost(act))?
}

#[cfg(test)]
mod tests;
