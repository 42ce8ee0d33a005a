//! A backend as the protocol sees it: what it reads, what it throws away, what it answers (`PostgresMain`, postgres.c;
//! `CopyGetData`, copyfromparse.c; PostgreSQL 15).

use std::collections::VecDeque;

/// A message of the server: its tag and its body.
pub type Answer = (u8, &'static [u8]);

#[derive(Debug, Default)]
pub struct Server {
    /// Received and not yet read.
    waiting: VecDeque<u8>,
    /// In a `COPY … FROM STDIN`.
    copying: Option<Copying>,
    /// After an error in the extended protocol: all is thrown away up to the next `Sync`.
    skipping: bool,
    /// Messages of the extended protocol were read since the last sync point.
    unsynced: bool,
    /// In a transaction.
    open: bool,
}

#[derive(Debug, Clone, Copy)]
enum Copying {
    Simple,
    Extended,
}

impl Server {
    /// A message arrives.
    pub fn receive(&mut self, tag: u8) {
        self.waiting.push_back(tag);
    }

    /// Whether exchanging it for another would change nothing.
    pub fn is_at_rest(&self) -> bool {
        // What is left over from copies, and flushes, are not answered by anything.
        let ignored = self.waiting.iter().all(|tag| matches!(tag, b'd' | b'c' | b'f' | b'H'));
        ignored && self.copying.is_none() && !self.skipping && !self.unsynced && !self.open
    }

    /// Reads one message; `choice` decides what comes of it.
    pub fn proceed(&mut self, choice: u8) -> Vec<Answer> {
        let Some(tag) = self.waiting.pop_front() else { return Vec::new() };
        match self.copying {
            Some(copying) => self.copy(copying, tag, choice),
            None if self.skipping && tag != b'S' => Vec::new(),
            None => self.read(tag, choice),
        }
    }

    fn read(&mut self, tag: u8, choice: u8) -> Vec<Answer> {
        match tag {
            b'Q' => match choice % 7 {
                0 => self.ready(b"TDC"),
                1 => self.ready(b"E"),
                2 => self.ready(b"HdcC"),
                3 => self.ready(b"I"),
                4 => {
                    self.open ^= true;
                    self.ready(b"C")
                }
                5 => self.begin_copy(Copying::Simple, b"G"),
                _ => self.begin_copy(Copying::Simple, b"CG"),
            },
            b'F' => self.ready(if choice.is_multiple_of(2) { b"V" } else { b"E" }),
            b'S' => self.ready(b""),
            b'd' | b'c' | b'f' | b'H' => Vec::new(),
            _ => {
                self.unsynced = true;
                match (tag, choice % 6) {
                    (_, 0) => {
                        self.skipping = true;
                        answers(b"E")
                    }
                    (b'P', _) => answers(b"1"),
                    (b'B', _) => answers(b"2"),
                    (b'C', _) => answers(b"3"),
                    (b'D', _) => answers(b"tT"),
                    (_, 1) => answers(b"Ds"),
                    (_, 2) => answers(b"HdcC"),
                    (_, 3) => self.begin_copy(Copying::Extended, b"G"),
                    (_, 4) => {
                        self.open ^= true;
                        answers(b"C")
                    }
                    _ => answers(b"DC"),
                }
            }
        }
    }

    fn begin_copy(&mut self, copying: Copying, tags: &[u8]) -> Vec<Answer> {
        self.copying = Some(copying);
        answers(tags)
    }

    fn copy(&mut self, copying: Copying, tag: u8, choice: u8) -> Vec<Answer> {
        match (tag, choice % 4) {
            (b'd', 1..) | (b'H' | b'S', _) => Vec::new(),
            // Of several commands in one query the next may copy, too.
            (b'c', 1) if matches!(copying, Copying::Simple) => self.begin_copy(copying, b"CG"),
            (b'c', 1..) => {
                self.copying = None;
                match copying {
                    Copying::Simple => self.ready(b"C"),
                    Copying::Extended => answers(b"C"),
                }
            }
            // Data that is wrong, the client's wish, or a message that has no place here.
            _ => {
                self.copying = None;
                match copying {
                    Copying::Simple => self.ready(b"E"),
                    Copying::Extended => {
                        self.skipping = true;
                        answers(b"E")
                    }
                }
            }
        }
    }

    fn ready(&mut self, tags: &[u8]) -> Vec<Answer> {
        self.skipping = false;
        self.unsynced = false;
        let mut answers = answers(tags);
        answers.push((b'Z', if self.open { b"T" } else { b"I" }));
        answers
    }
}

fn answers(tags: &[u8]) -> Vec<Answer> {
    tags.iter().map(|tag| (*tag, &b"x\0"[..])).collect()
}
