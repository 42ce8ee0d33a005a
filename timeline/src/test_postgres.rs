//! For tests: programs of the Postgres server on this machine.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The newest server's programs (`EBB_PG_BIN`, or where Debian puts them).
fn server_bin() -> PathBuf {
    if let Ok(bin) = std::env::var("EBB_PG_BIN") {
        return bin.split(':').next().unwrap().into();
    }
    let mut found: Vec<PathBuf> = (14..=18).map(|major| format!("/usr/lib/postgresql/{major}/bin").into()).collect();
    found.retain(|bin| bin.join("initdb").exists());
    found.pop().expect("a Postgres server (apt-get install postgresql-15)")
}

/// A server program, not as root: Postgres refuses that.
pub fn unprivileged(program: &str) -> Command {
    let program = server_bin().join(program);
    match rustix::process::getuid().is_root() {
        false => Command::new(program),
        true => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
            command
        }
    }
}

/// A fresh cluster in `dir/data`.
pub fn initdb(dir: &Path) -> PathBuf {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    let data = dir.join("data");
    let made = unprivileged("initdb")
        .args(["--no-sync", "--auth=trust", "--username=postgres", "-D"])
        .arg(&data)
        .current_dir(dir)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    data
}
