//! Cancel keys: the proxy hands out its own, and maps them to the backend of the moment.
//!
//! ```text
//!   CancelRequest ─► key known? ─► secret right? ─► not too often? ─► a task of its own:
//!                                                                       a query that waits: called off here
//!                                                                       a backend, if the session shows one:
//!                                                                         to its postmaster, until that closes
//! ```
//!
//! **Invariants**
//! - A request reaches the backend of the session whose key it has, or none. Before a backend leaves a session,
//!   [`Seat::shield`] waits for the requests that are on their way to it: Postgres closes such a connection only after the
//!   signal was sent (`processCancelRequest`, postmaster.c), and a backend that reads its next message has forgotten
//!   earlier signals (`PostgresMain`, postgres.c). So none strikes what comes after.
//! - A request wakes nothing. A session without a backend has nothing that could be cancelled there.
//!
//! **Cancellation**: a request on its way goes on without its asker, so that it never gets lost half-way unseen.

use std::io;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use governor::{DefaultKeyedRateLimiter, Quota};
use subtle::ConstantTimeEq;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::task::TaskTracker;

use crate::backend;
use crate::branch::Seat;
use crate::limits::network;
use crate::startup::{CancelKey, Version};

/// LIMIT: what Postgres 18 gives to clients that take long keys (`MAX_CANCEL_KEY_LENGTH`, procsignal.h).
const LONG_SECRET_LEN: usize = 32;
/// LIMIT: requests an address may send at once: a pool that gives up all that it does.
const ADDRESS_BURST: NonZeroU32 = NonZeroU32::new(1000).expect("not zero");
/// LIMIT: and then per second. At this rate, one of ten thousand short keys is guessed in a hundred thousand years.
const ADDRESS_PER_SECOND: NonZeroU32 = NonZeroU32::new(200).expect("not zero");
/// LIMIT: requests for one session at once: each makes its postmaster start a process.
const SESSION_BURST: NonZeroU32 = NonZeroU32::new(20).expect("not zero");
/// LIMIT: and then per second: more often than anyone gives up one query after another.
const SESSION_PER_SECOND: NonZeroU32 = NonZeroU32::new(10).expect("not zero");
/// LIMIT: addresses and sessions remembered before those that have been quiet are forgotten.
const REMEMBERED_MAX: usize = 10_000;

/// A backend, and the key it gave for cancelling.
#[derive(Debug, Clone)]
pub struct CancelTarget {
    /// The socket of its postmaster.
    pub socket: PathBuf,
    /// The key it gave.
    pub key: CancelKey,
    /// Held while a request may be on its way, so that a backend of a pool is not given to another client meanwhile.
    pub _lease: Option<Arc<()>>,
}

/// All keys handed out.
#[derive(Debug)]
pub struct CancelKeys {
    seats: DashMap<u32, (Box<[u8]>, Arc<Seat>)>,
    by_address: DefaultKeyedRateLimiter<IpAddr>,
    by_session: DefaultKeyedRateLimiter<u32>,
}

impl CancelKeys {
    /// None yet.
    pub fn new() -> Self {
        let quota = |burst, per_second| Quota::per_second(per_second).allow_burst(burst);
        Self {
            seats: DashMap::new(),
            by_address: DefaultKeyedRateLimiter::keyed(quota(ADDRESS_BURST, ADDRESS_PER_SECOND)),
            by_session: DefaultKeyedRateLimiter::keyed(quota(SESSION_BURST, SESSION_PER_SECOND)),
        }
    }

    /// A fresh key for a session, as long as its version of the protocol allows; it is void once the answer is dropped.
    pub fn issue(self: &Arc<Self>, seat: &Arc<Seat>, version: Version) -> IssuedKey {
        let secret: Box<[u8]> = match version {
            Version::V3_0 => rand::random::<[u8; 4]>().into(),
            Version::V3_2 => rand::random::<[u8; LONG_SECRET_LEN]>().into(),
        };
        loop {
            // Positive, because some drivers show it as a process id.
            let id = rand::random::<u32>() >> 1;
            if let Entry::Vacant(entry) = self.seats.entry(id) {
                entry.insert((secret.clone(), seat.clone()));
                return IssuedKey { keys: self.clone(), key: CancelKey { id, secret } };
            }
        }
    }

    /// Cancels what the holder of this key is doing. As in Postgres, the asker is never told whether it did, and the
    /// answer comes when the signal has been sent. Cancel-safe: a request on its way goes on, as one of `tasks`.
    pub async fn cancel(&self, key: CancelKey, from: IpAddr, tasks: &TaskTracker) {
        let result = match self.admit(&key, from) {
            Ok(seat) => {
                let sending = tasks.spawn(async move { seat.cancel().await });
                sending.await.unwrap_or("error")
            }
            Err(reason) => reason,
        };
        metrics::counter!("ebb_proxy_cancels_total", "result" => result).increment(1);
    }

    /// The session of that key; or why nothing is done.
    fn admit(&self, key: &CancelKey, from: IpAddr) -> Result<Arc<Seat>, &'static str> {
        if self.by_address.len() > REMEMBERED_MAX {
            self.by_address.retain_recent();
        }
        if self.by_session.len() > REMEMBERED_MAX {
            self.by_session.retain_recent();
        }
        if self.by_address.check_key(&network(from)).is_err() {
            return Err("limited");
        }
        let seat = self.seats.get(&key.id).and_then(|entry| {
            let (secret, seat) = entry.value();
            bool::from(secret.ct_eq(&key.secret)).then(|| seat.clone())
        });
        let seat = seat.ok_or("nothing")?;
        if self.by_session.check_key(&key.id).is_err() {
            return Err("limited");
        }
        Ok(seat)
    }
}

/// A key in use.
#[derive(Debug)]
pub struct IssuedKey {
    keys: Arc<CancelKeys>,
    /// The key.
    pub key: CancelKey,
}

impl Drop for IssuedKey {
    fn drop(&mut self) {
        self.keys.seats.remove(&self.key.id);
    }
}

impl CancelTarget {
    /// Asks Postgres to cancel what this backend is doing.
    ///
    /// # Errors
    /// If its postmaster is not to be reached.
    pub async fn cancel(&self) -> io::Result<()> {
        let mut stream = backend::connect(&self.socket).await?;
        stream.write_all(&self.key.request()).await?;
        // Postgres closes once the signal is sent; the client's own connection is held open until then.
        stream.read_u8().await.map(drop).or_else(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Ok(()),
            _ => Err(error),
        })
    }
}

#[cfg(test)]
#[path = "cancel/tests.rs"]
mod tests;
