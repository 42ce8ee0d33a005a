//! The archive over buckets that work and that fail, with WAL that is made up: nothing in it depends on what WAL says.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::object_store;
use crate::object_store::faulty::{Faults, Faulty};
use crate::pg_files::WalSegment;

const SEGMENT: u32 = 1 << 20;
const CLUSTER: u64 = 7_077_077;

/// Bytes of a history: the same at the same place, others in another history.
fn wal(history: u64, start: u64, end: u64) -> Bytes {
    let byte = |at: u64| (at / 64).wrapping_mul(history.wrapping_add(11)).wrapping_mul(0x9E37_79B9).to_le_bytes()[3];
    (start..end).map(byte).collect::<Vec<_>>().into()
}

fn time(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn span(history: u64, start: u64, end: u64, at: i64) -> Span {
    Span { start: Lsn(start), bytes: wal(history, start, end), time: time(at) }
}

fn fresh(lsn: u64, at: i64) -> Start {
    Start {
        system_identifier: CLUSTER,
        wal_segment_bytes: SEGMENT,
        pg_timeline: 1,
        lsn: Lsn(lsn),
        continues: false,
        history: None,
        time: time(at),
    }
}

fn onward(claim: &Claim, at: i64) -> Start {
    let tail = claim.tail().expect("there is WAL");
    Start { continues: true, pg_timeline: tail.pg_timeline, ..fresh(tail.end.0, at) }
}

async fn scratch() -> (TempDir, Bucket, Archive) {
    let root = tempfile::tempdir().unwrap();
    let bucket = object_store::open(root.path().join("bucket").to_str().unwrap()).await.unwrap();
    let archive = Archive { entries_max: 5, ..Archive::new(bucket.clone(), BranchId::for_test(1), 2) };
    (root, bucket, archive)
}

async fn open(archive: &Archive, start: impl FnOnce(&Claim) -> Start) -> Writer {
    let claim = archive.claim(Owner::new(0)).await.unwrap();
    let start = start(&claim);
    let mut writer = claim.open(start).unwrap();
    writer.settle().await.unwrap();
    writer
}

/// Appends pieces of these sizes, a second each.
async fn write(writer: &mut Writer, history: u64, sizes: &[u64], at: i64) {
    for (second, size) in sizes.iter().enumerate() {
        let start = writer.shipped().0;
        writer.append(span(history, start, start + size, at + second as i64)).await.unwrap();
        assert_eq!(writer.shipped(), Lsn(start + size));
    }
}

fn fetched(dir: &Path, pg_timeline: u32, number: u64) -> Vec<u8> {
    fs::read(dir.join(WalSegment { pg_timeline, number, segment_bytes: SEGMENT }.file_name())).unwrap()
}

/// Fetches, and compares every byte with the history.
async fn check_fetch(archive: &Archive, history: u64, from: u64, to: u64, start: u64) {
    let dir = tempfile::tempdir().unwrap();
    let found = archive.fetch(1, Lsn(from), Lsn(to), dir.path()).await.unwrap();
    assert_eq!((found.start, found.end), (Lsn(start), Lsn(to)));
    let segment = u64::from(SEGMENT);
    let numbers: Vec<_> = (start / segment..=(to - 1) / segment).collect();
    assert_eq!(found.segments, numbers.len() as u64);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), numbers.len());
    for number in numbers {
        let mut expected = vec![0; SEGMENT as usize];
        let (first, last) = (start.max(number * segment), to.min((number + 1) * segment));
        expected[(first - number * segment) as usize..(last - number * segment) as usize]
            .copy_from_slice(&wal(history, first, last));
        assert!(fetched(dir.path(), 1, number) == expected, "segment {number} differs");
    }
}

#[tokio::test]
async fn what_was_appended_is_fetched_as_segment_files() {
    let (_root, _, archive) = scratch().await;
    assert_eq!(archive.ranges().await.unwrap(), []);
    let begin = 5 << 20;
    let mut writer = open(&archive, |_| fresh(begin, 0)).await;
    // Across stretches, across segments, one of the longest.
    write(&mut writer, 1, &[100, 8000, 700_000, 1, SPAN_BYTES_MAX as u64, 8192, 4000, 9, 77, 123_456, 5, 6], 1).await;
    let end = writer.shipped().0;
    writer.end().await.unwrap();
    let ranges = archive.ranges().await.unwrap();
    let expected = Range {
        pg_timeline: 1,
        start: Lsn(begin),
        end: Lsn(end),
        first_time: time(0),
        last_time: time(12),
        stretches: 0..3,
    };
    assert_eq!(ranges, [expected]);
    check_fetch(&archive, 1, begin, end, begin).await;
    check_fetch(&archive, 1, begin + 3, begin + 101, begin).await;
    check_fetch(&archive, 1, 7 << 20, (7 << 20) + 1, 7 << 20).await;
    check_fetch(&archive, 1, end - 3, end - 2, (end - 3) >> 20 << 20).await;
    check_fetch(&archive, 1, 0, begin + 1, begin).await;
    let dir = tempfile::tempdir().unwrap();
    for (pg_timeline, from, to) in [(1, begin, end + 1), (1, begin, begin), (1, end, begin + 1), (2, begin, end)] {
        let error = archive.fetch(pg_timeline, Lsn(from), Lsn(to), dir.path()).await.unwrap_err();
        assert!(matches!(error, Error::NoSuchWal { .. }), "{error}");
    }
    assert!(matches!(writer.append(span(1, end, end + 1, 20)).await, Err(Error::Invalid(_))), "it has ended");
}

#[tokio::test]
async fn a_span_that_does_not_follow_or_fit_is_refused() {
    let (_root, _, archive) = scratch().await;
    let claim = archive.claim(Owner::new(0)).await.unwrap();
    assert!(claim.open(fresh(77, 0)).is_err(), "not the beginning of a page");
    let claim = archive.claim(Owner::new(0)).await.unwrap();
    assert!(claim.open(Start { continues: true, ..fresh(0, 0) }).is_err(), "there is nothing to continue");
    let mut writer = open(&archive, |_| fresh(0, 0)).await;
    write(&mut writer, 1, &[10], 1).await;
    for (start, end) in [(9, 20), (11, 20), (0, 10), (10, 10), (10, 11 + SPAN_BYTES_MAX as u64)] {
        assert!(matches!(writer.append(span(1, start, end, 2)).await, Err(Error::Invalid(_))), "{start}..{end}");
    }
    write(&mut writer, 1, &[10], 2).await;
    let other = Start { system_identifier: 8, ..fresh(0, 3) };
    assert!(archive.claim(Owner::new(0)).await.unwrap().open(other).is_err(), "another cluster");
    let wrong_end = Start { continues: true, ..fresh(19, 3) };
    assert!(archive.claim(Owner::new(0)).await.unwrap().open(wrong_end).is_err());
}

#[tokio::test]
async fn the_next_writer_goes_on_and_the_last_one_can_append_nothing() {
    let (_root, _, archive) = scratch().await;
    let mut first = open(&archive, |_| fresh(0, 0)).await;
    write(&mut first, 1, &[100, 100], 1).await;
    let claim = archive.claim(Owner::new(0)).await.unwrap();
    let tail = claim.tail().unwrap();
    assert_eq!((tail.start, tail.end, &tail.bytes), (Lsn(100), Lsn(200), &wal(1, 100, 200)));
    // From the claim on: not only once the next stretch is open.
    for _ in 0..2 {
        let error = first.append(span(1, 200, 300, 3)).await.unwrap_err();
        assert!(matches!(error, Error::Overtaken { .. } | Error::Invalid(_)), "{error}");
        assert!(matches!(first.settle().await, Err(Error::Overtaken { .. })));
    }
    assert!(matches!(first.end().await, Err(Error::Overtaken { .. })));
    assert_eq!(first.shipped(), Lsn(200));
    let start = onward(&claim, 5);
    let mut second = claim.open(start).unwrap();
    second.settle().await.unwrap();
    // One that opened and wrote nothing, and one that only claimed, leave nothing between.
    drop(open(&archive, |claim| onward(claim, 6)).await);
    archive.claim(Owner::new(0)).await.unwrap();
    assert!(matches!(second.append(span(1, 200, 300, 7)).await, Err(Error::Overtaken { .. })));
    let mut third = open(&archive, |claim| onward(claim, 8)).await;
    // A clock that went back.
    write(&mut third, 1, &[100, 50], 0).await;
    let stretches = archive.stretches().await.unwrap();
    assert_eq!(stretches.len(), 4);
    assert!(stretches.is_sorted_by_key(|stretch| stretch.last_time));
    assert_eq!(archive.ranges().await.unwrap().len(), 1);
    check_fetch(&archive, 1, 0, 350, 0).await;
}

#[tokio::test]
async fn of_two_that_open_at_once_one_goes_on() {
    let (_root, _, archive) = scratch().await;
    let (one, other) = tokio::join!(archive.claim(Owner::new(0)), archive.claim(Owner::new(0)));
    let (mut one, mut other) = (one.unwrap().open(fresh(0, 0)).unwrap(), other.unwrap().open(fresh(0, 0)).unwrap());
    let outcomes = tokio::join!(one.settle(), other.settle());
    let (mut winner, mut loser) = match outcomes {
        (Ok(()), Err(Error::Overtaken { .. })) => (one, other),
        (Err(Error::Overtaken { .. }), Ok(())) => (other, one),
        others => panic!("{others:?}"),
    };
    write(&mut winner, 1, &[10, 20], 1).await;
    assert!(loser.settle().await.is_err() && loser.append(span(2, 0, 10, 1)).await.is_err());
    check_fetch(&archive, 1, 0, 30, 0).await;
}

#[tokio::test]
async fn an_owner_of_an_earlier_epoch_is_refused() {
    let (_root, _, archive) = scratch().await;
    let mut writer = archive.claim(Owner::new(3)).await.unwrap().open(fresh(0, 0)).unwrap();
    writer.settle().await.unwrap();
    write(&mut writer, 1, &[10], 1).await;
    assert!(matches!(archive.claim(Owner::new(2)).await, Err(Error::Overtaken { .. })));
    write(&mut writer, 1, &[10], 2).await;
    archive.claim(Owner::new(3)).await.unwrap();
    assert!(writer.append(span(1, 20, 30, 3)).await.is_err());
}

#[tokio::test]
async fn a_fence_shuts_earlier_epochs_out_before_anyone_writes() {
    let (_root, _, archive) = scratch().await;
    let mut old = archive.claim(Owner::new(1)).await.unwrap().open(fresh(0, 0)).unwrap();
    old.settle().await.unwrap();
    write(&mut old, 1, &[100], 1).await;
    let claimed_before = archive.claim(Owner::new(1)).await.unwrap();
    for _ in 0..2 {
        archive.fence(Owner::new(2)).await.unwrap();
    }
    assert!(matches!(old.append(span(1, 100, 200, 2)).await, Err(Error::Overtaken { .. })));
    assert!(matches!(archive.claim(Owner::new(1)).await, Err(Error::Overtaken { .. })));
    assert!(matches!(archive.fence(Owner::new(1)).await, Err(Error::Overtaken { .. })));
    let mut late = onward(&claimed_before, 3);
    late.history = None;
    assert!(matches!(claimed_before.open(late).unwrap().settle().await, Err(Error::Overtaken { .. })));
    check_fetch(&archive, 1, 0, 100, 0).await;
    // The new owner goes on where the old one ended, through the empty stretch of the fence.
    let claim = archive.claim(Owner::new(2)).await.unwrap();
    let start = onward(&claim, 4);
    let mut new = claim.open(start).unwrap();
    new.settle().await.unwrap();
    write(&mut new, 1, &[50], 5).await;
    assert_eq!(archive.ranges().await.unwrap().len(), 1);
    check_fetch(&archive, 1, 0, 150, 0).await;
    archive.fence(Owner::new(2)).await.unwrap();
    write(&mut new, 1, &[50], 6).await;
}

#[tokio::test]
async fn an_archive_without_any_wal_can_be_fenced() {
    let (_root, _, archive) = scratch().await;
    archive.fence(Owner::new(7)).await.unwrap();
    assert_eq!(archive.ranges().await.unwrap(), []);
    assert!(matches!(archive.claim(Owner::new(6)).await, Err(Error::Overtaken { .. })));
    let mut writer = archive.claim(Owner::new(7)).await.unwrap().open(fresh(0, 0)).unwrap();
    writer.settle().await.unwrap();
    write(&mut writer, 1, &[100], 1).await;
    check_fetch(&archive, 1, 0, 100, 0).await;
}

#[tokio::test]
async fn gaps_and_histories_that_were_given_up_are_seen() {
    let (_root, _, archive) = scratch().await;
    let segment = u64::from(SEGMENT);
    let mut first = open(&archive, |_| fresh(0, 0)).await;
    write(&mut first, 1, &[segment, segment, 900], 1).await;
    // WAL from 2 × segment + 900 to 4 × segment was lost.
    let mut second = open(&archive, |_| fresh(4 * segment, 10)).await;
    write(&mut second, 1, &[segment, 500], 11).await;
    let bounds = |ranges: Vec<Range>| ranges.into_iter().map(|r| (r.start.0, r.end.0)).collect::<Vec<_>>();
    let after_gap = archive.ranges().await.unwrap();
    assert_eq!(bounds(after_gap), [(0, 2 * segment + 900), (4 * segment, 5 * segment + 500)]);
    let dir = tempfile::tempdir().unwrap();
    let error = archive.fetch(1, Lsn(0), Lsn(3 * segment), dir.path()).await.unwrap_err();
    assert!(matches!(error, Error::NoSuchWal { .. }), "{error}");
    check_fetch(&archive, 1, 0, 5 * segment, 4 * segment).await;
    check_fetch(&archive, 1, 0, 2 * segment, 0).await;
    // A volume that had only the WAL of the first writer's first segment went on by itself.
    let mut third = open(&archive, |_| fresh(segment, 20)).await;
    write(&mut third, 2, &[segment], 21).await;
    let ranges = archive.ranges().await.unwrap();
    assert_eq!(bounds(ranges), [(0, segment), (segment, 2 * segment)]);
    check_fetch(&archive, 2, segment, 2 * segment, segment).await;
    check_fetch(&archive, 1, 0, segment, 0).await;
}

/// A segment file of the history, as Postgres would leave it after so many pages.
fn write_segment(dir: &Path, number: u64, pages: u64) {
    let segment = WalSegment { pg_timeline: 1, number, segment_bytes: SEGMENT };
    let mut bytes = vec![0; SEGMENT as usize];
    for page in 0..pages {
        let at = (page * 8192) as usize;
        bytes[at..at + 8192].copy_from_slice(&wal(1, segment.start().0, segment.start().0 + 8192));
        bytes[at..at + 2].copy_from_slice(&0xD110_u16.to_le_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&(segment.start().0 + page * 8192).to_le_bytes());
    }
    fs::write(dir.join(segment.file_name()), bytes).unwrap();
}

#[tokio::test]
async fn an_archive_that_begins_inside_a_segment_goes_on_where_a_layer_ends() {
    let (_root, _, archive) = scratch().await;
    let segment = u64::from(SEGMENT);
    let begin = 4 * segment + 3 * 8192;
    let mut writer = open(&archive, |_| fresh(begin, 0)).await;
    write(&mut writer, 1, &[5000, segment], 1).await;
    let to = writer.shipped().0;
    let check = async |layer: &[(u64, u64)], start: u64| {
        let dir = tempfile::tempdir().unwrap();
        layer.iter().for_each(|(number, pages)| write_segment(dir.path(), *number, *pages));
        let before = layer.iter().any(|(number, _)| *number == 4).then(|| fetched(dir.path(), 1, 4));
        let found = archive.fetch(1, Lsn(2 * segment + 77), Lsn(to), dir.path()).await.unwrap();
        assert_eq!((found.start, found.segments), (Lsn(start), 2), "with {layer:?}");
        let front = &fetched(dir.path(), 1, 4)[..(begin - 4 * segment) as usize];
        match before {
            Some(before) if start < begin => assert!(front == &before[..front.len()]),
            _ => assert!(front.iter().all(|byte| *byte == 0)),
        }
        assert!(fetched(dir.path(), 1, 4)[front.len()..] == wal(1, begin, 5 * segment));
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count() as u64,
            2 + layer.iter().filter(|(n, _)| *n < 4).count() as u64
        );
    };
    check(&[], begin).await;
    check(&[(4, 2)], begin).await;
    check(&[(4, 3)], 4 * segment).await;
    check(&[(4, 4)], 4 * segment).await;
    check(&[(3, 128), (4, 4)], 3 * segment).await;
    check(&[(2, 128), (3, 128), (4, 4)], 2 * segment).await;
    check(&[(2, 128), (3, 127), (4, 4)], 4 * segment).await;
    check(&[(2, 128), (4, 4)], 4 * segment).await;
    check(&[(3, 128)], begin).await;
}

#[tokio::test]
async fn a_moment_is_found_by_its_time() {
    let (_root, _, archive) = scratch().await;
    assert_eq!(archive.at(time(0)).await.unwrap(), None);
    let mut writer = open(&archive, |_| fresh(0, 0)).await;
    for second in 1..=23 {
        let start = writer.shipped().0;
        writer.append(span(1, start, start + 10, 10 * second)).await.unwrap();
    }
    let check = async |at: i64, expect: Option<u64>| {
        let found = archive.at(time(at)).await.unwrap();
        assert_eq!(found.map(|moment| moment.lsn.0), expect, "at {at}");
        assert!(found.is_none_or(|moment| moment.time >= time(at) && moment.pg_timeline == 1));
    };
    check(-5, Some(10)).await;
    for second in 1..=23 {
        check(10 * second, Some(10 * second as u64)).await;
        check(10 * second - 1, Some(10 * second as u64)).await;
    }
    check(231, None).await;
}

#[tokio::test]
async fn old_stretches_are_removed_and_what_is_left_can_be_read() {
    let (_root, bucket, archive) = scratch().await;
    let mut writer = open(&archive, |_| fresh(0, 0)).await;
    write(&mut writer, 1, &[1000; 23], 1).await;
    assert_eq!(archive.stretches().await.unwrap().len(), 5);
    assert_eq!(archive.remove_before(0).await.unwrap(), 0);
    // Cut off after the opening was deleted.
    bucket.delete(&archive.openings().key(0)).await.unwrap();
    assert_eq!(archive.remove_before(2).await.unwrap(), 6 + 7);
    let range = &archive.ranges().await.unwrap()[0];
    assert_eq!((range.start, range.end, range.stretches.clone()), (Lsn(10_000), Lsn(23_000), 2..5));
    let dir = tempfile::tempdir().unwrap();
    let found = archive.fetch(1, Lsn(0), Lsn(20_000), dir.path()).await.unwrap();
    assert_eq!(found.start, Lsn(10_000));
    write(&mut writer, 1, &[1000; 3], 30).await;
    let left = archive.remove_before(u64::MAX).await.unwrap();
    assert!(left > 0);
    assert_eq!(archive.stretches().await.unwrap().len(), 1, "the newest stays");
    assert!(writer.append(span(1, 26_000, 26_001, 40)).await.is_ok());
    assert!(archive.claim(Owner::new(0)).await.unwrap().tail().is_some());
    archive.remove().await.unwrap();
    assert_eq!(bucket.list("", None).await.unwrap(), []);
}

#[tokio::test]
async fn a_later_postgres_timeline_brings_its_history_and_what_was_before() {
    let (_root, _, archive) = scratch().await;
    let segment = u64::from(SEGMENT);
    let mut first = open(&archive, |_| fresh(0, 0)).await;
    write(&mut first, 1, &[segment, segment, 900], 1).await;
    first.end().await.unwrap();
    let switched = Lsn(2 * segment + 500);
    let history = Bytes::from(format!("# who knows\n1\t{switched}\tat restore point \"x y\"\n"));
    let start = Start { pg_timeline: 2, history: Some(history.clone()), ..fresh(2 * segment, 10) };
    let mut second = open(&archive, |_| start).await;
    for _ in 0..12 {
        let start = second.shipped().0;
        let mut bytes = wal(2, start, start + 200).to_vec();
        let before = (switched.0.saturating_sub(start) as usize).min(bytes.len());
        bytes[..before].copy_from_slice(&wal(1, start, start + before as u64));
        second.append(Span { start: Lsn(start), bytes: bytes.into(), time: time(11) }).await.unwrap();
    }
    assert_eq!(archive.ranges().await.unwrap().len(), 2);
    for to in [2 * segment + 600, 2 * segment + 2400] {
        let dir = tempfile::tempdir().unwrap();
        let found = archive.fetch(2, Lsn(40), Lsn(to), dir.path()).await.unwrap();
        assert_eq!((found.start, found.end), (Lsn(0), Lsn(to)));
        assert_eq!(fs::read(dir.path().join("00000002.history")).unwrap(), history);
        assert!(fetched(dir.path(), 1, 0) == wal(1, 0, segment) && fetched(dir.path(), 1, 1).len() == 1 << 20);
        let newest = fetched(dir.path(), 2, 2);
        assert!(newest[..500] == wal(1, 2 * segment, 2 * segment + 500));
        assert!(newest[500..(to % segment) as usize] == wal(2, 2 * segment + 500, to));
        assert!(newest[(to % segment) as usize..].iter().all(|byte| *byte == 0));
    }
    // What the first writer had beyond the switch is still its own.
    let dir = tempfile::tempdir().unwrap();
    archive.fetch(1, Lsn(0), Lsn(2 * segment + 900), dir.path()).await.unwrap();
    assert!(!dir.path().join("00000002.history").exists());
}

#[tokio::test]
async fn any_flipped_byte_and_any_missing_entry_is_found() {
    let (_root, bucket, archive) = scratch().await;
    let mut writer = open(&archive, |_| fresh(0, 0)).await;
    write(&mut writer, 1, &[3000; 7], 1).await;
    writer.end().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let end = Lsn(21_000);
    for object in bucket.list("", None).await.unwrap() {
        let good = bucket.get(&object.key).await.unwrap();
        // Of the newest stretch's end only the header is ever read, of an older one's nothing: the next opening tells.
        let is_last = object.key.ends_with("0000000001/00000000000000000002");
        let is_end = object.key.ends_with("0000000000/00000000000000000005");
        for at in (0..good.len()).step_by(7) {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            bucket.put(&object.key, bad.into()).await.unwrap();
            let fetch = archive.fetch(1, Lsn(0), end, dir.path()).await;
            match fetch {
                Err(Error::Corrupt { what, .. }) if !is_end => {
                    assert!(what.contains(&object.key), "{what}: {}", object.key)
                }
                Ok(_) if is_end || is_last && at >= HEADER_BYTES => {}
                other => panic!("{}, byte {at}: {other:?}", object.key),
            }
        }
        bucket.put(&object.key, good.slice(..good.len() - 1)).await.unwrap();
        let is_whole = |found: Result<Fetched>| found.is_ok_and(|found| found.start == Lsn(0));
        assert_eq!(is_whole(archive.fetch(1, Lsn(0), end, dir.path()).await), is_end || is_last, "{}", object.key);
        bucket.delete(&object.key).await.unwrap();
        assert_eq!(is_whole(archive.fetch(1, Lsn(0), end, dir.path()).await), is_end || is_last, "{}", object.key);
        bucket.put(&object.key, good).await.unwrap();
        archive.fetch(1, Lsn(0), end, dir.path()).await.unwrap();
    }
    // An object under another's key, though it checks.
    let spans = archive.spans(0);
    let (one, other) = (spans.get(1).await.unwrap().unwrap(), spans.key(2));
    bucket.put(&other, one).await.unwrap();
    let error = archive.fetch(1, Lsn(0), end, dir.path()).await.unwrap_err();
    assert!(error.to_string().contains("it belongs under another key"), "{error}");
}

/// A writer on a bucket that fails, overtaken by the next one at some point. Answers what was acknowledged.
async fn write_on(archive: &Archive, stop_after: u64, at: i64) -> u64 {
    let retried = async {
        loop {
            match archive.claim(Owner::new(0)).await {
                Ok(claim) => return claim,
                Err(error) => assert_eq!(error.kind(), ebb_types::ErrorKind::Unavailable, "{error}"),
            }
        }
    };
    let claim = retried.await;
    let start = if claim.tail().is_some() { onward(&claim, at) } else { fresh(0, at) };
    let mut writer = claim.open(start).unwrap();
    let settle = async |writer: &mut Writer| {
        loop {
            match writer.settle().await {
                Ok(()) => return,
                Err(error) => assert_eq!(error.kind(), ebb_types::ErrorKind::Unavailable, "{error}"),
            }
        }
    };
    settle(&mut writer).await;
    for n in 0..stop_after {
        let start = writer.shipped().0;
        if writer.append(span(1, start, start + 10 + n, at + n as i64)).await.is_err() {
            settle(&mut writer).await;
        }
    }
    writer.shipped().0
}

async fn rounds_on_a_bucket_that_fails(seed: u64) {
    let (_root, bucket, below) = scratch().await;
    let faults = Faults {
        seed,
        latency: Duration::from_millis(1),
        refused: 0.1,
        answer_lost: 0.2,
        late: 0.2,
        torn: 0.1,
        behind: 0.3,
        repeated: 0.1,
        ..Faults::default()
    };
    let faulty = Arc::new(Faulty::new(bucket, faults));
    let archive = Archive { bucket: faulty.clone(), ..below.clone() };
    let mut end = 0;
    for round in 0..4 {
        end = write_on(&archive, 3 + 2 * round, 100 * round as i64).await;
    }
    let made = faulty.made();
    assert!(made["late"] > 0 && made["answer_lost"] > 0, "seed {seed}: {made:?}");
    faulty.settle().await.unwrap();
    let ranges = below.ranges().await.unwrap();
    assert_eq!(ranges.len(), 1, "seed {seed}: {ranges:?}");
    assert_eq!(ranges[0].end, Lsn(end), "seed {seed}");
    check_fetch(&below, 1, 0, end, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_on_a_bucket_that_fails() {
    for seed in 0..10 {
        rounds_on_a_bucket_that_fails(seed).await;
    }
}

#[tokio::test]
async fn the_first_version_s_bytes_are_still_read() {
    let archive = scratch().await.2;
    let check = |name: &str, bytes: &[u8], place: &Place, expect: Header, body: &[u8]| {
        let (header, found) = format::decode(name, place, bytes).unwrap();
        assert_eq!((header, found.as_slice()), (expect, body), "{name}");
        let again = format::encode(place, &expect, body);
        assert_eq!(format::decode(name, place, &again).unwrap(), (header, found), "{name}");
    };
    let header = Header {
        kind: Kind::Span,
        writer: [7; 16],
        pg_timeline: 3,
        start: Lsn(0x1_0000_1000),
        end: Lsn(0x1_0000_1000 + 5000),
        time: time(5),
    };
    let body = wal(1, 0x1_0000_1000, 0x1_0000_1000 + 5000);
    check("golden span", include_bytes!("golden/span-v1.bin"), &archive.place(4, 17), header, &body);
    let opening = Opening {
        epoch: 9,
        system_identifier: CLUSTER,
        wal_segment_bytes: SEGMENT,
        continues: true,
        previous: Some(Previous { entries: 17, end: header.start, time: time(4) }),
    };
    let header = Header { kind: Kind::Opening, end: header.start, ..header };
    let body = serde_json::to_vec(&opening).unwrap();
    check("golden opening", include_bytes!("golden/opening-v1.bin"), &archive.place(4, 0), header, &body);
}

proptest! {
    #[test]
    fn garbage_is_corrupt_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 0..400_usize) {
        let place = Place { branch: BranchId::for_test(1), line: 0, stretch: 0, number: 0 };
        prop_assert!(format::decode("x", &place, &bytes).is_err());
        let (lsn, time) = (Lsn(8), time(0));
        let header = Header { kind: Kind::Span, writer: [1; 16], pg_timeline: 1, start: lsn, end: Lsn(lsn.0 + 300), time };
        let mut entry = format::encode(&place, &header, &[5; 300]).to_vec();
        let at = cut % entry.len();
        prop_assert!(format::decode("x", &place, &entry[..at]).is_err());
        entry[at] = entry[at].wrapping_add(1);
        prop_assert!(format::decode("x", &place, &entry).is_err());
    }

    #[test]
    fn entries_round_trip(kind in 0..5_usize, numbers: [u64; 4], body in prop::collection::vec(any::<u8>(), 1..3000)) {
        let kind = [Kind::Opening, Kind::Span, Kind::History, Kind::End, Kind::Fence][kind];
        let [line, stretch, number, start] = numbers;
        let place = Place { branch: BranchId::for_test(start.into()), line, stretch, number };
        let start = Lsn(start >> 1);
        let end = if kind == Kind::Span { Lsn(start.0 + body.len() as u64) } else { start };
        let header = Header { kind, writer: [3; 16], pg_timeline: 7, start, end, time: time(9) };
        let bytes = format::encode(&place, &header, &body);
        prop_assert_eq!(format::decode_header("x", &place, &bytes).unwrap(), header);
        prop_assert_eq!(format::decode("x", &place, &bytes).unwrap(), (header, body));
    }
}
