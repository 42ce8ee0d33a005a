//! The unit's control socket: takes requests off the wire and hands them, one by one, to the task that owns the unit.

use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::control::{Reply, Request, receive, send};

/// LIMIT: one connection for each act under way and one that waits for the unit's end; more is a fault of ours.
const CONNECTIONS_MAX: usize = 64;

/// A request and the way back to whoever made it.
#[derive(Debug)]
pub(super) struct Ask {
    pub request: Request,
    pub reply: oneshot::Sender<Reply>,
}

/// Serves the socket until `closing`; then every connection ends once its reply is out. Wait for `tracker`.
pub(super) async fn serve(
    listener: UnixListener,
    asks: mpsc::Sender<Ask>,
    closing: CancellationToken,
    tracker: TaskTracker,
) {
    let slots = std::sync::Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = closing.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let (asks, closing) = (asks.clone(), closing.clone());
                tracker.spawn(async move {
                    // A peer that went away needs no answer.
                    let _ = converse(stream, asks, closing).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a control connection was not accepted");
                // Out of descriptors, most likely: give others time to close theirs.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, asks: mpsc::Sender<Ask>, closing: CancellationToken) -> std::io::Result<()> {
    let (from, mut to) = stream.split();
    let mut from = BufReader::new(from);
    loop {
        let request = tokio::select! {
            request = receive(&mut from) => request?,
            () = closing.cancelled() => return Ok(()),
        };
        let Some(request) = request else { return Ok(()) };
        let (reply, answered) = oneshot::channel();
        if asks.send(Ask { request, reply }).await.is_err() {
            return Ok(());
        }
        // No answer: the unit is ending. Closing the connection says so.
        let Ok(reply) = answered.await else { return Ok(()) };
        send(&mut to, &reply).await?;
    }
}
