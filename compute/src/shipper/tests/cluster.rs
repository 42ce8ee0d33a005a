//! A real Postgres for a test, configured as a unit would; what is to become of it is the test's business.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ebb_storage::archive::Archive;
use ebb_storage::pg_files::read_image_info;
use ebb_types::Lsn;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::control::Durability;
use crate::postgres::config::{self, PORT, Surroundings};
use crate::postgres::{self, Installation, make_template};
use crate::user::RunAs;

/// LIMIT: for anything that takes a second on an idle machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub struct Cluster {
    dir: TempDir,
    installation: Installation,
    user: RunAs,
    pub settings: Vec<(String, String)>,
    pub durability: Durability,
    /// The WAL of the image that it began with.
    pub base_wal: Option<PathBuf>,
    server: Option<Child>,
}

impl Cluster {
    /// A fresh cluster that was shut down.
    pub async fn new(durability: Durability) -> Self {
        let cluster = Self::empty(durability);
        make_template(&cluster.installation, &cluster.data()).await.unwrap();
        cluster
    }

    fn empty(durability: Durability) -> Self {
        let dir = TempDir::new().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let installation = postgres::find(None).expect("these tests need a Postgres server");
        let user = RunAs::find().unwrap();
        let settings = vec![("shared_buffers".to_owned(), "8MB".to_owned())];
        fs::create_dir(dir.path().join("run")).unwrap();
        let cluster = Self { dir, installation, user, settings, durability, base_wal: None, server: None };
        cluster.give(&cluster.run());
        cluster
    }

    /// A copy of a cluster that does not run.
    pub fn copy(&self) -> Self {
        assert!(self.server.is_none());
        let mut copy = Self::empty(self.durability);
        copy.settings.clone_from(&self.settings);
        copy.base_wal.clone_from(&self.base_wal);
        run(Command::new("cp").arg("-a").arg(self.data()).arg(copy.data()));
        copy
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Socket and configuration.
    pub fn run(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn give(&self, path: &Path) {
        if geteuid().is_root() {
            run(Command::new("chown").arg("-R").arg(format!("{}:{}", self.user.uid, self.user.gid)).arg(path));
        }
    }

    pub fn configure(&self) {
        let run = self.run();
        let at = Surroundings { name: "test", run: &run, conf: &run, shipped: Some(self.durability) };
        fs::write(run.join("postgresql.conf"), config::file(&at, &self.settings)).unwrap();
        fs::write(run.join("pg_hba.conf"), config::HBA).unwrap();
        self.give(&run);
    }

    /// Starts it, and waits until it accepts connections.
    pub async fn start(&mut self) {
        self.configure();
        let begun = Instant::now();
        loop {
            self.spawn();
            while self.server.as_mut().unwrap().try_wait().unwrap().is_none() {
                if self.connect().await.is_ok() {
                    return;
                }
                assert!(begun.elapsed() < DEADLINE, "it does not start: {}", self.log());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            // Processes of a server that was killed may still be there.
            assert!(begun.elapsed() < DEADLINE, "it does not start: {}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn spawn(&mut self) {
        let run = self.run();
        let log = File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let at = Surroundings { name: "test", run: &run, conf: &run, shipped: Some(self.durability) };
        let mut command = Command::new(self.installation.bin.join("postgres"));
        command.args(config::arguments(&at, &self.data(), false, None)).current_dir("/").stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        config::environment(&mut command);
        if geteuid().is_root() {
            command.uid(self.user.uid).gid(self.user.gid);
        }
        self.server = Some(command.spawn().unwrap());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.server.as_ref().expect("it runs").id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }

    /// Waits until it has ended.
    pub async fn until_ended(&mut self) {
        let begun = Instant::now();
        while self.server.as_mut().is_some_and(|server| server.try_wait().unwrap().is_none()) {
            assert!(begun.elapsed() < DEADLINE, "it does not end: {}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.server = None;
    }

    pub async fn stop(&mut self) {
        self.signal(Signal::SIGINT);
        self.until_ended().await;
    }

    /// Ends it as a crash would.
    pub async fn crash(&mut self) {
        self.signal(Signal::SIGQUIT);
        self.until_ended().await;
    }

    pub async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.run()).port(PORT).user("postgres").dbname("postgres");
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Runs SQL and answers the last value of the last row.
    pub async fn sql(&self, sql: &str) -> String {
        let rows = self.connect().await.unwrap().simple_query(sql).await.unwrap();
        let values = rows.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(row.len() - 1),
            _ => None,
        });
        values.last().unwrap_or_default().to_owned()
    }

    /// Makes it recover, at its next start, as far as the archive goes on a Postgres timeline, or to a position.
    pub async fn restore(&mut self, archive: &Archive, pg_timeline: u32, to: Option<Lsn>) {
        let from = read_image_info(&self.data()).unwrap().redo;
        let ranges = archive.ranges().await.unwrap();
        let end = ranges.iter().rev().find(|range| range.pg_timeline == pg_timeline).unwrap().end;
        let wal = self.dir.path().join("restored");
        // The image has the WAL up to where the archive begins.
        run(Command::new("cp").arg("-a").arg(self.data().join("pg_wal")).arg(&wal));
        let fetched = archive.fetch(pg_timeline, from, to.unwrap_or(end), &wal).await.unwrap();
        assert!(fetched.start <= from, "{fetched:?}, from {from}");
        self.give(&wal);
        fs::write(self.data().join("recovery.signal"), "").unwrap();
        self.give(&self.data());
        self.settings.push(("restore_command".to_owned(), format!("cp {}/%f %p", wal.display())));
        self.start().await;
        let begun = Instant::now();
        while self.sql("SELECT pg_is_in_recovery()").await != "f" {
            assert!(begun.elapsed() < DEADLINE, "it does not recover: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = kill(Pid::from_raw(i32::try_from(server.id()).unwrap()), Signal::SIGQUIT);
            let _ = server.wait();
        }
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
