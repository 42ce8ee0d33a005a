//! Imports: operations that take long, and that somebody watches, cuts over or cancels.
//!
//! What an import is about is in the ledger; how far it is, and the password of its source, are in memory only. So an
//! import that is interrupted is undone: nothing of it stays, and it is begun anew.
//!
//! ```text
//!   begun (entry) ─► copied ─► settled ─► layer, branch (entry) ─► done
//!      │               └ failed, cancelled, interrupted: undone, everything removed
//!      └ of a project that is made with it: entry 0 of that project's ledger; undone, the project is deleted
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use ebb_compute::import::{Counted, Phase, Progress, Seen, Settlement};
use ebb_types::{BranchId, BranchName, Hint as _, Lsn, OperationId, ProjectId, ProjectName, Timestamp};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::projects::Moving;
use super::saga::{Driven, count};
use super::{Answer, Caller, Project, Service};
use crate::api::types as api;
use crate::decide::{self, Ask, Command, PROD, decide};
use crate::event::{Origin, OriginKind, Plan, Step};
use crate::node::{ImportFrom, ImportJob, ImportRequest};
use crate::{Error, Refusal, Result};

/// LIMIT: imports that ended and can still be asked about; more are in the ledgers.
const ENDED_MAX: usize = 64;

/// The imports that this process carries out, or has.
#[derive(Debug, Default)]
pub(super) struct Imports(Mutex<BTreeMap<OperationId, Arc<Import>>>);

impl Imports {
    fn admit(&self, import: Arc<Import>) {
        let mut imports = self.0.lock();
        let ended: Vec<_> = imports.values().filter(|one| one.outcome.lock().is_some()).map(|one| one.op).collect();
        // Identifiers grow with time.
        for op in ended.iter().take((ended.len() + 1).saturating_sub(ENDED_MAX)) {
            imports.remove(op);
        }
        imports.insert(import.op, import);
    }

    fn of(&self, op: OperationId) -> Option<Arc<Import>> {
        self.0.lock().get(&op).cloned()
    }

    fn in_scratch(&self, scratch: BranchId) -> Option<Arc<Import>> {
        self.0.lock().values().find(|import| import.job.scratch == scratch).cloned()
    }
}

/// One import.
#[derive(Debug)]
struct Import {
    op: OperationId,
    project: ProjectName,
    branch: BranchName,
    origin: Origin,
    begun_at: Timestamp,
    job: ImportJob,
    cancelled: CancellationToken,
    outcome: Mutex<Option<Result<(), Fault>>>,
}

#[derive(Debug, Clone)]
struct Fault {
    why: String,
    hint: Option<String>,
}

impl Import {
    fn view(&self) -> api::Import {
        let outcome = self.outcome.lock().clone();
        let seen = self.job.progress.seen();
        let (state, fault) = match outcome {
            None => (api::ImportState::Running, None),
            Some(Ok(())) => (api::ImportState::Done, None),
            Some(Err(fault)) => (api::ImportState::Failed, Some(fault)),
        };
        let running = state == api::ImportState::Running;
        let Seen { phase, done, total, counted, behind_bytes, .. } = seen;
        api::Import {
            id: self.op,
            project: self.project.clone(),
            branch: self.branch.clone(),
            from: self.origin.at.clone(),
            begun_at: self.begun_at,
            state,
            phase: if state == api::ImportState::Done { Phase::Done } else { phase },
            counted,
            done,
            total: total.filter(|_| running),
            per_second: seen.per_second().filter(|_| running),
            seconds_left: seen.seconds_left().filter(|_| running),
            behind_bytes: behind_bytes.filter(|_| running),
            can_cut_over: running && phase == Phase::Following,
            notes: self.job.progress.notes(),
            fault: fault.as_ref().map(|fault| fault.why.clone()),
            hint: fault.and_then(|fault| fault.hint),
        }
    }
}

impl Service {
    /// Begins an import, which goes on after this has answered.
    ///
    /// # Errors
    /// If there is nothing to import, or no place for it: before anything is begun.
    pub async fn import(self: &Arc<Self>, caller: &Caller, request: api::StartImport) -> Result<Answer<api::Import>> {
        let (service, caller) = (self.clone(), caller.clone());
        self.tracked("beginning the import", async move { service.import_here(&caller, request).await }).await
    }

    async fn import_here(self: &Arc<Self>, caller: &Caller, request: api::StartImport) -> Result<Answer<api::Import>> {
        let known = match self.project(request.project.as_str()) {
            Ok(project) => Some(project),
            Err(Error::Refused(Refusal::NoProject { .. })) if request.branch.is_none() => None,
            Err(error) => return Err(error),
        };
        if let (Some(project), Some(key)) = (&known, &caller.key)
            && let Some(used) = project.ledger.state().key(key)?
        {
            return self.imported_before(used.op);
        }
        if let (Some(project), None) = (&known, &request.branch) {
            return Err(Error::Import {
                why: format!("project {:?} exists, and no branch of it was named", project.name),
                hint: Some(format!("Name the new branch: {}/imported, say.", project.name)),
            });
        }
        let wanted = match request.from {
            api::ImportOrigin::Server { url } => ImportRequest::Server(url),
            api::ImportOrigin::Directory { path } => ImportRequest::Directory(absolute(path)?),
            api::ImportOrigin::Dump { path } => ImportRequest::Dump(absolute(path)?),
        };
        if request.follow && !matches!(wanted, ImportRequest::Server(_)) {
            return Err(Refusal::Invalid("only a running server can be followed".to_owned()).into());
        }
        self.check_disk()?;
        let (from, pg_major) = self.node.import_look(&wanted).await?;
        let wish = Wish { from, pg_major, follow: request.follow, database: request.database };
        match (known, request.branch) {
            (Some(project), Some(branch)) => self.import_into(caller, &project, branch, wish).await,
            _ => self.import_project(caller, request.project, wish).await,
        }
    }

    /// Begins an import as a new branch of a project.
    async fn import_into(
        self: &Arc<Self>,
        caller: &Caller,
        project: &Arc<Project>,
        name: BranchName,
        wish: Wish,
    ) -> Result<Answer<api::Import>> {
        let facts = project.ledger.state().facts()?.clone();
        if let Some(major) = wish.pg_major.filter(|major| *major != facts.pg_major) {
            return Err(Error::Import {
                why: format!("the source is of Postgres {major}, and project {:?} of {}", facts.name, facts.pg_major),
                hint: Some("Import it as a project of its own, or import a dump of it.".to_owned()),
            });
        }
        self.node.pg_major(Some(facts.pg_major))?;
        let op = OperationId::generate();
        let driven = Driven::new(project, op);
        let fresh = self.fresh();
        let ask = Ask::Import { name: name.clone(), origin: wish.origin() };
        let command = Command::Begin { ask: ask.clone(), fresh, key: caller.key.clone() };
        self.claim(project).await?;
        let begun = project.append(&caller.actor, Some(op), |state| {
            if let Some(key) = &caller.key
                && let Some(used) = state.key(key)?
            {
                return Ok((Vec::new(), Some(used.op)));
            }
            Ok((decide(state, &command)?, None))
        });
        if let Some(before) = begun.await? {
            return self.imported_before(before);
        }
        let import = self.admit_import(op, (facts.name, name), facts.pg_major, facts.verifier, &fresh, wish);
        self.carry_on(driven, project.clone(), import.clone());
        Ok(Answer { value: import.view(), new: true })
    }

    /// Begins an import as a new project, which begins with it.
    async fn import_project(
        self: &Arc<Self>,
        caller: &Caller,
        name: ProjectName,
        wish: Wish,
    ) -> Result<Answer<api::Import>> {
        let pg_major = self.node.pg_major(wish.pg_major)?;
        let id = ProjectId::generate();
        let _moving = Moving::new(self, id);
        let reserved = self
            .catalog
            .append(&caller.actor, None, |catalog| {
                Ok(catalog.reserve(id, &name, caller.key.as_ref(), self.nodes.me())?)
            })
            .await?;
        if reserved != id {
            // Only while it is being made: then a project of that name is known.
            let (key, operation) = (caller.key.as_ref().map(|key| key.key.clone()), reserved.to_string());
            return Err(Refusal::StillRunning { key: key.unwrap_or_default(), operation }.into());
        }
        let (op, fresh, dev) = (OperationId::generate(), self.fresh(), BranchId::generate());
        let branch: BranchName = PROD.parse().map_err(|_| Refusal::Invalid("no branch".to_owned()))?;
        let plan = decide::import(&branch, &wish.origin(), Some(dev), &fresh);
        let request = api::CreateProject { name: name.clone(), current: None, pg_major: Some(pg_major) };
        let project = match self.make_project(caller, id, &request, pg_major, (op, plan, Vec::new())).await {
            Ok(project) => project,
            Err(error) => {
                let _ = self.settle_reserved(id, &name).await;
                return Err(error);
            }
        };
        let project = Arc::new(project);
        // Before anybody sees it: what nobody carries out is undone.
        let driven = Driven::new(&project, op);
        let project = self.admit(project);
        let verifier = project.ledger.state().facts()?.verifier.clone();
        let import = self.admit_import(op, (name, branch), pg_major, verifier, &fresh, wish);
        self.carry_on(driven, project, import.clone());
        Ok(Answer { value: import.view(), new: true })
    }

    fn admit_import(
        &self,
        op: OperationId,
        (project, branch): (ProjectName, BranchName),
        pg_major: u32,
        verifier: String,
        fresh: &decide::Fresh,
        wish: Wish,
    ) -> Arc<Import> {
        let origin = wish.origin();
        let job = ImportJob {
            scratch: fresh.scratch,
            layer: fresh.layer,
            from: wish.from,
            pg_major,
            settlement: Settlement { verifier, database: wish.database },
            cut_over: wish.follow.then(CancellationToken::new),
            progress: Progress::default(),
        };
        let import = Arc::new(Import {
            op,
            project,
            branch,
            origin,
            begun_at: fresh.now,
            job,
            cancelled: CancellationToken::new(),
            outcome: Mutex::default(),
        });
        self.imports.admit(import.clone());
        import
    }

    /// Carries an import out, in a task of its own. It was driven since before the entry that began it.
    fn carry_on(self: &Arc<Self>, driven: Driven, project: Arc<Project>, import: Arc<Import>) {
        let service = self.clone();
        self.tasks.spawn(async move {
            let _driven = driven;
            let plan = project.ledger.state().operations.get(&import.op).map(|operation| operation.plan.clone());
            let outcome = service.drive(&project, import.op).await;
            if let (Ok(()), Some(plan)) = (&outcome, &plan) {
                count(plan, "done");
            }
            let outcome = outcome.map_err(|error| Fault { why: error.chain(), hint: error.hint() });
            match &outcome {
                Ok(()) => tracing::info!(op = %import.op, from = import.origin.at, "import done"),
                Err(fault) => {
                    tracing::warn!(op = %import.op, from = import.origin.at, why = fault.why, "import failed")
                }
            }
            *import.outcome.lock() = Some(outcome);
        });
    }

    /// One step of an import that this process carries out.
    pub(super) async fn import_step(&self, scratch: BranchId, step: Step) -> Result<Option<Lsn>> {
        let Some(import) = self.imports.in_scratch(scratch) else {
            return Err(Refusal::TooLate("the import was interrupted".to_owned()).into());
        };
        let job = &import.job;
        if step == Step::Record {
            // The layer goes on being made whoever waits for it: so it is waited for.
            job.progress.begin(Phase::Sealing, Counted::Bytes, None);
            let end = self.node.import_seal(job).await?;
            self.node.import_leave(scratch, None).await?;
            return Ok(end);
        }
        let work = async {
            match step {
                Step::Copy => self.node.import_copy(job).await,
                _ => self.node.import_settle(job).await,
            }
        };
        tokio::select! {
            biased;
            () = import.cancelled.cancelled() => Err(Refusal::TooLate("the import was cancelled".to_owned()).into()),
            () = self.stopping.cancelled() => Err(Error::Stopping),
            done = work => done.map(|()| None),
        }
    }

    /// Removes what an import that was undone has left, and the project that was made for it.
    pub(super) async fn clean_up_import(self: &Arc<Self>, project: &Arc<Project>, plan: &Plan) {
        let Plan::Import { scratch, layer, .. } = plan else { return };
        if let Err(error) = self.node.import_leave(*scratch, Some(*layer)).await {
            self.report("removing what an import used", &error);
        }
        self.delete_if_never_made(project).await;
    }

    /// Deletes a project that has neither a branch nor an operation: every project begins with one or the other, and keeps
    /// `prod`, so that is what an import leaves that was undone.
    pub(super) async fn delete_if_never_made(self: &Arc<Self>, project: &Arc<Project>) {
        let state = project.ledger.state();
        if state.deleted || state.facts.is_none() || !state.branches.is_empty() || !state.operations.is_empty() {
            return;
        }
        let Some(_moving) = Moving::new(self, project.id) else { return };
        if let Err(error) = self.begin_delete(&Caller::ebb(), project).await {
            self.report("deleting a project that was not imported", &error);
        }
    }

    fn imported_before(&self, op: OperationId) -> Result<Answer<api::Import>> {
        Ok(Answer { value: self.find_import(op)?.view(), new: false })
    }

    fn find_import(&self, op: OperationId) -> Result<Arc<Import>> {
        self.imports.of(op).ok_or_else(|| Refusal::NoImport(op).into())
    }

    /// The imports that this service carries out, or has since its start, oldest first.
    pub fn list_imports(&self) -> Vec<api::Import> {
        self.imports.0.lock().values().map(|import| import.view()).collect()
    }

    /// How an import is.
    ///
    /// # Errors
    /// If this service does not carry it out, and has not since its start.
    pub fn show_import(&self, op: OperationId) -> Result<api::Import> {
        Ok(self.find_import(op)?.view())
    }

    /// Ends an import that follows its source with what the source has committed by now.
    ///
    /// # Errors
    /// If it does not follow, or is not that far.
    pub fn cut_over(&self, op: OperationId) -> Result<api::Import> {
        let import = self.find_import(op)?;
        let phase = import.job.progress.seen().phase;
        match &import.job.cut_over {
            Some(cut_over) if import.outcome.lock().is_none() && phase >= Phase::Following => cut_over.cancel(),
            Some(_) if import.outcome.lock().is_some() => {
                return Err(Refusal::TooLate("the import is over".to_owned()).into());
            }
            Some(_) => return Err(Refusal::TooLate("the base backup is still coming".to_owned()).into()),
            None => return Err(Refusal::Invalid("the import does not follow its source".to_owned()).into()),
        }
        Ok(import.view())
    }

    /// Gives an import up; all of it is undone.
    ///
    /// # Errors
    /// If it is over.
    pub fn cancel_import(&self, op: OperationId) -> Result<api::Import> {
        let import = self.find_import(op)?;
        if import.outcome.lock().is_some() {
            return Err(Refusal::TooLate("the import is over".to_owned()).into());
        }
        import.cancelled.cancel();
        Ok(import.view())
    }
}

/// What is asked for, found.
#[derive(Debug)]
struct Wish {
    from: ImportFrom,
    pg_major: Option<u32>,
    follow: bool,
    database: Option<String>,
}

impl Wish {
    fn origin(&self) -> Origin {
        let (kind, at) = match &self.from {
            ImportFrom::Server(source) => (OriginKind::Server, source.shown()),
            ImportFrom::Directory(path) => (OriginKind::Directory, path.display().to_string()),
            ImportFrom::Dump(dump) => (OriginKind::Dump, dump.path.display().to_string()),
        };
        Origin { kind, at }
    }
}

fn absolute(path: std::path::PathBuf) -> Result<std::path::PathBuf> {
    match path.is_absolute() {
        true => Ok(path),
        false => Err(Refusal::Invalid(format!("the path {path:?} is not absolute")).into()),
    }
}
