//! The seam to whoever holds the clients (the proxy): are they idle, hold them, let them go.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ebb_types::BranchId;
use serde::{Deserialize, Serialize};

/// Whoever holds client connections. Implemented in `cli` over the proxy; [`NoClients`] where there is none.
#[async_trait]
pub trait Clients: Debug + Send + Sync + 'static {
    /// What the clients of a branch are doing.
    fn activity(&self, branch: BranchId) -> Activity;

    /// All client sessions of a branch.
    fn sessions(&self, branch: BranchId) -> Vec<SessionRow>;

    /// Holds new work and detaches every session; `rest` says what becomes of those that cannot be by the deadline.
    ///
    /// # Errors
    /// The sessions that stand in the way; everyone goes on.
    async fn fence(&self, branch: BranchId, deadline: Duration, rest: Rest) -> Result<(), Vec<SessionRow>>;

    /// Lets everyone go on.
    fn release(&self, branch: BranchId);

    /// The branch is gone for ever: what is remembered of it may go, unless someone is connected.
    fn forget(&self, branch: BranchId);

    /// The compute of this generation is gone without having been stopped.
    fn lost(&self, branch: BranchId, generation: u64);
}

/// Shared [`Clients`].
pub type SharedClients = Arc<dyn Clients>;

/// What a fence does with sessions that cannot be detached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rest {
    /// The first of them makes it fail.
    Refuse,
    /// One that works makes it fail; those that are idle, but hold what cannot be given back, are ended.
    EndPinned,
    /// They are ended at the deadline.
    End,
}

/// A branch's policy for idle sessions that hold what cannot be given back (a temporary table, an advisory lock …).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pinned {
    /// They keep the branch awake.
    #[default]
    Keep,
    /// They are ended, with `57P05`, when the branch would be asleep but for them.
    End,
}

impl Pinned {
    /// What a suspend does with them.
    pub fn rest(self) -> Rest {
        match self {
            Pinned::Keep => Rest::Refuse,
            Pinned::End => Rest::EndPinned,
        }
    }
}

/// What the clients of a branch are doing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Activity {
    /// How long ago a client last did any work; `None`: no client so far.
    pub idle_for: Option<Duration>,
    /// Sessions in a query or a transaction, or waiting for the compute.
    pub busy: usize,
    /// All sessions.
    pub sessions: usize,
}

/// One client session, as `ebb who` and `ebb compute status` show it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SessionRow {
    /// Number of the connection.
    pub conn: u64,
    /// The role that logged in.
    pub role: String,
    /// The database.
    pub database: String,
    /// `application_name` as given at start-up.
    pub application: String,
    /// The client's address.
    pub peer: String,
    /// The node whose proxy holds it, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `waiting`, `active`, `idle`, `pinned` or `hibernated`.
    pub state: String,
    /// Why it keeps the compute awake, if it does.
    pub reason: Option<String>,
    /// Seconds in this state.
    pub since_seconds: f64,
}

/// No clients at all: for tests and tools.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoClients;

#[async_trait]
impl Clients for NoClients {
    fn activity(&self, _: BranchId) -> Activity {
        Activity::default()
    }

    fn sessions(&self, _: BranchId) -> Vec<SessionRow> {
        Vec::new()
    }

    async fn fence(&self, _: BranchId, _: Duration, _: Rest) -> Result<(), Vec<SessionRow>> {
        Ok(())
    }

    fn release(&self, _: BranchId) {}

    fn forget(&self, _: BranchId) {}

    fn lost(&self, _: BranchId, _: u64) {}
}
