use proptest::prelude::*;

use super::*;
use crate::wire::{cstr, message};

/// Plays a script: `>` client messages, `<` server messages, one letter each; `i` and `t` are ReadyForQuery idle and
/// in a transaction. Answers whether the session is at rest at the end.
fn at_rest(script: &str) -> bool {
    play(script).is_at_rest()
}

fn play(script: &str) -> Conversation {
    let mut conversation = Conversation::new();
    let mut from_client = true;
    for letter in script.chars() {
        match letter {
            '>' => from_client = true,
            '<' => from_client = false,
            ' ' => {}
            _ if from_client => {
                let bytes = encode(letter as u8, b"x\0\0\0");
                assert_eq!(conversation.client_sent(&bytes, false), Ok(bytes.len()));
            }
            'i' => conversation.server_sent(&encode(b'Z', b"I")).unwrap(),
            't' => conversation.server_sent(&encode(b'Z', b"T")).unwrap(),
            _ => conversation.server_sent(&encode(letter as u8, b"x\0")).unwrap(),
        }
    }
    conversation
}

fn encode(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    message(&mut out, tag, |out| out.extend_from_slice(body));
    out
}

fn check(script: &str, expect: bool) {
    assert_eq!(at_rest(script), expect, "for {script:?}");
}

#[test]
fn queries_rest_when_answered() {
    check("", true);
    check(">Q", false);
    check(">Q <TDC", false);
    check(">Q <TDCi", true);
    check(">Q <Ct", false);
    check(">Q <Ct >Q <Ci", true);
    check(">PBDES", false);
    check(">PBDES <12TDCi", true);
    check(">PBE <12", false);
    check(">PBEH <12C", false);
    check(">PBES PBES <12Ci", false);
    check(">PBES PBES <12Ci 12Ci", true);
    check(">S <i", true);
    check(">F <Vi", true);
    check(">Q <E", false);
    check(">Q <Ei", true);
    check("<ANS", true);
}

#[test]
fn copies_by_simple_query() {
    check(">Q <G", false);
    check(">Q <G >dd", false);
    check(">Q <G >ddc", false);
    check(">Q <G >ddc <C", false);
    check(">Q <G >ddc <Ci", true);
    check(">Q <G >df <Ei", true);
    check(">Q <G >d <E >dc <i", true);
    check(">Q <G >d <Ei >dc", true);
    check(">Q <G >ddc <C G >dc <Ci", true);
    check(">Q <HddcCi", true);
}

#[test]
fn copies_by_execute_lose_the_sync_that_falls_into_them() {
    // As libpq and tokio-postgres do it.
    check(">BES <2G", false);
    check(">BES <2G >ddc", false);
    check(">BES <2G >ddc <C", false);
    check(">BES <2G >ddcS <C", false);
    check(">BES <2G >ddcS <Ci", true);
    // The sync arrives while the server is copying.
    check(">BEH <2G >SddcS <Ci", true);
    // All in one go.
    check(">PBEddcS <12G", false);
    check(">PBEddcS <12GC", false);
    check(">PBEddcS <12GCi", true);
    check(">PBESddcS <12GCi", true);
    check(">Q PBESddcS <Ci 12GCi", true);
}

#[test]
fn a_failed_copy_leaves_doubt_until_the_stream_itself_clears_it() {
    // The server failed while copying: it had thrown the first Sync away.
    check(">BES <2G >dd <E >cS <i", false);
    check(">BES <2G >dd <E >cS <i >Q <C", false);
    check(">BES <2G >dd <E >cS <i >Q <Ci", true);
    // The server failed before it read the first Sync: one ReadyForQuery more.
    check(">BES <2GE >cS <i", false);
    check(">BES <2GE >cS <ii", true);
    check(">BES <2GE >cS <i >Q <i", false);
    check(">BES <2GE >cS <i >Q <i Ci", true);
    check(">BES <2GE >cS <i >PBES <i", false);
    check(">BES <2GE >cS <i >PBES <i12Ci", true);
    check(">BES <2GE <i >cS <i", true);
    // Of three, the second and third came behind the failure.
    check(">BESdSS <2GE", false);
    check(">BESdSS <2GE i", false);
    check(">BESdSS <2GE i i", false);
    check(">BESdSS <2GE i i >Q <Ci", true);
}

#[test]
fn what_has_no_place_in_a_copy_is_not_followed_any_further() {
    // The server fails at the message, and what else was sent is read as if there had been no copy.
    check(">Q <G >PBES <E i", false);
    check(">Q <G >PBES <E i 12Ci", false);
    // Sent before the client could know of the copy.
    check(">Q PBES <G E i", false);
    check(">Q PBES <G E i 2Ci", false);
    check(">Q PB <G E i >ES <2Ci", false);
    check(">BES PBES <2G", false);
    // Behind its end all has its place.
    check(">Q <G >dc PBES <Ci 12Ci", true);
    check(">Q dc PBES <G Ci 12Ci", true);
}

#[test]
fn one_turn_stops_at_each_sync_point() {
    let mut conversation = Conversation::new();
    let turns = [encode(b'Q', b"select 1\0"), [encode(b'P', b"\0x\0\0\0"), encode(b'S', b"")].concat()];
    let bytes = [&turns[0][..], &turns[1], &turns[0][..4]].concat();
    assert_eq!(conversation.client_sent(&bytes, true), Ok(turns[0].len()));
    assert!(!conversation.wants_client());
    let rest = &bytes[turns[0].len()..];
    assert_eq!(conversation.client_sent(rest, true), Ok(turns[1].len()));
    assert_eq!(conversation.client_sent(&rest[turns[1].len()..], true), Ok(4));
    assert!(!conversation.is_at_rest());
}

#[test]
fn endless_pipelining_is_held_back() {
    let mut conversation = Conversation::new();
    let bytes = encode(b'S', b"").repeat(AWAITING_MAX + 10);
    assert_eq!(conversation.client_sent(&bytes, false), Ok(5 * AWAITING_MAX));
    conversation.server_sent(&encode(b'Z', b"I")).unwrap();
    assert_eq!(conversation.client_sent(&bytes[5 * AWAITING_MAX..], false), Ok(5));
}

#[test]
fn unknown_messages_are_refused() {
    let mut conversation = Conversation::new();
    assert_eq!(conversation.client_sent(&encode(b'!', b""), false), Err(Malformed::Tag(b'!')));
    assert!(matches!(Conversation::new().client_sent(b"Q\0\0\0\0", false), Err(Malformed::Length(_))));
}

#[test]
fn the_unnamed_statement_is_remembered_while_it_lives() {
    let parse = |name: &str, text: &str| {
        let mut body = Vec::new();
        cstr(&mut body, name);
        cstr(&mut body, text);
        body.extend_from_slice(&[0, 0]);
        body
    };
    // Whole, and byte by byte.
    for size in [usize::MAX, 1] {
        let mut conversation = Conversation::new();
        let mut send = |tag, body: &[u8]| {
            for chunk in encode(tag, body).chunks(size) {
                conversation.client_sent(chunk, false).unwrap();
            }
            conversation.unnamed_statement().map(|kept| kept.map(<[u8]>::to_vec))
        };
        let short = parse("", "select 1");
        assert_eq!(send(b'P', &short), Ok(Some(short.clone())));
        assert_eq!(send(b'P', &parse("named", "select 2")), Ok(Some(short.clone())));
        assert_eq!(send(b'C', b"S\0"), Ok(None));
        assert_eq!(send(b'P', &short), Ok(Some(short)));
        assert_eq!(send(b'Q', b"select 1\0"), Ok(None));
        assert_eq!(send(b'P', &parse("", &"x".repeat(TEXT_MAX))), Err(TooLong));
        assert_eq!(send(b'B', b"named\0\0\0\0\0\0\0\0"), Err(TooLong));
        assert_eq!(send(b'C', b"S"), Err(TooLong));
        assert_eq!(send(b'C', b"Sx\0"), Err(TooLong));
        assert_eq!(send(b'C', b"P\0"), Err(TooLong));
        assert_eq!(send(b'B', b"\0\0\0\0\0\0\0\0"), Ok(None));
    }
}

#[test]
fn parameters_told_by_the_server_are_known() {
    let mut conversation = Conversation::new();
    let body = b"TimeZone\0UTC\0";
    for chunk in encode(b'S', body).chunks(3) {
        conversation.server_sent(chunk).unwrap();
    }
    assert!(!conversation.note_parameter(b"TimeZone", b"UTC"));
    assert!(conversation.note_parameter(b"TimeZone", b"CET"));
}

/// One exchange of a client and a server that behave: what is sent, what is answered.
fn exchange() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let select = (encode(b'Q', b"SET a.b = 1\0"), [encode(b'C', b"SET\0"), encode(b'Z', b"I")].concat());
    let extended = (
        [encode(b'P', b"\0select 1\0\0\0"), encode(b'B', &[0; 8]), encode(b'E', &[0; 5]), encode(b'S', b"")].concat(),
        [encode(b'1', b""), encode(b'2', b""), encode(b'D', &[0; 30]), encode(b'C', b"x\0"), encode(b'Z', b"I")]
            .concat(),
    );
    let failing = (encode(b'Q', b"oops\0"), [encode(b'E', b"SERROR\0\0"), encode(b'Z', b"I")].concat());
    prop_oneof![Just(select), Just(extended), Just(failing)]
}

proptest! {
    #[test]
    fn pieces_do_not_matter_and_every_answered_exchange_rests(
        exchanges in prop::collection::vec(exchange(), 1..8),
        size in 1_usize..30,
    ) {
        let mut conversation = Conversation::new();
        for (asked, answered) in &exchanges {
            for chunk in asked.chunks(size) {
                prop_assert_eq!(conversation.client_sent(chunk, false), Ok(chunk.len()));
                prop_assert!(!conversation.is_at_rest());
            }
            for (at, chunk) in answered.chunks(size).enumerate() {
                prop_assert!(!conversation.is_at_rest(), "at rest before piece {}", at);
                conversation.server_sent(chunk).unwrap();
            }
            prop_assert!(conversation.is_at_rest());
        }
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), size in 1_usize..40) {
        let mut conversation = Conversation::new();
        for chunk in bytes.chunks(size) {
            let _ = conversation.client_sent(chunk, false);
            let _ = conversation.server_sent(chunk);
        }
    }
}
