//! A bucket that cannot be changed, not even by opening it.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::FlockOperation;

use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use crate::object_store::{self, Bucket, MARKER, ObjectMeta, ObjectStore, Put, check_key, check_prefix};

/// Opens a bucket to look at it: a directory is not made, marked or swept, and may be on a read-only disk.
///
/// # Errors
/// As [`object_store::open`]; `Invalid` also for a directory that is no bucket.
pub async fn open_read_only(url: &str) -> Result<Bucket> {
    match directory(url) {
        Some(root) => {
            let marker = root.join(MARKER);
            match fs::read_to_string(&marker) {
                Ok(text) if text == format!("{MARKER} 1\n") => {}
                Ok(text) => {
                    let why = format!("it says {:?}; this build knows format version 1", text.trim_end());
                    return Err(Error::Corrupt { what: format!("the marker {marker:?}"), why });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(Error::Invalid(format!(
                        "directory {root:?} is not a bucket (it has no file {MARKER:?})"
                    )));
                }
                Err(error) => return Err(error).on("read", &marker),
            }
            Ok(Arc::new(ReadOnly::Directory(root)))
        }
        None => Ok(Arc::new(ReadOnly::Bucket(object_store::open(url).await?))),
    }
}

/// Files that writers of a bucket in a directory left when they died. None for other buckets.
///
/// # Errors
/// If the directory cannot be listed.
pub fn staging_leftovers(url: &str) -> Result<Vec<PathBuf>> {
    let Some(root) = directory(url) else { return Ok(Vec::new()) };
    let staging = root.join(".staging");
    let entries = match fs::read_dir(&staging) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).on("list", &staging),
    };
    let mut dead = Vec::new();
    for entry in entries {
        let path = entry.on("list", &staging)?.path();
        // A writer holds a lock on what it writes, as long as it lives.
        let Ok(file) = File::open(&path) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            dead.push(path);
        }
    }
    dead.sort_unstable();
    Ok(dead)
}

/// The directory that a URL names, if it names one.
fn directory(url: &str) -> Option<PathBuf> {
    match url.split_once("://") {
        None => Some(PathBuf::from(url)),
        Some(("file", path)) => Some(PathBuf::from(path)),
        Some(_) => None,
    }
}

#[derive(Debug)]
enum ReadOnly {
    Directory(PathBuf),
    Bucket(Bucket),
}

impl ReadOnly {
    fn refuse<T>(&self) -> Result<T> {
        Err(Error::Invalid("the bucket was opened to be looked at only".to_owned()))
    }

    async fn in_directory<T: Send + 'static>(
        root: &Path,
        key: &str,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        check_key(key)?;
        let path = root.join(key);
        let outcome = blocking::run(move || work(&path)).await;
        outcome.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
                Error::NoSuchObject { key: key.to_owned() }
            }
            _ => Error::Bucket { act: "get", key: key.to_owned(), source },
        })
    }
}

#[async_trait]
impl ObjectStore for ReadOnly {
    async fn get(&self, key: &str) -> Result<Bytes> {
        match self {
            ReadOnly::Bucket(bucket) => bucket.get(key).await,
            ReadOnly::Directory(root) => Self::in_directory(root, key, |path| fs::read(path).map(Bytes::from)).await,
        }
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        match self {
            ReadOnly::Bucket(bucket) => bucket.get_range(key, range).await,
            ReadOnly::Directory(root) => {
                let read = move |path: &Path| {
                    let mut bytes = vec![0; usize::try_from(range.end - range.start).map_err(io::Error::other)?];
                    File::open(path)?.read_exact_at(&mut bytes, range.start)?;
                    Ok(bytes.into())
                };
                Self::in_directory(root, key, read).await
            }
        }
    }

    async fn put(&self, _: &str, _: Bytes) -> Result<()> {
        self.refuse()
    }

    async fn put_if_absent(&self, _: &str, _: Bytes) -> Result<Put> {
        self.refuse()
    }

    async fn put_file(&self, _: &str, _: &Path) -> Result<()> {
        self.refuse()
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        let root = match self {
            ReadOnly::Bucket(bucket) => return bucket.head(key).await,
            ReadOnly::Directory(root) => root,
        };
        let found = Self::in_directory(root, key, |path| fs::metadata(path)).await;
        match found {
            Ok(found) => Ok(found.is_file().then(|| ObjectMeta { key: key.to_owned(), size: found.len() })),
            Err(Error::NoSuchObject { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        let root = match self {
            ReadOnly::Bucket(bucket) => return bucket.list(prefix, start_after).await,
            ReadOnly::Directory(root) => root,
        };
        check_prefix(prefix)?;
        let (dir, prefix, after) = (root.clone(), prefix.to_owned(), start_after.unwrap_or_default().to_owned());
        let listed = blocking::run(move || {
            let mut found = Vec::new();
            collect(&dir, &prefix, &mut found).map(|()| {
                found.retain(|object: &ObjectMeta| object.key > after);
                found.sort_unstable_by(|a, b| a.key.cmp(&b.key));
                found
            })
        });
        listed.await.map_err(|source| Error::Bucket { act: "list", key: String::new(), source })
    }

    async fn delete(&self, _: &str) -> Result<()> {
        self.refuse()
    }
}

fn collect(root: &Path, prefix: &str, found: &mut Vec<ObjectMeta>) -> io::Result<()> {
    let entries = match fs::read_dir(root.join(prefix)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let key = format!("{prefix}{name}");
        if check_key(&key).is_err() {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(root, &format!("{key}/"), found)?;
        } else {
            match entry.metadata() {
                Ok(meta) => found.push(ObjectMeta { key, size: meta.len() }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}
