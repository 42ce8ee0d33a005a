//! The directory on the node in which an import happens.
//!
//! ```text
//! imports/<id>/
//!   pgdata/        the data directory, as it becomes the branch's; belongs to the user that Postgres runs as
//!   wal/           WAL that was received and that Postgres asks for
//!   run/           configuration and socket of the servers that run here
//!   postgres.log   what they wrote
//!   roles.json     SCRAM verifiers by role, for the layer
//! ```
//!
//! **Crash.** Servers that run here end when `ebb serve` does; [`Stage::clear`] makes sure, and removes everything.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, OsContext, Result};
use crate::user::RunAs;

/// LIMIT: a process that was killed is gone in milliseconds, unless a disk hangs.
const GONE_DEADLINE: Duration = Duration::from_secs(20);

/// A directory for one import.
#[derive(Debug, Clone)]
pub struct Stage {
    root: PathBuf,
}

impl Stage {
    /// Names it; touches nothing.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.root.join("pgdata")
    }

    /// Where received WAL is.
    pub(crate) fn wal(&self) -> PathBuf {
        self.root.join("wal")
    }

    /// Where the socket is.
    pub(crate) fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    /// Verifiers by role, as a layer carries them.
    pub fn roles(&self) -> PathBuf {
        self.root.join("roles.json")
    }

    /// Makes it anew, with an empty data directory.
    ///
    /// # Errors
    /// As [`Stage::clear`].
    pub fn make(&self) -> Result<()> {
        self.clear()?;
        let user = RunAs::find()?;
        for (dir, mode) in [(&self.root, 0o711), (&self.wal(), 0o711), (&self.run(), 0o700), (&self.data(), 0o700)] {
            DirBuilder::new().mode(mode).recursive(true).create(dir).on("create", dir)?;
        }
        give(&self.run(), user)?;
        give(&self.data(), user)
    }

    /// Refuses to begin what the disk has no room for: the directory, and the layer that is made of it.
    pub(crate) fn check_room(&self, bytes: u64) -> Result<()> {
        let found = rustix::fs::statvfs(&self.root).map_err(io::Error::from).on("look at", &self.root)?;
        let (free, wanted) = (found.f_bavail.saturating_mul(found.f_frsize), bytes.saturating_mul(2));
        if free >= wanted {
            return Ok(());
        }
        Err(Error::Import {
            why: format!("the import needs about {} MiB of disk, and {} MiB are free", wanted >> 20, free >> 20),
            hint: Some(
                "An import is on the node twice for a while: as files, and as the layer made of them.".to_owned(),
            ),
        })
    }

    /// Ends every server that runs here and removes everything. Blocks.
    ///
    /// # Errors
    /// If a server cannot be ended, or the directory cannot be removed.
    pub fn clear(&self) -> Result<()> {
        end_servers_in(&self.data())?;
        let deadline = Instant::now() + GONE_DEADLINE;
        loop {
            match fs::remove_dir_all(&self.root) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                // A copy that was given up writes its last file.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(error).on("remove", &self.root),
            }
        }
    }
}

/// Removes WAL that was replayed.
pub(super) fn remove_wal(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).on("list", dir)? {
        let path = entry.on("list", dir)?.path();
        fs::remove_file(&path).on("remove", &path)?;
    }
    Ok(())
}

/// Makes something Postgres' own.
pub(crate) fn give(path: &Path, user: RunAs) -> Result<()> {
    if fs::symlink_metadata(path).on("look at", path)?.uid() != user.uid {
        chown(path, Some(user.uid), Some(user.gid)).on("give away", path)?;
    }
    Ok(())
}

/// Kills every process of Postgres whose working directory this is, and waits until they are gone.
fn end_servers_in(data: &Path) -> Result<()> {
    let Ok(data) = data.canonicalize() else { return Ok(()) };
    let deadline = Instant::now() + GONE_DEADLINE;
    loop {
        let found = servers_in(&data);
        if found.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::Deadline("ending what an import had started"));
        }
        for pid in found {
            // It may have ended meanwhile.
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The processes of Postgres whose working directory this is: a server goes into its data directory and stays there
/// (PostgreSQL 15 `miscinit.c`, `ChangeToDataDir`).
pub(super) fn servers_in(data: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let runs_there = |pid: &i32| {
        let proc = Path::new("/proc").join(pid.to_string());
        let is_server = fs::read_to_string(proc.join("comm"))
            .is_ok_and(|name| matches!(name.trim(), "postgres" | "postmaster" | "pg_checksums"));
        // A process that has ended and was not reaped has no working directory any more.
        is_server && fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd == data)
    };
    pids.filter(runs_there).map(Pid::from_raw).collect()
}
