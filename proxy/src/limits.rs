//! Slows down whoever guesses passwords.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota};

/// LIMIT: wrong passwords an address may send at once; a pool with an old password tries one per connection.
const BURST: NonZeroU32 = NonZeroU32::new(300).expect("not zero");
/// LIMIT: and then per second: harmless against generated passwords, and a mistyped one does not lock anyone out.
const PER_SECOND: NonZeroU32 = NonZeroU32::new(5).expect("not zero");
/// LIMIT: addresses remembered before those without recent failures are forgotten.
const ADDRESSES_MAX: usize = 10_000;

/// Failed logins by address.
#[derive(Debug)]
pub struct FailedLogins {
    limiter: DefaultKeyedRateLimiter<IpAddr>,
    blocked: DashMap<IpAddr, Instant>,
}

impl FailedLogins {
    /// Nobody has failed yet.
    pub fn new() -> Self {
        let quota = Quota::per_second(PER_SECOND).allow_burst(BURST);
        Self { limiter: DefaultKeyedRateLimiter::keyed(quota), blocked: DashMap::new() }
    }

    /// How long this address has to wait before it may try again, if it has.
    pub fn wait(&self, address: IpAddr) -> Option<Duration> {
        let network = network(address);
        let until = *self.blocked.get(&network)?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.blocked.remove(&network);
            return None;
        }
        Some(left)
    }

    /// Notes a failure.
    pub fn failed(&self, address: IpAddr) {
        let network = network(address);
        if let Err(too_many) = self.limiter.check_key(&network) {
            self.blocked.insert(network, Instant::now() + too_many.wait_time_from(DefaultClock::default().now()));
        }
        if self.limiter.len() > ADDRESSES_MAX {
            self.limiter.retain_recent();
            self.blocked.retain(|_, until| *until > Instant::now());
        }
    }
}

/// Whoever has one IPv6 address has 2⁶⁴ of them.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => (address & std::net::Ipv6Addr::from_bits(!0 << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_that_keeps_failing_has_to_wait() {
        let failed = FailedLogins::new();
        let (guesser, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        for _ in 0..BURST.get() {
            failed.failed(guesser);
        }
        assert_eq!(failed.wait(guesser), None);
        for _ in 0..PER_SECOND.get() * 10 {
            failed.failed(guesser);
        }
        assert!(failed.wait(guesser).is_some());
        assert_eq!(failed.wait(other), None);
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let network = |text: &str| super::network(text.parse().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::2:3"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
    }
}
