//! The definitions in a database, as stock `pg_dump` writes them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{self, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use super::{Installation, SUPERUSER};
use crate::error::OsContext as _;
use crate::{Error, Result};

/// LIMIT: a dump reads catalogs only; tens of thousands of objects take a minute.
const DEADLINE: Duration = Duration::from_secs(300);

/// What defines a database whose server listens on a private socket: DDL with a heading for each object.
///
/// # Errors
/// If `pg_dump` cannot be run, or complains.
pub async fn dump_schema(installation: &Installation, socket: &Path, database: &str) -> Result<String> {
    let program = installation.bin.join("pg_dump");
    let dir = socket.parent().ok_or(Error::Gone)?;
    // LIMIT: `sun_path` holds 108 bytes, and data directories may be deep: it goes by way of a directory open here.
    let dir = File::open(dir).on("open", dir)?;
    let host = format!("/proc/{}/fd/{}", process::id(), dir.as_raw_fd());
    let mut command = Command::new(&program);
    command
        .args(["--schema-only", "--no-password", "-h", &host, "-U", SUPERUSER, "-d", database])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C.UTF-8")
        .env("PGCLIENTENCODING", "UTF8")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let ran = timeout(DEADLINE, command.output()).await.map_err(|_| Error::Deadline("dumping the schema"))?;
    let ran = ran.on("run", &program)?;
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr).trim().replace('\n', "; ");
        return Err(io::Error::other(said)).on("dump the schema with", &program);
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}
