//! The data files of a chain, by slot: every layer below the upper, the upper itself, and former uppers above it that
//! were sealed since the volume was opened.
//!
//! A slot never changes its number, so a seal changes no page map. Directories are held open: a sealed upper can be
//! renamed under its readers. A layer's directory is also locked (flock, shared), so that nobody evicts it.
//!
//! A layer may be on this node in part or not at all. Its pages are then read from the boot set, if they are in it, or
//! fetched by whoever needs them first ([`LazyFile`]).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ebb_types::LayerId;
use parking_lot::RwLock;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;

use super::VolumeDirs;
use super::image::{blocks, read_up_to};
use crate::error::{Error, LocalContext, Result};
use crate::layer::{BLOCK_BYTES, BootSet, Found, Ino, LazyLayers, Partial, is_partial, share_lock};

/// LIMIT: how far ahead of a file that is read in order its pages are fetched: 4 MiB, at most a few requests.
const AHEAD_BLOCKS: u32 = 512;

/// LIMIT: so many blocks a read may be off from where the last one ended and still seem in order: the kernel reads ahead
/// with several requests at once, which may arrive in any order.
const OUT_OF_ORDER_BLOCKS: u32 = 64;

/// After so many reads in order it is worth reading ahead.
const IN_ORDER: u32 = 2;

/// All slots of a volume, oldest first.
#[derive(Debug)]
pub(super) struct Slots {
    list: RwLock<Vec<Arc<Slot>>>,
    lazy: Option<Arc<Lazy>>,
}

/// Where pages come from that are not on this node.
#[derive(Debug)]
struct Lazy {
    layers: Arc<LazyLayers>,
    /// Empty if there is none, or all is on this node by now.
    boot: RwLock<BootSet>,
}

/// One directory of data files.
#[derive(Debug)]
struct Slot {
    /// Where it was when it was added.
    path: PathBuf,
    /// The layer; `None` if it is the upper, or was sealed and is not complete.
    layer: Option<LayerId>,
    dir: OnceLock<Dir>,
}

#[derive(Debug)]
enum Dir {
    Whole(OwnedFd),
    Partial(Arc<Partial>),
}

/// An inode's data file in one slot.
#[derive(Debug)]
pub(super) enum DataFile {
    Whole(File),
    Lazy(LazyFile),
}

/// A data file of which some pages may not be on this node.
#[derive(Debug)]
pub(super) struct LazyFile {
    slot: Arc<Slot>,
    layer: LayerId,
    lazy: Arc<Lazy>,
    ino: Ino,
    file: OnceLock<File>,
    /// Where the last read ended (upper half), and how many before it were in order.
    sequence: AtomicU64,
}

impl Slots {
    /// The data directories of these layers. None is opened before it is needed: a long chain costs nothing.
    pub(super) fn of_layers(dirs: &VolumeDirs, chain: &[LayerId]) -> Self {
        let slot = |id: &LayerId| {
            Arc::new(Slot {
                path: dirs.layers.join(id.to_string()).join("data"),
                layer: Some(*id),
                dir: OnceLock::new(),
            })
        };
        let lazy = |layers: &Arc<LazyLayers>| Arc::new(Lazy { layers: layers.clone(), boot: RwLock::default() });
        Self { list: RwLock::new(chain.iter().map(slot).collect()), lazy: dirs.source.as_ref().map(lazy) }
    }

    /// Adds an upper's data directory, and answers its slot.
    pub(super) fn push(&self, path: &Path, dir: OwnedFd) -> u32 {
        // Once sealed it is a layer like any other. Nobody else can have a lock on it yet.
        if let Err(error) = rustix::fs::flock(&dir, FlockOperation::NonBlockingLockShared) {
            tracing::warn!(?path, %error, "an upper cannot be locked");
        }
        let mut list = self.list.write();
        list.push(Arc::new(Slot { path: path.to_owned(), layer: None, dir: OnceLock::from(Dir::Whole(dir)) }));
        (list.len() - 1) as u32
    }

    /// Tells that a former upper is a complete layer now, with its data files here.
    pub(super) fn became_layer(&self, number: u32, layer: LayerId, path: PathBuf) {
        let mut list = self.list.write();
        let Some(slot) = list.get_mut(number as usize) else { return };
        let Some(Dir::Whole(dir)) = slot.dir.get() else { return };
        match dir.try_clone() {
            Ok(dir) => *slot = Arc::new(Slot { path, layer: Some(layer), dir: OnceLock::from(Dir::Whole(dir)) }),
            // It stays open as long as the volume is.
            Err(error) => tracing::warn!(%layer, %error, "a layer cannot be let go of"),
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.list.read().len() as u32
    }

    /// Whether a layer that is not on this node can be read all the same.
    pub(super) fn is_lazy(&self) -> bool {
        self.lazy.is_some()
    }

    /// Whether any layer is not whole on this node.
    pub(super) fn any_missing(&self) -> bool {
        let is_missing = |slot: &Arc<Slot>| slot.layer.is_some() && !slot.is_whole();
        self.list.read().iter().any(is_missing)
    }

    /// Lets pages be read from this boot set as long as they are not on this node.
    pub(super) fn use_boot_set(&self, path: &Path) -> Result<()> {
        let Some(lazy) = &self.lazy else { return Ok(()) };
        match fs::read(path) {
            Ok(bytes) => *lazy.boot.write() = BootSet::decode(&format!("boot set {path:?}"), &bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).on("read", path),
        }
        Ok(())
    }

    /// Begins to fetch in the background all of `chain` that is missing.
    pub(super) fn hydrate(&self, chain: Vec<LayerId>) -> Result<()> {
        let Some(lazy) = &self.lazy else { return Ok(()) };
        let forget = lazy.clone();
        lazy.layers.hydrate(chain, move || *forget.boot.write() = BootSet::default())
    }

    /// Whether all of a slot's pages are on this node. If so they stay: nobody evicts a layer that was opened.
    pub(super) fn is_here(&self, slot: u32) -> io::Result<bool> {
        let slot = self.slot(slot)?;
        match slot.dir.get() {
            Some(Dir::Partial(partial)) => Ok(partial.is_full()),
            _ => slot.open_if_whole(),
        }
    }

    /// Closes the layers that are of no use any more, so that they can be evicted. Who needs one all the same opens it.
    pub(super) fn let_go(&self, is_used: impl Fn(u32) -> bool) {
        for (number, slot) in (0..).zip(self.list.write().iter_mut()) {
            if slot.layer.is_some() && slot.dir.get().is_some() && !is_used(number) {
                *slot = Arc::new(Slot { path: slot.path.clone(), layer: slot.layer, dir: OnceLock::new() });
            }
        }
    }

    fn slot(&self, slot: u32) -> io::Result<Arc<Slot>> {
        let slot = self.list.read().get(slot as usize).cloned();
        slot.ok_or_else(|| io::Error::other("the page map names a layer that is not there"))
    }

    /// Opens the data file of an inode: to be read, and in the upper also to be written. Does not wait for a bucket.
    pub(super) fn open(&self, slot: u32, ino: Ino) -> io::Result<DataFile> {
        let slot = self.slot(slot)?;
        let lazy = match (&self.lazy, slot.layer) {
            (Some(lazy), Some(layer)) if !slot.open_if_whole()? => Some((lazy.clone(), layer)),
            _ => None,
        };
        if let Some((lazy, layer)) = lazy {
            let (file, sequence) = (OnceLock::new(), AtomicU64::new(0));
            return Ok(DataFile::Lazy(LazyFile { slot, layer, lazy, ino, file, sequence }));
        }
        let flags = if slot.layer.is_none() { OFlags::RDWR } else { OFlags::RDONLY };
        let file = slot.whole_dir().and_then(|dir| open_in(dir, ino, flags));
        if let Err(error) = &file {
            tracing::error!(dir = ?slot.path, ino, %error, "data file of a layer cannot be opened");
        }
        file.map(DataFile::Whole)
    }
}

impl Slot {
    /// Whether the layer is whole on this node, as far as names tell.
    fn is_whole(&self) -> bool {
        match self.dir.get() {
            Some(Dir::Whole(_)) => true,
            Some(Dir::Partial(_)) => false,
            None => self.path.exists() && !self.path.parent().is_some_and(is_partial),
        }
    }

    /// Opens the directory if all of the layer is on this node, and tells whether it is.
    fn open_if_whole(&self) -> io::Result<bool> {
        if let Some(dir) = self.dir.get() {
            return Ok(matches!(dir, Dir::Whole(_)));
        }
        let Some(dir) = share_lock(&self.path)? else { return Ok(false) };
        if self.path.parent().is_some_and(is_partial) {
            return Ok(false);
        }
        self.set(Dir::Whole(dir));
        Ok(matches!(self.dir.get(), Some(Dir::Whole(_))))
    }

    /// The directory of a layer that must be whole here.
    fn whole_dir(&self) -> io::Result<&OwnedFd> {
        if self.dir.get().is_none() && !self.open_if_whole()? {
            let error = io::Error::new(io::ErrorKind::NotFound, "the layer is not whole on this node");
            tracing::error!(dir = ?self.path, %error, "directory of a layer cannot be opened");
            return Err(error);
        }
        match self.dir.get() {
            Some(Dir::Whole(dir)) => Ok(dir),
            _ => Err(io::Error::other("the layer is not whole on this node")),
        }
    }

    /// The directory, made if this node does not have the layer: waits for the bucket then.
    fn any_dir(&self, layer: LayerId, layers: &Arc<LazyLayers>) -> io::Result<&Dir> {
        if self.dir.get().is_none() && !self.open_if_whole()? {
            match layers.open_blocking(layer).map_err(unreadable)? {
                Found::Partial(partial) => self.set(Dir::Partial(partial)),
                // Just now.
                Found::Whole => {
                    self.open_if_whole()?;
                }
            }
        }
        self.dir.get().ok_or_else(|| unreadable(Error::NoSuchLayer(layer)))
    }

    /// Of two threads one keeps its directory; the other's is closed again.
    fn set(&self, dir: Dir) {
        if self.dir.set(dir).is_ok() {
            // When it was used last, for whoever evicts.
            let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
            let times = Timestamps { last_access: now, last_modification: now };
            if let Some(layer) = self.path.parent() {
                let _ = rustix::fs::utimensat(CWD, layer, &times, AtFlags::empty());
            }
        }
    }
}

impl DataFile {
    /// Fills `into` with bytes of the file; what is past its end is zeroes. May wait for the bucket.
    pub(super) fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            DataFile::Whole(file) => read_whole(file, into, offset),
            DataFile::Lazy(file) => file.read_at(into, offset),
        }
    }

    /// The file itself, which is the upper's.
    pub(super) fn file(&self) -> io::Result<&File> {
        match self {
            DataFile::Whole(file) => Ok(file),
            DataFile::Lazy(_) => Err(io::Error::other("a layer is never written to")),
        }
    }
}

fn read_whole(file: &File, into: &mut [u8], offset: u64) -> io::Result<()> {
    match file.read_at(into, offset) {
        Ok(read) if read == into.len() => Ok(()),
        Ok(read) => {
            into[read..].fill(0);
            read_up_to(file, &mut into[read..], offset + read as u64)
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            into.fill(0);
            read_up_to(file, into, offset)
        }
        Err(error) => Err(error),
    }
}

impl LazyFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        let (first, end) = ((offset / BLOCK_BYTES) as u32, blocks(offset + into.len() as u64));
        self.ensure(first, end)?;
        // Which are here is settled before the file is read: one that arrives just then would be taken for zeroes.
        let absent: Vec<u32> = (first..end).filter(|&block| !self.is_here(block)).collect();
        if absent.len() < (end - first) as usize {
            read_whole(self.file()?, into, offset)?;
        }
        let boot = self.lazy.boot.read();
        for &block in &absent {
            let page = boot.get(self.layer, self.ino, block).ok_or(Errno::IO)?;
            copy_block(page, block, into, offset);
            self.lazy.layers.count_boot_page();
        }
        Ok(())
    }

    fn is_here(&self, block: u32) -> bool {
        match self.slot.dir.get() {
            Some(Dir::Whole(_)) => true,
            Some(Dir::Partial(partial)) => partial.has_page(self.ino, block),
            None => false,
        }
    }

    /// Fetches what is neither here nor in the boot set.
    fn ensure(&self, first: u32, end: u32) -> io::Result<()> {
        let wanted = {
            let boot = self.lazy.boot.read();
            let is_wanted = |block: &u32| !self.is_here(*block) && boot.get(self.layer, self.ino, *block).is_none();
            (first..end).find(is_wanted).zip((first..end).rfind(is_wanted))
        };
        if let Some((from, last)) = wanted {
            let dir = self.slot.any_dir(self.layer, &self.lazy.layers)?;
            if let Dir::Partial(partial) = dir {
                self.lazy.layers.ensure(partial, self.ino, from..last + 1).map_err(unreadable)?;
            }
        }
        self.read_ahead(first, end, wanted.is_some());
        Ok(())
    }

    fn read_ahead(&self, first: u32, end: u32, missed: bool) {
        let Some(Dir::Partial(partial)) = self.slot.dir.get() else { return };
        let before = self.sequence.load(Ordering::Relaxed);
        let (ended, in_order) = ((before >> 32) as u32, before as u32);
        let goes_on = ended > 0 && first.abs_diff(ended) <= OUT_OF_ORDER_BLOCKS;
        let in_order = if goes_on { in_order.saturating_add(u32::from(end > ended)) } else { 0 };
        let ended = if goes_on { end.max(ended) } else { end };
        self.sequence.store(u64::from(ended) << 32 | u64::from(in_order), Ordering::Relaxed);
        let middle = ended.saturating_add(AHEAD_BLOCKS / 2);
        // Half of what was read ahead is used up: that makes for large requests.
        if in_order >= IN_ORDER && (missed || !partial.has_page(self.ino, middle)) {
            self.lazy.layers.read_ahead(partial, self.ino, ended..ended.saturating_add(AHEAD_BLOCKS));
        }
    }

    fn file(&self) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = match self.slot.any_dir(self.layer, &self.lazy.layers)? {
            Dir::Whole(dir) => open_in(dir, self.ino, OFlags::RDONLY)?,
            Dir::Partial(partial) => open_in(partial.data_dir(), self.ino, OFlags::RDONLY)?,
        };
        Ok(self.file.get_or_init(|| file))
    }
}

/// Copies that part of a block that a buffer, which begins at `offset` of the file, has room for.
fn copy_block(page: &[u8], block: u32, into: &mut [u8], offset: u64) {
    let start = u64::from(block) * BLOCK_BYTES;
    let skipped = offset.saturating_sub(start) as usize;
    let at = start.saturating_sub(offset) as usize;
    let length = (page.len() - skipped).min(into.len() - at);
    into[at..at + length].copy_from_slice(&page[skipped..skipped + length]);
}

/// What the kernel is told when pages cannot be had; what happened is in the log.
fn unreadable(error: Error) -> io::Error {
    tracing::error!(%error, "a page that is not on this node cannot be read");
    Errno::IO.into()
}

/// Opens a directory.
pub(super) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens a data file in a directory of them.
pub(super) fn open_in(dir: impl AsFd, ino: Ino, flags: OFlags) -> io::Result<File> {
    let fd = rustix::fs::openat(dir, ino.to_string(), flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;
    Ok(File::from(fd))
}
