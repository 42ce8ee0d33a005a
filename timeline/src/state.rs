//! What a project is: the fold of its ledger. Pure; every assignment to a state machine goes through its `next`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use ebb_compute::control::Durability;
use ebb_types::{
    AllowList, BranchId, BranchName, CheckpointName, LayerId, Lsn, NodeId, OperationId, Point, ProjectId, ProjectName,
    ReleaseId, Timestamp, nearest,
};

use crate::api::types::Parent;
use crate::clients::Pinned;
use crate::deploy::{GoingBack, MigrationRun, Probed, Rehearsal};
use crate::drill::{Fault, Record, Report, SharedRecord, TableRows};
use crate::error::Refusal;
use crate::event::{Event, Key, Plan, Step};
use crate::history::{History, Seal};
use crate::ledger::{Entry, Fold};
use crate::machine::{Phase, PhaseEvent, ReleaseEvent, ReleaseStage};
use crate::upkeep::Upkeep;

mod releases;

/// LIMIT: idempotency keys remembered per project. A caller that retries does so within minutes; a thousand acts later
/// a key may be used anew.
const KEYS_MAX: usize = 1024;

/// LIMIT: how long a branch's past can be gone back to, unless it has a window of its own: as long as a rescue branch is
/// kept, for the same reason.
pub const WINDOW_DEFAULT_MS: u64 = 7 * 24 * 3600 * 1000;

/// LIMIT: drills remembered per branch, besides the last one of each checkpoint; all of them are in the ledger.
const DRILLS_MAX: usize = 32;

/// LIMIT: operations that were undone and are remembered: whoever carried one out, and was not the one who undid it, looks
/// soon.
const UNDONE_MAX: usize = 8;

/// A project as its ledger tells it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProjectState {
    /// What was fixed when it was made; `None` before the first entry.
    pub facts: Option<Facts>,
    /// Whether it was deleted.
    pub deleted: bool,
    /// The node that acts for it; `None` before the first has.
    pub owner: Option<Owner>,
    /// Its branches. Shared between versions of the state: each entry of the ledger makes one.
    pub branches: BTreeMap<BranchId, Arc<Branch>>,
    /// Its releases, oldest first.
    pub releases: Vec<Release>,
    /// The release whose code is the project's code.
    pub code: Option<ReleaseId>,
    /// Operations that are neither done nor undone.
    pub operations: BTreeMap<OperationId, Operation>,
    /// Why the newest operations that were undone were, oldest first.
    pub undone: VecDeque<(OperationId, Arc<str>)>,
    /// Acts that came with an idempotency key and were not undone, oldest first.
    pub keys: VecDeque<Arc<KeyUse>>,
    /// Rescue branches made so far, per branch: numbers are not used twice.
    pub rescues: BTreeMap<BranchId, u64>,
    /// Branches that were deleted: what a node still has of them may go. 16 bytes each, for ever.
    pub deleted_branches: BTreeSet<BranchId>,
    /// The newest rehearsals that were not part of a release, by what names their copies, oldest first.
    pub rehearsals: VecDeque<(BranchId, Arc<Rehearsal>)>,
}

/// The node that acts for a project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Which.
    pub node: NodeId,
    /// Counts owners, from 1: the fencing token of the one writer of each of its branches.
    pub epoch: u64,
    /// The number of the ledger's entry that made it the owner, or since which it goes on.
    pub entry: u64,
}

/// What never changes about a project.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Its identifier.
    pub id: ProjectId,
    /// Its name.
    pub name: ProjectName,
    /// Major version of its Postgres.
    pub pg_major: u32,
    /// The symlink its releases switch; `None`: the one in the node's data directory.
    pub current: Option<PathBuf>,
    /// Verifier of the owner role's first password.
    pub verifier: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A branch.
#[derive(Debug, Clone, PartialEq)]
pub struct Branch {
    /// Its name.
    pub name: BranchName,
    /// Its newest recorded seal.
    pub head: LayerId,
    /// Whether it has sealed its head itself; else the head is the image it was made from, or moved to.
    pub has_sealed: bool,
    /// Counts how often the branch was moved to another history. A volume knows for which line it was made; one of
    /// another line is stale, whatever it holds.
    pub line: u64,
    /// The number of the ledger's entry that began the line.
    pub line_entry: u64,
    /// Where it comes from.
    pub parent: Option<Parent>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Idle time after which its compute is suspended, if it has its own.
    pub idle_suspend_ms: Option<u64>,
    /// For a rescue branch: until when nothing may delete it.
    pub rescue_until: Option<Timestamp>,
    /// Its checkpoints, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// How long its past can be gone back to, if it has its own window.
    pub window_ms: Option<u64>,
    /// What its commits wait for.
    pub durability: Durability,
    /// What becomes of idle sessions that cannot be given back.
    pub pinned: Pinned,
    /// How many backends its clients in transaction mode share, if it has its own number.
    pub pool_size: Option<u32>,
    /// The seals within the window.
    pub history: History,
    /// What is done for it by itself.
    pub upkeep: Upkeep,
    /// From where clients may connect.
    pub allow: AllowList,
    /// Its newest drills, oldest first.
    pub drills: VecDeque<SharedRecord>,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Its name.
    pub name: CheckpointName,
    /// The layer it names.
    pub layer: LayerId,
    /// When it was made.
    pub created_at: Timestamp,
    /// End of WAL in it, where known.
    pub lsn: Option<Lsn>,
    /// The transaction number that was next, where known.
    pub next_xid: Option<u64>,
    /// Whether a schedule made it.
    pub automatic: bool,
    /// Its last drill.
    pub last_drill: Option<SharedRecord>,
    /// Rows of a sample of its tables, as its first drill that passed has counted them.
    pub rows: Option<Arc<[TableRows]>>,
}

/// A release.
#[derive(Debug, Clone, PartialEq)]
pub struct Release {
    /// Its identifier.
    pub id: ReleaseId,
    /// `v1`, `v2` ….
    pub name: String,
    /// BLAKE3 of its artifact, in hex.
    pub artifact: String,
    /// File names of its migrations, in order.
    pub migrations: Vec<String>,
    /// The checkpoint taken before it touched anything.
    pub checkpoint: CheckpointName,
    /// When it was begun.
    pub created_at: Timestamp,
    /// What has become of it.
    pub stage: ReleaseStage,
    /// Why it failed.
    pub fault: Option<String>,
    /// Whether its checkpoint was taken: before that it has touched nothing.
    pub checkpointed: bool,
    /// How many of the transactions since its checkpoint are its own, at least.
    pub transactions: u64,
    /// What its deploy found out.
    pub found: Arc<Found>,
}

/// What the deploy of a release found out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// How it fared on a copy.
    pub rehearsal: Option<Rehearsal>,
    /// How its migrations fared.
    pub runs: Vec<MigrationRun>,
    /// What its probes came to.
    pub probes: Vec<Probed>,
    /// The branch that its data was set aside to, when it was taken back by itself.
    pub rescue: Option<BranchName>,
}

/// An operation under way.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// What it does.
    pub plan: Plan,
    /// How far it has come.
    pub phase: Phase,
    /// Its steps that are done.
    pub done: Vec<Step>,
    /// A position that all WAL of what it replayed lies before, once that is done.
    pub replayed_end: Option<Lsn>,
    /// Who asked for it.
    pub actor: String,
    /// For a branch that is made from another: the allow list of that one when it was asked for. It counts if the source
    /// is gone before the branch is there.
    pub allow: AllowList,
    /// For a release that is taken back by itself: where to, and how many of its steps were done before.
    pub back: Option<(GoingBack, usize)>,
}

/// An idempotency key and what it stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyUse {
    /// The key and its request.
    pub key: Key,
    /// The operation it began.
    pub op: OperationId,
    /// What that does: the answer is found by it.
    pub plan: Plan,
}

impl Operation {
    /// The step to do next.
    pub fn next_step(&self) -> Option<Step> {
        match &self.back {
            Some((back, before)) => releases::steps_back(back).get(self.done.len() - before).copied(),
            None => self.plan.steps().get(self.done.len()).copied(),
        }
    }

    /// Whether no other step follows the next one.
    pub fn is_at_last_step(&self) -> bool {
        match &self.back {
            Some((back, before)) => self.done.len() + 1 - before == releases::steps_back(back).len(),
            None => self.done.len() + 1 == self.plan.steps().len(),
        }
    }
}

impl Branch {
    /// Whether what it wakes on is another branch's image, whose subscriptions and replication slots are not its own.
    pub fn is_fork(&self) -> bool {
        self.parent.is_some() && !self.has_sealed
    }

    /// Whether nothing was done on it since it was made.
    pub fn is_untouched(&self) -> bool {
        !self.has_sealed && self.line == 0 && self.checkpoints.is_empty()
    }

    /// How long its past can be gone back to.
    pub fn window(&self) -> jiff::SignedDuration {
        let ms = self.window_ms.unwrap_or(WINDOW_DEFAULT_MS);
        jiff::SignedDuration::from_millis(i64::try_from(ms).unwrap_or(i64::MAX))
    }

    /// The first moment of the window.
    pub fn window_start(&self, now: Timestamp) -> Timestamp {
        let start = now.saturating_sub(self.window()).unwrap_or(Timestamp::MIN);
        start.max(self.history.earliest().unwrap_or(now))
    }

    fn remember(&mut self, layer: LayerId, end: Option<Lsn>, at: Timestamp) {
        self.history.sealed(Seal { layer, at, end, line: self.line });
        self.forget(at);
    }

    fn forget(&mut self, now: Timestamp) {
        self.history.forget_before(now.saturating_sub(self.window()).unwrap_or(Timestamp::MIN));
    }

    /// Finds a checkpoint.
    ///
    /// # Errors
    /// With the nearest names, or the newest ones.
    pub fn checkpoint(&self, name: &str) -> Result<&Checkpoint, Refusal> {
        self.checkpoints.iter().find(|checkpoint| checkpoint.name.as_str() == name).ok_or_else(|| {
            let names = || self.checkpoints.iter().rev().map(|checkpoint| checkpoint.name.as_str());
            Refusal::NoCheckpoint {
                branch: self.name.clone(),
                name: name.to_owned(),
                near: near_or_newest(name, names),
            }
        })
    }
}

/// Names like the wanted one; if there are none, the newest few.
fn near_or_newest<'a, I: Iterator<Item = &'a str>>(wanted: &str, newest_first: impl Fn() -> I) -> Vec<String> {
    let mut near = nearest(wanted, newest_first());
    if near.is_empty() {
        near = newest_first().take(3).collect();
    }
    near.into_iter().map(str::to_owned).collect()
}

impl ProjectState {
    /// What was fixed when the project was made.
    ///
    /// # Errors
    /// If it was deleted.
    pub fn facts(&self) -> Result<&Facts, Refusal> {
        match &self.facts {
            Some(facts) if !self.deleted => Ok(facts),
            Some(facts) => Err(Refusal::NoProject { name: facts.name.to_string(), near: Vec::new() }),
            None => Err(Refusal::TooLate("the project has no ledger yet".to_owned())),
        }
    }

    /// Finds a branch by its name.
    ///
    /// # Errors
    /// With the nearest names.
    pub fn branch(&self, name: &str) -> Result<(BranchId, &Branch), Refusal> {
        let project = &self.facts()?.name;
        self.branches
            .iter()
            .find(|(_, branch)| branch.name.as_str() == name)
            .map(|(id, branch)| (*id, branch.as_ref()))
            .ok_or_else(|| {
                let near = nearest(name, self.branches.values().map(|branch| branch.name.as_str()));
                let near = near.into_iter().map(str::to_owned).collect();
                Refusal::NoBranch { project: project.clone(), name: name.to_owned(), near }
            })
    }

    /// The allow list that a new branch begins with.
    fn inherited(&self, entry: &Entry<Event>, parent: Option<&Parent>) -> AllowList {
        let operation = entry.op.and_then(|op| self.operations.get(&op));
        if let Some(Operation { plan: Plan::CreateBranch { source, .. }, allow, .. }) = operation {
            return self.branches.get(source).map_or(allow, |source| &source.allow).clone();
        }
        let source = parent.and_then(|parent| self.branches.values().find(|branch| branch.name == parent.branch));
        source.map(|source| source.allow.clone()).unwrap_or_default()
    }

    /// Finds a branch by its identifier.
    ///
    /// # Errors
    /// If it was deleted.
    pub fn branch_by_id(&self, id: BranchId) -> Result<&Branch, Refusal> {
        self.facts()?;
        self.branches.get(&id).map(Arc::as_ref).ok_or(Refusal::Gone(id))
    }

    /// Finds a release by its name.
    ///
    /// # Errors
    /// With the nearest names, or the newest ones.
    pub fn release(&self, name: &str) -> Result<&Release, Refusal> {
        let project = &self.facts()?.name;
        self.releases.iter().find(|release| release.name == name).ok_or_else(|| {
            let names = || self.releases.iter().rev().map(|release| release.name.as_str());
            Refusal::NoRelease { project: project.clone(), name: name.to_owned(), near: near_or_newest(name, names) }
        })
    }

    /// Finds a release by its identifier.
    pub fn release_by_id(&self, id: ReleaseId) -> Option<&Release> {
        self.releases.iter().find(|release| release.id == id)
    }

    /// The operation that holds a branch.
    pub fn holder(&self, branch: BranchId) -> Option<(OperationId, &Operation)> {
        self.operations
            .iter()
            .find(|(_, operation)| operation.plan.holds() == Some(branch))
            .map(|(id, operation)| (*id, operation))
    }

    /// What an idempotency key stands for.
    ///
    /// # Errors
    /// If it came with another request.
    pub fn key(&self, key: &Key) -> Result<Option<&KeyUse>, Refusal> {
        match self.keys.iter().find(|used| used.key.key == key.key) {
            Some(used) if used.key.request != key.request => Err(Refusal::KeyReused(key.key.clone())),
            used => Ok(used.map(Arc::as_ref)),
        }
    }

    /// Every layer that something keeps: heads, checkpoints, and where open operations go.
    pub fn layers(&self) -> BTreeSet<LayerId> {
        if self.deleted {
            return BTreeSet::new();
        }
        let of_branches = self.branches.values().flat_map(|branch| {
            let past = branch.history.seals().iter().map(|seal| seal.layer);
            branch.checkpoints.iter().map(|checkpoint| checkpoint.layer).chain(past).chain([branch.head])
        });
        let of_operations = self.operations.values().filter_map(|operation| match &operation.plan {
            plan if plan.replay().is_some() => plan.replay().map(|replay| replay.base),
            Plan::Restore { layer, .. } | Plan::Rollback { layer, .. } | Plan::Rehearse { layer, .. } => Some(*layer),
            Plan::Export { layer, .. } | Plan::Drill { layer, .. } => *layer,
            _ => None,
        });
        of_branches.chain(of_operations).collect()
    }

    /// The epoch of the owner; 0 before the first.
    pub fn epoch(&self) -> u64 {
        self.owner.map_or(0, |owner| owner.epoch)
    }

    fn branch_mut(&mut self, id: BranchId) -> Result<&mut Branch, String> {
        self.branches.get_mut(&id).map(Arc::make_mut).ok_or_else(|| format!("there is no branch {id}"))
    }

    fn release_mut(&mut self, id: ReleaseId) -> Result<&mut Release, String> {
        self.releases.iter_mut().find(|release| release.id == id).ok_or_else(|| format!("there is no release {id}"))
    }

    fn advance_release(&mut self, id: ReleaseId, event: ReleaseEvent) -> Result<&mut Release, String> {
        let release = self.release_mut(id)?;
        release.stage = release.stage.next(event).map_err(|illegal| illegal.to_string())?;
        Ok(release)
    }

    fn apply_event(&mut self, entry: &Entry<Event>, event: &Event) -> Result<(), String> {
        if self.deleted && !matches!(event, Event::OperationDone) {
            return Err("the project was deleted".to_owned());
        }
        match event {
            Event::ProjectCreated { project, name, pg_major, current, verifier } => {
                if self.facts.is_some() {
                    return Err("the project exists already".to_owned());
                }
                self.facts = Some(Facts {
                    id: *project,
                    name: name.clone(),
                    pg_major: *pg_major,
                    current: current.clone(),
                    verifier: verifier.clone(),
                    created_at: entry.time,
                });
            }
            Event::ProjectDeleted => self.deleted = true,
            Event::OwnerChanged { node, epoch } => {
                if *epoch != self.epoch() + 1 {
                    return Err(format!("epoch {epoch} does not follow {}", self.epoch()));
                }
                self.owner = Some(Owner { node: *node, epoch: *epoch, entry: entry.seq });
            }
            Event::OwnerKept { node } => match &mut self.owner {
                Some(owner) if owner.node == *node => owner.entry = entry.seq,
                owner => return Err(format!("{node} keeps what is {owner:?}'s")),
            },
            Event::BranchCreated { branch, name, head, end, parent, rescue_until } => {
                if self.branches.contains_key(branch) || self.branches.values().any(|other| other.name == *name) {
                    return Err(format!("branch {name:?} exists already"));
                }
                // Who may not see the source may not see a copy of it either.
                let allow = self.inherited(entry, parent.as_ref());
                let mut history = History::default();
                history.begun(Seal { layer: *head, at: entry.time, end: *end, line: 0 }, None);
                let made = Branch {
                    name: name.clone(),
                    head: *head,
                    has_sealed: false,
                    line: 0,
                    line_entry: entry.seq,
                    parent: parent.clone(),
                    created_at: entry.time,
                    idle_suspend_ms: None,
                    rescue_until: *rescue_until,
                    checkpoints: Vec::new(),
                    window_ms: None,
                    durability: Durability::default(),
                    pinned: Pinned::default(),
                    pool_size: None,
                    history,
                    upkeep: Upkeep::default(),
                    allow,
                    drills: VecDeque::new(),
                };
                self.branches.insert(*branch, Arc::new(made));
            }
            Event::BranchChanged {
                branch,
                idle_suspend_ms,
                window_ms,
                durability,
                upkeep,
                pinned,
                allow,
                pool_size,
            } => {
                let branch = self.branch_mut(*branch)?;
                branch.idle_suspend_ms = idle_suspend_ms.or(branch.idle_suspend_ms);
                branch.window_ms = window_ms.or(branch.window_ms);
                branch.durability = durability.unwrap_or(branch.durability);
                branch.upkeep.change(upkeep);
                if let Some(allow) = allow {
                    branch.allow = allow.clone();
                }
                branch.pinned = pinned.unwrap_or(branch.pinned);
                if let Some(size) = pool_size {
                    branch.pool_size = Some(*size).filter(|size| *size > 0);
                }
                branch.forget(entry.time);
            }
            Event::BranchSealed { branch, layer, end } => {
                let branch = self.branch_mut(*branch)?;
                branch.head = *layer;
                branch.has_sealed = true;
                branch.remember(*layer, *end, entry.time);
            }
            Event::BranchMoved { branch, head, end, left, .. } => {
                let branch_id = *branch;
                let branch = self.branch_mut(branch_id)?;
                branch.head = *head;
                branch.has_sealed = false;
                branch.line += 1;
                branch.line_entry = entry.seq;
                let seal = Seal { layer: *head, at: entry.time, end: *end, line: branch.line };
                branch.history.begun(seal, *left);
                branch.forget(entry.time);
                *self.rescues.entry(branch_id).or_default() += 1;
            }
            Event::BranchDeleted { branch } => {
                self.branches.remove(branch).ok_or_else(|| format!("there is no branch {branch}"))?;
                self.rescues.remove(branch);
                self.deleted_branches.insert(*branch);
            }
            Event::CheckpointCreated { branch, name, layer, lsn, next_xid, automatic } => {
                self.note_checkpoint_of_release(entry);
                let branch = self.branch_mut(*branch)?;
                if branch.checkpoints.iter().any(|other| other.name == *name) {
                    return Err(format!("checkpoint {name:?} exists already"));
                }
                branch.checkpoints.push(Checkpoint {
                    name: name.clone(),
                    layer: *layer,
                    created_at: entry.time,
                    lsn: *lsn,
                    next_xid: *next_xid,
                    automatic: *automatic,
                    last_drill: None,
                    rows: None,
                });
            }
            Event::CheckpointDeleted { branch, name } => {
                let checkpoints = &mut self.branch_mut(*branch)?.checkpoints;
                let before = checkpoints.len();
                checkpoints.retain(|checkpoint| checkpoint.name != *name);
                if checkpoints.len() == before {
                    return Err(format!("there is no checkpoint {name:?}"));
                }
            }
            Event::ReleaseBegun { release, name, artifact, migrations, checkpoint } => {
                if self.releases.iter().any(|other| other.id == *release || other.name == *name) {
                    return Err(format!("release {name:?} exists already"));
                }
                self.releases.push(Release {
                    id: *release,
                    name: name.clone(),
                    artifact: artifact.clone(),
                    migrations: migrations.clone(),
                    checkpoint: checkpoint.clone(),
                    created_at: entry.time,
                    stage: ReleaseStage::Deploying,
                    fault: None,
                    checkpointed: false,
                    transactions: 0,
                    found: Arc::default(),
                });
            }
            Event::ReleaseDeployed { release } => {
                self.advance_release(*release, ReleaseEvent::Deploy)?;
                self.code = Some(*release);
            }
            Event::ReleaseFailed { release, fault } => {
                self.advance_release(*release, ReleaseEvent::Fail)?.fault = Some(fault.clone());
            }
            Event::ReleasesRolledBack { to, releases } => {
                for release in releases {
                    self.advance_release(*release, ReleaseEvent::TakeBack)?;
                }
                self.code = Some(self.release_mut(*to)?.id);
            }
            Event::CodeRolledBack { .. }
            | Event::DataRolledBack { .. }
            | Event::ReleaseRehearsed { .. }
            | Event::ReleaseMigrated { .. }
            | Event::ReleaseProbed { .. }
            | Event::ReleaseGoesBack { .. }
            | Event::ReleaseStays { .. }
            | Event::ReleaseTakenBack { .. }
            | Event::Rehearsed { .. } => self.apply_deploy(entry, event)?,
            Event::DrillPassed { branch, report, rows, .. } => {
                self.drilled(entry, *branch, Drilled { report, rows, fault: None })?;
            }
            Event::DrillFailed { branch, report, fault, .. } => {
                self.drilled(entry, *branch, Drilled { report, rows: &[], fault: Some(fault) })?;
            }
            Event::OperationBegun { plan, key } => self.begin(entry, plan, key.as_ref())?,
            Event::StepDone { step, end } => {
                let (_, operation) = self.operation_of(entry)?;
                if operation.next_step() != Some(*step) {
                    return Err(format!("step {step:?} is not next"));
                }
                operation.done.push(*step);
                operation.replayed_end = end.or(operation.replayed_end);
                if matches!(step, Step::Record | Step::Switch) {
                    operation.phase =
                        operation.phase.next(PhaseEvent::Commit).map_err(|illegal| illegal.to_string())?;
                }
            }
            Event::OperationDone => drop(self.end(entry, PhaseEvent::Finish)?),
            Event::OperationUndone { why } => {
                let op = self.end(entry, PhaseEvent::Undo)?;
                if self.undone.len() == UNDONE_MAX {
                    self.undone.pop_front();
                }
                self.undone.push_back((op, why.as_str().into()));
                // An act that came to nothing does not use up its key: the caller may try again with it.
                self.keys.retain(|used| Some(used.op) != entry.op);
            }
        }
        Ok(())
    }

    fn drilled(&mut self, entry: &Entry<Event>, branch: BranchId, drilled: Drilled<'_>) -> Result<(), String> {
        let Plan::Drill { point, layer, scratch, .. } = self.operation_of(entry)?.1.plan.clone() else {
            return Err("a drill ends that is none".to_owned());
        };
        let branch = self.branch_mut(branch)?;
        let record = Arc::new(Record {
            scratch,
            at: entry.time,
            point,
            actor: entry.actor.clone(),
            report: drilled.report.clone(),
            fault: drilled.fault.cloned(),
        });
        // The name may stand for another layer by now.
        let of =
            |one: &&mut Checkpoint| Point::Checkpoint(one.name.clone()) == record.point && Some(one.layer) == layer;
        if let Some(checkpoint) = branch.checkpoints.iter_mut().find(of) {
            checkpoint.last_drill = Some(record.clone());
            if !drilled.rows.is_empty() {
                checkpoint.rows = Some(drilled.rows.into());
            }
        }
        if branch.drills.len() >= DRILLS_MAX {
            branch.drills.pop_front();
        }
        branch.drills.push_back(record);
        Ok(())
    }

    fn begin(&mut self, entry: &Entry<Event>, plan: &Plan, key: Option<&Key>) -> Result<(), String> {
        let op = entry.op.ok_or("an operation begins without an identifier")?;
        if self.operations.contains_key(&op) {
            return Err(format!("operation {op} has begun already"));
        }
        let source = match plan {
            Plan::CreateBranch { source, .. } => self.branches.get(source),
            _ => None,
        };
        let operation = Operation {
            plan: plan.clone(),
            phase: Phase::Begun,
            done: Vec::new(),
            replayed_end: None,
            actor: entry.actor.clone(),
            allow: source.map(|source| source.allow.clone()).unwrap_or_default(),
            back: None,
        };
        self.operations.insert(op, operation);
        if let Some(key) = key {
            if self.keys.len() >= KEYS_MAX {
                self.keys.pop_front();
            }
            self.keys.push_back(Arc::new(KeyUse { key: key.clone(), op, plan: plan.clone() }));
        }
        Ok(())
    }

    fn operation_of(&mut self, entry: &Entry<Event>) -> Result<(OperationId, &mut Operation), String> {
        let op = entry.op.ok_or("a step belongs to no operation")?;
        self.operations
            .get_mut(&op)
            .map(|operation| (op, operation))
            .ok_or_else(|| format!("operation {op} is not under way"))
    }

    fn end(&mut self, entry: &Entry<Event>, how: PhaseEvent) -> Result<OperationId, String> {
        let (op, operation) = self.operation_of(entry)?;
        operation.phase.next(how).map_err(|illegal| illegal.to_string())?;
        self.operations.remove(&op);
        Ok(op)
    }
}

/// What an entry says of a drill.
struct Drilled<'a> {
    report: &'a Report,
    rows: &'a [TableRows],
    fault: Option<&'a Fault>,
}

impl Fold for ProjectState {
    type Event = Event;

    fn apply(&mut self, entry: &Entry<Event>) -> Result<(), String> {
        if self.facts.is_none() && !entry.events.iter().any(|event| matches!(event, Event::ProjectCreated { .. })) {
            return Err("the first entry does not create a project".to_owned());
        }
        entry.events.iter().try_for_each(|event| self.apply_event(entry, event))
    }
}
