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

use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::link::Link;
use super::names::Names;
use super::reset::reset;
use super::{Key, Pin, Pool, Pooled};
use crate::backend::encoded;
use crate::branch::{Branch, Doing, Gate, Membership, Order, Seat, Standing};
use crate::calloff::CalledOff;
use crate::errors::Said;
use crate::haste::Haste;
use crate::hibernate::{Examined, Kept};
use crate::login::Login;
use crate::proxy::Shared;
use crate::relay::{COUNT_AFTER, Pause, count_passed};
use crate::session::{Client, End, LAST_WORDS_TIMEOUT, parameter_status};

mod checkout;

/// LIMIT: so much of what an idle client sends is read before it gets a backend; most batches are shorter.
const FIRST_READ: usize = 512;

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
        pool_key: pool.key(startup.without_application_name()),
        pool,
        application: application.into(),
        names: Names::default(),
        pending: Vec::new(),
        kept: None,
        pin: None,
        served: false,
        haste: Haste::default(),
        client: Client::new(shared.clone(), branch, client, &startup, seat, notices, membership),
    };
    session.run().await;
}

struct Session {
    pool: Arc<Pool>,
    pool_key: Arc<Key>,
    /// The client's `application_name` of the moment.
    application: Box<[u8]>,
    names: Names,
    /// What the client has sent beyond its last transaction.
    pending: Vec<u8>,
    /// What it has set, if anything.
    kept: Option<Arc<Kept>>,
    /// While the backend is its own.
    pin: Option<Pin>,
    /// It has come to the end of a transaction.
    served: bool,
    haste: Haste,
    client: Client,
}

/// What becomes of a backend after a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    GiveBack,
    Keep,
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
            if self.client.conversation.is_terminated() {
                return Err(End::Silent);
            }
            self.idle().await?;
            self.client.seat.begin_wait();
            let mut backend = match self.check_out().await? {
                // From here on requests to cancel go to the backend.
                Some(backend) if !self.client.seat.end_wait() => backend,
                unused => {
                    self.call_off(unused).await?;
                    continue;
                }
            };
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
        let words = self.client.last_words(end).filter(|words| !words.is_empty());
        let Self { client: Client { stream, branch, seat, membership: _membership, .. }, pool, .. } = self;
        match words {
            Some(words) => stream.goodbye(&words).await,
            None => drop(stream),
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
                let backend = self.check_out().await?;
                let mut backend = backend.expect("whoever has no key yet cannot cancel");
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
            self.client.conversation.note_parameter(name, value);
            parameter_status(&mut out, name, value);
        }
        self.client.introduce(&mut out);
        self.client.send(&out).await
    }

    /// Waits, without a backend, until the client sends something.
    async fn idle(&mut self) -> Result<(), End> {
        match self.pending.first() {
            Some(b'X') => return Err(End::Silent),
            Some(_) => return Ok(()),
            None => {}
        }
        self.client.seat.set_doing(if self.served { Doing::Hibernated } else { Doing::Idle });
        let mut first = [0; FIRST_READ];
        loop {
            self.client.obey()?;
            tokio::select! {
                () = self.client.seat.attention() => {}
                read = self.client.stream.read(&mut first) => match read {
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

    /// Answers what the client wanted a backend for, as it was cancelled before it was sent to one; gives back one that it
    /// has got meanwhile.
    async fn call_off(&mut self, unused: Option<Box<Pooled>>) -> Result<(), End> {
        self.client.seat.end_wait();
        if let Some(mut backend) = unused {
            backend.leave_unused();
            self.give_back(backend).await;
        }
        let mut turn = CalledOff::default();
        loop {
            let (taken, over) = self.client.throw_away(&mut turn, &self.pending).await?;
            self.pending.drain(..taken);
            if over {
                return Ok(());
            }
            let mut more = [0; FIRST_READ];
            tokio::select! {
                () = self.client.seat.attention() => {}
                read = self.client.stream.read(&mut more) => match read {
                    Ok(count @ 1..) => self.pending.extend_from_slice(&more[..count]),
                    Ok(0) | Err(_) => return Err(End::Silent),
                },
            }
        }
    }

    // With a backend.

    /// Relays until the backend can be given back.
    async fn with_backend(&mut self, backend: &mut Pooled) -> Result<(), End> {
        loop {
            match self.link(backend).run().await {
                Pause::AtRest => match self.settle(backend).await? {
                    After::GiveBack => return Ok(()),
                    After::Keep if self.client.conversation.is_terminated() => return Err(End::Silent),
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
        let dress = self.dress();
        let Client { stream, conversation, seat, branch, passed, .. } = &mut self.client;
        Link {
            client: stream,
            backend,
            names: &mut self.names,
            dress,
            conversation,
            seat,
            branch,
            pool: &self.pool,
            passed,
            haste: &mut self.haste,
            pinned: self.pin.is_some(),
        }
    }

    /// What a pause that cannot be resumed means to the client.
    fn ended(&self, backend: &Pooled, pause: Pause) -> End {
        let busy = !self.client.conversation.is_idle() || !backend.up.is_empty();
        self.client.ended(pause, backend.generation, busy, backend.down.has_ready())
    }

    /// After a transaction: takes note of what the client has left behind.
    async fn settle(&mut self, backend: &mut Pooled) -> Result<After, End> {
        let had = self.pin.is_some() || self.kept.is_some();
        if !backend.exchange.is_touched(had) {
            if self.pin.is_none() {
                return Ok(After::GiveBack);
            }
            self.client.obey()?;
            if self.client.branch.gate() == Gate::Open {
                return Ok(After::Keep);
            }
        }
        let examined = self.client.examine(&mut backend.stream).await?;
        if backend.exchange.parameters_changed {
            backend.parameters = self.client.conversation.parameters().to_vec();
        }
        backend.exchange.settle();
        match examined {
            Examined::Kept(mut kept) => {
                kept.forget_unnamed();
                // Of it, the client has been told the truth; it is given back by itself.
                kept.forget_setting(b"application_name");
                let told =
                    self.client.conversation.parameters().iter().find(|(name, _)| **name == *b"application_name");
                if let Some((_, application)) = told {
                    self.application.clone_from(application);
                    backend.named.clone_from(application);
                }
                let kept = (!kept.is_plain(&self.client.seat.sitter.role)).then(|| Arc::from(kept));
                if self.kept != kept {
                    self.kept = kept;
                }
                backend.dress.clone_from(&self.kept);
                self.pin = None;
                self.client.seat.set_pin(None);
                Ok(After::GiveBack)
            }
            Examined::Pinned(reason) => {
                if self.pin.is_none() {
                    self.pin = Some(self.pool.pin().ok_or_else(|| End::Say(Said::too_many_pins(&reason)))?);
                }
                self.client.seat.set_pin(Some(reason.clone()));
                self.stand_pinned(backend, reason).await
            }
        }
    }

    /// With a backend that cannot be left: goes on, or stands at the gate.
    async fn stand_pinned(&mut self, backend: &mut Pooled, reason: String) -> Result<After, End> {
        let mut stands = false;
        loop {
            self.client.obey()?;
            let gate = self.client.branch.gate();
            match gate {
                Gate::Open if self.client.branch.begin_work(self.client.conn()) => return Ok(After::Keep),
                Gate::Detaching | Gate::Closed => return Err(End::Say(Said::fenced_out(&reason))),
                _ => {}
            }
            if !stands {
                self.client.branch.stand(self.client.conn(), Standing::Pinned(reason.clone()));
                stands = true;
                continue;
            }
            let refusable = gate.is_refusable() && backend.up.is_empty();
            let mut first = [0; FIRST_READ];
            tokio::select! {
                () = self.client.seat.attention() => {}
                read = self.client.stream.read(&mut first), if refusable => {
                    let count = read.map_err(|_| End::Silent)?;
                    if count == 0 {
                        return Err(End::Silent);
                    }
                    backend.up.put(&first[..count]);
                    // A client that has work is a reason not to suspend.
                    self.client.branch.stand(self.client.conn(), Standing::Busy);
                    return Ok(After::Keep);
                }
            }
        }
    }

    // Giving it back.

    async fn give_back(&mut self, mut backend: Box<Pooled>) {
        // From here on no request to cancel finds it.
        self.client.seat.set_backend(0, None);
        backend.up.take_unread(&mut self.pending);
        backend.up.shrink();
        if self.client.passed[0] + self.client.passed[1] >= COUNT_AFTER {
            count_passed(&mut self.client.passed);
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
        self.client.branch.stand(self.client.conn(), Standing::Apart);
    }

    async fn let_go(&self, backend: Box<Pooled>) {
        if self.client.branch.gate() == Gate::Open {
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
            let _ = timeout(LAST_WORDS_TIMEOUT, self.client.finish_message(&mut backend.stream, &rest)).await;
        }
        if !self.client.conversation.is_idle() {
            // Nobody waits for the result any more. If it cannot be cancelled, it is gone already.
            let _ = timeout(LAST_WORDS_TIMEOUT, backend.cancel_target().cancel()).await;
        }
        self.client.seat.set_backend(0, None);
    }
}
