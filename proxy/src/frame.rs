//! Finds message boundaries in a stream that arrives in arbitrary pieces. Pure: bytes in, pieces out, nothing kept but
//! a header.
//!
//! ```text
//! offset 0   1 byte   tag
//!        1   4 bytes  length, big-endian: counts itself and the body, not the tag
//!        5   …        body
//! ```

/// LIMIT: Postgres 15 refuses longer messages (`PQ_LARGE_MESSAGE_LIMIT`, libpq.h: `MaxAllocSize - 1`).
const LENGTH_MAX: u32 = 0x3fff_ffff - 1;

/// A header that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of type 0x{tag:02x} claims a length of {length}")]
pub struct BadLength {
    tag: u8,
    length: u32,
}

/// Part of one message: a contiguous run of its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The message's tag.
    pub tag: u8,
    /// The message's whole body length.
    pub length: usize,
    /// Whether the body begins here.
    pub first: bool,
    /// Whether the message ends here.
    pub last: bool,
    /// The bytes of the body that are at hand.
    pub body: &'a [u8],
}

/// The place in a stream of messages.
#[derive(Debug, Default, PartialEq)]
pub struct Frame {
    header: [u8; 5],
    /// Bytes of the header that are known; 5 while inside a body.
    have: u8,
    /// Bytes of the body still to come, once the header is known.
    left: u32,
    begun: bool,
}

impl Frame {
    /// Whether the next byte begins a message.
    pub fn at_boundary(&self) -> bool {
        self.have == 0
    }

    /// How many bytes of the message begun are still to come, as far as is known: a header not yet whole says nothing
    /// of its body.
    pub fn missing(&self) -> usize {
        match self.have {
            0 => 0,
            5 => self.left as usize,
            have => 5 - usize::from(have),
        }
    }

    /// Takes the next piece off the front of `bytes`, or `None` once they are used up.
    ///
    /// # Errors
    /// If a header is impossible; the place is lost then.
    #[inline]
    pub fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Result<Option<Piece<'a>>, BadLength> {
        if self.have < 5 {
            if !self.fill_header(bytes) {
                return Ok(None);
            }
            let length = u32::from_be_bytes([self.header[1], self.header[2], self.header[3], self.header[4]]);
            if !(4..=LENGTH_MAX).contains(&length) {
                return Err(BadLength { tag: self.header[0], length });
            }
            self.left = length - 4;
            self.begun = false;
        }
        if bytes.is_empty() && self.left > 0 {
            return Ok(None);
        }
        let take = bytes.len().min(self.left as usize);
        let (body, rest) = bytes.split_at(take);
        *bytes = rest;
        self.left -= take as u32;
        let first = !std::mem::replace(&mut self.begun, true);
        let last = self.left == 0;
        if last {
            self.have = 0;
        }
        Ok(Some(Piece { tag: self.header[0], length: self.body_length(), first, last, body }))
    }

    fn body_length(&self) -> usize {
        u32::from_be_bytes([self.header[1], self.header[2], self.header[3], self.header[4]]) as usize - 4
    }

    #[inline]
    fn fill_header(&mut self, bytes: &mut &[u8]) -> bool {
        let have = usize::from(self.have);
        let take = bytes.len().min(5 - have);
        let (head, rest) = bytes.split_at(take);
        self.header[have..have + take].copy_from_slice(head);
        self.have += take as u8;
        *bytes = rest;
        self.have == 5
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::message;

    type Messages = Vec<(u8, Vec<u8>)>;

    /// Feeds the chunks and puts the pieces together again.
    fn collect<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Result<(Messages, bool), BadLength> {
        let mut frame = Frame::default();
        let mut messages = Messages::new();
        let mut open = false;
        for mut chunk in chunks {
            while let Some(piece) = frame.next(&mut chunk)? {
                assert_eq!(piece.first, !open, "`first` marks the begin of a body");
                if piece.first {
                    messages.push((piece.tag, Vec::new()));
                }
                let (tag, body) = messages.last_mut().unwrap();
                assert_eq!(*tag, piece.tag);
                body.extend_from_slice(piece.body);
                open = !piece.last;
                assert_eq!(body.len() == piece.length, piece.last, "`last` marks the end of a body");
            }
            assert!(chunk.is_empty(), "all bytes are taken");
        }
        Ok((messages, frame.at_boundary()))
    }

    fn stream(messages: &[(u8, Vec<u8>)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (tag, body) in messages {
            message(&mut out, *tag, |out| out.extend_from_slice(body));
        }
        out
    }

    #[test]
    fn a_stream_split_at_every_byte_yields_the_same_messages() {
        let messages = vec![(b'Q', b"select 1\0".to_vec()), (b'S', vec![]), (b'd', vec![7; 20]), (b'Z', vec![b'I'])];
        let bytes = stream(&messages);
        for at in 0..=bytes.len() {
            let (head, tail) = bytes.split_at(at);
            assert_eq!(collect([head, tail]).unwrap(), (messages.clone(), true), "split at {at}");
        }
        assert_eq!(collect(bytes.chunks(1)).unwrap(), (messages, true));
        assert!(!collect([&bytes[..3]]).unwrap().1);
        assert!(!collect([&bytes[..7]]).unwrap().1);
    }

    #[test]
    fn impossible_lengths_are_refused() {
        for length in [0_u32, 3, LENGTH_MAX + 1, u32::MAX] {
            let bytes = [&b"Q"[..], &length.to_be_bytes()].concat();
            assert_eq!(collect([&bytes[..]]), Err(BadLength { tag: b'Q', length }));
        }
    }

    proptest! {
        #[test]
        fn any_stream_in_any_pieces(
            messages in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..50)), 0..20),
            size in 1_usize..40,
        ) {
            let bytes = stream(&messages);
            prop_assert_eq!(collect(bytes.chunks(size)).unwrap(), (messages, true));
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), size in 1_usize..40) {
            let _ = collect(bytes.chunks(size));
        }
    }
}
