//! What a process costs.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// Processor time all threads of a process have taken (proc(5), `schedstat`).
///
/// # Errors
/// If there is no such process.
pub fn processor_time(pid: u32) -> Result<Duration> {
    let mut all = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end while its directory is looked at.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        all += text.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(all))
}

/// Memory of a process that it shares with no other, in KiB.
///
/// # Errors
/// If there is no such process.
pub fn private_memory_kib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).context("no RssAnon")?;
    Ok(line.split_whitespace().nth(1).context("no value")?.parse()?)
}
