//! The proxy alone, before a Postgres that is always awake: against PgBouncer, and at its limits.
//!
//! ```sh
//! scripts/setup bench
//! cargo build --release -p ebb-proxy-bench        # the proxy and nothing else of Ebb: a short build
//! target/release/ebb-proxy-bench speed            # or: bulk, memory, storm, all
//! ```
//!
//! Proxy, PgBouncer, Postgres and clients are processes of their own and share the machine. Machines are noisy, so
//! rounds alternate and ratios of medians are printed; the processor time that a pooler's process takes for one
//! transaction hardly depends on what else runs, and is printed beside.

mod bulk;
mod client;
mod memory;
mod pooler;
mod serve;
mod speed;
mod world;

use std::alloc::System;

use clap::{Args, Parser, Subcommand};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

/// Counts what the proxy's process allocates.
#[global_allocator]
pub static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Measures Ebb's proxy against PgBouncer.
#[derive(Debug, Parser)]
#[command(name = "ebb-proxy-bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
    #[command(flatten)]
    common: Common,
}

/// What every bench needs to know.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Directory of the Postgres programs.
    #[arg(long, global = true, default_value = "/usr/lib/postgresql/15/bin")]
    pg_bin: std::path::PathBuf,
    /// Rounds of each side.
    #[arg(long, global = true, default_value_t = 3)]
    rounds: usize,
    /// Seconds of one pgbench round.
    #[arg(long, global = true, default_value_t = 3)]
    seconds: u32,
    /// Threads that carry the proxy's sessions; as many as it would take by itself unless told otherwise.
    #[arg(long, global = true)]
    lanes: Option<usize>,
    /// Clients that are held at once.
    #[arg(long, global = true, default_value_t = 50_000)]
    held: usize,
    /// Only rounds whose name contains this.
    #[arg(long, global = true)]
    only: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
enum Bench {
    /// Short transactions: prepared, simple, pipelined; plain and TLS.
    Speed,
    /// A result of 10 MB, COPY in and out of 100 MB; plain and TLS.
    Bulk,
    /// What a connection weighs: idle, active, slow, hibernated; and how many are held.
    Memory,
    /// Five thousand connections at once.
    Storm,
    /// All of them.
    All,
    /// (internal) The proxy, driven by lines on its standard input.
    #[command(hide = true)]
    Serve(serve::ServeArgs),
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let is = |bench| cli.bench == bench || cli.bench == Bench::All;
    if let Bench::Serve(args) = &cli.bench {
        return serve::run(args);
    }
    println!("$ {}", std::env::args().collect::<Vec<_>>().join(" "));
    world::raise_descriptor_limit();
    if is(Bench::Speed) {
        speed::run(&cli.common)?;
    }
    if is(Bench::Bulk) {
        bulk::run(&cli.common)?;
    }
    if is(Bench::Memory) {
        memory::run(&cli.common)?;
    }
    if is(Bench::Storm) {
        memory::storm(&cli.common)?;
    }
    Ok(())
}
