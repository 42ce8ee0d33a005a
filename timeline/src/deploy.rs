//! What a deploy finds out: how migrations fared on a copy of `prod`, what probes answered, and what follows from that.
//! Pure. Stored in ledgers for ever, and shown as it is stored.

use ebb_types::{BranchId, ReleaseId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::event::Rescue;
use crate::release_file::{Automatic, ReleaseFile};

/// LIMIT: of each migration, so many tables are named; a ledger is no place for a catalog.
pub const NAMED_MAX: usize = 50;

/// A lock that a migration took on a table or index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lock {
    /// On what, as SQL names it.
    pub relation: String,
    /// The strongest mode it was held in, as `pg_locks` calls it: `AccessExclusiveLock` lets nobody read.
    pub mode: String,
    /// How long it was held, at least: it is looked every few milliseconds.
    pub held_ms: u64,
}

/// A table of which every row was written anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rewritten {
    /// Which, as SQL names it.
    pub table: String,
    /// Its size afterwards.
    pub bytes: u64,
}

/// Rows that a migration wrote by itself, without those of a rewritten table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Touched {
    /// The table, as SQL names it.
    pub table: String,
    /// Rows inserted.
    pub inserted: u64,
    /// Rows updated.
    pub updated: u64,
    /// Rows deleted.
    pub deleted: u64,
}

/// How one migration fared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationRun {
    /// Its file name.
    pub file: String,
    /// How long it took.
    pub ms: u64,
    /// Whether it ran outside a transaction.
    #[serde(default)]
    pub outside: bool,
    /// In a rehearsal: the locks it took, the strongest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<Lock>,
    /// In a rehearsal: what it wrote anew as a whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rewritten: Vec<Rewritten>,
    /// In a rehearsal: rows it wrote.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<Touched>,
}

/// What a probe came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Probed {
    /// Its name.
    pub name: String,
    /// How often it was asked.
    pub tries: u32,
    /// How long that took in all.
    pub ms: u64,
    /// What was wrong with the last answer; absent if it was right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// What trying a release on a copy of `prod` showed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rehearsal {
    /// The whole of it, with making the copy and starting a Postgres on it.
    pub ms: u64,
    /// The migrations that have not been applied to `prod` yet, in order.
    pub migrations: Vec<MigrationRun>,
    /// The SQL probes, asked after the last migration.
    pub probes: Vec<Probed>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// How the data of a release that goes back is set aside: chosen beforehand, so that it can be carried on after a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aside {
    /// The branch that the head becomes.
    pub rescue: Rescue,
}

/// A release that is being taken back by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoingBack {
    /// The release whose code comes back; none if there was none.
    pub to: Option<ReleaseId>,
    /// What becomes of the data; `None`: it stays.
    pub aside: Option<Aside>,
}

/// What a release says of itself, and what it takes to do it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    /// Its `ebb.toml`.
    pub file: ReleaseFile,
    /// The release whose code is in service until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<ReleaseId>,
    /// Names the copy of `prod` on which it is tried.
    pub scratch: BranchId,
}

/// What of a release a rollback takes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Code and data.
    #[default]
    Both,
    /// The code; the data stays as it is.
    Code,
    /// The data; the code stays as it is.
    Data,
}

impl Part {
    /// Whether it is code and data.
    pub fn is_both(&self) -> bool {
        *self == Part::Both
    }

    /// Whether the code goes back.
    pub fn has_code(self) -> bool {
        self != Part::Data
    }

    /// Whether the data goes back.
    pub fn has_data(self) -> bool {
        self != Part::Code
    }
}

/// What is done about a release that does not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    /// Code and data go back to before it.
    Data,
    /// The code goes back.
    Code,
    /// Nothing is touched; why.
    Stays(String),
}

/// What a policy says about a release whose probes, or whose migrations, failed: with so many transactions since its
/// checkpoint that are not its own, where that is known.
pub fn remedy(policy: Automatic, bound: u64, lost: Option<u64>) -> Remedy {
    match (policy, lost) {
        (Automatic::None, _) => Remedy::Stays("its policy is to take nothing back by itself".to_owned()),
        (Automatic::Code, _) => Remedy::Code,
        (Automatic::Data, Some(lost)) if lost <= bound => Remedy::Data,
        (Automatic::Data, Some(lost)) => Remedy::Stays(format!(
            "{lost} transactions were begun since its checkpoint, and its policy lets at most {bound} be set aside"
        )),
        (Automatic::Data, None) => {
            Remedy::Stays("how many transactions were begun since its checkpoint cannot be told".to_owned())
        }
    }
}

/// The faults of those that were not answered right, in a line.
pub fn faults(probes: &[Probed]) -> Option<String> {
    let failed = probes.iter().filter_map(|probe| Some(format!("probe {:?} {}", probe.name, probe.fault.as_ref()?)));
    let failed: Vec<_> = failed.collect();
    (!failed.is_empty()).then(|| failed.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_goes_back_only_within_the_bound() {
        assert_eq!(remedy(Automatic::Data, 10, Some(10)), Remedy::Data);
        assert!(matches!(remedy(Automatic::Data, 10, Some(11)), Remedy::Stays(_)));
        assert!(matches!(remedy(Automatic::Data, u64::MAX, None), Remedy::Stays(_)));
        assert_eq!(remedy(Automatic::Code, 0, None), Remedy::Code);
        assert!(matches!(remedy(Automatic::None, 10, Some(0)), Remedy::Stays(_)));
    }
}
