//! Does making a branch or a checkpoint depend on the size of the database, and does its source notice?

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use ebb_measure::stats::{Samples, heading, report};
use serde_json::json;
use tokio_postgres::NoTls;

use crate::Common;
use crate::node::Node;
use crate::pgbench::{self, over_socket};

/// Makes branches of a small and of a large database in turns, under a writer whose worst latency is noted.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(30);
    let scale = common.scale.unwrap_or(100);
    heading(
        "branch: POST branches and checkpoints on a running source, a large database against a small one",
        &format!(
            "{rounds} rounds in turns, pgbench scale {scale} (about {} MB) against 1; goal ratio <= 1.2, p50 <= 10 ms, stall <= 5 ms",
            scale * 15
        ),
    );
    let node = Node::start(common)?;
    for (branch, scale) in [("dev", 1), ("prod", scale)] {
        let socket = node.wake(branch)?;
        pgbench::initialise(common, &over_socket(&socket, "app"), scale)?;
    }
    let mut times: [[Samples; 2]; 2] = Default::default();
    let mut stalls = Samples::default();
    let mut calm = Samples::default();
    for round in 0..rounds {
        for (side, branch) in ["prod", "dev"].into_iter().enumerate() {
            let writer = Writer::start(&node.wake(branch)?);
            std::thread::sleep(Duration::from_millis(150));
            let begun = Instant::now();
            node.post(
                "/v1/projects/bench/branches",
                &json!({"name": format!("b{round}-{side}"), "from": format!("bench/{branch}")}),
            )?;
            times[side][0].add_time(begun.elapsed());
            std::thread::sleep(Duration::from_millis(50));
            let begun = Instant::now();
            node.post(
                &format!("/v1/projects/bench/branches/{branch}/checkpoints"),
                &json!({"name": format!("c{round}")}),
            )?;
            times[side][1].add_time(begun.elapsed());
            let during = writer.stop()?;
            let writer = Writer::start(&node.wake(branch)?);
            std::thread::sleep(Duration::from_millis(200));
            let before = writer.stop()?;
            if branch == "prod" {
                stalls.add(during.max());
                calm.add(before.max());
            }
        }
    }
    let [large, small] = times;
    report("branch, large against small database, p50", "ms", large[0].median(), "small", small[0].median(), "<= 1.2");
    report("branch, p99", "ms", large[0].percentile(99.0), "small", small[0].percentile(99.0), "-");
    report("checkpoint, large against small, p50", "ms", large[1].median(), "small", small[1].median(), "<= 1.2");
    report(
        "worst commit in a round while branching, p50",
        "ms",
        stalls.median(),
        "calm",
        calm.median(),
        "added <= 5 ms",
    );
    Ok(())
}

/// A client that commits one small update after another on a thread of its own.
struct Writer {
    stop: std::sync::Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<Samples>>,
}

impl Writer {
    fn start(socket_dir: &std::path::Path) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let conninfo = format!("host={} user=postgres dbname=app", socket_dir.display());
        let seen = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await?;
                let connection = tokio::spawn(connection);
                let update =
                    client.prepare("update pgbench_branches set bbalance = bbalance + 1 where bid = 1").await?;
                let mut times = Samples::default();
                while !seen.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    client.execute(&update, &[]).await?;
                    times.add_time(begun.elapsed());
                }
                drop(client);
                connection.await??;
                Ok(times)
            })
        });
        Writer { stop, thread }
    }

    fn stop(self) -> Result<Samples> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer thread does not panic")
    }
}
