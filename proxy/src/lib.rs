//! The Postgres wire-protocol proxy: holds the clients while computes come and go.
//!
//! It knows neither buckets nor Postgres processes. What it needs from the rest of Ebb is the trait
//! [`Endpoints`]; what it offers to the rest is [`ProxyHandle`].

pub mod endpoints;

pub use endpoints::{Awake, Endpoint, EndpointError, Endpoints};
