//! The state machines of the service: small enums with one total `next` each.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// An event that cannot happen in a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event} cannot happen to {machine} that is {state}")]
pub struct IllegalEvent {
    machine: &'static str,
    state: String,
    event: String,
}

fn illegal<T: std::fmt::Debug>(machine: &'static str, state: T, event: impl std::fmt::Debug) -> IllegalEvent {
    IllegalEvent { machine, state: format!("{state:?}"), event: format!("{event:?}") }
}

/// How far an operation has come.
///
/// ```text
///            Commit            Finish
///   Begun ───────────► Committed ─────► Done      (from Committed there is only forward)
///     │ └────── Finish ──────────────────► Done
///     └──────── Undo ───────────────────► Undone
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Recorded; nothing that lasts has changed.
    Begun,
    /// Its effect is recorded; the rest only follows from it.
    Committed,
    /// Over.
    Done,
    /// Over, as if it had never been begun.
    Undone,
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PhaseEvent {
    /// Its point of no return is recorded.
    Commit,
    /// Nothing is left to do.
    Finish,
    /// It was taken back.
    Undo,
}

impl Phase {
    /// The one transition function.
    ///
    /// # Errors
    /// If the event cannot happen in this state.
    pub fn next(self, event: PhaseEvent) -> Result<Self, IllegalEvent> {
        match (self, event) {
            (Phase::Begun, PhaseEvent::Commit) => Ok(Phase::Committed),
            (Phase::Begun | Phase::Committed, PhaseEvent::Finish) => Ok(Phase::Done),
            (Phase::Begun, PhaseEvent::Undo) => Ok(Phase::Undone),
            (Phase::Committed, PhaseEvent::Commit | PhaseEvent::Undo) | (Phase::Done | Phase::Undone, _) => {
                Err(illegal("an operation", self, event))
            }
        }
    }
}

/// What has become of a release.
///
/// ```text
///   Deploying ── Deploy ──► Deployed ──┐
///       │                    │ Fail    │
///       └─────── Fail ────► Failed ────┴─ TakeBack ──► RolledBack
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseStage {
    /// Under way.
    Deploying,
    /// Its migrations are in, its code was switched to.
    Deployed,
    /// A step failed, or its code was taken back. Migrations before the failed one stay until a rollback takes the data
    /// back.
    Failed,
    /// A rollback went back to before it.
    RolledBack,
}

/// What happens to a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseEvent {
    /// The code was switched to it.
    Deploy,
    /// A step failed, or its code was taken back alone.
    Fail,
    /// A rollback went back to before it.
    TakeBack,
}

impl ReleaseStage {
    /// The one transition function.
    ///
    /// # Errors
    /// If the event cannot happen in this state.
    pub fn next(self, event: ReleaseEvent) -> Result<Self, IllegalEvent> {
        match (self, event) {
            (ReleaseStage::Deploying, ReleaseEvent::Deploy) => Ok(ReleaseStage::Deployed),
            (ReleaseStage::Deploying | ReleaseStage::Deployed, ReleaseEvent::Fail) => Ok(ReleaseStage::Failed),
            (ReleaseStage::Deployed | ReleaseStage::Failed, ReleaseEvent::TakeBack) => Ok(ReleaseStage::RolledBack),
            (ReleaseStage::Deploying, ReleaseEvent::TakeBack)
            | (ReleaseStage::Deployed | ReleaseStage::Failed, ReleaseEvent::Deploy)
            | (ReleaseStage::Failed, ReleaseEvent::Fail)
            | (ReleaseStage::RolledBack, _) => Err(illegal("a release", self, event)),
        }
    }

    /// The state as the API names it.
    pub fn as_str(self) -> &'static str {
        match self {
            ReleaseStage::Deploying => "deploying",
            ReleaseStage::Deployed => "deployed",
            ReleaseStage::Failed => "failed",
            ReleaseStage::RolledBack => "rolled_back",
        }
    }
}

/// What a project is in the catalog.
///
/// ```text
///   Reserved ── Open ──► Live ── Delete ──► Deleting ── Forget ──► (gone, the name is free)
///       └──── Forget ──► (gone)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The name is taken; secret and ledger are being made.
    Reserved,
    /// It exists.
    Live,
    /// There is no way back; computes and local files are going.
    Deleting,
    /// Nothing but its history is left.
    Gone,
}

/// What happens to a project in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StandingEvent {
    /// Its ledger and secret exist.
    Open,
    /// Its deletion was confirmed.
    Delete,
    /// Making it was given up, or deleting it is complete.
    Forget,
}

impl Standing {
    /// The one transition function.
    ///
    /// # Errors
    /// If the event cannot happen in this state.
    pub fn next(self, event: StandingEvent) -> Result<Self, IllegalEvent> {
        match (self, event) {
            (Standing::Reserved, StandingEvent::Open) => Ok(Standing::Live),
            (Standing::Live, StandingEvent::Delete) => Ok(Standing::Deleting),
            (Standing::Reserved | Standing::Deleting, StandingEvent::Forget) => Ok(Standing::Gone),
            (Standing::Reserved, StandingEvent::Delete)
            | (Standing::Live, StandingEvent::Open | StandingEvent::Forget)
            | (Standing::Deleting, StandingEvent::Open | StandingEvent::Delete)
            | (Standing::Gone, _) => Err(illegal("a project", self, event)),
        }
    }
}

/// The compute of one branch, as this node knows it. Not recorded: it is found again by looking.
///
/// ```text
///                 ┌───────────── Failed ─────────────┐
///                 ▼                                  │
///   Suspended ── Wake ──► Waking ── Ready ──► Active ┴─ Suspend ──► Suspending ── Stopped ──► Suspended
///       └─────── Ready (adopted) ──────────────►│ ▲                     │
///       ▲                                       │ └──── KeptAwake ──────┘
///       └──────────────── Lost ─────────────────┘
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compute {
    /// No process.
    Suspended,
    /// A unit is being started.
    Waking,
    /// Postgres accepts connections.
    Active(Serving),
    /// Clients are being set aside, then Postgres stops.
    Suspending(Serving),
}

/// A running compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serving {
    /// Counts the computes of the branch since the service started.
    pub generation: u64,
    /// The socket of its Postgres.
    pub socket: PathBuf,
}

/// What happens to a compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ComputeEvent {
    /// Somebody needs it.
    Wake,
    /// It answers.
    Ready(Serving),
    /// It did not come up.
    Failed,
    /// It is to stop.
    Suspend,
    /// Clients did not let it, or stopping failed while it still runs.
    KeptAwake,
    /// It has stopped and is sealed.
    Stopped,
    /// The unit of this generation is gone by itself.
    Lost {
        /// Which one.
        generation: u64,
    },
}

impl Compute {
    /// The one transition function.
    ///
    /// # Errors
    /// If the event cannot happen in this state.
    pub fn next(&self, event: ComputeEvent) -> Result<Self, IllegalEvent> {
        match (self, event) {
            (Compute::Suspended, ComputeEvent::Wake) => Ok(Compute::Waking),
            (Compute::Waking | Compute::Suspended, ComputeEvent::Ready(serving)) => Ok(Compute::Active(serving)),
            (Compute::Waking, ComputeEvent::Failed) => Ok(Compute::Suspended),
            (Compute::Active(serving), ComputeEvent::Suspend) => Ok(Compute::Suspending(serving.clone())),
            (Compute::Suspending(serving), ComputeEvent::KeptAwake) => Ok(Compute::Active(serving.clone())),
            (Compute::Suspending(_), ComputeEvent::Stopped) => Ok(Compute::Suspended),
            (Compute::Active(serving) | Compute::Suspending(serving), ComputeEvent::Lost { generation })
                if serving.generation == generation =>
            {
                Ok(Compute::Suspended)
            }
            (_, event) => Err(illegal("a compute", self, event)),
        }
    }

    /// The state as the API names it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Compute::Suspended => "suspended",
            Compute::Waking => "waking",
            Compute::Active(_) => "active",
            Compute::Suspending(_) => "suspending",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    fn table<S: std::fmt::Debug, E: std::fmt::Debug + Clone, N: std::fmt::Debug>(
        states: &[S],
        events: &[E],
        next: impl Fn(&S, E) -> Result<N, IllegalEvent>,
    ) -> String {
        let mut text = String::new();
        for state in states {
            for event in events {
                let to = next(state, event.clone()).map_or_else(|_| "-".to_owned(), |to| format!("{to:?}"));
                writeln!(text, "{state:?} + {event:?} = {to}").unwrap();
            }
        }
        text
    }

    #[test]
    fn every_state_meets_every_event() {
        let serving = |generation| Serving { generation, socket: "s".into() };
        let mut all = table(
            &[Phase::Begun, Phase::Committed, Phase::Done, Phase::Undone],
            &[PhaseEvent::Commit, PhaseEvent::Finish, PhaseEvent::Undo],
            |state, event| state.next(event),
        );
        all += &table(
            &[ReleaseStage::Deploying, ReleaseStage::Deployed, ReleaseStage::Failed, ReleaseStage::RolledBack],
            &[ReleaseEvent::Deploy, ReleaseEvent::Fail, ReleaseEvent::TakeBack],
            |state, event| state.next(event),
        );
        all += &table(
            &[Standing::Reserved, Standing::Live, Standing::Deleting, Standing::Gone],
            &[StandingEvent::Open, StandingEvent::Delete, StandingEvent::Forget],
            |state, event| state.next(event),
        );
        all += &table(
            &[Compute::Suspended, Compute::Waking, Compute::Active(serving(1)), Compute::Suspending(serving(1))],
            &[
                ComputeEvent::Wake,
                ComputeEvent::Ready(serving(2)),
                ComputeEvent::Failed,
                ComputeEvent::Suspend,
                ComputeEvent::KeptAwake,
                ComputeEvent::Stopped,
                ComputeEvent::Lost { generation: 1 },
                ComputeEvent::Lost { generation: 7 },
            ],
            |state, event| state.next(event),
        );
        insta::assert_snapshot!(all);
    }
}
