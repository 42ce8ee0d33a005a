//! The pool's own questions to a backend that is at rest, and what undoes what clients have left in it.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::Pooled;
use crate::conversation::Parameter;
use crate::wire::{Fields, cstr, message, read_message};

/// What undoes all that a client may have left in a backend, but for statements that SQL has prepared. In one query, so
/// that it is one transaction; every name is safe from whatever `search_path` there is.
pub const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; \
     SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES";
/// That, and all prepared statements.
const RESET_ALL: &str = "DISCARD ALL";
/// LIMIT: answers to the proxy's own queries are short.
const ANSWER_MAX: usize = 64 * 1024;
/// LIMIT: a backend that does not come to itself in this time is given up.
const RESET_TIMEOUT: Duration = Duration::from_secs(5);

/// Undoes what clients have left in a backend. Nothing if it does not come to itself.
pub async fn reset(backend: &mut Pooled) -> Option<()> {
    let sql = if backend.dress.as_ref().is_some_and(|kept| kept.has_statements()) {
        backend.held.clear();
        RESET_ALL
    } else {
        RESET
    };
    ask(backend, sql, |_| {}).await?;
    backend.dress = None;
    backend.named.clone_from(&backend.application);
    Some(())
}

/// Asks a backend that is at rest, and waits for the answer: first columns of rows. Nothing if it fails, takes too long or
/// is gone.
pub async fn ask(backend: &mut Pooled, sql: &str, row: impl FnMut(&[u8])) -> Option<()> {
    timeout(RESET_TIMEOUT, answer(backend, sql, row)).await.ok()?
}

async fn answer(backend: &mut Pooled, sql: &str, mut row: impl FnMut(&[u8])) -> Option<()> {
    let mut out = Vec::new();
    query(&mut out, sql);
    backend.stream.write_all(&out).await.ok()?;
    let mut body = Vec::new();
    let mut failed = false;
    loop {
        let tag = read_message(&mut backend.stream, &mut body, ANSWER_MAX).await.ok()?;
        let mut fields = Fields(&body);
        match tag {
            b'Z' => return (!failed).then_some(()),
            b'E' => failed = true,
            b'S' => {
                if let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) {
                    note(&mut backend.parameters, name, value);
                }
            }
            b'D' => {
                if let (Some(1..), Some(Some(column))) = (fields.i16(), fields.column()) {
                    row(column);
                }
            }
            _ => {}
        }
    }
}

/// Appends a query.
pub fn query(out: &mut Vec<u8>, sql: &str) {
    message(out, b'Q', |body| cstr(body, sql));
}

/// Notes a parameter as the backend reported it.
pub fn note(parameters: &mut Vec<Parameter>, name: &[u8], value: &[u8]) {
    match parameters.iter_mut().find(|(known, _)| **known == *name) {
        Some((_, known)) => *known = value.into(),
        None => parameters.push((name.into(), value.into())),
    }
}
