//! Whether to look at the sockets once more before going to sleep.
//!
//! A client alone with its backend takes turns with it: while one works, everything else sleeps, and an idle processor takes
//! longer to wake up than Postgres does for a short query. So a session that has just moved bytes looks again for a moment,
//! if no other session of its thread has moved any since. As soon as there are two at work there is always somebody to
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
    /// The thread's count at this session's last move; 0 if that is no reason for haste.
    own: u64,
    turn: Turn,
    /// Since when it has looked in vain.
    since: Option<Instant>,
    /// Waits in vain in a row, by whose turn it was.
    vain: [u8; 2],
}

impl Default for Haste {
    fn default() -> Self {
        Self { own: 0, turn: Turn::Client, since: None, vain: [0; 2] }
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
        if self.since.take().is_some() && self.own != 0 {
            self.vain[self.turn as usize] = 0;
        }
        let count = MOVES.get() + 1;
        MOVES.set(count);
        let hopeless = self.vain[turn as usize] >= VAIN_MAX && !count.is_multiple_of(TRY_EVERY);
        self.own = if bytes > SHORT || hopeless { 0 } else { count };
        self.turn = turn;
    }

    /// Whether to look again.
    #[inline]
    pub fn lasts(&mut self) -> bool {
        if self.own == 0 || MOVES.get() != self.own {
            return false;
        }
        let now = Instant::now();
        if now - *self.since.get_or_insert(now) < FOR {
            return true;
        }
        let vain = &mut self.vain[self.turn as usize];
        *vain = vain.saturating_add(1);
        self.own = 0;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_session_that_is_alone_is_in_haste_and_not_for_long() {
        let (mut one, mut other) = (Haste::default(), Haste::default());
        assert!(!one.lasts());
        one.moved(10, Turn::Backend);
        assert!(one.lasts());
        other.moved(10, Turn::Backend);
        assert!(!one.lasts());
        assert!(other.lasts());
        std::thread::sleep(FOR);
        assert!(!other.lasts());
        other.moved(10, Turn::Client);
        assert!(other.lasts());
    }

    #[test]
    fn bulk_data_are_in_no_haste() {
        let mut haste = Haste::default();
        haste.moved(SHORT + 1, Turn::Backend);
        assert!(!haste.lasts());
        haste.moved(5, Turn::Client);
        assert!(haste.lasts());
    }

    #[test]
    fn what_is_in_vain_is_seldom_tried_again() {
        let mut haste = Haste::default();
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
        // The other's turns are another matter.
        haste.moved(5, Turn::Backend);
        assert!(haste.lasts());
        // Once it helps, it is in favour again.
        while !haste.lasts() || haste.turn == Turn::Backend {
            haste.moved(5, Turn::Client);
        }
        haste.moved(5, Turn::Client);
        assert!(haste.lasts());
    }
}
