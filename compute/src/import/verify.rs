//! What an import must pass before it is offered: the checksum of every page, and `pg_amcheck`.

use std::path::Path;

use super::progress::{Counted, Phase, Progress};
use super::server::Server;
use super::settle::{column, one};
use super::stage::Stage;
use super::tools::{self, DATA, Ended, Host};
use crate::error::{Error, Result};
use crate::postgres::Installation;

/// LIMIT: findings that are shown; the rest is more of the same.
const SHOWN: usize = 3;

/// Looks at the checksum of every page; makes them, if the cluster has none. No server may run on the directory.
pub(super) async fn pages(installation: &Installation, stage: &Stage, progress: &Progress) -> Result<()> {
    progress.begin(Phase::CheckingPages, Counted::Bytes, None);
    if !installation.bin.join("pg_checksums").exists() {
        progress.note("pg_checksums is not installed on this node: the checksums of pages were not looked at");
        return Ok(());
    }
    let (ended, findings) = pg_checksums(installation, stage, "--check", progress).await?;
    if ended.is_success() {
        return Ok(());
    }
    if !ended.tail.iter().any(|line| line.contains("not enabled")) {
        let why = format!("pages of the source are damaged: {}", shown(&findings, &ended));
        let hint = "Import from an undamaged copy, or dump what can still be read with pg_dump and import that.";
        return Err(Error::Import { why, hint: Some(hint.to_owned()) });
    }
    progress.begin(Phase::CheckingPages, Counted::Bytes, None);
    let (ended, _) = pg_checksums(installation, stage, "--enable", progress).await?;
    if !ended.is_success() {
        return Err(Error::import(format!("page checksums cannot be made: {}", ended.complaint())));
    }
    progress.note("the source had no page checksums; the import has them from here on");
    Ok(())
}

async fn pg_checksums(
    installation: &Installation,
    stage: &Stage,
    act: &str,
    progress: &Progress,
) -> Result<(Ended, Vec<String>)> {
    let arguments = [act, "--progress", "--no-sync", "-D", DATA].map(str::to_owned);
    // 14 takes no --no-sync for a check, and no version syncs in one.
    let arguments: Vec<String> = arguments.into_iter().filter(|one| act != "--check" || one != "--no-sync").collect();
    let command = tools::on_directory(&installation.bin.join("pg_checksums"), stage, &arguments)?;
    let mut findings = Vec::new();
    let ended = tools::run(command, |line| {
        if let Some((done, total)) = megabytes(line) {
            progress.set(done << 20, Some(total << 20));
        } else if line.contains("checksum verification failed") || line.contains("could not read block") {
            findings.push(line.to_owned());
        }
    });
    let ended = ended.await?;
    Ok((ended, findings))
}

/// Reads `12/345 MB (3%) computed`.
fn megabytes(line: &str) -> Option<(u64, u64)> {
    let (counts, rest) = line.trim().split_once(" MB (")?;
    let (done, total) = counts.split_once('/')?;
    rest.ends_with("computed").then_some((done.trim().parse().ok()?, total.trim().parse().ok()?))
}

/// Has `pg_amcheck` look at every table and B-tree of these databases.
pub(super) async fn tables(
    installation: &Installation,
    server: &Server,
    databases: &[String],
    progress: &Progress,
) -> Result<()> {
    let mut without = Vec::new();
    for database in databases {
        let client = server.session(database).await?;
        if one(&client, "SELECT 1 FROM pg_available_extensions WHERE name = 'amcheck'").await?.is_none() {
            progress.note("amcheck is not installed on this node: tables and indexes were not checked");
            return Ok(());
        }
        if one(&client, "SELECT 1 FROM pg_extension WHERE extname = 'amcheck'").await?.is_none() {
            without.push(database.clone());
        }
    }
    amcheck(installation, &server.host, databases, progress).await?;
    // The checker leaves its extension.
    for database in without {
        let client = server.session(&database).await?;
        column(&client, "DROP EXTENSION IF EXISTS amcheck").await?;
    }
    Ok(())
}

/// Runs `pg_amcheck` on some databases of a server.
///
/// # Errors
/// What it found.
pub(super) async fn amcheck(
    installation: &Installation,
    host: &Host,
    databases: &[String],
    progress: &Progress,
) -> Result<()> {
    progress.begin(Phase::CheckingTables, Counted::Objects, None);
    let program = installation.bin.join("pg_amcheck");
    if !Path::new(&program).exists() {
        progress.note("pg_amcheck is not installed on this node: tables and indexes were not checked");
        return Ok(());
    }
    let mut command = tools::superuser(installation, "pg_amcheck", host);
    command.args(["--install-missing", "--heapallindexed", "--progress"]);
    for database in databases {
        command.arg("--database").arg(literal_pattern(database));
    }
    let mut findings = Vec::new();
    // It tells what it finds on standard output, and how far it is on standard error.
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().map_err(|source| Error::Os { act: "run", what: program.clone(), source })?;
    let told = child.stdout.take();
    let reading = async {
        use tokio::io::AsyncReadExt as _;
        let mut text = Vec::new();
        if let Some(told) = told {
            // LIMIT: of a ruined database there is no end to what it says.
            let _ = told.take(1 << 20).read_to_end(&mut text).await;
        }
        String::from_utf8_lossy(&text).into_owned()
    };
    let look = |line: &str| match relations(line) {
        Some((done, total)) => progress.set(done, Some(total)),
        None => findings.push(line.to_owned()),
    };
    let (told, ended) = tokio::join!(reading, tools::finish(child, &program, look));
    let ended = ended?;
    if ended.is_success() {
        return Ok(());
    }
    // Exit code 2: it did its work, and found something (PostgreSQL 15 manual, pg_amcheck).
    let findings: Vec<String> = match ended.code {
        Some(2) => told.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect(),
        _ => findings,
    };
    let why = format!("tables or indexes of the source are damaged: {}", shown(&findings, &ended));
    let hint = "REINDEX what is an index, or dump what can still be read with pg_dump and import that.";
    Err(Error::Import { why, hint: Some(hint.to_owned()) })
}

/// Reads `12/345 relations (3%), 67/890 pages (7%)`.
fn relations(line: &str) -> Option<(u64, u64)> {
    let (counts, rest) = line.trim().split_once(" relations (")?;
    let (done, total) = counts.split_once('/')?;
    rest.contains(" pages (").then_some((done.trim().parse().ok()?, total.trim().parse().ok()?))
}

/// A pattern that means just this database (PostgreSQL 15 manual, psql, "Patterns").
fn literal_pattern(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn shown(findings: &[String], ended: &Ended) -> String {
    let mut text = findings.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("; ");
    if text.is_empty() {
        return ended.complaint();
    }
    if findings.len() > SHOWN {
        text.push_str(&format!("; and {} more lines", findings.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_the_checkers_is_read() {
        assert_eq!(megabytes("  12/345 MB (3%) computed"), Some((12, 345)));
        assert_eq!(megabytes("pg_checksums: error: x"), None);
        assert_eq!(relations("312/312 relations (100%), 376/376 pages (100%)"), Some((312, 312)));
        assert_eq!(relations("pg_amcheck: error: x"), None);
        assert_eq!(literal_pattern("a\"b*"), "\"a\"\"b*\"");
    }
}
