//! The image of a moment between seals: the seal before it, the branch's WAL archive, and Postgres' own recovery.
//!
//! It happens on a volume of its own, whose name is in the operation's plan, and ends in a layer, whose name is there, too.
//! WAL beyond the moment is not even brought where the moment is a position; for a time Postgres stops by itself.
//!
//! **Crash**: whatever is left of an earlier try is removed first.

use std::fs::{self, File, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use ebb_compute::manager::{Recovery, Unit, Until};
use ebb_storage::archive::{Archive, Range};
use ebb_storage::pg_files::WalSegment;
use ebb_storage::volume::Volume;
use ebb_types::{BranchId, LayerId, Lsn, Timestamp};

use super::{LocalNode, Node as _, Start, blocking};
use crate::error::LocalContext as _;
use crate::event::{Moment, Replay};
use crate::{Error, Result};

/// Where the archive's WAL is put, in the volume's directory of WAL.
const WAL_DIR: &str = "replay";

/// LIMIT: WAL that came in so long after a time holds no commit from before: the shipper sends within seconds, and clocks
/// of one machine do not jump further while a database is in use.
const CLOCKS_DIFFER: jiff::SignedDuration = jiff::SignedDuration::from_secs(30);

/// What Postgres says when it had no more WAL before it met the first commit after the wanted time (PostgreSQL 15,
/// `xlogrecovery.c`).
const NO_COMMIT_AFTER: &str = "recovery ended before configured recovery target was reached";

impl LocalNode {
    pub(super) async fn replay_here(&self, replay: &Replay, like: &Start) -> Result<Option<Lsn>> {
        if self.manifest(replay.layer).await?.is_some() {
            return Ok(None);
        }
        let sealed = self.recovered(replay, like).await?.stop(replay.layer).await?;
        if !sealed.new {
            return Err(Error::Lost("the image that was recovered"));
        }
        Ok(sealed.end)
    }

    /// A unit on the image of the moment, which nobody but the caller knows of.
    pub(super) async fn recovered(&self, replay: &Replay, like: &Start) -> Result<Unit> {
        let until = match replay.to {
            Moment::Lsn(_) => None,
            Moment::Time(time) => Some(Until::Time(time)),
        };
        match self.replay_until(replay, like, until).await {
            // All that is archived was committed before: then the end of it is the moment.
            Err(error) if until.is_some() && error.chain().contains(NO_COMMIT_AFTER) => {
                self.replay_until(replay, like, None).await
            }
            done => done,
        }
    }

    async fn replay_until(&self, replay: &Replay, like: &Start, until: Option<Until>) -> Result<Unit> {
        self.discard(replay.scratch).await?;
        self.remove_branch(replay.scratch).await?;
        self.make_openable(replay.base).await?;
        let dir = self.branch_dir(replay.scratch);
        fs::create_dir_all(&dir).on("create", &dir)?;
        self.make_volume(&like.data, replay.base, like.fork).await?;
        let archive = Archive::new(self.bucket.clone(), replay.branch, replay.line);
        let from = self.end_of(replay.base, replay.base_end).await?;
        let to = end_in(&archive, replay, from).await?;
        self.prepare_replay(replay.scratch, &Tail { archive, from, to }).await?;

        let mut spec = self.spec(like, self.installation(like.pg_major)?);
        // What comes of it begins a history of its own, which is archived when it is used.
        spec.archive = None;
        spec.recovery = Some(recovery(&self.replay_dir(replay.scratch), until)?);
        Ok(Unit::start(&self.exe, &spec).await?)
    }

    /// The archive of a line, and the newest WAL in it, unless another node cannot have put any there.
    pub(super) async fn archived(&self, start: &Start) -> Result<Option<(Archive, Range)>> {
        if self.policy.bucket.is_none() || start.begun_here {
            return Ok(None);
        }
        let archive = Archive::new(self.bucket.clone(), start.data.branch, start.data.line);
        Ok(archive.ranges().await?.pop().map(|last| (archive, last)))
    }

    /// What the archive of a line has from behind its head, which is here.
    pub(super) async fn tail(&self, start: &Start, archived: Option<(Archive, Range)>) -> Result<Option<Tail>> {
        let Some((archive, last)) = archived else { return Ok(None) };
        let from = self.end_of(start.data.head, start.head_end).await?;
        if last.end <= from {
            return Ok(None);
        }
        tracing::warn!(branch = %start.data.branch, %from, to = %last.end, "commits from behind the head are replayed");
        Ok(Some(Tail { archive, from, to: Some((last.pg_timeline, last.end)) }))
    }

    /// The head went down with its node before it was uploaded: an earlier seal, and WAL from there to beyond the head.
    pub(super) async fn without_head(
        &self,
        start: &Start,
        lost: LayerId,
        archived: Option<(Archive, Range)>,
    ) -> Result<(LayerId, Option<Tail>)> {
        let reaches = |(_, last): &(Archive, Range)| start.head_end.is_some_and(|head_end| last.end >= head_end);
        let Some((archive, last)) = archived.filter(reaches) else {
            return Err(ebb_storage::Error::NoSuchLayer(lost).into());
        };
        for &(layer, end) in &start.earlier {
            match self.make_openable(layer).await {
                Err(Error::Storage(ebb_storage::Error::NoSuchLayer(_))) => {}
                openable => {
                    openable?;
                    let (branch, from) = (start.data.branch, self.end_of(layer, end).await?);
                    tracing::warn!(%branch, %lost, %layer, %from, to = %last.end, "the head is lost, and is replayed");
                    return Ok((layer, Some(Tail { archive, from, to: Some((last.pg_timeline, last.end)) })));
                }
            }
        }
        Err(ebb_storage::Error::NoSuchLayer(lost).into())
    }

    /// Where the WAL is that the branch's next start replays; it is there until Postgres has done so.
    pub(super) fn replay_dir(&self, branch: BranchId) -> PathBuf {
        self.branch_dir(branch).join("wal").join(WAL_DIR)
    }

    async fn end_of(&self, layer: LayerId, known: Option<Lsn>) -> Result<Lsn> {
        match known {
            Some(end) => Ok(end),
            None => Ok(self.store.manifest(layer).await?.image.redo),
        }
    }

    /// Makes a volume recover at its next start, from its own WAL and then from the archive's.
    pub(super) async fn prepare_replay(&self, branch: BranchId, tail: &Tail) -> Result<()> {
        let dirs = self.dirs(branch);
        let (wal, dir) = (dirs.branch.join("wal"), self.replay_dir(branch));
        fs::create_dir(&dir).on("create", &dir)?;
        let image = blocking("preparing a recovery", move || {
            let volume = Volume::open(&dirs)?;
            volume.put_file("recovery.signal", b"")?;
            Ok(volume.image_info())
        })
        .await?;
        let Some((pg_timeline, to)) = tail.to else { return Ok(()) };
        let fetched = tail.archive.fetch(pg_timeline, tail.from, to, &dir).await?;
        if fetched.start > tail.from {
            return Err(missing(&tail.archive, pg_timeline, fetched.start));
        }
        blocking("completing WAL", move || {
            let segment = WalSegment::holding(fetched.start, image.pg_timeline, image.wal_segment_bytes);
            let beginning = fetched.start.0 - segment.start().0;
            complete(&wal.join(segment.file_name()), &dir.join(segment.file_name()), beginning)?;
            make_readable(&dir)
        })
        .await
    }
}

/// A piece of an archive that is to be replayed.
#[derive(Debug)]
pub(super) struct Tail {
    archive: Archive,
    from: Lsn,
    /// Postgres timeline and position; `None`: nothing.
    to: Option<(u32, Lsn)>,
}

/// Up to where WAL is needed, and on which Postgres timeline that is; `None` if the seal has it all.
async fn end_in(archive: &Archive, replay: &Replay, from: Lsn) -> Result<Option<(u32, Lsn)>> {
    let ranges = archive.ranges().await?;
    let to = match replay.to {
        Moment::Lsn(to) => to,
        Moment::Time(time) => {
            let end = ranges.last().map_or(from, |range| range.end);
            let later = time.saturating_add(CLOCKS_DIFFER).unwrap_or(Timestamp::MAX);
            match archive.at(later).await? {
                Some(moment) => moment.lsn,
                // Nothing came in after that time: either nothing was written, or it never got here.
                None => match replay.through.filter(|through| *through > end) {
                    Some(through) => {
                        return Err(missing(archive, ranges.last().map_or(1, |range| range.pg_timeline), through));
                    }
                    None => end,
                },
            }
        }
    };
    if to <= from {
        return Ok(None);
    }
    // Of two histories the later one is the branch's.
    let held = ranges.iter().rev().find(|range| range.start < to && to <= range.end);
    let pg_timeline = held.or(ranges.last()).map_or(1, |range| range.pg_timeline);
    Ok(Some((pg_timeline, to)))
}

/// How Postgres recovers what [`LocalNode::prepare_replay`] has put into a directory.
///
/// Its newest Postgres timeline is named, because Postgres finds one only if the history files of all before are there.
pub(super) fn recovery(dir: &Path, until: Option<Until>) -> Result<Recovery> {
    let mut pg_timeline = None;
    for entry in fs::read_dir(dir).on("list", dir)? {
        let name = entry.on("list", dir)?.file_name();
        // Segments and history files alike begin with it.
        let of_file = name.to_str().and_then(|name| u32::from_str_radix(name.get(..8)?, 16).ok());
        pg_timeline = pg_timeline.max(of_file);
    }
    Ok(Recovery { wal: PathBuf::from("pg_wal").join(WAL_DIR), pg_timeline, until })
}

fn missing(archive: &Archive, pg_timeline: u32, to: Lsn) -> Error {
    ebb_storage::Error::NoSuchWal { archive: archive.prefix(), pg_timeline, to }.into()
}

/// Writes the beginning of a segment, which the archive does not have, from the volume's own.
fn complete(own: &Path, segment: &Path, length: u64) -> Result<()> {
    if length == 0 {
        return Ok(());
    }
    let mut beginning = Vec::new();
    File::open(own).and_then(|file| file.take(length).read_to_end(&mut beginning)).on("read", own)?;
    let file = File::options().write(true).open(segment).on("open", segment)?;
    file.write_all_at(&beginning, 0).on("write", segment)
}

/// Postgres runs as another user.
fn make_readable(dir: &Path) -> Result<()> {
    fs::set_permissions(dir, Permissions::from_mode(0o755)).on("open up", dir)?;
    for entry in fs::read_dir(dir).on("list", dir)? {
        let path = entry.on("list", dir)?.path();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).on("open up", &path)?;
    }
    Ok(())
}
