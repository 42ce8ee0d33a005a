//! Keeps a replication client while its compute sleeps: follows the stream of WAL, says when it may be broken off, feeds
//! the client keepalives meanwhile, and begins the stream again where it was.
//!
//! ```text
//!  client                         proxy                          walsender
//!    START_REPLICATION … 0/A ───────────────────────────────────►   CopyBothResponse
//!    ◄──────────────────────────────────────────────── 'w' to 0/B, 'k' 0/C
//!    'r' flushed 0/C ───────────────────────────────────────────►
//!                        (quiet: the gate may take it off)       X
//!    ◄──────── 'k' 0/C, every few seconds
//!    'r' flushed 0/C ──► (noted)
//!                        somebody wakes the compute ────────────►   START_REPLICATION … 0/C
//! ```
//!
//! While the compute sleeps no WAL comes into being, so there is nothing the client could miss. It never wakes the
//! compute by itself, and follows as soon as somebody else does.
//!
//! **Invariants**: a logical stream is broken off only after the walsender told a position behind all it has sent and the
//! client has confirmed it: nothing is sent twice. A physical one goes on at the very byte. If the history is another one
//! (`IDENTIFY_SYSTEM`), the session ends.
//!
//! Messages: PostgreSQL 15, 55.4 ("Streaming Replication Protocol").

use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::unix::UnixStream;
use ebb_types::Lsn;
use tokio::io::AsyncWriteExt;

use crate::frame::{Frame, Piece};
use crate::hibernate::ReplayError;
use crate::lexical::begins_with;
use crate::wire::{Fields, cstr, error_field, message, read_message};

/// LIMIT: a client takes a server for dead that is silent for longer than a minute (`wal_receiver_timeout`).
pub const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);
/// A walsender that has sent nothing for so long is not in the middle of a transaction that it decodes.
const QUIET_FOR: Duration = Duration::from_secs(1);
/// LIMIT: commands are short; a longer text cannot be sent again.
const TEXT_MAX: usize = 8 * 1024;
/// LIMIT: how many commands are repeated before the stream is begun again; subscriptions send one.
const BEFORE_MAX: usize = 16;
/// LIMIT: answers to replication commands are a row of short columns.
const ANSWER_MAX: usize = 64 * 1024;
/// A standby's status update, the longest message whose fields matter: type, written, flushed, applied, time, reply wanted.
const HEAD_LEN: usize = 34;
/// From 1970 to 2000, which times in the protocol count from.
const EPOCH_2000: Duration = Duration::from_secs(946_684_800);

const NOT_STREAMING: &str = "replication connection";

/// What is known of a replication connection from the messages that passed.
#[derive(Debug, Default)]
pub struct Walstream {
    client: Half,
    server: Half,
    /// Commands that made state of the connection, to be sent again.
    before: Vec<Box<[u8]>>,
    /// A `START_REPLICATION` that is not answered yet.
    begun: Option<Start>,
    stream: Option<Stream>,
    /// Why it can never be broken off.
    obstacle: Option<&'static str>,
    /// Which history it follows.
    history: Option<History>,
}

/// One direction.
#[derive(Debug, Default)]
struct Half {
    frame: Frame,
    /// The message at hand, as much of it as is looked at.
    head: Vec<u8>,
}

impl Half {
    /// Takes in a piece; answers the message's head once it is whole.
    fn take(&mut self, piece: &Piece<'_>, keep: usize) -> bool {
        if piece.first {
            self.head.clear();
        }
        let room = keep.saturating_sub(self.head.len()).min(piece.body.len());
        self.head.extend_from_slice(&piece.body[..room]);
        piece.last
    }
}

/// A `START_REPLICATION` around its position.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Start {
    before: String,
    at: Lsn,
    after: String,
    logical: bool,
}

impl Start {
    fn parse(text: &str) -> Option<Self> {
        let word = text.split_whitespace().find(|word| word.contains('/') && word.parse::<Lsn>().is_ok())?;
        let begin = word.as_ptr() as usize - text.as_ptr() as usize;
        let (before, after) = (&text[..begin], &text[begin + word.len()..]);
        let logical = before.split_whitespace().any(|word| word.eq_ignore_ascii_case("logical"));
        Some(Self { before: before.to_owned(), at: word.parse().ok()?, after: after.to_owned(), logical })
    }
}

#[derive(Debug)]
struct Stream {
    start: Start,
    /// Up to here the client was sent WAL (physical), or the last change of (logical).
    sent: Lsn,
    /// The furthest that the walsender has told of.
    told: Lsn,
    /// It told so after the last change.
    told_since: bool,
    /// The client has this for good.
    flushed: Lsn,
    /// When it was last sent anything but a keepalive.
    last: Instant,
}

/// Identifies a history of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    system: Vec<u8>,
    pg_timeline: Vec<u8>,
}

/// How a stream is begun again.
#[derive(Debug, Clone)]
pub struct Resume {
    before: Vec<Box<[u8]>>,
    start: Option<(Box<[u8]>, Lsn)>,
    history: Option<History>,
}

/// What a client of a sleeping stream sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Word {
    /// A status: nothing to do but to answer with a keepalive, if it wants one.
    Status {
        /// How many bytes it is.
        taken: usize,
        /// Whether it wants an answer.
        reply: bool,
    },
    /// It is not whole yet.
    More,
    /// Something else.
    Other,
}

impl Walstream {
    /// Follows bytes of the client.
    pub fn client_sent(&mut self, mut bytes: &[u8]) {
        // What cannot be is told by the conversation, which sees the same bytes.
        while let Ok(Some(piece)) = self.client.frame.next(&mut bytes) {
            let keep = if piece.tag == b'Q' { TEXT_MAX } else { HEAD_LEN };
            if self.client.take(&piece, keep) {
                let head = std::mem::take(&mut self.client.head);
                self.client_message(piece.tag, piece.length, &head);
                self.client.head = head;
            }
        }
    }

    /// Follows bytes of the server.
    pub fn server_sent(&mut self, mut bytes: &[u8]) {
        while let Ok(Some(piece)) = self.server.frame.next(&mut bytes) {
            if self.server.take(&piece, HEAD_LEN) {
                let head = std::mem::take(&mut self.server.head);
                self.server_message(piece.tag, piece.length, &head);
                self.server.head = head;
            }
        }
    }

    fn client_message(&mut self, tag: u8, length: usize, head: &[u8]) {
        match tag {
            b'Q' if length > TEXT_MAX => self.obstacle = Some("replication command that is too long to repeat"),
            b'Q' => self.command(head),
            b'd' if head.first() == Some(&b'r') => {
                if let (Some(stream), Some(flushed)) = (&mut self.stream, position(head, 9)) {
                    stream.flushed = stream.flushed.max(flushed);
                }
            }
            b'c' | b'f' => self.stream = None,
            _ => {}
        }
    }

    fn command(&mut self, text: &[u8]) {
        let text = text.strip_suffix(b"\0").unwrap_or(text);
        let is = |keyword: &str| begins_with(text, keyword.as_bytes());
        let lower = String::from_utf8_lossy(text).to_ascii_lowercase();
        if is("START_REPLICATION") {
            self.begun = std::str::from_utf8(text).ok().and_then(Start::parse);
            if self.begun.is_none() {
                self.obstacle = Some("replication command that is not understood");
            } else if lower.contains("streaming") {
                // What of an open transaction the client has already, it would get again.
                self.obstacle = Some("replication of transactions in progress");
            }
        } else if is("CREATE_REPLICATION_SLOT") {
            if lower.contains("temporary") {
                self.obstacle = Some("temporary replication slot");
            }
        } else if is("SET") || (is("SELECT") && lower.contains("set_config")) {
            if self.before.len() < BEFORE_MAX {
                self.before.push(text.into());
            } else {
                self.obstacle = Some("replication connection with many settings");
            }
        } else if !["IDENTIFY_SYSTEM", "SHOW", "TIMELINE_HISTORY", "READ_REPLICATION_SLOT", "DROP_REPLICATION_SLOT"]
            .into_iter()
            .any(is)
        {
            self.obstacle = Some("replication connection that ran other commands");
        }
    }

    fn server_message(&mut self, tag: u8, length: usize, head: &[u8]) {
        match (tag, head.first(), &mut self.stream) {
            (b'W', ..) => {
                self.stream = self.begun.take().map(|start| Stream {
                    sent: start.at,
                    told: start.at,
                    told_since: true,
                    flushed: start.at,
                    last: Instant::now(),
                    start,
                });
            }
            (b'd', Some(b'w'), Some(stream)) => {
                let Some(begin) = position(head, 1) else { return };
                let data = if stream.start.logical { 0 } else { length.saturating_sub(25) as u64 };
                stream.sent = stream.sent.max(Lsn(begin.0.saturating_add(data)));
                stream.told_since = false;
                stream.last = Instant::now();
            }
            (b'd', Some(b'k'), Some(stream)) => {
                stream.told = stream.told.max(position(head, 1).unwrap_or(stream.told));
                stream.told_since = true;
            }
            (b'c' | b'E', ..) => {
                self.stream = None;
                self.begun = None;
            }
            _ => {}
        }
    }

    /// Whether WAL is being streamed.
    pub fn is_streaming(&self) -> bool {
        self.stream.is_some()
    }

    /// Whether the stream may be broken off now.
    ///
    /// # Errors
    /// Why not.
    pub fn quiet(&self) -> Result<(), &'static str> {
        let stream = self.stream.as_ref().ok_or(NOT_STREAMING)?;
        if let Some(obstacle) = self.obstacle {
            return Err(obstacle);
        }
        if !self.client.frame.at_boundary() || !self.server.frame.at_boundary() || stream.last.elapsed() < QUIET_FOR {
            return Err("replication client that is being sent changes");
        }
        if stream.start.logical && (!stream.told_since || stream.flushed < stream.sent) {
            return Err("replication client that has not confirmed what it was sent");
        }
        Ok(())
    }

    /// How to begin the stream again; how to get to know a new connection's history, where there is none yet.
    pub fn resume(&self) -> Resume {
        let start = self.stream.as_ref().map(|Stream { start, sent, flushed, .. }| {
            let at = if start.logical { (*flushed).max(start.at) } else { *sent };
            (format!("{}{at}{}", start.before, start.after).into_bytes().into_boxed_slice(), at)
        });
        let before = if start.is_some() { self.before.clone() } else { Vec::new() };
        Resume { before, start, history: self.history.clone() }
    }

    /// Notes the history that a backend has.
    pub fn set_history(&mut self, history: History) {
        self.history = Some(history);
    }

    /// A keepalive, as the walsender would send it.
    pub fn keepalive(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let at = self.stream.as_ref().map_or(Lsn(0), |stream| stream.told.max(stream.sent));
        let now = SystemTime::now().duration_since(UNIX_EPOCH + EPOCH_2000).unwrap_or_default();
        message(&mut out, b'd', |body| {
            body.push(b'k');
            body.extend_from_slice(&at.0.to_be_bytes());
            body.extend_from_slice(&u64::try_from(now.as_micros()).unwrap_or(0).to_be_bytes());
            body.push(0);
        });
        out
    }

    /// Looks at what a client sends while its stream sleeps.
    pub fn word(bytes: &[u8]) -> Word {
        let Some(header) = bytes.get(..5) else {
            return if bytes.first().is_none_or(|&tag| tag == b'd') { Word::More } else { Word::Other };
        };
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        // Feedback of a hot standby is repeated by itself.
        if header[0] != b'd' || !(5..=64).contains(&length) || !matches!(bytes.get(5), None | Some(b'r' | b'h')) {
            return Word::Other;
        }
        match bytes.get(5..=length) {
            None => Word::More,
            Some(body) => {
                let reply = body[0] == b'r' && body.get(33) == Some(&1);
                Word::Status { taken: length + 1, reply }
            }
        }
    }
}

fn position(head: &[u8], at: usize) -> Option<Lsn> {
    Some(Lsn(u64::from_be_bytes(head.get(at..at + 8)?.try_into().ok()?)))
}

/// Brings a backend that has just started to where the stream was; without one, only asks for its history. Cancel-safe in
/// that the backend is to be dropped then.
///
/// # Errors
/// If the backend is gone, or its history is another one, or it refuses.
pub async fn resume(backend: &mut UnixStream, plan: &Resume) -> Result<History, ReplayError> {
    let row = command(backend, b"IDENTIFY_SYSTEM").await?.unwrap_or_default();
    let unclear = || ReplayError::Refused("the server did not say what it is".to_owned());
    let mut fields = Fields(&row);
    fields.i16().ok_or_else(unclear)?;
    let mut column = || fields.column().flatten().ok_or_else(unclear);
    let history = History { system: column()?.to_vec(), pg_timeline: column()?.to_vec() };
    let end: Option<Lsn> = std::str::from_utf8(column()?).ok().and_then(|text| text.parse().ok());
    let Some((start, at)) = &plan.start else { return Ok(history) };
    if plan.history.as_ref().is_some_and(|known| *known != history) || end.is_none_or(|end| end < *at) {
        return Err(ReplayError::Refused("the branch's history is another one now".to_owned()));
    }
    for text in &plan.before {
        command(backend, text).await?;
    }
    send(backend, start).await?;
    let mut body = Vec::new();
    loop {
        match read_message(backend, &mut body, ANSWER_MAX).await? {
            b'W' => return Ok(history),
            b'E' => return Err(refused(&body)),
            b'Z' => return Err(ReplayError::Refused("the server does not stream".to_owned())),
            _ => {}
        }
    }
}

/// Runs a command; answers the body of its row, if it has one.
async fn command(backend: &mut UnixStream, text: &[u8]) -> Result<Option<Vec<u8>>, ReplayError> {
    send(backend, text).await?;
    let (mut row, mut error) = (None, None);
    let mut body = Vec::new();
    loop {
        match read_message(backend, &mut body, ANSWER_MAX).await? {
            b'Z' => return error.map_or(Ok(row), Err),
            b'D' => row = Some(std::mem::take(&mut body)),
            b'E' => error = Some(refused(&body)),
            _ => {}
        }
    }
}

async fn send(backend: &mut UnixStream, text: &[u8]) -> io::Result<()> {
    let mut out = Vec::new();
    message(&mut out, b'Q', |body| cstr(body, text));
    backend.write_all(&out).await
}

fn refused(error: &[u8]) -> ReplayError {
    ReplayError::Refused(String::from_utf8_lossy(error_field(error, b'M').unwrap_or(b"no message")).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        message(&mut out, tag, |out| out.extend_from_slice(body));
        out
    }

    fn data(begin: u64, bytes: usize) -> Vec<u8> {
        let head = [&[b'w'][..], &begin.to_be_bytes(), &begin.to_be_bytes(), &[0; 8], &vec![7; bytes]].concat();
        of(b'd', &head)
    }

    fn told(at: u64) -> Vec<u8> {
        of(b'd', &[&[b'k'][..], &at.to_be_bytes(), &[0; 9]].concat())
    }

    fn status(flushed: u64, reply: u8) -> Vec<u8> {
        of(b'd', &[&[b'r'][..], &[0; 8], &flushed.to_be_bytes(), &[0; 16], &[reply]].concat())
    }

    fn streaming(command: &str) -> Walstream {
        let mut stream = Walstream::default();
        stream.client_sent(&of(b'Q', format!("{command}\0").as_bytes()));
        stream.server_sent(&of(b'W', &[0, 0, 0]));
        stream
    }

    fn quiet(stream: &mut Walstream) -> Result<(), &'static str> {
        if let Some(stream) = &mut stream.stream {
            stream.last -= QUIET_FOR;
        }
        stream.quiet()
    }

    fn resumed(stream: &Walstream) -> String {
        String::from_utf8(stream.resume().start.unwrap().0.into_vec()).unwrap()
    }

    #[test]
    fn a_logical_stream_is_quiet_once_all_of_it_is_confirmed() {
        let mut stream =
            streaming("START_REPLICATION SLOT \"sub\" LOGICAL 0/10 (proto_version '1', publication_names '\"a/b\"')");
        assert_eq!(quiet(&mut stream), Ok(()));
        // Split at every byte.
        for byte in [data(0x100, 40), data(0x180, 5)].concat() {
            stream.server_sent(&[byte]);
        }
        stream.client_sent(&status(0x180, 0));
        assert!(quiet(&mut stream).is_err(), "it may be in the middle of a transaction");
        stream.server_sent(&told(0x200));
        assert_eq!(quiet(&mut stream), Ok(()));
        stream.server_sent(&[data(0x300, 1), told(0x300)].concat());
        assert!(quiet(&mut stream).is_err(), "the client has not confirmed it");
        stream.client_sent(&status(0x300, 0));
        assert_eq!(quiet(&mut stream), Ok(()));
        assert_eq!(
            resumed(&stream),
            "START_REPLICATION SLOT \"sub\" LOGICAL 0/300 (proto_version '1', publication_names '\"a/b\"')"
        );
        stream.client_sent(&of(b'c', b""));
        assert_eq!(quiet(&mut stream), Err(NOT_STREAMING));
    }

    #[test]
    fn a_physical_stream_goes_on_at_the_very_byte() {
        let mut stream = streaming("START_REPLICATION SLOT s 1/0 TIMELINE 1");
        stream.server_sent(&data(0x1_0000_0000, 0x123));
        assert_eq!(stream.quiet(), Err("replication client that is being sent changes"));
        assert_eq!(quiet(&mut stream), Ok(()));
        assert_eq!(resumed(&stream), "START_REPLICATION SLOT s 1/123 TIMELINE 1");
        let keepalive = stream.keepalive();
        assert_eq!(keepalive[..14], [&b"d\0\0\0\x16k"[..], &0x1_0000_0123_u64.to_be_bytes()].concat()[..]);
    }

    #[test]
    fn what_cannot_be_begun_again_is_never_quiet() {
        for command in [
            "CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL pgoutput",
            "SELECT pg_create_logical_replication_slot('s', 'pgoutput', true)",
            "START_REPLICATION SLOT s LOGICAL 0/0 (proto_version '2', streaming 'on')",
            "START_REPLICATION SLOT s LOGICAL nowhere",
        ] {
            let mut stream = Walstream::default();
            stream.client_sent(&of(b'Q', format!("{command}\0").as_bytes()));
            stream.client_sent(&of(b'Q', b"START_REPLICATION SLOT s LOGICAL 0/0\0"));
            stream.server_sent(&of(b'W', &[0, 0, 0]));
            assert!(quiet(&mut stream).is_err(), "after {command}");
        }
        let mut stream = Walstream::default();
        for command in ["IDENTIFY_SYSTEM", "SELECT pg_catalog.set_config('search_path', '', false);", "show wal_level"]
        {
            stream.client_sent(&of(b'Q', format!("{command}\0").as_bytes()));
        }
        stream.client_sent(&of(b'Q', b"START_REPLICATION SLOT s LOGICAL 0/0\0"));
        stream.server_sent(&of(b'W', &[0, 0, 0]));
        assert_eq!(quiet(&mut stream), Ok(()));
        assert_eq!(stream.resume().before.len(), 1, "settings are made again");
    }

    #[test]
    fn a_sleeping_clients_status_is_told_from_work() {
        let wanting = status(7, 1);
        assert_eq!(Walstream::word(&wanting), Word::Status { taken: wanting.len(), reply: true });
        assert_eq!(Walstream::word(&status(7, 0)), Word::Status { taken: wanting.len(), reply: false });
        for at in 0..wanting.len() {
            assert_eq!(Walstream::word(&wanting[..at]), Word::More, "at {at}");
        }
        for other in [&b"c\0\0\0\x04"[..], b"X", b"Q\0\0\0\x05\0", b"d\0\0\0\x04", b"d\0\0\0\x06x"] {
            assert_eq!(Walstream::word(other), Word::Other, "{other:?}");
        }
    }
}
