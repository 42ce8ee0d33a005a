//! The file tree of a volume: names, numbers and modes, without any contents. No I/O.
//!
//! The one place where tree operations are carried out: live requests and the replay of a journal go through the same
//! [`Tree::apply`], so that a replay cannot come out differently.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;

use rustix::io::Errno;

use super::journal::Record;
use crate::layer::{Ino, InodeKind, Manifest, ROOT_INO};

/// LIMIT: what Linux file systems allow (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;

/// LIMIT: what Linux allows for a symlink's target (`PATH_MAX` without the terminator).
const TARGET_BYTES_MAX: usize = 4095;

/// All files, directories and symlinks that have a name.
#[derive(Debug)]
pub(super) struct Tree {
    entries: HashMap<Ino, Entry>,
    /// The first number never given out.
    next_ino: Ino,
}

/// A file, directory or symlink.
#[derive(Debug)]
pub(super) struct Entry {
    /// The directory it is in; the root is in itself.
    pub parent: Ino,
    pub name: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Last modification in nanoseconds since 1970; of files only as of the last time it was told.
    pub mtime_ns: i64,
    pub kind: Kind,
    /// How often the kernel was told of it and has not forgotten it.
    pub refs: AtomicU64,
}

#[derive(Debug)]
pub(super) enum Kind {
    Directory(Directory),
    File,
    Symlink(Vec<u8>),
}

/// What is in a directory.
#[derive(Debug, Default)]
pub(super) struct Directory {
    by_name: HashMap<Vec<u8>, Ino>,
    /// The order of listings: it does not change while other entries come and go.
    order: BTreeSet<Ino>,
    subdirectories: u32,
}

impl Entry {
    fn new(parent: Ino, name: &[u8], mode: u32, mtime_ns: i64, kind: Kind) -> Self {
        Self { parent, name: name.to_vec(), mode, mtime_ns, kind, refs: AtomicU64::new(0) }
    }

    /// The number of links `stat` shows while the entry has its name.
    pub(super) fn links(&self) -> u32 {
        match &self.kind {
            Kind::Directory(directory) => 2 + directory.subdirectories,
            Kind::File | Kind::Symlink(_) => 1,
        }
    }
}

impl Tree {
    /// The tree of a manifest (which was checked when it was read).
    pub(super) fn of(manifest: &Manifest) -> Self {
        let mut tree = Self { entries: HashMap::with_capacity(manifest.inodes.len()), next_ino: manifest.next_ino };
        for inode in &manifest.inodes {
            let kind = match &inode.kind {
                InodeKind::Directory => Kind::Directory(Directory::default()),
                InodeKind::File { .. } => Kind::File,
                InodeKind::Symlink { target } => Kind::Symlink(target.clone()),
            };
            tree.entries.insert(inode.ino, Entry::new(inode.parent, &inode.name, inode.mode, inode.mtime_ns, kind));
        }
        for inode in manifest.inodes.iter().filter(|inode| inode.ino != ROOT_INO) {
            let is_directory = matches!(inode.kind, InodeKind::Directory);
            tree.directory_mut(inode.parent).add(inode.name.clone(), inode.ino, is_directory);
        }
        tree
    }

    pub(super) fn next_ino(&self) -> Ino {
        self.next_ino
    }

    /// Makes sure that no number below this one is given out.
    pub(super) fn skip_inos_below(&mut self, ino: Ino) {
        self.next_ino = self.next_ino.max(ino);
    }

    pub(super) fn get(&self, ino: Ino) -> Option<&Entry> {
        self.entries.get(&ino)
    }

    pub(super) fn get_mut(&mut self, ino: Ino) -> Option<&mut Entry> {
        self.entries.get_mut(&ino)
    }

    /// Everything, in no order.
    pub(super) fn entries(&self) -> impl Iterator<Item = (Ino, &Entry)> {
        self.entries.iter().map(|(&ino, entry)| (ino, entry))
    }

    pub(super) fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Ino, Errno> {
        let found = self.directory(parent)?.by_name.get(name).copied();
        found.ok_or(if name.len() > NAME_BYTES_MAX { Errno::NAMETOOLONG } else { Errno::NOENT })
    }

    /// Follows a path of plain names from the root.
    pub(super) fn find(&self, path: &str) -> Option<Ino> {
        path.split('/').try_fold(ROOT_INO, |parent, name| self.lookup(parent, name.as_bytes()).ok())
    }

    /// The entries of a directory with numbers above `after`, in order.
    pub(super) fn list(&self, directory: Ino, after: Ino) -> Result<impl Iterator<Item = (Ino, &Entry)>, Errno> {
        let order = &self.directory(directory)?.order;
        Ok(order.range(after + 1..).filter_map(|&ino| self.entries.get(&ino).map(|entry| (ino, entry))))
    }

    fn directory(&self, ino: Ino) -> Result<&Directory, Errno> {
        match &self.entries.get(&ino).ok_or(Errno::NOENT)?.kind {
            Kind::Directory(directory) => Ok(directory),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// INVARIANT: only called for numbers that were just found to be directories.
    fn directory_mut(&mut self, ino: Ino) -> &mut Directory {
        match self.entries.get_mut(&ino).map(|entry| &mut entry.kind) {
            Some(Kind::Directory(directory)) => directory,
            _ => unreachable!("inode {ino} was checked to be a directory"),
        }
    }

    fn is_directory(&self, ino: Ino) -> bool {
        self.directory(ino).is_ok()
    }

    /// Whether a record can be applied; if not, the error the caller of the operation gets.
    pub(super) fn check(&self, record: &Record) -> Result<(), Errno> {
        match record {
            Record::Create { ino, parent, name, .. }
            | Record::Mkdir { ino, parent, name, .. }
            | Record::Symlink { ino, parent, name, .. } => {
                if matches!(record, Record::Symlink { target, .. } if target.len() > TARGET_BYTES_MAX) {
                    return Err(Errno::NAMETOOLONG);
                }
                check_name(name)?;
                match self.lookup(*parent, name) {
                    Err(Errno::NOENT) if self.is_directory(*parent) && *ino >= self.next_ino => Ok(()),
                    Ok(_) => Err(Errno::EXIST),
                    Err(error) => Err(error),
                }
            }
            Record::Unlink { parent, name } => match self.is_directory(self.lookup(*parent, name)?) {
                true => Err(Errno::ISDIR),
                false => Ok(()),
            },
            Record::Rmdir { parent, name } => self.check_empty(self.lookup(*parent, name)?),
            Record::Rename { from, from_name, to, to_name } => self.check_rename(*from, from_name, *to, to_name),
            Record::Mode { ino, .. } => self.entries.get(ino).map(drop).ok_or(Errno::NOENT),
            // A truncated file may have lost its name already.
            Record::Truncate { .. } | Record::WalEnd(_) | Record::Seal { .. } => Ok(()),
        }
    }

    fn check_empty(&self, directory: Ino) -> Result<(), Errno> {
        if self.directory(directory)?.by_name.is_empty() { Ok(()) } else { Err(Errno::NOTEMPTY) }
    }

    fn check_rename(&self, from: Ino, from_name: &[u8], to: Ino, to_name: &[u8]) -> Result<(), Errno> {
        check_name(to_name)?;
        let moved = self.lookup(from, from_name)?;
        let replaced = match self.lookup(to, to_name) {
            Ok(replaced) if replaced == moved => return Ok(()),
            Ok(replaced) => Some(replaced),
            Err(Errno::NOENT) if self.is_directory(to) => None,
            Err(error) => return Err(error),
        };
        if self.is_directory(moved) {
            if self.is_inside(to, moved) {
                return Err(Errno::INVAL);
            }
            if let Some(replaced) = replaced {
                self.check_empty(replaced)?;
            }
        } else if replaced.is_some_and(|replaced| self.is_directory(replaced)) {
            return Err(Errno::ISDIR);
        }
        Ok(())
    }

    /// Whether a directory is another one or lies below it.
    fn is_inside(&self, mut at: Ino, above: Ino) -> bool {
        loop {
            if at == above {
                return true;
            }
            match self.entries.get(&at) {
                Some(entry) if at != ROOT_INO => at = entry.parent,
                _ => return false,
            }
        }
    }

    /// Checks and carries out a record; answers what lost its name by it.
    pub(super) fn apply(&mut self, record: &Record, now_ns: i64) -> Result<Option<(Ino, Entry)>, Errno> {
        self.check(record)?;
        Ok(match record {
            Record::Create { ino, parent, name, mode } => {
                self.add(*ino, Entry::new(*parent, name, *mode, now_ns, Kind::File));
                None
            }
            Record::Mkdir { ino, parent, name, mode } => {
                self.add(*ino, Entry::new(*parent, name, *mode, now_ns, Kind::Directory(Directory::default())));
                None
            }
            Record::Symlink { ino, parent, name, target } => {
                self.add(*ino, Entry::new(*parent, name, 0o777, now_ns, Kind::Symlink(target.clone())));
                None
            }
            Record::Unlink { parent, name } | Record::Rmdir { parent, name } => self.remove(*parent, name, now_ns),
            Record::Rename { from, from_name, to, to_name } => self.rename(*from, from_name, *to, to_name, now_ns),
            Record::Mode { ino, mode } => {
                self.entries.get_mut(ino).expect("checked above").mode = *mode;
                None
            }
            Record::Truncate { .. } | Record::WalEnd(_) | Record::Seal { .. } => None,
        })
    }

    fn add(&mut self, ino: Ino, entry: Entry) {
        self.next_ino = self.next_ino.max(ino.saturating_add(1));
        let is_directory = matches!(entry.kind, Kind::Directory(_));
        self.directory_mut(entry.parent).add(entry.name.clone(), ino, is_directory);
        self.touch(entry.parent, entry.mtime_ns);
        self.entries.insert(ino, entry);
    }

    fn remove(&mut self, parent: Ino, name: &[u8], now_ns: i64) -> Option<(Ino, Entry)> {
        let ino = self.lookup(parent, name).ok()?;
        let entry = self.entries.remove(&ino)?;
        let is_directory = matches!(entry.kind, Kind::Directory(_));
        self.directory_mut(parent).remove(name, ino, is_directory);
        self.touch(parent, now_ns);
        Some((ino, entry))
    }

    fn rename(&mut self, from: Ino, from_name: &[u8], to: Ino, to_name: &[u8], now_ns: i64) -> Option<(Ino, Entry)> {
        if self.lookup(from, from_name) == self.lookup(to, to_name) {
            return None;
        }
        let replaced = self.remove(to, to_name, now_ns);
        if let Some((ino, mut moved)) = self.remove(from, from_name, now_ns) {
            moved.parent = to;
            moved.name = to_name.to_vec();
            let is_directory = matches!(moved.kind, Kind::Directory(_));
            self.directory_mut(to).add(to_name.to_vec(), ino, is_directory);
            self.touch(to, now_ns);
            self.entries.insert(ino, moved);
        }
        replaced
    }

    fn touch(&mut self, directory: Ino, now_ns: i64) {
        if let Some(entry) = self.entries.get_mut(&directory) {
            entry.mtime_ns = now_ns;
        }
    }
}

impl Directory {
    fn add(&mut self, name: Vec<u8>, ino: Ino, is_directory: bool) {
        self.by_name.insert(name, ino);
        self.order.insert(ino);
        self.subdirectories += u32::from(is_directory);
    }

    fn remove(&mut self, name: &[u8], ino: Ino, is_directory: bool) {
        self.by_name.remove(name);
        self.order.remove(&ino);
        self.subdirectories -= u32::from(is_directory);
    }
}

fn check_name(name: &[u8]) -> Result<(), Errno> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.len() > NAME_BYTES_MAX => Err(Errno::NAMETOOLONG),
        _ if name.contains(&b'/') || name.contains(&0) => Err(Errno::INVAL),
        _ => Ok(()),
    }
}
