//! PostgreSQL's own way of life on a volume.

use std::process::Command;

use ebb_tests::Node;

#[test]
fn ordinary_heavy_work_leaves_a_sound_cluster() {
    let node = Node::with_shop();
    let url = node.url("shop/prod");
    for args in
        [&["-q", "-i", "-s", "10"][..], &["-n", "-c", "4", "-t", "300"][..], &["-n", "-S", "-c", "4", "-t", "500"][..]]
    {
        let ran = node.tool("pgbench", &[args, &[url.as_str()]].concat());
        assert_eq!(ran.code, 0, "pgbench {args:?}: {}", ran.stderr);
    }
    for sql in [
        "vacuum full pgbench_accounts",
        "reindex table pgbench_accounts",
        "create index on pgbench_accounts (abalance)",
        "create table copy as table pgbench_accounts",
        "truncate copy",
        "insert into copy select * from pgbench_accounts limit 1000",
        "create database other",
        "drop database other",
        "create unlogged table u as select generate_series(1, 1000) as n",
        "alter table pgbench_history add column extra int default 7",
        "vacuum analyze",
    ] {
        node.psql("shop/prod", sql);
    }
    let ran = node.superuser_tool("shop/prod", "psql", &["-XAtqd", "app", "-c", "checkpoint"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    node.psql("shop/prod", "update pgbench_branches set filler = 'x'");
    // Crash recovery on the volume.
    node.kill_9(node.unit_pid("shop/prod"));
    ebb_tests::wait_for("the crash to be noticed", || node.compute("shop/prod")["state"] != "active");
    assert_eq!(node.psql("shop/prod", "select count(*) from pgbench_accounts"), "1000000");
    assert_eq!(node.psql("shop/prod", "select count(*) from copy"), "1000");
    assert_eq!(node.psql("shop/prod", "select count(*) from pgbench_branches where filler like 'x%'"), "10");
    let ran = node.superuser_tool("shop/prod", "pg_amcheck", &["--install-missing", "--heapallindexed", "-a"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    node.suspend("shop/prod");
    let dir = node.scratch().join("export");
    node.ok(&["export", "shop/prod", dir.to_str().expect("test paths are UTF-8")]);
    let ran = node.tool("pg_checksums", &["--check", "-D", dir.to_str().expect("test paths are UTF-8")]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    assert_exported_cluster_starts(&node, &dir);
}

/// Stock Postgres, without anything of Ebb, starts on an export.
fn assert_exported_cluster_starts(node: &Node, dir: &std::path::Path) {
    // Postgres does not run as root, and must reach its directory.
    let home = tempfile_dir();
    let moved = home.path().join("data");
    assert!(Command::new("mv").arg(dir).arg(&moved).status().expect("mv can be started").success());
    let owned = Command::new("chown").arg("-R").arg("postgres").arg(home.path()).status();
    assert!(owned.expect("chown can be started").success());
    let as_postgres = |program: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.arg(ebb_tests::pg_bin().join(program)).arg("-D").arg(&moved);
        command
    };
    let options = format!("-c listen_addresses= -k {}", home.path().display());
    let started = as_postgres("pg_ctl")
        .args(["-w", "-l"])
        .arg(home.path().join("log"))
        .arg("-o")
        .arg(options)
        .arg("start")
        .status();
    assert!(started.expect("pg_ctl can be started").success(), "stock Postgres does not start on the export");
    let home_text = home.path().to_str().expect("test paths are UTF-8");
    let ran = node
        .tool("psql", &["-XAtq", "-h", home_text, "-U", "app", "app", "-c", "select count(*) from pgbench_accounts"]);
    let stopped = as_postgres("pg_ctl").args(["-w", "-m", "fast", "stop"]).status();
    assert!(stopped.expect("pg_ctl can be started").success());
    assert_eq!(ran.stdout.trim(), "1000000", "{}", ran.stderr);
}

fn tempfile_dir() -> tempfile::TempDir {
    tempfile::TempDir::with_prefix("ebb-export-").expect("a temporary directory can be made")
}
