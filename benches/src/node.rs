//! A running `ebb serve` with a project, driven through its API.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebb_measure::process::private_memory_kib;
use ebb_measure::wait_for;
use serde_json::{Value, json};

use crate::Common;

/// A server of its own in a temporary directory; stopped and removed when dropped.
#[derive(Debug)]
pub struct Node {
    server: Child,
    api: String,
    /// Port of the proxy on 127.0.0.1.
    pub proxy_port: u16,
    /// Password of role `app`.
    pub password: String,
    /// The data directory.
    pub data: PathBuf,
    _dir: tempfile::TempDir,
}

impl Node {
    /// Starts a server with project `bench` and waits until it answers.
    pub fn start(common: &Common) -> Result<Self> {
        Self::open(common, |_| ())?.with_project()
    }

    /// Makes project `bench`.
    pub fn with_project(mut self) -> Result<Self> {
        let made = self.post("/v1/projects", &json!({"name": "bench"}))?;
        self.password = made["password"].as_str().context("no password in the answer")?.to_owned();
        Ok(self)
    }

    /// Starts a server that is told more, and waits until it answers. It has the projects of its bucket.
    pub fn open(common: &Common, tell: impl FnOnce(&mut Command)) -> Result<Self> {
        let exe = match &common.ebb {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("ebb"),
        };
        ensure!(exe.exists(), "{} is not there: cargo build --release -p ebb-cli", exe.display());
        let dir = tempfile::Builder::new().prefix("ebb-bench-").tempdir_in(&common.dir)?;
        let data = dir.path().join("data");
        let (proxy_port, api_port) = (free_port()?, free_port()?);
        let log = std::fs::File::create(dir.path().join("serve.log"))?;
        let mut command = Command::new(&exe);
        command
            .arg("serve")
            .args(["--listen", &format!("127.0.0.1:{proxy_port}")])
            .args(["--api-listen", &format!("127.0.0.1:{api_port}")])
            .args(["--idle-suspend", "1h"])
            .arg("--data")
            .arg(&data)
            .env("EBB_PG_BIN", &common.pg_bin)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        tell(&mut command);
        let server = command.spawn().context("cannot start ebb serve")?;
        let api = format!("http://127.0.0.1:{api_port}");
        let node = Node { server, api, proxy_port, password: String::new(), data, _dir: dir };
        wait_for("ebb serve", || node.get("/v1/health").is_ok())?;
        Ok(node)
    }

    /// GET, as JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        Ok(ureq::get(format!("{}{path}", self.api)).call()?.into_body().read_json()?)
    }

    /// GET, as text.
    pub fn text(&self, path: &str) -> Result<String> {
        Ok(ureq::get(format!("{}{path}", self.api)).call()?.into_body().read_to_string()?)
    }

    /// POST, as JSON.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let answer = agent.post(format!("{}{path}", self.api)).send_json(body)?;
        let status = answer.status();
        let body: Value = answer.into_body().read_json().unwrap_or(Value::Null);
        ensure!(status.is_success(), "POST {path}: {status} {body}");
        Ok(body)
    }

    /// PATCH, as JSON.
    pub fn patch(&self, path: &str, body: &Value) -> Result<Value> {
        Ok(ureq::patch(format!("{}{path}", self.api)).send_json(body)?.into_body().read_json()?)
    }

    /// Suspends a branch.
    pub fn suspend(&self, branch: &str) -> Result<()> {
        self.post(&format!("/v1/projects/bench/branches/{branch}/compute/suspend"), &json!({})).map(drop)
    }

    /// Wakes a branch and answers the directory of its Postgres socket.
    pub fn wake(&self, branch: &str) -> Result<PathBuf> {
        self.post(&format!("/v1/projects/bench/branches/{branch}/compute/wake"), &json!({}))?;
        let id = self.get(&format!("/v1/projects/bench/branches/{branch}"))?;
        let id = id["id"].as_str().context("a branch has no id")?.to_owned();
        Ok(self.data.join("branches").join(id).join("run"))
    }

    /// Where it keeps everything.
    pub fn data_dir(&self) -> &std::path::Path {
        &self.data
    }

    /// The server process.
    pub fn pid(&self) -> u32 {
        self.server.id()
    }

    /// Memory of the server process, without what it shares with others.
    pub fn memory_kib(&self) -> Result<f64> {
        private_memory_kib(self.server.id())
    }

    /// libpq parameters to reach a branch through the proxy.
    pub fn conninfo(&self, branch: &str) -> String {
        format!(
            "host=127.0.0.1 port={} user=app password={} dbname=app options=endpoint={branch}--bench",
            self.proxy_port, self.password
        )
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // SIGTERM suspends every compute; only then may the directory go.
        let _ = Command::new("kill").arg(self.server.id().to_string()).status();
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if matches!(self.server.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("ebb serve did not stop within a minute; killing it");
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A port nobody listens on just now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Settings of the compute behind a socket directory that a plain Postgres must share to be comparable.
pub fn settings_of(pg_bin: &Path, socket_dir: &Path) -> Result<Vec<(String, String)>> {
    let query = "select name || '=' || setting || coalesce(case when unit in ('8kB','kB','MB','ms','s','min') then unit end, '') \
                 from pg_settings where source in ('command line', 'configuration file') \
                 and context <> 'internal' and name !~ \
                 '^(listen_addresses|unix_socket|port|data_directory|config_file|hba_file|ident_file|cluster_name|log|external_pid|restart_after)'";
    let out = Command::new(pg_bin.join("psql"))
        .args(["-XAtq", "-U", "postgres", "-d", "postgres", "-h"])
        .arg(socket_dir)
        .args(["-c", query])
        .output()?;
    ensure!(out.status.success(), "psql: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8(out.stdout)?
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), times_eight(value)))
        .collect())
}

/// `pg_settings` counts pages (`4096` of unit `8kB`), which Postgres does not read back as `40968kB`.
fn times_eight(value: &str) -> String {
    match value.strip_suffix("8kB").map(str::parse::<u64>) {
        Some(Ok(pages)) => format!("{}kB", pages * 8),
        _ => value.to_owned(),
    }
}
