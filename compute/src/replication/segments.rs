//! Received WAL as segment files, which a recovering Postgres asks for by name.
//!
//! A segment that is not whole yet has a name that nobody asks for.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ebb_storage::pg_files::WalSegment;
use ebb_types::Lsn;

use crate::error::{Error, OsContext, Result};

/// Writes segments into a directory.
#[derive(Debug)]
pub(crate) struct Segments {
    dir: PathBuf,
    pg_timeline: u32,
    segment_bytes: u32,
    /// Up to here WAL was written.
    at: Lsn,
    open: Option<(WalSegment, File)>,
}

impl Segments {
    /// Begins at the beginning of the segment that holds a position.
    pub fn new(dir: &Path, pg_timeline: u32, segment_bytes: u32, from: Lsn) -> Self {
        let at = WalSegment::holding(from, pg_timeline, segment_bytes).start();
        Self { dir: dir.to_owned(), pg_timeline, segment_bytes, at, open: None }
    }

    /// Up to here WAL is there.
    pub fn end(&self) -> Lsn {
        self.at
    }

    /// The beginning of the segment that is being written: from there WAL is received again after a connection broke.
    pub fn segment_start(&self) -> Lsn {
        WalSegment::holding(self.at, self.pg_timeline, self.segment_bytes).start()
    }

    /// Goes back to the beginning of the segment that is being written.
    pub fn rewind(&mut self) {
        self.at = self.segment_start();
        self.open = None;
    }

    /// Writes what follows.
    ///
    /// # Errors
    /// If it does not follow, or cannot be written.
    pub fn write(&mut self, start: Lsn, mut bytes: &[u8]) -> Result<()> {
        if start != self.at {
            return Err(Error::import(format!("the source sent WAL from {start} on where {} was due", self.at)));
        }
        while !bytes.is_empty() {
            let segment = WalSegment::holding(self.at, self.pg_timeline, self.segment_bytes);
            let at = self.at;
            let room = usize::try_from(segment.end().0 - at.0).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            let written = self.file(segment)?.write_all_at(now, at.0 - segment.start().0);
            written.on("write WAL to", &self.dir)?;
            self.at = Lsn(at.0 + now.len() as u64);
            bytes = later;
            if self.at == segment.end() {
                self.publish()?;
            }
        }
        Ok(())
    }

    fn file(&mut self, segment: WalSegment) -> Result<&File> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
            let path = self.partial(segment);
            let mut options = File::options();
            options.create(true).truncate(true).write(true).mode(0o644);
            let file = options.open(&path).on("create", &path)?;
            file.set_len(self.segment_bytes.into()).on("write", &path)?;
            self.open = Some((segment, file));
        }
        Ok(&self.open.as_ref().expect("it was just opened").1)
    }

    /// Gives what was written of the last segment its name; nothing follows.
    pub fn finish(&mut self) -> Result<()> {
        self.publish()
    }

    fn publish(&mut self) -> Result<()> {
        let Some((segment, _)) = self.open.take() else { return Ok(()) };
        let (from, to) = (self.partial(segment), self.dir.join(segment.file_name()));
        fs::rename(&from, &to).on("rename", &from)
    }

    fn partial(&self, segment: WalSegment) -> PathBuf {
        self.dir.join(format!("{}.partial", segment.file_name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_gets_its_name_when_it_is_whole_or_the_last() {
        let scratch = tempfile::tempdir().unwrap();
        let size = 1 << 20;
        let mut segments = Segments::new(scratch.path(), 3, size, Lsn(5 * u64::from(size) + 77));
        let first = Lsn(5 * u64::from(size));
        assert_eq!(segments.end(), first);
        assert!(segments.write(Lsn(first.0 + 1), b"x").is_err(), "a gap");
        segments.write(first, &vec![7; size as usize + 10]).unwrap();
        let names = || {
            let entries = fs::read_dir(scratch.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(), ["000000030000000000000005", "000000030000000000000006.partial"]);
        segments.rewind();
        assert_eq!(segments.end(), Lsn(first.0 + u64::from(size)));
        segments.write(segments.end(), b"again").unwrap();
        segments.finish().unwrap();
        assert_eq!(names(), ["000000030000000000000005", "000000030000000000000006"]);
        let last = fs::read(scratch.path().join("000000030000000000000006")).unwrap();
        assert_eq!((last.len(), &last[..6]), (size as usize, &b"again\0"[..]));
    }
}
