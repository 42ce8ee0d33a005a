//! Runs an artifact's migrations on a branch's Postgres: as the owner role, never as superuser.
//!
//! Each file is one transaction together with its row in `ebb.migrations`, so that it is applied and recorded, or
//! neither. A file is known by its name; one that was applied must never change. What cannot run in a transaction is
//! one statement, run by itself ([`outside`]).

mod observe;
mod outside;
mod statement;

use std::path::Path;
use std::time::{Duration, Instant};

use ebb_compute::postgres::{DATABASE, OWNER, SUPERUSER};
use ebb_types::Lsn;
use tokio_postgres::error::ErrorPosition;
use tokio_postgres::types::FromSql;
use tokio_postgres::{Client, NoTls};

use crate::artifact::Migration;
use crate::decide::Found;
use crate::deploy::MigrationRun;
use crate::release_file::Policy;
use crate::{Error, Result};

pub use statement::Manner;

/// LIMIT: a private socket of a Postgres that already answered.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// LIMIT: a backend that is told to end does so at its next look, unless its machine is badly overloaded.
const END_MAX: Duration = Duration::from_secs(30);

/// How often it is looked whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The application name of sessions that run migrations: one that is found belongs to a process that is gone.
const APPLICATION: &str = "ebb migration";

/// Where the position of a Postgres is: end of WAL and next transaction number.
pub async fn positions(socket: &Path) -> Result<Found> {
    let session = Session::open(socket).await?;
    let row = session
        .client
        .query_one("select pg_current_wal_insert_lsn()::text, pg_snapshot_xmax(pg_current_snapshot())::text", &[])
        .await
        .map_err(lost)?;
    let lsn = row.try_get::<_, String>(0).ok().and_then(|text| text.parse().ok());
    let next_xid = row.try_get::<_, String>(1).ok().and_then(|text| text.parse().ok());
    Ok(Found { lsn, next_xid, ..Found::default() })
}

/// Up to where Postgres' WAL is on disk.
pub async fn flushed(socket: &Path) -> Result<Lsn> {
    let session = Session::open(socket).await?;
    let row = session.client.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.map_err(lost)?;
    let text: String = row.try_get(0).map_err(lost)?;
    text.parse().map_err(|_| crate::Error::Lost("the position of a server"))
}

/// What is to be applied, and under which conditions.
#[derive(Debug, Clone)]
pub struct Order {
    /// The release that asks.
    pub release: String,
    /// All its migrations, in order.
    pub migrations: Vec<Migration>,
    /// How long one may wait for a lock.
    pub lock_timeout_ms: u64,
    /// How long a statement may take.
    pub statement_timeout_ms: u64,
    /// Whether nobody else writes meanwhile.
    pub alone: bool,
    /// Whether it is noted what each of them locks and writes.
    pub observed: bool,
}

impl Order {
    /// With the limits of a release that names none.
    pub fn new(release: &str, migrations: Vec<Migration>) -> Self {
        let like = Policy::default();
        Self {
            release: release.to_owned(),
            migrations,
            lock_timeout_ms: like.lock_timeout_ms,
            statement_timeout_ms: like.statement_timeout_ms,
            alone: false,
            observed: false,
        }
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Migrated {
    /// Those that were applied now, in order.
    pub runs: Vec<MigrationRun>,
    /// How many transactions that took, at least; exactly, where nobody else wrote.
    pub transactions: u64,
    /// The first that failed. Nothing of it was applied; the ones before it stay.
    pub fault: Option<Error>,
}

/// Applies the migrations that have not been applied yet, in order.
///
/// # Errors
/// If the server cannot be talked to, or is not as it must be; then nothing was applied.
///
/// # Cancel safety
/// Not cancel-safe in the sense that one migration may still commit; running it again goes on from what was applied.
pub async fn run(socket: &Path, order: &Order) -> Result<Migrated> {
    let mut migrated = Migrated::default();
    if order.migrations.is_empty() {
        return Ok(migrated);
    }
    let mut session = Session::open_as(socket, OWNER, DATABASE, APPLICATION).await?;
    session.end_others().await?;
    let before = session.next_transaction().await?;
    let made = session.prepare(order).await?;
    migrated.transactions += u64::from(made);
    for migration in &order.migrations {
        match session.apply_if_new(socket, order, migration).await {
            Ok(None) => continue,
            Ok(Some(run)) => migrated.runs.push(run),
            Err(fault) => migrated.fault = Some(fault),
        }
        migrated.transactions += 1;
        if migrated.fault.is_some() {
            break;
        }
    }
    if order.alone
        && let Ok(after) = session.next_transaction().await
    {
        migrated.transactions = after.saturating_sub(before);
    }
    Ok(migrated)
}

/// How many migrations of a release are recorded as applied: transactions that are its own. One that a process which is
/// gone had left running is ended first.
pub async fn applied(socket: &Path, release: &str) -> Result<u64> {
    let session = Session::open_as(socket, OWNER, DATABASE, APPLICATION).await?;
    session.end_others().await?;
    if session.ask::<bool>("select to_regclass('ebb.migrations') is null").await?.first() == Some(&true) {
        return Ok(0);
    }
    let count = "select count(*) from ebb.migrations where release = $1";
    let row = session.client.query_one(count, &[&release]).await.map_err(lost)?;
    Ok(u64::try_from(row.try_get::<_, i64>(0).map_err(lost)?).unwrap_or(0))
}

/// A connection to the private socket of a Postgres that answers, and the task that drives it.
pub(crate) struct Session {
    pub client: Client,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Session {
    async fn open(socket: &Path) -> Result<Self> {
        Self::open_as(socket, OWNER, DATABASE, "ebb release").await
    }

    /// As superuser, in the database that every cluster has.
    pub async fn open_as_superuser(socket: &Path) -> Result<Self> {
        Self::open_as(socket, SUPERUSER, "postgres", "ebb visit").await
    }

    pub async fn open_as(socket: &Path, role: &str, database: &str, application: &str) -> Result<Self> {
        let connecting = Self::connect(socket, role, database, application);
        tokio::time::timeout(CONNECT_MAX, connecting).await.map_err(|_| Error::Deadline("connecting"))?
    }

    /// The first column of all rows of a query.
    pub async fn ask<T: for<'a> FromSql<'a>>(&self, query: &str) -> Result<Vec<T>> {
        let rows = self.client.query(query, &[]).await.map_err(lost)?;
        rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(lost)
    }

    async fn connect(socket: &Path, role: &str, database: &str, application: &str) -> Result<Self> {
        // LIMIT: `sun_path` holds 108 bytes, and data directories may be deep: go by way of an open directory.
        let (dir, name) = match (socket.parent(), socket.file_name()) {
            (Some(dir), Some(name)) => (dir, name),
            _ => return Err(Error::Lost("the path of a socket")),
        };
        let local = |source| Error::Local { act: "connect to", path: socket.to_owned(), source };
        let dir = std::fs::File::open(dir).map_err(local)?;
        let short = Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(&dir).to_string()).join(name);
        let stream = tokio::net::UnixStream::connect(short).await.map_err(local)?;
        let mut config = tokio_postgres::Config::new();
        config.user(role).dbname(database).application_name(application);
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(lost)?;
        let driver = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection of Ebb's own ended");
            }
        });
        Ok(Self { client, driver })
    }

    /// Ends what other sessions of a release still run: whoever had begun it is gone.
    async fn end_others(&self) -> Result<()> {
        let others = "from pg_stat_activity where application_name = $1 and pid <> pg_backend_pid() \
                      and usename = current_user";
        let until = Instant::now() + END_MAX;
        loop {
            let sql = format!("select count(pg_terminate_backend(pid)) {others}");
            let row = self.client.query_one(&sql, &[&APPLICATION]).await.map_err(lost)?;
            if row.try_get::<_, i64>(0).map_err(lost)? == 0 {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(Error::Deadline("ending what an interrupted release had begun"));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// The number that the next transaction gets.
    async fn next_transaction(&self) -> Result<u64> {
        let found: Vec<String> = self.ask("select pg_snapshot_xmax(pg_current_snapshot())::text").await?;
        found.first().and_then(|text| text.parse().ok()).ok_or(Error::Lost("the next transaction's number"))
    }

    /// Sets the limits, and makes what is recorded in, unless it is there: whether it was not.
    async fn prepare(&self, order: &Order) -> Result<bool> {
        let missing = "select to_regclass('ebb.migrations') is null or to_regclass('ebb.outside') is null";
        let missing = self.ask::<bool>(missing).await?.first() != Some(&false);
        let mut sql = format!(
            "set lock_timeout = {}; set statement_timeout = {}; set client_min_messages = warning; ",
            order.lock_timeout_ms, order.statement_timeout_ms
        );
        if missing {
            sql.push_str(
                "create schema if not exists ebb; \
                 create table if not exists ebb.migrations (name text primary key, hash text not null, \
                 release text not null, applied_at timestamptz not null default now()); \
                 create table if not exists ebb.outside (name text primary key, \
                 begun_at timestamptz not null default now())",
            );
        }
        self.client.batch_execute(&sql).await.map_err(|error| Error::Migration {
            file: "ebb.migrations".to_owned(),
            message: what_postgres_said(&error, ""),
            advice: "The owner role must be able to create the schema \"ebb\".".to_owned(),
        })?;
        Ok(missing)
    }

    /// Applies a migration; `None` if that was done before.
    async fn apply_if_new(
        &mut self,
        socket: &Path,
        order: &Order,
        migration: &Migration,
    ) -> Result<Option<MigrationRun>> {
        let known = self
            .client
            .query_opt("select hash from ebb.migrations where name = $1", &[&migration.name])
            .await
            .map_err(lost)?;
        match known.map(|row| row.try_get::<_, String>(0)).transpose().map_err(lost)? {
            None => {}
            Some(hash) if hash == migration.hash => return Ok(None),
            Some(_) => {
                return Err(Error::Migration {
                    file: migration.name.clone(),
                    message: "it was changed after it had been applied".to_owned(),
                    advice: "Leave applied migrations as they are, and add a new one.".to_owned(),
                });
            }
        }
        let manner = fit(migration)?;
        let began = Instant::now();
        let watch = if order.observed { Some(observe::Watch::begin(self, socket).await?) } else { None };
        let outside = matches!(manner, Manner::Outside(_));
        let mut run = MigrationRun { file: migration.name.clone(), outside, ..MigrationRun::default() };
        let applied = match &manner {
            Manner::Inside => self.apply_in_transaction(order, migration, watch.as_ref(), &mut run).await,
            Manner::Outside(alone) => self.apply_outside(order, migration, alone).await,
        };
        if let Some(watch) = watch {
            watch.end(self, &mut run).await?;
        }
        run.ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        applied.map_err(|message| Error::Migration {
            file: migration.name.clone(),
            advice: advice(&message).to_owned(),
            message,
        })?;
        // What the file SET for its session must not reach the next one.
        self.client.batch_execute("reset session authorization; reset all").await.map_err(lost)?;
        self.prepare(order).await?;
        Ok(Some(run))
    }

    async fn apply_in_transaction(
        &mut self,
        order: &Order,
        migration: &Migration,
        watch: Option<&observe::Watch>,
        run: &mut MigrationRun,
    ) -> Result<(), String> {
        let said = |error: tokio_postgres::Error| what_postgres_said(&error, &migration.sql);
        let transaction = self.client.transaction().await.map_err(said)?;
        let number = "select pg_current_xact_id()::text";
        let before: String = transaction.query_one(number, &[]).await.and_then(|row| row.try_get(0)).map_err(said)?;
        // Its row first: if the file ends the transaction by itself, it is at least known what was run.
        let row = "insert into ebb.migrations (name, hash, release) values ($1, $2, $3)";
        transaction.execute(row, &[&migration.name, &migration.hash, &order.release]).await.map_err(said)?;
        transaction.batch_execute(&migration.sql).await.map_err(said)?;
        let after: String = transaction.query_one(number, &[]).await.and_then(|row| row.try_get(0)).map_err(said)?;
        if before != after {
            return Err("it ends its transaction by itself (COMMIT or ROLLBACK): take that out".to_owned());
        }
        if let Some(watch) = watch {
            watch.look_inside(&transaction, run).await.map_err(said)?;
        }
        transaction.commit().await.map_err(said)
    }
}

/// How a migration is run.
///
/// # Errors
/// If a release cannot run it.
pub fn fit(migration: &Migration) -> Result<Manner> {
    statement::manner(&migration.sql).map_err(|unfit| Error::Migration {
        file: migration.name.clone(),
        message: unfit.what,
        advice: unfit.advice.to_owned(),
    })
}

/// What to do about what Postgres said.
fn advice(message: &str) -> &'static str {
    match message {
        said if said.contains("SQLSTATE 55P04") => {
            "A value that was added to an enum can be used only after that is committed: add it in a migration before \
             this one."
        }
        said if said.contains("SQLSTATE 25001") => {
            "It has a statement that cannot run in a transaction where it cannot be seen, as in a function: put it \
             into a migration of its own, as plain SQL."
        }
        said if said.contains("SQLSTATE 55P03") => {
            "Somebody held a lock for longer than it may be waited for. Nothing of this migration was applied. Release \
             again when that is over, or let [policy] lock_timeout be longer: everyone behind it waits as long."
        }
        _ => {
            "Nothing of this migration was applied, the ones before it were. Mend it and release again, or take the \
             data back to the checkpoint of this release."
        }
    }
}

/// A failure that is not the migration's own.
pub(crate) fn lost(error: tokio_postgres::Error) -> Error {
    Error::Postgres(what_postgres_said(&error, ""))
}

/// Message, SQLSTATE and place of an error, in one line.
fn what_postgres_said(error: &tokio_postgres::Error, sql: &str) -> String {
    let Some(said) = error.as_db_error() else {
        return error.to_string();
    };
    let mut text = format!("{} (SQLSTATE {})", said.message(), said.code().code());
    if let Some(ErrorPosition::Original(position)) = said.position()
        && let Some((line, column)) = line_and_column(sql, *position)
    {
        text.push_str(&format!(" at line {line}, column {column}"));
    }
    for (word, more) in [("detail", said.detail()), ("hint", said.hint())] {
        if let Some(more) = more {
            text.push_str(&format!("; {word}: {}", more.replace('\n', " ")));
        }
    }
    text
}

/// Postgres counts characters from 1 over the whole text (protocol documentation, "Error and Notice Message Fields").
fn line_and_column(sql: &str, position: u32) -> Option<(usize, usize)> {
    let before = usize::try_from(position).ok()?.checked_sub(1)?;
    let text: String = sql.chars().take(before).collect();
    let last_line = text.rsplit('\n').next()?;
    (before < sql.chars().count()).then(|| (text.matches('\n').count() + 1, last_line.chars().count() + 1))
}

#[cfg(test)]
mod tests;
