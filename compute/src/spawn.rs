//! Starting a unit as process 1 of its own pid namespace.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::clock;
use crate::error::{OsContext, Result};

/// Spawns `exe compute --branch-dir DIR`. Its standard output is a pipe; it lives on when the handle is dropped.
///
/// Where this process is root the child is the first process of a new pid namespace; otherwise it makes one itself.
pub(crate) async fn unit(exe: &Path, branch_dir: &Path, log: File) -> Result<Child> {
    let mut command = Command::new(exe);
    command.args(["compute", "--branch-dir"]).arg(branch_dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).current_dir("/");
    clock::ask_now(command.as_std_mut());
    let (spawned, child) = oneshot::channel();
    let runtime = Handle::current();
    // A thread for this one act: unshare(CLONE_NEWPID) changes where the calling thread's children are born, for good
    // (pid_namespaces(7)). It must not be a thread of a pool.
    let spawner = move || {
        let _runtime = runtime.enter();
        let namespace = if geteuid().is_root() { unshare(CloneFlags::CLONE_NEWPID) } else { Ok(()) };
        // Refused, even as root (a container without the right): the unit tries itself and says so if it cannot.
        if let Err(error) = namespace {
            tracing::debug!(%error, "no pid namespace made for a unit");
        }
        let _ = spawned.send(command.spawn());
    };
    thread::Builder::new().name("unit-spawner".into()).spawn(spawner).on("start a thread to run", exe)?;
    child.await.unwrap_or_else(|_| Err(std::io::Error::other("the spawning thread panicked"))).on("run", exe)
}
