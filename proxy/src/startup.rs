//! The first packet of a connection, and which endpoint it asks for: bytes in, values out.

use std::fmt;
use std::str::FromStr;

use ebb_types::{EndpointName, Point};

use crate::errors::Said;
use crate::wire::{Fields, cstr, message, untagged};

/// LIMIT: what Postgres 15 accepts (`MAX_STARTUP_PACKET_LENGTH`, pqcomm.h).
pub const PACKET_MAX: usize = 10_000;

const CANCEL: u32 = 80_877_102;
const SSL: u32 = 80_877_103;
const GSS: u32 = 80_877_104;
/// What the name of an endpoint ends with where transaction mode is meant.
const POOLER_SUFFIX: &str = "-pooler";
const APPLICATION_NAME: &str = "application_name";

/// LIMIT: lengths of a cancel key's secret (PostgreSQL 18, 54.7, `BackendKeyData`).
const CANCEL_SECRET_LEN: std::ops::RangeInclusive<usize> = 4..=256;

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
#[derive(Clone, PartialEq, Eq)]
pub struct CancelKey {
    /// Finds the session.
    pub id: u32,
    /// Proves that the asker is its client. 4 bytes before version 3.2 of the protocol.
    pub secret: Box<[u8]>,
}

impl fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl CancelKey {
    /// What `BackendKeyData` and `CancelRequest` have in common; `None` if the secret is too short or too long.
    pub fn parse(mut fields: Fields<'_>) -> Option<Self> {
        let id = fields.i32()? as u32;
        CANCEL_SECRET_LEN.contains(&fields.0.len()).then(|| Self { id, secret: fields.0.into() })
    }

    /// Appends it as both messages have it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(&self.secret);
    }

    /// The packet that asks for cancelling.
    pub fn request(&self) -> Vec<u8> {
        let mut out = Vec::new();
        untagged(&mut out, |body| {
            body.extend_from_slice(&CANCEL.to_be_bytes());
            self.encode(body);
        });
        out
    }
}

/// The versions of the protocol that are spoken. They differ in the length of cancel keys (PostgreSQL 18, 54.2.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Since PostgreSQL 7.4.
    V3_0,
    /// Since PostgreSQL 18.
    V3_2,
}

impl Version {
    fn code(self) -> u32 {
        match self {
            Version::V3_0 => 3 << 16,
            Version::V3_2 => 3 << 16 | 2,
        }
    }
}

/// A start-up message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Startup {
    /// The minor version asked for.
    minor: u16,
    /// All parameters but protocol options, in the order sent.
    parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// Names of `_pq_.` protocol options, none of which is known.
    unknown_options: Vec<Vec<u8>>,
}

impl Packet {
    /// Reads a packet's body (without its length).
    ///
    /// # Errors
    /// What to tell the client.
    pub fn parse(body: &[u8]) -> Result<Self, Said> {
        let mut fields = Fields(body);
        let code = fields.i32().ok_or_else(|| Said::malformed("the startup packet is too short"))? as u32;
        match code {
            SSL | GSS if !fields.0.is_empty() => Err(Said::malformed("the encryption request is too long")),
            SSL => Ok(Packet::SslRequest),
            GSS => Ok(Packet::GssRequest),
            CANCEL => {
                let key = CancelKey::parse(fields);
                key.map(Packet::Cancel).ok_or_else(|| Said::malformed("the cancel request's length is wrong"))
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
                let whole = fields.0.is_empty();
                return whole.then_some(startup).ok_or_else(|| Said::malformed("the startup packet has no end"));
            }
            let value = fields.cstr().ok_or_else(broken)?;
            if name.starts_with(b"_pq_.") {
                startup.unknown_options.push(name.to_vec());
            } else {
                startup.parameters.push((name.to_vec(), value.to_vec()));
            }
        }
    }

    /// The version spoken with this client: the newest that both know. 3.1 never was; who asks for it gets 3.0.
    pub fn version(&self) -> Version {
        if self.minor >= 2 { Version::V3_2 } else { Version::V3_0 }
    }

    /// `NegotiateProtocolVersion`, where something was asked for that is not known (PostgreSQL 18, 54.2.1).
    pub fn negotiation(&self) -> Option<Vec<u8>> {
        if self.minor <= 2 && self.unknown_options.is_empty() {
            return None;
        }
        let mut out = Vec::new();
        message(&mut out, b'v', |body| {
            body.extend_from_slice(&self.version().code().to_be_bytes());
            body.extend_from_slice(&(self.unknown_options.len() as u32).to_be_bytes());
            for option in &self.unknown_options {
                cstr(body, option);
            }
        });
        Some(out)
    }

    /// A parameter's value, if it is given and is UTF-8.
    pub fn text(&self, name: &str) -> Option<&str> {
        // As in Postgres, the last of several wins.
        let (_, value) = self.parameters.iter().rev().find(|(key, _)| key == name.as_bytes())?;
        std::str::from_utf8(value).ok()
    }

    /// Fixes the role, so that no second `user` in the packet can mean another one to Postgres.
    pub fn fix_user(&mut self, role: &str) {
        self.set("user", Some(role.to_owned()));
    }

    /// Sets a parameter, or removes it.
    pub fn set(&mut self, name: &str, value: Option<String>) {
        self.parameters.retain(|(key, _)| key != name.as_bytes());
        self.parameters.extend(value.map(|value| (name.as_bytes().to_vec(), value.into_bytes())));
    }

    /// Makes `application_name` what Postgres would make of it, and answers it: plain ASCII, not too long.
    pub fn fix_application_name(&mut self) -> Vec<u8> {
        let name = self.parameters.iter().rev().find(|(key, _)| key == APPLICATION_NAME.as_bytes());
        let plain = |byte: &u8| if matches!(byte, b' '..=b'~') { *byte } else { b'?' };
        let fixed: Vec<u8> = name.map(|(_, value)| value).into_iter().flatten().take(63).map(plain).collect();
        self.parameters.retain(|(key, _)| key != APPLICATION_NAME.as_bytes());
        if !fixed.is_empty() {
            self.parameters.push((APPLICATION_NAME.as_bytes().to_vec(), fixed.clone()));
        }
        fixed
    }

    /// The packet for a backend, but for `application_name`: what sessions that can share one have in common.
    pub fn without_application_name(&self) -> Vec<u8> {
        let mut other = self.clone();
        other.set(APPLICATION_NAME, None);
        if other.text("options") == Some("") {
            other.set("options", None);
        }
        other.encode()
    }

    /// Whether the connection wants to replicate rather than to query.
    pub fn is_replication(&self) -> bool {
        self.text("replication").is_some_and(|value| !matches!(value, "false" | "off" | "no" | "0"))
    }

    /// The packet for a backend: version 3.0, whatever the client speaks, and the parameters. All that 3.2 would add are
    /// longer cancel keys, which the client gets of the proxy, while those of backends stay on private sockets.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        untagged(&mut out, |body| {
            body.extend_from_slice(&Version::V3_0.code().to_be_bytes());
            for (name, value) in &self.parameters {
                cstr(body, name);
                cstr(body, value);
            }
            body.push(0);
        });
        out
    }

    /// Finds the place asked for and strips what named it, so that the rest can go to Postgres.
    ///
    /// What is written out wins over what is implied: `options`, then the database's suffix, then the host name. What
    /// stands before an endpoint's name in a database is the database's own name, whatever it looks like.
    ///
    /// # Errors
    /// If no endpoint is named, or `options` name an endpoint or a point that cannot be.
    pub fn take_place(&mut self, sni: Option<&str>, domain: &str) -> Result<Place, Said> {
        let Named { endpoint: from_options, point: point_of_options, pooled } = self.take_from_options()?;
        let implied = || sni.and_then(|host| endpoint_of_host(host, domain));
        let named = from_options.clone().or_else(implied);
        let (from_database, point_of_database) = self.take_from_database(named.is_some());
        let endpoint = from_options.or(from_database).or(named).ok_or_else(|| Said::no_endpoint(domain))?;
        let point = point_of_options.or(point_of_database).unwrap_or_default();
        Ok(Place { endpoint, point, pooled })
    }

    fn take_from_options(&mut self) -> Result<Named, Said> {
        let Some(options) = self.text("options") else { return Ok(Named::default()) };
        let Named { mut endpoint, mut point, mut pooled } = Named::default();
        let mut kept = Vec::new();
        for word in option_words(options) {
            if let Some(name) = word.strip_prefix("endpoint=") {
                let name = unescaped(name);
                endpoint = Some(name.parse().map_err(|why| Said::not_an_endpoint(&name, why))?);
            } else if let Some(text) = word.strip_prefix("point=") {
                let text = unescaped(text);
                point = Some(text.parse().map_err(|_| Said::not_a_point(&text))?);
            } else if let Some(mode) = word.strip_prefix("pool=") {
                pooled = Some(match mode {
                    "transaction" => true,
                    "session" => false,
                    _ => return Err(Said::not_a_pool_mode(mode)),
                });
            } else {
                kept.push(word);
            }
        }
        if endpoint.is_some() || point.is_some() || pooled.is_some() {
            let rest = kept.join(" ");
            self.set("options", Some(rest).filter(|rest| !rest.is_empty()));
        }
        Ok(Named { endpoint, point, pooled })
    }

    /// `name@endpoint`, `name@endpoint@point`; and `name@point`, where the endpoint is named elsewhere.
    ///
    /// A database may be called `a@b`: only a suffix that is an endpoint's name or a point is taken for one.
    fn take_from_database(&mut self, named: bool) -> (Option<EndpointName>, Option<Point>) {
        let Some((name, suffix)) = self.text("database").and_then(|database| split_off::<EndpointOrPoint>(database))
        else {
            return (None, None);
        };
        let (name, endpoint, point) = match suffix {
            EndpointOrPoint::Endpoint(endpoint) => (name, Some(endpoint), None),
            EndpointOrPoint::Point(point) => match split_off::<EndpointName>(name) {
                Some((name, endpoint)) => (name, Some(endpoint), Some(point)),
                None if named => (name, None, Some(point)),
                None => return (None, None),
            },
        };
        let name = Some(name.to_owned()).filter(|name| !name.is_empty());
        self.set("database", name);
        (endpoint, point)
    }

    /// Names the database where the client did not.
    pub fn default_database(&mut self, database: &str) {
        if self.text("database").is_none_or(str::is_empty) {
            self.set("database", Some(database.to_owned()));
        }
    }
}

/// Where a client wants to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// To which branch.
    pub endpoint: EndpointName,
    /// To which moment of it; the head is the branch itself.
    pub point: Point,
    /// Whether in transaction mode, where that is written out.
    pub pooled: Option<bool>,
}

/// The endpoint that a pooler's name stands for: `prod--shop` for `prod--shop-pooler`.
///
/// The suffix belongs to the whole name, so it stands behind the project; no project may be made that is called so.
pub fn behind_pooler(name: &EndpointName) -> Option<EndpointName> {
    name.to_string().strip_suffix(POOLER_SUFFIX)?.parse().ok()
}

/// What `options` name.
#[derive(Default)]
struct Named {
    endpoint: Option<EndpointName>,
    point: Option<Point>,
    pooled: Option<bool>,
}

/// What may stand behind the last `@` of a database's name. A checkpoint that is called like an endpoint (`a--b`) is taken
/// for one here; `options` name it.
enum EndpointOrPoint {
    Endpoint(EndpointName),
    Point(Point),
}

impl FromStr for EndpointOrPoint {
    type Err = <Point as FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(endpoint) => Ok(Self::Endpoint(endpoint)),
            Err(_) => text.parse().map(Self::Point),
        }
    }
}

/// What stands before the last `@`, and what behind it if it can be that.
fn split_off<T: FromStr>(text: &str) -> Option<(&str, T)> {
    let (name, suffix) = text.rsplit_once('@')?;
    Some((name, suffix.parse().ok()?))
}

/// The endpoint whose host name this is.
pub fn endpoint_of_host(host: &str, domain: &str) -> Option<EndpointName> {
    let host = host.to_ascii_lowercase();
    host.strip_suffix(&domain.to_ascii_lowercase())?.strip_suffix('.')?.parse().ok()
}

/// Splits `options` as Postgres does (`pg_split_opts`, postinit.c), but leaves the backslashes where they are, so that
/// the words can be joined again.
pub fn option_words(options: &str) -> impl Iterator<Item = &str> {
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

/// A word of `options` as Postgres reads it: a backslash stands for what follows it.
pub fn unescaped(word: &str) -> String {
    let mut chars = word.chars();
    std::iter::from_fn(|| match chars.next() {
        Some('\\') => chars.next(),
        other => other,
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn startup(parameters: &[(&str, &str)]) -> Startup {
        startup_of(0, parameters)
    }

    fn startup_of(minor: u32, parameters: &[(&str, &str)]) -> Startup {
        let mut body = (3 << 16 | minor).to_be_bytes().to_vec();
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

    /// What is expected: the place, as `endpoint@point`, and what database and options are left for Postgres.
    fn check(parameters: &[(&str, &str)], sni: Option<&str>, expect: Result<(&str, Option<&str>, Option<&str>), &str>) {
        let mut startup = startup(parameters);
        match (startup.take_place(sni, "localhost"), expect) {
            (Ok(Place { endpoint, point, .. }), Ok((place, database, options))) => {
                let told = if point == Point::Head { endpoint.to_string() } else { format!("{endpoint}@{point}") };
                assert_eq!(told, place, "for {parameters:?}");
                assert_eq!(startup.text("database"), database, "for {parameters:?}");
                assert_eq!(startup.text("options"), options, "for {parameters:?}");
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
        check(&[("database", "a@-b")], Some("Dev--Shop.LOCALHOST"), Ok(("dev--shop", Some("a@-b"), None)));
        check(&[("options", "-c x=1")], Some("dev--shop.localhost"), Ok(("dev--shop", None, Some("-c x=1"))));
    }

    #[test]
    fn a_point_is_named_in_options_or_behind_the_database() {
        let time = "2026-11-21T06:00:00Z";
        check(&[("options", "endpoint=prod--shop point=v1")], None, Ok(("prod--shop@v1", None, None)));
        check(
            &[("options", "-c a=b point=0/16B3748 -c d=e"), ("database", "app")],
            Some("dev--shop.localhost"),
            Ok(("dev--shop@0/16B3748", Some("app"), Some("-c a=b -c d=e"))),
        );
        check(
            &[("options", "endpoint=prod--shop point=2026-11-21T06:00:00\\Z")],
            None,
            Ok(("prod--shop@2026-11-21T06:00:00Z", None, None)),
        );
        check(
            &[("options", "point=2026-11-21\\ 06:00:00Z"), ("database", "app@dev--shop")],
            None,
            Ok(("dev--shop@2026-11-21T06:00:00Z", Some("app"), None)),
        );
        check(&[("database", "app@dev--shop@v1")], None, Ok(("dev--shop@v1", Some("app"), None)));
        check(&[("database", &format!("@dev--shop@{time}"))], None, Ok((&format!("dev--shop@{time}"), None, None)));
        check(&[("database", "a@b@dev--shop@v1")], None, Ok(("dev--shop@v1", Some("a@b"), None)));
        check(&[("database", "app@v1")], Some("dev--shop.localhost"), Ok(("dev--shop@v1", Some("app"), None)));
        check(
            &[("database", "app@0/1"), ("options", "endpoint=prod--shop")],
            None,
            Ok(("prod--shop@0/1", Some("app"), None)),
        );
        // Options win over the database, and the head is no visit.
        check(
            &[("database", "app@dev--shop@v1"), ("options", "point=v2")],
            None,
            Ok(("dev--shop@v2", Some("app"), None)),
        );
        check(&[("options", "endpoint=prod--shop point=head")], None, Ok(("prod--shop", None, None)));
    }

    #[test]
    fn what_names_none_is_refused() {
        check(&[("user", "app")], None, Err("28000"));
        check(&[], Some("localhost"), Err("28000"));
        check(&[], Some("dev--shop.example.org"), Err("28000"));
        check(&[], Some("dev--shoplocalhost"), Err("28000"));
        check(&[("options", "endpoint=shop")], None, Err("3D000"));
        check(&[("options", "endpoint=")], None, Err("3D000"));
        check(&[("database", "app@v1")], None, Err("28000"));
        for point in ["", "-v", "0/XYZ", "a b", "2026-11-21T06:00:00"] {
            let options = format!("endpoint=prod--shop point={}", point.replace(' ', "\\ "));
            check(&[("options", &options)], None, Err("22023"));
        }
    }

    #[test]
    fn packets_are_told_apart() {
        let cancel = |secret: &[u8]| [&CANCEL.to_be_bytes(), &7_u32.to_be_bytes(), secret].concat();
        for length in [4, 32, 256] {
            let key = CancelKey { id: 7, secret: vec![9; length].into() };
            assert_eq!(key.request()[4..], cancel(&key.secret));
            assert_eq!(Packet::parse(&key.request()[4..]), Ok(Packet::Cancel(key)));
        }
        assert_eq!(Packet::parse(&SSL.to_be_bytes()), Ok(Packet::SslRequest));
        assert_eq!(Packet::parse(&GSS.to_be_bytes()), Ok(Packet::GssRequest));
        for (body, code) in [
            (&b""[..], "08P01"),
            (&[0, 3, 0], "08P01"),
            (&[0, 3, 0, 0], "08P01"),
            (b"\0\x03\0\0user\0app", "08P01"),
            (b"\0\x03\0\0user\0", "08P01"),
            (b"\0\x03\0\0user\0app\0\0\0", "08P01"),
            (b"\0\x03\0\0\0select", "08P01"),
            (&[0, 2, 0, 0], "0A000"),
            (&[0, 4, 0, 0], "0A000"),
            (&[&SSL.to_be_bytes()[..], b"x"].concat(), "08P01"),
            (&[&GSS.to_be_bytes()[..], b"x"].concat(), "08P01"),
            (&cancel(b""), "08P01"),
            (&cancel(&[0; 3]), "08P01"),
            (&cancel(&[0; 257]), "08P01"),
        ] {
            assert_eq!(Packet::parse(body).unwrap_err().sqlstate(), code, "for {body:?}");
        }
    }

    #[test]
    fn a_version_is_agreed_on_and_only_what_is_not_known_needs_words() {
        let told = |minor, parameters: &[(&str, &str)]| {
            let startup = startup_of(minor, parameters);
            (startup.version(), startup.negotiation())
        };
        assert_eq!(told(0, &[]), (Version::V3_0, None));
        assert_eq!(told(1, &[]), (Version::V3_0, None));
        assert_eq!(told(2, &[]), (Version::V3_2, None));
        let newest = b"v\0\0\0\x0c\0\x03\0\x02\0\0\0\0".to_vec();
        assert_eq!(told(3, &[("user", "app")]), (Version::V3_2, Some(newest.clone())));
        assert_eq!(told(9999, &[]), (Version::V3_2, Some(newest)));
        let options = [("_pq_.a", "1"), ("user", "app"), ("_pq_.", "")];
        let oldest = b"v\0\0\0\x19\0\x03\0\0\0\0\0\x02_pq_.a\0_pq_.\0".to_vec();
        assert_eq!(told(0, &options), (Version::V3_0, Some(oldest)));
    }

    #[test]
    fn secrets_of_cancel_keys_are_not_shown() {
        let key = CancelKey { id: 7, secret: vec![211; 32].into() };
        assert_eq!(format!("{key:?}"), "CancelKey { id: 7, .. }");
    }

    #[test]
    fn protocol_options_are_set_aside_and_the_rest_goes_on() {
        let startup = startup(&[("user", "app"), ("_pq_.x", "1"), ("application_name", "t")]);
        assert_eq!(startup.unknown_options, [b"_pq_.x"]);
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
