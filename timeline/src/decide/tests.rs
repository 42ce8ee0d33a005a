use std::collections::BTreeSet;

use ebb_types::ProjectId;
use proptest::prelude::*;

use super::*;
use crate::deploy::{Part, Rehearsal};
use crate::drill::Fault;
use crate::ledger::{Entry, Fold as _};

/// A project in memory: decides, folds, and remembers every entry.
struct Model {
    state: ProjectState,
    entries: Vec<Entry<Event>>,
    ids: u128,
    layers: BTreeSet<LayerId>,
    seconds: i64,
}

impl Model {
    fn new() -> Self {
        let template = LayerId::for_test(1);
        let mut model = Self {
            state: ProjectState::default(),
            entries: Vec::new(),
            ids: 100,
            layers: BTreeSet::from([template]),
            seconds: 0,
        };
        let branch = |n, name: &str| Event::BranchCreated {
            branch: BranchId::for_test(n),
            name: name.parse().unwrap(),
            head: template,
            end: Some(Lsn(0)),
            parent: None,
            rescue_until: None,
        };
        let op = model.op();
        model.record(
            op,
            vec![
                Event::OperationBegun {
                    plan: Box::new(Plan::CreateProject { name: "shop".parse().unwrap() }),
                    key: None,
                },
                Event::ProjectCreated {
                    project: ProjectId::for_test(1),
                    name: "shop".parse().unwrap(),
                    pg_major: 15,
                    current: None,
                    verifier: "SCRAM-SHA-256$".to_owned(),
                },
                branch(1, "prod"),
                branch(2, "dev"),
                Event::OperationDone,
            ],
        );
        model
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_second(self.seconds).unwrap()
    }

    fn id(&mut self) -> u128 {
        self.ids += 1;
        self.ids
    }

    fn op(&mut self) -> OperationId {
        OperationId::for_test(self.id())
    }

    fn fresh(&mut self) -> Fresh {
        Fresh {
            now: self.now(),
            branch: BranchId::for_test(self.id()),
            layer: LayerId::for_test(self.id()),
            release: ReleaseId::for_test(self.id()),
            scratch: BranchId::for_test(self.id()),
            replayed: LayerId::for_test(self.id()),
        }
    }

    fn record(&mut self, op: OperationId, events: Vec<Event>) {
        let (seq, time) = (self.entries.len() as u64, self.now());
        let entry = Entry { seq, time, actor: "test".to_owned(), writer: String::new(), op: Some(op), events };
        self.state.apply(&entry).unwrap_or_else(|why| panic!("{why}: {entry:?}"));
        self.entries.push(entry);
    }

    fn begin(&mut self, ask: &Ask) -> Result<OperationId, Refusal> {
        let (op, fresh) = (self.op(), self.fresh());
        let events = decide(&self.state, &Command::Begin { ask: ask.clone(), fresh, key: None })?;
        self.record(op, events);
        Ok(op)
    }

    /// Drives an operation on; gives up after `steps` if that is still possible.
    fn drive(&mut self, op: OperationId, steps: usize) {
        for n in 0.. {
            let Some(step) = self.state.operations.get(&op).and_then(Operation::next_step) else {
                break;
            };
            if n >= steps
                && let Ok(events) = decide(&self.state, &Command::Undo { op, why: "test".to_owned() })
            {
                self.record(op, events);
                break;
            }
            let layer = LayerId::for_test(self.id());
            self.layers.insert(layer);
            let replayed = self.state.operations.get(&op).and_then(|operation| Some(operation.plan.replay()?.layer));
            self.layers.extend(replayed.filter(|_| step == Step::Replay));
            let sealed = Some(layer).filter(|_| step != Step::Replay);
            let found = Found { sealed, end: Some(Lsn(self.ids as u64)), ..Found::default() };
            let what = "object \"x\" is corrupt".to_owned();
            let fault = self.ids.is_multiple_of(2).then_some(Fault { what, kind: ebb_types::ErrorKind::Corrupt });
            let describes = matches!(
                self.state.operations.get(&op).map(|operation| &operation.plan),
                Some(Plan::Release { described: Some(_), .. })
            );
            let command = match step {
                Step::Rehearse | Step::Migrate | Step::Probe | Step::Return if describes => {
                    Command::Deployed { op, did: self.did(step, found) }
                }
                Step::Rehearse => Command::Rehearsed { op, report: Rehearsal::default() },
                Step::Verify => Command::Drilled { op, drilled: Drilled { fault, ..Drilled::default() } },
                _ => Command::Step { op, step, found },
            };
            let events = decide(&self.state, &command).unwrap();
            self.record(op, events);
        }
    }

    /// What a step of a release that describes itself comes to: one time this, another time that.
    fn did(&mut self, step: Step, found: Found) -> Did {
        let (fault, probes) = ("it does not work".to_owned(), Vec::new());
        let goes_back = |model: &mut Self, data| {
            let fresh = Box::new(model.fresh());
            Did::GoesBack { probes: Vec::new(), fault: "it does not work".to_owned(), transactions: 0, data, fresh }
        };
        match (step, self.id() % 5) {
            (Step::Rehearse, n) => {
                let fault = (n == 0).then_some(fault);
                Did::Rehearsed { found, report: Rehearsal { fault, ..Rehearsal::default() } }
            }
            (Step::Migrate, 0) => goes_back(self, true),
            (Step::Migrate, _) => Did::Migrated { runs: Vec::new(), transactions: 0 },
            (Step::Return, 0) => Did::Stays { probes, fault },
            (Step::Return, _) => Did::Returned(found),
            (_, 0) => Did::Stays { probes, fault },
            (_, 1) => goes_back(self, true),
            (_, 2) => goes_back(self, false),
            _ => Did::Proved(probes),
        }
    }

    fn act(&mut self, ask: &Ask) -> Result<(), Refusal> {
        let op = self.begin(ask)?;
        self.drive(op, usize::MAX);
        Ok(())
    }

    fn check(&self) {
        let state = &self.state;
        let names: BTreeSet<_> = state.branches.values().map(|branch| &branch.name).collect();
        assert_eq!(names.len(), state.branches.len(), "two branches have one name");
        assert!(names.iter().any(|name| name.as_str() == PROD), "prod is gone");
        for branch in state.branches.values() {
            assert!(self.layers.contains(&branch.head), "a head is no layer");
            let seals = branch.history.seals();
            assert!(seals.iter().all(|seal| self.layers.contains(&seal.layer)), "a seal is no layer");
            assert!(seals.is_sorted_by_key(|seal| seal.at), "history is not in order");
            assert_eq!(seals.last().map(|seal| seal.layer), Some(branch.head), "the newest seal is not the head");
            let checkpoints: BTreeSet<_> = branch.checkpoints.iter().map(|checkpoint| &checkpoint.name).collect();
            assert_eq!(checkpoints.len(), branch.checkpoints.len(), "two checkpoints have one name");
            assert!(branch.checkpoints.iter().all(|checkpoint| self.layers.contains(&checkpoint.layer)));
        }
        let prod = state.branch(PROD).unwrap().1;
        for release in &state.releases {
            if matches!(release.stage, ReleaseStage::Deployed) {
                prod.checkpoint(release.checkpoint.as_str()).expect("a deployed release has its checkpoint");
            }
        }
        if let Some(code) = state.code {
            assert_eq!(state.release_by_id(code).unwrap().stage, ReleaseStage::Deployed);
        }
        // A rescue branch, once made, is there until its date.
        for entry in &self.entries {
            for event in &entry.events {
                if let Event::BranchCreated { branch, rescue_until: Some(until), .. } = event
                    && self.now() < *until
                {
                    assert!(state.branches.contains_key(branch), "a rescue branch is gone before its date");
                }
            }
        }
        assert!(state.operations.is_empty(), "an operation is stuck");
    }

    /// The same entries, through their stored form, give the same state.
    fn check_replay(&self) {
        let mut again = ProjectState::default();
        for entry in &self.entries {
            let stored = serde_json::to_vec(entry).unwrap();
            again.apply(&serde_json::from_slice(&stored).unwrap()).unwrap();
        }
        assert_eq!(again, self.state);
    }
}

fn branch_name() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["prod", "dev", "a", "b", "rescue-prod-1", "rescue-a-1", "none"]).prop_map(str::to_owned)
}

fn checkpoint_name() -> impl Strategy<Value = CheckpointName> {
    prop::sample::select(vec!["x", "y", "before-v1", "before-v2"]).prop_map(|name| name.parse().unwrap())
}

fn point() -> impl Strategy<Value = Point> {
    prop_oneof![
        Just(Point::Head),
        checkpoint_name().prop_map(Point::Checkpoint),
        (0..1000u64).prop_map(|lsn| Point::Lsn(Lsn(lsn))),
        (-100..2_000_000i64).prop_map(|second| Point::Time(Timestamp::from_second(second).unwrap())),
    ]
}

fn allow(branch: &str, networks: &[&str]) -> Ask {
    let networks: Vec<_> = networks.iter().map(|text| ebb_types::parse_network(text).unwrap()).collect();
    Ask::ChangeBranch {
        branch: branch.to_owned(),
        idle_suspend_ms: None,
        window_ms: None,
        durability: None,
        upkeep: UpkeepChange::default(),
        pinned: None,
        pool_size: None,
        allow: Some(networks.into()),
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        (branch_name(), branch_name(), point()).prop_map(|(name, from, point)| Ask::CreateBranch {
            name: name.parse().unwrap(),
            from: from.parse().unwrap(),
            point
        }),
        branch_name().prop_map(|branch| Ask::DeleteBranch { branch, rule: None }),
        (branch_name(), checkpoint_name()).prop_map(|(branch, name)| Ask::CreateCheckpoint {
            branch,
            name,
            automatic: false
        }),
        (branch_name(), checkpoint_name()).prop_map(|(branch, name)| Ask::DeleteCheckpoint {
            branch,
            name: name.to_string(),
            rule: None
        }),
        (branch_name(), point()).prop_map(|(branch, to)| Ask::Restore { branch, to }),
        (any::<u8>(), any::<bool>()).prop_map(|(n, describes)| Ask::Release {
            artifact: format!("{n:02x}"),
            migrations: Vec::new(),
            file: describes.then(Box::default),
        }),
        any::<u8>().prop_map(|n| Ask::Rehearse { artifact: format!("{n:02x}"), file: Box::default() }),
        (1..5u8, prop::sample::select(vec![Part::Both, Part::Code, Part::Data])).prop_map(|(n, part)| Ask::Rollback {
            to: format!("v{n}"),
            part,
            lsn: None,
            next_xid: None,
            layers: 0
        }),
        branch_name().prop_map(|branch| Ask::Suspend { branch }),
        (branch_name(), point()).prop_map(|(branch, point)| Ask::Drill { branch, point, probes: Vec::new() }),
        (branch_name(), 0..5_000u64).prop_map(|(branch, ms)| Ask::ChangeBranch {
            branch,
            idle_suspend_ms: Some(ms),
            window_ms: None,
            durability: None,
            upkeep: UpkeepChange::default(),
            allow: None,
            pinned: None,
            pool_size: None,
        }),
        (branch_name(), 0..3usize)
            .prop_map(|(branch, networks)| allow(&branch, &["192.0.2.0/24", "::1/128"][..networks.min(2)])),
        (branch_name(), 0..1_000_000_000u64).prop_map(|(branch, ms)| Ask::ChangeBranch {
            branch,
            idle_suspend_ms: None,
            window_ms: Some(ms),
            durability: None,
            upkeep: UpkeepChange::default(),
            allow: None,
            pinned: None,
            pool_size: None,
        }),
    ]
}

proptest! {
    #[test]
    fn any_sequence_of_acts_keeps_the_invariants(
        acts in prop::collection::vec((ask(), prop_oneof![3 => Just(usize::MAX), 1 => 0..4usize], 0..400_000i64), 1..60)
    ) {
        let mut model = Model::new();
        for (ask, steps, seconds) in acts {
            model.seconds += seconds;
            if let Ok(op) = model.begin(&ask) {
                model.drive(op, steps);
            }
            model.check();
        }
        model.check_replay();
    }
}

fn release(model: &mut Model, artifact: &str) {
    model.act(&Ask::Release { artifact: artifact.to_owned(), migrations: Vec::new(), file: None }).unwrap();
}

fn rollback(model: &mut Model, to: &str) -> Result<(), Refusal> {
    model.act(&Ask::Rollback { to: to.to_owned(), part: Part::Both, lsn: None, next_xid: None, layers: 0 })
}

fn before(model: &Model, name: &str) -> LayerId {
    model.state.branch(PROD).unwrap().1.checkpoint(name).unwrap().layer
}

#[test]
fn a_rollback_goes_to_just_before_the_next_release() {
    let mut model = Model::new();
    for artifact in ["aa", "bb", "cc"] {
        release(&mut model, artifact);
    }
    let expect = before(&model, "before-v2");
    rollback(&mut model, "v1").unwrap();
    let prod = model.state.branch(PROD).unwrap().1;
    assert_eq!((prod.head, prod.line), (expect, 1));
    assert_eq!(model.state.code, Some(model.state.releases[0].id));
    let stages: Vec<_> = model.state.releases.iter().map(|release| release.stage).collect();
    assert_eq!(stages, [ReleaseStage::Deployed, ReleaseStage::RolledBack, ReleaseStage::RolledBack]);
    assert!(model.state.branch("rescue-prod-1").unwrap().1.rescue_until.is_some());

    // The release after a rollback is what a second rollback undoes, not the ones taken back already.
    release(&mut model, "dd");
    let expect = before(&model, "before-v4");
    rollback(&mut model, "v1").unwrap();
    assert_eq!(model.state.branch(PROD).unwrap().1.head, expect);
}

#[test]
fn rollbacks_that_make_no_sense_say_why() {
    let mut model = Model::new();
    let hint = |refused: Result<(), Refusal>| ebb_types::Hint::hint(&refused.unwrap_err()).unwrap();
    assert!(matches!(rollback(&mut model, "v1"), Err(Refusal::NoRelease { .. })));
    release(&mut model, "aa");
    assert!(hint(rollback(&mut model, "v1")).contains("before-v1"));
    release(&mut model, "bb");
    assert_eq!(hint(rollback(&mut model, "v3")), "Did you mean v1, v2?");
    rollback(&mut model, "v1").unwrap();
    assert!(hint(rollback(&mut model, "v2")).contains("deploy its artifact again"));
}

#[test]
fn a_failed_release_can_be_taken_back_with_its_data() {
    let mut model = Model::new();
    release(&mut model, "aa");
    let op = model
        .begin(&Ask::Release { artifact: "bb".to_owned(), migrations: vec!["1.sql".to_owned()], file: None })
        .unwrap();
    model.drive(op, 1);
    assert_eq!(model.state.releases[1].stage, ReleaseStage::Failed);
    assert_eq!(model.state.code, Some(model.state.releases[0].id));
    let expect = before(&model, "before-v2");
    rollback(&mut model, "v1").unwrap();
    assert_eq!(model.state.branch(PROD).unwrap().1.head, expect);
}

#[test]
fn a_branch_under_an_operation_is_busy() {
    let mut model = Model::new();
    model
        .act(&Ask::CreateCheckpoint { branch: "dev".to_owned(), name: "x".parse().unwrap(), automatic: false })
        .unwrap();
    let to = Point::Checkpoint("x".parse().unwrap());
    let op = model.begin(&Ask::Restore { branch: "dev".to_owned(), to: to.clone() }).unwrap();
    let refused = model.begin(&Ask::Restore { branch: "dev".to_owned(), to }).unwrap_err();
    assert_eq!(refused.to_string(), format!("branch \"dev\" is busy with restore ({op})"),);
    model
        .act(&Ask::CreateCheckpoint { branch: "prod".to_owned(), name: "x".parse().unwrap(), automatic: false })
        .unwrap();
    model.drive(op, usize::MAX);
    model.check();
}

#[test]
fn a_rescue_branch_is_kept_until_its_date() {
    let mut model = Model::new();
    model
        .act(&Ask::CreateCheckpoint { branch: "dev".to_owned(), name: "x".parse().unwrap(), automatic: false })
        .unwrap();
    let to = Point::Checkpoint("x".parse().unwrap());
    model.act(&Ask::Restore { branch: "dev".to_owned(), to }).unwrap();
    let delete = Ask::DeleteBranch { branch: "rescue-dev-1".to_owned(), rule: None };
    assert!(matches!(model.act(&delete), Err(Refusal::Kept { .. })));
    model.seconds += 7 * 24 * 3600;
    model.act(&delete).unwrap();
}

#[test]
fn unknown_names_suggest_near_ones() {
    let model = Model::new();
    let fresh = Model::new().fresh();
    let hint = |ask| ebb_types::Hint::hint(&plan(&model.state, &ask, &fresh).unwrap_err());
    assert_eq!(hint(Ask::Wake { branch: "prdo".to_owned() }), Some("Did you mean prod?".to_owned()));
    let time = "2026-01-01T00:00:00Z".parse().unwrap();
    let refused = hint(Ask::Restore { branch: "prod".to_owned(), to: time });
    assert!(refused.unwrap().contains("any moment from 1970-01-01T00:00:"));
}

#[test]
fn long_branch_names_still_have_rescue_names() {
    let mut model = Model::new();
    let name = "a-234567890-234567890-23456789";
    let (named, from) = (name.parse().unwrap(), "prod".parse().unwrap());
    model.act(&Ask::CreateBranch { name: named, from, point: Point::Head }).unwrap();
    model
        .act(&Ask::CreateCheckpoint { branch: name.to_owned(), name: "x".parse().unwrap(), automatic: false })
        .unwrap();
    let to = Point::Checkpoint("x".parse().unwrap());
    model.act(&Ask::Restore { branch: name.to_owned(), to: to.clone() }).unwrap();
    model.act(&Ask::Restore { branch: name.to_owned(), to }).unwrap();
    assert!(model.state.branch("rescue-a-234567890-234567890-2").is_ok());
    model.check();
}

#[test]
fn whoever_may_not_see_a_branch_may_not_see_what_is_made_from_it() {
    let mut model = Model::new();
    let create = |name: &str, from: &str, point: Point| Ask::CreateBranch {
        name: name.parse().unwrap(),
        from: from.parse().unwrap(),
        point,
    };
    let list = |model: &Model, name: &str| model.state.branch(name).unwrap().1.allow.to_string();
    model.act(&create("open", "prod", Point::Head)).unwrap();
    model.act(&allow("prod", &["192.0.2.0/24"])).unwrap();
    model.act(&create("a", "prod", Point::Head)).unwrap();
    assert_eq!((list(&model, "prod"), list(&model, "a")), ("192.0.2.0/24".to_owned(), "192.0.2.0/24".to_owned()));
    assert_eq!(list(&model, "open"), "any", "it was made before");
    // From then on each has its own.
    model.act(&allow("prod", &[])).unwrap();
    assert_eq!((list(&model, "prod"), list(&model, "a")), ("any".to_owned(), "192.0.2.0/24".to_owned()));
    // What a restore sets aside.
    model.act(&Ask::CreateCheckpoint { branch: "a".to_owned(), name: "x".parse().unwrap(), automatic: false }).unwrap();
    model.act(&Ask::Restore { branch: "a".to_owned(), to: Point::Checkpoint("x".parse().unwrap()) }).unwrap();
    assert_eq!(list(&model, "rescue-a-1"), "192.0.2.0/24");
    // A source that goes, and comes back open, while a moment of it is replayed.
    model.seconds += 10;
    let past = Point::Time(model.now());
    model.seconds += 10;
    model.act(&Ask::Suspend { branch: "a".to_owned() }).unwrap();
    model.seconds += 10;
    let slow = model.begin(&create("slow", "a", past)).unwrap();
    assert!(model.state.operations.contains_key(&slow), "it has yet to be replayed");
    model.act(&Ask::DeleteBranch { branch: "a".to_owned(), rule: None }).unwrap();
    model.act(&create("a", "prod", Point::Head)).unwrap();
    model.drive(slow, usize::MAX);
    assert_eq!((list(&model, "a"), list(&model, "slow")), ("any".to_owned(), "192.0.2.0/24".to_owned()));
    model.check_replay();
    let many: Vec<String> = (0..300).map(|n| format!("192.0.{}.{}/32", n / 256, n % 256)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(matches!(model.begin(&allow("prod", &many)), Err(Refusal::Invalid(_))));
}
