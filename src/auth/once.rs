//! Secrets that work once: WebSocket tickets and the sign-in token printed at start.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use secrecy::SecretString;

use super::{AuthError, random_hex, sha256};

/// Why no one-time secret could be made.
#[derive(Debug, thiserror::Error)]
pub enum OneTimeError {
    /// As many as are kept are waiting to be used.
    #[error("{0} are waiting to be used; they end by themselves within their lifetime")]
    Full(usize),
    /// The system gave no random bytes.
    #[error(transparent)]
    Random(#[from] AuthError),
}

/// Secrets that each work once and for a while, in memory only: a restart ends them all.
#[derive(Debug)]
pub struct OneTime {
    lifetime: Duration,
    capacity: usize,
    waiting: Mutex<HashMap<[u8; 32], Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    key_id: String,
    until: Instant,
}

impl OneTime {
    /// Secrets that live this long, and how many may wait at a time.
    pub fn new(lifetime: Duration, capacity: usize) -> Self {
        Self {
            lifetime,
            capacity,
            waiting: Mutex::default(),
        }
    }

    /// How long one lives.
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Makes one that stands for the key.
    pub fn issue(&self, key_id: &str) -> Result<SecretString, OneTimeError> {
        let text = random_hex::<24>()?;
        let now = Instant::now();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= self.capacity {
            waiting.retain(|_, entry| entry.until > now);
            if waiting.len() >= self.capacity {
                return Err(OneTimeError::Full(self.capacity));
            }
        }
        let entry = Waiting {
            key_id: key_id.to_owned(),
            until: now + self.lifetime,
        };
        waiting.insert(sha256(&text), entry);
        Ok(text.into())
    }

    /// Uses one up: the key it stands for, if it was issued, not used and not too old.
    pub fn redeem(&self, text: &str) -> Option<String> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked up by hash: how long it takes says nothing about the text.
        let entry = waiting.remove(&sha256(text))?;
        (entry.until > Instant::now()).then_some(entry.key_id)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn works_once() {
        let tickets = OneTime::new(Duration::from_secs(30), 10);
        let ticket = tickets.issue("k1").unwrap();
        assert_eq!(tickets.redeem("something else"), None);
        assert_eq!(
            tickets.redeem(ticket.expose_secret()).as_deref(),
            Some("k1")
        );
        assert_eq!(tickets.redeem(ticket.expose_secret()), None);
    }

    #[test]
    fn an_old_one_does_not_work() {
        let tickets = OneTime::new(Duration::ZERO, 10);
        let ticket = tickets.issue("k1").unwrap();
        assert_eq!(tickets.redeem(ticket.expose_secret()), None);
    }

    #[test]
    fn the_number_waiting_is_bounded_and_old_ones_make_room() {
        let tickets = OneTime::new(Duration::from_secs(30), 2);
        tickets.issue("k").unwrap();
        tickets.issue("k").unwrap();
        assert!(matches!(tickets.issue("k"), Err(OneTimeError::Full(2))));
        let short = OneTime::new(Duration::ZERO, 2);
        for _ in 0..10 {
            short.issue("k").unwrap();
        }
    }
}
