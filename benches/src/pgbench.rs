//! Runs `pgbench` and reads what it says.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::Common;

/// What a round of pgbench came to.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// Transactions a second.
    pub tps: f64,
    /// Mean latency in milliseconds.
    pub latency_ms: f64,
}

/// Fills a database. `target` are the connection arguments.
pub fn initialise(common: &Common, target: &[String], scale: u32) -> Result<()> {
    let status = Command::new(common.pg_bin.join("pgbench"))
        .args(["-q", "-i", "-s", &scale.to_string()])
        .args(target)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(status.success(), "pgbench -i failed");
    Ok(())
}

/// One timed round.
pub fn round(common: &Common, target: &[String], script: &[&str], clients: u32) -> Result<Round> {
    let out = Command::new(common.pg_bin.join("pgbench"))
        .args(["-n", "-M", "prepared", "-T", &common.seconds.to_string(), "-c", &clients.to_string()])
        .args(["-j", &clients.min(2).to_string()])
        .args(script)
        .args(target)
        .output()?;
    ensure!(out.status.success(), "pgbench: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout)?;
    let number = |label: &str| -> Result<f64> {
        let line = text.lines().find(|line| line.starts_with(label)).context("pgbench printed no result")?;
        let value = line[label.len()..].split_whitespace().next().context("pgbench printed no number")?;
        Ok(value.parse()?)
    };
    Ok(Round { tps: number("tps = ")?, latency_ms: number("latency average = ")? })
}

/// Runs a statement, and does not show what it answers.
pub fn psql(common: &Common, target: &[String], sql: &str) -> Result<()> {
    let mut command = Command::new(common.pg_bin.join("psql"));
    let status = command.args(["-Xq", "-o", "/dev/null", "-c", sql]).args(target).status()?;
    ensure!(status.success(), "{sql} failed");
    Ok(())
}

/// Arguments to reach a database over a private socket as superuser.
pub fn over_socket(dir: &Path, database: &str) -> Vec<String> {
    vec!["-h".into(), dir.display().to_string(), "-U".into(), "postgres".into(), database.into()]
}
