//! Definitions as `pg_dump` writes them, object by object.

use std::collections::BTreeMap;

use similar::TextDiff;

use super::{Change, ObjectDiff};

/// Kind, schema (`-` for none), name.
type Key = (String, String, String);

/// Objects that differ, and a unified diff of them.
pub(super) fn compare(from: &str, to: &str, from_name: &str, to_name: &str) -> (Vec<ObjectDiff>, String) {
    let (mut ours, theirs) = (objects(from), objects(to));
    let mut found: BTreeMap<Key, (Option<String>, Option<String>)> = BTreeMap::new();
    for (key, text) in theirs {
        let before = ours.remove(&key);
        if before.as_ref() != Some(&text) {
            found.insert(key, (before, Some(text)));
        }
    }
    found.extend(ours.into_iter().map(|(key, text)| (key, (Some(text), None))));
    let mut unified = String::new();
    let mut differing = Vec::with_capacity(found.len());
    for ((kind, schema, name), (from, to)) in found {
        let place = if schema == "-" { name.clone() } else { format!("{schema}.{name}") };
        let before = from.as_deref().map(with_newline).unwrap_or_default();
        let after = to.as_deref().map(with_newline).unwrap_or_default();
        let header = |side: &str| format!("{side} {kind} {place}");
        let diff = TextDiff::from_lines(&before, &after);
        unified.push_str(&diff.unified_diff().header(&header(from_name), &header(to_name)).to_string());
        let change = match (&from, &to) {
            (None, _) => Change::Added,
            (_, None) => Change::Removed,
            _ => Change::Changed,
        };
        let schema = Some(schema).filter(|schema| schema != "-");
        differing.push(ObjectDiff { kind, schema, name, change, from, to });
    }
    (differing, unified)
}

fn with_newline(text: &str) -> String {
    format!("{text}\n")
}

/// The objects of a dump: each has a heading `-- Name: …; Type: …; Schema: …; Owner: …`, then its statements. What comes
/// before the first, and settings between them, define nothing.
fn objects(dump: &str) -> BTreeMap<Key, String> {
    let mut objects: BTreeMap<Key, String> = BTreeMap::new();
    let mut key = None;
    for line in dump.lines() {
        if let Some(heading) = line.strip_prefix("-- Name: ") {
            key = parse_heading(heading);
            continue;
        }
        let says_nothing = line.trim().is_empty()
            || line == "--"
            || ["SET default_", "-- PostgreSQL database dump complete", "\\restrict ", "\\unrestrict "]
                .iter()
                .any(|words| line.starts_with(words));
        let Some(key) = key.as_ref().filter(|_| !says_nothing) else { continue };
        let text = objects.entry(key.clone()).or_default();
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(line);
    }
    objects
}

fn parse_heading(heading: &str) -> Option<Key> {
    // A name may hold anything; what follows it does not.
    let (name, rest) = heading.rsplit_once("; Type: ")?;
    let (kind, rest) = rest.split_once("; Schema: ")?;
    let (schema, _) = rest.rsplit_once("; Owner:")?;
    Some((kind.to_owned(), schema.to_owned(), name.to_owned()))
}
