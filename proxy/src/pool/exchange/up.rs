//! From the client to the backend: each message as it is, or under the names that the backend has for its statements.

use std::borrow::Cow;
use std::sync::Arc;

use super::messages::{Message, needed, one_name, parse_message, server_name};
use super::{Client, Exchange, Naming, Owed, Refused};
use crate::conversation::{Conversation, Malformed};
use crate::pool::names::{Held, Prepared, SCRATCH};
use crate::pool::words::{Words, deallocated};
use crate::wire::{Fields, cstr};

/// LIMIT: so much is translated before it is sent.
const OUT_MAX: usize = 64 * 1024;
/// The text of the `Parse` or `Query` that stands for a client's `DEALLOCATE`.
const DEALLOCATE_SCRATCH: &[u8] = b"DEALLOCATE __ebb_scratch\0";

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

/// The backend's side of an exchange.
struct Onward<'a> {
    /// What is prepared there.
    held: &'a mut Held,
    /// What it is sent.
    out: &'a mut Vec<u8>,
}

/// Whether a message was taken; if not, an answer must come first.
type Taken = Result<bool, Refused>;

/// What becomes of a text.
enum Text {
    /// An answer must come first.
    Waits,
    /// It goes as it is.
    Passes,
    /// It gave up a statement of the client's: [`DEALLOCATE_SCRATCH`] goes in its place.
    IsReplaced,
}

/// Under which name a message goes on.
enum Sent<'a> {
    AsItIs,
    As(Cow<'a, [u8]>),
}

impl Exchange {
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
        let mut to = Onward { held, out };
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            if self.up_left > 0 {
                let take = rest.len().min(self.up_left);
                follow(client.conversation, &rest[..take])?;
                to.out.extend_from_slice(&rest[..take]);
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
            if to.out.len() >= OUT_MAX {
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
            if !self.translate(client, &mut to, &message)? {
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
    fn translate(&mut self, client: &mut Client<'_>, to: &mut Onward<'_>, message: &Message<'_>) -> Taken {
        // Behind the error, up to the sync point, they could not be closed.
        if !self.leftovers.is_empty() && client.conversation.is_turn_over() {
            for name in std::mem::take(&mut self.leftovers) {
                self.own_close(None, &name, to);
            }
        }
        match message.tag {
            b'P' => return self.parse(client, to, message),
            b'B' => return self.bind(client, to, message),
            b'D' | b'C' => return self.describe_or_close(client, to, message),
            b'Q' => return Ok(self.query(client, to, message)),
            b'S' | b'F' => self.owe(Owed::Ready),
            // The client goes; the backend stays.
            b'X' => return Ok(true),
            _ => {}
        }
        message.pass(to.out);
        Ok(true)
    }

    fn query(&mut self, client: &Client<'_>, to: &mut Onward<'_>, message: &Message<'_>) -> bool {
        let text = message.whole.then(|| message.body.strip_suffix(b"\0").unwrap_or(message.body));
        match self.text(client, to, text) {
            Text::Waits => return false,
            Text::Passes => message.pass(to.out),
            Text::IsReplaced => crate::wire::message(to.out, b'Q', |body| body.extend_from_slice(DEALLOCATE_SCRATCH)),
        }
        // A simple query drops the unnamed statement (PostgreSQL 15, 55.2.3).
        self.unnamed_is_ours = true;
        self.owe(Owed::Ready);
        true
    }

    fn parse_unnamed(&mut self, client: &Client<'_>, to: &mut Onward<'_>, message: &Message<'_>) -> bool {
        let text = if message.whole { Fields(&message.body[1..]).cstr() } else { None };
        match self.text(client, to, text) {
            Text::Waits => return false,
            Text::Passes => message.pass(to.out),
            Text::IsReplaced => crate::wire::message(to.out, b'P', |body| {
                body.push(0);
                body.extend_from_slice(DEALLOCATE_SCRATCH);
                body.extend_from_slice(&[0, 0]);
            }),
        }
        self.unnamed_is_ours = true;
        self.owe(Owed::Unnamed);
        true
    }

    /// Looks at a text that is about to be sent, if it is short enough to be known.
    fn text(&mut self, client: &Client<'_>, to: &mut Onward<'_>, text: Option<&[u8]>) -> Text {
        let named = text.and_then(deallocated);
        if named.is_some() && self.must_wait_for_names(client) {
            return Text::Waits;
        }
        match named.filter(|name| client.names.find(name).is_some()) {
            Some(_) if self.must_wait(client) => Text::Waits,
            Some(name) => {
                self.deallocate(name, to);
                Text::IsReplaced
            }
            None => {
                self.note_words(text.map_or(Words::UNREAD, Words::scan));
                Text::Passes
            }
        }
    }

    /// Makes the statement that a `DEALLOCATE` of the client's will give up in the place of its own.
    fn deallocate(&mut self, name: Vec<u8>, to: &mut Onward<'_>) {
        self.deallocating.push_back(name.into());
        // One that failed has left it there.
        self.own_close(None, SCRATCH, to);
        self.own_parse(None, SCRATCH, b"\0\0\0", to);
    }

    fn parse(&mut self, client: &mut Client<'_>, to: &mut Onward<'_>, message: &Message<'_>) -> Taken {
        if message.body.first() == Some(&0) {
            return Ok(self.parse_unnamed(client, to, message));
        }
        let mut fields = Fields(message.body);
        let Some(name) = fields.cstr() else {
            // The server says what is wrong with it.
            self.owe(Owed::Passed);
            message.pass(to.out);
            return Ok(true);
        };
        if self.must_wait(client) {
            return Ok(false);
        }
        if client.names.find(name).is_some() {
            self.parse_taken(name, fields.0, to);
            return Ok(true);
        }
        let body = fields.0;
        if client.names.is_full(name.len() + body.len()) {
            return Err(Refused::Statement("the prepared statements of the session are too many"));
        }
        let words = || Fields(body).cstr().map_or(Words::UNREAD, Words::scan);
        let prepared = client.texts.intern(client.dress, body, words);
        let here = !to.held.touch(prepared.id);
        if here {
            self.evict(to);
            to.held.insert(prepared.clone());
        } else {
            // A `DEALLOCATE` that failed has left it there.
            self.own_close(None, SCRATCH, to);
        }
        let naming = Naming { name: name.into(), prepared: prepared.clone(), here };
        self.owe(Owed::Parsed(Box::new(naming)));
        if here {
            parse_message(to.out, &prepared.name, body);
        } else {
            // It is there already, but whether it may be prepared now, only the server can tell.
            parse_message(to.out, SCRATCH, body);
            self.own_close(None, SCRATCH, to);
        }
        client.names.insert(name.into(), prepared);
        Ok(true)
    }

    /// A name that is taken: the server itself shall say so, if nothing else is wrong with the statement.
    fn parse_taken(&mut self, name: &[u8], rest: &[u8], to: &mut Onward<'_>) {
        let taken = server_name(name);
        self.own_parse(None, &taken, b"\0\0\0", to);
        self.owe(Owed::Passed);
        parse_message(to.out, &taken, rest);
        self.leftovers.push(taken);
        self.spoilt = true;
    }

    fn bind(&mut self, client: &mut Client<'_>, to: &mut Onward<'_>, message: &Message<'_>) -> Taken {
        let mut fields = Fields(message.body);
        let (Some(portal), Some(name)) = (fields.cstr(), fields.cstr()) else {
            message.pass(to.out);
            return Ok(true);
        };
        let Some(sent) = self.sent_as(client, to, name) else { return Ok(false) };
        match sent {
            Sent::AsItIs => message.pass(to.out),
            Sent::As(other) => {
                let length = message.length - name.len() + other.len();
                to.out.push(b'B');
                to.out.extend_from_slice(&(length as u32).to_be_bytes());
                cstr(to.out, portal);
                cstr(to.out, other);
                to.out.extend_from_slice(fields.0);
            }
        }
        Ok(true)
    }

    fn describe_or_close(&mut self, client: &mut Client<'_>, to: &mut Onward<'_>, message: &Message<'_>) -> Taken {
        let mut fields = Fields(message.body);
        let kind = fields.bytes(1).and_then(|kind| kind.first()).copied();
        let name = fields.cstr();
        let (Some(b'S'), Some(name)) = (kind, name) else {
            if message.tag == b'C' {
                self.owe(Owed::Closed(None));
            }
            message.pass(to.out);
            return Ok(true);
        };
        if message.tag == b'D' {
            let Some(sent) = self.sent_as(client, to, name) else { return Ok(false) };
            match sent {
                Sent::AsItIs => message.pass(to.out),
                Sent::As(other) => one_name(to.out, b'D', &other),
            }
            return Ok(true);
        }
        if name.is_empty() {
            self.unnamed_is_ours = true;
            self.owe(Owed::Closed(None));
            message.pass(to.out);
            return Ok(true);
        }
        if self.must_wait_for_names(client) || client.names.find(name).is_some() && self.must_wait(client) {
            return Ok(false);
        }
        // To close what is not there is no error; and what SQL has prepared under that name is to go, too.
        let given_up = client.names.remove(name);
        let naming = given_up.map(|prepared| Box::new(Naming { name: name.into(), prepared, here: false }));
        self.owe(Owed::Closed(naming));
        one_name(to.out, b'C', &server_name(name));
        Ok(true)
    }

    /// What the backend calls a statement, which is prepared there if it has to be. Nothing if an answer must come first.
    fn sent_as<'a>(&mut self, client: &'a Client<'_>, to: &mut Onward<'_>, name: &[u8]) -> Option<Sent<'a>> {
        if name.is_empty() {
            if !self.unnamed_is_ours {
                if self.must_wait(client) {
                    return None;
                }
                match client.conversation.unnamed_statement() {
                    Ok(Some(body)) => self.own_parse(None, b"", &body[1..], to),
                    // Not another client's.
                    Ok(None) | Err(_) => self.own_close(None, b"", to),
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
        if !to.held.touch(prepared.id) {
            if self.must_wait(client) {
                return None;
            }
            self.evict(to);
            to.held.insert(prepared.clone());
            self.own_parse(Some(prepared.id), &prepared.name, &prepared.body, to);
        }
        self.note_words(prepared.words);
        Some(Sent::As(Cow::Borrowed(&prepared.name)))
    }

    fn evict(&mut self, to: &mut Onward<'_>) {
        if let Some(old) = to.held.make_room() {
            let name = old.name.clone();
            self.own_close(Some(old), &name, to);
        }
    }

    fn own_parse(&mut self, id: Option<u64>, name: &[u8], body: &[u8], to: &mut Onward<'_>) {
        self.owe(Owed::OwnParsed(id));
        parse_message(to.out, name, body);
    }

    fn own_close(&mut self, given_up: Option<Arc<Prepared>>, name: &[u8], to: &mut Onward<'_>) {
        self.owe(Owed::OwnClosed(given_up));
        one_name(to.out, b'C', name);
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
}

/// Lets the conversation follow; it takes all, since it was asked before whether it would.
fn follow(conversation: &mut Conversation, bytes: &[u8]) -> Result<(), Malformed> {
    conversation.client_sent(bytes, false).map(drop)
}
