//! The commands that talk to the API: one request, then what came back, for people or for programs. And those that
//! need no server.

mod branch;
mod collect;
mod compute;
mod deploy;
mod diff;
mod drill;
pub mod fsck;
pub mod import;
mod ledger;
mod project;
mod psql;
mod release;
mod url;
mod who;

use std::path::{Path, PathBuf};

use ebb_types::BranchRef;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::args::Command;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::Output;

/// Runs one command.
pub fn run(command: Command, api: &str, output: Output) -> Result<(), Failure> {
    let to = Session { client: Client::new(api), output };
    match command {
        Command::Project(command) => project::run(&to, command),
        Command::Branch(command) => branch::run(&to, command),
        Command::Checkpoint(command) => branch::run_checkpoint(&to, command),
        Command::Url { place } => url::run(&to, &place),
        Command::Psql { place, args } => psql::run(&to, &place, &args),
        Command::Compute(command) => compute::run(&to, command),
        Command::Node(command) => compute::run_node(&to, command),
        Command::Release(command) => release::run(&to, command),
        Command::Rollback { project, to: release, how, key } => release::rollback(&to, &project, &release, how, &key),
        Command::Ledger(command) => ledger::run(&to, command),
        Command::Export { from, dir, format, database, key } => {
            branch::export(&to, &from, &dir, format.0.map(|format| (format, database)), &key)
        }
        Command::Import(args) => import::run(&to, *args),
        Command::Drill { from, probes, key } => drill::run(&to, &from, probes, &key),
        Command::Drills { branch } => drill::list(&to, &branch),
        Command::Diff(what) => diff::run(&to, &what),
        Command::Who { branch } => who::run(&to, &branch),
        Command::Why { object } => collect::why(&to, &object),
        Command::Collect { dry_run } => collect::run(&to, dry_run),
        Command::Serve(_) | Command::Config(_) | Command::Fsck(_) => unreachable!("main runs these itself"),
    }
}

/// What every command needs: where to ask and how to print.
#[derive(Debug)]
struct Session {
    client: Client,
    output: Output,
}

impl Session {
    /// Prints an answer: as it came, or as `human` shows the part of it that it knows.
    fn show<V: DeserializeOwned>(&self, answer: &Value, human: impl FnOnce(V) -> String) -> Result<(), Failure> {
        if self.output.json {
            self.output.show(answer, String::new);
            return Ok(());
        }
        let view = V::deserialize(answer).map_err(|error| {
            Failure::internal("the API's answer is not what this `ebb` expects", &error)
                .hint("Are this `ebb` and the `ebb serve` it talks to of the same version? `--json` prints the answer.")
        })?;
        self.output.show(&answer, || human(view));
        Ok(())
    }

    /// Prints the outcome of an act that answers nothing worth a table.
    fn done(&self, answer: &Value, line: impl FnOnce() -> String) {
        let empty = Value::Object(serde_json::Map::new());
        let shown = if answer.is_null() { &empty } else { answer };
        self.output.show(shown, || line() + "\n");
    }
}

/// The path of a branch below `/v1/`.
fn branch_path(at: &BranchRef) -> String {
    format!("projects/{}/branches/{}", at.project, at.branch)
}

/// A path as `ebb serve`, which runs elsewhere, understands it.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::internal(format!("cannot use the path {path:?}"), &error))
}
