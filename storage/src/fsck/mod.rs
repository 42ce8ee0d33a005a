//! Checking what is stored, without a server: layers in the bucket, and everything on a node that is not running.
//!
//! Nothing is changed by a check. What it finds is a [`Finding`]: what kind of thing, about which object or file, what
//! to do about it, and whether [`repair`](Repair) may do that by itself. Who needs the object is added by whoever knows
//! the ledgers.
//!
//! Checks read every byte of every layer once, so they take as long as that; they may run beside a server that uses the
//! same bucket, but not on the data directory of one.

mod node;
mod read_only;

use std::path::{Path, PathBuf};

use ebb_types::LayerId;
use serde::Serialize;

use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use crate::layer::{self, Manifest};
use crate::node::NodeStore;
use crate::object_store::Bucket;

pub use node::{Checked, NodeCheck};
pub use read_only::{open_read_only, staging_leftovers};

/// What is wrong with something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It is needed, and not there.
    Missing,
    /// It is there, and is not what it ought to be.
    Corrupt,
    /// Nothing knows it. No damage: whatever is needed is elsewhere.
    Orphaned,
    /// It is left of something that was cut off, and of no use. No damage.
    Stale,
}

impl Kind {
    /// Whether something that is needed cannot be used.
    pub fn is_damage(self) -> bool {
        matches!(self, Kind::Missing | Kind::Corrupt)
    }
}

/// What is safe to do about a finding: none of these loses anything that a checked copy does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    /// Delete a local leftover.
    Delete(PathBuf),
    /// Fetch a layer from the bucket, where it is whole, in place of the local copy if there is one.
    Fetch(LayerId),
    /// Upload a layer of which the local copy is whole.
    Upload(LayerId),
    /// Open the bucket to write, which removes what dead writers left.
    Sweep,
}

/// One thing that is not as it ought to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong.
    pub kind: Kind,
    /// The key of the object, or the path of the file.
    pub object: String,
    /// What is wrong with it, in words.
    pub what: String,
    /// What needs it.
    pub kept_by: Vec<String>,
    /// What to do about it.
    pub advice: String,
    /// Whether it was repaired.
    pub repaired: bool,
    /// What `--repair` does about it.
    #[serde(skip)]
    pub repair: Option<Repair>,
}

impl Finding {
    /// A finding that nobody is known to be hurt by, and that cannot be repaired.
    pub fn new(kind: Kind, object: impl Into<String>, what: impl Into<String>, advice: impl Into<String>) -> Self {
        let (object, what, advice) = (object.into(), what.into(), advice.into());
        Self { kind, object, what, kept_by: Vec::new(), advice, repaired: false, repair: None }
    }

    /// A leftover on this node.
    pub fn stale(path: &Path, what: impl Into<String>) -> Self {
        let advice = "It can be deleted: --repair does.";
        let finding = Self::new(Kind::Stale, path.display().to_string(), what, advice);
        Self { repair: Some(Repair::Delete(path.to_owned())), ..finding }
    }

    /// Adds who needs it.
    pub fn kept_by(self, kept_by: Vec<String>) -> Self {
        Self { kept_by, ..self }
    }

    /// Adds what may be done about it.
    pub fn repair(self, repair: Option<Repair>) -> Self {
        Self { repair, ..self }
    }
}

/// How a layer's object is.
#[derive(Debug)]
pub enum LayerState {
    /// Every byte is as it was packed.
    Whole(Box<Manifest>),
    /// The bucket does not have it.
    Missing,
    /// It is something else.
    Corrupt(String),
}

/// Reads a layer's object, all of it, and checks header, footer, index, manifest, and every frame's checksum and length.
///
/// # Errors
/// If the bucket cannot be read.
pub async fn check_layer(bucket: &Bucket, layer: LayerId) -> Result<LayerState> {
    match layer::verify(bucket, layer).await {
        Ok(manifest) => Ok(LayerState::Whole(Box::new(manifest))),
        Err(Error::NoSuchLayer(_)) => Ok(LayerState::Missing),
        Err(Error::Corrupt { why, .. }) => Ok(LayerState::Corrupt(why)),
        Err(error) => Err(error),
    }
}

/// The chain of a layer, oldest first, from its object's manifest.
///
/// # Errors
/// `NoSuchLayer` or `Corrupt` when its manifest cannot be had.
pub async fn chain_of(bucket: &Bucket, layer: LayerId) -> Result<Vec<LayerId>> {
    Ok(layer::manifest_in(bucket, layer).await?.chain)
}

/// Does what a finding allows. The node's data directory must not be in use.
///
/// # Errors
/// If it does not work out; nothing that was whole is less than before.
pub async fn repair(repair: &Repair, store: Option<&NodeStore>) -> Result<()> {
    let no_node = || Error::Invalid("repairing a layer needs the node's data directory".to_owned());
    match repair {
        Repair::Delete(path) => {
            let path = path.clone();
            blocking::run(move || crate::node::remove_any(&path).on("remove", &path)).await
        }
        Repair::Fetch(layer) => {
            let store = store.ok_or_else(no_node)?;
            store.remove_local(*layer).await?;
            store.ensure_local(*layer).await
        }
        Repair::Upload(layer) => store.ok_or_else(no_node)?.upload(*layer).await.map(drop),
        // Whoever opens the bucket to write has done it.
        Repair::Sweep => Ok(()),
    }
}

#[cfg(test)]
mod tests;
