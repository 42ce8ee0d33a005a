//! Running Postgres' own programs: clients over a server's private socket, and those that work on a data directory.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};

use super::stage::Stage;
use crate::error::{OsContext, Result};
use crate::postgres::config::{PORT, environment};
use crate::postgres::{Installation, SUPERUSER};
use crate::user::RunAs;

/// LIMIT: a socket's path has 107 bytes, `/.s.PGSQL.5432` among them.
const SOCKET_DIR_MAX: usize = 90;

/// LIMIT: what is remembered of what a program complained about.
const TAIL_LINES: usize = 20;

/// Begins a program so that it ends with this process, as the user that Postgres runs as. `$2` and on are the program and
/// its arguments. Standard input, the data directory, becomes descriptor 9, and `$1`, the directory of configuration and
/// socket, descriptor 8: the way there may be closed to that user.
///
/// The private IPC namespace takes the server's shared memory with it, however it ends; only root can make one.
const SCRIPT: &str = "exec 9<&0 8<\"$1\" </dev/null; shift; exec \"$@\"";

/// Names the data directory in the arguments of what [`on_directory`] starts.
pub(super) const DATA: &str = "/proc/self/fd/9";

/// Names the directory of configuration and socket there.
pub(super) const RUN: &str = "/proc/self/fd/8";

/// A program that works on the data directory of a stage, not started yet.
pub(super) fn on_directory(program: &Path, stage: &Stage, arguments: &[String]) -> Result<Command> {
    let (user, data) = (RunAs::find()?, stage.data());
    let dir = File::open(&data).on("open", &data)?;
    let mut command = Command::new("/bin/sh");
    command.args(["-c", SCRIPT, "ebb-import"]).arg(stage.run());
    if nix::unistd::geteuid().is_root() {
        command.args(["unshare", "--ipc", "setpriv", "--pdeathsig", "KILL", "--clear-groups"]);
        command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid));
    } else {
        command.args(["setpriv", "--pdeathsig", "KILL"]);
    }
    command.arg(program).args(arguments);
    command.stdin(Stdio::from(dir)).current_dir(data).kill_on_drop(true);
    environment(command.as_std_mut());
    Ok(command)
}

/// A socket's directory, as another program can name it.
#[derive(Debug)]
pub(super) struct Host {
    pub path: PathBuf,
    _dir: Option<File>,
}

impl Host {
    pub fn of(dir: &Path) -> io::Result<Self> {
        if dir.as_os_str().len() <= SOCKET_DIR_MAX {
            return Ok(Self { path: dir.to_owned(), _dir: None });
        }
        let open = File::open(dir)?;
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd()));
        Ok(Self { path, _dir: Some(open) })
    }
}

/// A client program on a server, not started yet. It runs as this process' own user.
pub(super) fn client(installation: &Installation, program: &str, host: &Host, role: &str) -> Command {
    let mut command = Command::new(installation.bin.join(program));
    command.arg("--host").arg(&host.path).args(["--port", &PORT.to_string(), "--username", role, "--no-password"]);
    command.stdin(Stdio::null()).current_dir("/").kill_on_drop(true);
    environment(command.as_std_mut());
    // Postgres itself must not be given what a branch's own options say; a client's name is told to its server.
    command.env("PGAPPNAME", "ebb import");
    command
}

/// As [`client`], as superuser.
pub(super) fn superuser(installation: &Installation, program: &str, host: &Host) -> Command {
    client(installation, program, host, SUPERUSER)
}

/// How a program ended, and the last lines of what it said on standard error.
#[derive(Debug)]
pub(super) struct Ended {
    pub code: Option<i32>,
    pub tail: Vec<String>,
}

impl Ended {
    pub fn is_success(&self) -> bool {
        self.code == Some(0)
    }

    /// The first line of the last ones in which it complains, or the last one.
    pub fn complaint(&self) -> String {
        let is_complaint =
            |line: &&String| ["error:", "ERROR:", "FATAL:", "PANIC:"].iter().any(|tag| line.contains(tag));
        let found = self.tail.iter().find(is_complaint).or(self.tail.last());
        found.cloned().unwrap_or_else(|| format!("it ended with {:?} and said nothing", self.code))
    }
}

/// Runs a program to its end, and shows each line of its standard error to `look`.
///
/// # Cancel safety
/// Dropped, it kills the program.
pub(super) async fn run(mut command: Command, look: impl FnMut(&str)) -> Result<Ended> {
    let program = program_of(&command);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().on("run", &program)?;
    finish(child, &program, look).await
}

/// Reads what a program has to say, and waits for its end.
pub(super) async fn finish(mut child: Child, program: &Path, look: impl FnMut(&str)) -> Result<Ended> {
    let tail = match child.stderr.take() {
        Some(stderr) => read_lines(stderr, look).await.on("listen to", program)?,
        None => Vec::new(),
    };
    let status = child.wait().await.on("wait for", program)?;
    Ok(Ended { code: status.code(), tail })
}

pub(super) fn program_of(command: &Command) -> PathBuf {
    let shell = OsStr::new("/bin/sh");
    let command = command.as_std();
    // What the script runs is named behind its own options.
    // The first path is that of a directory.
    let inner = || command.get_args().map(Path::new).filter(|argument| argument.is_absolute()).nth(1);
    match command.get_program() {
        program if program == shell => inner().unwrap_or(Path::new("/bin/sh")).to_owned(),
        program => PathBuf::from(program),
    }
}

async fn read_lines(from: impl AsyncRead + Unpin, mut look: impl FnMut(&str)) -> io::Result<Vec<String>> {
    let (mut from, mut line, mut tail) = (BufReader::new(from), Vec::new(), Vec::new());
    loop {
        line.clear();
        if from.read_until(b'\n', &mut line).await? == 0 {
            return Ok(tail);
        }
        let text = String::from_utf8_lossy(&line);
        // Progress is overwritten in place on a terminal.
        let text = text.trim_end().rsplit('\r').next().unwrap_or_default();
        if text.is_empty() {
            continue;
        }
        look(text);
        if tail.len() == TAIL_LINES {
            tail.remove(0);
        }
        tail.push(text.to_owned());
    }
}
