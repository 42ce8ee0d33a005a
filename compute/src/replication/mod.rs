//! The client side of Postgres's replication protocol: what the shipper receives a branch's WAL with, and what imports
//! take a running cluster with.
//!
//! [`wire`] speaks the protocol over any stream; [`source`] is a server somewhere else, by URL; [`backup`] takes a base
//! backup; [`segments`] writes received WAL as the files that Postgres recovers from.

pub(crate) mod backup;
pub(crate) mod segments;
pub(crate) mod source;
mod tls;
pub(crate) mod wire;
