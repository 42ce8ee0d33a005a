//! A SeaweedFS server with its own ports and directory.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{ACCESS_KEY, BUCKET, SECRET_KEY, free_port};

/// LIMIT: a start takes a second on an idle machine; this allows for a loaded one.
const START_WITHIN: Duration = Duration::from_secs(60);

/// How often other ports are tried, when one was taken by somebody else in the meantime.
const STARTS_MAX: usize = 4;

/// What the ports are for, in order: S3, then what SeaweedFS needs for itself.
const PORTS: [&str; 9] = [
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port.grpc",
];

/// Which of them is the filer's.
const FILER: usize = 6;

/// SeaweedFS expects its admin port this much below the one for gRPC.
const ADMIN_PORT_BELOW: u16 = 10_000;

/// A running server with the bucket [`BUCKET`]; killed and removed when dropped.
#[derive(Debug)]
pub struct Seaweed {
    weed: PathBuf,
    ports: [u16; PORTS.len()],
    server: Option<Child>,
    dir: TempDir,
}

impl Seaweed {
    /// Starts a server and waits until it serves its bucket. To be called on the test's own thread: the server ends with
    /// the thread that started it.
    ///
    /// # Panics
    /// When SeaweedFS is not installed, saying how to install it; when it does not start.
    pub fn start() -> Self {
        let dir = TempDir::with_prefix("ebb-s3-").expect("a temporary directory can be made");
        let mut seaweed = Self { weed: weed(), ports: [0; PORTS.len()], server: None, dir };
        for _ in 0..STARTS_MAX {
            seaweed.ports = PORTS.map(|_| free_port());
            if seaweed.try_start() {
                return seaweed;
            }
        }
        panic!("SeaweedFS did not start:\n{}", seaweed.log());
    }

    /// The URL of its S3 interface.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port())
    }

    /// The port of its S3 interface.
    pub fn port(&self) -> u16 {
        self.ports[0]
    }

    /// `kill -9`; the port then refuses connections.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
            self.remove_sockets();
        }
    }

    /// Starts a killed server again, on the same ports and objects.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        assert!(self.server.is_none(), "the server runs already");
        assert!(self.try_start(), "SeaweedFS did not start again:\n{}", self.log());
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Whether it came up; if not, it is gone.
    fn try_start(&mut self) -> bool {
        self.server = Some(self.command().spawn().expect("setpriv can be started"));
        let deadline = Instant::now() + START_WITHIN;
        while Instant::now() < deadline {
            if self.server.as_mut().is_some_and(|server| !matches!(server.try_wait(), Ok(None))) {
                break;
            }
            if self.serves() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill();
        false
    }

    /// Whether the bucket is there, which is made last, and S3 answers. The filer asks nobody for a signature.
    fn serves(&self) -> bool {
        let filer = self.ports[FILER];
        status(filer, &format!("/buckets/{BUCKET}/")) == Some(200) && status(self.port(), "/healthz") == Some(200)
    }

    fn command(&self) -> Command {
        let data = self.dir.path().join("data");
        fs::create_dir_all(&data).expect("a directory can be made");
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("log"));
        let log = log.expect("a log can be made");
        // A test that is killed runs no destructors: the kernel ends the server with its parent.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&self.weed).arg("mini").arg(format!("-dir={}", data.display()));
        for (name, port) in PORTS.iter().zip(self.ports) {
            command.arg(format!("-{name}={port}"));
        }
        command
            .arg(format!("-admin.port={}", self.ports[PORTS.len() - 1] - ADMIN_PORT_BELOW))
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"])
            .args(["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"])
            .args(["-s3.autoCreateBucket=false", &format!("-bucket={BUCKET}")])
            .env_clear()
            .envs([("PATH", "/usr/bin:/bin"), ("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)])
            .env("HOME", self.dir.path())
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be cloned"))
            .stderr(log);
        command
    }

    /// It makes sockets in /tmp, named by their ports, and leaves them there when it is killed.
    fn remove_sockets(&self) {
        for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_ours = |port: &u16| name.ends_with(&format!("-{port}.sock"));
            if name.starts_with("seaweedfs-") && self.ports.iter().any(is_ours) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Drop for Seaweed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- SeaweedFS\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        self.kill();
    }
}

/// `EBB_TEST_WEED`, or where `scripts/setup test` installs it.
fn weed() -> PathBuf {
    if let Some(path) = std::env::var_os("EBB_TEST_WEED") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join(".cache/tools/seaweedfs/bin/weed");
    assert!(
        path.exists(),
        "SeaweedFS, the S3 server of the tests, is not installed in {}: run `scripts/setup test`, which installs it there; \
         or name its program `weed` (4.48) in EBB_TEST_WEED",
        path.display()
    );
    path
}

/// The HTTP status of a GET, if anybody answers.
fn status(port: u16, path: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).ok()?;
    std::str::from_utf8(&answer).ok()?.strip_prefix("HTTP/1.1 ")?.parse().ok()
}
