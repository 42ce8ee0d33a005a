//! Stock Postgres on a volume: its own way of life, a seal in the middle of it, crashes, and a branch of that seal.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::super::{Mount, MountOptions};
use super::compact::compact;
use super::*;
use crate::node::NodeStore;

const BIN: &str = "/usr/lib/postgresql/15/bin";

/// How long anything may take on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(60);

/// The user Postgres runs as: the package's when we are root, else ours.
fn user() -> (u32, u32) {
    if !rustix::process::geteuid().is_root() {
        return (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    }
    let id = |flag: &str| {
        let output = Command::new("id").args([flag, "postgres"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    };
    (id("-u"), id("-g"))
}

/// A program of Postgres, as that user.
fn program(name: &str) -> Command {
    let mut command = if rustix::process::geteuid().is_root() {
        let (uid, gid) = user();
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()]);
        command.arg(format!("{BIN}/{name}"));
        command
    } else {
        Command::new(format!("{BIN}/{name}"))
    };
    command.env("LC_ALL", "C").current_dir("/");
    command
}

fn check(output: &Output, what: &str) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what} failed\n{out}\n{err}");
    out.into_owned()
}

fn run(mut command: Command) -> String {
    let what = format!("{command:?}");
    check(&command.output().unwrap(), &what)
}

/// A cluster as initdb makes it, imported as a layer.
fn cluster(node: &Node) -> LayerId {
    let dir = node.dir.path();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let source = dir.join("initdb");
    fs::create_dir(&source).unwrap();
    let (uid, gid) = user();
    std::os::unix::fs::chown(&source, Some(uid), Some(gid)).unwrap();
    let mut initdb = program("initdb");
    initdb.args(["-k", "-N", "-A", "trust", "-U", "postgres", "-D"]).arg(&source);
    run(initdb);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let bucket = crate::object_store::open(dir.join("bucket").to_str().unwrap()).await.unwrap();
        NodeStore::new(dir, bucket).import(&source).await.unwrap()
    })
}

/// Postgres on the volume of a branch.
struct Server {
    volume: Arc<Volume>,
    mount: Option<Mount>,
    postmaster: Option<Child>,
    sockets: PathBuf,
    data: PathBuf,
}

impl Server {
    fn new(node: &Node, branch: usize) -> Self {
        let dirs = node.dirs(branch);
        let volume = Volume::open(&dirs).unwrap();
        let (data, sockets) = (dirs.branch.join("data"), dirs.branch.join("run"));
        let (uid, gid) = user();
        for dir in [&data, &sockets] {
            fs::create_dir_all(dir).unwrap();
            std::os::unix::fs::chown(dir, Some(uid), Some(gid)).unwrap();
        }
        let options = MountOptions { uid, gid, allow_other: rustix::process::geteuid().is_root(), threads: 2 };
        let mount = Some(volume.mount(&data, &options).unwrap());
        let mut server = Self { volume, mount, postmaster: None, sockets, data };
        server.start();
        server
    }

    /// Starts Postgres and waits until it takes queries.
    fn start(&mut self) {
        // What an image of a running server has, and nobody runs any more.
        let _ = fs::remove_file(self.data.join("postmaster.pid"));
        let log = fs::File::options().create(true).append(true).open(self.sockets.with_extension("log")).unwrap();
        let mut command = program("postgres");
        command.arg("-D").arg(&self.data).args(["-c", "listen_addresses="]);
        command.arg("-c").arg(format!("unix_socket_directories={}", self.sockets.display()));
        for setting in ["wal_recycle=off", "wal_init_zero=off", "max_wal_size=64MB", "checkpoint_timeout=30s"] {
            command.args(["-c", setting]);
        }
        command.stderr(log).stdout(Stdio::null());
        self.postmaster = Some(command.spawn().unwrap());
        let begun = Instant::now();
        while self.try_psql("postgres", "SELECT 1").is_err() {
            let exited = self.postmaster.as_mut().unwrap().try_wait().unwrap();
            assert!(exited.is_none() && begun.elapsed() < PATIENCE, "Postgres does not start:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.sockets.with_extension("log")).unwrap_or_default()
    }

    fn client(&self, name: &str) -> Command {
        let mut command = program(name);
        command.env("PGHOST", &self.sockets).env("PGUSER", "postgres");
        command
    }

    fn try_psql(&self, database: &str, sql: &str) -> Result<String, String> {
        let output = self.client("psql").args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]).output();
        let output = output.unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn psql(&self, sql: &str) -> String {
        self.try_psql("postgres", sql).unwrap_or_else(|error| panic!("{sql}: {error}\n{}", self.log()))
    }

    fn pgbench(&self, arguments: &[&str]) -> Command {
        let mut command = self.client("pgbench");
        command.args(arguments).arg("postgres");
        command
    }

    /// As an out-of-memory killer would. Returns when all of its processes are gone.
    fn kill(&mut self) {
        let mut postmaster = self.postmaster.take().unwrap();
        postmaster.kill().unwrap();
        postmaster.wait().unwrap();
        let begun = Instant::now();
        // Its children notice, and let go of the lock on the shared memory.
        while is_in_use(&self.data) {
            assert!(begun.elapsed() < PATIENCE, "processes of Postgres outlive the postmaster");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A fast shutdown.
    fn stop(&mut self) {
        let mut postmaster = self.postmaster.take().unwrap();
        let pid = rustix::process::Pid::from_child(&postmaster);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        assert!(postmaster.wait().unwrap().success(), "{}", self.log());
    }

    /// Stops and unmounts.
    fn end(mut self) -> Arc<Volume> {
        self.stop();
        self.mount.take().unwrap().unmount().unwrap();
        self.volume.clone()
    }

    /// The sums that TPC-B keeps equal.
    fn check_balances(&self) {
        let sums = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
                    (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)";
        let sums = self.psql(sums);
        let sums: Vec<_> = sums.split('|').collect();
        assert!(sums.windows(2).all(|pair| pair[0] == pair[1]), "{sums:?}");
    }

    /// Every page and index of every database.
    fn check_integrity(&self) {
        self.psql("CREATE EXTENSION IF NOT EXISTS amcheck");
        let mut amcheck = self.client("pg_amcheck");
        amcheck.args(["--all", "--heapallindexed"]);
        let found = run(amcheck);
        assert!(found.is_empty(), "{found}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut postmaster) = self.postmaster.take() {
            let _ = postmaster.kill();
            let _ = postmaster.wait();
        }
    }
}

/// Whether any process works in this directory (Postgres' all do).
fn is_in_use(data: &Path) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| fs::read_link(entry.path().join("cwd")).ok()).any(|cwd| cwd == data)
}

#[test]
fn postgres_lives_on_a_volume_and_on_a_branch_taken_in_the_middle() {
    let node = Node::new();
    let base = cluster(&node);
    Volume::create(&node.dirs(0), base).unwrap();
    let mut first = Server::new(&node, 0);
    run(first.pgbench(&["-i", "-s", "2", "-q"]));
    first.psql("CREATE DATABASE doomed");

    // A seal in the middle of TPC-B.
    let load = first.pgbench(&["-c", "4", "-T", "4", "-M", "prepared"]).stdout(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while first.psql("SELECT count(*) > 200 FROM pgbench_history") != "t" {
        assert!(begun.elapsed() < PATIENCE);
    }
    let middle = first.volume.seal(LayerId::generate()).unwrap();
    assert!(middle.new);
    first.psql("CHECKPOINT");
    let second_seal = first.volume.seal(LayerId::generate()).unwrap();
    assert!(check(&load.wait_with_output().unwrap(), "pgbench").is_empty());
    first.check_balances();

    // The branch recovers from it, and is its own.
    Volume::create(&node.dirs(1), middle.layer).unwrap();
    let branch = Server::new(&node, 1);
    assert!(branch.log().contains("automatic recovery in progress"), "{}", branch.log());
    branch.check_balances();
    branch.check_integrity();
    let on_branch: u64 = branch.psql("SELECT count(*) FROM pgbench_history").parse().unwrap();
    let on_first: u64 = first.psql("SELECT count(*) FROM pgbench_history").parse().unwrap();
    assert!((200..on_first).contains(&on_branch), "{on_branch} of {on_first}");
    branch.psql("TRUNCATE pgbench_history");
    branch.psql("UPDATE pgbench_accounts SET abalance = 0");
    branch.psql("UPDATE pgbench_tellers SET tbalance = 0");
    branch.psql("UPDATE pgbench_branches SET bbalance = 0");
    branch.psql("DROP DATABASE doomed");
    run(branch.pgbench(&["-c", "2", "-t", "200", "-n"]));
    branch.check_balances();

    // Everything that rewrites, truncates and deletes.
    first.psql("VACUUM FULL");
    first.psql("REINDEX DATABASE postgres");
    first.psql("DROP DATABASE doomed");
    first.psql("CREATE TABLE gone AS SELECT generate_series(1, 100000) AS n");
    first.psql("DELETE FROM gone WHERE n > 10");
    first.psql("VACUUM gone");
    first.psql("INSERT INTO gone SELECT generate_series(1, 1000)");
    first.psql("TRUNCATE gone");
    first.check_integrity();

    // A crash: what was acknowledged is there.
    run(first.pgbench(&["-c", "4", "-t", "300", "-n"]));
    let acknowledged = first.psql("SELECT count(*) FROM pgbench_history");
    first.kill();
    first.start();
    assert_eq!(first.psql("SELECT count(*) FROM pgbench_history"), acknowledged);
    first.check_balances();
    first.check_integrity();

    // Suspended and sealed, it starts without recovery; opened again, it has nothing new.
    let volume = first.end();
    let clean = volume.seal(LayerId::generate()).unwrap();
    assert!(clean.new);
    let image = super::super::seal::read_manifest(&node.layers(), clean.layer).unwrap().image;
    assert!(image.clean);
    drop(volume);
    assert!(!Volume::open(&node.dirs(0)).unwrap().is_dirty());
    Volume::create(&node.dirs(2), clean.layer).unwrap();
    let third = Server::new(&node, 2);
    assert!(!third.log().contains("automatic recovery"), "{}", third.log());
    assert_eq!(third.psql("SELECT count(*) FROM pgbench_history"), acknowledged);
    third.end();

    // Sealed layers of every kind start.
    assert!(second_seal.new);
    Volume::create(&node.dirs(3), second_seal.layer).unwrap();
    let fourth = Server::new(&node, 3);
    fourth.check_balances();
    fourth.end();
    branch.end();
}

#[test]
fn postgres_notices_nothing_of_compaction() {
    let node = Node::new();
    let base = cluster(&node);
    Volume::create(&node.dirs(0), base).unwrap();
    let mut server = Server::new(&node, 0);
    run(server.pgbench(&["-i", "-s", "2", "-q"]));
    let chain = |layer: LayerId| super::super::seal::read_manifest(&node.layers(), layer).unwrap().chain;

    // Sealed and compacted without pause under TPC-B.
    let mut load = server.pgbench(&["-c", "4", "-T", "600", "-M", "prepared"]).stdout(Stdio::null()).spawn().unwrap();
    let (begun, mut layers, mut emptied) = (Instant::now(), Vec::new(), 0);
    while layers.len() < 30 || emptied < 20 {
        assert!(load.try_wait().unwrap().is_none() && begun.elapsed() < 2 * PATIENCE, "{emptied} of {}", layers.len());
        layers.push(server.volume.seal(LayerId::generate()).unwrap().layer);
        let compacted = compact(&server.volume, 4);
        emptied += compacted.before - compacted.layers;
    }
    load.kill().unwrap();
    load.wait().unwrap();
    server.check_balances();
    server.check_integrity();
    let middle = layers[layers.len() / 2];
    // A compaction lies between two seals; what was just being written stays where it is.
    assert!(chain(middle).len() <= 10, "{:?}", chain(middle));

    // Killed with copies in the upper.
    run(server.pgbench(&["-c", "2", "-t", "100", "-n"]));
    let acknowledged = server.psql("SELECT count(*) FROM pgbench_history");
    compact(&server.volume, 0);
    server.kill();
    server.start();
    assert_eq!(server.psql("SELECT count(*) FROM pgbench_history"), acknowledged);
    server.check_balances();
    server.check_integrity();
    let volume = server.end();
    compact(&volume, 0);
    let last = volume.seal(LayerId::generate()).unwrap().layer;
    assert_eq!(chain(last), [last], "one layer has it all");
    drop(volume);
    for layer in layers.iter().filter(|layer| **layer != middle && !chain(middle).contains(layer)) {
        fs::remove_dir_all(node.layers().join(layer.to_string())).unwrap();
    }

    for (branch, layer) in [(1, middle), (2, last)] {
        Volume::create(&node.dirs(branch), layer).unwrap();
        let image = Server::new(&node, branch);
        image.check_balances();
        image.check_integrity();
        image.end();
    }
}
