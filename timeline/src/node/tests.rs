//! Volumes and layers of a real cluster, without its processes.

use ebb_storage::object_store;
use ebb_storage::volume::MountOptions;
use ebb_types::ErrorKind;

use super::*;
use crate::test_postgres::initdb;

struct Machine {
    dir: tempfile::TempDir,
    node: LocalNode,
    base: LayerId,
}

impl Machine {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bucket = object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
        let data_dir = dir.path().join("node");
        fs::create_dir_all(&data_dir).unwrap();
        let node = LocalNode::new(data_dir, "/nonexistent".into(), bucket);
        let cluster = tempfile::tempdir().unwrap();
        let base = node.store.import(&initdb(cluster.path())).await.unwrap();
        Self { dir, node, base }
    }

    fn line(&self, line: u64) -> Line {
        Line { branch: BranchId::for_test(1), line, head: self.base, epoch: 1 }
    }
}

/// A start of a branch with this data.
fn start_of(data: &Line) -> Start {
    let (durability, verifier) = (Durability::Local, String::new());
    Start {
        data: data.clone(),
        pg_major: 15,
        head_end: None,
        earlier: Vec::new(),
        begun_here: false,
        fork: false,
        durability,
        verifier,
    }
}

#[tokio::test]
async fn a_volume_of_another_line_is_replaced() {
    let machine = Machine::new().await;
    let (node, first, second) = (&machine.node, machine.line(0), machine.line(1));
    assert_eq!(node.seal(&first, LayerId::generate()).await.unwrap(), None);
    node.ensure_volume(&start_of(&first)).await.unwrap();
    // Nothing was written: the layer below is all there is.
    let sealed = node.seal(&first, LayerId::generate()).await.unwrap();
    assert_eq!(sealed.map(|sealed| sealed.layer), Some(machine.base));
    let roles = node.branch_dir(first.branch).join("roles.json");
    fs::write(&roles, r#"{"app":"SCRAM-SHA-256$x","guest":null}"#).unwrap();
    let read = node.roles(&first).await.unwrap().unwrap();
    assert_eq!(read, Roles::from([("app".to_owned(), Some("SCRAM-SHA-256$x".to_owned())), ("guest".to_owned(), None)]));

    // The branch was moved: the volume and its roles are of the past.
    assert_eq!(node.seal(&second, LayerId::generate()).await.unwrap(), None);
    assert_eq!(node.roles(&second).await.unwrap(), None);
    node.ensure_volume(&start_of(&second)).await.unwrap();
    assert!(!roles.exists() && node.has_volume(&second).unwrap() && !node.has_volume(&first).unwrap());

    // Another node may have been awake since: what this one has is of the past, too.
    let later = Line { epoch: 3, ..second.clone() };
    assert!(!node.has_volume(&later).unwrap());
    node.ensure_volume(&start_of(&later)).await.unwrap();
    assert!(node.has_volume(&later).unwrap() && !node.has_volume(&second).unwrap());
    let second = later;

    node.remove_volume(first.branch).await.unwrap();
    assert!(!node.has_volume(&second).unwrap());
    node.ensure_volume(&start_of(&second)).await.unwrap();
    node.remove_branch(first.branch).await.unwrap();
    assert!(!node.branch_dir(first.branch).exists());
    node.remove_branch(first.branch).await.unwrap();
}

#[tokio::test]
async fn a_volume_that_lost_its_line_is_reported_and_kept() {
    let machine = Machine::new().await;
    let (node, data) = (&machine.node, machine.line(0));
    node.ensure_volume(&start_of(&data)).await.unwrap();
    fs::remove_file(node.line_file(data.branch)).unwrap();
    assert_eq!(node.ensure_volume(&start_of(&data)).await.unwrap_err().kind(), ErrorKind::Internal);
    assert!(Volume::exists(&node.dirs(data.branch)));
}

#[tokio::test]
async fn layers_are_uploaded_fetched_and_exported() {
    let machine = Machine::new().await;
    let (node, base) = (&machine.node, machine.base);
    assert_eq!(node.chain(base).await.unwrap(), [base]);
    assert_eq!(node.chain(LayerId::generate()).await.unwrap(), []);
    assert!(node.redo(base).await.is_some());
    node.upload(base).await.unwrap();
    node.store.remove_local(base).await.unwrap();
    assert!(node.redo(base).await.is_none());
    node.fetch(base).await.unwrap();
    let out = machine.dir.path().join("out");
    assert!(node.export(base, &out).await.unwrap() > 1 << 20);
    assert!(out.join("PG_VERSION").exists());
    let missing = node.fetch(LayerId::generate()).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn templates_are_told_only_when_none_is_being_made() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
    let node = LocalNode::new(dir.path().join("node"), "/nonexistent".into(), bucket.clone());
    let layer = LayerId::generate();
    // Its layer is in the bucket long before anything names it.
    let making = node.templates.lock().await;
    let mut told = std::pin::pin!(node.templates());
    assert!(futures::poll!(&mut told).is_pending());
    let template = Template { layer, version: "15.1".to_owned() };
    bucket.put("templates/15", serde_json::to_vec(&template).unwrap().into()).await.unwrap();
    drop(making);
    assert_eq!(told.await.unwrap(), [(15, layer)]);
    bucket.put("templates/16", "{".into()).await.unwrap();
    assert!(node.templates().await.is_err(), "one that cannot be read keeps who knows what");
}

#[tokio::test]
async fn what_a_node_has_of_volumes_and_layers_is_told() {
    let machine = Machine::new().await;
    let (node, line) = (&machine.node, machine.line(0));
    assert_eq!(node.volume_bases(line.branch).await.unwrap(), BTreeSet::new());
    node.ensure_volume(&start_of(&line)).await.unwrap();
    assert_eq!(node.local_branches().await.unwrap(), BTreeSet::from([line.branch]));
    assert_eq!(node.volume_bases(line.branch).await.unwrap(), BTreeSet::from([machine.base]));
    assert_eq!(node.whole_chain(machine.base).await.unwrap(), [machine.base]);
    assert_eq!(node.local_layers().await.unwrap(), BTreeSet::from([machine.base]));
    assert_eq!(node.unsealed_bytes(line.branch).await.unwrap(), 0);
    // From the bucket, once it is there and not here.
    node.upload(machine.base).await.unwrap();
    node.remove_layer(machine.base).await.unwrap();
    assert_eq!(node.local_layers().await.unwrap(), BTreeSet::new());
    assert_eq!(node.whole_chain(machine.base).await.unwrap(), [machine.base]);
    assert!(node.whole_chain(LayerId::generate()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_unit_had_begun_to_seal_is_finished_by_one_at_a_time() {
    let machine = Machine::new().await;
    let (node, data) = (&machine.node, machine.line(0));
    node.ensure_volume(&start_of(&data)).await.unwrap();
    for round in 0..20 {
        let (dirs, at, layer) = (node.dirs(data.branch), machine.dir.path().join("mnt"), LayerId::generate());
        let lost = move || {
            fs::create_dir_all(&at).unwrap();
            let volume = Volume::open(&dirs)?;
            let mount = volume.mount(&at, &MountOptions { uid: 0, gid: 0, allow_other: false, threads: 1 })?;
            fs::write(at.join("written"), round.to_string()).unwrap();
            mount.unmount()?;
            Ok(volume.begin_seal(layer)?)
        };
        assert!(blocking("being a unit", lost).await.unwrap().new);
        node.note_sealed(layer, data.branch);
        // Uploads want the layer, while somebody else wants the branch.
        let (settled, sealed) = tokio::join!(node.settle(layer), node.seal(&data, LayerId::generate()));
        settled.unwrap();
        assert_eq!(sealed.unwrap().map(|sealed| sealed.layer), Some(layer), "in round {round}");
    }
}
