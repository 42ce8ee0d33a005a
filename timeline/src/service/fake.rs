//! For tests: a machine in memory: volumes are sets of rows, layers are frozen ones. It outlives the services run on it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use async_trait::async_trait;
use ebb_compute::control::{Durability, Status};
use ebb_storage::layer::FilePages;
use ebb_storage::object_store::{self, Bucket};
use ebb_types::{BranchId, Clock, ErrorKind, LayerId, Lsn, SystemClock};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::clients::{Activity, Clients, Rest, SessionRow};
use crate::decide::Found;
use crate::deploy::{MigrationRun, Rehearsal, faults};
use crate::drill::{Drilled, Fault, TableRows};
use crate::event::{Dump, Replay};
use crate::migrate::{Migrated, Order};
use crate::node::drill::{self, Drills};
use crate::node::{
    Foreign, ImportFrom, ImportJob, ImportRequest, Line, Node, Rehearsing, Roles, Sealed, Start, Visited, Visiting,
};
use crate::probe;
use crate::release_file::{Probe, Question};
use crate::{Error, Result, Service, ServiceConfig};

pub type Rows = BTreeSet<String>;

#[derive(Debug, Default)]
pub struct World {
    pub layers: HashMap<LayerId, (Vec<LayerId>, Rows)>,
    pub uploaded: HashSet<LayerId>,
    pub volumes: HashMap<BranchId, FakeVolume>,
    pub starts: u64,
    /// Whether the last start was told that nobody else can have archived WAL of the branch.
    pub begun_here: bool,
    /// Visits, and the layers made for them alone.
    pub visits: HashMap<BranchId, Option<LayerId>>,
    /// The next start fails.
    pub fail_start: bool,
    /// The next start says by the first that it has begun, and waits for the second.
    pub start_pauses: Option<[Arc<tokio::sync::Notify>; 2]>,
    /// A migration of this name fails.
    pub fail_migration: Option<String>,
    /// A migration of this name fails anywhere but on a copy.
    pub fail_migration_later: Option<String>,
    pub free_bytes: u64,
    /// What was written on each line of a branch, and where in its WAL that ends.
    pub wal: HashMap<(BranchId, u64), Vec<(Lsn, String)>>,
    /// Drills that were carried out and not ended.
    pub drills: HashSet<BranchId>,
    /// The next drill hangs until it is dropped.
    pub hang_drill: bool,
    /// Where layers are uploaded to; `None` once they need not be found there.
    pub bucket: Option<Bucket>,
    /// Directories that imports use.
    pub staged: HashSet<BranchId>,
    /// Imports wait for this.
    pub import_pauses: Option<Arc<tokio::sync::Notify>>,
    /// What is imported is damaged.
    pub fail_import: bool,
}

#[derive(Debug)]
pub struct FakeVolume {
    pub line: u64,
    pub epoch: u64,
    pub base: LayerId,
    pub rows: Rows,
    pub dirty: bool,
    pub running: Option<CancellationToken>,
}

/// Cheap to clone: one world.
#[derive(Debug, Clone)]
pub struct FakeNode(pub Arc<Mutex<World>>);

pub const TEMPLATE: LayerId = LayerId::for_test(7);

impl FakeNode {
    pub fn new() -> Self {
        let mut world = World { free_bytes: u64::MAX, ..World::default() };
        world.layers.insert(TEMPLATE, (vec![TEMPLATE], Rows::new()));
        world.uploaded.insert(TEMPLATE);
        Self(Arc::new(Mutex::new(world)))
    }

    /// A client's committed write; the compute must run.
    pub fn write(&self, branch: BranchId, row: &str) {
        let mut world = self.0.lock();
        let volume = world.volumes.get_mut(&branch).expect("a volume");
        assert!(volume.running.is_some(), "nobody writes to a sleeping branch");
        volume.rows.insert(row.to_owned());
        volume.dirty = true;
        let (line, end) = (volume.line, Lsn(volume.rows.len() as u64 * 100));
        world.wal.entry((branch, line)).or_default().push((end, row.to_owned()));
    }

    /// What a client reads; the compute must run.
    pub fn rows(&self, branch: BranchId) -> Rows {
        let world = self.0.lock();
        let volume = world.volumes.get(&branch).expect("a volume");
        assert!(volume.running.is_some(), "nobody reads from a sleeping branch");
        volume.rows.clone()
    }

    /// The unit dies by itself.
    pub fn kill(&self, branch: BranchId) {
        let running = self.0.lock().volumes.get_mut(&branch).and_then(|volume| volume.running.take());
        running.expect("a running unit").cancel();
    }

    /// What a layer in the bucket holds, whatever this machine has.
    async fn in_bucket(&self, layer: LayerId) -> Result<Rows> {
        let bucket = self.0.lock().bucket.clone().expect("a bucket");
        Ok(Self::read(&bucket, layer).await?.1)
    }

    /// Makes a layer local, from the bucket if need be.
    async fn bring(&self, layer: LayerId) -> Result<()> {
        let bucket = {
            let world = self.0.lock();
            if world.layers.contains_key(&layer) {
                return Ok(());
            }
            world.bucket.clone().expect("a bucket")
        };
        let found = Self::read(&bucket, layer).await?;
        self.0.lock().layers.insert(layer, found);
        Ok(())
    }

    async fn read(bucket: &Bucket, layer: LayerId) -> Result<(Vec<LayerId>, Rows)> {
        let bytes = match bucket.get(&format!("layers/{layer}")).await {
            Err(ebb_storage::Error::NoSuchObject { .. }) => return Err(ebb_storage::Error::NoSuchLayer(layer).into()),
            bytes => bytes?,
        };
        serde_json::from_slice(&bytes).map_err(|error| {
            let what = format!("layer {layer}");
            Error::Storage(ebb_storage::Error::Corrupt { what, why: error.to_string() })
        })
    }

    pub fn is_running(&self, branch: BranchId) -> bool {
        self.0.lock().volumes.get(&branch).is_some_and(|volume| volume.running.is_some())
    }
}

impl World {
    fn seal(&mut self, data: &Line, id: LayerId) -> Option<Sealed> {
        let is = |volume: &&mut FakeVolume| (volume.line, volume.epoch) == (data.line, data.epoch);
        let volume = self.volumes.get_mut(&data.branch).filter(is)?;
        let new = volume.dirty;
        if new {
            let mut chain = self.layers[&volume.base].0.clone();
            assert!(!self.layers.contains_key(&id), "a layer was sealed twice with other content");
            // As real ones do, chains lose layers of which no page is left.
            if chain.len() > 3 {
                chain.remove(1);
            }
            chain.push(id);
            self.layers.insert(id, (chain, volume.rows.clone()));
            volume.base = id;
            volume.dirty = false;
        }
        Some(Sealed { layer: volume.base, new, end: Some(Lsn(volume.rows.len() as u64 * 100)) })
    }
}

#[async_trait]
impl Node for FakeNode {
    fn pg_major(&self, wanted: Option<u32>) -> Result<u32> {
        Ok(wanted.unwrap_or(15))
    }

    async fn template(&self, _: u32) -> Result<LayerId> {
        Ok(TEMPLATE)
    }

    async fn adopt(&self, branch: BranchId) -> Result<Option<PathBuf>> {
        Ok(self.is_running(branch).then(|| PathBuf::from(format!("/{branch}"))))
    }

    async fn start(&self, start: &Start) -> Result<PathBuf> {
        tokio::task::yield_now().await;
        let pauses = self.0.lock().start_pauses.take();
        if let Some([begun, go_on]) = pauses {
            begun.notify_one();
            go_on.notified().await;
        }
        self.fetch(start.data.head).await?;
        let mut world = self.0.lock();
        if std::mem::take(&mut world.fail_start) {
            return Err(ebb_compute::Error::Deadline("starting").into());
        }
        let branch = start.data.branch;
        let (line, epoch) = (start.data.line, start.data.epoch);
        let stale = world.volumes.get(&branch).is_some_and(|volume| (volume.line, volume.epoch) != (line, epoch));
        if stale {
            let old = world.volumes.remove(&branch).unwrap();
            assert!(old.running.is_none(), "a running volume was replaced");
            // Another node has been awake since: what this one had is of a history that was given up.
            assert!(!old.dirty || old.epoch != epoch, "commits were thrown away");
        }
        if !world.volumes.contains_key(&branch) {
            let rows = world.layers[&start.data.head].1.clone();
            let base = start.data.head;
            let volume = FakeVolume { line, epoch, base, rows, dirty: false, running: None };
            world.volumes.insert(branch, volume);
        }
        world.starts += 1;
        world.begun_here = start.begun_here;
        let volume = world.volumes.get_mut(&branch).unwrap();
        assert!(volume.running.is_none(), "two units on one volume");
        volume.running = Some(CancellationToken::new());
        Ok(PathBuf::from(format!("/{branch}")))
    }

    async fn seal(&self, data: &Line, id: LayerId) -> Result<Option<Sealed>> {
        Ok(self.0.lock().seal(data, id))
    }

    async fn ship(&self, _: BranchId) -> Result<()> {
        Ok(())
    }

    async fn fence_wal(&self, _: &Line) -> Result<()> {
        Ok(())
    }

    async fn forget_wal(&self, _: BranchId, _: u64, _: Lsn) -> Result<()> {
        Ok(())
    }

    async fn set_durability(&self, _: BranchId, _: Durability) -> Result<()> {
        Ok(())
    }

    async fn replay(&self, replay: &Replay, _: &Start) -> Result<Option<Lsn>> {
        self.bring(replay.base).await?;
        let mut world = self.0.lock();
        let (mut chain, mut rows) = world.layers[&replay.base].clone();
        let wal = world.wal.get(&(replay.branch, replay.line)).cloned().unwrap_or_default();
        rows.extend(wal.into_iter().filter(|(lsn, _)| replay.to.lsn().is_none_or(|to| *lsn <= to)).map(|(_, row)| row));
        let end = Lsn(rows.len() as u64 * 100);
        chain.push(replay.layer);
        world.layers.insert(replay.layer, (chain, rows));
        Ok(Some(end))
    }

    async fn stop(&self, data: &Line, id: LayerId) -> Result<Option<Sealed>> {
        let mut world = self.0.lock();
        let layer = world.seal(data, id);
        if let Some(running) = world.volumes.get_mut(&data.branch).and_then(|volume| volume.running.take()) {
            running.cancel();
        }
        Ok(layer)
    }

    async fn discard(&self, branch: BranchId) -> Result<()> {
        if let Some(running) = self.0.lock().volumes.get_mut(&branch).and_then(|volume| volume.running.take()) {
            running.cancel();
        }
        Ok(())
    }

    async fn gone(&self, branch: BranchId) {
        let running = self.0.lock().volumes.get(&branch).and_then(|volume| volume.running.clone());
        if let Some(running) = running {
            running.cancelled().await;
        }
    }

    async fn status(&self, branch: BranchId) -> Option<Status> {
        let dirty = self.0.lock().volumes.get(&branch).filter(|volume| volume.running.is_some())?.dirty;
        Some(Status {
            ready: true,
            postmaster_pid: None,
            wal_end: None,
            dirty,
            restarts: 0,
            stages: Vec::new(),
            fetched: ebb_storage::layer::Fetched::default(),
            shipping: None,
        })
    }

    async fn positions(&self, branch: BranchId) -> Result<Found> {
        let rows = self.0.lock().volumes[&branch].rows.len() as u64;
        Ok(Found { lsn: Some(Lsn(rows * 100)), next_xid: Some(rows), ..Found::default() })
    }

    async fn migrate(&self, branch: BranchId, order: &Order) -> Result<Migrated> {
        let mut world = self.0.lock();
        let fail = world.fail_migration.clone().or_else(|| world.fail_migration_later.clone());
        let volume = world.volumes.get_mut(&branch).expect("a volume");
        assert!(volume.running.is_some(), "migrations need a compute");
        let before = volume.rows.len();
        let migrated = apply(&mut volume.rows, order, fail.as_deref());
        volume.dirty |= volume.rows.len() > before;
        Ok(migrated)
    }

    async fn remove_volume(&self, branch: BranchId) -> Result<()> {
        let mut world = self.0.lock();
        if let Some(volume) = world.volumes.remove(&branch) {
            assert!(volume.running.is_none(), "a running volume was removed");
        }
        Ok(())
    }

    async fn remove_branch(&self, branch: BranchId) -> Result<()> {
        self.remove_volume(branch).await
    }

    async fn roles(&self, data: &Line) -> Result<Option<Roles>> {
        self.bring(data.head).await?;
        let world = self.0.lock();
        let of_volume = world.volumes.get(&data.branch).filter(|volume| volume.line == data.line);
        let rows = of_volume.map_or(&world.layers[&data.head].1, |volume| &volume.rows);
        let roles: Roles = rows
            .iter()
            .filter_map(|row| row.strip_prefix("role "))
            .map(|role| (role.to_owned(), Some(format!("verifier of {role}"))))
            .collect();
        Ok((!roles.is_empty()).then_some(roles))
    }

    async fn fetch(&self, layer: LayerId) -> Result<()> {
        self.bring(layer).await?;
        for below in self.chain(layer).await? {
            self.bring(below).await?;
        }
        Ok(())
    }

    async fn export(&self, layer: LayerId, dir: &Path) -> Result<u64> {
        self.bring(layer).await?;
        let rows = self.0.lock().layers[&layer].1.clone();
        std::fs::create_dir_all(dir).unwrap();
        let text = rows.into_iter().collect::<Vec<_>>().join("\n");
        std::fs::write(dir.join("rows"), &text).unwrap();
        Ok(text.len() as u64)
    }

    async fn chain(&self, layer: LayerId) -> Result<Vec<LayerId>> {
        Ok(self.0.lock().layers.get(&layer).map(|(chain, _)| chain.clone()).unwrap_or_default())
    }

    async fn upload(&self, layer: LayerId) -> Result<()> {
        let (bucket, bytes) = {
            let world = self.0.lock();
            let (chain, rows) = &world.layers[&layer];
            let below = &chain[..chain.len() - 1];
            assert!(below.iter().all(|below| world.uploaded.contains(below)), "a layer was uploaded before its chain");
            (world.bucket.clone(), serde_json::to_vec(&(chain, rows)).unwrap())
        };
        if let Some(bucket) = bucket {
            bucket.put(&format!("layers/{layer}"), bytes.into()).await?;
        }
        self.0.lock().uploaded.insert(layer);
        Ok(())
    }

    async fn redo(&self, layer: LayerId) -> Option<Lsn> {
        Some(Lsn(self.0.lock().layers.get(&layer)?.1.len() as u64 * 100))
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(self.0.lock().free_bytes)
    }

    async fn templates(&self) -> Result<Vec<(u32, LayerId)>> {
        Ok(vec![(15, TEMPLATE)])
    }

    async fn local_layers(&self) -> Result<BTreeSet<LayerId>> {
        Ok(self.0.lock().layers.keys().copied().collect())
    }

    async fn local_branches(&self) -> Result<BTreeSet<BranchId>> {
        Ok(self.0.lock().volumes.keys().copied().collect())
    }

    async fn volume_bases(&self, branch: BranchId) -> Result<BTreeSet<LayerId>> {
        Ok(self.0.lock().volumes.get(&branch).map(|volume| volume.base).into_iter().collect())
    }

    async fn whole_chain(&self, layer: LayerId) -> Result<Vec<LayerId>> {
        self.bring(layer).await?;
        self.chain(layer).await
    }

    async fn remove_layer(&self, layer: LayerId) -> Result<()> {
        let mut world = self.0.lock();
        let under = world.volumes.values().any(|volume| world.layers[&volume.base].0.contains(&layer));
        assert!(!under, "a volume lies on {layer}, which was removed");
        world.layers.remove(&layer);
        Ok(())
    }

    async fn unsealed_bytes(&self, branch: BranchId) -> Result<u64> {
        let world = self.0.lock();
        Ok(world.volumes.get(&branch).map_or(0, |volume| u64::from(volume.dirty)))
    }
}

#[async_trait]
impl Foreign for FakeNode {
    async fn dump(&self, dump: &Dump, like: &Start, to: &Path) -> Result<()> {
        assert!(!self.is_running(dump.scratch), "two computes in one directory");
        self.export(like.data.head, to).await.map(drop)
    }

    async fn import_look(&self, request: &ImportRequest) -> Result<(ImportFrom, Option<u32>)> {
        match request {
            ImportRequest::Directory(path) => Ok((ImportFrom::Directory(path.clone()), Some(15))),
            other => panic!("tests import directories, not {other:?}"),
        }
    }

    async fn import_copy(&self, job: &ImportJob) -> Result<()> {
        self.0.lock().staged.insert(job.scratch);
        let pause = self.0.lock().import_pauses.clone();
        if let Some(pause) = pause {
            pause.notified().await;
        }
        Ok(())
    }

    async fn import_settle(&self, job: &ImportJob) -> Result<()> {
        let world = self.0.lock();
        assert!(world.staged.contains(&job.scratch), "nothing was staged");
        match world.fail_import {
            true => {
                let (why, hint) = ("damaged".to_owned(), Some("Mend it.".to_owned()));
                Err(Error::Import { why, hint })
            }
            false => Ok(()),
        }
    }

    async fn import_seal(&self, job: &ImportJob) -> Result<Option<Lsn>> {
        let rows = Rows::from(["imported".to_owned()]);
        self.0.lock().layers.insert(job.layer, (vec![job.layer], rows));
        Ok(None)
    }

    async fn import_leave(&self, scratch: BranchId, layer: Option<LayerId>) -> Result<()> {
        let mut world = self.0.lock();
        world.staged.remove(&scratch);
        if let Some(layer) = layer {
            world.layers.remove(&layer);
        }
        Ok(())
    }
}

/// Applies what is not applied yet: each migration is a row, and a transaction.
fn apply(rows: &mut Rows, order: &Order, fail: Option<&str>) -> Migrated {
    let mut migrated = Migrated::default();
    for migration in &order.migrations {
        if fail == Some(&migration.name) {
            let (file, advice) = (migration.name.clone(), String::new());
            let message = "syntax error (SQLSTATE 42601)".to_owned();
            migrated.fault = Some(Error::Migration { file, message, advice });
            break;
        }
        if rows.insert(format!("migration {}", migration.name)) {
            migrated.runs.push(MigrationRun { file: migration.name.clone(), ..MigrationRun::default() });
            migrated.transactions += 1;
        }
    }
    migrated
}

/// `rows` is the only question: how many there are.
fn answer(rows: &Rows, sql: &str) -> Result<String> {
    match sql {
        "rows" => Ok(rows.len().to_string()),
        other => Err(Error::Postgres(format!("{other:?} is no question"))),
    }
}

#[async_trait]
impl Rehearsing for FakeNode {
    async fn rehearse(&self, order: &Order, probes: &[Probe], like: &Start) -> Result<Rehearsal> {
        self.bring(like.data.head).await?;
        let (mut rows, fail) = {
            let world = self.0.lock();
            (world.layers[&like.data.head].1.clone(), world.fail_migration.clone())
        };
        let migrated = apply(&mut rows, order, fail.as_deref());
        let mut rehearsal = Rehearsal { migrations: migrated.runs, ..Rehearsal::default() };
        rehearsal.fault = migrated.fault.map(|fault| fault.chain());
        for asked in probes {
            if let (Question::Sql { sql, expect }, None) = (&asked.question, &rehearsal.fault) {
                let found = &rows;
                let compare = || async move { probe::compare(&answer(found, sql), expect) };
                rehearsal.probes.push(probe::until_right(asked, compare).await);
            }
        }
        rehearsal.fault = rehearsal.fault.or_else(|| faults(&rehearsal.probes));
        Ok(rehearsal)
    }

    async fn ask(&self, branch: BranchId, sql: &str) -> Result<String> {
        let world = self.0.lock();
        let volume = world.volumes.get(&branch).expect("a volume");
        assert!(volume.running.is_some(), "probes need a compute");
        answer(&volume.rows, sql)
    }

    async fn applied(&self, branch: BranchId, _: &str) -> Result<u64> {
        let (base, rows) = {
            let world = self.0.lock();
            let volume = world.volumes.get(&branch).expect("a volume");
            (volume.base, volume.rows.clone())
        };
        self.bring(base).await?;
        let world = self.0.lock();
        let before = &world.layers[&base].1;
        Ok(rows.difference(before).filter(|row| row.starts_with("migration ")).count() as u64)
    }
}

#[async_trait]
impl Drills for FakeNode {
    async fn drill(&self, order: &drill::Order) -> Drilled {
        if self.0.lock().hang_drill {
            self.0.lock().drills.insert(order.scratch);
            std::future::pending::<()>().await;
        }
        let mut drilled = Drilled::default();
        self.0.lock().drills.insert(order.scratch);
        let base = order.replay.as_ref().map_or(order.start.data.head, |replay| replay.base);
        let rows = match self.in_bucket(base).await {
            Ok(rows) => rows.len() as u64,
            Err(error) => {
                drilled.fault = Some(Fault { what: error.chain(), kind: error.kind() });
                return drilled;
            }
        };
        drilled.report.restore_ms = Some(1);
        let found = vec![TableRows { table: "app.public.rows".to_owned(), rows }];
        match &order.rows {
            Some(known) if **known != *found => {
                let what = format!("{known:?} were {found:?}");
                drilled.fault = Some(Fault { what, kind: ErrorKind::Corrupt });
            }
            Some(_) => {}
            None => drilled.rows = found,
        }
        for probe in &order.probes {
            if probe.expect != rows.to_string() {
                let what = format!("the probe {:?} answers {rows}", probe.sql);
                drilled.fault = Some(Fault { what, kind: ErrorKind::Corrupt });
            }
        }
        drilled
    }

    async fn end_drill(&self, scratch: BranchId) -> Result<()> {
        self.0.lock().drills.remove(&scratch);
        Ok(())
    }

    async fn end_drills(&self) -> Result<()> {
        self.0.lock().drills.clear();
        Ok(())
    }

    async fn image_bytes(&self, layer: LayerId) -> Result<Option<u64>> {
        Ok(self.0.lock().layers.get(&layer).map(|(_, rows)| rows.len() as u64 * 1000))
    }
}

#[async_trait]
impl Visiting for FakeNode {
    async fn visit(&self, start: &Start, replay: Option<&Replay>, _: bool) -> Result<Visited> {
        tokio::task::yield_now().await;
        let (visit, mut head) = (start.data.branch, start.data.head);
        self.leave(visit).await?;
        if let Some(replay) = replay {
            self.replay(replay, start).await?;
            head = replay.layer;
        }
        self.bring(head).await?;
        let mut world = self.0.lock();
        if std::mem::take(&mut world.fail_start) {
            return Err(ebb_compute::Error::Deadline("starting").into());
        }
        world.starts += 1;
        world.visits.insert(visit, replay.map(|replay| replay.layer));
        let rows = world.layers[&head].1.clone();
        let volume = FakeVolume {
            line: 0,
            epoch: 0,
            base: start.data.head,
            rows,
            dirty: false,
            running: Some(CancellationToken::new()),
        };
        world.volumes.insert(visit, volume);
        let (socket, roles) = (PathBuf::from(format!("/{visit}")), BTreeSet::from(["app".to_owned()]));
        Ok(Visited { socket, roles, layer: head })
    }

    async fn same_files(&self, _: LayerId, _: LayerId) -> Result<BTreeMap<String, FilePages>> {
        Ok(BTreeMap::new())
    }

    async fn dump_schema(&self, _: u32, _: &Path, _: &str) -> Result<String> {
        Ok(String::new())
    }

    async fn leave(&self, visit: BranchId) -> Result<()> {
        self.discard(visit).await?;
        let mut world = self.0.lock();
        world.volumes.remove(&visit);
        if let Some(Some(layer)) = world.visits.remove(&visit) {
            world.layers.remove(&layer);
        }
        Ok(())
    }

    async fn visits(&self) -> Result<BTreeSet<BranchId>> {
        Ok(self.0.lock().visits.keys().copied().collect())
    }
}

/// Clients as a test wants them.
#[derive(Debug, Default)]
pub struct TestClients {
    pub activity: StdMutex<Activity>,
    pub pinned: AtomicBool,
    pub fenced: StdMutex<Vec<BranchId>>,
    pub lost: StdMutex<Vec<(BranchId, u64)>>,
    pub forgotten: StdMutex<Vec<BranchId>>,
}

#[async_trait]
impl Clients for TestClients {
    fn activity(&self, _: BranchId) -> Activity {
        *self.activity.lock().unwrap()
    }

    fn sessions(&self, _: BranchId) -> Vec<SessionRow> {
        Vec::new()
    }

    async fn fence(&self, branch: BranchId, _: Duration, rest: Rest) -> Result<(), Vec<SessionRow>> {
        if self.pinned.load(Ordering::SeqCst) && rest == Rest::Refuse {
            return Err(vec![SessionRow {
                conn: 4,
                role: "app".to_owned(),
                database: "app".to_owned(),
                application: String::new(),
                peer: "127.0.0.1:5".to_owned(),
                node: None,
                state: "pinned".to_owned(),
                reason: Some("temporary table".to_owned()),
                since_seconds: 1.0,
            }]);
        }
        self.fenced.lock().unwrap().push(branch);
        Ok(())
    }

    fn release(&self, branch: BranchId) {
        self.fenced.lock().unwrap().retain(|fenced| *fenced != branch);
    }

    fn forget(&self, branch: BranchId) {
        self.forgotten.lock().unwrap().push(branch);
    }

    fn lost(&self, branch: BranchId, generation: u64) {
        self.lost.lock().unwrap().push((branch, generation));
    }
}

/// A machine with its disk and bucket, on which services come and go.
pub struct Rig {
    pub dir: tempfile::TempDir,
    pub node: FakeNode,
    pub bucket: Bucket,
    pub clients: Arc<TestClients>,
}

impl Rig {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bucket = object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
        let node = FakeNode::new();
        node.0.lock().bucket = Some(bucket.clone());
        node.upload(TEMPLATE).await.unwrap();
        Self { dir, node, bucket, clients: Arc::default() }
    }

    pub fn config(&self) -> ServiceConfig {
        ServiceConfig {
            data_dir: self.dir.path().join("data"),
            exe: "/nonexistent".into(),
            default_idle_suspend: Duration::from_secs(300),
            proxy_public_host: "127.0.0.1".to_owned(),
            proxy_public_port: 6432,
            proxy_domain: "localhost".to_owned(),
            ca_pem: Some("/tls/ca.pem".into()),
            min_free_bytes: 1000,
            node_name: "one".to_owned(),
            node_ttl: Duration::from_secs(30),
            layers: crate::LayerPolicy::default(),
            collect: crate::CollectPolicy::default(),
        }
    }

    pub async fn open_with(&self, bucket: Bucket) -> Result<Arc<Service>> {
        self.open_at(bucket, Duration::ZERO, Arc::new(SystemClock)).await
    }

    /// A service with another clock, that keeps what nothing needs for this long.
    pub async fn open_at(&self, bucket: Bucket, grace: Duration, clock: Arc<dyn Clock>) -> Result<Arc<Service>> {
        let (clients, node) = (self.clients.clone(), Arc::new(self.node.clone()));
        let collect = crate::CollectPolicy { grace, ..crate::CollectPolicy::default() };
        Service::open_on(ServiceConfig { collect, ..self.config() }, bucket, clients, node, clock).await
    }

    pub async fn open(&self) -> Arc<Service> {
        self.open_with(self.bucket.clone()).await.unwrap()
    }

    /// A service as if its process were killed: what it had begun stays as it is.
    pub async fn kill(&self, service: Arc<Service>) {
        service.stopping.cancel();
        service.tasks.close();
        service.tasks.wait().await;
        self.clients.fenced.lock().unwrap().clear();
    }

    pub fn artifact(&self, name: &str, migrations: &[&str]) -> std::path::PathBuf {
        let dir = self.dir.path().join("source").join(name);
        fs::create_dir_all(dir.join("migrations")).unwrap();
        fs::write(dir.join("name"), name).unwrap();
        for migration in migrations {
            fs::write(dir.join("migrations").join(migration), "select 1").unwrap();
        }
        dir
    }

    /// What `current` of the project shows.
    pub fn code(&self) -> Option<String> {
        fs::read_to_string(self.dir.path().join("data/projects/shop/current/name")).ok()
    }
}
