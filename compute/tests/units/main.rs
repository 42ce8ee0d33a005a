//! Units on real Postgres, from the manager's side: what they do when asked, and when something is killed.
//!
//! This binary is also the program the units run: `units compute --branch-dir DIR`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod node;
mod shipping;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use ebb_compute::manager::Unit;
use ebb_compute::{Error, unit};
use ebb_storage::volume::Volume;
use ebb_types::LayerId;
use libtest_mimic::{Arguments, Trial};

use self::node::{Node, kill, processes_like, until};
use self::shipping::{
    a_forks_wal_has_an_archive_of_its_own, a_stop_does_not_wait_for_a_bucket_that_is_away,
    a_unit_that_is_overtaken_stops_postgres_and_seals_nothing, durability_is_changed_while_clients_work,
    wal_is_shipped_from_wake_to_wake_without_a_gap,
};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let [_, compute, _, dir] = arguments.as_slice()
        && compute == "compute"
    {
        return unit::main(Path::new(dir));
    }
    macro_rules! trials {
        ($($name:ident),* $(,)?) => { vec![$(trial(stringify!($name), || Box::pin($name()))),*] };
    }
    let trials = trials![
        a_stopped_unit_leaves_a_clean_layer_and_no_process,
        a_killed_postmaster_is_started_again_with_every_commit,
        a_crashed_backend_is_recovered_from,
        a_killed_unit_takes_postgres_with_it_and_the_next_one_has_every_commit,
        a_unit_is_found_again,
        starts_at_once_make_one_unit,
        a_seal_leaves_postgres_alone_and_a_branch_of_it_starts,
        a_seal_can_be_asked_for_twice,
        a_seal_holds_what_was_there_when_it_was_answered_whenever_its_layer_is_completed,
        a_fork_has_no_slots_and_no_running_subscriptions,
        roles_made_in_sql_are_published,
        a_role_keeps_the_verifier_it_has,
        a_discarded_unit_leaves_no_layer,
        a_terminated_unit_stops_postgres_cleanly,
        a_unit_started_by_hand_makes_its_own_namespace,
        a_start_that_fails_says_what_postgres_said,
        a_volume_that_is_not_there_is_said,
        a_unit_whose_postgres_keeps_dying_gives_up,
        a_path_longer_than_a_socket_s_works,
        postgres_is_isolated,
        no_acknowledged_row_is_lost_to_a_kill,
        a_unit_that_does_not_answer_is_killed,
        wal_is_shipped_from_wake_to_wake_without_a_gap,
        a_forks_wal_has_an_archive_of_its_own,
        durability_is_changed_while_clients_work,
        a_unit_that_is_overtaken_stops_postgres_and_seals_nothing,
        a_stop_does_not_wait_for_a_bucket_that_is_away,
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

type Test = std::pin::Pin<Box<dyn Future<Output = ()>>>;

fn trial(name: &str, test: fn() -> Test) -> Trial {
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(test());
        Ok(())
    })
}

async fn a_stopped_unit_leaves_a_clean_layer_and_no_process() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    let status = unit.status().await.unwrap();
    assert!(status.ready && status.restarts == 0);
    let stages: Vec<_> = status.stages.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(stages, ["spawned", "isolated", "opened", "mounted", "started", "ready"]);
    assert!(status.stages.is_sorted_by_key(|(_, at)| *at));
    assert!(Path::new(&format!("/proc/{}", status.postmaster_pid.unwrap())).exists());

    node.sql(&unit, "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n").await;
    let processes = node.processes(&spec);
    assert!(processes.len() > 3, "{processes:?}");
    let layer = LayerId::generate();
    let sealed = unit.stop(layer).await.unwrap();
    assert_eq!((sealed.layer, sealed.new), (layer, true));
    node.until_dead(&processes).await;
    assert!(node.mounts_of(&spec).is_empty());
    assert!(!spec.branch_dir.join("control.sock").exists());
    let image = node.store.manifest(layer).await.unwrap().image;
    assert!(image.clean, "{image:?}");
    assert!(matches!(unit.status().await, Err(Error::Gone)));
    assert!(matches!(unit.stop(layer).await, Err(Error::Gone)));

    let unit = node.start(&spec).await;
    assert_eq!(node.sql(&unit, "SELECT count(*) FROM t").await, "1000");
    node.stop(unit).await;
}

async fn a_killed_postmaster_is_started_again_with_every_commit() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    for round in 1..=3_u32 {
        node.sql(&unit, &format!("INSERT INTO t SELECT {round} FROM generate_series(1, 100)")).await;
        let postmaster = unit.status().await.unwrap().postmaster_pid.unwrap();
        kill(postmaster);
        node.until_restarted(&unit, round).await;
        assert_eq!(node.sql(&unit, "SELECT count(*) FROM t").await, (round * 100).to_string());
    }
    node.stop(unit).await;
}

async fn a_crashed_backend_is_recovered_from() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t AS SELECT 1 AS n").await;
    let checkpointer = processes_like(&node.processes(&spec), "checkpointer");
    kill(checkpointer[0]);
    node.until_restarted(&unit, 1).await;
    assert_eq!(node.sql(&unit, "SELECT count(*) FROM t").await, "1");
    node.stop(unit).await;
}

async fn a_killed_unit_takes_postgres_with_it_and_the_next_one_has_every_commit() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let mut unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    for round in 1..=3 {
        node.sql(&unit, &format!("INSERT INTO t SELECT {round} FROM generate_series(1, 100)")).await;
        let processes = node.processes(&spec);
        kill(node.unit_pid(&spec));
        tokio::time::timeout(Duration::from_secs(20), unit.gone()).await.expect("the unit goes");
        node.until_dead(&processes).await;
        assert!(node.mounts_of(&spec).is_empty());
        assert!(matches!(unit.seal(LayerId::generate()).await, Err(Error::Gone)));
        unit = node.start(&spec).await;
        assert_eq!(node.sql(&unit, "SELECT count(*) FROM t").await, (round * 100).to_string());
    }
    node.stop(unit).await;
}

async fn a_unit_is_found_again() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    assert!(Unit::adopt(&spec.branch_dir).await.unwrap().is_none());
    let unit = node.start(&spec).await;
    let pid = node.unit_pid(&spec);
    let found = Unit::adopt(&spec.branch_dir).await.unwrap().expect("it runs");
    assert_eq!(found.status().await.unwrap().stages, unit.status().await.unwrap().stages);
    let same = node.start(&spec).await;
    assert_eq!(node.unit_pid(&spec), pid, "a second start adopts");
    node.stop(same).await;
    tokio::time::timeout(Duration::from_secs(5), found.gone()).await.expect("the unit is gone");
    assert!(Unit::adopt(&spec.branch_dir).await.unwrap().is_none());
}

async fn starts_at_once_make_one_unit() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let (one, other) = tokio::join!(Unit::start(&node.exe, &spec), Unit::start(&node.exe, &spec));
    let started: Vec<_> = [one, other].into_iter().filter_map(Result::ok).collect();
    assert!(!started.is_empty());
    assert_eq!(processes_like(&node.processes(&spec), "compute").len(), 1);
    node.stop(node.start(&spec).await).await;
}

async fn a_seal_leaves_postgres_alone_and_a_branch_of_it_starts() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let source = node.start(&spec).await;
    let pid = source.status().await.unwrap().postmaster_pid;
    node.sql(&source, "CREATE TABLE t AS SELECT generate_series(1, 100) AS n").await;
    let layer = LayerId::generate();
    let sealed = source.seal(layer).await.unwrap();
    assert_eq!((sealed.layer, sealed.new), (layer, true));
    node.sql(&source, "INSERT INTO t VALUES (0)").await;
    assert_eq!(source.status().await.unwrap().postmaster_pid, pid);

    source.finish_seals().await.unwrap();
    let branch_spec = node.branch(layer);
    let branch = node.start(&branch_spec).await;
    assert_eq!(node.sql(&branch, "SELECT count(*) FROM t").await, "100");
    node.sql(&branch, "TRUNCATE t").await;
    assert_eq!(node.sql(&source, "SELECT count(*) FROM t").await, "101");
    node.stop(branch).await;
    node.stop(source).await;
}

async fn a_seal_can_be_asked_for_twice() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    let layer = LayerId::generate();
    let sealed = unit.seal(layer).await.unwrap();
    assert_eq!((sealed.layer, sealed.new), (layer, true));
    let sealed = unit.seal(layer).await.unwrap();
    assert_eq!((sealed.layer, sealed.new), (layer, true));
    node.stop(unit).await;
}

async fn a_seal_holds_what_was_there_when_it_was_answered_whenever_its_layer_is_completed() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    let mut layers = Vec::new();
    for _ in 0..8 {
        node.sql(&unit, "INSERT INTO t VALUES (1)").await;
        let layer = LayerId::generate();
        unit.seal(layer).await.unwrap();
        layers.push(layer);
    }
    node.sql(&unit, "INSERT INTO t VALUES (2)").await;
    kill(node.unit_pid(&spec));
    unit.gone().await;
    let unit = node.start(&spec).await;
    assert_eq!(node.sql(&unit, "SELECT count(*) FROM t").await, "9");
    for (number, layer) in layers.into_iter().enumerate() {
        let branch = node.start(&node.branch(layer)).await;
        assert_eq!(node.sql(&branch, "SELECT count(*) FROM t").await, (number + 1).to_string());
        node.stop(branch).await;
    }
    node.stop(unit).await;
}

async fn a_fork_has_no_slots_and_no_running_subscriptions() {
    const FOUND: &str =
        "SELECT (SELECT count(*) FROM pg_replication_slots) || ' ' || (SELECT subenabled FROM pg_subscription)";
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    spec.settings = vec![("wal_level".to_owned(), "logical".to_owned())];
    let source = node.start(&spec).await;
    for sql in [
        "CREATE TABLE t (n int)",
        "SELECT pg_create_physical_replication_slot('standby', true)",
        "SELECT pg_create_logical_replication_slot('reader', 'pgoutput')",
        "CREATE SUBSCRIPTION s CONNECTION 'host=/nowhere' PUBLICATION p WITH (connect = false)",
        "ALTER SUBSCRIPTION s ENABLE",
    ] {
        node.sql(&source, sql).await;
    }
    let layer = LayerId::generate();
    source.seal(layer).await.unwrap();
    source.finish_seals().await.unwrap();
    assert_eq!(node.sql(&source, FOUND).await, "2 true");

    let mut fork_spec = node.fork(layer);
    fork_spec.settings.clone_from(&spec.settings);
    let fork = node.start(&fork_spec).await;
    assert_eq!(node.sql(&fork, "SHOW max_logical_replication_workers").await, "0");
    let begun = std::time::Instant::now();
    while node.sql(&fork, FOUND).await != "0 false" {
        assert!(begun.elapsed() < Duration::from_secs(20), "the subscription is still enabled");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // From now on it is a branch like any other: what is enabled in it stays so.
    node.sql(&fork, "ALTER SUBSCRIPTION s ENABLE").await;
    node.stop(fork).await;
    fork_spec.fork = false;
    let fork = node.start(&fork_spec).await;
    assert_eq!(node.sql(&fork, FOUND).await, "0 true");
    node.stop(fork).await;
    node.stop(source).await;
}

async fn roles_made_in_sql_are_published() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    spec.initial_roles =
        vec![("app".to_owned(), node::VERIFIER.to_owned()), ("nobody".to_owned(), node::VERIFIER.to_owned())];
    let unit = node.start(&spec).await;
    until("the owner's verifier", || node.roles(&spec).is_some_and(|roles| roles["app"] == node::VERIFIER)).await;

    node.sql(
        &unit,
        "CREATE ROLE bob LOGIN PASSWORD 'secret'; CREATE ROLE eve PASSWORD 'x'; ALTER ROLE postgres PASSWORD 'y'",
    )
    .await;
    until("bob", || node.roles(&spec).unwrap().contains_key("bob")).await;
    let roles = node.roles(&spec).unwrap();
    assert!(roles["bob"].starts_with("SCRAM-SHA-256$4096:"), "{roles:?}");
    assert_eq!(roles.keys().collect::<Vec<_>>(), ["app", "bob"], "eve cannot log in, postgres must not");

    // What was changed just before a seal or the stop is published with it.
    node.sql(&unit, "DROP ROLE bob").await;
    unit.seal(LayerId::generate()).await.unwrap();
    assert!(!node.roles(&spec).unwrap().contains_key("bob"));
    node.sql(&unit, "CREATE ROLE last LOGIN PASSWORD 'z'").await;
    let layer = node.stop(unit).await;
    assert!(node.roles(&spec).unwrap().contains_key("last"));
    assert!(node.layers().join(layer.to_string()).join("roles.json").exists());
}

async fn a_role_keeps_the_verifier_it_has() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "ALTER ROLE app PASSWORD 'mine'").await;
    node.stop(unit).await;
    let mine = node.roles(&spec).unwrap()["app"].clone();
    spec.initial_roles = vec![("app".to_owned(), node::VERIFIER.to_owned())];
    let unit = node.start(&spec).await;
    node.stop(unit).await;
    assert_eq!(node.roles(&spec).unwrap()["app"], mine);
}

async fn a_discarded_unit_leaves_no_layer() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t (n int)").await;
    let processes = node.processes(&spec);
    unit.discard().await.unwrap();
    node.until_dead(&processes).await;
    assert_eq!(std::fs::read_dir(node.layers()).unwrap().count(), 1, "only the template's");
    unit.discard().await.expect("discarding what is gone does nothing");
}

async fn a_terminated_unit_stops_postgres_cleanly() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE TABLE t AS SELECT 1 AS n").await;
    node::signal(node.unit_pid(&spec), rustix::process::Signal::TERM);
    tokio::time::timeout(Duration::from_secs(20), unit.gone()).await.expect("the unit goes");
    let log = std::fs::read_to_string(spec.branch_dir.join("postgres.log")).unwrap();
    assert!(log.contains("database system is shut down"), "{log}");
    let unit = node.start(&spec).await;
    assert_eq!(node.sql(&unit, "SELECT n FROM t").await, "1");
    node.stop(unit).await;
}

async fn a_unit_started_by_hand_makes_its_own_namespace() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    std::fs::write(spec.branch_dir.join("unit.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
    let mut command = std::process::Command::new(&node.exe);
    command.args(["compute", "--branch-dir"]).arg(&spec.branch_dir);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    assert!(command.status().unwrap().success());
    let unit = node.start(&spec).await;
    assert_eq!(node.sql(&unit, "SELECT 1").await, "1");
    let processes = node.processes(&spec);
    kill(node.unit_pid(&spec));
    unit.gone().await;
    node.until_dead(&processes).await;
}

async fn a_start_that_fails_says_what_postgres_said() {
    let node = Node::new().await;
    let mut spec = node.branch(node.template);
    spec.settings = vec![("work_mem".to_owned(), "a lot".to_owned())];
    let error = Unit::start(&node.exe, &spec).await.unwrap_err();
    assert!(matches!(error, Error::Start { .. }), "{error}");
    assert!(error.to_string().contains("contains errors"), "{error}");
    assert!(std::fs::read_to_string(spec.branch_dir.join("postgres.log")).unwrap().contains("work_mem"));

    spec.settings = vec![("include '/etc/passwd'".to_owned(), String::new())];
    let error = Unit::start(&node.exe, &spec).await.unwrap_err();
    assert!(error.to_string().contains("is no name of a setting"), "{error}");

    spec.settings.clear();
    node.stop(node.start(&spec).await).await;
}

async fn a_volume_that_is_not_there_is_said() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    Volume::remove(&node.dirs(&spec)).unwrap();
    std::fs::create_dir_all(spec.branch_dir.join("wal")).unwrap();
    let error = Unit::start(&node.exe, &spec).await.unwrap_err();
    assert!(error.to_string().contains("volume.json"), "{error}");
}

async fn a_unit_whose_postgres_keeps_dying_gives_up() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    for round in 1..=6 {
        kill(unit.status().await.unwrap().postmaster_pid.unwrap());
        if round <= 5 {
            node.until_restarted(&unit, round).await;
        }
    }
    tokio::time::timeout(Duration::from_secs(20), unit.gone()).await.expect("the unit gives up");
    let reason = std::fs::read_to_string(spec.branch_dir.join("unit.err")).unwrap();
    assert!(reason.contains("6 times within a minute") && reason.contains("SIGKILL"), "{reason}");
    node.stop(node.start(&spec).await).await;
}

async fn a_path_longer_than_a_socket_s_works() {
    let node = Node::new().await;
    let spec = node.branch_in(&node.dir().join("x".repeat(120)), node.template);
    let unit = node.start(&spec).await;
    assert_eq!(node.sql(&unit, "SELECT 1").await, "1");
    node.stop(unit).await;
}

async fn postgres_is_isolated() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    assert_eq!(node.sql(&unit, "SHOW listen_addresses").await, "");
    assert_eq!(node.sql(&unit, "SHOW data_checksums").await, "on");
    let postmaster = unit.status().await.unwrap().postmaster_pid.unwrap();
    let status = std::fs::read_to_string(format!("/proc/{postmaster}/status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("CapEff:").trim_start_matches('0'), "");
    assert_ne!(field("Uid:").split_whitespace().next(), Some("0"));
    for namespace in ["pid", "mnt", "ipc"] {
        let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&postmaster.to_string()), of("self"), "{namespace}");
    }
    let environment = std::fs::read(format!("/proc/{postmaster}/environ")).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains("CARGO"), "the environment leaks");
    node.stop(unit).await;
}

/// One client writes rows, one commit each, while the processes of its unit are killed one after the other.
async fn no_acknowledged_row_is_lost_to_a_kill() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    node.sql(&unit, "CREATE EXTENSION amcheck; CREATE TABLE t (n int PRIMARY KEY, pad text)").await;

    let acknowledged = AtomicU32::new(0);
    let end = AtomicBool::new(false);
    let write = async {
        while !end.load(Relaxed) {
            let _ = node.write_rows(&unit, &acknowledged, &end).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let kill_them = async {
        let mut restarts = 0;
        let victims = ["unit", "postmaster", "checkpointer", "unit", "walwriter", "unit", "postgres app", "postmaster"];
        for (round, victim) in victims.into_iter().enumerate() {
            // Not at the same distance from the last start each time.
            let before = acknowledged.load(Relaxed);
            until("rows", || acknowledged.load(Relaxed) > before + [1, 60, 7, 150][round % 4]).await;
            match victim {
                "unit" => {
                    kill(node.unit_pid(&spec));
                    unit.gone().await;
                    node.start(&spec).await;
                    restarts = 0;
                    continue;
                }
                "postmaster" => kill(unit.status().await.unwrap().postmaster_pid.unwrap()),
                other => kill(processes_like(&node.processes(&spec), other)[0]),
            }
            restarts += 1;
            node.until_restarted(&unit, restarts).await;
        }
        end.store(true, Relaxed);
    };
    tokio::join!(write, kill_them);

    let acknowledged = acknowledged.into_inner();
    let found = node.sql(&unit, &format!("SELECT count(*) FROM t WHERE n BETWEEN 1 AND {acknowledged}")).await;
    assert_eq!(found, acknowledged.to_string());
    let checked =
        node.sql(&unit, "SELECT count(bt_index_check(oid, true)) FROM pg_class WHERE relam = 403 AND relkind = 'i'");
    assert_ne!(checked.await, "0");
    assert_eq!(node.sql(&unit, "SELECT count(*) FROM verify_heapam('t')").await, "0");
    node.stop(unit).await;
}

async fn a_unit_that_does_not_answer_is_killed() {
    let node = Node::new().await;
    let spec = node.branch(node.template);
    let unit = node.start(&spec).await;
    let processes = node.processes(&spec);
    node::signal(node.unit_pid(&spec), rustix::process::Signal::STOP);
    assert!(Unit::adopt(&spec.branch_dir).await.unwrap().is_none());
    node.until_dead(&processes).await;
    assert!(matches!(unit.status().await, Err(Error::Gone)));
}
