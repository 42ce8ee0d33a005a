//! A disk for tests whose power can be cut: a file system in memory that knows what was synced and what was not.
//!
//! It behaves as ext4 and xfs do, at their worst. What a process sees is always the newest state. What is on the disk is
//! less: [`Disk::cut_power`] throws away a random part of what nobody synced, and everything after goes on from there.
//!
//! - Changes of metadata (names, lengths set with `ftruncate`, owners, modes) reach the disk in order. A cut keeps a
//!   prefix of them: at least everything up to the last change of whatever was synced.
//! - Contents reach the disk in blocks of 4 KiB, in any order, each by itself, in any state it had since it was synced.
//!   A block that takes new room gets there only together with the metadata changes made before it was written.
//! - A file that grew by writing is after a cut as long as the last block of it that reached the disk.
//! - `fsync` and `fdatasync` bring to the disk the file, and all metadata changes up to the last one of the file; of a
//!   directory, its entries. A sync that failed leaves contents that no later sync brings to the disk.
//! - Holes are kept (`SEEK_DATA`, `SEEK_HOLE`), and room set aside with `fallocate` is there when it is needed.
//!
//! The disk can also be full ([`Disk::set_capacity`]), and refuse to sync or to write ([`Disk::fail`]).
//!
//! Nothing is cached by the kernel, so a cut needs no new mount. A file that was open during it gives `EIO` for good.
//!
//! Needs root. `sync` and `syncfs` do nothing here: the kernel does not pass them on ([`Disk::sync_all`] stands in for
//! them). Absent on purpose: extended attributes, `mmap` for sharing, `O_SYNC`, locks between machines.

mod contents;
mod fuse;
mod janitor;
mod state;
#[cfg(test)]
mod tests;
mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{BackgroundSession, MountOption, SessionACL};
use parking_lot::Mutex;
use rustix::io::Errno;

use crate::fuse::Adapter;
use crate::janitor::Janitor;
use crate::state::State;

pub use crate::state::{Fault, On};

/// A mounted disk. Dropping it unmounts it; its contents are gone then.
#[derive(Debug)]
pub struct Disk {
    at: PathBuf,
    state: Arc<Mutex<State>>,
    session: Option<BackgroundSession>,
    _janitor: Janitor,
}

impl Disk {
    /// Mounts an empty disk. The seed decides what cuts of the power take.
    ///
    /// # Errors
    /// When it cannot be mounted: only root may.
    pub fn mount(at: &Path, seed: u64) -> io::Result<Self> {
        let state = Arc::new(Mutex::new(State::new(seed)));
        let mut config = fuser::Config::default();
        config.mount_options = vec![
            MountOption::FSName("ebb-test-disk".to_owned()),
            MountOption::Subtype("ebb-test-disk".to_owned()),
            MountOption::DefaultPermissions,
        ];
        config.acl = SessionACL::All;
        // LIMIT: one that serves while another waits for the lock, on two cores.
        config.n_threads = Some(4);
        config.clone_fd = true;
        let session = fuser::Session::new(Adapter::new(state.clone()), at, &config)?.spawn()?;
        Ok(Self { at: at.to_owned(), state, session: Some(session), _janitor: Janitor::watch(at)? })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// From now on another seed decides what cuts of the power take.
    pub fn reseed(&self, seed: u64) {
        self.state.lock().reseed(seed);
    }

    /// From now on nothing reaches the disk and nothing is answered but `EIO`, until [`Disk::cut_power`].
    pub fn stop(&self) {
        self.state.lock().stop();
    }

    /// Stops it as [`Disk::stop`] does, once so many more changes and syncs have been carried out.
    pub fn stop_after(&self, changes: u64) {
        self.state.lock().stop_after(changes);
    }

    /// Brings everything to the disk, as after `sync` and a while.
    pub fn sync_all(&self) {
        self.state.lock().keep_all();
    }

    /// Cuts the power and turns it on again: a part of what was not synced is gone. Whoever has files open should be
    /// dead by now. Tells what it did.
    pub fn cut_power(&self) -> String {
        self.state.lock().cut_power()
    }

    /// Limits the disk to so many bytes of contents; `None` for no limit. What is there already stays.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state.lock().set_capacity(bytes);
    }

    /// How many bytes of contents are on it.
    pub fn used(&self) -> u64 {
        self.state.lock().used()
    }

    /// Makes requests fail from now on.
    pub fn fail(&self, fault: Fault) {
        self.state.lock().faults.push(fault);
    }

    /// How many requests failed because of faults, since the last [`Disk::mend`].
    pub fn failed(&self) -> u64 {
        self.state.lock().faulted
    }

    /// Ends all faults; answers how many requests failed because of them.
    pub fn mend(&self) -> u64 {
        self.state.lock().mend()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever still waits for an answer gets one.
        self.state.lock().stop();
        // Its threads are not waited for: a mount namespace made meanwhile may have the mount as well, and keeps it
        // until its last process ends. They end then, or with this process.
        drop(self.session.take());
        // Where something is still open in it; else it is gone already.
        let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
    }
}

/// The error for what a request cannot do.
type Result<T> = std::result::Result<T, Errno>;
