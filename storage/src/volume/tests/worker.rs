//! One of several who work in a volume at the same time: random operations in a directory of its own, what is seen of
//! them, and what may be found of them after the power was cut.
//!
//! After a cut, names must be as they were at some moment since the last sync of anything; and of each file, every 4 KiB
//! page as it was at some moment since that file's last sync.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::io::Errno;

use super::*;

const PAGE: usize = 4096;

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// What is in a directory, by path; files by number.
type Names = BTreeMap<String, (Named, u32)>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Named {
    Directory(Ino),
    File(Ino),
    Symlink(Vec<u8>),
}

/// How a file was since it was synced last; the present comes last.
#[derive(Debug, Clone)]
struct History {
    states: Vec<Vec<u8>>,
    /// Sizes it was cut to.
    cuts: Vec<usize>,
    /// Of a file that a sealed layer has: the size it was cut to, and the state then, if it did not grow since.
    pending: Option<(usize, usize)>,
    /// Cuts that are on disk, as the file has grown since: what was behind them does not show again.
    barriers: Vec<(usize, usize)>,
    in_layer: bool,
}

pub(super) struct Worker {
    dir: Ino,
    name: String,
    rng: StdRng,
    names: Vec<Names>,
    files: HashMap<Ino, History>,
    /// References to files, as the kernel has them.
    held: Vec<Ino>,
    /// Whether operations may fail for want of a disk that works.
    pub disk_may_fail: bool,
}

/// How an operation went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Went {
    On,
    /// The disk refused something.
    DiskFailed,
}

impl Worker {
    /// Makes its directory.
    pub(super) fn new(volume: &Volume, name: &str, seed: u64) -> Self {
        let dir = volume.core.mkdir(ROOT_INO, name.as_bytes(), 0o700).unwrap().ino;
        volume.core.forget(dir, 1);
        volume.core.sync_tree().unwrap();
        Self {
            dir,
            name: name.to_owned(),
            rng: StdRng::seed_from_u64(seed),
            names: vec![Names::new()],
            files: HashMap::new(),
            held: Vec::new(),
            disk_may_fail: false,
        }
    }

    fn see(&self, volume: &Volume) -> Names {
        let mut names = Names::new();
        see(volume, self.dir, "", &mut names);
        names
    }

    fn present(&self) -> &Names {
        self.names.last().expect("there is always a present")
    }

    /// A directory's path and number.
    fn a_directory(&mut self) -> (String, Ino) {
        let mut all = vec![(String::new(), self.dir)];
        all.extend(self.present().iter().filter_map(|(path, (named, _))| match named {
            Named::Directory(ino) => Some((path.clone(), *ino)),
            _ => None,
        }));
        all.swap_remove(self.rng.random_range(0..all.len()))
    }

    /// Some entry: the number of its directory, its name, and what it is.
    fn an_entry(&mut self) -> Option<(Ino, String, Named)> {
        let count = self.present().len();
        if count == 0 {
            return None;
        }
        let at = self.rng.random_range(0..count);
        let (path, (named, _)) = self.present().iter().nth(at)?;
        let (parent, name) = path.rsplit_once('/')?;
        let parent = match self.present().get(parent) {
            Some((Named::Directory(ino), _)) => *ino,
            _ => self.dir,
        };
        Some((parent, name.to_owned(), named.clone()))
    }

    /// A file that has a name or is held.
    fn a_file(&mut self) -> Option<Ino> {
        let named = self.present().values().filter_map(|(named, _)| match named {
            Named::File(ino) => Some(*ino),
            _ => None,
        });
        let all: Vec<_> = named.chain(self.held.iter().copied()).collect();
        (!all.is_empty()).then(|| all[self.rng.random_range(0..all.len())])
    }

    fn a_size(&mut self) -> usize {
        match self.rng.random_range(0..3) {
            0 => self.rng.random_range(0..6) * 8192,
            1 => self.rng.random_range(0..12) * PAGE,
            _ => self.rng.random_range(0..50_000),
        }
    }

    /// Does something, and checks what is seen of it.
    pub(super) fn step(&mut self, volume: &Volume) -> Went {
        match self.rng.random_range(0..100) {
            0..52 => self.change_contents(volume),
            52..84 => self.change_names(volume),
            84..94 => self.sync_file(volume),
            94..97 => self.sync_tree(volume),
            _ => self.hold_or_release(volume),
        }
    }

    fn change_names(&mut self, volume: &Volume) -> Went {
        let core = &volume.core;
        let name = NAMES[self.rng.random_range(0..NAMES.len())].as_bytes();
        let changed = match self.rng.random_range(0..32) {
            0..10 => {
                let (_, parent) = self.a_directory();
                let made = core.create(parent, name, 0o600);
                made.map(|attr| {
                    core.forget(attr.ino, 1);
                    self.files.insert(attr.ino, History::of(Vec::new(), false));
                })
            }
            10..13 => core.mkdir(self.a_directory().1, name, 0o750).map(|attr| core.forget(attr.ino, 1)),
            13 => core.symlink(self.a_directory().1, name, b"../wal").map(|attr| core.forget(attr.ino, 1)),
            14..20 => match self.an_entry() {
                Some((parent, name, Named::Directory(_))) => core.rmdir(parent, name.as_bytes()),
                Some((parent, name, _)) => core.unlink(parent, name.as_bytes()),
                None => return Went::On,
            },
            20..29 => {
                let Some((from, from_name, _)) = self.an_entry() else { return Went::On };
                core.rename(from, from_name.as_bytes(), self.a_directory().1, name, false)
            }
            _ => match self.an_entry() {
                Some((_, _, Named::File(ino) | Named::Directory(ino))) => {
                    core.set_mode(ino, self.rng.random_range(0..0o1000))
                }
                _ => return Went::On,
            },
        };
        let now = self.see(volume);
        match changed {
            Ok(()) => self.names.push(now),
            Err(errno) => {
                assert_eq!(now, *self.present(), "{errno}, and yet something changed");
                return self.failed(errno);
            }
        }
        Went::On
    }

    /// Whether an error is the disk's.
    fn failed(&self, errno: Errno) -> Went {
        if !matches!(errno, Errno::IO | Errno::NOSPC) {
            return Went::On;
        }
        assert!(self.disk_may_fail, "the disk works, and yet: {errno}");
        Went::DiskFailed
    }

    fn change_contents(&mut self, volume: &Volume) -> Went {
        let Some(ino) = self.a_file() else { return Went::On };
        let size = self.a_size();
        let before = self.files[&ino].present().clone();
        let mut after = before.clone();
        let changed = match self.rng.random_range(0..10) {
            0..2 => {
                after.resize(size, 0);
                volume.core.truncate(ino, size as u64)
            }
            2 => {
                after.resize(size.max(before.len()), 0);
                volume.core.allocate(ino, size as u64)
            }
            _ => {
                let length = [PAGE, 8192, 24_576, self.rng.random_range(1..20_000)][self.rng.random_range(0..4)];
                let mut bytes = vec![0; length];
                // Eight random bytes a page tell it from others; more would cost more than the volume does.
                bytes.chunks_mut(512).for_each(|chunk| chunk.fill(self.rng.random()));
                after.resize(before.len().max(size + length), 0);
                after[size..size + length].copy_from_slice(&bytes);
                volume.core.write(ino, size as u64, &bytes)
            }
        };
        match changed {
            Ok(()) => {
                assert!(try_read(volume, ino).is_none_or(|seen| seen == after), "file {ino} differs");
                self.history(ino).push(after);
                Went::On
            }
            Err(errno) => {
                // All of it may be on the disk, or a part.
                let seen = try_read(volume, ino);
                let history = self.history(ino);
                history.push_maybe(after);
                if let Some(seen) = seen {
                    history.states.push(before);
                    history.check(ino, &seen);
                    history.states.push(seen);
                }
                self.failed(errno)
            }
        }
    }

    fn history(&mut self, ino: Ino) -> &mut History {
        self.files.get_mut(&ino).expect("it was made here")
    }

    fn sync_file(&mut self, volume: &Volume) -> Went {
        let Some(ino) = self.a_file() else { return Went::On };
        match volume.core.sync_file(ino) {
            Ok(()) => {
                self.history(ino).synced();
                self.names_synced();
                Went::On
            }
            Err(errno) => self.failed(errno),
        }
    }

    fn sync_tree(&mut self, volume: &Volume) -> Went {
        match volume.core.sync_tree() {
            Ok(()) => {
                self.names_synced();
                Went::On
            }
            Err(errno) => self.failed(errno),
        }
    }

    fn names_synced(&mut self) {
        self.names.drain(..self.names.len() - 1);
    }

    fn hold_or_release(&mut self, volume: &Volume) -> Went {
        if self.held.len() > 2 {
            let ino = self.held.swap_remove(self.rng.random_range(0..self.held.len()));
            volume.core.forget(ino, 1);
        } else if let Some((parent, name, Named::File(_))) = self.an_entry() {
            self.held.push(volume.core.lookup(parent, name.as_bytes()).unwrap().ino);
        }
        Went::On
    }

    /// A seal has happened, though its layer is not complete. Answers somebody who knows what is in it.
    pub(super) fn seal_begun(&mut self) -> Self {
        self.names_synced();
        Self {
            dir: self.dir,
            name: self.name.clone(),
            rng: StdRng::seed_from_u64(0),
            names: self.names.clone(),
            files: self.files.clone(),
            held: Vec::new(),
            disk_may_fail: false,
        }
    }

    /// Everything so far is on the disk, in a layer.
    pub(super) fn sealed(&mut self) {
        self.names_synced();
        let named: Vec<_> = self
            .present()
            .values()
            .filter_map(|(named, _)| match named {
                Named::File(ino) => Some(*ino),
                _ => None,
            })
            .collect();
        for (ino, history) in &mut self.files {
            history.synced();
            history.in_layer |= named.contains(ino);
        }
    }

    /// Checks that the volume shows the present exactly.
    pub(super) fn check_present(&self, volume: &Volume) {
        assert_eq!(self.see(volume), *self.present());
        for (named, _) in self.present().values() {
            if let Named::File(ino) = named {
                assert!(read_all(volume, *ino) == *self.files[ino].present(), "file {ino} differs");
            }
        }
    }

    /// Checks what is found after the power was cut, and goes on from there.
    pub(super) fn found(&mut self, volume: &Volume) {
        let dir = volume.core.lookup(ROOT_INO, self.name.as_bytes()).unwrap().ino;
        volume.core.forget(dir, 1);
        assert_eq!(dir, self.dir);
        let found = self.see(volume);
        assert!(self.names.contains(&found), "never was it so:\n{found:#?}\nbut so:\n{:#?}", self.names);
        let mut files = HashMap::new();
        for (named, _) in found.values() {
            if let Named::File(ino) = named {
                let (bytes, history) = (read_all(volume, *ino), &self.files[ino]);
                history.check(*ino, &bytes);
                files.insert(*ino, History::of(bytes, history.in_layer));
            }
        }
        (self.names, self.files, self.held) = (vec![found], files, Vec::new());
    }
}

impl History {
    fn of(bytes: Vec<u8>, in_layer: bool) -> Self {
        Self { states: vec![bytes], cuts: Vec::new(), pending: None, barriers: Vec::new(), in_layer }
    }

    fn present(&self) -> &Vec<u8> {
        self.states.last().expect("there is always a present")
    }

    fn push(&mut self, bytes: Vec<u8>) {
        let (old, new) = (self.present().len(), bytes.len());
        self.push_maybe(bytes);
        if new < old && self.in_layer {
            let size = self.pending.map_or(new, |(size, _)| size.min(new));
            self.pending = Some((size, self.states.len() - 1));
        }
        if new > old
            && let Some(barrier) = self.pending.take()
        {
            self.barriers.push(barrier);
        }
    }

    /// Adds a state of which nobody was told that it is there.
    fn push_maybe(&mut self, bytes: Vec<u8>) {
        if bytes.len() < self.present().len() {
            self.cuts.push(bytes.len());
        }
        self.states.push(bytes);
    }

    fn synced(&mut self) {
        *self = Self::of(self.present().clone(), self.in_layer);
    }

    fn check(&self, ino: Ino, found: &[u8]) {
        let after = self.barriers.iter().map(|(_, state)| *state).max().unwrap_or(0);
        let sizes = || self.states[after..].iter().map(Vec::len);
        let (least, most) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
        assert!((least..=most).contains(&found.len()), "file {ino} of {} bytes, not {least} to {most}", found.len());
        for (number, page) in found.chunks(PAGE).enumerate() {
            assert!(self.allows(number, page), "page {number} of file {ino} was never so since it was synced");
        }
    }

    fn allows(&self, number: usize, page: &[u8]) -> bool {
        let start = number * PAGE;
        // Past the end of a file, and past a cut, are zeroes.
        let is = |state: &[u8], zero_from: usize| {
            let known = state.len().min(zero_from).saturating_sub(start).min(page.len());
            page[..known] == state[start.min(state.len())..][..known] && page[known..] == [0; PAGE][known..page.len()]
        };
        let begin = self.barriers.iter().filter(|(size, _)| *size < start + PAGE).map(|(_, state)| *state).max();
        let whole = self.states[begin.unwrap_or(0)..].iter().any(|state| is(state, usize::MAX));
        let is_cut = |cut: &usize| self.states.iter().any(|state| is(state, *cut));
        whole || self.cuts.iter().filter(|cut| **cut < start + PAGE).any(is_cut)
    }
}

fn see(volume: &Volume, directory: Ino, path: &str, names: &mut Names) {
    let mut entries = Vec::new();
    let show = |name: &[u8], attr: &super::super::core::Attr| {
        entries.push((String::from_utf8(name.to_vec()).unwrap(), *attr));
        true
    };
    volume.core.list(directory, ROOT_INO, show).unwrap();
    for (name, attr) in entries {
        let path = format!("{path}/{name}");
        let named = match attr.kind {
            AttrKind::Directory => {
                see(volume, attr.ino, &path, names);
                Named::Directory(attr.ino)
            }
            AttrKind::File => Named::File(attr.ino),
            AttrKind::Symlink => Named::Symlink(volume.core.readlink(attr.ino).unwrap()),
        };
        names.insert(path, (named, attr.mode));
    }
}

/// The contents, unless the disk does not answer.
fn try_read(volume: &Volume, ino: Ino) -> Option<Vec<u8>> {
    let mut bytes = vec![0xEE; volume.core.getattr(ino).unwrap().size as usize + 10];
    match volume.core.read(ino, 0, &mut bytes) {
        Ok(length) => {
            assert_eq!(length + 10, bytes.len());
            bytes.truncate(length);
            Some(bytes)
        }
        Err(Errno::IO) => None,
        Err(errno) => panic!("file {ino} cannot be read: {errno}"),
    }
}
