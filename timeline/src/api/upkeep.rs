//! The JSON of what is done for branches by itself, and of drills.

use ebb_types::{BranchName, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Result;
use crate::drill::{Probe, Report};
use crate::service::seconds_to_ms;
use crate::upkeep::{self, Schedule, UpkeepChange};

/// What is done for a branch by itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Upkeep {
    /// How many automatic checkpoints are kept; all zero: none are made, and none go.
    #[serde(default)]
    pub checkpoints: Schedule,
    /// Seconds between two drills; absent: none are made by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_every_seconds: Option<f64>,
    /// What each drill of the branch asks.
    #[serde(default)]
    pub probes: Vec<Probe>,
}

impl From<&upkeep::Upkeep> for Upkeep {
    fn from(upkeep: &upkeep::Upkeep) -> Self {
        Self {
            checkpoints: upkeep.checkpoints,
            drill_every_seconds: upkeep.drill_every.map(|every| every.as_secs_f64()),
            probes: upkeep.probes.clone(),
        }
    }
}

/// What is to be done for a branch by itself from now on; what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeUpkeep {
    /// How many automatic checkpoints are kept; all zero: none are made, and none go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<Schedule>,
    /// Seconds between two drills; 0: none are made by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_every_seconds: Option<f64>,
    /// What each drill of the branch asks, instead of what it asked until now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probes: Option<Vec<Probe>>,
}

impl ChangeUpkeep {
    /// As ledgers have it.
    ///
    /// # Errors
    /// If the seconds are no length of time.
    pub(crate) fn into_change(self) -> Result<UpkeepChange> {
        let drill_every_ms = self.drill_every_seconds.map(seconds_to_ms).transpose()?;
        Ok(UpkeepChange { checkpoints: self.checkpoints, drill_every_ms, probes: self.probes })
    }
}

/// Body of `POST …/drills`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrillBranch {
    /// A checkpoint's name, a time or an LSN; default: the head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// What is asked besides what the branch's policy says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probe>,
}

/// A drill that is over. A failed one is answered as a problem, and listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Drill {
    /// The branch.
    #[schema(value_type = String)]
    pub branch: BranchName,
    /// What was restored: `head`, a checkpoint's name, a time or an LSN.
    pub point: String,
    /// When it ended.
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// Who asked for it; `ebb`: the branch's policy.
    pub actor: String,
    /// Whether the point could be restored out of the bucket alone, and is what it should be.
    pub passed: bool,
    /// What is wrong, if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// What was measured.
    #[serde(flatten)]
    pub report: Report,
}

/// Answer to `GET …/drills`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DrillList {
    /// The newest drills of the branch, oldest first; the ledger has all.
    pub drills: Vec<Drill>,
}

/// What a rule lets go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Expired {
    /// A checkpoint, `shop/prod@auto-…`, or a rescue branch, `shop/rescue-prod-1`.
    pub what: String,
    /// The rule.
    pub why: String,
}
