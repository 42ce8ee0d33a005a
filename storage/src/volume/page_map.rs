//! Where each page of a file is: which slot of the chain, or a hole.
//!
//! Kept in chunks of 512 pages (4 MiB of file). A chunk that is all in one slot is one number, so that a large file
//! that was hardly written since it was sealed takes next to no memory; a mixed chunk is a plain array.

use crate::layer::Run;

/// In no layer: the page is all zeroes.
pub(super) const HOLE: u32 = u32::MAX;

/// LIMIT: large enough that uniform chunks of a 1 TiB database take 6 MB, small enough that one page written into a
/// uniform chunk costs 2 KiB.
const CHUNK_PAGES: u32 = 512;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Chunk {
    /// All 512 pages are in this slot.
    Uniform(u32),
    /// The slot of each page; pages past the end are holes.
    Mixed(Vec<u32>),
}

/// The page map of one file. Pages past its end are holes.
#[derive(Debug, Clone, Default)]
pub(super) struct PageMap {
    chunks: Vec<Chunk>,
}

impl PageMap {
    /// From a manifest's runs.
    pub(super) fn from_runs(runs: &[Run]) -> Self {
        let mut map = Self::default();
        for run in runs {
            map.set(run.start, run.len, run.slot);
        }
        map
    }

    /// Where a page is.
    pub(super) fn get(&self, page: u32) -> u32 {
        match self.chunks.get((page / CHUNK_PAGES) as usize) {
            None => HOLE,
            Some(Chunk::Uniform(slot)) => *slot,
            Some(Chunk::Mixed(slots)) => slots.get((page % CHUNK_PAGES) as usize).copied().unwrap_or(HOLE),
        }
    }

    /// Where a page is, and how many pages from it on, at most `max` (at least 1), are in the same place.
    pub(super) fn run_at(&self, page: u32, max: u32) -> (u32, u32) {
        let slot = self.get(page);
        let mut length = 1;
        while length < max {
            let next = page + length;
            match self.chunks.get((next / CHUNK_PAGES) as usize) {
                Some(Chunk::Uniform(other)) if *other == slot => {
                    length = (length + CHUNK_PAGES - next % CHUNK_PAGES).min(max);
                }
                None if slot == HOLE => return (slot, max),
                _ if self.get(next) == slot => length += 1,
                _ => break,
            }
        }
        (slot, length)
    }

    /// The first pages at or after `from` that are in a slot of those wanted, at most `max` of them.
    pub(super) fn next_in(&self, from: u32, max: u32, is_wanted: impl Fn(u32) -> bool) -> Option<Run> {
        let end = self.chunks.len() as u32 * CHUNK_PAGES;
        let mut at = from;
        while at < end {
            let (slot, len) = self.run_at(at, (end - at).min(CHUNK_PAGES));
            if slot != HOLE && is_wanted(slot) {
                return Some(Run { start: at, len: len.min(max), slot });
            }
            at += len;
        }
        None
    }

    /// Adds to each slot's number of pages; slots that the list is too short for are left out.
    pub(super) fn tally(&self, pages: &mut [u64]) {
        let mut add = |slot: u32, count: u64| {
            if let Some(pages) = pages.get_mut(slot as usize) {
                *pages += count;
            }
        };
        for chunk in &self.chunks {
            match chunk {
                Chunk::Uniform(slot) => add(*slot, u64::from(CHUNK_PAGES)),
                Chunk::Mixed(slots) => slots.iter().for_each(|&slot| add(slot, 1)),
            }
        }
    }

    /// Whether all these pages are in one slot.
    pub(super) fn all_in(&self, start: u32, len: u32, slot: u32) -> bool {
        self.run_at(start, len) == (slot, len)
    }

    /// Puts pages into a slot.
    pub(super) fn set(&mut self, start: u32, len: u32, slot: u32) {
        let end = start + len;
        let mut at = start;
        while at < end {
            let chunk_start = at - at % CHUNK_PAGES;
            let stop = end.min(chunk_start.saturating_add(CHUNK_PAGES));
            let chunk = self.chunk_mut((at / CHUNK_PAGES) as usize);
            set_in_chunk(chunk, at - chunk_start, stop - chunk_start, slot);
            at = stop;
        }
    }

    fn chunk_mut(&mut self, index: usize) -> &mut Chunk {
        if self.chunks.len() <= index {
            self.chunks.resize(index + 1, Chunk::Mixed(Vec::new()));
        }
        &mut self.chunks[index]
    }

    /// Makes every page from this one on a hole.
    pub(super) fn truncate(&mut self, pages: u32) {
        let (index, within) = ((pages / CHUNK_PAGES) as usize, (pages % CHUNK_PAGES) as usize);
        self.chunks.truncate(index + usize::from(within > 0));
        if within > 0 && self.chunks.len() == index + 1 {
            match &mut self.chunks[index] {
                Chunk::Mixed(slots) => slots.truncate(within),
                chunk @ Chunk::Uniform(_) => {
                    let Chunk::Uniform(slot) = *chunk else { return };
                    *chunk = Chunk::Mixed(vec![slot; within]);
                }
            }
        }
    }

    /// The map as a manifest's runs.
    pub(super) fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        let end = self.chunks.len() as u32 * CHUNK_PAGES;
        let mut at = 0;
        while at < end {
            let (slot, len) = self.run_at(at, end - at);
            if slot != HOLE {
                runs.push(Run { start: at, len, slot });
            }
            at += len;
        }
        runs
    }
}

fn set_in_chunk(chunk: &mut Chunk, start: u32, end: u32, slot: u32) {
    if (start, end) == (0, CHUNK_PAGES) {
        *chunk = Chunk::Uniform(slot);
        return;
    }
    let (start, end) = (start as usize, end as usize);
    let slots = match chunk {
        Chunk::Uniform(all) if *all == slot => return,
        Chunk::Uniform(all) => {
            *chunk = Chunk::Mixed(vec![*all; CHUNK_PAGES as usize]);
            let Chunk::Mixed(slots) = chunk else { return };
            slots
        }
        Chunk::Mixed(slots) => slots,
    };
    if slots.len() < end {
        slots.resize(end, HOLE);
    }
    slots[start..end].fill(slot);
    // A file that is filled from its front turns uniform with its last page.
    if end == CHUNK_PAGES as usize && slots.iter().all(|&other| other == slot) {
        *chunk = Chunk::Uniform(slot);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u32 = 2000;

    #[derive(Debug, Clone)]
    enum Act {
        Set(u32, u32, u32),
        Truncate(u32),
    }

    fn act() -> impl Strategy<Value = Act> {
        let set = (0..PAGES, prop_oneof![1..4_u32, Just(512), 1..1500_u32], 0..4_u32)
            .prop_map(|(start, len, slot)| Act::Set(start, len.min(PAGES - start), slot));
        prop_oneof![6 => set, 1 => (0..=PAGES).prop_map(Act::Truncate)]
    }

    proptest! {
        #[test]
        fn it_equals_a_plain_array(acts in prop::collection::vec(act(), 1..40)) {
            let mut map = PageMap::default();
            let mut plain = vec![HOLE; PAGES as usize];
            for act in acts {
                match act {
                    Act::Set(start, len, slot) => {
                        map.set(start, len, slot);
                        plain[start as usize..(start + len) as usize].fill(slot);
                    }
                    Act::Truncate(pages) => {
                        map.truncate(pages);
                        plain[pages as usize..].fill(HOLE);
                    }
                }
            }
            for page in (0..PAGES).filter(|page| page % 61 == 0 || page % 512 < 2 || page % 512 > 509) {
                prop_assert_eq!(map.get(page), plain[page as usize]);
                let max = (PAGES - page).min(700);
                let same = plain[page as usize..][..max as usize].iter().take_while(|&&s| s == plain[page as usize]);
                prop_assert_eq!(map.run_at(page, max), (plain[page as usize], same.count() as u32));
            }
            let mut tally = [0; 3];
            map.tally(&mut tally);
            let count = |slot: u32| plain.iter().filter(|&&other| other == slot).count() as u64;
            prop_assert_eq!(tally, [count(0), count(1), count(2)]);
            let (mut found, mut from) = (Vec::new(), 0);
            while let Some(run) = map.next_in(from, 100, |slot| slot == 1 || slot == 3) {
                prop_assert!(run.len <= 100);
                found.extend((run.start..run.start + run.len).map(|page| (page, run.slot)));
                from = run.start + run.len;
            }
            let wanted = plain.iter().copied().zip(0_u32..).filter(|(slot, _)| *slot == 1 || *slot == 3);
            prop_assert_eq!(found, wanted.map(|(slot, page)| (page, slot)).collect::<Vec<_>>());
            let again = PageMap::from_runs(&map.runs());
            prop_assert!((0..PAGES + 600).all(|page| again.get(page) == map.get(page)));
            prop_assert!(map.runs().windows(2).all(|w| w[0].start + w[0].len <= w[1].start
                && (w[0].slot != w[1].slot || w[0].start + w[0].len < w[1].start)));
        }
    }
}
