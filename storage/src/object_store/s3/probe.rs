//! Whether a store honours "put unless there is one".
//!
//! It is asked to put one object twice, and then to let several writers race for each of several keys. A store that
//! ignores the condition fails the first; one that looks first and writes then fails the second, unless it is lucky
//! with every key. That is evidence, not proof: a store that fails one race in a thousand passes.

use std::future::Future;

use bytes::Bytes;
use ebb_types::ErrorKind;
use futures::future::join_all;

use super::fault::Kind;
use super::open::PROBE;
use super::{PUT_ID, S3};
use crate::error::{Error, Result};
use crate::object_store::Put;

/// LIMIT: several keys, because one race may be won by chance; few writers for each, because SeaweedFS 4.48 lets the losers
/// wait, the longer the more they are.
const RACES: usize = 4;
const WRITERS: usize = 4;

/// Opens only a store that keeps the promise everything rests on.
pub(super) async fn run(store: &S3) -> Result<()> {
    let stem = format!("{PROBE}{:032x}", rand::random::<u128>());
    let keys: Vec<_> = (0..=RACES).map(|number| format!("{stem}/{number}")).collect();
    let honest = ask(store, &keys).await;
    // Also after a failure; what cannot be removed is some bytes that nothing reads.
    let removed = join_all(keys.iter().map(|key| store.remove(key))).await;
    honest?;
    removed.into_iter().collect::<Result<Vec<()>, _>>().map_err(|fault| store.unusable(fault))?;
    gone(store, &keys[0]).await
}

async fn ask(store: &S3, keys: &[String]) -> Result<()> {
    twice(store, &keys[0]).await?;
    all(keys[1..].iter().map(|key| race(store, key))).await.map(drop)
}

async fn twice(store: &S3, key: &str) -> Result<()> {
    let first = put(store, key, "first").await?;
    if first != Put::Created {
        return Err(dishonest(store, "a fresh key was taken to be in use"));
    }
    let found = store.look(key).await.map_err(|fault| store.unusable(fault))?;
    if found.is_none_or(|found| super::put_id_of(&found).is_none()) {
        return Err(dishonest(store, &format!("an object lost its metadata {PUT_ID:?}")));
    }
    if put(store, key, "second").await? != Put::Exists || read(store, key).await? != "first" {
        return Err(dishonest(store, "a put with `If-None-Match: *` replaced an object"));
    }
    Ok(())
}

async fn race(store: &S3, key: &str) -> Result<()> {
    let bodies: Vec<_> = (0..WRITERS).map(|writer| format!("writer {writer}")).collect();
    let puts = all(bodies.iter().map(|body| put(store, key, body))).await?;
    let winners: Vec<_> = (bodies.iter().zip(puts)).filter(|(_, put)| *put == Put::Created).collect();
    let [(winner, _)] = winners[..] else {
        let why =
            format!("of {WRITERS} racing puts with `If-None-Match: *`, {} were told that they won", winners.len());
        return Err(dishonest(store, &why));
    };
    if read(store, key).await? != winner.as_bytes() {
        return Err(dishonest(store, "the winner of a race of puts with `If-None-Match: *` was replaced by a loser"));
    }
    Ok(())
}

/// Waits for every one, also after a failure: a put that is given up may still arrive, behind the removal of its key.
async fn all<T>(asked: impl Iterator<Item = impl Future<Output = Result<T>>>) -> Result<Vec<T>> {
    join_all(asked).await.into_iter().collect()
}

/// An object that is not there must be told apart from one that we may not see.
async fn gone(store: &S3, key: &str) -> Result<()> {
    match store.read(key, None).await {
        Err(fault) if fault.kind == Kind::NoSuchKey => Ok(()),
        Err(fault) => Err(store.unusable(fault)),
        Ok(_) => Err(dishonest(store, "a deleted object was read")),
    }
}

fn put<'a>(store: &'a S3, key: &'a str, body: &str) -> impl Future<Output = Result<Put>> + use<'a> {
    let body = Bytes::copy_from_slice(body.as_bytes());
    async move { store.create(key, body).await.map_err(|fault| store.unusable(fault)) }
}

async fn read(store: &S3, key: &str) -> Result<Bytes> {
    store.read(key, None).await.map_err(|fault| store.unusable(fault))
}

fn dishonest(store: &S3, why: &str) -> Error {
    Error::Unusable {
        kind: ErrorKind::Invalid,
        what: format!("{} does not keep what Ebb rests on: {why}", store.place),
        hint: "Two nodes could both believe that they wrote the same entry, so Ebb does not use this store. Take one that \
               honours conditional writes (docs/formats/bucket.md names some), or a local directory."
            .to_owned(),
    }
}
