//! `ebb.toml`: what a release says of itself, in the directory that is released. Pure.
//!
//! It is stored in the ledger with the plan of its release, for ever: fields may be added (with a default), none may change
//! its meaning. `docs/releases.md` describes it for people; [`read`] reports everything that is wrong with a text, not only
//! the first of it.

mod check;
mod read;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use check::{Checked, Finding, Looked, check};
pub use read::read;

/// The name of the file.
pub const FILE_NAME: &str = "ebb.toml";

/// LIMIT: a page that people read; what is longer is no description of a release.
pub const BYTES_MAX: u64 = 64 << 10;

/// LIMIT: a probe is a question whose answer tells whether a release works; a test suite belongs before it.
pub const PROBES_MAX: usize = 50;

/// A release's description of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseFile {
    /// The directory of its migrations, within the release's own.
    #[serde(default = "default_migrations")]
    pub migrations: String,
    /// Names of files that must be in the project's directory of secrets before anything is touched.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// What may be done to deploy it, and what if it does not work.
    #[serde(default)]
    pub policy: Policy,
    /// What shows whether it works.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probe>,
}

impl Default for ReleaseFile {
    fn default() -> Self {
        Self { migrations: default_migrations(), secrets: Vec::new(), policy: Policy::default(), probes: Vec::new() }
    }
}

fn default_migrations() -> String {
    crate::artifact::MIGRATIONS_DIR.to_owned()
}

/// What may be done to deploy a release, and what if it does not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Whether the migrations are tried on a copy of `prod` first.
    pub rehearse: bool,
    /// Whether clients are held from before the first migration until the code is switched.
    pub fence: bool,
    /// How long open transactions may go on before the fence ends them.
    pub fence_timeout_ms: u64,
    /// How long a migration may wait for a lock: everyone behind it waits as long.
    pub lock_timeout_ms: u64,
    /// How long a statement of a migration may take.
    pub statement_timeout_ms: u64,
    /// What is taken back by itself if a migration or a probe fails.
    pub rollback: Automatic,
    /// The bound of that: with more transactions than this to be set aside, nothing is taken back by itself.
    pub max_lost_transactions: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            rehearse: true,
            fence: false,
            fence_timeout_ms: 10_000,
            lock_timeout_ms: 10_000,
            statement_timeout_ms: 15 * 60_000,
            rollback: Automatic::None,
            max_lost_transactions: 0,
        }
    }
}

impl Policy {
    /// How long open transactions may go on before the fence ends them.
    pub fn fence_timeout(&self) -> Duration {
        Duration::from_millis(self.fence_timeout_ms)
    }
}

/// What is taken back by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Automatic {
    /// Nothing.
    #[default]
    None,
    /// The code.
    Code,
    /// Code and data; with more transactions since the checkpoint than the bound, nothing.
    Data,
}

/// A question whose answer tells whether a release works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What people call it.
    pub name: String,
    /// What is asked.
    #[serde(flatten)]
    pub question: Question,
    /// How long one try may take.
    pub timeout_ms: u64,
    /// How often it is asked again if the answer is not right.
    pub retries: u32,
    /// How long it is waited before each of these.
    pub wait_ms: u64,
}

/// What a probe asks, and the only answer that is right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Question {
    /// A query, as the role `app` in the database `app`.
    Sql {
        /// The query.
        sql: String,
        /// What the first column of its first row is, as text; empty for no row, and for NULL.
        expect: String,
    },
    /// A GET request.
    Http {
        /// The URL: plain HTTP.
        url: String,
        /// The status of the answer.
        status: u16,
        /// A JSON pointer (RFC 6901) into its body.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        json: Option<String>,
        /// What is there, as text: strings without their quotes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expect: Option<String>,
    },
    /// A program, run in the release's directory.
    Command {
        /// The program and its arguments.
        command: Vec<String>,
        /// Its exit code.
        exit: i32,
    },
}

impl Question {
    /// Whether a copy of the data is enough to answer it.
    pub fn is_sql(&self) -> bool {
        matches!(self, Question::Sql { .. })
    }
}

/// Something that is wrong with a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Fault {
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1, in characters.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FILE_NAME}:{}:{}: {}", self.line, self.column, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}
