//! `ebb release …` and `ebb rollback`.

use std::path::Path;

use ebb_types::{ErrorKind, ProjectName};
use serde_json::json;

use super::project::seconds;
use super::views::{Plan, Release, Releases, RolledBack};
use super::{Session, absolute};
use crate::args::{IdempotencyKey, ReleaseCommand};
use crate::failure::Failure;
use crate::output::{bytes, facts, table};

pub fn run(to: &Session, command: ReleaseCommand) -> Result<(), Failure> {
    match command {
        ReleaseCommand::Create { project, artifact, key } => {
            let dir = artifact_dir(&artifact)?;
            let path = format!("projects/{project}/releases");
            let answer = to.client.post(&path, &json!({ "artifact": dir }), key.idempotency_key.as_deref())?;
            to.show(&answer, |view: Release| {
                facts([
                    ("release", view.name),
                    ("state", view.state),
                    ("artifact", view.artifact),
                    ("migrations", view.migrations.join(", ")),
                    ("checkpoint", view.checkpoint.unwrap_or_default()),
                    ("created", seconds(view.created_at)),
                ])
            })
        }
        ReleaseCommand::List { project } => {
            to.show(&to.client.get(&format!("projects/{project}/releases"))?, |view: Releases| {
                table(
                    ["RELEASE", "STATE", "CREATED", "CHECKPOINT", "MIGRATIONS", "ARTIFACT"],
                    view.releases.into_iter().map(|release| {
                        [
                            release.name,
                            release.state,
                            seconds(release.created_at),
                            release.checkpoint.unwrap_or_default(),
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
fn artifact_dir(artifact: &Path) -> Result<std::path::PathBuf, Failure> {
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
    plan: bool,
    key: &IdempotencyKey,
) -> Result<(), Failure> {
    let body = json!({ "to": release, "plan": plan });
    let answer = to.client.post(&format!("projects/{project}/rollback"), &body, key.idempotency_key.as_deref())?;
    if plan {
        return to.show(&answer, |plan: Plan| {
            format!("{}\nNothing was changed. Without --plan this is done.\n", plan_text(&plan))
        });
    }
    to.show(&answer, |done: RolledBack| {
        format!(
            "{}{}",
            plan_text(&done.plan),
            facts([
                ("set aside  ", format!("{project}/{}", done.rescue.name)),
                ("kept until ", done.rescue.rescue_until.map(seconds).unwrap_or_default()),
            ])
        )
    })
}

fn plan_text(plan: &Plan) -> String {
    let code = |side: &Option<String>| side.as_deref().map_or_else(|| "nothing".to_owned(), short);
    facts([
        ("release", plan.release.clone()),
        ("data", format!("prod back to checkpoint {}", plan.checkpoint)),
        ("code", format!("{} -> {}", code(&plan.code.from), code(&plan.code.to))),
        ("written since", plan.set_aside.since.map(seconds).unwrap_or_default()),
        ("transactions", plan.set_aside.transactions.map(|n| n.to_string()).unwrap_or_default()),
        ("WAL", plan.set_aside.wal_bytes.map(bytes).unwrap_or_default()),
        ("layers", plan.set_aside.layers.map(|n| n.to_string()).unwrap_or_default()),
    ])
}

/// The beginning of a hash; anything else whole.
fn short(text: &str) -> String {
    let is_hash = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hash { text[..12].to_owned() } else { text.to_owned() }
}
