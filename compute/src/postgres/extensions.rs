//! Which extensions a branch's owner may install.

/// Those that PostgreSQL marks as trusted, since they give nobody more than a database (PostgreSQL 15 manual, 38.17.1, and
/// appendix F), and pgvector, which marks itself so. Everything else needs a superuser, and no client is one. Whether the
/// files of one are there depends on what is installed beside the server.
pub const ALLOWED: [&str; 22] = [
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "dict_int",
    "fuzzystrmatch",
    "hstore",
    "intarray",
    "isn",
    "lo",
    "ltree",
    "pg_trgm",
    "pgcrypto",
    "plpgsql",
    "seg",
    "tablefunc",
    "tcn",
    "tsm_system_rows",
    "tsm_system_time",
    "unaccent",
    "uuid-ossp",
    "vector",
];

/// The control file of an extension as a branch's Postgres is to see it, if that is another than it is: one that is not in
/// [`ALLOWED`] is not trusted, whatever it says of itself.
pub(crate) fn mistrusted(name: &str, control: &str) -> Option<String> {
    let trusts = |line: &str| {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        key.trim() == "trusted" && !value.trim().starts_with(['f', 'n', '0', '#'])
    };
    if ALLOWED.contains(&name) || !control.lines().any(trusts) {
        return None;
    }
    let lines = control.lines().filter(|line| !trusts(line)).chain(["trusted = false", ""]);
    Some(lines.collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_is_trusted() {
        assert_eq!(mistrusted("hstore", "trusted = true\n"), None);
        assert_eq!(mistrusted("dblink", "relocatable = true\n"), None);
        assert_eq!(mistrusted("dblink", "trusted = false # never\n"), None);
        let expect = "relocatable = true\ntrusted = false\n";
        assert_eq!(mistrusted("surprise", "trusted = true\nrelocatable = true\n").as_deref(), Some(expect));
        assert_eq!(mistrusted("surprise", "relocatable = true\n  trusted=on").as_deref(), Some(expect));
    }
}
