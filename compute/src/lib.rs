//! Runs the Postgres of one branch: the unit process (`ebb compute`), and the manager that starts, adopts and stops units.
//!
//! ```text
//!  ebb serve                                  the unit: process 1 of its own pid namespace
//! ┌─────────┐ spawn; "ready" through a pipe  ┌───────────────────────────────────────────┐
//! │ manager ├────────────────────────────────► FUSE volume · control socket · log · roles │
//! │         ├─ control.sock: seal, stop … ───►   └─ postgres, as its own user ─► shipper  ├─► WAL archive
//! └─────────┘                                └───────────────────────────────────────────┘
//! ```
//!
//! **Invariants.** One unit for each branch, held by a lock on `unit.lock` that every process of the unit shares: it is
//! free only when all of them are gone. Killing the unit kills its Postgres, and the mount goes with them (decision
//! 0003). Nothing of a unit's Postgres is on the network, nor sees files of the machine (decision 0022).
//!
//! **Crash.** A unit outlives `ebb serve`, which finds it again by its control socket. A unit that dies leaves the
//! volume as a power failure would, and Postgres recovers at the next start.

pub mod control;
pub mod error;
pub mod import;
pub mod manager;
pub mod postgres;
pub mod unit;

mod clock;
mod files;
mod long_path;
mod replication;
mod shipper;
mod spawn;
mod user;

pub use error::{Error, Result};
