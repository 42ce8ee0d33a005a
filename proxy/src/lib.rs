//! The Postgres wire-protocol proxy: holds the clients while computes come and go.
//!
//! It knows neither buckets nor Postgres processes. What it needs from the rest of Ebb is the trait
//! [`Endpoints`]; what it offers to the rest is [`ProxyHandle`].

pub mod endpoints;
mod proxy;

pub use endpoints::{
    Activity, Awake, Blocked, Endpoint, EndpointError, Endpoints, ProxyHandle, SessionInfo, SessionState, Sessions,
    Unreplayable,
};
pub use proxy::{Proxy, ProxyConfig, ProxyError};
