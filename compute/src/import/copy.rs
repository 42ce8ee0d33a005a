//! From a data directory that somebody else made to one of an import's own.
//!
//! The source is only read. What belongs to its server stays behind: configuration, keys, logs, replication slots, and
//! what Postgres makes anew at every start.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ebb_storage::pg_files::{self, PG_CONTROL};

use super::progress::{Counted, Phase, Progress};
use super::stage::{Stage, give};
use crate::error::{Error, OsContext, Result};
use crate::user::RunAs;

/// LIMIT: bytes read at once.
const CHUNK: usize = 1 << 20;

/// Entries at the top of a data directory that are not copied.
const LEFT_BEHIND: [&str; 16] = [
    "postmaster.pid",
    "postmaster.opts",
    "postgresql.conf",
    "postgresql.auto.conf",
    "pg_hba.conf",
    "pg_ident.conf",
    "standby.signal",
    "recovery.signal",
    "recovery.done",
    "promote",
    "current_logfiles",
    "log",
    "pg_log",
    "server.key",
    "server.crt",
    "root.crt",
];

/// Directories of which only the directory itself is copied: replication slots (I12), and what a base backup leaves out as
/// well (PostgreSQL 15 `basebackup.c`, `excludeDirContents`).
const EMPTIED: [&str; 7] =
    ["pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans"];

/// What a data directory says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Major version of its Postgres.
    pub pg_major: u32,
    /// Bytes of its files.
    pub bytes: u64,
}

/// Refuses, with the reason, what cannot be imported. Blocks.
///
/// # Errors
/// [`Error::Import`] for what is no data directory, is in use, has tablespaces, or is of a version that is not supported.
pub fn look(source: &Path) -> Result<Found> {
    let refuse = |why: &str, hint: &str| {
        Err(Error::Import { why: format!("directory {source:?} {why}"), hint: Some(hint.to_owned()) })
    };
    if !source.is_dir() {
        return refuse("is not there, or is no directory", "Name the data directory as ebb serve sees it.");
    }
    if !source.join("PG_VERSION").is_file() {
        let hint = "Name the directory that PG_VERSION and base/ are in; a dump is imported with --from-dump.";
        return refuse("is not a Postgres data directory: it has no PG_VERSION", hint);
    }
    if let Some(pid) = running(source)? {
        let hint =
            "Stop Postgres, import from a snapshot or a copy, or import over the network with --from postgres://….";
        return refuse(&format!("is in use by a running Postgres (process {pid})"), hint);
    }
    let info = pg_files::read_image_info(source).map_err(|error| Error::Import {
        why: format!("directory {source:?} cannot be imported: {}", crate::error::chain(&error)),
        hint: Some("Postgres 14 to 18 with pages of 8 KiB can be imported; anything else with pg_dump.".to_owned()),
    })?;
    let tablespaces = source.join("pg_tblspc");
    if tablespaces.is_dir() && fs::read_dir(&tablespaces).on("list", &tablespaces)?.next().is_some() {
        let hint = "Move their tables first (ALTER TABLE … SET TABLESPACE pg_default) and drop them, or import a dump.";
        return refuse("has tablespaces, which are not supported", hint);
    }
    let mut bytes = 0;
    Walk { source, root: source, visit: &mut |_, meta| bytes += meta.len() }.directory(source)?;
    Ok(Found { pg_major: info.pg_major, bytes })
}

/// Copies the data directory into the stage, which must be empty. Blocks.
///
/// # Errors
/// As [`look`]; also if Postgres was started on the source, or wrote to it, meanwhile.
pub(super) fn copy(source: &Path, stage: &Stage, progress: &Progress, stop: &dyn Fn() -> bool) -> Result<()> {
    let found = look(source)?;
    progress.begin(Phase::Copying, Counted::Bytes, Some(found.bytes));
    stage.check_room(found.bytes)?;
    let before = signs_of_life(source)?;
    let user = RunAs::find()?;
    let data = stage.data();
    let mut copied: Result<()> = Ok(());
    let mut buffer = vec![0; CHUNK];
    Walk {
        source,
        root: source,
        visit: &mut |relative: &Path, meta: &Metadata| {
            if copied.is_err() {
                return;
            }
            if stop() {
                copied = Err(Error::Cancelled);
                return;
            }
            let (from, to) = (source.join(relative), data.join(relative));
            copied = match meta.is_dir() {
                true => make_dir(&to, user),
                false => copy_file(&from, &to, user, &mut buffer, progress, stop),
            };
        },
    }
    .directory(source)?;
    copied?;
    if running(source)?.is_some() || signs_of_life(source)? != before {
        return Err(Error::Import {
            why: format!("directory {source:?} was written to while it was copied"),
            hint: Some("Import from a snapshot of a stopped Postgres, or over the network.".to_owned()),
        });
    }
    Ok(())
}

/// Removes what belongs to the source's server from a base backup.
pub(super) fn leave_behind(data: &Path) -> Result<()> {
    for name in LEFT_BEHIND.iter().chain(&["backup_manifest"]) {
        let path = data.join(name);
        let removed = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).on("remove", path),
            _ => {}
        }
    }
    Ok(())
}

/// Goes through everything that is copied, directories before what is in them.
struct Walk<'a> {
    source: &'a Path,
    root: &'a Path,
    visit: &'a mut dyn FnMut(&Path, &Metadata),
}

impl Walk<'_> {
    fn directory(&mut self, dir: &Path) -> Result<()> {
        let relative = dir.strip_prefix(self.root).unwrap_or(Path::new("")).to_owned();
        let is_top = relative.as_os_str().is_empty();
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).on("list", dir)? {
            names.push(entry.on("list", dir)?.file_name());
        }
        names.sort_unstable();
        for name in names {
            let text = name.to_string_lossy();
            let (path, relative) = (dir.join(&name), relative.join(&name));
            if text.starts_with("pgsql_tmp") || (is_top && LEFT_BEHIND.contains(&&*text)) {
                continue;
            }
            let mut meta = match fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                Err(error) => return Err(error).on("look at", path),
            };
            if meta.is_symlink() {
                // Configuration may be elsewhere, and WAL often is; nothing else of a cluster without tablespaces.
                match &*text {
                    "pg_wal" if is_top => meta = fs::metadata(&path).on("look at", &path)?,
                    _ if is_top => continue,
                    _ => {
                        let why = format!("{path:?} is a symbolic link, which no data directory has there");
                        return Err(Error::import(why));
                    }
                }
            }
            if meta.is_dir() {
                (self.visit)(&relative, &meta);
                let is_emptied = is_top && EMPTIED.contains(&&*text);
                if !is_emptied && relative != Path::new("pg_wal/archive_status") {
                    self.directory(&self.source.join(&relative))?;
                }
            } else if meta.is_file() {
                (self.visit)(&relative, &meta);
            } else {
                let why = format!("{path:?} is neither a file nor a directory");
                return Err(Error::import(why));
            }
        }
        Ok(())
    }
}

/// The process that runs on a data directory, if one does: its lock file may be left from one that does not.
fn running(source: &Path) -> Result<Option<i32>> {
    let path = source.join("postmaster.pid");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).on("read", path),
    };
    let Some(pid) = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok()) else { return Ok(None) };
    // A single-user server writes its number negative (PostgreSQL 15 `miscinit.c`, `CreateLockFile`).
    let pid = pid.abs();
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let name = match fs::read_to_string(proc.join("comm")) {
        Ok(name) => name,
        Err(_) => return Ok(None),
    };
    let is_server = matches!(name.trim(), "postgres" | "postmaster");
    let there = fs::read_link(proc.join("cwd")).ok().zip(source.canonicalize().ok());
    Ok((is_server && there.is_none_or(|(cwd, source)| cwd == source)).then_some(pid))
}

/// What changes when Postgres writes.
#[derive(Debug, PartialEq, Eq)]
struct SignsOfLife {
    control: Vec<u8>,
    /// Names of WAL files, with length and time of the last change.
    wal: BTreeMap<OsString, (u64, i64, i64)>,
}

fn signs_of_life(source: &Path) -> Result<SignsOfLife> {
    let control = source.join(PG_CONTROL);
    let wal = source.join("pg_wal");
    let mut segments = BTreeMap::new();
    for entry in fs::read_dir(&wal).on("list", &wal)? {
        let entry = entry.on("list", &wal)?;
        let meta = entry.metadata().on("look at", entry.path())?;
        segments.insert(entry.file_name(), (meta.len(), meta.mtime(), meta.mtime_nsec()));
    }
    Ok(SignsOfLife { control: fs::read(&control).on("read", &control)?, wal: segments })
}

fn make_dir(path: &Path, user: RunAs) -> Result<()> {
    DirBuilder::new().mode(0o700).create(path).on("create", path)?;
    give(path, user)
}

/// Copies a file; what is all zeroes becomes a hole.
fn copy_file(
    from: &Path,
    to: &Path,
    user: RunAs,
    buffer: &mut [u8],
    progress: &Progress,
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    let mut source = File::open(from).on("open", from)?;
    let mut copy = File::options().write(true).create_new(true).mode(0o600).open(to).on("create", to)?;
    let mut size = 0;
    loop {
        let read = source.read(buffer).on("read", from)?;
        if read == 0 {
            break;
        }
        if stop() {
            return Err(Error::Cancelled);
        }
        let bytes = &buffer[..read];
        match bytes.iter().all(|byte| *byte == 0) {
            true => drop(io::Seek::seek(&mut copy, io::SeekFrom::Current(read as i64)).on("write", to)?),
            false => copy.write_all(bytes).on("write", to)?,
        }
        size += read as u64;
        progress.add(read as u64);
    }
    copy.set_len(size).on("write", to)?;
    give(to, user)
}
