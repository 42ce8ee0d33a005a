//! What one machine holds of the bucket: its layers, as sparse files under `layers/`.

use std::path::{Path, PathBuf};

use ebb_types::LayerId;

use crate::Result;
use crate::object_store::Bucket;

/// The node's local side of storage. Cheap to clone; safe to use from many tasks.
#[derive(Debug, Clone)]
pub struct NodeStore {
    layers_dir: PathBuf,
    bucket: Bucket,
}

impl NodeStore {
    /// `data_dir/layers` over a bucket.
    pub fn new(data_dir: &Path, bucket: Bucket) -> Self {
        Self { layers_dir: data_dir.join("layers"), bucket }
    }

    /// Where all layers of this node are: volumes need it.
    pub fn layers_dir(&self) -> &Path {
        &self.layers_dir
    }

    /// Makes a layer and every layer of its chain complete on this node, fetching and verifying what is missing.
    /// Single-flighted per layer; a fetch cut off half-way leaves nothing that looks complete.
    pub async fn ensure_local(&self, _layer: LayerId) -> Result<()> {
        todo!("helper A")
    }

    /// Packs and uploads a sealed local layer, unless the bucket has it already. Idempotent.
    /// The layers below it are not touched: upload them first.
    pub async fn upload(&self, _layer: LayerId) -> Result<Uploaded> {
        todo!("helper A")
    }

    /// Makes a layer with no chain below it out of a plain, cleanly shut down data directory (`pg_wal` inside).
    pub async fn import(&self, _data_dir: &Path) -> Result<LayerId> {
        todo!("helper A")
    }

    /// Writes an image as a plain data directory (with `pg_wal` inside) that stock Postgres starts.
    /// `dest` must not exist or be empty; it is complete when this returns, or removed again.
    pub async fn export(&self, _layer: LayerId, _dest: &Path) -> Result<()> {
        todo!("helper A")
    }

    /// Deletes the local copy of a layer (never the bucket's).
    pub async fn remove_local(&self, _layer: LayerId) -> Result<()> {
        todo!("helper A")
    }
}

/// What an upload came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uploaded {
    /// Bytes of the object.
    pub object_bytes: u64,
    /// Bytes of the pages and WAL it carries, uncompressed.
    pub raw_bytes: u64,
}
