//! Comparing definitions, rows and files, without a server.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use ebb_storage::layer::FilePages;
use proptest::prelude::*;

use super::catalog::{Column, Table};
use super::rows::{Compared, Merge};
use super::*;

const BEFORE: &str = "\
--
-- PostgreSQL database dump
--

SET statement_timeout = 0;

SET default_table_access_method = heap;

--
-- Name: items; Type: TABLE; Schema: public; Owner: app
--

CREATE TABLE public.items (
    id bigint NOT NULL
);


ALTER TABLE public.items OWNER TO app;

--
-- Name: old; Type: TABLE; Schema: public; Owner: app
--

CREATE TABLE public.old (
);

";

const AFTER: &str = "\
--
-- Name: a; Type: TYPE; odd; Type: SCHEMA; Schema: -; Owner: app
--

CREATE SCHEMA a;

--
-- Name: items; Type: TABLE; Schema: public; Owner: app
--

CREATE TABLE public.items (
    id bigint NOT NULL,
    name text
);


ALTER TABLE public.items OWNER TO app;
";

#[test]
fn definitions_are_compared_object_by_object() {
    let (objects, ddl) = schema::compare(BEFORE, AFTER, "v1", "head");
    let told: Vec<_> = objects
        .iter()
        .map(|object| (object.kind.as_str(), object.schema.as_deref(), object.name.as_str(), object.change))
        .collect();
    assert_eq!(
        told,
        [
            ("SCHEMA", None, "a; Type: TYPE; odd", Change::Added),
            ("TABLE", Some("public"), "items", Change::Changed),
            ("TABLE", Some("public"), "old", Change::Removed),
        ]
    );
    insta::assert_snapshot!(ddl, @r"
    --- v1 SCHEMA a; Type: TYPE; odd
    +++ head SCHEMA a; Type: TYPE; odd
    @@ -0,0 +1 @@
    +CREATE SCHEMA a;
    --- v1 TABLE public.items
    +++ head TABLE public.items
    @@ -1,4 +1,5 @@
     CREATE TABLE public.items (
    -    id bigint NOT NULL
    +    id bigint NOT NULL,
    +    name text
     );
     ALTER TABLE public.items OWNER TO app;
    --- v1 TABLE public.old
    +++ head TABLE public.old
    @@ -1,2 +0,0 @@
    -CREATE TABLE public.old (
    -);
    ");
    assert_eq!(schema::compare(AFTER, AFTER, "a", "b"), (Vec::new(), String::new()));
}

fn row(key: &str, text: &str, count: u64) -> Compared {
    Compared { key: vec![key.as_bytes().to_vec()], text: text.to_owned(), count }
}

fn merged(left: &[Compared], right: &[Compared], samples: usize) -> TableDiff {
    let mut merge = Merge { diff: TableDiff::default(), samples };
    let (mut left, mut right) = (left.iter(), right.iter());
    let (mut ours, mut theirs) = (left.next(), right.next());
    while let Some(order) = merge.step(ours, theirs) {
        if order != Ordering::Greater {
            ours = left.next();
        }
        if order != Ordering::Less {
            theirs = right.next();
        }
    }
    merge.diff
}

#[test]
fn rows_without_a_key_are_counted() {
    let diff = merged(&[row("a", "1", 3), row("b", "2", 1)], &[row("a", "1", 1), row("c", "3", 2)], 1);
    assert_eq!((diff.added, diff.removed, diff.changed), (2, 3, 0));
    assert_eq!((diff.samples.added.len(), diff.samples.removed.len()), (1, 1));
}

proptest! {
    #[test]
    fn a_merge_is_what_maps_say(old in rows_by_key(), new in rows_by_key()) {
        let rows = |map: &BTreeMap<String, u8>| -> Vec<Compared> {
            map.iter().map(|(key, value)| row(key, &value.to_string(), 1)).collect()
        };
        let diff = merged(&rows(&old), &rows(&new), 3);
        let added = new.keys().filter(|key| !old.contains_key(*key)).count();
        let removed = old.keys().filter(|key| !new.contains_key(*key)).count();
        let changed = old.iter().filter(|(key, value)| new.get(*key).is_some_and(|new| new != *value)).count();
        prop_assert_eq!((diff.added, diff.removed, diff.changed), (added as u64, removed as u64, changed as u64));
        prop_assert_eq!(diff.samples.changed.len(), changed.min(3));
    }
}

fn rows_by_key() -> impl Strategy<Value = BTreeMap<String, u8>> {
    proptest::collection::btree_map("[a-d]{0,3}", 0..3_u8, 0..20)
}

fn table(files: &[&str], columns: &[(&str, i16)]) -> Table {
    let column = |&(name, number): &(&str, i16)| Column { name: name.to_owned(), number, kind: "text".to_owned() };
    Table {
        schema: "public".to_owned(),
        name: "items".to_owned(),
        unlogged: false,
        files: files.iter().map(|&file| file.to_owned()).collect(),
        columns: columns.iter().map(column).collect(),
        key: Vec::new(),
    }
}

#[test]
fn a_table_is_untouched_if_all_its_files_are_and_its_columns_mean_the_same() {
    let file = |pages, same| FilePages { pages, same };
    let files = BTreeMap::from([
        ("base/5/7".to_owned(), file(10, true)),
        ("base/5/7.1".to_owned(), file(5, true)),
        ("base/5/7_fsm".to_owned(), file(3, false)),
        ("base/5/70".to_owned(), file(1, false)),
        ("base/5/8".to_owned(), file(2, true)),
        ("base/5/9".to_owned(), file(2, true)),
        ("base/5/9.1".to_owned(), file(2, false)),
    ]);
    let check = |old: &Table, new: &Table, expect: bool| assert_eq!(is_untouched(old, new, &files), expect, "{new:?}");
    let plain = table(&["base/5/7", "base/5/8"], &[("a", 1), ("b", 2)]);
    check(&plain, &plain, true);
    assert_eq!(pages_of(Some(&plain), Some(&plain), &files), 17, "its segments, and not its free space map");
    check(&plain, &table(&["base/5/7"], &[("a", 1)]), false);
    check(&plain, &table(&["base/5/7", "base/5/8"], &[("a", 1), ("b", 3)]), false);
    check(&plain, &table(&["base/5/7", "base/5/8"], &[("a", 1), ("c", 3)]), true);
    let grown = table(&["base/5/9"], &[("a", 1)]);
    check(&grown, &grown, false);
    let unknown = table(&["base/5/6"], &[("a", 1)]);
    check(&unknown, &unknown, false);
}
