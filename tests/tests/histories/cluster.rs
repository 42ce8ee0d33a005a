//! Two nodes on one bucket, and what happens to them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use ebb_test_s3::{Mishap, Network, Seaweed};
use ebb_tests::{Node, kill, pg_bin, wait_for};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tempfile::TempDir;

use crate::clients::{Accounts, Finals};

/// Long enough for a busy machine to renew a record in time, short enough to wait for.
const TTL: &str = "3s";

const NAMES: [&str; 2] = ["a", "b"];

/// A node's processes call the time what this library reads in a file: Debian's libfaketime.
const CLOCK_LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// S3 refuses requests of a clock that differs more from its own (15 minutes), and then nothing works: that is known.
const S3_CLOCK_SECONDS_MAX: i64 = 600;
const CLOCK_SECONDS_MAX: i64 = 3 * 86_400;

/// Where the nodes' objects are.
pub enum Store {
    /// A directory.
    Directory(TempDir),
    /// An S3 server, with a network of its own for each node.
    S3 { server: Box<Seaweed>, networks: Vec<Network> },
}

impl Store {
    pub fn directory() -> Self {
        Self::Directory(tempfile::tempdir().expect("a directory for the bucket"))
    }

    pub async fn s3(seed: u64) -> Self {
        let server = Box::new(Seaweed::start());
        let mut networks = Vec::new();
        for at in 0..NAMES.len() as u64 {
            networks.push(Network::start(server.port(), seed.wrapping_add(at), 0.0).await);
        }
        Self::S3 { server, networks }
    }

    /// How often each mishap came to pass.
    pub fn mishaps(&self) -> BTreeMap<Mishap, u64> {
        let Self::S3 { networks, .. } = self else { return BTreeMap::new() };
        let mut sums = BTreeMap::new();
        for (mishap, times) in networks.iter().flat_map(Network::happened) {
            *sums.entry(mishap).or_default() += times;
        }
        sums
    }
}

/// The nodes. The bucket outlives them.
pub struct Cluster {
    nodes: Vec<Node>,
    pub store: Store,
    /// Holds what each node takes for the time.
    clocks: TempDir,
    /// Servers that were started, alive or not.
    servers: Vec<u32>,
    key: Vec<u8>,
    /// Processes that were stopped and will be let go on.
    paused: Vec<u32>,
    /// The node whose server was killed and will be started again.
    down: Option<usize>,
    url: String,
    doors: Vec<u16>,
}

impl Cluster {
    pub fn start(store: Store) -> Self {
        let mut cluster = Self {
            nodes: Vec::new(),
            store,
            clocks: tempfile::tempdir().expect("a directory for the clocks"),
            servers: Vec::new(),
            key: Vec::new(),
            paused: Vec::new(),
            down: None,
            url: String::new(),
            doors: Vec::new(),
        };
        for at in 0..NAMES.len() {
            cluster.set_clock(at, 0);
            let node = cluster.node(at);
            cluster.key = fs::read(node.data().join("secret.key")).expect("a node has a key");
            cluster.doors.push(node.proxy_port);
            cluster.nodes.push(node);
        }
        cluster
    }

    /// A node without anything but the key; in the place of a lost one it has its ports.
    fn node(&mut self, at: usize) -> Node {
        let mut node = match &self.store {
            Store::Directory(dir) => Node::prepare().bucket(dir.path()),
            Store::S3 { networks, .. } => Node::prepare().s3_bucket(&networks[at].endpoint(), "histories"),
        };
        node = node.env("EBB_NODE_NAME", NAMES[at]).env("EBB_NODE_TTL", TTL);
        node = node.env("LD_PRELOAD", CLOCK_LIBRARY).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        node = node.env("FAKETIME_CACHE_DURATION", "1");
        node = node.env("FAKETIME_TIMESTAMP_FILE", self.clock(at).to_str().expect("test paths are UTF-8"));
        if let Some(port) = self.doors.get(at) {
            node.proxy_port = *port;
        }
        if !self.key.is_empty() {
            fs::create_dir_all(node.data()).expect("a data directory can be made");
            let path = node.data().join("secret.key");
            fs::write(&path, &self.key).expect("a key can be written");
            let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            fs::set_permissions(&path, private).expect("a key can be made private");
        }
        node.serve();
        self.servers.push(node.server_pid());
        node
    }

    fn clock(&self, at: usize) -> PathBuf {
        self.clocks.path().join(NAMES[at])
    }

    /// Lets a node's clock be ahead of the machine's, or behind. It is noticed within a second.
    fn set_clock(&self, at: usize, ahead: i64) {
        let (clock, fresh) = (self.clock(at), self.clocks.path().join("fresh"));
        fs::write(&fresh, format!("{ahead:+}s\n")).expect("a clock can be written");
        fs::rename(&fresh, &clock).expect("a clock can be set");
    }

    /// Makes the branch, its tables, and what is in them.
    pub fn prepare(&mut self, lists: i64, accounts: i64) {
        let node = &self.nodes[0];
        node.ok(&["project", "create", "shop"]);
        node.ok(&["branch", "set", "shop/prod", "--durability", "bucket"]);
        node.psql(
            "shop/prod",
            &format!(
                "create table lists (list bigint primary key, items bigint[] not null default '{{}}'); \
                 insert into lists select n from generate_series(0, {lists} - 1) n; \
                 create table accounts (account bigint primary key, money bigint not null); \
                 insert into accounts select n, 100 from generate_series(0, {accounts} - 1) n"
            ),
        );
        self.url = node.url("shop/prod");
    }

    /// The URLs by which clients go in.
    pub fn doors(&self) -> Vec<String> {
        let by = |port: &u16| self.url.replace(&format!(":{}/", self.doors[0]), &format!(":{port}/"));
        self.doors.iter().map(by).collect()
    }

    /// The node that owns the project, if it is known, and awake there.
    fn owner(&self) -> Option<usize> {
        (0..self.nodes.len()).find(|&at| {
            let dir = self.nodes[at].data().join("branches");
            let units = fs::read_dir(dir).into_iter().flatten().flatten();
            units.into_iter().any(|entry| unit_of(&entry.path()).is_some())
        })
    }

    fn units(&self, at: usize) -> Vec<u32> {
        let dir = self.nodes[at].data().join("branches");
        fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| unit_of(&entry.path())).collect()
    }

    /// Does something to the nodes; answers what.
    pub fn fault(&mut self, rng: &mut StdRng) -> String {
        let any = rng.random_range(0..self.nodes.len());
        let owner = self.owner().unwrap_or(any);
        let other = 1 - owner;
        let kinds = if matches!(self.store, Store::S3 { .. }) { 14 } else { 10 };
        match rng.random_range(0..kinds) {
            0 => {
                let pids = postgres_of(&self.nodes[owner]);
                if let Some(pid) = pids.get(rng.random_range(0..pids.len().max(1))) {
                    kill("KILL", *pid);
                }
                format!("killed a process of Postgres on {}", NAMES[owner])
            }
            1 => {
                self.units(owner).into_iter().for_each(|unit| kill("KILL", unit));
                format!("killed the unit on {}", NAMES[owner])
            }
            2 => {
                self.nodes[any].kill_server();
                self.down = Some(any);
                format!("killed the server of {}", NAMES[any])
            }
            3 | 4 => {
                self.lose(owner);
                format!("lost {} with its disk", NAMES[owner])
            }
            5 => {
                // Long enough to be taken for dead; it is alive after all.
                self.paused = [vec![self.nodes[owner].server_pid()], self.units(owner)].concat();
                self.paused.iter().for_each(|pid| kill("STOP", *pid));
                format!("paused {}", NAMES[owner])
            }
            6 => {
                let moved = self.nodes[any].ebb(&["compute", "move", "shop", "--to", NAMES[other]]);
                format!("moved to {}: {}", NAMES[other], moved.code)
            }
            7 => {
                let asleep = self.nodes[any].ebb(&["compute", "suspend", "shop/prod"]);
                format!("suspended: {}", asleep.code)
            }
            8 | 9 => {
                let s3 = matches!(self.store, Store::S3 { .. });
                let most = if s3 { S3_CLOCK_SECONDS_MAX } else { CLOCK_SECONDS_MAX };
                let ahead = rng.random_range(-most..=most);
                self.set_clock(any, ahead);
                format!("set the clock of {} to {ahead:+} s", NAMES[any])
            }
            kind => self.bucket_fault(kind, owner, any, rng),
        }
    }

    fn bucket_fault(&mut self, kind: u32, owner: usize, any: usize, rng: &mut StdRng) -> String {
        let Store::S3 { server, networks } = &mut self.store else { unreachable!("a directory has no network") };
        match kind {
            10 => {
                let rate = rng.random_range(0.05..0.4);
                networks.iter().for_each(|network| network.roughen(rate));
                format!("{:.0} % of requests to the bucket go wrong", rate * 100.0)
            }
            11 => {
                let delay = Duration::from_millis(rng.random_range(20..400));
                networks[any].delay(delay);
                format!("the bucket is {} ms away from {}", delay.as_millis(), NAMES[any])
            }
            12 => {
                networks[owner].cut(true);
                format!("cut {} off from the bucket", NAMES[owner])
            }
            _ => {
                server.kill();
                server.restart();
                "killed the bucket's server".to_owned()
            }
        }
    }

    fn lose(&mut self, at: usize) {
        let mut lost = self.nodes.remove(at);
        lost.kill_server();
        while let [(pid, _), ..] = lost.processes()[..] {
            kill("KILL", pid);
            wait_for("a killed process to end", || !lost.processes().iter().any(|(other, _)| *other == pid));
        }
        drop(lost);
        let fresh = self.node(at);
        self.nodes.insert(at, fresh);
    }

    /// Who waits for what in every Postgres that answers.
    pub fn describe(&self) -> String {
        let sql = "select pid, state, wait_event, left(query, 60) from pg_stat_activity where backend_type = 'client backend'";
        let of = |node: &Node| {
            let dirs = fs::read_dir(node.data().join("branches")).into_iter().flatten().flatten();
            let ask = |dir: std::path::PathBuf| {
                let socket = dir.join("run").to_string_lossy().into_owned();
                let psql = ["5", "psql", "-XAt", "-U", "postgres", "-d", "app", "-c", sql, "-h", &socket];
                let out = std::process::Command::new("timeout").args(psql).output();
                out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
            };
            dirs.map(|entry| ask(entry.path())).collect::<Vec<_>>().join("\n")
        };
        self.nodes.iter().map(of).collect::<Vec<_>>().join("\n---\n")
    }

    /// Undoes what nobody could live with for long, and sooner or later the rest.
    pub fn heal(&mut self, rng: &mut StdRng) {
        self.paused.drain(..).for_each(|pid| kill("CONT", pid));
        if let Store::S3 { networks, .. } = &self.store {
            networks.iter().for_each(|network| network.cut(false));
            if rng.random_bool(0.4) {
                self.calm();
            }
        }
        if let Some(at) = self.down.take() {
            self.nodes[at].serve();
            self.servers.push(self.nodes[at].server_pid());
        }
    }

    /// Nothing happens any more on the way to the bucket.
    pub fn calm(&self) {
        let Store::S3 { networks, .. } = &self.store else { return };
        for network in networks {
            network.roughen(0.0);
            network.delay(Duration::ZERO);
        }
    }

    /// What the lists hold in the end.
    pub fn finals(&self) -> Finals {
        // One that was cut off just now knows soon that it is not any more.
        let reaches = |node: &Node| node.ebb(&["url", "shop/prod"]).code == 0;
        wait_for("every node to reach the bucket", || self.nodes.iter().all(reaches));
        self.wake();
        let rows = self.nodes[0].psql("shop/prod", "select list, array_to_string(items, ' ') from lists");
        let numbers = |text: &str| text.split_whitespace().map(|n| n.parse().expect("a number")).collect();
        rows.lines()
            .map(|row| row.split_once('|').expect("two columns"))
            .map(|(list, items)| (list.parse().expect("a number"), numbers(items)))
            .collect()
    }

    fn wake(&self) {
        wait_for("the branch to wake", || self.nodes[0].ebb(&["compute", "wake", "shop/prod"]).code == 0);
    }

    /// Postgres finds nothing wrong, nor does the ledger; nothing is left half-way.
    pub fn judge(&self) {
        let money = self.nodes[1].psql("shop/prod", "select sum(money) from accounts");
        assert_eq!(money, Accounts::TOTAL.to_string());
        self.wake();
        let owner = self.owner().expect("an awake branch has an owner");
        let check = ["--install-missing", "--heapallindexed", "-d", "app"];
        let ran = self.nodes[owner].superuser_tool("shop/prod", "pg_amcheck", &check);
        assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{} ({:?})", ran.stderr, pg_bin());
        for node in &self.nodes {
            assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.paused.drain(..).for_each(|pid| kill("CONT", pid));
        // Each server shares its clock with its units; one that was killed leaves that behind.
        self.nodes.clear();
        for (pid, name) in self.servers.iter().flat_map(|pid| [(pid, "faketime_shm"), (pid, "sem.faketime_sem")]) {
            let _ = fs::remove_file(format!("/dev/shm/{name}_{pid}"));
        }
    }
}

/// The unit that runs on a branch's directory.
fn unit_of(dir: &std::path::Path) -> Option<u32> {
    let pid: u32 = fs::read_to_string(dir.join("unit.pid")).ok()?.trim().parse().ok()?;
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    line.contains(&*dir.to_string_lossy()).then_some(pid)
}

/// The Postgres processes of a node, by the mounts of their namespace.
fn postgres_of(node: &Node) -> Vec<u32> {
    let data = node.data().to_string_lossy().into_owned();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
            read("comm").trim() == "postgres" && read("mountinfo").contains(&data)
        })
        .collect()
}
