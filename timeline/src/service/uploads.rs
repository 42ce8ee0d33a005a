//! Brings every layer that something keeps into the bucket, oldest of a chain first.
//!
//! What is pending is not stored: it is what is reachable and not known to be in the bucket. After a start that is
//! everything, and each layer costs one question to the bucket.

use std::sync::Arc;
use std::time::Duration;

use ebb_types::{BranchId, LayerId};

use super::{Project, Service};
use crate::Result;

/// LIMIT: a bucket that is away is asked again soon at first, then once a minute.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(60);

impl Service {
    /// Uploads what is pending, whenever something is.
    pub(super) async fn upload_forever(self: &Arc<Self>) {
        let mut wait = RETRY_MIN;
        loop {
            match self.upload_pending().await {
                Ok(()) => {
                    wait = RETRY_MIN;
                    self.layers_changed.notified().await;
                }
                Err(error) => {
                    metrics::counter!("ebb_timeline_uploads_total", "result" => "failed").increment(1);
                    self.report("uploading layers", &error);
                    // Jitter: nodes that lost one bucket together should not come back together.
                    tokio::time::sleep(wait.mul_f64(rand::random_range(0.75..1.25))).await;
                    wait = (wait * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// Uploads every reachable layer that is local and not in the bucket yet.
    ///
    /// # Errors
    /// The first failure, after all others were tried.
    pub(super) async fn upload_pending(&self) -> Result<()> {
        let wanted: Vec<LayerId> =
            self.all_projects().iter().flat_map(|project| project.ledger.state().layers()).collect();
        let mut failed = None;
        let mut pending = wanted.into_iter().filter(|layer| !self.uploaded.lock().contains(layer)).collect::<Vec<_>>();
        pending.sort_unstable();
        pending.dedup();
        metrics::gauge!("ebb_timeline_uploads_pending").set(pending.len() as f64);
        let mut left = pending.len();
        for layer in pending {
            match self.upload_chain(layer).await {
                Ok(()) => left -= 1,
                Err(error) => failed = failed.or(Some(error)),
            }
            metrics::gauge!("ebb_timeline_uploads_pending").set(left as f64);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Brings to the bucket what a line's archive begins at: with it and the WAL since, every commit can be replayed.
    pub(super) async fn upload_base(&self, project: &Project, branch: BranchId) -> Result<()> {
        let base = {
            let state = project.ledger.state();
            let known = state.branch_by_id(branch)?;
            known.history.seals().iter().find(|seal| seal.line == known.line).map_or(known.head, |seal| seal.layer)
        };
        if self.uploaded.lock().contains(&base) {
            return Ok(());
        }
        self.upload_chain(base).await
    }

    pub(super) async fn upload_chain(&self, layer: LayerId) -> Result<()> {
        for layer in self.node.chain(layer).await? {
            if self.uploaded.lock().contains(&layer) {
                continue;
            }
            self.node.upload(layer).await?;
            metrics::counter!("ebb_timeline_uploads_total", "result" => "ok").increment(1);
            self.uploaded.lock().insert(layer);
        }
        // Not local, hence fetched from there or made elsewhere: the bucket has it.
        self.uploaded.lock().insert(layer);
        Ok(())
    }
}
