//! What differs between two moments, against a model; and what is not read to tell it.

use std::collections::BTreeMap;

use ebb_tests::Node;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

/// Rows of a table with a key, and of one without: how often each is there.
#[derive(Debug, Clone, Default)]
struct Model {
    keyed: BTreeMap<i64, String>,
    plain: BTreeMap<String, u64>,
}

impl Model {
    /// One random change, as SQL.
    fn change(&mut self, random: &mut StdRng) -> String {
        let (n, word) = (random.random_range(0..200_i64), format!("w{}", random.random_range(0..40)));
        match random.random_range(0..6) {
            0 | 1 => {
                self.keyed.entry(n).or_insert_with(|| word.clone());
                format!("insert into keyed values ({n}, '{word}') on conflict do nothing;")
            }
            2 => {
                if let Some(held) = self.keyed.get_mut(&n) {
                    held.clone_from(&word);
                }
                format!("update keyed set word = '{word}' where n = {n};")
            }
            3 => {
                self.keyed.remove(&n);
                format!("delete from keyed where n = {n};")
            }
            4 => {
                *self.plain.entry(word.clone()).or_default() += 1;
                format!("insert into plain values ('{word}');")
            }
            _ => {
                self.plain.remove(&word);
                format!("delete from plain where word = '{word}';")
            }
        }
    }

    /// Added, removed, changed: of the keyed table and of the plain one.
    fn diff(&self, to: &Self) -> [(u64, u64, u64); 2] {
        let count = |n: usize| n as u64;
        let added = to.keyed.keys().filter(|n| !self.keyed.contains_key(n)).count();
        let removed = self.keyed.keys().filter(|n| !to.keyed.contains_key(n)).count();
        let changed = self.keyed.iter().filter(|(n, word)| to.keyed.get(n).is_some_and(|now| now != *word)).count();
        let more = |ours: &BTreeMap<String, u64>, theirs: &BTreeMap<String, u64>| -> u64 {
            theirs.iter().map(|(word, n)| n.saturating_sub(ours.get(word).copied().unwrap_or(0))).sum()
        };
        [
            (count(added), count(removed), count(changed)),
            (more(&self.plain, &to.plain), more(&to.plain, &self.plain), 0),
        ]
    }
}

fn of_table(diff: &Value, name: &str) -> (u64, u64, u64) {
    let tables = diff["tables"].as_array().expect("tables");
    let Some(found) = tables.iter().find(|table| table["table"] == name) else { return (0, 0, 0) };
    let count = |kind: &str| found[kind].as_u64().expect("a count");
    (count("added"), count("removed"), count("changed"))
}

#[test]
fn random_changes_are_told_as_a_model_knows_them() {
    let seed = std::env::var("EBB_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("EBB_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let node = Node::with_shop();
    node.psql("shop/prod", "create table keyed (n bigint primary key, word text); create table plain (word text)");
    node.psql("shop/prod", "create table big (n bigint primary key, filler text)");
    node.psql("shop/prod", "insert into big select n, repeat('x', 500) from generate_series(1, 20000) n");
    node.psql("shop/prod", "vacuum big");
    // Asleep once: from here on nothing that was open then can be seen differently.
    node.suspend("shop/prod");

    let mut model = Model::default();
    let mut moments: Vec<(String, Model)> = Vec::new();
    for round in 0..4 {
        let sql: String = (0..60).map(|_| model.change(&mut random)).collect();
        node.psql("shop/prod", &sql);
        let moment = match round % 2 {
            0 => {
                node.ok(&["checkpoint", "create", "shop/prod", &format!("c{round}")]);
                format!("shop/prod@c{round}")
            }
            _ => {
                let now = "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
                format!("shop/prod@{}", node.psql("shop/prod", now))
            }
        };
        moments.push((moment, model.clone()));
    }
    moments.push(("shop/prod".to_owned(), model.clone()));
    for (from, to) in [(0, 1), (1, 3), (2, 4), (3, 0), (4, 4)] {
        let ((from, old), (to, new)) = (&moments[from], &moments[to]);
        let diff = node.json(&["diff", from, to, "--samples", "2"]);
        let expect = old.diff(new);
        assert_eq!([of_table(&diff, "keyed"), of_table(&diff, "plain")], expect, "from {from} to {to}: {diff}");
        assert_eq!(of_table(&diff, "big"), (0, 0, 0));
        // Ten megabytes that nobody touched.
        assert!(diff["read"]["pages_skipped"].as_u64() > Some(1000), "{diff}");
        assert!(diff["read"]["pages_read"].as_u64() < Some(100), "{diff}");
        assert_eq!(diff["objects"], serde_json::json!([]));
    }
    // Nor with what is not in pages yet, nor when a row of it did change.
    node.psql("shop/prod", "update big set filler = 'y' where n = 777");
    let diff = node.json(&["diff", "shop/prod@c2", "--table", "big"]);
    assert_eq!(of_table(&diff, "big"), (0, 0, 1));
    assert_eq!(diff["tables"][0]["samples"]["changed"][0]["to"], serde_json::json!({"n": 777, "filler": "y"}));
}

#[test]
fn definitions_are_told_object_by_object_and_branches_may_differ() {
    let node = Node::with_shop();
    node.psql(
        "shop/prod",
        "create table items (id bigint primary key, name text); create table gone (n int); \
         insert into items values (1, 'lamp'), (2, 'desk')",
    );
    node.ok(&["branch", "create", "shop/pr-1", "--from", "shop/prod"]);
    node.psql(
        "shop/pr-1",
        "alter table items add column price numeric default 0; create index items_by_name on items (name); \
         drop table gone; create view cheap as select id from items where price < 1; \
         update items set name = 'table' where id = 2; insert into items values (3, 'chair', 9.5)",
    );
    let diff = node.json(&["diff", "shop/prod", "shop/pr-1"]);
    let objects: Vec<_> = diff["objects"].as_array().expect("objects").iter().collect();
    let told = |kind: &str, name: &str| {
        let found = objects.iter().find(|object| object["kind"] == kind && object["name"] == name);
        found.map(|object| object["change"].as_str().expect("a change").to_owned())
    };
    assert_eq!(told("TABLE", "items").as_deref(), Some("changed"));
    assert_eq!(told("TABLE", "gone").as_deref(), Some("removed"));
    assert_eq!(told("INDEX", "items_by_name").as_deref(), Some("added"));
    assert_eq!(told("VIEW", "cheap").as_deref(), Some("added"));
    assert!(diff["ddl"].as_str().expect("DDL").contains("+    price numeric DEFAULT 0"), "{diff}");
    assert_eq!(of_table(&diff, "items"), (1, 0, 1));
    let items = diff["tables"].as_array().and_then(|tables| tables.iter().find(|table| table["table"] == "items"));
    let note = items.expect("the table")["note"].as_str().unwrap_or_default().to_owned();
    assert!(note.contains("id, name"), "{note}");
    let text = node.ok(&["diff", "shop/prod", "shop/pr-1"]);
    assert!(text.contains("table public.items by id: 1 added, 0 removed, 1 changed"), "{text}");

    let ran = node.ebb(&["diff", "shop/prod", "other/prod"]);
    assert!(ran.code != 0 && ran.stderr.contains("different projects"), "{ran:?}");
    let ran = node.ebb(&["diff", "shop/prod", "--table", "nothing"]);
    assert!(ran.code != 0 && ran.stderr.contains("neither side has a table"), "{ran:?}");
    let ran = node.ebb(&["diff", "shop/prod@v9"]);
    assert!(ran.code != 0 && ran.stderr.contains("has no checkpoint"), "{ran:?}");
}

/// A transaction that was open at one moment and committed by the other shows in no page, if nobody has read it since.
#[tokio::test(flavor = "multi_thread")]
async fn what_commits_without_touching_a_page_is_told() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t (n bigint primary key, word text); create table other (n int)");
    node.psql("shop/prod", "insert into t values (1, 'one')");
    node.suspend("shop/prod");
    let client = node.connect("shop/prod").await;
    client.batch_execute("begin; insert into t values (2, 'two')").await.expect("a transaction is begun");
    node.superuser_tool("shop/prod", "psql", &["-Xq", "-c", "checkpoint"]);
    node.ok(&["checkpoint", "create", "shop/prod", "amidst"]);
    client.batch_execute("commit").await.expect("it is committed");
    node.ok(&["checkpoint", "create", "shop/prod", "behind"]);
    let diff = node.json(&["diff", "shop/prod@amidst", "shop/prod@behind"]);
    assert_eq!(of_table(&diff, "t"), (1, 0, 0), "{diff}");
}
