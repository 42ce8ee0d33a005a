//! Volumes on layers that are not whole on the node, or not there at all.

use std::ops::Range;
use std::sync::Barrier;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::io::Errno;

use super::super::compact::Compacted;
use super::compact::compact;
use super::*;
use crate::error::Result;
use crate::layer::{Fetched, LazyLayers, Origin, is_partial};
use crate::node::NodeStore;
use crate::object_store::faulty::{Faults, Faulty};
use crate::object_store::{self, Bucket, ObjectMeta, ObjectStore, Put};

const PAGE: usize = 8192;

/// A bucket that remembers which ranges it was asked for, and takes its time.
#[derive(Debug)]
struct Observed {
    store: Bucket,
    delay: Duration,
    ranges: Mutex<Vec<Range<u64>>>,
}

impl Observed {
    fn over(store: &Bucket, delay: Duration) -> Arc<Self> {
        Arc::new(Self { store: store.clone(), delay, ranges: Mutex::default() })
    }
}

#[async_trait]
impl ObjectStore for Observed {
    async fn get(&self, key: &str) -> Result<Bytes> {
        self.store.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.ranges.lock().push(range.clone());
        tokio::time::sleep(self.delay).await;
        self.store.get_range(key, range).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.store.put(key, bytes).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put> {
        self.store.put_if_absent(key, bytes).await
    }
    async fn put_file(&self, key: &str, file: &Path) -> Result<()> {
        self.store.put_file(key, file).await
    }
    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        self.store.head(key).await
    }
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.store.list(prefix, start_after).await
    }
    async fn delete(&self, key: &str) -> Result<()> {
        self.store.delete(key).await
    }
}

/// Runs something asynchronous from a test that is not: volumes block.
fn wait<T>(act: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(act)
}

/// Bytes that do not compress, different on every page.
fn noise(ino: Ino, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&ino.to_le_bytes()).update(&page.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A node that sealed two layers and uploaded them.
struct Source {
    node: Node,
    bucket_dir: tempfile::TempDir,
    bucket: Bucket,
    head: LayerId,
    /// What a volume on the head holds.
    contents: Contents,
    big: Ino,
}

const BIG_PAGES: u64 = 1200;

impl Source {
    fn new() -> Self {
        let node = Node::new();
        let volume = node.volume(0, node.empty);
        let big = create(&volume, "big");
        for page in 0..BIG_PAGES {
            volume.core.write(big, page * PAGE as u64, &noise(big, page)).unwrap();
        }
        let text = create(&volume, "text");
        volume.core.write(text, 0, &b"some text; ".repeat(3000)).unwrap();
        volume.core.truncate(text, 30_000).unwrap();
        let holes = create(&volume, "holes");
        volume.core.write(holes, 100 * PAGE as u64, &[0; 3 * PAGE]).unwrap();
        volume.core.write(holes, 400 * PAGE as u64, b"end").unwrap();
        volume.seal(LayerId::generate()).unwrap();
        volume.core.write(big, 700 * PAGE as u64, &[7; 5 * PAGE]).unwrap();
        volume.core.write(text, 20_000, b"changed").unwrap();
        std::fs::write(node.dirs(0).branch.join("roles.json"), "{\"app\":null}").unwrap();
        let head = volume.seal(LayerId::generate()).unwrap().layer;
        let contents = contents(&volume);
        let bucket_dir = tempfile::tempdir().unwrap();
        let bucket = wait(object_store::open(bucket_dir.path().to_str().unwrap())).unwrap();
        let source = Self { node, bucket_dir, bucket, head, contents, big };
        source.upload();
        source
    }

    fn upload(&self) {
        let store = NodeStore::new(self.node.dir.path(), self.bucket.clone());
        wait(async {
            for layer in store.manifest(self.head).await.unwrap().chain {
                store.upload(layer).await.unwrap();
            }
        });
    }
}

/// A node that begins with nothing.
struct Cold {
    dir: tempfile::TempDir,
    store: NodeStore,
}

impl Cold {
    fn new(bucket: Bucket) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = NodeStore::new(dir.path(), bucket);
        Self { dir, store }
    }

    fn dirs(&self, layers: Option<Arc<LazyLayers>>) -> VolumeDirs {
        VolumeDirs { layers: self.dir.path().join("layers"), branch: self.dir.path().join("branch"), source: layers }
    }

    /// A volume on an image of which nothing was here.
    fn volume(&self, head: LayerId) -> Arc<Volume> {
        wait(self.store.ensure_openable(head)).unwrap();
        let dirs = self.dirs(Some(self.store.lazy_layers().clone()));
        Volume::create(&dirs, head).unwrap();
        Volume::open(&dirs).unwrap()
    }

    fn fetched(&self) -> Fetched {
        self.store.lazy_layers().fetched()
    }

    fn layer(&self, layer: LayerId) -> PathBuf {
        self.dir.path().join("layers").join(layer.to_string())
    }
}

fn page_of(volume: &Volume, ino: Ino, page: u64) -> std::result::Result<Vec<u8>, Errno> {
    let mut bytes = vec![0xEE; PAGE];
    let read = volume.core.read(ino, page * PAGE as u64, &mut bytes)?;
    assert_eq!(read, PAGE);
    Ok(bytes)
}

#[test]
fn a_page_is_fetched_when_it_is_read_and_every_page_is_right() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    let volume = cold.volume(source.head);
    assert!(volume.reads_lazily());
    assert_eq!(std::fs::read(cold.layer(source.head).join("roles.json")).unwrap(), b"{\"app\":null}");
    let before = cold.fetched();
    assert_eq!(page_of(&volume, source.big, 300).unwrap(), noise(source.big, 300));
    let first = cold.fetched();
    assert_eq!((first.requests - before.requests, first.frames - before.frames), (1, 1));
    for page in [1199, 0, 5, 700, 704, 705, 699] {
        let expected = if (700..705).contains(&page) { vec![7; PAGE] } else { noise(source.big, page) };
        assert_eq!(page_of(&volume, source.big, page).unwrap(), expected, "page {page}");
    }
    assert!(cold.fetched().bytes < 1 << 20, "{:?}", cold.fetched());
    assert_same(&contents(&volume), &source.contents, "all of it");
    volume.core.write(source.big, 10 * PAGE as u64 + 5, b"in the middle of a page").unwrap();
    let mut expected = noise(source.big, 10);
    expected[5..28].copy_from_slice(b"in the middle of a page");
    assert_eq!(page_of(&volume, source.big, 10).unwrap(), expected);
}

#[test]
fn a_write_and_a_cut_in_the_middle_of_pages_that_are_not_here() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    let volume = cold.volume(source.head);
    volume.core.write(source.big, 40 * PAGE as u64 + 8000, &[1; 400]).unwrap();
    volume.core.truncate(source.big, 900 * PAGE as u64 + 100).unwrap();
    let bytes = read_all(&volume, source.big);
    assert_eq!(bytes.len(), 900 * PAGE + 100);
    assert_eq!(bytes[900 * PAGE..], noise(source.big, 900)[..100]);
    assert_eq!(bytes[40 * PAGE..][..8000], noise(source.big, 40)[..8000]);
    assert_eq!(bytes[41 * PAGE + 208..][..100], noise(source.big, 41)[208..308]);
    let sealed = volume.seal(LayerId::generate()).unwrap();
    assert!(sealed.new, "a volume on partial layers is sealed like any other");
    assert_eq!(read_all(&volume, source.big), bytes);
}

#[test]
fn many_readers_of_one_frame_make_one_request() {
    let source = Source::new();
    let observed = Observed::over(&source.bucket, Duration::from_millis(100));
    let cold = Cold::new(observed.clone());
    let volume = cold.volume(source.head);
    page_of(&volume, source.big, 0).unwrap();
    observed.ranges.lock().clear();
    let barrier = Barrier::new(16);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            let (volume, barrier, big) = (&volume, &barrier, source.big);
            scope.spawn(move || {
                barrier.wait();
                assert_eq!(page_of(volume, big, 320).unwrap(), noise(big, 320));
            });
        }
    });
    assert_eq!(observed.ranges.lock().len(), 1);
}

#[test]
fn neighbouring_frames_make_one_request_and_reading_in_order_reads_ahead() {
    let source = Source::new();
    let observed = Observed::over(&source.bucket, Duration::ZERO);
    let cold = Cold::new(observed.clone());
    let volume = cold.volume(source.head);
    page_of(&volume, source.big, 1100).unwrap();
    observed.ranges.lock().clear();
    let mut bytes = vec![0; 128 * PAGE];
    volume.core.read(source.big, 0, &mut bytes).unwrap();
    assert_eq!(bytes[127 * PAGE..], noise(source.big, 127));
    assert_eq!(observed.ranges.lock().len(), 1, "eight frames or nine, one request");
    for page in 128..690 {
        assert_eq!(page_of(&volume, source.big, page).unwrap(), noise(source.big, page));
    }
    let requests = observed.ranges.lock().len();
    assert!(requests < 20, "{requests} requests for 36 frames in order");
}

#[test]
fn what_waits_for_the_bucket_stops_nothing_else() {
    let source = Source::new();
    let observed = Observed::over(&source.bucket, Duration::from_millis(400));
    let cold = Cold::new(observed.clone());
    let volume = cold.volume(source.head);
    page_of(&volume, source.big, 0).unwrap();
    let other = create(&volume, "other");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| volume.core.write(source.big, 500 * PAGE as u64 + 1, b"x").unwrap());
        while observed.ranges.lock().last().is_none_or(|range| range.start < 1 << 20) {
            std::thread::yield_now();
        }
        page_of(&volume, source.big, 0).unwrap();
        volume.core.write(source.big, 0, &[3; PAGE]).unwrap();
        volume.core.write(other, 0, &[1; PAGE]).unwrap();
        volume.begin_seal(LayerId::generate()).unwrap();
        assert!(!waiting.is_finished(), "all that was done while somebody waited");
    });
    volume.finish_seals().unwrap();
    assert_eq!(
        page_of(&volume, source.big, 500).unwrap()[..3],
        [noise(source.big, 500)[0], b'x', noise(source.big, 500)[2]]
    );
}

#[test]
fn whatever_was_filled_when_it_was_killed_is_gone_on_from() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    drop({
        let volume = cold.volume(source.head);
        for page in (0..BIG_PAGES).step_by(100) {
            page_of(&volume, source.big, page).unwrap();
        }
        volume
    });
    // Killed after pages were written and before their frames were noted: any of them may be missing.
    let chain = wait(cold.store.manifest(source.head)).unwrap().chain;
    let mut noted = 0;
    for (number, layer) in chain.iter().filter(|layer| cold.layer(**layer).join("have").exists()).enumerate() {
        let path = cold.layer(*layer).join("have");
        let mut have = std::fs::read(&path).unwrap();
        noted += have[64..].iter().filter(|&&byte| byte == 1).count();
        have[64..].iter_mut().skip(number).step_by(3).for_each(|byte| *byte = 0);
        std::fs::write(&path, have).unwrap();
    }
    assert!(noted > 5);
    let layers = LazyLayers::new(&cold.dir.path().join("layers"), Origin::Bucket(source.bucket.clone()));
    let volume = Volume::open(&cold.dirs(Some(layers.clone()))).unwrap();
    assert_same(&contents(&volume), &source.contents, "after a kill");
    assert!(layers.fetched().frames > 0);
}

#[test]
fn a_partial_layer_of_another_run_of_the_machine_is_garbage() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    wait(cold.store.ensure_openable(source.head)).unwrap();
    let have = cold.layer(source.head).join("have");
    let mut bytes = std::fs::read(&have).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&have, &bytes).unwrap();
    let again = NodeStore::new(cold.dir.path(), source.bucket.clone());
    wait(again.ensure_openable(source.head)).unwrap();
    assert_ne!(std::fs::read(&have).unwrap(), bytes, "it was fetched anew");
    bytes[40] ^= 1;
    std::fs::write(&have, &bytes).unwrap();
    wait(again.remove_leftovers()).unwrap();
    assert!(!cold.layer(source.head).exists());
}

#[test]
fn nothing_is_fetched_to_be_compacted() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    let volume = cold.volume(source.head);
    page_of(&volume, source.big, 600).unwrap();
    let before = cold.fetched();
    assert_eq!(compact(&volume, 0), Compacted { before: 2, layers: 2, pages: 0 });
    assert_eq!(cold.fetched(), before);
    // One layer becomes whole while it is open, and the other had not been opened.
    let chain = wait(cold.store.manifest(source.head)).unwrap().chain;
    for layer in &chain {
        wait(cold.store.lazy_layers().complete(*layer)).unwrap();
    }
    let before = cold.fetched();
    let compacted = compact(&volume, 0);
    assert!(compacted.layers == 0 && compacted.pages > BIG_PAGES, "{compacted:?}");
    assert_eq!(cold.fetched(), before);
    chain.iter().for_each(|layer| std::fs::remove_dir_all(cold.layer(*layer).join("data")).unwrap());
    assert_same(&contents(&volume), &source.contents, "out of the upper");
}

#[test]
fn filled_up_it_is_whole_and_needs_no_bucket() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    let volume = cold.volume(source.head);
    page_of(&volume, source.big, 600).unwrap();
    volume.hydrate().unwrap();
    let chain = wait(cold.store.manifest(source.head)).unwrap().chain;
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while chain.iter().any(|layer| !cold.layer(*layer).join("manifest").exists() || is_partial(&cold.layer(*layer))) {
        assert!(std::time::Instant::now() < deadline, "it was not filled");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::remove_dir_all(source.bucket_dir.path()).unwrap();
    assert_same(&contents(&volume), &source.contents, "through files that were open");
    drop(volume);
    let volume = Volume::open(&cold.dirs(None)).unwrap();
    assert_same(&contents(&volume), &source.contents, "without any source");
    for layer in chain {
        assert!(!cold.layer(layer).join("have").exists() && !cold.layer(layer).join("index").exists());
    }
}

#[test]
fn completing_a_partial_layer_gives_the_same_files_as_fetching_it_whole() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    let volume = cold.volume(source.head);
    page_of(&volume, source.big, 300).unwrap();
    drop(volume);
    let differs = wait(crate::layer::compare(&source.bucket, source.head, &cold.layer(source.head))).unwrap();
    assert_eq!(differs, Vec::<String>::new(), "while it is partial");
    wait(cold.store.ensure_local(source.head)).unwrap();
    let volume = Volume::open(&cold.dirs(None)).unwrap();
    assert_same(&contents(&volume), &source.contents, "completed");
    for layer in wait(cold.store.manifest(source.head)).unwrap().chain {
        let differs = wait(crate::layer::compare(&source.bucket, layer, &cold.layer(layer))).unwrap();
        assert_eq!(differs, Vec::<String>::new());
    }
}

#[test]
fn a_flipped_byte_is_an_error_and_never_data() {
    let node = Node::new();
    let volume = node.volume(0, node.empty);
    let ino = create(&volume, "file");
    for page in 0..40 {
        volume.core.write(ino, page * PAGE as u64, &format!("page {page}; ").repeat(1100).as_bytes()[..PAGE]).unwrap();
    }
    let head = volume.seal(LayerId::generate()).unwrap().layer;
    let right = contents(&volume);
    let bucket_dir = tempfile::tempdir().unwrap();
    let bucket = wait(object_store::open(bucket_dir.path().to_str().unwrap())).unwrap();
    wait(NodeStore::new(node.dir.path(), bucket.clone()).upload(head)).unwrap();
    let object = bucket_dir.path().join("layers").join(head.to_string());
    let whole = std::fs::read(&object).unwrap();
    let (mut refused, mut unreadable) = (0, 0);
    for at in (0..whole.len()).step_by((whole.len() / 60).max(1)).chain(whole.len() - 100..whole.len()) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&object, bytes).unwrap();
        let cold = Cold::new(bucket.clone());
        if wait(cold.store.ensure_openable(head)).is_err() {
            refused += 1;
            continue;
        }
        let dirs = cold.dirs(Some(cold.store.lazy_layers().clone()));
        Volume::create(&dirs, head).unwrap();
        let volume = Volume::open(&dirs).unwrap();
        let mut found = vec![0; 40 * PAGE];
        match volume.core.read(ino, 0, &mut found) {
            Ok(read) => {
                assert_eq!(right["/file"].0, Thing::File(found[..read].to_vec()), "byte {at} of {}", whole.len());
                // Nothing but the header is not needed to read all of it.
                assert!(at < 32, "byte {at} of {} was not looked at", whole.len());
            }
            Err(errno) => {
                assert_eq!(errno, Errno::IO);
                unreadable += 1;
            }
        }
    }
    assert!(refused > 50 && unreadable > 5, "{refused} refused, {unreadable} unreadable");
}

#[test]
fn a_bucket_that_fails_costs_errors_and_never_data() {
    let source = Source::new();
    for seed in seeds(3) {
        let faults = Faults { seed, refused: 0.2, torn: 0.1, corrupt: 0.2, ..Faults::default() };
        let faulty = Arc::new(Faulty::new(source.bucket.clone(), faults));
        let cold = Cold::new(faulty.clone());
        let opened = (0..100).find(|_| wait(cold.store.ensure_openable(source.head)).is_ok());
        assert!(opened.is_some(), "seed {seed}: it was never opened");
        let dirs = cold.dirs(Some(cold.store.lazy_layers().clone()));
        Volume::create(&dirs, source.head).unwrap();
        let volume = Volume::open(&dirs).unwrap();
        for page in (0..BIG_PAGES).filter(|page| !(700..705).contains(page)).step_by(13) {
            let read = (0..100).find_map(|_| page_of(&volume, source.big, page).ok());
            assert_eq!(read.expect("some try succeeds"), noise(source.big, page), "seed {seed}, page {page}");
        }
        let made = faulty.made();
        assert!(["refused", "torn", "corrupt"].iter().all(|fault| made.contains_key(fault)), "{made:?}");
    }
}

#[test]
fn a_boot_set_spares_the_next_cold_wake_its_requests() {
    let source = Source::new();
    let pages: Vec<u64> = (0..BIG_PAGES).step_by(29).chain([701]).collect();
    let volume = Volume::open(&source.node.dirs(0)).unwrap();
    volume.core.boot.start();
    for &page in &pages {
        page_of(&volume, source.big, page).unwrap();
    }
    volume.booted();
    page_of(&volume, source.big, 1).unwrap();
    volume.core.write(source.big, 29 * PAGE as u64, &[9; PAGE]).unwrap();
    let head = volume.seal(LayerId::generate()).unwrap().layer;
    volume.write_boot_set().unwrap();
    drop(volume);
    let source = Source { head, ..source };
    source.upload();

    let observed = Observed::over(&source.bucket, Duration::ZERO);
    let cold = Cold::new(observed.clone());
    let volume = cold.volume(head);
    observed.ranges.lock().clear();
    for &page in &pages {
        let expected = match page {
            29 => vec![9; PAGE],
            701 => vec![7; PAGE],
            page => noise(source.big, page),
        };
        assert_eq!(page_of(&volume, source.big, page).unwrap(), expected, "page {page}");
    }
    assert_eq!(observed.ranges.lock().len(), 0, "all of it came with the boot set");
    assert_eq!(cold.fetched().boot_pages, pages.len() as u64);
    assert_eq!(page_of(&volume, source.big, 1).unwrap(), noise(source.big, 1));
    assert!(!observed.ranges.lock().is_empty(), "what was read later did not");
    // A read that is partly in the boot set, partly not.
    let mut bytes = vec![0; 40 * PAGE];
    volume.core.read(source.big, 20 * PAGE as u64, &mut bytes).unwrap();
    for (page, found) in (20..).zip(bytes.chunks(PAGE)) {
        assert_eq!(found, if page == 29 { vec![9; PAGE] } else { noise(source.big, page) }, "page {page}");
    }

    // An image without one of its own uses that of the nearest layer below.
    let volume = Volume::open(&source.node.dirs(0)).unwrap();
    let small = create(&volume, "small");
    volume.core.write(small, 0, b"x").unwrap();
    let child = Source { head: volume.seal(LayerId::generate()).unwrap().layer, ..source };
    child.upload();
    drop(volume);
    let cold = Cold::new(child.bucket.clone());
    let volume = cold.volume(child.head);
    assert_eq!(page_of(&volume, child.big, 29).unwrap(), [9; PAGE]);
    assert_eq!(cold.fetched().boot_pages, 1);
}

#[test]
fn what_was_used_longest_ago_is_given_up_unless_it_is_in_use_or_nowhere_else() {
    let source = Source::new();
    let cold = Cold::new(source.bucket.clone());
    wait(cold.store.ensure_local(source.head)).unwrap();
    let chain = wait(cold.store.manifest(source.head)).unwrap().chain;
    let none = Default::default();
    let trim = |limit, kept: &_| wait(cold.store.trim_older(limit, kept, Duration::ZERO)).unwrap();
    assert_eq!(trim(u64::MAX, &none).evicted, 0);
    assert_eq!(wait(cold.store.trim(0, &none)).unwrap().evicted, 0, "all of it was used just now");
    let dirs = cold.dirs(Some(cold.store.lazy_layers().clone()));
    Volume::create(&dirs, source.head).unwrap();
    let volume = Volume::open(&dirs).unwrap();
    page_of(&volume, source.big, 3).unwrap();
    let kept = [source.head].into();
    assert_eq!(trim(0, &kept).evicted, chain.len() - 2, "one is kept, and one is read from");
    assert!(cold.layer(source.head).exists());
    assert_same(&contents(&volume), &source.contents, "with layers given up and fetched again");
    drop(volume);
    let trimmed = trim(0, &none);
    assert_eq!((trimmed.bytes, cold.layer(source.head).exists()), (0, false));
    wait(source.bucket.delete(&format!("layers/{}", source.head))).unwrap();
    let here = NodeStore::new(source.node.dir.path(), source.bucket.clone());
    wait(here.trim_older(0, &none, Duration::ZERO)).unwrap();
    assert!(source.node.layers().join(source.head.to_string()).exists(), "it is nowhere else");
}
