//! From the backend to the client: which answers are for the client, and what they tell of names.

use super::{Exchange, Owed};
use crate::conversation::Conversation;
use crate::pool::names::{Held, Names};
use crate::pool::words::Words;
use crate::wire::Fields;

/// LIMIT: messages of the server of these sizes are waited for whole; those that matter are far shorter.
const ANSWER_MAX: usize = 4 * 1024;

/// A header that no server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadAnswer;

impl Exchange {
    /// Takes messages of the server: what is not for the client is cut out of `bytes`. Answers how many bytes at the front
    /// then go to the client, and how many were taken in all.
    ///
    /// # Errors
    /// If a header is impossible.
    pub fn down(
        &mut self,
        names: &mut Names,
        conversation: &mut Conversation,
        held: &mut Held,
        bytes: &mut [u8],
    ) -> Result<(usize, usize), BadAnswer> {
        let (mut read, mut write) = (0, 0);
        loop {
            if self.down_left > 0 {
                let take = self.down_left.min(bytes.len() - read);
                if !self.down_drops {
                    keep(bytes, read, &mut write, take);
                }
                read += take;
                self.down_left -= take;
                if self.down_left > 0 {
                    break;
                }
            }
            let Some(header) = bytes.get(read..read + 5) else { break };
            let tag = header[0];
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            let body = length.checked_sub(4).ok_or(BadAnswer)?;
            let matters = matches!(tag, b'1' | b'3' | b'C' | b'E' | b'S' | b'Z');
            if matters && tag != b'E' && body <= ANSWER_MAX && bytes.len() < read + 5 + body {
                break;
            }
            let known = &bytes[(read + 5).min(bytes.len())..(read + 5 + body).min(bytes.len())];
            self.down_drops = if self.prelude > 0 {
                self.prelude_answer(conversation, tag, known)
            } else {
                matters && self.answer(names, conversation, held, tag, known)
            };
            self.down_left = body;
            if !self.down_drops {
                keep(bytes, read, &mut write, 5);
            }
            read += 5;
        }
        conversation.server_sent(&bytes[..write]).map_err(|_| BadAnswer)?;
        if conversation.is_answered() {
            self.resync(names, conversation, held);
        }
        Ok((write, read))
    }

    /// An answer to the proxy's own queries; answers whether the client is not to see it.
    fn prelude_answer(&mut self, conversation: &mut Conversation, tag: u8, body: &[u8]) -> bool {
        match tag {
            b'Z' => self.prelude -= 1,
            b'E' => self.prelude_failed = true,
            b'S' => {
                // What is news to the client, it is told; else it is as it believes it to be.
                let mut fields = Fields(body);
                if let (Some(name), Some(value)) = (fields.cstr(), fields.cstr()) {
                    return !conversation.would_be_news(name, value);
                }
            }
            _ => {}
        }
        true
    }

    /// Answers whether the client is not to see this message.
    fn answer(
        &mut self,
        names: &mut Names,
        conversation: &mut Conversation,
        held: &mut Held,
        tag: u8,
        body: &[u8],
    ) -> bool {
        match tag {
            b'1' | b'3' => return self.completed(tag),
            b'Z' => {
                self.skip(names, conversation, held);
                let _ = self.next_owed();
                if self.owed.is_empty() {
                    self.deallocating.clear();
                    self.drops = false;
                }
            }
            b'E' => {
                self.deallocating.clear();
                self.skip(names, conversation, held);
            }
            b'S' => self.parameters_changed = true,
            b'C' => self.command(names, held, body.strip_suffix(b"\0").unwrap_or(body)),
            _ => {}
        }
        false
    }

    fn completed(&mut self, tag: u8) -> bool {
        let matching = |owed: &Owed| match owed {
            Owed::Passed | Owed::Unnamed | Owed::Parsed(_) | Owed::OwnParsed(_) => tag == b'1',
            Owed::Closed(_) | Owed::OwnClosed(_) => tag == b'3',
            Owed::Ready => false,
        };
        // What does not fit is the client's; that cannot be, but then it is not ours to leave out.
        match self.owed.front() {
            Some(owed) if matching(owed) => {
                let owed = self.next_owed();
                matches!(owed, Some(Owed::OwnParsed(_) | Owed::OwnClosed(_)))
            }
            _ => false,
        }
    }

    /// A command has ended with this tag.
    fn command(&mut self, names: &mut Names, held: &mut Held, tag: &[u8]) {
        match tag {
            b"SET" => self.touched |= self.words.has(Words::SETS),
            b"DECLARE CURSOR" => self.touched |= self.words.has(Words::HOLDS),
            b"DEALLOCATE" => match self.deallocating.pop_front() {
                Some(name) => drop(names.remove(&name)),
                None => self.freed = true,
            },
            b"DEALLOCATE ALL" | b"DISCARD ALL" => {
                names.clear();
                held.clear();
                self.freed = true;
            }
            b"LISTEN" | b"PREPARE" => self.touched = true,
            b"RESET" | b"UNLISTEN" | b"DISCARD TEMP" | b"CLOSE CURSOR" | b"CLOSE CURSOR ALL" | b"DROP TABLE" => {
                self.freed = true;
            }
            // What a library has changed in its process stays changed.
            b"LOAD" => self.spoilt = true,
            _ => {}
        }
    }

    /// All that was sent up to the last sync point has been answered: what is still owed for it will not come.
    fn resync(&mut self, names: &mut Names, conversation: &mut Conversation, held: &mut Held) {
        while self.batches > 0 {
            self.skip(names, conversation, held);
            let _ = self.next_owed();
        }
    }

    /// The server skips what it still owes before the next `ReadyForQuery`: that is taken back, the last first, because what
    /// came later may stand on what came before.
    fn skip(&mut self, names: &mut Names, conversation: &mut Conversation, held: &mut Held) {
        let skipped = self.owed.iter().position(|owed| matches!(owed, Owed::Ready)).unwrap_or(self.owed.len());
        self.decisions -= self.owed.range(..skipped).filter(|owed| owed.decides()).count();
        for owed in self.owed.drain(..skipped).rev() {
            undo(owed, names, conversation, held);
        }
    }
}

fn keep(bytes: &mut [u8], read: usize, write: &mut usize, count: usize) {
    if *write != read {
        bytes.copy_within(read..read + count, *write);
    }
    *write += count;
}

/// The server has skipped, or refused, what this is owed for.
fn undo(owed: Owed, names: &mut Names, conversation: &mut Conversation, held: &mut Held) {
    match owed {
        Owed::Unnamed => conversation.forget_unnamed(),
        Owed::Parsed(naming) => {
            names.remove(&naming.name);
            if naming.here {
                held.remove(naming.prepared.id);
            }
        }
        Owed::OwnParsed(Some(id)) => drop(held.remove(id)),
        Owed::Closed(Some(naming)) => names.insert(naming.name, naming.prepared),
        Owed::OwnClosed(Some(prepared)) => held.insert(prepared),
        Owed::Passed | Owed::OwnParsed(None) | Owed::Closed(None) | Owed::OwnClosed(None) | Owed::Ready => {}
    }
}
