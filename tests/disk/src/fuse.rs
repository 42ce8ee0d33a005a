//! The disk as a FUSE file system. The kernel caches nothing of it.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno as FuseErrno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::Result;
use crate::contents::BLOCK;
use crate::state::State;
use crate::tree::{Ino, Inode, Kind, PIPE, SOCKET};

const NO_CACHE: Duration = Duration::ZERO;

const TYPE_BITS: u32 = 0o170_000;

const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

type Listing = Vec<(Ino, OsString, FileType)>;

pub(crate) struct Adapter {
    state: Arc<Mutex<State>>,
    /// What open directories held when they were read from their beginning: a listing goes on while entries go.
    listings: Mutex<HashMap<u64, Listing>>,
    next_listing: AtomicU64,
}

impl Adapter {
    pub(crate) fn new(state: Arc<Mutex<State>>) -> Self {
        Self { state, listings: Mutex::default(), next_listing: AtomicU64::new(0) }
    }
}

fn fuse(errno: Errno) -> FuseErrno {
    FuseErrno::from_i32(errno.raw_os_error())
}

fn done(result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(fuse(errno)),
    }
}

fn entry(made: Result<(FileAttr, Generation)>, reply: ReplyEntry) {
    match made {
        Ok((attr, generation)) => reply.entry(&NO_CACHE, &attr, generation),
        Err(errno) => reply.error(fuse(errno)),
    }
}

fn opened(handle: Result<u64>, reply: ReplyOpen) {
    match handle {
        Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
        Err(errno) => reply.error(fuse(errno)),
    }
}

impl Filesystem for Adapter {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(self.state.lock().lookup(parent.0, name), reply);
    }

    fn forget(&self, _: &Request, ino: INodeNo, nlookup: u64) {
        self.state.lock().forget(ino.0, nlookup);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.state.lock().stat(ino.0) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state.lock();
        let changed = state
            .set_attributes(ino.0, mode, uid, gid)
            .and_then(|()| size.map_or(Ok(()), |size| state.set_size(ino.0, size)));
        match mtime {
            Some(TimeOrNow::SpecificTime(time)) => state.set_mtime(ino.0, time),
            Some(TimeOrNow::Now) => state.set_mtime(ino.0, SystemTime::now()),
            None => {}
        }
        match changed.and_then(|()| state.stat(ino.0)) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.state.lock().target(ino.0) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        let kind = match mode & TYPE_BITS {
            0 | 0o100_000 => Kind::File { size: 0 },
            special @ (SOCKET | PIPE) => Kind::Special(special),
            _ => return reply.error(FuseErrno::EPERM),
        };
        let inode = Inode::new(kind, mode & !umask, request.uid(), request.gid());
        entry(self.state.lock().make(parent.0, name, inode), reply);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let inode = Inode::new(Kind::Directory(Default::default()), mode & !umask, request.uid(), request.gid());
        entry(self.state.lock().make(parent.0, name, inode), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.state.lock().remove(parent.0, name, false), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.state.lock().remove(parent.0, name, true), reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let kind = Kind::Symlink(target.as_os_str().to_owned());
        let inode = Inode::new(kind, 0o777, request.uid(), request.gid());
        entry(self.state.lock().make(parent.0, name, inode), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return reply.error(FuseErrno::EINVAL);
        }
        let keep = flags.contains(RenameFlags::RENAME_NOREPLACE);
        done(self.state.lock().rename((parent.0, name), (newparent.0, newname), keep), reply);
    }

    fn link(&self, _: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        entry(self.state.lock().link(ino.0, newparent.0, newname), reply);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let inode = Inode::new(Kind::File { size: 0 }, mode & !umask, request.uid(), request.gid());
        let mut state = self.state.lock();
        match state.make(parent.0, name, inode).and_then(|made| Ok((made, state.open()?))) {
            Ok(((attr, generation), handle)) => {
                reply.created(&NO_CACHE, &attr, generation, FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        opened(self.state.lock().open(), reply);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.state.lock().read(ino.0, handle.0, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.state.lock().write(ino.0, handle.0, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.state.lock().sync(ino.0), reply);
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.state.lock().sync(ino.0), reply);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let handle = self.next_listing.fetch_add(1, Ordering::Relaxed);
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.listings.lock().remove(&handle.0);
        reply.ok();
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(FuseErrno::EOPNOTSUPP);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut listings = self.listings.lock();
        if offset == 0 {
            match self.state.lock().list(ino.0) {
                Ok(listing) => drop(listings.insert(handle.0, listing)),
                Err(errno) => return reply.error(fuse(errno)),
            }
        }
        let listing = listings.entry(handle.0).or_default();
        for (at, (number, name, kind)) in listing.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*number), at as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let state = self.state.lock();
        let (all, free) = (state.blocks(), state.free_blocks());
        reply.statfs(all, free, free, 1 << 20, 1 << 20, BLOCK as u32, 255, BLOCK as u32);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let flags = FallocateFlags::from_bits_retain(mode as u32);
        if !(flags - FallocateFlags::KEEP_SIZE).is_empty() {
            return reply.error(FuseErrno::EOPNOTSUPP);
        }
        let grow = !flags.contains(FallocateFlags::KEEP_SIZE);
        done(self.state.lock().allocate(ino.0, handle.0, offset, length, grow), reply);
    }

    fn lseek(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let (Ok(offset), SEEK_DATA | SEEK_HOLE) = (u64::try_from(offset), whence) else {
            return reply.error(FuseErrno::EINVAL);
        };
        match self.state.lock().seek(ino.0, handle.0, offset, whence == SEEK_HOLE) {
            Ok(at) => reply.offset(at as i64),
            Err(errno) => reply.error(fuse(errno)),
        }
    }
}
