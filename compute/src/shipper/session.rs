//! The shipper's task: a session with Postgres after the other, each of which finds where to go on, and goes on.

use std::fs::File;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use ebb_storage::archive::{Archive, Claim, Owner, SPAN_BYTES_MAX, Span, Start, Tail, Writer, WriterStats};
use ebb_storage::layer::Origin;
use ebb_storage::object_store;
use ebb_storage::pg_files::{WalSegment, switches_in};
use ebb_types::{ErrorKind, Lsn, Timestamp};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::slot::{self, Slot};
use super::{DRAIN_DEADLINE, End, LOCAL_BYTES, LOCAL_DELAY, Orders, Plan, STANDBY, SharedProgress, look};
use crate::control::Durability;
use crate::error::chain;
use crate::postgres::config::PORT;
use crate::replication::wire::{self, Connection, MESSAGE_BYTES_MAX, Message, Stream, System};

/// How often Postgres hears of the shipper at least: it gives up one that is silent for a minute (`wal_sender_timeout`).
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// LIMIT: WAL that is on disk is sent at once.
const COMPARE_DEADLINE: Duration = Duration::from_secs(30);

/// LIMIT: how long Postgres is left with what it cannot send. A walsender that is stuck cannot let go of its slot, and the
/// `pg_checkpoint` that gives the slot up waits for it (PostgreSQL 15 `slot.c`, `InvalidatePossiblyObsoleteSlot`).
const FULL_DEADLINE: Duration = Duration::from_secs(10);

/// The longest pause before another try.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// LIMIT: a put of a writer that is dead may still take a stretch's number; a living one takes it again and again.
const OPENINGS_LOST_MAX: u32 = 3;

/// What Postgres answers when it has deleted the WAL that is asked for: `undefined_file`.
const REMOVED: &str = "58P01";

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Postgres must be stopped.
    #[error("{0}")]
    Stop(String),
    /// Postgres has sent all there is: of this Postgres timeline, or before it shuts down.
    #[error("postgres ended the stream")]
    Ended,
    /// Another session may do better.
    #[error("{0}")]
    Again(&'static str),
    #[error(transparent)]
    Wire(#[from] wire::Error),
    #[error(transparent)]
    Slot(#[from] slot::Error),
    #[error("the WAL archive does not take WAL")]
    Archive(#[source] ebb_storage::Error),
}

impl From<ebb_storage::Error> for Failure {
    fn from(error: ebb_storage::Error) -> Self {
        match error.kind() {
            ErrorKind::Fenced => Failure::Stop(format!("another writer has taken over the branch: {}", chain(&error))),
            _ => Failure::Archive(error),
        }
    }
}

/// What the next session may ask for, after Postgres has said that it does not have some WAL any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resume {
    /// Everything since the archive's newest span began.
    AtTail,
    /// Everything since the segment in which it ends.
    AtTailSegment,
    /// What there is.
    AfterGap,
}

/// Where a stretch begins.
#[derive(Debug)]
struct Begin {
    pg_timeline: u32,
    lsn: Lsn,
    /// Whether WAL is missing before it, or may be.
    gap: Option<String>,
}

/// The shipper.
pub(super) struct Task {
    plan: Plan,
    progress: SharedProgress,
    orders: watch::Receiver<Orders>,
    writer: Option<Box<Writer>>,
    resume: Resume,
    openings_lost: u32,
}

/// What a session works with.
struct Ready {
    stream: Stream,
    writer: Box<Writer>,
    /// WAL that came already.
    buffer: Buffer,
}

impl Task {
    pub fn new(plan: Plan, progress: SharedProgress, orders: watch::Receiver<Orders>) -> Self {
        Self { plan, progress, orders, writer: None, resume: Resume::AtTail, openings_lost: 0 }
    }

    /// Ships until it is told to drain, or must not.
    pub async fn run(mut self) -> End {
        let mut pause = Pause::default();
        let mut wait = self.plan.delay;
        loop {
            tokio::select! {
                () = sleep(wait) => {}
                () = draining(self.orders.clone()) => return End::GaveUp,
            }
            let failure = match self.session(&mut pause).await {
                Ok(()) => return End::Drained,
                Err(Failure::Stop(why)) => return End::Stop(why),
                Err(failure) => chain(&failure),
            };
            look(&self.progress).streaming = false;
            note_failure(&self.progress, failure);
            wait = pause.next();
        }
    }

    async fn session(&mut self, pause: &mut Pause) -> Result<(), Failure> {
        let stopping = draining(self.orders.clone());
        let prepared = tokio::select! {
            prepared = self.prepare() => prepared,
            // Postgres does not wait for who is not streaming.
            () = stopping => return Err(Failure::Again("postgres is being stopped")),
        };
        let shipped = match prepared {
            Ok(ready) => {
                *pause = Pause::default();
                self.ship(ready).await
            }
            Err(failure) => Err(failure),
        };
        if let Err(Failure::Wire(wire::Error::Refused { code, .. })) = &shipped
            && code == REMOVED
        {
            self.resume = match self.resume {
                Resume::AtTail => Resume::AtTailSegment,
                Resume::AtTailSegment | Resume::AfterGap => Resume::AfterGap,
            };
        }
        shipped
    }

    /// Connects, sees to the slot, takes the archive over unless it is this shipper's already, and finds where to go on.
    async fn prepare(&mut self) -> Result<Ready, Failure> {
        let mut connection = Connection::open(&self.plan.socket_dir.join(format!(".s.PGSQL.{PORT}")), STANDBY).await?;
        let system = connection.identify().await?;
        look(&self.progress).lag.saw(system.flushed, Instant::now());
        // Before the bucket is asked for anything: from here on WAL waits for it.
        let mut slot = slot::ensure(&self.plan.socket_dir).await?;
        let goes_on = |writer: &Writer| {
            writer.pg_timeline() == system.pg_timeline
                && writer.shipped() <= system.flushed
                && self.resume != Resume::AfterGap
        };
        if let Some(writer) = self.writer.take_if(|writer| goes_on(writer)) {
            let stream = connection.stream(STANDBY, writer.shipped(), system.pg_timeline).await?;
            return Ok(self.ready(stream, writer, Bytes::new()));
        }
        self.writer = None;
        let archive = self.archive().await?;
        let claim = archive.claim(Owner::new(self.plan.epoch)).await?;
        if self.resume == Resume::AfterGap {
            slot = slot::renew(&self.plan.socket_dir).await?;
            let gap = Some("WAL was removed from the node before the bucket had it".to_owned());
            let lsn = slot.keeps_from.segment_start(slot.wal_segment_bytes.into());
            let begin = Begin { pg_timeline: system.pg_timeline, lsn, gap };
            let ready = self.begin(connection, &system, &slot, claim, begin).await?;
            self.resume = Resume::AtTail;
            return Ok(ready);
        }
        match self.find_beginning(&mut connection, &system, &slot, claim.tail()).await? {
            Some(begin) => self.begin(connection, &system, &slot, claim, begin).await,
            None => self.go_on(connection, &system, &slot, claim).await,
        }
    }

    async fn archive(&self) -> Result<Archive, Failure> {
        let bucket = match &self.plan.bucket {
            Origin::Bucket(bucket) => bucket.clone(),
            Origin::At(at) => object_store::attach(at).await?,
        };
        Ok(Archive::new(bucket, self.plan.branch, self.plan.line))
    }

    /// Where a new stretch begins; `None` if it is to go on at the archive's newest span.
    async fn find_beginning(
        &self,
        connection: &mut Connection,
        system: &System,
        slot: &Slot,
        tail: Option<&Tail>,
    ) -> Result<Option<Begin>, Failure> {
        let Some(tail) = tail else {
            let lsn = self.base_start(system, slot).await;
            return Ok(Some(Begin { pg_timeline: system.pg_timeline, lsn, gap: None }));
        };
        if tail.system_identifier != system.identifier {
            return Err(Failure::Again("the archive is of another cluster"));
        }
        if tail.pg_timeline == system.pg_timeline && tail.end <= system.flushed {
            return Ok(None);
        }
        if tail.pg_timeline < system.pg_timeline {
            let switches = switches_in(&connection.history(system.pg_timeline).await?);
            if let Some(at) = switches.iter().position(|(pg_timeline, _)| *pg_timeline == tail.pg_timeline) {
                let switched = switches[at].1;
                if tail.end < switched {
                    return Ok(None);
                }
                let pg_timeline = switches.get(at + 1).map_or(system.pg_timeline, |(next, _)| *next);
                let lsn = switched.segment_start(slot.wal_segment_bytes.into());
                return Ok(Some(Begin { pg_timeline, lsn, gap: None }));
            }
        }
        self.depart(system, slot, tail).await.map(Some)
    }

    /// The archive has WAL that this volume lacks. Either may have acknowledged commits.
    async fn depart(&self, system: &System, slot: &Slot, tail: &Tail) -> Result<Begin, Failure> {
        let why = format!(
            "the archive has WAL of Postgres timeline {} up to {} that the volume, at {} of timeline {}, lacks",
            tail.pg_timeline, tail.end, system.flushed, system.pg_timeline
        );
        let durability = self.orders.borrow().durability;
        match durability {
            // Commits in it were promised to survive this volume: whoever starts a unit must have them recovered first.
            Durability::Bucket => Err(Failure::Stop(why)),
            Durability::Local => {
                let lsn = self.base_start(system, slot).await;
                Ok(Begin { pg_timeline: system.pg_timeline, lsn, gap: Some(why) })
            }
        }
    }

    /// The beginning of the last page of WAL that the layer below has: Postgres went on in it, or after it.
    async fn base_start(&self, system: &System, slot: &Slot) -> Lsn {
        let (dir, pg_timeline, segment_bytes) =
            (self.plan.base_wal.clone(), system.pg_timeline, slot.wal_segment_bytes);
        let last = tokio::task::spawn_blocking(move || last_page(&dir?, pg_timeline, segment_bytes)).await;
        let last = last.ok().flatten().filter(|start| *start <= system.flushed);
        last.unwrap_or_else(|| slot.keeps_from.segment_start(segment_bytes.into()))
    }

    /// Begins a stretch that does not continue the one before.
    async fn begin(
        &mut self,
        mut connection: Connection,
        system: &System,
        slot: &Slot,
        claim: Claim,
        begin: Begin,
    ) -> Result<Ready, Failure> {
        let Begin { pg_timeline, lsn, gap } = begin;
        if let Some(why) = gap {
            tracing::error!(why, begin = %lsn, "the archive has a gap");
            slot::end_waiting(&self.plan.socket_dir).await?;
            look(&self.progress).gaps += 1;
        }
        let start = start(&mut connection, system, slot, pg_timeline, lsn).await?;
        let writer = self.open(claim, start).await?;
        let stream = connection.stream(STANDBY, lsn, pg_timeline).await?;
        Ok(self.ready(stream, writer, Bytes::new()))
    }

    /// Continues where the archive ends, if Postgres has the bytes of its newest span.
    async fn go_on(
        &mut self,
        mut connection: Connection,
        system: &System,
        slot: &Slot,
        claim: Claim,
    ) -> Result<Ready, Failure> {
        let Some(tail) = claim.tail().cloned() else { return Err(Failure::Again("the archive is empty")) };
        let pg_timeline = tail.pg_timeline;
        let segment = tail.end.segment_start(slot.wal_segment_bytes.into());
        let from = if self.resume == Resume::AtTail { tail.start } else { tail.start.max(segment) };
        if from == tail.end {
            let gap = Some("it cannot be seen whether the volume has the archive's newest span".to_owned());
            return self.begin(connection, system, slot, claim, Begin { pg_timeline, lsn: from, gap }).await;
        }
        let start = start(&mut connection, system, slot, pg_timeline, tail.end).await?;
        let mut stream = connection.stream(STANDBY, from, pg_timeline).await?;
        let compared = timeout(COMPARE_DEADLINE, compare(&mut stream, &tail, from));
        match compared.await.map_err(|_| Failure::Again("postgres did not send what the archive ends with"))?? {
            Some(more) => {
                let writer = self.open(claim, Start { continues: true, ..start }).await?;
                Ok(self.ready(stream, writer, more))
            }
            None => {
                drop(stream);
                let begin = self.depart(system, slot, &tail).await?;
                let socket = self.plan.socket_dir.join(format!(".s.PGSQL.{PORT}"));
                self.begin(Connection::open(&socket, STANDBY).await?, system, slot, claim, begin).await
            }
        }
    }

    async fn open(&mut self, claim: Claim, start: Start) -> Result<Box<Writer>, Failure> {
        let mut writer = Box::new(claim.open(start)?);
        match writer.settle().await {
            Ok(()) => {
                self.openings_lost = 0;
                Ok(writer)
            }
            Err(error) if error.kind() == ErrorKind::Fenced && self.openings_lost < OPENINGS_LOST_MAX => {
                self.openings_lost += 1;
                Err(Failure::Again("another writer opened the archive at the same time"))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn ready(&mut self, stream: Stream, writer: Box<Writer>, more: Bytes) -> Ready {
        let mut progress = look(&self.progress);
        progress.streaming = true;
        progress.error = None;
        progress.lag.shipped(writer.shipped());
        let mut buffer = Buffer::new(writer.shipped());
        buffer.push(&more);
        Ready { stream, writer, buffer }
    }

    /// Ships until Postgres ends the stream, and what came before that.
    async fn ship(&mut self, ready: Ready) -> Result<(), Failure> {
        let Ready { stream, writer, mut buffer } = ready;
        let (mut shipped, mut counted) = (writer.shipped(), writer.stats());
        let mut hand = Hand::Free(writer);
        // Either Postgres streams, or there is a reason why not.
        let mut source: Result<Stream, Failure> = Ok(stream);
        let mut ending = false;
        let (mut unshipped_since, mut taken) = (Instant::now(), Instant::now());
        let mut tick = interval(REPORT_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut orders = self.orders.clone();
        loop {
            let Orders { durability, draining } = *orders.borrow_and_update();
            let now = Instant::now();
            let waits = durability == Durability::Local && draining.is_none() && source.is_ok();
            let due = if waits && buffer.len() < LOCAL_BYTES { buffer.since + LOCAL_DELAY } else { now };
            hand = match hand {
                Hand::Free(writer) if !buffer.is_empty() && due <= now => {
                    taken = now;
                    Hand::Busy(put(writer, Some(buffer.take()), self.progress.clone()))
                }
                Hand::Free(writer) if buffer.is_empty() && source.is_err() => {
                    if ending {
                        return Ok(());
                    }
                    if draining.is_none() || !matches!(source, Err(Failure::Ended)) {
                        self.writer = Some(writer);
                        return source.map(drop);
                    }
                    (ending, unshipped_since) = (true, now);
                    Hand::Busy(put(writer, None, self.progress.clone()))
                }
                hand => hand,
            };
            let is_free = matches!(hand, Hand::Free(_));
            let is_idle = is_free && buffer.is_empty();
            let give_up = draining.map(|since| since.max(unshipped_since) + DRAIN_DEADLINE).filter(|_| !is_idle);
            let is_full = buffer.len() + MESSAGE_BYTES_MAX > SPAN_BYTES_MAX;
            let action = tokio::select! {
                biased;
                done = finished(&mut hand) => Action::Put(done),
                () = sleep_until(give_up.unwrap_or(now).into()), if give_up.is_some() => Action::GiveUp,
                () = sleep_until(due.into()), if is_free && !buffer.is_empty() => Action::Again,
                changed = orders.changed() => changed.map_or(Action::GiveUp, |()| Action::Again),
                message = next(&mut source), if source.is_ok() && !is_full => Action::Message(message),
                () = sleep_until((taken + FULL_DEADLINE).into()), if source.is_ok() && is_full => Action::Full,
                _ = tick.tick() => Action::Report,
            };
            let mut report = false;
            match action {
                Action::Put((writer, result)) => {
                    result?;
                    self.resume = Resume::AtTail;
                    shipped = writer.shipped();
                    self.note(shipped, counted, writer.stats());
                    counted = writer.stats();
                    unshipped_since = buffer.since;
                    hand = Hand::Free(writer);
                    report = true;
                }
                Action::Message(Ok(Message::Wal { start, end, bytes })) => {
                    if start != buffer.end() {
                        return Err(wire::Error::Unexpected("WAL that does not follow").into());
                    }
                    if is_idle {
                        unshipped_since = now;
                    }
                    buffer.push(&bytes);
                    look(&self.progress).lag.saw(end.max(buffer.end()), now);
                }
                Action::Message(Ok(Message::Alive { end, reply })) => {
                    look(&self.progress).lag.saw(end, now);
                    report = reply;
                }
                Action::Message(Ok(Message::Ended)) => source = Err(Failure::Ended),
                Action::Message(Err(failure)) => source = Err(failure.into()),
                Action::Full => source = Err(Failure::Again("the bucket takes no WAL")),
                Action::Report => report = true,
                Action::GiveUp => return Err(Failure::Again("the bucket did not take the WAL before the suspend")),
                Action::Again => {}
            }
            if let Ok(stream) = &mut source
                && report
            {
                match stream.report(shipped).await {
                    // It may have ended, and have said so: what it sent last is still to be read.
                    Ok(()) | Err(wire::Error::Io(_)) => {}
                    Err(failure) => source = Err(failure.into()),
                }
            }
            look(&self.progress).streaming = source.is_ok();
        }
    }

    /// Notes what the bucket has acknowledged.
    fn note(&self, shipped: Lsn, before: WriterStats, after: WriterStats) {
        let mut progress = look(&self.progress);
        progress.error = None;
        progress.lag.shipped(shipped);
        progress.written.spans += after.spans - before.spans;
        progress.written.raw_bytes += after.raw_bytes - before.raw_bytes;
        progress.written.stored_bytes += after.stored_bytes - before.stored_bytes;
    }
}

/// What happens to a session.
enum Action {
    Put((Box<Writer>, Result<(), Failure>)),
    Message(wire::Result<Message>),
    /// There is no room for more.
    Full,
    /// Postgres must hear of the shipper.
    Report,
    /// Look again at what is to be done.
    Again,
    GiveUp,
}

type Put = Pin<Box<dyn Future<Output = (Box<Writer>, Result<(), Failure>)> + Send>>;

/// One put at a time: what follows it is not known to be wanted before.
enum Hand {
    Free(Box<Writer>),
    Busy(Put),
}

async fn next(source: &mut Result<Stream, Failure>) -> wire::Result<Message> {
    match source {
        Ok(stream) => stream.next().await,
        Err(_) => std::future::pending().await,
    }
}

async fn finished(hand: &mut Hand) -> (Box<Writer>, Result<(), Failure>) {
    match hand {
        Hand::Busy(put) => put.await,
        Hand::Free(_) => std::future::pending().await,
    }
}

/// Appends a span, or the end; for as long as it takes, if only the bucket does not answer.
fn put(mut writer: Box<Writer>, span: Option<Span>, progress: SharedProgress) -> Put {
    Box::pin(async move {
        let mut pause = Pause::default();
        let mut result = match span {
            Some(span) => writer.append(span).await,
            None => writer.end().await,
        };
        while let Err(error) = &result {
            if matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Corrupt | ErrorKind::Invalid) {
                break;
            }
            note_failure(&progress, chain(error));
            sleep(pause.next()).await;
            result = writer.settle().await;
        }
        (writer, result.map_err(Failure::from))
    })
}

/// Says why WAL is not shipped: to the log only what is new.
fn note_failure(progress: &SharedProgress, error: String) {
    let mut progress = look(progress);
    if progress.error.as_ref() != Some(&error) {
        tracing::warn!(error, "WAL is not shipped");
    }
    progress.error = Some(error);
}

/// WAL that was received and is not being put.
struct Buffer {
    start: Lsn,
    bytes: BytesMut,
    /// When its first and its last byte came.
    since: Instant,
    until: Timestamp,
}

impl Buffer {
    fn new(start: Lsn) -> Self {
        Self { start, bytes: BytesMut::new(), since: Instant::now(), until: Timestamp::now() }
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.bytes.is_empty() {
            self.since = Instant::now();
        }
        self.until = Timestamp::now();
        self.bytes.extend_from_slice(bytes);
    }

    fn take(&mut self) -> Span {
        let bytes = std::mem::take(&mut self.bytes).freeze();
        let span = Span { start: self.start, bytes, time: self.until };
        self.start = Lsn(self.start.0 + span.bytes.len() as u64);
        span
    }

    fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// What is said about a stretch that does not continue.
async fn start(
    connection: &mut Connection,
    system: &System,
    slot: &Slot,
    pg_timeline: u32,
    lsn: Lsn,
) -> Result<Start, Failure> {
    // The first Postgres timeline has no history.
    let history = match pg_timeline {
        0 | 1 => None,
        _ => Some(connection.history(pg_timeline).await?),
    };
    Ok(Start {
        system_identifier: system.identifier,
        wal_segment_bytes: slot.wal_segment_bytes,
        pg_timeline,
        lsn,
        continues: false,
        history,
        time: Timestamp::now(),
    })
}

/// Receives what the archive's newest span has from `from` on. Answers what came after it, or `None` if the bytes differ.
async fn compare(stream: &mut Stream, tail: &Tail, from: Lsn) -> Result<Option<Bytes>, Failure> {
    let mut known = tail.bytes.slice((from.0 - tail.start.0) as usize..);
    let mut at = from;
    loop {
        let (start, bytes) = match stream.next().await? {
            Message::Wal { start, bytes, .. } => (start, bytes),
            Message::Alive { .. } => continue,
            Message::Ended => return Err(Failure::Ended),
        };
        if start != at {
            return Err(wire::Error::Unexpected("WAL that does not follow").into());
        }
        let both = known.len().min(bytes.len());
        if known[..both] != bytes[..both] {
            return Ok(None);
        }
        at = Lsn(at.0 + bytes.len() as u64);
        known = known.slice(both..);
        if known.is_empty() {
            return Ok(Some(bytes.slice(both..)));
        }
    }
}

/// Where the last page begins of the WAL in a directory, of a Postgres timeline.
fn last_page(dir: &Path, pg_timeline: u32, segment_bytes: u32) -> Option<Lsn> {
    let names = std::fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let segments = names.filter_map(|name| WalSegment::parse(&name, segment_bytes));
    let last = segments.filter(|segment| segment.pg_timeline == pg_timeline).max()?;
    Some(last.last_page(&File::open(dir.join(last.file_name())).ok()?))
}

/// Waits until Postgres is being stopped.
async fn draining(mut orders: watch::Receiver<Orders>) {
    // Nobody left to give orders: the unit is ending.
    let _ = orders.wait_for(|orders| orders.draining.is_some()).await;
}

/// Growing, jittered pauses between tries.
#[derive(Debug)]
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(Duration::from_millis(100))
    }
}

impl Pause {
    fn next(&mut self) -> Duration {
        let pause = self.0.mul_f64(0.5 + rand::random::<f64>() / 2.0);
        self.0 = (self.0 * 2).min(PAUSE_MAX);
        pause
    }
}
