//! Where the time goes that a client is held: measured by stage, and told when it is long.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What a client waits for, in the order it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Stage {
    /// For a fence to be lowered, or between two tries.
    Gate,
    /// For the compute to answer.
    Wake,
    /// For a backend of its own.
    Start,
    /// For the session's state to be given back.
    Replay,
}

const STAGES: [&str; 4] = ["gate", "wake", "start", "replay"];

/// One wait of one client. Clones are the same wait.
#[derive(Debug, Clone)]
pub struct Wait(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    stage: Stage,
    entered: Instant,
    spent: [Duration; 4],
}

impl Wait {
    /// Begins at the gate.
    pub fn begin() -> Self {
        Self(Arc::new(Mutex::new(Inner { stage: Stage::Gate, entered: Instant::now(), spent: [Duration::ZERO; 4] })))
    }

    /// Goes over to another stage; a stage may be entered again.
    pub fn enter(&self, stage: Stage) {
        self.0.lock().enter(stage);
    }

    /// Ends: counts it, and says so in the log if it took longer than `slow`.
    pub fn over(&self, slow: Duration, served: bool) {
        let (stage, spent) = {
            let mut inner = self.0.lock();
            let stage = inner.stage;
            inner.enter(stage);
            (stage, inner.spent)
        };
        for (name, time) in STAGES.into_iter().zip(spent) {
            metrics::histogram!("ebb_proxy_wait_stage_seconds", "stage" => name).record(time.as_secs_f64());
        }
        let total: Duration = spent.iter().sum();
        if total < slow {
            return;
        }
        let [gate_ms, wake_ms, start_ms, replay_ms] = spent.map(|time| time.as_millis() as u64);
        let (total_ms, last) = (total.as_millis() as u64, STAGES[stage as usize]);
        tracing::warn!(total_ms, gate_ms, wake_ms, start_ms, replay_ms, last, served, "a client waited long");
    }
}

impl Inner {
    fn enter(&mut self, stage: Stage) {
        let now = Instant::now();
        self.spent[self.stage as usize] += now - self.entered;
        (self.stage, self.entered) = (stage, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_counted_where_it_was_spent() {
        let wait = Wait::begin();
        std::thread::sleep(Duration::from_millis(2));
        wait.enter(Stage::Wake);
        wait.enter(Stage::Start);
        let spent = wait.0.lock().spent;
        assert!(spent[0] >= Duration::from_millis(2));
        assert!(spent[1] < spent[0]);
        assert_eq!(spent[2..], [Duration::ZERO; 2]);
    }
}
