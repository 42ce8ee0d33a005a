//! One `ebb serve` per data directory, and what others can learn about it.
//!
//! `lock` is held for as long as the process lives, by the kernel, so that a killed server leaves nothing to clean up.
//! `node.json` is there while the server is ready, for people and programs that look for it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ebb_types::{ErrorKind, Timestamp};
use serde::Serialize;

use crate::failure::Failure;

/// How often it is looked whether a lock is free.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The held lock of a data directory.
#[derive(Debug)]
pub struct DataLock {
    _file: File,
}

impl DataLock {
    /// Takes the lock once its holder gives it up, which it has promised to do by then.
    ///
    /// # Errors
    /// `Conflict`, naming who holds it still.
    pub fn take_within(data: &Path, within: Duration) -> Result<Self, Failure> {
        let deadline = Instant::now() + within;
        loop {
            match Self::take(data) {
                Err(failure) if failure.kind == ErrorKind::Conflict && Instant::now() < deadline => {
                    std::thread::sleep(LOOK_AGAIN);
                }
                taken => return taken,
            }
        }
    }

    /// Takes the lock.
    ///
    /// # Errors
    /// `Conflict`, naming who holds it.
    pub fn take(data: &Path) -> Result<Self, Failure> {
        let path = data.join("lock");
        let failed = |error: &std::io::Error| Failure::internal(format!("cannot lock {path:?}"), error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| failed(&error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(data, file)),
            Err(TryLockError::Error(error)) => return Err(failed(&error)),
        }
        let mut note = || {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        note().map_err(|error| failed(&error))?;
        Ok(Self { _file: file })
    }
}

fn held(data: &Path, mut file: File) -> Failure {
    let mut pid = String::new();
    let _ = file.read_to_string(&mut pid);
    let who = match pid.trim() {
        "" => "another `ebb serve`".to_owned(),
        pid => format!("the `ebb serve` with process number {pid}"),
    };
    Failure::new(ErrorKind::Conflict, format!("the data directory {data:?} is in use by {who}"))
        .hint("Stop that one, or give this one a directory of its own with --data.")
}

/// What `node.json` says.
#[derive(Debug, Serialize)]
pub struct NodeFile<'a> {
    /// Process number of the server.
    pub pid: u32,
    /// Its version.
    pub version: &'a str,
    /// Where Postgres clients connect.
    pub proxy: String,
    /// The API's URL.
    pub api: String,
    /// The certificate that TLS clients verify the proxy against.
    pub ca: &'a Path,
    /// When it became ready.
    pub ready_at: Timestamp,
}

/// The `node.json` of a server that is ready; gone when dropped.
#[derive(Debug)]
pub struct Announced {
    path: PathBuf,
}

impl Announced {
    /// Writes `node.json`, whole or not at all.
    pub fn write(data: &Path, node: &NodeFile<'_>) -> Result<Self, Failure> {
        let path = data.join("node.json");
        let part = data.join("node.json.part");
        let text = serde_json::to_string_pretty(node).expect("plain fields serialize") + "\n";
        fs::write(&part, text)
            .and_then(|()| fs::rename(&part, &path))
            .map_err(|error| Failure::internal(format!("cannot write {path:?}"), &error))?;
        Ok(Self { path })
    }

    /// Removes what a killed server left, so that nobody takes it for this one.
    pub fn clear(data: &Path) {
        let _ = fs::remove_file(data.join("node.json"));
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataLock::take(dir.path()).unwrap();
        let refused = DataLock::take(dir.path()).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        assert!(refused.message.contains(&std::process::id().to_string()), "{}", refused.message);
        drop(first);
        DataLock::take(dir.path()).unwrap();
    }
}
