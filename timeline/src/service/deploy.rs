//! Deploying a release that describes itself (`ebb.toml`): rehearsed first, proved after, and taken back by itself if its
//! policy says so.
//!
//! ```text
//!   Rehearse ─► Checkpoint ─► (fence) Migrate ─► Switch* ─► Code ─► (fence down) Probe ─► done
//!      │             │                 │ fails                         │ not answered right
//!      ▼             ▼                 ▼                               ▼
//!    undone        undone       by the policy: undone, or ◄────────────┴─ or it stays, and says what to do
//!                                        ▼
//!                        (fence) Return* ─► Code ─► Sweep ─► done: code and data as before
//! ```
//!
//! What is set aside by itself is bounded: with the clients held, the transactions since the checkpoint are counted, and
//! with more than the policy's bound nothing is touched.
//!
//! **Crash.** Before `Switch` the operation is given up as if the step had failed, with what the database has recorded of
//! the migrations; after it, or once the way back has begun, it goes on where it was.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_types::{BranchId, LayerId, OperationId, ReleaseId};

use super::saga::Under;
use super::{Project, Service};
use crate::clients::Rest;
use crate::decide::{Command, Did, Found, decide};
use crate::deploy::{Described, Probed, Rehearsal, Remedy, faults, remedy};
use crate::event::{Plan, Step};
use crate::machine::Phase;
use crate::migrate::Order;
use crate::probe::{self, Place};
use crate::release_file::{Automatic, Policy, Question, ReleaseFile};
use crate::state::Operation;
use crate::{Error, Refusal, Result};

/// LIMIT: a Postgres that has crashed recovers within this, or the release is given up as it is.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

/// How often it is looked whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A release under way, by the parts of its plan.
struct Deploy<'a> {
    release: ReleaseId,
    name: &'a str,
    branch: BranchId,
    artifact: &'a str,
    file: &'a ReleaseFile,
    scratch: BranchId,
}

impl<'a> Deploy<'a> {
    fn of(plan: &'a Plan) -> Option<Self> {
        match plan {
            Plan::Release { release, name, branch, artifact, described: Some(described), .. } => Some(Self {
                release: *release,
                name,
                branch: *branch,
                artifact,
                file: &described.file,
                scratch: described.scratch,
            }),
            _ => None,
        }
    }

    fn policy(&self) -> &Policy {
        &self.file.policy
    }
}

impl Service {
    /// Does a step of a release that describes itself, and records it; `false` if it is one as of every release.
    pub(super) async fn deploy_step(
        self: &Arc<Self>,
        project: &Arc<Project>,
        op: OperationId,
        operation: &Operation,
        described: &Described,
        under: &mut Under,
    ) -> Result<bool> {
        let (Some(deploy), Some(step)) = (Deploy::of(&operation.plan), operation.next_step()) else {
            return Ok(false);
        };
        let did = match step {
            Step::Rehearse => self.rehearse_release(project, &deploy).await?,
            Step::Migrate => self.migrate_release(project, &deploy, under).await?,
            Step::Probe => {
                // What is asked uses the database as clients do.
                under.fence = None;
                self.probe_release(project, &deploy).await?
            }
            Step::Return => self.return_release(project, operation, &deploy, described, under).await?,
            _ => return Ok(false),
        };
        let sealed = match &did {
            Did::Rehearsed { found, .. } | Did::Returned(found) => found.sealed,
            _ => None,
        };
        self.record(project, op, &operation.actor, did).await?;
        if sealed.is_some() {
            self.settle(project, deploy.branch);
        }
        tracing::info!(%op, act = operation.plan.act(), ?step, "step done");
        Ok(true)
    }

    async fn record(&self, project: &Project, op: OperationId, actor: &str, did: Did) -> Result<()> {
        let command = Command::Deployed { op, did };
        project.append(actor, Some(op), |state| Ok((decide(state, &command)?, ()))).await
    }

    async fn rehearse_release(self: &Arc<Self>, project: &Arc<Project>, deploy: &Deploy<'_>) -> Result<Did> {
        // Whoever connects meanwhile would have to wait for the end of it.
        self.wake_locked(project, deploy.branch, &project.cell(deploy.branch)).await?;
        let mut found = Found::default();
        found.take(self.seal_locked(project, deploy.branch, LayerId::generate()).await?);
        let head = found.sealed.unwrap_or(project.line(deploy.branch)?.head);
        let order = self.order(deploy.name, deploy.artifact, deploy.file).await?;
        let report = self.try_on_copy(project, deploy.scratch, head, order, deploy.file).await?;
        Ok(Did::Rehearsed { found, report })
    }

    /// Rehearses without a release, beside everything else.
    pub(super) async fn rehearse_alone(
        self: &Arc<Self>,
        project: &Arc<Project>,
        op: OperationId,
        operation: &Operation,
    ) -> Result<()> {
        let Plan::Rehearse { artifact, layer, scratch, file, .. } = &operation.plan else {
            return Err(Error::Lost("the plan"));
        };
        let order = self.order("rehearsal", artifact, file).await?;
        let report = self.try_on_copy(project, *scratch, *layer, order, file).await?;
        let command = Command::Rehearsed { op, report };
        project.append(&operation.actor, Some(op), |state| Ok((decide(state, &command)?, ()))).await
    }

    async fn try_on_copy(
        &self,
        project: &Project,
        scratch: BranchId,
        head: LayerId,
        order: Order,
        file: &ReleaseFile,
    ) -> Result<Rehearsal> {
        let like = self.beside(project, scratch, head)?;
        let order = Order { observed: true, alone: true, ..order };
        let report = self.node.rehearse(&order, &file.probes, &like).await?;
        let result = if report.fault.is_none() { "passed" } else { "failed" };
        metrics::counter!("ebb_timeline_rehearsals_total", "result" => result).increment(1);
        Ok(report)
    }

    async fn order(&self, release: &str, artifact: &str, file: &ReleaseFile) -> Result<Order> {
        self.artifacts.ensure_local(artifact).await?;
        let migrations = self.artifacts.migrations(artifact, &file.migrations).await?;
        Ok(Order {
            lock_timeout_ms: file.policy.lock_timeout_ms,
            statement_timeout_ms: file.policy.statement_timeout_ms,
            ..Order::new(release, migrations)
        })
    }

    async fn migrate_release(
        self: &Arc<Self>,
        project: &Arc<Project>,
        deploy: &Deploy<'_>,
        under: &mut Under,
    ) -> Result<Did> {
        self.wake_locked(project, deploy.branch, &project.cell(deploy.branch)).await?;
        if deploy.policy().fence && under.fence.is_none() {
            let limit = deploy.policy().fence_timeout();
            under.fence = Some(self.fence(project, deploy.branch, limit, Rest::End).await?);
        }
        let order = self.order(deploy.name, deploy.artifact, deploy.file).await?;
        let order = Order { alone: under.fence.is_some(), ..order };
        let migrated = self.node.migrate(deploy.branch, &order).await?;
        match migrated.fault {
            None => Ok(Did::Migrated { runs: migrated.runs, transactions: migrated.transactions }),
            Some(fault) => {
                under.transactions = Some(migrated.transactions);
                Err(fault)
            }
        }
    }

    async fn probe_release(self: &Arc<Self>, project: &Arc<Project>, deploy: &Deploy<'_>) -> Result<Did> {
        let probes = self.ask_probes(project, deploy).await?;
        let Some(fault) = faults(&probes) else {
            return Ok(Did::Proved(probes));
        };
        metrics::counter!("ebb_timeline_releases_unproved_total").increment(1);
        let transactions = project.ledger.state().release_by_id(deploy.release).map_or(0, |known| known.transactions);
        let lost = self.lost_since(project, deploy, transactions).await;
        match remedy(deploy.policy().rollback, deploy.policy().max_lost_transactions, lost) {
            Remedy::Stays(why) => Ok(Did::Stays { probes, fault: format!("{fault}; it stays: {why}") }),
            way => {
                let (data, fresh) = (way == Remedy::Data, Box::new(self.fresh()));
                Ok(Did::GoesBack { probes, fault, transactions, data, fresh })
            }
        }
    }

    /// Asks one after the other, up to the first that is not answered right.
    async fn ask_probes(self: &Arc<Self>, project: &Arc<Project>, deploy: &Deploy<'_>) -> Result<Vec<Probed>> {
        let mut probes = Vec::new();
        if deploy.file.probes.is_empty() {
            return Ok(probes);
        }
        self.wake_locked(project, deploy.branch, &project.cell(deploy.branch)).await?;
        let dir = self.artifacts.ensure_local(deploy.artifact).await?;
        let place = Place {
            dir: std::path::absolute(&dir).unwrap_or(dir),
            env: vec![
                ("EBB_PROJECT", project.name.to_string()),
                ("EBB_RELEASE", deploy.name.to_owned()),
                ("EBB_SECRETS", self.secrets_dir(project).display().to_string()),
            ],
        };
        for asked in &deploy.file.probes {
            let probed = match &asked.question {
                Question::Sql { sql, expect } => {
                    let (node, branch) = (&self.node, deploy.branch);
                    let answer = || async move { probe::compare(&node.ask(branch, sql).await, expect) };
                    probe::until_right(asked, answer).await
                }
                question => probe::until_right(asked, || probe::ask(question, &place)).await,
            };
            let failed = probed.fault.is_some();
            probes.push(probed);
            if failed {
                break;
            }
        }
        Ok(probes)
    }

    /// Begins to take a release back that failed before its code was switched, if that has changed the data and its
    /// policy says so: otherwise why it is given up.
    pub(super) async fn go_back(
        self: &Arc<Self>,
        project: &Arc<Project>,
        op: OperationId,
        operation: &Operation,
        why: String,
        under: &mut Under,
    ) -> Result<Result<(), String>> {
        let (Some(deploy), Phase::Begun) = (Deploy::of(&operation.plan), operation.phase) else {
            return Ok(Err(why));
        };
        let has_begun = operation.done.contains(&Step::Checkpoint);
        if !has_begun || deploy.policy().rollback != Automatic::Data {
            return Ok(Err(why));
        }
        let applied = match self.applied(project, &deploy).await {
            Ok(0) => return Ok(Err(why)),
            Ok(applied) => applied,
            Err(error) => {
                let unknown = format!("{why}; what it has applied cannot be told: {}", error.chain());
                return Ok(Err(unknown));
            }
        };
        let known = project.ledger.state().release_by_id(deploy.release).map_or(0, |known| known.transactions);
        let transactions = under.transactions.take().unwrap_or(known).max(applied);
        let lost = self.lost_since(project, &deploy, transactions).await;
        match remedy(Automatic::Data, deploy.policy().max_lost_transactions, lost) {
            Remedy::Data => {
                let (probes, fresh) = (Vec::new(), Box::new(self.fresh()));
                let did = Did::GoesBack { probes, fault: why, transactions, data: true, fresh };
                self.record(project, op, "ebb", did).await?;
                Ok(Ok(()))
            }
            Remedy::Stays(reason) => Ok(Err(format!("{why}; its earlier migrations stay: {reason}"))),
            Remedy::Code => Ok(Err(why)),
        }
    }

    /// How many of its migrations are in. A Postgres that crashed meanwhile is waited for.
    async fn applied(self: &Arc<Self>, project: &Arc<Project>, deploy: &Deploy<'_>) -> Result<u64> {
        let cell = project.cell(deploy.branch);
        let until = Instant::now() + ANSWERS_WITHIN;
        loop {
            let applied = match self.wake_locked(project, deploy.branch, &cell).await {
                Ok(_) => self.node.applied(deploy.branch, deploy.name).await,
                Err(error) => Err(error),
            };
            match applied {
                Err(_) if Instant::now() < until => tokio::time::sleep(LOOK_AGAIN).await,
                applied => return applied,
            }
        }
    }

    /// Takes back what does not work: with the clients held, and only within the bound.
    async fn return_release(
        self: &Arc<Self>,
        project: &Arc<Project>,
        operation: &Operation,
        deploy: &Deploy<'_>,
        described: &Described,
        under: &mut Under,
    ) -> Result<Did> {
        let state = project.ledger.state();
        if let Some(before) = described.before.and_then(|before| state.release_by_id(before)) {
            self.artifacts.ensure_local(&before.artifact).await?;
        }
        crate::files::may_be_switched(&self.current_link(project)?)?;
        let data = operation.back.as_ref().is_some_and(|(back, _)| back.aside.is_some());
        if !data {
            count_taken_back("code");
            return Ok(Did::Returned(Found::default()));
        }
        let known = state.release_by_id(deploy.release).ok_or(Error::Lost("the release"))?;
        let layer = state.branch_by_id(deploy.branch)?.checkpoint(known.checkpoint.as_str())?.layer;
        self.node.fetch(layer).await?;
        if under.fence.is_none() {
            let limit = deploy.policy().fence_timeout();
            under.fence = Some(self.fence(project, deploy.branch, limit, Rest::End).await?);
        }
        self.wake_locked(project, deploy.branch, &project.cell(deploy.branch)).await?;
        let lost = self.lost_since(project, deploy, known.transactions).await;
        if let Remedy::Stays(why) = remedy(Automatic::Data, deploy.policy().max_lost_transactions, lost) {
            let fault = format!("{}; it stays: {why}", known.fault.clone().unwrap_or_default());
            return Ok(Did::Stays { probes: Vec::new(), fault });
        }
        let mut found = Found::default();
        found.take(self.stop_fenced(project, deploy.branch, LayerId::generate()).await?);
        count_taken_back("data");
        Ok(Did::Returned(found))
    }

    /// Transactions begun on `prod` since the checkpoint of a release, without its own; `None` if that cannot be told.
    async fn lost_since(&self, project: &Project, deploy: &Deploy<'_>, own: u64) -> Option<u64> {
        let state = project.ledger.state();
        let release = state.release_by_id(deploy.release)?;
        let branch = state.branch_by_id(deploy.branch).ok()?;
        let then = branch.checkpoint(release.checkpoint.as_str()).ok()?.next_xid?;
        let now = self.node.positions(deploy.branch).await.ok()?.next_xid?;
        Some(now.saturating_sub(then).saturating_sub(own))
    }

    /// Where the files are that a release may need.
    pub(super) fn secrets_dir(&self, project: &Project) -> PathBuf {
        let dir = self.project_dir(&project.name).join("secrets");
        std::path::absolute(&dir).unwrap_or(dir)
    }

    /// What a release needs is there.
    pub(super) fn check_secrets(&self, project: &Project, file: &ReleaseFile) -> Result<()> {
        let dir = self.secrets_dir(project);
        let is_there = |name: &&String| dir.join(name).metadata().is_ok_and(|found| found.is_file() && found.len() > 0);
        let needed: BTreeSet<_> = file.secrets.iter().collect();
        let names: Vec<String> = needed.into_iter().filter(|name| !is_there(name)).cloned().collect();
        if names.is_empty() { Ok(()) } else { Err(Refusal::MissingSecrets { names, dir }.into()) }
    }
}

fn count_taken_back(what: &'static str) {
    metrics::counter!("ebb_timeline_releases_taken_back_total", "what" => what).increment(1);
}
