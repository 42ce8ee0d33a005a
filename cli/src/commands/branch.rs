//! `ebb branch …`, `ebb checkpoint …`, `ebb url` and `ebb export`.

use std::path::Path;
use std::time::Duration;

use ebb_compute::control::Durability;
use ebb_compute::import::DumpFormat;
use ebb_timeline::api::types::{
    Branch, BranchList, ChangeBranch, ChangeUpkeep, Checkpoint, CheckpointList, CreateBranch, CreateCheckpoint, Export,
    Exported, RestoreBranch, Restored, Stored,
};
use ebb_timeline::clients::Pinned;
use ebb_types::{Point, PointRef};

use super::drill::last_drill;
use super::project::seconds;
use super::{Session, absolute, branch_path};
use crate::args::{BranchCommand, CheckpointCommand, IdempotencyKey};
use crate::failure::Failure;
use crate::output::{age, bytes, facts, table};

pub fn run(to: &Session, command: BranchCommand) -> Result<(), Failure> {
    match command {
        BranchCommand::Create { branch, from, key } => {
            let path = format!("projects/{}/branches", branch.project);
            let body = CreateBranch { name: branch.branch, from };
            to.show(&to.client.post(&path, &body, key.as_deref())?, branch_facts)
        }
        BranchCommand::List { project } => {
            let answer = to.client.get(&format!("projects/{project}/branches"))?;
            to.show(&answer, |view: BranchList| branch_table(view.branches))
        }
        BranchCommand::Show { branch } => to.show(&to.client.get(&branch_path(&branch))?, branch_facts),
        BranchCommand::Set {
            branch,
            idle_suspend,
            window,
            durability,
            pinned,
            checkpoints,
            drill_every,
            probes,
            no_probes,
            pool_size,
        } => {
            let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
            let (idle_suspend_seconds, window_seconds) = (seconds(idle_suspend), seconds(window));
            let probes = (no_probes || !probes.is_empty()).then_some(probes);
            let upkeep = ChangeUpkeep { checkpoints, drill_every_seconds: seconds(drill_every), probes };
            let upkeep = Some(upkeep).filter(|upkeep| *upkeep != ChangeUpkeep::default());
            let body = ChangeBranch {
                idle_suspend_seconds,
                window_seconds,
                durability,
                pool_size,
                upkeep,
                pinned,
                allow: None,
            };
            to.show(&to.client.patch(&branch_path(&branch), &body)?, branch_facts)
        }
        BranchCommand::Allow { branch, networks, any: _ } => {
            let body = ChangeBranch { allow: Some(networks.into()), ..ChangeBranch::default() };
            to.show(&to.client.patch(&branch_path(&branch), &body)?, branch_facts)
        }
        BranchCommand::Delete { branch } => {
            let answer = to.client.delete(&branch_path(&branch))?;
            to.done(&answer, || format!("deleted branch {branch}"));
            Ok(())
        }
        BranchCommand::Restore { branch, to: point, key } => {
            let path = format!("{}/restore", branch_path(&branch));
            let answer = to.client.post(&path, &RestoreBranch { to: point.to_string() }, key.as_deref())?;
            to.show(&answer, |view: Restored| {
                facts([
                    ("restored", format!("{branch} to {point}")),
                    ("head", view.branch.head.to_string()),
                    ("set aside", format!("{}/{}", branch.project, view.rescue.name)),
                    ("kept until", view.rescue.rescue_until.map(seconds).unwrap_or_default()),
                ])
            })
        }
    }
}

/// One line a branch.
pub fn branch_table(branches: Vec<Branch>) -> String {
    table(
        ["BRANCH", "STATE", "FROM", "CREATED", "KEPT UNTIL"],
        branches.into_iter().map(|branch| {
            [
                branch.name.to_string(),
                branch.state.clone(),
                parent(&branch),
                seconds(branch.created_at),
                branch.rescue_until.map(seconds).unwrap_or_default(),
            ]
        }),
    )
}

fn branch_facts(branch: Branch) -> String {
    facts([
        ("branch", branch.name.to_string()),
        ("id", branch.id.to_string()),
        ("endpoint", branch.endpoint.clone()),
        ("state", branch.state.clone()),
        ("from", parent(&branch)),
        ("head", branch.head.to_string()),
        ("created", seconds(branch.created_at)),
        ("suspends after", format!("{}s", branch.idle_suspend_seconds)),
        ("pinned sessions", pinned(branch.pinned).to_owned()),
        ("commits wait for", durability(branch.durability).to_owned()),
        ("can go back to", seconds(branch.window_from)),
        ("pool", branch.pool_size.map(|size| format!("{size} backends")).unwrap_or_default()),
        ("checkpoints", schedule(&branch)),
        ("drilled every", branch.upkeep.drill_every_seconds.map(|every| age(every as u64)).unwrap_or_default()),
        ("drills ask", probes(&branch)),
        ("clients from", branch.allow.to_string()),
        ("kept until", branch.rescue_until.map(seconds).unwrap_or_default()),
        ("stored", branch.stored.as_ref().map(stored).unwrap_or_default()),
    ])
}

fn schedule(branch: &Branch) -> String {
    let schedule = branch.upkeep.checkpoints;
    if schedule.is_off() { String::new() } else { schedule.to_string() }
}

fn probes(branch: &Branch) -> String {
    match branch.upkeep.probes.len() {
        0 => String::new(),
        1 => "1 question".to_owned(),
        many => format!("{many} questions"),
    }
}

fn pinned(pinned: Pinned) -> &'static str {
    match pinned {
        Pinned::Keep => "keep it awake",
        Pinned::End => "end when it is idle",
    }
}

fn durability(durability: Durability) -> &'static str {
    match durability {
        Durability::Local => "the node's disk",
        Durability::Bucket => "the bucket",
    }
}

/// What a branch or project stores, in one line.
pub fn stored(stored: &Stored) -> String {
    let mut text = format!("{} own, {} shared", bytes(stored.own_bytes), bytes(stored.shared_bytes));
    if stored.unsealed_bytes > 0 {
        text.push_str(&format!(", {} not sealed yet", bytes(stored.unsealed_bytes)));
    }
    match stored.waiting_layers {
        0 => {}
        1 => text.push_str(", 1 layer not in the bucket yet"),
        many => text.push_str(&format!(", {many} layers not in the bucket yet")),
    }
    text
}

fn parent(branch: &Branch) -> String {
    match &branch.parent {
        Some(parent) if parent.point != "head" => format!("{}@{}", parent.branch, parent.point),
        Some(parent) => parent.branch.to_string(),
        None => String::new(),
    }
}

pub fn run_checkpoint(to: &Session, command: CheckpointCommand) -> Result<(), Failure> {
    match command {
        CheckpointCommand::Create { branch, name, key } => {
            let path = format!("{}/checkpoints", branch_path(&branch));
            let answer = to.client.post(&path, &CreateCheckpoint { name }, key.as_deref())?;
            to.show(&answer, |view: Checkpoint| {
                facts([
                    ("checkpoint", format!("{branch}@{}", view.name)),
                    ("layer", view.layer.to_string()),
                    ("lsn", view.lsn.map(|lsn| lsn.to_string()).unwrap_or_default()),
                    ("created", seconds(view.created_at)),
                ])
            })
        }
        CheckpointCommand::List { branch } => {
            let answer = to.client.get(&format!("{}/checkpoints", branch_path(&branch)))?;
            to.show(&answer, |view: CheckpointList| checkpoint_table(view.checkpoints))
        }
        CheckpointCommand::Delete { branch, name } => {
            let answer = to.client.delete(&format!("{}/checkpoints/{name}", branch_path(&branch)))?;
            to.done(&answer, || format!("deleted checkpoint {branch}@{name}"));
            Ok(())
        }
    }
}

/// One line a checkpoint.
fn checkpoint_table(checkpoints: Vec<Checkpoint>) -> String {
    table(
        ["CHECKPOINT", "AGE", "SIZE", "OWN", "LAST DRILL", "LSN", "CREATED", "LAYER"],
        checkpoints.into_iter().map(|checkpoint| {
            [
                checkpoint.name.to_string(),
                age(checkpoint.age_seconds),
                checkpoint.image_bytes.map(bytes).unwrap_or_default(),
                checkpoint.own_bytes.map(bytes).unwrap_or_default(),
                checkpoint.last_drill.as_ref().map_or_else(|| "never".to_owned(), last_drill),
                checkpoint.lsn.map(|lsn| lsn.to_string()).unwrap_or_default(),
                seconds(checkpoint.created_at),
                checkpoint.layer.to_string(),
            ]
        }),
    )
}

pub fn export(
    to: &Session,
    from: &PointRef,
    dir: &Path,
    dump: Option<(DumpFormat, String)>,
    key: &IdempotencyKey,
) -> Result<(), Failure> {
    let point = (from.point != Point::Head).then(|| from.point.to_string());
    let (format, database) = dump.unzip();
    let body = Export { point, dir: absolute(dir)?, format, database };
    let path = format!("{}/export", branch_path(&from.at));
    let answer = to.client.post(&path, &body, key.as_deref())?;
    to.show(&answer, |view: Exported| {
        facts([("exported", from.to_string()), ("to", view.dir.display().to_string()), ("size", bytes(view.bytes))])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(name: &str, more: serde_json::Value) -> Branch {
        let mut value = serde_json::json!({
            "id": "br_00000000000000000000000000000001", "name": name, "project": "shop",
            "endpoint": format!("{name}--shop"), "head": "ly_00000000000000000000000000000002", "state": "suspended",
            "created_at": "2026-11-21T06:00:00Z", "idle_suspend_seconds": 300.0,
            "durability": "local", "window_seconds": 604800.0, "window_from": "2026-11-21T06:00:00Z",
        });
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn branches_are_listed_with_where_they_come_from() {
        let branches = vec![
            branch("prod", serde_json::json!({})),
            branch("pr-42", serde_json::json!({"parent": {"branch": "prod", "point": "v1"}, "state": "active"})),
            branch("dev", serde_json::json!({"parent": {"branch": "prod", "point": "head"}})),
        ];
        insta::assert_snapshot!(branch_table(branches), @r"
        BRANCH  STATE      FROM     CREATED               KEPT UNTIL
        prod    suspended           2026-11-21 06:00:00Z
        pr-42   active     prod@v1  2026-11-21 06:00:00Z
        dev     suspended  prod     2026-11-21 06:00:00Z
        ");
    }

    #[test]
    fn one_branch_is_shown_with_all_there_is() {
        let rescue = branch("rescue-1", serde_json::json!({"rescue_until": "2026-12-21T06:00:00Z"}));
        insta::assert_snapshot!(branch_facts(rescue), @r"
        branch            rescue-1
        id                br_00000000000000000000000000000001
        endpoint          rescue-1--shop
        state             suspended
        head              ly_00000000000000000000000000000002
        created           2026-11-21 06:00:00Z
        suspends after    300s
        pinned sessions   keep it awake
        commits wait for  the node's disk
        can go back to    2026-11-21 06:00:00Z
        clients from      any
        kept until        2026-12-21 06:00:00Z
        ");
        let kept = branch(
            "prod",
            serde_json::json!({"upkeep": {
                "checkpoints": {"hourly": 24, "daily": 7}, "drill_every_seconds": 86400.0,
                "probes": [{"sql": "select 1", "expect": "1"}],
            }}),
        );
        let shown = branch_facts(kept).lines().skip(10).collect::<Vec<_>>().join("\n");
        insta::assert_snapshot!(shown, @r"
        checkpoints       hourly=24,daily=7
        drilled every     1d
        drills ask        1 question
        clients from      any
        ");
        let narrow = branch("prod", serde_json::json!({"allow": ["192.0.2.0/24", "2001:db8::/32"]}));
        let shown = branch_facts(narrow);
        insta::assert_snapshot!(shown.lines().last().unwrap(), @"clients from      192.0.2.0/24, 2001:db8::/32");
        let stored = serde_json::json!({"stored": {
            "own_bytes": 2048, "shared_bytes": 5 << 20, "unsealed_bytes": 8192, "waiting_layers": 2,
        }});
        let shown = branch_facts(branch("prod", stored));
        let last = shown.lines().last().unwrap();
        insta::assert_snapshot!(last, @"stored            2.0 KiB own, 5.0 MiB shared, 8.0 KiB not sealed yet, 2 layers not in the bucket yet");
    }

    #[test]
    fn checkpoints_are_listed_with_their_size_and_whether_they_are_proven() {
        let checkpoint = |name: &str, more: serde_json::Value| -> Checkpoint {
            let mut value = serde_json::json!({
                "name": name, "branch": "prod", "layer": "ly_00000000000000000000000000000002",
                "created_at": "2026-11-21T06:00:00Z", "lsn": "0/16B3748", "age_seconds": 200, "image_bytes": 32 << 20,
                "own_bytes": 4096,
            });
            value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            serde_json::from_value(value).unwrap()
        };
        let drill = |passed: bool| {
            serde_json::json!({
                "branch": "prod", "point": "one", "at": "2026-11-21T07:00:00Z", "actor": "ebb", "passed": passed,
                "total_ms": 900, "bucket_bytes": 1, "checks": [],
            })
        };
        let checkpoints = vec![
            checkpoint("one", serde_json::json!({"last_drill": drill(true), "age_seconds": 90_000})),
            checkpoint("auto-2026-11-21T06-00Z", serde_json::json!({"automatic": true, "last_drill": drill(false)})),
            checkpoint("two", serde_json::json!({"own_bytes": null})),
        ];
        insta::assert_snapshot!(checkpoint_table(checkpoints), @r"
        CHECKPOINT              AGE  SIZE      OWN      LAST DRILL                   LSN        CREATED               LAYER
        one                     1d   32.0 MiB  4.0 KiB  passed 2026-11-21 07:00:00Z  0/16B3748  2026-11-21 06:00:00Z  ly_00000000000000000000000000000002
        auto-2026-11-21T06-00Z  3m   32.0 MiB  4.0 KiB  FAILED 2026-11-21 07:00:00Z  0/16B3748  2026-11-21 06:00:00Z  ly_00000000000000000000000000000002
        two                     3m   32.0 MiB           never                        0/16B3748  2026-11-21 06:00:00Z  ly_00000000000000000000000000000002
        ");
    }
}
