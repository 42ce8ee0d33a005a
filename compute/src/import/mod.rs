//! Imports: a cluster that somebody else made becomes a data directory that Ebb can make a layer of; and a dump is read
//! into a fresh branch.
//!
//! ```text
//!   a data directory ── copy ──────────────┐
//!   a running server ── base backup, WAL ──┤► stage ─ recover ─ check pages ─ settle ─ check tables ─ shut down ─► layer
//!   a dump ── pg_restore, psql ──► a unit on the template ─ check tables ─► seal
//! ```
//!
//! **Invariants.** The source is only read; of a running one there is no trace when its connection ends. Nothing of the
//! source's configuration is used. What comes out was shut down cleanly, has page checksums that fit, and no superuser
//! that anybody but Ebb could be (decision 0016).
//!
//! **Crash.** Servers end with this process; [`Stage::clear`] removes the rest.
//!
//! **Cancellation.** Dropping a future kills what it had started and leaves a stage that is of no use but to be cleared.

mod copy;
mod dump;
mod progress;
mod remote;
mod server;
mod settle;
mod stage;
mod tools;
mod unload;
mod verify;

use std::path::Path;

use ebb_storage::pg_files;
use tokio_util::sync::CancellationToken;

pub use self::copy::{Found, look};
pub use self::dump::{At, Dump, DumpKind, restore};
pub use self::progress::{Counted, Phase, Progress, Seen};
use self::server::{Begin, Server};
pub use self::settle::Settlement;
pub use self::stage::Stage;
pub(crate) use self::stage::give;
pub use self::unload::{DumpFormat, dump};
use crate::error::{Error, Result};
use crate::postgres::Installation;
pub use crate::replication::source::Source;

/// Copies a data directory into a stage, which is made anew.
///
/// # Errors
/// As [`look`]; and if the source was written to meanwhile.
///
/// # Cancel safety
/// Dropped, it stops soon after.
pub async fn copy_directory(source: &Path, stage: &Stage, progress: &Progress) -> Result<()> {
    let (source, stage, progress) = (source.to_owned(), stage.clone(), progress.clone());
    let dropped = std::sync::Arc::new(());
    let wanted = std::sync::Arc::downgrade(&dropped);
    let copied = blocking(move || {
        stage.make()?;
        copy::copy(&source, &stage, &progress, &|| wanted.strong_count() == 0)
    });
    let copied = copied.await;
    drop(dropped);
    copied
}

/// Takes the cluster of a running server into a stage, which is made anew, and shuts it down cleanly. With `cut_over` WAL
/// is received and replayed until that is cancelled; without it, as far as the source has got when its files are here.
///
/// # Errors
/// [`Error::Import`] with what the source refused, or what was wrong with what it sent.
///
/// # Cancel safety
/// Dropped, it ends every connection and server, and leaves a stage to be cleared.
pub async fn take_server(
    source: &Source,
    installation: &Installation,
    stage: &Stage,
    cut_over: Option<&CancellationToken>,
    progress: &Progress,
) -> Result<()> {
    let fresh = stage.clone();
    blocking(move || fresh.make()).await?;
    remote::take(source, installation, stage, cut_over, progress).await
}

/// Brings the cluster of a stage to a clean shutdown, by Postgres' own recovery if need be.
///
/// # Errors
/// [`Error::Import`] with what Postgres said.
pub async fn recover(installation: &Installation, stage: &Stage, progress: &Progress) -> Result<()> {
    if is_clean(stage)? {
        return Ok(());
    }
    progress.begin(Phase::Recovering, Counted::Bytes, None);
    let mut server = Server::start(installation, stage, Begin::Plainly)?;
    server.ready().await?;
    server.stop().await
}

/// Whether the cluster of a stage was shut down cleanly, and is no base backup, whose recovery begins elsewhere.
fn is_clean(stage: &Stage) -> Result<bool> {
    let info = pg_files::read_image_info(&stage.data())?;
    Ok(info.clean && !stage.data().join("backup_label").exists())
}

/// Makes the recovered cluster of a stage fit to be a branch, and checks every page, table and index of it. It is shut
/// down cleanly when this returns.
///
/// # Errors
/// [`Error::Import`] with what is wrong with it, and what to do.
pub async fn finish(
    installation: &Installation,
    stage: &Stage,
    settlement: &Settlement,
    progress: &Progress,
) -> Result<()> {
    verify::pages(installation, stage, progress).await?;
    server::ensure_superuser(installation, stage).await?;
    let mut server = Server::start(installation, stage, Begin::Plainly)?;
    server.ready().await?;
    let databases = settle::settle(&server, stage, settlement, progress).await?;
    verify::tables(installation, &server, &databases, progress).await?;
    server.stop().await?;
    progress.begin(Phase::Sealing, Counted::Bytes, None);
    Ok(())
}

/// Runs what blocks on a thread for it.
async fn blocking<T: Send + 'static>(act: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(act).await.unwrap_or_else(|_| Err(Error::Cancelled))
}
