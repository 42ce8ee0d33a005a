//! What is on the disk, what is on its way there, and every request on it.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fuser::{FileAttr, FileType, Generation, INodeNo};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::io::Errno;

use crate::Result;
use crate::contents::{BLOCK, Contents, Loss};
use crate::tree::{Change, Ino, Inode, Kind, ROOT, Tree};

/// Requests that fail.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Which requests.
    pub on: On,
    /// Of files whose path, from the mount point on, contains this.
    pub path_has: String,
    /// With which error.
    pub errno: Errno,
    /// So many times; then no more.
    pub times: u64,
}

/// Kinds of requests that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// `fsync` and `fdatasync`, also of directories.
    Sync,
    /// Writes.
    Write,
    /// Reads.
    Read,
}

#[derive(Debug)]
pub(crate) struct State {
    /// What processes see.
    live: Tree,
    /// What is on the disk for sure: `live` as it was after change `kept_seq`, but for lengths.
    kept: Tree,
    kept_seq: u64,
    /// The changes after that, numbered without gaps.
    log: VecDeque<Change>,
    /// The last change that was about an inode.
    last_change: HashMap<Ino, u64>,
    contents: HashMap<Ino, Contents>,
    /// How often the kernel was told of an inode and has not forgotten it.
    lookups: HashMap<Ino, u64>,
    next_ino: Ino,
    /// How often the power was cut. A file handle is valid in the epoch it is from.
    epoch: u64,
    stopped: bool,
    /// How many more changes are carried out before the disk stops.
    stop_after: Option<u64>,
    capacity: Option<u64>,
    /// Blocks that contents take.
    used: u64,
    pub(crate) faults: Vec<Fault>,
    pub(crate) faulted: u64,
    rng: StdRng,
}

impl State {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            live: Tree::new(),
            kept: Tree::new(),
            kept_seq: 0,
            log: VecDeque::new(),
            last_change: HashMap::new(),
            contents: HashMap::new(),
            lookups: HashMap::new(),
            next_ino: ROOT + 1,
            epoch: 0,
            stopped: false,
            stop_after: None,
            capacity: None,
            used: 0,
            faults: Vec::new(),
            faulted: 0,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    // For tests.

    pub(crate) fn reseed(&mut self, seed: u64) {
        self.rng = StdRng::seed_from_u64(seed);
    }

    pub(crate) fn stop(&mut self) {
        self.stopped = true;
    }

    pub(crate) fn stop_after(&mut self, changes: u64) {
        self.stop_after = Some(changes);
    }

    pub(crate) fn keep_all(&mut self) {
        self.keep(self.seq());
        for (ino, contents) in &mut self.contents {
            contents.synced();
            let size = self.live.get(*ino).map_or(0, Inode::size);
            if let Some(Kind::File { size: kept }) = self.kept.get_mut(*ino).map(|inode| &mut inode.kind) {
                *kept = size;
            }
        }
    }

    pub(crate) fn set_capacity(&mut self, bytes: Option<u64>) {
        self.capacity = bytes.map(|bytes| bytes / BLOCK);
    }

    pub(crate) fn used(&self) -> u64 {
        self.used * BLOCK
    }

    pub(crate) fn mend(&mut self) -> u64 {
        self.faults.clear();
        std::mem::take(&mut self.faulted)
    }

    pub(crate) fn cut_power(&mut self) -> String {
        let (all, how) = (self.log.len(), self.rng.random_range(0..6_u32));
        let metadata = match how {
            0 => 0,
            1 | 2 => all,
            _ => self.rng.random_range(0..=all),
        };
        let contents = match how {
            0 | 3 => Some(Loss::All),
            1 => Some(Loss::Nothing),
            _ => None,
        };
        for change in self.log.drain(..).take(metadata) {
            self.kept.apply(&change);
        }
        self.kept_seq += metadata as u64;
        self.lose_contents(contents);
        self.live = self.kept.clone();
        self.last_change.clear();
        self.used = self.contents.values().map(Contents::room).sum();
        self.epoch += 1;
        (self.stopped, self.stop_after) = (false, None);
        format!("of {all} metadata changes {metadata} were kept; contents: {contents:?}")
    }

    fn lose_contents(&mut self, loss: Option<Loss>) {
        let nameless: Vec<_> =
            self.kept.inos().filter(|&ino| self.kept.get(ino).is_ok_and(|inode| inode.names == 0)).collect();
        for ino in nameless {
            self.kept.forget(ino);
        }
        // In order, so that the same seed takes the same.
        let mut inos: Vec<_> = self.contents.keys().copied().collect();
        inos.sort_unstable();
        for ino in inos {
            let each = [Loss::All, Loss::Nothing, Loss::Some, Loss::Some][self.rng.random_range(0..4)];
            match self.kept.get_mut(ino).map(|inode| &mut inode.kind) {
                Some(Kind::File { size }) => {
                    let Some(contents) = self.contents.get_mut(&ino) else { continue };
                    *size = contents.lose(self.kept_seq, *size, loss.unwrap_or(each), &mut self.rng);
                }
                _ => drop(self.contents.remove(&ino)),
            }
        }
    }

    // What every request begins with.

    fn up(&self) -> Result<()> {
        if self.stopped { Err(Errno::IO) } else { Ok(()) }
    }

    /// Before each request that changes what is on the disk, or promises that it is there.
    fn up_to_change(&mut self) -> Result<()> {
        match &mut self.stop_after {
            Some(0) => self.stopped = true,
            Some(left) => *left -= 1,
            None => {}
        }
        self.up()
    }

    fn open_since(&self, handle: u64) -> Result<()> {
        self.up()?;
        if handle == self.epoch { Ok(()) } else { Err(Errno::IO) }
    }

    fn fault(&mut self, on: On, ino: Ino) -> Result<()> {
        if self.faults.is_empty() {
            return Ok(());
        }
        let path = self.path(ino);
        let path = path.to_string_lossy();
        let hit =
            self.faults.iter_mut().find(|fault| fault.on == on && fault.times > 0 && path.contains(&fault.path_has));
        let Some(fault) = hit else { return Ok(()) };
        fault.times -= 1;
        self.faulted += 1;
        Err(fault.errno)
    }

    /// A path of an inode, from the mount point on.
    fn path(&self, mut ino: Ino) -> PathBuf {
        let mut parts: Vec<&OsStr> = Vec::new();
        while ino != ROOT {
            let Ok(inode) = self.live.get(ino) else { break };
            let entries = self.live.entries(inode.parent).ok();
            let name = entries.and_then(|entries| entries.iter().find(|(_, other)| **other == ino));
            parts.push(name.map_or(OsStr::new("?"), |(name, _)| name));
            ino = inode.parent;
        }
        Path::new("/").join(parts.iter().rev().collect::<PathBuf>())
    }

    fn change(&mut self, change: Change) -> Result<()> {
        self.live.check(&change)?;
        let seq = self.kept_seq + self.log.len() as u64 + 1;
        let before = self.live.touched(&change);
        self.live.apply(&change);
        for ino in before {
            self.last_change.insert(ino, seq);
        }
        self.log.push_back(change);
        Ok(())
    }

    fn seq(&self) -> u64 {
        self.kept_seq + self.log.len() as u64
    }

    /// Brings metadata to the disk, up to and with change `seq`.
    fn keep(&mut self, seq: u64) {
        while self.kept_seq < seq {
            let Some(change) = self.log.pop_front() else { break };
            let lost_name = match &change {
                Change::Remove { parent, name } => self.kept.lookup(*parent, name).ok(),
                Change::Rename { to, to_name, .. } => self.kept.lookup(*to, to_name).ok(),
                _ => None,
            };
            self.kept.apply(&change);
            self.kept_seq += 1;
            if let Some(ino) = lost_name
                && self.kept.forget(ino)
            {
                self.drop_contents(ino);
            }
        }
    }

    /// Drops contents that no process sees and no cut of the power brings back.
    fn drop_contents(&mut self, ino: Ino) {
        let may_come_back =
            self.kept.get(ino).is_ok() || self.last_change.get(&ino).is_some_and(|&s| s > self.kept_seq);
        if self.live.get(ino).is_err() && !may_come_back {
            self.contents.remove(&ino);
            self.last_change.remove(&ino);
        }
    }

    // Requests.

    pub(crate) fn lookup(&mut self, parent: Ino, name: &OsStr) -> Result<(FileAttr, Generation)> {
        self.up()?;
        let ino = self.live.lookup(parent, name)?;
        self.referenced(ino)
    }

    /// What the kernel is told of an inode. It is another one after a cut: the kernel keeps what it knew of the one before,
    /// for instance that the directory was removed, also where that never reached the disk.
    fn referenced(&mut self, ino: Ino) -> Result<(FileAttr, Generation)> {
        *self.lookups.entry(ino).or_default() += 1;
        Ok((self.stat(ino)?, Generation(self.epoch)))
    }

    pub(crate) fn forget(&mut self, ino: Ino, count: u64) {
        let left = self.lookups.get(&ino).map_or(0, |lookups| lookups.saturating_sub(count));
        if left > 0 {
            self.lookups.insert(ino, left);
            return;
        }
        self.lookups.remove(&ino);
        self.free_if_gone(ino);
    }

    /// Frees the room of a file without a name that nobody has open.
    fn free_if_gone(&mut self, ino: Ino) {
        if self.lookups.contains_key(&ino) || self.live.get(ino).is_err() {
            return;
        }
        let room = self.contents.get(&ino).map_or(0, Contents::room);
        if self.live.forget(ino) {
            self.used = self.used.saturating_sub(room);
            self.drop_contents(ino);
        }
    }

    pub(crate) fn stat(&self, ino: Ino) -> Result<FileAttr> {
        self.up()?;
        let inode = self.live.get(ino)?;
        Ok(FileAttr {
            ino: INodeNo(ino),
            size: inode.size(),
            blocks: self.contents.get(&ino).map_or(0, Contents::room) * BLOCK / 512,
            atime: inode.mtime,
            mtime: inode.mtime,
            ctime: inode.mtime,
            crtime: inode.mtime,
            kind: inode.file_type(),
            perm: inode.mode as u16,
            nlink: if matches!(inode.kind, Kind::Directory(_)) { 2 } else { inode.names },
            uid: inode.uid,
            gid: inode.gid,
            rdev: 0,
            blksize: BLOCK as u32,
            flags: 0,
        })
    }

    pub(crate) fn target(&self, ino: Ino) -> Result<OsString> {
        self.up()?;
        match &self.live.get(ino)?.kind {
            Kind::Symlink(target) => Ok(target.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    pub(crate) fn make(&mut self, parent: Ino, name: &OsStr, inode: Inode) -> Result<(FileAttr, Generation)> {
        self.up_to_change()?;
        let ino = self.next_ino;
        if matches!(inode.kind, Kind::File { .. }) && self.free_blocks() == 0 {
            return Err(Errno::NOSPC);
        }
        self.change(Change::Make { parent, name: name.to_owned(), ino, inode })?;
        self.next_ino += 1;
        self.contents.insert(ino, Contents::default());
        self.referenced(ino)
    }

    pub(crate) fn link(&mut self, ino: Ino, parent: Ino, name: &OsStr) -> Result<(FileAttr, Generation)> {
        self.up_to_change()?;
        self.change(Change::Link { ino, parent, name: name.to_owned() })?;
        self.referenced(ino)
    }

    pub(crate) fn remove(&mut self, parent: Ino, name: &OsStr, directory: bool) -> Result<()> {
        self.up_to_change()?;
        let ino = self.live.lookup(parent, name)?;
        match (&self.live.get(ino)?.kind, directory) {
            (Kind::Directory(_), false) => return Err(Errno::ISDIR),
            (Kind::Directory(_), true) | (_, false) => {}
            (_, true) => return Err(Errno::NOTDIR),
        }
        self.change(Change::Remove { parent, name: name.to_owned() })?;
        self.free_if_gone(ino);
        Ok(())
    }

    pub(crate) fn rename(&mut self, from: (Ino, &OsStr), to: (Ino, &OsStr), keep: bool) -> Result<()> {
        self.up_to_change()?;
        let replaced = self.live.lookup(to.0, to.1).ok();
        if keep && replaced.is_some() {
            return Err(Errno::EXIST);
        }
        let (from_name, to_name): (OsString, OsString) = (from.1.to_owned(), to.1.to_owned());
        self.change(Change::Rename { from: from.0, from_name, to: to.0, to_name })?;
        if let Some(ino) = replaced {
            self.free_if_gone(ino);
        }
        Ok(())
    }

    pub(crate) fn set_attributes(
        &mut self,
        ino: Ino,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<()> {
        self.up_to_change()?;
        let inode = self.live.get(ino)?;
        let (mode, uid, gid) =
            (mode.unwrap_or(inode.mode) & 0o7777, uid.unwrap_or(inode.uid), gid.unwrap_or(inode.gid));
        if (mode, uid, gid) == (inode.mode, inode.uid, inode.gid) {
            return Ok(());
        }
        self.change(Change::Attributes { ino, mode, uid, gid })
    }

    pub(crate) fn set_mtime(&mut self, ino: Ino, mtime: SystemTime) {
        if let Some(inode) = self.live.get_mut(ino) {
            inode.mtime = mtime;
        }
    }

    pub(crate) fn set_size(&mut self, ino: Ino, size: u64) -> Result<()> {
        self.up_to_change()?;
        let old = self.live.get(ino)?.size();
        if size == old {
            return Ok(());
        }
        self.change(Change::Size { ino, size })?;
        let seq = self.seq();
        self.set_mtime(ino, SystemTime::now());
        if size < old {
            let contents = self.contents.entry(ino).or_default();
            self.used = self.used.saturating_sub(contents.cut(size, seq));
        }
        Ok(())
    }

    pub(crate) fn open(&self) -> Result<u64> {
        self.up()?;
        Ok(self.epoch)
    }

    pub(crate) fn read(&mut self, ino: Ino, handle: u64, offset: u64, length: usize) -> Result<Vec<u8>> {
        self.open_since(handle)?;
        self.fault(On::Read, ino)?;
        let size = self.live.get(ino)?.size();
        let length = usize::try_from(size.saturating_sub(offset)).map_or(length, |left| left.min(length));
        let mut bytes = vec![0; length];
        if let Some(contents) = self.contents.get(&ino) {
            contents.read(offset, &mut bytes);
        }
        Ok(bytes)
    }

    pub(crate) fn write(&mut self, ino: Ino, handle: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        self.open_since(handle)?;
        self.up_to_change()?;
        self.fault(On::Write, ino)?;
        let (seq, free) = (self.seq(), self.free_blocks());
        let contents = self.contents.entry(ino).or_default();
        if contents.room_for(offset, bytes.len() as u64) > free {
            return Err(Errno::NOSPC);
        }
        self.used += contents.write(offset, bytes, seq, &mut self.rng);
        let inode = self.live.get_mut(ino).ok_or(Errno::STALE)?;
        inode.mtime = SystemTime::now();
        if let Kind::File { size } = &mut inode.kind {
            *size = (*size).max(offset + bytes.len() as u64);
        }
        Ok(())
    }

    pub(crate) fn allocate(&mut self, ino: Ino, handle: u64, offset: u64, length: u64, grow: bool) -> Result<()> {
        self.open_since(handle)?;
        self.up_to_change()?;
        let (size, free) = (self.live.get(ino)?.size(), self.free_blocks());
        let contents = self.contents.entry(ino).or_default();
        if contents.room_for(offset, length) > free {
            return Err(Errno::NOSPC);
        }
        self.used += contents.reserve(offset, length);
        if grow && offset + length > size { self.set_size(ino, offset + length) } else { Ok(()) }
    }

    pub(crate) fn seek(&self, ino: Ino, handle: u64, offset: u64, hole: bool) -> Result<u64> {
        self.open_since(handle)?;
        let size = self.live.get(ino)?.size();
        let contents = self.contents.get(&ino).ok_or(Errno::INVAL)?;
        contents.seek(offset, size, hole).ok_or(Errno::NXIO)
    }

    pub(crate) fn sync(&mut self, ino: Ino) -> Result<()> {
        self.up_to_change()?;
        if let Err(errno) = self.fault(On::Sync, ino) {
            self.contents.entry(ino).or_default().sync_failed();
            return Err(errno);
        }
        let contents = self.contents.get(&ino).map_or(0, Contents::needs);
        let metadata = self.last_change.get(&ino).copied().unwrap_or(0);
        self.keep(metadata.max(contents));
        let size = self.live.get(ino)?.size();
        if let Some(Kind::File { size: kept }) = self.kept.get_mut(ino).map(|inode| &mut inode.kind) {
            *kept = size;
        }
        if let Some(contents) = self.contents.get_mut(&ino) {
            contents.synced();
        }
        Ok(())
    }

    /// What is in a directory, with `.` and `..`.
    pub(crate) fn list(&self, directory: Ino) -> Result<Vec<(Ino, OsString, FileType)>> {
        self.up()?;
        let parent = self.live.get(directory)?.parent;
        let dots = [(OsStr::new("."), directory), (OsStr::new(".."), parent)];
        let entries = self.live.entries(directory)?.iter().map(|(name, &ino)| (name.as_os_str(), ino));
        let all = dots.into_iter().chain(entries);
        all.map(|(name, ino)| Ok((ino, name.to_owned(), self.live.get(ino)?.file_type()))).collect()
    }

    pub(crate) fn free_blocks(&self) -> u64 {
        // LIMIT: one TiB when there is none.
        self.capacity.unwrap_or((1 << 40) / BLOCK).saturating_sub(self.used)
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.used + self.free_blocks()
    }
}
