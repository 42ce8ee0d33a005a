//! Looks through query texts for what could outlive a transaction, so that sessions in transaction mode are examined
//! only when there is a reason.
//!
//! A hint, not a proof: what a function does is not in the text of its caller. What is missed here is undone before another
//! client gets the backend; only that it is not given back to its own client depends on what is found. Finding too much
//! costs an examination.

/// What a text may do, together with the tag that its command ends with, or without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Words(u8);

impl Words {
    /// A `SET` or `RESET` that is not for the transaction alone; `UPDATE … SET` looks the same.
    pub const SETS: Self = Self(1);
    /// A cursor `WITH HOLD`.
    pub const HOLDS: Self = Self(2);
    /// Something that no tag tells: a temporary object, `set_config`, an advisory lock of the session.
    pub const LEAVES: Self = Self(4);
    /// An advisory lock of the session given up.
    pub const FREES: Self = Self(8);
    /// Prepared statements given up: `DEALLOCATE`, `DISCARD`.
    pub const DROPS: Self = Self(16);
    /// What a text that is too long to be looked through has to be taken for: its tag decides.
    pub const UNREAD: Self = Self(1 | 2);

    /// Whether any of the others is in it.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Looks through a text.
    pub fn scan(text: &[u8]) -> Self {
        let mut found = Self::default();
        let mut at = 0;
        while let Some((word, end)) = next_word(text, at) {
            at = end;
            match word {
                [b's' | b'S', ..] if is(word, b"set") => {
                    let local = next_word(text, at).is_some_and(|(next, _)| {
                        is(next, b"local") || is(next, b"transaction") || is(next, b"constraints")
                    });
                    if !local {
                        found = found.and(Self::SETS);
                    }
                }
                [b's' | b'S', ..] if is(word, b"set_config") && !is_local_call(&text[at..]) => {
                    found = found.and(Self::LEAVES);
                }
                [b'r' | b'R', ..] if is(word, b"reset") => found = found.and(Self::SETS),
                [b'h' | b'H', ..] if is(word, b"hold") => found = found.and(Self::HOLDS),
                [b't' | b'T', ..] if is(word, b"temp") || is(word, b"temporary") => found = found.and(Self::LEAVES),
                [b'd' | b'D', ..] if is(word, b"deallocate") || is(word, b"discard") => found = found.and(Self::DROPS),
                [b'p' | b'P', ..] => found = found.and(of_function(word)),
                _ => {}
            }
        }
        found
    }
}

/// `DEALLOCATE name`: the name, as Postgres reads it. Nothing where the text is anything else, `DEALLOCATE ALL` included.
pub fn deallocated(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.trim_ascii();
    let text = text.strip_suffix(b";").unwrap_or(text).trim_ascii_end();
    let (word, end) = next_word(text, 0).filter(|(word, end)| is(word, b"deallocate") && *end == word.len())?;
    let mut rest = text[word.len().max(end)..].trim_ascii_start();
    if let Some((word, end)) = next_word(rest, 0).filter(|(word, end)| is(word, b"prepare") && *end == word.len()) {
        let after = rest[end..].trim_ascii_start();
        // A statement may be called so, too.
        if !after.is_empty() {
            rest = after;
        } else {
            return Some(word.to_ascii_lowercase());
        }
    }
    if let Some(quoted) = rest.strip_prefix(b"\"") {
        let inner = quoted.strip_suffix(b"\"")?;
        return (!inner.is_empty() && !inner.contains(&b'"')).then(|| inner.to_vec());
    }
    let (word, end) = next_word(rest, 0)?;
    (end == rest.len() && word.len() == end && !is(word, b"all")).then(|| word.to_ascii_lowercase())
}

/// The next word at or after a place, and where it ends.
fn next_word(text: &[u8], from: usize) -> Option<(&[u8], usize)> {
    let start = from + text.get(from..)?.iter().position(|&b| is_word(b))?;
    let end = text[start..].iter().position(|&b| !is_word(b)).map_or(text.len(), |length| start + length);
    Some((&text[start..end], end))
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

fn is(word: &[u8], other: &[u8]) -> bool {
    word.eq_ignore_ascii_case(other)
}

/// Functions that take and give up locks of the session; `pg_temp` names its temporary schema.
fn of_function(word: &[u8]) -> Words {
    let begins = |with: &[u8]| word.get(..with.len()).is_some_and(|head| is(head, with));
    let in_transaction = || word.windows(4).any(|part| is(part, b"xact"));
    if begins(b"pg_advisory_unlock") {
        Words::FREES
    } else if begins(b"pg_temp") || (begins(b"pg_advisory_") || begins(b"pg_try_advisory_")) && !in_transaction() {
        Words::LEAVES
    } else {
        Words::default()
    }
}

/// Whether the arguments of a `set_config` end with a plain `true`: then it is for the transaction alone.
fn is_local_call(rest: &[u8]) -> bool {
    let Some(arguments) = rest.trim_ascii_start().strip_prefix(b"(") else { return true };
    let Some(end) = arguments.iter().position(|&b| b == b')') else { return false };
    let last = arguments[..end].rsplit(|&b| b == b',').next().unwrap_or_default().trim_ascii();
    is(last, b"true") || is(last, b"'true'") || last == b"'t'"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &[Words]) {
        let all = expect.iter().fold(Words::default(), |all, word| all.and(*word));
        assert_eq!(Words::scan(text.as_bytes()), all, "for {text:?}");
    }

    #[test]
    fn what_lasts_is_found() {
        check("SET search_path = x", &[Words::SETS]);
        check("begin;set session x.y = 1", &[Words::SETS]);
        check("RESET ALL", &[Words::SETS]);
        check("update t set a = 1", &[Words::SETS]);
        check("select set_config('a.b', $1, false)", &[Words::LEAVES]);
        check("select set_config('a.b', $1", &[Words::LEAVES]);
        check("create temp table x()", &[Words::LEAVES]);
        check("select * into TEMPORARY x from y", &[Words::LEAVES]);
        check("create table pg_temp.x ()", &[Words::LEAVES]);
        check("select pg_advisory_lock(1), pg_try_advisory_lock_shared(2)", &[Words::LEAVES]);
        check("declare c cursor with hold for select 1", &[Words::HOLDS]);
        check("select pg_advisory_unlock_all()", &[Words::FREES]);
        check("discard all", &[Words::DROPS]);
    }

    #[test]
    fn what_ends_with_the_transaction_is_not() {
        check("select 1 from settings where offset_ = 'reset_'", &[]);
        check("set local a.b = 1; set transaction read only; SET CONSTRAINTS ALL DEFERRED", &[]);
        check("select pg_catalog.set_config('app.tenant', $1, true)", &[]);
        check("select pg_advisory_xact_lock(1)", &[]);
        check("declare c cursor for select temperature from t", &[]);
    }

    #[test]
    fn deallocate_names_its_statement() {
        let name = |text: &str| deallocated(text.as_bytes()).map(|name| String::from_utf8(name).unwrap());
        assert_eq!(name("DEALLOCATE _pg3_0").as_deref(), Some("_pg3_0"));
        assert_eq!(name(" deallocate PREPARE Foo ; ").as_deref(), Some("foo"));
        assert_eq!(name("DEALLOCATE \"S_1 x\"").as_deref(), Some("S_1 x"));
        assert_eq!(name("DEALLOCATE prepare").as_deref(), Some("prepare"));
        for other in
            ["DEALLOCATE ALL", "DEALLOCATE", "DEALLOCATE a; SELECT 1", "SELECT 1", "", "DEALLOCATE PREPARE all"]
        {
            assert_eq!(name(other), None, "for {other:?}");
        }
    }
}
