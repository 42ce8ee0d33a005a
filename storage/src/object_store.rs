//! The one place where bytes must survive: objects by key in a bucket.
//!
//! Keys are relative paths of `[A-Za-z0-9._-]` parts joined by `/`. Objects are immutable once written by
//! `put_if_absent`; `put` may replace. Every call has a deadline and retries what is retryable by itself.
//!
//! What is where in a bucket, and how a local directory plays one, is in `docs/formats/bucket.md`.
//!
//! # Crash
//! An object appears whole or not at all, and what a call returned for is durable. A call that failed, timed out or
//! was cut off may still have taken effect: look before trying something else.
//!
//! # Cancellation
//! Dropping a call's future does not stop what it began; the object then appears whole, or never.

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::{Error, Result};

#[cfg(test)]
pub(crate) mod conformance;
mod dir;
mod watched;

pub use dir::Dir;

/// A bucket shared by everything in this process.
pub type Bucket = Arc<dyn ObjectStore>;

/// What `put_if_absent` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Put {
    /// The object is now this call's bytes.
    Created,
    /// There was one already; nothing was changed.
    Exists,
}

/// One row of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// The whole key.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
}

/// A bucket: objects by key, with an atomic "put unless there is one".
#[async_trait]
pub trait ObjectStore: Debug + Send + Sync + 'static {
    /// The whole object.
    async fn get(&self, key: &str) -> Result<Bytes>;

    /// The bytes of a half-open range; a range that ends past the object is an error.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes>;

    /// Writes or replaces; durable when it returns.
    async fn put(&self, key: &str, bytes: Bytes) -> Result<()>;

    /// Writes only if there is no such object; of any number of racing calls exactly one creates it.
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put>;

    /// Streams a local file into an object in bounded memory; replaces; the object appears whole or not at all.
    async fn put_file(&self, key: &str, file: &Path) -> Result<()>;

    /// Size of an object, or `None` if there is no such object.
    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>>;

    /// All objects below a prefix (which ends in `/` or is empty), in the order of their keys, after `start_after`
    /// if given.
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>>;

    /// Deletes; succeeds if there is no such object.
    async fn delete(&self, key: &str) -> Result<()>;
}

/// Opens a bucket by its URL: a directory path, or `file://` and an absolute path.
///
/// # Errors
/// `Invalid` for a scheme this build does not know, and for a directory that is something else than a bucket;
/// `Local` when the directory cannot be made or written.
pub async fn open(url: &str) -> Result<Bucket> {
    let path = match url.split_once("://") {
        None if url.is_empty() => return Err(Error::Invalid("the bucket's path is empty".to_owned())),
        None => Path::new(url),
        Some(("file", path)) if path.starts_with('/') => Path::new(path),
        Some(("file", _)) => {
            return Err(Error::Invalid(format!("bucket {url:?}: after file:// an absolute path is wanted")));
        }
        Some(("s3", _)) => {
            let why = "this build keeps buckets in local directories only; give a path or a file:// URL";
            return Err(Error::Invalid(format!("bucket {url:?} is in S3, and {why}")));
        }
        Some((scheme, _)) => {
            return Err(Error::Invalid(format!("bucket {url:?}: the scheme {scheme:?} is not known (want file://)")));
        }
    };
    let dir = Dir::open(path).await?;
    Ok(Arc::new(watched::Watched::new(dir)))
}

/// The bucket's own marker, not an object.
pub(crate) const MARKER: &str = "ebb-bucket";

/// LIMIT: S3's longest key has 1,024 bytes, and a file name in Linux at most 255.
const KEY_BYTES_MAX: usize = 1024;
const PART_BYTES_MAX: usize = 255;

/// Refuses what is not a key. Parts that begin with a dot are kept for the store itself.
pub(crate) fn check_key(key: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let is_part = |part: &str| {
        !part.is_empty() && !part.starts_with('.') && part.len() <= PART_BYTES_MAX && part.bytes().all(allowed)
    };
    if key.len() > KEY_BYTES_MAX || key == MARKER || !key.split('/').all(is_part) {
        return Err(Error::Invalid(format!("{key:?} cannot be the key of an object")));
    }
    Ok(())
}

/// Refuses what is not a prefix for `list`.
pub(crate) fn check_prefix(prefix: &str) -> Result<()> {
    match prefix.strip_suffix('/') {
        Some(key) => check_key(key),
        None if prefix.is_empty() => Ok(()),
        None => Err(Error::Invalid(format!("{prefix:?} cannot be a prefix: it does not end in a slash"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        for good in ["a", "layers/ly_01", "a/b/c.d-e_F", "catalog/00000000000000000000"] {
            assert!(check_key(good).is_ok(), "{good:?} was refused");
        }
        let long = "x".repeat(256);
        for bad in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", ".staging/x", "a b", "ä", "a\0", MARKER, &long] {
            assert!(check_key(bad).is_err(), "{bad:?} was taken");
        }
        assert!(check_prefix("").is_ok() && check_prefix("a/b/").is_ok());
        assert!(check_prefix("a").is_err() && check_prefix("/").is_err() && check_prefix("../").is_err());
    }

    #[tokio::test]
    async fn unknown_schemes_are_refused_with_advice() {
        let error = open("s3://backups/ebb").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "bucket \"s3://backups/ebb\" is in S3, and this build keeps buckets in local directories only; give a \
             path or a file:// URL"
        );
        assert!(matches!(open("file://relative").await, Err(Error::Invalid(_))));
        assert!(matches!(open("gs://x").await, Err(Error::Invalid(_))));
        assert!(matches!(open("").await, Err(Error::Invalid(_))));
    }
}
