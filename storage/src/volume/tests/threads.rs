//! Several at work at the same time, while the volume is sealed under them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::compact::compact;
use super::worker::{Went, Worker};
use super::*;

const WRITERS: usize = 3;

/// Two files and a directory in which a number only ever goes up.
struct Counter {
    inos: [Ino; 2],
    /// What was written for sure, and what may have been.
    done: AtomicU64,
    begun: AtomicU64,
}

impl Counter {
    fn new(volume: &Volume, name: usize) -> Self {
        let inos = ["first", "second"].map(|file| {
            let ino = create(volume, &format!("{file}-{name}"));
            volume.core.write(ino, 0, &[0; 8]).unwrap();
            ino
        });
        create(volume, &format!("at-{name}-0"));
        Self { inos, done: AtomicU64::new(0), begun: AtomicU64::new(0) }
    }

    /// One more, in each of the files, in a page that each number has for its own, and in a name.
    fn up(&self, volume: &Volume, name: usize) {
        let n = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        for ino in self.inos {
            volume.core.write(ino, 0, &n.to_le_bytes()).unwrap();
            volume.core.write(ino, n % 50 * 5000, &n.to_le_bytes()).unwrap();
        }
        create(volume, &format!("at-{name}-{n}"));
        volume.core.unlink(ROOT_INO, format!("at-{name}-{}", n - 1).as_bytes()).unwrap();
        self.done.store(n, Ordering::SeqCst);
    }

    fn number(volume: &Volume, ino: Ino, at: u64) -> u64 {
        let mut bytes = [0; 8];
        volume.core.read(ino, at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Checks that an image shows one moment in a range of them.
    fn check(&self, image: &Volume, name: usize, moments: std::ops::RangeInclusive<u64>) {
        let [first, second] = self.inos.map(|ino| Self::number(image, ino, 0));
        assert!(moments.contains(&first), "{first} is not in {moments:?}");
        assert!(second == first || second + 1 == first, "{first} and {second} are not of one moment");
        let paged = Self::number(image, self.inos[1], second % 50 * 5000);
        assert!(paged == second || paged + 50 == second || second % 50 == 0 || second < 50 && paged == 0);
        let all = contents(image);
        let prefix = format!("/at-{name}-");
        let mut at: Vec<u64> = all.keys().filter_map(|path| path.strip_prefix(&prefix)?.parse().ok()).collect();
        at.sort_unstable();
        let n = *at.last().expect("a counter has a name at any moment");
        assert!(at == [n] || at == [n - 1, n], "{at:?}");
        assert!(n == second || n + 1 == second || n + 1 == first, "{at:?} beside {first} and {second}");
    }
}

#[test]
fn every_layer_is_one_moment_of_all_threads() {
    let node = Node::in_memory();
    let volume = node.volume(0, node.empty);
    let counters: Vec<_> = (0..WRITERS).map(|name| Counter::new(&volume, name)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (name, counter) in counters.iter().enumerate() {
            let (volume, stop) = (&volume, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    counter.up(volume, name);
                }
            });
        }
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                compact(&volume, 3);
            }
        });
        for branch in 1..=60 {
            let done: Vec<_> = counters.iter().map(|counter| counter.done.load(Ordering::SeqCst)).collect();
            let layer = volume.seal(LayerId::generate()).unwrap().layer;
            let begun: Vec<_> = counters.iter().map(|counter| counter.begun.load(Ordering::SeqCst)).collect();
            let image = node.volume(branch, layer);
            for (name, counter) in counters.iter().enumerate() {
                counter.check(&image, name, done[name]..=begun[name]);
            }
            // The branch's own writes stay its own.
            for counter in &counters {
                image.core.write(counter.inos[0], 0, &u64::MAX.to_le_bytes()).unwrap();
            }
        }
    });
    for (name, counter) in counters.iter().enumerate() {
        let n = counter.done.load(Ordering::SeqCst);
        counter.check(&volume, name, n..=n);
    }
}

/// Stops the threads also when a check fails: else the test would wait for them for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn nobody_loses_anything_when_all_work_and_seal_at_once() {
    for seed in seeds(40) {
        let node = Node::in_memory();
        let mut volume = node.volume(0, node.empty);
        let mut workers: Vec<_> =
            (0..WRITERS as u64).map(|n| Worker::new(&volume, &format!("w{n}"), seed * 10 + n)).collect();
        for _ in 0..2 {
            let left = AtomicU64::new(workers.len() as u64);
            std::thread::scope(|scope| {
                for worker in &mut workers {
                    let (volume, left) = (&volume, &left);
                    scope.spawn(move || {
                        let _done = Done(left);
                        for _ in 0..150 {
                            assert_eq!(worker.step(volume), Went::On, "seed {seed}");
                        }
                    });
                }
                let (compacted, compacting) = (&volume, &left);
                scope.spawn(move || {
                    while compacting.load(Ordering::SeqCst) > 0 {
                        compact(compacted, seed as usize % 3);
                    }
                });
                while left.load(Ordering::SeqCst) > 0 {
                    volume.seal(LayerId::generate()).unwrap();
                }
            });
            workers.iter().for_each(|worker| worker.check_present(&volume));
            drop(volume);
            volume = Volume::open(&node.dirs(0)).unwrap();
            for worker in &mut workers {
                worker.check_present(&volume);
                worker.found(&volume);
            }
        }
    }
}

/// Counts down, also when a check fails.
struct Done<'a>(&'a AtomicU64);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
