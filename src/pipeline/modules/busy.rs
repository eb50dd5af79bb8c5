//! Who calls which module now: bounds the calls of a user, and knows which modules nobody calls.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Key;
use crate::model::UserId;

/// Calls that are under way.
#[derive(Debug)]
pub struct Busy {
    /// Most calls of one user.
    most: usize,
    /// Whether it is of interest when a module was last called.
    notes_use: bool,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    users: HashMap<UserId, usize>,
    modules: HashMap<Key, Use>,
}

#[derive(Debug)]
struct Use {
    under_way: usize,
    last: Instant,
}

/// The place of one call; dropped when it ends.
#[derive(Debug)]
pub struct Place {
    busy: Arc<Busy>,
    key: Key,
}

impl Busy {
    /// At most so many calls of one user.
    pub fn new(most: usize, notes_use: bool) -> Arc<Self> {
        Arc::new(Self {
            most,
            notes_use,
            now: Mutex::default(),
        })
    }

    /// Begins a call; `None`: the user has too many.
    pub fn enter(self: &Arc<Self>, key: &Key) -> Option<Place> {
        let mut now = self.locked();
        let calls = now.users.entry(key.0.clone()).or_default();
        if *calls >= self.most {
            return None;
        }
        *calls += 1;
        if self.notes_use {
            let used = now.modules.entry(key.clone()).or_insert_with(|| Use {
                under_way: 0,
                last: Instant::now(),
            });
            used.under_way += 1;
        }
        Some(Place {
            busy: Arc::clone(self),
            key: key.clone(),
        })
    }

    /// For how long nobody has called the module; `None`: as far as is known here, nobody ever has.
    pub fn quiet_for(&self, key: &Key) -> Option<Duration> {
        let now = self.locked();
        let used = now.modules.get(key)?;
        Some(match used.under_way {
            0 => used.last.elapsed(),
            _ => Duration::ZERO,
        })
    }

    /// Forgets modules that are not there any more.
    pub fn retain(&self, is_there: impl Fn(&Key) -> bool) {
        let mut now = self.locked();
        now.modules
            .retain(|key, used| used.under_way > 0 || is_there(key));
    }

    fn locked(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut now = self.busy.locked();
        if let Some(calls) = now.users.get_mut(&self.key.0) {
            *calls -= 1;
            if *calls == 0 {
                now.users.remove(&self.key.0);
            }
        }
        if let Some(used) = now.modules.get_mut(&self.key) {
            used.under_way -= 1;
            used.last = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(user: &str) -> Key {
        (user.parse().unwrap(), "math".parse().unwrap())
    }

    #[test]
    fn one_users_calls_are_bounded_and_nobody_elses() {
        let busy = Busy::new(2, false);
        let places: Vec<_> = (0..2).map(|_| busy.enter(&key("ann")).unwrap()).collect();
        assert!(busy.enter(&key("ann")).is_none());
        assert!(busy.enter(&key("bob")).is_some());
        drop(places);
        assert!(busy.enter(&key("ann")).is_some());
        assert!(busy.locked().users.is_empty(), "nothing is left of calls");
    }

    #[test]
    fn a_module_is_quiet_when_no_call_is_under_way() {
        let busy = Busy::new(2, true);
        assert_eq!(busy.quiet_for(&key("ann")), None);
        let place = busy.enter(&key("ann")).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(busy.quiet_for(&key("ann")), Some(Duration::ZERO));
        busy.retain(|_| false);
        drop(place);
        std::thread::sleep(Duration::from_millis(20));
        assert!(busy.quiet_for(&key("ann")).unwrap() >= Duration::from_millis(20));
        busy.retain(|_| false);
        assert_eq!(busy.quiet_for(&key("ann")), None);
    }
}
