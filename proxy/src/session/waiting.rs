//! A session that gets a backend: wake, connect, start, and give back what the client had.

use std::sync::Arc;
use std::time::Duration;

use ebb_types::SqlState;

use super::client::parameter_status;
use super::hold::{Hold, RETRY_AFTER, StartFailed};
use super::{End, Session};
use crate::backend::Backend;
use crate::branch::{Doing, Gate, Standing};
use crate::calloff::CalledOff;
use crate::cancel::CancelTarget;
use crate::endpoints::{Awake, EndpointError};
use crate::errors::Said;
use crate::hibernate::{self, Kept, ReplayError, Replayed};
use crate::replication::{self, History, Resume};
use crate::unix::UnixStream;
use crate::waits::{Stage, Wait};

/// LIMIT: between two wakes, after one that failed for a reason that may pass.
const WAKE_AGAIN_MIN: Duration = Duration::from_millis(250);
const WAKE_AGAIN_MAX: Duration = Duration::from_secs(2);

/// What became of a try to get a backend.
enum Tried {
    Attached(Box<Attached>),
    /// Nobody answered, or not yet; or a fence came up.
    Unreachable,
    /// There is none now, for a reason that may pass.
    NotNow(EndpointError),
}

/// A backend that has been brought to where the client left off.
struct Attached {
    awake: Awake,
    backend: Backend,
    replayed: Replayed,
    history: Option<History>,
}

/// What a new backend is brought to.
struct Again {
    /// The session's state; `None` for its first backend.
    kept: Option<Arc<Kept>>,
    /// On a replication connection: where the stream was.
    stream: Option<Resume>,
}

enum TryError {
    Start(StartFailed),
    Replay { generation: u64, error: ReplayError },
}

impl Session {
    /// Gets a backend and brings it to where the client left off, within the wake budget; or none, if the client does not
    /// want one any more.
    pub(super) async fn attach(&mut self) -> Result<Option<UnixStream>, End> {
        self.client.seat.set_doing(Doing::Waiting);
        if self.kept.is_some() && !self.up.is_empty() && self.walstream.is_none() {
            self.client.seat.begin_wait();
        }
        let wait = Wait::begin();
        let attached = self.attach_in_time(&wait).await;
        wait.over(self.client.shared.config.slow_wake, attached.is_ok());
        match attached? {
            Some(attached) => self.introduce(*attached).await.map(Some),
            None => Ok(None),
        }
    }

    /// Tries until it has one, the client wants none any more, or its time is up.
    async fn attach_in_time(&mut self, wait: &Wait) -> Result<Option<Box<Attached>>, End> {
        let mut hold = Hold::begin(self.client.shared.config.wake_budget);
        let mut not_now = None;
        let mut retry_after = RETRY_AFTER;
        loop {
            self.client.obey()?;
            if self.client.seat.is_called_off() {
                return Ok(None);
            }
            if self.client.branch.begin_work(self.client.conn()) {
                match self.attach_once(&mut hold, wait).await? {
                    Tried::Attached(attached) => return Ok(Some(attached)),
                    _ if self.client.seat.is_called_off() => return Ok(None),
                    Tried::Unreachable => retry_after = RETRY_AFTER,
                    Tried::NotNow(error) => {
                        retry_after = (retry_after * 2).clamp(WAKE_AGAIN_MIN, WAKE_AGAIN_MAX);
                        not_now = Some(error);
                    }
                }
                wait.enter(Stage::Gate);
            }
            if self.client.hold_at_gate(retry_after, &mut hold).await? {
                return Err(End::Say(match not_now {
                    Some(error) if self.client.branch.gate() == Gate::Open => error.into(),
                    _ => self.client.held_too_long(&hold),
                }));
            }
        }
    }

    /// One try. A fence that comes up meanwhile calls it off.
    async fn attach_once(&mut self, hold: &mut Hold, wait: &Wait) -> Result<Tried, End> {
        let again = Again { kept: self.kept.clone(), stream: self.walstream.as_ref().map(|stream| stream.resume()) };
        let trying = bring_back(self.client.start(wait), again, wait.clone());
        let failed = match self.client.hold(trying, hold).await? {
            Some(Ok(attached)) => return Ok(Tried::Attached(Box::new(attached))),
            Some(Err(failed)) => failed,
            None => {
                self.client.branch.stand(self.client.conn(), Standing::Apart);
                return Ok(Tried::Unreachable);
            }
        };
        let generation = match failed {
            // What says so itself may be gone with the next try; anything else is the same again.
            TryError::Start(StartFailed::Endpoint(error)) if error.sqlstate == SqlState::CANNOT_CONNECT_NOW => {
                self.client.branch.stand(self.client.conn(), Standing::Apart);
                return Ok(Tried::NotNow(error));
            }
            TryError::Start(failed) => failed.unreachable(&self.client.seat.sitter.role)?,
            TryError::Replay { generation, error: ReplayError::Lost } => generation,
            TryError::Replay { error: ReplayError::Refused(why), .. } => {
                metrics::counter!("ebb_proxy_resumes_total", "result" => "error").increment(1);
                return Err(End::Say(Said::not_replayed(&why)));
            }
        };
        self.client.branch.forget(generation);
        self.client.branch.stand(self.client.conn(), Standing::Apart);
        Ok(Tried::Unreachable)
    }

    /// Answers what the client wanted a backend for, as it was cancelled before there was one.
    pub(super) async fn call_off(&mut self) -> Result<(), End> {
        let mut turn = CalledOff::default();
        loop {
            let (taken, over) = self.client.throw_away(&mut turn, self.up.held()).await?;
            self.up.release(taken);
            self.up.discard_released();
            if over {
                return Ok(());
            }
            tokio::select! {
                () = self.client.seat.attention() => {}
                read = self.up.fill(&mut self.client.stream) => match read {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return Err(End::Silent),
                },
            }
        }
    }

    /// Tells the client what it has to know of its new backend: all of it the first time, changes later.
    async fn introduce(&mut self, attached: Attached) -> Result<UnixStream, End> {
        let Attached { awake, backend, replayed, history } = attached;
        if let (Some(walstream), Some(history)) = (&mut self.walstream, history) {
            walstream.set_history(history);
        }
        let target = CancelTarget { socket: awake.socket, key: backend.key, _lease: None };
        self.generation = awake.generation;
        self.client.seat.set_backend(awake.generation, Some(target));

        let mut out = Vec::new();
        for (name, value) in last_values(backend.parameters, replayed.parameters) {
            if self.client.conversation.note_parameter(&name, &value) {
                parameter_status(&mut out, &name, &value);
            }
        }
        out.extend_from_slice(&backend.notices);
        let given = self.kept.take();
        let first = given.is_none();
        self.known = Some(given.unwrap_or_default());
        self.client.conversation.listen_anew();
        if first {
            self.client.introduce(&mut out);
        } else {
            metrics::counter!("ebb_proxy_resumes_total", "result" => "ok").increment(1);
            for (name, why) in replayed.lost_statements {
                Said::statement_not_replayed(&name, &why).encode(&mut out);
            }
        }
        self.client.send(&out).await?;
        Ok(backend.stream)
    }
}

/// Brings a backend that is being started to where the client left off. Cancel-safe in that the backend is dropped then.
async fn bring_back(
    starting: impl Future<Output = Result<(Awake, Backend), StartFailed>>,
    again: Again,
    wait: Wait,
) -> Result<Attached, TryError> {
    let (awake, mut backend) = starting.await.map_err(TryError::Start)?;
    let failed = |error| TryError::Replay { generation: awake.generation, error };
    let (mut replayed, mut history) = (Replayed::default(), None);
    match (&again.kept, &again.stream) {
        // Walsenders take no questions of the extended protocol, and their sessions have no state of that kind.
        (_, Some(stream)) => history = Some(replication::resume(&mut backend.stream, stream).await.map_err(failed)?),
        (Some(kept), None) => {
            wait.enter(Stage::Replay);
            replayed = hibernate::replay(&mut backend.stream, kept).await.map_err(failed)?;
        }
        (None, None) => {}
    }
    Ok(Attached { awake, backend, replayed, history })
}

/// Parameters as a start-up and a replay left them, each once, in the start-up's order.
fn last_values(mut first: Vec<(Vec<u8>, Vec<u8>)>, then: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    for (name, value) in then {
        match first.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => first.push((name, value)),
        }
    }
    first
}
