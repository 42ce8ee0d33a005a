//! Whose a project is. One node acts for a project at a time: its *owner*, by an entry in the project's ledger.
//!
//! ```text
//!                      ┌─ it is this node, and nobody can take it for dead ─► ours
//!   who asks for it ───┼─ another, whose record is renewed ─────────────────► theirs: relay to it
//!                      └─ nobody, or one whose record has expired ──────────► take over: epoch + 1
//! ```
//!
//! **Invariants**
//! - Everything in a project's ledger was appended by its owner of that moment: [`Project::append`] decides on the newest
//!   state, and whoever was overtaken sees the new owner's entry first (I9).
//! - A volume is used in the epoch in which it was made, and in no other: another node may have been awake since.
//! - Before the WAL of an earlier epoch is read, its archive is fenced: whoever was owner can have no commit
//!   acknowledged at durability `bucket` after that (I1). The first wake of a branch does it, the takeover itself for all.
//! - A node that others may take for dead serves nothing and stops its computes. It goes on while it is alone, or all others
//!   have promised to take nothing over, because the bucket is away for them, too.
//! - A node whose record had expired is owner again of what nobody took over meanwhile; where there may have been another
//!   node, by an entry of its own. A takeover that was decided before, and comes after it, is refused.
//!
//! **Crash.** A takeover is one entry: it happened or not. Fencing what was not fenced yet is part of the next wake.
//!
//! A clean hand-over has a single entry too, at its end; until then the computes sleep, and wake here if it fails.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ebb_types::{BranchId, EndpointName, LayerId, NodeId, OperationId, ProjectName};
use futures::stream::{self, StreamExt as _};

use super::compute::Fence;
use super::projects::check_idle;
use super::{Caller, Project, Service};
use crate::api::types as api;
use crate::clients::Rest;
use crate::event::{Event, Plan};
use crate::machine::{Compute, ComputeEvent, Standing as Listing};
use crate::nodes::{Addresses, Others, Record, Standing};
use crate::state::{Owner, ProjectState};
use crate::{Error, Refusal, Result};

/// LIMIT: small requests, made to hide the bucket's latency.
const PARALLEL: usize = 16;

/// How often it is looked what other nodes have recorded; also how old an answer about their projects may be.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// LIMIT: names are not authenticated: looking for one that nobody knows costs the bucket a request so often.
const LOOK_SOONEST: Duration = Duration::from_millis(100);

/// LIMIT: of others' projects looked at in one go. A lookup of one in particular looks by itself.
const LOOKED_AT_ONCE: usize = 32;

/// LIMIT: how long open transactions may go on before a hand-over ends them.
const FENCE_MAX: Duration = Duration::from_secs(10);

/// Where a branch is awake, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this node.
    Here,
    /// On another one, which is alive.
    There(Box<Record>),
    /// Nowhere: its owner is gone, or it never had one.
    Nowhere,
}

impl Project {
    /// Appends to the ledger as the project's owner. As [`crate::ledger::Ledger::append`] otherwise.
    pub(super) async fn append<R>(
        &self,
        actor: &str,
        op: Option<OperationId>,
        decide: impl Fn(&ProjectState) -> Result<(Vec<Event>, R)>,
    ) -> Result<R> {
        let owned = |state: &ProjectState| match state.owner {
            Some(owner) if owner.node == self.node => decide(state),
            owner => Err(self.elsewhere(owner, None)),
        };
        self.ledger.append(actor, op, owned).await
    }

    /// Whether this node is the owner, as far as it knows.
    pub(super) fn is_ours(&self) -> bool {
        self.ledger.state().owner.is_some_and(|owner| owner.node == self.node)
    }

    /// Whether any of its computes runs on this node, as far as is known.
    fn is_awake_here(&self) -> bool {
        self.cells.lock().values().any(|cell| !matches!(cell.inner.lock().compute, Compute::Suspended))
    }

    pub(super) fn elsewhere(&self, owner: Option<Owner>, record: Option<&Record>) -> Error {
        let node = record.map(|record| record.name.clone()).or(owner.map(|owner| owner.node.to_string()));
        Refusal::Elsewhere { project: self.name.clone(), node: node.unwrap_or_default() }.into()
    }
}

impl Service {
    /// Tells other nodes where this one is to be reached.
    ///
    /// # Errors
    /// If the bucket cannot be written; it is tried again soon.
    pub async fn announce(self: &Arc<Self>, addresses: Addresses) -> Result<()> {
        self.nodes.set_addresses(addresses);
        if self.nodes.renew().await? {
            self.nodes.look().await?;
            self.keep_awake_projects().await;
        }
        Ok(())
    }

    /// This node's identifier.
    pub fn node_id(&self) -> NodeId {
        self.nodes.me()
    }

    /// The secret by which the nodes of this bucket know each other: the same on all that have the same `secret.key`.
    pub fn peer_secret(&self) -> &[u8; 32] {
        self.secrets.peers()
    }

    /// What the salts of unknown roles are made from: the same on all nodes that have the same `secret.key`.
    pub fn mock_secret(&self) -> [u8; 32] {
        blake3::derive_key("ebb 2026-11-21 salts of unknown roles", self.secrets.peers().as_slice())
    }

    /// Where a branch is, by what the bucket says. Takes nothing over and wakes nothing.
    ///
    /// # Errors
    /// If there is no such branch, or the bucket cannot tell whose it is.
    pub async fn place(&self, branch: BranchId) -> Result<Place> {
        // A visit is read out of the bucket wherever it is asked for.
        if self.named_visit(branch).is_some() {
            return Ok(Place::Here);
        }
        self.place_of(&*self.project_of(branch)?).await
    }

    /// Where the branches of a project are.
    ///
    /// # Errors
    /// As [`Service::place`].
    pub async fn place_of_project(&self, name: &str) -> Result<Place> {
        let project = match self.project(name) {
            Ok(project) => project,
            Err(error) if !self.nodes.has_peers() => return Err(error),
            Err(_) => {
                self.look_for_projects().await?;
                self.project(name)?
            }
        };
        self.place_of(&project).await
    }

    async fn place_of(&self, project: &Project) -> Result<Place> {
        if self.may_act(project) {
            return Ok(Place::Here);
        }
        if project.is_ours() && self.nodes.term().is_none() {
            // The bucket cannot be asked, or would have been.
            return Err(Error::Isolated);
        }
        self.look_at(project).await?;
        let Some(owner) = project.ledger.state().owner else { return Ok(Place::Nowhere) };
        if owner.node == self.nodes.me() {
            return match self.nodes.term() {
                Some(_) => Ok(Place::Here),
                None => Err(Error::Isolated),
            };
        }
        Ok(match self.nodes.standing(owner.node).await? {
            Standing::Alive(record) => Place::There(Box::new(record)),
            Standing::Gone => Place::Nowhere,
        })
    }

    /// Whether this node is the owner, and no other can have taken over meanwhile.
    pub(super) fn may_act(&self, project: &Project) -> bool {
        project.is_ours()
            && project.term.load(Ordering::Relaxed) == self.nodes.last_term()
            && (self.nodes.term().is_some() || self.nodes.is_excused())
    }

    /// Makes sure that this node is the project's owner, taking over from one that is gone.
    ///
    /// # Errors
    /// `Elsewhere` where another node is; [`Error::Isolated`] if that cannot be known.
    pub(super) async fn claim(self: &Arc<Self>, project: &Arc<Project>) -> Result<()> {
        if self.may_act(project) {
            return Ok(());
        }
        let _turn = project.claiming.lock().await;
        if self.may_act(project) {
            return Ok(());
        }
        let term = self.nodes.term().ok_or(Error::Isolated)?;
        let owner = project.ledger.refresh().await?.owner;
        match owner {
            Some(owner) if owner.node == self.nodes.me() => {
                if self.nodes.has_company().await? {
                    self.keep(project, owner).await?;
                }
            }
            Some(owner) => match self.nodes.standing_now(owner.node).await? {
                Standing::Alive(record) => {
                    if project.is_awake_here() {
                        self.lose(project).await;
                    }
                    return Err(project.elsewhere(Some(owner), Some(&record)));
                }
                Standing::Gone => self.take_over(project, Some(owner)).await?,
            },
            None => self.take_over(project, None).await?,
        }
        self.note_kept(project, Some(term));
        Ok(())
    }

    /// Records that the project is still this node's. Whoever took it for dead, and has not recorded so yet, is refused.
    async fn keep(&self, project: &Project, owner: Owner) -> Result<()> {
        let kept = |state: &ProjectState| {
            state.facts()?;
            match state.owner == Some(owner) {
                true => Ok((vec![Event::OwnerKept { node: owner.node }], ())),
                false => Err(project.elsewhere(state.owner, None)),
            }
        };
        project.ledger.append("ebb", None, kept).await
    }

    async fn take_over(self: &Arc<Self>, project: &Arc<Project>, from: Option<Owner>) -> Result<()> {
        // It may have promised just now not to; whoever asks tries again.
        let _taking_over = self.nodes.take_over().ok_or_else(|| project.elsewhere(from, None))?;
        // Whatever this node still has of an earlier epoch of its own.
        self.drop_computes(project).await;
        if let (Some(from), Some(others)) = (from, self.others.get())
            && let Some(record) = self.nodes.last_record(from.node)
        {
            // One that is cut off from the bucket alone may take itself for alone in the world.
            let own = self.nodes.own_record();
            let warned = others.warn(&record, &own);
            let _ = tokio::time::timeout(self.nodes.renew_every() / 2, warned).await;
        }
        let (node, epoch) = (self.nodes.me(), from.map_or(0, |owner| owner.epoch) + 1);
        project
            .ledger
            .append("ebb", None, |state| {
                state.facts()?;
                match state.owner == from {
                    true => Ok((vec![Event::OwnerChanged { node, epoch }], ())),
                    // Another was quicker, or the owner was alive after all.
                    false => Err(project.elsewhere(state.owner, None)),
                }
            })
            .await?;
        if let Some(from) = from {
            metrics::counter!("ebb_timeline_takeovers_total").increment(1);
            tracing::warn!(project = %project.name, from = %from.node, epoch, "taken over from a node that is gone");
            let (service, project) = (self.clone(), project.clone());
            self.tasks.spawn(async move { service.fence_archives(&project).await });
            // What the last owner had begun is to be finished or undone.
            self.left_behind.notify_one();
        }
        Ok(())
    }

    /// Takes over from nodes that are gone where they left an operation half-way: it is brought to done or undone.
    pub(super) async fn take_over_unfinished(self: &Arc<Self>) {
        for project in self.all_projects() {
            if project.is_ours() || project.ledger.state().operations.is_empty() {
                continue;
            }
            match self.place_of(&project).await {
                Ok(Place::Nowhere) => {
                    if let Err(error) = self.claim(&project).await {
                        self.report("taking over a project", &error);
                    }
                }
                Ok(Place::Here | Place::There(_)) => {}
                Err(error) => self.report("looking for a project's owner", &error),
            }
        }
    }

    /// After the ledgers were read, which was after this node's record was renewed: what was this node's, is, unless there
    /// may be others. Projects from before there were owners get this one.
    pub(super) async fn claim_known(self: &Arc<Self>) -> Result<()> {
        let is_alone = !self.nodes.has_company().await?;
        for project in self.all_projects() {
            if is_alone && project.is_ours() {
                self.note_kept(&project, self.nodes.term());
            }
            if project.ledger.state().owner.is_none()
                && let Err(error) = self.claim(&project).await
            {
                self.report("taking over a project", &error);
            }
        }
        self.keep_awake_projects().await;
        Ok(())
    }

    /// Notes that the project was seen to be this node's in this term.
    pub(super) fn note_kept(&self, project: &Project, term: Option<u64>) {
        if let Some(term) = term {
            project.term.store(term, Ordering::Relaxed);
        }
    }

    /// Shuts earlier owners out of every WAL archive of the project. Best effort: a wake fences what it reads.
    async fn fence_archives(&self, project: &Project) {
        let branches: Vec<BranchId> = project.ledger.state().branches.keys().copied().collect();
        stream::iter(branches)
            .for_each_concurrent(PARALLEL, |branch| async move {
                let Ok(line) = project.line(branch) else { return };
                if let Err(error) = self.node.fence_wal(&line).await {
                    self.report("fencing an archive", &error);
                }
            })
            .await;
    }

    /// The project is another node's now: whatever still runs here is ended. Its volumes stay as they are: they may hold
    /// what was acknowledged at durability `local` and never left this node.
    async fn lose(&self, project: &Project) {
        metrics::counter!("ebb_timeline_projects_lost_total").increment(1);
        tracing::warn!(project = %project.name, "another node has taken over; the computes here are ended");
        self.drop_computes(project).await;
    }

    /// Ends all computes of a project without sealing.
    async fn drop_computes(&self, project: &Project) {
        let cells: Vec<_> = project.cells.lock().iter().map(|(branch, cell)| (*branch, cell.clone())).collect();
        for (branch, cell) in cells {
            let active = matches!(cell.inner.lock().compute, Compute::Active(_));
            if active && let Err(error) = self.node.discard(branch).await {
                self.report("ending a compute", &error);
            }
            let mut inner = cell.inner.lock();
            inner.forget();
            if let Compute::Active(serving) = &inner.compute {
                let generation = serving.generation;
                if inner.step(ComputeEvent::Lost { generation }, self.clock.now()).is_ok() {
                    self.clients.lost(branch, generation);
                }
            }
        }
    }

    /// Keeps this node's record fresh.
    pub(super) async fn keep_record_forever(self: &Arc<Self>) {
        let every = self.nodes.renew_every();
        loop {
            tokio::time::sleep(every.mul_f64(rand::random_range(0.9..1.0))).await;
            // A put that hangs is not to keep the next one from being made.
            let renewed = match tokio::time::timeout(every * 2, self.nodes.renew()).await {
                Ok(renewed) => renewed,
                Err(_) => Err(Error::Deadline("renewing this node's record")),
            };
            match renewed {
                Ok(true) => self.look_now.notify_one(),
                Ok(false) => {}
                Err(error) => self.report("renewing this node's record", &error),
            }
        }
    }

    /// Keeps this node's knowledge of the others fresh, and of what it owns.
    pub(super) async fn look_at_records_forever(self: &Arc<Self>) {
        let every = self.nodes.renew_every();
        loop {
            tokio::select! {
                () = tokio::time::sleep(every.mul_f64(rand::random_range(0.9..1.0))) => {}
                () = self.look_now.notified() => {}
            }
            match self.nodes.look().await {
                Ok(()) => self.keep_awake_projects().await,
                Err(error) => {
                    self.nodes.tried();
                    self.report("looking at other nodes' records", &error);
                }
            }
        }
    }

    /// How to reach other nodes when the bucket is away. Only the first call counts.
    pub fn set_others(&self, others: Arc<dyn Others>) {
        let _ = self.others.set(others);
    }

    /// Promises to take nothing over for this long, if the bucket is away for this node; see [`Others::hold`].
    pub fn hold(&self, time: Duration) -> bool {
        self.nodes.promise(time)
    }

    /// Another node says that it is about to take over from this one; see [`Others::warn`].
    pub fn challenged(&self, by: Record) {
        tracing::warn!(node = by.name, "another node takes this one for dead, and takes over");
        self.nodes.challenged(by);
    }

    /// Whether what computes of this node have said by now may be told to clients: no other node can have taken over
    /// before. Cheap enough to be asked with every message.
    pub fn may_answer(&self) -> bool {
        self.nodes.may_answer()
    }

    /// Whether another node has not renewed its record in time: what it owns is taken over, whatever it says.
    pub fn is_gone(&self, node: NodeId) -> bool {
        self.nodes.is_gone(node)
    }

    /// Stops everything as soon as other nodes may take this one for dead: not while they cannot reach the bucket, either.
    pub(super) async fn watch_record_forever(self: &Arc<Self>) {
        let mut isolated = false;
        loop {
            tokio::time::sleep(self.nodes.renew_every() / 4).await;
            if !self.nodes.tick() {
                self.look_now.notify_one();
            }
            if let (Some(time), Some(others)) = (self.nodes.needs_hold(), self.others.get()) {
                self.nodes.ask_to_hold(&**others, time).await;
            }
            let now = self.nodes.term().is_none() && !self.nodes.is_excused();
            if now && !isolated {
                tracing::error!("the bucket cannot be reached: other nodes may take over, so all computes are ended");
                metrics::counter!("ebb_timeline_isolations_total").increment(1);
                for project in self.own_projects() {
                    self.drop_computes(&project).await;
                }
            }
            isolated = now;
            metrics::gauge!("ebb_timeline_isolated").set(f64::from(u8::from(now)));
        }
    }

    /// Finds out whether projects that are awake here were taken over, and ends what was. After that what is still awake
    /// may be heard, in a new term, too.
    pub(super) async fn keep_awake_projects(self: &Arc<Self>) {
        let Some(term) = self.nodes.term() else { return };
        let awake: Vec<_> = self.all_projects().into_iter().filter(|project| project.is_awake_here()).collect();
        stream::iter(awake)
            .for_each_concurrent(PARALLEL, |project| async move {
                let known = project.term.load(Ordering::Relaxed) == term;
                let kept = match known {
                    true => project.ledger.refresh().await.map(drop),
                    false => self.claim(&project).await,
                };
                match kept {
                    Ok(()) if project.is_ours() => {}
                    Err(error) if known => self.report("reading a ledger", &error),
                    _ if project.is_awake_here() => self.lose(&project).await,
                    // Found out, and ended, by the claim.
                    _ => {}
                }
            })
            .await;
        self.nodes.confirm(term);
    }

    /// Keeps up with what other nodes record.
    pub(super) async fn look_at_others_forever(self: &Arc<Self>) {
        let mut next = 0;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if !self.nodes.has_peers() {
                continue;
            }
            if let Err(error) = self.look_for_projects().await {
                self.report("reading the catalog", &error);
                continue;
            }
            let others: Vec<_> = self.all_projects().into_iter().filter(|project| !project.is_ours()).collect();
            let some: BTreeSet<usize> =
                (next..next + LOOKED_AT_ONCE.min(others.len())).map(|n| n % others.len()).collect();
            next += LOOKED_AT_ONCE;
            for project in some.into_iter().map(|n| &others[n]) {
                if let Err(error) = self.look_at(project).await {
                    self.report("reading a ledger", &error);
                }
            }
        }
    }

    /// Takes in what another node has recorded of its project, unless that was just done.
    async fn look_at(&self, project: &Project) -> Result<()> {
        let mut looked_at = project.looked_at.lock().await;
        if looked_at.is_none_or(|last| last.elapsed() >= LOOK_EVERY) {
            project.ledger.refresh().await?;
            *looked_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Opens projects that other nodes have made, and forgets those that they have deleted. Any number of callers make one
    /// look at a time, each that begins after they called.
    async fn look_for_projects(&self) -> Result<()> {
        let called_at = Instant::now();
        let mut looked_at = self.looked_at.lock().await;
        if looked_at.is_some_and(|last| last >= called_at) {
            return Ok(());
        }
        if let Some(last) = *looked_at {
            tokio::time::sleep_until((last + LOOK_SOONEST).into()).await;
        }
        let begun = Instant::now();
        let catalog = self.catalog.refresh().await?;
        *looked_at = Some(begun);
        for (&id, listed) in &catalog.projects {
            let known = self.projects.read().contains_key(&id) || self.moving.lock().contains(&id);
            if listed.standing == Listing::Live && !known {
                let project = self.open_project(id, listed.name.clone()).await?;
                self.projects.write().entry(id).or_insert_with(|| Arc::new(project));
            }
        }
        let moving = self.moving.lock();
        self.projects.write().retain(|id, _| catalog.projects.contains_key(id) || moving.contains(id));
        Ok(())
    }

    /// Looks for an endpoint that was not found among what other nodes have made. `false`: there is nothing new.
    pub(super) async fn look_for(&self, endpoint: &EndpointName) -> Result<bool> {
        if !self.nodes.has_peers() {
            return Ok(false);
        }
        self.look_for_projects().await?;
        match self.project(endpoint.branch_ref().project.as_str()) {
            Ok(project) if !project.is_ours() => self.look_at(&project).await.map(|()| true),
            Ok(_) => Ok(true),
            Err(_) => Ok(false),
        }
    }

    /// Who made a project that is not there yet, or is about to go: it is theirs to finish, unless they are gone.
    pub(super) async fn may_finish(&self, node: Option<NodeId>) -> Result<bool> {
        match node {
            Some(node) if node != self.nodes.me() => Ok(self.nodes.standing_now(node).await? == Standing::Gone),
            _ => Ok(true),
        }
    }

    /// All nodes that are alive, this one first.
    pub fn node_views(&self) -> Vec<api::Node> {
        let mut projects: BTreeMap<NodeId, Vec<ProjectName>> = BTreeMap::new();
        for project in self.all_projects() {
            if let Some(owner) = project.ledger.state().owner {
                projects.entry(owner.node).or_default().push(project.name.clone());
            }
        }
        let mut view = |record: Record| {
            let mut projects = projects.remove(&record.node).unwrap_or_default();
            projects.sort();
            api::Node { id: record.node, name: record.name, api: record.api, peer: record.peer, projects }
        };
        self.nodes.alive().into_iter().map(&mut view).collect()
    }

    /// Hands a project over to another node: its computes are stopped here, and wake there when they are next asked for.
    /// Clients are held meanwhile, and stay connected.
    ///
    /// # Errors
    /// If there is no such node, an operation is under way, or something cannot be brought to the bucket: the project
    /// then stays, and its computes wake here again.
    pub async fn move_project(self: &Arc<Self>, caller: &Caller, project: &str, to: &str) -> Result<NodeId> {
        let (service, caller, project) = (self.clone(), caller.clone(), self.project(project)?);
        let to = self.find_node(to)?;
        self.tracked("the hand-over", async move {
            service.claim(&project).await?;
            if to != service.nodes.me() {
                service.hand_over(&caller, &project, to).await?;
            }
            Ok(to)
        })
        .await
    }

    fn find_node(&self, name: &str) -> Result<NodeId> {
        let alive = self.nodes.alive();
        let is = |record: &&Record| record.name == name || record.node.to_string() == name;
        let found: Vec<NodeId> = alive.iter().filter(is).map(|record| record.node).collect();
        match found.as_slice() {
            [node] => Ok(*node),
            [] => {
                let near = ebb_types::nearest(name, alive.iter().map(|record| record.name.as_str()));
                let near = near.into_iter().map(str::to_owned).collect();
                Err(Refusal::NoNode { name: name.to_owned(), near }.into())
            }
            _ => {
                Err(Refusal::Invalid(format!("there are several nodes called {name:?}: name it by its identifier"))
                    .into())
            }
        }
    }

    async fn hand_over(self: &Arc<Self>, caller: &Caller, project: &Arc<Project>, to: NodeId) -> Result<()> {
        let branches: Vec<BranchId> = project.ledger.state().branches.keys().copied().collect();
        let mut locks = Vec::new();
        for &branch in &branches {
            locks.push(self.lock(&project.cell(branch)).await?);
        }
        // Most of what there is goes to the bucket while clients still work.
        for &branch in &branches {
            let line = project.line(branch)?.line;
            let sealed = self.seal_locked(project, branch, LayerId::generate()).await?;
            self.note_seal(project, branch, line, sealed).await?;
        }
        self.upload_project(project).await?;
        let mut fences: Vec<Fence> = Vec::new();
        for &branch in &branches {
            let line = project.line(branch)?.line;
            let (fence, sealed) = self.stop_locked(project, branch, LayerId::generate(), FENCE_MAX, Rest::End).await?;
            fences.push(fence);
            self.note_seal(project, branch, line, sealed).await?;
        }
        self.upload_project(project).await?;
        project
            .append(&caller.actor, Some(OperationId::generate()), |state| {
                check_idle(state)?;
                let begun = Event::OperationBegun { plan: Box::new(Plan::MoveProject { to }), key: None };
                let moved = Event::OwnerChanged { node: to, epoch: state.epoch() + 1 };
                Ok((vec![begun, moved, Event::OperationDone], ()))
            })
            .await?;
        tracing::info!(project = %project.name, %to, "project handed over");
        for &branch in &branches {
            // All of it is in the bucket, and no other epoch can use it.
            if let Err(error) = self.node.remove_volume(branch).await {
                self.report("removing a volume that was handed over", &error);
            }
            project.cell(branch).inner.lock().forget();
        }
        drop(fences);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
