//! Finds the names of custom settings (`SET myapp.user = …`) in query texts.
//!
//! Postgres 15 does not list placeholder settings in `pg_settings` (they carry `GUC_NO_SHOW_ALL`, guc.c), but it does
//! tell their values to whoever knows their names. So the proxy remembers the names it saw being set, and asks for
//! them when the session is put away. Taking too many for settings is harmless; missing one loses it.

use std::collections::BTreeSet;

/// LIMIT: applications set a handful; a session with more is not put away.
const NAMES_MAX: usize = 64;
/// LIMIT: twice what an identifier of Postgres may have.
const NAME_LEN_MAX: usize = 128;

/// The names of custom settings a session has touched.
#[derive(Debug, Default, PartialEq)]
pub struct SettingNames {
    names: BTreeSet<Box<str>>,
    /// A setting was touched whose name could not be read, or there are too many.
    unknown: bool,
}

impl SettingNames {
    /// Looks through a query's text.
    pub fn scan(&mut self, text: &[u8]) {
        let mut rest = text;
        let mut before = b' ';
        while let Some(at) = find_set(rest) {
            let starts_word = !is_word(if at == 0 { before } else { rest[at - 1] });
            before = rest[at + 2];
            rest = &rest[at + 3..];
            if starts_word {
                self.after_set(rest);
            }
        }
    }

    /// The names seen.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(|name| &**name)
    }

    /// Whether a setting may have been missed.
    pub fn is_incomplete(&self) -> bool {
        self.unknown
    }

    fn after_set(&mut self, rest: &[u8]) {
        if let Some(call) = strip_word(rest, b"_config") {
            if let Some(arguments) = call.trim_ascii_start().strip_prefix(b"(") {
                self.set_config(arguments);
            }
            return;
        }
        if !rest.first().is_some_and(u8::is_ascii_whitespace) {
            return;
        }
        let mut rest = rest.trim_ascii_start();
        if strip_word(rest, b"local").is_some() {
            return;
        }
        if let Some(after) = strip_word(rest, b"session") {
            rest = after.trim_ascii_start();
        }
        let end = rest.iter().position(|&b| !is_word(b) && b != b'.' && b != b'"').unwrap_or(rest.len());
        self.add(&rest[..end]);
    }

    /// `set_config('name', value, is_local)`; a name that is no literal stays unknown, unless it is set for the
    /// transaction only.
    fn set_config(&mut self, arguments: &[u8]) {
        let end = arguments.iter().position(|&b| b == b')').unwrap_or(arguments.len());
        let last = arguments[..end].rsplit(|&b| b == b',').next().unwrap_or_default().trim_ascii();
        if last.eq_ignore_ascii_case(b"true") || last.eq_ignore_ascii_case(b"'true'") || last == b"'t'" {
            return;
        }
        let literal = arguments.trim_ascii_start().strip_prefix(b"'");
        match literal.and_then(|name| Some(&name[..name.iter().position(|&b| b == b'\'')?])) {
            Some(name) => self.add(name),
            None => self.unknown = true,
        }
    }

    fn add(&mut self, name: &[u8]) {
        // Settings of Postgres itself have no dot, and are listed.
        if !name.contains(&b'.') {
            return;
        }
        let plain = name.iter().filter(|&&b| b != b'"').map(u8::to_ascii_lowercase).collect();
        let Ok(name) = String::from_utf8(plain) else {
            self.unknown = true;
            return;
        };
        if name.len() > NAME_LEN_MAX || !name.is_ascii() || !name.bytes().all(|b| is_word(b) || b == b'.') {
            self.unknown = true;
        } else if self.names.len() < NAMES_MAX || self.names.contains(&*name) {
            self.names.insert(name.into());
        } else {
            self.unknown = true;
        }
    }
}

/// Where the next `set` stands, in whatever case.
fn find_set(text: &[u8]) -> Option<usize> {
    text.windows(3).position(|word| matches!(word, [b's' | b'S', b'e' | b'E', b't' | b'T']))
}

fn strip_word<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = text.split_at_checked(word.len())?;
    (head.eq_ignore_ascii_case(word) && !rest.first().is_some_and(|&b| is_word(b))).then_some(rest)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &[&str], incomplete: bool) {
        let mut names = SettingNames::default();
        names.scan(text.as_bytes());
        assert_eq!(names.names().collect::<Vec<_>>(), expect, "for {text:?}");
        assert_eq!(names.is_incomplete(), incomplete, "for {text:?}");
    }

    #[test]
    fn names_are_found_where_they_are_set() {
        check("SET myapp.user = 'x'", &["myapp.user"], false);
        check("begin; set session MyApp.\"User\" to 1; set b.c=2", &["b.c", "myapp.user"], false);
        check("select set_config('a.b', $1, false)", &["a.b"], false);
        check("select pg_catalog.SET_CONFIG ( 'a.b' , 'x', 'off')", &["a.b"], false);
        check("/**/set\n\ta.b\n=1", &["a.b"], false);
    }

    #[test]
    fn what_sets_nothing_for_the_session_is_passed_over() {
        check("set search_path to a", &[], false);
        check("set local a.b = 1", &[], false);
        check("select set_config($1, $2, true)", &[], false);
        check("select * from t offset 10", &[], false);
        check("select reset_a.b from asset a", &[], false);
        check("set", &[], false);
        check("set_config", &[], false);
        check("", &[], false);
    }

    #[test]
    fn names_that_cannot_be_read_are_admitted() {
        check("select set_config($1, $2, false)", &[], true);
        check("select set_config(", &[], true);
        check("set a.ü = 1", &[], true);
        check(&format!("set a.{} = 1", "x".repeat(NAME_LEN_MAX)), &[], true);
        let many: String = (0..=NAMES_MAX).map(|i| format!("set a.n{i} = 1;")).collect();
        let mut names = SettingNames::default();
        names.scan(many.as_bytes());
        assert!(names.is_incomplete());
    }
}
