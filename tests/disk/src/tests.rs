//! The disk keeps what was synced, and nothing else for sure.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};

use super::*;

const PAGE: usize = 4096;

fn disk(seed: u64) -> (tempfile::TempDir, Disk) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::mount(dir.path(), seed).unwrap();
    (dir, disk)
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

#[test]
fn what_was_synced_is_there_and_the_rest_may_be_gone() {
    let (mut old, mut new, mut mixed, mut gone) = (0, 0, 0, 0);
    for seed in 0..60 {
        let (_dir, disk) = disk(seed);
        let file = open(&disk.path().join("file"));
        file.write_all_at(&[1; 4 * PAGE], 0).unwrap();
        file.sync_data().unwrap();
        file.write_all_at(&[2; 4 * PAGE], 0).unwrap();
        fs::write(disk.path().join("other"), [3; PAGE]).unwrap();
        assert_eq!(fs::read(disk.path().join("file")).unwrap(), [2; 4 * PAGE]);
        disk.cut_power();
        assert_eq!(file.read_at(&mut [0; 10], 0).unwrap_err().raw_os_error(), Some(5), "a handle of before");
        let bytes = fs::read(disk.path().join("file")).unwrap();
        assert_eq!(bytes.len(), 4 * PAGE);
        for page in bytes.chunks(PAGE) {
            assert!(page == [1; PAGE] || page == [2; PAGE], "a page is old or new");
        }
        match (bytes.contains(&1), bytes.contains(&2)) {
            (true, false) => old += 1,
            (false, _) => new += 1,
            _ => mixed += 1,
        }
        gone += u32::from(!disk.path().join("other").exists());
    }
    assert!(old > 5 && new > 5 && mixed > 5 && gone > 5, "old {old}, new {new}, mixed {mixed}, gone {gone}");
}

#[test]
fn metadata_reaches_the_disk_in_order() {
    for seed in 0..60 {
        let (_dir, disk) = disk(seed);
        let path = |name: &str| disk.path().join(name);
        for n in 0..10 {
            fs::create_dir(path(&n.to_string())).unwrap();
        }
        File::open(path("4")).unwrap().sync_all().unwrap();
        fs::rename(path("0"), path("last")).unwrap();
        disk.cut_power();
        let there = (0..10).filter(|n| path(&n.to_string()).exists()).count();
        let is_renamed = path("last").exists();
        assert!(there >= 5 && (!is_renamed || there == 9), "{there} {is_renamed}");
        assert!(is_renamed || (0..there).all(|n| path(&n.to_string()).exists()));
    }
}

#[test]
fn a_file_cut_short_shows_nothing_old_after_it_has_grown_again() {
    for seed in 0..60 {
        let (_dir, disk) = disk(seed);
        let file = open(&disk.path().join("file"));
        file.write_all_at(&[1; 4 * PAGE], 0).unwrap();
        file.sync_all().unwrap();
        file.set_len(PAGE as u64 / 2).unwrap();
        file.write_all_at(&[2; PAGE], 3 * PAGE as u64).unwrap();
        disk.cut_power();
        let bytes = fs::read(disk.path().join("file")).unwrap();
        if bytes.len() == 4 * PAGE && bytes[3 * PAGE] == 1 {
            assert!(bytes[PAGE..].iter().all(|&byte| byte == 1), "the cut did not happen");
        } else {
            assert!(bytes[PAGE / 2..].iter().all(|&byte| byte != 1), "the cut happened");
        }
    }
}

#[test]
fn holes_are_kept_and_room_set_aside_is_there() {
    let (_dir, disk) = disk(1);
    let file = open(&disk.path().join("file"));
    file.set_len(20 * PAGE as u64).unwrap();
    file.write_all_at(&[1; 2 * PAGE], 4 * PAGE as u64).unwrap();
    let seek = |from| rustix::fs::seek(&file, from).map(|at| at / PAGE as u64);
    assert_eq!(seek(SeekFrom::Data(0)), Ok(4));
    assert_eq!(seek(SeekFrom::Hole(5 * PAGE as u64)), Ok(6));
    assert_eq!(seek(SeekFrom::Hole(0)), Ok(0));
    assert_eq!(seek(SeekFrom::Data(6 * PAGE as u64)), Err(Errno::NXIO));
    rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 6 * PAGE as u64).unwrap();
    assert_eq!(seek(SeekFrom::Data(0)), Ok(4), "room is no data");
    disk.set_capacity(Some(disk.used()));
    file.write_all_at(&[2; 6 * PAGE], 0).unwrap();
    let full = file.write_all_at(&[2; PAGE], 6 * PAGE as u64).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::StorageFull);
    fs::remove_file(disk.path().join("file")).unwrap();
    drop(file);
    let begun = std::time::Instant::now();
    while disk.used() > 0 {
        assert!(begun.elapsed().as_secs() < 60, "the kernel does not forget the file");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    disk.set_capacity(Some(PAGE as u64));
    fs::write(disk.path().join("small"), [1; PAGE]).unwrap();
}

#[test]
fn a_sync_that_failed_is_not_made_good_by_the_next() {
    let mut lost = 0;
    for seed in 0..30 {
        let (_dir, disk) = disk(seed);
        let file = open(&disk.path().join("file"));
        file.write_all_at(&[1; PAGE], 0).unwrap();
        file.sync_all().unwrap();
        disk.fail(Fault { on: On::Sync, path_has: "file".to_owned(), errno: Errno::IO, times: 1 });
        file.write_all_at(&[2; PAGE], 0).unwrap();
        assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(5));
        file.sync_all().unwrap();
        assert_eq!(disk.mend(), 1);
        disk.cut_power();
        lost += u32::from(fs::read(disk.path().join("file")).unwrap() == [1; PAGE]);
    }
    assert!(lost > 3);
}

#[test]
fn a_large_directory_is_removed_whole() {
    let (_dir, disk) = disk(1);
    let many = disk.path().join("many");
    fs::create_dir(&many).unwrap();
    for n in 0..2000 {
        fs::write(many.join(format!("with a rather long name, so that one reply does not hold them all {n}")), b"")
            .unwrap();
    }
    assert_eq!(fs::read_dir(&many).unwrap().count(), 2000);
    fs::remove_dir_all(&many).unwrap();
    assert!(!many.exists());
}

#[test]
fn a_directory_that_was_removed_and_came_back_can_be_listed_and_used() {
    let (_dir, disk) = disk(1);
    let path = disk.path().join("dir");
    let mut back = 0;
    for _ in 0..50 {
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("file"), b"").unwrap();
        disk.sync_all();
        // The kernel remembers of a directory that is gone that it is.
        let _known = File::open(&path).unwrap();
        fs::remove_dir_all(&path).unwrap();
        disk.cut_power();
        if path.join("file").exists() {
            back += 1;
            assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
            fs::write(path.join("another"), b"").unwrap();
            fs::remove_dir_all(&path).unwrap();
        }
    }
    assert!(back > 5);
}
