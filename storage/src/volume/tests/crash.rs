//! What crashes leave: cut journals, half-written blocks, seals stopped at every step.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::process::Command;

use proptest::prelude::*;
use rustix::fs::FallocateFlags;

use super::super::journal::{Header, Record};
use super::super::seal::{self, State};
use super::super::upper::Upper;
use super::*;

const BLOCK: u64 = 8192;

/// A copy of a node's directory, as a power cut at this moment would leave it if everything had been written.
fn copy(node: &Node) -> Node {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("cp");
    command.arg("-a").arg(node.dir.path().join(".")).arg(dir.path());
    assert!(command.status().unwrap().success());
    Node { dir, empty: node.empty }
}

fn upper_dir(node: &Node, number: u64) -> PathBuf {
    node.dirs(0).branch.join("uppers").join(number.to_string())
}

fn set_length(path: &Path, length: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

/// Makes a part of a data file as if it had never reached the disk.
fn lose(path: &Path, offset: u64, bytes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes).unwrap();
}

fn reopen(node: &Node) -> Arc<Volume> {
    Volume::open(&node.dirs(0)).unwrap()
}

/// A volume on a layer with one file, `table`, of four blocks of ones.
fn with_table() -> (Node, Arc<Volume>, Ino) {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let ino = create(&volume, "table");
    volume.core.write(ino, 0, &[1; 4 * BLOCK as usize]).unwrap();
    volume.seal(LayerId::generate()).unwrap();
    (node, volume, ino)
}

#[test]
fn wherever_the_journal_was_cut_what_was_synced_is_found() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let core = &volume.core;
    for name in ["kept", "moved", "deleted", "replaced", "cut"] {
        let ino = create(&volume, name);
        core.write(ino, 0, &vec![name.len() as u8; 20_000]).unwrap();
        core.sync_file(ino).unwrap();
    }
    core.mkdir(ROOT_INO, b"dir", 0o700).unwrap();
    core.sync_tree().unwrap();
    let synced = contents(&volume);
    let journal = upper_dir(&node, 0).join("journal");
    let from = length(&journal);
    core.unlink(ROOT_INO, b"deleted").unwrap();
    core.rename(ROOT_INO, b"moved", ROOT_INO, b"elsewhere", false).unwrap();
    let new = create(&volume, "new");
    core.write(new, 0, &[9; 100]).unwrap();
    core.rename(ROOT_INO, b"new", ROOT_INO, b"replaced", false).unwrap();
    core.rmdir(ROOT_INO, b"dir").unwrap();
    let done = contents(&volume);
    for cut in (from..=length(&journal)).step_by(7).chain([length(&journal)]) {
        let after = copy(&node);
        set_length(&upper_dir(&after, 0).join("journal"), cut);
        let found = contents(&reopen(&after));
        assert_eq!(found["/kept"], synced["/kept"]);
        assert_eq!(found["/cut"], synced["/cut"]);
        for (name, other) in [("/deleted", "/deleted"), ("/moved", "/elsewhere")] {
            let (before, there) = (&synced[name], found.get(name).or_else(|| found.get(other)));
            assert!(there.is_none_or(|there| there == before), "{name} at {cut}");
            assert!(there.is_some() || !done.contains_key(other), "{name} vanished at {cut}");
        }
        assert!(found["/replaced"] == synced["/replaced"] || found["/replaced"] == done["/replaced"]);
        if cut == from {
            assert_eq!(found, synced);
        }
    }
}

#[test]
fn half_a_block_is_completed_from_below() {
    let (node, volume, ino) = with_table();
    volume.core.write(ino, 0, &[2; 2 * BLOCK as usize]).unwrap();
    volume.core.write(ino, 8 * BLOCK, &[2; BLOCK as usize]).unwrap();
    drop(volume);
    let data = upper_dir(&node, 1).join("data").join(ino.to_string());
    lose(&data, 4096, 4096);
    lose(&data, BLOCK, 4096);
    lose(&data, 8 * BLOCK, 4096);
    // Twice: what was completed stays so.
    for _ in 0..2 {
        let volume = reopen(&node);
        let bytes = read_all(&volume, ino);
        let expect = |at: u64, byte: u8| assert_eq!(bytes[at as usize..][..4096], [byte; 4096], "at {at}");
        expect(0, 2);
        expect(4096, 1);
        expect(BLOCK, 1);
        expect(BLOCK + 4096, 2);
        expect(2 * BLOCK, 1);
        expect(7 * BLOCK, 0);
        expect(8 * BLOCK, 0);
        expect(8 * BLOCK + 4096, 2);
    }
}

#[test]
fn a_cut_whose_copied_block_was_lost_does_not_show_what_it_cut_off() {
    let (node, volume, ino) = with_table();
    volume.core.truncate(ino, BLOCK + 5000).unwrap();
    volume.core.truncate(ino, 4 * BLOCK).unwrap();
    drop(volume);
    lose(&upper_dir(&node, 1).join("data").join(ino.to_string()), BLOCK, BLOCK);
    let volume = reopen(&node);
    let mut expected = vec![1; BLOCK as usize + 5000];
    expected.resize(4 * BLOCK as usize, 0);
    assert!(read_all(&volume, ino) == expected);
}

#[test]
fn a_cut_that_the_journal_lost_is_known_by_the_files_length() {
    let (node, volume, ino) = with_table();
    let journal = upper_dir(&node, 1).join("journal");
    let before = length(&journal);
    volume.core.truncate(ino, BLOCK).unwrap();
    drop(volume);
    set_length(&journal, before);
    let volume = reopen(&node);
    volume.core.truncate(ino, 2 * BLOCK).unwrap();
    drop(volume);
    let mut expected = vec![1; BLOCK as usize];
    expected.resize(2 * BLOCK as usize, 0);
    assert!(read_all(&reopen(&node), ino) == expected, "old contents show in what was cut off");
}

#[test]
fn a_cut_without_its_data_file_is_carried_out() {
    let (node, volume, ino) = with_table();
    volume.core.truncate(ino, 100).unwrap();
    drop(volume);
    std::fs::remove_file(upper_dir(&node, 1).join("data").join(ino.to_string())).unwrap();
    assert_eq!(read_all(&reopen(&node), ino), [1; 100]);
}

#[test]
fn a_file_grows_over_a_cut_only_once_the_cut_is_on_disk() {
    let (node, volume, ino) = with_table();
    volume.core.truncate(ino, BLOCK).unwrap();
    let (upper, _) = volume.core.uppers();
    let end = length(&upper_dir(&node, 1).join("journal"));
    assert!(!upper.journal.is_synced(end));
    volume.core.write(ino, 2 * BLOCK, &[3; 10]).unwrap();
    assert!(upper.journal.is_synced(end));
}

#[test]
fn what_belongs_to_nothing_is_deleted_and_no_number_is_used_again() {
    let (node, volume, ino) = with_table();
    drop(volume);
    let data = upper_dir(&node, 1).join("data");
    for name in [format!("{}", ino + 40), format!("{ino}.new"), "rubbish".to_owned()] {
        std::fs::write(data.join(name), [7; 100]).unwrap();
    }
    let volume = reopen(&node);
    assert!(names_in(&data).is_empty());
    assert!(create(&volume, "next") > ino + 40);
    assert!(read_all(&volume, ino) == [1; 4 * BLOCK as usize]);
}

#[test]
fn a_seal_that_did_not_happen_leaves_nothing() {
    let (node, volume, ino) = with_table();
    volume.core.write(ino, 0, &[2; 10]).unwrap();
    let header = Header { upper: 2, base: LayerId::generate() };
    drop(Upper::create(&node.dirs(0).branch, header, 9).unwrap());
    let before = contents(&volume);
    drop(volume);
    let volume = reopen(&node);
    assert_eq!(contents(&volume), before);
    assert_eq!(names_in(&node.dirs(0).branch.join("uppers")), ["1"]);
}

/// Does the steps of a seal up to the switch, and writes on.
fn switched(node: &Node, volume: &Volume, ino: Ino) -> LayerId {
    let layer = LayerId::generate();
    volume.core.write(ino, 0, &[2; BLOCK as usize]).unwrap();
    let header = Header { upper: 2, base: layer };
    let next = Upper::create(&node.dirs(0).branch, header, volume.core.slots.len()).unwrap();
    volume.core.switch(next, || Ok(vec![Record::Seal { layer }])).unwrap();
    volume.core.write(ino, BLOCK, &[3; BLOCK as usize]).unwrap();
    layer
}

#[test]
fn a_seal_is_finished_from_wherever_it_stopped() {
    for step in 0..3 {
        let (node, volume, ino) = with_table();
        let (dirs, base) = (node.dirs(0), volume.base());
        let layer = switched(&node, &volume, ino);
        let expected = contents(&volume);
        drop(volume);
        match step {
            0 => {}
            1 => {
                let dir = upper_dir(&node, 1);
                std::fs::create_dir(dir.join("wal")).unwrap();
                std::fs::write(dir.join("wal/half"), b"copied").unwrap();
                std::fs::write(dir.join("manifest"), b"half written").unwrap();
                std::fs::remove_file(dir.join("manifest")).unwrap();
            }
            _ => {
                seal::finish(&dirs, 1, base, layer).unwrap();
                State::new(base, 1).write(&dirs.branch).unwrap();
            }
        }
        let volume = reopen(&node);
        assert_eq!(volume.base(), layer, "step {step}");
        assert_eq!(contents(&volume), expected, "step {step}");
        assert_eq!(State::read(&dirs.branch).unwrap(), State::new(layer, 2));
        assert!(
            matches!(volume.seal(layer).unwrap(), super::super::Sealed { layer: made, new: true, .. } if made == layer)
        );
        let image = node.volume(1, layer);
        assert_eq!(read_all(&image, ino)[..2 * BLOCK as usize], [[2; BLOCK as usize], [1; BLOCK as usize]].concat());
    }
}

#[test]
fn seals_that_wait_are_finished_though_each_attempt_ends_before_it_is_recorded() {
    let (node, volume, ino) = with_table();
    let (dirs, base) = (node.dirs(0), volume.base());
    let layers = [2, 3, 4].map(|byte| {
        volume.core.write(ino, 0, &[byte; BLOCK as usize]).unwrap();
        volume.begin_seal(LayerId::generate()).unwrap().layer
    });
    drop(volume);
    // The first is a layer, and nobody has written that down.
    seal::finish(&dirs, 1, base, layers[0]).unwrap();
    State::new(base, 1).write(&dirs.branch).unwrap();
    let in_the_way = dirs.branch.join("volume.new");
    for _ in 0..3 {
        std::fs::create_dir(&in_the_way).unwrap();
        assert!(Volume::open(&dirs).is_err());
        std::fs::remove_dir(&in_the_way).unwrap();
    }
    let volume = reopen(&node);
    assert_eq!(volume.base(), layers[2]);
    assert_eq!(read_all(&volume, ino)[..BLOCK as usize], [4; BLOCK as usize]);
    assert_eq!(read_all(&node.volume(1, layers[1]), ino)[..BLOCK as usize], [3; BLOCK as usize]);
}

#[test]
fn a_seal_happened_also_if_the_next_upper_was_lost() {
    for loss in 0..3 {
        let (node, volume, ino) = with_table();
        let layer = switched(&node, &volume, ino);
        drop(volume);
        let next = upper_dir(&node, 2);
        match loss {
            0 => std::fs::remove_dir_all(next).unwrap(),
            1 => set_length(&next.join("journal"), 0),
            _ => lose(&next.join("journal"), 0, 4096),
        }
        assert_eq!(crate::volume::Volume::pending(&node.dirs(0)).unwrap(), [layer]);
        let volume = reopen(&node);
        assert_eq!(volume.base(), layer);
        assert_eq!(read_all(&volume, ino)[..2 * BLOCK as usize], [[2; BLOCK as usize], [1; BLOCK as usize]].concat());
        volume.core.write(ino, 0, &[4; 10]).unwrap();
        volume.core.sync_file(ino).unwrap();
        drop(volume);
        assert_eq!(read_all(&reopen(&node), ino)[..10], [4; 10]);
    }
}

#[test]
fn a_seal_whose_record_was_lost_did_not_happen() {
    let (node, volume, ino) = with_table();
    let journal = upper_dir(&node, 1).join("journal");
    let before = length(&journal);
    switched(&node, &volume, ino);
    drop(volume);
    set_length(&journal, before);
    let volume = reopen(&node);
    assert_eq!(read_all(&volume, ino)[..2 * BLOCK as usize], [[2; BLOCK as usize], [1; BLOCK as usize]].concat());
}

#[test]
fn a_sync_after_a_seal_brings_the_seal_to_disk_too() {
    let (node, volume, ino) = with_table();
    switched(&node, &volume, ino);
    let previous = volume.core.uppers().1.remove(0);
    let end = length(&upper_dir(&node, 1).join("journal"));
    assert!(!previous.journal.is_synced(end));
    volume.core.sync_file(ino).unwrap();
    assert!(previous.journal.is_synced(end));
}

#[test]
fn a_seal_that_failed_half_way_is_finished_by_the_next_call() {
    let (node, volume, ino) = with_table();
    volume.core.write(ino, 0, &[2; 10]).unwrap();
    let expected = contents(&volume);
    let layer = LayerId::generate();
    let blocker = node.layers().join(layer.to_string());
    std::fs::create_dir_all(blocker.join("in the way")).unwrap();
    assert!(volume.seal(layer).is_err());
    volume.core.write(ino, 0, &[3; 10]).unwrap();
    volume.core.sync_file(ino).unwrap();
    assert!(volume.is_dirty());
    std::fs::remove_dir_all(blocker).unwrap();
    assert!(
        matches!(volume.seal(layer).unwrap(), super::super::Sealed { layer: made, new: true, .. } if made == layer)
    );
    assert_eq!(volume.base(), layer);
    assert_eq!(contents(&node.volume(1, layer)), expected);
    assert_eq!(read_all(&volume, ino)[..10], [3; 10]);
}

#[test]
fn damage_to_what_had_been_synced_is_an_error() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    for name in ["a", "b", "c"] {
        create(&volume, name);
        volume.core.sync_tree().unwrap();
    }
    drop(volume);
    let journal = upper_dir(&node, 0).join("journal");
    let file = OpenOptions::new().write(true).open(&journal).unwrap();
    file.write_all_at(&[0xFF], super::super::journal::HEADER_BYTES + 25).unwrap();
    let error = Volume::open(&node.dirs(0)).unwrap_err();
    assert!(matches!(error, crate::Error::Corrupt { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Each page of the disk that was written since the last sync may be lost; then what was before shows.
    #[test]
    fn a_power_cut_takes_only_what_was_not_synced(
        acts in prop::collection::vec((0..3_usize, 0..80_000_u64, 1..20_000_usize, any::<u8>(), any::<bool>()), 1..30),
        lost in prop::collection::vec(any::<bool>(), 64),
    ) {
        const PAGE: usize = 4096;
        const SIZE: usize = 100_352;
        let node = Node::new();
        let volume = node.volume(0, node.empty);
        let inos: Vec<_> = (0..3).map(|n| create(&volume, &n.to_string())).collect();
        for (n, ino) in inos.iter().enumerate() {
            // One file all below, one with holes, one that is all a hole.
            volume.core.truncate(*ino, SIZE as u64).unwrap();
            for block in (0..SIZE / BLOCK as usize).filter(|block| n == 0 || n == 1 && block % 2 == 0) {
                volume.core.write(*ino, block as u64 * BLOCK, &[0x11; BLOCK as usize]).unwrap();
            }
        }
        let below: Vec<_> = inos.iter().map(|ino| read_all(&volume, *ino)).collect();
        volume.seal(LayerId::generate()).unwrap();
        let mut model = below.clone();
        let mut unsynced = vec![[false; SIZE / PAGE + 1]; 3];
        let mut on_disk = unsynced.clone();
        for (file, offset, length, byte, sync) in acts {
            let length = length.min(SIZE - offset as usize);
            volume.core.write(inos[file], offset, &vec![byte; length]).unwrap();
            model[file][offset as usize..][..length].fill(byte);
            unsynced[file][offset as usize / PAGE..(offset as usize + length).div_ceil(PAGE)].fill(true);
            if sync {
                volume.core.sync_file(inos[file]).unwrap();
                for (page, unsynced) in unsynced[file].iter_mut().enumerate() {
                    on_disk[file][page] |= std::mem::take(unsynced);
                }
            }
        }
        drop(volume);
        for (file, ino) in inos.iter().enumerate() {
            for page in 0..SIZE / PAGE {
                // One that was on disk already keeps its place: the cut leaves it old or new, not lost.
                if unsynced[file][page] && !on_disk[file][page] && lost[(file * 17 + page) % lost.len()] {
                    let at = page * PAGE;
                    lose(&upper_dir(&node, 1).join("data").join(ino.to_string()), at as u64, PAGE as u64);
                    let end = (at + PAGE).min(SIZE);
                    model[file][at..end].copy_from_slice(&below[file][at..end]);
                }
            }
        }
        let volume = reopen(&node);
        for (file, ino) in inos.iter().enumerate() {
            prop_assert!(read_all(&volume, *ino) == model[file], "file {file}");
        }
    }
}
