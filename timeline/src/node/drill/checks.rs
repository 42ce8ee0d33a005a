//! What a restored Postgres is asked.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use ebb_compute::manager::Unit;
use ebb_compute::postgres::{DATABASE, OWNER, SUPERUSER};
use tokio::process::Command;
use tokio_postgres::SimpleQueryMessage;

use super::Looked;
use crate::drill::{Probe, TableRows};
use crate::error::LocalContext as _;
use crate::migrate::{Session, lost};
use crate::{Error, Result};

/// The database that every cluster has and nobody owns.
const ANY_DATABASE: &str = "postgres";

/// LIMIT: tables whose rows are counted: the largest ones. An entry of the ledger holds their names.
const TABLES_MAX: usize = 100;

/// LIMIT: a table that takes longer to count is left out of the sample; a question that takes longer has no answer.
const STATEMENT_TIMEOUT: &str = "60s";

/// LIMIT: what a program said that found a fault, as far as it is recorded.
const SAID_MAX: usize = 1000;

/// The restored Postgres.
pub(super) struct Scratch {
    socket: PathBuf,
}

impl Scratch {
    pub fn of(unit: &Unit) -> Self {
        Self { socket: unit.socket() }
    }

    /// The first row.
    pub async fn answers(&self) -> Result<()> {
        let session = self.session(SUPERUSER, ANY_DATABASE).await?;
        session.client.query_one("select count(*) from pg_class", &[]).await.map(drop).map_err(lost)
    }

    async fn session(&self, role: &str, database: &str) -> Result<Session> {
        let session = Session::open_as(&self.socket, role, database).await?;
        let settings = format!("set statement_timeout = '{STATEMENT_TIMEOUT}'");
        session.client.batch_execute(&settings).await.map_err(lost)?;
        Ok(session)
    }

    /// Every page of every relation, by Postgres' own base backup, which compares checksums as it reads
    /// (PostgreSQL 15, `basebackup.c`, `sendFile`); what it reads is thrown away.
    pub async fn pages(&self, bin: &Path, pg_major: u32) -> Result<Looked> {
        let session = self.session(SUPERUSER, ANY_DATABASE).await?;
        let row = session.client.query_one("show data_checksums", &[]).await.map_err(lost)?;
        if row.try_get::<_, String>(0).map_err(lost)? != "on" {
            return Ok(Looked::Not("the cluster has no data checksums".to_owned()));
        }
        let mut arguments = vec!["-X", "none", "--checkpoint=fast", "--no-manifest"];
        match pg_major {
            ..15 => arguments.extend(["-D", "-", "-F", "tar"]),
            _ => arguments.push("--target=blackhole"),
        }
        self.run(bin, "pg_basebackup", &arguments, "every page of every relation").await
    }

    pub async fn amcheck(&self, bin: &Path) -> Result<Looked> {
        let arguments = ["--all", "--install-missing", "--heapallindexed"];
        self.run(bin, "pg_amcheck", &arguments, "tables and indexes of every database").await
    }

    async fn run(&self, bin: &Path, program: &'static str, arguments: &[&str], what: &str) -> Result<Looked> {
        let path = bin.join(program);
        if !path.exists() {
            return Ok(Looked::Not(format!("{program} is not installed beside the server")));
        }
        let said = self.tool(&path, arguments).await?;
        if said.status.success() {
            return Ok(Looked::At(what.to_owned()));
        }
        let text = [said.stdout, said.stderr].concat();
        let text: String = String::from_utf8_lossy(&text).trim().replace('\n', "; ").chars().take(SAID_MAX).collect();
        if text.contains("could not open extension control file") || text.contains("is not available") {
            return Ok(Looked::Not(text));
        }
        Err(Error::Damaged(format!("{program} found: {text}")))
    }

    async fn tool(&self, program: &Path, arguments: &[&str]) -> Result<Output> {
        let dir = self.socket.parent().ok_or(Error::Lost("the directory of a socket"))?;
        let mut command = Command::new(program);
        // LIMIT: `sun_path` holds 108 bytes, and data directories may be deep: go by way of the working directory.
        command.current_dir(dir).args(["-h", "/proc/self/cwd", "-p", "5432", "-U", SUPERUSER]).args(arguments);
        for name in ["PGOPTIONS", "PGSERVICE", "PGDATABASE", "PGHOSTADDR", "PGSSLMODE", "PGPASSFILE"] {
            command.env_remove(name);
        }
        command.env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
        let stdout = if arguments.contains(&"-D") { Stdio::null() } else { Stdio::piped() };
        command.stdout(stdout).stderr(Stdio::piped());
        let child = command.spawn().on("start", program)?;
        child.wait_with_output().await.on("wait for", program)
    }

    async fn databases(&self) -> Result<Vec<String>> {
        let session = self.session(SUPERUSER, ANY_DATABASE).await?;
        let sql = "select datname::text from pg_database where datallowconn and not datistemplate order by 1";
        let rows = session.client.query(sql, &[]).await.map_err(lost)?;
        rows.iter().map(|row| row.try_get(0).map_err(lost)).collect()
    }

    /// Rows of the largest tables of every database; those that cannot be counted in time are left out.
    pub async fn count_rows(&self) -> Result<Vec<TableRows>> {
        let mut tables: Vec<(i64, String, String, String)> = Vec::new();
        for database in self.databases().await? {
            let session = self.session(SUPERUSER, &database).await?;
            // What is unlogged is empty in an image that recovers, and need not be in the same one the next time.
            let sql = format!(
                "select pg_relation_size(c.oid), format('%I.%I', n.nspname, c.relname), \
                 format('%I.%I.%I', current_database(), n.nspname, c.relname) \
                 from pg_class c join pg_namespace n on n.oid = c.relnamespace \
                 where c.relkind = 'r' and c.relpersistence = 'p' \
                 and n.nspname !~ '^pg_' and n.nspname <> 'information_schema' order by 1 desc, 2 limit {TABLES_MAX}"
            );
            for row in session.client.query(&sql, &[]).await.map_err(lost)? {
                let text = |at| row.try_get::<_, String>(at).map_err(lost);
                tables.push((row.try_get(0).map_err(lost)?, database.clone(), text(1)?, text(2)?));
            }
        }
        tables.sort_by(|a, b| (b.0, &a.3).cmp(&(a.0, &b.3)));
        let mut counted = Vec::new();
        for (_, database, name, table) in tables.into_iter().take(TABLES_MAX) {
            let session = self.session(SUPERUSER, &database).await?;
            if let Some(rows) = count(&session, &name).await? {
                counted.push(TableRows { table, rows });
            }
        }
        counted.sort_by(|a, b| a.table.cmp(&b.table));
        Ok(counted)
    }

    /// Counts again what was counted before.
    pub async fn compare_rows(&self, known: &[TableRows]) -> Result<Looked> {
        let mut sessions = Vec::new();
        for database in self.databases().await? {
            let session = self.session(SUPERUSER, &database).await?;
            let sql = "select format('%I.', current_database())";
            let row = session.client.query_one(sql, &[]).await.map_err(lost)?;
            sessions.push((row.try_get::<_, String>(0).map_err(lost)?, session));
        }
        let mut compared = 0;
        let mut wrong = Vec::new();
        for TableRows { table, rows } in known {
            let found = sessions.iter().find_map(|(prefix, session)| Some((session, table.strip_prefix(prefix)?)));
            let Some((session, name)) = found else {
                wrong.push(format!("the database of {table} is gone"));
                continue;
            };
            match count(session, name).await? {
                Some(found) if found == *rows => compared += 1,
                Some(found) => wrong.push(format!("{table} has {found} rows, not {rows}")),
                None => {}
            }
        }
        match wrong.is_empty() {
            true => Ok(Looked::At(format!("{compared} tables of {} have the rows they had", known.len()))),
            false => Err(Error::Damaged(wrong.join("; "))),
        }
    }

    /// Asks as a client would, each in a session of its own.
    pub async fn probes(&self, probes: &[Probe]) -> Result<Looked> {
        if probes.is_empty() {
            return Ok(Looked::Not("none are declared".to_owned()));
        }
        for probe in probes {
            let session = self.session(OWNER, DATABASE).await?;
            let answers =
                session.client.simple_query(&probe.sql).await.map_err(|error| {
                    Error::Damaged(format!("the probe {:?} has no answer: {}", probe.sql, lost(error)))
                })?;
            let first = answers.iter().find_map(|answer| match answer {
                SimpleQueryMessage::Row(row) => Some(row.try_get(0).ok().flatten().unwrap_or_default().to_owned()),
                _ => None,
            });
            let found = first.unwrap_or_default();
            if found != probe.expect {
                let wanted = &probe.expect;
                return Err(Error::Damaged(format!("the probe {:?} answers {found:?}, not {wanted:?}", probe.sql)));
            }
        }
        Ok(Looked::At(format!("{} answered as declared", probes.len())))
    }
}

/// The rows of one table, without those of tables that inherit from it; `None` if it takes too long.
async fn count(session: &Session, table: &str) -> Result<Option<u64>> {
    match session.client.query_one(&format!("select count(*) from only {table}"), &[]).await {
        Ok(row) => Ok(u64::try_from(row.try_get::<_, i64>(0).map_err(lost)?).ok()),
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::QUERY_CANCELED) => Ok(None),
        Err(error) => Err(Error::Damaged(format!("table {table} cannot be counted: {}", lost(error)))),
    }
}
