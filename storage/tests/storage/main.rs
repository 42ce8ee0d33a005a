//! Storage from outside, on data directories of real Postgres.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]

mod full_disk;
mod node;
mod postgres;
