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
//! `unit.err` (one line, when it gave up), `control.sock`, `postgres.log`, `roles.json`, and `run/`.
//!
//! **Crash.** Killed at any moment, the unit takes Postgres and the mount with it (see `isolation.rs`); stale files are
//! replaced by the next one.

mod durability;
mod isolation;
mod log;
mod owner;
mod postmaster;
mod roles;
mod server;

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown};
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
    // A session of its own, so that Ctrl-C in the terminal of `ebb serve` does not reach Postgres.
    let _ = setsid();
    umask(Mode::from_bits_truncate(0o077));
    let lock = held.insert(lock(branch_dir)?).try_clone().on("share", "unit.lock")?;
    let spec = read_spec(branch_dir)?;
    let user = RunAs::find()?;
    clear_leftovers(branch_dir)?;
    make_run_dir(&branch_dir.join("run"), user)?;

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
        name: spec.branch.to_string(),
        own: spec.settings.clone(),
        user,
        shipped: spec.archive.as_ref().map(|_| spec.durability),
    };
    config.write()?;
    let plan = Plan {
        bin: spec.pg_bin.clone(),
        arguments: config::arguments(&config.surroundings(), &house.data(), spec.fork, spec.recovery.as_ref()),
        stays: spec.recovery.as_ref().is_some_and(|recovery| recovery.stay),
        user,
        lock,
        log: branch_dir.join(files::LOG),
    };
    let source = spec.bucket.clone().map(|at| LazyLayers::new(&spec.layers_dir, Origin::At(at)));
    let dirs = VolumeDirs { layers: spec.layers_dir.clone(), branch: branch_dir.to_owned(), source };
    Owner::new(spec, dirs, house, plan, config, stages).run()
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

/// The directory of Postgres' socket: nobody but Postgres and Ebb may enter.
fn make_run_dir(dir: &Path, user: RunAs) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error).on("create", dir),
        _ => {}
    }
    give(dir, user)
}

/// Makes a file or directory Postgres' own.
fn give(path: &Path, user: RunAs) -> Result<()> {
    if geteuid().is_root() && fs::metadata(path).on("look at", path)?.uid() != user.uid {
        chown(path, Some(user.uid), Some(user.gid)).on("give away", path)?;
    }
    Ok(())
}

/// The generated configuration.
#[derive(Debug)]
struct Config {
    run: PathBuf,
    name: String,
    own: Vec<(String, String)>,
    user: RunAs,
    /// What commits wait for, where WAL is shipped.
    shipped: Option<Durability>,
}

impl Config {
    fn surroundings(&self) -> Surroundings<'_> {
        Surroundings { name: &self.name, run: &self.run, shipped: self.shipped }
    }

    /// Writes the files, each at once: Postgres may be reading them.
    fn write(&self) -> Result<()> {
        let settings = config::file(&self.surroundings(), &self.own);
        for (name, text) in [("postgresql.conf", settings.as_str()), ("pg_hba.conf", config::HBA)] {
            let (path, fresh) = (self.run.join(name), self.run.join(format!("{name}.new")));
            fs::write(&fresh, text).on("write", &fresh)?;
            give(&fresh, self.user)?;
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
