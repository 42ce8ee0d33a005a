//! Reading and writing single protocol messages, for the parts of a session that are not the hot path.
//!
//! A message is a tag byte, a big-endian length that counts itself but not the tag, and a body
//! (PostgreSQL 15, chapter 55.7). Start-up packets have no tag.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Appends a tagged message whose body `fill` writes.
pub fn message(out: &mut Vec<u8>, tag: u8, fill: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    untagged(out, fill);
}

/// Appends a length and the body `fill` writes: the form of start-up packets.
pub fn untagged(out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let length = u32::try_from(out.len() - at).expect("our own messages are far below 4 GiB");
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

/// Appends a zero-terminated string. An inner zero would end it early, so text is cut there.
pub fn cstr(out: &mut Vec<u8>, text: impl AsRef<[u8]>) {
    let text = text.as_ref();
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    out.extend_from_slice(&text[..end]);
    out.push(0);
}

/// Takes fields off the front of a body; `None` where the body is too short.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// A zero-terminated string, without its zero.
    pub fn cstr(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|&b| b == 0)?;
        let text = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Some(text)
    }

    /// That many bytes.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    /// A 16-bit integer.
    pub fn i16(&mut self) -> Option<i16> {
        Some(i16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }

    /// A 32-bit integer.
    pub fn i32(&mut self) -> Option<i32> {
        Some(i32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    /// A column of a row: a length and that many bytes, or −1 for null.
    pub fn column(&mut self) -> Option<Option<&'a [u8]>> {
        match self.i32()? {
            -1 => Some(None),
            length => self.bytes(usize::try_from(length).ok()?).map(Some),
        }
    }
}

/// Reads one tagged message into `body` and answers its tag. Reads not a byte more than that message.
///
/// Not cancel-safe: dropped half-way, the place in the stream is lost.
///
/// # Errors
/// `InvalidData` if the length is impossible or above `max`; else what the stream says.
pub async fn read_message<R: AsyncRead + Unpin>(from: &mut R, body: &mut Vec<u8>, max: usize) -> io::Result<u8> {
    let mut header = [0; 5];
    from.read_exact(&mut header).await?;
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    let Some(length) = length.checked_sub(4).filter(|&length| length <= max) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message has an impossible length"));
    };
    body.clear();
    body.resize(length, 0);
    from.read_exact(body).await?;
    Ok(header[0])
}

/// A named field of an `ErrorResponse` or `NoticeResponse` body.
pub fn error_field(body: &[u8], field: u8) -> Option<&[u8]> {
    let mut fields = Fields(body);
    loop {
        let tag = *fields.bytes(1)?.first()?;
        let text = fields.cstr()?;
        if tag == field {
            return Some(text);
        }
    }
}
