//! Finding stock Postgres, making the template cluster, and the configuration a branch's Postgres runs with.
//!
//! Ebb ships no Postgres and patches none: it runs what the machine has, one server of each major version.

pub(crate) mod config;
pub mod extensions;
mod schema;
mod template;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use self::schema::dump_schema;
pub(crate) use self::template::last_complaint;
pub use self::template::make_template;
use crate::{Error, Result};

/// The bootstrap superuser of every cluster; never reachable through the proxy.
pub const SUPERUSER: &str = "postgres";
/// The role a project's owner logs in as.
pub const OWNER: &str = "app";
/// The database a project starts with.
pub const DATABASE: &str = "app";

/// LIMIT: 14 brought `recovery_init_sync_method` and `initdb --no-instructions`; 18 is the newest that was tried.
const MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

/// Names one more directory of server binaries, or several with `:`; they win over what is found elsewhere.
const BIN_VARIABLE: &str = "EBB_PG_BIN";

/// One installed Postgres server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// 14 to 18.
    pub major: u32,
    /// The whole version, as `15.18`.
    pub version: String,
    /// Directory of `postgres`, `initdb` ….
    pub bin: PathBuf,
}

/// The server installations on this machine, one for each major, newest major last; `EBB_PG_BIN` names one more
/// directory, or several with `:`, and wins where it has the same major as another.
pub fn installations() -> Vec<Installation> {
    let mut found: Vec<Installation> = Vec::new();
    for bin in candidates() {
        if let Some(installation) = look_at(&bin)
            && found.iter().all(|known| known.major != installation.major)
        {
            found.push(installation);
        }
    }
    found.sort_by_key(|installation| installation.major);
    found
}

/// The installation of a major version, or of the newest.
///
/// # Errors
/// [`Error::NoPostgres`], naming every place that was looked at.
pub fn find(major: Option<u32>) -> Result<Installation> {
    let mut all = installations();
    match major {
        None => all.pop(),
        Some(major) => all.into_iter().find(|installation| installation.major == major),
    }
    .ok_or_else(|| Error::NoPostgres { looked: places() })
}

/// Where servers are looked for, as a person would write it.
fn places() -> Vec<String> {
    let given = match env::var(BIN_VARIABLE) {
        Ok(value) => format!("{BIN_VARIABLE}={value}"),
        Err(_) => format!("{BIN_VARIABLE} (not set)"),
    };
    let usual = ["/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin", "PATH"];
    std::iter::once(given).chain(usual.map(str::to_owned)).collect()
}

/// Directories that may hold a server, the ones that win first.
fn candidates() -> Vec<PathBuf> {
    let listed = |variable| env::var_os(variable).map(|dirs| env::split_paths(&dirs).collect::<Vec<_>>());
    let mut dirs = listed(BIN_VARIABLE).unwrap_or_default();
    for major in MAJORS.rev() {
        dirs.push(format!("/usr/lib/postgresql/{major}/bin").into());
        dirs.push(format!("/usr/pgsql-{major}/bin").into());
    }
    dirs.push("/usr/local/pgsql/bin".into());
    dirs.extend(listed("PATH").unwrap_or_default());
    dirs
}

/// What server a directory holds, if it holds a whole one of a major that is supported.
fn look_at(bin: &Path) -> Option<Installation> {
    // A link such as /usr/bin/postgres would lead to a directory that lacks the rest; its target has it.
    let bin = bin.join("postgres").canonicalize().ok()?.parent()?.to_owned();
    if !bin.join("initdb").exists() {
        return None;
    }
    let answer = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
    let (major, version) = parse_version(&String::from_utf8(answer.stdout).ok()?)?;
    MAJORS.contains(&major).then_some(Installation { major, version, bin })
}

/// Reads `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, and `18devel`, `18beta1`.
fn parse_version(answer: &str) -> Option<(u32, String)> {
    let version = answer.trim().strip_prefix("postgres (PostgreSQL) ")?.split_whitespace().next()?;
    let digits = version.bytes().take_while(u8::is_ascii_digit).count();
    Some((version[..digits].parse().ok()?, version.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_lines() {
        let check = |line: &str, expect: Option<(u32, &str)>| {
            assert_eq!(parse_version(line), expect.map(|(major, text)| (major, text.to_owned())), "for {line:?}");
        };
        check("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some((15, "15.18")));
        check("postgres (PostgreSQL) 18.6\n", Some((18, "18.6")));
        check("postgres (PostgreSQL) 19devel\n", Some((19, "19devel")));
        check("postgres (EnterpriseDB) 15.2\n", None);
        check("", None);
    }

    #[test]
    fn the_installed_server_is_found_once_for_each_major() {
        let all = installations();
        assert!(!all.is_empty(), "these tests need a Postgres server");
        assert!(all.is_sorted_by(|a, b| a.major < b.major), "{all:?}");
        assert_eq!(find(Some(all[0].major)).expect("it was just found"), all[0]);
    }

    #[test]
    fn a_missing_major_names_where_it_was_looked_for() {
        let error = find(Some(9)).expect_err("nobody has that").to_string();
        assert!(error.starts_with("no Postgres server found (looked in EBB_PG_BIN"), "{error}");
        assert!(error.contains("/usr/lib/postgresql/*/bin"), "{error}");
    }
}
