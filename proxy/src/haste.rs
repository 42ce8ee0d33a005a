//! Whether to look at the sockets once more before going to sleep.
//!
//! A client alone with its backend takes turns with it: while one works, everything else sleeps, and an idle processor takes
//! longer to wake up than Postgres does for a short query. So a session that has just moved bytes looks again for a moment,
//! if no other session of its thread has moved any since. As soon as there are two at work there is always somebody to
//! carry something for, and nobody waits in haste: a busy thread takes no processor time for this.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// LIMIT: processor time that one message may cost in vain. Longer than a short query takes, and than a client takes
/// between two; a query that takes longer loses nothing by one wake-up.
const FOR: Duration = Duration::from_micros(50);

thread_local! {
    /// How often any session of this thread has moved bytes.
    static MOVES: Cell<u64> = const { Cell::new(0) };
}

/// The haste of one session.
#[derive(Debug, Default)]
pub struct Haste {
    /// The thread's count at this session's last move.
    own: u64,
    /// Since when it has looked in vain.
    since: Option<Instant>,
}

impl Haste {
    /// The session has moved bytes.
    #[inline]
    pub fn moved(&mut self) {
        self.own = MOVES.get() + 1;
        MOVES.set(self.own);
        self.since = None;
    }

    /// Whether to look again.
    #[inline]
    pub fn lasts(&mut self) -> bool {
        if MOVES.get() != self.own {
            return false;
        }
        let now = Instant::now();
        now - *self.since.get_or_insert(now) < FOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_session_that_is_alone_is_in_haste_and_not_for_long() {
        let (mut one, mut other) = (Haste::default(), Haste::default());
        one.moved();
        assert!(one.lasts());
        other.moved();
        assert!(!one.lasts());
        assert!(other.lasts());
        std::thread::sleep(FOR);
        assert!(!other.lasts());
        other.moved();
        assert!(other.lasts());
    }

    #[test]
    fn who_has_moved_nothing_is_in_no_haste() {
        Haste::default().moved();
        assert!(!Haste::default().lasts());
    }
}
