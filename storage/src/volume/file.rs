//! One regular file of a volume: its size, its page map, and reading and writing through it.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::core::Core;
use super::image::{FileImage, blocks};
use super::journal::Record;
use super::page_map::{HOLE, PageMap};
use super::slots::DataFile;
use super::upper::{Syncs, Upper};
use crate::layer::{BLOCK_BYTES, Ino, Run};

/// LIMIT: block numbers are 32 bits.
const SIZE_MAX: u64 = (u32::MAX as u64 - 1) * BLOCK_BYTES;

/// LIMIT: how many pieces of a read are looked up before they are read; then the file is looked at again.
const PIECES: usize = 8;

/// The place of a file that came with the layer below, in [`Data::born`].
const BEFORE: u32 = u32::MAX;

thread_local! {
    /// Where a write that covers blocks in part is put together.
    static WHOLE_BLOCKS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A file, as long as it has a name or the kernel knows it.
#[derive(Debug)]
pub(super) struct FileNode {
    ino: Ino,
    data: RwLock<Data>,
    /// Open data files by slot: few, as most files are in one or two layers.
    handles: RwLock<Vec<(u32, Arc<DataFile>)>>,
    syncs: Syncs,
    /// Writers that may have put into the upper what the page map does not say yet.
    unmapped: AtomicUsize,
}

#[derive(Debug)]
struct Data {
    size: u64,
    map: PageMap,
    /// The newest slot in which it has a data file that this volume wrote.
    own: Option<u32>,
    /// The slot of the upper it was made in, or [`BEFORE`].
    born: u32,
    /// A cut that may not be on disk yet.
    cut: Option<Cut>,
}

/// CRASH: A cut hides what is below. If the file grew again and only that reached the disk, old contents would show
/// in it; so the cut must be on disk before the file may grow.
#[derive(Debug, Clone, Copy)]
struct Cut {
    /// The upper in whose journal it is.
    slot: u32,
    /// Where its record ends; `None` if it could not be appended.
    position: Option<u64>,
}

/// A stretch of a read that is in one place.
#[derive(Clone, Copy)]
struct Piece {
    slot: u32,
    bytes: usize,
}

impl FileNode {
    pub(super) fn new(ino: Ino, image: FileImage, upper: u32) -> Self {
        let own = image.in_upper.then_some(upper);
        let born = if image.in_base { BEFORE } else { upper };
        // What an open volume begins with is on disk.
        let syncs = if image.in_upper { Syncs::synced() } else { Syncs::default() };
        Self { syncs, ..Self::with(ino, Data { size: image.size, map: image.map, own, born, cut: None }) }
    }

    /// A file that was just made.
    pub(super) fn empty(ino: Ino, upper: u32) -> Self {
        Self::with(ino, Data { size: 0, map: PageMap::default(), own: None, born: upper, cut: None })
    }

    fn with(ino: Ino, data: Data) -> Self {
        let (handles, syncs, unmapped) = (RwLock::default(), Syncs::default(), AtomicUsize::new(0));
        Self { ino, data: RwLock::new(data), handles, syncs, unmapped }
    }

    pub(super) fn ino(&self) -> Ino {
        self.ino
    }

    pub(super) fn size(&self) -> u64 {
        self.data.read().size
    }

    /// The data file in a slot.
    fn handle(&self, core: &Core, slot: u32) -> io::Result<Arc<DataFile>> {
        if let Some((_, file)) = self.handles.read().iter().find(|(at, _)| *at == slot) {
            return Ok(file.clone());
        }
        let file = Arc::new(core.slots.open(slot, self.ino)?);
        Ok(self.keep(core, slot, file))
    }

    fn keep(&self, core: &Core, slot: u32, file: Arc<DataFile>) -> Arc<DataFile> {
        core.count_handle();
        let mut handles = self.handles.write();
        if let Some((_, other)) = handles.iter().find(|(at, _)| *at == slot) {
            core.uncount_handles(1);
            return other.clone();
        }
        handles.push((slot, file.clone()));
        file
    }

    /// Closes the data files; answers how many. They are opened again when they are needed.
    pub(super) fn close_handles(&self) -> usize {
        std::mem::take(&mut *self.handles.write()).len()
    }

    /// Reads; answers how many bytes there were.
    pub(super) fn read(&self, core: &Core, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let (pieces, count) = self.pieces(at, into.len() - done);
            if count == 0 {
                break;
            }
            let mut at = at;
            for piece in &pieces[..count] {
                let part = &mut into[done..done + piece.bytes];
                if let Err(error) = self.read_piece(core, piece.slot, at, part) {
                    // Compaction may have moved it since, and its layer be gone.
                    if self.data.read().map.get((at / BLOCK_BYTES) as u32) == piece.slot {
                        return Err(error);
                    }
                    break;
                }
                done += piece.bytes;
                at += piece.bytes as u64;
            }
        }
        Ok(done)
    }

    /// Looks up where the next bytes are. The lock is not held while they are read: a slot that is named here keeps
    /// its bytes, unless they are the very ones being written, which the kernel does not do at the same time.
    fn pieces(&self, offset: u64, length: usize) -> ([Piece; PIECES], usize) {
        let mut pieces = [Piece { slot: HOLE, bytes: 0 }; PIECES];
        let data = self.data.read();
        let end = data.size.min(offset.saturating_add(length as u64));
        let (mut at, mut count) = (offset, 0);
        while at < end && count < PIECES {
            let block = (at / BLOCK_BYTES) as u32;
            let (slot, run) = data.map.run_at(block, blocks(end) - block);
            let until = end.min((u64::from(block) + u64::from(run)) * BLOCK_BYTES);
            pieces[count] = Piece { slot, bytes: (until - at) as usize };
            count += 1;
            at = until;
        }
        (pieces, count)
    }

    /// Reads bytes that are in one slot.
    fn read_piece(&self, core: &Core, slot: u32, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if slot == HOLE {
            into.fill(0);
            return Ok(());
        }
        self.handle(core, slot)?.read_at(into, offset)
    }

    /// Brings here what a change of these bytes will need from below, before any lock is taken: a layer of which only a
    /// part is on this node makes whoever needs the rest wait for the bucket.
    pub(super) fn prepare(&self, core: &Core, start: u64, end: u64) -> io::Result<()> {
        for edge in [start, end] {
            if !edge.is_multiple_of(BLOCK_BYTES) {
                self.read(core, edge - edge % BLOCK_BYTES, &mut [0])?;
            }
        }
        Ok(())
    }

    /// Writes.
    pub(super) fn write(&self, core: &Core, upper: &Upper, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= SIZE_MAX).ok_or(Errno::FBIG)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let first = (offset / BLOCK_BYTES) as u32;
        let count = blocks(end) - first;
        if self.write_in_place(core, upper, offset, bytes)? {
            return Ok(());
        }
        let mut data = self.data.write();
        if end > data.size {
            self.may_grow(&mut data, upper)?;
        }
        let file = self.upper_file(core, &mut data, upper)?;
        if let Err(error) = self.write_blocks(core, &data, upper, file.file()?, offset, bytes) {
            // The data file must not stay longer than the file.
            if end > data.size {
                file.file()?.set_len(data.size)?;
            }
            return Err(error);
        }
        data.map.set(first, count, upper.slot);
        data.size = data.size.max(end);
        self.syncs.changed();
        Ok(())
    }

    /// Writes blocks that are in the upper already, or that are covered whole, within the file's size: as nearly always.
    /// Many such writes may go on at once. Tells whether this was one.
    fn write_in_place(&self, core: &Core, upper: &Upper, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        let end = offset + bytes.len() as u64;
        let first = (offset / BLOCK_BYTES) as u32;
        let count = blocks(end) - first;
        let data = self.data.read();
        if end > data.size || data.own != Some(upper.slot) {
            return Ok(false);
        }
        let is_in_upper = data.map.all_in(first, count, upper.slot);
        let is_whole = offset.is_multiple_of(BLOCK_BYTES) && (end.is_multiple_of(BLOCK_BYTES) || end == data.size);
        if !is_in_upper && !is_whole {
            return Ok(false);
        }
        let _unmapped = (!is_in_upper).then(|| Unmapped::one(&self.unmapped));
        self.handle(core, upper.slot)?.file()?.write_all_at(bytes, offset)?;
        drop(data);
        if !is_in_upper {
            // Only now may it be read from there.
            self.data.write().map.set(first, count, upper.slot);
        }
        self.syncs.changed();
        Ok(true)
    }

    /// Writes blocks that may not be in the upper yet. Of those covered in part, the rest comes from below.
    ///
    /// CRASH: A block goes into the upper with one write, so that a kill cannot leave it there with half its contents.
    fn write_blocks(
        &self,
        core: &Core,
        data: &Data,
        upper: &Upper,
        file: &File,
        offset: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        let is_below = |block: u64| !matches!(data.map.get(block as u32), HOLE) && !is_in(data, block, upper);
        let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        let start = if is_below(first) { first * BLOCK_BYTES } else { offset };
        let stop = if is_below(last) { data.size.min((last + 1) * BLOCK_BYTES).max(end) } else { end };
        if (start, stop) == (offset, end) {
            return file.write_all_at(bytes, offset);
        }
        WHOLE_BLOCKS.with_borrow_mut(|whole| {
            whole.clear();
            whole.resize((stop - start) as usize, 0);
            let (head, tail) = ((offset - start) as usize, (end - start) as usize);
            let known = (data.size.saturating_sub(start) as usize).min(head);
            if known > 0 {
                self.read_piece(core, data.map.get(first as u32), start, &mut whole[..known])?;
            }
            if tail < whole.len() {
                self.read_piece(core, data.map.get(last as u32), end, &mut whole[tail..])?;
            }
            whole[head..tail].copy_from_slice(bytes);
            file.write_all_at(whole, start)
        })
    }

    /// The data file in the upper, made if there is none.
    fn upper_file(&self, core: &Core, data: &mut Data, upper: &Upper) -> io::Result<Arc<DataFile>> {
        if data.own == Some(upper.slot) {
            return self.handle(core, upper.slot);
        }
        let file = Arc::new(DataFile::Whole(upper.create_data(self.ino, data.size)?));
        data.own = Some(upper.slot);
        Ok(self.keep(core, upper.slot, file))
    }

    /// Makes sure that a file that was cut may grow again. See [`Cut`].
    fn may_grow(&self, data: &mut Data, upper: &Upper) -> Result<(), Errno> {
        let Some(cut) = data.cut.filter(|cut| cut.slot == upper.slot) else { return Ok(()) };
        let position = match cut.position {
            Some(position) => position,
            None => upper.journal.append(&Record::Truncate { ino: self.ino, size: data.size })?,
        };
        if !upper.journal.is_synced(position) {
            upper.journal.sync()?;
        }
        data.cut = None;
        Ok(())
    }

    /// Cuts or lengthens.
    pub(super) fn truncate(&self, core: &Core, upper: &Upper, size: u64) -> io::Result<()> {
        if size > SIZE_MAX {
            return Err(Errno::FBIG.into());
        }
        let mut data = self.data.write();
        if size == data.size {
            return Ok(());
        }
        if size > data.size {
            self.may_grow(&mut data, upper)?;
            self.upper_file(core, &mut data, upper)?.file()?.set_len(size)?;
            data.size = size;
        } else {
            self.cut(core, &mut data, upper, size)?;
        }
        self.syncs.changed();
        Ok(())
    }

    /// CRASH: The data file is cut before the journal tells it. A cut that is not in the journal is found by the data
    /// file's length when the volume is opened; the other way round, old pages beyond the cut would seem written later.
    fn cut(&self, core: &Core, data: &mut Data, upper: &Upper, size: u64) -> io::Result<()> {
        let has_below = data.born != upper.slot;
        if has_below {
            upper.journal.reserve()?;
        }
        let file = self.upper_file(core, data, upper)?;
        let file = file.file()?;
        let last = size / BLOCK_BYTES;
        if !size.is_multiple_of(BLOCK_BYTES) && data.map.get(last as u32) != HOLE && !is_in(data, last, upper) {
            self.copy_up(core, data, file, last)?;
            data.map.set(last as u32, 1, upper.slot);
        }
        file.set_len(size)?;
        data.size = size;
        data.map.truncate(blocks(size));
        if has_below {
            data.cut = Some(Cut { slot: upper.slot, position: None });
            let position = upper.journal.append(&Record::Truncate { ino: self.ino, size })?;
            data.cut = Some(Cut { slot: upper.slot, position: Some(position) });
        }
        Ok(())
    }

    fn copy_up(&self, core: &Core, data: &Data, file: &File, block: u64) -> io::Result<()> {
        let start = block * BLOCK_BYTES;
        let mut bytes = vec![0; (data.size - start).min(BLOCK_BYTES) as usize];
        self.read_piece(core, data.map.get(block as u32), start, &mut bytes)?;
        file.write_all_at(&bytes, start)
    }

    /// Lengthens, if it is shorter, with disk space set aside. The new part stays a hole until it is written.
    pub(super) fn allocate(&self, core: &Core, upper: &Upper, size: u64) -> io::Result<()> {
        if size > SIZE_MAX {
            return Err(Errno::FBIG.into());
        }
        let mut data = self.data.write();
        if size <= data.size {
            return Ok(());
        }
        self.may_grow(&mut data, upper)?;
        let file = self.upper_file(core, &mut data, upper)?;
        let file = file.file()?;
        match rustix::fs::fallocate(file, FallocateFlags::empty(), data.size, size - data.size) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => file.set_len(size)?,
            Err(errno) => {
                file.set_len(data.size)?;
                return Err(errno.into());
            }
        }
        data.size = size;
        self.syncs.changed();
        Ok(())
    }

    /// Brings the contents to disk, in the upper and in those sealed before it.
    pub(super) fn sync(&self, core: &Core, upper: &Upper, sealed: &[Arc<Upper>]) -> Result<(), Errno> {
        self.syncs.sync(|| {
            for upper in sealed.iter().map(Arc::as_ref).chain([upper]) {
                let own = self.data.read().own;
                // It may have been sealed, and the file gone on in the next one, since the caller looked.
                match own {
                    Some(slot) if slot == upper.slot => upper.sync_data(self.handle(core, slot)?.file()?)?,
                    Some(slot) if slot > upper.slot => {
                        if let Some(file) = upper.open_data(self.ino)? {
                            upper.sync_data(&file)?;
                        }
                    }
                    _ => {}
                }
            }
            Ok(())
        })
    }

    /// See [`PageMap::next_in`].
    pub(super) fn next_in(&self, from: u32, max: u32, is_wanted: impl Fn(u32) -> bool) -> Option<Run> {
        self.data.read().map.next_in(from, max, is_wanted)
    }

    /// See [`PageMap::tally`].
    pub(super) fn tally(&self, pages: &mut [u64]) {
        self.data.read().map.tally(pages);
    }

    /// Reads pages that are below the upper, past everything that is open for readers.
    pub(super) fn read_below(&self, core: &Core, run: Run, pages: &mut [u8]) -> io::Result<()> {
        core.slots.open(run.slot, self.ino)?.read_at(pages, u64::from(run.start) * BLOCK_BYTES)
    }

    /// Puts copies of pages from below into the upper, as far as they are still there; answers how many.
    pub(super) fn lift(&self, core: &Core, upper: &Upper, run: Run, pages: &[u8]) -> io::Result<u32> {
        let mut data = self.data.write();
        // What a writer has just put into the upper must not be covered by what was there before.
        if self.unmapped.load(Ordering::Acquire) > 0 {
            return Ok(0);
        }
        let (mut at, end, mut lifted) = (run.start, run.start + run.len, 0);
        while at < end {
            let (slot, count) = data.map.run_at(at, end - at);
            if slot == run.slot {
                let from = (at - run.start) as usize * BLOCK_BYTES as usize;
                self.lift_run(core, &mut data, upper, at, &pages[from..][..count as usize * BLOCK_BYTES as usize])?;
                lifted += count;
            }
            at += count;
        }
        if lifted > 0 {
            self.syncs.changed();
        }
        Ok(lifted)
    }

    fn lift_run(&self, core: &Core, data: &mut Data, upper: &Upper, first: u32, pages: &[u8]) -> io::Result<()> {
        let (start, count) = (u64::from(first) * BLOCK_BYTES, pages.len() as u64 / BLOCK_BYTES);
        let within = data.size.saturating_sub(start).min(pages.len() as u64);
        let file = self.upper_file(core, data, upper)?;
        let file = file.file()?;
        if let Err(error) = file.write_all_at(&pages[..within as usize], start) {
            // Else the next seal would find there what the page map finds below.
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, start, pages.len() as u64)?;
            return Err(error);
        }
        data.map.set(first, count as u32, upper.slot);
        Ok(())
    }

    /// Closes data files in slots that are of no use any more.
    pub(super) fn let_go(&self, core: &Core, is_used: impl Fn(u32) -> bool) {
        let mut handles = self.handles.write();
        let before = handles.len();
        handles.retain(|(slot, _)| is_used(*slot));
        core.uncount_handles(before - handles.len());
    }

    /// Deletes its contents for good: it has no name, and nobody can reach it.
    pub(super) fn discard(&self, core: &Core, upper: &Upper) {
        core.uncount_handles(self.close_handles());
        let data = self.data.read();
        if data.own == Some(upper.slot) {
            upper.discard_data(self.ino, data.born != upper.slot || self.syncs.ever());
        }
    }
}

/// Counts one, until it is dropped.
struct Unmapped<'a>(&'a AtomicUsize);

impl<'a> Unmapped<'a> {
    fn one(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Unmapped<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn is_in(data: &Data, block: u64, upper: &Upper) -> bool {
    data.map.get(block as u32) == upper.slot
}
