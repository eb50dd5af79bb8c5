//! When something was asked of a repl, among all that is asked of it: what was asked later stands.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Problem, SubmissionId};

/// The code of a problem that means: something that was asked of the repl later stands.
pub const SUPERSEDED: &str = "superseded";

/// How long it is known of a repl that was deleted what was asked of it last. A submission that was sent before may
/// wait behind others and for a platform that is away, which takes minutes each; and a server that was down takes up
/// what it had, for which a day is time.
const KNOWN_AFTER_DELETION: SignedDuration = SignedDuration::from_hours(24);

/// Deleted repls of one user of which that is known, the last ones: as many as a user may have repls unless the
/// operator says otherwise. A user's key is enough to deploy and delete without end.
pub const MAX_KNOWN_DELETED: usize = 200;

/// Whether it is still known what was asked of a repl that was deleted then.
pub fn is_known_after(deleted: Timestamp) -> bool {
    Timestamp::now().duration_since(deleted) < KNOWN_AFTER_DELETION
}

/// What was asked of a repl, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The journal of the server that was asked.
    journal: String,
    /// The place in it.
    position: u64,
    /// When, by that server's clock: between journals there is nothing better.
    time: Timestamp,
    /// What, in words.
    what: String,
}

impl Order {
    /// What was asked at this place of this journal.
    pub fn new(journal: &str, position: u64, time: Timestamp, what: String) -> Self {
        Self {
            journal: journal.to_owned(),
            position,
            time,
            what,
        }
    }

    /// The deployment of a submission that was received at this place of this journal.
    pub fn deployment(
        journal: &str,
        position: u64,
        time: Timestamp,
        submission: SubmissionId,
    ) -> Self {
        let what = format!("submission {submission} was deployed");
        Self::new(journal, position, time, what)
    }

    /// Of whoever has no journal: by the clock, to the microsecond.
    pub fn now() -> Self {
        let time = Timestamp::now();
        let position = u64::try_from(time.as_microsecond()).unwrap_or(0);
        Self::new("", position, time, "something else was deployed".to_owned())
    }

    /// Whether it was asked for before the other. A clock that was changed counts between journals only.
    pub fn is_before(&self, other: &Self) -> bool {
        match self.journal == other.journal {
            true => self.position < other.position,
            false => self.time < other.time,
        }
    }

    /// What was asked, in words.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Why what was asked for before is not done.
    pub fn superseded(&self) -> Problem {
        superseded(&self.what)
    }
}

/// The latest order that was carried out on a repl; part of its record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LatestOrder(Option<Order>);

impl LatestOrder {
    /// Whether there was none yet. Records leave it out then.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// This order was carried out.
    pub fn note(&mut self, order: &Order) {
        if self.0.as_ref().is_none_or(|last| last.is_before(order)) {
            self.0 = Some(order.clone());
        }
    }

    /// This order was not carried out after all: what was noted `before` it is the latest again.
    pub fn withdraw(&mut self, order: &Order, before: &Self) {
        if self.0.as_ref() == Some(order) {
            self.clone_from(before);
        }
    }

    /// Why this order is not carried out any more, if a later one was.
    pub fn supersedes(&self, order: &Order) -> Option<Problem> {
        let last = self.0.as_ref().filter(|last| order.is_before(last))?;
        Some(last.superseded())
    }
}

/// Why something is not carried out, such as a deployment: this was asked of its repl later.
pub fn superseded(what: &str) -> Problem {
    Problem::new(
        SUPERSEDED,
        "It was not carried out",
        format!("what was asked of its repl later stands: {what}"),
        "Nothing is wrong with it. To have it all the same, ask for it again: a submission, under a new submission_id.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_place_counts_and_between_journals_the_time() {
        let order = |journal: &str, position, second| {
            let time = Timestamp::from_second(second).unwrap();
            Order::new(journal, position, time, String::new())
        };
        // The clock was set back in between.
        assert!(order("a", 1, 90).is_before(&order("a", 2, 10)));
        assert!(!order("a", 2, 10).is_before(&order("a", 1, 90)));
        assert!(!order("a", 1, 1).is_before(&order("a", 1, 1)));
        assert!(order("a", 9, 1).is_before(&order("b", 2, 2)));
        assert!(!order("a", 1, 3).is_before(&order("b", 2, 2)));
    }

    #[test]
    fn what_was_not_carried_out_is_withdrawn_unless_something_later_was() {
        let order = |position| Order::new("a", position, Timestamp::UNIX_EPOCH, String::new());
        let mut latest = LatestOrder::default();
        latest.note(&order(1));
        let before = latest.clone();
        latest.note(&order(3));
        assert!(latest.supersedes(&order(2)).is_some());
        latest.withdraw(&order(3), &before);
        assert!(latest.supersedes(&order(2)).is_none() && latest == before);
        latest.note(&order(4));
        latest.withdraw(&order(3), &before);
        assert!(latest.supersedes(&order(3)).is_some());
    }
}
