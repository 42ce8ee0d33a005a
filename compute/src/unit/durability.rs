//! Makes sure that Postgres goes by a changed durability.

use std::path::Path;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_postgres::SimpleQueryMessage;

use crate::control::Durability;
use crate::shipper::{self, STANDBY};

/// LIMIT: it reloads at once; a `pg_checkpoint` writes out at most shared_buffers, and one may be under way.
const DEADLINE: Duration = Duration::from_secs(60);

/// Returns when no commit is acknowledged any more that went by the settings before. Postgres was told to reload them.
pub(super) async fn in_effect(socket_dir: &Path, durability: Durability) -> Result<(), &'static str> {
    let wanted = match durability {
        Durability::Local => "",
        Durability::Bucket => STANDBY,
    };
    let waited = timeout(DEADLINE, async {
        // A new session has what the postmaster has read, which then has told all processes to read it, too.
        while !matches!(standbys(socket_dir).await, Ok(Some(shown)) if shown == wanted) {
            sleep(Duration::from_millis(20)).await;
        }
        // Whether commits wait is what the checkpointer tells them (PostgreSQL 15 `syncrep.c`,
        // `SyncRepUpdateSyncStandbysDefined`). It reads its settings before it begins what it is asked for.
        while durability == Durability::Bucket && checkpoint(socket_dir).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.map_err(|_| "postgres does not tell that it goes by the new durability; it may do so later")
}

async fn standbys(socket_dir: &Path) -> Result<Option<String>, tokio_postgres::Error> {
    let answer = shipper::connect(socket_dir).await?.simple_query("SHOW synchronous_standby_names").await?;
    Ok(answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}

async fn checkpoint(socket_dir: &Path) -> Result<(), tokio_postgres::Error> {
    shipper::connect(socket_dir).await?.batch_execute("CHECKPOINT").await
}
