//! The unit is killed at random moments, also in the middle of a seal.

use std::time::Duration;

use ebb_tests::Node;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::lab::{self, BRANCH, Load, Run};

/// LIMIT: rounds between two looks at every page, of the branch and of one that was taken in between.
const SOUND_EVERY: u64 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_killed_at_random_moments_loses_nothing() {
    let (seed, rounds) = (lab::seed(), lab::rounds(50));
    let mut rng = StdRng::seed_from_u64(seed);
    let node = Node::with_shop();
    let mut run = Run::new(&node, seed, rounds);
    let mut load = Load::start(&node, seed).await;
    let mut branches = Vec::new();
    for round in 1..=rounds {
        run.round(round);
        run.step("work");
        lab::some_time(&mut rng, Duration::from_millis(700)).await;
        run.step("kill");
        let before = load.writer.last();
        branches.extend(crash(&node, &mut rng, round).map(|name| (name, before)));
        run.step("recovery");
        load.recovered().await;
        run.step("a look at the rows");
        let last = load.writer.last();
        lab::assert_whole(&node, BRANCH, last);
        if round % SOUND_EVERY == 0 {
            run.step("a look at a branch");
            if let Some((name, before)) = branches.last() {
                lab::assert_whole(&node, name, *before);
                lab::assert_branch_sound(&node, name);
            }
            for (name, _) in branches.drain(..) {
                node.ok(&["branch", "delete", &name]);
            }
            run.step("the end of the load");
            let last = load.stop().await;
            run.step("a look at every page");
            lab::assert_all_there(&node, last);
            lab::assert_sound(&node);
            lab::assert_disk_answered(&node);
            run.step("the beginning of the load");
            load = Load::resume(&node, seed + round, last).await;
        }
        run.tell(last);
    }
    run.step("the end of the load");
    let last = load.stop().await;
    run.step("the last look");
    lab::assert_whole(&node, BRANCH, last);
    lab::assert_sound(&node);
    lab::assert_disk_answered(&node);
    lab::assert_checksums(&node);
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
    // Whoever comes after a crash waits for the recovery, and is told of nothing else.
    assert_eq!(node.server_log().lines().find(|line| line.contains("a wake failed")), None);
    run.end(last);
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
