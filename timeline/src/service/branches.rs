//! Branches and their checkpoints, as the API asks for them.

use std::path::PathBuf;
use std::sync::Arc;

use ebb_compute::control::Durability;
use ebb_compute::postgres::DATABASE;
use ebb_types::{BranchId, LayerId, Lsn, Point};

use super::views::{checkpoint_view, known_since, seconds_to_ms};
use super::{Answer, Caller, Project, Service};
use crate::api::types as api;
use crate::decide::{Ask, PROD};
use crate::event::Plan;
use crate::machine::Compute;
use crate::{Refusal, Result};

/// An act's plan is of another kind than was asked for: its key was used for another act.
pub(super) fn other_act(plan: &Plan) -> crate::Error {
    Refusal::TooLate(format!("the operation is a {}", plan.act())).into()
}

/// Reads a point as a request writes it.
pub(super) fn parse_point(text: &str) -> Result<Point> {
    text.parse().map_err(|invalid: ebb_types::InvalidName| Refusal::Invalid(invalid.to_string()).into())
}

impl Service {
    /// All branches of a project, `prod` first.
    ///
    /// # Errors
    /// If there is no such project.
    pub async fn branches(&self, project: &str) -> Result<Vec<api::Branch>> {
        let project = self.project(project)?;
        let mut views = self.branch_views(&project, &project.ledger.state())?;
        self.add_stored(&mut views).await;
        Ok(views)
    }

    /// One branch.
    ///
    /// # Errors
    /// `NotFound` with the nearest names.
    pub async fn branch(&self, project: &str, branch: &str) -> Result<api::Branch> {
        let project = self.project(project)?;
        let state = project.ledger.state();
        let (id, _) = state.branch(branch)?;
        let mut view = self.branch_view(&project, &state, id)?;
        self.add_stored(std::slice::from_mut(&mut view)).await;
        Ok(view)
    }

    /// Makes a branch from a point.
    ///
    /// # Errors
    /// If the source or point does not exist, or the name is taken.
    pub async fn create_branch(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        request: api::CreateBranch,
    ) -> Result<Answer<api::Branch>> {
        let project = self.project(project)?;
        let (from, point) = match request.from {
            Some(from) if from.at.project != project.name => {
                let why = format!("a branch of {:?} cannot be made from one of {:?}", project.name, from.at.project);
                return Err(Refusal::Invalid(why).into());
            }
            Some(from) => (from.at.branch, from.point),
            None => (PROD.parse().map_err(|_| Refusal::Invalid("no branch".to_owned()))?, Point::Head),
        };
        let acted = self.act(&project, caller, Ask::CreateBranch { name: request.name, from, point }).await?;
        match acted.plan {
            Plan::CreateBranch { branch, .. } => {
                let value = self.branch_view(&project, &project.ledger.state(), branch)?;
                Ok(Answer { value, new: acted.new })
            }
            plan => Err(other_act(&plan)),
        }
    }

    /// Changes a branch's policy.
    ///
    /// # Errors
    /// If there is no such branch, or the value makes no sense.
    pub async fn change_branch(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        branch: &str,
        request: api::ChangeBranch,
    ) -> Result<api::Branch> {
        let project = self.project(project)?;
        let idle_suspend_ms = request.idle_suspend_seconds.map(seconds_to_ms).transpose()?;
        let window_ms = request.window_seconds.map(seconds_to_ms).transpose()?;
        let durability = request.durability;
        if durability == Some(Durability::Bucket) {
            self.upload_base(&project, project.ledger.state().branch(branch)?.0).await?;
        }
        let upkeep = request.upkeep.map(api::ChangeUpkeep::into_change).transpose()?.unwrap_or_default();
        let (branch_name, pinned, pool_size) = (branch.to_owned(), request.pinned, request.pool_size);
        let allow = request.allow;
        let ask = Ask::ChangeBranch {
            branch: branch_name,
            idle_suspend_ms,
            window_ms,
            durability,
            upkeep,
            pinned,
            allow,
            pool_size,
        };
        self.act(&project, caller, ask).await?;
        let state = project.ledger.state();
        let (id, _) = state.branch(branch)?;
        if let Some(durability) = durability.filter(|_| self.is_awake(&project, id)) {
            // A compute that starts meanwhile starts with what is recorded.
            self.node.set_durability(id, durability).await?;
        }
        self.branch_view(&project, &state, id)
    }

    /// Deletes a branch, its checkpoints, and what this node has of it.
    ///
    /// # Errors
    /// If it is `prod`, a rescue branch before its date, or busy.
    pub async fn delete_branch(self: &Arc<Self>, caller: &Caller, project: &str, branch: &str) -> Result<()> {
        let project = self.project(project)?;
        self.act(&project, caller, Ask::DeleteBranch { branch: branch.to_owned(), rule: None }).await?;
        Ok(())
    }

    /// Sets a branch to a point of its history; the old head becomes a rescue branch.
    ///
    /// # Errors
    /// If there is no such branch or checkpoint, or it is busy.
    pub async fn restore(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        branch: &str,
        request: api::RestoreBranch,
    ) -> Result<Answer<api::Restored>> {
        let project = self.project(project)?;
        let ask = Ask::Restore { branch: branch.to_owned(), to: parse_point(&request.to)? };
        let acted = self.act(&project, caller, ask).await?;
        match acted.plan {
            Plan::Restore { branch, rescue, .. } => {
                let state = project.ledger.state();
                let value = api::Restored {
                    branch: self.branch_view(&project, &state, branch)?,
                    rescue: self.branch_view(&project, &state, rescue.branch)?,
                };
                Ok(Answer { value, new: acted.new })
            }
            plan => Err(other_act(&plan)),
        }
    }

    /// All checkpoints of a branch, oldest first.
    ///
    /// # Errors
    /// If there is no such branch.
    pub async fn checkpoints(&self, project: &str, branch: &str) -> Result<Vec<api::Checkpoint>> {
        let state = self.project(project)?.ledger.state();
        let (id, branch) = state.branch(branch)?;
        let view = |checkpoint| checkpoint_view(branch, checkpoint, self.clock.now());
        let mut views: Vec<_> = branch.checkpoints.iter().map(view).collect();
        self.add_sizes(&state, id, &mut views).await;
        Ok(views)
    }

    /// Names the head of a branch.
    ///
    /// # Errors
    /// If there is no such branch, or the name is taken.
    pub async fn create_checkpoint(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        branch: &str,
        request: api::CreateCheckpoint,
    ) -> Result<Answer<api::Checkpoint>> {
        let project = self.project(project)?;
        let ask = Ask::CreateCheckpoint { branch: branch.to_owned(), name: request.name, automatic: false };
        let acted = self.act(&project, caller, ask).await?;
        match acted.plan {
            Plan::CreateCheckpoint { branch, name, .. } => {
                let state = project.ledger.state();
                let branch = state.branch_by_id(branch)?;
                let value = checkpoint_view(branch, branch.checkpoint(name.as_str())?, self.clock.now());
                Ok(Answer { value, new: acted.new })
            }
            plan => Err(other_act(&plan)),
        }
    }

    /// Takes a checkpoint's name away.
    ///
    /// # Errors
    /// If there is none, or a release needs it.
    pub async fn delete_checkpoint(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        branch: &str,
        name: &str,
    ) -> Result<()> {
        let project = self.project(project)?;
        let ask = Ask::DeleteCheckpoint { branch: branch.to_owned(), name: name.to_owned(), rule: None };
        self.act(&project, caller, ask).await?;
        Ok(())
    }

    /// Writes a point out, as a plain data directory or as pg_dump does.
    ///
    /// # Errors
    /// If there is no such point, or something is there where it is to go.
    pub async fn export(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        branch: &str,
        request: api::Export,
    ) -> Result<Answer<api::Exported>> {
        let project = self.project(project)?;
        let point = request.point.as_deref().map_or(Ok(Point::Head), parse_point)?;
        if !request.dir.is_absolute() {
            return Err(Refusal::Invalid(format!("the path {:?} is not absolute", request.dir)).into());
        }
        let dump = request.format.map(|format| (format, request.database.unwrap_or_else(|| DATABASE.to_owned())));
        if dump.is_some() && point == Point::Head {
            self.seal_head(&project, branch).await?;
        }
        let ask = Ask::Export { branch: branch.to_owned(), point, dir: request.dir, dump };
        let acted = self.act(&project, caller, ask).await?;
        match acted.plan {
            Plan::Export { dir, .. } => {
                let value = api::Exported { bytes: exported_bytes(dir.clone()).await?, dir };
                Ok(Answer { value, new: acted.new })
            }
            plan => Err(other_act(&plan)),
        }
    }

    /// Makes the recorded head what the branch holds now.
    async fn seal_head(self: &Arc<Self>, project: &Arc<Project>, branch: &str) -> Result<()> {
        let (service, project) = (self.clone(), project.clone());
        let branch = project.ledger.state().branch(branch)?.0;
        self.tracked("sealing a branch", async move {
            let _ops = service.lock(&project.cell(branch)).await?;
            let line = project.line(branch)?.line;
            let sealed = service.seal_locked(&project, branch, LayerId::generate()).await?;
            match sealed {
                Some(_) => service.note_seal(&project, branch, line, sealed).await,
                None => Ok(()),
            }
        })
        .await
    }

    /// How a branch's compute is, and who uses it.
    ///
    /// # Errors
    /// If there is no such branch.
    pub async fn compute(&self, project: &str, branch: &str) -> Result<api::Compute> {
        let project = self.project(project)?;
        let (id, created_at) = project.ledger.state().branch(branch).map(|(id, branch)| (id, branch.created_at))?;
        let (state, since, keeps_awake, wakes, running) = {
            let cell = project.cell(id);
            let inner = cell.inner.lock();
            let since = known_since(inner.since_time, created_at);
            let running = matches!(inner.compute, Compute::Active(_));
            (inner.compute.as_str().to_owned(), since, inner.keeps_awake.clone(), inner.wakes, running)
        };
        let unit = if running { self.node.status(id).await } else { None };
        let (sessions, visits) = (self.clients.sessions(id), self.visit_views(id));
        Ok(api::Compute { state, since, unit, sessions, keeps_awake, wakes, visits })
    }

    /// Who is connected to a branch.
    ///
    /// # Errors
    /// If there is no such branch.
    pub fn list_clients(&self, project: &str, branch: &str) -> Result<api::ClientList> {
        let project = self.project(project)?;
        let (id, created_at) = project.ledger.state().branch(branch).map(|(id, branch)| (id, branch.created_at))?;
        let (state, since) = {
            let cell = project.cell(id);
            let inner = cell.inner.lock();
            (inner.compute.as_str().to_owned(), known_since(inner.since_time, created_at))
        };
        Ok(api::ClientList { state, since, clients: self.clients.sessions(id), visits: self.visit_views(id) })
    }

    /// Suspends a branch's compute now. Suspending one that sleeps changes nothing.
    ///
    /// # Errors
    /// If sessions that cannot be set aside keep it awake.
    pub async fn suspend_compute(
        self: &Arc<Self>,
        caller: &Caller,
        project: &str,
        branch: &str,
    ) -> Result<api::Compute> {
        let found = self.project(project)?;
        self.act(&found, caller, Ask::Suspend { branch: branch.to_owned() }).await?;
        self.compute(project, branch).await
    }

    /// Wakes a branch's compute now.
    ///
    /// # Errors
    /// If it does not come up.
    pub async fn wake_compute(self: &Arc<Self>, caller: &Caller, project: &str, branch: &str) -> Result<api::Compute> {
        let found = self.project(project)?;
        self.act(&found, caller, Ask::Wake { branch: branch.to_owned() }).await?;
        self.compute(project, branch).await
    }

    /// End of WAL of a branch's head, as far as that is cheaply known.
    pub(super) async fn end_of_wal(
        &self,
        project: &Project,
        branch: BranchId,
        sealed: Option<LayerId>,
    ) -> Result<Option<Lsn>> {
        if matches!(project.cell(branch).inner.lock().compute, Compute::Active(_)) {
            return Ok(self.node.status(branch).await.and_then(|status| status.wal_end));
        }
        let head = match sealed {
            Some(layer) => layer,
            None => project.line(branch)?.head,
        };
        Ok(self.node.redo(head).await)
    }
}

async fn exported_bytes(path: PathBuf) -> Result<u64> {
    let measure = move || match std::fs::metadata(&path) {
        Ok(found) if found.is_file() => Ok(found.len()),
        _ => crate::files::tree_bytes(&path),
    };
    tokio::task::spawn_blocking(measure).await.map_err(|_| crate::Error::Lost("counting an export"))?
}
