//! Carries operations out, step by step, each recorded; gives them up; takes them up again after a crash.
//!
//! ```text
//!   begin (entry: the whole plan) ─► step (effect, then entry) ─► … ─► last step's entry says done
//!                 │                      │ fails before the point of no return
//!                 │                      └─► undone (entry: why)
//!                 └─ replayed key: answered from the plan, nothing happens
//! ```
//!
//! What each act's steps are, and which one is its point of no return, stands at [`Plan::steps`].

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use ebb_compute::control::Durability;
use ebb_types::{BranchId, LayerId, Lsn, OperationId, Point, ReleaseId};

use super::compute::Fence;
use super::{Caller, Project, Service};
use crate::clients::Rest;
use crate::decide::{Ask, Command, Found, Fresh, decide};
use crate::event::{Event, Plan, Step};
use crate::machine::Phase;
use crate::migrate::Order;
use crate::node::{Line, Sealed, Start};
use crate::state::Operation;
use crate::{Error, Refusal, Result};

/// LIMIT: how long open transactions may go on before a restore or rollback ends them.
const FENCE_MAX: Duration = Duration::from_secs(10);

/// LIMIT: deleting a branch waits for nobody's transaction.
const DELETE_FENCE_MAX: Duration = Duration::from_millis(500);

/// LIMIT: steps after the point of no return fail only for want of disk or bucket; a few tries bridge a hiccup, the
/// reconciler goes on later.
const COMMITTED_TRIES: u32 = 3;

/// What became of an act.
#[derive(Debug, Clone)]
pub(super) struct Acted {
    /// Its plan: the answer is found by what is named in it.
    pub plan: Plan,
    /// `false`: the same request was carried out before.
    pub new: bool,
}

/// What whoever drives an operation has in hand.
#[derive(Default)]
pub(super) struct Under {
    /// The clients are set aside as long as this is there.
    pub fence: Option<Fence>,
    /// Transactions of migrations, the last of which failed.
    pub transactions: Option<u64>,
}

enum Begun {
    New { plan: Plan },
    Replay { op: OperationId, plan: Plan },
}

/// An operation is being driven as long as this lives.
#[derive(Debug)]
pub(super) struct Driven {
    project: Arc<Project>,
    op: OperationId,
}

impl Driven {
    pub(super) fn new(project: &Arc<Project>, op: OperationId) -> Self {
        *project.driven.lock().entry(op).or_default() += 1;
        Self { project: project.clone(), op }
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.project.driven.lock().entry(self.op) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

impl Service {
    /// Carries out an act, in a task of its own.
    pub(super) async fn act(self: &Arc<Self>, project: &Arc<Project>, caller: &Caller, ask: Ask) -> Result<Acted> {
        let (service, project, caller) = (self.clone(), project.clone(), caller.clone());
        self.tracked("the act", async move { service.act_here(&project, &caller, ask).await }).await
    }

    async fn act_here(self: &Arc<Self>, project: &Arc<Project>, caller: &Caller, ask: Ask) -> Result<Acted> {
        if let Some(replay) = self.replay_of(project, caller)? {
            return Ok(replay);
        }
        self.claim(project).await?;
        let _ops = match held_by(project, &ask)? {
            Some(branch) => Some(self.lock(&project.cell(branch)).await?),
            None => None,
        };
        if !matches!(ask, Ask::ShowUrl { .. } | Ask::DeleteBranch { .. } | Ask::DeleteCheckpoint { .. }) {
            self.check_disk()?;
        }
        let op = OperationId::generate();
        let _driven = Driven::new(project, op);
        let command = Command::Begin { ask, fresh: self.fresh(), key: caller.key.clone() };
        let begun = project
            .append(&caller.actor, Some(op), |state| {
                if let Some(key) = &caller.key
                    && let Some(used) = state.key(key)?
                {
                    return Ok((Vec::new(), Begun::Replay { op: used.op, plan: used.plan.clone() }));
                }
                let events = decide(state, &command)?;
                let plan = events.iter().find_map(|event| match event {
                    Event::OperationBegun { plan, .. } => Some(Plan::clone(plan)),
                    _ => None,
                });
                let plan = plan.ok_or(Error::Lost("the decision"))?;
                Ok((events, Begun::New { plan }))
            })
            .await?;
        match begun {
            Begun::Replay { op, plan } => self.replayed(project, caller, op, plan),
            Begun::New { plan } => {
                self.drive(project, op).await?;
                count(&plan, "done");
                Ok(Acted { plan, new: true })
            }
        }
    }

    /// The answer to a request that was carried out before.
    fn replay_of(&self, project: &Project, caller: &Caller) -> Result<Option<Acted>> {
        let state = project.ledger.state();
        let Some(key) = &caller.key else {
            return Ok(None);
        };
        match state.key(key)? {
            Some(used) => self.replayed(project, caller, used.op, used.plan.clone()).map(Some),
            None => Ok(None),
        }
    }

    fn replayed(&self, project: &Project, caller: &Caller, op: OperationId, plan: Plan) -> Result<Acted> {
        if project.ledger.state().operations.contains_key(&op) {
            let key = caller.key.as_ref().map(|key| key.key.clone()).unwrap_or_default();
            return Err(Refusal::StillRunning { key, operation: op.to_string() }.into());
        }
        Ok(Acted { plan, new: false })
    }

    pub(super) fn fresh(&self) -> Fresh {
        Fresh {
            now: self.clock.now(),
            branch: BranchId::generate(),
            layer: LayerId::generate(),
            release: ReleaseId::generate(),
            scratch: BranchId::generate(),
            replayed: LayerId::generate(),
        }
    }

    /// Carries an operation on to its end, with its branch's lock held.
    ///
    /// # Errors
    /// What made it fail. It is then undone; or, past its point of no return, left for the reconciler.
    pub(super) async fn drive(self: &Arc<Self>, project: &Arc<Project>, op: OperationId) -> Result<()> {
        let _driven = Driven::new(project, op);
        let mut under = Under::default();
        let (mut tries, mut went_well) = (0, false);
        loop {
            let state = project.ledger.state();
            let Some(operation) = state.operations.get(&op) else {
                // By another node, say, which took this one for dead.
                let undone = state.undone.iter().find(|(other, _)| *other == op && !went_well);
                if let Some((_, why)) = undone {
                    return Err(Refusal::TooLate(format!("it was undone meanwhile: {why}")).into());
                }
                break;
            };
            let Some(step) = operation.next_step() else {
                break;
            };
            let Err(error) = self.do_step(project, op, operation, step, &mut under).await else {
                (tries, went_well) = (0, true);
                continue;
            };
            (tries, went_well) = (tries + 1, false);
            match self.give_up(project, op, operation, error.chain(), &mut under).await {
                Ok(GaveUp::GoesBack) => tries = 0,
                Ok(GaveUp::Undone) => {
                    self.clean_up(&operation.plan).await;
                    self.clean_up_import(project, &operation.plan).await;
                    count(&operation.plan, "undone");
                    return Err(error);
                }
                // Past the point of no return (the entry may have been written although its append failed).
                Err(Error::Refused(_)) if tries < COMMITTED_TRIES => {}
                Err(Error::Refused(_)) => {
                    let act = operation.plan.act();
                    tracing::error!(%op, act, error = error.chain(), "an operation's last steps failed");
                    return Err(Error::Unfinished { act, operation: op, source: Box::new(error) });
                }
                // The bucket cannot be reached: the reconciler decides when it can.
                Err(_) => return Err(error),
            }
        }
        drop(under);
        self.changed.notify_one();
        self.layers_changed.notify_one();
        Ok(())
    }

    async fn do_step(
        self: &Arc<Self>,
        project: &Arc<Project>,
        op: OperationId,
        operation: &Operation,
        step: Step,
        under: &mut Under,
    ) -> Result<()> {
        match &operation.plan {
            Plan::Drill { .. } => return self.verify(project, op, operation).await,
            Plan::Rehearse { .. } => return self.rehearse_alone(project, op, operation).await,
            Plan::Release { described: Some(described), .. } => {
                let is_done = self.deploy_step(project, op, operation, described, under).await?;
                if is_done {
                    return Ok(());
                }
            }
            _ => {}
        }
        let found = self.perform(project, &operation.plan, step, &mut under.fence).await?;
        let command = Command::Step { op, step, found };
        project.append(&operation.actor, Some(op), |state| Ok((decide(state, &command)?, ()))).await?;
        if let (Some(branch), Some(_)) = (operation.plan.holds(), found.sealed) {
            self.settle(project, branch);
        }
        tracing::info!(%op, act = operation.plan.act(), ?step, "step done");
        Ok(())
    }

    /// Gives an operation up, or turns it back: what has begun to change the data of a release that says so.
    async fn give_up(
        self: &Arc<Self>,
        project: &Arc<Project>,
        op: OperationId,
        operation: &Operation,
        why: String,
        under: &mut Under,
    ) -> Result<GaveUp> {
        let why = match self.go_back(project, op, operation, why, under).await? {
            Ok(()) => return Ok(GaveUp::GoesBack),
            Err(why) => why,
        };
        self.undo(project, op, why).await?;
        Ok(GaveUp::Undone)
    }

    async fn undo(&self, project: &Project, op: OperationId, why: String) -> Result<()> {
        let command = Command::Undo { op, why };
        project.append("ebb", Some(op), |state| Ok((decide(state, &command)?, ()))).await
    }

    /// Removes what an operation that was given up, or is done, used besides the branches.
    async fn clean_up(&self, plan: &Plan) {
        if let Plan::Drill { scratch, .. } = plan {
            return self.end_drill(*scratch).await;
        }
        let Some(scratch) = plan.scratch() else { return };
        let removed = async {
            self.node.discard(scratch).await?;
            self.node.remove_branch(scratch).await?;
            match plan {
                Plan::Export { dump: Some(_), dir, .. } => crate::node::remove_unfinished_dump(dir),
                _ => Ok(()),
            }
        };
        if let Err(error) = removed.await {
            self.report("removing what an operation used", &error);
        }
    }

    /// The effect of one step. Done twice, it is as if done once.
    async fn perform(
        self: &Arc<Self>,
        project: &Arc<Project>,
        plan: &Plan,
        step: Step,
        fence: &mut Option<Fence>,
    ) -> Result<Found> {
        let mut found = Found::default();
        match (plan, step) {
            (plan, Step::Replay) => found.end = self.replay(project, plan).await?,
            (Plan::CreateBranch { replay: Some(_), .. }, Step::Record) => self.clean_up(plan).await,
            (Plan::CreateBranch { source: branch, seal, .. }, Step::Record) => {
                found.take(self.seal_locked(project, *branch, *seal).await?);
            }
            (Plan::CreateCheckpoint { branch, seal, .. }, Step::Record) => {
                found.take(self.seal_locked(project, *branch, *seal).await?);
                found.lsn = self.end_of_wal(project, *branch, found.sealed).await?;
            }
            (Plan::Suspend { branch, seal }, Step::Record) => {
                let rest = project.ledger.state().branch_by_id(*branch)?.pinned.rest();
                let (held, sealed) = self.stop_locked(project, *branch, *seal, FENCE_MAX, rest).await?;
                *fence = Some(held);
                found.take(sealed);
            }
            (Plan::DeleteBranch { branch, rule: Some(_) }, Step::Switch) if !self.was_never_awake(project, *branch) => {
                return Err(Refusal::TooLate(format!("branch {branch} was woken meanwhile")).into());
            }
            (Plan::DeleteBranch { branch, .. }, Step::Switch) => {
                *fence = Some(self.fence(project, *branch, DELETE_FENCE_MAX, Rest::End).await?);
                self.discard_locked(project, *branch).await?;
            }
            (Plan::DeleteBranch { branch, .. }, Step::Sweep) => {
                self.node.discard(*branch).await?;
                self.node.remove_branch(*branch).await?;
                project.cells.lock().remove(branch);
            }
            (Plan::Rollback { branch, part, layer, seal, artifact, .. }, Step::Switch) => {
                if part.has_code() {
                    self.artifacts.ensure_local(artifact).await?;
                    crate::files::may_be_switched(&self.current_link(project)?)?;
                }
                if part.has_data() {
                    found.take(self.set_aside(project, *branch, *layer, *seal, fence).await?);
                }
            }
            (Plan::Restore { branch, layer, seal, .. }, Step::Switch) => {
                found.take(self.set_aside(project, *branch, *layer, *seal, fence).await?);
            }
            (
                plan @ (Plan::Restore { branch, .. } | Plan::Rollback { branch, .. } | Plan::Release { branch, .. }),
                Step::Sweep,
            ) => {
                self.clean_up(plan).await;
                // Nobody attached a compute to the old volume: its line is stale since the switch.
                self.discard_locked(project, *branch).await?;
                self.node.remove_volume(*branch).await?;
            }
            (Plan::Release { .. } | Plan::Rollback { .. }, Step::Code) => self.activate(project).await?,
            (Plan::Release { branch, seal, .. }, Step::Checkpoint) => {
                self.wake_locked(project, *branch, &project.cell(*branch)).await?;
                found = self.node.positions(*branch).await?;
                found.take(self.seal_locked(project, *branch, *seal).await?);
            }
            (Plan::Release { branch, artifact, name, .. }, Step::Migrate) => {
                self.wake_locked(project, *branch, &project.cell(*branch)).await?;
                let migrations = self.artifacts.migrations(artifact, crate::artifact::MIGRATIONS_DIR).await?;
                let migrated = self.node.migrate(*branch, &Order::new(name, migrations)).await?;
                if let Some(fault) = migrated.fault {
                    return Err(fault);
                }
            }
            (Plan::Release { artifact, .. }, Step::Switch) => {
                self.artifacts.ensure_local(artifact).await?;
                crate::files::may_be_switched(&self.current_link(project)?)?;
            }
            (Plan::Wake { branch }, Step::Start) => {
                self.wake_locked(project, *branch, &project.cell(*branch)).await?;
            }
            (Plan::Export { branch, layer, replay, dir, dump: Some(dump), .. }, Step::Write) => {
                let layer = layer.or(replay.as_ref().map(|replay| replay.layer));
                let head = layer.unwrap_or(project.line(*branch)?.head);
                let like = self.beside(project, dump.scratch, head)?;
                self.node.dump(dump, &like, dir).await?;
                self.clean_up(plan).await;
            }
            (Plan::Export { branch, layer, seal, dir, replay, .. }, Step::Write) => {
                let layer = match layer.or(replay.as_ref().map(|replay| replay.layer)) {
                    Some(layer) => layer,
                    None => {
                        found.take(self.seal_locked(project, *branch, *seal).await?);
                        found.sealed.unwrap_or(project.line(*branch)?.head)
                    }
                };
                self.node.export(layer, dir).await?;
                self.clean_up(plan).await;
            }
            (Plan::Import { scratch, .. }, step) => found.end = self.import_step(*scratch, step).await?,
            (plan, step) => {
                let what = format!("operation {:?} has no step {step:?}", plan.act());
                return Err(Refusal::TooLate(what).into());
            }
        }
        Ok(found)
    }

    /// How a compute is started that nobody else knows of, on a copy of an image.
    pub(super) fn beside(&self, project: &Project, scratch: BranchId, head: LayerId) -> Result<Start> {
        let state = project.ledger.state();
        let facts = state.facts()?;
        Ok(Start {
            data: Line { branch: scratch, line: 0, head, epoch: 0 },
            pg_major: facts.pg_major,
            head_end: None,
            earlier: Vec::new(),
            begun_here: true,
            fork: true,
            durability: Durability::Local,
            verifier: facts.verifier.clone(),
        })
    }

    /// Makes the image of a moment between seals.
    async fn replay(&self, project: &Project, plan: &Plan) -> Result<Option<Lsn>> {
        let replay = plan.replay().ok_or_else(|| Refusal::TooLate(format!("{:?} replays nothing", plan.act())))?;
        let like = {
            let state = project.ledger.state();
            let facts = state.facts()?;
            let data = Line { branch: replay.scratch, line: 0, head: replay.base, epoch: state.epoch() };
            // What a restore brings back is the branch itself; everything else is a copy beside it.
            let fork = !matches!(plan, Plan::Restore { .. }) || state.branch_by_id(replay.branch)?.parent.is_some();
            let durability = Durability::Local;
            let verifier = facts.verifier.clone();
            Start {
                data,
                pg_major: facts.pg_major,
                head_end: replay.base_end,
                earlier: Vec::new(),
                begun_here: true,
                fork,
                durability,
                verifier,
            }
        };
        if project.line(replay.branch)?.line == replay.line && self.is_awake(project, replay.branch) {
            self.node.ship(replay.branch).await?;
        }
        self.node.replay(replay, &like).await
    }

    /// Holds the clients, stops and seals the old head; what comes back is brought to this node first, so that the
    /// pause is short.
    async fn set_aside(
        &self,
        project: &Project,
        branch: BranchId,
        layer: LayerId,
        seal: LayerId,
        fence: &mut Option<Fence>,
    ) -> Result<Option<Sealed>> {
        self.node.fetch(layer).await?;
        let (held, sealed) = self.stop_locked(project, branch, seal, FENCE_MAX, Rest::End).await?;
        *fence = Some(held);
        Ok(sealed)
    }

    /// Brings every operation that nobody carries out to its end: forward past its point of no return, else undone.
    /// What fails is tried again later.
    pub(super) async fn recover(self: &Arc<Self>) {
        self.recover_catalog().await;
        for project in self.own_projects() {
            self.recover_project(&project).await;
        }
        self.take_over_unfinished().await;
    }

    pub(super) async fn recover_project(self: &Arc<Self>, project: &Arc<Project>) {
        if let Err(error) = project.ledger.settle().await {
            return self.report("reading a ledger", &error);
        }
        for (op, operation) in &project.ledger.state().operations {
            if project.driven.lock().contains_key(op) {
                continue;
            }
            if let Err(error) = self.recover_one(project, *op, operation).await {
                self.report("recovering an operation", &error);
            }
            self.delete_if_never_made(project).await;
        }
    }

    async fn recover_one(
        self: &Arc<Self>,
        project: &Arc<Project>,
        op: OperationId,
        operation: &Operation,
    ) -> Result<()> {
        let _ops = match operation.plan.holds() {
            Some(branch) => match project.cell(branch).ops.clone().try_lock_owned() {
                Ok(guard) => Some(guard),
                // Somebody works on the branch; there is a next time.
                Err(_) => return Ok(()),
            },
            None => None,
        };
        // Whoever carried it out may have ended it before the lock was free.
        let state = project.ledger.state();
        let Some(operation) = state.operations.get(&op).filter(|_| !project.driven.lock().contains_key(&op)) else {
            return Ok(());
        };
        let act = operation.plan.act();
        if operation.phase == Phase::Committed {
            self.drive(project, op).await?;
            count(&operation.plan, "done");
            tracing::info!(%op, act, "an interrupted operation was finished");
        } else {
            let why = "it was interrupted before it took effect".to_owned();
            if let GaveUp::GoesBack = self.give_up(project, op, operation, why, &mut Under::default()).await? {
                self.drive(project, op).await?;
                tracing::info!(%op, act, "an interrupted operation was taken back");
                return Ok(());
            }
            self.clean_up(&operation.plan).await;
            self.clean_up_import(project, &operation.plan).await;
            count(&operation.plan, "undone");
            tracing::info!(%op, act, "an interrupted operation was undone");
        }
        Ok(())
    }
}

/// What became of an operation that failed before its point of no return.
enum GaveUp {
    Undone,
    GoesBack,
}

/// The branch whose lock an act needs.
fn held_by(project: &Project, ask: &Ask) -> Result<Option<BranchId>> {
    let state = project.ledger.state();
    let name = match ask {
        // See `Plan::holds`.
        Ask::CreateBranch { point: Point::Lsn(_) | Point::Time(_), .. } | Ask::Export { dump: Some(_), .. } => {
            return Ok(None);
        }
        Ask::CreateBranch { from, .. } => from.as_str(),
        Ask::DeleteBranch { branch, .. }
        | Ask::CreateCheckpoint { branch, .. }
        | Ask::DeleteCheckpoint { branch, .. }
        | Ask::Restore { branch, .. }
        | Ask::Suspend { branch }
        | Ask::Wake { branch }
        | Ask::Export { branch, .. } => branch.as_str(),
        Ask::Release { .. } | Ask::Rollback { .. } => crate::decide::PROD,
        Ask::ChangeBranch { .. }
        | Ask::Drill { .. }
        | Ask::Rehearse { .. }
        | Ask::ShowUrl { .. }
        | Ask::Import { .. } => return Ok(None),
    };
    Ok(Some(state.branch(name)?.0))
}

pub(super) fn count(plan: &Plan, result: &'static str) {
    metrics::counter!("ebb_timeline_operations_total", "act" => plan.act(), "result" => result).increment(1);
}
