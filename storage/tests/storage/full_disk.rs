//! A disk that is full: clear errors, nothing half done, and work goes on once there is room. Needs root, for a small
//! file system of its own.

use std::error::Error as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use ebb_storage::node::NodeStore;
use ebb_storage::object_store::{self, Put};
use ebb_types::ErrorKind;

use crate::postgres::Cluster;

/// A file system of one MiB, unmounted when dropped.
struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    /// `None` where this process may not mount.
    fn mount() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not checked: only root can mount a small disk");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "ebb-test"]).arg(dir.path()).status();
        assert!(mounted.unwrap().success());
        Some(Self { dir })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(self.dir.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{:?} is left mounted", self.dir);
    }
}

fn is_full(error: ebb_storage::Error) {
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let source = error.source().unwrap().to_string();
    assert!(source.contains("No space left"), "{error}: {source}");
}

#[tokio::test]
async fn a_full_bucket_refuses_and_recovers() {
    let Some(disk) = SmallDisk::mount() else { return };
    let bucket = object_store::open(disk.path().to_str().unwrap()).await.unwrap();
    bucket.put("a", vec![1; 600_000].into()).await.unwrap();
    is_full(bucket.put("b", vec![2; 600_000].into()).await.unwrap_err());
    is_full(bucket.put("a", vec![2; 600_000].into()).await.unwrap_err());
    is_full(bucket.put_if_absent("b", vec![2; 600_000].into()).await.unwrap_err());
    assert_eq!(bucket.get("a").await.unwrap(), vec![1; 600_000], "what was there is there");
    assert_eq!(bucket.list("", None).await.unwrap().len(), 1);
    assert_eq!(bucket.put_if_absent("b", Bytes::from_static(b"small")).await.unwrap(), Put::Created);
}

#[tokio::test]
async fn a_full_node_leaves_nothing_half_done() {
    let Some(disk) = SmallDisk::mount() else { return };
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let cluster = Cluster::init(&dir.path().join("source"));
    let bucket = object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
    let roomy = NodeStore::new(&dir.path().join("roomy"), bucket.clone());
    let layer = roomy.import(&cluster.data_dir).await.unwrap();
    roomy.upload(layer).await.unwrap();

    let full = NodeStore::new(disk.path(), bucket);
    is_full(full.import(&cluster.data_dir).await.unwrap_err());
    is_full(full.ensure_local(layer).await.unwrap_err());
    let export = disk.path().join("export");
    is_full(roomy.export(layer, &export).await.unwrap_err());
    assert!(!export.exists());
    full.remove_leftovers().await.unwrap();
    assert_eq!(fs::read_dir(full.layers_dir()).unwrap().count(), 0);
}
