//! Drills: a point restored out of the bucket alone, on this machine but beside everything on it, and checked.
//!
//! A drill is an operation of one step. Whatever it finds is recorded as its end, passed or failed; only one that was cut
//! off is undone, and leaves no word about the point. It holds no branch: it reads what nothing may change, which the
//! operation itself keeps from being collected.
//!
//! **Crash.** The next start removes what is left ([`crate::node::drill::Drills::end_drills`]), and undoes the operation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_compute::control::Durability;
use ebb_types::{BranchId, BranchRef, EndpointName, ErrorKind, LayerId, OperationId, Point, PointRef};

use super::branches::{other_act, parse_point};
use super::views::drill_view;
use super::{Answer, Caller, Project, Service};
use crate::api::types as api;
use crate::catalog::{CATALOG, CatalogEvent, ledger_name};
use crate::decide::{Ask, Command, decide};
use crate::drill::{Check, CheckName, Drilled, Fault, Outcome};
use crate::event::{Event, Plan};
use crate::ledger::{Fold as _, read_chain};
use crate::node::drill::Order;
use crate::node::{Line, Start};
use crate::state::{Operation, ProjectState};
use crate::{Error, Refusal, Result};

/// LIMIT: so long a list of checkpoints waits for their sizes; a bucket that is away must not hide the rest.
const SIZES_WITHIN: Duration = Duration::from_secs(2);

impl Service {
    /// Restores a point out of the bucket alone, and checks it.
    ///
    /// # Errors
    /// [`Error::Drill`] if it cannot be restored, or is not what it should be: that is recorded, too.
    pub async fn drill(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        branch: &str,
        request: api::DrillBranch,
    ) -> Result<Answer<api::Drill>> {
        let project = self.project(project)?;
        let point = request.point.as_deref().map_or(Ok(Point::Head), parse_point)?;
        let ask = Ask::Drill { branch: branch.to_owned(), point, probes: request.probes };
        let acted = self.act(&project, caller, ask).await?;
        let Plan::Drill { branch, point, scratch, .. } = acted.plan else { return Err(other_act(&acted.plan)) };
        let state = project.ledger.state();
        let known = state.branch_by_id(branch)?;
        let found = known.drills.iter().rev().find(|record| record.scratch == scratch);
        let Some(record) = found else {
            // So long ago that only the ledger knows.
            return Err(Refusal::TooLate("the drill is over; its receipts are in the ledger".to_owned()).into());
        };
        match &record.fault {
            None => Ok(Answer { value: drill_view(known, record), new: acted.new }),
            Some(fault) => {
                let at = BranchRef { project: project.name.clone(), branch: known.name.clone() };
                let (point, fault, kind) = (PointRef { at, point }.to_string(), fault.what.clone(), fault.kind);
                Err(Error::Drill { point, fault, kind })
            }
        }
    }

    /// The newest drills of a branch, oldest first.
    ///
    /// # Errors
    /// If there is no such branch.
    pub async fn drills(&self, project: &str, branch: &str) -> Result<Vec<api::Drill>> {
        let state = self.project(project)?.ledger.state();
        let (_, branch) = state.branch(branch)?;
        Ok(branch.drills.iter().map(|record| drill_view(branch, record)).collect())
    }

    /// The one step of a drill: carries it out, removes all that it used, and records what came of it.
    ///
    /// # Errors
    /// Only if there is nothing to say about the point: the service stops, or the record cannot be made.
    pub(super) async fn verify(&self, project: &Arc<Project>, op: OperationId, operation: &Operation) -> Result<()> {
        let Plan::Drill { branch, point, scratch, .. } = &operation.plan else {
            return Err(Refusal::TooLate(format!("operation {op} is no drill")).into());
        };
        let drilled = tokio::select! {
            drilled = self.drill_in_turn(project, &operation.plan) => drilled,
            () = self.stopping.cancelled() => return Err(Error::Stopping),
        };
        self.end_drill(*scratch).await;
        let state = project.ledger.state();
        let name = state.branches.get(branch).map(|known| known.name.clone());
        if let Some(name) = name {
            let at = BranchRef { project: project.name.clone(), branch: name };
            tell(&PointRef { at, point: point.clone() }, &drilled);
        }
        let command = Command::Drilled { op, drilled };
        project.append(&operation.actor, Some(op), |state| Ok((decide(state, &command)?, ()))).await
    }

    /// Removes all that a drill used.
    pub(super) async fn end_drill(&self, scratch: BranchId) {
        if let Err(error) = self.node.end_drill(scratch).await {
            self.report("removing what a drill used", &error);
        }
    }

    async fn drill_in_turn(&self, project: &Arc<Project>, plan: &Plan) -> Drilled {
        let _turn = self.drilling.lock().await;
        let began = Instant::now();
        let ready = self.prepare(project, plan).await;
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut ledger = Check { check: CheckName::Ledger, outcome: Outcome::Passed, what: String::new(), ms };
        let mut drilled = match ready {
            Ok((order, entries)) => {
                ledger.what = format!("{entries} entries");
                self.node.drill(&order).await
            }
            Err(error) => {
                (ledger.what, ledger.outcome) = (error.chain(), Outcome::Failed);
                let fault = Some(Fault { what: error.chain(), kind: error.kind() });
                Drilled { fault, ..Drilled::default() }
            }
        };
        drilled.report.checks.insert(0, ledger);
        drilled.report.total_ms += ms;
        drilled
    }

    /// Brings to the bucket what is still on its way there, and reads there what is to be restored; and how many entries
    /// that took.
    async fn prepare(&self, project: &Arc<Project>, plan: &Plan) -> Result<(Order, usize)> {
        let Plan::Drill { branch, point, replay, scratch, probes, .. } = plan else { return Err(other_act(plan)) };
        let current = project.line(*branch)?;
        let is_of_now = match replay {
            None => *point == Point::Head,
            Some(replay) => replay.line == current.line,
        };
        if is_of_now && self.is_awake(project, *branch) {
            self.node.ship(*branch).await?;
        }
        let (state, entries) = self.state_in_bucket(project).await?;
        let order = order(&state, plan, *scratch, probes)?;
        // It may have been sealed a moment ago.
        self.upload_chain(order.base()).await?;
        self.check_room(order.base()).await?;
        Ok((order, entries))
    }

    /// Refuses to fill a disk that branches in use need: what is restored takes its own size, at least.
    async fn check_room(&self, base: LayerId) -> Result<()> {
        // What cannot be told is told when it is fetched.
        let image = self.image_bytes(base).await.unwrap_or(0);
        let (free, wanted) = (self.node.free_bytes()?, self.config.min_free_bytes.saturating_add(image));
        match free >= wanted {
            true => Ok(()),
            false => Err(Error::DiskFull { path: self.config.data_dir.clone(), free, wanted }),
        }
    }

    /// The project as the bucket tells it, every entry checked.
    async fn state_in_bucket(&self, project: &Project) -> Result<(ProjectState, usize)> {
        let broken = |ledger: &str, (seq, why): (u64, String)| Error::Ledger { ledger: ledger.to_owned(), seq, why };
        let catalog = read_chain::<CatalogEvent>(&self.bucket, CATALOG).await?;
        if let Some(fault) = catalog.fault {
            return Err(broken(CATALOG, fault));
        }
        let name = ledger_name(project.id);
        let chain = read_chain::<Event>(&self.bucket, &name).await?;
        if let Some(fault) = chain.fault {
            return Err(broken(&name, fault));
        }
        let mut state = ProjectState::default();
        for chained in &chain.entries {
            state.apply(&chained.entry).map_err(|why| broken(&name, (chained.entry.seq, why)))?;
        }
        Ok((state, chain.entries.len() + catalog.entries.len()))
    }

    /// Adds to checkpoints of a branch how large they are, as far as that can be told now.
    pub(super) async fn add_sizes(&self, state: &ProjectState, branch: BranchId, views: &mut [api::Checkpoint]) {
        let deadline = tokio::time::Instant::now() + SIZES_WITHIN;
        let own = match tokio::time::timeout_at(deadline, self.own_bytes(state, branch)).await {
            Ok(Ok(own)) => own,
            Ok(Err(error)) => {
                tracing::debug!(error = error.chain(), "what checkpoints store cannot be told");
                return;
            }
            Err(_) => return,
        };
        for view in views {
            view.own_bytes = own.get(&view.name).copied();
            view.image_bytes = tokio::time::timeout_at(deadline, self.image_bytes(view.layer)).await.ok().flatten();
        }
    }

    async fn image_bytes(&self, layer: LayerId) -> Option<u64> {
        if let Some(known) = self.image_sizes.lock().get(&layer) {
            return Some(*known);
        }
        let found = self.node.image_bytes(layer).await.ok().flatten()?;
        self.image_sizes.lock().insert(layer, found);
        Some(found)
    }
}

/// What is restored, and what must come of it, as the bucket tells it.
fn order(state: &ProjectState, plan: &Plan, scratch: BranchId, probes: &[crate::drill::Probe]) -> Result<Order> {
    let Plan::Drill { branch, point, layer, replay, .. } = plan else { return Err(other_act(plan)) };
    let (facts, known) = (state.facts()?, state.branch_by_id(*branch)?);
    let checkpoint = known.checkpoints.iter().find(|one| Point::Checkpoint(one.name.clone()) == *point);
    if matches!(point, Point::Checkpoint(_)) && checkpoint.map(|checkpoint| checkpoint.layer) != *layer {
        return Err(Error::Damaged(format!("the ledger in the bucket names another layer as {point}, or none")));
    }
    let of = |data: Line, begun_here: bool| Start {
        pg_major: facts.pg_major,
        head_end: known.history.seal_of(data.head).and_then(|seal| seal.end),
        earlier: known.history.before(data.head, data.line),
        data,
        begun_here,
        // No subscription of what is restored may run, and no slot of it is kept.
        fork: true,
        durability: Durability::Local,
        verifier: facts.verifier.clone(),
    };
    let start = match (point, layer, replay) {
        (Point::Head, ..) => {
            of(Line { branch: *branch, line: known.line, head: known.head, epoch: state.epoch() }, false)
        }
        (_, _, Some(replay)) => of(Line { branch: replay.scratch, line: 0, head: replay.base, epoch: 0 }, true),
        (_, Some(layer), None) => of(Line { branch: scratch, line: 0, head: *layer, epoch: 0 }, true),
        (_, None, None) => return Err(Error::Damaged(format!("nothing is known of {point}"))),
    };
    let rows = checkpoint.and_then(|checkpoint| checkpoint.rows.clone());
    let probes = known.upkeep.probes.iter().chain(probes).cloned().collect();
    Ok(Order { scratch, start, replay: replay.clone(), probes, rows })
}

/// Says loudly what came of it.
fn tell(point: &PointRef, drilled: &Drilled) {
    let endpoint = EndpointName::from(point.at.clone()).to_string();
    let report = &drilled.report;
    let result = if drilled.fault.is_none() { "passed" } else { "failed" };
    metrics::counter!("ebb_timeline_drills_total", "result" => result).increment(1);
    metrics::histogram!("ebb_timeline_drill_seconds").record(report.total_ms as f64 / 1000.0);
    if let Some(ms) = report.restore_ms {
        metrics::gauge!("ebb_timeline_last_drill_restore_seconds", "endpoint" => endpoint).set(ms as f64 / 1000.0);
    }
    let (restore_ms, total_ms, bytes) = (report.restore_ms, report.total_ms, report.bucket_bytes);
    match &drilled.fault {
        None => tracing::info!(%point, restore_ms, total_ms, bytes, "a drill passed"),
        Some(Fault { what, kind: ErrorKind::Unavailable }) => {
            tracing::warn!(%point, fault = what, total_ms, "a drill could not be carried out");
        }
        Some(Fault { what, kind }) => {
            tracing::error!(%point, fault = what, ?kind, total_ms, "a drill failed: this point cannot be relied on");
        }
    }
}
