//! A database as `pg_dump` writes it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::dump::At;
use super::tools::{self, Host};
use crate::error::{Error, OsContext, Result};

/// A format of pg_dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DumpFormat {
    /// One compressed file, for pg_restore.
    Custom,
    /// A directory, for pg_restore.
    Directory,
    /// A tar file, for pg_restore.
    Tar,
    /// SQL, for psql.
    Plain,
}

impl DumpFormat {
    /// As pg_dump calls it.
    fn as_str(self) -> &'static str {
        match self {
            DumpFormat::Custom => "custom",
            DumpFormat::Directory => "directory",
            DumpFormat::Tar => "tar",
            DumpFormat::Plain => "plain",
        }
    }
}

/// Dumps a database of a server to a file, or to a directory, that does not exist.
///
/// # Errors
/// [`Error::Import`] with what pg_dump said.
///
/// # Cancel safety
/// Dropped, it kills pg_dump, and leaves half a dump.
pub async fn dump(from: At<'_>, format: DumpFormat, database: &str, to: &Path) -> Result<()> {
    let host = Host::of(from.socket_dir).on("open", from.socket_dir)?;
    let mut command = tools::superuser(from.installation, "pg_dump", &host);
    command.arg("--format").arg(format.as_str()).arg("--file").arg(to).arg("--dbname").arg(name(database));
    let ended = tools::run(command, |_| ()).await?;
    if ended.is_success() {
        return Ok(());
    }
    let complaint = ended.complaint();
    let hint = complaint.contains("does not exist").then(|| "Name one that is there with --database.".to_owned());
    Err(Error::Import { why: format!("pg_dump failed: {complaint}"), hint })
}

/// A database by its name only: what looks like a connection string is taken for one (PostgreSQL 15 manual, pg_dump).
fn name(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_never_a_connection_string() {
        assert_eq!(name("app"), "dbname='app'");
        assert_eq!(name("it's host=x"), r"dbname='it\'s host=x'");
    }
}
