//! Runs an artifact's migrations on a branch's Postgres: as the owner role, never as superuser.
//!
//! Each file is one transaction together with its row in `ebb.migrations`, so that it is applied and recorded, or
//! neither. A file is known by its name; one that was applied must never change.

use std::path::Path;
use std::time::Duration;

use ebb_compute::postgres::{DATABASE, OWNER};
use ebb_types::Lsn;
use tokio_postgres::error::ErrorPosition;
use tokio_postgres::{Client, NoTls};

use crate::artifact::Migration;
use crate::decide::Found;
use crate::{Error, Result};

/// LIMIT: a private socket of a Postgres that already answered.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// LIMIT: a migration that waits longer for a lock makes every query behind it wait as long: it should fail instead.
const LOCK_TIMEOUT: &str = "10s";

/// LIMIT: building an index on a large table may take minutes; something that takes longer belongs outside a release.
const STATEMENT_TIMEOUT: &str = "15min";

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

/// Applies the migrations that have not been applied yet, in order; answers the names of those.
///
/// # Errors
/// [`Error::Migration`] names the first that failed. Nothing of it was applied; the ones before it stay.
///
/// # Cancel safety
/// Not cancel-safe in the sense that one migration may still commit; running it again goes on from what was applied.
pub async fn run(socket: &Path, release: &str, migrations: &[Migration]) -> Result<Vec<String>> {
    let mut applied = Vec::new();
    if migrations.is_empty() {
        return Ok(applied);
    }
    let mut session = Session::open(socket).await?;
    session.prepare().await?;
    for migration in migrations {
        let known = session
            .client
            .query_opt("select hash from ebb.migrations where name = $1", &[&migration.name])
            .await
            .map_err(lost)?;
        match known.map(|row| row.try_get::<_, String>(0)).transpose().map_err(lost)? {
            None => {
                session.apply(release, migration).await?;
                applied.push(migration.name.clone());
            }
            Some(hash) if hash == migration.hash => {}
            Some(_) => {
                return Err(Error::Migration {
                    file: migration.name.clone(),
                    message: "it was changed after it had been applied".to_owned(),
                    advice: "Leave applied migrations as they are, and add a new one.".to_owned(),
                });
            }
        }
    }
    Ok(applied)
}

/// A connection and the task that drives it.
pub(crate) struct Session {
    pub(crate) client: Client,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Session {
    async fn open(socket: &Path) -> Result<Self> {
        Self::open_as(socket, OWNER, DATABASE).await
    }

    /// Connects as any role to any database; the socket is trusted.
    pub(crate) async fn open_as(socket: &Path, role: &str, database: &str) -> Result<Self> {
        let connected = tokio::time::timeout(CONNECT_MAX, Self::connect(socket, role, database));
        connected.await.map_err(|_| Error::Deadline("connecting"))?
    }

    async fn connect(socket: &Path, role: &str, database: &str) -> Result<Self> {
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
        config.user(role).dbname(database).application_name("ebb");
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(lost)?;
        let driver = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection for migrations ended");
            }
        });
        Ok(Self { client, driver })
    }

    async fn prepare(&self) -> Result<()> {
        let sql = format!(
            "set lock_timeout = '{LOCK_TIMEOUT}'; set statement_timeout = '{STATEMENT_TIMEOUT}'; \
             set client_min_messages = warning; \
             create schema if not exists ebb; \
             create table if not exists ebb.migrations (name text primary key, hash text not null, \
             release text not null, applied_at timestamptz not null default now())"
        );
        self.client.batch_execute(&sql).await.map_err(|error| Error::Migration {
            file: "ebb.migrations".to_owned(),
            message: what_postgres_said(&error, ""),
            advice: "The owner role must be able to create the schema \"ebb\".".to_owned(),
        })
    }

    async fn apply(&mut self, release: &str, migration: &Migration) -> Result<()> {
        let outcome = self.apply_in_transaction(release, migration).await;
        outcome.map_err(|message| Error::Migration {
            file: migration.name.clone(),
            message,
            advice:
                "Nothing of this migration was applied, the ones before it were. Mend it and release again, or take \
                     the data back to the checkpoint of this release."
                    .to_owned(),
        })
    }

    async fn apply_in_transaction(&mut self, release: &str, migration: &Migration) -> Result<(), String> {
        let said = |error: tokio_postgres::Error| what_postgres_said(&error, &migration.sql);
        let transaction = self.client.transaction().await.map_err(said)?;
        let number = "select pg_current_xact_id()::text";
        let before: String = transaction.query_one(number, &[]).await.and_then(|row| row.try_get(0)).map_err(said)?;
        // Its row first: if the file ends the transaction by itself, it is at least known what was run.
        let row = "insert into ebb.migrations (name, hash, release) values ($1, $2, $3)";
        transaction.execute(row, &[&migration.name, &migration.hash, &release]).await.map_err(said)?;
        transaction.batch_execute(&migration.sql).await.map_err(said)?;
        let after: String = transaction.query_one(number, &[]).await.and_then(|row| row.try_get(0)).map_err(said)?;
        if before != after {
            return Err("it ends its transaction by itself (COMMIT or ROLLBACK): take that out".to_owned());
        }
        transaction.commit().await.map_err(said)?;
        // What the file SET for its session must not reach the next one.
        self.client.batch_execute("reset session authorization; reset all").await.map_err(said)?;
        self.prepare().await.map_err(|error| error.to_string())
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
