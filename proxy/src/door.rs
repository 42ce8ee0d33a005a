//! Who is let in: from where a client comes, how often, from where it may, with which certificate. All of it is asked
//! before a password is, and says nothing about roles.
//!
//! ```text
//!   accepted ─► introduce: PROXY header, a place of its address, its rate ─► TLS, start-up ─► admit: allow list,
//!               rates of the endpoint, certificate ─► SCRAM
//! ```
//!
//! Whoever is refused by [`introduce`] is told at once and cut, unread: that costs neither a place nor a handshake.

use std::net::SocketAddr;

use ipnet::IpNet;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::backend::encoded;
use crate::branch::Full;
use crate::certificates::common_name;
use crate::endpoints::Endpoint;
use crate::errors::Said;
use crate::limits::Hit;
use crate::login::Turned;
use crate::proxy::Shared;
use crate::proxy_protocol::{self, Parsed, Source};
use crate::strangers::Stranger;
use crate::stream::ClientStream;

/// Where a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its address: the one its connection has, or the one that a load balancer tells.
    pub address: SocketAddr,
    /// Whether it is on this machine: then it need not encrypt or show a certificate, and no allow list keeps it out, as
    /// it could ask the API to let it in. Never on a load balancer's word.
    pub is_local: bool,
}

/// Counts a refusal.
pub fn refused(kind: &'static str) {
    metrics::counter!("ebb_proxy_refusals_total", "kind" => kind).increment(1);
}

/// Learns where a client is, and whether its address may go on.
///
/// # Errors
/// It was told why not, or has gone.
pub async fn introduce(
    shared: &Shared,
    socket: &mut TcpStream,
    from: SocketAddr,
    stranger: &mut Stranger,
) -> Result<Peer, Turned> {
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    let peer = if speaks_for_others(&shared.config.proxy_protocol, from) {
        match read_header(socket).await? {
            Ok(Source::Local) => Peer { address: from, is_local: from.ip().is_loopback() },
            Ok(Source::Unknown) => Peer { address: from, is_local: false },
            Ok(Source::Client(address)) => Peer { address, is_local: false },
            Err(malformed) => return Err(turn_away(socket, "proxy_header", &Said::no_proxy_header(malformed))),
        }
    } else {
        Peer { address: from, is_local: from.ip().is_loopback() }
    };
    if let Err(limit) = stranger.sit(peer.address.ip()) {
        return Err(turn_away(socket, "address_places", &Said::too_many_strangers(limit)));
    }
    if let Err((hit, wait)) = shared.limits.connected(peer.address.ip()) {
        return Err(turn_away(socket, hit.kind(), &Said::too_many_from_address(wait)));
    }
    Ok(peer)
}

fn speaks_for_others(trusted: &[IpNet], from: SocketAddr) -> bool {
    trusted.iter().any(|network| network.contains(&from.ip()))
}

/// Reads a header to its last byte and no further.
async fn read_header(socket: &mut TcpStream) -> std::io::Result<Result<Source, proxy_protocol::Malformed>> {
    let mut bytes = Vec::new();
    loop {
        match proxy_protocol::parse(&bytes) {
            Ok(Parsed::Incomplete(more)) => {
                let have = bytes.len();
                bytes.resize(have + more, 0);
                socket.read_exact(&mut bytes[have..]).await?;
            }
            Ok(Parsed::Header { source, .. }) => return Ok(Ok(source)),
            Err(malformed) => return Ok(Err(malformed)),
        }
    }
}

/// Says why and hangs up, waiting for nothing.
fn turn_away(socket: &TcpStream, kind: &'static str, said: &Said) -> Turned {
    refused(kind);
    tracing::debug!(kind, sqlstate = said.sqlstate(), "connection turned away at the door");
    // Nothing was sent before: it fits. What was sent by the client already is taken from the system, which would
    // otherwise send a reset that overtakes the words.
    let _ = socket.try_write(&encoded(said));
    let _ = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Write);
    let _ = socket.try_read(&mut [0; 512]);
    Turned::Told(said.sqlstate())
}

/// Whether a client may try to log in at an endpoint, from where it is and with what it has shown.
///
/// # Errors
/// What it is told: nothing about whether the role exists.
pub async fn admit(
    shared: &Shared,
    client: &ClientStream,
    peer: Peer,
    endpoint: &Endpoint,
    role: &str,
) -> Result<(), Said> {
    let say = |kind, said| {
        refused(kind);
        Err(said)
    };
    let address = peer.address.ip();
    if !peer.is_local && !shared.endpoints.allowed(endpoint.branch).await.map_err(Said::from)?.admits(address) {
        return say("not_allowed", Said::not_allowed(&endpoint.name.to_string(), address));
    }
    if let Err((hit, wait)) = shared.limits.begins(address, endpoint.branch) {
        let name = endpoint.name.to_string();
        let said = match hit {
            Hit::Address => Said::too_many_from_address(wait),
            Hit::AddressFailures => Said::too_many_failures(wait),
            Hit::Endpoint => Said::too_many_logins(&name, wait),
            Hit::EndpointFailures => Said::too_many_failures_at(&name, wait),
        };
        return say(hit.kind(), said);
    }
    let ClientStream::Tls(stream) = client else { return Ok(()) };
    match stream.get_ref().1.peer_certificates().and_then(<[_]>::first) {
        Some(certificate) if common_name(certificate).as_deref() == Some(role) => Ok(()),
        Some(_) => {
            shared.limits.failed(address, endpoint.branch);
            say("certificate", Said::certificate_of_another(role))
        }
        None if shared.config.files.client_ca.is_some() && !peer.is_local => {
            say("certificate", Said::certificate_wanted())
        }
        None => Ok(()),
    }
}

/// What a client is told for whom there is no seat.
pub fn no_seat(full: Full, shared: &Shared, endpoint: &Endpoint, role: &str) -> Said {
    let name = endpoint.name.to_string();
    match full {
        Full::Endpoint => {
            refused("endpoint_full");
            Said::too_many_sessions(&name, shared.config.sessions_per_endpoint_max)
        }
        Full::Role => {
            refused("role_full");
            Said::too_many_sessions_of_role(role, &name, shared.config.sessions_per_role_max)
        }
    }
}
