//! Remembers what is read of a volume until Postgres is up, and makes a boot set of it: see `layer::boot`.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::Volume;
use super::seal;
use crate::error::{LocalContext, Result};
use crate::layer::{BLOCK_BYTES, BOOT_PAGES_MAX, BootSet, Ino, InodeKind, Run};

/// The blocks that were read first, each once.
#[derive(Debug, Default)]
pub(super) struct BootReads {
    is_on: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    in_order: Vec<(Ino, u32)>,
    all: HashSet<(Ino, u32)>,
}

impl BootReads {
    /// Begins anew.
    pub(super) fn start(&self) {
        *self.seen.lock() = Seen::default();
        self.is_on.store(true, Ordering::Release);
    }

    /// From now on reads are not of interest.
    pub(super) fn stop(&self) {
        self.is_on.store(false, Ordering::Release);
    }

    /// Notes a read.
    pub(super) fn note(&self, ino: Ino, offset: u64, length: usize) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let mut seen = self.seen.lock();
        let end = offset.saturating_add(length as u64).div_ceil(BLOCK_BYTES);
        for block in offset / BLOCK_BYTES..end {
            let Ok(block) = u32::try_from(block) else { return };
            if seen.in_order.len() >= BOOT_PAGES_MAX {
                return self.stop();
            }
            if seen.all.insert((ino, block)) {
                seen.in_order.push((ino, block));
            }
        }
    }

    fn take(&self) -> Vec<(Ino, u32)> {
        self.stop();
        std::mem::take(&mut *self.seen.lock()).in_order
    }
}

impl Volume {
    /// Tells that Postgres is up: what is read from now on is not of a wake, and compaction may begin.
    pub fn booted(&self) {
        self.core.boot.stop();
        self.compaction.want();
    }

    /// Writes the boot set of the newest sealed layer beside it, where [`crate::node::NodeStore::upload`] finds it: what
    /// was read since the volume was mounted, as it is now. To be called once nothing writes any more. Does nothing if
    /// there is something that is not sealed.
    ///
    /// CRASH: Not synced: it is checked when it is read, and a damaged one only costs time.
    ///
    /// # Errors
    /// `Local` or `Corrupt` when a page cannot be read or the file not be written.
    pub fn write_boot_set(&self) -> Result<()> {
        let reads = self.core.boot.take();
        if reads.is_empty() || self.core.uppers().0.is_dirty() {
            return Ok(());
        }
        let head = self.base();
        let manifest = seal::read_manifest(&self.dirs.layers, head)?;
        let mut set = BootSet::default();
        let mut page = [0; BLOCK_BYTES as usize];
        for (ino, block) in reads {
            let at = manifest.inodes.binary_search_by_key(&ino, |inode| inode.ino);
            let kind = at.ok().map(|at| &manifest.inodes[at].kind);
            let Some(InodeKind::File { runs, .. }) = kind else { continue };
            let Some(layer) = run_of(runs, block).and_then(|run| manifest.chain.get(run.slot as usize)) else {
                continue;
            };
            page.fill(0);
            let read = self.core.read(ino, u64::from(block) * BLOCK_BYTES, &mut page);
            read.on("read a page for the boot set of", &self.dirs.branch)?;
            set.add(*layer, ino, block, &page);
        }
        let (dir, bytes) = (self.dirs.layers.join(head.to_string()), set.encode(head)?);
        let (path, fresh) = (dir.join("boot"), dir.join("boot.new"));
        std::fs::write(&fresh, bytes).on("write", &fresh)?;
        std::fs::rename(&fresh, &path).on("write", &path)?;
        tracing::info!(layer = %head, pages = set.len(), "boot set written");
        Ok(())
    }
}

fn run_of(runs: &[Run], block: u32) -> Option<&Run> {
    let after = runs.partition_point(|run| run.start <= block);
    runs.get(after.checked_sub(1)?).filter(|run| block - run.start < run.len)
}
