//! The data files of a chain, by slot: every layer below the upper, the upper itself, and former uppers above it that
//! were sealed since the volume was opened.
//!
//! A slot never changes its number, so a seal changes no page map. Directories are held open: a sealed upper can be
//! renamed under its readers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use ebb_types::LayerId;
use parking_lot::RwLock;
use rustix::fs::{Mode, OFlags};

use crate::layer::Ino;

/// All slots of a volume, oldest first.
#[derive(Debug)]
pub(super) struct Slots {
    list: RwLock<Vec<Arc<Slot>>>,
}

/// One directory of data files.
#[derive(Debug)]
struct Slot {
    /// Where it was when it was added.
    path: PathBuf,
    /// Whether it is, or was since the volume was opened, the upper.
    was_upper: bool,
    dir: OnceLock<OwnedFd>,
}

impl Slots {
    /// The data directories of these layers. None is opened before it is needed: a long chain costs nothing.
    pub(super) fn of_layers(layers_dir: &Path, chain: &[LayerId]) -> Self {
        let slot = |id: &LayerId| {
            Arc::new(Slot {
                path: layers_dir.join(id.to_string()).join("data"),
                was_upper: false,
                dir: OnceLock::new(),
            })
        };
        Self { list: RwLock::new(chain.iter().map(slot).collect()) }
    }

    /// Adds an upper's data directory, and answers its slot.
    pub(super) fn push(&self, path: &Path, dir: OwnedFd) -> u32 {
        let mut list = self.list.write();
        list.push(Arc::new(Slot { path: path.to_owned(), was_upper: true, dir: OnceLock::from(dir) }));
        (list.len() - 1) as u32
    }

    pub(super) fn len(&self) -> u32 {
        self.list.read().len() as u32
    }

    /// Opens the data file of an inode: to be read, and in the upper also to be written.
    pub(super) fn open(&self, slot: u32, ino: Ino) -> io::Result<File> {
        let slot = self.list.read().get(slot as usize).cloned();
        let slot = slot.ok_or_else(|| io::Error::other("the page map names a layer that is not there"))?;
        let flags = if slot.was_upper { OFlags::RDWR } else { OFlags::RDONLY };
        let file = open_in(slot.dir()?, ino, flags);
        if let Err(error) = &file {
            tracing::error!(dir = ?slot.path, ino, %error, "data file of a layer cannot be opened");
        }
        file
    }
}

impl Slot {
    fn dir(&self) -> io::Result<&OwnedFd> {
        if let Some(dir) = self.dir.get() {
            return Ok(dir);
        }
        let opened = open_dir(&self.path);
        if let Err(error) = &opened {
            tracing::error!(dir = ?self.path, %error, "directory of a layer cannot be opened");
        }
        // Of two threads one keeps its directory; the other's is closed again.
        let dir = opened?;
        Ok(self.dir.get_or_init(|| dir))
    }
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
