//! What can go wrong with a compute.

use std::io;
use std::path::{Path, PathBuf};

use ebb_types::{ErrorKind, Hint};

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
    /// Ebb is root, and there is no user Postgres could run as.
    #[error("none of the users {0} exists for Postgres to run as")]
    NoUser(String),
    /// A process, socket or file could not be used.
    #[error("cannot {act} {what:?}")]
    Os {
        /// What was tried, as a verb.
        act: &'static str,
        /// On what.
        what: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system does not let the unit isolate itself.
    #[error("cannot {act} for the unit's isolation")]
    Isolation {
        /// What was tried.
        act: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The template cluster could not be made.
    #[error("cannot make the template cluster: {why}")]
    Template {
        /// What initdb or the server complained about last.
        why: String,
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
    /// The unit had to stop Postgres at once: it may not, or must not, go on writing.
    #[error("postgres was stopped: {0}")]
    Stopped(String),
    /// The unit is gone.
    #[error("the unit of the branch is gone")]
    Gone,
    /// What is to be imported, or exported, cannot be.
    #[error("{why}")]
    Import {
        /// What is wrong with it.
        why: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Whoever waited for it went away.
    #[error("it was given up")]
    Cancelled,
    /// It took longer than allowed.
    #[error("{0} took too long")]
    Deadline(&'static str),
    /// Storage failed.
    #[error("storage failed")]
    Storage(#[from] ebb_storage::Error),
}

impl Error {
    /// Something that cannot be imported, without advice.
    pub(crate) fn import(why: impl Into<String>) -> Self {
        Self::Import { why: why.into(), hint: None }
    }

    /// Whether the machine has not enough memory for what was tried.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            // The server's own words, in the C locale that it is started in.
            Error::Start { why, .. } => why.contains("Cannot allocate memory") || why.contains("out of memory"),
            Error::Os { source, .. } => source.kind() == io::ErrorKind::OutOfMemory,
            _ => false,
        }
    }

    /// What the caller must do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Os { source, .. } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::Unavailable,
            Error::NoPostgres { .. }
            | Error::NoUser(_)
            | Error::Os { .. }
            | Error::Isolation { .. }
            | Error::Template { .. }
            | Error::Refused(_) => ErrorKind::Internal,
            Error::Import { .. } => ErrorKind::Invalid,
            Error::Start { .. } | Error::Gone | Error::Cancelled | Error::Deadline(_) => ErrorKind::Unavailable,
            Error::Stopped(_) => ErrorKind::Fenced,
            Error::Storage(storage) => storage.kind(),
        }
    }
}

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Error::NoPostgres { .. } => {
                "Install one (Debian: apt-get install postgresql-15), or set EBB_PG_BIN to its bin directory."
                    .to_owned()
            }
            Error::NoUser(_) => "Create one: useradd --system ebb.".to_owned(),
            Error::Isolation { .. } => "Run ebb serve as root, or allow unprivileged user namespaces \
                (sysctl user.max_user_namespaces) and access to /dev/fuse."
                .to_owned(),
            Error::Start { log, .. } => format!("The whole log is in {}.", log.display()),
            Error::Import { hint, .. } => return hint.clone(),
            _ => return None,
        })
    }
}

/// Adds to an I/O error what was tried on what.
pub(crate) trait OsContext<T> {
    /// Names the act (a verb) and the thing.
    fn on(self, act: &'static str, what: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> OsContext<T> for std::result::Result<T, E> {
    fn on(self, act: &'static str, what: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::Os { act, what: what.as_ref().to_owned(), source: source.into() })
    }
}

/// An error and its causes on one line, for a log or another process.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
