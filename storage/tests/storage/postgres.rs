//! Real Postgres for tests: one cluster per directory, reached through a Unix socket in it, stopped when dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The newest Postgres of the usual places.
fn bin_dir() -> PathBuf {
    let mut found: Vec<(u32, PathBuf)> = (fs::read_dir("/usr/lib/postgresql").into_iter().flatten())
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let major = path.file_name()?.to_str()?.parse().ok()?;
            path.join("bin/initdb").exists().then_some((major, path.join("bin")))
        })
        .collect();
    found.sort();
    found.pop().expect("tests need Postgres: apt-get install postgresql-15").1
}

/// A command that runs as `postgres` if this is root: Postgres refuses to run as root.
fn command(program: &str) -> Command {
    let program = bin_dir().join(program);
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    assert!(output.status.success(), "{command:?}: {}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A data directory, in a directory of its own that also holds the log and the socket.
pub struct Cluster {
    dir: PathBuf,
    pub data_dir: PathBuf,
}

impl Cluster {
    /// Names the place; makes only the directory around it.
    pub fn at(dir: &Path) -> Self {
        fs::create_dir(dir).unwrap();
        let cluster = Self { dir: dir.to_owned(), data_dir: dir.join("data") };
        cluster.give_to_postgres();
        cluster
    }

    /// Makes a fresh cluster, with small WAL segments and data checksums.
    pub fn init(dir: &Path) -> Self {
        let cluster = Self::at(dir);
        let options = ["--auth=trust", "--username=postgres", "--data-checksums", "--wal-segsize=1", "--no-sync"];
        run(command("initdb").arg("-D").arg(&cluster.data_dir).args(options).current_dir(dir));
        cluster
    }

    /// What `PG_VERSION` says.
    pub fn major(&self) -> u32 {
        fs::read_to_string(self.data_dir.join("PG_VERSION")).unwrap().trim().parse().unwrap()
    }

    /// Adds a file.
    pub fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.data_dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Makes everything the property of the user that Postgres runs as.
    pub fn give_to_postgres(&self) {
        if rustix::process::geteuid().is_root() {
            run(Command::new("chown").arg("-R").arg("postgres:postgres").arg(&self.dir));
        }
    }

    /// Runs one of Postgres's programs on the data directory; it must succeed.
    pub fn tool(&self, program: &str, args: &[&str]) -> String {
        run(command(program).arg("-D").arg(&self.data_dir).args(args).current_dir(&self.dir))
    }

    /// Starts it.
    pub fn start(&self) -> Server<'_> {
        let options = format!("-c listen_addresses= -c unix_socket_directories={} -c fsync=off", self.dir.display());
        let log = self.dir.join("log");
        let log_arg = log.to_str().unwrap();
        // pg_ctl must not hand our pipes on to the server, or reading them would never end.
        let started = command("pg_ctl")
            .args(["start", "--wait", "--silent", "--log", log_arg, "-o", &options, "-D"])
            .arg(&self.data_dir)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(started.success(), "Postgres does not start: {}", fs::read_to_string(&log).unwrap_or_default());
        Server { cluster: self, running: true }
    }
}

/// A running server; shut down cleanly when dropped.
pub struct Server<'a> {
    cluster: &'a Cluster,
    running: bool,
}

impl Server<'_> {
    /// Runs SQL; answers rows as lines, columns separated by `|`.
    pub fn sql(&self, sql: &str) -> String {
        let socket_dir = self.cluster.dir.to_str().unwrap();
        run(command("psql").args(["-XAtq", "-h", socket_dir, "-U", "postgres", "-d", "postgres", "-c", sql]))
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.cluster.tool("pg_ctl", &["stop", "--silent", "--mode=immediate"]);
        self.running = false;
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        if self.running {
            self.cluster.tool("pg_ctl", &["stop", "--silent", "--mode=fast", "--wait"]);
        }
    }
}
