//! What a node has: its layers and its volumes. The node's server, and all its computes, must not run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ebb_types::{BranchId, LayerId};

use super::{Finding, Kind, Repair};
use crate::error::{Error, LocalContext, Result};
use crate::layer::{self, BLOCK_BYTES, InodeKind, Manifest, pages_of};
use crate::object_store::Bucket;
use crate::pg_files::WalSegment;
use crate::volume::{self, Fault, VolumeDirs};
use crate::{blocking, node};

/// A check of one node.
#[derive(Debug)]
pub struct NodeCheck<'a> {
    layers_dir: PathBuf,
    branches_dir: PathBuf,
    /// With it, local layers are compared with their objects byte by byte, and what is missing is looked for there.
    bucket: Option<&'a Bucket>,
}

/// What a check of a node went through.
#[derive(Debug, Default)]
pub struct Checked {
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// Local layers, and whether each is whole as far as that can be told.
    pub layers: BTreeMap<LayerId, bool>,
    /// Volumes, and the layers that each lies on.
    pub volumes: BTreeMap<BranchId, BTreeSet<LayerId>>,
}

impl<'a> NodeCheck<'a> {
    /// A check of a data directory.
    pub fn new(data_dir: &Path, bucket: Option<&'a Bucket>) -> Self {
        Self { layers_dir: data_dir.join("layers"), branches_dir: data_dir.join("branches"), bucket }
    }

    /// Looks at everything. `progress` is told what is looked at.
    ///
    /// # Errors
    /// `Invalid`, naming it, when a volume is open: its compute still runs. `Local` or `Bucket` when something cannot be
    /// read that ought to be readable.
    pub async fn run(&self, progress: &(dyn Fn(&str) + Sync)) -> Result<Checked> {
        let mut checked = Checked::default();
        let mut manifests = BTreeMap::new();
        for name in node::names_in(&self.layers_dir)? {
            let path = self.layers_dir.join(&name);
            if node::is_leftover(&name) {
                checked.findings.push(Finding::stale(&path, "it is left of a fetch, import, upload or removal"));
            } else if let Ok(layer) = name.parse::<LayerId>() {
                progress(&format!("local layer {layer}"));
                let findings = self.layer(layer, &path, &mut manifests).await?;
                checked.layers.insert(layer, findings.is_empty());
                checked.findings.extend(findings);
            } else {
                let advice = "Look what it is; Ebb does not use it.";
                checked.findings.push(Finding::new(Kind::Orphaned, shown(&path), "it is no layer", advice));
            }
        }
        for name in node::names_in(&self.branches_dir)? {
            let path = self.branches_dir.join(&name);
            match name.parse::<BranchId>() {
                Ok(branch) => self.branch(branch, &path, &manifests, &mut checked, progress).await?,
                Err(_) => {
                    let advice = "Look what it is; Ebb does not use it.";
                    checked.findings.push(Finding::new(Kind::Orphaned, shown(&path), "it is no branch", advice));
                }
            }
        }
        Ok(checked)
    }

    async fn layer(
        &self,
        layer: LayerId,
        path: &Path,
        manifests: &mut BTreeMap<LayerId, Manifest>,
    ) -> Result<Vec<Finding>> {
        let dir = path.to_owned();
        let looked = blocking::run(move || look_at_layer(layer, &dir)).await;
        let mut faults = match looked {
            Ok((manifest, faults)) => {
                manifests.insert(layer, manifest);
                faults
            }
            Err(Error::Corrupt { why, .. }) => vec![format!("manifest: {why}")],
            Err(Error::NoSuchLayer(_)) => vec!["it has no manifest".to_owned()],
            Err(error) => return Err(error),
        };
        let Some(bucket) = self.bucket else {
            let advice = "Check it against the bucket: add --bucket.";
            return Ok(corrupt(path, &faults, advice, None));
        };
        match layer::compare(bucket, layer, path).await {
            Ok(differences) => {
                faults.extend(differences);
                let advice = "The bucket has it whole: --repair fetches it again.";
                Ok(corrupt(path, &faults, advice, Some(Repair::Fetch(layer))))
            }
            // Said of the object, where that is checked.
            Err(Error::NoSuchLayer(_) | Error::Corrupt { .. }) => {
                let advice = "The bucket does not have it whole either: restore its object from a copy of the bucket.";
                Ok(corrupt(path, &faults, advice, None))
            }
            Err(error) => Err(error),
        }
    }

    async fn branch(
        &self,
        branch: BranchId,
        path: &Path,
        manifests: &BTreeMap<LayerId, Manifest>,
        checked: &mut Checked,
        progress: &(dyn Fn(&str) + Sync),
    ) -> Result<()> {
        let dirs = VolumeDirs { layers: self.layers_dir.clone(), branch: path.to_owned(), source: None };
        if !volume::Volume::exists(&dirs) {
            for name in ["uppers", "holes.new", "volume.new"] {
                let left = path.join(name);
                if left.exists() {
                    checked.findings.push(Finding::stale(&left, "it is left of a volume that was not made or removed"));
                }
            }
            return Ok(());
        }
        progress(&format!("volume of {branch}"));
        let looked = blocking::run(move || volume::look(&dirs)).await?;
        for fault in looked.faults {
            match fault {
                Fault::Open => {
                    let why = format!("the volume in {path:?} is open: the branch's compute runs; suspend it first");
                    return Err(Error::Invalid(why));
                }
                Fault::Corrupt { path, why } => {
                    let advice = "Restore the branch to a checkpoint, or the node's disk from a copy.";
                    checked.findings.push(Finding::new(Kind::Corrupt, shown(&path), why, advice));
                }
                Fault::Missing { path, why } => {
                    let advice = "Restore the branch to a checkpoint, or the node's disk from a copy.";
                    checked.findings.push(Finding::new(Kind::Missing, shown(&path), why, advice));
                }
                Fault::Stale { path, why } => checked.findings.push(Finding::stale(&path, why)),
                // Said below, with the rest of the chain.
                Fault::NoBase { .. } => {}
            }
        }
        // A layer that opening will make of an upper is not missing.
        for &base in looked.bases.difference(&looked.pending) {
            let chain = manifests.get(&base).map_or(vec![base], |manifest| manifest.chain.clone());
            for layer in chain {
                if !checked.layers.contains_key(&layer) {
                    let found = self.missing(layer, branch).await?;
                    // Layers below the newest are fetched when they are read.
                    if layer != base && found.repair.is_some() {
                        continue;
                    }
                    if !checked.findings.iter().any(|known| known.object == found.object && known.kind == found.kind) {
                        checked.findings.push(found);
                    }
                }
            }
        }
        checked.volumes.insert(branch, looked.bases);
        Ok(())
    }

    /// The layer that a volume lies on must be here, even if the bucket has it; those below here or in the bucket.
    async fn missing(&self, layer: LayerId, branch: BranchId) -> Result<Finding> {
        let whole = match self.bucket {
            Some(bucket) => matches!(super::check_layer(bucket, layer).await?, super::LayerState::Whole(_)),
            None => false,
        };
        let path = self.layers_dir.join(layer.to_string());
        let (advice, repair) = match whole {
            true => ("The bucket has it whole: --repair fetches it.", Some(Repair::Fetch(layer))),
            false if self.bucket.is_some() => ("The bucket does not have it whole: restore it from a copy.", None),
            false => ("Look in the bucket: add --bucket.", None),
        };
        let what = "the layer is not on this node, and a volume lies on it";
        let finding = Finding::new(Kind::Missing, shown(&path), what, advice).repair(repair);
        Ok(finding.kept_by(vec![format!("the volume of branch {branch}")]))
    }
}

fn corrupt(path: &Path, faults: &[String], advice: &str, repair: Option<Repair>) -> Vec<Finding> {
    if faults.is_empty() {
        return Vec::new();
    }
    vec![Finding::new(Kind::Corrupt, shown(path), faults.join("; "), advice).repair(repair)]
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Checks what a local layer tells by itself.
fn look_at_layer(layer: LayerId, dir: &Path) -> Result<(Manifest, Vec<String>)> {
    let manifest = node::read_manifest(layer, dir)?;
    if manifest.id != layer {
        let why = format!("it is that of layer {}", manifest.id);
        return Err(Error::Corrupt { what: format!("manifest in {dir:?}"), why });
    }
    let own_slot = manifest.own_slot();
    let mut faults = Vec::new();
    for inode in &manifest.inodes {
        let InodeKind::File { size, runs } = &inode.kind else { continue };
        let Some(last) = runs.iter().rfind(|run| run.slot == own_slot) else { continue };
        let path = dir.join("data").join(inode.ino.to_string());
        // Every writer of layers writes the last page of a run; a file that ends before it has lost something.
        let least = (u64::from(last.start + last.len) * BLOCK_BYTES).min(*size);
        let name = || format!("data/{} of {:?}", inode.ino, String::from_utf8_lossy(&inode.name));
        match fs::metadata(&path) {
            Ok(found) if found.len() < least && pages_of(*size) > 0 => {
                faults.push(format!("{} has {} bytes, and pages up to {least}", name(), found.len()));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => faults.push(format!("{} is not there", name())),
            Err(error) => return Err(error).on("read", &path),
        }
    }
    let image = &manifest.image;
    if image.redo.0 > 0 {
        let segment = WalSegment::holding(image.redo, image.pg_timeline, image.wal_segment_bytes).file_name();
        match fs::metadata(dir.join("wal").join(&segment)) {
            Ok(found) if found.len() == u64::from(image.wal_segment_bytes) => {}
            Ok(found) => faults.push(format!("wal/{segment} has {} bytes", found.len())),
            Err(_) => faults.push(format!("wal/{segment} is not there, in which recovery begins")),
        }
    }
    Ok((manifest, faults))
}
