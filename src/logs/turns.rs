//! A fair order between those who search: each has one search at a time, and who lets many wait is
//! refused. One user's searches then cost that user only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::query::SearchError;
use crate::model::UserId;

/// Searches of one user that may wait behind the one that runs: what a page that is loaded asks for
/// at once.
const WAITING: usize = 7;
/// A search that took longer than this is followed by a rest of the same length before its user's
/// next one: nobody's searches take more than half of a processor.
const CHEAP: Duration = Duration::from_millis(100);

/// How many places each user has taken, of a bounded number.
#[derive(Debug, Clone)]
pub struct Places {
    most: usize,
    taken: Arc<Mutex<HashMap<Option<UserId>, usize>>>,
}

/// A place that was taken, until this is dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    user: Option<UserId>,
}

impl Places {
    /// So many for each user; admins together are one.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            taken: Arc::default(),
        }
    }

    /// Takes one; `None` when this user has no more.
    pub fn take(&self, user: Option<&UserId>) -> Option<Place> {
        let user = user.cloned();
        let mut taken = self.locked();
        let own = taken.entry(user.clone()).or_default();
        if *own >= self.most {
            return None;
        }
        *own += 1;
        drop(taken);
        Some(Place {
            places: self.clone(),
            user,
        })
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<Option<UserId>, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.locked();
        if let Some(own) = taken.get_mut(&self.user) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.user);
            }
        }
    }
}

/// The order in which searches run.
#[derive(Debug)]
pub(super) struct Turns {
    places: Places,
    longest: Duration,
    users: Mutex<HashMap<Option<UserId>, Arc<Semaphore>>>,
}

/// The right to search, until this is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    held: Option<(OwnedSemaphorePermit, Option<Place>)>,
    since: Instant,
}

impl Turns {
    /// Nobody waits for longer than this.
    pub(super) fn new(longest: Duration) -> Self {
        Self {
            places: Places::new(1 + WAITING),
            longest,
            users: Mutex::default(),
        }
    }

    /// Waits for this user's turn, unless too many of the same user wait.
    pub(super) async fn enter(&self, user: Option<&UserId>) -> Result<Turn, SearchError> {
        let place = self.places.take(user).ok_or(SearchError::Busy)?;
        let waited = tokio::time::timeout(self.longest, self.wait(user)).await;
        let mut turn = waited.map_err(|_| SearchError::Busy)??;
        if let Some((_, held)) = &mut turn.held {
            *held = Some(place);
        }
        Ok(turn)
    }

    /// The same for a follower, of which there is a bounded number: it waits however long it takes.
    pub(super) async fn wait(&self, user: Option<&UserId>) -> Result<Turn, SearchError> {
        let own = {
            let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
            // Forgets users who hold no permit and wait for none.
            users.retain(|_, own| Arc::strong_count(own) > 1);
            let own = users.entry(user.cloned());
            Arc::clone(own.or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        let permit = own.acquire_owned().await.map_err(|_| SearchError::Closed)?;
        Ok(Turn {
            held: Some((permit, None)),
            since: Instant::now(),
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let took = self.since.elapsed();
        let held = self.held.take();
        if took > CHEAP
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                tokio::time::sleep(took).await;
                drop(held);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_user_with_many_searches_waits_for_themselves_and_nobody_else_does() {
        let turns = Arc::new(Turns::new(Duration::from_secs(60)));
        let loud: UserId = "loud".parse().unwrap();
        let running = turns.enter(Some(&loud)).await.unwrap();
        let waiting: Vec<_> = (0..WAITING)
            .map(|_| {
                let (turns, loud) = (Arc::clone(&turns), loud.clone());
                tokio::spawn(async move { turns.enter(Some(&loud)).await.map(drop) })
            })
            .collect();
        tokio::task::yield_now().await;
        let refused = turns.enter(Some(&loud)).await;
        assert!(matches!(refused, Err(SearchError::Busy)), "{refused:?}");
        let quiet: UserId = "quiet".parse().unwrap();
        for other in [Some(&quiet), None] {
            let began = Instant::now();
            drop(turns.enter(other).await.unwrap());
            assert!(began.elapsed() < Duration::from_secs(1));
        }
        // An expensive one is followed by a rest.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let ended = Instant::now();
        drop(running);
        for search in waiting {
            search.await.unwrap().unwrap();
        }
        assert!(ended.elapsed() >= Duration::from_millis(300));
        tokio::task::yield_now().await;
        assert!(turns.places.locked().is_empty());
    }
}
