//! The reading side: WAL from the archive as files that Postgres finds in `pg_wal` or gets from a `restore_command`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use ebb_types::Lsn;
use futures::stream::{self, StreamExt};

use super::format::{Kind, corrupt};
use super::{Archive, Range, Stretch, ranges};
use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use crate::layer::is_zero;
use crate::pg_files::{WAL_PAGE_BYTES, WalSegment, switches_in};

/// LIMIT: each holds at most a span and its object in memory, 4 MiB and less.
const PARALLEL_GETS: usize = 8;

/// What is compared with zeroes, to be left a hole.
const PIECE_BYTES: usize = 8192;

/// What was fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// From here on there is WAL in the directory without a gap, what was there before included.
    pub start: Lsn,
    /// Where it ends.
    pub end: Lsn,
    /// How many segment files were written.
    pub segments: u64,
}

impl Archive {
    /// Writes WAL into `dir` as files that Postgres knows: segments of full size, with holes for what is not in them, and
    /// the history file of the Postgres timeline. Bytes at and after `to` are left out.
    ///
    /// It goes back to the beginning of the segment that holds `from`, if need be on the Postgres timelines before, or to
    /// where the archive begins or has a gap. What is before that is in a layer, whose WAL should be in `dir` already: a
    /// segment that the archive has only the end of is completed from the file of its name, if that goes far enough.
    /// [`Fetched::start`] tells whether it suffices.
    ///
    /// A file has its name once all of it was checked and is on disk; a file that was there is replaced, not written to.
    ///
    /// # Errors
    /// [`Error::NoSuchWal`] when the archive ends before `to` or has a gap there; `Corrupt`, with the object.
    pub async fn fetch(&self, pg_timeline: u32, from: Lsn, to: Lsn, dir: &Path) -> Result<Fetched> {
        let stretches = self.stretches().await?;
        let ranges = ranges(&stretches);
        let holding = |pg_timeline: u32, end: Lsn| {
            let is = |range: &&Range| range.pg_timeline == pg_timeline && range.start < end && end <= range.end;
            ranges.iter().rev().find(is)
        };
        let missing = || Error::NoSuchWal { archive: self.prefix(), pg_timeline, to };
        let range = holding(pg_timeline, to).filter(|_| from < to).ok_or_else(missing)?;
        let mut piece = self.fetch_piece(&stretches, range, from..to, dir).await?;
        let mut fetched = Fetched { start: piece.start, end: to, segments: piece.segments };
        while fetched.start > from
            && let Some((parent, switched)) = piece.parent
            && let Some(range) = holding(parent, switched).filter(|_| from < switched)
        {
            piece = self.fetch_piece(&stretches, range, from..switched, dir).await?;
            fetched.start = piece.start;
            fetched.segments += piece.segments;
        }
        let (dir, wal_segment_bytes) = (dir.to_owned(), piece.wal_segment_bytes);
        fetched.start = blocking::run(move || {
            File::open(&dir).and_then(|dir| dir.sync_all()).on("sync", &dir)?;
            Ok::<_, Error>(begin_in(
                &dir,
                WalSegment::holding(fetched.start, piece.pg_timeline, wal_segment_bytes),
                fetched.start,
            ))
        })
        .await?;
        Ok(fetched)
    }

    /// Writes the WAL of one Postgres timeline.
    async fn fetch_piece(
        &self,
        stretches: &[Stretch],
        range: &Range,
        wanted: std::ops::Range<Lsn>,
        dir: &Path,
    ) -> Result<Piece> {
        let (mut entries, mut start, mut segments) = (Vec::new(), range.start, None);
        for stretch in stretches {
            let is_empty = stretch.start == stretch.end || stretch.pg_timeline != range.pg_timeline;
            if is_empty || !range.stretches.contains(&stretch.number) || stretch.start >= wanted.end {
                continue;
            }
            start = range.start.max(wanted.start.segment_start(stretch.wal_segment_bytes.into()));
            if stretch.end <= start {
                continue;
            }
            let first = self.first_entry(stretch, |header| header.end > start).await?;
            let last = match stretch.end > wanted.end {
                true => self.first_entry(stretch, |header| header.end >= wanted.end).await?,
                false => stretch.entries.saturating_sub(1),
            };
            if segments.is_none() {
                segments = Some(Segments::new(dir, stretch));
                if range.pg_timeline > 1 && first > 0 {
                    entries.push((stretch.number, 0));
                }
            }
            entries.extend((first..=last).map(|number| (stretch.number, number)));
        }
        // The range ends at or after the wanted end, so there is at least one.
        let Some(mut segments) = segments else { return Err(Error::Invalid("an empty range of WAL".to_owned())) };

        let (mut at, mut parent) = (None, None);
        let mut found =
            stream::iter(entries).map(|(stretch, number)| self.keyed_entry(stretch, number)).buffered(PARALLEL_GETS);
        while let Some(entry) = found.next().await {
            let (key, header, body) = entry?;
            if header.pg_timeline != range.pg_timeline {
                return Err(corrupt(&key, "it is of another Postgres timeline than its stretch"));
            }
            match header.kind {
                Kind::History => {
                    parent = switches_in(&body).pop();
                    segments = blocking::run(move || segments.write_history(&body).map(|()| segments)).await?;
                }
                Kind::Span => {
                    if header.start != *at.get_or_insert(header.start) {
                        return Err(corrupt(&key, "it does not begin where the span before it ended"));
                    }
                    at = Some(header.end);
                    let (from, to) = (header.start.max(start), header.end.min(wanted.end));
                    if from < to {
                        let bytes = body.slice((from.0 - header.start.0) as usize..(to.0 - header.start.0) as usize);
                        segments = blocking::run(move || segments.write(from, &bytes).map(|()| segments)).await?;
                    }
                }
                _ => return Err(corrupt(&key, "it is no span")),
            }
        }
        if at.is_none_or(|at| at < wanted.end) {
            let why = format!("its spans end at {:?}, before {}", at.unwrap_or(start), wanted.end);
            return Err(Error::Corrupt { what: format!("archive {:?}", self.prefix()), why });
        }
        let segments = blocking::run(move || segments.finish().map(|()| segments)).await?;
        let start = if segments.is_completed { start.segment_start(segments.segment_bytes.into()) } else { start };
        Ok(Piece {
            pg_timeline: range.pg_timeline,
            start,
            segments: segments.finished,
            wal_segment_bytes: segments.segment_bytes,
            parent,
        })
    }

    async fn keyed_entry(&self, stretch: u64, number: u64) -> Result<(String, super::Header, Bytes)> {
        let (header, body) = self.entry(stretch, number).await?;
        Ok((self.spans(stretch).key(number), header, body))
    }
}

/// What was fetched of one Postgres timeline.
struct Piece {
    pg_timeline: u32,
    start: Lsn,
    segments: u64,
    wal_segment_bytes: u32,
    /// The Postgres timeline it came from, and where it left that.
    parent: Option<(u32, Lsn)>,
}

/// Where the WAL in a directory begins that goes on at `start`, in this segment, without a gap.
fn begin_in(dir: &Path, first: WalSegment, start: Lsn) -> Lsn {
    let mut begin = start;
    let mut segment = first;
    while begin == segment.start() && segment.number > 0 {
        segment.number -= 1;
        let file = File::open(dir.join(segment.file_name()));
        let pages = u64::from(segment.segment_bytes) / WAL_PAGE_BYTES;
        if !file.is_ok_and(|file| segment.has_begun_page(&file, pages - 1)) {
            break;
        }
        begin = segment.start();
    }
    begin
}

/// Segment files being written, one after the other.
struct Segments {
    dir: PathBuf,
    pg_timeline: u32,
    segment_bytes: u32,
    open: Option<(WalSegment, File)>,
    finished: u64,
    /// Whether the front of the first one came from a file that was there.
    is_completed: bool,
}

impl Segments {
    fn new(dir: &Path, of: &Stretch) -> Self {
        let (pg_timeline, segment_bytes) = (of.pg_timeline, of.wal_segment_bytes);
        Self { dir: dir.to_owned(), pg_timeline, segment_bytes, open: None, finished: 0, is_completed: false }
    }

    fn write(&mut self, mut at: Lsn, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let segment = WalSegment::holding(at, self.pg_timeline, self.segment_bytes);
            if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
                self.finish()?;
                let path = self.part(&segment);
                let file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&path);
                let file = file.on("create", &path)?;
                file.set_len(self.segment_bytes.into()).on("write", &path)?;
                if at > segment.start() {
                    self.is_completed = self.complete(&segment, at, &file).on("complete", &path)?;
                }
                self.open = Some((segment, file));
            }
            let length = usize::try_from(segment.end().0 - at.0).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at(length);
            if let Some((_, file)) = &self.open {
                write_sparse(file, at.0 - segment.start().0, now).on("write", &self.part(&segment))?;
            }
            (at, bytes) = (Lsn(at.0 + length as u64), rest);
        }
        Ok(())
    }

    /// Takes what is before `at` from the file that has the segment's name, if all of it is there.
    fn complete(&self, segment: &WalSegment, at: Lsn, into: &File) -> io::Result<bool> {
        let before = at.0 - segment.start().0;
        let file = match File::open(self.dir.join(segment.file_name())) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        // A page is only begun after the one before it; where a stretch begins, a page does.
        if !segment.has_begun_page(&file, before / WAL_PAGE_BYTES - 1) {
            return Ok(false);
        }
        let mut piece = [0; PIECE_BYTES];
        for from in (0..before).step_by(PIECE_BYTES) {
            file.read_exact_at(&mut piece, from)?;
            write_sparse(into, from, &piece)?;
        }
        Ok(true)
    }

    /// Gives the open segment its name.
    fn finish(&mut self) -> Result<()> {
        if let Some((segment, file)) = self.open.take() {
            let part = self.part(&segment);
            file.sync_all().on("sync", &part)?;
            fs::rename(&part, self.dir.join(segment.file_name())).on("rename", &part)?;
            self.finished += 1;
        }
        Ok(())
    }

    fn write_history(&self, history: &[u8]) -> Result<()> {
        let path = self.dir.join(format!("{:08X}.history", self.pg_timeline));
        let part = path.with_extension("history.part");
        let file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&part);
        let written = file.and_then(|file| file.write_all_at(history, 0).and_then(|()| file.sync_all()));
        written.on("write", &part)?;
        fs::rename(&part, &path).on("rename", &part)
    }

    fn part(&self, segment: &WalSegment) -> PathBuf {
        self.dir.join(format!("{}.part", segment.file_name()))
    }
}

/// Writes what is not zeroes.
fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    let pieces = bytes.chunks(PIECE_BYTES).zip((at..).step_by(PIECE_BYTES));
    pieces.filter(|(piece, _)| !is_zero(piece)).try_for_each(|(piece, at)| file.write_all_at(piece, at))
}
