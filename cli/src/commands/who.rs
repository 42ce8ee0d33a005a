//! `ebb who`.

use ebb_timeline::api::types::ClientList;
use ebb_timeline::clients::SessionRow;
use ebb_types::BranchRef;

use super::project::seconds;
use super::{Session, branch_path};
use crate::failure::Failure;
use crate::output::{age, table};

pub fn run(to: &Session, branch: &BranchRef) -> Result<(), Failure> {
    let answer = to.client.get(&format!("{}/clients", branch_path(branch)))?;
    to.show(&answer, |list: ClientList| text(branch, list))
}

fn text(branch: &BranchRef, list: ClientList) -> String {
    let mut text = format!("{branch} is {} since {}, {}\n", list.state, seconds(list.since), count(&list.clients));
    if !list.clients.is_empty() {
        text.push_str(&clients(list.clients));
    }
    for visit in list.visits {
        text.push_str(&format!(
            "\n{branch}@{} is read since {}, {}\n",
            visit.point,
            seconds(visit.since),
            count(&visit.sessions)
        ));
        if !visit.sessions.is_empty() {
            text.push_str(&clients(visit.sessions));
        }
    }
    text
}

fn count(clients: &[SessionRow]) -> String {
    match clients.len() {
        0 => "nobody is connected".to_owned(),
        1 => "1 client".to_owned(),
        count => format!("{count} clients"),
    }
}

fn clients(rows: Vec<SessionRow>) -> String {
    table(
        ["CONN", "ROLE", "DATABASE", "APPLICATION", "ADDRESS", "NODE", "STATE", "SINCE", "KEEPS AWAKE"],
        rows.into_iter().map(|row| {
            [
                row.conn.to_string(),
                plain(&row.role),
                plain(&row.database),
                plain(&row.application),
                row.peer,
                row.node.unwrap_or_default(),
                row.state,
                age(row.since_seconds as u64),
                row.reason.unwrap_or_default(),
            ]
        }),
    )
}

/// What a client calls itself may be anything, also orders to a terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(list: serde_json::Value) -> String {
        text(&"shop/prod".parse().unwrap(), serde_json::from_value(list).unwrap())
    }

    #[test]
    fn who_is_connected_and_who_keeps_the_compute_awake() {
        insta::assert_snapshot!(shown(json!({
            "state": "active", "since": "2026-11-21T06:00:00Z",
            "clients": [
                {"conn": 7, "role": "app", "database": "app", "application": "web", "peer": "10.0.0.5:5000", "node": "n1",
                 "state": "pinned", "reason": "temporary table", "since_seconds": 12.4},
                {"conn": 12, "role": "reader", "database": "app", "application": "\u{1b}[2J", "peer": "10.0.0.6:5001",
                 "node": "n2", "state": "hibernated", "since_seconds": 7300.0},
            ],
            "visits": [{"id": "br_00000000000000000000000000000001", "point": "v1", "since": "2026-11-21T06:00:00Z",
                        "state": "open", "sessions": []}],
        })), @r"
        shop/prod is active since 2026-11-21 06:00:00Z, 2 clients
        CONN  ROLE    DATABASE  APPLICATION  ADDRESS        NODE  STATE       SINCE  KEEPS AWAKE
        7     app     app       web          10.0.0.5:5000  n1    pinned      12s    temporary table
        12    reader  app       ?[2J         10.0.0.6:5001  n2    hibernated  2h

        shop/prod@v1 is read since 2026-11-21 06:00:00Z, nobody is connected
        ");
    }

    #[test]
    fn nobody_is_said_too() {
        insta::assert_snapshot!(
            shown(json!({"state": "suspended", "since": "2026-11-21T06:00:00Z", "clients": []})),
            @"shop/prod is suspended since 2026-11-21 06:00:00Z, nobody is connected"
        );
    }
}
