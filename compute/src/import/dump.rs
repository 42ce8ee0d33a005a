//! What `pg_dump` wrote, read into a fresh branch as its owner role.
//!
//! An archive goes through `pg_restore`, without owners, grants, and what only a superuser may make: event triggers,
//! publications, subscriptions (I12). A plain file goes through `psql` in its restricted mode, in which a file can give no
//! command of psql's own; there, statements about owners and grants that fail are passed over. Any other failure fails the
//! import, and nothing of it stays.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::progress::{Counted, Phase, Progress};
use super::tools::{self, Host};
use super::verify;
use crate::error::{Error, OsContext, Result};
use crate::postgres::{DATABASE, Installation, OWNER};

/// LIMIT: longer lines of a plain dump (rows, that is) are not looked into beyond this.
const LOOKED_AT: usize = 200;

/// A dump's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DumpKind {
    /// `pg_dump --format=custom`.
    Custom,
    /// `--format=directory`.
    Directory,
    /// `--format=tar`.
    Tar,
    /// `--format=plain`: SQL.
    Plain,
}

/// A dump that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dump {
    /// Where.
    pub path: PathBuf,
    /// What it is.
    pub kind: DumpKind,
    /// Its bytes.
    pub bytes: u64,
}

impl Dump {
    /// Looks at what is there. Blocks.
    ///
    /// # Errors
    /// [`Error::Import`] if it is nothing that pg_dump writes.
    pub fn look(path: &Path) -> Result<Self> {
        let refuse =
            |why: &str, hint: &str| Err(Error::Import { why: format!("{path:?} {why}"), hint: Some(hint.to_owned()) });
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return refuse("is not there", "Name the dump as ebb serve sees it.");
            }
            Err(error) => return Err(error).on("look at", path),
        };
        let found = |kind, bytes| Ok(Self { path: path.to_owned(), kind, bytes });
        if meta.is_dir() {
            if path.join("toc.dat").is_file() {
                let mut bytes = 0;
                for entry in fs::read_dir(path).on("list", path)? {
                    bytes += entry.and_then(|entry| entry.metadata()).on("look at", path)?.len();
                }
                return found(DumpKind::Directory, bytes);
            }
            if path.join("PG_VERSION").exists() {
                return refuse("is a data directory, no dump", "Import it with --from-dir.");
            }
            return refuse("is a directory without a toc.dat, so no dump", "pg_dump --format=directory makes one.");
        }
        let mut head = Vec::new();
        File::open(path).and_then(|file| file.take(512).read_to_end(&mut head)).on("read", path)?;
        let is_tar = head.get(257..262) == Some(b"ustar") && head.starts_with(b"toc.dat\0");
        match () {
            () if head.starts_with(b"PGDMP") => found(DumpKind::Custom, meta.len()),
            () if is_tar => found(DumpKind::Tar, meta.len()),
            () if head.starts_with(&[0x1f, 0x8b]) || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) => {
                refuse("is compressed as a whole", "Decompress it first (gunzip, zstd -d).")
            }
            () if head.is_empty() => refuse("is empty", "Was the dump interrupted?"),
            () if head.contains(&0) => refuse("is nothing that pg_dump writes", "Make one: pg_dump --format=custom."),
            () => found(DumpKind::Plain, meta.len()),
        }
    }
}

/// A server that nobody else is on: a dump goes to it, or comes from it.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The programs of its version.
    pub installation: &'a Installation,
    /// Directory of its socket.
    pub socket_dir: &'a Path,
}

/// Reads a dump into the owner's database of a fresh cluster, and checks the tables and indexes that came of it.
///
/// # Errors
/// [`Error::Import`] with the first thing that Postgres refused.
///
/// # Cancel safety
/// Dropped, it kills the program that reads.
pub async fn restore(dump: &Dump, to: At<'_>, progress: &Progress) -> Result<()> {
    let host = Host::of(to.socket_dir).on("open", to.socket_dir)?;
    if to.installation.major < 15 {
        // From 15 on the database's owner has it anyway (PostgreSQL 15 release notes, "Change the owner of the public schema").
        let mut command = tools::superuser(to.installation, "psql", &host);
        command.args(["--no-psqlrc", "--quiet", "--dbname", DATABASE, "--command"]);
        command.arg(format!("ALTER SCHEMA public OWNER TO {OWNER}"));
        succeed(tools::run(command, |_| ()).await?)?;
    }
    match dump.kind {
        DumpKind::Plain => restore_plain(dump, to, &host, progress).await?,
        _ => restore_archive(dump, to, &host, progress).await?,
    }
    verify::amcheck(to.installation, &host, &[DATABASE.to_owned()], progress).await?;
    let mut command = tools::superuser(to.installation, "psql", &host);
    command.args(["--no-psqlrc", "--quiet", "--dbname", DATABASE, "--command"]);
    command.arg("DROP EXTENSION IF EXISTS amcheck; ANALYZE");
    succeed(tools::run(command, |_| ()).await?)?;
    progress.begin(Phase::Sealing, Counted::Bytes, None);
    Ok(())
}

fn succeed(ended: tools::Ended) -> Result<()> {
    if ended.is_success() { Ok(()) } else { Err(refused(&ended.complaint())) }
}

fn refused(complaint: &str) -> Error {
    let hint = match complaint {
        text if text.contains("unsupported version") => {
            "The dump was made by a newer pg_dump than this project's Postgres has. Import it into a project of a newer \
             Postgres (ebb project create --pg-major), or dump with an older pg_dump."
        }
        text if text.contains("extension") => {
            "The owner role may create extensions that are trusted and installed on the node. Install what is missing, or \
             dump without it (pg_dump --extension, --exclude-schema)."
        }
        _ => "Nothing was imported. Mend the dump, or leave out what Postgres refuses, and import again.",
    };
    Error::Import { why: format!("the dump cannot be restored: {complaint}"), hint: Some(hint.to_owned()) }
}

/// Entries of an archive that are left out, as its list names them.
const LEFT_OUT: [&str; 6] = [
    "EVENT TRIGGER",
    "PUBLICATION",
    "PUBLICATION TABLE",
    "PUBLICATION TABLES IN SCHEMA",
    "SUBSCRIPTION",
    "COMMENT - EXTENSION",
];

async fn restore_archive(dump: &Dump, to: At<'_>, host: &Host, progress: &Progress) -> Result<()> {
    progress.begin(Phase::Restoring, Counted::Objects, None);
    let (list, wanted, left_out) = list(dump, to.installation).await?;
    for what in &left_out {
        progress.note(format!("left out: {what}"));
    }
    progress.set(0, Some(wanted));
    let mut command = tools::client(to.installation, "pg_restore", host, OWNER);
    command.args(["--dbname", DATABASE, "--no-owner", "--no-privileges", "--no-tablespaces", "--no-subscriptions"]);
    command.args(["--no-publications", "--exit-on-error", "--verbose"]);
    command.arg("--use-list").arg(list.path()).arg(&dump.path);
    let mut complaint = None;
    let ended = tools::run(command, |line| {
        if complaint.is_none() && line.contains("error:") {
            complaint = Some(line.to_owned());
        }
        if ["creating ", "processing data for ", "executing "]
            .iter()
            .any(|act| line.contains(&format!("pg_restore: {act}")))
        {
            progress.add(1);
        }
    });
    let ended = ended.await?;
    match (ended.is_success(), complaint) {
        (true, _) => Ok(()),
        (false, complaint) => Err(refused(&complaint.unwrap_or_else(|| ended.complaint()))),
    }
}

/// Writes down the entries of an archive that are to be restored: the list, how many they are, and what is left out.
async fn list(dump: &Dump, installation: &Installation) -> Result<(TempList, u64, Vec<String>)> {
    let program = installation.bin.join("pg_restore");
    let mut command = tokio::process::Command::new(&program);
    command.arg("--list").arg(&dump.path).stdin(Stdio::null()).current_dir("/").kill_on_drop(true);
    crate::postgres::config::environment(command.as_std_mut());
    let ended = command.output().await.on("run", &program)?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        return Err(refused(said.lines().next().unwrap_or("pg_restore said nothing").trim()));
    }
    let (mut kept, mut wanted, mut left_out) = (String::new(), 0, Vec::new());
    for line in String::from_utf8_lossy(&ended.stdout).lines() {
        // `2345; 0 16385 EVENT TRIGGER - name owner`
        let words = line.splitn(4, ' ').nth(3).filter(|_| !line.starts_with(';'));
        match words {
            Some(what) if LEFT_OUT.iter().any(|kind| is_kind(what, kind)) => left_out.push(what.to_owned()),
            Some(_) => {
                wanted += 1;
                kept.push_str(line);
                kept.push('\n');
            }
            None => {}
        }
    }
    Ok((TempList::new(&kept)?, wanted, left_out))
}

fn is_kind(what: &str, kind: &str) -> bool {
    what.strip_prefix(kind).is_some_and(|rest| rest.starts_with(' '))
}

/// A list of entries in a file that goes with this.
#[derive(Debug)]
struct TempList(File, PathBuf);

impl TempList {
    fn new(text: &str) -> Result<Self> {
        // A file without a name: nothing is left, whatever happens.
        let dir = std::env::temp_dir();
        let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::open(&dir, flags, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR);
        let mut file = File::from(file.map_err(io::Error::from).on("make a file in", &dir)?);
        file.write_all(text.as_bytes()).on("write a file in", &dir)?;
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&file)));
        Ok(Self(file, path))
    }

    fn path(&self) -> &Path {
        // The descriptor lives as long as this.
        let _ = &self.0;
        &self.1
    }
}

async fn restore_plain(dump: &Dump, to: At<'_>, host: &Host, progress: &Progress) -> Result<()> {
    let base = |extra: &[&str]| {
        let mut command = tools::client(to.installation, "psql", host, OWNER);
        command.args(["--no-psqlrc", "--quiet", "--dbname", DATABASE]).args(extra);
        command
    };
    // Tried apart: without it, what follows would be read as psql reads anything.
    let tried = tools::run(base(&["--set", "ON_ERROR_STOP=1", "--command", r"\restrict ebb"]), |_| ()).await?;
    if !tried.is_success() {
        return Err(Error::Import {
            why: format!(
                "psql {} has no restricted mode, without which a plain dump could run any program",
                to.installation.version
            ),
            hint: Some(
                "Install a current minor release of Postgres, or make the dump with pg_dump --format=custom."
                    .to_owned(),
            ),
        });
    }
    progress.begin(Phase::Restoring, Counted::Bytes, Some(dump.bytes));
    let mut command = base(&["--set", "VERBOSITY=default", "--file", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let program = tools::program_of(&command);
    let mut child = command.spawn().on("run", &program)?;
    let input = child.stdin.take().and_then(|input| input.into_owned_fd().ok());
    let input = File::from(input.ok_or(Error::Cancelled)?);
    let (passable, failed) = (Passable::default(), Arc::new(AtomicBool::new(false)));
    let feeding = {
        let (dump, passable, progress) = (dump.clone(), passable.clone(), progress.clone());
        let failed = failed.clone();
        super::blocking(move || feed(&dump, input, &passable, &progress, &failed))
    };
    let (mut complaint, mut passed_over) = (None, 0_u64);
    let ended = tools::finish(child, &program, |line| {
        let Some((number, said)) = error_in(line) else { return };
        match passable.covers(number, said) {
            true => passed_over += 1,
            false => {
                complaint = complaint.take().or_else(|| Some(line.to_owned()));
                failed.store(true, Relaxed);
            }
        }
    });
    let (fed, ended) = tokio::join!(feeding, ended);
    let ended = ended?;
    if let Some(complaint) = complaint {
        return Err(refused(&complaint));
    }
    if !ended.is_success() {
        return Err(refused(&ended.complaint()));
    }
    fed?;
    if passed_over > 0 {
        progress.note(format!(
            "{passed_over} statements about owners, grants, publications or event triggers did not apply here"
        ));
    }
    Ok(())
}

/// Gives psql the dump, in restricted mode. pg_dump puts its own lines for that around what it writes; they would be
/// refused in it, and are left out. Stops when a statement has failed.
fn feed(dump: &Dump, input: File, passable: &Passable, progress: &Progress, failed: &AtomicBool) -> Result<()> {
    let own_key = format!("{:032x}", rand::random::<u128>());
    let mut input = io::BufWriter::with_capacity(1 << 16, input);
    let mut from = BufReader::with_capacity(1 << 16, File::open(&dump.path).on("open", &dump.path)?);
    let gone = |result: io::Result<()>| match result {
        // It has ended, and has said why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        result => result.on("write to", "psql").map(|()| true),
    };
    if !gone(writeln!(input, r"\restrict {own_key}"))? {
        return Ok(());
    }
    let (mut line, mut number, mut key, mut in_preamble) = (Vec::new(), 1_u64, None, true);
    loop {
        line.clear();
        let read = from.read_until(b'\n', &mut line).on("read", &dump.path)?;
        if read == 0 || failed.load(Relaxed) {
            break;
        }
        number += 1;
        progress.add(read as u64);
        let text = String::from_utf8_lossy(&line[..line.len().min(LOOKED_AT)]);
        let text = text.trim_end().to_owned();
        let is_end = line.trim_ascii_end().ends_with(b";");
        if in_preamble && let Some(named) = text.strip_prefix(r"\restrict ") {
            key = Some(format!(r"\unrestrict {}", named.trim()));
            line = b"\n".to_vec();
        } else if key.as_deref() == Some(text.as_str()) {
            line = b"\n".to_vec();
        } else {
            passable.note(number, &text, is_end);
        }
        in_preamble &= text.is_empty() || text.starts_with("--") || text.starts_with(r"\restrict ");
        if !gone(input.write_all(&line))? {
            return Ok(());
        }
    }
    gone(input.flush()).map(drop)
}

/// The line and the message of an error that psql tells of: `psql:<stdin>:7: ERROR:  role "bob" does not exist`.
fn error_in(line: &str) -> Option<(u64, &str)> {
    if let Some(rest) = line.strip_prefix("psql:<stdin>:") {
        let (number, said) = rest.split_once(": ")?;
        let is_error = ["ERROR:", "FATAL:", "PANIC:", "error:"].iter().any(|tag| said.starts_with(tag));
        return is_error.then_some((number.parse().ok()?, said));
    }
    let tag = ["ERROR:", "FATAL:", "error:"].iter().any(|tag| line.contains(tag));
    tag.then_some((0, line))
}

/// Lines of a plain dump with a statement that may fail.
#[derive(Debug, Clone, Default)]
struct Passable(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    lines: Vec<(u64, Why)>,
    /// The statement on the last line goes on, for so many lines at most.
    open: Option<(Why, u32)>,
}

/// LIMIT: what pg_dump writes about rights has a line; about event triggers two or three.
const LINES_MAX: u32 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// It is about who owns or may use something, or makes what is off in an import.
    Rights,
    /// It sets something that a newer pg_dump knows.
    Setting,
}

impl Passable {
    fn note(&self, number: u64, line: &str, is_end: bool) {
        let starts = |words: &[&str]| words.iter().any(|word| line.starts_with(word));
        let is_owner = line.starts_with("ALTER ") && line.contains(" OWNER TO ");
        let off = ["PUBLICATION ", "SUBSCRIPTION ", "EVENT TRIGGER "];
        let is_off = ["CREATE ", "ALTER ", "COMMENT ON "]
            .iter()
            .any(|act| line.strip_prefix(act).is_some_and(|rest| off.iter().any(|what| rest.starts_with(what))));
        let rights =
            is_owner || is_off || starts(&["GRANT ", "REVOKE ", "ALTER DEFAULT PRIVILEGES ", "COMMENT ON EXTENSION "]);
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (why, lines) = match (rights, line.starts_with("SET "), noted.open) {
            (true, _, _) => (Why::Rights, 1),
            (false, true, _) => (Why::Setting, 1),
            (false, false, Some((why, lines))) => (why, lines + 1),
            (false, false, None) => return,
        };
        noted.lines.push((number, why));
        noted.open = (!is_end && lines < LINES_MAX).then_some((why, lines));
    }

    fn covers(&self, number: u64, said: &str) -> bool {
        let noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(at) = noted.lines.binary_search_by_key(&number, |(number, _)| *number) else { return false };
        match noted.lines[at].1 {
            Why::Rights => true,
            Why::Setting => said.contains("unrecognized configuration parameter"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_statements_about_rights_and_unknown_settings_may_fail() {
        let passable = Passable::default();
        for (number, line) in [
            (2, "ALTER TABLE public.t OWNER TO bob;"),
            (3, "CREATE TABLE public.u ();"),
            (4, "SET transaction_timeout = 0;"),
            (5, "GRANT SELECT ON TABLE public.t TO bob;"),
            (7, "CREATE EVENT TRIGGER watches ON ddl_command_end"),
            (8, "   EXECUTE FUNCTION public.on_ddl();"),
            (9, "CREATE TABLE public.v ();"),
        ] {
            passable.note(number, line, line.ends_with(';'));
        }
        assert!(passable.covers(8, "ERROR:  permission denied to create event trigger \"watches\""));
        assert!(!passable.covers(9, "ERROR:  x"));
        assert!(passable.covers(2, "ERROR:  role \"bob\" does not exist"));
        assert!(!passable.covers(3, "ERROR:  x"));
        assert!(passable.covers(4, "ERROR:  unrecognized configuration parameter \"transaction_timeout\""));
        assert!(!passable.covers(4, "ERROR:  invalid value"));
        assert!(passable.covers(5, "ERROR:  role \"bob\" does not exist"));
        assert!(!passable.covers(6, "ERROR:  x"));
    }

    #[test]
    fn errors_of_psql_are_found() {
        let role = r#"psql:<stdin>:7: ERROR:  role "bob" does not exist"#;
        assert_eq!(error_in(role), Some((7, r#"ERROR:  role "bob" does not exist"#)));
        assert_eq!(error_in("psql:<stdin>:7: NOTICE:  fine"), None);
        assert_eq!(error_in("psql: error: connection failed"), Some((0, "psql: error: connection failed")));
        assert_eq!(error_in("LINE 1: ERROR"), None);
    }

    #[test]
    fn entries_of_an_archive_are_told_by_their_kind() {
        assert!(is_kind("EVENT TRIGGER - ddl bob", "EVENT TRIGGER"));
        assert!(!is_kind("PUBLICATIONS x", "PUBLICATION"));
        assert!(is_kind("COMMENT - EXTENSION hstore", "COMMENT - EXTENSION"));
    }
}
