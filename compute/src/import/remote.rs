//! From a running server to a recovered data directory: its base backup, and its WAL until it is cut over.
//!
//! ```text
//!   connection 1 ── BASE_BACKUP ──────────► files ──┐ verified against the backup's manifest
//!   connection 2 ── WAL, a temporary slot ► wal/ ───┤
//!                                                   ▼
//!        to follow: a standby replays what comes ── cut over: what was flushed by then comes, promotion
//!        otherwise: what was flushed by then comes ── recovery to the end of it, promotion
//! ```
//!
//! **What is resumed.** WAL: where its connection breaks, another one goes on with the segment that was being written, as
//! long as the source has it. A base backup is not: where its connection breaks, it begins anew, a few times.
//!
//! **The source.** It is only read. The slot goes with its connection, so that nothing of an import that was killed holds
//! back the source's WAL.

use std::time::{Duration, Instant};

use ebb_types::Lsn;
use tokio::sync::watch;
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::progress::{Counted, Phase, Progress};
use super::server::{Begin, Server};
use super::stage::Stage;
use super::{copy, tools};
use crate::error::{Error, OsContext, Result};
use crate::postgres::Installation;
use crate::replication::backup::{Backup, Failure, MANIFEST};
use crate::replication::segments::Segments;
use crate::replication::source::Source;
use crate::replication::wire::{self, Connection, Message};

/// How often the source hears of us at least: it gives up who is silent for a minute (`wal_sender_timeout`).
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// LIMIT: so long a source may be away before its WAL is given up on.
const AWAY_MAX: Duration = Duration::from_secs(300);

/// A commit that does not wait for the disk (`synchronous_commit = off`) is there after three rounds of the WAL writer, of
/// 200 ms each (PostgreSQL 15 manual, 30.4).
const ASYNCHRONOUS: Duration = Duration::from_millis(700);

/// What Postgres answers when it has deleted the WAL that is asked for: `undefined_file`.
const REMOVED: &str = "58P01";

/// How often it is looked whether a standby still runs.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// LIMIT: a link that breaks off so often will go on doing so: a person must look.
const TRIES_MAX: u32 = 3;

/// LIMIT: WAL that is on the source's disk is sent at once; a link may be slow.
const STALLED: Duration = Duration::from_secs(300);

/// Takes the cluster of a running server into a stage, which is made anew, and recovers it. With `cut_over` it goes on
/// receiving and replaying until that is cancelled.
///
/// # Errors
/// [`Error::Import`] with what the source refused, or what was wrong with what it sent.
///
/// # Cancel safety
/// Dropped, it ends every connection and server.
pub(super) async fn take(
    source: &Source,
    installation: &Installation,
    stage: &Stage,
    cut_over: Option<&CancellationToken>,
    progress: &Progress,
) -> Result<()> {
    let failed = |error: wire::Error| source.failed(&error);
    let mut pause = Duration::from_secs(1);
    let mut tries = 1;
    let Copied { mut receiving, until, consistent, mut connection } = loop {
        match back_up(source, stage, progress).await {
            Ok(copied) => break copied,
            // What did come, the files as well, is of no use: each backup is whole or none.
            Err(Failure::Wire(error)) if tries < TRIES_MAX && may_pass(&error) && (tries > 1 || begun(stage)) => {
                tracing::warn!(error = crate::error::chain(&error), tries, "a base backup broke off and begins anew");
                progress.note("the connection to the source broke, and the base backup began anew");
                sleep(pause).await;
                (tries, pause) = (tries + 1, pause * 4);
                let fresh = stage.clone();
                super::blocking(move || fresh.make()).await?;
            }
            Err(failure) => return Err(explain(source, failure)),
        }
    };
    verify(installation, stage).await?;
    copy::leave_behind(&stage.data())?;

    let standby = match cut_over {
        None => None,
        Some(cut_over) => {
            let mut standby = Server::start(installation, stage, Begin::AsStandby)?;
            follow(&mut standby, &mut receiving, cut_over, progress).await?;
            // Whoever said so has stopped writing: the connection may have been closed for idleness since.
            connection = source.connect("ebb_import").await?;
            Some(standby)
        }
    };
    let target = flushed(&mut connection).await.map_err(failed)?.max(consistent);
    drop(connection);
    progress.begin(Phase::CatchingUp, Counted::Bytes, None);
    tracing::info!(source = source.shown(), %target, "an import catches up");
    let _ = until.send(Some(target));
    receiving.catch_up(target, progress).await?;

    progress.begin(Phase::Recovering, Counted::Bytes, None);
    let mut server = match standby {
        Some(standby) => standby,
        None => Server::start(installation, stage, Begin::WithWal)?,
    };
    if cut_over.is_some() {
        promoted(&mut server).await?;
    } else {
        server.ready().await?;
    }
    server.stop().await?;
    super::stage::remove_wal(&stage.wal())
}

/// Whether another connection may do better: this one broke, or its server is being stopped or started (class 57P).
fn may_pass(error: &wire::Error) -> bool {
    match error {
        wire::Error::Io(_) | wire::Error::Deadline(_) => true,
        wire::Error::Refused { code, .. } => code.starts_with("57P"),
        _ => false,
    }
}

/// Whether anything came: a source that could never be reached is told of at once.
fn begun(stage: &Stage) -> bool {
    stage.data().join("global").exists() || stage.data().join("base").exists()
}

/// A base backup, and what goes on receiving the WAL since.
struct Copied {
    receiving: Receiving,
    /// Tells it where to stop.
    until: watch::Sender<Option<Lsn>>,
    /// From here on the files are consistent.
    consistent: Lsn,
    connection: Connection,
}

async fn back_up(source: &Source, stage: &Stage, progress: &Progress) -> Result<Copied, Failure> {
    progress.begin(Phase::Copying, Counted::Bytes, None);
    let mut connection = source.dial("ebb_import").await?;
    let unknown = || Error::import("the source does not tell its version");
    let pg_major = connection.pg_major().ok_or_else(unknown)?;
    let segment_bytes = bytes_of(&connection.show("wal_segment_size").await?)?;
    // WAL is kept from here on, and with it that of the backup, which begins later.
    let (mut for_wal, slot) = (source.dial("ebb_import").await?, slot());
    for_wal.make_temporary_slot(&slot).await?;
    let backup = Backup::begin(connection, pg_major).await?;
    progress.begin(Phase::Copying, Counted::Bytes, backup.total_bytes);
    if let Some(bytes) = backup.total_bytes {
        stage.check_room(bytes)?;
    }
    let pg_timeline = backup.pg_timeline;
    if pg_timeline > 1 {
        let history = source.dial("ebb_import").await?.history(pg_timeline).await?;
        let path = stage.wal().join(format!("{pg_timeline:08X}.history"));
        std::fs::write(&path, history).on("write", &path)?;
    }
    let (position, received) = watch::channel(Received::default());
    let segments = Segments::new(&stage.wal(), pg_timeline, segment_bytes, backup.start);
    let connection = Some((for_wal, slot));
    let mut wal = Wal { source: source.clone(), connection, segments, pg_timeline, position };
    let (until, target) = watch::channel(None);
    // It ends with this future, or with whoever has it after.
    let task = tokio::spawn(async move { wal.receive(target).await });
    let mut receiving = Receiving { received, task: Some(task) };
    let data = stage.data();
    let (consistent, connection) = tokio::select! {
        backed_up = backup.receive(&data, progress) => backed_up?,
        // It ends before it is told to only if it fails.
        ended = receiving.ended() => return Err(ended.err().unwrap_or(Error::Cancelled).into()),
    };
    Ok(Copied { receiving, until, consistent, connection })
}

/// Where the source's disk has WAL up to, commits that do not wait for it included.
async fn flushed(connection: &mut Connection) -> wire::Result<Lsn> {
    connection.identify().await?;
    sleep(ASYNCHRONOUS).await;
    Ok(connection.identify().await?.flushed)
}

/// A name that no other import has.
fn slot() -> String {
    format!("ebb_import_{:016x}", rand::random::<u64>())
}

/// Lets a standby replay until the source is cut over.
async fn follow(
    standby: &mut Server,
    receiving: &mut Receiving,
    cut_over: &CancellationToken,
    progress: &Progress,
) -> Result<()> {
    progress.begin(Phase::Following, Counted::Bytes, None);
    let begun = receiving.received.borrow().here;
    loop {
        tokio::select! {
            () = cut_over.cancelled() => return Ok(()),
            ended = receiving.ended() => return Err(ended.err().unwrap_or(Error::Cancelled)),
            () = sleep(LOOK_AGAIN) => {}
        }
        standby.is_alive()?;
        let Received { here, there } = *receiving.received.borrow();
        progress.set(here.0.saturating_sub(begun.0), None);
        progress.behind(there.0.saturating_sub(here.0));
    }
}

/// Promotes a standby. One that has only just begun does not hear of it, so it is told again.
async fn promoted(standby: &mut Server) -> Result<()> {
    loop {
        standby.promote()?;
        match timeout(Duration::from_secs(1), standby.ready()).await {
            Ok(ready) => return ready,
            Err(_) => standby.is_alive()?,
        }
    }
}

fn explain(source: &Source, failure: Failure) -> Error {
    match failure {
        Failure::Wire(error) => source.failed(&error),
        Failure::Here(error) => error,
    }
}

/// Compares what came with the backup's own manifest, if the program for that is there.
async fn verify(installation: &Installation, stage: &Stage) -> Result<()> {
    let program = installation.bin.join("pg_verifybackup");
    if !program.exists() || !stage.data().join(MANIFEST).exists() {
        return Ok(());
    }
    let arguments = ["--no-parse-wal", "--exit-on-error", tools::DATA].map(str::to_owned);
    let ended = tools::run(tools::on_directory(&program, stage, &arguments)?, |_| ()).await?;
    match ended.is_success() {
        true => Ok(()),
        false => Err(Error::import(format!("the base backup is not what the source sent: {}", ended.complaint()))),
    }
}

/// Reads `16MB`, `1GB`.
fn bytes_of(shown: &str) -> Result<u32> {
    let digits = shown.find(|c: char| !c.is_ascii_digit()).unwrap_or(shown.len());
    let unit = match &shown[digits..] {
        "MB" => Some(1 << 20),
        "GB" => Some(1 << 30),
        "kB" => Some(1 << 10),
        _ => None,
    };
    let bytes = unit.zip(shown[..digits].parse::<u32>().ok()).and_then(|(unit, count)| count.checked_mul(unit));
    bytes.ok_or_else(|| Error::import(format!("the source has WAL segments of {shown:?}")))
}

/// How far WAL is.
#[derive(Debug, Clone, Copy, Default)]
struct Received {
    /// Here.
    here: Lsn,
    /// At the source, as it last said.
    there: Lsn,
}

/// The task that receives WAL, from outside. Dropped, it ends.
#[derive(Debug)]
struct Receiving {
    received: watch::Receiver<Received>,
    task: Option<tokio::task::JoinHandle<Result<()>>>,
}

impl Receiving {
    /// Waits for its end.
    async fn ended(&mut self) -> Result<()> {
        let Some(task) = &mut self.task else { return Err(Error::Cancelled) };
        let ended = task.await;
        self.task = None;
        ended.unwrap_or(Err(Error::Cancelled))
    }

    /// Waits until it has come as far as it was told to.
    async fn catch_up(&mut self, target: Lsn, progress: &Progress) -> Result<()> {
        let begun = self.received.borrow().here;
        progress.set(0, Some(target.0.saturating_sub(begun.0)));
        let received = self.received.clone();
        let mut looked = (begun, Instant::now());
        loop {
            tokio::select! {
                ended = self.ended() => return ended,
                () = sleep(LOOK_AGAIN) => {}
            }
            let here = received.borrow().here;
            progress.set(here.0.saturating_sub(begun.0), None);
            if here != looked.0 {
                looked = (here, Instant::now());
            } else if looked.1.elapsed() > STALLED {
                return Err(Error::Import {
                    why: format!("the source sends no WAL: it is at {target}, and {here} is here"),
                    hint: Some("See the source's log, and import again.".to_owned()),
                });
            }
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Receives WAL into segments.
#[derive(Debug)]
struct Wal {
    source: Source,
    /// One with a slot of this name, to begin with.
    connection: Option<(Connection, String)>,
    segments: Segments,
    pg_timeline: u32,
    position: watch::Sender<Received>,
}

impl Wal {
    /// Receives until it has come to the position it is told, over as many connections as that takes.
    async fn receive(&mut self, target: watch::Receiver<Option<Lsn>>) -> Result<()> {
        let mut pause = Duration::from_millis(100);
        let mut away = Instant::now();
        loop {
            let before = self.segments.end();
            let failure = match self.session(&target).await {
                Ok(()) => return self.segments.finish(),
                Err(Failure::Here(error @ Error::Import { .. })) => return Err(error),
                Err(failure) => failure,
            };
            let is_final = matches!(&failure, Failure::Wire(wire::Error::Refused { code, .. }) if code == REMOVED);
            let failure = explain(&self.source, failure);
            if self.segments.end() > before {
                (pause, away) = (Duration::from_millis(100), Instant::now());
            }
            if is_final || away.elapsed() > AWAY_MAX {
                return Err(failure);
            }
            tracing::warn!(error = crate::error::chain(&failure), "an import's WAL does not come; it is tried again");
            self.segments.rewind();
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    async fn session(&mut self, target: &watch::Receiver<Option<Lsn>>) -> Result<(), Failure> {
        let (connection, slot) = match self.connection.take() {
            Some(found) => found,
            None => {
                let (mut connection, slot) = (self.source.dial("ebb_import").await?, slot());
                connection.make_temporary_slot(&slot).await?;
                (connection, slot)
            }
        };
        let mut stream = connection.stream(&slot, self.segments.end(), self.pg_timeline).await?;
        let mut target = target.clone();
        let mut report = interval(REPORT_EVERY);
        loop {
            if target.borrow_and_update().is_some_and(|target| self.segments.end() >= target) {
                return Ok(());
            }
            tokio::select! {
                message = stream.next() => match message? {
                    Message::Wal { start, end, bytes } => {
                        // LIMIT: 128 KiB at most, into the page cache.
                        self.segments.write(start, &bytes)?;
                        let here = self.segments.end();
                        self.position.send_replace(Received { here, there: end.max(here) });
                    }
                    Message::Alive { end, reply } => {
                        let here = self.segments.end();
                        self.position.send_replace(Received { here, there: end.max(here) });
                        if reply {
                            stream.report(here).await?;
                        }
                    }
                    Message::Ended => return Err(wire::Error::Unexpected("there is no more WAL").into()),
                },
                _ = report.tick() => stream.report(self.segments.end()).await?,
                changed = target.changed() => if changed.is_err() {
                    return Err(Error::Cancelled.into());
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_postgres_shows_them() {
        assert_eq!(bytes_of("16MB").unwrap(), 16 << 20);
        assert_eq!(bytes_of("1GB").unwrap(), 1 << 30);
        assert!(bytes_of("16").is_err() && bytes_of("MB").is_err());
    }
}
