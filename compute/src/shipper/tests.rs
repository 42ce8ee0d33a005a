//! The shipper on real Postgres, over buckets that work, fail, and are away. What counts is what recovery finds in the
//! archive on an image from before.

mod cluster;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use ebb_storage::archive::{Archive, Owner};
use ebb_storage::object_store::faulty::{Faults, Faulty};
use ebb_storage::object_store::{self, Bucket};
use ebb_storage::pg_files::read_image_info;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use self::cluster::{Cluster, DEADLINE};
use super::*;

const BRANCH: BranchId = BranchId::for_test(1);

struct Scratch {
    dir: TempDir,
    bucket: Bucket,
    archive: Archive,
}

impl Scratch {
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let bucket = object_store::open(dir.path().to_str().unwrap()).await.unwrap();
        let archive = Archive::new(bucket.clone(), BRANCH, 0);
        Self { dir, bucket, archive }
    }

    /// The bucket takes and tells nothing new from now on: its disk is not mounted, so to speak.
    fn take_away(&self) {
        for name in PARTS {
            fs::rename(self.dir.path().join(name), self.dir.path().join(name).with_extension("away")).unwrap();
        }
    }

    fn bring_back(&self) {
        for name in PARTS {
            fs::rename(self.dir.path().join(name).with_extension("away"), self.dir.path().join(name)).unwrap();
        }
    }
}

/// Without the first a directory is no bucket, without the second nothing can be put.
const PARTS: [&str; 2] = ["ebb-bucket", ".staging"];

fn ship(cluster: &Cluster, bucket: &Bucket) -> Shipper {
    let plan = Plan {
        bucket: Origin::Bucket(bucket.clone()),
        branch: BRANCH,
        line: 0,
        epoch: 0,
        socket_dir: cluster.run(),
        base_wal: cluster.base_wal.clone(),
        delay: Duration::ZERO,
    };
    Shipper::start(plan, cluster.durability)
}

async fn until(what: &str, shipper: &Shipper, condition: impl Fn(&Shipping) -> bool) {
    let begun = Instant::now();
    while !condition(&shipper.status()) {
        assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}: {:?}", shipper.status());
        sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until the bucket has everything that is committed.
async fn until_shipped(cluster: &Cluster, shipper: &Shipper) {
    let end = cluster.sql("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    until("the bucket to have it", shipper, |status| status.shipped >= Some(end)).await;
}

async fn stop(cluster: &mut Cluster, mut shipper: Shipper) -> End {
    shipper.drain();
    cluster.stop().await;
    timeout(DEADLINE, shipper.ended()).await.expect("it ends")
}

/// Whether Postgres has recovered, on the base, every row up to `rows` from the archive.
async fn check_recovered(base: &Cluster, archive: &Archive, rows: u32) -> Cluster {
    let mut recovered = base.copy();
    recovered.durability = Durability::Local;
    recovered.restore(archive, 1, None).await;
    let found = recovered.sql(&format!("SELECT count(*) FROM t WHERE n BETWEEN 1 AND {rows}")).await;
    assert_eq!(found, rows.to_string());
    recovered
}

/// A cluster that is running and has a table, and a copy from before.
async fn begin(durability: Durability) -> (Cluster, Cluster) {
    let mut cluster = Cluster::new(durability).await;
    let mut base = cluster.copy();
    base.base_wal = Some(base.data().join("pg_wal"));
    cluster.base_wal.clone_from(&base.base_wal);
    cluster.start().await;
    (base, cluster)
}

const MAKE_TABLE: &str = "SET synchronous_commit = local; CREATE TABLE t (n int PRIMARY KEY, pad text)";

/// Clients that insert rows, one commit each, no two the same number.
#[derive(Default)]
struct Clients {
    next: AtomicU32,
    acknowledged: Mutex<Vec<u32>>,
    end: AtomicBool,
}

impl Clients {
    async fn write(&self, cluster: &Cluster) {
        while !self.end.load(Relaxed) {
            let Ok(client) = cluster.connect().await else {
                sleep(Duration::from_millis(5)).await;
                continue;
            };
            loop {
                let n = self.next.fetch_add(1, Relaxed);
                if client.batch_execute(&format!("INSERT INTO t VALUES ({n}, repeat('x', 300))")).await.is_err() {
                    break;
                }
                self.acknowledged.lock().unwrap().push(n);
                if self.end.load(Relaxed) {
                    return;
                }
            }
        }
    }

    fn acknowledged(&self) -> Vec<u32> {
        let mut numbers = self.acknowledged.lock().unwrap().clone();
        numbers.sort_unstable();
        numbers
    }

    /// Runs so many until they have so many more commits acknowledged, then does something to them.
    async fn run(&self, cluster: &Cluster, clients: usize, commits: usize, then: impl FnOnce()) {
        self.end.store(false, Relaxed);
        let wanted = self.acknowledged().len() + commits;
        let stop = async {
            let begun = Instant::now();
            while self.acknowledged().len() < wanted {
                assert!(begun.elapsed() < DEADLINE, "no commits");
                sleep(Duration::from_millis(2)).await;
            }
            self.end.store(true, Relaxed);
            then();
        };
        tokio::join!(stop, futures_of((0..clients).map(|_| self.write(cluster))));
    }
}

/// Every number that the table has.
async fn rows(cluster: &Cluster) -> Vec<u32> {
    let found = cluster.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM t").await;
    found.split(',').map(|n| n.parse().unwrap()).collect()
}

async fn acknowledged_commits_survive_the_node(seed: u64) {
    let scratch = Scratch::new().await;
    let (base, mut cluster) = begin(Durability::Bucket).await;
    let faults = Faults {
        seed,
        latency: Duration::from_millis(8),
        refused: 0.05,
        answer_lost: 0.1,
        late: 0.1,
        torn: 0.05,
        behind: 0.3,
        repeated: 0.1,
        ..Faults::default()
    };
    let faulty = Arc::new(Faulty::new(scratch.bucket.clone(), faults));
    let bucket: Bucket = faulty.clone();
    let mut shipper = ship(&cluster, &bucket);
    cluster.sql(MAKE_TABLE).await;
    let clients = Clients::default();
    for round in 0..4_u64 {
        // The shipper dies with its unit, in the middle of whatever it does; and Postgres at about the same time.
        let kill = || {
            shipper.task.abort();
            cluster.signal(Signal::SIGQUIT);
        };
        clients.run(&cluster, 4, 20 + 7 * (seed + round) as usize % 30, kill).await;
        cluster.until_ended().await;
        cluster.start().await;
        shipper = ship(&cluster, &bucket);
    }
    // And then the node is lost without a word, just after the last acknowledgement.
    clients.run(&cluster, 3, 40, || ()).await;
    drop(shipper);
    drop(cluster);
    faulty.settle().await.unwrap();
    assert_eq!(scratch.archive.ranges().await.unwrap().len(), 1, "seed {seed}: there is a gap");
    let mut recovered = base.copy();
    recovered.durability = Durability::Local;
    recovered.restore(&scratch.archive, 1, None).await;
    let found = rows(&recovered).await;
    let lost: Vec<_> = clients.acknowledged().into_iter().filter(|n| !found.contains(n)).collect();
    assert!(lost.is_empty(), "seed {seed}: lost {lost:?} of {}", clients.acknowledged().len());
    assert!(faulty.made()["answer_lost"] > 0, "seed {seed}");
}

async fn futures_of(clients: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut clients: Vec<_> = clients.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        clients.retain_mut(|client| client.as_mut().poll(context).is_pending());
        if clients.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_acknowledged_at_durability_bucket_survives_the_node() {
    acknowledged_commits_survive_the_node(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn and_so_it_does_with_other_faults() {
    acknowledged_commits_survive_the_node(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_of_many_clients_share_a_put() {
    let scratch = Scratch::new().await;
    let (_base, mut cluster) = begin(Durability::Bucket).await;
    // Half of it on average, as from S3 in the same region.
    let slow = Faults { latency: Duration::from_millis(40), ..Faults::default() };
    let bucket: Bucket = Arc::new(Faulty::new(scratch.bucket.clone(), slow));
    let shipper = ship(&cluster, &bucket);
    cluster.sql(MAKE_TABLE).await;
    until_shipped(&cluster, &shipper).await;
    let before = shipper.status().spans;
    let clients = Clients::default();
    clients.run(&cluster, 16, 320, || ()).await;
    let (puts, commits) = (shipper.status().spans - before, clients.acknowledged().len() as u64);
    println!("{commits} commits in {puts} puts: {:?}", shipper.status());
    assert!(puts * 4 < commits, "{puts} puts for {commits} commits");
    assert!(matches!(stop(&mut cluster, shipper).await, End::Drained));
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_bucket_is_away_local_goes_on_and_says_so() {
    let scratch = Scratch::new().await;
    let (base, mut cluster) = begin(Durability::Local).await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql(MAKE_TABLE).await;
    until_shipped(&cluster, &shipper).await;
    assert_eq!(shipper.status().error, None);
    scratch.take_away();
    cluster.sql("INSERT INTO t SELECT n, repeat('x', 100) FROM generate_series(1, 90000) AS n").await;
    until("an honest status", &shipper, |status| {
        status.behind_bytes > Some(4 << 20) && status.behind_ms > 1000 && status.error.is_some()
    })
    .await;
    scratch.bring_back();
    until_shipped(&cluster, &shipper).await;
    until("a status without error", &shipper, |status| status.error.is_none() && status.behind_ms < 2000).await;
    assert!(matches!(stop(&mut cluster, shipper).await, End::Drained));
    assert_eq!(scratch.archive.ranges().await.unwrap().len(), 1);
    check_recovered(&base, &scratch.archive, 90_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_bucket_is_away_commits_at_durability_bucket_wait() {
    let scratch = Scratch::new().await;
    let (base, mut cluster) = begin(Durability::Bucket).await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql(MAKE_TABLE).await;
    cluster.sql("INSERT INTO t VALUES (1)").await;
    scratch.take_away();
    let client = cluster.connect().await.unwrap();
    let mut waiting = tokio::spawn(async move { client.batch_execute("INSERT INTO t VALUES (2)").await });
    until("the reason", &shipper, |status| status.error.is_some() && status.behind_bytes > Some(0)).await;
    assert!(timeout(Duration::from_millis(700), &mut waiting).await.is_err(), "it was acknowledged");
    // Whoever does not want to wait need not.
    cluster.sql("SET synchronous_commit = local; INSERT INTO t VALUES (3)").await;
    cluster.sql("SET synchronous_commit = off; INSERT INTO t VALUES (4)").await;
    assert!(timeout(Duration::from_millis(100), &mut waiting).await.is_err(), "it was acknowledged");
    scratch.bring_back();
    timeout(DEADLINE, waiting).await.expect("it is acknowledged").unwrap().unwrap();
    cluster.sql("SET synchronous_commit = remote_apply; INSERT INTO t VALUES (5)").await;
    assert!(matches!(stop(&mut cluster, shipper).await, End::Drained));
    check_recovered(&base, &scratch.archive, 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspend_ships_everything_and_does_not_wait_for_a_bucket_that_is_away() {
    let scratch = Scratch::new().await;
    let (base, mut cluster) = begin(Durability::Local).await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql(MAKE_TABLE).await;
    until("the stream", &shipper, |status| status.streaming).await;
    cluster.sql("INSERT INTO t SELECT generate_series(1, 100)").await;
    assert!(matches!(stop(&mut cluster, shipper).await, End::Drained));
    let clean = read_image_info(&cluster.data()).unwrap();
    assert!(clean.clean);
    let range = scratch.archive.ranges().await.unwrap().pop().unwrap();
    assert!(range.end > clean.redo, "the shutdown's own record is not there: {range:?}, {clean:?}");

    cluster.start().await;
    let shipper = ship(&cluster, &scratch.bucket);
    until("the stream", &shipper, |status| status.streaming).await;
    scratch.take_away();
    cluster.sql("INSERT INTO t SELECT generate_series(101, 200)").await;
    until("a failure", &shipper, |status| status.error.is_some()).await;
    let begun = Instant::now();
    assert!(matches!(stop(&mut cluster, shipper).await, End::GaveUp));
    assert!(begun.elapsed() < DRAIN_DEADLINE + Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(read_image_info(&cluster.data()).unwrap().clean);

    // One more wake without the bucket, shorter than it takes to notice.
    cluster.start().await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql("INSERT INTO t SELECT generate_series(201, 300); CHECKPOINT").await;
    assert!(matches!(stop(&mut cluster, shipper).await, End::GaveUp));

    scratch.bring_back();
    cluster.start().await;
    let shipper = ship(&cluster, &scratch.bucket);
    until_shipped(&cluster, &shipper).await;
    assert!(matches!(stop(&mut cluster, shipper).await, End::Drained));
    assert_eq!(scratch.archive.ranges().await.unwrap().len(), 1, "there is a gap");
    check_recovered(&base, &scratch.archive, 300).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_with_one_branch_one_goes_on() {
    let scratch = Scratch::new().await;
    let (base, mut first) = begin(Durability::Local).await;
    let shipper = ship(&first, &scratch.bucket);
    first.sql(MAKE_TABLE).await;
    until_shipped(&first, &shipper).await;
    assert!(matches!(stop(&mut first, shipper).await, End::Drained));
    let mut second = first.copy();
    first.start().await;
    let mut old = ship(&first, &scratch.bucket);
    until_shipped(&first, &old).await;
    second.start().await;
    let new = ship(&second, &scratch.bucket);
    until("the stream", &new, |status| status.streaming).await;
    first.sql("INSERT INTO t VALUES (2)").await;
    let End::Stop(why) = timeout(DEADLINE, old.ended()).await.expect("it notices") else { panic!("it goes on") };
    assert!(why.contains("another writer has taken over"), "{why}");
    // Whatever the first one's Postgres does before it is stopped.
    first.sql("INSERT INTO t VALUES (3)").await;
    second.sql("INSERT INTO t VALUES (4)").await;
    until_shipped(&second, &new).await;
    assert!(matches!(stop(&mut second, new).await, End::Drained));
    let recovered = check_recovered(&base, &scratch.archive, 0).await;
    assert_eq!(recovered.sql("SELECT string_agg(n::text, ' ') FROM t").await, "4");
    // A shipper of the first one finds out as well, and says so rather than to bury what the second one wrote.
    first.durability = Durability::Bucket;
    first.stop().await;
    first.start().await;
    let mut late = ship(&first, &scratch.bucket);
    let end = timeout(DEADLINE, late.ended()).await.expect("it notices");
    assert!(matches!(&end, End::Stop(why) if why.contains("lacks")), "{end:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_lacks_what_the_archive_has_is_noticed() {
    for durability in [Durability::Local, Durability::Bucket] {
        let scratch = Scratch::new().await;
        let (base, cluster) = begin(durability).await;
        let shipper = ship(&cluster, &scratch.bucket);
        cluster.sql(MAKE_TABLE).await;
        cluster.sql("INSERT INTO t SELECT generate_series(1, 10)").await;
        until_shipped(&cluster, &shipper).await;
        drop(shipper);
        drop(cluster);
        // The node is lost, and somebody starts the branch from its last layer, as it is.
        let mut older = base.copy();
        older.start().await;
        let mut shipper = ship(&older, &scratch.bucket);
        if durability == Durability::Bucket {
            let End::Stop(why) = timeout(DEADLINE, shipper.ended()).await.unwrap() else { panic!("it goes on") };
            assert!(why.contains("lacks"), "{why}");
            continue;
        }
        until("the gap", &shipper, |status| status.gaps == 1 && status.streaming).await;
        older.sql(MAKE_TABLE).await;
        // Beyond where the archive had ended.
        older.sql("INSERT INTO t SELECT n, repeat('y', 500) FROM generate_series(101, 2000) AS n").await;
        until_shipped(&older, &shipper).await;
        // Who compares after that finds the new history.
        assert!(matches!(stop(&mut older, shipper).await, End::Drained));
        older.start().await;
        let shipper = ship(&older, &scratch.bucket);
        until_shipped(&older, &shipper).await;
        assert_eq!(shipper.status().gaps, 0);
        assert!(matches!(stop(&mut older, shipper).await, End::Drained));
        let recovered = check_recovered(&base, &scratch.archive, 0).await;
        assert_eq!(recovered.sql("SELECT min(n) || ' ' || count(*) FROM t").await, "101 1900");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_history_of_the_same_length_is_told_apart() {
    let scratch = Scratch::new().await;
    let (base, cluster) = begin(Durability::Local).await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql(MAKE_TABLE).await;
    until_shipped(&cluster, &shipper).await;
    drop(shipper);
    drop(cluster);
    let mut older = base.copy();
    older.start().await;
    // It is beyond the archive before the shipper looks.
    older.sql(MAKE_TABLE).await;
    older.sql("INSERT INTO t SELECT n, repeat('y', 500) FROM generate_series(1, 3000) AS n").await;
    let shipper = ship(&older, &scratch.bucket);
    until_shipped(&older, &shipper).await;
    assert_eq!(shipper.status().gaps, 1);
    assert!(matches!(stop(&mut older, shipper).await, End::Drained));
    check_recovered(&base, &scratch.archive, 3000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_gave_up_is_a_gap() {
    let scratch = Scratch::new().await;
    let mut cluster = Cluster::new(Durability::Local).await;
    cluster.settings.extend([("max_slot_wal_keep_size", "16MB")].map(own));
    cluster.start().await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql(MAKE_TABLE).await;
    until_shipped(&cluster, &shipper).await;
    scratch.take_away();
    for round in 0..4 {
        let insert =
            format!("INSERT INTO t SELECT n, repeat('x', 500) FROM generate_series({round}0001, {round}9999) n");
        cluster.sql(&format!("{insert}; SELECT pg_switch_wal()")).await;
        cluster.sql("CHECKPOINT").await;
    }
    assert_eq!(cluster.sql("SELECT wal_status FROM pg_replication_slots").await, "lost");
    scratch.bring_back();
    until("the gap", &shipper, |status| status.gaps == 1 && status.streaming).await;
    let base_lsn: Lsn = cluster.sql("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    cluster.sql("INSERT INTO t VALUES (100000)").await;
    until_shipped(&cluster, &shipper).await;
    assert!(matches!(stop(&mut cluster, shipper).await, End::Drained));
    let ranges = scratch.archive.ranges().await.unwrap();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[0].end < ranges[1].start && ranges[1].start <= base_lsn, "{ranges:?}");
}

fn own((name, value): (&str, &str)) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_on_a_later_postgres_timeline_is_shipped_with_its_history() {
    let scratch = Scratch::new().await;
    let (base, cluster) = begin(Durability::Local).await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql(MAKE_TABLE).await;
    cluster.sql("INSERT INTO t SELECT generate_series(1, 50)").await;
    until_shipped(&cluster, &shipper).await;
    drop(shipper);
    drop(cluster);
    // The node is lost; another one recovers all there is, and goes on with the branch.
    let mut recovered = check_recovered(&base, &scratch.archive, 50).await;
    assert_eq!(recovered.sql("SELECT timeline_id FROM pg_control_checkpoint()").await, "2");
    let shipper = ship(&recovered, &scratch.bucket);
    recovered.sql("INSERT INTO t SELECT generate_series(51, 100)").await;
    until_shipped(&recovered, &shipper).await;
    assert_eq!(shipper.status().gaps, 0);
    recovered.crash().await;
    recovered.start().await;
    recovered.sql("INSERT INTO t SELECT generate_series(101, 150)").await;
    until_shipped(&recovered, &shipper).await;
    assert!(matches!(stop(&mut recovered, shipper).await, End::Drained));
    let ranges = scratch.archive.ranges().await.unwrap();
    assert_eq!(ranges.iter().map(|range| range.pg_timeline).collect::<Vec<_>>(), [1, 2]);
    let mut again = base.copy();
    again.restore(&scratch.archive, 2, None).await;
    assert_eq!(again.sql("SELECT count(*) FROM t").await, "150");
    assert_eq!(again.sql("SELECT timeline_id FROM pg_control_checkpoint()").await, "3");
    // The archive's own end is known to who asks: a claim finds it.
    let claim = scratch.archive.claim(Owner::new(0)).await.unwrap();
    assert_eq!(claim.tail().map(|tail| (tail.pg_timeline, tail.end)), Some((2, ranges[1].end)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_can_be_taken_to_any_position() {
    let scratch = Scratch::new().await;
    let (base, mut cluster) = begin(Durability::Local).await;
    let shipper = ship(&cluster, &scratch.bucket);
    cluster.sql(MAKE_TABLE).await;
    let mut positions = Vec::new();
    for n in 1..=3 {
        cluster.sql(&format!("INSERT INTO t VALUES ({n})")).await;
        positions.push(cluster.sql("SELECT pg_current_wal_flush_lsn()").await.parse::<Lsn>().unwrap());
    }
    until("the stream", &shipper, |status| status.streaming).await;
    assert!(matches!(stop(&mut cluster, shipper).await, End::Drained));
    for (number, lsn) in positions.into_iter().enumerate() {
        let mut past = base.copy();
        past.restore(&scratch.archive, 1, Some(lsn)).await;
        assert_eq!(past.sql("SELECT count(*) FROM t").await, (number + 1).to_string(), "at {lsn}");
    }
}
