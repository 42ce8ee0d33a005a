//! Drivers in transaction mode, each with its own ways of preparing statements, more clients than backends.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{ENDPOINT, Ebb, PASSWORD};

/// Where `scripts/setup test` puts drivers.
fn installed(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/tools/drivers").join(path);
    assert!(path.exists(), "{} is not there: scripts/setup test installs it", path.display());
    path
}

/// Runs a script that says `done` if all is well.
async fn run(program: PathBuf, script: &str) {
    let ebb = Ebb::with(|config| config.pool_size = Some(3)).await;
    let mut command = Command::new(program);
    let database = format!("app@{ENDPOINT}-pooler");
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/proxy/drivers").join(script))
        .env("PORT", ebb.addr.port().to_string())
        .env("PASSWORD", PASSWORD)
        .env("DATABASE", &database)
        .env("DSN", format!("host=127.0.0.1 port={} user=app password={PASSWORD} dbname={database}", ebb.addr.port()))
        .env("NODE_PATH", Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/tools/drivers/node/node_modules"));
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(out.trim_end(), "done", "{script}: {err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn psycopg_with_everything_prepared() {
    run(installed("python/bin/python"), "pooled_psycopg.py").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn asyncpg_with_its_statement_cache() {
    run(installed("python/bin/python"), "pooled_asyncpg.py").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_postgres_with_named_statements() {
    installed("node/node_modules/pg");
    run("node".into(), "pooled_node.js").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pgbench_in_all_of_its_modes() {
    let ebb = Ebb::with(|config| config.pool_size = Some(3)).await;
    let conninfo =
        format!("host=127.0.0.1 port={} user=app password={PASSWORD} dbname=app@{ENDPOINT}-pooler", ebb.addr.port());
    let pgbench = |arguments: &str| {
        let mut command = Command::new("/usr/lib/postgresql/15/bin/pgbench");
        command.args(arguments.split(' ')).arg(&conninfo);
        tokio::task::spawn_blocking(move || command.output())
    };
    let made = pgbench("-i -q -s 1").await.unwrap().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for mode in ["simple", "extended", "prepared"] {
        for script in ["", " -S"] {
            let ran = pgbench(&format!("-n -c 20 -j 2 -t 20 -M {mode}{script}")).await.unwrap().unwrap();
            let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
            assert!(
                out.contains("actually processed: 400/400") && err.trim().is_empty(),
                "{mode}{script}: {out} {err}"
            );
        }
    }
}
