//! The routes: each hands its request to one method of the service.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use ebb_types::{BranchName, ErrorKind, InvalidName, OperationId, Point};
use serde::Deserialize;
use utoipa::{IntoParams, OpenApi};

use super::call::{Act, Fault, Who};
use super::types::*;
use crate::Service;
use crate::diff::Diff;
use crate::service::{Answer, DiffRequest};

pub(super) type Node = State<Arc<Service>>;
pub(super) type Answered<T> = Result<(StatusCode, Json<T>), Fault>;

/// What was made now is 201; what the same request had made before is 200.
pub(super) fn made<T>(answer: Answer<T>) -> Answered<T> {
    Ok((if answer.new { StatusCode::CREATED } else { StatusCode::OK }, Json(answer.value)))
}

pub(super) fn done<T>(value: T) -> Answered<T> {
    Ok((StatusCode::OK, Json(value)))
}

/// The OpenAPI description of all routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Ebb",
        description = "The timeline API: projects, branches, checkpoints, releases, computes, ledgers."
    ),
    paths(
        health,
        list_projects,
        create_project,
        show_project,
        list_branches,
        create_branch,
        show_branch,
        change_branch,
        delete_branch,
        restore_branch,
        diff,
        list_checkpoints,
        create_checkpoint,
        delete_checkpoint,
        super::drills::list_drills,
        super::drills::drill_branch,
        show_url,
        show_compute,
        list_clients,
        suspend_compute,
        wake_compute,
        super::wakes::list_wakes,
        super::wakes::list_wakes_of_branch,
        export,
        list_releases,
        create_release,
        super::deploys::show_release,
        super::deploys::rehearse,
        super::ledger::list_ledger,
        verify_ledger,
        delete_project,
        rollback,
        move_project,
        list_nodes,
        why_object,
        collect,
        list_imports,
        start_import,
        show_import,
        cancel_import,
        cut_over,
    )
)]
pub(super) struct Description;

/// Query of `DELETE /v1/projects/{project}`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Confirm {
    /// The project's name once more.
    confirm: Option<String>,
}

/// Query of `GET /v1/projects/{project}/diff`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Compare {
    /// The older side: `branch` or `branch@point`.
    from: String,
    /// The younger side.
    to: String,
    /// The database; `app` if none is named.
    database: Option<String>,
    /// Only this table: `name` or `schema.name`.
    table: Option<String>,
    /// How many rows of each kind are shown; 3 if nothing is said, 100 at most.
    samples: Option<usize>,
}

/// Query of `GET /v1/objects/why`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// The key of an object in the bucket, a layer's identifier, or an artifact's hash.
    object: String,
}

/// How the service is.
#[utoipa::path(get, path = "/v1/health", responses((status = 200, body = Health)))]
pub(super) async fn health() -> Json<Health> {
    Json(Health { version: env!("CARGO_PKG_VERSION").to_owned(), ok: true })
}

/// All projects.
#[utoipa::path(get, path = "/v1/projects", responses((status = 200, body = ProjectList), (status = "default", body = Problem)))]
pub(super) async fn list_projects(State(service): Node) -> Answered<ProjectList> {
    done(ProjectList { projects: service.projects().await? })
}

/// Makes a project with `prod` and `dev`.
#[utoipa::path(post, path = "/v1/projects", request_body = CreateProject, responses((status = 201, body = CreatedProject), (status = "default", body = Problem)))]
pub(super) async fn create_project(
    State(service): Node,
    Act { caller, body }: Act<CreateProject>,
) -> Answered<CreatedProject> {
    made(service.create_project(&caller, body).await?)
}

/// One project.
#[utoipa::path(get, path = "/v1/projects/{project}", params(("project" = String, Path)), responses((status = 200, body = Project), (status = "default", body = Problem)))]
pub(super) async fn show_project(State(service): Node, Path(project): Path<String>) -> Answered<Project> {
    done(service.project_info(&project).await?)
}

/// All branches of a project.
#[utoipa::path(get, path = "/v1/projects/{project}/branches", params(("project" = String, Path)), responses((status = 200, body = BranchList), (status = "default", body = Problem)))]
pub(super) async fn list_branches(State(service): Node, Path(project): Path<String>) -> Answered<BranchList> {
    done(BranchList { branches: service.branches(&project).await? })
}

/// Makes a branch from a point of another.
#[utoipa::path(post, path = "/v1/projects/{project}/branches", params(("project" = String, Path)), request_body = CreateBranch, responses((status = 201, body = Branch), (status = "default", body = Problem)))]
pub(super) async fn create_branch(
    State(service): Node,
    Path(project): Path<String>,
    Act { caller, body }: Act<CreateBranch>,
) -> Answered<Branch> {
    made(service.create_branch(&caller, &project, body).await?)
}

/// One branch.
#[utoipa::path(get, path = "/v1/projects/{project}/branches/{branch}", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = Branch), (status = "default", body = Problem)))]
pub(super) async fn show_branch(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
) -> Answered<Branch> {
    done(service.branch(&project, &branch).await?)
}

/// Changes a branch's policy.
#[utoipa::path(patch, path = "/v1/projects/{project}/branches/{branch}", params(("project" = String, Path), ("branch" = String, Path)), request_body = ChangeBranch, responses((status = 200, body = Branch), (status = "default", body = Problem)))]
pub(super) async fn change_branch(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Act { caller, body }: Act<ChangeBranch>,
) -> Answered<Branch> {
    done(service.change_branch(&caller, &project, &branch, body).await?)
}

/// Deletes a branch and its checkpoints.
#[utoipa::path(delete, path = "/v1/projects/{project}/branches/{branch}", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 204), (status = "default", body = Problem)))]
pub(super) async fn delete_branch(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Who(caller): Who,
) -> Result<StatusCode, Fault> {
    service.delete_branch(&caller, &project, &branch).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sets a branch to one of its checkpoints; the old head becomes a rescue branch.
#[utoipa::path(post, path = "/v1/projects/{project}/branches/{branch}/restore", params(("project" = String, Path), ("branch" = String, Path)), request_body = RestoreBranch, responses((status = 200, body = Restored), (status = "default", body = Problem)))]
pub(super) async fn restore_branch(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Act { caller, body }: Act<RestoreBranch>,
) -> Answered<Restored> {
    done(service.restore(&caller, &project, &branch, body).await?.value)
}

/// All checkpoints of a branch.
#[utoipa::path(get, path = "/v1/projects/{project}/branches/{branch}/checkpoints", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = CheckpointList), (status = "default", body = Problem)))]
pub(super) async fn list_checkpoints(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
) -> Answered<CheckpointList> {
    done(CheckpointList { checkpoints: service.checkpoints(&project, &branch).await? })
}

/// Names the head of a branch.
#[utoipa::path(post, path = "/v1/projects/{project}/branches/{branch}/checkpoints", params(("project" = String, Path), ("branch" = String, Path)), request_body = CreateCheckpoint, responses((status = 201, body = Checkpoint), (status = "default", body = Problem)))]
pub(super) async fn create_checkpoint(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Act { caller, body }: Act<CreateCheckpoint>,
) -> Answered<Checkpoint> {
    made(service.create_checkpoint(&caller, &project, &branch, body).await?)
}

/// Takes a checkpoint's name away.
#[utoipa::path(delete, path = "/v1/projects/{project}/branches/{branch}/checkpoints/{checkpoint}", params(("project" = String, Path), ("branch" = String, Path), ("checkpoint" = String, Path)), responses((status = 204), (status = "default", body = Problem)))]
pub(super) async fn delete_checkpoint(
    State(service): Node,
    Path((project, branch, checkpoint)): Path<(String, String, String)>,
    Who(caller): Who,
) -> Result<StatusCode, Fault> {
    service.delete_checkpoint(&caller, &project, &branch, &checkpoint).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Connection URLs with the owner's password. Leaves a receipt.
#[utoipa::path(get, path = "/v1/projects/{project}/branches/{branch}/url", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = BranchUrl), (status = "default", body = Problem)))]
pub(super) async fn show_url(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Who(caller): Who,
) -> Answered<BranchUrl> {
    done(service.branch_url(&caller, &project, &branch).await?)
}

/// How a compute is, who uses it, and what keeps it awake.
#[utoipa::path(get, path = "/v1/projects/{project}/branches/{branch}/compute", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = Compute), (status = "default", body = Problem)))]
pub(super) async fn show_compute(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
) -> Answered<Compute> {
    done(service.compute(&project, &branch).await?)
}

/// Who is connected to a branch, and who of them keeps its compute awake.
#[utoipa::path(get, path = "/v1/projects/{project}/branches/{branch}/clients", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = ClientList), (status = "default", body = Problem)))]
pub(super) async fn list_clients(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
) -> Answered<ClientList> {
    done(service.list_clients(&project, &branch)?)
}

/// Suspends a compute now.
#[utoipa::path(post, path = "/v1/projects/{project}/branches/{branch}/compute/suspend", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = Compute), (status = "default", body = Problem)))]
pub(super) async fn suspend_compute(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Who(caller): Who,
) -> Answered<Compute> {
    done(service.suspend_compute(&caller, &project, &branch).await?)
}

/// Wakes a compute now.
#[utoipa::path(post, path = "/v1/projects/{project}/branches/{branch}/compute/wake", params(("project" = String, Path), ("branch" = String, Path)), responses((status = 200, body = Compute), (status = "default", body = Problem)))]
pub(super) async fn wake_compute(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Who(caller): Who,
) -> Answered<Compute> {
    done(service.wake_compute(&caller, &project, &branch).await?)
}

/// Writes a point out as a plain data directory.
#[utoipa::path(post, path = "/v1/projects/{project}/branches/{branch}/export", params(("project" = String, Path), ("branch" = String, Path)), request_body = Export, responses((status = 200, body = Exported), (status = "default", body = Problem)))]
pub(super) async fn export(
    State(service): Node,
    Path((project, branch)): Path<(String, String)>,
    Act { caller, body }: Act<Export>,
) -> Answered<Exported> {
    done(service.export(&caller, &project, &branch, body).await?.value)
}

/// All releases, oldest first.
#[utoipa::path(get, path = "/v1/projects/{project}/releases", params(("project" = String, Path)), responses((status = 200, body = ReleaseList), (status = "default", body = Problem)))]
pub(super) async fn list_releases(State(service): Node, Path(project): Path<String>) -> Answered<ReleaseList> {
    done(ReleaseList { releases: service.releases(&project).await? })
}

/// Deploys an artifact on `prod`.
#[utoipa::path(post, path = "/v1/projects/{project}/releases", params(("project" = String, Path)), request_body = CreateRelease, responses((status = 201, body = Release), (status = "default", body = Problem)))]
pub(super) async fn create_release(
    State(service): Node,
    Path(project): Path<String>,
    Act { caller, body }: Act<CreateRelease>,
) -> Answered<Release> {
    made(service.create_release(&caller, &project, body).await?)
}

/// Checks the ledger from its first entry on.
#[utoipa::path(get, path = "/v1/projects/{project}/ledger/verify", params(("project" = String, Path)), responses((status = 200, body = LedgerVerdict), (status = "default", body = Problem)))]
pub(super) async fn verify_ledger(State(service): Node, Path(project): Path<String>) -> Answered<LedgerVerdict> {
    done(service.ledger_verdict(&project).await?)
}

/// Deletes a project.
#[utoipa::path(delete, path = "/v1/projects/{project}", params(("project" = String, Path), Confirm), responses((status = 204), (status = "default", body = Problem)))]
pub(super) async fn delete_project(
    State(service): Node,
    Path(project): Path<String>,
    Query(query): Query<Confirm>,
    Who(caller): Who,
) -> Result<StatusCode, Fault> {
    service.delete_project(&caller, &project, query.confirm.as_deref()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes code and data back to a release, or with `plan` only tells what that would do.
#[utoipa::path(post, path = "/v1/projects/{project}/rollback", params(("project" = String, Path)), request_body = Rollback, responses((status = 200, body = inline(RollbackAnswer)), (status = "default", body = Problem)))]
pub(super) async fn rollback(
    State(service): Node,
    Path(project): Path<String>,
    Act { caller, body }: Act<Rollback>,
) -> Answered<RollbackAnswer> {
    if body.plan {
        return done(RollbackAnswer::Planned(Box::new(service.plan_rollback(&project, &body).await?)));
    }
    done(RollbackAnswer::Done(Box::new(service.rollback(&caller, &project, &body).await?.value)))
}

/// Hands a project over to another node of the bucket; its clients stay connected.
#[utoipa::path(post, path = "/v1/projects/{project}/move", params(("project" = String, Path)), request_body = Move, responses((status = 200, body = Moved), (status = "default", body = Problem)))]
pub(super) async fn move_project(
    State(service): Node,
    Path(project): Path<String>,
    Act { caller, body }: Act<Move>,
) -> Answered<Moved> {
    done(Moved { node: service.move_project(&caller, &project, &body.to).await? })
}

/// The nodes on this bucket that are alive, this one first.
#[utoipa::path(get, path = "/v1/nodes", responses((status = 200, body = NodeList), (status = "default", body = Problem)))]
pub(super) async fn list_nodes(State(service): Node) -> Answered<NodeList> {
    done(NodeList { nodes: service.node_views() })
}

/// Imports that are under way, or were since the service started.
#[utoipa::path(get, path = "/v1/imports", responses((status = 200, body = ImportList), (status = "default", body = Problem)))]
pub(super) async fn list_imports(State(service): Node) -> Answered<ImportList> {
    done(ImportList { imports: service.list_imports() })
}

/// Begins an import, which goes on after this has answered: a new branch, or a new project, of what was made elsewhere.
#[utoipa::path(post, path = "/v1/imports", request_body = StartImport, responses((status = 202, body = Import), (status = "default", body = Problem)))]
pub(super) async fn start_import(State(service): Node, Act { caller, body }: Act<StartImport>) -> Answered<Import> {
    let begun = service.import(&caller, body).await?;
    Ok((if begun.new { StatusCode::ACCEPTED } else { StatusCode::OK }, Json(begun.value)))
}

/// How far an import is, and what became of it.
#[utoipa::path(get, path = "/v1/imports/{import}", params(("import" = String, Path)), responses((status = 200, body = Import), (status = "default", body = Problem)))]
pub(super) async fn show_import(State(service): Node, Path(import): Path<OperationId>) -> Answered<Import> {
    done(service.show_import(import)?)
}

/// Gives an import up; it is undone.
#[utoipa::path(delete, path = "/v1/imports/{import}", params(("import" = String, Path)), responses((status = 200, body = Import), (status = "default", body = Problem)))]
pub(super) async fn cancel_import(State(service): Node, Path(import): Path<OperationId>) -> Answered<Import> {
    done(service.cancel_import(import)?)
}

/// Ends an import that follows its source with what the source has committed by now.
#[utoipa::path(post, path = "/v1/imports/{import}/cut-over", params(("import" = String, Path)), responses((status = 200, body = Import), (status = "default", body = Problem)))]
pub(super) async fn cut_over(State(service): Node, Path(import): Path<OperationId>) -> Answered<Import> {
    done(service.cut_over(import)?)
}

/// Tells what keeps an object of the bucket, or which rule lets it go.
#[utoipa::path(get, path = "/v1/objects/why", params(Which), responses((status = 200, body = Why), (status = "default", body = Problem)))]
pub(super) async fn why_object(State(service): Node, Query(query): Query<Which>) -> Answered<Why> {
    done(service.why(&query.object).await?)
}

/// Compares two points of a project: definitions, and rows by their primary keys.
#[utoipa::path(get, path = "/v1/projects/{project}/diff", params(Compare), responses((status = 200, body = Diff), (status = "default", body = Problem)))]
pub(super) async fn diff(
    State(service): Node,
    Path(project): Path<String>,
    Query(query): Query<Compare>,
) -> Answered<Diff> {
    let Compare { from, to, database, table, samples } = query;
    let request = DiffRequest { from: side(&from)?, to: side(&to)?, database, table, samples };
    done(service.diff(&project, request).await?)
}

/// `branch` or `branch@point`.
fn side(text: &str) -> Result<(BranchName, Point), Fault> {
    let (branch, point) = text.split_once('@').unwrap_or((text, "head"));
    let invalid = |why: InvalidName| Fault::new(ErrorKind::Invalid, why.to_string());
    Ok((branch.parse().map_err(invalid)?, point.parse().map_err(invalid)?))
}

/// Runs one round of collection, or with `dry_run` only tells what it would do.
#[utoipa::path(post, path = "/v1/collect", request_body = Collect, responses((status = 200, body = Collected), (status = "default", body = Problem)))]
pub(super) async fn collect(State(service): Node, Act { caller, body }: Act<Collect>) -> Answered<Collected> {
    done(service.collect(&caller, body.dry_run).await?)
}
