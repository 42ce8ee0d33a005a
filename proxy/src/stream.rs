//! The client's side of a connection, plain or TLS, and the buffers between the two sides.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

/// LIMIT: a client that does not take a few hundred bytes in this time will not take them at all.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// LIMIT: how long the last words to a client may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);
/// LIMIT: how much of what a client had already sent is read and thrown away after the last words.
const GOODBYE_BYTES_MAX: usize = 1 << 20;
/// LIMIT: less than two TLS records; big enough that bulk data costs few system calls, small enough for thousands of clients that
/// are slow at once: each may hold one block per direction.
const BLOCK_SIZE: usize = 14 * 1024;
/// LIMIT: blocks a thread keeps for whoever needs one next. More are wanted only by many slow peers at once.
const SPARE_MAX: usize = 64;

thread_local! {
    /// Blocks nobody uses just now.
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A client's connection.
#[derive(Debug)]
pub enum ClientStream {
    /// As it came.
    Plain(TcpStream),
    /// After a TLS handshake.
    Tls(Box<TlsStream<TcpStream>>),
}

impl ClientStream {
    /// Sends a message of the proxy's own.
    ///
    /// # Errors
    /// If the client is gone or does not read.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sending = async {
            self.write_all(bytes).await?;
            self.flush().await
        };
        timeout(SEND_TIMEOUT, sending).await?
    }

    /// Sends the last words and closes.
    ///
    /// What the client sent meanwhile is read first: closing a socket with unread bytes makes the kernel send a reset,
    /// which may overtake the words.
    pub async fn goodbye(mut self, words: &[u8]) {
        let ending = async {
            self.write_all(words).await?;
            self.shutdown().await?;
            let mut scrap = [0; 512];
            let mut left = GOODBYE_BYTES_MAX;
            while left > 0 {
                match self.read(&mut scrap).await? {
                    0 => break,
                    count => left = left.saturating_sub(count),
                }
            }
            io::Result::Ok(())
        };
        // Whether they arrive or not, the connection ends here.
        let _ = timeout(GOODBYE_TIMEOUT, ending).await;
    }
}

impl AsyncRead for ClientStream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            ClientStream::Tls(stream) => Pin::new(&mut **stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for ClientStream {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            ClientStream::Tls(stream) => Pin::new(&mut **stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(_) => Poll::Ready(Ok(())),
            ClientStream::Tls(stream) => Pin::new(&mut **stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Tls(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
        }
    }
}

/// Bytes on their way from one side to the other, in a block that is borrowed from the thread while there are any.
///
/// ```text
///   0        start        released        end        capacity
///   │ sent   │ may be sent │ held back    │ free      │
/// ```
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    released: usize,
    end: usize,
}

impl Buffer {
    /// Whether it holds nothing.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether something may be sent.
    #[inline]
    pub fn has_released(&self) -> bool {
        self.start < self.released
    }

    /// Whether something is held back.
    #[inline]
    pub fn has_held(&self) -> bool {
        self.released < self.end
    }

    /// Whether a read would find room.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.bytes.is_empty() || self.end < self.bytes.len() || self.start > 0
    }

    /// The bytes held back.
    #[inline]
    pub fn held(&self) -> &[u8] {
        &self.bytes[self.released..self.end]
    }

    /// Allows that many more bytes to be sent.
    #[inline]
    pub fn release(&mut self, count: usize) {
        self.released += count;
    }

    /// What may be sent and has not been.
    pub fn released(&self) -> &[u8] {
        &self.bytes[self.start..self.released]
    }

    /// Throws away what may be sent.
    pub fn discard_released(&mut self) {
        self.start = self.released;
    }

    /// Throws away what is held back.
    pub fn discard_held(&mut self) {
        self.end = self.released;
    }

    /// Puts one byte in, held back: what a sleeping session woke up from.
    pub fn push(&mut self, byte: u8) {
        self.allocate();
        self.bytes[self.end] = byte;
        self.end += 1;
    }

    /// Gives the block back if nothing is in it.
    #[inline]
    pub fn free(&mut self) {
        if self.is_empty() && !self.bytes.is_empty() {
            let block = std::mem::take(self).bytes;
            SPARE.with_borrow_mut(|spare| {
                if spare.len() < SPARE_MAX {
                    spare.push(block);
                }
            });
        }
    }

    #[inline]
    fn allocate(&mut self) {
        if self.bytes.is_empty() {
            let spare = SPARE.with_borrow_mut(Vec::pop);
            self.bytes = spare.unwrap_or_else(|| vec![0; BLOCK_SIZE].into());
        }
    }

    /// Makes the room contiguous and at the end.
    fn compact(&mut self) {
        if self.start == self.end {
            (self.start, self.released, self.end) = (0, 0, 0);
        } else if self.end == self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            self.released -= self.start;
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// Reads once, held back. `Ok(0)` is the end of the stream; there must be room.
    #[inline]
    pub fn poll_fill<R: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, from: &mut R) -> Poll<io::Result<usize>> {
        self.allocate();
        self.compact();
        let mut room = ReadBuf::new(&mut self.bytes[self.end..]);
        ready!(Pin::new(from).poll_read(cx, &mut room))?;
        let count = room.filled().len();
        self.end += count;
        Poll::Ready(Ok(count))
    }

    /// Reads once, held back; answers how much, 0 at the end of the stream. There must be room. Cancel-safe.
    ///
    /// # Errors
    /// What the stream says.
    pub async fn fill<R: AsyncRead + Unpin>(&mut self, from: &mut R) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_fill(cx, from)).await
    }

    /// Sends once of what may be sent.
    #[inline]
    pub fn poll_drain<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>> {
        match ready!(Pin::new(to).poll_write(cx, &self.bytes[self.start..self.released])) {
            Ok(0) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => {
                self.start += count;
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_out_as_they_went_in_whatever_is_held_back() {
        let input: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        let mut from = &input[..];
        let mut to = Vec::new();
        let mut buffer = Buffer::default();
        let mut step = 1;
        loop {
            if buffer.has_room() {
                std::future::poll_fn(|cx| buffer.poll_fill(cx, &mut from)).await.unwrap();
            }
            let release = buffer.held().len().min(step);
            buffer.release(release);
            step = step * 7 % 20_000 + 1;
            while buffer.has_released() {
                std::future::poll_fn(|cx| buffer.poll_drain(cx, &mut to)).await.unwrap();
            }
            if from.is_empty() && buffer.is_empty() {
                break;
            }
        }
        assert!(to == input, "the bytes differ");
        buffer.free();
        assert!(buffer.bytes.is_empty());
        assert_eq!(SPARE.with_borrow(Vec::len), 1);
        buffer.allocate();
        assert_eq!(SPARE.with_borrow(Vec::len), 0);
    }
}
