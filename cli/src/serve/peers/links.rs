//! The owner's side of links: what other nodes' clients are doing, and how they are held.
//!
//! [`Links`] is the service's [`Clients`] for all of them: those of this node's own proxy, and every guest's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ebb_timeline::clients::{Activity, Clients, Rest, SessionRow, SharedClients};
use ebb_types::{BranchId, NodeId};
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::wire::{self, BranchNews, News, Order, SILENCE_MAX, Said, TELL_EVERY, What};

/// LIMIT: a guest answers when its sessions are set aside; one that is late beyond this is cut off.
const ANSWER_MARGIN: Duration = Duration::from_secs(2);

/// All clients of this node's computes, wherever they are connected.
#[derive(Debug)]
pub struct Links {
    own: SharedClients,
    links: Mutex<HashMap<NodeId, Arc<Link>>>,
}

/// One guest.
#[derive(Debug)]
struct Link {
    orders: mpsc::UnboundedSender<Order>,
    /// Cancelled when the link is gone: every stream of the guest ends with it.
    gone: CancellationToken,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Vec<SessionRow>>>>,
    news: Mutex<(Instant, HashMap<BranchId, BranchNews>)>,
}

impl Links {
    /// Over the clients of this node's own proxy.
    pub fn new(own: SharedClients) -> Self {
        Self { own, links: Mutex::default() }
    }

    /// What ends a guest's streams; `None` if there is no link to it.
    pub fn of(&self, guest: NodeId) -> Option<CancellationToken> {
        self.links.lock().get(&guest).map(|link| link.gone.clone())
    }

    /// Keeps a link until it breaks; a newer one of the same guest replaces it.
    pub async fn keep(&self, guest: NodeId, stream: impl AsyncRead + AsyncWrite + Send + 'static) {
        let (orders, mut next_order) = mpsc::unbounded_channel();
        let link = Arc::new(Link {
            orders,
            gone: CancellationToken::new(),
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
            news: Mutex::new((Instant::now(), HashMap::new())),
        });
        if let Some(old) = self.links.lock().insert(guest, link.clone()) {
            old.gone.cancel();
        }
        let (mut reader, mut writer) = tokio::io::split(stream);
        let sending = async {
            let mut tick = tokio::time::interval(TELL_EVERY);
            loop {
                let said = tokio::select! {
                    Some(order) = next_order.recv() => Said::Order(order),
                    _ = tick.tick() => Said::Alive,
                };
                wire::send(&mut writer, &said).await?;
            }
        };
        let receiving = async {
            loop {
                let news = tokio::time::timeout(SILENCE_MAX, wire::receive(&mut reader)).await;
                match news.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?? {
                    News::Fenced { number, blocked } => {
                        if let Some(waiting) = link.waiting.lock().remove(&number) {
                            let _ = waiting.send(blocked);
                        }
                    }
                    News::Activity { branches } => {
                        let branches = branches.into_iter().map(|news| (news.branch, news)).collect();
                        *link.news.lock() = (Instant::now(), branches);
                    }
                }
            }
        };
        let ended: std::io::Result<()> = tokio::select! {
            ended = sending => ended,
            ended = receiving => ended,
            () = link.gone.cancelled() => Ok(()),
        };
        tracing::debug!(%guest, ?ended, "the link to a guest ended");
        link.gone.cancel();
        link.waiting.lock().clear();
        self.links.lock().retain(|_, other| !Arc::ptr_eq(other, &link));
    }

    fn all(&self) -> Vec<Arc<Link>> {
        self.links.lock().values().cloned().collect()
    }
}

impl Link {
    /// Sends an order, and keeps what waits for an answer to it. A link that is gone has no clients any more.
    fn order(&self, branch: BranchId, what: What, answer: Option<oneshot::Sender<Vec<SessionRow>>>) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(answer) = answer {
            self.waiting.lock().insert(number, answer);
        }
        let _ = self.orders.send(Order { number, branch, what });
    }

    /// Holds the guest's clients. One that does not answer loses its streams, and so its clients their computes.
    async fn fence(&self, branch: BranchId, deadline: Duration, rest: Rest) -> Result<(), Vec<SessionRow>> {
        let (answer, answered) = oneshot::channel();
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        self.order(branch, What::Fence { deadline_ms, rest }, Some(answer));
        let blocked = tokio::select! {
            answered = tokio::time::timeout(deadline + ANSWER_MARGIN, answered) => match answered {
                Ok(Ok(blocked)) => blocked,
                _ => {
                    self.gone.cancel();
                    Vec::new()
                }
            },
            () = self.gone.cancelled() => Vec::new(),
        };
        if blocked.is_empty() { Ok(()) } else { Err(blocked) }
    }
}

#[async_trait]
impl Clients for Links {
    fn activity(&self, branch: BranchId) -> Activity {
        let mut all = self.own.activity(branch);
        for link in self.all() {
            let news = link.news.lock();
            let Some(here) = news.1.get(&branch) else { continue };
            let idle = here.idle_ms.map(|ms| Duration::from_millis(ms) + news.0.elapsed());
            all.idle_for = match (all.idle_for, idle) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
            all.busy += here.busy;
            all.sessions += here.sessions.len();
        }
        all
    }

    fn sessions(&self, branch: BranchId) -> Vec<SessionRow> {
        let mut rows = self.own.sessions(branch);
        for link in self.all() {
            rows.extend(link.news.lock().1.get(&branch).into_iter().flat_map(|news| news.sessions.clone()));
        }
        rows
    }

    async fn fence(&self, branch: BranchId, deadline: Duration, rest: Rest) -> Result<(), Vec<SessionRow>> {
        let links = self.all();
        let own = self.own.fence(branch, deadline, rest);
        let theirs = join_all(links.iter().map(|link| link.fence(branch, deadline, rest)));
        let (own, theirs) = tokio::join!(own, theirs);
        let blocked: Vec<SessionRow> = [own].into_iter().chain(theirs).filter_map(Result::err).flatten().collect();
        if blocked.is_empty() {
            return Ok(());
        }
        // All or none: those that were held go on.
        self.release(branch);
        Err(blocked)
    }

    fn release(&self, branch: BranchId) {
        self.own.release(branch);
        self.all().iter().for_each(|link| link.order(branch, What::Release, None));
    }

    fn forget(&self, branch: BranchId) {
        // What is forgotten is a visit, which has clients of this node alone.
        self.own.forget(branch);
    }

    fn lost(&self, branch: BranchId, generation: u64) {
        self.own.lost(branch, generation);
        self.all().iter().for_each(|link| link.order(branch, What::Lost { generation }, None));
    }
}
