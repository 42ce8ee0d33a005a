//! What does a pooler add to short transactions?
//!
//! pgbench through each in turns, and to Postgres itself over its socket; each transaction's latency is taken from
//! pgbench's own log. *Added* is a pooler's percentile less that of the direct way.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ebb_measure::stats::{Samples, heading, report};

use crate::Common;
use crate::pooler::{Pooler, Target};
use crate::world::Postgres;

/// pgbench scale factor.
const SCALE: u32 = 10;
/// Selects in one pipelined batch.
const BATCH: usize = 10;

struct Round {
    tps: f64,
    p50: f64,
    p99: f64,
}

/// All rounds.
pub fn run(common: &Common) -> Result<()> {
    heading(
        "speed: pgbench select-only through Ebb's proxy against PgBouncer (session mode), the same Postgres behind both",
        &format!(
            "{} rounds of {} s each, in turns, TCP on loopback, scale {SCALE}, {} processors for all",
            common.rounds,
            common.seconds,
            std::thread::available_parallelism()?
        ),
    );
    let postgres = Postgres::start(common, 200)?;
    pgbench(common, &["-q", "-i", "-s", &SCALE.to_string(), &postgres.conninfo()])?;
    let pipelined = postgres.dir().join("pipelined.sql");
    let select = "\\set aid random(1, 100000)\nSELECT abalance FROM pgbench_accounts WHERE aid = :aid;\n";
    fs::write(&pipelined, format!("\\startpipeline\n{}\\endpipeline\n", select.repeat(BATCH)))?;
    let pipelined = pipelined.to_string_lossy().into_owned();

    for tls in [false, true] {
        for (mode, script, clients) in [
            ("prepared", vec!["-S", "-M", "prepared"], &[1, 16, 64][..]),
            ("simple", vec!["-S", "-M", "simple"], &[1, 16, 64]),
            ("pipelined", vec!["-M", "prepared", "-f", &pipelined], &[1, 16]),
        ] {
            // What TLS costs does not depend on how a query is asked.
            if tls && mode != "prepared" {
                continue;
            }
            for &clients in clients {
                let name = format!("{mode}{}, {clients} clients", if tls { " over TLS" } else { "" });
                if common.only.as_ref().is_none_or(|only| name.contains(only)) {
                    compare(common, &postgres, &name, &script, clients, tls)?;
                }
            }
        }
    }
    Ok(())
}

fn compare(common: &Common, postgres: &Postgres, name: &str, script: &[&str], clients: u32, tls: bool) -> Result<()> {
    // Ebb, PgBouncer, Postgres itself.
    let (mut tps, mut p50, mut p99): ([Samples; 3], [Samples; 3], [Samples; 3]) = Default::default();
    let mut processor: [Samples; 2] = Default::default();
    for _ in 0..common.rounds {
        let direct = round(common, &Target::direct(postgres), script, clients)?;
        tps[2].add(direct.tps);
        p50[2].add(direct.p50);
        p99[2].add(direct.p99);
        for side in [1, 0] {
            let pooler = if side == 0 { Pooler::ebb(common, postgres, 4096)? } else { Pooler::bouncer(postgres)? };
            let before = pooler.processor_time()?;
            let done = round(common, &pooler.target(tls), script, clients)?;
            let took = pooler.processor_time()? - before;
            tps[side].add(done.tps);
            p50[side].add(done.p50);
            p99[side].add(done.p99);
            processor[side].add(took.as_secs_f64() * 1e6 / (done.tps * f64::from(common.seconds)));
        }
    }
    let of = |samples: &[Samples; 3], side: usize| samples[side].median();
    report(name, "tps", of(&tps, 0), "pgbouncer", of(&tps, 1), ">= 1.1");
    let added = |samples: &[Samples; 3], side| of(samples, side) - of(samples, 2);
    report("  added p50", "us", added(&p50, 0), "pgbouncer", added(&p50, 1), "<= 1");
    report("  added p99", "us", added(&p99, 0), "pgbouncer", added(&p99, 1), "<= 1");
    report("  processor per transaction", "us", processor[0].median(), "pgbouncer", processor[1].median(), "-");
    println!("  direct: {:.0} tps, p50 {:.0} us, p99 {:.0} us", of(&tps, 2), of(&p50, 2), of(&p99, 2));
    Ok(())
}

fn round(common: &Common, target: &Target, script: &[&str], clients: u32) -> Result<Round> {
    let dir = tempfile::Builder::new().prefix("ebb-pgbench-").tempdir()?;
    let prefix = format!("--log-prefix={}", dir.path().join("log").display());
    let (seconds, clients) = (common.seconds.to_string(), clients.to_string());
    let threads = if clients == "1" { "1" } else { "2" };
    let mut args = vec!["-n", "-T", &seconds, "-c", &clients, "-j", threads, "-l", &prefix];
    args.extend(script);
    args.push(&target.conninfo);
    let text = pgbench(common, &args)?;
    let line = text.lines().find(|line| line.starts_with("tps = ")).context("pgbench printed no result")?;
    let tps = line.split_whitespace().nth(2).context("pgbench printed no number")?.parse()?;
    let mut latency = Vec::new();
    for log in fs::read_dir(dir.path())? {
        let log = fs::read_to_string(log?.path())?;
        latency.extend(log.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u32>().ok()));
    }
    ensure!(!latency.is_empty(), "pgbench logged nothing");
    latency.sort_unstable();
    let percentile = |percent: usize| f64::from(latency[(latency.len() - 1) * percent / 100]);
    Ok(Round { tps, p50: percentile(50), p99: percentile(99) })
}

fn pgbench(common: &Common, args: &[&str]) -> Result<String> {
    let out = Command::new(common.pg_bin.join("pgbench")).args(args).output()?;
    ensure!(out.status.success(), "pgbench: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8(out.stdout)?)
}
