//! Releases: deploying an artifact on `prod`, and taking code and data back together.
//!
//! `ebb rollback --to v1` means: `v1`'s code, and the data as it was just before the next release touched anything.
//! What came after that moment is not lost: the old head of `prod` becomes a rescue branch.

use std::path::PathBuf;
use std::sync::Arc;

use ebb_types::ProjectName;

use super::views::{release_view, rollback_view};
use super::{Answer, Caller, Project, Service};
use crate::api::types as api;
use crate::decide::{Ask, Found, plan};
use crate::event::Plan;
use crate::machine::{Compute, ReleaseStage};
use crate::state::ProjectState;
use crate::{Refusal, Result};

impl Service {
    /// Deploys an artifact. The artifact that is deployed already is answered with its release.
    ///
    /// # Errors
    /// `Migration` if one fails: the release has failed, the code is the old one, earlier migrations stay.
    pub async fn create_release(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        request: api::CreateRelease,
    ) -> Result<Answer<api::Release>> {
        let project = self.project(project)?;
        crate::files::may_be_switched(&self.current_link(&project)?)?;
        self.check_disk()?;
        // As long as this lives the artifact is not collected; once the release is recorded, that keeps it.
        let taken = self.artifacts.take(&request.artifact).await?;
        let artifact = taken.name.clone();
        if let Some(deployed) = deployed_now(&project.ledger.state(), &artifact) {
            return Ok(Answer { value: deployed, new: false });
        }
        let migrations = self.artifacts.migrations(&artifact).await?.into_iter().map(|one| one.name).collect();
        let acted = self.act(&project, caller, Ask::Release { artifact, migrations }).await?;
        match acted.plan {
            Plan::Release { release, .. } => {
                let state = project.ledger.state();
                let release = state.release_by_id(release).ok_or(crate::Error::Lost("the release"))?;
                Ok(Answer { value: release_view(&state, release), new: acted.new })
            }
            plan => Err(Refusal::TooLate(format!("the operation is a {}", plan.act())).into()),
        }
    }

    /// All releases, oldest first.
    ///
    /// # Errors
    /// If there is no such project.
    pub async fn releases(&self, project: &str) -> Result<Vec<api::Release>> {
        let state = self.project(project)?.ledger.state();
        Ok(state.releases.iter().map(|release| release_view(&state, release)).collect())
    }

    /// Tells what a rollback would do, and does nothing.
    ///
    /// # Errors
    /// As the rollback would.
    pub async fn plan_rollback(&self, project: &str, to: &str) -> Result<api::RollbackPlan> {
        let project = self.project(project)?;
        let ask = self.rollback_ask(&project, to).await?;
        let state = project.ledger.state();
        rollback_view(&state, &plan(&state, &ask, &self.fresh())?)
    }

    /// Takes code and data back to a release.
    ///
    /// # Errors
    /// If there is no way back to it.
    pub async fn rollback(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        to: &str,
    ) -> Result<Answer<api::RolledBack>> {
        let project = self.project(project)?;
        let replayed = match &caller.key {
            Some(key) => project.ledger.state().key(key)?.is_some(),
            None => false,
        };
        // A repetition is answered by its key, also now that there is nothing left to roll back.
        let ask = if replayed { plain_ask(to) } else { self.rollback_ask(&project, to).await? };
        let acted = self.act(&project, caller, ask).await?;
        let Plan::Rollback { rescue, .. } = &acted.plan else {
            return Err(Refusal::TooLate(format!("the operation is a {}", acted.plan.act())).into());
        };
        let state = project.ledger.state();
        let value = api::RolledBack {
            plan: rollback_view(&state, &acted.plan)?,
            rescue: self.branch_view(&project, &state, rescue.branch)?,
        };
        Ok(Answer { value, new: acted.new })
    }

    /// The request with what can be known of `prod` now, to tell what will be set aside.
    async fn rollback_ask(&self, project: &Project, to: &str) -> Result<Ask> {
        let state = project.ledger.state();
        let Plan::Rollback { branch, layer, .. } = plan(&state, &plain_ask(to), &self.fresh())? else {
            return Err(crate::Error::Lost("the plan"));
        };
        let awake = matches!(project.cell(branch).inner.lock().compute, Compute::Active(_));
        // Only to inform: a rollback is most wanted when Postgres answers badly.
        let now = match awake {
            true => self.node.positions(branch).await.unwrap_or_default(),
            false => Found { lsn: self.node.redo(project.line(branch)?.head).await, ..Found::default() },
        };
        let head = project.line(branch)?.head;
        let chain = self.node.chain(head).await.unwrap_or_default();
        let beyond = chain.iter().rev().take_while(|&&of_chain| of_chain != layer).count() as u64;
        Ok(Ask::Rollback {
            to: to.to_owned(),
            lsn: now.lsn,
            next_xid: now.next_xid,
            layers: if chain.contains(&layer) { beyond } else { 0 } + u64::from(awake),
        })
    }

    /// The symlink a project's releases switch.
    pub(super) fn current_link(&self, project: &Project) -> Result<PathBuf> {
        let state = project.ledger.state();
        let facts = state.facts()?;
        Ok(facts.current.clone().unwrap_or_else(|| self.project_dir(&facts.name).join("current")))
    }

    pub(super) fn project_dir(&self, name: &ProjectName) -> PathBuf {
        self.config.data_dir.join("projects").join(name.as_str())
    }

    /// Points `current` at the code that is recorded: whichever release that is by now.
    pub(super) async fn activate(&self, project: &Project) -> Result<()> {
        let state = project.ledger.state();
        let Some(release) = state.code.and_then(|code| state.release_by_id(code)) else {
            return Ok(());
        };
        let code = self.artifacts.ensure_local(&release.artifact).await?;
        let link = self.current_link(project)?;
        let code = std::path::absolute(&code).unwrap_or(code);
        tokio::task::spawn_blocking(move || crate::files::switch_symlink(&link, &code))
            .await
            .map_err(|_| crate::Error::Lost("switching the code"))?
    }
}

fn plain_ask(to: &str) -> Ask {
    Ask::Rollback { to: to.to_owned(), lsn: None, next_xid: None, layers: 0 }
}

/// The release in service, if it is of this artifact.
fn deployed_now(state: &ProjectState, artifact: &str) -> Option<api::Release> {
    let release = state.code.and_then(|code| state.release_by_id(code))?;
    let same = release.artifact == artifact && release.stage == ReleaseStage::Deployed;
    // A failed release since then may have changed the data: deploying again is then meant.
    let latest = state.releases.iter().rev().find(|other| other.stage != ReleaseStage::RolledBack);
    (same && latest.map(|latest| latest.id) == Some(release.id)).then(|| release_view(state, release))
}
