//! A layer: an immutable set of 8 KiB pages, the file tree of a data directory at one moment, and the WAL that
//! Postgres needs to start on it.
//!
//! A layer alone is one link of a chain: it holds the pages written since the layer below it was sealed, and those that
//! compaction copied from layers below. Its
//! [`Manifest`], however, is complete: the whole tree, and for every file where each of its pages is found in the
//! chain. So opening a layer costs the same at any depth.
//!
//! On a node:
//!
//! ```text
//! layers/<layer id>/
//!   manifest        complete tree and page map (written once, when sealed)
//!   data/<ino>      one sparse file per file with pages in this layer; the manifest tells which pages those are
//!   wal/<segment>   WAL from the redo point of the image to its end; complete segments may be hard links
//!   journal         only while it is or was an upper on this node: tree operations (see `volume::journal`)
//!   roles.json      SCRAM verifiers by role, as the compute last published them
//! ```
//!
//! A layer may be *partial*: a directory like this with holes where frames are missing, and beside it what is needed to
//! fetch them. See `partial` for what is on disk, and [`LazyLayers`] for who fetches.
//!
//! In the bucket: one object `layers/<layer id>`, specified in `docs/formats/layer.md`.

mod boot;
mod codec;
mod fetch;
mod format;
mod lazy;
mod lead;
mod manifest;
mod pack;
mod partial;
mod same;
mod verify;

pub use boot::boot_key;
pub(crate) use boot::{BootSet, PAGES_MAX as BOOT_PAGES_MAX};
pub(crate) use fetch::{fetch, object_key, packed_in, sync_file_system};
pub(crate) use lazy::Found;
pub use lazy::{Fetched, LazyLayers, Origin};
pub(crate) use manifest::pages_of;
pub(crate) use pack::{Packed, is_zero, pack, read_pages, wal_files_in};
pub(crate) use partial::{Partial, is_partial, is_stale, share_lock};
pub use same::{FilePages, same_files};
pub(crate) use verify::{compare, manifest_in, verify};

use ebb_types::{LayerId, Lsn};

/// Storage's unit: one Postgres page of the default build (`BLCKSZ`, PostgreSQL 15 `pg_config_manual.h`).
pub const BLOCK_BYTES: u64 = 8192;

/// A file, directory or symlink number; never reused along a line of history. The root directory is 1.
pub type Ino = u64;

/// The inode number of the root directory.
pub const ROOT_INO: Ino = 1;

/// Everything about one image of a data directory except the bytes of its pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// This layer.
    pub id: LayerId,
    /// All layers the page map names, oldest first; the last is `id`. A [`Run::slot`] indexes it.
    pub chain: Vec<LayerId>,
    /// The first inode number never used so far on this line of history.
    pub next_ino: Ino,
    /// Every file, directory and symlink, sorted by inode number; the first is the root.
    pub inodes: Vec<Inode>,
    /// What the image's `pg_control` said.
    pub image: ImageInfo,
}

/// One entry of the file tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub ino: Ino,
    /// The directory it is in (the root is in itself).
    pub parent: Ino,
    /// Its name in that directory; empty for the root.
    pub name: Vec<u8>,
    /// Permission bits only.
    pub mode: u32,
    /// Last modification, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// What it is.
    pub kind: InodeKind,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InodeKind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Logical size in bytes.
        size: u64,
        /// Where its pages are, sorted by `start`, not overlapping; a page in no run is all zeroes.
        runs: Vec<Run>,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: Vec<u8>,
    },
}

/// Neighbouring pages of one file that are found in the same layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First page, in units of [`BLOCK_BYTES`].
    pub start: u32,
    /// How many pages.
    pub len: u32,
    /// Which layer: an index into [`Manifest::chain`].
    pub slot: u32,
}

/// What the control file of an image says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageInfo {
    /// Postgres major version, from `PG_VERSION`.
    pub pg_major: u32,
    /// The cluster's system identifier.
    pub system_identifier: u64,
    /// Where recovery of this image begins.
    pub redo: Lsn,
    /// The Postgres timeline of that redo point.
    pub pg_timeline: u32,
    /// Size of a WAL segment in bytes.
    pub wal_segment_bytes: u32,
    /// Whether Postgres had shut down cleanly, so that nothing needs replay.
    pub clean: bool,
}

impl Manifest {
    /// The slot of this layer itself: that of the pages in its own `data/`.
    pub fn own_slot(&self) -> u32 {
        (self.chain.len() - 1) as u32
    }
}

#[cfg(test)]
mod tests;
