//! The unit is killed at random moments, also in the middle of a seal.

use std::time::Duration;

use ebb_tests::Node;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::lab::{self, BRANCH, Load, Progress};

/// LIMIT: rounds between two looks at every page, of the branch and of one that was taken in between.
const SOUND_EVERY: u64 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_killed_at_random_moments_loses_nothing() {
    let (seed, rounds) = (lab::seed(), lab::rounds(50));
    let mut rng = StdRng::seed_from_u64(seed);
    let node = Node::with_shop();
    let mut load = Load::start(&node, 2, seed).await;
    let mut progress = Progress::new();
    let mut branches = Vec::new();
    for round in 1..=rounds {
        lab::some_time(&mut rng, Duration::from_millis(700)).await;
        branches.extend(crash(&node, &mut rng, round));
        load.recovered().await;
        let last = load.writer.last();
        lab::assert_all_there(&node, last);
        lab::assert_whole(&node, BRANCH);
        if round % SOUND_EVERY == 0 {
            if let Some(name) = branches.last() {
                lab::assert_whole(&node, name);
                lab::assert_sound(&node, name);
            }
            for name in branches.drain(..) {
                node.ok(&["branch", "delete", &name]);
            }
            let last = load.stop().await;
            lab::assert_all_there(&node, last);
            lab::assert_sound(&node, BRANCH);
            load = Load::resume(&node, seed + round, last).await;
        }
        progress.tell(round, last);
    }
    let last = load.stop().await;
    lab::assert_all_there(&node, last);
    lab::assert_whole(&node, BRANCH);
    lab::assert_sound(&node, BRANCH);
    lab::assert_checksums(&node);
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
    progress.end(rounds, last);
}

/// Kills the unit: at rest, in a checkpoint of Postgres, or while it is sealed for a branch. Answers the branch, if it was
/// made.
fn crash(node: &Node, rng: &mut StdRng, round: u64) -> Option<String> {
    let delay = Duration::from_micros(rng.random_range(0..60_000));
    let beside = |work: &(dyn Fn() -> bool + Sync)| {
        std::thread::scope(|scope| {
            let worked = scope.spawn(work);
            std::thread::sleep(delay);
            lab::kill_unit(node);
            worked.join().expect("a command that fails does not panic")
        })
    };
    let name = format!("shop/b{round}");
    match rng.random_range(0..4) {
        0 | 1 => {
            let made = beside(&|| node.ebb(&["branch", "create", &name, "--from", BRANCH]).code == 0);
            made.then_some(name)
        }
        2 => {
            beside(&|| node.superuser_tool(BRANCH, "psql", &["-XAtqd", "app", "-c", "checkpoint"]).code == 0);
            None
        }
        _ => {
            lab::kill_unit(node);
            None
        }
    }
}
