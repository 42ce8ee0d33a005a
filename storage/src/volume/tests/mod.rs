//! Tests of the volume: against a model, through crashes, and through a real mount.

mod behaviour;
mod crash;
mod model;
mod mount;
mod postgres;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_types::{LayerId, Lsn};

use super::core::AttrKind;
use super::{Volume, VolumeDirs};
use crate::layer::{ImageInfo, Ino, Inode, InodeKind, Manifest, ROOT_INO};

/// A node's directory with an empty layer in it.
struct Node {
    dir: tempfile::TempDir,
    empty: LayerId,
}

impl Node {
    fn new() -> Self {
        Self::in_dir(tempfile::tempdir().unwrap())
    }

    fn in_dir(dir: tempfile::TempDir) -> Self {
        let empty = LayerId::generate();
        let root = Inode {
            ino: ROOT_INO,
            parent: ROOT_INO,
            name: Vec::new(),
            mode: 0o700,
            mtime_ns: 0,
            kind: InodeKind::Directory,
        };
        let image = ImageInfo {
            pg_major: 15,
            system_identifier: 1,
            redo: Lsn(16 << 20),
            pg_timeline: 1,
            wal_segment_bytes: 16 << 20,
            clean: true,
        };
        let manifest = Manifest { id: empty, chain: vec![empty], next_ino: 2, inodes: vec![root], image };
        let layer = dir.path().join("layers").join(empty.to_string());
        std::fs::create_dir_all(layer.join("data")).unwrap();
        std::fs::create_dir(layer.join("wal")).unwrap();
        std::fs::write(layer.join("manifest"), manifest.encode()).unwrap();
        Self { dir, empty }
    }

    fn layers(&self) -> PathBuf {
        self.dir.path().join("layers")
    }

    fn dirs(&self, branch: usize) -> VolumeDirs {
        VolumeDirs { layers: self.layers(), branch: self.dir.path().join("branches").join(branch.to_string()) }
    }

    /// A new volume on a layer.
    fn volume(&self, branch: usize, base: LayerId) -> Arc<Volume> {
        let dirs = self.dirs(branch);
        Volume::create(&dirs, base).unwrap();
        Volume::open(&dirs).unwrap()
    }
}

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Thing {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
}

/// Everything in a volume by path, with its mode.
type Contents = BTreeMap<String, (Thing, u32)>;

fn contents(volume: &Volume) -> Contents {
    let mut all = Contents::new();
    walk(volume, ROOT_INO, "", &mut all);
    all
}

fn walk(volume: &Volume, directory: Ino, path: &str, all: &mut Contents) {
    let mut entries = Vec::new();
    let show = |name: &[u8], attr: &_| {
        entries.push((String::from_utf8(name.to_vec()).unwrap(), *attr));
        true
    };
    volume.core.list(directory, ROOT_INO, show).unwrap();
    for (name, attr) in entries {
        let path = format!("{path}/{name}");
        let thing = match attr.kind {
            AttrKind::Directory => {
                walk(volume, attr.ino, &path, all);
                Thing::Directory
            }
            AttrKind::File => Thing::File(read_all(volume, attr.ino)),
            AttrKind::Symlink => Thing::Symlink(volume.core.readlink(attr.ino).unwrap()),
        };
        all.insert(path, (thing, attr.mode));
    }
}

fn read_all(volume: &Volume, ino: Ino) -> Vec<u8> {
    let size = volume.core.getattr(ino).unwrap().size as usize;
    // Longer than the file, and not empty: what a read does not reach must not show.
    let mut bytes = vec![0xEE; size + 10];
    assert_eq!(volume.core.read(ino, 0, &mut bytes).unwrap(), size);
    bytes.truncate(size);
    bytes
}

/// Makes a file and gives back the reference to it.
fn create(volume: &Volume, name: &str) -> Ino {
    let ino = volume.core.create(ROOT_INO, name.as_bytes(), 0o600).unwrap().ino;
    volume.core.forget(ino, 1);
    ino
}

fn find(volume: &Volume, name: &str) -> Ino {
    let ino = volume.core.lookup(ROOT_INO, name.as_bytes()).unwrap().ino;
    volume.core.forget(ino, 1);
    ino
}

/// The names in a directory, sorted.
fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
