//! Makes an imported cluster one of Ebb's: who may be what, who owns what, and what must not run.
//!
//! The rule, and why it is the safe one, is in decision 0016: no superuser of the source can log in or be become; what
//! superusers owned is the owner role's; that role is a member of every other one; nothing runs by itself (I12).

use std::fs;

use tokio_postgres::{Client, SimpleQueryMessage};

use super::progress::{Counted, Phase, Progress};
use super::server::{Server, said};
use super::stage::Stage;
use crate::error::{Error, OsContext, Result};
use crate::postgres::{DATABASE, OWNER, SUPERUSER};
use crate::unit::{LOOK_AT_ROLES, literal};

/// What an import is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settlement {
    /// SCRAM verifier of the owner role's password.
    pub verifier: String,
    /// Which imported database becomes the one that URLs and releases name; without it the only one there is.
    pub database: Option<String>,
}

/// Changes the cluster of a server, and writes down its roles. Answers its databases.
pub(super) async fn settle(
    server: &Server,
    stage: &Stage,
    settlement: &Settlement,
    progress: &Progress,
) -> Result<Vec<String>> {
    progress.begin(Phase::Settling, Counted::Objects, None);
    let first = server.session("template1").await?;
    if one(&first, "SELECT 1 FROM pg_database WHERE datname = 'postgres'").await?.is_none() {
        run(&first, "CREATE DATABASE postgres TEMPLATE template0").await?;
    }
    drop(first);
    let client = server.session("postgres").await?;
    refuse_prepared(&client).await?;
    run(&client, include_str!("roles.sql")).await?;
    let password = format!("ALTER ROLE {OWNER} PASSWORD {}", literal(&settlement.verifier));
    run(&client, &password).await?;
    name_database(&client, settlement, progress).await?;
    const CONNECTABLE: &str = "SELECT datname FROM pg_database WHERE datallowconn ORDER BY datname";
    let databases = column(&client, CONNECTABLE).await?;
    for database in &databases {
        settle_database(server, database, progress).await?;
    }
    tell_closed(&client, progress).await?;
    write_roles(&client, stage).await?;
    Ok(databases)
}

/// A transaction that waits for its second phase would need a setting that no branch has.
async fn refuse_prepared(client: &Client) -> Result<()> {
    let found = one(client, "SELECT string_agg(gid, ', ') FROM pg_prepared_xacts").await?;
    match found {
        Some(gids) => Err(Error::Import {
            why: format!("the source has prepared transactions ({gids})"),
            hint: Some("COMMIT PREPARED or ROLLBACK PREPARED them at the source, then import again.".to_owned()),
        }),
        None => Ok(()),
    }
}

/// Sees to it that there is a database by the name that URLs and releases use.
async fn name_database(client: &Client, settlement: &Settlement, progress: &Progress) -> Result<()> {
    const OWN: &str = "SELECT datname FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres' ORDER BY 1";
    let found = column(client, OWN).await?;
    let has = |name: &str| found.iter().any(|known| known == name);
    let becomes = match &settlement.database {
        Some(wanted) if !has(wanted) => {
            return Err(Error::Import {
                why: format!("the source has no database {wanted:?}"),
                hint: Some(format!("It has: {}.", found.join(", "))),
            });
        }
        Some(wanted) if wanted != DATABASE && has(DATABASE) => {
            return Err(Error::Import {
                why: format!("the source has a database {DATABASE:?} besides {wanted:?}"),
                hint: Some(format!("Rename it at the source, or leave {wanted:?} its name: both can be connected to.")),
            });
        }
        Some(wanted) => Some(wanted.clone()),
        None if has(DATABASE) => None,
        None => Some(found.clone()).filter(|found| found.len() == 1).and_then(|mut found| found.pop()),
    };
    match becomes {
        Some(name) if name == DATABASE => Ok(()),
        Some(name) => {
            run(client, &format!("ALTER DATABASE {} RENAME TO {DATABASE}", identifier(&name))).await?;
            progress.note(format!("database {name:?} is now {DATABASE:?}, which URLs and releases name"));
            Ok(())
        }
        None if has(DATABASE) => Ok(()),
        None => {
            run(client, &format!("CREATE DATABASE {DATABASE} OWNER {OWNER} TEMPLATE template0")).await?;
            if !found.is_empty() {
                progress.note(format!(
                    "databases {} keep their names, and {DATABASE:?}, which URLs name, is new and empty",
                    found.join(", ")
                ));
            }
            Ok(())
        }
    }
}

async fn settle_database(server: &Server, database: &str, progress: &Progress) -> Result<()> {
    let client = server.session(database).await?;
    run(&client, include_str!("settle.sql")).await?;
    const LACKING: &str = "SELECT string_agg(extname, ', ') FROM pg_extension \
        WHERE extname NOT IN (SELECT name FROM pg_available_extensions)";
    if let Some(extensions) = one(&client, LACKING).await? {
        progress.note(format!("extensions {extensions} of database {database:?} are not installed on this node"));
    }
    // Only 15 and later keep the version for a whole database.
    const COLLATION: &str = "SELECT 1 FROM pg_database WHERE datname = current_database() \
        AND current_setting('server_version_num')::int >= 150000 \
        AND to_jsonb(pg_database) ->> 'datcollversion' <> pg_database_collation_actual_version(oid)";
    let versioned = one(&client, "SELECT 1 WHERE current_setting('server_version_num')::int >= 150000").await?;
    if versioned.is_some() && one(&client, COLLATION).await?.is_some() {
        progress.note(format!(
            "database {database:?} was sorted by another version of its collation: REINDEX it, then \
             ALTER DATABASE {} REFRESH COLLATION VERSION",
            identifier(database)
        ));
    }
    progress.add(1);
    Ok(())
}

async fn tell_closed(client: &Client, progress: &Progress) -> Result<()> {
    const CLOSED: &str =
        "SELECT string_agg(datname, ', ') FROM pg_database WHERE NOT datallowconn AND NOT datistemplate";
    if let Some(closed) = one(client, CLOSED).await? {
        progress.note(format!("databases {closed} allow no connections and were not looked into"));
    }
    const WEAK: &str = "SELECT string_agg(rolname, ', ') FROM pg_authid WHERE rolcanlogin AND NOT rolsuper \
        AND (rolpassword IS NULL OR rolpassword NOT LIKE 'SCRAM-SHA-256$%')";
    if let Some(roles) = one(client, WEAK).await? {
        progress.note(format!("roles {roles} have no SCRAM password and cannot log in until they get one"));
    }
    const OFF: &str = "SELECT string_agg(DISTINCT subname, ', ') FROM pg_subscription";
    if let Some(subscriptions) = one(client, OFF).await? {
        progress.note(format!("subscriptions {subscriptions} are disabled, and stay so until somebody enables them"));
    }
    Ok(())
}

/// As a unit publishes them: who can log in through the proxy before the branch has ever run.
async fn write_roles(client: &Client, stage: &Stage) -> Result<()> {
    let mut roles = serde_json::Map::new();
    for message in client.simple_query(LOOK_AT_ROLES).await.map_err(|error| said(&error))? {
        if let SimpleQueryMessage::Row(row) = message
            && let (2, Some(role), verifier) = (row.len(), row.get(0), row.try_get(1).ok().flatten())
        {
            roles.insert(role.to_owned(), verifier.map_or(serde_json::Value::Null, serde_json::Value::from));
        }
    }
    let text = serde_json::Value::Object(roles).to_string();
    fs::write(stage.roles(), text).on("write", stage.roles())
}

async fn run(client: &Client, sql: &str) -> Result<()> {
    client.batch_execute(sql).await.map_err(|error| said(&error))
}

/// The first column of all rows.
pub(super) async fn column(client: &Client, sql: &str) -> Result<Vec<String>> {
    let answer = client.simple_query(sql).await.map_err(|error| said(&error))?;
    let values = answer.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    Ok(values.collect())
}

/// The first value there is, if there is one.
pub(super) async fn one(client: &Client, sql: &str) -> Result<Option<String>> {
    Ok(column(client, sql).await?.into_iter().next())
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

const _: () = assert!(matches!(SUPERUSER.as_bytes(), b"postgres") && matches!(OWNER.as_bytes(), b"app"));
