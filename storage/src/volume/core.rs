//! The inner core of a volume: its state, and every operation on it by inode number. Knows nothing of FUSE.
//!
//! **Invariants**
//! - A slot that is not the upper's is never written to.
//! - A data file of the upper is as long as its file; a block that it has in part, it has whole in memory's view: what
//!   is missing reads as zeroes and is zeroes.
//! - What was synced is found again after any crash. See [`Core::sync_file`].
//!
//! **LOCK ORDER**: `gate`, `names`, a file's `data`, `files`, a file's `handles`, the journal's tail. Syncs hold none of
//! them, except for the one that lets a file grow that was cut.
//! Whatever changes anything holds `gate` for reading from before the change until after it; a seal takes it for
//! writing, and so finds nothing half done.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;
use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::boot::BootReads;
use super::errno;
use super::file::FileNode;
use super::image::{Image, now_ns};
use super::journal::Record;
use super::slots::Slots;
use super::tree::{Entry, Kind, Tree};
use super::upper::Upper;
use crate::layer::{BLOCK_BYTES, Ino, ROOT_INO, Run};
use crate::pg_files;

/// LIMIT: of the files a process may have open, the part that data files may take; the rest is for everybody else.
const HANDLES_PART: u64 = 2;

/// LIMIT: more open data files than this bring nothing.
const HANDLES_MAX: u64 = 16 << 10;

/// What `stat` shows of an inode, except owner and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attr {
    pub ino: Ino,
    pub kind: AttrKind,
    /// Permission bits.
    pub mode: u32,
    pub size: u64,
    pub links: u32,
    pub mtime_ns: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttrKind {
    Directory,
    File,
    Symlink,
}

/// The state of an open volume.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) slots: Slots,
    /// What is read while Postgres comes up.
    pub(super) boot: BootReads,
    gate: RwLock<Gate>,
    names: RwLock<Names>,
    files: RwLock<HashMap<Ino, Arc<FileNode>>>,
    /// How many data files are held open, and how many may be.
    handles: AtomicUsize,
    handles_max: usize,
}

/// Where changes go.
#[derive(Debug)]
struct Gate {
    upper: Arc<Upper>,
    /// The uppers that were sealed and are not all on disk yet, oldest first.
    sealed: Vec<Arc<Upper>>,
}

#[derive(Debug)]
struct Names {
    tree: Tree,
    /// What lost its name while the kernel still knows it.
    orphans: HashMap<Ino, Entry>,
}

impl Names {
    fn get(&self, ino: Ino) -> Result<&Entry, Errno> {
        self.tree.get(ino).or_else(|| self.orphans.get(&ino)).ok_or(Errno::NOENT)
    }

    fn get_mut(&mut self, ino: Ino) -> Result<&mut Entry, Errno> {
        match self.tree.get_mut(ino) {
            Some(entry) => Ok(entry),
            None => self.orphans.get_mut(&ino).ok_or(Errno::NOENT),
        }
    }
}

impl Core {
    /// From what the files on disk told. `slots` ends with the upper's.
    pub(super) fn new(image: Image, slots: Slots, upper: Upper) -> Self {
        let files = (image.files.into_iter())
            .map(|(ino, file)| (ino, Arc::new(FileNode::new(ino, file, upper.slot))))
            .collect();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        Self {
            slots,
            boot: BootReads::default(),
            gate: RwLock::new(Gate { upper: Arc::new(upper), sealed: Vec::new() }),
            names: RwLock::new(Names { tree: image.tree, orphans: HashMap::new() }),
            files: RwLock::new(files),
            handles: AtomicUsize::new(0),
            handles_max: (limit / HANDLES_PART).clamp(16, HANDLES_MAX) as usize,
        }
    }

    // Names.

    /// Finds an entry. Like everything that answers an [`Attr`] of an entry found or made, it counts one reference,
    /// which [`Core::forget`] gives back.
    pub(super) fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr, Errno> {
        let names = self.names.read();
        let ino = names.tree.lookup(parent, name)?;
        self.referenced(&names, ino)
    }

    fn referenced(&self, names: &Names, ino: Ino) -> Result<Attr, Errno> {
        let entry = names.get(ino)?;
        entry.refs.fetch_add(1, Ordering::Relaxed);
        Ok(self.attr(ino, entry, entry.links()))
    }

    /// What `stat` shows.
    pub(super) fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        let names = self.names.read();
        if let Some(entry) = names.tree.get(ino) {
            return Ok(self.attr(ino, entry, entry.links()));
        }
        names.orphans.get(&ino).map(|entry| self.attr(ino, entry, 0)).ok_or(Errno::NOENT)
    }

    fn attr(&self, ino: Ino, entry: &Entry, links: u32) -> Attr {
        let (kind, size) = match &entry.kind {
            Kind::Directory(_) => (AttrKind::Directory, 4096),
            Kind::File => (AttrKind::File, self.file(ino).map_or(0, |file| file.size())),
            Kind::Symlink(target) => (AttrKind::Symlink, target.len() as u64),
        };
        Attr { ino, kind, mode: entry.mode, size, links, mtime_ns: entry.mtime_ns }
    }

    /// Makes an empty file.
    pub(super) fn create(&self, parent: Ino, name: &[u8], mode: u32) -> Result<Attr, Errno> {
        self.make(|ino| Record::Create { ino, parent, name: name.to_vec(), mode: mode & 0o7777 })
    }

    /// Makes a directory.
    pub(super) fn mkdir(&self, parent: Ino, name: &[u8], mode: u32) -> Result<Attr, Errno> {
        self.make(|ino| Record::Mkdir { ino, parent, name: name.to_vec(), mode: mode & 0o7777 })
    }

    /// Makes a symbolic link.
    pub(super) fn symlink(&self, parent: Ino, name: &[u8], target: &[u8]) -> Result<Attr, Errno> {
        // What a tablespace holds would be in no layer.
        if self.names.read().get(parent).is_ok_and(|at| at.parent == ROOT_INO && at.name == pg_files::TABLESPACES) {
            return Err(Errno::OPNOTSUPP);
        }
        self.make(|ino| Record::Symlink { ino, parent, name: name.to_vec(), target: target.to_vec() })
    }

    fn make(&self, record: impl FnOnce(Ino) -> Record) -> Result<Attr, Errno> {
        let gate = self.gate.read();
        let mut names = self.names.write();
        let ino = names.tree.next_ino();
        let record = record(ino);
        self.record(&gate.upper, &mut names, &record)?;
        if matches!(record, Record::Create { .. }) {
            self.files.write().insert(ino, Arc::new(FileNode::empty(ino, gate.upper.slot)));
        }
        self.referenced(&names, ino)
    }

    /// Journals a record, then carries it out. What lost its name by it is kept while the kernel knows it; the data of
    /// a file that nobody knows any more is answered, to be deleted once no lock is held.
    fn record(&self, upper: &Upper, names: &mut Names, record: &Record) -> Result<Option<Arc<FileNode>>, Errno> {
        names.tree.check(record)?;
        upper.journal.append(record)?;
        let gone = names.tree.apply(record, now_ns())?;
        Ok(gone.and_then(|(ino, entry)| {
            if entry.refs.load(Ordering::Relaxed) == 0 {
                return self.files.write().remove(&ino);
            }
            names.orphans.insert(ino, entry);
            None
        }))
    }

    fn unname(&self, record: &Record) -> Result<(), Errno> {
        let gate = self.gate.read();
        let gone = self.record(&gate.upper, &mut self.names.write(), record)?;
        if let Some(file) = gone {
            file.discard(self, &gate.upper);
        }
        Ok(())
    }

    /// Takes the name off a file or symlink.
    pub(super) fn unlink(&self, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        self.unname(&Record::Unlink { parent, name: name.to_vec() })
    }

    /// Removes an empty directory.
    pub(super) fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        self.unname(&Record::Rmdir { parent, name: name.to_vec() })
    }

    /// Gives an entry another name, replacing what has it unless `keep` forbids that.
    pub(super) fn rename(&self, from: Ino, from_name: &[u8], to: Ino, to_name: &[u8], keep: bool) -> Result<(), Errno> {
        if keep && self.names.read().tree.lookup(to, to_name).is_ok() {
            return Err(Errno::EXIST);
        }
        let (from_name, to_name) = (from_name.to_vec(), to_name.to_vec());
        self.unname(&Record::Rename { from, from_name, to, to_name })
    }

    /// Where a symlink points.
    pub(super) fn readlink(&self, ino: Ino) -> Result<Vec<u8>, Errno> {
        match &self.names.read().get(ino)?.kind {
            Kind::Symlink(target) => Ok(target.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    /// Changes the permission bits.
    pub(super) fn set_mode(&self, ino: Ino, mode: u32) -> Result<(), Errno> {
        let mode = mode & 0o7777;
        let gate = self.gate.read();
        let mut names = self.names.write();
        if let Some(entry) = names.orphans.get_mut(&ino) {
            entry.mode = mode;
            return Ok(());
        }
        self.record(&gate.upper, &mut names, &Record::Mode { ino, mode }).map(drop)
    }

    /// Changes the time of last modification, in memory only: no promise hangs on it.
    pub(super) fn set_mtime(&self, ino: Ino, mtime_ns: i64) -> Result<(), Errno> {
        self.names.write().get_mut(ino)?.mtime_ns = mtime_ns;
        Ok(())
    }

    /// Lists a directory in a stable order: shows each entry with a number above `after` until one is not taken.
    pub(super) fn list(
        &self,
        directory: Ino,
        after: Ino,
        mut show: impl FnMut(&[u8], &Attr) -> bool,
    ) -> Result<(), Errno> {
        let names = self.names.read();
        for (ino, entry) in names.tree.list(directory, after)? {
            if !show(&entry.name, &self.attr(ino, entry, entry.links())) {
                break;
            }
        }
        Ok(())
    }

    /// As [`Core::list`], but counts a reference for each entry that was taken.
    pub(super) fn list_referenced(
        &self,
        directory: Ino,
        after: Ino,
        mut show: impl FnMut(&[u8], &Attr) -> bool,
    ) -> Result<(), Errno> {
        let names = self.names.read();
        for (ino, entry) in names.tree.list(directory, after)? {
            if !show(&entry.name, &self.attr(ino, entry, entry.links())) {
                break;
            }
            entry.refs.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The directory that a directory is in.
    pub(super) fn parent(&self, directory: Ino) -> Result<Ino, Errno> {
        Ok(self.names.read().get(directory)?.parent)
    }

    /// Gives references back. The last one of an inode without a name takes its contents with it.
    pub(super) fn forget(&self, ino: Ino, count: u64) {
        let gate = self.gate.read();
        let file = {
            let names = self.names.read();
            let Ok(entry) = names.get(ino) else { return };
            let less = |refs: u64| Some(refs.saturating_sub(count));
            let before = entry.refs.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).unwrap_or(0);
            if before > count || names.tree.get(ino).is_some() {
                return;
            }
            drop(names);
            // Nothing finds an orphan any more, so nobody can have taken a reference in between.
            self.names.write().orphans.remove(&ino);
            self.files.write().remove(&ino)
        };
        if let Some(file) = file {
            file.discard(self, &gate.upper);
        }
    }

    // Contents.

    pub(super) fn file(&self, ino: Ino) -> Result<Arc<FileNode>, Errno> {
        self.files.read().get(&ino).cloned().ok_or(if ino == ROOT_INO { Errno::ISDIR } else { Errno::NOENT })
    }

    /// Reads from a file; answers how many bytes there were.
    pub(super) fn read(&self, ino: Ino, offset: u64, into: &mut [u8]) -> Result<usize, Errno> {
        self.boot.note(ino, offset, into.len());
        self.file(ino)?.read(self, offset, into).map_err(|error| errno(&error))
    }

    /// Writes to a file.
    pub(super) fn write(&self, ino: Ino, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.prepare(ino, offset, offset.saturating_add(bytes.len() as u64))?;
        let gate = self.gate.read();
        self.file(ino)?.write(self, &gate.upper, offset, bytes).map_err(|error| errno(&error))
    }

    /// See [`FileNode::prepare`].
    fn prepare(&self, ino: Ino, start: u64, end: u64) -> Result<(), Errno> {
        match self.slots.is_lazy() {
            true => self.file(ino)?.prepare(self, start, end).map_err(|error| errno(&error)),
            false => Ok(()),
        }
    }

    /// Cuts or lengthens a file.
    pub(super) fn truncate(&self, ino: Ino, size: u64) -> Result<(), Errno> {
        self.prepare(ino, size, size)?;
        let gate = self.gate.read();
        self.file(ino)?.truncate(self, &gate.upper, size).map_err(|error| errno(&error))
    }

    /// Makes a file at least this long, with disk space set aside for what is new.
    pub(super) fn allocate(&self, ino: Ino, size: u64) -> Result<(), Errno> {
        let gate = self.gate.read();
        self.file(ino)?.allocate(self, &gate.upper, size).map_err(|error| errno(&error))
    }

    /// Brings a file to disk: its contents, its name, and everything done to the tree before.
    ///
    /// CRASH: What this acknowledges lies in the upper, and in those sealed before while they are not on disk yet. A
    /// new upper counts after a crash only if the journals before it tell of their seals; so they are synced as well.
    pub(super) fn sync_file(&self, ino: Ino) -> Result<(), Errno> {
        if self.is_transient(ino) {
            return Ok(());
        }
        let (upper, sealed) = self.uppers();
        self.file(ino)?.sync(self, &upper, &sealed)?;
        sync_names(&upper, &sealed)
    }

    /// Whether no Postgres but the one that writes it now wants to read this file.
    fn is_transient(&self, ino: Ino) -> bool {
        let names = self.names.read();
        let entry = names.tree.get(ino).filter(|entry| entry.parent == ROOT_INO);
        entry.is_some_and(|entry| pg_files::TRANSIENT.contains(&entry.name.as_slice()))
    }

    /// Brings the tree to disk.
    pub(super) fn sync_tree(&self) -> Result<(), Errno> {
        let (upper, sealed) = self.uppers();
        sync_names(&upper, &sealed)
    }

    /// The figures of the file system that the upper is on.
    pub(super) fn statfs(&self) -> Result<StatVfs, Errno> {
        let upper = self.uppers().0;
        rustix::fs::fstatvfs(upper.data_dir().map_err(|error| errno(&error))?)
    }

    // Seals.

    /// The upper, and those sealed before that are not on disk yet, oldest first.
    pub(super) fn uppers(&self) -> (Arc<Upper>, Vec<Arc<Upper>>) {
        let gate = self.gate.read();
        (gate.upper.clone(), gate.sealed.clone())
    }

    /// Seals the upper and goes on with another. `last_words` gives the last records of its journal; nothing is
    /// written to the volume while it does.
    pub(super) fn switch(
        &self,
        upper: Upper,
        last_words: impl FnOnce() -> Result<Vec<Record>, Errno>,
    ) -> Result<Arc<Upper>, Errno> {
        let data = upper.data_dir().map_err(|error| errno(&error))?;
        self.gate.read().upper.journal.reserve()?;
        let mut gate = self.gate.write();
        debug_assert!(self.slots.len() == upper.slot);
        for record in last_words()? {
            gate.upper.journal.append(&record)?;
        }
        self.slots.push(&PathBuf::from(format!("upper {}", upper.number)), data);
        let sealed = std::mem::replace(&mut gate.upper, Arc::new(upper));
        gate.sealed.push(sealed.clone());
        Ok(sealed)
    }

    // Compaction.

    /// All files, also those that only the kernel still knows.
    pub(super) fn all_files(&self) -> Vec<Arc<FileNode>> {
        self.files.read().values().cloned().collect()
    }

    /// The files that have a name.
    pub(super) fn named_files(&self) -> Vec<Arc<FileNode>> {
        let names = self.names.read();
        let files = self.files.read();
        files.iter().filter(|(ino, _)| names.tree.get(**ino).is_some()).map(|(_, file)| file.clone()).collect()
    }

    /// Keeps a file, as the kernel keeps one that is open: it may lose its name meanwhile, but not its contents. `None` if it
    /// has no name any more.
    pub(super) fn hold(&self, file: &Arc<FileNode>) -> Option<Held<'_>> {
        let names = self.names.read();
        names.tree.get(file.ino())?.refs.fetch_add(1, Ordering::Relaxed);
        Some(Held { core: self, file: file.clone() })
    }

    /// Copies pages of a file, which is held, from below into the upper; answers how many. The slot must be on this node.
    pub(super) fn lift(&self, file: &FileNode, run: Run, buffer: &mut [u8]) -> io::Result<u32> {
        let pages = &mut buffer[..run.len as usize * BLOCK_BYTES as usize];
        // Without any lock: what is below does not change.
        file.read_below(self, run, pages)?;
        let gate = self.gate.read();
        file.lift(self, &gate.upper, run, pages)
    }

    /// Tells that a sealed upper is on disk.
    pub(super) fn is_on_disk(&self, upper: &Upper) {
        self.gate.write().sealed.retain(|sealed| sealed.number != upper.number);
    }

    // Handles.

    /// Counts a data file that was opened, and closes all others if there are too many.
    pub(super) fn count_handle(&self) {
        if self.handles.fetch_add(1, Ordering::Relaxed) < self.handles_max {
            return;
        }
        // Those in use stay open until their users are done.
        let files: Vec<_> = self.files.read().values().cloned().collect();
        let closed = files.iter().map(|file| file.close_handles()).sum();
        self.handles.fetch_sub(closed, Ordering::Relaxed);
    }

    pub(super) fn uncount_handles(&self, count: usize) {
        self.handles.fetch_sub(count, Ordering::Relaxed);
    }
}

/// A file that is kept until this is dropped. See [`Core::hold`].
pub(super) struct Held<'a> {
    core: &'a Core,
    pub file: Arc<FileNode>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.core.forget(self.file.ino(), 1);
    }
}

/// The old journals first: they tell that the newer ones count.
fn sync_names(upper: &Upper, sealed: &[Arc<Upper>]) -> Result<(), Errno> {
    for older in sealed {
        older.sync_names()?;
    }
    upper.sync_names()
}
