//! A session without a backend: it sleeps until its client has work, and answers what is none.

use std::io;
use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::time::{Instant, sleep_until};

use super::{End, Session};
use crate::branch::{Doing, Standing};
use crate::errors::Said;
use crate::pings::{Heard, Pings};
use crate::replication::{KEEPALIVE_EVERY, Walstream, Word};
use crate::stream::{Buffer, ClientStream};

impl Session {
    /// Sleeps until the client sends something that needs a backend.
    pub(super) async fn hibernated(&mut self) -> Result<(), End> {
        if self.client.conversation.is_idle() {
            self.client.conversation.shrink();
        }
        self.up.free();
        self.down.free();
        self.client.seat.set_doing(Doing::Hibernated);
        self.client.branch.stand(self.client.conn(), Standing::Apart);
        if !self.up.is_empty() {
            return Ok(());
        }
        if self.walstream.as_ref().is_some_and(|stream| stream.is_streaming()) {
            self.client.seat.set_follows(true);
            let ended = self.hibernated_stream().await;
            self.client.seat.set_follows(false);
            return ended;
        }
        loop {
            self.client.obey()?;
            tokio::select! {
                () = self.client.seat.attention() => {}
                // One byte: a sleeping client needs no buffer.
                first = self.client.stream.read_u8() => match first {
                    Ok(b'X') | Err(_) => return Err(End::Silent),
                    Ok(first) => {
                        self.up.push(first);
                        if self.has_work().await? {
                            return Ok(());
                        }
                        self.up.free();
                    }
                },
            }
        }
    }

    /// Sleeps, with keepalives for the client, until somebody else wakes the compute, or the client ends the stream.
    async fn hibernated_stream(&mut self) -> Result<(), End> {
        let mut keepalive_at = Instant::now();
        loop {
            self.client.obey()?;
            if self.client.branch.is_awake() {
                return Ok(());
            }
            let Some(walstream) = &mut self.walstream else { return Ok(()) };
            let reply = match Walstream::word(self.up.held()) {
                Word::Status { taken, reply } => {
                    walstream.client_sent(&self.up.held()[..taken]);
                    self.up.release(taken);
                    self.up.discard_released();
                    reply
                }
                Word::Other if self.up.held()[0] == b'X' => return Err(End::Silent),
                Word::Other => return Ok(()),
                Word::More => {
                    self.up.free();
                    tokio::select! {
                        () = self.client.seat.attention() => false,
                        () = sleep_until(keepalive_at) => true,
                        read = more(&mut self.up, &mut self.client.stream) => {
                            read.map_err(|_| End::Silent)?;
                            false
                        }
                    }
                }
            };
            if reply {
                let keepalive = walstream.keepalive();
                self.client.send(&keepalive).await?;
                keepalive_at = Instant::now() + KEEPALIVE_EVERY;
            }
        }
    }

    /// Answers the pings at hand; whether something else came, which is work.
    async fn has_work(&mut self) -> Result<bool, End> {
        loop {
            let heard = {
                let kept = self.kept.as_deref();
                let pings = Pings {
                    select_one: self.pings,
                    unnamed: self.client.conversation.unnamed_statement().unwrap_or(None),
                    named: |name: &[u8]| kept?.statement_without_parameters(name),
                };
                pings.hear(self.up.held())
            };
            match heard {
                Heard::Work => return Ok(true),
                Heard::Ping { taken, answer } => {
                    self.note_ping(taken, &answer)?;
                    self.client.send(&answer).await?;
                    if self.up.is_empty() {
                        return Ok(false);
                    }
                    if self.up.held()[0] == b'X' {
                        return Err(End::Silent);
                    }
                }
                Heard::More => tokio::select! {
                    () = self.client.seat.attention() => self.client.obey()?,
                    read = more(&mut self.up, &mut self.client.stream) => read.map_err(|_| End::Silent)?,
                },
            }
        }
    }

    /// Follows a ping and its answer as if both had passed, and takes it off the buffer.
    fn note_ping(&mut self, taken: usize, answer: &[u8]) -> Result<(), End> {
        metrics::counter!("ebb_proxy_pings_total").increment(1);
        let followed = self.client.conversation.client_sent(&self.up.held()[..taken], false);
        followed.map_err(|what| End::Say(Said::malformed(&what.to_string())))?;
        self.client.conversation.server_sent(answer).map_err(|_| End::Silent)?;
        self.up.release(taken);
        self.up.discard_released();
        if let Some(kept) = self.kept.as_mut().and_then(Arc::get_mut) {
            kept.set_unnamed(self.client.conversation.unnamed_statement().unwrap_or(None));
        }
        Ok(())
    }
}

/// Reads more of the client's bytes. Cancel-safe.
async fn more(up: &mut Buffer, client: &mut ClientStream) -> io::Result<()> {
    if up.is_empty() {
        // A sleeping client needs no buffer.
        up.push(client.read_u8().await?);
    } else if up.fill(client).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}
