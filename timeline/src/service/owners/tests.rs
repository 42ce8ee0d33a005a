//! Nodes on one bucket, each a machine in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use ebb_storage::object_store::Bucket;
use ebb_storage::object_store::faulty::{Faults, Faulty};
use ebb_types::{BranchId, Clock, ErrorKind, TestClock};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::ServiceConfig;
use crate::api::types as api;
use crate::service::fake::Rig;

/// Long enough for what a test does between two renewals on a busy machine.
const TTL: Duration = Duration::from_millis(2000);

fn caller() -> Caller {
    Caller { actor: "test".to_owned(), key: None }
}

/// Another machine on the same bucket.
async fn beside(rig: &Rig) -> Rig {
    let other = Rig::new().await;
    other.node.0.lock().bucket = Some(rig.bucket.clone());
    Rig { bucket: rig.bucket.clone(), ..other }
}

async fn open(rig: &Rig, name: &str) -> Arc<Service> {
    open_on(rig, name, rig.bucket.clone()).await
}

async fn open_on(rig: &Rig, name: &str, bucket: Bucket) -> Arc<Service> {
    open_by(rig, name, bucket, Arc::new(ebb_types::SystemClock)).await
}

async fn open_by(rig: &Rig, name: &str, bucket: Bucket, clock: Arc<dyn Clock>) -> Arc<Service> {
    let config = ServiceConfig { node_name: name.to_owned(), node_ttl: TTL, ..rig.config() };
    let (clients, node) = (rig.clients.clone(), Arc::new(rig.node.clone()));
    Service::open_on(config, bucket, clients, node, clock).await.unwrap()
}

async fn create(service: &Arc<Service>) -> BranchId {
    let request = api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
    service.create_project(&caller(), request).await.unwrap();
    service.branch("shop", "prod").await.unwrap().id
}

async fn write(rig: &Rig, service: &Arc<Service>, branch: BranchId, row: &str) {
    service.wake(branch).await.unwrap();
    rig.node.write(branch, row);
}

/// A branch with a row that is in the bucket.
async fn create_with(rig: &Rig, service: &Arc<Service>, row: &str) -> BranchId {
    let branch = create(service).await;
    write(rig, service, branch, row).await;
    checkpoint(service, "c").await.unwrap();
    service.upload_pending().await.unwrap();
    branch
}

async fn rows(rig: &Rig, service: &Arc<Service>, branch: BranchId) -> Vec<String> {
    service.wake(branch).await.unwrap();
    rig.node.rows(branch).into_iter().collect()
}

async fn checkpoint(service: &Arc<Service>, name: &str) -> Result<()> {
    let request = api::CreateCheckpoint { name: name.parse().unwrap() };
    service.create_checkpoint(&caller(), "shop", "prod", request).await.map(drop)
}

/// Waits until a node, which renews its own record and looks at the others', has seen the owner's expire.
async fn until_gone(service: &Arc<Service>, branch: BranchId) {
    while service.place(branch).await.unwrap() != Place::Nowhere {
        service.nodes.renew().await.unwrap();
        service.nodes.look().await.unwrap();
        tokio::time::sleep(TTL / 20).await;
    }
}

fn owner(service: &Arc<Service>) -> Owner {
    service.project("shop").unwrap().ledger.state().owner.unwrap()
}

#[tokio::test]
async fn a_node_that_is_gone_is_taken_over_and_can_do_nothing_when_it_comes_back() {
    let rig = Rig::new().await;
    let old = open(&rig, "old").await;
    let prod = create_with(&rig, &old, "kept").await;
    rig.node.write(prod, "of the old node alone");

    let other = beside(&rig).await;
    let new = open(&other, "new").await;
    assert!(matches!(new.place(prod).await.unwrap(), Place::There(record) if record.name == "old"));
    let refused = checkpoint(&new, "d").await.unwrap_err();
    assert!(refused.is_elsewhere() && refused.kind() == ErrorKind::Fenced, "{refused:?}");
    assert!(new.wake(prod).await.unwrap_err().is_elsewhere());
    assert_eq!(other.node.0.lock().starts, 0);

    until_gone(&new, prod).await;
    assert_eq!(rows(&other, &new, prod).await, ["kept"]);
    assert_eq!(owner(&new), Owner { node: new.node_id(), epoch: 2, entry: owner(&new).entry });
    new.nodes.renew().await.unwrap();

    // The old one was only cut off. It notices at the next thing it tries, and whatever it has ends.
    assert!(checkpoint(&old, "e").await.unwrap_err().is_elsewhere());
    old.nodes.renew().await.unwrap();
    assert!(old.wake(prod).await.unwrap_err().is_elsewhere());
    while rig.node.is_running(prod) || !rig.clients.lost.lock().unwrap().iter().any(|(branch, _)| *branch == prod) {
        // By the wake's refusal; what it refreshes anyway while something is awake would find it, too.
        old.keep_awake_projects().await;
        tokio::task::yield_now().await;
    }
    assert!(matches!(old.place(prod).await.unwrap(), Place::There(record) if record.name == "new"));
    // What was never in the bucket is of a history that is not the branch's.
    old.nodes.renew().await.unwrap();
    new.nodes.renew().await.unwrap();
    new.nodes.look().await.unwrap();
    new.move_project(&caller(), "shop", "old").await.unwrap();
    old.nodes.renew().await.unwrap();
    assert_eq!(rows(&rig, &old, prod).await, ["kept"]);
}

#[tokio::test]
async fn whose_wal_may_be_archived_is_told_by_entries_and_not_by_clocks() {
    let rig = Rig::new().await;
    let old = open(&rig, "old").await;
    let prod = create(&old).await;
    write(&rig, &old, prod, "kept").await;
    assert!(rig.node.0.lock().begun_here, "nobody else can have been awake on a project that was made just now");
    checkpoint(&old, "c").await.unwrap();
    old.upload_pending().await.unwrap();
    rig.kill(old).await;

    // In 1970, everything in the ledger is younger than this service.
    let other = beside(&rig).await;
    let new = open_by(&other, "new", other.bucket.clone(), Arc::new(TestClock::default())).await;
    until_gone(&new, prod).await;
    assert_eq!(rows(&other, &new, prod).await, ["kept"]);
    assert!(!other.node.0.lock().begun_here, "the node before may have archived WAL");
}

#[tokio::test]
async fn of_many_that_take_over_at_once_one_does() {
    let rig = Rig::new().await;
    let old = open(&rig, "old").await;
    let prod = create(&old).await;
    rig.kill(old).await;
    let mut others = Vec::new();
    for n in 0..5 {
        let other = beside(&rig).await;
        let service = open(&other, &format!("n{n}")).await;
        others.push((other, service));
    }
    futures::future::join_all(others.iter().map(|(_, service)| until_gone(service, prod))).await;
    let wakes = others.iter().map(|(_, service)| service.wake(prod));
    let outcomes = futures::future::join_all(wakes).await;
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1, "{lost:?}");
    assert!(lost.into_iter().all(|error| error.unwrap_err().is_elsewhere()));
    let starts: u64 = others.iter().map(|(other, _)| other.node.0.lock().starts).sum();
    assert_eq!(starts, 1);
}

#[tokio::test]
async fn what_a_dead_node_had_begun_is_finished_by_another() {
    let rig = Rig::new().await;
    let old = open(&rig, "old").await;
    let prod = create_with(&rig, &old, "a").await;
    // Its plan is recorded, and its process killed.
    let project = old.project("shop").unwrap();
    let fresh = old.fresh();
    let ask = crate::decide::Ask::CreateCheckpoint {
        branch: "prod".to_owned(),
        name: "d".parse().unwrap(),
        automatic: false,
    };
    let command = crate::decide::Command::Begin { ask, fresh, key: None };
    let begun = |state: &ProjectState| Ok((crate::decide::decide(state, &command)?, ()));
    project.append("test", Some(OperationId::generate()), begun).await.unwrap();
    rig.kill(old).await;

    let other = beside(&rig).await;
    let new = open(&other, "new").await;
    new.take_over_unfinished().await;
    assert_eq!(owner(&new).epoch, 1, "it is not known to be dead yet");
    until_gone(&new, prod).await;
    new.take_over_unfinished().await;
    assert_eq!(owner(&new).node, new.node_id());
    new.recover().await;
    assert!(new.project("shop").unwrap().ledger.state().operations.is_empty());
}

#[tokio::test]
async fn a_project_is_handed_over_and_back_with_all_that_it_has() {
    let rig = Rig::new().await;
    let (one, other) = (open(&rig, "one").await, beside(&rig).await);
    let prod = create(&one).await;
    let two = open(&other, "two").await;
    one.nodes.look().await.unwrap();
    let mut expect = Vec::new();
    for round in 0..3 {
        for (at, from, to, node) in [(&rig, &one, &two, "two"), (&other, &two, &one, "one")] {
            for service in [&one, &two] {
                service.nodes.renew().await.unwrap();
            }
            for service in [&one, &two] {
                service.nodes.look().await.unwrap();
            }
            let row = format!("{round} on its way to {node}");
            write(at, from, prod, &row).await;
            expect.push(row);
            let generation = from.wake(prod).await.unwrap().generation;
            assert_eq!(from.move_project(&caller(), "shop", node).await.unwrap(), to.node_id());
            assert!(!at.node.is_running(prod) && at.clients.fenced.lock().unwrap().is_empty());
            assert!(matches!(from.place(prod).await.unwrap(), Place::There(record) if record.name == node));
            let there = if node == "two" { &other } else { &rig };
            let mut sorted = expect.clone();
            sorted.sort();
            assert_eq!(rows(there, to, prod).await, sorted);
            assert!(to.wake(prod).await.unwrap().generation > generation, "later owners' computes count as later");
        }
    }
    assert_eq!(owner(&one).epoch, 7);
    let unknown = one.move_project(&caller(), "shop", "tow").await.unwrap_err();
    assert_eq!(
        (unknown.kind(), ebb_types::Hint::hint(&unknown).as_deref()),
        (ErrorKind::NotFound, Some("Did you mean two?"))
    );
    assert_eq!(one.project("shop").unwrap().ledger.verify().await.unwrap().fault, None);
}

/// Other nodes that all promise, or do not; and who was warned of whom.
#[derive(Debug, Default)]
struct Says(AtomicBool, std::sync::Mutex<Vec<(NodeId, NodeId)>>);

#[async_trait]
impl Others for Says {
    async fn hold(&self, nodes: &[Record], _: Duration) -> bool {
        assert!(!nodes.is_empty());
        self.0.load(Ordering::SeqCst)
    }

    async fn warn(&self, node: &Record, of: &Record) {
        self.1.lock().unwrap().push((node.node, of.node));
    }
}

#[tokio::test]
async fn a_node_that_is_cut_off_stops_everything_unless_it_is_alone() {
    let rig = Rig::new().await;
    let faulty = Arc::new(Faulty::new(rig.bucket.clone(), Faults::default()));
    let service = open_on(&rig, "cut off", faulty.clone()).await;
    let prod = create(&service).await;
    let stop = CancellationToken::new();
    let run = tokio::spawn({
        let (service, stop) = (service.clone(), stop.clone());
        async move { service.run(stop).await }
    });
    write(&rig, &service, prod, "a").await;
    faulty.cut_off(true);
    while service.nodes.term().is_some() {
        tokio::time::sleep(TTL / 20).await;
    }
    tokio::time::sleep(TTL).await;
    service.wake(prod).await.unwrap();
    write(&rig, &service, prod, "alone").await;
    faulty.cut_off(false);

    let other = beside(&rig).await;
    let peer = open(&other, "peer").await;
    while !service.nodes.has_peers() || service.nodes.term().is_none() {
        peer.nodes.renew().await.unwrap();
        tokio::time::sleep(TTL / 20).await;
    }
    let says = Arc::new(Says::default());
    service.set_others(says.clone());
    // The bucket is away for all.
    says.0.store(true, Ordering::SeqCst);
    faulty.cut_off(true);
    while service.nodes.term().is_some() {
        tokio::time::sleep(TTL / 20).await;
    }
    tokio::time::sleep(TTL).await;
    write(&rig, &service, prod, "away for all").await;
    // The other can reach it again.
    says.0.store(false, Ordering::SeqCst);
    while rig.node.is_running(prod) {
        tokio::time::sleep(TTL / 20).await;
    }
    assert!(matches!(service.wake(prod).await, Err(Error::Shared(error)) if matches!(*error, Error::Isolated)));
    // Nobody took over meanwhile: it goes on with what it has.
    faulty.cut_off(false);
    while service.nodes.term().is_none() {
        tokio::time::sleep(TTL / 20).await;
    }
    assert_eq!(rows(&rig, &service, prod).await, ["a", "alone", "away for all"]);
    stop.cancel();
    run.await.unwrap();
}

#[tokio::test]
async fn what_another_node_makes_and_deletes_is_seen() {
    let rig = Rig::new().await;
    let (one, other) = (open(&rig, "one").await, beside(&rig).await);
    let two = open(&other, "two").await;
    let stop = CancellationToken::new();
    let run = tokio::spawn({
        let (two, stop) = (two.clone(), stop.clone());
        async move { two.run(stop).await }
    });
    let prod = create(&one).await;
    let endpoint = "prod--shop".parse().unwrap();
    let found = loop {
        one.nodes.renew().await.unwrap();
        match two.find(&endpoint).await {
            Ok(found) => break found,
            Err(_) => tokio::time::sleep(TTL / 20).await,
        }
    };
    assert_eq!(found.branch, prod);
    assert!(matches!(two.place(prod).await.unwrap(), Place::There(_)));
    one.delete_project(&caller(), "shop", Some("shop")).await.unwrap();
    while two.find(&endpoint).await.is_ok() {
        one.nodes.renew().await.unwrap();
        tokio::time::sleep(TTL / 20).await;
    }
    stop.cancel();
    run.await.unwrap();
}

#[tokio::test]
async fn who_takes_over_says_so_first() {
    let rig = Rig::new().await;
    let old = open(&rig, "old").await;
    let prod = create(&old).await;
    let other = beside(&rig).await;
    let new = open(&other, "new").await;
    let says = Arc::new(Says::default());
    new.set_others(says.clone());
    until_gone(&new, prod).await;
    assert!(says.1.lock().unwrap().is_empty());
    new.wake(prod).await.unwrap();
    assert_eq!(*says.1.lock().unwrap(), [(old.node_id(), new.node_id())]);
}

#[tokio::test]
async fn a_takeover_that_was_decided_before_the_owner_came_back_is_refused() {
    let rig = Rig::new().await;
    let old = open(&rig, "old").await;
    let prod = create_with(&rig, &old, "a").await;
    let other = beside(&rig).await;
    let new = open(&other, "new").await;
    until_gone(&new, prod).await;
    let project = new.project("shop").unwrap();
    let seen = project.ledger.refresh().await.unwrap().owner;

    // Its record had expired, and it comes back before the other one has written anything.
    old.nodes.renew().await.unwrap();
    old.nodes.look().await.unwrap();
    assert!(!old.may_answer());
    old.keep_awake_projects().await;
    assert!(old.may_answer() && rig.node.is_running(prod));
    let refused = new.take_over(&project, seen).await.unwrap_err();
    assert!(refused.is_elsewhere(), "{refused:?}");
    assert_eq!(owner(&old).epoch, 1, "its volumes stay what they are");
    assert_eq!(rows(&rig, &old, prod).await, ["a"]);
}

#[tokio::test]
async fn a_compute_that_started_while_its_project_was_lost_serves_nobody() {
    let rig = Rig::new().await;
    let old = open(&rig, "old").await;
    let prod = create_with(&rig, &old, "a").await;
    old.suspend_compute(&caller(), "shop", "prod").await.unwrap();
    old.upload_pending().await.unwrap();
    let other = beside(&rig).await;
    let new = open(&other, "new").await;

    let pauses = [Arc::new(tokio::sync::Notify::new()), Arc::new(tokio::sync::Notify::new())];
    rig.node.0.lock().start_pauses = Some(pauses.clone());
    let waking = tokio::spawn({
        let old = old.clone();
        async move { old.wake(prod).await }
    });
    pauses[0].notified().await;
    until_gone(&new, prod).await;
    assert_eq!(rows(&other, &new, prod).await, ["a"]);
    old.nodes.renew().await.unwrap();
    new.nodes.renew().await.unwrap();
    old.keep_awake_projects().await;
    pauses[1].notify_one();
    assert!(waking.await.unwrap().unwrap_err().is_elsewhere());
    assert!(!rig.node.is_running(prod));
}
