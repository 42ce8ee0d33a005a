//! The nodes on one bucket: each announces itself with a record that it renews; one that is not renewed has expired.
//!
//! ```text
//! nodes/<node id>     {"node":"nd_…","name":"…","run":…,"beat":…,"ttl_ms":…,"stopped":false,"api":…,"peer":…} <blake3>
//! ```
//!
//! **No clocks are compared.** A record has a counter, and whoever looks remembers when it last saw that change, by a
//! clock of its own that never jumps. A node is gone when a look that was begun a whole time to live later finds the same
//! count. A node that cannot renew its own record knows, by the same kind of clock, when others may take it for dead: it
//! began the last renewal that worked before any of them can have seen it.
//!
//! **Terms.** The uninterrupted time in which nobody can have taken this node for dead is a *term*. In a new one nothing
//! of before counts: [`Nodes::confirm`] ends the time in which nothing may be told, after whose the projects are was
//! looked up again.
//!
//! ```text
//!            renewed in time              expired, renewed again           confirm
//!   ┌────────────────────────┐  term + 1  ┌────────────────────┐  ┌────────────────────────┐
//!   │ what computes say      │ ─────────► │ nothing is told    │─►│ what computes say      │
//!   │ is told                │            └────────────────────┘  │ is told                │
//!   └────────────────────────┘                                    └────────────────────────┘
//! ```
//!
//! Without the bucket a node goes on in two cases. All others have promised not to take over for a while, because they
//! cannot renew their records either ([`Others::hold`]). Or it is alone: no other node was alive when it last looked. One
//! that comes later tells it, before it takes over ([`Others::warn`]).
//!
//! Who could not look for a while has seen nobody die: after that everybody has the whole time again.
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
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
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

/// LIMIT: small requests, made to hide the bucket's latency.
const PARALLEL: usize = 16;

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

/// A record as it was last seen.
#[derive(Debug, Clone)]
struct Seen {
    record: Record,
    /// When it was first seen like this.
    changed: Moment,
    /// When the newest look at it was begun.
    looked: Moment,
}

/// The way to other nodes that does not lead through the bucket.
#[async_trait]
pub trait Others: Debug + Send + Sync + 'static {
    /// Whether every one of these nodes promises not to take over from anybody for this long, which each does that
    /// cannot renew its record.
    async fn hold(&self, nodes: &[Record], time: Duration) -> bool;

    /// Tells a node that has not renewed its record that the other one is about to take over from it. It may not hear.
    async fn warn(&self, node: &Record, of: &Record);
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
    /// Until when, by [`Moment`]'s clock in nanoseconds, no other node can have taken over.
    unchallenged_until: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    addresses: Addresses,
    seen: BTreeMap<NodeId, Seen>,
    /// When the last renewal that worked was begun.
    renewed: Option<Moment>,
    /// The number of the present term; none before the first renewal.
    term: u64,
    /// The last term in which it was looked up what is still this node's.
    confirmed: u64,
    /// When a look at the records last ended well, and in which term it was begun.
    looked: Option<(Moment, u64)>,
    /// The other nodes that were alive then.
    peers: Vec<Record>,
    /// Until when all of them have promised not to take over.
    held_by_others: Option<Moment>,
    /// Until when this node has promised that.
    promised: Option<Moment>,
    /// Takeovers that are under way.
    taking_over: usize,
    /// When this process last showed that it runs.
    ticked: Option<Moment>,
    /// It stood still, and has not looked at the records since.
    stood_still: bool,
    stopped: bool,
}

/// A takeover under way; a node makes no promise meanwhile.
#[derive(Debug)]
pub struct TakingOver<'a>(&'a Nodes);

impl Drop for TakingOver<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().taking_over -= 1;
    }
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
            unchallenged_until: AtomicU64::new(0),
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
    pub fn own_record(&self) -> Record {
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

    /// Writes this node's record anew. Answers whether a new term began: whatever was this node's, may not be any more.
    ///
    /// # Errors
    /// If the bucket does not take it: it may have, all the same.
    pub async fn renew(&self) -> Result<bool> {
        let quiet = self.has_expired() && self.is_quiet().await?;
        self.beat.fetch_add(1, Ordering::Relaxed);
        let (begun, record) = (Moment::now(), self.own_record());
        self.bucket.put(&key(self.me), encode(&record).into()).await?;
        let mut inner = self.inner.lock();
        let expired = inner.renewed.is_none_or(|last| last.elapsed() >= self.ttl);
        // Who came after that look has seen another count by the time that it could have taken this node for dead.
        let is_new = expired && !(quiet && begun.elapsed() < self.ttl / 2);
        if is_new {
            inner.term += 1;
        }
        inner.renewed = inner.renewed.max(Some(begun));
        self.publish(&inner);
        Ok(is_new)
    }

    fn has_expired(&self) -> bool {
        self.inner.lock().renewed.is_some_and(|last| last.elapsed() >= self.ttl)
    }

    /// Whether this node was alone when it last looked, and no record has changed since: then nobody can have taken over
    /// though its record expired.
    async fn is_quiet(&self) -> Result<bool> {
        if !self.inner.lock().is_alone() {
            return Ok(false);
        }
        let begun = Moment::now();
        let there = self.records().await?;
        let inner = self.inner.lock();
        let is_known = |record: &Record| inner.seen.get(&record.node).is_some_and(|seen| seen.is(record));
        Ok(there.iter().all(is_known) && begun.elapsed() < self.ttl / 2)
    }

    /// Says that this node has no computes any more, and will not have any.
    ///
    /// # Errors
    /// As [`Nodes::renew`]; the record then expires.
    pub async fn stop(&self) -> Result<()> {
        self.inner.lock().stopped = true;
        self.renew().await.map(drop)
    }

    /// Looks at all records.
    ///
    /// # Errors
    /// If the bucket cannot be read.
    pub async fn look(&self) -> Result<()> {
        let (begun, term) = (Moment::now(), self.inner.lock().term);
        let there = self.records().await?;
        let old = {
            let mut inner = self.inner.lock();
            inner.seen.retain(|node, _| there.iter().any(|record| record.node == *node));
            if inner.looked.is_some_and(|(last, _)| begun.since(last) > self.ttl) {
                inner.seen.values_mut().for_each(|seen| seen.changed = Moment::now());
            }
            there.into_iter().for_each(|record| inner.see(record, begun));
            inner.looked = Some((Moment::now(), term));
            inner.peers = inner.seen.values().filter(|seen| seen.is_alive()).map(|seen| seen.record.clone()).collect();
            inner.stood_still = false;
            self.publish(&inner);
            let old = inner.seen.iter().filter(|(_, seen)| seen.changed.elapsed() > FORGET_AFTER);
            old.map(|(node, _)| *node).collect::<Vec<_>>()
        };
        for node in old {
            self.bucket.delete(&key(node)).await?;
        }
        Ok(())
    }

    /// All other nodes' records.
    async fn records(&self) -> Result<Vec<Record>> {
        let listed = self.bucket.list(PREFIX, None).await?;
        let nodes = listed.iter().filter_map(|object| object.key.strip_prefix(PREFIX)?.parse().ok());
        let others: Vec<NodeId> = nodes.filter(|node| *node != self.me).collect();
        let read = stream::iter(others).map(|node| self.read(node)).buffer_unordered(PARALLEL);
        read.try_filter_map(|record| async { Ok(record) }).try_collect().await
    }

    /// What was known of a node when the records were last looked at; asks the bucket about one that was never seen.
    ///
    /// # Errors
    /// As [`Nodes::look`].
    pub async fn standing(&self, node: NodeId) -> Result<Standing> {
        let (known, begun) = (self.inner.lock().seen.contains_key(&node), Moment::now());
        if !known && let Some(record) = self.read(node).await? {
            self.inner.lock().see(record, begun);
        }
        Ok(match self.inner.lock().seen.get(&node).filter(|seen| seen.is_alive()) {
            Some(seen) => Standing::Alive(seen.record.clone()),
            None => Standing::Gone,
        })
    }

    /// What is known of a node now: who was gone when it was last looked is looked at again. To be asked before anything
    /// is taken from it.
    ///
    /// # Errors
    /// As [`Nodes::look`].
    pub async fn standing_now(&self, node: NodeId) -> Result<Standing> {
        match self.standing(node).await? {
            Standing::Gone => self.look().await?,
            alive => return Ok(alive),
        }
        self.standing(node).await
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

    /// A node's record as it was last seen, alive or not.
    pub fn last_record(&self, node: NodeId) -> Option<Record> {
        self.inner.lock().seen.get(&node).map(|seen| seen.record.clone())
    }

    /// Whether there may be another node that took this one for dead before its present term.
    ///
    /// # Errors
    /// As [`Nodes::look`].
    pub async fn has_company(&self) -> Result<bool> {
        let has_looked = self.inner.lock().has_looked();
        if !has_looked {
            self.look().await?;
        }
        Ok(self.inner.lock().seen.values().any(|seen| !seen.record.stopped))
    }

    /// Notes that in this term it was looked up what is still this node's, and all computes of what is not are ended.
    pub fn confirm(&self, term: u64) {
        let mut inner = self.inner.lock();
        inner.confirmed = inner.confirmed.max(term);
        self.publish(&inner);
    }

    /// Shows that this process runs. To be called several times in a record's time to live; answers `false` after it was
    /// not for that long: then the records are to be looked at, or at least tried to, before this node takes itself for
    /// alone again ([`Nodes::tried`]).
    pub fn tick(&self) -> bool {
        let mut inner = self.inner.lock();
        let stood_still = inner.ticked.is_some_and(|last| last.elapsed() >= self.ttl);
        inner.stood_still |= stood_still;
        inner.ticked = Some(Moment::now());
        self.publish(&inner);
        !stood_still
    }

    /// Notes that the records cannot be looked at.
    pub fn tried(&self) {
        let mut inner = self.inner.lock();
        inner.stood_still = false;
        self.publish(&inner);
    }

    /// How long others are to be asked to hold, if this node is in need of that: it could not renew its record lately, and
    /// others were alive.
    pub fn needs_hold(&self) -> Option<Duration> {
        let inner = self.inner.lock();
        (self.is_late(&inner) && !inner.peers.is_empty()).then_some(self.ttl / 2)
    }

    /// Whether a renewal has been missed. Nodes that cannot renew any more all notice before the first record expires.
    fn is_late(&self, inner: &Inner) -> bool {
        inner.renewed.is_none_or(|last| last.elapsed() > self.renew_every() * 2)
    }

    /// Asks all others that were alive to hold.
    pub async fn ask_to_hold(&self, others: &dyn Others, time: Duration) {
        let (peers, begun) = (self.peers(), Moment::now());
        let asked = tokio::time::timeout(self.renew_every(), others.hold(&peers, time));
        let hold = asked.await.unwrap_or(false);
        let mut inner = self.inner.lock();
        // What was promised too late does not undo what may have happened before.
        if hold && peers == inner.peers && self.is_unchallenged(begun) {
            inner.held_by_others = Some(Moment(begun.0 + time));
            self.publish(&inner);
        }
    }

    /// Promises not to take over from anybody for this long, unless this node renews its record, or is at it already.
    pub fn promise(&self, time: Duration) -> bool {
        let mut inner = self.inner.lock();
        let promises = self.is_late(&inner) && inner.taking_over == 0;
        if promises {
            let until = Moment(Moment::now().0 + time);
            inner.promised = inner.promised.max(Some(until));
        }
        promises
    }

    /// Begins a takeover: nothing is promised until the answer is dropped. `None` for as long as something is.
    pub fn take_over(&self) -> Option<TakingOver<'_>> {
        let mut inner = self.inner.lock();
        if inner.promised.is_some_and(|until| until > Moment::now()) {
            return None;
        }
        inner.taking_over += 1;
        Some(TakingOver(self))
    }

    /// Another node says that it is about to take over from this one.
    pub fn challenged(&self, by: Record) {
        let mut inner = self.inner.lock();
        inner.held_by_others = None;
        inner.peers.retain(|peer| peer.node != by.node);
        inner.peers.push(by);
        self.publish(&inner);
    }

    fn publish(&self, inner: &Inner) {
        let renewed = inner.renewed.filter(|_| inner.confirmed == inner.term).map(|last| last.0 + self.ttl);
        let held = inner.held_by_others.map(|until| until.0);
        let is_alone = inner.is_alone() && inner.confirmed == inner.term;
        let alone = inner.ticked.filter(|_| is_alone).map(|last| last.0 + self.ttl);
        let until = renewed.max(held).max(alone).unwrap_or_default();
        self.unchallenged_until.store(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
    }

    /// Whether what its computes have said by now may be told: no other node can have taken over before they said it.
    /// Cheap enough to be asked with every message.
    pub fn may_answer(&self) -> bool {
        self.is_unchallenged(Moment::now())
    }

    fn is_unchallenged(&self, at: Moment) -> bool {
        at.0.as_nanos() < u128::from(self.unchallenged_until.load(Ordering::Acquire))
    }

    /// Whether a node that was seen has not renewed its record in time. Asks nobody.
    pub fn is_gone(&self, node: NodeId) -> bool {
        self.inner.lock().seen.get(&node).is_some_and(|seen| !seen.is_alive())
    }

    /// Whether no other node can have taken over, though this one's record may have expired; but for a new term that is
    /// not confirmed yet.
    pub fn is_excused(&self) -> bool {
        let inner = self.inner.lock();
        let runs = inner.ticked.is_none_or(|last| last.elapsed() < self.ttl);
        (inner.is_alone() && runs) || inner.held_by_others.is_some_and(|until| until > Moment::now())
    }

    /// Whether no other node can take this one for dead; and which term that is.
    pub fn term(&self) -> Option<u64> {
        let inner = self.inner.lock();
        inner.renewed.filter(|last| last.elapsed() < self.ttl).map(|_| inner.term)
    }

    /// The present term, whether or not the record has expired since.
    pub fn last_term(&self) -> u64 {
        self.inner.lock().term
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
    fn see(&mut self, record: Record, looked: Moment) {
        match self.seen.get_mut(&record.node).filter(|seen| seen.is(&record)) {
            Some(seen) => seen.looked = seen.looked.max(looked),
            None => drop(self.seen.insert(record.node, Seen { record, changed: Moment::now(), looked })),
        }
    }

    /// Whether no other node was alive when the records were last looked at, in this term, nor has been heard of since.
    fn is_alone(&self) -> bool {
        self.peers.is_empty() && !self.stood_still && self.has_looked()
    }

    /// Whether the records were looked at in this term.
    fn has_looked(&self) -> bool {
        self.looked.is_some_and(|(_, term)| term == self.term)
    }
}

impl Seen {
    fn is(&self, record: &Record) -> bool {
        (self.record.run, self.record.beat) == (record.run, record.beat)
    }

    fn is_alive(&self) -> bool {
        !self.record.stopped && self.looked.since(self.changed) < Duration::from_millis(self.record.ttl_ms)
    }
}

/// A moment of the clock that no one sets and that goes on while the machine sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Moment(Duration);

impl Moment {
    fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self(Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec).unwrap_or(0)))
    }

    fn elapsed(self) -> Duration {
        Self::now().since(self)
    }

    fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
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
