//! The image of a moment, for reading only: a volume that is thrown away, and a Postgres that stays in recovery on it.
//!
//! A server in recovery refuses every write itself, whatever a client sets, and starts no worker of its own: no
//! subscription, no autovacuum (PostgreSQL 15, 27.4). It is at the moment without having to end a history and begin another:
//!
//! ```text
//!   seal ── its own WAL ── consistent: lets clients in ── WAL of the archive ── the moment: told here that it is there
//! ```
//!
//! Where that is not possible (`CANNOT_STAY`), Postgres recovers and goes on first, as for a branch, and stays on what that
//! was sealed into.
//!
//! **Crash**: a file in `visits/` is there before anything else: whoever finds it removes the rest, and the layer that it
//! names.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ebb_compute::manager::{CANNOT_STAY, Recovery, Unit, Until};
use ebb_compute::postgres;
use ebb_storage::layer::{self, FilePages};
use ebb_types::{BranchId, LayerId};
use serde::{Deserialize, Serialize};

use super::replay::{Tail, recovery, seal_recovered};
use super::{Line, LocalNode, Node as _, Start};
use crate::error::LocalContext as _;
use crate::event::{Moment, Replay};
use crate::migrate::Session;
use crate::{Error, Result, files};

/// In the data directory: for each visit a file of its name.
const MARKS: &str = "visits";

/// LIMIT: what a replay reads is bounded by where seals are cut; with a machine that does much else besides.
const ARRIVE_DEADLINE: Duration = Duration::from_secs(120);

/// How often it is looked whether the moment is reached.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Whether the server is where it is to stay: paused there, or without more WAL. The startup process says so itself.
const ARRIVED: &str = "select pg_get_wal_replay_pause_state() = 'paused' or exists (select from pg_stat_activity \
    where backend_type = 'startup' and wait_event = 'RecoveryRetrieveRetryInterval')";

/// As those whose verifiers are published: superusers have no business in the past either.
const ADMITTED: &str = "select rolname::text from pg_roles where rolcanlogin and not rolsuper";

/// A visit that is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visited {
    /// The socket of its Postgres.
    pub socket: PathBuf,
    /// The roles that could log in at that moment.
    pub roles: BTreeSet<String>,
    /// The layer that it lies on. Where a visit was asked for that is shut, its page map tells all that is in the image.
    pub layer: LayerId,
}

/// What visits need of a machine. Every method may be called again after it failed or was cut off.
#[async_trait]
pub trait Visiting {
    /// Opens an image for reading only, in a directory of its own that `start` names: its head as it is, or as a replay
    /// from there leads to another moment; `shut` wants it on a layer in which nothing is open. What an earlier try left
    /// there is removed first.
    async fn visit(&self, start: &Start, replay: Option<&Replay>, shut: bool) -> Result<Visited>;

    /// Ends a visit, if it is open, and removes all that it left.
    async fn leave(&self, visit: BranchId) -> Result<()>;

    /// The visits that this machine has anything of.
    async fn visits(&self) -> Result<BTreeSet<BranchId>>;

    /// The files of databases in two layers in which nothing is open, by path, and which of them hold the same rows, because
    /// no page of them differs and every page is from before a moment at which nothing was open either: then who is seen to
    /// have committed is the same, too.
    async fn same_files(&self, from: LayerId, to: LayerId) -> Result<BTreeMap<String, FilePages>>;

    /// The definitions in a database of a server that answers, as `pg_dump` writes them.
    async fn dump_schema(&self, pg_major: u32, socket: &Path, database: &str) -> Result<String>;
}

/// What a file in [`MARKS`] holds.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    /// A layer of this visit alone.
    layer: LayerId,
}

#[async_trait]
impl Visiting for LocalNode {
    async fn visit(&self, start: &Start, replay: Option<&Replay>, shut: bool) -> Result<Visited> {
        let visit = start.data.branch;
        self.leave(visit).await?;
        self.make_openable(start.data.head).await?;
        let layer = replay.map_or_else(LayerId::generate, |replay| replay.layer);
        let mark = serde_json::to_vec(&Mark { layer }).expect("a mark is plain data");
        let marks = self.data_dir.join(MARKS);
        fs::create_dir_all(&marks).on("create", &marks)?;
        files::replace(&marks.join(visit.to_string()), &mark)?;

        let until = replay.and_then(|replay| match replay.to {
            Moment::Lsn(_) => None,
            Moment::Time(time) => Some(Until::Time(time)),
        });
        let tail = match replay {
            Some(replay) => Some(self.tail_of(replay).await?),
            None => None,
        };
        let is_shut = replay.is_none() && self.store.manifest(start.data.head).await?.image.clean;
        let (unit, layer) = if shut && !is_shut {
            self.stay_on_shut(start, replay, layer).await?
        } else {
            match self.stay(start, tail.as_ref(), until).await {
                Err(error) if error.chain().contains(CANNOT_STAY) => {
                    tracing::info!(%visit, "a moment is recovered to before it is visited");
                    metrics::counter!("ebb_timeline_visits_recovered_total").increment(1);
                    self.stay_on_shut(start, replay, layer).await?
                }
                unit => (unit?, start.data.head),
            }
        };
        self.units.lock().insert(visit, unit.clone());
        let socket = unit.socket();
        let roles = arrive(&socket).await?;
        Ok(Visited { socket, roles, layer })
    }

    async fn same_files(&self, from: LayerId, to: LayerId) -> Result<BTreeMap<String, FilePages>> {
        let (from, to) = (self.store.manifest(from).await?, self.store.manifest(to).await?);
        let ours: HashSet<LayerId> = from.chain.iter().copied().collect();
        let mut settled = HashSet::new();
        for &common in to.chain.iter().rev().filter(|layer| ours.contains(layer)) {
            if let Some(manifest) = self.manifest(common).await?.filter(|manifest| manifest.image.clean) {
                settled = manifest.chain.into_iter().collect();
                break;
            }
        }
        Ok(layer::same_files(&from, &to, "base", &settled))
    }

    async fn leave(&self, visit: BranchId) -> Result<()> {
        let mark = self.data_dir.join(MARKS).join(visit.to_string());
        let bytes = match fs::read(&mark) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).on("read", &mark),
        };
        self.discard(visit).await?;
        self.remove_branch(visit).await?;
        // One that cannot be read was never written to its end, and nothing was made after it.
        if let Ok(Mark { layer }) = serde_json::from_slice(&bytes) {
            self.store.remove_local(layer).await?;
        }
        files::remove_file(&mark)
    }

    async fn visits(&self) -> Result<BTreeSet<BranchId>> {
        let marks = self.data_dir.join(MARKS);
        let entries = match fs::read_dir(&marks) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(error) => return Err(error).on("list", &marks),
        };
        let mut visits = BTreeSet::new();
        for entry in entries {
            let name = entry.on("list", &marks)?.file_name();
            visits.extend(name.to_str().and_then(|name| name.parse::<BranchId>().ok()));
        }
        Ok(visits)
    }

    async fn dump_schema(&self, pg_major: u32, socket: &Path, database: &str) -> Result<String> {
        Ok(postgres::dump_schema(&self.installation(pg_major)?, socket, database).await?)
    }
}

impl LocalNode {
    /// Lets Postgres recover to the moment, go on and shut down, and stays on the layer that this makes. Nothing is open in it,
    /// and what was changed on the way is in its pages.
    async fn stay_on_shut(&self, start: &Start, replay: Option<&Replay>, layer: LayerId) -> Result<(Unit, LayerId)> {
        let visit = start.data.branch;
        self.remove_branch(visit).await?;
        match replay {
            Some(replay) => drop(self.replay_here(replay, start).await?),
            None => drop(seal_recovered(&self.recover_into(start, None, None).await?, layer).await?),
        }
        self.remove_branch(visit).await?;
        let data = Line { head: layer, ..start.data.clone() };
        Ok((self.stay(&Start { data, ..start.clone() }, None, None).await?, layer))
    }

    /// Starts a Postgres that stays in recovery, on a volume made for it.
    async fn stay(&self, start: &Start, tail: Option<&Tail>, until: Option<Until>) -> Result<Unit> {
        let (visit, dir) = (start.data.branch, self.branch_dir(start.data.branch));
        fs::create_dir_all(&dir).on("create", &dir)?;
        self.make_volume(&start.data, start.data.head, true).await?;
        self.prepare_replay(visit, tail, "standby.signal").await?;
        let mut spec = self.spec(start, self.installation(start.pg_major)?);
        spec.archive = None;
        // It is gone before the rest would be here.
        spec.hydrate = false;
        // What a first wake would write.
        (spec.fork, spec.initial_roles) = (false, Vec::new());
        spec.recovery = Some(Recovery { stay: true, ..recovery(&self.replay_dir(visit), until)? });
        let _turn = self.turn(visit).await;
        Ok(Unit::start(&self.exe, &spec).await?)
    }
}

/// Waits until the server is at its moment; who may log in there.
async fn arrive(socket: &Path) -> Result<BTreeSet<String>> {
    let session = Session::open_as_superuser(socket).await?;
    let deadline = Instant::now() + ARRIVE_DEADLINE;
    while !session.ask::<bool>(ARRIVED).await?.first().copied().unwrap_or(false) {
        if Instant::now() > deadline {
            return Err(Error::Deadline("replaying WAL up to the moment"));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(session.ask::<String>(ADMITTED).await?.into_iter().collect())
}
