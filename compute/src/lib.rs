//! Runs the Postgres of one branch: the unit process (`ebb compute`), and the manager that starts, adopts and stops units.

pub mod control;
pub mod error;
pub mod manager;
pub mod postgres;
pub mod unit;

pub use error::{Error, Result};
