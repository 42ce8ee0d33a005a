//! Where a bucket is, for a process that did not open it first.

use std::path::Path;
use std::sync::Arc;

use super::watched::Watched;
use super::{Bucket, Dir, Place, S3, S3Options};
use crate::error::{LocalContext, Result};

/// Where a bucket is: what another process needs to use it as well. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BucketAt {
    url: String,
    #[serde(default)]
    s3: S3Options,
}

impl BucketAt {
    /// From what [`super::open_with`] takes. A relative path is of this process' working directory.
    ///
    /// # Errors
    /// `Invalid` for what no bucket has as its URL; `Local` when there is no working directory.
    pub fn new(url: &str, s3: &S3Options) -> Result<Self> {
        let url = match Place::parse(url)? {
            Place::S3(_) => url.to_owned(),
            Place::Dir(path) => std::path::absolute(path).on("find", path)?.to_string_lossy().into_owned(),
        };
        Ok(Self { url, s3: s3.clone() })
    }

    /// The directory that the bucket is, if it is one.
    pub fn directory(&self) -> Option<&Path> {
        match Place::parse(&self.url) {
            Ok(Place::Dir(path)) => Some(path),
            _ => None,
        }
    }
}

/// Opens a bucket that another process has opened by [`super::open_with`], and so checked: this one makes, asks and proves
/// nothing, and costs next to no time.
///
/// # Errors
/// `Invalid` when `at` does not make sense.
pub async fn attach(at: &BucketAt) -> Result<Bucket> {
    match Place::parse(&at.url)? {
        Place::S3(location) => Ok(Arc::new(Watched::new(S3::attach(location, &at.s3).await?))),
        Place::Dir(path) => Ok(Arc::new(Watched::new(Dir::attach(path)))),
    }
}
