//! A view of a bucket that counts what is read, and takes no writes.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use ebb_storage::object_store::{Bucket, ObjectMeta, ObjectStore, Put};
use ebb_storage::{Error, Result};

/// See the module.
#[derive(Debug)]
pub(super) struct Counted {
    bucket: Bucket,
    read_bytes: AtomicU64,
}

impl Counted {
    pub fn new(bucket: Bucket) -> Arc<Self> {
        Arc::new(Self { bucket, read_bytes: AtomicU64::new(0) })
    }

    /// Bytes of objects that were read so far.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    fn count(&self, bytes: &Bytes) {
        self.read_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
}

fn refused<T>(key: &str) -> Result<T> {
    Err(Error::Invalid(format!("a drill changes nothing in the bucket, and object {key:?} least of all")))
}

#[async_trait]
impl ObjectStore for Counted {
    async fn get(&self, key: &str) -> Result<Bytes> {
        self.bucket.get(key).await.inspect(|bytes| self.count(bytes))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.bucket.get_range(key, range).await.inspect(|bytes| self.count(bytes))
    }

    async fn put(&self, key: &str, _: Bytes) -> Result<()> {
        refused(key)
    }

    async fn put_if_absent(&self, key: &str, _: Bytes) -> Result<Put> {
        refused(key)
    }

    async fn put_file(&self, key: &str, _: &Path) -> Result<()> {
        refused(key)
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.bucket.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.bucket.list(prefix, start_after).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        refused(key)
    }
}

#[cfg(test)]
mod tests {
    use ebb_storage::object_store;

    use super::*;

    #[tokio::test]
    async fn what_is_read_is_counted_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
        bucket.put("a", Bytes::from_static(b"0123456789")).await.unwrap();
        let counted = Counted::new(bucket.clone());
        assert_eq!(counted.get("a").await.unwrap().len(), 10);
        assert_eq!(counted.get_range("a", 2..5).await.unwrap(), "234");
        assert_eq!(counted.read_bytes(), 13);
        let bytes = Bytes::from_static(b"x");
        assert!(counted.put("a", bytes.clone()).await.is_err());
        assert!(counted.put_if_absent("b", bytes).await.is_err());
        assert!(counted.put_file("b", dir.path()).await.is_err());
        assert!(counted.delete("a").await.is_err());
        assert_eq!(bucket.list("", None).await.unwrap(), counted.list("", None).await.unwrap());
        assert_eq!(bucket.get("a").await.unwrap(), "0123456789");
    }
}
