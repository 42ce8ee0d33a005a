//! Starts, finds again and stops units, from the side of `ebb serve`.
//!
//! A unit is nobody's child for long: it outlives the `ebb serve` that started it. So everything about it goes through
//! its directory: the control socket to talk to it, `unit.lock` to know whether any process of it is left.
//!
//! **Cancellation.** Dropping any of these futures leaves the unit to what it was told; ask again, or adopt it.

use std::fs::{self, File, TryLockError};
use std::future::Future;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ebb_storage::object_store::BucketAt;
use ebb_storage::volume::Sealed;
use ebb_types::{BranchId, LayerId, Lsn, Timestamp};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::control::{Durability, Reply, Request, Status, receive, send};
use crate::error::{Error, OsContext, Result};
use crate::{files, long_path, spawn};

/// LIMIT: recovery replays at most about `max_wal_size`; after this the caller is told, while the unit goes on, so that
/// the next try finds it further.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// LIMIT: a unit answers this from memory, unless the machine is on its knees.
const STATUS_DEADLINE: Duration = Duration::from_secs(10);

/// LIMIT: a look takes well below a millisecond; a client waits for it before it is asked for its password.
const ROLES_DEADLINE: Duration = Duration::from_secs(1);

/// LIMIT: a seal syncs what was written since the last one, at worst gigabytes to a slow disk.
const SEAL_DEADLINE: Duration = Duration::from_secs(300);

/// LIMIT: the unit gives Postgres a minute to shut down, then seals.
const STOP_DEADLINE: Duration = Duration::from_secs(65 + 300);

/// LIMIT: Postgres reloads at once, and then writes out at most shared_buffers.
const DURABILITY_DEADLINE: Duration = Duration::from_secs(90);

/// LIMIT: the kernel kills and unmounts in milliseconds, unless a disk hangs.
const GONE_DEADLINE: Duration = Duration::from_secs(30);

/// The unit's own log is cut when a start finds it longer.
const UNIT_LOG_BYTES_MAX: u64 = 1024 * 1024;

/// Why a unit ended whose Postgres was to stay at a moment ([`Recovery::stay`]) and could not.
pub const CANNOT_STAY: &str = "the moment cannot be read from without going on from it";

/// Where a recovery ends, and how it goes on from there.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Recovery {
    /// The directory with WAL that Postgres fetches segments from, as it sees it.
    pub wal: PathBuf,
    /// The Postgres timeline that it follows; `None`: the newest that it can find one after the other.
    pub pg_timeline: Option<u32>,
    /// Where it stops; `None`: where WAL ends.
    pub until: Option<Until>,
    /// Whether it stays there, as a standby that only reads, rather than going on on a new Postgres timeline.
    #[serde(default)]
    pub stay: bool,
}

/// A moment that a recovery stops at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Until {
    /// Before the first record that begins at or after this position.
    Lsn(Lsn),
    /// Before the first commit after this time.
    Time(Timestamp),
}

/// What a unit must know to run. Written to `branches/<id>/unit.json`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UnitSpec {
    /// Which branch.
    pub branch: BranchId,
    /// The branch's directory on this node (`wal/`, `volume.json`, `run/`, `postgres.log`, `roles.json` are in it).
    pub branch_dir: PathBuf,
    /// The node's layers.
    pub layers_dir: PathBuf,
    /// Directory of the server binaries.
    pub pg_bin: PathBuf,
    /// Settings beyond the generated ones.
    pub settings: Vec<(String, String)>,
    /// Whether the image is another branch's: no subscription in it may run until someone enables it.
    pub fork: bool,
    /// Recovers to a moment in WAL that is put beside it, and goes on from there on a new Postgres timeline.
    #[serde(default)]
    pub recovery: Option<Recovery>,
    /// Where layers come from that are not whole on this node; without it they must be.
    #[serde(default)]
    pub bucket: Option<BucketAt>,
    /// Whether the layers that are not whole are filled in the background.
    #[serde(default)]
    pub hydrate: bool,
    /// Verifiers that must be set if the role has none yet: (role, SCRAM verifier). Applied after the start.
    pub initial_roles: Vec<(String, String)>,
    /// Where WAL is shipped to; without it none is.
    #[serde(default)]
    pub archive: Option<ArchiveSpec>,
    /// What commits wait for at first. `Bucket` needs an archive.
    #[serde(default)]
    pub durability: Durability,
}

/// The archive that a unit ships WAL to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ArchiveSpec {
    /// The bucket.
    pub bucket: BucketAt,
    /// The branch …
    pub branch: BranchId,
    /// … and which line of its history.
    pub line: u64,
    /// The epoch of the branch's owner: a unit of an earlier one than the archive has seen is refused.
    #[serde(default)]
    pub epoch: u64,
}

/// A running unit.
#[derive(Debug, Clone)]
pub struct Unit {
    branch_dir: PathBuf,
    /// When the last look at the roles was begun that succeeded. Held by whoever asks for one.
    looked: Arc<Mutex<Option<Instant>>>,
}

impl Unit {
    fn at(branch_dir: PathBuf) -> Self {
        Self { branch_dir, looked: Arc::default() }
    }

    /// Starts a unit (the program `exe` with the argument `compute`) and waits until Postgres accepts connections.
    /// The volume must exist. If a unit of this branch still runs, it is adopted instead.
    ///
    /// # Errors
    /// [`Error::Start`] with the reason the unit or Postgres gave; [`Error::Deadline`] when Postgres is still
    /// recovering: the unit goes on, and a later call finds it.
    ///
    /// # Cancel safety
    /// A unit once spawned goes on; the next call adopts it.
    pub async fn start(exe: &Path, spec: &UnitSpec) -> Result<Self> {
        let begun = Instant::now();
        let deadline = begun + START_DEADLINE;
        let branch_dir = std::path::absolute(&spec.branch_dir).on("find", &spec.branch_dir)?;
        if let Some(unit) = Self::adopt(&branch_dir).await? {
            return unit.ready_by(deadline).await;
        }
        let unit = Self::at(branch_dir);
        let spec = UnitSpec {
            branch_dir: unit.branch_dir.clone(),
            layers_dir: std::path::absolute(&spec.layers_dir).on("find", &spec.layers_dir)?,
            ..spec.clone()
        };
        unit.write_spec(&spec)?;
        let mut child = spawn::unit(exe, &unit.branch_dir, unit.open_log()?).await?;
        let told = timeout_at(deadline, hear_ready(&mut child)).await;
        reap(child);
        match told.map_err(|_| Error::Deadline("starting postgres"))? {
            Some(status) => {
                record(&status, begun.elapsed());
                Ok(unit)
            }
            // It ended, perhaps because another one was first.
            None => match Self::adopt(&unit.branch_dir).await? {
                Some(unit) => unit.ready_by(deadline).await,
                None => Err(unit.why_it_ended()),
            },
        }
    }

    /// Finds the unit of a branch directory, if one is alive and answers. One that is alive and does not answer is
    /// killed: Postgres recovers at the next start.
    pub async fn adopt(branch_dir: &Path) -> Result<Option<Self>> {
        let unit = Self::at(std::path::absolute(branch_dir).on("find", branch_dir)?);
        // A unit that is starting has the lock for a while before it answers; one that ends, after it answered last.
        let deadline = Instant::now() + STATUS_DEADLINE;
        let mut pauses = Pauses::default();
        loop {
            match unit.ask(&Request::Status, STATUS_DEADLINE).await {
                Ok(_) => return Ok(Some(unit)),
                Err(_) if !unit.is_alive()? => return Ok(None),
                Err(error) if Instant::now() >= deadline => {
                    tracing::warn!(dir = ?unit.branch_dir, %error, "a unit does not answer and is killed");
                    unit.kill()?;
                    unit.until_gone().await?;
                    return Ok(None);
                }
                Err(_) => pauses.next().await,
            }
        }
    }

    /// The Unix socket of Postgres, from the host's view. The path may be longer than `sun_path` allows.
    pub fn socket(&self) -> PathBuf {
        self.branch_dir.join(files::SOCKET)
    }

    /// Asks how it is.
    pub async fn status(&self) -> Result<Status> {
        match self.request(&Request::Status, STATUS_DEADLINE).await? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Seals the volume while Postgres goes on; see [`crate::control::Request::Seal`].
    pub async fn seal(&self, layer: LayerId) -> Result<Sealed> {
        match self.request(&Request::Seal { layer }, SEAL_DEADLINE).await? {
            Reply::Sealed { layer, new, end } => Ok(Sealed { layer, new, end }),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the roles published as they are now, or were at some moment after this was called. All who ask while a look is
    /// under way share the next one.
    ///
    /// # Errors
    /// If the unit does not answer within a second: what it published last is not older than that.
    pub async fn publish_roles(&self) -> Result<()> {
        let asked = Instant::now();
        let mut looked = self.looked.lock().await;
        if looked.is_some_and(|begun| begun >= asked) {
            return Ok(());
        }
        let begun = Instant::now();
        match self.ask(&Request::PublishRoles, ROLES_DEADLINE).await? {
            Reply::RolesPublished => {
                *looked = Some(begun);
                Ok(())
            }
            Reply::Failed { message } => Err(Error::Refused(message)),
            other => Err(unexpected(&other)),
        }
    }

    /// Changes what commits wait for. When this returns, every commit that is acknowledged from now on has it.
    ///
    /// # Errors
    /// [`Error::Refused`] when the branch's WAL is not shipped; or when Postgres does not tell in time that it goes by the
    /// new setting, which it may then do later.
    pub async fn set_durability(&self, durability: Durability) -> Result<()> {
        match self.request(&Request::SetDurability { durability }, DURABILITY_DEADLINE).await? {
            Reply::DurabilitySet => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until the layers of all seals so far are complete.
    ///
    /// # Errors
    /// [`Error::Gone`] when there is no unit: opening the volume completes them.
    pub async fn finish_seals(&self) -> Result<()> {
        match self.request(&Request::Finish, SEAL_DEADLINE).await? {
            Reply::Finished => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Stops and seals; see [`crate::control::Request::Stop`]. The unit is gone when this returns.
    ///
    /// # Errors
    /// [`Error::Gone`] when there is no unit (any more): what it wrote is in its volume. [`Error::Refused`] when the
    /// seal failed: the unit is gone, too, and the volume can be sealed without it.
    pub async fn stop(&self, layer: LayerId) -> Result<Sealed> {
        let reply = self.request(&Request::Stop { layer }, STOP_DEADLINE).await;
        if !matches!(reply, Err(Error::Deadline(_))) {
            self.until_gone().await?;
        }
        match reply? {
            Reply::Sealed { layer, new, end } => Ok(Sealed { layer, new, end }),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends the unit without sealing. It is gone when this returns, killed if it did not listen.
    pub async fn discard(&self) -> Result<()> {
        let reply = self.request(&Request::Discard, STATUS_DEADLINE).await;
        if let Err(error @ (Error::Deadline(_) | Error::Os { .. })) = &reply {
            tracing::warn!(dir = ?self.branch_dir, %error, "a unit does not listen and is killed");
            self.kill()?;
        }
        self.until_gone().await
    }

    /// Returns when the unit is gone, however it ended.
    pub async fn gone(&self) {
        let mut pauses = Pauses::default();
        loop {
            // A connection ends when the unit does: no need to look again and again.
            if let Ok(mut stream) = long_path::connect(&self.branch_dir.join(files::CONTROL)).await {
                let _ = stream.read_u8().await;
            }
            match self.is_alive() {
                Ok(true) => pauses.next().await,
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(dir = ?self.branch_dir, %error, "cannot tell whether a unit is alive");
                    pauses.next().await;
                }
            }
        }
    }

    /// Makes a request; [`Error::Gone`] is only answered when every process of the unit is gone.
    async fn request(&self, request: &Request, deadline: Duration) -> Result<Reply> {
        let give_up = Instant::now() + GONE_DEADLINE;
        let mut pauses = Pauses::default();
        loop {
            match self.ask(request, deadline).await {
                Ok(Reply::Failed { message }) => return Err(Error::Refused(message)),
                // It is ending, or does not listen yet. Requests are idempotent, so asking again is safe.
                Err(error @ Error::Os { .. }) => {
                    if !self.is_alive()? {
                        return Err(Error::Gone);
                    }
                    if Instant::now() >= give_up {
                        return Err(error);
                    }
                    pauses.next().await;
                }
                other => return other,
            }
        }
    }

    /// One request over a connection of its own.
    async fn ask(&self, request: &Request, deadline: Duration) -> Result<Reply> {
        let path = self.branch_dir.join(files::CONTROL);
        let conversation = async {
            let mut stream = long_path::connect(&path).await?;
            let (from, mut to) = UnixStream::split(&mut stream);
            send(&mut to, request).await?;
            let reply = receive(&mut BufReader::new(from)).await?;
            reply.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        };
        timeout(deadline, conversation).await.map_err(|_| Error::Deadline("the unit's answer"))?.on("talk to", &path)
    }

    async fn ready_by(self, deadline: Instant) -> Result<Self> {
        let until_ready = async {
            let mut pauses = Pauses::default();
            while !self.status().await?.ready {
                pauses.next().await;
            }
            Ok(())
        };
        match timeout_at(deadline, until_ready).await {
            Ok(Ok(())) => Ok(self),
            Ok(Err(Error::Gone)) => Err(self.why_it_ended()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Deadline("starting postgres")),
        }
    }

    async fn until_gone(&self) -> Result<()> {
        let look = async {
            let mut pauses = Pauses::default();
            while self.is_alive()? {
                pauses.next().await;
            }
            Ok(())
        };
        timeout(GONE_DEADLINE, look).await.map_err(|_| Error::Deadline("the unit's end"))?
    }

    /// Whether any process of the unit is left: they all share its lock.
    fn is_alive(&self) -> Result<bool> {
        let path = self.branch_dir.join(files::LOCK);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file.on("open", &path)?,
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error).on("lock", &path),
        }
    }

    /// Kills the unit, and with it everything it started.
    fn kill(&self) -> Result<()> {
        let path = self.branch_dir.join(files::PID);
        let text = fs::read_to_string(&path).on("read", &path)?;
        let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(()) };
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        // The number may be another process' by now; the descriptor then is that one's, and it is spared.
        let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        let ours = self.branch_dir.as_os_str().as_encoded_bytes();
        if !command.split(|byte| *byte == 0).any(|argument| argument == ours) {
            return Ok(());
        }
        pidfd_send_signal(process, Signal::KILL).on("kill the unit of", &self.branch_dir)
    }

    fn write_spec(&self, spec: &UnitSpec) -> Result<()> {
        let path = self.branch_dir.join(files::SPEC);
        let fresh = path.with_extension("json.new");
        let bytes = serde_json::to_vec_pretty(spec).map_err(io::Error::from).on("write", &path)?;
        let mut options = File::options();
        let file = options.create(true).truncate(true).write(true).mode(0o600).open(&fresh);
        // Not synced: it is of no use after a power cut, when no unit is starting.
        file.and_then(|mut file| file.write_all(&bytes)).on("write", &fresh)?;
        fs::rename(&fresh, &path).on("write", &path)
    }

    fn open_log(&self) -> Result<File> {
        let path = self.branch_dir.join(files::UNIT_LOG);
        let file = File::options().create(true).append(true).mode(0o600).open(&path).on("open", &path)?;
        if file.metadata().on("look at", &path)?.len() > UNIT_LOG_BYTES_MAX {
            file.set_len(0).on("cut", &path)?;
        }
        Ok(file)
    }

    /// What the unit left as its reason.
    fn why_it_ended(&self) -> Error {
        let log = self.branch_dir.join(files::LOG);
        let told = fs::read_to_string(self.branch_dir.join(files::REASON)).unwrap_or_default();
        let why = told.trim().trim_start_matches("postgres did not start: ").to_owned();
        let unit_log = || format!("the unit ended without a word (see {:?})", self.branch_dir.join(files::UNIT_LOG));
        Error::Start { why: if why.is_empty() { unit_log() } else { why }, log }
    }
}

/// Waits for the unit to say that Postgres is ready; `None` if it ended instead.
async fn hear_ready(child: &mut Child) -> Option<Status> {
    let pipe = child.stdout.take()?;
    receive(&mut BufReader::new(pipe)).await.ok().flatten()
}

/// Waits for the process somewhere else, so that it does not stay a zombie if it ends before this one.
fn reap(mut child: Child) {
    tokio::spawn(async move {
        let _ = child.wait().await;
    });
}

fn record(status: &Status, whole: Duration) {
    let mut before = 0;
    for (stage, at) in &status.stages {
        let seconds = Duration::from_micros(at.saturating_sub(before)).as_secs_f64();
        metrics::histogram!("ebb_compute_wake_stage_seconds", "stage" => stage.clone()).record(seconds);
        before = *at;
    }
    metrics::histogram!("ebb_compute_wake_seconds").record(whole.as_secs_f64());
}

fn unexpected(reply: &Reply) -> Error {
    Error::Refused(format!("it answered something else: {reply:?}"))
}

/// Growing pauses for looking again at what gives no signal: from half a millisecond to 20.
#[derive(Debug)]
struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(Duration::from_micros(500))
    }
}

impl Pauses {
    fn next(&mut self) -> impl Future<Output = ()> + use<> {
        let pause = self.0;
        self.0 = (pause * 2).min(Duration::from_millis(20));
        sleep(pause)
    }
}
