//! What can go wrong in storage.

use std::io;
use std::path::{Path, PathBuf};

use ebb_types::{ErrorKind, Hint, LayerId, Lsn};

/// The result of a storage act.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of a storage act, precise inside, sorted for the caller by [`Error::kind`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A local file or directory could not be used.
    #[error("cannot {act} {path:?}")]
    Local {
        /// What was tried, as a verb: "open", "rename".
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The bucket has no object of that key.
    #[error("object {key:?} is not in the bucket")]
    NoSuchObject {
        /// The wanted key.
        key: String,
    },
    /// The bucket could not be reached, or did not answer in time; a later try may work.
    #[error("the bucket did not {act} object {key:?}")]
    Bucket {
        /// What was tried, as a verb: "get", "put".
        act: &'static str,
        /// On which key.
        key: String,
        /// What the store said.
        source: io::Error,
    },
    /// What the bucket's URL names cannot be used as a bucket, as it is.
    #[error("{what}")]
    Unusable {
        /// What the caller must do about it.
        kind: ErrorKind,
        /// What is wrong, with the bucket's name and where it is.
        what: String,
        /// What to change: full sentences.
        hint: String,
    },
    /// Another writer appended first: this one was overtaken, or fenced.
    #[error("log {log:?} already has an entry {seq}")]
    Overtaken {
        /// The log's prefix.
        log: String,
        /// The number that was taken.
        seq: u64,
    },
    /// Stored bytes do not match their checksum or their format.
    #[error("{what} is corrupt: {why}")]
    Corrupt {
        /// Which object or file.
        what: String,
        /// What does not fit.
        why: String,
    },
    /// The layer is neither on this node nor in the bucket.
    #[error("layer {0} is neither on this node nor in the bucket")]
    NoSuchLayer(LayerId),
    /// The archive does not hold that WAL, or not without a gap.
    #[error("WAL of Postgres timeline {pg_timeline} up to {to} is not in the archive {archive:?}")]
    NoSuchWal {
        /// The archive's prefix.
        archive: String,
        /// The wanted Postgres timeline.
        pg_timeline: u32,
        /// The wanted end.
        to: Lsn,
    },
    /// The caller asked for something that makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// What the caller must do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Local { source, .. } if is_full(source) => ErrorKind::Unavailable,
            Error::Local { .. } => ErrorKind::Internal,
            Error::NoSuchObject { .. } | Error::NoSuchLayer(_) | Error::NoSuchWal { .. } => ErrorKind::NotFound,
            Error::Bucket { .. } => ErrorKind::Unavailable,
            Error::Unusable { kind, .. } => *kind,
            Error::Overtaken { .. } => ErrorKind::Fenced,
            Error::Corrupt { .. } => ErrorKind::Corrupt,
            Error::Invalid(_) => ErrorKind::Invalid,
        }
    }
}

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Error::Unusable { hint, .. } => Some(hint.clone()),
            _ => None,
        }
    }
}

/// No room, or none left for this user.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Adds to an I/O error what was tried on which path.
pub(crate) trait LocalContext<T> {
    /// Names the act (a verb) and the path.
    fn on(self, act: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> LocalContext<T> for std::result::Result<T, E> {
    fn on(self, act: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Local { act, path: path.to_owned(), source: source.into() })
    }
}
