use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::object_store::conformance;

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    let root = tempfile::tempdir().unwrap();
    conformance::check(crate::object_store::open(root.path().to_str().unwrap()).await.unwrap(), 32).await;
}

#[tokio::test]
async fn a_writer_killed_half_way_leaves_no_object_and_the_next_open_cleans_up() {
    let root = tempfile::tempdir().unwrap();
    let dir = Dir::open(root.path()).await.unwrap();
    let left = root.path().join(STAGING).join("killed");
    fs::write(&left, b"half of an obj").unwrap();
    let alive = Staged::create(&root.path().join(STAGING)).unwrap();

    assert_eq!(dir.list("", None).await.unwrap(), []);
    let again = Dir::open(root.path()).await.unwrap();
    assert_eq!(again.list("", None).await.unwrap(), []);
    assert!(!left.exists(), "a dead writer's file is swept");
    assert!(alive.path.exists(), "a live writer's file is not");
}

#[tokio::test]
async fn a_failed_write_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let dir = Dir::open(root.path()).await.unwrap();
    let full = |_: &mut File| Err(io::ErrorKind::StorageFull.into());
    let error = dir.inner.write("a/b", Replace::No, full).unwrap_err();
    assert_eq!(error.kind(), ebb_types::ErrorKind::Unavailable);
    assert_eq!(fs::read_dir(root.path().join(STAGING)).unwrap().count(), 0);
    assert_eq!(dir.list("", None).await.unwrap(), []);
}

#[tokio::test]
async fn a_bucket_is_found_again_and_other_directories_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let bucket = root.path().join("deep/bucket");
    Dir::open(&bucket).await.unwrap().put("a", Bytes::from_static(b"1")).await.unwrap();
    assert_eq!(Dir::open(&bucket).await.unwrap().get("a").await.unwrap(), "1");

    let error = Dir::open(root.path()).await.unwrap_err();
    assert!(error.to_string().contains("is not a bucket"), "{error}");

    fs::write(bucket.join(MARKER), "ebb-bucket 99\n").unwrap();
    let error = Dir::open(&bucket).await.unwrap_err();
    assert!(error.to_string().ends_with("has format version 99; this build knows 1"), "{error}");

    fs::write(bucket.join(MARKER), "").unwrap();
    assert!(matches!(Dir::open(&bucket).await, Err(Error::Corrupt { .. })));
}

#[tokio::test]
async fn a_bucket_that_vanished_is_not_an_empty_bucket() {
    let root = tempfile::tempdir().unwrap();
    let bucket = root.path().join("bucket");
    let dir = Dir::open(&bucket).await.unwrap();
    dir.put("a", Bytes::from_static(b"1")).await.unwrap();
    fs::rename(&bucket, root.path().join("elsewhere")).unwrap();
    fs::create_dir(&bucket).unwrap();

    let gone = |error: Error| assert!(matches!(error, Error::Bucket { .. }), "{error}");
    gone(dir.get("a").await.unwrap_err());
    gone(dir.head("a").await.unwrap_err());
    gone(dir.list("", None).await.unwrap_err());
    gone(dir.put("a", Bytes::new()).await.unwrap_err());
}

#[tokio::test]
async fn a_file_in_the_way_is_a_clear_error() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(Dir::open(&file).await, Err(Error::Local { .. })));
    assert!(matches!(Dir::open(&file.join("below")).await, Err(Error::Local { .. })));
}

#[tokio::test]
async fn an_object_cannot_be_above_another() {
    let root = tempfile::tempdir().unwrap();
    let dir = Dir::open(root.path()).await.unwrap();
    dir.put("a/b", Bytes::new()).await.unwrap();
    let refused = |error: Error| assert!(matches!(error, Error::Invalid(_)), "{error}");
    refused(dir.put("a", Bytes::new()).await.unwrap_err());
    refused(dir.put_if_absent("a", Bytes::new()).await.unwrap_err());
    refused(dir.put("a/b/c", Bytes::new()).await.unwrap_err());
    assert!(matches!(dir.get("a").await, Err(Error::NoSuchObject { .. })));
    assert!(matches!(dir.get("a/b/c").await, Err(Error::NoSuchObject { .. })));
    assert_eq!(dir.head("a").await.unwrap(), None);
}

#[tokio::test]
async fn objects_are_private() {
    let root = tempfile::tempdir().unwrap();
    let dir = Dir::open(&root.path().join("bucket")).await.unwrap();
    dir.put("a/b", Bytes::new()).await.unwrap();
    let mode = |path: &str| fs::metadata(root.path().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("bucket"), mode("bucket/a"), mode("bucket/a/b")), (0o700, 0o700, 0o600));
}
