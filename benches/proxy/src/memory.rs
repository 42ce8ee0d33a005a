//! What does a connection weigh, how many are held, and what if they all come at once?

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ebb_measure::process::private_memory_kib;
use ebb_measure::stats::{Samples, heading};
use futures::future::try_join_all;
use tokio::task::JoinSet;

use crate::Common;
use crate::client::Client;
use crate::pooler::{Pooler, Target};
use crate::world::{Postgres, raise_descriptor_limit};

/// Sessions attached at once: a backend each.
const ATTACHED: usize = 500;
/// Connections of a storm.
const STORM: usize = 5_000;
/// LIMIT: one address has 28,000 ports to come from (`ip_local_port_range`).
const PER_ADDRESS: usize = 20_000;
/// Rounds of hashing at a login: the clients share the machine, and it is not their password that is measured.
const ITERATIONS: u32 = 1;

/// The proxy's memory at one moment.
#[derive(Debug, Clone, Copy)]
struct Weight {
    live: f64,
    resident: f64,
}

impl Weight {
    fn of(pooler: &mut Pooler) -> Result<Self> {
        Ok(Self { live: pooler.stats()?.live_bytes as f64, resident: private_memory_kib(pooler.pid())? * 1024.0 })
    }

    fn report(self, before: Self, what: &str, count: usize, limit: &str) {
        let per = |after: f64, before: f64| (after - before) / 1024.0 / count as f64;
        println!(
            "{what:<44} {:>8.2} KiB allocated {:>8.2} KiB resident, each of {count}   goal <= {limit} KiB",
            per(self.live, before.live),
            per(self.resident, before.resident)
        );
    }
}

/// Weighs connections in every state, then holds as many as asked for.
pub fn run(common: &Common) -> Result<()> {
    heading(
        "memory: what a connection weighs in the proxy, by its allocator and by its resident memory",
        &format!("{ATTACHED} attached at once; then {} held, each of which had a backend", common.held),
    );
    let postgres = Postgres::start(common, ATTACHED as u32 + 50)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for tls in [false, true] {
            let mut pooler = Pooler::ebb(common, &postgres, ITERATIONS)?;
            weigh(&postgres, &mut pooler, tls).await?;
        }
        let mut pooler = Pooler::ebb(common, &postgres, ITERATIONS)?;
        hold(common, &postgres, &mut pooler).await
    })
}

async fn weigh(postgres: &Postgres, pooler: &mut Pooler, tls: bool) -> Result<()> {
    let target = pooler.target(tls);
    let kind = if tls { "TLS" } else { "plain" };
    // What is made once is made before.
    drop(connect(&target, postgres, 100, 0).await?);
    settle(pooler, 0).await?;
    let empty = Weight::of(pooler)?;
    let mut clients = connect(&target, postgres, ATTACHED, 0).await?;
    Weight::of(pooler)?.report(empty, &format!("{kind}, idle after its start"), ATTACHED, "8");

    for client in &mut clients {
        client.query("select 1").await?;
    }
    let before = pooler.stats()?.allocations;
    let rounds = 20;
    for _ in 0..rounds {
        for client in &mut clients {
            client.query("select 1").await?;
        }
    }
    // One question is one message up and four down.
    let made = pooler.stats()?.allocations - before;
    println!(
        "{:<44} {:>8.4} allocations per message   goal 0 (plain)",
        format!("{kind}, short queries"),
        made as f64 / (5 * rounds * ATTACHED) as f64
    );
    for client in &mut clients {
        client.query("begin; select 1").await?;
    }
    Weight::of(pooler)?.report(empty, &format!("{kind}, active, in a transaction"), ATTACHED, "32");
    for client in &mut clients {
        client.query("commit").await?;
    }
    ensure!(pooler.tell("suspend")? == "ok");
    Weight::of(pooler)?.report(empty, &format!("{kind}, hibernated"), ATTACHED, "8");
    for client in &mut clients {
        client.query("select 1").await?;
    }
    Weight::of(pooler)?.report(empty, &format!("{kind}, idle again"), ATTACHED, "8");
    // None of them reads, and each goes on sending: both directions are full.
    let count = 100;
    for client in clients.iter_mut().take(count) {
        client.begin("select repeat('x', 10000000)").await?;
        let more = b"Q\0\0\0\x0dselect 2\0".repeat(100_000);
        let _ = tokio::time::timeout(Duration::from_millis(30), client.send_raw(&more)).await;
    }
    Weight::of(pooler)?.report(empty, &format!("{kind}, of which some are full both ways"), ATTACHED, "32");
    let idle = Weight::of(pooler)?;
    drop(clients.drain(..count));
    settle(pooler, ATTACHED - count).await?;
    idle.report(Weight::of(pooler)?, &format!("{kind}, full both ways"), count, "32");
    Ok(())
}

/// Waits until the proxy has noticed who left.
async fn settle(pooler: &mut Pooler, sessions: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while pooler.stats()?.sessions > sessions {
        ensure!(Instant::now() < deadline, "sessions do not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Connects so many, some at once, from addresses that have ports left.
async fn connect(target: &Target, postgres: &Postgres, count: usize, before: usize) -> Result<Vec<Client>> {
    const AT_ONCE: usize = 50;
    let mut clients = Vec::with_capacity(count);
    while clients.len() < count {
        let from = address(before + clients.len());
        let logins = (0..AT_ONCE.min(count - clients.len())).map(|_| async {
            let mut client = Client::log_in(target, Some(postgres), Some(from)).await?;
            client.until_ready().await?;
            anyhow::Ok(client)
        });
        clients.extend(try_join_all(logins).await?);
    }
    Ok(clients)
}

fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, 2 + (number / PER_ADDRESS) as u8)
}

async fn hold(common: &Common, postgres: &Postgres, pooler: &mut Pooler) -> Result<()> {
    let target = pooler.target(false);
    drop(connect(&target, postgres, 100, 0).await?);
    settle(pooler, 0).await?;
    let empty = Weight::of(pooler)?;
    let begun = Instant::now();
    // A descriptor for each, and those of a wave's backends.
    let allowed = usize::try_from(raise_descriptor_limit())?.saturating_sub(2 * ATTACHED);
    let count = common.held.min(allowed);
    if count < common.held {
        println!("  a process may not have descriptors for {} clients here: {count} are held", common.held);
    }
    let mut held = Vec::with_capacity(count);
    while held.len() < count {
        let wave = ATTACHED.min(count - held.len());
        held.extend(connect(&target, postgres, wave, held.len()).await?);
        let suspended = pooler.tell("suspend")?;
        ensure!(suspended == "ok", "{suspended}");
    }
    Weight::of(pooler)?.report(empty, "held, hibernated", held.len(), "8");
    println!("  all of them came within {:.0} s", begun.elapsed().as_secs_f64());
    ensure!(pooler.stats()?.sessions == count, "some sessions ended");
    // Each of some, from the first to the last, is as good as on its first day.
    let mut answered = Samples::default();
    let step = (held.len() / 300).max(1);
    for client in held.iter_mut().step_by(step) {
        let asked = Instant::now();
        client.query("select 1").await?;
        answered.add_time(asked.elapsed());
    }
    println!(
        "  a held client's next query: p50 {:.1} ms, p99 {:.1} ms (compute awake, state given back)",
        answered.median(),
        answered.percentile(99.0)
    );
    Ok(())
}

/// All at once, while the compute wakes.
pub fn storm(common: &Common) -> Result<()> {
    heading(
        "storm: connections that all come at once while the compute wakes; each logs in and waits for it",
        &format!("{STORM} connections, {} rounds", common.rounds),
    );
    let postgres = Postgres::start(common, 100)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for _ in 0..common.rounds {
        let mut pooler = Pooler::ebb(common, &postgres, ITERATIONS)?;
        pooler.tell("hold")?;
        let (refused, took) = runtime.block_on(all_at_once(pooler.target(false)));
        println!(
            "storm of {STORM}: {refused} refused   goal 0; logged in: p50 {:.0} ms, last {:.0} ms; the proxy took {:.2} s of \
             processor time",
            took.median(),
            took.max(),
            pooler.processor_time()?.as_secs_f64()
        );
        ensure!(refused == 0, "a client was refused");
    }
    Ok(())
}

async fn all_at_once(target: Target) -> (usize, Samples) {
    let begun = Instant::now();
    let mut logins = JoinSet::new();
    for _ in 0..STORM {
        let target = target.clone();
        logins.spawn(async move { (Client::log_in(&target, None, None).await, begun.elapsed()) });
    }
    let (mut clients, mut took, mut refused) = (Vec::new(), Samples::default(), 0);
    while let Some(ended) = logins.join_next().await {
        match ended {
            Ok((Ok(client), elapsed)) => {
                clients.push(client);
                took.add_time(elapsed);
            }
            _ => refused += 1,
        }
    }
    (refused, took)
}
