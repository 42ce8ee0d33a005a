//! A running `ebb serve`, its commands, its processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ebb_test_s3::free_port;
use serde_json::Value;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::{COMMAND_PATIENCE, PATIENCE, wait_for};

/// Directory of the Postgres programs that tests call: `EBB_TEST_PG_BIN`, or Debian's 15.
pub fn pg_bin() -> PathBuf {
    std::env::var_os("EBB_TEST_PG_BIN").map_or_else(|| "/usr/lib/postgresql/15/bin".into(), PathBuf::from)
}

/// The built binary: `EBB_BIN`, or `ebb` in the target directory this test was built into.
fn ebb_bin() -> PathBuf {
    if let Some(path) = std::env::var_os("EBB_BIN") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a running test has an executable");
    let path = test.ancestors().nth(2).expect("tests are in target/<profile>/deps").join("ebb");
    assert!(path.exists(), "{} is not built: cargo build -p ebb-cli", path.display());
    path
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A server with its own data directory and ports; stopped, checked for leftovers and removed when dropped.
#[derive(Debug)]
pub struct Node {
    data: PathBuf,
    log: PathBuf,
    bucket: Option<PathBuf>,
    args: Vec<String>,
    envs: Vec<(String, String)>,
    server: Option<Child>,
    /// Port of the proxy on 127.0.0.1.
    pub proxy_port: u16,
    /// Port of the API on 127.0.0.1.
    pub api_port: u16,
    dir: TempDir,
}

impl Node {
    /// Starts a server on an empty data directory.
    pub fn start() -> Self {
        let mut node = Self::prepare();
        node.serve();
        node
    }

    /// Starts a server and makes project `shop`.
    pub fn with_shop() -> Self {
        let node = Self::start();
        node.ok(&["project", "create", "shop"]);
        node
    }

    /// Names everything, starts nothing.
    pub fn prepare() -> Self {
        let dir = TempDir::with_prefix("ebb-e2e-").expect("a temporary directory can be made");
        Self {
            data: dir.path().join("data"),
            log: dir.path().join("serve.log"),
            bucket: None,
            args: Vec::new(),
            // A node that a test loses is taken over soon.
            envs: vec![("EBB_NODE_TTL".to_owned(), "2s".to_owned())],
            server: None,
            proxy_port: free_port(),
            api_port: free_port(),
            dir,
        }
    }

    /// Uses another bucket than the one in the data directory.
    pub fn bucket(mut self, bucket: &Path) -> Self {
        self.bucket = Some(bucket.to_owned());
        self
    }

    /// Uses a bucket on a test's S3 server, which is reached at `endpoint`, below a prefix.
    pub fn s3_bucket(mut self, endpoint: &str, prefix: &str) -> Self {
        self.bucket = Some(format!("s3://{}/{prefix}", ebb_test_s3::BUCKET).into());
        self.args = vec!["--s3-endpoint".to_owned(), endpoint.to_owned(), "--s3-path-style".to_owned()];
        let credentials = [
            ("AWS_ACCESS_KEY_ID", ebb_test_s3::ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", ebb_test_s3::SECRET_KEY),
            // Whoever runs the tests may have files of their own.
            ("AWS_CONFIG_FILE", "/dev/null"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
        ];
        self.envs.extend(credentials.map(|(name, value)| (name.to_owned(), value.to_owned())));
        self
    }

    /// Uses another data directory.
    pub fn data_dir(mut self, data: &Path) -> Self {
        self.data = data.to_owned();
        self
    }

    /// Gives the server one more argument.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Sets an environment variable of the server.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.envs.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A directory of the test's own, beside the data directory.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// What the server has logged.
    pub fn server_log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The command line of `ebb serve` for this node.
    pub fn serve_command(&self) -> Command {
        let mut command = Command::new(ebb_bin());
        command
            .arg("serve")
            .arg("--data")
            .arg(&self.data)
            .args(["--listen", &format!("127.0.0.1:{}", self.proxy_port)])
            .args(["--api-listen", &format!("127.0.0.1:{}", self.api_port)])
            .args(&self.args)
            .envs(self.envs.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        if let Some(bucket) = &self.bucket {
            command.arg("--bucket").arg(bucket);
        }
        command
    }

    /// Starts the server and waits until its API answers.
    pub fn serve(&mut self) {
        assert!(self.server.is_none(), "the server runs already");
        let log = fs::File::options().create(true).append(true).open(&self.log).expect("a log can be made");
        let mut command = self.serve_command();
        command.stdout(log.try_clone().expect("a file can be cloned")).stderr(log);
        self.server = Some(command.spawn().expect("ebb can be started"));
        let health = format!("http://127.0.0.1:{}/v1/health", self.api_port);
        wait_for("the API", || {
            if let Some(status) = self.server.as_mut().and_then(|server| server.try_wait().ok()).flatten() {
                panic!("ebb serve ended with {status}:\n{}", fs::read_to_string(&self.log).unwrap_or_default());
            }
            let asked = ureq::get(&health).config().timeout_global(Some(Duration::from_secs(5))).build().call();
            asked.is_ok()
        });
    }

    /// Starts a server that takes over from the one that runs; answers that one.
    pub fn begin_take_over(&mut self) -> Child {
        let log = fs::File::options().create(true).append(true).open(&self.log).expect("a log can be made");
        let mut command = self.serve_command();
        command.arg("--take-over").stdout(log.try_clone().expect("a file can be cloned")).stderr(log);
        let new = command.spawn().expect("ebb can be started");
        self.server.replace(new).expect("the server runs")
    }

    /// Waits until the old server has ended, and the new one is ready.
    pub fn end_take_over(&mut self, old: &mut Child) {
        wait_for("the old server to end", || old.try_wait().expect("a child can be waited for").is_some());
        let pid = format!("\"pid\": {}", self.server_pid());
        wait_for("the new server to be ready", || {
            fs::read_to_string(self.data.join("node.json")).is_ok_and(|text| text.contains(&pid))
        });
    }

    /// Stops the server as Ctrl-C does, and waits for it.
    pub fn stop(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        kill("TERM", server.id());
        let deadline = Instant::now() + PATIENCE;
        while server.try_wait().expect("a child can be waited for").is_none() {
            if Instant::now() > deadline {
                let _ = server.kill();
                let _ = server.wait();
                panic!("ebb serve did not stop");
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The server's process number.
    pub fn server_pid(&self) -> u32 {
        self.server.as_ref().expect("the server runs").id()
    }

    /// `kill -9` of the server, unless it is dead already.
    pub fn kill_server(&mut self) {
        let mut server = self.server.take().expect("the server runs");
        server.kill().expect("a child can be killed");
        server.wait().expect("a child can be waited for");
    }

    /// Runs `ebb` against this node.
    pub fn ebb(&self, args: &[&str]) -> Ran {
        let mut command = Command::new(ebb_bin());
        command.args(args).env("EBB_API", format!("http://127.0.0.1:{}", self.api_port));
        run(command, COMMAND_PATIENCE).unwrap_or_else(|why| panic!("ebb {args:?} {why}"))
    }

    /// Runs `ebb`, which must succeed, and answers its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let ran = self.ebb(args);
        assert_eq!(ran.code, 0, "ebb {args:?} failed\n{}{}", ran.stdout, ran.stderr);
        ran.stdout
    }

    /// Runs `ebb --json`, which must succeed, and answers what it printed.
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[&["--json"], args].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("ebb {args:?} printed no JSON ({error}): {text}"))
    }

    /// The connection URL of a branch.
    pub fn url(&self, branch: &str) -> String {
        self.ok(&["url", branch]).trim().to_owned()
    }

    /// Connects to a branch with tokio-postgres.
    pub async fn connect(&self, branch: &str) -> Client {
        self.try_connect(&self.url(branch))
            .await
            .unwrap_or_else(|error| panic!("cannot connect to {branch}: {error:?}"))
    }

    /// Connects to a URL; the connection is driven by a task of its own.
    pub async fn try_connect(&self, url: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
        tokio::spawn(async move {
            // The client sees how a connection ends; nothing is lost here.
            let _ = connection.await;
        });
        Ok(client)
    }

    /// Runs SQL with psql, which must succeed; rows without decoration.
    pub fn psql(&self, branch: &str, sql: &str) -> String {
        let ran = self.tool("psql", &["-XAtq", "-v", "ON_ERROR_STOP=1", &self.url(branch), "-c", sql]);
        assert_eq!(ran.code, 0, "psql on {branch} failed for {sql:?}: {}", ran.stderr);
        ran.stdout.trim_end().to_owned()
    }

    /// Runs a program of Postgres.
    pub fn tool(&self, program: &str, args: &[&str]) -> Ran {
        let mut command = Command::new(pg_bin().join(program));
        command.args(args);
        run(command, COMMAND_PATIENCE).unwrap_or_else(|why| panic!("{program} {args:?} {why}"))
    }

    /// Runs a program of Postgres as superuser on the private socket of an awake branch.
    pub fn superuser_tool(&self, branch: &str, program: &str, args: &[&str]) -> Ran {
        let socket_dir = self.branch_dir(branch).join("run");
        let socket_dir = socket_dir.to_str().expect("test paths are UTF-8");
        self.tool(program, &[&["-h", socket_dir, "-U", "postgres"], args].concat())
    }

    /// The state of a branch's compute.
    pub fn compute(&self, branch: &str) -> Value {
        self.json(&["compute", "status", branch])
    }

    /// Suspends a branch and waits until it is.
    pub fn suspend(&self, branch: &str) {
        self.ok(&["compute", "suspend", branch]);
        self.wait_state(branch, "suspended");
    }

    /// Waits until a branch's compute is in a state.
    pub fn wait_state(&self, branch: &str, state: &str) {
        wait_for(&format!("{branch} to be {state}"), || self.compute(branch)["state"] == state);
    }

    /// How often a branch was woken since the server started.
    pub fn wakes(&self, branch: &str) -> u64 {
        self.compute(branch)["wakes"].as_u64().expect("a compute counts its wakes")
    }

    /// The branch's directory on this node.
    pub fn branch_dir(&self, branch: &str) -> PathBuf {
        let shown = self.json(&["branch", "show", branch]);
        self.data.join("branches").join(shown["id"].as_str().expect("a branch has an id"))
    }

    /// Process number of the branch's Postgres.
    pub fn postmaster_pid(&self, branch: &str) -> u32 {
        let pid = self.compute(branch)["unit"]["postmaster_pid"].as_u64();
        pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or_else(|| panic!("{branch} has no postmaster"))
    }

    /// Process number of the branch's unit.
    pub fn unit_pid(&self, branch: &str) -> u32 {
        let text = fs::read_to_string(self.branch_dir(branch).join("unit.pid")).expect("an awake branch has unit.pid");
        text.trim().parse().expect("unit.pid holds a number")
    }

    /// Processes that have this node's data directory in their command line or their working directory, server excluded.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let data = self.data.to_string_lossy().into_owned();
        let own = self.server.as_ref().map(Child::id);
        let entries = fs::read_dir("/proc").expect("/proc can be listed");
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| Some(*pid) != own && *pid != std::process::id())
            .filter_map(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                line.contains(&data).then_some((pid, line))
            })
            .collect()
    }

    /// Whether any Postgres of this node runs: a process in a namespace in which this node's volume is mounted.
    pub fn postgres_runs(&self, branch: &str) -> bool {
        let dir = self.branch_dir(branch);
        let entries = fs::read_dir("/proc").expect("/proc can be listed");
        entries.flatten().any(|entry| {
            let proc = entry.path();
            let is_postgres = fs::read_to_string(proc.join("comm")).is_ok_and(|comm| comm.trim() == "postgres");
            is_postgres
                && fs::read_to_string(proc.join("mountinfo"))
                    .is_ok_and(|mounts| mounts.contains(&*dir.join("wal").to_string_lossy()))
        })
    }

    fn cleanup(&mut self) -> Vec<String> {
        let mut faults = Vec::new();
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.stop()));
        if stopped.is_err() {
            faults.push("ebb serve did not stop".to_owned());
        }
        // Units of a killed server go on by design; a test that leaves them so ends them here.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.processes().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        for (pid, line) in self.processes() {
            faults.push(format!("left running: {pid} {line}"));
            kill("KILL", pid);
        }
        let data = self.data.to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        faults.extend(mounts.lines().filter(|line| line.contains(&data)).map(|line| format!("left mounted: {line}")));
        faults
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let failing = thread::panicking();
        if failing {
            eprintln!("--- serve.log of {}\n{}", self.data.display(), self.server_log());
            for entry in fs::read_dir(self.data.join("branches")).into_iter().flatten().flatten() {
                for name in ["postgres.log", "unit.log", "unit.err"] {
                    let path = entry.path().join(name);
                    if let Ok(text) = fs::read_to_string(&path) {
                        let tail: Vec<_> = text.lines().rev().take(60).collect();
                        eprintln!("--- {}", path.display());
                        tail.iter().rev().for_each(|line| eprintln!("{line}"));
                    }
                }
            }
        }
        let faults = self.cleanup();
        for fault in &faults {
            eprintln!("{fault}");
        }
        assert!(failing || faults.is_empty(), "the node left something behind: {faults:?}");
    }
}

/// Runs a command, which gets nothing to read, to its end.
///
/// # Errors
/// Why there is no end: it cannot be started, or was killed because it took longer than it may.
pub fn run(mut command: Command, patience: Duration) -> Result<Ran, String> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.map_err(|error| format!("cannot be started: {error}"))?;
    let (pid, (ended, outcome)) = (child.id(), mpsc::channel());
    thread::spawn(move || ended.send(child.wait_with_output()));
    let Ok(out) = outcome.recv_timeout(patience) else {
        kill("KILL", pid);
        return Err(format!("did not end within {} s and was killed", patience.as_secs()));
    };
    let out = out.map_err(|error| format!("cannot be waited for: {error}"))?;
    Ok(Ran {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    })
}

/// Sends a signal to a process of a test's own.
pub fn kill(signal: &str, pid: u32) {
    let status = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).stderr(Stdio::null()).status();
    status.expect("kill can be started");
}

impl Node {
    /// `kill -9` of a process of this node.
    pub fn kill_9(&self, pid: u32) {
        kill("KILL", pid);
    }
}
