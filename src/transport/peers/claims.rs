//! Which replica takes a submission whose id the client made.
//!
//! Whoever is about to take one claims it and asks the others. Two that claim at the same time both hear
//! of the other's claim, and the name that comes first in the alphabet keeps it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Peers;
use crate::model::SubmissionId;

/// Ids of other replicas' submissions that are remembered, the newest ones: hours of them.
const MAX_NOTED: usize = 100_000;

/// What is claimed here, and what others have claimed.
#[derive(Debug, Default)]
pub struct Claims {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Being taken here, by so many connections.
    claimed: HashMap<SubmissionId, usize>,
    /// Taken by others.
    noted: HashSet<SubmissionId>,
    order: VecDeque<SubmissionId>,
}

/// The right to take a submission in. Given back when dropped; by then the journal knows it, if it was
/// taken.
#[derive(Debug)]
pub struct Claim {
    peers: Arc<Peers>,
    id: SubmissionId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.peers.claims.locked();
        if let Some(count) = state.claimed.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                state.claimed.remove(&self.id);
            }
        }
    }
}

impl Claims {
    /// Claims the id for this replica.
    pub fn claim(peers: &Arc<Peers>, id: SubmissionId) -> Claim {
        *peers.claims.locked().claimed.entry(id).or_default() += 1;
        Claim {
            peers: Arc::clone(peers),
            id,
        }
    }

    /// Whether another replica took it.
    pub fn is_noted(&self, id: SubmissionId) -> bool {
        self.locked().noted.contains(&id)
    }

    /// No other replica has it.
    pub fn forget(&self, id: SubmissionId) {
        self.locked().noted.remove(&id);
    }

    /// Another replica asks for an id that the journal does not know: whether it is this one's.
    pub fn answer(&self, id: SubmissionId, claims: bool, here: &str, other: &str) -> bool {
        let mut state = self.locked();
        let mine = state.claimed.contains_key(&id) && (!claims || here < other);
        if claims && !mine && state.noted.insert(id) {
            state.order.push_back(id);
            if state.order.len() > MAX_NOTED
                && let Some(oldest) = state.order.pop_front()
            {
                state.noted.remove(&oldest);
            }
        }
        mine
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
