//! The header by which a load balancer tells whom it speaks for: version 2 of the PROXY protocol, as its specification
//! (`proxy-protocol.txt`, section 2.2) has it. Pure: bytes in, an address out. The text of version 1 is not understood.
//!
//! ```text
//! offset 0   12 bytes  signature, which no other protocol begins with
//!       12   1 byte    version (2) in the high half, command in the low: 0 LOCAL, 1 PROXY
//!       13   1 byte    family in the high half, transport in the low: 0x11 TCP over IPv4, 0x21 TCP over IPv6
//!       14   2 bytes   length of what follows, big-endian
//!       16   …         source and destination address, source and destination port
//!        …   …         extensions: type (1 byte), length (2 bytes), value
//! ```
//!
//! Of the extensions only the checksum is looked at, which whoever finds it has to check.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::wire::Fields;

/// The part of a header that has always the same length.
pub const FIXED: usize = 16;
/// LIMIT: addresses and every extension that load balancers send take some hundred bytes; a header that is longer is none.
const REST_MAX: usize = 2048;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The extension that holds a CRC-32C of the whole header, itself being zero.
const CHECKSUM: u8 = 0x03;

/// What the beginning of a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a header: so many bytes more are needed before more can be said.
    Incomplete(usize),
    /// A whole header, of so many bytes.
    Header {
        /// Its length; what follows is the client's.
        length: usize,
        /// Whom the sender speaks for.
        source: Source,
    },
}

/// Whom a sender speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// For itself: a health check. The connection's own address counts.
    Local,
    /// For a client whose address it cannot tell, because it has none of TCP.
    Unknown,
    /// For this client.
    Client(SocketAddr),
}

/// Bytes that do not begin with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// They are something else.
    #[error("there is no PROXY protocol header of version 2")]
    NoHeader,
    /// The command is neither LOCAL nor PROXY.
    #[error("the command of the PROXY protocol header is not known")]
    Command,
    /// It claims to be longer than any header is.
    #[error("the PROXY protocol header is too long")]
    TooLong,
    /// The addresses, or an extension, do not fit into its length.
    #[error("the PROXY protocol header is broken off")]
    BrokenOff,
    /// It was changed on its way.
    #[error("the checksum of the PROXY protocol header is wrong")]
    Checksum,
}

/// Reads a header off the beginning of a connection.
///
/// # Errors
/// As soon as the bytes cannot become one.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Malformed> {
    let known = bytes.len().min(SIGNATURE.len());
    if bytes[..known] != SIGNATURE[..known] {
        return Err(Malformed::NoHeader);
    }
    let Some((fixed, rest)) = bytes.split_at_checked(FIXED) else {
        return Ok(Parsed::Incomplete(FIXED - bytes.len()));
    };
    let (version, command) = (fixed[12] >> 4, fixed[12] & 0xf);
    if version != 2 {
        return Err(Malformed::NoHeader);
    }
    if command > 1 {
        return Err(Malformed::Command);
    }
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > REST_MAX {
        return Err(Malformed::TooLong);
    }
    let Some(rest) = rest.get(..length) else {
        return Ok(Parsed::Incomplete(length - rest.len()));
    };
    let length = FIXED + length;
    // A health check's addresses are of no use, whatever they are (section 2.2).
    if command == 0 {
        return Ok(Parsed::Header { length, source: Source::Local });
    }
    let mut fields = Fields(rest);
    let source = source(fixed[13], &mut fields)?;
    check(&bytes[..length], fields)?;
    Ok(Parsed::Header { length, source })
}

/// Takes the addresses off.
fn source(family: u8, fields: &mut Fields<'_>) -> Result<Source, Malformed> {
    let mut take = |count: usize| fields.bytes(count).ok_or(Malformed::BrokenOff);
    let port = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
    match family {
        0x11 => {
            let address: [u8; 4] = take(8)?[..4].try_into().expect("four of eight");
            let port = port(take(4)?);
            Ok(Source::Client((IpAddr::from(Ipv4Addr::from(address)).to_canonical(), port).into()))
        }
        0x21 => {
            let address: [u8; 16] = take(32)?[..16].try_into().expect("sixteen of 32");
            let port = port(take(4)?);
            Ok(Source::Client((IpAddr::from(Ipv6Addr::from(address)).to_canonical(), port).into()))
        }
        // What is not TCP over IP has no address for us; of its length nothing is known, so nothing in it is looked at.
        _ => {
            fields.0 = &[];
            Ok(Source::Unknown)
        }
    }
}

/// Checks the extensions: that they are whole, and the checksum if there is one.
fn check(header: &[u8], mut extensions: Fields<'_>) -> Result<(), Malformed> {
    while !extensions.0.is_empty() {
        let at = header.len() - extensions.0.len();
        let field = extensions.bytes(3).ok_or(Malformed::BrokenOff)?;
        let value = extensions.bytes(usize::from(u16::from_be_bytes([field[1], field[2]])));
        let value = value.ok_or(Malformed::BrokenOff)?;
        if field[0] == CHECKSUM {
            let told = u32::from_be_bytes(value.try_into().map_err(|_| Malformed::Checksum)?);
            let (before, after) = (&header[..at + 3], &header[at + 7..]);
            let seen = [before, &[0; 4], after].iter().fold(0, |sum, part| crc32c::crc32c_append(sum, part));
            if seen != told {
                return Err(Malformed::Checksum);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = (rest.len() as u16).to_be_bytes();
        [&SIGNATURE[..], &[0x20 | command, family], &length, rest].concat()
    }

    const V4: &[u8] = &[192, 0, 2, 7, 10, 0, 0, 1, 0x1f, 0x90, 0x15, 0x38];

    fn v6() -> Vec<u8> {
        let address = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        [&address("2001:db8::7")[..], &address("::1"), &[0x1f, 0x90, 0x15, 0x38]].concat()
    }

    fn check(bytes: &[u8], expect: Result<Source, Malformed>) {
        let with_more = [bytes, b"\0\0\0\x08"].concat();
        let parsed = parse(&with_more);
        let expect = expect.map(|source| Parsed::Header { length: bytes.len(), source });
        assert_eq!(parsed, expect, "for {bytes:?}");
    }

    fn client(text: &str) -> Result<Source, Malformed> {
        Ok(Source::Client(text.parse().unwrap()))
    }

    #[test]
    fn a_header_tells_the_client_and_where_it_ends() {
        check(&header(1, 0x11, V4), client("192.0.2.7:8080"));
        check(&header(1, 0x21, &v6()), client("[2001:db8::7]:8080"));
        let mapped = [&"::ffff:192.0.2.7".parse::<Ipv6Addr>().unwrap().octets()[..], &[0; 16], &[0, 1, 0, 2]].concat();
        check(&header(1, 0x21, &mapped), client("192.0.2.7:1"));
        check(&header(1, 0x11, &[V4, &[0xea, 0, 2, b'a', b'b']].concat()), client("192.0.2.7:8080"));
        // A health check; UDP; a Unix socket; nothing told.
        check(&header(0, 0x11, V4), Ok(Source::Local));
        check(&header(0, 0, b""), Ok(Source::Local));
        check(&header(0, 0x21, b""), Ok(Source::Local));
        check(&header(1, 0x12, V4), Ok(Source::Unknown));
        check(&header(1, 0x31, &[7; 216]), Ok(Source::Unknown));
        check(&header(1, 0, b"anything"), Ok(Source::Unknown));
    }

    #[test]
    fn what_is_no_header_is_refused() {
        check(b"PROXY TCP4 192.0.2.7 10.0.0.1 8080 5432\r\n", Err(Malformed::NoHeader));
        check(&[&SIGNATURE[..], &[0x11, 0x11, 0, 12], V4].concat(), Err(Malformed::NoHeader));
        check(&header(2, 0x11, V4), Err(Malformed::Command));
        check(&header(1, 0x11, &V4[..11]), Err(Malformed::BrokenOff));
        check(&header(1, 0x21, V4), Err(Malformed::BrokenOff));
        check(&header(1, 0x11, &[V4, &[4, 0, 9, 1]].concat()), Err(Malformed::BrokenOff));
        check(&header(1, 0x11, &[V4, &[4]].concat()), Err(Malformed::BrokenOff));
        check(&header(1, 0, &[0; REST_MAX + 1]), Err(Malformed::TooLong));
    }

    #[test]
    fn a_checksum_is_checked() {
        let sealed = |sum: [u8; 4]| header(1, 0x11, &[V4, &[CHECKSUM, 0, 4], &sum, &[4, 0, 1, 0]].concat());
        let sum = crc32c::crc32c(&sealed([0; 4])).to_be_bytes();
        check(&sealed(sum), client("192.0.2.7:8080"));
        check(&sealed([sum[0] ^ 1, sum[1], sum[2], sum[3]]), Err(Malformed::Checksum));
        check(&header(1, 0x11, &[V4, &[CHECKSUM, 0, 2, 0, 0]].concat()), Err(Malformed::Checksum));
    }

    #[test]
    fn a_header_that_is_not_whole_yet_tells_what_it_lacks() {
        let whole = header(1, 0x11, V4);
        for have in 0..whole.len() {
            let lacks = if have < FIXED { FIXED - have } else { whole.len() - have };
            assert_eq!(parse(&whole[..have]), Ok(Parsed::Incomplete(lacks)), "with {have} bytes");
        }
        assert_eq!(parse(&SIGNATURE[1..]), Err(Malformed::NoHeader), "it is told as soon as it is seen");
    }

    proptest! {
        #[test]
        fn garbage_behind_a_signature_never_panics(
            rest in prop::collection::vec(any::<u8>(), 0..300),
            command in any::<u8>(), family in any::<u8>(), length in 0_u16..400,
        ) {
            let bytes = [&SIGNATURE[..], &[command, family], &length.to_be_bytes(), &rest].concat();
            match parse(&bytes) {
                Ok(Parsed::Header { length, .. }) => prop_assert!(length <= bytes.len()),
                Ok(Parsed::Incomplete(lacks)) => prop_assert!(lacks > 0),
                Err(_) => {}
            }
        }
    }
}
