//! Which moments of a branch can be gone back to, and from which seal each is replayed. Pure.
//!
//! A branch's data has *lines*: a restore in place ends one and begins the next. Each line has its own WAL archive, which
//! goes on from the image the line began with. A moment is reached from the newest seal before it, by replaying the
//! archive of that seal's line.
//!
//! ```text
//!   line 0   s0 ───── s1 ───── s2 ──┐ set aside
//!                      └──────────── │ ──► line 1   s3 (= s1) ───── s4 ─── now
//! ```
//!
//! A *time* means what clients saw then: between s2 and the restore, line 0. An *LSN* means the history of what is there
//! now: one below s3 is looked for on line 0, up to s1, where line 1 left it.

use std::collections::BTreeMap;

use ebb_types::{LayerId, Lsn, Timestamp};

use crate::event::Left;

/// A recorded seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// The layer.
    pub layer: LayerId,
    /// When it was recorded: everything in it was committed before. Never before the seal before it, whatever clocks say.
    pub at: Timestamp,
    /// A position that all its WAL lies before, where known.
    pub end: Option<Lsn>,
    /// The line it is on.
    pub line: u64,
}

/// The seals of a branch within its window.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// Oldest first.
    seals: Vec<Seal>,
    /// Where each line left another.
    origins: BTreeMap<u64, Left>,
}

impl History {
    /// Records a seal.
    pub fn sealed(&mut self, mut seal: Seal) {
        if let Some(last) = self.seals.last() {
            seal.at = seal.at.max(last.at);
        }
        self.seals.push(seal);
    }

    /// Records that a line begins with this seal, and which line of the branch it left.
    pub fn begun(&mut self, seal: Seal, left: Option<Left>) {
        if let Some(left) = left {
            self.origins.insert(seal.line, left);
        }
        self.sealed(seal);
    }

    /// Forgets what is not needed to reach any moment from `start` on.
    pub fn forget_before(&mut self, start: Timestamp) {
        let first = self.seals.partition_point(|seal| seal.at <= start).saturating_sub(1);
        self.seals.drain(..first);
        let oldest = self.seals.first().map_or(0, |seal| seal.line);
        self.origins.retain(|line, left| *line >= oldest && left.line >= oldest);
    }

    /// All seals, oldest first.
    pub fn seals(&self) -> &[Seal] {
        &self.seals
    }

    /// The line that a layer was sealed on, and where its WAL ends, if it is one of these.
    pub fn seal_of(&self, layer: LayerId) -> Option<&Seal> {
        self.seals.iter().rev().find(|seal| seal.layer == layer)
    }

    /// The earliest moment that can be reached.
    pub fn earliest(&self) -> Option<Timestamp> {
        self.seals.first().map(|seal| seal.at)
    }

    /// The seal from which a time is replayed: the newest one before.
    pub fn at_time(&self, time: Timestamp) -> Option<&Seal> {
        self.seals[..self.seals.partition_point(|seal| seal.at <= time)].last()
    }

    /// The seals on a line before one of them, newest first, and where they end.
    pub fn before(&self, layer: LayerId, line: u64) -> Vec<(LayerId, Option<Lsn>)> {
        let on_line = self.seals.iter().rev().filter(|seal| seal.line == line);
        let before = on_line.skip_while(|seal| seal.layer != layer).filter(|seal| seal.layer != layer);
        before.map(|seal| (seal.layer, seal.end)).collect()
    }

    /// The next seal on the same line.
    pub fn after(&self, seal: &Seal) -> Option<&Seal> {
        let of_line = self.seals.iter().filter(|other| other.line == seal.line);
        of_line.skip_while(|other| other.layer != seal.layer).nth(1)
    }

    /// The seal from which a position is replayed: the newest one that ends before it, in the history of `line`.
    pub fn at_lsn(&self, lsn: Lsn, line: u64) -> Option<&Seal> {
        let mut line = line;
        loop {
            let on_line = self.seals.iter().filter(|seal| seal.line == line && seal.end.is_some_and(|end| end <= lsn));
            if let Some(seal) = on_line.max_by_key(|seal| (seal.end, seal.at)) {
                return Some(seal);
            }
            let left = self.origins.get(&line).filter(|left| left.line < line)?;
            // Beyond that position the older line went elsewhere.
            left.at.filter(|at| lsn <= *at)?;
            line = left.line;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(minute: i64, end: u64, line: u64) -> Seal {
        let at = Timestamp::from_second(minute * 60).unwrap();
        Seal { layer: LayerId::generate(), at, end: Some(Lsn(end)), line }
    }

    fn time(minute: i64) -> Timestamp {
        Timestamp::from_second(minute * 60).unwrap()
    }

    /// Line 0: sealed at 100, 200, 300 in minutes 1, 2, 3; line 1 from the seal at 200, begun in minute 5, sealed at 250.
    fn restored_once() -> History {
        let mut history = History::default();
        history.begun(seal(1, 100, 0), None);
        history.sealed(seal(2, 200, 0));
        history.sealed(seal(3, 300, 0));
        history.begun(seal(5, 200, 1), Some(Left { line: 0, at: Some(Lsn(200)) }));
        history.sealed(seal(6, 250, 1));
        history
    }

    fn check(found: Option<&Seal>, expect: Option<(i64, u64)>, what: &str) {
        let found = found.map(|seal| (seal.at, seal.line));
        assert_eq!(found, expect.map(|(minute, line)| (time(minute), line)), "for {what}");
    }

    #[test]
    fn a_clock_that_goes_back_does_not_mix_seals_up() {
        let mut history = History::default();
        history.begun(seal(1, 100, 0), None);
        for (minute, end) in [(2, 200), (50, 300), (3, 400), (4, 500), (60, 600)] {
            history.sealed(seal(minute, end, 0));
        }
        check(history.at_time(time(49)), Some((2, 0)), "before the jump");
        assert_eq!(history.at_time(time(55)).unwrap().end, Some(Lsn(500)));
        let jumped = history.seals()[2].clone();
        assert_eq!(history.after(&jumped).unwrap().end, Some(Lsn(400)));
        history.forget_before(time(50));
        assert_eq!(history.seals().last().unwrap().end, Some(Lsn(600)));
    }

    #[test]
    fn a_time_is_what_clients_saw_then() {
        let history = restored_once();
        let cases =
            [(0, None), (1, Some((1, 0))), (2, Some((2, 0))), (4, Some((3, 0))), (5, Some((5, 1))), (9, Some((6, 1)))];
        for (minute, expect) in cases {
            check(history.at_time(time(minute)), expect, &format!("minute {minute}"));
        }
    }

    #[test]
    fn a_position_is_in_the_history_of_what_is_there_now() {
        let history = restored_once();
        let cases = [
            (99, None),
            (100, Some((1, 0))),
            (199, Some((1, 0))),
            (200, Some((5, 1))),
            (249, Some((5, 1))),
            (250, Some((6, 1))),
            (999, Some((6, 1))),
        ];
        for (lsn, expect) in cases {
            check(history.at_lsn(Lsn(lsn), 1), expect, &format!("LSN {lsn} on line 1"));
        }
        check(history.at_lsn(Lsn(280), 0), Some((2, 0)), "LSN 280 on line 0");
    }

    #[test]
    fn what_the_window_needs_is_kept() {
        let mut history = restored_once();
        history.forget_before(time(4));
        check(history.at_time(time(4)), Some((3, 0)), "the window's first moment");
        assert_eq!(history.seals().len(), 3);
        history.forget_before(time(60));
        assert_eq!(history.seals().len(), 1, "the newest seal is the base of everything to come");
        check(history.at_lsn(Lsn(100), 1), None, "an LSN before the window");
    }
}
