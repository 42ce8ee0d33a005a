//! The route that searches a ledger.

use axum::extract::{Path, Query, State};
use ebb_types::{ErrorKind, Timestamp};
use serde::Deserialize;
use utoipa::IntoParams;

use super::call::Fault;
use super::routes::{Answered, Node, done};
use super::types::{LedgerEntries, Problem};
use crate::audit::{PAGE, PAGE_MAX, Search};

/// Query of `GET /v1/projects/{project}/ledger`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// A part of who asked.
    actor: Option<String>,
    /// A branch, checkpoint or release, as receipts name it: `dev`, `dev@before-import`, `v2`.
    on: Option<String>,
    /// The act (`create branch`, `release` …), or an operation's identifier.
    operation: Option<String>,
    /// Written at this time or later.
    #[param(value_type = Option<String>)]
    since: Option<Timestamp>,
    /// Written before this time.
    #[param(value_type = Option<String>)]
    until: Option<Timestamp>,
    /// Only entries after this one: `next` of the page before.
    after: Option<u64>,
    /// How many at most; 1000 if nothing is said, 10000 at most.
    limit: Option<usize>,
}

/// Receipts, oldest first, by page.
#[utoipa::path(get, path = "/v1/projects/{project}/ledger", params(("project" = String, Path), Wanted), responses((status = 200, body = LedgerEntries), (status = "default", body = Problem)))]
pub(super) async fn list_ledger(
    State(service): Node,
    Path(project): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Answered<LedgerEntries> {
    let Wanted { actor, on, operation, since, until, after, limit } = wanted;
    let limit = limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Fault::new(ErrorKind::Invalid, format!("limit must be from 1 to {PAGE_MAX}")));
    }
    let search = Search { actor, on, operation, since, until };
    done(service.search_ledger(&project, &search, after, limit).await?)
}
