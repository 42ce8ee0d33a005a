//! The owner's side: answers other nodes.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ebb_timeline::{Place, Service};
use ebb_types::{BranchId, Hint as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::identity::Identity;
use super::links::Links;
use super::wire::{self, Reply, Request};

/// LIMIT: a node that connects says at once what it wants.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// Answers other nodes until cancelled.
#[derive(Debug)]
pub struct PeerServer {
    pub identity: Identity,
    pub service: Arc<Service>,
    pub links: Arc<Links>,
    /// Where this node's API is.
    pub api: SocketAddr,
}

impl PeerServer {
    /// Takes connections until cancelled; those that are open then end.
    pub async fn run(self, listener: TcpListener, stop: CancellationToken) {
        let (server, tasks) = (Arc::new(self), TaskTracker::new());
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection of another node");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (server, stop) = (server.clone(), stop.clone());
            tasks.spawn(async move {
                tokio::select! {
                    ended = server.serve(stream) => if let Err(error) = ended {
                        tracing::debug!(%error, "a connection of another node ended");
                    },
                    () = stop.cancelled() => {}
                }
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn serve(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let hello = async {
            let mut stream = self.identity.acceptor().accept(stream).await?;
            let request: Request = wire::receive(&mut stream).await?;
            Ok::<_, io::Error>((stream, request))
        };
        let (mut stream, request) = tokio::time::timeout(HELLO_WITHIN, hello).await??;
        match request {
            Request::Wake { branch, .. } => {
                let reply = match self.wake(branch).await {
                    Ok((generation, _)) => Reply::Awake { generation },
                    Err(reply) => reply,
                };
                wire::send(&mut stream, &reply).await
            }
            Request::Hold { time_ms } => {
                let held = self.service.hold(Duration::from_millis(time_ms));
                wire::send(&mut stream, &Reply::Held { held }).await
            }
            Request::TakeOver { by } => {
                self.service.challenged(by);
                wire::send(&mut stream, &Reply::Ready).await
            }
            Request::Verifier { branch, role } => {
                let reply = match self.verifier(branch, &role).await {
                    Ok(verifier) => Reply::Verifier { verifier },
                    Err(error) => refused(&error),
                };
                wire::send(&mut stream, &reply).await
            }
            Request::Connect { guest, branch } => {
                let Some(gone) = self.links.of(guest) else {
                    return wire::send(&mut stream, &Reply::Elsewhere).await;
                };
                let socket = match self.wake(branch).await {
                    Ok((_, socket)) => socket,
                    Err(reply) => return wire::send(&mut stream, &reply).await,
                };
                let postgres = ebb_proxy::connect_socket(&socket).await?;
                wire::send(&mut stream, &Reply::Ready).await?;
                splice(stream, Owned { postgres, service: self.service.clone() }, gone).await
            }
            Request::Api => {
                let api = TcpStream::connect(self.api).await?;
                wire::send(&mut stream, &Reply::Ready).await?;
                splice(stream, api, CancellationToken::new()).await
            }
            Request::Link { guest } => {
                wire::send(&mut stream, &Reply::Ready).await?;
                self.links.keep(guest, stream).await;
                Ok(())
            }
        }
    }

    async fn wake(&self, branch: BranchId) -> Result<(u64, std::path::PathBuf), Reply> {
        match self.service.place(branch).await {
            Ok(Place::Here) => {}
            // Whoever asks finds out who takes over.
            Ok(Place::There(_) | Place::Nowhere) => return Err(Reply::Elsewhere),
            Err(error) => return Err(refused(&error)),
        }
        let unit = self.service.wake(branch).await.map_err(|error| refused(&error))?;
        Ok((unit.generation, unit.socket))
    }

    async fn verifier(&self, branch: BranchId, role: &str) -> ebb_timeline::Result<Option<String>> {
        self.service.verifier(branch, role).await
    }
}

/// What a client at the other node may be told.
fn refused(error: &ebb_timeline::Error) -> Reply {
    // Whoever asks then looks again who is the owner, or becomes it.
    if error.is_elsewhere() || error.is_isolated() {
        return Reply::Elsewhere;
    }
    Reply::Refused { sqlstate: error.sql_state().as_str().to_owned(), message: error.to_string(), hint: error.hint() }
}

/// A Postgres of this node, as long as what it says may be told: a node that was paused, and taken over from meanwhile,
/// does not answer with what was true before.
struct Owned {
    postgres: UnixStream,
    service: Arc<Service>,
}

impl AsyncRead for Owned {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        std::task::ready!(Pin::new(&mut self.postgres).poll_read(cx, buf))?;
        if self.service.may_answer() {
            return Poll::Ready(Ok(()));
        }
        buf.set_filled(before);
        Poll::Ready(Err(io::Error::other("another node may have taken over")))
    }
}

impl AsyncWrite for Owned {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.postgres).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.postgres).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.postgres).poll_shutdown(cx)
    }
}

async fn splice(
    mut one: impl AsyncRead + AsyncWrite + Unpin,
    mut other: impl AsyncRead + AsyncWrite + Unpin,
    cut: CancellationToken,
) -> io::Result<()> {
    tokio::select! {
        ended = copy_bidirectional(&mut one, &mut other) => ended.map(drop),
        () = cut.cancelled() => Ok(()),
    }
}
