//! Keeps what this node has of the bucket below a limit, by giving up the layers that were used longest ago.
//!
//! **Invariants**: only a layer whose object is in the bucket is given up; never one that an open volume reads from (each
//! holds a lock on the layers it has touched), and never one that the caller wants kept. A volume that has not touched a
//! layer yet fetches it again when it does.
//!
//! LIMIT: a layer is used when a volume opens it, not at each read; and what is in use may exceed the limit.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use ebb_types::LayerId;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::{NodeStore, Scratch, names_in};
use crate::blocking;
use crate::error::{LocalContext, Result};

/// LIMIT: what was used just now is not given up: somebody may be about to open it.
const YOUNG: Duration = Duration::from_secs(60);

/// What keeping below the limit came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trimmed {
    /// Bytes on disk of the layers that stay.
    pub bytes: u64,
    /// Layers that were given up.
    pub evicted: usize,
}

/// A layer on this node.
#[derive(Debug)]
struct Cached {
    layer: LayerId,
    bytes: u64,
    used: SystemTime,
}

impl NodeStore {
    /// Gives up layers until they take at most `limit` bytes on disk, those used longest ago first. Those in `kept`, and
    /// those in use, stay.
    ///
    /// # Errors
    /// If layers cannot be looked at or removed, or the bucket cannot be asked.
    pub async fn trim(&self, limit: u64, kept: &BTreeSet<LayerId>) -> Result<Trimmed> {
        self.trim_older(limit, kept, YOUNG).await
    }

    /// As [`NodeStore::trim`], for layers not used for this long.
    pub(crate) async fn trim_older(&self, limit: u64, kept: &BTreeSet<LayerId>, age: Duration) -> Result<Trimmed> {
        let layers_dir = self.layers_dir.clone();
        let mut cached = blocking::run(move || look(&layers_dir)).await?;
        let mut trimmed = Trimmed { bytes: cached.iter().map(|cached| cached.bytes).sum(), evicted: 0 };
        cached.sort_unstable_by_key(|cached| cached.used);
        for Cached { layer, bytes, used } in cached {
            if trimmed.bytes <= limit {
                break;
            }
            let is_young = used.elapsed().is_ok_and(|since| since < age);
            if is_young || kept.contains(&layer) || !self.is_in_bucket(layer).await? {
                continue;
            }
            if self.evict(layer).await? {
                metrics::counter!("ebb_storage_layers_evicted_total").increment(1);
                tracing::info!(%layer, bytes, "layer evicted");
                trimmed.bytes = trimmed.bytes.saturating_sub(bytes);
                trimmed.evicted += 1;
            }
        }
        metrics::gauge!("ebb_storage_cache_bytes").set(trimmed.bytes as f64);
        Ok(trimmed)
    }

    /// Removes a layer unless somebody reads from it; tells whether it did.
    async fn evict(&self, layer: LayerId) -> Result<bool> {
        let _turn = self.turn(layer).await;
        self.lazy.forget(layer);
        let (layers_dir, dir) = (self.layers_dir.clone(), self.layer_dir(layer));
        blocking::run(move || {
            let data = dir.join("data");
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::open(&data, flags, Mode::empty()).on("open", &data)?;
            match rustix::fs::flock(&opened, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(false),
                Err(errno) => return Err(errno).on("lock", &data),
            }
            // Whoever waits for the lock finds another name, and looks again.
            let scratch = Scratch::new(&layers_dir, "remove", layer);
            fs::rename(&dir, &scratch.path).on("remove", &dir)?;
            super::remove_any(&scratch.path).on("remove", &scratch.path)?;
            Ok(true)
        })
        .await
    }
}

fn look(layers_dir: &Path) -> Result<Vec<Cached>> {
    let mut cached = Vec::new();
    for name in names_in(layers_dir)? {
        let (dir, Ok(layer)) = (layers_dir.join(&name), name.parse()) else { continue };
        let used = match fs::metadata(dir.join("manifest")).and_then(|_| fs::metadata(&dir)?.modified()) {
            Ok(used) => used,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).on("read", &dir),
        };
        cached.push(Cached { layer, bytes: disk_bytes(&dir)?, used });
    }
    Ok(cached)
}

/// Bytes on disk of all files below a directory.
fn disk_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for name in names_in(dir)? {
        let path = dir.join(name);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => bytes += disk_bytes(&path)?,
            Ok(found) => bytes += found.blocks() * 512,
            // Removed, or made whole, meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).on("read", &path),
        }
    }
    Ok(bytes)
}
