//! What passes between a machine and Postgres as others run it: imports, and dumps.

use std::path::Path;

use async_trait::async_trait;
use ebb_types::{BranchId, LayerId, Lsn};

use super::{ImportFrom, ImportJob, ImportRequest, LocalNode, Start};
use crate::Result;
use crate::event::Dump;

/// The part of a [`super::Node`] that imports and dumps. As there, every method may be called again after it failed.
#[async_trait]
pub trait Foreign {
    /// Writes a database of a layer's image as pg_dump does, by way of a compute that is gone when this returns.
    async fn dump(&self, dump: &Dump, like: &Start, to: &Path) -> Result<()>;

    /// Finds what is to be imported, and the major version it needs, if it needs one.
    async fn import_look(&self, request: &ImportRequest) -> Result<(ImportFrom, Option<u32>)>;

    /// Brings it to this node: a data directory that was shut down; or, of a dump, a compute that it was restored into.
    async fn import_copy(&self, job: &ImportJob) -> Result<()>;

    /// Checks the data directory, and makes it one of Ebb's.
    async fn import_settle(&self, job: &ImportJob) -> Result<()>;

    /// Makes the layer, complete on this node: a position that all its WAL lies before, where known.
    async fn import_seal(&self, job: &ImportJob) -> Result<Option<Lsn>>;

    /// Removes what an import used on this node; and the layer it made, if that is of no use either.
    async fn import_leave(&self, scratch: BranchId, layer: Option<LayerId>) -> Result<()>;
}

#[async_trait]
impl Foreign for LocalNode {
    async fn dump(&self, dump: &Dump, like: &Start, to: &Path) -> Result<()> {
        self.dump_beside(dump, like, to).await
    }

    async fn import_look(&self, request: &ImportRequest) -> Result<(ImportFrom, Option<u32>)> {
        self.look_at_import(request).await
    }

    async fn import_copy(&self, job: &ImportJob) -> Result<()> {
        self.copy_import(job).await
    }

    async fn import_settle(&self, job: &ImportJob) -> Result<()> {
        self.settle_import(job).await
    }

    async fn import_seal(&self, job: &ImportJob) -> Result<Option<Lsn>> {
        self.seal_import(job).await
    }

    async fn import_leave(&self, scratch: BranchId, layer: Option<LayerId>) -> Result<()> {
        self.leave_import(scratch, layer).await
    }
}
