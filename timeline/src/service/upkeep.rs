//! What is done for branches by themselves: checkpoints by a schedule, what a rule lets go, drills.
//!
//! Looks at all branches at intervals, compares the clock with what their ledgers say, and begins ordinary operations under
//! the name of Ebb: each leaves its receipts. Nothing is remembered here, so that after a time in which nobody looked at
//! most one checkpoint and one drill of each branch are made up for.
//!
//! No compute is woken for any of it: a sleeping branch's head is its checkpoint.

use std::sync::Arc;
use std::time::Duration;

use ebb_types::{BranchId, BranchRef, CheckpointName, EndpointName, Point, Timestamp};

use super::{Caller, Project, Service};
use crate::api::types as api;
use crate::decide::Ask;
use crate::drill::Record;
use crate::machine::Compute;
use crate::state::{Branch, Checkpoint};
use crate::{Error, Result};

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Something that a rule lets go.
#[derive(Debug, Clone)]
struct Overdue {
    ask: Ask,
    branch: BranchId,
    what: String,
    why: String,
}

impl Service {
    pub(super) async fn keep_up_forever(self: &Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            self.keep_up().await;
        }
    }

    /// Makes the checkpoints that are due, and lets go what is overdue.
    pub(super) async fn keep_up(self: &Arc<Self>) {
        for project in self.all_projects() {
            let state = project.ledger.state();
            for (&branch, known) in &state.branches {
                if let Err(error) = self.checkpoint_if_due(&project, branch, known).await {
                    self.report("making a checkpoint by schedule", &error);
                }
                tell_ages(&project, known, self.clock.now());
            }
        }
        self.expire(false).await;
    }

    async fn checkpoint_if_due(
        self: &Arc<Self>,
        project: &Arc<Project>,
        branch: BranchId,
        known: &Branch,
    ) -> Result<()> {
        let now = self.clock.now();
        let newest = known.checkpoints.iter().rev().find(|checkpoint| checkpoint.automatic);
        if !known.upkeep.checkpoints.is_due(newest.map(|newest| newest.created_at), now) {
            return Ok(());
        }
        if let Some(newest) = newest
            && !self.has_changed(project, branch, known, newest).await
        {
            return Ok(());
        }
        if !is_free(project, branch) {
            return Ok(());
        }
        let ask = Ask::CreateCheckpoint { branch: known.name.to_string(), name: automatic_name(now), automatic: true };
        match self.act(project, &Caller::ebb(), ask).await {
            // Somebody works on the branch, or has just taken the name: there is a next look.
            Ok(_) | Err(Error::Refused(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether a branch may hold anything that a checkpoint of it does not.
    async fn has_changed(&self, project: &Project, branch: BranchId, known: &Branch, since: &Checkpoint) -> bool {
        if known.head != since.layer {
            return true;
        }
        // What a sleeping branch has beyond its head, if anything, is being sealed; then the head is another one.
        if project.cell(branch).inner.lock().compute == Compute::Suspended {
            return false;
        }
        self.node.status(branch).await.is_none_or(|status| status.dirty)
    }

    /// Deletes what a rule lets go, or with `dry_run` only tells what.
    pub(super) async fn expire(self: &Arc<Self>, dry_run: bool) -> Vec<api::Expired> {
        let mut expired = Vec::new();
        for project in self.all_projects() {
            for overdue in self.overdue(&project) {
                let done = match dry_run {
                    true => true,
                    false => self.let_go(&project, &overdue).await,
                };
                if done {
                    expired.push(api::Expired { what: overdue.what, why: overdue.why });
                }
            }
        }
        expired
    }

    async fn let_go(self: &Arc<Self>, project: &Arc<Project>, overdue: &Overdue) -> bool {
        if !is_free(project, overdue.branch) {
            return false;
        }
        match self.act(project, &Caller::ebb(), overdue.ask.clone()).await {
            Ok(_) => {
                tracing::info!(branch = %overdue.branch, what = overdue.what, why = overdue.why, "let go by a rule");
                metrics::counter!("ebb_timeline_expired_total").increment(1);
                true
            }
            // Something needs it just now.
            Err(Error::Refused(_)) => false,
            Err(error) => {
                self.report("letting go what a rule does not keep", &error);
                false
            }
        }
    }

    /// Automatic checkpoints that the schedule does not keep, and rescue branches that nobody has looked into.
    fn overdue(&self, project: &Project) -> Vec<Overdue> {
        let state = project.ledger.state();
        let now = self.clock.now();
        let mut overdue = Vec::new();
        for (&branch, known) in &state.branches {
            let at = BranchRef { project: project.name.clone(), branch: known.name.clone() };
            let name = known.name.to_string();
            if let Some(until) = known.rescue_until.filter(|until| *until <= now && known.is_untouched())
                && self.was_never_awake(project, branch)
            {
                let why = format!("rescue branch, kept until {until}, in which nobody did anything");
                let ask = Ask::DeleteBranch { branch: name, rule: Some(why.clone()) };
                overdue.push(Overdue { ask, branch, what: at.to_string(), why });
                continue;
            }
            let made: Vec<&Checkpoint> = known.checkpoints.iter().filter(|one| one.automatic).collect();
            let schedule = known.upkeep.checkpoints;
            let keeps = schedule.keeps(&made.iter().map(|one| one.created_at).collect::<Vec<_>>());
            for (checkpoint, _) in made.into_iter().zip(keeps).filter(|(_, keep)| !keep) {
                let why = format!("automatic checkpoint beyond {schedule}");
                let (branch_name, checkpoint) = (name.clone(), checkpoint.name.to_string());
                let what = format!("{at}@{checkpoint}");
                let rule = Some(why.clone());
                let ask = Ask::DeleteCheckpoint { branch: branch_name, name: checkpoint, rule };
                overdue.push(Overdue { ask, branch, what, why });
            }
        }
        overdue
    }

    /// Whether a branch has slept since this process began. What was awake before has left a seal, or is not settled. With
    /// the branch's lock held it stays so.
    pub(super) fn was_never_awake(&self, project: &Project, branch: BranchId) -> bool {
        let cell = project.cell(branch);
        let inner = cell.inner.lock();
        inner.compute == Compute::Suspended && inner.wakes == 0 && inner.is_settled()
    }

    /// Makes the drills that are due, one after the other.
    pub(super) async fn drill_forever(self: &Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            self.drill_due().await;
        }
    }

    /// Drills what is due now.
    pub(super) async fn drill_due(self: &Arc<Self>) {
        for project in self.all_projects() {
            for &branch in project.ledger.state().branches.keys() {
                let Some((name, point)) = self.due_drill(&project, branch) else { continue };
                let request = api::DrillBranch { point: Some(point.to_string()), probes: Vec::new() };
                match self.drill(&Caller::ebb(), project.name.as_str(), &name, request).await {
                    // What it found is recorded, counted and in the log.
                    Ok(_) | Err(Error::Drill { .. } | Error::Refused(_) | Error::Stopping) => {}
                    Err(error) => self.report("drilling by schedule", &error),
                }
            }
        }
    }

    /// What is drilled next: the newest checkpoint, unless it was drilled before; then the head.
    fn due_drill(&self, project: &Project, branch: BranchId) -> Option<(String, Point)> {
        let state = project.ledger.state();
        let known = state.branch_by_id(branch).ok()?;
        let last = known.drills.back().map(|record| (record.at, record.fault.is_some()));
        if !known.upkeep.drill_is_due(last, self.clock.now()) {
            return None;
        }
        let newest = known.checkpoints.last().filter(|newest| newest.last_drill.is_none());
        let point = newest.map_or(Point::Head, |newest| Point::Checkpoint(newest.name.clone()));
        Some((known.name.to_string(), point))
    }
}

/// Whether nobody works on a branch just now. If somebody does there is a next look, and nobody else waits for this one.
fn is_free(project: &Project, branch: BranchId) -> bool {
    project.cell(branch).ops.try_lock().is_ok()
}

/// `auto-2026-11-21T10-00Z`.
fn automatic_name(now: Timestamp) -> CheckpointName {
    let name = now.strftime("auto-%Y-%m-%dT%H-%MZ").to_string();
    name.parse().expect("letters, digits and hyphens are a checkpoint's name")
}

fn tell_ages(project: &Project, known: &Branch, now: Timestamp) {
    let at = BranchRef { project: project.name.clone(), branch: known.name.clone() };
    let endpoint = EndpointName::from(at).to_string();
    let age = |then: Timestamp| now.duration_since(then).as_secs_f64().max(0.0);
    if let Some(newest) = known.checkpoints.last() {
        metrics::gauge!("ebb_timeline_newest_checkpoint_age_seconds", "endpoint" => endpoint.clone())
            .set(age(newest.created_at));
    }
    let Some(last) = known.drills.back() else { return };
    let Record { at, fault, .. } = last.as_ref();
    let failed = if fault.is_some() { 1.0 } else { 0.0 };
    metrics::gauge!("ebb_timeline_last_drill_failed", "endpoint" => endpoint.clone()).set(failed);
    if let Some(passed) = known.drills.iter().rev().find(|record| record.fault.is_none()) {
        metrics::gauge!("ebb_timeline_last_passed_drill_age_seconds", "endpoint" => endpoint.clone())
            .set(age(passed.at));
    }
    metrics::gauge!("ebb_timeline_last_drill_age_seconds", "endpoint" => endpoint).set(age(*at));
}

#[cfg(test)]
mod tests;
