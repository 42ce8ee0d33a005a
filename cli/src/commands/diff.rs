//! `ebb diff`.

use ebb_timeline::diff::{Diff, TableDiff};
use ebb_types::{ErrorKind, Point, PointRef};
use serde_json::Value;

use super::Session;
use super::url::encoded;
use crate::args::DiffArgs;
use crate::failure::Failure;
use crate::output::bytes;

/// Of a page, as the page maps count.
const PAGE_BYTES: u64 = 8192;

pub fn run(to: &Session, what: &DiffArgs) -> Result<(), Failure> {
    let head = PointRef { at: what.from.at.clone(), point: Point::Head };
    let younger = what.to.as_ref().unwrap_or(&head);
    if younger.at.project != what.from.at.project {
        return Err(Failure::new(ErrorKind::Invalid, "the two sides are of different projects".to_owned())
            .hint("Name two points of one project; its branches may differ."));
    }
    let side = |place: &PointRef| encoded(&format!("{}@{}", place.at.branch, place.point));
    let mut path = format!(
        "projects/{}/diff?from={}&to={}&database={}&samples={}",
        what.from.at.project,
        side(&what.from),
        side(younger),
        encoded(&what.database),
        what.samples
    );
    if let Some(table) = &what.table {
        path.push_str(&format!("&table={}", encoded(table)));
    }
    to.show(&to.client.get(&path)?, text)
}

fn text(diff: Diff) -> String {
    let mut text = diff.ddl;
    for table in &diff.tables {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&table_text(table));
    }
    if text.is_empty() {
        text.push_str("no differences\n");
    }
    let read = diff.read;
    text.push_str(&format!(
        "\n{} tables read ({}); {} skipped, no page of which differs ({})\n",
        read.tables_read,
        bytes(read.pages_read * PAGE_BYTES),
        read.tables_skipped,
        bytes(read.pages_skipped * PAGE_BYTES),
    ));
    text
}

fn table_text(table: &TableDiff) -> String {
    let mut text = format!("table {}.{}", table.schema, table.table);
    match &table.key[..] {
        [] => text.push_str(" (no primary key)"),
        key => text.push_str(&format!(" by {}", key.join(", "))),
    }
    text.push_str(&format!(": {} added, {} removed, {} changed\n", table.added, table.removed, table.changed));
    if let Some(note) = &table.note {
        text.push_str(&format!("  {note}\n"));
    }
    let mut line = |sign: &str, row: &Value| text.push_str(&format!("  {sign} {row}\n"));
    table.samples.removed.iter().for_each(|row| line("-", row));
    table.samples.added.iter().for_each(|row| line("+", row));
    for row in &table.samples.changed {
        line("<", &row.from);
        line(">", &row.to);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_then_tables_then_what_was_read() {
        let diff = serde_json::json!({
            "from": "shop/prod@v1", "to": "shop/prod", "database": "app",
            "objects": [], "ddl": "--- shop/prod@v1 TABLE public.t\n+++ shop/prod TABLE public.t\n@@ -0,0 +1 @@\n+CREATE TABLE public.t (\n",
            "tables": [
                {"schema": "public", "table": "items", "key": ["id"], "added": 1, "removed": 0, "changed": 1,
                 "samples": {"added": [{"id": 7}], "removed": [],
                             "changed": [{"from": {"id": 1, "n": 2}, "to": {"id": 1, "n": 3}}]}},
                {"schema": "public", "table": "log", "key": [], "added": 0, "removed": 2, "changed": 0,
                 "samples": {"added": [], "removed": [{"text": "x"}], "changed": []}, "note": "compared by: text"},
            ],
            "read": {"tables_read": 2, "tables_skipped": 1, "pages_read": 3, "pages_skipped": 1280},
        });
        insta::assert_snapshot!(text(serde_json::from_value(diff).unwrap()), @r#"
        --- shop/prod@v1 TABLE public.t
        +++ shop/prod TABLE public.t
        @@ -0,0 +1 @@
        +CREATE TABLE public.t (

        table public.items by id: 1 added, 0 removed, 1 changed
          + {"id":7}
          < {"id":1,"n":2}
          > {"id":1,"n":3}

        table public.log (no primary key): 0 added, 2 removed, 0 changed
          compared by: text
          - {"text":"x"}

        2 tables read (24.0 KiB); 1 skipped, no page of which differs (10.0 MiB)
        "#);
    }
}
