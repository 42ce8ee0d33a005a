//! What keeps a unit to itself: namespaces for processes, mounts and IPC, and what it adds to the tree of files. Postgres
//! sees less than the unit: see `sandbox.rs`.
//!
//! ```text
//! /mnt            private tmpfs (or /media, /srv: whichever hides nothing the unit needs)
//! ├── data/       the volume, through FUSE
//! ├── wal/        bind of branches/<id>/wal; `pg_wal` in the volume is a symlink to ../wal
//! ├── run/        bind of branches/<id>/run: the socket
//! ├── conf/       bind of branches/<id>/conf: the configuration
//! └── root/       where the tree of Postgres is put together
//! /dev/shm        private: shared memory of a killed Postgres goes with the unit
//! /proc           of the unit's own pid namespace
//! ```
//!
//! **Invariants.** The unit is process 1 of its pid namespace: when it ends, however it ends, the kernel kills every
//! other process in it. Mount and IPC namespaces end with their last process. So a unit leaves nothing behind, whatever
//! kills it, and no code has to run for that. See decision 0003.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};

use caps::{CapSet, Capability};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{getegid, geteuid};
use rustix::fs::{Mode, OFlags, openat};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::sandbox::Sandbox;
use crate::error::{Error, OsContext, Result};
use crate::user::RunAs;

/// Directories that may carry the unit's tree: they exist on every Linux and services keep nothing vital in them.
const BASES: [&str; 3] = ["/mnt", "/media", "/srv"];

/// Directories of the unit's tree that Postgres sees, too.
pub(super) const DIRS: [&str; 4] = ["data", "wal", "run", "conf"];

/// Adds to a system error what was tried.
pub(super) trait Trying<T> {
    fn trying(self, act: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> Trying<T> for std::result::Result<T, E> {
    fn trying(self, act: &'static str) -> Result<T> {
        self.map_err(|source| Error::Isolation { act, source: source.into() })
    }
}

/// Whether this process is the first of its pid namespace, and so may be a unit.
pub(super) fn is_first_process() -> bool {
    process::id() == 1
}

/// Starts this program again, with the same arguments, as process 1 of a new pid namespace, and leaves it alone.
///
/// This is the way of an unprivileged `ebb serve`, which cannot make the namespace itself: here a user namespace gives
/// the right to. The caller must have no threads yet.
pub(super) fn become_first_process() -> Result<ExitCode> {
    if geteuid().is_root() {
        unshare(CloneFlags::CLONE_NEWPID).trying("make a pid namespace")?;
    } else {
        let (uid, gid) = (geteuid(), getegid());
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID).trying("make a user and a pid namespace")?;
        // The order is the kernel's: an unprivileged process may map its group only after giving up setgroups
        // (user_namespaces(7)).
        fs::write("/proc/self/setgroups", "deny").trying("give up setgroups")?;
        fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")).trying("map the user")?;
        fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")).trying("map the group")?;
        // The capability to mount (in the new namespace only) must live through exec: inheritable, then ambient.
        for set in [CapSet::Inheritable, CapSet::Ambient] {
            caps::raise(None, set, Capability::CAP_SYS_ADMIN)
                .map_err(io::Error::other)
                .trying("keep the capability to mount")?;
        }
    }
    Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).spawn().on("run", "/proc/self/exe")?;
    Ok(ExitCode::SUCCESS)
}

/// The unit's tree, and a window to the host's view of processes.
#[derive(Debug)]
pub(super) struct House {
    base: PathBuf,
    host_proc: File,
    /// The unit's process number as the host sees it.
    pub host_pid: u32,
}

impl House {
    /// Takes this process, which must be process 1 of a pid namespace and have no threads, into namespaces of its own
    /// and builds the tree. `needed` are paths that must stay visible.
    pub fn enter(branch_dir: &Path, needed: &[&Path]) -> Result<Self> {
        let host_pid = fs::read_link("/proc/self").on("read", "/proc/self")?;
        let host_pid = host_pid.to_str().and_then(|pid| pid.parse().ok()).unwrap_or(0);
        let host_proc = File::open("/proc").on("open", "/proc")?;

        let needed: Vec<_> = needed.iter().map(|path| path.canonicalize().on("find", path)).collect::<Result<_>>()?;
        let base = choose_base(&needed).ok_or(Error::Isolation {
            act: "find a place for the unit's tree (/mnt, /media and /srv are in use)",
            source: io::ErrorKind::NotFound.into(),
        })?;

        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC).trying("make mount and IPC namespaces")?;
        // Nothing mounted from here on reaches the host.
        attach(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
        let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        attach(Some(Path::new("ebb")), &base, Some("tmpfs"), quiet, Some("mode=0755,size=64k"))?;
        for dir in DIRS.into_iter().chain(["root"]) {
            let dir = base.join(dir);
            fs::DirBuilder::new().mode(0o755).create(&dir).on("create", dir)?;
        }
        for dir in ["wal", "run", "conf"] {
            attach(Some(&branch_dir.join(dir)), &base.join(dir), None, MsFlags::MS_BIND, None)?;
        }
        attach(Some(Path::new("ebb")), Path::new("/dev/shm"), Some("tmpfs"), quiet, Some("mode=1777"))?;
        // Best effort: a kernel that hides parts of /proc (containers) refuses a new one to a user namespace, and
        // nothing depends on it; Postgres just sees the host's process list then.
        let _ = attach(Some(Path::new("proc")), Path::new("/proc"), Some("proc"), quiet | MsFlags::MS_NOEXEC, None);
        // Postgres and whatever it starts can never gain rights by running a set-uid program …
        prctl::set_no_new_privs().trying("give up gaining privileges")?;
        // … nor inherit the one this unit may have been given to mount.
        for set in [CapSet::Ambient, CapSet::Inheritable] {
            caps::clear(None, set).map_err(io::Error::other).trying("drop inheritable capabilities")?;
        }
        Ok(Self { base, host_proc, host_pid })
    }

    /// Where the volume is mounted.
    pub fn data(&self) -> PathBuf {
        self.base.join("data")
    }

    /// The socket.
    pub fn run(&self) -> PathBuf {
        self.base.join("run")
    }

    /// The configuration.
    pub fn conf(&self) -> PathBuf {
        self.base.join("conf")
    }

    /// Where a Postgres is to run whose programs are in `bin`.
    pub fn sandbox(&self, bin: &Path, user: RunAs) -> Sandbox {
        Sandbox::new(self.base.clone(), bin, user)
    }

    /// The number the host knows a process of this namespace by.
    pub fn host_pid_of(&self, pid: u32) -> Option<u32> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The host's /proc shows a pidfd's process by the host's number (proc(5), /proc/pid/fdinfo).
        let path = format!("self/fdinfo/{}", pidfd.as_fd().as_raw_fd());
        let info = openat(&self.host_proc, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut text = String::new();
        File::from(info).read_to_string(&mut text).ok()?;
        text.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()
    }
}

pub(super) fn attach(
    what: Option<&Path>,
    at: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<()> {
    mount(what, at, kind, flags, options).on("mount at", at)
}

/// The first base that exists and hides none of the paths (which are absolute and without symlinks).
fn choose_base(needed: &[PathBuf]) -> Option<PathBuf> {
    let free = |base: &&Path| base.is_dir() && !needed.iter().any(|path| path.starts_with(base));
    BASES.iter().map(Path::new).find(free).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_hides_nothing_that_is_needed() {
        let check = |needed: &[&str], expect: Option<&str>| {
            let needed: Vec<_> = needed.iter().map(PathBuf::from).collect();
            assert_eq!(choose_base(&needed), expect.map(PathBuf::from), "for {needed:?}");
        };
        check(&["/var/lib/ebb"], Some("/mnt"));
        check(&["/mnt/disk1/ebb"], Some("/media"));
        check(&["/mntx/ebb"], Some("/mnt"));
        check(&["/mnt/a", "/media/b", "/srv/c"], None);
    }
}
