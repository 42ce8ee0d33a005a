//! Runs the one statement of a migration that cannot run in a transaction: once, also if a crash comes in between.
//!
//! ```text
//!   row in ebb.outside ─► the statement ─► row in ebb.migrations, the other one gone
//!          │                    │
//!          │                    └ fails: half an index is dropped, the row goes
//!          └ found by the next try: it may have run. An index that is whole is taken as it is, half a one is dropped and
//!            made anew, one to be dropped is looked for, and vacuuming again does no harm.
//! ```

use tokio_postgres::Client;

use super::statement::Alone;
use super::{Order, Session, what_postgres_said};
use crate::artifact::Migration;

impl Session {
    pub(super) async fn apply_outside(
        &mut self,
        order: &Order,
        migration: &Migration,
        alone: &Alone,
    ) -> Result<(), String> {
        let said = |error: tokio_postgres::Error| what_postgres_said(&error, &migration.sql);
        let begun = "insert into ebb.outside (name) values ($1) on conflict do nothing";
        let is_new = self.client.execute(begun, &[&migration.name]).await.map_err(said)? == 1;
        if is_new || !has_run(&self.client, alone).await.map_err(said)? {
            if !is_new {
                drop_half(&self.client, alone).await.map_err(said)?;
            }
            if let Err(error) = self.client.batch_execute(&migration.sql).await {
                let message = said(error);
                drop_half(&self.client, alone).await.map_err(said)?;
                let over = "delete from ebb.outside where name = $1";
                self.client.execute(over, &[&migration.name]).await.map_err(said)?;
                return Err(message);
            }
        }
        let transaction = self.client.transaction().await.map_err(said)?;
        let row = "insert into ebb.migrations (name, hash, release) values ($1, $2, $3)";
        transaction.execute(row, &[&migration.name, &migration.hash, &order.release]).await.map_err(said)?;
        transaction.execute("delete from ebb.outside where name = $1", &[&migration.name]).await.map_err(said)?;
        transaction.commit().await.map_err(said)
    }
}

/// Whether a statement that was begun has come to its end.
async fn has_run(client: &Client, alone: &Alone) -> Result<bool, tokio_postgres::Error> {
    match alone {
        Alone::CreateIndex { .. } => Ok(index_of(client, alone).await?.is_some_and(|(_, whole)| whole)),
        Alone::DropIndex { index } => {
            let row = client.query_one("select to_regclass($1) is null", &[index]).await?;
            row.try_get(0)
        }
        Alone::Vacuum => Ok(false),
    }
}

/// Drops an index of which only a part was made.
async fn drop_half(client: &Client, alone: &Alone) -> Result<(), tokio_postgres::Error> {
    match index_of(client, alone).await? {
        Some((index, false)) => client.batch_execute(&format!("drop index concurrently if exists {index}")).await,
        _ => Ok(()),
    }
}

/// The index that is to be made, as SQL names it, if there is one of its name, and whether it is whole.
async fn index_of(client: &Client, alone: &Alone) -> Result<Option<(String, bool)>, tokio_postgres::Error> {
    let Alone::CreateIndex { index, table } = alone else { return Ok(None) };
    // An index lies in the schema of its table (CREATE INDEX). `parse_ident` unquotes a name as SQL does.
    let sql = "select format('%I.%I', n.nspname, c.relname), i.indisvalid \
               from pg_index i join pg_class c on c.oid = i.indexrelid join pg_namespace n on n.oid = c.relnamespace \
               where i.indrelid = to_regclass($1) and c.relname = (parse_ident($2))[1]";
    match client.query_opt(sql, &[table, index]).await? {
        Some(row) => Ok(Some((row.try_get(0)?, row.try_get(1)?))),
        None => Ok(None),
    }
}
