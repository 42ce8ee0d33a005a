//! The state of a volume as its files on disk tell it: the manifest of the layer below, then the journal of the upper,
//! then the upper's data files.
//!
//! Both ways to need it lead here: opening a volume, and writing the manifest of an upper that was sealed. So what a
//! crash leaves and what a seal finds are read by the same code.
//!
//! **Crash**: [`Image::scan`] also mends what a power cut leaves half done, by writing into the upper's data files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use ebb_types::LayerId;
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use super::journal::Record;
use super::page_map::{HOLE, PageMap};
use super::slots::{Slots, open_in};
use super::tree::{Kind, Tree};
use super::upper::create_data;
use crate::error::{Error, LocalContext, Result};
use crate::layer::{BLOCK_BYTES, ImageInfo, Ino, Inode, InodeKind, Manifest};
use crate::pg_files::{self, PG_CONTROL};

const BLOCK: usize = BLOCK_BYTES as usize;

/// The tree and the page maps at one moment.
#[derive(Debug)]
pub(super) struct Image {
    pub tree: Tree,
    pub files: HashMap<Ino, FileImage>,
    /// The layers of the slots below the upper.
    chain: Vec<LayerId>,
    /// What the layer below says about itself.
    base_info: ImageInfo,
    /// The smallest sizes that files of the layer below were cut to since.
    floors: HashMap<Ino, u64>,
}

/// A regular file.
#[derive(Debug, Default)]
pub(super) struct FileImage {
    pub size: u64,
    pub map: PageMap,
    /// Whether the layer below has it.
    pub in_base: bool,
    /// Whether it has a data file in the upper.
    pub in_upper: bool,
}

/// What [`Image::scan`] found besides the image.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Names in `data/` that belong to nothing: data of files that are gone, files never finished.
    pub leftovers: Vec<OsString>,
    /// Files that were cut without the journal telling it: the records that are missing.
    pub unrecorded: Vec<Record>,
    /// Whether any data file belongs to the image.
    pub any_data: bool,
}

impl Image {
    /// The image of a sealed layer.
    pub(super) fn of(manifest: &Manifest) -> Self {
        let mut files = HashMap::with_capacity(manifest.inodes.len());
        for inode in &manifest.inodes {
            if let InodeKind::File { size, runs } = &inode.kind {
                let file = FileImage { size: *size, map: PageMap::from_runs(runs), in_base: true, in_upper: false };
                files.insert(inode.ino, file);
            }
        }
        Self {
            tree: Tree::of(manifest),
            files,
            chain: manifest.chain.clone(),
            base_info: manifest.image,
            floors: HashMap::new(),
        }
    }

    /// The slot of the upper that lies on this image's layer.
    pub(super) fn upper_slot(&self) -> u32 {
        self.chain.len() as u32
    }

    /// Carries out a journal. `what` names it.
    ///
    /// # Errors
    /// `Corrupt` when a record does not fit.
    pub(super) fn replay(&mut self, what: &Path, records: &[Record]) -> Result<()> {
        for record in records {
            let gone = self.tree.apply(record, now_ns()).map_err(|errno| Error::Corrupt {
                what: format!("journal {what:?}"),
                why: format!("{record:?} cannot be applied: {errno}"),
            })?;
            if let Some((ino, _)) = gone {
                self.files.remove(&ino);
            }
            match record {
                Record::Create { ino, .. } => drop(self.files.insert(*ino, FileImage::default())),
                Record::Truncate { ino, size } => {
                    let floor = self.floors.entry(*ino).or_insert(*size);
                    *floor = (*floor).min(*size);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes in the data files of the upper, mending what needs it. `path` names the directory `data`.
    pub(super) fn scan(&mut self, path: &Path, data: &OwnedFd, slots: &Slots) -> Result<Scan> {
        let mut scan = Scan::default();
        let mut found = BTreeSet::new();
        for entry in std::fs::read_dir(path).on("list", path)? {
            let name = entry.on("list", path)?.file_name();
            match name.to_str().and_then(|name| name.parse::<Ino>().ok()) {
                Some(ino) if self.files.contains_key(&ino) => drop(found.insert(ino)),
                ino => {
                    // Its number may have been given to a file of which nothing else is left.
                    self.tree.skip_inos_below(ino.map_or(0, |ino| ino.saturating_add(1)));
                    scan.leftovers.push(name);
                }
            }
        }
        let cut: Vec<_> = self.floors.iter().filter(|(ino, _)| !found.contains(ino)).map(|(i, f)| (*i, *f)).collect();
        for (ino, floor) in cut {
            let Some(file) = self.files.get(&ino) else { continue };
            create_data(data, ino, floor.min(file.size)).on("create", &path.join(ino.to_string()))?;
            found.insert(ino);
        }
        scan.any_data = !found.is_empty();
        for ino in found {
            self.scan_file(path, data, ino, slots, &mut scan)?;
        }
        Ok(scan)
    }

    fn scan_file(&mut self, path: &Path, data: &OwnedFd, ino: Ino, slots: &Slots, scan: &mut Scan) -> Result<()> {
        let path = path.join(ino.to_string());
        let upper = open_in(data, ino, OFlags::RDWR).on("open", &path)?;
        let meta = upper.metadata().on("read", &path)?;
        let (slot, size) = (self.upper_slot(), meta.len());
        let (recorded, file) = (self.floors.get(&ino).copied(), self.files.entry(ino).or_default());
        if file.in_base && size < file.size && recorded.is_none_or(|floor| size < floor) {
            scan.unrecorded.push(Record::Truncate { ino, size });
        }
        let floor = recorded.unwrap_or(u64::MAX).min(size);
        let (whole, mut partial) = coverage(&upper, size).on("seek in", &path)?;
        if floor < file.size {
            file.map.truncate(blocks(floor));
            // The block that the cut went through is the upper's, though only its front shows through from below.
            let cut = (floor / BLOCK_BYTES) as u32;
            if !floor.is_multiple_of(BLOCK_BYTES) && file.map.get(cut) != HOLE && !holds(&whole, cut) {
                partial.entry(cut).or_default();
            }
        }
        (file.size, file.in_upper) = (size, true);
        let below = Below { ino, map: &file.map, floor, slots };
        if mend(&upper, size, &below, &partial).on("mend", &path)? {
            upper.sync_data().on("sync", &path)?;
        }
        for (start, len) in whole.into_iter().chain(partial.into_keys().map(|block| (block, 1))) {
            file.map.set(start, len, slot);
        }
        if let Some(entry) = self.tree.get_mut(ino) {
            entry.mtime_ns = meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec());
        }
        Ok(())
    }

    /// What the control file of this image says. An image without one (nothing that Postgres starts) says what the
    /// layer below said.
    pub(super) fn info(&self, slots: &Slots) -> Result<ImageInfo> {
        let (Some(version), Some(control)) = (self.tree.find("PG_VERSION"), self.tree.find(PG_CONTROL)) else {
            return Ok(self.base_info);
        };
        pg_files::image_info(&self.read_file(version, slots)?, &self.read_file(control, slots)?)
    }

    /// Whether Postgres would find its control file in this image.
    pub(super) fn has_control(&self) -> bool {
        self.tree.find(PG_CONTROL).is_some()
    }

    /// The whole contents of a small file.
    fn read_file(&self, ino: Ino, slots: &Slots) -> Result<Vec<u8>> {
        let Some(file) = self.files.get(&ino) else { return Ok(Vec::new()) };
        let below = Below { ino, map: &file.map, floor: u64::MAX, slots };
        let mut bytes = vec![0; blocks(file.size) as usize * BLOCK];
        for (number, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
            below.read(number as u32, block).on("read", Path::new(PG_CONTROL))?;
        }
        bytes.truncate(file.size as usize);
        Ok(bytes)
    }

    /// The manifest of this image, sealed as layer `id`. Layers that no page is found in any more leave the chain.
    pub(super) fn manifest(&self, id: LayerId, image: ImageInfo) -> Manifest {
        let mut runs: HashMap<Ino, _> = self.files.iter().map(|(&ino, file)| (ino, file.map.runs())).collect();
        let mut used: BTreeSet<u32> = runs.values().flatten().map(|run| run.slot).collect();
        used.insert(self.upper_slot());
        let renumbered: HashMap<u32, u32> = used.iter().copied().zip(0..).collect();
        let chain = used.iter().map(|&slot| self.chain.get(slot as usize).copied().unwrap_or(id)).collect();
        let mut inodes: Vec<Inode> = (self.tree.entries())
            .map(|(ino, entry)| Inode {
                ino,
                parent: entry.parent,
                name: entry.name.clone(),
                mode: entry.mode,
                mtime_ns: entry.mtime_ns,
                kind: match &entry.kind {
                    Kind::Directory(_) => InodeKind::Directory,
                    Kind::Symlink(target) => InodeKind::Symlink { target: target.clone() },
                    Kind::File => {
                        let mut runs = runs.remove(&ino).unwrap_or_default();
                        runs.iter_mut().for_each(|run| run.slot = renumbered[&run.slot]);
                        InodeKind::File { size: self.files.get(&ino).map_or(0, |file| file.size), runs }
                    }
                },
            })
            .collect();
        inodes.sort_unstable_by_key(|inode| inode.ino);
        Manifest { id, chain, next_ino: self.tree.next_ino(), inodes, image }
    }
}

/// A file as it is without the upper.
struct Below<'a> {
    ino: Ino,
    map: &'a PageMap,
    /// Bytes from here on are zeroes.
    floor: u64,
    slots: &'a Slots,
}

impl Below<'_> {
    /// Reads a block, and tells whether it is in any layer.
    fn read(&self, block: u32, into: &mut [u8]) -> io::Result<bool> {
        into.fill(0);
        let slot = self.map.get(block);
        if slot == HOLE {
            return Ok(false);
        }
        let start = u64::from(block) * BLOCK_BYTES;
        let until = usize::try_from(self.floor.saturating_sub(start)).unwrap_or(usize::MAX).min(into.len());
        self.slots.open(slot, self.ino)?.read_at(&mut into[..until], start)?;
        Ok(true)
    }
}

/// The parts of a block that are data, as offsets in it.
type Parts = Vec<(usize, usize)>;

/// A first block and how many.
type BlockRun = (u32, u32);

/// Which blocks of a data file are data: runs of whole ones, and the parts of those that are not.
fn coverage(file: &File, size: u64) -> io::Result<(Vec<BlockRun>, BTreeMap<u32, Parts>)> {
    let (mut whole, mut partial) = (Vec::new(), BTreeMap::<u32, Parts>::new());
    let mut at = 0;
    while let Some((start, end)) = next_data(file, at, size)? {
        let first_whole = start.next_multiple_of(BLOCK_BYTES).min(end);
        // The last block of the file is whole when it is data up to the file's end.
        let after_whole = if end == size { blocks(end) } else { (end / BLOCK_BYTES) as u32 };
        let mut part = |from: u64, to: u64| {
            let base = from - from % BLOCK_BYTES;
            partial
                .entry((from / BLOCK_BYTES) as u32)
                .or_default()
                .push(((from - base) as usize, (to - base) as usize));
        };
        if start < first_whole {
            part(start, first_whole);
        }
        let first = (first_whole / BLOCK_BYTES) as u32;
        if first_whole.is_multiple_of(BLOCK_BYTES) && first < after_whole {
            whole.push((first, after_whole - first));
        }
        let tail = (u64::from(after_whole) * BLOCK_BYTES).max(first_whole);
        if tail < end {
            part(tail, end);
        }
        at = end;
    }
    Ok((whole, partial))
}

/// The next stretch of data at or after an offset.
pub(super) fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if start >= size {
        return Ok(None);
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, end.min(size))))
}

/// Whether one of these runs holds a block.
fn holds(runs: &[BlockRun], block: u32) -> bool {
    runs.iter().any(|&(start, len)| (start..start + len).contains(&block))
}

/// Completes, from below, blocks of which the upper has only a part. Tells whether there was anything to write.
fn mend(upper: &File, size: u64, below: &Below<'_>, partial: &BTreeMap<u32, Parts>) -> io::Result<bool> {
    let mut mended = false;
    let mut bytes = vec![0; BLOCK];
    for (&block, parts) in partial {
        // Where below is a hole, the holes of the upper read as what they should be.
        if !below.read(block, &mut bytes)? {
            continue;
        }
        let start = u64::from(block) * BLOCK_BYTES;
        for &(from, to) in parts {
            upper.read_exact_at(&mut bytes[from..to], start + from as u64)?;
        }
        let length = size.saturating_sub(start).min(BLOCK_BYTES) as usize;
        upper.write_all_at(&bytes[..length], start)?;
        mended = true;
    }
    Ok(mended)
}

/// How many blocks a size takes.
pub(super) fn blocks(size: u64) -> u32 {
    u32::try_from(size.div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX)
}

/// Reads until the buffer is full or the file ends; what is past the end stays as it was.
pub(super) fn read_up_to(file: &File, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !into.is_empty() {
        match file.read_at(into, offset) {
            Ok(0) => break,
            Ok(read) => {
                into = &mut into[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The wall clock, for the times that files show.
pub(super) fn now_ns() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.ok().and_then(|since| i64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}
