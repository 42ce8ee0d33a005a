//! Replication clients are kept while their compute sleeps, and get all that comes after, once.

use ebb_proxy::SessionState;

use crate::harness::{Ebb, PATIENCE, until, value};
use crate::raw::{self, Session};

/// A client that speaks the streaming replication protocol.
struct Follower {
    session: Session,
    /// Up to where it has everything.
    has: u64,
}

fn number(body: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(body[at..at + 8].try_into().unwrap())
}

impl Follower {
    async fn start(ebb: &Ebb, kind: &str, command: &str) -> Self {
        let mut session = Session::open_as(ebb, &format!("replication\0{kind}\0")).await;
        session.exchange(&[(b'Q', b"IDENTIFY_SYSTEM\0")], b"TDCZ").await;
        session.write(&[(b'Q', format!("{command}\0").as_bytes())]).await;
        assert_eq!(session.read().await.0, b'W');
        Self { session, has: 0 }
    }

    async fn confirm(&mut self, reply: bool) {
        let status = [&b"r"[..], &self.has.to_be_bytes().repeat(3), &[0; 8], &[u8::from(reply)]].concat();
        self.session.write(&[(b'd', &status)]).await;
    }

    /// The next message of data; confirms what keepalives tell of.
    async fn data(&mut self) -> Vec<u8> {
        loop {
            let (tag, body) = self.session.read().await;
            match (tag, body.first()) {
                (b'd', Some(b'w')) => return body,
                (b'd', Some(b'k')) => {
                    self.has = self.has.max(number(&body, 1));
                    self.confirm(false).await;
                }
                _ => panic!("unexpected: {tag} {body:?}"),
            }
        }
    }

    /// The changes of one transaction, as `test_decoding` writes them; confirms them.
    async fn transaction(&mut self) -> Vec<String> {
        let mut changes = Vec::new();
        loop {
            let body = self.data().await;
            self.has = self.has.max(number(&body, 1));
            let text = String::from_utf8(body[25..].to_vec()).unwrap();
            match text.split(' ').next() {
                Some("BEGIN") => assert!(changes.is_empty(), "a transaction is sent whole: {changes:?}"),
                Some("COMMIT") => break,
                _ => changes.push(text),
            }
        }
        self.confirm(false).await;
        changes
    }
}

async fn replicating() -> Ebb {
    let ebb = Ebb::asleep().await;
    let writer = ebb.connect().await;
    writer.batch_execute("CREATE TABLE t (a int)").await.unwrap();
    let superuser = ebb.world.superuser().await.unwrap();
    superuser.batch_execute("ALTER ROLE app REPLICATION").await.unwrap();
    superuser.batch_execute("SELECT pg_create_logical_replication_slot('s', 'test_decoding')").await.unwrap();
    superuser.batch_execute("SELECT pg_create_physical_replication_slot('p', true)").await.unwrap();
    drop((writer, superuser));
    until("it has left", || async { ebb.states().is_empty() }).await;
    ebb
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logical_subscriber_gets_what_is_written_after_each_sleep_and_nothing_twice() {
    let ebb = replicating().await;
    let writer = ebb.connect().await;
    let mut follower = Follower::start(&ebb, "database", "START_REPLICATION SLOT s LOGICAL 0/0").await;
    for round in 1..=3 {
        writer.batch_execute(&format!("INSERT INTO t VALUES ({round})")).await.unwrap();
        assert_eq!(follower.transaction().await, [format!("table public.t: INSERT: a[integer]:{round}")]);
        ebb.suspend_when_idle().await;
        assert_eq!(ebb.states(), [SessionState::Hibernated, SessionState::Hibernated]);
        let wakes = ebb.wakes();
        // Its status wakes nothing, and is answered where it wants to be.
        follower.confirm(true).await;
        follower.confirm(true).await;
        for _ in 0..2 {
            let (tag, body) = tokio::time::timeout(PATIENCE, follower.session.read()).await.unwrap();
            assert_eq!((tag, body[0], body.len()), (b'd', b'k', 18));
            assert!(number(&body, 1) >= follower.has);
        }
        assert_eq!((ebb.wakes(), ebb.world.is_running()), (wakes, false));
    }
    // Somebody else's work is what it follows, not a reason to wake.
    writer.batch_execute("INSERT INTO t VALUES (4)").await.unwrap();
    assert_eq!(follower.transaction().await.len(), 1);
    follower.session.write(&[(b'c', b"")]).await;
    let end = follower.session.read_turn().await;
    assert_eq!(end.last(), Some(&b'I'), "the stream ends as it would have");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_gets_wal_without_a_gap() {
    let ebb = replicating().await;
    let writer = ebb.connect().await;
    let start = value(&writer, "SELECT pg_current_wal_lsn()").await;
    let mut follower = Follower::start(&ebb, "true", &format!("START_REPLICATION SLOT p PHYSICAL {start}")).await;
    let mut next = None;
    for round in 1..=3 {
        writer.batch_execute(&format!("INSERT INTO t VALUES ({round})")).await.unwrap();
        let end = value(&writer, "SELECT pg_current_wal_flush_lsn() - '0/0'").await.parse().unwrap();
        while next.unwrap_or(0) < end {
            let body = follower.data().await;
            let begin = number(&body, 1);
            assert_eq!(next.unwrap_or(begin), begin, "in round {round}");
            next = Some(begin + body.len() as u64 - 25);
        }
        ebb.suspend_when_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_history_is_gone_ends_with_the_reason() {
    let ebb = replicating().await;
    let writer = ebb.connect().await;
    let mut follower = Follower::start(&ebb, "database", "START_REPLICATION SLOT s LOGICAL 0/0").await;
    writer.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    follower.transaction().await;
    ebb.suspend_when_idle().await;
    // As after a restore: another cluster, which has neither the slot nor the WAL.
    ebb.world.replace();
    writer.batch_execute("SELECT 1").await.unwrap();
    let words = follower.session.read_to_end().await;
    assert_eq!(raw::code(&words), "08006");
    assert!(String::from_utf8_lossy(&words).contains("history is another one"), "{words:?}");
}
