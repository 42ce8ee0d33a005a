//! A branch under load, and what must hold of it after every crash.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ebb_tests::{Node, PATIENCE, Writer, pg_bin, wait_for, within};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

pub const BRANCH: &str = "shop/prod";

/// What the owner of a database does to its tables. Each may fail: a crash may have come between two of them.
const DDL: [&str; 16] = [
    "create table if not exists t1 as select n, repeat('x', 100) as filler from generate_series(1, 2000) n",
    "create index on t1 (n)",
    "alter table t1 add column if not exists extra int default 7",
    "vacuum full t1",
    "truncate t1",
    "insert into t1 select n, repeat('y', 100) from generate_series(1, 500) n",
    "drop table if exists t1",
    "create table if not exists t2 (n int primary key, t text)",
    "insert into t2 select n, md5(n::text) from generate_series(1, 1000) n on conflict do nothing",
    "cluster t2 using t2_pkey",
    "delete from t2 where n % 3 = 0",
    "vacuum t2",
    "drop table if exists t2",
    "vacuum full pgbench_tellers",
    "create database other",
    "drop database if exists other",
];

/// What Postgres, dying, says of files when the unit was killed a moment before it, or when the disk has stopped. A unit
/// that lives never hears of it: see [`assert_disk_answered`].
const DYING: [&str; 4] = [
    "Input/output error",
    "Software caused connection abort",
    "Transport endpoint is not connected",
    // Whoever asked for a checkpoint is told this; the reason is told to the log, which is dead by then.
    "checkpoint request failed",
];

fn is_dying(error: &str) -> bool {
    DYING.iter().any(|words| error.contains(words))
}

/// One of the two tables is there at any moment: both statements of the exchange, or none.
const EXCHANGE: [&str; 2] = [
    "begin; drop table if exists ping; create table if not exists pong (n int); commit",
    "begin; drop table if exists pong; create table if not exists ping (n int); commit",
];

/// The seed of a run: `EBB_TEST_SEED`, or a new one. A run prints it, and draws from it whatever is left to chance.
pub fn seed() -> u64 {
    let given = std::env::var("EBB_TEST_SEED").ok().map(|text| text.parse().expect("EBB_TEST_SEED is a number"));
    let seed = given.unwrap_or_else(|| rand::random::<u64>() >> 16);
    println!("EBB_TEST_SEED={seed}");
    seed
}

/// How many rounds: `EBB_CRASH_ROUNDS`, or so many.
pub fn rounds(default: u64) -> u64 {
    let given = std::env::var("EBB_CRASH_ROUNDS").ok();
    given.map_or(default, |text| text.parse().expect("EBB_CRASH_ROUNDS is a number"))
}

/// Everything that works on the branch.
pub struct Load {
    pub writer: Writer,
    pgbench: Pgbench,
    ddl: Ddl,
    url: String,
}

impl Load {
    /// Makes the tables and begins.
    pub async fn start(node: &Node, seed: u64) -> Self {
        let url = node.url(BRANCH);
        let ran = node.tool("pgbench", &["-i", "-q", "-s", "1", &url]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        node.psql(BRANCH, "create table ping (n int)");
        Self::resume(node, seed, 0).await
    }

    /// Goes on after [`Load::stop`], which told the last row.
    pub async fn resume(node: &Node, seed: u64, last: i64) -> Self {
        let url = node.url(BRANCH);
        let writer = Writer::start_after(url.clone(), last).await;
        let (pgbench, ddl) = (Pgbench::start(&url), Ddl::start(url.clone(), seed));
        Self { writer, pgbench, ddl, url }
    }

    /// Waits until the branch works again after a crash, and everybody on it.
    pub async fn recovered(&mut self) {
        self.writer.progress(3).await;
        self.pgbench = Pgbench::start(&self.url);
    }

    /// Ends it; answers the last row that was acknowledged. No client may have seen an error of class XX, but for what
    /// a dying Postgres says, after which there is no Postgres.
    pub async fn stop(self) -> i64 {
        let (last, mut errors) = self.writer.stop().await;
        errors.retain(|error| !is_dying(error));
        drop(self.pgbench);
        errors.extend(self.ddl.stop().await);
        errors.retain(|error| error.starts_with("XX"));
        assert!(errors.is_empty(), "corruption was reported: {errors:?}");
        last
    }
}

/// TPC-B, until it is dropped or its connection breaks.
///
/// Each of its clients has a thread: `PREPARE` waits for its answer (PostgreSQL 15 `pgbench.c`, `prepareCommand`), so that
/// with one thread for both a client whose `PREPARE` waits for a lock keeps the other, which has it, from ending its
/// transaction. Whoever wants a stronger lock than both then waits for ever, and everybody behind them.
struct Pgbench(Child);

impl Pgbench {
    fn start(url: &str) -> Self {
        let child = Command::new(pg_bin().join("pgbench"))
            .args(["-n", "-T", "86400", "-M", "prepared", "-c", "2", "-j", "2", url])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.expect("pgbench can be started"))
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client that does one thing after the other to the schema.
struct Ddl {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<String>>,
}

impl Ddl {
    fn start(url: String, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(change(url, stop.clone(), StdRng::seed_from_u64(seed)));
        Self { stop, task }
    }

    async fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::SeqCst);
        within("the client that changes the schema", self.task).await.expect("it does not panic")
    }
}

/// Answers the errors it was given, those of Postgres with their SQLSTATE first.
async fn change(url: String, stop: Arc<AtomicBool>, mut rng: StdRng) -> Vec<String> {
    let mut errors = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let Ok((client, connection)) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        tokio::spawn(async move {
            let _ = connection.await;
        });
        while !client.is_closed() && !stop.load(Ordering::SeqCst) {
            let sql = match rng.random_range(0..4) {
                0 => EXCHANGE[rng.random_range(0..EXCHANGE.len())],
                _ => DDL[rng.random_range(0..DDL.len())],
            };
            if let Err(error) = client.batch_execute(sql).await {
                let told = error.as_db_error().map(|db| format!("{} {} ({sql})", db.code().code(), db.message()));
                let told = told.unwrap_or_else(|| error.to_string());
                if !(is_dying(&told) && is_left(&client).await) {
                    errors.push(told);
                }
            }
        }
    }
    errors
}

/// Whether the server goes away.
async fn is_left(client: &Client) -> bool {
    let left = async {
        while !client.is_closed() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, left).await.is_ok()
}

/// What holds of a branch at any moment, also of one that was taken in the middle; and that no row is lost that was
/// acknowledged before.
pub fn assert_whole(node: &Node, branch: &str, last: i64) {
    let row = node.psql(
        branch,
        &format!(
            "select (select sum(abalance) from pgbench_accounts) = h.delta, \
                    (select sum(bbalance) from pgbench_branches) = h.delta, \
                    (select sum(tbalance) from pgbench_tellers) = h.delta, \
                    (select count(*) = coalesce(max(n), 0) and count(*) >= {last} from acknowledged), \
                    (select count(*) from pg_tables where tablename in ('ping', 'pong')) \
             from (select coalesce(sum(delta), 0) as delta from pgbench_history) h"
        ),
    );
    assert_eq!(row, "t|t|t|t|1", "of {branch}: three sums, {last} rows and more without gaps, one of two tables");
}

/// That no acknowledged row is lost.
pub fn assert_all_there(node: &Node, last: i64) {
    let count = node.psql(BRANCH, &format!("select count(*) from acknowledged where n <= {last}"));
    assert_eq!(count, last.to_string(), "an acknowledged row is lost");
}

/// That every page and every index of every database is as it should be. Nobody may change the schema meanwhile.
pub fn assert_sound(node: &Node) {
    assert_no_findings(node, BRANCH, "-a");
}

/// The same of a branch that was taken, in the database that the load is on.
pub fn assert_branch_sound(node: &Node, branch: &str) {
    assert_no_findings(node, branch, "-dapp");
}

fn assert_no_findings(node: &Node, branch: &str, databases: &str) {
    let ran = node.superuser_tool(branch, "pg_amcheck", &["--install-missing", "--heapallindexed", databases]);
    assert_eq!(ran.code, 0, "{branch}: {}{}", ran.stdout, ran.stderr);
}

/// That Postgres has met no error of a file while its unit lived: the log is the unit's, and ends with it, before the
/// kernel tells Postgres that nobody serves the volume any more.
pub fn assert_disk_answered(node: &Node) {
    let log =
        fs::read_to_string(node.branch_dir(BRANCH).join("postgres.log")).expect("a branch that was awake has a log");
    assert_eq!(log.lines().find(|line| is_dying(line)), None);
}

/// That every page has its checksum, in an export of the branch.
pub fn assert_checksums(node: &Node) {
    node.suspend(BRANCH);
    let dir = node.scratch().join("export");
    let dir = dir.to_str().expect("test paths are UTF-8");
    node.ok(&["export", BRANCH, dir]);
    let ran = node.tool("pg_checksums", &["--check", "-D", dir]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
}

/// The moment of a crash: some time after the load is back.
pub async fn some_time(rng: &mut StdRng, most: Duration) {
    tokio::time::sleep(most.mul_f64(rng.random())).await;
}

/// Kills the branch's unit, and whatever is left of it, and waits until all of it is gone.
pub fn kill_unit(node: &Node) {
    let pid = node.unit_pid(BRANCH);
    node.kill_9(pid);
    wait_for("the unit to be gone", || !Path::new(&format!("/proc/{pid}")).exists());
}

/// Where a run is and where its time went: for whoever reads of its failure.
pub struct Run {
    seed: u64,
    rounds: u64,
    round: u64,
    step: &'static str,
    begun: Instant,
    step_begun: Instant,
    told: Instant,
    spent: BTreeMap<&'static str, Duration>,
    branch_dir: PathBuf,
}

impl Run {
    /// A run of so many rounds on a node, which must outlive it: what is told of a failure is looked for there.
    pub fn new(node: &Node, seed: u64, rounds: u64) -> Self {
        let now = Instant::now();
        let branch_dir = node.branch_dir(BRANCH);
        let spent = BTreeMap::new();
        Self { seed, rounds, round: 0, step: "begin", begun: now, step_begun: now, told: now, spent, branch_dir }
    }

    /// A round begins.
    pub fn round(&mut self, round: u64) {
        self.round = round;
    }

    /// A step begins, and the one before has ended.
    pub fn step(&mut self, step: &'static str) {
        *self.spent.entry(self.step).or_default() += self.step_begun.elapsed();
        (self.step, self.step_begun) = (step, Instant::now());
    }

    /// Tells every so often how far a long run has come.
    pub fn tell(&mut self, last: i64) {
        if self.told.elapsed() > Duration::from_secs(60) {
            self.told = Instant::now();
            println!("round {} after {} s, {last} rows acknowledged", self.round, self.begun.elapsed().as_secs());
        }
    }

    /// Tells the outcome.
    pub fn end(mut self, last: i64) {
        self.step("end");
        println!("{} rounds in {} s, {last} rows acknowledged, none lost", self.rounds, self.begun.elapsed().as_secs());
        self.spent.iter().for_each(|(step, spent)| println!("{:8.1} s  {step}", spent.as_secs_f64()));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let (since, step) = (self.step_begun.elapsed().as_secs_f64(), self.step);
        eprintln!(
            "--- EBB_TEST_SEED={}, round {} of {}, {since:.1} s into: {step}",
            self.seed, self.round, self.rounds
        );
        processes(&self.branch_dir).iter().for_each(|line| eprintln!("{line}"));
        let told = Command::new(pg_bin().join("psql"))
            .env("PGCONNECT_TIMEOUT", "5")
            .arg("-h")
            .arg(self.branch_dir.join("run"))
            .args(["-U", "postgres", "-d", "postgres", "-XAt", "-c", WHO_WAITS])
            .output();
        match told {
            Ok(told) => eprintln!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr)),
            Err(error) => eprintln!("psql cannot be started: {error}"),
        }
        // The logs are told by the node.
    }
}

const WHO_WAITS: &str = "select pid, application_name, state, wait_event_type, wait_event, pg_blocking_pids(pid), \
    state_change, left(query, 80) from pg_stat_activity where backend_type = 'client backend'";

/// The processes of a branch's unit and of this test, and what each waits for in the kernel.
fn processes(branch_dir: &Path) -> Vec<String> {
    let unit = fs::read_to_string(branch_dir.join("unit.pid")).unwrap_or_default();
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let of_unit = namespace(unit.trim());
    let own = format!("PPid:\t{}\n", std::process::id());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    pids.filter_map(|pid| {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
        let status = read("status")?;
        if !status.contains(&own) && (of_unit.is_none() || namespace(&pid) != of_unit) {
            return None;
        }
        let state = status.lines().find_map(|line| line.strip_prefix("State:\t"))?;
        let (waits, command) = (read("wchan")?, read("cmdline")?.replace('\0', " "));
        Some(format!("{pid} {state} {waits}: {}", command.chars().take(120).collect::<String>()))
    })
    .collect()
}
