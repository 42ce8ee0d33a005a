//! The writing side: take the archive over, then append span by span.

use std::collections::VecDeque;

use bytes::Bytes;
use ebb_types::{Lsn, Timestamp};

use super::format::{self, Header, Kind, Opening, Previous, SPAN_BYTES_MAX};
use super::{Archive, Owner};
use crate::blocking;
use crate::error::{Error, Result};
use crate::log::Log;
use crate::pg_files::{WAL_PAGE_BYTES, is_wal_segment_size};

/// A piece of WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The position of its first byte.
    pub start: Lsn,
    /// At least one, at most [`SPAN_BYTES_MAX`].
    ///
    /// They must end where Postgres would go on after a crash that lost the rest: at a page boundary, or at a position it
    /// had flushed to.
    pub bytes: Bytes,
    /// When the last of them was received.
    pub time: Timestamp,
}

/// The newest span of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// Its Postgres timeline.
    pub pg_timeline: u32,
    /// The cluster it is of.
    pub system_identifier: u64,
    /// Where it begins.
    pub start: Lsn,
    /// Where it ends: here a stretch may continue.
    pub end: Lsn,
    /// Its bytes. Whoever has the same at the same place has the same history.
    pub bytes: Bytes,
}

/// Where a new stretch begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// The cluster.
    pub system_identifier: u64,
    /// Bytes of a WAL segment in it.
    pub wal_segment_bytes: u32,
    /// The Postgres timeline.
    pub pg_timeline: u32,
    /// The first byte. The beginning of a page, unless it continues.
    pub lsn: Lsn,
    /// Whether the writer has seen that its WAL is the archive's [`Tail`] and what follows it.
    pub continues: bool,
    /// The history file of the Postgres timeline; from the second on there is one.
    pub history: Option<Bytes>,
    /// Now.
    pub time: Timestamp,
}

/// An archive in which no earlier writer can append any more.
#[derive(Debug)]
pub struct Claim {
    archive: Archive,
    owner: Owner,
    /// The number of the stretch to be opened.
    next: u64,
    previous: Option<Previous>,
    tail: Option<Tail>,
}

/// The one that can append.
#[derive(Debug)]
pub struct Writer {
    archive: Archive,
    owner: Owner,
    start: Start,
    stretch: u64,
    /// The next number in the stretch.
    number: u64,
    /// Where what was appended or staged ends, and when its last byte was received.
    end: Lsn,
    time: Timestamp,
    shipped: Lsn,
    staged: VecDeque<Staged>,
    ended: bool,
    stats: WriterStats,
}

/// What a writer has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriterStats {
    /// Spans.
    pub spans: u64,
    /// Bytes of WAL in them.
    pub raw_bytes: u64,
    /// Bytes of the objects.
    pub stored_bytes: u64,
}

/// An entry that is not known to be in the bucket.
#[derive(Debug)]
struct Staged {
    log: Log,
    seq: u64,
    bytes: Bytes,
    /// Where the spans up to this entry end.
    end: Lsn,
    raw_bytes: u64,
}

impl Archive {
    /// Ends the last stretch if its writer has not, and finds where the archive ends.
    ///
    /// # Errors
    /// [`Error::Overtaken`] when an owner of a later epoch was here.
    ///
    /// # Cancel safety
    /// May be called again after it failed or was cut off.
    pub async fn claim(&self, owner: Owner) -> Result<Claim> {
        let openings = self.openings();
        let there = openings.extent().await?;
        let mut claim = Claim { archive: self.clone(), owner, next: there.end, previous: None, tail: None };
        let Some(last) = there.end.checked_sub(1) else { return Ok(claim) };
        let missing = || format::corrupt(&openings.key(last), "it is gone");
        let (header, opening) = self.opening(last).await?.ok_or_else(missing)?;
        if opening.epoch > owner.epoch {
            return Err(Error::Overtaken { log: self.prefix(), seq: last });
        }
        let previous = self.close(last, &header, owner).await?;
        claim.previous = Some(previous);
        claim.tail = self.find_tail(there.start, last, (header, opening), previous.entries).await?;
        Ok(claim)
    }

    /// Shuts owners of earlier epochs out for good: what they had appended by then is in the archive, nothing of theirs
    /// follows. Does nothing where the owner's epoch was seen already.
    ///
    /// Where [`Archive::claim`] only ends the last stretch, this also leaves an opening of the owner's epoch, so that
    /// one who reads the archive after it has all of what was, or ever will be, acknowledged in an earlier epoch.
    ///
    /// # Errors
    /// [`Error::Overtaken`] when an owner of a later epoch was here.
    ///
    /// # Cancel safety
    /// May be called again after it failed or was cut off.
    pub async fn fence(&self, owner: Owner) -> Result<()> {
        let openings = self.openings();
        let opening_before = async |number: u64| match number.checked_sub(1) {
            Some(last) => self.opening(last).await,
            None => Ok(None),
        };
        let seen = opening_before(openings.extent().await?.end).await?;
        if seen.is_some_and(|(_, opening)| opening.epoch == owner.epoch) {
            return Ok(());
        }
        loop {
            let claim = self.claim(owner).await?;
            let (header, last) = match opening_before(claim.next).await? {
                Some((_, last)) if last.epoch == owner.epoch => return Ok(()),
                Some((header, last)) => (header, Some(last)),
                None => (Header::nowhere(), None),
            };
            let (end, time) = claim.previous.map_or((header.start, header.time), |last| (last.end, last.time));
            let opening = Opening {
                epoch: owner.epoch,
                system_identifier: last.as_ref().map_or(0, |last| last.system_identifier),
                wal_segment_bytes: last.as_ref().map_or(0, |last| last.wal_segment_bytes),
                continues: last.is_some(),
                previous: claim.previous,
            };
            let body = serde_json::to_vec(&opening).expect("an opening is plain data");
            let header = Header { kind: Kind::Opening, writer: owner.writer, start: end, end, time, ..header };
            let bytes = format::encode(&self.place(claim.next, 0), &header, &body);
            match openings.append(claim.next, bytes).await {
                Ok(()) => return Ok(()),
                // The earlier owner was quicker once more: what it opened is ended next.
                Err(Error::Overtaken { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes a stretch end: whatever its writer managed to append before is part of it.
    async fn close(&self, stretch: u64, opening: &Header, owner: Owner) -> Result<Previous> {
        let log = self.spans(stretch);
        let mut next = log.extent().await?.end;
        loop {
            let last = match next.checked_sub(1) {
                Some(last) => self.header(stretch, last).await?,
                None => *opening,
            };
            let end = |entries| Previous { entries, end: last.end, time: last.time };
            if last.kind.is_last() {
                return Ok(end(next - 1));
            }
            let fence = Header { kind: Kind::Fence, writer: owner.writer, start: last.end, ..last };
            match log.append(next, format::encode(&self.place(stretch, next), &fence, &[])).await {
                Ok(()) => return Ok(end(next)),
                Err(Error::Overtaken { .. }) => next += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// The newest span: in the last stretch, of which the number of entries is known, or in one before if that is empty.
    async fn find_tail(
        &self,
        oldest: u64,
        last: u64,
        (mut header, mut opening): (Header, Opening),
        mut entries: u64,
    ) -> Result<Option<Tail>> {
        let mut stretch = last;
        loop {
            if let Some(number) = entries.checked_sub(1)
                && let (span, bytes) = self.entry(stretch, number).await?
                && span.kind == Kind::Span
            {
                let (pg_timeline, system_identifier) = (header.pg_timeline, opening.system_identifier);
                return Ok(Some(Tail { pg_timeline, system_identifier, start: span.start, end: span.end, bytes }));
            }
            let (Some(previous), true) = (opening.previous, stretch > oldest) else { return Ok(None) };
            stretch -= 1;
            entries = previous.entries;
            let Some(found) = self.opening(stretch).await? else { return Ok(None) };
            (header, opening) = found;
        }
    }
}

impl Claim {
    /// The newest span of the archive, if it has any.
    pub fn tail(&self) -> Option<&Tail> {
        self.tail.as_ref()
    }

    /// Opens a stretch. The writer has it once [`Writer::settle`] has returned, which it must call first.
    ///
    /// # Errors
    /// `Invalid` for a start that does not fit the archive.
    pub fn open(self, start: Start) -> Result<Writer> {
        self.check(&start).map_err(|why| {
            Error::Invalid(format!(
                "WAL from {} on cannot go into archive {:?}: {why}",
                start.lsn,
                self.archive.prefix()
            ))
        })?;
        let time = self.previous.map_or(micros(start.time), |previous| previous.time.max(micros(start.time)));
        let mut writer = Writer {
            stretch: self.next,
            number: 0,
            end: start.lsn,
            time,
            shipped: start.lsn,
            staged: VecDeque::new(),
            ended: false,
            stats: WriterStats::default(),
            archive: self.archive,
            owner: self.owner,
            start,
        };
        writer.stage_opening(writer.start.continues, self.previous);
        Ok(writer)
    }

    fn check(&self, start: &Start) -> Result<(), &'static str> {
        if !is_wal_segment_size(start.wal_segment_bytes) {
            return Err("that is no size of a WAL segment");
        }
        if self.tail.as_ref().is_some_and(|tail| tail.system_identifier != start.system_identifier) {
            return Err("it is of another cluster");
        }
        let follows = |tail: &Tail| tail.pg_timeline == start.pg_timeline && tail.end == start.lsn;
        match start.continues {
            true if !self.tail.as_ref().is_some_and(follows) => Err("the archive does not end there"),
            false if !start.lsn.0.is_multiple_of(WAL_PAGE_BYTES) => Err("it is not the beginning of a page"),
            _ if start.history.as_ref().is_some_and(|history| history.len() > SPAN_BYTES_MAX) => {
                Err("the history file is too long")
            }
            _ => Ok(()),
        }
    }
}

impl Writer {
    /// Where what the bucket has acknowledged ends.
    pub fn shipped(&self) -> Lsn {
        self.shipped
    }

    /// The Postgres timeline of the WAL it takes.
    pub fn pg_timeline(&self) -> u32 {
        self.start.pg_timeline
    }

    /// What the bucket has acknowledged so far.
    pub fn stats(&self) -> WriterStats {
        self.stats
    }

    /// Appends the span that follows: it is in the archive when this returns.
    ///
    /// # Errors
    /// [`Error::Overtaken`] when another writer took over: nothing of it is in the archive, nor can be. `Invalid` for a
    /// span that does not follow. After any other error it may or may not be there: call [`Writer::settle`] until it
    /// answers something else.
    ///
    /// # Cancel safety
    /// If it was cut off, call [`Writer::settle`]; then [`Writer::shipped`] tells whether the span is there.
    pub async fn append(&mut self, span: Span) -> Result<()> {
        if !self.staged.is_empty() || self.ended || span.start != self.end {
            return Err(Error::Invalid(format!("a span at {} does not follow {}", span.start, self.end)));
        }
        if span.bytes.is_empty() || span.bytes.len() > SPAN_BYTES_MAX {
            return Err(Error::Invalid(format!("a span cannot have {} bytes", span.bytes.len())));
        }
        if self.number >= self.archive.entries_max {
            let entries = self.number;
            self.stage(Kind::End, &[]);
            (self.stretch, self.number) = (self.stretch + 1, 0);
            self.stage_opening(true, Some(Previous { entries, end: self.end, time: self.time }));
        }
        self.time = self.time.max(micros(span.time));
        let (place, raw_bytes) = (self.archive.place(self.stretch, self.number), span.bytes.len() as u64);
        let (start, end) = (span.start, Lsn(span.start.0 + raw_bytes));
        let header = Header { start, end, ..self.header(Kind::Span) };
        let bytes = blocking::run(move || format::encode(&place, &header, &span.bytes)).await;
        self.end = end;
        self.push(self.archive.spans(self.stretch), self.number, bytes, raw_bytes);
        self.number += 1;
        self.settle().await
    }

    /// Ends the stretch: nothing can be appended any more.
    ///
    /// # Errors
    /// As [`Writer::append`].
    pub async fn end(&mut self) -> Result<()> {
        if !self.ended {
            self.stage(Kind::End, &[]);
            self.ended = true;
        }
        self.settle().await
    }

    /// Brings what is not known to be in the bucket there.
    ///
    /// # Errors
    /// As [`Writer::append`].
    ///
    /// # Cancel safety
    /// May be called again after it failed or was cut off.
    pub async fn settle(&mut self) -> Result<()> {
        while let Some(next) = self.staged.front() {
            next.log.append(next.seq, next.bytes.clone()).await?;
            self.shipped = next.end;
            let stored_bytes = next.bytes.len() as u64;
            if next.raw_bytes > 0 {
                self.stats.spans += 1;
                self.stats.raw_bytes += next.raw_bytes;
                self.stats.stored_bytes += stored_bytes;
                metrics::counter!("ebb_storage_archive_spans_total").increment(1);
                metrics::counter!("ebb_storage_archive_raw_bytes_total").increment(next.raw_bytes);
                metrics::counter!("ebb_storage_archive_object_bytes_total").increment(stored_bytes);
            }
            self.staged.pop_front();
        }
        Ok(())
    }

    fn stage_opening(&mut self, continues: bool, previous: Option<Previous>) {
        let opening = Opening {
            epoch: self.owner.epoch,
            system_identifier: self.start.system_identifier,
            wal_segment_bytes: self.start.wal_segment_bytes,
            continues,
            previous,
        };
        let body = serde_json::to_vec(&opening).expect("an opening is plain data");
        let bytes = format::encode(&self.archive.place(self.stretch, 0), &self.header(Kind::Opening), &body);
        self.push(self.archive.openings(), self.stretch, bytes, 0);
        if let Some(history) = self.start.history.clone() {
            self.stage(Kind::History, &history);
        }
    }

    fn stage(&mut self, kind: Kind, body: &[u8]) {
        let bytes = format::encode(&self.archive.place(self.stretch, self.number), &self.header(kind), body);
        self.push(self.archive.spans(self.stretch), self.number, bytes, 0);
        self.number += 1;
    }

    fn push(&mut self, log: Log, seq: u64, bytes: Bytes, raw_bytes: u64) {
        self.staged.push_back(Staged { log, seq, bytes, end: self.end, raw_bytes });
    }

    fn header(&self, kind: Kind) -> Header {
        let (start, end, time) = (self.end, self.end, self.time);
        Header { kind, writer: self.owner.writer, pg_timeline: self.start.pg_timeline, start, end, time }
    }
}

/// As precise as it is stored.
fn micros(time: Timestamp) -> Timestamp {
    Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time)
}
