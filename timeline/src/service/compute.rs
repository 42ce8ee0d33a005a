//! Computes of branches: one wake for any number of callers, suspending, and noticing that one is gone.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_compute::control::Durability;
use ebb_types::{BranchId, LayerId, Timestamp};
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use super::wakes::Course;
use super::{Project, Service};
use crate::clients::{Rest, SessionRow, SharedClients};
use crate::decide::Command;
use crate::machine::{Compute, ComputeEvent, Serving};
use crate::node::{Sealed, Start};
use crate::{Error, Refusal, Result};

/// LIMIT: setting idle sessions aside takes one query each; one that does not answer by then is not idle.
const IDLE_FENCE_MAX: Duration = Duration::from_secs(3);

/// LIMIT: longer than a checkpoint of an ordinary database, shorter than a client's patience with an API call.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(60);

/// A compute that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwakeUnit {
    /// Counts the computes of this branch since the service started.
    pub generation: u64,
    /// The Unix socket of its Postgres.
    pub socket: PathBuf,
    /// The only roles that may log in, where the verifiers that clients were held against are not its own.
    pub admits: Option<Arc<BTreeSet<String>>>,
}

impl From<&Serving> for AwakeUnit {
    fn from(serving: &Serving) -> Self {
        Self { generation: serving.generation, socket: serving.socket.clone(), admits: None }
    }
}

/// LIMIT: computes of one branch in one epoch: a wake a second for a hundred years.
const GENERATIONS_BITS: u32 = 32;

pub(super) type SharedWake = Shared<BoxFuture<'static, Result<AwakeUnit, Arc<Error>>>>;

/// One branch on this node.
#[derive(Debug, Default)]
pub(super) struct Cell {
    /// Held by whoever seals, starts, stops, moves or deletes the branch.
    pub ops: Arc<tokio::sync::Mutex<()>>,
    pub inner: Mutex<Inner>,
}

/// What is known of a branch's compute.
pub(super) struct Inner {
    pub compute: Compute,
    /// When it came into that state.
    pub since: Instant,
    pub since_time: Timestamp,
    pub generation: u64,
    pub wakes: u64,
    /// What kept it from being suspended, when that was last tried.
    pub keeps_awake: Vec<String>,
    /// Do not try to suspend before.
    pub retry_at: Option<Instant>,
    /// The wake that is under way.
    wake: Option<SharedWake>,
    /// The volume holds nothing beyond the recorded head (it was stopped, sealed and recorded).
    settled: bool,
    /// A seal that could not be recorded yet: line and layer.
    pub unrecorded: Option<(u64, Sealed)>,
    /// The unit of this generation went away while it was being suspended.
    lost: Option<u64>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("compute", &self.compute).finish_non_exhaustive()
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            compute: Compute::Suspended,
            since: Instant::now(),
            since_time: Timestamp::UNIX_EPOCH,
            generation: 0,
            wakes: 0,
            keeps_awake: Vec::new(),
            retry_at: None,
            wake: None,
            settled: false,
            unrecorded: None,
            lost: None,
        }
    }
}

impl Inner {
    /// Whether there is nothing to seal and record, or a compute that is still writing.
    pub fn is_settled(&self) -> bool {
        self.settled || (self.compute != Compute::Suspended && self.unrecorded.is_none())
    }

    /// What was known is of an earlier epoch: this node's volume is stale.
    pub fn forget(&mut self) {
        self.settled = false;
        self.unrecorded = None;
    }

    /// Every change of state goes through here.
    pub fn step(&mut self, event: ComputeEvent, now: Timestamp) -> Result<()> {
        if event == ComputeEvent::Wake {
            // Also one that fails may have written.
            self.settled = false;
        }
        let next = self.compute.next(event).map_err(|illegal| Refusal::TooLate(illegal.to_string()))?;
        self.compute = next;
        self.since = Instant::now();
        self.since_time = now;
        Ok(())
    }
}

/// Lets the held clients of a branch go on, whatever happens.
pub(super) struct Fence {
    clients: SharedClients,
    branch: BranchId,
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.clients.release(self.branch);
    }
}

/// Forgets the wake that is under way, also if its task panics.
struct WakeGuard(Arc<Cell>);

impl Drop for WakeGuard {
    fn drop(&mut self) {
        self.0.inner.lock().wake = None;
    }
}

impl Service {
    /// Makes the branch's compute answer, waking it if need be; any number of calls make one wake.
    ///
    /// # Errors
    /// The same for everyone who waited: no such branch, no room, Postgres did not start.
    ///
    /// # Cancel safety
    /// Safe: a wake once begun goes on.
    pub async fn wake(self: &Arc<Self>, branch: BranchId) -> Result<AwakeUnit> {
        if let Some(visit) = self.named_visit(branch) {
            return self.wake_visit(visit).await;
        }
        let project = self.project_of(branch)?;
        let cell = project.cell(branch);
        let wake = {
            let mut inner = cell.inner.lock();
            if let Compute::Active(serving) = &inner.compute
                && self.may_act(&project)
            {
                return Ok(serving.into());
            }
            if self.stopping.is_cancelled() {
                return Err(Error::Stopping);
            }
            match &inner.wake {
                Some(wake) => wake.clone(),
                None => {
                    let wake = self.begin_wake(project, branch, cell.clone());
                    inner.wake = Some(wake.clone());
                    wake
                }
            }
        };
        wake.await.map_err(Error::Shared)
    }

    fn begin_wake(self: &Arc<Self>, project: Arc<Project>, branch: BranchId, cell: Arc<Cell>) -> SharedWake {
        let (service, asked) = (self.clone(), Instant::now());
        let task = self.tasks.spawn(async move {
            let _ops = cell.ops.clone().lock_owned().await;
            let _forget = WakeGuard(cell.clone());
            service.wake_asked(&project, branch, &cell, asked).await
        });
        let outcome = task.map(|ended| match ended {
            Ok(outcome) => outcome.map_err(Arc::new),
            Err(_) => Err(Arc::new(Error::Lost("the wake"))),
        });
        outcome.boxed().shared()
    }

    /// Wakes with the branch's lock held.
    pub(super) async fn wake_locked(
        self: &Arc<Self>,
        project: &Arc<Project>,
        branch: BranchId,
        cell: &Arc<Cell>,
    ) -> Result<AwakeUnit> {
        self.wake_asked(project, branch, cell, Instant::now()).await
    }

    async fn wake_asked(
        self: &Arc<Self>,
        project: &Arc<Project>,
        branch: BranchId,
        cell: &Arc<Cell>,
        asked: Instant,
    ) -> Result<AwakeUnit> {
        self.claim(project).await?;
        if let Compute::Active(serving) = &cell.inner.lock().compute {
            return Ok(serving.into());
        }
        let data = project.line(branch)?;
        let start = {
            let state = project.ledger.state();
            let facts = state.facts()?;
            let known = state.branch_by_id(branch)?;
            Start {
                head_end: known.history.seal_of(data.head).and_then(|seal| seal.end),
                // By entries, not by times: clocks jump, and differ from node to node.
                begun_here: state
                    .owner
                    .is_some_and(|owner| known.line_entry >= owner.entry.max(project.entries_when_opened)),
                earlier: known.history.before(data.head, data.line),
                data,
                pg_major: facts.pg_major,
                fork: known.is_fork(),
                durability: known.durability,
                verifier: facts.verifier.clone(),
            }
        };
        self.check_disk()?;
        if start.durability == Durability::Bucket {
            self.upload_base(project, branch).await?;
        }
        let course = Course::begin(asked, self.clock.now());
        cell.inner.lock().step(ComputeEvent::Wake, self.clock.now())?;
        let started = match self.node.start(&start).await {
            Ok(socket) => self.still_ours(project, &start.data).await.map(|()| socket),
            Err(error) => Err(error),
        };
        match started {
            Ok(socket) => {
                let serving = {
                    let mut inner = cell.inner.lock();
                    inner.wakes += 1;
                    self.serve(project, &mut inner, socket)?
                };
                metrics::counter!("ebb_timeline_wakes_total", "result" => "ok").increment(1);
                metrics::histogram!("ebb_timeline_wake_seconds").record(course.resolved.elapsed());
                self.note_wake(branch, course, None);
                tracing::info!(%branch, generation = serving.generation, "compute woken");
                self.watch(project, branch, cell, serving.generation);
                Ok((&serving).into())
            }
            Err(error) => {
                cell.inner.lock().step(ComputeEvent::Failed, self.clock.now())?;
                metrics::counter!("ebb_timeline_wakes_total", "result" => "failed").increment(1);
                tracing::error!(%branch, error = error.chain(), "a wake failed");
                self.note_wake(branch, course, Some(&error));
                Err(error)
            }
        }
    }

    /// While a compute started, its project may have become another node's: then the compute is ended.
    async fn still_ours(self: &Arc<Self>, project: &Arc<Project>, data: &crate::node::Line) -> Result<()> {
        match self.claim(project).await {
            Ok(()) if project.ledger.state().epoch() == data.epoch => Ok(()),
            claimed => {
                self.node.discard(data.branch).await?;
                claimed.and_then(|()| Err(project.elsewhere(project.ledger.state().owner, None)))
            }
        }
    }

    /// A compute answers: a new generation.
    fn serve(&self, project: &Project, inner: &mut Inner, socket: PathBuf) -> Result<Serving> {
        // Later owners' computes count as later ones, wherever they are seen from.
        let before = project.ledger.state().epoch().saturating_sub(1) << GENERATIONS_BITS;
        let serving = Serving { generation: inner.generation.max(before) + 1, socket };
        inner.step(ComputeEvent::Ready(serving.clone()), self.clock.now())?;
        inner.generation = serving.generation;
        inner.settled = false;
        inner.keeps_awake.clear();
        inner.retry_at = None;
        inner.lost = None;
        self.changed.notify_one();
        Ok(serving)
    }

    /// Finds the computes that outlived the last service.
    pub(super) async fn adopt_computes(self: &Arc<Self>) {
        for project in self.all_projects() {
            for &branch in project.ledger.state().branches.keys() {
                match self.node.adopt(branch).await {
                    Ok(Some(_)) if project.ledger.state().owner.is_some() && !project.is_ours() => {
                        tracing::warn!(%branch, "a compute of what another node owns is ended");
                        if let Err(error) = self.node.discard(branch).await {
                            self.report("ending a compute", &error);
                        }
                    }
                    Ok(Some(socket)) => {
                        let cell = project.cell(branch);
                        let serving = self.serve(&project, &mut cell.inner.lock(), socket);
                        match serving {
                            Ok(serving) => self.watch(&project, branch, &cell, serving.generation),
                            Err(error) => self.report("adopting a compute", &error),
                        }
                        tracing::info!(%branch, "compute adopted");
                    }
                    Ok(None) => {}
                    Err(error) => self.report("adopting a compute", &error),
                }
            }
        }
    }

    /// Notices when a compute is gone without having been stopped.
    fn watch(self: &Arc<Self>, project: &Arc<Project>, branch: BranchId, cell: &Arc<Cell>, generation: u64) {
        let (service, cell, project) = (self.clone(), cell.clone(), project.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = service.node.gone(branch) => {}
                () = service.stopping.cancelled() => return,
            }
            let mut inner = cell.inner.lock();
            match &inner.compute {
                Compute::Active(serving) if serving.generation == generation => {
                    tracing::warn!(%branch, project = %project.name, generation, "a compute is gone");
                    service.lost(&mut inner, branch, generation);
                }
                // Being stopped: whoever stops it finds out.
                _ => inner.lost = Some(generation),
            }
        });
    }

    fn lost(&self, inner: &mut Inner, branch: BranchId, generation: u64) {
        if inner.step(ComputeEvent::Lost { generation }, self.clock.now()).is_ok() {
            inner.settled = false;
            metrics::counter!("ebb_timeline_computes_lost_total").increment(1);
            self.clients.lost(branch, generation);
        }
    }

    /// Sets the clients of a branch aside.
    pub(super) async fn fence(
        &self,
        project: &Project,
        branch: BranchId,
        deadline: Duration,
        rest: Rest,
    ) -> Result<Fence> {
        match self.clients.fence(branch, deadline, rest).await {
            Ok(()) => Ok(self.fence_held(branch)),
            Err(rows) => {
                let name = project.ledger.state().branch_by_id(branch)?.name.clone();
                Err(Error::KeptAwake { branch: name, sessions: rows.iter().map(describe).collect() })
            }
        }
    }

    /// Sets the clients aside, stops the compute and seals, with the branch's lock held. The clients stay held as long
    /// as the fence lives. The layer is `None` if the recorded head is all there is.
    pub(super) async fn stop_locked(
        &self,
        project: &Project,
        branch: BranchId,
        seal: LayerId,
        deadline: Duration,
        rest: Rest,
    ) -> Result<(Fence, Option<Sealed>)> {
        let cell = project.cell(branch);
        let active = {
            let mut inner = cell.inner.lock();
            let active = matches!(inner.compute, Compute::Active(_));
            if active {
                inner.step(ComputeEvent::Suspend, self.clock.now())?;
            }
            active
        };
        let fence = match self.fence(project, branch, deadline, rest).await {
            Ok(fence) => fence,
            Err(error) => {
                if active {
                    self.keep_awake(&cell, branch, &error);
                }
                return Err(error);
            }
        };
        if !active {
            return Ok((fence, self.seal_locked(project, branch, seal).await?));
        }
        Ok((fence, self.stop_suspending(project, branch, seal).await?))
    }

    /// Stops the compute, if one runs, and seals, with the branch's lock held and its clients set aside already.
    pub(super) async fn stop_fenced(
        &self,
        project: &Project,
        branch: BranchId,
        seal: LayerId,
    ) -> Result<Option<Sealed>> {
        if !self.is_awake(project, branch) {
            return self.seal_locked(project, branch, seal).await;
        }
        project.cell(branch).inner.lock().step(ComputeEvent::Suspend, self.clock.now())?;
        self.stop_suspending(project, branch, seal).await
    }

    async fn stop_suspending(&self, project: &Project, branch: BranchId, seal: LayerId) -> Result<Option<Sealed>> {
        let (cell, data) = (project.cell(branch), project.line(branch)?);
        match self.node.stop(&data, seal).await {
            Ok(layer) => {
                let mut inner = cell.inner.lock();
                inner.step(ComputeEvent::Stopped, self.clock.now())?;
                inner.keeps_awake.clear();
                Ok(layer)
            }
            Err(error) => {
                // Half stopped: look whether it is still there before anyone is told that it is.
                match self.node.adopt(branch).await {
                    Ok(Some(_)) => self.keep_awake(&cell, branch, &error),
                    _ => {
                        let mut inner = cell.inner.lock();
                        let generation = inner.generation;
                        self.lost(&mut inner, branch, generation);
                    }
                }
                Err(error)
            }
        }
    }

    /// It stays awake after all, unless it went away meanwhile.
    fn keep_awake(&self, cell: &Cell, branch: BranchId, why: &Error) {
        let mut inner = cell.inner.lock();
        if inner.step(ComputeEvent::KeptAwake, self.clock.now()).is_err() {
            return;
        }
        inner.keeps_awake = match why {
            Error::KeptAwake { sessions, .. } => sessions.clone(),
            other => vec![other.chain()],
        };
        if inner.lost == Some(inner.generation) {
            let generation = inner.generation;
            self.lost(&mut inner, branch, generation);
        }
    }

    /// Seals the head, whether or not a compute runs, with the branch's lock held.
    pub(super) async fn seal_locked(&self, project: &Project, branch: BranchId, id: LayerId) -> Result<Option<Sealed>> {
        let cell = project.cell(branch);
        if cell.inner.lock().settled {
            return Ok(None);
        }
        self.node.seal(&project.line(branch)?, id).await
    }

    /// A seal was recorded: an older one that was not is part of it now. If no compute runs, the head is all there is.
    pub(super) fn settle(&self, project: &Project, branch: BranchId) {
        let cell = project.cell(branch);
        let mut inner = cell.inner.lock();
        inner.unrecorded = None;
        inner.settled = inner.compute == Compute::Suspended;
        drop(inner);
        self.layers_changed.notify_one();
    }

    /// Whether a compute of the branch answers.
    pub(super) fn is_awake(&self, project: &Project, branch: BranchId) -> bool {
        matches!(project.cell(branch).inner.lock().compute, Compute::Active(_))
    }

    /// Ends the compute without sealing, with the branch's lock held.
    pub(super) async fn discard_locked(&self, project: &Project, branch: BranchId) -> Result<()> {
        let cell = project.cell(branch);
        {
            let mut inner = cell.inner.lock();
            if matches!(inner.compute, Compute::Active(_)) {
                inner.step(ComputeEvent::Suspend, self.clock.now())?;
            }
        }
        let outcome = self.node.discard(branch).await;
        let mut inner = cell.inner.lock();
        if matches!(inner.compute, Compute::Suspending(_)) {
            let event = if outcome.is_ok() { ComputeEvent::Stopped } else { ComputeEvent::KeptAwake };
            inner.step(event, self.clock.now())?;
        }
        outcome
    }

    /// A fence that was raised already.
    pub(super) fn fence_held(&self, branch: BranchId) -> Fence {
        Fence { clients: self.clients.clone(), branch }
    }

    /// Waits for a branch's lock.
    pub(super) async fn lock(&self, cell: &Cell) -> Result<tokio::sync::OwnedMutexGuard<()>> {
        tokio::time::timeout(LOCK_WAIT_MAX, cell.ops.clone().lock_owned())
            .await
            .map_err(|_| Error::Deadline("waiting for another act on the branch"))
    }

    /// Suspends a compute for idleness, unless something else is going on with the branch or its clients object.
    pub(super) async fn suspend_idle(&self, project: &Arc<Project>, branch: BranchId) -> Result<()> {
        let cell = project.cell(branch);
        let Ok(_ops) = cell.ops.clone().try_lock_owned() else {
            return Ok(());
        };
        if !self.is_idle(project, branch, &cell) {
            return Ok(());
        }
        self.check_disk()?;
        let rest = project.ledger.state().branch_by_id(branch)?.pinned.rest();
        self.suspend_locked(project, branch, IDLE_FENCE_MAX, rest).await
    }

    /// Stops a compute, records its seal, lets its clients go on (their next message wakes it again).
    pub(super) async fn suspend_locked(
        &self,
        project: &Arc<Project>,
        branch: BranchId,
        deadline: Duration,
        rest: Rest,
    ) -> Result<()> {
        let line = project.line(branch)?.line;
        let stopped = self.stop_locked(project, branch, LayerId::generate(), deadline, rest).await;
        let result = if stopped.is_ok() { "ok" } else { "refused" };
        metrics::counter!("ebb_timeline_suspends_total", "result" => result).increment(1);
        let (_fence, sealed) = stopped?;
        tracing::info!(%branch, "compute suspended");
        self.note_seal(project, branch, line, sealed).await
    }

    /// Records what a seal without an operation came to, with the branch's lock held. It has happened whether or not the
    /// bucket can be reached now: a record that cannot be made is made up for later.
    pub(super) async fn note_seal(
        &self,
        project: &Project,
        branch: BranchId,
        line: u64,
        sealed: Option<Sealed>,
    ) -> Result<()> {
        let Some(sealed) = sealed else {
            self.settle(project, branch);
            return Ok(());
        };
        project.cell(branch).inner.lock().unrecorded = Some((line, sealed));
        self.record_seal(project, branch).await
    }

    /// Records a seal that is not recorded yet, with the branch's lock held.
    pub(super) async fn record_seal(&self, project: &Project, branch: BranchId) -> Result<()> {
        let Some((line, Sealed { layer, end, .. })) = project.cell(branch).inner.lock().unrecorded else {
            return Ok(());
        };
        let command = Command::Sealed { branch, line, layer, end };
        project.append("ebb", None, |state| Ok((crate::decide::decide(state, &command)?, ()))).await?;
        self.settle(project, branch);
        Ok(())
    }

    /// Suspends every compute and uploads what that sealed, within the deadline as far as that is possible; the rest
    /// goes on and is adopted, or uploaded, by the next service. After this the service takes on no more work.
    pub async fn suspend_all(self: &Arc<Self>, deadline: Duration) {
        let until = Instant::now() + deadline;
        let mut suspensions = Vec::new();
        for project in self.own_projects() {
            for &branch in project.ledger.state().branches.keys() {
                if !matches!(project.cell(branch).inner.lock().compute, Compute::Suspended) {
                    suspensions.push(self.suspend_by(project.clone(), branch, until));
                }
            }
        }
        let all = futures::future::join(futures::future::join_all(suspensions), self.end_visits());
        if tokio::time::timeout(deadline, all).await.is_err() {
            tracing::warn!("some computes did not stop in time; they go on until the next start finds them");
        }
        // What the stop has sealed goes up before the process ends, so that a bucket copied now is complete.
        match tokio::time::timeout_at(until.into(), self.upload_pending()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.report("uploading layers", &error),
            Err(_) => tracing::warn!("some layers are not in the bucket yet; the next start uploads them"),
        }
        self.stopping.cancel();
        self.tasks.close();
        let asleep = |project: &Arc<Project>| {
            let cells = project.cells.lock();
            cells.values().all(|cell| cell.inner.lock().is_settled() && cell.inner.lock().unrecorded.is_none())
        };
        if self.own_projects().iter().all(asleep) {
            // Others need not wait until the record expires.
            if let Err(error) = self.nodes.stop().await {
                self.report("saying that this node is stopped", &error);
            }
        }
        // LIMIT: what is under way is only finishing its last steps; whatever is not is recovered at the next start.
        let rest = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        if tokio::time::timeout(rest, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "some work did not end in time");
        }
    }

    /// Leaves the computes to the service that follows on this node: they go on, and it adopts them. Clients of other nodes
    /// are set aside first, within the deadline; they come back to whoever then answers. After this the service takes on no
    /// more work.
    pub async fn leave_running(self: &Arc<Self>, deadline: Duration) {
        let until = Instant::now() + deadline;
        let mut awake = Vec::new();
        for project in self.own_projects() {
            for &branch in project.ledger.state().branches.keys() {
                if matches!(project.cell(branch).inner.lock().compute, Compute::Active(_)) {
                    awake.push(branch);
                }
            }
        }
        // Never released: whoever holds clients lets them go when this service is gone.
        let fences = awake.iter().map(|&branch| self.clients.fence(branch, deadline / 2, Rest::End));
        let all = futures::future::join(futures::future::join_all(fences), self.end_visits());
        if tokio::time::timeout_at(until.into(), all).await.is_err() {
            tracing::warn!("some clients of other nodes were not set aside in time");
        }
        self.stopping.cancel();
        self.tasks.close();
        let rest = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        if tokio::time::timeout(rest, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "some work did not end in time");
        }
    }

    async fn suspend_by(self: &Arc<Self>, project: Arc<Project>, branch: BranchId, until: Instant) {
        let cell = project.cell(branch);
        let _ops = cell.ops.clone().lock_owned().await;
        if !matches!(cell.inner.lock().compute, Compute::Active(_)) {
            return;
        }
        let rest = until.saturating_duration_since(Instant::now());
        if let Err(error) = self.suspend_locked(&project, branch, rest, Rest::End).await {
            self.report("suspending a compute", &error);
        }
    }
}

/// One line about a session that keeps a compute awake.
fn describe(row: &SessionRow) -> String {
    let reason = row.reason.as_deref().unwrap_or(&row.state);
    format!("connection {} of {}@{} from {}: {reason}", row.conn, row.role, row.database, row.peer)
}
