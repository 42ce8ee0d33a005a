//! What this node has of layers and volumes, for whoever decides what may go.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ebb_types::{BranchId, LayerId};

use super::NodeStore;
use crate::error::{Error, LocalContext, Result};
use crate::layer::Manifest;
use crate::{blocking, layer, volume};

impl NodeStore {
    /// The layers that are complete on this node.
    pub async fn local_layers(&self) -> Result<BTreeSet<LayerId>> {
        let layers_dir = self.layers_dir.clone();
        blocking::run(move || {
            let names = names_in(&layers_dir)?;
            let is_layer = |name: &String| layers_dir.join(name).join("manifest").exists();
            Ok(names.iter().filter(|name| is_layer(name)).filter_map(|name| name.parse().ok()).collect())
        })
        .await
    }

    /// The chain of a layer, oldest first, from this node or else from the bucket.
    ///
    /// # Errors
    /// `NoSuchLayer` when neither has it; `Corrupt` when its manifest does not check.
    pub async fn chain(&self, layer: LayerId) -> Result<Vec<LayerId>> {
        Ok(self.manifest_anywhere(layer).await?.chain)
    }

    /// The manifest of a layer, from this node or else from the bucket.
    ///
    /// # Errors
    /// As [`NodeStore::chain`].
    pub async fn manifest_anywhere(&self, layer: LayerId) -> Result<Manifest> {
        match self.manifest(layer).await {
            Err(Error::NoSuchLayer(_)) => layer::manifest_in(&self.bucket, layer).await,
            found => found,
        }
    }

    /// Whether the bucket has the layer's object.
    pub async fn is_in_bucket(&self, layer: LayerId) -> Result<bool> {
        Ok(self.bucket.head(&layer::object_key(layer)).await?.is_some())
    }
}

/// The branches that have a directory below `branches`.
///
/// # Errors
/// If the directory cannot be listed.
pub fn local_branches(branches: &Path) -> Result<BTreeSet<BranchId>> {
    Ok(names_in(branches)?.iter().filter_map(|name| name.parse().ok()).collect())
}

/// The layers that the volume of a branch lies on, open or not: the newest sealed one, and any that a seal is just
/// making. Of the layers that were on this node before the call, those not answered are not the volume's.
///
/// # Errors
/// If the volume's files cannot be read.
pub fn volume_bases(branch: &Path) -> Result<BTreeSet<LayerId>> {
    volume::bases(branch)
}

/// Bytes on disk of what the volume of a branch holds beyond its newest sealed layer, its WAL left out.
///
/// # Errors
/// If the volume's files cannot be read.
pub fn upper_bytes(branch: &Path) -> Result<u64> {
    let mut bytes = 0;
    let uppers = branch.join("uppers");
    for upper in names_in(&uppers)? {
        let data = uppers.join(upper).join("data");
        for name in names_in(&data)? {
            match fs::metadata(data.join(&name)) {
                Ok(found) => bytes += found.blocks() * 512,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).on("read", &data.join(&name)),
            }
        }
    }
    Ok(bytes)
}

/// The names in a directory that are text, in order; none if there is no directory.
pub(crate) fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).on("list", dir),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.on("list", dir)?.file_name().into_string().ok());
    }
    names.sort_unstable();
    Ok(names)
}
