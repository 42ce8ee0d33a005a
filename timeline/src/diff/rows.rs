//! Rows of a table on two sides, side by side, in the order of their keys.

use std::cmp::Ordering;
use std::pin::Pin;

use futures::TryStreamExt as _;
use tokio_postgres::{Row, RowStream};

use super::catalog::{Table, quoted};
use super::{ChangedRow, TableDiff};
use crate::Result;
use crate::migrate::{Session, lost};

/// A row as it is compared: what orders it, its text, and how often it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compared {
    pub key: Vec<Vec<u8>>,
    pub text: String,
    pub count: u64,
}

/// Compares the rows of a table that one side has, or both.
pub(super) async fn compare(
    ours: &Session,
    theirs: &Session,
    old: Option<&Table>,
    new: Option<&Table>,
    samples: usize,
) -> Result<TableDiff> {
    let named = old.or(new).expect("a table is on one side at least");
    let mut diff = TableDiff { schema: named.schema.clone(), table: named.name.clone(), ..TableDiff::default() };
    if old.into_iter().chain(new).any(|table| table.unlogged) {
        diff.note = Some("it is unlogged: its rows cannot be read in the past".to_owned());
        return Ok(diff);
    }
    let columns: Vec<&str> = match (old, new) {
        (Some(old), Some(new)) => new.shared(old).map(|(column, _)| column.name.as_str()).collect(),
        _ => named.columns.iter().map(|column| column.name.as_str()).collect(),
    };
    if let (Some(old), Some(new)) = (old, new)
        && (columns.len() < old.columns.len() || columns.len() < new.columns.len())
    {
        diff.note = Some(format!("compared by the columns that both sides have: {}", columns.join(", ")));
    }
    let keyed = match (old, new) {
        (Some(old), Some(new)) => old.key == new.key && !old.key.is_empty(),
        _ => !named.key.is_empty(),
    };
    if keyed {
        diff.key.clone_from(&named.key);
    }
    let mut ours = Side::open(ours, old, &columns, &diff.key).await?;
    let mut theirs = Side::open(theirs, new, &columns, &diff.key).await?;
    let mut merge = Merge { diff, samples };
    let (mut left, mut right) = (ours.next().await?, theirs.next().await?);
    loop {
        match merge.step(left.as_ref(), right.as_ref()) {
            None => return Ok(merge.diff),
            Some(Ordering::Less) => left = ours.next().await?,
            Some(Ordering::Greater) => right = theirs.next().await?,
            Some(Ordering::Equal) => (left, right) = (ours.next().await?, theirs.next().await?),
        }
    }
}

/// Goes through two ordered sequences of rows.
#[derive(Debug)]
pub(super) struct Merge {
    pub diff: TableDiff,
    /// How many of each kind are kept.
    pub samples: usize,
}

impl Merge {
    /// Takes in the next row of one side (`Less`: the older, `Greater`: the younger) or both; `None` at the end.
    pub fn step(&mut self, left: Option<&Compared>, right: Option<&Compared>) -> Option<Ordering> {
        let order = match (left, right) {
            (None, None) => return None,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(left), Some(right)) => left.key.cmp(&right.key),
        };
        let (diff, samples) = (&mut self.diff, self.samples);
        let value = |row: &Compared| serde_json::from_str(&row.text).unwrap_or_else(|_| row.text.clone().into());
        let mut removed = |row: &Compared, count: u64| {
            diff.removed += count;
            if diff.samples.removed.len() < samples {
                diff.samples.removed.push(value(row));
            }
        };
        match (order, left, right) {
            (Ordering::Less, Some(left), _) => removed(left, left.count),
            (Ordering::Equal, Some(left), Some(right)) if left.count > right.count => {
                removed(left, left.count - right.count);
            }
            (Ordering::Equal, Some(left), Some(right)) if left.count < right.count => {
                diff.added += right.count - left.count;
                if diff.samples.added.len() < samples {
                    diff.samples.added.push(value(right));
                }
            }
            (Ordering::Equal, Some(left), Some(right)) if left.text != right.text => {
                diff.changed += 1;
                if diff.samples.changed.len() < samples {
                    diff.samples.changed.push(ChangedRow { from: value(left), to: value(right) });
                }
            }
            (Ordering::Greater, _, Some(right)) => {
                diff.added += right.count;
                if diff.samples.added.len() < samples {
                    diff.samples.added.push(value(right));
                }
            }
            _ => {}
        }
        Some(order)
    }
}

/// One side's rows, as they come from its server; none where it has no such table.
struct Side(Option<Pin<Box<RowStream>>>);

impl Side {
    async fn open(session: &Session, table: Option<&Table>, columns: &[&str], key: &[String]) -> Result<Self> {
        let Some(table) = table else { return Ok(Self(None)) };
        let query = query(table, columns, key);
        let rows = session.client.query_raw(&query, std::iter::empty::<i32>()).await.map_err(lost)?;
        Ok(Self(Some(Box::pin(rows))))
    }

    async fn next(&mut self) -> Result<Option<Compared>> {
        let Some(rows) = &mut self.0 else { return Ok(None) };
        let row = rows.try_next().await.map_err(lost)?;
        row.map(|row| compared(&row)).transpose().map_err(lost)
    }
}

fn compared(row: &Row) -> Result<Compared, tokio_postgres::Error> {
    let count: i64 = row.try_get(2)?;
    Ok(Compared { key: row.try_get(0)?, text: row.try_get(1)?, count: count.unsigned_abs() })
}

/// Rows by their key, in the order of its text's bytes: of a collation each side may have its own. Without a key, rows by
/// their text.
fn query(table: &Table, columns: &[&str], key: &[String]) -> String {
    let bytes = |text: &str| format!("pg_catalog.convert_to({text}, 'UTF8')");
    let list: Vec<String> = columns.iter().map(|column| format!("t.{}", quoted(column))).collect();
    let text = format!("(SELECT pg_catalog.row_to_json(r) FROM (SELECT {}) r)::text", list.join(", "));
    let from = table.quoted();
    if key.is_empty() {
        return format!(
            "SELECT ARRAY[{}], text, count FROM (SELECT text, pg_catalog.count(*) AS count \
             FROM (SELECT {text} AS text FROM {from} t) rows GROUP BY text) counted ORDER BY 1",
            bytes("text"),
        );
    }
    let key: Vec<String> = key.iter().map(|column| bytes(&format!("t.{}::text", quoted(column)))).collect();
    format!("SELECT ARRAY[{}], {text}, 1::bigint FROM {from} t ORDER BY 1", key.join(", "))
}
