//! What can go wrong in the timeline service, sorted for its callers.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_types::{BranchId, BranchName, CheckpointName, ErrorKind, Hint, OperationId, ProjectName, SqlState, Timestamp};

/// The result of an act of the service.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request that could be understood is not carried out. Decided purely, from the ledger's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No project of that name.
    #[error("there is no project {name:?}")]
    NoProject {
        /// The name as asked for.
        name: String,
        /// Names like it.
        near: Vec<String>,
    },
    /// No branch of that name in the project.
    #[error("project {project:?} has no branch {name:?}")]
    NoBranch {
        /// The project.
        project: ProjectName,
        /// The name as asked for.
        name: String,
        /// Names like it.
        near: Vec<String>,
    },
    /// The branch was deleted meanwhile.
    #[error("branch {0} was deleted")]
    Gone(BranchId),
    /// No checkpoint of that name on the branch.
    #[error("branch {branch:?} has no checkpoint {name:?}")]
    NoCheckpoint {
        /// The branch.
        branch: BranchName,
        /// The name as asked for.
        name: String,
        /// Names like it, or the newest ones if none is.
        near: Vec<String>,
    },
    /// No release of that name in the project.
    #[error("project {project:?} has no release {name:?}")]
    NoRelease {
        /// The project.
        project: ProjectName,
        /// The name as asked for.
        name: String,
        /// Names like it, or the newest ones if none is.
        near: Vec<String>,
    },
    /// The name is in use.
    #[error("{kind} {name:?} already exists")]
    Taken {
        /// What kind of thing it names.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// The same idempotency key came with another request.
    #[error("idempotency key {0:?} was used for another request")]
    KeyReused(String),
    /// The request with that idempotency key is still being carried out.
    #[error("the request with idempotency key {key:?} is still being carried out ({operation})")]
    StillRunning {
        /// The key.
        key: String,
        /// By which operation.
        operation: String,
    },
    /// Another operation has the branch.
    #[error("branch {branch:?} is busy with {act} ({operation})")]
    Busy {
        /// The branch.
        branch: BranchName,
        /// What is being done.
        act: &'static str,
        /// By which operation.
        operation: OperationId,
    },
    /// Another node is the project's owner.
    #[error("project {project:?} is in the hands of node {node:?}")]
    Elsewhere {
        /// The project.
        project: ProjectName,
        /// The node, as people call it.
        node: String,
    },
    /// No node of that name is alive.
    #[error("there is no node {name:?}, or it is not alive")]
    NoNode {
        /// The name as asked for.
        name: String,
        /// Names like it.
        near: Vec<String>,
    },
    /// A moment that the branch cannot be taken to.
    #[error("{point} is outside of what branch {branch:?} can be taken back to: {why}")]
    OutsideWindow {
        /// The branch.
        branch: BranchName,
        /// The moment as asked for.
        point: String,
        /// Why it is outside.
        why: String,
        /// The first moment of the window.
        from: Timestamp,
        /// Its last moment.
        to: Timestamp,
    },
    /// As many moments are visited as may be.
    #[error("too many moments are visited at once")]
    TooManyVisits {
        /// How many may be, on this node.
        limit: usize,
    },
    /// The branch must stay.
    #[error("branch {branch:?} cannot be deleted: {why}")]
    Kept {
        /// The branch.
        branch: BranchName,
        /// The rule that keeps it.
        why: String,
        /// Advice.
        advice: String,
    },
    /// The checkpoint must stay.
    #[error("checkpoint {checkpoint:?} cannot be deleted: release {release:?} would lose its way back")]
    CheckpointKept {
        /// The checkpoint.
        checkpoint: CheckpointName,
        /// The release that needs it.
        release: String,
    },
    /// The name to confirm with was not given, or is another.
    #[error("deleting project {0:?} needs its name as confirmation")]
    Unconfirmed(ProjectName),
    /// There is nothing to roll back.
    #[error("release {release:?} cannot be rolled back to: {why}")]
    NoWayBack {
        /// The wanted release.
        release: String,
        /// Why not.
        why: String,
        /// Advice.
        advice: String,
    },
    /// No import of that identifier is known to this service.
    #[error("there is no import {0} that was begun since the service started")]
    NoImport(OperationId),
    /// The artifact is the release that is in service.
    #[error("the artifact is release {release:?}, which is in service")]
    Deployed {
        /// The release.
        release: String,
    },
    /// The release describes itself wrongly.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    ReleaseFile(Vec<crate::release_file::Fault>),
    /// What the release needs is not there.
    #[error("the release needs secrets that are not there: {}", .names.join(", "))]
    MissingSecrets {
        /// Their names.
        names: Vec<String>,
        /// The directory that they are to be in.
        dir: PathBuf,
    },
    /// A field of the request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The project is being deleted, or the fold met an event that cannot follow: the act came too late.
    #[error("{0}")]
    TooLate(String),
}

impl Refusal {
    /// What the caller must do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Refusal::NoProject { .. }
            | Refusal::NoBranch { .. }
            | Refusal::Gone(_)
            | Refusal::NoCheckpoint { .. }
            | Refusal::NoRelease { .. }
            | Refusal::NoImport(_)
            | Refusal::NoNode { .. } => ErrorKind::NotFound,
            Refusal::Elsewhere { .. } => ErrorKind::Fenced,
            Refusal::Taken { .. }
            | Refusal::KeyReused(_)
            | Refusal::StillRunning { .. }
            | Refusal::Busy { .. }
            | Refusal::Kept { .. }
            | Refusal::CheckpointKept { .. }
            | Refusal::NoWayBack { .. }
            | Refusal::Deployed { .. }
            | Refusal::MissingSecrets { .. }
            | Refusal::TooLate(_) => ErrorKind::Conflict,
            Refusal::TooManyVisits { .. } => ErrorKind::Unavailable,
            Refusal::OutsideWindow { .. } | Refusal::Unconfirmed(_) | Refusal::ReleaseFile(_) | Refusal::Invalid(_) => {
                ErrorKind::Invalid
            }
        }
    }
}

impl Hint for Refusal {
    fn hint(&self) -> Option<String> {
        match self {
            Refusal::NoProject { near, .. } | Refusal::NoBranch { near, .. } => did_you_mean(near),
            Refusal::NoCheckpoint { near, .. } | Refusal::NoRelease { near, .. } => did_you_mean(near),
            Refusal::NoNode { near, .. } if near.is_empty() => Some("`ebb node list` shows who is there.".to_owned()),
            Refusal::NoNode { near, .. } => did_you_mean(near),
            Refusal::Elsewhere { .. } => Some("Ask there, or try again when it has been handed over.".to_owned()),
            Refusal::Taken { kind, .. } => Some(format!("Choose another name, or use the {kind} that exists.")),
            Refusal::KeyReused(_) => Some("Send a fresh idempotency key with each new request.".to_owned()),
            Refusal::Busy { .. } | Refusal::StillRunning { .. } => {
                Some("Wait until the operation has ended, then try again.".to_owned())
            }
            Refusal::OutsideWindow { from, to, .. } => {
                Some(format!("It can be taken to any moment from {from} to {to}, and to its checkpoints."))
            }
            Refusal::TooManyVisits { limit } => Some(format!(
                "A node holds {limit} visits. Disconnect from one, or make a branch of the moment, which may stay."
            )),
            Refusal::Kept { advice, .. } | Refusal::NoWayBack { advice, .. } => Some(advice.clone()),
            Refusal::CheckpointKept { .. } => Some("It is kept as long as the release can be rolled back.".to_owned()),
            Refusal::Unconfirmed(name) => Some(format!("Repeat the request with confirm={name}.")),
            Refusal::NoImport(_) => {
                Some("One that was interrupted is undone. What became of it: ebb ledger list PROJECT.".to_owned())
            }
            Refusal::ReleaseFile(_) => Some("`ebb release check DIR` tells the same without a server.".to_owned()),
            Refusal::MissingSecrets { dir, .. } => {
                Some(format!("Put each into a file of its name in {}. Nothing was touched.", dir.display()))
            }
            Refusal::Gone(_) | Refusal::Deployed { .. } | Refusal::Invalid(_) | Refusal::TooLate(_) => None,
        }
    }
}

fn did_you_mean(near: &[String]) -> Option<String> {
    (!near.is_empty()).then(|| format!("Did you mean {}?", near.join(", ")))
}

/// A failure of an act of the service.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A ledger's chain is broken, or an entry of it cannot be read.
    #[error("ledger {ledger:?} is corrupt at entry {seq}: {why}")]
    Ledger {
        /// Which ledger.
        ledger: String,
        /// The first entry that does not fit.
        seq: u64,
        /// What does not fit.
        why: String,
    },
    /// A migration of a release failed; nothing of it was applied.
    #[error("migration {file:?} failed: {message}")]
    Migration {
        /// Its file name.
        file: String,
        /// What Postgres said, with its SQLSTATE.
        message: String,
        /// What to do.
        advice: String,
    },
    /// A release does not work, or was given up. What became of it is recorded.
    #[error("release {release:?} failed: {fault}")]
    Release {
        /// Its name.
        release: String,
        /// Why.
        fault: String,
        /// How things stand, and what to do.
        advice: String,
    },
    /// The sessions that could not be set aside in time.
    #[error("{} sessions keep the compute of branch {branch:?} awake", .sessions.len())]
    KeptAwake {
        /// The branch.
        branch: BranchName,
        /// One line each: who, and why.
        sessions: Vec<String>,
    },
    /// The node's disk has too little room to take on work.
    #[error("the disk under {path:?} has {free} bytes free, fewer than the {wanted} Ebb keeps in reserve")]
    DiskFull {
        /// The node's data directory.
        path: PathBuf,
        /// Bytes free.
        free: u64,
        /// Bytes wanted.
        wanted: u64,
    },
    /// A secret cannot be opened.
    #[error("secret {name:?} cannot be decrypted with the key of this node")]
    Secret {
        /// Which secret (never its value).
        name: String,
    },
    /// A local file or directory could not be used.
    #[error("cannot {act} {path:?}")]
    Local {
        /// What was tried, as a verb.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Storage failed.
    #[error("storage failed")]
    Storage(#[from] ebb_storage::Error),
    /// What was restored is not what it should be.
    #[error("{0}")]
    Damaged(String),
    /// A point could not be restored out of the bucket, or is not what it should be. It is recorded.
    #[error("the drill of {point} failed: {fault}")]
    Drill {
        /// The point: `shop/prod@before-import`.
        point: String,
        /// What is wrong.
        fault: String,
        /// What kind of fault it is.
        kind: ErrorKind,
    },
    /// A compute failed.
    #[error("the compute failed")]
    Compute(#[source] ebb_compute::Error),
    /// What is to be imported, or exported, cannot be.
    #[error("{why}")]
    Import {
        /// What is wrong with it.
        why: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Something took longer than allowed.
    #[error("{0} took too long")]
    Deadline(&'static str),
    /// A migration's connection or bookkeeping failed.
    #[error("postgres answered: {0}")]
    Postgres(String),
    /// A task of this process ended without an answer.
    #[error("{0} ended without an answer")]
    Lost(&'static str),
    /// The operation took effect; what only follows from it is not complete yet.
    #[error("{act} ({operation}) took effect, but its last steps failed")]
    Unfinished {
        /// What was being done.
        act: &'static str,
        /// By which operation.
        operation: OperationId,
        /// What failed.
        source: Box<Error>,
    },
    /// This node cannot renew its record: others may have taken over what it owned.
    #[error("this node cannot reach the bucket, and another node may have taken over")]
    Isolated,
    /// The service is stopping.
    #[error("the service is stopping")]
    Stopping,
    /// A failure that several callers waited for together.
    #[error(transparent)]
    Shared(Arc<Error>),
}

impl From<ebb_compute::Error> for Error {
    fn from(error: ebb_compute::Error) -> Self {
        match error {
            ebb_compute::Error::Import { why, hint } => Error::Import { why, hint },
            error => Error::Compute(error),
        }
    }
}

impl Error {
    /// What the caller must do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Refused(refusal) => refusal.kind(),
            Error::Ledger { .. } | Error::Damaged(_) => ErrorKind::Corrupt,
            Error::Drill { kind, .. } => *kind,
            Error::Migration { .. } | Error::Release { .. } | Error::Import { .. } => ErrorKind::Invalid,
            Error::KeptAwake { .. } => ErrorKind::Conflict,
            Error::DiskFull { .. } | Error::Deadline(_) | Error::Isolated | Error::Stopping | Error::Postgres(_) => {
                ErrorKind::Unavailable
            }
            Error::Local { source, .. } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::Unavailable,
            Error::Secret { .. } | Error::Local { .. } | Error::Lost(_) | Error::Unfinished { .. } => {
                ErrorKind::Internal
            }
            // A layer or object that is missing was named by the ledger, not by the caller.
            Error::Storage(storage) if storage.kind() == ErrorKind::NotFound => ErrorKind::Corrupt,
            Error::Storage(storage) => storage.kind(),
            Error::Compute(compute) => compute.kind(),
            Error::Shared(error) => error.kind(),
        }
    }

    /// Whether another node is the owner of what was asked for, or has just become it: whoever looks again finds it.
    pub fn is_elsewhere(&self) -> bool {
        match self {
            Error::Refused(Refusal::Elsewhere { .. }) => true,
            Error::Shared(error) => error.is_elsewhere(),
            _ => false,
        }
    }

    /// Whether this node may have been taken for dead: another one answers, or will soon.
    pub fn is_isolated(&self) -> bool {
        match self {
            Error::Isolated => true,
            Error::Shared(error) => error.is_isolated(),
            _ => false,
        }
    }

    /// What a Postgres client is sent as code.
    pub fn sql_state(&self) -> SqlState {
        match self {
            Error::Shared(error) => return error.sql_state(),
            Error::DiskFull { .. } => return SqlState::DISK_FULL,
            Error::Refused(Refusal::Busy { .. }) => return SqlState::OBJECT_IN_USE,
            Error::Refused(Refusal::Elsewhere { .. }) => return SqlState::CANNOT_CONNECT_NOW,
            Error::Refused(Refusal::TooManyVisits { .. }) => return SqlState::TOO_MANY_CONNECTIONS,
            Error::Refused(Refusal::OutsideWindow { .. }) => return SqlState::INVALID_PARAMETER_VALUE,
            Error::Stopping => return SqlState::ADMIN_SHUTDOWN,
            Error::Compute(compute) if compute.is_out_of_memory() => return SqlState::OUT_OF_MEMORY,
            _ => {}
        }
        match self.kind() {
            ErrorKind::NotFound => SqlState::INVALID_CATALOG_NAME,
            ErrorKind::Conflict => SqlState::OBJECT_IN_USE,
            ErrorKind::Unavailable => SqlState::CANNOT_CONNECT_NOW,
            ErrorKind::Corrupt => SqlState::DATA_CORRUPTED,
            ErrorKind::Invalid | ErrorKind::Fenced | ErrorKind::Internal => SqlState::INTERNAL_ERROR,
        }
    }

    /// The message and all its causes in one line, for a log or a problem's detail.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            text.push_str(": ");
            text.push_str(&next.to_string());
            cause = next.source();
        }
        text
    }
}

impl Hint for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Error::Refused(refusal) => refusal.hint(),
            Error::Migration { advice, .. } | Error::Release { advice, .. } => Some(advice.clone()),
            Error::KeptAwake { sessions, .. } => Some(format!("Sessions: {}.", sessions.join("; "))),
            Error::DiskFull { .. } => {
                Some("Free disk space, or lower the reserve with EBB_MIN_FREE_BYTES, then try again.".to_owned())
            }
            Error::Unfinished { .. } => {
                Some("It is recorded and will be finished by itself as soon as the cause is gone.".to_owned())
            }
            Error::Drill { kind: ErrorKind::Corrupt, .. } => Some(
                "Nothing that is in use was touched. `ebb fsck --bucket` tells what else is damaged; take a new checkpoint \
                 while the branch is well, and drill that."
                    .to_owned(),
            ),
            Error::Secret { .. } => {
                Some("Copy secret.key from the node that made the project, or set a new password.".to_owned())
            }
            Error::Compute(ebb_compute::Error::NoPostgres { .. }) => {
                Some("Install a Postgres server (Debian: apt-get install postgresql-15), or set EBB_PG_BIN.".to_owned())
            }
            Error::Import { hint, .. } => hint.clone(),
            Error::Shared(error) => error.hint(),
            error if error.kind() == ErrorKind::Unavailable => Some("Try again in a few seconds.".to_owned()),
            _ => None,
        }
    }
}

/// Adds to an I/O error what was tried on which path.
pub(crate) trait LocalContext<T> {
    /// Names the act (a verb) and the path.
    fn on(self, act: &'static str, path: &Path) -> Result<T>;
}

impl<T> LocalContext<T> for io::Result<T> {
    fn on(self, act: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Local { act, path: path.to_owned(), source })
    }
}
