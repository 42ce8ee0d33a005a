//! Ebb's speed claims, each measured against its peer in the same run and printed as a ratio.
//!
//! ```sh
//! scripts/setup bench                             # the peers, beside what `make test` needs
//! cargo build --release -p ebb-cli -p ebb-benches
//! target/release/ebb-bench all                    # or: wake, cold, branch, rival, depth, many, volume, pool, flood, commit, backup
//! ```
//!
//! The proxy has a bench of its own (`benches/proxy`).
//!
//! Machines are noisy, so absolute times mean little: rounds of Ebb and of its peer alternate, and the ratio of their
//! medians is the result. Every bench says which question it answers and what was expected beforehand.

mod backup;
mod branch;
mod cold;
mod commit;
mod depth;
mod flood;
mod many;
mod native;
mod node;
mod pgbench;
mod pool;
mod rival;
mod volume;
mod wake;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Measures Ebb against its peers.
#[derive(Debug, Parser)]
#[command(name = "ebb-bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
    #[command(flatten)]
    common: Common,
}

/// What every bench needs to know.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// The `ebb` binary; a release build beside this one unless told otherwise.
    #[arg(long, global = true, env = "EBB_BIN")]
    ebb: Option<PathBuf>,
    /// Directory of the Postgres server binaries.
    #[arg(long, global = true, default_value = "/usr/lib/postgresql/15/bin")]
    pg_bin: PathBuf,
    /// Where data directories are put: Ebb's and the peer's on the same file system.
    #[arg(long, global = true, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Rounds of each side.
    #[arg(long, global = true)]
    rounds: Option<usize>,
    /// Seconds of one pgbench round.
    #[arg(long, global = true, default_value_t = 10)]
    seconds: u32,
    /// pgbench scale factor.
    #[arg(long, global = true)]
    scale: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
enum Bench {
    /// Connect to first row on a suspended branch, against a bare `postgres` start.
    Wake,
    /// Connect to first row on a node that has nothing local, from a bucket 20 ms away, against a wake from local data.
    Cold,
    /// Branch and checkpoint of a large database against a small one, and the stall of the source.
    Branch,
    /// A branch to its first row, against a btrfs snapshot and a copy by XFS reflinks.
    Rival,
    /// A branch on a thousand layers, against one on two.
    Depth,
    /// Ten thousand branches of one project.
    Many,
    /// pgbench on a volume against native ext4.
    Volume,
    /// Ten thousand clients on twenty backends, against PgBouncer in transaction mode.
    Pool,
    /// pgbench and logins through the proxy beside a flood of strangers.
    Flood,
    /// Commits at either durability, against plain Postgres and a synchronous `pg_receivewal`.
    Commit,
    /// Restores, and what thirty days weigh, against pgBackRest.
    Backup,
    /// All of them.
    All,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let is = |bench| cli.bench == bench || cli.bench == Bench::All;
    if is(Bench::Wake) {
        wake::run(&cli.common)?;
    }
    if is(Bench::Cold) {
        cold::run(&cli.common)?;
    }
    if is(Bench::Branch) {
        branch::run(&cli.common)?;
    }
    if is(Bench::Rival) {
        rival::run(&cli.common)?;
    }
    if is(Bench::Depth) {
        depth::run(&cli.common)?;
    }
    if is(Bench::Many) {
        many::run(&cli.common)?;
    }
    if is(Bench::Volume) {
        volume::run(&cli.common)?;
    }
    if is(Bench::Pool) {
        pool::run(&cli.common)?;
    }
    if is(Bench::Flood) {
        flood::run(&cli.common)?;
    }
    if is(Bench::Commit) {
        commit::run(&cli.common)?;
    }
    if is(Bench::Backup) {
        backup::run(&cli.common)?;
    }
    Ok(())
}
