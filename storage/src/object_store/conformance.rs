//! What every bucket must do. Each implementation's tests run [`check`] on an empty one.

use std::io::Write;

use bytes::Bytes;
use futures::future::join_all;

use super::{Bucket, ObjectMeta, Put};
use crate::Error;

/// Runs the whole suite, with races of so many writers; panics at the first thing that does not hold.
pub(crate) async fn check(bucket: Bucket, writers: usize) {
    absent_objects_are_told_apart_from_failures(&bucket).await;
    what_was_put_is_got(&bucket).await;
    put_if_absent_never_replaces(&bucket).await;
    of_racing_writers_exactly_one_wins(&bucket, writers).await;
    racing_replacements_leave_one_whole_object(&bucket).await;
    listings_are_in_key_order(&bucket).await;
    big_objects_stream(&bucket).await;
    keys_are_checked(&bucket).await;
}

fn meta(key: &str, size: u64) -> ObjectMeta {
    ObjectMeta { key: key.to_owned(), size }
}

fn missing<T: std::fmt::Debug>(result: crate::Result<T>) {
    assert!(matches!(result, Err(Error::NoSuchObject { .. })), "{result:?}");
}

async fn absent_objects_are_told_apart_from_failures(bucket: &Bucket) {
    missing(bucket.get("absent/object").await);
    missing(bucket.get_range("absent/object", 0..1).await);
    assert_eq!(bucket.head("absent/object").await.unwrap(), None);
    assert_eq!(bucket.list("absent/", None).await.unwrap(), []);
    bucket.delete("absent/object").await.unwrap();
}

async fn what_was_put_is_got(bucket: &Bucket) {
    let bytes = Bytes::from_static(b"0123456789");
    bucket.put("put/a", bytes.clone()).await.unwrap();
    assert_eq!(bucket.get("put/a").await.unwrap(), bytes);
    assert_eq!(bucket.head("put/a").await.unwrap(), Some(meta("put/a", 10)));
    assert_eq!(bucket.get_range("put/a", 3..7).await.unwrap(), "3456");
    assert_eq!(bucket.get_range("put/a", 0..10).await.unwrap(), bytes);
    for past in [5..11, 10..11, 11..12, 0..u64::MAX] {
        let result = bucket.get_range("put/a", past.clone()).await;
        assert!(matches!(result, Err(Error::Invalid(_))), "{past:?}: {result:?}");
    }

    bucket.put("put/a", Bytes::new()).await.unwrap();
    assert_eq!(bucket.get("put/a").await.unwrap(), "");
    assert_eq!(bucket.head("put/a").await.unwrap(), Some(meta("put/a", 0)));

    bucket.delete("put/a").await.unwrap();
    missing(bucket.get("put/a").await);
    bucket.delete("put/a").await.unwrap();
}

async fn put_if_absent_never_replaces(bucket: &Bucket) {
    assert_eq!(bucket.put_if_absent("once/a", "first".into()).await.unwrap(), Put::Created);
    assert_eq!(bucket.put_if_absent("once/a", "second".into()).await.unwrap(), Put::Exists);
    assert_eq!(bucket.get("once/a").await.unwrap(), "first");
    bucket.delete("once/a").await.unwrap();
    assert_eq!(bucket.put_if_absent("once/a", "third".into()).await.unwrap(), Put::Created);
}

async fn of_racing_writers_exactly_one_wins(bucket: &Bucket, writers: usize) {
    let rounds = (0..8).map(|round| async move {
        let key = format!("race/{round}/object");
        let race = (0..writers).map(|writer| {
            let (bucket, key) = (bucket.clone(), key.clone());
            tokio::spawn(async move { bucket.put_if_absent(&key, format!("writer {writer}").into()).await.unwrap() })
        });
        let puts: Vec<_> = join_all(race).await.into_iter().map(Result::unwrap).collect();
        let winners: Vec<_> = (0..writers).filter(|&writer| puts[writer] == Put::Created).collect();
        let [winner] = winners[..] else { panic!("winners of one race: {winners:?}") };
        assert_eq!(bucket.get(&key).await.unwrap(), format!("writer {winner}"));
    });
    join_all(rounds).await;
}

async fn racing_replacements_leave_one_whole_object(bucket: &Bucket) {
    let race = (0..8_u8).map(|writer| {
        let bucket = bucket.clone();
        tokio::spawn(async move {
            bucket.put("replace/a", vec![writer; 100_000].into()).await.unwrap();
            let seen = bucket.get("replace/a").await.unwrap();
            assert!(seen.len() == 100_000 && seen.iter().all(|&b| b == seen[0]), "a mix of two objects");
        })
    });
    join_all(race).await.into_iter().for_each(|task| task.unwrap());
}

async fn listings_are_in_key_order(bucket: &Bucket) {
    let keys = ["list/a-b/1", "list/a.b", "list/a/1", "list/a/10", "list/a/2", "list/a/b/c", "list/aa", "list/b"];
    for key in keys.iter().rev() {
        bucket.put(key, "x".into()).await.unwrap();
    }
    bucket.put("list.not", Bytes::new()).await.unwrap();
    bucket.put("listing/not", Bytes::new()).await.unwrap();

    let list = async |prefix: &str, after: Option<&str>| -> Vec<String> {
        bucket.list(prefix, after).await.unwrap().into_iter().map(|meta| meta.key).collect()
    };
    assert_eq!(list("list/", None).await, keys);
    assert_eq!(bucket.list("list/a/b/", None).await.unwrap(), [meta("list/a/b/c", 1)]);
    for (at, key) in keys.iter().enumerate() {
        assert_eq!(list("list/", Some(key)).await, keys[at + 1..], "after {key}");
    }
    assert_eq!(list("list/", Some("list/a/3")).await, keys[5..], "after a key that is not there");
    assert_eq!(list("list/", Some("")).await, keys);
    assert_eq!(list("list/", Some("zzz")).await, [""; 0]);
    assert!(list("", None).await.is_sorted());
    assert_eq!(list("", Some("list/aa")).await[0], "list/b");
}

async fn big_objects_stream(bucket: &Bucket) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let chunk: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    for _ in 0..33 {
        file.write_all(&chunk).unwrap();
    }
    let size = 33 * chunk.len() as u64;
    bucket.put("big/a", "small".into()).await.unwrap();
    bucket.put_file("big/a", file.path()).await.unwrap();
    assert_eq!(bucket.head("big/a").await.unwrap(), Some(meta("big/a", size)));
    assert_eq!(bucket.get_range("big/a", size - chunk.len() as u64..size).await.unwrap(), chunk);
    assert_eq!(bucket.get_range("big/a", 4..8).await.unwrap(), 1_u32.to_le_bytes()[..]);

    let absent = bucket.put_file("big/b", std::path::Path::new("/no/such/file")).await;
    assert!(matches!(absent, Err(Error::Local { .. })), "{absent:?}");
    assert_eq!(bucket.head("big/b").await.unwrap(), None);
}

async fn keys_are_checked(bucket: &Bucket) {
    for key in ["", "/a", "../a", "a//b", ".staging/a", "a b", super::MARKER] {
        assert!(matches!(bucket.get(key).await, Err(Error::Invalid(_))), "{key:?}");
        assert!(matches!(bucket.put(key, Bytes::new()).await, Err(Error::Invalid(_))), "{key:?}");
        assert!(matches!(bucket.delete(key).await, Err(Error::Invalid(_))), "{key:?}");
        assert!(matches!(bucket.head(key).await, Err(Error::Invalid(_))), "{key:?}");
    }
    assert!(matches!(bucket.list("a", None).await, Err(Error::Invalid(_))));
}
