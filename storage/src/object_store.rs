//! The one place where bytes must survive: objects by key in a bucket.
//!
//! Keys are relative paths of `[A-Za-z0-9._-]` parts joined by `/`. Objects are immutable once written by
//! `put_if_absent`; `put` may replace. Every call has a deadline and retries what is retryable by itself.

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::Result;

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
/// `Invalid` for a scheme this build does not know; `Local` when the directory cannot be made, written or locked.
pub async fn open(_url: &str) -> Result<Bucket> {
    todo!("helper A")
}
