//! Making, listing and deleting projects.
//!
//! Two ledgers take part, in this order, so that whatever a crash leaves can be told apart:
//!
//! ```text
//!   create: catalog "reserved" ─► secret ─► project's ledger, entry 0 ─► catalog "opened"
//!           (no entry 0 yet: forgotten again)      (entry 0 is there: opened)
//!   delete: catalog "deleting" ─► computes, local files ─► project's ledger ─► secret ─► catalog "forgotten"
//!           (from there only forward)
//! ```

use std::sync::Arc;
use std::time::Duration;

use ebb_compute::postgres::{DATABASE, OWNER};
use ebb_types::{BranchId, BranchRef, EndpointName, OperationId, ProjectId, ProjectName};
use postgres_protocol::password::scram_sha_256;

use super::compute::Fence;
use super::views::encode_query;
use super::{Answer, Caller, Project, Service};
use crate::api::types as api;
use crate::catalog::{CatalogEvent, ledger_name};
use crate::clients::Rest;
use crate::decide::{Ask, DEV, PROD};
use crate::event::{Event, Plan};
use crate::ledger::read_chain;
use crate::machine::Standing;
use crate::secrets::generate_password;
use crate::state::ProjectState;
use crate::{Refusal, Result, audit};

/// LIMIT: deleting a project waits for nobody's transaction.
const DELETE_FENCE_MAX: Duration = Duration::from_millis(500);

/// A call is making or deleting this project as long as this lives.
pub(super) struct Moving<'a> {
    service: &'a Service,
    project: ProjectId,
}

impl<'a> Moving<'a> {
    /// `None` if somebody else is at it.
    pub(super) fn new(service: &'a Service, project: ProjectId) -> Option<Self> {
        let first = service.moving.lock().insert(project);
        // Not `then_some`: what it drops would take the other's mark away, and wait for the lock held here.
        first.then(|| Self { service, project })
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.service.moving.lock().remove(&self.project);
    }
}

impl Service {
    /// Makes a project with `prod` and `dev`, an owner role and its password.
    ///
    /// # Errors
    /// If the name is taken, or no Postgres of the wanted version is installed.
    pub async fn create_project(
        self: &Arc<Self>,
        caller: &Caller,
        request: api::CreateProject,
    ) -> Result<Answer<api::CreatedProject>> {
        let (service, caller) = (self.clone(), caller.clone());
        self.tracked("making the project", async move { service.create_project_here(&caller, request).await }).await
    }

    async fn create_project_here(
        self: &Arc<Self>,
        caller: &Caller,
        request: api::CreateProject,
    ) -> Result<Answer<api::CreatedProject>> {
        if let Some(current) = &request.current {
            if !current.is_absolute() {
                return Err(Refusal::Invalid(format!("the path {current:?} is not absolute")).into());
            }
            crate::files::may_be_switched(current)?;
        }
        let fresh = ProjectId::generate();
        // A taken name is told before anything slow (a template) is begun.
        self.catalog.state().reserve(fresh, &request.name, caller.key.as_ref(), self.nodes.me())?;
        self.check_disk()?;
        let pg_major = self.node.pg_major(request.pg_major)?;
        let template = self.node.template(pg_major).await?;

        let _moving = Moving::new(self, fresh);
        let id = self
            .catalog
            .append(&caller.actor, None, |catalog| {
                Ok(catalog.reserve(fresh, &request.name, caller.key.as_ref(), self.nodes.me())?)
            })
            .await?;
        if id != fresh {
            return self.replayed_project(caller, id).await;
        }
        let branch = |name: &str| Event::BranchCreated {
            branch: BranchId::generate(),
            name: name.parse().expect("the first branches' names are names"),
            head: template,
            end: None,
            parent: None,
            rescue_until: None,
        };
        let plan = Plan::CreateProject { name: request.name.clone() };
        let then = vec![branch(PROD), branch(DEV), Event::OperationDone];
        let made = self.make_project(caller, id, &request, pg_major, (OperationId::generate(), plan, then)).await;
        let project = match made {
            Ok(project) => self.admit(Arc::new(project)),
            Err(error) => {
                // Best effort now; the reconciler and the next start do the same.
                let _ = self.settle_reserved(id, &request.name).await;
                return Err(error);
            }
        };
        Ok(Answer { value: self.created_view(&project).await?, new: true })
    }

    async fn replayed_project(&self, caller: &Caller, id: ProjectId) -> Result<Answer<api::CreatedProject>> {
        let found = self.projects.read().get(&id).cloned();
        match found {
            Some(project) => Ok(Answer { value: self.created_view(&project).await?, new: false }),
            None => {
                let key = caller.key.as_ref().map(|key| key.key.clone()).unwrap_or_default();
                Err(Refusal::StillRunning { key, operation: id.to_string() }.into())
            }
        }
    }

    /// Makes what a project is: its secret, and a ledger that begins with an operation and what that has done already.
    pub(super) async fn make_project(
        &self,
        caller: &Caller,
        id: ProjectId,
        request: &api::CreateProject,
        pg_major: u32,
        (op, plan, then): (OperationId, Plan, Vec<Event>),
    ) -> Result<Project> {
        let password = generate_password();
        // 4096 rounds of a hash: off the threads that serve everybody else.
        let hashed = password.clone();
        let verifier = tokio::task::spawn_blocking(move || scram_sha_256(hashed.as_bytes()))
            .await
            .map_err(|_| crate::Error::Lost("making a verifier"))?;
        self.secrets.put_owner(id, &password).await?;
        let project = self.open_project(id, request.name.clone()).await?;
        let mut events = vec![
            Event::OperationBegun { plan: Box::new(plan), key: None },
            Event::ProjectCreated {
                project: id,
                name: request.name.clone(),
                pg_major,
                current: request.current.clone(),
                verifier,
            },
            Event::OwnerChanged { node: self.nodes.me(), epoch: 1 },
        ];
        events.extend(then);
        let term = self.nodes.term();
        project.ledger.append(&caller.actor, Some(op), |_| Ok((events.clone(), ()))).await?;
        self.catalog.append(&caller.actor, None, |_| Ok((vec![CatalogEvent::Opened { project: id }], ()))).await?;
        self.note_kept(&project, term);
        tracing::info!(project = %request.name, "project made");
        Ok(project)
    }

    /// Makes a project known to everybody.
    pub(super) fn admit(&self, project: Arc<Project>) -> Arc<Project> {
        self.projects.write().insert(project.id, project.clone());
        self.layers_changed.notify_one();
        project
    }

    async fn created_view(&self, project: &Project) -> Result<api::CreatedProject> {
        let password = self.secrets.owner(project.id).await?;
        let url = |branch: &str| -> Result<String> {
            let branch = branch.parse().map_err(|_| Refusal::Invalid("no branch".to_owned()))?;
            Ok(self.url(&BranchRef { project: project.name.clone(), branch }, &password))
        };
        Ok(api::CreatedProject {
            project: self.project_view(project)?,
            role: OWNER.to_owned(),
            password: password.to_string(),
            urls: api::ProjectUrls { prod: url(PROD)?, dev: url(DEV)? },
        })
    }

    /// A URL that any driver understands which passes `options` on.
    fn url(&self, at: &BranchRef, password: &str) -> String {
        let endpoint = EndpointName::from(at.clone());
        let (host, port) = (bracketed(&self.config.proxy_public_host), self.config.proxy_public_port);
        format!("postgres://{OWNER}:{password}@{host}:{port}/{DATABASE}?options=endpoint%3D{endpoint}")
    }

    /// A URL that names the branch as host, over verified TLS.
    fn url_sni(&self, at: &BranchRef, password: &str) -> String {
        let endpoint = EndpointName::from(at.clone());
        let (domain, port) = (&self.config.proxy_domain, self.config.proxy_public_port);
        let mut url = format!("postgres://{OWNER}:{password}@{endpoint}.{domain}:{port}/{DATABASE}?sslmode=");
        match &self.config.ca_pem {
            Some(ca) => url.push_str(&format!("verify-full&sslrootcert={}", encode_query(&ca.to_string_lossy()))),
            None => url.push_str("require"),
        }
        // The name need not be in DNS: the address is given beside it.
        if self.config.proxy_public_host.parse::<std::net::IpAddr>().is_ok() {
            url.push_str(&format!("&hostaddr={}", encode_query(&self.config.proxy_public_host)));
        }
        url
    }

    /// Connection URLs of a branch, with the owner's password. Leaves a receipt.
    ///
    /// # Errors
    /// If there is no such branch, or the secret cannot be read on this node.
    pub async fn branch_url(self: &Arc<Self>, caller: &Caller, project: &str, branch: &str) -> Result<api::BranchUrl> {
        let project = self.project(project)?;
        let name = project.ledger.state().branch(branch)?.1.name.clone();
        self.act(&project, caller, Ask::ShowUrl { branch: branch.to_owned() }).await?;
        let password = self.secrets.owner(project.id).await?;
        let at = BranchRef { project: project.name.clone(), branch: name };
        Ok(api::BranchUrl {
            url: self.url(&at, &password),
            url_sni: self.url_sni(&at, &password),
            role: OWNER.to_owned(),
            database: DATABASE.to_owned(),
        })
    }

    /// All projects, by name.
    ///
    /// # Errors
    /// None of the caller's making.
    pub async fn projects(&self) -> Result<Vec<api::Project>> {
        let live = self.catalog.state();
        let is_live = |id: &ProjectId| live.projects.get(id).is_some_and(|listed| listed.standing == Standing::Live);
        let mut views = Vec::new();
        for project in self.all_projects().iter().filter(|project| is_live(&project.id)) {
            views.push(self.project_view(project)?);
        }
        views.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(views)
    }

    /// One project.
    ///
    /// # Errors
    /// `NotFound` with the nearest names.
    pub async fn project_info(&self, name: &str) -> Result<api::Project> {
        let mut view = self.project_view(&*self.project(name)?)?;
        if let Some(stored) = self.add_stored(&mut view.branches).await {
            view.stored = stored.projects.get(&view.id).cloned();
        }
        Ok(view)
    }

    /// Deletes a project: computes end, local files and the secret go, the name is free. Its objects in the bucket are
    /// collected after the grace period, but for its receipts.
    ///
    /// # Errors
    /// If `confirm` is not its name, or an operation is under way.
    pub async fn delete_project(self: &Arc<Self>, caller: &Caller, name: &str, confirm: Option<&str>) -> Result<()> {
        let project = self.project(name)?;
        if confirm != Some(project.name.as_str()) {
            return Err(Refusal::Unconfirmed(project.name.clone()).into());
        }
        let (service, caller) = (self.clone(), caller.clone());
        self.tracked("deleting the project", async move {
            let Some(_moving) = Moving::new(&service, project.id) else {
                return Err(Refusal::TooLate("the project is being deleted".to_owned()).into());
            };
            service.begin_delete(&caller, &project).await
        })
        .await
    }

    pub(super) async fn begin_delete(self: &Arc<Self>, caller: &Caller, project: &Arc<Project>) -> Result<()> {
        self.claim(project).await?;
        let mut locks = Vec::new();
        for &branch in project.ledger.state().branches.keys() {
            locks.push(self.lock(&project.cell(branch)).await?);
        }
        let state = project.ledger.state();
        check_idle(&state)?;
        let (id, node) = (project.id, self.nodes.me());
        self.catalog
            .append(&caller.actor, None, |catalog| match catalog.projects.get(&id).map(|listed| listed.standing) {
                Some(Standing::Live) => Ok((vec![CatalogEvent::Deleting { project: id, node: Some(node) }], ())),
                _ => Err(Refusal::NoProject { name: project.name.to_string(), near: Vec::new() }.into()),
            })
            .await?;
        self.finish_delete(&caller.actor, project).await
    }

    /// Everything after the point of no return; each part may have been done before.
    async fn finish_delete(self: &Arc<Self>, actor: &str, project: &Arc<Project>) -> Result<()> {
        let mut fences: Vec<Fence> = Vec::new();
        for &branch in project.ledger.state().branches.keys() {
            // Whoever cannot be held is ended with the compute.
            if let Ok(Ok(())) =
                tokio::time::timeout(DELETE_FENCE_MAX * 2, self.clients.fence(branch, DELETE_FENCE_MAX, Rest::End))
                    .await
            {
                fences.push(self.fence_held(branch));
            }
            self.discard_locked(project, branch).await?;
            self.node.remove_branch(branch).await?;
        }
        let plan = Box::new(Plan::DeleteProject { name: project.name.clone() });
        project
            .append(actor, Some(OperationId::generate()), |state| {
                if state.deleted || state.facts.is_none() {
                    return Ok((Vec::new(), ()));
                }
                let begun = Event::OperationBegun { plan: plan.clone(), key: None };
                Ok((vec![begun, Event::ProjectDeleted, Event::OperationDone], ()))
            })
            .await?;
        self.secrets.delete_owner(project.id).await?;
        crate::files::remove_dir(&self.project_dir(&project.name))?;
        self.forget(actor, project.id, Standing::Deleting).await?;
        // Held clients are let go only now: they find no such branch.
        self.projects.write().remove(&project.id);
        drop(fences);
        tracing::info!(project = %project.name, "project deleted");
        Ok(())
    }

    async fn forget(&self, actor: &str, id: ProjectId, was: Standing) -> Result<()> {
        self.catalog
            .append(actor, None, |catalog| match catalog.projects.get(&id) {
                Some(listed) if listed.standing == was => Ok((vec![CatalogEvent::Forgotten { project: id }], ())),
                _ => Ok((Vec::new(), ())),
            })
            .await
    }

    /// A reserved project becomes what it got to: one with its first entry is opened, one without is forgotten.
    pub(super) async fn settle_reserved(&self, id: ProjectId, name: &ProjectName) -> Result<()> {
        let project = self.open_project(id, name.clone()).await?;
        if project.ledger.state().facts.is_none() {
            self.secrets.delete_owner(id).await?;
            return self.forget("ebb", id, Standing::Reserved).await;
        }
        self.catalog
            .append("ebb", None, |catalog| match catalog.projects.get(&id).map(|listed| listed.standing) {
                Some(Standing::Reserved) => Ok((vec![CatalogEvent::Opened { project: id }], ())),
                _ => Ok((Vec::new(), ())),
            })
            .await?;
        self.projects.write().entry(id).or_insert_with(|| Arc::new(project));
        Ok(())
    }

    /// Finishes what a crash or an unreachable bucket left of making and deleting projects.
    pub(super) async fn recover_catalog(self: &Arc<Self>) {
        if let Err(error) = self.catalog.settle().await {
            return self.report("reading the catalog", &error);
        }
        for (&id, listed) in &self.catalog.state().projects {
            if listed.standing == Standing::Live {
                continue;
            }
            let Some(_moving) = Moving::new(self, id) else {
                continue;
            };
            match self.may_finish(listed.node).await {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    self.report("looking at another node's record", &error);
                    continue;
                }
            }
            let known = self.projects.read().get(&id).cloned();
            let outcome = match (listed.standing, known) {
                (Standing::Reserved, _) => self.settle_reserved(id, &listed.name).await,
                (Standing::Deleting, Some(project)) => self.finish_delete("ebb", &project).await,
                _ => Ok(()),
            };
            if let Err(error) = outcome {
                self.report("recovering a project", &error);
            }
        }
    }

    /// All entries of a project's ledger, as receipts.
    ///
    /// # Errors
    /// If the project or the bucket cannot be reached.
    pub async fn ledger_entries(&self, project: &str) -> Result<Vec<api::Entry>> {
        let project = self.project(project)?;
        let verdict = read_chain::<Event>(&self.bucket, &ledger_name(project.id)).await?;
        Ok(audit::receipts(&verdict.entries))
    }

    /// Receipts that are looked for, by page.
    ///
    /// # Errors
    /// As [`Service::ledger_entries`].
    pub async fn search_ledger(
        &self,
        project: &str,
        search: &audit::Search,
        after: Option<u64>,
        limit: usize,
    ) -> Result<api::LedgerEntries> {
        Ok(audit::page(self.ledger_entries(project).await?, search, after, limit))
    }

    /// Checks a project's ledger from its first entry on.
    ///
    /// # Errors
    /// If the project or the bucket cannot be reached; a broken chain is an answer.
    pub async fn ledger_verdict(&self, project: &str) -> Result<api::LedgerVerdict> {
        let verdict = self.project(project)?.ledger.verify().await?;
        Ok(api::LedgerVerdict {
            ok: verdict.fault.is_none(),
            entries: verdict.entries.len() as u64,
            head_hash: verdict.head.to_hex().to_string(),
            fault: verdict.fault.map(|(seq, why)| format!("entry {seq}: {why}")),
        })
    }
}

/// Refuses what cannot be done while an operation is under way in the project.
pub(super) fn check_idle(state: &ProjectState) -> Result<()> {
    let Some((op, operation)) = state.operations.iter().next() else { return Ok(()) };
    let concerned = match &operation.plan {
        Plan::Drill { branch, .. } | Plan::Export { branch, .. } => Some(*branch),
        plan => plan.holds(),
    };
    let concerned = concerned.and_then(|branch| state.branches.get(&branch));
    let branch = match &operation.plan {
        Plan::Import { name, .. } | Plan::CreateBranch { name, .. } => Some(name.clone()),
        _ => concerned.map(|branch| branch.name.clone()),
    };
    let branch = branch.ok_or(crate::Error::Lost("an operation"))?;
    Err(Refusal::Busy { branch, act: operation.plan.act(), operation: *op }.into())
}

/// An IPv6 address as a URL's host.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}
