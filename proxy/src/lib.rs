//! The Postgres wire-protocol proxy: holds the clients while computes come and go.
//!
//! It knows neither buckets nor Postgres processes. What it needs from the rest of Ebb is the trait
//! [`Endpoints`]; what it offers to the rest is [`ProxyHandle`].

mod backend;
mod branch;
mod cancel;
mod conversation;
pub mod endpoints;
mod errors;
mod frame;
mod hibernate;
mod limits;
mod login;
mod proxy;
mod relay;
mod scram;
mod session;
mod settings;
mod startup;
mod stream;
mod tls;
mod wire;

pub use endpoints::{
    Activity, Awake, Blocked, Endpoint, EndpointError, Endpoints, ProxyHandle, SessionInfo, SessionState, Sessions,
    Unreplayable,
};
pub use proxy::{Proxy, ProxyConfig, ProxyError};
pub use tls::TlsError;
