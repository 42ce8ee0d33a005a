//! A running Postgres somewhere else, by URL.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_postgres::config::Host;

use super::tls::{self, Tls};
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
        let (url, sslmode, sslrootcert) = without_tls(url);
        let tls = match (sslmode.as_deref(), sslrootcert) {
            (None | Some("prefer"), None) => Tls::Prefer,
            (Some("disable"), _) => Tls::Never,
            (Some("require"), None) => Tls::Require,
            (Some("verify-full"), Some(roots)) => Tls::Verify(roots.into()),
            _ => {
                let why = "the source's URL has an sslmode that imports do not know";
                let hint =
                    "Use disable, prefer, require; or verify-full with sslrootcert=FILE, on the machine of ebb serve.";
                return Err(refuse(why, hint));
            }
        };
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
            wire::Error::Tls(_) => "Check sslmode, sslrootcert and the source's certificate.".to_owned(),
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

/// Takes what is about TLS out of a URL's query: the library that reads the rest knows less of it than libpq.
fn without_tls(url: &str) -> (String, Option<String>, Option<String>) {
    let Some((address, query)) = url.split_once('?') else { return (url.to_owned(), None, None) };
    let (mut sslmode, mut sslrootcert, mut rest) = (None, None, Vec::new());
    for option in query.split('&') {
        match option.split_once('=') {
            Some(("sslmode", value)) => sslmode = Some(value.to_owned()),
            Some(("sslrootcert", value)) => sslrootcert = Some(decoded(value)),
            _ => rest.push(option),
        }
    }
    match rest.is_empty() {
        true => (address.to_owned(), sslmode, sslrootcert),
        false => (format!("{address}?{}", rest.join("&")), sslmode, sslrootcert),
    }
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
        assert_eq!((tls(""), tls("?sslmode=disable")), (Tls::Prefer, Tls::Never));
        assert_eq!(tls("?connect_timeout=5&sslmode=require"), Tls::Require);
        assert_eq!(tls("?sslmode=verify-full&sslrootcert=/etc/my%20ca.pem"), Tls::Verify("/etc/my ca.pem".into()));
        let source = Source::parse("host=/run/postgresql user=rep").unwrap();
        assert_eq!(source.shown(), "postgres://rep@/run/postgresql:5432");
        for (bad, why) in [
            ("postgres://u:s3cret@a,b/x", "several hosts"),
            ("postgres:///x", "no host"),
            ("postgres://db.example.com", "no user"),
            ("nonsense", "cannot be read"),
            ("postgres://u:s3cret@a/x?sslmode=verify-ca", "sslmode"),
            ("postgres://u:s3cret@a/x?sslmode=verify-full", "sslmode"),
        ] {
            let error = Source::parse(bad).unwrap_err().to_string();
            assert!(error.contains(why) && !error.contains("s3cret"), "{bad}: {error}");
        }
    }
}
