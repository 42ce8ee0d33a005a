//! Medians, percentiles and the one line a result is printed as.

use std::time::Duration;

/// Measurements of one side.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a measurement, in any unit.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a time, in milliseconds.
    pub fn add_time(&mut self, time: Duration) {
        self.add(time.as_secs_f64() * 1e3);
    }

    /// The value that `percent` of all measurements do not exceed.
    pub fn percentile(&self, percent: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (percent / 100.0 * (sorted.len().saturating_sub(1)) as f64).round() as usize;
        sorted.get(rank).copied().unwrap_or(f64::NAN)
    }

    /// The middle measurement.
    pub fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    /// The largest measurement.
    pub fn max(&self) -> f64 {
        self.percentile(100.0)
    }
}

/// Prints a result: what was measured, both sides, the ratio, and what was hoped for.
pub fn report(what: &str, unit: &str, ebb: f64, peer_name: &str, peer: f64, goal: &str) {
    println!(
        "{what:<44} ebb {ebb:>10.2} {unit:<4} {peer_name} {peer:>10.2} {unit:<4} ratio {:>6.3}  goal {goal}",
        ebb / peer
    );
}

/// Prints two times as [`report`] does, but the ratio of speeds: above one where Ebb was quicker.
pub fn report_speed(what: &str, ebb: f64, peer_name: &str, peer: f64, goal: &str) {
    println!("{what:<44} ebb {ebb:>10.2} ms   {peer_name} {peer:>10.2} ms   speed {:>6.3}  goal {goal}", peer / ebb);
}

/// Prints the heading of a bench: its question, and the conditions.
pub fn heading(question: &str, conditions: &str) {
    println!("\n# {question}\n  {conditions}");
}
