//! From an accepted connection to an authenticated client: encryption, the start-up packet, the password. Nothing here
//! wakes a compute.
//!
//! **Cancellation**: dropping a login closes the connection; nothing else is left.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use ebb_types::{EndpointName, Point, SqlState};
use rustls::ServerConfig;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use crate::door;
use crate::endpoints::Endpoint;
use crate::errors::Said;
use crate::proxy::Shared;
use crate::scram::{self, Exchange, Failure, Verifier};
use crate::startup::{PACKET_MAX, Packet, Place, Startup, behind_pooler};
use crate::strangers::Stranger;
use crate::stream::ClientStream;
use crate::tls::ALPN;
use crate::wire::{Fields, cstr, message, read_message};

/// LIMIT: SCRAM messages are some hundred bytes (Postgres 15: `PG_MAX_SASL_MESSAGE_LENGTH`, 1024).
const SASL_MESSAGE_MAX: usize = 1024;
/// What a TLS record of a handshake begins with (RFC 8446, 5.1). No start-up packet does: it would have 352 MB.
const TLS_HANDSHAKE: u8 = 0x16;

/// A client that has proved who it is.
#[derive(Debug)]
pub struct Login {
    /// Its connection; `AuthenticationOk` has been sent.
    pub client: ClientStream,
    /// What it asked for, without what named the endpoint.
    pub startup: Startup,
    /// Where it wants to go.
    pub endpoint: Endpoint,
    /// As whom.
    pub role: String,
    /// From where.
    pub peer: SocketAddr,
    /// In transaction mode.
    pub pooled: bool,
}

/// How a connection ends before there is a session.
#[derive(Debug)]
pub enum Turned {
    /// Told why.
    Away(ClientStream, Said),
    /// Told why, with this SQLSTATE, and cut, at the door.
    Told(&'static str),
    /// Nothing is to be said: it hung up, or only wanted to cancel.
    Off,
}

impl From<io::Error> for Turned {
    fn from(_: io::Error) -> Self {
        Turned::Off
    }
}

/// Takes a connection through to a proven client.
///
/// # Errors
/// How the connection ends instead.
pub async fn login(
    shared: &Shared,
    mut socket: TcpStream,
    from: SocketAddr,
    stranger: &mut Stranger,
) -> Result<Login, Turned> {
    let peer = door::introduce(shared, &mut socket, from, stranger).await?;
    let served = shared.certificates.served();
    let (mut client, mut startup) = greet(shared, socket, peer.address, &served.config).await?;
    let (sni, binding, encrypted) = match &client {
        ClientStream::Plain(_) => (None, None, false),
        ClientStream::Tls(stream) => {
            let sni = stream.get_ref().1.server_name();
            (sni.map(str::to_owned), served.channel_binding(sni), true)
        }
    };
    let result = async {
        if !encrypted && !peer.is_local {
            door::refused("tls_wanted");
            return Err(Said::tls_wanted().into());
        }
        if let Some(negotiation) = startup.negotiation() {
            client.send(&negotiation).await?;
        }
        let role = startup.text("user").filter(|role| !role.is_empty()).ok_or_else(Said::no_user)?.to_owned();
        let Place { endpoint, point, pooled } = startup.take_place(sni.as_deref(), &shared.config.domain)?;
        let (mut endpoint, by_name) = find(shared, &endpoint).await?;
        let pooled = pooled.unwrap_or(by_name);
        startup.default_database(&endpoint.default_database);
        startup.fix_user(&role);
        door::admit(shared, &client, peer, &endpoint, &role).await?;
        authenticate(shared, &mut client, peer.address, &endpoint, &role, binding.as_deref()).await?;
        if point != Point::Head {
            // Whoever may not come in now may not come into the past either.
            endpoint.branch = shared.endpoints.visit(endpoint.branch, &point).await.map_err(Said::from)?;
        }
        Ok((endpoint, role, pooled))
    };
    match result.await {
        Ok((endpoint, role, pooled)) => Ok(Login { client, startup, endpoint, role, peer: peer.address, pooled }),
        Err(Refusal::Say(said)) => Err(Turned::Away(client, said)),
        Err(Refusal::HungUp) => Err(Turned::Off),
    }
}

/// Finds an endpoint, by its own name or else by its pooler's; answers whether it was the latter.
async fn find(shared: &Shared, name: &EndpointName) -> Result<(Endpoint, bool), Said> {
    match (shared.endpoints.find(name).await, behind_pooler(name)) {
        (Err(error), Some(own)) if error.sqlstate == SqlState::INVALID_CATALOG_NAME => {
            shared.endpoints.find(&own).await.map(|endpoint| (endpoint, true)).map_err(Said::from)
        }
        (found, _) => found.map(|endpoint| (endpoint, false)).map_err(Said::from),
    }
}

enum Refusal {
    Say(Said),
    HungUp,
}

impl From<Said> for Refusal {
    fn from(said: Said) -> Self {
        Refusal::Say(said)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData => Refusal::Say(Said::malformed("its length is impossible")),
            _ => Refusal::HungUp,
        }
    }
}

/// Encryption requests, cancel requests, up to the start-up packet.
///
/// Each request is read to its last byte and no further, so that nothing sent in the clear behind it is ever taken for
/// something that came encrypted (CVE-2021-23214): it meets the TLS handshake, which it breaks.
async fn greet(
    shared: &Shared,
    socket: TcpStream,
    peer: SocketAddr,
    tls: &Arc<ServerConfig>,
) -> Result<(ClientStream, Startup), Turned> {
    let direct = begins_with_tls(&socket).await?;
    let mut client = ClientStream::Plain(socket);
    if direct {
        client = encrypt(shared, tls, client, Alpn::Required).await?;
    }
    let mut may_encrypt = !direct;
    let mut may_gss = !direct;
    loop {
        let packet = match read_packet(&mut client).await? {
            Some(body) => Packet::parse(&body),
            None => Err(Said::malformed("the startup packet has an impossible length")),
        };
        match packet {
            Ok(Packet::SslRequest) if may_encrypt => {
                client.send(b"S").await?;
                client = encrypt(shared, tls, client, Alpn::Optional).await?;
                (may_encrypt, may_gss) = (false, false);
            }
            Ok(Packet::GssRequest) if may_gss => {
                client.send(b"N").await?;
                may_gss = false;
            }
            Ok(Packet::SslRequest | Packet::GssRequest) => {
                return Err(Turned::Away(client, Said::malformed("encryption is asked for twice")));
            }
            Ok(Packet::Cancel(key)) => {
                shared.keys.cancel(key, peer.ip(), &shared.tasks).await;
                return Err(Turned::Off);
            }
            Ok(Packet::Startup(startup)) => return Ok((client, startup)),
            Err(said) => return Err(Turned::Away(client, said)),
        }
    }
}

/// Whether the client begins with TLS at once, without asking (PostgreSQL 18, 54.2.10). Takes no byte.
async fn begins_with_tls(socket: &TcpStream) -> Result<bool, Turned> {
    let mut first = [0];
    match socket.peek(&mut first).await? {
        0 => Err(Turned::Off),
        _ => Ok(first[0] == TLS_HANDSHAKE),
    }
}

/// Whether a client has to say in the handshake that it is Postgres' protocol it wants to speak.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alpn {
    /// It has said so before.
    Optional,
    /// Else a client of another protocol could be led here, its requests taken for ours (ALPACA); as in PostgreSQL 17.
    Required,
}

async fn encrypt(
    shared: &Shared,
    tls: &Arc<ServerConfig>,
    client: ClientStream,
    alpn: Alpn,
) -> Result<ClientStream, Turned> {
    let ClientStream::Plain(socket) = client else { return Err(Turned::Off) };
    let handshake = shared.home.spawn(TlsAcceptor::from(tls.clone()).accept(socket));
    let stream = AbortOnDropHandle::new(handshake).await.map_err(io::Error::other)??;
    if alpn == Alpn::Required && stream.get_ref().1.alpn_protocol() != Some(ALPN) {
        tracing::debug!("direct TLS without the protocol's name is refused");
        return Err(Turned::Off);
    }
    Ok(ClientStream::Tls(Box::new(stream)))
}

/// The body of one packet; `None` if its length is impossible.
async fn read_packet(client: &mut ClientStream) -> io::Result<Option<Vec<u8>>> {
    let length = client.read_u32().await? as usize;
    let Some(length) = length.checked_sub(4).filter(|&length| (4..=PACKET_MAX).contains(&length)) else {
        return Ok(None);
    };
    let mut body = vec![0; length];
    client.read_exact(&mut body).await?;
    Ok(Some(body))
}

/// SCRAM, and nothing else. A role that does not exist goes the same way to the same end.
async fn authenticate(
    shared: &Shared,
    client: &mut ClientStream,
    peer: SocketAddr,
    endpoint: &Endpoint,
    role: &str,
    channel: Option<&[u8]>,
) -> Result<(), Refusal> {
    let stored = shared.endpoints.verifier(endpoint.branch, role).await.map_err(Said::from)?;
    let verifier = stored.as_deref().and_then(Verifier::parse).unwrap_or_else(|| {
        if stored.is_some() {
            // The client is told no more than anyone: the role exists.
            door::refused("no_scram");
            tracing::debug!(role, endpoint = %endpoint.name, "the role's password is not stored as SCRAM-SHA-256");
        }
        // Branches of a project have most roles in common, salts included: so does what only looks like one.
        let who = format!("{}\0{role}", endpoint.name.branch_ref().project);
        let secret = shared.endpoints.mock_secret();
        Verifier::mock(secret.as_ref().map_or(shared.authority.mock_secret(), |secret| secret), &who)
    });

    match exchange(client, verifier, channel).await? {
        Ok(last) => {
            let mut out = Vec::new();
            authentication(&mut out, 12, last.as_bytes());
            authentication(&mut out, 0, b"");
            client.send(&out).await?;
            shared.limits.succeeded(peer.ip(), endpoint.branch);
            metrics::counter!("ebb_proxy_logins_total", "result" => "ok").increment(1);
            Ok(())
        }
        Err(Failure::WrongPassword) => {
            shared.limits.failed(peer.ip(), endpoint.branch);
            metrics::counter!("ebb_proxy_logins_total", "result" => "refused").increment(1);
            Err(Said::wrong_password(role).into())
        }
        Err(Failure::Malformed(what)) => Err(Said::malformed(what).into()),
    }
}

async fn exchange(
    client: &mut ClientStream,
    verifier: Verifier,
    channel: Option<&[u8]>,
) -> Result<Result<String, Failure>, Refusal> {
    let mut out = Vec::new();
    let mut mechanisms = Vec::new();
    if channel.is_some() {
        cstr(&mut mechanisms, scram::MECHANISM_PLUS);
    }
    cstr(&mut mechanisms, scram::MECHANISM);
    mechanisms.push(0);
    authentication(&mut out, 10, &mechanisms);
    client.send(&out).await?;

    let body = read_response(client).await?;
    let mut fields = Fields(&body);
    let chosen = fields.cstr().unwrap_or_default();
    let plus = chosen == scram::MECHANISM_PLUS.as_bytes();
    if !plus && chosen != scram::MECHANISM.as_bytes() {
        return Ok(Err(Failure::Malformed("the SASL mechanism is not one of those offered")));
    }
    let first = fields.i32().and_then(|length| fields.bytes(usize::try_from(length).ok()?));
    let first = first.ok_or_else(|| Said::malformed("the SASL response is broken off"))?;
    let exchange = match Exchange::begin(verifier, first, plus, channel, &scram::server_nonce()) {
        Ok(exchange) => exchange,
        Err(failure) => return Ok(Err(failure)),
    };
    out.clear();
    authentication(&mut out, 11, exchange.challenge().as_bytes());
    client.send(&out).await?;
    let last = read_response(client).await?;
    Ok(exchange.finish(&last))
}

async fn read_response(client: &mut ClientStream) -> Result<Vec<u8>, Refusal> {
    let mut body = Vec::new();
    match read_message(client, &mut body, SASL_MESSAGE_MAX).await? {
        b'p' => Ok(body),
        _ => Err(Said::malformed("a password message was expected").into()),
    }
}

fn authentication(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    message(out, b'R', |body| {
        body.extend_from_slice(&kind.to_be_bytes());
        body.extend_from_slice(data);
    });
}
