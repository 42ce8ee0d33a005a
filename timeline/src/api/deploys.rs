//! Routes of releases that describe themselves.

use axum::extract::{Path, State};

use super::call::Act;
use super::routes::{Answered, Node, done, made};
use super::types::{CreateRelease, Problem, Rehearsed, Release};

/// One release, with what its deploy found out.
#[utoipa::path(get, path = "/v1/projects/{project}/releases/{release}", params(("project" = String, Path), ("release" = String, Path)), responses((status = 200, body = Release), (status = "default", body = Problem)))]
pub(super) async fn show_release(
    State(service): Node,
    Path((project, release)): Path<(String, String)>,
) -> Answered<Release> {
    done(service.release(&project, &release).await?)
}

/// Tries an artifact on a copy of `prod`, and changes nothing. What that finds is no error.
#[utoipa::path(post, path = "/v1/projects/{project}/rehearsals", params(("project" = String, Path)), request_body = CreateRelease, responses((status = 201, body = Rehearsed), (status = "default", body = Problem)))]
pub(super) async fn rehearse(
    State(service): Node,
    Path(project): Path<String>,
    Act { caller, body }: Act<CreateRelease>,
) -> Answered<Rehearsed> {
    made(service.rehearse(&caller, &project, body).await?)
}
