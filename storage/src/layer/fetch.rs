//! From a layer's object in the bucket to its directory on the node, every byte checked before it is used.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use ebb_types::LayerId;

use super::format::{Content, FOOTER_BYTES, Footer, Frame, HEADER_BYTES, Index, Piece, check_header};
use super::pack::{PAGE, Packed};
use super::{BLOCK_BYTES, Ino, InodeKind, Manifest, Run};
use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use crate::object_store::Bucket;

/// LIMIT: bytes of the object in one read: enough to keep a distant bucket busy, and two of them are in memory.
const CHUNK_BYTES: u64 = 8 << 20;

/// The key of a layer's object.
pub(crate) fn object_key(id: LayerId) -> String {
    format!("layers/{id}")
}

/// What the layer's object came to, if the bucket has it. Reads its footer only.
pub(crate) async fn packed_in(bucket: &Bucket, id: LayerId) -> Result<Option<Packed>> {
    let Some(meta) = bucket.head(&object_key(id)).await? else { return Ok(None) };
    let footer = Source { bucket, id, object_bytes: meta.size }.footer().await?;
    Ok(Some(Packed { object_bytes: meta.size, raw_bytes: footer.raw_bytes }))
}

/// Fetches a layer into the existing, empty directory `into`, where it is complete and synced when this returns.
///
/// # Errors
/// `NoSuchLayer` when the bucket does not have it; `Corrupt` when any byte of it is not what was packed.
pub(crate) async fn fetch(bucket: &Bucket, id: LayerId, into: &Path) -> Result<()> {
    let Some(meta) = bucket.head(&object_key(id)).await? else { return Err(Error::NoSuchLayer(id)) };
    let source = Source { bucket, id, object_bytes: meta.size };
    source.header().await?;
    let footer = source.footer().await?;
    let index = source.index(&footer).await?;
    let manifest_bytes = source.manifest(&index).await?;
    let manifest = Manifest::decode(&format!("the manifest of {}", source.what()), &manifest_bytes)?;
    if manifest.id != id {
        return Err(source.corrupt(format!("its manifest is that of layer {}", manifest.id)));
    }
    check_pieces(&manifest, &index).map_err(|why| source.corrupt(why))?;

    let chunks = chunks(&index);
    let into = into.to_owned();
    let what = source.what();
    let mut unpacker = blocking::run(move || Unpacker::create(what, into, &manifest, index.wal_files.iter())).await?;
    let mut arrived = source.chunk(chunks.first()).await?;
    for at in 0..chunks.len() {
        let frames = chunks[at].frames.clone();
        let unpack = blocking::run(move || unpacker.frames(&frames, &arrived).map(|()| unpacker));
        let (unpacked, following) = tokio::join!(unpack, source.chunk(chunks.get(at + 1)));
        (unpacker, arrived) = (unpacked?, following?);
    }
    blocking::run(move || unpacker.finish(&manifest_bytes)).await
}

/// A layer's object.
pub(super) struct Source<'a> {
    pub bucket: &'a Bucket,
    pub id: LayerId,
    pub object_bytes: u64,
}

/// Neighbouring frames that are read together.
pub(super) struct Chunk {
    offset: u64,
    bytes: u64,
    pub frames: Vec<Frame>,
}

impl Source<'_> {
    pub(super) fn what(&self) -> String {
        format!("object {:?}", object_key(self.id))
    }

    pub(super) fn corrupt(&self, why: String) -> Error {
        Error::Corrupt { what: self.what(), why }
    }

    pub(super) async fn read(&self, offset: u64, bytes: u64) -> Result<Bytes> {
        self.bucket.get_range(&object_key(self.id), offset..offset + bytes).await
    }

    pub(super) async fn header(&self) -> Result<()> {
        self.check_length()?;
        check_header(self.id, &self.read(0, HEADER_BYTES).await?).map_err(|why| self.corrupt(why))
    }

    pub(super) async fn footer(&self) -> Result<Footer> {
        self.check_length()?;
        let bytes = self.read(self.object_bytes - FOOTER_BYTES, FOOTER_BYTES).await?;
        Footer::decode(self.id, self.object_bytes, &bytes).map_err(|why| self.corrupt(why))
    }

    pub(super) fn check_length(&self) -> Result<()> {
        if self.object_bytes < HEADER_BYTES + FOOTER_BYTES {
            return Err(self.corrupt(format!("it is cut short at {} bytes", self.object_bytes)));
        }
        Ok(())
    }

    pub(super) async fn index(&self, footer: &Footer) -> Result<Index> {
        let bytes = self.read(footer.index_offset, footer.index_bytes).await?;
        Index::decode(footer, &bytes).map_err(|why| self.corrupt(why))
    }

    pub(super) async fn manifest(&self, index: &Index) -> Result<Bytes> {
        let mut offset = HEADER_BYTES;
        for frame in &index.frames {
            if frame.content == Content::Manifest {
                let bytes = self.read(offset, frame.object_bytes).await?;
                check_frame(frame, &bytes).map_err(|why| self.corrupt(why))?;
                return Ok(bytes);
            }
            offset += frame.object_bytes;
        }
        Err(self.corrupt("it has no manifest".to_owned()))
    }

    pub(super) async fn chunk(&self, chunk: Option<&Chunk>) -> Result<Bytes> {
        match chunk {
            Some(chunk) => self.read(chunk.offset, chunk.bytes).await,
            None => Ok(Bytes::new()),
        }
    }
}

/// All frames but the manifest's, in reads of about [`CHUNK_BYTES`].
pub(super) fn chunks(index: &Index) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut offset = HEADER_BYTES;
    for frame in &index.frames {
        if frame.content != Content::Manifest {
            match chunks.last_mut() {
                Some(last) if last.offset + last.bytes == offset && last.bytes < CHUNK_BYTES => {
                    last.bytes += frame.object_bytes;
                    last.frames.push(frame.clone());
                }
                _ => chunks.push(Chunk { offset, bytes: frame.object_bytes, frames: vec![frame.clone()] }),
            }
        }
        offset += frame.object_bytes;
    }
    chunks
}

/// A page that the manifest does not place in this layer has no business in it.
pub(super) fn check_pieces(manifest: &Manifest, index: &Index) -> Result<(), String> {
    let own_slot = manifest.own_slot();
    let runs: HashMap<Ino, &[Run]> = (manifest.inodes.iter())
        .filter_map(|inode| match &inode.kind {
            InodeKind::File { runs, .. } => Some((inode.ino, runs.as_slice())),
            _ => None,
        })
        .collect();
    for frame in &index.frames {
        let Content::Pages(pieces) = &frame.content else { continue };
        for piece in pieces {
            if !runs.get(&piece.file).is_some_and(|runs| holds(runs, piece, own_slot)) {
                return Err(format!("page {} of inode {} is not in its manifest", piece.start, piece.file));
            }
        }
    }
    Ok(())
}

/// Whether runs of one slot cover the piece without a gap.
fn holds(runs: &[Run], piece: &Piece, slot: u32) -> bool {
    let end = piece.start + piece.pages;
    let first = runs.partition_point(|run| run.start + run.len <= piece.start);
    let mut covered = piece.start;
    for run in &runs[first..] {
        if run.slot != slot || run.start > covered {
            return false;
        }
        covered = run.start + run.len;
        if covered >= end {
            return true;
        }
    }
    false
}

pub(super) fn check_frame(frame: &Frame, bytes: &[u8]) -> Result<(), String> {
    if blake3::hash(bytes) == frame.checksum {
        Ok(())
    } else {
        Err("the checksum of a frame does not match".to_owned())
    }
}

/// Writes frames into the files of a layer. Every method blocks.
pub(super) struct Unpacker {
    /// What to call the object in errors.
    what: String,
    into: PathBuf,
    wal_paths: Vec<PathBuf>,
    zstd: zstd::bulk::Decompressor<'static>,
    /// The file written last: neighbouring pieces mostly go to the same.
    open: Option<OpenFile>,
}

struct OpenFile {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Unpacker {
    /// Makes all files, at their full length and without contents: pages that no frame holds are zeroes.
    pub(super) fn create<'a>(
        what: String,
        into: PathBuf,
        manifest: &Manifest,
        wal_files: impl Iterator<Item = &'a super::format::WalFile>,
    ) -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new().on("decompress into", &into)?;
        for name in ["data", "wal"] {
            let dir = into.join(name);
            fs::create_dir(&dir).on("create", &dir)?;
        }
        for inode in &manifest.inodes {
            let InodeKind::File { size, runs } = &inode.kind else { continue };
            if let Some(last) = runs.iter().rfind(|run| run.slot == manifest.own_slot()) {
                let end = u64::from(last.start + last.len) * BLOCK_BYTES;
                make_file(&data_path(&into, inode.ino), end.min(*size))?;
            }
        }
        let mut wal_paths = Vec::new();
        for file in wal_files {
            let path = into.join("wal").join(&file.name);
            make_file(&path, file.size)?;
            wal_paths.push(path);
        }
        Ok(Self { what, into, wal_paths, zstd, open: None })
    }

    /// Goes on in a directory where [`Unpacker::create`] has made the files.
    pub(super) fn over<'a>(
        what: String,
        into: PathBuf,
        wal_files: impl Iterator<Item = &'a super::format::WalFile>,
    ) -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new().on("decompress into", &into)?;
        let wal_paths = wal_files.map(|file| into.join("wal").join(&file.name)).collect();
        Ok(Self { what, into, wal_paths, zstd, open: None })
    }

    fn frames(&mut self, frames: &[Frame], mut bytes: &[u8]) -> Result<()> {
        for frame in frames {
            let split = bytes.split_at_checked(frame.object_bytes as usize);
            let (mine, rest) = split.ok_or_else(|| self.corrupt("a read of it came back short".to_owned()))?;
            self.frame(frame, mine)?;
            bytes = rest;
        }
        Ok(())
    }

    /// Checks a frame, and writes what is in it.
    pub(super) fn frame(&mut self, frame: &Frame, packed: &[u8]) -> Result<()> {
        check_frame(frame, packed).map_err(|why| self.corrupt(why))?;
        let Some(raw_bytes) = frame.content.raw_bytes() else { return Ok(()) };
        let raw = self.zstd.decompress(packed, raw_bytes);
        let raw = raw.map_err(|error| self.corrupt(format!("a frame does not decompress: {error}")))?;
        if raw.len() != raw_bytes {
            return Err(self.corrupt("a frame has another length than the index tells".to_owned()));
        }
        match &frame.content {
            Content::Pages(pieces) => self.pieces(pieces, &raw, |unpacker, ino| Some(data_path(&unpacker.into, ino))),
            Content::Wal(pieces) => {
                self.pieces(pieces, &raw, |unpacker, number| unpacker.wal_paths.get(number as usize).cloned())
            }
            Content::Roles { .. } => {
                let path = self.into.join("roles.json");
                fs::write(&path, &raw).on("write", &path)
            }
            Content::Manifest => Ok(()),
        }
    }

    fn pieces(
        &mut self,
        pieces: &[Piece],
        mut raw: &[u8],
        path_of: impl Fn(&Self, u64) -> Option<PathBuf>,
    ) -> Result<()> {
        for piece in pieces {
            let (mine, rest) = raw.split_at(piece.pages as usize * PAGE);
            raw = rest;
            let path = path_of(self, piece.file)
                .ok_or_else(|| self.corrupt("a frame names a file that is not there".to_owned()))?;
            self.piece(path, u64::from(piece.start) * BLOCK_BYTES, mine)?;
        }
        Ok(())
    }

    fn piece(&mut self, path: PathBuf, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.open.as_ref().is_none_or(|open| open.path != path) {
            let file = File::options().write(true).open(&path).on("open", &path)?;
            let size = file.metadata().on("read", &path)?.len();
            self.open = Some(OpenFile { path, file, size });
        }
        let open = self.open.as_ref().expect("it was just opened if it was not open");
        // The last page of a file may be partial; the frame has it padded.
        let inside = usize::try_from(open.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        open.file.write_all_at(&bytes[..inside], offset).on("write", &open.path)
    }

    /// The manifest comes last, though a layer counts only once its directory has its name.
    fn finish(self, manifest_bytes: &[u8]) -> Result<()> {
        let path = self.into.join("manifest");
        fs::write(&path, manifest_bytes).on("write", &path)?;
        sync_file_system(&self.into)
    }

    fn corrupt(&self, why: String) -> Error {
        Error::Corrupt { what: self.what.clone(), why }
    }
}

pub(super) fn data_path(layer_dir: &Path, ino: Ino) -> PathBuf {
    layer_dir.join("data").join(ino.to_string())
}

fn make_file(path: &Path, size: u64) -> Result<()> {
    File::create_new(path).and_then(|file| file.set_len(size)).on("create", path)
}

/// Syncs everything on the file system of `dir`: one call where a layer may have a thousand new files.
pub(crate) fn sync_file_system(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| rustix::fs::syncfs(&dir).map_err(io::Error::from));
    synced.on("sync", dir)
}
