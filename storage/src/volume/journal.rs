//! The journal of one upper: what was done to its tree, in order, as checksummed records in an append-only file.
//!
//! ```text
//! header, 48 bytes
//!  0   8  "EBBJRNL\0"
//!  8   4  version, 1
//! 12   4  zero
//! 16   8  number of the upper
//! 24  16  the layer this upper lies on
//! 40   8  check: the first 8 bytes of BLAKE3 of what is before it
//!
//! record, at any offset after the header
//!  0   4  length of the body
//!  4   8  synced: up to where this journal was known to be on disk when the record was written
//! 12   8  check: the first 8 bytes of BLAKE3 of (the header's check, the record's offset, bytes 0 to 12, the body)
//! 20   n  body: a kind, then its fields (see [`Record`])
//! ```
//!
//! Numbers are little-endian. The offset and the header's check are hashed too, so that bytes of another place or of
//! another journal are never taken for a record.
//!
//! **Crash**: an append is one `pwrite` and is not synced; whoever promises durability calls [`Journal::sync`]. A bad
//! record is a torn tail, and is cut, unless a later record tells that it had been synced: then the journal is corrupt.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use ebb_types::{LayerId, Lsn};
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::errno;
use crate::error::{Error, LocalContext, Result};
use crate::layer::Ino;
use crate::pg_files::WAL_PAGE_BYTES;

const MAGIC: &[u8; 8] = b"EBBJRNL\0";
const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: u64 = 48;
const RECORD_HEADER_BYTES: usize = 20;

/// LIMIT: a symlink's target (4,095 bytes) and a name (255) with their fields are far below it.
const BODY_BYTES_MAX: usize = 16 << 10;

/// LIMIT: room is taken from the file system in steps of this many bytes, before anything is changed, so that a full
/// disk refuses an operation instead of breaking it in the middle.
const RESERVE_BYTES: u64 = 128 << 10;

/// One change of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    /// A regular file was made, empty.
    Create { ino: Ino, parent: Ino, name: Vec<u8>, mode: u32 },
    /// A directory was made.
    Mkdir { ino: Ino, parent: Ino, name: Vec<u8>, mode: u32 },
    /// A symbolic link was made.
    Symlink { ino: Ino, parent: Ino, name: Vec<u8>, target: Vec<u8> },
    /// A file or symlink lost its name.
    Unlink { parent: Ino, name: Vec<u8> },
    /// An empty directory was removed.
    Rmdir { parent: Ino, name: Vec<u8> },
    /// Something got another name; what had that name is gone.
    Rename { from: Ino, from_name: Vec<u8>, to: Ino, to_name: Vec<u8> },
    /// The permission bits changed.
    Mode { ino: Ino, mode: u32 },
    /// A file was cut to this size: nothing at or after it shows through from below any more.
    Truncate { ino: Ino, size: u64 },
    /// Where the WAL ended when the upper was sealed. Only right before a `Seal` does it mean anything.
    WalEnd(WalEnd),
    /// The upper was sealed as this layer. The last record; the upper of the next number goes on.
    Seal { layer: LayerId },
}

/// Where the WAL ended at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WalEnd {
    /// The number of the segment that was written last.
    pub segment: u64,
    /// How many of its pages nobody writes to any more, because another follows them.
    pub pages: u32,
    /// The page after those, as far as it was written.
    pub page: Vec<u8>,
}

impl WalEnd {
    /// The position of the end: what is behind the last byte that is not zero is nothing, as a record begins with its
    /// length, and at a multiple of eight (PostgreSQL 15, `xlogrecord.h`).
    pub fn lsn(&self, segment_bytes: u32) -> Lsn {
        let written = self.page.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
        let pages = u64::from(self.pages) * WAL_PAGE_BYTES;
        Lsn(self.segment * u64::from(segment_bytes) + pages + written.next_multiple_of(8))
    }
}

/// What a journal says about its upper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The number of the upper.
    pub upper: u64,
    /// The layer it lies on.
    pub base: LayerId,
}

/// Everything found in a journal file.
#[derive(Debug)]
pub(super) struct Contents {
    pub header: Header,
    pub records: Vec<Record>,
    /// Where the last good record ends.
    pub end: u64,
}

/// A journal that is appended to.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// The header's check: part of every record's.
    salt: [u8; 8],
    tail: Mutex<Tail>,
    /// Up to where the file is on disk. Written under `sync_turn`.
    synced: AtomicU64,
    sync_turn: Mutex<SyncTurn>,
}

#[derive(Debug)]
struct Tail {
    end: u64,
    /// Up to where the file system has set room aside.
    reserved: u64,
    /// Set when a failed append could not be taken back: what follows it would be lost, so nothing may follow.
    broken: Option<Errno>,
    buffer: Vec<u8>,
}

#[derive(Debug, Default)]
struct SyncTurn {
    /// After a failed sync nobody knows what is on disk, and a second sync would wrongly succeed.
    failed: Option<Errno>,
}

impl Journal {
    /// Makes the file with nothing but its header, not synced.
    pub(super) fn create(path: &Path, header: Header) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).on("create", path)?;
        let bytes = encode_header(header);
        file.write_all_at(&bytes, 0).on("write", path)?;
        Ok(Self::new(file, &bytes, HEADER_BYTES, 0))
    }

    /// Opens a journal whose contents were read; cuts off what is after them, and syncs the rest. The header is on disk
    /// since it was made: an empty journal costs nothing.
    pub(super) fn open(path: &Path, contents: &Contents) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path).on("open", path)?;
        if file.metadata().on("read", path)?.len() != HEADER_BYTES {
            file.set_len(contents.end).on("truncate", path)?;
            file.sync_all().on("sync", path)?;
        }
        Ok(Self::new(file, &encode_header(contents.header), contents.end, contents.end))
    }

    fn new(file: File, header: &[u8], end: u64, synced: u64) -> Self {
        let salt = header[40..48].try_into().expect("eight bytes");
        let tail = Mutex::new(Tail { end, reserved: end, broken: None, buffer: Vec::with_capacity(256) });
        Self { file, salt, tail, synced: AtomicU64::new(synced), sync_turn: Mutex::default() }
    }

    /// Whether nothing was ever recorded.
    pub(super) fn is_empty(&self) -> bool {
        self.tail.lock().end == HEADER_BYTES
    }

    /// Takes room for a few more records from the file system, so that the next append cannot find the disk full.
    pub(super) fn reserve(&self) -> Result<(), Errno> {
        self.reserve_in(&mut self.tail.lock(), (RECORD_HEADER_BYTES + BODY_BYTES_MAX) as u64)
    }

    fn reserve_in(&self, tail: &mut Tail, bytes: u64) -> Result<(), Errno> {
        if let Some(errno) = tail.broken {
            return Err(errno);
        }
        if tail.end + bytes <= tail.reserved {
            return Ok(());
        }
        let wanted = bytes.max(RESERVE_BYTES);
        match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, tail.end, wanted) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                tail.reserved = tail.end + wanted;
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }

    /// Appends a record without syncing it, and answers where it ends. If it fails, nothing was appended.
    pub(super) fn append(&self, record: &Record) -> Result<u64, Errno> {
        let mut tail = self.tail.lock();
        let tail = &mut *tail;
        encode_record(&self.salt, tail.end, self.synced.load(Ordering::Acquire), record, &mut tail.buffer);
        self.reserve_in(tail, tail.buffer.len() as u64)?;
        if let Err(error) = self.file.write_all_at(&tail.buffer, tail.end) {
            // Cut a half-written record off again: a good one must never follow a bad one.
            tail.reserved = tail.end;
            if self.file.set_len(tail.end).is_err() {
                tail.broken = Some(Errno::IO);
            }
            return Err(errno(&error));
        }
        tail.end += tail.buffer.len() as u64;
        Ok(tail.end)
    }

    /// Whether everything up to this position is on disk.
    pub(super) fn is_synced(&self, position: u64) -> bool {
        self.synced.load(Ordering::Acquire) >= position
    }

    /// Brings everything appended so far to disk. Calls at the same time share one sync.
    pub(super) fn sync(&self) -> Result<(), Errno> {
        let wanted = self.tail.lock().end;
        if self.is_synced(wanted) {
            return Ok(());
        }
        let mut turn = self.sync_turn.lock();
        if let Some(errno) = turn.failed {
            return Err(errno);
        }
        if self.is_synced(wanted) {
            return Ok(());
        }
        let end = self.tail.lock().end;
        if let Err(error) = self.file.sync_data() {
            turn.failed = Some(errno(&error));
            return Err(errno(&error));
        }
        self.synced.store(end, Ordering::Release);
        Ok(())
    }
}

/// Reads a whole journal.
///
/// # Errors
/// `Corrupt` when the header is bad, or when a record is that had been synced.
pub(super) fn read(path: &Path) -> Result<Contents> {
    let bytes = std::fs::read(path).on("read", path)?;
    decode(&bytes).map_err(|why| Error::Corrupt { what: format!("journal {path:?}"), why })
}

fn decode(bytes: &[u8]) -> Result<Contents, String> {
    let header = decode_header(bytes)?;
    let salt = bytes[40..48].try_into().expect("eight bytes");
    let mut records = Vec::new();
    let mut at = HEADER_BYTES as usize;
    while let Some((record, _, length)) = decode_record(&salt, bytes, at) {
        records.push(record);
        at += length;
    }
    // What cannot be read must not have been promised to anyone.
    for later in at + 1..bytes.len().saturating_sub(RECORD_HEADER_BYTES) {
        if decode_record(&salt, bytes, later).is_some_and(|(_, synced, _)| synced > at as u64) {
            return Err(format!("the record at {at} is damaged; it had been synced, and records follow it"));
        }
    }
    Ok(Contents { header, records, end: at as u64 })
}

fn encode_header(header: Header) -> [u8; HEADER_BYTES as usize] {
    let mut bytes = [0; HEADER_BYTES as usize];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&header.upper.to_le_bytes());
    bytes[24..40].copy_from_slice(header.base.as_bytes());
    let check = check(&[&bytes[..40]]);
    bytes[40..].copy_from_slice(&check);
    bytes
}

fn decode_header(bytes: &[u8]) -> Result<Header, String> {
    let header = bytes.get(..HEADER_BYTES as usize).ok_or("it is shorter than its header")?;
    if &header[..8] != MAGIC {
        return Err("it does not begin like a journal".to_owned());
    }
    let version = u32::from_le_bytes(header[8..12].try_into().expect("four bytes"));
    if version != VERSION {
        return Err(format!("it has version {version}; only {VERSION} is known"));
    }
    if header[40..] != check(&[&header[..40]]) {
        return Err("its header does not match its check".to_owned());
    }
    Ok(Header {
        upper: u64::from_le_bytes(header[16..24].try_into().expect("eight bytes")),
        base: LayerId::from_bytes(header[24..40].try_into().expect("sixteen bytes")),
    })
}

fn check(parts: &[&[u8]]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes")
}

fn encode_record(salt: &[u8; 8], at: u64, synced: u64, record: &Record, out: &mut Vec<u8>) {
    out.clear();
    out.resize(RECORD_HEADER_BYTES, 0);
    record.encode(out);
    let length = out.len() - RECORD_HEADER_BYTES;
    debug_assert!(length <= BODY_BYTES_MAX);
    out[..4].copy_from_slice(&(length as u32).to_le_bytes());
    out[4..12].copy_from_slice(&synced.to_le_bytes());
    let check = check(&[salt, &at.to_le_bytes(), &out[..12], &out[RECORD_HEADER_BYTES..]]);
    out[12..RECORD_HEADER_BYTES].copy_from_slice(&check);
}

/// The record at an offset, its `synced`, and its length; `None` if there is none that is whole.
fn decode_record(salt: &[u8; 8], bytes: &[u8], at: usize) -> Option<(Record, u64, usize)> {
    let rest = bytes.get(at..)?;
    let length = u32::from_le_bytes(rest.get(..4)?.try_into().ok()?) as usize;
    if length == 0 || length > BODY_BYTES_MAX {
        return None;
    }
    let body = rest.get(RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + length)?;
    if rest[12..RECORD_HEADER_BYTES] != check(&[salt, &(at as u64).to_le_bytes(), &rest[..12], body]) {
        return None;
    }
    let synced = u64::from_le_bytes(rest[4..12].try_into().ok()?);
    Some((Record::decode(body)?, synced, RECORD_HEADER_BYTES + length))
}

impl Record {
    fn encode(&self, out: &mut Vec<u8>) {
        fn name(out: &mut Vec<u8>, bytes: &[u8]) {
            out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
            out.extend_from_slice(bytes);
        }
        let number = |out: &mut Vec<u8>, n: u64| out.extend_from_slice(&n.to_le_bytes());
        match self {
            Record::Create { ino, parent, name: n, mode } | Record::Mkdir { ino, parent, name: n, mode } => {
                out.push(if matches!(self, Record::Create { .. }) { 1 } else { 2 });
                number(out, *ino);
                number(out, *parent);
                out.extend_from_slice(&mode.to_le_bytes());
                name(out, n);
            }
            Record::Symlink { ino, parent, name: n, target } => {
                out.push(3);
                number(out, *ino);
                number(out, *parent);
                name(out, n);
                name(out, target);
            }
            Record::Unlink { parent, name: n } | Record::Rmdir { parent, name: n } => {
                out.push(if matches!(self, Record::Unlink { .. }) { 4 } else { 5 });
                number(out, *parent);
                name(out, n);
            }
            Record::Rename { from, from_name, to, to_name } => {
                out.push(6);
                number(out, *from);
                name(out, from_name);
                number(out, *to);
                name(out, to_name);
            }
            Record::Mode { ino, mode } => {
                out.push(7);
                number(out, *ino);
                out.extend_from_slice(&mode.to_le_bytes());
            }
            Record::Truncate { ino, size } => {
                out.push(8);
                number(out, *ino);
                number(out, *size);
            }
            Record::WalEnd(end) => {
                out.push(10);
                number(out, end.segment);
                out.extend_from_slice(&end.pages.to_le_bytes());
                name(out, &end.page);
            }
            Record::Seal { layer } => {
                out.push(9);
                out.extend_from_slice(layer.as_bytes());
            }
        }
    }

    fn decode(body: &[u8]) -> Option<Record> {
        let (&kind, rest) = body.split_first()?;
        let mut input = Fields(rest);
        let record = match kind {
            1 | 2 => {
                let (ino, parent, mode, name) = (input.u64()?, input.u64()?, input.u32()?, input.name()?);
                if kind == 1 {
                    Record::Create { ino, parent, name, mode }
                } else {
                    Record::Mkdir { ino, parent, name, mode }
                }
            }
            3 => {
                Record::Symlink { ino: input.u64()?, parent: input.u64()?, name: input.name()?, target: input.name()? }
            }
            4 => Record::Unlink { parent: input.u64()?, name: input.name()? },
            5 => Record::Rmdir { parent: input.u64()?, name: input.name()? },
            6 => Record::Rename {
                from: input.u64()?,
                from_name: input.name()?,
                to: input.u64()?,
                to_name: input.name()?,
            },
            7 => Record::Mode { ino: input.u64()?, mode: input.u32()? },
            8 => Record::Truncate { ino: input.u64()?, size: input.u64()? },
            10 => Record::WalEnd(WalEnd { segment: input.u64()?, pages: input.u32()?, page: input.name()? }),
            9 => Record::Seal { layer: LayerId::from_bytes(input.take(16)?.try_into().ok()?) },
            _ => return None,
        };
        input.0.is_empty().then_some(record)
    }
}

/// Takes fields off the front of a body.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")))
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")))
    }

    fn name(&mut self) -> Option<Vec<u8>> {
        let length = u16::from_le_bytes(self.take(2)?.try_into().expect("two bytes"));
        self.take(usize::from(length)).map(<[u8]>::to_vec)
    }
}

/// Whether there is a journal with a header, good or bad. One without was being made, and nothing was ever promised of
/// it: a header lies in one sector, which is written whole or not at all.
pub(super) fn is_begun(path: &Path) -> Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file.on("open", path)?,
    };
    let mut bytes = [0; HEADER_BYTES as usize];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.on("read", path).map(|()| bytes.iter().any(|&byte| byte != 0)),
    }
}

/// Reads only the header of a journal.
pub(super) fn read_header(path: &Path) -> Result<Header> {
    let file = File::open(path).on("open", path)?;
    let mut bytes = [0; HEADER_BYTES as usize];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error).on("read", path),
        _ => {}
    }
    decode_header(&bytes).map_err(|why| Error::Corrupt { what: format!("journal {path:?}"), why })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: Header = Header { upper: 3, base: LayerId::for_test(7) };

    fn records() -> Vec<Record> {
        vec![
            Record::Create { ino: 2, parent: 1, name: b"a".to_vec(), mode: 0o600 },
            Record::Mkdir { ino: 3, parent: 1, name: b"base".to_vec(), mode: 0o700 },
            Record::Symlink { ino: 4, parent: 3, name: b"pg_wal".to_vec(), target: b"../wal".to_vec() },
            Record::Unlink { parent: 1, name: b"a".to_vec() },
            Record::Rmdir { parent: 1, name: b"base".to_vec() },
            Record::Rename { from: 1, from_name: b"x".to_vec(), to: 3, to_name: b"y".to_vec() },
            Record::Mode { ino: 2, mode: 0o640 },
            Record::Truncate { ino: 2, size: 8193 },
            Record::WalEnd(WalEnd { segment: 5, pages: 77, page: vec![7; 99] }),
            Record::Seal { layer: LayerId::for_test(9) },
        ]
    }

    /// A journal of some records, of which the first `synced` were synced, and where each record begins.
    fn journal(synced: usize) -> (Vec<u8>, Vec<usize>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = Journal::create(&path, HEADER).unwrap();
        let mut begins = Vec::new();
        for (n, record) in records().iter().enumerate() {
            if n == synced {
                journal.sync().unwrap();
            }
            begins.push(std::fs::metadata(&path).unwrap().len() as usize);
            journal.append(record).unwrap();
        }
        (std::fs::read(&path).unwrap(), begins)
    }

    #[test]
    fn what_was_appended_is_read_again() {
        let (bytes, _) = journal(0);
        let contents = decode(&bytes).unwrap();
        assert_eq!(contents.header, HEADER);
        assert_eq!(contents.records, records());
        assert_eq!(contents.end, bytes.len() as u64);
    }

    #[test]
    fn a_torn_tail_is_cut_at_every_length() {
        let (bytes, begins) = journal(0);
        for length in HEADER_BYTES as usize..bytes.len() {
            let whole = begins.iter().filter(|&&begin| begin <= length).count() - 1;
            let contents = decode(&bytes[..length]).unwrap();
            assert_eq!(contents.records, records()[..whole], "cut at {length}");
        }
    }

    #[test]
    fn a_bad_record_that_was_never_synced_is_a_torn_tail() {
        let (mut bytes, begins) = journal(2);
        bytes[begins[4] + 21] ^= 1;
        assert_eq!(decode(&bytes).unwrap().records, records()[..4]);
    }

    #[test]
    fn a_bad_record_that_was_synced_is_corruption() {
        let (mut bytes, begins) = journal(5);
        bytes[begins[2] + 21] ^= 1;
        let why = decode(&bytes).unwrap_err();
        assert!(why.contains("had been synced"), "{why}");
    }

    #[test]
    fn a_bad_header_is_corruption() {
        let (bytes, _) = journal(0);
        for at in 0..HEADER_BYTES as usize {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert!(decode(&bytes).is_err(), "byte {at}");
        }
        assert!(decode(&bytes[..40]).is_err());
    }

    #[test]
    fn an_opened_journal_goes_on_after_its_last_good_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = Journal::create(&path, HEADER).unwrap();
        assert!(journal.is_empty());
        journal.append(&records()[0]).unwrap();
        drop(journal);
        let torn = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        std::io::Write::write_all(&mut &torn, &[7; 30]).unwrap();
        let journal = Journal::open(&path, &read(&path).unwrap()).unwrap();
        journal.append(&records()[3]).unwrap();
        journal.sync().unwrap();
        assert_eq!(read(&path).unwrap().records, [records()[0].clone(), records()[3].clone()]);
        assert_eq!(read_header(&path).unwrap(), HEADER);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(tail: Vec<u8>) {
            let mut bytes = encode_header(HEADER).to_vec();
            bytes.extend(tail);
            prop_assert!(decode(&bytes).unwrap().records.is_empty());
        }
    }
}
