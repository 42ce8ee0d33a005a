//! The one place where bytes must survive: objects by key in a bucket.
//!
//! Keys are relative paths of `[A-Za-z0-9._-]` parts joined by `/`. Objects are immutable once written by
//! `put_if_absent`; `put` may replace. Every call has a deadline and retries what is retryable by itself.
//!
//! A bucket is a local directory ([`Dir`]) or lives in S3 ([`S3`]). [`faulty::Faulty`] is for tests: a bucket that fails.
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
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::{Error, Result};

mod at;
#[cfg(test)]
pub(crate) mod conformance;
mod dir;
pub mod faulty;
mod s3;
mod watched;

pub use at::{BucketAt, attach};
pub use dir::Dir;
pub use s3::{S3, S3Options};

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
    ///
    /// Nothing may depend on the order of two puts of one key where the first failed or was cut off: it may take
    /// effect after the second.
    async fn put(&self, key: &str, bytes: Bytes) -> Result<()>;

    /// Writes only if there is no such object; of any number of racing calls exactly one creates it.
    ///
    /// The answer is the truth also where a request was sent again because its response was lost: a store that repeats
    /// must know its own object from another call's, even if both have the same bytes. After an error nothing is known:
    /// the object may be there, or appear later; whoever repeats the *call* is told `Exists` of its own object.
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

/// Opens a bucket by its URL with nothing else told: see [`open_with`].
///
/// # Errors
/// As [`open_with`].
pub async fn open(url: &str) -> Result<Bucket> {
    open_with(url, &S3Options::default()).await
}

/// Opens a bucket by its URL: a directory path, `file://` and an absolute path, or `s3://name` with or without a
/// `/prefix`, below which all of it is. What is not there is made, but for a bucket in S3.
///
/// # Errors
/// `Invalid` for a scheme this build does not know, and for a directory that is something else than a bucket;
/// `Local` when the directory cannot be made or written; `Unusable`, with a hint, when S3 cannot be reached, does not
/// let us in, or does not keep the promises of [`ObjectStore`].
pub async fn open_with(url: &str, s3: &S3Options) -> Result<Bucket> {
    match Place::parse(url)? {
        Place::S3(location) => Ok(Arc::new(watched::Watched::new(S3::open(location, s3).await?))),
        Place::Dir(path) => Ok(Arc::new(watched::Watched::new(Dir::open(path).await?))),
    }
}

/// Whether a bucket's URL, and where S3 is, make sense; opens nothing.
///
/// # Errors
/// `Invalid`, without repeating what may be a password.
pub fn check_url(url: &str, s3: &S3Options) -> Result<()> {
    s3.check()?;
    Place::parse(url).map(drop)
}

/// What a bucket's URL leads to.
enum Place<'a> {
    Dir(&'a Path),
    S3(&'a str),
}

impl<'a> Place<'a> {
    fn parse(url: &'a str) -> Result<Self> {
        match url.split_once("://") {
            None if url.is_empty() => Err(Error::Invalid("the bucket's path is empty".to_owned())),
            None => Ok(Place::Dir(Path::new(url))),
            Some(("file", path)) if path.starts_with('/') => Ok(Place::Dir(Path::new(path))),
            Some(("file", _)) => {
                Err(Error::Invalid(format!("bucket {url:?}: after file:// an absolute path is wanted")))
            }
            Some(("s3", location)) => s3::check_location(location).map(|()| Place::S3(location)),
            Some((scheme, _)) => {
                let why = format!("the scheme {scheme:?} of the bucket's URL is not known (want s3:// or file://)");
                Err(Error::Invalid(why))
            }
        }
    }
}

/// The bucket's own marker, not an object.
pub(crate) const MARKER: &str = "ebb-bucket";

/// What is where in a bucket, as the marker numbers it.
const FORMAT_VERSION: u32 = 1;

/// What the marker holds.
fn marker_text() -> String {
    format!("{MARKER} {FORMAT_VERSION}\n")
}

/// Refuses the marker of a bucket of another format version. `root` is where the bucket is.
fn check_marker(root: &str, text: &str) -> Result<()> {
    let version = text.trim_end().strip_prefix(MARKER).and_then(|rest| rest.trim().parse::<u32>().ok());
    match version {
        Some(FORMAT_VERSION) => Ok(()),
        Some(other) => Err(Error::Invalid(format!(
            "bucket {root:?} has format version {other}; this build knows {FORMAT_VERSION}"
        ))),
        None => Err(Error::Corrupt {
            what: format!("the marker {MARKER:?} of bucket {root:?}"),
            why: "it does not name a format version".to_owned(),
        }),
    }
}

fn no_such_range(key: &str, size: u64, range: &Range<u64>) -> Error {
    let Range { start, end } = range;
    Error::Invalid(format!("object {key:?} has {size} bytes and so no range {start}..{end}"))
}

fn failed(act: &'static str, key: &str, source: io::Error) -> Error {
    Error::Bucket { act, key: key.to_owned(), source }
}

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
        let error = open("gs://backups/ebb").await.unwrap_err();
        assert_eq!(error.to_string(), "the scheme \"gs\" of the bucket's URL is not known (want s3:// or file://)");
        assert!(matches!(open("file://relative").await, Err(Error::Invalid(_))));
        assert!(matches!(open("").await, Err(Error::Invalid(_))));
    }
}
