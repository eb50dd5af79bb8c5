//! How many repls a user may run at one time: what the operator sets.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::{Problem, ReplId, UserId};
use crate::platform::{Platform, PlatformError};

/// Places for repls that run.
#[derive(Debug, Default)]
pub struct Places {
    most: Option<usize>,
    opening: Mutex<Opening>,
}

/// Repls that are being started, in the order in which they took their places.
#[derive(Debug, Default)]
struct Opening {
    last: u64,
    all: Vec<(u64, UserId, ReplId)>,
}

/// A place that is held while a repl is being started; once it runs it counts as such.
#[derive(Debug)]
pub struct Place<'a> {
    places: &'a Places,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.places
            .locked()
            .all
            .retain(|(number, ..)| *number != self.number);
    }
}

impl Places {
    /// As many for each user; `None`: as many as they like.
    pub fn new(most: Option<usize>) -> Self {
        Self {
            most,
            opening: Mutex::default(),
        }
    }

    /// A place for the user's repl; the error names the limit. A repl that runs has its place already.
    pub async fn take(
        &self,
        platform: &dyn Platform,
        user: &UserId,
        repl: &ReplId,
    ) -> Result<Place<'_>, PlatformError> {
        let (number, before) = self.hold(user, repl);
        let place = Place {
            places: self,
            number,
        };
        let Some(most) = self.most else {
            return Ok(place);
        };
        let mut taken = before;
        // Looked at after the others: one that was being started then runs by now, or is among them.
        let running = platform.repls().await?.into_iter();
        let running = running.filter(|one| one.user_id == *user && one.state.is_on());
        let running: BTreeSet<ReplId> = running.map(|one| one.repl_id).collect();
        let runs = running.contains(repl);
        taken.extend(running);
        taken.remove(repl);
        if runs || taken.len() < most {
            return Ok(place);
        }
        Err(PlatformError::NotReady(full(user, most)))
    }

    /// Takes a number, and tells which repls of the user took one before.
    fn hold(&self, user: &UserId, repl: &ReplId) -> (u64, BTreeSet<ReplId>) {
        let mut opening = self.locked();
        let own = opening.all.iter().filter(|(_, owner, _)| owner == user);
        let before = own.map(|(_, _, repl)| repl.clone()).collect();
        opening.last += 1;
        let number = opening.last;
        opening.all.push((number, user.clone(), repl.clone()));
        (number, before)
    }

    fn locked(&self) -> MutexGuard<'_, Opening> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn full(user: &UserId, most: usize) -> Problem {
    Problem::new(
        "quota_exceeded",
        format!("{user} cannot run one more repl"),
        format!("{most} of theirs run, and GANTRY_MAX_REPLS allows a user {most}"),
        "Stop a repl that is not needed (POST /stop), or ask the operator for a larger limit.",
    )
}
