//! The REST interface: HTTP and JSON under `/v1`, described by `/openapi.json`.
//!
//! It has no tokens yet. It is meant to listen on loopback only, and defends itself against what a browser on the same
//! machine could be made to send: a `Host` that is not loopback (DNS rebinding), an `Origin` that is not, and bodies
//! that are not declared as JSON (a form can send those anywhere) are refused.
//!
//! A request may carry an `Idempotency-Key`: the same key with the same request answers the first result again, from
//! the ledger, also after a restart. An act that failed does not use its key up.

mod call;
mod deploys;
mod drills;
mod ledger;
mod routes;
pub mod types;
mod upkeep;
mod wakes;

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use ebb_types::ErrorKind;
use utoipa::OpenApi as _;

use crate::Service;
use call::Fault;

/// Renders all metrics of this process as text.
pub type RenderMetrics = Arc<dyn Fn() -> String + Send + Sync>;

/// All routes over one service. `metrics` answers `GET /metrics`, where a recorder is installed.
pub fn router_with_metrics(service: Arc<Service>, metrics: Option<RenderMetrics>) -> Router {
    let branch = "/v1/projects/{project}/branches/{branch}";
    let of_branch = |path: &str| format!("{branch}{path}");
    let router = Router::new()
        .route("/v1/health", get(routes::health))
        .route("/v1/projects", get(routes::list_projects).post(routes::create_project))
        .route("/v1/projects/{project}", get(routes::show_project).delete(routes::delete_project))
        .route("/v1/projects/{project}/branches", get(routes::list_branches).post(routes::create_branch))
        .route(branch, get(routes::show_branch).patch(routes::change_branch).delete(routes::delete_branch))
        .route(&of_branch("/restore"), post(routes::restore_branch))
        .route(&of_branch("/checkpoints"), get(routes::list_checkpoints).post(routes::create_checkpoint))
        .route(&of_branch("/checkpoints/{checkpoint}"), delete(routes::delete_checkpoint))
        .route(&of_branch("/drills"), get(drills::list_drills).post(drills::drill_branch))
        .route(&of_branch("/url"), get(routes::show_url))
        .route(&of_branch("/clients"), get(routes::list_clients))
        .route(&of_branch("/compute"), get(routes::show_compute))
        .route(&of_branch("/compute/suspend"), post(routes::suspend_compute))
        .route(&of_branch("/compute/wake"), post(routes::wake_compute))
        .route(&of_branch("/compute/wakes"), get(wakes::list_wakes_of_branch))
        .route("/v1/wakes", get(wakes::list_wakes))
        .route(&of_branch("/export"), post(routes::export))
        .route("/v1/projects/{project}/releases", get(routes::list_releases).post(routes::create_release))
        .route("/v1/projects/{project}/releases/{release}", get(deploys::show_release))
        .route("/v1/projects/{project}/rehearsals", post(deploys::rehearse))
        .route("/v1/projects/{project}/diff", get(routes::diff))
        .route("/v1/projects/{project}/rollback", post(routes::rollback))
        .route("/v1/projects/{project}/ledger", get(ledger::list_ledger))
        .route("/v1/projects/{project}/ledger/verify", get(routes::verify_ledger))
        .route("/v1/projects/{project}/move", post(routes::move_project))
        .route("/v1/nodes", get(routes::list_nodes))
        .route("/v1/imports", get(routes::list_imports).post(routes::start_import))
        .route("/v1/imports/{import}", get(routes::show_import).delete(routes::cancel_import))
        .route("/v1/imports/{import}/cut-over", post(routes::cut_over))
        .route("/v1/objects/why", get(routes::why_object))
        .route("/v1/collect", post(routes::collect))
        .route("/openapi.json", get(openapi));
    let router = match metrics {
        Some(render) => router.route("/metrics", get(move || async move { render() })),
        None => router,
    };
    router.fallback(no_such_route).method_not_allowed_fallback(no_such_method).layer(from_fn(guard)).with_state(service)
}

/// All routes over one service, without metrics.
pub fn router(service: Arc<Service>) -> Router {
    router_with_metrics(service, None)
}

async fn openapi() -> axum::Json<utoipa::openapi::OpenApi> {
    axum::Json(routes::Description::openapi())
}

async fn no_such_route(method: Method, uri: Uri) -> Fault {
    Fault::new(ErrorKind::NotFound, format!("there is no {method} {}", uri.path()))
        .hint("GET /openapi.json lists what there is.")
}

async fn no_such_method(method: Method, uri: Uri) -> Fault {
    Fault::new(ErrorKind::Invalid, format!("{} does not take {method}", uri.path()))
        .status(StatusCode::METHOD_NOT_ALLOWED)
        .hint("GET /openapi.json lists what there is.")
}

/// Refuses what does not come from this machine's own tools.
async fn guard(request: Request, next: Next) -> Response {
    let began = std::time::Instant::now();
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    // HTTP/2 has the host in the URI.
    let host = host.or_else(|| request.uri().authority().map(|authority| authority.as_str()));
    let response = match (host.is_some_and(is_loopback), origin_is_loopback(request.headers())) {
        (true, true) => next.run(request).await,
        (false, _) => {
            Fault::new(ErrorKind::Invalid, "the Host header does not name this machine's loopback".to_owned())
                .status(StatusCode::FORBIDDEN)
                .hint("Call the API as 127.0.0.1, [::1] or localhost.")
                .into_response()
        }
        (true, false) => Fault::new(ErrorKind::Invalid, "requests from web pages elsewhere are not taken".to_owned())
            .status(StatusCode::FORBIDDEN)
            .into_response(),
    };
    let class = match response.status().as_u16() {
        200..=299 => "2xx",
        400..=499 => "4xx",
        _ => "5xx",
    };
    metrics::counter!("ebb_timeline_api_requests_total", "status" => class).increment(1);
    metrics::histogram!("ebb_timeline_api_request_seconds").record(began.elapsed());
    response
}

/// Whether `host[:port]` is this machine's loopback.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn origin_is_loopback(headers: &HeaderMap) -> bool {
    match headers.get(header::ORIGIN).map(|origin| origin.to_str()) {
        None => true,
        Some(Ok(origin)) => origin.split_once("://").is_some_and(|(_, authority)| is_loopback(authority)),
        Some(Err(_)) => false,
    }
}

#[cfg(test)]
mod tests;
