//! Operations over a machine in memory: what they do, and what a crash after any record of the ledger leaves.

mod deploys;
mod imports;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use ebb_storage::object_store::{Bucket, ObjectMeta, ObjectStore, Put};
use ebb_types::{BranchId, ErrorKind};

use super::fake::{Rig, Rows};
use super::*;
use crate::api::types as api;
use crate::clients::NoClients;

/// A bucket whose writer is killed at its n-th "put if absent": before the object is there, or after.
#[derive(Debug)]
struct Dying {
    inner: Bucket,
    left: AtomicI64,
    after: bool,
    dead: AtomicBool,
}

impl Dying {
    fn alive(&self, key: &str) -> ebb_storage::Result<()> {
        match self.dead.load(Ordering::SeqCst) {
            true => Err(self.fault(key)),
            false => Ok(()),
        }
    }

    fn fault(&self, key: &str) -> ebb_storage::Error {
        let source = std::io::Error::other("killed");
        ebb_storage::Error::Bucket { act: "put", key: key.to_owned(), source }
    }
}

#[async_trait]
impl ObjectStore for Dying {
    async fn get(&self, key: &str) -> ebb_storage::Result<Bytes> {
        self.alive(key)?;
        self.inner.get(key).await
    }

    async fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> ebb_storage::Result<Bytes> {
        self.alive(key)?;
        self.inner.get_range(key, range).await
    }

    async fn put(&self, key: &str, bytes: Bytes) -> ebb_storage::Result<()> {
        self.alive(key)?;
        self.inner.put(key, bytes).await
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> ebb_storage::Result<Put> {
        self.alive(key)?;
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return self.inner.put_if_absent(key, bytes).await;
        }
        self.dead.store(true, Ordering::SeqCst);
        if self.after {
            let _ = self.inner.put_if_absent(key, bytes).await?;
        }
        Err(self.fault(key))
    }

    async fn put_file(&self, key: &str, file: &Path) -> ebb_storage::Result<()> {
        self.alive(key)?;
        self.inner.put_file(key, file).await
    }

    async fn head(&self, key: &str) -> ebb_storage::Result<Option<ObjectMeta>> {
        self.alive(key)?;
        self.inner.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> ebb_storage::Result<Vec<ObjectMeta>> {
        self.alive(prefix)?;
        self.inner.list(prefix, start_after).await
    }

    async fn delete(&self, key: &str) -> ebb_storage::Result<()> {
        self.alive(key)?;
        self.inner.delete(key).await
    }
}

fn caller() -> Caller {
    Caller { actor: "test".to_owned(), key: None }
}

fn keyed(key: &str, request: &str) -> Caller {
    Caller { actor: "test".to_owned(), key: Some(Key { key: key.to_owned(), request: request.to_owned() }) }
}

async fn create(service: &Arc<Service>) -> Result<Answer<api::CreatedProject>> {
    let request = api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
    service.create_project(&caller(), request).await
}

async fn branch_id(service: &Arc<Service>, name: &str) -> BranchId {
    service.branch("shop", name).await.unwrap().id
}

async fn write(rig: &Rig, service: &Arc<Service>, branch: &str, row: &str) {
    let id = branch_id(service, branch).await;
    service.wake(id).await.unwrap();
    rig.node.write(id, row);
}

async fn rows(rig: &Rig, service: &Arc<Service>, branch: &str) -> Vec<String> {
    let id = branch_id(service, branch).await;
    service.wake(id).await.unwrap();
    rig.node.rows(id).into_iter().collect()
}

async fn new_branch(service: &Arc<Service>, name: &str, from: &str) -> Result<Answer<api::Branch>> {
    let request = api::CreateBranch { name: name.parse().unwrap(), from: Some(from.parse().unwrap()) };
    service.create_branch(&caller(), "shop", request).await
}

async fn checkpoint(service: &Arc<Service>, branch: &str, name: &str) -> Result<Answer<api::Checkpoint>> {
    let request = api::CreateCheckpoint { name: name.parse().unwrap() };
    service.create_checkpoint(&caller(), "shop", branch, request).await
}

async fn restore(service: &Arc<Service>, branch: &str, to: &str) -> Result<Answer<api::Restored>> {
    service.restore(&caller(), "shop", branch, api::RestoreBranch { to: to.to_owned() }).await
}

fn to_release(to: &str) -> api::Rollback {
    api::Rollback { to: to.to_owned(), plan: false, code_only: false, data_only: false, rows: false }
}

async fn deploy(rig: &Rig, service: &Arc<Service>, name: &str, migrations: &[&str]) -> Result<Answer<api::Release>> {
    let artifact = rig.artifact(name, migrations);
    service.create_release(&caller(), "shop", api::CreateRelease { artifact }).await
}

/// No operation is under way, nobody is held, the chain is whole, every head is a layer.
async fn assert_settled(rig: &Rig, service: &Arc<Service>) {
    assert!(rig.clients.fenced.lock().unwrap().is_empty(), "clients are still held");
    for project in service.all_projects() {
        let state = project.ledger.state();
        assert!(state.operations.is_empty(), "an operation is stuck: {:?}", state.operations);
        assert_eq!(project.ledger.verify().await.unwrap().fault, None);
        for layer in state.layers() {
            assert!(rig.node.0.lock().layers.contains_key(&layer), "{layer} is recorded and does not exist");
        }
    }
    let catalog = service.catalog.state();
    assert!(catalog.projects.values().all(|listed| listed.standing == Standing::Live), "{catalog:?}");
}

#[tokio::test]
async fn a_new_project_has_two_branches_urls_and_a_verifier() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    let made = create(&service).await.unwrap().value;
    let names: Vec<_> = made.project.branches.iter().map(|branch| branch.name.to_string()).collect();
    assert_eq!(names, ["prod", "dev"]);
    assert!(made.password.len() >= 24);
    assert_eq!(
        made.urls.prod,
        format!("postgres://app:{}@127.0.0.1:6432/app?options=endpoint%3Dprod--shop", made.password)
    );
    let prod = branch_id(&service, "prod").await;
    let verifier = service.verifier(prod, "app").await.unwrap().unwrap();
    assert!(verifier.starts_with("SCRAM-SHA-256$4096:"));
    assert_eq!(service.verifier(prod, "postgres").await.unwrap(), None);
    let url = service.branch_url(&caller(), "shop", "dev").await.unwrap();
    assert_eq!(
        url.url_sni.replace(&made.password, "PW"),
        "postgres://app:PW@dev--shop.localhost:6432/app?sslmode=verify-full&sslrootcert=/tls/ca.pem&hostaddr=127.0.0.1"
    );
    // The secret is in no object but its own, and there it is encrypted.
    for object in rig.bucket.list("", None).await.unwrap() {
        let bytes = rig.bucket.get(&object.key).await.unwrap();
        let shown = bytes.windows(made.password.len()).any(|window| window == made.password.as_bytes());
        assert!(!shown, "the password stands in {:?}", object.key);
    }
    assert_settled(&rig, &service).await;
    // Another service finds the same.
    rig.kill(service).await;
    let service = rig.open().await;
    assert_eq!(service.branch_url(&caller(), "shop", "dev").await.unwrap().url, url.url);
    assert_eq!(service.projects().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_thousand_callers_make_one_wake() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    let prod = branch_id(&service, "prod").await;
    let wakes = (0..1000).map(|_| service.wake(prod));
    let awake = futures::future::try_join_all(wakes).await.unwrap();
    assert!(awake.iter().all(|unit| unit.generation == 1));
    assert_eq!(rig.node.0.lock().starts, 1);
}

#[tokio::test]
async fn a_wake_that_fails_says_so_to_everyone_and_the_next_one_works() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    let prod = branch_id(&service, "prod").await;
    rig.node.0.lock().fail_start = true;
    let (one, two) = tokio::join!(service.wake(prod), service.wake(prod));
    assert_eq!(one.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(two.unwrap_err().sql_state(), ebb_types::SqlState::CANNOT_CONNECT_NOW);
    assert_eq!(service.wake(prod).await.unwrap().generation, 1);
}

#[tokio::test]
async fn branches_and_their_source_do_not_see_each_other() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "prod", "1").await;
    new_branch(&service, "running", "shop/prod").await.unwrap();
    write(&rig, &service, "prod", "2").await;
    checkpoint(&service, "prod", "two").await.unwrap();
    service.suspend_compute(&caller(), "shop", "prod").await.unwrap();
    new_branch(&service, "asleep", "shop/prod").await.unwrap();
    write(&rig, &service, "prod", "3").await;
    new_branch(&service, "named", "shop/prod@two").await.unwrap();
    write(&rig, &service, "running", "x").await;
    assert_eq!(rows(&rig, &service, "running").await, ["1", "x"]);
    assert_eq!(rows(&rig, &service, "asleep").await, ["1", "2"]);
    assert_eq!(rows(&rig, &service, "named").await, ["1", "2"]);
    assert_eq!(rows(&rig, &service, "prod").await, ["1", "2", "3"]);
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn what_a_crashed_compute_had_committed_is_in_the_next_branch() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "prod", "1").await;
    let prod = branch_id(&service, "prod").await;
    rig.node.kill(prod);
    wait_until(|| rig.clients.lost.lock().unwrap().contains(&(prod, 1))).await;
    assert_eq!(service.branch("shop", "prod").await.unwrap().state, "suspended");
    new_branch(&service, "after", "shop/prod").await.unwrap();
    assert_eq!(rows(&rig, &service, "after").await, ["1"]);
    assert_eq!(service.wake(prod).await.unwrap().generation, 2);
}

async fn wait_until(condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.expect("the condition did not come about");
}

#[tokio::test]
async fn restore_keeps_the_branch_and_its_old_head() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "dev", "1").await;
    checkpoint(&service, "dev", "one").await.unwrap();
    write(&rig, &service, "dev", "2").await;
    let before = branch_id(&service, "dev").await;
    let restored = restore(&service, "dev", "one").await.unwrap().value;
    assert_eq!(restored.branch.id, before);
    assert_eq!(restored.rescue.name.as_str(), "rescue-dev-1");
    assert_eq!(rows(&rig, &service, "dev").await, ["1"]);
    assert_eq!(rows(&rig, &service, "rescue-dev-1").await, ["1", "2"]);
    // Back and forth, from asleep and awake.
    write(&rig, &service, "dev", "3").await;
    service.suspend_compute(&caller(), "shop", "dev").await.unwrap();
    restore(&service, "dev", "one").await.unwrap();
    restore(&service, "dev", "one").await.unwrap();
    assert_eq!(rows(&rig, &service, "dev").await, ["1"]);
    assert_eq!(rows(&rig, &service, "rescue-dev-2").await, ["1", "3"]);
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn the_roles_of_a_restored_image_count() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    checkpoint(&service, "dev", "before").await.unwrap();
    write(&rig, &service, "dev", "role new").await;
    let dev = branch_id(&service, "dev").await;
    assert_eq!(service.verifier(dev, "new").await.unwrap().unwrap(), "verifier of new");
    restore(&service, "dev", "before").await.unwrap();
    assert_eq!(service.verifier(dev, "new").await.unwrap(), None);
    assert!(service.verifier(dev, "app").await.unwrap().unwrap().starts_with("SCRAM-SHA-256$"));
}

#[tokio::test]
async fn releases_and_rollback_move_code_and_data_together() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    let one = deploy(&rig, &service, "one", &["1.sql"]).await.unwrap().value;
    assert_eq!((one.name.as_str(), one.state.as_str(), rig.code().as_deref()), ("v1", "deployed", Some("one")));
    let again = deploy(&rig, &service, "one", &["1.sql"]).await.unwrap();
    assert!(!again.new && again.value.name == "v1");
    write(&rig, &service, "prod", "order 1").await;
    deploy(&rig, &service, "two", &["1.sql", "2.sql"]).await.unwrap();
    write(&rig, &service, "prod", "order 2").await;
    assert_eq!(rig.code().as_deref(), Some("two"));

    let plan = service.plan_rollback("shop", &to_release("v1")).await.unwrap();
    assert_eq!(
        (plan.checkpoint.as_str(), plan.set_aside.releases.as_slice()),
        ("before-v2", ["v2".to_owned()].as_slice())
    );
    assert_eq!((plan.set_aside.transactions, plan.set_aside.wal_bytes), (Some(2), Some(200)));
    assert_eq!(rig.code().as_deref(), Some("two"), "a plan did something");

    let done = service.rollback(&caller(), "shop", &to_release("v1")).await.unwrap().value;
    assert_eq!(done.plan.checkpoint, plan.checkpoint);
    assert_eq!(rig.code().as_deref(), Some("one"));
    assert_eq!(rows(&rig, &service, "prod").await, ["migration 1.sql", "order 1"]);
    assert_eq!(
        rows(&rig, &service, done.rescue.unwrap().name.as_str()).await,
        ["migration 1.sql", "migration 2.sql", "order 1", "order 2"]
    );
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn a_failed_migration_leaves_the_code_and_says_where() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    deploy(&rig, &service, "one", &[]).await.unwrap();
    rig.node.0.lock().fail_migration = Some("2.sql".to_owned());
    let error = deploy(&rig, &service, "two", &["1.sql", "2.sql"]).await.unwrap_err();
    assert_eq!(error.chain(), "migration \"2.sql\" failed: syntax error (SQLSTATE 42601)");
    let releases = service.releases("shop").await.unwrap();
    assert_eq!((releases[1].state.as_str(), releases[1].current), ("failed", false));
    assert!(releases[1].fault.as_ref().unwrap().contains("2.sql"));
    assert_eq!(rig.code().as_deref(), Some("one"));
    // The data goes back with a rollback to the release in service.
    service.rollback(&caller(), "shop", &to_release("v1")).await.unwrap();
    assert!(rows(&rig, &service, "prod").await.is_empty());
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn the_same_key_answers_the_first_result_also_after_a_restart() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    let request = || api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
    let first = service.create_project(&keyed("k1", "r1"), request()).await.unwrap();
    let branch = || api::CreateBranch { name: "pr".parse().unwrap(), from: None };
    let made = service.create_branch(&keyed("k2", "r2"), "shop", branch()).await.unwrap();
    assert!(first.new && made.new);
    rig.kill(service).await;
    let service = rig.open().await;
    let again = service.create_project(&keyed("k1", "r1"), request()).await.unwrap();
    assert_eq!((again.new, &again.value.password), (false, &first.value.password));
    let again = service.create_branch(&keyed("k2", "r2"), "shop", branch()).await.unwrap();
    assert_eq!((again.new, again.value.id), (false, made.value.id));
    let reused = service.create_branch(&keyed("k2", "other"), "shop", branch()).await.unwrap_err();
    assert!(matches!(reused, Error::Refused(Refusal::KeyReused(_))));
    let taken = service.create_branch(&caller(), "shop", branch()).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Conflict);
    assert_eq!(create(&service).await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn a_failed_act_does_not_use_its_key_up() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    let artifact = rig.artifact("one", &["1.sql"]);
    let request = || api::CreateRelease { artifact: artifact.clone() };
    rig.node.0.lock().fail_migration = Some("1.sql".to_owned());
    service.create_release(&keyed("k", "r"), "shop", request()).await.unwrap_err();
    rig.node.0.lock().fail_migration = None;
    let made = service.create_release(&keyed("k", "r"), "shop", request()).await.unwrap();
    assert_eq!((made.value.name.as_str(), made.new), ("v2", true));
}

#[tokio::test]
async fn an_idle_compute_is_suspended_and_a_pinned_one_says_who_keeps_it() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let (service, stop) = (service.clone(), stop.clone());
        async move { service.run(stop).await }
    });
    let quick = api::ChangeBranch { idle_suspend_seconds: Some(0.1), ..Default::default() };
    service.change_branch(&caller(), "shop", "dev", quick).await.unwrap();
    rig.clients.pinned.store(true, Ordering::SeqCst);
    write(&rig, &service, "dev", "1").await;
    let dev = branch_id(&service, "dev").await;
    let project = service.project_of(dev).unwrap();
    wait_until(|| !project.cell(dev).inner.lock().keeps_awake.is_empty()).await;
    let compute = service.compute("shop", "dev").await.unwrap();
    assert_eq!(compute.state, "active");
    assert_eq!(compute.keeps_awake, ["connection 4 of app@app from 127.0.0.1:5: temporary table"]);
    rig.clients.pinned.store(false, Ordering::SeqCst);
    wait_until(|| !rig.node.is_running(dev)).await;
    // Its seal is recorded, and uploaded.
    wait_until(|| {
        let head = project.ledger.state().branches[&dev].head;
        rig.node.0.lock().uploaded.contains(&head) && head != project.ledger.state().branch("prod").unwrap().1.head
    })
    .await;
    stop.cancel();
    running.await.unwrap();
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn running_computes_are_adopted_by_the_next_service() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "dev", "1").await;
    rig.kill(service).await;
    let service = rig.open().await;
    assert_eq!(service.branch("shop", "dev").await.unwrap().state, "active");
    assert_eq!(rows(&rig, &service, "dev").await, ["1"]);
    assert_eq!(rig.node.0.lock().starts, 1);
    service.suspend_all(Duration::from_secs(5)).await;
    assert!(!rig.node.is_running(branch_id(&service, "dev").await));
    assert!(matches!(service.wake(branch_id(&service, "dev").await).await, Err(Error::Stopping)));
}

#[tokio::test]
async fn a_bucket_that_is_away_neither_stops_a_suspension_nor_turns_a_head_back() {
    let rig = Rig::new().await;
    let bucket = Arc::new(Dying {
        inner: rig.bucket.clone(),
        left: AtomicI64::new(i64::MAX),
        after: false,
        dead: AtomicBool::new(false),
    });
    let service = rig.open_with(bucket.clone()).await.unwrap();
    create(&service).await.unwrap();
    write(&rig, &service, "prod", "1").await;
    let prod = branch_id(&service, "prod").await;
    let project = service.project_of(prod).unwrap();
    let suspend = || service.suspend_locked(&project, prod, Duration::ZERO, crate::clients::Rest::Refuse);
    let head = || project.ledger.state().branches[&prod].head;
    let first = head();

    bucket.dead.store(true, Ordering::SeqCst);
    assert_eq!(suspend().await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!((service.branch("shop", "prod").await.unwrap().state.as_str(), head()), ("suspended", first));
    // Waking needs no bucket.
    write(&rig, &service, "prod", "2").await;
    bucket.dead.store(false, Ordering::SeqCst);
    let named = checkpoint(&service, "prod", "two").await.unwrap().value;
    service.settle_heads().await;
    assert_eq!(head(), named.layer);

    bucket.dead.store(true, Ordering::SeqCst);
    write(&rig, &service, "prod", "3").await;
    suspend().await.unwrap_err();
    bucket.dead.store(false, Ordering::SeqCst);
    service.settle_heads().await;
    assert_ne!(head(), named.layer);
    assert_eq!(rig.node.0.lock().layers[&head()].1.len(), 3);
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn what_a_lost_compute_had_committed_gets_to_the_bucket() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "prod", "1").await;
    let prod = branch_id(&service, "prod").await;
    rig.kill(service).await;
    rig.node.kill(prod);
    let service = rig.open().await;
    service.settle_heads().await;
    service.upload_pending().await.unwrap();
    let head = service.branch("shop", "prod").await.unwrap().head;
    assert_eq!(rig.node.0.lock().layers[&head].1.len(), 1);
    assert!(rig.node.0.lock().uploaded.contains(&head));
    let entries = service.ledger_entries("shop").await.unwrap().len();
    service.settle_heads().await;
    assert_eq!(service.ledger_entries("shop").await.unwrap().len(), entries, "sealing again made an entry");
}

#[tokio::test]
async fn a_full_disk_refuses_work() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    rig.node.0.lock().free_bytes = 10;
    let error = service.wake(branch_id(&service, "prod").await).await.unwrap_err();
    assert_eq!(error.sql_state(), ebb_types::SqlState::DISK_FULL);
    assert_eq!(checkpoint(&service, "prod", "x").await.unwrap_err().kind(), ErrorKind::Unavailable);
    rig.node.0.lock().free_bytes = 10_000;
    checkpoint(&service, "prod", "x").await.unwrap();
}

#[tokio::test]
async fn a_deleted_project_leaves_its_name_and_no_compute() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "prod", "1").await;
    assert!(service.delete_project(&caller(), "shop", Some("shp")).await.is_err());
    service.delete_project(&caller(), "shop", Some("shop")).await.unwrap();
    assert!(rig.node.0.lock().volumes.is_empty());
    assert_eq!(service.project_info("shop").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(rig.bucket.list("secrets/", None).await.unwrap().is_empty());
    create(&service).await.unwrap();
    assert!(rows(&rig, &service, "prod").await.is_empty());
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn every_act_leaves_receipts_that_can_be_read() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "dev", "1").await;
    checkpoint(&service, "dev", "one").await.unwrap();
    new_branch(&service, "pr", "shop/dev@one").await.unwrap();
    service.delete_branch(&caller(), "shop", "pr").await.unwrap();
    service.branch_url(&caller(), "shop", "dev").await.unwrap();
    restore(&service, "dev", "one").await.unwrap();
    let export = api::Export { point: None, dir: rig.dir.path().join("out"), format: None, database: None };
    assert_eq!(service.export(&caller(), "shop", "dev", export).await.unwrap().value.bytes, 1);
    deploy(&rig, &service, "one", &[]).await.unwrap();
    deploy(&rig, &service, "two", &[]).await.unwrap();
    service.rollback(&caller(), "shop", &to_release("v1")).await.unwrap();
    let out = rig.dir.path().display().to_string();
    let receipts: Vec<_> = service
        .ledger_entries("shop")
        .await
        .unwrap()
        .iter()
        .map(|entry| format!("{} | {} | {} | {}", entry.actor, entry.act, entry.on.replace(&out, "DIR"), entry.result))
        .collect();
    insta::assert_snapshot!(receipts.join("\n"));
    let verdict = service.ledger_verdict("shop").await.unwrap();
    assert!(verdict.ok && verdict.entries == receipts.len() as u64);
}

/// The acts that are cut off at every record of a ledger.
#[derive(Debug, Clone, Copy)]
enum Cut {
    CreateProject,
    DeleteProject,
    CreateBranch,
    DeleteBranch,
    Checkpoint,
    Restore,
    Release,
    Rollback,
    Suspend,
    Export,
    Drill,
    Import,
    ImportProject,
    Rehearse,
    DescribedRelease,
    ReleaseGoesBack,
    CodeGoesBack,
    RollbackOfCode,
    RollbackOfData,
}

/// Imports a directory, and waits for what comes of it.
async fn import(service: &Arc<Service>, project: &str, branch: Option<&str>) -> Result<()> {
    let request = api::StartImport {
        project: project.parse().unwrap(),
        branch: branch.map(|branch| branch.parse().unwrap()),
        from: api::ImportOrigin::Directory { path: "/elsewhere".into() },
        follow: false,
        database: None,
    };
    let id = service.import(&caller(), request).await?.value.id;
    wait_until(|| service.show_import(id).unwrap().state != api::ImportState::Running).await;
    let ended = service.show_import(id).unwrap();
    match ended.fault {
        None => Ok(()),
        Some(why) => Err(Error::Import { why, hint: ended.hint }),
    }
}

async fn prepare(rig: &Rig, service: &Arc<Service>, cut: Cut) {
    if matches!(cut, Cut::CreateProject | Cut::ImportProject) {
        return;
    }
    create(service).await.unwrap();
    write(rig, service, "prod", "1").await;
    checkpoint(service, "prod", "one").await.unwrap();
    write(rig, service, "prod", "2").await;
    match cut {
        Cut::DeleteBranch => drop(new_branch(service, "pr", "shop/prod").await.unwrap()),
        Cut::Rollback | Cut::RollbackOfCode | Cut::RollbackOfData => {
            deploy(rig, service, "one", &["1.sql"]).await.unwrap();
            write(rig, service, "prod", "3").await;
            deploy(rig, service, "two", &["1.sql", "2.sql"]).await.unwrap();
            write(rig, service, "prod", "4").await;
        }
        Cut::Release | Cut::Rehearse | Cut::DescribedRelease | Cut::ReleaseGoesBack | Cut::CodeGoesBack => {
            deploy(rig, service, "one", &["1.sql"]).await.unwrap();
            write(rig, service, "prod", "3").await;
        }
        _ => {}
    }
}

async fn carry_out(rig: &Rig, service: &Arc<Service>, cut: Cut) -> Result<()> {
    match cut {
        Cut::CreateProject => create(service).await.map(drop),
        Cut::Import => import(service, "shop", Some("imported")).await,
        Cut::ImportProject => import(service, "shop", None).await,
        Cut::DeleteProject => service.delete_project(&caller(), "shop", Some("shop")).await,
        Cut::CreateBranch => new_branch(service, "pr", "shop/prod").await.map(drop),
        Cut::DeleteBranch => service.delete_branch(&caller(), "shop", "pr").await,
        Cut::Checkpoint => checkpoint(service, "prod", "two").await.map(drop),
        Cut::Restore => restore(service, "prod", "one").await.map(drop),
        Cut::Release => deploy(rig, service, "two", &["1.sql", "2.sql"]).await.map(drop),
        Cut::Rehearse => deploys::rehearse(rig, service).await.map(drop),
        Cut::DescribedRelease => deploys::deploy(rig, service, deploys::WELL).await.map(drop),
        Cut::ReleaseGoesBack => deploys::given_up(deploys::deploy(rig, service, deploys::DATA_GOES_BACK).await),
        Cut::CodeGoesBack => deploys::given_up(deploys::deploy(rig, service, deploys::CODE_GOES_BACK).await),
        Cut::RollbackOfCode => {
            let request = api::Rollback { code_only: true, ..to_release("v1") };
            service.rollback(&caller(), "shop", &request).await.map(drop)
        }
        Cut::RollbackOfData => {
            let request = api::Rollback { data_only: true, ..to_release("v1") };
            service.rollback(&caller(), "shop", &request).await.map(drop)
        }
        Cut::Rollback => service.rollback(&caller(), "shop", &to_release("v1")).await.map(drop),
        Cut::Suspend => service.suspend_compute(&caller(), "shop", "prod").await.map(drop),
        Cut::Drill => service.drill(&caller(), "shop", "prod", api::DrillBranch::default()).await.map(drop),
        Cut::Export => {
            let dir = rig.dir.path().join(format!("out-{:x}", rand::random::<u32>()));
            service
                .export(&caller(), "shop", "prod", api::Export { point: None, dir, format: None, database: None })
                .await
                .map(drop)
        }
    }
}

fn imported_layers(rig: &Rig) -> usize {
    rig.node.0.lock().layers.values().filter(|(_, rows)| rows.contains("imported")).count()
}

fn set(rows: &[&str]) -> Rows {
    rows.iter().map(|row| (*row).to_owned()).collect()
}

/// After recovery the act is done (`true`) or was never begun (`false`): both in every respect.
async fn check(rig: &Rig, service: &Arc<Service>, cut: Cut) -> bool {
    let branch = |name: &'static str| async move { service.branch("shop", name).await.is_ok() };
    match cut {
        Cut::CreateProject | Cut::DeleteProject => {
            let exists = service.project_info("shop").await.is_ok();
            assert_eq!(rig.bucket.list("secrets/", None).await.unwrap().len(), usize::from(exists));
            if !exists {
                assert!(rig.node.0.lock().volumes.is_empty());
            }
            exists == matches!(cut, Cut::CreateProject)
        }
        Cut::Import => {
            assert!(rig.node.0.lock().staged.is_empty(), "a stage was left");
            let made = branch("imported").await;
            match made {
                true => assert_eq!(rows(rig, service, "imported").await, ["imported"]),
                false => assert_eq!(imported_layers(rig), 0, "a layer was left"),
            }
            assert_eq!(rows(rig, service, "prod").await, ["1", "2"]);
            made
        }
        Cut::ImportProject => {
            assert!(rig.node.0.lock().staged.is_empty(), "a stage was left");
            let exists = service.project_info("shop").await.is_ok();
            assert_eq!(rig.bucket.list("secrets/", None).await.unwrap().len(), usize::from(exists));
            match exists {
                true => {
                    assert_eq!(rows(rig, service, "prod").await, ["imported"]);
                    assert_eq!(rows(rig, service, "dev").await, ["imported"]);
                }
                false => assert_eq!(imported_layers(rig), 0, "a layer was left"),
            }
            exists
        }
        Cut::CreateBranch => {
            let made = branch("pr").await;
            if made {
                assert_eq!(rows(rig, service, "pr").await, ["1", "2"]);
            }
            assert_eq!(rows(rig, service, "prod").await, ["1", "2"]);
            made
        }
        Cut::DeleteBranch => {
            let there = branch("pr").await;
            if there {
                assert_eq!(rows(rig, service, "pr").await, ["1", "2"]);
            }
            !there
        }
        Cut::Checkpoint => {
            let made = service.checkpoints("shop", "prod").await.unwrap().len() == 2;
            assert_eq!(rows(rig, service, "prod").await, ["1", "2"]);
            made
        }
        Cut::Suspend | Cut::Export => {
            assert_eq!(rows(rig, service, "prod").await, ["1", "2"]);
            true
        }
        Cut::Drill => {
            assert!(rig.node.0.lock().drills.is_empty(), "a drill left something");
            assert_eq!(rows(rig, service, "prod").await, ["1", "2"]);
            !service.drills("shop", "prod").await.unwrap().is_empty()
        }
        Cut::Restore => {
            let done = branch("rescue-prod-1").await;
            if done {
                assert_eq!(rows(rig, service, "rescue-prod-1").await, ["1", "2"]);
            }
            assert_eq!(rows(rig, service, "prod").await, if done { vec!["1"] } else { vec!["1", "2"] });
            done
        }
        Cut::Release => {
            let releases = service.releases("shop").await.unwrap();
            let done = releases.iter().any(|release| release.state == "deployed" && release.name != "v1");
            assert!(releases.iter().all(|release| release.state != "deploying"));
            assert_eq!(rig.code().as_deref(), Some(if done { "two" } else { "one" }));
            let data: Rows = rows(rig, service, "prod").await.into_iter().collect();
            assert!(data.is_superset(&set(&["1", "2", "3", "migration 1.sql"])));
            assert!(!done || data.contains("migration 2.sql"));
            done
        }
        Cut::Rehearse => {
            assert_eq!(rows(rig, service, "prod").await, ["1", "2", "3", "migration 1.sql"]);
            !service.project("shop").unwrap().ledger.state().rehearsals.is_empty()
        }
        Cut::DescribedRelease => deploys::check_done(rig, service).await,
        Cut::ReleaseGoesBack => deploys::check_data_back(rig, service).await,
        Cut::CodeGoesBack => deploys::check_code_back(rig, service).await,
        Cut::RollbackOfCode => {
            let all = set(&["1", "2", "3", "4", "migration 1.sql", "migration 2.sql"]);
            assert_eq!(rows(rig, service, "prod").await.into_iter().collect::<Rows>(), all);
            rig.code().as_deref() == Some("one")
        }
        Cut::RollbackOfData => {
            assert_eq!(rig.code().as_deref(), Some("two"));
            let data: Rows = rows(rig, service, "prod").await.into_iter().collect();
            data == set(&["1", "2", "3", "migration 1.sql"])
        }
        Cut::Rollback => {
            let done = branch("rescue-prod-1").await;
            let old = set(&["1", "2", "3", "4", "migration 1.sql", "migration 2.sql"]);
            let data: Rows = rows(rig, service, "prod").await.into_iter().collect();
            if done {
                assert_eq!((data, rig.code().as_deref()), (set(&["1", "2", "3", "migration 1.sql"]), Some("one")));
                assert_eq!(rows(rig, service, "rescue-prod-1").await.into_iter().collect::<Rows>(), old);
            } else {
                assert_eq!((data, rig.code().as_deref()), (old, Some("two")));
            }
            done
        }
    }
}

async fn cut_everywhere(cut: Cut) {
    for after in [false, true] {
        let mut finished = false;
        for record in 0..20 {
            let rig = Rig::new().await;
            let service = rig.open().await;
            prepare(&rig, &service, cut).await;
            rig.kill(service).await;

            let dying =
                Dying { inner: rig.bucket.clone(), left: AtomicI64::new(record), after, dead: AtomicBool::new(false) };
            let dying = Arc::new(dying);
            let service = rig.open_with(dying.clone()).await.unwrap();
            let outcome = carry_out(&rig, &service, cut).await;
            rig.kill(service).await;
            let died = dying.dead.load(Ordering::SeqCst);
            assert!(died || outcome.is_ok(), "{cut:?} failed by itself: {outcome:?}");

            let service = rig.open().await;
            assert_settled(&rig, &service).await;
            let done = check(&rig, &service, cut).await;
            assert!(done || died, "{cut:?} was answered and is not there");
            assert!(done || outcome.is_err(), "{cut:?} was answered and is not there");
            if !done {
                carry_out(&rig, &service, cut).await.unwrap_or_else(|error| {
                    panic!("{cut:?} cut at record {record} cannot be done again: {}", error.chain())
                });
                assert!(check(&rig, &service, cut).await, "{cut:?} done again is not there");
            }
            assert_settled(&rig, &service).await;
            rig.kill(service).await;
            if !died {
                finished = true;
                break;
            }
        }
        assert!(finished, "{cut:?} never came to its end");
    }
}

macro_rules! cuts {
    ($($name:ident $cut:ident)*) => {$(
        #[tokio::test]
        async fn $name() {
            cut_everywhere(Cut::$cut).await;
        }
    )*};
}

cuts! {
    create_project_cut_at_every_record_is_done_or_undone CreateProject
    delete_project_cut_at_every_record_is_done_or_undone DeleteProject
    create_branch_cut_at_every_record_is_done_or_undone CreateBranch
    delete_branch_cut_at_every_record_is_done_or_undone DeleteBranch
    checkpoint_cut_at_every_record_is_done_or_undone Checkpoint
    restore_cut_at_every_record_is_done_or_undone Restore
    release_cut_at_every_record_is_done_or_undone Release
    rollback_cut_at_every_record_is_done_or_undone Rollback
    rollback_of_code_cut_at_every_record_is_done_or_undone RollbackOfCode
    rollback_of_data_cut_at_every_record_is_done_or_undone RollbackOfData
    suspend_cut_at_every_record_is_done_or_undone Suspend
    export_cut_at_every_record_is_done_or_undone Export
    drill_cut_at_every_record_is_done_or_undone Drill
    import_cut_at_every_record_is_done_or_undone Import
    rehearsal_cut_at_every_record_is_done_or_undone Rehearse
    described_release_cut_at_every_record_is_done_or_undone DescribedRelease
    release_that_goes_back_cut_at_every_record_is_done_or_undone ReleaseGoesBack
    release_whose_code_goes_back_cut_at_every_record_is_done_or_undone CodeGoesBack
    import_of_a_project_cut_at_every_record_is_done_or_undone ImportProject
}

#[tokio::test]
async fn a_service_without_clients_works_too() {
    let rig = Rig::new().await;
    let node = Arc::new(rig.node.clone());
    let service = Service::open_on(rig.config(), rig.bucket.clone(), Arc::new(NoClients), node, Arc::new(SystemClock))
        .await
        .unwrap();
    create(&service).await.unwrap();
    write(&rig, &service, "prod", "1").await;
    service.suspend_compute(&caller(), "shop", "prod").await.unwrap();
    assert_eq!(service.branch("shop", "prod").await.unwrap().state, "suspended");
}
