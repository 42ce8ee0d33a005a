//! `why`: what keeps an object, or which rule lets it go.

use std::collections::BTreeSet;

use ebb_types::{BranchId, LayerId, ProjectId, Timestamp};

use crate::api::types as api;
use crate::collect::{COLLECT, CollectEvent, Object, Rule, Unkept};
use crate::ledger::read_chain;
use crate::machine::Standing;
use crate::reach;
use crate::service::Service;
use crate::{Refusal, Result};

/// LIMIT: keepers named for one object; a template is below every branch there is.
const KEEPERS_MAX: usize = 100;

impl Service {
    /// Tells what keeps an object, or why and when it went or will go.
    ///
    /// # Errors
    /// If the text cannot be the key of an object, or what could tell cannot be read.
    pub async fn why(&self, text: &str) -> Result<api::Why> {
        let key = Object::key_of(text);
        let object = Object::of(&key);
        let bytes = match self.bucket.head(&key).await {
            Ok(found) => found.map(|meta| meta.size),
            Err(ebb_storage::Error::Invalid(why)) => return Err(Refusal::Invalid(why).into()),
            Err(error) => return Err(error.into()),
        };
        let why = api::Why { object: key.clone(), bytes, ..api::Why::default() };
        let kept_by = self.keepers(&object).await?;
        if !kept_by.is_empty() && (bytes.is_some() || object.is_collected()) {
            let keepers = kept_by.len() as u64;
            let kept_by = kept_by.into_iter().take(KEEPERS_MAX).collect();
            return Ok(api::Why { verdict: api::Verdict::Kept, keepers, kept_by, ..why });
        }
        let marks = self.receipts().await?.refresh().await?;
        if let Some(mark) = marks.marks.get(&key) {
            let (rule, until) = (mark.object.rule.to_string(), mark.due_at(self.config.collect.grace));
            let (since, until) = (Some(mark.since), Some(until));
            return Ok(api::Why { verdict: api::Verdict::Marked, rule: Some(rule), since, until, ..why });
        }
        if bytes.is_none()
            && let Some((gone, time)) = self.receipt_of(&key).await?
        {
            let (rule, since) = (Some(gone.rule.to_string()), Some(time));
            return Ok(api::Why { verdict: api::Verdict::Deleted, rule, since, ..why });
        }
        let rule = self.explain(std::slice::from_ref(&object)).await?.remove(&object);
        let verdict = match (bytes, &rule) {
            // Also what was named once and never came into the bucket, or was removed by somebody else.
            (Some(_), Some(Rule::NoProject | Rule::NoLine)) | (_, Some(Rule::LetGo { .. })) => api::Verdict::Unkept,
            (Some(_), _) => api::Verdict::Orphan,
            (None, _) => api::Verdict::Unknown,
        };
        let rule = rule.filter(|_| verdict != api::Verdict::Unknown).map(|rule| rule.to_string());
        Ok(api::Why { verdict, rule, ..why })
    }

    /// Everything that keeps an object, in words.
    async fn keepers(&self, object: &Object) -> Result<Vec<String>> {
        Ok(match object {
            Object::Layer(layer) => self.keepers_of_layer(*layer).await?,
            Object::Artifact(hash) => {
                let states = self.states().await?;
                let named = states.iter().flat_map(|(_, state)| reach::artifacts(state));
                named.filter(|(named, _)| named == hash).map(|(_, keeper)| keeper.to_string()).collect()
            }
            Object::Secret(project) => self.standing(*project).await?.into_iter().collect(),
            Object::Wal(branch, line) => self.keeper_of_wal(*branch, *line).await?.into_iter().collect(),
            Object::Ledger(project) => vec![match self.standing(*project).await? {
                Some(owner) => format!("receipts of {owner}"),
                None => "receipts of a project that is gone: they are never deleted".to_owned(),
            }],
            Object::Template(major) => vec![format!("new projects of PostgreSQL {major} begin as it")],
            Object::Catalog => vec!["the catalog of projects: it is never deleted".to_owned()],
            Object::Boot(layer) => self.keepers_of_layer(*layer).await?,
            Object::Receipt => vec!["receipts of what was collected: they are never deleted".to_owned()],
            Object::Node(_) => {
                vec!["the node itself, which renews it; others delete it an hour after that ends".to_owned()]
            }
            Object::Other => vec!["this version has no rule for it, and leaves it alone".to_owned()],
        })
    }

    async fn standing(&self, project: ProjectId) -> Result<Option<String>> {
        let catalog = self.catalog.refresh().await?;
        Ok(catalog.projects.get(&project).map(|listed| match listed.standing {
            Standing::Reserved => format!("project {}, which is being made", listed.name),
            Standing::Live => format!("project {}", listed.name),
            Standing::Deleting | Standing::Gone => format!("project {}, which is being deleted", listed.name),
        }))
    }

    async fn keeper_of_wal(&self, branch: BranchId, line: u64) -> Result<Option<String>> {
        for (_, state) in self.states().await? {
            let oldest = reach::oldest_lines(&state).into_iter().find(|(known, _)| *known == branch);
            if oldest.is_some_and(|(_, oldest)| line >= oldest) {
                let (project, name) = (&state.facts()?.name, &state.branch_by_id(branch)?.name);
                return Ok(Some(format!("the past of {project}/{name} that can be gone back to")));
            }
        }
        Ok(None)
    }

    async fn keepers_of_layer(&self, layer: LayerId) -> Result<Vec<String>> {
        let mut roots = self.template_roots().await?;
        let mut named = self.unrecorded();
        for (_, state) in self.states().await? {
            roots.extend(reach::roots(&state));
            named.extend(reach::to_be(&state));
        }
        roots.extend(self.visited());
        let chains = self.chains(&roots.iter().map(|root| root.layer).collect::<BTreeSet<_>>()).await?;
        let above = roots
            .iter()
            .filter(|root| root.layer != layer && chains.get(&root.layer).is_some_and(|chain| chain.contains(&layer)));
        let itself = roots.iter().chain(&named).filter(|root| root.layer == layer);
        let mut keepers: Vec<String> = itself.map(|root| root.keeper.to_string()).collect();
        keepers.extend(above.map(|root| format!("{}, through layer {}", root.keeper, root.layer)));
        Ok(keepers)
    }

    /// The receipt of an object's deletion, the newest if there are several.
    async fn receipt_of(&self, key: &str) -> Result<Option<(Unkept, Timestamp)>> {
        let receipts = read_chain::<CollectEvent>(&self.bucket, COLLECT).await?;
        let deleted = receipts.entries.iter().rev().find_map(|chained| {
            chained.entry.events.iter().find_map(|event| match event {
                CollectEvent::Deleted { objects } => {
                    let found = objects.iter().find(|object| object.key == key)?;
                    Some((found.clone(), chained.entry.time))
                }
                _ => None,
            })
        });
        Ok(deleted)
    }
}
