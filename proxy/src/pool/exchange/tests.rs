//! Two clients in turns on two backends, against each of them alone on its own: answers must be the same, message by
//! message. Postgres is played by [`Server`], which knows of statements what matters here; `proxy/tests/proxy/pool_names.rs`
//! does the same with the real one.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::pool::names::{Held, PER_BACKEND_MAX};
use crate::wire::{Fields, cstr, message};

/// A server that runs no SQL: a text that begins with `bad` cannot be parsed, what is run is told by its text.
#[derive(Default)]
struct Server {
    statements: HashMap<Vec<u8>, Vec<u8>>,
    portal: Option<Vec<u8>>,
    skips: bool,
    input: Vec<u8>,
}

impl Server {
    /// Takes bytes, answers bytes.
    fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.input.extend_from_slice(bytes);
        let mut out = Vec::new();
        while let Some(length) = self.input.get(1..5).map(|head| u32::from_be_bytes(head.try_into().unwrap()) as usize)
        {
            if self.input.len() < length + 1 {
                break;
            }
            let message: Vec<u8> = self.input.drain(..length + 1).collect();
            self.message(message[0], &message[5..], &mut out);
        }
        out
    }

    fn message(&mut self, tag: u8, body: &[u8], out: &mut Vec<u8>) {
        let mut fields = Fields(body);
        if tag == b'S' {
            self.skips = false;
            return self.ready(out);
        }
        if self.skips {
            return;
        }
        let result = match tag {
            b'P' => self.parse(fields.cstr().unwrap(), fields.cstr().unwrap()).map(|()| answer(out, b'1', b"")),
            b'B' => {
                let _ = fields.cstr();
                self.find(fields.cstr().unwrap()).map(|text| {
                    self.portal = Some(text);
                    answer(out, b'2', b"");
                })
            }
            b'D' => {
                let kind = fields.bytes(1).unwrap()[0];
                let found = if kind == b'S' {
                    self.find(fields.cstr().unwrap())
                } else {
                    self.portal.clone().ok_or(MISSING.into())
                };
                found.map(|text| answer(out, b'T', &text))
            }
            b'E' => match self.portal.clone() {
                Some(text) => self.run(&text, out),
                None => Err(MISSING.into()),
            },
            b'C' => {
                let kind = fields.bytes(1).unwrap()[0];
                if kind == b'S' {
                    self.statements.remove(fields.cstr().unwrap());
                }
                answer(out, b'3', b"");
                Ok(())
            }
            b'Q' => {
                self.statements.remove(&b""[..]);
                let result = self.run(fields.cstr().unwrap(), out);
                if let Err(why) = &result {
                    answer(out, b'E', why);
                }
                return self.ready(out);
            }
            b'H' => Ok(()),
            _ => panic!("a message {}", tag as char),
        };
        if let Err(why) = result {
            self.skips = true;
            answer(out, b'E', &why);
        }
    }

    fn ready(&mut self, out: &mut Vec<u8>) {
        self.portal = None;
        answer(out, b'Z', b"I");
    }

    fn parse(&mut self, name: &[u8], text: &[u8]) -> Result<(), Vec<u8>> {
        if name.is_empty() {
            self.statements.remove(name);
        }
        if text.starts_with(b"bad") {
            return Err([b"cannot parse ", text].concat());
        }
        if self.statements.contains_key(name) {
            return Err([b"taken ", name].concat());
        }
        self.statements.insert(name.to_vec(), text.to_vec());
        Ok(())
    }

    fn find(&self, name: &[u8]) -> Result<Vec<u8>, Vec<u8>> {
        self.statements.get(name).cloned().ok_or_else(|| [b"missing ", name].concat())
    }

    fn run(&mut self, text: &[u8], out: &mut Vec<u8>) -> Result<(), Vec<u8>> {
        if text.starts_with(b"fails") {
            return Err([b"failed ", text].concat());
        }
        let mut tag = text.to_vec();
        if text == b"DISCARD ALL" {
            self.statements.clear();
        } else if let Some(name) = text.strip_prefix(b"DEALLOCATE ") {
            self.find(name)?;
            self.statements.remove(name);
            tag = b"DEALLOCATE".to_vec();
        } else if text.starts_with(b"SET") {
            tag = b"SET".to_vec();
        }
        tag.push(0);
        answer(out, b'C', &tag);
        Ok(())
    }
}

const MISSING: &[u8] = b"no portal";

fn answer(out: &mut Vec<u8>, tag: u8, body: &[u8]) {
    message(out, tag, |out| out.extend_from_slice(body));
}

struct Someone {
    names: Names,
    conversation: Conversation,
    alone: Server,
}

#[derive(Default)]
struct Behind {
    server: Server,
    held: Held,
    exchange: Exchange,
    last: usize,
}

/// Sends bytes through an exchange, in pieces of at most `size`, and answers what comes back.
fn relay(someone: &mut Someone, behind: &mut Behind, texts: &Texts, bytes: &[u8], size: usize, same: bool) -> Vec<u8> {
    behind.exchange.begin(same, 0);
    let (mut answers, mut pending, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
    let (mut at, mut back) = (0, Vec::new());
    loop {
        let mut moved = false;
        let take = (bytes.len() - at).min(size);
        pending.extend_from_slice(&bytes[at..at + take]);
        at += take;
        moved |= take > 0;
        let mut client = Client { names: &mut someone.names, conversation: &mut someone.conversation, texts, dress: 0 };
        let mut out = Vec::new();
        let (taken, _) = behind.exchange.up(&mut client, &mut behind.held, &pending, &mut out, false).unwrap();
        pending.drain(..taken);
        moved |= taken > 0;
        // Answers come late: first those to what was sent before.
        let take = back.len().min(size);
        waiting.extend(back.drain(..take));
        back.extend(behind.server.feed(&out));
        moved |= take > 0;
        let (kept, read) = behind
            .exchange
            .down(&mut someone.names, &mut someone.conversation, &mut behind.held, &mut waiting)
            .unwrap();
        answers.extend_from_slice(&waiting[..kept]);
        waiting.drain(..read);
        if !moved && back.is_empty() {
            assert!(pending.is_empty(), "the client is held up for ever");
            break;
        }
    }
    assert!(waiting.is_empty() && someone.conversation.is_at_rest() && behind.exchange.is_clear());
    answers
}

fn readable(bytes: &[u8]) -> Vec<String> {
    let mut rest = bytes;
    let mut messages = Vec::new();
    while let [tag, a, b, c, d, tail @ ..] = rest {
        let (body, after) = tail.split_at(u32::from_be_bytes([*a, *b, *c, *d]) as usize - 4);
        messages.push(format!("{} {}", *tag as char, String::from_utf8_lossy(body)));
        rest = after;
    }
    messages
}

#[derive(Debug, Clone)]
enum Step {
    Parse(u8, u8),
    Bind(u8),
    Describe(u8),
    DescribePortal,
    Execute,
    Close(u8),
    ClosePortal,
    Flush,
    Sync,
    Query(u8),
}

/// Few names, so that they meet; `""` is the unnamed statement, and one looks like the proxy's own.
const NAMES: [&str; 5] = ["", "a", "b", "S_1", "__ebb_0"];
const TEXTS: [&str; 5] = ["one", "two", "bad", "fails", "SET x"];
const QUERIES: [&str; 7] = ["q", "fails", "DEALLOCATE a", "DEALLOCATE b", "DEALLOCATE nobody", "DISCARD ALL", "SET x"];

fn step() -> impl Strategy<Value = Step> {
    let name = || 0..NAMES.len() as u8;
    prop_oneof![
        6 => (name(), 0..TEXTS.len() as u8).prop_map(|(name, text)| Step::Parse(name, text)),
        6 => name().prop_map(Step::Bind),
        2 => name().prop_map(Step::Describe),
        1 => Just(Step::DescribePortal),
        4 => Just(Step::Execute),
        2 => name().prop_map(Step::Close),
        1 => Just(Step::ClosePortal),
        1 => Just(Step::Flush),
        6 => Just(Step::Sync),
        2 => (0..QUERIES.len() as u8).prop_map(Step::Query),
    ]
}

fn encode(steps: &[Step]) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut unsynced, mut unnamed) = (false, false);
    for step in steps {
        // A query in the middle of a batch: Postgres takes it, but no driver does it, and its answer may be skipped.
        if matches!(step, Step::Query(_)) && unsynced {
            message(&mut out, b'S', |_| {});
        }
        unsynced = !matches!(step, Step::Query(_) | Step::Sync);
        // Of an unnamed statement that was skipped behind an error, another backend does not know the one before.
        unnamed = unsynced && (unnamed || matches!(step, Step::Parse(0, _)));
        if matches!(step, Step::Bind(0) | Step::Describe(0)) && !unnamed {
            continue;
        }
        let statement = |name: u8, out: &mut Vec<u8>| {
            out.push(b'S');
            cstr(out, NAMES[name as usize]);
        };
        match step {
            Step::Parse(name, text) => message(&mut out, b'P', |out| {
                cstr(out, NAMES[*name as usize]);
                cstr(out, TEXTS[*text as usize]);
                out.extend_from_slice(&[0, 0]);
            }),
            Step::Bind(name) => message(&mut out, b'B', |out| {
                cstr(out, "");
                cstr(out, NAMES[*name as usize]);
                out.extend_from_slice(&[0; 6]);
            }),
            Step::Describe(name) => message(&mut out, b'D', |out| statement(*name, out)),
            Step::DescribePortal => message(&mut out, b'D', |out| out.extend_from_slice(b"P\0")),
            Step::Execute => message(&mut out, b'E', |out| out.extend_from_slice(&[0; 5])),
            Step::Close(name) => message(&mut out, b'C', |out| statement(*name, out)),
            Step::ClosePortal => message(&mut out, b'C', |out| out.extend_from_slice(b"P\0")),
            Step::Flush => message(&mut out, b'H', |_| {}),
            Step::Sync => message(&mut out, b'S', |_| {}),
            Step::Query(text) => message(&mut out, b'Q', |out| cstr(out, QUERIES[*text as usize])),
        }
    }
    message(&mut out, b'S', |_| {});
    out
}

struct Scene {
    texts: Texts,
    clients: [Someone; 2],
    backends: [Behind; 2],
}

impl Scene {
    fn new() -> Self {
        let someone =
            || Someone { names: Names::default(), conversation: Conversation::new(), alone: Server::default() };
        Self { texts: Texts::default(), clients: [someone(), someone()], backends: Default::default() }
    }

    /// One client's messages on one backend; answers what it saw, and what it would have seen alone.
    fn play(&mut self, client: usize, backend: usize, bytes: &[u8], size: usize) -> (Vec<String>, Vec<String>) {
        let (someone, behind) = (&mut self.clients[client], &mut self.backends[backend]);
        let direct = someone.alone.feed(bytes);
        let same = std::mem::replace(&mut behind.last, client + 1) == client + 1;
        let pooled = relay(someone, behind, &self.texts, bytes, size, same);
        if behind.exchange.spoilt {
            *behind = Behind::default();
        }
        // Such names are sent under others: that alone shows in the words of an error.
        let same_words =
            |messages: Vec<String>| messages.into_iter().map(|words| words.replace("client:", "")).collect();
        (same_words(readable(&pooled)), readable(&direct))
    }
}

proptest! {
    #[test]
    fn through_a_pool_clients_see_what_they_would_see_alone(
        turns in prop::collection::vec((0..2_usize, 0..2_usize, prop::collection::vec(step(), 1..12)), 1..12),
        size in 1_usize..200,
    ) {
        let mut scene = Scene::new();
        for (client, backend, steps) in turns {
            let (pooled, direct) = scene.play(client, backend, &encode(&steps), size);
            prop_assert_eq!(pooled, direct, "client {} on backend {}: {:?}", client, backend, steps);
        }
    }
}

fn check(steps: &[Step]) {
    let mut scene = Scene::new();
    for (client, backend) in [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0)] {
        let (pooled, direct) = scene.play(client, backend, &encode(steps), 1 << 16);
        assert_eq!(pooled, direct, "client {client} on backend {backend}");
    }
}

#[test]
fn batches_that_drivers_send() {
    use Step::{Bind, Close, Describe, Execute, Flush, Parse, Query, Sync};
    check(&[Parse(1, 0), Describe(1), Flush, Bind(1), Execute, Sync]);
    check(&[Parse(1, 0), Sync, Bind(1), Execute, Sync, Close(1)]);
    check(&[Parse(1, 2), Bind(1), Execute, Sync, Parse(1, 0), Bind(1), Execute]);
    check(&[Parse(1, 0), Parse(1, 1), Parse(2, 1), Sync, Bind(2), Bind(1), Execute]);
    check(&[Parse(1, 0), Bind(1), Execute, Sync, Query(2), Bind(1), Execute]);
    check(&[Parse(1, 0), Sync, Parse(1, 2), Sync, Query(5), Bind(1), Execute]);
}

#[test]
fn the_unnamed_statement_goes_with_its_client_and_to_nobody_else() {
    let parse = encode(&[Step::Parse(0, 0)]);
    let mut bind = Vec::new();
    message(&mut bind, b'B', |out| out.extend_from_slice(&[0; 8]));
    message(&mut bind, b'S', |_| {});
    let mut scene = Scene::new();
    for (client, backend, bytes) in
        [(0, 0, &parse), (1, 0, &bind), (0, 0, &bind), (0, 1, &bind), (1, 1, &bind), (0, 1, &bind)]
    {
        let (pooled, direct) = scene.play(client, backend, bytes, 1 << 16);
        assert_eq!(pooled, direct, "client {client} on backend {backend}");
    }
}

#[test]
fn a_deallocate_of_the_extended_protocol_gives_up_the_clients_statement() {
    let mut bytes = encode(&[Step::Parse(1, 0)]);
    message(&mut bytes, b'P', |out| out.extend_from_slice(b"\0DEALLOCATE a\0\0\0"));
    message(&mut bytes, b'B', |out| out.extend_from_slice(&[0; 8]));
    message(&mut bytes, b'E', |out| out.extend_from_slice(&[0; 5]));
    bytes.extend_from_slice(&encode(&[Step::Sync, Step::Bind(1)]));
    let mut scene = Scene::new();
    let (pooled, direct) = scene.play(0, 0, &bytes, 1 << 16);
    assert_eq!(pooled, direct);
}

#[test]
fn a_backend_holds_no_more_statements_than_it_may() {
    let mut scene = Scene::new();
    for round in 0..2 {
        for i in 0..PER_BACKEND_MAX + 20 {
            let mut bytes = Vec::new();
            if round == 0 {
                message(&mut bytes, b'P', |out| out.extend_from_slice(format!("n{i}\0text {i}\0\0\0").as_bytes()));
            }
            message(&mut bytes, b'B', |out| out.extend_from_slice(format!("\0n{i}\0\0\0\0\0\0\0").as_bytes()));
            message(&mut bytes, b'E', |out| out.extend_from_slice(&[0; 5]));
            message(&mut bytes, b'S', |_| {});
            let (pooled, direct) = scene.play(0, 0, &bytes, 1 << 16);
            assert_eq!(pooled, direct);
            assert!(scene.backends[0].server.statements.len() <= PER_BACKEND_MAX);
        }
    }
}

#[test]
fn what_lasts_is_noted() {
    let touched = |steps: &[Step]| {
        let mut scene = Scene::new();
        scene.play(0, 0, &encode(steps), 1 << 16);
        scene.backends[0].exchange.is_touched(false)
    };
    assert!(touched(&[Step::Query(6)]));
    assert!(touched(&[Step::Parse(1, 4), Step::Bind(1), Step::Execute]));
    assert!(!touched(&[Step::Parse(1, 4), Step::Bind(1)]));
    assert!(!touched(&[Step::Query(0), Step::Parse(0, 0), Step::Bind(0), Step::Execute]));
}
