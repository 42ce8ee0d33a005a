//! The bucket that is only looked at. What checks find is tested from outside, on real data: `tests/e2e/fsck.rs`.

use std::fs;

use bytes::Bytes;

use super::*;
use crate::object_store;

async fn bucket(dir: &Path) -> (String, Bucket) {
    let url = dir.join("bucket").to_str().unwrap().to_owned();
    let bucket = object_store::open(&url).await.unwrap();
    for key in ["a", "layers/x", "layers/y", "projects/p/ledger/1", "projects-2/z"] {
        bucket.put(key, format!("bytes of {key}").into()).await.unwrap();
    }
    (url, bucket)
}

#[tokio::test]
async fn it_shows_what_the_bucket_has() {
    let dir = tempfile::tempdir().unwrap();
    let (url, bucket) = bucket(dir.path()).await;
    for url in [url.clone(), format!("file://{url}")] {
        let shown = open_read_only(&url).await.unwrap();
        for prefix in ["", "layers/", "projects/", "none/"] {
            assert_eq!(shown.list(prefix, None).await.unwrap(), bucket.list(prefix, None).await.unwrap());
        }
        assert_eq!(shown.list("", Some("layers/x")).await.unwrap(), bucket.list("", Some("layers/x")).await.unwrap());
        assert_eq!(shown.get("layers/x").await.unwrap(), "bytes of layers/x");
        assert_eq!(shown.get_range("layers/x", 6..8).await.unwrap(), "of");
        assert!(shown.get_range("layers/x", 6..1000).await.is_err());
        assert_eq!(shown.head("layers/x").await.unwrap(), bucket.head("layers/x").await.unwrap());
        for absent in ["none", "layers", "a/b"] {
            assert!(matches!(shown.get(absent).await, Err(Error::NoSuchObject { .. })), "{absent}");
            assert_eq!(shown.head(absent).await.unwrap(), None);
        }
        assert!(matches!(shown.get("../secret").await, Err(Error::Invalid(_))));
    }
}

#[tokio::test]
async fn it_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (url, _) = bucket(dir.path()).await;
    let shown = open_read_only(&url).await.unwrap();
    assert!(shown.put("a", Bytes::new()).await.is_err());
    assert!(shown.put_if_absent("b", Bytes::new()).await.is_err());
    assert!(shown.put_file("b", Path::new("/proc/self/status")).await.is_err());
    assert!(shown.delete("a").await.is_err());
    assert_eq!(shown.get("a").await.unwrap(), "bytes of a");
    let absent = dir.path().join("absent");
    assert!(matches!(open_read_only(absent.to_str().unwrap()).await, Err(Error::Invalid(_))));
    assert!(!absent.exists(), "looking made a bucket");
    fs::write(dir.path().join("bucket/ebb-bucket"), "ebb-bucket 9\n").unwrap();
    assert!(matches!(open_read_only(&url).await, Err(Error::Corrupt { .. })));
}

#[tokio::test]
async fn only_dead_writers_leave_leftovers() {
    let dir = tempfile::tempdir().unwrap();
    let (url, _) = bucket(dir.path()).await;
    assert_eq!(staging_leftovers(&url).unwrap(), Vec::<PathBuf>::new());
    let (dead, alive) = (dir.path().join("bucket/.staging/dead"), dir.path().join("bucket/.staging/alive"));
    fs::write(&dead, "x").unwrap();
    let writer = fs::File::create(&alive).unwrap();
    rustix::fs::flock(&writer, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(staging_leftovers(&url).unwrap(), [dead]);
}
