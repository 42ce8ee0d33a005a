//! Tests of the volume: against a model, through crashes, and through a real mount.

mod behaviour;
mod compact;
mod crash;
mod lazy;
mod model;
mod mount;
mod posix;
mod postgres;
mod power;
mod threads;
mod worker;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_types::{LayerId, Lsn};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::core::AttrKind;
use super::{Volume, VolumeDirs};
use crate::layer::{ImageInfo, Ino, Inode, InodeKind, Manifest, ROOT_INO};

/// The seeds of a test's cases: `EBB_TEST_SEED` alone, or `EBB_TEST_CASES` (else `default`) new ones.
fn seeds(default: u64) -> impl Iterator<Item = u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let (first, count) = match number("EBB_TEST_SEED") {
        Some(seed) => (seed, 1),
        None => (rand::random::<u64>() >> 16, number("EBB_TEST_CASES").unwrap_or(default)),
    };
    first..first + count
}

/// Checks a property on many values, each from a seed of its own. A failure names the seed, and the smallest value found
/// that fails.
fn cases<T: Debug>(default: u64, values: impl Strategy<Value = T>, property: impl Fn(T)) {
    for seed in seeds(default) {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config { cases: 1, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let checked = runner.run(&values, |value| {
            property(value);
            Ok(())
        });
        if let Err(error) = checked {
            panic!("EBB_TEST_SEED={seed}: {error}");
        }
    }
}

/// A node's directory with an empty layer in it.
struct Node {
    dir: tempfile::TempDir,
    empty: LayerId,
}

impl Node {
    fn new() -> Self {
        Self::in_dir(tempfile::tempdir().unwrap())
    }

    /// In memory, where syncs cost nothing, if this machine has such a place.
    fn in_memory() -> Self {
        Self::in_dir(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
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
        VolumeDirs {
            layers: self.layers(),
            branch: self.dir.path().join("branches").join(branch.to_string()),
            source: None,
        }
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

/// Fails with the paths that differ; their contents would fill a book.
fn assert_same(found: &Contents, expected: &Contents, what: &str) {
    let differs = |path: &&String| found.get(*path) != expected.get(*path);
    let all: std::collections::BTreeSet<&String> = found.keys().chain(expected.keys()).filter(differs).collect();
    let short = |contents: &Contents, path: &String| match contents.get(path) {
        Some((Thing::File(bytes), mode)) => format!("{} bytes, mode {mode:o}", bytes.len()),
        other => format!("{other:?}"),
    };
    let told: Vec<_> =
        all.iter().map(|path| format!("{path}: {}, not {}", short(found, path), short(expected, path))).collect();
    assert!(all.is_empty(), "{what}: {told:#?}");
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
