//! The bytes of a layer's object in the bucket, specified in `docs/formats/layer.md`.
//!
//! ```text
//! header | frame | frame | … | index | footer
//! ```

use ebb_types::LayerId;

use super::Ino;
use super::codec::{Input, put, put_bytes};

const MAGIC: &[u8; 8] = b"EBBLAYER";
const FOOTER_MAGIC: &[u8; 8] = b"EBBLFOOT";
const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: u64 = 32;
pub(super) const FOOTER_BYTES: u64 = 96;

/// LIMIT: 16 pages, 128 KiB. Smaller frames compress worse and cost more index; larger ones make a cold read of one
/// page fetch more than it needs.
pub(super) const FRAME_PAGES: usize = 16;

/// LIMIT: readers take frames up to 1 MiB, so that writers may choose larger ones without a new format version.
const FRAME_PAGES_MAX: u64 = 128;

/// LIMIT: far more than the manifest or the roles of any cluster; a length beyond it is not one of ours.
const WHOLE_FILE_BYTES_MAX: u64 = 1 << 30;

/// How to find and check the frames of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Index {
    /// The WAL files; frames name them by their place here.
    pub wal_files: Vec<WalFile>,
    /// The frames, in the order in which they stand in the object, without gaps.
    pub frames: Vec<Frame>,
}

/// One file of the layer's `wal/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WalFile {
    pub name: String,
    pub size: u64,
}

/// One frame of the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub content: Content,
    /// Its length in the object.
    pub object_bytes: u64,
    /// BLAKE3 of its bytes in the object.
    pub checksum: [u8; 32],
}

/// What a frame holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// Compressed pages of data files.
    Pages(Vec<Piece>),
    /// Compressed 8 KiB blocks of WAL files.
    Wal(Vec<Piece>),
    /// The compressed `roles.json`, of this length.
    Roles { raw_bytes: u64 },
    /// The `manifest`, as it is.
    Manifest,
}

/// Neighbouring pages of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Inode number, or place among the WAL files.
    pub file: Ino,
    /// First page.
    pub start: u32,
    /// How many.
    pub pages: u32,
}

/// How to find and check the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Footer {
    pub index_offset: u64,
    pub index_bytes: u64,
    /// Bytes of all pages and WAL blocks in the layer, uncompressed.
    pub raw_bytes: u64,
    pub index_checksum: [u8; 32],
}

const CONTENT_PAGES: u8 = 0;
const CONTENT_WAL: u8 = 1;
const CONTENT_ROLES: u8 = 2;
const CONTENT_MANIFEST: u8 = 3;

/// The only bytes with which the object of this layer can begin.
pub(super) fn header(id: LayerId) -> [u8; HEADER_BYTES as usize] {
    let mut bytes = [0; HEADER_BYTES as usize];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..].copy_from_slice(id.as_bytes());
    bytes
}

/// Tells what is wrong with a header.
pub(super) fn check_header(id: LayerId, bytes: &[u8]) -> Result<(), String> {
    if bytes == header(id) {
        return Ok(());
    }
    match bytes.first_chunk::<12>() {
        Some([magic @ .., a, b, c, d]) if magic == MAGIC && [*a, *b, *c, *d] != VERSION.to_le_bytes() => {
            let version = u32::from_le_bytes([*a, *b, *c, *d]);
            Err(format!("its format version is {version}; this build reads {VERSION}"))
        }
        _ => Err("it does not begin as this layer must".to_owned()),
    }
}

impl Footer {
    pub(super) fn encode(&self, id: LayerId) -> [u8; FOOTER_BYTES as usize] {
        let mut bytes = [0; FOOTER_BYTES as usize];
        bytes[0..8].copy_from_slice(&self.index_offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.index_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.raw_bytes.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.index_checksum);
        let checksum = footer_checksum(id, &bytes[..56]);
        bytes[56..88].copy_from_slice(&checksum);
        bytes[88..].copy_from_slice(FOOTER_MAGIC);
        bytes
    }

    /// Reads the last bytes of an object of `object_bytes` bytes.
    pub(super) fn decode(id: LayerId, object_bytes: u64, bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 != FOOTER_BYTES || &bytes[88..] != FOOTER_MAGIC {
            return Err("it does not end as a layer does; it may be cut short".to_owned());
        }
        if bytes[56..88] != footer_checksum(id, &bytes[..56]) {
            return Err("the checksum of its footer does not match".to_owned());
        }
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let index_checksum = bytes[24..56].try_into().expect("32 bytes");
        let footer = Self { index_offset: number(0), index_bytes: number(8), raw_bytes: number(16), index_checksum };
        let end = footer.index_offset.checked_add(footer.index_bytes).and_then(|end| end.checked_add(FOOTER_BYTES));
        if footer.index_offset < HEADER_BYTES || end != Some(object_bytes) {
            return Err(format!("its footer is that of an object of another length than {object_bytes} bytes"));
        }
        Ok(footer)
    }
}

/// The header is part of it, so that every byte of an object is under a checksum.
fn footer_checksum(id: LayerId, fields: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(&header(id)).update(fields).finalize().as_bytes()
}

impl Index {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, self.wal_files.len() as u64);
        for file in &self.wal_files {
            put_bytes(&mut out, file.name.as_bytes());
            put(&mut out, file.size);
        }
        put(&mut out, self.frames.len() as u64);
        for frame in &self.frames {
            put(&mut out, frame.object_bytes);
            out.extend_from_slice(&frame.checksum);
            match &frame.content {
                Content::Pages(pieces) => put_pieces(&mut out, CONTENT_PAGES, pieces),
                Content::Wal(pieces) => put_pieces(&mut out, CONTENT_WAL, pieces),
                Content::Roles { raw_bytes } => {
                    out.push(CONTENT_ROLES);
                    put(&mut out, *raw_bytes);
                }
                Content::Manifest => out.push(CONTENT_MANIFEST),
            }
        }
        out
    }

    /// Reads the index that `footer` leads to.
    pub(super) fn decode(footer: &Footer, bytes: &[u8]) -> Result<Self, String> {
        if blake3::hash(bytes) != footer.index_checksum {
            return Err("the checksum of its index does not match".to_owned());
        }
        let index = decode_index(bytes).ok_or("its index is malformed")?;
        let length = index.frames.iter().try_fold(HEADER_BYTES, |at, frame| at.checked_add(frame.object_bytes));
        if length != Some(footer.index_offset) {
            return Err("its frames do not fill the space before its index".to_owned());
        }
        if index.frames.iter().filter(|frame| frame.content == Content::Manifest).count() != 1 {
            return Err("it does not have exactly one manifest".to_owned());
        }
        let wal_pieces = index.frames.iter().filter_map(|frame| match &frame.content {
            Content::Wal(pieces) => Some(pieces),
            _ => None,
        });
        if wal_pieces.flatten().any(|piece| !index.holds_wal(piece)) {
            return Err("a frame holds WAL of a file that its index does not name, or past its end".to_owned());
        }
        Ok(index)
    }

    fn holds_wal(&self, piece: &Piece) -> bool {
        let end = u64::from(piece.start) + u64::from(piece.pages);
        let file = usize::try_from(piece.file).ok().and_then(|at| self.wal_files.get(at));
        file.is_some_and(|file| end <= super::pages_of(file.size))
    }
}

impl Content {
    /// Length after decompression.
    pub(super) fn raw_bytes(&self) -> Option<usize> {
        match self {
            Content::Pages(pieces) | Content::Wal(pieces) => {
                let pages: usize = pieces.iter().map(|piece| piece.pages as usize).sum();
                Some(pages * super::BLOCK_BYTES as usize)
            }
            Content::Roles { raw_bytes } => usize::try_from(*raw_bytes).ok(),
            Content::Manifest => None,
        }
    }
}

fn put_pieces(out: &mut Vec<u8>, content: u8, pieces: &[Piece]) {
    out.push(content);
    put(out, pieces.len() as u64);
    for piece in pieces {
        put(out, piece.file);
        put(out, u64::from(piece.start));
        put(out, u64::from(piece.pages));
    }
}

fn decode_index(bytes: &[u8]) -> Option<Index> {
    let mut input = Input(bytes);
    let wal_files = input.many(2, |input| {
        let name = String::from_utf8(input.bytes()?.to_vec()).ok()?;
        let size = input.u64()?;
        (is_wal_file_name(&name) && size <= WHOLE_FILE_BYTES_MAX).then_some(WalFile { name, size })
    })?;
    let frames = input.many(1 + 32 + 1, |input| {
        let object_bytes = input.u64()?;
        let checksum = input.array()?;
        let content = match input.array()? {
            [CONTENT_PAGES] => Content::Pages(decode_pieces(input)?),
            [CONTENT_WAL] => Content::Wal(decode_pieces(input)?),
            [CONTENT_ROLES] => {
                Content::Roles { raw_bytes: input.u64().filter(|&bytes| bytes <= WHOLE_FILE_BYTES_MAX)? }
            }
            [CONTENT_MANIFEST] => Content::Manifest,
            _ => return None,
        };
        (object_bytes <= WHOLE_FILE_BYTES_MAX).then_some(Frame { content, object_bytes, checksum })
    })?;
    input.0.is_empty().then_some(Index { wal_files, frames })
}

fn decode_pieces(input: &mut Input<'_>) -> Option<Vec<Piece>> {
    let mut pages = 0;
    input.many(3, |input| {
        let piece = Piece { file: input.u64()?, start: input.u32()?, pages: input.u32()? };
        pages += u64::from(piece.pages);
        let fits = piece.pages > 0 && pages <= FRAME_PAGES_MAX && piece.start.checked_add(piece.pages).is_some();
        fits.then_some(piece)
    })
}

/// Segments, partial segments and history files: nothing that could lead out of the directory.
pub(super) fn is_wal_file_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'.';
    !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.bytes().all(allowed)
}
