//! The two sides: Ebb's proxy and PgBouncer, each a process before the same Postgres; and that Postgres itself.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use ebb_measure::{process, wait_for};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

use crate::Common;
use crate::serve::Stats;
use crate::world::{Postgres, as_postgres, done, own};

/// The password of role `app`.
pub const PASSWORD: &str = "a-password-for-benches";

/// Where clients connect.
#[derive(Debug, Clone)]
pub struct Target {
    /// TCP, or nothing for the socket of Postgres itself.
    pub addr: Option<SocketAddr>,
    /// The `options` that name the endpoint.
    pub options: Option<&'static str>,
    /// What to verify the server against, with TLS.
    pub ca: Option<PathBuf>,
    /// libpq's form of all that.
    pub conninfo: String,
}

impl Target {
    fn tcp(addr: SocketAddr, options: Option<&'static str>, ca: Option<PathBuf>) -> Self {
        let mode = if ca.is_some() { "require" } else { "disable" };
        let mut conninfo = format!(
            "host=127.0.0.1 port={} user=app password={PASSWORD} dbname=app gssencmode=disable sslmode={mode}",
            addr.port()
        );
        if let Some(options) = options {
            conninfo.push_str(&format!(" options={options}"));
        }
        Self { addr: Some(addr), options, ca, conninfo }
    }

    /// No pooler.
    pub fn direct(postgres: &Postgres) -> Self {
        Self { addr: None, options: None, ca: None, conninfo: postgres.conninfo() }
    }
}

/// A pooler's process.
#[derive(Debug)]
pub struct Pooler {
    process: Child,
    addr: SocketAddr,
    options: Option<&'static str>,
    ca: PathBuf,
    out: Option<BufReader<ChildStdout>>,
    _dir: tempfile::TempDir,
}

impl Pooler {
    /// Ebb's proxy, whose clients log in by so many rounds of hashing.
    pub fn ebb(common: &Common, postgres: &Postgres, iterations: u32) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ebb-proxy-").tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg("--socket").arg(postgres.socket()).args(["--verifier", &verifier(iterations)]);
        command.arg("--tls-dir").arg(dir.path().join("tls"));
        if let Some(lanes) = common.lanes {
            command.args(["--lanes", &lanes.to_string()]);
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut out = BufReader::new(process.stdout.take().context("no standard output")?);
        let mut line = String::new();
        out.read_line(&mut line)?;
        let addr = line.trim().parse().context("the proxy did not start")?;
        let ca = dir.path().join("tls/ca.pem");
        Ok(Self { process, addr, options: Some("endpoint=prod--bench"), ca, out: Some(out), _dir: dir })
    }

    /// PgBouncer in session mode, with and without TLS.
    pub fn bouncer(postgres: &Postgres) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ebb-bouncer-").tempdir()?;
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let file = |name: &str| -> PathBuf { dir.path().join(name) };
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
        fs::write(file("cert.pem"), made.cert.pem())?;
        fs::write(file("key.pem"), made.signing_key.serialize_pem())?;
        fs::write(file("users"), format!("\"app\" \"{PASSWORD}\"\n"))?;
        fs::write(
            file("ini"),
            format!(
                "[databases]\napp = host={} port=5432 user=app\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {}\n\
                 unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = session\n\
                 max_client_conn = 500\ndefault_pool_size = 100\nlogfile = {}\nclient_tls_sslmode = allow\n\
                 client_tls_cert_file = {}\nclient_tls_key_file = {}\n",
                postgres.dir().display(),
                addr.port(),
                file("users").display(),
                file("log").display(),
                file("cert.pem").display(),
                file("key.pem").display(),
            ),
        )?;
        own(dir.path())?;
        let process = as_postgres(Path::new("/usr/sbin/pgbouncer"))
            .arg("-q")
            .arg(file("ini"))
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start pgbouncer: scripts/setup bench installs it")?;
        wait_for("PgBouncer", || TcpStream::connect(addr).is_ok())?;
        Ok(Self { process, addr, options: None, ca: file("cert.pem"), out: None, _dir: dir })
    }

    /// Where its clients connect.
    pub fn target(&self, tls: bool) -> Target {
        Target::tcp(self.addr, self.options, tls.then(|| self.ca.clone()))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Processor time it has taken.
    pub fn processor_time(&self) -> Result<Duration> {
        process::processor_time(self.pid())
    }

    /// Tells Ebb's proxy something, and answers what it says.
    pub fn tell(&mut self, command: &str) -> Result<String> {
        let input = self.process.stdin.as_mut().context("it takes no commands")?;
        writeln!(input, "{command}")?;
        input.flush()?;
        let mut line = String::new();
        self.out.as_mut().context("it gives no answers")?.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the proxy has ended");
        Ok(line.trim().to_owned())
    }

    /// What Ebb's proxy holds.
    pub fn stats(&mut self) -> Result<Stats> {
        Ok(serde_json::from_str(&self.tell("stats")?)?)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = done(Command::new("kill").arg(self.pid().to_string()));
        let _ = self.process.wait();
    }
}

/// What Postgres would store of the password after so many rounds of hashing (RFC 5802, section 3).
fn verifier(iterations: u32) -> String {
    let mac = |key: &[u8], text: &[u8]| -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key may have any length");
        mac.update(text);
        mac.finalize().into_bytes().into()
    };
    let salt = b"sixteen bytes...";
    let mut round = mac(PASSWORD.as_bytes(), &[&salt[..], &[0, 0, 0, 1]].concat());
    let mut salted = round;
    for _ in 1..iterations {
        round = mac(PASSWORD.as_bytes(), &round);
        salted.iter_mut().zip(round).for_each(|(all, new)| *all ^= new);
    }
    let stored = Sha256::digest(mac(&salted, b"Client Key"));
    let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    format!("SCRAM-SHA-256${iterations}:{}${}:{}", encode(salt), encode(&stored), encode(&mac(&salted, b"Server Key")))
}
