//! The routes of drills.

use axum::extract::{Path, State};

use super::call::Act;
use super::routes::{Answered, Node, done, made};
use super::types::{Drill, DrillBranch, DrillList, Problem};

/// The newest drills of a branch.
#[utoipa::path(get, path = "/v1/projects/{project}/branches/{branch}/drills", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = DrillList), (status = "default", body = Problem)))]
pub(super) async fn list_drills(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
) -> Answered<DrillList> {
    done(DrillList { drills: service.drills(&project, &branch).await? })
}

/// Restores a point out of the bucket alone, beside everything else, and checks it. Answers when that is over: a drill
/// that failed as a problem. Either is recorded.
#[utoipa::path(post, path = "/v1/projects/{project}/branches/{branch}/drills", params(("project" = String, Path), ("branch" = String, Path)), request_body = DrillBranch, responses((status = 201, body = Drill), (status = "default", body = Problem)))]
pub(super) async fn drill_branch(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Act { caller, body }: Act<DrillBranch>,
) -> Answered<Drill> {
    made(service.drill(&caller, &project, &branch, body).await?)
}
