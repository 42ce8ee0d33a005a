//! When a request is sent again, and how often that may be.
//!
//! A request that may work later ([`Passing`]) is sent again after a pause that doubles and is jittered, until the
//! call's patience is over. A budget over all calls keeps retries from becoming the load that a struggling store dies
//! of: each takes a token, which comes back if the call is answered in the end. Where no token is left, a call is
//! repeated after the longest pause only: a store that fails a third of all requests still gets everybody's work done,
//! and one that fails all of them hears little.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::fault::{Fault, Kind, Passing};

/// LIMIT: the first pause: a lost connection is made again at once; who says "slow down" means it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const FIRST_PAUSE_THROTTLED: Duration = Duration::from_millis(400);

/// LIMIT: no pause is longer, so that a call notices soon that the store is back.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// LIMIT: enough for every call under way on a busy node to be repeated a few times when a store restarts.
const TOKENS_MAX: f64 = 100.0;

/// What an answer earns besides: after an outage retries are soon as quick as before.
const TOKENS_PER_ANSWER: f64 = 0.1;

/// The retries of all calls on one store.
#[derive(Debug)]
pub(super) struct Retries {
    tokens: Mutex<f64>,
}

impl Retries {
    pub(super) fn new() -> Self {
        Self { tokens: Mutex::new(TOKENS_MAX) }
    }

    /// Makes attempts until one is answered; begins none once `patience` is over.
    pub(super) async fn run<T, F>(&self, patience: Duration, mut attempt: impl FnMut() -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let began = Instant::now();
        let (mut failures, mut spent) = (0, 0.0);
        loop {
            let fault = match attempt().await {
                Ok(answer) => {
                    self.earn(spent + TOKENS_PER_ANSWER);
                    return Ok(answer);
                }
                Err(fault) => fault,
            };
            let Kind::Passing(why) = fault.kind else { return Err(fault) };
            let granted = self.spend();
            let pause = if granted { pause(why, failures) } else { half_to_all_of(PAUSE_MAX) };
            spent += f64::from(u8::from(granted));
            if began.elapsed() + pause > patience {
                return Err(fault);
            }
            failures += 1;
            metrics::counter!("ebb_storage_bucket_retries_total", "why" => why.name()).increment(1);
            tracing::debug!(why = why.name(), failures, fault = %fault.message, "a request to the bucket is repeated");
            sleep(pause).await;
        }
    }

    fn earn(&self, earned: f64) {
        let mut tokens = self.tokens.lock();
        *tokens = (*tokens + earned).min(TOKENS_MAX);
    }

    fn spend(&self) -> bool {
        let mut tokens = self.tokens.lock();
        let granted = *tokens >= 1.0;
        if granted {
            *tokens -= 1.0;
        } else {
            metrics::counter!("ebb_storage_bucket_retries_postponed_total").increment(1);
        }
        granted
    }
}

/// Between half and all of a time that doubles.
fn pause(why: Passing, failures: u32) -> Duration {
    let first = if why == Passing::Throttled { FIRST_PAUSE_THROTTLED } else { FIRST_PAUSE };
    half_to_all_of(first.saturating_mul(1 << failures.min(16)).min(PAUSE_MAX))
}

fn half_to_all_of(longest: Duration) -> Duration {
    rand::random_range(longest / 2..=longest)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(15);

    fn fault(kind: Kind) -> Fault {
        Fault::new(kind, "a fault")
    }

    /// Runs attempts that fail `failures` times; answers how many were made, and whether the last one worked.
    async fn attempts(retries: &Retries, failures: u32, kind: Kind) -> (u32, bool) {
        let made = Cell::new(0);
        let attempt = || {
            made.set(made.get() + 1);
            let failed = made.get() <= failures;
            async move { if failed { Err(fault(kind)) } else { Ok(()) } }
        };
        let worked = retries.run(PATIENCE, attempt).await.is_ok();
        (made.get(), worked)
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_may_pass_is_tried_again() {
        let retries = Retries::new();
        assert_eq!(attempts(&retries, 3, Kind::Passing(Passing::Connection)).await, (4, true));
        for kind in [Kind::Exists, Kind::NoSuchKey, Kind::Denied, Kind::Refused, Kind::Range] {
            assert_eq!(attempts(&retries, 3, kind).await, (1, false), "{kind:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_gives_up_when_its_patience_is_over() {
        let began = Instant::now();
        let (made, worked) = attempts(&Retries::new(), u32::MAX, Kind::Passing(Passing::Throttled)).await;
        assert!(!worked && (8..25).contains(&made), "{made} attempts");
        assert!(began.elapsed() <= PATIENCE, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_fails_everything_is_asked_once_a_second_by_each_call() {
        let (retries, began) = (Retries::new(), Instant::now());
        let mut repeated = 0;
        for _ in 0..100 {
            repeated += attempts(&retries, u32::MAX, Kind::Passing(Passing::Server)).await.0 - 1;
        }
        let most = TOKENS_MAX + began.elapsed().as_secs_f64() / (PAUSE_MAX / 2).as_secs_f64();
        assert!(f64::from(repeated) <= most, "{repeated} of {most}");
        // The outage is over: what is repeated has to wait only until others were answered.
        for _ in 0..20 {
            assert_eq!(attempts(&retries, 0, Kind::Refused).await, (1, true));
        }
        let began = Instant::now();
        assert_eq!(attempts(&retries, 1, Kind::Passing(Passing::Server)).await, (2, true));
        assert!(began.elapsed() <= FIRST_PAUSE, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_fails_often_gets_all_work_done_and_costs_no_tokens() {
        let (retries, began) = (Retries::new(), Instant::now());
        for _ in 0..1000 {
            assert_eq!(attempts(&retries, 2, Kind::Passing(Passing::Server)).await, (3, true));
        }
        assert!(began.elapsed() <= (FIRST_PAUSE * 3) * 1000, "{:?}", began.elapsed());
    }

    #[test]
    fn pauses_double_and_are_jittered() {
        for (failures, longest) in [(0, 50), (1, 100), (5, 1600), (6, 2000), (u32::MAX, 2000)] {
            let longest = Duration::from_millis(longest);
            let pauses: Vec<_> = (0..50).map(|_| pause(Passing::Server, failures)).collect();
            assert!(pauses.iter().all(|pause| (longest / 2..=longest).contains(pause)), "{failures}: {pauses:?}");
            assert!(pauses.iter().any(|pause| *pause != pauses[0]), "{failures}: no jitter");
        }
    }
}
