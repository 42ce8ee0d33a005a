//! Releases that describe themselves: rehearsed, proved, and taken back by themselves.

use ebb_types::Hint as _;

use super::*;
use crate::state::ProjectState;

/// With the three rows of the test and two migrations there are five.
pub const WELL: &str = "[policy]\nfence = true\n[[probe]]\nsql = \"rows\"\nexpect = 5";

/// What a command answers is not known on the copy.
pub const DATA_GOES_BACK: &str = "[policy]\nrollback = \"data\"\nmax_lost_transactions = 5\n\
    [[probe]]\ncommand = [\"false\"]\nretries = 0";

pub const CODE_GOES_BACK: &str = "[policy]\nrollback = \"code\"\n[[probe]]\ncommand = [\"false\"]\nretries = 0";

const MIGRATIONS: &[&str] = &["1.sql", "2.sql"];

fn artifact(rig: &Rig, name: &str, file: &str) -> PathBuf {
    let artifact = rig.artifact(name, MIGRATIONS);
    std::fs::write(artifact.join("ebb.toml"), file).unwrap();
    artifact
}

/// Deploys `two`, which says of itself what the file does.
pub async fn deploy(rig: &Rig, service: &Arc<Service>, file: &str) -> Result<Answer<api::Release>> {
    let artifact = artifact(rig, "two", file);
    deploy_dir(service, artifact).await
}

async fn deploy_dir(service: &Arc<Service>, artifact: PathBuf) -> Result<Answer<api::Release>> {
    service.create_release(&caller(), "shop", api::CreateRelease { artifact }).await
}

pub async fn rehearse(rig: &Rig, service: &Arc<Service>) -> Result<Answer<api::Rehearsed>> {
    let artifact = artifact(rig, "two", WELL);
    service.rehearse(&caller(), "shop", api::CreateRelease { artifact }).await
}

/// A release that was taken back is an answer, too: the one that was to be expected.
pub fn given_up(deployed: Result<Answer<api::Release>>) -> Result<()> {
    match deployed {
        Err(Error::Release { .. }) => Ok(()),
        Err(error) => Err(error),
        Ok(answer) => panic!("it was taken to work: {answer:?}"),
    }
}

async fn data(rig: &Rig, service: &Arc<Service>, branch: &str) -> Rows {
    rows(rig, service, branch).await.into_iter().collect()
}

fn state(service: &Arc<Service>) -> Arc<ProjectState> {
    service.project("shop").unwrap().ledger.state()
}

const OLD: &[&str] = &["1", "2", "3", "migration 1.sql"];
const NEW: &[&str] = &["1", "2", "3", "migration 1.sql", "migration 2.sql"];

pub async fn check_done(rig: &Rig, service: &Arc<Service>) -> bool {
    let releases = service.releases("shop").await.unwrap();
    let done = releases.iter().any(|release| release.state == "deployed" && release.name != "v1");
    assert!(releases.iter().all(|release| release.state != "deploying"));
    assert_eq!(rig.code().as_deref(), Some(if done { "two" } else { "one" }));
    let data = data(rig, service, "prod").await;
    assert!(data == set(NEW) || !done && data == set(OLD));
    done
}

/// Code and data are as before, whether the release got so far that it was taken back, or not.
pub async fn check_data_back(rig: &Rig, service: &Arc<Service>) -> bool {
    assert_eq!(rig.code().as_deref(), Some("one"));
    assert_eq!(data(rig, service, "prod").await, set(OLD));
    let state = state(service);
    let back = state.releases.iter().find(|release| release.found.rescue.is_some());
    if let Some(back) = back {
        assert_eq!(back.stage.as_str(), "rolled_back");
        let rescue = back.found.rescue.clone().unwrap();
        assert_eq!(data(rig, service, rescue.as_str()).await, set(NEW));
    }
    back.is_some()
}

pub async fn check_code_back(rig: &Rig, service: &Arc<Service>) -> bool {
    assert_eq!(rig.code().as_deref(), Some("one"));
    let state = state(service);
    let back = state.releases.iter().any(|release| release.fault.as_ref().is_some_and(|why| why.contains("probe")));
    let data = data(rig, service, "prod").await;
    assert!(data == set(NEW) || !back && data == set(OLD));
    back
}

async fn prepared() -> (Rig, Arc<Service>) {
    let rig = Rig::new().await;
    let service = rig.open().await;
    prepare(&rig, &service, Cut::DescribedRelease).await;
    (rig, service)
}

#[tokio::test]
async fn a_release_is_rehearsed_and_proved_and_the_same_twice_is_one() {
    let (rig, service) = prepared().await;
    let made = deploy(&rig, &service, WELL).await.unwrap();
    assert!(made.new && made.value.name == "v2" && made.value.current);
    let rehearsal = made.value.rehearsal.as_ref().unwrap();
    assert_eq!(rehearsal.migrations.iter().map(|run| run.file.as_str()).collect::<Vec<_>>(), ["2.sql"]);
    assert!(rehearsal.fault.is_none() && rehearsal.probes.len() == 1 && made.value.probes.len() == 1);
    let again = deploy(&rig, &service, WELL).await.unwrap();
    assert!(!again.new && again.value.id == made.value.id);
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn two_at_once_of_the_same_artifact_are_one_release() {
    let (rig, service) = prepared().await;
    let dir = artifact(&rig, "two", WELL);
    let (one, two) = tokio::join!(deploy_dir(&service, dir.clone()), deploy_dir(&service, dir.clone()));
    assert_eq!(one.unwrap().value.id, two.unwrap().value.id);
    assert_eq!(service.releases("shop").await.unwrap().len(), 2);
}

#[tokio::test]
async fn what_fails_in_the_rehearsal_touches_nothing() {
    let (rig, service) = prepared().await;
    rig.node.0.lock().fail_migration = Some("2.sql".to_owned());
    let error = deploy(&rig, &service, DATA_GOES_BACK).await.unwrap_err();
    assert!(error.chain().contains("the rehearsal failed: migration \"2.sql\" failed"), "{}", error.chain());
    assert!(error.hint().unwrap().contains("Neither code nor data"));
    assert_eq!(data(&rig, &service, "prod").await, set(OLD));
    assert!(service.checkpoints("shop", "prod").await.unwrap().iter().all(|one| one.name.as_str() != "before-v2"));
    // Such a release is nothing to go back behind.
    let error = service.plan_rollback("shop", &to_release("v1")).await.unwrap_err();
    assert!(error.chain().contains("before they touched anything"), "{}", error.chain());
    rig.node.0.lock().fail_migration = None;
    let wrong = deploy(&rig, &service, &WELL.replace("expect = 5", "expect = 7")).await.unwrap_err();
    assert!(wrong.chain().contains("probe \"rows\" answers \"5\", not \"7\""), "{}", wrong.chain());
    deploy(&rig, &service, WELL).await.unwrap();
    assert_eq!(service.plan_rollback("shop", &to_release("v1")).await.unwrap().checkpoint.as_str(), "before-v4");
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn a_release_whose_probe_fails_goes_back_with_its_data() {
    let (rig, service) = prepared().await;
    let error = deploy(&rig, &service, DATA_GOES_BACK).await.unwrap_err();
    assert!(error.chain().contains("probe \"probe 1\" exits with 1, not 0"), "{}", error.chain());
    assert!(error.hint().unwrap().contains("shop/rescue-prod-1"), "{:?}", error.hint());
    assert!(check_data_back(&rig, &service).await);
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn no_more_is_set_aside_than_the_bound() {
    let (rig, service) = prepared().await;
    // A client that writes between the checkpoint and the probe: the probe itself.
    let script = rig.dir.path().join("wrote");
    let file = format!(
        "[policy]\nrollback = \"data\"\nmax_lost_transactions = 1\n[[probe]]\ntimeout = \"20s\"\n\
         command = [\"sh\", \"-c\", \"until test -e {}; do sleep 0.01; done; false\"]\nretries = 0",
        script.display()
    );
    let prod = branch_id(&service, "prod").await;
    let writing = async {
        wait_until(|| rig.code().as_deref() == Some("two")).await;
        rig.node.write(prod, "4");
        rig.node.write(prod, "5");
        std::fs::write(&script, "").unwrap();
    };
    let (deployed, ()) = tokio::join!(deploy(&rig, &service, &file), writing);
    let error = deployed.unwrap_err();
    assert!(error.chain().contains("2 transactions were begun since its checkpoint"), "{}", error.chain());
    assert!(error.hint().unwrap().contains("ebb rollback shop --to v1 --plan"), "{:?}", error.hint());
    assert_eq!(rig.code().as_deref(), Some("two"));
    assert!(data(&rig, &service, "prod").await.is_superset(&set(&["4", "5", "migration 2.sql"])));
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn a_migration_that_fails_on_prod_takes_those_before_it_back() {
    let (rig, service) = prepared().await;
    rig.node.0.lock().fail_migration_later = Some("3.sql".to_owned());
    std::fs::create_dir_all(rig.dir.path().join("source/two/migrations")).unwrap();
    std::fs::write(rig.dir.path().join("source/two/migrations/3.sql"), "select 3").unwrap();
    let error = deploy(&rig, &service, "[policy]\nrollback = \"data\"").await.unwrap_err();
    assert!(error.chain().contains("migration \"3.sql\" failed"), "{}", error.chain());
    assert!(check_data_back(&rig, &service).await, "{:?}", service.releases("shop").await);
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn the_first_release_of_all_can_go_back_too() {
    let rig = Rig::new().await;
    let service = rig.open().await;
    create(&service).await.unwrap();
    write(&rig, &service, "prod", "1").await;
    given_up(deploy(&rig, &service, DATA_GOES_BACK).await).unwrap();
    assert_eq!((rig.code(), data(&rig, &service, "prod").await), (None, set(&["1"])));
    assert_settled(&rig, &service).await;
}

#[tokio::test]
async fn what_it_says_of_itself_must_be_right_and_what_it_needs_must_be_there() {
    let (rig, service) = prepared().await;
    let error = deploy(&rig, &service, "[polcy]").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error.chain().contains("ebb.toml:1:2") && error.chain().contains("did you mean policy?"),
        "{}",
        error.chain()
    );
    let needs = format!("secrets = [\"KEY\"]\n{WELL}");
    let error = deploy(&rig, &service, &needs).await.unwrap_err();
    assert!(error.chain().contains("KEY"), "{}", error.chain());
    let dir = rig.dir.path().join("data/projects/shop/secrets");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("KEY"), "secret").unwrap();
    deploy(&rig, &service, &needs).await.unwrap();
}

#[tokio::test]
async fn code_and_data_can_go_back_alone() {
    let (rig, service) = prepared().await;
    deploy(&rig, &service, WELL).await.unwrap();
    write(&rig, &service, "prod", "4").await;
    let code = api::Rollback { code_only: true, ..to_release("v1") };
    let plan = service.plan_rollback("shop", &code).await.unwrap();
    assert_eq!((plan.set_aside.transactions, plan.set_aside.layers), (None, 0));
    assert!(service.rollback(&caller(), "shop", &code).await.unwrap().value.rescue.is_none());
    assert_eq!(rig.code().as_deref(), Some("one"));
    assert!(data(&rig, &service, "prod").await.contains("4"));
    let error = service.rollback(&caller(), "shop", &code).await.unwrap_err();
    assert!(error.chain().contains("its code is in service"), "{}", error.chain());
    // The data of what has no code any more can still follow.
    let back = service.rollback(&caller(), "shop", &to_release("v1")).await.unwrap().value;
    assert_eq!(data(&rig, &service, "prod").await, set(OLD));
    assert!(data(&rig, &service, back.rescue.unwrap().name.as_str()).await.contains("4"));

    // After the data went back alone, the same release has something to do again.
    let third = deploy(&rig, &service, WELL).await.unwrap().value;
    let alone = api::Rollback { data_only: true, ..to_release("v1") };
    service.rollback(&caller(), "shop", &alone).await.unwrap();
    assert_eq!((rig.code().as_deref(), data(&rig, &service, "prod").await), (Some("two"), set(OLD)));
    let again = deploy(&rig, &service, WELL).await.unwrap();
    assert!(again.new && again.value.id != third.id);
    assert_eq!(data(&rig, &service, "prod").await, set(NEW));
    let both = api::Rollback { code_only: true, data_only: true, ..to_release("v1") };
    assert_eq!(service.rollback(&caller(), "shop", &both).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_settled(&rig, &service).await;
}
