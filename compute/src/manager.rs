//! Starts, finds again and stops units, from the side of `ebb serve`.

use std::path::{Path, PathBuf};

use ebb_types::{BranchId, LayerId};

use crate::Result;
use crate::control::Status;

/// What a unit must know to run. Written to `branches/<id>/unit.json`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UnitSpec {
    /// Which branch.
    pub branch: BranchId,
    /// The branch's directory on this node (`wal/`, `volume.json`, `run/`, `postgres.log`, `roles.json` are in it).
    pub branch_dir: PathBuf,
    /// The node's layers.
    pub layers_dir: PathBuf,
    /// Directory of the server binaries.
    pub pg_bin: PathBuf,
    /// Settings beyond the generated ones.
    pub settings: Vec<(String, String)>,
    /// Verifiers that must be set if the role has none yet: (role, SCRAM verifier). Applied after the start.
    pub initial_roles: Vec<(String, String)>,
}

/// A running unit.
#[derive(Debug, Clone)]
pub struct Unit {
    branch_dir: PathBuf,
}

impl Unit {
    /// Starts a unit (the program `exe` with the argument `compute`) and waits until Postgres accepts connections.
    /// The volume must exist. If a unit of this branch still runs, it is adopted instead.
    pub async fn start(_exe: &Path, _spec: &UnitSpec) -> Result<Self> {
        todo!("helper D")
    }

    /// Finds the unit of a branch directory, if one is alive and answers.
    pub async fn adopt(_branch_dir: &Path) -> Result<Option<Self>> {
        todo!("helper D")
    }

    /// The Unix socket of Postgres, from the host's view.
    pub fn socket(&self) -> PathBuf {
        self.branch_dir.join("run/.s.PGSQL.5432")
    }

    /// Asks how it is.
    pub async fn status(&self) -> Result<Status> {
        todo!("helper D")
    }

    /// Seals the volume while Postgres goes on; see [`crate::control::Request::Seal`]. Answers (layer, new).
    pub async fn seal(&self, _layer: LayerId) -> Result<(LayerId, bool)> {
        todo!("helper D")
    }

    /// Stops and seals; see [`crate::control::Request::Stop`]. The unit is gone when this returns.
    pub async fn stop(&self, _layer: LayerId) -> Result<(LayerId, bool)> {
        todo!("helper D")
    }

    /// Ends the unit without sealing.
    pub async fn discard(&self) -> Result<()> {
        todo!("helper D")
    }

    /// Returns when the unit is gone, however it ended.
    pub async fn gone(&self) {
        todo!("helper D")
    }
}
