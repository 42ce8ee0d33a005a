//! How long does a client wait for a suspended branch, against what Postgres itself needs to start?

use std::time::{Duration, Instant};

use anyhow::Result;
use ebb_measure::stats::{Samples, heading, report};
use tokio_postgres::NoTls;

use crate::Common;
use crate::native::Native;
use crate::node::{Node, settings_of};

/// Suspends and connects, in turns with a bare start.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(40);
    heading(
        "wake: from connect to first row on a suspended branch, against a bare `postgres` start on a plain directory",
        &format!(
            "{rounds} rounds each, in turns; Ebb's side includes TCP, SCRAM and the proxy; goal p50 <= 1.3, p99 <= 2"
        ),
    );
    let node = Node::start(common)?;
    let settings = settings_of(&common.pg_bin, &node.wake("prod")?)?;
    let mut native = Native::create(common, settings)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let bare = format!("host={} user=postgres dbname=postgres", native.socket_dir().display());
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    // The first start of each side warms the page cache and is not counted.
    for round in 0..=rounds {
        node.suspend("prod")?;
        let begun = Instant::now();
        runtime.block_on(first_row(&node.conninfo("prod")))?;
        let ebb = begun.elapsed();

        let begun = Instant::now();
        native.spawn()?;
        runtime.block_on(first_row(&bare))?;
        let plain = begun.elapsed();
        native.stop()?;
        if round > 0 {
            ours.add_time(ebb);
            theirs.add_time(plain);
        }
    }
    report("wake to first row, p50", "ms", ours.median(), "postgres", theirs.median(), "<= 1.3");
    report("wake to first row, p99", "ms", ours.percentile(99.0), "postgres", theirs.percentile(99.0), "<= 2");
    Ok(())
}

/// Connects, trying again every half millisecond until somebody answers, and reads one row.
pub async fn first_row(conninfo: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let (client, connection) = loop {
        match tokio_postgres::connect(conninfo, NoTls).await {
            Ok(connected) => break connected,
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_micros(500)).await,
        }
    };
    let connection = tokio::spawn(connection);
    client.query_one("select count(*) from pg_class", &[]).await?;
    drop(client);
    connection.await??;
    Ok(())
}
