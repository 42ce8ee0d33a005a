//! Names and attributes. The same changes are carried out on what processes see, and later on what is on the disk.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

use fuser::FileType;
use rustix::io::Errno;

use crate::Result;

pub(crate) type Ino = u64;

pub(crate) const ROOT: Ino = 1;

/// Type bits of a mode.
pub(crate) const SOCKET: u32 = 0o140_000;
pub(crate) const PIPE: u32 = 0o010_000;

#[derive(Debug, Clone)]
pub(crate) struct Tree {
    inodes: HashMap<Ino, Inode>,
}

#[derive(Debug, Clone)]
pub(crate) struct Inode {
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: SystemTime,
    /// How many names it has; a directory in a directory has one.
    pub names: u32,
    /// A directory that it is in, for paths.
    pub parent: Ino,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Directory(BTreeMap<OsString, Ino>),
    File {
        size: u64,
    },
    Symlink(OsString),
    /// A socket or a pipe.
    Special(u32),
}

/// One change of metadata.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Make { parent: Ino, name: OsString, ino: Ino, inode: Inode },
    Link { ino: Ino, parent: Ino, name: OsString },
    Remove { parent: Ino, name: OsString },
    Rename { from: Ino, from_name: OsString, to: Ino, to_name: OsString },
    Size { ino: Ino, size: u64 },
    Attributes { ino: Ino, mode: u32, uid: u32, gid: u32 },
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = Inode {
            kind: Kind::Directory(BTreeMap::new()),
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: SystemTime::now(),
            names: 1,
            parent: ROOT,
        };
        Self { inodes: HashMap::from([(ROOT, root)]) }
    }

    pub(crate) fn get(&self, ino: Ino) -> Result<&Inode> {
        self.inodes.get(&ino).ok_or(Errno::STALE)
    }

    pub(crate) fn get_mut(&mut self, ino: Ino) -> Option<&mut Inode> {
        self.inodes.get_mut(&ino)
    }

    pub(crate) fn inos(&self) -> impl Iterator<Item = Ino> {
        self.inodes.keys().copied()
    }

    pub(crate) fn entries(&self, directory: Ino) -> Result<&BTreeMap<OsString, Ino>> {
        match &self.get(directory)?.kind {
            Kind::Directory(entries) => Ok(entries),
            _ => Err(Errno::NOTDIR),
        }
    }

    pub(crate) fn lookup(&self, directory: Ino, name: &OsStr) -> Result<Ino> {
        self.entries(directory)?.get(name).copied().ok_or(Errno::NOENT)
    }

    /// Whether an inode is a directory or below it.
    pub(crate) fn is_below(&self, mut ino: Ino, directory: Ino) -> bool {
        loop {
            match self.get(ino) {
                _ if ino == directory => return true,
                Ok(inode) if ino != ROOT => ino = inode.parent,
                _ => return false,
            }
        }
    }

    /// Which inodes a change is about: syncing any of them brings the change to the disk.
    pub(crate) fn touched(&self, change: &Change) -> Vec<Ino> {
        let named = |parent: Ino, name: &OsStr| self.lookup(parent, name).ok();
        match change {
            Change::Make { parent, ino, .. } | Change::Link { ino, parent, .. } => vec![*parent, *ino],
            Change::Remove { parent, name } => [Some(*parent), named(*parent, name)].into_iter().flatten().collect(),
            Change::Rename { from, from_name, to, to_name } => {
                [Some(*from), Some(*to), named(*from, from_name), named(*to, to_name)].into_iter().flatten().collect()
            }
            Change::Size { ino, .. } | Change::Attributes { ino, .. } => vec![*ino],
        }
    }

    /// Whether a change can be carried out.
    pub(crate) fn check(&self, change: &Change) -> Result<()> {
        match change {
            Change::Make { parent, name, .. } | Change::Link { parent, name, .. } => {
                if name.len() > 255 {
                    return Err(Errno::NAMETOOLONG);
                }
                if self.get(*parent)?.names == 0 {
                    return Err(Errno::NOENT);
                }
                if self.lookup(*parent, name).is_ok() { Err(Errno::EXIST) } else { self.entries(*parent).map(drop) }
            }
            Change::Remove { parent, name } => self.check_empty(self.lookup(*parent, name)?),
            Change::Rename { from, from_name, to, to_name } => {
                let moved = self.lookup(*from, from_name)?;
                let is_directory =
                    |ino: Ino| matches!(self.inodes.get(&ino).map(|i| &i.kind), Some(Kind::Directory(_)));
                if is_directory(moved) && self.is_below(*to, moved) {
                    return Err(Errno::INVAL);
                }
                match self.lookup(*to, to_name) {
                    Ok(replaced) if replaced == moved => Ok(()),
                    Ok(replaced) if is_directory(moved) && !is_directory(replaced) => Err(Errno::NOTDIR),
                    Ok(replaced) if !is_directory(moved) && is_directory(replaced) => Err(Errno::ISDIR),
                    Ok(replaced) => self.check_empty(replaced),
                    Err(Errno::NOENT) => Ok(()),
                    Err(errno) => Err(errno),
                }
            }
            Change::Size { ino, .. } | Change::Attributes { ino, .. } => self.get(*ino).map(drop),
        }
    }

    fn check_empty(&self, ino: Ino) -> Result<()> {
        match &self.get(ino)?.kind {
            Kind::Directory(entries) if !entries.is_empty() => Err(Errno::NOTEMPTY),
            _ => Ok(()),
        }
    }

    /// Carries out a change that was checked. What has no name any more stays until [`Tree::forget`].
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Make { parent, name, ino, inode } => {
                self.inodes.insert(*ino, inode.clone());
                self.name(*parent, name, *ino);
            }
            Change::Link { ino, parent, name } => self.name(*parent, name, *ino),
            Change::Remove { parent, name } => drop(self.unname(*parent, name)),
            Change::Rename { from, from_name, to, to_name } => {
                if self.lookup(*from, from_name) == self.lookup(*to, to_name) {
                    return;
                }
                self.unname(*to, to_name);
                if let Some(ino) = self.unname(*from, from_name) {
                    self.name(*to, to_name, ino);
                }
            }
            Change::Size { ino, size } => {
                if let Some(Inode { kind: Kind::File { size: old }, .. }) = self.inodes.get_mut(ino) {
                    *old = *size;
                }
            }
            Change::Attributes { ino, mode, uid, gid } => {
                if let Some(inode) = self.inodes.get_mut(ino) {
                    (inode.mode, inode.uid, inode.gid) = (*mode, *uid, *gid);
                }
            }
        }
    }

    fn name(&mut self, parent: Ino, name: &OsStr, ino: Ino) {
        if let Some(Inode { kind: Kind::Directory(entries), mtime, .. }) = self.inodes.get_mut(&parent) {
            entries.insert(name.to_owned(), ino);
            *mtime = SystemTime::now();
        }
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.names += 1;
            inode.parent = parent;
        }
    }

    fn unname(&mut self, parent: Ino, name: &OsStr) -> Option<Ino> {
        let Inode { kind: Kind::Directory(entries), mtime, .. } = self.inodes.get_mut(&parent)? else { return None };
        let ino = entries.remove(name)?;
        *mtime = SystemTime::now();
        self.inodes.get_mut(&ino)?.names -= 1;
        Some(ino)
    }

    /// Forgets an inode if it has no name. Tells whether it is not there (any more).
    pub(crate) fn forget(&mut self, ino: Ino) -> bool {
        if self.inodes.get(&ino).is_some_and(|inode| inode.names == 0) {
            self.inodes.remove(&ino);
        }
        !self.inodes.contains_key(&ino)
    }
}

impl Inode {
    /// One that is about to get its first name.
    pub(crate) fn new(kind: Kind, mode: u32, uid: u32, gid: u32) -> Self {
        Self { kind, mode: mode & 0o7777, uid, gid, mtime: SystemTime::now(), names: 0, parent: ROOT }
    }

    pub(crate) fn file_type(&self) -> FileType {
        match self.kind {
            Kind::Directory(_) => FileType::Directory,
            Kind::File { .. } => FileType::RegularFile,
            Kind::Symlink(_) => FileType::Symlink,
            Kind::Special(SOCKET) => FileType::Socket,
            Kind::Special(_) => FileType::NamedPipe,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        match &self.kind {
            Kind::File { size } => *size,
            Kind::Symlink(target) => target.len() as u64,
            Kind::Directory(_) | Kind::Special(_) => 0,
        }
    }
}
