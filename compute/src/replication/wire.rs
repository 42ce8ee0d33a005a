//! The client side of Postgres's physical replication (PostgreSQL 15 manual, 55.4), over any stream of bytes.

use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use ebb_types::{Lsn, Timestamp};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{self, AuthenticationSaslBody, DataRowBody, ErrorFields};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::postgres::SUPERUSER;

/// LIMIT: a walsender sends at most 16 pages of WAL at once (PostgreSQL 15 `walsender.c`, `MAX_SEND_SIZE`), and less of
/// anything else.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 * 8192 + 1024;

/// LIMIT: an answer takes no time; a server that takes so long for it has other troubles.
const DEADLINE: Duration = Duration::from_secs(20);

/// The tag of `CopyBothResponse`, which only replication knows.
const COPY_BOTH: u8 = b'W';

/// Seconds from 1970 to 2000, when Postgres's time begins.
const POSTGRES_EPOCH: i64 = 946_684_800;

/// Why the conversation ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the connection to postgres failed")]
    Io(#[from] io::Error),
    #[error("postgres refused replication: {message}")]
    Refused { code: String, message: String },
    #[error("postgres does not do TLS")]
    NoTls,
    #[error("TLS failed")]
    Tls(#[source] io::Error),
    #[error("postgres wants a password")]
    NoPassword,
    #[error("postgres took too long to answer about replication")]
    Deadline(#[from] tokio::time::error::Elapsed),
    #[error("postgres said something else than expected: {0}")]
    Unexpected(&'static str),
}

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// What `IDENTIFY_SYSTEM` answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct System {
    pub identifier: u64,
    pub pg_timeline: u32,
    /// Up to here WAL is on disk.
    pub flushed: Lsn,
}

/// What a connection goes over.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Debug + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Debug + Unpin + Send> Transport for T {}

/// Who connects.
#[derive(Clone, Copy)]
pub(crate) struct Login<'a> {
    pub user: &'a str,
    pub password: Option<&'a [u8]>,
    /// What the server knows the connection by; as a standby, too.
    pub application: &'a str,
}

/// A connection to a walsender that was asked for nothing yet.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Box<dyn Transport>,
    received: BytesMut,
    /// As the server names it: `15.18 (Debian …)`.
    server_version: String,
}

/// A connection over which WAL comes.
#[derive(Debug)]
pub(crate) struct Stream(Connection);

/// What comes over it.
#[derive(Debug)]
pub(crate) enum Message {
    /// WAL from `start` on, at most [`MESSAGE_BYTES_MAX`]; all there is ends at `end`.
    Wal { start: Lsn, end: Lsn, bytes: Bytes },
    /// All there is ends here. Whether an answer is wanted.
    Alive { end: Lsn, reply: bool },
    /// There is no more WAL of this Postgres timeline, or Postgres shuts down and has sent everything.
    Ended,
}

impl Connection {
    /// Connects to a branch's own socket, which asks nobody for a password.
    pub async fn open(socket: &Path, application: &str) -> Result<Self> {
        let stream = timeout(DEADLINE, UnixStream::connect(socket)).await??;
        Self::begin(stream, Login { user: SUPERUSER, password: None, application }).await
    }

    /// Says who is there, and proves it.
    pub async fn begin(stream: impl Transport + 'static, login: Login<'_>) -> Result<Self> {
        let stream = Box::new(stream);
        let mut connection = Self { stream, received: BytesMut::new(), server_version: String::new() };
        timeout(DEADLINE, connection.log_in(login)).await??;
        Ok(connection)
    }

    async fn log_in(&mut self, login: Login<'_>) -> Result<()> {
        let parameters = [("user", login.user), ("replication", "true"), ("application_name", login.application)];
        let mut startup = BytesMut::new();
        frontend::startup_message(parameters, &mut startup)?;
        self.stream.write_all(&startup).await?;
        loop {
            match self.next().await? {
                backend::Message::ReadyForQuery(_) => return Ok(()),
                backend::Message::ParameterStatus(body) if body.name()? == "server_version" => {
                    self.server_version = body.value()?.to_owned();
                }
                backend::Message::AuthenticationOk
                | backend::Message::ParameterStatus(_)
                | backend::Message::BackendKeyData(_) => {}
                backend::Message::AuthenticationCleartextPassword => {
                    self.prove(login.password.ok_or(Error::NoPassword)?).await?;
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    let password = login.password.ok_or(Error::NoPassword)?;
                    self.prove(md5_hash(login.user.as_bytes(), password, body.salt()).as_bytes()).await?;
                }
                backend::Message::AuthenticationSasl(body) => {
                    self.scram(&body, login.password.ok_or(Error::NoPassword)?).await?;
                }
                _ => return Err(Error::Unexpected("it wants to authenticate in a way that is not known here")),
            }
        }
    }

    async fn prove(&mut self, password: &[u8]) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::password_message(password, &mut out)?;
        Ok(self.stream.write_all(&out).await?)
    }

    async fn scram(&mut self, offered: &AuthenticationSaslBody, password: &[u8]) -> Result<()> {
        if !offered.mechanisms().any(|name| Ok(name == SCRAM_SHA_256))? {
            return Err(Error::Unexpected("it wants to authenticate in a way that is not known here"));
        }
        let mut scram = ScramSha256::new(password, ChannelBinding::unsupported());
        let mut out = BytesMut::new();
        frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut out)?;
        self.stream.write_all(&out).await?;
        let backend::Message::AuthenticationSaslContinue(body) = self.next().await? else {
            return Err(Error::Unexpected("it does not go on authenticating"));
        };
        scram.update(body.data())?;
        out.clear();
        frontend::sasl_response(scram.message(), &mut out)?;
        self.stream.write_all(&out).await?;
        let backend::Message::AuthenticationSaslFinal(body) = self.next().await? else {
            return Err(Error::Unexpected("it does not prove that it knows the password"));
        };
        Ok(scram.finish(body.data())?)
    }

    /// The major version of the server.
    pub fn pg_major(&self) -> Option<u32> {
        let digits = self.server_version.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.server_version.len());
        self.server_version[..digits].parse().ok()
    }

    /// A setting of the server, as it shows it.
    pub async fn show(&mut self, setting: &str) -> Result<String> {
        column(&self.ask(&format!("SHOW {setting}")).await?, 0)
    }

    /// Makes a physical slot that goes with this connection, and keeps WAL from the latest `pg_checkpoint` on.
    pub async fn make_temporary_slot(&mut self, name: &str) -> Result<()> {
        self.ask(&format!("CREATE_REPLICATION_SLOT {name} TEMPORARY PHYSICAL RESERVE_WAL")).await.map(drop)
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

    /// Sends a command whose answer the caller reads.
    pub(super) async fn send(&mut self, command: &str) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::query(command, &mut out)?;
        Ok(self.stream.write_all(&out).await?)
    }

    /// The next message; errors of Postgres are errors, notices are passed over.
    ///
    /// # Cancel safety
    /// What was received stays in the buffer.
    pub(super) async fn next(&mut self) -> Result<backend::Message> {
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

/// A column of a row, as text.
pub(super) fn column<T: FromStr>(row: &DataRowBody, number: usize) -> Result<T> {
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
