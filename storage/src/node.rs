//! What one machine holds of the bucket: its layers, as sparse files under `layers/`.
//!
//! **Invariants**: a directory `layers/<layer id>` with a `manifest` in it is that layer, whole and synced, unless it also
//! has an `index`: then it is partial, and lacks frames that are fetched when they are needed (see [`crate::layer`]). It
//! comes into being under another name and gets its own by one rename; it loses its name before anything in it is deleted.
//!
//! **Crash**: what was half fetched, imported, packed or deleted is left under a name beginning with a dot, and
//! [`NodeStore::remove_leftovers`] deletes it; and partial layers of an earlier run of this machine, which were not synced.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_types::LayerId;
use futures::stream::{self, StreamExt, TryStreamExt};
use parking_lot::Mutex;

use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use crate::layer::{self, BootSet, LazyLayers, Manifest, Origin};
use crate::object_store::Bucket;

mod cache;
mod export;
mod import;
mod keep;

pub use cache::Trimmed;
pub(crate) use keep::names_in;
pub use keep::{local_branches, upper_bytes, volume_bases};

/// LIMIT: layers fetched at once for one image; each has two reads of 8 MiB in memory.
const PARALLEL_FETCHES: usize = 4;

/// The node's local side of storage. Cheap to clone; safe to use from many tasks.
#[derive(Debug, Clone)]
pub struct NodeStore {
    layers_dir: PathBuf,
    bucket: Bucket,
    lazy: Arc<LazyLayers>,
    /// One lock per layer that somebody is fetching, uploading or deleting now.
    turns: Arc<Mutex<HashMap<LayerId, Arc<tokio::sync::Mutex<()>>>>>,
}

/// What an upload came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uploaded {
    /// Bytes of the object.
    pub object_bytes: u64,
    /// Bytes of the pages and WAL it carries, uncompressed.
    pub raw_bytes: u64,
}

impl NodeStore {
    /// `data_dir/layers` over a bucket.
    pub fn new(data_dir: &Path, bucket: Bucket) -> Self {
        let layers_dir = data_dir.join("layers");
        let lazy = LazyLayers::new(&layers_dir, Origin::Bucket(bucket.clone()));
        Self { layers_dir, bucket, lazy, turns: Arc::default() }
    }

    /// The layers of this node and where to get what is missing: for volumes in this process.
    pub fn lazy_layers(&self) -> &Arc<LazyLayers> {
        &self.lazy
    }

    /// Where all layers of this node are: volumes need it.
    pub fn layers_dir(&self) -> &Path {
        &self.layers_dir
    }

    /// Deletes what a killed process left half made. To be called at start, before anything else uses the store, by
    /// whoever holds the data directory's lock.
    pub async fn remove_leftovers(&self) -> Result<()> {
        let layers_dir = self.layers_dir.clone();
        blocking::run(move || remove_leftovers(&layers_dir)).await
    }

    /// Makes a layer and every layer of its chain complete on this node, fetching and verifying what is missing.
    /// Single-flighted per layer; a fetch cut off half-way leaves nothing that looks complete.
    ///
    /// # Errors
    /// `NoSuchLayer` when a layer of the chain is neither here nor in the bucket; `Corrupt` when one does not check.
    pub async fn ensure_local(&self, layer: LayerId) -> Result<()> {
        self.ensure_one(layer).await?;
        let mut chain = self.manifest(layer).await?.chain;
        chain.retain(|&id| id != layer);
        stream::iter(chain)
            .map(|id| self.ensure_one(id))
            .buffer_unordered(PARALLEL_FETCHES)
            .try_collect::<Vec<()>>()
            .await
            .map(drop)
    }

    /// Makes an image ready to be started from, with as few requests as possible: its own layer's manifest, WAL and
    /// roles are here, its boot set too if there is one, and a volume that has a source fetches pages as they are read.
    /// The layers below are not touched. Single-flighted.
    ///
    /// # Errors
    /// `NoSuchLayer` when the layer is neither here nor in the bucket; `Corrupt` when what was read does not check.
    pub async fn ensure_openable(&self, layer: LayerId) -> Result<()> {
        if self.is_local(layer).await? {
            return Ok(());
        }
        self.lazy.ensure_openable(layer).await
    }

    /// The manifest of a layer that is local, whole or not.
    ///
    /// # Errors
    /// `NoSuchLayer` when it is not.
    pub async fn manifest(&self, layer: LayerId) -> Result<Manifest> {
        let dir = self.layer_dir(layer);
        blocking::run(move || read_manifest(layer, &dir)).await
    }

    /// Packs and uploads a sealed local layer, unless the bucket has it already. Idempotent.
    /// The layers below it are not touched: upload them first.
    ///
    /// # Errors
    /// `NoSuchLayer` when neither this node nor the bucket has it.
    pub async fn upload(&self, layer: LayerId) -> Result<Uploaded> {
        let _turn = self.turn(layer).await;
        if let Some(packed) = layer::packed_in(&self.bucket, layer).await? {
            return Ok(packed.into());
        }
        if !self.is_local(layer).await? {
            return Err(Error::NoSuchLayer(layer));
        }
        self.upload_boot_set(layer).await?;
        let scratch = Scratch::new(&self.layers_dir, "pack", layer);
        let (layer_dir, file) = (self.layer_dir(layer), scratch.path.clone());
        let packed = blocking::run(move || layer::pack(layer, &layer_dir, &file)).await?;
        self.bucket.put_file(&layer::object_key(layer), &scratch.path).await?;
        metrics::counter!("ebb_storage_layer_packed_raw_bytes_total").increment(packed.raw_bytes);
        metrics::counter!("ebb_storage_layer_packed_object_bytes_total").increment(packed.object_bytes);
        Ok(packed.into())
    }

    /// Uploads the boot set that was made with a layer, if one was. Before the layer: whoever finds that finds this.
    async fn upload_boot_set(&self, layer: LayerId) -> Result<()> {
        let path = self.layer_dir(layer).join("boot");
        let read = blocking::run(move || match fs::read(&path) {
            Ok(bytes) => BootSet::decode(&format!("boot set {path:?}"), &bytes).map(|_| Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).on("read", &path),
        });
        match read.await {
            Ok(Some(bytes)) => self.bucket.put(&layer::boot_key(layer), bytes.into()).await,
            Ok(None) => Ok(()),
            // A crash may have torn it. The layer is worth keeping without.
            Err(error) => {
                tracing::warn!(%layer, %error, "a boot set is not uploaded");
                Ok(())
            }
        }
    }

    /// Makes a layer with no chain below it out of a plain, cleanly shut down data directory (`pg_wal` inside).
    ///
    /// # Errors
    /// `Invalid`, saying why, for a directory that is not one, is in use, was not shut down cleanly, is of a Postgres
    /// that is not supported, or has tablespaces.
    ///
    /// # Cancel safety
    /// An import goes on when its future is dropped, and leaves a layer whose id nobody learned.
    pub async fn import(&self, data_dir: &Path) -> Result<LayerId> {
        let layer = LayerId::generate();
        self.import_as(layer, data_dir, None).await?;
        Ok(layer)
    }

    /// As [`NodeStore::import`], under an identifier that was chosen beforehand, and with the SCRAM verifiers of its roles
    /// (`roles.json`). A layer of that identifier that is here already is the one.
    ///
    /// # Errors
    /// As [`NodeStore::import`].
    ///
    /// # Cancel safety
    /// An import goes on when its future is dropped.
    pub async fn import_as(&self, layer: LayerId, data_dir: &Path, roles: Option<&Path>) -> Result<()> {
        let (layers_dir, data_dir, roles) = (self.layers_dir.clone(), data_dir.to_owned(), roles.map(Path::to_owned));
        blocking::run(move || {
            let dir = layers_dir.join(layer.to_string());
            if dir.join("manifest").exists() {
                return Ok(());
            }
            let scratch = Scratch::make_dir(&layers_dir, "import", layer)?;
            import::import(layer, &data_dir, &scratch.path)?;
            if let Some(roles) = roles {
                let copy = scratch.path.join("roles.json");
                fs::copy(&roles, &copy).on("copy", &roles)?;
                fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).on("restrict", &copy)?;
            }
            layer::sync_file_system(&scratch.path)?;
            scratch.publish(&dir)
        })
        .await
    }

    /// Writes an image as a plain data directory (with `pg_wal` inside) that stock Postgres starts.
    /// `dest` must not exist or be empty; it is complete when this returns, or removed again.
    ///
    /// The files belong to the user of this process; Postgres wants to run as their owner.
    ///
    /// # Cancel safety
    /// An export goes on when its future is dropped.
    pub async fn export(&self, layer: LayerId, dest: &Path) -> Result<()> {
        self.ensure_local(layer).await?;
        let manifest = self.manifest(layer).await?;
        let (layers_dir, dest) = (self.layers_dir.clone(), dest.to_owned());
        blocking::run(move || export::export(&manifest, &layers_dir, &dest)).await
    }

    /// Deletes the local copy of a layer (never the bucket's). Succeeds if there is none.
    pub async fn remove_local(&self, layer: LayerId) -> Result<()> {
        let _turn = self.turn(layer).await;
        let (dir, scratch) = (self.layer_dir(layer), Scratch::new(&self.layers_dir, "remove", layer));
        self.lazy.forget(layer);
        blocking::run(move || match fs::rename(&dir, &scratch.path) {
            Ok(()) => fs::remove_dir_all(&scratch.path).on("remove", &scratch.path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).on("remove", &dir),
        })
        .await
    }

    async fn ensure_one(&self, layer: LayerId) -> Result<()> {
        if self.is_local(layer).await? {
            return Ok(());
        }
        let _turn = self.turn(layer).await;
        if self.is_local(layer).await? {
            return Ok(());
        }
        if self.layer_dir(layer).join("manifest").exists() {
            return self.lazy.complete(layer).await;
        }
        let layers_dir = self.layers_dir.clone();
        let scratch = blocking::run(move || Scratch::make_dir(&layers_dir, "fetch", layer)).await?;
        layer::fetch(&self.bucket, layer, &scratch.path).await?;
        metrics::counter!("ebb_storage_layers_fetched_total").increment(1);
        let dir = self.layer_dir(layer);
        let published = blocking::run(move || scratch.publish(&dir)).await;
        if published.is_err() && self.layer_dir(layer).join("manifest").exists() {
            // A reader began to fetch it piece by piece meanwhile.
            return self.lazy.complete(layer).await;
        }
        published
    }

    /// Whether all of a layer is on this node.
    async fn is_local(&self, layer: LayerId) -> Result<bool> {
        let lazy = self.lazy.clone();
        Ok(blocking::run(move || lazy.is_whole(layer)).await)
    }

    fn layer_dir(&self, layer: LayerId) -> PathBuf {
        self.layers_dir.join(layer.to_string())
    }

    /// Waits until nobody else in this process is busy with the layer.
    async fn turn(&self, layer: LayerId) -> Turn {
        let lock = self.turns.lock().entry(layer).or_default().clone();
        let guard = lock.lock_owned().await;
        Turn { layer, turns: self.turns.clone(), _guard: guard }
    }
}

impl From<layer::Packed> for Uploaded {
    fn from(packed: layer::Packed) -> Self {
        Self { object_bytes: packed.object_bytes, raw_bytes: packed.raw_bytes }
    }
}

/// The right to be busy with a layer.
struct Turn {
    layer: LayerId,
    turns: Arc<Mutex<HashMap<LayerId, Arc<tokio::sync::Mutex<()>>>>>,
    _guard: tokio::sync::OwnedMutexGuard<()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.turns.lock();
        // Two hold the lock if nobody waits: the map and this guard. New ones come only through the map.
        if turns.get(&self.layer).is_some_and(|lock| Arc::strong_count(lock) <= 2) {
            turns.remove(&self.layer);
        }
    }
}

/// A hidden file or directory beside the layers, removed when dropped unless it was published.
pub(crate) struct Scratch {
    pub(crate) path: PathBuf,
}

impl Scratch {
    /// Picks a name that nobody uses, also not a task that was cancelled and whose last blocking step still runs.
    pub(crate) fn new(layers_dir: &Path, purpose: &str, layer: LayerId) -> Self {
        Self { path: layers_dir.join(format!(".{purpose}-{layer}-{:08x}", rand::random::<u32>())) }
    }

    pub(crate) fn make_dir(layers_dir: &Path, purpose: &str, layer: LayerId) -> Result<Self> {
        let make = |dir: &Path| DirBuilder::new().mode(0o700).recursive(true).create(dir).on("create", dir);
        make(layers_dir)?;
        let scratch = Self::new(layers_dir, purpose, layer);
        make(&scratch.path)?;
        Ok(scratch)
    }

    /// Gives the finished, synced directory its name, durably.
    fn publish(self, dir: &Path) -> Result<()> {
        fs::rename(&self.path, dir).on("rename a finished layer to", dir)?;
        sync_dir(dir.parent().expect("a layer's directory is in the layers directory"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.path);
        // What cannot be removed now is removed as a leftover at the next start. Nothing is there if it was published.
        let remove = move || drop(remove_any(&path));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

pub(crate) fn read_manifest(layer: LayerId, dir: &Path) -> Result<Manifest> {
    let path = dir.join("manifest");
    match fs::read(&path) {
        Ok(bytes) => Manifest::decode(&format!("manifest {path:?}"), &bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoSuchLayer(layer)),
        Err(error) => Err(error).on("read", &path),
    }
}

fn remove_leftovers(layers_dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(layers_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).on("list", layers_dir),
    };
    for entry in entries {
        let entry = entry.on("list", layers_dir)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_stale = || -> Result<bool> {
            let Ok(layer) = name.parse() else { return Ok(false) };
            Ok(layer::is_partial(&entry.path()) && layer::is_stale(layer, &entry.path())?)
        };
        if is_leftover(name) || is_stale()? {
            remove_any(&entry.path()).on("remove", &entry.path())?;
        }
    }
    Ok(())
}

/// Whether a name in `layers/` is that of something half made.
pub(crate) fn is_leftover(name: &str) -> bool {
    [".fetch-", ".import-", ".pack-", ".remove-"].iter().any(|prefix| name.starts_with(prefix))
}

/// Removes a file or a directory with all that is in it, if it is there.
pub(crate) fn remove_any(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).on("sync", dir)
}
