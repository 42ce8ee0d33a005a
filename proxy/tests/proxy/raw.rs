//! A client that speaks the protocol by hand, to be odd on purpose.

use std::net::SocketAddr;

use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{ENDPOINT, Ebb, PASSWORD};

/// A packet without a tag: a length, and words or text.
pub fn packet(code: u32, rest: &[u8]) -> Vec<u8> {
    let mut out = (rest.len() as u32 + 8).to_be_bytes().to_vec();
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(rest);
    out
}

/// Sends bytes on a new connection and answers all that comes back until the proxy closes.
pub async fn send(addr: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.unwrap();
    answer
}

/// The SQLSTATE of the `ErrorResponse` that bytes end with.
pub fn code(bytes: &[u8]) -> String {
    let at = bytes.windows(2).rposition(|field| field == b"\0C").expect("an error has a code");
    String::from_utf8(bytes[at + 2..at + 7].to_vec()).unwrap()
}

/// A session opened by libpq's own rules, then driven message by message.
pub struct Session {
    socket: TcpStream,
}

impl Session {
    pub async fn open(ebb: &Ebb) -> Self {
        Self::open_with(ebb, &format!("endpoint={ENDPOINT}")).await
    }

    /// The same, with other `options`.
    pub async fn open_with(ebb: &Ebb, options: &str) -> Self {
        Self::begin(ebb, &format!("options\0{options}\0")).await
    }

    /// The same, with more parameters.
    pub async fn open_as(ebb: &Ebb, parameters: &str) -> Self {
        Self::begin(ebb, &format!("options\0endpoint={ENDPOINT}\0{parameters}")).await
    }

    /// The same at a name of one's own.
    pub async fn open_at(ebb: &Ebb, endpoint: &str) -> Self {
        Self::open_with(ebb, &format!("endpoint={endpoint}")).await
    }

    async fn begin(ebb: &Ebb, parameters: &str) -> Self {
        let mut socket = TcpStream::connect(ebb.addr).await.unwrap();
        let body = format!("user\0app\0database\0app\0{parameters}\0");
        socket.write_all(&packet(3 << 16, body.as_bytes())).await.unwrap();
        let mut session = Self { socket };
        session.read().await;
        let mut scram = ScramSha256::new(PASSWORD.as_bytes(), ChannelBinding::unsupported());
        let first = [b"SCRAM-SHA-256\0", &(scram.message().len() as u32).to_be_bytes()[..], scram.message()].concat();
        session.write(&[(b'p', &first)]).await;
        let (_, challenge) = session.read().await;
        scram.update(&challenge[4..]).unwrap();
        let last = scram.message().to_vec();
        session.write(&[(b'p', &last)]).await;
        let (_, done) = session.read().await;
        scram.finish(&done[4..]).unwrap();
        while session.read().await.0 != b'Z' {}
        session
    }

    /// Sends messages, and reads nothing.
    pub async fn write(&mut self, messages: &[(u8, &[u8])]) {
        let mut out = Vec::new();
        for (tag, body) in messages {
            out.push(*tag);
            out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
            out.extend_from_slice(body);
        }
        self.socket.write_all(&out).await.unwrap();
    }

    /// Reads one message.
    pub async fn read(&mut self) -> (u8, Vec<u8>) {
        let tag = self.socket.read_u8().await.unwrap();
        let mut body = vec![0; self.socket.read_u32().await.unwrap() as usize - 4];
        self.socket.read_exact(&mut body).await.unwrap();
        (tag, body)
    }

    /// Sends messages, and reads answers of exactly these types; answers their bodies.
    pub async fn exchange(&mut self, messages: &[(u8, &[u8])], expect: &[u8]) -> Vec<u8> {
        self.write(messages).await;
        let (mut tags, mut bodies) = (Vec::new(), Vec::new());
        loop {
            let (tag, body) = self.read().await;
            tags.push(tag);
            bodies.extend_from_slice(&body);
            if tag == b'Z' {
                break;
            }
        }
        assert_eq!(String::from_utf8_lossy(&tags), String::from_utf8_lossy(expect));
        bodies
    }

    /// Sends messages, and answers all that comes up to the next `ReadyForQuery`, as it came.
    pub async fn turn(&mut self, messages: &[(u8, &[u8])]) -> Vec<u8> {
        self.write(messages).await;
        self.read_turn().await
    }

    /// All that comes up to the next `ReadyForQuery`, as it came.
    pub async fn read_turn(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let (tag, body) = self.read().await;
            all.push(tag);
            all.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
            all.extend_from_slice(&body);
            if tag == b'Z' {
                return all;
            }
        }
    }

    /// The connection, between two messages.
    pub fn into_stream(self) -> TcpStream {
        self.socket
    }

    /// All that comes until the proxy closes.
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.socket.read_to_end(&mut rest).await.unwrap();
        rest
    }

    /// Its socket.
    #[allow(dead_code, reason = "the counting of allocations uses it")]
    pub fn into_std(self) -> std::net::TcpStream {
        self.socket.into_std().unwrap()
    }

    /// Sends bytes and reads nothing.
    pub async fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }
}
