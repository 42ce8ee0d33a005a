//! The few things done to local files that must survive a crash.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::LocalContext as _;

/// Makes a directory's entries durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).on("sync", dir)
}

/// Replaces a small file: afterwards it is the old or the new one, whole, whatever happens.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temp = sibling(path, ".new");
    let mut file = File::create(&temp).on("create", &temp)?;
    file.write_all(bytes).on("write", &temp)?;
    file.sync_all().on("sync", &temp)?;
    fs::rename(&temp, path).on("rename", &temp)?;
    sync_dir(parent(path))
}

/// Points a symlink at a target, atomically: who looks sees the old target or the new one.
///
/// # Errors
/// If something that is no symlink is there.
pub fn switch_symlink(link: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(parent(link)).on("create", parent(link))?;
    may_be_switched(link)?;
    let temp = sibling(link, ".new");
    match fs::remove_file(&temp) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).on("remove", &temp),
        _ => {}
    }
    symlink(target, &temp).on("create", &temp)?;
    fs::rename(&temp, link).on("rename", &temp)?;
    sync_dir(parent(link))
}

/// Checks that a path is a symlink or free.
pub fn may_be_switched(link: &Path) -> Result<()> {
    match fs::symlink_metadata(link) {
        Ok(found) if !found.is_symlink() => {
            Err(std::io::Error::new(ErrorKind::AlreadyExists, "something that is no symlink is there"))
                .on("switch", link)
        }
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).on("look at", link),
        _ => Ok(()),
    }
}

/// Removes a directory with all that is in it, or nothing.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).on("remove", dir),
        _ => Ok(()),
    }
}

/// Removes a file, or nothing.
pub fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).on("remove", path),
        _ => Ok(()),
    }
}

/// Bytes of all regular files below a directory.
pub fn tree_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).on("list", dir)? {
        let entry = entry.on("list", dir)?;
        let found = entry.metadata().on("look at", &entry.path())?;
        bytes += if found.is_dir() { tree_bytes(&entry.path())? } else { found.len() };
    }
    Ok(bytes)
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}
