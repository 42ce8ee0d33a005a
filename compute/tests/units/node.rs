//! A node for a test: a data directory with the template layer in it, branches, and a watch over their processes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ebb_compute::control::Durability;
use ebb_compute::manager::{Unit, UnitSpec};
use ebb_compute::postgres::{self, Installation};
use ebb_storage::node::NodeStore;
use ebb_storage::volume::{Volume, VolumeDirs};
use ebb_types::{BranchId, LayerId};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio_postgres::{NoTls, SimpleQueryMessage};

/// A verifier of some password.
pub const VERIFIER: &str = "SCRAM-SHA-256$4096:c2FsdHNhbHRzYWx0c2FsdA==$\
    1+IwMnTKXyLmF6oBF5xPWGGDKV7bEMzEVc1VBVmmmmA=:q83vASNFZ4mrze8BI0VniavN7wEjRWeJq83vASNFZ4k=";

/// LIMIT: for anything a unit does in a second on an idle machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub struct Node {
    dir: TempDir,
    pub store: NodeStore,
    pub template: LayerId,
    pub exe: PathBuf,
    installation: Installation,
    branches: RefCell<Vec<PathBuf>>,
}

impl Node {
    pub async fn new() -> Self {
        let installation = postgres::find(None).expect("these tests need a Postgres server");
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let template = cached_template(&installation, cache).await;
        let dir = TempDir::new_in(cache).unwrap();
        let copied = Command::new("cp").arg("-al").arg(&template).arg(dir.path().join("layers")).status().unwrap();
        assert!(copied.success());
        let name = fs::read_dir(&template).unwrap().next().unwrap().unwrap().file_name();
        let bucket = ebb_storage::object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
        Self {
            store: NodeStore::new(dir.path(), bucket),
            template: name.to_str().unwrap().parse().unwrap(),
            exe: std::env::current_exe().unwrap(),
            dir,
            installation,
            branches: RefCell::default(),
        }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn bucket_dir(&self) -> PathBuf {
        self.dir().join("bucket")
    }

    pub fn layers(&self) -> PathBuf {
        self.dir().join("layers")
    }

    pub fn dirs(&self, spec: &UnitSpec) -> VolumeDirs {
        VolumeDirs { layers: spec.layers_dir.clone(), branch: spec.branch_dir.clone(), source: None }
    }

    /// A new branch with a volume.
    pub fn branch(&self, base: LayerId) -> UnitSpec {
        self.branch_in(&self.dir().join("branches"), base)
    }

    /// A new branch on another one's image.
    pub fn fork(&self, base: LayerId) -> UnitSpec {
        let spec = UnitSpec { fork: true, ..self.branch(base) };
        Volume::remove(&self.dirs(&spec)).unwrap();
        Volume::create_fork(&self.dirs(&spec), base).unwrap();
        spec
    }

    pub fn branch_in(&self, parent: &Path, base: LayerId) -> UnitSpec {
        let branch = BranchId::generate();
        let spec = UnitSpec {
            branch,
            branch_dir: parent.join(branch.to_string()),
            layers_dir: self.layers(),
            pg_bin: self.installation.bin.clone(),
            settings: Vec::new(),
            recovery: None,
            fork: false,
            bucket: None,
            hydrate: false,
            initial_roles: Vec::new(),
            archive: None,
            durability: Durability::Local,
        };
        fs::create_dir_all(&spec.branch_dir).unwrap();
        Volume::create(&self.dirs(&spec), base).unwrap();
        self.branches.borrow_mut().push(spec.branch_dir.clone());
        spec
    }

    pub async fn start(&self, spec: &UnitSpec) -> Unit {
        match Unit::start(&self.exe, spec).await {
            Ok(unit) => unit,
            Err(error) => panic!("{error}: {}", told(&spec.branch_dir)),
        }
    }

    fn told(&self, unit: &Unit) -> String {
        told(unit.socket().parent().and_then(Path::parent).expect("a socket is in run/"))
    }

    pub async fn stop(&self, unit: Unit) -> LayerId {
        unit.stop(LayerId::generate()).await.unwrap().layer
    }

    /// Runs SQL as the superuser and answers the last value of the last row.
    pub async fn sql(&self, unit: &Unit, sql: &str) -> String {
        self.try_sql(unit, sql).await.unwrap()
    }

    pub async fn try_sql(&self, unit: &Unit, sql: &str) -> Result<String, Box<dyn std::error::Error>> {
        let (client, connection) = connect(unit).await?;
        let rows = client.simple_query(sql).await?;
        drop(client);
        connection.await??;
        let values = rows.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(row.len() - 1),
            _ => None,
        });
        Ok(values.last().unwrap_or_default().to_owned())
    }

    /// Inserts rows into `t`, one commit each, from the one after the last acknowledged, until `end` or a failure.
    pub async fn write_rows(
        &self,
        unit: &Unit,
        acknowledged: &AtomicU32,
        end: &AtomicBool,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let (client, _connection) = connect(unit).await?;
        while !end.load(Relaxed) {
            let n = acknowledged.load(Relaxed) + 1;
            // The outcome of the last one before a kill is unknown: it may be there.
            let insert = format!("INSERT INTO t VALUES ({n}, repeat('x', 500)) ON CONFLICT DO NOTHING");
            client.batch_execute(&insert).await?;
            acknowledged.store(n, Relaxed);
        }
        Ok(())
    }

    /// Waits until Postgres has been restarted so often and answers.
    pub async fn until_restarted(&self, unit: &Unit, times: u32) {
        let begun = Instant::now();
        loop {
            let status = match unit.status().await {
                Ok(status) => status,
                Err(error) => panic!("{error}: {}", self.told(unit)),
            };
            if status.ready && status.restarts >= times {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "postgres was not restarted: {status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn roles(&self, spec: &UnitSpec) -> Option<BTreeMap<String, String>> {
        serde_json::from_slice(&fs::read(spec.branch_dir.join("roles.json")).ok()?).ok()
    }

    pub fn unit_pid(&self, spec: &UnitSpec) -> u32 {
        unit_pid(&spec.branch_dir).expect("there is a unit")
    }

    /// Every process in the unit's namespace, by the host's numbers.
    pub fn processes(&self, spec: &UnitSpec) -> Vec<u32> {
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let of_unit = namespace(self.unit_pid(spec)).expect("there is a unit");
        assert_ne!(Some(&of_unit), fs::read_link("/proc/self/ns/pid").ok().as_ref(), "the unit has no namespace");
        let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        all.filter(|pid| namespace(*pid).as_ref() == Some(&of_unit)).collect()
    }

    /// Waits until none of them is left. They are on their last instructions when the lock is free, so this is short;
    /// zombies that only wait for their parent do not count.
    pub async fn until_dead(&self, processes: &[u32]) {
        let runs = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/stat"))
                .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
        };
        until("its processes to end", || !processes.iter().any(runs)).await;
    }

    /// What the host sees mounted of a branch: nothing, ever.
    pub fn mounts_of(&self, spec: &UnitSpec) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let of_branch = |line: &&str| line.contains(spec.branch_dir.to_str().unwrap()) || line.contains(" /mnt/data ");
        mounts.lines().filter(of_branch).map(str::to_owned).collect()
    }
}

impl Drop for Node {
    /// A test that failed leaves units; they go with it.
    fn drop(&mut self) {
        for dir in self.branches.borrow().iter() {
            if let Some(pid) = unit_pid(dir)
                && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|command| {
                    String::from_utf8_lossy(&command).contains(dir.to_str().expect("test paths are text"))
                })
            {
                kill(pid);
            }
        }
    }
}

type Connection = tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>;

/// Connects as the superuser.
async fn connect(unit: &Unit) -> Result<(tokio_postgres::Client, Connection), Box<dyn std::error::Error>> {
    let socket = unit.socket();
    let dir = File::open(socket.parent().unwrap())?;
    let name = socket.file_name().unwrap().to_str().unwrap();
    let stream = UnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())).await?;
    let mut config = tokio_postgres::Config::new();
    let (client, connection) = config.user("postgres").dbname("app").connect_raw(stream, NoTls).await?;
    Ok((client, tokio::spawn(connection)))
}

/// The directory with the template's layer, made once for each server version.
async fn cached_template(installation: &Installation, cache: &Path) -> PathBuf {
    fs::create_dir_all(cache).unwrap();
    let done = cache.join(format!("template-{}", installation.version));
    let lock = File::create(cache.join("template.lock")).unwrap();
    let _lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await.unwrap().unwrap();
    if !done.exists() {
        let scratch = TempDir::new_in(cache).unwrap();
        let cluster = scratch.path().join("cluster");
        postgres::make_template(installation, &cluster).await.unwrap();
        let bucket = ebb_storage::object_store::open(scratch.path().join("bucket").to_str().unwrap()).await.unwrap();
        NodeStore::new(scratch.path(), bucket).import(&cluster).await.unwrap();
        fs::rename(scratch.path().join("layers"), &done).unwrap();
    }
    done
}

/// What a unit and its Postgres wrote.
fn told(branch_dir: &Path) -> String {
    let read = |name| fs::read_to_string(branch_dir.join(name)).unwrap_or_default();
    ["unit.err", "unit.log", "postgres.log"].map(|name| format!("\n--- {name}\n{}", read(name))).concat()
}

fn unit_pid(branch_dir: &Path) -> Option<u32> {
    fs::read_to_string(branch_dir.join("unit.pid")).ok()?.trim().parse().ok()
}

/// Those whose command line has this word in it.
pub fn processes_like(processes: &[u32], word: &str) -> Vec<u32> {
    let command = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let has = |pid: &u32| String::from_utf8_lossy(&command(*pid)).contains(word);
    processes.iter().copied().filter(has).collect()
}

pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

pub fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// Waits for a condition.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
