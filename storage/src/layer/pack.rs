//! From a sealed layer on the node to the one file that becomes its object in the bucket, in bounded memory.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use ebb_types::LayerId;

use super::format::{Content, FRAME_PAGES, Footer, Frame, HEADER_BYTES, Index, Piece, WalFile, header};
use super::{BLOCK_BYTES, InodeKind, Manifest, Run};
use crate::error::{Error, LocalContext, Result};
use crate::pg_files;

/// LIMIT: on pages of pgbench (scale 10, after five seconds of TPC-B) in frames of 128 KiB, zstd 1.5.7 shrinks 13.6
/// times at 1.38 GB/s with level 1, 15.5 times at 1.21 GB/s with 3, and 17.0 times at 0.28 GB/s with 6. WAL: 9.8
/// times with level 1, 10.4 with 3.
const ZSTD_LEVEL: i32 = 3;

/// LIMIT: 32 frames, 4 MiB of pages, in memory at once; enough for each thread to have work, and for the cost of
/// starting threads to vanish.
const BATCH_FRAMES: usize = 32;

/// LIMIT: packing goes on beside computes that serve clients; more threads would finish sooner at their expense.
const THREADS_MAX: usize = 4;

pub(super) const PAGE: usize = BLOCK_BYTES as usize;
const ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// What a packed layer came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packed {
    /// Bytes of the object.
    pub object_bytes: u64,
    /// Bytes of the pages and WAL blocks in it, uncompressed.
    pub raw_bytes: u64,
}

/// Packs the layer in `layer_dir` into the file `out`, which is made or emptied. Blocks.
///
/// The same layer always gives the same bytes.
pub(crate) fn pack(id: LayerId, layer_dir: &Path, out: &Path) -> Result<Packed> {
    let manifest_path = layer_dir.join("manifest");
    let manifest_bytes = fs::read(&manifest_path).on("read", &manifest_path)?;
    let manifest = Manifest::decode(&format!("manifest {manifest_path:?}"), &manifest_bytes)?;
    if manifest.id != id {
        let why = format!("it is that of layer {}", manifest.id);
        return Err(Error::Corrupt { what: format!("manifest {manifest_path:?}"), why });
    }
    let mut packer = Packer::create(id, out)?;
    packer.data_files(&manifest, &layer_dir.join("data"))?;
    packer.wal_files(&layer_dir.join("wal"))?;
    packer.roles(&layer_dir.join("roles.json"))?;
    packer.frame(Content::Manifest, &manifest_bytes)?;
    packer.finish(id)
}

struct Packer<'a> {
    path: &'a Path,
    out: BufWriter<File>,
    /// Bytes written so far.
    offset: u64,
    raw_bytes: u64,
    index: Index,
    /// Frames that wait to be compressed; the last may not be full.
    batch: Vec<RawFrame>,
    /// What the frames of the present section hold.
    section: fn(Vec<Piece>) -> Content,
}

/// The pages of a frame before compression.
#[derive(Default)]
struct RawFrame {
    pieces: Vec<Piece>,
    bytes: Vec<u8>,
}

impl<'a> Packer<'a> {
    fn create(id: LayerId, path: &'a Path) -> Result<Self> {
        let out = BufWriter::new(File::create(path).on("create", path)?);
        let (index, batch) = (Index::default(), Vec::new());
        let mut packer = Self { path, out, offset: 0, raw_bytes: 0, index, batch, section: Content::Pages };
        packer.write(&header(id))?;
        Ok(packer)
    }

    /// The pages that are this layer's own, file by file, but for those that Postgres does not want back: they come back
    /// as zeroes.
    fn data_files(&mut self, manifest: &Manifest, data: &Path) -> Result<()> {
        let dispensable = pg_files::dispensable(manifest);
        for inode in manifest.inodes.iter().filter(|inode| !dispensable.contains(&inode.ino)) {
            let InodeKind::File { size, runs } = &inode.kind else { continue };
            let mut own = runs.iter().filter(|run| run.slot == manifest.own_slot()).peekable();
            if own.peek().is_none() {
                continue;
            }
            let path = data.join(inode.ino.to_string());
            let file = File::open(&path).on("open", &path)?;
            for run in own {
                self.pages(&file, &path, inode.ino, run, *size)?;
            }
        }
        self.flush()
    }

    fn wal_files(&mut self, wal: &Path) -> Result<()> {
        self.section = Content::Wal;
        for (name, path) in wal_files_in(wal)? {
            let file = File::open(&path).on("open", &path)?;
            let size = file.metadata().on("read", &path)?.len();
            let number = self.index.wal_files.len() as u64;
            self.index.wal_files.push(WalFile { name, size });
            let len = u32::try_from(super::pages_of(size)).map_err(|_| too_large(&path))?;
            self.pages(&file, &path, number, &Run { start: 0, len, slot: 0 }, size)?;
        }
        self.flush()
    }

    fn roles(&mut self, path: &Path) -> Result<()> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).on("read", path),
        };
        let packed = compress(&mut compressor(), &bytes);
        self.frame(Content::Roles { raw_bytes: bytes.len() as u64 }, &packed)
    }

    /// Takes on the pages of a run that are not all zeroes: those need no place, as a hole reads the same.
    fn pages(&mut self, file: &File, path: &Path, number: u64, run: &Run, size: u64) -> Result<()> {
        let mut buffer = vec![0; FRAME_PAGES.min(run.len as usize) * PAGE];
        let end = run.start + run.len;
        let mut at = run.start;
        while at < end {
            let count = (end - at).min(FRAME_PAGES as u32);
            let pages = &mut buffer[..count as usize * PAGE];
            read_pages(file, at, size, pages).on("read", path)?;
            for (number_of_page, page) in (at..).zip(pages.chunks_exact(PAGE)) {
                if page != ZERO_PAGE {
                    self.page(number, number_of_page, page)?;
                }
            }
            at += count;
        }
        Ok(())
    }

    fn page(&mut self, file: u64, number: u32, page: &[u8]) -> Result<()> {
        if self.batch.last().is_none_or(|frame| frame.bytes.len() == FRAME_PAGES * PAGE) {
            if self.batch.len() == BATCH_FRAMES {
                self.flush()?;
            }
            self.batch.push(RawFrame::default());
        }
        let frame = self.batch.last_mut().expect("a frame was just made if there was none");
        match frame.pieces.last_mut() {
            Some(piece) if piece.file == file && piece.start + piece.pages == number => piece.pages += 1,
            _ => frame.pieces.push(Piece { file, start: number, pages: 1 }),
        }
        frame.bytes.extend_from_slice(page);
        self.raw_bytes += BLOCK_BYTES;
        Ok(())
    }

    /// Compresses and writes what waits, in order.
    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        for (packed, raw) in compress_all(&batch).into_iter().zip(batch) {
            self.frame((self.section)(raw.pieces), &packed)?;
        }
        Ok(())
    }

    fn frame(&mut self, content: Content, bytes: &[u8]) -> Result<()> {
        let checksum = *blake3::hash(bytes).as_bytes();
        self.index.frames.push(Frame { content, object_bytes: bytes.len() as u64, checksum });
        self.write(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.offset += bytes.len() as u64;
        self.out.write_all(bytes).on("write", self.path)
    }

    fn finish(mut self, id: LayerId) -> Result<Packed> {
        debug_assert!(self.batch.is_empty() && self.offset >= HEADER_BYTES);
        let index = self.index.encode();
        let footer = Footer {
            index_offset: self.offset,
            index_bytes: index.len() as u64,
            raw_bytes: self.raw_bytes,
            index_checksum: *blake3::hash(&index).as_bytes(),
        };
        self.write(&index)?;
        self.write(&footer.encode(id))?;
        self.out.flush().on("write", self.path)?;
        Ok(Packed { object_bytes: self.offset, raw_bytes: self.raw_bytes })
    }
}

/// Reads pages of a file; what lies past the file's end on disk, or past its logical size, reads as zeroes.
pub(crate) fn read_pages(file: &File, start: u32, size: u64, pages: &mut [u8]) -> io::Result<()> {
    let offset = u64::from(start) * BLOCK_BYTES;
    let wanted = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(pages.len());
    let mut filled = 0;
    while filled < wanted {
        match file.read_at(&mut pages[filled..wanted], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    pages[filled..].fill(0);
    Ok(())
}

/// Whether a page is all zeroes.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page == ZERO_PAGE
}

/// The files of a layer's `wal/`, by name. A layer without WAL may have no such directory.
pub(crate) fn wal_files_in(wal: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(wal) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).on("list", wal),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.on("list", wal)?;
        if !entry.file_type().on("read", &entry.path())?.is_file() {
            continue;
        }
        match entry.file_name().into_string() {
            Ok(name) if super::format::is_wal_file_name(&name) => files.push((name, entry.path())),
            _ => return Err(Error::Invalid(format!("{:?} is not a file of WAL", entry.path()))),
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn too_large(path: &Path) -> Error {
    Error::Invalid(format!("file {path:?} has more pages than a layer can number"))
}

/// Frames are independent, so the result does not depend on how many threads there are.
fn compress_all(frames: &[RawFrame]) -> Vec<Vec<u8>> {
    let threads = thread::available_parallelism().map_or(1, |cores| cores.get()).min(THREADS_MAX);
    let share = frames.len().div_ceil(threads).max(1);
    let compress_share = |share: &[RawFrame]| {
        let mut compressor = compressor();
        share.iter().map(|frame| compress(&mut compressor, &frame.bytes)).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let workers: Vec<_> = frames.chunks(share).map(|share| scope.spawn(move || compress_share(share))).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, Vec<Vec<u8>>>| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().flat_map(join).collect()
    })
}

fn compressor() -> zstd::bulk::Compressor<'static> {
    zstd::bulk::Compressor::new(ZSTD_LEVEL).expect("the level is valid")
}

fn compress(compressor: &mut zstd::bulk::Compressor<'_>, bytes: &[u8]) -> Vec<u8> {
    compressor.compress(bytes).expect("zstd compresses any bytes into a buffer it has sized itself")
}
