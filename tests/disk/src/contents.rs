//! The contents of one file: of each block, every state that a cut of the power may leave.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::RngExt;
use rand::rngs::StdRng;

pub(crate) const BLOCK: u64 = 4096;

/// LIMIT: states kept of a block that is written again and again without a sync; a random one of the middle goes.
const STATES_MAX: usize = 4;

type Bytes = Arc<[u8; BLOCK as usize]>;

/// Blocks and room set aside.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Blocks that are not here are holes for sure.
    blocks: BTreeMap<u64, Vec<Version>>,
    /// Blocks with more than one state that the next sync brings to the disk.
    dirty: BTreeSet<u64>,
    /// Blocks set aside with `fallocate`, not written yet.
    reserved: BTreeSet<u64>,
}

/// A state that a block had. The first of a block is the one on the disk for sure.
#[derive(Debug, Clone)]
struct Version {
    /// `None`: a hole.
    data: Option<Bytes>,
    /// The metadata change that must be on the disk if this state is: the last one before the block took new room.
    after: u64,
    /// The change of metadata, if any, that made this state: once that is on the disk, no earlier state shows.
    cut: Option<u64>,
    /// How far the file reached in this block, from the file's beginning.
    reach: u64,
    /// The metadata change that must be on the disk if the file reaches so far.
    grown_after: u64,
}

/// How much of what was not synced a cut of the power takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Loss {
    All,
    Nothing,
    /// Of each block any state.
    Some,
}

impl Contents {
    fn newest(&self, block: u64) -> Option<&Bytes> {
        self.blocks.get(&block)?.last()?.data.as_ref()
    }

    /// How many blocks of the disk it takes.
    pub(crate) fn room(&self) -> u64 {
        let filled = self.blocks.values().filter(|versions| versions.last().is_some_and(|last| last.data.is_some()));
        (filled.count() + self.reserved.len()) as u64
    }

    /// How many more blocks a write takes.
    pub(crate) fn room_for(&self, offset: u64, length: u64) -> u64 {
        let blocks = offset / BLOCK..(offset + length).div_ceil(BLOCK);
        blocks.filter(|block| self.newest(*block).is_none() && !self.reserved.contains(block)).count() as u64
    }

    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let within = (at % BLOCK) as usize;
            let part = (BLOCK as usize - within).min(into.len() - done);
            match self.newest(at / BLOCK) {
                Some(bytes) => into[done..done + part].copy_from_slice(&bytes[within..within + part]),
                None => into[done..done + part].fill(0),
            }
            done += part;
        }
    }

    /// Writes; `seq` is the last metadata change so far. Answers how many blocks of the disk were taken.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8], seq: u64, rng: &mut StdRng) -> u64 {
        let (mut done, mut taken) = (0, 0);
        while done < bytes.len() {
            let at = offset + done as u64;
            let (block, within) = (at / BLOCK, (at % BLOCK) as usize);
            let part = (BLOCK as usize - within).min(bytes.len() - done);
            let mut data = self.newest(block).map_or([0; BLOCK as usize], |bytes| **bytes);
            data[within..within + part].copy_from_slice(&bytes[done..done + part]);
            taken += u64::from(self.newest(block).is_none() && !self.reserved.remove(&block));
            let end = at + part as u64;
            self.push(block, Some(Arc::new(data)), seq, end, rng);
            done += part;
        }
        taken
    }

    fn push(&mut self, block: u64, data: Option<Bytes>, seq: u64, end: u64, rng: &mut StdRng) {
        let versions = self.blocks.entry(block).or_insert_with(|| vec![Version::hole()]);
        let last = versions.last().cloned().unwrap_or(Version::hole());
        // A block that has its room already is written over without any change of metadata.
        let after = if last.data.is_some() { last.after } else { seq };
        let (reach, grown_after) = if end > last.reach { (end, seq) } else { (last.reach, last.grown_after) };
        versions.push(Version { data, after, cut: None, reach, grown_after });
        if versions.len() > STATES_MAX {
            let middle = rng.random_range(1..versions.len() - 1);
            if versions[middle].cut.is_none() {
                versions.remove(middle);
            }
        }
        self.dirty.insert(block);
    }

    /// Cuts to a size; `seq` is that change of metadata. Answers how many blocks of the disk became free.
    pub(crate) fn cut(&mut self, size: u64, seq: u64) -> u64 {
        let before = self.room();
        self.reserved.split_off(&size.div_ceil(BLOCK));
        for (&block, versions) in self.blocks.range_mut(size / BLOCK..) {
            let start = block * BLOCK;
            let Some(last) = versions.last().filter(|last| last.data.is_some()).cloned() else { continue };
            let version = if start >= size {
                Version { cut: Some(seq), ..Version::hole() }
            } else {
                let mut data = last.data.as_deref().copied().unwrap_or([0; BLOCK as usize]);
                data[(size - start) as usize..].fill(0);
                Version { data: Some(Arc::new(data)), cut: Some(seq), reach: size, grown_after: seq, ..last }
            };
            versions.push(version);
            self.dirty.insert(block);
        }
        before - self.room()
    }

    /// Sets room aside; answers how many blocks of the disk that took.
    pub(crate) fn reserve(&mut self, offset: u64, length: u64) -> u64 {
        let wanted: Vec<_> = (offset / BLOCK..(offset + length).div_ceil(BLOCK))
            .filter(|block| self.newest(*block).is_none() && !self.reserved.contains(block))
            .collect();
        self.reserved.extend(&wanted);
        wanted.len() as u64
    }

    /// The first byte at or after `offset` that is data, or (`hole`) that is not.
    pub(crate) fn seek(&self, offset: u64, size: u64, hole: bool) -> Option<u64> {
        if offset >= size {
            return None;
        }
        let first = offset / BLOCK;
        let found = if hole {
            (first..).find(|block| self.newest(*block).is_none())?
        } else {
            let mut filled = self.blocks.range(first..).filter(|(_, v)| v.last().is_some_and(|v| v.data.is_some()));
            *filled.next()?.0
        };
        let at = (found * BLOCK).max(offset);
        if at < size {
            return Some(at);
        }
        hole.then_some(size)
    }

    /// The last metadata change that must be on the disk for the contents to be.
    pub(crate) fn needs(&self) -> u64 {
        let newest = self.dirty.iter().filter_map(|block| self.blocks.get(block)?.last());
        newest.map(|version| version.after.max(version.grown_after)).max().unwrap_or(0)
    }

    /// Everything is on the disk.
    pub(crate) fn synced(&mut self) {
        for block in std::mem::take(&mut self.dirty) {
            let Some(versions) = self.blocks.get_mut(&block) else { continue };
            let last = versions.pop();
            versions.clear();
            match last.and_then(|last| Some((last.data?, last.reach))) {
                None => drop(self.blocks.remove(&block)),
                Some((data, reach)) => versions.push(Version::sure(data, reach)),
            }
        }
    }

    /// A sync failed: the kernel drops what was dirty from its list, so no later sync writes it.
    pub(crate) fn sync_failed(&mut self) {
        self.dirty.clear();
    }

    /// What is left after the power was cut with metadata up to `seq` on the disk, of a file of this `size`; answers
    /// the size it has, now that some writes that made it longer did reach the disk.
    pub(crate) fn lose(&mut self, seq: u64, mut size: u64, loss: Loss, rng: &mut StdRng) -> u64 {
        let mut kept = BTreeMap::new();
        for (block, versions) in std::mem::take(&mut self.blocks) {
            let floor = versions.iter().rposition(|v| v.cut.is_some_and(|cut| cut <= seq)).unwrap_or(0);
            let possible: Vec<_> = (floor..versions.len())
                .filter(|&at| at == floor || versions[at].data.is_some() && versions[at].after <= seq)
                .collect();
            let chosen = match loss {
                Loss::All => floor,
                Loss::Nothing => possible[possible.len() - 1],
                Loss::Some => possible[rng.random_range(0..possible.len())],
            };
            let version = &versions[chosen];
            if chosen != floor && version.cut.is_none() && version.grown_after <= seq {
                size = size.max(version.reach);
            }
            if let Some(data) = version.data.clone() {
                kept.insert(block, data);
            }
        }
        for (block, data) in kept {
            let start = block * BLOCK;
            if start >= size {
                continue;
            }
            let mut data = *data;
            if size - start < BLOCK {
                data[(size - start) as usize..].fill(0);
            }
            self.blocks.insert(block, vec![Version::sure(Arc::new(data), size.min(start + BLOCK))]);
        }
        self.dirty.clear();
        self.reserved.clear();
        size
    }
}

impl Version {
    fn hole() -> Self {
        Self { data: None, after: 0, cut: None, reach: 0, grown_after: 0 }
    }

    fn sure(data: Bytes, reach: u64) -> Self {
        Self { data: Some(data), after: 0, cut: None, reach, grown_after: 0 }
    }
}
