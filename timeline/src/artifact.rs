//! Release artifacts: directories, named by their content.
//!
//! The name is BLAKE3 over a canonical manifest: the entries sorted by path, each with its kind, whether it is
//! executable, its path, and the BLAKE3 of its content (or a symlink's target). Owners, times and other permission bits
//! do not count. On the node an artifact is `artifacts/<name>/`, its files read-only; in the bucket it is one object
//! `artifacts/<name>`, a zstd-compressed tar. Whatever is read back is named again before it is used.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_storage::object_store::Bucket;
use parking_lot::Mutex;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::error::LocalContext as _;
use crate::release_file::{self, ReleaseFile};
use crate::{Error, Refusal, Result, files};

/// LIMIT: what is fetched from the bucket passes through memory; code, not data, belongs in an artifact.
const ARTIFACT_BYTES_MAX: u64 = 512 << 20;

/// The directory of an artifact's migrations, unless it names another.
pub const MIGRATIONS_DIR: &str = "migrations";

/// zstd's default level: code compresses well, and a release waits for it.
const ZSTD_LEVEL: i32 = 3;

/// The artifacts of one node and its bucket.
#[derive(Debug, Clone)]
pub struct Artifacts {
    dir: PathBuf,
    bucket: Bucket,
    /// By name: held for reading by whoever takes an artifact in, for writing by whoever deletes it.
    uses: Arc<Mutex<HashMap<String, Arc<RwLock<()>>>>>,
}

/// An artifact that was taken in: in the bucket, and safe from collection as long as this lives.
#[derive(Debug)]
pub struct Taken {
    /// Its name.
    pub name: String,
    _use: OwnedRwLockReadGuard<()>,
}

/// One migration of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    /// Its file name.
    pub name: String,
    /// BLAKE3 of its text, in hex.
    pub hash: String,
    /// Its text.
    pub sql: String,
}

/// One entry of a manifest.
enum Item {
    File { executable: bool, content: blake3::Hash },
    Directory,
    Symlink { target: Vec<u8> },
}

impl Artifacts {
    /// Artifacts below a data directory.
    pub fn new(data_dir: &Path, bucket: Bucket) -> Self {
        Self { dir: data_dir.join("artifacts"), bucket, uses: Arc::default() }
    }

    fn uses_of(&self, name: &str) -> Arc<RwLock<()>> {
        let mut uses = self.uses.lock();
        uses.retain(|_, lock| Arc::strong_count(lock) > 1);
        uses.entry(name.to_owned()).or_default().clone()
    }

    /// The right to delete an artifact, unless somebody is taking it in. Whoever wants to waits until this is dropped.
    pub fn try_exclude(&self, name: &str) -> Option<OwnedRwLockWriteGuard<()>> {
        self.uses_of(name).try_write_owned().ok()
    }

    /// Removes this node's copy of an artifact.
    pub async fn remove_local(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        blocking(move || files::remove_dir(&path)).await
    }

    /// Where an artifact is on this node, once it is there.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Takes a directory in: copies it, names it, stores it in the bucket. Taking the same content in again is cheap.
    ///
    /// # Errors
    /// `Invalid` if it is no directory, too large, or holds something that is no file, directory or symlink.
    pub async fn take(&self, source: &Path) -> Result<Taken> {
        let (name, held) = loop {
            let (this, source) = (self.clone(), source.to_owned());
            let name = blocking(move || this.copy_in(&source)).await?;
            let held = self.uses_of(&name).read_owned().await;
            // The copy may have been collected just before it was held.
            if self.path(&name).is_dir() {
                break (name, held);
            }
        };
        let key = object_key(&name);
        if self.bucket.head(&key).await?.is_none() {
            let (this, packed_name) = (self.clone(), name.clone());
            let packed = blocking(move || this.pack(&packed_name)).await?;
            let stored = self.bucket.put_file(&key, &packed).await;
            files::remove_file(&packed)?;
            stored?;
        }
        Ok(Taken { name, _use: held })
    }

    /// Makes an artifact present on this node.
    ///
    /// # Errors
    /// `Corrupt` if what the bucket has is not what the name says.
    pub async fn ensure_local(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        if path.is_dir() {
            return Ok(path);
        }
        let packed = self.bucket.get(&object_key(name)).await?;
        let (this, name) = (self.clone(), name.to_owned());
        blocking(move || this.unpack(&name, &packed)).await?;
        Ok(path)
    }

    /// The migrations of an artifact of this node: `*.sql` in a directory of it, by name.
    pub async fn migrations(&self, name: &str, dir: &str) -> Result<Vec<Migration>> {
        let dir = self.path(name).join(dir);
        blocking(move || read_migrations(&dir)).await
    }

    /// What an artifact of this node says of itself, if it does.
    ///
    /// # Errors
    /// Everything that is wrong with that.
    pub async fn described(&self, name: &str) -> Result<Option<ReleaseFile>> {
        let path = self.path(name);
        blocking(move || read_release_file(&path)).await
    }

    fn copy_in(&self, source: &Path) -> Result<String> {
        if !source.is_absolute() {
            return Err(invalid(format!("the artifact's path {source:?} is not absolute")));
        }
        if !source.is_dir() {
            return Err(invalid(format!("there is no directory {source:?}")));
        }
        let temp = self.temp_dir()?;
        let outcome = copy_tree(source, &temp, &mut 0).and_then(|()| self.publish(&temp));
        if outcome.is_err() {
            files::remove_dir(&temp)?;
        }
        outcome
    }

    fn unpack(&self, name: &str, packed: &[u8]) -> Result<()> {
        let temp = self.temp_dir()?;
        let corrupt = |why: String| {
            let what = format!("object {:?}", object_key(name));
            Error::Storage(ebb_storage::Error::Corrupt { what, why })
        };
        let unpacked = zstd::Decoder::new(packed)
            .and_then(|plain| tar::Archive::new(plain).unpack(&temp))
            .map_err(|error| corrupt(error.to_string()));
        let outcome = unpacked.and_then(|()| {
            let found = name_of(&temp)?;
            if found != name { Err(corrupt(format!("its content is {found}"))) } else { self.publish(&temp) }
        });
        if outcome.is_err() {
            files::remove_dir(&temp)?;
        }
        outcome.map(|_| ())
    }

    /// Gives a complete directory its name.
    fn publish(&self, temp: &Path) -> Result<String> {
        let name = name_of(temp)?;
        let path = self.path(&name);
        if path.is_dir() {
            files::remove_dir(temp)?;
        } else {
            settle_tree(temp)?;
            match fs::rename(temp, &path) {
                // Somebody else has taken the same content in meanwhile.
                Err(_) if path.is_dir() => files::remove_dir(temp)?,
                renamed => renamed.on("rename", temp)?,
            }
            files::sync_dir(&self.dir)?;
        }
        Ok(name)
    }

    fn pack(&self, name: &str) -> Result<PathBuf> {
        let packed = self.dir.join(format!("{name}.{:016x}.tar.zst", rand::random::<u64>()));
        let mut tar = zstd::Encoder::new(File::create(&packed).on("create", &packed)?, ZSTD_LEVEL)
            .map(tar::Builder::new)
            .on("write", &packed)?;
        tar.follow_symlinks(false);
        tar.mode(tar::HeaderMode::Deterministic);
        tar.append_dir_all("", self.path(name)).on("pack", &self.path(name))?;
        let mut file = tar.into_inner().and_then(zstd::Encoder::finish).on("write", &packed)?;
        file.flush().on("write", &packed)?;
        Ok(packed)
    }

    fn temp_dir(&self) -> Result<PathBuf> {
        let temp = self.dir.join(format!(".new-{:016x}", rand::random::<u64>()));
        fs::create_dir_all(&temp).on("create", &temp)?;
        Ok(temp)
    }

    /// Removes what interrupted takes have left. Blocks; for the start of a service.
    pub fn sweep(&self) -> Result<()> {
        fs::create_dir_all(&self.dir).on("create", &self.dir)?;
        for entry in fs::read_dir(&self.dir).on("list", &self.dir)? {
            let path = entry.on("list", &self.dir)?.path();
            let name = path.file_name().unwrap_or_default().as_bytes();
            if name.starts_with(b".new-") {
                files::remove_dir(&path)?;
            } else if name.ends_with(b".tar.zst") {
                files::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// The name that the content of an artifact's object has, read without unpacking it to disk.
///
/// # Errors
/// If it is not a packed artifact.
pub fn name_of_packed(packed: &[u8]) -> std::io::Result<String> {
    let mut archive = tar::Archive::new(zstd::Decoder::new(packed)?);
    let mut items = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path_bytes().into_owned();
        let path = path.strip_prefix(b"./").unwrap_or(&path);
        let path = path.strip_suffix(b"/").unwrap_or(path).to_vec();
        if path.is_empty() || path == b"." {
            continue;
        }
        let kind = entry.header().entry_type();
        let item = if kind.is_dir() {
            Item::Directory
        } else if kind.is_symlink() {
            Item::Symlink { target: entry.link_name_bytes().unwrap_or_default().into_owned() }
        } else {
            let executable = entry.header().mode()? & 0o111 != 0;
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(&mut entry)?;
            Item::File { executable, content: hasher.finalize() }
        };
        items.push((path, item));
    }
    Ok(name_of_items(items))
}

/// The name that the content of a directory has.
///
/// # Errors
/// If it cannot be read.
pub fn name_of_directory(dir: &Path) -> Result<String> {
    name_of(dir)
}

fn object_key(name: &str) -> String {
    format!("artifacts/{name}")
}

fn invalid(why: String) -> Error {
    Refusal::Invalid(why).into()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Lost("handling an artifact"))?
}

fn copy_tree(from: &Path, to: &Path, bytes: &mut u64) -> Result<()> {
    for entry in fs::read_dir(from).on("list", from)? {
        let entry = entry.on("list", from)?;
        let (source, dest) = (entry.path(), to.join(entry.file_name()));
        let found = entry.metadata().on("look at", &source)?;
        if found.is_dir() {
            fs::create_dir(&dest).on("create", &dest)?;
            copy_tree(&source, &dest, bytes)?;
        } else if found.is_symlink() {
            let target = fs::read_link(&source).on("read", &source)?;
            std::os::unix::fs::symlink(target, &dest).on("create", &dest)?;
        } else if found.is_file() {
            *bytes += fs::copy(&source, &dest).on("copy", &source)?;
            if *bytes > ARTIFACT_BYTES_MAX {
                return Err(invalid(format!("the artifact has more than {} MiB", ARTIFACT_BYTES_MAX >> 20)));
            }
        } else {
            return Err(invalid(format!("{source:?} is no file, directory or symlink")));
        }
    }
    Ok(())
}

/// Makes all files read-only and everything durable. Directories stay writable, so that their owner can remove them.
fn settle_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).on("list", dir)? {
        let path = entry.on("list", dir)?.path();
        let found = fs::symlink_metadata(&path).on("look at", &path)?;
        if found.is_dir() {
            settle_tree(&path)?;
        } else if found.is_file() {
            let mode = if is_executable(&found) { 0o555 } else { 0o444 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).on("set the mode of", &path)?;
            File::open(&path).and_then(|file| file.sync_all()).on("sync", &path)?;
        }
    }
    files::sync_dir(dir)
}

fn is_executable(found: &fs::Metadata) -> bool {
    found.permissions().mode() & 0o111 != 0
}

/// The name of a directory's content.
fn name_of(dir: &Path) -> Result<String> {
    let mut items = Vec::new();
    collect(dir, &mut Vec::new(), &mut items)?;
    Ok(name_of_items(items))
}

fn name_of_items(mut items: Vec<(Vec<u8>, Item)>) -> String {
    items.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"ebb artifact 1\n");
    for (path, item) in &items {
        // Every part has its length before it: no two trees have the same bytes.
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(path);
        match item {
            Item::File { executable, content } => {
                part(if *executable { b"x" } else { b"f" });
                part(content.as_bytes());
            }
            Item::Directory => part(b"d"),
            Item::Symlink { target } => {
                part(b"l");
                part(target);
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

fn collect(dir: &Path, prefix: &mut Vec<u8>, items: &mut Vec<(Vec<u8>, Item)>) -> Result<()> {
    for entry in fs::read_dir(dir).on("list", dir)? {
        let entry = entry.on("list", dir)?;
        let (path, length) = (entry.path(), prefix.len());
        let found = entry.metadata().on("look at", &path)?;
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        prefix.extend_from_slice(entry.file_name().as_bytes());
        if found.is_dir() {
            items.push((prefix.clone(), Item::Directory));
            collect(&path, prefix, items)?;
        } else if found.is_symlink() {
            let target = fs::read_link(&path).on("read", &path)?.as_os_str().as_bytes().to_vec();
            items.push((prefix.clone(), Item::Symlink { target }));
        } else {
            let mut hasher = blake3::Hasher::new();
            File::open(&path).and_then(|file| hasher.update_reader(file).map(|_| ())).on("read", &path)?;
            let executable = is_executable(&found);
            items.push((prefix.clone(), Item::File { executable, content: hasher.finalize() }));
        }
        prefix.truncate(length);
    }
    Ok(())
}

/// Reads a directory's `ebb.toml`, if it has one.
///
/// # Errors
/// Everything that is wrong with it.
pub fn read_release_file(dir: &Path) -> Result<Option<ReleaseFile>> {
    let path = dir.join(release_file::FILE_NAME);
    let bytes = match fs::metadata(&path) {
        Ok(found) if found.len() > release_file::BYTES_MAX => {
            return Err(invalid(format!("{path:?} is larger than {} bytes", release_file::BYTES_MAX)));
        }
        Ok(_) => fs::read(&path).on("read", &path)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).on("read", &path),
    };
    let text = String::from_utf8(bytes).map_err(|_| invalid(format!("{path:?} is not UTF-8")))?;
    Ok(Some(release_file::read(&text).map_err(Refusal::ReleaseFile)?))
}

/// Reads the migrations of a directory: `*.sql`, by name; none if there is no such directory.
pub fn read_migrations(dir: &Path) -> Result<Vec<Migration>> {
    let mut migrations = Vec::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(migrations),
        Err(error) => return Err(error).on("list", dir),
    };
    for entry in entries {
        let path = entry.on("list", dir)?.path();
        if path.extension() != Some("sql".as_ref()) || !path.is_file() {
            continue;
        }
        let name = path.file_name().and_then(|name| name.to_str());
        let name =
            name.ok_or_else(|| invalid(format!("the migration {path:?} has a name that is not UTF-8")))?.to_owned();
        let bytes = fs::read(&path).on("read", &path)?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        let sql = String::from_utf8(bytes).map_err(|_| invalid(format!("the migration {name:?} is not UTF-8")))?;
        migrations.push(Migration { name, hash, sql });
    }
    migrations.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(migrations)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store(dir: &Path) -> Artifacts {
        let bucket = ebb_storage::object_store::open(dir.join("bucket").to_str().unwrap()).await.unwrap();
        let artifacts = Artifacts::new(dir, bucket);
        artifacts.sweep().unwrap();
        artifacts
    }

    fn sample(dir: &Path) {
        fs::create_dir_all(dir.join("migrations")).unwrap();
        fs::create_dir(dir.join("empty")).unwrap();
        fs::write(dir.join("run.sh"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(dir.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.join("migrations/2.sql"), "select 2").unwrap();
        fs::write(dir.join("migrations/1.sql"), "select 1").unwrap();
        fs::write(dir.join("migrations/readme"), "none").unwrap();
        std::os::unix::fs::symlink("run.sh", dir.join("start")).unwrap();
    }

    #[tokio::test]
    async fn the_name_follows_content_and_survives_the_bucket() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = store(dir.path()).await;
        let source = dir.path().join("source");
        sample(&source);
        let name = artifacts.take(&source).await.unwrap().name;
        assert_eq!(artifacts.take(&source).await.unwrap().name, name);
        let names: Vec<_> =
            artifacts.migrations(&name, MIGRATIONS_DIR).await.unwrap().into_iter().map(|one| one.name).collect();
        assert_eq!(names, ["1.sql", "2.sql"]);

        files::remove_dir(&artifacts.path(&name)).unwrap();
        let packed = artifacts.bucket.get(&object_key(&name)).await.unwrap();
        assert_eq!(name_of_packed(&packed).unwrap(), name);
        assert!(name_of_packed(&packed[..packed.len() / 2]).is_err());
        let back = artifacts.ensure_local(&name).await.unwrap();
        assert_eq!(name_of(&back).unwrap(), name);
        assert_eq!(fs::read_link(back.join("start")).unwrap(), Path::new("run.sh"));
        assert_eq!(fs::metadata(back.join("run.sh")).unwrap().permissions().mode() & 0o777, 0o555);

        fs::write(source.join("migrations/1.sql"), "select 3").unwrap();
        assert_ne!(artifacts.take(&source).await.unwrap().name, name);
    }

    #[tokio::test]
    async fn altered_objects_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = store(dir.path()).await;
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        sample(&one);
        sample(&two);
        fs::write(two.join("run.sh"), "#!/bin/false\n").unwrap();
        let (one, two) = (artifacts.take(&one).await.unwrap().name, artifacts.take(&two).await.unwrap().name);
        let other = artifacts.bucket.get(&object_key(&two)).await.unwrap();
        artifacts.bucket.put(&object_key(&one), other).await.unwrap();
        files::remove_dir(&artifacts.path(&one)).unwrap();
        let error = artifacts.ensure_local(&one).await.unwrap_err();
        assert_eq!(error.kind(), ebb_types::ErrorKind::Corrupt);
        assert!(!artifacts.path(&one).exists());
    }

    #[tokio::test]
    async fn what_is_no_artifact_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = store(dir.path()).await;
        assert!(artifacts.take(Path::new("relative")).await.is_err());
        assert!(artifacts.take(&dir.path().join("absent")).await.is_err());
        let source = dir.path().join("source");
        sample(&source);
        let _socket = std::os::unix::net::UnixListener::bind(source.join("socket")).unwrap();
        assert!(artifacts.take(&source).await.unwrap_err().chain().contains("no file, directory or symlink"));
        assert_eq!(fs::read_dir(&artifacts.dir).unwrap().count(), 0, "something was left behind");
    }
}
