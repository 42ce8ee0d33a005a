//! `ebb release …` and `ebb rollback`.

use std::path::{Path, PathBuf};

use ebb_timeline::api::types::{CreateRelease, ReleaseList, Rollback, RollbackPlan, RolledBack, Written};
use ebb_types::{ErrorKind, ProjectName};

use super::project::seconds;
use super::url::encoded;
use super::{Session, absolute, deploy};
use crate::args::{IdempotencyKey, ReleaseCommand, RollbackHow};
use crate::failure::Failure;
use crate::output::{bytes, facts, table};

pub fn run(to: &Session, command: ReleaseCommand) -> Result<(), Failure> {
    match command {
        ReleaseCommand::Check { dir } => deploy::check(to, &dir),
        ReleaseCommand::Show { project, release } => {
            let answer = to.client.get(&format!("projects/{project}/releases/{}", encoded(&release)))?;
            to.show(&answer, deploy::release_text)
        }
        ReleaseCommand::Create { project, artifact, rehearse_only: true, key } => {
            deploy::rehearse(to, &project, artifact_dir(&artifact)?, &key)
        }
        ReleaseCommand::Create { project, artifact, rehearse_only: false, key } => {
            let artifact = artifact_dir(&artifact)?;
            let path = format!("projects/{project}/releases");
            let answer = to.client.post(&path, &CreateRelease { artifact }, key.as_deref())?;
            to.show(&answer, deploy::release_text)
        }
        ReleaseCommand::List { project } => {
            to.show(&to.client.get(&format!("projects/{project}/releases"))?, |view: ReleaseList| {
                table(
                    ["RELEASE", "STATE", "CREATED", "CHECKPOINT", "MIGRATIONS", "ARTIFACT"],
                    view.releases.into_iter().map(|release| {
                        [
                            release.name,
                            release.state,
                            seconds(release.created_at),
                            release.checkpoint.to_string(),
                            release.migrations.len().to_string(),
                            short(&release.artifact),
                        ]
                    }),
                )
            })
        }
    }
}

/// The artifact's absolute path, refused here already if it is no directory: the message names what was typed.
fn artifact_dir(artifact: &Path) -> Result<PathBuf, Failure> {
    if !artifact.is_dir() {
        return Err(Failure::new(ErrorKind::Invalid, format!("{artifact:?} is not a directory"))
            .hint("--artifact names the directory that holds the code and migrations/*.sql."));
    }
    absolute(artifact)
}

pub fn rollback(
    to: &Session,
    project: &ProjectName,
    release: &str,
    how: RollbackHow,
    key: &IdempotencyKey,
) -> Result<(), Failure> {
    let RollbackHow { plan, code_only, data_only, no_rows } = how;
    let body = Rollback { to: release.to_owned(), plan, code_only, data_only, rows: plan && !no_rows };
    let answer = to.client.post(&format!("projects/{project}/rollback"), &body, key.as_deref())?;
    if plan {
        return to.show(&answer, |plan: RollbackPlan| {
            format!("{}\nNothing was changed. Without --plan this is done.\n", plan_text(&plan))
        });
    }
    to.show(&answer, |done: RolledBack| {
        format!(
            "{}{}",
            plan_text(&done.plan),
            done.rescue.map_or_else(String::new, |rescue| facts([
                ("set aside  ", format!("{project}/{}", rescue.name)),
                ("kept until ", rescue.rescue_until.map(seconds).unwrap_or_default()),
            ]))
        )
    })
}

fn plan_text(plan: &RollbackPlan) -> String {
    let from = plan.code.from.as_deref().map_or_else(|| "nothing".to_owned(), short);
    let data = match plan.part.has_data() {
        true => format!("prod back to checkpoint {}", plan.checkpoint),
        false => "stays".to_owned(),
    };
    let code = match plan.part.has_code() {
        true => format!("{} -> {}", from, short(&plan.code.to)),
        false => "stays".to_owned(),
    };
    let mut text = facts([
        ("release", plan.release.clone()),
        ("data", data),
        ("code", code),
        ("written since", seconds(plan.set_aside.since)),
        ("releases", plan.set_aside.releases.join(", ")),
        ("transactions", plan.set_aside.transactions.map(|n| n.to_string()).unwrap_or_default()),
        ("WAL", plan.set_aside.wal_bytes.map(bytes).unwrap_or_default()),
        ("layers", plan.set_aside.layers.to_string()),
    ]);
    if let Some(written) = &plan.written {
        text.push_str(&written_text(written));
    }
    text
}

/// What was written since, table by table.
fn written_text(written: &Written) -> String {
    if let Some(why) = &written.unknown {
        return format!("\nrows written since cannot be told: {why}\n");
    }
    let mut text = String::new();
    if !written.objects.is_empty() {
        text.push_str(&format!("\nother definitions: {}\n", written.objects.join(", ")));
    }
    match written.tables.is_empty() {
        true => text.push_str("\nno rows differ\n"),
        false => {
            let rows = written.tables.iter().map(|table| {
                let counts = [table.added, table.removed, table.changed].map(|count| count.to_string());
                let [added, removed, changed] = counts;
                [table.table.clone(), added, removed, changed, table.note.clone().unwrap_or_default()]
            });
            text.push_str(&format!("\n{}", table(["TABLE", "ADDED", "REMOVED", "CHANGED", ""], rows)));
        }
    }
    text
}

/// The beginning of a hash; anything else whole.
fn short(text: &str) -> String {
    let is_hash = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hash { text[..12].to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_what_comes_back_and_what_is_set_aside() {
        let plan = serde_json::from_value(serde_json::json!({
            "release": "v1", "checkpoint": "before-v2",
            "code": {"from": "b".repeat(64), "to": "a".repeat(64)},
            "set_aside": {"transactions": 12, "wal_bytes": 1_572_864, "releases": ["v2"], "layers": 3,
                          "since": "2026-11-21T06:00:00Z"},
            "written": {"objects": ["TABLE items"], "tables": [
                {"table": "public.items", "added": 7, "removed": 0, "changed": 2},
            ]},
        }));
        insta::assert_snapshot!(plan_text(&plan.unwrap()), @r"
        release        v1
        data           prod back to checkpoint before-v2
        code           bbbbbbbbbbbb -> aaaaaaaaaaaa
        written since  2026-11-21 06:00:00Z
        releases       v2
        transactions   12
        WAL            1.5 MiB
        layers         3

        other definitions: TABLE items

        TABLE         ADDED  REMOVED  CHANGED
        public.items  7      0        2
        ");
    }
}
