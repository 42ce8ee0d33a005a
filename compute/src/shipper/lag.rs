//! How far the bucket is behind, in bytes and in time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ebb_types::Lsn;

/// LIMIT: what is remembered of a backlog. A longer one is remembered less precisely, and never as younger than it is.
const SEEN_MAX: usize = 128;

/// When WAL was seen to end where.
#[derive(Debug)]
pub(super) struct Lag {
    begun: Instant,
    /// Ends of WAL beyond what was shipped, and when there was WAL up to there for the first time. Both grow.
    seen: VecDeque<(Lsn, Instant)>,
    end: Lsn,
    shipped: Option<Lsn>,
}

impl Lag {
    pub fn new(now: Instant) -> Self {
        Self { begun: now, seen: VecDeque::new(), end: Lsn(0), shipped: None }
    }

    /// WAL ends here.
    pub fn saw(&mut self, end: Lsn, now: Instant) {
        if end <= self.end {
            return;
        }
        self.end = end;
        if self.shipped.is_some_and(|shipped| end <= shipped) {
            return;
        }
        if self.seen.len() >= SEEN_MAX {
            // Of two neighbours the further end and the earlier time.
            let pairs: Vec<_> = self.seen.drain(..).collect();
            self.seen.extend(pairs.chunks(2).map(|pair| (pair[pair.len() - 1].0, pair[0].1)));
        }
        self.seen.push_back((end, now));
    }

    /// The bucket has everything up to here.
    pub fn shipped(&mut self, shipped: Lsn) {
        self.shipped = Some(shipped);
        self.end = self.end.max(shipped);
        while self.seen.front().is_some_and(|(end, _)| *end <= shipped) {
            self.seen.pop_front();
        }
    }

    /// The position up to which the bucket has everything, if that is known.
    pub fn position(&self) -> Option<Lsn> {
        self.shipped
    }

    /// The bytes that the bucket lacks, if that is known, and for how long it has lacked the oldest of them.
    pub fn behind(&self, now: Instant) -> (Option<u64>, Duration) {
        let since = match (self.shipped, self.seen.front()) {
            (None, _) => self.begun,
            (_, Some((_, first))) => *first,
            (_, None) => now,
        };
        (self.shipped.map(|shipped| self.end.0 - shipped.0), now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_shipped_is_not_behind_and_what_was_not_ages() {
        let begun = Instant::now();
        let at = |second| begun + Duration::from_secs(second);
        let mut lag = Lag::new(begun);
        lag.saw(Lsn(100), at(1));
        assert_eq!(lag.behind(at(5)), (None, Duration::from_secs(5)), "nothing is known of the bucket");
        lag.shipped(Lsn(40));
        assert_eq!(lag.behind(at(5)), (Some(60), Duration::from_secs(4)));
        lag.saw(Lsn(150), at(3));
        lag.saw(Lsn(120), at(4));
        lag.shipped(Lsn(100));
        assert_eq!(lag.behind(at(5)), (Some(50), Duration::from_secs(2)));
        lag.shipped(Lsn(150));
        assert_eq!(lag.behind(at(9)), (Some(0), Duration::ZERO));
        // The owner may hear of an end after it was shipped.
        lag.saw(Lsn(150), at(10));
        assert_eq!(lag.behind(at(11)), (Some(0), Duration::ZERO));
    }

    #[test]
    fn a_long_backlog_is_never_younger_than_it_is() {
        let begun = Instant::now();
        let mut lag = Lag::new(begun);
        lag.shipped(Lsn(0));
        for second in 1..=100_000_u64 {
            lag.saw(Lsn(second * 10), begun + Duration::from_secs(second));
        }
        assert!(lag.seen.len() <= SEEN_MAX);
        let now = begun + Duration::from_secs(100_000);
        for shipped in [0, 77, 5000, 640_001, 999_990] {
            lag.shipped(Lsn(shipped));
            let (bytes, time) = lag.behind(now);
            assert_eq!(bytes, Some(1_000_000 - shipped));
            let truly = Duration::from_secs(100_000 - (shipped / 10 + 1));
            assert!(time >= truly, "{time:?} at {shipped}");
        }
    }
}
