//! What does a volume cost Postgres, against native ext4?

use anyhow::Result;

use crate::Common;
use crate::native::Native;
use crate::node::{Node, settings_of};
use crate::pgbench::{self, over_socket};
use crate::stats::{Samples, heading, report};

/// pgbench over the private sockets of a compute and of a plain cluster with the same settings, in turns.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(5);
    let scale = common.scale.unwrap_or(50);
    heading(
        "volume: pgbench on a volume against the same Postgres on the file system below",
        &format!("{rounds} rounds of {} s each, in turns, scale {scale}, prepared; goal >= 0.95", common.seconds),
    );
    let node = Node::start(common)?;
    let ebb_socket = node.wake("prod")?;
    let mut native = Native::create(common, settings_of(&common.pg_bin, &ebb_socket)?)?;
    native.start()?;
    let ebb = over_socket(&ebb_socket, "app");
    let plain = over_socket(native.socket_dir(), "postgres");
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for (target, times) in [(&ebb, &mut ours), (&plain, &mut theirs)] {
        let begun = std::time::Instant::now();
        pgbench::initialise(common, target, scale)?;
        times.add_time(begun.elapsed());
    }
    report("pgbench -i, plain against ebb", "ms", theirs.median(), "ebb", ours.median(), ">= 0.95");
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
    Ok(())
}
