//! Single behaviours of the core.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use rustix::io::Errno;

#[test]
fn an_open_file_outlives_its_name_and_its_data_goes_with_the_last_reference() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let ino = volume.core.create(ROOT_INO, b"temporary", 0o600).unwrap().ino;
    volume.core.write(ino, 0, &[7; 8192]).unwrap();
    volume.core.unlink(ROOT_INO, b"temporary").unwrap();
    assert_eq!(volume.core.lookup(ROOT_INO, b"temporary").unwrap_err(), Errno::NOENT);
    assert_eq!(volume.core.getattr(ino).unwrap().links, 0);
    volume.core.write(ino, 8192, &[8; 100]).unwrap();
    assert_eq!(read_all(&volume, ino)[8191..8193], [7, 8]);
    let data = node.dirs(0).branch.join("uppers/0/data");
    assert_eq!(names_in(&data), [ino.to_string()]);
    volume.core.forget(ino, 1);
    assert_eq!(volume.core.getattr(ino).unwrap_err(), Errno::NOENT);
    assert!(names_in(&data).is_empty());
}

#[test]
fn data_that_was_promised_stays_until_its_deletion_is_on_disk() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let data = node.dirs(0).branch.join("uppers/0/data");
    let old = create(&volume, "old");
    volume.core.write(old, 0, &[1; 8192]).unwrap();
    volume.core.sync_file(old).unwrap();
    let new = create(&volume, "new");
    volume.core.write(new, 0, &[2; 8192]).unwrap();
    volume.core.sync_file(new).unwrap();
    volume.core.rename(ROOT_INO, b"new", ROOT_INO, b"old", false).unwrap();
    assert_eq!(names_in(&data).len(), 2, "a power cut now may bring the old file back");
    volume.core.sync_tree().unwrap();
    assert_eq!(names_in(&data), [new.to_string()]);
}

#[test]
fn data_found_at_opening_counts_as_promised() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let ino = create(&volume, "old");
    volume.core.write(ino, 0, &[1; 8192]).unwrap();
    drop(volume);
    let volume = Volume::open(&node.dirs(0)).unwrap();
    volume.core.unlink(ROOT_INO, b"old").unwrap();
    let data = node.dirs(0).branch.join("uppers/0/data");
    assert_eq!(names_in(&data), [ino.to_string()]);
    volume.core.sync_tree().unwrap();
    assert!(names_in(&data).is_empty());
}

#[test]
fn renaming_can_be_told_not_to_replace() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    create(&volume, "a");
    create(&volume, "b");
    assert_eq!(volume.core.rename(ROOT_INO, b"a", ROOT_INO, b"b", true).unwrap_err(), Errno::EXIST);
    volume.core.rename(ROOT_INO, b"a", ROOT_INO, b"c", true).unwrap();
}

#[test]
fn listing_goes_on_while_entries_are_deleted() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    for n in 0..100 {
        create(&volume, &format!("{n}"));
    }
    let (mut seen, mut after) = (0, ROOT_INO);
    loop {
        let mut names = Vec::new();
        let show = |name: &[u8], attr: &super::super::core::Attr| {
            names.push((name.to_vec(), attr.ino));
            names.len() < 7
        };
        volume.core.list(ROOT_INO, after, show).unwrap();
        let Some((_, last)) = names.last() else { break };
        after = *last;
        seen += names.len();
        names.iter().for_each(|(name, _)| volume.core.unlink(ROOT_INO, name).unwrap());
    }
    assert_eq!(seen, 100);
}

#[test]
fn impossible_requests_are_refused_with_the_usual_errors() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let core = &volume.core;
    let file = create(&volume, "file");
    let dir = core.mkdir(ROOT_INO, b"dir", 0o700).unwrap().ino;
    core.create(dir, b"inside", 0o600).unwrap();
    assert_eq!(core.create(file, b"x", 0o600).unwrap_err(), Errno::NOTDIR);
    assert_eq!(core.create(999, b"x", 0o600).unwrap_err(), Errno::NOENT);
    assert_eq!(core.create(ROOT_INO, b"file", 0o600).unwrap_err(), Errno::EXIST);
    assert_eq!(core.create(ROOT_INO, &[b'x'; 256], 0o600).unwrap_err(), Errno::NAMETOOLONG);
    assert_eq!(core.lookup(ROOT_INO, &[b'x'; 256]).unwrap_err(), Errno::NAMETOOLONG);
    assert_eq!(core.lookup(ROOT_INO, &[b'x'; 255]).unwrap_err(), Errno::NOENT);
    assert_eq!(core.unlink(ROOT_INO, b"dir").unwrap_err(), Errno::ISDIR);
    assert_eq!(core.rmdir(ROOT_INO, b"file").unwrap_err(), Errno::NOTDIR);
    assert_eq!(core.rmdir(ROOT_INO, b"dir").unwrap_err(), Errno::NOTEMPTY);
    assert_eq!(core.rename(ROOT_INO, b"dir", dir, b"self", false).unwrap_err(), Errno::INVAL);
    assert_eq!(core.rename(ROOT_INO, b"none", ROOT_INO, b"x", false).unwrap_err(), Errno::NOENT);
    assert_eq!(core.readlink(file).unwrap_err(), Errno::INVAL);
    assert_eq!(core.write(file, u64::MAX - 5, b"far too far").unwrap_err(), Errno::FBIG);
    assert_eq!(core.truncate(file, u64::MAX).unwrap_err(), Errno::FBIG);
}

#[test]
fn a_volume_is_open_once_and_made_once() {
    let node = Node::new();
    let dirs = node.dirs(0);
    assert!(!Volume::exists(&dirs));
    let volume = node.volume(0, node.empty);
    assert!(Volume::exists(&dirs));
    assert!(Volume::create(&dirs, node.empty).is_err());
    assert!(Volume::open(&dirs).is_err(), "it is open");
    assert!(Volume::remove(&dirs).is_err(), "it is open");
    drop(volume);
    Volume::remove(&dirs).unwrap();
    Volume::remove(&dirs).unwrap();
    assert!(!Volume::exists(&dirs));
    Volume::create(&dirs, node.empty).unwrap();
    let missing = Volume::create(&node.dirs(1), LayerId::for_test(1)).unwrap_err();
    assert!(matches!(missing, crate::Error::NoSuchLayer(_)));
}

#[test]
fn an_upper_holds_only_what_was_written() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let ino = create(&volume, "table");
    volume.core.write(ino, 0, &vec![1; 64 * 8192]).unwrap();
    volume.seal(LayerId::generate()).unwrap();
    volume.core.write(ino, 40 * 8192 + 5, &[2; 10]).unwrap();
    let layer = volume.seal(LayerId::generate()).unwrap().layer;
    let file = node.layers().join(layer.to_string()).join("data").join(ino.to_string());
    let meta = std::fs::metadata(file).unwrap();
    assert_eq!((meta.len(), meta.blocks() * 512), (64 * 8192, 8192));
    let manifest = super::super::seal::read_manifest(&node.layers(), layer).unwrap();
    assert_eq!(manifest.chain.len(), 2, "the empty layer has no page any more");
}

#[test]
fn roles_go_with_the_image() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    std::fs::write(node.dirs(0).branch.join("roles.json"), "{}").unwrap();
    create(&volume, "x");
    let layer = volume.seal(LayerId::generate()).unwrap().layer;
    assert_eq!(std::fs::read(node.layers().join(layer.to_string()).join("roles.json")).unwrap(), b"{}");
    node.volume(1, layer);
    assert_eq!(std::fs::read(node.dirs(1).branch.join("roles.json")).unwrap(), b"{}");
}

/// One thread fills files page by page, in order, each round with the next number; every image that is sealed
/// meanwhile must be a moment of that history.
#[test]
fn seals_between_writes_are_moments_of_history() {
    const FILES: usize = 3;
    const PAGES: u64 = 40;
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let inos: Vec<_> = (0..FILES).map(|n| create(&volume, &format!("{n}"))).collect();
    let stop = AtomicBool::new(false);
    let mut layers = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1.. {
                for page in 0..PAGES {
                    for &ino in &inos {
                        volume.core.write(ino, page * 8192, &[round; 8192]).unwrap();
                    }
                }
                volume.core.sync_file(inos[0]).unwrap();
                if stop.load(Ordering::Relaxed) || round == u8::MAX {
                    break;
                }
            }
        });
        while layers.len() < 8 {
            layers.push(volume.seal(LayerId::generate()).unwrap().layer);
        }
        stop.store(true, Ordering::Relaxed);
    });
    for (n, layer) in layers.iter().enumerate() {
        let image = node.volume(n + 1, *layer);
        let files: Vec<_> = (0..FILES).map(|n| read_all(&image, find(&image, &format!("{n}")))).collect();
        // In the order they were written; what was not written yet is of the round before.
        let mut history = Vec::new();
        for page in 0..PAGES as usize {
            for file in &files {
                let bytes = file.get(page * 8192..(page + 1) * 8192).unwrap_or(&[0; 8192]);
                assert!(bytes.iter().all(|&byte| byte == bytes[0]), "a page is torn");
                history.push(bytes[0]);
            }
        }
        let (first, last) = (history[0], *history.last().unwrap());
        assert!(history.is_sorted_by(|a, b| a >= b) && first - last <= 1, "layer {n}: {history:?}");
    }
}

/// A file system of four MiB, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("ebb-test", dir.path(), "tmpfs", flags, Some(c"size=4m")).unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_refuses_what_has_no_room_and_keeps_the_rest() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not checked: only root can mount a small disk");
        return;
    }
    let disk = SmallDisk::mount();
    let node = Node::in_dir(tempfile::tempdir_in(disk.0.path()).unwrap());
    let volume = node.volume(0, node.empty);
    let big = create(&volume, "big");
    let mut expected: Vec<u8> = Vec::new();
    let full = loop {
        let block = [expected.len() as u8 | 1; 5000];
        match volume.core.write(big, expected.len() as u64, &block) {
            Ok(()) => expected.extend(block),
            Err(errno) => break errno,
        }
    };
    assert_eq!(full, Errno::NOSPC);
    assert!(expected.len() > 2 << 20);
    // The journal's room was set aside before; it runs out too.
    let mut made = 0;
    while made < 100_000 {
        match volume.core.create(ROOT_INO, format!("file {made}").as_bytes(), 0o600) {
            Ok(_) => made += 1,
            Err(errno) => {
                assert_eq!(errno, Errno::NOSPC);
                break;
            }
        }
    }
    assert!(made < 100_000);
    let layer = LayerId::generate();
    assert!(volume.seal(layer).is_err());
    assert!(read_all(&volume, big) == expected);
    let names = contents(&volume).len();
    assert_eq!(names, made + 1);
    drop(volume);

    // With room again, everything that had succeeded is there, and work goes on.
    rustix::mount::mount_remount(disk.0.path(), rustix::mount::MountFlags::empty(), c"size=16m").unwrap();
    let volume = Volume::open(&node.dirs(0)).unwrap();
    assert!(read_all(&volume, big) == expected);
    assert_eq!(contents(&volume).len(), names);
    create(&volume, "after");
    assert_eq!(volume.seal(layer).unwrap().layer, layer);
}

#[test]
fn tablespaces_are_refused() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let at = volume.core.mkdir(ROOT_INO, b"pg_tblspc", 0o700).unwrap().ino;
    assert_eq!(volume.core.symlink(at, b"16384", b"/elsewhere").unwrap_err(), Errno::OPNOTSUPP);
    assert!(volume.core.symlink(ROOT_INO, b"pg_wal", b"../wal").is_ok());
}

#[test]
fn a_lock_file_of_a_server_that_is_gone_does_not_survive() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let ino = create(&volume, "postmaster.pid");
    volume.core.write(ino, 0, b"77").unwrap();
    let layer = LayerId::generate();
    volume.seal(layer).unwrap();
    drop(volume);
    assert!(contents(&node.volume(1, layer)).is_empty());
    assert!(contents(&Volume::open(&node.dirs(0)).unwrap()).is_empty());
}

#[test]
fn a_fork_has_none_of_its_sources_replication_slots() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let slots = volume.core.mkdir(ROOT_INO, b"pg_replslot", 0o700).unwrap().ino;
    for slot in [b"a", b"b"] {
        let slot = volume.core.mkdir(slots, slot, 0o700).unwrap().ino;
        volume.core.create(slot, b"state", 0o600).unwrap();
    }
    let layer = LayerId::generate();
    volume.seal(layer).unwrap();
    assert_eq!(contents(&node.volume(1, layer)).len(), 5);
    Volume::create_fork(&node.dirs(2), layer).unwrap();
    let fork = Volume::open(&node.dirs(2)).unwrap();
    assert_eq!(contents(&fork).into_keys().collect::<Vec<_>>(), ["/pg_replslot"]);
}
