//! Restores out of the bucket alone, proven on real data; and what a byte that is not what it was comes to.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use ebb_tests::{Node, wait_for};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;

const COUNT: &str = "select count(*) || ' ' || sum(n) from history";

/// Rows 1 to 5000 in a checkpoint, up to 5100 at an LSN and a time, up to 5200 now, of which the last are in WAL only.
struct Sample {
    node: Node,
    lsn: String,
    time: String,
}

impl Sample {
    fn new() -> Self {
        let node = Node::with_shop();
        let rows = "create table history (n bigint primary key, pad text); \
                    insert into history select g, md5(g::text) from generate_series(1, 5000) g";
        node.psql("shop/prod", rows);
        node.ok(&["checkpoint", "create", "shop/prod", "one"]);
        let insert = |from: u32| {
            let sql =
                format!("insert into history select g, md5(g::text) from generate_series({from}, {}) g", from + 99);
            node.psql("shop/prod", &sql);
        };
        insert(5001);
        let lsn = node.psql("shop/prod", "select pg_current_wal_insert_lsn()");
        let now = "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
        let time = node.psql("shop/prod", now);
        // Leaves a boot set in the bucket, and a seal in between.
        node.suspend("shop/prod");
        insert(5101);
        Self { node, lsn, time }
    }

    /// What `point` must hold.
    fn probe(rows: u64) -> String {
        format!("{COUNT}={rows} {}", rows * (rows + 1) / 2)
    }
}

fn checks(drill: &Value) -> Vec<(String, String)> {
    let checks = drill["checks"].as_array().unwrap_or_else(|| panic!("{drill}"));
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    checks.iter().map(|check| (text(&check["check"]), text(&check["outcome"]))).collect()
}

/// Nothing of any drill is left on the node.
fn assert_nothing_left(node: &Node) {
    let drills = node.data().join("drills");
    let left: Vec<PathBuf> = fs::read_dir(&drills).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    assert_eq!(left, Vec::<PathBuf>::new());
    let of_drills = |(_, line): &(u32, String)| line.contains(&*drills.to_string_lossy());
    assert_eq!(node.processes().into_iter().filter(of_drills).collect::<Vec<_>>(), []);
}

#[test]
fn every_kind_of_point_is_restored_out_of_the_bucket_alone_and_checked() {
    let Sample { node, lsn, time } = Sample::new();
    let wakes = node.wakes("shop/prod");
    for (point, rows) in [("@one", 5000), (&format!("@{lsn}"), 5100), (&format!("@{time}"), 5100), ("", 5200)] {
        let drill = node.json(&["drill", &format!("shop/prod{point}"), "--probe", &Sample::probe(rows)]);
        assert_eq!(drill["passed"], true, "{point}: {drill}");
        let all = ["ledger", "start", "objects", "pages", "amcheck", "rows", "probes"];
        let expect: Vec<_> = all.iter().map(|name| ((*name).to_owned(), "passed".to_owned())).collect();
        assert_eq!(checks(&drill), expect, "{point}");
        assert!(drill["restore_ms"].as_u64() > Some(0) && drill["bucket_bytes"].as_u64() > Some(1 << 20), "{drill}");
        assert!(drill["image_bytes"].as_u64() > Some(8 << 20), "{drill}");
    }
    // The second drill of a checkpoint compares.
    let again = node.json(&["drill", "shop/prod@one"]);
    let rows = &again["checks"][5]["what"];
    assert_eq!(rows, "1 tables of 1 have the rows they had", "{again}");
    let listed = node.json(&["checkpoint", "list", "shop/prod"]);
    let one = &listed["checkpoints"][0];
    assert_eq!(one["last_drill"]["passed"], true, "{listed}");
    assert!(one["image_bytes"].as_u64() > Some(8 << 20) && one["own_bytes"].is_u64(), "{listed}");
    assert_eq!(node.wakes("shop/prod"), wakes, "the branch itself was left alone");
    assert_eq!(node.psql("shop/prod", COUNT), "5200 13522600");
    assert_nothing_left(&node);
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[test]
fn a_drill_that_finds_something_says_so_everywhere() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t as select 1 as n");
    node.ok(&["checkpoint", "create", "shop/prod", "one"]);
    node.ok(&["branch", "set", "shop/prod", "--probe", "select n from t=2"]);
    let ran = node.ebb(&["drill", "shop/prod@one"]);
    let fault = "the probe \"select n from t\" answers \"1\", not \"2\"";
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains(&format!("the drill of shop/prod@one failed: {fault}")), "{ran:?}");
    let drills = node.json(&["drills", "shop/prod"]);
    assert_eq!((&drills["drills"][0]["passed"], &drills["drills"][0]["fault"]), (&false.into(), &fault.into()));
    assert!(node.ok(&["checkpoint", "list", "shop/prod"]).contains("FAILED"));
    let receipt = node.ok(&["ledger", "list", "shop"]);
    assert!(receipt.contains(&format!("failed: {fault}")), "{receipt}");
    let metrics = ureq::get(format!("http://127.0.0.1:{}/metrics", node.api_port)).call().expect("metrics");
    let metrics = metrics.into_body().read_to_string().expect("a text");
    assert!(metrics.contains("ebb_timeline_drills_total{result=\"failed\"} 1"), "{metrics}");
    assert!(node.server_log().contains("a drill failed: this point cannot be relied on"));
    node.ok(&["branch", "set", "shop/prod", "--no-probes"]);
    node.ok(&["drill", "shop/prod@one"]);
    assert_nothing_left(&node);
}

/// Damage from before a layer was packed is under the layer's checksums: then Postgres' own tell.
#[test]
fn what_went_bad_before_it_came_to_the_bucket_is_found_by_postgres_own_checks() {
    let node = Node::with_shop();
    let table = "create table t (n int primary key, pad text); insert into t select g, repeat('x', 500) from generate_series(1, 5000) g";
    node.psql("shop/prod", table);
    node.ok(&["checkpoint", "create", "shop/prod", "good"]);
    node.ok(&["drill", "shop/prod@good"]);
    let as_superuser = |sql: &str| {
        let ran = node.superuser_tool("shop/prod", "psql", &["-XAtq", "-d", "app", "-v", "ON_ERROR_STOP=1", "-c", sql]);
        assert_eq!(ran.code, 0, "{sql}: {ran:?}");
        ran.stdout.trim().to_owned()
    };
    // An index over a function that answers something else since.
    let function = |answer: &str| {
        format!("create or replace function f(n int) returns int immutable language sql as 'select n {answer}'")
    };
    as_superuser(&format!("{}; create index broken on t (f(n)); {}", function("+ 1"), function("+ 2")));
    node.ok(&["checkpoint", "create", "shop/prod", "index"]);
    let ran = node.ebb(&["drill", "shop/prod@index"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("pg_amcheck found") && ran.stderr.contains("broken"), "{ran:?}");
    as_superuser("drop index broken");

    // A page whose bytes changed on the disk.
    as_superuser("checkpoint");
    let path = as_superuser("select current_setting('data_directory') || '/' || pg_relation_filepath('t')");
    let program = format!("printf ruined | dd of={path} bs=1 seek=28000 conv=notrunc status=none");
    as_superuser(&format!("copy (select 1) to program '{program}'"));
    node.ok(&["checkpoint", "create", "shop/prod", "page"]);
    let ran = node.ebb(&["drill", "shop/prod@page"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("checksum verification failed in file") && ran.stderr.contains("block 3"), "{ran:?}");
    let drills = node.json(&["drills", "shop/prod"]);
    let last = drills["drills"].as_array().expect("drills").last().expect("a drill").clone();
    let failed = ("pages".to_owned(), "failed".to_owned());
    assert_eq!(checks(&last).last(), Some(&failed), "{last}");
    assert_nothing_left(&node);
}

/// Objects of the bucket that the branch's restore may need, by key.
fn objects(bucket: &Path) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => walk(&path, found),
                path => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    for prefix in ["layers", "boot", "wal", "projects", "catalog"] {
        walk(&bucket.join(prefix), &mut found);
    }
    found.sort();
    found
}

/// How a message names an object, at the least.
fn is_named(message: &str, key: &str) -> bool {
    match key.rsplit_once('/') {
        Some((ledger, seq)) if ledger.ends_with("/ledger") || ledger == "catalog" => {
            let number: u64 = seq.parse().expect("an entry's key ends in its number");
            message.contains(&format!("ledger \"{ledger}\" is corrupt at entry {number}"))
        }
        _ => message.contains(key),
    }
}

/// `EBB_FLIPS` bytes, one at a time: each is told, with the object it is in, or was not needed for what was restored, and
/// then the rows are right. `EBB_TEST_SEED` replays a run.
#[test]
fn a_flipped_byte_anywhere_is_named_or_makes_no_difference() {
    let flips: u64 = std::env::var("EBB_FLIPS").ok().and_then(|text| text.parse().ok()).unwrap_or(24);
    let seed = std::env::var("EBB_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("EBB_TEST_SEED={seed} EBB_FLIPS={flips}");
    let mut random = StdRng::seed_from_u64(seed);
    let Sample { node, .. } = Sample::new();
    node.ok(&["drill", "shop/prod"]);
    let bucket = node.data().join("bucket");
    let (mut told, mut harmless) = (0, Vec::new());
    for flip in 0..flips {
        let objects = objects(&bucket);
        // By kind, as the ledger has the most objects, and layers the most bytes.
        let kinds = ["layers", "layers", "wal", "wal", "projects", "catalog", "boot"];
        let kind = kinds[random.random_range(0..kinds.len())];
        let of_kind: Vec<&PathBuf> = objects.iter().filter(|path| path.starts_with(bucket.join(kind))).collect();
        let path = of_kind[random.random_range(0..of_kind.len())];
        let key = path.strip_prefix(&bucket).expect("it is below").to_str().expect("keys are ASCII").to_owned();
        let good = fs::read(path).expect("an object can be read");
        let (at, bit) = (random.random_range(0..good.len()), random.random_range(0..8u32));
        let mut bad = good.clone();
        bad[at] ^= 1 << bit;
        let (point, rows) = if random.random_range(0..2) == 0 { ("@one", 5000) } else { ("", 5200) };
        let flipped = format!("flip {flip}: bit {bit} of byte {at} of {} of {key}, drilling {point:?}", good.len());
        replace(path, &bad);
        let ran = node.ebb(&["drill", &format!("shop/prod{point}"), "--probe", &Sample::probe(rows)]);
        replace(path, &good);
        match ran.code {
            // The probe was answered: the rows are right.
            0 => harmless.push(flipped),
            1 => {
                assert!(is_named(&ran.stderr, &key), "{flipped}: {}", ran.stderr);
                told += 1;
            }
            _ => panic!("{flipped}: {ran:?}"),
        }
    }
    println!("{told} of {flips} flips were told; the others made no difference:\n{}", harmless.join("\n"));
    assert!(told > flips / 3, "hardly any flip was in what a restore needs");
    node.ok(&["drill", "shop/prod", "--probe", &Sample::probe(5200)]);
    assert_nothing_left(&node);
}

/// An object appears whole, as the bucket's own do.
fn replace(path: &Path, bytes: &[u8]) {
    let fresh = path.with_extension("flip");
    fs::write(&fresh, bytes).expect("a file can be written");
    fs::rename(&fresh, path).expect("a file can be renamed");
}

#[test]
fn a_drill_whose_server_is_killed_leaves_nothing_once_there_is_another() {
    let mut node = Node::with_shop();
    node.psql("shop/prod", "create table t as select generate_series(1, 1000) as n");
    node.ok(&["checkpoint", "create", "shop/prod", "one"]);
    thread::scope(|scope| {
        let drilling = scope.spawn(|| node.ebb(&["drill", "shop/prod@one"]));
        let drills = node.data().join("drills");
        wait_for("the unit of the drill", || {
            node.processes().iter().any(|(_, line)| line.contains(&*drills.to_string_lossy()))
        });
        ebb_tests::kill("KILL", node.server_pid());
        assert_ne!(drilling.join().expect("a thread").code, 0);
    });
    node.kill_server();
    node.serve();
    assert_nothing_left(&node);
    let receipts = node.json(&["ledger", "list", "shop"]);
    let last = receipts["entries"].as_array().expect("entries").iter().rev().find(|entry| entry["act"] == "drill");
    assert_eq!(last.expect("a drill")["result"], "undone: it was interrupted before it took effect", "{receipts}");
    assert_eq!(node.json(&["drills", "shop/prod"])["drills"], Value::Array(Vec::new()));
    node.ok(&["drill", "shop/prod@one", "--probe", "select count(*) from t=1000"]);
    assert_nothing_left(&node);
}

#[test]
fn a_server_that_stops_ends_its_drill_first() {
    let mut node = Node::with_shop();
    node.psql("shop/prod", "create table t as select generate_series(1, 1000) as n");
    node.ok(&["branch", "set", "shop/prod", "--drill-every", "1s"]);
    let drills = node.data().join("drills");
    wait_for("the unit of the drill", || {
        node.processes().iter().any(|(_, line)| line.contains(&*drills.to_string_lossy()))
    });
    node.stop();
    assert_eq!(node.processes(), []);
    assert_nothing_left(&node);
    node.serve();
    node.ok(&["branch", "set", "shop/prod", "--drill-every", "off"]);
    node.ok(&["drill", "shop/prod", "--probe", "select count(*) from t=1000"]);
}

#[test]
fn checkpoints_and_drills_are_made_by_policy_while_the_branch_sleeps() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t as select generate_series(1, 1000) as n");
    node.suspend("shop/prod");
    let wakes = node.wakes("shop/prod");
    let set = ["branch", "set", "shop/prod", "--checkpoints", "hourly=2,daily=7", "--drill-every", "1s"];
    let shown = node.json(&[&set[..], &["--probe", "select count(*) from t=1000"]].concat());
    assert_eq!(shown["upkeep"]["checkpoints"]["hourly"], 2, "{shown}");
    let names = || -> Vec<String> {
        let listed = node.json(&["checkpoint", "list", "shop/prod"]);
        let all = listed["checkpoints"].as_array().expect("checkpoints");
        all.iter().map(|one| one["name"].as_str().expect("a name").to_owned()).collect()
    };
    wait_for("a checkpoint by schedule", || names().len() == 1);
    assert!(names()[0].starts_with("auto-20"), "{:?}", names());
    let drilled = || -> Vec<(String, bool)> {
        let listed = node.json(&["drills", "shop/prod"]);
        let all = listed["drills"].as_array().expect("drills");
        all.iter().map(|one| (one["point"].as_str().expect("a point").to_owned(), one["passed"] == true)).collect()
    };
    wait_for("a drill of it, and one of the head", || {
        [&names()[0], "head"].iter().all(|point| drilled().iter().any(|(drilled, _)| drilled == point))
    });
    assert!(drilled().iter().all(|(_, passed)| *passed), "{:?}", drilled());
    assert_eq!(names().len(), 1, "nothing has changed since");
    assert_eq!(node.wakes("shop/prod"), wakes, "it was not woken for any of it");
    node.ok(&["branch", "set", "shop/prod", "--checkpoints", "off", "--drill-every", "off"]);
    // One that has begun already goes on.
    wait_for("the last drill", || node.data().join("drills").read_dir().is_ok_and(|mut left| left.next().is_none()));
}
