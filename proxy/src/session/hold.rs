//! Holding a client until there is a backend for it: at the gate, and while its compute wakes and a backend starts.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::client::Client;
use super::end::End;
use crate::backend::{Backend, StartError, encoded, relayed_error};
use crate::branch::{Gate, Standing};
use crate::calloff::{CalledOff, Next};
use crate::endpoints::{Awake, EndpointError};
use crate::errors::Said;
use crate::waits::{Stage, Wait};

/// After how long a wait deserves a word.
const NOTICE_AFTER: Duration = Duration::from_secs(1);
/// Between two tries to reach a compute that should be there.
pub const RETRY_AFTER: Duration = Duration::from_millis(20);

/// One wait of a client, within its wake budget.
#[derive(Debug)]
pub struct Hold {
    /// Since when.
    pub begun: Instant,
    budget: Duration,
    notice_at: Instant,
}

impl Hold {
    /// Begins now.
    pub fn begin(budget: Duration) -> Self {
        let begun = Instant::now();
        Self { begun, budget, notice_at: begun + NOTICE_AFTER }
    }

    fn deadline(&self) -> Instant {
        self.begun + self.budget
    }
}

/// A try to start a backend that came to nothing.
#[derive(Debug)]
pub enum StartFailed {
    /// The compute was not woken.
    Endpoint(EndpointError),
    /// The role is none of those that it takes.
    NotAdmitted,
    /// It was, and no backend became ready.
    Start {
        /// Of that compute.
        generation: u64,
        /// Why.
        error: StartError,
    },
}

impl StartFailed {
    /// The generation of a compute that does not answer, or not yet.
    ///
    /// # Errors
    /// What it means to the client, if the next try would come to the same.
    pub fn unreachable(self, role: &str) -> Result<u64, End> {
        let (generation, error) = match self {
            StartFailed::Endpoint(error) => return Err(End::Say(error.into())),
            StartFailed::NotAdmitted => return Err(End::Say(Said::not_admitted(role))),
            StartFailed::Start { generation, error } => (generation, error),
        };
        match error {
            StartError::Unreachable(error) => tracing::debug!(%error, generation, "compute does not answer"),
            StartError::NotNow => {}
            StartError::Refused(body) => return Err(End::Pass(relayed_error(&body))),
            StartError::Strange(what) => {
                tracing::error!(what, "compute answered with something unexpected");
                return Err(End::Say(Said::strange_backend(what)));
            }
        }
        Ok(generation)
    }
}

impl Client {
    /// Wakes the compute, connects and starts a backend. The answer borrows nothing, so that the client can be talked to
    /// meanwhile; dropped, it lets the wake go on and the backend go.
    pub fn start(&self, wait: &Wait) -> impl Future<Output = Result<(Awake, Backend), StartFailed>> + Send + use<> {
        let (shared, branch, seat) = (self.shared.clone(), self.branch.clone(), self.seat.clone());
        let (startup, wait) = (self.startup.clone(), wait.clone());
        async move {
            wait.enter(Stage::Wake);
            let awake = branch.wake(&shared.tasks).await.map_err(StartFailed::Endpoint)?;
            if awake.admits.as_ref().is_some_and(|roles| !roles.contains(&seat.sitter.role)) {
                return Err(StartFailed::NotAdmitted);
            }
            let generation = awake.generation;
            wait.enter(Stage::Start);
            match Backend::start(&awake.socket, &startup).await {
                Ok(backend) => Ok((awake, backend)),
                Err(error) => Err(StartFailed::Start { generation, error }),
            }
        }
    }

    /// Holds the client while something is tried. Nothing if a fence came up, or the client wants it no more: then the try
    /// is dropped.
    ///
    /// # Errors
    /// If the session ends.
    pub async fn hold<T>(&mut self, trying: impl Future<Output = T>, hold: &mut Hold) -> Result<Option<T>, End> {
        let mut trying = Box::pin(trying);
        let seat = self.seat.clone();
        loop {
            tokio::select! {
                result = &mut trying => return Ok(Some(result)),
                () = seat.attention() => {
                    self.obey()?;
                    if seat.is_called_off() || self.is_shut_out() {
                        return Ok(None);
                    }
                }
                () = sleep_until(hold.notice_at) => self.notice(hold).await?,
                () = sleep_until(hold.deadline()) => {
                    return Err(End::Say(Said::still_waking(hold.budget, self.branch.usual_wake())));
                }
            }
        }
    }

    /// Whether the gate has moved so that a try is to be given up. Says, where that keeps a fence from rising, that the
    /// client has work.
    pub fn is_shut_out(&self) -> bool {
        match self.branch.gate() {
            Gate::Open => false,
            // The client waits for the very compute that is to be suspended.
            gate if gate.is_refusable() => {
                self.branch.stand(self.conn(), Standing::Busy);
                false
            }
            Gate::Gathering(_) | Gate::Detaching | Gate::Closed => true,
        }
    }

    /// Holds the client at the gate until it moves, or between two tries. Answers whether its time is up.
    ///
    /// # Errors
    /// If the client is gone.
    pub async fn hold_at_gate(&mut self, retry_after: Duration, hold: &mut Hold) -> Result<bool, End> {
        let pause = if self.branch.gate() == Gate::Open { retry_after } else { hold.budget };
        tokio::select! {
            () = self.seat.attention() => {}
            () = sleep(pause) => {}
            () = sleep_until(hold.notice_at) => self.notice(hold).await?,
            () = sleep_until(hold.deadline()) => return Ok(true),
        }
        Ok(false)
    }

    /// Throws away what of these bytes belongs to a turn that was cancelled before there was a backend for it, and answers
    /// in Postgres' place. Answers how many do, and whether the turn is over.
    ///
    /// # Errors
    /// If the session ends.
    pub async fn throw_away(&mut self, turn: &mut CalledOff, bytes: &[u8]) -> Result<(usize, bool), End> {
        let step = turn.take(bytes).map_err(|what| End::Say(Said::malformed(&what.to_string())))?;
        self.send(&step.answer).await?;
        match step.next {
            Next::Over => Ok((step.taken, true)),
            Next::More => self.obey().map(|()| (step.taken, false)),
            Next::Terminated => Err(End::Silent),
        }
    }

    /// What a client is told whose time is up.
    pub fn held_too_long(&self, hold: &Hold) -> Said {
        match self.branch.gate() {
            Gate::Open => Said::still_waking(hold.budget, self.branch.usual_wake()),
            _ => Said::still_fenced(hold.budget),
        }
    }

    /// Tells the client, once, that it is waiting.
    async fn notice(&mut self, hold: &mut Hold) -> Result<(), End> {
        hold.notice_at = Instant::now() + hold.budget * 2;
        if !self.notices {
            return Ok(());
        }
        self.send(&encoded(&Said::waiting(self.branch.gate() != Gate::Open))).await
    }
}
