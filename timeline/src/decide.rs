//! What may happen: `decide(state, command)` answers the events that carry a command out, or why it is refused.
//!
//! Pure: identifiers and the time come with the command. What a command needs to know of the world outside the ledger
//! (which layer a seal made, say) comes with it, too.

use ebb_types::{BranchId, BranchName, CheckpointName, LayerId, Lsn, OperationId, Point, ReleaseId, Timestamp};

use crate::api::types::{Parent, SetAside};
use crate::error::Refusal;
use crate::event::{Event, Key, Plan, Rescue, Step};
use crate::machine::ReleaseStage;
use crate::state::{Branch, Operation, ProjectState, Release};

/// The branch that releases go to; it cannot be deleted.
pub const PROD: &str = "prod";

/// LIMIT: a week is long enough to notice on Monday what went wrong on Friday, and to decide.
const RESCUE_DAYS: i64 = 7;

/// LIMIT: shorter than this and a compute would be suspended between two statements of one client.
const IDLE_SUSPEND_MIN_MS: u64 = 100;

/// LIMIT: a compute that shall stay awake for a year needs no suspension; more is a mistake in the unit.
const IDLE_SUSPEND_MAX_MS: u64 = 366 * 24 * 3600 * 1000;

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
        /// Idle time after which its compute is suspended.
        idle_suspend_ms: u64,
    },
    /// A branch less.
    DeleteBranch {
        /// Which.
        branch: String,
    },
    /// A name for the head.
    CreateCheckpoint {
        /// Of which branch.
        branch: String,
        /// The name.
        name: CheckpointName,
    },
    /// A name less.
    DeleteCheckpoint {
        /// Of which branch.
        branch: String,
        /// The name.
        name: String,
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
    },
    /// Code and data back to a release.
    Rollback {
        /// Its name.
        to: String,
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
    },
    /// A connection URL with its password.
    ShowUrl {
        /// Of which branch.
        branch: String,
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
}

/// What a step found or made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// The layer that holds the head, if there was a volume to seal.
    pub sealed: Option<LayerId>,
    /// End of WAL in it, where known.
    pub lsn: Option<Lsn>,
    /// The next transaction number, where known.
    pub next_xid: Option<u64>,
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
            Ok(step_events(state, operation, *step, *found))
        }
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
        Command::Sealed { branch, line, layer } => {
            let known = state.branch_by_id(*branch)?;
            if known.line != *line {
                return Err(Refusal::TooLate(format!("branch {:?} was moved meanwhile", known.name)));
            }
            Ok(sealed(known, *branch, Some(*layer)).into_iter().collect())
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
            let layer = layer_at(branch, point)?;
            if layer.is_none() {
                free(state, source)?;
            }
            let parent = Parent { branch: branch.name.clone(), point: point.to_string() };
            Ok(Plan::CreateBranch { branch: fresh.branch, name: name.clone(), source, parent, layer, seal })
        }
        Ask::ChangeBranch { branch, idle_suspend_ms } => {
            if !(IDLE_SUSPEND_MIN_MS..=IDLE_SUSPEND_MAX_MS).contains(idle_suspend_ms) {
                let fault = "idle_suspend_seconds must be at least 0.1 and at most a year";
                return Err(Refusal::Invalid(fault.to_owned()));
            }
            Ok(Plan::ChangeBranch { branch: state.branch(branch)?.0 })
        }
        Ask::DeleteBranch { branch } => {
            let (id, branch) = state.branch(branch)?;
            may_be_deleted(branch, fresh.now)?;
            free(state, id)?;
            Ok(Plan::DeleteBranch { branch: id })
        }
        Ask::CreateCheckpoint { branch, name } => {
            let (id, branch) = state.branch(branch)?;
            if branch.checkpoints.iter().any(|other| other.name == *name) {
                return Err(Refusal::Taken { kind: "checkpoint", name: name.to_string() });
            }
            free(state, id)?;
            Ok(Plan::CreateCheckpoint { branch: id, name: name.clone(), seal })
        }
        Ask::DeleteCheckpoint { branch, name } => {
            let (id, branch) = state.branch(branch)?;
            let name = branch.checkpoint(name)?.name.clone();
            let needs = |release: &&Release| release.checkpoint == name && release.stage != ReleaseStage::RolledBack;
            if branch.name.as_str() == PROD
                && let Some(release) = state.releases.iter().find(needs)
            {
                return Err(Refusal::CheckpointKept { checkpoint: name, release: release.name.clone() });
            }
            free(state, id)?;
            Ok(Plan::DeleteCheckpoint { branch: id, name })
        }
        Ask::Restore { branch, to } => {
            let (id, branch) = state.branch(branch)?;
            let Point::Checkpoint(to) = to else {
                layer_at(branch, to)?;
                return Err(Refusal::Invalid("restoring a branch to its own head changes nothing".to_owned()));
            };
            let layer = branch.checkpoint(to.as_str())?.layer;
            free(state, id)?;
            Ok(Plan::Restore { branch: id, to: to.clone(), layer, seal, rescue: rescue(state, id, branch, fresh) })
        }
        Ask::Release { artifact, .. } => {
            let (branch, prod) = state.branch(PROD)?;
            free(state, branch)?;
            let name = format!("v{}", state.releases.len() + 1);
            let checkpoint = free_checkpoint_name(prod, &format!("before-{name}"));
            Ok(Plan::Release { release: fresh.release, name, branch, artifact: artifact.clone(), checkpoint, seal })
        }
        Ask::Rollback { to, lsn, next_xid, layers } => {
            let now = Found { sealed: None, lsn: *lsn, next_xid: *next_xid };
            plan_rollback(state, to, now, *layers, fresh)
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
        Ask::Export { branch, point, dir } => {
            let (id, branch) = state.branch(branch)?;
            let layer = layer_at(branch, point)?;
            let point = match point {
                Point::Checkpoint(name) => Some(name.clone()),
                _ => None,
            };
            free(state, id)?;
            Ok(Plan::Export { branch: id, point, layer, seal, dir: dir.clone() })
        }
        Ask::ShowUrl { branch } => Ok(Plan::ShowUrl { branch: state.branch(branch)?.0 }),
    }
}

/// What must be true of a release to go back to it, and what then happens.
///
/// "Back to v1" means: `v1`'s code, and the data as it was just before the release after `v1` touched anything. That is
/// the checkpoint of the first release since (failed ones included: their earlier migrations may have been applied)
/// that was not itself taken back.
fn plan_rollback(state: &ProjectState, to: &str, now: Found, layers: u64, fresh: &Fresh) -> Result<Plan, Refusal> {
    let (branch, prod) = state.branch(PROD)?;
    let target = state.release(to)?;
    let no_way = |why: &str, advice: String| {
        Err(Refusal::NoWayBack { release: target.name.clone(), why: why.to_owned(), advice })
    };
    match target.stage {
        ReleaseStage::Deployed => {}
        ReleaseStage::Deploying => return no_way("it is being deployed", "Wait until it is done.".to_owned()),
        ReleaseStage::Failed => {
            let advice = format!(
                "Go back to the release before it, or restore the data alone: ebb branch restore PROJECT/prod --to {}.",
                target.checkpoint
            );
            return no_way("it failed and never was in service", advice);
        }
        ReleaseStage::RolledBack => {
            let advice =
                "Its data is on a rescue branch of prod; deploy its artifact again to have its code.".to_owned();
            return no_way("it was taken back itself", advice);
        }
    }
    let releases: Vec<&Release> = state
        .releases
        .iter()
        .skip_while(|release| release.id != target.id)
        .skip(1)
        .filter(|release| release.stage != ReleaseStage::RolledBack)
        .collect();
    let Some(next) = releases.first() else {
        let advice = format!(
            "Nothing was deployed after it. To take back the data alone: ebb branch restore PROJECT/prod --to {}.",
            target.checkpoint
        );
        return no_way("it is the latest release", advice);
    };
    let checkpoint = prod.checkpoint(next.checkpoint.as_str())?;
    free(state, branch)?;
    let since = |now: Option<u64>, then: Option<u64>| now.zip(then).and_then(|(now, then)| now.checked_sub(then));
    let set_aside = SetAside {
        transactions: since(now.next_xid, checkpoint.next_xid),
        wal_bytes: since(now.lsn.map(|lsn| lsn.0), checkpoint.lsn.map(|lsn| lsn.0)),
        releases: releases.iter().map(|release| release.name.clone()).collect(),
        layers,
        since: checkpoint.created_at,
    };
    Ok(Plan::Rollback {
        branch,
        to: target.id,
        artifact: target.artifact.clone(),
        releases: releases.iter().map(|release| release.id).collect(),
        code_from: state.code.and_then(|code| state.release_by_id(code)).map(|release| release.artifact.clone()),
        set_aside,
        checkpoint: checkpoint.name.clone(),
        layer: checkpoint.layer,
        seal: fresh.layer,
        rescue: rescue(state, branch, prod, fresh),
    })
}

/// The layer of a point; `None` for the head, which may have to be sealed first.
fn layer_at(branch: &Branch, point: &Point) -> Result<Option<LayerId>, Refusal> {
    match point {
        Point::Head => Ok(None),
        Point::Checkpoint(name) => branch.checkpoint(name.as_str()).map(|checkpoint| Some(checkpoint.layer)),
        Point::Lsn(_) | Point::Time(_) => Err(Refusal::NoSuchKindOfPoint {
            point: point.to_string(),
            checkpoints: branch.checkpoints.iter().rev().map(|checkpoint| checkpoint.name.clone()).collect(),
        }),
    }
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
        (Plan::CreateBranch { branch, name, parent, layer: Some(layer), .. }, _) => events.push(Event::BranchCreated {
            branch: *branch,
            name: name.clone(),
            head: *layer,
            parent: Some(parent.clone()),
            rescue_until: None,
        }),
        (Plan::ChangeBranch { branch }, Ask::ChangeBranch { idle_suspend_ms, .. }) => {
            events.push(Event::BranchChanged { branch: *branch, idle_suspend_ms: *idle_suspend_ms });
        }
        (Plan::DeleteCheckpoint { branch, name }, _) => {
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
        events.extend(sealed(branch, id, found.sealed));
    }
    let head = found.sealed.or_else(|| held.map(|(_, branch)| branch.head));
    match (plan, step, head) {
        (Plan::CreateBranch { branch, name, parent, .. }, Step::Record, Some(head)) => {
            let (branch, name, parent) = (*branch, name.clone(), Some(parent.clone()));
            events.push(Event::BranchCreated { branch, name, head, parent, rescue_until: None });
        }
        (Plan::CreateCheckpoint { branch, name, .. }, Step::Record, Some(layer)) => {
            events.push(checkpoint_created(*branch, name, layer, found));
        }
        (Plan::Release { branch, checkpoint, .. }, Step::Checkpoint, Some(layer)) => {
            events.push(checkpoint_created(*branch, checkpoint, layer, found));
        }
        (Plan::Release { release, .. }, Step::Switch, _) => events.push(Event::ReleaseDeployed { release: *release }),
        (Plan::DeleteBranch { branch }, Step::Switch, _) => {
            // What the volume held is not wanted any more: no seal, no new head.
            events.clear();
            events.push(Event::BranchDeleted { branch: *branch });
        }
        (Plan::Restore { branch, to, layer, rescue, .. }, Step::Switch, Some(head)) => {
            events.extend(moved(held, *branch, to, *layer, head, rescue));
        }
        (Plan::Rollback { branch, to, releases, checkpoint, layer, rescue, .. }, Step::Switch, Some(head)) => {
            events.extend(moved(held, *branch, checkpoint, *layer, head, rescue));
            events.push(Event::ReleasesRolledBack { to: *to, releases: releases.clone() });
        }
        _ => {}
    }
    events.push(Event::StepDone { step });
    if operation.done.len() + 1 == plan.steps().len() {
        events.push(Event::OperationDone);
    }
    events
}

fn checkpoint_created(branch: BranchId, name: &CheckpointName, layer: LayerId, found: Found) -> Event {
    Event::CheckpointCreated { branch, name: name.clone(), layer, lsn: found.lsn, next_xid: found.next_xid }
}

/// A new head, if the layer is one.
fn sealed(branch: &Branch, id: BranchId, layer: Option<LayerId>) -> Option<Event> {
    layer.filter(|layer| *layer != branch.head).map(|layer| Event::BranchSealed { branch: id, layer })
}

/// The old head becomes the rescue branch, the branch goes on from the layer.
fn moved(
    held: Option<(BranchId, &Branch)>,
    branch: BranchId,
    to: &CheckpointName,
    layer: LayerId,
    old_head: LayerId,
    rescue: &Rescue,
) -> [Event; 2] {
    let (_, known) = held.expect("an operation's branch cannot go while it is held");
    let parent = Parent { branch: known.name.clone(), point: "head".to_owned() };
    [
        Event::BranchCreated {
            branch: rescue.branch,
            name: rescue.name.clone(),
            head: old_head,
            parent: Some(parent),
            rescue_until: Some(rescue.until),
        },
        Event::BranchMoved { branch, head: layer, to: to.clone() },
    ]
}

#[cfg(test)]
mod tests;
