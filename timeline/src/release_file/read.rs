//! Reads the text: every key is known, every value has its type and lies within its bounds, or the place is told.

use std::ops::Range;

use ebb_types::nearest;
use jiff::SignedDuration;
use toml::de::{DeTable, DeValue};

use super::{Automatic, FILE_NAME, Fault, PROBES_MAX, Policy, Probe, Question, ReleaseFile};

const TOP: &[&str] = &["migrations", "secrets", "policy", "probe"];
const POLICY: &[&str] =
    &["rehearse", "fence", "fence_timeout", "lock_timeout", "statement_timeout", "rollback", "max_lost_transactions"];
const PROBE: &[&str] =
    &["name", "sql", "http", "command", "expect", "status", "json", "exit", "timeout", "retries", "wait"];

/// Which of the keys of a probe belong to which kind.
const KINDS: &[(&str, &[&str])] =
    &[("sql", &["expect"]), ("http", &["status", "json", "expect"]), ("command", &["exit"])];

/// LIMIT: a fence that holds clients for longer than this is an outage.
const FENCE_MAX_MS: u64 = 300_000;

/// LIMIT: of any length of time in the file; more is a mistake in the unit.
const LENGTH_MAX_MS: u64 = 24 * 3_600_000;

/// LIMIT: with longer waits than these a deploy is no act that one waits for.
const RETRIES_MAX: u64 = 1000;

/// LIMIT: transaction numbers of Postgres go round after that many; a bound beyond it is none.
const LOST_MAX: u64 = 4_000_000_000;

const PROBE_TIMEOUT_MS: u64 = 5_000;
const PROBE_RETRIES: u32 = 2;
const PROBE_WAIT_MS: u64 = 1_000;

/// Reads what `ebb.toml` says.
///
/// # Errors
/// Everything that is wrong with it, in the order of the text.
pub fn read(text: &str) -> Result<ReleaseFile, Vec<Fault>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader { text, faults: Vec::new() };
    for error in errors {
        reader.fault(error.span().unwrap_or(0..0), error.message().to_owned(), None);
    }
    let file = reader.file(table.get_ref());
    let mut faults = reader.faults;
    faults.sort_by_key(|fault| (fault.line, fault.column));
    if faults.is_empty() { Ok(file) } else { Err(faults) }
}

struct Reader<'t> {
    text: &'t str,
    faults: Vec<Fault>,
}

/// A value and where it is.
struct At<'a, 't>(&'a DeValue<'t>, Range<usize>);

impl Reader<'_> {
    fn fault(&mut self, at: Range<usize>, message: String, hint: Option<String>) {
        let before = self.text.get(..at.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        self.faults.push(Fault { line, column, message, hint });
    }

    /// Every key that is not one of these is a fault.
    fn known(&mut self, table: &DeTable<'_>, section: &str, keys: &[&str]) {
        for key in table.keys() {
            let name = key.get_ref().as_ref();
            if keys.contains(&name) {
                continue;
            }
            let near = nearest(name, keys.iter().copied());
            let hint = match near.is_empty() {
                true => format!("known here: {}", keys.join(", ")),
                false => format!("did you mean {}?", near.join(", ")),
            };
            self.fault(key.span(), format!("{section} has no key {name:?}"), Some(hint));
        }
    }

    fn file(&mut self, table: &DeTable<'_>) -> ReleaseFile {
        self.known(table, FILE_NAME, TOP);
        let mut file = ReleaseFile::default();
        if let Some(At(value, span)) = find(table, "migrations") {
            match value.as_str() {
                Some(dir) if is_inside(dir) => file.migrations = dir.trim_end_matches('/').to_owned(),
                Some(_) => self.fault(span, "migrations must be a directory within the release".to_owned(), None),
                None => self.not_a("migrations", "a string", value, span),
            }
        }
        if let Some(At(value, span)) = find(table, "secrets") {
            file.secrets =
                self.strings("secrets", value, span, is_secret_name, "letters, digits, \"_\", \"-\" and \".\"");
        }
        if let Some(At(value, span)) = find(table, "policy") {
            match value.as_table() {
                Some(policy) => file.policy = self.policy(policy),
                None => self.not_a("policy", "a table ([policy])", value, span),
            }
        }
        if let Some(At(value, span)) = find(table, "probe") {
            match value.as_array() {
                Some(probes) => {
                    if probes.len() > PROBES_MAX {
                        self.fault(span, format!("there are {} probes, {PROBES_MAX} may be", probes.len()), None);
                    }
                    for (at, probe) in probes.iter().enumerate() {
                        match probe.get_ref().as_table() {
                            Some(table) => file.probes.extend(self.probe(at, table, probe.span())),
                            None => self.not_a("probe", "a table ([[probe]])", probe.get_ref(), probe.span()),
                        }
                    }
                }
                None => self.not_a("probe", "an array of tables ([[probe]])", value, span),
            }
        }
        file
    }

    fn policy(&mut self, table: &DeTable<'_>) -> Policy {
        self.known(table, "[policy]", POLICY);
        let like = Policy::default();
        let bounded = Automatic::Data;
        let policy = Policy {
            rehearse: self.boolean(table, "rehearse").unwrap_or(like.rehearse),
            fence: self.boolean(table, "fence").unwrap_or(like.fence),
            fence_timeout_ms: self.length(table, "fence_timeout", FENCE_MAX_MS).unwrap_or(like.fence_timeout_ms),
            lock_timeout_ms: self.length(table, "lock_timeout", LENGTH_MAX_MS).unwrap_or(like.lock_timeout_ms),
            statement_timeout_ms: self
                .length(table, "statement_timeout", LENGTH_MAX_MS)
                .unwrap_or(like.statement_timeout_ms),
            rollback: self.automatic(table).unwrap_or(like.rollback),
            max_lost_transactions: self
                .number(table, "max_lost_transactions", LOST_MAX)
                .unwrap_or(like.max_lost_transactions),
        };
        if let Some(At(_, span)) = find(table, "max_lost_transactions")
            && policy.rollback != bounded
        {
            let hint = Some("add rollback = \"data\", or leave the bound out".to_owned());
            self.fault(span, "max_lost_transactions bounds rollback = \"data\" only".to_owned(), hint);
        }
        policy
    }

    fn automatic(&mut self, table: &DeTable<'_>) -> Option<Automatic> {
        let At(value, span) = find(table, "rollback")?;
        let text = value.as_str();
        let known = [("none", Automatic::None), ("code", Automatic::Code), ("data", Automatic::Data)];
        let found = known.iter().find(|(name, _)| Some(*name) == text);
        if found.is_none() {
            self.fault(span, "rollback must be \"none\", \"code\" or \"data\"".to_owned(), None);
        }
        found.map(|(_, automatic)| *automatic)
    }

    fn probe(&mut self, at: usize, table: &DeTable<'_>, span: Range<usize>) -> Option<Probe> {
        self.known(table, "[[probe]]", PROBE);
        let kinds: Vec<_> = KINDS.iter().filter(|(kind, _)| table.contains_key(*kind)).collect();
        let [(kind, own)] = kinds[..] else {
            let message = "a probe has exactly one of sql, http and command".to_owned();
            self.fault(span, message, None);
            return None;
        };
        for key in table.keys() {
            let name = key.get_ref().as_ref();
            let of_kinds = KINDS.iter().any(|(_, keys)| keys.contains(&name));
            if of_kinds && !own.contains(&name) {
                self.fault(key.span(), format!("{name:?} means nothing to a probe with {kind:?}"), None);
            }
        }
        let question = match *kind {
            "sql" => self.sql(table, span.clone()),
            "http" => self.http(table, span.clone()),
            _ => self.command(table),
        };
        let name = self.text(table, "name");
        let name = name.or_else(|| {
            let asked = find(table, kind)?.0.as_str()?.trim().lines().next().unwrap_or_default().to_owned();
            Some(asked)
        });
        let timeout_ms = self.length(table, "timeout", LENGTH_MAX_MS).unwrap_or(PROBE_TIMEOUT_MS);
        let retries = self.number(table, "retries", RETRIES_MAX).and_then(|n| u32::try_from(n).ok());
        let wait_ms = self.length(table, "wait", LENGTH_MAX_MS).unwrap_or(PROBE_WAIT_MS);
        Some(Probe {
            name: name.unwrap_or_else(|| format!("probe {}", at + 1)),
            question: question?,
            timeout_ms,
            retries: retries.unwrap_or(PROBE_RETRIES),
            wait_ms,
        })
    }

    fn sql(&mut self, table: &DeTable<'_>, span: Range<usize>) -> Option<Question> {
        let sql = self.text(table, "sql")?;
        let Some(expect) = self.answer(table) else {
            if !table.contains_key("expect") {
                let hint = "as text: expect = \"t\", expect = \"42\"".to_owned();
                self.fault(span, "a probe with sql needs the answer it must get: expect".to_owned(), Some(hint));
            }
            return None;
        };
        Some(Question::Sql { sql, expect })
    }

    fn http(&mut self, table: &DeTable<'_>, span: Range<usize>) -> Option<Question> {
        let url = self.text(table, "http")?;
        let at = find(table, "http").map_or(span.clone(), |At(_, span)| span);
        let is_url = url.parse::<axum::http::Uri>().is_ok_and(|uri| uri.host().is_some());
        if !url.starts_with("http://") || !is_url {
            let hint =
                "the service is asked where it runs, e.g. http://127.0.0.1:8080/health; TLS is not spoken".to_owned();
            self.fault(at, "http must be an http:// URL".to_owned(), Some(hint));
            return None;
        }
        let status = self.number(table, "status", 599).and_then(|n| u16::try_from(n).ok()).unwrap_or(200);
        let json = self.text(table, "json");
        if json.as_ref().is_some_and(|pointer| !pointer.is_empty() && !pointer.starts_with('/')) {
            let at = find(table, "json").map_or(span.clone(), |At(_, span)| span);
            let hint = Some("e.g. /checks/0/ok".to_owned());
            self.fault(at, "json must be a JSON pointer (RFC 6901)".to_owned(), hint);
        }
        let expect = self.answer(table);
        if json.is_some() != table.contains_key("expect") {
            self.fault(span, "json and expect go together".to_owned(), None);
        }
        Some(Question::Http { url, status, json, expect })
    }

    fn command(&mut self, table: &DeTable<'_>) -> Option<Question> {
        let At(value, span) = find(table, "command")?;
        let command = self.strings("command", value, span.clone(), |_| true, "");
        if command.is_empty() {
            self.fault(span, "command names no program".to_owned(), None);
            return None;
        }
        let exit = self.number(table, "exit", 255).and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
        Some(Question::Command { command, exit })
    }

    /// An answer as text, also where it is written as a number or a truth value.
    fn answer(&mut self, table: &DeTable<'_>) -> Option<String> {
        let At(value, span) = find(table, "expect")?;
        match value {
            DeValue::String(text) => Some(text.to_string()),
            DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
            DeValue::Boolean(truth) => Some(truth.to_string()),
            other => {
                self.not_a("expect", "a string", other, span);
                None
            }
        }
    }

    fn text(&mut self, table: &DeTable<'_>, key: &str) -> Option<String> {
        let At(value, span) = find(table, key)?;
        match value.as_str() {
            Some("") if key != "json" => {
                self.fault(span, format!("{key} is empty"), None);
                None
            }
            Some(text) => Some(text.to_owned()),
            None => {
                self.not_a(key, "a string", value, span);
                None
            }
        }
    }

    fn boolean(&mut self, table: &DeTable<'_>, key: &str) -> Option<bool> {
        let At(value, span) = find(table, key)?;
        if value.as_bool().is_none() {
            self.not_a(key, "true or false", value, span);
        }
        value.as_bool()
    }

    fn number(&mut self, table: &DeTable<'_>, key: &str, max: u64) -> Option<u64> {
        let At(value, span) = find(table, key)?;
        let Some(number) = value.as_integer() else {
            self.not_a(key, "a number", value, span);
            return None;
        };
        match u64::from_str_radix(number.as_str(), number.radix()).ok().filter(|number| *number <= max) {
            Some(number) => Some(number),
            None => {
                self.fault(span, format!("{key} must be a number from 0 to {max}"), None);
                None
            }
        }
    }

    /// A length of time, in milliseconds.
    fn length(&mut self, table: &DeTable<'_>, key: &str, max_ms: u64) -> Option<u64> {
        let At(value, span) = find(table, key)?;
        let read = value.as_str().and_then(|text| text.parse::<SignedDuration>().ok());
        let ms = read.and_then(|length| u64::try_from(length.as_millis()).ok());
        match ms.filter(|ms| (1..=max_ms).contains(ms)) {
            Some(ms) => Some(ms),
            None => {
                let hint = Some("e.g. \"500ms\", \"10s\", \"15min\"".to_owned());
                let most = max_ms / 1000;
                self.fault(span, format!("{key} must be a length of time of at most {most} s"), hint);
                None
            }
        }
    }

    fn strings(
        &mut self,
        key: &str,
        value: &DeValue<'_>,
        span: Range<usize>,
        good: impl Fn(&str) -> bool,
        made_of: &str,
    ) -> Vec<String> {
        let Some(array) = value.as_array() else {
            self.not_a(key, "an array of strings", value, span);
            return Vec::new();
        };
        let mut strings = Vec::new();
        for item in array {
            match item.get_ref().as_str() {
                Some(text) if good(text) => strings.push(text.to_owned()),
                Some(text) => self.fault(item.span(), format!("{text:?} is no name in {key}: it has {made_of}"), None),
                None => self.not_a(key, "an array of strings", item.get_ref(), item.span()),
            }
        }
        strings
    }

    fn not_a(&mut self, key: &str, wanted: &str, value: &DeValue<'_>, span: Range<usize>) {
        self.fault(span, format!("{key} must be {wanted}, and is of type {}", value.type_str()), None);
    }
}

fn find<'a, 't>(table: &'a DeTable<'t>, key: &str) -> Option<At<'a, 't>> {
    let value = table.get(key)?;
    Some(At(value.get_ref(), value.span()))
}

/// A path that leads nowhere but into the directory.
fn is_inside(dir: &str) -> bool {
    use std::path::{Component, Path};
    !dir.is_empty() && Path::new(dir).components().all(|part| matches!(part, Component::Normal(_)))
}

/// What is a file name everywhere, and not hidden.
fn is_secret_name(name: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    !name.is_empty() && name.len() <= 100 && !name.starts_with('.') && name.chars().all(is_part)
}
