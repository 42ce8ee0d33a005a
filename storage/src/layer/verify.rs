//! Reading a layer's object without unpacking it: its manifest alone, every byte of it, or beside its local copy.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use ebb_types::LayerId;

use super::fetch::{Source, check_frame, check_pieces, chunks, data_path, object_key};
use super::format::{Content, Frame, Index, Piece};
use super::pack::{PAGE, is_zero, read_pages, wal_files_in};
use super::partial::{Partial, is_partial, is_stale};
use super::{BLOCK_BYTES, Ino, InodeKind, Manifest, Run};
use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use crate::object_store::Bucket;
use crate::pg_files;

/// The manifest in a layer's object. Reads that, the index and the footer, and checks them; pages are not touched.
///
/// # Errors
/// `NoSuchLayer` when the bucket does not have it; `Corrupt` when what was read is not what was packed.
pub(crate) async fn manifest_in(bucket: &Bucket, id: LayerId) -> Result<Manifest> {
    Ok(open(bucket, id).await?.manifest)
}

/// Reads every byte of a layer's object and checks it: checksums, lengths, index against manifest, decompression.
///
/// # Errors
/// `NoSuchLayer` when the bucket does not have it; `Corrupt` when any byte of it is not what was packed.
pub(crate) async fn verify(bucket: &Bucket, id: LayerId) -> Result<Manifest> {
    let opened = open(bucket, id).await?;
    opened.frames(&mut |_, _| Ok(())).await?;
    Ok(opened.manifest)
}

/// Compares the local copy of a layer, in `dir`, with its object, which is verified on the way. Answers what differs. Of a
/// partial copy what is here is compared; of one from an earlier run of this machine nothing is, as nothing of it is used.
///
/// # Errors
/// As [`verify`], about the object; `Local` when a local file cannot be read.
pub(crate) async fn compare(bucket: &Bucket, id: LayerId, dir: &Path) -> Result<Vec<String>> {
    let opened = open(bucket, id).await?;
    let mut local = Local::open(dir, &opened)?;
    let mut here = None;
    if is_partial(dir) {
        match is_stale(id, dir)? {
            true => return Ok(Vec::new()),
            false => here = Partial::open(id, dir)?,
        }
    }
    let frames = (0..).zip(&opened.index.frames).filter(|(_, frame)| frame.content != Content::Manifest);
    let mut is_here = frames.map(|(number, _)| here.as_ref().is_none_or(|partial| partial.has(number)));
    opened.frames(&mut |content, raw| local.frame(content, raw, is_here.next() == Some(true))).await?;
    blocking::run(move || local.rest()).await
}

/// An object whose header, footer, index and manifest were read and checked.
struct Opened<'a> {
    source: Source<'a>,
    index: Index,
    manifest_bytes: Bytes,
    manifest: Manifest,
}

async fn open(bucket: &Bucket, id: LayerId) -> Result<Opened<'_>> {
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
    Ok(Opened { source, index, manifest_bytes, manifest })
}

impl Opened<'_> {
    /// Reads, checks and decompresses all frames but the manifest's, in order.
    async fn frames(&self, take: &mut (dyn FnMut(&Content, &[u8]) -> Result<()> + Send)) -> Result<()> {
        for chunk in chunks(&self.index) {
            let bytes = self.source.chunk(Some(&chunk)).await?;
            let frames = chunk.frames;
            let unpacked = blocking::run(move || unpack(&frames, &bytes).map(|raw| (frames, raw))).await;
            let (frames, raw) = unpacked.map_err(|why| self.source.corrupt(why))?;
            for (frame, raw) in frames.iter().zip(&raw) {
                take(&frame.content, raw)?;
            }
        }
        Ok(())
    }
}

/// Checks and decompresses neighbouring frames.
fn unpack(frames: &[Frame], mut bytes: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut zstd = zstd::bulk::Decompressor::new().map_err(|error| error.to_string())?;
    let mut unpacked = Vec::with_capacity(frames.len());
    for frame in frames {
        let split = usize::try_from(frame.object_bytes).ok().and_then(|length| bytes.split_at_checked(length));
        let (mine, rest) = split.ok_or("a read of it came back short")?;
        check_frame(frame, mine)?;
        let raw_bytes = frame.content.raw_bytes().ok_or("a frame has no length")?;
        let raw = zstd.decompress(mine, raw_bytes).map_err(|error| format!("a frame does not decompress: {error}"))?;
        if raw.len() != raw_bytes {
            return Err("a frame has another length than the index tells".to_owned());
        }
        unpacked.push(raw);
        bytes = rest;
    }
    Ok(unpacked)
}

/// The local copy of a layer, while it is compared.
struct Local {
    dir: PathBuf,
    manifest_bytes: Bytes,
    /// By inode with pages of this layer: logical size, its own runs, and the pages that a frame has told about.
    files: HashMap<Ino, OwnFile>,
    wal: Vec<(String, u64)>,
    roles: bool,
    /// The file compared last: neighbouring pieces mostly go to the same.
    open: Option<(PathBuf, Option<File>)>,
    faults: Vec<String>,
}

struct OwnFile {
    size: u64,
    runs: Vec<Run>,
    /// One bit a page of the file.
    told: Vec<u64>,
}

impl Local {
    fn open(dir: &Path, of: &Opened<'_>) -> Result<Self> {
        let own_slot = of.manifest.own_slot();
        let dispensable = pg_files::dispensable(&of.manifest);
        let mut files = HashMap::new();
        // What Postgres does not want back may be in the object or not, and be zeroes here or not.
        for inode in of.manifest.inodes.iter().filter(|inode| !dispensable.contains(&inode.ino)) {
            let InodeKind::File { size, runs } = &inode.kind else { continue };
            let runs: Vec<Run> = runs.iter().filter(|run| run.slot == own_slot).copied().collect();
            if let Some(last) = runs.last() {
                let told = vec![0; (last.start + last.len).div_ceil(64) as usize];
                files.insert(inode.ino, OwnFile { size: *size, runs, told });
            }
        }
        let wal = of.index.wal_files.iter().map(|file| (file.name.clone(), file.size)).collect();
        let manifest_bytes = of.manifest_bytes.clone();
        Ok(Self { dir: dir.to_owned(), manifest_bytes, files, wal, roles: false, open: None, faults: Vec::new() })
    }

    /// Compares what a frame holds, if it is here. Blocks for as long as it takes to read as much locally.
    fn frame(&mut self, content: &Content, raw: &[u8], is_here: bool) -> Result<()> {
        match content {
            Content::Pages(pieces) if !is_here => {
                for piece in pieces {
                    self.tell(piece);
                }
                Ok(())
            }
            Content::Roles { .. } if !is_here => {
                self.roles = true;
                Ok(())
            }
            _ if !is_here => Ok(()),
            Content::Pages(pieces) => self.pieces(pieces, raw, true),
            Content::Wal(pieces) => self.pieces(pieces, raw, false),
            Content::Roles { .. } => {
                self.roles = true;
                if read_if_there(&self.dir.join("roles.json"))?.as_deref() != Some(raw) {
                    self.fault("roles.json differs".to_owned());
                }
                Ok(())
            }
            Content::Manifest => Ok(()),
        }
    }

    fn pieces(&mut self, pieces: &[Piece], mut raw: &[u8], data: bool) -> Result<()> {
        for piece in pieces {
            let (mine, rest) = raw.split_at(piece.pages as usize * PAGE);
            raw = rest;
            let (path, size) = match data {
                true => {
                    let Some(size) = self.tell(piece) else { continue };
                    (data_path(&self.dir, piece.file), size)
                }
                false => match usize::try_from(piece.file).ok().and_then(|number| self.wal.get(number)) {
                    Some((name, size)) => (self.dir.join("wal").join(name), *size),
                    None => continue,
                },
            };
            self.compare(&path, size, piece.start, mine)?;
        }
        Ok(())
    }

    /// Notes that a frame holds these pages; answers the size of their file, if it is one to compare.
    fn tell(&mut self, piece: &Piece) -> Option<u64> {
        let file = self.files.get_mut(&piece.file)?;
        (piece.start..piece.start + piece.pages).for_each(|page| file.told[page as usize / 64] |= 1 << (page % 64));
        Some(file.size)
    }

    fn compare(&mut self, path: &Path, size: u64, start: u32, wanted: &[u8]) -> Result<()> {
        let mut found = vec![0; wanted.len()];
        if self.read(path, size, start, &mut found)? {
            let differs = found.chunks(PAGE).zip(wanted.chunks(PAGE)).position(|(found, wanted)| found != wanted);
            if let Some(page) = differs {
                self.fault(format!("{} differs at page {}", self.name(path), start as usize + page));
            }
        }
        Ok(())
    }

    /// Reads local pages; `false`, with a fault, if the file is not there.
    fn read(&mut self, path: &Path, size: u64, start: u32, pages: &mut [u8]) -> Result<bool> {
        if self.open.as_ref().is_none_or(|(open, _)| open != path) {
            let file = match File::open(path) {
                Ok(file) => Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.fault(format!("{} is not there", self.name(path)));
                    None
                }
                Err(error) => return Err(error).on("open", path),
            };
            self.open = Some((path.to_owned(), file));
        }
        match &self.open {
            Some((_, Some(file))) => read_pages(file, start, size, pages).on("read", path).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Compares what no frame tells of: pages that must be zeroes, the list of WAL files, the manifest.
    fn rest(mut self) -> Result<Vec<String>> {
        for (ino, file) in std::mem::take(&mut self.files) {
            let path = data_path(&self.dir, ino);
            let mut page = vec![0; PAGE];
            for number in file.runs.iter().flat_map(|run| run.start..run.start + run.len) {
                let told = file.told[number as usize / 64] >> (number % 64) & 1 == 1;
                if told || u64::from(number) * BLOCK_BYTES >= file.size {
                    continue;
                }
                if self.read(&path, file.size, number, &mut page)? && !is_zero(&page) {
                    self.fault(format!("{} differs at page {number}", self.name(&path)));
                    break;
                }
            }
        }
        let mut wanted = self.wal.clone();
        wanted.sort_unstable();
        let mut found = Vec::new();
        for (name, path) in wal_files_in(&self.dir.join("wal"))? {
            found.push((name, fs::metadata(&path).on("read", &path)?.len()));
        }
        if found != wanted {
            self.fault("its files of WAL are others, or of other lengths".to_owned());
        }
        if !self.roles && self.dir.join("roles.json").exists() {
            self.fault("roles.json differs".to_owned());
        }
        if read_if_there(&self.dir.join("manifest"))?.as_deref() != Some(&self.manifest_bytes) {
            self.fault("its manifest differs".to_owned());
        }
        Ok(self.faults)
    }

    fn name(&self, path: &Path) -> String {
        path.strip_prefix(&self.dir).unwrap_or(path).display().to_string()
    }

    /// LIMIT: the first few differences show what happened; a thousand more would not.
    fn fault(&mut self, what: String) {
        if self.faults.len() < 8 {
            self.faults.push(what);
        }
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).on("read", path),
    }
}
