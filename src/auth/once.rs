//! Secrets that work once: WebSocket tickets and the sign-in token printed at start.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use secrecy::SecretString;

use super::{AuthError, CREDENTIAL_BYTES, random_hex, sha256};

/// Secrets that each work once and for a while, in memory only: a restart ends them all.
#[derive(Debug)]
pub struct OneTime {
    lifetime: Duration,
    capacity: usize,
    per_key: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<[u8; 32], Waiting>,
    /// What waits of each key, oldest first.
    by_key: HashMap<String, VecDeque<[u8; 32]>>,
}

#[derive(Debug)]
struct Waiting {
    key_id: String,
    until: Instant,
}

impl OneTime {
    /// Secrets that live this long, how many may wait at a time, and how many of them may be one key's.
    pub fn new(lifetime: Duration, capacity: usize, per_key: usize) -> Self {
        Self {
            lifetime,
            capacity,
            per_key,
            state: Mutex::default(),
        }
    }

    /// How long one lives.
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Makes one that stands for the key. Where too many wait, the oldest of this key ends, or of the key
    /// that has the most.
    pub fn issue(&self, key_id: &str) -> Result<SecretString, AuthError> {
        let text = random_hex::<CREDENTIAL_BYTES>()?;
        let hash = sha256(&text);
        let mut state = self.locked();
        if state.of(key_id) >= self.per_key {
            state.end_oldest(key_id);
        }
        if state.waiting.len() >= self.capacity {
            state.end_old(Instant::now());
        }
        if state.waiting.len() >= self.capacity
            && let Some(busiest) = state.busiest()
        {
            state.end_oldest(&busiest);
        }
        let entry = Waiting {
            key_id: key_id.to_owned(),
            until: Instant::now() + self.lifetime,
        };
        state.waiting.insert(hash, entry);
        let own = state.by_key.entry(key_id.to_owned()).or_default();
        own.push_back(hash);
        Ok(text.into())
    }

    /// Uses one up: the key it stands for, if it was issued, not used and not too old.
    pub fn redeem(&self, text: &str) -> Option<String> {
        // Looked up by hash: how long it takes says nothing about the text.
        let entry = self.locked().take(&sha256(text))?;
        (entry.until > Instant::now()).then_some(entry.key_id)
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn of(&self, key_id: &str) -> usize {
        self.by_key.get(key_id).map_or(0, VecDeque::len)
    }

    fn take(&mut self, hash: &[u8; 32]) -> Option<Waiting> {
        let entry = self.waiting.remove(hash)?;
        if let Some(own) = self.by_key.get_mut(&entry.key_id) {
            own.retain(|known| known != hash);
            if own.is_empty() {
                self.by_key.remove(&entry.key_id);
            }
        }
        Some(entry)
    }

    fn end_oldest(&mut self, key_id: &str) {
        let oldest = self.by_key.get(key_id).and_then(VecDeque::front).copied();
        if let Some(hash) = oldest {
            self.take(&hash);
        }
    }

    fn end_old(&mut self, now: Instant) {
        let waiting = &mut self.waiting;
        waiting.retain(|_, entry| entry.until > now);
        self.by_key.retain(|_, own| {
            own.retain(|hash| waiting.contains_key(hash));
            !own.is_empty()
        });
    }

    fn busiest(&self) -> Option<String> {
        let most = self.by_key.iter().max_by_key(|(_, own)| own.len());
        most.map(|(key, _)| key.clone())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn works_once() {
        let tickets = OneTime::new(Duration::from_secs(30), 10, 5);
        let ticket = tickets.issue("k1").unwrap();
        assert_eq!(tickets.redeem("something else"), None);
        assert!(super::super::is_credential(ticket.expose_secret()));
        assert_eq!(
            tickets.redeem(ticket.expose_secret()).as_deref(),
            Some("k1")
        );
        assert_eq!(tickets.redeem(ticket.expose_secret()), None);
    }

    #[test]
    fn an_old_one_does_not_work() {
        let tickets = OneTime::new(Duration::ZERO, 10, 5);
        let ticket = tickets.issue("k1").unwrap();
        assert_eq!(tickets.redeem(ticket.expose_secret()), None);
    }

    #[test]
    fn a_key_that_asks_for_many_ends_its_own_and_no_others() {
        let tickets = OneTime::new(Duration::from_secs(30), 10, 3);
        let other = tickets.issue("other").unwrap();
        let own: Vec<SecretString> = (0..20).map(|_| tickets.issue("k").unwrap()).collect();
        assert_eq!(tickets.locked().waiting.len(), 4);
        assert!(tickets.redeem(own[16].expose_secret()).is_none());
        assert!(tickets.redeem(own[19].expose_secret()).is_some());
        assert!(tickets.redeem(other.expose_secret()).is_some());
    }

    #[test]
    fn a_full_table_ends_one_of_the_key_that_has_the_most() {
        let tickets = OneTime::new(Duration::from_secs(30), 4, 3);
        let few = tickets.issue("few").unwrap();
        for _ in 0..3 {
            tickets.issue("many").unwrap();
        }
        let third = tickets.issue("third").unwrap();
        assert_eq!(tickets.locked().of("many"), 2);
        for ticket in [few, third] {
            assert!(tickets.redeem(ticket.expose_secret()).is_some());
        }
        let short = OneTime::new(Duration::ZERO, 2, 2);
        for n in 0..10 {
            short.issue(&n.to_string()).unwrap();
        }
        assert!(short.locked().by_key.len() <= 2);
    }
}
