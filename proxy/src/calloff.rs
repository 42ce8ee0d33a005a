//! What becomes of a query that is cancelled before any backend has it, because its compute is still waking, a fence holds it
//! or all backends of a pool are taken: it is thrown away up to its sync point, and the proxy answers in Postgres' place. Pure.

use crate::conversation::{Malformed, is_frontend_tag};
use crate::errors::Said;
use crate::frame::Frame;
use crate::wire::message;

/// A client's turn that is called off, message by message.
#[derive(Debug, Default)]
pub struct CalledOff {
    frame: Frame,
    /// Messages were thrown away that only a `Sync` ends.
    extended: bool,
    /// The client has been told.
    told: bool,
}

/// What a piece of the turn leads to.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// How many bytes belong to the turn.
    pub taken: usize,
    /// What the client is answered.
    pub answer: Vec<u8>,
    /// What comes next.
    pub next: Next,
}

/// What follows a piece of a turn.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// More of it.
    More,
    /// Nothing: the client is as idle as it was before it.
    Over,
    /// The client's own end.
    Terminated,
}

impl CalledOff {
    /// Throws away what belongs to the turn.
    ///
    /// # Errors
    /// If a message cannot be.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Step, Malformed> {
        let (mut rest, mut answer, mut next) = (bytes, Vec::new(), Next::More);
        while next == Next::More {
            let Some(piece) = self.frame.next(&mut rest)? else { break };
            if !is_frontend_tag(piece.tag) {
                return Err(Malformed::Tag(piece.tag));
            }
            match piece.tag {
                b'X' if piece.last => next = Next::Terminated,
                b'S' if piece.last => next = Next::Over,
                // Left over from a copy, or without an answer of its own.
                b'X' | b'S' | b'd' | b'c' | b'f' | b'H' => {}
                tag => {
                    if !std::mem::replace(&mut self.told, true) {
                        Said::called_off().encode(&mut answer);
                    }
                    match tag {
                        b'Q' | b'F' if !self.extended => {
                            if piece.last {
                                next = Next::Over;
                            }
                        }
                        _ => self.extended = true,
                    }
                }
            }
        }
        if next == Next::Over {
            message(&mut answer, b'Z', |body| body.push(b'I'));
        }
        Ok(Step { taken: bytes.len() - rest.len(), answer, next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(script: &str) -> Vec<u8> {
        let mut out = Vec::new();
        script.bytes().for_each(|tag| message(&mut out, tag, |body| body.extend_from_slice(b"abc\0")));
        out
    }

    /// Throws a turn away in pieces; answers the tags of what is said, how much was taken, and whether and how it is over.
    fn play(script: &str, size: usize) -> (String, usize, Next) {
        let (bytes, mut turn) = (encode(script), CalledOff::default());
        let (mut said, mut taken) = (Vec::new(), 0);
        for piece in bytes.chunks(size) {
            let step = turn.take(piece).unwrap();
            said.extend_from_slice(&step.answer);
            taken += step.taken;
            if step.next != Next::More {
                return (tags(&said), taken, step.next);
            }
        }
        (tags(&said), taken, Next::More)
    }

    fn tags(mut bytes: &[u8]) -> String {
        let (mut frame, mut tags) = (Frame::default(), String::new());
        while let Some(piece) = frame.next(&mut bytes).unwrap() {
            tags.push(char::from(piece.tag));
        }
        tags
    }

    #[test]
    fn a_turn_is_answered_as_postgres_answers_one_that_it_cancels() {
        for (script, said, of_it, next) in &[
            ("Q", "EZ", 1, Next::Over),
            ("QQ", "EZ", 1, Next::Over),
            ("F", "EZ", 1, Next::Over),
            ("PBDES", "EZ", 5, Next::Over),
            ("PBDESPBES", "EZ", 5, Next::Over),
            // The client may wait for an answer before it goes on.
            ("PDH", "E", 3, Next::More),
            ("PDHBES", "EZ", 6, Next::Over),
            // After an error all is thrown away up to the sync.
            ("PBEQCS", "EZ", 6, Next::Over),
            ("S", "Z", 1, Next::Over),
            ("HdcQ", "EZ", 4, Next::Over),
            ("X", "", 1, Next::Terminated),
            ("PX", "E", 2, Next::Terminated),
        ] {
            for size in [usize::MAX, 1, 3, 9] {
                let length = encode(&script[..*of_it]).len();
                let (told, taken, then) = play(script, size);
                assert_eq!((&*told, taken, &then), (*said, length, next), "for {script}");
            }
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        assert_eq!(CalledOff::default().take(&encode("!")), Err(Malformed::Tag(b'!')));
        assert!(matches!(CalledOff::default().take(b"Q\0\0\0\0"), Err(Malformed::Length(_))));
    }
}
