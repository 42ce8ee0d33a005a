//! Imports on this machine: what is made elsewhere becomes a layer.
//!
//! A cluster is staged as a plain data directory below `imports/`, a dump is restored into a compute on the template; both
//! under the name that the operation's plan has for it. See [`ebb_compute::import`].
//!
//! **Crash**: [`super::Node::import_leave`] removes whatever there is.

use std::fmt;
use std::path::{Path, PathBuf};

use ebb_compute::control::Durability;
use ebb_compute::import::{self, At, Dump, Progress, Settlement, Source, Stage};
use ebb_compute::manager::Unit;
use ebb_types::{BranchId, LayerId, Lsn};
use tokio_util::sync::CancellationToken;

use super::{Line, LocalNode, Node as _, Start, blocking};
use crate::Result;
use crate::error::LocalContext as _;

/// Settings of the compute that a dump is restored into: nobody waits for its commits, and its WAL is of no use.
const RESTORING: [(&str, &str); 5] = [
    ("synchronous_commit", "off"),
    ("maintenance_work_mem", "128MB"),
    ("shared_buffers", "128MB"),
    ("max_wal_size", "1GB"),
    ("autovacuum", "off"),
];

/// What somebody wants to import.
#[derive(Clone)]
pub enum ImportRequest {
    /// A running server, by URL.
    Server(String),
    /// A data directory on this machine.
    Directory(PathBuf),
    /// What pg_dump wrote, on this machine.
    Dump(PathBuf),
}

impl fmt::Debug for ImportRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // It may hold a password.
            ImportRequest::Server(_) => f.write_str("Server"),
            ImportRequest::Directory(path) => f.debug_tuple("Directory").field(path).finish(),
            ImportRequest::Dump(path) => f.debug_tuple("Dump").field(path).finish(),
        }
    }
}

/// What was found of it.
#[derive(Debug, Clone)]
pub enum ImportFrom {
    /// A running server.
    Server(Source),
    /// A data directory.
    Directory(PathBuf),
    /// What pg_dump wrote.
    Dump(Dump),
}

/// An import, as the machine carries it out.
#[derive(Debug, Clone)]
pub struct ImportJob {
    /// Names the directory in which it happens.
    pub scratch: BranchId,
    /// The layer that it makes.
    pub layer: LayerId,
    /// What is imported.
    pub from: ImportFrom,
    /// Major version of Postgres.
    pub pg_major: u32,
    /// What it is to become.
    pub settlement: Settlement,
    /// For a server that is followed: cancelled when it is cut over.
    pub cut_over: Option<CancellationToken>,
    /// How far it is.
    pub progress: Progress,
}

/// Where imports are staged, in the data directory.
const STAGES: &str = "imports";

/// Removes what imports of an earlier service have left, and ends the servers that ran there.
pub(crate) async fn remove_import_stages(data_dir: &Path) -> Result<()> {
    let stages = data_dir.join(STAGES);
    blocking("removing what imports have left", move || {
        let entries = match std::fs::read_dir(&stages) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.on("list", &stages)?,
        };
        for entry in entries {
            Stage::at(entry.on("list", &stages)?.path()).clear()?;
        }
        Ok(())
    })
    .await
}

impl LocalNode {
    fn stage(&self, scratch: BranchId) -> Stage {
        Stage::at(self.data_dir.join(STAGES).join(scratch.to_string()))
    }

    pub(super) async fn look_at_import(&self, request: &ImportRequest) -> Result<(ImportFrom, Option<u32>)> {
        match request.clone() {
            ImportRequest::Server(url) => {
                let source = Source::parse(&url)?;
                let pg_major = source.pg_major().await?;
                Ok((ImportFrom::Server(source), Some(pg_major)))
            }
            ImportRequest::Directory(path) => {
                let looked = path.clone();
                let found = blocking("looking at a data directory", move || Ok(import::look(&looked)?)).await?;
                Ok((ImportFrom::Directory(path), Some(found.pg_major)))
            }
            ImportRequest::Dump(path) => {
                let dump = blocking("looking at a dump", move || Ok(Dump::look(&path)?)).await?;
                Ok((ImportFrom::Dump(dump), None))
            }
        }
    }

    pub(super) async fn copy_import(&self, job: &ImportJob) -> Result<()> {
        let installation = self.installation(job.pg_major)?;
        let stage = self.stage(job.scratch);
        match &job.from {
            ImportFrom::Directory(path) => Ok(import::copy_directory(path, &stage, &job.progress).await?),
            ImportFrom::Server(source) => {
                let cut_over = job.cut_over.as_ref();
                Ok(import::take_server(source, &installation, &stage, cut_over, &job.progress).await?)
            }
            ImportFrom::Dump(dump) => {
                let unit = self.unit_on_template(job).await?;
                let socket = unit.socket();
                let socket_dir = socket.parent().unwrap_or(&socket);
                let to = At { installation: &installation, socket_dir };
                Ok(import::restore(dump, to, &job.progress).await?)
            }
        }
    }

    /// A compute on a fresh volume of the template, which nobody else knows of.
    async fn unit_on_template(&self, job: &ImportJob) -> Result<Unit> {
        let template = self.template(job.pg_major).await?;
        self.discard(job.scratch).await?;
        self.remove_branch(job.scratch).await?;
        self.make_openable(template).await?;
        let dir = self.branch_dir(job.scratch);
        std::fs::create_dir_all(&dir).on("create", &dir)?;
        let start = Start {
            data: Line { branch: job.scratch, line: 0, head: template, epoch: 0 },
            pg_major: job.pg_major,
            head_end: None,
            earlier: Vec::new(),
            begun_here: true,
            fork: false,
            durability: Durability::Local,
            verifier: job.settlement.verifier.clone(),
        };
        self.make_volume(&start.data, template, start.fork).await?;
        let mut spec = self.spec(&start, self.installation(job.pg_major)?);
        // The branch that comes of it has an archive of its own.
        spec.archive = None;
        spec.settings = RESTORING.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Ok(Unit::start(&self.exe, &spec).await?)
    }

    pub(super) async fn settle_import(&self, job: &ImportJob) -> Result<()> {
        let (installation, stage) = (self.installation(job.pg_major)?, self.stage(job.scratch));
        import::recover(&installation, &stage, &job.progress).await?;
        Ok(import::finish(&installation, &stage, &job.settlement, &job.progress).await?)
    }

    pub(super) async fn seal_import(&self, job: &ImportJob) -> Result<Option<Lsn>> {
        if let ImportFrom::Dump(_) = job.from {
            let line = Line { branch: job.scratch, line: 0, head: job.layer, epoch: 0 };
            if let Some(unit) = Unit::adopt(&self.branch_dir(job.scratch)).await? {
                let sealed = unit.stop(job.layer).await?;
                self.note_sealed(sealed.layer, job.scratch);
                return Ok(sealed.end);
            }
            // It was stopped and sealed before, or lost.
            let sealed = self.seal(&line, job.layer).await?;
            return Ok(sealed.and_then(|sealed| sealed.end));
        }
        let stage = self.stage(job.scratch);
        self.store.import_as(job.layer, &stage.data(), Some(&stage.roles())).await?;
        Ok(None)
    }

    pub(super) async fn leave_import(&self, scratch: BranchId, layer: Option<LayerId>) -> Result<()> {
        let stage = self.stage(scratch);
        blocking("removing what an import used", move || Ok(stage.clear()?)).await?;
        self.discard(scratch).await?;
        // A seal is finished before its volume goes.
        self.remove_branch(scratch).await?;
        if let Some(layer) = layer {
            self.store.remove_local(layer).await?;
        }
        Ok(())
    }
}
