//! What a deploy shows: `ebb release check`, `show` and `create --rehearse-only`.

use std::path::{Path, PathBuf};

use ebb_timeline::api::types::{CreateRelease, Rehearsed, Release};
use ebb_timeline::deploy::{MigrationRun, Probed, Rehearsal};
use ebb_timeline::release_file::{self, Checked};
use ebb_types::{ErrorKind, ProjectName};

use super::Session;
use super::project::seconds;
use crate::args::IdempotencyKey;
use crate::failure::Failure;
use crate::output::{bytes, facts, table};

/// Looks at a directory as a release would.
pub fn check(to: &Session, dir: &Path) -> Result<(), Failure> {
    if !dir.is_dir() {
        return Err(Failure::new(ErrorKind::Invalid, format!("{dir:?} is not a directory")));
    }
    let checked = release_file::check(dir)
        .map_err(|error| Failure::new(error.kind(), format!("{dir:?} cannot be checked")).because(&error))?;
    to.output.show(&checked, || check_text(&checked));
    match checked.faults.len() + checked.findings.len() {
        0 => Ok(()),
        1 => Err(Failure::new(ErrorKind::Invalid, format!("{dir:?} cannot be released: 1 fault"))),
        n => Err(Failure::new(ErrorKind::Invalid, format!("{dir:?} cannot be released: {n} faults"))),
    }
}

fn check_text(checked: &Checked) -> String {
    let mut text = String::new();
    for fault in &checked.faults {
        text.push_str(&format!("{fault}\n"));
    }
    for finding in &checked.findings {
        text.push_str(&format!("{}: {}\n", finding.file, finding.message));
        if let Some(hint) = &finding.hint {
            text.push_str(&format!("  {hint}\n"));
        }
    }
    let outside = checked.migrations.iter().filter(|one| one.outside).map(|one| one.file.as_str());
    text.push_str(&facts([
        ("describes itself", if checked.described { "yes" } else { "no ebb.toml" }.to_owned()),
        ("migrations", checked.migrations.len().to_string()),
        ("outside a transaction", outside.collect::<Vec<_>>().join(", ")),
        ("probes", checked.probes.to_string()),
    ]));
    text
}

/// Tries an artifact on a copy of prod; one that does not work there is a failure.
pub fn rehearse(to: &Session, project: &ProjectName, artifact: PathBuf, key: &IdempotencyKey) -> Result<(), Failure> {
    let path = format!("projects/{project}/rehearsals");
    let answer = to.client.post(&path, &CreateRelease { artifact }, key.as_deref())?;
    to.show(&answer, |view: Rehearsed| rehearsal_text(&view.report))?;
    match answer["fault"].as_str() {
        None => Ok(()),
        Some(fault) => Err(Failure::new(ErrorKind::Invalid, format!("the rehearsal failed: {fault}"))
            .hint("Nothing of prod was touched. Mend it and try again.")),
    }
}

/// A release, with what its deploy found out.
pub fn release_text(view: Release) -> String {
    let mut text = facts([
        ("release", view.name),
        ("state", view.state),
        ("artifact", view.artifact),
        ("migrations", view.migrations.join(", ")),
        ("checkpoint", view.checkpoint.to_string()),
        ("created", seconds(view.created_at)),
        ("fault", view.fault.unwrap_or_default()),
        ("set aside", view.rescue.map(|rescue| rescue.to_string()).unwrap_or_default()),
    ]);
    if let Some(rehearsal) = &view.rehearsal {
        text.push_str(&format!("\non a copy of prod\n{}", rehearsal_text(rehearsal)));
    }
    if !view.runs.is_empty() {
        let runs = view.runs.iter().map(|run| [run.file.clone(), time(run.ms)]);
        text.push_str(&format!("\non prod\n{}", table(["MIGRATION", "TIME"], runs)));
    }
    if !view.probes.is_empty() {
        text.push_str(&format!("\n{}", probe_table(&view.probes)));
    }
    text
}

fn rehearsal_text(report: &Rehearsal) -> String {
    let mut text = facts([
        ("rehearsal", if report.fault.is_none() { "passed" } else { "FAILED" }.to_owned()),
        ("took", time(report.ms)),
        ("fault", report.fault.clone().unwrap_or_default()),
    ]);
    if !report.migrations.is_empty() {
        let rows = report
            .migrations
            .iter()
            .map(|run| [run.file.clone(), time(run.ms), strongest(run), rewritten(run), touched(run)]);
        text.push('\n');
        text.push_str(&table(["MIGRATION", "TIME", "STRONGEST LOCK", "REWRITTEN", "ROWS"], rows));
    }
    if !report.probes.is_empty() {
        text.push_str(&format!("\n{}", probe_table(&report.probes)));
    }
    text
}

/// The strongest lock, on what, for how long, and how many others there were.
fn strongest(run: &MigrationRun) -> String {
    let Some(first) = run.locks.first() else { return "none".to_owned() };
    let mode = first.mode.trim_end_matches("Lock");
    let others = match run.locks.len() - 1 {
        0 => String::new(),
        n => format!(" (and {n} more)"),
    };
    format!("{mode} on {} for {}{others}", first.relation, time(first.held_ms))
}

fn rewritten(run: &MigrationRun) -> String {
    let tables = run.rewritten.iter().map(|one| format!("{} ({})", one.table, bytes(one.bytes)));
    tables.collect::<Vec<_>>().join(", ")
}

fn touched(run: &MigrationRun) -> String {
    let rows = run.rows.iter().map(|rows| {
        let counts = [("+", rows.inserted), ("~", rows.updated), ("-", rows.deleted)];
        let counts = counts.iter().filter(|(_, count)| *count > 0).map(|(sign, count)| format!("{sign}{count}"));
        format!("{} {}", rows.table, counts.collect::<Vec<_>>().join(" "))
    });
    rows.collect::<Vec<_>>().join(", ")
}

fn probe_table(probes: &[Probed]) -> String {
    let rows = probes.iter().map(|probe| {
        let answer = probe.fault.clone().unwrap_or_else(|| "right".to_owned());
        [probe.name.clone(), probe.tries.to_string(), time(probe.ms), answer]
    });
    table(["PROBE", "TRIES", "TIME", "ANSWER"], rows)
}

/// `1.25 s` for people.
fn time(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rehearsal_says_what_each_migration_locks_rewrites_and_writes() {
        let report = serde_json::json!({
            "ms": 2345, "fault": "probe \"orders\" answers \"0\", not \"1\"",
            "migrations": [
                {"file": "001.sql", "ms": 12, "locks": [
                    {"relation": "orders", "mode": "AccessExclusiveLock", "held_ms": 10},
                    {"relation": "items", "mode": "RowExclusiveLock", "held_ms": 4}],
                 "rewritten": [{"table": "orders", "bytes": 16384}],
                 "rows": [{"table": "public.items", "inserted": 3, "updated": 0, "deleted": 1}]},
                {"file": "002.sql", "ms": 1},
            ],
            "probes": [{"name": "orders", "tries": 1, "ms": 3, "fault": "answers \"0\", not \"1\""}],
        });
        insta::assert_snapshot!(rehearsal_text(&serde_json::from_value(report).unwrap()));
    }

    #[test]
    fn a_check_names_every_fault_with_its_place() {
        let checked = serde_json::json!({
            "ok": false, "described": true, "probes": 1,
            "migrations": [{"file": "1.sql", "outside": false}, {"file": "2.sql", "outside": true}],
            "faults": [{"line": 3, "column": 1, "message": "[policy] has no key \"fense\"", "hint": "did you mean fence?"}],
            "findings": [{"file": "3.sql", "message": "it has COMMIT", "hint": "Take it out."}],
        });
        insta::assert_snapshot!(check_text(&serde_json::from_value(checked).unwrap()));
    }
}
