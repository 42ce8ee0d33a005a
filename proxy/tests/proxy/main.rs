//! The proxy from outside: real clients on one side, real Postgres on the other, and between it and the rest of Ebb
//! a stand-in that starts and stops that Postgres.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod connect;
mod crowd;
mod door;
mod fence;
mod harness;
mod hibernate;
mod pings;
mod raw;
mod relay;
mod replication;
mod survive;
