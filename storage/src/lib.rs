//! Copy-on-write storage for stock Postgres: data directories as volumes over immutable layers, all of it in one bucket.
//!
//! Two primitives carry everything that must survive a node: an [`object_store::ObjectStore`] and, on top of it, the
//! fenced [`log::Log`]. A [`layer`] is an immutable set of pages and the file tree at one moment; a [`volume`] is a
//! chain of layers plus a private upper, mounted through FUSE; an [`archive`] has the WAL between layers;
//! [`node::NodeStore`] is what one machine holds of it.
//!
//! This crate knows files, pages and WAL segments. It does not know Postgres processes, SQL or HTTP.

pub mod archive;
mod blocking;
pub mod error;
pub mod fsck;
pub mod layer;
pub mod log;
pub mod node;
pub mod object_store;
pub mod pg_files;
pub mod volume;

pub use error::{Error, Result};
