//! How often one key may ask, and how often one address may fail to sign in.

use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

/// HTTP requests of one key per second, and at once. A page with every panel open asks for a few a
/// second; submissions go over a WebSocket and do not count.
const REQUESTS_PER_SECOND: NonZeroU32 = NonZeroU32::new(200).unwrap();
const REQUESTS_AT_ONCE: NonZeroU32 = NonZeroU32::new(1_000).unwrap();

/// Wrong keys from one address per second, and at once: a program with a stale key is told so, one
/// that guesses gets nowhere.
const FAILURES_PER_SECOND: NonZeroU32 = NonZeroU32::new(2).unwrap();
const FAILURES_AT_ONCE: NonZeroU32 = NonZeroU32::new(100).unwrap();

/// Requests from one address per second, and at once, that carry no key which counts: many people behind one
/// address, each of whom opens a page, which asks for some ten things before it signs in.
const STRANGERS_PER_SECOND: NonZeroU32 = NonZeroU32::new(100).unwrap();
const STRANGERS_AT_ONCE: NonZeroU32 = NonZeroU32::new(1_000).unwrap();

/// Sign-ins of one key per second, and at once: each writes a file. A person signs in once a day.
const SIGN_INS_PER_SECOND: NonZeroU32 = NonZeroU32::new(1).unwrap();
const SIGN_INS_AT_ONCE: NonZeroU32 = NonZeroU32::new(60).unwrap();

/// KiB that the WebSockets of one key bring per second, and at once: above the first, reading waits. A message
/// costs the server as much as a few hundred KiB of text when it is refused, and is followed by the next one
/// at once, so that counts as [`REFUSED_KIB`] more.
const KIB_PER_SECOND: NonZeroU32 = NonZeroU32::new(8_192).unwrap();
const KIB_AT_ONCE: NonZeroU32 = NonZeroU32::new(32_768).unwrap();
const REFUSED_KIB: u32 = 160;

/// Addresses or keys remembered at one time; those at rest are forgotten first.
const MAX_REMEMBERED: usize = 10_000;

/// Between two looks at a full table for what is at rest: each goes through all of it.
const CLEAN_EVERY: Duration = Duration::from_secs(1);

type Governor<K> = RateLimiter<
    K,
    HashMapStateStore<K>,
    MonotonicClock,
    NoOpMiddleware<<MonotonicClock as Clock>::Instant>,
>;

/// Asked too often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("asked too often; try again in {} s", .retry_after.as_secs().max(1))]
pub struct TooMany {
    /// When it would be allowed.
    pub retry_after: Duration,
}

/// Every limit.
#[derive(Debug)]
pub struct RateLimits {
    requests: Limiter<String>,
    sign_ins: Limiter<String>,
    messages: Limiter<String>,
    failures: Limiter<Network>,
    strangers: Limiter<Network>,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self {
            requests: Limiter::new(REQUESTS_PER_SECOND, REQUESTS_AT_ONCE),
            sign_ins: Limiter::new(SIGN_INS_PER_SECOND, SIGN_INS_AT_ONCE),
            messages: Limiter::new(KIB_PER_SECOND, KIB_AT_ONCE),
            failures: Limiter::new(FAILURES_PER_SECOND, FAILURES_AT_ONCE),
            strangers: Limiter::new(STRANGERS_PER_SECOND, STRANGERS_AT_ONCE),
        }
    }
}

impl RateLimits {
    /// Counts one HTTP request of the key.
    pub fn request(&self, key_id: &str) -> Result<(), TooMany> {
        self.requests.count(key_id.to_owned())
    }

    /// Counts one sign-in with the key.
    pub fn sign_in(&self, key_id: &str) -> Result<(), TooMany> {
        self.sign_ins.count(key_id.to_owned())
    }

    /// Counts a message of so many bytes over one of the key's WebSockets; an error says when to read on.
    pub fn message(&self, key_id: &str, bytes: usize, refused: bool) -> Result<(), TooMany> {
        let read = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
        let cost = match refused {
            true => read.saturating_add(REFUSED_KIB),
            false => read,
        };
        match NonZeroU32::new(cost.min(KIB_AT_ONCE.get())) {
            Some(cost) => self.messages.count_many(key_id.to_owned(), cost),
            None => Ok(()),
        }
    }

    /// Counts one attempt to sign in that failed.
    pub fn failure(&self, network: Network) -> Result<(), TooMany> {
        self.failures.count(network)
    }

    /// Counts one request without a key.
    pub fn stranger(&self, network: Network) -> Result<(), TooMany> {
        self.strangers.count(network)
    }
}

/// What one client can easily have all addresses of: an IPv4 address, or a /64 of IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network(u64);

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self(u64::from(v4.to_bits())),
            // No network of IPv6 that is in use begins with 32 zero bits.
            IpAddr::V6(v6) => Self((v6.to_bits() >> 64) as u64),
        }
    }
}

/// One limit for each of many, in a table of bounded size.
#[derive(Debug)]
struct Limiter<K: Hash + Eq + Clone> {
    each: Governor<K>,
    /// For all those together that a full table has no room for.
    rest: Governor<()>,
    cleaned: Mutex<Option<Instant>>,
}

impl<K: Hash + Eq + Clone> Limiter<K> {
    fn new(per_second: NonZeroU32, at_once: NonZeroU32) -> Self {
        let quota = Quota::per_second(per_second).allow_burst(at_once);
        // The standard monotonic clock: governor's default one calibrates itself for longer than
        // the whole server takes to start.
        Self {
            each: RateLimiter::hashmap_with_clock(quota, MonotonicClock),
            rest: RateLimiter::hashmap_with_clock(quota, MonotonicClock),
            cleaned: Mutex::default(),
        }
    }

    fn count(&self, key: K) -> Result<(), TooMany> {
        self.count_many(key, NonZeroU32::MIN)
    }

    /// Counts as many at a time; never more than may be at once.
    fn count_many(&self, key: K, many: NonZeroU32) -> Result<(), TooMany> {
        if self.each.len() >= MAX_REMEMBERED {
            self.clean();
        }
        let counted = if self.each.len() >= MAX_REMEMBERED {
            self.rest.check_key_n(&(), many)
        } else {
            self.each.check_key_n(&key, many)
        };
        match counted {
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(not_until)) => Err(TooMany {
                retry_after: not_until.wait_time_from(MonotonicClock.now()),
            }),
        }
    }

    fn clean(&self) {
        let mut cleaned = self.cleaned.lock().unwrap_or_else(PoisonError::into_inner);
        if cleaned.is_none_or(|at| at.elapsed() >= CLEAN_EVERY) {
            self.each.retain_recent();
            *cleaned = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_address_that_guesses_does_not_slow_another() {
        let limits = RateLimits::default();
        let guesser = Network::from(IpAddr::from([10, 0, 0, 1]));
        let refused = (0..500)
            .filter(|_| limits.failure(guesser).is_err())
            .count();
        assert!(refused > 350, "{refused}");
        assert!(limits.failure(IpAddr::from([10, 0, 0, 2]).into()).is_ok());
    }

    #[test]
    fn strangers_have_a_rate_for_each_address() {
        let limits = RateLimits::default();
        let crowd = Network::from(IpAddr::from([10, 0, 0, 1]));
        let refused = (0..3_000).filter(|_| limits.stranger(crowd).is_err());
        assert!(refused.count() > 1_500);
        let other = IpAddr::from([10, 0, 0, 2]).into();
        assert!(limits.stranger(other).is_ok() && limits.failure(crowd).is_ok());
    }

    #[test]
    fn a_busy_page_is_not_slowed() {
        let limits = RateLimits::default();
        assert!((0..500).all(|_| limits.request("k").is_ok()));
    }

    #[test]
    fn more_addresses_than_are_remembered_share_one_limit() {
        let limits = RateLimits::default();
        let network = |n: u32| Network::from(IpAddr::from(n.to_be_bytes()));
        for n in 0..MAX_REMEMBERED as u32 {
            assert!(limits.failure(network(n)).is_ok());
        }
        let more = MAX_REMEMBERED as u32..MAX_REMEMBERED as u32 + 500;
        let refused = more.filter(|n| limits.failure(network(*n)).is_err());
        assert!(refused.count() > 350);
        assert!(limits.failures.each.len() <= MAX_REMEMBERED);
    }

    #[test]
    fn one_prefix_of_ipv6_is_one_client() {
        let network = |text: &str| Network::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:1"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
        assert_ne!(network("10.0.0.1"), network("10.0.0.2"));
    }
}
