//! What Postgres needs of a file system, each over a real mount. Sources are of PostgreSQL 15, under `src/backend`.
//! `docs/testing.md` has the list, and what a volume lacks of POSIX.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, IoSlice, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use super::mount::mount;
use super::*;

const PAGE: usize = 8192;

/// A mounted volume, for one check.
fn mounted(check: impl FnOnce(&Path)) {
    let node = Node::in_memory();
    let volume = node.volume(0, node.empty);
    let at = node.dirs(0).branch.join("data");
    let mount = mount(&volume, &at);
    check(&at);
    mount.unmount().unwrap();
}

fn new_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// `storage/smgr/md.c` `mdcreate`, `utils/init/miscinit.c` `CreateLockFile`: of several who make a file, one does.
#[test]
fn only_one_makes_a_file_exclusively() {
    mounted(|at| {
        for round in 0..20 {
            let path = at.join(round.to_string());
            let made: usize = std::thread::scope(|scope| {
                let all: Vec<_> = (0..4).map(|_| scope.spawn(|| usize::from(new_file(&path).is_ok()))).collect();
                all.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!(made, 1);
            assert_eq!(new_file(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        }
    });
}

/// `storage/file/fd.c` `durable_rename`: whoever opens the name finds the old file or the new one, whole.
#[test]
fn a_rename_replaces_at_once() {
    mounted(|at| {
        let (path, new) = (at.join("pg_control"), at.join("pg_control.tmp"));
        fs::write(&path, [0; PAGE]).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    let bytes = fs::read(&path).unwrap();
                    assert!(bytes.len() == PAGE && bytes.iter().all(|byte| *byte == bytes[0]));
                }
            });
            for byte in 1..100 {
                let mut file = File::create(&new).unwrap();
                file.write_all(&[byte; PAGE]).unwrap();
                file.sync_all().unwrap();
                fs::rename(&new, &path).unwrap();
                File::open(&path).unwrap().sync_all().unwrap();
                File::open(at).unwrap().sync_all().unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert_eq!(fs::read(&path).unwrap(), [99; PAGE]);
    });
}

/// `storage/smgr/md.c` `mdextend`, `mdread`, `mdnblocks`: every process sees at once how long a file is, a read at its end
/// is short, and what was skipped reads as zeroes.
#[test]
fn every_process_sees_how_long_a_file_is() {
    mounted(|at| {
        let path = at.join("16384");
        let (writer, mut reader) = (new_file(&path).unwrap(), File::open(at.join("16384")).unwrap());
        for block in [0, 1, 2, 7] {
            writer.write_all_at(&[block as u8 + 1; PAGE], block * PAGE as u64).unwrap();
            let end = (block + 1) * PAGE as u64;
            assert_eq!(reader.seek(SeekFrom::End(0)).unwrap(), end);
            let told = Command::new("stat").args(["-c", "%s"]).arg(&path).output().unwrap();
            assert_eq!(String::from_utf8(told.stdout).unwrap().trim(), end.to_string());
        }
        let mut bytes = [9; PAGE];
        reader.read_exact_at(&mut bytes, 5 * PAGE as u64).unwrap();
        assert_eq!(bytes, [0; PAGE]);
        assert_eq!(reader.read_at(&mut bytes, 8 * PAGE as u64 - 100).unwrap(), 100);
        assert_eq!(reader.read_at(&mut bytes, 9 * PAGE as u64).unwrap(), 0);
    });
}

/// `storage/smgr/md.c` `mdtruncate`, `mdunlinkfork`: what is cut off does not come back when the file grows.
#[test]
fn what_was_cut_off_does_not_come_back() {
    mounted(|at| {
        let file = new_file(&at.join("16384")).unwrap();
        file.write_all_at(&[1; 8 * PAGE], 0).unwrap();
        file.sync_all().unwrap();
        let other = OpenOptions::new().write(true).open(at.join("16384")).unwrap();
        other.set_len(3 * PAGE as u64).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3 * PAGE as u64);
        other.write_all_at(&[2; PAGE], 5 * PAGE as u64).unwrap();
        let mut bytes = vec![9; 6 * PAGE];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[3 * PAGE..5 * PAGE].iter().all(|byte| *byte == 0));
        other.set_len(0).unwrap();
        assert_eq!(fs::read(at.join("16384")).unwrap(), b"");
    });
}

/// `storage/file/fd.c` `OpenTemporaryFile`, `storage/smgr/md.c`: a file is used on after it was deleted.
#[test]
fn a_deleted_file_is_used_on() {
    mounted(|at| {
        let mut file = new_file(&at.join("pgsql_tmp1.0")).unwrap();
        fs::remove_file(at.join("pgsql_tmp1.0")).unwrap();
        file.write_all(&[3; 5 * PAGE]).unwrap();
        file.set_len(4 * PAGE as u64).unwrap();
        file.sync_all().unwrap();
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [3; 4 * PAGE]);
        new_file(&at.join("pgsql_tmp1.0")).unwrap();
    });
}

/// `storage/file/fd.c` `RemovePgTempFilesInDir`, `rmtree` in `src/common`: entries are deleted while they are listed.
#[test]
fn a_directory_is_emptied_while_it_is_listed() {
    mounted(|at| {
        let dir = at.join("base");
        fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
        for n in 0..1500 {
            fs::write(dir.join(format!("{n}_with_a_name_that_fills_a_reply_sooner")), b"").unwrap();
        }
        for entry in fs::read_dir(&dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        fs::remove_dir(&dir).unwrap();
    });
}

/// `utils/init/miscinit.c` `checkDataDir`, `storage/file/fd.c` `MakePGDirectory`: modes are kept, and shown with the owner.
#[test]
fn modes_and_owners_are_shown() {
    mounted(|at| {
        let dir = at.join("global");
        fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
        new_file(&dir.join("1260")).unwrap();
        let (dir, file) = (fs::metadata(&dir).unwrap(), fs::metadata(dir.join("1260")).unwrap());
        assert_eq!((dir.mode() & 0o7777, file.mode() & 0o7777), (0o700, 0o600));
        assert_eq!((dir.uid(), file.uid()), (rustix::process::geteuid().as_raw(), rustix::process::geteuid().as_raw()));
    });
}

/// `access/transam/xlog.c`, `commands/tablespace.c`: symbolic links lead out of the data directory.
#[test]
fn symbolic_links_lead_out() {
    mounted(|at| {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("segment"), b"wal").unwrap();
        symlink(outside.path(), at.join("pg_wal")).unwrap();
        assert_eq!(fs::read_link(at.join("pg_wal")).unwrap(), outside.path());
        assert_eq!(fs::read(at.join("pg_wal/segment")).unwrap(), b"wal");
        fs::remove_file(at.join("pg_wal")).unwrap();
        assert!(outside.path().join("segment").exists());
    });
}

/// `storage/file/fd.c` `pg_flush_data`, `FilePrefetch`: hints are taken; also `pg_pwritev` of `src/port`.
#[test]
fn hints_and_vectored_writes_are_taken() {
    mounted(|at| {
        let mut file = new_file(&at.join("16384")).unwrap();
        let (one, two) = ([1; PAGE], [2; PAGE]);
        assert_eq!(file.write_vectored(&[IoSlice::new(&one), IoSlice::new(&two)]).unwrap(), 2 * PAGE);
        let length = std::num::NonZeroU64::new(2 * PAGE as u64);
        rustix::fs::fadvise(&file, 0, length, rustix::fs::Advice::WillNeed).unwrap();
        rustix::fs::fadvise(&file, 0, length, rustix::fs::Advice::DontNeed).unwrap();
        file.sync_data().unwrap();
        assert_eq!(fs::read(at.join("16384")).unwrap(), [one, two].concat());
    });
}

/// `storage/smgr/md.c`: a segment of 1 GiB (`RELSEG_SIZE`), written at its end first.
#[test]
fn a_segment_may_be_written_at_its_end_first() {
    mounted(|at| {
        let file = new_file(&at.join("16384")).unwrap();
        let last = (1 << 30) - PAGE as u64;
        file.write_all_at(&[7; PAGE], last).unwrap();
        file.sync_all().unwrap();
        let mut bytes = [1; PAGE];
        file.read_exact_at(&mut bytes, 1 << 29).unwrap();
        assert_eq!(bytes, [0; PAGE]);
        file.read_exact_at(&mut bytes, last).unwrap();
        assert_eq!(bytes, [7; PAGE]);
    });
}

/// `storage/smgr/md.c`, `storage/buffer/bufmgr.c`: many processes write pages of one file, each its own.
#[test]
fn many_processes_write_one_file() {
    mounted(|at| {
        let path = at.join("16384");
        new_file(&path).unwrap().set_len(64 * PAGE as u64).unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4_u64 {
                let path = &path;
                scope.spawn(move || {
                    let file = OpenOptions::new().write(true).open(path).unwrap();
                    for page in (writer..64).step_by(4) {
                        file.write_all_at(&[page as u8 + 1; PAGE], page * PAGE as u64).unwrap();
                        if page % 8 == writer {
                            file.sync_data().unwrap();
                        }
                    }
                });
            }
        });
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.chunks(PAGE).enumerate().all(|(page, bytes)| bytes == [page as u8 + 1; PAGE]));
    });
}
