//! How long does a client wait for a branch on a node that has nothing local, from a bucket 20 ms away?
//!
//! The bucket is a real S3 server behind a line that holds up every byte for 10 ms each way; opening a connection costs a
//! round trip as well. Expected beforehand: a warm wake, and about six requests one after the other.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ebb_measure::stats::{Samples, heading, report};
use ebb_measure::wait_for;
use ebb_test_s3::{ACCESS_KEY, BUCKET, SECRET_KEY, Seaweed};
use serde_json::json;
use tokio_postgres::NoTls;

use crate::Common;
use crate::node::Node;
use crate::pgbench::{self, over_socket};

/// Half of the latency of a request.
const ONE_WAY: Duration = Duration::from_millis(10);

/// The row that every wake before had asked for, and one that none had.
const KNOWN: &str = "select abalance from pgbench_accounts where aid = 1";

/// Fills a bucket, then wakes on fresh nodes, each once without anything and once more with what it then has.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(10);
    let scale = common.scale.unwrap_or(100);
    heading(
        "cold: from connect to first row on a node that has nothing local, bucket 20 ms away, against a wake from local data",
        &format!("{rounds} nodes, pgbench scale {scale} (about {} MB); goal <= 400 ms for 10 GB", scale * 15),
    );
    let s3 = Seaweed::start();
    let password = fill(common, &s3, scale)?;
    let far = delayed(s3.port())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut cold, mut warm, mut other, mut bytes) =
        (Samples::default(), Samples::default(), Samples::default(), Samples::default());
    for round in 0..rounds {
        let mut node = Node::open(common, |command| {
            use_bucket(command, &format!("http://127.0.0.1:{far}"));
            command.args(["--hydrate=false"]);
        })?;
        node.password.clone_from(&password);
        // What the server fetches for new projects is of no interest here, and would help.
        let layers = node.data.join("layers");
        wait_for("the template", || whole_layers(&layers) > 0)?;
        fs::remove_dir_all(&layers)?;

        let row = KNOWN.to_owned();
        cold.add_time(runtime.block_on(first_row(&node.conninfo("prod"), &row))?);
        let status = node.get("/v1/projects/bench/branches/prod/compute")?;
        bytes.add(status["unit"]["fetched"]["bytes"].as_f64().context("no bytes in the status")? / 1e6);
        let row = format!("select abalance from pgbench_accounts where aid = {}", 50_001 + round * 997);
        other.add_time(runtime.block_on(first_row(&node.conninfo("prod"), &row))?);
        node.suspend("prod")?;
        warm.add_time(runtime.block_on(first_row(&node.conninfo("prod"), KNOWN))?);
    }
    report("cold wake to first row, p50", "ms", cold.median(), "warm", warm.median(), "<= 400 ms");
    report("cold wake to first row, max", "ms", cold.max(), "warm", warm.max(), "-");
    println!(
        "one more row, of pages nobody had read: p50 {:.1} ms; frames fetched for a first row: {:.2} MB",
        other.median(),
        bytes.median()
    );
    Ok(())
}

/// Makes the database, wakes it once more from what was uploaded, and answers its password.
fn fill(common: &Common, s3: &Seaweed, scale: u32) -> Result<String> {
    let mut node = Node::open(common, |command| use_bucket(command, &s3.endpoint()))?;
    let made = node.post("/v1/projects", &json!({"name": "bench"}))?;
    node.password = made["password"].as_str().context("no password in the answer")?.to_owned();
    pgbench::initialise(common, &over_socket(&node.wake("prod")?, "app"), scale)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // A superuser made it; a tenant asks.
    let grant = "grant select on all tables in schema public to app";
    let psql = Command::new(common.pg_bin.join("psql"))
        .args(["-Xq", "-U", "postgres", "-d", "app", "-c", grant, "-h"])
        .arg(node.wake("prod")?)
        .status()?;
    anyhow::ensure!(psql.success(), "psql could not grant");
    node.suspend("prod")?;
    runtime.block_on(first_row(&node.conninfo("prod"), KNOWN))?;
    thread::sleep(Duration::from_secs(1));
    node.suspend("prod")?;
    let layers = whole_layers(&node.data.join("layers"));
    wait_for("the uploads", || node.text("/metrics").is_ok_and(|text| uploads(&text) >= layers))?;
    Ok(node.password.clone())
}

fn use_bucket(command: &mut Command, endpoint: &str) {
    command
        .args(["--bucket", &format!("s3://{BUCKET}/cold"), "--s3-endpoint", endpoint, "--s3-path-style"])
        .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
}

fn whole_layers(layers: &Path) -> usize {
    let is_layer = |entry: &fs::DirEntry| {
        !entry.file_name().to_string_lossy().starts_with('.') && entry.path().join("manifest").exists()
    };
    fs::read_dir(layers).map_or(0, |entries| entries.flatten().filter(is_layer).count())
}

/// Uploads of layers that have succeeded.
fn uploads(metrics: &str) -> usize {
    let line = metrics.lines().find(|line| {
        line.starts_with("ebb_storage_bucket_requests_total") && line.contains("put_file") && line.contains("\"ok\"")
    });
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
}

/// Connects and reads one row; answers how long that took.
async fn first_row(conninfo: &str, row: &str) -> Result<Duration> {
    let begun = Instant::now();
    let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await?;
    let connection = tokio::spawn(connection);
    client.query_one(row, &[]).await?;
    let took = begun.elapsed();
    drop(client);
    connection.await??;
    Ok(took)
}

/// A port that leads to another one by a long line.
fn delayed(to: u16) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            thread::spawn(move || {
                // As long as it takes to agree on a connection.
                thread::sleep(2 * ONE_WAY);
                let Ok(far) = TcpStream::connect(("127.0.0.1", to)) else { return };
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                if let (Ok(near2), Ok(far2)) = (near.try_clone(), far.try_clone()) {
                    carry(near, far);
                    carry(far2, near2);
                }
            });
        }
    });
    Ok(port)
}

/// Carries bytes one way, each of them for as long.
fn carry(mut from: TcpStream, mut to: TcpStream) {
    let (sender, receiver): (Sender<(Instant, Vec<u8>)>, Receiver<_>) = channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if sender.send((Instant::now() + ONE_WAY, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
}
