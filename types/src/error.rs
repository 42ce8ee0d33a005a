//! What an error means to whoever receives it.

use serde::{Deserialize, Serialize};

/// Errors sorted by what the caller must do. Every crate's error enum maps onto these at its edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request itself is wrong: mend it before sending it again.
    Invalid,
    /// The thing named does not exist.
    NotFound,
    /// Another state stands in the way (a name is taken, a branch is busy): look, then decide.
    Conflict,
    /// Not now (waking, unreachable, full): the same request may work later.
    Unavailable,
    /// The caller is no longer the writer: stop.
    Fenced,
    /// Stored bytes failed their checksum: an operator must look.
    Corrupt,
    /// A fault of Ebb's own.
    Internal,
}

/// Advice that goes with an error: a full sentence, or nothing.
pub trait Hint {
    /// What the receiver can do about it.
    fn hint(&self) -> Option<String>;
}
