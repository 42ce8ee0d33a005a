//! Trying a release on a copy: a compute on an image of `prod`, which nobody else knows of and which goes after.
//!
//! **Crash**: the operation is undone, which removes the compute and its directory.

use std::fs;
use std::time::Instant;

use async_trait::async_trait;
use ebb_compute::manager::Unit;
use ebb_compute::postgres::{DATABASE, OWNER};
use ebb_types::BranchId;
use tokio_postgres::SimpleQueryMessage;

use super::{LocalNode, Node as _, Start};
use crate::deploy::Rehearsal;
use crate::error::LocalContext as _;
use crate::migrate::{self, Order, Session};
use crate::release_file::{Probe, Question};
use crate::{Error, Result, probe};

/// What deploys need of a machine besides running migrations.
#[async_trait]
pub trait Rehearsing {
    /// Tries migrations and SQL probes on a copy of a layer, in a directory of its own that `like` names. Nothing of it is
    /// left when this returns.
    async fn rehearse(&self, order: &Order, probes: &[Probe], like: &Start) -> Result<Rehearsal>;

    /// The first column of the first row that the running compute answers to the role that owns the data, as text; empty
    /// for no row, and for NULL.
    async fn ask(&self, branch: BranchId, sql: &str) -> Result<String>;

    /// How many migrations of a release are recorded as applied on the running compute; what a process that is gone had
    /// left running there is ended first.
    async fn applied(&self, branch: BranchId, release: &str) -> Result<u64>;
}

#[async_trait]
impl Rehearsing for LocalNode {
    async fn rehearse(&self, order: &Order, probes: &[Probe], like: &Start) -> Result<Rehearsal> {
        let began = Instant::now();
        let scratch = like.data.branch;
        self.discard(scratch).await?;
        self.remove_branch(scratch).await?;
        self.make_openable(like.data.head).await?;
        let dir = self.branch_dir(scratch);
        fs::create_dir_all(&dir).on("create", &dir)?;
        self.make_volume(&like.data, like.data.head, like.fork).await?;
        let mut spec = self.spec(like, self.installation(like.pg_major)?);
        spec.archive = None;
        spec.hydrate = false;
        spec.settings = vec![("autovacuum".to_owned(), "off".to_owned())];
        let unit = Unit::start(&self.exe, &spec).await?;
        let tried = try_on(&unit, order, probes).await;
        self.discard(scratch).await?;
        self.remove_branch(scratch).await?;
        Ok(Rehearsal { ms: probe::ms_since(began), ..tried? })
    }

    async fn ask(&self, branch: BranchId, sql: &str) -> Result<String> {
        match self.unit(branch) {
            Some(unit) => ask(&unit, sql).await,
            None => Err(ebb_compute::Error::Gone.into()),
        }
    }

    async fn applied(&self, branch: BranchId, release: &str) -> Result<u64> {
        match self.unit(branch) {
            Some(unit) => migrate::applied(&unit.socket(), release).await,
            None => Err(ebb_compute::Error::Gone.into()),
        }
    }
}

async fn try_on(unit: &Unit, order: &Order, probes: &[Probe]) -> Result<Rehearsal> {
    let migrated = migrate::run(&unit.socket(), order).await?;
    let mut rehearsal = Rehearsal { migrations: migrated.runs, ..Rehearsal::default() };
    rehearsal.fault = migrated.fault.map(|fault| fault.chain());
    if rehearsal.fault.is_some() {
        return Ok(rehearsal);
    }
    for asked in probes {
        let Question::Sql { sql, expect } = &asked.question else { continue };
        // What does not change needs no second try.
        let once = Probe { retries: 0, ..asked.clone() };
        let answered = probe::until_right(&once, || async move { probe::compare(&ask(unit, sql).await, expect) }).await;
        rehearsal.probes.push(answered);
    }
    rehearsal.fault = crate::deploy::faults(&rehearsal.probes);
    Ok(rehearsal)
}

async fn ask(unit: &Unit, sql: &str) -> Result<String> {
    let session = Session::open_as(&unit.socket(), OWNER, DATABASE, "ebb probe").await?;
    let answers = session.client.simple_query(sql).await.map_err(migrate::lost)?;
    let first = answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => Some(row.try_get(0).ok().flatten().unwrap_or_default().to_owned()),
        _ => None,
    });
    first.map_or_else(|| Ok(String::new()), Ok::<_, Error>)
}
