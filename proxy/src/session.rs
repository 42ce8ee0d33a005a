//! One authenticated client, from its first backend to its end: the owner of everything a session has.
//!
//! ```text
//!              gate open, compute awake,            gate up, at rest,
//!              state given back                     state in hand
//!   Waiting ───────────────────────────► Attached ─────────────────► Hibernated
//!      ▲                                                                 │
//!      └─────────────────────────── the client sends ────────────────────┘
//! ```
//!
//! **Invariants**: the client sees an answer to every message it sent, in order, or an error and the end. Answers to
//! the proxy's own questions never reach it. While hibernated, only its next message leads to a wake; a `Terminate` and
//! a ping (`pings`) do not.
//!
//! **Cancellation**: dropping a session closes both sides; its seat and its cancel key go with it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ebb_types::SqlState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::Instrument;

use crate::backend::{Backend, StartError, encoded, relayed_error};
use crate::branch::{Branch, Doing, Gate, Membership, Order, Seat, Sitter, Standing};
use crate::calloff::{CalledOff, Next};
use crate::cancel::{CancelTarget, IssuedKey};
use crate::conversation::Conversation;
use crate::door::{no_seat, refused};
use crate::endpoints::{Awake, EndpointError};
use crate::errors::Said;
use crate::hibernate::{self, Examined, Kept, ReplayError, Replayed};
use crate::login::{Login, Turned, login};
use crate::pool;
use crate::proxy::Shared;
use crate::relay::{Link, Pause, count_passed};
use crate::replication::{self, History, Resume, Walstream};
use crate::stream::{Buffer, ClientStream};
use crate::unix::UnixStream;
use crate::waits::{Stage, Wait};
use crate::wire::{cstr, error_field, message};
use crate::wishes::Wishes;

mod sleeping;

/// After how long a wait deserves a word.
pub const NOTICE_AFTER: Duration = Duration::from_secs(1);
/// Between two tries to reach a compute that should be there.
pub const RETRY_AFTER: Duration = Duration::from_millis(20);
/// How often a stream of WAL is looked at, whether it has become quiet.
const STREAM_LOOK: Duration = Duration::from_millis(200);
/// LIMIT: between two wakes, after one that failed for a reason that may pass.
const WAKE_AGAIN_MIN: Duration = Duration::from_millis(250);
const WAKE_AGAIN_MAX: Duration = Duration::from_secs(2);
/// LIMIT: how long a backend may take to close once it is told to.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(2);
/// LIMIT: how long the last words of a dead compute may take to arrive.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(200);
/// LIMIT: how long a cancel request on its way is waited for. One that strikes later pins the session this time.
const LAST_CANCEL_TIMEOUT: Duration = Duration::from_secs(1);
/// LIMIT: how much of a message begun is waited for, so that an error can follow it.
const REST_OF_MESSAGE_MAX: usize = 64 * 1024;

/// Counts what became of a connection; `sqlstate` is empty where the client was told none.
pub fn note_connect(outcome: &'static str, sqlstate: &'static str) {
    metrics::counter!("ebb_proxy_connects_total", "outcome" => outcome, "sqlstate" => sqlstate).increment(1);
}

/// Serves one accepted connection to its end.
pub async fn serve(shared: Arc<Shared>, socket: TcpStream, peer: SocketAddr, conn: u64) {
    let empty = tracing::field::Empty;
    let span = tracing::info_span!("connection", conn, %peer, endpoint = empty, role = empty);
    async {
        let mut stranger = shared.strangers.enter();
        let crowded_out = stranger.loss();
        let admitted = tokio::select! {
            admitted = timeout(shared.config.login_timeout, login(&shared, socket, peer, &mut stranger)) => admitted,
            () = crowded_out.notified() => {
                tracing::debug!("connection made room for another one before it had logged in");
                return note_connect("made_room", "");
            }
        };
        match admitted {
            Ok(Ok(login)) => {
                drop(stranger);
                run(&shared, login, conn).await;
            }
            Ok(Err(Turned::Away(client, said))) => {
                tracing::debug!(sqlstate = said.sqlstate(), "connection turned away");
                note_connect("refused", said.sqlstate());
                client.goodbye(&encoded(&said)).await;
            }
            Ok(Err(Turned::Told(sqlstate))) => note_connect("refused", sqlstate),
            Ok(Err(Turned::Off)) => note_connect("left", ""),
            Err(_) => {
                refused("login_timeout");
                tracing::debug!("login timed out");
                note_connect("timed_out", "");
            }
        }
    }
    .instrument(span)
    .await;
}

async fn run(shared: &Arc<Shared>, mut login: Login, conn: u64) {
    let peer = login.peer;
    let span = tracing::Span::current();
    span.record("endpoint", tracing::field::display(&login.endpoint.name)).record("role", &login.role);
    let wishes = match Wishes::take(&mut login.startup, shared.config.answer_pings) {
        Ok(wishes) => wishes,
        Err(said) => {
            note_connect("refused", said.sqlstate());
            return login.client.goodbye(&encoded(&said)).await;
        }
    };
    let text = |name: &str| login.startup.text(name).unwrap_or_default().to_owned();
    let sitter = Sitter {
        conn,
        role: login.role.clone(),
        database: text("database"),
        application: text("application_name"),
        peer: peer.to_string(),
    };
    let branch = shared.branch(login.endpoint.branch);
    let seat = Seat::new(sitter);
    let (most, most_of_role) = (shared.config.sessions_per_endpoint_max, shared.config.sessions_per_role_max);
    let membership = match branch.join(&seat, most, most_of_role) {
        Ok(membership) => membership,
        Err(full) => {
            let said = no_seat(full, shared, &login.endpoint, &seat.sitter.role);
            note_connect("refused", said.sqlstate());
            return login.client.goodbye(&encoded(&said)).await;
        }
    };
    tracing::debug!(branch = %login.endpoint.branch, pooled = login.pooled, "client logged in");
    if login.pooled {
        return pool::run(shared, login, branch, seat, membership, wishes.notice).await;
    }
    let Login { client, startup, .. } = login;
    let session = Session {
        key: shared.keys.issue(&seat, startup.version()),
        shared: shared.clone(),
        branch,
        client,
        startup: startup.encode().into(),
        walstream: startup.is_replication().then(Box::default),
        wishes,
        seat,
        conversation: Conversation::new(),
        up: Buffer::default(),
        down: Buffer::default(),
        kept: None,
        known: None,
        introduced: false,
        generation: 0,
        passed: [0; 2],
        _membership: membership,
    };
    session.run().await;
}

/// How a session ends.
#[derive(Debug)]
pub enum End {
    /// With words of the proxy's own.
    Say(Said),
    /// With words of the backend's.
    Pass(Vec<u8>),
    /// Without a word: the client is gone, or has been told.
    Silent,
}

impl End {
    /// How the connection of a client that never had a backend is counted.
    pub fn as_connect(&self) -> (&'static str, &'static str) {
        match self {
            End::Silent => ("left", ""),
            End::Say(said) => ("refused", said.sqlstate()),
            // Whatever Postgres may say; what Ebb never says itself is one label.
            End::Pass(error) => {
                let code = error.get(5..).and_then(|body| std::str::from_utf8(error_field(body, b'C')?).ok());
                ("refused", code.and_then(SqlState::of).map_or("other", SqlState::as_str))
            }
        }
    }
}

/// What became of a try to get a backend.
enum Tried {
    Attached(Box<Attached>),
    /// A fence came up.
    Fenced,
    /// Nobody answered, or not yet.
    Unreachable,
    /// There is none now, for a reason that may pass.
    NotNow(EndpointError),
}

/// A backend that has been brought to where the client left off.
struct Attached {
    awake: Awake,
    backend: Backend,
    replayed: Replayed,
    history: Option<History>,
}

enum TryError {
    Endpoint(EndpointError),
    NotAdmitted,
    Start { generation: u64, error: StartError },
    Replay { generation: u64, error: ReplayError },
}

struct Session {
    shared: Arc<Shared>,
    branch: Arc<Branch>,
    client: ClientStream,
    /// The start-up packet for each backend.
    startup: Box<[u8]>,
    /// On a replication connection: the stream of WAL.
    walstream: Option<Box<Walstream>>,
    wishes: Wishes,
    seat: Arc<Seat>,
    key: IssuedKey,
    conversation: Conversation,
    up: Buffer,
    down: Buffer,
    /// The state to give back, while there is no backend; `None` before the first.
    kept: Option<Arc<Kept>>,
    /// The state that the backend has as long as the client sends nothing: what it was given, or was read of it last.
    known: Option<Arc<Kept>>,
    /// Whether it has had a backend.
    introduced: bool,
    /// The compute it is, or was last, attached to.
    generation: u64,
    /// Bytes passed on, up and down.
    passed: [u64; 2],
    _membership: Membership,
}

impl Session {
    async fn run(mut self) {
        let end = loop {
            let backend = match self.attach().await {
                Ok(backend) => backend,
                Err(end) => break end,
            };
            // Until now the client's query was in nobody's hands but the proxy's.
            if self.seat.end_wait()
                && let Err(end) = self.call_off().await
            {
                break end;
            }
            if let Some(mut backend) = backend
                && let Err(end) = self.attached(&mut backend).await
            {
                self.close_backend(&mut backend, &end).await;
                break end;
            }
            if let Err(end) = self.hibernated().await {
                break end;
            }
        };
        self.end(end).await;
    }

    async fn end(mut self, end: End) {
        count_passed(&mut self.passed);
        if !self.introduced {
            let (outcome, sqlstate) = end.as_connect();
            note_connect(outcome, sqlstate);
        }
        let words = match end {
            End::Silent => Vec::new(),
            End::Say(said) => {
                tracing::debug!(sqlstate = said.sqlstate(), "session ended");
                encoded(&said)
            }
            End::Pass(words) => words,
        };
        // In the middle of another message nothing can be said.
        if self.conversation.server_at_boundary() {
            self.client.goodbye(&[self.down.released(), &words].concat()).await;
        }
    }

    /// What an order means to a session that is not in the middle of anything.
    fn obey(&self) -> Result<(), End> {
        if self.shared.shutdown.is_cancelled() {
            return Err(End::Say(Said::draining(false)));
        }
        match self.seat.ordered() {
            None => Ok(()),
            Some(Order::Drain | Order::DrainNow) => Err(End::Say(Said::draining(false))),
            Some(Order::Fenced) => Err(End::Say(Said::fenced_out("it did not come to rest in time"))),
            Some(Order::Evicted) => Err(End::Say(self.evicted())),
            Some(Order::Lost) => Err(End::Say(Said::compute_lost(false))),
        }
    }

    fn evicted(&self) -> Said {
        metrics::counter!("ebb_proxy_evictions_total").increment(1);
        Said::evicted(&self.seat.pin().unwrap_or_else(|| "it cannot be given back".to_owned()))
    }

    fn conn(&self) -> u64 {
        self.seat.sitter.conn
    }

    // Waiting.

    /// Gets a backend and brings it to where the client left off, within the wake budget; or none, if the client does not
    /// want one any more.
    async fn attach(&mut self) -> Result<Option<UnixStream>, End> {
        self.seat.set_doing(Doing::Waiting);
        if self.kept.is_some() && !self.up.is_empty() && self.walstream.is_none() {
            self.seat.begin_wait();
        }
        let budget = self.shared.config.wake_budget;
        let deadline = Instant::now() + budget;
        let mut notice_at = Instant::now() + NOTICE_AFTER;
        let wait = Wait::begin();
        let attached = self.attach_by(deadline, &mut notice_at, &wait).await;
        wait.over(self.shared.config.slow_wake, attached.is_ok());
        match attached? {
            Some(attached) => self.introduce(*attached).await.map(Some),
            None => Ok(None),
        }
    }

    /// Tries until it has one, the client wants none any more, or the deadline passes.
    async fn attach_by(
        &mut self,
        deadline: Instant,
        notice_at: &mut Instant,
        wait: &Wait,
    ) -> Result<Option<Box<Attached>>, End> {
        let budget = self.shared.config.wake_budget;
        let mut not_now = None;
        let mut retry_after = RETRY_AFTER;
        loop {
            self.obey()?;
            if self.seat.is_called_off() {
                return Ok(None);
            }
            if self.branch.begin_work(self.conn()) {
                match self.attach_once(deadline, notice_at, wait).await? {
                    Tried::Attached(attached) => return Ok(Some(attached)),
                    _ if self.seat.is_called_off() => return Ok(None),
                    Tried::Fenced | Tried::Unreachable => retry_after = RETRY_AFTER,
                    Tried::NotNow(error) => {
                        retry_after = (retry_after * 2).clamp(WAKE_AGAIN_MIN, WAKE_AGAIN_MAX);
                        not_now = Some(error);
                    }
                }
                wait.enter(Stage::Gate);
            }
            // At the gate until it moves, or between two tries.
            let pause = if self.branch.gate() == Gate::Open { retry_after } else { budget };
            tokio::select! {
                () = self.seat.attention() => {}
                () = sleep(pause) => {}
                () = sleep_until(*notice_at) => self.notice(notice_at).await?,
                () = sleep_until(deadline) => {
                    return Err(End::Say(match (self.branch.gate(), not_now) {
                        (Gate::Open, Some(error)) => error.into(),
                        (Gate::Open, None) => Said::still_waking(budget, self.branch.usual_wake()),
                        _ => Said::still_fenced(budget),
                    }));
                }
            }
        }
    }

    /// One try. A fence that comes up meanwhile calls it off.
    async fn attach_once(&mut self, deadline: Instant, notice_at: &mut Instant, wait: &Wait) -> Result<Tried, End> {
        let seat = self.seat.clone();
        let again = Again { kept: self.kept.clone(), stream: self.walstream.as_ref().map(|stream| stream.resume()) };
        let (shared, branch, wait) = (self.shared.clone(), self.branch.clone(), wait.clone());
        let trying = try_attach(shared, branch, self.startup.clone(), again, seat.clone(), wait);
        let mut trying = Box::pin(trying);
        let result = loop {
            tokio::select! {
                result = &mut trying => break result,
                () = seat.attention() => {
                    self.obey()?;
                    match self.branch.gate() {
                        _ if seat.is_called_off() => {
                            drop(trying);
                            self.branch.stand(self.conn(), Standing::Apart);
                            return Ok(Tried::Unreachable);
                        }
                        Gate::Open => {}
                        // The client waits for the very compute that is to be suspended.
                        gate if gate.is_refusable() => self.branch.stand(self.conn(), Standing::Busy),
                        Gate::Gathering(_) | Gate::Detaching | Gate::Closed => {
                            drop(trying);
                            self.branch.stand(self.conn(), Standing::Apart);
                            return Ok(Tried::Fenced);
                        }
                    }
                }
                () = sleep_until(*notice_at) => self.notice(notice_at).await?,
                () = sleep_until(deadline) => {
                    let budget = self.shared.config.wake_budget;
                    return Err(End::Say(Said::still_waking(budget, self.branch.usual_wake())));
                }
            }
        };
        drop(trying);
        let generation = match result {
            Ok(attached) => return Ok(Tried::Attached(Box::new(attached))),
            // What says so itself may be gone with the next try; anything else is the same again.
            Err(TryError::Endpoint(error)) if error.sqlstate == SqlState::CANNOT_CONNECT_NOW => {
                self.branch.stand(self.conn(), Standing::Apart);
                return Ok(Tried::NotNow(error));
            }
            Err(TryError::Endpoint(error)) => return Err(End::Say(error.into())),
            Err(TryError::NotAdmitted) => return Err(End::Say(Said::not_admitted(&seat.sitter.role))),
            Err(TryError::Start { generation, error }) => match error {
                StartError::Unreachable(error) => {
                    tracing::debug!(%error, generation, "compute does not answer");
                    generation
                }
                StartError::NotNow => generation,
                StartError::Refused(body) => return Err(End::Pass(relayed_error(&body))),
                StartError::Strange(what) => {
                    tracing::error!(what, "compute answered with something unexpected");
                    return Err(End::Say(Said::strange_backend(what)));
                }
            },
            Err(TryError::Replay { generation, error: ReplayError::Lost }) => generation,
            Err(TryError::Replay { error: ReplayError::Refused(why), .. }) => {
                metrics::counter!("ebb_proxy_resumes_total", "result" => "error").increment(1);
                return Err(End::Say(Said::not_replayed(&why)));
            }
        };
        self.branch.forget(generation);
        self.branch.stand(self.conn(), Standing::Apart);
        Ok(Tried::Unreachable)
    }

    /// Answers what the client wanted a backend for, as it was cancelled before there was one.
    async fn call_off(&mut self) -> Result<(), End> {
        let mut turn = CalledOff::default();
        loop {
            let step = turn.take(self.up.held()).map_err(|what| End::Say(Said::malformed(&what.to_string())))?;
            self.up.release(step.taken);
            self.up.discard_released();
            if !step.answer.is_empty() {
                self.send(&step.answer).await?;
            }
            match step.next {
                Next::Over => return Ok(()),
                Next::Terminated => return Err(End::Silent),
                Next::More => {}
            }
            self.obey()?;
            tokio::select! {
                () = self.seat.attention() => {}
                read = self.up.fill(&mut self.client) => match read {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return Err(End::Silent),
                },
            }
        }
    }

    /// Tells the client, once, that it is waiting.
    async fn notice(&mut self, at: &mut Instant) -> Result<(), End> {
        *at = Instant::now() + self.shared.config.wake_budget * 2;
        if !self.wishes.notice {
            return Ok(());
        }
        self.send(&encoded(&Said::waiting(self.branch.gate() != Gate::Open))).await
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.client.send(bytes).await.map_err(|_| End::Silent)
    }

    /// Tells the client what it has to know of its new backend: all of it the first time, changes later.
    async fn introduce(&mut self, attached: Attached) -> Result<UnixStream, End> {
        let Attached { awake, backend, replayed, history } = attached;
        if let (Some(walstream), Some(history)) = (&mut self.walstream, history) {
            walstream.set_history(history);
        }
        let target = CancelTarget { socket: awake.socket, key: backend.key, _lease: None };
        self.generation = awake.generation;
        self.seat.set_backend(awake.generation, Some(target));

        let mut out = Vec::new();
        for (name, value) in last_values(backend.parameters, replayed.parameters) {
            if self.conversation.note_parameter(&name, &value) {
                message(&mut out, b'S', |body| {
                    cstr(body, &name);
                    cstr(body, &value);
                });
            }
        }
        out.extend_from_slice(&backend.notices);
        let given = self.kept.take();
        let first = given.is_none();
        self.known = Some(given.unwrap_or_default());
        self.conversation.listen_anew();
        if first {
            self.introduced = true;
            note_connect("ok", "");
            message(&mut out, b'K', |body| self.key.key.encode(body));
            message(&mut out, b'Z', |body| body.push(b'I'));
        } else {
            metrics::counter!("ebb_proxy_resumes_total", "result" => "ok").increment(1);
            for (name, why) in replayed.lost_statements {
                Said::statement_not_replayed(&name, &why).encode(&mut out);
            }
        }
        if !out.is_empty() {
            self.send(&out).await?;
        }
        Ok(backend.stream)
    }

    // Attached.

    /// Relays until the session is hibernated (`Ok`) or ends.
    async fn attached(&mut self, backend: &mut UnixStream) -> Result<(), End> {
        loop {
            let pause = if self.walstream.is_some() {
                // Whether a stream is quiet is a matter of time, too.
                let Ok(pause) = timeout(STREAM_LOOK, self.link(backend).run()).await else { continue };
                pause
            } else {
                self.link(backend).run().await
            };
            match pause {
                Pause::AtGate => {
                    if let Some(kept) = self.at_gate(backend).await? {
                        self.detach(backend, kept).await;
                        return Ok(());
                    }
                }
                Pause::Ordered(Order::Lost) => {
                    // The compute is dead, but what its backends said last may lie in the socket.
                    let rest = timeout(LAST_WORDS_TIMEOUT, self.link(backend).last_words()).await;
                    return self.backend_gone(rest.unwrap_or(Pause::ServerGone));
                }
                pause => return self.backend_gone(pause),
            }
        }
    }

    /// What follows when the relay is over: the session ends, unless only its backend is gone, and that is no loss.
    fn backend_gone(&mut self, pause: Pause) -> Result<(), End> {
        if !matches!(pause, Pause::ServerGone) || !self.is_as_known() {
            return Err(self.ended(pause));
        }
        count_passed(&mut self.passed);
        self.kept = Some(self.known.take().unwrap_or_default());
        self.branch.forget(self.generation);
        self.seat.set_backend(0, None);
        self.seat.forgive_loss();
        metrics::counter!("ebb_proxy_kept_through_loss_total").increment(1);
        Ok(())
    }

    /// Whether it is a stream of WAL that may be broken off here.
    fn is_quiet_stream(&self) -> bool {
        self.up.is_empty() && self.walstream.as_ref().is_some_and(|stream| stream.quiet().is_ok())
    }

    /// Whether a backend that is gone is no loss: nothing is under way, and its state is known, because the client has
    /// sent nothing since it was.
    fn is_as_known(&self) -> bool {
        if self.is_quiet_stream() {
            return true;
        }
        let untouched = self.known.is_some() && !self.conversation.has_heard();
        untouched && self.conversation.is_at_rest() && self.up.is_empty() && !self.conversation.ends_with_error()
    }

    fn link<'a>(&'a mut self, backend: &'a mut UnixStream) -> Link<'a> {
        let mut link = Link::new(
            &mut self.client,
            backend,
            &mut self.up,
            &mut self.down,
            &mut self.conversation,
            &self.seat,
            &self.branch,
            &mut self.passed,
        );
        link.select_one = self.wishes.pings;
        link.walstream = self.walstream.as_deref_mut();
        link
    }

    /// What a pause that cannot be resumed means to the client.
    fn ended(&self, pause: Pause) -> End {
        let follows = self.walstream.as_ref().is_some_and(|stream| stream.is_streaming());
        let busy = (!self.conversation.is_idle() && !follows) || self.up.has_held();
        match pause {
            Pause::AtRest | Pause::AtGate => End::Say(Said::draining(false)),
            Pause::Ordered(Order::Drain | Order::DrainNow) => End::Say(Said::draining(busy)),
            Pause::Ordered(Order::Fenced) => End::Say(Said::fenced_out("a query or transaction was under way")),
            Pause::Ordered(Order::Evicted) => End::Say(self.evicted()),
            Pause::ClientGone => End::Silent,
            Pause::Malformed(what) => End::Say(Said::malformed(&what.to_string())),
            Pause::ServerMalformed => {
                tracing::error!("backend sent a malformed message");
                End::Silent
            }
            Pause::Unowned => {
                self.branch.forget(self.generation);
                match self.conversation.server_at_boundary() && !self.down.has_released() {
                    true => End::Say(Said::compute_lost(busy)),
                    // The rest of what was begun may not be told.
                    false => End::Silent,
                }
            }
            Pause::Ordered(Order::Lost) | Pause::ServerGone => {
                if self.conversation.is_terminated() || self.conversation.ends_with_error() {
                    return End::Silent;
                }
                self.branch.forget(self.generation);
                End::Say(Said::compute_lost(busy))
            }
        }
    }

    /// Stands at the gate, at rest. Answers the state in hand if the backend is to be let go, nothing if work goes on.
    async fn at_gate(&mut self, backend: &mut UnixStream) -> Result<Option<Arc<Kept>>, End> {
        // A cancel request that comes late is not to strike the proxy's own questions.
        let _ = timeout(LAST_CANCEL_TIMEOUT, self.seat.shield()).await;
        let examined = self.examine(backend).await;
        self.seat.unshield();
        let kept: Result<Arc<Kept>, String> = match examined? {
            Examined::Kept(kept) => {
                self.branch.stand(self.conn(), Standing::Ready);
                let kept: Arc<Kept> = Arc::from(kept);
                self.known = Some(kept.clone());
                self.conversation.listen_anew();
                Ok(kept)
            }
            Examined::Pinned(reason) => {
                self.seat.set_pin(Some(reason.clone()));
                self.branch.stand(self.conn(), Standing::Pinned(reason.clone()));
                Err(reason)
            }
        };
        loop {
            self.obey()?;
            let gate = self.branch.gate();
            match (gate, &kept) {
                (Gate::Open, _) if self.branch.begin_work(self.conn()) => return Ok(None),
                (Gate::Detaching | Gate::Closed, Ok(kept)) => return Ok(Some(kept.clone())),
                (Gate::Detaching | Gate::Closed, Err(reason)) => {
                    return Err(End::Say(Said::fenced_out(reason)));
                }
                _ => {}
            }
            let refusable = gate.is_refusable() && self.up.is_empty();
            tokio::select! {
                () = self.seat.attention() => {}
                first = self.client.read_u8(), if refusable => {
                    self.up.push(first.map_err(|_| End::Silent)?);
                    // A client that has work is a reason not to suspend. Should the fence be past refusing, the relay
                    // comes straight back here.
                    self.branch.stand(self.conn(), Standing::Busy);
                    return Ok(None);
                }
            }
        }
    }

    /// Reads the session's state. It cannot be broken off, but an order to end is heard.
    async fn examine(&mut self, backend: &mut UnixStream) -> Result<Examined, End> {
        if let Some(walstream) = &self.walstream {
            return Ok(match walstream.quiet() {
                Ok(()) => Examined::Kept(Box::default()),
                Err(reason) => Examined::Pinned(reason.to_owned()),
            });
        }
        let mut aside = Vec::new();
        let seat = self.seat.clone();
        let examined = {
            let mut examining = Box::pin(hibernate::examine(backend, &mut self.conversation, &mut aside));
            loop {
                tokio::select! {
                    examined = &mut examining => break examined,
                    () = seat.attention() => match seat.ordered() {
                        None | Some(Order::Drain) => {}
                        Some(Order::DrainNow) => return Err(End::Say(Said::draining(false))),
                        Some(Order::Fenced | Order::Evicted) => {
                            return Err(End::Say(Said::fenced_out("its state was not read in time")));
                        }
                        Some(Order::Lost) => return Err(End::Say(Said::compute_lost(false))),
                    },
                }
            }
        };
        if !aside.is_empty() {
            self.send(&aside).await?;
        }
        examined.map_err(|lost| match lost.error {
            Some(error) => End::Pass(relayed_error(&error)),
            None => End::Say(Said::compute_lost(false)),
        })
    }

    async fn detach(&mut self, backend: &mut UnixStream, kept: Arc<Kept>) {
        count_passed(&mut self.passed);
        self.kept = Some(kept);
        self.known = None;
        self.seat.set_pin(None);
        self.seat.set_backend(0, None);
        let closing = async {
            backend.write_all(&TERMINATE).await?;
            // The end of the stream is the end of the backend: whoever stops the compute next finds it gone.
            while backend.read(&mut [0; 256]).await? > 0 {}
            std::io::Result::Ok(())
        };
        // A backend that is stuck goes with its compute.
        let _ = timeout(TERMINATE_TIMEOUT, closing).await;
        metrics::counter!("ebb_proxy_hibernations_total").increment(1);
    }

    /// Makes ready for last words: brings the client to the end of the message begun, and lets the backend go.
    async fn close_backend(&mut self, backend: &mut UnixStream, end: &End) {
        if !matches!(end, End::Silent) {
            if !self.conversation.server_at_boundary() {
                // If it does not come, the client is cut off in the middle of it.
                let _ = timeout(LAST_WORDS_TIMEOUT, self.finish_message(backend)).await;
            }
            if let Some(target) = self.seat.backend().filter(|_| !self.conversation.is_idle()) {
                // Nobody waits for the result any more. If it cannot be cancelled, it is gone already.
                let _ = timeout(LAST_WORDS_TIMEOUT, target.cancel()).await;
            }
        }
        if self.conversation.client_at_boundary() && !self.up.has_released() {
            // It would notice the closed socket as well, only with a line in its log.
            let _ = backend.try_write(&TERMINATE);
        }
    }

    async fn finish_message(&mut self, backend: &mut UnixStream) -> std::io::Result<()> {
        let begun = self.down.released().to_vec();
        self.down.discard_released();
        self.client.write_all(&begun).await?;
        let mut left = REST_OF_MESSAGE_MAX;
        let mut chunk = vec![0; 4096];
        while !self.conversation.server_at_boundary() && left > 0 {
            let wanted = self.conversation.server_missing().min(chunk.len()).min(left);
            let count = backend.read(&mut chunk[..wanted]).await?;
            if count == 0 || self.conversation.server_sent(&chunk[..count]).is_err() {
                break;
            }
            self.client.write_all(&chunk[..count]).await?;
            left -= count;
        }
        Ok(())
    }
}

/// `Terminate`.
const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// What a new backend is brought to.
struct Again {
    /// The session's state; `None` for its first backend.
    kept: Option<Arc<Kept>>,
    /// On a replication connection: where the stream was.
    stream: Option<Resume>,
}

/// Wake, connect, start, replay.
async fn try_attach(
    shared: Arc<Shared>,
    branch: Arc<Branch>,
    startup: Box<[u8]>,
    again: Again,
    seat: Arc<Seat>,
    wait: Wait,
) -> Result<Attached, TryError> {
    wait.enter(Stage::Wake);
    let awake = branch.wake(&shared.tasks).await.map_err(TryError::Endpoint)?;
    if awake.admits.as_ref().is_some_and(|roles| !roles.contains(&seat.sitter.role)) {
        return Err(TryError::NotAdmitted);
    }
    let generation = awake.generation;
    wait.enter(Stage::Start);
    let started = Backend::start(&awake.socket, &startup).await;
    let mut backend = started.map_err(|error| TryError::Start { generation, error })?;
    let failed = |error| TryError::Replay { generation, error };
    let (mut replayed, mut history) = (Replayed::default(), None);
    match (&again.kept, &again.stream) {
        // Walsenders take no questions of the extended protocol, and their sessions have no state of that kind.
        (_, Some(stream)) => history = Some(replication::resume(&mut backend.stream, stream).await.map_err(failed)?),
        (Some(kept), None) => {
            wait.enter(Stage::Replay);
            replayed = hibernate::replay(&mut backend.stream, kept).await.map_err(failed)?;
        }
        (None, None) => {}
    }
    Ok(Attached { awake, backend, replayed, history })
}

/// Parameters as a start-up and a replay left them, each once, in the start-up's order.
fn last_values(mut first: Vec<(Vec<u8>, Vec<u8>)>, then: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    for (name, value) in then {
        match first.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => first.push((name, value)),
        }
    }
    first
}

/// Counts one in a gauge while it lives.
pub struct GaugeGuard(&'static str);

impl GaugeGuard {
    /// One more.
    pub fn new(gauge: &'static str) -> Self {
        metrics::gauge!(gauge).increment(1);
        Self(gauge)
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        metrics::gauge!(self.0).decrement(1);
    }
}
