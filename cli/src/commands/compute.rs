//! `ebb compute suspend|wake|status`.

use ebb_timeline::api::types::Compute;
use serde_json::json;

use super::project::seconds;
use super::{Session, branch_path};
use crate::args::{ComputeAct, ComputeCommand};
use crate::failure::Failure;
use crate::output::{facts, table};

pub fn run(to: &Session, command: ComputeCommand) -> Result<(), Failure> {
    let act = command.act.expect("clap asks for a subcommand where there is no --branch-dir");
    match act {
        ComputeAct::Suspend { branch } => {
            let answer = to.client.post(&format!("{}/compute/suspend", branch_path(&branch)), &json!({}), None)?;
            to.done(&answer, || format!("{branch} is suspended"));
            Ok(())
        }
        ComputeAct::Wake { branch } => {
            let answer = to.client.post(&format!("{}/compute/wake", branch_path(&branch)), &json!({}), None)?;
            to.done(&answer, || format!("{branch} is awake"));
            Ok(())
        }
        ComputeAct::Status { branch } => {
            to.show(&to.client.get(&format!("{}/compute", branch_path(&branch)))?, |view: Compute| status(view))
        }
    }
}

fn status(view: Compute) -> String {
    let unit = view.unit.as_ref();
    let last_stage = unit.and_then(|unit| unit.stages.last());
    let mut text = facts([
        ("state", view.state),
        ("since", seconds(view.since)),
        ("wakes", view.wakes.to_string()),
        ("postgres pid", unit.and_then(|unit| unit.postmaster_pid).map(|pid| pid.to_string()).unwrap_or_default()),
        ("wal end", unit.and_then(|unit| unit.wal_end).map(|lsn| lsn.to_string()).unwrap_or_default()),
        ("restarts", unit.map(|unit| unit.restarts.to_string()).unwrap_or_default()),
        ("woke in", last_stage.map(|(_, micros)| format!("{:.1} ms", *micros as f64 / 1000.0)).unwrap_or_default()),
        ("kept awake by", view.keeps_awake.join("; ")),
    ]);
    if !view.sessions.is_empty() {
        text.push('\n');
        text.push_str(&table(
            ["CONN", "ROLE", "DATABASE", "APPLICATION", "PEER", "STATE", "SINCE", "REASON"],
            view.sessions.into_iter().map(|session| {
                [
                    session.conn.to_string(),
                    session.role,
                    session.database,
                    session.application,
                    session.peer,
                    session.state,
                    format!("{:.0}s", session.since_seconds),
                    session.reason.unwrap_or_default(),
                ]
            }),
        ));
    }
    text
}
