//! Tickets for a repl's runner: short-lived, bound to one repl, checked without asking anybody.

use std::fmt;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::ReplId;

/// Bytes of a key.
const KEY_BYTES: usize = 32;

/// What a repl's tickets are made and checked with. Known to the server and to the repl's runner.
#[derive(Clone, PartialEq, Eq)]
pub struct TicketKey([u8; KEY_BYTES]);

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKey")
    }
}

impl TicketKey {
    /// A key of these random bytes.
    pub fn new(random: [u8; KEY_BYTES]) -> Self {
        Self(random)
    }

    /// The key that [`TicketKey::text`] told.
    pub fn from_text(text: &str) -> Option<Self> {
        bytes_of(text)?.try_into().ok().map(Self)
    }

    /// The key as text, for the one place where it is stored.
    pub fn text(&self) -> String {
        text_of(&self.0)
    }

    /// A ticket for this repl, good until this second of the Unix clock.
    pub fn issue(&self, repl: &ReplId, until: u64) -> String {
        let code = self.code(repl, until).finalize().into_bytes();
        format!("{until}.{}", text_of(&code))
    }

    /// Whether the ticket is this repl's and good at this second of the Unix clock.
    pub fn admits(&self, repl: &ReplId, ticket: &str, now: u64) -> bool {
        let Some((until, code)) = ticket.split_once('.') else {
            return false;
        };
        let (Ok(until), Some(code)) = (until.parse(), bytes_of(code)) else {
            return false;
        };
        // In constant time.
        now < until && self.code(repl, until).verify_slice(&code).is_ok()
    }

    fn code(&self, repl: &ReplId, until: u64) -> Hmac<Sha256> {
        let mut code = match Hmac::<Sha256>::new_from_slice(&self.0) {
            Ok(code) => code,
            Err(_) => unreachable!("this code takes keys of every length"),
        };
        code.update(format!("gantry-runner/{repl}/{until}").as_bytes());
        code
    }
}

fn text_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes_of(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    let pairs = (0..text.len()).step_by(2);
    pairs
        .map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_ticket_opens_its_own_repl_for_its_time() {
        let key = TicketKey::from_text(&TicketKey::new([7; 32]).text()).unwrap();
        let (own, other) = ("a".parse().unwrap(), "b".parse().unwrap());
        let ticket = key.issue(&own, 100);
        assert!(key.admits(&own, &ticket, 99));
        assert!(!key.admits(&own, &ticket, 100), "too late");
        assert!(!key.admits(&other, &ticket, 99), "another's");
        assert!(
            !TicketKey::new([8; 32]).admits(&own, &ticket, 99),
            "another key"
        );
        let longer = ticket.replacen("100", "999", 1);
        assert!(!key.admits(&own, &longer, 99), "made longer");
        for wrong in [
            "",
            ".",
            "100",
            "100.",
            "100.zz",
            "x.00",
            &ticket[..ticket.len() - 1],
        ] {
            assert!(!key.admits(&own, wrong, 99), "{wrong}");
        }
    }
}
