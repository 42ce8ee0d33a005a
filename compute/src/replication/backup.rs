//! `BASE_BACKUP`: the files of a running cluster (PostgreSQL 15 manual, 55.4), in a directory.
//!
//! Up to 14 each tablespace comes as a COPY of its own, and the manifest as another; from 15 on there is one COPY, whose
//! messages say what they are. Either way the files are a tar archive.
//!
//! # Cancel safety
//! Dropping leaves half the files.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use bytes::{Buf, Bytes};
use ebb_types::Lsn;
use postgres_protocol::message::backend::Message;
use tokio::sync::mpsc;

use super::wire::{self, Connection, column};
use crate::error::{Error, OsContext, Result};
use crate::import::Progress;
use crate::import::give;
use crate::user::RunAs;

/// LIMIT: pieces of 32 KiB that wait for the disk.
const QUEUE: usize = 64;

/// Where the manifest is put, in the data directory.
pub(crate) const MANIFEST: &str = "backup_manifest";

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Wire(#[from] wire::Error),
    #[error(transparent)]
    Here(#[from] Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Wire(error.into())
    }
}

/// A backup that the server has begun.
#[derive(Debug)]
pub(crate) struct Backup {
    connection: Connection,
    pg_major: u32,
    /// WAL is needed from here on …
    pub start: Lsn,
    /// … on this Postgres timeline.
    pub pg_timeline: u32,
    /// About how many bytes come.
    pub total_bytes: Option<u64>,
}

impl Backup {
    /// Asks for a backup, and waits for the source's `pg_checkpoint`.
    ///
    /// # Errors
    /// If the source refuses, or has tablespaces.
    pub async fn begin(mut connection: Connection, pg_major: u32) -> Result<Self, Failure> {
        let command = match pg_major {
            ..15 => "BASE_BACKUP LABEL 'ebb import' PROGRESS FAST NOWAIT MANIFEST 'yes'",
            15.. => "BASE_BACKUP (LABEL 'ebb import', PROGRESS, CHECKPOINT 'fast', WAIT false, MANIFEST 'yes')",
        };
        connection.send(command).await?;
        let (mut start, mut spaces) = (None, Vec::new());
        loop {
            match connection.next().await? {
                Message::DataRow(row) if start.is_none() => {
                    start = Some((column::<Lsn>(&row, 0)?, column::<u32>(&row, 1)?));
                }
                // Each tablespace's identifier, place and size in KiB; the main one has only a size.
                Message::DataRow(row) => {
                    let size: Option<u64> = column(&row, 2).ok();
                    spaces.push((column::<String>(&row, 1).ok(), size));
                }
                Message::CopyOutResponse(_) => break,
                Message::ReadyForQuery(_) => return Err(wire::Error::Unexpected("no backup").into()),
                _ => {}
            }
        }
        if let Some(place) = spaces.iter().find_map(|(place, _)| place.as_ref()) {
            let hint =
                "Move their tables first (ALTER TABLE … SET TABLESPACE pg_default) and drop them, or import a dump.";
            let why = format!("the source has tablespaces ({place}), which are not supported");
            return Err(Error::Import { why, hint: Some(hint.to_owned()) }.into());
        }
        let (start, pg_timeline) = start.ok_or(wire::Error::Unexpected("a backup without a beginning"))?;
        let total_bytes = spaces.iter().map(|(_, kib)| kib.map(|kib| kib * 1024)).sum();
        Ok(Self { connection, pg_major, start, pg_timeline, total_bytes })
    }

    /// Receives the files into a directory. Answers where WAL must have been replayed to for them to be consistent, and the
    /// connection, which can be asked for something else.
    pub async fn receive(mut self, into: &Path, progress: &Progress) -> Result<(Lsn, Connection), Failure> {
        let (pieces, incoming) = mpsc::channel(QUEUE);
        let (dir, counted) = (into.to_owned(), progress.clone());
        let writing =
            tokio::task::spawn_blocking(move || unpack(Incoming { incoming, piece: Bytes::new() }, &dir, &counted));
        let mut manifest = Vec::new();
        let end = self.pass_on(pieces, &mut manifest).await;
        let written = writing.await.unwrap_or(Err(Error::Cancelled));
        // If writing failed, receiving did, too, and for no reason of its own.
        written?;
        let end = end?;
        if !manifest.is_empty() {
            let path = into.join(MANIFEST);
            fs::write(&path, manifest).on("write", &path)?;
        }
        Ok((end, self.connection))
    }

    async fn pass_on(&mut self, pieces: mpsc::Sender<Bytes>, manifest: &mut Vec<u8>) -> Result<Lsn, Failure> {
        let mut pieces = Some(pieces);
        let mut end = None;
        loop {
            match self.connection.next().await? {
                Message::CopyData(body) => {
                    let mut bytes = body.into_bytes();
                    if self.pg_major >= 15 {
                        let kind =
                            bytes.try_get_u8().map_err(|_| wire::Error::Unexpected("an empty piece of a backup"))?;
                        match kind {
                            // The main archive is the only one: there are no tablespaces.
                            b'n' | b'p' => continue,
                            b'm' => {
                                pieces = None;
                                continue;
                            }
                            b'd' => {}
                            _ => continue,
                        }
                    }
                    match &pieces {
                        Some(to) => {
                            if to.send(bytes).await.is_err() {
                                return Err(Error::Cancelled.into());
                            }
                        }
                        None => manifest.extend_from_slice(&bytes),
                    }
                }
                // In 14 the archive's COPY is over, and the manifest's comes; later everything is.
                Message::CopyDone => pieces = None,
                Message::DataRow(row) => end = Some(column::<Lsn>(&row, 0)?),
                Message::ReadyForQuery(_) => {
                    return Ok(end.ok_or(wire::Error::Unexpected("a backup without an end"))?);
                }
                _ => {}
            }
        }
    }
}

/// What comes, as something to read from.
struct Incoming {
    incoming: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.incoming.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let count = into.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut into[..count]);
        Ok(count)
    }
}

/// Writes the files of an archive. Nothing in it leads out of the directory.
fn unpack(from: impl Read, into: &Path, progress: &Progress) -> Result<()> {
    let user = RunAs::find()?;
    let mut archive = tar::Archive::new(from);
    let mut buffer = vec![0; 1 << 18];
    for entry in archive.entries().on("read a backup for", into)? {
        let mut entry = entry.on("read a backup for", into)?;
        let relative = plain_path(&entry.path().on("read a backup for", into)?)?;
        let path = into.join(&relative);
        let kind = entry.header().entry_type();
        if kind.is_dir() {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error).on("create", &path),
                _ => {}
            }
        } else if kind.is_file() {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path).on("create", &path)?;
            let mut size = 0;
            loop {
                let count = entry.read(&mut buffer).on("read a backup for", &path)?;
                if count == 0 {
                    break;
                }
                let bytes = &buffer[..count];
                match bytes.iter().all(|byte| *byte == 0) {
                    true => drop(file.seek(SeekFrom::Current(count as i64)).on("write", &path)?),
                    false => file.write_all(bytes).on("write", &path)?,
                }
                size += count as u64;
                progress.add(count as u64);
            }
            file.set_len(size).on("write", &path)?;
            if size != entry.header().size().on("read a backup for", &path)? {
                return Err(Error::import(format!("the source ended in the middle of {relative:?}")));
            }
        } else {
            return Err(Error::import(format!("the source has {relative:?}, which is neither a file nor a directory")));
        }
        give(&path, user)?;
    }
    Ok(())
}

fn plain_path(path: &Path) -> Result<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            _ => return Err(Error::import(format!("the source sent a file called {path:?}"))),
        }
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_are_refused() {
        assert_eq!(plain_path(Path::new("./base/5/1259")).unwrap(), Path::new("base/5/1259"));
        assert!(plain_path(Path::new("../x")).is_err());
        assert!(plain_path(Path::new("/etc/passwd")).is_err());
    }
}
