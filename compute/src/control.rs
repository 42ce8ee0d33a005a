//! What `ebb serve` and a unit say to each other: one JSON object a line over the unit's private Unix socket.

use std::io;

use ebb_storage::layer::Fetched;
use ebb_types::{LayerId, Lsn};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// LIMIT: a status with all its stages has a few hundred bytes.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// A request to a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// How are you?
    Status,
    /// Seal the volume into this layer; Postgres goes on. Idempotent for one `layer`. Answered as soon as the seal
    /// cannot be undone any more; the unit completes the layer soon after.
    Seal {
        /// The identifier the new layer gets, if anything was written.
        layer: LayerId,
    },
    /// Tell when the layers of all seals so far are complete.
    Finish,
    /// Stop Postgres (fast shutdown), unmount, seal into this layer, exit. Idempotent for one `layer`.
    Stop {
        /// The identifier the new layer gets, if anything was written.
        layer: LayerId,
    },
    /// Stop Postgres at once, unmount and exit without sealing: the branch is going away.
    Discard,
    /// Look at the roles now, and publish them: who asks next finds in the file what was committed before.
    PublishRoles,
    /// Change what a commit waits for. When it is answered, every commit that is acknowledged from then on has it.
    SetDurability {
        /// What it is from now on.
        durability: Durability,
    },
}

/// What a commit waits for. A transaction may ask for less by `SET synchronous_commit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// The disk of this node; the bucket has it about a second later.
    #[default]
    Local,
    /// The bucket.
    Bucket,
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
        /// A position that all its WAL lies before, where known.
        #[serde(default)]
        end: Option<Lsn>,
    },
    /// To `Finish`.
    Finished,
    /// To `Discard`.
    Discarded,
    /// To `PublishRoles`.
    RolesPublished,
    /// To `SetDurability`.
    DurabilitySet,
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
    /// What the unit has fetched of layers that were not whole on this node.
    #[serde(default)]
    pub fetched: Fetched,
    /// How far the bucket has the WAL; `None` if this branch's is not shipped, or not yet.
    #[serde(default)]
    pub shipping: Option<Shipping>,
}

/// How WAL comes to the bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shipping {
    /// What commits wait for.
    pub durability: Durability,
    /// Whether WAL is received from Postgres. At durability `bucket` commits wait while it is not.
    pub streaming: bool,
    /// The bucket has all WAL up to here; `None` until that is known.
    pub shipped: Option<Lsn>,
    /// Bytes of WAL that it lacks.
    pub behind_bytes: Option<u64>,
    /// For how many milliseconds it has lacked the oldest of them, or nothing has been known of the bucket.
    pub behind_ms: u64,
    /// Spans put since the unit began.
    pub spans: u64,
    /// Bytes of WAL in them.
    pub raw_bytes: u64,
    /// Bytes of the objects.
    pub object_bytes: u64,
    /// How often the unit had to leave a gap in the archive.
    pub gaps: u64,
    /// Why WAL is not shipped just now.
    pub error: Option<String>,
}

/// Sends one message as a line.
pub(crate) async fn send<T: Serialize>(to: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line).await?;
    to.flush().await
}

/// Receives one message; `None` when the other side has closed.
///
/// # Errors
/// `InvalidData` for a line that is too long, cut off, or no message of this kind.
pub(crate) async fn receive<T: DeserializeOwned>(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "a line is too long or was cut off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_are_lines() {
        let mut wire = Vec::new();
        send(&mut wire, &Request::Seal { layer: LayerId::for_test(7) }).await.unwrap();
        assert_eq!(
            String::from_utf8(wire.clone()).unwrap(),
            "{\"do\":\"seal\",\"layer\":\"ly_00000000000000000000000000000007\"}\n"
        );
        let mut from = wire.as_slice();
        assert_eq!(receive(&mut from).await.unwrap(), Some(Request::Seal { layer: LayerId::for_test(7) }));
        assert_eq!(receive::<Request>(&mut from).await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error() {
        for wire in ["{\"do\":\"status\"}", "{}\n", "\n", &"x".repeat(70_000)] {
            assert!(receive::<Request>(&mut wire.as_bytes()).await.is_err(), "{:.20?} was taken", wire);
        }
    }
}
