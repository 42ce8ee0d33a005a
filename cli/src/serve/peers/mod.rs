//! Nodes among each other: a client of any node reaches every branch, wherever that is awake.
//!
//! ```text
//!   client ── proxy of A ── socket of A's ══ mutual TLS ══ B, the owner ── Postgres
//!                │  wake, verifier, connect: one connection each   │
//!                └──── link: B holds A's clients, A tells if idle ─┘
//! ```
//!
//! A is the *guest*, B the *owner*. Whoever has the key that the nodes of a bucket share (`secret.key`) is one of them.
//!
//! **Invariants**
//! - Streams of a guest exist only as long as its link does: what the owner could not hold any more, it cuts. So no
//!   statement of a relayed client runs behind a fence (I5).
//! - An owner answers for what it owns at that moment, or says that it does not; a guest then looks again who does.
//! - Nothing of this wakes anything before the guest's proxy has authenticated the client (I4).

mod client;
mod forward;
mod identity;
mod links;
mod server;
mod wire;

pub use client::{Peers, Unreached};
pub use forward::forward;
pub use identity::Identity;
pub use links::Links;
pub use server::PeerServer;
