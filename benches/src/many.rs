//! Does the ten-thousandth branch cost what the first one does, and what does a sleeping branch hold?

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ebb_measure::stats::{Samples, heading, report};
use serde_json::json;

use crate::Common;
use crate::node::Node;

/// LIMIT: two windows of this many are compared.
const WINDOW: usize = 200;

/// Makes many branches of one project, one after another.
pub fn run(common: &Common) -> Result<()> {
    let branches = common.rounds.unwrap_or(10_000).max(2 * WINDOW);
    heading(
        "many: the last branches of one project against the first, and what a suspended branch holds",
        &format!(
            "{branches} branches of a suspended one, one by one; goal: flat, <= 8 KiB of memory, <= 64 KiB of disk"
        ),
    );
    let node = Node::start(common)?;
    let mut taken: [Samples; 2] = Default::default();
    let mut begin = None;
    for number in 0..branches {
        if number == WINDOW {
            begin = Some((node.memory_kib()?, disk_kib(&node)?));
        }
        let begun = Instant::now();
        node.post("/v1/projects/bench/branches", &json!({"name": format!("b{number}"), "from": "bench/prod"}))?;
        match number {
            number if number < WINDOW => taken[0].add_time(begun.elapsed()),
            number if number >= branches - WINDOW => taken[1].add_time(begun.elapsed()),
            _ => {}
        }
    }
    let (memory, disk) = begin.context("there were no branches")?;
    let made = (branches - WINDOW) as f64;
    report("branch create, last against first 200, p50", "ms", taken[1].median(), "first", taken[0].median(), "flat");
    let memory = (node.memory_kib()? - memory) / made;
    let disk = (disk_kib(&node)? - disk) / made;
    println!("a suspended branch holds {memory:.1} KiB of memory (goal <= 8) and {disk:.1} KiB of disk (goal <= 64)");
    Ok(())
}

/// What the node and the bucket take on disk.
fn disk_kib(node: &Node) -> Result<f64> {
    let out = Command::new("du").args(["-sk"]).arg(node.data_dir()).output()?;
    ensure!(out.status.success(), "du failed");
    Ok(String::from_utf8(out.stdout)?.split_whitespace().next().context("du said nothing")?.parse()?)
}
