//! A connection to a Postgres backend: reaching its socket, and the start-up.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::errors::Said;
use crate::startup::CancelKey;
use crate::unix::UnixStream;
use crate::wire::{Fields, error_field, message, read_message};

/// LIMIT: `sockaddr_un.sun_path` has 108 bytes with its zero (unix(7)).
const SUN_PATH_MAX: usize = 107;
/// LIMIT: what a backend says at start-up is short; an error with its hints the longest.
const STARTUP_MESSAGE_MAX: usize = 64 * 1024;
/// LIMIT: how long a backend may take to close once it is told to.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(2);

/// `Terminate`.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// A backend that has just become ready for queries.
#[derive(Debug)]
pub struct Backend {
    /// The connection, between two messages.
    pub stream: UnixStream,
    /// Its cancel key.
    pub key: CancelKey,
    /// The parameters it reported, in its order.
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// Notices it sent meanwhile, as they came.
    pub notices: Vec<u8>,
}

/// Why a backend did not become ready.
#[derive(Debug)]
pub enum StartError {
    /// Nobody answers, or they hung up: a wake may help.
    Unreachable(io::Error),
    /// It said that it cannot take connections now (`57P03`): the same again may help.
    NotNow,
    /// It refused: the body of its `ErrorResponse`.
    Refused(Vec<u8>),
    /// It does not speak as Postgres does.
    Strange(&'static str),
}

impl From<io::Error> for StartError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::InvalidData {
            StartError::Strange("a start-up message has an impossible length")
        } else {
            StartError::Unreachable(error)
        }
    }
}

/// Connects to a Unix socket, however long its path is.
///
/// # Errors
/// If nobody listens there.
pub async fn connect(socket: &Path) -> io::Result<tokio::net::UnixStream> {
    if socket.as_os_str().len() <= SUN_PATH_MAX {
        return tokio::net::UnixStream::connect(socket).await;
    }
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // The directory is reached by its descriptor instead of its name (proc(5), /proc/pid/fd).
    let dir = File::open(dir)?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    tokio::net::UnixStream::connect(short).await
}

impl Backend {
    /// Connects and starts a session with the given start-up packet. Cancel-safe in that dropping it closes the
    /// connection.
    ///
    /// # Errors
    /// If no backend became ready.
    pub async fn start(socket: &Path, startup: &[u8]) -> Result<Self, StartError> {
        let mut backend = Self {
            stream: UnixStream::from_std(connect(socket).await?.into_std()?)?,
            key: CancelKey { id: 0, secret: Box::default() },
            parameters: Vec::new(),
            notices: Vec::new(),
        };
        backend.stream.write_all(startup).await?;
        let mut body = Vec::new();
        loop {
            let tag = read_message(&mut backend.stream, &mut body, STARTUP_MESSAGE_MAX).await?;
            let mut fields = Fields(&body);
            match tag {
                b'Z' => return Ok(backend),
                b'R' => match fields.i32() {
                    Some(0) => {}
                    _ => return Err(StartError::Strange("it asks the proxy for a password")),
                },
                b'S' => {
                    let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) else {
                        return Err(StartError::Strange("a ParameterStatus is broken off"));
                    };
                    backend.parameters.push((name.to_vec(), value.to_vec()));
                }
                b'K' => {
                    let key = CancelKey::parse(fields);
                    backend.key = key.ok_or(StartError::Strange("a BackendKeyData has an impossible length"))?;
                }
                b'N' => message(&mut backend.notices, b'N', |out| out.extend_from_slice(&body)),
                b'E' if error_field(&body, b'C') == Some(b"57P03") => return Err(StartError::NotNow),
                b'E' => return Err(StartError::Refused(body)),
                _ => return Err(StartError::Strange("a message is not one of a start-up")),
            }
        }
    }
}

/// Tells a backend to close and waits until it has, so that whoever stops the compute next does not find it. One that is
/// stuck goes with its compute.
pub async fn terminate(backend: &mut UnixStream) {
    let closing = async {
        backend.write_all(&TERMINATE).await?;
        while backend.read(&mut [0; 256]).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = timeout(TERMINATE_TIMEOUT, closing).await;
}

/// An `ErrorResponse` to pass on as it came.
pub fn relayed_error(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    message(&mut out, b'E', |out| out.extend_from_slice(body));
    out
}

/// Whether the body of an `ErrorResponse` says that a backend that waited for its client saw its postmaster vanish
/// (`secure_read`, be-secure.c). Its code, `57P01`, is that of a backend that was terminated on purpose.
pub fn is_postmaster_death(body: &[u8]) -> bool {
    error_field(body, b'R') == Some(b"secure_read") && error_field(body, b'C') == Some(b"57P01")
}

/// A [`Said`] as bytes.
pub fn encoded(said: &Said) -> Vec<u8> {
    let mut out = Vec::new();
    said.encode(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_with_long_paths_are_reached() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(100)).join("y".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let bound = File::open(&deep).unwrap();
        let listener = tokio::net::UnixListener::bind(format!("/proc/self/fd/{}/s", bound.as_raw_fd())).unwrap();
        let socket = deep.join("s");
        let (accepted, connected) = tokio::join!(listener.accept(), connect(&socket));
        accepted.unwrap();
        connected.unwrap();
        assert_eq!(connect(&deep.join("none")).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
