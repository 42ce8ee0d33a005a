//! Numbers and byte strings of the binary formats: LEB128, lengths before contents, no panics on the way back.

use ebb_types::LayerId;

/// Appends a number as LEB128: seven bits a byte, lowest first, the high bit set on all but the last.
pub(super) fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends a length and that many bytes.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// What is still to be read of a body. Every method takes from its front, or tells by `None` that what stands there
/// is not what was wanted.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn u64(&mut self) -> Option<u64> {
        let mut number = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.u64()?.try_into().ok()
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.u64()?.try_into().ok()?;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }

    pub(super) fn layer_id(&mut self) -> Option<LayerId> {
        self.array().map(LayerId::from_bytes)
    }

    /// A count and that many items. A count that the rest cannot hold, at `bytes_min` an item, is refused before
    /// anything is set aside for it.
    pub(super) fn many<T>(&mut self, bytes_min: usize, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count: usize = self.u64()?.try_into().ok()?;
        if count > self.0.len() / bytes_min {
            return None;
        }
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(item(self)?);
        }
        Some(items)
    }
}
