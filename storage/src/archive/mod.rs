//! The WAL archive: the write-ahead log of one line of a branch, in the bucket, as it was shipped while Postgres ran.
//!
//! With a layer it gives the database at any moment between that layer and the next: Postgres's own recovery replays
//! it. Beginning at [`Archive::claim`] one writes, with [`Archive::ranges`] and [`Archive::fetch`] one reads.
//!
//! ```text
//! wal/<branch>/<line>/stretches/<n>    a Log of openings: who began stretch n, where, and how the one before ended
//! wal/<branch>/<line>/<n>/<number>     a Log for each stretch: [history file] span span span … (end | fence)
//! ```
//!
//! A *stretch* is what one writer wrote of one Postgres timeline without a gap: spans that follow each other byte by
//! byte. A writer that takes over first ends the last stretch, by an entry at its next number, and then opens the next
//! one. Long stretches are continued in a new one, so that old WAL can be removed stretch by stretch.
//!
//! **Invariants**
//! - Of any number of writers one can append (I9): whoever opens a stretch has fenced the one before, and an opening
//!   has one writer. What was acknowledged before the fence is before it in the log, and part of what is read.
//! - A stretch that `continues` has the same history as the one before: its writer compared bytes. Where one does not,
//!   readers see two ranges.
//! - The later stretch is right: where an older one reaches past the beginning of a later one of the same Postgres
//!   timeline, that is WAL of a history that was given up.
//! - Times never go back within an archive, whatever clocks do.
//! - Every byte is checked before it is used (I10), and names its place.
//!
//! **Crash**: a writer that dies leaves a stretch without an end; the next one fences it. A removal that dies leaves
//! objects of the stretch before the oldest, which the next removal deletes.
//!
//! **Absent**: nothing here knows what WAL says. A time is when bytes were received, not when they were committed.

mod fetch;
mod format;
mod writer;

use std::ops::Range as Numbers;

use bytes::Bytes;
use ebb_types::{BranchId, Lsn, Timestamp};
use futures::stream::{self, StreamExt, TryStreamExt};
use rand::RngExt as _;

pub use self::fetch::Fetched;
pub use self::format::SPAN_BYTES_MAX;
use self::format::{HEADER_BYTES, Header, Kind, Opening, Place, Previous, corrupt};
pub use self::writer::{Claim, Span, Start, Tail, Writer, WriterStats};
use crate::error::{Error, Result};
use crate::log::Log;
use crate::object_store::Bucket;

/// LIMIT: small objects, got to hide the bucket's latency.
const PARALLEL_LOOKS: usize = 16;

/// LIMIT: with its end a stretch is one page of an S3 listing, and some minutes of a branch that is written all the time.
const ENTRIES_MAX: u64 = 999;

/// The archive of one line of a branch.
#[derive(Debug, Clone)]
pub struct Archive {
    bucket: Bucket,
    branch: BranchId,
    line: u64,
    entries_max: u64,
}

/// Who writes. Each run of a writer is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The epoch of the branch's owner: one of a lower epoch than was seen in the archive is refused.
    pub epoch: u64,
    writer: [u8; 16],
}

impl Owner {
    /// Makes a new writer's identity.
    pub fn new(epoch: u64) -> Self {
        Self { epoch, writer: rand::rng().random() }
    }
}

/// A stretch, as its opening and its end tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// Its place among the stretches.
    pub number: u64,
    /// The Postgres timeline of its WAL.
    pub pg_timeline: u32,
    /// Its first byte.
    pub start: Lsn,
    /// After its last byte; for the newest stretch, when it was looked at.
    pub end: Lsn,
    /// When it was opened.
    pub first_time: Timestamp,
    /// When its newest byte was received.
    pub last_time: Timestamp,
    /// Whether it goes on, without a gap and with the same history, where the one before it that is not empty ended.
    pub continues: bool,
    /// Bytes of a WAL segment.
    pub wal_segment_bytes: u32,
    /// Which cluster it is of.
    pub system_identifier: u64,
    /// The epoch of its writer's owner.
    pub epoch: u64,
    /// Its entries, without the end or fence.
    entries: u64,
}

/// WAL without a gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Its Postgres timeline.
    pub pg_timeline: u32,
    /// Its first byte.
    pub start: Lsn,
    /// After its last byte.
    pub end: Lsn,
    /// When its first byte was received, or before.
    pub first_time: Timestamp,
    /// When its last byte was received, or later if it was cut.
    pub last_time: Timestamp,
    /// The stretches it is in.
    pub stretches: Numbers<u64>,
}

/// A moment in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The Postgres timeline at that moment.
    pub pg_timeline: u32,
    /// Whatever was committed by then is before this position.
    pub lsn: Lsn,
    /// When the byte before that position was received.
    pub time: Timestamp,
}

impl Archive {
    /// Names an archive; touches nothing.
    pub fn new(bucket: Bucket, branch: BranchId, line: u64) -> Self {
        Self { bucket, branch, line, entries_max: ENTRIES_MAX }
    }

    /// What the keys of all its objects begin with, without the slash.
    pub fn prefix(&self) -> String {
        format!("wal/{}/{}", self.branch, self.line)
    }

    /// All stretches, oldest first. Costs a listing, a small read for each of them, and some of the newest.
    ///
    /// # Errors
    /// `Corrupt` when one is missing between others or does not check.
    pub async fn stretches(&self) -> Result<Vec<Stretch>> {
        let mut openings = self.all_openings().await?;
        let ends: Vec<Option<Previous>> = openings.iter().skip(1).map(|(.., opening)| opening.previous).collect();
        let Some((last, header, opening)) = openings.pop() else { return Ok(Vec::new()) };
        let end = self.end_of(last, &header).await?;
        let mut stretches = Vec::with_capacity(ends.len() + 1);
        for ((number, header, opening), end) in openings.into_iter().zip(ends) {
            let missing = || corrupt(&self.openings().key(number + 1), "it does not tell how the one before ended");
            stretches.push(stretch(number, &header, &opening, &end.ok_or_else(missing)?));
        }
        stretches.push(stretch(last, &header, &opening, &end));
        Ok(stretches)
    }

    /// What can be read, oldest first: pieces without a gap, the later history where there are two.
    ///
    /// # Errors
    /// As [`Archive::stretches`].
    pub async fn ranges(&self) -> Result<Vec<Range>> {
        Ok(ranges(&self.stretches().await?))
    }

    /// The first position that everything committed until `time` is before, as far as that was received: the end of
    /// the first span that was received then or later. `None` if nothing was received since.
    ///
    /// # Errors
    /// As [`Archive::stretches`].
    pub async fn at(&self, time: Timestamp) -> Result<Option<Moment>> {
        let stretches = self.stretches().await?;
        let has = |stretch: &&Stretch| stretch.last_time >= time && stretch.start < stretch.end;
        let Some(stretch) = stretches.iter().find(has) else { return Ok(None) };
        let entry = self.first_entry(stretch, |header| header.kind == Kind::Span && header.time >= time).await?;
        let header = self.header(stretch.number, entry).await?;
        Ok(Some(Moment { pg_timeline: header.pg_timeline, lsn: header.end, time: header.time }))
    }

    /// Deletes the stretches before the one with this number, oldest first, but never the newest. Answers how many
    /// objects went.
    pub async fn remove_before(&self, stretch: u64) -> Result<u64> {
        let there = self.openings().extent().await?;
        let mut removed = 0;
        // A removal that was cut off left objects of the stretch that it had begun with.
        if let Some(begun) = there.start.checked_sub(1) {
            removed += self.remove_below(&self.spans_prefix(begun)).await?;
        }
        for number in there.start..stretch.min(there.end.saturating_sub(1)) {
            // In this order, so that no opening leads to spans that are gone.
            self.bucket.delete(&self.openings().key(number)).await?;
            removed += 1 + self.remove_below(&self.spans_prefix(number)).await?;
        }
        Ok(removed)
    }

    /// Deletes everything of the archive, which nobody may be writing to. Answers how many objects went.
    pub async fn remove(&self) -> Result<u64> {
        self.remove_below(&self.prefix()).await
    }

    async fn remove_below(&self, prefix: &str) -> Result<u64> {
        let listed = self.bucket.list(&format!("{prefix}/"), None).await?;
        let count = listed.len() as u64;
        let deleted = stream::iter(listed).map(|object| async move { self.bucket.delete(&object.key).await });
        deleted.buffer_unordered(PARALLEL_LOOKS).try_collect::<()>().await?;
        Ok(count)
    }

    fn openings(&self) -> Log {
        Log::new(self.bucket.clone(), format!("{}/stretches", self.prefix()))
    }

    fn spans(&self, stretch: u64) -> Log {
        Log::new(self.bucket.clone(), self.spans_prefix(stretch))
    }

    fn spans_prefix(&self, stretch: u64) -> String {
        format!("{}/{stretch:010}", self.prefix())
    }

    fn place(&self, stretch: u64, number: u64) -> Place {
        Place { branch: self.branch, line: self.line, stretch, number }
    }

    /// Every opening with its number. Those at the front may have been removed meanwhile.
    async fn all_openings(&self) -> Result<Vec<(u64, Header, Opening)>> {
        let there = self.openings().extent().await?;
        let found = stream::iter(there)
            .map(|number| async move { Ok::<_, Error>((number, self.opening(number).await?)) })
            .buffered(PARALLEL_LOOKS)
            .try_collect::<Vec<_>>()
            .await?;
        let mut openings: Vec<(u64, Header, Opening)> = Vec::with_capacity(found.len());
        for (number, opening) in found {
            match opening {
                Some((header, opening)) => openings.push((number, header, opening)),
                None if openings.is_empty() => {}
                None => return Err(corrupt(&self.openings().key(number), "it is missing though later ones exist")),
            }
        }
        Ok(openings)
    }

    async fn opening(&self, stretch: u64) -> Result<Option<(Header, Opening)>> {
        let (log, place) = (self.openings(), self.place(stretch, 0));
        let Some(bytes) = log.get(stretch).await? else { return Ok(None) };
        let key = log.key(stretch);
        let (header, body) = format::decode(&key, &place, &bytes)?;
        match header.kind {
            Kind::Opening => Ok(Some((header, format::decode_opening(&key, &body)?))),
            _ => Err(corrupt(&key, "it is no opening")),
        }
    }

    /// How far a stretch has come, by its last entry.
    async fn end_of(&self, stretch: u64, opening: &Header) -> Result<Previous> {
        let entries = self.spans(stretch).extent().await?.end;
        let Some(last) = entries.checked_sub(1) else {
            return Ok(Previous { entries: 0, end: opening.start, time: opening.time });
        };
        let header = self.header(stretch, last).await?;
        let entries = if header.kind.is_last() { last } else { entries };
        Ok(Previous { entries, end: header.end, time: header.time })
    }

    /// Looks at an entry that must be there.
    async fn header(&self, stretch: u64, number: u64) -> Result<Header> {
        let log = self.spans(stretch);
        let key = log.key(number);
        match log.get_start(number, HEADER_BYTES as u64).await {
            Ok(bytes) => format::decode_header(&key, &self.place(stretch, number), &bytes),
            Err(Error::Invalid(_)) => Err(corrupt(&key, "it is too short")),
            Err(Error::NoSuchObject { .. }) => Err(corrupt(&key, "it is missing though later ones exist")),
            Err(error) => Err(error),
        }
    }

    /// Gets an entry that must be there: header and body.
    async fn entry(&self, stretch: u64, number: u64) -> Result<(Header, Bytes)> {
        let (log, place) = (self.spans(stretch), self.place(stretch, number));
        let key = log.key(number);
        let missing = || corrupt(&key, "it is missing though later ones exist");
        let bytes = log.get(number).await?.ok_or_else(missing)?;
        crate::blocking::run(move || format::decode(&key, &place, &bytes))
            .await
            .map(|(header, body)| (header, body.into()))
    }

    /// The first entry of a stretch that something is true of, as it is of all after it; by halving. The last one if
    /// there is none.
    async fn first_entry(&self, stretch: &Stretch, is: impl Fn(&Header) -> bool) -> Result<u64> {
        let (mut from, mut to) = (0, stretch.entries.saturating_sub(1));
        while from < to {
            let middle = from + (to - from) / 2;
            match is(&self.header(stretch.number, middle).await?) {
                true => to = middle,
                false => from = middle + 1,
            }
        }
        Ok(from)
    }
}

fn stretch(number: u64, header: &Header, opening: &Opening, end: &Previous) -> Stretch {
    Stretch {
        number,
        pg_timeline: header.pg_timeline,
        start: header.start,
        end: end.end,
        first_time: header.time,
        last_time: end.time,
        continues: opening.continues,
        wal_segment_bytes: opening.wal_segment_bytes,
        system_identifier: opening.system_identifier,
        entries: end.entries,
        epoch: opening.epoch,
    }
}

/// Joins stretches that continue each other, and cuts what a later one begins before the end of.
fn ranges(stretches: &[Stretch]) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    for stretch in stretches.iter().filter(|stretch| stretch.start < stretch.end) {
        let same = |range: &Range| range.pg_timeline == stretch.pg_timeline;
        if let Some(last) =
            ranges.last_mut().filter(|last| stretch.continues && same(last) && last.end == stretch.start)
        {
            (last.end, last.last_time, last.stretches.end) = (stretch.end, stretch.last_time, stretch.number + 1);
            continue;
        }
        ranges.retain(|range| !same(range) || range.start < stretch.start);
        for range in ranges.iter_mut().filter(|range| same(range)) {
            range.end = range.end.min(stretch.start);
        }
        ranges.push(Range {
            pg_timeline: stretch.pg_timeline,
            start: stretch.start,
            end: stretch.end,
            first_time: stretch.first_time,
            last_time: stretch.last_time,
            stretches: stretch.number..stretch.number + 1,
        });
    }
    ranges
}

#[cfg(test)]
mod tests;
