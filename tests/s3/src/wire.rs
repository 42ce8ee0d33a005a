//! As much of HTTP/1.1 as the client under test speaks: one request, one answer, then the connection is closed.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// LIMIT: what a test sends is a part of an upload at most.
const REQUEST_BYTES_MAX: usize = 64 << 20;

/// A request, with its head as it came.
#[derive(Debug)]
pub(crate) struct Request {
    /// All lines of the head, without the empty one that ends it.
    pub head: String,
    pub body: Vec<u8>,
}

impl Request {
    pub fn method(&self) -> &str {
        self.head.split(' ').next().unwrap_or_default()
    }

    /// Path and query.
    pub fn target(&self) -> &str {
        self.head.split(' ').nth(1).unwrap_or_default()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    /// The request as one after which the server closes the connection.
    pub fn closing(&self) -> Vec<u8> {
        let mut bytes = format!("{}\r\nConnection: close\r\n\r\n", self.head).into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Reads one request; `None` if the client only connected.
pub(crate) async fn read_request(stream: &mut TcpStream) -> io::Result<Option<Request>> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if !read_more(stream, &mut bytes).await? {
            return if bytes.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let mut request = Request { head, body: bytes.split_off(head_end + 4) };
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    while request.body.len() < length {
        if !read_more(stream, &mut request.body).await? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(Some(request))
}

async fn read_more(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<bool> {
    if bytes.len() > REQUEST_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(stream.read_buf(bytes).await? > 0)
}

/// Sends an answer and closes the connection.
pub(crate) async fn answer(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    stream.shutdown().await
}

/// Sends an S3 error.
pub(crate) async fn refuse(stream: &mut TcpStream, status: &str, code: &str) -> io::Result<()> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>in a test</Message></Error>");
    answer(stream, status, "Content-Type: application/xml\r\n", body.as_bytes()).await
}
