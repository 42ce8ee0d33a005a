//! From an accepted connection to an authenticated client: encryption, the start-up packet, the password. Nothing here
//! wakes a compute.
//!
//! **Cancellation**: dropping a login closes the connection; nothing else is left.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use ebb_types::Point;
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
use crate::startup::{PACKET_MAX, Packet, Place, Startup};
use crate::strangers::Stranger;
use crate::stream::ClientStream;
use crate::wire::{Fields, cstr, message, read_message};

/// LIMIT: SCRAM messages are some hundred bytes (Postgres 15: `PG_MAX_SASL_MESSAGE_LENGTH`, 1024).
const SASL_MESSAGE_MAX: usize = 1024;
/// Version 3.0, which is what newer minor versions are negotiated down to.
const PROTOCOL_3_0: u32 = 3 << 16;

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
    let (mut client, mut startup) = greet(shared, socket, &served.config).await?;
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
        negotiate(&mut client, &startup).await?;
        let role = startup.text("user").filter(|role| !role.is_empty()).ok_or_else(Said::no_user)?.to_owned();
        let Place { endpoint, point } = startup.take_place(sni.as_deref(), &shared.config.domain)?;
        let mut endpoint = shared.endpoints.find(&endpoint).await.map_err(Said::from)?;
        startup.default_database(&endpoint.default_database);
        startup.fix_user(&role);
        door::admit(shared, &client, peer, &endpoint, &role).await?;
        authenticate(shared, &mut client, peer.address, &endpoint, &role, binding.as_deref()).await?;
        if point != Point::Head {
            // Whoever may not come in now may not come into the past either.
            endpoint.branch = shared.endpoints.visit(endpoint.branch, &point).await.map_err(Said::from)?;
        }
        Ok((endpoint, role))
    };
    match result.await {
        Ok((endpoint, role)) => Ok(Login { client, startup, endpoint, role, peer: peer.address }),
        Err(Refusal::Say(said)) => Err(Turned::Away(client, said)),
        Err(Refusal::HungUp) => Err(Turned::Off),
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
async fn greet(shared: &Shared, socket: TcpStream, tls: &Arc<ServerConfig>) -> Result<(ClientStream, Startup), Turned> {
    let mut client = ClientStream::Plain(socket);
    let mut may_encrypt = true;
    let mut may_gss = true;
    loop {
        let packet = match read_packet(&mut client).await? {
            Some(body) => Packet::parse(&body),
            None => Err(Said::malformed("the startup packet has an impossible length")),
        };
        match packet {
            Ok(Packet::SslRequest) if may_encrypt => {
                client.send(b"S").await?;
                let ClientStream::Plain(socket) = client else { return Err(Turned::Off) };
                // The request was read to its last byte and no further: nothing sent in the clear is taken for TLS.
                let handshake = shared.home.spawn(TlsAcceptor::from(tls.clone()).accept(socket));
                let ended = AbortOnDropHandle::new(handshake).await.map_err(io::Error::other)?;
                client = ClientStream::Tls(Box::new(ended?));
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
                shared.keys.cancel(key).await;
                return Err(Turned::Off);
            }
            Ok(Packet::Startup(startup)) => return Ok((client, startup)),
            Err(said) => return Err(Turned::Away(client, said)),
        }
    }
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

/// Tells a client that asked for more than 3.0 what it gets (PostgreSQL 15, 55.2.1).
async fn negotiate(client: &mut ClientStream, startup: &Startup) -> io::Result<()> {
    if startup.minor == 0 && startup.unknown_options.is_empty() {
        return Ok(());
    }
    let mut out = Vec::new();
    message(&mut out, b'v', |body| {
        body.extend_from_slice(&PROTOCOL_3_0.to_be_bytes());
        body.extend_from_slice(&(startup.unknown_options.len() as u32).to_be_bytes());
        for option in &startup.unknown_options {
            cstr(body, option);
        }
    });
    client.send(&out).await
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
