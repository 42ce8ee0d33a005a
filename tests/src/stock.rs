//! Stock Postgres beside Ebb: what somebody comes with, and what they can go back to.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use ebb_test_s3::free_port;
use tempfile::TempDir;

use crate::node::{Ran, pg_bin, run};
use crate::{Authority, COMMAND_PATIENCE, wait_for};

/// A cluster of a test's own, on a port of 127.0.0.1; stopped and removed when dropped.
#[derive(Debug)]
pub struct Stock {
    dir: TempDir,
    bin: PathBuf,
    /// Where it listens.
    pub port: u16,
    runs: bool,
}

/// A program, not as root: Postgres refuses that.
fn unprivileged(program: &Path) -> Command {
    if !rustix::process::getuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "env", "HOME=/tmp", "LC_ALL=C.UTF-8"]);
    command.arg(program);
    command
}

/// Major version of the programs that tests call.
fn pg_major() -> u32 {
    let out = Command::new(pg_bin().join("postgres")).arg("--version").output().expect("postgres can be started");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let number = text.split_whitespace().nth(2).and_then(|version| version.split('.').next()?.parse().ok());
    number.unwrap_or_else(|| panic!("postgres has no version: {text}"))
}

impl Stock {
    /// What initdb is told for pages without checksums: before 18 they have none unless asked for.
    pub fn without_checksums() -> &'static [&'static str] {
        if pg_major() >= 18 { &["--no-data-checksums"] } else { &[] }
    }

    /// A new cluster, running, that lets its superuser in with password `s3cret` over TCP, also for replication.
    pub fn start(superuser: &str, initdb: &[&str]) -> Self {
        let mut stock = Self::empty(&pg_bin());
        let password = stock.dir.path().join("password");
        fs::write(&password, "s3cret\n").expect("a file can be written");
        stock.run_unprivileged(
            "initdb",
            &[
                &[
                    "--no-sync",
                    "--auth-host=scram-sha-256",
                    "--auth-local=trust",
                    "-U",
                    superuser,
                    "--pwfile",
                    text(&password),
                    "-D",
                    text(&stock.data()),
                ],
                initdb,
            ]
            .concat(),
        );
        stock.begin();
        stock
    }

    /// A copy of a data directory, not running.
    pub fn on_copy_of(data: &Path) -> Self {
        let stock = Self::empty(&pg_bin());
        let copy = Command::new("cp").arg("-a").arg(data).arg(stock.data()).status();
        assert!(copy.expect("cp can be started").success());
        if rustix::process::getuid().is_root() {
            let given = Command::new("chown").args(["-R", "postgres:postgres"]).arg(stock.data()).status();
            assert!(given.expect("chown can be started").success());
        }
        stock
    }

    fn empty(bin: &Path) -> Self {
        let dir = TempDir::with_prefix("ebb-stock-").expect("a temporary directory can be made");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("a directory can be opened up");
        Self { dir, bin: bin.to_owned(), port: free_port(), runs: false }
    }

    fn run_unprivileged(&self, program: &str, args: &[&str]) {
        let mut command = unprivileged(&self.bin.join(program));
        // What it starts must not keep a pipe of ours open.
        command.args(args).current_dir(self.dir.path()).stdout(std::process::Stdio::null());
        command.stderr(fs::File::options().create(true).append(true).open(self.dir.path().join("err")).expect("a log"));
        let ended = command.status().expect("a program of Postgres can be started");
        let log = |name| fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        assert!(ended.success(), "{program} {args:?}: {}\n{}", log("err"), log("log"));
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A directory that it and the test can write to.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Lets nobody in over TCP but with TLS, from its next start on. Its certificate is for `localhost`; answers the
    /// authority's.
    pub fn only_with_tls(&self) -> PathBuf {
        let (crt, key) = (self.data().join("server.crt"), self.data().join("server.key"));
        // Nothing of the machine's own configuration makes it an authority: it stands for itself.
        let conf = self.dir.path().join("openssl.cnf");
        fs::write(&conf, "[req]\ndistinguished_name=dn\n[dn]\n").expect("a file can be written");
        let mut openssl = unprivileged(Path::new("openssl"));
        openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]);
        openssl.args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]).arg("-config").arg(&conf);
        openssl.arg("-out").arg(&crt).arg("-keyout").arg(&key);
        let made = openssl.current_dir(self.dir.path()).output().expect("openssl can be started");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        self.only_hostssl("");
        fs::write(self.data().join("postgresql.auto.conf"), "ssl = on\n").expect("settings can be written");
        crt
    }

    /// Lets nobody in over TCP without TLS and a certificate of this authority; its own is the one that was signed as
    /// `server`.
    pub fn only_with_certificates(&self, authority: &Authority) {
        for name in ["server.crt", "server.key", "ca.pem"] {
            let to = self.data().join(name);
            fs::copy(authority.path(name), &to).expect("a file can be copied");
            let owner = fs::metadata(self.data()).expect("the directory is there");
            let (uid, gid) = (MetadataExt::uid(&owner), MetadataExt::gid(&owner));
            std::os::unix::fs::chown(&to, Some(uid), Some(gid)).expect("a file can be given away");
        }
        self.only_hostssl(" clientcert=verify-ca");
        let settings = "ssl = on\nssl_ca_file = 'ca.pem'\n";
        fs::write(self.data().join("postgresql.auto.conf"), settings).expect("settings can be written");
    }

    fn only_hostssl(&self, options: &str) {
        let hba = self.data().join("pg_hba.conf");
        let rules = fs::read_to_string(&hba).expect("rules can be read");
        let changed = rules.lines().map(|rule| match rule.strip_prefix("host ") {
            Some(rest) => format!("hostssl {rest}{options}\n"),
            None => format!("{rule}\n"),
        });
        fs::write(&hba, changed.collect::<String>()).expect("rules can be written");
    }

    /// Starts it, and waits until it answers.
    pub fn begin(&mut self) {
        let options = format!(
            "-p {} -k {} -c listen_addresses=127.0.0.1 -c unix_socket_permissions=0777 -c max_prepared_transactions=2",
            self.port,
            text(self.dir.path())
        );
        let (data, log) = (self.data(), self.dir.path().join("log"));
        self.run_unprivileged("pg_ctl", &["-D", text(&data), "-w", "-l", text(&log), "-o", &options, "start"]);
        self.runs = true;
    }

    /// Stops it: `fast`, or `immediate` as a crash would.
    pub fn end(&mut self, mode: &str) {
        if std::mem::take(&mut self.runs) {
            self.run_unprivileged("pg_ctl", &["-D", text(&self.data()), "-w", "-m", mode, "stop"]);
        }
    }

    /// The URL of a role, with the superuser's password.
    pub fn url(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}:s3cret@127.0.0.1:{}/{database}", self.port)
    }

    /// Runs a client program over the local socket.
    pub fn tool(&self, program: &str, role: &str, args: &[&str]) -> Ran {
        let mut command = Command::new(self.bin.join(program));
        command.args(["-h", text(self.dir.path()), "-p", &self.port.to_string(), "-U", role]).args(args);
        run(command, COMMAND_PATIENCE).unwrap_or_else(|why| panic!("{program} {args:?} {why}"))
    }

    /// Runs SQL, which must succeed; rows without decoration.
    pub fn psql(&self, role: &str, database: &str, sql: &str) -> String {
        let ran = self.tool("psql", role, &["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]);
        assert_eq!(ran.code, 0, "psql failed for {sql:?}: {}", ran.stderr);
        ran.stdout.trim_end().to_owned()
    }

    /// Waits until no walsender serves anybody.
    pub fn until_nobody_replicates(&self, superuser: &str) {
        let sql = "select count(*) from pg_stat_replication";
        wait_for("replication to end", || self.psql(superuser, "postgres", sql) == "0");
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.end("immediate")));
        if ended.is_err() && !std::thread::panicking() {
            panic!("a stock Postgres did not stop");
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}
