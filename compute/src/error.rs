//! What can go wrong with a compute.

use std::io;
use std::path::PathBuf;

use ebb_types::ErrorKind;

/// The result of an act on a compute.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of a compute, sorted for the caller by [`Error::kind`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No server binaries of the wanted (or any) major version.
    #[error("no Postgres server found (looked in {})", looked.join(", "))]
    NoPostgres {
        /// Where it was looked for.
        looked: Vec<String>,
    },
    /// A process, socket or file could not be used.
    #[error("cannot {act} {what}")]
    Os {
        /// What was tried, as a verb.
        act: &'static str,
        /// On what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// Postgres did not come up.
    #[error("postgres did not start: {why}")]
    Start {
        /// The last FATAL or PANIC line of its log, or how it ended.
        why: String,
        /// Its log.
        log: PathBuf,
    },
    /// The unit did not do what it was asked.
    #[error("the unit refused: {0}")]
    Refused(String),
    /// The unit is gone.
    #[error("the unit of the branch is gone")]
    Gone,
    /// It took longer than allowed.
    #[error("{0} took too long")]
    Deadline(&'static str),
    /// Storage failed.
    #[error("storage failed")]
    Storage(#[from] ebb_storage::Error),
}

impl Error {
    /// What the caller must do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::NoPostgres { .. } | Error::Os { .. } | Error::Refused(_) => ErrorKind::Internal,
            Error::Start { .. } | Error::Gone | Error::Deadline(_) => ErrorKind::Unavailable,
            Error::Storage(storage) => storage.kind(),
        }
    }
}
