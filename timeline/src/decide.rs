//! What may happen: `decide(state, command)` answers the events that carry a command out, or why it is refused.
//!
//! Pure: identifiers and the time come with the command. What a command needs to know of the world outside the ledger
//! (which layer a seal made, say) comes with it, too.

use ebb_compute::control::Durability;
use ebb_compute::import::DumpFormat;
use ebb_types::{
    AllowList, BranchId, BranchName, CheckpointName, LayerId, Lsn, OperationId, Point, ReleaseId, Timestamp,
};

use crate::api::types::Parent;
use crate::clients::Pinned;
use crate::deploy::{Part, Rehearsal};
use crate::drill::{Drilled, Probe};
use crate::error::Refusal;
use crate::event::{Dump, Event, Key, Left, Moment, Origin, Plan, Replay, Rescue, Step};
use crate::machine::ReleaseStage;
use crate::node::Sealed;
use crate::release_file::ReleaseFile;
use crate::state::{Branch, Operation, ProjectState, Release};
use crate::upkeep::UpkeepChange;

mod releases;

pub use releases::{Did, deployed_now};

/// The branch that releases go to; it cannot be deleted.
pub const PROD: &str = "prod";

/// The second branch that a project starts with.
pub const DEV: &str = "dev";

/// LIMIT: a week is long enough to notice on Monday what went wrong on Friday, and to decide.
const RESCUE_DAYS: i64 = 7;

/// LIMIT: shorter than this and a compute would be suspended between two statements of one client.
const IDLE_SUSPEND_MIN_MS: u64 = 100;

/// LIMIT: a compute that shall stay awake for a year needs no suspension; more is a mistake in the unit.
const IDLE_SUSPEND_MAX_MS: u64 = 366 * 24 * 3600 * 1000;

/// LIMIT: a Postgres that takes more connections than this is no branch's.
const POOL_SIZE_MAX: u32 = 10_000;
/// LIMIT: a window longer than this is an archive, not a way back; more is a mistake in the unit.
const WINDOW_MAX_MS: u64 = 366 * 24 * 3600 * 1000;

/// LIMIT: names of branches have 30 characters at most (`ebb_types::BranchName`).
const BRANCH_NAME_MAX: usize = 30;

/// What somebody asks for, by names.
#[derive(Debug, Clone)]
pub enum Ask {
    /// A branch from a point of another.
    CreateBranch {
        /// The new name.
        name: BranchName,
        /// The source.
        from: BranchName,
        /// The point on it.
        point: Point,
    },
    /// Another policy.
    ChangeBranch {
        /// Which branch.
        branch: String,
        /// Idle time after which its compute is suspended; `None`: as it is.
        idle_suspend_ms: Option<u64>,
        /// How long its past can be gone back to; `None`: as it is.
        window_ms: Option<u64>,
        /// What its commits wait for; `None`: as it is.
        durability: Option<Durability>,
        /// What is done for it by itself.
        upkeep: UpkeepChange,
        /// From where clients may connect; `None`: as it is.
        allow: Option<AllowList>,
        /// What becomes of idle sessions that cannot be given back; `None`: as it is.
        pinned: Option<Pinned>,
        /// How many backends its clients in transaction mode share, 0 for as many as is derived; `None`: as it is.
        pool_size: Option<u32>,
    },
    /// A branch less.
    DeleteBranch {
        /// Which.
        branch: String,
        /// The rule by which it goes, if nobody asked for it.
        rule: Option<String>,
    },
    /// A name for the head.
    CreateCheckpoint {
        /// Of which branch.
        branch: String,
        /// The name; taken ones are refused.
        name: CheckpointName,
        /// Whether a schedule asks for it.
        automatic: bool,
    },
    /// A name less.
    DeleteCheckpoint {
        /// Of which branch.
        branch: String,
        /// The name.
        name: String,
        /// The rule by which it goes, if nobody asked for it.
        rule: Option<String>,
    },
    /// A point restored out of the bucket alone, and checked.
    Drill {
        /// Of which branch.
        branch: String,
        /// The point.
        point: Point,
        /// What is asked besides what the branch's policy says.
        probes: Vec<Probe>,
    },
    /// A branch set to one of its checkpoints.
    Restore {
        /// Which.
        branch: String,
        /// Where to.
        to: Point,
    },
    /// An artifact on `prod`.
    Release {
        /// BLAKE3 of it, in hex.
        artifact: String,
        /// File names of its migrations, in order.
        migrations: Vec<String>,
        /// What it says of itself, if it does.
        file: Option<Box<ReleaseFile>>,
    },
    /// An artifact tried on a copy of `prod`, and only that.
    Rehearse {
        /// BLAKE3 of it, in hex.
        artifact: String,
        /// What it says of itself.
        file: Box<ReleaseFile>,
    },
    /// Code and data back to a release.
    Rollback {
        /// Its name.
        to: String,
        /// Whether code, data or both go back.
        part: Part,
        /// End of WAL on `prod` now, where known.
        lsn: Option<Lsn>,
        /// The next transaction number on `prod` now, where known.
        next_xid: Option<u64>,
        /// Layers that `prod` has beyond the checkpoint.
        layers: u64,
    },
    /// A compute stopped.
    Suspend {
        /// Of which branch.
        branch: String,
    },
    /// A compute started.
    Wake {
        /// Of which branch.
        branch: String,
    },
    /// A point as a plain data directory.
    Export {
        /// Which branch.
        branch: String,
        /// The point on it.
        point: Point,
        /// Where to.
        dir: std::path::PathBuf,
        /// As what pg_dump writes, of which database; `None`: as a data directory.
        dump: Option<(DumpFormat, String)>,
    },
    /// A connection URL with its password.
    ShowUrl {
        /// Of which branch.
        branch: String,
    },
    /// A branch of what was made elsewhere.
    Import {
        /// The new name.
        name: BranchName,
        /// Where it comes from.
        origin: Origin,
    },
}

/// The time and the identifiers an act may need.
#[derive(Debug, Clone, Copy)]
pub struct Fresh {
    /// Now.
    pub now: Timestamp,
    /// For a new branch.
    pub branch: BranchId,
    /// For a seal.
    pub layer: LayerId,
    /// For a release.
    pub release: ReleaseId,
    /// For the directory of a replay.
    pub scratch: BranchId,
    /// For what a replay makes.
    pub replayed: LayerId,
}

/// What a step found or made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// The layer that holds the head, if there was a volume to seal.
    pub sealed: Option<LayerId>,
    /// A position that all WAL of what was sealed, or replayed, lies before, where known.
    pub end: Option<Lsn>,
    /// End of WAL in it, where known.
    pub lsn: Option<Lsn>,
    /// The next transaction number, where known.
    pub next_xid: Option<u64>,
}

impl Found {
    /// Notes a seal.
    pub fn take(&mut self, sealed: Option<Sealed>) {
        self.sealed = sealed.map(|sealed| sealed.layer);
        self.end = sealed.and_then(|sealed| sealed.end);
    }
}

/// Something to decide.
#[derive(Debug, Clone)]
pub enum Command {
    /// Begin an act.
    Begin {
        /// What is asked for.
        ask: Ask,
        /// Identifiers and time for it.
        fresh: Fresh,
        /// The caller's idempotency key.
        key: Option<Key>,
    },
    /// A step of an operation is done.
    Step {
        /// Which operation.
        op: OperationId,
        /// Which step.
        step: Step,
        /// What came of it.
        found: Found,
    },
    /// A step of a release that describes itself came to something.
    Deployed {
        /// Which operation.
        op: OperationId,
        /// What it came to.
        did: Did,
    },
    /// A rehearsal that is no part of a release is over.
    Rehearsed {
        /// Which operation.
        op: OperationId,
        /// What it showed.
        report: Rehearsal,
    },
    /// A drill is over.
    Drilled {
        /// Which operation.
        op: OperationId,
        /// What came of it.
        drilled: Drilled,
    },
    /// Give an operation up.
    Undo {
        /// Which.
        op: OperationId,
        /// Why.
        why: String,
    },
    /// A branch was sealed without an operation (it was suspended for idleness).
    Sealed {
        /// Which branch.
        branch: BranchId,
        /// The line of its volume.
        line: u64,
        /// Its new head.
        layer: LayerId,
        /// A position that all its WAL lies before, where known.
        end: Option<Lsn>,
    },
}

/// Decides a command.
///
/// # Errors
/// Why it is refused.
pub fn decide(state: &ProjectState, command: &Command) -> Result<Vec<Event>, Refusal> {
    match command {
        Command::Begin { ask, fresh, key } => {
            state.facts()?;
            let plan = plan(state, ask, fresh)?;
            begin(state, ask, plan, key.clone())
        }
        Command::Step { op, step, found } => {
            let operation = running(state, *op)?;
            if operation.next_step() != Some(*step) {
                return Err(Refusal::TooLate(format!("step {step:?} of operation {op} is not next")));
            }
            if let (Plan::CreateBranch { name, .. } | Plan::Import { name, .. }, Step::Record) = (&operation.plan, step)
                && state.branches.values().any(|other| other.name == *name)
            {
                return Err(Refusal::Taken { kind: "branch", name: name.to_string() });
            }
            Ok(step_events(state, operation, *step, *found))
        }
        Command::Deployed { op, did } => releases::deploy_events(state, *op, did),
        Command::Rehearsed { op, report } => releases::rehearsed_events(state, *op, report),
        Command::Drilled { op, drilled } => drill_events(state, *op, drilled),
        Command::Undo { op, why } => {
            let operation = running(state, *op)?;
            if operation.phase != crate::machine::Phase::Begun {
                return Err(Refusal::TooLate(format!("operation {op} is past its point of no return")));
            }
            let mut events = Vec::new();
            if let Plan::Release { release, .. } = &operation.plan {
                events.push(Event::ReleaseFailed { release: *release, fault: why.clone() });
            }
            events.push(Event::OperationUndone { why: why.clone() });
            Ok(events)
        }
        Command::Sealed { branch, line, layer, end } => {
            let known = state.branch_by_id(*branch)?;
            if known.line != *line {
                return Err(Refusal::TooLate(format!("branch {:?} was moved meanwhile", known.name)));
            }
            Ok(sealed(known, *branch, Some(*layer), *end).into_iter().collect())
        }
    }
}

fn running(state: &ProjectState, op: OperationId) -> Result<&Operation, Refusal> {
    state.operations.get(&op).ok_or_else(|| Refusal::TooLate(format!("operation {op} is over")))
}

/// Makes the plan of an act, if the state allows it.
///
/// # Errors
/// Why it is refused.
pub fn plan(state: &ProjectState, ask: &Ask, fresh: &Fresh) -> Result<Plan, Refusal> {
    let seal = fresh.layer;
    match ask {
        Ask::CreateBranch { name, from, point, .. } => {
            let (source, branch) = state.branch(from.as_str())?;
            if state.branches.values().any(|other| other.name == *name) {
                return Err(Refusal::Taken { kind: "branch", name: name.to_string() });
            }
            let (layer, replay) = image_at(source, branch, point, fresh)?;
            if layer.is_none() && replay.is_none() {
                free(state, source)?;
            }
            let parent = Parent { branch: branch.name.clone(), point: point.to_string() };
            Ok(Plan::CreateBranch { branch: fresh.branch, name: name.clone(), source, parent, layer, seal, replay })
        }
        Ask::ChangeBranch { branch, idle_suspend_ms, window_ms, upkeep, pool_size, allow, .. } => {
            if pool_size.is_some_and(|size| size > POOL_SIZE_MAX) {
                return Err(Refusal::Invalid(format!("pool_size must be at most {POOL_SIZE_MAX}")));
            }
            if let Some(fault) = upkeep.fault().or_else(|| allow.as_ref()?.fault()) {
                return Err(Refusal::Invalid(fault));
            }
            if idle_suspend_ms.is_some_and(|ms| !(IDLE_SUSPEND_MIN_MS..=IDLE_SUSPEND_MAX_MS).contains(&ms)) {
                let fault = "idle_suspend_seconds must be at least 0.1 and at most a year";
                return Err(Refusal::Invalid(fault.to_owned()));
            }
            if window_ms.is_some_and(|ms| ms > WINDOW_MAX_MS) {
                return Err(Refusal::Invalid("window_seconds must be at most a year".to_owned()));
            }
            Ok(Plan::ChangeBranch { branch: state.branch(branch)?.0 })
        }
        Ask::DeleteBranch { branch, rule } => {
            let (id, branch) = state.branch(branch)?;
            may_be_deleted(branch, fresh.now)?;
            if rule.is_some() && !branch.is_untouched() {
                return Err(Refusal::TooLate(format!("something was done on branch {:?} meanwhile", branch.name)));
            }
            free(state, id)?;
            Ok(Plan::DeleteBranch { branch: id, rule: rule.clone() })
        }
        Ask::CreateCheckpoint { branch, name, automatic } => {
            let (id, branch) = state.branch(branch)?;
            if name.as_str() == "head" {
                return Err(Refusal::Invalid("\"head\" always means where a branch is now".to_owned()));
            }
            if branch.checkpoints.iter().any(|other| other.name == *name) {
                return Err(Refusal::Taken { kind: "checkpoint", name: name.to_string() });
            }
            free(state, id)?;
            Ok(Plan::CreateCheckpoint { branch: id, name: name.clone(), seal, automatic: *automatic })
        }
        Ask::DeleteCheckpoint { branch, name, rule } => {
            let (id, branch) = state.branch(branch)?;
            let checkpoint = branch.checkpoint(name)?;
            if rule.is_some() && !checkpoint.automatic {
                return Err(Refusal::TooLate(format!("checkpoint {name:?} is another one meanwhile")));
            }
            let name = checkpoint.name.clone();
            let needs = |release: &&Release| release.checkpoint == name && release.stage != ReleaseStage::RolledBack;
            if branch.name.as_str() == PROD
                && let Some(release) = state.releases.iter().find(needs)
            {
                return Err(Refusal::CheckpointKept { checkpoint: name, release: release.name.clone() });
            }
            free(state, id)?;
            Ok(Plan::DeleteCheckpoint { branch: id, name, rule: rule.clone() })
        }
        Ask::Restore { branch, to } => {
            let (id, branch) = state.branch(branch)?;
            let (layer, replay) = image_at(id, branch, to, fresh)?;
            let Some(layer) = layer.or(replay.as_ref().map(|replay| replay.layer)) else {
                return Err(Refusal::Invalid("restoring a branch to its own head changes nothing".to_owned()));
            };
            free(state, id)?;
            let rescue = rescue(state, id, branch, fresh);
            Ok(Plan::Restore { branch: id, to: to.clone(), layer, seal, rescue, replay })
        }
        Ask::Release { .. } => releases::plan_release(state, ask, fresh),
        Ask::Rehearse { artifact, file } => releases::plan_rehearsal(state, artifact, file, fresh),
        Ask::Rollback { to, part, lsn, next_xid, layers } => {
            let now = Found { lsn: *lsn, next_xid: *next_xid, ..Found::default() };
            releases::plan_rollback(state, (to, *part), now, *layers, fresh)
        }
        Ask::Suspend { branch } => {
            let (branch, _) = state.branch(branch)?;
            free(state, branch)?;
            Ok(Plan::Suspend { branch, seal })
        }
        Ask::Wake { branch } => {
            let (branch, _) = state.branch(branch)?;
            free(state, branch)?;
            Ok(Plan::Wake { branch })
        }
        Ask::Export { branch, point, dir, dump } => {
            let (id, branch) = state.branch(branch)?;
            let (mut layer, replay) = image_at(id, branch, point, fresh)?;
            match dump {
                // Sealed just before, so that nobody waits for the dump.
                Some(_) if replay.is_none() => layer = layer.or(Some(branch.head)),
                Some(_) => {}
                None => free(state, id)?,
            }
            let point = Some(point).filter(|point| **point != Point::Head).cloned();
            let scratch = fresh.scratch;
            let dump = dump.clone().map(|(format, database)| Dump { format, database, scratch });
            Ok(Plan::Export { branch: id, point, layer, replay, seal, dir: dir.clone(), dump })
        }
        Ask::Drill { branch, point, probes } => {
            let (id, branch) = state.branch(branch)?;
            if let Some(fault) = probes.iter().find_map(Probe::fault) {
                return Err(Refusal::Invalid(fault));
            }
            let (layer, replay) = image_at(id, branch, point, fresh)?;
            let layer = layer.or((*point == Point::Head).then_some(branch.head));
            let (point, scratch, probes) = (point.clone(), fresh.scratch, probes.clone());
            Ok(Plan::Drill { branch: id, point, layer, replay, scratch, probes })
        }
        Ask::ShowUrl { branch } => Ok(Plan::ShowUrl { branch: state.branch(branch)?.0 }),
        Ask::Import { name, origin } => {
            let is_coming = |plan: &Plan| matches!(plan, Plan::Import { name: other, .. } if other == name);
            if state.branches.values().any(|other| other.name == *name)
                || state.operations.values().any(|operation| is_coming(&operation.plan))
            {
                return Err(Refusal::Taken { kind: "branch", name: name.to_string() });
            }
            Ok(import(name, origin, None, fresh))
        }
    }
}

/// The plan of an import; with a second branch, of one that a project begins with.
pub fn import(name: &BranchName, origin: &Origin, dev: Option<BranchId>, fresh: &Fresh) -> Plan {
    let Fresh { branch, layer, scratch, .. } = *fresh;
    Plan::Import { branch, name: name.clone(), origin: origin.clone(), layer, scratch, dev }
}

/// The layer of a point, or how one comes about; neither for the head, which may have to be sealed first.
///
/// # Errors
/// If the branch cannot be taken back to that point.
pub fn image_at(
    id: BranchId,
    branch: &Branch,
    point: &Point,
    fresh: &Fresh,
) -> Result<(Option<LayerId>, Option<Replay>), Refusal> {
    let to = match point {
        Point::Head => return Ok((None, None)),
        Point::Checkpoint(name) => return Ok((Some(branch.checkpoint(name.as_str())?.layer), None)),
        Point::Lsn(lsn) => Moment::Lsn(*lsn),
        Point::Time(time) => Moment::Time(*time),
    };
    let from = branch.window_start(fresh.now);
    let outside = |why: &str| {
        let (branch, point) = (branch.name.clone(), point.to_string());
        Refusal::OutsideWindow { branch, point, why: why.to_owned(), from, to: fresh.now }
    };
    let seal = match to {
        Moment::Time(time) if time > fresh.now => return Err(outside("it has not come yet")),
        Moment::Time(time) if time < from => return Err(outside("it is too long ago")),
        Moment::Time(time) => branch.history.at_time(time).ok_or_else(|| outside("it is too long ago"))?,
        Moment::Lsn(lsn) => {
            let none = || outside("no image from before that position is kept");
            branch.history.at_lsn(lsn, branch.line).ok_or_else(none)?
        }
    };
    let replay = Replay {
        branch: id,
        line: seal.line,
        base: seal.layer,
        base_end: seal.end,
        through: branch.history.after(seal).and_then(|next| next.end),
        to,
        scratch: fresh.scratch,
        layer: fresh.replayed,
    };
    Ok((None, Some(replay)))
}

/// No operation holds the branch.
fn free(state: &ProjectState, branch: BranchId) -> Result<(), Refusal> {
    let name = state.branch_by_id(branch)?.name.clone();
    match state.holder(branch) {
        None => Ok(()),
        Some((operation, holder)) => Err(Refusal::Busy { branch: name, act: holder.plan.act(), operation }),
    }
}

fn may_be_deleted(branch: &Branch, now: Timestamp) -> Result<(), Refusal> {
    let kept =
        |why: String, advice: &str| Err(Refusal::Kept { branch: branch.name.clone(), why, advice: advice.to_owned() });
    if branch.name.as_str() == PROD {
        return kept("releases go there".to_owned(), "Delete the whole project instead.");
    }
    match branch.rescue_until {
        Some(until) if now < until => {
            kept(format!("it is a rescue branch, kept until {until}"), "It can be deleted after that.")
        }
        _ => Ok(()),
    }
}

/// A name for what a restore or rollback sets aside: `rescue-<branch>-<n>`, shortened to fit, not used before.
fn rescue(state: &ProjectState, id: BranchId, branch: &Branch, fresh: &Fresh) -> Rescue {
    let first = state.rescues.get(&id).copied().unwrap_or(0) + 1;
    let name = (first..)
        .map(|n| {
            let number = n.to_string();
            let room = BRANCH_NAME_MAX - "rescue--".len() - number.len();
            let stem: String = branch.name.as_str().chars().take(room).collect();
            let name = format!("rescue-{}-{number}", stem.trim_end_matches('-'));
            name.parse::<BranchName>().expect("a cut name between two hyphens and a number is a branch name")
        })
        .find(|name| state.branches.values().all(|other| other.name != *name))
        .expect("there are more numbers than branches");
    let week = jiff::SignedDuration::from_hours(24 * RESCUE_DAYS);
    Rescue { branch: fresh.branch, name, until: fresh.now.saturating_add(week).unwrap_or(Timestamp::MAX) }
}

fn free_checkpoint_name(branch: &Branch, wanted: &str) -> CheckpointName {
    let taken = |name: &CheckpointName| branch.checkpoints.iter().any(|checkpoint| checkpoint.name == *name);
    (1u64..)
        .map(|n| if n == 1 { wanted.to_owned() } else { format!("{wanted}-{n}") })
        .map(|name| name.parse().expect("a release's name and a number are a checkpoint name"))
        .find(|name| !taken(name))
        .expect("there are more numbers than checkpoints")
}

/// The entry that begins an act; for an act without steps it is the whole of it.
fn begin(state: &ProjectState, ask: &Ask, plan: Plan, key: Option<Key>) -> Result<Vec<Event>, Refusal> {
    let mut events = vec![Event::OperationBegun { plan: Box::new(plan.clone()), key }];
    match (&plan, ask) {
        (Plan::CreateBranch { branch, name, parent, source, layer: Some(layer), .. }, _) => {
            events.push(Event::BranchCreated {
                branch: *branch,
                name: name.clone(),
                head: *layer,
                end: end_of(state, *source, *layer),
                parent: Some(parent.clone()),
                rescue_until: None,
            })
        }
        (
            Plan::ChangeBranch { branch },
            Ask::ChangeBranch { idle_suspend_ms, window_ms, durability, upkeep, pinned, allow, pool_size, .. },
        ) => {
            let (idle_suspend_ms, window_ms, durability) = (*idle_suspend_ms, *window_ms, *durability);
            let (branch, upkeep, pinned) = (*branch, upkeep.clone(), *pinned);
            let (allow, pool_size) = (allow.clone(), *pool_size);
            events.push(Event::BranchChanged {
                branch,
                idle_suspend_ms,
                window_ms,
                durability,
                upkeep,
                pinned,
                allow,
                pool_size,
            });
        }
        (Plan::DeleteCheckpoint { branch, name, .. }, _) => {
            events.push(Event::CheckpointDeleted { branch: *branch, name: name.clone() });
        }
        (Plan::Release { release, name, artifact, checkpoint, .. }, Ask::Release { migrations, .. }) => {
            debug_assert!(state.release_by_id(*release).is_none(), "release identifiers are fresh");
            events.push(Event::ReleaseBegun {
                release: *release,
                name: name.clone(),
                artifact: artifact.clone(),
                migrations: migrations.clone(),
                checkpoint: checkpoint.clone(),
            });
        }
        _ => {}
    }
    if plan.steps().is_empty() {
        events.push(Event::OperationDone);
    }
    Ok(events)
}

/// The entry that records a step.
fn step_events(state: &ProjectState, operation: &Operation, step: Step, found: Found) -> Vec<Event> {
    let mut events = Vec::new();
    let plan = &operation.plan;
    let held = plan.holds().and_then(|id| state.branches.get(&id).map(|branch| (id, branch.as_ref())));
    if let Some((id, branch)) = held
        && matches!(step, Step::Record | Step::Checkpoint | Step::Switch | Step::Write)
    {
        events.extend(sealed(branch, id, found.sealed, found.end));
    }
    let head = found.sealed.or_else(|| held.map(|(_, branch)| branch.head));
    let replayed = plan.replay().map(|replay| replay.layer);
    match (plan, step, head) {
        (Plan::CreateBranch { branch, name, parent, source, .. }, Step::Record, _) => {
            let (branch, name, parent) = (*branch, name.clone(), Some(parent.clone()));
            if let Some(head) = replayed.or(head) {
                let end = operation.replayed_end.or(found.end).or_else(|| end_of(state, *source, head));
                events.push(Event::BranchCreated { branch, name, head, end, parent, rescue_until: None });
            }
        }
        (Plan::CreateCheckpoint { branch, name, automatic, .. }, Step::Record, Some(layer)) => {
            events.push(checkpoint_created(*branch, name, layer, found, *automatic));
        }
        (Plan::Release { branch, checkpoint, .. }, Step::Checkpoint, Some(layer)) => {
            events.push(checkpoint_created(*branch, checkpoint, layer, found, false));
        }
        (Plan::Import { branch, name, layer, dev, .. }, Step::Record, _) => {
            let (end, rescue_until) = (found.end, None);
            let made = |branch: BranchId, name: BranchName, parent| Event::BranchCreated {
                branch,
                name,
                head: *layer,
                end,
                parent,
                rescue_until,
            };
            events.push(made(*branch, name.clone(), None));
            let parent = Parent { branch: name.clone(), point: "head".to_owned() };
            let second = || DEV.parse().expect("the second branch's name is a name");
            events.extend(dev.map(|dev| made(dev, second(), Some(parent))));
        }
        (Plan::Release { release, .. }, Step::Switch, _) => events.push(Event::ReleaseDeployed { release: *release }),
        (Plan::DeleteBranch { branch, .. }, Step::Switch, _) => {
            // What the volume held is not wanted any more: no seal, no new head.
            events.clear();
            events.push(Event::BranchDeleted { branch: *branch });
        }
        (Plan::Restore { branch, to, layer, rescue, replay, .. }, Step::Switch, Some(head)) => {
            let replay = replay.as_ref().map(|replay| (replay, operation.replayed_end));
            events.extend(moved(held, *branch, to, *layer, replay, (head, found.end), rescue));
        }
        (Plan::Rollback { part: Part::Code, to, releases, .. }, Step::Switch, _) => {
            events.push(Event::CodeRolledBack { to: *to, releases: releases.clone() });
        }
        (Plan::Rollback { branch, part, to, releases, checkpoint, layer, rescue, .. }, Step::Switch, Some(head)) => {
            let point = Point::Checkpoint(checkpoint.clone());
            events.extend(moved(held, *branch, &point, *layer, None, (head, found.end), rescue));
            let releases = releases.clone();
            events.push(match part {
                Part::Data => Event::DataRolledBack { releases },
                _ => Event::ReleasesRolledBack { to: *to, releases },
            });
        }
        _ => {}
    }
    events.push(Event::StepDone { step, end: found.end.filter(|_| step == Step::Replay) });
    if operation.is_at_last_step() {
        events.push(Event::OperationDone);
    }
    events
}

fn checkpoint_created(branch: BranchId, name: &CheckpointName, layer: LayerId, found: Found, automatic: bool) -> Event {
    Event::CheckpointCreated { branch, name: name.clone(), layer, lsn: found.lsn, next_xid: found.next_xid, automatic }
}

/// The entry that ends a drill. A failed one is as complete as one that passed.
fn drill_events(state: &ProjectState, op: OperationId, drilled: &Drilled) -> Result<Vec<Event>, Refusal> {
    let Plan::Drill { branch, point, .. } = &running(state, op)?.plan else {
        return Err(Refusal::TooLate(format!("operation {op} is no drill")));
    };
    let (branch, point, report) = (*branch, point.clone(), drilled.report.clone());
    let found = match &drilled.fault {
        None => {
            // Only a checkpoint will be the same the next time.
            let rows = matches!(point, Point::Checkpoint(_)).then(|| drilled.rows.clone()).unwrap_or_default();
            Event::DrillPassed { branch, point, report, rows }
        }
        Some(fault) => Event::DrillFailed { branch, point, report, fault: fault.clone() },
    };
    // Of a branch that was deleted meanwhile there is nothing more to say.
    let found = state.branches.contains_key(&branch).then_some(found);
    Ok(found.into_iter().chain([Event::StepDone { step: Step::Verify, end: None }, Event::OperationDone]).collect())
}

/// A new head, if the layer is one.
fn sealed(branch: &Branch, id: BranchId, layer: Option<LayerId>, end: Option<Lsn>) -> Option<Event> {
    layer.filter(|layer| *layer != branch.head).map(|layer| Event::BranchSealed { branch: id, layer, end })
}

/// Where the WAL of a layer ends, if it is one of the branch's.
fn end_of(state: &ProjectState, branch: BranchId, layer: LayerId) -> Option<Lsn> {
    state.branches.get(&branch)?.history.seal_of(layer)?.end
}

/// The old head becomes the rescue branch, the branch goes on from the layer.
fn moved(
    held: Option<(BranchId, &Branch)>,
    branch: BranchId,
    to: &Point,
    layer: LayerId,
    replay: Option<(&Replay, Option<Lsn>)>,
    (old_head, old_end): (LayerId, Option<Lsn>),
    rescue: &Rescue,
) -> [Event; 2] {
    let (_, known) = held.expect("an operation's branch cannot go while it is held");
    let parent = Parent { branch: known.name.clone(), point: "head".to_owned() };
    let (left, end) = match (replay, known.history.seal_of(layer)) {
        (Some((replay, end)), _) => (Some(Left { line: replay.line, at: replay.to.lsn() }), end),
        (None, Some(seal)) => (Some(Left { line: seal.line, at: seal.end }), seal.end),
        (None, None) => (None, None),
    };
    [
        Event::BranchCreated {
            branch: rescue.branch,
            name: rescue.name.clone(),
            head: old_head,
            end: old_end.or_else(|| known.history.seal_of(old_head)?.end),
            parent: Some(parent),
            rescue_until: Some(rescue.until),
        },
        Event::BranchMoved { branch, head: layer, to: to.clone(), end, left },
    ]
}

#[cfg(test)]
mod tests;
