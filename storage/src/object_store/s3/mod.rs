//! A bucket in S3, or in whatever speaks its protocol and keeps its promises.
//!
//! ```text
//! s3://<name>/<prefix>/ebb-bucket       the marker, as in a directory
//! s3://<name>/<prefix>/.probe/…         for moments only, while a bucket is opened
//! s3://<name>/<prefix>/<key>            the objects
//! ```
//!
//! Everything in Ebb rests on "put unless there is one", and a store that does not know `If-None-Match: *` ignores it
//! silently. So [`S3::open`] proves that this one honours it (`probe`), and refuses the store otherwise.
//!
//! **Lost answers.** A conditional put whose answer was lost, and which is sent again, meets its own object. Each carries
//! a random number in its metadata (`ebb-put`): who is told that there is an object asks whose it is. That also
//! holds where something between here and the store repeated the request unasked.
//!
//! **Checksums.** Every upload carries a CRC32, which the store checks, and is signed over its SHA-256. What is
//! read whole is checked against the store's checksum where it gives one. Layers, the ledger and secrets are checked
//! again by those who read them.
//!
//! # Crash
//! A killed process leaves the parts of an unfinished upload, which no key leads to and which the store charges for: a
//! lifecycle rule of the bucket is to remove them. It may also leave a few objects of some bytes below `.probe/`.
//!
//! # Cancellation
//! A dropped call's request may still be answered. A dropped multipart upload is aborted.

use std::fmt;
use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use bytes::Bytes;
use tokio::time::timeout;

use super::{MARKER, ObjectMeta, ObjectStore, Put, check_key, check_prefix, failed, no_such_range};
use crate::blocking;
use crate::error::{Error, LocalContext, Result};
use fault::{Fault, Kind, Passing};
use retry::Retries;

mod fault;
mod open;
mod probe;
mod retry;
mod upload;

pub use open::S3Options;
pub(super) use open::check_location;

/// LIMIT: within these a small request is answered, or sent again. Writes have longer: SeaweedFS 4.48 lets the losers of a
/// race wait for seconds. Both leave time for a second attempt before the call's own deadline.
const READ_WITHIN: Duration = Duration::from_secs(6);
const WRITE_WITHIN: Duration = Duration::from_secs(12);

/// LIMIT: no attempt is begun later than this after the call began (bytes to move not counted).
const PATIENCE: Duration = Duration::from_secs(15);

/// LIMIT: slower than this, something is broken.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

/// The metadata by which a put knows its own object.
const PUT_ID: &str = "ebb-put";

/// A bucket in S3.
pub struct S3 {
    client: Client,
    /// Where the store is, for people.
    place: String,
    bucket: String,
    /// What every key of ours begins with: empty, or ending in a slash.
    root: String,
    patience: Duration,
    retries: Retries,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3").field("url", &self.url()).field("place", &self.place).finish_non_exhaustive()
    }
}

#[async_trait]
impl ObjectStore for S3 {
    async fn get(&self, key: &str) -> Result<Bytes> {
        check_key(key)?;
        self.read(key, None).await.map_err(|fault| fault.on("get", key))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        check_key(key)?;
        // S3 cannot be asked for no bytes; and no object is as long as a signed number cannot tell.
        if range.is_empty() || i64::try_from(range.end).is_err() {
            return self.no_bytes(key, range).await;
        }
        match self.read(key, Some(range.clone())).await {
            Err(fault) if fault.kind == Kind::Range => self.no_bytes(key, range).await,
            read => read.map_err(|fault| fault.on("get", key)),
        }
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        check_key(key)?;
        self.write(key, bytes).await.map_err(|fault| fault.on("put", key))
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<Put> {
        check_key(key)?;
        self.create(key, bytes).await.map_err(|fault| fault.on("put", key))
    }

    async fn put_file(&self, key: &str, file: &Path) -> Result<()> {
        check_key(key)?;
        let path = file.to_owned();
        let (file, size) = blocking::run(move || {
            let file = File::open(&path).on("open", &path)?;
            let size = file.metadata().on("read", &path)?.len();
            Ok::<_, Error>((upload::Source::new(file, path), size))
        })
        .await?;
        if size <= upload::PART_BYTES_MIN {
            let bytes = file.read(0..size).await?;
            return self.write(key, bytes).await.map_err(|fault| fault.on("put", key));
        }
        upload::run(self, key, file, size).await
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        check_key(key)?;
        match self.look(key).await.map_err(|fault| fault.on("head", key))? {
            Some(found) => Ok(Some(ObjectMeta { key: key.to_owned(), size: size_of(found.content_length()) })),
            None => self.check_present(key).await.map(|()| None),
        }
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        check_prefix(prefix)?;
        let start_after = start_after.unwrap_or_default();
        let mut found = Vec::new();
        let take = |key: &str, size| {
            if check_key(key).is_ok() && key > start_after {
                found.push(ObjectMeta { key: key.to_owned(), size });
            }
            ControlFlow::Continue(())
        };
        self.walk(prefix, server_start(prefix, start_after), take).await.map_err(|fault| fault.on("list", prefix))?;
        // Key order is not every server's order.
        found.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        check_key(key)?;
        self.remove(key).await.map_err(|fault| fault.on("delete", key))
    }
}

/// What the calls are made of. Keys are not checked here: the store's own begin with a dot.
impl S3 {
    /// Opens the bucket at `location`, `name` or `name/prefix`; makes it where there is nothing below the prefix.
    ///
    /// # Errors
    /// `Invalid` for a location that is none; `Unusable` when S3 cannot be reached, does not let us in or has no such
    /// bucket, when something else lives below the prefix, and when the store does not honour conditional writes.
    pub async fn open(location: &str, options: &S3Options) -> Result<Self> {
        open::open(location, options, None).await
    }

    /// A bucket that another process has opened by [`S3::open`]: nothing is asked or proved again.
    ///
    /// # Errors
    /// `Invalid` when location or options make no sense.
    pub(super) async fn attach(location: &str, options: &S3Options) -> Result<Self> {
        open::attach(location, options).await
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.root)
    }

    fn url(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.root)
    }

    /// Sends a request until it is answered, or until it is no use to go on. `bytes` are moved by it.
    async fn send<T, E, F>(&self, within: Duration, bytes: u64, request: impl Fn() -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let (within, patience) = (within + time_for(bytes), self.patience + time_for(bytes));
        self.retries.run(patience, || answer(within, request())).await
    }

    /// Reads an object whole, or the bytes of a range that is not empty.
    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, Fault> {
        let bytes = range.as_ref().map_or(0, |range| range.end - range.start);
        self.retries.run(self.patience + time_for(bytes), || self.read_once(key, range.clone())).await
    }

    async fn read_once(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, Fault> {
        let wanted = range.as_ref().map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let request = self.client.get_object().bucket(&self.bucket).key(self.full(key)).set_range(wanted);
        let found = answer(READ_WITHIN, request.send()).await?;
        if let Some(range) = &range {
            check_range(found.content_range(), range)?;
        }
        let expected = range.map_or(size_of(found.content_length()), |range| range.end - range.start);
        let within = READ_WITHIN + time_for(expected);
        let body = timeout(within, found.body.collect()).await.map_err(|_| Fault::timed_out(within))?;
        let bytes = body.map_err(|error| Fault::torn(&error))?.into_bytes();
        if bytes.len() as u64 != expected {
            let why = format!("{} bytes came where {expected} were announced", bytes.len());
            return Err(Fault::new(Kind::Passing(Passing::Connection), why));
        }
        Ok(bytes)
    }

    /// What is to be said about a range without bytes: it may be empty, or past the end.
    async fn no_bytes(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let found = self.head(key).await?.ok_or_else(|| Error::NoSuchObject { key: key.to_owned() })?;
        if range.start == range.end && range.end <= found.size {
            return Ok(Bytes::new());
        }
        Err(no_such_range(key, found.size, &range))
    }

    async fn write(&self, key: &str, bytes: Bytes) -> Result<(), Fault> {
        let send = || self.put_request(key, &bytes).send();
        self.send(WRITE_WITHIN, bytes.len() as u64, send).await.map(drop)
    }

    fn put_request(&self, key: &str, bytes: &Bytes) -> PutObjectFluentBuilder {
        self.client.put_object().bucket(&self.bucket).key(self.full(key)).body(bytes.clone().into())
    }

    async fn create(&self, key: &str, bytes: Bytes) -> Result<Put, Fault> {
        let id = put_id();
        let send = || self.put_request(key, &bytes).metadata(PUT_ID, &id).if_none_match("*").send();
        match self.send(WRITE_WITHIN, bytes.len() as u64, send).await {
            Ok(_) => Ok(Put::Created),
            Err(fault) if fault.kind == Kind::Exists => self.whose(key, &id).await,
            Err(fault) => Err(fault),
        }
    }

    /// Whether the object that is in the way of a put is that put's own, from an attempt whose answer was lost.
    async fn whose(&self, key: &str, id: &str) -> Result<Put, Fault> {
        match self.look(key).await? {
            Some(found) if put_id_of(&found) == Some(id) => Ok(Put::Created),
            Some(_) => Ok(Put::Exists),
            // Deleted in between: ours, or another's? Nobody can tell any more.
            None => Err(Fault::new(Kind::Refused, "there was an object, and then there was none")),
        }
    }

    async fn look(&self, key: &str) -> Result<Option<HeadObjectOutput>, Fault> {
        let request = self.client.head_object().bucket(&self.bucket).key(self.full(key));
        match self.send(READ_WITHIN, 0, || request.clone().send()).await {
            Ok(found) => Ok(Some(found)),
            Err(fault) if fault.kind == Kind::NoSuchKey => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// The answer to a HEAD does not tell a missing object from a missing bucket; and a bucket that has lost its marker
    /// must not look like an empty one.
    async fn check_present(&self, key: &str) -> Result<()> {
        match self.read(MARKER, None).await {
            Ok(_) => Ok(()),
            Err(fault) if fault.kind == Kind::NoSuchKey => {
                let why = format!("{} has lost its object {MARKER:?}", self.url());
                Err(failed("head", key, std::io::Error::other(why)))
            }
            Err(fault) => Err(fault.on("head", key)),
        }
    }

    /// Shows the objects below `prefix` to `take`, by key and size, in the server's order, until it has seen enough.
    async fn walk(
        &self,
        prefix: &str,
        start_after: Option<&str>,
        mut take: impl FnMut(&str, u64) -> ControlFlow<()> + Send,
    ) -> Result<(), Fault> {
        let start_after = start_after.map(|key| self.full(key));
        let request = self.client.list_objects_v2().bucket(&self.bucket).prefix(self.full(prefix));
        let request = request.set_start_after(start_after);
        let mut next = None;
        loop {
            let page =
                self.send(READ_WITHIN, 0, || request.clone().set_continuation_token(next.clone()).send()).await?;
            for object in page.contents() {
                let Some(key) = object.key().and_then(|key| key.strip_prefix(&self.root)) else { continue };
                if take(key, size_of(object.size())).is_break() {
                    return Ok(());
                }
            }
            if !page.is_truncated().unwrap_or(false) {
                return Ok(());
            }
            next = page.next_continuation_token;
            if next.is_none() {
                return Err(Fault::new(Kind::Refused, "a page of a listing does not say where the next one begins"));
            }
        }
    }

    async fn remove(&self, key: &str) -> Result<(), Fault> {
        let request = self.client.delete_object().bucket(&self.bucket).key(self.full(key));
        match self.send(WRITE_WITHIN, 0, || request.clone().send()).await {
            Err(fault) if fault.kind != Kind::NoSuchKey => Err(fault),
            _ => Ok(()),
        }
    }
}

/// Awaits the answer to one request.
async fn answer<T, E>(
    within: Duration,
    request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
) -> Result<T, Fault>
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match timeout(within, request).await {
        Ok(answered) => answered.map_err(|error| Fault::of(&error)),
        Err(_) => Err(Fault::timed_out(within)),
    }
}

fn time_for(bytes: u64) -> Duration {
    Duration::from_secs(bytes / BYTES_PER_SECOND_MIN)
}

fn size_of(length: Option<i64>) -> u64 {
    length.and_then(|length| u64::try_from(length).ok()).unwrap_or(0)
}

/// A number that no other put has.
fn put_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn put_id_of(found: &HeadObjectOutput) -> Option<&str> {
    found.metadata()?.get(PUT_ID).map(String::as_str)
}

/// Checks `bytes <first>-<last>/<size>` against what was asked for: a server cuts a range off at the object's end.
fn check_range(answered: Option<&str>, wanted: &Range<u64>) -> Result<(), Fault> {
    let parse = |text: &str| {
        let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, size.parse::<u64>().ok()?))
    };
    match answered.and_then(parse) {
        Some((_, _, size)) if wanted.end > size => Err(Fault::new(Kind::Range, "the range ends past the object")),
        Some((first, last, _)) if (first, last) == (wanted.start, wanted.end - 1) => Ok(()),
        _ => Err(Fault::new(Kind::Refused, format!("{wanted:?} was asked for and {answered:?} came"))),
    }
}

/// Where the server may begin a listing without leaving out what comes after `start_after`.
///
/// Servers that keep directories (SeaweedFS) list by directory: `a/1` comes before `a-b`, though `-` is before `/`, and
/// told to start after `a` they leave out all of `a/`. The two orders agree on names of letters, digits and `_`, all of
/// which come after `/`; and such a name, one character short, is before all that is wanted and above none of it. Other
/// listings are read from their beginning. It is the entries of logs that are many, and their names are digits.
fn server_start<'a>(prefix: &str, start_after: &'a str) -> Option<&'a str> {
    let name = start_after.strip_prefix(prefix)?;
    let plain = name.len() > 1 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    plain.then(|| &start_after[..start_after.len() - 1])
}

#[cfg(test)]
mod tests;
