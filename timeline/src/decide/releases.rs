//! Deploys, and the way back.

use ebb_types::{OperationId, Point};

use super::{Ask, Found, Fresh, PROD, free, free_checkpoint_name, moved, rescue, running, sealed};
use crate::api::types::SetAside;
use crate::deploy::{Aside, Described, GoingBack, MigrationRun, Part, Probed, Rehearsal};
use crate::error::Refusal;
use crate::event::{Event, Plan, Step};
use crate::machine::{Phase, ReleaseStage};
use crate::release_file::ReleaseFile;
use crate::state::{Operation, ProjectState, Release};

/// What a step of a release that describes itself came to.
#[derive(Debug, Clone)]
pub enum Did {
    /// It was tried on a copy.
    Rehearsed {
        /// The seal that the copy was made from.
        found: Found,
        /// What that showed. With a fault the release is given up.
        report: Rehearsal,
    },
    /// Its migrations are in.
    Migrated {
        /// Those that were applied.
        runs: Vec<MigrationRun>,
        /// How many transactions that took, at least.
        transactions: u64,
    },
    /// Its probes were answered right.
    Proved(Vec<Probed>),
    /// It does not work, and nothing is taken back.
    Stays {
        /// What was asked.
        probes: Vec<Probed>,
        /// Why it does not work, and why nothing is taken back.
        fault: String,
    },
    /// It does not work, and is to be taken back.
    GoesBack {
        /// What was asked.
        probes: Vec<Probed>,
        /// Why it does not work.
        fault: String,
        /// How many of the transactions since its checkpoint are its own, at least.
        transactions: u64,
        /// Whether the data goes back, too.
        data: bool,
        /// Identifiers and time for it.
        fresh: Box<Fresh>,
    },
    /// It was taken back.
    Returned(Found),
}

/// The plan of a release.
pub(super) fn plan_release(state: &ProjectState, ask: &Ask, fresh: &Fresh) -> Result<Plan, Refusal> {
    let Ask::Release { artifact, file, .. } = ask else {
        return Err(Refusal::TooLate("that is no release".to_owned()));
    };
    if let Some(release) = deployed_now(state, artifact) {
        return Err(Refusal::Deployed { release: release.name.clone() });
    }
    let (branch, prod) = state.branch(PROD)?;
    free(state, branch)?;
    let name = format!("v{}", state.releases.len() + 1);
    let checkpoint = free_checkpoint_name(prod, &format!("before-{name}"));
    let described = file.clone().map(|file| Described { file: *file, before: state.code, scratch: fresh.scratch });
    let (release, artifact, seal) = (fresh.release, artifact.clone(), fresh.layer);
    Ok(Plan::Release { release, name, branch, artifact, checkpoint, seal, described: described.map(Box::new) })
}

/// The release in service, if it is of this artifact and nothing has come after it.
pub fn deployed_now<'s>(state: &'s ProjectState, artifact: &str) -> Option<&'s Release> {
    let release = state.code.and_then(|code| state.release_by_id(code))?;
    let works = release.stage == ReleaseStage::Deployed && release.fault.is_none();
    // A failed release since then may have changed the data: deploying again is then meant.
    let touched = |other: &&Release| other.checkpointed && other.stage != ReleaseStage::RolledBack;
    let latest = state.releases.iter().rev().find(touched);
    (release.artifact == artifact && works && latest.map(|latest| latest.id) == Some(release.id)).then_some(release)
}

/// What must be true of a release to go back to it, and what then happens.
///
/// "Back to v1" means: `v1`'s code, and the data as it was just before the release after `v1` touched anything. That is
/// the checkpoint of the first release since (failed ones included: their earlier migrations may have been applied)
/// that was not itself taken back.
pub(super) fn plan_rollback(
    state: &ProjectState,
    (to, part): (&str, Part),
    now: Found,
    layers: u64,
    fresh: &Fresh,
) -> Result<Plan, Refusal> {
    let (branch, prod) = state.branch(PROD)?;
    let target = state.release(to)?;
    let no_way = |why: &str, advice: String| {
        Err(Refusal::NoWayBack { release: target.name.clone(), why: why.to_owned(), advice })
    };
    match target.stage {
        ReleaseStage::Deployed => {}
        ReleaseStage::Deploying => return no_way("it is being deployed", "Wait until it is done.".to_owned()),
        ReleaseStage::Failed => {
            let advice = format!(
                "Go back to the release before it, or restore the data alone: ebb branch restore PROJECT/prod --to {}.",
                target.checkpoint
            );
            return no_way("it failed and never was in service", advice);
        }
        ReleaseStage::RolledBack => {
            let advice =
                "Its data is on a rescue branch of prod; deploy its artifact again to have its code.".to_owned();
            return no_way("it was taken back itself", advice);
        }
    }
    let releases: Vec<&Release> = state
        .releases
        .iter()
        .skip_while(|release| release.id != target.id)
        .skip(1)
        .filter(|release| release.stage != ReleaseStage::RolledBack)
        .collect();
    if part == Part::Code && state.code == Some(target.id) {
        return no_way("its code is in service", "There is nothing to take back but data.".to_owned());
    }
    if releases.is_empty() {
        let advice = format!(
            "Nothing was deployed after it. To take back the data alone: ebb branch restore PROJECT/prod --to {}.",
            target.checkpoint
        );
        return no_way("it is the latest release", advice);
    }
    // Of code alone, only the names matter.
    let otherwise = Some(&target).filter(|_| part == Part::Code);
    let Some(next) = releases.iter().find(|release| release.checkpointed).or(otherwise) else {
        let advice = "Nothing has to be taken back: its code and its data are what is there.".to_owned();
        return no_way("the releases after it failed before they touched anything", advice);
    };
    let checkpoint = prod.checkpoint(next.checkpoint.as_str())?;
    free(state, branch)?;
    let since = |now: Option<u64>, then: Option<u64>| now.zip(then).and_then(|(now, then)| now.checked_sub(then));
    let data = part.has_data();
    let set_aside = SetAside {
        transactions: since(now.next_xid, checkpoint.next_xid).filter(|_| data),
        wal_bytes: since(now.lsn.map(|lsn| lsn.0), checkpoint.lsn.map(|lsn| lsn.0)).filter(|_| data),
        releases: releases.iter().map(|release| release.name.clone()).collect(),
        layers: if data { layers } else { 0 },
        since: checkpoint.created_at,
    };
    Ok(Plan::Rollback {
        branch,
        part,
        to: target.id,
        artifact: target.artifact.clone(),
        releases: releases.iter().map(|release| release.id).collect(),
        code_from: state.code.and_then(|code| state.release_by_id(code)).map(|release| release.artifact.clone()),
        set_aside,
        checkpoint: checkpoint.name.clone(),
        layer: checkpoint.layer,
        seal: fresh.layer,
        rescue: rescue(state, branch, prod, fresh),
    })
}

/// The entry that records what a step of a release that describes itself came to.
pub(super) fn deploy_events(state: &ProjectState, op: OperationId, did: &Did) -> Result<Vec<Event>, Refusal> {
    let operation = running(state, op)?;
    let Plan::Release { release, branch, described: Some(described), checkpoint, .. } = &operation.plan else {
        return Err(Refusal::TooLate(format!("operation {op} is no release that describes itself")));
    };
    let (release, id) = (*release, *branch);
    let known = state.branch_by_id(id)?;
    expected(operation, op, did)?;
    let done = |step| Event::StepDone { step, end: None };
    let probed =
        |probes: &Vec<Probed>| (!probes.is_empty()).then(|| Event::ReleaseProbed { release, probes: probes.clone() });
    let events = match did {
        Did::Rehearsed { found, report } => {
            let mut events: Vec<Event> = sealed(known, id, found.sealed, found.end).into_iter().collect();
            events.push(Event::ReleaseRehearsed { release, report: report.clone() });
            match &report.fault {
                None => events.push(done(Step::Rehearse)),
                Some(fault) => {
                    let why = format!("the rehearsal failed: {fault}");
                    events.push(Event::ReleaseFailed { release, fault: why.clone() });
                    events.push(Event::OperationUndone { why });
                }
            }
            events
        }
        Did::Migrated { runs, transactions } => {
            let migrated = Event::ReleaseMigrated { release, runs: runs.clone(), transactions: *transactions };
            vec![migrated, done(Step::Migrate)]
        }
        Did::Proved(probes) => probed(probes).into_iter().chain([done(Step::Probe), Event::OperationDone]).collect(),
        Did::Stays { probes, fault } => {
            let stays = Event::ReleaseStays { release, fault: fault.clone() };
            probed(probes).into_iter().chain([stays, Event::OperationDone]).collect()
        }
        Did::GoesBack { probes, fault, transactions, data, fresh } => {
            let aside = data.then(|| Aside { rescue: rescue(state, id, known, fresh) });
            let back = GoingBack { to: described.before, aside };
            let (fault, transactions) = (fault.clone(), *transactions);
            let back = Event::ReleaseGoesBack { release, fault, transactions, back };
            probed(probes).into_iter().chain([back]).collect()
        }
        Did::Returned(found) => {
            let Some((back, _)) = &operation.back else {
                return Err(Refusal::TooLate(format!("operation {op} does not go back")));
            };
            let mut events: Vec<Event> = sealed(known, id, found.sealed, found.end).into_iter().collect();
            if let Some(aside) = &back.aside {
                let head = found.sealed.unwrap_or(known.head);
                let layer = known.checkpoint(checkpoint.as_str())?.layer;
                let point = Point::Checkpoint(checkpoint.clone());
                let held = Some((id, known));
                events.extend(moved(held, id, &point, layer, None, (head, found.end), &aside.rescue));
            }
            let data = back.aside.is_some();
            events.push(Event::ReleaseTakenBack { release, to: back.to, data });
            events.push(done(Step::Return));
            events
        }
    };
    Ok(events)
}

/// The operation stands where this can have happened.
fn expected(operation: &Operation, op: OperationId, did: &Did) -> Result<(), Refusal> {
    let next = operation.next_step();
    let fits = match did {
        Did::Rehearsed { .. } => next == Some(Step::Rehearse),
        Did::Migrated { .. } => next == Some(Step::Migrate),
        Did::Proved(_) => next == Some(Step::Probe),
        Did::Stays { .. } => matches!(next, Some(Step::Probe | Step::Return)),
        // Before its code is switched, what has begun to touch the data; after that, what does not work.
        Did::GoesBack { .. } => match operation.phase {
            Phase::Begun => matches!(next, Some(Step::Migrate | Step::Switch)),
            _ => next == Some(Step::Probe),
        },
        Did::Returned(_) => next == Some(Step::Return),
    };
    match fits {
        true => Ok(()),
        false => Err(Refusal::TooLate(format!("operation {op} is at another step: {next:?}"))),
    }
}

/// The plan of a rehearsal that is no part of a release.
pub(super) fn plan_rehearsal(
    state: &ProjectState,
    artifact: &str,
    file: &ReleaseFile,
    fresh: &Fresh,
) -> Result<Plan, Refusal> {
    let (branch, prod) = state.branch(PROD)?;
    let (artifact, file) = (artifact.to_owned(), Box::new(file.clone()));
    Ok(Plan::Rehearse { branch, artifact, layer: prod.head, scratch: fresh.scratch, file })
}

/// The entry that ends a rehearsal. A failed one is as complete as one that passed.
pub(super) fn rehearsed_events(
    state: &ProjectState,
    op: OperationId,
    report: &Rehearsal,
) -> Result<Vec<Event>, Refusal> {
    let Plan::Rehearse { .. } = &running(state, op)?.plan else {
        return Err(Refusal::TooLate(format!("operation {op} is no rehearsal")));
    };
    let done = Event::StepDone { step: Step::Rehearse, end: None };
    Ok(vec![Event::Rehearsed { report: report.clone() }, done, Event::OperationDone])
}
