//! `ebb drill` and `ebb drills`.

use ebb_timeline::api::types::{Drill, DrillBranch, DrillList};
use ebb_timeline::drill::{Outcome, Probe};
use ebb_types::{BranchRef, Point, PointRef};

use super::project::seconds;
use super::{Session, branch_path};
use crate::args::IdempotencyKey;
use crate::failure::Failure;
use crate::output::{bytes, facts, table};

pub fn run(to: &Session, from: &PointRef, probes: Vec<Probe>, key: &IdempotencyKey) -> Result<(), Failure> {
    let point = (from.point != Point::Head).then(|| from.point.to_string());
    let path = format!("{}/drills", branch_path(&from.at));
    let answer = to.client.post(&path, &DrillBranch { point, probes }, key.as_deref())?;
    to.show(&answer, |drill: Drill| drill_facts(&from.to_string(), &drill))
}

pub fn list(to: &Session, branch: &BranchRef) -> Result<(), Failure> {
    let answer = to.client.get(&format!("{}/drills", branch_path(branch)))?;
    to.show(&answer, |view: DrillList| drill_table(view.drills))
}

/// The result of a checkpoint's last drill, and when it was.
pub fn last_drill(drill: &Drill) -> String {
    format!("{} {}", result(drill), seconds(drill.at))
}

fn result(drill: &Drill) -> &'static str {
    if drill.passed { "passed" } else { "FAILED" }
}

/// `1.25 s` for people.
fn time(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

fn drill_facts(point: &str, drill: &Drill) -> String {
    let report = &drill.report;
    let mut text = facts([
        ("drilled", point.to_owned()),
        ("result", result(drill).to_owned()),
        ("first row after", report.restore_ms.map(time).unwrap_or_default()),
        ("whole drill", time(report.total_ms)),
        ("read from bucket", bytes(report.bucket_bytes)),
        ("files", report.image_bytes.map(bytes).unwrap_or_default()),
    ]);
    let rows = report.checks.iter().map(|check| {
        let outcome = match check.outcome {
            Outcome::Passed => "passed",
            Outcome::Failed => "FAILED",
            Outcome::Skipped => "left out",
        };
        [check.check.as_str().to_owned(), outcome.to_owned(), time(check.ms), check.what.clone()]
    });
    text.push('\n');
    text.push_str(&table(["CHECK", "RESULT", "TIME", "WHAT"], rows));
    text
}

fn drill_table(drills: Vec<Drill>) -> String {
    table(
        ["ENDED", "POINT", "RESULT", "FIRST ROW", "READ", "BY", "FAULT"],
        drills.into_iter().map(|drill| {
            [
                seconds(drill.at),
                drill.point.clone(),
                result(&drill).to_owned(),
                drill.report.restore_ms.map(time).unwrap_or_default(),
                bytes(drill.report.bucket_bytes),
                drill.actor.clone(),
                drill.fault.clone().unwrap_or_default(),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drill(more: serde_json::Value) -> Drill {
        let mut value = serde_json::json!({
            "branch": "prod", "point": "one", "at": "2026-11-21T07:00:00Z", "actor": "local ebb/0.1.0", "passed": true,
            "restore_ms": 412, "total_ms": 2105, "bucket_bytes": 5 << 20, "image_bytes": 32 << 20,
            "checks": [
                {"check": "ledger", "outcome": "passed", "what": "12 entries", "ms": 3},
                {"check": "start", "outcome": "passed", "what": "the first row was answered", "ms": 412},
                {"check": "probes", "outcome": "skipped", "what": "none are declared", "ms": 0},
            ],
        });
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_drill_tells_what_it_looked_at() {
        insta::assert_snapshot!(drill_facts("shop/prod@one", &drill(serde_json::json!({}))), @r"
        drilled           shop/prod@one
        result            passed
        first row after   0.41 s
        whole drill       2.10 s
        read from bucket  5.0 MiB
        files             32.0 MiB

        CHECK   RESULT    TIME    WHAT
        ledger  passed    0.00 s  12 entries
        start   passed    0.41 s  the first row was answered
        probes  left out  0.00 s  none are declared
        ");
    }

    #[test]
    fn drills_are_listed_with_what_they_found() {
        let failed = drill(serde_json::json!({
            "passed": false, "restore_ms": null, "actor": "ebb", "point": "head", "fault": "object \"layers/x\" is corrupt: y",
        }));
        insta::assert_snapshot!(drill_table(vec![drill(serde_json::json!({})), failed]), @r#"
        ENDED                 POINT  RESULT  FIRST ROW  READ     BY               FAULT
        2026-11-21 07:00:00Z  one    passed  0.41 s     5.0 MiB  local ebb/0.1.0
        2026-11-21 07:00:00Z  head   FAILED             5.0 MiB  ebb              object "layers/x" is corrupt: y
        "#);
    }
}
