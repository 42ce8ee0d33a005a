//! The machine's power is cut: the whole node, its bucket too, lies on a disk that loses what was not synced.

use std::time::Duration;

use ebb_test_disk::Disk;
use ebb_tests::{Node, wait_for};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::lab::{self, BRANCH, Load, Run};

/// A node on a disk of its own. Fields are dropped in this order.
pub struct Machine {
    pub node: Node,
    pub disk: Disk,
    _at: tempfile::TempDir,
}

impl Machine {
    /// With project `shop`.
    pub fn new(seed: u64) -> Self {
        let at = tempfile::TempDir::with_prefix("ebb-lab-").expect("a temporary directory can be made");
        std::fs::set_permissions(at.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("it is ours");
        let disk = Disk::mount(at.path(), seed).expect("root can mount");
        // A disk in memory has less room than Ebb would like to keep free.
        let mut node = Node::prepare().data_dir(&disk.path().join("node")).env("EBB_MIN_FREE_BYTES", "0");
        node.serve();
        node.ok(&["project", "create", "shop"]);
        // The template was brought to the disk with syncfs, of which the kernel does not tell a FUSE file system.
        disk.sync_all();
        Self { node, disk, _at: at }
    }

    /// Nothing reaches the disk any more; then everything on the machine dies, the disk loses what it had not, and the
    /// machine starts again.
    pub fn cut_power(&mut self) {
        let units: Vec<u32> = self.node.processes().into_iter().map(|(pid, _)| pid).collect();
        self.disk.stop();
        self.node.kill_server();
        units.into_iter().for_each(|pid| self.node.kill_9(pid));
        wait_for("the machine to be down", || self.node.processes().is_empty());
        println!("{}", self.disk.cut_power());
        self.node.serve();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_power_cut_at_random_moments_loses_nothing() {
    let (seed, rounds) = (lab::seed(), lab::rounds(50).div_ceil(10));
    let mut rng = StdRng::seed_from_u64(seed);
    let mut machine = Machine::new(seed);
    let mut run = Run::new(&machine.node, seed, rounds);
    let mut load = Load::start(&machine.node, seed).await;
    for round in 1..=rounds {
        run.round(round);
        run.step("work");
        lab::some_time(&mut rng, Duration::from_millis(1500)).await;
        run.step("a branch");
        let (name, before) = (format!("shop/b{round}"), load.writer.last());
        let branch = ["branch", "create", &name, "--from", BRANCH];
        let made = match rng.random_range(0..3) {
            // Acknowledged before the cut, or cut off in the middle.
            0 => machine.node.ebb(&branch).code == 0,
            1 => std::thread::scope(|scope| {
                let made = scope.spawn(|| machine.node.ebb(&branch).code == 0);
                std::thread::sleep(Duration::from_micros(rng.random_range(0..60_000)));
                machine.disk.stop();
                made.join().expect("a command that fails does not panic")
            }),
            _ => false,
        };
        let last = load.writer.last();
        run.step("power cut");
        machine.cut_power();
        run.step("recovery");
        load.recovered().await;
        run.step("a look at the rows");
        let node = &machine.node;
        lab::assert_whole(node, BRANCH, last);
        assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
        if made {
            run.step("a look at the branch");
            lab::assert_whole(node, &name, before);
            lab::assert_branch_sound(node, &name);
            node.ok(&["branch", "delete", &name]);
        }
        run.tell(last);
    }
    run.step("the last look");
    let last = load.stop().await;
    lab::assert_all_there(&machine.node, last);
    lab::assert_sound(&machine.node);
    lab::assert_checksums(&machine.node);
    run.end(last);
}
