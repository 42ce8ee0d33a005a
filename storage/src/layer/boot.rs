//! The boot set of a layer: the pages that the last wake before its seal had read until Postgres was up, in one object.
//!
//! A node that has nothing local fetches it in one request, and its first wake reads from it instead of asking the bucket
//! page by page. It is a help and never needed: pages are named by the layer they are in, so that each is right for every
//! image in which its layer has that page; and a set that is missing or damaged costs only time.
//!
//! Specified in `docs/formats/boot.md`.

use std::collections::HashMap;
use std::io::Read;

use ebb_types::LayerId;

use super::codec::{Input, put};
use super::pack::PAGE;
use super::{BLOCK_BYTES, Ino};
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"EBBBOOTS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 36;
const CHECKSUM_BYTES: usize = 32;

/// LIMIT: 8 MiB. Postgres 15 reads about 2 MiB until its first row; what is in a boot set is in memory until it is local.
pub(crate) const PAGES_MAX: usize = 1024;

/// LIMIT: pages of catalogs shrink to a fifth; higher levels save little and cost a suspend time.
const ZSTD_LEVEL: i32 = 3;

/// The key of a layer's boot set.
pub fn boot_key(id: LayerId) -> String {
    format!("boot/{id}")
}

/// Pages by the layer, the file and the block where they are.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct BootSet {
    places: HashMap<(LayerId, Ino, u32), usize>,
    pages: Vec<u8>,
}

impl BootSet {
    /// Adds a page, unless it is known or there is no more room.
    pub(crate) fn add(&mut self, layer: LayerId, ino: Ino, block: u32, page: &[u8; PAGE]) {
        let number = self.places.len();
        if number < PAGES_MAX && !self.places.contains_key(&(layer, ino, block)) {
            self.places.insert((layer, ino, block), number);
            self.pages.extend_from_slice(page);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    pub(crate) fn get(&self, layer: LayerId, ino: Ino, block: u32) -> Option<&[u8]> {
        let at = *self.places.get(&(layer, ino, block))? * PAGE;
        self.pages.get(at..at + PAGE)
    }

    /// The same set always gives the same bytes. `head` is the layer it is made for.
    pub(crate) fn encode(&self, head: LayerId) -> Result<Vec<u8>> {
        let mut entries: Vec<_> = self.places.iter().map(|(&place, &number)| (place, number)).collect();
        entries.sort_unstable();
        let mut layers: Vec<LayerId> = entries.iter().map(|((layer, ..), _)| *layer).collect();
        layers.dedup();
        let mut body = Vec::with_capacity(self.pages.len() + 8 * entries.len());
        put(&mut body, layers.len() as u64);
        layers.iter().for_each(|layer| body.extend_from_slice(layer.as_bytes()));
        put(&mut body, entries.len() as u64);
        for ((layer, ino, block), _) in &entries {
            put(&mut body, layers.partition_point(|other| other < layer) as u64);
            put(&mut body, *ino);
            put(&mut body, u64::from(*block));
        }
        for (_, number) in &entries {
            body.extend_from_slice(&self.pages[number * PAGE..][..PAGE]);
        }
        let packed = zstd::bulk::compress(&body, ZSTD_LEVEL);
        let packed = packed.map_err(|error| Error::Invalid(format!("a boot set cannot be compressed: {error}")))?;
        let mut out = Vec::with_capacity(HEADER_BYTES + packed.len() + CHECKSUM_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(&(body.len() as u64).to_le_bytes());
        out.extend_from_slice(&packed);
        let checksum = *blake3::hash(&out).as_bytes();
        out.extend_from_slice(&checksum);
        Ok(out)
    }

    /// Reads a boot set, whichever layer it was made for. `what` names it in errors.
    ///
    /// # Errors
    /// `Corrupt` when any byte of it is not what was written.
    pub(crate) fn decode(what: &str, bytes: &[u8]) -> Result<Self> {
        let corrupt = |why: String| Error::Corrupt { what: what.to_owned(), why };
        let body = open(bytes).map_err(corrupt)?;
        decode_body(&body).ok_or_else(|| corrupt("its body is malformed".to_owned()))
    }
}

/// Checks the envelope, and decompresses what is in it.
fn open(bytes: &[u8]) -> Result<Vec<u8>, String> {
    if bytes.len() < HEADER_BYTES + CHECKSUM_BYTES || &bytes[..8] != MAGIC {
        return Err("it does not begin as a boot set does".to_owned());
    }
    let (signed, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    if blake3::hash(signed) != *checksum.first_chunk::<CHECKSUM_BYTES>().ok_or("it is cut short")? {
        return Err("its checksum does not match".to_owned());
    }
    let version = u32::from_le_bytes(*bytes[8..].first_chunk().ok_or("it is cut short")?);
    if version != VERSION {
        return Err(format!("its format version is {version}; this build reads {VERSION}"));
    }
    let length = u64::from_le_bytes(*bytes[28..].first_chunk().ok_or("it is cut short")?);
    // A page and its entry, and a layer for each at most.
    if length > (PAGES_MAX * (PAGE + 16 + 32) + 64) as u64 {
        return Err(format!("it claims a body of {length} bytes"));
    }
    let mut body = Vec::new();
    zstd::Decoder::with_buffer(&signed[HEADER_BYTES..])
        .and_then(|decoder| decoder.take(length + 1).read_to_end(&mut body))
        .map_err(|error| format!("its body does not decompress: {error}"))?;
    match body.len() as u64 == length {
        true => Ok(body),
        false => Err("its body has another length than its header tells".to_owned()),
    }
}

fn decode_body(body: &[u8]) -> Option<BootSet> {
    let mut input = Input(body);
    let layers = input.many(16, Input::layer_id)?;
    let entries = input.many(3, |input| {
        let layer = *layers.get(usize::try_from(input.u64()?).ok()?)?;
        Some((layer, input.u64()?, input.u32()?))
    })?;
    let mut places = HashMap::with_capacity(entries.len());
    for (number, place) in entries.into_iter().enumerate() {
        if places.insert(place, number).is_some() {
            return None;
        }
    }
    let is_whole = input.0.len() as u64 == places.len() as u64 * BLOCK_BYTES && places.len() <= PAGES_MAX;
    is_whole.then(|| BootSet { places, pages: input.0.to_vec() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/layer/golden/boot-v1.bin");

    fn sample() -> BootSet {
        let mut set = BootSet::default();
        for (layer, ino, block) in [(2, 7, 3), (1, 4, 0), (2, 7, 0), (1, 300, 70_000)] {
            let mut page = [0; PAGE];
            let text = format!("block {block} of inode {ino} in layer {layer}; ");
            page.iter_mut().zip(text.bytes().cycle()).for_each(|(to, from)| *to = from);
            set.add(LayerId::for_test(layer), ino, block, &page);
        }
        set
    }

    #[test]
    fn a_boot_set_of_each_version_can_be_read() {
        let golden = &std::fs::read(GOLDEN).unwrap();
        assert_eq!(BootSet::decode("golden", golden).unwrap(), {
            let bytes = sample().encode(LayerId::for_test(3)).unwrap();
            BootSet::decode("sample", &bytes).unwrap()
        });
        let read = BootSet::decode("golden", golden).unwrap();
        let page = read.get(LayerId::for_test(1), 300, 70_000).unwrap();
        assert!(page.starts_with(b"block 70000 of inode 300 in layer 1; "));
        assert_eq!(read.get(LayerId::for_test(1), 7, 3), None, "that page is in another layer");
    }

    #[test]
    #[ignore = "writes the golden file of a new format version"]
    fn write_golden() {
        std::fs::write(GOLDEN, sample().encode(LayerId::for_test(3)).unwrap()).unwrap();
    }

    #[test]
    fn room_is_limited_and_a_page_counts_once() {
        let mut set = BootSet::default();
        for block in 0..2 * PAGES_MAX as u32 {
            set.add(LayerId::for_test(1), 1, block / 2 * 2, &[block as u8; PAGE]);
        }
        assert_eq!(set.len(), PAGES_MAX);
        assert_eq!(set.get(LayerId::for_test(1), 1, 2), Some(&[2; PAGE][..]), "the first one stays");
        let bytes = set.encode(LayerId::for_test(1)).unwrap();
        assert_eq!(BootSet::decode("full", &bytes).unwrap().len(), PAGES_MAX);
    }

    proptest! {
        #[test]
        fn any_flipped_byte_or_cut_is_found(at in any::<prop::sample::Index>(), bit in 0..8_u32, cut in any::<bool>()) {
            let mut bytes = sample().encode(LayerId::for_test(3)).unwrap();
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= 1_u8 << bit;
            }
            let is_corrupt = matches!(BootSet::decode("flipped", &bytes), Err(Error::Corrupt { .. }));
            prop_assert!(is_corrupt);
        }
    }
}
