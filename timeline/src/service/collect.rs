//! Collection: what nothing needs any more leaves the bucket and this node.
//!
//! One round, under one lock:
//!
//! ```text
//! 1  list what is in the bucket and on this node             candidates: nothing newer is touched in this round
//! 2  fence: wait for templates being made, for appends under way; read every ledger's news
//! 3  roots of all projects and their whole chains            what is kept
//! 4  mark what is listed and not kept (receipt), spare what is kept after all (receipt)
//! 5  of the marks older than the grace period: take artifacts for oneself, fence and look again as in 2 and 3,
//!    say what will go (receipt), delete it, say that it is gone (receipt)
//! 6  local layers and branch directories that nothing needs
//! ```
//!
//! **Invariants.** Candidates come before the fence, the state after it: what was made meanwhile is no candidate, and
//! what was being named is named by then. Where a layer may pass from one keeper to another (a volume, a seal to be
//! recorded, a ledger), the one it leaves is read first. A layer that nobody can name is never named again ([`crate::reach`]); an
//! artifact may be, by its content, so whoever takes one in and whoever deletes it exclude each other by its name.
//! If any ledger, manifest or listing cannot be read, nothing goes.
//!
//! **Crash.** At any step: marks and begun deletions are in the receipts, and the next round looks at them again.
//!
//! **Local data** goes only where it can be had again (the bucket has the layer), or where an entry of a ledger let it go
//! at least the grace period after it was made. What no ledger of this bucket ever heard of stays: it may belong to
//! another bucket, or be newer than a bucket that was put back from a copy. Layers that a volume of this node lies on
//! stay, recorded or not. An open volume reads through a page map that names layers of its newest seals only.
//!
//! LIMIT: another node on the same bucket is not excluded while it is between finding an artifact in the bucket and
//! recording its release; layers of its making are safe, being younger than any mark.

pub(crate) mod explain;
mod own;
#[cfg(test)]
mod tests;
mod why;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ebb_storage::object_store::ObjectMeta;
use ebb_types::{BranchId, LayerId, ProjectId, Timestamp};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::{Caller, Service};
use crate::api::types as api;
use crate::collect::{COLLECT, COLLECTED_PREFIXES, CollectEvent, Marks, Object, Rule, Unkept, chosen_at};
use crate::ledger::Ledger;
use crate::reach::{self, Keeper, Root};
use crate::state::ProjectState;
use crate::{Error, Result};

/// LIMIT: objects marked, and deleted, in one round: an entry of the receipts stays readable, and a round ends.
const OBJECTS_MAX: usize = 1000;

/// LIMIT: enough to hide a bucket's latency; deleting is in nobody's way.
const PARALLEL: usize = 16;

/// LIMIT: what is younger is not even looked at, because its maker may be about to name it: another node, say.
const YOUNG: Duration = Duration::from_secs(3600);

/// LIMIT: so long an answer about a branch waits for what the branch stores; a bucket that is away must not hide the rest.
const STORED_WITHIN: Duration = Duration::from_secs(2);

/// LIMIT: how long after its start a service collects first; one that is restarted every hour must, too.
const FIRST_AFTER: Duration = Duration::from_secs(300);

/// When collection happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectPolicy {
    /// How long an object that nothing needs stays in the bucket.
    pub grace: Duration,
    /// Time from the end of one round to the next.
    pub interval: Duration,
}

impl Default for CollectPolicy {
    /// A week to notice a mistake; a round an hour costs a listing and a question to each ledger.
    fn default() -> Self {
        Self { grace: Duration::from_secs(7 * 24 * 3600), interval: Duration::from_secs(3600) }
    }
}

/// What the service remembers between rounds.
#[derive(Debug, Default)]
pub(super) struct Collector {
    /// One round at a time.
    turn: tokio::sync::Mutex<()>,
    /// Opened when first needed: a start does not wait for it.
    receipts: OnceCell<Ledger<Marks>>,
    /// Chains never change. Those of layers that are no roots any more are dropped after each round.
    chains: Mutex<HashMap<LayerId, Arc<[LayerId]>>>,
    /// Sizes of layers in the bucket, which never change either.
    pub sizes: Mutex<HashMap<LayerId, u64>>,
    /// The templates' layers, as they were when they were last asked for.
    templates: Mutex<Option<Vec<Root>>>,
    /// Layers that were looked for in all ledgers in vain.
    orphans: Mutex<HashSet<LayerId>>,
}

/// What must stay, as the ledgers told it after a fence.
#[derive(Debug, Default)]
struct Kept {
    layers: HashSet<LayerId>,
    artifacts: HashSet<String>,
    /// Projects in the catalog, in whatever state.
    projects: BTreeSet<ProjectId>,
    /// Branches that a ledger says were deleted.
    deleted_branches: BTreeSet<BranchId>,
    /// The branches there are, and the oldest line of each that can be gone back to.
    oldest_lines: BTreeMap<BranchId, u64>,
}

impl Kept {
    fn keeps(&self, object: &Object) -> bool {
        match object {
            Object::Layer(layer) => self.layers.contains(layer),
            Object::Artifact(hash) => self.artifacts.contains(hash),
            Object::Secret(project) => self.projects.contains(project),
            Object::Wal(branch, line) => self.oldest_lines.get(branch).is_some_and(|oldest| line >= oldest),
            Object::Ledger(_) | Object::Template(_) | Object::Catalog | Object::Receipt => true,
            // A boot set goes with its layer.
            Object::Boot(_) | Object::Node(_) | Object::Other => true,
        }
    }
}

/// What was there before the fence.
struct Seen {
    objects: Vec<ObjectMeta>,
    local_layers: BTreeSet<LayerId>,
    local_branches: BTreeSet<BranchId>,
    /// What this node's volumes lie on, recorded or not.
    bases: BTreeSet<LayerId>,
}

impl Service {
    /// Collects at intervals.
    pub(super) async fn collect_forever(self: &Arc<Self>) {
        let mut wait = self.config.collect.interval.min(FIRST_AFTER);
        loop {
            // Jitter: nodes that were started together should not collect together.
            tokio::time::sleep(wait.mul_f64(rand::random_range(0.9..1.1))).await;
            if let Err(error) = self.collect(&Caller::ebb(), false).await {
                self.report("collecting", &error);
            }
            self.forget_wal().await;
            wait = self.config.collect.interval;
        }
    }

    /// One round of collection; or, with `dry_run`, what one would do.
    ///
    /// # Errors
    /// If anything that could tell what must stay cannot be read: then nothing goes.
    pub async fn collect(self: &Arc<Self>, caller: &Caller, dry_run: bool) -> Result<api::Collected> {
        let began = std::time::Instant::now();
        let _turn = self.collector.turn.lock().await;
        // What a rule lets go first: from then on nothing needs what only that needed.
        let expired = self.expire(dry_run).await;
        let outcome = self.collect_round(&caller.actor, dry_run).await;
        let outcome = outcome.map(|collected| api::Collected { expired, ..collected });
        if !dry_run {
            let result = if outcome.is_ok() { "ok" } else { "failed" };
            metrics::counter!("ebb_timeline_collect_rounds_total", "result" => result).increment(1);
            metrics::histogram!("ebb_timeline_collect_round_seconds").record(began.elapsed());
        }
        outcome
    }

    async fn collect_round(&self, actor: &str, dry_run: bool) -> Result<api::Collected> {
        let receipts = self.receipts().await?;
        let marks = receipts.refresh().await?;
        let seen = self.look().await?;
        let kept = self.kept().await?;
        let mut report = api::Collected { dry_run, ..api::Collected::default() };
        for object in &seen.objects {
            if kept.keeps(&Object::of(&object.key)) {
                report.kept_objects += 1;
                report.kept_bytes += object.size;
            }
        }
        let unkept = self.unkept(&seen, &kept, &marks).await?;
        let spared: Vec<String> = marks.marks.keys().filter(|key| kept.keeps(&Object::of(key))).cloned().collect();
        if !dry_run {
            self.mark(receipts, actor, &unkept, &spared).await?;
        }
        report.marked = unkept.iter().map(unkept_view).collect();
        report.spared = spared;
        let now = self.clock.now();
        if dry_run {
            let due = marks.due(now, self.config.collect.grace).into_iter().map(|mark| &mark.object);
            let due = due.filter(|object| !kept.keeps(&Object::of(&object.key))).take(OBJECTS_MAX);
            report.deleted = due.map(unkept_view).collect();
        } else {
            let deleted = self.delete_due(receipts, actor, now, &mut report.spared).await?;
            report.deleted = deleted.iter().map(unkept_view).collect();
        }
        self.collect_local(&seen, &kept, now, &mut report).await?;
        let grace = self.config.collect.grace;
        let marks = receipts.state();
        let waiting = marks.marks.values().map(|mark| api::Waiting {
            object: unkept_view(&mark.object),
            since: mark.since,
            until: mark.due_at(grace),
        });
        report.waiting = waiting.filter(|one| !report.deleted.contains(&one.object)).collect();
        let bytes: u64 = report.waiting.iter().map(|one| one.object.bytes).sum();
        metrics::gauge!("ebb_timeline_collect_waiting_objects").set(report.waiting.len() as f64);
        metrics::gauge!("ebb_timeline_collect_waiting_bytes").set(bytes as f64);
        Ok(report)
    }

    async fn receipts(&self) -> Result<&Ledger<Marks>> {
        let open = || Ledger::open(self.bucket.clone(), COLLECT, self.clock.clone());
        self.collector.receipts.get_or_try_init(open).await
    }

    /// Step 1.
    async fn look(&self) -> Result<Seen> {
        let mut objects = Vec::new();
        for prefix in COLLECTED_PREFIXES {
            objects.extend(self.bucket.list(prefix, None).await?);
        }
        *self.collector.sizes.lock() = (objects.iter())
            .filter_map(|object| match Object::of(&object.key) {
                Object::Layer(layer) => Some((layer, object.size)),
                _ => None,
            })
            .collect();
        let (local_layers, local_branches) = (self.node.local_layers().await?, self.node.local_branches().await?);
        // Before the ledgers are read: what a volume lies on may be recorded, and the volume removed, at any moment.
        let mut bases = BTreeSet::new();
        for &branch in &local_branches {
            bases.extend(self.node.volume_bases(branch).await?);
        }
        Ok(Seen { objects, local_layers, local_branches, bases })
    }

    /// Steps 2 and 3.
    async fn kept(&self) -> Result<Kept> {
        let mut kept = Kept::default();
        // Before the ledgers: a seal is recorded first, and forgotten here after.
        kept.layers.extend(self.unrecorded().into_iter().map(|root| root.layer));
        let mut roots = self.template_roots().await?;
        for (project, state) in self.states().await? {
            kept.projects.insert(project);
            kept.deleted_branches.extend(&state.deleted_branches);
            kept.oldest_lines.extend(reach::oldest_lines(&state));
            kept.artifacts.extend(reach::artifacts(&state).into_iter().map(|(hash, _)| hash));
            kept.layers.extend(reach::to_be(&state).into_iter().map(|root| root.layer));
            roots.extend(reach::roots(&state));
        }
        // After the ledgers: a visit is named while its ledger still names what it stands on.
        roots.extend(self.visited());
        let roots: BTreeSet<LayerId> = roots.into_iter().map(|root| root.layer).collect();
        for chain in self.chains(&roots).await?.values() {
            kept.layers.extend(chain.iter());
        }
        self.collector.chains.lock().retain(|layer, _| roots.contains(layer));
        Ok(kept)
    }

    /// The state of every project in the catalog, with what other nodes have recorded.
    async fn states(&self) -> Result<Vec<(ProjectId, Arc<ProjectState>)>> {
        let catalog = self.catalog.refresh().await?;
        let mut states = Vec::with_capacity(catalog.projects.len());
        for (&id, listed) in &catalog.projects {
            let known = self.projects.read().get(&id).cloned();
            let state = match known {
                Some(project) => project.ledger.refresh().await?,
                // Being made, or made by another node.
                None => self.open_project(id, listed.name.clone()).await?.ledger.state(),
            };
            states.push((id, state));
        }
        Ok(states)
    }

    /// Waits until no template is being made.
    async fn template_roots(&self) -> Result<Vec<Root>> {
        let templates = self.node.templates().await?;
        let root = |(pg_major, layer)| Root { layer, keeper: Keeper::Template { pg_major }, owner: None };
        let roots: Vec<Root> = templates.into_iter().map(root).collect();
        *self.collector.templates.lock() = Some(roots.clone());
        Ok(roots)
    }

    /// Seals of this node that could not be recorded yet.
    fn unrecorded(&self) -> Vec<Root> {
        let mut roots = Vec::new();
        for project in self.all_projects() {
            for (&branch, cell) in &*project.cells.lock() {
                let keeper = Keeper::Unrecorded { project: project.name.clone(), branch };
                let layer = cell.inner.lock().unrecorded.map(|(_, sealed)| sealed.layer);
                roots.extend(layer.map(|layer| Root { layer, keeper, owner: Some(branch) }));
            }
        }
        roots
    }

    /// The whole chains of layers; all of them, or an error.
    pub(super) async fn chains(&self, layers: &BTreeSet<LayerId>) -> Result<HashMap<LayerId, Arc<[LayerId]>>> {
        let (mut found, mut wanted) = (HashMap::with_capacity(layers.len()), Vec::new());
        {
            let known = self.collector.chains.lock();
            for &layer in layers {
                match known.get(&layer) {
                    Some(chain) => drop(found.insert(layer, chain.clone())),
                    None => wanted.push(layer),
                }
            }
        }
        let read = stream::iter(wanted)
            .map(|layer| async move { Ok::<_, Error>((layer, Arc::from(self.node.whole_chain(layer).await?))) })
            .buffer_unordered(PARALLEL)
            .try_collect::<Vec<(LayerId, Arc<[LayerId]>)>>()
            .await?;
        self.collector.chains.lock().extend(read.iter().cloned());
        found.extend(read);
        Ok(found)
    }

    /// What is listed, not kept and not marked, with the rule that lets it go: as much as one round takes.
    async fn unkept(&self, seen: &Seen, kept: &Kept, marks: &Marks) -> Result<Vec<Unkept>> {
        let now = self.clock.now();
        let found = seen.objects.iter().filter(|meta| {
            let object = Object::of(&meta.key);
            let young = matches!(object, Object::Layer(layer) if self.is_young(layer, now));
            object.is_collected() && !young && !marks.marks.contains_key(&meta.key) && !kept.keeps(&object)
        });
        let found: Vec<&ObjectMeta> = found.take(OBJECTS_MAX).collect();
        let objects: Vec<Object> = found.iter().map(|meta| Object::of(&meta.key)).collect();
        let mut rules = self.explain(&objects).await?;
        let unkept = found.iter().zip(&objects).map(|(meta, object)| Unkept {
            key: meta.key.clone(),
            bytes: meta.size,
            rule: rules.remove(object).unwrap_or(Rule::Orphan),
        });
        Ok(unkept.collect())
    }

    fn is_young(&self, layer: LayerId, now: Timestamp) -> bool {
        chosen_at(layer).saturating_add(self.config.collect.grace.min(YOUNG)).unwrap_or(Timestamp::MAX) > now
    }

    /// Step 4.
    async fn mark(&self, receipts: &Ledger<Marks>, actor: &str, unkept: &[Unkept], spared: &[String]) -> Result<()> {
        let marked = receipts
            .append(actor, None, |marks| {
                let fresh = unkept.iter().filter(|object| !marks.marks.contains_key(&object.key)).cloned();
                let fresh: Vec<Unkept> = fresh.collect();
                let spared: Vec<String> = spared.iter().filter(|key| marks.marks.contains_key(*key)).cloned().collect();
                let (count, mut events) = (fresh.len(), Vec::new());
                if !spared.is_empty() {
                    events.push(CollectEvent::Spared { objects: spared });
                }
                if !fresh.is_empty() {
                    events.push(CollectEvent::Marked { objects: fresh });
                }
                Ok((events, count))
            })
            .await?;
        metrics::counter!("ebb_timeline_collect_marked_total").increment(marked as u64);
        metrics::counter!("ebb_timeline_collect_spared_total").increment(spared.len() as u64);
        Ok(())
    }

    /// Step 5: deletes what is due, and answers what it was.
    async fn delete_due(
        &self,
        receipts: &Ledger<Marks>,
        actor: &str,
        now: Timestamp,
        spared: &mut Vec<String>,
    ) -> Result<Vec<Unkept>> {
        let marks = receipts.state();
        let mut due: Vec<Unkept> = Vec::new();
        // Held until all of it is over: nobody takes these artifacts in meanwhile.
        let mut held = Vec::new();
        for mark in marks.due(now, self.config.collect.grace).into_iter().take(OBJECTS_MAX) {
            if let Object::Artifact(hash) = Object::of(&mark.object.key) {
                match self.artifacts.try_exclude(&hash) {
                    Some(guard) => held.push(guard),
                    // Being deployed right now: there is a next round.
                    None => continue,
                }
            }
            due.push(mark.object.clone());
        }
        if due.is_empty() {
            return Ok(due);
        }
        let kept = self.kept().await?;
        let (needed, due): (Vec<_>, Vec<_>) = due.into_iter().partition(|one| kept.keeps(&Object::of(&one.key)));
        spared.extend(needed.into_iter().map(|object| object.key));
        let due = receipts
            .append(actor, None, |marks| {
                let still = |key: &str| marks.marks.get(key);
                let spare: Vec<_> = spared.iter().filter(|key| still(key).is_some()).cloned().collect();
                let due: Vec<Unkept> = due.iter().filter(|object| still(&object.key).is_some()).cloned().collect();
                let begin = due.iter().filter(|one| still(&one.key).is_some_and(|mark| !mark.deleting));
                let begin: Vec<String> = begin.map(|object| object.key.clone()).collect();
                let mut events = Vec::new();
                if !spare.is_empty() {
                    events.push(CollectEvent::Spared { objects: spare });
                }
                if !begin.is_empty() {
                    events.push(CollectEvent::Deleting { objects: begin });
                }
                Ok((events, due))
            })
            .await?;
        self.delete(&due).await?;
        receipts
            .append(actor, None, |marks| {
                let gone = due.iter().filter(|one| marks.marks.get(&one.key).is_some_and(|mark| mark.deleting));
                let gone: Vec<Unkept> = gone.cloned().collect();
                Ok((if gone.is_empty() { Vec::new() } else { vec![CollectEvent::Deleted { objects: gone }] }, ()))
            })
            .await?;
        drop(held);
        Ok(due)
    }

    async fn delete(&self, objects: &[Unkept]) -> Result<()> {
        stream::iter(objects.to_vec())
            .map(|object| async move {
                if let Object::Layer(layer) = Object::of(&object.key) {
                    // First: nothing would lead to it any more.
                    self.bucket.delete(&ebb_storage::layer::boot_key(layer)).await?;
                }
                self.bucket.delete(&object.key).await?;
                match Object::of(&object.key) {
                    Object::Layer(layer) => drop(self.uploaded.lock().remove(&layer)),
                    Object::Artifact(hash) => self.artifacts.remove_local(&hash).await?,
                    _ => {}
                }
                metrics::counter!("ebb_timeline_collect_deleted_total").increment(1);
                metrics::counter!("ebb_timeline_collect_deleted_bytes_total").increment(object.bytes);
                Ok::<_, Error>(())
            })
            .buffer_unordered(PARALLEL)
            .try_collect::<()>()
            .await?;
        if !objects.is_empty() {
            let bytes: u64 = objects.iter().map(|object| object.bytes).sum();
            tracing::info!(objects = objects.len(), bytes, "collected objects nothing needs");
        }
        Ok(())
    }

    /// Step 6.
    async fn collect_local(&self, seen: &Seen, kept: &Kept, now: Timestamp, report: &mut api::Collected) -> Result<()> {
        for &branch in seen.local_branches.intersection(&kept.deleted_branches) {
            report.local_branches += 1;
            if !report.dry_run {
                self.node.discard(branch).await?;
                self.node.remove_branch(branch).await?;
            }
        }
        // A base that a seal was just making is no candidate, and has no chain yet; what it lies on is a base, too.
        let bases = seen.bases.intersection(&seen.local_layers).copied().collect();
        let under: HashSet<LayerId> =
            self.chains(&bases).await?.values().flat_map(|chain| chain.iter().copied()).collect();
        let needed = |layer: &LayerId| kept.layers.contains(layer) || under.contains(layer) || bases.contains(layer);
        let unneeded: Vec<LayerId> = seen.local_layers.iter().filter(|layer| !needed(layer)).copied().collect();
        for layer in self.may_go_here(seen, unneeded, now).await? {
            report.local_layers += 1;
            if !report.dry_run {
                self.node.remove_layer(layer).await?;
                metrics::counter!("ebb_timeline_collect_local_layers_total").increment(1);
            }
        }
        Ok(())
    }

    /// Of local layers that nothing needs, those that can be had again, or that a ledger let go long enough after they
    /// were made.
    async fn may_go_here(&self, seen: &Seen, unneeded: Vec<LayerId>, now: Timestamp) -> Result<Vec<LayerId>> {
        let stored: HashSet<&str> = seen.objects.iter().map(|object| object.key.as_str()).collect();
        let (mut go, only_here): (Vec<LayerId>, Vec<LayerId>) =
            unneeded.into_iter().partition(|layer| stored.contains(format!("layers/{layer}").as_str()));
        let old = |layer: &LayerId| {
            let until = chosen_at(*layer).saturating_add(self.config.collect.grace);
            until.is_ok_and(|until| until <= now)
        };
        let old: Vec<Object> = only_here.into_iter().filter(old).map(Object::Layer).collect();
        let rules = self.explain(&old).await?;
        go.extend(old.into_iter().filter_map(|object| match (rules.get(&object), object) {
            (Some(Rule::LetGo { .. }), Object::Layer(layer)) => Some(layer),
            _ => None,
        }));
        Ok(go)
    }
}

fn unkept_view(object: &Unkept) -> api::Unkept {
    api::Unkept { object: object.key.clone(), bytes: object.bytes, why: object.rule.to_string() }
}

/// Bytes that branches and projects have in the bucket, as far as they are known.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub branches: BTreeMap<BranchId, api::Stored>,
    pub projects: BTreeMap<ProjectId, api::Stored>,
}

/// To whom a layer belongs, while all roots are gone through.
#[derive(Clone, Copy, PartialEq)]
enum Owner<T> {
    One(T),
    Many,
}

fn claim<T: PartialEq + Copy>(owners: &mut HashMap<LayerId, Owner<T>>, layer: LayerId, claimant: T) {
    let owner = owners.entry(layer).or_insert(Owner::One(claimant));
    if *owner != Owner::One(claimant) {
        *owner = Owner::Many;
    }
}

impl Service {
    /// What every branch and project stores. Goes through the chains of all roots, in memory after the first time.
    ///
    /// LIMIT: a thousand branches a thousand layers deep are a million steps, tens of milliseconds: for a person who
    /// looks, not for the way of a request that makes a branch.
    pub(super) async fn stored(&self) -> Result<Stored> {
        let known = self.collector.templates.lock().clone();
        let templates = match known {
            Some(templates) => templates,
            None => self.template_roots().await?,
        };
        let mut roots: Vec<(Option<ProjectId>, Root)> = templates.into_iter().map(|root| (None, root)).collect();
        for project in self.all_projects() {
            let of_project = reach::roots(&project.ledger.state()).into_iter();
            roots.extend(of_project.map(|root| (Some(project.id), root)));
        }
        let chains = self.chains(&roots.iter().map(|(_, root)| root.layer).collect()).await?;
        let (mut by_branch, mut by_project) = (HashMap::new(), HashMap::new());
        let mut of_branch: BTreeMap<BranchId, HashSet<LayerId>> = BTreeMap::new();
        let mut of_project: BTreeMap<ProjectId, HashSet<LayerId>> = BTreeMap::new();
        for (project, root) in &roots {
            for &layer in chains.get(&root.layer).into_iter().flat_map(|chain| chain.iter()) {
                claim(&mut by_branch, layer, root.owner);
                claim(&mut by_project, layer, *project);
                if let Some(branch) = root.owner {
                    of_branch.entry(branch).or_default().insert(layer);
                }
                if let Some(project) = project {
                    of_project.entry(*project).or_default().insert(layer);
                }
            }
        }
        let sizes = self.sizes(by_branch.keys().copied().collect()).await?;
        let mut stored = Stored::default();
        for (branch, layers) in of_branch {
            let mut sum = sum(&layers, &by_branch, &sizes);
            sum.unsealed_bytes = self.node.unsealed_bytes(branch).await?;
            stored.branches.insert(branch, sum);
        }
        for (project, layers) in of_project {
            let mut sum = sum(&layers, &by_project, &sizes);
            let branches = self.projects.read().get(&project).map(|project| project.ledger.state());
            let of = branches.iter().flat_map(|state| state.branches.keys());
            sum.unsealed_bytes = of.filter_map(|id| stored.branches.get(id)).map(|one| one.unsealed_bytes).sum();
            stored.projects.insert(project, sum);
        }
        Ok(stored)
    }

    /// Adds to branches what they store; leaves them as they are if that cannot be told now.
    pub(super) async fn add_stored(&self, views: &mut [api::Branch]) -> Option<Stored> {
        let stored = match tokio::time::timeout(STORED_WITHIN, self.stored()).await {
            Ok(Ok(stored)) => stored,
            Ok(Err(error)) => {
                tracing::debug!(error = error.chain(), "what branches store cannot be told");
                return None;
            }
            Err(_) => return None,
        };
        for view in views {
            view.stored = stored.branches.get(&view.id).cloned();
        }
        Some(stored)
    }

    /// Sizes of layers in the bucket; one that is not there yet has none.
    async fn sizes(&self, layers: Vec<LayerId>) -> Result<HashMap<LayerId, u64>> {
        let unknown: Vec<LayerId> = {
            let known = self.collector.sizes.lock();
            layers.iter().filter(|layer| !known.contains_key(layer)).copied().collect()
        };
        let asked = stream::iter(unknown)
            .map(|layer| async move { Ok::<_, Error>((layer, self.bucket.head(&format!("layers/{layer}")).await?)) })
            .buffer_unordered(PARALLEL)
            .try_collect::<Vec<_>>()
            .await?;
        let mut known = self.collector.sizes.lock();
        known.extend(asked.into_iter().filter_map(|(layer, meta)| Some((layer, meta?.size))));
        Ok(layers.iter().filter_map(|layer| Some((*layer, *known.get(layer)?))).collect())
    }
}

fn sum<T: PartialEq>(
    layers: &HashSet<LayerId>,
    owners: &HashMap<LayerId, Owner<T>>,
    sizes: &HashMap<LayerId, u64>,
) -> api::Stored {
    let mut stored = api::Stored::default();
    for layer in layers {
        let bytes = sizes.get(layer).copied();
        stored.waiting_layers += u64::from(bytes.is_none());
        match owners.get(layer) {
            Some(Owner::One(_)) => stored.own_bytes += bytes.unwrap_or(0),
            _ => stored.shared_bytes += bytes.unwrap_or(0),
        }
    }
    stored
}
