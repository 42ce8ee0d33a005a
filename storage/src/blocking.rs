//! Blocking work (files, hashing, compression) on the runtime's threads for it.

/// Runs `work` on a thread that may block.
///
/// # Panics
/// If `work` does.
///
/// # Cancel safety
/// Dropping the future does not stop the work.
pub(crate) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => unreachable!("blocking work is never aborted"),
    }
}
