//! Files too large for one request: uploaded in parts, a few at once.
//!
//! An upload is begun, its parts are sent, and completing it makes the object appear. One that fails or is dropped
//! is aborted, so that its parts are not kept and charged for.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::time::timeout;

use super::fault::{Fault, Kind};
use super::{PUT_ID, S3, WRITE_WITHIN, put_id, put_id_of};
use crate::blocking;
use crate::error::{LocalContext, Result};

/// LIMIT: a part is at least this large, and so is a file that is sent in parts. S3 takes parts of 5 MiB to 5 GiB; at this
/// size a distant store is busy and a lost part is cheap to send again.
pub(super) const PART_BYTES_MIN: u64 = 16 << 20;

/// LIMIT: S3's.
const PARTS_MAX: u64 = 10_000;

/// LIMIT: parts in memory at once, and their bytes where parts are large (files beyond 156 GiB).
const PARALLEL_PARTS: u64 = 4;
const PARALLEL_BYTES: u64 = PARALLEL_PARTS * PART_BYTES_MIN;

/// LIMIT: an abort that is not answered by then is left to the bucket's lifecycle rule.
const ABORT_WITHIN: Duration = Duration::from_secs(10);

/// A file that is being uploaded.
pub(super) struct Source {
    file: File,
    path: PathBuf,
}

impl Source {
    pub(super) fn new(file: File, path: PathBuf) -> Arc<Self> {
        Arc::new(Self { file, path })
    }

    pub(super) async fn read(self: &Arc<Self>, range: Range<u64>) -> Result<Bytes> {
        let source = self.clone();
        blocking::run(move || {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            source.file.read_exact_at(&mut bytes, range.start).on("read", &source.path)?;
            Ok(bytes.into())
        })
        .await
    }
}

/// How a file is cut.
#[derive(Debug, Clone, Copy)]
struct Plan {
    size: u64,
    part_bytes: u64,
    parallel: u64,
}

impl Plan {
    fn of(size: u64) -> Self {
        let part_bytes = size.div_ceil(PARTS_MAX).next_multiple_of(1 << 20).max(PART_BYTES_MIN);
        Self { size, part_bytes, parallel: (PARALLEL_BYTES / part_bytes).max(1) }
    }

    /// The parts and their numbers, which begin at 1.
    fn parts(self) -> impl Iterator<Item = (i32, Range<u64>)> {
        (1..).zip((0..self.size).step_by(self.part_bytes as usize)).map(move |(number, start)| {
            let end = self.size.min(start + self.part_bytes);
            (number, start..end)
        })
    }
}

/// Uploads a file in parts.
pub(super) async fn run(store: &S3, key: &str, file: Arc<Source>, size: u64) -> Result<()> {
    let plan = Plan::of(size);
    let upload = Upload::begin(store, key).await.map_err(|fault| fault.on("put", key))?;
    let parts = stream::iter(plan.parts())
        .map(|(number, range)| upload.part(store, number, file.clone(), range, plan.parallel))
        .buffered(plan.parallel as usize)
        .try_collect()
        .await?;
    upload.complete(store, parts).await.map_err(|fault| fault.on("put", key))
}

/// An upload under way; aborted when dropped.
struct Upload {
    client: Client,
    bucket: String,
    key: String,
    full_key: String,
    id: String,
    put_id: String,
    done: bool,
}

impl Upload {
    async fn begin(store: &S3, key: &str) -> Result<Self, Fault> {
        let (full_key, put_id) = (store.full(key), put_id());
        let request = store.client.create_multipart_upload().bucket(&store.bucket).key(&full_key);
        let request = request.metadata(PUT_ID, &put_id).checksum_algorithm(ChecksumAlgorithm::Crc32);
        // One that was begun twice, because an answer was lost, leaves an upload without parts, which costs nothing.
        let begun = store.send(WRITE_WITHIN, 0, || request.clone().send()).await?;
        let id = begun.upload_id.ok_or_else(|| Fault::new(Kind::Refused, "a multipart upload was given no id"))?;
        let (client, bucket, key) = (store.client.clone(), store.bucket.clone(), key.to_owned());
        Ok(Self { client, bucket, key, full_key, id, put_id, done: false })
    }

    async fn part(
        &self,
        store: &S3,
        number: i32,
        file: Arc<Source>,
        range: Range<u64>,
        parallel: u64,
    ) -> Result<CompletedPart> {
        let bytes = file.read(range).await?;
        let send = || {
            let request = self.client.upload_part().bucket(&self.bucket).key(&self.full_key).upload_id(&self.id);
            let request = request.part_number(number).checksum_algorithm(ChecksumAlgorithm::Crc32);
            request.body(bytes.clone().into()).send()
        };
        // The others under way take their share of the line.
        let moved = bytes.len() as u64 * parallel;
        let stored = store.send(WRITE_WITHIN, moved, send).await.map_err(|fault| fault.on("put", &self.key))?;
        Ok(CompletedPart::builder()
            .part_number(number)
            .set_e_tag(stored.e_tag)
            .set_checksum_crc32(stored.checksum_crc32)
            .build())
    }

    async fn complete(mut self, store: &S3, parts: Vec<CompletedPart>) -> Result<(), Fault> {
        // A store may copy the parts together before it answers.
        let moved = parts.len() as u64 * PART_BYTES_MIN / PARALLEL_PARTS;
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = self.client.complete_multipart_upload().bucket(&self.bucket).key(&self.full_key);
        let request = request.upload_id(&self.id).multipart_upload(parts);
        match store.send(WRITE_WITHIN, moved, || request.clone().send()).await {
            Ok(_) => {}
            // It was completed by an attempt whose answer was lost, if the object is this upload's.
            Err(fault) if fault.kind == Kind::NoSuchUpload => match store.look(&self.key).await? {
                Some(found) if put_id_of(&found) == Some(&self.put_id) => {}
                _ => return Err(fault),
            },
            Err(fault) => return Err(fault),
        }
        self.done = true;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.done {
            return;
        }
        let abort = self.client.abort_multipart_upload().bucket(&self.bucket).key(&self.full_key).upload_id(&self.id);
        let key = std::mem::take(&mut self.key);
        // Nobody is left to wait for it: the call has failed, or was dropped. It ends by itself, soon.
        runtime.spawn(async move {
            match timeout(ABORT_WITHIN, abort.send()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(key, fault = %Fault::of(&error).message, "parts of an upload are left")
                }
                Err(_) => tracing::warn!(key, "parts of an upload are left: the abort was not answered"),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_in_one_part_and_the_limits_are_kept() {
        let (mib, gib, tib) = (1 << 20, 1_u64 << 30, 1_u64 << 40);
        for size in [16 * mib + 1, 32 * mib, 33 * mib - 7, 156 * gib, 157 * gib, 5 * tib, 48 * tib] {
            let plan = Plan::of(size);
            let (mut end, mut count) = (0, 0);
            for (number, range) in plan.parts() {
                count += 1;
                assert_eq!((number, range.start), (count, end), "{size}");
                assert!(range.end > range.start, "{size}");
                end = range.end;
            }
            assert_eq!(end, size);
            assert!(count as u64 <= PARTS_MAX, "{size}: {count} parts");
            assert!(plan.part_bytes >= 5 * mib && plan.part_bytes <= 5 * gib, "{size}: {plan:?}");
            assert!((1..=PARALLEL_PARTS).contains(&plan.parallel), "{size}: {plan:?}");
            assert!(plan.parallel * plan.part_bytes <= PARALLEL_BYTES.max(plan.part_bytes), "{size}: {plan:?}");
        }
    }
}
