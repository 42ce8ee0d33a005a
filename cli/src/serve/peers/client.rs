//! The guest's side: asks the owner, and makes its Postgres look like one of this node's.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ebb_timeline::clients::SharedClients;
use ebb_timeline::nodes::{Others, Record};
use ebb_types::{BranchId, NodeId, SqlState};
use parking_lot::Mutex;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::identity::{self, Identity};
use super::wire::{self, BranchNews, News, Order, Reply, Request, SILENCE_MAX, Said, TELL_EVERY, What};

/// LIMIT: another node is a round trip away, or gone.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// LIMIT: what another node answers from its memory, or with a look at the bucket.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// LIMIT: a wake that takes longer has failed.
const WAKE_WITHIN: Duration = Duration::from_secs(60);

/// LIMIT: longer than branches stay awake that nobody uses. A wake begins it anew.
const TOLD_FOR: Duration = Duration::from_secs(3600);

/// Why another node's answer was not had.
#[derive(Debug)]
pub enum Unreached {
    /// It does not own what it was asked for, or did not answer: look again who does.
    Elsewhere(io::Error),
    /// No, for a reason that the client may be told.
    Refused { sqlstate: String, message: String, hint: Option<String> },
}

impl From<io::Error> for Unreached {
    fn from(error: io::Error) -> Self {
        Self::Elsewhere(error)
    }
}

/// The other nodes, as this one uses them.
#[derive(Debug)]
pub struct Peers {
    identity: Identity,
    /// Where the sockets are that stand for other nodes' computes.
    dir: PathBuf,
    clients: SharedClients,
    inner: Mutex<Inner>,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Inner {
    links: HashMap<NodeId, Arc<GuestLink>>,
    /// Sockets by branch, and which node they lead to.
    sockets: HashMap<BranchId, Socket>,
}

#[derive(Debug)]
struct Socket {
    node: NodeId,
    path: PathBuf,
    listening: CancellationToken,
}

#[derive(Debug)]
struct GuestLink {
    /// Branches whose clients the owner is told of.
    branches: Mutex<Vec<BranchId>>,
    gone: CancellationToken,
}

impl GuestLink {
    /// Waits for an answer as long as the owner shows that it is there.
    async fn bounded<T>(
        &self,
        within: Duration,
        answer: impl Future<Output = Result<T, Unreached>>,
    ) -> Result<T, Unreached> {
        match self.gone.run_until_cancelled(bounded(within, answer)).await {
            Some(answer) => answer,
            None => Err(io::Error::other("the node does not answer").into()),
        }
    }
}

async fn bounded<T>(within: Duration, answer: impl Future<Output = Result<T, Unreached>>) -> Result<T, Unreached> {
    tokio::time::timeout(within, answer).await.map_err(io::Error::from)?
}

impl Peers {
    /// Prepares to use other nodes; nobody is asked yet. Sockets are made in `dir`, which is emptied.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub fn new(identity: Identity, dir: PathBuf, clients: SharedClients, stop: CancellationToken) -> io::Result<Self> {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&dir)?;
        Ok(Self { identity, dir, clients, inner: Mutex::default(), stop })
    }

    /// Cuts the links to nodes that have not renewed their records, whatever they say: what was asked of them is asked
    /// again of whoever takes over, and what they still answer is not told to anybody. Goes on for ever.
    pub async fn watch(&self, is_gone: impl Fn(NodeId) -> bool) {
        loop {
            tokio::time::sleep(TELL_EVERY).await;
            let links: Vec<_> = self.inner.lock().links.iter().map(|(node, link)| (*node, link.clone())).collect();
            for (node, link) in links {
                if !link.gone.is_cancelled() && is_gone(node) {
                    tracing::warn!(%node, "an owner's record has expired: its link is cut");
                    link.gone.cancel();
                }
            }
        }
    }

    /// Wakes a branch at its owner: its generation, and a socket that leads there.
    ///
    /// # Errors
    /// See [`Unreached`].
    pub async fn wake(self: &Arc<Self>, owner: &Record, branch: BranchId) -> Result<(u64, PathBuf), Unreached> {
        let link = self.link(owner).await?;
        let guest = self.identity.node;
        let (_, reply) = link.bounded(WAKE_WITHIN, self.ask(owner, &Request::Wake { guest, branch })).await?;
        let generation = match reply {
            Reply::Awake { generation } => generation,
            other => return Err(unexpected(other)),
        };
        {
            let mut branches = link.branches.lock();
            if !branches.contains(&branch) {
                branches.push(branch);
            }
        }
        Ok((generation, self.socket(owner, branch, &link)?))
    }

    /// A role's verifier, from the branch's owner.
    ///
    /// # Errors
    /// See [`Unreached`].
    pub async fn verifier(&self, owner: &Record, branch: BranchId, role: &str) -> Result<Option<String>, Unreached> {
        let request = Request::Verifier { branch, role: role.to_owned() };
        match bounded(ANSWER_WITHIN, self.ask(owner, &request)).await? {
            (_, Reply::Verifier { verifier }) => Ok(verifier),
            (_, other) => Err(unexpected(other)),
        }
    }

    /// A stream to another node's API.
    ///
    /// # Errors
    /// See [`Unreached`].
    pub async fn api(&self, owner: &Record) -> Result<TlsStream<TcpStream>, Unreached> {
        match bounded(ANSWER_WITHIN, self.ask(owner, &Request::Api)).await? {
            (stream, Reply::Ready) => Ok(stream),
            (_, other) => Err(unexpected(other)),
        }
    }

    async fn ask(&self, owner: &Record, request: &Request) -> Result<(TlsStream<TcpStream>, Reply), Unreached> {
        let address = owner.peer.as_ref().ok_or_else(|| io::Error::other("the node told no address"))?;
        let connected = async {
            let stream = TcpStream::connect(address.as_str()).await?;
            stream.set_nodelay(true)?;
            let mut stream = self.identity.connector().connect(identity::server_name(owner.node), stream).await?;
            wire::send(&mut stream, request).await?;
            Ok::<_, io::Error>(stream)
        };
        let connected = tokio::time::timeout(CONNECT_WITHIN, connected).await.map_err(io::Error::from)?;
        let mut stream = match connected {
            // What TLS says of a certificate that is not of this bucket's nodes.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!(node = owner.name, %error, "another node has another secret.key");
                return Err(Unreached::Refused {
                    sqlstate: SqlState::CANNOT_CONNECT_NOW.as_str().to_owned(),
                    message: format!(
                        "node {:?} owns the project, and has another secret.key than this node",
                        owner.name
                    ),
                    hint: Some("Give all nodes of the bucket the same secret.key, and start them again.".to_owned()),
                });
            }
            connected => connected?,
        };
        let reply = wire::receive(&mut stream).await?;
        Ok((stream, reply))
    }

    /// The link to an owner, made if there is none.
    async fn link(self: &Arc<Self>, owner: &Record) -> Result<Arc<GuestLink>, Unreached> {
        if let Some(link) = self.inner.lock().links.get(&owner.node).filter(|link| !link.gone.is_cancelled()) {
            return Ok(link.clone());
        }
        let guest = self.identity.node;
        let (stream, reply) = bounded(ANSWER_WITHIN, self.ask(owner, &Request::Link { guest })).await?;
        if !matches!(reply, Reply::Ready) {
            return Err(unexpected(reply));
        }
        let link = Arc::new(GuestLink { branches: Mutex::default(), gone: self.stop.child_token() });
        if let Some(old) = self.inner.lock().links.insert(owner.node, link.clone()) {
            old.gone.cancel();
        }
        let (peers, kept, node) = (self.clone(), link.clone(), owner.node);
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = peers.keep(&kept, stream) => ended,
                () = kept.gone.cancelled() => Ok(()),
            };
            tracing::debug!(%node, ?ended, "the link to an owner ended");
            kept.gone.cancel();
            // Whatever was relayed is cut by now: sessions find their branch again with their next message.
            let branches = kept.branches.lock().clone();
            for branch in branches {
                peers.clients.lost(branch, u64::MAX);
                // Who was held for the owner is held for nobody now.
                peers.clients.release(branch);
            }
            peers.forget(node, &kept);
        });
        Ok(link)
    }

    fn forget(&self, node: NodeId, link: &Arc<GuestLink>) {
        let mut inner = self.inner.lock();
        if inner.links.get(&node).is_some_and(|now| Arc::ptr_eq(now, link)) {
            inner.links.remove(&node);
        }
        inner.sockets.retain(|_, socket| !socket.listening.is_cancelled());
    }

    /// Tells the owner what this node's clients are doing, and does what it orders.
    async fn keep(self: &Arc<Self>, link: &GuestLink, stream: TlsStream<TcpStream>) -> io::Result<()> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (tell, mut told) = mpsc::unbounded_channel::<News>();
        let ordered = async {
            loop {
                let said = tokio::time::timeout(SILENCE_MAX, wire::receive(&mut reader)).await;
                match said.map_err(io::Error::from)?? {
                    Said::Alive => {}
                    Said::Order(order) => self.carry_out(order, &tell, &link.gone),
                }
            }
        };
        let telling = async {
            let mut tick = tokio::time::interval(TELL_EVERY);
            loop {
                let news = tokio::select! {
                    Some(news) = told.recv() => news,
                    _ = tick.tick() => News::Activity { branches: self.activity(link) },
                };
                wire::send(&mut writer, &news).await?;
            }
        };
        tokio::select! {
            ended = ordered => ended,
            ended = telling => ended,
        }
    }

    fn carry_out(
        self: &Arc<Self>,
        Order { number, branch, what }: Order,
        tell: &mpsc::UnboundedSender<News>,
        gone: &CancellationToken,
    ) {
        match what {
            What::Fence { deadline_ms, rest } => {
                let (peers, tell, gone) = (self.clone(), tell.clone(), gone.clone());
                tokio::spawn(async move {
                    let fenced = peers.clients.fence(branch, Duration::from_millis(deadline_ms), rest).await;
                    if gone.is_cancelled() {
                        peers.clients.release(branch);
                    }
                    let _ = tell.send(News::Fenced { number, blocked: fenced.err().unwrap_or_default() });
                });
            }
            What::Release => self.clients.release(branch),
            What::Lost { generation } => self.clients.lost(branch, generation),
        }
    }

    /// What clients of the owner's branches are doing; those that nobody has used for long are told no more.
    fn activity(&self, link: &GuestLink) -> Vec<BranchNews> {
        let mut news = Vec::new();
        link.branches.lock().retain(|&branch| {
            let seen = self.clients.activity(branch);
            let is_used = seen.sessions > 0 || seen.idle_for.is_none_or(|idle| idle < TOLD_FOR);
            let idle_ms = seen.idle_for.map(|idle| u64::try_from(idle.as_millis()).unwrap_or(u64::MAX));
            news.push(BranchNews { branch, idle_ms, busy: seen.busy, sessions: self.clients.sessions(branch) });
            is_used
        });
        news
    }

    /// A Unix socket behind which the owner's Postgres is.
    fn socket(self: &Arc<Self>, owner: &Record, branch: BranchId, link: &GuestLink) -> io::Result<PathBuf> {
        let mut inner = self.inner.lock();
        if let Some(socket) = inner.sockets.get(&branch) {
            if socket.node == owner.node && !socket.listening.is_cancelled() {
                return Ok(socket.path.clone());
            }
            socket.listening.cancel();
        }
        let path = self.dir.join(format!("{branch}-{:08x}", rand::random::<u32>()));
        let listener = listen(&path)?;
        let listening = link.gone.child_token();
        let (peers, owner, node) = (self.clone(), owner.clone(), owner.node);
        let (stop, file) = (listening.clone(), path.clone());
        tokio::spawn(async move {
            while let Some(Ok((client, _))) = stop.run_until_cancelled(listener.accept()).await {
                let (peers, owner, stop) = (peers.clone(), owner.clone(), stop.clone());
                tokio::spawn(async move {
                    let relayed = stop.run_until_cancelled(peers.relay(&owner, branch, client)).await;
                    if let Some(Err(error)) = relayed {
                        tracing::debug!(?error, %branch, "a relayed connection ended");
                    }
                });
            }
            let _ = fs::remove_file(&file);
        });
        inner.sockets.insert(branch, Socket { node, path: path.clone(), listening });
        Ok(path)
    }

    async fn relay(&self, owner: &Record, branch: BranchId, mut client: UnixStream) -> Result<(), Unreached> {
        let guest = self.identity.node;
        match bounded(WAKE_WITHIN, self.ask(owner, &Request::Connect { guest, branch })).await? {
            (mut stream, Reply::Ready) => Ok(copy_bidirectional(&mut client, &mut stream).await.map(drop)?),
            (_, other) => Err(unexpected(other)),
        }
    }
}

#[async_trait]
impl Others for Peers {
    async fn hold(&self, nodes: &[Record], time: Duration) -> bool {
        let request = Request::Hold { time_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX) };
        let asked = nodes.iter().map(|node| bounded(ANSWER_WITHIN, self.ask(node, &request)));
        let answers = futures::future::join_all(asked).await;
        answers.into_iter().all(|answer| matches!(answer, Ok((_, Reply::Held { held: true }))))
    }

    async fn warn(&self, node: &Record, of: &Record) {
        if let Err(error) = bounded(ANSWER_WITHIN, self.ask(node, &Request::TakeOver { by: of.clone() })).await {
            tracing::debug!(node = node.name, ?error, "a node that is gone could not be told so");
        }
    }
}

fn unexpected(reply: Reply) -> Unreached {
    match reply {
        Reply::Refused { sqlstate, message, hint } => Unreached::Refused { sqlstate, message, hint },
        Reply::Elsewhere => Unreached::Elsewhere(io::Error::other("the node does not own it")),
        other => Unreached::Elsewhere(io::Error::other(format!("the node answered {other:?}"))),
    }
}

/// Listens on a Unix socket, however long its path is.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // The directory is reached by its descriptor instead of its name (proc(5), /proc/pid/fd).
    let dir = File::open(dir)?;
    UnixListener::bind(Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name))
}
