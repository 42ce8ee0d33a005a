//! What must hold whatever is sent: one function for each kind of input, which panics where it does not.
//!
//! They are driven by cargo-fuzz (the crate in `fuzz/`), and in the ordinary tests by its committed inputs and mutations of
//! them.

mod server;

use crate::conversation::Conversation;
use crate::proxy_protocol::{FIXED, Parsed, Source, parse};
use crate::scram::{Exchange, Verifier};
use crate::startup::{Packet, endpoint_of_host};
use crate::wire::message;
use server::Server;

/// The beginning of a load balancer's connection: what is told of a part of it holds of the whole, and no byte behind the
/// header is asked for, since that is the client's.
pub fn proxy_header(bytes: &[u8]) {
    let whole = parse(bytes);
    for have in 0..bytes.len() {
        match (parse(&bytes[..have]), whole) {
            (Ok(Parsed::Incomplete(lacks)), Ok(Parsed::Header { length, .. })) => {
                assert!(lacks > 0 && have + lacks <= length, "{lacks} bytes more than {have} of {length}");
            }
            (Ok(Parsed::Incomplete(lacks)), _) => assert!(lacks > 0),
            (known, whole) => assert_eq!(known, whole, "with {have} bytes"),
        }
    }
    match whole {
        Ok(Parsed::Header { length, source }) => {
            assert!((FIXED..=bytes.len()).contains(&length));
            if let Source::Client(address) = source {
                assert_eq!(address.ip().to_canonical(), address.ip(), "rates and lists know it by one name only");
            }
        }
        Ok(Parsed::Incomplete(lacks)) => assert!(lacks > 0),
        Err(malformed) => assert!(!malformed.to_string().is_empty()),
    }
}

/// The first packet of a connection: it is refused in words, or what goes on to Postgres is one packet, of the one role that
/// has proved itself.
pub fn startup(bytes: &[u8]) {
    let mut startup = match Packet::parse(bytes) {
        Ok(Packet::Startup(startup)) => startup,
        Ok(Packet::Cancel(key)) => return assert_eq!(key.request()[8..], bytes[4..]),
        Ok(Packet::SslRequest | Packet::GssRequest) => return assert_eq!(bytes.len(), 4),
        Err(said) => return said.encode(&mut Vec::new()),
    };
    if let Some(words) = startup.negotiation() {
        assert_eq!(words[0], b'v');
        assert!(words.len() <= bytes.len() + 16);
    }
    let host = startup.text("database").map(str::to_owned);
    if let Some(endpoint) = host.as_deref().and_then(|host| endpoint_of_host(host, "localhost")) {
        assert!(host.is_some_and(|host| host.eq_ignore_ascii_case(&format!("{endpoint}.localhost"))));
    }
    let _ = startup.take_place(Some("prod--shop.localhost"), "localhost");
    startup.default_database("app");
    startup.fix_user("app");
    let told = startup.encode();
    assert!(told.len() <= bytes.len() + 32, "it only becomes shorter, but for a user and a database");
    match Packet::parse(&told[4..]) {
        Ok(Packet::Startup(read)) => {
            assert_eq!(read.text("user"), Some("app"));
            assert_eq!(read.encode(), told);
        }
        other => panic!("Postgres would read {other:?}"),
    }
}

/// A verifier, and the two messages of a client, each on a line of its own: nobody gets in who has not the password.
pub fn scram(bytes: &[u8]) {
    let mut lines = bytes.splitn(3, |byte| *byte == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    let stored = String::from_utf8_lossy(line());
    let (first, last) = (line(), line());
    for verifier in [Verifier::parse(&stored), Some(Verifier::mock(b"secret", &stored))].into_iter().flatten() {
        for (plus, channel) in [(false, None), (false, Some(&b"hash"[..])), (true, Some(b"hash")), (true, None)] {
            let Ok(exchange) = Exchange::begin(verifier.clone(), first, plus, channel, &[7; 18]) else { continue };
            assert!(exchange.challenge().starts_with("r="));
            assert!(exchange.finish(last).is_err(), "a proof was found without the password");
        }
    }
}

/// Bytes of both directions: however they are cut, what is known afterwards is the same.
pub fn stream(bytes: &[u8]) {
    let Some((&cut, mut rest)) = bytes.split_first() else { return };
    let size = usize::from(cut % 16) + 1;
    let (mut whole, mut pieces) = (Conversation::new(), Conversation::new());
    while let Some((&order, after)) = rest.split_first() {
        let (body, after) = after.split_at(after.len().min(usize::from(order & 0x3f)));
        rest = after;
        let kept_on = match order >> 6 {
            // From the client, as it comes, or as the body of a message.
            0 => client_sent(&mut whole, &mut pieces, body, size),
            1 => {
                let encoded = encoded(CLIENT[usize::from(order) % CLIENT.len()], body);
                client_sent(&mut whole, &mut pieces, &encoded, size)
            }
            // From the server; whose `ReadyForQuery` has one byte.
            _ if body.contains(&b'Z') => true,
            2 => {
                let tag = SERVER[body.first().map_or(0, |byte| usize::from(*byte) % SERVER.len())];
                let body = if tag == b'Z' { &b"I"[..] } else { body };
                server_sent(&mut whole, &mut pieces, &encoded(tag, body), size)
            }
            _ => server_sent(&mut whole, &mut pieces, body, size),
        };
        if !kept_on {
            return;
        }
        assert!(whole == pieces, "in pieces of {size}: {whole:?} and {pieces:?}");
    }
}

/// What clients send and what servers do, in any order: no session is taken to be at rest while its server has something to
/// answer or to keep.
pub fn session(bytes: &[u8]) {
    let (mut conversation, mut server) = (Conversation::new(), Server::default());
    for &byte in bytes {
        let choice = byte >> 1;
        if byte & 1 == 0 {
            let tag = CLIENT[usize::from(choice) % CLIENT.len()];
            let encoded = encoded(tag, b"s\0\0\0");
            assert_eq!(conversation.client_sent(&encoded, false), Ok(encoded.len()));
            server.receive(tag);
        } else {
            for (tag, body) in server.proceed(choice) {
                assert_eq!(conversation.server_sent(&encoded(tag, body)), Ok(()));
            }
        }
        assert!(!conversation.is_at_rest() || server.is_at_rest(), "{conversation:?} is not at rest: {server:?}");
    }
}

/// What a client may send while its session lives.
const CLIENT: &[u8] = b"QPBEDCSHFdcf";
/// What a server may send then.
const SERVER: &[u8] = b"ZTDCEGHWS123IAVNdcnst";

fn encoded(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    message(&mut out, tag, |out| out.extend_from_slice(body));
    out
}

/// The same bytes at once and in pieces; answers whether they can be.
fn client_sent(whole: &mut Conversation, pieces: &mut Conversation, bytes: &[u8], size: usize) -> bool {
    if bytes.is_empty() {
        return true;
    }
    let taken = whole.client_sent(bytes, false);
    let mut chunks = bytes.chunks(size).map(|chunk| pieces.client_sent(chunk, false));
    assert_eq!(taken, chunks.try_fold(0, |sum, taken| taken.map(|count| sum + count)));
    taken.is_ok()
}

fn server_sent(whole: &mut Conversation, pieces: &mut Conversation, bytes: &[u8], size: usize) -> bool {
    let result = whole.server_sent(bytes);
    assert_eq!(result, bytes.chunks(size).try_for_each(|chunk| pieces.server_sent(chunk)));
    result.is_ok()
}

#[cfg(test)]
mod tests;
