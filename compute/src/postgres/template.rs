//! The template cluster: made once on a node for each Postgres version, then a layer that every new project branches.
//!
//! `initdb` and one run of the single-user server, which opens no socket and ends with a clean shutdown.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use super::{DATABASE, Installation, OWNER, SUPERUSER};
use crate::error::{Error, OsContext, Result};
use crate::user::RunAs;

/// LIMIT: about a second on an idle machine; a loaded one with a slow disk gets a hundred times that.
const DEADLINE: Duration = Duration::from_secs(120);

/// Makes the cluster in the directory that is standard input, with `$1` = directory of the binaries, `$2` = SQL.
///
/// The directory is reached as a descriptor because the user Postgres runs as may not be able to walk there (data
/// below /root, for one). Nothing is synced: whoever imports the result syncs its own copy. `exit_on_error` makes the
/// single-user server fail at the first error instead of reading on.
const SCRIPT: &str = r#"
set -e
exec 9<&0 </dev/null
"$1/initdb" -D /proc/self/fd/9 --username="$3" --auth=trust --encoding=UTF8 --locale=C.UTF-8 \
    --data-checksums --no-sync --no-instructions
printf '%s\n' "$2" | "$1/postgres" --single -D /proc/self/fd/9 -c exit_on_error=on -c fsync=off "$3"
"#;

/// Makes the template cluster in `dest` (which must not exist) and shuts it down cleanly: checksums on, locale C.UTF-8,
/// role [`OWNER`], database [`DATABASE`] owned by it.
///
/// The files are not synced: import them, and what counts is synced then. On failure `dest` is removed again.
///
/// # Cancel safety
/// Dropped half-way, it kills what it started and leaves a useless `dest`, which a later call refuses: use a fresh
/// directory for each try.
pub async fn make_template(installation: &Installation, dest: &Path) -> Result<()> {
    let user = RunAs::find()?;
    fs::DirBuilder::new().mode(0o700).create(dest).on("create", dest)?;
    let made = fill(installation, dest, user).await;
    if made.is_err() {
        let _ = fs::remove_dir_all(dest);
    }
    made
}

async fn fill(installation: &Installation, dest: &Path, user: RunAs) -> Result<()> {
    let dir = File::open(dest).on("open", dest)?;
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", SCRIPT, "ebb-template"])
        .arg(&installation.bin)
        .arg(statements(installation.major))
        .arg(SUPERUSER)
        .stdin(Stdio::from(dir))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .current_dir("/")
        .kill_on_drop(true);
    super::config::environment(command.as_std_mut());
    if fs::metadata(dest).on("look at", dest)?.uid() != user.uid {
        chown(dest, Some(user.uid), Some(user.gid)).on("give away", dest)?;
        command.uid(user.uid).gid(user.gid);
    }
    let ended = timeout(DEADLINE, command.output())
        .await
        .map_err(|_| Error::Deadline("making the template cluster"))?
        .on("run", "/bin/sh")?;
    if ended.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&ended.stderr);
    Err(Error::Template { why: last_complaint(&complaint).unwrap_or("initdb said nothing").to_owned() })
}

/// What a new cluster gets; a line is a statement, as the single-user server reads them.
fn statements(major: u32) -> String {
    // Up to 15, CREATEROLE lets a role grant itself pg_execute_server_program, and with it any program of the
    // machine (PostgreSQL 15 manual, section 22.2). From 16 on it needs ADMIN OPTION on what it grants.
    let may_create_roles = if major >= 16 { " CREATEROLE" } else { "" };
    format!(
        "CREATE ROLE {OWNER} LOGIN CREATEDB{may_create_roles} NOSUPERUSER NOREPLICATION NOBYPASSRLS\n\
         CREATE DATABASE {DATABASE} OWNER {OWNER}"
    )
}

/// The last line in which a program of Postgres complains, or its last line.
pub(crate) fn last_complaint(stderr: &str) -> Option<&str> {
    let is_complaint = |line: &&str| ["FATAL:", "ERROR:", "PANIC:", "error:"].iter().any(|tag| line.contains(tag));
    stderr.lines().rev().find(is_complaint).or_else(|| stderr.lines().rfind(|line| !line.trim().is_empty()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::postgres::installations;

    /// Asks the single-user server of a cluster.
    fn ask(installation: &Installation, data: &Path, sql: &str) -> String {
        let user = RunAs::find().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", r#"printf '%s\n' "$2" | "$0/postgres" --single -D "$1" app"#]);
        command.arg(&installation.bin).arg(data).arg(sql);
        if nix::unistd::geteuid().is_root() {
            use std::os::unix::process::CommandExt;
            command.uid(user.uid).gid(user.gid);
        }
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }

    #[tokio::test]
    async fn a_template_is_shut_down_and_its_owner_is_no_superuser() {
        let scratch = tempfile::tempdir().unwrap();
        // Postgres must not need the way to its directory: as root it runs as somebody else.
        let data = scratch.path().join("template");
        let installation = installations().pop().expect("these tests need a Postgres server");
        make_template(&installation, &data).await.unwrap();
        assert!(!data.join("postmaster.pid").exists());

        let control = Command::new(installation.bin.join("pg_controldata")).arg(&data).output().unwrap();
        let control = String::from_utf8(control.stdout).unwrap();
        let value = |name: &str| control.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("missing").trim();
        assert_eq!(value("Database cluster state:"), "shut down");
        assert_eq!(value("Data page checksum version:"), "1");

        std::fs::set_permissions(scratch.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let roles = ask(&installation, &data, "SELECT rolname, rolsuper FROM pg_roles WHERE rolcanlogin ORDER BY 1");
        assert!(roles.contains(r#"rolname = "app""#) && roles.contains(r#"rolsuper = "f""#), "{roles}");
        let owner =
            ask(&installation, &data, "SELECT datdba::regrole::text AS o FROM pg_database WHERE datname = 'app'");
        assert!(owner.contains(r#"o = "app""#), "{owner}");
    }

    #[tokio::test]
    async fn a_template_that_cannot_be_made_says_why_and_leaves_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("template");
        let nowhere = Installation { major: 15, version: "15.0".into(), bin: "/nonexistent".into() };
        let error = make_template(&nowhere, &data).await.unwrap_err().to_string();
        assert!(error.contains("initdb"), "{error}");
        assert!(!data.exists());
    }

    #[test]
    fn only_from_16_on_may_the_owner_create_roles() {
        assert!(!statements(15).contains("CREATEROLE"));
        assert!(statements(16).contains(" CREATEROLE "));
    }
}
