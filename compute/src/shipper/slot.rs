//! The replication slot that keeps WAL on this node until the bucket has it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ebb_types::Lsn;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::STANDBY;
use crate::postgres::SUPERUSER;
use crate::postgres::config::PORT;

/// LIMIT: these look at shared memory and at most write one small file.
const DEADLINE: Duration = Duration::from_secs(20);

/// Why the slot could not be seen to.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("postgres did not answer about its replication slot")]
    Postgres(#[from] tokio_postgres::Error),
    #[error("postgres took too long to answer about its replication slot")]
    Deadline(#[from] tokio::time::error::Elapsed),
    #[error("postgres answered something else than expected about its replication slot")]
    Unexpected,
}

/// A look at the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// WAL from here on is kept.
    pub keeps_from: Lsn,
    /// Bytes of a WAL segment of this cluster.
    pub wal_segment_bytes: u32,
}

/// Makes the slot unless there is one that still keeps WAL. A new one keeps WAL from the latest `pg_checkpoint` on.
pub(super) async fn ensure(socket_dir: &Path) -> Result<Slot, Error> {
    // A slot that fell behind by more than max_slot_wal_keep_size keeps nothing any more, for good.
    const LOOK: &str = "SELECT restart_lsn FROM pg_replication_slots \
        WHERE slot_name = 'ebb_ship' AND wal_status <> 'lost' AND restart_lsn IS NOT NULL";
    timeout(DEADLINE, async {
        let client = connect(socket_dir).await?;
        let keeps_from = match value(&client, LOOK).await? {
            Some(found) => found,
            None => make(&client).await?,
        };
        look(&client, keeps_from).await
    })
    .await?
}

/// Makes the slot anew: what it kept is gone, or not what is wanted.
pub(super) async fn renew(socket_dir: &Path) -> Result<Slot, Error> {
    timeout(DEADLINE, async {
        let client = connect(socket_dir).await?;
        let keeps_from = make(&client).await?;
        look(&client, keeps_from).await
    })
    .await?
}

/// Ends the sessions that wait for a commit to be in the bucket. Their clients are not told that it was committed.
pub(super) async fn end_waiting(socket_dir: &Path) -> Result<(), Error> {
    const END: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    timeout(DEADLINE, async { Ok(connect(socket_dir).await?.batch_execute(END).await?) }).await?
}

async fn make(client: &Client) -> Result<String, Error> {
    const DROP: &str =
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'ebb_ship'";
    const MAKE: &str = "SELECT lsn FROM pg_create_physical_replication_slot('ebb_ship', true)";
    client.batch_execute(DROP).await?;
    value(client, MAKE).await?.ok_or(Error::Unexpected)
}

async fn look(client: &Client, keeps_from: String) -> Result<Slot, Error> {
    let segment = value(client, "SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'").await?;
    let keeps_from = keeps_from.parse().map_err(|_| Error::Unexpected)?;
    let wal_segment_bytes = segment.and_then(|text| text.parse().ok()).ok_or(Error::Unexpected)?;
    Ok(Slot { keeps_from, wal_segment_bytes })
}

/// The first value of the last row.
async fn value(client: &Client, sql: &str) -> Result<Option<String>, Error> {
    let answer = client.simple_query(sql).await?;
    let rows = answer.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    Ok(rows.last())
}

/// A session of the shipper's own, over when it is dropped. It never waits for the bucket.
pub(crate) async fn connect(socket_dir: &Path) -> Result<Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(PathBuf::from(socket_dir)).port(PORT).user(SUPERUSER).dbname("postgres");
    config.application_name("ebb unit").options("-c synchronous_commit=local");
    let (client, connection) = config.connect(NoTls).await?;
    // Ends with the client or the server; whatever it has to say, the queries are told too.
    tokio::spawn(connection);
    Ok(client)
}

const _: () = assert!(matches!(STANDBY.as_bytes(), b"ebb_ship"), "the statements name the slot");
