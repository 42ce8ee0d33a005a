//! Collection over a machine in memory and a real directory bucket: what stays, what goes, and what a kill leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use ebb_storage::object_store::{Bucket, ObjectMeta, ObjectStore, Put};
use ebb_types::{BranchId, LayerId, TestClock};
use proptest::prelude::*;

use super::*;
use crate::api::types::Verdict;
use crate::node::Node as _;
use crate::service::fake::{FakeNode, Rig, Rows, TEMPLATE};

fn caller() -> Caller {
    Caller { actor: "test".to_owned(), key: None }
}

async fn create(service: &Arc<Service>, name: &str) {
    let request = api::CreateProject { name: name.parse().unwrap(), current: None, pg_major: None };
    service.create_project(&caller(), request).await.unwrap();
}

async fn branch_id(service: &Arc<Service>, name: &str) -> BranchId {
    service.branch("shop", name).await.unwrap().id
}

async fn write(rig: &Rig, service: &Arc<Service>, branch: &str, row: &str) {
    let id = branch_id(service, branch).await;
    service.wake(id).await.unwrap();
    rig.node.write(id, row);
}

async fn new_branch(service: &Arc<Service>, name: &str, from: &str) -> Result<()> {
    let request = api::CreateBranch { name: name.parse().unwrap(), from: Some(from.parse().unwrap()) };
    service.create_branch(&caller(), "shop", request).await.map(drop)
}

async fn checkpoint(service: &Arc<Service>, branch: &str, name: &str) -> Result<()> {
    let request = api::CreateCheckpoint { name: name.parse().unwrap() };
    service.create_checkpoint(&caller(), "shop", branch, request).await.map(drop)
}

async fn collect(service: &Arc<Service>) -> api::Collected {
    service.collect(&caller(), false).await.unwrap()
}

/// A clock that begins now: layers have their identifiers from the machine's.
fn clock() -> Arc<TestClock> {
    let clock = TestClock::default();
    let now = Timestamp::now().as_millisecond().unsigned_abs();
    clock.advance(Duration::from_millis(now));
    Arc::new(clock)
}

async fn keys(bucket: &Bucket, prefix: &str) -> BTreeSet<String> {
    bucket.list(prefix, None).await.unwrap().into_iter().map(|object| object.key).collect()
}

/// Every layer that anything keeps, with its chain, looked up in the bucket alone.
async fn reachable(service: &Service, bucket: &Bucket) -> BTreeSet<LayerId> {
    let mut layers = BTreeSet::from([TEMPLATE]);
    for project in service.all_projects() {
        for root in reach::roots(&project.ledger.state()) {
            let bytes = bucket.get(&format!("layers/{}", root.layer)).await;
            let bytes = bytes.unwrap_or_else(|error| panic!("{} is kept by {}: {error}", root.layer, root.keeper));
            let (chain, _): (Vec<LayerId>, Rows) = serde_json::from_slice(&bytes).unwrap();
            layers.extend(chain);
        }
    }
    layers
}

/// All that is kept is in the bucket.
async fn assert_whole(service: &Service, bucket: &Bucket) {
    let there = keys(bucket, "layers/").await;
    for layer in reachable(service, bucket).await {
        assert!(there.contains(&format!("layers/{layer}")), "{layer} is needed and gone");
    }
}

/// Nothing else is.
async fn assert_clean(service: &Service, bucket: &Bucket) {
    let kept: BTreeSet<String> =
        reachable(service, bucket).await.into_iter().map(|layer| format!("layers/{layer}")).collect();
    assert_eq!(keys(bucket, "layers/").await, kept);
}

#[tokio::test]
async fn what_nothing_needs_goes_after_its_grace_and_why_tells_at_every_moment() {
    let (rig, clock) = (Rig::new().await, clock());
    let grace = Duration::from_secs(3600);
    let service = rig.open_at(rig.bucket.clone(), grace, clock.clone()).await.unwrap();
    create(&service, "shop").await;
    write(&rig, &service, "prod", "1").await;
    checkpoint(&service, "prod", "one").await.unwrap();
    new_branch(&service, "pr-1", "shop/prod@one").await.unwrap();
    write(&rig, &service, "pr-1", "2").await;
    service.suspend_compute(&caller(), "shop", "pr-1").await.unwrap();
    service.upload_pending().await.unwrap();
    let head = service.branch("shop", "pr-1").await.unwrap().head;
    let below = service.checkpoints("shop", "prod").await.unwrap()[0].layer;
    clock.advance(Duration::from_secs(7200));
    assert_eq!(collect(&service).await.marked, []);

    let why = service.why(&head.to_string()).await.unwrap();
    assert_eq!((why.verdict, why.kept_by), (Verdict::Kept, vec!["head of shop/pr-1".to_owned()]));
    let why = service.why(&format!("layers/{below}")).await.unwrap();
    let through = format!("head of shop/pr-1, through layer {head}");
    let past = |keeper: &&String| keeper.starts_with("the past of shop/pr-1 that can be gone back to, as it was at ");
    assert_eq!(why.kept_by.iter().filter(past).count(), 1, "{:?}", why.kept_by);
    let others: Vec<&String> = why.kept_by.iter().filter(|keeper| !past(keeper)).collect();
    assert_eq!(others, ["head of shop/prod", "checkpoint one of shop/prod", &through]);
    let why = service.why("templates/15").await.unwrap();
    assert_eq!(why.verdict, Verdict::Unknown, "there is no such object on this rig");
    let why = service.why(&LayerId::for_test(99).to_string()).await.unwrap();
    assert_eq!((why.verdict, why.rule), (Verdict::Unknown, None));

    service.delete_branch(&caller(), "shop", "pr-1").await.unwrap();
    let why = service.why(&head.to_string()).await.unwrap();
    assert_eq!(why.verdict, Verdict::Unkept);
    let dry = service.collect(&caller(), true).await.unwrap();
    assert_eq!(dry.marked.len(), 1);
    assert_eq!(keys(&rig.bucket, "collect/").await.len(), 0, "a dry run leaves nothing");
    let round = collect(&service).await;
    assert_eq!((round.marked.len(), round.deleted.len(), round.waiting.len()), (1, 0, 1));
    assert_eq!(round.local_layers, 1, "the local copy is only cache: the bucket has it");
    assert!(round.marked[0].why.starts_with("let go by delete branch pr-1 (entry "), "{}", round.marked[0].why);
    let why = service.why(&head.to_string()).await.unwrap();
    assert_eq!((why.verdict, why.rule.as_deref()), (Verdict::Marked, Some(round.marked[0].why.as_str())));

    clock.advance(Duration::from_secs(3599));
    assert_eq!(collect(&service).await.deleted, []);
    clock.advance(Duration::from_secs(1));
    let due = service.collect(&caller(), true).await.unwrap();
    assert_eq!(due.deleted.len(), 1);
    assert_whole(&service, &rig.bucket).await;
    assert_eq!(collect(&service).await.deleted, due.deleted);
    let why = service.why(&head.to_string()).await.unwrap();
    assert_eq!((why.verdict, why.bytes, why.rule), (Verdict::Deleted, None, Some(due.deleted[0].why.clone())));
    assert_clean(&service, &rig.bucket).await;
    assert_eq!(collect(&service).await.deleted, []);
    let verdict = crate::ledger::read_chain::<CollectEvent>(&rig.bucket, COLLECT).await.unwrap();
    assert_eq!((verdict.fault, verdict.entries.len()), (None, 3), "marked, deleting, deleted");
}

#[tokio::test]
async fn young_objects_are_not_even_marked() {
    let (rig, clock) = (Rig::new().await, clock());
    let service = rig.open_at(rig.bucket.clone(), Duration::from_secs(86_400), clock.clone()).await.unwrap();
    create(&service, "shop").await;
    let fresh = LayerId::generate();
    rig.bucket.put(&format!("layers/{fresh}"), Bytes::from_static(b"[]")).await.unwrap();
    assert_eq!(collect(&service).await.marked, []);
    clock.advance(Duration::from_secs(3601));
    let marked = collect(&service).await.marked;
    assert_eq!(marked.len(), 1);
    assert_eq!(marked[0].why, "orphan: no ledger names it");
    assert_eq!(service.why(&fresh.to_string()).await.unwrap().verdict, Verdict::Marked);
}

#[tokio::test]
async fn what_no_rule_covers_is_left_alone() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service, "shop").await;
    let strange = ["layers/other", "wal/x", "notes", "artifacts/short", "secrets/x/owner", "templates/99"];
    for key in strange {
        let bytes = if key == "templates/99" { Bytes::from_static(b"{}") } else { Bytes::new() };
        rig.bucket.put(key, bytes).await.unwrap();
    }
    for _ in 0..2 {
        assert_eq!(collect(&service).await.deleted, []);
    }
    for key in strange {
        assert!(rig.bucket.head(key).await.unwrap().is_some(), "{key} is gone");
    }
    assert_eq!(service.why("wal/x").await.unwrap().verdict, Verdict::Kept);
    assert_eq!(service.why("../x").await.unwrap_err().kind(), ebb_types::ErrorKind::Invalid);
}

#[tokio::test]
async fn a_deleted_project_leaves_its_receipts_and_nothing_else() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service, "shop").await;
    write(&rig, &service, "prod", "1").await;
    let artifact = rig.artifact("a1", &["1.sql"]);
    let release = service.create_release(&caller(), "shop", api::CreateRelease { artifact }).await.unwrap().value;
    service.upload_pending().await.unwrap();
    let head = service.branch("shop", "prod").await.unwrap().head;
    let why = service.why(&release.artifact).await.unwrap();
    assert_eq!(why.kept_by, ["release v1 of shop"]);
    let project = service.project_info("shop").await.unwrap().id;
    let why = service.why(&format!("secrets/{project}/owner")).await.unwrap();
    assert_eq!(why.kept_by, ["project shop"]);
    assert_eq!(collect(&service).await.marked, []);
    assert_eq!(service.why(&head.to_string()).await.unwrap().verdict, Verdict::Kept);

    service.delete_project(&caller(), "shop", Some("shop")).await.unwrap();
    let round = collect(&service).await;
    assert!(round.deleted.iter().all(|gone| gone.why.contains("let go by delete project shop")), "{round:?}");
    assert_eq!(keys(&rig.bucket, "layers/").await, BTreeSet::from([format!("layers/{TEMPLATE}")]));
    assert_eq!(keys(&rig.bucket, "artifacts/").await.len(), 0);
    assert!(!service.artifacts.path(&release.artifact).exists(), "the local copy stayed");
    assert!(!keys(&rig.bucket, "projects/").await.is_empty());
    let why = service.why(&format!("projects/{project}/ledger/00000000000000000000")).await.unwrap();
    assert_eq!(why.kept_by, ["receipts of a project that is gone: they are never deleted"]);
    // A secret that outlived its project.
    let secret = format!("secrets/{project}/owner");
    rig.bucket.put(&secret, Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(collect(&service).await.deleted[0].object, secret);
    assert_eq!(service.why(&secret).await.unwrap().rule.as_deref(), Some("its project is gone"));
}

#[tokio::test]
async fn an_artifact_that_is_taken_in_again_is_spared() {
    let (rig, clock) = (Rig::new().await, clock());
    let service = rig.open_at(rig.bucket.clone(), Duration::from_secs(60), clock.clone()).await.unwrap();
    create(&service, "shop").await;
    let artifact = rig.artifact("a1", &[]);
    let taken = service.artifacts.take(&artifact).await.unwrap();
    let name = taken.name.clone();
    assert_eq!(collect(&service).await.marked.len(), 1, "no release names it yet");
    clock.advance(Duration::from_secs(61));
    assert_eq!(collect(&service).await.deleted, [], "it is in somebody's hands");
    drop(taken);
    service.create_release(&caller(), "shop", api::CreateRelease { artifact: artifact.clone() }).await.unwrap();
    let round = collect(&service).await;
    assert_eq!((round.spared, round.deleted), (vec![format!("artifacts/{name}")], vec![]));
    assert_eq!(service.why(&name).await.unwrap().verdict, Verdict::Kept);
    // One that is deleted is made again by the next deploy.
    let other = rig.artifact("a2", &[]);
    let gone = service.artifacts.take(&other).await.unwrap().name;
    collect(&service).await;
    clock.advance(Duration::from_secs(61));
    assert_eq!(collect(&service).await.deleted.len(), 1);
    service.create_release(&caller(), "shop", api::CreateRelease { artifact: other }).await.unwrap();
    assert!(rig.bucket.head(&format!("artifacts/{gone}")).await.unwrap().is_some());
    assert_eq!(rig.code().as_deref(), Some("a2"));
}

#[tokio::test]
async fn without_the_chain_of_every_root_nothing_goes() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service, "shop").await;
    write(&rig, &service, "prod", "1").await;
    checkpoint(&service, "prod", "one").await.unwrap();
    new_branch(&service, "pr-1", "shop/prod@one").await.unwrap();
    write(&rig, &service, "pr-1", "2").await;
    service.suspend_compute(&caller(), "shop", "pr-1").await.unwrap();
    service.upload_pending().await.unwrap();
    service.delete_branch(&caller(), "shop", "pr-1").await.unwrap();
    // The checkpoint's manifest can be read nowhere: who knows what it needs?
    let layer = service.checkpoints("shop", "prod").await.unwrap()[0].layer;
    let bytes = rig.bucket.get(&format!("layers/{layer}")).await.unwrap();
    rig.bucket.delete(&format!("layers/{layer}")).await.unwrap();
    let local = rig.node.0.lock().layers.remove(&layer).unwrap();
    service.collector.chains.lock().clear();
    let before = keys(&rig.bucket, "").await;
    assert!(service.collect(&caller(), false).await.is_err());
    assert_eq!(keys(&rig.bucket, "").await, before);
    rig.bucket.put(&format!("layers/{layer}"), bytes).await.unwrap();
    rig.node.0.lock().layers.insert(layer, local);
    assert_eq!(collect(&service).await.deleted.len(), 1);
}

#[tokio::test]
async fn branches_and_projects_are_told_what_they_store() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service, "shop").await;
    let size = |layer: LayerId| {
        let bucket = rig.bucket.clone();
        async move { bucket.head(&format!("layers/{layer}")).await.unwrap().map(|meta| meta.size) }
    };
    let template = size(TEMPLATE).await.unwrap();
    let stored = |name: &'static str| {
        let service = service.clone();
        async move { service.branch("shop", name).await.unwrap().stored.unwrap() }
    };
    assert_eq!(stored("prod").await, api::Stored { shared_bytes: template, ..api::Stored::default() });
    write(&rig, &service, "prod", "1").await;
    assert_eq!(stored("prod").await.unsealed_bytes, 1);
    checkpoint(&service, "prod", "one").await.unwrap();
    assert_eq!(stored("prod").await.waiting_layers, 1, "it is not uploaded yet");
    service.upload_pending().await.unwrap();
    let one = size(service.checkpoints("shop", "prod").await.unwrap()[0].layer).await.unwrap();
    let prod = stored("prod").await;
    assert_eq!((prod.own_bytes, prod.shared_bytes, prod.waiting_layers), (one, template, 0));
    // A branch of it shares; what it writes is its own.
    new_branch(&service, "pr-1", "shop/prod@one").await.unwrap();
    assert_eq!(stored("prod").await.own_bytes, 0);
    assert_eq!(stored("pr-1").await, api::Stored { shared_bytes: one + template, ..api::Stored::default() });
    write(&rig, &service, "pr-1", "2").await;
    service.suspend_compute(&caller(), "shop", "pr-1").await.unwrap();
    service.upload_pending().await.unwrap();
    let two = size(service.branch("shop", "pr-1").await.unwrap().head).await.unwrap();
    assert_eq!(stored("pr-1").await.own_bytes, two);
    let project = service.project_info("shop").await.unwrap();
    let whole = project.stored.unwrap();
    assert_eq!((whole.own_bytes, whole.shared_bytes), (one + two, template));
    assert!(project.branches.iter().all(|branch| branch.stored.is_some()));
}

#[tokio::test]
async fn a_deleted_branch_that_a_node_still_has_goes() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service, "shop").await;
    new_branch(&service, "pr-1", "shop/prod").await.unwrap();
    let id = branch_id(&service, "pr-1").await;
    service.delete_branch(&caller(), "shop", "pr-1").await.unwrap();
    let volume =
        |line| crate::service::fake::FakeVolume { line, base: TEMPLATE, rows: Rows::new(), dirty: true, running: None };
    let strange = BranchId::for_test(5);
    rig.node.0.lock().volumes.extend([(id, volume(0)), (strange, volume(0))]);
    // What it lies on stays, though no ledger knows that either, and the bucket has it.
    let under = LayerId::for_test(77);
    rig.node.0.lock().layers.insert(under, (vec![TEMPLATE, under], Rows::new()));
    rig.node.upload(under).await.unwrap();
    rig.node.0.lock().volumes.get_mut(&strange).unwrap().base = under;
    assert_eq!(collect(&service).await.local_branches, 1);
    let world = rig.node.0.lock();
    assert!(!world.volumes.contains_key(&id), "a ledger says that it was deleted");
    assert!(world.volumes.contains_key(&strange), "no ledger knows it: it may be another bucket's");
    assert!(world.layers.contains_key(&under), "a volume lies on it");
}

/// A bucket that dies at its n-th call: before the call has any effect, or after.
#[derive(Debug)]
struct Cut {
    inner: Bucket,
    left: AtomicI64,
    after: bool,
}

impl Cut {
    /// `Err`: dead already. `Ok(true)`: this call is the last.
    fn count(&self) -> ebb_storage::Result<bool> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            2.. => Ok(false),
            1 => Ok(true),
            _ => Err(killed()),
        }
    }

    async fn call<T: Send>(&self, call: impl Future<Output = ebb_storage::Result<T>> + Send) -> ebb_storage::Result<T> {
        match (self.count()?, self.after) {
            (false, _) => call.await,
            (true, true) => call.await.and(Err(killed())),
            (true, false) => Err(killed()),
        }
    }
}

fn killed() -> ebb_storage::Error {
    ebb_storage::Error::Bucket { act: "use", key: "x".to_owned(), source: std::io::Error::other("killed") }
}

#[async_trait]
impl ObjectStore for Cut {
    async fn get(&self, key: &str) -> ebb_storage::Result<Bytes> {
        self.call(self.inner.get(key)).await
    }
    async fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> ebb_storage::Result<Bytes> {
        self.call(self.inner.get_range(key, range)).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> ebb_storage::Result<()> {
        self.call(self.inner.put(key, bytes)).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> ebb_storage::Result<Put> {
        self.call(self.inner.put_if_absent(key, bytes)).await
    }
    async fn put_file(&self, key: &str, file: &Path) -> ebb_storage::Result<()> {
        self.call(self.inner.put_file(key, file)).await
    }
    async fn head(&self, key: &str) -> ebb_storage::Result<Option<ObjectMeta>> {
        self.call(self.inner.head(key)).await
    }
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> ebb_storage::Result<Vec<ObjectMeta>> {
        self.call(self.inner.list(prefix, start_after)).await
    }
    async fn delete(&self, key: &str) -> ebb_storage::Result<()> {
        self.call(self.inner.delete(key)).await
    }
}

/// A bucket with some of everything that may go and much that may not. One object is marked already.
async fn untidy(rig: &Rig) {
    let service = rig.open().await;
    create(&service, "shop").await;
    create(&service, "blog").await;
    write(rig, &service, "prod", "1").await;
    checkpoint(&service, "prod", "one").await.unwrap();
    for name in ["pr-1", "pr-2"] {
        new_branch(&service, name, "shop/prod@one").await.unwrap();
        write(rig, &service, name, name).await;
        checkpoint(&service, name, "mine").await.unwrap();
    }
    let artifact = rig.artifact("a1", &[]);
    service.create_release(&caller(), "blog", api::CreateRelease { artifact }).await.unwrap();
    service.suspend_all(Duration::from_secs(5)).await;
    rig.kill(service).await;
    let service = rig.open().await;
    service.delete_branch(&caller(), "shop", "pr-1").await.unwrap();
    service.delete_project(&caller(), "blog", Some("blog")).await.unwrap();
    rig.kill(service).await;
}

#[tokio::test]
async fn a_kill_at_any_step_of_a_round_loses_nothing_and_the_next_rounds_end_it() {
    let mut finished = [false; 2];
    for (which, after) in [false, true].into_iter().enumerate() {
        for n in 0_i64.. {
            let rig = Rig::new().await;
            untidy(&rig).await;
            let cut = Arc::new(Cut { inner: rig.bucket.clone(), left: AtomicI64::new(i64::MAX), after });
            let service = rig.open_at(cut.clone(), Duration::ZERO, Arc::new(ebb_types::SystemClock)).await.unwrap();
            cut.left.store(n, Ordering::SeqCst);
            let outcome = service.collect(&caller(), false).await;
            rig.kill(service).await;

            let service = rig.open().await;
            assert_whole(&service, &rig.bucket).await;
            collect(&service).await;
            assert_whole(&service, &rig.bucket).await;
            assert_clean(&service, &rig.bucket).await;
            assert_eq!(keys(&rig.bucket, "artifacts/").await.len(), 0, "after a cut at {n}");
            let receipts = service.receipts().await.unwrap();
            assert_eq!((receipts.state().marks.len(), receipts.verify().await.unwrap().fault), (0, None));
            rig.kill(service).await;
            if outcome.is_ok() {
                assert!(n > 10, "a round has more steps than {n}");
                finished[which] = true;
                break;
            }
        }
    }
    assert_eq!(finished, [true; 2]);
}

/// What a run of the model does next. Numbers pick one of what there is.
#[derive(Debug, Clone)]
enum Step {
    Write(usize),
    Branch(usize),
    BranchFromCheckpoint(usize),
    Checkpoint(usize),
    DropCheckpoint(usize),
    Restore(usize),
    DeleteBranch(usize),
    Suspend(usize),
    Upload,
    Collect,
    Wait,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..100_usize;
    prop_oneof![
        3 => n.clone().prop_map(Step::Write),
        2 => n.clone().prop_map(Step::Branch),
        2 => n.clone().prop_map(Step::BranchFromCheckpoint),
        2 => n.clone().prop_map(Step::Checkpoint),
        2 => n.clone().prop_map(Step::DropCheckpoint),
        1 => n.clone().prop_map(Step::Restore),
        2 => n.clone().prop_map(Step::DeleteBranch),
        2 => n.prop_map(Step::Suspend),
        2 => Just(Step::Upload),
        3 => Just(Step::Collect),
        2 => Just(Step::Wait),
        1 => Just(Step::Restart),
    ]
}

type Model = BTreeMap<String, (Rows, BTreeMap<String, Rows>)>;

struct Run {
    rig: Rig,
    service: Arc<Service>,
    clock: Arc<TestClock>,
    model: Model,
    count: usize,
}

const GRACE: Duration = Duration::from_secs(60);

impl Run {
    async fn new() -> Self {
        let (rig, clock) = (Rig::new().await, clock());
        let service = rig.open_at(rig.bucket.clone(), GRACE, clock.clone()).await.unwrap();
        create(&service, "shop").await;
        let model = ["prod", "dev"].map(|name| (name.to_owned(), Default::default())).into();
        Self { rig, service, clock, model, count: 0 }
    }

    fn branch(&self, n: usize) -> String {
        self.model.keys().nth(n % self.model.len()).unwrap().clone()
    }

    fn named(&self, n: usize) -> Option<(String, String)> {
        let all: Vec<_> = (self.model.iter())
            .flat_map(|(branch, (_, names))| names.keys().map(|name| (branch.clone(), name.clone())))
            .collect();
        (!all.is_empty()).then(|| all[n % all.len()].clone())
    }

    async fn step(&mut self, step: &Step) {
        self.count += 1;
        let service = self.service.clone();
        let fresh = format!("n{}", self.count);
        match step {
            Step::Write(n) => {
                let branch = self.branch(*n);
                write(&self.rig, &service, &branch, &fresh).await;
                self.model.get_mut(&branch).unwrap().0.insert(fresh);
            }
            Step::Branch(n) => {
                let from = self.branch(*n);
                new_branch(&service, &fresh, &format!("shop/{from}")).await.unwrap();
                let rows = self.model[&from].0.clone();
                self.model.insert(fresh, (rows, BTreeMap::new()));
            }
            Step::BranchFromCheckpoint(n) => {
                let Some((from, name)) = self.named(*n) else { return };
                new_branch(&service, &fresh, &format!("shop/{from}@{name}")).await.unwrap();
                let rows = self.model[&from].1[&name].clone();
                self.model.insert(fresh, (rows, BTreeMap::new()));
            }
            Step::Checkpoint(n) => {
                let branch = self.branch(*n);
                checkpoint(&service, &branch, &fresh).await.unwrap();
                let (rows, names) = self.model.get_mut(&branch).unwrap();
                names.insert(fresh, rows.clone());
            }
            Step::DropCheckpoint(n) => {
                let Some((branch, name)) = self.named(*n) else { return };
                service.delete_checkpoint(&caller(), "shop", &branch, &name).await.unwrap();
                self.model.get_mut(&branch).unwrap().1.remove(&name);
            }
            Step::Restore(n) => {
                let Some((branch, to)) = self.named(*n) else { return };
                let request = api::RestoreBranch { to: to.clone() };
                let restored = service.restore(&caller(), "shop", &branch, request).await.unwrap().value;
                let (rows, names) = self.model.get_mut(&branch).unwrap();
                let old = std::mem::replace(rows, names[&to].clone());
                self.model.insert(restored.rescue.name.to_string(), (old, BTreeMap::new()));
            }
            Step::DeleteBranch(n) => {
                let branch = self.branch(*n);
                if branch == "prod" || branch.starts_with("rescue") {
                    assert!(service.delete_branch(&caller(), "shop", &branch).await.is_err());
                    return;
                }
                service.delete_branch(&caller(), "shop", &branch).await.unwrap();
                self.model.remove(&branch);
            }
            Step::Suspend(n) => {
                service.suspend_compute(&caller(), "shop", &self.branch(*n)).await.unwrap();
            }
            Step::Upload => service.upload_pending().await.unwrap(),
            Step::Collect => drop(collect(&service).await),
            Step::Wait => self.clock.advance(GRACE / 2),
            Step::Restart => {
                drop(service);
                let bucket = self.rig.bucket.clone();
                let next = self.rig.open_at(bucket, GRACE, self.clock.clone()).await.unwrap();
                self.rig.kill(std::mem::replace(&mut self.service, next)).await;
            }
        }
    }

    /// Everything the model names is there, on a machine that has nothing but the bucket; and nothing else is.
    async fn end(mut self) {
        for branch in self.model.keys().cloned().collect::<Vec<_>>() {
            self.service.suspend_compute(&caller(), "shop", &branch).await.unwrap();
        }
        self.service.upload_pending().await.unwrap();
        assert_whole(&self.service, &self.rig.bucket).await;
        self.clock.advance(GRACE * 2);
        collect(&self.service).await;
        self.clock.advance(GRACE * 2);
        collect(&self.service).await;
        assert_clean(&self.service, &self.rig.bucket).await;
        let kept = reachable(&self.service, &self.rig.bucket).await;
        let local: BTreeSet<LayerId> = self.rig.node.0.lock().layers.keys().copied().collect();
        assert!(local.is_subset(&kept), "the node has what nothing needs: {:?}", local.difference(&kept));

        self.rig.kill(self.service).await;
        let fresh = FakeNode::new();
        {
            let mut world = fresh.0.lock();
            world.bucket = Some(self.rig.bucket.clone());
            world.layers.clear();
        }
        self.rig.node = fresh;
        let service = self.rig.open().await;
        for (branch, (rows, names)) in &self.model {
            let id = branch_id(&service, branch).await;
            service.wake(id).await.unwrap();
            assert_eq!(&self.rig.node.rows(id), rows, "{branch}");
            for (name, rows) in names {
                let at = format!("look-{name}");
                new_branch(&service, &at, &format!("shop/{branch}@{name}")).await.unwrap();
                let id = branch_id(&service, &at).await;
                service.wake(id).await.unwrap();
                assert_eq!(&self.rig.node.rows(id), rows, "{branch}@{name}");
            }
        }
        self.rig.kill(service).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn all_that_can_be_named_stays_and_all_else_goes(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run::new().await;
            for step in &steps {
                run.step(step).await;
            }
            run.end().await;
        });
    }
}
