//! The hot path: moves bytes between a client and its backend until something else is to be done.
//!
//! One task, both directions, a block each, borrowed from the thread while bytes are in it: an idle session has none.
//! Bytes are looked at once, by header, to follow the conversation; they are never copied or allocated for. A side that
//! does not take bytes stops the other from being read: backpressure needs no more than that.
//!
//! While the gate is up, the client's bytes are passed on one turn (up to a sync point) at a time, so that even a
//! client that pipelines without pause comes to rest; what it sent beyond waits here.
//!
//! **Cancellation**: [`Link::run`] may be dropped and called again; no byte is lost.

use std::io;
use std::task::{Context, Poll};

use crate::backend::is_postmaster_death;
use crate::branch::{Branch, Doing, Gate, Order, Seat, Standing};
use crate::conversation::{Conversation, Malformed};
use crate::errors::Said;
use crate::haste::{Haste, Turn};
use crate::pings::is_ping;
use crate::replication::Walstream;
use crate::session::Client;
use crate::stream::{Buffer, ClientStream};
use crate::unix::UnixStream;

/// LIMIT: bytes passed on are counted when there are so many of them, or when the session pauses: a counter that all
/// sessions share has no place on the way of each message.
pub const COUNT_AFTER: u64 = 1 << 20;

/// Counts bytes passed on, up and down, and begins anew.
pub fn count_passed(passed: &mut [u64; 2]) {
    let [up, down] = std::mem::take(passed);
    // Labels that are known beforehand cost no allocation.
    metrics::counter!("ebb_proxy_relayed_bytes_total", "direction" => "up").increment(up);
    metrics::counter!("ebb_proxy_relayed_bytes_total", "direction" => "down").increment(down);
}

/// Why the relay stopped.
#[derive(Debug)]
pub enum Pause {
    /// The gate is up and the session is at rest before it.
    AtGate,
    /// The session is at rest, and in session mode the proxy drains.
    AtRest,
    /// The client closed or broke off.
    ClientGone,
    /// The backend closed; all it said has been passed on.
    ServerGone,
    /// The client is not to be served any more, and told why: it sent what it may not, say.
    Refused(Box<Said>),
    /// The server sent something that is not the protocol.
    ServerMalformed,
    /// An order to end at once.
    Ordered(Order),
    /// What the backend said may not be told: another node may have the branch.
    Unowned,
}

impl Pause {
    /// The client sent something that is not the protocol.
    #[cold]
    pub fn malformed(what: Malformed) -> Self {
        Self::Refused(Box::new(Said::malformed(&what.to_string())))
    }
}

/// Both ends of a session and what lies between.
pub struct Link<'a> {
    /// The client.
    pub client: &'a mut ClientStream,
    /// Its backend.
    pub backend: &'a mut UnixStream,
    /// From client to backend.
    pub up: &'a mut Buffer,
    /// From backend to client.
    pub down: &'a mut Buffer,
    /// What both are talking about.
    pub conversation: &'a mut Conversation,
    /// What others see of the session.
    pub seat: &'a Seat,
    /// Where its gate is.
    pub branch: &'a Branch,
    /// Bytes passed on, up and down.
    pub passed: &'a mut [u64; 2],
    /// Whether `SELECT 1` is a ping.
    pub select_one: bool,
    /// The stream of WAL, on a replication connection.
    pub walstream: Option<&'a mut Walstream>,
    flow: Flow,
}

/// What the relay remembers between two polls.
#[derive(Debug, Default)]
struct Flow {
    /// The gate is up, or the proxy drains: one turn at a time.
    gated: bool,
    /// The proxy drains.
    draining: bool,
    active: bool,
    /// All that is under way is a ping, which is no work.
    pinged: bool,
    backend_eof: bool,
    /// The client's stream holds bytes back (TLS).
    unflushed: bool,
    haste: Haste,
}

impl<'a> Link<'a> {
    /// Ties both ends together.
    pub fn new(client: &'a mut Client, backend: &'a mut UnixStream, up: &'a mut Buffer, down: &'a mut Buffer) -> Self {
        let Client { stream: client, conversation, seat, branch, passed, .. } = client;
        let flow = Flow { active: !conversation.is_idle() || up.has_held(), ..Flow::default() };
        Self { client, backend, up, down, conversation, seat, branch, passed, select_one: false, walstream: None, flow }
    }

    /// Moves bytes until there is a reason not to. Cancel-safe.
    pub async fn run(&mut self) -> Pause {
        self.flow.active &= !self.follows();
        self.seat.set_doing(if self.flow.active { Doing::Active } else { Doing::Idle });
        // The gate may have moved, or an order been given, before anyone listened here.
        if let Some(pause) = self.look_up() {
            return pause;
        }
        std::future::poll_fn(|cx| {
            if self.seat.poll_attention(cx) {
                if let Some(pause) = self.look_up() {
                    return Poll::Ready(pause);
                }
                // Having been told now, the task is not registered for the next time.
                cx.waker().wake_by_ref();
            }
            let pumped = self.pump(cx);
            if pumped.is_pending() && self.flow.haste.lasts() {
                // Asks to be polled again once the sockets have been looked at, without waiting for them.
                let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
            }
            pumped
        })
        .await
    }

    /// Passes on what is still on its way, whatever is ordered, until one side closes. Cancel-safe.
    pub async fn last_words(&mut self) -> Pause {
        std::future::poll_fn(|cx| self.pump(cx)).await
    }

    /// Takes note of what changed outside.
    fn look_up(&mut self) -> Option<Pause> {
        match self.seat.ordered() {
            Some(Order::Drain) => self.flow.draining = true,
            Some(order) => return Some(Pause::Ordered(order)),
            None => {}
        }
        let gate = self.branch.gate();
        if gate.is_refusable() && (!self.may_stop() || self.up.has_held()) {
            // Nobody is held up for a suspend that will not happen.
            self.branch.stand(self.seat.sitter.conn, Standing::Busy);
            if let Some(walstream) = self.walstream.as_ref().filter(|walstream| walstream.is_streaming()) {
                self.seat.set_pin(walstream.quiet().err().map(str::to_owned));
            }
            self.flow.gated = self.flow.draining;
        } else {
            self.flow.gated = gate != Gate::Open || self.flow.draining;
        }
        None
    }

    fn may_stop(&self) -> bool {
        let at_rest = match &self.walstream {
            Some(walstream) if walstream.is_streaming() => walstream.quiet().is_ok() && !self.up.has_held(),
            _ => self.conversation.is_at_rest(),
        };
        at_rest && !self.up.has_released() && self.down.is_empty() && !self.flow.unflushed
    }

    /// Whether the client only follows the work of others.
    fn follows(&self) -> bool {
        self.walstream.as_ref().is_some_and(|walstream| walstream.is_streaming())
    }

    /// Moves what can be moved now; ready with the reason to stop.
    fn pump(&mut self, cx: &mut Context<'_>) -> Poll<Pause> {
        loop {
            if self.flow.gated && self.may_stop() {
                return Poll::Ready(if self.flow.draining { Pause::AtRest } else { Pause::AtGate });
            }
            let before = self.passed[0] + self.passed[1];
            let mut moved = match self.pump_up(cx) {
                Ok(moved) => moved,
                Err(pause) => return Poll::Ready(pause),
            };
            moved |= match self.pump_down(cx) {
                Ok(moved) => moved,
                Err(pause) => return Poll::Ready(pause),
            };
            let active = !self.conversation.is_idle() && !self.flow.pinged && !self.follows();
            if active != self.flow.active {
                self.flow.active = active;
                self.seat.set_doing(if active { Doing::Active } else { Doing::Idle });
            }
            let passed = self.passed[0] + self.passed[1];
            if passed >= COUNT_AFTER {
                count_passed(self.passed);
            }
            if !moved {
                self.up.free();
                self.down.free();
                return Poll::Pending;
            }
            self.flow.haste.moved(passed - before, if active { Turn::Backend } else { Turn::Client });
        }
    }

    #[inline]
    fn pump_up(&mut self, cx: &mut Context<'_>) -> Result<bool, Pause> {
        let mut moved = false;
        if self.up.has_room() && !self.up.has_held() {
            match self.up.poll_fill(cx, self.client) {
                Poll::Ready(Ok(1..)) => moved = true,
                Poll::Ready(Ok(0) | Err(_)) => return Err(Pause::ClientGone),
                Poll::Pending => {}
            }
        }
        if self.up.has_held() && (!self.flow.gated || self.conversation.wants_client()) {
            // A ping keeps no compute awake.
            let turn_begins = self.conversation.is_idle() && self.conversation.client_at_boundary();
            self.flow.pinged =
                turn_begins && is_ping(self.up.held(), self.select_one, |name| self.conversation.ping_statement(name));
            let count = self.conversation.client_sent(self.up.held(), self.flow.gated).map_err(Pause::malformed)?;
            if let Some(walstream) = &mut self.walstream {
                walstream.client_sent(&self.up.held()[..count]);
            }
            if count > 0 && !self.flow.active && !self.flow.pinged && !self.follows() {
                // Noted here, because all of it may be answered before this poll is over.
                self.flow.active = true;
                self.seat.set_pin(None);
                self.seat.set_doing(Doing::Active);
            }
            self.up.release(count);
            self.passed[0] += count as u64;
            moved |= count > 0;
        }
        if self.up.has_released() {
            match self.up.poll_drain(cx, self.backend) {
                Poll::Ready(Ok(())) => moved = true,
                // It closed; why, it may have said: that is read below, up to the end.
                Poll::Ready(Err(_)) => self.up.discard_released(),
                Poll::Pending => {}
            }
        }
        Ok(moved)
    }

    #[inline]
    fn pump_down(&mut self, cx: &mut Context<'_>) -> Result<bool, Pause> {
        let mut moved = false;
        if self.down.has_room() && !self.flow.backend_eof {
            match self.down.poll_fill(cx, self.backend) {
                Poll::Ready(Ok(1..)) if !self.branch.may_answer() => return Err(Pause::Unowned),
                Poll::Ready(Ok(count @ 1..)) => {
                    if self.down.held()[0] == b'E' && self.says_that_all_ends() {
                        self.down.discard_held();
                        return Err(Pause::ServerGone);
                    }
                    self.conversation.server_sent(self.down.held()).map_err(|_| Pause::ServerMalformed)?;
                    if let Some(walstream) = &mut self.walstream {
                        walstream.server_sent(self.down.held());
                    }
                    self.down.release(count);
                    self.passed[1] += count as u64;
                    moved = true;
                }
                Poll::Ready(Ok(0) | Err(_)) => self.flow.backend_eof = true,
                Poll::Pending => {}
            }
        }
        if self.down.has_released() {
            match self.down.poll_drain(cx, self.client) {
                Poll::Ready(Ok(())) => {
                    moved = true;
                    self.flow.unflushed = true;
                }
                Poll::Ready(Err(_)) => return Err(Pause::ClientGone),
                Poll::Pending => {}
            }
        }
        if self.flow.unflushed && self.down.is_empty() {
            match self.poll_flush(cx) {
                Poll::Ready(Ok(())) => self.flow.unflushed = false,
                Poll::Ready(Err(_)) => return Err(Pause::ClientGone),
                Poll::Pending => {}
            }
        }
        if self.flow.backend_eof && self.down.is_empty() {
            return Err(Pause::ServerGone);
        }
        Ok(moved)
    }

    /// Whether what a backend says unasked is that its postmaster was killed. What that means to the client is for the session
    /// to say.
    #[cold]
    fn says_that_all_ends(&self) -> bool {
        let words = self.down.held();
        self.conversation.awaits_nothing() && words.get(5..).is_some_and(is_postmaster_death)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        tokio::io::AsyncWrite::poll_flush(std::pin::Pin::new(self.client), cx)
    }
}
