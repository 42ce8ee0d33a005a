//! What do many clients on few backends cost, against PgBouncer in transaction mode in front of the same Postgres?

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ebb_measure::process::private_memory_kib;
use ebb_measure::stats::{Samples, heading, report};
use ebb_measure::wait_for;
use serde_json::json;

use crate::Common;
use crate::node::{Node, free_port};
use crate::pgbench::{self, over_socket};

/// Backends behind either pooler.
const BACKENDS: usize = 20;
/// Clients of the last round, most of which wait at any moment.
const MANY: u32 = 10_000;

/// Select-only in turns through both, then ten thousand clients at once, and what each of them weighs.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(5);
    heading(
        "pool: pgbench select-only in transaction mode against PgBouncer, 20 backends of the same Postgres behind either",
        &format!(
            "{rounds} rounds of {} s each, in turns, TCP on loopback, no TLS, scale 10. PgBouncer undoes nothing between two \
             clients, Ebb everything; the estimate is 0.8 where clients outnumber backends, and >= 1 where they do not",
            common.seconds
        ),
    );
    let node = Node::start(common)?;
    node.patch("/v1/projects/bench/branches/prod", &json!({ "pool_size": BACKENDS }))?;
    let socket = node.wake("prod")?;
    pgbench::initialise(common, &over_socket(&socket, "app"), common.scale.unwrap_or(10))?;
    pgbench::psql(common, &over_socket(&socket, "app"), "grant all on all tables in schema public to app")?;
    let ours = vec![format!("{}-pooler", node.conninfo("prod"))];
    let bouncer = Bouncer::start(&socket, &node.password)?;
    let theirs = bouncer.target(&node.password);
    for (mode, script) in [("simple", ["-S", "-M", "simple"]), ("extended", ["-S", "-M", "extended"])] {
        for clients in [1, 16, 200] {
            let mut tps: [Samples; 2] = Default::default();
            let mut latency: [Samples; 2] = Default::default();
            for _ in 0..rounds {
                for (side, target) in [&ours, &theirs].into_iter().enumerate() {
                    let round = pgbench::round(common, target, &script, clients)?;
                    tps[side].add(round.tps);
                    latency[side].add(round.latency_ms);
                }
            }
            report(&format!("{mode}, {clients} clients"), "tps", tps[0].median(), "pgbouncer", tps[1].median(), ">= 1");
            report("  mean latency", "ms", latency[0].median(), "pgbouncer", latency[1].median(), "<= 1");
        }
    }
    // The installed PgBouncer is too old for named statements in this mode.
    for clients in [16, 200] {
        let (mut pooled, mut unnamed) = (Samples::default(), Samples::default());
        for _ in 0..rounds {
            pooled.add(pgbench::round(common, &ours, &["-S"], clients)?.tps);
            unnamed.add(pgbench::round(common, &ours, &["-S", "-M", "extended"], clients)?.tps);
        }
        let what = format!("prepared, {clients} clients");
        report(&what, "tps", pooled.median(), "extended", unnamed.median(), ">= 1");
    }
    many(common, [(&ours, node.pid()), (&theirs, bouncer.process.id())])
}

/// All of them connected, and working as fast as the backends allow.
fn many(common: &Common, sides: [(&Vec<String>, u32); 2]) -> Result<()> {
    let mut found: [(f64, f64); 2] = Default::default();
    for ((target, pid), found) in sides.into_iter().zip(&mut found) {
        let before = private_memory_kib(pid)?;
        let mut seen = before;
        let script = format!("-c {MANY} -j 2 -n -S -M simple -T {}", common.seconds);
        let mut pgbench = Command::new(common.pg_bin.join("pgbench"))
            .args(script.split(' '))
            .args(target)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        while pgbench.try_wait()?.is_none() {
            seen = seen.max(private_memory_kib(pid)?);
            std::thread::sleep(Duration::from_millis(200));
        }
        let out = pgbench.wait_with_output()?;
        ensure!(out.status.success(), "pgbench: {}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout)?;
        let tps = text.lines().find_map(|line| line.strip_prefix("tps = ")).context("pgbench printed no result")?;
        *found = (tps.split_whitespace().next().unwrap_or_default().parse()?, (seen - before) / f64::from(MANY));
    }
    let [(tps, memory), (their_tps, their_memory)] = found;
    report(&format!("{MANY} clients on {BACKENDS} backends"), "tps", tps, "pgbouncer", their_tps, ">= 1");
    report("  memory per client, at most", "KiB", memory, "pgbouncer", their_memory, "<= 8 KiB");
    Ok(())
}

/// A PgBouncer in transaction mode in front of one socket directory.
struct Bouncer {
    process: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Bouncer {
    fn target(&self, password: &str) -> Vec<String> {
        vec![format!("host=127.0.0.1 port={} user=app password={password} dbname=app", self.port)]
    }

    fn start(socket_dir: &Path, password: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ebb-bouncer-").tempdir()?;
        let port = free_port()?;
        let file = |name: &str| -> PathBuf { dir.path().join(name) };
        std::fs::write(file("users"), format!("\"app\" \"{password}\"\n"))?;
        let socket_dir = socket_dir.display();
        let (users, log) = (file("users"), file("log"));
        std::fs::write(
            file("ini"),
            format!(
                "[databases]\napp = host={socket_dir} port=5432 user=app\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
                 listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
                 pool_mode = transaction\nmax_client_conn = {}\ndefault_pool_size = {BACKENDS}\nlisten_backlog = 4096\n\
                 logfile = {}\n",
                users.display(),
                MANY + 100,
                log.display(),
            ),
        )?;
        // The private socket directory is open to root and to the user of Postgres only.
        let owned = Command::new("chown").arg("-R").arg("postgres").arg(dir.path()).status()?;
        ensure!(owned.success(), "chown failed");
        let process = Command::new("setpriv")
            .args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "pgbouncer", "-q"])
            .arg(file("ini"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start pgbouncer: scripts/setup bench installs it")?;
        wait_for("pgbouncer", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok())?;
        Ok(Self { process, port, _dir: dir })
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
