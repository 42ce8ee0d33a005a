//! How often one may try to log in: by address, and by endpoint.
//!
//! | | of one address | of one endpoint, by addresses that are strange to it |
//! |---|---|---|
//! | connections | a flood costs handshakes | … also from a thousand addresses |
//! | wrong passwords | a guesser is slowed down | … also one that has a thousand addresses |
//!
//! An address is known to an endpoint for a day after it last logged in there. What its strangers have used up does not
//! keep those out: else whoever wants to could lock them out by failing.
//!
//! Loopback is not limited by its connections: what is on this machine are its own programs, or a load balancer that does not
//! tell for whom it speaks. Its wrong passwords count.

use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use ebb_types::BranchId;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota};
use parking_lot::Mutex;

/// LIMIT: above so many addresses or endpoints, those that have not been seen lately are forgotten. What is remembered
/// is bounded by how many come while one is not forgotten, a minute or so: some ten bytes each.
const REMEMBERED_MAX: usize = 10_000;
/// LIMIT: looking for whom to forget costs a look at everyone.
const FORGET_EVERY: Duration = Duration::from_secs(1);
/// How long an address is known to an endpoint it has logged in at.
const KNOWN_FOR: Duration = Duration::from_secs(24 * 3600);
/// LIMIT: addresses known to endpoints; above it nobody else becomes known until somebody is forgotten.
const KNOWN_MAX: usize = 100_000;

/// So many at once, and then so many in a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many in the long run …
    count: NonZeroU32,
    /// … in each of these.
    per: Per,
    /// How many at once, after a pause.
    burst: NonZeroU32,
}

/// A time in which something may happen so often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Per {
    /// A second.
    Second,
    /// A minute.
    Minute,
    /// An hour.
    Hour,
}

impl Per {
    const ALL: [(Per, &'static str, u64); 3] = [(Per::Second, "s", 1), (Per::Minute, "m", 60), (Per::Hour, "h", 3600)];
}

impl Rate {
    /// A rate that is written into the program.
    ///
    /// # Panics
    /// If one of them is 0.
    pub const fn of(count: u32, per: Per, burst: u32) -> Self {
        Self {
            count: NonZeroU32::new(count).expect("a rate is not 0"),
            per,
            burst: NonZeroU32::new(burst).expect("a burst is not 0"),
        }
    }

    fn quota(self) -> Quota {
        let (.., seconds) = Per::ALL.into_iter().find(|(per, ..)| *per == self.per).expect("all are listed");
        // LIMIT: governor counts in nanoseconds; more than 10⁹ a second are no limit.
        let period = (Duration::from_secs(seconds) / self.count.get()).max(Duration::from_nanos(1));
        Quota::with_period(period).expect("the period is not 0").allow_burst(self.burst)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, unit, _) = Per::ALL.into_iter().find(|(per, ..)| *per == self.per).expect("all are listed");
        write!(f, "{}/{unit},{}", self.count, self.burst)
    }
}

/// Reads `200/s,10000`: so many a second (or minute, hour), so many at once.
impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (rate, burst) = text.split_once(',')?;
            let (count, unit) = rate.split_once('/')?;
            let (per, ..) = Per::ALL.into_iter().find(|(_, name, _)| *name == unit.trim())?;
            Some(Self { count: count.trim().parse().ok()?, per, burst: burst.trim().parse().ok()? })
        };
        parse().ok_or_else(|| format!("{text:?} is not a rate (want 200/s,10000: so many a second, so many at once)"))
    }
}

/// The rates of one proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Connections of one address. Default 200 a second, 10,000 at once: a large pool may come back as one.
    pub address: Rate,
    /// Logins at one endpoint by addresses that are strange to it. Default 1,000 a second, 20,000 at once: twice what it holds.
    pub endpoint: Rate,
    /// Wrong passwords of one address. Default 5 a second, harmless against generated passwords, and 300 at once: a pool
    /// with an old password tries one per connection.
    pub address_failures: Rate,
    /// Wrong passwords at one endpoint by addresses that are strange to it. Default 20 a second, 2,000 at once.
    pub endpoint_failures: Rate,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            address: Rate::of(200, Per::Second, 10_000),
            endpoint: Rate::of(1_000, Per::Second, 20_000),
            address_failures: Rate::of(5, Per::Second, 300),
            endpoint_failures: Rate::of(20, Per::Second, 2_000),
        }
    }
}

/// Which limit was hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hit {
    /// Connections of the address.
    Address,
    /// Wrong passwords of the address.
    AddressFailures,
    /// Logins at the endpoint.
    Endpoint,
    /// Wrong passwords at the endpoint.
    EndpointFailures,
}

impl Hit {
    /// As metrics count it.
    pub fn kind(self) -> &'static str {
        match self {
            Hit::Address => "address_rate",
            Hit::AddressFailures => "address_failures",
            Hit::Endpoint => "endpoint_rate",
            Hit::EndpointFailures => "endpoint_failures",
        }
    }
}

/// Who has tried how often.
#[derive(Debug)]
pub struct Limits {
    address: Counted<IpAddr>,
    endpoint: Counted<BranchId>,
    address_failures: Counted<IpAddr>,
    endpoint_failures: Counted<BranchId>,
    /// Until when an address is known to an endpoint.
    known: DashMap<(BranchId, IpAddr), Instant>,
}

impl Limits {
    /// Nobody has tried yet.
    pub fn new(rates: &Rates) -> Self {
        Self {
            address: Counted::new(rates.address),
            endpoint: Counted::new(rates.endpoint),
            address_failures: Counted::new(rates.address_failures),
            endpoint_failures: Counted::new(rates.endpoint_failures),
            known: DashMap::new(),
        }
    }

    /// Counts a connection.
    ///
    /// # Errors
    /// Which limit it is above of, and for how long.
    pub fn connected(&self, address: IpAddr) -> Result<(), (Hit, Duration)> {
        if address.to_canonical().is_loopback() {
            return Ok(());
        }
        self.address.count(&network(address)).map_err(|wait| (Hit::Address, wait))
    }

    /// Counts a login that is about to begin.
    ///
    /// # Errors
    /// Which limit it is above of, and for how long.
    pub fn begins(&self, address: IpAddr, endpoint: BranchId) -> Result<(), (Hit, Duration)> {
        let network = network(address);
        self.address_failures.wait(&network).map_err(|wait| (Hit::AddressFailures, wait))?;
        if self.knows(network, endpoint) {
            return Ok(());
        }
        self.endpoint_failures.wait(&endpoint).map_err(|wait| (Hit::EndpointFailures, wait))?;
        self.endpoint.count(&endpoint).map_err(|wait| (Hit::Endpoint, wait))
    }

    /// Notes a wrong password.
    pub fn failed(&self, address: IpAddr, endpoint: BranchId) {
        let network = network(address);
        let _ = self.address_failures.count(&network);
        if !self.knows(network, endpoint) {
            let _ = self.endpoint_failures.count(&endpoint);
        }
    }

    /// Notes a right one.
    pub fn succeeded(&self, address: IpAddr, endpoint: BranchId) {
        let (key, now) = ((endpoint, network(address)), Instant::now());
        if self.known.len() >= KNOWN_MAX && !self.known.contains_key(&key) {
            self.known.retain(|_, until| *until > now);
            if self.known.len() >= KNOWN_MAX {
                return;
            }
        }
        self.known.insert(key, now + KNOWN_FOR);
    }

    fn knows(&self, network: IpAddr, endpoint: BranchId) -> bool {
        self.known.get(&(endpoint, network)).is_some_and(|until| *until > Instant::now())
    }
}

/// What is counted of each of many.
#[derive(Debug)]
struct Counted<K: Hash + Eq + Clone> {
    limiter: DefaultKeyedRateLimiter<K>,
    /// Until when those are to wait that came too often.
    waiting: DashMap<K, Instant>,
    forgotten: Mutex<Instant>,
}

impl<K: Hash + Eq + Clone> Counted<K> {
    fn new(rate: Rate) -> Self {
        let limiter = DefaultKeyedRateLimiter::keyed(rate.quota());
        Self { limiter, waiting: DashMap::new(), forgotten: Mutex::new(Instant::now()) }
    }

    /// Counts one, and tells how long to wait if it is one too many.
    fn count(&self, of: &K) -> Result<(), Duration> {
        let counted =
            self.limiter.check_key(of).map_err(|too_many| too_many.wait_time_from(DefaultClock::default().now()));
        if let Err(wait) = counted {
            self.waiting.insert(of.clone(), Instant::now() + wait);
        }
        self.forget();
        counted
    }

    /// Tells how long to wait, counting nothing.
    fn wait(&self, of: &K) -> Result<(), Duration> {
        let left = self.waiting.get(of).map(|until| until.saturating_duration_since(Instant::now()));
        left.filter(|left| !left.is_zero()).map_or(Ok(()), Err)
    }

    fn forget(&self) {
        if self.limiter.len().max(self.waiting.len()) <= REMEMBERED_MAX {
            return;
        }
        let now = Instant::now();
        {
            let Some(mut last) = self.forgotten.try_lock() else { return };
            if now.duration_since(*last) < FORGET_EVERY {
                return;
            }
            *last = now;
        }
        self.limiter.retain_recent();
        self.limiter.shrink_to_fit();
        self.waiting.retain(|_, until| *until > now);
    }
}

/// Whose address it is: whoever has one of IPv6 has 2⁶⁴ of them.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => (address & std::net::Ipv6Addr::from_bits(!0 << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROD: BranchId = BranchId::for_test(1);
    const DEV: BranchId = BranchId::for_test(2);
    /// Refills so slowly that nothing does in a test.
    const THREE: Rate = Rate::of(1, Per::Hour, 3);
    const MANY: Rate = Rate::of(1_000_000, Per::Second, 1_000_000);

    fn limits(change: impl FnOnce(&mut Rates)) -> Limits {
        let mut rates = Rates { address: MANY, endpoint: MANY, address_failures: MANY, endpoint_failures: MANY };
        change(&mut rates);
        Limits::new(&rates)
    }

    fn hit(result: Result<(), (Hit, Duration)>) -> Option<Hit> {
        result.err().map(|(hit, wait)| {
            assert!(wait > Duration::ZERO);
            hit
        })
    }

    fn address(n: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, n])
    }

    #[test]
    fn only_the_address_that_keeps_failing_has_to_wait() {
        let limits = limits(|rates| rates.address_failures = THREE);
        (0..3).for_each(|_| limits.failed(address(1), PROD));
        assert_eq!(hit(limits.begins(address(1), PROD)), None);
        limits.failed(address(1), PROD);
        assert_eq!(hit(limits.begins(address(1), PROD)), Some(Hit::AddressFailures));
        assert_eq!(hit(limits.begins(address(1), DEV)), Some(Hit::AddressFailures), "wherever it goes");
        assert_eq!(hit(limits.begins(address(2), PROD)), None);
    }

    #[test]
    fn guesses_from_many_addresses_do_not_lock_out_those_who_were_there_before() {
        let limits = limits(|rates| rates.endpoint_failures = THREE);
        limits.succeeded(address(9), PROD);
        (1..=4).for_each(|n| limits.failed(address(n), PROD));
        assert_eq!(hit(limits.begins(address(5), PROD)), Some(Hit::EndpointFailures));
        assert_eq!(hit(limits.begins(address(5), DEV)), None);
        assert_eq!(hit(limits.begins(address(9), PROD)), None);
        (0..10).for_each(|_| limits.failed(address(9), DEV));
        assert_eq!(hit(limits.begins(address(9), DEV)), Some(Hit::EndpointFailures), "there it is strange");
    }

    #[test]
    fn an_endpoint_takes_so_many_strangers_at_once() {
        let limits = limits(|rates| rates.endpoint = THREE);
        limits.succeeded(address(9), PROD);
        let hits: Vec<_> = (1..=4).map(|n| hit(limits.begins(address(n), PROD))).collect();
        assert_eq!(hits, [None, None, None, Some(Hit::Endpoint)]);
        assert_eq!(hit(limits.begins(address(9), PROD)), None);
    }

    #[test]
    fn an_address_connects_so_often_and_loopback_as_it_likes() {
        let limits = limits(|rates| rates.address = THREE);
        let often = |address| (0..4).filter_map(|_| hit(limits.connected(address))).collect::<Vec<_>>();
        assert_eq!(often(address(1)), [Hit::Address]);
        assert_eq!(often("127.0.0.1".parse().unwrap()), []);
        assert_eq!(often("::ffff:127.0.0.1".parse().unwrap()), []);
    }

    #[test]
    fn who_has_been_quiet_is_forgotten() {
        let counted = Counted::new(Rate::of(1_000_000, Per::Second, 1));
        *counted.forgotten.lock() = Instant::now().checked_sub(2 * FORGET_EVERY).unwrap();
        for n in 0..=REMEMBERED_MAX as u32 {
            let _ = counted.count(&n);
        }
        assert!(counted.limiter.len() < REMEMBERED_MAX, "{} are remembered", counted.limiter.len());
    }

    #[test]
    fn rates_are_written_as_they_are_read() {
        let rate: Rate = "200/s,10000".parse().unwrap();
        assert_eq!((rate, rate.to_string()), (Rate::of(200, Per::Second, 10_000), "200/s,10000".to_owned()));
        assert_eq!("30/m,5".parse(), Ok(Rate::of(30, Per::Minute, 5)));
        for text in ["", "200", "200/s", "200,5", "0/s,5", "5/s,0", "-1/s,2", "5/d,7"] {
            assert!(text.parse::<Rate>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let network = |text: &str| super::network(text.parse().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::2:3"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
    }
}
