//! Where Postgres runs: a tree of its own, without a network, with a list of system calls that it may not make.
//!
//! ```text
//! /                tmpfs, read-only
//! ├── usr …        the machine's programs, for reading; /usr/local is empty. Besides: the server's own directory
//! ├── dev          null, zero, full, random, urandom, shm (the unit's)
//! ├── proc         of the unit's pid namespace, other users' processes invisible
//! ├── tmp          private, nothing in it can be executed
//! └── mnt          as the unit has it (or media, srv)
//!     ├── data     the volume; nothing in it can be executed, as in all that Postgres may write to
//!     ├── wal
//!     ├── run      its socket
//!     └── conf     its configuration, read-only
//! ```
//!
//! What is trusted with this is the kernel, not Postgres: a superuser of the branch, or somebody who took over one of its
//! processes, has a database and nothing else. See decision 0022 and `docs/security.md`.
//!
//! **Invariants.** The tree is built by a thread made for this one act, in namespaces of that thread, and Postgres is its
//! child; so the unit itself, which needs the bucket and the host's files, stays where it is. No descriptor of the unit's
//! is open in Postgres but the lock and the log.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use caps::CapSet;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::net::{AddressFamily, SendFlags, SocketType, send, socket};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::isolation::{DIRS, Trying, attach};
use super::syscalls;
use crate::error::{OsContext, Result};
use crate::postgres::extensions;
use crate::user::RunAs;

/// LIMIT: 120 clients with their parallel workers, replication, background workers and a program or two of theirs; no
/// room for a fork bomb. It counts a user's processes, so it is set where a branch has a user of its own.
const PROCESSES_MAX: u64 = 1024;

/// LIMIT: Postgres writes nothing there; extensions may.
const TMP: &str = "mode=1777,size=64m";

/// Directories of programs that are not links on systems which have kept them apart.
const PROGRAMS: [&str; 5] = ["bin", "sbin", "lib", "lib32", "lib64"];

/// What a server needs to find its libraries quickly, and nothing more of /etc.
const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// Devices that do nothing but what their names say.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

const HARMLESS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// A place for one branch's Postgres.
#[derive(Debug, Clone)]
pub(super) struct Sandbox {
    /// The unit's tree: see [`super::isolation::House`].
    base: PathBuf,
    /// The installation, if it is outside /usr. What `LD_LIBRARY_PATH` may name besides is not shown.
    elsewhere: Option<PathBuf>,
    /// Where the control files of extensions are.
    extensions: Option<PathBuf>,
    /// Whether /usr/local is needed.
    local: bool,
    user: RunAs,
}

impl Sandbox {
    /// Names it: for the server whose programs are in `bin`, in the unit's tree at `base`.
    pub fn new(base: PathBuf, bin: &Path, user: RunAs) -> Self {
        let installation = installation_of(bin);
        let local = installation.starts_with("/usr/local");
        let elsewhere = (!installation.starts_with("/usr")).then_some(installation);
        Self { base, elsewhere, extensions: extensions_of(bin), local, user }
    }

    /// Starts a program in it.
    ///
    /// # Errors
    /// If the tree cannot be built, or the program not be started.
    pub fn spawn(&self, mut command: Command, program: &Path) -> Result<Child> {
        let sandbox = self.clone();
        // INVARIANT: what this thread enters it cannot leave again; it is for this act only.
        let spawner = move || {
            sandbox.enter()?;
            command.spawn().on("run", command.get_program())
        };
        let spawned = thread::Builder::new().name("sandbox".into()).spawn(spawner);
        let panicked = |_| Err(io::Error::other("the spawning thread panicked")).on("run", program);
        spawned.on("start a thread to run", program)?.join().unwrap_or_else(panicked)
    }

    /// Takes the calling thread in. What it starts afterwards can only become less than it.
    fn enter(&self) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).trying("make namespaces for postgres")?;
        loopback_up().trying("bring up the loopback device of postgres alone")?;
        let root = self.base.join("root");
        let options = Some("mode=0755,size=1m");
        attach(Some(Path::new("ebb")), &root, Some("tmpfs"), HARMLESS, options)?;
        self.fill(&root)?;
        remount(&root, MsFlags::MS_RDONLY)?;
        chdir(&root).trying("enter the tree of postgres")?;
        // The old root comes to lie over the new one, and is taken away (pivot_root(2), "pivot_root(".", ".")").
        pivot_root(".", ".").trying("make the tree of postgres the root")?;
        umount2(".", MntFlags::MNT_DETACH).trying("leave the machine's files behind")?;
        chdir("/").trying("enter the tree of postgres")?;
        // Of no use without the right to gain privileges; one thing less to rely on. Needs a capability itself.
        let _ = caps::clear(None, CapSet::Bounding);
        if self.user.is_of_one_branch() {
            let limit = Rlimit { current: Some(PROCESSES_MAX), maximum: Some(PROCESSES_MAX) };
            setrlimit(Resource::Nproc, limit).trying("limit the processes of postgres")?;
        }
        syscalls::restrict().trying("forbid system calls to postgres")
    }

    fn fill(&self, root: &Path) -> Result<()> {
        make_dir(&root.join("usr"))?;
        show(Path::new("/usr"), &root.join("usr"))?;
        if !self.local && Path::new("/usr/local").is_dir() {
            empty(&root.join("usr/local"), "mode=0755,size=4k")?;
        }
        for name in PROGRAMS {
            let (from, to) = (Path::new("/").join(name), root.join(name));
            match fs::read_link(&from) {
                Ok(target) => symlink(target, &to).on("link", &to)?,
                Err(_) if from.is_dir() => {
                    make_dir(&to)?;
                    show(&from, &to)?;
                }
                Err(_) => {}
            }
        }
        if let Some(dir) = &self.elsewhere {
            let to = below(root, dir);
            make_dir(&to)?;
            show(dir, &to)?;
        }
        if Path::new(LOADER_CACHE).exists() {
            let to = below(root, Path::new(LOADER_CACHE));
            make_dir(&root.join("etc"))?;
            bind_file(Path::new(LOADER_CACHE), &to)?;
            remount(&to, HARMLESS | MsFlags::MS_RDONLY)?;
        }
        self.mistrust(root)?;
        self.fill_dev(&root.join("dev"))?;
        let proc = root.join("proc");
        make_dir(&proc)?;
        // Best effort: see `House::enter`. Where it is refused there is none.
        let _ = attach(
            Some(Path::new("proc")),
            &proc,
            Some("proc"),
            HARMLESS | MsFlags::MS_NOEXEC,
            Some("hidepid=invisible"),
        );
        make_dir(&root.join("tmp"))?;
        empty(&root.join("tmp"), TMP)?;
        for dir in DIRS {
            let (from, flags) = (self.base.join(dir), HARMLESS | MsFlags::MS_NOEXEC);
            let to = below(root, &from);
            make_dir(&to)?;
            attach(Some(&from), &to, None, MsFlags::MS_BIND, None)?;
            remount(&to, if dir == "conf" { flags | MsFlags::MS_RDONLY } else { flags })?;
        }
        Ok(())
    }

    /// Lays other control files over those of extensions that are not allowed and say that they may be trusted.
    fn mistrust(&self, root: &Path) -> Result<()> {
        let Some(dir) = &self.extensions else { return Ok(()) };
        for entry in fs::read_dir(dir).on("list", dir)? {
            let path = entry.on("list", dir)?.path();
            let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".control"));
            // LIMIT: hundreds of scripts are beside them, which are not read.
            let Some(name) = name.filter(|name| !extensions::ALLOWED.contains(name)) else { continue };
            let Some(control) = extensions::mistrusted(name, &fs::read_to_string(&path).on("read", &path)?) else {
                continue;
            };
            let other = root.join("control").join(name);
            make_dir(&root.join("control"))?;
            fs::write(&other, control).on("write", &other)?;
            fs::set_permissions(&other, Permissions::from_mode(0o644)).on("open up", &other)?;
            attach(Some(&other), &below(root, &path), None, MsFlags::MS_BIND, None)?;
        }
        Ok(())
    }

    fn fill_dev(&self, dev: &Path) -> Result<()> {
        make_dir(dev)?;
        for name in DEVICES {
            bind_file(&Path::new("/dev").join(name), &dev.join(name))?;
        }
        let shm = dev.join("shm");
        make_dir(&shm)?;
        attach(Some(Path::new("/dev/shm")), &shm, None, MsFlags::MS_BIND, None)?;
        remount(&shm, HARMLESS | MsFlags::MS_NOEXEC)
    }
}

/// The directory that holds all files of an installation: of `…/lib/postgresql/17/bin`, as Debian lays it out, what
/// `lib` and `share` are in; otherwise what `bin` is in.
fn installation_of(bin: &Path) -> PathBuf {
    let up = |levels| bin.ancestors().nth(levels).map(Path::to_owned);
    let debian = up(2).is_some_and(|dir| dir.ends_with("lib/postgresql"));
    up(if debian { 4 } else { 1 }).unwrap_or_else(|| bin.to_owned())
}

/// Where an installation has its extensions: Debian's way, or as one of the ways of PostgreSQL's own build.
fn extensions_of(bin: &Path) -> Option<PathBuf> {
    let share = installation_of(bin).join("share");
    let version = bin.parent()?.file_name()?;
    let places = [share.join("postgresql").join(version), share.join("postgresql"), share.clone()];
    places.into_iter().map(|place| place.join("extension")).find(|dir| dir.is_dir())
}

/// The place of an absolute path in another root.
fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn make_dir(dir: &Path) -> Result<()> {
    // The unit's mask is stricter than a root directory may be.
    for part in dir.ancestors().collect::<Vec<_>>().into_iter().rev() {
        match fs::create_dir(part) {
            Ok(()) => fs::set_permissions(part, Permissions::from_mode(0o755)).on("open up", part)?,
            Err(error) if part.is_dir() => drop(error),
            Err(error) => return Err(error).on("create", part),
        }
    }
    Ok(())
}

/// Shows a directory of the machine's, for reading.
fn show(from: &Path, to: &Path) -> Result<()> {
    // With what is mounted in it: a user namespace may not uncover what lies below.
    attach(Some(from), to, None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    remount(to, HARMLESS | MsFlags::MS_RDONLY)
}

fn bind_file(from: &Path, to: &Path) -> Result<()> {
    File::create(to).on("create", to)?;
    attach(Some(from), to, None, MsFlags::MS_BIND, None)
}

fn empty(at: &Path, options: &str) -> Result<()> {
    attach(Some(Path::new("ebb")), at, Some("tmpfs"), HARMLESS | MsFlags::MS_NOEXEC, Some(options))
}

/// Adds restrictions to a mount. Those that it has stay: a user namespace may not lift them, and is refused if it seems to
/// try (mount_namespaces(7), "Restrictions on mount namespaces").
fn remount(at: &Path, add: MsFlags) -> Result<()> {
    let has = statvfs(at).map_err(io::Error::from).on("look at", at)?.f_flag;
    let kept = [
        (StatVfsMountFlags::RDONLY, MsFlags::MS_RDONLY),
        (StatVfsMountFlags::NOSUID, MsFlags::MS_NOSUID),
        (StatVfsMountFlags::NODEV, MsFlags::MS_NODEV),
        (StatVfsMountFlags::NOEXEC, MsFlags::MS_NOEXEC),
    ];
    let kept = kept.into_iter().filter(|(had, _)| has.contains(*had)).map(|(_, flag)| flag);
    let flags = kept.fold(add | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, MsFlags::union);
    attach(None, at, None, flags, None)
}

/// Brings up the loopback device of the thread's own network, where nobody else is: the statistics collector of Postgres
/// 14 sends itself datagrams.
fn loopback_up() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const LOOPBACK: i32 = 1;
    const IFF_UP: u32 = 1;
    // A `nlmsghdr` and an `ifinfomsg` (netlink(7), rtnetlink(7)).
    let mut message = Vec::with_capacity(32);
    message.extend(32_u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0; 4]);
    message.extend(LOOPBACK.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    let kernel: OwnedFd = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    send(&kernel, &message, SendFlags::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_is_shown_with_its_libraries() {
        let check = |bin: &str, expect: &str| assert_eq!(installation_of(Path::new(bin)), Path::new(expect), "{bin}");
        check("/usr/lib/postgresql/15/bin", "/usr");
        check("/opt/seventeen/usr/lib/postgresql/17/bin", "/opt/seventeen/usr");
        check("/opt/pg/bin", "/opt/pg");
        check("/usr/pgsql-16/bin", "/usr/pgsql-16");
    }
}
