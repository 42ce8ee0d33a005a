//! The peer of most benches: a stock Postgres on a plain directory, with the same settings as a compute.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebb_measure::wait_for;

use crate::Common;

/// A plain cluster. What is at `dir`: `data`, the socket, the log.
#[derive(Debug)]
pub struct Native {
    pg_bin: PathBuf,
    settings: Vec<(String, String)>,
    running: Option<Child>,
    dir: PathBuf,
    /// Where it made its directory itself; removed after the server has stopped.
    _temporary: Option<tempfile::TempDir>,
}

impl Native {
    /// `initdb`, with data checksums as Ebb's template has them.
    pub fn create(common: &Common, settings: Vec<(String, String)>) -> Result<Self> {
        let temporary = tempfile::Builder::new().prefix("ebb-native-").tempdir_in(&common.dir)?;
        let mut native = Self::create_in(common, settings, temporary.path())?;
        native._temporary = Some(temporary);
        Ok(native)
    }

    /// The same in a directory that is there.
    pub fn create_in(common: &Common, settings: Vec<(String, String)>, dir: &Path) -> Result<Self> {
        let status = Command::new("chown").arg("postgres").arg(dir).status()?;
        ensure!(status.success(), "chown failed");
        let native = Self::at(common, settings, dir);
        let status = native
            .as_postgres("initdb")
            .args(["-U", "postgres", "-A", "trust", "--data-checksums", "--encoding=UTF8", "--locale=C.UTF-8", "-D"])
            .arg(native.data())
            .stdout(Stdio::null())
            .status()?;
        ensure!(status.success(), "initdb failed");
        Ok(native)
    }

    /// A cluster whose `data` is in a directory already.
    pub fn at(common: &Common, settings: Vec<(String, String)>, dir: &Path) -> Self {
        Native { pg_bin: common.pg_bin.clone(), settings, running: None, dir: dir.to_owned(), _temporary: None }
    }

    /// Where the socket is.
    pub fn socket_dir(&self) -> &Path {
        &self.dir
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn as_postgres(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(self.pg_bin.join(program));
        command.stdin(Stdio::null());
        command
    }

    /// Starts the server and returns at once; the time of the spawn is the caller's to note.
    pub fn spawn(&mut self) -> Result<()> {
        let log = std::fs::File::create(self.dir.join("log"))?;
        let mut command = self.as_postgres("postgres");
        command.arg("-D").arg(self.data());
        command.args(["-c", "listen_addresses="]).arg("-c");
        command.arg(format!("unix_socket_directories={}", self.dir.display()));
        for (name, value) in &self.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        self.running = Some(command.stdout(log.try_clone()?).stderr(log).spawn().context("cannot start postgres")?);
        Ok(())
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&mut self) -> Result<()> {
        self.spawn()?;
        let socket = self.socket_dir().join(".s.PGSQL.5432");
        wait_for("postgres", || {
            let ended = self.running.as_mut().and_then(|server| server.try_wait().ok()).flatten();
            ended.is_some() || std::os::unix::net::UnixStream::connect(&socket).is_ok()
        })?;
        let ended = self.running.as_mut().and_then(|server| server.try_wait().ok()).flatten();
        ensure!(ended.is_none(), "postgres ended: {}", std::fs::read_to_string(self.dir.join("log"))?);
        let dir = self.dir.clone();
        let ready = self.pg_bin.join("pg_isready");
        wait_for("postgres", || {
            Command::new(&ready).arg("-q").arg("-h").arg(&dir).status().is_ok_and(|status| status.success())
        })
    }

    /// Fast shutdown.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut server) = self.running.take() {
            Command::new("kill").args(["-INT", &server.id().to_string()]).status()?;
            let deadline = Instant::now() + Duration::from_secs(60);
            while server.try_wait()?.is_none() {
                ensure!(Instant::now() < deadline, "postgres did not stop");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("cannot stop the plain postgres: {error:#}");
        }
    }
}
