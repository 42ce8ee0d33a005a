//! The bytes of a [`Manifest`]: see `docs/formats/layer.md`, "Manifest".

use std::collections::{HashMap, HashSet};
use std::io::Read;

use ebb_types::Lsn;

use super::codec::{Input, put, put_bytes};
use super::{BLOCK_BYTES, ImageInfo, Ino, Inode, InodeKind, Manifest, ROOT_INO, Run};
use crate::error::{Error, Result};
use crate::pg_files;

const MAGIC: &[u8; 8] = b"EBBMANIF";
const VERSION: u32 = 1;
/// Magic, version, length of the body once decompressed.
const HEADER_BYTES: usize = 8 + 4 + 8;
const CHECKSUM_BYTES: usize = 32;

/// LIMIT: 1 GiB of body is some 250 million runs, the page map of two terabytes in which no two neighbouring pages
/// share a layer. A body that claims more is not one of ours.
const BODY_BYTES_MAX: u64 = 1 << 30;

/// LIMIT: manifests are written at every seal, so speed counts; level 1 shrinks a page map almost as well as 3 does.
const ZSTD_LEVEL: i32 = 1;

/// LIMIT: Linux's `NAME_MAX`.
const NAME_BYTES_MAX: usize = 255;

const KIND_DIRECTORY: u8 = 0;
const KIND_FILE: u8 = 1;
const KIND_SYMLINK: u8 = 2;

/// The file of a size has this many pages, the last perhaps partial.
pub(crate) fn pages_of(size: u64) -> u64 {
    size.div_ceil(BLOCK_BYTES)
}

impl Manifest {
    /// The `manifest` file's bytes: magic, version, zstd-compressed body, BLAKE3 checksum.
    ///
    /// The manifest must pass [`Manifest::check`]; what does not cannot be read back.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert_eq!(self.check(), Ok(()));
        let body = self.encode_body();
        let packed = zstd::bulk::compress(&body, ZSTD_LEVEL).expect("zstd compresses any bytes at a valid level");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + packed.len() + CHECKSUM_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&packed);
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        bytes
    }

    /// Reads what [`Manifest::encode`] wrote, checking its checksum and every number in it.
    ///
    /// # Errors
    /// `Corrupt`, naming `what`.
    pub fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let corrupt = |why: String| Error::Corrupt { what: what.to_owned(), why };
        let body = unpack_body(bytes).map_err(corrupt)?;
        let manifest = decode_body(&body).ok_or_else(|| corrupt("its body is malformed".to_owned()))?;
        manifest.check().map_err(corrupt)?;
        Ok(manifest)
    }

    /// Tells the first thing that is wrong with this manifest: numbers out of range, a tree that is not one,
    /// runs that overlap, name layers outside the chain, or lie past the end of their file.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        self.check_chain()?;
        self.check_tree()?;
        for inode in &self.inodes {
            if let InodeKind::File { size, runs } = &inode.kind {
                check_runs(*size, runs, self.chain.len()).map_err(|why| format!("inode {}: {why}", inode.ino))?;
            }
        }
        if !pg_files::is_wal_segment_size(self.image.wal_segment_bytes) {
            return Err(format!("{} is not the size of a WAL segment", self.image.wal_segment_bytes));
        }
        Ok(())
    }

    fn check_chain(&self) -> Result<(), String> {
        if self.chain.last() != Some(&self.id) {
            return Err("its chain does not end in the layer itself".to_owned());
        }
        let mut seen = HashSet::with_capacity(self.chain.len());
        if !self.chain.iter().all(|id| seen.insert(*id)) {
            return Err("its chain names a layer twice".to_owned());
        }
        Ok(())
    }

    fn check_tree(&self) -> Result<(), String> {
        match self.inodes.first() {
            Some(Inode { ino: ROOT_INO, parent: ROOT_INO, name, kind: InodeKind::Directory, .. })
                if name.is_empty() => {}
            _ => return Err("its first inode is not a root directory".to_owned()),
        }
        if !self.inodes.is_sorted_by(|a, b| a.ino < b.ino) {
            return Err("its inodes are not in the order of their numbers".to_owned());
        }
        if self.inodes.last().is_some_and(|last| last.ino >= self.next_ino) {
            return Err("an inode has a number that was never given out".to_owned());
        }
        let directories: HashMap<Ino, Ino> = (self.inodes.iter())
            .filter(|inode| matches!(inode.kind, InodeKind::Directory))
            .map(|inode| (inode.ino, inode.parent))
            .collect();
        let mut names = HashSet::with_capacity(self.inodes.len());
        for inode in &self.inodes[1..] {
            if !directories.contains_key(&inode.parent) {
                return Err(format!("inode {} is in no directory", inode.ino));
            }
            if !is_file_name(&inode.name) || !names.insert((inode.parent, inode.name.as_slice())) {
                return Err(format!("inode {} has a name that cannot be, or that another has", inode.ino));
            }
        }
        if self.inodes.iter().any(|inode| inode.mode & !0o7777 != 0) {
            return Err("an inode has more than permission bits in its mode".to_owned());
        }
        check_reaches_root(&directories)
    }

    fn encode_body(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(self.id.as_bytes());
        put(&mut out, self.chain.len() as u64);
        for layer in &self.chain {
            out.extend_from_slice(layer.as_bytes());
        }
        let image = &self.image;
        put(&mut out, u64::from(image.pg_major));
        out.extend_from_slice(&image.system_identifier.to_le_bytes());
        out.extend_from_slice(&image.redo.0.to_le_bytes());
        put(&mut out, u64::from(image.pg_timeline));
        put(&mut out, u64::from(image.wal_segment_bytes));
        out.push(u8::from(image.clean));
        put(&mut out, self.next_ino);
        put(&mut out, self.inodes.len() as u64);
        let mut previous = 0;
        for inode in &self.inodes {
            put(&mut out, inode.ino - previous);
            previous = inode.ino;
            encode_inode(&mut out, inode);
        }
        out
    }
}

fn encode_inode(out: &mut Vec<u8>, inode: &Inode) {
    put(out, inode.parent);
    put_bytes(out, &inode.name);
    put(out, u64::from(inode.mode));
    out.extend_from_slice(&inode.mtime_ns.to_le_bytes());
    match &inode.kind {
        InodeKind::Directory => out.push(KIND_DIRECTORY),
        InodeKind::File { size, runs } => {
            out.push(KIND_FILE);
            put(out, *size);
            put(out, runs.len() as u64);
            let mut end = 0;
            for run in runs {
                put(out, u64::from(run.start) - end);
                put(out, u64::from(run.len));
                put(out, u64::from(run.slot));
                end = u64::from(run.start) + u64::from(run.len);
            }
        }
        InodeKind::Symlink { target } => {
            out.push(KIND_SYMLINK);
            put_bytes(out, target);
        }
    }
}

/// Checks everything around the body and decompresses it, never beyond the length the header tells.
fn unpack_body(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let Some(packed_bytes) = bytes.len().checked_sub(HEADER_BYTES + CHECKSUM_BYTES) else {
        return Err(format!("it is cut short at {} bytes", bytes.len()));
    };
    if &bytes[..8] != MAGIC {
        return Err("it does not begin as a manifest does".to_owned());
    }
    let (signed, checksum) = bytes.split_at(HEADER_BYTES + packed_bytes);
    if blake3::hash(signed) != *checksum {
        return Err("its checksum does not match its contents".to_owned());
    }
    let version = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
    if version != VERSION {
        return Err(format!("its format version is {version}; this build reads {VERSION}"));
    }
    let body_bytes = u64::from_le_bytes(bytes[12..20].try_into().expect("eight bytes"));
    if body_bytes > BODY_BYTES_MAX {
        return Err(format!("it claims a body of {body_bytes} bytes"));
    }
    let mut body = Vec::new();
    zstd::Decoder::with_buffer(&signed[HEADER_BYTES..])
        .and_then(|decoder| decoder.take(body_bytes + 1).read_to_end(&mut body))
        .map_err(|error| format!("its body does not decompress: {error}"))?;
    if body.len() as u64 != body_bytes {
        return Err("its body has another length than its header tells".to_owned());
    }
    Ok(body)
}

/// `None` when the bytes end early, go on too long, or a number does not fit.
fn decode_body(body: &[u8]) -> Option<Manifest> {
    let mut input = Input(body);
    let id = input.layer_id()?;
    let chain = input.many(16, Input::layer_id)?;
    let image = ImageInfo {
        pg_major: input.u32()?,
        system_identifier: u64::from_le_bytes(input.array()?),
        redo: Lsn(u64::from_le_bytes(input.array()?)),
        pg_timeline: input.u32()?,
        wal_segment_bytes: input.u32()?,
        clean: match input.array::<1>()? {
            [0] => false,
            [1] => true,
            _ => return None,
        },
    };
    let next_ino = input.u64()?;
    let mut previous = 0_u64;
    let inodes = input.many(INODE_BYTES_MIN, |input| {
        previous = previous.checked_add(input.u64()?)?;
        decode_inode(previous, input)
    })?;
    input.0.is_empty().then_some(Manifest { id, chain, next_ino, inodes, image })
}

/// Number, parent, name length, mode, time, kind: what the smallest inode takes.
const INODE_BYTES_MIN: usize = 1 + 1 + 1 + 1 + 8 + 1;

fn decode_inode(ino: Ino, input: &mut Input<'_>) -> Option<Inode> {
    let parent = input.u64()?;
    let name = input.bytes()?.to_vec();
    let mode = input.u32()?;
    let mtime_ns = i64::from_le_bytes(input.array()?);
    let kind = match input.array::<1>()? {
        [KIND_DIRECTORY] => InodeKind::Directory,
        [KIND_FILE] => {
            let size = input.u64()?;
            let mut end = 0_u32;
            let runs = input.many(3, |input| {
                let start = end.checked_add(input.u32()?)?;
                let run = Run { start, len: input.u32()?, slot: input.u32()? };
                end = start.checked_add(run.len)?;
                Some(run)
            })?;
            InodeKind::File { size, runs }
        }
        [KIND_SYMLINK] => InodeKind::Symlink { target: input.bytes()?.to_vec() },
        _ => return None,
    };
    Some(Inode { ino, parent, name, mode, mtime_ns, kind })
}

fn check_runs(size: u64, runs: &[Run], chain_len: usize) -> Result<(), String> {
    let mut end = 0;
    for run in runs {
        if run.len == 0 || u64::from(run.start) < end {
            return Err(format!("the run at page {} is empty or overlaps the one before", run.start));
        }
        end = u64::from(run.start) + u64::from(run.len);
        if run.slot as usize >= chain_len {
            return Err(format!("the run at page {} is in no layer of the chain", run.start));
        }
    }
    if end > pages_of(size) || end > u64::from(u32::MAX) {
        return Err("its pages go on past its end".to_owned());
    }
    Ok(())
}

fn is_file_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && name.len() <= NAME_BYTES_MAX && !name.iter().any(|&b| b == b'/' || b == 0)
}

/// Walks up from every directory; each is walked through once.
fn check_reaches_root(parents: &HashMap<Ino, Ino>) -> Result<(), String> {
    let mut known: HashSet<Ino> = HashSet::from([ROOT_INO]);
    for &directory in parents.keys() {
        let mut path = Vec::new();
        let mut at = directory;
        while !known.contains(&at) {
            if path.len() > parents.len() {
                return Err("a directory is inside itself".to_owned());
            }
            path.push(at);
            at = parents[&at];
        }
        known.extend(path);
    }
    Ok(())
}
