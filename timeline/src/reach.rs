//! What keeps what: from a project's state to the layers and artifacts that must stay. Pure.
//!
//! A *root* is a layer that somebody can still name. It keeps its whole chain, which only its manifest tells; chains are
//! looked up by the caller. What is no root's, nobody can ever name again: new roots are made of old ones and of layers
//! whose identifiers are chosen afresh, in a plan that is recorded first.

use std::fmt;

use ebb_types::{BranchId, BranchName, CheckpointName, LayerId, OperationId, ProjectName, Timestamp};

use crate::event::Plan;
use crate::machine::ReleaseStage;
use crate::state::{Branch, ProjectState};

/// A layer that is kept for its own sake, and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// The layer.
    pub layer: LayerId,
    /// What keeps it.
    pub keeper: Keeper,
    /// The branch whose bytes these are; `None` for what belongs to no branch.
    pub owner: Option<BranchId>,
}

/// What keeps a layer, an artifact or another object, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// The head of a branch.
    Head {
        /// Its project.
        project: ProjectName,
        /// The branch.
        branch: BranchName,
        /// For a rescue branch: until when nothing may delete it.
        rescue_until: Option<Timestamp>,
    },
    /// A checkpoint.
    Checkpoint {
        /// Its project.
        project: ProjectName,
        /// Its branch.
        branch: BranchName,
        /// Its name.
        checkpoint: CheckpointName,
        /// The releases whose way back it is.
        releases: Vec<String>,
    },
    /// The window in which a branch's past can be gone back to.
    Window {
        /// Its project.
        project: ProjectName,
        /// Its branch.
        branch: BranchName,
        /// When what the layer holds was there.
        at: Timestamp,
    },
    /// An operation under way.
    Operation {
        /// Its project.
        project: ProjectName,
        /// Its identifier.
        operation: OperationId,
        /// What it does.
        act: &'static str,
    },
    /// A visit.
    Visit {
        /// To what: the point in words.
        place: String,
    },
    /// A seal that is not recorded yet.
    Unrecorded {
        /// Its project.
        project: ProjectName,
        /// Its branch.
        branch: BranchId,
    },
    /// The empty cluster that projects begin as.
    Template {
        /// Major version of its Postgres.
        pg_major: u32,
    },
    /// A release.
    Release {
        /// Its project.
        project: ProjectName,
        /// Its name.
        release: String,
    },
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Keeper::Head { project, branch, rescue_until: None } => write!(f, "head of {project}/{branch}"),
            Keeper::Head { project, branch, rescue_until: Some(until) } => {
                write!(f, "rescue branch {project}/{branch}, which nothing may delete before {until}")
            }
            Keeper::Checkpoint { project, branch, checkpoint, releases } => {
                write!(f, "checkpoint {checkpoint} of {project}/{branch}")?;
                if !releases.is_empty() {
                    write!(f, ", the way back from release {}", releases.join(", "))?;
                }
                Ok(())
            }
            Keeper::Window { project, branch, at } => {
                write!(f, "the past of {project}/{branch} that can be gone back to, as it was at {at}")
            }
            Keeper::Operation { project, operation, act } => write!(f, "{act} under way in {project} ({operation})"),
            Keeper::Visit { place } => write!(f, "visit of {place}"),
            Keeper::Unrecorded { project, branch } => {
                write!(f, "a seal of branch {branch} of {project} that is not recorded yet")
            }
            Keeper::Template { pg_major } => write!(f, "template of PostgreSQL {pg_major}"),
            Keeper::Release { project, release } => write!(f, "release {release} of {project}"),
        }
    }
}

/// The roots of a project; none if it was deleted.
pub fn roots(state: &ProjectState) -> Vec<Root> {
    let Ok(facts) = state.facts() else { return Vec::new() };
    let mut roots = Vec::new();
    for (&id, branch) in &state.branches {
        let (project, name) = (facts.name.clone(), branch.name.clone());
        let keeper = Keeper::Head { project, branch: name, rescue_until: branch.rescue_until };
        roots.push(Root { layer: branch.head, keeper, owner: Some(id) });
        for seal in branch.history.seals().iter().filter(|seal| seal.layer != branch.head) {
            let keeper = Keeper::Window { project: facts.name.clone(), branch: branch.name.clone(), at: seal.at };
            roots.push(Root { layer: seal.layer, keeper, owner: Some(id) });
        }
        for checkpoint in &branch.checkpoints {
            let keeper = Keeper::Checkpoint {
                project: facts.name.clone(),
                branch: branch.name.clone(),
                checkpoint: checkpoint.name.clone(),
                releases: releases_behind(state, branch, &checkpoint.name),
            };
            roots.push(Root { layer: checkpoint.layer, keeper, owner: Some(id) });
        }
    }
    for (&operation, open) in &state.operations {
        let layer = match &open.plan {
            plan if plan.replay().is_some() => plan.replay().map(|replay| replay.base),
            Plan::Restore { layer, .. } | Plan::Rollback { layer, .. } | Plan::Rehearse { layer, .. } => Some(*layer),
            Plan::CreateBranch { layer, .. } | Plan::Export { layer, .. } | Plan::Drill { layer, .. } => *layer,
            _ => None,
        };
        let keeper = Keeper::Operation { project: facts.name.clone(), operation, act: open.plan.act() };
        roots.extend(layer.map(|layer| Root { layer, keeper, owner: None }));
    }
    roots
}

/// The branches of a project, and the oldest line of each that a moment can be gone back to on.
pub fn oldest_lines(state: &ProjectState) -> Vec<(BranchId, u64)> {
    if state.facts().is_err() {
        return Vec::new();
    }
    let oldest = |branch: &Branch| branch.history.seals().first().map_or(branch.line, |seal| seal.line);
    state.branches.iter().map(|(id, branch)| (*id, oldest(branch))).collect()
}

/// The layers that operations under way may be making: they exist already, or not yet, or never.
pub fn to_be(state: &ProjectState) -> Vec<Root> {
    let Ok(facts) = state.facts() else { return Vec::new() };
    let open = state.operations.iter().map(|(&operation, open)| {
        // What a drill replays ends in no layer; naming one that never is does no harm.
        let layers = open.plan.seals().into_iter().chain(open.plan.replay().map(|replay| replay.layer));
        let keeper = Keeper::Operation { project: facts.name.clone(), operation, act: open.plan.act() };
        layers.map(move |layer| Root { layer, keeper: keeper.clone(), owner: None })
    });
    open.flatten().collect()
}

/// The artifacts of a project: those of all its releases, whatever became of them, and those that are being rehearsed; none
/// if it was deleted.
pub fn artifacts(state: &ProjectState) -> Vec<(String, Keeper)> {
    let Ok(facts) = state.facts() else { return Vec::new() };
    let keeper = |release: &str| Keeper::Release { project: facts.name.clone(), release: release.to_owned() };
    let rehearsed = state.operations.iter().filter_map(|(&operation, open)| match &open.plan {
        Plan::Rehearse { artifact, .. } => {
            Some((artifact.clone(), Keeper::Operation { project: facts.name.clone(), operation, act: open.plan.act() }))
        }
        _ => None,
    });
    state.releases.iter().map(|release| (release.artifact.clone(), keeper(&release.name))).chain(rehearsed).collect()
}

/// Releases that would be taken back to this checkpoint.
fn releases_behind(state: &ProjectState, branch: &Branch, checkpoint: &CheckpointName) -> Vec<String> {
    if branch.name.as_str() != crate::decide::PROD {
        return Vec::new();
    }
    let of = state
        .releases
        .iter()
        .filter(|release| release.checkpoint == *checkpoint && release.stage != ReleaseStage::RolledBack);
    of.map(|release| release.name.clone()).collect()
}
