//! What differs between two moments: definitions, and rows.
//!
//! ```text
//!   two images in which nothing is open (visits) ─► page maps: which tables can differ at all
//!        │                                              │
//!        ├─► pg_dump of both ─► objects compared        ▼
//!        └─► rows of those tables, both sides in the order of their keys, side by side
//! ```
//!
//! Memory is bounded by a row of either side, besides what is named in the answer. Text forms are compared: of keys, byte by
//! byte, whatever the type's own equality is; of rows, as JSON.
//!
//! Deliberately absent: sequences' positions, large objects, and unlogged tables, which a server in recovery cannot read.

mod catalog;
mod rows;
mod schema;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use ebb_compute::postgres::SUPERUSER;
use ebb_storage::layer::FilePages;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::migrate::Session;
use crate::{Refusal, Result};
use catalog::Table;

/// Answer to `GET /v1/projects/{p}/diff`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Diff {
    /// The older side, as it was asked for.
    pub from: String,
    /// The younger side.
    pub to: String,
    /// The database that was compared.
    pub database: String,
    /// Objects whose definitions differ.
    pub objects: Vec<ObjectDiff>,
    /// Their definitions, as a unified diff.
    pub ddl: String,
    /// Tables whose rows differ, or could not be compared.
    pub tables: Vec<TableDiff>,
    /// What was read for it.
    pub read: Read,
}

/// What became of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Only the younger side has it.
    Added,
    /// Only the older side has it.
    Removed,
    /// Both have it, in different forms.
    Changed,
}

/// An object whose definition differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ObjectDiff {
    /// `TABLE`, `INDEX`, `CONSTRAINT` …, as `pg_dump` calls it.
    pub kind: String,
    /// Its schema, if it is in one.
    pub schema: Option<String>,
    /// Its name.
    pub name: String,
    /// What became of it.
    pub change: Change,
    /// Its definition in the older side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Its definition in the younger side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// A table whose rows differ.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TableDiff {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub table: String,
    /// The columns of its primary key. Without one, whole rows are counted, and none is `changed`.
    pub key: Vec<String>,
    /// Rows that only the younger side has.
    pub added: u64,
    /// Rows that only the older side has.
    pub removed: u64,
    /// Rows of the same key that differ in a column both sides have.
    pub changed: u64,
    /// The first few of each.
    pub samples: Samples,
    /// What to know about this comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A few rows, as JSON objects.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Samples {
    /// Of those added.
    #[schema(value_type = Vec<Object>)]
    pub added: Vec<serde_json::Value>,
    /// Of those removed.
    #[schema(value_type = Vec<Object>)]
    pub removed: Vec<serde_json::Value>,
    /// Of those changed.
    pub changed: Vec<ChangedRow>,
}

/// A row before and after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChangedRow {
    /// In the older side.
    #[schema(value_type = Object)]
    pub from: serde_json::Value,
    /// In the younger side.
    #[schema(value_type = Object)]
    pub to: serde_json::Value,
}

/// How much had to be read, and how much the page maps spared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Read {
    /// Tables whose rows were read.
    pub tables_read: u64,
    /// Tables of which no page differs: none was read.
    pub tables_skipped: u64,
    /// Pages (8 KiB) of the tables that were read, what they keep out of line included.
    pub pages_read: u64,
    /// Pages of the tables that were not.
    pub pages_skipped: u64,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The database.
    pub database: String,
    /// Only this table: `name` or `schema.name`.
    pub table: Option<String>,
    /// How many rows of each kind are shown.
    pub samples: usize,
}

/// One side: a server that stays at its moment.
#[derive(Debug)]
pub struct Side {
    /// The moment, as it was asked for.
    pub name: String,
    /// Its socket.
    pub socket: PathBuf,
    /// What `pg_dump` says of the database.
    pub schema: String,
}

/// Compares two sides. `files` tells which files of databases hold the same rows in both.
///
/// # Errors
/// If a side has no such database or neither has the table, or a server is lost.
///
/// # Cancel safety
/// Safe: nothing is changed.
pub async fn diff(from: Side, to: Side, asked: &Asked, files: &BTreeMap<String, FilePages>) -> Result<Diff> {
    let database = &asked.database;
    let (ours, theirs) = (open(&from, database).await?, open(&to, database).await?);
    let (objects, ddl) = schema::compare(&from.schema, &to.schema, &from.name, &to.name);
    let pairs = pairs(catalog::tables(&ours).await?, catalog::tables(&theirs).await?, asked)?;
    let mut answer = Diff {
        from: from.name,
        to: to.name,
        database: database.clone(),
        objects,
        ddl,
        tables: Vec::new(),
        read: Read::default(),
    };
    for (old, new) in pairs {
        let pages = pages_of(old.as_ref(), new.as_ref(), files);
        if let (Some(old), Some(new)) = (&old, &new)
            && is_untouched(old, new, files)
        {
            metrics::counter!("ebb_timeline_diff_tables_total", "how" => "skipped").increment(1);
            answer.read.tables_skipped += 1;
            answer.read.pages_skipped += pages;
            continue;
        }
        metrics::counter!("ebb_timeline_diff_tables_total", "how" => "read").increment(1);
        answer.read.tables_read += 1;
        answer.read.pages_read += pages;
        let found = rows::compare(&ours, &theirs, old.as_ref(), new.as_ref(), asked.samples).await?;
        if found.added + found.removed + found.changed > 0 || found.note.is_some() {
            answer.tables.push(found);
        }
    }
    Ok(answer)
}

async fn open(side: &Side, database: &str) -> Result<Session> {
    let session = Session::open_as(&side.socket, SUPERUSER, database, "ebb diff").await?;
    // Texts mean the same on both sides, whatever the roles and databases have set.
    let settings = "set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'iso_8601'; \
         set bytea_output = 'hex'; set extra_float_digits = 1; set work_mem = '32MB'; set search_path = ''; \
         set statement_timeout = 0; set row_security = off";
    session.client.batch_execute(settings).await.map_err(crate::migrate::lost)?;
    Ok(session)
}

type Pair = (Option<Table>, Option<Table>);

/// The tables of both sides by name.
fn pairs(old: Vec<Table>, new: Vec<Table>, asked: &Asked) -> Result<Vec<Pair>> {
    let mut pairs: BTreeMap<(String, String), Pair> = BTreeMap::new();
    for table in old {
        let pair = pairs.entry(table.full_name()).or_default();
        pair.0 = Some(table);
    }
    for table in new {
        let pair = pairs.entry(table.full_name()).or_default();
        pair.1 = Some(table);
    }
    if let Some(wanted) = &asked.table {
        pairs.retain(|(schema, name), _| name == wanted || *wanted == format!("{schema}.{name}"));
        if pairs.is_empty() {
            let why = format!("neither side has a table {wanted:?} in database {:?}", asked.database);
            return Err(Refusal::Invalid(why).into());
        }
    }
    Ok(pairs.into_values().collect())
}

/// The files of a table and of what it keeps out of line: `base/5/16384`, `base/5/16384.1` …
fn files_of<'a>(
    table: &'a Table,
    files: &'a BTreeMap<String, FilePages>,
) -> impl Iterator<Item = (&'a str, FilePages)> + 'a {
    table.files.iter().flat_map(move |first| {
        let segment = move |path: &str| {
            let rest = path.strip_prefix(first.as_str())?;
            let number = rest.strip_prefix('.').is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()));
            (rest.is_empty() || number).then_some(())
        };
        let near = files.range(first.clone()..).take_while(move |(path, _)| path.starts_with(first.as_str()));
        near.filter_map(move |(path, file)| segment(path).map(|()| (path.as_str(), *file)))
    })
}

fn pages_of(old: Option<&Table>, new: Option<&Table>, files: &BTreeMap<String, FilePages>) -> u64 {
    let mut all: BTreeMap<&str, FilePages> = BTreeMap::new();
    for table in old.into_iter().chain(new) {
        all.extend(files_of(table, files));
    }
    all.values().map(|file| file.pages).sum()
}

/// Whether a table has the same rows on both sides, for all that the page maps tell.
fn is_untouched(old: &Table, new: &Table, files: &BTreeMap<String, FilePages>) -> bool {
    let same = old.files == new.files && old.files.iter().all(|first| files.contains_key(first));
    // A column that was dropped and made again has the name of the old one, and none of its values.
    let columns = old.shared(new).all(|(ours, theirs)| ours == theirs);
    same && columns && files_of(old, files).all(|(_, file)| file.same)
}
