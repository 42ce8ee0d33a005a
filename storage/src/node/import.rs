//! From a plain data directory to a layer without a chain.
//!
//! Every file becomes a sparse `data/<ino>` in which all-zero pages are holes. `pg_wal` becomes the layer's `wal/`,
//! with a symbolic link in its place. What Postgres makes anew at every start stays behind.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ebb_types::{LayerId, Lsn};

use crate::error::{Error, LocalContext, Result};
use crate::layer::{BLOCK_BYTES, ImageInfo, Ino, Inode, InodeKind, Manifest, ROOT_INO, Run, is_zero};
use crate::pg_files::{self, PG_CONTROL, WalSegment};

const PAGE: usize = BLOCK_BYTES as usize;

/// LIMIT: pages read at once; large enough that system calls cost nothing against copying.
const READ_PAGES: usize = 128;

/// LIMIT: page numbers are 32 bits; the last few are left out, so that a read never counts past them. 32 TiB a file.
const PAGE_NUMBER_MAX: u32 = u32::MAX - READ_PAGES as u32;

/// Files in the root that belong to a running server.
const SERVER_FILES: [&[u8]; 2] = [b"postmaster.pid", b"postmaster.opts"];

/// Where `pg_wal` of a volume leads: its branch's own directory, outside the volume.
const PG_WAL_TARGET: &[u8] = b"../wal";

/// A `pg_checkpoint` record has about a hundred bytes and is never shorter than its header
/// (PostgreSQL 15, `src/include/access/xlogrecord.h`).
const RECORD_BYTES: std::ops::RangeInclusive<u32> = 24..=4096;

/// The longer of the two headers a page of WAL can begin with (`XLogLongPageHeaderData`).
const WAL_PAGE_HEADER_BYTES: u64 = 40;

/// Fills the empty directory `into` with the layer `id`; syncs nothing.
pub(super) fn import(id: LayerId, data_dir: &Path, into: &Path) -> Result<()> {
    let image = check_source(data_dir)?;
    let control = read_control(data_dir)?;
    for name in ["data", "wal"] {
        let dir = into.join(name);
        fs::create_dir(&dir).on("create", &dir)?;
    }
    import_wal(&data_dir.join("pg_wal"), &image, &into.join("wal"))?;
    let mut importer = Importer { data: into.join("data"), inodes: Vec::new(), next_ino: ROOT_INO };
    importer.directory(data_dir, ROOT_INO, Vec::new())?;
    if data_dir.join("postmaster.pid").exists() || read_control(data_dir)? != control {
        return Err(Error::Invalid(format!("Postgres was started on {data_dir:?} while it was imported")));
    }
    let Importer { mut inodes, next_ino, .. } = importer;
    inodes.sort_unstable_by_key(|inode| inode.ino);
    let manifest = Manifest { id, chain: vec![id], next_ino, inodes, image };
    let path = into.join("manifest");
    fs::write(&path, manifest.encode()).on("write", &path)
}

/// Refuses, with the reason, what cannot be imported.
fn check_source(data_dir: &Path) -> Result<ImageInfo> {
    let refuse = |why: &str| Err(Error::Invalid(format!("directory {data_dir:?} {why}")));
    if !data_dir.join("PG_VERSION").is_file() {
        return refuse("is not a Postgres data directory: it has no PG_VERSION");
    }
    if data_dir.join("postmaster.pid").exists() {
        return refuse("is in use: it has a postmaster.pid; stop Postgres first");
    }
    let image = pg_files::read_image_info(data_dir)?;
    if !image.clean {
        return refuse("was not shut down cleanly; start Postgres on it once more and stop it");
    }
    let tablespaces = data_dir.join("pg_tblspc");
    if tablespaces.is_dir() && fs::read_dir(&tablespaces).on("list", &tablespaces)?.next().is_some() {
        return refuse("has tablespaces, which are not supported; move their tables to pg_default first");
    }
    Ok(image)
}

fn read_control(data_dir: &Path) -> Result<Vec<u8>> {
    let path = data_dir.join(PG_CONTROL);
    fs::read(&path).on("read", &path)
}

struct Importer {
    data: PathBuf,
    inodes: Vec<Inode>,
    next_ino: Ino,
}

impl Importer {
    /// Takes on a directory and what is in it. Names are taken in order, so that the same directory always gives the
    /// same numbers.
    fn directory(&mut self, path: &Path, parent: Ino, name: Vec<u8>) -> Result<()> {
        let meta = fs::metadata(path).on("read", path)?;
        let is_root = self.inodes.is_empty();
        let ino = self.add(parent, name.clone(), &meta, InodeKind::Directory);
        if is_emptied_at_start(&name) {
            return Ok(());
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(path).on("list", path)? {
            names.push(entry.on("list", path)?.file_name());
        }
        names.sort_unstable();
        for name in names {
            let bytes = name.as_bytes();
            if is_root && bytes == b"pg_wal" {
                let kind = InodeKind::Symlink { target: PG_WAL_TARGET.to_vec() };
                self.add(ino, bytes.to_vec(), &meta, kind);
            } else if !(is_temporary(bytes) || is_root && SERVER_FILES.contains(&bytes)) {
                self.entry(&path.join(&name), ino, bytes.to_vec())?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, parent: Ino, name: Vec<u8>) -> Result<()> {
        let meta = fs::symlink_metadata(path).on("read", path)?;
        if meta.is_dir() {
            self.directory(path, parent, name)
        } else if meta.is_file() {
            let data = self.data.join(self.next_ino.to_string());
            let (size, runs) = copy_pages(path, &data)?;
            self.add(parent, name, &meta, InodeKind::File { size, runs });
            Ok(())
        } else if meta.is_symlink() {
            let target = fs::read_link(path).on("read", path)?.into_os_string().into_vec();
            self.add(parent, name, &meta, InodeKind::Symlink { target });
            Ok(())
        } else {
            Err(Error::Invalid(format!("{path:?} is neither a file nor a directory nor a symbolic link")))
        }
    }

    fn add(&mut self, parent: Ino, name: Vec<u8>, meta: &Metadata, kind: InodeKind) -> Ino {
        let ino = self.next_ino;
        self.next_ino += 1;
        let mode = meta.permissions().mode() & 0o7777;
        let mtime_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
        self.inodes.push(Inode { ino, parent, name, mode, mtime_ns, kind });
        ino
    }
}

/// Statistics of the running server (PostgreSQL 14 only; the directory itself must be there).
fn is_emptied_at_start(name: &[u8]) -> bool {
    name == b"pg_stat_tmp"
}

/// Files of sorts and temporary tables, wherever they are.
fn is_temporary(name: &[u8]) -> bool {
    name.starts_with(b"pgsql_tmp")
}

/// Copies the pages that are not all zeroes; a file without any gets no copy at all.
fn copy_pages(from: &Path, to: &Path) -> Result<(u64, Vec<Run>)> {
    let mut source = File::open(from).on("open", from)?;
    let mut copy = None;
    let mut buffer = vec![0; READ_PAGES * PAGE];
    let mut runs: Vec<Run> = Vec::new();
    let mut size = 0_u64;
    loop {
        let filled = read_full(&mut source, &mut buffer).on("read", from)?;
        let first = u32::try_from(size / BLOCK_BYTES).ok().filter(|&first| first < PAGE_NUMBER_MAX);
        let first = first.ok_or_else(|| Error::Invalid(format!("file {from:?} has too many pages to number")))?;
        let padded = filled.next_multiple_of(PAGE);
        buffer[filled..padded].fill(0);
        for (number, page) in (first..).zip(buffer[..padded].chunks_exact(PAGE)) {
            if is_zero(page) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.start + run.len == number => run.len += 1,
                _ => runs.push(Run { start: number, len: 1, slot: 0 }),
            }
            let copy = match &mut copy {
                Some(copy) => copy,
                none => none.insert(File::create_new(to).on("create", to)?),
            };
            let within = PAGE.min(filled - (number - first) as usize * PAGE);
            copy.write_all_at(&page[..within], u64::from(number) * BLOCK_BYTES).on("write", to)?;
        }
        size += filled as u64;
        if filled < buffer.len() {
            return Ok((size, runs));
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Copies what a start needs: from the segment that holds the shutdown `pg_checkpoint` to the end of that record.
/// What Postgres keeps beyond it are segments made or recycled for later.
fn import_wal(pg_wal: &Path, image: &ImageInfo, to: &Path) -> Result<()> {
    let mut segment = WalSegment::holding(image.redo, image.pg_timeline, image.wal_segment_bytes);
    let end = end_of_record(pg_wal, image, segment)?;
    while segment.start() < end {
        let name = segment.file_name();
        let useful = (end.0 - segment.start().0).min(u64::from(image.wal_segment_bytes));
        copy_wal(&pg_wal.join(&name), &to.join(&name), useful, u64::from(image.wal_segment_bytes))?;
        segment = segment.next();
    }
    for entry in fs::read_dir(pg_wal).on("list", pg_wal)? {
        let path = entry.on("list", pg_wal)?.path();
        if let Some(name) = path.file_name().filter(|name| name.as_bytes().ends_with(b".history")) {
            let copy = to.join(name);
            fs::copy(&path, &copy).on("copy", &path)?;
        }
    }
    Ok(())
}

/// The end of the page in which the record at the redo point ends, or of one that lies a little after.
fn end_of_record(pg_wal: &Path, image: &ImageInfo, segment: WalSegment) -> Result<Lsn> {
    let path = pg_wal.join(segment.file_name());
    let file = File::open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::Invalid(format!("{path:?}, which a start needs, is not there")),
        _ => Error::Local { act: "open", path: path.clone(), source },
    })?;
    let mut length = [0; 4];
    file.read_exact_at(&mut length, image.redo.0 - segment.start().0).on("read", &path)?;
    let length = u32::from_le_bytes(length);
    if !RECORD_BYTES.contains(&length) {
        let why = format!("there is no pg_checkpoint record at {}", image.redo);
        return Err(Error::Corrupt { what: format!("{path:?}"), why });
    }
    let end = image.redo.0 + u64::from(length) + 2 * WAL_PAGE_HEADER_BYTES;
    Ok(Lsn(end.next_multiple_of(BLOCK_BYTES)))
}

/// Copies the first `useful` bytes, as holes where they are zeroes, and makes the rest one hole.
fn copy_wal(from: &Path, to: &Path, useful: u64, size: u64) -> Result<()> {
    let source = File::open(from).on("open", from)?;
    let copy = File::create_new(to).on("create", to)?;
    copy.set_len(size).on("write", to)?;
    let mut page = [0; PAGE];
    for at in (0..useful).step_by(PAGE) {
        source.read_exact_at(&mut page, at).on("read", from)?;
        if !is_zero(&page) {
            copy.write_all_at(&page, at).on("write", to)?;
        }
    }
    Ok(())
}
