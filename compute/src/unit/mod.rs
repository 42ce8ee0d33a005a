//! The unit process: `ebb compute --branch-dir DIR`.
//!
//! One unit runs one branch: it opens and mounts the volume, starts Postgres on it, answers `ebb serve` on a control
//! socket, publishes roles, starts Postgres again when it crashes, and at the end stops it, unmounts and seals.
//!
//! ```text
//! spawned ── isolated ── opened ── mounted ── started ── ready ─── … ─── stop: publish, SIGINT, unmount, seal, exit
//!            namespaces  volume    FUSE       postgres   "ready" down the pipe     a crash: back to opened
//! ```
//!
//! **Files** of the branch directory it writes: `unit.lock` (held by every process of the unit), `unit.pid`,
//! `unit.err` (one line, when it gave up), `control.sock`, `postgres.log`, `roles.json`, `conf/` and `run/`.
//!
//! **Crash.** Killed at any moment, the unit takes Postgres and the mount with it (see `isolation.rs`); stale files are
//! replaced by the next one.

mod durability;
mod isolation;
mod log;
mod owner;
mod postmaster;
mod roles;
mod sandbox;
mod server;
mod syscalls;

use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use ebb_storage::layer::{LazyLayers, Origin};
use ebb_storage::volume::VolumeDirs;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{geteuid, setsid};

use self::isolation::House;
use self::owner::Owner;
use self::postmaster::Plan;
pub(crate) use self::roles::{LOOK as LOOK_AT_ROLES, literal};
use crate::clock::Stages;
use crate::control::Durability;
use crate::error::{Error, OsContext, Result, chain};
use crate::files;
use crate::manager::UnitSpec;
use crate::postgres::config::{self, Surroundings};
use crate::user::RunAs;

/// LIMIT: the lock is busy while the last unit's processes are being killed, or for a moment while the manager looks.
const LOCK_DEADLINE: Duration = Duration::from_secs(10);

/// Runs a unit until it is stopped: call it first thing in `main`, before any thread exists.
///
/// Started by the manager, this process is the first of its pid namespace and is the unit. Started otherwise it makes
/// the namespace, starts the unit in it with this program's own arguments, and returns at once.
pub fn main(branch_dir: &Path) -> ExitCode {
    // Held to the last: whoever finds the lock free must also find the reason written and the socket removed.
    let mut held = None;
    run(branch_dir, &mut held).unwrap_or_else(|error| {
        let why = chain(&error);
        tracing::error!(error = why, "the unit gave up");
        // The manager reads it; if not even this can be written, it reports that the unit ended without a word.
        let _ = fs::write(branch_dir.join(files::REASON), format!("{}\n", why.replace('\n', " ")));
        ExitCode::FAILURE
    })
}

fn run(branch_dir: &Path, held: &mut Option<File>) -> Result<ExitCode> {
    let mut stages = Stages::since_asked();
    stages.end("spawned");
    if !isolation::is_first_process() {
        return isolation::become_first_process();
    }
    // What whoever started `ebb serve` left open is nothing for Postgres; nor is it this unit's.
    close_fds::set_fds_cloexec(3, &[]);
    // A session of its own, so that Ctrl-C in the terminal of `ebb serve` does not reach Postgres.
    let _ = setsid();
    umask(Mode::from_bits_truncate(0o077));
    let lock = held.insert(lock(branch_dir)?).try_clone().on("share", "unit.lock")?;
    let spec = read_spec(branch_dir)?;
    let user = RunAs::of_branch(spec.branch)?;
    clear_leftovers(branch_dir)?;
    make_dir(&branch_dir.join("run"), 0o700)?;
    make_dir(&branch_dir.join("conf"), 0o755)?;

    let program = std::env::current_exe().on("find", "/proc/self/exe")?;
    // A bucket in a directory; if it is away just now, the unit may well do without it.
    let buckets = spec.bucket.iter().chain(spec.archive.as_ref().map(|archive| &archive.bucket));
    let buckets = buckets.filter_map(|at| at.directory()).filter(|dir| dir.exists());
    let needed: Vec<&Path> =
        [branch_dir, &spec.layers_dir, &spec.pg_bin, &program].into_iter().chain(buckets).collect();
    let house = House::enter(branch_dir, &needed)?;
    fs::write(branch_dir.join(files::PID), format!("{}\n", house.host_pid)).on("write", branch_dir.join(files::PID))?;
    stages.end("isolated");

    let config = Config {
        run: house.run(),
        conf: house.conf(),
        name: spec.branch.to_string(),
        own: spec.settings.clone(),
        shipped: spec.archive.as_ref().map(|_| spec.durability),
    };
    config.write()?;
    let bin = spec.pg_bin.canonicalize().on("find", &spec.pg_bin)?;
    let plan = Plan {
        arguments: config::arguments(&config.surroundings(), &house.data(), spec.fork, spec.recovery.as_ref()),
        stays: spec.recovery.as_ref().is_some_and(|recovery| recovery.stay),
        user,
        sandbox: house.sandbox(&bin, user),
        bin,
        lock,
        log: branch_dir.join(files::LOG),
    };
    let source = spec.bucket.clone().map(|at| LazyLayers::new(&spec.layers_dir, Origin::At(at)));
    let dirs = VolumeDirs { layers: spec.layers_dir.clone(), branch: branch_dir.to_owned(), source };
    let run_dir = RunDir { path: config.run.clone(), user };
    Owner::new(spec, dirs, house, plan, config, run_dir, stages).run()
}

/// Waits for the branch's lock. INVARIANT: whoever has it is the only unit of the branch, and no process of an earlier
/// one is left.
fn lock(branch_dir: &Path) -> Result<File> {
    let path = branch_dir.join(files::LOCK);
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path).on("open", &path)?;
    // From here the control socket has a name of any path short enough to connect to.
    std::env::set_current_dir(branch_dir).on("enter", branch_dir)?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(error)) => return Err(error).on("lock", &path),
            Err(TryLockError::WouldBlock) => {}
        }
        let another = UnixStream::connect(files::CONTROL).is_ok();
        if another || begun.elapsed() > LOCK_DEADLINE {
            return Err(Error::Refused("another unit of this branch runs".to_owned()));
        }
        thread::sleep(Duration::from_millis(2));
    }
    std::env::set_current_dir("/").on("enter", "/")?;
    Ok(file)
}

fn read_spec(branch_dir: &Path) -> Result<UnitSpec> {
    let path = branch_dir.join(files::SPEC);
    let bytes = fs::read(&path).on("read", &path)?;
    let spec: UnitSpec = serde_json::from_slice(&bytes).map_err(io::Error::from).on("understand", &path)?;
    if spec.durability == Durability::Bucket && spec.archive.is_none() {
        return Err(Error::Refused("durability \"bucket\" needs an archive".to_owned()));
    }
    match spec.settings.iter().find(|(name, _)| !config::is_setting_name(name)) {
        Some((name, _)) => Err(Error::Refused(format!("{name:?} is no name of a setting"))),
        None => Ok(spec),
    }
}

/// Removes what a killed unit left: sockets nobody listens on, and lock files with process numbers that mean nothing.
fn clear_leftovers(branch_dir: &Path) -> Result<()> {
    for name in [files::CONTROL, files::REASON, files::SOCKET, files::SOCKET_LOCK] {
        let path = branch_dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound) => return Err(error).on("remove", path),
            _ => {}
        }
    }
    Ok(())
}

/// A directory of the unit's own, with this mode whatever it had.
fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    match DirBuilder::new().mode(mode).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error).on("create", dir),
        _ => {}
    }
    if geteuid().is_root() {
        chown(dir, Some(0), Some(0)).on("take", dir)?;
    }
    fs::set_permissions(dir, Permissions::from_mode(mode)).on("restrict", dir)
}

/// The directory of the socket. It is Postgres' while it starts, and nobody's afterwards: whoever took Postgres over
/// could put a link there to another branch's socket, and Ebb would take its clients to that.
#[derive(Debug, Clone)]
pub(crate) struct RunDir {
    path: PathBuf,
    user: RunAs,
}

impl RunDir {
    /// Empties it, and lets Postgres make its socket.
    fn open(&self) -> Result<()> {
        for entry in fs::read_dir(&self.path).on("list", &self.path)? {
            let path = entry.on("list", &self.path)?.path();
            match path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
                true => fs::remove_dir_all(&path).on("remove", &path)?,
                false => fs::remove_file(&path).on("remove", &path)?,
            }
        }
        self.change(self.user.uid, self.user.gid, 0o700)
    }

    /// Takes it back, with a socket in it and nothing else that one could connect to.
    fn close(&self) -> Result<()> {
        self.change(0, 0, 0o711)?;
        let path = self.path.join(files::SOCKET_NAME);
        let found = path.symlink_metadata().on("look at", &path)?;
        if !found.file_type().is_socket() {
            fs::remove_file(&path).on("remove", &path)?;
            return Err(Error::Refused("what postgres left for a socket is none".to_owned()));
        }
        Ok(())
    }

    fn change(&self, uid: u32, gid: u32, mode: u32) -> Result<()> {
        if geteuid().is_root() {
            chown(&self.path, Some(uid), Some(gid)).on("give away", &self.path)?;
        }
        fs::set_permissions(&self.path, Permissions::from_mode(mode)).on("restrict", &self.path)
    }
}

/// The generated configuration.
#[derive(Debug)]
struct Config {
    run: PathBuf,
    conf: PathBuf,
    name: String,
    own: Vec<(String, String)>,
    /// What commits wait for, where WAL is shipped.
    shipped: Option<Durability>,
}

impl Config {
    fn surroundings(&self) -> Surroundings<'_> {
        Surroundings { name: &self.name, run: &self.run, conf: &self.conf, shipped: self.shipped }
    }

    /// Writes the files, each at once: Postgres may be reading them.
    fn write(&self) -> Result<()> {
        let settings = config::file(&self.surroundings(), &self.own);
        for (name, text) in [("postgresql.conf", settings.as_str()), ("pg_hba.conf", config::HBA)] {
            let (path, fresh) = (self.conf.join(name), self.conf.join(format!("{name}.new")));
            fs::write(&fresh, text).on("write", &fresh)?;
            fs::set_permissions(&fresh, Permissions::from_mode(0o644)).on("open up", &fresh)?;
            fs::rename(&fresh, &path).on("write", &path)?;
        }
        Ok(())
    }
}

/// Tells the manager, which waits at the other end of standard output, and lets go of the pipe.
fn say_ready(status: &crate::control::Status) {
    let told = serde_json::to_string(status).map(|line| writeln!(io::stdout(), "{line}"));
    if !matches!(told, Ok(Ok(()))) {
        tracing::debug!("nobody waits for this unit");
    }
    // The pipe ends for the manager when no process holds it; from here on nothing is printed but to the log.
    let _ = nix::unistd::dup2_stdout(io::stderr());
}
