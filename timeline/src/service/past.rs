//! Keeps every moment of awake branches within reach: seals where WAL has piled up since the last seal, and tells how far
//! the bucket is behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ebb_compute::control::Status;
use ebb_types::{BranchId, BranchRef, EndpointName, LayerId, Lsn};

use super::{Project, Service};
use crate::Result;

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// LIMIT: what a replay reads at most, besides what comes in within one look: a few seconds' work for Postgres.
const UNSEALED_WAL_MAX: u64 = 256 << 20;

/// LIMIT: a bucket that is this far behind is worth a line in the log.
const BEHIND_MAX_MS: u64 = 60_000;

impl Service {
    pub(super) async fn watch_wal_forever(self: &Arc<Self>) {
        let mut late = BTreeSet::new();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            for project in self.own_projects() {
                let branches: Vec<BranchId> = project.ledger.state().branches.keys().copied().collect();
                for branch in branches {
                    let status = match self.is_awake(&project, branch) {
                        true => self.node.status(branch).await,
                        false => None,
                    };
                    if status.is_none() && !late.remove(&branch) {
                        continue;
                    }
                    let behind = status.as_ref().and_then(|status| status.shipping.as_ref());
                    let (bytes, ms) =
                        behind.map_or((0, 0), |behind| (behind.behind_bytes.unwrap_or(0), behind.behind_ms));
                    self.tell_behind(&project, branch, bytes, ms);
                    if behind.is_some() {
                        late.insert(branch);
                    }
                    if let Some(status) = status
                        && let Err(error) = self.cut(&project, branch, &status).await
                    {
                        self.report("sealing a branch for its past", &error);
                    }
                }
            }
        }
    }

    /// Deletes WAL from before the window of every branch.
    pub(super) async fn forget_wal(&self) {
        for project in self.own_projects() {
            let state = project.ledger.state();
            for (&branch, known) in &state.branches {
                // On each line the WAL from its oldest seal on is needed.
                let mut oldest: BTreeMap<u64, Option<Lsn>> = BTreeMap::new();
                for seal in known.history.seals() {
                    oldest.entry(seal.line).or_insert(seal.end);
                }
                for (line, needed) in oldest {
                    if let Some(needed) = needed
                        && let Err(error) = self.node.forget_wal(branch, line, needed).await
                    {
                        self.report("deleting WAL that is too old", &error);
                    }
                }
            }
        }
    }

    fn tell_behind(&self, project: &Project, branch: BranchId, bytes: u64, ms: u64) {
        let state = project.ledger.state();
        let Ok(known) = state.branch_by_id(branch) else { return };
        let at = BranchRef { project: project.name.clone(), branch: known.name.clone() };
        let endpoint = EndpointName::from(at).to_string();
        if ms > BEHIND_MAX_MS {
            tracing::warn!(%branch, endpoint, bytes, seconds = ms / 1000, "the bucket lacks WAL");
        }
        metrics::gauge!("ebb_timeline_wal_behind_bytes", "endpoint" => endpoint.clone()).set(bytes as f64);
        metrics::gauge!("ebb_timeline_wal_behind_seconds", "endpoint" => endpoint).set(ms as f64 / 1000.0);
    }

    /// Seals if a replay to now would read too much WAL.
    async fn cut(&self, project: &Project, branch: BranchId, status: &Status) -> Result<()> {
        let sealed = {
            let state = project.ledger.state();
            let Ok(known) = state.branch_by_id(branch) else { return Ok(()) };
            known.history.seals().last().and_then(|seal| seal.end)
        };
        let unsealed = status.wal_end.zip(sealed).map_or(0, |(end, sealed)| end.0.saturating_sub(sealed.0));
        if unsealed < UNSEALED_WAL_MAX {
            return Ok(());
        }
        let cell = project.cell(branch);
        // Somebody works on the branch: there is a next time.
        let Ok(_ops) = cell.ops.clone().try_lock_owned() else { return Ok(()) };
        let line = project.line(branch)?.line;
        let sealed = self.seal_locked(project, branch, LayerId::generate()).await?;
        self.note_seal(project, branch, line, sealed).await?;
        metrics::counter!("ebb_timeline_cuts_total").increment(1);
        Ok(())
    }
}
