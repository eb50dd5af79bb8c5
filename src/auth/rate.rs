//! How often one key may ask, and how often one address may fail to sign in.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

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

/// Addresses or keys remembered before those at rest are forgotten.
const MAX_REMEMBERED: usize = 10_000;

type Limiter<K> = RateLimiter<
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

/// Both limits.
#[derive(Debug)]
pub struct RateLimits {
    requests: Limiter<String>,
    failures: Limiter<IpAddr>,
}

impl Default for RateLimits {
    fn default() -> Self {
        let requests = Quota::per_second(REQUESTS_PER_SECOND).allow_burst(REQUESTS_AT_ONCE);
        let failures = Quota::per_second(FAILURES_PER_SECOND).allow_burst(FAILURES_AT_ONCE);
        // The standard monotonic clock: governor's default one calibrates itself for longer than
        // the whole server takes to start.
        Self {
            requests: RateLimiter::hashmap_with_clock(requests, MonotonicClock),
            failures: RateLimiter::hashmap_with_clock(failures, MonotonicClock),
        }
    }
}

impl RateLimits {
    /// Counts one HTTP request of the key.
    pub fn request(&self, key_id: &str) -> Result<(), TooMany> {
        count(&self.requests, &key_id.to_owned())
    }

    /// Counts one attempt to sign in that failed.
    pub fn failure(&self, address: IpAddr) -> Result<(), TooMany> {
        count(&self.failures, &address)
    }
}

fn count<K: std::hash::Hash + Eq + Clone>(limiter: &Limiter<K>, key: &K) -> Result<(), TooMany> {
    if limiter.len() > MAX_REMEMBERED {
        limiter.retain_recent();
    }
    limiter.check_key(key).map_err(|not_until| TooMany {
        retry_after: not_until.wait_time_from(MonotonicClock.now()),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_address_that_guesses_does_not_slow_another() {
        let limits = RateLimits::default();
        let guesser = IpAddr::from([10, 0, 0, 1]);
        let refused = (0..500)
            .filter(|_| limits.failure(guesser).is_err())
            .count();
        assert!(refused > 350, "{refused}");
        assert!(limits.failure(IpAddr::from([10, 0, 0, 2])).is_ok());
    }

    #[test]
    fn a_busy_page_is_not_slowed() {
        let limits = RateLimits::default();
        assert!((0..500).all(|_| limits.request("k").is_ok()));
    }
}
