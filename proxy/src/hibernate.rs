//! Putting a session away and giving it back: reads its state from Postgres itself, on its own backend, and replays
//! it on another.
//!
//! What is kept, and how it is given back:
//! - start-up parameters: in the new start-up packet, so that `RESET` means what it meant;
//! - session authorization, role, settings whose source is the session, custom settings: by `set_config`;
//! - prepared statements of the protocol: by `Parse`; those of SQL: by their own text; the unnamed one: by `Parse`.
//!
//! What pins a session, because it lives in the backend alone: temporary objects, advisory locks, `LISTEN`, holdable
//! cursors; streams of WAL are another matter ([`crate::replication`]). Not seen, and lost: `currval`/`lastval`, `setseed`, what `LOAD` loaded, state inside
//! procedural languages, custom settings whose names appear nowhere (see [`crate::settings`]).
//!
//! All queries are qualified down to operators, so that no `search_path` shadows them, and go through named
//! statements, so that the client's unnamed statement survives if the session stays.

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;

use tokio::io::AsyncWriteExt;

use crate::conversation::{Conversation, Parameter};
use crate::lexical::begins_with;
use crate::unix::UnixStream;
use crate::wire::{Fields, cstr, error_field, message, read_message};

/// What the proxy's own statements are called; no driver uses it. They are no part of a session.
pub const RESERVED: &str = "__ebb";
/// The name of the one that asks.
const OWN: &str = "__ebb_session_state";
/// LIMIT: what one hibernated session may keep of settings and statements; more keeps the compute awake instead.
const KEPT_MAX: usize = 1 << 20;
/// LIMIT: one row of state; statements are bounded in the query itself, so only a setting can come near.
const MESSAGE_MAX: usize = 16 << 20;
const OID_TEXT: u32 = 25;
const OID_TEXT_ARRAY: u32 = 1009;

/// What a session is, apart from its backend. Bytes are in the session's client encoding.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Settings in the order to be given back.
    settings: Vec<Parameter>,
    statements: Vec<Statement>,
    /// The body of the `Parse` of the unnamed statement.
    unnamed: Option<Box<[u8]>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Statement {
    name: Box<[u8]>,
    text: Box<[u8]>,
    origin: Origin,
}

#[derive(Debug, PartialEq, Eq)]
enum Origin {
    /// `Parse`, with these parameter types.
    Protocol(Box<[u32]>),
    /// `PREPARE`, whose text is the statement's.
    Sql,
}

/// What the examination of a session found.
#[derive(Debug)]
pub enum Examined {
    /// All of it can be given back.
    Kept(Box<Kept>),
    /// This cannot.
    Pinned(String),
}

/// The backend is gone.
#[derive(Debug)]
pub struct Lost {
    /// Its last words: the body of an `ErrorResponse`.
    pub error: Option<Vec<u8>>,
}

/// Reads the state of a session at rest. Messages for the client that arrive meanwhile go to `aside`.
///
/// Not cancel-safe: dropped half-way, the backend's stream is of no use any more.
///
/// # Errors
/// If the backend is gone.
pub async fn examine(
    backend: &mut UnixStream,
    conversation: &mut Conversation,
    aside: &mut Vec<u8>,
) -> Result<Examined, Lost> {
    let unnamed = match conversation.unnamed_statement() {
        Ok(unnamed) => unnamed.map(Into::into),
        Err(_) => return Ok(Examined::Pinned("unnamed prepared statement that has not been run yet".to_owned())),
    };
    if conversation.settings().is_incomplete() {
        return Ok(Examined::Pinned("custom setting whose name is not known".to_owned()));
    }
    let names = format!("{{{}}}", conversation.settings().names().collect::<Vec<_>>().join(","));
    let mut asking = Vec::new();
    parse(&mut asking, OWN.as_bytes(), state_query().as_bytes(), &[OID_TEXT_ARRAY]);
    bind(&mut asking, OWN.as_bytes(), &[names.as_bytes()]);
    execute(&mut asking);
    close(&mut asking, OWN.as_bytes());
    sync(&mut asking);

    let mut kept = Kept { unnamed, ..Kept::default() };
    let mut pin = None;
    let mut replies = Replies { backend, conversation, aside };
    replies.send(&asking).await?;
    let failed = replies.until_ready(|row| pin = pin.take().or_else(|| kept.take_row(row).err())).await?;
    if let Some(error) = failed {
        return Ok(Examined::Pinned(format!("its state could not be read: {}", error_text(&error))));
    }
    if let Some(reason) = pin {
        return Ok(Examined::Pinned(reason));
    }
    if kept.size() > KEPT_MAX {
        return Ok(Examined::Pinned(format!("settings and statements of more than {KEPT_MAX} bytes")));
    }
    for statement in kept.statements.iter().filter(|statement| matches!(statement.origin, Origin::Sql)) {
        if !begins_with(&statement.text, b"prepare") || !replies.is_one_statement(&statement.text).await? {
            let name = String::from_utf8_lossy(&statement.name);
            return Ok(Examined::Pinned(format!("prepared statement \"{name}\" made together with other commands")));
        }
    }
    Ok(Examined::Kept(Box::new(kept)))
}

/// What came of a replay.
#[derive(Debug, Default)]
pub struct Replayed {
    /// Parameters the backend reported meanwhile.
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// Statements that could not be prepared again: name, and why.
    pub lost_statements: Vec<(String, String)>,
}

/// Why a session could not be given back.
#[derive(Debug)]
pub enum ReplayError {
    /// The backend is gone.
    Lost,
    /// A setting was refused: what the backend said.
    Refused(String),
}

impl From<io::Error> for ReplayError {
    fn from(_: io::Error) -> Self {
        ReplayError::Lost
    }
}

/// Gives a session's state to a backend that has just started. Cancel-safe in that the backend is to be dropped then.
///
/// # Errors
/// If the settings are refused or the backend is gone. Statements that are refused are reported, not errors.
pub async fn replay(backend: &mut UnixStream, kept: &Kept) -> Result<Replayed, ReplayError> {
    let (bytes, parts) = kept.replay_messages();
    let mut replayed = Replayed::default();
    let (mut reader, mut writer) = tokio::io::split(backend);
    // Both at once: with thousands of statements, neither side's socket buffer holds all.
    let reading = async {
        let mut body = Vec::new();
        for part in parts {
            let mut error = None;
            loop {
                match read_message(&mut reader, &mut body, MESSAGE_MAX).await? {
                    b'Z' => break,
                    b'E' => error = Some(error_text(&body)),
                    b'S' => {
                        let mut fields = Fields(&body);
                        if let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) {
                            replayed.parameters.push((name.to_vec(), value.to_vec()));
                        }
                    }
                    _ => {}
                }
            }
            match (part, error) {
                (_, None) | (Part::Unnamed, _) => {}
                (Part::Settings, Some(error)) => return Err(ReplayError::Refused(error)),
                (Part::Statement(name), Some(error)) => {
                    replayed.lost_statements.push((String::from_utf8_lossy(name).into_owned(), error));
                }
            }
        }
        Ok(())
    };
    let writing = async { writer.write_all(&bytes).await.map_err(ReplayError::from) };
    tokio::try_join!(reading, writing)?;
    Ok(replayed)
}

/// A run of messages that ends with its own `Sync`: what failed in it is told apart from the rest.
enum Part<'a> {
    Settings,
    Statement(&'a [u8]),
    Unnamed,
}

impl Kept {
    /// The text of a statement of the protocol that takes no parameters.
    pub fn statement_without_parameters(&self, name: &[u8]) -> Option<&[u8]> {
        let statement = self.statements.iter().find(|statement| *statement.name == *name)?;
        matches!(&statement.origin, Origin::Protocol(types) if types.is_empty()).then_some(&*statement.text)
    }

    /// Notes another unnamed statement: the body of its `Parse`.
    pub fn set_unnamed(&mut self, body: Option<&[u8]>) {
        self.unnamed = body.map(Into::into);
    }

    /// Takes one row of the state query; the error is a reason to pin.
    fn take_row(&mut self, row: &[u8]) -> Result<(), String> {
        let broken = || "its state could not be understood".to_owned();
        let mut fields = Fields(row);
        let columns = fields.i16().ok_or_else(broken)?;
        let mut column = || fields.column().ok_or_else(broken);
        if columns != 4 {
            return Err(broken());
        }
        let (kind, name, value, types) = (column()?, column()?, column()?, column()?);
        let name = name.ok_or_else(broken)?;
        match (kind, value) {
            (Some(b"pin"), _) => return Err(String::from_utf8_lossy(name).into_owned()),
            // A custom setting that was never set after all.
            (Some(b"set"), None) => {}
            (Some(b"set"), Some(value)) => self.take_setting(name, value),
            (Some(b"sql"), Some(text)) => self.take_statement(name, text, Origin::Sql),
            (Some(b"wire"), Some(text)) => {
                let types = types.and_then(parse_oids).ok_or_else(broken)?;
                self.take_statement(name, text, Origin::Protocol(types));
            }
            _ => return Err(broken()),
        }
        Ok(())
    }

    /// Leaves the unnamed statement out.
    pub fn forget_unnamed(&mut self) {
        self.unnamed = None;
    }

    /// Leaves a setting out.
    pub fn forget_setting(&mut self, name: &[u8]) {
        self.settings.retain(|(held, _)| **held != *name);
    }

    /// Whether a new session of this role would be the same.
    pub fn is_plain(&self, role: &str) -> bool {
        let usual = |(name, value): &Parameter| match &**name {
            b"role" => **value == *b"none",
            b"session_authorization" => **value == *role.as_bytes(),
            _ => false,
        };
        self.statements.is_empty() && self.unnamed.is_none() && self.settings.iter().all(usual)
    }

    /// Whether there are prepared statements in it.
    pub fn has_statements(&self) -> bool {
        !self.statements.is_empty()
    }

    /// Tells its settings from others.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.settings.hash(&mut hasher);
        // 0 is no settings at all.
        hasher.finish().max(1)
    }

    fn take_setting(&mut self, name: &[u8], value: &[u8]) {
        let at = self.settings.partition_point(|(held, _)| rank(held) <= rank(name));
        self.settings.insert(at, (name.into(), value.into()));
    }

    fn take_statement(&mut self, name: &[u8], text: &[u8], origin: Origin) {
        self.statements.push(Statement { name: name.into(), text: text.into(), origin });
    }

    fn size(&self) -> usize {
        let settings: usize = self.settings.iter().map(|(name, value)| name.len() + value.len()).sum();
        let statements: usize = self.statements.iter().map(|held| held.name.len() + held.text.len()).sum();
        settings + statements + self.unnamed.as_ref().map_or(0, |body| body.len())
    }

    fn replay_messages(&self) -> (Vec<u8>, Vec<Part<'_>>) {
        let (mut out, mut parts) = (Vec::new(), vec![Part::Settings]);
        parse(&mut out, OWN.as_bytes(), b"SELECT pg_catalog.set_config($1, $2, false)", &[OID_TEXT, OID_TEXT]);
        for (name, value) in &self.settings {
            bind(&mut out, OWN.as_bytes(), &[name, value]);
            execute(&mut out);
        }
        close(&mut out, OWN.as_bytes());
        sync(&mut out);
        for Statement { name, text, origin } in &self.statements {
            match origin {
                Origin::Protocol(types) => parse(&mut out, name, text, types),
                Origin::Sql => {
                    parse(&mut out, OWN.as_bytes(), text, &[]);
                    bind(&mut out, OWN.as_bytes(), &[]);
                    execute(&mut out);
                    close(&mut out, OWN.as_bytes());
                }
            }
            sync(&mut out);
            parts.push(Part::Statement(name));
        }
        if let Some(body) = &self.unnamed {
            message(&mut out, b'P', |out| out.extend_from_slice(body));
            sync(&mut out);
            parts.push(Part::Unnamed);
        }
        (out, parts)
    }
}

/// Reads answers to the proxy's own questions, and puts aside what is meant for the client.
struct Replies<'a> {
    backend: &'a mut UnixStream,
    conversation: &'a mut Conversation,
    aside: &'a mut Vec<u8>,
}

impl Replies<'_> {
    async fn send(&mut self, bytes: &[u8]) -> Result<(), Lost> {
        self.backend.write_all(bytes).await.map_err(|_| Lost { error: None })
    }

    /// Reads up to the `ReadyForQuery`; answers the body of the error met, if any.
    async fn until_ready(&mut self, mut row: impl FnMut(&[u8])) -> Result<Option<Vec<u8>>, Lost> {
        let mut error = None;
        let mut body = Vec::new();
        loop {
            let Ok(tag) = read_message(self.backend, &mut body, MESSAGE_MAX).await else {
                return Err(Lost { error });
            };
            match tag {
                b'Z' => return Ok(error),
                b'D' => row(&body),
                b'E' => error = Some(std::mem::take(&mut body)),
                // Meant for the client, whoever is asking.
                b'A' => message(self.aside, tag, |out| out.extend_from_slice(&body)),
                b'S' => {
                    let mut fields = Fields(&body);
                    if let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) {
                        self.conversation.note_parameter(name, value);
                    }
                    message(self.aside, tag, |out| out.extend_from_slice(&body));
                }
                _ => {}
            }
        }
    }

    /// Lets Postgres's own parser tell: the extended protocol takes one command at a time (PostgreSQL 15, 55.2.3).
    async fn is_one_statement(&mut self, text: &[u8]) -> Result<bool, Lost> {
        let mut asking = Vec::new();
        parse(&mut asking, OWN.as_bytes(), text, &[]);
        close(&mut asking, OWN.as_bytes());
        sync(&mut asking);
        self.send(&asking).await?;
        Ok(self.until_ready(|_| {}).await?.is_none())
    }
}

/// One query for everything: rows of `(kind, name, value, parameter types)`. `$1` are names of custom settings seen.
fn state_query() -> String {
    // `pg_namespace` is catalog 2615; everything in a schema depends on it. User functions have ids from 16384 up
    // (`FirstNormalObjectId`, transam.h); they may set custom settings whose names no query of the client shows.
    // Backslashes are doubled in E'' strings, because `standard_conforming_strings` is the client's to set.
    let mut query = format!(
        r"
SELECT 'set'::pg_catalog.text, s.name::pg_catalog.text, pg_catalog.current_setting(s.name), NULL::pg_catalog.text
  FROM pg_catalog.pg_settings s
 WHERE s.source OPERATOR(pg_catalog.=) 'session' AND s.context OPERATOR(pg_catalog.<>) 'internal'
   AND s.name OPERATOR(pg_catalog.!~) '^transaction_(isolation|read_only|deferrable)$'
   AND s.name OPERATOR(pg_catalog.<>) 'role' AND s.name OPERATOR(pg_catalog.<>) 'session_authorization'
UNION ALL SELECT 'set', n, pg_catalog.current_setting(n, true), NULL FROM pg_catalog.unnest($1) n
UNION ALL SELECT 'set', f.n, pg_catalog.current_setting(f.n, true), NULL FROM (
  SELECT DISTINCT pg_catalog.lower(COALESCE(m[1], m[2])) AS n
    FROM pg_catalog.pg_proc p, pg_catalog.regexp_matches(p.prosrc,
      E'set_config\\s*\\(\\s*''([a-z_]\\w*\\.\\w+)''|\\mset\\s+(?:session\\s+)?([a-z_]\\w*\\.\\w+)\\s*(?:=|to\\M)', 'gi') m
   WHERE p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND p.prosrc OPERATOR(pg_catalog.~~*) '%set%') f
UNION ALL SELECT CASE WHEN p.from_sql THEN 'sql' ELSE 'wire' END, p.name, p.statement,
         p.parameter_types::pg_catalog.oid[]::pg_catalog.text
  FROM pg_catalog.pg_prepared_statements p
 WHERE p.name OPERATOR(pg_catalog.!~) '^{RESERVED}'
   AND pg_catalog.octet_length(p.statement) OPERATOR(pg_catalog.<=) {KEPT_MAX}"
    );
    for name in ["session_authorization", "role"] {
        let _ = write!(query, "\nUNION ALL SELECT 'set', '{name}', pg_catalog.current_setting('{name}'), NULL");
    }
    for (reason, found) in [
        (
            "temporary table",
            "pg_catalog.pg_depend d WHERE d.refclassid OPERATOR(pg_catalog.=) 2615::pg_catalog.oid \
             AND d.refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()",
        ),
        (
            "advisory lock",
            "pg_catalog.pg_locks l WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' \
             AND l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()",
        ),
        ("LISTEN", "pg_catalog.pg_listening_channels()"),
        ("holdable cursor", "pg_catalog.pg_cursors c WHERE c.is_holdable"),
        (
            "prepared statement that is too long to keep",
            &format!(
                "pg_catalog.pg_prepared_statements p \
                 WHERE pg_catalog.octet_length(p.statement) OPERATOR(pg_catalog.>) {KEPT_MAX}"
            ),
        ),
    ] {
        let _ = write!(
            query,
            "\nUNION ALL SELECT 'pin', '{reason}'::pg_catalog.text, NULL, NULL WHERE EXISTS (SELECT FROM {found})"
        );
    }
    query
}

/// The order in which settings are given back: all later texts are read in the client's encoding; a session
/// authorization resets the role; the rest is set with that role's rights.
fn rank(setting: &[u8]) -> u8 {
    match setting {
        b"client_encoding" => 0,
        b"session_authorization" => 1,
        b"role" => 2,
        _ => 3,
    }
}

/// Reads `{23,25}`.
fn parse_oids(text: &[u8]) -> Option<Box<[u32]>> {
    let inner = std::str::from_utf8(text).ok()?.strip_prefix('{')?.strip_suffix('}')?;
    inner.split(',').filter(|oid| !oid.is_empty()).map(|oid| oid.parse().ok()).collect()
}

fn error_text(body: &[u8]) -> String {
    String::from_utf8_lossy(error_field(body, b'M').unwrap_or(b"no message")).into_owned()
}

fn parse(out: &mut Vec<u8>, name: &[u8], text: &[u8], types: &[u32]) {
    message(out, b'P', |out| {
        cstr(out, name);
        cstr(out, text);
        // LIMIT: Postgres allows 65,535 parameters.
        out.extend_from_slice(&(types.len() as u16).to_be_bytes());
        for oid in types {
            out.extend_from_slice(&oid.to_be_bytes());
        }
    });
}

/// Binds the proxy's own portal, everything in text form.
fn bind(out: &mut Vec<u8>, statement: &[u8], values: &[&[u8]]) {
    message(out, b'B', |out| {
        cstr(out, OWN);
        cstr(out, statement);
        out.extend_from_slice(&0_u16.to_be_bytes());
        out.extend_from_slice(&(values.len() as u16).to_be_bytes());
        for value in values {
            out.extend_from_slice(&(value.len() as u32).to_be_bytes());
            out.extend_from_slice(value);
        }
        out.extend_from_slice(&0_u16.to_be_bytes());
    });
}

/// Executes the proxy's own portal to its end, and closes it so that the name is free again.
fn execute(out: &mut Vec<u8>) {
    message(out, b'E', |out| {
        cstr(out, OWN);
        out.extend_from_slice(&0_u32.to_be_bytes());
    });
    message(out, b'C', |out| {
        out.push(b'P');
        cstr(out, OWN);
    });
}

fn close(out: &mut Vec<u8>, statement: &[u8]) {
    message(out, b'C', |out| {
        out.push(b'S');
        cstr(out, statement);
    });
}

fn sync(out: &mut Vec<u8>) {
    message(out, b'S', |_| {});
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_lists_are_read() {
        assert_eq!(parse_oids(b"{}").unwrap()[..], []);
        assert_eq!(parse_oids(b"{23,25}").unwrap()[..], [23, 25]);
        assert!(parse_oids(b"{23,x}").is_none());
        assert!(parse_oids(b"23").is_none());
    }

    #[test]
    fn the_encoding_comes_first_and_the_role_before_what_is_set_under_it() {
        let mut kept = Kept::default();
        for name in ["a", "role", "client_encoding", "b", "session_authorization"] {
            kept.take_setting(name.as_bytes(), b"x");
        }
        let names: Vec<_> = kept.settings.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, [&b"client_encoding"[..], b"session_authorization", b"role", b"a", b"b"]);
    }
}
