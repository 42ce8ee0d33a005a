//! The directory of an upper, `uppers/<number>/`: an unsealed layer.
//!
//! ```text
//! journal       what was done to the tree
//! data/<ino>    one sparse file per file written or truncated since the layer below was sealed; its length is the
//!               file's logical size, its holes are pages that are not in this upper
//! hold/         hard links to WAL, while the upper is being sealed
//! wal/, manifest, roles.json    made by the seal, which then renames the directory to `layers/<layer id>`
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{AtFlags, OFlags};
use rustix::io::Errno;

use super::errno;
use super::journal::{Contents, Header, Journal};
use super::slots::{open_dir, open_in};
use crate::error::{LocalContext, Result};
use crate::layer::Ino;

/// LIMIT: data files that wait for the next sync of the journal before they are deleted. More would keep disk space
/// from being reused; fewer would cost syncs of their own.
const DEAD_MAX: usize = 256;

/// The upper that is written to, or was until just now.
#[derive(Debug)]
pub(super) struct Upper {
    pub number: u64,
    /// Its place in the page maps.
    pub slot: u32,
    pub journal: Journal,
    /// Where it is until it becomes a layer.
    dir: PathBuf,
    /// The directory itself. See [`Upper::place`].
    placed: Syncs,
    data: OwnedFd,
    /// The names in `data/`.
    names: Syncs,
    /// Data files of deleted files whose deletion may not be on disk yet.
    dead: Mutex<Vec<Ino>>,
    /// Held for reading while a data file is synced.
    syncing: RwLock<()>,
    /// Why a data file could not be synced. See [`Upper::sync_data`].
    unsynced: OnceLock<Errno>,
}

/// Counts changes and syncs, so that calls at the same time share one sync, and none returns before it is done.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    changes: AtomicU64,
    /// How many changes are on disk. Written under `turn`.
    synced: AtomicU64,
    turn: Mutex<Option<Errno>>,
}

impl Syncs {
    /// Tells that something has changed. To be called after the change and before it is acknowledged.
    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Runs `sync` unless everything changed so far is synced. A failure is final: nobody knows what reached the disk,
    /// and the kernel reports it only once.
    pub(super) fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<(), Errno> {
        let wanted = self.changes.load(Ordering::Acquire);
        if self.synced.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        let mut turn = self.turn.lock();
        if let Some(errno) = *turn {
            return Err(errno);
        }
        if self.synced.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        let reached = self.changes.load(Ordering::Acquire);
        if let Err(error) = sync() {
            tracing::error!(%error, "sync failed");
            *turn = Some(errno(&error));
            return Err(errno(&error));
        }
        self.synced.store(reached, Ordering::Release);
        Ok(())
    }

    /// Counts of something that was just made.
    pub(super) fn changed_once() -> Self {
        Self { changes: AtomicU64::new(1), ..Self::default() }
    }

    /// Counts of something that is on disk from the start.
    pub(super) fn synced() -> Self {
        Self { changes: AtomicU64::new(1), synced: AtomicU64::new(1), turn: Mutex::default() }
    }

    /// Whether a sync succeeded at least once.
    pub(super) fn ever(&self) -> bool {
        self.synced.load(Ordering::Acquire) > 0
    }
}

/// `uppers/<number>` of a branch.
pub(super) fn dir_of(branch: &Path, number: u64) -> PathBuf {
    branch.join("uppers").join(number.to_string())
}

impl Upper {
    /// Makes an empty upper, in a directory that may be left over from an attempt cut short. Not synced: see
    /// [`Upper::place`].
    pub(super) fn create(branch: &Path, header: Header, slot: u32) -> Result<Self> {
        let dir = dir_of(branch, header.upper);
        remove_dir(&dir)?;
        let data = dir.join("data");
        fs::create_dir_all(&data).on("create", &data)?;
        let journal = Journal::create(&dir.join("journal"), header)?;
        Self::new(dir, header.upper, slot, journal, Syncs::changed_once())
    }

    /// Opens one whose journal was read.
    pub(super) fn open(branch: &Path, contents: &Contents, slot: u32) -> Result<Self> {
        let dir = dir_of(branch, contents.header.upper);
        let journal = Journal::open(&dir.join("journal"), contents)?;
        Self::new(dir, contents.header.upper, slot, journal, Syncs::synced())
    }

    fn new(dir: PathBuf, number: u64, slot: u32, journal: Journal, placed: Syncs) -> Result<Self> {
        let path = dir.join("data");
        let data = open_dir(&path).on("open", &path)?;
        Ok(Self {
            number,
            slot,
            journal,
            dir,
            placed,
            data,
            names: Syncs::default(),
            dead: Mutex::default(),
            syncing: RwLock::default(),
            unsynced: OnceLock::new(),
        })
    }

    /// A second handle on `data/`.
    pub(super) fn data_dir(&self) -> io::Result<OwnedFd> {
        self.data.try_clone()
    }

    /// Whether anything is in it.
    pub(super) fn is_dirty(&self) -> bool {
        !self.journal.is_empty() || self.names.changes.load(Ordering::Acquire) > 0
    }

    /// Tells that data files were found in it when it was opened.
    pub(super) fn mark_dirty(&self) {
        self.names.changed();
    }

    /// Makes the data file of an inode, of this logical size.
    pub(super) fn create_data(&self, ino: Ino, size: u64) -> io::Result<File> {
        let file = create_data(&self.data, ino, size)?;
        self.names.changed();
        Ok(file)
    }

    /// Opens the data file of an inode to be written, if there is one.
    pub(super) fn open_data(&self, ino: Ino) -> io::Result<Option<File>> {
        match open_in(&self.data, ino, OFlags::RDWR) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the data file of a file that is gone for good.
    ///
    /// CRASH: If its contents had been promised (`promised`), it must stay until the journal on disk tells that the
    /// file is gone; else a power cut would bring the file back without them.
    pub(super) fn discard_data(&self, ino: Ino, promised: bool) {
        if !promised {
            self.unlink_data(ino);
            return;
        }
        let waiting = {
            let mut dead = self.dead.lock();
            dead.push(ino);
            dead.len()
        };
        if waiting >= DEAD_MAX {
            // A failure is kept by the journal, and whoever syncs next is told.
            let _ = self.sync_names();
        }
    }

    fn unlink_data(&self, ino: Ino) {
        match rustix::fs::unlinkat(&self.data, ino.to_string(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            // It is found and deleted when the volume is opened again.
            Err(error) => tracing::warn!(ino, %error, "data file of a deleted file cannot be deleted"),
        }
    }

    /// Brings the directory with its empty journal to disk.
    ///
    /// CRASH: Until then a power cut may take the upper away. That loses nothing: nothing in it was promised, and one
    /// that the journal before it leads to is made again when the volume is opened. So this comes before any promise,
    /// and before that journal's upper becomes a layer and takes the way to this one with it.
    pub(super) fn place(&self) -> Result<(), Errno> {
        self.placed.sync(|| place(&self.dir))
    }

    /// Brings the journal to disk, with the seal that it ends with.
    pub(super) fn settle(&self) -> Result<(), Errno> {
        self.place()?;
        self.journal.sync()
    }

    /// Syncs the journal and the names of data files.
    pub(super) fn sync_names(&self) -> Result<(), Errno> {
        self.place()?;
        self.names.sync(|| Ok(rustix::fs::fsync(&self.data)?))?;
        let dead = std::mem::take(&mut *self.dead.lock());
        let synced = self.journal.sync();
        if synced.is_ok() {
            dead.into_iter().for_each(|ino| self.unlink_data(ino));
        }
        synced
    }

    /// Syncs a data file.
    ///
    /// CRASH: The kernel tells of a failure once, and takes what it could not write for written. So a file that failed
    /// here would seem synced to [`Upper::sync_all`], which opens it anew; the upper as a whole must not be called synced.
    pub(super) fn sync_data(&self, file: &File) -> io::Result<()> {
        let _syncing = self.syncing.read();
        file.sync_data().inspect_err(|error| {
            // The first failure is enough.
            let _ = self.unsynced.set(errno(error));
        })
    }

    /// Syncs everything that is in it.
    pub(super) fn sync_all(&self, branch: &Path) -> Result<()> {
        let data = dir_of(branch, self.number).join("data");
        for entry in fs::read_dir(&data).on("list", &data)? {
            let path = entry.on("list", &data)?.path();
            // A file may be deleted meanwhile: its inode was open and is not any more.
            match File::open(&path) {
                Ok(file) => self.sync_data(&file).on("sync", &path)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).on("open", &path),
            }
        }
        // Others may have been told of a failure just now.
        drop(self.syncing.write());
        if let Some(errno) = self.unsynced.get() {
            return Err(*errno).on("sync", &data);
        }
        sync_dir(&data)?;
        self.sync_names().on("sync", &data)
    }
}

/// Syncs an upper's directory, and the way to it, with the journal as it is.
pub(super) fn place(dir: &Path) -> io::Result<()> {
    let uppers = dir.parent().ok_or_else(|| io::Error::other("an upper lies in uppers/"))?;
    let paths = [&dir.join("journal"), &dir.join("data"), dir, uppers];
    paths.into_iter().try_for_each(|path| File::open(path)?.sync_all())
}

/// Makes a data file of a given logical size.
///
/// CRASH: The name must never be on disk before the length, or the file would seem cut to nothing. So a file that is
/// not empty gets its length under another name; file systems with a journal keep the order of the two.
pub(super) fn create_data(data: &OwnedFd, ino: Ino, size: u64) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    if size == 0 {
        return open_in(data, ino, flags | OFlags::EXCL);
    }
    let (name, unfinished) = (ino.to_string(), format!("{ino}.new"));
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let file = File::from(rustix::fs::openat(data, &unfinished, flags | OFlags::TRUNC, mode)?);
    file.set_len(size)?;
    rustix::fs::renameat(data, &unfinished, data, &name)?;
    Ok(file)
}

/// Brings the names in a directory to disk.
pub(super) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).on("sync", path)
}

/// Deletes a directory with all that is in it; succeeds if there is none.
pub(super) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", path),
        _ => Ok(()),
    }
}
