//! The branch's `postgres.log`: what the server wrote, in at most two files of bounded size.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// LIMIT: enough for the story of an incident; a thousand branches then keep at most 8 GB of logs.
const BYTES_MAX: u64 = 4 * 1024 * 1024;

/// A log file that moves itself to `….1` when it is full.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl LogFile {
    /// Goes on at the end of a log.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).mode(0o600).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Appends. A log that cannot be written (a full disk) is not a reason to stop Postgres: the bytes are dropped.
    pub fn write(&mut self, line: &[u8]) {
        if self.bytes >= BYTES_MAX {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            let fresh = fs::rename(&self.path, old).and_then(|()| Self::open(&self.path));
            if let Ok(fresh) = fresh {
                *self = fresh;
            }
        }
        if self.file.write_all(line).is_ok() {
            self.bytes += line.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_moves_aside_once() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("postgres.log");
        let mut log = LogFile::open(&path).unwrap();
        let line = vec![b'x'; 1024 * 1024];
        for _ in 0..9 {
            log.write(&line);
        }
        let names: Vec<_> = fs::read_dir(scratch.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!(fs::metadata(scratch.path().join("postgres.log.1")).unwrap().len(), BYTES_MAX);
        assert_eq!(fs::metadata(&path).unwrap().len(), line.len() as u64);
    }
}
