//! What does the proxy cost, against PgBouncer in session mode in front of the same backend?

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::Common;
use crate::node::{Node, free_port, wait_for};
use crate::pgbench::{self, over_socket};
use crate::stats::{Samples, heading, report};

/// Select-only, prepared, through both in turns.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(5);
    heading(
        "proxy: pgbench select-only through Ebb's proxy against PgBouncer (session mode), the same backend behind both",
        &format!(
            "{rounds} rounds of {} s each, in turns, TCP on loopback, no TLS, scale 10; goal throughput >= 1.1",
            common.seconds
        ),
    );
    let node = Node::start(common)?;
    let socket = node.wake("prod")?;
    pgbench::initialise(common, &over_socket(&socket, "app"), common.scale.unwrap_or(10))?;
    let grant = Command::new(common.pg_bin.join("psql"))
        .args(["-XqU", "postgres", "-d", "app", "-h"])
        .arg(&socket)
        .args(["-c", "grant all on all tables in schema public to app"])
        .status()?;
    anyhow::ensure!(grant.success(), "grant failed");
    let ours = vec![node.conninfo("prod")];
    for (mode, script) in [("prepared", &["-S"][..]), ("simple", &["-S", "-M", "simple"][..])] {
        for clients in [1, 16, 64] {
            let mut tps: [Samples; 2] = Default::default();
            let mut latency: [Samples; 2] = Default::default();
            for _ in 0..rounds {
                // Only for its own round: it keeps the connections of its clients after they have gone.
                let bouncer = PgBouncer::start(&socket, &node.password)?;
                let rounds = [pgbench::round(common, &bouncer.target(&node.password), script, clients)?, {
                    drop(bouncer);
                    pgbench::round(common, &ours, script, clients)?
                }];
                for (side, round) in rounds.into_iter().rev().enumerate() {
                    tps[side].add(round.tps);
                    latency[side].add(round.latency_ms);
                }
            }
            let name = format!("select-only {mode}, {clients} clients");
            report(&name, "tps", tps[0].median(), "pgbouncer", tps[1].median(), ">= 1.1");
            report("  mean latency", "ms", latency[0].median(), "pgbouncer", latency[1].median(), "<= 1");
        }
    }
    Ok(())
}

/// A PgBouncer in front of one socket directory.
struct PgBouncer {
    process: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl PgBouncer {
    fn target(&self, password: &str) -> Vec<String> {
        vec![format!("host=127.0.0.1 port={} user=app password={password} dbname=app", self.port)]
    }

    fn start(socket_dir: &std::path::Path, password: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ebb-bouncer-").tempdir()?;
        let port = free_port()?;
        let file = |name: &str| -> PathBuf { dir.path().join(name) };
        std::fs::write(file("users"), format!("\"app\" \"{password}\"\n"))?;
        std::fs::write(
            file("ini"),
            format!(
                "[databases]\napp = host={} port=5432 user=app\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
                 unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = session\nmax_client_conn = 500\n\
                 default_pool_size = 100\nlogfile = {}\n",
                socket_dir.display(),
                file("users").display(),
                file("log").display(),
            ),
        )?;
        // The private socket directory is open to root and to the user of Postgres only.
        anyhow::ensure!(
            Command::new("chown").arg("-R").arg("postgres").arg(dir.path()).status()?.success(),
            "chown failed"
        );
        let process = Command::new("setpriv")
            .args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "pgbouncer", "-q"])
            .arg(file("ini"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start pgbouncer: scripts/setup bench installs it")?;
        wait_for("pgbouncer", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok())?;
        Ok(PgBouncer { process, port, _dir: dir })
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
