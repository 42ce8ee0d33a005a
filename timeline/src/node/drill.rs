//! A point restored out of the bucket alone, and looked at from all sides.
//!
//! Everything happens below `drills/<name>/` of the data directory: layers, volume, unit, all of its own, over a view of
//! the bucket that counts what is read and takes no writes. Nothing that this machine has already is used, so that what a
//! drill shows is true of a machine that has nothing.
//!
//! ```text
//!   start ── objects ── pages ── amcheck ── rows ── probes ── removed
//!     │         │
//!     │         └ every byte of every layer of the chain comes here and is checked
//!     └ pages come as they are read, as on any machine that has nothing; WAL is replayed where it goes on
//! ```
//!
//! What a check finds ends the drill. If Postgres does not even come up, the layers are gone through all the same: the
//! object that is damaged is then named, rather than what Postgres made of it.
//!
//! **Crash.** Units outlive this process; [`Drills::end_drills`] ends them and removes what is left, at the next start.
//!
//! **Cancellation.** Dropping a drill leaves its directory and its unit: end it.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ebb_compute::manager::Unit;
use ebb_storage::layer::{InodeKind, Manifest};
use ebb_storage::object_store::Bucket;
use ebb_types::{BranchId, ErrorKind, LayerId};

use super::{LayerPolicy, LocalNode, Node as _, Start, blocking, replay};
use crate::drill::{Check, CheckName, Drilled, Fault, Outcome, Probe, Report, TableRows};
use crate::error::LocalContext as _;
use crate::event::Replay;
use crate::{Error, Result, files};

mod checks;
mod counted;

use checks::Scratch;
use counted::Counted;

/// LIMIT: a terabyte at a hundred megabytes a second, twice over.
const DRILL_MAX: Duration = Duration::from_secs(6 * 3600);

/// Below the data directory.
const DRILLS_DIR: &str = "drills";

/// What is drilled, and what must come of it.
#[derive(Debug, Clone)]
pub struct Order {
    /// Names the directory in which it happens.
    pub scratch: BranchId,
    /// What is restored: the head that it names, and, unless it says that the line was begun here, whatever WAL the
    /// archive has from behind it.
    pub start: Start,
    /// For a moment between seals: how its image comes about.
    pub replay: Option<Replay>,
    /// What is asked.
    pub probes: Vec<Probe>,
    /// How many rows tables must have; `None`: they are counted for the first time.
    pub rows: Option<Arc<[TableRows]>>,
}

impl Order {
    /// The layer that everything begins with.
    pub fn base(&self) -> LayerId {
        self.replay.as_ref().map_or(self.start.data.head, |replay| replay.base)
    }
}

/// What drills need of a machine.
#[async_trait]
pub trait Drills: Debug + Send + Sync {
    /// Restores and checks. What it leaves is removed by [`Drills::end_drill`].
    async fn drill(&self, order: &Order) -> Drilled;

    /// Ends a drill, and removes everything it had.
    async fn end_drill(&self, scratch: BranchId) -> Result<()>;

    /// Ends all drills: those of a process that is gone.
    async fn end_drills(&self) -> Result<()>;

    /// Bytes of the files of a layer's image; `None` if it cannot be told here.
    async fn image_bytes(&self, layer: LayerId) -> Result<Option<u64>>;
}

#[async_trait]
impl Drills for LocalNode {
    async fn drill(&self, order: &Order) -> Drilled {
        let began = Instant::now();
        let counted = Counted::new(self.bucket.clone());
        let node = self.for_drill(order.scratch, counted.clone());
        let mut drilled = Drilled::default();
        let carried_out = tokio::time::timeout(DRILL_MAX, node.carry_out(order, &mut drilled)).await;
        let fault = match carried_out {
            Ok(carried_out) => carried_out.err(),
            Err(_) => Some(Error::Deadline("the drill")),
        };
        drilled.fault = fault.map(|error| Fault { what: error.chain(), kind: error.kind() });
        drilled.report.bucket_bytes += counted.read_bytes();
        drilled.report.total_ms = ms_since(began);
        drilled
    }

    async fn end_drill(&self, scratch: BranchId) -> Result<()> {
        let dir = self.drill_dir(scratch);
        if !dir.exists() {
            return Ok(());
        }
        let node = self.for_drill(scratch, self.bucket.clone());
        for branch in node.local_branches().await? {
            node.discard(branch).await?;
        }
        blocking("removing a drill", move || files::remove_dir(&dir)).await
    }

    async fn end_drills(&self) -> Result<()> {
        let dir = self.data_dir.join(DRILLS_DIR);
        let left: BTreeSet<BranchId> =
            blocking("listing drills", move || Ok(ebb_storage::node::local_branches(&dir)?)).await?;
        for scratch in left {
            tracing::info!(%scratch, "a drill that was interrupted is removed");
            self.end_drill(scratch).await?;
        }
        Ok(())
    }

    async fn image_bytes(&self, layer: LayerId) -> Result<Option<u64>> {
        self.settle(layer).await?;
        Ok(Some(image_bytes(&self.store.manifest_anywhere(layer).await?)))
    }
}

/// Bytes of all files of an image.
fn image_bytes(manifest: &Manifest) -> u64 {
    let size = |kind: &InodeKind| match kind {
        InodeKind::File { size, .. } => *size,
        _ => 0,
    };
    manifest.inodes.iter().map(|inode| size(&inode.kind)).sum()
}

fn ms_since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

impl Report {
    /// Notes what became of a check.
    fn note(&mut self, check: CheckName, outcome: Outcome, what: String, began: Instant) {
        self.checks.push(Check { check, outcome, what, ms: ms_since(began) });
    }

    /// Notes a check by its result: what it looked at, why it was left out, or what it found.
    fn take(&mut self, check: CheckName, began: Instant, found: Result<Looked>) -> Result<()> {
        match found {
            Ok(Looked::At(what)) => self.note(check, Outcome::Passed, what, began),
            Ok(Looked::Not(why)) => self.note(check, Outcome::Skipped, why, began),
            Err(error) => {
                let error = match error {
                    // Of a server that clients use this would be bad luck; of this one it is what was to be found out.
                    Error::Postgres(said) => Error::Damaged(format!("postgres answered: {said}")),
                    other => other,
                };
                self.note(check, Outcome::Failed, error.chain(), began);
                return Err(error);
            }
        }
        Ok(())
    }
}

/// What a check came to that found nothing.
enum Looked {
    At(String),
    Not(String),
}

impl LocalNode {
    fn drill_dir(&self, scratch: BranchId) -> PathBuf {
        self.data_dir.join(DRILLS_DIR).join(scratch.to_string())
    }

    /// A machine that has nothing, within this one.
    fn for_drill(&self, scratch: BranchId, bucket: Bucket) -> Self {
        let policy = LayerPolicy { hydrate: false, ..self.policy.clone() };
        let node = Self::new(self.drill_dir(scratch), self.exe.clone(), bucket).with_layers(policy);
        // Asking each server for its version takes longer than a restore may.
        let _ = node.installations.set(self.installations().to_vec());
        node
    }

    async fn carry_out(&self, order: &Order, drilled: &mut Drilled) -> Result<()> {
        let began = Instant::now();
        let started = self.come_up(order).await;
        if started.is_ok() {
            drilled.report.restore_ms = Some(ms_since(began));
        }
        let (unit, started) = match started {
            Ok(unit) => (Some(unit), Ok(Looked::At("the first row was answered".to_owned()))),
            Err(error) => (None, Err(self.what_is_behind(order.base(), error).await)),
        };
        drilled.report.take(CheckName::Start, began, started)?;
        let Some(unit) = unit else { return Err(Error::Lost("the unit")) };
        let checked = self.check(order, &unit, drilled).await;
        if let Ok(status) = unit.status().await {
            drilled.report.bucket_bytes += status.fetched.bytes;
        }
        // Left to itself it would go on until it is ended; what it had read by now has been counted.
        if let Err(error) = unit.discard().await {
            tracing::warn!(scratch = %order.scratch, %error, "the unit of a drill did not end");
        }
        checked
    }

    /// Makes a volume out of the bucket and starts Postgres on it, until it has answered a row.
    async fn come_up(&self, order: &Order) -> Result<Unit> {
        fs::create_dir_all(&self.data_dir).on("create", &self.data_dir)?;
        let unit = match &order.replay {
            Some(replay) => self.recovered(replay, &order.start).await?,
            None => {
                let start = &order.start;
                self.ensure_volume(start).await?;
                let mut spec = self.spec(start, self.installation(start.pg_major)?);
                // What comes of it is nobody's history.
                spec.archive = None;
                let wal = self.replay_dir(start.data.branch);
                if wal.exists() {
                    spec.recovery = Some(replay::recovery(&wal, None)?);
                }
                Unit::start(&self.exe, &spec).await?
            }
        };
        Scratch::of(&unit).answers().await?;
        Ok(unit)
    }

    /// Why it did not come up: the object that is damaged, if one is.
    async fn what_is_behind(&self, base: LayerId, error: Error) -> Error {
        // It names what is damaged already.
        if error.kind() == ErrorKind::Corrupt {
            return error;
        }
        match self.store.ensure_local(base).await.map_err(Error::from) {
            Err(found) if found.kind() == ErrorKind::Corrupt => found,
            _ => error,
        }
    }

    async fn check(&self, order: &Order, unit: &Unit, drilled: &mut Drilled) -> Result<()> {
        let report = &mut drilled.report;
        let began = Instant::now();
        let objects = self.all_objects(order, report).await;
        report.take(CheckName::Objects, began, objects)?;
        let scratch = Scratch::of(unit);
        let bin = self.installation(order.start.pg_major)?.bin;
        let began = Instant::now();
        let pages = scratch.pages(&bin, order.start.pg_major).await;
        report.take(CheckName::Pages, began, pages)?;
        let began = Instant::now();
        let amcheck = scratch.amcheck(&bin).await;
        report.take(CheckName::Amcheck, began, amcheck)?;
        let began = Instant::now();
        let rows = match &order.rows {
            Some(known) => scratch.compare_rows(known).await,
            None => scratch.count_rows().await.map(|counted| {
                let what = format!("{} tables were counted", counted.len());
                drilled.rows = counted;
                Looked::At(what)
            }),
        };
        report.take(CheckName::Rows, began, rows)?;
        let began = Instant::now();
        let probes = scratch.probes(&order.probes).await;
        report.take(CheckName::Probes, began, probes)
    }

    /// Brings every byte of every layer here, checked.
    async fn all_objects(&self, order: &Order, report: &mut Report) -> Result<Looked> {
        // A head that was lost is not what the volume lies on.
        let mut bases = self.volume_bases(order.start.data.branch).await?;
        bases.insert(order.base());
        let (mut layers, mut largest) = (BTreeSet::new(), 0);
        for base in bases {
            match self.store.ensure_local(base).await {
                // Its commits are replayed from an earlier seal.
                Err(ebb_storage::Error::NoSuchLayer(lost)) if lost == order.base() && order.replay.is_none() => {
                    continue;
                }
                here => here?,
            }
            let manifest = self.store.manifest(base).await?;
            largest = largest.max(image_bytes(&manifest));
            layers.extend(manifest.chain);
        }
        report.image_bytes = Some(largest);
        Ok(Looked::At(format!("{} layers, every byte", layers.len())))
    }
}
