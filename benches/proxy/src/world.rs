//! A Postgres for the benches, and what processes cost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use ebb_measure::wait_for;
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

use crate::Common;

/// LIMIT: a process holds two descriptors per client at most, and some of its own.
const DESCRIPTORS: u64 = 130_000;

/// A cluster of its own with role and database `app`; stopped and removed when dropped.
#[derive(Debug)]
pub struct Postgres {
    process: Child,
    dir: tempfile::TempDir,
}

impl Postgres {
    /// Makes and starts one whose data never reaches the disk on purpose: it is the poolers that are measured.
    pub fn start(common: &Common, max_connections: u32) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ebb-proxy-bench-").tempdir()?;
        own(dir.path())?;
        let data = dir.path().join("data");
        done(
            as_postgres(&common.pg_bin.join("initdb")).args(["-A", "trust", "-U", "postgres", "-N", "-D"]).arg(&data),
        )?;
        let log = fs::File::create(dir.path().join("log"))?;
        let process = as_postgres(&common.pg_bin.join("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-k", &dir.path().to_string_lossy(), "-c", "listen_addresses=", "-c", "fsync=off"])
            .args(["-c", "shared_buffers=400MB", "-c", "max_wal_size=8GB", "-c", "autovacuum=off"])
            .args(["-c", &format!("max_connections={max_connections}")])
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let postgres = Postgres { process, dir };
        wait_for("Postgres", || postgres.sql("postgres", "select 1").is_ok())?;
        postgres.sql("postgres", "create role app login")?;
        postgres.sql("postgres", "create database app owner app")?;
        Ok(postgres)
    }

    /// Where its socket is.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join(".s.PGSQL.5432")
    }

    /// Runs SQL as superuser.
    pub fn sql(&self, database: &str, sql: &str) -> Result<()> {
        done(
            Command::new("psql")
                .args(["-XqAt", "-U", "postgres", "-d", database, "-h"])
                .arg(self.dir())
                .args(["-c", sql]),
        )
    }

    /// libpq parameters to reach it without a pooler.
    pub fn conninfo(&self) -> String {
        format!("host={} user=app dbname=app", self.dir().display())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Postmasters take INT for "now, but in order".
        let _ = Command::new("kill").args(["-INT", &self.process.id().to_string()]).status();
        let _ = self.process.wait();
    }
}

/// A program as the user that may run Postgres and reach its socket directory.
pub fn as_postgres(program: &Path) -> Command {
    if !geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=QUIT", "--"]).arg(program);
    command.stdin(Stdio::null());
    command
}

/// Gives a directory to that user.
pub fn own(dir: &Path) -> Result<()> {
    if geteuid().is_root() {
        done(Command::new("chown").arg("-R").arg("postgres").arg(dir))?;
    }
    Ok(())
}

/// Runs a program that must succeed.
pub fn done(command: &mut Command) -> Result<()> {
    let out = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Allows this process, and those it starts, enough descriptors, as far as it may; answers how many it has then.
pub fn raise_descriptor_limit() -> u64 {
    let all = |count| Rlimit { current: Some(count), maximum: Some(count) };
    if setrlimit(Resource::Nofile, all(DESCRIPTORS)).is_err() {
        let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(DESCRIPTORS);
        // Less is enough for smaller numbers of clients; what is too many shows.
        let _ = setrlimit(Resource::Nofile, all(allowed));
    }
    getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS)
}
