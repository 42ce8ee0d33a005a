//! Unix sockets whose path is longer than the 108 bytes of `sun_path` (unix(7)): the directory is opened, and the socket
//! reached through the descriptor's short name in /proc.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// LIMIT: `sun_path` has 108 bytes, the last of them a NUL.
const SUN_PATH_MAX: usize = 107;

/// Connects to a socket at a path of any length.
pub(crate) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let near = Near::to(path)?;
    UnixStream::connect(&near.path).await
}

/// Listens at a path of any length. The path must not exist.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    let near = Near::to(path)?;
    UnixListener::bind(&near.path)
}

/// A short name for a path, good while it lives.
struct Near {
    path: PathBuf,
    _dir: Option<File>,
}

impl Near {
    fn to(path: &Path) -> io::Result<Self> {
        if path.as_os_str().len() <= SUN_PATH_MAX {
            return Ok(Self { path: path.to_owned(), _dir: None });
        }
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket needs a directory and a name"));
        };
        let dir = File::open(dir)?;
        let path = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _dir: Some(dir) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_deep_in_the_tree_can_be_reached() {
        let scratch = tempfile::tempdir().unwrap();
        let deep = scratch.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("control.sock");
        let listener = listen(&path).unwrap();
        let (connected, accepted) = tokio::join!(connect(&path), listener.accept());
        connected.unwrap();
        accepted.unwrap();
        assert_eq!(connect(&deep.join("none.sock")).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
