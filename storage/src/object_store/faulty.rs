//! A bucket that fails, for tests of everything above it.
//!
//! [`Faulty`] wraps another bucket and does to its callers what a network and a store under load do: calls that are slow,
//! that fail before they did anything, that fail though they worked, or that fail now and work later; reads that
//! break off, and ranges with wrong bytes; listings that are behind; writes that arrive twice.
//!
//! What happens to a call follows from the seed, the call's name and key, and how often that pair was called before. So
//! a run is repeated by its seed, also where calls on different keys race.
//!
//! Two faults break what [`ObjectStore`] promises, for callers that mean to survive them: wrong bytes (what is stored
//! carries checksums) and listings that are behind (a log gets its entries by number).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::{Bucket, ObjectMeta, ObjectStore, Put, failed};
use crate::error::Result;

/// How many of the latest writes a listing may not show yet.
const BEHIND_MAX: usize = 8;

/// What goes wrong, and how often: probabilities from 0 (never, the default) to 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// What everything is drawn from.
    pub seed: u64,
    /// The longest a call is held up.
    pub latency: Duration,
    /// A call fails without having done anything: 500, 503 slow down, a timeout, no connection.
    pub refused: f64,
    /// A write takes effect and fails.
    pub answer_lost: f64,
    /// A `put_if_absent` fails, and is carried out during a later call of anybody's, or at [`Faulty::settle`].
    pub late: f64,
    /// A read breaks off.
    pub torn: f64,
    /// A `get_range` answers as if all was well, with a bit flipped or with too few bytes.
    pub corrupt: f64,
    /// A listing lacks some of the latest writes.
    pub behind: f64,
    /// A write is carried out twice.
    pub repeated: f64,
}

/// A bucket that fails by plan.
#[derive(Debug)]
pub struct Faulty {
    store: Bucket,
    faults: Faults,
    cut_off: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How often each call was made on each key.
    calls: HashMap<(&'static str, String), u64>,
    /// Keys written last, oldest first.
    latest: VecDeque<String>,
    /// Writes whose callers were told that they failed.
    late: VecDeque<(String, Bytes)>,
    made: BTreeMap<&'static str, u64>,
}

impl Faulty {
    /// Lets a bucket fail.
    pub fn new(store: Bucket, faults: Faults) -> Self {
        Self { store, faults, cut_off: AtomicBool::new(false), state: Mutex::default() }
    }

    /// Cuts the bucket off: every call fails without having done anything, until it is let in again.
    pub fn cut_off(&self, cut_off: bool) {
        self.cut_off.store(cut_off, Ordering::SeqCst);
    }

    /// How often each fault was made so far. A test that saw none shows nothing.
    pub fn made(&self) -> BTreeMap<&'static str, u64> {
        self.state.lock().made.clone()
    }

    /// Carries out what is late. From then on the bucket below is what it will be.
    ///
    /// # Errors
    /// If the bucket below fails.
    pub async fn settle(&self) -> Result<()> {
        while let Some((key, bytes)) = self.take_late() {
            self.store.put_if_absent(&key, bytes).await.map(drop)?;
        }
        Ok(())
    }

    fn take_late(&self) -> Option<(String, Bytes)> {
        self.state.lock().late.pop_front()
    }

    /// What every call begins with: it is held up, something late may arrive, and it may be refused.
    async fn begin(&self, op: &'static str, key: &str) -> Result<Dice> {
        let mut dice = self.dice(op, key);
        tokio::time::sleep(self.faults.latency.mul_f64(dice.fraction())).await;
        if dice.fraction() < 0.5 {
            let arrived = self.take_late();
            if let Some((key, bytes)) = arrived {
                self.store.put_if_absent(&key, bytes).await.map(drop)?;
            }
        }
        match self.cut_off.load(Ordering::SeqCst) || self.hits(&mut dice, "refused", self.faults.refused) {
            true => Err(dice.fault(op, key)),
            false => Ok(dice),
        }
    }

    fn dice(&self, op: &'static str, key: &str) -> Dice {
        let mut state = self.state.lock();
        let calls = state.calls.entry((op, key.to_owned())).or_default();
        *calls += 1;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.faults.seed.to_le_bytes()).update(&calls.to_le_bytes());
        hasher.update(op.as_bytes()).update(b" ").update(key.as_bytes());
        Dice(hasher.finalize_xof())
    }

    fn hits(&self, dice: &mut Dice, fault: &'static str, probability: f64) -> bool {
        let hit = dice.fraction() < probability;
        if hit {
            *self.state.lock().made.entry(fault).or_default() += 1;
        }
        hit
    }

    /// Carries out a write, once or twice, and lets its answer be lost. The first answer is the true one.
    async fn write<T, F>(&self, op: &'static str, key: &str, mut dice: Dice, write: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let answer = write().await?;
        if self.hits(&mut dice, "repeated", self.faults.repeated) {
            write().await?;
        }
        self.wrote(key);
        match self.hits(&mut dice, "answer_lost", self.faults.answer_lost) {
            true => Err(dice.fault(op, key)),
            false => Ok(answer),
        }
    }

    fn wrote(&self, key: &str) {
        let mut state = self.state.lock();
        state.latest.push_back(key.to_owned());
        if state.latest.len() > BEHIND_MAX {
            state.latest.pop_front();
        }
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn get(&self, key: &str) -> Result<Bytes> {
        let mut dice = self.begin("get", key).await?;
        let bytes = self.store.get(key).await?;
        match self.hits(&mut dice, "torn", self.faults.torn) {
            true => Err(torn("get", key, bytes.len())),
            false => Ok(bytes),
        }
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let mut dice = self.begin("get_range", key).await?;
        let bytes = self.store.get_range(key, range).await?;
        if self.hits(&mut dice, "torn", self.faults.torn) {
            return Err(torn("get_range", key, bytes.len()));
        }
        if !bytes.is_empty() && self.hits(&mut dice, "corrupt", self.faults.corrupt) {
            return Ok(dice.corrupt(bytes));
        }
        Ok(bytes)
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        let dice = self.begin("put", key).await?;
        self.write("put", key, dice, || self.store.put(key, bytes.clone())).await
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put> {
        let mut dice = self.begin("put_if_absent", key).await?;
        if self.hits(&mut dice, "late", self.faults.late) {
            self.state.lock().late.push_back((key.to_owned(), bytes));
            return Err(dice.fault("put_if_absent", key));
        }
        self.write("put_if_absent", key, dice, || self.store.put_if_absent(key, bytes.clone())).await
    }

    async fn put_file(&self, key: &str, file: &Path) -> Result<()> {
        let dice = self.begin("put_file", key).await?;
        self.write("put_file", key, dice, || self.store.put_file(key, file)).await
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.begin("head", key).await?;
        self.store.head(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        let mut dice = self.begin("list", prefix).await?;
        let mut listed = self.store.list(prefix, start_after).await?;
        if self.hits(&mut dice, "behind", self.faults.behind) {
            let state = self.state.lock();
            let known = (state.latest.len() as f64 * dice.fraction()) as usize;
            let unknown: Vec<_> = state.latest.iter().skip(known).collect();
            listed.retain(|object| !unknown.contains(&&object.key));
        }
        Ok(listed)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let dice = self.begin("delete", key).await?;
        self.write("delete", key, dice, || self.store.delete(key)).await
    }
}

fn torn(op: &'static str, key: &str, bytes: usize) -> crate::Error {
    failed(op, key, io::Error::new(io::ErrorKind::UnexpectedEof, format!("the answer broke off within {bytes} bytes")))
}

/// What is drawn for one call.
struct Dice(blake3::OutputReader);

impl Dice {
    fn draw(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// From 0 up to, but not including, 1.
    fn fraction(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn fault(&mut self, op: &'static str, key: &str) -> crate::Error {
        let (kind, why) = match self.draw() % 4 {
            0 => (io::ErrorKind::Other, "S3 answered 500 InternalError"),
            1 => (io::ErrorKind::Other, "S3 answered 503 SlowDown"),
            2 => (io::ErrorKind::TimedOut, "no answer"),
            _ => (io::ErrorKind::ConnectionReset, "the connection was reset"),
        };
        failed(op, key, io::Error::new(kind, why))
    }

    fn corrupt(&mut self, bytes: Bytes) -> Bytes {
        let at = (self.draw() % bytes.len() as u64) as usize;
        if self.draw().is_multiple_of(2) {
            return bytes.slice(..at);
        }
        let mut altered = bytes.to_vec();
        altered[at] ^= 1 << (self.draw() % 8);
        altered.into()
    }
}

#[cfg(test)]
mod tests;
