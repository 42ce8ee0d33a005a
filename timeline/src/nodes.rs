//! The nodes on one bucket: each announces itself with a record that it renews; one that is not renewed has expired.
//!
//! ```text
//! nodes/<node id>     {"node":"nd_…","name":"…","run":…,"beat":…,"ttl_ms":…,"stopped":false,"api":…,"peer":…} <blake3>
//! ```
//!
//! **No clocks are compared.** A record has a counter, and whoever looks remembers when it last saw that change, by a
//! clock of its own that never jumps. A node that cannot renew its own record knows, by the same kind of clock, when
//! others may take it for dead: it began the last renewal that worked before any of them can have seen it.
//!
//! Who could not look for a while has seen nobody die: after that everybody has the whole time again. And who cannot renew
//! asks the others whether they can ([`Others`]): a bucket that is away for all lets nobody take over.
//!
//! A record only tells whom to ask, and whom one may take over from. What makes a takeover safe is in the logs: an entry
//! in the project's ledger that only one node can write, and a fence in every WAL archive (I9).
//!
//! **Crash.** A node that dies leaves its record, which expires; one that was stopped in order has said so.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ebb_storage::object_store::Bucket;
use ebb_types::NodeId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::error::LocalContext as _;
use crate::{Error, Result, files};

/// What the keys of all records begin with.
const PREFIX: &str = "nodes/";

/// In hex.
const HASH_BYTES: usize = 64;

/// So often a record is renewed before it expires.
const RENEWALS: u32 = 3;

/// LIMIT: a record that nobody renews tells nothing that its absence does not; a node that comes back writes it again.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// A node's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which node.
    pub node: NodeId,
    /// What people call it.
    pub name: String,
    /// Which run of it, by a random number.
    run: u64,
    /// Counts renewals.
    beat: u64,
    /// How long the record is good for, in milliseconds.
    ttl_ms: u64,
    /// Whether it was stopped in order: it has no computes, and nothing that the bucket lacks.
    stopped: bool,
    /// Where its API is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
    /// Where other nodes reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

/// Where a node is to be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Its API.
    pub api: Option<String>,
    /// Its port for other nodes.
    pub peer: Option<String>,
}

/// What is known of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It renews its record, or has not failed to for long enough.
    Alive(Record),
    /// It was stopped, or has not renewed its record in time: what it owned may be taken over.
    Gone,
}

/// A record as it was last seen to change.
#[derive(Debug, Clone)]
struct Seen {
    record: Record,
    changed: Moment,
}

/// The way to other nodes that does not lead through the bucket.
#[async_trait]
pub trait Others: Debug + Send + Sync + 'static {
    /// Whether every one of these nodes answers, and says that it cannot renew its record either.
    async fn are_cut_off(&self, nodes: &[Record]) -> bool;
}

/// This node among the others.
#[derive(Debug)]
pub struct Nodes {
    bucket: Bucket,
    me: NodeId,
    name: String,
    run: u64,
    ttl: Duration,
    beat: AtomicU64,
    inner: Mutex<Inner>,
    /// Until when, by [`Moment`]'s clock in nanoseconds, no other node can have taken over; [`ALONE`] while there is none.
    unchallenged_until: AtomicU64,
}

/// A moment that never comes.
const ALONE: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Inner {
    addresses: Addresses,
    seen: BTreeMap<NodeId, Seen>,
    /// When the last renewal that worked was begun.
    renewed: Option<Moment>,
    /// Counts the times that the record may have expired without this node's doing.
    term: u64,
    /// The other nodes that were alive when the records were last looked at, and when that was.
    peers: Vec<Record>,
    looked: Option<Moment>,
    /// When all of them last said that they cannot reach the bucket either.
    excused: Option<Moment>,
    stopped: bool,
}

impl Nodes {
    /// Reads the node's identifier from its data directory, giving it one the first time.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub fn open(data_dir: &Path, name: String, bucket: Bucket, ttl: Duration) -> Result<Self> {
        let me = read_or_make_id(&data_dir.join("node-id"))?;
        Ok(Self {
            bucket,
            me,
            name,
            run: rand::random(),
            ttl,
            beat: AtomicU64::new(0),
            inner: Mutex::default(),
            unchallenged_until: AtomicU64::new(ALONE),
        })
    }

    /// This node.
    pub fn me(&self) -> NodeId {
        self.me
    }

    /// How often [`Nodes::renew`] is to be called.
    pub fn renew_every(&self) -> Duration {
        self.ttl / RENEWALS
    }

    /// Tells where this node is; others learn it with the next renewal.
    pub fn set_addresses(&self, addresses: Addresses) {
        self.inner.lock().addresses = addresses;
    }

    /// This node's record, as it would be written now.
    fn own_record(&self) -> Record {
        let inner = self.inner.lock();
        Record {
            node: self.me,
            name: self.name.clone(),
            run: self.run,
            beat: self.beat.load(Ordering::Relaxed),
            ttl_ms: u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX),
            stopped: inner.stopped,
            api: inner.addresses.api.clone(),
            peer: inner.addresses.peer.clone(),
        }
    }

    /// Writes this node's record anew.
    ///
    /// # Errors
    /// If the bucket does not take it: it may have, all the same.
    pub async fn renew(&self) -> Result<()> {
        self.beat.fetch_add(1, Ordering::Relaxed);
        let (begun, record) = (Moment::now(), self.own_record());
        self.bucket.put(&key(self.me), encode(&record).into()).await?;
        let mut inner = self.inner.lock();
        if inner.renewed.is_none_or(|last| last.elapsed() >= self.ttl) {
            inner.term += 1;
        }
        inner.renewed = Some(begun);
        self.publish(&inner);
        Ok(())
    }

    /// Says that this node has no computes any more, and will not have any.
    ///
    /// # Errors
    /// As [`Nodes::renew`]; the record then expires.
    pub async fn stop(&self) -> Result<()> {
        self.inner.lock().stopped = true;
        self.renew().await
    }

    /// Looks at all records.
    ///
    /// # Errors
    /// If the bucket cannot be read.
    pub async fn look(&self) -> Result<()> {
        let listed = self.bucket.list(PREFIX, None).await?;
        let listed = listed.iter().filter_map(|object| object.key.strip_prefix(PREFIX)?.parse().ok());
        let mut there = Vec::new();
        for node in listed.filter(|node| *node != self.me) {
            there.extend(self.read(node).await?);
        }
        let old = {
            let mut inner = self.inner.lock();
            inner.seen.retain(|node, _| there.iter().any(|record| record.node == *node));
            if inner.looked.is_some_and(|last| last.elapsed() > self.renew_every() * 2) {
                inner.seen.values_mut().for_each(|seen| seen.changed = Moment::now());
            }
            inner.looked = Some(Moment::now());
            there.into_iter().for_each(|record| inner.see(record));
            inner.peers = inner.seen.values().filter(|seen| seen.is_alive()).map(|seen| seen.record.clone()).collect();
            self.publish(&inner);
            let old = inner.seen.iter().filter(|(_, seen)| seen.changed.elapsed() > FORGET_AFTER);
            old.map(|(node, _)| *node).collect::<Vec<_>>()
        };
        for node in old {
            self.bucket.delete(&key(node)).await?;
        }
        Ok(())
    }

    /// What is known of a node; asks the bucket about one that was never seen.
    ///
    /// # Errors
    /// As [`Nodes::look`].
    pub async fn standing(&self, node: NodeId) -> Result<Standing> {
        let known = self.inner.lock().seen.contains_key(&node);
        if !known && let Some(record) = self.read(node).await? {
            self.inner.lock().see(record);
        }
        Ok(match self.inner.lock().seen.get(&node).filter(|seen| seen.is_alive()) {
            Some(seen) => Standing::Alive(seen.record.clone()),
            None => Standing::Gone,
        })
    }

    /// All nodes that are alive as far as is known, this one first.
    pub fn alive(&self) -> Vec<Record> {
        let own = self.own_record();
        let inner = self.inner.lock();
        let others = inner.seen.values().filter(|seen| seen.is_alive()).map(|seen| seen.record.clone());
        [own].into_iter().chain(others).collect()
    }

    /// Whether another node was alive when the records were last looked at.
    pub fn has_peers(&self) -> bool {
        !self.inner.lock().peers.is_empty()
    }

    /// The other nodes that were alive then.
    pub fn peers(&self) -> Vec<Record> {
        self.inner.lock().peers.clone()
    }

    /// Notes what the other nodes said: whether they cannot reach the bucket either.
    pub fn excuse(&self, cut_off: bool) {
        let mut inner = self.inner.lock();
        inner.excused = cut_off.then(Moment::now);
        self.publish(&inner);
    }

    fn publish(&self, inner: &Inner) {
        let renewed = inner.renewed.map(|last| last.0 + self.ttl);
        let excused = inner.excused.map(|said| said.0 + self.ttl / 2);
        let until = renewed.max(excused).unwrap_or_default();
        let until = u64::try_from(until.as_nanos()).unwrap_or(ALONE);
        self.unchallenged_until.store(if inner.peers.is_empty() { ALONE } else { until }, Ordering::Release);
    }

    /// Whether what its computes have said by now may be told: no other node can have taken over before they said it.
    ///
    /// The same as [`Nodes::term`] or [`Nodes::is_excused`], for those who ask with every message.
    pub fn may_answer(&self) -> bool {
        let until = self.unchallenged_until.load(Ordering::Acquire);
        until == ALONE || Moment::now().0.as_nanos() < u128::from(until)
    }

    /// Whether a node that was seen has not renewed its record in time. Asks nobody.
    pub fn is_gone(&self, node: NodeId) -> bool {
        self.inner.lock().seen.get(&node).is_some_and(|seen| !seen.is_alive())
    }

    /// Whether no other node can have taken over, though this one's record may have expired.
    pub fn is_excused(&self) -> bool {
        let inner = self.inner.lock();
        inner.peers.is_empty() || inner.excused.is_some_and(|said| said.elapsed() < self.ttl / 2)
    }

    /// Whether no other node can take this one for dead; and which uninterrupted time that has been so.
    pub fn term(&self) -> Option<u64> {
        let inner = self.inner.lock();
        inner.renewed.filter(|last| last.elapsed() < self.ttl).map(|_| inner.term)
    }

    async fn read(&self, node: NodeId) -> Result<Option<Record>> {
        let key = key(node);
        match self.bucket.get(&key).await {
            Ok(bytes) => {
                let record = decode(&bytes).filter(|record| record.node == node);
                if record.is_none() {
                    // As if it was not there: its node writes it again, if it is alive.
                    tracing::error!(key, "a node's record is damaged");
                }
                Ok(record)
            }
            Err(ebb_storage::Error::NoSuchObject { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Inner {
    fn see(&mut self, record: Record) {
        let same = |seen: &&mut Seen| (seen.record.run, seen.record.beat) == (record.run, record.beat);
        if self.seen.get_mut(&record.node).as_ref().filter(|seen| same(seen)).is_none() {
            self.seen.insert(record.node, Seen { record, changed: Moment::now() });
        }
    }
}

impl Seen {
    fn is_alive(&self) -> bool {
        !self.record.stopped && self.changed.elapsed() < Duration::from_millis(self.record.ttl_ms)
    }
}

/// A moment of the clock that no one sets and that goes on while the machine sleeps.
#[derive(Debug, Clone, Copy)]
struct Moment(Duration);

impl Moment {
    fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self(Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec).unwrap_or(0)))
    }

    fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
}

/// A record as it is stored: JSON, a space, and the BLAKE3 of that in hex.
fn encode(record: &Record) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(record).expect("a record is plain data");
    let hash = blake3::hash(&bytes).to_hex();
    bytes.push(b' ');
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Record> {
    let (json, hash) = bytes.split_at_checked(bytes.len().checked_sub(HASH_BYTES)?)?;
    let json = json.strip_suffix(b" ")?;
    (blake3::hash(json).to_hex().as_bytes() == hash).then(|| serde_json::from_slice(json).ok())?
}

fn key(node: NodeId) -> String {
    format!("{PREFIX}{node}")
}

fn read_or_make_id(path: &Path) -> Result<NodeId> {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            let (what, why) = (path.to_string_lossy().into_owned(), "it is no node's identifier".to_owned());
            Error::Storage(ebb_storage::Error::Corrupt { what, why })
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let made = NodeId::generate();
            files::replace(path, made.to_string().as_bytes())?;
            Ok(made)
        }
        Err(error) => Err(error).on("read", path),
    }
}

#[cfg(test)]
mod tests;
