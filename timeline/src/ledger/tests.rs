use std::collections::BTreeSet;
use std::sync::Arc;

use ebb_storage::object_store::faulty::{Faults, Faulty};
use ebb_storage::object_store::{self, Bucket};
use ebb_types::{ErrorKind, TestClock};

use super::*;
use crate::Refusal;

/// A ledger of names, each used once.
#[derive(Debug, Clone, Default, PartialEq)]
struct Names(BTreeSet<String>);

impl Fold for Names {
    type Event = String;

    fn apply(&mut self, entry: &Entry<String>) -> Result<(), String> {
        match entry.events.iter().find(|name| !self.0.insert((*name).clone())) {
            Some(name) => Err(format!("{name} was used twice")),
            None => Ok(()),
        }
    }
}

async fn bucket(dir: &std::path::Path) -> Bucket {
    object_store::open(dir.to_str().unwrap()).await.unwrap()
}

async fn open(bucket: &Bucket) -> Ledger<Names> {
    Ledger::open(bucket.clone(), "names", Arc::new(TestClock::default())).await.unwrap()
}

async fn add(ledger: &Ledger<Names>, name: &str) -> Result<()> {
    ledger
        .append("test", None, |names| match names.0.contains(name) {
            true => Err(Refusal::Taken { kind: "name", name: name.to_owned() }.into()),
            false => Ok((vec![name.to_owned()], ())),
        })
        .await
}

async fn keys(bucket: &Bucket) -> Vec<String> {
    bucket.list("names/", None).await.unwrap().into_iter().map(|object| object.key).collect()
}

async fn fault(bucket: &Bucket) -> Option<(u64, String)> {
    read_chain::<String>(bucket, "names").await.unwrap().fault
}

#[tokio::test]
async fn what_was_appended_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let ledger = open(&bucket).await;
    for name in ["a", "b", "c"] {
        add(&ledger, name).await.unwrap();
    }
    assert!(add(&ledger, "b").await.is_err());
    assert_eq!(*open(&bucket).await.state(), *ledger.state());
    let verdict = ledger.verify().await.unwrap();
    assert_eq!((verdict.entries.len(), verdict.fault), (3, None));
}

#[tokio::test]
async fn stored_bytes_are_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let mut ledger = open(&bucket).await;
    ledger.writer = "0011223344556677".to_owned();
    add(&ledger, "a").await.unwrap();
    let bytes = bucket.get(&keys(&bucket).await[0]).await.unwrap();
    insta::assert_snapshot!(std::str::from_utf8(&bytes).unwrap());
    let (body, _) = bytes.split_at(bytes.len() - 75);
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(json["hash"], blake3::hash(body).to_hex().as_str());
    assert_eq!(json["prev"], blake3::hash(b"ebb ledger names").to_hex().as_str());
}

#[tokio::test]
async fn every_altered_byte_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let ledger = open(&bucket).await;
    for name in ["a", "b", "c"] {
        add(&ledger, name).await.unwrap();
    }
    let key = &keys(&bucket).await[1];
    let good = bucket.get(key).await.unwrap();
    for position in 0..good.len() {
        let mut bad = good.to_vec();
        bad[position] ^= 1;
        bucket.put(key, bad.into()).await.unwrap();
        let (seq, _) = fault(&bucket).await.unwrap_or_else(|| panic!("byte {position} was altered unnoticed"));
        assert_eq!(seq, 1);
    }
    assert!(Ledger::<Names>::open(bucket.clone(), "names", Arc::new(TestClock::default())).await.is_err());
    bucket.put(key, good).await.unwrap();
    assert_eq!(fault(&bucket).await, None);
}

#[tokio::test]
async fn removed_swapped_and_foreign_entries_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let ledger = open(&bucket).await;
    for name in ["a", "b", "c"] {
        add(&ledger, name).await.unwrap();
    }
    let keys = keys(&bucket).await;
    let mut stored = Vec::new();
    for key in &keys {
        stored.push(bucket.get(key).await.unwrap());
    }

    bucket.delete(&keys[1]).await.unwrap();
    assert!(fault(&bucket).await.is_some(), "a removed entry was not noticed");

    bucket.put(&keys[1], stored[2].clone()).await.unwrap();
    bucket.put(&keys[2], stored[1].clone()).await.unwrap();
    assert_eq!(fault(&bucket).await.map(|(seq, _)| seq), Some(1), "swapped entries were not noticed");

    bucket.put(&keys[1], stored[1].clone()).await.unwrap();
    bucket.put(&keys[2], stored[2].clone()).await.unwrap();
    assert_eq!(fault(&bucket).await, None);

    // The chain without its end is a chain; only who remembers the end can tell.
    bucket.delete(&keys[2]).await.unwrap();
    assert_eq!(fault(&bucket).await, None);
    assert!(ledger.verify().await.unwrap().fault.is_some(), "the service forgot what it wrote last");

    // Another ledger's first entry, in the place of this one's.
    let other = Ledger::<Names>::open(bucket.clone(), "others", Arc::new(TestClock::default())).await.unwrap();
    add(&other, "a").await.unwrap();
    let foreign = bucket.list("others/", None).await.unwrap().remove(0).key;
    let foreign = bucket.get(&foreign).await.unwrap();
    bucket.put(&keys[0], foreign).await.unwrap();
    assert_eq!(fault(&bucket).await.map(|(seq, _)| seq), Some(0), "a foreign entry was not noticed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_writers_one_wins_each_name_and_none_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket(dir.path()).await;
    let writer = |bucket: Bucket| async move {
        let ledger = open(&bucket).await;
        let mut won = Vec::new();
        for n in 0..20 {
            let name = format!("n{n}");
            match add(&ledger, &name).await {
                Ok(()) => won.push(name),
                Err(Error::Refused(Refusal::Taken { .. })) => {}
                Err(error) => panic!("{}", error.chain()),
            }
        }
        won
    };
    let (one, two) = tokio::join!(tokio::spawn(writer(bucket.clone())), tokio::spawn(writer(bucket.clone())));
    let mut won = one.unwrap();
    won.extend(two.unwrap());
    won.sort();
    let mut expect: Vec<_> = (0..20).map(|n| format!("n{n}")).collect();
    expect.sort();
    assert_eq!(won, expect);
    assert_eq!(open(&bucket).await.verify().await.unwrap().entries.len(), 20);
}

/// Adds names on a bucket that fails, each again until it is there; answers those whose adding was acknowledged.
async fn add_all(bucket: Bucket, writer: usize) -> Vec<String> {
    let clock = Arc::new(TestClock::default());
    let ledger = loop {
        match Ledger::<Names>::open(bucket.clone(), "names", clock.clone()).await {
            Ok(ledger) => break ledger,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain()),
        }
    };
    let mut won = Vec::new();
    for n in 0..8 {
        // Two names of each writer are everybody's.
        let name = if n < 6 { format!("{writer}-{n}") } else { format!("common-{n}") };
        loop {
            match add(&ledger, &name).await {
                Ok(()) => break won.push(name),
                Err(Error::Refused(Refusal::Taken { .. })) => break,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain()),
            }
        }
    }
    won
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_act_is_in_the_ledger_once_whatever_the_bucket_answers() {
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let below = bucket(dir.path()).await;
        let faults = Faults {
            seed,
            refused: 0.1,
            answer_lost: 0.3,
            late: 0.2,
            torn: 0.1,
            behind: 0.3,
            repeated: 0.1,
            ..Faults::default()
        };
        let faulty = Arc::new(Faulty::new(below.clone(), faults));
        let writers: Vec<_> = (0..3).map(|writer| tokio::spawn(add_all(faulty.clone(), writer))).collect();
        let mut won = Vec::new();
        for writer in writers {
            won.extend(writer.await.unwrap());
        }
        faulty.settle().await.unwrap();
        // Folding refuses a name that is there twice.
        let names = open(&below).await.state().0.clone();
        assert_eq!(names.len(), 3 * 6 + 2, "seed {seed}: {names:?}");
        assert_eq!(
            won.iter().collect::<BTreeSet<_>>().len(),
            won.len(),
            "seed {seed}: one name was won twice: {won:?}"
        );
        let made = faulty.made();
        assert!(made["answer_lost"] > 0 && made["late"] > 0, "seed {seed}: {made:?}");
    }
}
