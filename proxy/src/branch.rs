//! The sessions of one branch: who they are, what they do, the gate before them, and the one wake they share.
//!
//! ```text
//!                    fence                 all settled             release
//!   gate:   Open ───────────► Gathering ───────────────► Detaching ─► Closed ───────► Open
//!            ▲                    │ refused, or the fence was dropped
//!            └────────────────────┘
//!
//!   standing of a session:
//!     Apart    holds no backend and asks for none: new, hibernated, waiting at the gate
//!     Working  holds a backend or is getting one
//!     Busy     the same, and has said that it cannot come to the gate now (only where a fence may be refused)
//!     Ready    stands at the gate, its state is in hand
//!     Pinned   stands at the gate, its state cannot be given back
//! ```
//!
//! **Invariants**: a session becomes `Working` only while the gate is open, decided under the branch's lock; so once
//! the gate is up, the set of sessions with a backend only shrinks. One call of [`Endpoints::wake`] is in flight at
//! most.
//!
//! **Cancellation**: a fence that is dropped lowers the gate again. A wake goes on without its askers.
//!
//! LOCK ORDER: `Branch::fencing` (async), then `Branch::inner`, then the locks inside a [`Seat`].

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use ebb_types::{BranchId, SqlState};
use futures::future::{BoxFuture, FutureExt, Shared};
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::cancel::CancelTarget;
use crate::endpoints::{
    Activity, Awake, Blocked, Census, EndpointError, Endpoints, SessionInfo, SessionState, Unreplayable,
};
use crate::pool::Pool;

/// LIMIT: cancel requests for one session on their way at once; of more than that, one will do.
const CANCELS_MAX: u32 = 4;
/// LIMIT: detaching is a `Terminate` and a close; what takes longer is stuck.
const DETACH_TIMEOUT: Duration = Duration::from_secs(10);

/// What a session is doing, as others see it. Stored as one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Doing {
    /// Held while its compute wakes or its endpoint is fenced.
    Waiting,
    /// In a query or transaction.
    Active,
    /// Attached, between transactions.
    Idle,
    /// Detached, its state kept.
    Hibernated,
}

impl Doing {
    fn from_u8(value: u8) -> Self {
        match value {
            0 => Doing::Waiting,
            1 => Doing::Active,
            2 => Doing::Idle,
            _ => Doing::Hibernated,
        }
    }
}

/// Where a query of a session stands that has no backend yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Pending {
    /// There is none.
    No,
    /// It waits.
    Yes,
    /// It waits no more: the client has cancelled it.
    CalledOff,
}

/// What a session is told to do from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// End: a fence's deadline has passed.
    Fenced,
    /// End: its state cannot be given back, and its branch does not stay awake for that.
    Evicted,
    /// End: the proxy stops. Active sessions may finish their transaction.
    Drain,
    /// End: the proxy stops, its deadline has passed.
    DrainNow,
    /// The compute is gone.
    Lost,
}

/// Who sits at a session.
#[derive(Debug, Clone)]
pub struct Sitter {
    /// Number of the connection.
    pub conn: u64,
    /// The role that logged in.
    pub role: String,
    /// The database it is in.
    pub database: String,
    /// `application_name` from the start-up message.
    pub application: String,
    /// The client's address.
    pub peer: String,
}

/// The part of a session that others may see and touch.
pub struct Seat {
    /// Who sits here.
    pub sitter: Sitter,
    /// The clock all times of this seat count from.
    made: Instant,
    doing: AtomicU8,
    /// Whether the client has come to the end of a transaction.
    served: AtomicBool,
    /// Nanoseconds after `made`: since when it does that.
    since: AtomicU64,
    /// Nanoseconds after `made`: when the client's last work ended.
    worked: AtomicU64,
    /// Something outside changed: an order was given, or the gate moved.
    attention: AtomicBool,
    /// The session sleeps, but is to know when the compute is awake.
    follows: AtomicBool,
    waker: AtomicWaker,
    order: Mutex<Option<Order>>,
    pin: Mutex<Option<String>>,
    /// The backend of the moment, for cancel requests.
    backend: Mutex<Option<CancelTarget>>,
    /// Cancel requests are not to reach the backend: it does something of the proxy's own, or is about to leave.
    shielded: AtomicBool,
    /// Whether the client waits with a query, and whether that was cancelled meanwhile: a [`Pending`] as one byte.
    wait: AtomicU8,
    /// One permit for each cancel request on its way.
    cancels: Semaphore,
    /// Generation of the compute it is attached to; 0 while it is to none, or before the first.
    generation: AtomicU64,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("conn", &self.sitter.conn).field("doing", &self.doing()).finish_non_exhaustive()
    }
}

impl Seat {
    /// A seat for a client that is about to wait for its compute.
    pub fn new(sitter: Sitter) -> Arc<Self> {
        Arc::new(Self {
            sitter,
            made: Instant::now(),
            doing: AtomicU8::new(Doing::Waiting as u8),
            served: AtomicBool::new(false),
            since: AtomicU64::new(0),
            worked: AtomicU64::new(0),
            attention: AtomicBool::new(false),
            follows: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            order: Mutex::default(),
            pin: Mutex::default(),
            backend: Mutex::default(),
            shielded: AtomicBool::new(false),
            wait: AtomicU8::new(Pending::No as u8),
            cancels: Semaphore::new(CANCELS_MAX as usize),
            generation: AtomicU64::new(0),
        })
    }

    fn doing(&self) -> Doing {
        Doing::from_u8(self.doing.load(Ordering::Relaxed))
    }

    /// Notes what the session does now. Called by its own task only.
    #[inline]
    pub fn set_doing(&self, doing: Doing) {
        let now = u64::try_from(self.made.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let before = self.doing();
        if before == doing {
            return;
        }
        if matches!(before, Doing::Active | Doing::Waiting) {
            self.worked.store(now, Ordering::Relaxed);
        }
        if before == Doing::Active {
            self.served.store(true, Ordering::Relaxed);
        }
        self.since.store(now, Ordering::Relaxed);
        self.doing.store(doing as u8, Ordering::Relaxed);
    }

    /// Notes whether the session is to know when the compute is awake, though it sleeps.
    pub fn set_follows(&self, follows: bool) {
        self.follows.store(follows, Ordering::Relaxed);
    }

    /// Notes why the session cannot be hibernated.
    pub fn set_pin(&self, reason: Option<String>) {
        *self.pin.lock() = reason;
    }

    /// Why the session cannot be hibernated, if that is known.
    pub fn pin(&self) -> Option<String> {
        self.pin.lock().clone()
    }

    /// Notes the backend of the moment, which cancel requests may reach from now on.
    pub fn set_backend(&self, generation: u64, target: Option<CancelTarget>) {
        self.generation.store(generation, Ordering::Relaxed);
        *self.backend.lock() = target;
        self.unshield();
    }

    /// Lets no cancel request through to the backend any more, and waits until those on their way have arrived or failed.
    /// To be called before the backend does anything that is not this client's. It takes as long as a postmaster takes to
    /// answer; whoever stops waiting has to assume that one may still strike. Cancel-safe: the shield stays up.
    pub async fn shield(&self) {
        self.shielded.store(true, Ordering::SeqCst);
        let _ = self.cancels.acquire_many(CANCELS_MAX).await;
    }

    /// Lets cancel requests through again.
    pub fn unshield(&self) {
        self.shielded.store(false, Ordering::SeqCst);
    }

    /// Begins to wait for a backend, with a query of the client in hand.
    pub fn begin_wait(&self) {
        self.wait.store(Pending::Yes as u8, Ordering::SeqCst);
    }

    /// Whether the query that waits for a backend was cancelled.
    pub fn is_called_off(&self) -> bool {
        self.wait.load(Ordering::SeqCst) == Pending::CalledOff as u8
    }

    /// Ends the wait, from when on cancel requests go to the backend; answers whether the query was cancelled before.
    pub fn end_wait(&self) -> bool {
        self.wait.swap(Pending::No as u8, Ordering::SeqCst) == Pending::CalledOff as u8
    }

    /// Cancels what is done for this client; answers what became of the request, for the count.
    pub async fn cancel(&self) -> &'static str {
        let (waits, called_off) = (Pending::Yes as u8, Pending::CalledOff as u8);
        if self.wait.compare_exchange(waits, called_off, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.poke();
            return "called_off";
        }
        // The permit comes first: whoever raised the shield before finds it up, whoever raises it now waits for this one.
        let Ok(_on_its_way) = self.cancels.try_acquire() else { return "limited" };
        if self.shielded.load(Ordering::SeqCst) {
            return "nothing";
        }
        match self.backend() {
            None => "nothing",
            Some(target) => match target.cancel().await {
                Ok(()) => "sent",
                Err(_) => "error",
            },
        }
    }

    /// The backend of the moment.
    pub fn backend(&self) -> Option<CancelTarget> {
        self.backend.lock().clone()
    }

    /// Tells the session what to do. A stronger order already given stays.
    pub fn order(&self, order: Order) {
        {
            let mut held = self.order.lock();
            if !matches!(*held, Some(Order::Fenced | Order::Evicted | Order::DrainNow)) {
                *held = Some(order);
            }
        }
        self.poke();
    }

    /// The order given, if any. It stays.
    pub fn ordered(&self) -> Option<Order> {
        *self.order.lock()
    }

    /// Takes back that the compute is gone: the session does without what that took with it.
    pub fn forgive_loss(&self) {
        let mut held = self.order.lock();
        if *held == Some(Order::Lost) {
            *held = None;
        }
    }

    fn poke(&self) {
        self.attention.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether something outside changed since the last call; if not, the task of `cx` is woken when it does.
    #[inline]
    pub fn poll_attention(&self, cx: &std::task::Context<'_>) -> bool {
        if !self.attention.load(Ordering::Relaxed) {
            // Registered before the flag is looked at again: a poke in between is seen.
            self.waker.register(cx.waker());
        }
        self.attention.load(Ordering::Acquire) && self.attention.swap(false, Ordering::AcqRel)
    }

    /// Waits until something outside changes. For the session's own task only. Cancel-safe.
    pub async fn attention(&self) {
        std::future::poll_fn(|cx| if self.poll_attention(cx) { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    fn after(&self, nanoseconds: &AtomicU64) -> Instant {
        self.made + Duration::from_nanos(nanoseconds.load(Ordering::Relaxed))
    }

    /// When the client last worked: now, if it is at it.
    fn last_worked(&self) -> Instant {
        match self.doing() {
            Doing::Active | Doing::Waiting => Instant::now(),
            Doing::Idle | Doing::Hibernated => self.after(&self.worked),
        }
    }

    /// Whether the client has only just come, and is about to ask for something: it waits for its compute, or has had one
    /// for less than `patience`, and has not been answered yet.
    fn is_new(&self, patience: Duration) -> bool {
        match self.doing() {
            _ if self.served.load(Ordering::Relaxed) => false,
            Doing::Waiting => true,
            Doing::Idle => self.after(&self.since).elapsed() < patience,
            Doing::Active | Doing::Hibernated => false,
        }
    }

    fn info(&self) -> SessionInfo {
        let state = match (self.doing(), &*self.pin.lock()) {
            (Doing::Waiting, _) => SessionState::Waiting,
            (Doing::Active, _) => SessionState::Active,
            (Doing::Idle, Some(reason)) => SessionState::Pinned { reason: reason.clone() },
            (Doing::Idle, None) => SessionState::Idle,
            (Doing::Hibernated, _) => SessionState::Hibernated,
        };
        let Sitter { conn, role, database, application, peer } = self.sitter.clone();
        let since = self.after(&self.since).elapsed();
        SessionInfo { conn, role, database, application, peer, state, since }
    }
}

/// Whether new work may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Everyone works.
    Open,
    /// Sessions are to come to the gate.
    Gathering(Unreplayable),
    /// Sessions at the gate are to let go of their backends.
    Detaching,
    /// No session holds a backend.
    Closed,
}

impl Gate {
    /// Whether the fence that comes up is one that a session at work refuses.
    pub fn is_refusable(self) -> bool {
        matches!(self, Gate::Gathering(Unreplayable::Refuse | Unreplayable::EndPinned))
    }
}

/// How a session stands to the gate; the drawing above tells more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// No backend, and none asked for.
    Apart,
    /// With a backend.
    Working,
    /// With a backend that it cannot leave now.
    Busy,
    /// At the gate, state in hand.
    Ready,
    /// At the gate, and not to be given back: why.
    Pinned(String),
}

/// Whose seats are all taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The endpoint's.
    Endpoint,
    /// The role's at this endpoint.
    Role,
}

type Waking = Shared<BoxFuture<'static, Result<Awake, EndpointError>>>;

#[derive(Debug)]
struct Inner {
    gate: Gate,
    seats: HashMap<u64, (Arc<Seat>, Standing)>,
    /// How many of them each role has; none has 0.
    of_role: HashMap<String, usize>,
    waking: Option<Waking>,
    /// The compute as last heard of.
    awake: Option<Awake>,
    /// How long the last wake took that succeeded.
    usual_wake: Option<Duration>,
    /// When the last client to leave left.
    last_left: Option<Instant>,
}

/// The clients of one branch.
#[derive(Debug)]
pub struct Branch {
    id: BranchId,
    endpoints: Arc<dyn Endpoints>,
    inner: Mutex<Inner>,
    /// A session's standing changed, or one left.
    settled: Notify,
    fencing: tokio::sync::Mutex<()>,
    /// The backends of its clients in transaction mode.
    pub pool: Arc<Pool>,
}

impl Branch {
    /// A branch nobody is connected to.
    pub fn new(id: BranchId, endpoints: Arc<dyn Endpoints>) -> Arc<Self> {
        Arc::new(Self {
            id,
            endpoints,
            inner: Mutex::new(Inner {
                gate: Gate::Open,
                seats: HashMap::new(),
                of_role: HashMap::new(),
                waking: None,
                awake: None,
                usual_wake: None,
                last_left: None,
            }),
            settled: Notify::new(),
            fencing: tokio::sync::Mutex::default(),
            pool: Pool::new(),
        })
    }

    /// Takes a seat. It is left when the answer is dropped.
    ///
    /// # Errors
    /// If `most` are taken, or `most_of_role` by the same role.
    pub fn join(self: &Arc<Self>, seat: &Arc<Seat>, most: usize, most_of_role: usize) -> Result<Membership, Full> {
        let mut inner = self.inner.lock();
        if inner.seats.len() >= most {
            return Err(Full::Endpoint);
        }
        let role = &seat.sitter.role;
        if inner.of_role.get(role).is_some_and(|taken| *taken >= most_of_role) {
            return Err(Full::Role);
        }
        *inner.of_role.entry(role.clone()).or_insert(0) += 1;
        inner.seats.insert(seat.sitter.conn, (seat.clone(), Standing::Apart));
        Ok(Membership { branch: self.clone(), conn: seat.sitter.conn })
    }

    /// See [`Endpoints::may_answer`].
    #[inline]
    pub fn may_answer(&self) -> bool {
        self.endpoints.may_answer()
    }

    /// Where the gate stands.
    pub fn gate(&self) -> Gate {
        self.inner.lock().gate
    }

    /// Becomes `Working` if the gate is open.
    pub fn begin_work(&self, conn: u64) -> bool {
        let mut inner = self.inner.lock();
        let open = inner.gate == Gate::Open;
        if open {
            inner.stand(conn, Standing::Working);
        }
        open
    }

    /// Takes another standing. To become `Working` from `Apart`, use [`Branch::begin_work`].
    pub fn stand(&self, conn: u64, standing: Standing) {
        self.inner.lock().stand(conn, standing);
        self.settled.notify_waiters();
    }

    /// The compute, woken if need be. All who ask while a wake is in flight share its result. Cancel-safe.
    pub async fn wake(self: &Arc<Self>, tasks: &TaskTracker) -> Result<Awake, EndpointError> {
        let waking = {
            let mut inner = self.inner.lock();
            if let Some(awake) = &inner.awake {
                return Ok(awake.clone());
            }
            match &inner.waking {
                Some(waking) => waking.clone(),
                None => {
                    let waking = self.spawn_wake(tasks);
                    inner.waking = Some(waking.clone());
                    waking
                }
            }
        };
        waking.await
    }

    /// The wake runs in a task of its own: that all askers leave must not let a second one begin beside it.
    fn spawn_wake(self: &Arc<Self>, tasks: &TaskTracker) -> Waking {
        let branch = self.clone();
        let task = tasks.spawn(async move {
            let begun = Instant::now();
            let result = branch.endpoints.wake(branch.id).await;
            metrics::histogram!("ebb_proxy_wake_wait_seconds").record(begun.elapsed().as_secs_f64());
            let outcome = if result.is_ok() { "ok" } else { "error" };
            metrics::counter!("ebb_proxy_wakes_total", "result" => outcome).increment(1);
            let mut inner = branch.inner.lock();
            inner.waking = None;
            if result.is_ok() {
                inner.usual_wake = Some(begun.elapsed());
            }
            // Under a fence the compute is about to change: what was just heard of it is old already.
            if let (Gate::Open, Ok(awake)) = (inner.gate, &result) {
                inner.awake = Some(awake.clone());
                for (seat, _) in inner.seats.values().filter(|(seat, _)| seat.follows.load(Ordering::Relaxed)) {
                    seat.poke();
                }
            }
            result
        });
        async move {
            task.await.unwrap_or_else(|error| {
                tracing::error!(%error, "the task of a wake died");
                Err(EndpointError {
                    sqlstate: SqlState::INTERNAL_ERROR,
                    message: "waking the compute failed".to_owned(),
                    detail: None,
                    hint: Some("Please report this with the proxy's log.".to_owned()),
                })
            })
        }
        .boxed()
        .shared()
    }

    /// Whether the compute is awake, as far as is known, and nothing is about to change that.
    pub fn is_awake(&self) -> bool {
        let inner = self.inner.lock();
        inner.gate == Gate::Open && inner.awake.is_some()
    }

    /// How long the last wake took that succeeded.
    pub fn usual_wake(&self) -> Option<Duration> {
        self.inner.lock().usual_wake
    }

    /// Forgets a compute that does not answer any more.
    pub fn forget(&self, generation: u64) {
        let mut inner = self.inner.lock();
        if inner.awake.as_ref().is_some_and(|awake| awake.generation <= generation) {
            inner.awake = None;
        }
    }

    /// What the clients are doing.
    pub fn activity(&self) -> Activity {
        let inner = self.inner.lock();
        let worked = inner.seats.values().map(|(seat, _)| seat.last_worked()).chain(inner.last_left).max();
        let busy = inner.seats.values().filter(|(seat, _)| matches!(seat.doing(), Doing::Active | Doing::Waiting));
        Activity { idle_for: worked.map(|at| at.elapsed()), busy: busy.count(), sessions: inner.seats.len() }
    }

    /// How many sessions there are, and how many of them have only just come.
    pub fn newcomers(&self, patience: Duration) -> (usize, usize) {
        let inner = self.inner.lock();
        (inner.seats.len(), inner.seats.values().filter(|(seat, _)| seat.is_new(patience)).count())
    }

    /// Adds its sessions to a count.
    pub fn count(&self, census: &mut Census) {
        for (seat, _) in self.inner.lock().seats.values() {
            *match seat.doing() {
                Doing::Waiting => &mut census.waiting,
                Doing::Active => &mut census.active,
                Doing::Idle => &mut census.idle,
                Doing::Hibernated => &mut census.hibernated,
            } += 1;
        }
    }

    /// Whether nobody is connected.
    pub fn is_deserted(&self) -> bool {
        self.inner.lock().seats.is_empty()
    }

    /// All sessions, in the order they came.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        self.inner.lock().sessions(|_| true)
    }

    /// A compute is gone.
    pub fn lost(&self, generation: u64) {
        self.forget(generation);
        self.pool.lost(generation);
        self.order(Order::Lost, Some(generation));
    }

    /// Gives an order to every session, or to those attached to computes up to a generation.
    pub fn order(&self, order: Order, generation: Option<u64>) {
        let inner = self.inner.lock();
        for (seat, _) in inner.seats.values() {
            let attached = seat.generation.load(Ordering::Relaxed);
            if generation.is_none_or(|lost| seat.backend.lock().is_some() && attached <= lost) {
                seat.order(order);
            }
        }
    }

    /// See [`crate::Sessions::fence`].
    pub async fn fence(&self, deadline: Duration, rule: Unreplayable) -> Result<(), Blocked> {
        let _alone = self.fencing.lock().await;
        if self.gate() == Gate::Closed {
            return Ok(());
        }
        let lower = LowerOnDrop(self);
        self.inner.lock().move_gate(Gate::Gathering(rule));

        let gathered = timeout(deadline, self.wait_for(|standing| *standing != Standing::Working)).await.is_ok();
        {
            // Looking and moving on happen under one lock: no session settles otherwise in between.
            let mut inner = self.inner.lock();
            let mut blocking = inner.blocking();
            match rule {
                Unreplayable::Refuse if !gathered || !blocking.is_empty() => return Err(Blocked(blocking)),
                Unreplayable::Refuse => {}
                Unreplayable::EndPinned => {
                    blocking.retain(|info| !matches!(info.state, SessionState::Pinned { .. }));
                    if !gathered || !blocking.is_empty() {
                        return Err(Blocked(blocking));
                    }
                    inner.evict();
                }
                Unreplayable::End => inner.order_out(),
            }
            inner.move_gate(Gate::Detaching);
        }
        if timeout(DETACH_TIMEOUT, self.wait_for(|standing| *standing == Standing::Apart)).await.is_err() {
            let blocked = Blocked(self.inner.lock().sessions(|standing| *standing != Standing::Apart));
            tracing::error!(branch = %self.id, sessions = blocked.0.len(), "sessions did not let go of their backends");
            return Err(blocked);
        }
        // Nobody gives one back any more.
        self.pool.close_idle().await;
        self.inner.lock().move_gate(Gate::Closed);
        std::mem::forget(lower);
        Ok(())
    }

    /// See [`crate::Sessions::release`].
    pub fn release(&self) {
        let mut inner = self.inner.lock();
        if inner.gate == Gate::Closed {
            inner.move_gate(Gate::Open);
        }
    }

    async fn wait_for(&self, settled: impl Fn(&Standing) -> bool) {
        loop {
            let changed = self.settled.notified();
            tokio::pin!(changed);
            // Listening before looking: a change in between is not missed.
            changed.as_mut().enable();
            if self.inner.lock().seats.values().all(|(_, standing)| settled(standing)) {
                return;
            }
            changed.await;
        }
    }
}

impl Inner {
    fn leave(&mut self, conn: u64) {
        let Some((seat, _)) = self.seats.remove(&conn) else { return };
        let role = &seat.sitter.role;
        if let Some(taken) = self.of_role.get_mut(role) {
            *taken -= 1;
            if *taken == 0 {
                self.of_role.remove(role);
            }
        }
    }

    fn stand(&mut self, conn: u64, standing: Standing) {
        if let Some((_, held)) = self.seats.get_mut(&conn) {
            *held = standing;
        }
    }

    fn move_gate(&mut self, gate: Gate) {
        self.gate = gate;
        if gate != Gate::Open {
            self.awake = None;
        }
        for (seat, standing) in self.seats.values_mut() {
            if gate == Gate::Open && matches!(standing, Standing::Busy) {
                *standing = Standing::Working;
            }
            seat.poke();
        }
    }

    /// Ends the sessions that did not come to the gate in time.
    fn order_out(&self) {
        for (seat, standing) in self.seats.values() {
            if matches!(standing, Standing::Working | Standing::Busy) {
                seat.order(Order::Fenced);
            }
        }
    }

    /// Ends the sessions at the gate that cannot be given back.
    fn evict(&self) {
        for (seat, standing) in self.seats.values() {
            if matches!(standing, Standing::Pinned(_)) {
                seat.order(Order::Evicted);
            }
        }
    }

    fn sessions(&self, which: impl Fn(&Standing) -> bool) -> Vec<SessionInfo> {
        let chosen = self.seats.values().filter(|(_, standing)| which(standing));
        let mut infos: Vec<_> = chosen.map(|(seat, _)| seat.info()).collect();
        infos.sort_by_key(|info| info.conn);
        infos
    }

    /// The sessions that keep a fence from rising, as they stand at the gate.
    fn blocking(&self) -> Vec<SessionInfo> {
        let mut infos = Vec::new();
        for (seat, standing) in self.seats.values() {
            let mut info = seat.info();
            match standing {
                Standing::Apart | Standing::Ready => continue,
                Standing::Pinned(reason) => info.state = SessionState::Pinned { reason: reason.clone() },
                // It may have finished just now; at the gate it had not.
                Standing::Busy | Standing::Working => {
                    if !matches!(info.state, SessionState::Waiting | SessionState::Pinned { .. }) {
                        info.state = SessionState::Active;
                    }
                }
            }
            infos.push(info);
        }
        infos.sort_by_key(|info| info.conn);
        infos
    }
}

/// Lowers the gate of a fence that did not come to its end.
struct LowerOnDrop<'a>(&'a Branch);

impl Drop for LowerOnDrop<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().move_gate(Gate::Open);
    }
}

/// A taken seat; leaves on drop.
#[derive(Debug)]
pub struct Membership {
    branch: Arc<Branch>,
    conn: u64,
}

impl Drop for Membership {
    fn drop(&mut self) {
        {
            let mut inner = self.branch.inner.lock();
            inner.leave(self.conn);
            inner.last_left = Some(Instant::now());
        }
        self.branch.settled.notify_waiters();
    }
}
