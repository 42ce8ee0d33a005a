//! Random histories of volumes, branches and crashes against a model of plain maps.

use std::collections::BTreeMap;
use std::sync::Arc;

use ebb_types::LayerId;
use proptest::prelude::*;

use super::super::compact::Limits;
use super::compact::AtOnce;
use super::*;

/// LIMIT: of each kind in a normal run, together with the other tests of this kind well under a minute.
const CASES: u64 = 5000;

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

#[derive(Debug, Clone)]
enum Act {
    Create(u8, u8),
    Mkdir(u8, u8),
    Symlink(u8, u8),
    Write {
        file: u8,
        offset: u32,
        length: u32,
        fill: u8,
    },
    Truncate(u8, u32),
    Allocate(u8, u32),
    Unlink(u8),
    Rmdir(u8),
    Rename(u8, u8, u8),
    Mode(u8, u32),
    Sync(u8),
    /// The kernel keeps a file open: it outlives its name, but not the volume.
    Hold(u8),
    WriteHeld {
        held: u8,
        offset: u32,
        length: u32,
        fill: u8,
    },
    TruncateHeld(u8, u32),
    Release(u8),
    Seal,
    /// Layers are emptied until so many are left, or so much was copied.
    Compact(u8, u8),
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
        2 => any().prop_map(Act::Hold),
        2 => (any(), offset(), 1..20_000_u32, any())
            .prop_map(|(held, offset, length, fill)| Act::WriteHeld { held, offset, length, fill }),
        1 => (any(), offset()).prop_map(|(held, size)| Act::TruncateHeld(held, size)),
        1 => any().prop_map(Act::Release),
        3 => Just(Act::Seal),
        2 => (any(), any()).prop_map(|(layers, copies)| Act::Compact(layers, copies)),
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
    /// Files that the kernel has open, as often as they are listed.
    held: Vec<Ino>,
    /// Those among them that have no name any more.
    orphans: BTreeMap<Ino, Vec<u8>>,
    /// Whether one of these was changed since the last seal: that alone makes a volume dirty, until it is closed.
    orphans_changed: bool,
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
        let (thing, ino) = (self.all.remove(path), self.inos.remove(path));
        if let (Some((Thing::File(bytes), _)), Some(ino)) = (thing, ino)
            && self.held.contains(&ino)
        {
            self.orphans.insert(ino, bytes);
        }
    }

    /// The contents of a file that is held.
    fn held_bytes(&mut self, ino: Ino) -> &mut Vec<u8> {
        match self.inos.iter().find(|(_, other)| **other == ino).map(|(path, _)| path.clone()) {
            Some(path) => self.bytes(&path),
            None => self.orphans.get_mut(&ino).expect("it is held"),
        }
    }

    fn held_changed(&mut self, ino: Ino) {
        self.orphans_changed |= self.orphans.contains_key(&ino);
    }

    /// What another volume, or this one when it is opened again, knows.
    fn of_image(&self) -> Self {
        Self { held: Vec::new(), orphans: BTreeMap::new(), orphans_changed: false, ..self.clone() }
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

fn overwrite(bytes: &mut Vec<u8>, offset: usize, written: &[u8]) {
    let end = offset + written.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[offset..end].copy_from_slice(written);
}

fn pick<T: Clone>(list: &[T], at: u8) -> Option<T> {
    (!list.is_empty()).then(|| list[at as usize % list.len()].clone())
}

impl Run {
    fn new() -> Self {
        let node = Node::in_memory();
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
                let mut written = vec![0; length as usize];
                written.chunks_mut(512).zip(0..).for_each(|(chunk, n)| chunk.fill(fill.wrapping_add(n) | 1));
                volume.core.write(model.ino(&path), offset.into(), &written).unwrap();
                overwrite(model.bytes(&path), offset as usize, &written);
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
            Act::Hold(at) => {
                let Some(path) = file(model, at) else { return };
                let (parent, name) = path.rsplit_once('/').unwrap();
                let ino = volume.core.lookup(model.ino(parent), name.as_bytes()).unwrap().ino;
                model.held.push(ino);
            }
            Act::WriteHeld { held, offset, length, fill } => {
                let Some(ino) = pick(&model.held, held) else { return };
                let written = vec![fill | 1; length as usize];
                volume.core.write(ino, offset.into(), &written).unwrap();
                overwrite(model.held_bytes(ino), offset as usize, &written);
                model.held_changed(ino);
                assert!(read_all(&volume, ino) == *model.held_bytes(ino), "held file {ino} differs");
            }
            Act::TruncateHeld(held, size) => {
                let Some(ino) = pick(&model.held, held) else { return };
                volume.core.truncate(ino, size.into()).unwrap();
                model.held_bytes(ino).resize(size as usize, 0);
                model.held_changed(ino);
                assert!(read_all(&volume, ino) == *model.held_bytes(ino), "held file {ino} differs");
            }
            Act::Release(held) => {
                let Some(ino) = pick(&model.held, held) else { return };
                model.held.remove(held as usize % model.held.len());
                volume.core.forget(ino, 1);
                if !model.held.contains(&ino) && model.orphans.remove(&ino).is_some() {
                    assert!(volume.core.getattr(ino).is_err(), "file {ino} outlives its last user");
                }
            }
            Act::Seal => self.seal(),
            Act::Compact(layers, copies) => {
                let limits = Limits { layers: layers as usize % 4, bytes: u64::MAX };
                volume.compact(&limits, &mut AtOnce { copies: u32::from(copies) }).unwrap();
                self.check();
            }
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
            self.sealed.push((sealed.layer, self.branches[self.now].1.of_image()));
        }
        assert!(!self.volume().is_dirty());
        self.branches[self.now].1.orphans_changed = false;
    }

    /// As a killed process: everything it wrote is in files, and nothing is flushed.
    fn reopen(&mut self) {
        let base = self.volume().base();
        let dirty = self.volume().is_dirty();
        let orphans_changed = self.branches[self.now].1.orphans_changed;
        self.branches[self.now].0 = None;
        self.branches[self.now].0 = Some(Volume::open(&self.node.dirs(self.now)).unwrap());
        self.branches[self.now].1 = self.branches[self.now].1.of_image();
        assert_eq!(self.volume().base(), base);
        assert!(self.volume().is_dirty() == dirty || dirty && orphans_changed);
        self.check();
    }

    fn check_file(&mut self, path: &str) {
        let volume = self.volume();
        let model = &mut self.branches[self.now].1;
        let ino = model.ino(path);
        assert!(read_all(&volume, ino) == *model.bytes(path), "{path} differs");
    }

    fn check(&self) {
        let (volume, model) = (self.volume(), &self.branches[self.now].1);
        assert_same(&contents(&volume), &model.all, "the volume");
        for (ino, bytes) in &model.orphans {
            assert_eq!(volume.core.getattr(*ino).unwrap().links, 0);
            assert!(read_all(&volume, *ino) == *bytes, "orphan {ino} differs");
        }
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
            assert_same(&contents(&volume), &model.all, &format!("layer {layer}"));
            assert!(!volume.is_dirty());
            drop(volume);
            Volume::remove(&self.node.dirs(branch)).unwrap();
        }
    }
}

fn run(acts: &[Act]) {
    let mut run = Run::new();
    for act in acts {
        run.act(act);
    }
    run.check_all();
}

#[test]
fn a_volume_equals_plain_maps_through_seals_crashes_and_branches() {
    cases(CASES, prop::collection::vec(act(), 1..80), |acts| run(&acts));
}

/// Many seals with little between them, and many branches of them: long chains, and several branches of one layer that
/// go on side by side.
#[test]
fn many_seals_and_branches_keep_to_themselves() {
    let act = prop_oneof![
        6 => act(),
        2 => Just(Act::Seal),
        1 => any::<u8>().prop_map(Act::Branch),
        2 => any::<u8>().prop_map(Act::Switch),
    ];
    cases(CASES, prop::collection::vec(act, 1..60), |acts| run(&acts));
}

/// One line of history of hundreds of layers: every page in any of them, and branches from everywhere in it.
#[test]
fn a_chain_of_hundreds_of_layers_reads_as_one() {
    let quiet = act().prop_filter("a line does not branch", |act| {
        !matches!(act, Act::Branch(_) | Act::Switch(_) | Act::Seal | Act::Reopen)
    });
    let step = (prop::collection::vec(quiet, 1..4), any::<u8>());
    cases(2, prop::collection::vec(step, 300), |steps| {
        let mut run = Run::new();
        for (acts, dice) in steps {
            acts.iter().for_each(|act| run.act(act));
            run.act(&Act::Seal);
            if dice < 10 {
                run.act(&Act::Reopen);
            }
        }
        run.sealed.retain(|(layer, _)| layer.as_bytes()[15] % 8 == 0);
        run.check_all();
    });
}
