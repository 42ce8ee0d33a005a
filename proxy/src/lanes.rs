//! The threads that carry the sessions: each a small runtime of its own.
//!
//! A session's task, its two sockets and the blocks it borrows stay with one thread. Nothing is stolen from it and
//! nobody else is woken for it, which on the way of a short query costs more than the query's bytes do.
//!
//! What the rest of Ebb does for a session (finding, waking) runs where the proxy was made, not here: a lane has nothing
//! to do but to relay, and what it is handed may not make it wait.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use async_trait::async_trait;
use ebb_types::{AllowList, BranchId, EndpointName, Point, SqlState};
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

use crate::endpoints::{Awake, Endpoint, EndpointError, Endpoints};

/// LIMIT: one lane for so many processors. Clients and Postgres need the others more: a lane carries what several of
/// them ask for, and the fewer lanes there are, the more of it each finds at one wake-up.
const PROCESSORS_PER_LANE: usize = 4;

/// The threads. Whatever still runs on them ends when they are dropped.
#[derive(Debug)]
pub struct Lanes {
    lanes: Vec<Lane>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Lane {
    handle: Handle,
    held: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

/// A place on a lane, until it is dropped.
#[derive(Debug)]
pub struct Place(Arc<AtomicUsize>);

impl Lanes {
    /// As many lanes as a machine of this size should have.
    pub fn usual() -> usize {
        thread::available_parallelism().map_or(1, |count| count.get().div_ceil(PROCESSORS_PER_LANE))
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// If the system has none left.
    pub fn start(count: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let mut lanes = Self { lanes: Vec::new(), stop: stop.clone() };
        for number in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let handle = runtime.handle().clone();
            let stop = stop.clone();
            let run = move || runtime.block_on(stop.cancelled());
            let thread = thread::Builder::new().name(format!("ebb-lane-{number}")).spawn(run)?;
            lanes.lanes.push(Lane { handle, held: Arc::default(), thread: Some(thread) });
        }
        Ok(lanes)
    }

    /// The lane that carries least.
    pub fn pick(&self) -> (&Handle, Place) {
        let least = self.lanes.iter().min_by_key(|lane| lane.held.load(Ordering::Relaxed));
        let lane = least.expect("there is at least one lane");
        lane.held.fetch_add(1, Ordering::Relaxed);
        (&lane.handle, Place(lane.held.clone()))
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.stop.cancel();
        for lane in &mut self.lanes {
            // Its tasks are dropped where they stand; none of them can keep the thread.
            if lane.thread.take().is_some_and(|thread| thread.join().is_err()) {
                tracing::error!("a lane of the proxy ended by a panic");
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The rest of Ebb, asked from a lane and running where it belongs.
#[derive(Debug)]
pub struct Elsewhere {
    endpoints: Arc<dyn Endpoints>,
    home: Handle,
}

impl Elsewhere {
    /// Over endpoints that run in the current runtime.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(endpoints: Arc<dyn Endpoints>) -> Arc<Self> {
        Arc::new(Self { endpoints, home: Handle::current() })
    }

    /// Cancel-safe in that what was begun goes on.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl Future<Output = Result<T, EndpointError>> + Send + 'static,
    ) -> Result<T, EndpointError> {
        self.home.spawn(question).await.unwrap_or_else(|error| {
            tracing::error!(%error, "a question of the proxy was not answered");
            Err(EndpointError {
                sqlstate: SqlState::INTERNAL_ERROR,
                message: "the server failed to answer".to_owned(),
                detail: None,
                hint: Some("Please report this with the server's log.".to_owned()),
            })
        })
    }
}

#[async_trait]
impl Endpoints for Elsewhere {
    async fn find(&self, name: &EndpointName) -> Result<Endpoint, EndpointError> {
        let (endpoints, name) = (self.endpoints.clone(), name.clone());
        self.ask(async move { endpoints.find(&name).await }).await
    }

    async fn allowed(&self, branch: BranchId) -> Result<AllowList, EndpointError> {
        let endpoints = self.endpoints.clone();
        self.ask(async move { endpoints.allowed(branch).await }).await
    }

    fn mock_secret(&self) -> Option<[u8; 32]> {
        self.endpoints.mock_secret()
    }

    async fn verifier(&self, branch: BranchId, role: &str) -> Result<Option<String>, EndpointError> {
        let (endpoints, role) = (self.endpoints.clone(), role.to_owned());
        self.ask(async move { endpoints.verifier(branch, &role).await }).await
    }

    async fn visit(&self, branch: BranchId, point: &Point) -> Result<BranchId, EndpointError> {
        let (endpoints, point) = (self.endpoints.clone(), point.clone());
        self.ask(async move { endpoints.visit(branch, &point).await }).await
    }

    fn may_answer(&self) -> bool {
        // On the way of every message: asked where it is wanted.
        self.endpoints.may_answer()
    }

    async fn wake(&self, branch: BranchId) -> Result<Awake, EndpointError> {
        let endpoints = self.endpoints.clone();
        self.ask(async move { endpoints.wake(branch).await }).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_session_goes_where_there_are_fewest() {
        let lanes = Lanes::start(2).unwrap();
        let held = || lanes.lanes.iter().map(|lane| lane.held.load(Ordering::Relaxed)).collect::<Vec<_>>();
        let (_, first) = lanes.pick();
        let (_, second) = lanes.pick();
        assert_eq!(held(), [1, 1]);
        drop(first);
        let (_, third) = lanes.pick();
        assert_eq!(held(), [1, 1]);
        drop((second, third));
        assert_eq!(held(), [0, 0]);
    }

    #[derive(Debug)]
    struct NotOurs;

    #[async_trait]
    impl Endpoints for NotOurs {
        async fn find(&self, _: &EndpointName) -> Result<Endpoint, EndpointError> {
            unreachable!("nobody asks")
        }

        async fn allowed(&self, _: BranchId) -> Result<AllowList, EndpointError> {
            unreachable!("nobody asks")
        }

        fn mock_secret(&self) -> Option<[u8; 32]> {
            None
        }

        async fn verifier(&self, _: BranchId, _: &str) -> Result<Option<String>, EndpointError> {
            unreachable!("nobody asks")
        }

        async fn visit(&self, _: BranchId, _: &Point) -> Result<BranchId, EndpointError> {
            unreachable!("nobody asks")
        }

        fn may_answer(&self) -> bool {
            false
        }

        async fn wake(&self, _: BranchId) -> Result<Awake, EndpointError> {
            unreachable!("nobody asks")
        }
    }

    #[tokio::test]
    async fn what_may_not_be_told_may_not_be_told_on_a_lane_either() {
        assert!(!Elsewhere::new(Arc::new(NotOurs)).may_answer());
    }

    #[test]
    fn what_still_runs_ends_with_the_lanes() {
        let lanes = Lanes::start(1).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let (handle, _place) = lanes.pick();
        handle.spawn(async move {
            std::future::pending::<()>().await;
            drop(sender);
        });
        drop(lanes);
        assert!(receiver.recv().is_err());
    }
}
