//! The fenced log: an append-only sequence of objects `<prefix>/<seq, 20 digits>`.
//!
//! `append` is put-if-absent at the next number: of two racing writers exactly one wins, and the loser learns that it
//! was overtaken. There is no other coordination in Ebb.

use bytes::Bytes;

use crate::Result;
use crate::object_store::Bucket;

/// An append-only sequence of entries in the bucket, numbered from 0.
#[derive(Debug, Clone)]
pub struct Log {
    bucket: Bucket,
    prefix: String,
}

impl Log {
    /// Names a log; touches nothing.
    pub fn new(bucket: Bucket, prefix: impl Into<String>) -> Self {
        Self { bucket, prefix: prefix.into() }
    }

    /// Appends at exactly `seq`, which must be the number after the last entry.
    ///
    /// An append whose answer was lost is recognised: if the entry at `seq` has these very bytes, it is this one.
    ///
    /// # Errors
    /// [`crate::Error::Overtaken`] when another writer has that number.
    pub async fn append(&self, _seq: u64, _entry: Bytes) -> Result<()> {
        todo!("helper A")
    }

    /// All entries from `from` on, in order, checked to be without gaps.
    pub async fn read(&self, _from: u64) -> Result<Vec<(u64, Bytes)>> {
        todo!("helper A")
    }
}
