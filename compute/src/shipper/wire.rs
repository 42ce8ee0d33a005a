//! The client side of Postgres's physical replication (PostgreSQL 15 manual, 55.4), over the unit's private socket.

use std::io;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ebb_types::{Lsn, Timestamp};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{self, DataRowBody, ErrorFields};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::STANDBY;
use crate::postgres::SUPERUSER;

/// LIMIT: a walsender sends at most 16 pages of WAL at once (PostgreSQL 15 `walsender.c`, `MAX_SEND_SIZE`), and less of
/// anything else.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 * 8192 + 1024;

/// LIMIT: an answer takes no time; a server that takes so long for it has other troubles.
const DEADLINE: Duration = Duration::from_secs(20);

/// The tag of `CopyBothResponse`, which only replication knows.
const COPY_BOTH: u8 = b'W';

/// Seconds from 1970 to 2000, when Postgres's time begins.
const POSTGRES_EPOCH: i64 = 946_684_800;

/// Why the conversation ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the connection to postgres failed")]
    Io(#[from] io::Error),
    #[error("postgres refused replication: {message}")]
    Refused { code: String, message: String },
    #[error("postgres took too long to answer about replication")]
    Deadline(#[from] tokio::time::error::Elapsed),
    #[error("postgres said something else than expected: {0}")]
    Unexpected(&'static str),
}

pub(super) type Result<T, E = Error> = std::result::Result<T, E>;

/// What `IDENTIFY_SYSTEM` answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct System {
    pub identifier: u64,
    pub pg_timeline: u32,
    /// Up to here WAL is on disk.
    pub flushed: Lsn,
}

/// A connection to a walsender that was asked for nothing yet.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    received: BytesMut,
}

/// A connection over which WAL comes.
#[derive(Debug)]
pub(super) struct Stream(Connection);

/// What comes over it.
#[derive(Debug)]
pub(super) enum Message {
    /// WAL from `start` on, at most [`MESSAGE_BYTES_MAX`]; all there is ends at `end`.
    Wal { start: Lsn, end: Lsn, bytes: Bytes },
    /// All there is ends here. Whether an answer is wanted.
    Alive { end: Lsn, reply: bool },
    /// There is no more WAL of this Postgres timeline, or Postgres shuts down and has sent everything.
    Ended,
}

impl Connection {
    /// Connects as the standby that commits may wait for.
    pub async fn open(socket: &Path) -> Result<Self> {
        timeout(DEADLINE, async {
            let mut connection = Self { stream: UnixStream::connect(socket).await?, received: BytesMut::new() };
            let parameters = [("user", SUPERUSER), ("replication", "true"), ("application_name", STANDBY)];
            let mut startup = BytesMut::new();
            frontend::startup_message(parameters, &mut startup)?;
            connection.stream.write_all(&startup).await?;
            loop {
                match connection.next().await? {
                    backend::Message::ReadyForQuery(_) => return Ok(connection),
                    backend::Message::AuthenticationOk
                    | backend::Message::ParameterStatus(_)
                    | backend::Message::BackendKeyData(_) => {}
                    _ => return Err(Error::Unexpected("it wants to authenticate")),
                }
            }
        })
        .await?
    }

    /// Which cluster this is, and where it is.
    pub async fn identify(&mut self) -> Result<System> {
        let row = self.ask("IDENTIFY_SYSTEM").await?;
        Ok(System { identifier: column(&row, 0)?, pg_timeline: column(&row, 1)?, flushed: column(&row, 2)? })
    }

    /// The history file of a Postgres timeline from the second on.
    pub async fn history(&mut self, pg_timeline: u32) -> Result<Bytes> {
        let row = self.ask(&format!("TIMELINE_HISTORY {pg_timeline}")).await?;
        let content = row.ranges().nth(1)?.flatten().ok_or(Error::Unexpected("a history without content"))?;
        Ok(row.buffer_bytes().slice(content))
    }

    /// Begins to receive.
    pub async fn stream(mut self, slot: &str, from: Lsn, pg_timeline: u32) -> Result<Stream> {
        timeout(DEADLINE, async {
            self.send(&format!("START_REPLICATION SLOT {slot} PHYSICAL {from} TIMELINE {pg_timeline}")).await?;
            loop {
                // The crate does not know this message; it has nothing that matters here.
                if self.received.first() == Some(&COPY_BOTH) && self.received.len() >= 5 {
                    let length = 1 + u32::from_be_bytes(self.received[1..5].try_into().expect("four bytes")) as usize;
                    while self.received.len() < length {
                        self.receive().await?;
                    }
                    self.received.advance(length);
                    return Ok(Stream(self));
                }
                if self.received.is_empty() || self.received.first() == Some(&COPY_BOTH) {
                    self.receive().await?;
                } else if !matches!(self.next().await?, backend::Message::ParameterStatus(_)) {
                    return Err(Error::Unexpected("it does not stream"));
                }
            }
        })
        .await?
    }

    /// Runs a command that answers one row.
    async fn ask(&mut self, command: &str) -> Result<DataRowBody> {
        timeout(DEADLINE, async {
            self.send(command).await?;
            let mut row = None;
            loop {
                match self.next().await? {
                    backend::Message::DataRow(body) => row = Some(body),
                    backend::Message::ReadyForQuery(_) => {
                        return row.ok_or(Error::Unexpected("an answer without a row"));
                    }
                    _ => {}
                }
            }
        })
        .await?
    }

    async fn send(&mut self, command: &str) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::query(command, &mut out)?;
        Ok(self.stream.write_all(&out).await?)
    }

    /// The next message; errors of Postgres are errors, notices are passed over.
    ///
    /// # Cancel safety
    /// What was received stays in the buffer.
    async fn next(&mut self) -> Result<backend::Message> {
        loop {
            match backend::Message::parse(&mut self.received)? {
                Some(backend::Message::ErrorResponse(body)) => return Err(refused(body.fields())?),
                Some(backend::Message::NoticeResponse(_)) => {}
                Some(message) => return Ok(message),
                None => self.receive().await?,
            }
        }
    }

    async fn receive(&mut self) -> Result<()> {
        if let [_, length @ ..] = &self.received[..]
            && let Some(length) = length.first_chunk()
            && u32::from_be_bytes(*length) as usize > MESSAGE_BYTES_MAX
        {
            return Err(Error::Unexpected("a message longer than any"));
        }
        match self.stream.read_buf(&mut self.received).await? {
            0 => Err(Error::Io(io::ErrorKind::UnexpectedEof.into())),
            _ => Ok(()),
        }
    }
}

impl Stream {
    /// What comes next.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn next(&mut self) -> Result<Message> {
        loop {
            match self.0.next().await? {
                backend::Message::CopyData(body) => {
                    if let Some(message) = parse(body.into_bytes())? {
                        return Ok(message);
                    }
                }
                backend::Message::CopyDone | backend::Message::CommandComplete(_) => return Ok(Message::Ended),
                _ => {}
            }
        }
    }

    /// Tells Postgres what it may forget, and which commits need wait no longer.
    pub async fn report(&mut self, shipped: Lsn) -> Result<()> {
        let mut update = BytesMut::with_capacity(34);
        update.put_u8(b'r');
        // Written, flushed and applied: in the bucket it is all three, so that no synchronous_commit waits for more.
        for _ in 0..3 {
            update.put_u64(shipped.0);
        }
        update.put_i64(Timestamp::now().as_microsecond() - POSTGRES_EPOCH * 1_000_000);
        update.put_u8(0);
        let mut out = BytesMut::with_capacity(39);
        frontend::CopyData::new(update)?.write(&mut out);
        timeout(DEADLINE, self.0.stream.write_all(&out)).await??;
        Ok(())
    }
}

/// Reads what is inside a `CopyData` of a walsender; `None` for what a later version may add.
fn parse(mut bytes: Bytes) -> Result<Option<Message>> {
    let short = || Error::Unexpected("a message that is too short");
    match bytes.try_get_u8().map_err(|_| short())? {
        b'w' if bytes.len() >= 24 => {
            let (start, end) = (Lsn(bytes.get_u64()), Lsn(bytes.get_u64()));
            bytes.advance(8);
            Ok(Some(Message::Wal { start, end, bytes }))
        }
        b'k' if bytes.len() >= 17 => {
            let end = Lsn(bytes.get_u64());
            bytes.advance(8);
            Ok(Some(Message::Alive { end, reply: bytes.get_u8() != 0 }))
        }
        b'w' | b'k' => Err(short()),
        _ => Ok(None),
    }
}

fn column<T: FromStr>(row: &DataRowBody, number: usize) -> Result<T> {
    let range = row.ranges().nth(number)?.flatten();
    let text = range.and_then(|range| std::str::from_utf8(row.buffer().get(range)?).ok());
    text.and_then(|text| text.parse().ok()).ok_or(Error::Unexpected("a column that makes no sense"))
}

fn refused(mut fields: ErrorFields<'_>) -> Result<Error> {
    let (mut code, mut message) = (String::new(), String::new());
    while let Some(field) = fields.next()? {
        match field.type_() {
            b'C' => code = String::from_utf8_lossy(field.value_bytes()).into_owned(),
            b'M' => message = String::from_utf8_lossy(field.value_bytes()).into_owned(),
            _ => {}
        }
    }
    Ok(Error::Refused { code, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_walsender_says_is_understood() {
        let mut wal = BytesMut::from(&b"w"[..]);
        wal.put_u64(5);
        wal.put_u64(9);
        wal.put_u64(0);
        wal.put_slice(b"abc");
        let Ok(Some(Message::Wal { start: Lsn(5), end: Lsn(9), bytes })) = parse(wal.clone().freeze()) else {
            panic!("no WAL")
        };
        assert_eq!(bytes, "abc");
        let mut alive = BytesMut::from(&b"k"[..]);
        alive.put_u64(7);
        alive.put_u64(0);
        alive.put_u8(1);
        assert!(matches!(parse(alive.clone().freeze()), Ok(Some(Message::Alive { end: Lsn(7), reply: true }))));
        for cut in 0..17 {
            assert!(
                parse(alive.clone().freeze().slice(..cut)).is_err()
                    && parse(wal.clone().freeze().slice(..cut)).is_err()
            );
        }
        assert!(matches!(parse(Bytes::from_static(b"z later")), Ok(None)));
    }
}
