use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::*;
use crate::startup::CancelKey;

const PATIENCE: Duration = Duration::from_secs(10);

fn pool(size: usize) -> Arc<Pool> {
    let pool = Pool::new();
    pool.set_size(Some(size));
    pool
}

/// A backend that nobody is behind; what keeps its socket open.
fn backend(key: &Arc<Key>, slot: Slot, conn: u64) -> (Box<Pooled>, UnixStream) {
    let (stream, other) = std::os::unix::net::UnixStream::pair().unwrap();
    let [stream, other] = [stream, other].map(|socket| {
        socket.set_nonblocking(true).unwrap();
        UnixStream::from_std(socket).unwrap()
    });
    let started = Backend {
        stream,
        key: CancelKey { id: 0, secret: Box::default() },
        parameters: Vec::new(),
        notices: Vec::new(),
    };
    let awake = Awake { generation: 1, socket: "/none".into(), admits: None };
    (Box::new(Pooled::new(awake, started, key.clone(), Box::default(), slot, conn)), other)
}

fn slot(asked: Result<Grant, Waiting>) -> Slot {
    match asked {
        Ok(Grant::Slot(slot)) => slot,
        Ok(Grant::Backend(_)) => panic!("a backend, not a slot"),
        Err(_) => panic!("the queue, not a slot"),
    }
}

fn waits(asked: Result<Grant, Waiting>) -> Waiting {
    asked.err().expect("it has to wait")
}

async fn turn(waiting: &mut Waiting) -> Grant {
    timeout(PATIENCE, waiting.granted()).await.expect("its turn comes")
}

#[tokio::test]
async fn who_asked_first_is_served_first() {
    let pool = pool(1);
    let key = pool.key(b"a".to_vec());
    let (mut first, _peer) = backend(&key, slot(pool.ask(1, &key)), 1);
    let mut queue: Vec<_> = (2..20).map(|conn| (conn, waits(pool.ask(conn, &key)))).collect();
    assert!(pool.is_contended());
    for (conn, waiting) in &mut queue {
        first.last = *conn;
        pool.give_back(first);
        let Grant::Backend(backend) = turn(waiting).await else { panic!("the same backend goes round") };
        first = backend;
    }
    assert!(!pool.is_contended());
}

#[tokio::test]
async fn whoever_leaves_the_queue_or_drops_a_backend_holds_nobody_up() {
    let pool = pool(1);
    let key = pool.key(b"a".to_vec());
    let (first, _peer) = backend(&key, slot(pool.ask(1, &key)), 1);
    let (gone, mut stays, mut last) = (waits(pool.ask(2, &key)), waits(pool.ask(3, &key)), waits(pool.ask(4, &key)));
    drop(gone);
    pool.give_back(first);
    let grant = turn(&mut stays).await;
    drop(grant);
    // A backend that is dropped leaves its slot.
    assert!(matches!(turn(&mut last).await, Grant::Slot(_)));
    // A grant that nobody took goes on, too.
    let (again, _peer) = backend(&key, slot(pool.ask(5, &key)), 5);
    let (granted, mut next) = (waits(pool.ask(6, &key)), waits(pool.ask(7, &key)));
    pool.give_back(again);
    drop(granted);
    assert!(matches!(turn(&mut next).await, Grant::Slot(_)));
    drop(next);
    let _ = slot(pool.ask(8, &key));
}

#[tokio::test]
async fn an_idle_backend_of_others_makes_room_and_ones_own_is_preferred() {
    let pool = pool(2);
    let (a, b) = (pool.key(b"a".to_vec()), pool.key(b"b".to_vec()));
    assert!(Arc::ptr_eq(&a, &pool.key(b"a".to_vec())));
    let (first, _peer) = backend(&a, slot(pool.ask(1, &a)), 1);
    let (second, mut closed) = backend(&a, slot(pool.ask(2, &a)), 2);
    pool.give_back(second);
    pool.give_back(first);
    let Ok(Grant::Backend(own)) = pool.ask(2, &a) else { panic!("its own is idle") };
    assert_eq!(own.last, 2);
    pool.give_back(own);
    // The one that has not been used for longest goes: that of connection 1.
    let slot = slot(pool.ask(3, &b));
    let Ok(Grant::Backend(left)) = pool.ask(4, &a) else { panic!("one is left") };
    assert_eq!(left.last, 2);
    drop((left, slot));
    let mut word = [0; 5];
    closed.read_exact(&mut word).await.unwrap();
    assert_eq!(word, TERMINATE);
}

#[tokio::test]
async fn others_pass_for_a_while_where_no_new_backend_is_needed_but_not_for_ever() {
    let pool = pool(1);
    let (a, b) = (pool.key(b"a".to_vec()), pool.key(b"b".to_vec()));
    let (mut turning, _peer) = backend(&a, slot(pool.ask(1, &a)), 1);
    let mut other = waits(pool.ask(2, &b));
    let begun = Instant::now();
    let mut passed = 0;
    loop {
        let mut same = waits(pool.ask(3, &a));
        pool.give_back(turning);
        tokio::select! {
            biased;
            grant = same.granted() => {
                let Grant::Backend(backend) = grant else { panic!("it is of the same key") };
                turning = backend;
                passed += 1;
            }
            grant = other.granted() => {
                assert!(matches!(grant, Grant::Slot(_)), "it needs a backend of its own");
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(passed > 0 && begun.elapsed() >= PASSED_OVER_MAX);
}

#[tokio::test]
async fn a_pool_that_shrinks_or_grows_follows() {
    let pool = pool(1);
    let key = pool.key(b"a".to_vec());
    let (first, _peer) = backend(&key, slot(pool.ask(1, &key)), 1);
    let mut waiting = waits(pool.ask(2, &key));
    pool.set_size(Some(2));
    let Grant::Slot(second) = turn(&mut waiting).await else { panic!("there is room now") };
    pool.set_size(Some(1));
    let mut waiting = waits(pool.ask(3, &key));
    // One of the two is too many: it is not passed on.
    drop(second);
    pool.give_back(first);
    assert!(matches!(turn(&mut waiting).await, Grant::Backend(_)));
}

#[test]
fn the_size_is_set_or_derived_from_what_postgres_takes() {
    let pool = Pool::new();
    assert!(pool.wants_size());
    pool.learn(120);
    assert_eq!(pool.size(), 30);
    pool.set_size(Some(7));
    pool.learn(120);
    assert_eq!(pool.size(), 7);
    pool.set_size(None);
    assert!(pool.wants_size());
    pool.learn(2);
    assert_eq!(pool.size(), 1);
}

#[test]
fn half_of_a_pool_may_be_pinned() {
    let pool = pool(3);
    let pin = pool.pin().unwrap();
    assert!(pool.pin().is_none());
    drop(pin);
    assert!(pool.pin().is_some());
}
