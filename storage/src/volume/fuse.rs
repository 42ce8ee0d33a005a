//! The volume as a FUSE file system: translates requests of the kernel to the [`Core`], and mounts it.
//!
//! This process is the only one that changes what is mounted, so the kernel may cache all it is told for good: names
//! (also those that do not exist), attributes and pages; and it collects writes itself (writeback cache).
//!
//! Never touch a path inside the mount from this process: the request would wait for a thread of its own.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Errno as FuseErrno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::io::Errno;

use super::Volume;
use super::compact::Compactor;
use super::core::{Attr, AttrKind, Core};
use super::image::now_ns;
use crate::error::{LocalContext, Result};
use crate::layer::{BLOCK_BYTES, Ino, ROOT_INO};

/// LIMIT: for good; the kernel counts in jiffies, and a year is far inside their range.
const TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// LIMIT: the most a request may carry by default (256 pages, `/proc/sys/fs/fuse/max_pages_limit`).
const MAX_WRITE_BYTES: u32 = 1 << 20;

/// LIMIT: requests the kernel sends without a waiting process (write-back, read-ahead). Its default of 12 would hold
/// up a pg_checkpoint that writes back many files.
const MAX_BACKGROUND: u16 = 64;

/// Inode numbers are never used twice, so none needs a generation.
const GENERATION: Generation = Generation(0);

thread_local! {
    /// Where each thread reads into.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How a volume shows itself in the mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Owner shown for every file: the user Postgres runs as.
    pub uid: u32,
    /// Group shown for every file.
    pub gid: u32,
    /// Whether users other than the mounting one may enter (root mounts, Postgres enters).
    pub allow_other: bool,
    /// FUSE worker threads.
    pub threads: usize,
}

/// A live mount; dropping it unmounts (lazily, if it is still in use).
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
    session: Option<BackgroundSession>,
    compactor: Option<Compactor>,
    /// Open as long as it is mounted.
    volume: Arc<Volume>,
}

impl Mount {
    pub(super) fn new(volume: Arc<Volume>, core: Arc<Core>, at: &Path, options: &MountOptions) -> Result<Self> {
        let mut config = fuser::Config::default();
        config.mount_options = vec![
            MountOption::FSName("ebb".to_owned()),
            MountOption::Subtype("ebb".to_owned()),
            MountOption::DefaultPermissions,
            MountOption::NoAtime,
            MountOption::NoSuid,
            MountOption::NoDev,
        ];
        config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
        config.n_threads = Some(options.threads.max(1));
        config.clone_fd = true;
        let adapter = Adapter { core, uid: options.uid, gid: options.gid };
        let compactor = Compactor::start(&volume).on("start a thread for", at)?;
        let session = fuser::Session::new(adapter, at, &config).and_then(fuser::Session::spawn).on("mount", at)?;
        Ok(Self { at: at.to_owned(), session: Some(session), compactor: Some(compactor), volume })
    }

    /// The volume that is mounted.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Unmounts and waits until the kernel has handed over every dirty page.
    ///
    /// # Errors
    /// `Local` when something in it is still open; it is then unmounted lazily, and served until it is closed.
    pub fn unmount(mut self) -> Result<()> {
        drop(self.compactor.take());
        let Some(session) = self.session.take() else { return Ok(()) };
        // The kernel writes a file's pages out before its last `close` returns; so none are left once nothing is open.
        let unmounted = session.umount_and_join();
        if unmounted.is_err() {
            detach(&self.at);
        }
        unmounted.on("unmount", &self.at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(self.compactor.take());
        if let Some(session) = self.session.take() {
            detach(&self.at);
            drop(session);
        }
    }
}

/// Takes the mount out of sight; it ends when its last user does.
fn detach(at: &Path) {
    if let Err(error) = rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH) {
        tracing::warn!(?at, %error, "volume cannot be unmounted");
    }
}

struct Adapter {
    core: Arc<Core>,
    uid: u32,
    gid: u32,
}

impl Adapter {
    fn attr(&self, attr: &Attr) -> FileAttr {
        let mtime = time(attr.mtime_ns);
        FileAttr {
            ino: INodeNo(attr.ino),
            size: attr.size,
            blocks: attr.size.div_ceil(512),
            atime: mtime,
            mtime,
            ctime: mtime,
            crtime: mtime,
            kind: kind(attr.kind),
            perm: attr.mode as u16,
            nlink: attr.links,
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: BLOCK_BYTES as u32,
            flags: 0,
        }
    }

    fn entry(&self, made: Result<Attr, Errno>, reply: ReplyEntry) {
        match made {
            Ok(attr) => reply.entry(&TTL, &self.attr(&attr), GENERATION),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    /// What can be changed about an inode besides its contents and its time.
    fn change(
        &self,
        ino: u64,
        mode: Option<u32>,
        owner: (Option<u32>, Option<u32>),
        size: Option<u64>,
    ) -> Result<(), Errno> {
        if owner.0.is_some_and(|uid| uid != self.uid) || owner.1.is_some_and(|gid| gid != self.gid) {
            return Err(Errno::PERM);
        }
        if let Some(size) = size {
            self.core.truncate(ino, size)?;
        }
        mode.map_or(Ok(()), |mode| self.core.set_mode(ino, mode))
    }
}

fn kind(kind: AttrKind) -> FileType {
    match kind {
        AttrKind::Directory => FileType::Directory,
        AttrKind::File => FileType::RegularFile,
        AttrKind::Symlink => FileType::Symlink,
    }
}

fn time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    if ns >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
}

fn nanoseconds(time: TimeOrNow) -> i64 {
    match time {
        TimeOrNow::Now => now_ns(),
        TimeOrNow::SpecificTime(time) => match time.duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
        },
    }
}

/// The last inode number listed before an offset of a directory.
fn listed_before(offset: u64) -> Ino {
    offset.saturating_sub(1).max(ROOT_INO)
}

fn fuse(errno: Errno) -> FuseErrno {
    FuseErrno::from_i32(errno.raw_os_error())
}

fn done(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(fuse(errno)),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_WRITEBACK_CACHE
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_MAX_PAGES;
        if !config.capabilities().contains(InitFlags::FUSE_WRITEBACK_CACHE) {
            tracing::warn!("this kernel's FUSE has no writeback cache: the volume will be slow");
        }
        // Each by itself: an old kernel lacks some, and the volume works without any.
        for flag in wanted.iter() {
            let _ = config.add_capabilities(flag);
        }
        // A kernel that allows less answers with what it allows, which is then in force.
        if let Err(most) = config.set_max_write(MAX_WRITE_BYTES) {
            let _ = config.set_max_write(most);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.core.lookup(parent.0, name.as_bytes()) {
            Err(Errno::NOENT) => {
                // Number 0: there is none, and the kernel may remember that.
                let none = Attr { ino: 0, kind: AttrKind::File, mode: 0, size: 0, links: 0, mtime_ns: 0 };
                reply.entry(&TTL, &self.attr(&none), GENERATION);
            }
            found => self.entry(found, reply),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, nlookup: u64) {
        self.core.forget(ino.0, nlookup);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.core.getattr(ino.0) {
            Ok(attr) => reply.attr(&TTL, &self.attr(&attr)),
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
        let changed = self
            .change(ino.0, mode, (uid, gid), size)
            .and_then(|()| mtime.map_or(Ok(()), |mtime| self.core.set_mtime(ino.0, nanoseconds(mtime))))
            .and_then(|()| self.core.getattr(ino.0));
        match changed {
            Ok(attr) => reply.attr(&TTL, &self.attr(&attr)),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.core.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(FuseErrno::EPERM);
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        self.entry(self.core.mkdir(parent.0, name.as_bytes(), mode), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.core.unlink(parent.0, name.as_bytes()), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(self.core.rmdir(parent.0, name.as_bytes()), reply);
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        self.entry(self.core.symlink(parent.0, name.as_bytes(), target.as_os_str().as_bytes()), reply);
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
        done(self.core.rename(parent.0, name.as_bytes(), newparent.0, newname.as_bytes(), keep), reply);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(FuseErrno::EPERM);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // With this answer the kernel opens files by itself from now on, and keeps their pages.
        reply.error(FuseErrno::ENOSYS);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size as usize {
                buffer.resize(size as usize, 0);
            }
            match self.core.read(ino.0, offset, &mut buffer[..size as usize]) {
                Ok(length) => reply.data(&buffer[..length]),
                Err(errno) => reply.error(fuse(errno)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.core.write(ino.0, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Nothing is held back here; and with this answer the kernel stops asking.
        reply.error(FuseErrno::ENOSYS);
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.core.sync_file(ino.0), reply);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(FuseErrno::ENOSYS);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Ok(parent) = self.core.parent(ino.0) else { return reply.error(FuseErrno::ENOENT) };
        // An entry's offset is its number plus one: after the two that every directory begins with.
        for (at, number, name) in [(0, ino.0, "."), (1, parent, "..")] {
            if offset <= at && reply.add(INodeNo(number), at + 1, FileType::Directory, name) {
                return reply.ok();
            }
        }
        let listed = self.core.list(ino.0, listed_before(offset), |name, attr| {
            !reply.add(INodeNo(attr.ino), attr.ino + 1, kind(attr.kind), OsStr::from_bytes(name))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let (Ok(own), Ok(parent)) = (self.core.getattr(ino.0), self.core.parent(ino.0)) else {
            return reply.error(FuseErrno::ENOENT);
        };
        // The kernel does not count a reference for these two.
        for (at, number, name) in [(0, ino.0, "."), (1, parent, "..")] {
            let attr = FileAttr { ino: INodeNo(number), ..self.attr(&own) };
            if offset <= at && reply.add(INodeNo(number), at + 1, name, &TTL, &attr, GENERATION) {
                return reply.ok();
            }
        }
        let listed = self.core.list_referenced(ino.0, listed_before(offset), |name, attr| {
            let ino = INodeNo(attr.ino);
            !reply.add(ino, attr.ino + 1, OsStr::from_bytes(name), &TTL, &self.attr(attr), GENERATION)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.core.sync_tree(), reply);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.core.statfs() {
            Ok(fs) => reply.statfs(
                fs.f_blocks,
                fs.f_bfree,
                fs.f_bavail,
                fs.f_files,
                fs.f_ffree,
                fs.f_bsize as u32,
                fs.f_namemax as u32,
                fs.f_frsize as u32,
            ),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, _: i32, reply: ReplyCreate) {
        match self.core.create(parent.0, name.as_bytes(), mode) {
            Ok(attr) => {
                let flags = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&TTL, &self.attr(&attr), GENERATION, FileHandle(0), flags);
            }
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode != 0 {
            return reply.error(FuseErrno::EOPNOTSUPP);
        }
        done(self.core.allocate(ino.0, offset.saturating_add(length)), reply);
    }
}
