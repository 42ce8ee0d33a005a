//! The ledger: a hash-chained, append-only sequence of receipts in the bucket, and the state that is its fold.
//!
//! One [`Ledger`] is one [`Log`] whose entries are JSON objects. Each entry names the hash of the one before it and
//! carries its own, so that an altered, removed or reordered entry is found by reading alone ([`read_chain`]).
//!
//! ```text
//! {"seq":7,"time":"…","actor":"…","writer":"…","op":"op_…","events":[…],"prev":"<64 hex>","hash":"<64 hex>"}
//! └────────────────────── hashed: every byte before the last 75 ──────────────────────┘└───── 75 bytes ─────┘
//! ```
//!
//! The hash covers stored bytes, not a re-encoding of them: nothing in an entry escapes it, and a reader that knows
//! fewer fields checks the same chain. `prev` of entry 0 is the hash of the ledger's own name, so that one project's
//! entries are not taken for another's.
//!
//! **Invariants.** What is in memory is the fold of entries `0..next`, never more. Events are decided against that
//! state and appended at exactly `next`; if somebody else was first, their entries are read and the decision is made
//! anew.
//!
//! **Crash.** An append is one put-if-absent: the entry is there or not. An append whose outcome is not known (the
//! bucket did not answer) makes the next one read the tail first.
//!
//! **Absent on purpose.** Cutting off the newest entries leaves a shorter, consistent chain: only a hash noted
//! elsewhere can show that. A running service notices, because it remembers the hash it wrote last.

use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;
use ebb_storage::log::Log;
use ebb_storage::object_store::Bucket;
use ebb_types::{Clock, OperationId, Timestamp};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// `,"hash":"` + 64 hex digits + `"}`.
const TAIL_BYTES: usize = 9 + 64 + 2;

/// LIMIT: so often a decision is made anew because others appended first; that many in a row is a livelock to report.
const OVERTAKEN_MAX: usize = 32;

/// A state that is the fold of a ledger's entries.
pub trait Fold: Default + Clone + Debug + Send + Sync + 'static {
    /// What entries of this ledger hold.
    type Event: Serialize + DeserializeOwned + Clone + Debug + Send + Sync + 'static;

    /// Takes one entry in. Pure: the same entries give the same state.
    ///
    /// # Errors
    /// What does not fit, if the entry cannot follow this state; the state is then not to be used.
    fn apply(&mut self, entry: &Entry<Self::Event>) -> Result<(), String>;
}

/// One entry, without its place in the chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry<E> {
    /// Its number, from 0.
    pub seq: u64,
    /// When it was written, by the writer's clock.
    pub time: Timestamp,
    /// Who asked for it.
    pub actor: String,
    /// The process that wrote it, by a random number: two writers never write the same bytes, so that an append can
    /// tell its own entry from another's like it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub writer: String,
    /// The operation it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<OperationId>,
    /// What happened; all of it or nothing.
    pub events: Vec<E>,
}

/// An entry and its place in the chain.
#[derive(Debug, Clone, PartialEq)]
pub struct Chained<E> {
    /// The entry.
    pub entry: Entry<E>,
    /// Hash of the entry before.
    pub prev: blake3::Hash,
    /// Hash of this entry.
    pub hash: blake3::Hash,
}

/// The part of an entry that is hashed, with `prev` as its last member.
#[derive(Serialize, Deserialize)]
struct Hashed<E> {
    #[serde(flatten)]
    entry: Entry<E>,
    prev: String,
}

/// The hash entry 0 names as `prev`.
pub fn genesis(ledger: &str) -> blake3::Hash {
    blake3::hash(format!("ebb ledger {ledger}").as_bytes())
}

/// The stored bytes of an entry, and its hash.
fn encode<E: Serialize + Clone>(entry: &Entry<E>, prev: blake3::Hash) -> (Bytes, blake3::Hash) {
    let hashed = Hashed { entry: entry.clone(), prev: prev.to_hex().to_string() };
    let mut bytes = serde_json::to_vec(&hashed).expect("events are plain data with string keys");
    bytes.pop(); // the closing brace; `hash` comes before it
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(tail(hash).as_bytes());
    (bytes.into(), hash)
}

fn tail(hash: blake3::Hash) -> String {
    format!(",\"hash\":\"{}\"}}", hash.to_hex())
}

/// Reads one stored entry, checking that it is entry `seq` and follows `prev`.
fn decode<E: DeserializeOwned>(bytes: &[u8], seq: u64, prev: blake3::Hash) -> Result<Chained<E>, String> {
    let split = bytes.len().checked_sub(TAIL_BYTES).ok_or("the entry is too short")?;
    let (body, stored_tail) = bytes.split_at(split);
    let hash = blake3::hash(body);
    if stored_tail != tail(hash).as_bytes() {
        return Err("the entry's bytes do not match its hash".to_owned());
    }
    let mut json = body.to_vec();
    json.push(b'}');
    let hashed: Hashed<E> =
        serde_json::from_slice(&json).map_err(|error| format!("the entry cannot be read: {error}"))?;
    if hashed.prev != prev.to_hex().as_str() {
        return Err("the entry does not follow the one before it".to_owned());
    }
    if hashed.entry.seq != seq {
        return Err(format!("the entry says it is number {}", hashed.entry.seq));
    }
    Ok(Chained { entry: hashed.entry, prev, hash })
}

/// What reading a whole chain found.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict<E> {
    /// The good entries, up to the first fault.
    pub entries: Vec<Chained<E>>,
    /// Hash of the last good entry.
    pub head: blake3::Hash,
    /// Number of the first entry that does not fit, and why.
    pub fault: Option<(u64, String)>,
}

/// Reads a ledger from the bucket and checks every entry; needs no running service and no key.
///
/// # Errors
/// Only if the bucket cannot be read; a fault of the chain is part of the verdict.
pub async fn read_chain<E: DeserializeOwned>(bucket: &Bucket, name: &str) -> Result<Verdict<E>> {
    let mut verdict = Verdict { entries: Vec::new(), head: genesis(name), fault: None };
    let stored = match Log::new(bucket.clone(), name).read(0).await {
        Ok(stored) => stored,
        Err(ebb_storage::Error::Corrupt { why, .. }) => {
            verdict.fault = Some((0, why));
            return Ok(verdict);
        }
        Err(error) => return Err(error.into()),
    };
    for (expected, (seq, bytes)) in (0..).zip(stored) {
        let chained = if seq == expected {
            decode(&bytes, seq, verdict.head)
        } else {
            Err(format!("entry {expected} is missing"))
        };
        match chained {
            Ok(chained) => {
                verdict.head = chained.hash;
                verdict.entries.push(chained);
            }
            Err(why) => {
                verdict.fault = Some((expected, why));
                break;
            }
        }
    }
    Ok(verdict)
}

/// The writable end of a chain.
#[derive(Debug)]
struct Tail {
    next: u64,
    head: blake3::Hash,
    /// The last append may or may not have been written.
    unsure: bool,
}

/// One ledger, open: the fold of its entries, and the way to append more.
#[derive(Debug)]
pub struct Ledger<F: Fold> {
    log: Log,
    bucket: Bucket,
    name: String,
    writer: String,
    clock: Arc<dyn Clock>,
    tail: tokio::sync::Mutex<Tail>,
    state: RwLock<Arc<F>>,
}

impl<F: Fold> Ledger<F> {
    /// Reads all entries and folds them.
    ///
    /// # Errors
    /// [`Error::Ledger`] if an entry does not follow the one before it.
    pub async fn open(bucket: Bucket, name: impl Into<String>, clock: Arc<dyn Clock>) -> Result<Self> {
        let name = name.into();
        let ledger = Self {
            log: Log::new(bucket.clone(), name.clone()),
            bucket,
            tail: tokio::sync::Mutex::new(Tail { next: 0, head: genesis(&name), unsure: false }),
            name,
            writer: format!("{:016x}", rand::random::<u64>()),
            clock,
            state: RwLock::default(),
        };
        ledger.catch_up(&mut *ledger.tail.lock().await).await?;
        Ok(ledger)
    }

    /// The fold as of now; cheap.
    pub fn state(&self) -> Arc<F> {
        self.state.read().clone()
    }

    /// How many entries are known.
    pub async fn entries(&self) -> u64 {
        self.tail.lock().await.next
    }

    /// Decides on the present state and appends what was decided as one entry; again from the start whenever another
    /// writer was first. No events: nothing is appended.
    ///
    /// # Errors
    /// What `decide` answers; otherwise the entry may or may not have been written, which the next append finds out.
    ///
    /// # Cancel safety
    /// Safe: a cancelled append counts as one of unknown outcome.
    pub async fn append<R>(
        &self,
        actor: &str,
        op: Option<OperationId>,
        decide: impl Fn(&F) -> Result<(Vec<F::Event>, R)>,
    ) -> Result<R> {
        let mut tail = self.tail.lock().await;
        for _ in 0..OVERTAKEN_MAX {
            if tail.unsure {
                self.catch_up(&mut tail).await?;
            }
            let (events, answer) = decide(&self.state())?;
            if events.is_empty() {
                return Ok(answer);
            }
            let (time, actor, writer) = (self.clock.now(), actor.to_owned(), self.writer.clone());
            let entry = Entry { seq: tail.next, time, actor, writer, op, events };
            // Fold first: an event that cannot follow must never reach the bucket.
            let mut state = F::clone(&self.state());
            state.apply(&entry).map_err(|why| self.broken(entry.seq, why))?;
            let (bytes, hash) = encode(&entry, tail.head);
            tail.unsure = true;
            match self.log.append(entry.seq, bytes).await {
                Ok(()) => {
                    *tail = Tail { next: entry.seq + 1, head: hash, unsure: false };
                    *self.state.write() = Arc::new(state);
                    metrics::counter!("ebb_timeline_ledger_appends_total").increment(1);
                    return Ok(answer);
                }
                Err(ebb_storage::Error::Overtaken { .. }) => {
                    metrics::counter!("ebb_timeline_ledger_overtaken_total").increment(1);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Deadline("appending to the ledger"))
    }

    /// Finds out what became of an append whose outcome was not known.
    ///
    /// # Errors
    /// If the bucket still cannot be read.
    pub async fn settle(&self) -> Result<()> {
        let mut tail = self.tail.lock().await;
        if tail.unsure { self.catch_up(&mut tail).await } else { Ok(()) }
    }

    /// Waits for an append under way, then takes in whatever others have appended. The state is then at least as new as
    /// the bucket was when this was called.
    ///
    /// # Errors
    /// If the bucket cannot be read, or an entry does not follow.
    pub async fn refresh(&self) -> Result<Arc<F>> {
        let mut tail = self.tail.lock().await;
        if tail.unsure || self.log.get(tail.next).await?.is_some() {
            self.catch_up(&mut tail).await?;
        }
        Ok(self.state())
    }

    /// Reads the whole chain again from the bucket and checks it, also against what this process wrote last.
    ///
    /// # Errors
    /// Only if the bucket cannot be read.
    pub async fn verify(&self) -> Result<Verdict<F::Event>> {
        let (next, head) = {
            let tail = self.tail.lock().await;
            (tail.next, tail.head)
        };
        let mut verdict = read_chain::<F::Event>(&self.bucket, &self.name).await?;
        if verdict.fault.is_none() && next > 0 {
            let last = usize::try_from(next - 1).ok().and_then(|index| verdict.entries.get(index));
            if last.map(|entry| entry.hash) != Some(head) {
                let why = format!("entry {} is not the one this service wrote or read last", next - 1);
                verdict.fault = Some((next - 1, why));
            }
        }
        Ok(verdict)
    }

    /// Folds entries that others have appended.
    async fn catch_up(&self, tail: &mut Tail) -> Result<()> {
        let stored = self.log.read(tail.next).await?;
        let mut state = F::clone(&self.state());
        let (mut next, mut head) = (tail.next, tail.head);
        for (seq, bytes) in stored {
            if seq != next {
                return Err(self.broken(next, "the entry is missing".to_owned()));
            }
            let chained = decode(&bytes, seq, head).map_err(|why| self.broken(seq, why))?;
            state.apply(&chained.entry).map_err(|why| self.broken(seq, why))?;
            next = seq + 1;
            head = chained.hash;
        }
        *self.state.write() = Arc::new(state);
        *tail = Tail { next, head, unsure: false };
        Ok(())
    }

    fn broken(&self, seq: u64, why: String) -> Error {
        Error::Ledger { ledger: self.name.clone(), seq, why }
    }
}

#[cfg(test)]
mod tests;
