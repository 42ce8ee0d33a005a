//! Ties the proxy to the timeline service, both ways. Neither crate knows the other.
//!
//! The service needs the proxy (who is idle, hold them), the proxy needs the service (find, wake). The proxy is made
//! first, over an [`Endpoints`] that is filled in once the service is open; clients wait in the listen queue till then.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ebb_proxy::{Awake, Endpoint, EndpointError, Endpoints, ProxyHandle, SessionInfo, SessionState, Unreplayable};
use ebb_timeline::clients::{Activity, Clients, Rest, SessionRow};
use ebb_timeline::{Place, Service};
use ebb_types::{AllowList, BranchId, EndpointName, ErrorKind, Hint, Point, SqlState};

use super::peers::{Peers, Unreached};

/// LIMIT: how long a client waits for an owner to be found: longer than the record of one that died is good for.
const OWNER_WITHIN: Duration = Duration::from_secs(30);

/// How often it is looked again who owns a branch.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The timeline service, and other nodes', as the proxy sees them.
#[derive(Debug, Default)]
pub struct ServiceEndpoints {
    both: OnceLock<(Arc<Service>, Arc<Peers>)>,
}

impl ServiceEndpoints {
    /// Fills in the service and the other nodes. Only the first call counts.
    pub fn fill(&self, service: Arc<Service>, peers: Arc<Peers>) {
        let _ = self.both.set((service, peers));
    }

    fn service(&self) -> Result<&Arc<Service>, EndpointError> {
        self.both().map(|(service, _)| service)
    }

    fn both(&self) -> Result<&(Arc<Service>, Arc<Peers>), EndpointError> {
        self.both.get().ok_or_else(|| EndpointError {
            sqlstate: SqlState::CANNOT_CONNECT_NOW,
            message: "the server is starting".to_owned(),
            detail: None,
            hint: Some("Try again in a second.".to_owned()),
        })
    }
}

#[async_trait]
impl Endpoints for ServiceEndpoints {
    async fn find(&self, name: &EndpointName) -> Result<Endpoint, EndpointError> {
        let found = self.service()?.find(name).await.map_err(reported)?;
        Ok(Endpoint {
            branch: found.branch,
            name: name.clone(),
            default_database: found.default_database,
            pool_size: found.pool_size.map(|size| size as usize),
        })
    }

    async fn allowed(&self, branch: BranchId) -> Result<AllowList, EndpointError> {
        let service = self.service()?;
        // Where another node owns it, what that one has recorded is taken in.
        service.place(branch).await.map_err(reported)?;
        service.allowed(branch).map_err(reported)
    }

    fn mock_secret(&self) -> Option<[u8; 32]> {
        self.both.get().map(|(service, _)| service.mock_secret())
    }

    async fn verifier(&self, branch: BranchId, role: &str) -> Result<Option<String>, EndpointError> {
        let (service, peers) = self.both()?;
        let search = Search::begin();
        loop {
            let Place::There(owner) = service.place(branch).await.map_err(reported)? else {
                return service.verifier(branch, role).await.map_err(reported);
            };
            match peers.verifier(&owner, branch, role).await {
                Ok(verifier) => return Ok(verifier),
                Err(unreached) => search.go_on(Some((owner.name, unreached))).await?,
            }
        }
    }

    fn may_answer(&self) -> bool {
        self.both.get().is_none_or(|(service, _)| service.may_answer())
    }

    async fn visit(&self, branch: BranchId, point: &Point) -> Result<BranchId, EndpointError> {
        self.service()?.visit(branch, point).map_err(reported)
    }

    async fn wake(&self, branch: BranchId) -> Result<Awake, EndpointError> {
        let (service, peers) = self.both()?;
        let search = Search::begin();
        loop {
            if let Place::There(owner) = service.place(branch).await.map_err(reported)? {
                match peers.wake(&owner, branch).await {
                    Ok((generation, socket)) => return Ok(Awake { generation, socket, admits: None }),
                    Err(unreached) => search.go_on(Some((owner.name, unreached))).await?,
                }
                continue;
            }
            // The service itself reports a wake that failed, once for all who waited.
            match service.wake(branch).await {
                Ok(unit) => return Ok(Awake { generation: unit.generation, socket: unit.socket, admits: unit.admits }),
                // It has just got another owner.
                Err(error) if error.is_elsewhere() => search.go_on(None).await?,
                Err(error) => return Err(to_client(error)),
            }
        }
    }
}

/// The search for a branch's owner that answers.
struct Search {
    deadline: Instant,
}

impl Search {
    fn begin() -> Self {
        Self { deadline: Instant::now() + OWNER_WITHIN }
    }

    /// Waits a little before it is looked again; or tells why not.
    async fn go_on(&self, met: Option<(String, Unreached)>) -> Result<(), EndpointError> {
        let detail = match met {
            Some((_, Unreached::Refused { sqlstate, message, hint })) => {
                let sqlstate = SqlState::of(&sqlstate).unwrap_or(SqlState::CANNOT_CONNECT_NOW);
                return Err(EndpointError { sqlstate, message, detail: None, hint });
            }
            Some((node, Unreached::Elsewhere(error))) => Some(format!("Node {node:?} owns it: {error}.")),
            None => None,
        };
        if Instant::now() < self.deadline {
            tokio::time::sleep(LOOK_AGAIN).await;
            return Ok(());
        }
        let hint = "It is taken over as soon as its node's record has expired: try again in a few seconds.";
        Err(EndpointError {
            sqlstate: SqlState::CANNOT_CONNECT_NOW,
            message: "no node answers for the branch".to_owned(),
            detail,
            hint: Some(hint.to_owned()),
        })
    }
}

/// Tells the operator what the client is not told.
fn reported(error: ebb_timeline::Error) -> EndpointError {
    if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Internal) {
        tracing::error!(error = error.chain(), "a client was refused");
    }
    to_client(error)
}

/// What of a failure a client is told: the outermost message and advice, not the paths and causes behind it.
fn to_client(error: ebb_timeline::Error) -> EndpointError {
    EndpointError { sqlstate: error.sql_state(), message: error.to_string(), detail: None, hint: error.hint() }
}

/// The proxy, as the timeline service sees it.
#[derive(Debug)]
pub struct ProxyClients {
    /// The proxy.
    pub proxy: ProxyHandle,
    /// The name of this node.
    pub node: String,
}

impl ProxyClients {
    fn row(&self, session: SessionInfo) -> SessionRow {
        let (state, reason) = match session.state {
            SessionState::Waiting => ("waiting", Some("waits for the compute".to_owned())),
            SessionState::Active => ("active", Some("in a query or an open transaction".to_owned())),
            SessionState::Idle => ("idle", None),
            SessionState::Pinned { reason } => ("pinned", Some(reason)),
            SessionState::Hibernated => ("hibernated", None),
        };
        SessionRow {
            conn: session.conn,
            role: session.role,
            database: session.database,
            application: session.application,
            peer: session.peer,
            node: Some(self.node.clone()),
            state: state.to_owned(),
            reason,
            since_seconds: session.since.as_secs_f64(),
        }
    }
}

#[async_trait]
impl Clients for ProxyClients {
    fn activity(&self, branch: BranchId) -> Activity {
        let seen = self.proxy.activity(branch);
        Activity { idle_for: seen.idle_for, busy: seen.busy, sessions: seen.sessions }
    }

    fn sessions(&self, branch: BranchId) -> Vec<SessionRow> {
        self.proxy.sessions(branch).into_iter().map(|session| self.row(session)).collect()
    }

    async fn fence(&self, branch: BranchId, deadline: Duration, rest: Rest) -> Result<(), Vec<SessionRow>> {
        let rule = match rest {
            Rest::Refuse => Unreplayable::Refuse,
            Rest::EndPinned => Unreplayable::EndPinned,
            Rest::End => Unreplayable::End,
        };
        let fenced = self.proxy.fence(branch, deadline, rule).await;
        fenced.map_err(|blocked| blocked.0.into_iter().map(|session| self.row(session)).collect())
    }

    fn release(&self, branch: BranchId) {
        self.proxy.release(branch);
    }

    fn forget(&self, branch: BranchId) {
        self.proxy.forget(branch);
    }

    fn lost(&self, branch: BranchId, generation: u64) {
        self.proxy.lost(branch, generation);
    }
}
