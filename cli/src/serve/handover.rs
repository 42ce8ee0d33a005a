//! Handing the ports to the process that follows (`ebb serve --take-over`).
//!
//! ```text
//!   new                                           old
//!   settings, checks, bucket        DATA/handover.sock listens
//!     ── "take over" ───────────────────────────►
//!     ◄── three listening sockets ───────────────  (both have them now)
//!     ── "taken" ───────────────────────────────►
//!   waits for the lock               accepts nobody; newcomers are served; transactions end;
//!                                    computes go on; gives up the lock; ends
//!   takes the lock, adopts the computes, accepts
//! ```
//!
//! Whoever connects meanwhile waits in the queue of a socket that is never closed: there is no moment at which a client is
//! refused. **Crash**: if the new process dies before it has said "taken", nothing has happened; after that, the old one
//! stops as it would by itself, and computes it had left are adopted by the next start. If the old one dies, its lock is
//! free, and the new one goes on.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebb_types::ErrorKind;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tokio::sync::oneshot;

use crate::failure::Failure;

/// What the new process asks for, and how it says that it has it. Another version of this file has another line.
const ASK: &[u8] = b"ebb take over 1\n";
const GIVEN: &[u8] = b"given\n";
const TAKEN: &[u8] = b"taken\n";

/// Sockets handed over.
const SOCKETS: usize = 3;

/// LIMIT: what both say is said at once.
const TALK_WITHIN: Duration = Duration::from_secs(5);

/// The listening sockets of a server.
#[derive(Debug)]
pub struct Listeners {
    /// Of Postgres clients.
    pub proxy: TcpListener,
    /// Of the API.
    pub api: TcpListener,
    /// Of other nodes.
    pub peers: TcpListener,
}

/// Whether a socket listens where the settings want it. Port 0 is any port of its address.
pub fn fits(wanted: SocketAddr, socket: &TcpListener) -> bool {
    let Ok(has) = socket.local_addr() else { return false };
    has.ip() == wanted.ip() && (wanted.port() == 0 || has.port() == wanted.port())
}

fn path(data: &Path) -> PathBuf {
    data.join("handover.sock")
}

/// Asks the server that runs on a data directory for its sockets; `None` if none runs. It stops then.
///
/// # Errors
/// If it runs and does not give them.
pub fn take(data: &Path) -> Result<Option<Listeners>, Failure> {
    let mut stream = match UnixStream::connect(path(data)) {
        Ok(stream) => stream,
        // Nobody is there, or somebody was killed: the lock tells.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(Failure::internal("cannot reach the server that is to be followed", &error)),
    };
    let mut talk = || -> io::Result<Listeners> {
        bound(&stream)?;
        stream.write_all(ASK)?;
        let listeners = receive(&stream)?;
        stream.write_all(TAKEN)?;
        Ok(listeners)
    };
    talk().map(Some).map_err(|error| {
        Failure::new(ErrorKind::Unavailable, "the server that runs on the data directory did not hand over")
            .because(&error)
            .hint(
                "It goes on. Is it of a version that hands over? Else stop it, and start this one without --take-over.",
            )
    })
}

/// Gives the sockets of this server to the process that asks for them.
#[derive(Debug)]
pub struct Successor {
    path: PathBuf,
    taken: oneshot::Receiver<()>,
}

impl Successor {
    /// Listens for it.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn listen(data: &Path, listeners: Listeners) -> Result<Self, Failure> {
        let path = path(data);
        let make = || -> io::Result<UnixListener> {
            // A killed server leaves its own.
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener = make().map_err(|error| Failure::internal(format!("cannot listen on {path:?}"), &error))?;
        let (sender, taken) = oneshot::channel();
        // It waits in `accept` for as long as the process lives.
        std::thread::Builder::new()
            .name("ebb-handover".to_owned())
            .spawn(move || give(&listener, &listeners, sender))
            .map_err(|error| Failure::internal("cannot start a thread", &error))?;
        Ok(Self { path, taken })
    }

    /// Waits until somebody has taken the sockets over. Cancel-safe.
    pub async fn taken(&mut self) {
        if (&mut self.taken).await.is_err() {
            // It could not listen any more, and said so: nobody will come.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn give(listener: &UnixListener, listeners: &Listeners, taken: oneshot::Sender<()>) {
    loop {
        let given = listener.accept().and_then(|(stream, _)| hand(stream, listeners));
        match given {
            Ok(()) => {
                let _ = taken.send(());
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "somebody asked to take over, and did not");
                // Whatever is wrong with the socket, the processor is not to pay for it.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn hand(mut stream: UnixStream, listeners: &Listeners) -> io::Result<()> {
    bound(&stream)?;
    expect(&mut stream, ASK)?;
    let sockets = [listeners.proxy.as_fd(), listeners.api.as_fd(), listeners.peers.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::Error::other("the sockets do not fit into one message"));
    }
    sendmsg(&stream, &[IoSlice::new(GIVEN)], &mut control, SendFlags::NOSIGNAL)?;
    expect(&mut stream, TAKEN)
}

fn receive(stream: &UnixStream) -> io::Result<Listeners> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut said = [0; GIVEN.len()];
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut said)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let sockets = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    let sockets: Vec<OwnedFd> = sockets.flatten().collect();
    if said[..got.bytes] != *GIVEN {
        return Err(io::Error::other("it answers in another way"));
    }
    let [proxy, api, peers] = <[OwnedFd; SOCKETS]>::try_from(sockets)
        .map_err(|sockets| io::Error::other(format!("it gave {} sockets instead of {SOCKETS}", sockets.len())))?
        .map(TcpListener::from);
    Ok(Listeners { proxy, api, peers })
}

fn expect(stream: &mut UnixStream, line: &[u8]) -> io::Result<()> {
    let mut said = vec![0; line.len()];
    stream.read_exact(&mut said)?;
    if said == line { Ok(()) } else { Err(io::Error::other("it says something else")) }
}

fn bound(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(TALK_WITHIN))?;
    stream.set_write_timeout(Some(TALK_WITHIN))
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    fn listeners() -> (Listeners, SocketAddr) {
        let one = || TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners = Listeners { proxy: one(), api: one(), peers: one() };
        let addr = listeners.proxy.local_addr().unwrap();
        (listeners, addr)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_connects_meanwhile_is_answered_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (old, addr) = listeners();
        let mut successor = Successor::listen(dir.path(), old).unwrap();
        let mut early = TcpStream::connect(addr).unwrap();
        let data = dir.path().to_owned();
        let taken = tokio::task::spawn_blocking(move || take(&data)).await.unwrap().unwrap().unwrap();
        successor.taken().await;
        drop(successor);
        assert!(!path(dir.path()).exists());
        // The old process is gone now; neither of them is refused.
        let mut late = TcpStream::connect(addr).unwrap();
        for client in [&mut early, &mut late] {
            let (mut accepted, _) = taken.proxy.accept().unwrap();
            accepted.write_all(b"x").unwrap();
            client.read_exact(&mut [0]).unwrap();
        }
        assert!(fits("127.0.0.1:0".parse().unwrap(), &taken.proxy));
        assert!(!fits("127.0.0.1:1".parse().unwrap(), &taken.proxy));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_asks_and_goes_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut successor = Successor::listen(dir.path(), listeners().0).unwrap();
        drop(UnixStream::connect(path(dir.path())).unwrap());
        let mut asks = UnixStream::connect(path(dir.path())).unwrap();
        asks.write_all(ASK).unwrap();
        drop(receive(&asks).unwrap());
        drop(asks);
        let data = dir.path().to_owned();
        assert!(tokio::task::spawn_blocking(move || take(&data)).await.unwrap().unwrap().is_some());
        successor.taken().await;
    }

    #[test]
    fn nobody_to_follow_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        assert!(take(dir.path()).unwrap().is_none());
        drop(UnixListener::bind(path(dir.path())).unwrap());
        assert!(take(dir.path()).unwrap().is_none());
    }
}
