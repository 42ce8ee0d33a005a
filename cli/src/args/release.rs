//! What can be typed about releases and ledgers.

use std::path::PathBuf;

use clap::Subcommand;
use ebb_types::ProjectName;

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

/// `ebb ledger …`
#[derive(Debug, Subcommand)]
pub enum LedgerCommand {
    /// List every act on a project
    #[command(after_help = "Example:\n  ebb ledger list shop")]
    List {
        /// The project
        project: ProjectName,
    },
    /// Check the hash chain of a project's ledger
    #[command(after_help = "Example:\n  ebb ledger verify shop")]
    Verify {
        /// The project
        project: ProjectName,
    },
}
