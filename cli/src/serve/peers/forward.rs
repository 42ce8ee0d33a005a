//! Requests to the API about another node's project are answered by that node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use ebb_timeline::api::types::Problem;
use ebb_timeline::{Place, Service};
use ebb_types::ErrorKind;
use hyper_util::rt::TokioIo;

use super::client::{Peers, Unreached};

/// LIMIT: how long a request waits for an owner to be found: longer than the record of one that died is good for.
const OWNER_WITHIN: Duration = Duration::from_secs(30);

/// How often it is looked again who owns a project.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Passes a request on to the owner of the project that its path names; answers all others here.
///
/// The owner checks `Host` and `Origin` as this node would have: they are passed on as they came.
pub async fn forward(
    State((service, peers)): State<(Arc<Service>, Arc<Peers>)>,
    request: Request,
    next: Next,
) -> Response {
    let mut path = request.uri().path().split('/').skip(2);
    let project = match (path.next(), path.next()) {
        (Some("projects"), Some(project)) => project.to_owned(),
        _ => return next.run(request).await,
    };
    let deadline = Instant::now() + OWNER_WITHIN;
    let (owner, stream) = loop {
        // Whatever keeps an owner from being found is answered here.
        let Ok(Place::There(owner)) = service.place_of_project(&project).await else {
            return next.run(request).await;
        };
        match peers.api(&owner).await {
            Ok(stream) => break (owner, stream),
            Err(error @ Unreached::Refused { .. }) => return unreached(&owner.name, error),
            Err(error) if Instant::now() > deadline => return unreached(&owner.name, error),
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    };
    let passed_on = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        sender.send_request(request).await
    };
    match passed_on.await {
        Ok(response) => response.map(Body::new),
        Err(error) => unreached(&owner.name, Unreached::Elsewhere(std::io::Error::other(error))),
    }
}

fn unreached(owner: &str, error: Unreached) -> Response {
    tracing::warn!(owner, ?error, "another node cannot be reached");
    let (detail, hint) = match error {
        Unreached::Refused { message, hint, .. } => (message, hint),
        Unreached::Elsewhere(_) => (
            format!("node {owner:?} owns the project and does not answer"),
            Some("It is taken over as soon as its record has expired: try again in a few seconds.".to_owned()),
        ),
    };
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let problem = Problem {
        type_uri: "urn:ebb:problem:unavailable".to_owned(),
        title: "Not now".to_owned(),
        status: status.as_u16(),
        detail,
        hint,
        kind: ErrorKind::Unavailable,
    };
    let content = [(header::CONTENT_TYPE, "application/problem+json"), (header::RETRY_AFTER, "1")];
    (status, content, Json(problem)).into_response()
}
