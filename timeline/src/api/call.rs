//! What every request has in common: who calls, the body, and how a failure is answered.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use ebb_types::{ErrorKind, Hint as _};
use serde::de::DeserializeOwned;

use super::types::Problem;
use crate::Error;
use crate::event::Key;
use crate::service::Caller;

/// LIMIT: bodies name things; they do not carry them.
const BODY_MAX: usize = 64 << 10;

/// LIMIT: a key is stored with its act.
const KEY_MAX: usize = 200;

/// LIMIT: the part of `User-Agent` that receipts keep.
const AGENT_MAX: usize = 60;

/// An act: who calls, with which key, and a JSON body of type `T`.
pub(super) struct Act<T> {
    pub caller: Caller,
    pub body: T,
}

/// A request without a body: who calls.
pub(super) struct Who(pub Caller);

impl<S: Send + Sync> FromRequestParts<S> for Who {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Fault> {
        Ok(Who(Caller { actor: actor(&parts.headers), key: key(parts, b"")? }))
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Act<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, _: &S) -> Result<Self, Fault> {
        let (parts, body) = request.into_parts();
        let json = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(is_json);
        if !json {
            return Err(Fault::new(ErrorKind::Invalid, "the body is not declared as JSON".to_owned())
                .status(StatusCode::UNSUPPORTED_MEDIA_TYPE)
                .hint("Send Content-Type: application/json."));
        }
        let bytes: Bytes = axum::body::to_bytes(body, BODY_MAX)
            .await
            .map_err(|error| Fault::new(ErrorKind::Invalid, format!("the body cannot be read: {error}")))?;
        let body = serde_json::from_slice(&bytes)
            .map_err(|error| Fault::new(ErrorKind::Invalid, format!("the body does not fit: {error}")))?;
        Ok(Act { caller: Caller { actor: actor(&parts.headers), key: key(&parts, &bytes)? }, body })
    }
}

fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or(content_type).trim();
    kind.eq_ignore_ascii_case("application/json")
}

/// How receipts name the caller: there are no tokens, so no more is known than that it came from this machine.
fn actor(headers: &HeaderMap) -> String {
    let agent = headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let agent: String = agent.chars().filter(|c| !c.is_control()).take(AGENT_MAX).collect();
    if agent.is_empty() { "local".to_owned() } else { format!("local {agent}") }
}

/// The idempotency key, with the request it stands for.
fn key(parts: &Parts, body: &[u8]) -> Result<Option<Key>, Fault> {
    let Some(value) = parts.headers.get("idempotency-key") else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    if text.is_empty() || text.len() > KEY_MAX {
        let fault = format!("an idempotency key has 1 to {KEY_MAX} visible ASCII characters");
        return Err(Fault::new(ErrorKind::Invalid, fault));
    }
    let mut request = blake3::Hasher::new();
    for part in [parts.method.as_str().as_bytes(), parts.uri.to_string().as_bytes(), body] {
        request.update(&(part.len() as u64).to_le_bytes());
        request.update(part);
    }
    Ok(Some(Key { key: text.to_owned(), request: request.finalize().to_hex().to_string() }))
}

/// A failed request, as `application/problem+json`.
#[derive(Debug)]
pub(super) struct Fault {
    kind: ErrorKind,
    status: StatusCode,
    detail: String,
    hint: Option<String>,
}

impl Fault {
    pub fn new(kind: ErrorKind, detail: String) -> Self {
        let status = match kind {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict | ErrorKind::Fenced => StatusCode::CONFLICT,
            ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Corrupt | ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { kind, status, detail, hint: None }
    }

    pub fn status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    pub fn hint(self, hint: &str) -> Self {
        Self { hint: Some(hint.to_owned()), ..self }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let mut fault = Fault::new(error.kind(), error.chain());
        fault.hint = error.hint();
        if let Error::Migration { .. } | Error::Release { .. } = error {
            fault.status = StatusCode::UNPROCESSABLE_ENTITY;
        }
        // Reported here and nowhere else: this is where the error is handled.
        if fault.status.is_server_error() {
            tracing::error!(kind = ?fault.kind, detail = fault.detail, "a request failed");
        }
        fault
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let (name, title) = match self.kind {
            ErrorKind::Invalid => ("invalid", "The request is wrong"),
            ErrorKind::NotFound => ("not-found", "There is no such thing"),
            ErrorKind::Conflict => ("conflict", "Another state stands in the way"),
            ErrorKind::Unavailable => ("unavailable", "Not now"),
            ErrorKind::Fenced => ("fenced", "Another writer has taken over"),
            ErrorKind::Corrupt => ("corrupt", "Stored data failed its checksum"),
            ErrorKind::Internal => ("internal", "A fault of Ebb's own"),
        };
        let problem = Problem {
            type_uri: format!("urn:ebb:problem:{name}"),
            title: title.to_owned(),
            status: self.status.as_u16(),
            detail: self.detail,
            hint: self.hint,
            kind: self.kind,
        };
        let mut response = (self.status, Json(problem)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
