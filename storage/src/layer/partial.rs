//! A layer of which this node has only some frames: `layers/<layer id>` with two files more.
//!
//! ```text
//! layers/<layer id>/
//!   manifest     whole
//!   data/<ino>   at their full length; what is in frames that are missing is holes
//!   wal/<name>   likewise
//!   index        the end of the layer's object, from its index on: a layer that has it is partial
//!   have         which frames are here:
//!                  offset  size  meaning
//!                       0     8  "EBBLHAVE"
//!                       8     4  version: 1
//!                      12     4  number of frames
//!                      16    16  boot id of this machine when the directory was made
//!                      32    32  BLAKE3 of the layer id and bytes 0 to 31
//!                      64     n  a byte for each frame: 1 if all that it holds was checked and written, else 0
//! ```
//!
//! **Invariants**: a frame's byte is written after what the frame holds. Frames are only ever added, and every process adds
//! the same bytes. Whoever reads from a partial layer has a shared lock (flock) on its `data`, so that it is not evicted.
//!
//! **Crash**: nothing in it is synced, so it counts only as long as the machine runs that made it: under another boot id
//! it is [stale](is_stale), worth nothing, and removed. A killed process leaves at worst a frame whose byte is missing.
//! Once all frames are here the layer is synced and then loses its `index`: from that moment it is whole.
//!
//! LIMIT: the index is in memory while the layer is open, about 100 bytes for each 128 KiB of pages.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ebb_types::LayerId;
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::Ino;
use super::fetch::{Unpacker, object_key, sync_file_system};
use super::format::{Content, FOOTER_BYTES, Footer, Frame, HEADER_BYTES, Index, WalFile};
use super::lazy::Flight;
use super::lead::Lead;
use crate::error::{Error, LocalContext, Result};

const MAGIC: &[u8; 8] = b"EBBLHAVE";
const VERSION: u32 = 1;
const SIGNED_BYTES: usize = 32;
const HAVE_HEADER_BYTES: usize = 64;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A partial layer, open and locked.
pub(crate) struct Partial {
    pub(crate) id: LayerId,
    dir: PathBuf,
    data: OwnedFd,
    frames: Vec<Placed>,
    wal_files: Vec<WalFile>,
    /// By inode, where its pages are, in the order of pages.
    spans: HashMap<Ino, Vec<Span>>,
    have: File,
    /// What this process knows of `have`. Never set before the file's byte.
    got: Vec<AtomicBool>,
    missing: AtomicUsize,
    /// A sync failed: what is here may not stay.
    is_unsynced: AtomicBool,
    /// The frames that are being fetched by this process. Used by whoever fetches.
    pub(super) flights: Mutex<HashMap<u32, Arc<Flight>>>,
}

/// A frame and where it begins in the object.
struct Placed {
    offset: u64,
    frame: Frame,
}

/// Pages of one file that are in one frame.
#[derive(Clone, Copy)]
struct Span {
    start: u32,
    pages: u32,
    frame: u32,
}

impl std::fmt::Debug for Partial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let missing = self.missing.load(Ordering::Relaxed);
        f.debug_struct("Partial").field("id", &self.id).field("missing", &missing).finish_non_exhaustive()
    }
}

/// Whether a layer's directory lacks frames.
pub(crate) fn is_partial(dir: &Path) -> bool {
    dir.join("index").exists()
}

/// Whether a partial layer's directory is of an earlier run of this machine, or damaged: it is garbage then.
///
/// # Errors
/// If that cannot be found out.
pub(crate) fn is_stale(id: LayerId, dir: &Path) -> Result<bool> {
    let path = dir.join("have");
    let mut header = [0; HAVE_HEADER_BYTES];
    match File::open(&path).and_then(|file| file.read_exact_at(&mut header, 0)) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => {
            return Ok(true);
        }
        Err(error) => return Err(error).on("read", &path),
    }
    let frames = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
    Ok(header != have_header(id, frames)?)
}

fn have_header(id: LayerId, frames: u32) -> Result<[u8; HAVE_HEADER_BYTES]> {
    let mut header = [0; HAVE_HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&frames.to_le_bytes());
    header[16..32].copy_from_slice(&boot_id()?);
    let mut hasher = blake3::Hasher::new();
    hasher.update(id.as_bytes()).update(&header[..SIGNED_BYTES]);
    header[SIGNED_BYTES..].copy_from_slice(hasher.finalize().as_bytes());
    Ok(header)
}

/// What tells this run of the machine from all others.
fn boot_id() -> Result<[u8; 16]> {
    let path = Path::new(BOOT_ID);
    let text = fs::read_to_string(path).on("read", path)?;
    let digits = text.trim().replace('-', "");
    let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other).on("understand", path)?;
    Ok(number.to_be_bytes())
}

/// Opens a layer's `data`, and locks it against eviction for as long as the descriptor is open. `None` if the layer is not
/// there, or was just being evicted.
pub(crate) fn share_lock(data: &Path) -> io::Result<Option<OwnedFd>> {
    let opened = rustix::fs::open(data, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let dir = match opened {
        Ok(dir) => dir,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    rustix::fs::flock(&dir, FlockOperation::LockShared)?;
    let held = rustix::fs::fstat(&dir)?;
    match fs::metadata(data) {
        Ok(named) if (named.dev(), named.ino()) == (held.st_dev, held.st_ino) => Ok(Some(dir)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Fills the existing, empty directory `into` with a partial layer that has its manifest and nothing else. It counts once
/// it has the layer's name.
pub(super) fn create(id: LayerId, lead: &Lead, into: &Path) -> Result<()> {
    drop(Unpacker::create(what(id), into.to_owned(), &lead.manifest, lead.index.wal_files.iter())?);
    let write = |name: &str, bytes: &[u8]| {
        let path = into.join(name);
        fs::write(&path, bytes).on("write", &path)
    };
    write("manifest", &lead.manifest_bytes)?;
    write("index", &lead.tail)?;
    let count = u32::try_from(lead.index.frames.len());
    let count = count.map_err(|_| Error::Corrupt { what: what(id), why: "it has too many frames".to_owned() })?;
    let mut have = have_header(id, count)?.to_vec();
    have.extend(lead.index.frames.iter().map(|frame| u8::from(frame.content == Content::Manifest)));
    write("have", &have)
}

fn what(id: LayerId) -> String {
    format!("object {:?}", object_key(id))
}

impl Partial {
    /// Opens and locks the partial layer in `dir`; `None` if it is not there, or not partial any more.
    ///
    /// # Errors
    /// `Corrupt` when it is stale, or its index does not check.
    pub(super) fn open(id: LayerId, dir: &Path) -> Result<Option<Self>> {
        let data_path = dir.join("data");
        let Some(data) = share_lock(&data_path).on("lock", &data_path)? else { return Ok(None) };
        let path = dir.join("index");
        let tail = match fs::read(&path) {
            Ok(tail) => tail,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).on("read", &path),
        };
        let corrupt = |why: String| Error::Corrupt { what: format!("{dir:?}"), why };
        let index = decode_tail(id, &tail).map_err(corrupt)?;
        let path = dir.join("have");
        let have = match File::options().read(true).write(true).open(&path) {
            Ok(have) => have,
            // It became whole just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_partial(dir) => return Ok(None),
            Err(error) => return Err(error).on("open", &path),
        };
        let mut bytes = vec![0; HAVE_HEADER_BYTES + index.frames.len()];
        have.read_exact_at(&mut bytes, 0).on("read", &path)?;
        if bytes[..HAVE_HEADER_BYTES] != have_header(id, index.frames.len() as u32)? {
            return Err(corrupt("it is of an earlier run of this machine, or of other frames".to_owned()));
        }
        let got: Vec<_> = bytes[HAVE_HEADER_BYTES..].iter().map(|&byte| AtomicBool::new(byte == 1)).collect();
        let missing = got.iter().filter(|got| !got.load(Ordering::Relaxed)).count();
        let spans = spans(&index.frames);
        let mut offset = HEADER_BYTES;
        let place = |frame: Frame| {
            let placed = Placed { offset, frame };
            offset += placed.frame.object_bytes;
            placed
        };
        Ok(Some(Self {
            id,
            dir: dir.to_owned(),
            data,
            frames: index.frames.into_iter().map(place).collect(),
            wal_files: index.wal_files,
            spans,
            have,
            got,
            missing: AtomicUsize::new(missing),
            is_unsynced: AtomicBool::new(false),
            flights: Mutex::default(),
        }))
    }

    /// Where its data files are.
    pub(crate) fn data_dir(&self) -> impl AsFd + '_ {
        &self.data
    }

    /// Whether a page can be read from its data file: its frame is here, or it is in none and all zeroes.
    pub(crate) fn has_page(&self, ino: Ino, page: u32) -> bool {
        self.frames_of(ino, page..page + 1).all(|frame| self.has(frame))
    }

    /// The frames that hold any of these pages.
    pub(super) fn frames_of(&self, ino: Ino, pages: Range<u32>) -> impl Iterator<Item = u32> + '_ {
        let spans = self.spans.get(&ino).map_or(&[][..], Vec::as_slice);
        let first = spans.partition_point(|span| span.start + span.pages <= pages.start);
        spans[first..].iter().take_while(move |span| span.start < pages.end).map(|span| span.frame)
    }

    /// The frames that hold WAL and roles: what the start of an image needs besides pages.
    pub(super) fn frames_to_start(&self) -> impl Iterator<Item = u32> + '_ {
        self.all_frames().filter(|&number| {
            matches!(self.frames[number as usize].frame.content, Content::Wal(_) | Content::Roles { .. })
        })
    }

    /// All frames.
    pub(super) fn all_frames(&self) -> Range<u32> {
        0..self.frames.len() as u32
    }

    /// Whether this process knows that a frame is here.
    pub(super) fn has(&self, frame: u32) -> bool {
        self.got.get(frame as usize).is_some_and(|got| got.load(Ordering::Acquire))
    }

    /// Whether another process has fetched a frame meanwhile.
    pub(super) fn has_now(&self, frame: u32) -> bool {
        let mut byte = [0];
        let read = self.have.read_exact_at(&mut byte, HAVE_HEADER_BYTES as u64 + u64::from(frame));
        let here = self.has(frame) || (read.is_ok() && byte == [1]);
        if here {
            self.note(frame);
        }
        here
    }

    /// Whether all frames are here.
    pub(crate) fn is_full(&self) -> bool {
        self.missing.load(Ordering::Acquire) == 0
    }

    /// Where neighbouring frames are in the object.
    pub(super) fn range_of(&self, frames: &Range<u32>) -> Range<u64> {
        let start = self.frames[frames.start as usize].offset;
        let last = &self.frames[frames.end as usize - 1];
        start..last.offset + last.frame.object_bytes
    }

    /// Checks neighbouring frames as they came from the bucket, and writes what is in them. Blocks.
    ///
    /// # Errors
    /// `Corrupt` when any of it is not what was packed; the frames before it are here then.
    pub(super) fn fill(&self, frames: Range<u32>, mut bytes: &[u8]) -> Result<()> {
        let what = what(self.id);
        let mut unpacker = Unpacker::over(what.clone(), self.dir.clone(), self.wal_files.iter())?;
        for number in frames {
            let frame = &self.frames[number as usize].frame;
            let split = bytes.split_at_checked(frame.object_bytes as usize);
            let short = || Error::Corrupt { what: what.clone(), why: "a read of it came back short".to_owned() };
            let (mine, rest) = split.ok_or_else(short)?;
            bytes = rest;
            if !self.has(number) {
                unpacker.frame(frame, mine)?;
                let path = self.dir.join("have");
                self.have.write_all_at(&[1], HAVE_HEADER_BYTES as u64 + u64::from(number)).on("write", &path)?;
                self.note(number);
            }
        }
        Ok(())
    }

    fn note(&self, frame: u32) {
        if !self.got[frame as usize].swap(true, Ordering::AcqRel) {
            self.missing.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Makes the layer whole, now that all frames are here. Blocks for a sync of the file system. Any number of
    /// processes may do it at once.
    ///
    /// CRASH: `index` goes only once everything is on disk; and first, for a layer without `have` is stale.
    pub(super) fn become_whole(&self) -> Result<()> {
        debug_assert!(self.is_full());
        if self.is_unsynced.load(Ordering::Acquire) {
            return Err(io::Error::other("a sync failed before")).on("sync", &self.dir);
        }
        if let Err(error) = sync_file_system(&self.dir) {
            // The kernel tells once, and may drop what it could not write: without `have` the layer is stale, and whoever
            // opens it next fetches it anew.
            self.is_unsynced.store(true, Ordering::Release);
            let path = self.dir.join("have");
            fs::remove_file(&path).on("remove", &path)?;
            return Err(error);
        }
        for name in ["index", "have"] {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).on("remove", &path),
                _ => {}
            }
        }
        let parent = self.dir.parent().unwrap_or(&self.dir);
        for dir in [&self.dir, parent] {
            File::open(dir).and_then(|dir| dir.sync_all()).on("sync", dir)?;
        }
        Ok(())
    }
}

/// Checks the end of an object, and answers its index.
fn decode_tail(id: LayerId, tail: &[u8]) -> Result<Index, String> {
    let (index, footer) =
        tail.len().checked_sub(FOOTER_BYTES as usize).map(|at| tail.split_at(at)).ok_or("it is cut short")?;
    // Where the object ends is what its footer says; that is under the footer's checksum.
    let number =
        |at: usize| footer.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
    let end = number(0).saturating_add(number(8)).saturating_add(FOOTER_BYTES);
    let footer = Footer::decode(id, end, footer)?;
    if footer.index_bytes != index.len() as u64 {
        return Err("its index has another length than its footer tells".to_owned());
    }
    Index::decode(&footer, index)
}

fn spans(frames: &[Frame]) -> HashMap<Ino, Vec<Span>> {
    let mut spans: HashMap<Ino, Vec<Span>> = HashMap::new();
    for (number, frame) in (0..).zip(frames) {
        let Content::Pages(pieces) = &frame.content else { continue };
        for piece in pieces {
            let span = Span { start: piece.start, pages: piece.pages, frame: number };
            spans.entry(piece.file).or_default().push(span);
        }
    }
    spans.values_mut().for_each(|spans| spans.sort_unstable_by_key(|span| span.start));
    spans
}
