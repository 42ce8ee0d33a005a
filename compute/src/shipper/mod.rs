//! The WAL shipper: a standby that keeps nothing but brings every byte of WAL to the archive in the bucket.
//!
//! ```text
//!  postgres ── walsender ── socket ──► shipper ── spans ──► archive (bucket)
//!     ▲  slot `ebb_ship`                  │
//!     └──────── "flushed up to …" ◄───────┘  once the bucket has acknowledged it
//! ```
//!
//! It tells Postgres what the bucket has, and nothing else. So the slot keeps on this node what the bucket lacks, and
//! at durability `bucket`, where Postgres takes it for its synchronous standby, a commit returns when the bucket has it.
//! While one span is being put, what comes meanwhile is collected for the next: the commits of many clients share a put.
//! See decision 0009.
//!
//! **Invariants**
//! - What is reported as flushed is in the archive, in a stretch that this shipper owns (I1).
//! - A shipper that was overtaken reports nothing more, and its unit stops Postgres at once (I9).
//! - WAL that was lost to the archive is a gap in it, never glossed over. A commit in a gap is not acknowledged at
//!   durability `bucket`: sessions that wait for one are ended instead.
//! - Nothing here is on the way of a wake, nor does a suspend wait for a bucket that is away.
//!
//! **Crash**: the next shipper ends this one's stretch, and goes on where it ended if the WAL on the node is still what
//! the archive's newest span says. Spans are received again until they are acknowledged.
//!
//! **Cancellation**: one task; [`Shipper::drain`] ends it in order, dropping the handle at once.

mod lag;
mod session;
mod slot;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ebb_storage::archive::WriterStats;
use ebb_storage::layer::Origin;
use ebb_types::{BranchId, Lsn};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::lag::Lag;
use self::session::Task;
pub(crate) use self::slot::connect;
use crate::control::{Durability, Shipping};

/// What Postgres knows the shipper by: as a standby, and as the name of its slot.
pub(crate) const STANDBY: &str = "ebb_ship";

/// LIMIT: at durability `local` the bucket is this far behind at most, and the time of a put. A put for each commit
/// would cost money for nothing.
const LOCAL_DELAY: Duration = Duration::from_millis(700);

/// LIMIT: as much WAL is worth a put at any time.
const LOCAL_BYTES: usize = 1 << 20;

/// LIMIT: how long a suspend waits for a bucket that does not answer; clients are held meanwhile. What is not shipped
/// stays on the node, and is shipped at the next wake.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// What a shipper must know.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The archive's bucket …
    pub bucket: Origin,
    /// … and place in it.
    pub branch: BranchId,
    pub line: u64,
    /// The epoch of the branch's owner.
    pub epoch: u64,
    /// Where Postgres's socket is.
    pub socket_dir: PathBuf,
    /// The WAL of the layer that the volume lies on: an archive that is empty begins at its last page.
    pub base_wal: Option<PathBuf>,
    /// How long after Postgres was ready it begins.
    pub delay: Duration,
}

/// How a shipper ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The archive has everything that Postgres wrote, and its stretch is ended.
    Drained,
    /// It was told to drain, and the bucket or Postgres did not let it.
    GaveUp,
    /// Postgres must be stopped at once, for this reason.
    Stop(String),
}

/// What the shipper is told.
#[derive(Debug, Clone, Copy)]
struct Orders {
    durability: Durability,
    /// Since when Postgres is being stopped.
    draining: Option<Instant>,
}

/// What the shipper tells.
#[derive(Debug)]
struct Progress {
    streaming: bool,
    lag: Lag,
    written: WriterStats,
    gaps: u64,
    error: Option<String>,
}

type SharedProgress = Arc<Mutex<Progress>>;

fn look(progress: &SharedProgress) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running shipper.
#[derive(Debug)]
pub(crate) struct Shipper {
    progress: SharedProgress,
    orders: watch::Sender<Orders>,
    task: JoinHandle<End>,
}

impl Shipper {
    /// Starts to ship the WAL of a Postgres that is ready.
    pub fn start(plan: Plan, durability: Durability) -> Self {
        let progress = Arc::new(Mutex::new(Progress {
            streaming: false,
            lag: Lag::new(Instant::now()),
            written: WriterStats::default(),
            gaps: 0,
            error: None,
        }));
        let (orders, told) = watch::channel(Orders { durability, draining: None });
        let task = tokio::spawn(Task::new(plan, progress.clone(), told).run());
        Self { progress, orders, task }
    }

    /// Postgres was configured for this durability.
    pub fn set_durability(&self, durability: Durability) {
        self.orders.send_modify(|orders| orders.durability = durability);
    }

    /// Postgres's WAL was seen to end here.
    pub fn saw(&self, end: Lsn) {
        look(&self.progress).lag.saw(end, Instant::now());
    }

    /// How it is.
    pub fn status(&self) -> Shipping {
        let progress = look(&self.progress);
        let (behind_bytes, behind) = progress.lag.behind(Instant::now());
        Shipping {
            durability: self.orders.borrow().durability,
            streaming: progress.streaming,
            shipped: progress.lag.position(),
            behind_bytes,
            behind_ms: u64::try_from(behind.as_millis()).unwrap_or(u64::MAX),
            spans: progress.written.spans,
            raw_bytes: progress.written.raw_bytes,
            object_bytes: progress.written.stored_bytes,
            gaps: progress.gaps,
            error: progress.error.clone(),
        }
    }

    /// Waits for its end.
    ///
    /// # Cancel safety
    /// May be asked again.
    pub async fn ended(&mut self) -> End {
        match (&mut self.task).await {
            Ok(end) => end,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => End::GaveUp,
        }
    }

    /// Postgres is being stopped: it ships what is left and ends. Postgres waits for that, and it does not wait for long.
    pub fn drain(&self) {
        self.orders.send_modify(|orders| orders.draining = orders.draining.or_else(|| Some(Instant::now())));
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests;
