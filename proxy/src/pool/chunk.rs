//! A buffer whose bytes are looked at, and may be cut, before they go on.
//!
//! ```text
//!   0        start     ready      end        capacity
//!   │ gone   │ may go  │ unread   │ free      │
//! ```

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// LIMIT: two TLS records; big enough that bulk data costs few system calls.
pub const SIZE: usize = 16 * 1024;

/// The buffer. It has no memory before its first use.
#[derive(Debug, Default)]
pub struct Chunk {
    bytes: Vec<u8>,
    start: usize,
    ready: usize,
    end: usize,
}

impl Chunk {
    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether something may go.
    pub fn has_ready(&self) -> bool {
        self.start < self.ready
    }

    /// What has not been looked at, or not to its end.
    pub fn unread(&mut self) -> &mut [u8] {
        &mut self.bytes[self.ready..self.end]
    }

    /// What may go and has not.
    pub fn ready(&self) -> &[u8] {
        &self.bytes[self.start..self.ready]
    }

    /// Of what is unread, `read` bytes have been looked at, and the first `kept` of them may go; the others are cut out.
    pub fn advance(&mut self, read: usize, kept: usize) {
        if kept < read {
            self.bytes.copy_within(self.ready + read..self.end, self.ready + kept);
            self.end -= read - kept;
        }
        self.ready += kept;
        if self.is_empty() {
            (self.start, self.ready, self.end) = (0, 0, 0);
        }
    }

    /// Puts bytes in, unread.
    pub fn put(&mut self, bytes: &[u8]) {
        self.make_room(bytes.len());
        self.bytes[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    /// Takes out what is unread.
    pub fn take_unread(&mut self, into: &mut Vec<u8>) {
        into.extend_from_slice(self.unread());
        self.end = self.ready;
    }

    /// Makes sure that an unread message of that size finds room.
    pub fn want(&mut self, size: usize) {
        let unread = self.end - self.ready;
        self.make_room(size.saturating_sub(unread));
    }

    /// Gives back the memory of an extraordinary message.
    pub fn shrink(&mut self) {
        if self.is_empty() && self.bytes.len() > SIZE {
            *self = Self::default();
        }
    }

    /// Whether a read would find room.
    pub fn has_room(&self) -> bool {
        self.bytes.is_empty() || self.end < self.bytes.len() || self.start > 0
    }

    fn make_room(&mut self, more: usize) {
        if self.start > 0 && self.end + more > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.ready, self.end) = (self.ready - self.start, self.end - self.start);
            self.start = 0;
        }
        let size = (self.end + more).max(SIZE);
        if self.bytes.len() < size {
            self.bytes.resize(size, 0);
        }
    }

    /// Reads once. `Ok(0)` is the end of the stream; there must be room.
    pub fn poll_fill<R: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<io::Result<usize>> {
        self.make_room(1);
        let mut room = ReadBuf::new(&mut self.bytes[self.end..]);
        ready!(Pin::new(from).poll_read(cx, &mut room))?;
        let count = room.filled().len();
        self.end += count;
        Poll::Ready(Ok(count))
    }

    /// Sends once of what may go.
    pub fn poll_drain<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>> {
        match ready!(Pin::new(to).poll_write(cx, &self.bytes[self.start..self.ready])) {
            Ok(0) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => {
                self.start += count;
                if self.is_empty() {
                    (self.start, self.ready, self.end) = (0, 0, 0);
                }
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_does_not_go_and_what_follows_closes_up() {
        let mut chunk = Chunk::default();
        chunk.put(b"abcdef");
        chunk.unread()[1] = b'c';
        chunk.advance(3, 2);
        assert_eq!(chunk.ready(), b"ac");
        assert_eq!(chunk.unread(), b"def");
        chunk.put(&[b'x'; SIZE]);
        assert_eq!(chunk.unread().len(), SIZE + 3);
        let mut taken = Vec::new();
        chunk.take_unread(&mut taken);
        assert_eq!(taken.len(), SIZE + 3);
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        assert!(chunk.poll_drain(cx, &mut Vec::<u8>::new()).is_ready());
        chunk.shrink();
        assert_eq!(chunk.bytes.capacity(), 0);
    }
}
