//! Compaction: keeps the layers few that a volume reads through.
//!
//! Every seal makes one more. Of most old ones an image needs only a few pages; these are copied into the upper, as if
//! Postgres had written them again, those of the cheapest layers first. The manifest that the next seal writes names only
//! layers that pages are found in, and so does without the emptied ones. Why so: decision 0008.
//!
//! It goes on while a volume is mounted, on a thread of its own ([`Compactor`]): slowly, and with nobody waiting for it.
//!
//! **Invariants**
//! - A page and its copy are the same: nobody can tell which of them was read.
//! - A page is copied only if it is still where it was read, and never over one that is just being written.
//! - Nothing is fetched for it: layers that are not whole on this node are left alone.
//!
//! **Crash**: there is nothing to record and nothing to finish. CRASH: when the volume is opened, or a seal completed, a copy
//! that is on the disk is taken for written; one that is not there shows what is below; and one that is there in part is
//! completed from below, as what Postgres wrote is. What is below stays until a layer that does without it is complete.
//!
//! **Cancellation**: dropping the [`Compactor`] waits for the copying or syncing of a few pages. What was copied stays.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Volume;
use super::core::{Core, Held};
use super::file::FileNode;
use crate::error::{LocalContext, Result};
use crate::layer::BLOCK_BYTES;

/// LIMIT: copied at once, 128 KiB: so long others wait for the file.
const LIFT_PAGES: u32 = 16;

/// LIMIT: copied between two syncs. With more of it in memory, a sync that Postgres waits for would write it out, too.
const STEP_BYTES: u64 = 1 << 20;

/// LIMIT: a small part of what any disk can do. In fact half of the time belongs to others; this holds for fast disks.
const BYTES_PER_SECOND: u64 = 32 << 20;

/// LIMIT: after a wake, and after a seal, others come first: so long nothing is copied. Seals in quick succession cost one
/// look at the page maps together.
const CALM: Duration = Duration::from_secs(2);

/// LIMIT: layers that are not whole on this node may be so later; then it is worth looking again.
const RETRY: Duration = Duration::from_secs(60);

/// LIMIT: on a disk with less room than this, copies might take what Postgres needs.
const FREE_BYTES_MIN: u64 = 4 * Limits::USUAL.bytes;

/// What a turn of compaction keeps to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// With more layers than this below the upper, the cheapest are emptied, until half of it is left.
    pub layers: usize,
    /// So many bytes are copied at most.
    pub bytes: u64,
}

impl Limits {
    /// LIMIT: 64 layers cost a mount and a cold wake little. Copying until 32 are left makes a page be copied about once each
    /// 32 seals at first, then 32 times as rarely: layers of copies are no longer cheap. 256 MiB make no seal, pack or
    /// upload that follows much longer, and empty more layers than a seal adds up to a database of 8 GiB even if all have
    /// the same number of pages.
    pub(super) const USUAL: Self = Self { layers: 64, bytes: 256 << 20 };
}

/// What a turn came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Compacted {
    /// Layers below the upper that the volume needed before.
    pub before: usize,
    /// And after.
    pub layers: usize,
    /// Pages that were copied.
    pub pages: u64,
}

/// How fast a turn goes.
pub(super) trait Pace {
    /// Whether to go on. Asked before anything is copied, and between syncs.
    fn goes_on(&mut self) -> bool;

    /// Waits after so many bytes.
    fn rest(&mut self, bytes: u64);
}

impl Volume {
    /// One turn: empties layers, if there are more below than may be.
    ///
    /// # Errors
    /// `Local` when pages cannot be read, written or synced. What was copied before stays.
    pub(super) fn compact(&self, limits: &Limits, pace: &mut dyn Pace) -> Result<Compacted> {
        let core = &self.core;
        let below = core.uppers().0.slot;
        let files = core.named_files();
        let pages = tally(&files, below);
        let mut compacted = Compacted { before: used(&pages), layers: used(&pages), pages: 0 };
        let victims = victims(&pages, limits, |slot| core.slots.is_here(slot)).on("compact", &self.dirs.branch)?;
        if victims.is_empty() {
            return Ok(compacted);
        }
        let room = limits.bytes / BLOCK_BYTES;
        let mut turn = Turn { core, victims, room, pages: 0, unsynced: Vec::new(), unsynced_bytes: 0, pace };
        let emptied = turn.empty(&files);
        compacted.pages = turn.pages;
        metrics::counter!("ebb_storage_compaction_bytes_total").increment(turn.pages * BLOCK_BYTES);
        emptied.on("compact", &self.dirs.branch)?;
        compacted.layers = used(&tally(&files, below));
        let emptied = compacted.before.saturating_sub(compacted.layers);
        metrics::counter!("ebb_storage_compaction_layers_total").increment(emptied as u64);
        // Also files without a name are still read.
        let files = core.all_files();
        let left = tally(&files, below);
        let is_used = |slot: u32| left.get(slot as usize).is_none_or(|&pages| pages > 0);
        files.iter().for_each(|file| file.let_go(core, is_used));
        core.slots.let_go(is_used);
        Ok(compacted)
    }
}

/// How many pages of these files are in each slot below one.
fn tally(files: &[Arc<FileNode>], below: u32) -> Vec<u64> {
    let mut pages = vec![0; below as usize];
    files.iter().for_each(|file| file.tally(&mut pages));
    pages
}

fn used(pages: &[u64]) -> usize {
    pages.iter().filter(|&&pages| pages > 0).count()
}

/// The slots to empty: those with the fewest pages, so many that half of what may be is left, and as many as fit into the
/// limit of bytes, but at least one. Only those that are on this node.
fn victims(pages: &[u64], limits: &Limits, is_here: impl Fn(u32) -> io::Result<bool>) -> io::Result<Vec<u32>> {
    let mut cheapest: Vec<(u64, u32)> = pages.iter().copied().zip(0..).filter(|(pages, _)| *pages > 0).collect();
    if cheapest.len() <= limits.layers {
        return Ok(Vec::new());
    }
    let surplus = cheapest.len() - limits.layers / 2;
    let mut room = limits.bytes / BLOCK_BYTES;
    let mut victims = Vec::new();
    cheapest.sort_unstable();
    for (pages, slot) in cheapest {
        if victims.len() == surplus || (pages > room && !victims.is_empty()) {
            break;
        }
        if is_here(slot)? {
            room = room.saturating_sub(pages);
            victims.push(slot);
        }
    }
    victims.sort_unstable();
    Ok(victims)
}

/// A turn under way.
struct Turn<'a> {
    core: &'a Core,
    /// Slots, in order.
    victims: Vec<u32>,
    /// Pages that may still be copied.
    room: u64,
    /// Pages that were.
    pages: u64,
    /// Files with copies that were not synced.
    unsynced: Vec<Held<'a>>,
    unsynced_bytes: u64,
    pace: &'a mut dyn Pace,
}

impl<'a> Turn<'a> {
    fn empty(&mut self, files: &[Arc<FileNode>]) -> io::Result<()> {
        let mut buffer = vec![0; LIFT_PAGES as usize * BLOCK_BYTES as usize];
        for file in files {
            if let Some(held) = self.core.hold(file) {
                self.lift_file(held, &mut buffer)?;
            }
        }
        self.sync()
    }

    fn lift_file(&mut self, held: Held<'a>, buffer: &mut [u8]) -> io::Result<()> {
        let (file, mut from, mut lifted) = (held.file.clone(), 0, 0);
        while self.room > 0 && self.pace.goes_on() {
            let max = LIFT_PAGES.min(u32::try_from(self.room).unwrap_or(u32::MAX));
            let is_victim = |slot| self.victims.binary_search(&slot).is_ok();
            let Some(run) = file.next_in(from, max, is_victim) else { break };
            let pages = u64::from(self.core.lift(&file, run, buffer)?);
            from = run.start + run.len;
            lifted += pages;
            self.pages += pages;
            self.room -= pages.min(self.room);
            self.unsynced_bytes += pages * BLOCK_BYTES;
            if self.unsynced_bytes >= STEP_BYTES {
                self.unsynced.extend(self.core.hold(&file));
                lifted = 0;
                self.sync()?;
            }
        }
        if lifted > 0 {
            self.unsynced.push(held);
        }
        Ok(())
    }

    /// Brings the copies to the disk bit by bit, and rests. They need not be there before the seal: but it is better for
    /// others than all at once.
    ///
    /// Through the file's own sync, so that a failure is known to whoever syncs it next.
    fn sync(&mut self) -> io::Result<()> {
        let (upper, sealed) = self.core.uppers();
        for held in std::mem::take(&mut self.unsynced) {
            if !self.pace.goes_on() {
                return Ok(());
            }
            held.file.sync(self.core, &upper, &sealed)?;
        }
        self.pace.rest(std::mem::take(&mut self.unsynced_bytes));
        Ok(())
    }
}

/// Tells the thread that there may be something to do, and that it is over.
#[derive(Debug, Default)]
pub(super) struct Calls {
    state: Mutex<Called>,
    told: Condvar,
}

#[derive(Debug, Default)]
struct Called {
    is_wanted: bool,
    is_over: bool,
}

impl Calls {
    /// Asks for a turn.
    pub(super) fn want(&self) {
        self.state.lock().is_wanted = true;
        self.told.notify_all();
    }

    fn begin(&self) {
        *self.state.lock() = Called::default();
    }

    fn end(&self) {
        self.state.lock().is_over = true;
        self.told.notify_all();
    }

    fn is_over(&self) -> bool {
        self.state.lock().is_over
    }

    /// Waits until a turn is wanted, or for so long. `false` if it is over.
    fn wait(&self, at_most: Option<Duration>) -> bool {
        let until = at_most.map(|at_most| Instant::now() + at_most);
        let mut state = self.state.lock();
        while !state.is_wanted && !state.is_over {
            match until {
                Some(until) if self.told.wait_until(&mut state, until).timed_out() => break,
                Some(_) => {}
                None => self.told.wait(&mut state),
            }
        }
        !state.is_over
    }

    /// Waits for so long. `false` if it is over.
    fn rest(&self, rest: Duration) -> bool {
        let until = Instant::now() + rest;
        let mut state = self.state.lock();
        while !state.is_over && !self.told.wait_until(&mut state, until).timed_out() {}
        !state.is_over
    }

    /// Begins a turn. What is asked for from now on is another one.
    fn take(&self) {
        self.state.lock().is_wanted = false;
    }
}

/// The thread that compacts a volume.
#[derive(Debug)]
pub(super) struct Compactor {
    volume: Arc<Volume>,
    thread: Option<JoinHandle<()>>,
}

impl Compactor {
    /// Starts it. It does nothing before a turn is wanted ([`Calls::want`]).
    pub(super) fn start(volume: &Arc<Volume>) -> io::Result<Self> {
        Self::start_with(volume, Limits::USUAL, CALM)
    }

    pub(super) fn start_with(volume: &Arc<Volume>, limits: Limits, calm: Duration) -> io::Result<Self> {
        volume.compaction.begin();
        let of_thread = volume.clone();
        let thread = std::thread::Builder::new().name("compact".to_owned());
        let thread = thread.spawn(move || run(&of_thread, &limits, calm))?;
        Ok(Self { volume: volume.clone(), thread: Some(thread) })
    }
}

impl Drop for Compactor {
    fn drop(&mut self) {
        self.volume.compaction.end();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("compaction has panicked");
        }
    }
}

fn run(volume: &Volume, limits: &Limits, calm: Duration) {
    let calls = &volume.compaction;
    let mut retry = None;
    while calls.wait(retry) && calls.rest(calm) {
        calls.take();
        retry = None;
        if volume.layers_below() <= limits.layers || !has_room(volume) {
            continue;
        }
        match volume.compact(limits, &mut Unhurried { calls, since: Instant::now() }) {
            Ok(Compacted { before, layers, pages: 0 }) if layers > limits.layers => {
                tracing::debug!(before, "layers that are not whole here cannot be compacted");
                retry = Some(RETRY);
            }
            Ok(Compacted { pages: 0, .. }) => {}
            Ok(Compacted { before, layers, pages }) => tracing::info!(before, layers, pages, "layers compacted"),
            // The next seal tries again.
            Err(error) => {
                tracing::warn!(%error, cause = ?std::error::Error::source(&error), "layers were not compacted")
            }
        }
    }
}

fn has_room(volume: &Volume) -> bool {
    volume.core.statfs().is_ok_and(|found| found.f_bavail.saturating_mul(found.f_frsize) >= FREE_BYTES_MIN)
}

/// As slow as it can be.
struct Unhurried<'a> {
    calls: &'a Calls,
    since: Instant,
}

impl Pace for Unhurried<'_> {
    fn goes_on(&mut self) -> bool {
        !self.calls.is_over()
    }

    fn rest(&mut self, bytes: u64) {
        let took = self.since.elapsed();
        let due = Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND as f64);
        self.calls.rest(took.max(due.saturating_sub(took)));
        self.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_layers_are_emptied_until_half_of_what_may_be_is_left() {
        let check = |pages: &[u64], layers: usize, megabytes: u64, expect: &[u32]| {
            let limits = Limits { layers, bytes: megabytes << 20 };
            let here = |slot| Ok(slot != 1);
            assert_eq!(victims(pages, &limits, here).unwrap(), expect, "{pages:?}");
        };
        check(&[], 4, 1, &[]);
        check(&[9, 9, 9, 9], 4, 1, &[]);
        check(&[9, 0, 9, 9, 9, 0], 4, 1, &[]);
        check(&[50, 9, 7, 8, 3], 4, 1, &[2, 3, 4]);
        // One is not here, and the next dearer takes its place.
        check(&[50, 2, 7, 8, 3], 4, 1, &[2, 3, 4]);
        // 128 pages make a megabyte.
        check(&[1000, 5, 100, 30, 20], 4, 1, &[3, 4]);
        check(&[1000, 999, 998, 997, 996], 4, 1, &[4]);
        check(&[1000, 999, 998, 997, 996], 0, 64, &[0, 2, 3, 4]);
        check(&[3, 3], 1, 1, &[0]);
    }
}
