//! Moves messages between a client and the backend it has for the moment, until the backend can be given back.
//!
//! As in [`crate::relay`], one task moves both directions and backpressure needs no more than a side that does not take
//! bytes. The buffers are the backend's: a client without one needs none.
//!
//! While others wait for a backend, or the gate is up, the client's messages are passed on one turn (up to a sync point)
//! at a time, so that even a client that pipelines without pause comes to rest.
//!
//! **Cancellation**: [`Link::run`] may be dropped and called again; no byte is lost.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

use super::exchange::{Client, Stopped};
use super::names::Names;
use super::{Pool, Pooled};
use crate::branch::{Branch, Doing, Gate, Order, Seat, Standing};
use crate::conversation::Conversation;
use crate::errors::Said;
use crate::haste::{Haste, Turn};
use crate::relay::Pause;
use crate::stream::ClientStream;

/// Both ends and what lies between.
pub struct Link<'a> {
    /// The client.
    pub client: &'a mut ClientStream,
    /// The backend of the moment, with its buffers.
    pub backend: &'a mut Pooled,
    /// What the client calls its statements.
    pub names: &'a mut Names,
    /// Tells the client's settings from others'.
    pub dress: u64,
    /// What both are talking about.
    pub conversation: &'a mut Conversation,
    /// What others see of the session.
    pub seat: &'a Seat,
    /// Where its gate is.
    pub branch: &'a Branch,
    /// Where others wait.
    pub pool: &'a Pool,
    /// Bytes passed on, up and down.
    pub passed: &'a mut [u64; 2],
    /// Whether to look at the sockets once more.
    pub haste: &'a mut Haste,
    /// The backend stays with the client: rest is no reason to stop, but at the gate.
    pub pinned: bool,
}

/// What is remembered between two polls.
#[derive(Debug, Default)]
struct Flow {
    /// The gate is up, or the proxy drains.
    gated: bool,
    draining: bool,
    active: bool,
    backend_eof: bool,
    /// The client's stream holds bytes back (TLS).
    unflushed: bool,
    /// Something was relayed since the link was made: before that, rest is where it begins and not where it ends.
    begun: bool,
}

impl Link<'_> {
    /// Moves messages until there is a reason not to. Cancel-safe.
    pub async fn run(&mut self) -> Pause {
        let mut flow = Flow { active: !self.pinned, ..Flow::default() };
        self.seat.set_doing(if flow.active { Doing::Active } else { Doing::Idle });
        if let Some(pause) = self.look_up(&mut flow) {
            return pause;
        }
        std::future::poll_fn(|cx| {
            if self.seat.poll_attention(cx) {
                if let Some(pause) = self.look_up(&mut flow) {
                    return Poll::Ready(pause);
                }
                // Having been told now, the task is not registered for the next time.
                cx.waker().wake_by_ref();
            }
            let pumped = self.pump(&mut flow, cx);
            if pumped.is_pending() && self.haste.lasts() {
                // Asks to be polled again once the sockets have been looked at, without waiting for them.
                let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
            }
            pumped
        })
        .await
    }

    /// Passes on what is still on its way, whatever is ordered, until one side closes. Cancel-safe.
    pub async fn last_words(&mut self) -> Pause {
        let mut flow = Flow { active: true, ..Flow::default() };
        self.pinned = true;
        std::future::poll_fn(|cx| self.pump(&mut flow, cx)).await
    }

    fn look_up(&mut self, flow: &mut Flow) -> Option<Pause> {
        match self.seat.ordered() {
            Some(Order::Drain) => flow.draining = true,
            Some(order) => return Some(Pause::Ordered(order)),
            None => {}
        }
        let gate = self.branch.gate();
        if gate.is_refusable() && !(self.pinned && self.may_stop(flow)) {
            // A client with work is a reason not to suspend.
            self.branch.stand(self.seat.sitter.conn, Standing::Busy);
        }
        flow.gated = gate != Gate::Open || flow.draining;
        None
    }

    fn may_stop(&self, flow: &Flow) -> bool {
        self.conversation.is_at_rest()
            && self.backend.exchange.is_clear()
            && self.backend.out.is_empty()
            && self.backend.down.is_empty()
            && !flow.unflushed
    }

    fn pump(&mut self, flow: &mut Flow, cx: &mut Context<'_>) -> Poll<Pause> {
        loop {
            let before = self.passed[0] + self.passed[1];
            let mut moved = match self.pump_up(flow, cx) {
                Ok(moved) => moved,
                Err(pause) => return Poll::Ready(pause),
            };
            moved |= match self.pump_down(flow, cx) {
                Ok(moved) => moved,
                Err(pause) => return Poll::Ready(pause),
            };
            let active = !self.conversation.is_idle();
            if self.conversation.is_terminated() {
                return Poll::Ready(if self.may_stop(flow) { Pause::AtRest } else { Pause::ClientGone });
            }
            if self.may_stop(flow) && (flow.gated || flow.begun) {
                let looks = self.backend.exchange.is_touched(true) || flow.gated;
                let goes_on = !flow.gated && !self.backend.up.is_empty() && !self.pool.is_contended();
                if !goes_on && (!self.pinned || looks) {
                    return Poll::Ready(Pause::AtRest);
                }
            }
            if self.pinned && active != flow.active {
                flow.active = active;
                self.seat.set_doing(if active { Doing::Active } else { Doing::Idle });
            }
            if !moved {
                return Poll::Pending;
            }
            let passed = self.passed[0] + self.passed[1];
            self.haste.moved(passed - before, if active { Turn::Backend } else { Turn::Client });
        }
    }

    fn pump_up(&mut self, flow: &mut Flow, cx: &mut Context<'_>) -> Result<bool, Pause> {
        let mut moved = false;
        let backend = &mut *self.backend;
        if backend.up.has_room() {
            match backend.up.poll_fill(cx, self.client) {
                Poll::Ready(Ok(1..)) => moved = true,
                Poll::Ready(Ok(0) | Err(_)) => return Err(Pause::ClientGone),
                Poll::Pending => {}
            }
        }
        let one_turn = flow.gated || self.pool.is_contended();
        let may_go = !one_turn || self.conversation.wants_client();
        if !backend.up.is_empty() && backend.out.is_empty() && may_go {
            let mut client = Client {
                names: self.names,
                conversation: self.conversation,
                texts: &backend.key.texts,
                dress: self.dress,
            };
            let unread = backend.up.unread();
            let (taken, stopped) = backend
                .exchange
                .up(&mut client, &mut backend.held, unread, &mut backend.out, one_turn)
                .map_err(|refused| Pause::Refused(Box::new(refused.into())))?;
            backend.up.advance(taken, 0);
            if let Stopped::Wants(size) = stopped {
                backend.up.want(size);
            }
            self.passed[0] += backend.out.len() as u64;
            moved |= taken > 0;
            flow.begun |= taken > 0;
        }
        while backend.out_sent < backend.out.len() {
            match Pin::new(&mut backend.stream).poll_write(cx, &backend.out[backend.out_sent..]) {
                Poll::Ready(Ok(count @ 1..)) => {
                    backend.out_sent += count;
                    moved = true;
                }
                // It closed; why, it may have said: that is read below, up to the end.
                Poll::Ready(Ok(0) | Err(_)) => backend.out_sent = backend.out.len(),
                Poll::Pending => break,
            }
        }
        if backend.out_sent == backend.out.len() {
            backend.out.clear();
            backend.out_sent = 0;
        }
        Ok(moved)
    }

    fn pump_down(&mut self, flow: &mut Flow, cx: &mut Context<'_>) -> Result<bool, Pause> {
        let mut moved = false;
        let backend = &mut *self.backend;
        if backend.down.has_room() && !flow.backend_eof {
            match backend.down.poll_fill(cx, &mut backend.stream) {
                Poll::Ready(Ok(1..)) if !self.branch.may_answer() => return Err(Pause::Unowned),
                Poll::Ready(Ok(1..)) => {
                    let unread = backend.down.unread();
                    let (kept, read) = backend
                        .exchange
                        .down(self.names, self.conversation, &mut backend.held, unread)
                        .map_err(|_| Pause::ServerMalformed)?;
                    if backend.exchange.prelude_failed {
                        tracing::error!("backend of a pool could not be reset");
                        let said = Said::not_replayed("the connection of the pool could not be reset");
                        return Err(Pause::Refused(Box::new(said)));
                    }
                    backend.down.advance(read, kept);
                    self.passed[1] += kept as u64;
                    moved = true;
                }
                Poll::Ready(Ok(0) | Err(_)) => flow.backend_eof = true,
                Poll::Pending => {}
            }
        }
        if backend.down.has_ready() {
            match backend.down.poll_drain(cx, self.client) {
                Poll::Ready(Ok(())) => {
                    moved = true;
                    flow.unflushed = true;
                }
                Poll::Ready(Err(_)) => return Err(Pause::ClientGone),
                Poll::Pending => {}
            }
        }
        if flow.unflushed && !backend.down.has_ready() {
            match Pin::new(&mut *self.client).poll_flush(cx) {
                Poll::Ready(Ok(())) => flow.unflushed = false,
                Poll::Ready(Err(_)) => return Err(Pause::ClientGone),
                Poll::Pending => {}
            }
        }
        if flow.backend_eof && !backend.down.has_ready() {
            return Err(Pause::ServerGone);
        }
        Ok(moved)
    }
}
