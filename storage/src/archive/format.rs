//! Entries of an archive as bytes. The layout is in `docs/formats/wal.md`.

use bytes::Bytes;
use ebb_types::{BranchId, Lsn, Timestamp};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// LIMIT: a writer has one span in hand and one under way, a reader some. Larger ones would compress no better.
pub const SPAN_BYTES_MAX: usize = 4 << 20;

/// What a look at an entry needs to get.
pub(super) const HEADER_BYTES: usize = 144;

const MAGIC: [u8; 8] = *b"EBBWALAR";
const VERSION: u32 = 1;
const CHECK_BYTES: usize = 32;
/// The header's own checksum is behind what it covers.
const CHECKED_BYTES: usize = HEADER_BYTES - CHECK_BYTES;

/// LIMIT: full-page images shrink to a fifth at level 1 already; the processor is shared with the Postgres that writes them.
const ZSTD_LEVEL: i32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Begins a stretch; its body is an [`Opening`].
    Opening = 0,
    /// WAL from `start` to `end`.
    Span = 1,
    /// The history file of `pg_timeline`.
    History = 2,
    /// The writer ended the stretch.
    End = 3,
    /// Another writer ended it.
    Fence = 4,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Opening, Kind::Span, Kind::History, Kind::End, Kind::Fence];

    /// Whether nothing comes after it in its stretch.
    pub fn is_last(self) -> bool {
        matches!(self, Kind::End | Kind::Fence)
    }
}

/// Which entry of which archive: part of the entry, so that one under another's key is found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub branch: BranchId,
    pub line: u64,
    pub stretch: u64,
    pub number: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    /// Who wrote it, so that no two writers' entries are the same bytes.
    pub writer: [u8; 16],
    pub pg_timeline: u32,
    pub start: Lsn,
    /// For what is no span, where the spans so far end; `start` is the same.
    pub end: Lsn,
    /// When the newest byte so far was received.
    pub time: Timestamp,
}

impl Header {
    /// Of nobody, before any WAL.
    pub fn nowhere() -> Self {
        let (start, time) = (Lsn(0), Timestamp::UNIX_EPOCH);
        Self { kind: Kind::Opening, writer: [0; 16], pg_timeline: 0, start, end: start, time }
    }
}

/// What an opening tells besides its header, whose `start` is where the stretch begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Opening {
    /// The epoch of the branch's owner.
    pub epoch: u64,
    pub system_identifier: u64,
    pub wal_segment_bytes: u32,
    /// Whether it begins where the archive's newest span ended, and was seen to be the same history.
    pub continues: bool,
    /// How the stretch before ended, so that a reader need not look; `None` for the first.
    pub previous: Option<Previous>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Previous {
    /// Its entries, without the end or fence.
    pub entries: u64,
    pub end: Lsn,
    pub time: Timestamp,
}

/// Encodes an entry. The body must not be longer than [`SPAN_BYTES_MAX`].
pub(super) fn encode(place: &Place, header: &Header, body: &[u8]) -> Bytes {
    let stored = match body {
        [] => Vec::new(),
        _ => {
            zstd::bulk::compress(body, ZSTD_LEVEL).expect("zstd compresses any bytes into a buffer it has sized itself")
        }
    };
    let mut out = Vec::with_capacity(HEADER_BYTES + stored.len() + CHECK_BYTES);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(header.kind as u32).to_le_bytes());
    out.extend_from_slice(&header.writer);
    out.extend_from_slice(place.branch.as_bytes());
    for number in [place.line, place.stretch, place.number] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&header.pg_timeline.to_le_bytes());
    out.extend_from_slice(&u32::try_from(body.len()).expect("a body is small").to_le_bytes());
    out.extend_from_slice(&header.start.0.to_le_bytes());
    out.extend_from_slice(&header.end.0.to_le_bytes());
    out.extend_from_slice(&header.time.as_microsecond().to_le_bytes());
    out.extend_from_slice(&u32::try_from(stored.len()).expect("a body is small").to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    debug_assert_eq!(out.len(), CHECKED_BYTES);
    out.extend_from_slice(blake3::hash(&out).as_bytes());
    out.extend_from_slice(&stored);
    out.extend_from_slice(blake3::hash(&out).as_bytes());
    out.into()
}

/// The lengths of a body.
struct Lengths {
    raw: usize,
    stored: usize,
}

/// Checks and takes apart the header that an entry begins with. `key` names the object.
///
/// # Errors
/// `Corrupt`.
pub(super) fn decode_header(key: &str, place: &Place, bytes: &[u8]) -> Result<Header> {
    read_header(place, bytes).map(|(header, _)| header).map_err(|why| corrupt(key, why))
}

/// Checks and takes apart a whole entry: its header and body.
///
/// # Errors
/// `Corrupt`.
pub(super) fn decode(key: &str, place: &Place, bytes: &[u8]) -> Result<(Header, Vec<u8>)> {
    read_entry(place, bytes).map_err(|why| corrupt(key, why))
}

/// Reads the body of an opening.
///
/// # Errors
/// `Corrupt`.
pub(super) fn decode_opening(key: &str, body: &[u8]) -> Result<Opening> {
    serde_json::from_slice(body).map_err(|_| corrupt(key, "its body is not an opening's"))
}

pub(super) fn corrupt(key: &str, why: &str) -> Error {
    Error::Corrupt { what: format!("object {key:?}"), why: why.to_owned() }
}

fn read_entry(place: &Place, bytes: &[u8]) -> Result<(Header, Vec<u8>), &'static str> {
    let (header, lengths) = read_header(place, bytes)?;
    if bytes.len() != HEADER_BYTES + lengths.stored + CHECK_BYTES {
        return Err("it is not as long as its header says");
    }
    let (covered, check) = bytes.split_at(bytes.len() - CHECK_BYTES);
    if blake3::hash(covered).as_bytes() != check {
        return Err("its checksum does not match its contents");
    }
    let stored = &covered[HEADER_BYTES..];
    let body = match lengths.raw {
        0 => Vec::new(),
        raw => zstd::bulk::decompress(stored, raw).map_err(|_| "its body cannot be decompressed")?,
    };
    match body.len() == lengths.raw {
        true => Ok((header, body)),
        false => Err("its body is not as long as its header says"),
    }
}

fn read_header(place: &Place, bytes: &[u8]) -> Result<(Header, Lengths), &'static str> {
    let header = bytes.get(..HEADER_BYTES).ok_or("it is too short")?;
    if header[..8] != MAGIC {
        return Err("it is no entry of an archive");
    }
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
    let id_at = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).expect("sixteen bytes");
    if u32_at(8) != VERSION {
        return Err("it has a format version that this build does not know");
    }
    if blake3::hash(&header[..CHECKED_BYTES]).as_bytes() != &header[CHECKED_BYTES..] {
        return Err("its header's checksum does not match");
    }
    let found =
        Place { branch: BranchId::from_bytes(id_at(32)), line: u64_at(48), stretch: u64_at(56), number: u64_at(64) };
    if found != *place {
        return Err("it belongs under another key");
    }
    let kind = Kind::ALL.into_iter().find(|kind| *kind as u32 == u32_at(12)).ok_or("it is of an unknown kind")?;
    let (start, end) = (Lsn(u64_at(80)), Lsn(u64_at(88)));
    let time = Timestamp::from_microsecond(u64_at(96).cast_signed()).map_err(|_| "its time is none")?;
    let lengths = Lengths { raw: u32_at(76) as usize, stored: u32_at(104) as usize };
    if lengths.raw > SPAN_BYTES_MAX {
        return Err("its body is longer than allowed");
    }
    let wal = if kind == Kind::Span { lengths.raw as u64 } else { 0 };
    if end.0.checked_sub(start.0) != Some(wal) || (kind == Kind::Span && wal == 0) {
        return Err("its positions do not fit its length");
    }
    Ok((Header { kind, writer: id_at(16), pg_timeline: u32_at(72), start, end, time }, lengths))
}
