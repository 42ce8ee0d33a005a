//! The few things storage must know about files of Postgres: `PG_VERSION`, `pg_control`, and the names of WAL segments.
//!
//! The control file's layout is `ControlFileData` (PostgreSQL 15, `src/include/catalog/pg_control.h`). What is read
//! here stands at the same place in 14 to 18, except that the checksum moved by four bytes in 18:
//!
//! ```text
//! offset  size  meaning
//!      0     8  system identifier
//!      8     4  pg_control_version: 1300 for 14 to 16, 1700 for 17, 1800 for 18
//!     16     4  DBState
//!     40     8  redo position of the latest pg_checkpoint
//!     48     4  Postgres timeline of it
//!      F     8  1234567.0, the "float format" mark; found by its value, because what is before it may grow
//!   F+ 8     4  BLCKSZ
//!   F+20     4  bytes of a WAL segment
//!   F+80     4  CRC-32C of everything before it (18: F+84, after a byte for char's signedness)
//! ```

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ebb_types::Lsn;

use crate::error::{Error, LocalContext, Result};
use crate::layer::{BLOCK_BYTES, ImageInfo, Ino, Inode, InodeKind, Manifest, ROOT_INO};

/// The path of the control file in a data directory.
pub const PG_CONTROL: &str = "global/pg_control";

/// Files at the top of a data directory that Postgres writes anew at each start and that mean nothing to the next one:
/// its own lock file (PostgreSQL 15 `miscinit.c`, `CreateDataDirLockFile`) and its command line (`CreateOptsFile` of
/// `postmaster.c`). Postgres syncs the first one half a dozen times on its way up.
pub(crate) const TRANSIENT: [&[u8]; 2] = [LOCK_FILE, b"postmaster.opts"];

/// Names the server that runs on a data directory.
pub(crate) const LOCK_FILE: &[u8] = b"postmaster.pid";

/// Holds a symlink for each tablespace.
pub(crate) const TABLESPACES: &[u8] = b"pg_tblspc";

/// Directories whose files Postgres empties or writes anew whenever it starts (PostgreSQL 15 `basebackup.c`,
/// `excludeDirContents`, says why for each; `pg_replslot` is not among them here: what a branch keeps of it, a fork drops).
const EMPTIED: [&[u8]; 6] =
    [b"pg_dynshmem", b"pg_notify", b"pg_serial", b"pg_snapshots", b"pg_stat_tmp", b"pg_subtrans"];

/// Begins the names of temporary files and of the directory they are in (`PG_TEMP_FILE_PREFIX`), which
/// `RemovePgTempFiles` deletes at start.
const TEMPORARY: &[u8] = b"pgsql_tmp";

/// The relation cache, built anew after every start (PostgreSQL 15 `relcache.c`, `RelationCacheInitFileRemove`).
const CACHE: &[u8] = b"pg_internal.init";

/// The files of an image whose contents Postgres does not want back: it deletes, empties or rewrites them before it
/// reads them. In an image that needs recovery, unlogged tables and indexes are among them: recovery makes them anew from
/// their `_init` forks (PostgreSQL 15 `reinit.c`).
pub(crate) fn dispensable(manifest: &Manifest) -> HashSet<Ino> {
    let inodes: HashMap<Ino, &Inode> = manifest.inodes.iter().map(|inode| (inode.ino, inode)).collect();
    let init_forks: HashSet<(Ino, &[u8])> =
        (manifest.inodes.iter()).filter_map(|inode| Some((inode.parent, inode.name.strip_suffix(b"_init")?))).collect();
    let is_dispensable = |inode: &&Inode| {
        let Some(directory) = inodes.get(&inode.parent) else { return false };
        let is_in_top = directory.parent == ROOT_INO && directory.ino != ROOT_INO;
        (directory.ino == ROOT_INO && TRANSIENT.contains(&inode.name.as_slice()))
            || (is_in_top && EMPTIED.contains(&directory.name.as_slice()))
            || directory.name.starts_with(TEMPORARY)
            || inode.name.starts_with(TEMPORARY)
            || inode.name.starts_with(CACHE)
            || (!manifest.image.clean
                && relation_of(&inode.name).is_some_and(|relation| init_forks.contains(&(inode.parent, relation))))
    };
    let files = manifest.inodes.iter().filter(|inode| matches!(inode.kind, InodeKind::File { .. }));
    files.filter(is_dispensable).map(|inode| inode.ino).collect()
}

/// The number in the name of a relation's file, unless it is an `_init` fork: `16384`, `16384.1`, `16384_fsm`.
fn relation_of(name: &[u8]) -> Option<&[u8]> {
    let digits = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = name.split_at(digits);
    let is_fork = rest.is_empty() || rest.starts_with(b".") || rest.starts_with(b"_fsm") || rest.starts_with(b"_vm");
    (digits > 0 && is_fork).then_some(number)
}

/// The oldest and newest Postgres major version whose files are understood.
pub const PG_MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

const FLOAT_FORMAT: [u8; 8] = 1_234_567.0_f64.to_le_bytes();

/// `DB_SHUTDOWNED` of `DBState`: shut down cleanly as a primary.
const DB_SHUTDOWNED: u32 = 1;

/// Reads `PG_VERSION` and `pg_control` of a data directory.
///
/// # Errors
/// `Local` when a file cannot be read; else as [`image_info`].
pub fn read_image_info(data_dir: &Path) -> Result<ImageInfo> {
    let version = data_dir.join("PG_VERSION");
    let control = data_dir.join(PG_CONTROL);
    image_info(&fs::read(&version).on("read", &version)?, &fs::read(&control).on("read", &control)?)
}

/// Takes apart the bytes of `PG_VERSION` and `pg_control`.
///
/// # Errors
/// `Corrupt` when the control file's checksum or contents make no sense; `Invalid` for a Postgres that is not supported.
pub fn image_info(pg_version: &[u8], pg_control: &[u8]) -> Result<ImageInfo> {
    let pg_major = pg_major(pg_version)?;
    let corrupt = |why: &str| Error::Corrupt { what: "pg_control".to_owned(), why: why.to_owned() };
    let mark = (56..pg_control.len().saturating_sub(88))
        .step_by(8)
        .find(|&at| pg_control[at..at + 8] == FLOAT_FORMAT)
        .ok_or_else(|| corrupt("it has no float format mark (cut short, or from another kind of machine)"))?;
    let crc_at = mark + if pg_major >= 18 { 84 } else { 80 };
    if crc32c::crc32c(&pg_control[..crc_at]) != u32_at(pg_control, crc_at) {
        return Err(corrupt("its checksum does not match its contents"));
    }
    let block_bytes = u32_at(pg_control, mark + 8);
    if u64::from(block_bytes) != BLOCK_BYTES {
        return Err(Error::Invalid(format!(
            "the cluster has pages of {block_bytes} bytes; only the default, {BLOCK_BYTES}, is supported"
        )));
    }
    let wal_segment_bytes = u32_at(pg_control, mark + 20);
    if !is_wal_segment_size(wal_segment_bytes) {
        return Err(corrupt("its WAL segment size is not a power of two from 1 MiB to 1 GiB"));
    }
    Ok(ImageInfo {
        pg_major,
        system_identifier: u64_at(pg_control, 0),
        redo: Lsn(u64_at(pg_control, 40)),
        pg_timeline: u32_at(pg_control, 48),
        wal_segment_bytes,
        clean: u32_at(pg_control, 16) == DB_SHUTDOWNED,
    })
}

/// The major version in the bytes of a `PG_VERSION` file.
///
/// # Errors
/// `Invalid` when it is not a number, or not a supported one.
pub fn pg_major(pg_version: &[u8]) -> Result<u32> {
    let text = String::from_utf8_lossy(pg_version);
    match text.trim().parse() {
        Ok(major) if PG_MAJORS.contains(&major) => Ok(major),
        _ => Err(Error::Invalid(format!(
            "PG_VERSION says {:?}; Postgres {} to {} are supported",
            text.trim(),
            PG_MAJORS.start(),
            PG_MAJORS.end()
        ))),
    }
}

/// Whether Postgres allows this size of a WAL segment (PostgreSQL 15, `IsValidWalSegSize`).
pub(crate) fn is_wal_segment_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes)
}

/// The Postgres timelines that a history file tells of, oldest first, and where each was left for the next
/// (PostgreSQL 15 `timeline.c`, `readTimeLineHistory`).
pub fn switches_in(history: &[u8]) -> Vec<(u32, Lsn)> {
    let switch = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    String::from_utf8_lossy(history).lines().filter_map(switch).collect()
}

/// One WAL segment: which one, on which Postgres timeline, of which size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegment {
    /// The Postgres timeline.
    pub pg_timeline: u32,
    /// The segment's number: its first byte's position divided by the segment size.
    pub number: u64,
    /// Size of a segment in bytes.
    pub segment_bytes: u32,
}

impl WalSegment {
    /// The segment that holds a position. `segment_bytes` comes from a checked [`ImageInfo`], so it is not zero.
    pub fn holding(lsn: Lsn, pg_timeline: u32, segment_bytes: u32) -> Self {
        Self { pg_timeline, number: lsn.0 / u64::from(segment_bytes), segment_bytes }
    }

    /// Reads a segment's file name; `None` for any other file of `pg_wal` (history files, partial segments,
    /// preallocation leftovers).
    pub fn parse(file_name: &str, segment_bytes: u32) -> Option<Self> {
        let hex_digit = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if file_name.len() != 24 || !file_name.bytes().all(hex_digit) {
            return None;
        }
        let part = |at: usize| u32::from_str_radix(&file_name[at..at + 8], 16).ok();
        let (pg_timeline, high, low) = (part(0)?, u64::from(part(8)?), u64::from(part(16)?));
        let per_high = segments_per_high(segment_bytes);
        (low < per_high).then_some(Self { pg_timeline, number: high * per_high + low, segment_bytes })
    }

    /// The segment's file name, as Postgres writes it (PostgreSQL 15, `XLogFileName`).
    pub fn file_name(&self) -> String {
        let per_high = segments_per_high(self.segment_bytes);
        format!("{:08X}{:08X}{:08X}", self.pg_timeline, self.number / per_high, self.number % per_high)
    }

    /// The position of its first byte.
    pub fn start(&self) -> Lsn {
        Lsn(self.number * u64::from(self.segment_bytes))
    }

    /// The position after its last byte.
    pub fn end(&self) -> Lsn {
        Lsn((self.number + 1) * u64::from(self.segment_bytes))
    }

    /// The segment after this one on the same Postgres timeline.
    pub fn next(&self) -> Self {
        Self { number: self.number + 1, ..*self }
    }

    /// The header of a page of the segment that `file` is, if Postgres has begun that page. It begins them in order.
    pub fn page_header(&self, file: &File, page: u64) -> Option<WalPageHeader> {
        let mut bytes = [0; WAL_SHORT_HEADER_BYTES as usize];
        file.read_exact_at(&mut bytes, page * WAL_PAGE_BYTES).ok()?;
        // A page that is left from another segment has that one's address.
        let address = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
        if bytes[1] != WAL_MAGIC_HIGH || address != self.start().0 + page * WAL_PAGE_BYTES {
            return None;
        }
        let flags = u16::from_le_bytes([bytes[2], bytes[3]]);
        let rest = u32::from_le_bytes(bytes[16..20].try_into().expect("four bytes"));
        Some(WalPageHeader { continues: flags & CONTINUES != 0, rest_bytes: u64::from(rest) })
    }

    /// Whether Postgres has begun a page of the segment that `file` is.
    pub fn has_begun_page(&self, file: &File, page: u64) -> bool {
        self.page_header(file, page).is_some()
    }

    /// How many pages were begun in the segment that `file` is, by halving.
    pub fn pages_begun(&self, file: &File) -> u64 {
        let (mut begun, mut not) = (0, u64::from(self.segment_bytes) / WAL_PAGE_BYTES + 1);
        while not - begun > 1 {
            let middle = begun + (not - begun) / 2;
            match self.has_begun_page(file, middle - 1) {
                true => begun = middle,
                false => not = middle,
            }
        }
        begun
    }

    /// Where the last page begins that was begun in the segment that `file` is; where the segment does, if none was.
    pub fn last_page(&self, file: &File) -> Lsn {
        Lsn(self.start().0 + self.pages_begun(file).saturating_sub(1) * WAL_PAGE_BYTES)
    }
}

/// The header of a page of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPageHeader {
    /// Whether the page begins with the rest of a record.
    pub continues: bool,
    /// How much of that record was still to come.
    pub rest_bytes: u64,
}

/// Size of a page of WAL in the default build (`XLOG_BLCKSZ`).
pub const WAL_PAGE_BYTES: u64 = 8192;

/// Size of the header that a page begins with, and of that of a segment's first page
/// (PostgreSQL 15, `src/include/access/xlog_internal.h`: `XLogPageHeaderData`, `XLogLongPageHeaderData`).
pub const WAL_SHORT_HEADER_BYTES: u64 = 24;
/// See [`WAL_SHORT_HEADER_BYTES`].
pub const WAL_LONG_HEADER_BYTES: u64 = 40;

/// `XLP_FIRST_IS_CONTRECORD`: the page begins with the rest of a record.
const CONTINUES: u16 = 1;

/// What the second byte of every supported version's `XLOG_PAGE_MAGIC` is (14: 0xD10D, 18: 0xD118; little-endian), with
/// which a page begins.
const WAL_MAGIC_HIGH: u8 = 0xD1;

/// How many segments share the middle eight digits of a file name.
fn segments_per_high(segment_bytes: u32) -> u64 {
    (1 << 32) / u64::from(segment_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a slice of four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a slice of eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_postgres_makes_anew_is_dispensable() {
        let (id, mut expected) = (ebb_types::LayerId::for_test(1), HashSet::new());
        let image = ImageInfo {
            pg_major: 15,
            system_identifier: 1,
            redo: Lsn(0),
            pg_timeline: 1,
            wal_segment_bytes: 16 << 20,
            clean: false,
        };
        let (name, kind) = (Vec::new(), InodeKind::Directory);
        let root = Inode { ino: ROOT_INO, parent: ROOT_INO, name, mode: 0o700, mtime_ns: 0, kind };
        let mut manifest = Manifest { id, chain: vec![id], next_ino: 100, inodes: vec![root], image };
        let mut add = |parent: Ino, name: &str, file: bool| {
            let kind = if file { InodeKind::File { size: 0, runs: Vec::new() } } else { InodeKind::Directory };
            let ino = manifest.inodes.len() as Ino + 1;
            manifest.inodes.push(Inode { ino, parent, name: name.into(), mode: 0o600, mtime_ns: 0, kind });
            ino
        };
        let base = add(ROOT_INO, "base", false);
        let database = add(base, "5", false);
        let temporary = add(base, "pgsql_tmp", false);
        let notify = add(ROOT_INO, "pg_notify", false);
        let xact = add(ROOT_INO, "pg_xact", false);
        let anew = [
            (ROOT_INO, "postmaster.pid"),
            (temporary, "pgsql_tmp77.0"),
            (notify, "0000"),
            (database, "pg_internal.init"),
            (database, "16385"),
            (database, "16385.1"),
            (database, "16385_fsm"),
        ];
        expected.extend(anew.map(|(parent, name)| add(parent, name, true)));
        for (parent, name) in [
            (ROOT_INO, "PG_VERSION"),
            (xact, "0000"),
            (database, "16384"),
            (database, "16385_init"),
            (database, "163850"),
            (database, "postmaster.pid"),
        ] {
            add(parent, name, true);
        }
        let unlogged = expected.len() - 3;
        assert_eq!(dispensable(&manifest), expected);
        manifest.image.clean = true;
        assert_eq!(dispensable(&manifest).len(), unlogged, "after a clean shutdown unlogged tables are whole");
    }

    #[test]
    fn segment_names_are_those_of_postgres() {
        let check = |lsn: Lsn, segment_bytes: u32, expect: &str| {
            let segment = WalSegment::holding(lsn, 1, segment_bytes);
            assert_eq!(segment.file_name(), expect);
            assert_eq!(WalSegment::parse(expect, segment_bytes), Some(segment));
            assert!(segment.start() <= lsn && lsn < segment.end());
        };
        check(Lsn(0xB5_2978), 4 << 20, "000000010000000000000002");
        check(Lsn(0x16_B374_D848), 16 << 20, "0000000100000016000000B3");
        check(Lsn(0x1_0000_0000), 16 << 20, "000000010000000100000000");
        check(Lsn(0xFFFF_FFFF), 1 << 30, "000000010000000000000003");
    }

    #[test]
    fn other_files_of_pg_wal_are_not_segments() {
        for name in
            ["00000002.history", "archive_status", "xlogtemp.77", "00000001000000000000000g", "é".repeat(12).as_str()]
        {
            assert_eq!(WalSegment::parse(name, 16 << 20), None, "{name:?}");
        }
        assert_eq!(WalSegment::parse("000000010000000000000100", 16 << 20), None, "past the last of 256");
        assert_eq!(WalSegment::parse("000000010000000000000002.partial", 16 << 20), None);
    }

    #[test]
    fn the_last_page_begun_is_found() {
        let segment = WalSegment { pg_timeline: 1, number: 5, segment_bytes: 1 << 20 };
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(segment.last_page(&file), segment.start());
        for page in 0..128 {
            let lsn = Lsn(segment.start().0 + page * WAL_PAGE_BYTES);
            assert!(!segment.has_begun_page(&file, page));
            file.write_all_at(&0xD110_u16.to_le_bytes(), page * WAL_PAGE_BYTES).unwrap();
            assert!(!segment.has_begun_page(&file, page), "it has another address");
            file.write_all_at(&lsn.0.to_le_bytes(), page * WAL_PAGE_BYTES + 8).unwrap();
            assert_eq!(segment.last_page(&file), lsn);
        }
        assert!(!segment.has_begun_page(&file, 128));
    }

    #[test]
    fn history_files_tell_where_timelines_were_left() {
        let history = b"# made by hand\n1\t0/5000148\tno recovery target specified\n\n2\t1/9\tafter LSN 1/9\n";
        assert_eq!(switches_in(history), [(1, Lsn(0x500_0148)), (2, Lsn(0x1_0000_0009))]);
        assert_eq!(switches_in(b"\xff\x00 1"), []);
    }

    #[test]
    fn unsupported_versions_are_named() {
        let error = pg_major(b"9.6\n").unwrap_err().to_string();
        assert_eq!(error, "PG_VERSION says \"9.6\"; Postgres 14 to 18 are supported");
        assert_eq!(pg_major(b"15\n").unwrap(), 15);
    }

    #[test]
    fn garbage_is_corrupt_and_never_a_panic() {
        for length in [0, 1, 55, 64, 150, 296, 8192] {
            let error = image_info(b"15", &vec![0x41; length]).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        }
    }
}
