//! The Postgres wire-protocol proxy: holds the clients while computes come and go.
//!
//! It knows neither buckets nor Postgres processes. What it needs from the rest of Ebb is the trait
//! [`Endpoints`]; what it offers to the rest is [`ProxyHandle`].
//!
//! ```text
//!   accept ─► login ─────────────► session ◄───────────────────────────────┐
//!             TLS, start-up, SCRAM   wait at the gate, wake, connect       │
//!                                    relay ◄─► backend                     │
//!                                    at the gate: examine ─► hibernate ────┘ next message
//!
//!   pure:  frame (boundaries) ◄ conversation (at rest?), calloff   startup   scram   settings (names)   errors (words)
//!          pings (what wakes nobody)   wishes (of clients)   replication (streams that sleep)   proxy_protocol
//!   rim:   proxy, door (who comes in), login, session, relay, backend, cancel, tls, certificates
//!   shared by the sessions of a branch: branch (gate, single-flight wake), pool (transaction mode, with sessions of its own)
//!   shared by all: strangers (places of the unauthenticated), limits (rates)
//! ```
//!
//! **Invariants**
//! - Nothing wakes before the client has proved who it is, and a thousand clients make one wake (`branch`).
//! - A backend is exchanged only between two messages, with nothing under way (`conversation`).
//! - Each session has one task; only it touches the two sockets. Others leave orders at its seat.
//! - Memory per connection is bounded, whatever its client or its query does.
//! - Those who have not logged in cannot take the places of those who have (`strangers`).
//!
//! **Crash**: nothing here is kept on disk but the certificate authority. If the proxy dies, all clients are cut off;
//! Postgres rolls their open transactions back.
//!
//! **Cancellation**: see [`Proxy::run`]; each public future says the rest itself.
//!
//! Deliberately absent: version 1 of the PROXY protocol, certificates instead of passwords.

mod backend;
mod branch;
mod calloff;
mod cancel;
mod certificates;
mod conversation;
mod door;
pub mod endpoints;
mod errors;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod haste;
mod hibernate;
mod lanes;
mod lexical;
mod limits;
mod login;
mod pings;
mod pool;
mod proxy;
mod proxy_protocol;
mod relay;
mod replication;
mod scram;
mod session;
mod settings;
mod startup;
mod strangers;
mod stream;
mod tls;
mod unix;
mod waits;
mod wire;
mod wishes;

pub use backend::connect as connect_socket;
pub use certificates::GivenFiles;
pub use endpoints::{
    Activity, Awake, Blocked, Census, Endpoint, EndpointError, Endpoints, ProxyHandle, SessionInfo, SessionState,
    Sessions, Unreplayable,
};
pub use limits::{Per, Rate, Rates};
pub use proxy::{Proxy, ProxyConfig, ProxyError};
pub use tls::TlsError;
