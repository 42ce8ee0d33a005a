//! A Postgres on the data directory of an import: to recover it, to look at it, to change what must not stay.
//!
//! It has no network and none of the source's configuration. Nothing is synced while it runs: a machine that fails takes
//! the import with it, and the layer that is made of the directory is synced.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, NoTls};

use super::stage::{Stage, give};
use super::tools::{self, DATA, Host, RUN};
use crate::error::{Error, OsContext, Result};
use crate::long_path;
use crate::manager::Recovery;
use crate::postgres::config::{self, Surroundings};
use crate::postgres::{Installation, SUPERUSER, last_complaint};
use crate::user::RunAs;

/// LIMIT: writes out at most shared_buffers and a `pg_checkpoint` of what recovery has left in them.
const STOP_DEADLINE: Duration = Duration::from_secs(600);

/// How often it is looked whether it answers.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How a server begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    /// As after a shutdown or a crash.
    Plainly,
    /// With all WAL there is beside the directory, to its end.
    WithWal,
    /// As a standby that replays the WAL which comes, until it is promoted.
    AsStandby,
}

/// A running server. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Server {
    stage: Stage,
    child: Child,
    pub host: Host,
}

/// Settings that an import's server has beside those of every branch.
fn settings() -> Vec<(String, String)> {
    let settings = [
        // Files of the data directory: nothing is left in the machine's /dev/shm, however it ends.
        ("dynamic_shared_memory_type", "mmap"),
        ("shared_buffers", "128MB"),
        ("maintenance_work_mem", "128MB"),
        ("max_wal_size", "1GB"),
        ("autovacuum", "off"),
        ("wal_retrieve_retry_interval", "200ms"),
        // So that those of the source can be told of.
        ("max_prepared_transactions", "1000"),
    ];
    settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

impl Server {
    /// Starts it; it may not answer yet.
    ///
    /// # Errors
    /// If it cannot be started at all.
    pub fn start(installation: &Installation, stage: &Stage, begin: Begin) -> Result<Self> {
        let user = RunAs::find()?;
        let at = Surroundings { name: "import", run: Path::new(RUN), conf: Path::new(RUN), shipped: None };
        for (name, text) in
            [("postgresql.conf", config::file(&at, &settings())), ("pg_hba.conf", config::HBA.to_owned())]
        {
            let path = stage.run().join(name);
            fs::write(&path, text).on("write", &path)?;
            give(&path, user)?;
        }
        for (name, wanted) in
            [("recovery.signal", begin == Begin::WithWal), ("standby.signal", begin == Begin::AsStandby)]
        {
            let path = stage.data().join(name);
            match wanted {
                true => {
                    fs::write(&path, "").on("write", &path)?;
                    give(&path, user)?;
                }
                false => remove(&path)?,
            }
        }
        let wal = (begin != Begin::Plainly).then(|| Recovery {
            wal: "../wal".into(),
            pg_timeline: None,
            until: None,
            stay: false,
        });
        // As a fork: no worker of a subscription may start.
        let mut arguments = config::arguments(&at, Path::new(DATA), true, wal.as_ref());
        arguments.extend(["-c".to_owned(), "fsync=off".to_owned()]);
        let program = installation.bin.join("postgres");
        let log = File::options().create(true).append(true).open(stage.log()).on("open", stage.log())?;
        let mut command = tools::on_directory(&program, stage, &arguments)?;
        command.stdout(log.try_clone().on("share", stage.log())?).stderr(log);
        let child = command.spawn().on("run", &program)?;
        tracing::info!(?begin, "postgres runs on an import's directory");
        Ok(Self { stage: stage.clone(), child, host: Host::of(&stage.run()).on("open", stage.run())? })
    }

    /// Waits until it answers; a standby does when it was promoted.
    ///
    /// # Errors
    /// What it said last, if it ended instead.
    ///
    /// # Cancel safety
    /// May be asked again.
    pub async fn ready(&mut self) -> Result<()> {
        loop {
            if self.connect("postgres").await.is_ok_and(|answered| answered) {
                return Ok(());
            }
            self.is_alive()?;
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Fails with what it said last, if it has ended.
    pub fn is_alive(&mut self) -> Result<()> {
        match self.child.try_wait().on("wait for", "postgres")? {
            None => Ok(()),
            Some(status) => Err(self.why_it_ended(&status.to_string())),
        }
    }

    /// Whether it lets somebody in, whoever that is and whatever for.
    async fn connect(&self, database: &str) -> io::Result<bool> {
        let stream = long_path::connect(&self.stage.run().join(".s.PGSQL.5432")).await?;
        let mut config = tokio_postgres::Config::new();
        config.user(SUPERUSER).dbname(database);
        match config.connect_raw(stream, NoTls).await {
            Ok(_) => Ok(true),
            // 57P03: it is starting up, or in recovery. Anything else is an answer.
            Err(error) => Ok(error.as_db_error().is_some_and(|said| said.code().code() != "57P03")),
        }
    }

    /// A superuser's session, in which names are looked for among the system's first.
    pub async fn session(&self, database: &str) -> Result<Client> {
        let socket = self.stage.run().join(".s.PGSQL.5432");
        let mut config = tokio_postgres::Config::new();
        config.user(SUPERUSER).dbname(database).application_name("ebb import");
        config.options("-c search_path=pg_catalog -c statement_timeout=0 -c lock_timeout=0");
        let stream = long_path::connect(&socket).await.on("connect to", &socket)?;
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|error| said(&error))?;
        // Ends with the client or the server; whatever it has to say, the queries are told too.
        tokio::spawn(connection);
        Ok(client)
    }

    /// Makes a standby replay what is there and begin a Postgres timeline of its own. Asked again, it changes nothing.
    pub fn promote(&self) -> Result<()> {
        let path = self.stage.data().join("promote");
        fs::write(&path, "").on("write", &path)?;
        give(&path, RunAs::find()?)?;
        self.signal(Signal::SIGUSR1);
        Ok(())
    }

    /// Shuts it down cleanly.
    ///
    /// # Errors
    /// If it does not end so.
    pub async fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGINT);
        let ended = timeout(STOP_DEADLINE, self.child.wait()).await;
        let status = ended.map_err(|_| Error::Deadline("shutting an import's postgres down"))?;
        match status.on("wait for", "postgres")? {
            status if status.success() => Ok(()),
            status => Err(self.why_it_ended(&status.to_string())),
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    fn why_it_ended(&self, how: &str) -> Error {
        let log = fs::read_to_string(self.stage.log()).unwrap_or_default();
        let said = last_complaint(&log).unwrap_or(how);
        let why = said.find("FATAL:").or(said.find("PANIC:")).map_or(said, |at| &said[at..]);
        Error::import(format!("postgres did not accept the imported data: {}", why.trim_end()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The child itself is killed with its handle; its own children end when they notice.
        let begun = Instant::now();
        self.signal(Signal::SIGKILL);
        while !super::stage::servers_in(&self.stage.data()).is_empty() && begun.elapsed() < Duration::from_secs(2) {
            let _ = self.child.try_wait();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Makes sure that the superuser has the name that Ebb knows it by, whatever the cluster's first one is called. The
/// single-user server asks nobody for a name (PostgreSQL 15 `miscinit.c`, `InitializeSessionUserIdStandalone`), and no event
/// trigger runs in it.
pub(super) async fn ensure_superuser(installation: &Installation, stage: &Stage) -> Result<()> {
    let sql = format!(
        "DO $ebb$ BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_authid WHERE rolname = '{SUPERUSER}') \
         THEN ALTER ROLE {SUPERUSER} SUPERUSER LOGIN CONNECTION LIMIT -1 VALID UNTIL 'infinity'; \
         ELSE CREATE ROLE {SUPERUSER} SUPERUSER LOGIN; END IF; END $ebb$\n"
    );
    let input = stage.run().join("superuser.sql");
    fs::write(&input, sql).on("write", &input)?;
    give(&input, RunAs::find()?)?;
    let at = Surroundings { name: "import", run: Path::new(RUN), conf: Path::new(RUN), shipped: None };
    let conf = stage.run().join("postgresql.conf");
    fs::write(&conf, config::file(&at, &settings())).on("write", &conf)?;
    give(&conf, RunAs::find()?)?;
    let script = format!(
        "exec '{}' --single -D {DATA} -c config_file={RUN}/postgresql.conf -c exit_on_error=on -c fsync=off \
         template1 <{RUN}/superuser.sql",
        installation.bin.join("postgres").display()
    );
    let command = tools::on_directory(Path::new("/bin/sh"), stage, &["-c".to_owned(), script])?;
    let ended = tools::run(command, |_| ()).await?;
    match ended.is_success() {
        true => Ok(()),
        false => Err(Error::import(format!("postgres did not accept the imported data: {}", ended.complaint()))),
    }
}

/// What a server said to a statement of the import's own.
pub(super) fn said(error: &tokio_postgres::Error) -> Error {
    let text = match error.as_db_error() {
        Some(said) => format!("{} (SQLSTATE {})", said.message(), said.code().code()),
        None => error.to_string(),
    };
    Error::import(format!("postgres said about the imported data: {text}"))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", path),
        _ => Ok(()),
    }
}
