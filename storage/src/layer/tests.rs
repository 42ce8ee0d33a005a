use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ebb_types::ErrorKind;
use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::node::NodeStore;
use crate::object_store::faulty::{Faults, Faulty};
use crate::object_store::{self, Bucket};

const PAGE: usize = BLOCK_BYTES as usize;

fn image() -> ImageInfo {
    ImageInfo {
        pg_major: 15,
        system_identifier: 7_710_517_837_827_884_025,
        redo: Lsn(0xB5_2978),
        pg_timeline: 1,
        wal_segment_bytes: 1 << 20,
        clean: true,
    }
}

fn inode(ino: Ino, parent: Ino, name: &str, kind: InodeKind) -> Inode {
    let mode = if kind == InodeKind::Directory { 0o700 } else { 0o600 };
    Inode { ino, parent, name: name.into(), mode, mtime_ns: 1_700_000_000_000_000_000 + ino as i64, kind }
}

fn file(size: u64, runs: &[(u32, u32, u32)]) -> InodeKind {
    InodeKind::File { size, runs: runs.iter().map(|&(start, len, slot)| Run { start, len, slot }).collect() }
}

/// A layer on another, with some of everything.
fn sample() -> Manifest {
    let page = BLOCK_BYTES;
    Manifest {
        id: LayerId::for_test(2),
        chain: vec![LayerId::for_test(1), LayerId::for_test(2)],
        next_ino: 40,
        inodes: vec![
            inode(1, 1, "", InodeKind::Directory),
            inode(2, 7, "moved-up", InodeKind::Directory),
            inode(3, 2, "all old", file(3 * page, &[(0, 3, 0)])),
            inode(4, 2, "old and new", file(40 * page + 100, &[(0, 2, 0), (2, 20, 1), (30, 1, 0), (39, 2, 1)])),
            inode(5, 1, "empty", file(0, &[])),
            inode(6, 1, "short", file(5, &[(0, 1, 1)])),
            inode(7, 1, "base", InodeKind::Directory),
            inode(8, 1, "pg_wal", InodeKind::Symlink { target: b"../wal".to_vec() }),
            inode(9, 1, "all zeroes", file(4 * page, &[(1, 2, 1)])),
        ],
        image: image(),
    }
}

/// The bytes of a page of the sample: text that compresses, different on every page.
fn sample_page(ino: Ino, page: u32) -> Vec<u8> {
    if ino == 9 {
        return vec![0; PAGE];
    }
    format!("page {page} of inode {ino}; ").into_bytes().into_iter().cycle().take(PAGE).collect()
}

fn sample_wal() -> Vec<u8> {
    let mut wal = vec![0; 1 << 20];
    for (at, byte) in wal[..100_000].iter_mut().enumerate() {
        *byte = (at / 7) as u8;
    }
    wal[900_000] = 1;
    wal
}

/// Writes a layer's directory as a seal would.
fn write_layer(dir: &Path, manifest: &Manifest, page_of: impl Fn(Ino, u32) -> Vec<u8>) {
    fs::create_dir_all(dir.join("data")).unwrap();
    fs::create_dir_all(dir.join("wal")).unwrap();
    for inode in &manifest.inodes {
        let InodeKind::File { size, runs } = &inode.kind else { continue };
        for run in runs.iter().filter(|run| run.slot == manifest.own_slot()) {
            let path = dir.join("data").join(inode.ino.to_string());
            let data = File::options().create(true).truncate(false).write(true).open(path).unwrap();
            for page in run.start..run.start + run.len {
                let offset = u64::from(page) * BLOCK_BYTES;
                let within = (size - offset).min(BLOCK_BYTES) as usize;
                data.write_all_at(&page_of(inode.ino, page)[..within], offset).unwrap();
            }
        }
    }
    fs::write(dir.join("manifest"), manifest.encode()).unwrap();
}

fn write_sample(layers_dir: &Path) -> (LayerId, PathBuf) {
    let manifest = sample();
    let dir = layers_dir.join(manifest.id.to_string());
    write_layer(&dir, &manifest, sample_page);
    fs::write(dir.join("wal/000000010000000000000002"), sample_wal()).unwrap();
    fs::write(dir.join("wal/00000002.history"), "1\t0/B52978\tno recovery target specified\n").unwrap();
    fs::write(dir.join("roles.json"), r#"{"app":"SCRAM-SHA-256$4096:…"}"#).unwrap();
    (manifest.id, dir)
}

fn assert_is_sample(dir: &Path) {
    assert_eq!(Manifest::decode("manifest", &fs::read(dir.join("manifest")).unwrap()).unwrap(), sample());
    let data = |ino: Ino| fs::read(dir.join("data").join(ino.to_string())).unwrap();
    let old_and_new = data(4);
    assert_eq!(old_and_new.len(), 40 * PAGE + 100);
    for page in (2..22).chain(39..41) {
        let at = page as usize * PAGE;
        let end = old_and_new.len().min(at + PAGE);
        assert_eq!(old_and_new[at..end], sample_page(4, page)[..end - at], "page {page}");
    }
    assert!(old_and_new[22 * PAGE..39 * PAGE].iter().all(|&b| b == 0), "pages of other layers are holes");
    assert_eq!(data(6), sample_page(6, 0)[..5]);
    assert_eq!(data(9), vec![0; 3 * PAGE]);
    assert_eq!(fs::metadata(dir.join("data/9")).unwrap().blocks(), 0, "zero pages are holes");
    assert!(!dir.join("data/3").exists(), "a file without pages of this layer");
    assert_eq!(fs::read(dir.join("wal/000000010000000000000002")).unwrap(), sample_wal());
    let wal = fs::metadata(dir.join("wal/000000010000000000000002")).unwrap();
    assert!(wal.blocks() * 512 < 200_000, "unused WAL is a hole");
    assert!(fs::read_to_string(dir.join("wal/00000002.history")).unwrap().starts_with("1\t0/B52978"));
    assert_eq!(fs::read_to_string(dir.join("roles.json")).unwrap(), r#"{"app":"SCRAM-SHA-256$4096:…"}"#);
}

/// The golden file of a format version; `EBB_BLESS=1` writes it, once per version.
fn golden(name: &str, now: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/layer/golden").join(name);
    if std::env::var_os("EBB_BLESS").is_some() {
        fs::write(&path, now).unwrap();
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

async fn bucket_in(dir: &Path) -> Bucket {
    object_store::open(dir.join("bucket").to_str().unwrap()).await.unwrap()
}

fn is_corrupt<T: std::fmt::Debug>(result: crate::Result<T>, why: impl std::fmt::Debug) {
    assert!(matches!(result, Err(Error::Corrupt { .. })), "{why:?}: {result:?}");
}

#[test]
fn a_manifest_of_version_1_is_read_for_ever() {
    let bytes = golden("manifest-v1.bin", &sample().encode());
    assert_eq!(Manifest::decode("golden", &bytes).unwrap(), sample());
}

#[tokio::test]
async fn an_object_of_version_1_is_read_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (id, layer_dir) = write_sample(&dir.path().join("here"));
    let packed = dir.path().join("packed");
    pack(id, &layer_dir, &packed).unwrap();
    let bytes = golden("layer-v1.bin", &fs::read(packed).unwrap());

    let bucket = bucket_in(dir.path()).await;
    bucket.put(&object_key(id), bytes.into()).await.unwrap();
    let into = dir.path().join("into");
    fs::create_dir(&into).unwrap();
    fetch(&bucket, id, &into).await.unwrap();
    assert_is_sample(&into);
}

#[tokio::test]
async fn a_layer_comes_back_as_it_was_and_the_same_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket_in(dir.path()).await;
    let here = NodeStore::new(&dir.path().join("here"), bucket.clone());
    let (id, layer_dir) = write_sample(here.layers_dir());
    let uploaded = here.upload(id).await.unwrap();
    let wal_blocks = 13 + 1 + 1;
    assert_eq!(uploaded.raw_bytes, (22 + 1 + wal_blocks) * BLOCK_BYTES);

    let again = dir.path().join("again");
    let packed = pack(id, &layer_dir, &again).unwrap();
    assert_eq!((packed.object_bytes, packed.raw_bytes), (uploaded.object_bytes, uploaded.raw_bytes));
    assert_eq!(bucket.get(&object_key(id)).await.unwrap(), fs::read(&again).unwrap());

    let there = NodeStore::new(&dir.path().join("there"), bucket.clone());
    let absent = there.ensure_local(id).await;
    assert!(matches!(absent, Err(Error::NoSuchLayer(below)) if below == LayerId::for_test(1)), "{absent:?}");
    assert_is_sample(&there.layers_dir().join(id.to_string()));

    let mut below = sample();
    (below.id, below.chain) = (LayerId::for_test(1), vec![LayerId::for_test(1)]);
    below.inodes.truncate(1);
    below.inodes.push(inode(3, 1, "all old", file(3 * BLOCK_BYTES, &[(0, 3, 0)])));
    write_layer(&here.layers_dir().join(below.id.to_string()), &below, sample_page);
    here.upload(below.id).await.unwrap();
    there.ensure_local(id).await.unwrap();
    assert_eq!(there.manifest(below.id).await.unwrap(), below);
}

#[tokio::test]
async fn an_image_is_exported_from_all_layers_of_its_chain() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket_in(dir.path()).await;
    let here = NodeStore::new(&dir.path().join("here"), bucket.clone());
    let (old, new) = (LayerId::for_test(1), LayerId::for_test(2));
    let mut above = sample();
    above.inodes.push(inode(10, 1, "global", InodeKind::Directory));
    above.inodes.push(inode(11, 10, "pg_control", file(BLOCK_BYTES, &[(0, 1, 1)])));
    let mut below = above.clone();
    (below.id, below.chain) = (old, vec![old]);
    below.inodes.retain(|inode| [1, 2, 7, 3, 4].contains(&inode.ino));
    below.inodes[3].kind = file(40 * BLOCK_BYTES, &[(0, 40, 0)]);
    let dir_of = |id: LayerId| here.layers_dir().join(id.to_string());
    write_layer(&dir_of(old), &below, |ino, page| {
        format!("old page {page} of {ino} ").repeat(999).as_bytes()[..PAGE].to_vec()
    });
    write_layer(&dir_of(new), &above, sample_page);
    fs::write(dir_of(new).join("wal/000000010000000000000002"), sample_wal()).unwrap();
    for id in [old, new] {
        here.upload(id).await.unwrap();
    }

    let there = NodeStore::new(&dir.path().join("there"), bucket);
    let dest = dir.path().join("dest");
    there.export(new, &dest).await.unwrap();
    let image = fs::read(dest.join("base/moved-up/old and new")).unwrap();
    assert_eq!(image.len(), 40 * PAGE + 100);
    for page in 0..41 {
        let found = &image[page * PAGE..image.len().min((page + 1) * PAGE)];
        let expect = match page {
            0 | 1 | 30 => format!("old page {page} of 4 "),
            2..22 | 39 | 40 => format!("page {page} of inode 4; "),
            _ => "\0".to_owned(),
        };
        assert!(found.starts_with(expect.as_bytes()), "page {page}");
    }
    assert!(fs::read(dest.join("base/moved-up/all old")).unwrap().starts_with(b"old page 0 of 3 "));
    assert_eq!(fs::read(dest.join("pg_wal/000000010000000000000002")).unwrap(), sample_wal());
    assert_eq!(fs::read(dest.join("empty")).unwrap(), b"");
    assert_eq!(fs::metadata(dest.join("short")).unwrap().mtime_nsec(), 6, "times are carried");
}

/// Every byte of an object is under some checksum.
#[tokio::test]
async fn a_changed_byte_anywhere_is_found_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket_in(dir.path()).await;
    let here = NodeStore::new(&dir.path().join("here"), bucket.clone());
    let (id, _) = write_sample(here.layers_dir());
    here.upload(id).await.unwrap();
    let good = bucket.get(&object_key(id)).await.unwrap().to_vec();

    let there = NodeStore::new(&dir.path().join("there"), bucket.clone());
    let check = async |bytes: Vec<u8>, why: String| {
        bucket.put(&object_key(id), bytes.into()).await.unwrap();
        is_corrupt(there.ensure_local(id).await, why);
        assert!(!there.layers_dir().join(id.to_string()).exists());
    };
    // All of the header and footer, and a step that is a prime, so that it meets every kind of field between.
    let last = good.len() - 96;
    for at in (0..40).chain((40..last).step_by(37)).chain(last..good.len()) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        check(bad, format!("byte {at} of {}", good.len())).await;
    }
    for length in [0, 1, 31, 32, 127, 128, good.len() / 2, good.len() - 1] {
        check(good[..length].to_vec(), format!("cut to {length} bytes")).await;
    }
    check([good.as_slice(), b"x"].concat(), "one byte more".to_owned()).await;
    let mut shifted = good.clone();
    shifted.remove(500);
    check(shifted, "one byte less in the middle".to_owned()).await;
}

#[tokio::test]
async fn an_object_under_another_layers_name_is_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = bucket_in(dir.path()).await;
    let node = NodeStore::new(&dir.path().join("here"), bucket.clone());
    let (id, _) = write_sample(node.layers_dir());
    node.upload(id).await.unwrap();
    let other = LayerId::for_test(3);
    bucket.put(&object_key(other), bucket.get(&object_key(id)).await.unwrap()).await.unwrap();
    is_corrupt(node.ensure_local(other).await, "the object of another layer");
    is_corrupt(node.upload(other).await, "the object of another layer");
}

#[test]
fn what_is_not_a_manifest_is_told() {
    let check = |change: &dyn Fn(&mut Manifest), expect: &str| {
        let mut manifest = sample();
        change(&mut manifest);
        assert_eq!(manifest.check().unwrap_err(), expect);
    };
    fn runs(manifest: &mut Manifest) -> &mut Vec<Run> {
        let InodeKind::File { runs, .. } = &mut manifest.inodes[3].kind else { panic!("inode 4 is a file") };
        runs
    }
    check(&|m| m.chain.clear(), "its chain does not end in the layer itself");
    check(&|m| m.chain.insert(0, m.id), "its chain names a layer twice");
    check(&|m| m.inodes.clear(), "its first inode is not a root directory");
    check(&|m| m.inodes.swap(2, 3), "its inodes are not in the order of their numbers");
    check(&|m| m.next_ino = 9, "an inode has a number that was never given out");
    check(&|m| m.inodes[2].parent = 5, "inode 3 is in no directory");
    check(&|m| m.inodes[2].name = b"old and new".to_vec(), "inode 4 has a name that cannot be, or that another has");
    check(&|m| m.inodes[2].name = b"../x".to_vec(), "inode 3 has a name that cannot be, or that another has");
    check(&|m| m.inodes[6].parent = 2, "a directory is inside itself");
    check(&|m| m.inodes[2].mode = 0o100_600, "an inode has more than permission bits in its mode");
    check(&|m| runs(m)[1].start = 1, "inode 4: the run at page 1 is empty or overlaps the one before");
    check(&|m| runs(m)[1].len = 0, "inode 4: the run at page 2 is empty or overlaps the one before");
    check(&|m| runs(m)[1].slot = 2, "inode 4: the run at page 2 is in no layer of the chain");
    check(&|m| runs(m)[3].len = 3, "inode 4: its pages go on past its end");
    check(&|m| m.image.wal_segment_bytes = 0, "0 is not the size of a WAL segment");
}

/// Any tree and page map, valid by construction.
fn any_manifest() -> impl Strategy<Value = Manifest> {
    let kind = (0..3, any::<u16>(), prop::collection::vec((0..5_u32, 1..9_u32, 0..3_u32), 0..12));
    let inodes =
        prop::collection::vec((kind, any::<prop::sample::Index>(), 0..0o10000_u32, any::<i64>(), 1..4_u64), 0..20);
    (inodes, any::<u64>(), 14..19_u32, any::<bool>()).prop_map(|(seeds, number, pg_major, clean)| {
        let mut inodes = vec![inode(1, 1, "", InodeKind::Directory)];
        let mut directories = vec![1];
        let mut ino = 1;
        for ((kind, extra, gaps), parent, mode, mtime_ns, step) in seeds {
            ino += step;
            let kind = match kind {
                0 => InodeKind::Directory,
                1 => InodeKind::Symlink { target: extra.to_le_bytes().to_vec() },
                _ => {
                    let mut end = 0;
                    let runs: Vec<_> = (gaps.into_iter())
                        .map(|(gap, len, slot)| {
                            let run = Run { start: end + gap, len, slot };
                            end = run.start + len;
                            run
                        })
                        .collect();
                    let partial = u64::from(extra) % BLOCK_BYTES;
                    InodeKind::File { size: (u64::from(end) * BLOCK_BYTES).saturating_sub(partial), runs }
                }
            };
            let parent = *parent.get(&directories);
            if kind == InodeKind::Directory {
                directories.push(ino);
            }
            inodes.push(Inode { ino, parent, name: format!("{ino}-ä").into_bytes(), mode, mtime_ns, kind });
        }
        let image = ImageInfo { pg_major, system_identifier: number, redo: Lsn(!number), clean, ..image() };
        let chain: Vec<_> = [1, 2, 3].map(LayerId::for_test).into();
        Manifest { id: chain[2], chain, next_ino: ino + 1, inodes, image }
    })
}

/// A manifest file's bytes around any body, with a checksum that fits, as an attacker or a bug could make them.
fn sealed_around(body: &[u8]) -> Vec<u8> {
    let mut bytes = b"EBBMANIF\x01\0\0\0".to_vec();
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&zstd::bulk::compress(body, 1).unwrap());
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

fn body_of(manifest: &Manifest) -> Vec<u8> {
    let bytes = manifest.encode();
    zstd::decode_all(&bytes[20..bytes.len() - 32]).unwrap()
}

proptest! {
    #[test]
    fn manifests_round_trip(manifest in any_manifest()) {
        prop_assert_eq!(manifest.check(), Ok(()));
        prop_assert_eq!(Manifest::decode("m", &manifest.encode()).unwrap(), manifest);
    }

    #[test]
    fn a_manifest_with_a_changed_byte_is_corrupt(manifest in any_manifest(), at: prop::sample::Index, bit in 0..8) {
        let mut bytes = manifest.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        is_corrupt(Manifest::decode("m", &bytes), at);
    }

    #[test]
    fn garbage_is_no_manifest(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        is_corrupt(Manifest::decode("m", &bytes), "garbage");
        is_corrupt(Manifest::decode("m", &sealed_around(&bytes)), "garbage with a checksum");
    }

    /// Past the checksum, too, nothing panics and nothing invalid gets through.
    #[test]
    fn a_changed_body_is_corrupt_or_still_valid(
        manifest in any_manifest(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        length: prop::sample::Index,
    ) {
        let mut body = body_of(&manifest);
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Ok(other) = Manifest::decode("m", &sealed_around(&body)) {
            prop_assert_eq!(other.check(), Ok(()));
        }
        let length = length.index(body.len());
        is_corrupt(Manifest::decode("m", &sealed_around(&body[..length])), "cut short");
    }

    #[test]
    fn an_index_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let footer = format::Footer {
            index_offset: format::HEADER_BYTES,
            index_bytes: bytes.len() as u64,
            raw_bytes: 0,
            index_checksum: *blake3::hash(&bytes).as_bytes(),
        };
        prop_assert!(format::Index::decode(&footer, &bytes).is_err(), "an index without a manifest");
    }
}

#[test]
fn counts_that_lie_set_nothing_aside() {
    let mut body = sample().id.as_bytes().to_vec();
    body.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]);
    is_corrupt(Manifest::decode("m", &sealed_around(&body)), "a chain of 2^64 - 1 layers");
    let mut bytes = sealed_around(&body);
    let signed = bytes.len() - 32;
    bytes[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
    let checksum = *blake3::hash(&bytes[..signed]).as_bytes();
    bytes[signed..].copy_from_slice(&checksum);
    is_corrupt(Manifest::decode("m", &bytes), "a body of 2^64 - 1 bytes");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The pages of any layer come back, and only they.
    #[test]
    fn pages_round_trip(manifest in any_manifest(), zeroes: u64, noise: u8) {
        let page_of = |ino: Ino, page: u32| -> Vec<u8> {
            let number = ino * 31 + u64::from(page);
            if zeroes >> (number % 64) & 1 == 1 { return vec![0; PAGE]; }
            (0..PAGE).map(|at| if at % 64 == 0 { noise } else { (number as usize * 7 + at / 3) as u8 }).collect()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let bucket = bucket_in(dir.path()).await;
            let here = NodeStore::new(&dir.path().join("here"), bucket.clone());
            let source = here.layers_dir().join(manifest.id.to_string());
            write_layer(&source, &manifest, page_of);
            here.upload(manifest.id).await.unwrap();
            let into = dir.path().join("into");
            fs::create_dir(&into).unwrap();
            fetch(&bucket, manifest.id, &into).await.unwrap();
            let names = |dir: &Path| {
                let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
                names.sort();
                names
            };
            assert_eq!(names(&into.join("data")), names(&source.join("data")));
            for name in names(&into.join("data")) {
                let read = |dir: &Path| fs::read(dir.join("data").join(&name)).unwrap();
                assert!(read(&into) == read(&source), "data of inode {name:?}");
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_arrives_whole_over_a_bucket_that_fails() {
    let mut made = BTreeMap::new();
    for seed in 0..16 {
        let dir = tempfile::tempdir().unwrap();
        let bucket = object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
        let faults = Faults {
            seed,
            refused: 0.1,
            answer_lost: 0.5,
            torn: 0.1,
            corrupt: 0.2,
            repeated: 0.5,
            ..Faults::default()
        };
        let faulty = Arc::new(Faulty::new(bucket, faults));
        // What fails, fails as one of these; what works, works rightly.
        let failed = |error: Error| {
            let known = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Corrupt);
            assert!(known, "seed {seed}: {error}");
        };
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let (id, _) = write_sample(&from.join("layers"));
        let store = NodeStore::new(&from, faulty.clone());
        while let Err(error) = store.upload(id).await {
            failed(error);
        }
        while let Err(error) = fetch_into(&faulty, id, &to).await {
            failed(error);
        }
        assert_is_sample(&to);
        for (fault, times) in faulty.made() {
            *made.entry(fault).or_insert(0) += times;
        }
    }
    assert!(made.len() == 5 && made.values().all(|&times| times >= 5), "{made:?}");
}

/// Fetches a layer into an empty directory; what is half there after a failure is removed.
async fn fetch_into(bucket: &Arc<Faulty>, id: LayerId, into: &Path) -> crate::Result<()> {
    fs::create_dir_all(into).unwrap();
    let bucket: Bucket = bucket.clone();
    let fetched = fetch(&bucket, id, into).await;
    if fetched.is_err() {
        fs::remove_dir_all(into).unwrap();
    }
    fetched
}
