//! The first packet of a connection, and which endpoint it asks for: bytes in, values out.

use ebb_types::EndpointName;

use crate::errors::Said;
use crate::wire::{Fields, cstr, untagged};

/// LIMIT: what Postgres 15 accepts (`MAX_STARTUP_PACKET_LENGTH`, pqcomm.h).
pub const PACKET_MAX: usize = 10_000;

const CANCEL: u32 = 80_877_102;
const SSL: u32 = 80_877_103;
const GSS: u32 = 80_877_104;

/// A packet before authentication.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet {
    /// The client would like TLS.
    SslRequest,
    /// The client would like GSSAPI encryption.
    GssRequest,
    /// Cancel what the holder of this key is doing.
    Cancel(CancelKey),
    /// Begin a session.
    Startup(Startup),
}

/// What a client needs to cancel its query: a process id and a secret, as `BackendKeyData` gave them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CancelKey {
    /// Finds the session.
    pub id: u32,
    /// Proves that the asker is its client.
    pub secret: u32,
}

/// A start-up message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Startup {
    /// The minor version asked for; above 0 it is negotiated down.
    pub minor: u16,
    /// All parameters but protocol options, in the order sent.
    parameters: Vec<(String, Vec<u8>)>,
    /// Names of `_pq_.` protocol options, none of which is known.
    pub unknown_options: Vec<String>,
}

impl Packet {
    /// Reads a packet's body (without its length).
    ///
    /// # Errors
    /// What to tell the client.
    pub fn parse(body: &[u8]) -> Result<Self, Said> {
        let mut fields = Fields(body);
        let short = || Said::malformed("the startup packet is too short");
        let code = fields.i32().ok_or_else(short)? as u32;
        match code {
            SSL => Ok(Packet::SslRequest),
            GSS => Ok(Packet::GssRequest),
            CANCEL => {
                let id = fields.i32().ok_or_else(short)? as u32;
                let secret = fields.i32().ok_or_else(short)? as u32;
                Ok(Packet::Cancel(CancelKey { id, secret }))
            }
            _ => {
                let (major, minor) = ((code >> 16) as u16, code as u16);
                if major != 3 {
                    return Err(Said::unsupported_version(major, minor));
                }
                Startup::parse(minor, fields).map(Packet::Startup)
            }
        }
    }
}

impl Startup {
    fn parse(minor: u16, mut fields: Fields<'_>) -> Result<Self, Said> {
        let broken = || Said::malformed("the startup packet's parameters are broken off");
        let mut startup = Self { minor, ..Self::default() };
        loop {
            let name = fields.cstr().ok_or_else(broken)?;
            if name.is_empty() {
                return Ok(startup);
            }
            let value = fields.cstr().ok_or_else(broken)?;
            let name = String::from_utf8_lossy(name).into_owned();
            if name.starts_with("_pq_.") {
                startup.unknown_options.push(name);
            } else {
                startup.parameters.push((name, value.to_vec()));
            }
        }
    }

    /// A parameter's value, if it is given and is UTF-8.
    pub fn text(&self, name: &str) -> Option<&str> {
        // As in Postgres, the last of several wins.
        let (_, value) = self.parameters.iter().rev().find(|(key, _)| key == name)?;
        std::str::from_utf8(value).ok()
    }

    /// Fixes the role, so that no second `user` in the packet can mean another one to Postgres.
    pub fn fix_user(&mut self, role: &str) {
        self.set("user", Some(role.to_owned()));
    }

    fn set(&mut self, name: &str, value: Option<String>) {
        self.parameters.retain(|(key, _)| key != name);
        self.parameters.extend(value.map(|value| (name.to_owned(), value.into_bytes())));
    }

    /// Whether the connection wants to replicate rather than to query.
    pub fn is_replication(&self) -> bool {
        self.text("replication").is_some_and(|value| !matches!(value, "false" | "off" | "no" | "0"))
    }

    /// The packet for a backend: version 3.0 and the parameters.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        untagged(&mut out, |body| {
            body.extend_from_slice(&(3_u32 << 16).to_be_bytes());
            for (name, value) in &self.parameters {
                cstr(body, name);
                cstr(body, value);
            }
            body.push(0);
        });
        out
    }

    /// Finds the endpoint asked for and strips what named it, so that the rest can go to Postgres.
    ///
    /// What is written out wins over what is implied: `options`, then the database's suffix, then the host name.
    ///
    /// # Errors
    /// If no endpoint is named, or `options` name one that cannot be.
    pub fn take_endpoint(&mut self, sni: Option<&str>, domain: &str) -> Result<EndpointName, Said> {
        let from_options = self.take_from_options()?;
        let from_database = self.take_from_database();
        from_options
            .or(from_database)
            .or_else(|| sni.and_then(|host| endpoint_of_host(host, domain)))
            .ok_or_else(|| Said::no_endpoint(domain))
    }

    fn take_from_options(&mut self) -> Result<Option<EndpointName>, Said> {
        let Some(options) = self.text("options") else { return Ok(None) };
        let mut endpoint = None;
        let mut kept = Vec::new();
        for word in option_words(options) {
            match word.strip_prefix("endpoint=") {
                Some(name) => {
                    endpoint = Some(name.parse().map_err(|why| Said::not_an_endpoint(name, why))?);
                }
                None => kept.push(word),
            }
        }
        if endpoint.is_some() {
            let rest = kept.join(" ");
            self.set("options", Some(rest).filter(|rest| !rest.is_empty()));
        }
        Ok(endpoint)
    }

    fn take_from_database(&mut self) -> Option<EndpointName> {
        let (name, suffix) = self.text("database")?.rsplit_once('@')?;
        // A database may be called `a@b`: only a suffix that is an endpoint's name is taken for one.
        let endpoint = suffix.parse().ok()?;
        let name = Some(name.to_owned()).filter(|name| !name.is_empty());
        self.set("database", name);
        Some(endpoint)
    }

    /// Names the database where the client did not.
    pub fn default_database(&mut self, database: &str) {
        if self.text("database").is_none_or(str::is_empty) {
            self.set("database", Some(database.to_owned()));
        }
    }
}

/// The endpoint whose host name this is.
pub fn endpoint_of_host(host: &str, domain: &str) -> Option<EndpointName> {
    let host = host.to_ascii_lowercase();
    host.strip_suffix(&domain.to_ascii_lowercase())?.strip_suffix('.')?.parse().ok()
}

/// Splits `options` as Postgres does (`pg_split_opts`, postinit.c), but leaves the backslashes where they are, so that
/// the words can be joined again.
fn option_words(options: &str) -> impl Iterator<Item = &str> {
    let mut rest = options;
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
        if rest.is_empty() {
            return None;
        }
        let mut escaped = false;
        let end = rest
            .find(|c: char| {
                let ends = !escaped && c.is_ascii_whitespace();
                escaped = !escaped && c == '\\';
                ends
            })
            .unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail;
        Some(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn startup(parameters: &[(&str, &str)]) -> Startup {
        let mut body = (3_u32 << 16).to_be_bytes().to_vec();
        for (name, value) in parameters {
            cstr(&mut body, name);
            cstr(&mut body, value);
        }
        body.push(0);
        match Packet::parse(&body) {
            Ok(Packet::Startup(startup)) => startup,
            other => panic!("{other:?}"),
        }
    }

    fn check(parameters: &[(&str, &str)], sni: Option<&str>, expect: Result<(&str, Option<&str>, Option<&str>), &str>) {
        let mut startup = startup(parameters);
        match (startup.take_endpoint(sni, "localhost"), expect) {
            (Ok(name), Ok((endpoint, database, options))) => {
                assert_eq!(name.to_string(), endpoint);
                assert_eq!(startup.text("database"), database);
                assert_eq!(startup.text("options"), options);
            }
            (Err(said), Err(code)) => assert_eq!(said.sqlstate(), code, "for {parameters:?}"),
            (got, expect) => panic!("{parameters:?} {sni:?}: {got:?}, not {expect:?}"),
        }
    }

    #[test]
    fn three_ways_to_name_an_endpoint() {
        check(&[("options", "endpoint=prod--shop")], None, Ok(("prod--shop", None, None)));
        check(
            &[("options", "-c a=b\\ c endpoint=prod--shop  -c d=e"), ("database", "app")],
            Some("dev--shop.localhost"),
            Ok(("prod--shop", Some("app"), Some("-c a=b\\ c -c d=e"))),
        );
        check(&[("database", "app@dev--shop")], None, Ok(("dev--shop", Some("app"), None)));
        check(&[("database", "@dev--shop")], None, Ok(("dev--shop", None, None)));
        check(&[("database", "a@b@dev--shop")], None, Ok(("dev--shop", Some("a@b"), None)));
        check(&[("database", "a@b")], Some("Dev--Shop.LOCALHOST"), Ok(("dev--shop", Some("a@b"), None)));
        check(&[("options", "-c x=1")], Some("dev--shop.localhost"), Ok(("dev--shop", None, Some("-c x=1"))));
    }

    #[test]
    fn what_names_none_is_refused() {
        check(&[("user", "app")], None, Err("28000"));
        check(&[], Some("localhost"), Err("28000"));
        check(&[], Some("dev--shop.example.org"), Err("28000"));
        check(&[], Some("dev--shoplocalhost"), Err("28000"));
        check(&[("options", "endpoint=shop")], None, Err("3D000"));
        check(&[("options", "endpoint=")], None, Err("3D000"));
    }

    #[test]
    fn packets_are_told_apart() {
        let cancel = [CANCEL.to_be_bytes(), 7_u32.to_be_bytes(), 9_u32.to_be_bytes()].concat();
        assert_eq!(Packet::parse(&cancel), Ok(Packet::Cancel(CancelKey { id: 7, secret: 9 })));
        assert_eq!(Packet::parse(&SSL.to_be_bytes()), Ok(Packet::SslRequest));
        assert_eq!(Packet::parse(&GSS.to_be_bytes()), Ok(Packet::GssRequest));
        for (body, code) in [
            (&b""[..], "08P01"),
            (&[0, 3, 0], "08P01"),
            (&[0, 3, 0, 0], "08P01"),
            (b"\0\x03\0\0user\0app", "08P01"),
            (b"\0\x03\0\0user\0", "08P01"),
            (&[0, 2, 0, 0], "0A000"),
            (&cancel[..8], "08P01"),
        ] {
            assert_eq!(Packet::parse(body).unwrap_err().sqlstate(), code, "for {body:?}");
        }
    }

    #[test]
    fn protocol_options_are_set_aside_and_the_rest_goes_on() {
        let startup = startup(&[("user", "app"), ("_pq_.x", "1"), ("application_name", "t")]);
        assert_eq!(startup.unknown_options, ["_pq_.x"]);
        assert_eq!(startup.encode()[4..], b"\0\x03\0\0user\0app\0application_name\0t\0\0"[..]);
    }

    #[test]
    fn postgres_is_told_of_one_user_only() {
        let mut startup = startup(&[("user", "postgres"), ("user", "app")]);
        assert_eq!(startup.text("user"), Some("app"));
        startup.fix_user("app");
        assert_eq!(startup.encode()[8..], b"user\0app\0\0"[..]);
    }

    #[test]
    fn replication_is_seen() {
        assert!(startup(&[("replication", "database")]).is_replication());
        assert!(!startup(&[("replication", "off")]).is_replication());
        assert!(!startup(&[]).is_replication());
    }
}
