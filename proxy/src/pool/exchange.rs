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

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use super::names::{Held, Names, Prepared, RESERVED, SCRATCH, Texts};
use super::words::{Words, deallocated};
use crate::conversation::{Conversation, Malformed};
use crate::errors::Said;
use crate::wire::{Fields, cstr, message};

/// LIMIT: texts longer than this are not looked through; what is longer carries data.
const TEXT_MAX: usize = 8 * 1024;
/// LIMIT: a named statement is kept by the proxy, so it has to end somewhere.
pub const NAMED_MAX: usize = 1 << 20;
/// LIMIT: the names in front of a `Bind`, or all of a `Describe` or `Close`; Postgres's own names have 63 bytes.
const HEAD_MAX: usize = 2 * 1024;
/// LIMIT: so much is translated before it is sent.
const OUT_MAX: usize = 64 * 1024;
/// LIMIT: messages of the server of these sizes are waited for whole; those that matter are far shorter.
const ANSWER_MAX: usize = 4 * 1024;

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

/// Why [`Exchange::up`] did not take all bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It did, or the rest is the begin of a message that has to be whole: so many bytes in all.
    Wants(usize),
    /// An answer must come first.
    Awaits,
    /// So much has been translated that it should be sent.
    Full,
    /// A sync point: only one turn was asked for.
    Turn,
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

    // Up.

    /// Takes messages of the client and appends what the backend gets. Answers how many bytes were taken, and why no more.
    ///
    /// # Errors
    /// If the client's message is not to be sent on.
    pub fn up(
        &mut self,
        client: &mut Client<'_>,
        held: &mut Held,
        bytes: &[u8],
        out: &mut Vec<u8>,
        one_turn: bool,
    ) -> Result<(usize, Stopped), Refused> {
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            if self.up_left > 0 {
                let take = rest.len().min(self.up_left);
                follow(client.conversation, &rest[..take])?;
                out.extend_from_slice(&rest[..take]);
                self.up_left -= take;
                at += take;
                if self.up_left > 0 {
                    return Ok((at, Stopped::Wants(1)));
                }
                if one_turn && self.up_ends_turn && client.conversation.is_turn_over() {
                    return Ok((at, Stopped::Turn));
                }
                continue;
            }
            if out.len() >= OUT_MAX {
                return Ok((at, Stopped::Full));
            }
            if rest.len() < 5 {
                return Ok((at, Stopped::Wants(5)));
            }
            let tag = rest[0];
            let length = u32::from_be_bytes([rest[1], rest[2], rest[3], rest[4]]) as usize;
            let Some(body_length) = length.checked_sub(4) else {
                // The conversation says what is wrong with it.
                follow(client.conversation, &rest[..5])?;
                return Ok((at, Stopped::Awaits));
            };
            let available = (length + 1).min(rest.len());
            let body = &rest[5..available];
            let needed = needed(tag, body_length, body)?;
            if body.len() < needed {
                return Ok((at, Stopped::Wants(5 + needed)));
            }
            if client.conversation.awaits_too_much() {
                return Ok((at, Stopped::Awaits));
            }
            let whole = body.len() == body_length;
            let message = Message { tag, length, body, whole };
            if !self.translate(client, held, &message, out)? {
                return Ok((at, Stopped::Awaits));
            }
            follow(client.conversation, &rest[..available])?;
            at += available;
            self.up_left = length + 1 - available;
            self.up_ends_turn = matches!(tag, b'Q' | b'S' | b'F');
            if one_turn && self.up_left == 0 && self.up_ends_turn && client.conversation.is_turn_over() {
                return Ok((at, Stopped::Turn));
            }
        }
    }

    /// One message, of which all that matters is there. Answers whether it was taken; if not, an answer must come first.
    fn translate(
        &mut self,
        client: &mut Client<'_>,
        held: &mut Held,
        message: &Message<'_>,
        out: &mut Vec<u8>,
    ) -> Result<bool, Refused> {
        // Behind the error, up to the sync point, they could not be closed.
        if !self.leftovers.is_empty() && client.conversation.is_turn_over() {
            for name in std::mem::take(&mut self.leftovers) {
                self.own_close(None, &name, out);
            }
        }
        match message.tag {
            b'P' => return self.parse(client, held, message, out),
            b'B' => return self.bind(client, held, message, out),
            b'D' | b'C' => return self.describe_or_close(client, held, message, out),
            b'Q' => return Ok(self.query(client, message, out)),
            b'S' | b'F' => self.owe(Owed::Ready),
            // The client goes; the backend stays.
            b'X' => return Ok(true),
            _ => {}
        }
        message.pass(out);
        Ok(true)
    }

    fn query(&mut self, client: &Client<'_>, message: &Message<'_>, out: &mut Vec<u8>) -> bool {
        let text = message.whole.then(|| message.body.strip_suffix(b"\0").unwrap_or(message.body));
        let named = text.and_then(deallocated);
        if named.is_some() && self.must_wait_for_names(client) {
            return false;
        }
        if let Some(name) = named.filter(|name| client.names.find(name).is_some()) {
            if self.must_wait(client) {
                return false;
            }
            self.deallocate(name, out);
            crate::wire::message(out, b'Q', |body| body.extend_from_slice(DEALLOCATE_SCRATCH));
        } else {
            self.note_words(text.map_or(Words::UNREAD, Words::scan));
            message.pass(out);
        }
        // A simple query drops the unnamed statement (PostgreSQL 15, 55.2.3).
        self.unnamed_is_ours = true;
        self.owe(Owed::Ready);
        true
    }

    /// Makes the statement that a `DEALLOCATE` of the client's will give up in the place of its own.
    fn deallocate(&mut self, name: Vec<u8>, out: &mut Vec<u8>) {
        self.deallocating.push_back(name.into());
        // One that failed has left it there.
        self.own_close(None, SCRATCH, out);
        self.own_parse(None, SCRATCH, b"\0\0\0", out);
    }

    fn parse(
        &mut self,
        client: &mut Client<'_>,
        held: &mut Held,
        message: &Message<'_>,
        out: &mut Vec<u8>,
    ) -> Result<bool, Refused> {
        let mut fields = Fields(message.body);
        if message.body.first() == Some(&0) {
            fields.0 = &message.body[1..];
            let text = if message.whole { fields.cstr() } else { None };
            let named = text.and_then(deallocated);
            if named.is_some() && self.must_wait_for_names(client) {
                return Ok(false);
            }
            if let Some(name) = named.filter(|name| client.names.find(name).is_some()) {
                if self.must_wait(client) {
                    return Ok(false);
                }
                self.deallocate(name, out);
                self.owe(Owed::Unnamed);
                crate::wire::message(out, b'P', |body| {
                    body.push(0);
                    body.extend_from_slice(DEALLOCATE_SCRATCH);
                    body.extend_from_slice(&[0, 0]);
                });
            } else {
                self.note_words(text.map_or(Words::UNREAD, Words::scan));
                self.owe(Owed::Unnamed);
                message.pass(out);
            }
            self.unnamed_is_ours = true;
            return Ok(true);
        }
        let Some(name) = fields.cstr() else {
            // The server says what is wrong with it.
            self.owe(Owed::Passed);
            message.pass(out);
            return Ok(true);
        };
        if self.must_wait(client) {
            return Ok(false);
        }
        if client.names.find(name).is_some() {
            self.parse_taken(name, message, out);
            return Ok(true);
        }
        let body = fields.0;
        if client.names.is_full(name.len() + body.len()) {
            return Err(Refused::Statement("the prepared statements of the session are too many"));
        }
        let words = || Fields(body).cstr().map_or(Words::UNREAD, Words::scan);
        let prepared = client.texts.intern(client.dress, body, words);
        let here = !held.touch(prepared.id);
        if here {
            self.evict(held, out);
            held.insert(prepared.clone());
        }
        if !here {
            // A `DEALLOCATE` that failed has left it there.
            self.own_close(None, SCRATCH, out);
        }
        let naming = Naming { name: name.into(), prepared: prepared.clone(), here };
        self.owe(Owed::Parsed(Box::new(naming)));
        if here {
            parse_message(out, &prepared.name, body);
        } else {
            // It is there already, but whether it may be prepared now, only the server can tell.
            parse_message(out, SCRATCH, body);
            self.own_close(None, SCRATCH, out);
        }
        client.names.insert(name.into(), prepared);
        Ok(true)
    }

    /// A name that is taken: the server itself shall say so, if nothing else is wrong with the statement.
    fn parse_taken(&mut self, name: &[u8], message: &Message<'_>, out: &mut Vec<u8>) {
        let taken = server_name(name);
        self.own_parse(None, &taken, b"\0\0\0", out);
        self.owe(Owed::Passed);
        let mut fields = Fields(message.body);
        let _ = fields.cstr();
        parse_message(out, &taken, fields.0);
        self.leftovers.push(taken);
        self.spoilt = true;
    }

    fn bind(
        &mut self,
        client: &mut Client<'_>,
        held: &mut Held,
        message: &Message<'_>,
        out: &mut Vec<u8>,
    ) -> Result<bool, Refused> {
        let mut fields = Fields(message.body);
        let (Some(portal), Some(name)) = (fields.cstr(), fields.cstr()) else {
            message.pass(out);
            return Ok(true);
        };
        let Some(sent) = self.sent_as(client, held, name, out) else { return Ok(false) };
        match sent {
            Sent::AsItIs => message.pass(out),
            Sent::As(other) => {
                let length = message.length - name.len() + other.len();
                out.push(b'B');
                out.extend_from_slice(&(length as u32).to_be_bytes());
                cstr(out, portal);
                cstr(out, other);
                out.extend_from_slice(fields.0);
            }
        }
        Ok(true)
    }

    fn describe_or_close(
        &mut self,
        client: &mut Client<'_>,
        held: &mut Held,
        message: &Message<'_>,
        out: &mut Vec<u8>,
    ) -> Result<bool, Refused> {
        let mut fields = Fields(message.body);
        let kind = fields.bytes(1).and_then(|kind| kind.first()).copied();
        let name = fields.cstr();
        let (Some(b'S'), Some(name)) = (kind, name) else {
            if message.tag == b'C' {
                self.owe(Owed::Closed(None));
            }
            message.pass(out);
            return Ok(true);
        };
        if message.tag == b'D' {
            let Some(sent) = self.sent_as(client, held, name, out) else { return Ok(false) };
            match sent {
                Sent::AsItIs => message.pass(out),
                Sent::As(other) => one_name(out, b'D', &other),
            }
            return Ok(true);
        }
        if name.is_empty() {
            self.unnamed_is_ours = true;
            self.owe(Owed::Closed(None));
            message.pass(out);
            return Ok(true);
        }
        if self.must_wait_for_names(client) || client.names.find(name).is_some() && self.must_wait(client) {
            return Ok(false);
        }
        // To close what is not there is no error; and what SQL has prepared under that name is to go, too.
        let given_up = client.names.remove(name);
        let naming = given_up.map(|prepared| Box::new(Naming { name: name.into(), prepared, here: false }));
        self.owe(Owed::Closed(naming));
        one_name(out, b'C', &server_name(name));
        Ok(true)
    }

    /// What the backend calls a statement, which is prepared there if it has to be. Nothing if an answer must come first.
    fn sent_as<'a>(
        &mut self,
        client: &'a Client<'_>,
        held: &mut Held,
        name: &[u8],
        out: &mut Vec<u8>,
    ) -> Option<Sent<'a>> {
        if name.is_empty() {
            if !self.unnamed_is_ours {
                if self.must_wait(client) {
                    return None;
                }
                match client.conversation.unnamed_statement() {
                    Ok(Some(body)) => self.own_parse(None, b"", &body[1..], out),
                    // Not another client's.
                    Ok(None) | Err(_) => self.own_close(None, b"", out),
                }
                self.unnamed_is_ours = true;
            }
            return Some(Sent::AsItIs);
        }
        if self.must_wait_for_names(client) {
            return None;
        }
        let Some(prepared) = client.names.find(name) else {
            let sent = server_name(name);
            return Some(if *sent == *name { Sent::AsItIs } else { Sent::As(Cow::Owned(sent.into())) });
        };
        if !held.touch(prepared.id) {
            if self.must_wait(client) {
                return None;
            }
            self.evict(held, out);
            held.insert(prepared.clone());
            self.own_parse(Some(prepared.id), &prepared.name, &prepared.body, out);
        }
        self.note_words(prepared.words);
        Some(Sent::As(Cow::Borrowed(&prepared.name)))
    }

    fn evict(&mut self, held: &mut Held, out: &mut Vec<u8>) {
        if let Some(old) = held.make_room() {
            let name = old.name.clone();
            self.own_close(Some(old), &name, out);
        }
    }

    fn own_parse(&mut self, id: Option<u64>, name: &[u8], body: &[u8], out: &mut Vec<u8>) {
        self.owe(Owed::OwnParsed(id));
        parse_message(out, name, body);
    }

    fn own_close(&mut self, given_up: Option<Arc<Prepared>>, name: &[u8], out: &mut Vec<u8>) {
        self.owe(Owed::OwnClosed(given_up));
        one_name(out, b'C', name);
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

    /// Whether the fate of an earlier batch is open. Where the answers to a copy that failed are not to be told apart,
    /// there is no waiting for them.
    fn must_wait(&self, client: &Client<'_>) -> bool {
        self.batches > 0 && !client.conversation.is_unclear()
    }

    /// Whether it is open, besides, what a name means: then no name can be translated.
    fn must_wait_for_names(&self, client: &Client<'_>) -> bool {
        (self.decisions > 0 || self.drops || !self.deallocating.is_empty()) && self.must_wait(client)
    }

    fn note_words(&mut self, words: Words) {
        self.words = self.words.and(words);
        self.drops |= words.has(Words::DROPS);
    }

    // Down.

    /// Takes messages of the server: what is not for the client is cut out of `bytes`. Answers how many bytes at the front
    /// then go to the client, and how many were taken in all.
    ///
    /// # Errors
    /// If a header is impossible.
    pub fn down(
        &mut self,
        names: &mut Names,
        conversation: &mut Conversation,
        held: &mut Held,
        bytes: &mut [u8],
    ) -> Result<(usize, usize), BadAnswer> {
        let (mut read, mut write) = (0, 0);
        loop {
            if self.down_left > 0 {
                let take = self.down_left.min(bytes.len() - read);
                if !self.down_drops {
                    keep(bytes, read, &mut write, take);
                }
                read += take;
                self.down_left -= take;
                if self.down_left > 0 {
                    break;
                }
            }
            let Some(header) = bytes.get(read..read + 5) else { break };
            let tag = header[0];
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            let body = length.checked_sub(4).ok_or(BadAnswer)?;
            let matters = matches!(tag, b'1' | b'3' | b'C' | b'E' | b'S' | b'Z');
            if matters && tag != b'E' && body <= ANSWER_MAX && bytes.len() < read + 5 + body {
                break;
            }
            let known = &bytes[(read + 5).min(bytes.len())..(read + 5 + body).min(bytes.len())];
            self.down_drops = if self.prelude > 0 {
                self.prelude_answer(conversation, tag, known)
            } else {
                matters && self.answer(names, conversation, held, tag, known)
            };
            self.down_left = body;
            if !self.down_drops {
                keep(bytes, read, &mut write, 5);
            }
            read += 5;
        }
        conversation.server_sent(&bytes[..write]).map_err(|_| BadAnswer)?;
        if conversation.is_answered() {
            self.resync(names, conversation, held);
        }
        Ok((write, read))
    }

    /// An answer to the proxy's own queries; answers whether the client is not to see it.
    fn prelude_answer(&mut self, conversation: &mut Conversation, tag: u8, body: &[u8]) -> bool {
        match tag {
            b'Z' => self.prelude -= 1,
            b'E' => self.prelude_failed = true,
            b'S' => {
                // What is news to the client, it is told; else it is as it believes it to be.
                let mut fields = Fields(body);
                if let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) {
                    return !conversation.would_be_news(name, value);
                }
            }
            _ => {}
        }
        true
    }

    /// Answers whether the client is not to see this message.
    fn answer(
        &mut self,
        names: &mut Names,
        conversation: &mut Conversation,
        held: &mut Held,
        tag: u8,
        body: &[u8],
    ) -> bool {
        match tag {
            b'1' | b'3' => return self.completed(tag),
            b'Z' => {
                self.skip(names, conversation, held);
                let _ = self.next_owed();
                if self.owed.is_empty() {
                    self.deallocating.clear();
                    self.drops = false;
                }
            }
            b'E' => {
                self.deallocating.clear();
                self.skip(names, conversation, held);
            }
            b'S' => self.parameters_changed = true,
            b'C' => self.command(names, held, body.strip_suffix(b"\0").unwrap_or(body)),
            _ => {}
        }
        false
    }

    fn completed(&mut self, tag: u8) -> bool {
        let matching = |owed: &Owed| match owed {
            Owed::Passed | Owed::Unnamed | Owed::Parsed(_) | Owed::OwnParsed(_) => tag == b'1',
            Owed::Closed(_) | Owed::OwnClosed(_) => tag == b'3',
            Owed::Ready => false,
        };
        // What does not fit is the client's; that cannot be, but then it is not ours to leave out.
        match self.owed.front() {
            Some(owed) if matching(owed) => {
                let owed = self.next_owed();
                matches!(owed, Some(Owed::OwnParsed(_) | Owed::OwnClosed(_)))
            }
            _ => false,
        }
    }

    /// A command has ended with this tag.
    fn command(&mut self, names: &mut Names, held: &mut Held, tag: &[u8]) {
        match tag {
            b"SET" => self.touched |= self.words.has(Words::SETS),
            b"DECLARE CURSOR" => self.touched |= self.words.has(Words::HOLDS),
            b"DEALLOCATE" => match self.deallocating.pop_front() {
                Some(name) => drop(names.remove(&name)),
                None => self.freed = true,
            },
            b"DEALLOCATE ALL" | b"DISCARD ALL" => {
                names.clear();
                held.clear();
                self.freed = true;
            }
            b"LISTEN" | b"PREPARE" => self.touched = true,
            b"RESET" | b"UNLISTEN" | b"DISCARD TEMP" | b"CLOSE CURSOR" | b"CLOSE CURSOR ALL" | b"DROP TABLE" => {
                self.freed = true;
            }
            // What a library has changed in its process stays changed.
            b"LOAD" => self.spoilt = true,
            _ => {}
        }
    }

    /// All that was sent up to the last sync point has been answered: what is still owed for it will not come.
    fn resync(&mut self, names: &mut Names, conversation: &mut Conversation, held: &mut Held) {
        while self.batches > 0 {
            self.skip(names, conversation, held);
            let _ = self.next_owed();
        }
    }

    /// The server skips what it still owes before the next `ReadyForQuery`: that is taken back, the last first, because what
    /// came later may stand on what came before.
    fn skip(&mut self, names: &mut Names, conversation: &mut Conversation, held: &mut Held) {
        let skipped = self.owed.iter().position(|owed| matches!(owed, Owed::Ready)).unwrap_or(self.owed.len());
        self.decisions -= self.owed.range(..skipped).filter(|owed| owed.decides()).count();
        for owed in self.owed.drain(..skipped).rev() {
            undo(owed, names, conversation, held);
        }
    }
}

/// A header that no server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadAnswer;

/// Under which name a message goes on.
enum Sent<'a> {
    AsItIs,
    As(Cow<'a, [u8]>),
}

struct Message<'a> {
    tag: u8,
    /// As in its header: with the four bytes of itself.
    length: usize,
    /// What of the body is at hand.
    body: &'a [u8],
    /// Whether that is all.
    whole: bool,
}

impl Message<'_> {
    /// Appends it as it came; what is not at hand follows.
    fn pass(&self, out: &mut Vec<u8>) {
        out.push(self.tag);
        out.extend_from_slice(&(self.length as u32).to_be_bytes());
        out.extend_from_slice(self.body);
    }
}

/// The text of the `Parse` or `Query` that stands for a client's `DEALLOCATE`.
const DEALLOCATE_SCRATCH: &[u8] = b"DEALLOCATE __ebb_scratch\0";

/// How many bytes of a body have to be at hand before the message can be dealt with.
fn needed(tag: u8, length: usize, body: &[u8]) -> Result<usize, Refused> {
    Ok(match tag {
        b'Q' if length <= TEXT_MAX => length,
        b'P' => match body.first() {
            None => length.min(1),
            Some(0) if length <= TEXT_MAX => length,
            Some(0) => 1,
            Some(_) if length <= NAMED_MAX => length,
            Some(_) => return Err(Refused::Statement("the text of a named prepared statement is too long")),
        },
        b'B' => {
            let mut ends = body.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at + 1);
            match ends.nth(1) {
                Some(end) => end,
                None if body.len() < length.min(HEAD_MAX) => body.len() + 1,
                // Broken off: the server says so.
                None if length < HEAD_MAX => length,
                None => return Err(Refused::Statement("the name of a prepared statement is too long")),
            }
        }
        b'D' | b'C' | b'X' if length > HEAD_MAX => {
            return Err(Refused::Statement("the name of a prepared statement is too long"));
        }
        b'D' | b'C' | b'X' => length,
        _ => 0,
    })
}

/// What a client's own name is on a backend: the same, unless it could be taken for one of ours.
fn server_name(name: &[u8]) -> Box<[u8]> {
    if name.starts_with(RESERVED) { [b"client:", name].concat().into() } else { name.into() }
}

fn parse_message(out: &mut Vec<u8>, name: &[u8], rest: &[u8]) {
    message(out, b'P', |body| {
        cstr(body, name);
        body.extend_from_slice(rest);
    });
}

fn one_name(out: &mut Vec<u8>, tag: u8, name: &[u8]) {
    message(out, tag, |body| {
        body.push(b'S');
        cstr(body, name);
    });
}

fn keep(bytes: &mut [u8], read: usize, write: &mut usize, count: usize) {
    if *write != read {
        bytes.copy_within(read..read + count, *write);
    }
    *write += count;
}

/// The server has skipped, or refused, what this is owed for.
fn undo(owed: Owed, names: &mut Names, conversation: &mut Conversation, held: &mut Held) {
    match owed {
        Owed::Unnamed => conversation.forget_unnamed(),
        Owed::Parsed(naming) => {
            names.remove(&naming.name);
            if naming.here {
                held.remove(naming.prepared.id);
            }
        }
        Owed::OwnParsed(Some(id)) => drop(held.remove(id)),
        Owed::Closed(Some(naming)) => names.insert(naming.name, naming.prepared),
        Owed::OwnClosed(Some(prepared)) => held.insert(prepared),
        Owed::Passed | Owed::OwnParsed(None) | Owed::Closed(None) | Owed::OwnClosed(None) | Owed::Ready => {}
    }
}

/// Lets the conversation follow; it takes all, since it was asked before whether it would.
fn follow(conversation: &mut Conversation, bytes: &[u8]) -> Result<(), Malformed> {
    conversation.client_sent(bytes, false).map(drop)
}

#[cfg(test)]
#[path = "exchange/tests.rs"]
mod tests;
