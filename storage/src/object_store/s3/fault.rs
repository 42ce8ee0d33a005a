//! What can be wrong with one request, told apart as far as it matters to whoever sent it.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::error::Error;
use crate::object_store::failed;

/// LIMIT: what a store says about a failure goes into logs as one line of at most so many characters.
const MESSAGE_CHARS_MAX: usize = 300;

/// A request that did not do what it should.
#[derive(Debug)]
pub(super) struct Fault {
    pub kind: Kind,
    /// One line for people. Holds what the store said, never what was signed or sent.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// There is no such object.
    NoSuchKey,
    /// There is no such bucket.
    NoSuchBucket,
    /// There is no such multipart upload, or no longer.
    NoSuchUpload,
    /// The condition of a write did not hold: there is an object.
    Exists,
    /// The object does not have these bytes.
    Range,
    /// The store does not know who asks, or doubts it.
    Credentials,
    /// Who asks may not do this.
    Denied,
    /// The bucket is in another region.
    Region,
    /// The same request may work later; it may also have worked already.
    Passing(Passing),
    /// Anything else: asking again will not help.
    Refused,
}

/// Why a request that may work later did not work now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passing {
    Throttled,
    Server,
    Timeout,
    Connection,
}

impl Passing {
    /// A label for metrics.
    pub(super) fn name(self) -> &'static str {
        match self {
            Passing::Throttled => "throttled",
            Passing::Server => "server",
            Passing::Timeout => "timeout",
            Passing::Connection => "connection",
        }
    }
}

impl Fault {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A request that was not answered in time.
    pub(super) fn timed_out(within: Duration) -> Self {
        Self::new(Kind::Passing(Passing::Timeout), format!("no answer within {within:?}"))
    }

    /// An answer that broke off, or was altered on its way.
    pub(super) fn torn(why: &dyn std::error::Error) -> Self {
        Self::new(Kind::Passing(Passing::Connection), format!("the answer broke off: {}", chain(why)))
    }

    /// What became of a request, as the SDK tells it.
    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let because = || error.source().map_or_else(|| error.to_string(), chain);
        match error {
            SdkError::ServiceError(answer) => Self::answered(answer.raw().status().as_u16(), answer.err()),
            SdkError::TimeoutError(_) => Self::new(Kind::Passing(Passing::Timeout), because()),
            SdkError::DispatchFailure(failure) if failure.is_timeout() => {
                Self::new(Kind::Passing(Passing::Timeout), because())
            }
            SdkError::DispatchFailure(failure) if !failure.is_user() => {
                Self::new(Kind::Passing(Passing::Connection), because())
            }
            SdkError::ResponseError(_) => Self::new(Kind::Passing(Passing::Connection), because()),
            _ => Self::new(Kind::Refused, because()),
        }
    }

    fn answered(status: u16, error: &impl ProvideErrorMetadata) -> Self {
        let mut message = format!("S3 answered {status}");
        for (separator, part) in [(" ", error.code()), (": ", error.message())] {
            if let Some(part) = part {
                message.push_str(separator);
                message.push_str(part);
            }
        }
        Self::new(kind_of(status, error.code().unwrap_or_default()), one_line(&message))
    }

    /// The failure of a call on an object.
    pub(super) fn on(self, act: &'static str, key: &str) -> Error {
        let kind = match self.kind {
            Kind::NoSuchKey => return Error::NoSuchObject { key: key.to_owned() },
            Kind::Passing(Passing::Timeout) => io::ErrorKind::TimedOut,
            Kind::Credentials | Kind::Denied => io::ErrorKind::PermissionDenied,
            _ => io::ErrorKind::Other,
        };
        failed(act, key, io::Error::new(kind, self.message))
    }
}

/// The codes are those of "Error responses" in Amazon's S3 API reference; stores that give none, or their own, are
/// judged by the HTTP status. An error may also come with status 200, after a long wait.
fn kind_of(status: u16, code: &str) -> Kind {
    match code {
        "NoSuchKey" => Kind::NoSuchKey,
        "NoSuchBucket" => Kind::NoSuchBucket,
        "NoSuchUpload" => Kind::NoSuchUpload,
        "PreconditionFailed" => Kind::Exists,
        "InvalidRange" => Kind::Range,
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken" | "RequestTimeTooSkewed" => {
            Kind::Credentials
        }
        "PermanentRedirect" | "TemporaryRedirect" | "AuthorizationHeaderMalformed" => Kind::Region,
        "SlowDown" | "ServiceUnavailable" | "Throttling" | "ThrottlingException" | "RequestLimitExceeded" => {
            Kind::Passing(Passing::Throttled)
        }
        // The last three: another conditional write is under way; the request's body was damaged or cut on its way.
        "InternalError" | "ConditionalRequestConflict" | "OperationAborted" | "BadDigest" | "IncompleteBody" => {
            Kind::Passing(Passing::Server)
        }
        "RequestTimeout" => Kind::Passing(Passing::Timeout),
        _ => match status {
            404 => Kind::NoSuchKey,
            412 => Kind::Exists,
            416 => Kind::Range,
            301 | 307 => Kind::Region,
            401 | 403 => Kind::Denied,
            408 => Kind::Passing(Passing::Timeout),
            429 | 503 => Kind::Passing(Passing::Throttled),
            500..=599 => Kind::Passing(Passing::Server),
            _ => Kind::Refused,
        },
    }
}

/// An error and what lies behind it, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        next = error.source();
    }
    one_line(&text)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MESSAGE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_by_their_code_and_else_by_their_status() {
        let check = |status, code, expect| assert_eq!(kind_of(status, code), expect, "{status} {code}");
        check(404, "NoSuchKey", Kind::NoSuchKey);
        check(404, "NoSuchBucket", Kind::NoSuchBucket);
        check(404, "NotFound", Kind::NoSuchKey);
        check(412, "", Kind::Exists);
        check(409, "ConditionalRequestConflict", Kind::Passing(Passing::Server));
        check(200, "InternalError", Kind::Passing(Passing::Server));
        check(200, "SlowDown", Kind::Passing(Passing::Throttled));
        check(503, "", Kind::Passing(Passing::Throttled));
        check(502, "", Kind::Passing(Passing::Server));
        check(400, "RequestTimeout", Kind::Passing(Passing::Timeout));
        check(400, "BadDigest", Kind::Passing(Passing::Server));
        check(403, "AccessDenied", Kind::Denied);
        check(403, "SignatureDoesNotMatch", Kind::Credentials);
        check(400, "KeyTooLongError", Kind::Refused);
        check(409, "BucketAlreadyExists", Kind::Refused);
    }

    #[test]
    fn what_a_store_says_is_one_short_line() {
        assert_eq!(one_line("a\n  b\tc"), "a b c");
        assert_eq!(one_line(&"x".repeat(1000)).len(), MESSAGE_CHARS_MAX);
    }
}
