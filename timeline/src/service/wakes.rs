//! What this node remembers of its newest wakes: how long each stage took, and why one failed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_types::{BranchId, BranchRef, Timestamp};
use parking_lot::Mutex;

use super::{Project, Service};
use crate::api::types as api;
use crate::{Error, Result};

/// LIMIT: a wake takes about a kilobyte; those of an hour at one every four seconds.
const KEPT_MAX: usize = 1000;

/// One wake.
#[derive(Debug, Clone)]
struct Wake {
    branch: BranchId,
    at: Timestamp,
    whole: Duration,
    stages: Vec<(String, Duration)>,
    error: Option<String>,
}

/// The newest wakes of this node's branches, oldest first.
#[derive(Debug, Default)]
pub(super) struct Wakes(Mutex<VecDeque<Wake>>);

impl Wakes {
    fn note(&self, wake: Wake) {
        let mut kept = self.0.lock();
        if kept.len() >= KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(wake);
    }
}

/// When a wake came to which point. What it costs to remember it is paid afterwards.
#[derive(Debug, Clone, Copy)]
pub(super) struct Course {
    at: Timestamp,
    /// Somebody asked.
    pub asked: Instant,
    /// Everything is known: whose the branch is, where its data is, that there is room.
    pub resolved: Instant,
}

impl Course {
    /// A wake that was asked for then, and is about to begin.
    pub fn begin(asked: Instant, now: Timestamp) -> Self {
        Self { at: now, asked, resolved: Instant::now() }
    }
}

impl Service {
    /// Remembers a wake that has ended just now. Those who waited for it need not wait for this.
    pub(super) fn note_wake(self: &Arc<Self>, branch: BranchId, course: Course, failed: Option<&Error>) {
        let (service, whole, started) = (self.clone(), course.asked.elapsed(), course.resolved.elapsed());
        let error = failed.map(Error::chain);
        self.tasks.spawn(async move {
            let unit = match &error {
                None => service.node.status(branch).await.map(|status| status.stages).unwrap_or_default(),
                Some(_) => Vec::new(),
            };
            let mut stages = vec![("resolve".to_owned(), course.resolved.duration_since(course.asked))];
            stages.extend(stages_of(started, &unit));
            service.wakes.note(Wake { branch, at: course.at, whole, stages, error });
        });
    }

    /// The newest wakes on this node since it started, newest first: of a branch, or of all.
    ///
    /// # Errors
    /// If there is no such branch.
    pub fn list_wakes(&self, of: Option<(&str, &str)>) -> Result<api::WakeList> {
        let only = match of {
            Some((project, branch)) => Some(self.project(project)?.ledger.state().branch(branch)?.0),
            None => None,
        };
        let kept: Vec<Wake> = self.wakes.0.lock().iter().rev().cloned().collect();
        let wakes = kept.into_iter().filter(|wake| only.is_none_or(|only| wake.branch == only));
        let projects = self.all_projects();
        let name = |branch| projects.iter().find_map(|project| name_in(project, branch));
        Ok(api::WakeList {
            wakes: wakes
                .map(|wake| api::Wake {
                    id: wake.branch,
                    // What was deleted since has no name.
                    branch: name(wake.branch).map(|at| at.to_string()),
                    at: wake.at,
                    milliseconds: milliseconds(wake.whole),
                    stages: wake
                        .stages
                        .into_iter()
                        .map(|(name, took)| api::WakeStage { name, milliseconds: milliseconds(took) })
                        .collect(),
                    error: wake.error,
                })
                .collect(),
        })
    }
}

/// How long each stage took after everything was known. The unit counts from when it was asked for, to the end of each.
fn stages_of(started: Duration, unit: &[(String, u64)]) -> Vec<(String, Duration)> {
    let Some((_, last)) = unit.last() else { return Vec::new() };
    let mut stages = vec![("prepare".to_owned(), started.saturating_sub(Duration::from_micros(*last)))];
    let mut before = 0;
    for (stage, end) in unit {
        let name = match stage.as_str() {
            "spawned" => "spawn",
            "isolated" => "isolate",
            "opened" => "open",
            "mounted" => "mount",
            "started" => "start",
            "ready" => "recover",
            other => other,
        };
        stages.push((name.to_owned(), Duration::from_micros(end.saturating_sub(before))));
        before = *end;
    }
    stages
}

fn name_in(project: &Project, branch: BranchId) -> Option<BranchRef> {
    let state = project.ledger.state();
    let branch = state.branches.get(&branch)?.name.clone();
    Some(BranchRef { project: project.name.clone(), branch })
}

/// To a thousandth, which is what was measured.
fn milliseconds(took: Duration) -> f64 {
    took.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_told_by_what_each_took() {
        let unit = [("spawned", 2_000), ("isolated", 2_500), ("mounted", 6_500), ("ready", 36_500)];
        let unit = unit.map(|(name, end)| (name.to_owned(), end));
        let stages = stages_of(Duration::from_millis(40), &unit);
        let shown: Vec<_> = stages.iter().map(|(name, took)| format!("{name} {:.1}", milliseconds(*took))).collect();
        assert_eq!(shown, ["prepare 3.5", "spawn 2.0", "isolate 0.5", "mount 4.0", "recover 30.0"]);
        assert_eq!(stages_of(Duration::from_millis(40), &[]), []);
    }

    #[test]
    fn only_the_newest_are_kept() {
        let wakes = Wakes::default();
        for n in 0..KEPT_MAX + 7 {
            let branch = BranchId::for_test(n as u128);
            let whole = Duration::ZERO;
            wakes.note(Wake { branch, at: Timestamp::UNIX_EPOCH, whole, stages: Vec::new(), error: None });
        }
        let kept = wakes.0.lock();
        assert_eq!((kept.len(), kept[0].branch), (KEPT_MAX, BranchId::for_test(7)));
    }
}
