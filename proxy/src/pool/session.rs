//! One authenticated client in transaction mode.
//!
//! ```text
//!              a message, gate open,              at rest, nothing that
//!              a backend is free                  cannot be given back
//!   Idle ──────────────────────────► With a backend ─────────────► Idle
//!    (no backend, no buffers)          │      ▲
//!                                      └──────┘ pinned: something lives in the backend alone
//! ```
//!
//! **Invariants**: as in [`crate::session`]. Besides: while it is idle and not pinned it stands apart from the gate, so that
//! no fence has to wait for it, and no compute stays awake for it.
//!
//! **Cancellation**: dropping a session closes the backend that it has, if any; its seat and its cancel key go with it.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::exchange::Refused;
use super::link::{Link, Pause};
use super::names::Names;
use super::{Grant, Key, Pin, Pool, Pooled, Slot};
use crate::backend::{Backend, StartError, encoded, relayed_error};
use crate::branch::{Branch, Doing, Gate, Membership, Order, Seat, Standing};
use crate::cancel::IssuedKey;
use crate::conversation::Conversation;
use crate::endpoints::{Awake, EndpointError};
use crate::errors::Said;
use crate::haste::Haste;
use crate::hibernate::{self, Examined, Kept, ReplayError};
use crate::login::Login;
use crate::proxy::Shared;
use crate::relay::{COUNT_AFTER, count_passed};
use crate::session::{End, NOTICE_AFTER, RETRY_AFTER, note_connect};
use crate::stream::ClientStream;
use crate::waits::{Stage, Wait};
use crate::wire::{Fields, cstr, error_field, message, read_message};

/// What undoes all that a client may have left in a backend, but for statements that SQL has prepared. In one query, so
/// that it is one transaction; every name is safe from whatever `search_path` there is.
const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; \
     SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES";
/// That, and all prepared statements.
const RESET_ALL: &str = "DISCARD ALL";
/// LIMIT: so much of what an idle client sends is read before it gets a backend; most batches are shorter.
const FIRST_READ: usize = 512;
/// LIMIT: answers to the proxy's own queries are short.
const ANSWER_MAX: usize = 64 * 1024;
/// LIMIT: a backend that does not come to itself in this time is given up.
const RESET_TIMEOUT: Duration = Duration::from_secs(5);
/// LIMIT: how long the last words of a backend, and a request to cancel it, may take.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(200);
/// LIMIT: how much of a message begun is waited for, so that an error can follow it.
const REST_OF_MESSAGE_MAX: usize = 64 * 1024;

/// Serves a client that has logged in at a pooler's name.
pub async fn run(
    shared: &Arc<Shared>,
    login: Login,
    branch: Arc<Branch>,
    seat: Arc<Seat>,
    membership: Membership,
    notices: bool,
) {
    let Login { client, mut startup, endpoint, .. } = login;
    if startup.is_replication() {
        return client.goodbye(&encoded(&Said::not_pooled("replication"))).await;
    }
    let application = startup.fix_application_name();
    let pool = branch.pool.clone();
    pool.set_size(endpoint.pool_size.or(shared.config.pool_size));
    let session = Session {
        key: shared.keys.issue(&seat, startup.version()),
        shared: shared.clone(),
        pool_key: pool.key(startup.without_application_name()),
        startup: startup.encode().into(),
        pool,
        branch,
        client,
        application: application.into(),
        seat,
        notices,
        conversation: Conversation::new(),
        names: Names::default(),
        pending: Vec::new(),
        kept: None,
        pin: None,
        introduced: false,
        served: false,
        haste: Haste::default(),
        passed: [0; 2],
        _membership: membership,
    };
    session.run().await;
}

struct Session {
    shared: Arc<Shared>,
    branch: Arc<Branch>,
    pool: Arc<Pool>,
    pool_key: Arc<Key>,
    client: ClientStream,
    /// The start-up packet for a new backend.
    startup: Box<[u8]>,
    /// The client's `application_name` of the moment.
    application: Box<[u8]>,
    seat: Arc<Seat>,
    /// Whether it is told that it waits.
    notices: bool,
    key: IssuedKey,
    conversation: Conversation,
    names: Names,
    /// What the client has sent beyond its last transaction.
    pending: Vec<u8>,
    /// What it has set, if anything.
    kept: Option<Arc<Kept>>,
    /// While the backend is its own.
    pin: Option<Pin>,
    /// It has been greeted.
    introduced: bool,
    /// It has come to the end of a transaction.
    served: bool,
    haste: Haste,
    /// Bytes passed on, up and down.
    passed: [u64; 2],
    _membership: Membership,
}

/// What becomes of a backend after a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    GiveBack,
    Keep,
}

/// A try to start a backend that came to nothing.
enum StartFailed {
    Endpoint(EndpointError),
    NotAdmitted,
    Start { generation: u64, error: StartError },
}

impl Session {
    async fn run(mut self) {
        let end = match self.serve().await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        self.end(end).await;
    }

    async fn serve(&mut self) -> Result<std::convert::Infallible, End> {
        self.greet().await?;
        loop {
            if self.conversation.is_terminated() {
                return Err(End::Silent);
            }
            self.idle().await?;
            let mut backend = self.check_out().await?;
            backend.up.put(&self.pending);
            self.pending.clear();
            self.pending.shrink_to(FIRST_READ);
            match self.with_backend(&mut backend).await {
                Ok(()) => {
                    self.served = true;
                    self.give_back(backend).await;
                }
                Err(end) => {
                    self.close_backend(*backend, &end).await;
                    return Err(end);
                }
            }
        }
    }

    async fn end(mut self, end: End) {
        count_passed(&mut self.passed);
        if !self.introduced {
            let (outcome, sqlstate) = end.as_connect();
            note_connect(outcome, sqlstate);
        }
        let words = match end {
            End::Silent => None,
            End::Say(said) => {
                tracing::debug!(sqlstate = said.sqlstate(), "session ended");
                Some(encoded(&said))
            }
            End::Pass(words) => Some(words),
        };
        let Self { client, branch, pool, seat, conversation, _membership, .. } = self;
        // In the middle of another message nothing can be said.
        match words.filter(|_| conversation.server_at_boundary()) {
            Some(words) => client.goodbye(&words).await,
            None => drop(client),
        }
        // The backend that the client had last may still hold what nobody saw it take.
        let conn = seat.sitter.conn;
        if branch.begin_work(conn) {
            if let Some(mut backend) = pool.take_left_by(conn)
                && reset(&mut backend).await.is_some()
            {
                backend.last = 0;
                pool.give_back(backend);
            }
            branch.stand(conn, Standing::Apart);
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

    /// Tells settings apart, for the meaning of statements.
    fn dress(&self) -> u64 {
        self.kept.as_ref().map_or(0, |kept| kept.fingerprint())
    }

    /// Completes the start-up: what another backend of the same kind has told, or else one of the client's own.
    async fn greet(&mut self) -> Result<(), End> {
        let known = self.pool_key.greeting.lock().clone();
        let greeting = match known {
            Some(greeting) => greeting,
            None => {
                let mut backend = self.check_out().await?;
                backend.leave_unused();
                let greeting: Arc<[_]> = backend.parameters.clone().into();
                *self.pool_key.greeting.lock() = Some(greeting.clone());
                self.give_back(backend).await;
                greeting
            }
        };
        let mut out = Vec::new();
        for (name, value) in &*greeting {
            let value = if **name == *b"application_name" { &self.application } else { value };
            self.conversation.note_parameter(name, value);
            parameter_status(&mut out, name, value);
        }
        message(&mut out, b'K', |body| self.key.key.encode(body));
        message(&mut out, b'Z', |body| body.push(b'I'));
        self.introduced = true;
        note_connect("ok", "");
        self.send(&out).await
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.client.send(bytes).await.map_err(|_| End::Silent)
    }

    /// Waits, without a backend, until the client sends something.
    async fn idle(&mut self) -> Result<(), End> {
        if !self.pending.is_empty() {
            return Ok(());
        }
        self.seat.set_doing(if self.served { Doing::Hibernated } else { Doing::Idle });
        let mut first = [0; FIRST_READ];
        loop {
            self.obey()?;
            tokio::select! {
                () = self.seat.attention() => {}
                read = self.client.read(&mut first) => match read {
                    Ok(0) | Err(_) => return Err(End::Silent),
                    Ok(_) if first[0] == b'X' => return Err(End::Silent),
                    Ok(count) => {
                        self.pending.extend_from_slice(&first[..count]);
                        return Ok(());
                    }
                },
            }
        }
    }

    // Getting a backend.

    /// Gets a backend that is as the client left its last one.
    async fn check_out(&mut self) -> Result<Box<Pooled>, End> {
        let mut wait = None;
        let result = self.check_out_after(&mut wait).await;
        if let Some(wait) = wait {
            wait.over(self.shared.config.slow_wake, result.is_ok());
        }
        result
    }

    /// The same; `wait` is there once it had to wait for its compute.
    async fn check_out_after(&mut self, wait: &mut Option<Wait>) -> Result<Box<Pooled>, End> {
        let begun = Instant::now();
        let budget = self.shared.config.wake_budget;
        let mut notice_at = begun + NOTICE_AFTER;
        // What Postgres said when it did not take one more connection.
        let mut refused = None;
        loop {
            self.obey()?;
            if self.branch.begin_work(self.conn()) {
                if let Some(backend) = self.try_check_out(begun, &mut notice_at, &mut refused, wait).await? {
                    return Ok(backend);
                }
                self.branch.stand(self.conn(), Standing::Apart);
            }
            self.seat.set_doing(Doing::Waiting);
            wait.get_or_insert_with(Wait::begin).enter(Stage::Gate);
            let pause = if self.branch.gate() == Gate::Open { RETRY_AFTER } else { budget };
            tokio::select! {
                () = self.seat.attention() => {}
                () = sleep(pause) => {}
                () = sleep_until(notice_at) => self.notice(&mut notice_at).await?,
                () = sleep_until(begun + budget) => {
                    if let Some(words) = refused {
                        return Err(End::Pass(relayed_error(&words)));
                    }
                    let open = self.branch.gate() == Gate::Open;
                    let usual = self.branch.usual_wake();
                    return Err(End::Say(if open {
                        Said::still_waking(budget, usual)
                    } else {
                        Said::still_fenced(budget)
                    }));
                }
            }
        }
    }

    /// One try. A fence that comes up meanwhile calls it off.
    async fn try_check_out(
        &mut self,
        begun: Instant,
        notice_at: &mut Instant,
        refused: &mut Option<Vec<u8>>,
        wait: &mut Option<Wait>,
    ) -> Result<Option<Box<Pooled>>, End> {
        loop {
            let grant = match self.pool.ask(self.conn(), &self.pool_key) {
                Ok(grant) => grant,
                Err(waiting) => match self.queue(waiting, begun).await? {
                    Some(grant) => grant,
                    None => return Ok(None),
                },
            };
            let mut backend = match grant {
                // The next one may be alive.
                Grant::Backend(backend) if !backend.is_alive() => continue,
                Grant::Backend(backend) => backend,
                Grant::Slot(slot) => {
                    let wait = wait.get_or_insert_with(Wait::begin).clone();
                    match self.start(slot, begun, notice_at, refused, wait).await? {
                        Some(backend) => backend,
                        None => return Ok(None),
                    }
                }
            };
            if self.dress_up(&mut backend).await? {
                self.seat.set_backend(backend.generation, Some(backend.cancel_target()));
                return Ok(Some(backend));
            }
        }
    }

    /// Stands in the queue. Nothing if a fence came up.
    async fn queue(&mut self, mut waiting: super::Waiting, begun: Instant) -> Result<Option<Grant>, End> {
        self.seat.set_doing(Doing::Waiting);
        let _gauge = crate::session::GaugeGuard::new("ebb_proxy_pool_waiting");
        let seat = self.seat.clone();
        let since = Instant::now();
        let deadline = begun + self.shared.config.pool_wait;
        let result = loop {
            tokio::select! {
                grant = waiting.granted() => break Ok(Some(grant)),
                () = seat.attention() => {
                    if let Err(end) = self.obey() {
                        break Err(end);
                    }
                    if self.called_off() {
                        break Ok(None);
                    }
                }
                () = sleep_until(deadline) => {
                    metrics::counter!("ebb_proxy_pool_timeouts_total").increment(1);
                    break Err(End::Say(Said::pool_exhausted(self.pool.size(), self.shared.config.pool_wait)));
                }
            }
        };
        metrics::histogram!("ebb_proxy_pool_wait_seconds").record(since.elapsed().as_secs_f64());
        if !matches!(result, Ok(Some(_)))
            && let Some(Grant::Backend(backend)) = waiting.withdraw()
        {
            self.let_go(backend).await;
        }
        result
    }

    /// Whether the gate has moved so that the wait for a backend is to be given up.
    fn called_off(&self) -> bool {
        match self.branch.gate() {
            Gate::Open => false,
            // The client waits for the very compute that is to be suspended.
            gate if gate.is_refusable() => {
                self.branch.stand(self.conn(), Standing::Busy);
                false
            }
            Gate::Gathering(_) | Gate::Detaching | Gate::Closed => true,
        }
    }

    /// Starts a backend, waking the compute if need be.
    async fn start(
        &mut self,
        slot: Slot,
        begun: Instant,
        notice_at: &mut Instant,
        refused: &mut Option<Vec<u8>>,
        wait: Wait,
    ) -> Result<Option<Box<Pooled>>, End> {
        self.seat.set_doing(Doing::Waiting);
        let budget = self.shared.config.wake_budget;
        let seat = self.seat.clone();
        let starting = start(self.shared.clone(), self.branch.clone(), self.startup.clone(), seat.clone(), wait);
        let mut starting = Box::pin(starting);
        let result = loop {
            tokio::select! {
                result = &mut starting => break result,
                () = seat.attention() => {
                    self.obey()?;
                    if self.called_off() {
                        return Ok(None);
                    }
                }
                () = sleep_until(*notice_at) => self.notice(notice_at).await?,
                () = sleep_until(begun + budget) => {
                    return Err(End::Say(Said::still_waking(budget, self.branch.usual_wake())));
                }
            }
        };
        drop(starting);
        let generation = match result {
            Ok((awake, backend)) => {
                let application = self.application.clone();
                let backend = Pooled::new(awake, backend, self.pool_key.clone(), application, slot, self.conn());
                return Ok(self.measure(Box::new(backend)).await);
            }
            Err(StartFailed::Endpoint(error)) => return Err(End::Say(error.into())),
            Err(StartFailed::NotAdmitted) => return Err(End::Say(Said::not_admitted(&seat.sitter.role))),
            Err(StartFailed::Start { generation, error }) => match error {
                StartError::Unreachable(error) => {
                    tracing::debug!(%error, generation, "compute does not answer");
                    generation
                }
                StartError::NotNow => generation,
                // Others have taken its connections; some may be free again soon.
                StartError::Refused(body) if error_field(&body, b'C') == Some(b"53300") => {
                    *refused = Some(body);
                    return Ok(None);
                }
                StartError::Refused(body) => return Err(End::Pass(relayed_error(&body))),
                StartError::Strange(what) => {
                    tracing::error!(what, "compute answered with something unexpected");
                    return Err(End::Say(Said::strange_backend(what)));
                }
            },
        };
        self.branch.forget(generation);
        self.pool.lost(generation);
        Ok(None)
    }

    /// Learns from the first backend how many there may be.
    async fn measure(&self, mut backend: Box<Pooled>) -> Option<Box<Pooled>> {
        if self.pool.wants_size() {
            let mut connections_max = None;
            let asked = timeout(
                RESET_TIMEOUT,
                ask(&mut backend, "SHOW max_connections", |row| {
                    connections_max = std::str::from_utf8(row).ok().and_then(|text| text.parse().ok());
                }),
            );
            asked.await.ok()??;
            self.pool.learn(connections_max?);
        }
        Some(backend)
    }

    /// Tells the client, once, that it is waiting.
    async fn notice(&mut self, at: &mut Instant) -> Result<(), End> {
        *at = Instant::now() + self.shared.config.wake_budget * 2;
        if !self.notices {
            return Ok(());
        }
        self.send(&encoded(&Said::waiting(self.branch.gate() != Gate::Open))).await
    }

    /// Brings a backend to where the client left its last one; answers whether it is of use.
    async fn dress_up(&mut self, backend: &mut Pooled) -> Result<bool, End> {
        let own = backend.last == self.conn();
        if own && backend.dress == self.kept && backend.named == self.application {
            backend.exchange.begin(true, 0);
            return Ok(true);
        }
        if backend.dress.is_none() && self.kept.is_none() {
            let mut sql = String::new();
            if !own && backend.last != 0 {
                sql.push_str(RESET);
                backend.named.clone_from(&backend.application);
            }
            if backend.named != self.application {
                self.rename(&mut sql);
            }
            if !sql.is_empty() {
                query(&mut backend.out, &sql);
            }
            backend.exchange.begin(own, usize::from(!sql.is_empty()));
        } else {
            if !(own && backend.dress.is_none()) && reset(backend).await.is_none() {
                return Ok(false);
            }
            if backend.named != self.application {
                let mut sql = String::new();
                self.rename(&mut sql);
                let asked = timeout(RESET_TIMEOUT, ask(backend, &sql, |_| {}));
                if asked.await.ok().flatten().is_none() {
                    return Ok(false);
                }
            }
            if let Some(kept) = self.kept.clone() {
                match hibernate::replay(&mut backend.stream, &kept).await {
                    Ok(replayed) => {
                        for (name, value) in replayed.parameters {
                            note(&mut backend.parameters, &name, &value);
                        }
                        let mut out = Vec::new();
                        for (name, why) in replayed.lost_statements {
                            Said::statement_not_replayed(&name, &why).encode(&mut out);
                        }
                        if !out.is_empty() {
                            self.send(&out).await?;
                        }
                    }
                    Err(ReplayError::Lost) => return Ok(false),
                    Err(ReplayError::Refused(why)) => return Err(End::Say(Said::not_replayed(&why))),
                }
                backend.dress = Some(kept);
            }
            backend.exchange.begin(false, 0);
        }
        backend.last = self.conn();
        backend.named.clone_from(&self.application);
        self.tell_parameters(backend).await?;
        Ok(true)
    }

    /// Tells the client what is otherwise than it believes.
    async fn tell_parameters(&mut self, backend: &Pooled) -> Result<(), End> {
        let mut out = Vec::new();
        // Before the greeting the client believes nothing yet.
        let told = !self.conversation.parameters().is_empty();
        for (name, value) in backend.parameters.iter().filter(|(name, _)| told && **name != *b"application_name") {
            if self.conversation.note_parameter(name, value) {
                parameter_status(&mut out, name, value);
            }
        }
        if out.is_empty() { Ok(()) } else { self.send(&out).await }
    }

    fn rename(&self, sql: &mut String) {
        // Doubled quotes are right in either kind of string; backslashes are not.
        let name = String::from_utf8_lossy(&self.application).replace('\\', "?").replace('\'', "''");
        if !sql.is_empty() {
            sql.push_str("; ");
        }
        sql.push_str(&format!("SET application_name = '{name}'"));
    }

    // With a backend.

    /// Relays until the backend can be given back.
    async fn with_backend(&mut self, backend: &mut Pooled) -> Result<(), End> {
        loop {
            match self.link(backend).run().await {
                Pause::AtRest => match self.settle(backend).await? {
                    After::GiveBack => return Ok(()),
                    After::Keep if self.conversation.is_terminated() => return Err(End::Silent),
                    After::Keep => {}
                },
                Pause::Ordered(Order::Lost) => {
                    // The compute is dead, but what its backends said last may lie in the socket.
                    let rest = timeout(LAST_WORDS_TIMEOUT, self.link(backend).last_words()).await;
                    let rest = rest.ok().filter(|rest| !matches!(rest, Pause::AtRest));
                    return Err(self.ended(backend, rest.unwrap_or(Pause::ServerGone)));
                }
                pause => return Err(self.ended(backend, pause)),
            }
        }
    }

    fn link<'a>(&'a mut self, backend: &'a mut Pooled) -> Link<'a> {
        Link {
            dress: self.dress(),
            client: &mut self.client,
            backend,
            names: &mut self.names,
            conversation: &mut self.conversation,
            seat: &self.seat,
            branch: &self.branch,
            pool: &self.pool,
            passed: &mut self.passed,
            haste: &mut self.haste,
            pinned: self.pin.is_some(),
        }
    }

    /// What a pause that cannot be resumed means to the client.
    fn ended(&self, backend: &mut Pooled, pause: Pause) -> End {
        let busy = !self.conversation.is_idle() || !backend.up.is_empty();
        match pause {
            Pause::AtRest => End::Say(Said::draining(false)),
            Pause::Ordered(Order::Drain | Order::DrainNow) => End::Say(Said::draining(busy)),
            Pause::Ordered(Order::Fenced) => End::Say(Said::fenced_out("a query or transaction was under way")),
            Pause::Ordered(Order::Evicted) => End::Say(self.evicted()),
            Pause::ClientGone => End::Silent,
            Pause::Refused(Refused::Malformed(what)) => End::Say(Said::malformed(&what.to_string())),
            Pause::Refused(Refused::Statement(what)) => End::Say(Said::not_pooled(what)),
            Pause::NotReset => {
                tracing::error!("backend of a pool could not be reset");
                End::Say(Said::not_replayed("the connection of the pool could not be reset"))
            }
            Pause::ServerMalformed => {
                tracing::error!("backend sent a malformed message");
                End::Silent
            }
            Pause::Unowned => {
                self.branch.forget(backend.generation);
                match self.conversation.server_at_boundary() && !backend.down.has_ready() {
                    true => End::Say(Said::compute_lost(busy)),
                    // The rest of what was begun may not be told.
                    false => End::Silent,
                }
            }
            Pause::Ordered(Order::Lost) | Pause::ServerGone => {
                if self.conversation.is_terminated() || self.conversation.ends_with_error() {
                    return End::Silent;
                }
                self.branch.forget(backend.generation);
                End::Say(Said::compute_lost(busy))
            }
        }
    }

    /// After a transaction: takes note of what the client has left behind.
    async fn settle(&mut self, backend: &mut Pooled) -> Result<After, End> {
        let had = self.pin.is_some() || self.kept.is_some();
        if !backend.exchange.is_touched(had) {
            if self.pin.is_none() {
                return Ok(After::GiveBack);
            }
            self.obey()?;
            if self.branch.gate() == Gate::Open {
                return Ok(After::Keep);
            }
        }
        let examined = self.examine(backend).await?;
        if backend.exchange.parameters_changed {
            backend.parameters = self.conversation.parameters().to_vec();
        }
        backend.exchange.settle();
        match examined {
            Examined::Kept(mut kept) => {
                kept.forget_unnamed();
                // Of it, the client has been told the truth; it is given back by itself.
                kept.forget_setting(b"application_name");
                let told = self.conversation.parameters().iter().find(|(name, _)| **name == *b"application_name");
                if let Some((_, application)) = told {
                    self.application.clone_from(application);
                    backend.named.clone_from(application);
                }
                let kept = (!kept.is_plain(&self.seat.sitter.role)).then(|| Arc::from(kept));
                if self.kept != kept {
                    self.kept = kept;
                }
                backend.dress.clone_from(&self.kept);
                self.pin = None;
                self.seat.set_pin(None);
                Ok(After::GiveBack)
            }
            Examined::Pinned(reason) => {
                if self.pin.is_none() {
                    self.pin = Some(self.pool.pin().ok_or_else(|| End::Say(Said::too_many_pins(&reason)))?);
                }
                self.seat.set_pin(Some(reason.clone()));
                self.stand_pinned(backend, reason).await
            }
        }
    }

    /// With a backend that cannot be left: goes on, or stands at the gate.
    async fn stand_pinned(&mut self, backend: &mut Pooled, reason: String) -> Result<After, End> {
        let mut stands = false;
        loop {
            self.obey()?;
            let gate = self.branch.gate();
            match gate {
                Gate::Open if self.branch.begin_work(self.conn()) => return Ok(After::Keep),
                Gate::Detaching | Gate::Closed => return Err(End::Say(Said::fenced_out(&reason))),
                _ => {}
            }
            if !stands {
                self.branch.stand(self.conn(), Standing::Pinned(reason.clone()));
                stands = true;
                continue;
            }
            let refusable = gate.is_refusable() && backend.up.is_empty();
            let mut first = [0; FIRST_READ];
            tokio::select! {
                () = self.seat.attention() => {}
                read = self.client.read(&mut first), if refusable => {
                    let count = read.map_err(|_| End::Silent)?;
                    if count == 0 {
                        return Err(End::Silent);
                    }
                    backend.up.put(&first[..count]);
                    // A client that has work is a reason not to suspend.
                    self.branch.stand(self.conn(), Standing::Busy);
                    return Ok(After::Keep);
                }
            }
        }
    }

    /// Reads the session's state. It cannot be broken off, but an order to end is heard.
    async fn examine(&mut self, backend: &mut Pooled) -> Result<Examined, End> {
        let mut aside = Vec::new();
        let seat = self.seat.clone();
        let examined = {
            let mut examining = Box::pin(hibernate::examine(&mut backend.stream, &mut self.conversation, &mut aside));
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

    // Giving it back.

    async fn give_back(&mut self, mut backend: Box<Pooled>) {
        // From here on no request to cancel finds it.
        self.seat.set_backend(0, None);
        backend.up.take_unread(&mut self.pending);
        backend.up.shrink();
        if self.passed[0] + self.passed[1] >= COUNT_AFTER {
            count_passed(&mut self.passed);
        }
        if backend.out.capacity() > super::chunk::SIZE {
            backend.out = Vec::new();
        }
        if backend.may_be_cancelled() || backend.exchange.spoilt {
            // A cancel on its way would hit the next client's query.
            backend.close().await;
        } else {
            self.let_go(backend).await;
        }
        self.branch.stand(self.conn(), Standing::Apart);
    }

    async fn let_go(&self, backend: Box<Pooled>) {
        if self.branch.gate() == Gate::Open {
            self.pool.give_back(backend);
        } else {
            backend.close().await;
        }
    }

    /// Makes ready for last words: brings the client to the end of the message begun, and lets the backend go.
    async fn close_backend(&mut self, mut backend: Pooled, end: &End) {
        if !matches!(end, End::Silent) {
            let rest = backend.down.ready().to_vec();
            // If it does not come, the client is cut off in the middle of it.
            let _ = timeout(LAST_WORDS_TIMEOUT, self.finish_message(&mut backend, &rest)).await;
        }
        if !self.conversation.is_idle() {
            // Nobody waits for the result any more. If it cannot be cancelled, it is gone already.
            let _ = timeout(LAST_WORDS_TIMEOUT, backend.cancel_target().cancel()).await;
        }
        self.seat.set_backend(0, None);
    }

    async fn finish_message(&mut self, backend: &mut Pooled, begun: &[u8]) -> std::io::Result<()> {
        self.client.write_all(begun).await?;
        let mut left = REST_OF_MESSAGE_MAX;
        let mut chunk = vec![0; 4096];
        while !self.conversation.server_at_boundary() && left > 0 {
            let wanted = self.conversation.server_missing().min(chunk.len()).min(left);
            let count = backend.stream.read(&mut chunk[..wanted]).await?;
            if count == 0 || self.conversation.server_sent(&chunk[..count]).is_err() {
                break;
            }
            self.client.write_all(&chunk[..count]).await?;
            left -= count;
        }
        Ok(())
    }
}

/// Wake, connect, start.
async fn start(
    shared: Arc<Shared>,
    branch: Arc<Branch>,
    startup: Box<[u8]>,
    seat: Arc<Seat>,
    wait: Wait,
) -> Result<(Awake, Backend), StartFailed> {
    wait.enter(Stage::Wake);
    let awake = branch.wake(&shared.tasks).await.map_err(StartFailed::Endpoint)?;
    if awake.admits.as_ref().is_some_and(|roles| !roles.contains(&seat.sitter.role)) {
        return Err(StartFailed::NotAdmitted);
    }
    let generation = awake.generation;
    wait.enter(Stage::Start);
    match Backend::start(&awake.socket, &startup).await {
        Ok(backend) => Ok((awake, backend)),
        Err(error) => Err(StartFailed::Start { generation, error }),
    }
}

/// Undoes what clients have left in a backend. Nothing if it does not come to itself.
async fn reset(backend: &mut Pooled) -> Option<()> {
    let sql = if backend.dress.as_ref().is_some_and(|kept| kept.has_statements()) {
        backend.held.clear();
        RESET_ALL
    } else {
        RESET
    };
    timeout(RESET_TIMEOUT, ask(backend, sql, |_| {})).await.ok()??;
    backend.dress = None;
    backend.named.clone_from(&backend.application);
    Some(())
}

/// Asks a backend that is at rest, and waits for the answer: first columns of rows. Nothing if it fails or is gone.
async fn ask(backend: &mut Pooled, sql: &str, mut row: impl FnMut(&[u8])) -> Option<()> {
    let mut out = Vec::new();
    query(&mut out, sql);
    backend.stream.write_all(&out).await.ok()?;
    let mut body = Vec::new();
    let mut failed = false;
    loop {
        let tag = read_message(&mut backend.stream, &mut body, ANSWER_MAX).await.ok()?;
        let mut fields = Fields(&body);
        match tag {
            b'Z' => return (!failed).then_some(()),
            b'E' => failed = true,
            b'S' => {
                if let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) {
                    note(&mut backend.parameters, name, value);
                }
            }
            b'D' => {
                if let (Some(1..), Some(Some(column))) = (fields.i16(), fields.column()) {
                    row(column);
                }
            }
            _ => {}
        }
    }
}

fn query(out: &mut Vec<u8>, sql: &str) {
    message(out, b'Q', |body| cstr(body, sql));
}

fn note(parameters: &mut Vec<crate::conversation::Parameter>, name: &[u8], value: &[u8]) {
    match parameters.iter_mut().find(|(known, _)| **known == *name) {
        Some((_, known)) => *known = value.into(),
        None => parameters.push((name.into(), value.into())),
    }
}

fn parameter_status(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    message(out, b'S', |body| {
        cstr(body, name);
        cstr(body, value);
    });
}
