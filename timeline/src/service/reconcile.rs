//! The reconciler: looks at all computes and operations, does what is due, sleeps until something is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_types::{BranchId, LayerId};
use tokio_util::sync::CancellationToken;

use super::compute::Cell;
use super::{Project, Service};
use crate::machine::Compute;
use crate::{Error, Result};

/// LIMIT: how often it looks without being asked; also how soon a failed background act is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// LIMIT: the finest grain of idle times.
const LOOK_SOONEST: Duration = Duration::from_millis(25);

/// LIMIT: after clients kept a compute awake: not at once, not much later than they may be done.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What is known of one awake compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Observed {
    /// Since when it is awake.
    pub awake_for: Duration,
    /// How long ago a client last did any work.
    pub idle_for: Option<Duration>,
    /// Sessions in the middle of something.
    pub busy: usize,
    /// How long until it may be tried again.
    pub retry_in: Duration,
    /// The branch's policy.
    pub idle_suspend: Duration,
}

/// What to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Suspend it.
    Now,
    /// Look again after this long.
    In(Duration),
}

/// Decides about one compute. Idle is as long as neither a client did anything nor the compute was woken.
pub(super) fn due(observed: &Observed) -> Due {
    if observed.busy > 0 {
        return Due::In(observed.idle_suspend);
    }
    let idle = observed.idle_for.map_or(observed.awake_for, |idle| idle.min(observed.awake_for));
    let rest = observed.idle_suspend.saturating_sub(idle).max(observed.retry_in);
    if rest.is_zero() { Due::Now } else { Due::In(rest) }
}

impl Service {
    /// Keeps computes, uploads, unfinished operations and collection moving until cancelled.
    pub async fn run(self: &Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.stopping.cancelled() => {}
            _ = async {
                tokio::join!(
                    self.suspend_forever(),
                    self.mend_forever(),
                    self.upload_forever(),
                    self.collect_forever(),
                    self.watch_wal_forever(),
                    self.keep_record_forever(),
                    self.look_at_records_forever(),
                    self.watch_record_forever(),
                    self.look_at_others_forever(),
                    self.keep_up_forever(),
                    self.drill_forever(),
                    self.leave_visits_forever(),
                )
            } => {}
        }
    }

    async fn suspend_forever(self: &Arc<Self>) {
        loop {
            let next = self.look_at_computes();
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(next) => {}
            }
        }
    }

    /// Takes up what was left behind: by a crash, by a compute that was lost, by a bucket that was away.
    async fn mend_forever(self: &Arc<Self>) {
        loop {
            self.settle_heads().await;
            tokio::select! {
                () = self.left_behind.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            self.recover().await;
        }
    }

    /// Begins the suspensions that are due; answers when to look again.
    fn look_at_computes(self: &Arc<Self>) -> Duration {
        let mut next = LOOK_EVERY;
        let mut awake = 0;
        for project in self.own_projects() {
            for &branch in project.ledger.state().branches.keys() {
                let cell = project.cell(branch);
                let Some(observed) = self.observe(&project, branch, &cell) else {
                    continue;
                };
                awake += 1;
                match due(&observed) {
                    Due::In(rest) => next = next.min(rest),
                    Due::Now => self.begin_idle_suspend(&project, branch, &cell, observed.idle_suspend),
                }
            }
        }
        metrics::gauge!("ebb_timeline_computes_awake").set(f64::from(awake));
        next.max(LOOK_SOONEST)
    }

    fn observe(&self, project: &Project, branch: BranchId, cell: &Cell) -> Option<Observed> {
        let (awake_for, retry_at) = {
            let inner = cell.inner.lock();
            if !matches!(inner.compute, Compute::Active(_)) {
                return None;
            }
            (inner.since.elapsed(), inner.retry_at)
        };
        let activity = self.clients.activity(branch);
        let state = project.ledger.state();
        Some(Observed {
            awake_for,
            idle_for: activity.idle_for,
            busy: activity.busy,
            retry_in: retry_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now())),
            idle_suspend: self.idle_suspend(state.branches.get(&branch)?),
        })
    }

    pub(super) fn is_idle(&self, project: &Project, branch: BranchId, cell: &Cell) -> bool {
        // The time to wait before another try was just set by whoever asks.
        self.observe(project, branch, cell)
            .is_some_and(|observed| due(&Observed { retry_in: Duration::ZERO, ..observed }) == Due::Now)
    }

    fn begin_idle_suspend(
        self: &Arc<Self>,
        project: &Arc<Project>,
        branch: BranchId,
        cell: &Arc<Cell>,
        idle: Duration,
    ) {
        let again = (idle / 4).clamp(RETRY_MIN, RETRY_MAX);
        // Also keeps the next look from beginning a second one.
        cell.inner.lock().retry_at = Some(Instant::now() + again);
        let (service, project) = (self.clone(), project.clone());
        self.tasks.spawn(async move {
            match service.suspend_idle(&project, branch).await {
                Ok(()) => {}
                Err(Error::KeptAwake { sessions, .. }) => {
                    tracing::debug!(%branch, ?sessions, "sessions keep a compute awake");
                }
                Err(error) => service.report("suspending an idle compute", &error),
            }
        });
    }

    /// Seals and records what sleeping branches have beyond their recorded heads, so that it gets to the bucket.
    pub(super) async fn settle_heads(self: &Arc<Self>) {
        for project in self.own_projects() {
            for &branch in project.ledger.state().branches.keys() {
                let cell = project.cell(branch);
                if cell.inner.lock().is_settled() {
                    continue;
                }
                // Somebody works on the branch: there is a next time.
                let Ok(_ops) = cell.ops.clone().try_lock_owned() else {
                    continue;
                };
                match self.settle_head(&project, branch, &cell).await {
                    Ok(()) => {}
                    // The branch was moved or deleted since: an older seal of it is of no use any more.
                    Err(Error::Refused(_)) => cell.inner.lock().unrecorded = None,
                    Err(error) => self.report("recording a seal", &error),
                }
            }
        }
    }

    async fn settle_head(&self, project: &Project, branch: BranchId, cell: &Cell) -> Result<()> {
        if cell.inner.lock().is_settled() {
            return Ok(());
        }
        self.check_disk()?;
        let line = project.line(branch)?.line;
        let sealed = self.seal_locked(project, branch, LayerId::generate()).await?;
        self.note_seal(project, branch, line, sealed).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(awake_ms: u64, idle_ms: Option<u64>, busy: usize, retry_ms: u64, expect: Due) {
        let observed = Observed {
            awake_for: Duration::from_millis(awake_ms),
            idle_for: idle_ms.map(Duration::from_millis),
            busy,
            retry_in: Duration::from_millis(retry_ms),
            idle_suspend: Duration::from_secs(1),
        };
        assert_eq!(due(&observed), expect, "for {observed:?}");
    }

    #[test]
    fn a_compute_is_idle_since_its_wake_or_its_last_client() {
        check(400, None, 0, 0, Due::In(Duration::from_millis(600)));
        check(1000, None, 0, 0, Due::Now);
        check(9000, Some(300), 0, 0, Due::In(Duration::from_millis(700)));
        check(300, Some(9000), 0, 0, Due::In(Duration::from_millis(700)));
        check(9000, Some(9000), 0, 0, Due::Now);
        check(9000, Some(9000), 1, 0, Due::In(Duration::from_secs(1)));
        check(9000, Some(9000), 0, 250, Due::In(Duration::from_millis(250)));
    }
}
