//! What leads to everything in a layer's object (index, manifest), read without its pages.

use bytes::{Bytes, BytesMut};
use ebb_types::LayerId;

use super::Manifest;
use super::fetch::{Source, check_frame, check_pieces, object_key};
use super::format::{Content, FOOTER_BYTES, Footer, HEADER_BYTES, Index};
use crate::blocking;
use crate::error::{Error, Result};
use crate::object_store::Bucket;

/// LIMIT: the first read of an object, from its end: index and manifest of some hundred megabytes of pages. Costs less than
/// another request would.
const TAIL_BYTES: u64 = 256 << 10;

/// LIMIT: where the index is longer, what is read before it, in the same request: there the manifest ends.
const BEFORE_INDEX_BYTES: u64 = 256 << 10;

/// Index and manifest of an object, checked.
#[derive(Debug)]
pub(super) struct Lead {
    /// The end of the object, from its index on.
    pub tail: Bytes,
    pub index: Index,
    pub manifest_bytes: Bytes,
    pub manifest: Manifest,
}

impl Lead {
    /// Reads it in three or four requests, one after the other.
    ///
    /// # Errors
    /// `NoSuchLayer` when the bucket does not have it; `Corrupt` when what was read is not what was packed.
    pub(super) async fn read(bucket: &Bucket, id: LayerId) -> Result<Self> {
        let Some(meta) = bucket.head(&object_key(id)).await? else { return Err(Error::NoSuchLayer(id)) };
        let source = Source { bucket, id, object_bytes: meta.size };
        source.check_length()?;
        let mut known = Known::last(&source, TAIL_BYTES).await?;
        let footer_bytes = known.since(meta.size - FOOTER_BYTES);
        let footer = Footer::decode(id, meta.size, &footer_bytes).map_err(|why| source.corrupt(why))?;
        if footer.index_offset < known.start {
            known.extend(&source, footer.index_offset.saturating_sub(BEFORE_INDEX_BYTES).max(HEADER_BYTES)).await?;
        }
        let tail = known.since(footer.index_offset);
        let (index, tail) = blocking::run(move || {
            let index = Index::decode(&footer, &tail[..footer.index_bytes as usize]);
            (index, tail)
        })
        .await;
        let index = index.map_err(|why| source.corrupt(why))?;
        let manifest_bytes = match known.manifest(&index) {
            Some(bytes) => bytes,
            None => source.manifest(&index).await?,
        };
        let what = source.what();
        let checked = blocking::run(move || -> Result<_> {
            let manifest = Manifest::decode(&format!("the manifest of {what}"), &manifest_bytes)?;
            let corrupt = |why| Error::Corrupt { what, why };
            if manifest.id != id {
                return Err(corrupt(format!("its manifest is that of layer {}", manifest.id)));
            }
            check_pieces(&manifest, &index).map_err(corrupt)?;
            Ok((index, manifest_bytes, manifest))
        });
        let (index, manifest_bytes, manifest) = checked.await?;
        Ok(Self { tail, index, manifest_bytes, manifest })
    }
}

/// The end of an object, as far as it was read.
struct Known {
    start: u64,
    bytes: Bytes,
}

impl Known {
    async fn last(source: &Source<'_>, bytes: u64) -> Result<Self> {
        let start = source.object_bytes.saturating_sub(bytes);
        let read = source.read(start, source.object_bytes - start).await?;
        if read.len() as u64 != source.object_bytes - start {
            return Err(source.corrupt("a read of it came back short".to_owned()));
        }
        Ok(Self { start, bytes: read })
    }

    async fn extend(&mut self, source: &Source<'_>, start: u64) -> Result<()> {
        let before = source.read(start, self.start - start).await?;
        if before.len() as u64 != self.start - start {
            return Err(source.corrupt("a read of it came back short".to_owned()));
        }
        let mut all = BytesMut::with_capacity(before.len() + self.bytes.len());
        all.extend_from_slice(&before);
        all.extend_from_slice(&self.bytes);
        (self.start, self.bytes) = (start, all.freeze());
        Ok(())
    }

    /// From an offset of the object to its end. It must have been read.
    fn since(&self, offset: u64) -> Bytes {
        self.bytes.slice((offset - self.start) as usize..)
    }

    /// The manifest, if it was read by chance and checks.
    fn manifest(&self, index: &Index) -> Option<Bytes> {
        let mut offset = HEADER_BYTES;
        for frame in &index.frames {
            if frame.content == Content::Manifest {
                let from = usize::try_from(offset.checked_sub(self.start)?).ok()?;
                let bytes = self.bytes.slice(from..from + usize::try_from(frame.object_bytes).ok()?);
                return check_frame(frame, &bytes).is_ok().then_some(bytes);
            }
            offset += frame.object_bytes;
        }
        None
    }
}
