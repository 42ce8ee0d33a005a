//! A running Postgres somewhere else, by URL.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_postgres::config::Host;

use super::tls::{self, Client, Mode, Tls};
use super::wire::{self, Connection, Login};
use crate::error::{Error, Result};

/// LIMIT: a server that does not take a connection by then is not reachable.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

/// Where a cluster is taken from. Its password is shown nowhere.
#[derive(Clone)]
pub struct Source {
    place: Place,
    port: u16,
    user: String,
    password: Option<Vec<u8>>,
    tls: Tls,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Tcp(String),
    Unix(PathBuf),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.shown()).finish()
    }
}

impl Source {
    /// Reads a connection URL, or `key=value` pairs.
    ///
    /// # Errors
    /// [`Error::Import`], which does not repeat it: it may hold a password.
    pub fn parse(url: &str) -> Result<Self> {
        let refuse = |why: &str, hint: &str| Error::Import { why: why.to_owned(), hint: Some(hint.to_owned()) };
        const LOOKS: &str = "It looks like postgres://replicator:password@db.example.com:5432.";
        let (url, tls) = without_tls(url);
        let tls = tls_of(tls).map_err(|(why, hint)| refuse(why, hint))?;
        let config: tokio_postgres::Config = url.parse().map_err(|error| {
            refuse(&format!("the source's URL cannot be read: {}", crate::error::chain(&error)), LOOKS)
        })?;
        let place = match config.get_hosts() {
            [Host::Tcp(host)] => Place::Tcp(host.clone()),
            [Host::Unix(dir)] => Place::Unix(dir.clone()),
            [] => return Err(refuse("the source's URL names no host", LOOKS)),
            _ => return Err(refuse("the source's URL names several hosts", "Name the one to import from.")),
        };
        let user = config.get_user().ok_or_else(|| refuse("the source's URL names no user", LOOKS))?;
        Ok(Self {
            place,
            port: config.get_ports().first().copied().unwrap_or(5432),
            user: user.to_owned(),
            password: config.get_password().map(<[u8]>::to_vec),
            tls,
        })
    }

    /// What may be shown of it.
    pub fn shown(&self) -> String {
        match &self.place {
            Place::Tcp(host) => format!("postgres://{}@{host}:{}", self.user, self.port),
            Place::Unix(dir) => format!("postgres://{}@{}:{}", self.user, dir.display(), self.port),
        }
    }

    /// The major version of the server.
    ///
    /// # Errors
    /// [`Error::Import`] if it cannot be reached, or does not let this user replicate.
    pub async fn pg_major(&self) -> Result<u32> {
        let connection = self.connect("ebb_import").await?;
        connection.pg_major().ok_or_else(|| Error::import("the source does not tell its version"))
    }

    /// Connects for replication.
    pub(crate) async fn connect(&self, application: &str) -> Result<Connection> {
        self.dial(application).await.map_err(|error| self.failed(&error))
    }

    /// As [`Source::connect`], for who decides by what went wrong.
    pub(crate) async fn dial(&self, application: &str) -> wire::Result<Connection> {
        let login = Login { user: &self.user, password: self.password.as_deref(), application };
        match &self.place {
            Place::Tcp(host) => {
                let stream = timeout(CONNECT_DEADLINE, TcpStream::connect((host.as_str(), self.port))).await??;
                stream.set_nodelay(true)?;
                let stream = timeout(CONNECT_DEADLINE, tls::negotiate(stream, host, &self.tls)).await??;
                Connection::begin(stream, login).await
            }
            Place::Unix(dir) => {
                let socket = dir.join(format!(".s.PGSQL.{}", self.port));
                let stream = timeout(CONNECT_DEADLINE, UnixStream::connect(socket)).await??;
                Connection::begin(stream, login).await
            }
        }
    }

    /// Says what went wrong with this source, and what to do.
    pub(crate) fn failed(&self, error: &wire::Error) -> Error {
        let hint = match error {
            wire::Error::Io(_) | wire::Error::Deadline(_) => {
                "Is it running, and can the machine of ebb serve reach it (listen_addresses, firewall)?".to_owned()
            }
            wire::Error::NoTls => "Set ssl = on at the source, or import with sslmode=disable.".to_owned(),
            wire::Error::Tls(_) => "Check sslmode, sslrootcert, sslcert, and the source's certificate.".to_owned(),
            wire::Error::NoPassword => "Put the password into the URL, or into PGPASSWORD.".to_owned(),
            wire::Error::Refused { code, .. } if code == "28P01" => "Check user and password.".to_owned(),
            wire::Error::Refused { code, .. } if code == "28000" => format!(
                "Let the user in for replication: a line `host replication {} ADDRESS scram-sha-256` (or hostssl, with TLS) in the \
                 source's pg_hba.conf.",
                self.user
            ),
            wire::Error::Refused { code, .. } if code == "42501" => {
                format!("Let it replicate: ALTER ROLE {} REPLICATION.", self.user)
            }
            wire::Error::Refused { code, .. } if code == "53300" || code == "55000" || code == "53400" => {
                "The source needs wal_level = replica, and room in max_wal_senders (2) and max_replication_slots (1)."
                    .to_owned()
            }
            wire::Error::Refused { code, .. } if code == "58P01" => {
                "The source has removed WAL that was still needed: raise its wal_keep_size, and import again."
                    .to_owned()
            }
            _ => "See the source's log.".to_owned(),
        };
        Error::Import { why: format!("{}: {}", self.shown(), crate::error::chain(error)), hint: Some(hint) }
    }
}

/// What is about TLS in a connection URL.
#[derive(Debug, Default)]
struct TlsWords {
    mode: Option<String>,
    roots: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl TlsWords {
    fn place(&mut self, name: &str) -> Option<&mut Option<String>> {
        match name {
            "sslmode" => Some(&mut self.mode),
            "sslrootcert" => Some(&mut self.roots),
            "sslcert" => Some(&mut self.certificate),
            "sslkey" => Some(&mut self.key),
            _ => None,
        }
    }
}

/// Takes what is about TLS out of a URL's query, or of `key=value` pairs: the library that reads the rest knows less of it
/// than libpq.
fn without_tls(url: &str) -> (String, TlsWords) {
    let mut words = TlsWords::default();
    let mut others = |text: &str, between: &str, read: fn(&str) -> String| {
        let others = text.split(between).filter(|pair| match pair.split_once('=') {
            Some((name, value)) => words.place(name).map(|place| *place = Some(read(value))).is_none(),
            None => true,
        });
        others.collect::<Vec<_>>().join(between)
    };
    let rest = match (url.contains("://"), url.split_once('?')) {
        // A value with a space in it, which is written in quotes, is left to the library.
        (false, _) => others(url, " ", str::to_owned),
        (true, None) => url.to_owned(),
        (true, Some((address, query))) => match others(query, "&", decoded) {
            rest if rest.is_empty() => address.to_owned(),
            rest => format!("{address}?{rest}"),
        },
    };
    (rest, words)
}

/// As libpq takes it; or why not, and what to do.
fn tls_of(words: TlsWords) -> std::result::Result<Tls, (&'static str, &'static str)> {
    let mode = match (words.mode.as_deref(), words.roots) {
        (None | Some("prefer"), None) => Mode::Prefer,
        (Some("disable"), _) => Mode::Never,
        (Some("require"), None) => Mode::Require,
        // "require" with authorities verifies them, for what was written when there was no other word for it
        // (PostgreSQL 15 manual, 34.19.1).
        (Some("verify-ca" | "require"), Some(roots)) => Mode::VerifyAuthority(roots.into()),
        (Some("verify-full"), Some(roots)) => Mode::VerifyName(roots.into()),
        (Some("verify-ca" | "verify-full"), None) => {
            let why = "the source's URL asks for its certificate to be verified, and does not say by which authority";
            return Err((why, "Add sslrootcert=FILE, a file on the machine of ebb serve."));
        }
        _ => {
            let why = "the source's URL has an sslmode that imports do not know";
            return Err((why, "Use disable, prefer, require; or verify-ca or verify-full with sslrootcert=FILE."));
        }
    };
    let client = match (words.certificate, words.key) {
        (Some(certificate), Some(key)) => Some(Client { certificate: certificate.into(), key: key.into() }),
        (None, None) => None,
        _ => {
            let why = "the source's URL has a client certificate without its key, or the other way round";
            return Err((why, "Give both sslcert=FILE and sslkey=FILE, on the machine of ebb serve."));
        }
    };
    Ok(Tls { mode, client })
}

/// Undoes percent-encoding.
fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&first, more)) = rest.split_first() {
        let code = more.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match (first, code) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &more[2..];
            }
            _ => {
                bytes.push(first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_read_and_its_password_is_not_shown() {
        let source = Source::parse("postgres://rep:s3cret@db.example.com:5433/x").unwrap();
        assert_eq!(source.shown(), "postgres://rep@db.example.com:5433");
        assert!(!format!("{source:?}").contains("s3cret"));
        let tls = |query: &str| Source::parse(&format!("postgres://rep@db.example.com/x{query}")).unwrap().tls;
        let mode = |query: &str| tls(query).mode;
        assert_eq!((mode(""), mode("?sslmode=disable")), (Mode::Prefer, Mode::Never));
        assert_eq!(mode("?connect_timeout=5&sslmode=require"), Mode::Require);
        assert_eq!(
            mode("?sslmode=verify-full&sslrootcert=/etc/my%20ca.pem"),
            Mode::VerifyName("/etc/my ca.pem".into())
        );
        assert_eq!(mode("?sslmode=verify-ca&sslrootcert=/ca"), Mode::VerifyAuthority("/ca".into()));
        assert_eq!(mode("?sslmode=require&sslrootcert=/ca"), Mode::VerifyAuthority("/ca".into()));
        let client = Client { certificate: "/crt".into(), key: "/key".into() };
        assert_eq!(tls("?sslcert=/crt&sslkey=/key").client, Some(client));
        let source = Source::parse("host=/run/postgresql user=rep").unwrap();
        assert_eq!(source.shown(), "postgres://rep@/run/postgresql:5432");
        let source = Source::parse("host=a user=rep sslmode=verify-full sslrootcert=/ca port=5433").unwrap();
        assert_eq!(
            (source.shown().as_str(), source.tls.mode),
            ("postgres://rep@a:5433", Mode::VerifyName("/ca".into()))
        );
        for (bad, why) in [
            ("postgres://u:s3cret@a,b/x", "several hosts"),
            ("postgres:///x", "no host"),
            ("postgres://db.example.com", "no user"),
            ("nonsense", "cannot be read"),
            ("postgres://u:s3cret@a/x?sslmode=verify-ca", "by which authority"),
            ("postgres://u:s3cret@a/x?sslmode=verify-full", "by which authority"),
            ("postgres://u:s3cret@a/x?sslmode=verify", "sslmode"),
            ("postgres://u:s3cret@a/x?sslcert=/crt", "without its key"),
        ] {
            let error = Source::parse(bad).unwrap_err().to_string();
            assert!(error.contains(why) && !error.contains("s3cret"), "{bad}: {error}");
        }
    }
}
