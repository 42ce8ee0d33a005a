//! Keeps `roles.json` true: the SCRAM verifiers of the roles that may log in, so that the proxy can authenticate them
//! while Postgres sleeps.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebb_types::Lsn;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::postgres::SUPERUSER;
use crate::postgres::config::PORT;

/// LIMIT: a look takes well below a millisecond; a server that does not answer for so long has other troubles.
const DEADLINE: Duration = Duration::from_secs(5);

/// What every stored verifier begins with. Anything else given to `ALTER ROLE … PASSWORD` would be taken for a
/// password in clear (PostgreSQL 15 `crypt.c`, `get_password_type`).
const SCRAM: &str = "SCRAM-SHA-256$";

/// Superusers are left out, so that nobody can log in as one from outside; expired passwords too. Of a password that is
/// not stored as SCRAM only that is told: nobody can prove it to the proxy, which says so where only operators look.
pub(crate) const LOOK: &str = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END; \
    SELECT rolname, CASE WHEN rolpassword LIKE 'SCRAM-SHA-256$%' THEN rolpassword ELSE 'md5' END \
    FROM pg_authid WHERE rolcanlogin AND NOT rolsuper AND rolpassword IS NOT NULL AND (rolvaliduntil IS NULL OR rolvaliduntil > now())";

/// Subscriptions are one table for all databases. It is a system catalog, which wants to be asked twice.
const DISABLE_SUBSCRIPTIONS: &str = "SET allow_system_table_mods = on; \
    UPDATE pg_subscription SET subenabled = false WHERE subenabled; RESET allow_system_table_mods";

/// Why a look at the roles failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("postgres did not answer about its roles")]
    Postgres(#[from] tokio_postgres::Error),
    #[error("postgres took too long to answer about its roles")]
    Deadline(#[from] tokio::time::error::Elapsed),
    #[error("cannot write {path:?}")]
    File { path: PathBuf, source: io::Error },
}

/// The unit's own session in Postgres, and what it last published.
#[derive(Debug)]
pub(super) struct Roles {
    file: PathBuf,
    socket_dir: PathBuf,
    initial: Vec<(String, String)>,
    /// The subscriptions of the image are another branch's, and not disabled yet.
    fork: bool,
    client: Option<Client>,
    published: Option<BTreeMap<String, String>>,
}

impl Roles {
    /// Roles of the Postgres whose socket is in `socket_dir`, published to `file`. `initial` are verifiers that a role
    /// gets if it has none; on a `fork`, subscriptions are disabled once.
    pub fn new(file: PathBuf, socket_dir: PathBuf, initial: Vec<(String, String)>, fork: bool) -> Self {
        Self { file, socket_dir, initial, fork, client: None, published: None }
    }

    /// Looks, publishes what has changed, and answers the end of WAL. Connects first where there is no session, and
    /// then sees to the initial verifiers before anything is published.
    pub async fn publish(&mut self) -> Result<Option<Lsn>, Error> {
        let looked = timeout(DEADLINE, self.look()).await;
        if !matches!(looked, Ok(Ok(_))) {
            self.client = None;
        }
        let (wal_end, roles) = looked??;
        if self.published.as_ref() != Some(&roles) {
            let weak = roles.iter().filter(|(_, verifier)| !verifier.starts_with(SCRAM)).map(|(role, _)| role);
            let weak: Vec<_> = weak.collect();
            if !weak.is_empty() {
                tracing::warn!(roles = ?weak, "passwords that are stored as md5 are of no use: they must be set again");
            }
            let (file, content) = (self.file.clone(), roles.clone());
            let written = tokio::task::spawn_blocking(move || replace(&file, &content)).await;
            let written = written.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            written.map_err(|source| Error::File { path: self.file.clone(), source })?;
            self.published = Some(roles);
        }
        Ok(wal_end)
    }

    /// Ends the session: Postgres is about to stop, or is gone.
    pub fn close(&mut self) {
        self.client = None;
    }

    async fn look(&mut self) -> Result<(Option<Lsn>, BTreeMap<String, String>), tokio_postgres::Error> {
        let client = match self.client.take() {
            Some(client) => client,
            None => self.connect().await?,
        };
        let answer = client.simple_query(LOOK).await?;
        self.client = Some(client);
        let mut wal_end = None;
        let mut roles = BTreeMap::new();
        for message in answer {
            let SimpleQueryMessage::Row(row) = message else { continue };
            if row.len() == 1 {
                wal_end = row.get(0).and_then(|lsn| lsn.parse().ok());
            } else if let (Some(role), Some(verifier)) = (row.get(0), row.get(1)) {
                roles.insert(role.to_owned(), verifier.to_owned());
            }
        }
        Ok((wal_end, roles))
    }

    async fn connect(&mut self) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.socket_dir).port(PORT).user(SUPERUSER).dbname("postgres").application_name("ebb unit");
        // What it writes is written again at the next start if it was lost: it must not wait for the bucket.
        config.options("-c synchronous_commit=local");
        let (client, connection) = config.connect(NoTls).await?;
        // Ends with the client or the server; whatever it has to say, the next look learns too.
        tokio::spawn(connection);
        if self.fork {
            client.batch_execute(DISABLE_SUBSCRIPTIONS).await?;
            self.fork = false;
        }
        for (role, verifier) in &self.initial {
            if verifier.starts_with(SCRAM) {
                client.batch_execute(&give_verifier(role, verifier)).await?;
            } else {
                tracing::error!(role, "an initial verifier is no SCRAM verifier and was not set");
            }
        }
        Ok(client)
    }
}

/// Sets a verifier if the role exists and has none.
fn give_verifier(role: &str, verifier: &str) -> String {
    let (role, verifier) = (literal(role), literal(verifier));
    // format() inside quotes the identifier as this very server wants it.
    let body = format!(
        "BEGIN IF EXISTS (SELECT FROM pg_authid WHERE rolname = {role} AND rolpassword IS NULL) \
         THEN EXECUTE format('ALTER ROLE %I PASSWORD %L', {role}, {verifier}); END IF; END"
    );
    format!("DO {}", literal(&body))
}

/// Quotes a string, whatever `standard_conforming_strings` says (PostgreSQL 15 manual, 4.1.2.2).
pub(crate) fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// Replaces the file at once, and durably: a seal that follows must find these roles.
fn replace(file: &Path, roles: &BTreeMap<String, String>) -> io::Result<()> {
    let fresh = file.with_extension("json.new");
    let mut out = File::options().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    out.write_all(&serde_json::to_vec_pretty(roles)?)?;
    out.sync_all()?;
    fs::rename(&fresh, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_quoted_twice_over() {
        assert_eq!(literal(r"a'b\c"), r"E'a\'b\\c'");
        let statement = give_verifier("o'hara", "SCRAM-SHA-256$x");
        assert!(statement.starts_with("DO E'BEGIN IF EXISTS"), "{statement}");
        assert!(statement.contains(r"rolname = E\'o\\\'hara\'"), "{statement}");
    }

    #[test]
    fn the_file_is_replaced_whole() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("roles.json");
        replace(&file, &BTreeMap::from([("app".into(), "SCRAM-SHA-256$1".into())])).unwrap();
        replace(&file, &BTreeMap::from([("bob".into(), "SCRAM-SHA-256$2".into())])).unwrap();
        let read: BTreeMap<String, String> = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(read, BTreeMap::from([("bob".into(), "SCRAM-SHA-256$2".into())]));
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    }
}
