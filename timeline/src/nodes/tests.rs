use ebb_storage::object_store;
use ebb_storage::object_store::faulty::{Faults, Faulty};
use tempfile::TempDir;

use super::*;

/// Long enough for what a test does between two renewals on a busy machine.
const TTL: Duration = Duration::from_millis(1200);

async fn bucket() -> (TempDir, Bucket) {
    let dir = tempfile::tempdir().unwrap();
    let bucket = object_store::open(dir.path().join("bucket").to_str().unwrap()).await.unwrap();
    (dir, bucket)
}

fn node(dir: &TempDir, name: &str, bucket: &Bucket) -> Nodes {
    let data = dir.path().join(name);
    fs::create_dir_all(&data).unwrap();
    Nodes::open(&data, name.to_owned(), bucket.clone(), TTL).unwrap()
}

async fn is_alive(of: &Nodes, node: &Nodes) -> bool {
    of.look().await.unwrap();
    matches!(of.standing(node.me()).await.unwrap(), Standing::Alive(record) if record.name == node.name)
}

#[tokio::test]
async fn a_node_is_alive_as_long_as_it_renews_its_record() {
    let (dir, bucket) = bucket().await;
    let (one, two) = (node(&dir, "one", &bucket), node(&dir, "two", &bucket));
    assert!(!is_alive(&one, &two).await, "it never announced itself");
    assert!(one.term().is_none() && !one.has_peers());
    assert!(one.renew().await.unwrap(), "its first term");
    two.set_addresses(Addresses { api: None, peer: Some("127.0.0.1:1".to_owned()) });
    for _ in 0..6 {
        two.renew().await.unwrap();
        assert!(is_alive(&one, &two).await);
        assert!(one.has_peers());
        tokio::time::sleep(TTL / 3).await;
    }
    assert_eq!(one.alive()[1].peer.as_deref(), Some("127.0.0.1:1"));
    // Of its own record a node knows first that it has expired.
    while is_alive(&one, &two).await {
        assert!(one.has_peers());
    }
    assert!(two.term().is_none() && !one.has_peers());
    // It comes back, and knows that others may have taken over meanwhile.
    two.renew().await.unwrap();
    let first = two.term().unwrap();
    two.renew().await.unwrap();
    assert_eq!(two.term(), Some(first));
    assert!(is_alive(&one, &two).await);
    while two.term().is_some() {
        tokio::time::sleep(TTL / 10).await;
    }
    two.renew().await.unwrap();
    assert!(two.term().unwrap() > first);
    two.stop().await.unwrap();
    assert!(!is_alive(&one, &two).await, "it said that it was stopped");
}

#[tokio::test]
async fn the_identifier_stays_and_another_run_is_seen_at_once() {
    let (dir, bucket) = bucket().await;
    let (one, two) = (node(&dir, "one", &bucket), node(&dir, "two", &bucket));
    two.stop().await.unwrap();
    assert!(!is_alive(&one, &two).await);
    let again = node(&dir, "two", &bucket);
    assert_eq!(again.me(), two.me());
    again.renew().await.unwrap();
    assert!(is_alive(&one, &again).await);
    fs::write(dir.path().join("two/node-id"), "br_1").unwrap();
    Nodes::open(&dir.path().join("two"), "two".to_owned(), bucket.clone(), TTL).unwrap_err();
}

#[tokio::test]
async fn a_damaged_record_is_none() {
    let (dir, bucket) = bucket().await;
    let (one, two) = (node(&dir, "one", &bucket), node(&dir, "two", &bucket));
    two.renew().await.unwrap();
    let whole = bucket.get(&key(two.me())).await.unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.to_vec();
        bytes[at] ^= 1;
        assert_eq!(decode(&bytes), None, "byte {at}");
        assert_eq!(decode(&whole[..at]), None, "the first {at} bytes");
    }
    bucket.put(&key(two.me()), whole.slice(1..)).await.unwrap();
    assert!(!is_alive(&one, &two).await);
    // Nor is one that lies under another node's key.
    bucket.put(&key(NodeId::for_test(1)), whole).await.unwrap();
    one.look().await.unwrap();
    assert!(!one.has_peers());
    two.renew().await.unwrap();
    assert!(is_alive(&one, &two).await);
}

#[tokio::test]
async fn who_cannot_look_keeps_what_it_knew_of_others() {
    let (dir, bucket) = bucket().await;
    let faulty = std::sync::Arc::new(Faulty::new(bucket.clone(), Faults::default()));
    let (one, two) = (node(&dir, "one", &(faulty.clone() as Bucket)), node(&dir, "two", &bucket));
    one.renew().await.unwrap();
    two.renew().await.unwrap();
    one.look().await.unwrap();
    assert!(one.has_peers());
    faulty.cut_off(true);
    one.look().await.unwrap_err();
    one.renew().await.unwrap_err();
    while one.term().is_some() {
        tokio::time::sleep(TTL / 10).await;
    }
    assert!(one.has_peers(), "it cannot know that the other is gone");
    assert!(!one.is_excused());
    // Nobody can be seen to die by who does not look.
    tokio::time::sleep(TTL * 2).await;
    faulty.cut_off(false);
    assert!(is_alive(&one, &two).await);
    while is_alive(&one, &two).await {
        tokio::time::sleep(TTL / 20).await;
    }
    assert!(!one.has_peers());
    one.renew().await.unwrap();
    one.look().await.unwrap();
    assert!(one.is_excused(), "it is alone");
}

/// Another node that says whether it promises, and hears whatever it is warned of.
#[derive(Debug)]
struct Says(bool);

#[async_trait]
impl Others for Says {
    async fn hold(&self, nodes: &[Record], time: Duration) -> bool {
        assert!(!nodes.is_empty() && time > Duration::ZERO);
        self.0
    }

    async fn warn(&self, _: &Record, _: &Record) {}
}

async fn confirmed(node: &Nodes) {
    node.renew().await.unwrap();
    node.look().await.unwrap();
    node.confirm(node.term().unwrap());
}

async fn expired(node: &Nodes) {
    while node.term().is_some() {
        tokio::time::sleep(TTL / 20).await;
    }
}

#[tokio::test]
async fn what_is_seen_once_and_then_not_looked_at_is_not_seen_to_die() {
    let (dir, bucket) = bucket().await;
    let (one, two) = (node(&dir, "one", &bucket), node(&dir, "two", &bucket));
    two.renew().await.unwrap();
    one.look().await.unwrap();
    for _ in 0..5 {
        tokio::time::sleep(TTL / 3).await;
        two.renew().await.unwrap();
    }
    assert!(matches!(one.standing(two.me()).await.unwrap(), Standing::Alive(_)) && !one.is_gone(two.me()));
}

#[tokio::test]
async fn who_was_gone_is_looked_at_again_before_anything_is_taken_from_it() {
    let (dir, bucket) = bucket().await;
    let (one, two) = (node(&dir, "one", &bucket), node(&dir, "two", &bucket));
    two.renew().await.unwrap();
    while is_alive(&one, &two).await {
        tokio::time::sleep(TTL / 20).await;
    }
    two.renew().await.unwrap();
    assert_eq!(one.standing(two.me()).await.unwrap(), Standing::Gone, "that is what was seen");
    assert!(matches!(one.standing_now(two.me()).await.unwrap(), Standing::Alive(_)));
}

#[tokio::test]
async fn in_a_new_term_nothing_is_told_before_it_is_confirmed() {
    let (dir, bucket) = bucket().await;
    let (one, two) = (node(&dir, "one", &bucket), node(&dir, "two", &bucket));
    two.renew().await.unwrap();
    one.renew().await.unwrap();
    one.look().await.unwrap();
    assert!(!one.may_answer(), "it may own nothing");
    one.confirm(one.term().unwrap());
    assert!(one.may_answer());
    expired(&one).await;
    assert!(!one.may_answer());
    let old = one.last_term();
    assert!(one.renew().await.unwrap(), "another one may have taken over meanwhile");
    one.look().await.unwrap();
    assert!(!one.may_answer());
    one.confirm(old);
    assert!(!one.may_answer());
    one.confirm(one.term().unwrap());
    assert!(one.may_answer());
}

#[tokio::test]
async fn who_was_alone_all_the_time_goes_on_in_the_same_term() {
    let (dir, bucket) = bucket().await;
    let faulty = std::sync::Arc::new(Faulty::new(bucket.clone(), Faults::default()));
    let one = node(&dir, "one", &(faulty.clone() as Bucket));
    let gone = node(&dir, "gone", &bucket);
    gone.renew().await.unwrap();
    gone.stop().await.unwrap();
    confirmed(&one).await;
    let term = one.term().unwrap();
    faulty.cut_off(true);
    while one.term().is_some() {
        assert!(one.tick());
        tokio::time::sleep(TTL / 20).await;
    }
    assert!(one.is_excused() && one.may_answer());
    faulty.cut_off(false);
    assert!(!one.renew().await.unwrap());
    assert_eq!(one.term(), Some(term));
    // Another one came and went while it could not look.
    faulty.cut_off(true);
    expired(&one).await;
    node(&dir, "two", &bucket).renew().await.unwrap();
    faulty.cut_off(false);
    assert!(one.renew().await.unwrap());
    assert!(!one.may_answer() && !one.is_excused());
}

#[tokio::test]
async fn who_stood_still_looks_before_it_takes_itself_for_alone() {
    let (dir, bucket) = bucket().await;
    let one = node(&dir, "one", &bucket);
    confirmed(&one).await;
    assert!(one.tick() && one.may_answer());
    tokio::time::sleep(TTL + TTL / 10).await;
    assert!(!one.may_answer() && !one.is_excused(), "it did not run");
    assert!(!one.tick());
    assert!(!one.may_answer() && !one.is_excused(), "nor has it looked since");
    one.look().await.unwrap();
    assert!(one.tick() && one.is_excused() && one.may_answer());
    tokio::time::sleep(TTL + TTL / 10).await;
    assert!(!one.tick());
    one.tried();
    assert!(one.is_excused() && one.may_answer(), "the bucket is away: nobody can tell");
    // Who comes then says so before it takes over.
    one.challenged(node(&dir, "two", &bucket).own_record());
    assert!(!one.is_excused() && !one.may_answer());
}

#[tokio::test]
async fn who_promises_takes_nothing_over_meanwhile_and_promises_nothing_while_it_does() {
    let (dir, bucket) = bucket().await;
    let (one, two) = (node(&dir, "one", &bucket), node(&dir, "two", &bucket));
    two.renew().await.unwrap();
    confirmed(&one).await;
    assert_eq!(one.needs_hold(), None);
    assert!(!one.promise(TTL), "it can renew its record");
    while one.needs_hold().is_none() {
        tokio::time::sleep(TTL / 20).await;
    }
    let taking_over = one.take_over().expect("nothing was promised");
    assert!(!one.promise(TTL));
    drop(taking_over);
    assert!(one.promise(TTL / 2));
    assert!(one.take_over().is_none());
    one.ask_to_hold(&Says(false), TTL / 2).await;
    assert!(!one.is_excused());
    one.ask_to_hold(&Says(true), TTL / 2).await;
    assert!(one.is_excused());
    while one.take_over().is_none() {
        tokio::time::sleep(TTL / 20).await;
    }
    // What others promised has come to its end, too; a promise that comes after that is too late.
    expired(&one).await;
    while one.is_excused() {
        tokio::time::sleep(TTL / 20).await;
    }
    one.ask_to_hold(&Says(true), TTL / 2).await;
    assert!(!one.is_excused() && !one.may_answer());
}
