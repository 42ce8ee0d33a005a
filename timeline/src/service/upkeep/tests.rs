//! What is done for branches by itself, over a machine in memory and with a clock that a test moves.

use std::time::Duration;

use bytes::Bytes;
use ebb_types::{ErrorKind, LayerId, TestClock};

use super::*;
use crate::drill::Probe;
use crate::event::Event;
use crate::service::fake::Rig;
use crate::upkeep::Schedule;

const HOUR: Duration = Duration::from_secs(3600);

struct Home {
    rig: Rig,
    clock: Arc<TestClock>,
    service: Arc<Service>,
}

fn caller() -> Caller {
    Caller { actor: "test".to_owned(), key: None }
}

impl Home {
    /// Project `shop`, at noon of a Wednesday.
    async fn new() -> Self {
        let rig = Rig::new().await;
        let clock = Arc::new(TestClock::default());
        clock.advance(HOUR * (24 * (7 * 2900 + 6) + 12));
        let service = rig.open_at(rig.bucket.clone(), Duration::ZERO, clock.clone()).await.unwrap();
        let request = api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
        service.create_project(&caller(), request).await.unwrap();
        Self { rig, clock, service }
    }

    /// As if the process were killed and started again.
    async fn restart(self) -> Self {
        let Self { rig, clock, service } = self;
        rig.kill(service).await;
        let service = rig.open_at(rig.bucket.clone(), Duration::ZERO, clock.clone()).await.unwrap();
        Self { rig, clock, service }
    }

    async fn set(&self, upkeep: api::ChangeUpkeep) {
        let request = api::ChangeBranch { upkeep: Some(upkeep), ..api::ChangeBranch::default() };
        self.service.change_branch(&caller(), "shop", "prod", request).await.unwrap();
    }

    async fn schedule(&self, text: &str) {
        let checkpoints = Some(text.parse::<Schedule>().unwrap());
        self.set(api::ChangeUpkeep { checkpoints, ..api::ChangeUpkeep::default() }).await;
    }

    async fn id(&self, branch: &str) -> BranchId {
        self.service.branch("shop", branch).await.unwrap().id
    }

    async fn write(&self, row: &str) {
        let id = self.id("prod").await;
        self.service.wake(id).await.unwrap();
        self.rig.node.write(id, row);
    }

    async fn suspend(&self, branch: &str) {
        self.service.suspend_compute(&caller(), "shop", branch).await.unwrap();
    }

    /// Lets time pass, and what is due be done.
    async fn pass(&self, time: Duration) {
        self.clock.advance(time);
        self.service.settle_heads().await;
        self.service.keep_up().await;
    }

    async fn checkpoints(&self) -> Vec<String> {
        let found = self.service.checkpoints("shop", "prod").await.unwrap();
        found.into_iter().map(|checkpoint| checkpoint.name.to_string()).collect()
    }

    async fn named(&self, name: &str) {
        let request = api::CreateCheckpoint { name: name.parse().unwrap() };
        self.service.create_checkpoint(&caller(), "shop", "prod", request).await.unwrap();
    }

    async fn drill(&self, point: Option<&str>, probes: &[&str]) -> Result<api::Drill> {
        let probes = probes.iter().map(|probe| probe.parse::<Probe>().unwrap()).collect();
        let request = api::DrillBranch { point: point.map(str::to_owned), probes };
        self.service.drill(&caller(), "shop", "prod", request).await.map(|answer| answer.value)
    }

    async fn drills(&self) -> Vec<(String, bool)> {
        let found = self.service.drills("shop", "prod").await.unwrap();
        found.into_iter().map(|drill| (drill.point, drill.passed)).collect()
    }

    /// What the ledger says became of drills.
    async fn receipts(&self, act: &str) -> Vec<String> {
        let entries = self.service.ledger_entries("shop").await.unwrap();
        entries
            .into_iter()
            .filter(|entry| entry.act == act)
            .map(|entry| format!("{} {}", entry.on, entry.result))
            .collect()
    }

    async fn damage(&self, layer: LayerId) -> Bytes {
        self.service.upload_pending().await.unwrap();
        let key = format!("layers/{layer}");
        let good = self.rig.bucket.get(&key).await.unwrap();
        self.rig.bucket.put(&key, Bytes::from_static(b"{")).await.unwrap();
        good
    }

    fn running_drills(&self) -> usize {
        self.rig.node.0.lock().drills.len()
    }

    fn starts(&self) -> u64 {
        self.rig.node.0.lock().starts
    }
}

#[tokio::test]
async fn a_schedule_makes_a_checkpoint_a_period_if_something_changed() {
    let home = Home::new().await;
    home.write("1").await;
    home.schedule("hourly=24").await;
    home.pass(Duration::ZERO).await;
    assert_eq!(home.checkpoints().await, ["auto-2025-08-06T12-00Z"]);
    home.pass(HOUR / 2).await;
    assert_eq!(home.checkpoints().await.len(), 1, "this hour has one");
    home.pass(HOUR).await;
    assert_eq!(home.checkpoints().await.len(), 1, "nothing was written");
    home.write("2").await;
    home.pass(Duration::from_secs(60)).await;
    assert_eq!(home.checkpoints().await, ["auto-2025-08-06T12-00Z", "auto-2025-08-06T13-31Z"]);
}

#[tokio::test]
async fn a_sleeping_branch_is_not_woken_and_has_one_checkpoint_of_what_it_fell_asleep_with() {
    let home = Home::new().await;
    home.schedule("hourly=3").await;
    home.pass(Duration::ZERO).await;
    home.write("1").await;
    home.suspend("prod").await;
    let starts = home.starts();
    for _ in 0..5 {
        home.pass(HOUR).await;
    }
    assert_eq!(home.checkpoints().await, ["auto-2025-08-06T12-00Z", "auto-2025-08-06T13-00Z"]);
    assert_eq!(home.starts(), starts, "nobody was woken");
}

#[tokio::test]
async fn after_a_time_in_which_nobody_looked_one_checkpoint_is_made_up_for() {
    let home = Home::new().await;
    home.schedule("hourly=24,daily=7").await;
    home.write("1").await;
    home.pass(Duration::ZERO).await;
    home.write("2").await;
    home.clock.advance(HOUR * 24 * 30);
    let home = home.restart().await;
    home.pass(Duration::ZERO).await;
    home.pass(Duration::ZERO).await;
    assert_eq!(home.checkpoints().await, ["auto-2025-08-06T12-00Z", "auto-2025-09-05T12-00Z"]);
}

#[tokio::test]
async fn what_the_schedule_does_not_keep_goes_and_what_people_made_stays() {
    let home = Home::new().await;
    home.schedule("hourly=2,daily=2").await;
    home.named("by-hand").await;
    for n in 0..30 {
        home.write(&n.to_string()).await;
        home.pass(HOUR).await;
    }
    // Of the days before yesterday's last nothing; of today the newest two hours.
    let expect = ["by-hand", "auto-2025-08-06T23-00Z", "auto-2025-08-07T17-00Z", "auto-2025-08-07T18-00Z"];
    assert_eq!(home.checkpoints().await, expect);
    let gone = home.receipts("delete checkpoint").await;
    assert!(
        gone[0].starts_with("prod@auto-2025-08-06T13-00Z (automatic checkpoint beyond hourly=2,daily=2)"),
        "{gone:?}"
    );

    // A schedule that is off makes nothing, and lets nothing go.
    home.schedule("off").await;
    home.write("more").await;
    home.pass(HOUR * 100).await;
    assert_eq!(home.checkpoints().await, expect);
}

#[tokio::test]
async fn a_dry_run_tells_what_the_schedule_would_let_go() {
    let home = Home::new().await;
    home.schedule("hourly=2").await;
    home.write("1").await;
    home.pass(Duration::ZERO).await;
    home.write("2").await;
    home.pass(HOUR).await;
    home.schedule("hourly=1").await;
    let told = home.service.collect(&caller(), true).await.unwrap().expired;
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].what, "shop/prod@auto-2025-08-06T12-00Z");
    assert_eq!(told[0].why, "automatic checkpoint beyond hourly=1");
    assert_eq!(home.checkpoints().await.len(), 2, "nothing was changed");
    assert_eq!(home.service.collect(&caller(), false).await.unwrap().expired, told);
    assert_eq!(home.checkpoints().await, ["auto-2025-08-06T13-00Z"]);
}

#[tokio::test]
async fn a_rescue_branch_goes_after_its_date_unless_somebody_was_in_it() {
    let home = Home::new().await;
    home.named("one").await;
    for row in ["1", "2"] {
        home.write(row).await;
        let to = api::RestoreBranch { to: "one".to_owned() };
        home.service.restore(&caller(), "shop", "prod", to).await.unwrap();
    }
    let looked_into = home.id("rescue-prod-2").await;
    home.service.wake(looked_into).await.unwrap();
    home.rig.node.write(looked_into, "3");
    home.suspend("rescue-prod-2").await;
    let branches = || async {
        let found = home.service.branches("shop").await.unwrap();
        found.into_iter().map(|branch| branch.name.to_string()).collect::<Vec<_>>()
    };
    home.pass(HOUR * (7 * 24 - 1)).await;
    assert_eq!(branches().await, ["prod", "dev", "rescue-prod-1", "rescue-prod-2"]);
    home.pass(HOUR).await;
    assert_eq!(branches().await, ["prod", "dev", "rescue-prod-2"]);
    let gone = home.receipts("delete branch").await;
    assert!(gone[0].starts_with("rescue-prod-1 (rescue branch, kept until 2025-08-13T12:00:00Z"), "{gone:?}");
}

#[tokio::test]
async fn a_drill_that_passes_counts_rows_and_the_next_one_compares_them() {
    let home = Home::new().await;
    home.write("1").await;
    home.named("one").await;
    assert!(home.drill(Some("one"), &["select 1=1"]).await.unwrap().passed);
    let shown = home.service.checkpoints("shop", "prod").await.unwrap();
    assert!(shown[0].last_drill.as_ref().is_some_and(|drill| drill.passed));
    let key = format!("layers/{}", shown[0].layer);
    // Somebody has put another layer under its name.
    let other: (Vec<LayerId>, Vec<String>) = (vec![shown[0].layer], vec!["1".to_owned(), "2".to_owned()]);
    home.rig.bucket.put(&key, serde_json::to_vec(&other).unwrap().into()).await.unwrap();
    let error = home.drill(Some("one"), &[]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(home.drills().await, [("one".to_owned(), true), ("one".to_owned(), false)]);
    assert_eq!(home.running_drills(), 0, "everything it used is gone");
}

#[tokio::test]
async fn a_drill_of_a_damaged_layer_fails_and_names_it() {
    let home = Home::new().await;
    home.write("1").await;
    home.named("one").await;
    let layer = home.service.checkpoints("shop", "prod").await.unwrap()[0].layer;
    let good = home.damage(layer).await;
    let error = home.drill(Some("one"), &[]).await.unwrap_err();
    assert!(
        error.chain().contains(&format!("the drill of shop/prod@one failed: storage failed: layer {layer}")),
        "{error}"
    );
    let receipts = home.receipts("drill").await;
    assert!(receipts.last().unwrap().starts_with("prod@one failed: storage failed: layer"), "{receipts:?}");
    home.rig.bucket.put(&format!("layers/{layer}"), good).await.unwrap();
    assert!(home.drill(Some("one"), &[]).await.unwrap().passed);
    assert_eq!(home.service.ledger_verdict("shop").await.unwrap().fault, None);
}

#[tokio::test]
async fn a_drill_reads_the_ledger_from_the_bucket_and_says_where_it_is_broken() {
    let home = Home::new().await;
    home.write("1").await;
    home.named("one").await;
    let ledgers = home.rig.bucket.list("projects/", None).await.unwrap();
    let key = &ledgers[1].key;
    let mut bytes = home.rig.bucket.get(key).await.unwrap().to_vec();
    bytes[40] ^= 1;
    home.rig.bucket.put(key, bytes.into()).await.unwrap();
    let error = home.drill(Some("one"), &[]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("is corrupt at entry 1"), "{error}");
}

#[tokio::test]
async fn a_probe_that_answers_something_else_fails_the_drill() {
    let home = Home::new().await;
    home.write("1").await;
    let probes = Some(vec!["select count(*) from t=1".parse().unwrap()]);
    home.set(api::ChangeUpkeep { probes, ..api::ChangeUpkeep::default() }).await;
    home.suspend("prod").await;
    assert!(home.drill(None, &[]).await.unwrap().passed);
    assert!(home.drill(None, &["select 2=2"]).await.is_err());
    home.write("2").await;
    home.suspend("prod").await;
    assert!(home.drill(None, &[]).await.is_err(), "the branch's own probe");
}

#[tokio::test]
async fn drills_are_made_by_schedule_first_of_the_newest_checkpoint_then_of_the_head() {
    let home = Home::new().await;
    home.write("1").await;
    home.named("one").await;
    home.suspend("prod").await;
    home.service.drill_due().await;
    assert_eq!(home.drills().await, [], "nobody has asked for any");
    let change = api::ChangeUpkeep { drill_every_seconds: Some(86_400.0), ..api::ChangeUpkeep::default() };
    home.set(change).await;
    let starts = home.starts();
    for _ in 0..3 {
        home.service.drill_due().await;
        home.clock.advance(HOUR * 13);
    }
    assert_eq!(home.drills().await, [("one".to_owned(), true), ("head".to_owned(), true)]);
    assert_eq!(home.starts(), starts, "nobody was woken");

    let layer = home.service.branch("shop", "prod").await.unwrap().head;
    let good = home.damage(layer).await;
    home.clock.advance(HOUR * 24);
    home.service.drill_due().await;
    home.service.drill_due().await;
    assert_eq!(home.drills().await.len(), 3, "a failure is not tried again at once");
    assert_eq!(home.drills().await[2], ("head".to_owned(), false));
    home.rig.bucket.put(&format!("layers/{layer}"), good).await.unwrap();
    home.clock.advance(HOUR);
    home.service.drill_due().await;
    assert_eq!(home.drills().await[3], ("head".to_owned(), true));
}

#[tokio::test]
async fn a_drill_that_is_cut_off_is_undone_and_leaves_nothing() {
    let home = Home::new().await;
    home.write("1").await;
    home.named("one").await;
    home.rig.node.0.lock().hang_drill = true;
    let service = home.service.clone();
    let request = api::DrillBranch { point: Some("one".to_owned()), probes: Vec::new() };
    let drilling = tokio::spawn(async move { service.drill(&caller(), "shop", "prod", request).await });
    while home.running_drills() == 0 {
        tokio::task::yield_now().await;
    }
    // As kill -9 would leave it: the drill goes on as far as anybody knows.
    let dead = home.rig.open_at(home.rig.bucket.clone(), Duration::ZERO, home.clock.clone()).await.unwrap();
    assert_eq!(home.running_drills(), 0, "the next start removes what it finds");
    let entries = dead.ledger_entries("shop").await.unwrap();
    assert!(entries.last().unwrap().result.starts_with("undone: it was interrupted"), "{:?}", entries.last());
    assert_eq!(dead.drills("shop", "prod").await.unwrap(), [], "nothing is said of the point");
    home.rig.node.0.lock().hang_drill = false;
    drilling.abort();
    home.rig.kill(dead).await;
}

#[tokio::test]
async fn a_drill_keeps_what_it_reads_although_its_checkpoint_goes() {
    let home = Home::new().await;
    home.write("1").await;
    home.named("one").await;
    let layer = home.service.checkpoints("shop", "prod").await.unwrap()[0].layer;
    let request = api::ChangeBranch { window_seconds: Some(0.0), ..api::ChangeBranch::default() };
    home.service.change_branch(&caller(), "shop", "prod", request).await.unwrap();
    home.rig.node.0.lock().hang_drill = true;
    let service = home.service.clone();
    let request = api::DrillBranch { point: Some("one".to_owned()), probes: Vec::new() };
    let drilling = tokio::spawn(async move { service.drill(&caller(), "shop", "prod", request).await });
    while home.running_drills() == 0 {
        tokio::task::yield_now().await;
    }
    home.service.delete_checkpoint(&caller(), "shop", "prod", "one").await.unwrap();
    home.write("2").await;
    home.suspend("prod").await;
    let why = home.service.why(&format!("layers/{layer}")).await.unwrap();
    assert!(why.kept_by.iter().any(|keeper| keeper.starts_with("drill under way in shop")), "{why:?}");
    drilling.abort();
}

#[tokio::test]
async fn a_drill_does_not_fill_the_disk_that_branches_need() {
    let home = Home::new().await;
    home.write("1").await;
    home.named("one").await;
    // Enough for work, not for a second database.
    home.rig.node.0.lock().free_bytes = 1500;
    let error = home.drill(Some("one"), &[]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("has 1500 bytes free, fewer than the 2000"), "{error}");
}

#[tokio::test]
async fn a_drill_under_way_ends_with_the_service() {
    let home = Home::new().await;
    home.write("1").await;
    home.rig.node.0.lock().hang_drill = true;
    let service = home.service.clone();
    let drilling =
        tokio::spawn(async move { service.drill(&caller(), "shop", "prod", api::DrillBranch::default()).await });
    while home.running_drills() == 0 {
        tokio::task::yield_now().await;
    }
    home.service.suspend_all(Duration::from_secs(5)).await;
    assert!(matches!(drilling.await.unwrap(), Err(Error::Stopping)));
    assert_eq!(home.running_drills(), 0);
}

#[test]
fn rules_are_part_of_what_a_ledger_keeps() {
    // What was stored before there were schedules is read as it was meant.
    let old = r#"{"event":"checkpoint_created","branch":"br_00000000000000000000000000000001","name":"x",
                  "layer":"ly_00000000000000000000000000000002"}"#;
    let Event::CheckpointCreated { automatic, .. } = serde_json::from_str(old).unwrap() else {
        panic!("another event")
    };
    assert!(!automatic);
}
