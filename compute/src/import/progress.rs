//! How far an import is, for whoever waits for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// What an import is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It has just begun.
    #[default]
    Starting,
    /// Files are copied, or come as a base backup.
    Copying,
    /// A dump is read into a fresh branch.
    Restoring,
    /// WAL comes and is replayed, until somebody says that the source is cut over.
    Following,
    /// The WAL up to the cut-over comes.
    CatchingUp,
    /// Postgres recovers.
    Recovering,
    /// The checksum of every page is looked at, or made.
    CheckingPages,
    /// Roles, ownership and what must not run are seen to.
    Settling,
    /// `pg_amcheck` looks at tables and indexes.
    CheckingTables,
    /// A layer is made.
    Sealing,
    /// It is over.
    Done,
}

/// What is counted in a phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counted {
    /// Bytes.
    #[default]
    Bytes,
    /// Things: tables, indexes, entries of a dump.
    Objects,
}

/// A look at an import.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// What it is doing.
    pub phase: Phase,
    /// How much of that is done.
    pub done: u64,
    /// Of how much, where that is known.
    pub total: Option<u64>,
    /// What is counted.
    pub counted: Counted,
    /// For how long it has been in this phase.
    pub seconds: f64,
    /// While WAL comes: bytes of it that the source has written and this node does not have.
    pub behind_bytes: Option<u64>,
}

impl Seen {
    /// How much a second, on average over the phase; `None` at its beginning.
    pub fn per_second(&self) -> Option<f64> {
        (self.seconds > 0.2 && self.done > 0).then(|| self.done as f64 / self.seconds)
    }

    /// How long the phase goes on at that rate, in seconds.
    pub fn seconds_left(&self) -> Option<f64> {
        Some(self.total?.saturating_sub(self.done) as f64 / self.per_second()?)
    }
}

/// Shared by who works and who looks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Progress(Arc<Mutex<Told>>);

#[derive(Debug)]
struct Told {
    phase: Phase,
    done: u64,
    total: Option<u64>,
    counted: Counted,
    since: Instant,
    behind_bytes: Option<u64>,
    notes: Vec<String>,
}

impl Default for Progress {
    fn default() -> Self {
        let told = Told {
            phase: Phase::default(),
            done: 0,
            total: None,
            counted: Counted::default(),
            since: Instant::now(),
            behind_bytes: None,
            notes: Vec::new(),
        };
        Self(Arc::new(Mutex::new(told)))
    }
}

impl Progress {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A phase begins.
    pub fn begin(&self, phase: Phase, counted: Counted, total: Option<u64>) {
        let mut told = self.told();
        let notes = std::mem::take(&mut told.notes);
        *told = Told { phase, done: 0, total, counted, since: Instant::now(), behind_bytes: None, notes };
    }

    /// More is done.
    pub fn add(&self, more: u64) {
        self.told().done += more;
    }

    /// So much is done, of so much where that is known.
    pub fn set(&self, done: u64, total: Option<u64>) {
        let mut told = self.told();
        told.done = done;
        told.total = total.or(told.total);
    }

    /// So many bytes of the source's WAL are not here.
    pub fn behind(&self, bytes: u64) {
        self.told().behind_bytes = Some(bytes);
    }

    /// Something that a person should read.
    pub fn note(&self, note: impl Into<String>) {
        let (note, mut told) = (note.into(), self.told());
        if !told.notes.contains(&note) {
            tracing::info!(note, "a note on an import");
            told.notes.push(note);
        }
    }

    /// How it is.
    pub fn seen(&self) -> Seen {
        let told = self.told();
        Seen {
            phase: told.phase,
            done: told.done,
            total: told.total,
            counted: told.counted,
            seconds: told.since.elapsed().as_secs_f64(),
            behind_bytes: told.behind_bytes,
        }
    }

    /// What was noted so far.
    pub fn notes(&self) -> Vec<String> {
        self.told().notes.clone()
    }
}
