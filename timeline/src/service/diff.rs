//! What differs between two points of a project.

use std::sync::Arc;

use ebb_compute::postgres::DATABASE;
use ebb_types::{BranchName, LayerId, Point};

use super::visits::Held;
use super::{Project, Service};
use crate::diff::{Asked, Diff, Side, diff};
use crate::{Refusal, Result};

/// How many rows of each kind are shown where nobody says.
const SAMPLES: usize = 3;

/// LIMIT: samples are held in memory, and read by people.
const SAMPLES_MAX: usize = 100;

/// What is to be compared.
#[derive(Debug, Clone)]
pub struct DiffRequest {
    /// The older side.
    pub from: (BranchName, Point),
    /// The younger side.
    pub to: (BranchName, Point),
    /// The database; `app` if none is named.
    pub database: Option<String>,
    /// Only this table.
    pub table: Option<String>,
    /// How many rows of each kind are shown.
    pub samples: Option<usize>,
}

impl Service {
    /// Compares two points of a project, each by a visit of its own. Wakes nobody; a head that is not sealed is sealed.
    ///
    /// # Errors
    /// If a point cannot be visited, or a side has no such database.
    pub async fn diff(self: &Arc<Self>, project: &str, request: DiffRequest) -> Result<Diff> {
        let project = self.project(project)?;
        let samples = request.samples.unwrap_or(SAMPLES);
        if samples > SAMPLES_MAX {
            return Err(Refusal::Invalid(format!("at most {SAMPLES_MAX} samples are shown")).into());
        }
        let database = request.database.unwrap_or_else(|| DATABASE.to_owned());
        let (_from_held, _to_held);
        let (from, to);
        (from, _from_held) = self.side(&project, &request.from, &database).await?;
        (to, _to_held) = self.side(&project, &request.to, &database).await?;
        let files = self.node.same_files(from.1, to.1).await?;
        diff(from.0, to.0, &Asked { database, table: request.table, samples }, &files).await
    }

    async fn side(
        self: &Arc<Self>,
        project: &Arc<Project>,
        (branch, point): &(BranchName, Point),
        database: &str,
    ) -> Result<((Side, LayerId), Held)> {
        let (id, pg_major) = {
            let state = project.ledger.state();
            (state.branch(branch.as_str())?.0, state.facts()?.pg_major)
        };
        if *point == Point::Head {
            let cell = project.cell(id);
            let _ops = self.lock(&cell).await?;
            let line = project.line(id)?.line;
            let sealed = self.seal_locked(project, id, LayerId::generate()).await?;
            self.note_seal(project, id, line, sealed).await?;
        }
        let held = self.hold_visit(id, point)?;
        let (socket, layer) = held.open(self).await?;
        let schema = self.node.dump_schema(pg_major, &socket, database).await?;
        let at = match point {
            Point::Head => format!("{}/{branch}", project.name),
            point => format!("{}/{branch}@{point}", project.name),
        };
        Ok(((Side { name: at, socket, schema }, layer), held))
    }
}
