//! `ebb project …`.

use ebb_timeline::api::types::{CreateProject, CreatedProject, Project, ProjectList};
use ebb_types::ErrorKind;

use super::{Session, absolute};
use crate::args::ProjectCommand;
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

/// A time to the second, in UTC: people compare it with logs.
pub fn seconds(time: ebb_types::Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}
