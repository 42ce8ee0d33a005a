//! The proxy from outside: real clients on one side, real Postgres on the other, and between it and the rest of Ebb
//! a stand-in that starts and stops that Postgres.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod cancel;
mod connect;
mod crowd;
mod dialogue;
mod door;
mod fence;
mod harness;
mod hibernate;
mod large;
mod pings;
mod pool;
mod pool_drivers;
mod pool_names;
mod protocol;
mod raw;
mod relay;
mod replication;
mod survive;
mod walsenders;
mod wire;
