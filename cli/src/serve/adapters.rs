//! Ties the proxy to the timeline service, both ways. Neither crate knows the other.
//!
//! The service needs the proxy (who is idle, hold them), the proxy needs the service (find, wake). The proxy is made
//! first, over an [`Endpoints`] that is filled in once the service is open; clients wait in the listen queue till then.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use ebb_proxy::{Awake, Endpoint, EndpointError, Endpoints, ProxyHandle, SessionInfo, SessionState, Unreplayable};
use ebb_timeline::Service;
use ebb_timeline::clients::{Activity, Clients, SessionRow};
use ebb_types::{BranchId, EndpointName, ErrorKind, Hint, Point, SqlState};

/// The timeline service, as the proxy sees it.
#[derive(Debug, Default)]
pub struct ServiceEndpoints {
    service: OnceLock<Arc<Service>>,
}

impl ServiceEndpoints {
    /// Fills in the service. Only the first call counts.
    pub fn fill(&self, service: Arc<Service>) {
        let _ = self.service.set(service);
    }

    fn service(&self) -> Result<&Arc<Service>, EndpointError> {
        self.service.get().ok_or_else(|| EndpointError {
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
        Ok(Endpoint { branch: found.branch, name: name.clone(), default_database: found.default_database })
    }

    async fn verifier(&self, branch: BranchId, role: &str) -> Result<Option<String>, EndpointError> {
        self.service()?.verifier(branch, role).await.map_err(reported)
    }

    async fn visit(&self, branch: BranchId, point: &Point) -> Result<BranchId, EndpointError> {
        self.service()?.visit(branch, point).map_err(reported)
    }

    async fn wake(&self, branch: BranchId) -> Result<Awake, EndpointError> {
        // The service itself reports a wake that failed, once for all who waited.
        let unit = self.service()?.wake(branch).await.map_err(to_client)?;
        Ok(Awake { generation: unit.generation, socket: unit.socket, admits: unit.admits })
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
pub struct ProxyClients(pub ProxyHandle);

#[async_trait]
impl Clients for ProxyClients {
    fn activity(&self, branch: BranchId) -> Activity {
        let seen = self.0.activity(branch);
        Activity { idle_for: seen.idle_for, busy: seen.busy, sessions: seen.sessions }
    }

    fn sessions(&self, branch: BranchId) -> Vec<SessionRow> {
        self.0.sessions(branch).into_iter().map(row).collect()
    }

    async fn fence(&self, branch: BranchId, deadline: Duration, end_rest: bool) -> Result<(), Vec<SessionRow>> {
        let rule = if end_rest { Unreplayable::End } else { Unreplayable::Refuse };
        let fenced = self.0.fence(branch, deadline, rule).await;
        fenced.map_err(|blocked| blocked.0.into_iter().map(row).collect())
    }

    fn release(&self, branch: BranchId) {
        self.0.release(branch);
    }

    fn forget(&self, branch: BranchId) {
        self.0.forget(branch);
    }

    fn lost(&self, branch: BranchId, generation: u64) {
        self.0.lost(branch, generation);
    }
}

fn row(session: SessionInfo) -> SessionRow {
    let (state, reason) = match session.state {
        SessionState::Waiting => ("waiting", None),
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
        state: state.to_owned(),
        reason,
        since_seconds: session.since.as_secs_f64(),
    }
}
