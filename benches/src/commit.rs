//! What does a commit cost at either durability, against a plain Postgres, and one that waits for `pg_receivewal`?
//!
//! All are on one disk: Ebb's bucket is a directory, as that of `pg_receivewal` is. Expected beforehand: `local` is a plain
//! Postgres whose processors also compress WAL; `bucket` is a synchronous `pg_receivewal`, which makes an fsync for each
//! batch of commits, as a put does.

use std::fs;
use std::process::{Child, Command, Stdio};

use anyhow::Result;
use ebb_measure::stats::{Samples, heading, report};
use ebb_measure::wait_for;
use serde_json::json;

use crate::Common;
use crate::native::Native;
use crate::node::{Node, settings_of};
use crate::pgbench::{self, Round, over_socket, psql};

const SCRIPT: &str = "insert into commits values (:client_id, random());\n";
const TABLE: &str = "create table commits (client int, value float8)";

/// Clients that commit one row after another, at four kinds of durability in turns.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(3);
    heading(
        "commit: one row a transaction, at durability `local` and `bucket`, against plain Postgres and pg_receivewal --synchronous",
        &format!("{rounds} rounds of {} s each, in turns, prepared, 1 and 16 clients; all on one disk", common.seconds),
    );
    let node = Node::start(common)?;
    let socket = node.wake("prod")?;
    let settings = settings_of(&common.pg_bin, &socket)?;
    let mut plain = Native::create(common, settings.clone())?;
    plain.start()?;
    let mut waiting = Native::create(common, settings)?;
    waiting.start()?;
    let script = tempfile::NamedTempFile::new()?;
    fs::write(script.path(), SCRIPT)?;
    let script = ["-f".to_owned(), script.path().display().to_string()];
    let script: Vec<&str> = script.iter().map(String::as_str).collect();
    let ebb = over_socket(&socket, "app");
    let (plain_at, waiting_at) =
        (over_socket(plain.socket_dir(), "postgres"), over_socket(waiting.socket_dir(), "postgres"));
    for target in [&ebb, &plain_at, &waiting_at] {
        psql(common, target, TABLE)?;
    }
    let receiver = Receiver::start(common, &waiting)?;
    psql(common, &waiting_at, "alter system set synchronous_standby_names = 'pg_receivewal'")?;
    psql(common, &waiting_at, "select pg_reload_conf()")?;
    for clients in [1, 16] {
        let mut seen: [[Samples; 2]; 4] = Default::default();
        for _ in 0..rounds {
            for (side, samples) in seen.iter_mut().enumerate() {
                let target = match side {
                    0 | 1 => {
                        let durability = ["local", "bucket"][side];
                        node.patch("/v1/projects/bench/branches/prod", &json!({"durability": durability}))?;
                        &ebb
                    }
                    2 => &plain_at,
                    _ => &waiting_at,
                };
                let Round { tps, latency_ms } = pgbench::round(common, target, &script, clients)?;
                samples[0].add(tps);
                samples[1].add(latency_ms);
            }
        }
        let [local, bucket, plain, waiting] = seen;
        let said = |what: &str| format!("{what}, {clients} clients");
        report(&said("local, throughput"), "tps", local[0].median(), "plain", plain[0].median(), "-");
        report(&said("local, latency"), "ms", local[1].median(), "plain", plain[1].median(), "-");
        report(&said("bucket, throughput"), "tps", bucket[0].median(), "pg_receivewal", waiting[0].median(), ">= 1");
        report(&said("bucket, latency"), "ms", bucket[1].median(), "pg_receivewal", waiting[1].median(), "<= 1");
    }
    psql(common, &waiting_at, "alter system reset synchronous_standby_names")?;
    psql(common, &waiting_at, "select pg_reload_conf()")?;
    drop(receiver);
    Ok(())
}

/// A synchronous `pg_receivewal`; ended when dropped.
struct Receiver {
    process: Child,
    _dir: tempfile::TempDir,
}

impl Receiver {
    fn start(common: &Common, of: &Native) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ebb-receivewal-").tempdir_in(&common.dir)?;
        let mut command = Command::new(common.pg_bin.join("pg_receivewal"));
        command
            .args(["-U", "postgres", "--synchronous", "--no-loop", "-h"])
            .arg(of.socket_dir())
            .arg("-D")
            .arg(dir.path());
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        wait_for("pg_receivewal", || fs::read_dir(dir.path()).is_ok_and(|mut files| files.next().is_some()))?;
        Ok(Self { process, _dir: dir })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-INT", &self.process.id().to_string()]).status();
        let _ = self.process.wait();
    }
}
