//! Every kind of message, through the proxy and beside it, whole and in pieces: Postgres is asked the same and answers the
//! same.

use std::time::Duration;

use ebb_proxy::Unreplayable;
use tokio::net::UnixStream;

use crate::harness::{BRANCH, Ebb, PATIENCE, until};
use crate::raw;
use crate::wire::{
    Message, Wire, bind, close, connect, describe, execute, flush, message, parse, query, startup, startup_beside,
    sync, terminate,
};

/// What a client sends, and the kind of message up to which it then reads.
type Turn = (Vec<u8>, u8);

/// All messages a client may send, and among the answers all that a backend may send, but those of replication.
fn turns() -> Vec<Turn> {
    let call = [&177_u32.to_be_bytes()[..], &[0, 0, 0, 2, 0, 0, 0, 1, b'2', 0, 0, 0, 1, b'3', 0, 0]].concat();
    let turn = |messages: &[Vec<u8>], last| (messages.concat(), last);
    vec![
        // Simple queries: rows, several, none, an error, a notice, a parameter, transactions.
        turn(&[query("SELECT 1; SELECT 'two', NULL")], b'Z'),
        turn(&[query("")], b'Z'),
        turn(&[query("SELECT 1/0")], b'Z'),
        turn(&[query("DO 'BEGIN RAISE NOTICE ''heard''; END'")], b'Z'),
        turn(&[query("SET application_name = 'dialogue'"), query("RESET application_name")], b'Z'),
        turn(&[], b'Z'),
        turn(&[query("BEGIN"), query("SELECT 1/0"), query("SELECT 1"), query("ROLLBACK")], b'Z'),
        turn(&[], b'Z'),
        turn(&[], b'Z'),
        turn(&[], b'Z'),
        // The extended protocol: described, bound and run; closed.
        turn(&[parse("s", "SELECT $1::int4 + 1 AS n"), describe('S', "s"), flush()], b'T'),
        turn(&[bind("p", "s", &["41"]), describe('P', "p"), execute("p", 0), close('P', "p"), sync()], b'Z'),
        turn(&[close('S', "s"), close('S', "never"), sync()], b'Z'),
        turn(&[parse("", "SET x.y = 'z'"), describe('S', ""), bind("", "", &[]), execute("", 0), sync()], b'Z'),
        turn(&[parse("", ""), bind("", "", &[]), execute("", 0), sync(), flush()], b'Z'),
        // A portal that is read in parts, with a flush between.
        turn(&[parse("", "SELECT generate_series(1, 5)"), bind("p", "", &[]), execute("p", 2), flush()], b's'),
        turn(&[execute("p", 2), flush()], b's'),
        turn(&[execute("p", 2), sync()], b'Z'),
        // A pipeline with errors in the middle: of what is parsed, of what is run, and what they carry away.
        turn(
            &[
                [parse("", "SELECT 1"), bind("", "", &[]), execute("", 0), sync()].concat(),
                [parse("", "SELEC 2"), bind("", "", &[]), execute("", 0), sync()].concat(),
                [parse("", "SELECT 1/$1::int4"), bind("", "", &["0"]), execute("", 0), execute("", 0), sync()].concat(),
                [parse("", "SELECT 3"), bind("", "", &[]), execute("", 0), sync()].concat(),
            ],
            b'Z',
        ),
        turn(&[], b'Z'),
        turn(&[], b'Z'),
        turn(&[], b'Z'),
        // Copies: in, failed by the client, failed by the server, out; by the extended protocol.
        turn(&[query("TRUNCATE t; COPY t FROM STDIN")], b'G'),
        turn(&[message(b'd', b"1\ta\n2\t"), message(b'd', b"b\n"), flush(), message(b'c', b"")], b'Z'),
        turn(&[query("COPY t FROM STDIN"), message(b'd', b"3\tc\n"), message(b'f', b"not today\0")], b'Z'),
        turn(&[query("COPY t FROM STDIN"), message(b'd', b"no number\tc\n"), message(b'c', b"")], b'Z'),
        turn(&[query("COPY (SELECT * FROM t ORDER BY a) TO STDOUT")], b'Z'),
        turn(&[parse("", "COPY t FROM STDIN"), bind("", "", &[]), execute("", 0), flush()], b'G'),
        turn(&[message(b'd', b"4\td\n"), message(b'c', b""), sync()], b'Z'),
        // A function call, and what others tell.
        turn(&[message(b'F', &call)], b'Z'),
        turn(&[message(b'F', &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0])], b'Z'),
        turn(&[query("LISTEN news; NOTIFY news, 'paper'"), query("UNLISTEN *")], b'Z'),
        turn(&[], b'Z'),
        // Left over from nothing, and ignored.
        turn(&[message(b'd', b"x"), message(b'c', b""), query("SELECT 5")], b'Z'),
    ]
}

/// What a client sees of it all, pids aside.
async fn talk<S>(wire: &mut Wire<S>, size: usize) -> Vec<Message>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut seen = Vec::new();
    for (bytes, last) in turns() {
        wire.write_in_pieces(&bytes, size).await;
        let mut answers = tokio::time::timeout(PATIENCE, wire.read_until(last)).await.expect("an answer comes");
        for (_, body) in answers.iter_mut().filter(|(tag, _)| *tag == b'A') {
            body[..4].fill(0);
        }
        seen.append(&mut answers);
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_gets_the_answer_that_postgres_gives_however_it_is_cut() {
    let ebb = Ebb::asleep().await;
    ebb.connect().await.batch_execute("CREATE TABLE t (a int, b text)").await.unwrap();
    let beside = UnixStream::connect(ebb.world.socket()).await.unwrap();
    let mut beside = Wire::start(beside, &startup_beside(0, &[])).await;
    let expected = talk(&mut beside, usize::MAX).await;
    let kinds: std::collections::BTreeSet<_> = expected.iter().map(|(tag, _)| char::from(*tag)).collect();
    assert_eq!(kinds.into_iter().collect::<String>(), "123ACDEGHINSTVZcdnst");

    let mut wires = Vec::new();
    for size in [usize::MAX, 1, 2, 3, 7, 64] {
        let mut wire = Wire::start_in_pieces(connect(&ebb).await, &startup(0, &[]), size).await;
        assert!(talk(&mut wire, size).await == expected, "in pieces of {size} bytes the answers differ");
        wires.push(wire);
    }
    // The proxy knows where they all stand now: at rest.
    ebb.suspend_when_idle().await;
    for wire in &mut wires {
        assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
        wire.write_in_pieces(&terminate(), 2).await;
        assert_eq!(wire.rest().await, b"");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_falls_anywhere_into_a_turn_changes_no_answer() {
    let ebb = Ebb::asleep().await;
    let mut wire = Wire::open(&ebb).await;
    wire.ask(&query("CREATE TABLE t (a int, b text)")).await;
    for (turn, expect) in [
        (query("SELECT 'simple'"), "TDCZ"),
        ([parse("", "SELECT 'extended'"), bind("", "", &[]), execute("", 0), sync()].concat(), "12DCZ"),
        ([query("COPY t FROM STDIN"), message(b'd', b"1\ta\n"), message(b'c', b"")].concat(), "GCZ"),
    ] {
        // At each third byte: over three turns of different lengths, all places in a header occur.
        for at in (0..turn.len()).step_by(3) {
            wire.write(&turn[..at]).await;
            let handle = ebb.handle.clone();
            let fence = tokio::spawn(async move { handle.fence(BRANCH, PATIENCE, Unreplayable::End).await });
            // Whether the fence or the rest of the turn comes first is left to chance.
            tokio::task::yield_now().await;
            wire.write(&turn[at..]).await;
            fence.await.unwrap().unwrap();
            ebb.handle.release(BRANCH);
            let answers = tokio::time::timeout(PATIENCE, wire.read_until(b'Z')).await.expect("an answer comes");
            let tags: String = answers.iter().map(|(tag, _)| char::from(*tag)).collect();
            assert_eq!(tags, expect, "after a fence at byte {at}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_in_the_middle_of_a_turn_are_told_and_end_the_session() {
    let ebb = Ebb::asleep().await;
    for odd in [&b"\0\0\0\0\x04"[..], b"z\0\0\0\x04", b"P\0\0\0\x03", b"d\x7f\xff\xff\xff", b"R\0\0\0\x08\0\0\0\0"] {
        for before in [vec![], [parse("", "SELECT 1"), bind("", "", &[])].concat(), query("SELECT pg_sleep(600)")] {
            let mut wire = Wire::open(&ebb).await;
            wire.write(&[&before[..], odd].concat()).await;
            let rest = tokio::time::timeout(PATIENCE, wire.rest()).await.expect("the session ends");
            assert_eq!(raw::code(&rest), "08P01", "for {odd:?}");
        }
    }
    // What only Postgres can know to be wrong, Postgres says.
    let mut wire = Wire::open(&ebb).await;
    let (tags, bodies) = wire.ask(&[parse("", "SELECT 1"), message(b'B', b"\0\0\0\x09"), sync()].concat()).await;
    assert_eq!((&*tags, raw::code(&bodies)), ("1EZ", "08P01".to_owned()));
    let (tags, _) = wire.ask(&query("SELECT 1")).await;
    assert_eq!(tags, "TDCZ");
    until("the others have left", || async { ebb.states().len() == 1 }).await;
    let superuser = ebb.world.superuser().await.unwrap();
    until("no backend sleeps on", || async {
        let sleeping = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        crate::harness::value(&superuser, sleeping).await == "0"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_in_the_middle_of_a_message_holds_nobody_up() {
    let ebb = Ebb::asleep().await;
    let mut stuck = Wire::open(&ebb).await;
    stuck.write(&query("SELECT 'half'")[..8]).await;
    let mut other = Wire::open(&ebb).await;
    assert_eq!(other.ask(&query("SELECT 1")).await.0, "TDCZ");
    // It is refused to a suspend, and ended by a fence that does not wait for ever.
    until("a suspend is refused", || async { ebb.suspend().await.is_err() }).await;
    ebb.handle.fence(BRANCH, Duration::from_millis(100), Unreplayable::End).await.unwrap();
    ebb.handle.release(BRANCH);
    assert_eq!(raw::code(&stuck.rest().await), "57P01");
    assert_eq!(other.ask(&query("SELECT 1")).await.0, "TDCZ");
}
