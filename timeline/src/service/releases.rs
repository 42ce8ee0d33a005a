//! Releases: deploying an artifact on `prod`, and taking code and data back together.
//!
//! `ebb rollback --to v1` means: `v1`'s code, and the data as it was just before the next release touched anything.
//! What came after that moment is not lost: the old head of `prod` becomes a rescue branch.

use std::path::PathBuf;
use std::sync::Arc;

use ebb_types::{BranchName, CheckpointName, LayerId, Point, ProjectName};

use super::views::{release_view, rollback_view};
use super::{Answer, Caller, DiffRequest, Project, Service};
use crate::api::types as api;
use crate::artifact::MIGRATIONS_DIR;
use crate::decide::{Ask, Found, PROD, deployed_now, plan};
use crate::deploy::Part;
use crate::event::Plan;
use crate::machine::{Compute, ReleaseStage};
use crate::release_file::ReleaseFile;
use crate::state::{ProjectState, Release};
use crate::{Error, Refusal, Result};

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
        let in_service = || {
            let state = project.ledger.state();
            let release = deployed_now(&state, &artifact)?;
            Some(Answer { value: release_view(&state, release, true), new: false })
        };
        if let Some(answer) = in_service() {
            return Ok(answer);
        }
        let (file, migrations) = self.read_release(&project, &artifact).await?;
        let ask = Ask::Release { artifact: artifact.clone(), migrations, file: file.map(Box::new) };
        let acted = match self.act(&project, caller, ask).await {
            // Somebody else has asked for the same meanwhile.
            Err(Error::Refused(Refusal::Deployed { .. })) if let Some(answer) = in_service() => return Ok(answer),
            acted => acted?,
        };
        let Plan::Release { release, .. } = acted.plan else {
            return Err(Refusal::TooLate(format!("the operation is a {}", acted.plan.act())).into());
        };
        let state = project.ledger.state();
        let release = state.release_by_id(release).ok_or(Error::Lost("the release"))?;
        match &release.fault {
            None => Ok(Answer { value: release_view(&state, release, true), new: acted.new }),
            Some(fault) => Err(Error::Release {
                release: release.name.clone(),
                fault: fault.clone(),
                advice: advice(&project, &state, release),
            }),
        }
    }

    /// What an artifact says of itself, and the names of its migrations.
    async fn read_release(&self, project: &Project, artifact: &str) -> Result<(Option<ReleaseFile>, Vec<String>)> {
        let file = self.artifacts.described(artifact).await?;
        if let Some(file) = &file {
            self.check_secrets(project, file)?;
        }
        let dir = file.as_ref().map_or(MIGRATIONS_DIR, |file| file.migrations.as_str());
        let migrations = self.artifacts.migrations(artifact, dir).await?;
        for migration in &migrations {
            crate::migrate::fit(migration)?;
        }
        Ok((file, migrations.into_iter().map(|one| one.name).collect()))
    }

    /// Tries an artifact on a copy of `prod`, and changes nothing.
    ///
    /// # Errors
    /// If it cannot be tried; what it finds is no error.
    pub async fn rehearse(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        request: api::CreateRelease,
    ) -> Result<Answer<api::Rehearsed>> {
        let project = self.project(project)?;
        self.check_disk()?;
        let taken = self.artifacts.take(&request.artifact).await?;
        let (file, _) = self.read_release(&project, &taken.name).await?;
        self.seal_prod(&project).await?;
        let ask = Ask::Rehearse { artifact: taken.name.clone(), file: Box::new(file.unwrap_or_default()) };
        let acted = self.act(&project, caller, ask).await?;
        let state = project.ledger.state();
        let scratch = acted.plan.scratch();
        let known = state.rehearsals.iter().rev().find(|(of, _)| Some(*of) == scratch);
        let (_, report) = known.ok_or(Error::Lost("the rehearsal"))?;
        let value = api::Rehearsed { artifact: taken.name.clone(), report: report.as_ref().clone() };
        Ok(Answer { value, new: acted.new })
    }

    /// What `prod` holds by now is its recorded head.
    async fn seal_prod(self: &Arc<Self>, project: &Arc<Project>) -> Result<()> {
        self.claim(project).await?;
        let prod = project.ledger.state().branch(PROD)?.0;
        let cell = project.cell(prod);
        let _ops = self.lock(&cell).await?;
        let line = project.line(prod)?.line;
        let sealed = self.seal_locked(project, prod, LayerId::generate()).await?;
        self.note_seal(project, prod, line, sealed).await
    }

    /// One release, with what its deploy found out.
    ///
    /// # Errors
    /// If there is no such release.
    pub async fn release(&self, project: &str, name: &str) -> Result<api::Release> {
        let state = self.project(project)?.ledger.state();
        Ok(release_view(&state, state.release(name)?, true))
    }

    /// All releases, oldest first.
    ///
    /// # Errors
    /// If there is no such project.
    pub async fn releases(&self, project: &str) -> Result<Vec<api::Release>> {
        let state = self.project(project)?.ledger.state();
        Ok(state.releases.iter().map(|release| release_view(&state, release, false)).collect())
    }

    /// Tells what a rollback would do, and does nothing.
    ///
    /// # Errors
    /// As the rollback would.
    pub async fn plan_rollback(self: &Arc<Self>, project: &str, request: &api::Rollback) -> Result<api::RollbackPlan> {
        let project = self.project(project)?;
        let (to, part) = (request.to.as_str(), request.part()?);
        let ask = self.rollback_ask(&project, to, part).await?;
        let state = project.ledger.state();
        let mut view = rollback_view(&state, &plan(&state, &ask, &self.fresh())?)?;
        if request.rows && part.has_data() {
            view.written = Some(self.written_since(&project, &view.checkpoint).await);
        }
        Ok(view)
    }

    /// What was written on `prod` since a checkpoint. That it cannot be told is no reason not to go back.
    async fn written_since(self: &Arc<Self>, project: &Project, checkpoint: &CheckpointName) -> api::Written {
        let prod: BranchName = PROD.parse().expect("the name of the branch that releases go to is a name");
        let request = DiffRequest {
            from: (prod.clone(), Point::Checkpoint(checkpoint.clone())),
            to: (prod, Point::Head),
            database: None,
            table: None,
            samples: Some(0),
        };
        match self.diff(project.name.as_str(), request).await {
            Ok(diff) => api::Written {
                tables: diff.tables.into_iter().map(api::TableWritten::from).collect(),
                objects: diff.objects.into_iter().map(|object| format!("{} {}", object.kind, object.name)).collect(),
                unknown: None,
            },
            Err(error) => api::Written { unknown: Some(error.chain()), ..api::Written::default() },
        }
    }

    /// Takes code and data back to a release.
    ///
    /// # Errors
    /// If there is no way back to it.
    pub async fn rollback(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        request: &api::Rollback,
    ) -> Result<Answer<api::RolledBack>> {
        let project = self.project(project)?;
        let (to, part) = (request.to.as_str(), request.part()?);
        let replayed = match &caller.key {
            Some(key) => project.ledger.state().key(key)?.is_some(),
            None => false,
        };
        // A repetition is answered by its key, also now that there is nothing left to roll back.
        let ask = if replayed { plain_ask(to, part) } else { self.rollback_ask(&project, to, part).await? };
        let acted = self.act(&project, caller, ask).await?;
        let Plan::Rollback { rescue, .. } = &acted.plan else {
            return Err(Refusal::TooLate(format!("the operation is a {}", acted.plan.act())).into());
        };
        let state = project.ledger.state();
        let value = api::RolledBack {
            plan: rollback_view(&state, &acted.plan)?,
            rescue: match part.has_data() {
                true => Some(self.branch_view(&project, &state, rescue.branch)?),
                false => None,
            },
        };
        Ok(Answer { value, new: acted.new })
    }

    /// The request with what can be known of `prod` now, to tell what will be set aside.
    async fn rollback_ask(&self, project: &Project, to: &str, part: Part) -> Result<Ask> {
        let state = project.ledger.state();
        let Plan::Rollback { branch, layer, .. } = plan(&state, &plain_ask(to, part), &self.fresh())? else {
            return Err(Error::Lost("the plan"));
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
            part,
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
        let link = self.current_link(project)?;
        let Some(release) = state.code.and_then(|code| state.release_by_id(code)) else {
            // The first release was taken back: there is no code.
            crate::files::may_be_switched(&link)?;
            return crate::files::remove_file(&link);
        };
        let code = self.artifacts.ensure_local(&release.artifact).await?;
        let code = std::path::absolute(&code).unwrap_or(code);
        tokio::task::spawn_blocking(move || crate::files::switch_symlink(&link, &code))
            .await
            .map_err(|_| Error::Lost("switching the code"))?
    }
}

fn plain_ask(to: &str, part: Part) -> Ask {
    Ask::Rollback { to: to.to_owned(), part, lsn: None, next_xid: None, layers: 0 }
}

/// How things stand after a release that does not work, and what to do.
fn advice(project: &Project, state: &ProjectState, release: &Release) -> String {
    let (name, checkpoint) = (&project.name, &release.checkpoint);
    let code = state.code.and_then(|code| state.release_by_id(code)).map(|code| code.name.as_str());
    let before = state.releases.iter().rev().skip_while(|other| other.id != release.id).skip(1);
    let before = before.filter(|other| other.stage == ReleaseStage::Deployed).map(|other| other.name.as_str()).next();
    match release.stage {
        ReleaseStage::RolledBack => {
            let rescue = release.found.rescue.as_ref().map(|rescue| format!(" on {name}/{rescue}")).unwrap_or_default();
            format!("Code and data are as before it. What was written meanwhile is kept{rescue}.")
        }
        ReleaseStage::Deployed => match before {
            Some(before) => format!(
                "It is in service. What going back would set aside: ebb rollback {name} --to {before} --plan. Mend it and \
                 release again, or go back with that, or with --code-only."
            ),
            None => format!(
                "It is in service, and the first. Mend it and release again; the data alone goes back with: ebb branch \
                 restore {name}/prod --to {checkpoint}."
            ),
        },
        ReleaseStage::Failed if release.checkpointed => format!(
            "The code in service is {}. Migrations of it that were applied stay, until: ebb branch restore {name}/prod \
             --to {checkpoint}.",
            code.unwrap_or("none")
        ),
        ReleaseStage::Failed | ReleaseStage::Deploying => {
            "Neither code nor data of prod were touched. Mend it and release again.".to_owned()
        }
    }
}
