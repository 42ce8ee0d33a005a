//! `ebb compute suspend|wake|move|status|wakes`, and `ebb node`.

use ebb_timeline::api::types::{Compute, NodeList, WakeList};
use ebb_timeline::clients::SessionRow;
use serde_json::json;

use super::project::seconds;
use super::{Session, branch_path};
use crate::args::{ComputeAct, ComputeCommand, NodeCommand};
use crate::failure::Failure;
use crate::output::{facts, table};

/// LIMIT: a line of a terminal.
const PROJECTS_SHOWN: usize = 5;

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
        ComputeAct::Move { project, to: node } => {
            let answer = to.client.post(&format!("projects/{project}/move"), &json!({"to": node}), None)?;
            to.done(&answer, || format!("{project} is on node {node}"));
            Ok(())
        }
        ComputeAct::Wakes { branch } => {
            let path = branch.map_or("wakes".to_owned(), |branch| format!("{}/compute/wakes", branch_path(&branch)));
            to.show(&to.client.get(&path)?, |list: WakeList| wakes(list))
        }
        ComputeAct::Status { branch } => {
            to.show(&to.client.get(&format!("{}/compute", branch_path(&branch)))?, |view: Compute| status(view))
        }
    }
}

pub fn run_node(to: &Session, command: NodeCommand) -> Result<(), Failure> {
    match command {
        NodeCommand::List => to.show(&to.client.get("nodes")?, |list: NodeList| nodes(list)),
    }
}

fn nodes(list: NodeList) -> String {
    table(
        ["NAME", "ID", "PEER", "PROJECTS"],
        list.nodes.into_iter().map(|node| {
            let (all, shown) = (node.projects.len(), node.projects.iter().take(PROJECTS_SHOWN));
            let mut projects = shown.map(|name| name.to_string()).collect::<Vec<_>>().join(", ");
            if all > PROJECTS_SHOWN {
                projects.push_str(&format!(" and {} more", all - PROJECTS_SHOWN));
            }
            [node.name, node.id.to_string(), node.peer.unwrap_or_default(), projects]
        }),
    )
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
        text.push_str(&sessions(view.sessions));
    }
    for visit in view.visits {
        text.push_str(&format!("\nvisit of {} since {} ({})\n", visit.point, seconds(visit.since), visit.state));
        if !visit.sessions.is_empty() {
            text.push_str(&sessions(visit.sessions));
        }
    }
    text
}

/// The stages of a wake, as columns.
const STAGES: [&str; 8] = ["resolve", "prepare", "spawn", "isolate", "open", "mount", "start", "recover"];

fn wakes(list: WakeList) -> String {
    let header =
        ["AT", "BRANCH", "MS", "RESOLVE", "PREPARE", "SPAWN", "ISOLATE", "OPEN", "MOUNT", "START", "RECOVER", "ERROR"];
    let rows = list.wakes.into_iter().map(|wake| {
        let took = |name: &str| {
            let stage = wake.stages.iter().find(|stage| stage.name == name);
            stage.map(|stage| format!("{:.1}", stage.milliseconds)).unwrap_or_default()
        };
        let [resolve, prepare, spawn, isolate, open, mount, start, recover] = STAGES.map(took);
        let branch = wake.branch.clone().unwrap_or_else(|| wake.id.to_string());
        let whole = format!("{:.1}", wake.milliseconds);
        let error = wake.error.clone().unwrap_or_default();
        [seconds(wake.at), branch, whole, resolve, prepare, spawn, isolate, open, mount, start, recover, error]
    });
    table(header, rows)
}

fn sessions(rows: Vec<SessionRow>) -> String {
    table(
        ["CONN", "ROLE", "DATABASE", "APPLICATION", "PEER", "STATE", "SINCE", "REASON"],
        rows.into_iter().map(|session| {
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
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_are_a_line_each() {
        let list = serde_json::from_value(json!({"wakes": [
            {"id": "br_00000000000000000000000000000001", "branch": "shop/prod", "at": "2026-11-21T06:00:01Z",
             "milliseconds": 61.2, "stages": [
                {"name": "resolve", "milliseconds": 0.8}, {"name": "prepare", "milliseconds": 2.1},
                {"name": "spawn", "milliseconds": 4.0}, {"name": "recover", "milliseconds": 31.25}]},
            {"id": "br_00000000000000000000000000000002", "at": "2026-11-21T06:00:00Z", "milliseconds": 9.0,
             "stages": [{"name": "resolve", "milliseconds": 0.5}], "error": "the disk is full"},
        ]}));
        insta::assert_snapshot!(wakes(list.unwrap()), @r"
        AT                    BRANCH                               MS    RESOLVE  PREPARE  SPAWN  ISOLATE  OPEN  MOUNT  START  RECOVER  ERROR
        2026-11-21 06:00:01Z  shop/prod                            61.2  0.8      2.1      4.0                                 31.2
        2026-11-21 06:00:00Z  br_00000000000000000000000000000002  9.0   0.5                                                            the disk is full
        ");
    }

    #[test]
    fn status_says_who_keeps_a_compute_awake() {
        let view = serde_json::from_value(json!({
            "state": "active", "since": "2026-11-21T06:00:00Z", "wakes": 3,
            "unit": {"ready": true, "postmaster_pid": 4711, "wal_end": "0/16B3748", "dirty": true, "restarts": 0,
                     "stages": [["mounted", 4000], ["ready", 48210]]},
            "sessions": [{"conn": 7, "role": "app", "database": "app", "application": "psql", "peer": "127.0.0.1:5000",
                          "state": "pinned", "reason": "temporary table", "since_seconds": 12.4}],
            "keeps_awake": ["connection 7 of app@app from 127.0.0.1:5000: temporary table"],
            "visits": [{"id": "br_00000000000000000000000000000001", "point": "v1", "since": "2026-11-21T06:00:00Z",
                        "state": "open", "sessions": []}],
        }));
        insta::assert_snapshot!(status(view.unwrap()), @r"
        state          active
        since          2026-11-21 06:00:00Z
        wakes          3
        postgres pid   4711
        wal end        0/16B3748
        restarts       0
        woke in        48.2 ms
        kept awake by  connection 7 of app@app from 127.0.0.1:5000: temporary table

        CONN  ROLE  DATABASE  APPLICATION  PEER            STATE   SINCE  REASON
        7     app   app       psql         127.0.0.1:5000  pinned  12s    temporary table

        visit of v1 since 2026-11-21 06:00:00Z (open)
        ");
    }
}
