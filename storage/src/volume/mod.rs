//! A volume: what Postgres sees as its data directory. A chain of layers below, one private upper on top, through FUSE.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_types::LayerId;

use crate::Result;

/// The open volume of one branch. All methods block; none may be called from an async thread.
#[derive(Debug)]
pub struct Volume {
    _private: (),
}

/// Where a volume lives on this node.
#[derive(Debug, Clone)]
pub struct VolumeDirs {
    /// `layers/` of the node.
    pub layers: PathBuf,
    /// The branch's own directory; the volume owns `volume.json` and `wal/` in it.
    pub branch: PathBuf,
}

/// How a volume shows itself in the mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Owner shown for every file: the user Postgres runs as.
    pub uid: u32,
    /// Group shown for every file.
    pub gid: u32,
    /// Whether users other than the mounting one may enter (root mounts, Postgres enters).
    pub allow_other: bool,
    /// FUSE worker threads.
    pub threads: usize,
}

/// A live mount; dropping it unmounts (lazily, if it is still in use).
#[derive(Debug)]
pub struct Mount {
    _private: (),
}

/// The outcome of a seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// The layer that now holds the image.
    pub layer: LayerId,
    /// Whether the layer is new (`false`: nothing had changed since the last seal, and `layer` is that one).
    pub new: bool,
}

impl Volume {
    /// Whether this branch has a volume on this node.
    pub fn exists(_dirs: &VolumeDirs) -> bool {
        todo!("helper B")
    }

    /// Makes a volume: an empty upper on `base` and a `wal/` with the WAL of that image. `base` must be local
    /// (see [`crate::node::NodeStore::ensure_local`]). Atomic: after a crash the volume exists whole or not at all.
    pub fn create(_dirs: &VolumeDirs, _base: LayerId) -> Result<()> {
        todo!("helper B")
    }

    /// Opens the volume, finding after a crash exactly what had been synced (and whatever else reached the disk).
    pub fn open(_dirs: &VolumeDirs) -> Result<Arc<Self>> {
        todo!("helper B")
    }

    /// Mounts it. The directory the mount point is in must hold the volume's WAL directory as `wal`
    /// (`pg_wal` in the volume is a symlink to `../wal`).
    pub fn mount(self: &Arc<Self>, _at: &Path, _options: &MountOptions) -> Result<Mount> {
        todo!("helper B")
    }

    /// Freezes the present state into layer `id` and goes on with an empty upper. Writers wait at most for a few
    /// system calls; Postgres is not touched. The image is crash-consistent.
    ///
    /// Returns once the layer is complete on this node: manifest written, WAL captured, all of it synced. If nothing
    /// was written since the last seal, that layer is returned and `id` is not used. Calling again with the same `id`
    /// after a crash finishes what was begun.
    pub fn seal(&self, _id: LayerId) -> Result<Sealed> {
        todo!("helper B")
    }

    /// The newest sealed layer below the upper.
    pub fn base(&self) -> LayerId {
        todo!("helper B")
    }

    /// Whether anything was written since the last seal (in the volume or in its WAL).
    pub fn is_dirty(&self) -> bool {
        todo!("helper B")
    }
}

impl Mount {
    /// Unmounts and waits until the kernel has handed over every dirty page.
    pub fn unmount(self) -> Result<()> {
        todo!("helper B")
    }
}
