//! Follows both directions of a session by message headers, to know at any moment whether it is at rest.
//!
//! Pure: bytes in, knowledge out. At rest means: every sync point the client sent (`Query`, `Sync`, `FunctionCall`)
//! has been answered by its `ReadyForQuery`, the last of which said "idle"; nothing was sent since; both streams stand
//! between two messages. Only then may the backend be exchanged for another.
//!
//! ```text
//!  client                                            server
//!    Parse Bind Execute ─► unsynced
//!    Query│Sync│FunctionCall ─► awaiting.push ─────►   …
//!                              awaiting.pop  ◄──────  ReadyForQuery(I│T│E)
//! ```
//!
//! `COPY … FROM STDIN` breaks the pairing: while copying, the server throws `Sync` away (PostgreSQL 15, 55.2.6;
//! `CopyGetData`, copyfromparse.c), and whether it did so before an error is not to be known at once. `CopyIn` and
//! `doubt` follow that. The rule in every uncertain case: rather think that something is still under way. That costs
//! a compute awake, while the other mistake would cut a client off. (So it is, too, with a `Query` in the middle of
//! messages that want a `Sync`: if one of them failed, the server throws it away; and for good with messages that have no
//! place in a copy, which no client sends that knows of it.) `crate::fuzzing` holds all that against a server.

use std::collections::VecDeque;
use std::mem;

use crate::frame::{BadLength, Frame, Piece};
use crate::pings::may_ping;
use crate::settings::SettingNames;
use crate::wire::Fields;

/// LIMIT: a client that pipelines more sync points than this has to read some answers first.
const AWAITING_MAX: usize = 65_536;
/// LIMIT: query texts longer than this are not searched for settings, and not kept if unnamed. A `SET` is short; what
/// is longer carries data.
const TEXT_MAX: usize = 8 * 1024;
/// LIMIT: the parameters Postgres reports are short names and values.
const PARAMETER_MAX: usize = 4 * 1024;

/// LIMIT: a driver has one statement that it pings with, a program perhaps another.
const PING_STATEMENTS_MAX: usize = 4;

/// A parameter's name and value, in the session's encoding.
pub type Parameter = (Box<[u8]>, Box<[u8]>);

/// The transaction state as `ReadyForQuery` told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionState {
    /// Not in a transaction.
    Idle,
    /// In a transaction, which may have failed.
    Open,
}

/// What the server will answer with a `ReadyForQuery`, or end of a copy that the server has not begun yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// A `Query` or `FunctionCall`: some other message comes before its `ReadyForQuery`. `amid`: an `Execute` before it
    /// has no `Sync`, and may copy, too.
    Query { amid: bool },
    /// A `Sync` after messages that are answered each; `several`: some of them follow an `Execute`.
    WorkSync { several: bool },
    /// A `Sync` with nothing to answer before it.
    BareSync,
    /// A `CopyDone` or `CopyFail` sent before the server said that it copies.
    CopyEnd,
}

/// Where a `COPY … FROM STDIN` stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyIn {
    No,
    /// The server takes data. `dropped`: so many of the client's `Sync`s fell into it.
    Receiving {
        dropped: usize,
    },
    /// The client has sent `CopyDone` or `CopyFail`.
    Ending {
        dropped: usize,
    },
}

/// The client's unnamed prepared statement, which Postgres does not list.
#[derive(Debug, Default, PartialEq)]
enum Unnamed {
    #[default]
    None,
    /// The body of its `Parse`.
    Kept(Vec<u8>),
    /// Too long to be kept; `used` once it was bound: most clients never come back to it then.
    TooLong { used: bool },
}

/// What is known of a session from the messages that passed.
#[derive(Debug, PartialEq)]
pub struct Conversation {
    client: Frame,
    server: Frame,
    awaiting: VecDeque<Awaited>,
    /// The client sent something after its last sync point.
    unsynced: bool,
    /// … and the server answers each of it.
    worked: bool,
    /// … an `Execute` among it, which may have begun a copy
    executed: bool,
    /// … and more behind that, which would have no place in a copy.
    several: bool,
    transaction: TransactionState,
    copy: CopyIn,
    /// A copy failed after `Sync`s fell into it, as it seemed: up to so many `ReadyForQuery` more may come than are awaited.
    doubt: usize,
    /// The client sent what has no place in a copy, which ends it: how much of it fell into the copy is not to be known.
    astray: bool,
    /// The server sent something in answer since its last `ReadyForQuery`.
    replied: bool,
    /// The last message of the server that ended was an `ErrorResponse`.
    error_last: bool,
    terminated: bool,
    /// The client has sent something since somebody last asked to know.
    heard: bool,
    settings: SettingNames,
    unnamed: Unnamed,
    /// Named statements that pools ping with: name and text.
    ping_statements: Vec<Parameter>,
    /// A text that arrives in pieces.
    client_text: Vec<u8>,
    server_text: Vec<u8>,
    /// Parameters as the client was last told them.
    parameters: Vec<Parameter>,
}

impl Conversation {
    /// A session whose start-up has just been completed.
    pub fn new() -> Self {
        Self {
            client: Frame::default(),
            server: Frame::default(),
            awaiting: VecDeque::new(),
            unsynced: false,
            worked: false,
            executed: false,
            several: false,
            transaction: TransactionState::Idle,
            copy: CopyIn::No,
            doubt: 0,
            astray: false,
            replied: false,
            error_last: false,
            terminated: false,
            heard: false,
            settings: SettingNames::default(),
            unnamed: Unnamed::None,
            ping_statements: Vec::new(),
            client_text: Vec::new(),
            server_text: Vec::new(),
            parameters: Vec::new(),
        }
    }

    /// Whether the client has nothing under way: no answer awaited, no transaction open.
    pub fn is_idle(&self) -> bool {
        self.awaiting.is_empty()
            && !self.unsynced
            && self.transaction == TransactionState::Idle
            && self.copy == CopyIn::No
    }

    /// Whether the backend may be exchanged: idle, and both streams between two messages.
    pub fn is_at_rest(&self) -> bool {
        self.is_idle() && self.doubt == 0 && !self.astray && self.client.at_boundary() && self.server.at_boundary()
    }

    /// Whether nothing that the server says now would be an answer.
    pub fn awaits_nothing(&self) -> bool {
        self.awaiting.is_empty() && !self.unsynced && self.copy == CopyIn::No && self.server.at_boundary()
    }

    /// Whether a message of our own may be put into the stream to the client here.
    pub fn server_at_boundary(&self) -> bool {
        self.server.at_boundary()
    }

    /// Whether the client's bytes so far end with a whole message.
    pub fn client_at_boundary(&self) -> bool {
        self.client.at_boundary()
    }

    /// How many bytes the server's message begun still lacks, as far as is known.
    pub fn server_missing(&self) -> usize {
        self.server.missing()
    }

    /// Whether more of the client's bytes may be needed before the server can answer what it has.
    pub fn wants_client(&self) -> bool {
        self.awaiting.is_empty() || matches!(self.copy, CopyIn::Receiving { .. }) || !self.client.at_boundary()
    }

    /// Whether the server's last whole message was an `ErrorResponse`: its own words before it closes.
    pub fn ends_with_error(&self) -> bool {
        self.error_last && self.server.at_boundary()
    }

    /// Whether the client has sent anything since [`Conversation::listen_anew`].
    pub fn has_heard(&self) -> bool {
        self.heard
    }

    /// From now on it counts whether the client sends anything.
    pub fn listen_anew(&mut self) {
        self.heard = false;
    }

    /// Whether every sync point has been answered; a transaction may be open.
    pub fn is_answered(&self) -> bool {
        self.awaiting.is_empty()
    }

    /// Whether it cannot be told which answers are still to come: while data is copied in, and after that failed.
    pub fn is_unclear(&self) -> bool {
        self.doubt > 0 || self.copy != CopyIn::No
    }

    /// Whether so many answers are awaited that no more of the client's bytes are taken.
    pub fn awaits_too_much(&self) -> bool {
        self.awaiting.len() >= AWAITING_MAX
    }

    /// Whether the client's bytes so far end with a sync point.
    pub fn is_turn_over(&self) -> bool {
        !self.unsynced && self.client.at_boundary()
    }

    /// The parameters as the client was last told them.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Whether the client was told something else, or nothing, of this parameter.
    pub fn would_be_news(&self, name: &[u8], value: &[u8]) -> bool {
        !self.parameters.iter().any(|(known, told)| **known == *name && **told == *value)
    }

    /// Whether the client has sent `Terminate`.
    pub fn is_terminated(&self) -> bool {
        self.terminated
    }

    /// The names of custom settings seen.
    pub fn settings(&self) -> &SettingNames {
        &self.settings
    }

    /// The body of the `Parse` that made the client's unnamed statement, if there is one.
    ///
    /// # Errors
    /// If there is one that the client has not run yet and that was too long to keep.
    pub fn unnamed_statement(&self) -> Result<Option<&[u8]>, TooLong> {
        match &self.unnamed {
            Unnamed::None | Unnamed::TooLong { used: true } => Ok(None),
            Unnamed::Kept(body) => Ok(Some(body)),
            Unnamed::TooLong { used: false } => Err(TooLong),
        }
    }

    /// The text of a named statement without parameters, if that may be a ping.
    pub fn ping_statement(&self, name: &[u8]) -> Option<&[u8]> {
        self.ping_statements.iter().find(|(held, _)| **held == *name).map(|(_, text)| &**text)
    }

    fn note_ping_statement(&mut self, parse: &[u8]) {
        let mut fields = Fields(parse);
        let (Some(name), Some(text)) = (fields.cstr(), fields.cstr()) else { return };
        self.ping_statements.retain(|(held, _)| **held != *name);
        if fields.0 == [0, 0] && may_ping(text) && self.ping_statements.len() < PING_STATEMENTS_MAX {
            self.ping_statements.push((name.into(), text.into()));
        }
    }

    /// Notes that the `Parse` of an unnamed statement has failed.
    pub fn forget_unnamed(&mut self) {
        self.unnamed = Unnamed::None;
    }

    /// Gives back memory that only a busy session needs.
    pub fn shrink(&mut self) {
        self.awaiting = VecDeque::new();
        self.client_text = Vec::new();
        self.server_text = Vec::new();
        if let Unnamed::Kept(body) = &mut self.unnamed {
            body.shrink_to_fit();
        }
    }

    /// Notes a parameter as told to the client; answers whether that is news.
    pub fn note_parameter(&mut self, name: &[u8], value: &[u8]) -> bool {
        match self.parameters.iter_mut().find(|(known, _)| **known == *name) {
            Some((_, known)) if **known == *value => false,
            Some((_, known)) => {
                *known = value.into();
                true
            }
            None => {
                self.parameters.push((name.into(), value.into()));
                true
            }
        }
    }

    /// Follows bytes of the client and answers how many may be sent on: all of them, unless `one_turn` is wanted (then
    /// up to the first sync point) or too many answers are awaited.
    ///
    /// # Errors
    /// If a message cannot be; nothing of these bytes should be sent on.
    #[inline]
    pub fn client_sent(&mut self, bytes: &[u8], one_turn: bool) -> Result<usize, Malformed> {
        let mut rest = bytes;
        self.heard = true;
        while self.awaiting.len() < AWAITING_MAX {
            let Some(piece) = self.client.next(&mut rest)? else { break };
            if piece.first && !is_frontend_tag(piece.tag) {
                return Err(Malformed::Tag(piece.tag));
            }
            if matches!(piece.tag, b'P' | b'Q' | b'B' | b'C') {
                self.client_piece(&piece);
            }
            if piece.last && self.client_message(piece.tag) && one_turn {
                break;
            }
        }
        Ok(bytes.len() - rest.len())
    }

    /// Follows bytes of the server.
    ///
    /// # Errors
    /// If a message cannot be.
    #[inline]
    pub fn server_sent(&mut self, bytes: &[u8]) -> Result<(), BadLength> {
        let mut rest = bytes;
        while let Some(piece) = self.server.next(&mut rest)? {
            match piece.tag {
                b'Z' if piece.last => self.ready(piece.body.first().copied()),
                b'S' => self.server_parameter(&piece),
                b'Z' | b'A' | b'N' => {}
                _ => {
                    self.replied = true;
                    if piece.last && matches!(piece.tag, b'E' | b'C' | b'G' | b'W') {
                        self.server_turn(piece.tag);
                    }
                }
            }
            if piece.last {
                self.error_last = piece.tag == b'E';
            }
        }
        Ok(())
    }

    /// A whole message of the client has passed. Answers whether it was a sync point.
    fn client_message(&mut self, tag: u8) -> bool {
        if matches!(self.copy, CopyIn::Receiving { .. }) && !matches!(tag, b'd' | b'c' | b'f' | b'S' | b'H' | b'X') {
            self.astray = true;
        }
        match tag {
            b'Q' | b'F' => self.sync_point(Awaited::Query { amid: self.executed }),
            b'S' => match &mut self.copy {
                CopyIn::Receiving { dropped } => {
                    *dropped += 1;
                    self.unsynced = true;
                    return false;
                }
                _ if self.worked => self.sync_point(Awaited::WorkSync { several: self.several }),
                _ => self.sync_point(Awaited::BareSync),
            },
            b'c' | b'f' => {
                match self.copy {
                    CopyIn::Receiving { dropped } => self.copy = CopyIn::Ending { dropped },
                    _ if self.unsynced || !self.awaiting.is_empty() => self.awaiting.push_back(Awaited::CopyEnd),
                    // Left over from a copy that failed: the server ignores it.
                    _ => {}
                }
                return false;
            }
            // Data of a copy, wanted or left over; a Flush asks for nothing of its own.
            b'd' | b'H' => return false,
            b'X' => {
                self.terminated = true;
                return false;
            }
            _ => {
                self.unsynced = true;
                self.worked = true;
                self.several |= self.executed;
                self.executed |= tag == b'E';
                return false;
            }
        }
        true
    }

    fn sync_point(&mut self, kind: Awaited) {
        self.awaiting.push_back(kind);
        (self.unsynced, self.worked, self.executed, self.several) = (false, false, false, false);
    }

    fn client_piece(&mut self, piece: &Piece<'_>) {
        match piece.tag {
            b'B' | b'C' => match (piece.first, piece.body) {
                (true, [one, two, ..]) => self.client_begins(piece, [*one, *two]),
                (true, begun) if !piece.last => self.client_text = begun.to_vec(),
                (false, [two, ..]) => {
                    if let [one] = *mem::take(&mut self.client_text) {
                        self.client_begins(piece, [one, *two]);
                    }
                }
                _ => {}
            },
            b'P' | b'Q' if piece.length > TEXT_MAX => self.client_long_text(piece),
            b'P' | b'Q' if piece.first && piece.last => self.client_text(piece.tag, piece.body),
            b'P' | b'Q' => {
                if piece.first {
                    self.client_text.clear();
                }
                self.client_text.extend_from_slice(piece.body);
                if piece.last {
                    let text = mem::take(&mut self.client_text);
                    self.client_text(piece.tag, &text);
                }
            }
            _ => {}
        }
    }

    /// The first two bytes of a `Bind` or `Close`.
    fn client_begins(&mut self, piece: &Piece<'_>, bytes: [u8; 2]) {
        match (piece.tag, bytes, &mut self.unnamed) {
            // Portal and statement unnamed: the usual form.
            (b'B', [0, 0], Unnamed::TooLong { used }) => *used = true,
            (b'C', [b'S', 0], unnamed) if piece.length == 2 => *unnamed = Unnamed::None,
            _ => {}
        }
    }

    fn client_long_text(&mut self, piece: &Piece<'_>) {
        match (piece.tag, piece.body.first()) {
            (b'Q', _) => self.unnamed = Unnamed::None,
            (b'P', Some(0)) if piece.first => self.unnamed = Unnamed::TooLong { used: false },
            _ => {}
        }
    }

    fn client_text(&mut self, tag: u8, body: &[u8]) {
        self.settings.scan(body);
        if tag == b'Q' {
            // A simple query drops the unnamed statement (PostgreSQL 15, 55.2.3).
            if !matches!(self.unnamed, Unnamed::None) {
                self.unnamed = Unnamed::None;
            }
        } else if body.first() == Some(&0) {
            match &mut self.unnamed {
                Unnamed::Kept(kept) => {
                    kept.clear();
                    kept.extend_from_slice(body);
                }
                other => *other = Unnamed::Kept(body.to_vec()),
            }
        } else {
            self.note_ping_statement(body);
        }
    }

    fn server_parameter(&mut self, piece: &Piece<'_>) {
        if piece.length > PARAMETER_MAX {
            return;
        }
        if piece.first && piece.last {
            self.server_parameter_body(piece.body);
            return;
        }
        if piece.first {
            self.server_text.clear();
        }
        self.server_text.extend_from_slice(piece.body);
        if piece.last {
            let body = mem::take(&mut self.server_text);
            self.server_parameter_body(&body);
        }
    }

    fn server_parameter_body(&mut self, body: &[u8]) {
        let mut fields = Fields(body);
        if let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) {
            self.note_parameter(name, value);
        }
    }

    /// A message has passed that begins or ends a copy.
    fn server_turn(&mut self, tag: u8) {
        match (tag, self.copy) {
            (b'G' | b'W', _) => self.copy_begins(),
            (b'C', _) => self.copy = CopyIn::No,
            (_, CopyIn::Receiving { dropped } | CopyIn::Ending { dropped }) => {
                self.copy = CopyIn::No;
                self.doubt += dropped;
                if dropped > 0 {
                    // What is answered before one `ReadyForQuery` more, if it comes, begins here.
                    self.replied = false;
                }
            }
            (_, CopyIn::No) => {}
        }
    }

    /// The server has begun to take data. All earlier sync points are answered, so the first awaited one is the copy's
    /// own; if it is a `Sync`, that fell into the copy, like all others up to the copy's end.
    fn copy_begins(&mut self) {
        let head = self.awaiting.iter().position(|awaited| *awaited != Awaited::CopyEnd);
        let by_query = head.is_some_and(|head| matches!(self.awaiting[head], Awaited::Query { .. }));
        // Whose copy it is cannot be told.
        self.astray |= head.is_some_and(|head| self.awaiting[head] == Awaited::Query { amid: true });
        if let Some(head) = head.filter(|_| by_query) {
            // Ends before the query belong to an earlier copy that failed.
            self.awaiting.drain(..head);
        }
        let from = usize::from(by_query);
        let end = (from..self.awaiting.len()).find(|&at| self.awaiting[at] == Awaited::CopyEnd);
        let upto = end.unwrap_or(self.awaiting.len());
        let before = self.awaiting.len();
        // Messages that are answered each, sent before the client knew of the copy: those behind its own end it.
        let mut others = self.awaiting.range(upto.min(1)..upto);
        let in_others = others.any(|awaited| matches!(awaited, Awaited::Query { .. } | Awaited::WorkSync { .. }));
        let in_own = match self.awaiting.front() {
            Some(Awaited::WorkSync { several }) => *several,
            Some(Awaited::Query { .. } | Awaited::BareSync) => false,
            // Its sync point is not sent yet.
            Some(Awaited::CopyEnd) | None => self.several,
        };
        self.astray |= in_others || in_own || (end.is_none() && self.worked && before > 0);
        let mut at = 0;
        self.awaiting.retain(|awaited| {
            let inside = (from..upto).contains(&at);
            at += 1;
            !(inside && matches!(awaited, Awaited::WorkSync { .. } | Awaited::BareSync))
        });
        let dropped = before - self.awaiting.len();
        match end {
            Some(end) => {
                self.awaiting.remove(end - dropped);
                // As below, unless it has sent one behind the end.
                self.unsynced |= dropped > 0 && self.awaiting.len() == end - dropped;
                self.copy = CopyIn::Ending { dropped };
            }
            None => {
                // The client owes the Sync that ends the copy's command.
                self.unsynced |= dropped > 0;
                self.copy = CopyIn::Receiving { dropped };
            }
        }
    }

    fn ready(&mut self, status: Option<u8>) {
        self.transaction = if status == Some(b'I') { TransactionState::Idle } else { TransactionState::Open };
        let replied = mem::replace(&mut self.replied, false);
        if self.doubt > 0 {
            let head = self.awaiting.iter().find(|awaited| **awaited != Awaited::CopyEnd);
            match head {
                // One too many: nothing is awaited, or what is would have been answered by something first.
                None => {
                    self.doubt -= 1;
                    self.awaiting.clear();
                    return;
                }
                Some(Awaited::Query { .. } | Awaited::WorkSync { .. }) if !replied => {
                    self.doubt -= 1;
                    return;
                }
                // Something was answered: all that were too many have come before.
                Some(Awaited::Query { .. } | Awaited::WorkSync { .. }) => self.doubt = 0,
                Some(_) => {}
            }
        }
        while let Some(Awaited::CopyEnd) = self.awaiting.pop_front() {}
        if self.awaiting.iter().all(|awaited| *awaited == Awaited::CopyEnd) {
            self.awaiting.clear();
        }
    }
}

/// An unnamed statement that was too long to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong;

/// A message no client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Its length is impossible.
    #[error(transparent)]
    Length(#[from] BadLength),
    /// Its type is unknown.
    #[error("message type 0x{0:02x} is not known")]
    Tag(u8),
}

/// The messages a client may send after authentication (PostgreSQL 15, 55.7).
pub fn is_frontend_tag(tag: u8) -> bool {
    matches!(tag, b'B' | b'C' | b'd' | b'c' | b'f' | b'D' | b'E' | b'F' | b'H' | b'P' | b'Q' | b'S' | b'X' | b'p')
}

#[cfg(test)]
#[path = "conversation/tests.rs"]
mod tests;
