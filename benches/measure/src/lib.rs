//! What both benches measure with: samples and their report, what a process costs, and waiting for something to come up.

pub mod process;
pub mod stats;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// LIMIT: the longest wait is for ten gigabytes to be packed and uploaded.
const WAIT_MAX: Duration = Duration::from_secs(15 * 60);

/// Waits until something holds.
///
/// # Errors
/// If it does not within a quarter of an hour.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + WAIT_MAX;
    while !holds() {
        if Instant::now() > deadline {
            bail!("{what} did not come up within {WAIT_MAX:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
