//! The fenced log: an append-only sequence of objects `<prefix>/<seq, 20 digits>`.
//!
//! `append` is put-if-absent at the next number: of two racing writers exactly one wins, and the loser learns that it
//! was overtaken. There is no other coordination in Ebb.
//!
//! **Invariants**: the entries that exist are always 0..n without a gap; an entry never changes; an acknowledged
//! append is in the log exactly once.
//!
//! **Crash**: an append that was cut off is in the log whole, or not at all. Appending the same bytes at the same
//! number again settles which.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use crate::error::{Error, Result};
use crate::object_store::{Bucket, Put};

/// LIMIT: enough to hide a bucket's latency, few enough not to crowd out a waking compute's reads.
const PARALLEL_GETS: usize = 16;

/// An append-only sequence of entries in the bucket, numbered from 0.
///
/// Clones share what they know of the log's length.
#[derive(Debug, Clone)]
pub struct Log {
    bucket: Bucket,
    prefix: String,
    /// At least this many entries exist; never more than there are. Spares `append` a look at the entry before.
    known: Arc<AtomicU64>,
}

impl Log {
    /// Names a log; touches nothing.
    pub fn new(bucket: Bucket, prefix: impl Into<String>) -> Self {
        Self { bucket, prefix: prefix.into(), known: Arc::default() }
    }

    /// Appends at exactly `seq`, which must be the number after the last entry.
    ///
    /// An append whose answer was lost is recognised: if the entry at `seq` has these very bytes, it is this one. So
    /// entries of different writers must differ: each carries the id of its writer or of its act.
    ///
    /// # Errors
    /// [`Error::Overtaken`] when another writer has that number; `Invalid` when it would leave a gap. After any other
    /// error the entry may or may not be in the log: append the same bytes at the same number again to find out.
    pub async fn append(&self, seq: u64, entry: Bytes) -> Result<()> {
        self.check_no_gap(seq).await?;
        let key = self.key(seq);
        match self.bucket.put_if_absent(&key, entry.clone()).await? {
            Put::Created => {}
            Put::Exists if self.bucket.get(&key).await? == entry => {}
            Put::Exists => {
                self.known.fetch_max(seq + 1, Ordering::Relaxed);
                return Err(Error::Overtaken { log: self.prefix.clone(), seq });
            }
        }
        self.known.fetch_max(seq + 1, Ordering::Relaxed);
        Ok(())
    }

    /// All entries from `from` on, in order, checked to be without gaps. Costs one listing and the entries read.
    ///
    /// # Errors
    /// `Corrupt` when an entry is missing between others, or something else lies among them.
    pub async fn read(&self, from: u64) -> Result<Vec<(u64, Bytes)>> {
        let before = from.checked_sub(1).map(|seq| self.key(seq));
        let listed = self.bucket.list(&format!("{}/", self.prefix), before.as_deref()).await?;
        let Some(last) = listed.last() else { return Ok(Vec::new()) };
        for object in &listed {
            self.seq(&object.key)?;
        }
        // A listing made while others append may miss entries it should hold, so every number up to the last is got.
        let entries = stream::iter(from..=self.seq(&last.key)?)
            .map(|seq| async move { Ok::<_, Error>((seq, self.get_within(seq).await?)) })
            .buffered(PARALLEL_GETS)
            .try_collect::<Vec<_>>()
            .await?;
        self.known.fetch_max(from + entries.len() as u64, Ordering::Relaxed);
        Ok(entries)
    }

    /// The entry at `seq`, or `None` if the log is not that long. The cheapest way to look for what is new.
    pub async fn get(&self, seq: u64) -> Result<Option<Bytes>> {
        match self.bucket.get(&self.key(seq)).await {
            Ok(entry) => Ok(Some(entry)),
            Err(Error::NoSuchObject { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The numbers of the entries that exist: from the oldest that was not cut off to the one after the last. Costs a
    /// listing, and a look for entries that it lacks.
    ///
    /// # Errors
    /// `Corrupt` when something else lies among them.
    pub async fn extent(&self) -> Result<Range<u64>> {
        let listed = self.bucket.list(&format!("{}/", self.prefix), None).await?;
        let numbers = listed.iter().map(|object| self.seq(&object.key)).collect::<Result<Vec<_>>>()?;
        let mut end = numbers.last().map_or(0, |last| last + 1);
        while self.bucket.head(&self.key(end)).await?.is_some() {
            end += 1;
        }
        let first = numbers.first().copied().unwrap_or(0);
        self.known.fetch_max(end, Ordering::Relaxed);
        Ok(first..end)
    }

    /// The first bytes of the entry at `seq`, which must have as many.
    pub async fn get_start(&self, seq: u64, bytes: u64) -> Result<Bytes> {
        self.bucket.get_range(&self.key(seq), 0..bytes).await
    }

    /// The bucket would take any number; the log takes only the next.
    async fn check_no_gap(&self, seq: u64) -> Result<()> {
        if seq <= self.known.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.bucket.head(&self.key(seq - 1)).await? {
            Some(_) => Ok(()),
            None => Err(Error::Invalid(format!("log {:?} has no entry {} for {seq} to follow", self.prefix, seq - 1))),
        }
    }

    async fn get_within(&self, seq: u64) -> Result<Bytes> {
        let gap = || Error::Corrupt {
            what: format!("log {:?}", self.prefix),
            why: format!("entry {seq} is missing though later ones exist"),
        };
        self.get(seq).await?.ok_or_else(gap)
    }

    /// The key of the object that the entry at `seq` is, or would be.
    pub fn key(&self, seq: u64) -> String {
        format!("{}/{seq:020}", self.prefix)
    }

    fn seq(&self, key: &str) -> Result<u64> {
        let digits = key.get(self.prefix.len() + 1..).unwrap_or_default();
        let is_number = digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit());
        digits.parse().ok().filter(|&seq| is_number && seq < u64::MAX).ok_or_else(|| Error::Corrupt {
            what: format!("log {:?}", self.prefix),
            why: format!("{key:?} is not one of its entries"),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::object_store;
    use crate::object_store::faulty::{Faults, Faulty};

    async fn empty_log() -> (tempfile::TempDir, Bucket, Log) {
        let root = tempfile::tempdir().unwrap();
        let bucket = object_store::open(root.path().to_str().unwrap()).await.unwrap();
        let log = Log::new(bucket.clone(), "projects/shop/ledger");
        (root, bucket, log)
    }

    fn entries(texts: &[(u64, &'static str)]) -> Vec<(u64, Bytes)> {
        texts.iter().map(|&(seq, text)| (seq, Bytes::from_static(text.as_bytes()))).collect()
    }

    #[tokio::test]
    async fn entries_come_back_in_order_from_any_number_on() {
        let (_root, _, log) = empty_log().await;
        assert_eq!(log.read(0).await.unwrap(), []);
        for (seq, entry) in ["a", "b", "c"].into_iter().enumerate() {
            log.append(seq as u64, entry.into()).await.unwrap();
        }
        assert_eq!(log.read(0).await.unwrap(), entries(&[(0, "a"), (1, "b"), (2, "c")]));
        assert_eq!(log.read(2).await.unwrap(), entries(&[(2, "c")]));
        assert_eq!(log.read(3).await.unwrap(), []);
        assert_eq!(log.get(1).await.unwrap().unwrap(), "b");
        assert_eq!(log.get(3).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_repeated_append_is_recognised_and_another_writers_is_not() {
        let (_root, _, log) = empty_log().await;
        log.append(0, "mine".into()).await.unwrap();
        log.append(0, "mine".into()).await.unwrap();
        let error = log.append(0, "yours".into()).await.unwrap_err();
        assert!(matches!(error, Error::Overtaken { seq: 0, .. }), "{error}");
        assert_eq!(log.read(0).await.unwrap(), entries(&[(0, "mine")]));
    }

    #[tokio::test]
    async fn the_extent_is_found_whatever_a_listing_lacks_or_was_cut_off() {
        let (_root, bucket, below) = empty_log().await;
        let faulty = Arc::new(Faulty::new(bucket.clone(), Faults { seed: 3, behind: 1.0, ..Faults::default() }));
        let log = Log::new(faulty.clone(), "projects/shop/ledger");
        assert_eq!(log.extent().await.unwrap(), 0..0);
        for seq in 0..12 {
            log.append(seq, format!("entry {seq}").into()).await.unwrap();
            assert_eq!(log.extent().await.unwrap(), 0..seq + 1);
        }
        assert!(faulty.made()["behind"] > 0);
        bucket.delete(&below.key(0)).await.unwrap();
        bucket.delete(&below.key(1)).await.unwrap();
        assert_eq!(below.extent().await.unwrap(), 2..12);
        assert_eq!(below.get_start(7, 5).await.unwrap(), "entry");
    }

    #[tokio::test]
    async fn a_gap_is_never_made_and_always_found() {
        let (_root, bucket, log) = empty_log().await;
        assert!(matches!(log.append(1, "b".into()).await, Err(Error::Invalid(_))));
        for seq in 0..3 {
            log.append(seq, format!("entry {seq}").into()).await.unwrap();
        }
        assert!(matches!(log.append(4, "e".into()).await, Err(Error::Invalid(_))));
        bucket.delete(&log.key(1)).await.unwrap();
        assert!(matches!(log.read(0).await, Err(Error::Corrupt { .. })));
        assert!(matches!(log.read(1).await, Err(Error::Corrupt { .. })));
        assert_eq!(log.read(2).await.unwrap().len(), 1);
        bucket.put(&log.key(1), "entry 1".into()).await.unwrap();
        bucket.put("projects/shop/ledger/notes.txt", Bytes::new()).await.unwrap();
        assert!(matches!(log.read(0).await, Err(Error::Corrupt { .. })));
        assert!(matches!(log.extent().await, Err(Error::Corrupt { .. })));
    }

    /// One writer of the race: appends its entries as others overtake it, some twice as after a lost answer, and
    /// looks at the whole log in between.
    async fn write(log: Log, writer: usize, count: usize, repeat: bool) -> Vec<(u64, Bytes)> {
        let mut acknowledged = Vec::new();
        let mut seq = 0;
        for n in 0..count {
            let entry = Bytes::from(format!("writer {writer} entry {n}"));
            loop {
                match log.append(seq, entry.clone()).await {
                    Ok(()) => break,
                    Err(Error::Overtaken { .. }) => seq += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            if repeat {
                log.append(seq, entry.clone()).await.unwrap();
            }
            acknowledged.push((seq, entry));
            let seen = log.read(0).await.unwrap();
            assert!(acknowledged.iter().all(|mine| seen.contains(mine)), "an acknowledged entry is not seen");
            seq += 1;
        }
        acknowledged
    }

    /// As [`write`], on a bucket that fails: what has no answer is appended again, the same bytes at the same number.
    async fn write_on(log: Log, writer: usize, count: usize) -> Vec<(u64, Bytes)> {
        let mut acknowledged = Vec::new();
        let mut seq = 0;
        for n in 0..count {
            let entry = Bytes::from(format!("writer {writer} entry {n}"));
            loop {
                match log.append(seq, entry.clone()).await {
                    Ok(()) => break,
                    Err(Error::Overtaken { .. }) => seq += 1,
                    Err(error) => assert_eq!(error.kind(), ebb_types::ErrorKind::Unavailable, "{error}"),
                }
            }
            acknowledged.push((seq, entry));
            seq += 1;
        }
        acknowledged
    }

    async fn appends_on_a_bucket_that_fails(seed: u64) {
        let (_root, bucket, below) = empty_log().await;
        let faults = Faults {
            seed,
            latency: std::time::Duration::from_millis(1),
            refused: 0.1,
            answer_lost: 0.3,
            late: 0.3,
            torn: 0.2,
            behind: 0.5,
            repeated: 0.1,
            ..Faults::default()
        };
        let faulty = Arc::new(Faulty::new(bucket, faults));
        let log = || Log::new(faulty.clone(), "projects/shop/ledger");
        let writers: Vec<_> = (0..3).map(|writer| tokio::spawn(write_on(log(), writer, 8))).collect();
        let mut acknowledged = Vec::new();
        for writer in writers {
            acknowledged.extend(writer.await.unwrap());
        }
        acknowledged.sort();
        // A reader meanwhile may know less, never something else.
        for _ in 0..20 {
            if let Ok(seen) = log().read(0).await {
                assert_eq!(seen, acknowledged[..seen.len()], "seed {seed}");
            }
        }
        faulty.settle().await.unwrap();
        assert_eq!(below.read(0).await.unwrap(), acknowledged, "each once, in order, and nothing else; seed {seed}");
        let made = faulty.made();
        assert!(made["late"] > 0 && made["answer_lost"] > 0, "seed {seed}: {made:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_append_is_in_the_log_once_whatever_the_bucket_answers() {
        for seed in 0..10 {
            appends_on_a_bucket_that_fails(seed).await;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn racing_writers_leave_no_gap_and_lose_nothing(
            writers in prop::collection::vec((1..6_usize, any::<bool>()), 1..6),
        ) {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
            runtime.block_on(async {
                let (_root, bucket, log) = empty_log().await;
                let race = writers.iter().enumerate().map(|(writer, &(count, repeat))| {
                    let log = Log::new(bucket.clone(), "projects/shop/ledger");
                    tokio::spawn(write(log, writer, count, repeat))
                });
                let mut acknowledged = Vec::new();
                for task in race.collect::<Vec<_>>() {
                    acknowledged.extend(task.await.unwrap());
                }
                acknowledged.sort();
                assert_eq!(log.read(0).await.unwrap(), acknowledged, "each once, in order, and nothing else");
            });
        }
    }
}
