//! Transaction mode: many clients share a branch's few backends, each for a transaction at a time.
//!
//! ```text
//!   clients                        pool of the branch                         Postgres
//!   idle: a few KiB each
//!   first message ── ask ──►  an idle backend of the same start-up packet,
//!                             or a new one, or the end of the queue
//!   transaction   ◄────────────────── exchange ─────────────────────────────► backend
//!   ReadyForQuery(I) ─ give back ─►  the first in the queue, or idle
//! ```
//!
//! What a session is, apart from its backend, stays with the client: what it was told of parameters, the names of its
//! prepared statements (`names`, `exchange`), and what it has set (`session`: looked at when a transaction may have left
//! something, given back at the next one). What cannot be given back pins the backend to the client.
//!
//! **Invariants**
//! - A backend that goes from one client to another is reset before the other's first message.
//! - A slot is taken for each backend, from before it is started until after it is closed; there are never more than the
//!   pool's size.
//! - Who asked first is served first, but that a backend may go to a client with the same start-up packet, past others,
//!   for [`PASSED_OVER_MAX`].
//! - Nobody holds a backend, nor does the pool, while the gate of the branch is closed.
//!
//! **Cancellation**: a [`Waiting`] that is dropped leaves the queue; a backend that is dropped is closed, and its slot
//! goes to the next.

mod chunk;
mod exchange;
mod link;
mod names;
mod reset;
mod session;
mod words;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::backend::{Backend, TERMINATE, terminate};
use crate::cancel::CancelTarget;
use crate::conversation::Parameter;
use crate::endpoints::Awake;
use crate::hibernate::Kept;
use crate::unix::UnixStream;
use chunk::Chunk;
use exchange::Exchange;
use names::{Held, Texts};

pub use session::run;

/// LIMIT: how long the first in the queue may be passed over by others for whom no backend has to be started anew.
const PASSED_OVER_MAX: Duration = Duration::from_millis(50);
/// LIMIT: after this a backend is not used again, so that what its role has been given by `ALTER ROLE … SET` applies at
/// last, and so that caches do not grow for ever.
const LIFETIME_MAX: Duration = Duration::from_secs(60 * 60);
/// LIMIT: backends at once, before it is known how many connections Postgres takes.
const SIZE_UNKNOWN: usize = 4;
/// Of the connections that Postgres takes, the pool takes one in so many: the others are for clients in session mode.
const SHARE: usize = 4;

/// A connection that there is none of: who had a backend last, where that is not known any more.
const SOMEBODY: u64 = u64::MAX;

/// The backends of one branch in transaction mode.
pub struct Pool {
    inner: Mutex<Inner>,
    /// How many wait, for those who only look.
    waiting: AtomicUsize,
}

#[derive(Default)]
struct Inner {
    /// As set, or as derived.
    size: Option<usize>,
    is_set: bool,
    /// Slots taken.
    taken: usize,
    pinned: usize,
    /// The one used last is last.
    #[expect(clippy::vec_box, reason = "sessions hold them in boxes, and they are large to move")]
    idle: Vec<Box<Pooled>>,
    queue: VecDeque<Asker>,
    keys: HashMap<Box<[u8]>, Weak<Key>>,
}

struct Asker {
    key: Arc<Key>,
    since: Instant,
    grant: oneshot::Sender<Grant>,
}

/// What clients of one pool must have in common to share a backend: the start-up packet, but for `application_name`.
#[derive(Debug)]
pub struct Key {
    texts: Texts,
    /// What backends told at their start.
    greeting: Mutex<Option<Arc<[Parameter]>>>,
}

/// What an asker gets.
pub enum Grant {
    /// A backend of the same key.
    Backend(Box<Pooled>),
    /// The right to start one.
    Slot(Slot),
}

/// The right to have one backend.
pub struct Slot {
    pool: Weak<Pool>,
}

impl Slot {
    /// It has been given up in another way than by its drop.
    fn forget(mut self) {
        self.pool = Weak::new();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.slot_freed();
        }
    }
}

/// A backend that belongs to nobody for long.
pub struct Pooled {
    stream: UnixStream,
    socket: std::path::PathBuf,
    cancel_key: crate::startup::CancelKey,
    /// Cancel requests that are on their way to this backend hold it, too.
    lease: Arc<()>,
    generation: u64,
    key: Arc<Key>,
    held: Held,
    exchange: Exchange,
    up: Chunk,
    /// Translated, for the backend; the first `out_sent` bytes are sent.
    out: Vec<u8>,
    out_sent: usize,
    down: Chunk,
    /// As it reported them last.
    parameters: Vec<Parameter>,
    /// The `application_name` of its start-up packet.
    application: Box<[u8]>,
    /// Its `application_name` of the moment.
    named: Box<[u8]>,
    /// The connection that had it last; 0 if it has been reset since.
    last: u64,
    /// The settings that it was given for that client; nothing if none.
    dress: Option<Arc<Kept>>,
    born: Instant,
    slot: Option<Slot>,
}

impl Pooled {
    fn new(awake: Awake, backend: Backend, key: Arc<Key>, application: Box<[u8]>, slot: Slot, conn: u64) -> Self {
        let parameters = backend.parameters.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        metrics::gauge!("ebb_proxy_pool_backends").increment(1);
        Self {
            stream: backend.stream,
            socket: awake.socket,
            cancel_key: backend.key,
            lease: Arc::default(),
            generation: awake.generation,
            key,
            held: Held::default(),
            exchange: Exchange::default(),
            up: Chunk::default(),
            out: Vec::new(),
            out_sent: 0,
            down: Chunk::default(),
            parameters,
            named: application.clone(),
            application,
            last: conn,
            dress: None,
            born: Instant::now(),
            slot: Some(slot),
        }
    }

    fn cancel_target(&self) -> CancelTarget {
        CancelTarget { socket: self.socket.clone(), key: self.cancel_key.clone(), _lease: Some(self.lease.clone()) }
    }

    /// Takes back what was to be sent before its client's first message, because none will come.
    fn leave_unused(&mut self) {
        if !self.out.is_empty() {
            self.out.clear();
            self.exchange.begin(false, 0);
            // It is as its client before left it.
            self.last = SOMEBODY;
        }
    }

    /// Whether a request to cancel may still reach it. Nobody else may have asked since the seat gave it up.
    fn may_be_cancelled(&self) -> bool {
        Arc::strong_count(&self.lease) > 1
    }

    /// Whether it is still there, as far as its socket tells: a backend at rest says nothing but that it ends.
    fn is_alive(&self) -> bool {
        self.stream.is_silent()
    }

    /// Closes it and waits until it has gone, so that whoever stops the compute next does not find it.
    async fn close(mut self: Box<Self>) {
        terminate(&mut self.stream).await;
    }

    fn into_slot(mut self: Box<Self>) -> Slot {
        self.slot.take().expect("a backend keeps its slot until it ends")
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        metrics::gauge!("ebb_proxy_pool_backends").decrement(1);
        // In the middle of a transaction, or after `close`, it notices the closed socket as well.
        let _ = self.stream.try_write(&TERMINATE);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.lock();
        f.debug_struct("Pool").field("taken", &inner.taken).field("queue", &inner.queue.len()).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool without a backend.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), waiting: AtomicUsize::new(0) })
    }

    /// Whether others wait for a backend.
    pub fn is_contended(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// How many backends there may be.
    pub fn size(&self) -> usize {
        self.inner.lock().size()
    }

    /// Sets how many backends there may be; nothing leaves it to be derived.
    pub fn set_size(self: &Arc<Self>, size: Option<usize>) {
        let mut inner = self.inner.lock();
        if size.is_none() && !inner.is_set || size.is_some() && inner.size == size {
            return;
        }
        inner.is_set = size.is_some();
        inner.size = size;
        let scrap = self.fit(&mut inner);
        drop(inner);
        drop(scrap);
    }

    /// Whether it is still to be learned how many connections Postgres takes.
    fn wants_size(&self) -> bool {
        self.inner.lock().size.is_none()
    }

    /// Derives how many backends there may be.
    fn learn(self: &Arc<Self>, connections_max: usize) {
        let mut inner = self.inner.lock();
        if !inner.is_set {
            inner.size = Some((connections_max / SHARE).max(1));
            let scrap = self.fit(&mut inner);
            drop(inner);
            drop(scrap);
        }
    }

    /// Follows a change of size; the answer is to be dropped outside the lock.
    #[expect(clippy::vec_box, reason = "as they lie in the pool")]
    fn fit(self: &Arc<Self>, inner: &mut Inner) -> Vec<Box<Pooled>> {
        while inner.taken < inner.size() && self.grant_slot(inner) {
            inner.taken += 1;
        }
        let too_many = inner.taken.saturating_sub(inner.size()).min(inner.idle.len());
        inner.idle.drain(..too_many).collect()
    }

    /// The key of clients with this start-up packet.
    fn key(&self, startup: Vec<u8>) -> Arc<Key> {
        let mut inner = self.inner.lock();
        if let Some(key) = inner.keys.get(&*startup).and_then(Weak::upgrade) {
            return key;
        }
        inner.keys.retain(|_, key| key.strong_count() > 0);
        let key = Arc::new(Key { texts: Texts::default(), greeting: Mutex::default() });
        inner.keys.insert(startup.into(), Arc::downgrade(&key));
        key
    }

    /// Asks for a backend.
    fn ask(self: &Arc<Self>, conn: u64, key: &Arc<Key>) -> Result<Grant, Waiting> {
        let mut inner = self.inner.lock();
        if inner.queue.is_empty() {
            if let Some(backend) = inner.take_idle(conn, key) {
                return Ok(Grant::Backend(backend));
            }
            if inner.taken < inner.size() {
                inner.taken += 1;
                return Ok(Grant::Slot(self.slot()));
            }
            if !inner.idle.is_empty() {
                // Of another key: the one that has not been used for longest.
                return Ok(Grant::Slot(inner.idle.remove(0).into_slot()));
            }
        }
        let (grant, granted) = oneshot::channel();
        inner.queue.push_back(Asker { key: key.clone(), since: Instant::now(), grant });
        self.note_waiting(&inner);
        Err(Waiting { pool: self.clone(), granted, served: false })
    }

    /// Takes a backend back that is at rest.
    fn give_back(self: &Arc<Self>, backend: Box<Pooled>) {
        let mut inner = self.inner.lock();
        let worn = backend.born.elapsed() > LIFETIME_MAX || inner.taken > inner.size();
        if worn {
            drop(inner);
            return drop(backend);
        }
        let mut backend = backend;
        while let Some(asker) = inner.next_asker(&backend.key) {
            let grant = if Arc::ptr_eq(&asker.key, &backend.key) {
                Grant::Backend(backend)
            } else {
                Grant::Slot(backend.into_slot())
            };
            match asker.grant.send(grant) {
                Ok(()) => return self.note_waiting(&inner),
                // The asker has gone.
                Err(Grant::Backend(back)) => backend = back,
                Err(Grant::Slot(slot)) => {
                    self.pass_on(&mut inner, slot);
                    return self.note_waiting(&inner);
                }
            }
        }
        self.note_waiting(&inner);
        inner.idle.push(backend);
    }

    /// Takes an idle backend out whose last client has gone.
    fn take_left_by(&self, conn: u64) -> Option<Box<Pooled>> {
        let mut inner = self.inner.lock();
        let at = inner.idle.iter().position(|backend| backend.last == conn)?;
        Some(inner.idle.remove(at))
    }

    /// Pins a backend to its client, if not too many are.
    fn pin(self: &Arc<Self>) -> Option<Pin> {
        let mut inner = self.inner.lock();
        if inner.pinned >= inner.size() / 2 {
            return None;
        }
        inner.pinned += 1;
        metrics::gauge!("ebb_proxy_pool_pinned").increment(1);
        Some(Pin { pool: self.clone() })
    }

    /// Closes all idle backends and forgets what they told; answers when they have gone. For a fence.
    pub async fn close_idle(&self) {
        let idle = {
            let mut inner = self.inner.lock();
            for key in inner.keys.values().filter_map(Weak::upgrade) {
                *key.greeting.lock() = None;
            }
            std::mem::take(&mut inner.idle)
        };
        join_all(idle.into_iter().map(Pooled::close)).await;
    }

    /// Drops the idle backends of computes that are gone.
    pub fn lost(&self, generation: u64) {
        let gone: Vec<_> = {
            let mut inner = self.inner.lock();
            inner.idle.extract_if(.., |backend| backend.generation <= generation).collect()
        };
        drop(gone);
    }

    fn slot(self: &Arc<Self>) -> Slot {
        Slot { pool: Arc::downgrade(self) }
    }

    fn slot_freed(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        if inner.taken > inner.size() || !self.grant_slot(&mut inner) {
            inner.taken -= 1;
        }
        self.note_waiting(&inner);
    }

    /// Gives a slot to the first in the queue; answers whether there was one.
    fn grant_slot(self: &Arc<Self>, inner: &mut Inner) -> bool {
        while let Some(asker) = inner.queue.pop_front() {
            match asker.grant.send(Grant::Slot(self.slot())) {
                Ok(()) => return true,
                Err(Grant::Slot(slot)) => slot.forget(),
                Err(Grant::Backend(_)) => {}
            }
        }
        false
    }

    /// Gives a slot in hand to the first in the queue, or up.
    fn pass_on(self: &Arc<Self>, inner: &mut Inner, slot: Slot) {
        // Its drop would take the lock that is held.
        slot.forget();
        if !self.grant_slot(inner) {
            inner.taken -= 1;
        }
    }

    fn note_waiting(&self, inner: &Inner) {
        self.waiting.store(inner.queue.len(), Ordering::Relaxed);
    }
}

impl Inner {
    fn size(&self) -> usize {
        self.size.unwrap_or(SIZE_UNKNOWN)
    }

    /// The client's own last backend, or else the one of its key that was used last.
    fn take_idle(&mut self, conn: u64, key: &Arc<Key>) -> Option<Box<Pooled>> {
        let fits = |backend: &Pooled| Arc::ptr_eq(&backend.key, key);
        let own = self.idle.iter().rposition(|backend| backend.last == conn && fits(backend));
        let at = own.or_else(|| self.idle.iter().rposition(|backend| fits(backend)))?;
        Some(self.idle.remove(at))
    }

    /// Who gets a backend of that key.
    fn next_asker(&mut self, key: &Arc<Key>) -> Option<Asker> {
        let first = self.queue.front()?;
        if !Arc::ptr_eq(&first.key, key)
            && first.since.elapsed() < PASSED_OVER_MAX
            && let Some(at) = self.queue.iter().position(|asker| Arc::ptr_eq(&asker.key, key))
        {
            return self.queue.remove(at);
        }
        self.queue.pop_front()
    }
}

/// A place in the queue.
pub struct Waiting {
    pool: Arc<Pool>,
    granted: oneshot::Receiver<Grant>,
    /// It has been its turn.
    served: bool,
}

impl Waiting {
    /// Waits for its turn. Cancel-safe.
    async fn granted(&mut self) -> Grant {
        match (&mut self.granted).await {
            Ok(grant) => {
                self.served = true;
                grant
            }
            // The queue is never thrown away while someone stands in it.
            Err(_) => std::future::pending().await,
        }
    }

    /// Leaves the queue; answers what was granted meanwhile.
    fn withdraw(&mut self) -> Option<Grant> {
        self.granted.close();
        self.granted.try_recv().ok()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.served {
            return;
        }
        drop(self.withdraw());
        let gone: Vec<_> = {
            let mut inner = self.pool.inner.lock();
            let gone = inner.queue.iter().position(|asker| asker.grant.is_closed());
            let gone = gone.and_then(|at| inner.queue.remove(at)).into_iter().collect();
            self.pool.note_waiting(&inner);
            gone
        };
        drop(gone);
    }
}

/// A backend that stays with its client.
struct Pin {
    pool: Arc<Pool>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        metrics::gauge!("ebb_proxy_pool_pinned").decrement(1);
        self.pool.inner.lock().pinned -= 1;
    }
}

#[cfg(test)]
mod tests;
