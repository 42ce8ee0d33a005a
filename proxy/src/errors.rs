//! Everything the proxy itself says to a client, and how it is put into bytes.
//!
//! All texts stand here together so that they can be read, and tested, as one voice.

use std::time::Duration;

use ebb_types::SqlState;

use crate::endpoints::EndpointError;
use crate::wire::{cstr, message};

/// How bad it is: what follows for the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The session ends.
    Fatal,
    /// The session goes on without what was asked for.
    Error,
    /// The session goes on.
    Warning,
    /// Nothing is wrong.
    Notice,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Severity::Fatal => "FATAL",
            Severity::Error => "ERROR",
            Severity::Warning => "WARNING",
            Severity::Notice => "NOTICE",
        }
    }
}

/// One thing said to a client: an `ErrorResponse` if it is an error, else a `NoticeResponse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    severity: Severity,
    sqlstate: SqlState,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

/// `00000`, what Postgres gives plain notices.
const NOTHING_WRONG: &str = "00000";
/// `01000`, what Postgres gives plain warnings.
const PLAIN_WARNING: &str = "01000";

impl Said {
    fn fatal(sqlstate: SqlState, message: impl Into<String>) -> Self {
        Self { severity: Severity::Fatal, sqlstate, message: message.into(), detail: None, hint: None }
    }

    fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The code a client sees.
    pub fn sqlstate(&self) -> &'static str {
        match self.severity {
            Severity::Fatal | Severity::Error => self.sqlstate.as_str(),
            Severity::Warning => PLAIN_WARNING,
            Severity::Notice => NOTHING_WRONG,
        }
    }

    /// Appends the message as it goes over the wire.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let tag = if matches!(self.severity, Severity::Fatal | Severity::Error) { b'E' } else { b'N' };
        message(out, tag, |body| {
            let mut field = |tag: u8, text: &str| {
                body.push(tag);
                cstr(body, text);
            };
            field(b'S', self.severity.as_str());
            field(b'V', self.severity.as_str());
            field(b'C', self.sqlstate());
            field(b'M', &self.message);
            if let Some(detail) = &self.detail {
                field(b'D', detail);
            }
            if let Some(hint) = &self.hint {
                field(b'H', hint);
            }
            body.push(0);
        });
    }

    // Start-up.

    /// A packet or message that is not what the protocol allows here.
    pub fn malformed(what: &str) -> Self {
        Self::fatal(SqlState::PROTOCOL_VIOLATION, format!("malformed message from the client: {what}"))
    }

    /// A protocol version nobody speaks.
    pub fn unsupported_version(major: u16, minor: u16) -> Self {
        Self::fatal(SqlState::FEATURE_NOT_SUPPORTED, format!("unsupported frontend protocol {major}.{minor}"))
            .detail("The proxy speaks versions 3.0 and 3.2 of the protocol.")
    }

    /// No endpoint was named in any of the three ways.
    pub fn no_endpoint(domain: &str) -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, "no endpoint given").hint(format!(
            "Name one: connect with TLS to the host BRANCH--PROJECT.{domain}, or add options=endpoint%3DBRANCH--PROJECT \
             to the URL, or name the database NAME@BRANCH--PROJECT."
        ))
    }

    /// An `endpoint=` that is no name at all.
    pub fn not_an_endpoint(text: &str, why: impl std::fmt::Display) -> Self {
        Self::fatal(SqlState::INVALID_CATALOG_NAME, format!("endpoint {text:?} is not valid"))
            .detail(format!("{why}."))
            .hint("An endpoint is written BRANCH--PROJECT, for example prod--shop.")
    }

    /// A `point=` that is no moment at all.
    pub fn not_a_point(text: &str) -> Self {
        Self::fatal(SqlState::INVALID_PARAMETER_VALUE, format!("point {text:?} is not valid")).hint(
            "A point is the name of a checkpoint, a position like 0/16B3748, or a time like 2026-11-21T06:00:00Z.",
        )
    }

    /// The role may log in now, but not at the moment that is visited.
    pub fn not_admitted(role: &str) -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, format!("role \"{role}\" could not log in at that moment"))
            .hint("Connect as a role that existed then and was no superuser.")
    }

    /// A wish of the client's that is neither on nor off.
    pub fn not_a_switch(name: &str, value: &str) -> Self {
        Self::fatal(SqlState::INVALID_PARAMETER_VALUE, format!("setting \"{name}\" is not a switch: {value:?}"))
            .hint("Want on or off.")
    }

    /// No `user` in the start-up packet.
    pub fn no_user() -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, "no user name given in the startup packet")
    }

    /// A client from afar that does not encrypt.
    pub fn tls_wanted() -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, "connections from other machines must be encrypted")
            .hint("Connect with sslmode=require, or better sslmode=verify-full and the proxy's ca.pem as sslrootcert.")
    }

    // Who gets in.

    /// A trusted load balancer did not begin with a PROXY protocol header of version 2, or with a broken one.
    pub fn no_proxy_header(why: impl std::fmt::Display) -> Self {
        Self::fatal(SqlState::PROTOCOL_VIOLATION, "the load balancer did not tell for whom it speaks")
            .detail(format!("What it sent is not what its address is trusted to send: {why}."))
            .hint("Have it send version 2 of the PROXY protocol, or take its address out of --proxy-protocol.")
    }

    /// More connections from one address than its rate allows.
    pub fn too_many_from_address(wait: Duration) -> Self {
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, "too many connections from this address in a short time")
            .detail("This is the proxy's limit for connections of one address.")
            .hint(again_in(wait))
    }

    /// More connections of one address that have not logged in yet than it has places.
    pub fn too_many_strangers(limit: usize) -> Self {
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, "too many connections from this address that have not logged in")
            .detail(format!("This is the proxy's limit: {limit} connections of one address that have not logged in."))
            .hint("Try again when some of them have logged in or gone.")
    }

    /// More logins at an endpoint than its rate allows.
    pub fn too_many_logins(endpoint: &str, wait: Duration) -> Self {
        Self::fatal(
            SqlState::TOO_MANY_CONNECTIONS,
            format!("too many logins at endpoint \"{endpoint}\" in a short time"),
        )
        .detail(
            "This is the proxy's limit for logins at one endpoint by addresses that have not logged in there lately.",
        )
        .hint(again_in(wait))
    }

    /// The branch's allow list does not have this address.
    pub fn not_allowed(endpoint: &str, address: std::net::IpAddr) -> Self {
        Self::fatal(
            SqlState::INVALID_AUTHORIZATION,
            format!("endpoint \"{endpoint}\" does not take connections from address {address}"),
        )
        .hint("Connect from an address on its allow list, or have this one put there with `ebb branch allow`.")
    }

    /// A client from afar without a certificate, where one is wanted.
    pub fn certificate_wanted() -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, "connection requires a valid client certificate").hint(
            "Give the client a certificate of an authority that this server trusts (sslcert and sslkey in libpq).",
        )
    }

    /// A client certificate that is another's.
    pub fn certificate_of_another(role: &str) -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, format!("certificate authentication failed for user \"{role}\""))
            .hint("The common name of the client's certificate must be the name of the role.")
    }

    /// A wrong password, an unknown role, a role that may not log in: all look alike, down to the hint.
    pub fn wrong_password(role: &str) -> Self {
        Self::fatal(SqlState::INVALID_PASSWORD, format!("password authentication failed for user \"{role}\"")).hint(
            "If the password is right, it may be stored as md5, which is not taken here: \
             set it again while password_encryption is scram-sha-256.",
        )
    }

    /// Too many wrong passwords from this address.
    pub fn too_many_failures(wait: Duration) -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, "too many failed logins from this address").hint(again_in(wait))
    }

    /// Too many wrong passwords at an endpoint, from anywhere.
    pub fn too_many_failures_at(endpoint: &str, wait: Duration) -> Self {
        Self::fatal(SqlState::INVALID_AUTHORIZATION, format!("too many failed logins at endpoint \"{endpoint}\""))
            .detail("Addresses that have logged in there lately are not held up.")
            .hint(again_in(wait))
    }

    /// The endpoint holds as many sessions as it may.
    pub fn too_many_sessions(endpoint: &str, limit: usize) -> Self {
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, format!("too many connections for endpoint \"{endpoint}\""))
            .detail(format!("This is the proxy's limit: {limit} connections per endpoint, sleeping ones included."))
            .hint("Close connections that are not needed, or use a connection pool in the application.")
    }

    // Transaction mode.

    /// A `pool=` that is no mode.
    pub fn not_a_pool_mode(text: &str) -> Self {
        Self::fatal(SqlState::INVALID_PARAMETER_VALUE, format!("pool mode {text:?} is not valid"))
            .hint("A pool mode is transaction or session.")
    }

    /// Something that sessions in transaction mode cannot have.
    pub fn not_pooled(what: &str) -> Self {
        Self::fatal(SqlState::FEATURE_NOT_SUPPORTED, "this is not available in transaction mode")
            .detail(format!("What is meant: {what}."))
            .hint("Connect to the endpoint's own name, without -pooler.")
    }

    /// No backend became free in time.
    pub fn pool_exhausted(size: usize, waited: Duration) -> Self {
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, "no connection of the pool became free")
            .detail(format!("The pool has {size} connections; the session waited {} s for one.", waited.as_secs_f64()))
            .hint("Keep transactions short, or make the pool larger (ebb branch set --pool-size).")
    }

    /// The session has to keep its backend, and too many do already.
    pub fn too_many_pins(reason: &str) -> Self {
        Self::fatal(SqlState::TOO_MANY_CONNECTIONS, "too many sessions keep a connection of the pool for themselves")
            .detail(format!("This one would keep it for a {reason}; half of the pool may be kept so."))
            .hint("Connect to the endpoint's own name, without -pooler, or give up what keeps the connection.")
    }

    /// The role has as many sessions at the endpoint as it may.
    pub fn too_many_sessions_of_role(role: &str, endpoint: &str, limit: usize) -> Self {
        Self::fatal(
            SqlState::TOO_MANY_CONNECTIONS,
            format!("too many connections for role \"{role}\" at endpoint \"{endpoint}\""),
        )
        .detail(format!(
            "This is the proxy's limit: {limit} connections per role and endpoint, sleeping ones included."
        ))
        .hint("Close connections that are not needed, or use a connection pool in the application.")
    }

    // Waiting.

    /// The wake budget is spent; `usual` is how long the branch's last wake took.
    pub fn still_waking(budget: Duration, usual: Option<Duration>) -> Self {
        let usual = match usual {
            Some(usual) => format!("the branch's last wake took {:.1} s", usual.as_secs_f64()),
            None => "a wake usually takes well under a second".to_owned(),
        };
        Self::fatal(SqlState::CANNOT_CONNECT_NOW, "the compute is still waking")
            .detail(format!("It did not answer within {} s.", budget.as_secs_f64()))
            .hint(format!("Try again in a second: {usual}, and this one goes on meanwhile."))
    }

    /// The endpoint stayed fenced for the whole wake budget.
    pub fn still_fenced(budget: Duration) -> Self {
        Self::fatal(SqlState::CANNOT_CONNECT_NOW, "the branch is busy with an operation")
            .detail(format!("New work was held for {} s.", budget.as_secs_f64()))
            .hint("Try again in a few seconds: the operation (a suspend, restore or rollback) goes on meanwhile.")
    }

    /// What the client was waiting for was cancelled, by its own wish.
    pub fn called_off() -> Self {
        Self {
            severity: Severity::Error,
            ..Self::fatal(SqlState::QUERY_CANCELED, "canceling statement due to user request")
        }
        .detail("It was waiting for a connection to its compute and had not begun.")
    }

    /// A wait that has become long enough to be worth a word: for a fence, or for a wake.
    pub fn waiting(fenced: bool) -> Self {
        let what = if fenced { "the branch's operation to end" } else { "the compute to wake" };
        Self {
            severity: Severity::Notice,
            sqlstate: SqlState::CANNOT_CONNECT_NOW,
            message: format!("waiting for {what}"),
            detail: None,
            hint: Some("The connection option -c ebb.notice=off turns this notice off.".to_owned()),
        }
    }

    // Ends.

    /// The backend is gone; `busy` tells whether something was under way.
    pub fn compute_lost(busy: bool) -> Self {
        let said = Self::fatal(SqlState::CONNECTION_FAILURE, "the connection to the compute was lost");
        if busy {
            said.detail("A query or transaction was under way; whether it was committed is not known.")
                .hint("Reconnect, and look whether the last transaction took effect before repeating it.")
        } else {
            said.detail("No transaction was open; what the session had set was lost with the compute.")
                .hint("Reconnect.")
        }
    }

    /// A fence ended this session; `reason` is what could not be given back.
    pub fn fenced_out(reason: &str) -> Self {
        Self::fatal(SqlState::ADMIN_SHUTDOWN, "terminating connection because the branch is being switched")
            .detail(format!("The session could not be kept: {reason}."))
            .hint("Reconnect; an open transaction was rolled back.")
    }

    /// What the session holds would keep its branch awake, and the branch's policy is not to be; `reason` is that.
    pub fn evicted(reason: &str) -> Self {
        Self::fatal(SqlState::IDLE_SESSION_TIMEOUT, "terminating connection because its idle branch is suspended")
            .detail(format!("The session could not be kept: {reason}."))
            .hint(
                "Reconnect. Sessions without such state are kept; `ebb branch set PROJECT/BRANCH --pinned keep` keeps the \
                 branch awake for those that have it.",
            )
    }

    /// The proxy itself is stopping.
    pub fn draining(busy: bool) -> Self {
        let said = Self::fatal(SqlState::ADMIN_SHUTDOWN, "terminating connection because the proxy is shutting down");
        if busy { said.hint("Reconnect; an open transaction was rolled back.") } else { said.hint("Reconnect.") }
    }

    /// The session's state could not be given back to a new backend.
    pub fn not_replayed(what: &str) -> Self {
        Self::fatal(SqlState::CONNECTION_FAILURE, "the session could not be resumed")
            .detail(format!("{what}."))
            .hint("Reconnect; no transaction was open, so nothing was lost but the session's settings.")
    }

    /// A prepared statement that no longer fits the data.
    pub fn statement_not_replayed(name: &str, why: &str) -> Self {
        Self {
            severity: Severity::Warning,
            sqlstate: SqlState::CONNECTION_FAILURE,
            message: format!("prepared statement \"{name}\" could not be prepared again"),
            detail: Some(format!("{why}.")),
            hint: Some("Prepare it again; until then it does not exist in this session.".to_owned()),
        }
    }

    /// A compute that answers with something the proxy does not understand.
    pub fn strange_backend(what: &str) -> Self {
        Self::fatal(SqlState::INTERNAL_ERROR, "the compute answered with something unexpected")
            .detail(format!("{what}."))
            .hint("This is a fault of Ebb's; please report it with the proxy's log.")
    }
}

fn again_in(wait: Duration) -> String {
    format!("Try again in {} s.", wait.as_secs() + 1)
}

impl From<EndpointError> for Said {
    fn from(error: EndpointError) -> Self {
        Self {
            severity: Severity::Fatal,
            sqlstate: error.sqlstate,
            message: error.message,
            detail: error.detail,
            hint: error.hint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_carries_both_severities_and_only_the_fields_it_has() {
        let mut out = Vec::new();
        Said::no_user().encode(&mut out);
        let text = b"SFATAL\0VFATAL\0C28000\0Mno user name given in the startup packet\0\0";
        assert_eq!(out[0], b'E');
        assert_eq!(out[1..5], (text.len() as u32 + 4).to_be_bytes());
        assert_eq!(out[5..], text[..]);
    }

    #[test]
    fn a_notice_has_the_code_of_success() {
        let mut out = Vec::new();
        Said::waiting(false).encode(&mut out);
        assert_eq!(out[0], b'N');
        assert!(out.windows(8).any(|bytes| bytes == b"\0C00000\0"));
    }
}
