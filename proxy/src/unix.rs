//! A Unix stream socket whose owner is woken when there is something to read, and not each time its peer has read.
//!
//! On such a socket the kernel reports room to write whenever the peer takes a message off (Linux: `unix_write_space`,
//! af_unix.c). A backend does so at the begin of every query; who listens for it is woken once more per query, for
//! nothing. So only reading is listened for. Once a write finds no room, a second descriptor of the same socket is
//! registered for writing, until writes have gone through for a while.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// LIMIT: so many writes in a row have to go through before room is no longer listened for. Bulk data finds none often.
const CALM_AFTER: u8 = 64;

/// A connected Unix stream socket.
#[derive(Debug)]
pub struct UnixStream {
    reading: AsyncFd<std::os::unix::net::UnixStream>,
    /// The same socket, while there may be no room to write.
    writing: Option<AsyncFd<std::os::unix::net::UnixStream>>,
    /// Writes in a row that went through while `writing` was there.
    calm: u8,
}

impl UnixStream {
    /// Takes over a socket that does not block.
    ///
    /// # Errors
    /// If it cannot be registered.
    pub fn from_std(socket: std::os::unix::net::UnixStream) -> io::Result<Self> {
        Ok(Self { reading: register(socket, Interest::READABLE)?, writing: None, calm: 0 })
    }

    /// Whether its peer is still there and has sent nothing. What it has sent may be lost by asking.
    pub fn is_silent(&self) -> bool {
        let mut socket = self.reading.get_ref();
        matches!(socket.read(&mut [0; 1]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Writes what goes without waiting; answers how much that was.
    ///
    /// # Errors
    /// `WouldBlock` if nothing goes; else what the socket says.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut socket = self.reading.get_ref();
        loop {
            match socket.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

#[expect(deprecated, reason = "std's sockets keep the descriptor they have, which is all that its successor demands")]
fn register(
    socket: std::os::unix::net::UnixStream,
    interest: Interest,
) -> io::Result<AsyncFd<std::os::unix::net::UnixStream>> {
    AsyncFd::with_interest(socket, interest)
}

impl AsyncRead for UnixStream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.reading.poll_read_ready(cx))?;
            let room = buf.initialize_unfilled();
            let mut socket = guard.get_inner();
            match socket.read(room) {
                Ok(count) => {
                    // What did not fill the room has emptied the socket: that need not be found out by another call.
                    if count > 0 && count < room.len() {
                        guard.clear_ready();
                    }
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => guard.clear_ready(),
                    io::ErrorKind::Interrupted => {}
                    _ => return Poll::Ready(Err(error)),
                },
            }
        }
    }
}

impl AsyncWrite for UnixStream {
    #[inline]
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => {
                    if self.writing.is_some() {
                        self.calm += 1;
                        if self.calm >= CALM_AFTER {
                            self.writing = None;
                        }
                    }
                    return Poll::Ready(done);
                }
            }
            self.calm = 0;
            if self.writing.is_none() {
                let twin = self.reading.get_ref().try_clone()?;
                self.writing = Some(register(twin, Interest::WRITABLE)?);
            }
            let writing = self.writing.as_ref().expect("it was just made");
            // Cleared and looked at again: room that came in between is not missed.
            ready!(writing.poll_write_ready(cx))?.clear_ready();
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.reading.get_ref().shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let _ = [&one, &other].map(|socket| socket.set_nonblocking(true).unwrap());
        (UnixStream::from_std(one).unwrap(), UnixStream::from_std(other).unwrap())
    }

    #[tokio::test]
    async fn more_than_fits_goes_through_a_slow_reader_whole() {
        let (mut one, mut other) = pair();
        let sent: Vec<u8> = (0..4_000_000_u32).map(|i| (i % 251) as u8).collect();
        let writing = async {
            one.write_all(&sent).await.unwrap();
            one.shutdown().await.unwrap();
            one
        };
        let reading = async {
            let mut got = Vec::new();
            let mut chunk = vec![0; 3_000];
            loop {
                match other.read(&mut chunk).await.unwrap() {
                    0 => break got,
                    count => got.extend_from_slice(&chunk[..count]),
                }
                tokio::task::yield_now().await;
            }
        };
        let (one, got) = tokio::join!(writing, reading);
        assert!(got == sent, "the bytes differ");
        assert!(one.writing.is_some(), "it had to wait for room");
    }

    #[tokio::test]
    async fn room_is_not_listened_for_once_writes_go_through() {
        let (mut one, mut other) = pair();
        while one.try_write(&[0; 4096]).is_ok() {}
        let writing = async { one.write_all(b"x").await.unwrap() };
        let reading = async { while other.read(&mut [0; 4096]).await.unwrap() == 4096 {} };
        tokio::join!(writing, reading);
        assert!(one.writing.is_some());
        for _ in 0..CALM_AFTER {
            one.write_all(b"x").await.unwrap();
            other.read_u8().await.unwrap();
        }
        assert!(one.writing.is_none());
    }

    #[tokio::test]
    async fn the_end_of_the_peer_is_seen() {
        let (mut one, other) = pair();
        drop(other);
        assert_eq!(one.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(one.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
