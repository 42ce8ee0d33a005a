//! `ebb fsck`: checks a bucket, a node, or both together, without a server.
//!
//! The bucket: the catalog and every ledger (chain and fold), every layer that anything keeps (all of its bytes), every
//! artifact of a release (against its name), secrets and templates, and that nothing lies about that no ledger knows. It
//! is only read, and may be in use. What collection is about to delete is counted, and is no finding. (Beside a server
//! that collects without any grace, what was let go and deleted during the check may seem to be missing.)
//!
//! The node: its layers, its volumes, and what a kill has left. It must not be in use. With both, local layers are
//! compared with their objects, and what one side lacks is looked for on the other.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_storage::fsck::{self, Finding, Kind, LayerState, NodeCheck, Repair};
use ebb_storage::node::NodeStore;
use ebb_storage::object_store::{self, Bucket};
use ebb_types::{BranchId, LayerId, ProjectId};
use futures::stream::{self, StreamExt as _};
use serde::Serialize;

use crate::artifact;
use crate::catalog::{CATALOG, Catalog, CatalogEvent, ledger_name};
use crate::collect::{COLLECT, Marks, Object, Rule};
use crate::error::LocalContext as _;
use crate::event::Event;
use crate::ledger::{Chained, Fold, read_chain};
use crate::machine::Standing;
use crate::node::read_template;
use crate::reach::{self, Keeper, Root};
use crate::service::collect::explain::let_go;
use crate::state::ProjectState;
use crate::{Error, Refusal, Result};

/// LIMIT: layers read at once; each has up to two reads of 8 MiB in memory.
const PARALLEL_LAYERS: usize = 4;

/// LIMIT: keepers named with one finding.
const KEEPERS_MAX: usize = 5;

/// LIMIT: missing entries of one ledger that are named one by one.
const GAPS_MAX: usize = 10;

/// What to check.
pub struct Check<'a> {
    /// A bucket, by its URL.
    pub bucket: Option<&'a str>,
    /// The data directory of a node that is not in use.
    pub data: Option<&'a Path>,
    /// Told what is being looked at, before it is.
    pub progress: &'a (dyn Fn(&str) + Sync),
}

/// What a check found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// What is not as it ought to be: damage first.
    pub findings: Vec<Finding>,
    /// What was gone through.
    pub checked: Counts,
}

/// What was gone through.
#[derive(Debug, Default, Serialize)]
pub struct Counts {
    /// Ledgers, the catalog among them.
    pub ledgers: u64,
    /// Their entries.
    pub entries: u64,
    /// Layers in the bucket that something keeps.
    pub layers: u64,
    /// Artifacts in the bucket that a release names.
    pub artifacts: u64,
    /// Objects in the bucket.
    pub objects: u64,
    /// Objects that nothing keeps and that collection will delete.
    pub waiting_objects: u64,
    /// Layers on the node.
    pub local_layers: u64,
    /// Volumes on the node.
    pub volumes: u64,
}

impl Report {
    /// Whether nothing is left to be done.
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|finding| finding.repaired)
    }
}

/// Checks, and changes nothing.
///
/// # Errors
/// If something cannot be checked: the bucket cannot be read, the directory is no data directory, or is in use.
pub async fn check(check: &Check<'_>) -> Result<Report> {
    let mut report = Report::default();
    let bucket = match check.bucket {
        Some(url) => Some(fsck::open_read_only(url).await?),
        None => None,
    };
    let mut known = match (&bucket, check.bucket) {
        (Some(bucket), Some(url)) => {
            let known = BucketCheck { bucket, progress: check.progress, report: &mut report }.run().await?;
            for path in fsck::staging_leftovers(url)? {
                let what = "it is what a dead writer had begun";
                report.findings.push(Finding { repair: Some(Repair::Sweep), ..Finding::stale(&path, what) });
            }
            Some(known)
        }
        _ => None,
    };
    if let Some(data) = check.data {
        check_node(data, bucket.as_ref(), known.as_mut(), check.progress, &mut report).await?;
    }
    report.findings.sort_by(|a, b| (a.kind, &a.object).cmp(&(b.kind, &b.object)));
    Ok(report)
}

/// Does what is safe about the findings of [`check`].
///
/// # Errors
/// If the bucket cannot be opened to write. A repair that fails is noted with its finding.
pub async fn repair(check: &Check<'_>, report: &mut Report) -> Result<()> {
    let bucket = match check.bucket {
        Some(url) => Some(object_store::open(url).await?),
        None => None,
    };
    let store = check.data.zip(bucket).map(|(data, bucket)| NodeStore::new(data, bucket));
    for finding in &mut report.findings {
        let Some(repair) = &finding.repair else { continue };
        (check.progress)(&format!("repairing {}", finding.object));
        match fsck::repair(repair, store.as_ref()).await {
            Ok(()) => finding.repaired = true,
            Err(error) => finding.advice = format!("It could not be repaired: {}", Error::from(error).chain()),
        }
    }
    match &store {
        // What an upload worked with is removed behind its back, which this process may not live to see.
        Some(store) => Ok(store.remove_leftovers().await?),
        None => Ok(()),
    }
}

/// What the ledgers tell of what is needed.
struct Known {
    /// By layer, what keeps it, in words.
    keepers: HashMap<LayerId, Vec<String>>,
    /// Branches that exist, by identifier, in words.
    branches: BTreeMap<BranchId, String>,
    deleted_branches: BTreeSet<BranchId>,
    /// Layers in the bucket.
    stored: HashSet<LayerId>,
    /// All entries of all ledgers, to look up what let something go.
    entries: Vec<Vec<Chained<Event>>>,
    /// All ledgers could be read to their end: what they do not tell is not so.
    complete: bool,
}

struct BucketCheck<'a> {
    bucket: &'a Bucket,
    progress: &'a (dyn Fn(&str) + Sync),
    report: &'a mut Report,
}

impl BucketCheck<'_> {
    async fn run(mut self) -> Result<Known> {
        let (catalog, made, mut complete) = self.catalog().await?;
        let (mut roots, mut artifacts) = (self.templates().await?, BTreeMap::<String, Vec<String>>::new());
        let (mut branches, mut deleted_branches, mut entries) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        for project in &made {
            let standing = catalog.projects.get(project).map(|listed| listed.standing);
            let read = self.ledger::<ProjectState>(&ledger_name(*project)).await?;
            complete &= read.complete;
            if matches!(standing, Some(Standing::Live)) {
                self.must_exist(*project, &read.state, read.complete).await?;
                complete &= read.state.facts.is_some();
            }
            if standing.is_some() {
                roots.extend(reach::roots(&read.state));
                for (hash, keeper) in reach::artifacts(&read.state) {
                    artifacts.entry(hash).or_default().push(keeper.to_string());
                }
                let name = |branch: &str| match read.state.facts() {
                    Ok(facts) => format!("branch {}/{branch}", facts.name),
                    Err(_) => format!("branch {branch}"),
                };
                branches.extend(read.state.branches.iter().map(|(id, branch)| (*id, name(branch.name.as_str()))));
            }
            deleted_branches.extend(&read.state.deleted_branches);
            entries.push(read.entries);
        }
        let keepers = self.layers(&roots).await?;
        self.artifacts(&artifacts).await?;
        let marks = self.ledger::<Marks>(COLLECT).await?;
        let mut known = Known { keepers, branches, deleted_branches, stored: HashSet::new(), entries, complete };
        self.objects(&mut known, &catalog, &made, &artifacts, &marks.state).await?;
        Ok(known)
    }

    /// The catalog, and every project that ever was in it.
    async fn catalog(&mut self) -> Result<(Catalog, BTreeSet<ProjectId>, bool)> {
        let read = self.ledger::<Catalog>(CATALOG).await?;
        let made = read.entries.iter().flat_map(|chained| &chained.entry.events).filter_map(|event| match event {
            CatalogEvent::Reserved { project, .. } => Some(*project),
            _ => None,
        });
        Ok((read.state, made.collect(), read.complete))
    }

    /// Reads a ledger from its first entry on: numbers, chain, fold.
    async fn ledger<F: Fold>(&mut self, name: &str) -> Result<ReadLedger<F>> {
        (self.progress)(&format!("ledger {name}"));
        let advice = "Keep the bucket as it is, and put the object back from a copy.";
        let mut read = ReadLedger { entries: Vec::new(), state: F::default(), complete: true };
        let listed = self.bucket.list(&format!("{name}/"), None).await?;
        let key = |seq: u64| format!("{name}/{seq:020}");
        let there: BTreeSet<&str> = listed.iter().map(|object| object.key.as_str()).collect();
        let last = listed.last().and_then(|object| object.key.rsplit('/').next()?.parse::<u64>().ok());
        let gaps = (0..last.unwrap_or(0)).map(key).filter(|key| !there.contains(key.as_str()));
        for gap in gaps.take(GAPS_MAX) {
            let what = "the entry is missing though later ones exist";
            self.report.findings.push(Finding::new(Kind::Missing, gap, what, advice).kept_by(vec![ledger_words(name)]));
            read.complete = false;
        }
        self.report.checked.ledgers += 1;
        self.report.checked.entries += listed.len() as u64;
        if !read.complete {
            return Ok(read);
        }
        let verdict = read_chain::<F::Event>(self.bucket, name).await?;
        let mut fault = verdict.fault;
        for chained in verdict.entries {
            if let Err(why) = read.state.apply(&chained.entry) {
                fault = Some((chained.entry.seq, why));
                break;
            }
            read.entries.push(chained);
        }
        if let Some((seq, why)) = fault {
            let finding = Finding::new(Kind::Corrupt, key(seq), why, advice).kept_by(vec![ledger_words(name)]);
            self.report.findings.push(finding);
            read.complete = false;
        }
        Ok(read)
    }

    /// What a project has besides its ledger's entries.
    async fn must_exist(&mut self, project: ProjectId, state: &ProjectState, complete: bool) -> Result<()> {
        let advice = "Put the object back from a copy of the bucket.";
        if complete && state.facts.is_none() {
            let key = format!("{}/{:020}", ledger_name(project), 0);
            let what = "the catalog has the project, and its ledger is empty";
            self.report.findings.push(Finding::new(Kind::Missing, key, what, advice));
        }
        let secret = format!("secrets/{project}/owner");
        if self.bucket.head(&secret).await?.is_none() {
            let advice = "Clients that know the password still log in; put the object back from a copy of the bucket.";
            let kept_by = state.facts().map(|facts| format!("project {}", facts.name)).into_iter().collect();
            let finding = Finding::new(Kind::Missing, secret, "the owner's password is missing", advice);
            self.report.findings.push(finding.kept_by(kept_by));
        }
        Ok(())
    }

    async fn templates(&mut self) -> Result<Vec<Root>> {
        let mut roots = Vec::new();
        for object in self.bucket.list("templates/", None).await? {
            let bytes = self.bucket.get(&object.key).await?;
            let major = object.key.strip_prefix("templates/").and_then(|major| major.parse().ok());
            match (major, read_template(&object.key, &bytes)) {
                (Some(pg_major), Ok(layer)) => {
                    roots.push(Root { layer, keeper: Keeper::Template { pg_major }, owner: None });
                }
                (_, Err(error)) => {
                    let advice = "Delete it: the next project makes a new one.";
                    self.report.findings.push(Finding::new(Kind::Corrupt, object.key, error.chain(), advice));
                }
                // Said of all objects that no rule covers.
                (None, Ok(_)) => {}
            }
        }
        Ok(roots)
    }

    /// Every layer of every chain, all of its bytes. Answers who keeps what.
    async fn layers(&mut self, roots: &[Root]) -> Result<HashMap<LayerId, Vec<String>>> {
        let mut keepers: HashMap<LayerId, Vec<String>> = HashMap::new();
        let mut states: HashMap<LayerId, LayerState> = HashMap::new();
        let mut wanted: BTreeSet<LayerId> = roots.iter().map(|root| root.layer).collect();
        while !wanted.is_empty() {
            let (bucket, progress) = (self.bucket, self.progress);
            let read = stream::iter(std::mem::take(&mut wanted)).map(|layer| async move {
                progress(&format!("layer {layer}"));
                (layer, fsck::check_layer(bucket, layer).await)
            });
            let read: Vec<_> = read.buffer_unordered(PARALLEL_LAYERS).collect().await;
            for (layer, state) in read {
                let state = state?;
                if let LayerState::Whole(manifest) = &state {
                    wanted.extend(manifest.chain.iter().filter(|below| **below != layer));
                }
                states.insert(layer, state);
            }
            wanted.retain(|layer| !states.contains_key(layer));
        }
        for root in roots {
            let chain = match states.get(&root.layer) {
                Some(LayerState::Whole(manifest)) => manifest.chain.as_slice(),
                _ => &[root.layer],
            };
            for layer in chain {
                let words = match *layer == root.layer {
                    true => root.keeper.to_string(),
                    false => format!("{}, through layer {}", root.keeper, root.layer),
                };
                keepers.entry(*layer).or_default().push(words);
            }
        }
        self.report.checked.layers += states.len() as u64;
        for (layer, state) in states {
            let key = format!("layers/{layer}");
            let kept_by = few(keepers.get(&layer));
            let finding = match state {
                LayerState::Whole(_) => continue,
                LayerState::Missing => {
                    let advice = "A node that has the layer uploads it when its server runs; else put the object back \
                                  from a copy of the bucket.";
                    Finding::new(Kind::Missing, key, "the layer is not in the bucket", advice)
                }
                LayerState::Corrupt(why) => {
                    let advice = "Put the object back from a copy of the bucket; a node that has the layer goes on \
                                  with its own.";
                    Finding::new(Kind::Corrupt, key, why, advice)
                }
            };
            self.report.findings.push(finding.kept_by(kept_by));
        }
        Ok(keepers)
    }

    async fn artifacts(&mut self, artifacts: &BTreeMap<String, Vec<String>>) -> Result<()> {
        let advice = "Put the object back from a copy of the bucket, or deploy the same code again.";
        for (hash, kept_by) in artifacts {
            (self.progress)(&format!("artifact {hash}"));
            self.report.checked.artifacts += 1;
            let key = format!("artifacts/{hash}");
            let found = match self.bucket.get(&key).await {
                Ok(packed) => {
                    let named = tokio::task::spawn_blocking(move || artifact::name_of_packed(&packed));
                    match named.await.map_err(|_| Error::Lost("reading an artifact"))? {
                        Ok(name) if name == *hash => continue,
                        Ok(name) => Finding::new(Kind::Corrupt, key, format!("its content is {name}"), advice),
                        Err(error) => Finding::new(Kind::Corrupt, key, error.to_string(), advice),
                    }
                }
                Err(ebb_storage::Error::NoSuchObject { .. }) => {
                    Finding::new(Kind::Missing, key, "the artifact is not in the bucket", advice)
                }
                Err(error) => return Err(error.into()),
            };
            self.report.findings.push(found.kept_by(few(Some(kept_by))));
        }
        Ok(())
    }

    /// Everything else in the bucket: what nobody needs is either on its way out, or nobody knows it.
    async fn objects(
        &mut self,
        known: &mut Known,
        catalog: &Catalog,
        made: &BTreeSet<ProjectId>,
        artifacts: &BTreeMap<String, Vec<String>>,
        marks: &Marks,
    ) -> Result<()> {
        (self.progress)("all objects");
        let mut unkept = Vec::new();
        for meta in self.bucket.list("", None).await? {
            self.report.checked.objects += 1;
            let object = Object::of(&meta.key);
            if let Object::Layer(layer) = object {
                known.stored.insert(layer);
            }
            let kept = match &object {
                Object::Layer(layer) => known.keepers.contains_key(layer),
                Object::Artifact(hash) => artifacts.contains_key(hash),
                Object::Ledger(project) => made.contains(project),
                Object::Secret(project) => catalog.projects.contains_key(project),
                Object::Wal(branch, _) => known.branches.contains_key(branch),
                Object::Template(major) => major.parse::<u32>().is_ok(),
                Object::Catalog | Object::Receipt | Object::Boot(_) | Object::Node(_) => true,
                Object::Other => false,
            };
            if !kept {
                unkept.push((meta, object));
            }
        }
        // Of half a ledger nobody can tell what it lets go.
        if !known.complete {
            return Ok(());
        }
        let wanted: HashSet<Object> = unkept.iter().map(|(_, object)| object.clone()).collect();
        let rules = known.explain(self.bucket, &wanted).await;
        for (meta, object) in unkept {
            let orphan = match &object {
                Object::Secret(project) => !made.contains(project),
                Object::Wal(branch, _) => !known.deleted_branches.contains(branch),
                other => !rules.contains_key(other),
            };
            let marked = marks.marks.get(&meta.key);
            if !orphan {
                self.report.checked.waiting_objects += 1;
                continue;
            }
            let (what, advice) = match (object.is_collected(), marked) {
                (true, Some(mark)) => (
                    format!("no ledger names it; it is marked since {}", mark.since),
                    "Nothing: it is collected after the grace period.",
                ),
                (true, None) => {
                    ("no ledger names it".to_owned(), "Nothing: collection marks it, and deletes it later.")
                }
                (false, _) => ("this version of Ebb does not know what it is".to_owned(), "Look what it is."),
            };
            self.report.findings.push(Finding::new(Kind::Orphaned, meta.key, what, advice));
        }
        Ok(())
    }
}

struct ReadLedger<F: Fold> {
    entries: Vec<Chained<F::Event>>,
    state: F,
    /// There was no fault.
    complete: bool,
}

impl Known {
    /// Which entries let these go.
    async fn explain(&self, bucket: &Bucket, wanted: &HashSet<Object>) -> HashMap<Object, Rule> {
        let mut chains: HashMap<LayerId, Arc<[LayerId]>> = HashMap::new();
        for object in wanted {
            if let Object::Layer(layer) = object
                && let Ok(chain) = fsck::chain_of(bucket, *layer).await
            {
                chains.insert(*layer, chain.into());
            }
        }
        let mut rules = HashMap::new();
        for entries in &self.entries {
            let_go(entries, wanted, &chains, &mut rules);
        }
        rules
    }
}

fn few(keepers: Option<&Vec<String>>) -> Vec<String> {
    keepers.into_iter().flatten().take(KEEPERS_MAX).cloned().collect()
}

fn ledger_words(name: &str) -> String {
    match name {
        CATALOG => "the catalog of projects".to_owned(),
        COLLECT => "the receipts of collection".to_owned(),
        _ => "the receipts of a project".to_owned(),
    }
}

/// Checks a node, and puts together what it and the bucket have of each other.
async fn check_node(
    data: &Path,
    bucket: Option<&Bucket>,
    known: Option<&mut Known>,
    progress: &(dyn Fn(&str) + Sync),
    report: &mut Report,
) -> Result<()> {
    if !["lock", "layers", "branches", "secret.key"].iter().any(|name| data.join(name).exists()) {
        return Err(Refusal::Invalid(format!("directory {data:?} is not a node's data directory")).into());
    }
    let checked = NodeCheck::new(data, bucket).run(progress).await?;
    report.checked.local_layers += checked.layers.len() as u64;
    report.checked.volumes += checked.volumes.len() as u64;
    let mut findings = checked.findings;
    leftovers(data, &mut findings)?;
    lines(data, checked.volumes.keys(), &mut findings)?;
    local_artifacts(data, bucket, progress, &mut findings).await?;
    let branch_words = |branch: &BranchId| match known.as_ref().and_then(|known| known.branches.get(branch)) {
        Some(words) => format!("the volume of {words}"),
        None => format!("the volume of branch {branch}"),
    };
    let mut under: HashMap<LayerId, Vec<String>> = HashMap::new();
    for (branch, bases) in &checked.volumes {
        for base in bases {
            let manifest = read_chain_here(data, *base).unwrap_or_else(|| vec![*base]);
            for layer in manifest {
                under.entry(layer).or_default().push(branch_words(branch));
            }
        }
    }
    for finding in &mut findings {
        let layer = Path::new(&finding.object).file_name().and_then(|name| name.to_str()?.parse::<LayerId>().ok());
        if let Some(layer) = layer {
            let kept = known.as_ref().and_then(|known| known.keepers.get(&layer));
            let mut kept_by = few(kept);
            kept_by.extend(few(under.get(&layer)));
            finding.kept_by = kept_by;
        }
    }
    if let Some(known) = known.filter(|known| known.complete) {
        upload_what_is_whole(&checked.layers, report);
        unknown_here(data, bucket, known, &checked.layers, &under, &mut findings).await?;
    }
    report.findings.extend(findings);
    Ok(())
}

/// The chain of a layer on the node, if its manifest can be read.
fn read_chain_here(data: &Path, layer: LayerId) -> Option<Vec<LayerId>> {
    let path = data.join("layers").join(layer.to_string()).join("manifest");
    let bytes = fs::read(&path).ok()?;
    let manifest = ebb_storage::layer::Manifest::decode(&path.to_string_lossy(), &bytes).ok()?;
    Some(manifest.chain)
}

/// A layer that the bucket lacks and that is whole here can be uploaded.
fn upload_what_is_whole(local: &BTreeMap<LayerId, bool>, report: &mut Report) {
    for finding in report.findings.iter_mut().filter(|finding| finding.kind == Kind::Missing) {
        if let Object::Layer(layer) = Object::of(&finding.object)
            && local.get(&layer) == Some(&true)
        {
            finding.advice = "This node has it whole: --repair uploads it, and so does the node's server.".to_owned();
            finding.repair = Some(Repair::Upload(layer));
        }
    }
}

/// Branches and layers of the node that the ledgers do not know, or have let go.
async fn unknown_here(
    data: &Path,
    bucket: Option<&Bucket>,
    known: &Known,
    local: &BTreeMap<LayerId, bool>,
    under: &HashMap<LayerId, Vec<String>>,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    for branch in ebb_storage::node::local_branches(&data.join("branches"))? {
        let path = data.join("branches").join(branch.to_string());
        if known.deleted_branches.contains(&branch) {
            findings.push(Finding::stale(&path, "the branch was deleted"));
        } else if !known.branches.contains_key(&branch) {
            let what = "no ledger of this bucket knows the branch";
            let advice = "Is this the bucket that belongs to the node? If so, look what it is, then delete it.";
            findings.push(Finding::new(Kind::Orphaned, path.display().to_string(), what, advice));
        }
    }
    let only_here: HashSet<Object> = (local.keys())
        .filter(|layer| !known.keepers.contains_key(layer) && !under.contains_key(layer))
        .filter(|layer| !known.stored.contains(layer))
        .map(|layer| Object::Layer(*layer))
        .collect();
    let Some(bucket) = bucket else { return Ok(()) };
    let rules = known.explain(bucket, &only_here).await;
    for object in only_here.iter().filter(|object| !rules.contains_key(*object)) {
        if let Object::Layer(layer) = object {
            let path = data.join("layers").join(layer.to_string());
            let what = "no ledger of this bucket names the layer, and the bucket does not have it";
            let advice = "Is this the bucket that belongs to the node? If so, it can be deleted.";
            findings.push(Finding::new(Kind::Orphaned, path.display().to_string(), what, advice));
        }
    }
    Ok(())
}

/// What the next start of the server would delete.
fn leftovers(data: &Path, findings: &mut Vec<Finding>) -> Result<()> {
    for (name, what) in [
        ("tmp", "it is left of a template that was being made"),
        ("imports", "it is left of an import that was interrupted"),
        ("drills", "it is left of a drill that was interrupted"),
        ("node.json", "it tells of a server that was killed"),
        ("node.json.part", "it was never finished"),
        ("secret.key.new", "it was never finished"),
    ] {
        let path = data.join(name);
        let empty = path.is_dir() && fs::read_dir(&path).on("list", &path)?.next().is_none();
        if path.exists() && !empty {
            findings.push(Finding::stale(&path, what));
        }
    }
    for path in list(&data.join("artifacts"))? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(".new-") || name.ends_with(".tar.zst") {
            findings.push(Finding::stale(&path, "it is left of an artifact that was being stored"));
        }
    }
    Ok(())
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.on("list", dir)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.on("list", dir)?.path());
    }
    paths.sort_unstable();
    Ok(paths)
}

/// Every volume says for which line of its branch it was made, and in which epoch.
fn lines<'a>(data: &Path, volumes: impl Iterator<Item = &'a BranchId>, findings: &mut Vec<Finding>) -> Result<()> {
    let advice = "Write into it the number of times the branch was restored or rolled back, a space, and the number of \
                  times the project got an owner: `ebb ledger list` tells.";
    for branch in volumes {
        let path = data.join("branches").join(branch.to_string()).join("line");
        match fs::read_to_string(&path) {
            Ok(text)
                if text.split_whitespace().all(|number| number.parse::<u64>().is_ok()) && !text.trim().is_empty() => {}
            Ok(_) => {
                let what = "it does not hold numbers";
                findings.push(Finding::new(Kind::Corrupt, path.display().to_string(), what, advice));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let what = "it is not there, though there is a volume";
                findings.push(Finding::new(Kind::Missing, path.display().to_string(), what, advice));
            }
            Err(error) => return Err(error).on("read", &path),
        }
    }
    Ok(())
}

/// Local copies of artifacts have the names of their content.
async fn local_artifacts(
    data: &Path,
    bucket: Option<&Bucket>,
    progress: &(dyn Fn(&str) + Sync),
    findings: &mut Vec<Finding>,
) -> Result<()> {
    for path in list(&data.join("artifacts"))? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let Object::Artifact(hash) = Object::of(&format!("artifacts/{name}")) else { continue };
        progress(&format!("local artifact {hash}"));
        let dir = path.clone();
        let named = tokio::task::spawn_blocking(move || artifact::name_of_directory(&dir));
        let named = named.await.map_err(|_| Error::Lost("reading an artifact"))??;
        if named == hash {
            continue;
        }
        let stored = match bucket {
            Some(bucket) => bucket.head(&format!("artifacts/{hash}")).await?.is_some(),
            None => false,
        };
        let (advice, repair) = match stored {
            true => ("--repair deletes it; it is fetched again when needed.", Some(Repair::Delete(path.clone()))),
            false => ("Look in the bucket: add --bucket.", None),
        };
        let what = format!("its content is {named}");
        findings.push(Finding::new(Kind::Corrupt, path.display().to_string(), what, advice).repair(repair));
    }
    Ok(())
}
