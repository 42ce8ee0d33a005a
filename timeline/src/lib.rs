//! The timeline service: what projects, branches, checkpoints and releases there are, who did what, and what happens next.

pub mod api;
pub mod artifact;
pub mod audit;
pub mod catalog;
pub mod clients;
pub mod collect;
pub mod decide;
pub mod deploy;
pub mod diff;
pub mod drill;
pub mod error;
pub mod event;
mod files;
pub mod fsck;
pub mod history;
pub mod ledger;
pub mod machine;
mod migrate;
pub mod node;
pub mod nodes;
mod probe;
pub mod reach;
pub mod release_file;
mod secrets;
pub mod service;
pub mod state;
#[cfg(test)]
mod test_postgres;
pub mod upkeep;

pub use error::{Error, Refusal, Result};
pub use node::LayerPolicy;
pub use service::{
    Answer, AwakeUnit, Caller, CollectPolicy, FoundEndpoint, MIN_FREE_BYTES, Place, Service, ServiceConfig,
};
