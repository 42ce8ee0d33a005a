//! `ebb project …` and `ebb ledger …`.

use ebb_timeline::api::types::{CreateProject, CreatedProject, LedgerEntries, LedgerVerdict, Project, ProjectList};
use ebb_types::ErrorKind;

use super::{Session, absolute};
use crate::args::{LedgerCommand, ProjectCommand};
use crate::commands::branch::{branch_table, stored};
use crate::failure::Failure;
use crate::output::{facts, table};

pub fn run(to: &Session, command: ProjectCommand) -> Result<(), Failure> {
    match command {
        ProjectCommand::Create { name, current, pg_major, key } => {
            let current = current.as_deref().map(absolute).transpose()?;
            let answer = to.client.post("projects", &CreateProject { name, current, pg_major }, key.as_deref())?;
            to.show(&answer, new_project)
        }
        ProjectCommand::List => to.show(&to.client.get("projects")?, |view: ProjectList| {
            table(
                ["PROJECT", "POSTGRES", "BRANCHES", "RELEASES", "CREATED"],
                view.projects.into_iter().map(|project| {
                    [
                        project.name.to_string(),
                        project.pg_major.to_string(),
                        project.branches.len().to_string(),
                        project.releases.to_string(),
                        seconds(project.created_at),
                    ]
                }),
            )
        }),
        ProjectCommand::Show { name } => to.show(&to.client.get(&format!("projects/{name}"))?, |view: Project| {
            let about = facts([
                ("project", view.name.to_string()),
                ("postgres", view.pg_major.to_string()),
                ("created", seconds(view.created_at)),
                ("current", view.current.display().to_string()),
                ("releases", view.releases.to_string()),
                ("stored", view.stored.as_ref().map(stored).unwrap_or_default()),
            ]);
            format!("{about}\n{}", branch_table(view.branches))
        }),
        ProjectCommand::Delete { name, confirm } => {
            if confirm != name {
                return Err(Failure::new(ErrorKind::Invalid, format!("--confirm {confirm} is not the project's name"))
                    .hint(format!("Nothing was deleted. To delete it: ebb project delete {name} --confirm {name}")));
            }
            let answer = to.client.delete(&format!("projects/{name}?confirm={confirm}"))?;
            to.done(&answer, || format!("deleted project {name}"));
            Ok(())
        }
    }
}

fn new_project(view: CreatedProject) -> String {
    let lines = facts([
        ("project", view.project.name.to_string()),
        ("role", view.role),
        ("password", view.password),
        ("prod", view.urls.prod),
        ("dev", view.urls.dev),
    ]);
    eprintln!("The password is shown once; `ebb url {}/prod` prints the URL again.", view.project.name);
    lines
}

pub fn run_ledger(to: &Session, command: LedgerCommand) -> Result<(), Failure> {
    match command {
        LedgerCommand::List { project } => {
            to.show(&to.client.get(&format!("projects/{project}/ledger"))?, |view: LedgerEntries| {
                table(
                    ["SEQ", "TIME", "ACTOR", "ACT", "ON", "RESULT"],
                    view.entries.into_iter().map(|entry| {
                        [entry.seq.to_string(), seconds(entry.time), entry.actor, entry.act, entry.on, entry.result]
                    }),
                )
            })
        }
        LedgerCommand::Verify { project } => {
            let answer = to.client.get(&format!("projects/{project}/ledger/verify"))?;
            let fault = match answer["ok"].as_bool() {
                Some(true) => None,
                _ => Some(answer["fault"].as_str().unwrap_or("the API did not say what is wrong").to_owned()),
            };
            to.show(&answer, |view: LedgerVerdict| {
                facts([
                    ("ledger", if view.ok { "ok".to_owned() } else { "BROKEN".to_owned() }),
                    ("entries", view.entries.to_string()),
                    ("head", view.head_hash),
                    ("fault", view.fault.unwrap_or_default()),
                ])
            })?;
            match fault {
                None => Ok(()),
                Some(fault) => {
                    Err(Failure::new(ErrorKind::Corrupt, format!("the ledger of {project} is broken: {fault}"))
                        .hint("Keep the bucket as it is and restore the damaged objects under projects/ from a copy."))
                }
            }
        }
    }
}

/// A time to the second, in UTC: people compare it with logs.
pub fn seconds(time: ebb_types::Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}
