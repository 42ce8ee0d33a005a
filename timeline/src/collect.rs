//! The receipts of collection: which objects of the bucket nothing needs, since when that is known, and which are gone.
//!
//! ```text
//!   (in the bucket, kept) ── nothing names it any more ──► Marked ── grace, looked again ──► Deleting ──► Deleted
//!                                    ▲                       │ needed again                    │
//!                                    └────────── Spared ◄────┴─────────────────────────────────┘
//! ```
//!
//! A ledger of its own, `collect/<seq>`: each entry is written before what it tells of is done. What a crash leaves is
//! marks that are looked at again, and deletions that are begun again; both may be done any number of times.
//!
//! **Invariants.** Only an object of a kind listed at [`Object::is_collected`] is ever marked; only a marked one is ever
//! deleted. Both are decided by the state of ledgers that were read after the object had been seen in the bucket.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use ebb_types::{BranchId, LayerId, NodeId, ProjectId, ProjectName, Timestamp};
use serde::{Deserialize, Serialize};

use crate::ledger::{Entry, Fold};

/// The ledger's name in the bucket.
pub const COLLECT: &str = "collect";

/// What an object of the bucket is, by its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A layer.
    Layer(LayerId),
    /// The boot set of a layer: goes with it.
    Boot(LayerId),
    /// The code of releases, by its BLAKE3.
    Artifact(String),
    /// A secret of a project.
    Secret(ProjectId),
    /// An entry of a project's ledger.
    Ledger(ProjectId),
    /// Which layer a new project begins as, by Postgres major version.
    Template(String),
    /// An entry of the catalog.
    Catalog,
    /// An entry of this ledger.
    Receipt,
    /// A piece of the WAL archive of a branch's line.
    Wal(BranchId, u64),
    /// The record of a node.
    Node(NodeId),
    /// Something that this version has no rule for.
    Other,
}

impl Object {
    /// What a key stands for.
    pub fn of(key: &str) -> Self {
        let mut parts = key.split('/');
        let found = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("layers"), Some(id), None, _) => id.parse().ok().map(Object::Layer),
            (Some("boot"), Some(id), None, _) => id.parse().ok().map(Object::Boot),
            (Some("artifacts"), Some(hash), None, _) => is_hash(hash).then(|| Object::Artifact(hash.to_owned())),
            (Some("secrets"), Some(id), Some(_), None) => id.parse().ok().map(Object::Secret),
            (Some("projects"), Some(id), Some("ledger"), Some(_)) => id.parse().ok().map(Object::Ledger),
            (Some("templates"), Some(major), None, _) => Some(Object::Template(major.to_owned())),
            (Some("catalog"), Some(_), None, _) => Some(Object::Catalog),
            (Some(COLLECT), Some(_), None, _) => Some(Object::Receipt),
            (Some("nodes"), Some(id), None, _) => id.parse().ok().map(Object::Node),
            (Some("wal"), Some(branch), Some(line), Some(_)) => {
                branch.parse().ok().zip(line.parse().ok()).map(|(branch, line)| Object::Wal(branch, line))
            }
            _ => None,
        };
        found.unwrap_or(Object::Other)
    }

    /// The key that a person means who names an object by key, by layer or by artifact.
    pub fn key_of(text: &str) -> String {
        if text.parse::<LayerId>().is_ok() {
            format!("layers/{text}")
        } else if is_hash(text) {
            format!("artifacts/{text}")
        } else {
            text.to_owned()
        }
    }

    /// Whether objects of this kind are deleted when nothing needs them. Receipts never are: they prove what happened,
    /// also of projects that are gone. Templates are few, and any new project may begin as one.
    pub fn is_collected(&self) -> bool {
        matches!(self, Object::Layer(_) | Object::Artifact(_) | Object::Secret(_) | Object::Wal(..))
    }
}

/// Where objects that may be collected are.
pub const COLLECTED_PREFIXES: [&str; 4] = ["artifacts/", "layers/", "secrets/", "wal/"];

fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The rule by which an object may go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
pub enum Rule {
    /// An entry of a ledger took away the last thing that kept it.
    LetGo {
        /// Name of the project then.
        project: ProjectName,
        /// The entry.
        seq: u64,
        /// When it was written.
        time: Timestamp,
        /// What it did: "delete branch pr-42".
        what: String,
    },
    /// No ledger ever named it: left by an act that did not come to its end.
    Orphan,
    /// A secret of a project that is not in the catalog.
    NoProject,
    /// WAL of a line that no moment can be gone back to on.
    NoLine,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::LetGo { project, seq, time, what } => {
                write!(f, "let go by {what} (entry {seq} of {project}, {time})")
            }
            Rule::Orphan => f.write_str("orphan: no ledger names it"),
            Rule::NoProject => f.write_str("its project is gone"),
            Rule::NoLine => f.write_str("its branch is gone, or its line is older than what the branch can go back to"),
        }
    }
}

/// An object that nothing needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unkept {
    /// Its key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// Why it may go.
    #[serde(flatten)]
    pub rule: Rule,
}

/// What an entry of the ledger says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum CollectEvent {
    /// Nothing needs these; they go after the grace period.
    Marked {
        /// Which, and why.
        objects: Vec<Unkept>,
    },
    /// These are needed after all.
    Spared {
        /// Their keys.
        objects: Vec<String>,
    },
    /// The grace period is over, and nothing needs these still: they are being deleted.
    Deleting {
        /// Their keys.
        objects: Vec<String>,
    },
    /// These are gone.
    Deleted {
        /// Which, and why.
        objects: Vec<Unkept>,
    },
}

/// The objects that are on their way out: the fold of the ledger.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Marks {
    /// By key.
    pub marks: BTreeMap<String, Mark>,
}

/// An object on its way out.
#[derive(Debug, Clone, PartialEq)]
pub struct Mark {
    /// What and why.
    pub object: Unkept,
    /// Since when it is marked.
    pub since: Timestamp,
    /// Its deletion was begun.
    pub deleting: bool,
}

impl Marks {
    /// Marked objects whose grace period is over, and those whose deletion was begun, the oldest marks first.
    pub fn due(&self, now: Timestamp, grace: Duration) -> Vec<&Mark> {
        let over = |mark: &&Mark| mark.deleting || mark.due_at(grace) <= now;
        let mut due: Vec<&Mark> = self.marks.values().filter(over).collect();
        due.sort_by(|a, b| (a.since, &a.object.key).cmp(&(b.since, &b.object.key)));
        due
    }
}

impl Mark {
    /// When it may be deleted.
    pub fn due_at(&self, grace: Duration) -> Timestamp {
        self.since.saturating_add(grace).unwrap_or(Timestamp::MAX)
    }
}

impl Fold for Marks {
    type Event = CollectEvent;

    fn apply(&mut self, entry: &Entry<CollectEvent>) -> Result<(), String> {
        for event in &entry.events {
            match event {
                CollectEvent::Marked { objects } => {
                    for object in objects {
                        let mark = Mark { object: object.clone(), since: entry.time, deleting: false };
                        if self.marks.insert(object.key.clone(), mark).is_some() {
                            return Err(format!("object {:?} is marked already", object.key));
                        }
                    }
                }
                CollectEvent::Spared { objects } => objects.iter().try_for_each(|key| self.take(key))?,
                CollectEvent::Deleting { objects } => {
                    for key in objects {
                        let mark = self.marks.get_mut(key).ok_or_else(|| format!("object {key:?} is not marked"))?;
                        mark.deleting = true;
                    }
                }
                CollectEvent::Deleted { objects } => objects.iter().try_for_each(|object| {
                    let begun = self.marks.get(&object.key).is_some_and(|mark| mark.deleting);
                    if begun { self.take(&object.key) } else { Err(format!("{:?} was deleted unasked", object.key)) }
                })?,
            }
        }
        Ok(())
    }
}

impl Marks {
    fn take(&mut self, key: &str) -> Result<(), String> {
        self.marks.remove(key).map(drop).ok_or_else(|| format!("object {key:?} is not marked"))
    }
}

/// When a layer's identifier was chosen: UUIDv7 begins with the milliseconds since 1970.
pub fn chosen_at(layer: LayerId) -> Timestamp {
    let mut millis = [0; 8];
    millis[2..].copy_from_slice(&layer.as_bytes()[..6]);
    i64::try_from(u64::from_be_bytes(millis))
        .ok()
        .and_then(|millis| Timestamp::from_millisecond(millis).ok())
        .unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_say_what_an_object_is() {
        let layer = LayerId::for_test(7);
        let project: ProjectId = "prj_00000000000000000000000000000001".parse().unwrap();
        let branch = BranchId::for_test(9);
        let hash = "a".repeat(64);
        for (key, object) in [
            (format!("layers/{layer}"), Object::Layer(layer)),
            (format!("boot/{layer}"), Object::Boot(layer)),
            (format!("artifacts/{hash}"), Object::Artifact(hash.clone())),
            (format!("secrets/{project}/owner"), Object::Secret(project)),
            (format!("projects/{project}/ledger/00000000000000000001"), Object::Ledger(project)),
            ("templates/15".to_owned(), Object::Template("15".to_owned())),
            ("catalog/00000000000000000000".to_owned(), Object::Catalog),
            ("collect/00000000000000000000".to_owned(), Object::Receipt),
            (format!("nodes/{}", NodeId::for_test(3)), Object::Node(NodeId::for_test(3))),
            (format!("wal/{branch}/3/0000000001/00000000000000000007"), Object::Wal(branch, 3)),
            (format!("wal/{branch}/3"), Object::Other),
            ("layers/other".to_owned(), Object::Other),
            ("layers".to_owned(), Object::Other),
            (format!("layers/{layer}/x"), Object::Other),
            ("wal/x".to_owned(), Object::Other),
        ] {
            assert_eq!(Object::of(&key), object, "{key}");
        }
        assert_eq!(Object::key_of(&layer.to_string()), format!("layers/{layer}"));
        assert_eq!(Object::key_of(&hash), format!("artifacts/{hash}"));
        assert_eq!(Object::key_of("templates/15"), "templates/15");
    }

    #[test]
    fn a_layers_identifier_tells_its_age() {
        let before = Timestamp::now().as_millisecond();
        let chosen = chosen_at(LayerId::generate()).as_millisecond();
        assert!((before..=Timestamp::now().as_millisecond()).contains(&chosen), "{chosen}");
    }

    fn entry(seconds: i64, events: Vec<CollectEvent>) -> Entry<CollectEvent> {
        let time = Timestamp::from_second(seconds).unwrap();
        Entry { seq: 0, time, actor: "ebb".into(), writer: String::new(), op: None, events }
    }

    #[test]
    fn an_object_goes_only_marked_and_only_after_its_grace() {
        let unkept = |key: &str| Unkept { key: key.to_owned(), bytes: 5, rule: Rule::Orphan };
        let grace = Duration::from_secs(10);
        let mut marks = Marks::default();
        let deleted = |key: &str| CollectEvent::Deleted { objects: vec![unkept(key)] };
        assert!(marks.clone().apply(&entry(0, vec![deleted("a")])).is_err(), "not marked");
        let marked = CollectEvent::Marked { objects: vec![unkept("a"), unkept("b")] };
        marks.apply(&entry(100, vec![marked.clone()])).unwrap();
        assert!(marks.clone().apply(&entry(101, vec![marked])).is_err(), "marked twice");
        assert!(marks.clone().apply(&entry(200, vec![deleted("a")])).is_err(), "not begun");
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(marks.due(at(109), grace).len(), 0);
        assert_eq!(marks.due(at(110), grace).len(), 2);
        marks.apply(&entry(110, vec![CollectEvent::Spared { objects: vec!["b".into()] }])).unwrap();
        marks.apply(&entry(110, vec![CollectEvent::Deleting { objects: vec!["a".into()] }])).unwrap();
        assert_eq!(marks.due(at(0), grace).len(), 1, "a deletion that was begun goes on");
        marks.apply(&entry(111, vec![deleted("a")])).unwrap();
        assert_eq!(marks, Marks::default());
    }
}
