//! Layers whose seals have happened on this machine and that may not be complete yet.
//!
//! A unit answers a seal as soon as it cannot be undone, and completes the layer after; if it is killed first, whoever
//! opens the volume next does. So whoever needs a layer asks [`LocalNode::settle`] before looking for it.

use std::time::{Duration, Instant};

use ebb_compute::manager::Unit;
use ebb_storage::volume::Volume;
use ebb_types::{BranchId, LayerId};

use super::{LocalNode, blocking};
use crate::{Error, Result};

/// LIMIT: completing a layer syncs what was written since the last seal, at worst gigabytes to a slow disk.
const DEADLINE: Duration = Duration::from_secs(300);

/// How soon to look again while a unit comes or goes.
const PAUSE: Duration = Duration::from_millis(5);

impl LocalNode {
    /// Notes that a branch's unit has sealed this layer.
    pub(super) fn note_sealed(&self, layer: LayerId, branch: BranchId) {
        self.pending.lock().insert(layer, branch);
    }

    /// Notes what was sealed before this process began.
    pub(super) async fn find_pending(&self, branch: BranchId) -> Result<()> {
        let dirs = self.dirs(branch);
        let found = blocking("looking for unfinished seals", move || Ok(Volume::pending(&dirs)?)).await?;
        self.pending.lock().extend(found.into_iter().map(|layer| (layer, branch)));
        Ok(())
    }

    /// Waits until a layer is complete, if it was sealed on this machine.
    ///
    /// # Errors
    /// Whatever keeps it from being completed.
    ///
    /// # Cancel safety
    /// Safe: completing goes on.
    pub(super) async fn settle(&self, layer: LayerId) -> Result<()> {
        let Some(branch) = self.pending.lock().get(&layer).copied() else { return Ok(()) };
        let until = Instant::now() + DEADLINE;
        while !self.store.layers_dir().join(layer.to_string()).join("manifest").exists() {
            match self.finish_seals(branch).await {
                Ok(()) => break,
                // Just now a unit takes the volume, or lets go of it.
                Err(error) if Instant::now() >= until => return Err(error),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
        self.pending.lock().remove(&layer);
        Ok(())
    }

    async fn finish_seals(&self, branch: BranchId) -> Result<()> {
        let Some(unit) = self.unit(branch) else { return self.finish_without_unit(branch).await };
        match unit.finish_seals().await {
            Ok(()) => Ok(()),
            // It is lost: nobody but this, or the next unit, will.
            Err(ebb_compute::Error::Gone) => self.finish_without_unit(branch).await,
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the volume, which finishes its seals, unless there is a unit after all: then that one does.
    async fn finish_without_unit(&self, branch: BranchId) -> Result<()> {
        let turn = self.turn(branch).await;
        if let Some(unit) = Unit::adopt(&self.branch_dir(branch)).await? {
            return Ok(unit.finish_seals().await?);
        }
        let dirs = self.dirs(branch);
        blocking("finishing seals", move || {
            let _turn = turn;
            match Volume::exists(&dirs) {
                true => Volume::open(&dirs).map(drop).map_err(Error::from),
                false => Ok(()),
            }
        })
        .await
    }
}
