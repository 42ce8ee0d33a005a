//! The harness of the end-to-end tests: a server of its own per test, driven as a user would drive it.
//!
//! Everything is real: the built `ebb` binary, stock Postgres, FUSE mounts, psql, pgbench and drivers. A test waits for
//! conditions, never for time. When a [`Node`] is dropped, nothing of it may be left: no process, no mount.

mod authority;
mod history;
mod node;
mod python;
mod stock;
mod writer;

pub use authority::Authority;
pub use history::{Written, write_history};
pub use node::{Node, Ran, kill, pg_bin, run};
pub use python::python;
pub use stock::Stock;
pub use writer::Writer;

use std::time::{Duration, Instant};

/// LIMIT: what is waited for takes milliseconds on an idle machine; this allows for a loaded one.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// LIMIT: a command may wait for another's work, for as long as the server lets it; none has work for so long.
pub const COMMAND_PATIENCE: Duration = Duration::from_secs(180);

/// Waits until something holds.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until something holds that is asked asynchronously.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub async fn wait_until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits for an outcome.
///
/// # Panics
/// When there is none within [`PATIENCE`].
pub async fn within<F: Future>(what: &str, outcome: F) -> F::Output {
    let outcome = tokio::time::timeout(PATIENCE, outcome).await;
    outcome.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}
