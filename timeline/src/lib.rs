//! The timeline service: what projects, branches, checkpoints and releases there are, who did what, and what happens next.

pub mod api;
pub mod clients;
pub mod error;
pub mod service;

pub use error::{Error, Refusal, Result};
pub use service::{AwakeUnit, FoundEndpoint, Service, ServiceConfig};
