//! One run of Postgres: its process, its log, its end.

use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::sync::mpsc;

use super::isolation;
use super::log::LogFile;
use super::sandbox::Sandbox;
use crate::error::{OsContext, Result};
use crate::manager::CANNOT_STAY;
use crate::postgres::config;
use crate::user::RunAs;

/// What the server writes when it lets clients in (PostgreSQL 15 `postmaster.c`, with `lc_messages = C`).
const READY: &[u8] = b"LOG:  database system is ready to accept connections";

/// What a standby writes when it lets clients in that only read.
const READY_TO_READ: &[u8] = b"LOG:  database system is ready to accept read-only connections";

/// What a standby writes when its files are consistent. Clients come in at the same moment, unless a transaction with more
/// than 64 subtransactions was open then (PostgreSQL 15, 27.4.3): its numbers are not all known.
const CONSISTENT: &[u8] = b"LOG:  consistent recovery state reached";

/// LIMIT: such a transaction may end in the WAL that is still to be replayed; a standby that has no more waits for ever.
const READY_AFTER_CONSISTENT: Duration = Duration::from_secs(5);

/// LIMIT: longer lines are cut in pieces; it bounds the memory of whoever reads the log.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// How to start Postgres.
#[derive(Debug)]
pub(super) struct Plan {
    /// Directory of the server binaries.
    pub bin: PathBuf,
    /// Arguments of `postgres`.
    pub arguments: Vec<String>,
    /// Whether it stays a standby.
    pub stays: bool,
    /// As whom.
    pub user: RunAs,
    /// Where.
    pub sandbox: Sandbox,
    /// The unit's lock. Postgres and all its children hold it too, as their standard input, so that it is free only
    /// when the last of them is gone: the kernel closes the unit's own files before it kills the rest.
    pub lock: File,
    /// Where what it writes goes.
    pub log: PathBuf,
}

/// What happens to a run of Postgres.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// It lets clients in.
    Ready,
    /// The postmaster ended, in this way.
    Exited(String),
}

/// A run of Postgres.
#[derive(Debug)]
pub(super) struct Postmaster {
    pid: Pid,
    complaint: Arc<Mutex<Option<String>>>,
    reader: JoinHandle<()>,
}

impl Postmaster {
    /// Starts Postgres and two threads: one reads its log, calling `on_ready` as soon as it says so; the other waits
    /// for its end.
    pub fn spawn(plan: &Plan, events: &mpsc::Sender<Event>, on_ready: impl FnOnce() + Send + 'static) -> Result<Self> {
        let program = plan.bin.join("postgres");
        let (output, input) = io::pipe().on("make a pipe for", &program)?;
        let log = LogFile::open(&plan.log).on("open", &plan.log)?;
        let mut command = Command::new(&program);
        command
            .args(&plan.arguments)
            .current_dir("/")
            .stdin(Stdio::from(plan.lock.try_clone().on("share", "unit.lock")?))
            .stdout(Stdio::from(input.try_clone().on("share", "log pipe")?))
            .stderr(Stdio::from(input));
        config::environment(&mut command);
        if nix::unistd::geteuid().is_root() {
            command.uid(plan.user.uid).gid(plan.user.gid);
        }
        let child = plan.sandbox.spawn(command, &program)?;
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("the kernel's process numbers fit 31 bits"));

        let complaint = Arc::new(Mutex::new(None));
        let reader = {
            let (complaint, events) = (complaint.clone(), events.clone());
            let on_ready = move || {
                on_ready();
                let _ = events.blocking_send(Event::Ready);
            };
            let standby =
                plan.stays.then(|| Standby { postmaster: pid, complaint: complaint.clone(), ready: Arc::default() });
            thread::Builder::new()
                .name("log".into())
                .spawn(move || read_log(output, log, &complaint, standby, on_ready))
        }
        .on("start a thread for", &plan.log)?;
        let events = events.clone();
        thread::Builder::new()
            .name("reaper".into())
            .spawn(move || events.blocking_send(Event::Exited(reap_until(pid))))
            .on("start a thread for", &program)?;
        Ok(Self { pid, complaint, reader })
    }

    /// Its process number, in this namespace.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Asks the postmaster: `SIGINT` is its fast shutdown, `SIGQUIT` the immediate one.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid, signal);
    }

    /// Kills whatever is left of it and answers its last complaint (a FATAL or PANIC line).
    ///
    /// The postmaster must have ended: [`Event::Exited`] was received. Blocks for as long as the kernel needs.
    pub fn bury(self) -> Option<String> {
        kill_the_rest();
        // Every writer of the pipe is dead, so that the reader comes to its end.
        let _ = self.reader.join();
        self.complaint.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Kills every process of the unit but the unit itself, and waits until they are gone.
pub(super) fn kill_the_rest() {
    // INVARIANT: -1 means "all I may kill": of a namespace whose first process is this one, it is the unit; anywhere
    // else it would be the machine.
    assert!(isolation::is_first_process(), "only the first process of a namespace may clear it");
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    while !matches!(waitpid(None, None), Err(Errno::ECHILD)) {}
}

/// Reaps whatever ends (as process 1 this unit inherits every orphan) until the postmaster does; says how it ended.
fn reap_until(postmaster: Pid) -> String {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == postmaster => return format!("exited with status {code}"),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == postmaster => {
                return format!("was killed by {signal}");
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return format!("was lost sight of ({error})"),
        }
    }
}

/// A server that is to stay at a moment, and is ended when it cannot.
struct Standby {
    postmaster: Pid,
    complaint: Arc<Mutex<Option<String>>>,
    ready: Arc<AtomicBool>,
}

impl Standby {
    fn consistent(&self) {
        let (postmaster, complaint, ready) = (self.postmaster, self.complaint.clone(), self.ready.clone());
        let wait = move || {
            thread::sleep(READY_AFTER_CONSISTENT);
            if !ready.load(Ordering::Relaxed) {
                end_standby(postmaster, &complaint);
            }
        };
        let _ = thread::Builder::new().name("standby".into()).spawn(wait);
    }
}

fn end_standby(postmaster: Pid, complaint: &Mutex<Option<String>>) {
    *complaint.lock().unwrap_or_else(PoisonError::into_inner) = Some(CANNOT_STAY.to_owned());
    let _ = kill(postmaster, Signal::SIGKILL);
}

fn read_log(
    output: PipeReader,
    mut log: LogFile,
    complaint: &Mutex<Option<String>>,
    standby: Option<Standby>,
    on_ready: impl FnOnce(),
) {
    let mut on_ready = Some(on_ready);
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut output).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let says = |words: &[u8]| line.windows(words.len()).any(|part| part == words);
        let ready = match &standby {
            None => says(READY),
            Some(standby) => {
                if says(CONSISTENT) {
                    standby.consistent();
                }
                if says(READY) {
                    // It has gone on: what it answers from here on is no moment of the past.
                    end_standby(standby.postmaster, complaint);
                }
                says(READY_TO_READ)
            }
        };
        if ready && let Some(on_ready) = on_ready.take() {
            if let Some(standby) = &standby {
                standby.ready.store(true, Ordering::Relaxed);
            }
            on_ready();
        }
        if let Some(found) = complaint_in(&line) {
            let mut complaint = complaint.lock().unwrap_or_else(PoisonError::into_inner);
            // What it says while it is being killed is not why.
            if complaint.as_deref() != Some(CANNOT_STAY) {
                *complaint = Some(found);
            }
        }
        log.write(&line);
    }
}

/// The message of a FATAL or PANIC line, or of what the server says before its log is set up (`postgres: …`).
fn complaint_in(line: &[u8]) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let line = line.trim_end();
    let tagged = ["FATAL:  ", "PANIC:  "].iter().find_map(|tag| line.find(tag).map(|at| &line[at..]));
    tagged.or_else(|| line.starts_with("postgres: ").then_some(line)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_found_in_log_lines() {
        let check = |line: &str, expect: Option<&str>| {
            assert_eq!(complaint_in(line.as_bytes()).as_deref(), expect, "for {line:?}");
        };
        check("2026-11-21 06:00:00 UTC [7] FATAL:  could not x\n", Some("FATAL:  could not x"));
        check("2026-11-21 06:00:00 UTC [7] PANIC:  no space\n", Some("PANIC:  no space"));
        check("postgres: could not access file \"x\"\n", Some("postgres: could not access file \"x\""));
        check("2026-11-21 06:00:00 UTC [7] LOG:  FATAL is only a word here\n", None);
    }
}
