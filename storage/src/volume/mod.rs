//! A volume: what Postgres sees as its data directory. A chain of layers below, one private upper on top, through FUSE.
//!
//! Reads go through a page map in memory, which names for each 8 KiB block the layer that has it; so depth costs
//! nothing. Writes go to the upper: sparse files by inode number, and a journal of what was done to the tree. An upper
//! is an unsealed layer: [`Volume::seal`] lets the volume go on with an empty one, and makes of the old one a layer by
//! adding a manifest and the WAL.
//!
//! ```text
//! branches/<branch id>/
//!   volume.json       which layer the volume lies on, and which upper is on it
//!   uppers/<number>/  the upper; while one is being sealed, it and the next
//!   wal/              pg_wal: a plain directory beside the mount, where `../wal` of the volume's symlink leads
//! ```
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

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use ebb_types::LayerId;
use parking_lot::Mutex;
use rustix::fs::{AtFlags, FlockOperation};
use rustix::io::Errno;

use self::core::Core;
use self::image::Image;
use self::journal::{Header, Record};
use self::seal::State;
use self::slots::{Slots, open_dir};
use self::upper::{Upper, dir_of, remove_dir, sync_dir};
use crate::error::{Error, LocalContext, Result};
use crate::layer::ImageInfo;

pub use self::fuse::{Mount, MountOptions};

/// The open volume of one branch. All methods block; none may be called from an async thread.
#[derive(Debug)]
pub struct Volume {
    dirs: VolumeDirs,
    core: Arc<Core>,
    /// Held during a seal: one at a time.
    turn: Mutex<Turn>,
    /// The newest sealed layer, and what its control file says. Written under `turn`.
    base: Mutex<Base>,
    /// Locked while the volume is open.
    _lock: File,
}

/// Where a volume lives on this node. Both are on one file system.
#[derive(Debug, Clone)]
pub struct VolumeDirs {
    /// `layers/` of the node.
    pub layers: PathBuf,
    /// The branch's own directory; the volume owns `volume.json`, `uppers/` and `wal/` in it.
    pub branch: PathBuf,
}

/// The outcome of a seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// The layer that now holds the image.
    pub layer: LayerId,
    /// Whether the layer is new (`false`: nothing had changed since the last seal, and `layer` is that one).
    pub new: bool,
}

#[derive(Debug, Clone, Copy)]
struct Base {
    layer: LayerId,
    info: ImageInfo,
}

#[derive(Debug, Default)]
struct Turn {
    /// A seal that switched uppers and then failed: it is finished before anything else is sealed.
    unfinished: Option<(Arc<Upper>, LayerId)>,
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

    /// Makes a volume: an empty upper on `base` and a `wal/` with the WAL of that image. `base` must be local
    /// (see [`crate::node::NodeStore::ensure_local`]). Atomic: after a crash the volume exists whole or not at all.
    ///
    /// # Errors
    /// `Invalid` when there is one already, or when the file system cannot tell holes from data; `NoSuchLayer` when
    /// `base` is not local.
    pub fn create(dirs: &VolumeDirs, base: LayerId) -> Result<()> {
        if Self::exists(dirs) {
            return Err(Error::Invalid(format!("{:?} has a volume already", dirs.branch)));
        }
        let manifest = seal::read_manifest(&dirs.layers, base)?;
        fs::create_dir_all(&dirs.branch).on("create", &dirs.branch)?;
        check_holes(&dirs.branch)?;
        remove_dir(&dirs.branch.join("uppers"))?;
        let slot = manifest.chain.len() as u32;
        Upper::create(&dirs.branch, Header { upper: 0, base }, slot)?;
        let layer = dirs.layers.join(base.to_string());
        wal::seed(&layer.join("wal"), &dirs.wal(), &manifest.image)?;
        let roles = dirs.branch.join("roles.json");
        if !roles.exists() {
            seal::copy_if_there(&layer.join("roles.json"), &roles)?;
        }
        State::new(base, 0).write(&dirs.branch)?;
        dirs.branch.parent().map_or(Ok(()), sync_dir)
    }

    /// Deletes the volume of a branch with everything in it that was not sealed. Layers stay. Succeeds if there is
    /// none; a volume that was cut off in the middle of this counts as not there.
    ///
    /// # Errors
    /// `Local` when the volume is open.
    pub fn remove(dirs: &VolumeDirs) -> Result<()> {
        let uppers = dirs.branch.join("uppers");
        let _lock = if uppers.exists() { Some(lock(&uppers)?) } else { None };
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
        let slots = Slots::of_layers(&dirs.layers, &manifest.chain);
        slots.push(&data, upper.data_dir().on("open", &data)?);
        image.replay(&dir.join("journal"), &contents.records)?;
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
            base: Mutex::new(Base { layer: state.base, info: manifest.image }),
            _lock: lock,
        }))
    }

    /// Mounts it. The directory the mount point is in must hold the volume's WAL directory as `wal`
    /// (`pg_wal` in the volume is a symlink to `../wal`).
    ///
    /// When root mounts for another user, the files in `wal/` become that user's.
    pub fn mount(self: &Arc<Self>, at: &Path, options: &MountOptions) -> Result<Mount> {
        give_wal(&self.dirs.wal(), options)?;
        Mount::new(self.clone(), self.core.clone(), at, options)
    }

    /// Freezes the present state into layer `id` and goes on with an empty upper. Writers wait at most for a few
    /// system calls; Postgres is not touched. The image is crash-consistent.
    ///
    /// Returns once the layer is complete on this node: manifest written, WAL captured, all of it synced. If nothing
    /// was written since the last seal, that layer is returned and `id` is not used. Calling again with the same `id`
    /// after a crash, or after a failure, finishes what was begun.
    pub fn seal(&self, id: LayerId) -> Result<Sealed> {
        let mut turn = self.turn.lock();
        if let Some((upper, layer)) = turn.unfinished.clone() {
            self.finish(&mut turn, &upper, layer)?;
        }
        if seal::is_layer(&self.dirs.layers, id) {
            return Ok(Sealed { layer: id, new: true });
        }
        if !self.is_dirty() {
            return Ok(Sealed { layer: self.base(), new: false });
        }
        let sealed = self.switch(id)?;
        turn.unfinished = Some((sealed.clone(), id));
        self.finish(&mut turn, &sealed, id)?;
        metrics::counter!("ebb_storage_volume_seals_total").increment(1);
        Ok(Sealed { layer: id, new: true })
    }

    /// Steps 1 to 4 of a seal.
    fn switch(&self, id: LayerId) -> Result<Arc<Upper>> {
        let branch = &self.dirs.branch;
        let (upper, _) = self.core.uppers();
        let base = self.base.lock().info;
        remove_dir(&dir_of(branch, upper.number).join("hold"))?;
        seal::hold_wal(&self.dirs, upper.number, &base)?;
        let next = Upper::create(branch, Header { upper: upper.number + 1, base: id }, self.core.slots.len())?;
        let begun = Instant::now();
        let sealed = self.core.switch(next, &Record::Seal { layer: id }).on("seal", branch)?;
        metrics::histogram!("ebb_storage_volume_seal_stall_seconds").record(begun.elapsed().as_secs_f64());
        if let Err(error) = seal::hold_wal(&self.dirs, upper.number, &base) {
            // Finishing tries again.
            tracing::warn!(%error, "WAL could not be held right after a seal");
        }
        Ok(sealed)
    }

    /// Steps 5 to 7.
    fn finish(&self, turn: &mut Turn, sealed: &Upper, layer: LayerId) -> Result<()> {
        let base = self.base();
        if dir_of(&self.dirs.branch, sealed.number).exists() {
            sealed.sync_all(&self.dirs.branch)?;
        }
        seal::finish(&self.dirs, sealed.number, base, layer)?;
        let info = seal::read_manifest(&self.dirs.layers, layer)?.image;
        *self.base.lock() = Base { layer, info };
        turn.unfinished = None;
        self.core.previous_is_synced();
        tracing::info!(%layer, upper = sealed.number + 1, "volume sealed");
        Ok(())
    }

    /// The newest sealed layer below the upper.
    pub fn base(&self) -> LayerId {
        self.base.lock().layer
    }

    /// Whether anything was written since the last seal (in the volume or in its WAL).
    pub fn is_dirty(&self) -> bool {
        let (upper, previous) = self.core.uppers();
        if upper.is_dirty() || previous.is_some() {
            return true;
        }
        let base = *self.base.lock();
        let layer = self.dirs.layers.join(base.layer.to_string());
        // Better a seal too many than a commit that is in no layer.
        wal::changed_since(&self.dirs.wal(), &layer.join("wal"), &base.info).unwrap_or_else(|error| {
            tracing::warn!(%error, "WAL cannot be compared with what was sealed");
            true
        })
    }
}

/// Follows seals that were begun to the upper that is not sealed.
fn finish_seals(dirs: &VolumeDirs, recorded: State) -> Result<(State, journal::Contents)> {
    let mut state = recorded;
    loop {
        let path = |number| dir_of(&dirs.branch, number).join("journal");
        if !path(state.upper).exists() {
            // The last step of a seal is missing.
            let header = journal::read_header(&path(state.upper + 1))?;
            state = State::new(header.base, header.upper);
        }
        let contents = journal::read(&path(state.upper))?;
        if (Header { upper: state.upper, base: state.base }) != contents.header {
            let why = format!("it is of upper {} on layer {}", contents.header.upper, contents.header.base);
            return Err(Error::Corrupt { what: format!("journal {:?}", path(state.upper)), why });
        }
        let Some(&Record::Seal { layer }) = contents.records.last() else {
            if state != recorded {
                state.write(&dirs.branch)?;
            }
            return Ok((state, contents));
        };
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

/// Makes `wal/` and what is in it the property of the user Postgres runs as.
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
        let name = entry.on("list", wal)?.file_name();
        rustix::fs::chownat(&dir, &name, owner, group, AtFlags::SYMLINK_NOFOLLOW).on("give away", &wal.join(&name))?;
    }
    Ok(())
}

/// What a failed system call means to the caller of a file operation.
fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
