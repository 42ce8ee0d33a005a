//! Does it cost anything to have been sealed a thousand times?
//!
//! Compaction goes on beside it, so that in the end the branch lies on fewer layers; how many is told, too.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use ebb_measure::stats::{Samples, heading, report};
use ebb_measure::wait_for;
use ebb_storage::layer::Manifest;
use serde_json::json;
use tokio_postgres::NoTls;

use crate::Common;
use crate::node::Node;
use crate::pgbench::{self, over_socket};

/// Seals of the deep branch.
const SEALS: usize = 1000;

/// Checkpoints a branch a thousand times while its pages change, then wakes it and reads it, in turns with one beside it
/// that was never sealed while it was awake.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(5);
    let scale = common.scale.unwrap_or(10);
    heading(
        "depth: waking and reading a branch that was sealed 1,000 times, against one that was not",
        &format!(
            "{rounds} rounds of {} s, in turns, each on a fresh mount; select-only, scale {scale}; goal reads >= 0.95, wake <= 2",
            common.seconds
        ),
    );
    let node = Node::start(common)?;
    let socket = node.wake("prod")?;
    pgbench::initialise(common, &over_socket(&socket, "app"), scale)?;
    node.suspend("prod")?;
    for branch in ["flat", "deep"] {
        node.post("/v1/projects/bench/branches", &json!({"name": branch, "from": "bench/prod"}))?;
    }
    let (taken, deepest) = deepen(&node, scale)?;
    report("1,000th checkpoint against the first, p50", "ms", taken[1].median(), "first", taken[0].median(), "<= 1.2");
    let layers = |branch: &str| Ok::<_, anyhow::Error>(layers_of(&node, branch)? as f64);
    report(
        "layers after 1,000 checkpoints, deepest among 20",
        "layers",
        deepest as f64,
        "seals",
        SEALS as f64,
        "<= 0.1",
    );
    report("layers then", "layers", layers("deep")?, "flat", layers("flat")?, "<= 65");

    let sides = ["deep", "flat"];
    let mut wakes: [Samples; 2] = Default::default();
    let mut tps: [Samples; 2] = Default::default();
    let mut memory: [Samples; 2] = Default::default();
    for _ in 0..rounds {
        for (side, branch) in sides.into_iter().enumerate() {
            node.suspend(branch)?;
            let begun = Instant::now();
            let socket = node.wake(branch)?;
            wakes[side].add_time(begun.elapsed());
            tps[side].add(pgbench::round(common, &over_socket(&socket, "app"), &["-S"], 4)?.tps);
            memory[side].add(unit_memory_mb(&socket)?);
        }
    }
    report("wake, deep against flat, p50", "ms", wakes[0].median(), "flat", wakes[1].median(), "<= 2");
    report("select-only, 4 clients", "tps", tps[0].median(), "flat", tps[1].median(), ">= 0.95");
    report("memory of the unit process", "MB", memory[0].median(), "flat", memory[1].median(), "about 1");
    Ok(())
}

/// Seals `deep` a thousand times, each time with some pages of its own; how long the first and the last fifty checkpoints
/// took, and on how many layers it lay at most.
fn deepen(node: &Node, scale: u32) -> Result<([Samples; 2], usize)> {
    let socket = node.wake("deep")?;
    let conninfo = format!("host={} user=postgres dbname=app", socket.display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (client, connection) = runtime.block_on(tokio_postgres::connect(&conninfo, NoTls))?;
    let connection = runtime.spawn(connection);
    let mut taken: [Samples; 2] = Default::default();
    let mut deepest = 0;
    for layer in 0..SEALS {
        let change = format!(
            "update pgbench_accounts set abalance = abalance + 1 where aid in (select (random() * {rows})::int from generate_series(1, 8)); checkpoint",
            rows = scale * 100_000
        );
        runtime.block_on(client.batch_execute(&change))?;
        let begun = Instant::now();
        node.post("/v1/projects/bench/branches/deep/checkpoints", &json!({"name": format!("c{layer}")}))?;
        match layer {
            0..50 => taken[0].add_time(begun.elapsed()),
            950.. => taken[1].add_time(begun.elapsed()),
            _ => {}
        }
        if layer % 50 == 49 {
            deepest = deepest.max(layers_of(node, "deep")?);
        }
    }
    drop(client);
    runtime.block_on(connection)??;
    Ok((taken, deepest))
}

/// How many layers the head of a branch lies on, itself among them.
fn layers_of(node: &Node, branch: &str) -> Result<usize> {
    let shown = node.get(&format!("/v1/projects/bench/branches/{branch}"))?;
    let head = shown["head"].as_str().context("a branch has no head")?.to_owned();
    let path = node.data.join("layers").join(&head).join("manifest");
    // The layer is completed after the seal was answered.
    wait_for("a layer", || path.exists())?;
    Ok(Manifest::decode(&head, &std::fs::read(path)?)?.chain.len())
}

/// Memory of the unit that serves a socket directory, without what it shares with others.
fn unit_memory_mb(socket_dir: &Path) -> Result<f64> {
    let branch = socket_dir.parent().context("a socket directory is in a branch's")?;
    let pid = std::fs::read_to_string(branch.join("unit.pid"))?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim()))?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).context("no RssAnon")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no value")?.parse()?;
    Ok(kib / 1024.0)
}
