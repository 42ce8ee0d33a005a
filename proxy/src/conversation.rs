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
//! a compute awake, while the other mistake would cut a client off.

use std::collections::VecDeque;

use crate::frame::{BadLength, Frame, Piece};
use crate::settings::SettingNames;
use crate::wire::Fields;

/// LIMIT: a client that pipelines more sync points than this has to read some answers first.
const AWAITING_MAX: usize = 65_536;
/// LIMIT: query texts longer than this are not searched for settings, and not kept if unnamed. A `SET` is short; what
/// is longer carries data.
const TEXT_MAX: usize = 8 * 1024;
/// LIMIT: the parameters Postgres reports are short names and values.
const PARAMETER_MAX: usize = 4 * 1024;

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
    /// A `Query` or `FunctionCall`: some other message comes before its `ReadyForQuery`.
    Query,
    /// A `Sync` after messages that are answered each.
    WorkSync,
    /// A `Sync` with nothing to answer before it.
    BareSync,
    /// A `CopyDone` or `CopyFail` sent before the server said that it copies.
    CopyEnd,
}

/// Where a `COPY … FROM STDIN` stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyIn {
    No,
    /// The server takes data. `dropped`: a `Sync` of the client fell into it.
    Receiving {
        dropped: bool,
    },
    /// The client has sent `CopyDone` or `CopyFail`.
    Ending {
        dropped: bool,
    },
}

/// The client's unnamed prepared statement, which Postgres does not list.
#[derive(Debug, Default)]
enum Unnamed {
    #[default]
    None,
    /// The body of its `Parse`.
    Kept(Vec<u8>),
    /// Too long to be kept; `used` once it was bound: most clients never come back to it then.
    TooLong { used: bool },
}

/// What is known of a session from the messages that passed.
#[derive(Debug)]
pub struct Conversation {
    client: Frame,
    server: Frame,
    awaiting: VecDeque<Awaited>,
    /// The client sent something after its last sync point.
    unsynced: bool,
    /// … and the server answers each of it.
    worked: bool,
    transaction: TransactionState,
    copy: CopyIn,
    /// A copy failed after a `Sync` fell into it: one `ReadyForQuery` more may come than is awaited.
    doubt: bool,
    /// The server sent something in answer since its last `ReadyForQuery`.
    replied: bool,
    /// The last message of the server that ended was an `ErrorResponse`.
    error_last: bool,
    terminated: bool,
    /// The client has sent something since somebody last asked to know.
    heard: bool,
    settings: SettingNames,
    unnamed: Unnamed,
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
            transaction: TransactionState::Idle,
            copy: CopyIn::No,
            doubt: false,
            replied: false,
            error_last: false,
            terminated: false,
            heard: false,
            settings: SettingNames::default(),
            unnamed: Unnamed::None,
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
        self.is_idle() && !self.doubt && self.client.at_boundary() && self.server.at_boundary()
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
        match tag {
            b'Q' | b'F' => self.sync_point(Awaited::Query),
            b'S' => match &mut self.copy {
                CopyIn::Receiving { dropped } => {
                    *dropped = true;
                    self.unsynced = true;
                    return false;
                }
                _ if self.worked => self.sync_point(Awaited::WorkSync),
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
                return false;
            }
        }
        true
    }

    fn sync_point(&mut self, kind: Awaited) {
        self.awaiting.push_back(kind);
        self.unsynced = false;
        self.worked = false;
    }

    fn client_piece(&mut self, piece: &Piece<'_>) {
        match piece.tag {
            // Portal and statement unnamed: the usual form.
            b'B' if piece.first && piece.body.starts_with(&[0, 0]) => {
                if let Unnamed::TooLong { used } = &mut self.unnamed {
                    *used = true;
                }
            }
            b'P' | b'Q' if piece.length > TEXT_MAX => self.client_long_text(piece),
            b'P' | b'Q' if piece.first && piece.last => self.client_text(piece.tag, piece.body),
            b'P' | b'Q' => {
                if piece.first {
                    self.client_text.clear();
                }
                self.client_text.extend_from_slice(piece.body);
                if piece.last {
                    let text = std::mem::take(&mut self.client_text);
                    self.client_text(piece.tag, &text);
                }
            }
            // Close of the unnamed statement.
            b'C' if piece.first && piece.body == b"S\0" => self.unnamed = Unnamed::None,
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
            let body = std::mem::take(&mut self.server_text);
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
                self.doubt |= dropped;
            }
            (_, CopyIn::No) => {}
        }
    }

    /// The server has begun to take data. All earlier sync points are answered, so the first awaited one is the copy's
    /// own; if it is a `Sync`, that fell into the copy, like all others up to the copy's end.
    fn copy_begins(&mut self) {
        let head = self.awaiting.iter().position(|awaited| *awaited != Awaited::CopyEnd);
        let by_query = head.is_some_and(|head| self.awaiting[head] == Awaited::Query);
        if let Some(head) = head.filter(|_| by_query) {
            // Ends before the query belong to an earlier copy that failed.
            self.awaiting.drain(..head);
        }
        let from = usize::from(by_query);
        let end = (from..self.awaiting.len()).find(|&at| self.awaiting[at] == Awaited::CopyEnd);
        let upto = end.unwrap_or(self.awaiting.len());
        let before = self.awaiting.len();
        let mut at = 0;
        self.awaiting.retain(|awaited| {
            let inside = (from..upto).contains(&at);
            at += 1;
            !(inside && matches!(awaited, Awaited::WorkSync | Awaited::BareSync))
        });
        let dropped = self.awaiting.len() < before;
        match end {
            Some(end) => {
                self.awaiting.remove(end - (before - self.awaiting.len()));
                self.copy = CopyIn::Ending { dropped };
            }
            None => {
                // The client owes the Sync that ends the copy's command.
                self.unsynced |= dropped;
                self.copy = CopyIn::Receiving { dropped };
            }
        }
    }

    fn ready(&mut self, status: Option<u8>) {
        self.transaction = if status == Some(b'I') { TransactionState::Idle } else { TransactionState::Open };
        let replied = std::mem::replace(&mut self.replied, false);
        if self.doubt {
            let head = self.awaiting.iter().find(|awaited| **awaited != Awaited::CopyEnd);
            match head {
                // The one too many: nothing is awaited, or what is would have been answered by something first.
                None => {
                    self.doubt = false;
                    self.awaiting.clear();
                    return;
                }
                Some(Awaited::Query | Awaited::WorkSync) => {
                    self.doubt = false;
                    if !replied {
                        return;
                    }
                }
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
fn is_frontend_tag(tag: u8) -> bool {
    matches!(tag, b'B' | b'C' | b'd' | b'c' | b'f' | b'D' | b'E' | b'F' | b'H' | b'P' | b'Q' | b'S' | b'X' | b'p')
}

#[cfg(test)]
#[path = "conversation/tests.rs"]
mod tests;
