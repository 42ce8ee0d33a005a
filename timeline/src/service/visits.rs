//! Visits: read-only images of moments, which clients come to by naming a point, and which vanish behind them.
//!
//! ```text
//!   a client has proved who it is ─► named (here) ─► woken by the first, shared by all ─► left: idle for a while,
//!                                                                                        or its branch is gone
//! ```
//!
//! To clients a visit is a branch with an identifier of its own: woken, listed and lost like one. Nothing of it is in a
//! ledger: it changes nothing that lasts, and what it stands on is kept by [`Service::visited`] while it is named.
//!
//! **Passwords** are those of the branch's head, always: one that was revoked since does not open the past, and none has to
//! be looked for in an image that does not exist yet. Who did not exist then, or was a superuser, is not let in either.
//!
//! **Crash.** A machine knows its visits by marks ([`crate::node::Visiting::visits`]); what has a mark and no name here is
//! removed, at the start of the service as at any other time. Only one task ever removes.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ebb_compute::control::Durability;
use ebb_types::{BranchId, LayerId, Point, Timestamp};
use futures::FutureExt as _;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::compute::{AwakeUnit, SharedWake};
use super::{Project, Service};
use crate::api::types as api;
use crate::decide::image_at;
use crate::event::Replay;
use crate::node::{Line, Start, Visited};
use crate::reach::{Keeper, Root};
use crate::state::{Facts, ProjectState};
use crate::{Error, Refusal, Result};

/// LIMIT: each is a Postgres of its own, with no more behind it than someone's curiosity.
pub(super) const VISITS_MAX: usize = 16;

/// How long a visit that nobody is connected to is kept for the next client; less, where its branch sleeps sooner.
const KEEP: Duration = Duration::from_secs(30);

/// LIMIT: a client that has just been told a visit's name comes within this time.
const KEEP_MIN: Duration = Duration::from_secs(1);

/// How often visits are looked at while there are any.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// After removing one failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The visits of this node.
#[derive(Debug, Default)]
pub(super) struct Visits {
    named: Mutex<HashMap<BranchId, Arc<Visit>>>,
    /// A visit was named, or is named no more.
    changed: Notify,
    /// Nothing has been swept yet, or something has been left since.
    swept: AtomicBool,
}

/// One visit.
#[derive(Debug)]
pub(super) struct Visit {
    id: BranchId,
    project: Arc<Project>,
    branch: BranchId,
    point: Point,
    since: Timestamp,
    start: Start,
    replay: Option<Replay>,
    /// Whether nothing may be open in its image.
    shut: bool,
    state: Mutex<State>,
}

struct State {
    /// What answers, and the layer that it lies on.
    open: Option<(AwakeUnit, LayerId)>,
    opening: Option<SharedWake>,
    generation: u64,
    /// Who of this process wants it to stay.
    held: usize,
    /// When somebody last asked for it.
    asked_at: Instant,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("open", &self.open).finish_non_exhaustive()
    }
}

impl Visit {
    fn is_of(&self, branch: BranchId, layer: LayerId, replay: Option<&Replay>) -> bool {
        let moment = |replay: &Replay| (replay.line, replay.to);
        self.branch == branch && self.start.data.head == layer && self.replay.as_ref().map(moment) == replay.map(moment)
    }

    fn ask(&self) {
        self.state.lock().asked_at = Instant::now();
    }
}

/// A visit that stays as long as this lives.
#[derive(Debug)]
pub(super) struct Held {
    visit: Arc<Visit>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.visit.state.lock();
        state.held -= 1;
        state.asked_at = Instant::now();
    }
}

impl Held {
    /// Opens it: its socket, and the layer that it lies on.
    pub async fn open(&self, service: &Arc<Service>) -> Result<(PathBuf, LayerId)> {
        let unit = service.wake_visit(self.visit.clone()).await?;
        let layer = self.visit.state.lock().open.as_ref().map(|(_, layer)| *layer);
        Ok((unit.socket, layer.ok_or(Error::Lost("the visit"))?))
    }
}

/// Forgets the opening that is under way, also if its task panics.
struct OpeningGuard(Arc<Visit>);

impl Drop for OpeningGuard {
    fn drop(&mut self) {
        self.0.state.lock().opening = None;
    }
}

impl Service {
    /// Names a visit to a moment of a branch; whoever names the same moment gets the same. Makes nothing yet.
    ///
    /// # Errors
    /// If there is no such moment, or there are too many visits.
    pub fn visit(&self, branch: BranchId, point: &Point) -> Result<BranchId> {
        Ok(self.name_visit(branch, point, false)?.id)
    }

    /// Names a visit for as long as the answer lives, to an image in which nothing is open. The head is the newest seal.
    pub(super) fn hold_visit(&self, branch: BranchId, point: &Point) -> Result<Held> {
        let visit = self.name_visit(branch, point, true)?;
        visit.state.lock().held += 1;
        Ok(Held { visit })
    }

    fn name_visit(&self, branch: BranchId, point: &Point, shut: bool) -> Result<Arc<Visit>> {
        if self.stopping.is_cancelled() {
            return Err(Error::Stopping);
        }
        let project = self.project_of(branch)?;
        // The names are locked first, then the ledger is read: whoever collects reads them the other way round.
        let mut named = self.visits.named.lock();
        let state = project.ledger.state();
        let known = state.branch_by_id(branch)?;
        let fresh = self.fresh();
        let (layer, replay) = image_at(branch, known, point, &fresh)?;
        let head = layer.or(replay.as_ref().map(|replay| replay.base)).unwrap_or(known.head);
        let same = |visit: &&Arc<Visit>| visit.shut == shut && visit.is_of(branch, head, replay.as_ref());
        if let Some(visit) = named.values().find(same) {
            visit.ask();
            return Ok(visit.clone());
        }
        if named.len() >= VISITS_MAX {
            let idlest = named.values().filter(|visit| self.deserted_for(visit).is_some());
            let idlest = idlest.max_by_key(|visit| self.deserted_for(visit)).map(|visit| visit.id);
            let idlest = idlest.ok_or(Refusal::TooManyVisits { limit: VISITS_MAX })?;
            named.remove(&idlest);
            self.clients.forget(idlest);
        }
        let id = fresh.scratch;
        let visit = Arc::new(Visit {
            id,
            branch,
            point: point.clone(),
            since: fresh.now,
            start: start_of(&state, branch, id, head)?,
            replay,
            shut,
            state: Mutex::new(State { asked_at: Instant::now(), open: None, opening: None, generation: 0, held: 0 }),
            project: project.clone(),
        });
        named.insert(id, visit.clone());
        drop(named);
        self.visits.swept.store(false, Ordering::SeqCst);
        self.visits.changed.notify_one();
        Ok(visit)
    }

    /// Whether this names a visit.
    pub(super) fn named_visit(&self, id: BranchId) -> Option<Arc<Visit>> {
        self.visits.named.lock().get(&id).cloned()
    }

    /// Makes a visit answer; any number of calls open it once.
    ///
    /// # Cancel safety
    /// Safe: what was begun goes on.
    pub(super) async fn wake_visit(self: &Arc<Self>, visit: Arc<Visit>) -> Result<AwakeUnit> {
        let opening = {
            let mut state = visit.state.lock();
            state.asked_at = Instant::now();
            if let Some((unit, _)) = &state.open {
                return Ok(unit.clone());
            }
            if self.stopping.is_cancelled() {
                return Err(Error::Stopping);
            }
            match &state.opening {
                Some(opening) => opening.clone(),
                None => {
                    let opening = self.begin_visit(visit.clone());
                    state.opening = Some(opening.clone());
                    opening
                }
            }
        };
        opening.await.map_err(Error::Shared)
    }

    fn begin_visit(self: &Arc<Self>, visit: Arc<Visit>) -> SharedWake {
        let service = self.clone();
        let task = self.tasks.spawn(async move {
            let begun = Instant::now();
            let opened = service.open_visit(&visit).await;
            let result = if opened.is_ok() { "ok" } else { "failed" };
            metrics::counter!("ebb_timeline_visits_total", "result" => result).increment(1);
            metrics::histogram!("ebb_timeline_visit_seconds").record(begun.elapsed());
            // Whoever asks from here on finds it open, or opens it anew.
            let _forget = OpeningGuard(visit.clone());
            if let Err(error) = &opened
                && !matches!(error, Error::Refused(_))
            {
                tracing::error!(visit = %visit.id, branch = %visit.branch, error = error.chain(), "a visit failed");
            }
            opened
        });
        let outcome = task.map(|ended| match ended {
            Ok(outcome) => outcome.map_err(Arc::new),
            Err(_) => Err(Arc::new(Error::Lost("the visit"))),
        });
        outcome.boxed().shared()
    }

    async fn open_visit(self: &Arc<Self>, visit: &Arc<Visit>) -> Result<AwakeUnit> {
        self.check_disk()?;
        if let Some(replay) = &visit.replay
            && visit.project.line(visit.branch)?.line == replay.line
            && self.is_awake(&visit.project, visit.branch)
        {
            self.node.ship(visit.branch).await?;
        }
        let opened = self.node.visit(&visit.start, visit.replay.as_ref(), visit.shut).await;
        let opened = opened.map_err(|error| self.out_of_reach(visit, error))?;
        let Visited { socket, roles, layer } = opened;
        let unit = {
            let mut state = visit.state.lock();
            state.generation += 1;
            state.asked_at = Instant::now();
            let unit = AwakeUnit { generation: state.generation, socket, admits: Some(Arc::new(roles)) };
            state.open = Some((unit.clone(), layer));
            unit
        };
        tracing::info!(visit = %visit.id, branch = %visit.branch, point = %visit.point, "visit opened");
        let (service, visit, generation) = (self.clone(), visit.clone(), unit.generation);
        self.tasks.spawn(async move {
            tokio::select! {
                () = service.node.gone(visit.id) => service.lose_visit(&visit, generation),
                () = service.stopping.cancelled() => {}
            }
        });
        Ok(unit)
    }

    /// A moment that no WAL leads to is not one that the branch can be taken back to: it was not written that far, or its WAL
    /// never got to the bucket.
    fn out_of_reach(&self, visit: &Visit, error: Error) -> Error {
        let Error::Storage(ebb_storage::Error::NoSuchWal { .. }) = error else { return error };
        let state = visit.project.ledger.state();
        let Ok(known) = state.branch_by_id(visit.branch) else { return error };
        let (now, why) = (self.clock.now(), "no WAL in the bucket leads there".to_owned());
        let (branch, point, from) = (known.name.clone(), visit.point.to_string(), known.window_start(now));
        Refusal::OutsideWindow { branch, point, why, from, to: now }.into()
    }

    /// Its unit is gone: by itself, or because the visit is over.
    fn lose_visit(&self, visit: &Visit, generation: u64) {
        let mut state = visit.state.lock();
        if state.open.as_ref().is_some_and(|(unit, _)| unit.generation == generation) {
            state.open = None;
            drop(state);
            self.clients.lost(visit.id, generation);
        }
    }

    /// For how long nobody has been connected to a visit, or about to be.
    fn deserted_for(&self, visit: &Visit) -> Option<Duration> {
        let asked = {
            let state = visit.state.lock();
            if state.opening.is_some() || state.held > 0 {
                return None;
            }
            state.asked_at.elapsed()
        };
        let activity = self.clients.activity(visit.id);
        let idle = activity.idle_for.map_or(asked, |idle| idle.min(asked));
        (activity.sessions == 0 && idle >= KEEP_MIN).then_some(idle)
    }

    /// Lets go of visits that nobody wants any more, for ever.
    pub(super) async fn leave_visits_forever(&self) {
        loop {
            let any = self.look_at_visits();
            let swept = self.sweep_visits().await;
            if let Err(error) = &swept {
                self.report("removing a visit", error);
            }
            let next = match swept {
                Ok(()) if any => LOOK_EVERY,
                Ok(()) => Duration::MAX,
                Err(_) => RETRY_AFTER,
            };
            // If there is none, it is the next to be named that wakes this.
            let _ = tokio::time::timeout(next, self.visits.changed.notified()).await;
        }
    }

    /// Takes the names of those that are over; answers whether any are left.
    fn look_at_visits(&self) -> bool {
        let mut named = self.visits.named.lock();
        named.retain(|id, visit| {
            let state = visit.project.ledger.state();
            let keep = match state.branch_by_id(visit.branch) {
                Ok(branch) => self.idle_suspend(branch).clamp(KEEP_MIN, KEEP),
                Err(_) => {
                    let state = visit.state.lock();
                    if state.opening.is_some() || state.held > 0 {
                        return true;
                    }
                    Duration::ZERO
                }
            };
            let over = keep.is_zero() || self.deserted_for(visit).is_some_and(|deserted| deserted >= keep);
            if over {
                tracing::info!(visit = %id, branch = %visit.branch, "visit left");
                self.visits.swept.store(false, Ordering::SeqCst);
                self.clients.forget(*id);
            }
            !over
        });
        metrics::gauge!("ebb_timeline_visits").set(named.len() as f64);
        !named.is_empty()
    }

    /// Removes what this machine has of visits that have no name: those that are over, and those of a process before.
    async fn sweep_visits(&self) -> Result<()> {
        if self.visits.swept.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let sweeping = async {
            // Before the names: a visit is named before it has a mark.
            let marked = self.node.visits().await?;
            for visit in marked {
                if self.named_visit(visit).is_none() {
                    self.node.leave(visit).await?;
                }
            }
            Ok(())
        };
        let swept = sweeping.await;
        if swept.is_err() {
            self.visits.swept.store(false, Ordering::SeqCst);
        }
        swept
    }

    /// Ends all visits. After this the service takes on no more work.
    pub(super) async fn end_visits(&self) {
        let opening: Vec<SharedWake> = {
            let named = self.visits.named.lock();
            named.values().filter_map(|visit| visit.state.lock().opening.clone()).collect()
        };
        futures::future::join_all(opening).await;
        self.visits.named.lock().clear();
        self.visits.swept.store(false, Ordering::SeqCst);
        if let Err(error) = self.sweep_visits().await {
            self.report("removing a visit", &error);
        }
    }

    /// What visits stand on.
    pub(super) fn visited(&self) -> Vec<Root> {
        let named = self.visits.named.lock();
        let root = |visit: &Arc<Visit>| {
            let state = visit.project.ledger.state();
            let branch = state.branch_by_id(visit.branch).map(|branch| branch.name.to_string());
            let branch = branch.unwrap_or_else(|_| visit.branch.to_string());
            let keeper = Keeper::Visit { place: format!("{}/{branch}@{}", visit.project.name, visit.point) };
            Root { layer: visit.start.data.head, keeper, owner: None }
        };
        named.values().map(root).collect()
    }

    /// The visits of a branch, as the API shows them.
    pub(super) fn visit_views(&self, branch: BranchId) -> Vec<api::Visit> {
        let mut visits: Vec<Arc<Visit>> = self.visits.named.lock().values().cloned().collect();
        visits.retain(|visit| visit.branch == branch);
        visits.sort_by_key(|visit| visit.since);
        let view = |visit: Arc<Visit>| api::Visit {
            id: visit.id,
            point: visit.point.to_string(),
            since: visit.since,
            state: if visit.state.lock().open.is_some() { "open" } else { "named" }.to_owned(),
            sessions: self.clients.sessions(visit.id),
        };
        visits.into_iter().map(view).collect()
    }
}

/// How a visit is started: as a copy beside its branch.
fn start_of(state: &ProjectState, branch: BranchId, id: BranchId, head: LayerId) -> Result<Start> {
    let Facts { pg_major, verifier, .. } = state.facts()?;
    let known = state.branch_by_id(branch)?;
    Ok(Start {
        data: Line { branch: id, line: 0, head, epoch: 0 },
        pg_major: *pg_major,
        head_end: known.history.seal_of(head).and_then(|seal| seal.end),
        earlier: Vec::new(),
        begun_here: true,
        fork: true,
        durability: Durability::Local,
        verifier: verifier.clone(),
    })
}

#[cfg(test)]
mod tests;
