//! Gives every call of a store its deadline and its metrics.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::{ObjectMeta, ObjectStore, Put};
use crate::error::{Error, LocalContext, Result};

/// LIMIT: long enough for a disk or a network that is merely slow; a client waiting on a wake gives up sooner.
const DEADLINE: Duration = Duration::from_secs(30);

/// LIMIT: the slowest upload worth waiting for; below it something is broken rather than slow.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

/// A store whose calls are timed, counted and never wait for ever.
#[derive(Debug)]
pub(super) struct Watched<S> {
    store: S,
}

impl<S: ObjectStore> Watched<S> {
    pub(super) fn new(store: S) -> Self {
        Self { store }
    }

    async fn watch<T>(
        &self,
        op: &'static str,
        key: &str,
        bytes: u64,
        call: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let began = Instant::now();
        let deadline = DEADLINE + Duration::from_secs(bytes / BYTES_PER_SECOND_MIN);
        let result = timeout(deadline, call).await.unwrap_or_else(|_| {
            let source = io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {deadline:?}"));
            Err(Error::Bucket { act: op, key: key.to_owned(), source })
        });
        let outcome = match &result {
            Ok(_) => "ok",
            Err(Error::NoSuchObject { .. }) => "not_found",
            Err(_) => "error",
        };
        metrics::counter!("ebb_storage_bucket_requests_total", "op" => op, "outcome" => outcome).increment(1);
        metrics::histogram!("ebb_storage_bucket_request_seconds", "op" => op).record(began.elapsed());
        result
    }
}

fn count_read(bytes: &Bytes) {
    metrics::counter!("ebb_storage_bucket_read_bytes_total").increment(bytes.len() as u64);
}

fn count_written(bytes: u64) {
    metrics::counter!("ebb_storage_bucket_written_bytes_total").increment(bytes);
}

#[async_trait]
impl<S: ObjectStore> ObjectStore for Watched<S> {
    async fn get(&self, key: &str) -> Result<Bytes> {
        self.watch("get", key, 0, self.store.get(key)).await.inspect(count_read)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let bytes = range.end.saturating_sub(range.start);
        self.watch("get_range", key, bytes, self.store.get_range(key, range)).await.inspect(count_read)
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        let size = bytes.len() as u64;
        self.watch("put", key, size, self.store.put(key, bytes)).await.inspect(|()| count_written(size))
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put> {
        let size = bytes.len() as u64;
        let put = self.watch("put_if_absent", key, size, self.store.put_if_absent(key, bytes)).await?;
        if put == Put::Created {
            count_written(size);
        }
        Ok(put)
    }

    async fn put_file(&self, key: &str, file: &Path) -> Result<()> {
        let size = tokio::fs::metadata(file).await.on("read", file)?.len();
        self.watch("put_file", key, size, self.store.put_file(key, file)).await.inspect(|()| count_written(size))
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.watch("head", key, 0, self.store.head(key)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.watch("list", prefix, 0, self.store.list(prefix, start_after)).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.watch("delete", key, 0, self.store.delete(key)).await
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    /// A store that never answers.
    #[derive(Debug)]
    struct Stuck;

    #[async_trait]
    impl ObjectStore for Stuck {
        async fn get(&self, _: &str) -> Result<Bytes> {
            pending().await
        }
        async fn get_range(&self, _: &str, _: Range<u64>) -> Result<Bytes> {
            pending().await
        }
        async fn put(&self, _: &str, _: Bytes) -> Result<()> {
            pending().await
        }
        async fn put_if_absent(&self, _: &str, _: Bytes) -> Result<Put> {
            pending().await
        }
        async fn put_file(&self, _: &str, _: &Path) -> Result<()> {
            pending().await
        }
        async fn head(&self, _: &str) -> Result<Option<ObjectMeta>> {
            pending().await
        }
        async fn list(&self, _: &str, _: Option<&str>) -> Result<Vec<ObjectMeta>> {
            pending().await
        }
        async fn delete(&self, _: &str) -> Result<()> {
            pending().await
        }
    }

    fn timed_out<T: std::fmt::Debug>(result: Result<T>) {
        let Err(error @ Error::Bucket { .. }) = result else { panic!("{result:?}") };
        assert_eq!(error.kind(), ebb_types::ErrorKind::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn no_call_waits_for_ever() {
        let store = Watched::new(Stuck);
        timed_out(store.get("a").await);
        timed_out(store.get_range("a", 0..1).await);
        timed_out(store.put("a", Bytes::new()).await);
        timed_out(store.put_if_absent("a", Bytes::new()).await);
        timed_out(store.put_file("a", Path::new("/proc/self/status")).await);
        timed_out(store.head("a").await);
        timed_out(store.list("", None).await);
        timed_out(store.delete("a").await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_call_has_longer() {
        let began = Instant::now();
        timed_out(Watched::new(Stuck).put("a", vec![0; 100 << 20].into()).await);
        assert_eq!(began.elapsed().as_secs(), 130);
    }
}
