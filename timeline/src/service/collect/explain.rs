//! Which entry of which ledger let an object go. Reads whole ledgers, so it is asked only about what nothing keeps.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ebb_types::{LayerId, ProjectId};

use crate::Result;
use crate::catalog::{CATALOG, CatalogEvent, ledger_name};
use crate::collect::{Object, Rule};
use crate::event::Event;
use crate::ledger::{Chained, read_chain};
use crate::reach;
use crate::service::Service;
use crate::service::views::Reader;
use crate::state::ProjectState;

impl Service {
    /// The rules by which these objects may go; none for what no ledger names.
    ///
    /// Projects that exist are asked first, then those that are gone. A layer belongs to one project, so once all layers
    /// are explained nobody else is asked.
    pub(super) async fn explain(&self, objects: &[Object]) -> Result<HashMap<Object, Rule>> {
        let by_kind = objects.iter().filter_map(|object| match object {
            Object::Secret(_) => Some((object.clone(), Rule::NoProject)),
            Object::Wal(..) => Some((object.clone(), Rule::NoLine)),
            _ => None,
        });
        let mut rules: HashMap<Object, Rule> = by_kind.collect();
        let wanted: HashSet<Object> = objects
            .iter()
            .filter(|object| match object {
                Object::Layer(layer) => !self.collector.orphans.lock().contains(layer),
                Object::Artifact(_) => true,
                _ => false,
            })
            .cloned()
            .collect();
        if wanted.is_empty() {
            return Ok(rules);
        }
        let chains = self.chains_of_wanted(&wanted).await;
        for project in self.projects_ever().await? {
            if wanted.iter().all(|object| matches!(object, Object::Layer(_)) && rules.contains_key(object)) {
                break;
            }
            let verdict = read_chain::<Event>(&self.bucket, &ledger_name(project)).await?;
            let_go(&verdict.entries, &wanted, &chains, &mut rules);
        }
        let unexplained = wanted.iter().filter(|object| !rules.contains_key(*object));
        self.collector.orphans.lock().extend(unexplained.filter_map(|object| match object {
            Object::Layer(layer) => Some(*layer),
            _ => None,
        }));
        Ok(rules)
    }

    /// Chains of the layers in question, as far as they can still be read: a root that is gone itself is not asked about.
    async fn chains_of_wanted(&self, wanted: &HashSet<Object>) -> HashMap<LayerId, Arc<[LayerId]>> {
        let mut chains = HashMap::new();
        for object in wanted {
            if let Object::Layer(layer) = object
                && let Ok(found) = self.chains(&BTreeSet::from([*layer])).await
            {
                chains.extend(found);
            }
        }
        chains
    }

    /// All projects that there ever were, those that exist first.
    async fn projects_ever(&self) -> Result<Vec<ProjectId>> {
        let live = self.catalog.state();
        let entries = read_chain::<CatalogEvent>(&self.bucket, CATALOG).await?.entries;
        let reserved = entries.iter().flat_map(|chained| &chained.entry.events).filter_map(|event| match event {
            CatalogEvent::Reserved { project, .. } => Some(*project),
            _ => None,
        });
        let (mut first, gone): (Vec<_>, Vec<_>) = reserved.partition(|id| live.projects.contains_key(id));
        first.extend(gone);
        Ok(first)
    }
}

/// Goes through a ledger and notes, for each object, the last entry that took away something that kept it.
pub(crate) fn let_go(
    entries: &[Chained<Event>],
    wanted: &HashSet<Object>,
    chains: &HashMap<LayerId, Arc<[LayerId]>>,
    rules: &mut HashMap<Object, Rule>,
) {
    let mut reader = Reader::default();
    for chained in entries {
        if !chained.entry.events.iter().any(takes_away) {
            reader.receipt(chained);
            continue;
        }
        let before = kept_by(reader.state());
        let receipt = reader.receipt(chained);
        let after = kept_by(reader.state());
        let Some(facts) = &reader.state().facts else { continue };
        let rule = Rule::LetGo {
            project: facts.name.clone(),
            seq: receipt.seq,
            time: receipt.time,
            what: format!("{} {}", receipt.act, receipt.on).trim_end().to_owned(),
        };
        for object in before.difference(&after) {
            match object {
                Object::Layer(root) => {
                    let chain = chains.get(root).map_or(std::slice::from_ref(root), |chain| &**chain);
                    chain.iter().for_each(|&layer| note(rules, wanted, Object::Layer(layer), &rule));
                }
                other => note(rules, wanted, other.clone(), &rule),
            }
        }
    }
}

/// Notes a rule for an object that is asked about, unless a later one is known.
fn note(rules: &mut HashMap<Object, Rule>, wanted: &HashSet<Object>, object: Object, rule: &Rule) {
    let time = |rule: &Rule| match rule {
        Rule::LetGo { time, .. } => Some(*time),
        Rule::Orphan | Rule::NoProject | Rule::NoLine => None,
    };
    if wanted.contains(&object) && rules.get(&object).is_none_or(|known| time(known) <= time(rule)) {
        rules.insert(object, rule.clone());
    }
}

/// Whether an event may leave something without a keeper.
fn takes_away(event: &Event) -> bool {
    match event {
        Event::ProjectDeleted
        | Event::BranchSealed { .. }
        | Event::BranchMoved { .. }
        | Event::BranchDeleted { .. }
        | Event::CheckpointDeleted { .. }
        | Event::OperationDone
        | Event::OperationUndone { .. } => true,
        Event::ProjectCreated { .. }
        | Event::OwnerChanged { .. }
        | Event::OwnerKept { .. }
        | Event::BranchCreated { .. }
        | Event::BranchChanged { .. }
        | Event::CheckpointCreated { .. }
        | Event::ReleaseBegun { .. }
        | Event::ReleaseDeployed { .. }
        | Event::ReleaseFailed { .. }
        | Event::ReleasesRolledBack { .. }
        | Event::CodeRolledBack { .. }
        | Event::DataRolledBack { .. }
        | Event::ReleaseRehearsed { .. }
        | Event::ReleaseMigrated { .. }
        | Event::ReleaseProbed { .. }
        | Event::ReleaseGoesBack { .. }
        | Event::ReleaseStays { .. }
        | Event::ReleaseTakenBack { .. }
        | Event::Rehearsed { .. }
        | Event::DrillPassed { .. }
        | Event::DrillFailed { .. }
        | Event::OperationBegun { .. }
        | Event::StepDone { .. } => false,
    }
}

fn kept_by(state: &ProjectState) -> HashSet<Object> {
    let layers = reach::roots(state).into_iter().chain(reach::to_be(state)).map(|root| Object::Layer(root.layer));
    layers.chain(reach::artifacts(state).into_iter().map(|(hash, _)| Object::Artifact(hash))).collect()
}
