use std::sync::Arc;

use ebb_types::ErrorKind;

use super::*;
use crate::object_store::{Dir, conformance};

async fn dir() -> (tempfile::TempDir, Bucket) {
    let root = tempfile::tempdir().unwrap();
    let dir = Dir::open(root.path()).await.unwrap();
    (root, Arc::new(dir))
}

/// A bucket that calls again until it is answered, and tells whose an object is by its bytes.
#[derive(Debug)]
struct Patient(Bucket);

macro_rules! again {
    ($call:expr) => {
        loop {
            match $call.await {
                Err(error) if error.kind() == ErrorKind::Unavailable => {}
                answer => break answer,
            }
        }
    };
}

#[async_trait]
impl ObjectStore for Patient {
    async fn get(&self, key: &str) -> Result<Bytes> {
        again!(self.0.get(key))
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        again!(self.0.get_range(key, range.clone()))
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        again!(self.0.put(key, bytes.clone()))
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put> {
        let mut unsure = false;
        loop {
            match self.0.put_if_absent(key, bytes.clone()).await {
                Err(error) if error.kind() == ErrorKind::Unavailable => unsure = true,
                Ok(Put::Exists) if unsure && self.get(key).await? == bytes => return Ok(Put::Created),
                answer => return answer,
            }
        }
    }
    async fn put_file(&self, key: &str, file: &Path) -> Result<()> {
        again!(self.0.put_file(key, file))
    }
    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        again!(self.0.head(key))
    }
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        again!(self.0.list(prefix, start_after))
    }
    async fn delete(&self, key: &str) -> Result<()> {
        again!(self.0.delete(key))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_for_whoever_calls_again() {
    let (_root, dir) = dir().await;
    let often = 0.2;
    // Not `late`, `behind` and `corrupt`: who calls again is told nothing of these.
    let faults = Faults {
        seed: 3,
        latency: Duration::from_millis(1),
        refused: often,
        answer_lost: often,
        torn: often,
        repeated: often,
        ..Faults::default()
    };
    let faulty = Arc::new(Faulty::new(dir, faults));
    conformance::check(Arc::new(Patient(faulty.clone())), 32).await;
    let made = faulty.made();
    assert_eq!(made.keys().copied().collect::<Vec<_>>(), ["answer_lost", "refused", "repeated", "torn"]);
    assert!(made.values().all(|&times| times > 10), "{made:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_faults_it_is_the_bucket_below() {
    let (_root, dir) = dir().await;
    let faulty = Arc::new(Faulty::new(dir, Faults::default()));
    conformance::check(faulty.clone(), 32).await;
    assert!(faulty.made().is_empty());
}

/// What became of some calls, as text.
async fn run(seed: u64) -> String {
    let (_root, dir) = dir().await;
    let half = 0.5;
    let faults = Faults {
        seed,
        latency: Duration::ZERO,
        refused: 0.2,
        answer_lost: half,
        late: half,
        torn: half,
        corrupt: half,
        behind: half,
        repeated: half,
    };
    let faulty = Faulty::new(dir.clone(), faults);
    let mut trace = String::new();
    for n in 0..40 {
        let key = format!("k/{}", n % 20);
        trace.push_str(&format!("{:?}\n", faulty.put_if_absent(&key, vec![7; 100].into()).await));
        trace.push_str(&format!("{:?}\n", faulty.get_range(&key, 10..60).await));
        trace.push_str(&format!("{:?}\n", faulty.list("k/", None).await));
    }
    faulty.settle().await.unwrap();
    trace.push_str(&format!("{:?} {:?}", faulty.made(), dir.list("", None).await.unwrap()));
    trace
}

#[tokio::test]
async fn a_seed_repeats_a_run() {
    assert_eq!(run(1).await, run(1).await);
    assert_ne!(run(1).await, run(2).await);
}

fn always(fault: impl FnOnce(&mut Faults)) -> Faults {
    let mut faults = Faults::default();
    fault(&mut faults);
    faults
}

#[tokio::test]
async fn a_lost_answer_is_of_a_write_that_took_effect_and_a_refusal_of_none() {
    let (_root, dir) = dir().await;
    let faulty = Faulty::new(dir.clone(), always(|faults| faults.answer_lost = 1.0));
    faulty.put_if_absent("a", "1".into()).await.unwrap_err();
    assert_eq!(dir.get("a").await.unwrap(), "1");
    let faulty = Faulty::new(dir.clone(), always(|faults| faults.refused = 1.0));
    let error = faulty.put_if_absent("b", "1".into()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(dir.head("b").await.unwrap(), None);
}

#[tokio::test]
async fn what_is_late_arrives_after_its_failure() {
    let (_root, dir) = dir().await;
    let faulty = Faulty::new(dir.clone(), always(|faults| faults.late = 1.0));
    faulty.put_if_absent("a", "1".into()).await.unwrap_err();
    assert_eq!(dir.head("a").await.unwrap(), None);
    for n in 0.. {
        assert!(n < 100, "it never arrives");
        if faulty.head("a").await.unwrap().is_some() {
            break;
        }
    }
    faulty.put_if_absent("b", "1".into()).await.unwrap_err();
    faulty.settle().await.unwrap();
    assert_eq!(dir.get("b").await.unwrap(), "1");
}

#[tokio::test]
async fn wrong_bytes_differ_and_late_listings_lack_the_latest_only() {
    let (_root, dir) = dir().await;
    let right = Bytes::from_static(b"0123456789");
    let faulty = Faulty::new(dir.clone(), always(|faults| faults.corrupt = 1.0));
    faulty.put("a", right.clone()).await.unwrap();
    let mut lengths = std::collections::BTreeSet::new();
    for _ in 0..50 {
        let wrong = faulty.get_range("a", 0..10).await.unwrap();
        assert_ne!(wrong, right);
        lengths.insert(wrong.len());
    }
    assert!(lengths.contains(&10) && lengths.len() > 3, "{lengths:?}");
    assert_eq!(faulty.get("a").await.unwrap(), right, "a whole object is never wrong");

    let faulty = Faulty::new(dir.clone(), always(|faults| faults.behind = 1.0));
    let keys: Vec<_> = (0..20).map(|n| format!("list/{n:02}")).collect();
    for key in &keys {
        faulty.put(key, right.clone()).await.unwrap();
    }
    let listed: Vec<_> = faulty.list("list/", None).await.unwrap().into_iter().map(|object| object.key).collect();
    assert!((20 - BEHIND_MAX..20).contains(&listed.len()), "{listed:?}");
    assert_eq!(listed, keys[..listed.len()]);
}
