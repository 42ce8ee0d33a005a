//! How fast do bulk data go through a pooler?

use std::time::{Duration, Instant};

use anyhow::Result;
use ebb_measure::stats::{Samples, heading, report};

use crate::Common;
use crate::client::Client;
use crate::pooler::{Pooler, Target};
use crate::world::Postgres;

/// Bytes of one row.
const ROW: usize = 1000;
/// Bytes of one `CopyData`.
const COPY_DATA: usize = 8192;
const RESULT_MB: usize = 10;
const COPY_MB: usize = 100;

#[derive(Debug, Clone, Copy)]
enum What {
    Result,
    CopyOut,
    CopyIn,
}

/// All rounds.
pub fn run(common: &Common) -> Result<()> {
    heading(
        "bulk: a result of 10 MB and COPY of 100 MB, out and in, through Ebb's proxy against PgBouncer",
        &format!("{} rounds in turns, one client that throws the data away, TCP on loopback", common.rounds),
    );
    let postgres = Postgres::start(common, 200)?;
    for (table, megabytes) in [("small", RESULT_MB), ("large", COPY_MB)] {
        let rows = megabytes * 1_000_000 / ROW;
        let sql = format!("create table {table} as select repeat('x', {ROW} - 10) t from generate_series(1, {rows})");
        postgres.sql("app", &sql)?;
        postgres.sql("app", &format!("alter table {table} owner to app"))?;
        postgres.sql("app", &format!("vacuum {table}"))?;
    }
    postgres.sql("app", "create unlogged table sink (t text); alter table sink owner to app")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for tls in [false, true] {
        for (name, what) in [("result of 10 MB", What::Result), ("COPY out", What::CopyOut), ("COPY in", What::CopyIn)]
        {
            let name = format!("{name}{}", if tls { " over TLS" } else { "" });
            if common.only.as_ref().is_some_and(|only| !name.contains(only)) {
                continue;
            }
            let mut rate: [Samples; 3] = Default::default();
            let mut processor: [Samples; 2] = Default::default();
            for _ in 0..common.rounds {
                let direct = runtime.block_on(round(&postgres, &Target::direct(&postgres), what))?;
                rate[2].add(direct.0 / direct.1.as_secs_f64());
                for side in [1, 0] {
                    let pooler =
                        if side == 0 { Pooler::ebb(common, &postgres, 4096)? } else { Pooler::bouncer(&postgres)? };
                    let before = pooler.processor_time()?;
                    let (megabytes, took) = runtime.block_on(round(&postgres, &pooler.target(tls), what))?;
                    rate[side].add(megabytes / took.as_secs_f64());
                    processor[side].add((pooler.processor_time()? - before).as_secs_f64() * 1e3 / megabytes);
                }
            }
            report(&name, "MB/s", rate[0].median(), "pgbouncer", rate[1].median(), ">= 1.1");
            report("  processor per MB", "ms", processor[0].median(), "pgbouncer", processor[1].median(), "-");
            println!("  direct: {:.0} MB/s", rate[2].median());
        }
    }
    Ok(())
}

/// Megabytes that went, and in what time.
async fn round(postgres: &Postgres, target: &Target, what: What) -> Result<(f64, Duration)> {
    let mut client = Client::connect(target, postgres).await?;
    let begun = Instant::now();
    let megabytes = match what {
        What::Result => {
            for _ in 0..5 {
                client.query("select t from small").await?;
            }
            5 * RESULT_MB
        }
        What::CopyOut => {
            client.query("copy large to stdout").await?;
            COPY_MB
        }
        What::CopyIn => {
            client.begin("copy sink from stdin").await?;
            client.until(b'G').await?;
            let mut data = vec![b'd'];
            data.extend_from_slice(&(COPY_DATA as u32 + 4).to_be_bytes());
            data.resize(5 + COPY_DATA, b'y');
            for at in (0..COPY_DATA).step_by(1024) {
                data[5 + at] = b'\n';
            }
            let batch = data.repeat(8);
            for _ in 0..COPY_MB * 1_000_000 / (COPY_DATA * 8) {
                client.send_raw(&batch).await?;
            }
            client.send(b'c', b"").await?;
            client.until_ready().await?;
            COPY_MB
        }
    };
    let took = begun.elapsed();
    client.query("truncate sink").await?;
    Ok((megabytes as f64, took))
}
