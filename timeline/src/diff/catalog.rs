//! The tables of a database, as its catalog tells them.

use crate::Result;
use crate::migrate::{Session, lost};

/// A table, partition or materialized view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub schema: String,
    pub name: String,
    /// Nothing of it is in a server that is in recovery.
    pub unlogged: bool,
    /// The first file of it and, if there is one, of what it keeps out of line, below the data directory.
    pub files: Vec<String>,
    pub columns: Vec<Column>,
    /// Names of the columns of its primary key, in its order.
    pub key: Vec<String>,
}

/// A column: its values are those of another if all of this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    pub name: String,
    pub number: i16,
    pub kind: String,
}

impl Table {
    /// The columns that another table has by name, each with that.
    pub fn shared<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (&'a Column, &'a Column)> {
        self.columns.iter().filter_map(|column| {
            let theirs = other.columns.iter().find(|theirs| theirs.name == column.name)?;
            Some((column, theirs))
        })
    }

    /// Schema and name.
    pub fn full_name(&self) -> (String, String) {
        (self.schema.clone(), self.name.clone())
    }

    /// As SQL names it, without what inherits from it.
    pub fn quoted(&self) -> String {
        format!("ONLY {}.{}", quoted(&self.schema), quoted(&self.name))
    }
}

/// An identifier in SQL.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// What holds rows of its own: tables, partitions, materialized views; none of Postgres' own.
const TABLES: &str = "
SELECT n.nspname::text, c.relname::text, c.relpersistence = 'u',
       array_remove(ARRAY[pg_catalog.pg_relation_filepath(c.oid),
                          pg_catalog.pg_relation_filepath(nullif(c.reltoastrelid, 0))], NULL),
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
       ARRAY(SELECT a.attnum FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
       ARRAY(SELECT pg_catalog.format_type(a.atttypid, a.atttypmod) FROM pg_catalog.pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
       ARRAY(SELECT a.attname::text
             FROM pg_catalog.pg_index i, pg_catalog.unnest(i.indkey) WITH ORDINALITY k(attnum, position),
                  pg_catalog.pg_attribute a
             WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid AND a.attnum = k.attnum
               AND k.position <= i.indnkeyatts
             ORDER BY k.position)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't'
  AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
ORDER BY 1, 2";

pub(super) async fn tables(session: &Session) -> Result<Vec<Table>> {
    let rows = session.client.query(TABLES, &[]).await.map_err(lost)?;
    rows.iter().map(table).collect::<Result<_, _>>().map_err(lost)
}

fn table(row: &tokio_postgres::Row) -> Result<Table, tokio_postgres::Error> {
    let (names, numbers): (Vec<String>, Vec<i16>) = (row.try_get(4)?, row.try_get(5)?);
    let kinds: Vec<String> = row.try_get(6)?;
    let columns = names.into_iter().zip(numbers).zip(kinds);
    Ok(Table {
        schema: row.try_get(0)?,
        name: row.try_get(1)?,
        unlogged: row.try_get(2)?,
        files: row.try_get(3)?,
        columns: columns.map(|((name, number), kind)| Column { name, number, kind }).collect(),
        key: row.try_get(7)?,
    })
}
