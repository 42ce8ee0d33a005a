//! The protocol by hand, over whatever stream: what no driver does, at whatever byte it is broken off.

use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{ENDPOINT, Ebb, PASSWORD};
use crate::raw::packet;

/// One message: its tag and its body.
pub type Message = (u8, Vec<u8>);

/// A message as bytes.
pub fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

pub fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &[sql.as_bytes(), b"\0"].concat())
}

pub fn parse(name: &str, sql: &str) -> Vec<u8> {
    message(b'P', format!("{name}\0{sql}\0\0\0").as_bytes())
}

/// Binds in text form, and wants text back.
pub fn bind(portal: &str, statement: &str, values: &[&str]) -> Vec<u8> {
    let mut body = format!("{portal}\0{statement}\0\0\0").into_bytes();
    body.extend_from_slice(&(values.len() as u16).to_be_bytes());
    for value in values {
        body.extend_from_slice(&(value.len() as u32).to_be_bytes());
        body.extend_from_slice(value.as_bytes());
    }
    body.extend_from_slice(&[0, 0]);
    message(b'B', &body)
}

/// `what` is `S` or `P`.
pub fn describe(what: char, name: &str) -> Vec<u8> {
    message(b'D', format!("{what}{name}\0").as_bytes())
}

pub fn close(what: char, name: &str) -> Vec<u8> {
    message(b'C', format!("{what}{name}\0").as_bytes())
}

pub fn execute(portal: &str, rows_max: u32) -> Vec<u8> {
    message(b'E', &[portal.as_bytes(), b"\0", &rows_max.to_be_bytes()].concat())
}

pub fn sync() -> Vec<u8> {
    message(b'S', b"")
}

pub fn flush() -> Vec<u8> {
    message(b'H', b"")
}

pub fn terminate() -> Vec<u8> {
    message(b'X', b"")
}

/// A start-up packet that leads to the endpoint, as `app` in database `app`.
pub fn startup(minor: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let route = format!("endpoint={ENDPOINT}");
    startup_beside(minor, &[&[("options", &*route)], parameters].concat())
}

/// The same for Postgres itself.
pub fn startup_beside(minor: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = "user\0app\0database\0app\0".to_owned();
    for (name, value) in parameters {
        body += &format!("{name}\0{value}\0");
    }
    body.push('\0');
    packet(3 << 16 | minor, body.as_bytes())
}

/// A client.
#[derive(Debug)]
pub struct Wire<S> {
    pub stream: S,
    /// What `NegotiateProtocolVersion` said.
    pub negotiated: Option<Vec<u8>>,
    /// The body of `BackendKeyData`.
    pub key: Vec<u8>,
    /// What `ParameterStatus` told, in its order.
    pub parameters: Vec<(String, String)>,
}

impl Wire<TcpStream> {
    /// Through the proxy, in the clear, by version 3.0.
    pub async fn open(ebb: &Ebb) -> Self {
        Self::start(connect(ebb).await, &startup(0, &[])).await
    }
}

pub async fn connect(ebb: &Ebb) -> TcpStream {
    let stream = TcpStream::connect(ebb.addr).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Starts a session with this packet, up to its first `ReadyForQuery`.
    pub async fn start(stream: S, startup: &[u8]) -> Self {
        Self::start_in_pieces(stream, startup, usize::MAX).await
    }

    /// The same, no more than so many bytes at a time.
    pub async fn start_in_pieces(stream: S, startup: &[u8], size: usize) -> Self {
        let started = Self::try_start(stream, startup, size).await;
        started.unwrap_or_else(|error| panic!("refused: {}", String::from_utf8_lossy(&error)))
    }

    /// The same; or the body of the error that came instead.
    pub async fn try_start(stream: S, startup: &[u8], size: usize) -> Result<Self, Vec<u8>> {
        let mut wire = Self { stream, negotiated: None, key: Vec::new(), parameters: Vec::new() };
        wire.write_in_pieces(startup, size).await;
        let mut scram = ScramSha256::new(PASSWORD.as_bytes(), ChannelBinding::unsupported());
        loop {
            let (tag, body) = wire.read().await;
            match tag {
                b'v' => wire.negotiated = Some(body),
                b'R' => match body[3] {
                    10 => {
                        let first = scram.message();
                        let length = (first.len() as u32).to_be_bytes();
                        let response = [b"SCRAM-SHA-256\0", &length[..], first].concat();
                        wire.write_in_pieces(&message(b'p', &response), size).await;
                    }
                    11 => {
                        scram.update(&body[4..]).unwrap();
                        let last = message(b'p', scram.message());
                        wire.write_in_pieces(&last, size).await;
                    }
                    12 => scram.finish(&body[4..]).unwrap(),
                    kind => assert_eq!(kind, 0, "an authentication of another kind"),
                },
                b'S' => {
                    let text = String::from_utf8(body).unwrap();
                    let mut fields = text.split('\0').map(str::to_owned);
                    wire.parameters.push((fields.next().unwrap(), fields.next().unwrap()));
                }
                b'K' => wire.key = body,
                b'N' => {}
                b'Z' => return Ok(wire),
                b'E' => return Err(body),
                _ => panic!("{} at the start: {}", tag as char, String::from_utf8_lossy(&body)),
            }
        }
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub async fn write_in_pieces(&mut self, bytes: &[u8], size: usize) {
        for piece in bytes.chunks(size) {
            self.write(piece).await;
        }
    }

    pub async fn read(&mut self) -> Message {
        let tag = self.stream.read_u8().await.unwrap();
        let mut body = vec![0; self.stream.read_u32().await.unwrap() as usize - 4];
        self.stream.read_exact(&mut body).await.unwrap();
        (tag, body)
    }

    /// All messages up to one of these.
    pub async fn read_until(&mut self, last: u8) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            messages.push(self.read().await);
            if messages.last().unwrap().0 == last {
                return messages;
            }
        }
    }

    /// Sends, and reads up to the `ReadyForQuery`; answers the tags of what came, and all bodies.
    pub async fn ask(&mut self, bytes: &[u8]) -> (String, Vec<u8>) {
        self.write(bytes).await;
        let messages = self.read_until(b'Z').await;
        let tags = messages.iter().map(|(tag, _)| char::from(*tag)).collect();
        (tags, messages.into_iter().flat_map(|(_, body)| body).collect())
    }

    /// The packet that cancels what this session does.
    pub fn cancel_packet(&self) -> Vec<u8> {
        packet(80_877_102, &self.key)
    }

    /// All that comes until the other side closes.
    pub async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await.unwrap();
        rest
    }
}
