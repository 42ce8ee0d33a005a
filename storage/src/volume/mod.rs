//! A volume: what Postgres sees as its data directory. A chain of layers below, one private upper on top, through FUSE.
//!
//! Reads go through a page map in memory, which names for each 8 KiB block the layer that has it; so depth costs
//! nothing. Writes go to the upper: sparse files by inode number, and a journal of what was done to the tree. An upper
//! is an unsealed layer: [`Volume::seal`] lets the volume go on with an empty one, and makes of the old one a layer by
//! adding a manifest and the WAL. While it is mounted, compaction keeps the layers below few ([`compact`]).
//!
//! ```text
//! branches/<branch id>/
//!   volume.json       which layer the volume lies on, and which upper is on it
//!   uppers/<number>/  the upper; while one is being sealed, it and the next
//!   wal/              pg_wal: a plain directory beside the mount, where `../wal` of the volume's symlink leads
//! ```
//!
//! The layers below may be on this node in part or not at all, if the volume knows where to get them
//! ([`VolumeDirs::source`]): a read then waits for the pages it needs, and nothing else waits for it.
//!
//! The bytes are specified in `docs/formats/volume.md`.
//!
//! **Invariants**
//! - A sealed layer is never written to.
//! - What Postgres synced is found again after any crash: a killed process, or a power cut.
//! - A seal keeps writers waiting for one write to the journal.
//! - One process has a volume open at a time: it holds a lock on `uppers/`.
//!
//! **Crash**: `Volume::create` is done when `volume.json` is there; `Volume::open` finishes what a seal had begun, cuts
//! the torn end of the journal, mends blocks of which half reached the disk, and deletes what belongs to nothing.
//!
//! Absent on purpose: hard links, extended attributes, special files, tablespaces outside.

mod boot;
mod check;
mod compact;
mod core;
mod file;
mod fuse;
mod image;
mod journal;
mod page_map;
mod seal;
mod slots;
mod tree;
mod upper;
mod wal;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ebb_types::{LayerId, Lsn};
use parking_lot::Mutex;
use rustix::fs::{AtFlags, FlockOperation};
use rustix::io::Errno;

use self::compact::Calls;
use self::core::Core;
use self::image::Image;
use self::journal::{Header, Record, WalEnd};
use self::seal::State;
use self::slots::{Slots, open_dir};
use self::upper::{Upper, dir_of, remove_dir, sync_dir};
use crate::error::{Error, LocalContext, Result};
use crate::layer::{ImageInfo, Ino, InodeKind, LazyLayers, Manifest, ROOT_INO};
use crate::pg_files::LOCK_FILE;

pub(crate) use self::check::{Fault, bases, look};
pub use self::fuse::{Mount, MountOptions};

/// The open volume of one branch. All methods block; none may be called from an async thread.
#[derive(Debug)]
pub struct Volume {
    dirs: VolumeDirs,
    core: Arc<Core>,
    /// Held while the upper is switched: one seal at a time.
    turn: Mutex<()>,
    /// Held while layers are completed: one at a time, oldest first. LOCK ORDER: `turn`, `finishing`, `pending`.
    finishing: Mutex<()>,
    /// Seals that have happened and whose layers are not complete yet, oldest first.
    pending: Mutex<VecDeque<Pending>>,
    /// The layers it lay on when it was opened, oldest first.
    chain: Vec<LayerId>,
    /// Whether any of them was not whole on this node then.
    is_lazy: bool,
    /// The newest complete layer, and what its control file says. Written under `finishing`.
    base: Mutex<Base>,
    /// How many layers the newest complete one reads through, itself among them.
    layers_below: AtomicUsize,
    compaction: Calls,
    /// Where the WAL ended at the last seal since the volume was opened.
    sealed_end: Mutex<Option<WalEnd>>,
    /// Locked while the volume is open.
    _lock: File,
}

/// LIMIT: seals waiting for their layers. Each keeps its upper open and makes a sync look at one more; more of them
/// at once means that the disk does not keep up.
const PENDING_MAX: usize = 32;

/// A seal whose layer is not complete yet.
#[derive(Debug, Clone)]
struct Pending {
    upper: Arc<Upper>,
    layer: LayerId,
}

/// Where a volume lives on this node. Both are on one file system.
#[derive(Debug, Clone)]
pub struct VolumeDirs {
    /// `layers/` of the node.
    pub layers: PathBuf,
    /// The branch's own directory; the volume owns `volume.json`, `uppers/` and `wal/` in it.
    pub branch: PathBuf,
    /// Where layers come from that are not whole on this node. Without it they must be.
    pub source: Option<Arc<LazyLayers>>,
}

/// The outcome of a seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// The layer that now holds the image.
    pub layer: LayerId,
    /// Whether the layer is new (`false`: nothing had changed since the last seal, and `layer` is that one).
    pub new: bool,
    /// A position that all WAL of the layer ends at or before, where known: where a record ends, except after a crash,
    /// when it may lie behind.
    pub end: Option<Lsn>,
}

#[derive(Debug, Clone, Copy)]
struct Base {
    layer: LayerId,
    info: ImageInfo,
}

impl VolumeDirs {
    fn wal(&self) -> PathBuf {
        self.branch.join("wal")
    }
}

impl Volume {
    /// Whether this branch has a volume on this node.
    pub fn exists(dirs: &VolumeDirs) -> bool {
        dirs.branch.join("volume.json").exists()
    }

    /// Makes a volume: an empty upper on `base` and a `wal/` with the WAL of that image. `base` must be ready
    /// (see [`crate::node::NodeStore::ensure_openable`]). Atomic: after a crash the volume exists whole or not at all.
    ///
    /// # Errors
    /// `Invalid` when there is one already, or when the file system cannot tell holes from data; `NoSuchLayer` when
    /// `base` is not local.
    pub fn create(dirs: &VolumeDirs, base: LayerId) -> Result<()> {
        Self::make(dirs, base, |_| Vec::new())
    }

    /// As [`Volume::create`], for a branch on an image that is not its own: without that one's replication slots, which
    /// would hold back WAL and stand for subscribers that are not this branch's (invariant I12).
    pub fn create_fork(dirs: &VolumeDirs, base: LayerId) -> Result<()> {
        Self::make(dirs, base, |manifest| removals_below(manifest, b"pg_replslot"))
    }

    /// Makes a volume whose journal begins with some records.
    fn make(dirs: &VolumeDirs, base: LayerId, first: impl FnOnce(&Manifest) -> Vec<Record>) -> Result<()> {
        if Self::exists(dirs) {
            return Err(Error::Invalid(format!("{:?} has a volume already", dirs.branch)));
        }
        let manifest = seal::read_manifest(&dirs.layers, base)?;
        fs::create_dir_all(&dirs.branch).on("create", &dirs.branch)?;
        check_holes(&dirs.branch)?;
        remove_dir(&dirs.branch.join("uppers"))?;
        let slot = manifest.chain.len() as u32;
        let upper = Upper::create(&dirs.branch, Header { upper: 0, base }, slot)?;
        for record in first(&manifest) {
            upper.journal.append(&record).on("append to the journal of", &dirs.branch)?;
        }
        upper.place().on("sync the upper of", &dirs.branch)?;
        sync_dir(&dirs.branch)?;
        let layer = dirs.layers.join(base.to_string());
        wal::seed(&layer.join("wal"), &dirs.wal(), &manifest.image)?;
        let roles = dirs.branch.join("roles.json");
        if !roles.exists() {
            seal::copy_if_there(&layer.join("roles.json"), &roles)?;
        }
        State::new(base, 0).write(&dirs.branch)?;
        dirs.branch.parent().map_or(Ok(()), sync_dir)
    }

    /// Deletes the volume of a branch with everything in it that was not sealed. Layers stay, and seals whose layers
    /// are not complete are finished first: others may lie on them. Succeeds if there is none; a volume that was cut
    /// off in the middle of this counts as not there.
    ///
    /// # Errors
    /// `Local` when the volume is open; whatever keeps a seal from being finished.
    pub fn remove(dirs: &VolumeDirs) -> Result<()> {
        let uppers = dirs.branch.join("uppers");
        let _lock = if uppers.exists() { Some(lock(&uppers)?) } else { None };
        if !Self::pending(dirs)?.is_empty() {
            finish_seals(dirs, State::read(&dirs.branch)?)?;
        }
        let state = dirs.branch.join("volume.json");
        match fs::remove_file(&state) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).on("remove", &state),
            _ => {}
        }
        if dirs.branch.exists() {
            sync_dir(&dirs.branch)?;
        }
        remove_dir(&uppers)?;
        remove_dir(&dirs.wal())
    }

    /// The layers of seals that have happened and that are not complete: opening the volume completes them, and so does
    /// whoever has it open. Oldest first; empty if there is no volume.
    ///
    /// # Errors
    /// `Local` or `Corrupt` when a file of the volume cannot be read.
    pub fn pending(dirs: &VolumeDirs) -> Result<Vec<LayerId>> {
        let uppers = dirs.branch.join("uppers");
        if !Self::exists(dirs) || !uppers.exists() {
            return Ok(Vec::new());
        }
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&uppers).on("list", &uppers)? {
            let path = entry.on("list", &uppers)?.path().join("journal");
            if !journal::is_begun(&path)? {
                continue;
            }
            let contents = match journal::read(&path) {
                // Renamed meanwhile, or never made.
                Err(Error::Local { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                contents => contents?,
            };
            if let Some(Record::Seal { layer }) = contents.records.last() {
                found.insert(contents.header.upper, *layer);
            }
        }
        Ok(found.into_values().collect())
    }

    /// Opens the volume, finding after a crash exactly what had been synced (and whatever else reached the disk).
    /// Everything found is on disk when this returns.
    ///
    /// # Errors
    /// `Local` when another process has it open; `Corrupt` when something that had been synced cannot be read;
    /// `NoSuchLayer` when the layer below is not local.
    pub fn open(dirs: &VolumeDirs) -> Result<Arc<Self>> {
        let state = State::read(&dirs.branch)?;
        let lock = lock(&dirs.branch.join("uppers"))?;
        let (state, contents) = finish_seals(dirs, state)?;
        remove_other_uppers(dirs, state.upper)?;
        let wal = dirs.wal();
        fs::create_dir_all(&wal).on("create", &wal)?;

        let manifest = seal::read_manifest(&dirs.layers, state.base)?;
        let mut image = Image::of(&manifest);
        let upper = Upper::open(&dirs.branch, &contents, image.upper_slot())?;
        let dir = dir_of(&dirs.branch, state.upper);
        let data = dir.join("data");
        let slots = Slots::of_layers(dirs, &manifest.chain);
        slots.push(&data, upper.data_dir().on("open", &data)?);
        let is_lazy = slots.is_lazy() && slots.any_missing();
        if is_lazy && let Err(error) = slots.use_boot_set(&dirs.layers.join(state.base.to_string()).join("boot")) {
            tracing::error!(%error, "a boot set is not used: the wake will be slower");
        }
        image.replay(&dir.join("journal"), &contents.records)?;
        if image.tree.lookup(ROOT_INO, LOCK_FILE).is_ok() {
            // Nobody runs on a volume that is not open. Left there, it might name a process that happens to exist.
            let gone = Record::Unlink { parent: ROOT_INO, name: LOCK_FILE.to_vec() };
            upper.journal.append(&gone).on("append to the journal of", &dir)?;
            image.replay(&dir.join("journal"), &[gone])?;
        }
        let scan = image.scan(&data, &upper.data_dir().on("open", &data)?, &slots)?;
        for name in &scan.leftovers {
            let path = data.join(name);
            fs::remove_file(&path).on("remove", &path)?;
        }
        for record in &scan.unrecorded {
            upper.journal.append(record).on("append to the journal of", &dir)?;
        }
        if scan.any_data {
            upper.mark_dirty();
        }
        if upper.is_dirty() || !scan.leftovers.is_empty() {
            upper.sync_all(&dirs.branch)?;
        }
        tracing::info!(base = %state.base, upper = state.upper, dirty = upper.is_dirty(), "volume opened");
        Ok(Arc::new(Self {
            dirs: dirs.clone(),
            core: Arc::new(Core::new(image, slots, upper)),
            turn: Mutex::default(),
            finishing: Mutex::default(),
            pending: Mutex::default(),
            layers_below: AtomicUsize::new(manifest.chain.len()),
            compaction: Calls::default(),
            chain: manifest.chain,
            is_lazy,
            base: Mutex::new(Base { layer: state.base, info: manifest.image }),
            sealed_end: Mutex::default(),
            _lock: lock,
        }))
    }

    /// Mounts it. The directory the mount point is in must hold the volume's WAL directory as `wal`
    /// (`pg_wal` in the volume is a symlink to `../wal`).
    ///
    /// When root mounts for another user, the files in `wal/` become that user's.
    ///
    /// What is read from now on is remembered for the boot set ([`Volume::write_boot_set`]), until [`Volume::booted`].
    pub fn mount(self: &Arc<Self>, at: &Path, options: &MountOptions) -> Result<Mount> {
        self.core.boot.start();
        give_wal(&self.dirs.wal(), options)?;
        Mount::new(self.clone(), self.core.clone(), at, options)
    }

    /// Whether any of its layers was not whole on this node when it was opened: reads may wait for the bucket, so that a
    /// mount needs more threads. Gets a connection to the bucket ready if so.
    pub fn reads_lazily(&self) -> bool {
        let Some(source) = self.dirs.source.as_ref().filter(|_| self.is_lazy) else { return false };
        if let Err(error) = source.warm_up() {
            tracing::warn!(%error, "layers that are missing cannot be fetched yet");
        }
        true
    }

    /// Begins to fetch, in the background and gently, all that is missing of its layers.
    ///
    /// # Errors
    /// If that cannot be begun.
    pub fn hydrate(&self) -> Result<()> {
        match self.is_lazy {
            true => self.core.slots.hydrate(self.chain.clone()),
            false => Ok(()),
        }
    }

    /// What the layer that it lies on tells of its image.
    pub fn image_info(&self) -> ImageInfo {
        self.base.lock().info
    }

    /// Puts a file into the data directory, durably, in place of one of that name. For a volume that is not mounted.
    pub fn put_file(&self, name: &str, contents: &[u8]) -> Result<()> {
        let put = || {
            match self.core.unlink(ROOT_INO, name.as_bytes()) {
                Err(Errno::NOENT) | Ok(()) => {}
                Err(error) => return Err(error),
            }
            let made = self.core.create(ROOT_INO, name.as_bytes(), 0o600)?;
            self.core.write(made.ino, 0, contents)?;
            self.core.sync_file(made.ino)?;
            self.core.sync_tree()?;
            self.core.forget(made.ino, 1);
            Ok(())
        };
        put().on("write into", &self.dirs.branch)
    }

    /// Freezes the present state into layer `id` and goes on with an empty upper; returns once the layer is complete on
    /// this node: [`Volume::begin_seal`], then [`Volume::finish_seals`].
    pub fn seal(&self, id: LayerId) -> Result<Sealed> {
        let sealed = self.begin_seal(id)?;
        self.finish_seals()?;
        Ok(sealed)
    }

    /// Freezes the present state into layer `id` and goes on with an empty upper. Writers wait at most for a few
    /// system calls; Postgres is not touched. The image is crash-consistent.
    ///
    /// When this returns, the seal has happened for good: a crash or a power cut does not undo it. The layer is complete
    /// after [`Volume::finish_seals`], which the caller sees to, or after the volume was opened again. If nothing was
    /// written since the last seal, the layer of that one is returned and `id` is not used. Calling again with the same
    /// `id` after a crash, or after a failure, finishes what was begun.
    pub fn begin_seal(&self, id: LayerId) -> Result<Sealed> {
        let _turn = self.turn.lock();
        let begun = self.pending.lock().iter().find(|pending| pending.layer == id).cloned();
        if let Some(pending) = begun {
            pending.upper.settle().on("seal", &self.dirs.branch)?;
            return Ok(Sealed { layer: id, new: true, end: None });
        }
        if seal::is_layer(&self.dirs.layers, id) {
            return Ok(Sealed { layer: id, new: true, end: None });
        }
        if self.pending.lock().len() >= PENDING_MAX {
            self.finish_seals()?;
        }
        if !self.has_changed() {
            let newest = self.pending.lock().back().map(|pending| pending.layer);
            return Ok(Sealed { layer: newest.unwrap_or_else(|| self.base()), new: false, end: None });
        }
        let sealed = self.switch(id)?;
        self.pending.lock().push_back(Pending { upper: sealed.clone(), layer: id });
        sealed.settle().on("seal", &self.dirs.branch)?;
        metrics::counter!("ebb_storage_volume_seals_total").increment(1);
        let segment_bytes = self.base.lock().info.wal_segment_bytes;
        let end = self.sealed_end.lock().as_ref().map(|end| end.lsn(segment_bytes));
        Ok(Sealed { layer: id, new: true, end })
    }

    /// Steps 1 to 4 of a seal.
    fn switch(&self, id: LayerId) -> Result<Arc<Upper>> {
        let branch = &self.dirs.branch;
        let (upper, _) = self.core.uppers();
        let base = self.base.lock().info;
        remove_dir(&dir_of(branch, upper.number).join("hold"))?;
        seal::hold_wal(&self.dirs, upper.number, &base)?;
        seal::hold_roles(&self.dirs, upper.number)?;
        let next = Upper::create(branch, Header { upper: upper.number + 1, base: id }, self.core.slots.len())?;
        let wal = self.dirs.wal();
        let begun = Instant::now();
        let last_words = || {
            // What is in the upper was in the WAL before: an end found while nobody writes is late enough.
            let end = wal::end(&wal, &base).map_err(|error| {
                tracing::error!(%error, "the end of WAL cannot be found");
                Errno::IO
            })?;
            self.sealed_end.lock().clone_from(&end);
            Ok(end.map(Record::WalEnd).into_iter().chain([Record::Seal { layer: id }]).collect())
        };
        let sealed = self.core.switch(next, last_words).on("seal", branch)?;
        metrics::histogram!("ebb_storage_volume_seal_stall_seconds").record(begun.elapsed().as_secs_f64());
        if let Err(error) = seal::hold_wal(&self.dirs, upper.number, &base) {
            // Finishing tries again.
            tracing::warn!(%error, "WAL could not be held right after a seal");
        }
        Ok(sealed)
    }

    /// Completes the layers of all seals that have happened. Idempotent; after a failure the next call tries again.
    pub fn finish_seals(&self) -> Result<()> {
        let _finishing = self.finishing.lock();
        loop {
            let oldest = self.pending.lock().front().cloned();
            let Some(Pending { upper, layer }) = oldest else { return Ok(()) };
            self.finish(&upper, layer)?;
            self.pending.lock().pop_front();
            self.compaction.want();
        }
    }

    /// Steps 5 to 7.
    fn finish(&self, sealed: &Upper, layer: LayerId) -> Result<()> {
        let base = self.base();
        let (upper, others) = self.core.uppers();
        let next = others.into_iter().chain([upper]).find(|next| next.number == sealed.number + 1);
        next.map_or(Ok(()), |next| next.place()).on("sync the upper of", &self.dirs.branch)?;
        if dir_of(&self.dirs.branch, sealed.number).exists() {
            sealed.sync_all(&self.dirs.branch)?;
        }
        seal::finish(&self.dirs, sealed.number, base, layer)?;
        let manifest = seal::read_manifest(&self.dirs.layers, layer)?;
        *self.base.lock() = Base { layer, info: manifest.image };
        self.layers_below.store(manifest.chain.len(), Ordering::Relaxed);
        self.core.is_on_disk(sealed);
        self.core.slots.became_layer(sealed.slot, layer, self.dirs.layers.join(layer.to_string()).join("data"));
        tracing::info!(%layer, upper = sealed.number + 1, "volume sealed");
        Ok(())
    }

    /// The newest complete layer below the upper.
    pub fn base(&self) -> LayerId {
        self.base.lock().layer
    }

    /// How many layers reads went through when the newest complete one was sealed.
    fn layers_below(&self) -> usize {
        self.layers_below.load(Ordering::Relaxed)
    }

    /// Whether anything was written (in the volume or in its WAL) that is in no complete layer.
    pub fn is_dirty(&self) -> bool {
        !self.pending.lock().is_empty() || self.has_changed()
    }

    /// Whether anything was written since the last seal.
    fn has_changed(&self) -> bool {
        if self.core.uppers().0.is_dirty() {
            return true;
        }
        // Better a seal too many than a commit that is in no layer.
        self.has_new_wal().unwrap_or_else(|error| {
            tracing::warn!(%error, "WAL cannot be compared with what was sealed");
            true
        })
    }

    fn has_new_wal(&self) -> Result<bool> {
        let info = self.base.lock().info;
        let end = wal::end(&self.dirs.wal(), &info)?;
        if self.sealed_end.lock().as_ref().is_some_and(|sealed| Some(sealed) != end.as_ref()) {
            return Ok(true);
        }
        // The same end is no proof: after a crash WAL lies over pages of a former end.
        self.finish_seals()?;
        let base = *self.base.lock();
        let layer = self.dirs.layers.join(base.layer.to_string());
        wal::changed_since(&self.dirs.wal(), &layer.join("wal"), &base.info)
    }
}

/// The records that remove everything in a directory at the top.
fn removals_below(manifest: &Manifest, directory: &[u8]) -> Vec<Record> {
    let top = manifest.inodes.iter().find(|inode| inode.parent == ROOT_INO && inode.name == directory);
    let mut records = Vec::new();
    if let Some(top) = top {
        remove_children(manifest, top.ino, &mut records);
    }
    records
}

fn remove_children(manifest: &Manifest, parent: Ino, records: &mut Vec<Record>) {
    for inode in manifest.inodes.iter().filter(|inode| inode.parent == parent && inode.ino != ROOT_INO) {
        let name = inode.name.clone();
        if matches!(inode.kind, InodeKind::Directory) {
            remove_children(manifest, inode.ino, records);
            records.push(Record::Rmdir { parent, name });
        } else {
            records.push(Record::Unlink { parent, name });
        }
    }
}

/// Follows seals that were begun to the upper that is not sealed.
fn finish_seals(dirs: &VolumeDirs, mut state: State) -> Result<(State, journal::Contents)> {
    loop {
        let path = |number| dir_of(&dirs.branch, number).join("journal");
        if !path(state.upper).exists() {
            // The last step of a seal is missing.
            let header = journal::read_header(&path(state.upper + 1))?;
            state = State::new(header.base, header.upper);
            // CRASH: Now, and not with the next layer: the journal that leads on from here may be its.
            state.write(&dirs.branch)?;
        }
        let contents = journal::read(&path(state.upper))?;
        if (Header { upper: state.upper, base: state.base }) != contents.header {
            let why = format!("it is of upper {} on layer {}", contents.header.upper, contents.header.base);
            return Err(Error::Corrupt { what: format!("journal {:?}", path(state.upper)), why });
        }
        let Some(&Record::Seal { layer }) = contents.records.last() else {
            return Ok((state, contents));
        };
        let next = Header { upper: state.upper + 1, base: layer };
        if journal::is_begun(&path(next.upper))? {
            upper::place(&dir_of(&dirs.branch, next.upper)).on("sync the upper of", &dirs.branch)?;
        } else {
            Upper::create(&dirs.branch, next, 0)?.place().on("sync the upper of", &dirs.branch)?;
        }
        // Nothing is written through this one, so its slot does not matter.
        Upper::open(&dirs.branch, &contents, 0)?.sync_all(&dirs.branch)?;
        seal::finish(dirs, state.upper, state.base, layer)?;
        tracing::info!(%layer, "a seal was finished");
        state = State::new(layer, state.upper + 1);
    }
}

/// Deletes what is left of seals that did not happen.
fn remove_other_uppers(dirs: &VolumeDirs, upper: u64) -> Result<()> {
    let uppers = dirs.branch.join("uppers");
    for entry in fs::read_dir(&uppers).on("list", &uppers)? {
        let entry = entry.on("list", &uppers)?;
        if entry.file_name().to_str() != Some(upper.to_string().as_str()) {
            remove_dir(&entry.path())?;
        }
    }
    remove_dir(&dir_of(&dirs.branch, upper).join("hold"))
}

/// Takes the lock of a volume, without waiting.
fn lock(uppers: &Path) -> Result<File> {
    let dir = File::open(uppers).on("open", uppers)?;
    rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).on("lock", uppers)?;
    Ok(dir)
}

/// Refuses a file system that does not keep holes: what an upper does not have would seem to be zeroes.
fn check_holes(dir: &Path) -> Result<()> {
    let path = dir.join("holes.new");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).on("create", &path)?;
    let (at, length) = (16 * crate::layer::BLOCK_BYTES, crate::layer::BLOCK_BYTES);
    file.write_all_at(&vec![1; length as usize], at).on("write", &path)?;
    file.set_len(2 * at).on("write", &path)?;
    let found = image::next_data(&file, 0, 2 * at).on("seek in", &path)?;
    fs::remove_file(&path).on("remove", &path)?;
    if found == Some((at, at + length)) {
        return Ok(());
    }
    Err(Error::Invalid(format!("the file system of {dir:?} does not keep holes in files (ext4, xfs and btrfs do)")))
}

/// Makes `wal/` and what is in it the property of the user Postgres runs as, except what other branches have, too.
fn give_wal(wal: &Path, options: &MountOptions) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let dir = open_dir(wal).on("open", wal)?;
    let owner = Some(rustix::process::Uid::from_raw(options.uid));
    let group = Some(rustix::process::Gid::from_raw(options.gid));
    rustix::fs::fchown(&dir, owner, group).on("give away", wal)?;
    rustix::fs::fchmod(&dir, rustix::fs::Mode::from_raw_mode(0o700)).on("restrict", wal)?;
    for entry in fs::read_dir(wal).on("list", wal)? {
        let entry = entry.on("list", wal)?;
        let name = entry.file_name();
        if entry.metadata().is_ok_and(|found| found.is_file() && found.mode() & 0o777 == wal::SHARED_MODE) {
            continue;
        }
        rustix::fs::chownat(&dir, &name, owner, group, AtFlags::SYMLINK_NOFOLLOW).on("give away", &wal.join(&name))?;
    }
    Ok(())
}

/// What a failed system call means to the caller of a file operation.
fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
