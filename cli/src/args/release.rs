//! What can be typed about releases and ledgers.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ebb_types::{ProjectName, Timestamp};

use super::IdempotencyKey;

/// `ebb release …`
#[derive(Debug, Subcommand)]
pub enum ReleaseCommand {
    /// Checkpoint prod, run the new migrations/*.sql of DIR, switch the project's symlink to its code
    ///
    /// With an ebb.toml in DIR: tries it on a copy of prod first, asks its probes after, and takes it back by itself if its
    /// policy says so.
    #[command(after_help = "\
Examples:
  ebb release create shop --artifact ./build
  ebb release create shop --artifact ./build --rehearse-only")]
    Create {
        /// The project
        project: ProjectName,
        /// The directory with the code and migrations/*.sql
        #[arg(long, value_name = "DIR")]
        artifact: PathBuf,
        /// Only try migrations and SQL probes on a copy of prod, and tell what that showed
        #[arg(long)]
        rehearse_only: bool,
        #[command(flatten)]
        key: IdempotencyKey,
    },
    /// Check a directory that is to be released: its ebb.toml and its migrations. Needs no server
    #[command(after_help = "Example:\n  ebb release check ./build")]
    Check {
        /// The directory
        #[arg(default_value = ".")]
        dir: PathBuf,
    },
    /// Show a release: how it fared on a copy of prod, its migrations, its probes
    #[command(after_help = "Example:\n  ebb release show shop v2")]
    Show {
        /// The project
        project: ProjectName,
        /// The release (`v1`)
        release: String,
    },
    /// List a project's releases
    #[command(after_help = "Example:\n  ebb release list shop")]
    List {
        /// The project
        project: ProjectName,
    },
}

/// How `ebb rollback` goes back.
#[derive(Debug, Clone, Copy, Args)]
pub struct RollbackHow {
    /// Only print what would come back and what would be set aside
    #[arg(long)]
    pub plan: bool,
    /// Leave the data as it is
    #[arg(long, conflicts_with = "data_only")]
    pub code_only: bool,
    /// Leave the code as it is
    #[arg(long)]
    pub data_only: bool,
    /// With --plan: do not count the rows that were written since
    #[arg(long, requires = "plan")]
    pub no_rows: bool,
}

/// `ebb ledger …`
#[derive(Debug, Subcommand)]
pub enum LedgerCommand {
    /// List the acts on a project
    #[command(after_help = "\
Examples:
  ebb ledger list shop
  ebb ledger list shop --on prod --since 2026-11-21T06:00:00Z --operation release")]
    List {
        /// The project
        project: ProjectName,
        #[command(flatten)]
        search: LedgerSearch,
    },
    /// Write the acts on a project as JSON Lines, one entry each, with their hashes
    #[command(after_help = "\
Examples:
  ebb ledger export shop > shop.jsonl
  ebb ledger export shop --bucket /var/lib/ebb/bucket")]
    Export {
        /// The project; with --bucket also its identifier
        project: String,
        /// Read this bucket, without a server: a directory path, or a URL as `ebb serve` takes it
        #[arg(long, value_name = "URL")]
        bucket: Option<String>,
        #[command(flatten)]
        search: LedgerSearch,
    },
    /// Check the hash chain of a project's ledger
    #[command(after_help = "\
Examples:
  ebb ledger verify shop
  ebb ledger verify --bucket /var/lib/ebb/bucket shop")]
    Verify {
        /// The project; with --bucket also its identifier
        project: String,
        /// Read this bucket, without a server: a directory path, or a URL as `ebb serve` takes it
        #[arg(long, value_name = "URL")]
        bucket: Option<String>,
        /// A hash that was noted earlier, which an entry must have: it shows if the end was cut off
        #[arg(long, value_name = "HASH", requires = "bucket")]
        noted: Option<String>,
    },
}

/// What is looked for in a ledger.
#[derive(Debug, Clone, Args)]
pub struct LedgerSearch {
    /// Only acts of whoever has this in their name
    #[arg(long)]
    pub actor: Option<String>,
    /// Only acts on this branch, checkpoint or release
    #[arg(long, value_name = "REF")]
    pub on: Option<String>,
    /// Only acts of this kind (`create branch`, `release` …), or of this operation
    #[arg(long, value_name = "ACT")]
    pub operation: Option<String>,
    /// Only entries of this time or later
    #[arg(long, value_name = "TIME")]
    pub since: Option<Timestamp>,
    /// Only entries before this time
    #[arg(long, value_name = "TIME")]
    pub until: Option<Timestamp>,
    /// At most so many entries, the oldest first
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}
