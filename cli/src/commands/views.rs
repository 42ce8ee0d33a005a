//! The parts of the API's answers that commands show to people. `--json` prints all of an answer instead.

use ebb_types::{BranchName, CheckpointName, LayerId, Lsn, ProjectName, Timestamp};
use serde::Deserialize;

/// A project.
#[derive(Debug, Deserialize)]
pub struct Project {
    pub name: ProjectName,
    pub pg_major: u32,
    pub created_at: Timestamp,
    pub current: Option<String>,
    pub branches: Vec<Branch>,
    pub releases: usize,
}

/// `GET /projects`
#[derive(Debug, Deserialize)]
pub struct Projects {
    pub projects: Vec<Project>,
}

/// `POST /projects`
#[derive(Debug, Deserialize)]
pub struct NewProject {
    pub project: Project,
    pub role: String,
    pub password: String,
    pub urls: FirstUrls,
}

/// The URLs of a new project's branches.
#[derive(Debug, Deserialize)]
pub struct FirstUrls {
    pub prod: String,
    pub dev: String,
}

/// A branch.
#[derive(Debug, Deserialize)]
pub struct Branch {
    pub id: String,
    pub name: BranchName,
    pub endpoint: String,
    pub parent: Option<Parent>,
    pub head: Option<LayerId>,
    pub state: String,
    pub created_at: Timestamp,
    pub idle_suspend_seconds: f64,
    pub rescue_until: Option<Timestamp>,
}

/// Where a branch came from.
#[derive(Debug, Deserialize)]
pub struct Parent {
    pub branch: String,
    pub point: Option<String>,
}

/// `GET …/branches`
#[derive(Debug, Deserialize)]
pub struct Branches {
    pub branches: Vec<Branch>,
}

/// `POST …/restore`
#[derive(Debug, Deserialize)]
pub struct Restored {
    pub branch: Branch,
    pub rescue: Branch,
}

/// A checkpoint.
#[derive(Debug, Deserialize)]
pub struct Checkpoint {
    pub name: CheckpointName,
    pub layer: LayerId,
    pub created_at: Timestamp,
    pub lsn: Option<Lsn>,
}

/// `GET …/checkpoints`
#[derive(Debug, Deserialize)]
pub struct Checkpoints {
    pub checkpoints: Vec<Checkpoint>,
}

/// `GET …/url`
#[derive(Debug, Deserialize)]
pub struct Url {
    pub url: String,
}

/// `GET …/compute`
#[derive(Debug, Deserialize)]
pub struct Compute {
    pub state: String,
    pub since: Option<Timestamp>,
    pub unit: Option<Unit>,
    #[serde(default)]
    pub sessions: Vec<SessionRow>,
    #[serde(default)]
    pub keeps_awake: Vec<String>,
    #[serde(default)]
    pub wakes: u64,
}

/// The unit of an awake branch.
#[derive(Debug, Deserialize)]
pub struct Unit {
    pub postmaster_pid: Option<u32>,
    pub wal_end: Option<Lsn>,
    #[serde(default)]
    pub restarts: u32,
    #[serde(default)]
    pub stages: Vec<(String, u64)>,
}

/// One client.
#[derive(Debug, Deserialize)]
pub struct SessionRow {
    pub conn: u64,
    pub role: String,
    pub database: String,
    pub application: String,
    pub peer: String,
    pub state: String,
    pub reason: Option<String>,
    pub since_seconds: f64,
}

/// A release.
#[derive(Debug, Deserialize)]
pub struct Release {
    pub name: String,
    pub artifact: String,
    #[serde(default)]
    pub migrations: Vec<String>,
    pub checkpoint: Option<String>,
    pub created_at: Timestamp,
    pub state: String,
}

/// `GET …/releases`
#[derive(Debug, Deserialize)]
pub struct Releases {
    pub releases: Vec<Release>,
}

/// What a rollback does.
#[derive(Debug, Deserialize)]
pub struct Plan {
    pub release: String,
    pub checkpoint: String,
    pub code: Code,
    pub set_aside: SetAside,
}

/// The code a rollback switches.
#[derive(Debug, Deserialize)]
pub struct Code {
    pub from: Option<String>,
    pub to: Option<String>,
}

/// What a rollback sets aside.
#[derive(Debug, Deserialize)]
pub struct SetAside {
    pub transactions: Option<u64>,
    #[serde(default)]
    pub wal_bytes: Option<u64>,
    pub layers: Option<u64>,
    pub since: Option<Timestamp>,
}

/// `POST …/rollback`
#[derive(Debug, Deserialize)]
pub struct RolledBack {
    pub plan: Plan,
    pub rescue: Branch,
}

/// `GET …/ledger`
#[derive(Debug, Deserialize)]
pub struct Ledger {
    pub entries: Vec<Entry>,
}

/// One act.
#[derive(Debug, Deserialize)]
pub struct Entry {
    pub seq: u64,
    pub time: Timestamp,
    pub actor: String,
    pub act: String,
    #[serde(default)]
    pub on: Option<String>,
    #[serde(default)]
    pub result: Option<String>,
}

/// `GET …/ledger/verify`
#[derive(Debug, Deserialize)]
pub struct Verified {
    pub ok: bool,
    pub entries: u64,
    pub head_hash: Option<String>,
    pub fault: Option<String>,
}

/// `POST …/export`
#[derive(Debug, Deserialize)]
pub struct Exported {
    pub dir: String,
    pub bytes: u64,
}
