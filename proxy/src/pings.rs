//! Answers the pings of a sleeping client, so that asking "are you there?" wakes nothing. Pure: bytes in, bytes out.
//!
//! A ping is a turn of the client (up to its sync point) that needs no database: a bare `Sync`, an empty query in either
//! protocol (nothing, `;`, a comment), and, only where that was asked for, `SELECT 1`. The answer is what Postgres would
//! send, byte by byte (`exec_simple_query`, `exec_execute_message`, postgres.c; the tests compare both).
//!
//! Whatever is not understood to its last byte is work, and wakes.

use crate::lexical::skip_blanks;
use crate::wire::{Fields, cstr, message};

/// LIMIT: a turn longer than this is work. Pings are a few dozen bytes; some carry a comment that says whose they are.
pub const TURN_MAX: usize = 512;

/// What the first bytes of a client that slept are.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Something that needs a backend.
    Work,
    /// Perhaps a ping, but it is not whole yet.
    More,
    /// A ping.
    Ping {
        /// How many of the bytes it is.
        taken: usize,
        /// What Postgres would answer.
        answer: Vec<u8>,
    },
}

/// A query that needs no database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    /// None at all.
    Empty,
    /// `SELECT 1`.
    One,
}

/// How pings are told from work in one session.
#[derive(Debug, Clone, Copy)]
pub struct Pings<'a, N> {
    /// Whether `SELECT 1` is one.
    pub select_one: bool,
    /// The body of the `Parse` of the client's unnamed statement, if there is one.
    pub unnamed: Option<&'a [u8]>,
    /// The text of a named prepared statement without parameters.
    pub named: N,
}

/// Whether a query may be a ping, for some or for all.
pub fn may_ping(text: &[u8]) -> bool {
    text.len() <= TURN_MAX && question(text).is_some()
}

/// Whether these bytes, which begin a turn, are one ping and nothing else. `named` finds the text of a statement without
/// parameters.
#[inline]
pub fn is_ping<'a>(bytes: &[u8], select_one: bool, named: impl Fn(&[u8]) -> Option<&'a [u8]>) -> bool {
    let pings = Pings { select_one, unnamed: None, named };
    bytes.len() <= TURN_MAX && matches!(pings.hear(bytes), Heard::Ping { taken, .. } if taken == bytes.len())
}

impl<'a, N: Fn(&[u8]) -> Option<&'a [u8]>> Pings<'a, N> {
    /// Listens to the first turn in these bytes.
    pub fn hear(&self, bytes: &[u8]) -> Heard {
        let mut turn = Turn { pings: self, unnamed: Unnamed::AsBefore, portal: None, answer: Vec::new() };
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            let Some(&tag) = rest.first() else { break };
            // Nothing else can be part of a ping; its length need not be waited for.
            if !matches!(tag, b'Q' | b'S' | b'P' | b'B' | b'D' | b'E' | b'C') {
                return Heard::Work;
            }
            let Some(header) = rest.get(1..5) else { break };
            let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
            if length < 4 || at + 1 + length > TURN_MAX {
                return Heard::Work;
            }
            let Some(body) = rest.get(5..=length) else { break };
            at += 1 + length;
            match turn.message(tag, body) {
                Some(false) => {}
                Some(true) => return Heard::Ping { taken: at, answer: turn.answer },
                None => return Heard::Work,
            }
        }
        if bytes.len() < TURN_MAX { Heard::More } else { Heard::Work }
    }

    fn question(&self, text: &[u8]) -> Option<Question> {
        question(text).filter(|found| *found == Question::Empty || self.select_one)
    }
}

/// The unnamed statement, as far as a turn has got.
#[derive(Debug, Clone, Copy)]
enum Unnamed {
    AsBefore,
    Is(Question),
    Closed,
}

/// The unnamed portal.
#[derive(Debug, Clone, Copy)]
struct Portal {
    question: Question,
    binary: bool,
    run: bool,
}

struct Turn<'t, 'a, N> {
    pings: &'t Pings<'a, N>,
    unnamed: Unnamed,
    portal: Option<Portal>,
    answer: Vec<u8>,
}

impl<'a, N: Fn(&[u8]) -> Option<&'a [u8]>> Turn<'_, 'a, N> {
    /// Takes a message in. `Some(true)` at the sync point, `None` if this is no ping.
    fn message(&mut self, tag: u8, body: &[u8]) -> Option<bool> {
        let mut fields = Fields(body);
        match tag {
            // Mixed with the extended protocol it would be an odd client.
            b'Q' if self.answer.is_empty() => {
                let question = self.pings.question(whole_text(body)?)?;
                if question == Question::One {
                    self.row_description(false);
                }
                self.run(question, false);
                self.ready();
                return Some(true);
            }
            b'S' if body.is_empty() => {
                self.ready();
                return Some(true);
            }
            b'P' => {
                let (name, text) = (fields.cstr()?, fields.cstr()?);
                if !name.is_empty() || fields.0 != [0, 0] {
                    return None;
                }
                self.unnamed = Unnamed::Is(self.pings.question(text)?);
                message(&mut self.answer, b'1', |_| {});
            }
            b'B' => self.bind(fields)?,
            b'D' => self.describe(fields)?,
            b'E' => self.execute(fields)?,
            b'C' => {
                match (fields.bytes(1)?, fields.cstr()?, fields.0) {
                    (b"S", b"", b"") => self.unnamed = Unnamed::Closed,
                    (b"P", b"", b"") => self.portal = None,
                    _ => return None,
                }
                message(&mut self.answer, b'3', |_| {});
            }
            _ => return None,
        }
        Some(false)
    }

    fn statement(&self, name: &[u8]) -> Option<Question> {
        if !name.is_empty() {
            return self.pings.question((self.pings.named)(name)?);
        }
        match self.unnamed {
            Unnamed::Is(question) => Some(question),
            Unnamed::Closed => None,
            Unnamed::AsBefore => {
                let mut fields = Fields(self.pings.unnamed?);
                let (_, text) = (fields.cstr()?, fields.cstr()?);
                if fields.0 != [0, 0] {
                    return None;
                }
                self.pings.question(text)
            }
        }
    }

    fn bind(&mut self, mut fields: Fields<'_>) -> Option<()> {
        let (portal, statement) = (fields.cstr()?, fields.cstr()?);
        let formats = usize::try_from(fields.i16()?).ok().filter(|&count| count <= 1)?;
        fields.bytes(2 * formats)?;
        let values = fields.i16()?;
        let binary = match fields.i16()? {
            0 => false,
            1 => match fields.i16()? {
                0 => false,
                1 => true,
                _ => return None,
            },
            _ => return None,
        };
        if !portal.is_empty() || values != 0 || !fields.0.is_empty() {
            return None;
        }
        self.portal = Some(Portal { question: self.statement(statement)?, binary, run: false });
        message(&mut self.answer, b'2', |_| {});
        Some(())
    }

    fn describe(&mut self, mut fields: Fields<'_>) -> Option<()> {
        let (kind, name) = (fields.bytes(1)?, fields.cstr()?);
        let (question, binary) = match (kind, name) {
            (b"S", name) => {
                let question = self.statement(name)?;
                message(&mut self.answer, b't', |body| body.extend_from_slice(&[0, 0]));
                (question, false)
            }
            (b"P", b"") => self.portal.map(|portal| (portal.question, portal.binary))?,
            _ => return None,
        };
        match question {
            Question::Empty => message(&mut self.answer, b'n', |_| {}),
            Question::One => self.row_description(binary),
        }
        fields.0.is_empty().then_some(())
    }

    fn execute(&mut self, mut fields: Fields<'_>) -> Option<()> {
        let (name, limit) = (fields.cstr()?, fields.i32()?);
        let portal = self.portal.as_mut().filter(|portal| !portal.run)?;
        if !name.is_empty() || !fields.0.is_empty() || limit < 0 {
            return None;
        }
        portal.run = true;
        let Portal { question, binary, .. } = *portal;
        // With a limit of one row the portal would be suspended, not complete.
        if question == Question::One && limit == 1 {
            return None;
        }
        self.run(question, binary);
        Some(())
    }

    fn run(&mut self, question: Question, binary: bool) {
        match question {
            Question::Empty => message(&mut self.answer, b'I', |_| {}),
            Question::One => {
                let value: &[u8] = if binary { &[0, 0, 0, 1] } else { b"1" };
                message(&mut self.answer, b'D', |body| {
                    body.extend_from_slice(&1_u16.to_be_bytes());
                    body.extend_from_slice(&(value.len() as u32).to_be_bytes());
                    body.extend_from_slice(value);
                });
                message(&mut self.answer, b'C', |body| cstr(body, "SELECT 1"));
            }
        }
    }

    /// One column of no table: `int4`, four bytes, no modifier.
    fn row_description(&mut self, binary: bool) {
        message(&mut self.answer, b'T', |body| {
            body.extend_from_slice(&1_u16.to_be_bytes());
            cstr(body, "?column?");
            body.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 23, 0, 4, 0xff, 0xff, 0xff, 0xff, 0, u8::from(binary)]);
        });
    }

    fn ready(&mut self) {
        message(&mut self.answer, b'Z', |body| body.push(b'I'));
    }
}

/// A text that ends with its zero and has no other.
fn whole_text(body: &[u8]) -> Option<&[u8]> {
    body.strip_suffix(b"\0").filter(|text| !text.contains(&0))
}

/// What a query asks, if that needs no database. Only ASCII is looked at: what an encoding makes of other bytes, and
/// whether they are valid in it, is for Postgres to say.
fn question(text: &[u8]) -> Option<Question> {
    if !text.is_ascii() {
        return None;
    }
    let rest = skip_nothing(text)?;
    if rest.is_empty() {
        return Some(Question::Empty);
    }
    let (word, rest) = rest.split_at_checked(6)?;
    let gap = skip_blanks(rest)?;
    let apart = word.eq_ignore_ascii_case(b"select") && gap.len() < rest.len();
    let rest = gap.strip_prefix(b"1").filter(|_| apart)?;
    skip_nothing(rest)?.is_empty().then_some(Question::One)
}

/// Skips blanks, comments and empty statements.
fn skip_nothing(mut text: &[u8]) -> Option<&[u8]> {
    loop {
        text = skip_blanks(text)?;
        match text.strip_prefix(b";") {
            Some(rest) => text = rest,
            None => return Some(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hear(bytes: &[u8], select_one: bool) -> Heard {
        let named = |name: &[u8]| (name == b"S_1").then_some(&b"SELECT 1"[..]);
        Pings { select_one, unnamed: Some(b"\0;\0\0\0"), named }.hear(bytes)
    }

    fn turn(messages: &[(u8, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (tag, body) in messages {
            message(&mut out, *tag, |out| out.extend_from_slice(body));
        }
        out
    }

    fn query(text: &str) -> Vec<u8> {
        turn(&[(b'Q', format!("{text}\0").as_bytes())])
    }

    /// Whether it is a ping without, and with, the wish that `SELECT 1` be one.
    fn check(bytes: &[u8], empty: bool, one: bool) {
        let is_ping = |select_one| matches!(hear(bytes, select_one), Heard::Ping { taken, .. } if taken == bytes.len());
        assert_eq!((is_ping(false), is_ping(true)), (empty, one), "for {:?}", String::from_utf8_lossy(bytes));
    }

    #[test]
    fn queries_that_ask_nothing_are_pings_and_select_1_is_one_where_it_is_wished() {
        for text in ["", ";", " \n;; ", "-- ping", "/* a /* b */ */ ;", "-- x\r;"] {
            check(&query(text), true, true);
        }
        for text in ["SELECT 1", "select 1;", "/* HikariCP */ Select\t1 ; -- x", "select/**/1"] {
            check(&query(text), false, true);
        }
        for text in ["select1", "select 1, 2", "select 11", "select 1;select 1", "/* x", "selec", "sélect 1", "show x"]
        {
            check(&query(text), false, false);
        }
        check(&turn(&[(b'Q', b"no zero")]), false, false);
        check(&turn(&[(b'Q', b"\0\0")]), false, false);
    }

    #[test]
    fn the_extended_protocol_pings_too() {
        let (bind, execute): (&[u8], &[u8]) = (b"\0\0\0\0\0\0\0\0", b"\0\0\0\0\0");
        check(&turn(&[(b'S', b"")]), true, true);
        check(&turn(&[(b'P', b"\0\0\0\0"), (b'B', bind), (b'D', b"P\0"), (b'E', execute), (b'S', b"")]), true, true);
        check(&turn(&[(b'P', b"\0select 1\0\0\0"), (b'D', b"S\0"), (b'S', b"")]), false, true);
        check(&turn(&[(b'B', bind), (b'E', execute), (b'S', b"")]), true, true);
        check(&turn(&[(b'B', b"\0S_1\0\0\0\0\0\0\x01\0\x01"), (b'E', execute), (b'S', b"")]), false, true);
        check(&turn(&[(b'C', b"S\0"), (b'B', bind), (b'S', b"")]), false, false);
        check(&turn(&[(b'P', b"named\0\0\0\0"), (b'S', b"")]), false, false);
        check(&turn(&[(b'P', b"\0\0\0\x01\0\0\0\x17"), (b'S', b"")]), false, false);
        check(&turn(&[(b'B', bind), (b'E', execute), (b'E', execute), (b'S', b"")]), false, false);
        // As pgjdbc does: it wants one row at most.
        check(&turn(&[(b'B', bind), (b'E', b"\0\0\0\0\x01"), (b'S', b"")]), true, true);
        check(&turn(&[(b'B', b"\0S_1\0\0\0\0\0\0\0"), (b'E', b"\0\0\0\0\x01"), (b'S', b"")]), false, false);
        check(&turn(&[(b'E', execute), (b'S', b"")]), false, false);
        // Its answer would be awaited before the Sync.
        check(&turn(&[(b'P', b"\0\0\0\0"), (b'H', b"")]), false, false);
    }

    #[test]
    fn what_is_not_whole_is_waited_for_unless_it_can_be_no_ping() {
        let ping = turn(&[(b'P', b"\0\0\0\0"), (b'S', b"")]);
        for at in 0..ping.len() {
            assert_eq!(hear(&ping[..at], false), Heard::More, "at {at}");
        }
        let mut two = ping.clone();
        two.extend_from_slice(b"Q");
        assert!(matches!(hear(&two, false), Heard::Ping { taken, .. } if taken == ping.len()));
        for work in [&b"F"[..], b"Q\0\0\x10\0", b"Q\0\0\0\x03", b"d", b"H", b"!"] {
            assert_eq!(hear(work, true), Heard::Work, "for {work:?}");
        }
        assert_eq!(hear(&turn(&[(b'P', &b"\0\0\0\0"[..]); 60]), false), Heard::Work);
    }
}
