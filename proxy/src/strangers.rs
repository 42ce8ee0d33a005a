//! The places of those who have not said yet who they are: so many in all, so many of one address.
//!
//! ```text
//!   accepted ──► enter: a place in all ──► its address is known ──► sit: a place of that address ──► logged in: both free
//!                 none free: a stranger        (PROXY protocol)        none free: it is turned away
//!                 drawn by lot makes room
//! ```
//!
//! An address that has used up its places is refused what comes next: it waits for itself only. Where the places of all are
//! used up, by many addresses, refusing what comes next would let whoever holds the places keep everyone out for as long as a
//! login may take; so one that holds a place loses it. It is drawn by lot: the oldest would be the one that is nearest to its
//! end when honest clients come faster than they can be served, and then none of them would ever get there.
//!
//! **Invariant**: authenticated clients use none of these places, so that no flood of strangers takes any of theirs.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::limits::network;

/// All strangers.
#[derive(Debug)]
pub struct Strangers {
    most: usize,
    most_of_address: usize,
    numbers: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Never longer than `most`.
    places: Vec<Option<Place>>,
    free: Vec<usize>,
    /// Places taken by each network; none is 0.
    of_address: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Place {
    /// Whose it is.
    number: u64,
    lost: Arc<Notify>,
}

impl Strangers {
    /// No stranger yet. `most` is at least 1.
    pub fn new(most: usize, most_of_address: usize) -> Arc<Self> {
        Arc::new(Self { most, most_of_address, numbers: AtomicU64::new(0), inner: Mutex::default() })
    }

    /// Takes a place, somebody else's if there is no other.
    pub fn enter(self: &Arc<Self>) -> Stranger {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let lost = Arc::new(Notify::new());
        let place = Place { number, lost: lost.clone() };
        let mut inner = self.inner.lock();
        let at = match inner.free.pop() {
            Some(at) => at,
            None if inner.places.len() < self.most => {
                inner.places.push(None);
                inner.places.len() - 1
            }
            None => rand::random_range(0..inner.places.len()),
        };
        if let Some(loser) = inner.places[at].replace(place) {
            loser.lost.notify_one();
            metrics::counter!("ebb_proxy_refusals_total", "kind" => "crowded").increment(1);
        }
        drop(inner);
        metrics::gauge!("ebb_proxy_unauthenticated_connections").increment(1);
        Stranger { all: self.clone(), number, at, lost, address: None }
    }

    #[cfg(test)]
    fn counts(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        (inner.places.iter().flatten().count(), inner.of_address.values().sum())
    }
}

/// A stranger, until it is dropped.
#[derive(Debug)]
pub struct Stranger {
    all: Arc<Strangers>,
    number: u64,
    at: usize,
    lost: Arc<Notify>,
    address: Option<IpAddr>,
}

impl Stranger {
    /// Takes one of its address' places. Answers how many there are if all are taken.
    ///
    /// Loopback has as many as there are in all: what is on this machine are its own programs, or a load balancer that does
    /// not tell for whom it speaks.
    pub fn sit(&mut self, address: IpAddr) -> Result<(), usize> {
        let address = address.to_canonical();
        if address.is_loopback() || self.address.is_some() {
            return Ok(());
        }
        let network = network(address);
        let mut inner = self.all.inner.lock();
        let taken = inner.of_address.entry(network).or_insert(0);
        if *taken >= self.all.most_of_address {
            return Err(self.all.most_of_address);
        }
        *taken += 1;
        self.address = Some(network);
        Ok(())
    }

    /// What is notified, once, when the place becomes somebody else's.
    pub fn loss(&self) -> Arc<Notify> {
        self.lost.clone()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut inner = self.all.inner.lock();
        if let Some(address) = self.address
            && let Some(taken) = inner.of_address.get_mut(&address)
        {
            *taken -= 1;
            if *taken == 0 {
                inner.of_address.remove(&address);
            }
        }
        if inner.places[self.at].as_ref().is_some_and(|place| place.number == self.number) {
            inner.places[self.at] = None;
            inner.free.push(self.at);
        }
        drop(inner);
        metrics::gauge!("ebb_proxy_unauthenticated_connections").decrement(1);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_gets_so_many_places_and_others_do_not_notice() {
        let strangers = Strangers::new(10, 2);
        let sit = |text: &str| {
            let mut stranger = strangers.enter();
            stranger.sit(address(text)).map(|()| stranger)
        };
        let held = (sit("192.0.2.1").unwrap(), sit("192.0.2.1").unwrap());
        assert_eq!(sit("192.0.2.1").err(), Some(2));
        assert_eq!(sit("::ffff:192.0.2.1").err(), Some(2));
        let other = sit("192.0.2.2").unwrap();
        let local: Vec<_> = (0..5).map(|_| sit("127.0.0.1").unwrap()).collect();
        drop(held.0);
        assert!(sit("192.0.2.1").is_ok());
        drop((held.1, other, local));
        assert_eq!(strangers.counts(), (0, 0));
    }

    #[test]
    fn where_all_places_are_taken_one_is_lost_for_each_newcomer() {
        let strangers = Strangers::new(20, 20);
        let mut held: Vec<_> = (0..20).map(|_| strangers.enter()).collect();
        assert!(held.iter().all(|stranger| stranger.loss().notified().now_or_never().is_none()));
        held.extend((0..30).map(|_| strangers.enter()));
        let losers = held.iter().filter(|stranger| stranger.loss().notified().now_or_never().is_some()).count();
        assert_eq!((losers, strangers.counts().0), (30, 20));
        drop(held);
        assert_eq!(strangers.counts(), (0, 0));
        assert!(strangers.enter().loss().notified().now_or_never().is_none());
    }

    #[test]
    fn whoever_holds_all_places_does_not_keep_a_quick_one_out() {
        let strangers = Strangers::new(100, 100);
        let _flood: Vec<_> = (0..100).map(|_| strangers.enter()).collect();
        let kept = (0..200)
            .filter(|_| {
                let honest = strangers.enter();
                // While it logs in, ten more come.
                let more: Vec<_> = (0..10).map(|_| strangers.enter()).collect();
                let keeps = honest.loss().notified().now_or_never().is_none();
                drop(more);
                keeps
            })
            .count();
        // About nine in ten; fewer than six in ten happens once in more lifetimes than there are.
        assert!(kept > 120, "only {kept} of 200 kept their place");
    }
}
