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

use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::Instrument;

use crate::backend::encoded;
use crate::branch::{Seat, Sitter};
use crate::door::{no_seat, refused};
use crate::hibernate::Kept;
use crate::login::{Login, Turned, login};
use crate::pool;
use crate::proxy::Shared;
use crate::replication::Walstream;
use crate::stream::Buffer;
use crate::wishes::Wishes;
use end::note_connect;

mod attached;
mod client;
mod end;
mod hold;
mod sleeping;
mod waiting;

pub use client::{Client, LAST_WORDS_TIMEOUT, parameter_status};
pub use end::End;
pub use hold::{Hold, RETRY_AFTER, StartFailed};

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
        walstream: startup.is_replication().then(Box::default),
        pings: wishes.pings,
        up: Buffer::default(),
        down: Buffer::default(),
        kept: None,
        known: None,
        generation: 0,
        client: Client::new(shared.clone(), branch, client, &startup, seat, wishes.notice, membership),
    };
    session.run().await;
}

/// A client in session mode.
struct Session {
    /// On a replication connection: the stream of WAL.
    walstream: Option<Box<Walstream>>,
    /// Whether `SELECT 1` is a ping.
    pings: bool,
    up: Buffer,
    down: Buffer,
    /// The state to give back, while there is no backend; `None` before the first.
    kept: Option<Arc<Kept>>,
    /// The state that the backend has as long as the client sends nothing: what it was given, or was read of it last.
    known: Option<Arc<Kept>>,
    /// The compute it is, or was last, attached to.
    generation: u64,
    client: Client,
}

impl Session {
    async fn run(mut self) {
        let end = loop {
            let backend = match self.attach().await {
                Ok(backend) => backend,
                Err(end) => break end,
            };
            // Until now the client's query was in nobody's hands but the proxy's.
            if self.client.seat.end_wait()
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
        if let Some(words) = self.client.last_words(end) {
            self.client.stream.goodbye(&[self.down.released(), &words].concat()).await;
        }
    }
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
