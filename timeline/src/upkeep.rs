//! What is done for a branch by itself: checkpoints made by a schedule, which of them go again, and drills. Pure.
//!
//! **Schedule.** Time is cut into hours, days and weeks of UTC, weeks beginning on Monday. A checkpoint is due when the
//! finest class in use has none in the period that is now. It is kept as long as it is the newest of one of the newest
//! N periods of its class *that have any*: periods in which nothing changed use up nothing.
//!
//! ```text
//!   hourly=3, daily=2          Mon 22  Mon 23 │ Tue 08  Tue 09  Tue 10
//!   the newest 3 hours                        │   h       h       h
//!   the newest 2 days                    d    │                   d
//! ```
//!
//! What is let go today would not be kept by any later day's rule either, so that it does not matter how often one looks.
//! A schedule that keeps nothing is off: then nothing is made, and nothing goes.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ebb_types::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::drill::{PROBES_MAX, Probe};

/// LIMIT: more of a class than this is an archive; a year of days, a month of hours fit.
const KEEP_MAX: u32 = 1000;

/// LIMIT: more often than this, one drill would not be over before the next.
const DRILL_EVERY_MIN_MS: u64 = 1000;

/// LIMIT: what is proven less often than once a year is not proven; more is a mistake in the unit.
const DRILL_EVERY_MAX_MS: u64 = 366 * 24 * 3600 * 1000;

/// LIMIT: how soon a drill that failed is tried again, if its interval is longer: its cause may be gone, and if it is not,
/// the failure stays news.
const DRILL_AGAIN: Duration = Duration::from_secs(3600);

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// The first Monday of 1970 was the fifth of January.
const FIRST_MONDAY: i64 = 4 * DAY;

/// How many automatic checkpoints of each class are kept; none of any: the schedule is off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Schedule {
    /// The newest of so many hours.
    pub hourly: u32,
    /// The newest of so many days.
    pub daily: u32,
    /// The newest of so many weeks.
    pub weekly: u32,
}

impl Schedule {
    /// Whether nothing is made, and nothing goes.
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }

    /// Name, length of a period, where one of them begins, how many are kept; the finest class first.
    fn classes(&self) -> [(&'static str, i64, i64, u32); 3] {
        [
            ("hourly", HOUR, 0, self.hourly),
            ("daily", DAY, 0, self.daily),
            ("weekly", 7 * DAY, FIRST_MONDAY, self.weekly),
        ]
    }

    /// Whether a checkpoint should be made now, the newest automatic one being of this time.
    pub fn is_due(&self, newest: Option<Timestamp>, now: Timestamp) -> bool {
        let Some((_, length, begin, _)) = self.classes().into_iter().find(|(.., keep)| *keep > 0) else { return false };
        newest.is_none_or(|newest| period(newest, length, begin) < period(now, length, begin))
    }

    /// Which of the automatic checkpoints made at these times stay.
    pub fn keeps(&self, made: &[Timestamp]) -> Vec<bool> {
        let mut kept = vec![self.is_off(); made.len()];
        let mut newest_first: Vec<usize> = (0..made.len()).collect();
        newest_first.sort_by_key(|&at| std::cmp::Reverse((made[at], at)));
        for (_, length, begin, keep) in self.classes() {
            let (mut periods, mut last) = (0, None);
            for &at in &newest_first {
                let of = Some(period(made[at], length, begin));
                if last != of {
                    (periods, last) = (periods + 1, of);
                    kept[at] |= periods <= keep;
                }
            }
        }
        kept
    }

    fn fault(&self) -> Option<String> {
        let many = self.classes().into_iter().find(|(.., keep)| *keep > KEEP_MAX)?;
        Some(format!("{} checkpoints can be kept {KEEP_MAX} at most", many.0))
    }
}

fn period(time: Timestamp, length: i64, begin: i64) -> i64 {
    (time.as_second() - begin).div_euclid(length)
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_off() {
            return f.write_str("off");
        }
        let used = self.classes().into_iter().filter(|(.., keep)| *keep > 0);
        let parts: Vec<_> = used.map(|(name, .., keep)| format!("{name}={keep}")).collect();
        f.write_str(&parts.join(","))
    }
}

/// Reads `hourly=24,daily=7,weekly=4`, any part of it, or `off`.
impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut schedule = Self::default();
        if text == "off" {
            return Ok(schedule);
        }
        for part in text.split(',') {
            let wrong = || format!("{part:?} is no part of a schedule (want hourly=24,daily=7,weekly=4, or off)");
            let (class, keep) = part.split_once('=').ok_or_else(wrong)?;
            let keep = keep.trim().parse().map_err(|_| wrong())?;
            match class.trim() {
                "hourly" => schedule.hourly = keep,
                "daily" => schedule.daily = keep,
                "weekly" => schedule.weekly = keep,
                _ => return Err(wrong()),
            }
        }
        schedule.fault().map_or(Ok(schedule), Err)
    }
}

/// A branch's policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// Which checkpoints are made by themselves.
    pub checkpoints: Schedule,
    /// The time between two drills, if there are any.
    pub drill_every: Option<Duration>,
    /// What each drill of it asks.
    pub probes: Vec<Probe>,
}

/// Another policy: what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpkeepChange {
    /// Which checkpoints are made by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<Schedule>,
    /// Milliseconds between two drills; 0: none are made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_every_ms: Option<u64>,
    /// What each drill asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probes: Option<Vec<Probe>>,
}

impl UpkeepChange {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Why it makes no sense, if it makes none.
    pub fn fault(&self) -> Option<String> {
        let every = self.drill_every_ms.filter(|ms| *ms != 0);
        if every.is_some_and(|ms| !(DRILL_EVERY_MIN_MS..=DRILL_EVERY_MAX_MS).contains(&ms)) {
            return Some("drill_every_seconds must be 0, or at least 1 and at most a year".to_owned());
        }
        let probes = self.probes.as_deref().unwrap_or_default();
        if probes.len() > PROBES_MAX {
            return Some(format!("a branch has at most {PROBES_MAX} probes"));
        }
        self.checkpoints.and_then(|schedule| schedule.fault()).or_else(|| probes.iter().find_map(Probe::fault))
    }
}

impl Upkeep {
    /// Takes a change in.
    pub fn change(&mut self, change: &UpkeepChange) {
        self.checkpoints = change.checkpoints.unwrap_or(self.checkpoints);
        if let Some(ms) = change.drill_every_ms {
            self.drill_every = Some(ms).filter(|ms| *ms != 0).map(Duration::from_millis);
        }
        if let Some(probes) = &change.probes {
            self.probes.clone_from(probes);
        }
    }

    /// Whether a drill should be made now, the last one having ended then, and failed or not.
    pub fn drill_is_due(&self, last: Option<(Timestamp, bool)>, now: Timestamp) -> bool {
        let Some(every) = self.drill_every else { return false };
        let Some((at, failed)) = last else { return true };
        let wait = if failed { every.min(DRILL_AGAIN) } else { every };
        at.saturating_add(wait).is_ok_and(|next| next <= now)
    }
}

#[cfg(test)]
mod tests;
