//! Visits over a machine in memory.

use std::sync::Arc;
use std::time::Duration;

use ebb_types::{BranchId, ErrorKind, Hint as _, SqlState, TestClock};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::clients::Activity;
use crate::node::Visiting as _;
use crate::service::Caller;
use crate::service::fake::Rig;

fn caller() -> Caller {
    Caller { actor: "test".to_owned(), key: None }
}

/// A project whose `prod` has a row before checkpoint `v1` and one behind it, and sleeps.
async fn shop(rig: &Rig) -> (Arc<Service>, BranchId) {
    let service = rig.open().await;
    let request = api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
    service.create_project(&caller(), request).await.unwrap();
    let prod = service.branch("shop", "prod").await.unwrap().id;
    service.wake(prod).await.unwrap();
    rig.node.write(prod, "before");
    let request = api::CreateCheckpoint { name: "v1".parse().unwrap() };
    service.create_checkpoint(&caller(), "shop", "prod", request).await.unwrap();
    rig.node.write(prod, "behind");
    service.suspend_compute(&caller(), "shop", "prod").await.unwrap();
    (service, prod)
}

fn point(text: &str) -> Point {
    text.parse().unwrap()
}

async fn rows(rig: &Rig, service: &Arc<Service>, visit: BranchId) -> Vec<String> {
    service.wake(visit).await.unwrap();
    rig.node.rows(visit).into_iter().collect()
}

/// Looks at visits, and removes what is over, as the service does while it runs.
async fn look(service: &Arc<Service>) {
    service.look_at_visits();
    service.sweep_visits().await.unwrap();
}

/// As if nobody had asked for a visit for this long.
fn desert(service: &Service, visit: BranchId, time: Duration) {
    let visit = service.named_visit(visit).unwrap();
    let asked_at = &mut visit.state.lock().asked_at;
    *asked_at = asked_at.checked_sub(time).unwrap();
}

#[tokio::test]
async fn moments_are_read_while_their_branch_sleeps_on() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let visit = service.visit(prod, &point("v1")).unwrap();
    assert!(!rig.node.is_running(visit), "a name makes nothing");
    assert_eq!(rows(&rig, &service, visit).await, ["before"]);
    let position = service.visit(prod, &point("0/C8")).unwrap();
    assert_eq!(rows(&rig, &service, position).await, ["before", "behind"]);
    assert_ne!(visit, position);
    assert!(!rig.node.is_running(prod) && service.compute("shop", "prod").await.unwrap().wakes == 1);

    let names: Vec<_> = service.branches("shop").await.unwrap().into_iter().map(|branch| branch.name).collect();
    assert_eq!(names, ["prod".parse().unwrap(), "dev".parse().unwrap()], "it is no branch");
    let shown = service.compute("shop", "prod").await.unwrap().visits;
    assert_eq!(shown.iter().map(|visit| visit.point.as_str()).collect::<Vec<_>>(), ["v1", "0/C8"]);
    assert!(service.ledger_entries("shop").await.unwrap().iter().all(|entry| entry.act != "visit"), "nor an act");
}

#[tokio::test]
async fn a_crowd_makes_one() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let before = rig.node.0.lock().starts;
    let crowd = (0..50).map(|_| {
        let service = service.clone();
        tokio::spawn(async move {
            let visit = service.visit(prod, &point("v1")).unwrap();
            service.wake(visit).await.unwrap()
        })
    });
    let units: Vec<_> = futures::future::join_all(crowd).await.into_iter().map(|unit| unit.unwrap()).collect();
    assert!(units.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(rig.node.0.lock().starts, before + 1);
    assert_eq!(units[0].admits.as_ref().unwrap().iter().collect::<Vec<_>>(), ["app"]);
}

#[tokio::test]
async fn what_cannot_be_visited_is_refused_with_advice() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let refused = |text: &str| {
        let error = service.visit(prod, &point(text)).unwrap_err();
        (error.sql_state(), error.hint().unwrap_or_default())
    };
    assert_eq!(refused("v2"), (SqlState::INVALID_CATALOG_NAME, "Did you mean v1?".to_owned()));
    for moment in ["2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z", "0/1"] {
        let (code, hint) = refused(moment);
        assert_eq!(code, SqlState::INVALID_PARAMETER_VALUE);
        assert!(hint.contains("any moment from"), "{hint}");
    }
    assert!(rig.node.visits().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_visit_vanishes_when_nobody_is_there_for_a_while() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let visit = service.visit(prod, &point("0/C8")).unwrap();
    service.wake(visit).await.unwrap();
    *rig.clients.activity.lock().unwrap() = Activity { idle_for: Some(KEEP), busy: 0, sessions: 1 };
    desert(&service, visit, KEEP);
    look(&service).await;
    assert!(rig.node.is_running(visit), "somebody is connected");

    *rig.clients.activity.lock().unwrap() = Activity { idle_for: Some(KEEP / 2), busy: 0, sessions: 0 };
    look(&service).await;
    assert!(rig.node.is_running(visit), "somebody has just left");

    *rig.clients.activity.lock().unwrap() = Activity { idle_for: Some(KEEP), busy: 0, sessions: 0 };
    let layers = rig.node.0.lock().layers.len();
    look(&service).await;
    assert!(rig.node.visits().await.unwrap().is_empty() && !rig.node.is_running(visit));
    assert_eq!(rig.node.0.lock().layers.len(), layers - 1, "the layer made for it is gone, too");
    assert_eq!(*rig.clients.forgotten.lock().unwrap(), [visit]);
    assert_eq!(service.wake(visit).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_branch_that_sleeps_sooner_keeps_its_visits_for_less() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let request = api::ChangeBranch { idle_suspend_seconds: Some(5.0), ..api::ChangeBranch::default() };
    service.change_branch(&caller(), "shop", "prod", request).await.unwrap();
    let visit = service.visit(prod, &point("v1")).unwrap();
    service.wake(visit).await.unwrap();
    desert(&service, visit, Duration::from_secs(4));
    look(&service).await;
    assert!(rig.node.is_running(visit));
    desert(&service, visit, Duration::from_secs(1));
    look(&service).await;
    assert!(!rig.node.is_running(visit));
}

#[tokio::test]
async fn there_are_only_so_many_and_the_idlest_makes_room() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let position = |n: usize| Point::Lsn(ebb_types::Lsn(200 + n as u64));
    let visits: Vec<_> = (0..VISITS_MAX).map(|n| service.visit(prod, &position(n)).unwrap()).collect();
    let error = service.visit(prod, &position(VISITS_MAX)).unwrap_err();
    assert_eq!(error.sql_state(), SqlState::TOO_MANY_CONNECTIONS);
    assert_eq!(service.visit(prod, &position(3)).unwrap(), visits[3], "one that is there is not one more");

    service.wake(visits[5]).await.unwrap();
    desert(&service, visits[5], Duration::from_secs(2));
    service.visit(prod, &position(VISITS_MAX)).unwrap();
    look(&service).await;
    assert!(!rig.node.is_running(visits[5]) && service.named_visit(visits[5]).is_none());
}

#[tokio::test]
async fn a_unit_that_is_lost_is_opened_anew() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let visit = service.visit(prod, &point("v1")).unwrap();
    let first = service.wake(visit).await.unwrap();
    rig.node.kill(visit);
    while rig.clients.lost.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(*rig.clients.lost.lock().unwrap(), [(visit, first.generation)]);
    assert_eq!(rows(&rig, &service, visit).await, ["before"]);
}

#[tokio::test]
async fn one_that_fails_can_be_tried_again() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    rig.node.0.lock().fail_start = true;
    let visit = service.visit(prod, &point("v1")).unwrap();
    service.wake(visit).await.unwrap_err();
    assert_eq!(rows(&rig, &service, visit).await, ["before"]);
}

#[tokio::test]
async fn a_deleted_branch_takes_its_visits_along() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let request = api::CreateBranch { name: "other".parse().unwrap(), from: Some("shop/prod@v1".parse().unwrap()) };
    service.create_branch(&caller(), "shop", request).await.unwrap();
    let other = service.branch("shop", "other").await.unwrap().id;
    let request = api::CreateCheckpoint { name: "here".parse().unwrap() };
    service.create_checkpoint(&caller(), "shop", "other", request).await.unwrap();
    let (of_other, of_prod) =
        (service.visit(other, &point("here")).unwrap(), service.visit(prod, &point("v1")).unwrap());
    service.wake(of_other).await.unwrap();
    service.wake(of_prod).await.unwrap();
    service.delete_branch(&caller(), "shop", "other").await.unwrap();
    look(&service).await;
    assert!(!rig.node.is_running(of_other) && rig.node.is_running(of_prod));
}

#[tokio::test]
async fn what_a_visit_stands_on_is_kept_while_it_is_open() {
    let (rig, clock) = (Rig::new().await, Arc::new(TestClock::default()));
    clock.advance(Duration::from_millis(Timestamp::now().as_millisecond().unsigned_abs()));
    let service = rig.open_at(rig.bucket.clone(), Duration::from_secs(60), clock.clone()).await.unwrap();
    let request = api::CreateProject { name: "shop".parse().unwrap(), current: None, pg_major: None };
    service.create_project(&caller(), request).await.unwrap();
    let request = api::CreateBranch { name: "other".parse().unwrap(), from: None };
    service.create_branch(&caller(), "shop", request).await.unwrap();
    let other = service.branch("shop", "other").await.unwrap().id;
    service.wake(other).await.unwrap();
    rig.node.write(other, "row");
    let request = api::CreateCheckpoint { name: "here".parse().unwrap() };
    let layer = service.create_checkpoint(&caller(), "shop", "other", request).await.unwrap().value.layer;
    service.upload_pending().await.unwrap();
    let visit = service.visit(other, &point("here")).unwrap();
    service.wake(visit).await.unwrap();
    clock.advance(Duration::from_secs(7200));

    // Nothing but the visit keeps it now.
    service.delete_branch(&caller(), "shop", "other").await.unwrap();
    let collected = service.collect(&caller(), false).await.unwrap();
    assert_eq!((collected.marked.len(), collected.local_layers), (0, 0));
    let why = service.why(&layer.to_string()).await.unwrap();
    assert_eq!(why.kept_by, [format!("visit of shop/{other}@here")]);
    assert_eq!(rig.node.rows(visit).len(), 1);

    look(&service).await;
    assert_eq!(service.collect(&caller(), false).await.unwrap().marked.len(), 1);
}

#[tokio::test]
async fn visits_of_a_process_before_are_removed() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let visit = service.visit(prod, &point("v1")).unwrap();
    service.wake(visit).await.unwrap();
    rig.kill(service).await;
    assert!(rig.node.is_running(visit), "its unit outlives the service");
    let service = rig.open().await;
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let (service, stop) = (service.clone(), stop.clone());
        async move { service.run(stop).await }
    });
    while !rig.node.visits().await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(!rig.node.is_running(visit));
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_service_that_stops_leaves_none() {
    let rig = Rig::new().await;
    let (service, prod) = shop(&rig).await;
    let visit = service.visit(prod, &point("v1")).unwrap();
    service.wake(visit).await.unwrap();
    service.suspend_all(Duration::from_secs(5)).await;
    assert!(rig.node.visits().await.unwrap().is_empty() && !rig.node.is_running(visit));
    assert_eq!(service.visit(prod, &point("v1")).unwrap_err().sql_state(), SqlState::ADMIN_SHUTDOWN);
}
