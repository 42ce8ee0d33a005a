//! `ebb why` and `ebb collect`.

use ebb_timeline::api::types::{Collect, Collected, Unkept, Verdict, Why};
use ebb_types::ErrorKind;

use super::Session;
use super::project::seconds;
use crate::failure::Failure;
use crate::output::{bytes, facts, table};

pub fn why(to: &Session, object: &str) -> Result<(), Failure> {
    // What a key may be made of; so it needs no escaping in a URL either.
    let is_key = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
    if object.is_empty() || !object.bytes().all(is_key) {
        return Err(Failure::new(ErrorKind::Invalid, format!("{object:?} cannot be the key of an object"))
            .hint("Give a key (layers/ly_…), the identifier of a layer, or the hash of an artifact."));
    }
    to.show(&to.client.get(&format!("objects/why?object={object}"))?, why_text)
}

fn why_text(why: Why) -> String {
    let verdict = match why.verdict {
        Verdict::Kept if why.bytes.is_none() => "kept, and not in the bucket yet",
        Verdict::Kept => "kept",
        Verdict::Marked => "marked: nothing needs it",
        Verdict::Unkept => "nothing needs it",
        Verdict::Orphan => "nothing knows it",
        Verdict::Deleted => "deleted",
        Verdict::Unknown => "not in the bucket, and nothing knows it",
    };
    let (marked, deleted) = match why.verdict {
        Verdict::Deleted => (None, why.since),
        _ => (why.since, None),
    };
    let mut text = facts([
        ("object", why.object),
        ("size", why.bytes.map(bytes).unwrap_or_default()),
        ("state", verdict.to_owned()),
        ("rule", why.rule.unwrap_or_default()),
        ("marked", marked.map(seconds).unwrap_or_default()),
        ("goes after", why.until.map(seconds).unwrap_or_default()),
        ("deleted", deleted.map(seconds).unwrap_or_default()),
    ]);
    let more = why.keepers.saturating_sub(why.kept_by.len() as u64);
    for keeper in why.kept_by {
        text.push_str(&format!("kept by {keeper}\n"));
    }
    if more > 0 {
        text.push_str(&format!("and by {more} more\n"));
    }
    text
}

pub fn run(to: &Session, dry_run: bool) -> Result<(), Failure> {
    let answer = to.client.post("collect", &Collect { dry_run }, None)?;
    to.show(&answer, collected_text)
}

fn collected_text(done: Collected) -> String {
    let would = if done.dry_run { "would be " } else { "" };
    let sum = |objects: &[Unkept]| {
        format!("{} objects, {}", objects.len(), bytes(objects.iter().map(|object| object.bytes).sum()))
    };
    let waiting: Vec<Unkept> = done.waiting.iter().map(|one| one.object.clone()).collect();
    let name = |what: &str| format!("{would}{what}");
    let names = [name("marked"), name("spared"), name("deleted"), name("removed here")];
    let mut text = facts([
        ("kept", format!("{} objects, {}", done.kept_objects, bytes(done.kept_bytes))),
        (&names[0], sum(&done.marked)),
        (&names[1], if done.spared.is_empty() { String::new() } else { format!("{} objects", done.spared.len()) }),
        (&names[2], sum(&done.deleted)),
        ("waiting", sum(&waiting)),
        (&names[3], format!("{} layers, {} branches", done.local_layers, done.local_branches)),
    ]);
    let fresh =
        done.marked.into_iter().filter(|object| !waiting.contains(object)).map(|object| (object, String::new()));
    let rows: Vec<_> = (done.deleted.into_iter().map(|object| (object, "now".to_owned())))
        .chain(done.waiting.into_iter().map(|one| (one.object, seconds(one.until))))
        .chain(fresh)
        .map(|(object, goes)| [object.object, bytes(object.bytes), goes, object.why])
        .collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table(["OBJECT", "SIZE", "GOES", "WHY"], rows));
    }
    if !done.expired.is_empty() {
        let rows = done.expired.into_iter().map(|one| [one.what, one.why]);
        text.push('\n');
        text.push_str(&table([if done.dry_run { "WOULD GO" } else { "GONE" }, "WHY"], rows));
    }
    if done.dry_run {
        text.push_str("\nNothing was changed.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_object_names_all_that_keeps_it() {
        let why = Why {
            object: "layers/ly_1".to_owned(),
            verdict: Verdict::Kept,
            bytes: Some(2048),
            keepers: 3,
            kept_by: vec!["head of shop/prod".to_owned(), "checkpoint one of shop/prod".to_owned()],
            ..Why::default()
        };
        insta::assert_snapshot!(why_text(why), @r"
        object  layers/ly_1
        size    2.0 KiB
        state   kept
        kept by head of shop/prod
        kept by checkpoint one of shop/prod
        and by 1 more
        ");
    }

    #[test]
    fn a_round_is_told_object_by_object() {
        let unkept = |key: &str| Unkept { object: key.to_owned(), bytes: 1024, why: "orphan".to_owned() };
        let waiting = serde_json::json!({
            "object": "layers/b", "bytes": 1024, "why": "orphan",
            "since": "2026-11-21T06:00:00Z", "until": "2026-11-28T06:00:00Z",
        });
        let done = Collected {
            kept_objects: 2,
            kept_bytes: 4096,
            marked: vec![unkept("layers/b")],
            deleted: vec![unkept("layers/a")],
            waiting: vec![serde_json::from_value(waiting).unwrap()],
            ..Collected::default()
        };
        insta::assert_snapshot!(collected_text(done), @r"
        kept          2 objects, 4.0 KiB
        marked        1 objects, 1.0 KiB
        deleted       1 objects, 1.0 KiB
        waiting       1 objects, 1.0 KiB
        removed here  0 layers, 0 branches

        OBJECT    SIZE     GOES                  WHY
        layers/a  1.0 KiB  now                   orphan
        layers/b  1.0 KiB  2026-11-28 06:00:00Z  orphan
        ");
    }

    #[test]
    fn what_a_rule_would_let_go_is_told() {
        let expired = serde_json::json!([{"what": "shop/prod@auto-2026-11-20T06-00Z", "why": "automatic checkpoint beyond daily=7"}]);
        let done =
            Collected { dry_run: true, expired: serde_json::from_value(expired).unwrap(), ..Collected::default() };
        insta::assert_snapshot!(collected_text(done), @r"
        kept                   0 objects, 0 B
        would be marked        0 objects, 0 B
        would be deleted       0 objects, 0 B
        waiting                0 objects, 0 B
        would be removed here  0 layers, 0 branches

        WOULD GO                          WHY
        shop/prod@auto-2026-11-20T06-00Z  automatic checkpoint beyond daily=7

        Nothing was changed.
        ");
    }
}
