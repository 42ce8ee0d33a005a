//! What does a volume cost Postgres, against native ext4?

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ebb_measure::stats::{Samples, heading, report, report_speed};
use tokio_postgres::NoTls;

use crate::Common;
use crate::native::Native;
use crate::node::{Node, settings_of};
use crate::pgbench::{self, over_socket};

/// What is timed besides pgbench: a name, what is run before without counting, whether both page caches are dropped, and
/// the statement.
const STATEMENTS: [(&str, &str, bool, &str); 5] = [
    ("sequential scan, cached", "", false, "select sum(abalance) from pgbench_accounts"),
    ("sequential scan, page caches dropped", "", true, "select sum(abalance) from pgbench_accounts"),
    ("CREATE INDEX", "drop index if exists probe", false, "create index probe on pgbench_accounts (abalance, aid)"),
    (
        "CREATE INDEX, page caches dropped",
        "drop index if exists probe",
        true,
        "create index probe on pgbench_accounts (abalance, aid)",
    ),
    (
        "VACUUM of a tenth that was updated",
        "drop index if exists probe; update pgbench_accounts set abalance = abalance + 1 where aid % 10 = 3; checkpoint",
        false,
        "vacuum pgbench_accounts",
    ),
];

/// pgbench and statements over the private sockets of a compute and of a plain cluster with the same settings, in turns.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(5);
    let scale = common.scale.unwrap_or(50);
    heading(
        "volume: pgbench and bulk work on a volume against the same Postgres on the file system below",
        &format!("{rounds} rounds of {} s each, in turns, scale {scale}, prepared; goal >= 0.95", common.seconds),
    );
    let node = Node::start(common)?;
    let ebb_socket = node.wake("prod")?;
    let mut native = Native::create(common, settings_of(&common.pg_bin, &ebb_socket)?)?;
    native.start()?;
    let ebb = over_socket(&ebb_socket, "app");
    let plain = over_socket(native.socket_dir(), "postgres");
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    // The last fill of each side is the one that stays.
    for _ in 0..rounds.min(3) {
        for (target, times) in [(&ebb, &mut ours), (&plain, &mut theirs)] {
            let begun = Instant::now();
            pgbench::initialise(common, target, scale)?;
            times.add_time(begun.elapsed());
        }
    }
    report_speed("pgbench -i", ours.median(), "native", theirs.median(), ">= 0.95");
    for (name, script) in [("TPC-B", &["-b", "tpcb-like"][..]), ("select-only", &["-S"][..])] {
        for clients in [1, 8, 16] {
            let (mut ours, mut theirs) = (Samples::default(), Samples::default());
            for _ in 0..rounds {
                ours.add(pgbench::round(common, &ebb, script, clients)?.tps);
                theirs.add(pgbench::round(common, &plain, script, clients)?.tps);
            }
            report(&format!("{name}, {clients} clients"), "tps", ours.median(), "native", theirs.median(), ">= 0.95");
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ebb = format!("host={} user=postgres dbname=app", ebb_socket.display());
    let plain = format!("host={} user=postgres dbname=postgres", native.socket_dir().display());
    for (name, before, dropped, statement) in STATEMENTS {
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        // The first round of each side is not counted.
        for round in 0..=rounds {
            for (conninfo, times) in [(&ebb, &mut ours), (&plain, &mut theirs)] {
                let took = runtime.block_on(timed(conninfo, before, dropped, statement))?;
                if round > 0 {
                    times.add_time(took);
                }
            }
        }
        report_speed(name, ours.median(), "native", theirs.median(), ">= 0.95");
    }
    Ok(())
}

/// Runs one statement and answers how long it took.
async fn timed(conninfo: &str, before: &str, dropped: bool, statement: &str) -> Result<Duration> {
    let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await?;
    let connection = tokio::spawn(connection);
    for part in before.split(';').filter(|part| !part.is_empty()) {
        client.batch_execute(part).await.with_context(|| part.to_owned())?;
    }
    if dropped {
        drop_caches()?;
    }
    let begun = Instant::now();
    client.batch_execute(statement).await.with_context(|| statement.to_owned())?;
    let took = begun.elapsed();
    drop(client);
    connection.await??;
    Ok(took)
}

/// Empties the page cache of the machine, both sides' alike.
fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache (run as root)")
}
