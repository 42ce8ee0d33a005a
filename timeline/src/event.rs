//! What a project's ledger can say: operations, and what they did to branches, checkpoints and releases.
//!
//! These are stored for ever. A field or variant may be added (with a default); none may change its meaning.

use std::path::PathBuf;

use ebb_compute::control::Durability;
use ebb_compute::import::DumpFormat;
use ebb_types::{
    AllowList, BranchId, BranchName, CheckpointName, LayerId, Lsn, NodeId, Point, ProjectId, ProjectName, ReleaseId,
    Timestamp,
};
use serde::{Deserialize, Serialize};

use crate::api::types::{Parent, SetAside};
use crate::clients::Pinned;
use crate::deploy::{Described, GoingBack, MigrationRun, Part, Probed, Rehearsal};
use crate::drill::{Fault, Probe, Report, TableRows};
use crate::release_file::ReleaseFile;
use crate::upkeep::UpkeepChange;

/// One thing that happened in a project.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The first event of every ledger.
    ProjectCreated {
        /// Its identifier.
        project: ProjectId,
        /// Its name.
        name: ProjectName,
        /// Major version of its Postgres.
        pg_major: u32,
        /// The symlink its releases switch; `None`: the one in the node's data directory.
        current: Option<PathBuf>,
        /// SCRAM-SHA-256 verifier of the owner role's first password.
        verifier: String,
    },
    /// Nothing follows.
    ProjectDeleted,
    /// From here on another node acts for the project: this is its only writer, until the next such entry.
    OwnerChanged {
        /// Which.
        node: NodeId,
        /// One more than the last owner's; the first has 1.
        epoch: u64,
    },
    /// The owner, which others may have taken for dead for a while, goes on. A takeover that was decided before is void.
    OwnerKept {
        /// Which.
        node: NodeId,
    },
    /// A branch exists.
    BranchCreated {
        /// Its identifier.
        branch: BranchId,
        /// Its name.
        name: BranchName,
        /// What it starts from.
        head: LayerId,
        /// A position that all WAL of the head lies before, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        end: Option<Lsn>,
        /// Where that is from: the branch also begins with the allow list of that one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<Parent>,
        /// For a rescue branch: until when nothing may delete it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rescue_until: Option<Timestamp>,
    },
    /// The branch's policy is another one.
    BranchChanged {
        /// Which.
        branch: BranchId,
        /// Idle time after which its compute is suspended, if that is new.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idle_suspend_ms: Option<u64>,
        /// How long its past can be gone back to, if that is new.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        window_ms: Option<u64>,
        /// What its commits wait for, if that is new.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        durability: Option<Durability>,
        /// What is new of what is done for it by itself.
        #[serde(default, skip_serializing_if = "UpkeepChange::is_empty")]
        upkeep: UpkeepChange,
        /// From where clients may connect, if that is new.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        allow: Option<AllowList>,
        /// What becomes of idle sessions that cannot be given back, if that is new.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pinned: Option<Pinned>,
        /// How many backends its clients in transaction mode share, if that is new; 0 leaves it to be derived.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pool_size: Option<u32>,
    },
    /// What the branch's volume held is now a layer; the head is that layer.
    BranchSealed {
        /// Which.
        branch: BranchId,
        /// Its new head.
        layer: LayerId,
        /// A position that all its WAL lies before, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        end: Option<Lsn>,
    },
    /// The branch's history goes on from another layer. Volumes made before this are stale.
    BranchMoved {
        /// Which.
        branch: BranchId,
        /// Its new head.
        head: LayerId,
        /// The point that head is.
        to: Point,
        /// A position that all WAL of the head lies before, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        end: Option<Lsn>,
        /// Where its new line leaves another, if that is still known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        left: Option<Left>,
    },
    /// The branch is gone, and its checkpoints with it.
    BranchDeleted {
        /// Which.
        branch: BranchId,
    },
    /// A layer has a name.
    CheckpointCreated {
        /// On which branch.
        branch: BranchId,
        /// The name.
        name: CheckpointName,
        /// The layer.
        layer: LayerId,
        /// End of WAL in it, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lsn: Option<Lsn>,
        /// The transaction number that was next, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        next_xid: Option<u64>,
        /// Whether a schedule made it: then a schedule may delete it.
        #[serde(default, skip_serializing_if = "is_false")]
        automatic: bool,
    },
    /// The name is gone.
    CheckpointDeleted {
        /// On which branch.
        branch: BranchId,
        /// The name.
        name: CheckpointName,
    },
    /// A release is under way.
    ReleaseBegun {
        /// Its identifier.
        release: ReleaseId,
        /// `v1`, `v2` ….
        name: String,
        /// BLAKE3 of the artifact, in hex.
        artifact: String,
        /// File names of its migrations, in order.
        migrations: Vec<String>,
        /// The checkpoint taken before it touches anything.
        checkpoint: CheckpointName,
    },
    /// The release's code is the project's code.
    ReleaseDeployed {
        /// Which.
        release: ReleaseId,
    },
    /// The release was given up.
    ReleaseFailed {
        /// Which.
        release: ReleaseId,
        /// Why.
        fault: String,
    },
    /// Code and data went back to before these releases: to this one.
    ReleasesRolledBack {
        /// Whose code is the project's code again.
        to: ReleaseId,
        /// What was taken back.
        releases: Vec<ReleaseId>,
    },
    /// The code went back to before these releases, to this one; the data stayed.
    CodeRolledBack {
        /// Whose code is the project's code again.
        to: ReleaseId,
        /// Whose code was taken back.
        releases: Vec<ReleaseId>,
    },
    /// The data went back to before these releases; the code stayed.
    DataRolledBack {
        /// Whose data was taken back.
        releases: Vec<ReleaseId>,
    },
    /// A release was tried on a copy of `prod`.
    ReleaseRehearsed {
        /// Which.
        release: ReleaseId,
        /// What that showed.
        report: Rehearsal,
    },
    /// The migrations of a release are in.
    ReleaseMigrated {
        /// Which.
        release: ReleaseId,
        /// Those that were applied, in order.
        runs: Vec<MigrationRun>,
        /// How many transactions that took, at least.
        transactions: u64,
    },
    /// The probes of a release were asked.
    ReleaseProbed {
        /// Which.
        release: ReleaseId,
        /// What they came to, up to the first that was not answered right.
        probes: Vec<Probed>,
    },
    /// The release does not work, and is taken back by itself. From here on its operation only goes back.
    ReleaseGoesBack {
        /// Which.
        release: ReleaseId,
        /// Why.
        fault: String,
        /// How many of the transactions since its checkpoint are its own, at least.
        transactions: u64,
        /// Where to.
        back: GoingBack,
    },
    /// The release does not work, and nothing is taken back by itself.
    ReleaseStays {
        /// Which.
        release: ReleaseId,
        /// Why, and why nothing is taken back.
        fault: String,
    },
    /// The release was taken back.
    ReleaseTakenBack {
        /// Which.
        release: ReleaseId,
        /// Whose code is the project's code again; none if there was none before it.
        to: Option<ReleaseId>,
        /// Whether the data went back, too.
        data: bool,
    },
    /// An artifact was tried on a copy of `prod`, and only that.
    Rehearsed {
        /// What that showed.
        report: Rehearsal,
    },
    /// A point was restored out of the bucket alone, and is what it should be.
    DrillPassed {
        /// On which branch.
        branch: BranchId,
        /// The point.
        point: Point,
        /// What was measured.
        report: Report,
        /// For a checkpoint's first: what the next ones are compared with.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rows: Vec<TableRows>,
    },
    /// A point could not be restored out of the bucket alone, or is not what it should be.
    DrillFailed {
        /// On which branch.
        branch: BranchId,
        /// The point.
        point: Point,
        /// What was measured until then.
        report: Report,
        /// What is wrong.
        fault: Fault,
    },
    /// An act was accepted. Every other event of the act comes after this one, under the same operation id.
    OperationBegun {
        /// All that it takes to carry it out, or to give it up.
        plan: Box<Plan>,
        /// The caller's idempotency key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<Key>,
    },
    /// A step is done.
    StepDone {
        /// Which.
        step: Step,
        /// For a replay: a position that all WAL of what it made lies before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        end: Option<Lsn>,
    },
    /// The operation is over.
    OperationDone,
    /// The operation was taken back.
    OperationUndone {
        /// Why.
        why: String,
    },
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A caller's idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// As the caller sent it.
    pub key: String,
    /// BLAKE3 of method, path and body, in hex: the same key with another request is refused.
    pub request: String,
}

/// A branch that a restore or rollback will make of the old head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rescue {
    /// Its identifier.
    pub branch: BranchId,
    /// Its name.
    pub name: BranchName,
    /// Until when nothing may delete it.
    pub until: Timestamp,
}

/// How the image of a moment between seals comes about: the newest seal before it, and what was committed until then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// The branch whose WAL archive is replayed.
    pub branch: BranchId,
    /// Its line.
    pub line: u64,
    /// The seal to begin with.
    pub base: LayerId,
    /// A position that all WAL of that seal lies before, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_end: Option<Lsn>,
    /// As far as the line is known to have got: the end of its next seal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<Lsn>,
    /// Where to stop.
    pub to: Moment,
    /// Names the directory in which it happens.
    pub scratch: BranchId,
    /// The layer that it makes.
    pub layer: LayerId,
}

/// Where a line of history leaves another line of the same branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The older line.
    pub line: u64,
    /// The last position that they share, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Lsn>,
}

/// A moment in a branch's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// Everything whose WAL ends at or before this position.
    Lsn(Lsn),
    /// Everything committed at or before this time.
    Time(Timestamp),
}

impl Moment {
    /// The position, if it is one.
    pub fn lsn(self) -> Option<Lsn> {
        match self {
            Moment::Lsn(lsn) => Some(lsn),
            Moment::Time(_) => None,
        }
    }
}

/// An operation with everything it needs chosen beforehand, so that it can be carried on after a crash.
///
/// Wherever a seal is part of it, the identifier of the layer is in the plan: sealing twice makes one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "snake_case")]
pub enum Plan {
    /// Make the project, with `prod` and `dev`.
    CreateProject {
        /// Its name.
        name: ProjectName,
    },
    /// Delete it.
    DeleteProject {
        /// Its name.
        name: ProjectName,
    },
    /// Branch from a point of a branch.
    CreateBranch {
        /// The new branch.
        branch: BranchId,
        /// Its name.
        name: BranchName,
        /// The branch it comes from.
        source: BranchId,
        /// Where that is from.
        parent: Parent,
        /// The checkpoint's layer; `None`: the source's head, sealed first, or what is replayed.
        layer: Option<LayerId>,
        /// What a seal of the source makes.
        seal: LayerId,
        /// For a moment between seals.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replay: Option<Replay>,
    },
    /// Change a branch's policy.
    ChangeBranch {
        /// Which.
        branch: BranchId,
    },
    /// Delete a branch.
    DeleteBranch {
        /// Which.
        branch: BranchId,
        /// The rule by which it goes, if nobody asked for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rule: Option<String>,
    },
    /// Name the head.
    CreateCheckpoint {
        /// On which branch.
        branch: BranchId,
        /// The name.
        name: CheckpointName,
        /// What a seal of the branch makes.
        seal: LayerId,
        /// Whether a schedule asks for it.
        #[serde(default, skip_serializing_if = "is_false")]
        automatic: bool,
    },
    /// Take a name away.
    DeleteCheckpoint {
        /// On which branch.
        branch: BranchId,
        /// The name.
        name: CheckpointName,
        /// The rule by which it goes, if nobody asked for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rule: Option<String>,
    },
    /// Set a branch to a point of its history.
    Restore {
        /// Which.
        branch: BranchId,
        /// The point.
        to: Point,
        /// Its layer.
        layer: LayerId,
        /// What sealing the old head makes.
        seal: LayerId,
        /// Where the old head goes.
        rescue: Rescue,
        /// For a moment between seals: how the layer comes about.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replay: Option<Replay>,
    },
    /// Deploy an artifact on `prod`.
    Release {
        /// The release.
        release: ReleaseId,
        /// `v1`, `v2` ….
        name: String,
        /// The branch: `prod`.
        branch: BranchId,
        /// BLAKE3 of the artifact, in hex.
        artifact: String,
        /// The checkpoint taken first.
        checkpoint: CheckpointName,
        /// What sealing for it makes.
        seal: LayerId,
        /// For one that describes itself (`ebb.toml`).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        described: Option<Box<Described>>,
    },
    /// Try an artifact on a copy of `prod`, and only that.
    Rehearse {
        /// The branch: `prod`.
        branch: BranchId,
        /// BLAKE3 of the artifact, in hex.
        artifact: String,
        /// The layer that the copy is made from.
        layer: LayerId,
        /// Names the copy.
        scratch: BranchId,
        /// What it says of itself.
        file: Box<ReleaseFile>,
    },
    /// Take code and data back to a release.
    Rollback {
        /// The branch: `prod`.
        branch: BranchId,
        /// Whether code, data or both go back.
        #[serde(default, skip_serializing_if = "Part::is_both")]
        part: Part,
        /// The release that comes back.
        to: ReleaseId,
        /// Its artifact.
        artifact: String,
        /// What is taken back.
        releases: Vec<ReleaseId>,
        /// The code until then.
        code_from: Option<String>,
        /// What moves to the rescue branch, as far as it was known beforehand.
        set_aside: SetAside,
        /// The checkpoint that `prod` goes back to.
        checkpoint: CheckpointName,
        /// Its layer.
        layer: LayerId,
        /// What sealing the old head makes.
        seal: LayerId,
        /// Where the old head goes.
        rescue: Rescue,
    },
    /// Stop a compute.
    Suspend {
        /// Which.
        branch: BranchId,
        /// What the seal makes.
        seal: LayerId,
    },
    /// Start a compute.
    Wake {
        /// Which.
        branch: BranchId,
    },
    /// Write a point out as a plain data directory.
    Export {
        /// Which branch.
        branch: BranchId,
        /// The point; `None`: the head.
        point: Option<Point>,
        /// Its layer; `None`: the head, sealed first.
        layer: Option<LayerId>,
        /// For a moment between seals: how the layer comes about.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replay: Option<Replay>,
        /// What the seal makes.
        seal: LayerId,
        /// Where to.
        dir: PathBuf,
        /// As what pg_dump writes, rather than as a data directory.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dump: Option<Dump>,
    },
    /// Hand the project over to another node.
    MoveProject {
        /// To which.
        to: NodeId,
    },
    /// Restore a point out of the bucket alone, beside everything else, and check it.
    Drill {
        /// Which branch.
        branch: BranchId,
        /// The point.
        point: Point,
        /// The layer that it is, or that was the head when it began: kept meanwhile.
        layer: Option<LayerId>,
        /// For a moment between seals: how its image comes about.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replay: Option<Replay>,
        /// Names the directory in which it happens.
        scratch: BranchId,
        /// What is asked besides what the branch's policy says.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        probes: Vec<Probe>,
    },
    /// Show a connection URL with its password.
    ShowUrl {
        /// Of which branch.
        branch: BranchId,
    },
    /// Make a branch of a cluster, or of a dump, that was made elsewhere.
    Import {
        /// The new branch.
        branch: BranchId,
        /// Its name.
        name: BranchName,
        /// Where it comes from.
        origin: Origin,
        /// The layer that it begins as.
        layer: LayerId,
        /// Names the directory in which it happens.
        scratch: BranchId,
        /// For a project that is made with it: the branch `dev`, which it gets besides. Undone, there is no such project.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dev: Option<BranchId>,
    },
}

/// How a point is written as pg_dump does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dump {
    /// In which format.
    pub format: DumpFormat,
    /// Which of its databases.
    pub database: String,
    /// Names the directory of the compute that it is read from.
    pub scratch: BranchId,
}

/// Where an import comes from, as it may be shown: without its password.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// What it is.
    pub kind: OriginKind,
    /// Its place: a URL without a password, or a path.
    pub at: String,
}

/// What an import comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OriginKind {
    /// A running server.
    Server,
    /// A data directory.
    Directory,
    /// What pg_dump wrote.
    Dump,
}

/// One step of an operation. What it means depends on the operation: see [`Plan::steps`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Make the image of a moment between seals.
    Replay,
    /// Seal, and record what the operation is for.
    Record,
    /// Take the checkpoint.
    Checkpoint,
    /// Run the migrations.
    Migrate,
    /// The one entry that changes what a branch or the code is.
    Switch,
    /// Point the `current` symlink at the code that is recorded.
    Code,
    /// Remove what is stale on this node.
    Sweep,
    /// Write files.
    Write,
    /// Start the compute.
    Start,
    /// Bring what is imported to this node: as a data directory that was shut down, or restored into a fresh branch.
    Copy,
    /// Check it, and make it one of Ebb's.
    Settle,
    /// Restore beside everything else, check, and clean up.
    Verify,
    /// Try migrations and SQL probes on a copy, and remove that.
    Rehearse,
    /// Ask the probes.
    Probe,
    /// Take back what does not work: the one entry that changes what a branch and the code are.
    Return,
}

impl Plan {
    /// The steps, in order; an act without any is complete with the entry that begins it.
    ///
    /// | act | steps | gives up by |
    /// |---|---|---|
    /// | create branch | `Replay`, for a moment between seals. `Record`\*: seal the source if need be; branch | nothing to do |
    /// | create checkpoint | `Record`\*: seal; name | nothing to do |
    /// | suspend | `Record`\*: fence, stop, seal | release the fence |
    /// | delete branch | `Switch`\*: fence, discard the compute; branch gone. `Sweep`: its directory | release the fence |
    /// | restore | `Replay`, for a moment between seals. `Switch`\*: fence, stop, seal; old head to the rescue branch, head moved. `Sweep`: the old volume | release the fence |
    /// | release | `Rehearse`, if it describes itself. `Checkpoint`; `Migrate`; `Switch`\*: code recorded; `Code`: symlink. `Probe`, if it describes itself | the release has failed; checkpoint and earlier migrations stay |
    /// | release that goes back by itself\* | `Return`: fence, stop, seal; data and code in one entry. `Code`. `Sweep`, if data goes back | – |
    /// | rehearse | `Rehearse` | the copy is removed |
    /// | rollback | `Switch`\*: fence, stop, seal; data and code in one entry. `Code`: symlink. `Sweep`: the old volume. Of code or data alone: what belongs to that | release the fence |
    /// | export | `Replay`, for a moment between seals. `Write` | the directory, or the dump, is removed |
    /// | wake | `Start` | nothing to do |
    /// | import | `Copy`; `Settle`, but for a dump; `Record`\*: the layer; branch | all of it is removed, and a project that was made for it |
    /// | drill | `Verify`: what it finds is recorded, passed or failed | what was restored is removed |
    ///
    /// \* the point of no return: after it there is only forward.
    pub fn steps(&self) -> &'static [Step] {
        match self {
            Plan::CreateBranch { replay: Some(_), .. } => &[Step::Replay, Step::Record],
            Plan::Restore { replay: Some(_), .. } => &[Step::Replay, Step::Switch, Step::Sweep],
            Plan::Export { replay: Some(_), .. } => &[Step::Replay, Step::Write],
            Plan::CreateBranch { layer: Some(_), .. } => &[],
            Plan::CreateBranch { layer: None, .. } | Plan::CreateCheckpoint { .. } | Plan::Suspend { .. } => {
                &[Step::Record]
            }
            Plan::DeleteBranch { .. } | Plan::Restore { .. } => &[Step::Switch, Step::Sweep],
            Plan::Release { described: Some(described), .. } if described.file.policy.rehearse => {
                &[Step::Rehearse, Step::Checkpoint, Step::Migrate, Step::Switch, Step::Code, Step::Probe]
            }
            Plan::Release { described: Some(_), .. } => {
                &[Step::Checkpoint, Step::Migrate, Step::Switch, Step::Code, Step::Probe]
            }
            Plan::Release { .. } => &[Step::Checkpoint, Step::Migrate, Step::Switch, Step::Code],
            Plan::Rehearse { .. } => &[Step::Rehearse],
            Plan::Rollback { part: Part::Code, .. } => &[Step::Switch, Step::Code],
            Plan::Rollback { part: Part::Data, .. } => &[Step::Switch, Step::Sweep],
            Plan::Rollback { .. } => &[Step::Switch, Step::Code, Step::Sweep],
            Plan::Export { .. } => &[Step::Write],
            Plan::Wake { .. } => &[Step::Start],
            Plan::Import { origin: Origin { kind: OriginKind::Dump, .. }, .. } => &[Step::Copy, Step::Record],
            Plan::Import { .. } => &[Step::Copy, Step::Settle, Step::Record],
            Plan::Drill { .. } => &[Step::Verify],
            Plan::CreateProject { .. }
            | Plan::DeleteProject { .. }
            | Plan::ChangeBranch { .. }
            | Plan::DeleteCheckpoint { .. }
            | Plan::MoveProject { .. }
            | Plan::ShowUrl { .. } => &[],
        }
    }

    /// The branch that no other operation may touch while this one is under way.
    pub fn holds(&self) -> Option<BranchId> {
        match self {
            // Replaying takes a while, and touches nothing of the source; nor do dumping and drills.
            Plan::CreateBranch { replay: Some(_), .. }
            | Plan::Export { dump: Some(_), .. }
            | Plan::Drill { .. }
            | Plan::Rehearse { .. } => None,
            Plan::CreateBranch { source: branch, .. }
            | Plan::DeleteBranch { branch, .. }
            | Plan::CreateCheckpoint { branch, .. }
            | Plan::Restore { branch, .. }
            | Plan::Release { branch, .. }
            | Plan::Rollback { branch, .. }
            | Plan::Suspend { branch, .. }
            | Plan::Wake { branch }
            | Plan::Export { branch, .. } => Some(*branch),
            // Its branch does not exist yet.
            Plan::Import { .. }
            | Plan::CreateProject { .. }
            | Plan::DeleteProject { .. }
            | Plan::ChangeBranch { .. }
            | Plan::DeleteCheckpoint { .. }
            | Plan::MoveProject { .. }
            | Plan::ShowUrl { .. } => None,
        }
    }

    /// The layer that a seal in one of its steps would make.
    pub fn seals(&self) -> Option<LayerId> {
        match self {
            Plan::CreateBranch { seal, .. }
            | Plan::CreateCheckpoint { seal, .. }
            | Plan::Restore { seal, .. }
            | Plan::Release { seal, .. }
            | Plan::Rollback { seal, .. }
            | Plan::Suspend { seal, .. }
            | Plan::Export { seal, .. } => Some(*seal),
            Plan::Import { layer, .. } => Some(*layer),
            Plan::CreateProject { .. }
            | Plan::DeleteProject { .. }
            | Plan::ChangeBranch { .. }
            | Plan::DeleteBranch { .. }
            | Plan::DeleteCheckpoint { .. }
            | Plan::Wake { .. }
            | Plan::MoveProject { .. }
            | Plan::Drill { .. }
            | Plan::Rehearse { .. }
            | Plan::ShowUrl { .. } => None,
        }
    }

    /// How the image that it needs comes about, if that is none of a seal's.
    pub fn replay(&self) -> Option<&Replay> {
        match self {
            Plan::CreateBranch { replay, .. }
            | Plan::Restore { replay, .. }
            | Plan::Export { replay, .. }
            | Plan::Drill { replay, .. } => replay.as_ref(),
            _ => None,
        }
    }

    /// The branch directory on this node that is only used by it.
    pub fn scratch(&self) -> Option<BranchId> {
        match self {
            Plan::Export { dump: Some(dump), .. } => Some(dump.scratch),
            Plan::Rehearse { scratch, .. } => Some(*scratch),
            Plan::Release { described: Some(described), .. } => Some(described.scratch),
            plan => plan.replay().map(|replay| replay.scratch),
        }
    }

    /// What it is called in lists and messages.
    pub fn act(&self) -> &'static str {
        match self {
            Plan::CreateProject { .. } => "create project",
            Plan::DeleteProject { .. } => "delete project",
            Plan::CreateBranch { .. } => "create branch",
            Plan::ChangeBranch { .. } => "change branch",
            Plan::DeleteBranch { .. } => "delete branch",
            Plan::CreateCheckpoint { .. } => "create checkpoint",
            Plan::DeleteCheckpoint { .. } => "delete checkpoint",
            Plan::Restore { .. } => "restore",
            Plan::Release { .. } => "release",
            Plan::Rehearse { .. } => "rehearse",
            Plan::Rollback { .. } => "rollback",
            Plan::Suspend { .. } => "suspend",
            Plan::Wake { .. } => "wake",
            Plan::Export { .. } => "export",
            Plan::MoveProject { .. } => "move project",
            Plan::Drill { .. } => "drill",
            Plan::ShowUrl { .. } => "show url",
            Plan::Import { .. } => "import",
        }
    }
}
