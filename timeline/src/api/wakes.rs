//! The routes of wakes.

use axum::extract::{Path, State};

use super::routes::{Answered, Node, done};
use super::types::{Problem, WakeList};

/// The newest wakes on this node since it started, newest first, with their stages.
#[utoipa::path(get, path = "/v1/wakes", responses((status = 200, body = WakeList), (status = "default", body = Problem)))]
pub(super) async fn list_wakes(State(service): Node) -> Answered<WakeList> {
    done(service.list_wakes(None)?)
}

/// The newest wakes of a branch.
#[utoipa::path(get, path = "/v1/projects/{project}/branches/{branch}/compute/wakes", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = WakeList), (status = "default", body = Problem)))]
pub(super) async fn list_wakes_of_branch(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
) -> Answered<WakeList> {
    done(service.list_wakes(Some((&project, &branch)))?)
}
