//! The JSON of the REST interface: what requests carry and what answers hold.

use std::path::PathBuf;

use ebb_compute::control::{Durability, Status};
use ebb_compute::import::{Counted, DumpFormat, Phase};
use ebb_types::{
    AllowList, BranchId, BranchName, CheckpointName, ErrorKind, LayerId, Lsn, NodeId, OperationId, PointRef, ProjectId,
    ProjectName, ReleaseId, Timestamp,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::clients::{Pinned, SessionRow};
use crate::deploy::{MigrationRun, Part, Probed, Rehearsal};
use crate::diff::TableDiff;

pub use super::upkeep::*;

/// Answer to `GET /v1/health`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Version of the program.
    pub version: String,
    /// Always true: a service that is not well does not answer.
    pub ok: bool,
}

/// Body of `POST /v1/projects`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateProject {
    /// The new project's name.
    #[schema(value_type = String)]
    pub name: ProjectName,
    /// Absolute path of the symlink a release switches; default: `projects/<name>/current` in the data directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub current: Option<PathBuf>,
    /// Major version of Postgres; default: the newest installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pg_major: Option<u32>,
}

/// Answer to `POST /v1/projects`.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct CreatedProject {
    /// The project.
    pub project: Project,
    /// The role its owner logs in as.
    pub role: String,
    /// That role's password: shown here, and by `ebb url`.
    pub password: String,
    /// Whole connection URLs.
    pub urls: ProjectUrls,
}

impl std::fmt::Debug for CreatedProject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedProject").field("project", &self.project).finish_non_exhaustive()
    }
}

/// Connection URLs of a new project's branches.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct ProjectUrls {
    /// Of `prod`.
    pub prod: String,
    /// Of `dev`.
    pub dev: String,
}

/// Answer to `GET /v1/projects`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ProjectList {
    /// All projects, by name.
    pub projects: Vec<Project>,
}

/// One app.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Project {
    /// Its identifier.
    #[schema(value_type = String)]
    pub id: ProjectId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: ProjectName,
    /// Major version of its Postgres.
    pub pg_major: u32,
    /// When it was made.
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// The symlink a release switches.
    #[schema(value_type = String)]
    pub current: PathBuf,
    /// Its branches, `prod` first, then by name.
    pub branches: Vec<Branch>,
    /// How many releases it has.
    pub releases: u64,
    /// What it stores; absent where that was not asked for, or cannot be told now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<Stored>,
}

/// Bytes that a branch or a project stores.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stored {
    /// In the bucket, packed, in layers that nothing else needs: what deleting it would free.
    pub own_bytes: u64,
    /// In the bucket, packed, in layers that others need as well.
    pub shared_bytes: u64,
    /// On this node's disk, beyond the newest seal.
    pub unsealed_bytes: u64,
    /// Layers that are not in the bucket yet, and in none of these sums.
    pub waiting_layers: u64,
}

/// Answer to `GET /v1/projects/{p}/branches`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct BranchList {
    /// All branches of the project, `prod` first, then by name.
    pub branches: Vec<Branch>,
}

/// One branch.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Branch {
    /// Its identifier: stays the same whatever the branch is restored to.
    #[schema(value_type = String)]
    pub id: BranchId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: BranchName,
    /// The project it is in.
    #[schema(value_type = String)]
    pub project: ProjectName,
    /// Its address, `branch--project`.
    pub endpoint: String,
    /// Where it was branched from; absent for a branch made with its project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// Its newest recorded seal.
    #[schema(value_type = String)]
    pub head: LayerId,
    /// State of its compute: `suspended`, `waking`, `active` or `suspending`.
    pub state: String,
    /// When it was made.
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// Idle time after which its compute is suspended, in seconds.
    pub idle_suspend_seconds: f64,
    /// How long its past can be gone back to, in seconds.
    pub window_seconds: f64,
    /// The first moment that it can be taken back to now.
    #[schema(value_type = String)]
    pub window_from: Timestamp,
    /// What a commit waits for: `local`, the disk of the node; or `bucket`.
    #[schema(value_type = String)]
    pub durability: Durability,
    /// What becomes of idle sessions that hold what cannot be given back, when the branch would be asleep but for them:
    /// they `keep` it awake, or `end`.
    #[serde(default)]
    pub pinned: Pinned,
    /// How many backends its clients in transaction mode share; absent: a share of the connections that Postgres takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_size: Option<u32>,
    /// What is done for it by itself.
    #[serde(default)]
    pub upkeep: Upkeep,
    /// The networks from which clients may connect, `192.0.2.0/24`; none: all of them.
    #[serde(default, skip_serializing_if = "AllowList::is_any")]
    #[schema(value_type = Vec<String>)]
    pub allow: AllowList,
    /// For a rescue branch: until when nothing may delete it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub rescue_until: Option<Timestamp>,
    /// What it stores; absent where that was not asked for, or cannot be told now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<Stored>,
}

/// Where a branch comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Parent {
    /// The source's name when the branch was made.
    #[schema(value_type = String)]
    pub branch: BranchName,
    /// The point on it: `head` or a checkpoint's name.
    pub point: String,
}

/// Body of `POST /v1/projects/{p}/branches`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateBranch {
    /// The new branch's name.
    #[schema(value_type = String)]
    pub name: BranchName,
    /// `project/branch` or `project/branch@point`, in the same project; default: the head of `prod`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub from: Option<PointRef>,
}

/// Body of `PATCH /v1/projects/{p}/branches/{b}`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeBranch {
    /// Idle time after which the compute is suspended, in seconds; absent: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_suspend_seconds: Option<f64>,
    /// How long the branch's past can be gone back to, in seconds; absent: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_seconds: Option<f64>,
    /// What a commit waits for, `local` or `bucket`; absent: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub durability: Option<Durability>,
    /// What becomes of idle sessions that hold what cannot be given back: they `keep` it awake, or `end`; absent: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<Pinned>,
    /// How many backends its clients in transaction mode share, 0 for a share of what Postgres takes; absent: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_size: Option<u32>,
    /// What is done for it by itself; absent: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upkeep: Option<ChangeUpkeep>,
    /// The networks from which clients may connect, `192.0.2.0/24`, instead of those until now; none: all of them; absent:
    /// as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub allow: Option<AllowList>,
}

/// Body of `POST …/restore`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreBranch {
    /// A checkpoint of the branch.
    pub to: String,
}

/// Answer to `POST …/restore`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Restored {
    /// The branch, at its new head.
    pub branch: Branch,
    /// Where the old head is now.
    pub rescue: Branch,
}

/// Body of `POST …/checkpoints`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateCheckpoint {
    /// The new checkpoint's name.
    #[schema(value_type = String)]
    pub name: CheckpointName,
}

/// A named, immutable point of a branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Checkpoint {
    /// Its name.
    #[schema(value_type = String)]
    pub name: CheckpointName,
    /// The branch it is on.
    #[schema(value_type = String)]
    pub branch: BranchName,
    /// The layer it names.
    #[schema(value_type = String)]
    pub layer: LayerId,
    /// When it was made.
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// End of WAL when it was made, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub lsn: Option<Lsn>,
    /// Whether a schedule made it: then the schedule also deletes it.
    #[serde(default)]
    pub automatic: bool,
    /// How old it is.
    #[serde(default)]
    pub age_seconds: u64,
    /// Bytes of the files it stands for; absent where that was not asked for, or cannot be told now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_bytes: Option<u64>,
    /// Bytes in the bucket that nothing else needs: what deleting it would free. Absent as `image_bytes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_bytes: Option<u64>,
    /// Its last drill, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_drill: Option<Drill>,
}

/// Answer to `GET …/checkpoints`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CheckpointList {
    /// All checkpoints of the branch, oldest first.
    pub checkpoints: Vec<Checkpoint>,
}

/// Answer to `GET …/url`.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct BranchUrl {
    /// A connection URL that works with any driver that passes `options`.
    pub url: String,
    /// A connection URL that names the branch as host (TLS, verified against Ebb's own CA).
    pub url_sni: String,
    /// The role in both.
    pub role: String,
    /// The database in both.
    pub database: String,
}

/// Answer to `GET …/compute`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Compute {
    /// `suspended`, `waking`, `active` or `suspending`.
    pub state: String,
    /// Since when.
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// What the unit says of itself, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub unit: Option<Status>,
    /// Client sessions, hibernated ones included.
    pub sessions: Vec<SessionRow>,
    /// What kept it from being suspended when that was last tried: one line per session.
    pub keeps_awake: Vec<String>,
    /// Wakes since the service started.
    pub wakes: u64,
    /// Moments of the branch that are visited, each by a compute of its own; oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub visits: Vec<Visit>,
}

/// Answer to `GET …/wakes`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct WakeList {
    /// The newest first.
    pub wakes: Vec<Wake>,
}

/// One wake of a branch.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Wake {
    /// The branch's identifier.
    #[schema(value_type = String)]
    pub id: BranchId,
    /// `project/branch`; absent if the branch was deleted since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// When it began.
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// From being asked for to its end.
    pub milliseconds: f64,
    /// Its stages, in their order, as far as they were reached and are known.
    pub stages: Vec<WakeStage>,
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A stage of a wake.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct WakeStage {
    /// `resolve`, `prepare`, `spawn`, `isolate`, `open`, `mount`, `start`, `recover`.
    pub name: String,
    /// How long it took.
    pub milliseconds: f64,
}

/// Answer to `GET …/clients`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ClientList {
    /// How its compute is: `suspended`, `waking`, `active` or `suspending`.
    pub state: String,
    /// Since when.
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// Everyone who is connected, hibernated ones included, on whatever node; who came first stands first.
    pub clients: Vec<SessionRow>,
    /// Moments of the branch that are visited, each with clients of its own; oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub visits: Vec<Visit>,
}

/// A moment that is open for reading, as long as somebody reads.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Visit {
    /// Its identifier, which no branch has.
    #[schema(value_type = String)]
    pub id: BranchId,
    /// The moment, as it was asked for first.
    pub point: String,
    /// Since when.
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// `open`, or `named` while it is not yet.
    pub state: String,
    /// Client sessions.
    pub sessions: Vec<SessionRow>,
}

/// Body of `POST …/releases`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRelease {
    /// Absolute path of the directory with the code and `migrations/*.sql`, on the machine of the service.
    #[schema(value_type = String)]
    pub artifact: PathBuf,
}

/// One release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Release {
    /// Its identifier.
    #[schema(value_type = String)]
    pub id: ReleaseId,
    /// `v1`, `v2` ….
    pub name: String,
    /// BLAKE3 of the artifact's content, in hex.
    pub artifact: String,
    /// The migrations it carries, in order.
    pub migrations: Vec<String>,
    /// The checkpoint of `prod` taken before it touched anything.
    #[schema(value_type = String)]
    pub checkpoint: CheckpointName,
    /// When it was begun.
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// `deploying`, `deployed`, `failed` or `rolled_back`.
    pub state: String,
    /// Whether its code is what `current` points at.
    pub current: bool,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// How it fared on a copy of `prod`; absent in lists, as what follows is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rehearsal: Option<Rehearsal>,
    /// How its migrations fared, for a release that describes itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<MigrationRun>,
    /// What its probes came to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probed>,
    /// The branch that its data was set aside to, when it was taken back by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub rescue: Option<BranchName>,
}

/// Answer to `POST …/rehearsals`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rehearsed {
    /// BLAKE3 of the artifact's content, in hex.
    pub artifact: String,
    /// What trying it showed.
    #[serde(flatten)]
    pub report: Rehearsal,
}

/// Answer to `GET …/releases`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ReleaseList {
    /// All releases, oldest first.
    pub releases: Vec<Release>,
}

/// Body of `POST …/rollback`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// The release to go back to.
    pub to: String,
    /// Only tell what would happen.
    #[serde(default)]
    pub plan: bool,
    /// Leave the data as it is.
    #[serde(default)]
    pub code_only: bool,
    /// Leave the code as it is.
    #[serde(default)]
    pub data_only: bool,
    /// With `plan`: count the rows that were written since, table by table.
    #[serde(default)]
    pub rows: bool,
}

impl Rollback {
    /// What goes back.
    ///
    /// # Errors
    /// If nothing would.
    pub fn part(&self) -> Result<Part, crate::Refusal> {
        match (self.code_only, self.data_only) {
            (false, false) => Ok(Part::Both),
            (true, false) => Ok(Part::Code),
            (false, true) => Ok(Part::Data),
            (true, true) => Err(crate::Refusal::Invalid("of code_only and data_only only one can be".to_owned())),
        }
    }
}

/// What was written since a checkpoint, and would be set aside.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Written {
    /// Tables whose rows differ.
    pub tables: Vec<TableWritten>,
    /// Objects whose definitions differ.
    pub objects: Vec<String>,
    /// Why it cannot be told, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unknown: Option<String>,
}

/// Rows of one table that differ from a checkpoint's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TableWritten {
    /// Its schema and name.
    pub table: String,
    /// Rows that are new.
    pub added: u64,
    /// Rows that are gone.
    pub removed: u64,
    /// Rows that are others.
    pub changed: u64,
    /// What a person should know of the comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl From<TableDiff> for TableWritten {
    fn from(table: TableDiff) -> Self {
        let TableDiff { added, removed, changed, note, .. } = table;
        Self { table: format!("{}.{}", table.schema, table.table), added, removed, changed, note }
    }
}

/// What a rollback does: answer to `POST …/rollback` with `plan`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RollbackPlan {
    /// The release that comes back.
    pub release: String,
    /// The checkpoint `prod` goes back to.
    #[schema(value_type = String)]
    pub checkpoint: CheckpointName,
    /// The switch of the code.
    pub code: CodeSwitch,
    /// What goes to the rescue branch.
    pub set_aside: SetAside,
    /// Whether code, data or both go back.
    #[serde(default)]
    pub part: Part,
    /// What was written since, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<Written>,
}

/// From which artifact to which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CodeSwitch {
    /// What `current` points at now, if anything: BLAKE3 in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// What it will point at.
    pub to: String,
}

/// What is newer than the checkpoint, and moves to the rescue branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SetAside {
    /// Transactions begun since, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transactions: Option<u64>,
    /// Bytes of WAL written since, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_bytes: Option<u64>,
    /// Releases made since.
    pub releases: Vec<String>,
    /// Layers sealed since.
    pub layers: u64,
    /// When the checkpoint was made.
    #[schema(value_type = String)]
    pub since: Timestamp,
}

/// Answer to `POST …/rollback` without `plan`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RolledBack {
    /// What was done.
    pub plan: RollbackPlan,
    /// Where the old head of `prod` is now; absent if only the code went back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rescue: Option<Branch>,
}

/// Answer to `POST …/rollback`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum RollbackAnswer {
    /// It was done.
    Done(Box<RolledBack>),
    /// With `plan`: it was only told.
    Planned(Box<RollbackPlan>),
}

/// Answer to `GET …/ledger`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct LedgerEntries {
    /// Those that were looked for, oldest first.
    pub entries: Vec<Entry>,
    /// Where it goes on, if there are more: `after` of the next request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// One receipt.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Entry {
    /// Its number, from 0.
    pub seq: u64,
    /// When it was written.
    #[schema(value_type = String)]
    pub time: Timestamp,
    /// Who asked.
    pub actor: String,
    /// What was done: `create branch`, `restore` ….
    pub act: String,
    /// On what.
    pub on: String,
    /// How far it came: `begun`, `done`, `undone`, or the step.
    pub result: String,
    /// The operation it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub operation: Option<OperationId>,
    /// The events, as stored.
    #[schema(value_type = Vec<Object>)]
    pub events: Vec<serde_json::Value>,
    /// Hash of the entry before, in hex.
    pub prev: String,
    /// Hash of this entry, in hex.
    pub hash: String,
}

/// Answer to `GET …/ledger/verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LedgerVerdict {
    /// Whether every entry is as it was written.
    pub ok: bool,
    /// How many entries there are.
    pub entries: u64,
    /// Hash of the last good entry, in hex.
    pub head_hash: String,
    /// The first fault found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// Body of `POST …/export`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// A checkpoint's name; default: the head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// Absolute path of a directory that does not exist or is empty, on the machine of the service; for a dump: of what
    /// does not exist.
    #[schema(value_type = String)]
    pub dir: PathBuf,
    /// As what pg_dump writes: `custom`, `directory`, `tar` or `plain`; default: as a data directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub format: Option<DumpFormat>,
    /// For a dump: of which database; default: `app`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
}

/// Answer to `POST …/export`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Exported {
    /// The directory: a data directory that stock Postgres starts; or the dump.
    #[schema(value_type = String)]
    pub dir: PathBuf,
    /// Bytes of the files in it.
    pub bytes: u64,
}

/// Body of `POST /v1/imports`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartImport {
    /// The project. One that does not exist is made, with the import as its `prod`.
    #[schema(value_type = String)]
    pub project: ProjectName,
    /// The new branch's name; absent for a project that is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub branch: Option<BranchName>,
    /// What to import.
    pub from: ImportOrigin,
    /// For a running server: go on receiving and replaying what it writes until `…/cut-over`.
    #[serde(default)]
    pub follow: bool,
    /// Which of the source's databases becomes `app`, the one that URLs and releases name; default: its only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
}

/// What to import; paths are absolute, on the machine of the service.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ImportOrigin {
    /// A running server.
    Server {
        /// Its URL, of a role that may replicate.
        url: String,
    },
    /// A data directory on which no server runs.
    Directory {
        /// Its path.
        #[schema(value_type = String)]
        path: PathBuf,
    },
    /// What pg_dump wrote, in any of its formats.
    Dump {
        /// Its path.
        #[schema(value_type = String)]
        path: PathBuf,
    },
}

impl std::fmt::Debug for ImportOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // It may hold a password.
            ImportOrigin::Server { .. } => f.write_str("Server"),
            ImportOrigin::Directory { path } => f.debug_tuple("Directory").field(path).finish(),
            ImportOrigin::Dump { path } => f.debug_tuple("Dump").field(path).finish(),
        }
    }
}

/// How an import stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImportState {
    /// It goes on.
    Running,
    /// The branch is there.
    Done,
    /// It was undone; nothing of it is left.
    Failed,
}

/// An import, and how far it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Import {
    /// The operation.
    #[schema(value_type = String)]
    pub id: OperationId,
    /// The project …
    #[schema(value_type = String)]
    pub project: ProjectName,
    /// … and the branch it becomes.
    #[schema(value_type = String)]
    pub branch: BranchName,
    /// Where it comes from, without a password.
    pub from: String,
    /// When it was begun.
    #[schema(value_type = String)]
    pub begun_at: Timestamp,
    /// How it stands.
    pub state: ImportState,
    /// What it is doing.
    #[schema(value_type = String)]
    pub phase: Phase,
    /// What `done` and `total` count: `bytes` or `objects`.
    #[schema(value_type = String)]
    pub counted: Counted,
    /// How much of the phase is done.
    pub done: u64,
    /// Of how much, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// How much a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_second: Option<f64>,
    /// How long the phase goes on at that rate, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<f64>,
    /// While a source is followed: bytes of WAL that it has written and that are not here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind_bytes: Option<u64>,
    /// Whether it follows its source, and waits to be cut over.
    pub can_cut_over: bool,
    /// What a person should know about it.
    pub notes: Vec<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// What to do about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Answer to `GET /v1/imports`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ImportList {
    /// Those that are under way or were since the service started, oldest first.
    pub imports: Vec<Import>,
}

/// Every error's body (`application/problem+json`, RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A URI naming the kind of problem.
    #[serde(rename = "type")]
    pub type_uri: String,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened.
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The kind, for programs.
    #[schema(value_type = String)]
    pub kind: ErrorKind,
}

/// Body of `POST /v1/projects/{project}/move`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Move {
    /// The node that the project goes to: its name or identifier.
    pub to: String,
}

/// Where a project is now.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// Its owner.
    #[schema(value_type = String)]
    pub node: NodeId,
}

/// All nodes on the bucket that are alive.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeList {
    /// The one that answers first.
    pub nodes: Vec<Node>,
}

/// A node.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its identifier.
    #[schema(value_type = String)]
    pub id: NodeId,
    /// What people call it.
    pub name: String,
    /// Where its API is, on its own machine.
    pub api: Option<String>,
    /// Where other nodes reach it.
    pub peer: Option<String>,
    /// The projects that it owns, as far as the node that answers knows.
    #[schema(value_type = Vec<String>)]
    pub projects: Vec<ProjectName>,
}

/// Body of `POST /v1/collect`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Collect {
    /// Only tell what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer to `POST /v1/collect`: what one round of collection did, or with `dry_run` would do.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Collected {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// Objects that may be collected and are needed.
    pub kept_objects: u64,
    /// Their bytes.
    pub kept_bytes: u64,
    /// Objects that nothing needs since lately: they go after the grace period.
    pub marked: Vec<Unkept>,
    /// Objects that were marked, and are needed after all.
    pub spared: Vec<String>,
    /// Objects that are gone.
    pub deleted: Vec<Unkept>,
    /// Marked objects that wait for the end of their grace period.
    pub waiting: Vec<Waiting>,
    /// Layers removed from this node.
    pub local_layers: u64,
    /// Directories of deleted branches removed from this node.
    pub local_branches: u64,
    /// What a rule let go in this round: what only that needed is marked next.
    #[serde(default)]
    pub expired: Vec<Expired>,
}

/// An object that nothing needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unkept {
    /// Its key.
    pub object: String,
    /// Its size.
    pub bytes: u64,
    /// Why it may go.
    pub why: String,
}

/// An object that nothing needs, and that is still there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    /// Which, and why.
    #[serde(flatten)]
    pub object: Unkept,
    /// Since when it is marked.
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// When it may be deleted.
    #[schema(value_type = String)]
    pub until: Timestamp,
}

/// Answer to `GET /v1/objects/why`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Why {
    /// The key of the object.
    pub object: String,
    /// How it stands.
    pub verdict: Verdict,
    /// Its size; absent if it is not in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// How many things keep it.
    pub keepers: u64,
    /// What keeps it, one line each; the first hundred.
    pub kept_by: Vec<String>,
    /// The rule by which it goes, or went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Since when it is marked, or gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub since: Option<Timestamp>,
    /// When it may be deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub until: Option<Timestamp>,
}

/// How an object stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Something needs it.
    Kept,
    /// Nothing needs it; it is marked, and goes after the grace period.
    Marked,
    /// Nothing needs it; a round of collection will mark it.
    Unkept,
    /// No ledger ever named it; a round of collection will mark it.
    Orphan,
    /// It was collected.
    Deleted,
    /// It is not in the bucket, and nothing is known of it.
    #[default]
    Unknown,
}
