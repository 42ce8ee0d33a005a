//! Cancel keys: the proxy hands out its own, and maps them to the backend of the moment.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use subtle::ConstantTimeEq;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::backend;
use crate::branch::Seat;
use crate::startup::CancelKey;
use crate::wire::untagged;

const CANCEL_CODE: u32 = 80_877_102;

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
#[derive(Debug, Default)]
pub struct CancelKeys {
    seats: DashMap<u32, (u32, Arc<Seat>)>,
}

impl CancelKeys {
    /// A fresh key for a session; it is void once the answer is dropped.
    pub fn issue(self: &Arc<Self>, seat: &Arc<Seat>) -> IssuedKey {
        loop {
            // Positive, because some drivers show it as a process id.
            let key = CancelKey { id: rand::random::<u32>() >> 1, secret: rand::random() };
            if let Entry::Vacant(entry) = self.seats.entry(key.id) {
                entry.insert((key.secret, seat.clone()));
                return IssuedKey { keys: self.clone(), key };
            }
        }
    }

    /// Cancels what the holder of this key is doing. As in Postgres, the asker is never told whether it did.
    pub async fn cancel(&self, key: CancelKey) {
        let target = self.seats.get(&key.id).and_then(|entry| {
            let (secret, seat) = entry.value();
            bool::from(secret.to_be_bytes().ct_eq(&key.secret.to_be_bytes())).then(|| seat.backend()).flatten()
        });
        let result = match target {
            None => "nothing",
            Some(target) => match target.cancel().await {
                Ok(()) => "sent",
                Err(_) => "error",
            },
        };
        metrics::counter!("ebb_proxy_cancels_total", "result" => result).increment(1);
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
        let mut packet = Vec::new();
        untagged(&mut packet, |body| {
            for word in [CANCEL_CODE, self.key.id, self.key.secret] {
                body.extend_from_slice(&word.to_be_bytes());
            }
        });
        stream.write_all(&packet).await?;
        // Postgres closes once the signal is sent; the client's own connection is held open until then.
        stream.read_u8().await.map(drop).or_else(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Ok(()),
            _ => Err(error),
        })
    }
}
