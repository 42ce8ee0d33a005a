//! Compaction: what it is for, and that nobody notices it.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::super::compact::{Compacted, Compactor, Limits, Pace};
use super::super::seal::read_manifest;
use super::*;
use crate::layer::Manifest;

const PAGE: usize = 8192;

/// As fast as it can be, for so many copies.
pub(super) struct AtOnce {
    pub copies: u32,
}

impl Pace for AtOnce {
    fn goes_on(&mut self) -> bool {
        self.copies = self.copies.saturating_sub(1);
        self.copies > 0
    }

    fn rest(&mut self, _: u64) {}
}

/// Compacts down to so many layers.
pub(super) fn compact(volume: &Volume, layers: usize) -> Compacted {
    let limits = Limits { layers, bytes: u64::MAX };
    volume.compact(&limits, &mut AtOnce { copies: u32::MAX }).unwrap()
}

fn manifest(node: &Node, layer: LayerId) -> Manifest {
    read_manifest(&node.layers(), layer).unwrap()
}

/// Files that are written to all over, and what is in them.
struct WorkingSet {
    files: Vec<(Ino, Vec<u8>)>,
    rng: StdRng,
    /// Pages written, in part or whole.
    pages: u64,
}

impl WorkingSet {
    fn new(volume: &Volume, pages: usize) -> Self {
        let make = |n: u8| {
            let (ino, bytes) = (create(volume, &format!("{n}")), vec![n; pages * PAGE - 100]);
            volume.core.write(ino, 0, &bytes).unwrap();
            (ino, bytes)
        };
        Self { files: (1..5).map(make).collect(), rng: StdRng::seed_from_u64(7), pages: 0 }
    }

    /// Writes some of it, here and there.
    fn work(&mut self, volume: &Volume) {
        for _ in 0..self.rng.random_range(1..6) {
            let at = self.rng.random_range(0..self.files.len());
            let (ino, bytes) = &mut self.files[at];
            let offset = self.rng.random_range(0..bytes.len() - 1);
            let end = bytes.len().min(offset + self.rng.random_range(1..2 * PAGE));
            bytes[offset..end].fill(self.rng.random());
            self.pages += (end.div_ceil(PAGE) - offset / PAGE) as u64;
            volume.core.write(*ino, offset as u64, &bytes[offset..end]).unwrap();
        }
    }

    fn check(&self, volume: &Volume) {
        for (ino, bytes) in &self.files {
            assert!(read_all(volume, *ino) == *bytes, "file {ino} differs");
        }
    }
}

/// A volume on a chain of many layers with a few pages each.
fn deep(node: &Node, layers: usize) -> (Arc<Volume>, WorkingSet) {
    let volume = node.volume(0, node.empty);
    let mut set = WorkingSet::new(&volume, 40);
    for _ in 0..layers {
        set.work(&volume);
        volume.seal(LayerId::generate()).unwrap();
    }
    (volume, set)
}

#[test]
fn a_working_set_keeps_the_chain_short_for_ever() {
    let node = Node::in_memory();
    let mut volume = node.volume(0, node.empty);
    let mut set = WorkingSet::new(&volume, 100);
    let (mut deepest, mut copied) = (0, 0);
    for round in 0..300 {
        set.work(&volume);
        copied += compact(&volume, 8).pages;
        let layer = volume.seal(LayerId::generate()).unwrap().layer;
        deepest = deepest.max(manifest(&node, layer).chain.len());
        set.check(&volume);
        if round % 17 == 0 {
            drop(volume);
            volume = Volume::open(&node.dirs(0)).unwrap();
            set.check(&volume);
        }
        if round % 50 == 49 {
            let image = node.volume(round, layer);
            set.check(&image);
        }
    }
    assert_eq!(deepest, 9, "the bound, and the layer just sealed");
    // The bound is small, and so the copies are many.
    assert!(copied < 4 * set.pages, "{copied} pages were copied, {} written", set.pages);
}

#[test]
fn without_it_the_chain_grows() {
    let node = Node::in_memory();
    let (volume, _) = deep(&node, 60);
    assert!(manifest(&node, volume.base()).chain.len() > 40);
}

#[test]
fn emptied_layers_are_not_needed_any_more() {
    let node = Node::in_memory();
    let (volume, mut set) = deep(&node, 40);
    let before = manifest(&node, volume.base());
    let compacted = compact(&volume, 6);
    assert_eq!((compacted.before, compacted.layers), (before.chain.len(), 3));
    assert!(volume.is_dirty(), "the copies are in no layer yet");
    let layer = volume.seal(LayerId::generate()).unwrap().layer;
    let after = manifest(&node, layer);
    assert_eq!(after.chain.len(), 4);
    assert_eq!(after.image, before.image);
    for gone in before.chain.iter().filter(|gone| !after.chain.contains(gone)) {
        std::fs::remove_dir_all(node.layers().join(gone.to_string())).unwrap();
    }
    set.check(&volume);
    set.work(&volume);
    set.check(&volume);
    let mut image = node.volume(1, layer);
    assert!(!image.is_dirty());
    let further = image.seal(LayerId::generate()).unwrap();
    assert_eq!((further.layer, further.new), (layer, false));
    drop(image);
    image = Volume::open(&node.dirs(1)).unwrap();
    assert_eq!(contents(&image).len(), set.files.len());
    drop(volume);
    set.check(&Volume::open(&node.dirs(0)).unwrap());
}

#[test]
fn a_layer_of_copies_is_like_any_other() {
    let node = Node::in_memory();
    let (volume, set) = deep(&node, 30);
    compact(&volume, 4);
    let head = volume.seal(LayerId::generate()).unwrap().layer;
    let (bucket_dir, cold) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let bucket = crate::object_store::open(bucket_dir.path().to_str().unwrap()).await.unwrap();
        let store = crate::node::NodeStore::new(node.dir.path(), bucket.clone());
        for layer in store.chain(head).await.unwrap() {
            store.upload(layer).await.unwrap();
            let differences = crate::layer::compare(&bucket, layer, &node.layers().join(layer.to_string())).await;
            assert_eq!(differences.unwrap(), Vec::<String>::new());
        }
        let other = crate::node::NodeStore::new(cold.path(), bucket);
        other.ensure_local(head).await.unwrap();
        assert_eq!(other.local_layers().await.unwrap(), manifest(&node, head).chain.iter().copied().collect());
    });
    let looked = super::super::look(&node.dirs(0)).unwrap();
    assert_eq!(looked.faults, [super::super::Fault::Open]);
    drop(volume);
    // There is no Postgres, and no WAL.
    let is_other = |fault: &super::super::Fault| !matches!(fault, super::super::Fault::Missing { path, .. } if path.starts_with(node.dirs(0).wal()));
    assert!(!super::super::look(&node.dirs(0)).unwrap().faults.iter().any(is_other));
    let there = VolumeDirs { layers: cold.path().join("layers"), branch: cold.path().join("branch"), source: None };
    Volume::create(&there, head).unwrap();
    set.check(&Volume::open(&there).unwrap());
}

#[test]
fn a_kill_after_any_copy_changes_nothing() {
    let node = Node::in_memory();
    let (mut volume, mut set) = deep(&node, 25);
    let before = manifest(&node, volume.base()).chain.len();
    let mut copies = 1;
    loop {
        let limits = Limits { layers: 2, bytes: u64::MAX };
        let compacted = volume.compact(&limits, &mut AtOnce { copies }).unwrap();
        drop(volume);
        volume = Volume::open(&node.dirs(0)).unwrap();
        set.check(&volume);
        if compacted.layers <= 2 {
            break;
        }
        assert!(copies > 1 || compacted.pages == 0);
        copies = copies % 6 + 1;
        if copies == 3 {
            set.work(&volume);
        }
    }
    let layer = volume.seal(LayerId::generate()).unwrap().layer;
    assert!(manifest(&node, layer).chain.len() <= 3 && before > 20);
    set.check(&node.volume(1, layer));
}

/// Any part of the copies may have reached the disk when the power goes; so may part of a page.
#[test]
fn copies_that_were_lost_in_a_power_cut_show_what_is_below() {
    for seed in 0..20 {
        let node = Node::in_memory();
        let (volume, set) = deep(&node, 12);
        compact(&volume, 1);
        let number = volume.core.uppers().0.number;
        drop(volume);
        let data = node.dirs(0).branch.join("uppers").join(number.to_string()).join("data");
        let mut rng = StdRng::seed_from_u64(seed);
        for name in names_in(&data) {
            let file = std::fs::OpenOptions::new().write(true).open(data.join(name)).unwrap();
            let length = file.metadata().unwrap().len();
            for at in (0..length).step_by(4096).filter(|_| rng.random()) {
                let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, flags, at, 4096).unwrap();
            }
        }
        let volume = Volume::open(&node.dirs(0)).unwrap();
        set.check(&volume);
        let layer = volume.seal(LayerId::generate()).unwrap().layer;
        set.check(&node.volume(1, layer));
    }
}

#[test]
fn a_turn_copies_no_more_than_it_may_and_the_next_one_goes_on() {
    let node = Node::in_memory();
    let (volume, set) = deep(&node, 30);
    let limits = Limits { layers: 2, bytes: 3 * PAGE as u64 };
    let mut layers = usize::MAX;
    for _ in 0..1000 {
        let compacted = volume.compact(&limits, &mut AtOnce { copies: u32::MAX }).unwrap();
        assert!((1..=3).contains(&compacted.pages), "{compacted:?}");
        assert!(compacted.layers <= layers);
        layers = compacted.layers;
        if layers <= 2 {
            break;
        }
    }
    assert!(layers <= 2);
    set.check(&volume);
}

#[test]
fn files_that_are_gone_and_files_that_were_cut_leave_nothing() {
    let node = Node::in_memory();
    let (volume, mut set) = deep(&node, 20);
    let (gone, _) = set.files.remove(0);
    let held = volume.core.lookup(ROOT_INO, b"1").unwrap().ino;
    assert_eq!(held, gone);
    let before = read_all(&volume, held);
    volume.core.unlink(ROOT_INO, b"1").unwrap();
    let (cut, bytes) = &mut set.files[0];
    bytes.truncate(5 * PAGE + 77);
    volume.core.truncate(*cut, bytes.len() as u64).unwrap();
    bytes.resize(20 * PAGE, 0);
    volume.core.truncate(*cut, bytes.len() as u64).unwrap();
    compact(&volume, 1);
    set.check(&volume);
    assert!(read_all(&volume, held) == before, "whoever has it open reads on");
    let data = node.dirs(0).branch.join(format!("uppers/{}/data", volume.core.uppers().0.number));
    assert!(!names_in(&data).contains(&gone.to_string()));
    let layer = volume.seal(LayerId::generate()).unwrap().layer;
    set.check(&node.volume(1, layer));
    volume.core.forget(held, 1);
    drop(volume);
    set.check(&Volume::open(&node.dirs(0)).unwrap());
}

/// Whole pages, written at the same time as they are copied.
#[test]
fn what_is_written_meanwhile_is_never_covered_by_what_was_there_before() {
    const PAGES: usize = 24;
    let node = Node::in_memory();
    let volume = node.volume(0, node.empty);
    let inos: Vec<_> = (0..3).map(|n| create(&volume, &format!("{n}"))).collect();
    inos.iter().for_each(|ino| volume.core.write(*ino, 0, &[0; PAGES * PAGE]).unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (volume, inos, stop) = (&volume, &inos, &stop);
            scope.spawn(move || {
                // Each thread has pages of its own in the same files.
                for round in 1_u64.. {
                    for page in (thread..PAGES).step_by(4) {
                        for ino in inos {
                            let bytes = [round as u8; PAGE];
                            volume.core.write(*ino, (page * PAGE) as u64, &bytes).unwrap();
                            let mut found = [0; PAGE];
                            volume.core.read(*ino, (page * PAGE) as u64, &mut found).unwrap();
                            assert!(found == bytes, "page {page} of file {ino} in round {round}");
                        }
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                compact(&volume, 0);
            }
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            volume.seal(LayerId::generate()).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn layers_that_are_let_go_are_not_locked_any_more() {
    for reopened in [false, true] {
        check_locks(reopened);
    }
}

/// Layers that were below when the volume was opened, or that it sealed itself.
fn check_locks(reopened: bool) {
    let node = Node::in_memory();
    let (mut volume, set) = deep(&node, 20);
    if reopened {
        drop(volume);
        volume = Volume::open(&node.dirs(0)).unwrap();
    }
    set.check(&volume);
    let chain = manifest(&node, volume.base()).chain;
    let is_locked = |layer: &LayerId| {
        let data = std::fs::File::open(node.layers().join(layer.to_string()).join("data")).unwrap();
        rustix::fs::flock(&data, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err()
    };
    assert!(chain.iter().all(is_locked));
    compact(&volume, 6);
    let after = volume.seal(LayerId::generate()).unwrap().layer;
    let needed: BTreeSet<_> = manifest(&node, after).chain.into_iter().collect();
    assert!(chain.iter().all(|layer| is_locked(layer) == needed.contains(layer)));
    set.check(&volume);
}

#[test]
fn an_error_in_a_turn_leaves_everything_as_it_was() {
    let node = Node::in_memory();
    let (volume, set) = deep(&node, 20);
    let upper = node.dirs(0).branch.join(format!("uppers/{}/data", volume.core.uppers().0.number));
    // A directory in the way of the first data file that is made.
    for (ino, _) in &set.files {
        std::fs::create_dir(upper.join(format!("{ino}.new"))).unwrap();
    }
    let limits = Limits { layers: 2, bytes: u64::MAX };
    assert!(volume.compact(&limits, &mut AtOnce { copies: u32::MAX }).is_err());
    set.check(&volume);
    for (ino, _) in &set.files {
        std::fs::remove_dir(upper.join(format!("{ino}.new"))).unwrap();
    }
    assert_eq!(compact(&volume, 2).layers, 1);
    set.check(&volume);
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_mounted_volume_is_compacted_by_itself_once_postgres_is_up() {
    let node = Node::new();
    let (volume, mut set) = deep(&node, 30);
    let limits = Limits { layers: 4, bytes: 64 << 20 };
    let copied = |volume: &Volume| volume.core.uppers().0.is_dirty();
    let compactor = Compactor::start_with(&volume, limits, Duration::ZERO).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!copied(&volume), "a wake comes first");
    volume.booted();
    wait_for("copies", || copied(&volume));
    wait_for("a short chain", || {
        let layer = volume.seal(LayerId::generate()).unwrap().layer;
        manifest(&node, layer).chain.len() <= 5
    });
    for _ in 0..20 {
        set.work(&volume);
        volume.seal(LayerId::generate()).unwrap();
        set.check(&volume);
    }
    wait_for("a short chain", || {
        let layer = volume.seal(LayerId::generate()).unwrap().layer;
        manifest(&node, layer).chain.len() <= 5
    });
    drop(compactor);
    set.check(&volume);
    // Nobody keeps it open.
    drop(volume);
    set.check(&Volume::open(&node.dirs(0)).unwrap());
}

#[test]
fn closing_does_not_wait_for_compaction() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let ino = create(&volume, "large");
    for layer in 0..4 {
        volume.core.write(ino, layer * (16 << 20), &vec![layer as u8; 16 << 20]).unwrap();
        volume.seal(LayerId::generate()).unwrap();
    }
    // At 32 MiB a second this would take two.
    let limits = Limits { layers: 0, bytes: u64::MAX };
    let compactor = Compactor::start_with(&volume, limits, Duration::ZERO).unwrap();
    volume.booted();
    let upper = volume.core.uppers().0;
    wait_for("copies", || upper.is_dirty());
    drop(compactor);
    let data = node.dirs(0).branch.join(format!("uppers/{}/data/{ino}", upper.number));
    let copied = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(data).unwrap()) * 512;
    assert!(copied < 64 << 20, "{copied} bytes were copied before it was closed");
    let mut page = [9; PAGE];
    for layer in 0..4 {
        volume.core.read(ino, layer * (16 << 20), &mut page).unwrap();
        assert!(page == [layer as u8; PAGE]);
    }
}

/// What is in a layer's data file of a page that the layer has.
#[test]
fn a_copy_is_no_longer_than_its_file() {
    let node = Node::in_memory();
    let volume = node.volume(0, node.empty);
    let ino = create(&volume, "odd");
    volume.core.write(ino, 0, &[3; 10_000]).unwrap();
    volume.seal(LayerId::generate()).unwrap();
    let other = create(&volume, "other");
    volume.core.write(other, 0, &[4; 100_000]).unwrap();
    volume.seal(LayerId::generate()).unwrap();
    assert_eq!(compact(&volume, 1).pages, 2 + 13);
    let layer = volume.seal(LayerId::generate()).unwrap().layer;
    let path = node.layers().join(layer.to_string()).join("data").join(ino.to_string());
    let file = std::fs::File::open(path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 10_000);
    let mut bytes = [0; 10_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == [3; 10_000]);
    volume.core.truncate(ino, 30_000).unwrap();
    let mut expected = vec![3; 10_000];
    expected.resize(30_000, 0);
    assert!(read_all(&volume, ino) == expected);
}
