//! Through a real mount: what only the kernel's view shows.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};

use proptest::prelude::*;

use super::super::{Mount, MountOptions};
use super::*;

pub(super) fn mount(volume: &Arc<Volume>, at: &Path) -> Mount {
    fs::create_dir_all(at).unwrap();
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    volume.mount(at, &MountOptions { uid, gid, allow_other: false, threads: 2 }).unwrap()
}

/// A volume and where it is mounted.
fn mounted(node: &Node) -> (Arc<Volume>, Mount, PathBuf) {
    let volume = node.volume(0, node.empty);
    let at = node.dirs(0).branch.join("data");
    let mount = mount(&volume, &at);
    (volume, mount, at)
}

#[test]
fn files_live_as_on_any_file_system() {
    let node = Node::new();
    let (volume, mount, at) = mounted(&node);
    fs::create_dir(at.join("base")).unwrap();
    fs::write(at.join("base/1"), vec![1; 100_000]).unwrap();
    fs::write(at.join("base/2"), b"two").unwrap();
    fs::rename(at.join("base/2"), at.join("base/1")).unwrap();
    assert_eq!(fs::read(at.join("base/1")).unwrap(), b"two");
    assert_eq!(fs::read(at.join("base/2")).unwrap_err().kind(), ErrorKind::NotFound);
    symlink("../wal", at.join("pg_wal")).unwrap();
    assert_eq!(fs::read_link(at.join("pg_wal")).unwrap(), Path::new("../wal"));
    assert!(at.join("pg_wal").is_dir(), "it leads out of the mount");
    fs::set_permissions(at.join("base/1"), fs::Permissions::from_mode(0o640)).unwrap();
    let meta = fs::metadata(at.join("base/1")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.nlink(), meta.len()), (0o640, 1, 3));
    assert_eq!(fs::remove_dir(at.join("base")).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    assert_eq!(fs::hard_link(at.join("base/1"), at.join("link")).unwrap_err().kind(), ErrorKind::PermissionDenied);
    File::open(at.join("base")).unwrap().sync_all().unwrap();
    assert!(rustix::fs::statvfs(&at).unwrap().f_bavail > 0);
    mount.unmount().unwrap();
    assert!(names_in(&at).is_empty(), "the mount is gone");
    assert_eq!(contents(&volume)["/base/1"], (Thing::File(b"two".to_vec()), 0o640));
}

#[test]
fn a_deleted_file_stays_readable_while_it_is_open() {
    let node = Node::new();
    let (_volume, mount, at) = mounted(&node);
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(at.join("sort")).unwrap();
    file.write_all(&[5; 50_000]).unwrap();
    fs::remove_file(at.join("sort")).unwrap();
    file.write_all(&[6; 50_000]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.len(), bytes[0], bytes[99_999]), (100_000, 5, 6));
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn allocated_space_reads_as_zeroes_and_holes_cannot_be_punched() {
    let node = Node::new();
    let (_volume, mount, at) = mounted(&node);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(at.join("f")).unwrap();
    file.write_all_at(&[1; 10_000], 0).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 40_000).unwrap();
    let mut expected = vec![1; 10_000];
    expected.resize(40_000, 0);
    assert_eq!(fs::read(at.join("f")).unwrap(), expected);
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(&file, punch, 0, 8192).unwrap_err(), rustix::io::Errno::OPNOTSUPP);
    drop(file);
    mount.unmount().unwrap();
}

#[test]
fn large_directories_are_listed_whole_and_can_be_emptied() {
    let node = Node::new();
    let (_volume, mount, at) = mounted(&node);
    for n in 0..1500 {
        File::create(at.join(format!("{n:04}"))).unwrap();
    }
    let expected: Vec<_> = (0..1500).map(|n| format!("{n:04}")).collect();
    assert_eq!(names_in(&at), expected);
    // Deleting while listing, as Postgres does with temporary files.
    for entry in fs::read_dir(&at).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert!(names_in(&at).is_empty());
    mount.unmount().unwrap();
}

#[test]
fn a_mount_in_use_is_not_unmounted_but_detached() {
    let node = Node::new();
    let (_volume, mount, at) = mounted(&node);
    fs::write(at.join("f"), b"contents").unwrap();
    let file = File::open(at.join("f")).unwrap();
    assert!(mount.unmount().is_err());
    assert!(!at.join("f").exists());
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"contents", "who has it open still reads");
}

#[test]
fn dropping_a_mount_unmounts_it_and_the_volume_keeps_what_was_written() {
    let node = Node::new();
    let (volume, mount, at) = mounted(&node);
    fs::write(at.join("f"), b"contents").unwrap();
    drop(mount);
    assert!(!at.join("f").exists());
    assert_eq!(read_all(&volume, find(&volume, "f")), b"contents");
}

#[derive(Debug, Clone)]
enum Act {
    Write(usize, u32, u32, u8),
    Truncate(usize, u32),
    Sync(usize),
    Replace(usize, usize),
    Seal,
    Remount,
}

fn act() -> impl Strategy<Value = Act> {
    let file = || 0..3_usize;
    let offset = || prop_oneof![(0..40_u32).prop_map(|page| page * 4096), 0..200_000_u32];
    prop_oneof![
        8 => (file(), offset(), prop_oneof![Just(8192_u32), 1..40_000_u32], any::<u8>())
            .prop_map(|(f, o, l, b)| Act::Write(f, o, l, b)),
        2 => (file(), offset()).prop_map(|(f, size)| Act::Truncate(f, size)),
        1 => file().prop_map(Act::Sync),
        1 => (file(), file()).prop_map(|(a, b)| Act::Replace(a, b)),
        1 => Just(Act::Seal),
        1 => Just(Act::Remount),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn through_the_kernels_cache_files_equal_plain_vectors(acts in prop::collection::vec(act(), 1..40)) {
        let node = Node::new();
        let (mut volume, mount_, at) = mounted(&node);
        let mut mount_ = Some(mount_);
        let mut model: Vec<Vec<u8>> = vec![Vec::new(); 3];
        let path = |n: usize| at.join(n.to_string());
        let open = |n: usize| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path(n)).unwrap()
        };
        (0..3).for_each(|n| drop(open(n)));
        for act in acts {
            match act {
                Act::Write(n, offset, length, byte) => {
                    let written: Vec<u8> = (0..length).map(|at| byte.wrapping_add((at / 1000) as u8)).collect();
                    open(n).write_all_at(&written, offset.into()).unwrap();
                    let end = (offset + length) as usize;
                    let bytes = &mut model[n];
                    bytes.resize(bytes.len().max(end), 0);
                    bytes[offset as usize..end].copy_from_slice(&written);
                }
                Act::Truncate(n, size) => {
                    open(n).set_len(size.into()).unwrap();
                    model[n].resize(size as usize, 0);
                }
                Act::Sync(n) => open(n).sync_all().unwrap(),
                Act::Replace(from, to) => {
                    fs::rename(path(from), path(to)).unwrap();
                    if from != to {
                        model[to] = std::mem::take(&mut model[from]);
                        drop(open(from));
                    }
                }
                Act::Seal => drop(volume.seal(LayerId::generate()).unwrap()),
                Act::Remount => {
                    mount_.take().unwrap().unmount().unwrap();
                    drop(volume);
                    volume = Volume::open(&node.dirs(0)).unwrap();
                    mount_ = Some(mount(&volume, &at));
                }
            }
            for (n, bytes) in model.iter().enumerate() {
                prop_assert!(fs::read(path(n)).unwrap() == *bytes, "file {n}");
            }
        }
        mount_.take().unwrap().unmount().unwrap();
        for (n, bytes) in model.iter().enumerate() {
            prop_assert!(read_all(&volume, find(&volume, &n.to_string())) == *bytes, "file {n} after unmounting");
        }
    }
}
