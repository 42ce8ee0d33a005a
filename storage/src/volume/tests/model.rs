//! Random histories of volumes, branches and crashes against a model of plain maps.

use std::collections::BTreeMap;
use std::sync::Arc;

use ebb_types::LayerId;
use proptest::prelude::*;

use super::*;

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

#[derive(Debug, Clone)]
enum Act {
    Create(u8, u8),
    Mkdir(u8, u8),
    Symlink(u8, u8),
    Write { file: u8, offset: u32, length: u32, fill: u8 },
    Truncate(u8, u32),
    Allocate(u8, u32),
    Unlink(u8),
    Rmdir(u8),
    Rename(u8, u8, u8),
    Mode(u8, u32),
    Sync(u8),
    Seal,
    Reopen,
    Branch(u8),
    Switch(u8),
}

fn offset() -> impl Strategy<Value = u32> {
    prop_oneof![(0..6_u32).prop_map(|block| block * 8192), (0..12_u32).prop_map(|page| page * 4096), 0..50_000_u32]
}

fn act() -> impl Strategy<Value = Act> {
    let any = any::<u8>;
    let length = prop_oneof![Just(8192_u32), Just(4096), Just(24576), 1..20_000_u32];
    prop_oneof![
        4 => (any(), any()).prop_map(|(d, n)| Act::Create(d, n)),
        1 => (any(), any()).prop_map(|(d, n)| Act::Mkdir(d, n)),
        1 => (any(), any()).prop_map(|(d, n)| Act::Symlink(d, n)),
        12 => (any(), offset(), length, any())
            .prop_map(|(file, offset, length, fill)| Act::Write { file, offset, length, fill }),
        4 => (any(), offset()).prop_map(|(f, size)| Act::Truncate(f, size)),
        1 => (any(), offset()).prop_map(|(f, size)| Act::Allocate(f, size)),
        2 => any().prop_map(Act::Unlink),
        1 => any().prop_map(Act::Rmdir),
        3 => (any(), any(), any()).prop_map(|(f, d, n)| Act::Rename(f, d, n)),
        1 => (any(), 0..0o1000_u32).prop_map(|(f, mode)| Act::Mode(f, mode)),
        2 => any().prop_map(Act::Sync),
        3 => Just(Act::Seal),
        3 => Just(Act::Reopen),
        1 => any().prop_map(Act::Branch),
        1 => any().prop_map(Act::Switch),
    ]
}

/// What the model knows of a volume.
#[derive(Debug, Clone, Default)]
struct Model {
    all: Contents,
    inos: BTreeMap<String, Ino>,
}

impl Model {
    fn directories(&self) -> Vec<String> {
        let directories = self.all.iter().filter(|(_, (thing, _))| *thing == Thing::Directory);
        std::iter::once(String::new()).chain(directories.map(|(path, _)| path.clone())).collect()
    }

    fn files(&self) -> Vec<String> {
        let files = self.all.iter().filter(|(_, (thing, _))| matches!(thing, Thing::File(_)));
        files.map(|(path, _)| path.clone()).collect()
    }

    fn ino(&self, path: &str) -> Ino {
        if path.is_empty() { ROOT_INO } else { self.inos[path] }
    }

    fn bytes(&mut self, path: &str) -> &mut Vec<u8> {
        match self.all.get_mut(path) {
            Some((Thing::File(bytes), _)) => bytes,
            other => panic!("{path} is {other:?}"),
        }
    }

    fn is_empty_directory(&self, path: &str) -> bool {
        !self.all.keys().any(|other| other.starts_with(&format!("{path}/")))
    }

    fn remove(&mut self, path: &str) {
        self.all.remove(path);
        self.inos.remove(path);
    }

    /// Moves an entry and what is below it.
    fn rename(&mut self, from: &str, to: &str) {
        let below = format!("{from}/");
        let moved: Vec<_> = self.all.keys().filter(|path| *path == from || path.starts_with(&below)).cloned().collect();
        for path in moved {
            let target = format!("{to}{}", &path[from.len()..]);
            let (thing, ino) = (self.all.remove(&path).unwrap(), self.inos.remove(&path).unwrap());
            self.all.insert(target.clone(), thing);
            self.inos.insert(target, ino);
        }
    }
}

struct Run {
    node: Node,
    branches: Vec<(Option<Arc<Volume>>, Model)>,
    now: usize,
    sealed: Vec<(LayerId, Model)>,
}

fn pick(list: &[String], at: u8) -> Option<String> {
    (!list.is_empty()).then(|| list[at as usize % list.len()].clone())
}

impl Run {
    fn new() -> Self {
        let node = Node::new();
        let first = node.volume(0, node.empty);
        let sealed = vec![(node.empty, Model::default())];
        Self { node, branches: vec![(Some(first), Model::default())], now: 0, sealed }
    }

    fn volume(&self) -> Arc<Volume> {
        self.branches[self.now].0.clone().unwrap()
    }

    fn make(&mut self, directory: u8, name: u8, thing: Thing) {
        let volume = self.volume();
        let model = &mut self.branches[self.now].1;
        let parent = pick(&model.directories(), directory).unwrap();
        let name = NAMES[name as usize % NAMES.len()];
        let path = format!("{parent}/{name}");
        let (ino, name) = (model.ino(&parent), name.as_bytes());
        let (made, mode) = match &thing {
            Thing::Directory => (volume.core.mkdir(ino, name, 0o750), 0o750),
            Thing::File(_) => (volume.core.create(ino, name, 0o640), 0o640),
            Thing::Symlink(target) => (volume.core.symlink(ino, name, target), 0o777),
        };
        assert_eq!(made.is_err(), model.all.contains_key(&path), "making {path}");
        if let Ok(attr) = made {
            volume.core.forget(attr.ino, 1);
            model.inos.insert(path.clone(), attr.ino);
            model.all.insert(path, (thing, mode));
        }
    }

    fn rename(&mut self, from: u8, directory: u8, name: u8) {
        let volume = self.volume();
        let model = &mut self.branches[self.now].1;
        let all: Vec<_> = model.all.keys().cloned().collect();
        let Some(from) = pick(&all, from) else { return };
        let parent = pick(&model.directories(), directory).unwrap();
        let name = NAMES[name as usize % NAMES.len()];
        let to = format!("{parent}/{name}");
        let (from_parent, from_name) = from.rsplit_once('/').unwrap();
        let renamed = volume.core.rename(
            model.ino(from_parent),
            from_name.as_bytes(),
            model.ino(&parent),
            name.as_bytes(),
            false,
        );
        let is_directory = |model: &Model, path: &str| model.all.get(path).map(|(thing, _)| *thing == Thing::Directory);
        let possible = from == to
            || match (is_directory(model, &from).unwrap(), is_directory(model, &to)) {
                (true, _) if format!("{to}/").starts_with(&format!("{from}/")) => false,
                (true, Some(true)) => model.is_empty_directory(&to),
                (true, Some(false)) | (false, Some(true)) => false,
                (_, None) | (false, Some(false)) => true,
            };
        assert_eq!(renamed.is_ok(), possible, "renaming {from} to {to}: {renamed:?}");
        if possible && from != to {
            model.remove(&to);
            model.rename(&from, &to);
        }
    }

    fn act(&mut self, act: &Act) {
        let volume = self.volume();
        let model = &mut self.branches[self.now].1;
        let file = |model: &Model, at: u8| pick(&model.files(), at);
        match *act {
            Act::Create(directory, name) => self.make(directory, name, Thing::File(Vec::new())),
            Act::Mkdir(directory, name) => self.make(directory, name, Thing::Directory),
            Act::Symlink(directory, name) => self.make(directory, name, Thing::Symlink(b"../wal".to_vec())),
            Act::Write { file: at, offset, length, fill } => {
                let Some(path) = file(model, at) else { return };
                let written: Vec<u8> = (0..length).map(|n| fill.wrapping_add((n / 512) as u8) | 1).collect();
                volume.core.write(model.ino(&path), offset.into(), &written).unwrap();
                let bytes = model.bytes(&path);
                let end = (offset + length) as usize;
                bytes.resize(bytes.len().max(end), 0);
                bytes[offset as usize..end].copy_from_slice(&written);
                self.check_file(&path);
            }
            Act::Truncate(at, size) => {
                let Some(path) = file(model, at) else { return };
                volume.core.truncate(model.ino(&path), size.into()).unwrap();
                model.bytes(&path).resize(size as usize, 0);
                self.check_file(&path);
            }
            Act::Allocate(at, size) => {
                let Some(path) = file(model, at) else { return };
                volume.core.allocate(model.ino(&path), size.into()).unwrap();
                let bytes = model.bytes(&path);
                bytes.resize(bytes.len().max(size as usize), 0);
                self.check_file(&path);
            }
            Act::Unlink(at) => {
                let Some(path) = file(model, at) else { return };
                let (parent, name) = path.rsplit_once('/').unwrap();
                volume.core.unlink(model.ino(parent), name.as_bytes()).unwrap();
                model.remove(&path);
            }
            Act::Rmdir(at) => {
                let Some(path) = pick(&model.directories()[1..], at) else { return };
                let (parent, name) = path.rsplit_once('/').unwrap();
                let removed = volume.core.rmdir(model.ino(parent), name.as_bytes());
                assert_eq!(removed.is_ok(), model.is_empty_directory(&path));
                if removed.is_ok() {
                    model.remove(&path);
                }
            }
            Act::Rename(from, directory, name) => self.rename(from, directory, name),
            Act::Mode(at, mode) => {
                let Some(path) = file(model, at) else { return };
                volume.core.set_mode(model.ino(&path), mode).unwrap();
                model.all.get_mut(&path).unwrap().1 = mode;
            }
            Act::Sync(at) => {
                let Some(path) = file(model, at) else { return };
                volume.core.sync_file(model.ino(&path)).unwrap();
            }
            Act::Seal => self.seal(),
            Act::Reopen => {
                drop(volume);
                self.reopen();
            }
            Act::Branch(at) => {
                let (layer, model) = self.sealed[at as usize % self.sealed.len()].clone();
                let volume = self.node.volume(self.branches.len(), layer);
                self.now = self.branches.len();
                self.branches.push((Some(volume), model));
            }
            Act::Switch(at) => self.now = at as usize % self.branches.len(),
        }
    }

    fn seal(&mut self) {
        let dirty = self.volume().is_dirty();
        let id = LayerId::generate();
        let sealed = self.volume().seal(id).unwrap();
        assert_eq!(sealed.new, dirty);
        assert_eq!(sealed.new, sealed.layer == id);
        assert_eq!(self.volume().base(), sealed.layer);
        if sealed.new {
            assert_eq!(self.volume().seal(id).unwrap(), sealed, "the same id again is the same seal");
            self.sealed.push((sealed.layer, self.branches[self.now].1.clone()));
        }
        assert!(!self.volume().is_dirty());
    }

    /// As a killed process: everything it wrote is in files, and nothing is flushed.
    fn reopen(&mut self) {
        let base = self.volume().base();
        let dirty = self.volume().is_dirty();
        self.branches[self.now].0 = None;
        self.branches[self.now].0 = Some(Volume::open(&self.node.dirs(self.now)).unwrap());
        assert_eq!(self.volume().base(), base);
        assert_eq!(self.volume().is_dirty(), dirty);
        self.check();
    }

    fn check_file(&mut self, path: &str) {
        let volume = self.volume();
        let model = &mut self.branches[self.now].1;
        let ino = model.ino(path);
        assert!(read_all(&volume, ino) == *model.bytes(path), "{path} differs");
    }

    fn check(&self) {
        assert_eq!(contents(&self.volume()), self.branches[self.now].1.all);
    }

    /// Every branch is what its own history made it, and every layer what it was when it was sealed.
    fn check_all(mut self) {
        for branch in 0..self.branches.len() {
            self.now = branch;
            self.check();
            self.reopen();
        }
        for (layer, model) in &self.sealed {
            let branch = self.branches.len();
            let volume = self.node.volume(branch, *layer);
            assert_eq!(contents(&volume), model.all, "layer {layer}");
            assert!(!volume.is_dirty());
            drop(volume);
            Volume::remove(&self.node.dirs(branch)).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_volume_equals_plain_maps_through_seals_crashes_and_branches(acts in prop::collection::vec(act(), 1..80)) {
        let mut run = Run::new();
        for act in &acts {
            run.act(act);
        }
        run.check_all();
    }
}
