//! The layers of a node, and where to get those, or the parts of those, that it lacks.
//!
//! Volumes read from threads that may block, and which must not wait for each other: whoever needs a frame that another
//! thread is fetching waits for that one ([`Flight`]); other processes look at the layer's `have` first, and at worst
//! fetch the same bytes twice. Neighbouring frames are read with one request.
//!
//! What is fetched runs on threads of its own, which are started when something is missing for the first time.
//!
//! **Cancellation**: a fetch once begun goes on when nobody waits for it any more.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use ebb_types::LayerId;
use futures::future::join_all;
use parking_lot::{Condvar, Mutex};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Notify, OnceCell, Semaphore};

use super::Ino;
use super::boot::{BootSet, boot_key};
use super::fetch::object_key;
use super::lead::Lead;
use super::partial::{self, Partial, is_partial, is_stale};
use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use crate::node::Scratch;
use crate::object_store::{self, Bucket, BucketAt};

/// LIMIT: bytes of an object in one request. A frame has 10 to 100 KiB, so a request has many where many are wanted, and
/// none takes so long that a reader who needs its first frame had better asked alone.
const REQUEST_BYTES: u64 = 2 << 20;

/// LIMIT: requests at once for readers that wait; each has up to two megabytes in memory.
const URGENT_REQUESTS: usize = 16;

/// LIMIT: requests at once for what nobody waits for yet.
const QUIET_REQUESTS: usize = 2;

/// LIMIT: a frame that does not check is asked for again: the bytes may have been damaged on their way.
const TRIES: usize = 3;

/// LIMIT: threads that unpack what was fetched; there is a core for Postgres as well.
const THREADS: usize = 2;

/// LIMIT: images whose boot set may stand in for one that was never made, from the newest down.
const BOOT_SETS_TRIED: usize = 4;

/// While readers wait for frames, filling up in the background looks again so soon.
const YIELD: Duration = Duration::from_millis(10);

/// How soon filling up is tried again after a failure.
const RETRY: Duration = Duration::from_secs(30);

/// Where layers come from that this node does not have.
#[derive(Debug)]
pub enum Origin {
    /// An open bucket.
    Bucket(Bucket),
    /// A bucket that is opened when it is needed for the first time.
    At(BucketAt),
}

/// What was fetched, or answered otherwise, since this process began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fetched {
    /// Requests for frames.
    pub requests: u64,
    /// Frames.
    pub frames: u64,
    /// Bytes of those in the bucket.
    pub bytes: u64,
    /// Pages that were read from a boot set.
    pub boot_pages: u64,
}

/// The layers of a node, with what it takes to complete them.
#[derive(Debug)]
pub struct LazyLayers {
    layers_dir: PathBuf,
    origin: Origin,
    bucket: OnceCell<Bucket>,
    runtime: OnceLock<Option<Runtime>>,
    /// The partial layers that somebody uses.
    open: Mutex<HashMap<LayerId, Weak<Partial>>>,
    /// Held by whoever opens a layer that nobody has open.
    opening: Mutex<HashMap<LayerId, Weak<tokio::sync::Mutex<()>>>>,
    urgent: Semaphore,
    quiet: Semaphore,
    /// Readers that wait just now.
    waiting: AtomicU64,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    frames: AtomicU64,
    bytes: AtomicU64,
    boot_pages: AtomicU64,
}

/// How a layer was found.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// All of it is on this node.
    Whole,
    /// Some of it is.
    Partial(Arc<Partial>),
}

/// Whether somebody waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Haste {
    Urgent,
    Quiet,
}

/// Neighbouring frames that are fetched with one request.
struct Batch {
    frames: Range<u32>,
    bytes: u64,
    flight: Arc<Flight>,
}

impl LazyLayers {
    /// The layers below `layers_dir`. Touches nothing.
    pub fn new(layers_dir: &Path, origin: Origin) -> Arc<Self> {
        Arc::new(Self {
            layers_dir: layers_dir.to_owned(),
            origin,
            bucket: OnceCell::new(),
            runtime: OnceLock::new(),
            open: Mutex::default(),
            opening: Mutex::default(),
            urgent: Semaphore::new(URGENT_REQUESTS),
            quiet: Semaphore::new(QUIET_REQUESTS),
            waiting: AtomicU64::new(0),
            counts: Counts::default(),
        })
    }

    /// What was fetched so far.
    pub fn fetched(&self) -> Fetched {
        let Counts { requests, frames, bytes, boot_pages } = &self.counts;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Fetched { requests: read(requests), frames: read(frames), bytes: read(bytes), boot_pages: read(boot_pages) }
    }

    pub(crate) fn count_boot_page(&self) {
        self.counts.boot_pages.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a layer is on this node, and all of it.
    pub(crate) fn is_whole(&self, layer: LayerId) -> bool {
        let dir = self.layer_dir(layer);
        !is_partial(&dir) && dir.join("manifest").exists()
    }

    /// Makes a layer readable: afterwards its directory is here, and pages that are not come when they are asked for.
    ///
    /// # Errors
    /// `NoSuchLayer` when neither this node nor the bucket has it; `Corrupt` when what leads to its pages does not check.
    pub(crate) async fn open(&self, layer: LayerId) -> Result<Found> {
        self.open_counting(layer).await.map(|(found, _)| found)
    }

    /// As [`LazyLayers::open`], and tells whether it was not here at all before.
    async fn open_counting(&self, layer: LayerId) -> Result<(Found, bool)> {
        if let Some(partial) = self.known(layer) {
            return Ok((Found::Partial(partial), false));
        }
        let turn = self.turn(layer);
        let _turn = turn.lock().await;
        if let Some(partial) = self.known(layer) {
            return Ok((Found::Partial(partial), false));
        }
        if let Some(found) = self.look(layer).await? {
            return Ok((found, false));
        }
        let bucket = self.bucket().await?;
        let lead = Lead::read(&bucket, layer).await?;
        metrics::counter!("ebb_storage_layers_opened_total").increment(1);
        let layers_dir = self.layers_dir.clone();
        blocking::run(move || {
            let scratch = Scratch::make_dir(&layers_dir, "fetch", layer)?;
            partial::create(layer, &lead, &scratch.path)?;
            let dir = layers_dir.join(layer.to_string());
            match fs::rename(&scratch.path, &dir) {
                // Another process was first.
                Err(_) if dir.join("manifest").exists() => Ok(()),
                renamed => renamed.on("rename a layer to", &dir),
            }
        })
        .await?;
        match self.look(layer).await? {
            Some(found) => Ok((found, true)),
            None => Err(Error::NoSuchLayer(layer)),
        }
    }

    /// Makes an image ready to be started from: its own layer's manifest, WAL and roles are whole, its pages can be read
    /// (see [`LazyLayers::open`]), and its boot set is beside them if there is one. The layers below are not touched.
    ///
    /// # Errors
    /// As [`LazyLayers::open`], and as the bucket's.
    pub async fn ensure_openable(self: &Arc<Self>, head: LayerId) -> Result<()> {
        // Nobody needs the boot set of an image that is here.
        let (is_here, wanted) = (self.layer_dir(head).join("manifest").exists(), boot_key(head));
        let boot = async {
            match is_here {
                true => Ok(None),
                false => self.boot_object(&wanted).await,
            }
        };
        let (opened, boot) = tokio::join!(self.open_counting(head), boot);
        let (found, is_new) = opened?;
        let start = async {
            match &found {
                Found::Whole => Ok(()),
                Found::Partial(partial) => self.fetch(partial, partial.frames_to_start(), Haste::Urgent).await,
            }
        };
        let boot_set = async {
            match boot {
                _ if !is_new => Ok(None),
                Ok(Some(bytes)) => Ok(Some(bytes)),
                Ok(None) => self.older_boot_object(head).await,
                Err(error) => Err(error),
            }
        };
        let (started, boot_set) = tokio::join!(start, boot_set);
        started?;
        match boot_set {
            Ok(Some(bytes)) => self.keep_boot_object(head, bytes).await,
            Ok(None) => {}
            Err(error) => tracing::warn!(%head, %error, "no boot set was fetched: the wake will be slower"),
        }
        Ok(())
    }

    async fn boot_object(&self, key: &str) -> Result<Option<bytes::Bytes>> {
        match self.bucket().await?.get(key).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::NoSuchObject { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The boot set of the nearest layer below that has one.
    async fn older_boot_object(&self, head: LayerId) -> Result<Option<bytes::Bytes>> {
        let dir = self.layer_dir(head);
        let manifest = blocking::run(move || crate::node::read_manifest(head, &dir)).await?;
        let keys: Vec<_> = manifest.chain.iter().rev().skip(1).take(BOOT_SETS_TRIED).copied().map(boot_key).collect();
        let found = join_all(keys.iter().map(|key| self.boot_object(key))).await;
        found.into_iter().find(|found| !matches!(found, Ok(None))).unwrap_or(Ok(None))
    }

    async fn keep_boot_object(&self, head: LayerId, bytes: bytes::Bytes) {
        let path = self.layer_dir(head).join("boot");
        let kept = blocking::run(move || {
            BootSet::decode(&format!("the boot set of layer {head}"), &bytes)?;
            // Read only by units, which are started after this.
            fs::write(&path, &bytes).on("write", &path)
        });
        if let Err(error) = kept.await {
            tracing::error!(%head, %error, "a boot set is not used");
        }
    }

    /// Makes a layer whole that is partial on this node.
    ///
    /// # Errors
    /// `NoSuchLayer` when there is neither; `Corrupt` when any byte of it is not what was packed.
    pub(crate) async fn complete(self: &Arc<Self>, layer: LayerId) -> Result<()> {
        let Found::Partial(partial) = self.open(layer).await? else { return Ok(()) };
        // Not all at once: what waits in between would keep others waiting.
        while let Some(next) = self.next_batch(&partial, 0) {
            self.fetch(&partial, next, Haste::Urgent).await?;
        }
        blocking::run(move || partial.become_whole()).await
    }

    /// The first frames from `from` on that are missing, as many as one request takes.
    fn next_batch(&self, partial: &Partial, from: u32) -> Option<Range<u32>> {
        let end = partial.all_frames().end;
        let first = (from..end).find(|&frame| !partial.has(frame))?;
        let is_room = |frame: &u32| {
            let bytes = partial.range_of(&(first..frame + 1));
            !partial.has(*frame) && (*frame == first || bytes.end - bytes.start <= REQUEST_BYTES)
        };
        Some(first..(first..end).take_while(is_room).last().unwrap_or(first) + 1)
    }

    /// Fetches the pages of a file that are missing, and waits for them. For threads that may block.
    ///
    /// # Errors
    /// As the bucket's, and `Corrupt`.
    pub(crate) fn ensure(self: &Arc<Self>, partial: &Arc<Partial>, ino: Ino, pages: Range<u32>) -> Result<()> {
        let flights = self.launch(&self.handle()?, partial, partial.frames_of(ino, pages), Haste::Urgent);
        if flights.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let outcome = flights.iter().try_for_each(|flight| flight.wait());
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        metrics::histogram!("ebb_storage_layer_read_wait_seconds").record(began.elapsed());
        outcome
    }

    /// Begins to fetch pages of a file that will be read soon.
    pub(crate) fn read_ahead(self: &Arc<Self>, partial: &Arc<Partial>, ino: Ino, pages: Range<u32>) {
        if let Ok(handle) = self.handle() {
            self.launch(&handle, partial, partial.frames_of(ino, pages), Haste::Quiet);
        }
    }

    /// As [`LazyLayers::open`], for threads that may block.
    pub(crate) fn open_blocking(self: &Arc<Self>, layer: LayerId) -> Result<Found> {
        if let Some(partial) = self.known(layer) {
            return Ok(Found::Partial(partial));
        }
        let (layers, outcome) = (self.clone(), Arc::new(OnceLock::new()));
        let (flight, told) = (Arc::new(Flight::default()), outcome.clone());
        let landing = Landing { flight: flight.clone(), frames: None };
        self.handle()?.spawn(async move {
            let result = layers.open(layer).await;
            landing.with(result.map(|found| drop(told.set(found))));
        });
        flight.wait()?;
        outcome.get().cloned().ok_or(Error::NoSuchLayer(layer))
    }

    /// Gets ready to fetch, so that the first who needs something does not wait for a connection as well.
    pub(crate) fn warm_up(self: &Arc<Self>) -> Result<()> {
        let layers = self.clone();
        self.handle()?.spawn(async move {
            if let Err(error) = layers.bucket().await {
                tracing::warn!(%error, "the bucket cannot be opened yet");
            }
        });
        Ok(())
    }

    /// Fills these layers, the last first, a request at a time and not while readers wait, and calls `done` when all of
    /// them are whole. Ends early when nobody uses `self` any more.
    ///
    /// # Errors
    /// If threads cannot be started.
    pub(crate) fn hydrate(self: &Arc<Self>, chain: Vec<LayerId>, done: impl FnOnce() + Send + 'static) -> Result<()> {
        let layers = Arc::downgrade(self);
        self.handle()?.spawn(async move {
            for &layer in chain.iter().rev() {
                loop {
                    let Some(layers) = layers.upgrade() else { return };
                    match layers.hydrate_one(layer).await {
                        Ok(()) => break,
                        Err(error) => tracing::warn!(%layer, %error, "a layer was not filled; it is tried again"),
                    }
                    drop(layers);
                    tokio::time::sleep(RETRY).await;
                }
            }
            done();
        });
        Ok(())
    }

    async fn hydrate_one(self: &Arc<Self>, layer: LayerId) -> Result<()> {
        if self.is_whole(layer) {
            return Ok(());
        }
        let Found::Partial(partial) = self.open(layer).await? else { return Ok(()) };
        let mut from = 0;
        while let Some(next) = self.next_batch(&partial, from) {
            while self.waiting.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(YIELD).await;
            }
            from = next.end;
            let began = Instant::now();
            self.fetch(&partial, next, Haste::Quiet).await?;
            // Half of the time belongs to others: processors, disk and network.
            tokio::time::sleep(began.elapsed()).await;
        }
        metrics::counter!("ebb_storage_layers_filled_total").increment(1);
        let filled = partial.clone();
        blocking::run(move || filled.become_whole()).await?;
        tracing::info!(%layer, "layer is whole");
        Ok(())
    }

    /// Fetches frames, unless they are here, and waits for them.
    async fn fetch(
        self: &Arc<Self>,
        partial: &Arc<Partial>,
        frames: impl Iterator<Item = u32>,
        haste: Haste,
    ) -> Result<()> {
        let flights = self.launch(&Handle::current(), partial, frames, haste);
        for flight in flights {
            flight.landed().await?;
        }
        Ok(())
    }

    /// Begins to fetch whichever of these frames is not here, and answers what to wait for. Each frame is fetched once.
    fn launch(
        self: &Arc<Self>,
        handle: &Handle,
        partial: &Arc<Partial>,
        frames: impl Iterator<Item = u32>,
        haste: Haste,
    ) -> Vec<Arc<Flight>> {
        let (mut waits, mut batches) = (Vec::<Arc<Flight>>::new(), Vec::<Batch>::new());
        let mut flights = partial.flights.lock();
        for frame in frames {
            if partial.has(frame) {
                continue;
            }
            if let Some(flight) = flights.get(&frame) {
                waits.push(flight.clone());
                continue;
            }
            if partial.has_now(frame) {
                continue;
            }
            let range = partial.range_of(&(frame..frame + 1));
            let bytes = range.end - range.start;
            match batches.last_mut() {
                Some(last) if last.frames.end == frame && last.bytes + bytes <= REQUEST_BYTES => {
                    last.frames.end += 1;
                    last.bytes += bytes;
                    flights.insert(frame, last.flight.clone());
                }
                _ => {
                    let flight = Arc::new(Flight::default());
                    flights.insert(frame, flight.clone());
                    batches.push(Batch { frames: frame..frame + 1, bytes, flight });
                }
            }
        }
        drop(flights);
        for Batch { frames, flight, .. } in batches {
            waits.push(flight.clone());
            let (layers, partial) = (self.clone(), partial.clone());
            let landing = Landing { flight, frames: Some((partial.clone(), frames.clone())) };
            handle.spawn(async move {
                let outcome = layers.fetch_batch(&partial, frames, haste).await;
                landing.with(outcome);
            });
        }
        waits
    }

    async fn fetch_batch(&self, partial: &Arc<Partial>, frames: Range<u32>, haste: Haste) -> Result<()> {
        let permits = if haste == Haste::Urgent { &self.urgent } else { &self.quiet };
        let _permit = permits.acquire().await.map_err(|_| Error::Invalid("fetching has ended".to_owned()))?;
        let bucket = self.bucket().await?;
        let mut tries = 1;
        loop {
            match self.try_batch(&bucket, partial, frames.clone()).await {
                Err(error @ Error::Corrupt { .. }) if tries < TRIES => {
                    tracing::warn!(%error, tries, "what was fetched does not check, and is fetched again");
                    tries += 1;
                }
                Err(error) => {
                    tracing::error!(layer = %partial.id, error = chain(&error), "pages cannot be fetched");
                    return Err(error);
                }
                done => return done,
            }
        }
    }

    async fn try_batch(&self, bucket: &Bucket, partial: &Arc<Partial>, frames: Range<u32>) -> Result<()> {
        let range = partial.range_of(&frames);
        let (count, length) = (u64::from(frames.end - frames.start), range.end - range.start);
        let bytes = bucket.get_range(&object_key(partial.id), range).await?;
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        let partial = partial.clone();
        blocking::run(move || partial.fill(frames, &bytes)).await?;
        self.counts.frames.fetch_add(count, Ordering::Relaxed);
        self.counts.bytes.fetch_add(length, Ordering::Relaxed);
        metrics::counter!("ebb_storage_layer_frames_fetched_total").increment(count);
        metrics::counter!("ebb_storage_layer_bytes_fetched_total").increment(length);
        Ok(())
    }

    /// Forgets a layer that is no longer on this node.
    pub(crate) fn forget(&self, layer: LayerId) {
        self.open.lock().remove(&layer);
    }

    fn layer_dir(&self, layer: LayerId) -> PathBuf {
        self.layers_dir.join(layer.to_string())
    }

    fn known(&self, layer: LayerId) -> Option<Arc<Partial>> {
        self.open.lock().get(&layer).and_then(Weak::upgrade)
    }

    fn turn(&self, layer: LayerId) -> Arc<tokio::sync::Mutex<()>> {
        let mut opening = self.opening.lock();
        opening.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = opening.get(&layer).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        opening.insert(layer, Arc::downgrade(&turn));
        turn
    }

    /// What this node has of a layer. Removes what is stale.
    async fn look(&self, layer: LayerId) -> Result<Option<Found>> {
        let (dir, layers_dir) = (self.layer_dir(layer), self.layers_dir.clone());
        let found = blocking::run(move || look(layer, &dir, &layers_dir)).await?;
        if let Some(Found::Partial(partial)) = &found {
            let mut open = self.open.lock();
            open.retain(|_, partial| partial.strong_count() > 0);
            open.insert(layer, Arc::downgrade(partial));
        }
        Ok(found)
    }

    async fn bucket(&self) -> Result<Bucket> {
        match &self.origin {
            Origin::Bucket(bucket) => Ok(bucket.clone()),
            Origin::At(at) => self.bucket.get_or_try_init(|| object_store::attach(at)).await.cloned(),
        }
    }

    /// The threads that fetch for those that wait.
    fn handle(&self) -> Result<Handle> {
        let start = || {
            let runtime =
                Builder::new_multi_thread().worker_threads(THREADS).thread_name("layers").enable_all().build();
            runtime.inspect_err(|error| tracing::error!(%error, "threads to fetch with cannot be started")).ok()
        };
        match self.runtime.get_or_init(start) {
            Some(runtime) => Ok(runtime.handle().clone()),
            None => Err(Error::Invalid("there are no threads to fetch with".to_owned())),
        }
    }
}

impl Drop for LazyLayers {
    fn drop(&mut self) {
        // Not waiting for it: the last one to let go may be one of its own threads.
        if let Some(Some(runtime)) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn look(layer: LayerId, dir: &Path, layers_dir: &Path) -> Result<Option<Found>> {
    if !dir.join("manifest").exists() {
        return Ok(None);
    }
    if !is_partial(dir) {
        return Ok(Some(Found::Whole));
    }
    if is_stale(layer, dir)? && is_partial(dir) {
        tracing::info!(%layer, "what an earlier run of this machine had of a layer is removed");
        let scratch = Scratch::new(layers_dir, "remove", layer);
        fs::rename(dir, &scratch.path).on("remove", dir)?;
        return Ok(None);
    }
    match Partial::open(layer, dir)? {
        Some(partial) => Ok(Some(Found::Partial(Arc::new(partial)))),
        // It became whole meanwhile, or was removed.
        None => Ok(dir.join("manifest").exists().then_some(Found::Whole)),
    }
}

/// Somebody is fetching; others wait.
#[derive(Debug, Default)]
pub(super) struct Flight {
    outcome: Mutex<Option<Result<(), Error>>>,
    landed: Condvar,
    told: Notify,
}

impl Flight {
    fn wait(&self) -> Result<()> {
        let mut outcome = self.outcome.lock();
        self.landed.wait_while(&mut outcome, |outcome| outcome.is_none());
        outcome.as_ref().map_or(Ok(()), |outcome| outcome.as_ref().map_err(again).copied())
    }

    async fn landed(&self) -> Result<()> {
        loop {
            let told = self.told.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            if self.outcome.lock().is_some() {
                return self.wait();
            }
            told.await;
        }
    }
}

/// Ends a flight in any case: also one whose task is dropped.
struct Landing {
    flight: Arc<Flight>,
    frames: Option<(Arc<Partial>, Range<u32>)>,
}

impl Landing {
    fn with(self, outcome: Result<()>) {
        self.flight.outcome.lock().get_or_insert(outcome);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if let Some((partial, frames)) = &self.frames {
            let mut flights = partial.flights.lock();
            frames.clone().for_each(|frame| drop(flights.remove(&frame)));
        }
        let cut_off = || Err(Error::Invalid("fetching was cut off".to_owned()));
        self.flight.outcome.lock().get_or_insert_with(cut_off);
        self.flight.landed.notify_all();
        self.flight.told.notify_waiters();
    }
}

/// The same error for one more of those who waited.
fn again(error: &Error) -> Error {
    let same = |source: &io::Error| match source.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(source.kind(), source.to_string()),
    };
    match error {
        Error::Local { act, path, source } => Error::Local { act, path: path.clone(), source: same(source) },
        Error::NoSuchObject { key } => Error::NoSuchObject { key: key.clone() },
        Error::Bucket { act, key, source } => Error::Bucket { act, key: key.clone(), source: same(source) },
        Error::Unusable { kind, what, hint } => Error::Unusable { kind: *kind, what: what.clone(), hint: hint.clone() },
        Error::Overtaken { log, seq } => Error::Overtaken { log: log.clone(), seq: *seq },
        Error::Corrupt { what, why } => Error::Corrupt { what: what.clone(), why: why.clone() },
        Error::NoSuchLayer(layer) => Error::NoSuchLayer(*layer),
        Error::NoSuchWal { archive, pg_timeline, to } => {
            Error::NoSuchWal { archive: archive.clone(), pg_timeline: *pg_timeline, to: *to }
        }
        Error::Invalid(why) => Error::Invalid(why.clone()),
    }
}

/// An error with its causes.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
