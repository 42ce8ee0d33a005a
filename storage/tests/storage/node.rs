//! A data directory of real Postgres through import, upload, fetch on another node, and export.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ebb_storage::Error;
use ebb_storage::layer::InodeKind;
use ebb_storage::node::NodeStore;
use ebb_storage::object_store::{self, Bucket};
use ebb_storage::pg_files::{WalSegment, read_image_info};
use ebb_types::{ErrorKind, LayerId};

use crate::postgres::Cluster;

/// A scratch directory that Postgres, which runs as another user, may enter.
fn scratch() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

async fn bucket_in(dir: &Path) -> Bucket {
    object_store::open(dir.join("bucket").to_str().unwrap()).await.unwrap()
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All paths below `dir` with what they hold, but for what an import leaves behind.
fn contents(dir: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    fn collect(root: &Path, dir: &Path, found: &mut Vec<(PathBuf, Option<Vec<u8>>)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(root).unwrap().to_owned();
            if relative.starts_with("pg_wal") || relative == Path::new("postmaster.opts") {
                continue;
            }
            if path.is_dir() {
                found.push((relative, None));
                collect(root, &path, found);
            } else {
                found.push((relative, Some(fs::read(&path).unwrap())));
            }
        }
    }
    let mut found = Vec::new();
    collect(dir, dir, &mut found);
    found.sort();
    found
}

/// Whether Postgres makes a file anew when it starts: such are not uploaded with their contents.
fn is_made_anew(path: &Path) -> bool {
    path.ends_with("pg_internal.init") || ["pg_notify", "pg_subtrans"].iter().any(|dir| path.starts_with(dir))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_survives_import_upload_fetch_and_export() {
    let dir = scratch();
    let cluster = Cluster::init(&dir.path().join("source"));
    {
        let server = cluster.start();
        server.sql("create table t as select i, repeat('x', i % 100) as text from generate_series(1, 50000) i");
        server.sql("create index on t (i)");
        server.sql("create database other");
        server.sql("select pg_switch_wal()");
        server.sql("insert into t select i, 'after' from generate_series(1, 1000) i");
    }
    let bucket = bucket_in(dir.path()).await;
    let here = NodeStore::new(&dir.path().join("here"), bucket.clone());
    let layer = here.import(&cluster.data_dir).await.unwrap();

    let uploaded = here.upload(layer).await.unwrap();
    assert!(uploaded.object_bytes * 2 < uploaded.raw_bytes, "{uploaded:?}");
    assert_eq!(here.upload(layer).await.unwrap(), uploaded, "a second upload finds the first");
    assert_eq!(names_in(&dir.path().join("here/layers")), [layer.to_string()], "nothing is left over");

    let there = NodeStore::new(&dir.path().join("there"), bucket);
    there.ensure_local(layer).await.unwrap();
    assert_eq!(there.manifest(layer).await.unwrap(), here.manifest(layer).await.unwrap());

    let exported = Cluster::at(&dir.path().join("exported"));
    there.export(layer, &exported.data_dir).await.unwrap();
    let (found, expected) = (contents(&exported.data_dir), contents(&cluster.data_dir));
    assert_eq!(found.len(), expected.len());
    for ((path, found), (expected_path, expected)) in found.iter().zip(&expected) {
        assert_eq!(path, expected_path);
        assert!(found == expected || is_made_anew(path), "{path:?}");
    }
    let mode = |path: &str| fs::metadata(exported.data_dir.join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode(""), mode("base"), mode("PG_VERSION")), (0o700, 0o700, 0o600));
    assert!(exported.data_dir.join("pg_wal").symlink_metadata().unwrap().is_dir(), "a plain directory");

    exported.give_to_postgres();
    exported.tool("pg_checksums", &["--check"]);
    {
        let server = exported.start();
        assert_eq!(server.sql("select count(*), sum(i) from t"), "51000|1250525500");
        assert_eq!(server.sql("select count(*) from t where i between 100 and 199"), "200");
        server.sql("insert into t select i, 'later' from generate_series(1, 1000) i");
    }
    exported.tool("pg_checksums", &["--check"]);
}

#[test]
fn the_control_file_is_read_as_pg_controldata_reads_it() {
    let dir = scratch();
    let cluster = Cluster::init(&dir.path().join("source"));
    let check = |clean: bool| {
        let told = cluster.tool("pg_controldata", &[]);
        let field = |name: &str| {
            let line =
                told.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {told}"));
            line.trim_start_matches([':', ' ']).to_owned()
        };
        let image = read_image_info(&cluster.data_dir).unwrap();
        assert_eq!(image.system_identifier.to_string(), field("Database system identifier"));
        assert_eq!(image.redo.to_string(), field("Latest checkpoint's REDO location"));
        assert_eq!(image.pg_timeline.to_string(), field("Latest checkpoint's TimeLineID"));
        assert_eq!(image.wal_segment_bytes.to_string(), field("Bytes per WAL segment"));
        assert_eq!((image.clean, image.pg_major), (clean, cluster.major()));
        let segment = WalSegment::holding(image.redo, image.pg_timeline, image.wal_segment_bytes);
        assert_eq!(segment.file_name(), field("Latest checkpoint's REDO WAL file"));
    };
    check(true);
    let mut server = cluster.start();
    server.sql("create table t as select generate_series(1, 100000) i");
    server.sql("checkpoint");
    check(false);
    server.kill();
    check(false);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_layer_is_sparse_and_leaves_out_what_a_start_makes_anew() {
    let dir = scratch();
    let cluster = Cluster::init(&dir.path().join("source"));
    cluster.put("base/1/pgsql_tmp1.0", b"sorting");
    cluster.put("base/pgsql_tmp/file", b"sorting");
    cluster.put("postmaster.opts", b"options");
    cluster.put("zeroes", &vec![0; 1 << 20]);
    let mut holey = vec![0; (1 << 20) + 100];
    holey[3 * 8192] = 1;
    holey[1 << 20] = 2;
    cluster.put("holey", &holey);

    let node = NodeStore::new(&dir.path().join("node"), bucket_in(dir.path()).await);
    let layer = node.import(&cluster.data_dir).await.unwrap();
    let manifest = node.manifest(layer).await.unwrap();
    assert!(manifest.image.clean && manifest.image.pg_major == cluster.major());
    assert_eq!(manifest.chain, [layer]);

    let find = |name: &str| manifest.inodes.iter().find(|inode| inode.name == name.as_bytes());
    for absent in ["pgsql_tmp", "pgsql_tmp1.0", "postmaster.opts"] {
        assert_eq!(find(absent), None);
    }
    assert_eq!(find("pg_wal").unwrap().kind, InodeKind::Symlink { target: b"../wal".to_vec() });
    assert_eq!(find("zeroes").unwrap().kind, InodeKind::File { size: 1 << 20, runs: vec![] });
    let InodeKind::File { size, runs } = &find("holey").unwrap().kind else { panic!("a file") };
    let pages: Vec<_> = runs.iter().map(|run| (run.start, run.len)).collect();
    assert_eq!((*size, pages), ((1 << 20) + 100, vec![(3, 1), (128, 1)]));

    let layer_dir = node.layers_dir().join(layer.to_string());
    assert_eq!(names_in(&layer_dir), ["data", "manifest", "wal"]);
    assert_eq!(names_in(&layer_dir.join("wal")).len(), 1, "only the segment that a start needs");
    let wal = fs::read_dir(layer_dir.join("wal")).unwrap().next().unwrap().unwrap().metadata().unwrap();
    assert_eq!(wal.len(), u64::from(manifest.image.wal_segment_bytes));

    let exported = dir.path().join("exported");
    node.export(layer, &exported).await.unwrap();
    assert_eq!(fs::read(exported.join("holey")).unwrap(), holey);
    let zeroes = fs::metadata(exported.join("zeroes")).unwrap();
    assert_eq!((zeroes.len(), zeroes.blocks()), (1 << 20, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_imported_is_refused_with_the_reason() {
    let dir = scratch();
    let cluster = Cluster::init(&dir.path().join("source"));
    let node = NodeStore::new(&dir.path().join("node"), bucket_in(dir.path()).await);
    let refused = async |why: &str| {
        let error = node.import(&cluster.data_dir).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    {
        let mut server = cluster.start();
        refused("is in use").await;
        server.kill();
    }
    refused("was not shut down cleanly").await;
    drop(cluster.start());

    std::os::unix::fs::symlink("/elsewhere", cluster.data_dir.join("pg_tblspc/16384")).unwrap();
    refused("has tablespaces").await;
    fs::remove_file(cluster.data_dir.join("pg_tblspc/16384")).unwrap();

    let control = cluster.data_dir.join("global/pg_control");
    let good = fs::read(&control).unwrap();
    let mut bad = good.clone();
    bad[40] ^= 1;
    fs::write(&control, &bad).unwrap();
    assert_eq!(node.import(&cluster.data_dir).await.unwrap_err().kind(), ErrorKind::Corrupt);
    fs::write(&control, &good).unwrap();

    node.import(&cluster.data_dir).await.unwrap();
    fs::remove_file(cluster.data_dir.join("PG_VERSION")).unwrap();
    refused("is not a Postgres data directory").await;
    // What a refused import leaves is removed in the background.
    let begun = std::time::Instant::now();
    while names_in(node.layers_dir()).len() > 1 {
        assert!(begun.elapsed().as_secs() < 20, "a refused import left {:?}", names_in(node.layers_dir()));
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_goes_only_into_an_empty_place_and_a_failed_one_is_taken_back() {
    let dir = scratch();
    let cluster = Cluster::init(&dir.path().join("source"));
    let node = NodeStore::new(&dir.path().join("node"), bucket_in(dir.path()).await);
    let layer = node.import(&cluster.data_dir).await.unwrap();

    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "precious").unwrap();
    assert_eq!(node.export(layer, &full).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(node.export(layer, &full.join("mine")).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(fs::read(full.join("mine")).unwrap(), b"precious");

    // The last file to be written is missing from the layer.
    let manifest = node.manifest(layer).await.unwrap();
    let control = manifest.inodes.iter().find(|inode| inode.name == b"pg_control").unwrap().ino;
    fs::remove_file(node.layers_dir().join(format!("{layer}/data/{control}"))).unwrap();
    let (absent, empty) = (dir.path().join("absent"), dir.path().join("empty"));
    fs::create_dir(&empty).unwrap();
    node.export(layer, &absent).await.unwrap_err();
    node.export(layer, &empty).await.unwrap_err();
    assert!(!absent.exists());
    assert_eq!(names_in(&empty), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_askers_make_one_fetch() {
    let dir = scratch();
    let cluster = Cluster::init(&dir.path().join("source"));
    let bucket = bucket_in(dir.path()).await;
    let here = NodeStore::new(&dir.path().join("here"), bucket.clone());
    let layer = here.import(&cluster.data_dir).await.unwrap();
    here.upload(layer).await.unwrap();

    let there = NodeStore::new(&dir.path().join("there"), bucket.clone());
    let askers: Vec<_> = (0..100)
        .map(|_| {
            let there = there.clone();
            tokio::spawn(async move { there.ensure_local(layer).await })
        })
        .collect();
    for asker in askers {
        asker.await.unwrap().unwrap();
    }
    assert_eq!(names_in(there.layers_dir()), [layer.to_string()]);

    bucket.delete(&format!("layers/{layer}")).await.unwrap();
    there.ensure_local(layer).await.unwrap();
    there.remove_local(layer).await.unwrap();
    there.remove_local(layer).await.unwrap();
    assert_eq!(names_in(there.layers_dir()), [""; 0]);
    assert!(matches!(there.ensure_local(layer).await, Err(Error::NoSuchLayer(id)) if id == layer));
    assert!(matches!(there.upload(layer).await, Err(Error::NoSuchLayer(id)) if id == layer));
}

#[tokio::test]
async fn leftovers_of_a_killed_process_are_removed_and_nothing_else() {
    let dir = scratch();
    let node = NodeStore::new(&dir.path().join("node"), bucket_in(dir.path()).await);
    node.remove_leftovers().await.unwrap();
    let id = LayerId::for_test(1);
    for name in [format!(".fetch-{id}-1/data"), format!(".remove-{id}-2"), id.to_string(), ".other".to_owned()] {
        fs::create_dir_all(node.layers_dir().join(name)).unwrap();
    }
    fs::write(node.layers_dir().join(format!(".pack-{id}-3")), "half").unwrap();
    node.remove_leftovers().await.unwrap();
    assert_eq!(names_in(node.layers_dir()), [".other".to_owned(), id.to_string()]);
}
