//! The power is cut: at any moment of any operation, also of a seal, and of opening the volume after the last time.
//! The volume lies on a disk that loses a random part of what was not synced.

use std::sync::atomic::{AtomicU64, Ordering};

use ebb_test_disk::{Disk, Fault, On};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::io::Errno;

use super::super::compact::Limits;
use super::compact::AtOnce;
use super::worker::{Went, Worker};
use super::*;

/// A disk of its own.
struct Machine {
    disk: Disk,
    _at: tempfile::TempDir,
}

impl Machine {
    /// Each history gives it a seed.
    fn new() -> Self {
        let at = tempfile::tempdir().unwrap();
        Self { disk: Disk::mount(at.path(), 0).unwrap(), _at: at }
    }

    fn node(&self) -> Node {
        let node = Node::in_dir(tempfile::tempdir_in(self.disk.path()).unwrap());
        self.disk.sync_all();
        node
    }

    /// Opens the volume after a cut. Sometimes the power is cut again while it is opened.
    fn open(&self, node: &Node, rng: &mut StdRng) -> Arc<Volume> {
        while rng.random_range(0..3) == 0 {
            self.disk.stop_after(rng.random_range(0..40));
            drop(Volume::open(&node.dirs(0)));
            self.disk.cut_power();
        }
        let volume = Volume::open(&node.dirs(0)).unwrap();
        if rng.random_range(0..3) == 0 {
            // All that was found is on the disk now.
            let found = contents(&volume);
            drop(volume);
            self.disk.cut_power();
            let volume = Volume::open(&node.dirs(0)).unwrap();
            assert_same(&contents(&volume), &found, "what opening had found");
            return volume;
        }
        volume
    }
}

/// A volume, who works in it, and the layers that were sealed for sure.
struct History {
    node: Node,
    volume: Option<Arc<Volume>>,
    workers: Vec<Worker>,
    /// With its contents, if nobody wrote while it was sealed.
    sealed: Vec<(LayerId, Option<Contents>)>,
    /// Seals that have happened, whose layers may not be complete: what may be found in them.
    begun: Vec<(LayerId, Worker)>,
    /// A seal that failed: nobody knows whether it happened.
    maybe: Option<LayerId>,
}

impl History {
    fn new(machine: &Machine, workers: u64, seed: u64) -> Self {
        let node = machine.node();
        let volume = node.volume(0, node.empty);
        machine.disk.sync_all();
        let workers = (0..workers).map(|n| Worker::new(&volume, &format!("w{n}"), seed * 10 + n)).collect();
        let sealed = vec![(node.empty, Some(Contents::new()))];
        Self { node, volume: Some(volume), workers, sealed, begun: Vec::new(), maybe: None }
    }

    fn volume(&self) -> &Arc<Volume> {
        self.volume.as_ref().expect("it is open")
    }

    /// Seals while nobody works.
    fn seal(&mut self) -> Went {
        let id = LayerId::generate();
        match self.volume().seal(id) {
            Ok(sealed) => {
                if sealed.new {
                    self.sealed.push((id, Some(contents(self.volume()))));
                }
                self.workers.iter_mut().for_each(Worker::sealed);
                Went::On
            }
            Err(_) => {
                self.maybe = Some(id);
                Went::DiskFailed
            }
        }
    }

    /// Seals, and leaves the layer for later.
    fn begin_seal(&mut self) -> Went {
        let id = LayerId::generate();
        match self.volume().begin_seal(id) {
            Ok(sealed) => {
                if sealed.new {
                    let witness = self.workers[0].seal_begun();
                    self.begun.push((id, witness));
                    self.sealed.push((id, None));
                }
                Went::On
            }
            Err(_) => {
                self.maybe = Some(id);
                Went::DiskFailed
            }
        }
    }

    fn compact(&self, rng: &mut StdRng) -> Went {
        let limits = Limits { layers: rng.random_range(0..3), bytes: u64::MAX };
        let compacted = self.volume().compact(&limits, &mut AtOnce { copies: rng.random_range(0..40) });
        if compacted.is_ok() { Went::On } else { Went::DiskFailed }
    }

    fn finish_seals(&self) -> Went {
        if self.volume().finish_seals().is_ok() { Went::On } else { Went::DiskFailed }
    }

    /// The machine goes down with everything on it, and comes back.
    fn cut_power(&mut self, machine: &Machine, rng: &mut StdRng) {
        machine.disk.stop();
        self.volume = None;
        machine.disk.cut_power();
        let volume = machine.open(&self.node, rng);
        let last = self.sealed.last().map(|(layer, _)| *layer);
        if last != Some(volume.base()) {
            assert_eq!(Some(volume.base()), self.maybe, "the volume lies on a layer that nobody asked for");
            self.sealed.push((volume.base(), None));
        }
        self.workers.iter_mut().for_each(|worker| worker.found(&volume));
        for (layer, mut witness) in self.begun.drain(..) {
            let dirs = self.node.dirs(usize::MAX);
            Volume::create(&dirs, layer).unwrap();
            witness.found(&Volume::open(&dirs).unwrap());
            Volume::remove(&dirs).unwrap();
        }
        self.volume = Some(volume);
    }

    /// Every layer that was sealed for sure is there, and is what it was.
    fn check_layers(&self) {
        for (number, (layer, expected)) in self.sealed.iter().enumerate() {
            let image = self.node.volume(number + 1, *layer);
            if let Some(expected) = expected {
                assert_same(&contents(&image), expected, &format!("layer {number}"));
            }
        }
    }
}

#[test]
fn a_power_cut_at_any_moment_takes_only_what_was_not_synced() {
    let machine = Machine::new();
    for seed in seeds(150) {
        println!("seed {seed}");
        machine.disk.reseed(seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut history = History::new(&machine, 1, seed);
        for _ in 0..rng.random_range(1..5) {
            history.workers[0].disk_may_fail = rng.random();
            if history.workers[0].disk_may_fail {
                machine.disk.stop_after(rng.random_range(1..250));
            }
            for _ in 0..rng.random_range(1..60) {
                let volume = history.volume().clone();
                let went = match rng.random_range(0..24) {
                    0 => history.seal(),
                    1 => history.begin_seal(),
                    2 => history.finish_seals(),
                    3 | 4 => history.compact(&mut rng),
                    _ => history.workers[0].step(&volume),
                };
                if went == Went::DiskFailed {
                    break;
                }
            }
            history.cut_power(&machine, &mut rng);
        }
        history.check_layers();
    }
}

#[test]
fn a_power_cut_while_several_work_and_seal_takes_only_what_was_not_synced() {
    let machine = Machine::new();
    for seed in seeds(40) {
        println!("seed {seed}");
        machine.disk.reseed(seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut history = History::new(&machine, 3, seed);
        for _ in 0..3 {
            history.workers.iter_mut().for_each(|worker| worker.disk_may_fail = true);
            machine.disk.stop_after(rng.random_range(20..1200));
            let volume = history.volume().clone();
            let left = AtomicU64::new(history.workers.len() as u64);
            std::thread::scope(|scope| {
                for worker in &mut history.workers {
                    let (volume, left) = (&volume, &left);
                    scope.spawn(move || {
                        let _done = Done(left);
                        let _ = (0..150).find(|_| worker.step(volume) == Went::DiskFailed);
                    });
                }
                let (compacted, compacting) = (&volume, &left);
                scope.spawn(move || {
                    let limits = Limits { layers: 1, bytes: u64::MAX };
                    while compacting.load(Ordering::SeqCst) > 0
                        && compacted.compact(&limits, &mut AtOnce { copies: u32::MAX }).is_ok()
                    {
                        std::thread::yield_now();
                    }
                });
                while left.load(Ordering::SeqCst) > 0 {
                    let id = LayerId::generate();
                    match volume.seal(id) {
                        Ok(_) => history.sealed.push((volume.base(), None)),
                        Err(_) => {
                            history.maybe = Some(id);
                            break;
                        }
                    }
                }
            });
            drop(volume);
            history.cut_power(&machine, &mut rng);
        }
        history.check_layers();
    }
}

/// Counts down, also when a check fails.
struct Done<'a>(&'a AtomicU64);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn a_disk_that_cannot_sync_is_never_said_to_have_synced() {
    let machine = Machine::new();
    let mut failed = 0;
    for seed in seeds(120) {
        println!("seed {seed}");
        machine.disk.reseed(seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut history = History::new(&machine, 1, seed);
        history.workers[0].disk_may_fail = true;
        for step in 0..rng.random_range(20..80) {
            if rng.random_range(0..10) == 0 {
                let path_has = ["journal", "/data", "uppers", ""][rng.random_range(0..4)].to_owned();
                machine.disk.fail(Fault { on: On::Sync, path_has, errno: Errno::IO, times: 1 });
            }
            let volume = history.volume().clone();
            if step % 12 == 10 {
                // A failure of it is no one else's, unless they rely on what failed: then they are told as well.
                history.compact(&mut rng);
            } else if step % 12 == 7 {
                if history.seal() == Went::DiskFailed {
                    // It may have failed after the switch: then the next one is about another layer.
                    break;
                }
            } else {
                history.workers[0].step(&volume);
            }
        }
        failed += machine.disk.mend();
        history.cut_power(&machine, &mut rng);
        history.check_layers();
    }
    assert!(failed > 0 || std::env::var_os("EBB_TEST_SEED").is_some());
}

#[test]
fn a_full_disk_refuses_and_breaks_nothing() {
    let machine = Machine::new();
    let mut refused = 0;
    for seed in seeds(120) {
        println!("seed {seed}");
        machine.disk.reseed(seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut history = History::new(&machine, 1, seed);
        for _ in 0..3 {
            machine.disk.set_capacity(Some(machine.disk.used() + rng.random_range(0..200_000)));
            history.workers[0].disk_may_fail = true;
            for _ in 0..rng.random_range(1..40) {
                let volume = history.volume().clone();
                refused += u64::from(history.workers[0].step(&volume) == Went::DiskFailed);
            }
            machine.disk.set_capacity(None);
            history.workers[0].disk_may_fail = false;
            for _ in 0..10 {
                let volume = history.volume().clone();
                assert_eq!(history.workers[0].step(&volume), Went::On, "there is room again");
            }
            history.workers[0].check_present(history.volume());
            if rng.random() {
                assert_eq!(history.seal(), Went::On);
            }
            history.cut_power(&machine, &mut rng);
        }
        history.check_layers();
    }
    assert!(refused > 0 || std::env::var_os("EBB_TEST_SEED").is_some());
}
