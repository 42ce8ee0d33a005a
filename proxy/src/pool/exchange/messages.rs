//! Messages of clients that name prepared statements: how much of them matters, and how they are written anew.

use super::Refused;
use crate::pool::names::RESERVED;
use crate::wire::{cstr, message};

/// LIMIT: texts longer than this are not looked through; what is longer carries data.
const TEXT_MAX: usize = 8 * 1024;
/// LIMIT: a named statement is kept by the proxy, so it has to end somewhere.
const NAMED_MAX: usize = 1 << 20;
/// LIMIT: the names in front of a `Bind`, or all of a `Describe` or `Close`; Postgres's own names have 63 bytes.
const HEAD_MAX: usize = 2 * 1024;

/// A message of the client, as much of it as is at hand.
pub struct Message<'a> {
    /// Its tag.
    pub tag: u8,
    /// As in its header: with the four bytes of itself.
    pub length: usize,
    /// What of the body is at hand.
    pub body: &'a [u8],
    /// Whether that is all.
    pub whole: bool,
}

impl Message<'_> {
    /// Appends it as it came; what is not at hand follows.
    pub fn pass(&self, out: &mut Vec<u8>) {
        out.push(self.tag);
        out.extend_from_slice(&(self.length as u32).to_be_bytes());
        out.extend_from_slice(self.body);
    }
}

/// How many bytes of a body have to be at hand before the message can be dealt with.
///
/// # Errors
/// If there is no end to it.
pub fn needed(tag: u8, length: usize, body: &[u8]) -> Result<usize, Refused> {
    Ok(match tag {
        b'Q' if length <= TEXT_MAX => length,
        b'P' => match body.first() {
            None => length.min(1),
            Some(0) if length <= TEXT_MAX => length,
            Some(0) => 1,
            Some(_) if length <= NAMED_MAX => length,
            Some(_) => return Err(Refused::Statement("the text of a named prepared statement is too long")),
        },
        b'B' => {
            let mut ends = body.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at + 1);
            match ends.nth(1) {
                Some(end) => end,
                None if body.len() < length.min(HEAD_MAX) => body.len() + 1,
                // Broken off: the server says so.
                None if length < HEAD_MAX => length,
                None => return Err(Refused::Statement("the name of a prepared statement is too long")),
            }
        }
        b'D' | b'C' | b'X' if length > HEAD_MAX => {
            return Err(Refused::Statement("the name of a prepared statement is too long"));
        }
        b'D' | b'C' | b'X' => length,
        _ => 0,
    })
}

/// What a client's own name is on a backend: the same, unless it could be taken for one of ours.
pub fn server_name(name: &[u8]) -> Box<[u8]> {
    if name.starts_with(RESERVED) { [b"client:", name].concat().into() } else { name.into() }
}

/// Appends a `Parse`; `rest` is what follows the name.
pub fn parse_message(out: &mut Vec<u8>, name: &[u8], rest: &[u8]) {
    message(out, b'P', |body| {
        cstr(body, name);
        body.extend_from_slice(rest);
    });
}

/// Appends a message that names a statement and nothing else.
pub fn one_name(out: &mut Vec<u8>, tag: u8, name: &[u8]) {
    message(out, tag, |body| {
        body.push(b'S');
        cstr(body, name);
    });
}
