//! What passes between a client and the backend that it has for the moment: messages as they are, but for the names of
//! prepared statements. Pure: bytes in, bytes out.
//!
//! ```text
//!  client                  to the backend                          back to the client
//!    Parse  n  new           Parse __ebb_7                           1
//!    Parse  n  known there   Parse __ebb_scratch, Close it           1, (3)
//!    Parse  n  taken         Parse n (empty), Parse n                (1), E 42P05
//!    Bind   n                [Close __ebb_3] [Parse __ebb_7] Bind __ebb_7        (3) (1) 2
//!    Describe n              likewise
//!    Close  n                Close n, which is not there             3
//!    Bind or Describe of the unnamed one, not of this client's       [Parse it again, or Close it]
//!    all else                as it is
//! ```
//!
//! Every answer that the client sees is Postgres's own: nothing is made up here, answers are only left out (in
//! parentheses). So what is right in a failed transaction, or behind an error in a pipeline, is right without being
//! known.
//!
//! **Invariants**: what a message does to names is done when it is sent and undone when the server skips it. While the
//! fate of an earlier batch is open, no message is sent whose answer has to be left out: so an `ErrorResponse` is never
//! taken for one of another batch.

use std::collections::VecDeque;
use std::sync::Arc;

use super::names::{Names, Prepared, Texts};
use super::words::Words;
use crate::conversation::{Conversation, Malformed};
use crate::errors::Said;

mod down;
mod messages;
mod up;

pub use up::Stopped;

/// What a client sent that it may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is no message.
    Malformed(Malformed),
    /// A prepared statement that is too long, or one too many.
    Statement(&'static str),
}

impl From<Malformed> for Refused {
    fn from(malformed: Malformed) -> Self {
        Refused::Malformed(malformed)
    }
}

impl From<Refused> for Said {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Malformed(what) => Said::malformed(&what.to_string()),
            Refused::Statement(what) => Said::not_pooled(what),
        }
    }
}

/// The client's side of an exchange.
pub struct Client<'a> {
    /// What the client calls what.
    pub names: &'a mut Names,
    /// What both are talking about.
    pub conversation: &'a mut Conversation,
    /// The statements of the pool.
    pub texts: &'a Texts,
    /// Tells the settings that the client has made apart from other clients'.
    pub dress: u64,
}

/// What the server owes, as far as it matters here: answers to `Parse` and `Close`, and ends of batches.
#[derive(Debug)]
enum Owed {
    /// `ParseComplete` for the client, of something that needs no care.
    Passed,
    /// The same of the unnamed statement.
    Unnamed,
    /// The same of a named one: what to take back if it does not come.
    Parsed(Box<Naming>),
    /// `ParseComplete` of ours. With the number of the statement that is then prepared.
    OwnParsed(Option<u64>),
    /// `CloseComplete` for the client; the name it gave up.
    Closed(Option<Box<Naming>>),
    /// `CloseComplete` of ours; the statement given up.
    OwnClosed(Option<Arc<Prepared>>),
    /// `ReadyForQuery`.
    Ready,
}

impl Owed {
    fn decides(&self) -> bool {
        match self {
            Owed::Parsed(_) | Owed::OwnParsed(Some(_)) | Owed::Closed(Some(_)) | Owed::OwnClosed(Some(_)) => true,
            Owed::Passed | Owed::Unnamed | Owed::OwnParsed(None) | Owed::Closed(None) | Owed::OwnClosed(None) => false,
            Owed::Ready => false,
        }
    }
}

#[derive(Debug)]
struct Naming {
    name: Box<[u8]>,
    prepared: Arc<Prepared>,
    /// It is prepared on the backend by this very message.
    here: bool,
}

/// The state of an exchange, as long as a client has the backend.
#[derive(Debug, Default)]
pub struct Exchange {
    owed: VecDeque<Owed>,
    /// How many of them are `Ready`.
    batches: usize,
    /// How many of them decide what a name means, or what is on the backend.
    decisions: usize,
    /// Bytes of the client's message begun that pass as they are.
    up_left: usize,
    /// That message asks for a `ReadyForQuery`.
    up_ends_turn: bool,
    /// Bytes of the server's message begun that are still to come.
    down_left: usize,
    /// The client is not to see that message.
    down_drops: bool,
    /// The unnamed statement on the backend is the one that the client believes it to be.
    unnamed_is_ours: bool,
    /// Names under which the backend was given statements of no meaning, so that it says itself that they are taken.
    leftovers: Vec<Box<[u8]>>,
    /// Names given up by `DEALLOCATE`, until it is done.
    deallocating: VecDeque<Box<[u8]>>,
    /// Answers to the proxy's own queries that were sent before the client's first message: so many `ReadyForQuery`.
    prelude: usize,
    /// One of them was an error: the body of it is not kept.
    pub prelude_failed: bool,
    /// What the texts since the begin may have left behind.
    words: Words,
    /// A text may give names up whose batch has not been answered.
    drops: bool,
    /// Something may outlive the transaction.
    touched: bool,
    /// Something that did may be given up.
    freed: bool,
    /// What the server has cannot be told or taken back: it is not to be given to others.
    pub spoilt: bool,
    /// The server reported a parameter.
    pub parameters_changed: bool,
}

impl Exchange {
    /// For a client that takes the backend over, or goes on with it. `prelude`: how many queries of the proxy's own have
    /// been sent and not been answered.
    pub fn begin(&mut self, same_client: bool, prelude: usize) {
        // Their memory is kept.
        let (mut owed, mut deallocating) = (std::mem::take(&mut self.owed), std::mem::take(&mut self.deallocating));
        owed.clear();
        deallocating.clear();
        let unnamed_is_ours = same_client && self.unnamed_is_ours;
        *self = Self { owed, deallocating, unnamed_is_ours, prelude, ..Self::default() };
    }

    /// Whether nothing is half-way through, and no answer of ours outstanding.
    pub fn is_clear(&self) -> bool {
        self.up_left == 0 && self.down_left == 0 && self.prelude == 0
    }

    /// Notes that what was left behind has been looked at.
    pub fn settle(&mut self) {
        self.words = Words::default();
        (self.touched, self.freed, self.parameters_changed) = (false, false, false);
    }

    /// Whether the client may have left something that outlives its transaction; or may, where it `had` something, have
    /// given that up.
    pub fn is_touched(&self, had: bool) -> bool {
        let freed = self.freed || self.words.has(Words::FREES);
        self.touched || self.words.has(Words::LEAVES) || self.parameters_changed || had && freed
    }

    fn owe(&mut self, owed: Owed) {
        self.batches += usize::from(matches!(owed, Owed::Ready));
        self.decisions += usize::from(owed.decides());
        self.owed.push_back(owed);
    }

    fn next_owed(&mut self) -> Option<Owed> {
        let owed = self.owed.pop_front()?;
        self.batches -= usize::from(matches!(owed, Owed::Ready));
        self.decisions -= usize::from(owed.decides());
        Some(owed)
    }
}

#[cfg(test)]
#[path = "exchange/tests.rs"]
mod tests;
