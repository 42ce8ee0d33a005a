//! Units that ship their WAL.

use std::path::Path;
use std::time::{Duration, Instant};

use ebb_compute::Error;
use ebb_compute::control::{Durability, Shipping};
use ebb_compute::manager::{ArchiveSpec, Unit, UnitSpec};
use ebb_storage::archive::{Archive, Owner, Range};
use ebb_storage::object_store::{BucketAt, S3Options};
use ebb_types::{LayerId, Lsn};
use tokio::time::{sleep, timeout};

use super::node::{DEADLINE, Node, kill};

/// Lets a branch's WAL be shipped to the node's bucket.
async fn archived(node: &Node, spec: &mut UnitSpec) -> Archive {
    let path = node.bucket_dir();
    let at = BucketAt::new(path.to_str().unwrap(), &S3Options::default()).unwrap();
    spec.archive = Some(ArchiveSpec { bucket: at, branch: spec.branch, line: 3, epoch: 0 });
    let bucket = ebb_storage::object_store::open(path.to_str().unwrap()).await.unwrap();
    Archive::new(bucket, spec.branch, 3)
}

async fn shipping(unit: &Unit) -> Option<Shipping> {
    unit.status().await.unwrap().shipping
}

async fn until(what: &str, unit: &Unit, condition: impl Fn(&Shipping) -> bool) -> Shipping {
    let begun = Instant::now();
    loop {
        let found = shipping(unit).await;
        if let Some(found) = found.as_ref().filter(|found| condition(found)) {
            return found.clone();
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}: {found:?}");
        sleep(Duration::from_millis(10)).await;
    }
}

async fn wal_end(node: &Node, unit: &Unit) -> Lsn {
    node.sql(unit, "SELECT pg_current_wal_flush_lsn()").await.parse().unwrap()
}

async fn one_range(archive: &Archive) -> Range {
    let mut ranges = archive.ranges().await.unwrap();
    assert_eq!(ranges.len(), 1, "{ranges:?}");
    ranges.remove(0)
}

/// Without the first a directory is no bucket, without the second nothing can be put.
const PARTS: [&str; 2] = ["ebb-bucket", ".staging"];

/// The bucket takes and tells nothing new from now on: its disk is not mounted, so to speak.
fn take_away(node: &Node) {
    for name in PARTS {
        std::fs::rename(node.bucket_dir().join(name), node.dir().join(name)).unwrap();
    }
}

fn bring_back(node: &Node) {
    for name in PARTS {
        std::fs::rename(node.dir().join(name), node.bucket_dir().join(name)).unwrap();
    }
}

pub async fn wal_is_shipped_from_wake_to_wake_without_a_gap() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    let archive = archived(&node, &mut spec).await;
    let template = node.store.manifest(node.template).await.unwrap().image;
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    until("the stream", &unit, |found| found.streaming).await;
    let layer = node.stop(unit).await;
    let image = node.store.manifest(layer).await.unwrap().image;
    let range = one_range(&archive).await;
    assert!(range.start <= template.redo && range.end > image.redo, "{range:?}: {template:?} to {image:?}");
    assert!(
        range.start.0 + 2 * 8192 > template.redo.0,
        "more than the page in which the template's WAL ends: {range:?}"
    );

    let mut unit = node.start(&spec).await;
    for round in 1..=3 {
        node.sql(&unit, &format!("INSERT INTO t SELECT {round} FROM generate_series(1, 1000)")).await;
        let end = wal_end(&node, &unit).await;
        let found = until("the bucket to have it", &unit, |found| found.shipped >= Some(end)).await;
        assert!(found.streaming && found.gaps == 0 && found.spans > 0 && found.error.is_none(), "{found:?}");
        // Some more that nobody waits for, and a kill in the middle of it.
        node.sql(&unit, "INSERT INTO t SELECT 0 FROM generate_series(1, 3000)").await;
        if round == 2 {
            let restarts = unit.status().await.unwrap().restarts;
            kill(unit.status().await.unwrap().postmaster_pid.unwrap());
            node.until_restarted(&unit, restarts + 1).await;
        } else {
            kill(node.unit_pid(&spec));
            unit.gone().await;
            unit = node.start(&spec).await;
        }
    }
    until("the stream", &unit, |found| found.streaming).await;
    let layer = node.stop(unit).await;
    let image = node.store.manifest(layer).await.unwrap().image;
    let range = one_range(&archive).await;
    assert!(range.end > image.redo, "{range:?} to {image:?}");
    check_joins(&node, &archive, node.template, range.end).await;
}

pub async fn a_forks_wal_has_an_archive_of_its_own() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    archived(&node, &mut spec).await;
    let source = node.start(&spec).await;
    node.sql(&source, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n").await;
    until("the stream", &source, |found| found.streaming).await;
    let layer = LayerId::generate();
    source.seal(layer).await.unwrap();
    source.finish_seals().await.unwrap();
    let image = node.store.manifest(layer).await.unwrap().image;

    let mut fork_spec = node.fork(layer);
    let archive = archived(&node, &mut fork_spec).await;
    let fork = node.start(&fork_spec).await;
    node.sql(&fork, "INSERT INTO t VALUES (0)").await;
    let end = wal_end(&node, &fork).await;
    until("the bucket to have it", &fork, |found| found.shipped >= Some(end) && found.gaps == 0).await;
    let range = one_range(&archive).await;
    assert!(range.start > image.redo.segment_start(image.wal_segment_bytes.into()), "{range:?}: {image:?}");
    check_joins(&node, &archive, layer, range.end).await;
    node.stop(fork).await;
    node.stop(source).await;
}

pub async fn durability_is_changed_while_clients_work() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    archived(&node, &mut spec).await;
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    unit.set_durability(Durability::Bucket).await.unwrap();
    for n in 0..20 {
        node.sql(&unit, &format!("INSERT INTO t VALUES ({n})")).await;
        let end = wal_end(&node, &unit).await;
        let found = shipping(&unit).await.unwrap();
        assert!(found.shipped >= Some(end) && found.durability == Durability::Bucket, "{found:?}, not {end}");
    }
    take_away(&node);
    let mut waiting = Box::pin(node.sql(&unit, "INSERT INTO t VALUES (100)"));
    tokio::select! {
        _ = &mut waiting => panic!("a commit was acknowledged that the bucket does not have"),
        found = until("the reason", &unit, |found| found.error.is_some()) => {
            assert!(found.behind_bytes > Some(0), "{found:?}");
        }
    }
    assert!(timeout(Duration::from_millis(500), &mut waiting).await.is_err());
    node.sql(&unit, "SET synchronous_commit = local; INSERT INTO t VALUES (101)").await;
    // Whoever runs the branch may decide that it has waited long enough.
    unit.set_durability(Durability::Local).await.unwrap();
    timeout(DEADLINE, waiting).await.expect("it waits no more");
    node.sql(&unit, "INSERT INTO t VALUES (102)").await;
    bring_back(&node);
    unit.set_durability(Durability::Bucket).await.unwrap();
    node.sql(&unit, "INSERT INTO t VALUES (103)").await;
    let end = wal_end(&node, &unit).await;
    assert!(shipping(&unit).await.unwrap().shipped >= Some(end));
    node.stop(unit).await;

    spec.archive = None;
    let unit = node.start(&spec).await;
    assert_eq!(node.sql(&unit, "SELECT count(*) FROM t").await, "24");
    assert!(matches!(unit.set_durability(Durability::Bucket).await, Err(Error::Refused(_))));
    node.stop(unit).await;
    spec.durability = Durability::Bucket;
    assert!(Unit::start(&node.exe, &spec).await.unwrap_err().to_string().contains("needs an archive"));
}

pub async fn a_unit_that_is_overtaken_stops_postgres_and_seals_nothing() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    spec.durability = Durability::Bucket;
    let archive = archived(&node, &mut spec).await;
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    archive.claim(Owner::new(1)).await.unwrap();
    let processes = node.processes(&spec);
    // Its end is all that a client hears of this commit.
    let outcome = timeout(DEADLINE, node.try_sql(&unit, "INSERT INTO t VALUES (1)")).await.expect("it ends");
    assert!(outcome.is_err(), "a commit was acknowledged by a unit that was overtaken");
    timeout(DEADLINE, unit.gone()).await.expect("the unit goes");
    node.until_dead(&processes).await;
    let reason = std::fs::read_to_string(spec.branch_dir.join("unit.err")).unwrap();
    assert!(reason.contains("another writer has taken over"), "{reason}");
    assert_eq!(std::fs::read_dir(node.layers()).unwrap().count(), 1, "only the template's");
}

pub async fn a_stop_does_not_wait_for_a_bucket_that_is_away() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    let archive = archived(&node, &mut spec).await;
    let unit = node.start(&spec).await;
    until("the stream", &unit, |found| found.streaming).await;
    take_away(&node);
    node.sql(&unit, "CREATE TABLE t AS SELECT generate_series(1, 10) AS n").await;
    until("a failure", &unit, |found| found.error.is_some()).await;
    let begun = Instant::now();
    let layer = unit.stop(LayerId::generate()).await.unwrap().layer;
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(is_clean(&node.layers(), layer), "postgres was not shut down in order");
    bring_back(&node);
    let unit = node.start(&spec).await;
    let end = wal_end(&node, &unit).await;
    until("the bucket to have it", &unit, |found| found.shipped >= Some(end)).await;
    node.stop(unit).await;
    one_range(&archive).await;
}

/// Whether a layer's WAL and the archive's together have all that recovery from the layer's redo point reads.
async fn check_joins(node: &Node, archive: &Archive, layer: LayerId, to: Lsn) {
    let dir = tempfile::tempdir().unwrap();
    let of_layer = std::fs::read_dir(node.layers().join(layer.to_string()).join("wal")).unwrap();
    for file in of_layer.map(|entry| entry.unwrap().path()) {
        std::fs::hard_link(&file, dir.path().join(file.file_name().unwrap()))
            .or_else(|_| std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).map(drop))
            .unwrap();
    }
    let redo = node.store.manifest(layer).await.unwrap().image.redo;
    let fetched = archive.fetch(1, redo, to, dir.path()).await.unwrap();
    assert!(fetched.start <= redo && fetched.end == to, "{fetched:?}, from {redo}");
}

fn is_clean(layers: &Path, layer: LayerId) -> bool {
    let dir = layers.join(layer.to_string());
    let manifest = std::fs::read(dir.join("manifest")).unwrap();
    ebb_storage::layer::Manifest::decode("manifest", &manifest).unwrap().image.clean
}
