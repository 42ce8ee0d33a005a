//! The WAL that goes with an image: captured when a volume is sealed, handed on when one is made.
//!
//! `wal/` of a branch is Postgres' `pg_wal`, a plain directory. A segment that is complete never changes again
//! (`wal_recycle` is off) and is shared by hard links; one that may still be written is copied.
//!
//! **Crash**: Postgres may delete segments while they are captured. So before and right after the moment of the seal,
//! [`hold`] links whatever is there into a directory of the upper; [`capture`] then works from that, at leisure and as
//! often as it takes.
//!
//! **Trust**: the directory is Postgres' own, and whoever takes Postgres over may put anything there. So nothing but plain
//! files is read or kept, no link is followed, and what is shared becomes root's, and read-only, before it is shared.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::image::{next_data, read_up_to};
use super::journal::WalEnd;
use super::upper::{remove_dir, sync_dir};
use crate::error::{Error, LocalContext, Result};
use crate::layer::{BLOCK_BYTES, ImageInfo, is_zero, wal_files_in};
use crate::pg_files::{WAL_LONG_HEADER_BYTES, WAL_PAGE_BYTES, WAL_SHORT_HEADER_BYTES, WalSegment};

/// Links every segment and history file of `wal` into `hold`, completed or not. Only to keep them from vanishing:
/// what is held may still be written to.
pub(super) fn hold(wal: &Path, hold: &Path, image: &ImageInfo) -> Result<()> {
    fs::create_dir_all(hold).on("create", hold)?;
    let first = first_segment(image);
    for entry in fs::read_dir(wal).on("list", wal)? {
        let entry = entry.on("list", wal)?;
        let name = entry.file_name();
        let Some(text) = name.to_str() else { continue };
        let segment = WalSegment::parse(text, image.wal_segment_bytes);
        if segment.is_none_or(|segment| segment < first) && !is_history(text) {
            continue;
        }
        let held = hold.join(&name);
        match fs::hard_link(entry.path(), &held) {
            // Already held, or deleted by Postgres since it was listed.
            Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {}
            linked => linked.on("link", &held)?,
        }
        // Looked at here, where nobody can exchange it any more.
        if fs::symlink_metadata(&held).is_ok_and(|held| !held.is_file()) {
            tracing::warn!(file = ?entry.path(), "what is no file is not kept with the WAL");
            fs::remove_file(&held).on("remove", &held)?;
        }
    }
    Ok(())
}

fn first_segment(image: &ImageInfo) -> WalSegment {
    WalSegment::holding(image.redo, image.pg_timeline, image.wal_segment_bytes)
}

fn is_history(name: &str) -> bool {
    name.len() == 16 && name.ends_with(".history")
}

/// Where the WAL ends now: `None` if there is none. A handful of small reads from what was written last.
///
/// Postgres writes WAL in order, page by page; a page that another follows is not written to again. (After a crash it
/// may lie over pages of a former end, until the new one has gone past it. Then the end found here is that former one.)
/// Where the Postgres timeline has changed since the image, the newest one goes on.
pub(super) fn end(wal: &Path, image: &ImageInfo) -> Result<Option<WalEnd>> {
    let newest = newest_timeline(wal, image)?;
    for (segment, path) in segments_in(wal, &ImageInfo { pg_timeline: newest, ..*image })?.into_iter().rev() {
        let file = match open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.on("open", &path)?,
        };
        let pages = segment.pages_begun(&file);
        if let Some(last) = pages.checked_sub(1) {
            let mut page = vec![0; WAL_PAGE_BYTES as usize];
            read_up_to(&file, &mut page, last * WAL_PAGE_BYTES).on("read", &path)?;
            return Ok(Some(WalEnd { segment: segment.number, pages: last as u32, page }));
        }
    }
    Ok(None)
}

/// Fills `into`, anew, with the WAL that starting on the image needs: from its redo point to `end`, or as far as is
/// held if that is not known.
///
/// # Errors
/// `Corrupt` when there is a gap.
pub(super) fn capture(hold: &Path, into: &Path, image: &ImageInfo, end: Option<&WalEnd>) -> Result<()> {
    remove_dir(into)?;
    fs::create_dir_all(into).on("create", into)?;
    let mut held = segments_in(hold, image)?;
    held.retain(|segment, path| *segment >= first_segment(image) && has_begun(path, segment));
    if let Some(end) = end {
        held.retain(|segment, _| segment.number <= end.segment);
    }
    let mut expected = first_segment(image);
    for (segment, path) in &held {
        if *segment != expected {
            break;
        }
        let copy = into.join(segment.file_name());
        match end.filter(|end| end.segment == segment.number) {
            Some(end) => copy_until(path, &copy, image, end)?,
            None => give(path, &copy, image, held.get(&segment.next()), segment)?,
        }
        expected = segment.next();
    }
    let last = held.keys().next_back();
    if expected == first_segment(image) || last.is_some_and(|last| *last >= expected) {
        let why = format!("segment {} is missing; the image needs WAL from {}", expected.file_name(), image.redo);
        return Err(Error::Corrupt { what: format!("the WAL in {hold:?}"), why });
    }
    give_history(hold, into)?;
    sync_dir(into)
}

/// Fills `wal`, anew, with the WAL of a layer.
pub(super) fn seed(layer_wal: &Path, wal: &Path, image: &ImageInfo) -> Result<()> {
    remove_dir(wal)?;
    fs::create_dir_all(wal).on("create", wal)?;
    let segments = segments_in(layer_wal, image)?;
    for (segment, path) in &segments {
        give(path, &wal.join(segment.file_name()), image, segments.get(&segment.next()), segment)?;
    }
    give_history(layer_wal, wal)?;
    sync_dir(wal)
}

/// Whether Postgres wrote WAL since the layer was sealed.
pub(super) fn changed_since(wal: &Path, layer_wal: &Path, image: &ImageInfo) -> Result<bool> {
    let sealed = segments_in(layer_wal, image)?;
    for (segment, path) in segments_in(wal, image)? {
        if segment < first_segment(image) || !has_begun(&path, &segment) {
            continue;
        }
        match sealed.get(&segment) {
            Some(other) if is_same(&path, other)? => {}
            _ => return Ok(true),
        }
    }
    Ok(false)
}

/// The newest Postgres timeline that has a segment in a directory, or the image's.
fn newest_timeline(dir: &Path, image: &ImageInfo) -> Result<u32> {
    let mut newest = image.pg_timeline;
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(newest),
        entries => entries.on("list", dir)?,
    };
    for entry in entries {
        let name = entry.on("list", dir)?.file_name();
        let segment = name.to_str().and_then(|name| WalSegment::parse(name, image.wal_segment_bytes));
        newest = newest.max(segment.map_or(0, |segment| segment.pg_timeline));
    }
    Ok(newest)
}

/// The segments in a directory, on the image's Postgres timeline, in order. An absent directory has none.
fn segments_in(dir: &Path, image: &ImageInfo) -> Result<BTreeMap<WalSegment, PathBuf>> {
    let mut segments = BTreeMap::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(segments),
        entries => entries.on("list", dir)?,
    };
    for entry in entries {
        let entry = entry.on("list", dir)?;
        let segment = entry.file_name().to_str().and_then(|name| WalSegment::parse(name, image.wal_segment_bytes));
        if let Some(segment) = segment.filter(|segment| segment.pg_timeline == image.pg_timeline) {
            segments.insert(segment, entry.path());
        }
    }
    Ok(segments)
}

/// Opens a file, and nothing else: no link, and nothing that one would have to wait for.
fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "this is no file")),
    }
}

/// What marks a segment that is shared: nobody may write it.
pub(super) const SHARED_MODE: u32 = 0o444;

/// Makes sure that no branch's Postgres can write what is not its alone. The directories it is in are closed to others, so
/// that all may read it.
fn share(file: &File) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(file, Some(0), Some(0))?;
    }
    file.set_permissions(Permissions::from_mode(SHARED_MODE))?;
    file.sync_data()
}

/// Links a segment that is complete, or copies one that may still be written.
fn give(from: &Path, to: &Path, image: &ImageInfo, next: Option<&PathBuf>, segment: &WalSegment) -> Result<()> {
    if next.is_some_and(|next| is_behind(next, &segment.next())) {
        match rustix::fs::link(from, to) {
            Ok(()) => return open(to).and_then(|file| share(&file)).on("sync", to),
            Err(Errno::XDEV | Errno::MLINK | Errno::PERM) => {}
            Err(errno) => return Err(errno).on("link", to),
        }
    }
    let size = u64::from(image.wal_segment_bytes);
    copy_sparse(from, to, size, size)?.sync_all().on("sync", to)
}

/// Copies a segment as it was when WAL ended there.
fn copy_until(from: &Path, to: &Path, image: &ImageInfo, end: &WalEnd) -> Result<()> {
    let until = u64::from(end.pages) * WAL_PAGE_BYTES;
    let copy = copy_sparse(from, to, u64::from(image.wal_segment_bytes), until)?;
    copy.write_all_at(&end.page, until).and_then(|()| copy.sync_all()).on("write", to)
}

fn give_history(from: &Path, to: &Path) -> Result<()> {
    for (name, path) in wal_files_in(from)?.into_iter().filter(|(name, _)| is_history(name)) {
        let copy = to.join(name);
        let mut source = open(&path).on("open", &path)?;
        let mut file = File::create(&copy).on("create", &copy)?;
        io::copy(&mut source, &mut file).and_then(|_| file.sync_all()).on("copy", &path)?;
    }
    Ok(())
}

/// Copies what is not zeroes below `until`, as it is at this moment, into a file of `size` bytes.
///
/// Postgres may be appending. What it wrote before is copied whole; the page it is writing may be copied half, as a
/// power cut might leave it, and recovery ends before it.
fn copy_sparse(from: &Path, to: &Path, size: u64, until: u64) -> Result<File> {
    let source = open(from).on("open", from)?;
    let copy = File::create(to).on("create", to)?;
    copy.set_len(size).on("write", to)?;
    let mut page = vec![0; BLOCK_BYTES as usize];
    let length = source.metadata().on("read", from)?.len().min(until);
    let mut at = 0;
    while let Some((start, end)) = next_data(&source, at, length).on("read", from)? {
        at = start - start % BLOCK_BYTES;
        while at < end {
            let wanted = (length - at).min(BLOCK_BYTES) as usize;
            page[wanted..].fill(0);
            read_up_to(&source, &mut page[..wanted], at).on("read", from)?;
            if !is_zero(&page) {
                copy.write_all_at(&page[..wanted], at).on("write", to)?;
            }
            at += BLOCK_BYTES;
        }
    }
    Ok(copy)
}

fn has_begun(path: &Path, segment: &WalSegment) -> bool {
    open(path).is_ok_and(|file| segment.has_begun_page(&file, 0))
}

/// Whether the WAL has come so far into this segment that the one before it will never be written again, not even by
/// a recovery that finds the WAL to end here.
///
/// A record that crosses the boundary must be there whole: recovery throws away a record that is not, and goes on
/// writing where it began. It is whole if a page after the one it ends in was begun.
fn is_behind(path: &Path, segment: &WalSegment) -> bool {
    let Ok(file) = open(path) else { return false };
    let Some(header) = segment.page_header(&file, 0) else { return false };
    let rest = if header.continues { header.rest_bytes } else { 0 };
    let first = WAL_PAGE_BYTES - WAL_LONG_HEADER_BYTES;
    let more = rest.saturating_sub(first).div_ceil(WAL_PAGE_BYTES - WAL_SHORT_HEADER_BYTES);
    segment.has_begun_page(&file, more + 1)
}

/// Whether two segments are the same file, or the same bytes with zeroes for what one lacks.
fn is_same(a: &Path, b: &Path) -> Result<bool> {
    let open = |path: &Path| {
        let file = open(path).on("open", path)?;
        let meta = file.metadata().on("read", path)?;
        Ok((file, meta))
    };
    let ((a_file, a_meta), (b_file, b_meta)) = (open(a)?, open(b)?);
    if (a_meta.dev(), a_meta.ino()) == (b_meta.dev(), b_meta.ino()) {
        return Ok(true);
    }
    let (mut left, mut right) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    for at in (0..a_meta.len().max(b_meta.len())).step_by(COMPARE_BYTES) {
        left.fill(0);
        right.fill(0);
        read_up_to(&a_file, &mut left, at).on("read", a)?;
        read_up_to(&b_file, &mut right, at).on("read", b)?;
        if left != right {
            return Ok(false);
        }
    }
    Ok(true)
}

/// LIMIT: compared at once; segments are at least this large.
const COMPARE_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use ebb_types::Lsn;

    use super::*;

    const SEGMENT: u32 = 1 << 20;

    fn image(redo: u64) -> ImageInfo {
        ImageInfo {
            pg_major: 15,
            system_identifier: 7,
            redo: Lsn(redo),
            pg_timeline: 1,
            wal_segment_bytes: SEGMENT,
            clean: false,
        }
    }

    fn segment(number: u64) -> WalSegment {
        WalSegment { pg_timeline: 1, number, segment_bytes: SEGMENT }
    }

    /// Writes a segment with this many pages begun, whose first page begins with the rest of a record.
    fn write(dir: &Path, number: u64, pages: u64, rest: u32) {
        let file = File::create(dir.join(segment(number).file_name())).unwrap();
        file.set_len(u64::from(SEGMENT)).unwrap();
        for page in 0..pages {
            let mut header = [0x77; 100];
            header[..2].copy_from_slice(&0xD110_u16.to_le_bytes());
            let continues = page == 0 && rest > 0;
            header[2..4].copy_from_slice(&u16::from(continues).to_le_bytes());
            let address = number * u64::from(SEGMENT) + page * WAL_PAGE_BYTES;
            header[8..16].copy_from_slice(&address.to_le_bytes());
            header[16..20].copy_from_slice(&if continues { rest } else { 0 }.to_le_bytes());
            file.write_all_at(&header, page * WAL_PAGE_BYTES).unwrap();
        }
    }

    fn links(dir: &Path, number: u64) -> u64 {
        fs::metadata(dir.join(segment(number).file_name())).unwrap().nlink()
    }

    struct Dirs {
        dir: tempfile::TempDir,
    }

    impl Dirs {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("wal")).unwrap();
            Self { dir }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// Holds and captures; answers the names captured.
        fn capture(&self, image: &ImageInfo) -> Result<Vec<String>> {
            hold(&self.at("wal"), &self.at("hold"), image)?;
            capture(&self.at("hold"), &self.at("layer"), image, None)?;
            Ok(wal_files_in(&self.at("layer"))?.into_iter().map(|(name, _)| name).collect())
        }
    }

    #[test]
    fn complete_segments_are_shared_and_the_rest_is_copied() {
        let dirs = Dirs::new();
        let wal = dirs.at("wal");
        write(&wal, 4, 128, 0);
        write(&wal, 5, 128, 300);
        write(&wal, 6, 9, 20_000);
        // Made in advance, as Postgres does; and one that was used before under another name.
        write(&wal, 7, 0, 0);
        fs::copy(wal.join(segment(4).file_name()), wal.join(segment(8).file_name())).unwrap();
        fs::write(wal.join("00000002.history"), b"1\t0/0\tno reason").unwrap();
        fs::create_dir(wal.join("archive_status")).unwrap();
        let captured = dirs.capture(&image(5 * u64::from(SEGMENT) + 4000)).unwrap();
        assert_eq!(captured, [segment(5).file_name(), segment(6).file_name(), "00000002.history".to_owned()]);
        assert_eq!((links(&wal, 5), links(&dirs.at("layer"), 6)), (3, 1));
        // The copy does not change with its source.
        write(&wal, 6, 50, 20_000);
        let page = File::open(dirs.at("layer").join(segment(6).file_name())).unwrap();
        assert!(segment(6).page_header(&page, 8).is_some() && segment(6).page_header(&page, 9).is_none());
        // What Postgres deletes meanwhile is still there.
        fs::remove_file(wal.join(segment(5).file_name())).unwrap();
        capture(&dirs.at("hold"), &dirs.at("layer"), &image(5 * u64::from(SEGMENT)), None).unwrap();
    }

    #[test]
    fn what_branches_share_nobody_can_write() {
        let dirs = Dirs::new();
        let wal = dirs.at("wal");
        write(&wal, 5, 128, 0);
        write(&wal, 6, 9, 0);
        dirs.capture(&image(5 * u64::from(SEGMENT) + 4000)).unwrap();
        let mode = |dir: &Path, number| {
            fs::metadata(dir.join(segment(number).file_name())).unwrap().permissions().mode() & 0o777
        };
        assert_eq!((mode(&wal, 5), links(&wal, 5)), (SHARED_MODE, 3));
        assert_eq!(mode(&wal, 6) & 0o200, 0o200, "what is written to is not shared");
        seed(&dirs.at("layer"), &dirs.at("other"), &image(5 * u64::from(SEGMENT) + 4000)).unwrap();
        assert_eq!((mode(&dirs.at("other"), 5), links(&wal, 5)), (SHARED_MODE, 4));
        assert_eq!(links(&dirs.at("other"), 6), 1);
    }

    #[test]
    fn links_and_devices_among_wal_are_not_kept_and_not_waited_for() {
        let dirs = Dirs::new();
        let wal = dirs.at("wal");
        write(&wal, 5, 2, 0);
        let secret = dirs.at("secret");
        fs::write(&secret, "of root").unwrap();
        std::os::unix::fs::symlink(&secret, wal.join("00000002.history")).unwrap();
        std::os::unix::fs::symlink(wal.join(segment(5).file_name()), wal.join(segment(6).file_name())).unwrap();
        for name in ["00000003.history".to_owned(), segment(7).file_name()] {
            let fifo = rustix::fs::FileType::Fifo;
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, wal.join(name), fifo, mode, 0).unwrap();
        }
        let image = image(5 * u64::from(SEGMENT) + 4000);
        assert_eq!(dirs.capture(&image).unwrap(), [segment(5).file_name()]);
        assert!(changed_since(&wal, &dirs.at("layer"), &image).is_ok());
        end(&wal, &image).expect_err("a link is no segment");
    }

    #[test]
    fn a_segment_is_shared_only_once_the_record_across_its_end_is_whole() {
        let check = |pages: u64, rest: u32, expect: bool| {
            let dirs = Dirs::new();
            write(&dirs.at("wal"), 3, pages, rest);
            let path = dirs.at("wal").join(segment(3).file_name());
            assert_eq!(is_behind(&path, &segment(3)), expect, "{pages} pages, {rest} bytes to come");
        };
        check(0, 0, false);
        check(1, 0, false);
        check(2, 0, true);
        check(2, 8152, true);
        check(2, 8153, false);
        check(3, 8153, true);
        check(3, 8152 + 8168, true);
        check(3, 8152 + 8169, false);
        check(128, 2 << 20, false);
    }

    #[test]
    fn what_comes_after_the_end_is_not_captured() {
        let dirs = Dirs::new();
        let (wal, image) = (dirs.at("wal"), image(4 * u64::from(SEGMENT) + 40));
        assert_eq!(end(&wal, &image).unwrap(), None);
        for pages in [1, 2, 5, 127, 128] {
            write(&wal, 4, 128, 0);
            write(&wal, 5, pages, 0);
            write(&wal, 6, 0, 0);
            let found = end(&wal, &image).unwrap().unwrap();
            assert_eq!((found.segment, u64::from(found.pages)), (5, pages - 1));
            hold(&wal, &dirs.at("hold"), &image).unwrap();
            capture(&dirs.at("hold"), &dirs.at("then"), &image, Some(&found)).unwrap();
            // Postgres goes on: in the same page, the same segment, the next one.
            let file = File::options().write(true).open(wal.join(segment(5).file_name())).unwrap();
            file.write_all_at(&[1; 50], (pages - 1) * WAL_PAGE_BYTES + 4000).unwrap();
            write(&wal, 5, 128, 0);
            write(&wal, 6, 3, 0);
            hold(&wal, &dirs.at("hold"), &image).unwrap();
            capture(&dirs.at("hold"), &dirs.at("later"), &image, Some(&found)).unwrap();
            let read = |name: &str, number| fs::read(dirs.at(name).join(segment(number).file_name())).unwrap();
            assert_eq!(wal_files_in(&dirs.at("later")).unwrap().len(), 2);
            assert!((4..=5).all(|number| read("then", number) == read("later", number)), "{pages} pages");
            assert_eq!(end(&dirs.at("later"), &image).unwrap().unwrap(), found);
            for name in ["wal", "hold"] {
                remove_dir(&dirs.at(name)).unwrap();
                fs::create_dir(dirs.at(name)).unwrap();
            }
        }
    }

    #[test]
    fn a_gap_is_an_error() {
        let dirs = Dirs::new();
        for number in [4, 6] {
            write(&dirs.at("wal"), number, 128, 0);
        }
        let redo = |number: u64| image(number * u64::from(SEGMENT) + 40);
        assert!(dirs.capture(&redo(4)).unwrap_err().to_string().contains(&segment(5).file_name()));
        assert!(dirs.capture(&redo(5)).is_err());
        assert!(dirs.capture(&redo(6)).is_ok());
        assert!(dirs.capture(&redo(7)).is_err());
    }

    #[test]
    fn a_branch_gets_the_wal_of_its_layer_and_notices_when_it_goes_on() {
        let dirs = Dirs::new();
        let image = image(4 * u64::from(SEGMENT) + 40);
        write(&dirs.at("wal"), 4, 128, 0);
        write(&dirs.at("wal"), 5, 10, 0);
        dirs.capture(&image).unwrap();
        let (layer, branch) = (dirs.at("layer"), dirs.at("branch"));
        seed(&layer, &branch, &image).unwrap();
        assert!(!changed_since(&branch, &layer, &image).unwrap());
        assert!(!changed_since(&dirs.at("wal"), &layer, &image).unwrap());
        assert_eq!(links(&branch, 5), 1, "it will be written to");
        fs::remove_file(branch.join(segment(4).file_name())).unwrap();
        write(&branch, 6, 0, 0);
        assert!(!changed_since(&branch, &layer, &image).unwrap(), "nothing new was written");
        write(&branch, 5, 11, 0);
        assert!(changed_since(&branch, &layer, &image).unwrap());
        seed(&layer, &branch, &image).unwrap();
        write(&branch, 6, 1, 0);
        assert!(changed_since(&branch, &layer, &image).unwrap());
    }
}
