//! The state as the API shows it.

use std::collections::HashMap;

use ebb_types::{BranchId, BranchRef, EndpointName, OperationId, Point, Timestamp};

use super::{Project, Service};
use crate::api::types as api;
use crate::decide::PROD;
use crate::drill::Record;
use crate::event::{Event, Plan};
use crate::ledger::Chained;
use crate::state::{self, ProjectState};
use crate::{Refusal, Result};

impl Service {
    pub(super) fn project_view(&self, project: &Project) -> Result<api::Project> {
        let state = project.ledger.state();
        let facts = state.facts()?;
        Ok(api::Project {
            id: facts.id,
            name: facts.name.clone(),
            pg_major: facts.pg_major,
            created_at: facts.created_at,
            current: self.current_link(project)?,
            branches: self.branch_views(project, &state)?,
            releases: state.releases.len() as u64,
            stored: None,
        })
    }

    /// All branches: `prod` first, then by name.
    pub(super) fn branch_views(&self, project: &Project, state: &ProjectState) -> Result<Vec<api::Branch>> {
        let mut views = Vec::with_capacity(state.branches.len());
        for &branch in state.branches.keys() {
            views.push(self.branch_view(project, state, branch)?);
        }
        views.sort_by(|a, b| (a.name.as_str() != PROD, &a.name).cmp(&(b.name.as_str() != PROD, &b.name)));
        Ok(views)
    }

    pub(super) fn branch_view(&self, project: &Project, state: &ProjectState, id: BranchId) -> Result<api::Branch> {
        let branch = state.branch_by_id(id)?;
        let name = &state.facts()?.name;
        let at = BranchRef { project: name.clone(), branch: branch.name.clone() };
        Ok(api::Branch {
            id,
            name: branch.name.clone(),
            project: name.clone(),
            endpoint: EndpointName::from(at).to_string(),
            parent: branch.parent.clone(),
            head: branch.head,
            state: project.cell(id).inner.lock().compute.as_str().to_owned(),
            created_at: branch.created_at,
            idle_suspend_seconds: self.idle_suspend(branch).as_secs_f64(),
            window_seconds: branch.window().as_secs_f64(),
            durability: branch.durability,
            pinned: branch.pinned,
            pool_size: branch.pool_size,
            upkeep: api::Upkeep::from(&branch.upkeep),
            allow: branch.allow.clone(),
            window_from: branch.window_start(self.clock.now()),
            rescue_until: branch.rescue_until,
            stored: None,
        })
    }

    pub(super) fn idle_suspend(&self, branch: &state::Branch) -> std::time::Duration {
        match branch.idle_suspend_ms {
            Some(own) => std::time::Duration::from_millis(own),
            None => self.config.default_idle_suspend,
        }
    }
}

pub(super) fn checkpoint_view(
    branch: &state::Branch,
    checkpoint: &state::Checkpoint,
    now: Timestamp,
) -> api::Checkpoint {
    api::Checkpoint {
        name: checkpoint.name.clone(),
        branch: branch.name.clone(),
        layer: checkpoint.layer,
        created_at: checkpoint.created_at,
        lsn: checkpoint.lsn,
        automatic: checkpoint.automatic,
        age_seconds: u64::try_from(now.duration_since(checkpoint.created_at).as_secs()).unwrap_or(0),
        image_bytes: None,
        own_bytes: None,
        last_drill: checkpoint.last_drill.as_ref().map(|record| drill_view(branch, record)),
    }
}

pub(super) fn drill_view(branch: &state::Branch, record: &Record) -> api::Drill {
    api::Drill {
        branch: branch.name.clone(),
        point: record.point.to_string(),
        at: record.at,
        actor: record.actor.clone(),
        passed: record.fault.is_none(),
        fault: record.fault.as_ref().map(|fault| fault.what.clone()),
        report: record.report.clone(),
    }
}

/// A release; with `whole`, what its deploy found out, too.
pub(super) fn release_view(state: &ProjectState, release: &state::Release, whole: bool) -> api::Release {
    let found = if whole { release.found.as_ref().clone() } else { state::Found::default() };
    api::Release {
        id: release.id,
        name: release.name.clone(),
        artifact: release.artifact.clone(),
        migrations: release.migrations.clone(),
        checkpoint: release.checkpoint.clone(),
        created_at: release.created_at,
        state: release.stage.as_str().to_owned(),
        current: state.code == Some(release.id),
        fault: release.fault.clone(),
        rehearsal: found.rehearsal,
        runs: found.runs,
        probes: found.probes,
        rescue: found.rescue,
    }
}

/// What a plan of a rollback says to people.
pub(super) fn rollback_view(state: &ProjectState, plan: &Plan) -> Result<api::RollbackPlan> {
    let Plan::Rollback { to, part, artifact, code_from, set_aside, checkpoint, .. } = plan else {
        return Err(Refusal::TooLate("the operation is no rollback".to_owned()).into());
    };
    let release = state.release_by_id(*to).map(|release| release.name.clone()).unwrap_or_default();
    Ok(api::RollbackPlan {
        release,
        checkpoint: checkpoint.clone(),
        code: api::CodeSwitch { from: code_from.clone(), to: artifact.clone() },
        set_aside: set_aside.clone(),
        part: *part,
        written: None,
    })
}

/// Names for what a ledger's entries mean: who, what, on what, how far.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    state: ProjectState,
    /// What each operation is about, as its first entry told it: later on the names may be gone.
    on: HashMap<OperationId, String>,
}

impl Reader {
    /// The fold of the entries so far.
    pub fn state(&self) -> &ProjectState {
        &self.state
    }

    /// One entry as a receipt. To be called with every entry, in order.
    pub fn receipt(&mut self, chained: &Chained<Event>) -> api::Entry {
        use crate::ledger::Fold as _;
        let entry = &chained.entry;
        let before = entry.op.and_then(|op| self.state.operations.get(&op)).map(|operation| operation.plan.clone());
        let begun = entry.events.iter().find_map(|event| match event {
            Event::OperationBegun { plan, .. } => Some(Plan::clone(plan)),
            _ => None,
        });
        let plan = begun.or(before);
        // Names are looked up before the entry takes them away, or else after it has made them.
        let on_before = plan.as_ref().and_then(|plan| self.on(plan));
        // A fault of the chain is `verify`'s to tell; here an entry that cannot be folded only lacks names.
        let _ = self.state.apply(entry);
        let told = entry.op.and_then(|op| self.on.get(&op).cloned());
        let on = told.or(on_before).or_else(|| plan.as_ref().and_then(|plan| self.on(plan)));
        if let (Some(op), Some(on)) = (entry.op, &on) {
            self.on.insert(op, on.clone());
        }
        let sealed = || {
            entry.events.iter().find_map(|event| match event {
                Event::BranchSealed { branch, .. } => self.branch_name(*branch),
                _ => None,
            })
        };
        api::Entry {
            seq: entry.seq,
            time: entry.time,
            actor: entry.actor.clone(),
            act: plan.as_ref().map_or("seal", Plan::act).to_owned(),
            on: on.or_else(sealed).unwrap_or_default(),
            result: result(&entry.events),
            operation: entry.op,
            events: entry
                .events
                .iter()
                .map(|event| serde_json::to_value(event).expect("events are plain data with string keys"))
                .collect(),
            prev: chained.prev.to_hex().to_string(),
            hash: chained.hash.to_hex().to_string(),
        }
    }

    fn branch_name(&self, id: BranchId) -> Option<String> {
        self.state.branches.get(&id).map(|branch| branch.name.to_string())
    }

    fn on(&self, plan: &Plan) -> Option<String> {
        match plan {
            Plan::CreateProject { name } | Plan::DeleteProject { name } => Some(name.to_string()),
            Plan::MoveProject { to } => Some(format!("to {to}")),
            Plan::CreateBranch { name, parent, .. } => Some(format!("{name} from {}@{}", parent.branch, parent.point)),
            Plan::CreateCheckpoint { branch, name, .. } => {
                self.branch_name(*branch).map(|branch| format!("{branch}@{name}"))
            }
            Plan::DeleteCheckpoint { branch, name, rule } => {
                self.branch_name(*branch).map(|branch| format!("{branch}@{name}{}", by(rule.as_deref())))
            }
            Plan::DeleteBranch { branch, rule } => {
                self.branch_name(*branch).map(|branch| format!("{branch}{}", by(rule.as_deref())))
            }
            Plan::Drill { branch, point, .. } => self.branch_name(*branch).map(|branch| format!("{branch}@{point}")),
            Plan::Restore { branch, to, .. } => self.branch_name(*branch).map(|branch| format!("{branch} to {to}")),
            Plan::Release { name, .. } => Some(name.clone()),
            Plan::Rehearse { artifact, .. } => Some(artifact.chars().take(12).collect()),
            Plan::Rollback { to, .. } => self.state.release_by_id(*to).map(|release| format!("to {}", release.name)),
            Plan::Export { branch, point, dir, .. } => {
                let point = point.as_ref().unwrap_or(&Point::Head);
                self.branch_name(*branch).map(|branch| format!("{branch}@{point} to {}", dir.display()))
            }
            Plan::Import { name, origin, .. } => Some(format!("{name} from {}", origin.at)),
            Plan::ChangeBranch { branch }
            | Plan::Suspend { branch, .. }
            | Plan::Wake { branch }
            | Plan::ShowUrl { branch } => self.branch_name(*branch),
        }
    }
}

/// The rule by which something goes, if nobody asked for it.
fn by(rule: Option<&str>) -> String {
    rule.map(|rule| format!(" ({rule})")).unwrap_or_default()
}

/// How far an entry brought its operation.
fn result(events: &[Event]) -> String {
    for event in events {
        match event {
            Event::DrillPassed { .. } => return "passed".to_owned(),
            Event::DrillFailed { fault, .. } => return format!("failed: {}", fault.what),
            Event::ReleaseStays { fault, .. } => return format!("failed: {fault}"),
            Event::ReleaseGoesBack { fault, .. } => return format!("goes back: {fault}"),
            Event::Rehearsed { report } => {
                return report.fault.as_ref().map_or("passed".to_owned(), |fault| format!("failed: {fault}"));
            }
            _ => {}
        }
    }
    for event in events.iter().rev() {
        match event {
            Event::OperationDone => return "done".to_owned(),
            Event::OperationUndone { why } => return format!("undone: {why}"),
            Event::StepDone { step, .. } => {
                let name = serde_json::to_value(step).ok();
                return name.as_ref().and_then(|name| name.as_str()).unwrap_or("step").to_owned();
            }
            Event::OperationBegun { .. } => return "begun".to_owned(),
            _ => {}
        }
    }
    "recorded".to_owned()
}

/// Percent-encodes what a URL's query value may not hold.
pub(super) fn encode_query(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Seconds as text asks for them, as a duration in milliseconds.
pub(crate) fn seconds_to_ms(seconds: f64) -> Result<u64> {
    let ms = (seconds * 1000.0).round();
    if !(0.0..=1e15).contains(&ms) {
        return Err(Refusal::Invalid(format!("a length of time cannot be {seconds} seconds")).into());
    }
    Ok(ms as u64)
}

/// A moment for states that were entered before the service looked.
pub(super) fn known_since(since: Timestamp, otherwise: Timestamp) -> Timestamp {
    if since == Timestamp::UNIX_EPOCH { otherwise } else { since }
}
