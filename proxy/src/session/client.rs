//! A client that has logged in: what sessions of either mode have of it, and what orders and ends mean to it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::end::{End, note_connect};
use crate::backend::{encoded, relayed_error};
use crate::branch::{Branch, Membership, Order, Seat};
use crate::cancel::IssuedKey;
use crate::conversation::Conversation;
use crate::errors::Said;
use crate::hibernate::{self, Examined};
use crate::proxy::Shared;
use crate::relay::{Pause, count_passed};
use crate::startup::Startup;
use crate::stream::ClientStream;
use crate::unix::UnixStream;
use crate::wire::{cstr, message};

/// LIMIT: how much of a message begun is waited for, so that an error can follow it.
const REST_OF_MESSAGE_MAX: usize = 64 * 1024;

/// LIMIT: how long the last words of a backend, and a request to cancel what it does, may take.
pub const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(200);

/// The client, and what there is for it alone.
pub struct Client {
    /// What all sessions share.
    pub shared: Arc<Shared>,
    /// Where it is.
    pub branch: Arc<Branch>,
    /// Its connection.
    pub stream: ClientStream,
    /// The start-up packet for each backend.
    pub startup: Box<[u8]>,
    /// What others see of it.
    pub seat: Arc<Seat>,
    /// What it cancels with.
    pub key: IssuedKey,
    /// Whether it is told that it waits.
    pub notices: bool,
    /// What it and its backends are talking about.
    pub conversation: Conversation,
    /// It has been told that it is connected.
    pub introduced: bool,
    /// Bytes passed on, up and down.
    pub passed: [u64; 2],
    /// Keeps its seat.
    pub membership: Membership,
}

impl Client {
    /// One that has only just got its seat.
    pub fn new(
        shared: Arc<Shared>,
        branch: Arc<Branch>,
        stream: ClientStream,
        startup: &Startup,
        seat: Arc<Seat>,
        notices: bool,
        membership: Membership,
    ) -> Self {
        let key = shared.keys.issue(&seat, startup.version());
        Self {
            shared,
            branch,
            stream,
            startup: startup.encode().into(),
            seat,
            key,
            notices,
            conversation: Conversation::new(),
            introduced: false,
            passed: [0; 2],
            membership,
        }
    }

    /// Number of the connection.
    pub fn conn(&self) -> u64 {
        self.seat.sitter.conn
    }

    /// What an order means to a session that is not in the middle of anything.
    ///
    /// # Errors
    /// If it ends the session.
    pub fn obey(&self) -> Result<(), End> {
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

    /// Sends it messages of the proxy's own; nothing, where there is nothing to say.
    ///
    /// # Errors
    /// If it is gone.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.stream.send(bytes).await.map_err(|_| End::Silent)
    }

    /// Ends its start-up: appends its key, and that it may begin.
    pub fn introduce(&mut self, out: &mut Vec<u8>) {
        self.introduced = true;
        note_connect("ok", "");
        message(out, b'K', |body| self.key.key.encode(body));
        message(out, b'Z', |body| body.push(b'I'));
    }

    /// What a pause that cannot be resumed means to it. `generation` is its compute's; `busy` tells whether something was
    /// under way, `unsent` whether something the backend said has not gone out yet.
    pub fn ended(&self, pause: Pause, generation: u64, busy: bool, unsent: bool) -> End {
        match pause {
            Pause::AtRest | Pause::AtGate => End::Say(Said::draining(false)),
            Pause::Ordered(Order::Drain | Order::DrainNow) => End::Say(Said::draining(busy)),
            Pause::Ordered(Order::Fenced) => End::Say(Said::fenced_out("a query or transaction was under way")),
            Pause::Ordered(Order::Evicted) => End::Say(self.evicted()),
            Pause::ClientGone => End::Silent,
            Pause::Refused(said) => End::Say(*said),
            Pause::ServerMalformed => {
                tracing::error!("backend sent a malformed message");
                End::Silent
            }
            Pause::Unowned => {
                self.branch.forget(generation);
                match self.conversation.server_at_boundary() && !unsent {
                    true => End::Say(Said::compute_lost(busy)),
                    // The rest of what was begun may not be told.
                    false => End::Silent,
                }
            }
            Pause::Ordered(Order::Lost) | Pause::ServerGone => {
                if self.conversation.is_terminated() || self.conversation.ends_with_error() {
                    return End::Silent;
                }
                self.branch.forget(generation);
                End::Say(Said::compute_lost(busy))
            }
        }
    }

    /// Counts the end of its session, and puts it into words; none if it is in the middle of another message.
    pub fn last_words(&mut self, end: End) -> Option<Vec<u8>> {
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
        self.conversation.server_at_boundary().then_some(words)
    }

    // At a backend.

    /// Reads its session's state. It cannot be broken off, but an order to end is heard.
    ///
    /// # Errors
    /// If the session ends.
    pub async fn examine(&mut self, backend: &mut UnixStream) -> Result<Examined, End> {
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
        self.send(&aside).await?;
        examined.map_err(|lost| match lost.error {
            Some(error) => End::Pass(relayed_error(&error)),
            None => End::Say(Said::compute_lost(false)),
        })
    }

    /// Brings it to the end of the message that its backend is in the middle of; `begun` is what has not gone out yet.
    ///
    /// # Errors
    /// What either stream says.
    pub async fn finish_message(&mut self, backend: &mut UnixStream, begun: &[u8]) -> io::Result<()> {
        self.stream.write_all(begun).await?;
        let mut left = REST_OF_MESSAGE_MAX;
        let mut chunk = vec![0; 4096];
        while !self.conversation.server_at_boundary() && left > 0 {
            let wanted = self.conversation.server_missing().min(chunk.len()).min(left);
            let count = backend.read(&mut chunk[..wanted]).await?;
            if count == 0 || self.conversation.server_sent(&chunk[..count]).is_err() {
                break;
            }
            self.stream.write_all(&chunk[..count]).await?;
            left -= count;
        }
        Ok(())
    }
}

/// Appends what a parameter is now.
pub fn parameter_status(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    message(out, b'S', |body| {
        cstr(body, name);
        cstr(body, value);
    });
}
