//! Histories: clients append to lists and move money on one branch of two nodes, at durability `bucket`, while processes
//! are killed and paused, nodes are lost with their disks, their clocks jump, the branch is suspended and handed over, and
//! the way to the bucket is bad, slow or cut. What clients saw must be one history, with every acknowledged write in it.
//! `docs/testing.md` tells how to run it for long.

mod checker;
mod clients;
mod cluster;

use std::sync::Arc;
use std::time::Instant;

use rand::SeedableRng as _;
use rand::rngs::StdRng;

use clients::{Accounts, Recorder};
use cluster::{Cluster, Store};

/// Faults in one run: `EBB_HISTORY_ROUNDS`.
const ROUNDS: usize = 24;

/// Lists that are appended to.
const LISTS: i64 = 5;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_nodes_clients_see_one_history_with_all_that_was_acknowledged() {
    history(async |_| Store::directory()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_nodes_and_their_bucket_clients_see_one_history_with_all_that_was_acknowledged() {
    history(Store::s3).await;
}

async fn history(store: impl AsyncFn(u64) -> Store) {
    let seed = number("EBB_SEED", rand::random());
    let rounds = number("EBB_HISTORY_ROUNDS", ROUNDS as u64);
    eprintln!("EBB_SEED={seed} EBB_HISTORY_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start(store(seed).await);
    cluster.prepare(LISTS, Accounts::COUNT);

    let recorder = Arc::new(Recorder::new(cluster.doors()));
    let clients: Vec<_> = (0..4).map(|n| tokio::spawn(recorder.clone().append(n, LISTS, seed))).collect();
    let accounts: Vec<_> = (0..2).map(|n| tokio::spawn(recorder.clone().transfer(n, seed))).collect();
    for round in 0..rounds {
        let begun = Instant::now();
        let acknowledged = recorder.acknowledged();
        let fault = cluster.fault(&mut rng);
        // Not a time, but the sight of clients that go on, ends a round.
        let go_on = recorder.progress(acknowledged + 20).await;
        assert!(go_on, "seed {seed}: clients are stuck after {fault}: {}", cluster.describe());
        eprintln!(
            "round {round}: {fault}; {:.1} s, {} acknowledged",
            begun.elapsed().as_secs_f64(),
            recorder.acknowledged()
        );
        cluster.heal(&mut rng);
    }
    recorder.stop();
    cluster.calm();
    for client in clients.into_iter().chain(accounts) {
        client.await.expect("a client ends");
    }

    let finals = cluster.finals();
    let (appends, reads) = recorder.take();
    assert!(reads.len() as u64 > rounds && appends.iter().filter(|append| append.acknowledged.is_some()).count() > 50);
    let faults = checker::check(&appends, &reads, &finals);
    assert!(faults.is_empty(), "seed {seed}:\n{}", faults.join("\n"));
    eprintln!("{} appends, {} reads, {} transfers: one history", appends.len(), reads.len(), recorder.transfers());
    eprintln!("mishaps of the bucket: {:?}", cluster.store.mishaps());
    cluster.judge();
}
