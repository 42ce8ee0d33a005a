//! A session with a backend: it relays, and at the gate lets go of it if the session can be given back.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::client::LAST_WORDS_TIMEOUT;
use super::{End, Session};
use crate::backend::{TERMINATE, terminate};
use crate::branch::{Gate, Order, Standing};
use crate::errors::Said;
use crate::hibernate::{Examined, Kept};
use crate::relay::{Link, Pause, count_passed};
use crate::unix::UnixStream;

/// How often a stream of WAL is looked at, whether it has become quiet.
const STREAM_LOOK: Duration = Duration::from_millis(200);
/// LIMIT: how long a cancel request on its way is waited for. One that strikes later pins the session this time.
const LAST_CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

impl Session {
    /// Relays until the session is hibernated (`Ok`) or ends.
    pub(super) async fn attached(&mut self, backend: &mut UnixStream) -> Result<(), End> {
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
        count_passed(&mut self.client.passed);
        self.kept = Some(self.known.take().unwrap_or_default());
        self.client.branch.forget(self.generation);
        self.client.seat.set_backend(0, None);
        self.client.seat.forgive_loss();
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
        let untouched = self.known.is_some() && !self.client.conversation.has_heard();
        untouched
            && self.client.conversation.is_at_rest()
            && self.up.is_empty()
            && !self.client.conversation.ends_with_error()
    }

    fn link<'a>(&'a mut self, backend: &'a mut UnixStream) -> Link<'a> {
        let mut link = Link::new(&mut self.client, backend, &mut self.up, &mut self.down);
        link.select_one = self.pings;
        link.walstream = self.walstream.as_deref_mut();
        link
    }

    /// What a pause that cannot be resumed means to the client.
    fn ended(&self, pause: Pause) -> End {
        let follows = self.walstream.as_ref().is_some_and(|stream| stream.is_streaming());
        let busy = (!self.client.conversation.is_idle() && !follows) || self.up.has_held();
        self.client.ended(pause, self.generation, busy, self.down.has_released())
    }

    /// Stands at the gate, at rest. Answers the state in hand if the backend is to be let go, nothing if work goes on.
    async fn at_gate(&mut self, backend: &mut UnixStream) -> Result<Option<Arc<Kept>>, End> {
        if self.client.conversation.is_terminated() {
            // Its backend is about to close, which is no loss to a client that has taken its leave.
            return Err(End::Silent);
        }
        // A cancel request that comes late is not to strike the proxy's own questions.
        let _ = timeout(LAST_CANCEL_TIMEOUT, self.client.seat.shield()).await;
        let examined = match &self.walstream {
            Some(walstream) => Ok(match walstream.quiet() {
                Ok(()) => Examined::Kept(Box::default()),
                Err(reason) => Examined::Pinned(reason.to_owned()),
            }),
            None => self.client.examine(backend).await,
        };
        self.client.seat.unshield();
        let kept: Result<Arc<Kept>, String> = match examined? {
            Examined::Kept(kept) => {
                self.client.branch.stand(self.client.conn(), Standing::Ready);
                let kept: Arc<Kept> = Arc::from(kept);
                self.known = Some(kept.clone());
                self.client.conversation.listen_anew();
                Ok(kept)
            }
            Examined::Pinned(reason) => {
                self.client.seat.set_pin(Some(reason.clone()));
                self.client.branch.stand(self.client.conn(), Standing::Pinned(reason.clone()));
                Err(reason)
            }
        };
        loop {
            self.client.obey()?;
            let gate = self.client.branch.gate();
            match (gate, &kept) {
                (Gate::Open, _) if self.client.branch.begin_work(self.client.conn()) => return Ok(None),
                (Gate::Detaching | Gate::Closed, Ok(kept)) => return Ok(Some(kept.clone())),
                (Gate::Detaching | Gate::Closed, Err(reason)) => {
                    return Err(End::Say(Said::fenced_out(reason)));
                }
                _ => {}
            }
            let refusable = gate.is_refusable() && self.up.is_empty();
            tokio::select! {
                () = self.client.seat.attention() => {}
                first = self.client.stream.read_u8(), if refusable => {
                    self.up.push(first.map_err(|_| End::Silent)?);
                    // A client that has work is a reason not to suspend. Should the fence be past refusing, the relay
                    // comes straight back here.
                    self.client.branch.stand(self.client.conn(), Standing::Busy);
                    return Ok(None);
                }
            }
        }
    }

    async fn detach(&mut self, backend: &mut UnixStream, kept: Arc<Kept>) {
        count_passed(&mut self.client.passed);
        self.kept = Some(kept);
        self.known = None;
        self.client.seat.set_pin(None);
        self.client.seat.set_backend(0, None);
        terminate(backend).await;
        metrics::counter!("ebb_proxy_hibernations_total").increment(1);
    }

    /// Makes ready for last words: brings the client to the end of the message begun, and lets the backend go.
    pub(super) async fn close_backend(&mut self, backend: &mut UnixStream, end: &End) {
        if !matches!(end, End::Silent) {
            if !self.client.conversation.server_at_boundary() {
                let begun = self.down.released().to_vec();
                self.down.discard_released();
                // If it does not come, the client is cut off in the middle of it.
                let _ = timeout(LAST_WORDS_TIMEOUT, self.client.finish_message(backend, &begun)).await;
            }
            if let Some(target) = self.client.seat.backend().filter(|_| !self.client.conversation.is_idle()) {
                // Nobody waits for the result any more. If it cannot be cancelled, it is gone already.
                let _ = timeout(LAST_WORDS_TIMEOUT, target.cancel()).await;
            }
        }
        if self.client.conversation.client_at_boundary() && !self.up.has_released() {
            // It would notice the closed socket as well, only with a line in its log.
            let _ = backend.try_write(&TERMINATE);
        }
    }
}
