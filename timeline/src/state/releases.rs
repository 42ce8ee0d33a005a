//! The part of the fold that is about deploys.

use std::sync::Arc;

use ebb_types::ReleaseId;

use super::{Found, ProjectState};
use crate::deploy::GoingBack;
use crate::event::{Event, Plan, Step};
use crate::ledger::Entry;
use crate::machine::{Phase, PhaseEvent, ReleaseEvent, ReleaseStage};

/// LIMIT: rehearsals remembered: an answer that is asked for again; all of them are in the ledger.
const REHEARSALS_MAX: usize = 32;

/// The steps that take a release back.
pub(super) fn steps_back(back: &GoingBack) -> &'static [Step] {
    match back.aside {
        Some(_) => &[Step::Return, Step::Code, Step::Sweep],
        None => &[Step::Return, Step::Code],
    }
}

impl ProjectState {
    /// A checkpoint was made: if it is a release's, that has begun to touch things.
    pub(super) fn note_checkpoint_of_release(&mut self, entry: &Entry<Event>) {
        let plan = entry.op.and_then(|op| self.operations.get(&op)).map(|operation| &operation.plan);
        if let Some(Plan::Release { release, .. }) = plan {
            let id = *release;
            self.releases.iter_mut().filter(|release| release.id == id).for_each(|release| release.checkpointed = true);
        }
    }

    pub(super) fn apply_deploy(&mut self, entry: &Entry<Event>, event: &Event) -> Result<(), String> {
        match event {
            Event::CodeRolledBack { to, releases } => {
                for release in releases {
                    let known = self.release_mut(*release)?;
                    if known.stage == ReleaseStage::Deployed {
                        known.fault = Some("its code was taken back".to_owned());
                        self.advance_release(*release, ReleaseEvent::Fail)?;
                    }
                }
                self.code = Some(self.release_mut(*to)?.id);
            }
            Event::DataRolledBack { releases } => {
                for release in releases {
                    // Deploying the same again has something to do.
                    self.release_mut(*release)?.fault = Some("its data was taken back".to_owned());
                }
            }
            Event::ReleaseRehearsed { release, report } => {
                self.found(*release)?.rehearsal = Some(report.clone());
            }
            Event::ReleaseMigrated { release, runs, transactions } => {
                self.release_mut(*release)?.transactions = *transactions;
                self.found(*release)?.runs = runs.clone();
            }
            Event::ReleaseProbed { release, probes } => self.found(*release)?.probes = probes.clone(),
            Event::ReleaseGoesBack { release, fault, transactions, back } => {
                let known = self.release_mut(*release)?;
                known.transactions = *transactions;
                known.fault = Some(fault.clone());
                if known.stage == ReleaseStage::Deploying {
                    self.advance_release(*release, ReleaseEvent::Fail)?;
                }
                let (_, operation) = self.operation_of(entry)?;
                operation.back = Some((back.clone(), operation.done.len()));
                if operation.phase == Phase::Begun {
                    operation.phase =
                        operation.phase.next(PhaseEvent::Commit).map_err(|illegal| illegal.to_string())?;
                }
            }
            Event::ReleaseStays { release, fault } => self.release_mut(*release)?.fault = Some(fault.clone()),
            Event::ReleaseTakenBack { release, to, data } => {
                let deployed = self.release_mut(*release)?.stage == ReleaseStage::Deployed;
                if *data {
                    self.advance_release(*release, ReleaseEvent::TakeBack)?;
                    let aside = self.operation_of(entry)?.1.back.as_ref().and_then(|(back, _)| back.aside.clone());
                    self.found(*release)?.rescue = aside.map(|aside| aside.rescue.name);
                } else if deployed {
                    self.advance_release(*release, ReleaseEvent::Fail)?;
                }
                self.code = *to;
            }
            Event::Rehearsed { report } => {
                if let Some(scratch) = self.operation_of(entry)?.1.plan.scratch() {
                    if self.rehearsals.len() >= REHEARSALS_MAX {
                        self.rehearsals.pop_front();
                    }
                    self.rehearsals.push_back((scratch, Arc::new(report.clone())));
                }
            }
            other => return Err(format!("{other:?} is no part of a deploy")),
        }
        Ok(())
    }

    fn found(&mut self, release: ReleaseId) -> Result<&mut Found, String> {
        Ok(Arc::make_mut(&mut self.release_mut(release)?.found))
    }
}
