//! The seam between the proxy and whoever runs computes: find an endpoint, wake it, connect to it; and the way back:
//! who is connected, hold everyone, let go.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ebb_types::{AllowList, BranchId, EndpointName, Point, SqlState};

/// What the proxy needs of the rest of Ebb.
#[async_trait]
pub trait Endpoints: Debug + Send + Sync + 'static {
    /// Finds an endpoint by name. Never wakes anything; cheap enough for every unauthenticated connection.
    async fn find(&self, name: &EndpointName) -> Result<Endpoint, EndpointError>;

    /// From where clients may connect to a branch. Never wakes anything; cheap enough for every unauthenticated connection.
    async fn allowed(&self, branch: BranchId) -> Result<AllowList, EndpointError>;

    /// What the salts of unknown roles are made from: secret, and the same wherever and whenever a client may ask, so that
    /// they look like stored ones. `None`: a secret of this proxy's own.
    fn mock_secret(&self) -> Option<[u8; 32]>;

    /// The stored SCRAM-SHA-256 verifier of a role (in the text form of `pg_authid.rolpassword`), or `None` if the
    /// role is unknown or may not log in. Another text (`md5`) is a password that no client can prove here. Never wakes
    /// anything.
    async fn verifier(&self, branch: BranchId, role: &str) -> Result<Option<String>, EndpointError>;

    /// Names a visit to a moment of a branch: what is woken, listed and left under this identifier is a read-only image of
    /// that moment. All who visit the same moment get the same. Only called for authenticated clients; makes nothing yet.
    async fn visit(&self, branch: BranchId, point: &Point) -> Result<BranchId, EndpointError>;

    /// Whether what backends have said by now may be told to clients. Asked for every read of a backend's bytes, after it;
    /// if not, the session ends with `08006`, because its backend may not be the branch's any more. Must be cheap.
    fn may_answer(&self) -> bool;

    /// Makes the branch's compute answer, waking it if need be. May be called by many at once: one wake results.
    /// Only called for authenticated clients. Cancel-safe: a wake once begun goes on.
    async fn wake(&self, branch: BranchId) -> Result<Awake, EndpointError>;
}

/// An endpoint that exists.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The branch behind it.
    pub branch: BranchId,
    /// Its name, as clients write it.
    pub name: EndpointName,
    /// The database meant where a client names none.
    pub default_database: String,
    /// How many backends its clients in transaction mode share, if that is set for it.
    pub pool_size: Option<usize>,
}

/// A compute that answers.
#[derive(Debug, Clone)]
pub struct Awake {
    /// Counts the computes of this branch on this node; a session attached under another generation is stale.
    pub generation: u64,
    /// The Unix socket Postgres listens on (from the proxy's view; the path may be longer than `sun_path` allows).
    pub socket: PathBuf,
    /// The only roles that may log in, where a client's proof does not say so already: it proved a password of today,
    /// while this is an image of the past.
    pub admits: Option<Arc<BTreeSet<String>>>,
}

/// Why there is no compute to talk to; everything a client may be told about it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct EndpointError {
    /// What the client is sent as code.
    pub sqlstate: SqlState,
    /// One line, lower case, no period.
    pub message: String,
    /// A fact: a full sentence.
    pub detail: Option<String>,
    /// Advice: a full sentence.
    pub hint: Option<String>,
}

/// One client session, as seen from outside.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// Number of the connection, unique in this proxy's life.
    pub conn: u64,
    /// The role that logged in.
    pub role: String,
    /// The database it is in.
    pub database: String,
    /// `application_name` from the start-up message.
    pub application: String,
    /// The client's address.
    pub peer: String,
    /// What it is doing.
    pub state: SessionState,
    /// For how long it has been in that state.
    pub since: Duration,
}

/// What a session is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionState {
    /// Held while its compute wakes or its endpoint is fenced.
    Waiting,
    /// In the middle of a query or a transaction.
    Active,
    /// Attached to a backend, between transactions.
    Idle,
    /// Attached and idle, but something in the session cannot be given back; `reason` says what.
    Pinned {
        /// What keeps it: `"temporary table"`, `"advisory lock"` …
        reason: String,
    },
    /// Detached: its state is kept here, no backend is held.
    Hibernated,
}

/// What the clients of one branch are doing, for whoever decides about suspending it.
#[derive(Debug, Clone, Default)]
pub struct Activity {
    /// How long ago a client last did any work (`None`: no client since this proxy started).
    pub idle_for: Option<Duration>,
    /// Sessions in a query or transaction, or waiting for the compute.
    pub busy: usize,
    /// All sessions, hibernated ones included.
    pub sessions: usize,
}

/// How many sessions there are, by what they do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// Held while their computes wake or their endpoints are fenced.
    pub waiting: usize,
    /// In a query or a transaction.
    pub active: usize,
    /// Attached, between transactions.
    pub idle: usize,
    /// Detached, their state kept.
    pub hibernated: usize,
}

impl Census {
    /// Shows it as metrics.
    pub fn publish(&self) {
        let Self { waiting, active, idle, hibernated } = *self;
        let states = [("waiting", waiting), ("active", active), ("idle", idle), ("hibernated", hibernated)];
        for (state, count) in states {
            metrics::gauge!("ebb_proxy_sessions", "state" => state).set(count as f64);
        }
    }
}

/// What to do with sessions that cannot be hibernated when an endpoint is fenced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreplayable {
    /// Give up at the first one: everyone goes on as before. Used for suspending.
    Refuse,
    /// Give up where somebody works; end those that are idle and cannot be given back with `57P05` and a hint. Used for
    /// suspending a branch whose policy says so.
    EndPinned,
    /// Wait for open transactions until the deadline, then end what is left with `57P01` and a hint. Used for restore
    /// and rollback.
    End,
}

/// Why a fence was not raised.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{} sessions keep the compute awake", .0.len())]
pub struct Blocked(pub Vec<SessionInfo>);

/// What the proxy offers to whoever runs computes. Implemented by the running proxy.
#[async_trait]
pub trait Sessions: Debug + Send + Sync + 'static {
    /// What the clients of this branch are doing.
    fn activity(&self, branch: BranchId) -> Activity;

    /// All sessions of this branch.
    fn sessions(&self, branch: BranchId) -> Vec<SessionInfo>;

    /// How many sessions of all branches do what.
    fn census(&self) -> Census;

    /// Holds new work of a branch and detaches every session from its backend, keeping its state here.
    /// When it returns `Ok`, no session holds a backend, and none will ask for a wake until [`Sessions::release`].
    ///
    /// # Errors
    /// [`Blocked`] under [`Unreplayable::Refuse`] and [`Unreplayable::EndPinned`]; the fence is down again.
    async fn fence(&self, branch: BranchId, deadline: Duration, rule: Unreplayable) -> Result<(), Blocked>;

    /// Lets everyone go on: held messages wake the branch and are answered by whatever is then behind it.
    fn release(&self, branch: BranchId);

    /// Forgets a branch that is gone for ever, unless someone is connected.
    fn forget(&self, branch: BranchId);

    /// Tells the proxy that a branch's compute is gone (crashed): attached sessions get `08006` truthfully if they were
    /// in the middle of something; idle ones that were never pinned are ended likewise, their state being lost.
    fn lost(&self, branch: BranchId, generation: u64);
}

/// A shared [`Sessions`].
pub type ProxyHandle = Arc<dyn Sessions>;
