//! From an image to a plain data directory.
//!
//! # Crash
//! `global/pg_control` is written last, after everything else is on disk: Postgres does not start on half an export.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{Error, LocalContext, Result};
use crate::layer::{
    BLOCK_BYTES, Ino, Inode, InodeKind, Manifest, ROOT_INO, Run, is_zero, pages_of, read_pages, sync_file_system,
    wal_files_in,
};
use crate::pg_files::PG_CONTROL;

const PAGE: usize = BLOCK_BYTES as usize;

/// LIMIT: pages copied at once; large enough that system calls cost nothing against copying.
const COPY_PAGES: u32 = 128;

/// Writes the image into `dest`, which must be absent or empty.
pub(super) fn export(manifest: &Manifest, layers_dir: &Path, dest: &Path) -> Result<()> {
    let existed = claim(dest)?;
    let exported = Exporter { manifest, layers_dir, dest }.run();
    if exported.is_err() {
        // The failure itself is what the caller must hear of, and a second one would most likely be the same.
        let _ = if existed { empty(dest) } else { fs::remove_dir_all(dest) };
    }
    exported
}

/// A replication slot, or of one. Whoever read from it reads from the branch; in a copy it would hold back WAL for ever. A
/// base backup leaves them out as well (PostgreSQL 15, `basebackup.c`).
fn is_of_slot(relative: &Path) -> bool {
    relative != Path::new("pg_replslot") && relative.starts_with("pg_replslot")
}

/// Makes the directory, or finds it empty. Tells whether it was there.
fn claim(dest: &Path) -> Result<bool> {
    match fs::read_dir(dest) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(Error::Invalid(format!("directory {dest:?} is not empty")));
            }
            fs::set_permissions(dest, fs::Permissions::from_mode(0o700)).on("restrict", dest)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_dir(dest)?;
            Ok(false)
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(Error::Invalid(format!("{dest:?} is not a directory")))
        }
        Err(error) => Err(error).on("list", dest),
    }
}

fn empty(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        super::remove_any(&entry?.path())?;
    }
    Ok(())
}

struct Exporter<'a> {
    manifest: &'a Manifest,
    layers_dir: &'a Path,
    dest: &'a Path,
}

impl Exporter<'_> {
    fn run(&self) -> Result<()> {
        let tree = Tree::of(self.manifest);
        let mut control = None;
        // Directories first: an inode's parent may have a higher number than its own.
        for inode in self.manifest.inodes.iter().filter(|inode| inode.kind == InodeKind::Directory) {
            let relative = tree.path(inode);
            if inode.ino != ROOT_INO && !is_of_slot(&relative) {
                make_dirs(&self.dest.join(relative))?;
            }
        }
        for inode in &self.manifest.inodes {
            let relative = tree.path(inode);
            if is_of_slot(&relative) {
                continue;
            }
            let path = self.dest.join(&relative);
            match &inode.kind {
                InodeKind::Directory => {}
                InodeKind::File { size, runs } if relative == Path::new(PG_CONTROL) => {
                    control = Some((path, inode, *size, runs));
                }
                InodeKind::File { size, runs } => self.file(&path, inode, *size, runs).map(drop)?,
                InodeKind::Symlink { .. } if relative == Path::new("pg_wal") => self.wal(&path)?,
                InodeKind::Symlink { target } => {
                    symlink(OsStr::from_bytes(target), &path).on("create", &path)?;
                }
            }
        }
        let Some((path, inode, size, runs)) = control else {
            return Err(Error::Invalid(format!("layer {} has no {PG_CONTROL}", self.manifest.id)));
        };
        sync_file_system(self.dest)?;
        self.file(&path, inode, size, runs)?.sync_all().on("sync", &path)?;
        super::sync_dir(path.parent().unwrap_or(self.dest))?;
        match self.dest.parent() {
            Some(parent) if parent != Path::new("") => super::sync_dir(parent),
            _ => Ok(()),
        }
    }

    fn file(&self, path: &Path, inode: &Inode, size: u64, runs: &[Run]) -> Result<File> {
        let copy = make_file(path, size)?;
        for run in runs {
            let layer =
                self.manifest.chain.get(run.slot as usize).expect("a checked manifest's slots are in its chain");
            let from = self.layers_dir.join(layer.to_string()).join("data").join(inode.ino.to_string());
            let source = File::open(&from).on("open", &from)?;
            copy_pages(&source, &from, run, size, &copy, path)?;
        }
        copy.set_times(FileTimes::new().set_modified(time_of(inode.mtime_ns))).on("date", path)?;
        Ok(copy)
    }

    /// The real directory that the volume's link stands for.
    fn wal(&self, pg_wal: &Path) -> Result<()> {
        make_dir(pg_wal)?;
        make_dir(&pg_wal.join("archive_status"))?;
        let wal = self.layers_dir.join(self.manifest.id.to_string()).join("wal");
        for (name, from) in wal_files_in(&wal)? {
            let source = File::open(&from).on("open", &from)?;
            let size = source.metadata().on("read", &from)?.len();
            let to = pg_wal.join(name);
            let copy = make_file(&to, size)?;
            let len = u32::try_from(pages_of(size)).map_err(|_| Error::Invalid(format!("{from:?} is too large")))?;
            copy_pages(&source, &from, &Run { start: 0, len, slot: 0 }, size, &copy, &to)?;
        }
        Ok(())
    }
}

/// Copies the pages of a run; those of zeroes stay holes.
fn copy_pages(source: &File, from: &Path, run: &Run, size: u64, copy: &File, to: &Path) -> Result<()> {
    let end = run.start + run.len;
    let mut buffer = vec![0; run.len.min(COPY_PAGES) as usize * PAGE];
    let mut at = run.start;
    while at < end {
        let count = (end - at).min(COPY_PAGES);
        let pages = &mut buffer[..count as usize * PAGE];
        read_pages(source, at, size, pages).on("read", from)?;
        for (number, page) in (at..).zip(pages.chunks_exact(PAGE)) {
            let offset = u64::from(number) * BLOCK_BYTES;
            let within = usize::try_from(size.saturating_sub(offset)).unwrap_or(PAGE).min(PAGE);
            if !is_zero(page) {
                copy.write_all_at(&page[..within], offset).on("write", to)?;
            }
        }
        at += count;
    }
    Ok(())
}

/// Paths by inode.
struct Tree<'a> {
    directories: HashMap<Ino, &'a Inode>,
}

impl<'a> Tree<'a> {
    fn of(manifest: &'a Manifest) -> Self {
        let directories = manifest.inodes.iter().filter(|inode| inode.kind == InodeKind::Directory);
        Self { directories: directories.map(|inode| (inode.ino, inode)).collect() }
    }

    /// The path from the root. Ends, as a checked manifest's directories all lead to the root.
    fn path(&self, inode: &Inode) -> PathBuf {
        let mut names = vec![inode.name.as_slice()];
        let mut parent = inode.parent;
        while parent != ROOT_INO {
            let directory = self.directories.get(&parent).expect("a checked manifest's parents are directories in it");
            names.push(&directory.name);
            parent = directory.parent;
        }
        names.iter().rev().map(|name| OsStr::from_bytes(name)).collect()
    }
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().mode(0o700).create(path).on("create", path)
}

fn make_dirs(path: &Path) -> Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(path).on("create", path)
}

fn make_file(path: &Path, size: u64) -> Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).on("create", path)?;
    file.set_len(size).on("write", path)?;
    Ok(file)
}

fn time_of(mtime_ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(mtime_ns.unsigned_abs());
    if mtime_ns >= 0 { SystemTime::UNIX_EPOCH + distance } else { SystemTime::UNIX_EPOCH - distance }
}
