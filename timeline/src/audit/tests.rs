use std::sync::Arc;

use super::*;
use crate::service::fake::Rig;
use crate::{Caller, Service};

fn caller(actor: &str) -> Caller {
    Caller { actor: actor.to_owned(), key: None }
}

/// A project with some acts of two people, in a bucket that nobody serves.
async fn served() -> (Rig, String) {
    let rig = Rig::new().await;
    let service: Arc<Service> = rig.open().await;
    let request = api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
    let id = service.create_project(&caller("anna"), request).await.unwrap().value.project.id;
    for (actor, branch, name) in [("anna", "dev", "one"), ("bert", "dev", "two"), ("bert", "prod", "one")] {
        let request = api::CreateCheckpoint { name: name.parse().unwrap() };
        service.create_checkpoint(&caller(actor), "shop", branch, request).await.unwrap();
    }
    rig.kill(service).await;
    (rig, id.to_string())
}

fn url(rig: &Rig) -> String {
    rig.dir.path().join("bucket").to_str().unwrap().to_owned()
}

async fn entries(rig: &Rig) -> Vec<api::Entry> {
    Offline::find(&url(rig), "shop").await.unwrap().receipts(&Search::default()).await.unwrap().0
}

#[tokio::test]
async fn a_ledger_is_searched_by_who_what_and_when() {
    let (rig, _) = served().await;
    let all = entries(&rig).await;
    let find = |search: Search| {
        let found = all.iter().filter(|entry| entry.result != "begun" && search.matches(entry));
        found.map(|entry| format!("{} {}", entry.actor, entry.on)).collect::<Vec<_>>()
    };
    let named = |text: &str| Some(text.to_owned());
    let checkpoints = ["anna dev@one", "bert dev@two", "bert prod@one"];
    assert_eq!(find(Search { actor: named("bert"), ..Search::default() }), checkpoints[1..]);
    assert_eq!(find(Search { on: named("shop/dev"), ..Search::default() }), checkpoints[..2]);
    assert_eq!(find(Search { on: named("one"), ..Search::default() }), [checkpoints[0], checkpoints[2]]);
    assert_eq!(find(Search { on: named("prod@one"), ..Search::default() }), checkpoints[2..]);
    assert_eq!(find(Search { operation: named("create checkpoint"), ..Search::default() }), checkpoints);
    let last = all.last().unwrap();
    let one = Search { operation: last.operation.map(|id| id.to_string()), ..Search::default() };
    assert_eq!(find(one), checkpoints[2..]);
    assert_eq!(find(Search { since: Some(last.time), ..Search::default() }), checkpoints[2..]);
    assert_eq!(find(Search { until: Some(all[0].time), ..Search::default() }), Vec::<String>::new());
}

#[tokio::test]
async fn pages_go_on_where_the_last_one_ended_and_the_last_one_says_so() {
    let (rig, _) = served().await;
    let all = entries(&rig).await;
    let (mut after, mut seen) = (None, Vec::new());
    loop {
        let part = page(all.clone(), &Search::default(), after, 2);
        assert!(part.entries.len() <= 2);
        seen.extend(part.entries.iter().map(|entry| entry.seq));
        match part.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    assert_eq!(seen, all.iter().map(|entry| entry.seq).collect::<Vec<_>>());
    assert_eq!(page(all.clone(), &Search::default(), None, all.len()).next, None);
}

#[tokio::test]
async fn a_broken_chain_is_found_without_a_server_and_the_entry_named() {
    let (rig, id) = served().await;
    let offline = Offline::find(&url(&rig), "shop").await.unwrap();
    let good = offline.verify(None).await.unwrap();
    assert!(good.ok && good.entries == 7, "{good:?}");
    assert!(offline.verify(Some(&good.head_hash)).await.unwrap().ok);
    assert!(Offline::find(&url(&rig), "shp").await.unwrap_err().chain().contains("no project"));

    let key = |seq: u64| format!("projects/{id}/ledger/{seq:020}");
    let last = rig.bucket.get(&key(6)).await.unwrap();
    rig.bucket.delete(&key(6)).await.unwrap();
    assert!(offline.verify(None).await.unwrap().ok, "a chain without its end is whole");
    let cut = offline.verify(Some(&good.head_hash)).await.unwrap();
    assert!(cut.fault.as_ref().is_some_and(|why| why.contains("cut off")), "{cut:?}");
    rig.bucket.put(&key(6), last).await.unwrap();

    let mut bytes = rig.bucket.get(&key(3)).await.unwrap().to_vec();
    let at = bytes.windows(4).position(|part| part == b"bert").unwrap();
    bytes[at..at + 4].copy_from_slice(b"carl");
    rig.bucket.put(&key(3), bytes.into()).await.unwrap();
    let broken = offline.verify(None).await.unwrap();
    assert_eq!(broken.fault.as_deref(), Some("entry 3: the entry's bytes do not match its hash"));
    assert!(!broken.ok && broken.entries == 3);
    // The catalog is not needed for a ledger that is named by its identifier.
    assert!(!Offline::find(&url(&rig), &id).await.unwrap().verify(None).await.unwrap().ok);
}
