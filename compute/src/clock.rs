//! A clock that the manager and its units share, so that a unit can count from the moment it was asked for.

use std::env;
use std::process::Command;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Carries the moment of asking into the unit: microseconds of the machine's monotonic clock.
const ASKED_VARIABLE: &str = "EBB_UNIT_ASKED_US";

/// The machine's monotonic clock.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

/// Tells a unit about to be spawned that it is asked for now.
pub(crate) fn ask_now(command: &mut Command) {
    command.env(ASKED_VARIABLE, now().as_micros().to_string());
}

/// The ended stages of a wake.
#[derive(Debug)]
pub(crate) struct Stages {
    asked: Duration,
    ended: Vec<(String, u64)>,
}

impl Stages {
    /// Counts from when this unit was asked for, or from now if nobody said.
    pub fn since_asked() -> Self {
        let now = now();
        let told = env::var(ASKED_VARIABLE).ok().and_then(|text| text.parse().ok()).map(Duration::from_micros);
        Self { asked: told.filter(|asked| *asked <= now).unwrap_or(now), ended: Vec::new() }
    }

    /// Notes that a stage has ended.
    pub fn end(&mut self, stage: &str) {
        let micros = now().saturating_sub(self.asked).as_micros();
        self.ended.push((stage.to_owned(), u64::try_from(micros).unwrap_or(u64::MAX)));
    }

    /// Every stage so far and when it ended, in microseconds since the unit was asked for.
    pub fn ended(&self) -> Vec<(String, u64)> {
        self.ended.clone()
    }
}
