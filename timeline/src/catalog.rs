//! The catalog: which projects there are. A ledger of its own, so that of two who want one name exactly one gets it.

use std::collections::{BTreeMap, VecDeque};

use ebb_types::{NodeId, ProjectId, ProjectName, Timestamp, nearest};
use serde::{Deserialize, Serialize};

use crate::error::Refusal;
use crate::event::Key;
use crate::ledger::{Entry, Fold};
use crate::machine::{Standing, StandingEvent};

/// The catalog's name in the bucket.
pub const CATALOG: &str = "catalog";

/// LIMIT: as for projects, see `state`.
const KEYS_MAX: usize = 1024;

/// What the proxy takes for the end of a pooler's name (decision 0019).
const POOLER_SUFFIX: &str = "-pooler";

/// The ledger of a project, by its name in the bucket.
pub fn ledger_name(project: ProjectId) -> String {
    format!("projects/{project}/ledger")
}

/// One thing that happened to the set of projects. Stored for ever.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum CatalogEvent {
    /// The name is taken; secret and ledger are being made.
    Reserved {
        /// The project to be.
        project: ProjectId,
        /// Its name.
        name: ProjectName,
        /// The caller's idempotency key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<Key>,
        /// The node that makes it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        node: Option<NodeId>,
    },
    /// The project exists.
    Opened {
        /// Which.
        project: ProjectId,
    },
    /// Its deletion was confirmed.
    Deleting {
        /// Which.
        project: ProjectId,
        /// The node that deletes it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        node: Option<NodeId>,
    },
    /// It is gone, or was never finished; the name is free.
    Forgotten {
        /// Which.
        project: ProjectId,
    },
}

/// The set of projects: the fold of the catalog.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Catalog {
    /// Every project that is not gone.
    pub projects: BTreeMap<ProjectId, Listed>,
    /// Idempotency keys of projects made, oldest first.
    pub keys: VecDeque<(Key, ProjectId)>,
}

/// A project in the catalog.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    /// Its name.
    pub name: ProjectName,
    /// How it stands.
    pub standing: Standing,
    /// When its name was taken.
    pub reserved_at: Timestamp,
    /// The node that makes or deletes it, as long as that is not done.
    pub node: Option<NodeId>,
}

impl Catalog {
    /// Finds a project that exists.
    ///
    /// # Errors
    /// With the nearest names.
    pub fn find(&self, name: &str) -> Result<ProjectId, Refusal> {
        let live = || self.projects.iter().filter(|(_, listed)| listed.standing == Standing::Live);
        live().find(|(_, listed)| listed.name.as_str() == name).map(|(id, _)| *id).ok_or_else(|| {
            let near = nearest(name, live().map(|(_, listed)| listed.name.as_str()));
            Refusal::NoProject { name: name.to_owned(), near: near.into_iter().map(str::to_owned).collect() }
        })
    }

    /// Takes a name for a new project of this node, or finds the one that the same key made.
    ///
    /// # Errors
    /// If the name is taken, or the key was used for another request.
    pub fn reserve(
        &self,
        project: ProjectId,
        name: &ProjectName,
        key: Option<&Key>,
        node: NodeId,
    ) -> Result<(Vec<CatalogEvent>, ProjectId), Refusal> {
        if let Some(key) = key
            && let Some((used, made)) = self.keys.iter().find(|(used, _)| used.key == key.key)
        {
            return match used.request == key.request {
                true => Ok((Vec::new(), *made)),
                false => Err(Refusal::KeyReused(key.key.clone())),
            };
        }
        if self.projects.values().any(|listed| listed.name == *name) {
            return Err(Refusal::Taken { kind: "project", name: name.to_string() });
        }
        if name.as_str().ends_with(POOLER_SUFFIX) {
            let why = "names that end in -pooler are those of other projects' poolers";
            return Err(Refusal::Invalid(format!("{name:?} cannot be the name of a project: {why}")));
        }
        Ok((vec![CatalogEvent::Reserved { project, name: name.clone(), key: key.cloned(), node: Some(node) }], project))
    }

    fn advance(&mut self, project: ProjectId, event: StandingEvent) -> Result<(), String> {
        let listed = self.projects.get_mut(&project).ok_or_else(|| format!("there is no project {project}"))?;
        listed.standing = listed.standing.next(event).map_err(|illegal| illegal.to_string())?;
        if listed.standing == Standing::Gone {
            self.projects.remove(&project);
            self.keys.retain(|(_, made)| *made != project);
        }
        Ok(())
    }
}

impl Fold for Catalog {
    type Event = CatalogEvent;

    fn apply(&mut self, entry: &Entry<CatalogEvent>) -> Result<(), String> {
        for event in &entry.events {
            match event {
                CatalogEvent::Reserved { project, name, key, node } => {
                    let taken = self.projects.iter().any(|(id, listed)| id == project || listed.name == *name);
                    if taken {
                        return Err(format!("project {name:?} exists already"));
                    }
                    let (name, standing) = (name.clone(), Standing::Reserved);
                    let listed = Listed { name, standing, reserved_at: entry.time, node: *node };
                    self.projects.insert(*project, listed);
                    if let Some(key) = key {
                        if self.keys.len() >= KEYS_MAX {
                            self.keys.pop_front();
                        }
                        self.keys.push_back((key.clone(), *project));
                    }
                }
                CatalogEvent::Opened { project } => self.advance(*project, StandingEvent::Open)?,
                CatalogEvent::Deleting { project, node } => {
                    self.advance(*project, StandingEvent::Delete)?;
                    if let Some(listed) = self.projects.get_mut(project) {
                        listed.node = *node;
                    }
                }
                CatalogEvent::Forgotten { project } => self.advance(*project, StandingEvent::Forget)?,
            }
        }
        Ok(())
    }
}
