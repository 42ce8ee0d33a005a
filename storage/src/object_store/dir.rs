//! A bucket in a local directory.
//!
//! ```text
//! <root>/ebb-bucket        the marker: "ebb-bucket 1\n"
//! <root>/.staging/<name>   objects being written; locked by their writer
//! <root>/<key>             the objects
//! ```
//!
//! An object is written to a staging file, synced, renamed to its key, and its directory synced: so it appears whole
//! or not at all, and what a call returned for survives a power cut. Nothing is retried: a local disk that says no
//! means it.
//!
//! # Crash
//! A killed writer leaves a staging file that no key leads to; the next [`Dir::open`] removes it. Writers of other
//! processes are told from dead ones by the lock each holds on its staging file.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::{
    MARKER, ObjectMeta, ObjectStore, Put, check_key, check_marker, check_prefix, failed, marker_text, no_such_range,
};
use crate::blocking;
use crate::error::{Error, LocalContext, Result};

const STAGING: &str = ".staging";

/// A bucket in a local directory.
#[derive(Debug, Clone)]
pub struct Dir {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Directories known to be on disk with all their parents, so that they are synced once and not at every put.
    durable_dirs: Mutex<HashSet<PathBuf>>,
}

/// Whether a put may take the place of an object that is there.
#[derive(Clone, Copy, PartialEq)]
enum Replace {
    Yes,
    No,
}

impl Dir {
    /// Opens the bucket in a directory, or makes it in one that is absent or empty.
    ///
    /// # Errors
    /// `Local` when the directory cannot be made, read or written; `Invalid` when something else lives in it, or a
    /// bucket of a format this build does not know.
    pub async fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).on("find", root)?;
        let inner = Arc::new(Inner { root, durable_dirs: Mutex::default() });
        let dir = Self { inner: inner.clone() };
        blocking::run(move || inner.prepare()).await?;
        Ok(dir)
    }

    /// The bucket in a directory that somebody has opened before.
    pub(super) fn attach(root: &Path) -> Self {
        Self { inner: Arc::new(Inner { root: root.to_owned(), durable_dirs: Mutex::default() }) }
    }

    /// Runs blocking work on its own thread.
    async fn run<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(&Inner, &str) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (inner, key) = (self.inner.clone(), key.to_owned());
        blocking::run(move || work(&inner, &key)).await
    }
}

#[async_trait]
impl ObjectStore for Dir {
    async fn get(&self, key: &str) -> Result<Bytes> {
        self.run(key, |dir, key| {
            let mut bytes = Vec::new();
            dir.open_object(key)?.read_to_end(&mut bytes).map_err(|error| failed("get", key, error))?;
            Ok(bytes.into())
        })
        .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.run(key, move |dir, key| dir.get_range(key, range)).await
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.run(key, move |dir, key| dir.write(key, Replace::Yes, |file| file.write_all(&bytes)).map(drop)).await
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put> {
        self.run(key, move |dir, key| dir.write(key, Replace::No, |file| file.write_all(&bytes))).await
    }

    async fn put_file(&self, key: &str, file: &Path) -> Result<()> {
        let path = file.to_owned();
        self.run(key, move |dir, key| {
            let mut source = File::open(&path).on("open", &path)?;
            dir.write(key, Replace::Yes, |file| io::copy(&mut source, file).map(drop)).map(drop)
        })
        .await
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.run(key, |dir, key| match fs::metadata(dir.path(key)?) {
            Ok(meta) if meta.is_file() => Ok(Some(ObjectMeta { key: key.to_owned(), size: meta.len() })),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => dir.check_present("head", key).map(|()| None),
            Err(error) => Err(failed("head", key, error)),
        })
        .await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        check_prefix(prefix)?;
        let start_after = start_after.unwrap_or_default().to_owned();
        self.run(prefix, move |dir, prefix| {
            dir.check_present("list", prefix)?;
            let mut found = Vec::new();
            dir.collect(prefix, &start_after, &mut found).map_err(|error| failed("list", prefix, error))?;
            // Directory order is not key order: "a-b/x" comes before "a/x", as '-' does before '/'.
            found.sort_unstable_by(|a, b| a.key.cmp(&b.key));
            Ok(found)
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.run(key, |dir, key| {
            let path = dir.path(key)?;
            match fs::remove_file(&path) {
                Ok(()) => sync_dir(parent_of(&path)).map_err(|error| failed("delete", key, error)),
                Err(error) if is_absent(&error) => Ok(()),
                Err(error) => Err(failed("delete", key, error)),
            }
        })
        .await
    }
}

impl Inner {
    fn prepare(&self) -> Result<()> {
        if !self.root.is_dir() {
            make_dirs(&self.root).on("make the bucket's directory", &self.root)?;
            // Its name is on disk only once its own directory is; further up, somebody else made the directories.
            let above = self.root.parent().unwrap_or(&self.root);
            sync_dir(above).on("sync", above)?;
        }
        let marker = self.root.join(MARKER);
        match fs::read_to_string(&marker) {
            Ok(text) => check_marker(&self.root.to_string_lossy(), &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.refuse_if_used()?,
            Err(error) => return Err(error).on("read", &marker),
        }
        let staging = self.root.join(STAGING);
        make_dirs(&staging).on("write to the bucket's directory", &self.root)?;
        self.sweep_staging().on("clean", &staging)?;
        // Staging a file also shows at once, and not at the first commit, that the directory can be written.
        let marked = self.write_at(&marker, Replace::No, |file| file.write_all(marker_text().as_bytes()));
        marked.on("write to the bucket's directory", &self.root).map(drop)
    }

    /// A directory without our marker must be empty, but for what a fresh file system or a desktop leaves in it.
    fn refuse_if_used(&self) -> Result<()> {
        for entry in fs::read_dir(&self.root).on("list", &self.root)? {
            let name = entry.on("list", &self.root)?.file_name();
            if name != "lost+found" && !name.as_encoded_bytes().starts_with(b".") {
                return Err(Error::Invalid(format!(
                    "directory {:?} is not a bucket (it has no file {MARKER:?}) and not empty (it has {name:?})",
                    self.root
                )));
            }
        }
        Ok(())
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        check_key(key)?;
        Ok(self.root.join(key))
    }

    fn open_object(&self, key: &str) -> Result<File> {
        let opened = File::open(self.path(key)?).and_then(|file| Ok((file.metadata()?.is_file(), file)));
        match opened {
            Ok((true, file)) => return Ok(file),
            Ok((false, _)) => {}
            Err(error) if is_absent(&error) => self.check_present("get", key)?,
            Err(error) => return Err(failed("get", key, error)),
        }
        Err(Error::NoSuchObject { key: key.to_owned() })
    }

    /// "There is no such object" is only true while the bucket itself is there: a directory that was unmounted or
    /// moved away must not look like an empty bucket.
    fn check_present(&self, act: &'static str, key: &str) -> Result<()> {
        fs::metadata(self.root.join(MARKER)).map(drop).map_err(|error| {
            let why = format!("the bucket's directory {:?} has lost its file {MARKER:?}: {error}", self.root);
            failed(act, key, io::Error::new(error.kind(), why))
        })
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let mut file = self.open_object(key)?;
        let size = file.metadata().map_err(|error| failed("get", key, error))?.len();
        if range.start > range.end || range.end > size {
            return Err(no_such_range(key, size, &range));
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let read = file.seek(SeekFrom::Start(range.start)).and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|error| failed("get", key, error))?;
        Ok(bytes.into())
    }

    fn write(&self, key: &str, replace: Replace, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<Put> {
        let path = self.path(key)?;
        let put = self.make_durable_dir(parent_of(&path)).and_then(|()| self.write_at(&path, replace, fill));
        put.map_err(|error| match error.kind() {
            io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::AlreadyExists => {
                Error::Invalid(format!("object {key:?} cannot be below or above another object in a directory"))
            }
            _ => failed("put", key, error),
        })
    }

    /// The order is what makes an object appear whole: bytes, sync, name, sync of the directory.
    fn write_at(
        &self,
        path: &Path,
        replace: Replace,
        fill: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<Put> {
        let mut staged = Staged::create(&self.root.join(STAGING))?;
        fill(&mut staged.file)?;
        staged.file.sync_all()?;
        let put = match replace {
            Replace::Yes => fs::rename(&staged.path, path).map(|()| Put::Created)?,
            Replace::No => rename_unless_exists(&staged.path, path)?,
        };
        if put == Put::Created {
            staged.renamed = true;
        }
        // Also when it exists: its writer may not have synced yet, and whoever is told "exists" may rely on it.
        sync_dir(parent_of(path))?;
        Ok(put)
    }

    /// Makes a directory and its parents, and sees to it that each name is on disk.
    fn make_durable_dir(&self, dir: &Path) -> io::Result<()> {
        if dir == self.root || self.durable_dirs.lock().contains(dir) {
            return Ok(());
        }
        let parent = parent_of(dir);
        self.make_durable_dir(parent)?;
        make_dirs(dir)?;
        sync_dir(parent)?;
        self.durable_dirs.lock().insert(dir.to_owned());
        Ok(())
    }

    /// Adds the objects below `prefix` that come after `start_after`, in no order.
    fn collect(&self, prefix: &str, start_after: &str, found: &mut Vec<ObjectMeta>) -> io::Result<()> {
        let entries = match fs::read_dir(self.root.join(prefix)) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let key = format!("{prefix}{name}");
            if check_key(&key).is_err() {
                continue;
            }
            let kind = entry.file_type()?;
            if kind.is_dir() {
                let below = format!("{key}/");
                if below.as_str() > start_after || start_after.starts_with(&below) {
                    self.collect(&below, start_after, found)?;
                }
            } else if kind.is_file() && key.as_str() > start_after {
                match entry.metadata() {
                    Ok(meta) => found.push(ObjectMeta { key, size: meta.len() }),
                    Err(error) if is_absent(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Removes what killed writers left.
    fn sweep_staging(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join(STAGING))? {
            let path = entry?.path();
            let Ok(file) = File::open(&path) else { continue };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                match fs::remove_file(&path) {
                    Err(error) if !is_absent(&error) => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// A file being written; removed when dropped, unless it has been renamed.
struct Staged {
    file: File,
    path: PathBuf,
    renamed: bool,
}

impl Staged {
    fn create(staging: &Path) -> io::Result<Self> {
        loop {
            let path = staging.join(format!("{:032x}", rand::random::<u128>()));
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
            // A sweep may have come between creating and locking; from here on it sees the lock.
            if file.metadata()?.nlink() > 0 {
                return Ok(Self { file, path, renamed: false });
            }
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.renamed {
            // What cannot be removed now is swept at the next open.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn rename_unless_exists(from: &Path, to: &Path) -> io::Result<Put> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(Put::Created),
        Err(Errno::EXIST) => exists(to),
        // File systems without it (NFS) have hard links, which never replace either.
        Err(Errno::INVAL | Errno::NOSYS) => match fs::hard_link(from, to) {
            Ok(()) => fs::remove_file(from).map(|()| Put::Created),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => exists(to),
            Err(error) => Err(error),
        },
        Err(error) => Err(error.into()),
    }
}

/// What is in the way of a name may also be a directory, that is, longer keys.
fn exists(path: &Path) -> io::Result<Put> {
    if path.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok(Put::Exists) }
}

fn make_dirs(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn parent_of(path: &Path) -> &Path {
    path.parent().expect("a path inside the bucket's root has a parent")
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// No such file; or a part of the path is a file, so that nothing can be below it.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests;
