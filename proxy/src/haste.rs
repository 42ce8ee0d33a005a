//! Whether to look at the sockets once more before going to sleep.
//!
//! A client alone with its backend takes turns with it: while one works, everything else sleeps, and an idle processor takes
//! longer to wake up than Postgres does for a short query. So a session that has just moved bytes looks again for a moment,
//! if the thread's last moves were all its own. As soon as there are two at work there is always somebody to
//! carry something for, and nobody waits in haste: a busy thread takes no processor time for this. Nor do bulk data: while
//! they flow, client and backend work at the same time, and need the processors themselves.
//!
//! What was waited for in vain a few times, be it a backend that takes longer or a client that thinks, is only tried again
//! now and then. So it costs hardly anything where it does not help.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// LIMIT: processor time that one wait may cost in vain. Longer than a short query takes.
const FOR: Duration = Duration::from_micros(100);
/// LIMIT: more bytes at once than this are bulk data; questions and answers that take turns are shorter.
const SHORT: u64 = 2048;
/// So many moves in a row make a session the only one at work: one question and its answer are two.
const ALONE_AFTER: u8 = 6;
/// LIMIT: after so many waits in vain …
const VAIN_MAX: u8 = 4;
/// … only every so many-th move of the thread leads to another.
const TRY_EVERY: u64 = 128;

thread_local! {
    /// How often any session of this thread has moved bytes.
    static MOVES: Cell<u64> = const { Cell::new(0) };
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Turn {
    /// The client's: everything is answered.
    Client,
    /// The backend's.
    Backend,
}

/// The haste of one session.
#[derive(Debug)]
pub struct Haste {
    /// The thread's count at this session's last move.
    own: u64,
    /// Moves in a row without another session's between them, up to [`ALONE_AFTER`].
    alone: u8,
    /// Whether the last move is a reason to wait for the next.
    waits: bool,
    turn: Turn,
    /// Since when it has looked in vain.
    since: Option<Instant>,
    /// Waits in vain in a row, by whose turn it was.
    vain: [u8; 2],
}

impl Default for Haste {
    fn default() -> Self {
        Self { own: 0, alone: 0, waits: false, turn: Turn::Client, since: None, vain: [0; 2] }
    }
}

impl Haste {
    /// The session has moved so many bytes, and now it is somebody's turn.
    #[inline]
    pub fn moved(&mut self, bytes: u64, turn: Turn) {
        if bytes == 0 {
            // It only got rid of what it had.
            return;
        }
        if self.since.take().is_some() && self.waits {
            self.vain[self.turn as usize] = 0;
        }
        let before = MOVES.get();
        self.alone = if before == self.own { (self.alone + 1).min(ALONE_AFTER) } else { 0 };
        self.own = before + 1;
        MOVES.set(self.own);
        let hopeless = self.vain[turn as usize] >= VAIN_MAX && !self.own.is_multiple_of(TRY_EVERY);
        self.waits = self.alone == ALONE_AFTER && bytes <= SHORT && !hopeless;
        self.turn = turn;
    }

    /// Whether to look again.
    #[inline]
    pub fn lasts(&mut self) -> bool {
        if !self.waits || MOVES.get() != self.own {
            return false;
        }
        let now = Instant::now();
        if now - *self.since.get_or_insert(now) < FOR {
            return true;
        }
        let vain = &mut self.vain[self.turn as usize];
        *vain = vain.saturating_add(1);
        self.waits = false;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A session that has been the only one at work.
    fn alone() -> Haste {
        let mut haste = Haste::default();
        (0..=ALONE_AFTER).for_each(|_| haste.moved(10, Turn::Client));
        haste
    }

    #[test]
    fn only_a_session_that_is_alone_is_in_haste_and_not_for_long() {
        assert!(!Haste::default().lasts());
        let mut one = alone();
        assert!(one.lasts());
        let mut other = alone();
        assert!(!one.lasts());
        assert!(other.lasts());
        std::thread::sleep(FOR);
        assert!(!other.lasts());
        other.moved(10, Turn::Client);
        assert!(other.lasts());
        // In turns, neither is alone, whoever was last.
        one.moved(10, Turn::Client);
        other.moved(10, Turn::Client);
        assert!(!one.lasts() && !other.lasts());
    }

    #[test]
    fn bulk_data_are_in_no_haste() {
        let mut haste = alone();
        haste.moved(SHORT + 1, Turn::Backend);
        assert!(!haste.lasts());
        haste.moved(5, Turn::Client);
        assert!(haste.lasts());
    }

    #[test]
    fn what_is_in_vain_is_seldom_tried_again() {
        let mut haste = alone();
        let mut tried = 0;
        let moves = 10 * TRY_EVERY;
        for _ in 0..moves {
            haste.moved(5, Turn::Client);
            if haste.lasts() {
                tried += 1;
                std::thread::sleep(FOR);
                assert!(!haste.lasts());
            }
        }
        assert!((10..=10 + u64::from(VAIN_MAX)).contains(&tried), "{tried} of {moves}");
        // The backend's turns are another matter.
        haste.moved(5, Turn::Backend);
        assert!(haste.lasts());
        // Once it helps, it is in favour again.
        haste.moved(5, Turn::Client);
        while !haste.lasts() {
            haste.moved(5, Turn::Client);
        }
        haste.moved(5, Turn::Client);
        assert!(haste.lasts());
    }
}
