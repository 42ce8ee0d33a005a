//! What a drill is asked, and what it finds out. Stored in ledgers for ever, and shown as it is stored.

use std::str::FromStr;
use std::sync::Arc;

use ebb_types::{BranchId, ErrorKind, Point, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// LIMIT: a question has a line; a test suite belongs into a release.
const SQL_BYTES_MAX: usize = 4096;

/// LIMIT: probes of one branch: each is a session of its own in every drill.
pub const PROBES_MAX: usize = 100;

/// A question to a restored database, and the only answer that is right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Probe {
    /// Asked as the role `app` in the database `app`.
    pub sql: String,
    /// What the first column of the first row is, as text; empty for no row, and for NULL.
    pub expect: String,
}

impl Probe {
    /// Why it cannot be asked, if it cannot.
    pub fn fault(&self) -> Option<String> {
        if self.sql.trim().is_empty() {
            return Some("a probe without SQL asks nothing".to_owned());
        }
        let long = self.sql.len() > SQL_BYTES_MAX || self.expect.len() > SQL_BYTES_MAX;
        long.then(|| format!("a probe has at most {SQL_BYTES_MAX} bytes of SQL, and as many of an answer"))
    }
}

/// Reads `select count(*) from orders=42`: what follows the last `=` is the answer.
impl FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (sql, expect) = text.rsplit_once('=').ok_or("want SQL=ANSWER, as in 'select count(*) from orders=42'")?;
        let probe = Self { sql: sql.trim().to_owned(), expect: expect.trim().to_owned() };
        probe.fault().map_or(Ok(probe), Err)
    }
}

/// How many rows a table has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TableRows {
    /// Database, schema and name, quoted as SQL wants them: `app.public.orders`.
    pub table: String,
    /// Counted, not estimated.
    pub rows: u64,
}

/// What is looked at, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckName {
    /// The ledger in the bucket: every entry, and that it names what is restored.
    Ledger,
    /// A Postgres comes up on what the bucket has, and answers.
    Start,
    /// Every byte of every layer, against its checksum.
    Objects,
    /// Every page, against the checksum that Postgres gave it.
    Pages,
    /// `pg_amcheck` on every database: tables, indexes, and that the two agree.
    Amcheck,
    /// Rows of a sample of tables, against the first drill of the same checkpoint.
    Rows,
    /// The questions that someone has declared answers to.
    Probes,
}

impl CheckName {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            CheckName::Ledger => "ledger",
            CheckName::Start => "start",
            CheckName::Objects => "objects",
            CheckName::Pages => "pages",
            CheckName::Amcheck => "amcheck",
            CheckName::Rows => "rows",
            CheckName::Probes => "probes",
        }
    }
}

/// What became of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It found nothing.
    Passed,
    /// It found a fault, and ended the drill.
    Failed,
    /// It could not be made here; why is said.
    Skipped,
}

/// One check of a drill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// Which.
    pub check: CheckName,
    /// What became of it.
    pub outcome: Outcome,
    /// What it looked at, or why it did not.
    pub what: String,
    /// How long it took.
    pub ms: u64,
}

/// What a drill measured, as far as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// From the start of the restore to the first row that the restored database answered; absent if it never did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_ms: Option<u64>,
    /// The whole drill.
    pub total_ms: u64,
    /// Bytes read from the bucket.
    pub bucket_bytes: u64,
    /// Bytes of the restored files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_bytes: Option<u64>,
    /// The checks, in order; after one that failed there is none.
    pub checks: Vec<Check>,
}

/// Why a drill failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// What is wrong, naming the object.
    pub what: String,
    /// What kind of fault it is: `corrupt` if what was restored is not what it should be.
    #[schema(value_type = String)]
    pub kind: ErrorKind,
}

/// What came of a drill.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drilled {
    /// What was measured.
    pub report: Report,
    /// Rows that were counted for the first time.
    pub rows: Vec<TableRows>,
    /// Why it failed, if it did.
    pub fault: Option<Fault>,
}

/// A drill that is over, as the ledger has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Names it: the directory in which it happened.
    pub scratch: BranchId,
    /// When it ended.
    pub at: Timestamp,
    /// What was restored.
    pub point: Point,
    /// Who asked for it.
    pub actor: String,
    /// What was measured.
    pub report: Report,
    /// Why it failed, if it did.
    pub fault: Option<Fault>,
}

/// Shared between versions of the state.
pub type SharedRecord = Arc<Record>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_of_a_probe_follows_the_last_equals_sign() {
        let check = |text: &str, expect: Option<(&str, &str)>| {
            let probe = text.parse::<Probe>().ok();
            let found = probe.as_ref().map(|probe| (probe.sql.as_str(), probe.expect.as_str()));
            assert_eq!(found, expect, "for {text:?}");
        };
        check("select count(*) from t=42", Some(("select count(*) from t", "42")));
        check("select n from t where a = 'b' = t", Some(("select n from t where a = 'b'", "t")));
        check("select null=", Some(("select null", "")));
        check("select 1", None);
        check(" = 1", None);
        check(&format!("select '{}'=1", "x".repeat(5000)), None);
    }
}
