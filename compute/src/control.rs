//! What `ebb serve` and a unit say to each other: one JSON object a line over the unit's private Unix socket.

use ebb_types::{LayerId, Lsn};
use serde::{Deserialize, Serialize};

/// A request to a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// How are you?
    Status,
    /// Seal the volume into this layer; Postgres goes on. Idempotent for one `layer`.
    Seal {
        /// The identifier the new layer gets, if anything was written.
        layer: LayerId,
    },
    /// Stop Postgres (fast shutdown), unmount, seal into this layer, exit. Idempotent for one `layer`.
    Stop {
        /// The identifier the new layer gets, if anything was written.
        layer: LayerId,
    },
    /// Stop Postgres at once, unmount and exit without sealing: the branch is going away.
    Discard,
}

/// A unit's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Reply {
    /// To `Status`.
    Status(Status),
    /// To `Seal` and `Stop`.
    Sealed {
        /// The layer that now holds the image (an older one, if nothing had been written).
        layer: LayerId,
        /// Whether it is new.
        new: bool,
    },
    /// To `Discard`.
    Discarded,
    /// To anything that failed.
    Failed {
        /// What went wrong, with its causes.
        message: String,
    },
}

/// How a unit is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether Postgres accepts connections.
    pub ready: bool,
    /// Postmaster's process number, as the host sees it.
    pub postmaster_pid: Option<u32>,
    /// Last known end of WAL.
    pub wal_end: Option<Lsn>,
    /// Bytes written to the upper since the last seal.
    pub dirty: bool,
    /// How often Postgres had to be restarted by this unit.
    pub restarts: u32,
    /// Stages of this unit's wake, in the order they ended: name and microseconds since the unit was asked for.
    pub stages: Vec<(String, u64)>,
}
