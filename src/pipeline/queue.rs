//! Who runs next: every user in turn, so that one with a thousand submissions does not keep the
//! others waiting.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::model::UserId;

/// The queue. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FairQueue {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    free: usize,
    per_user: usize,
    waiting: usize,
    users: HashMap<UserId, Line>,
    /// Users with somebody waiting, in the order of their turns.
    turns: VecDeque<UserId>,
}

#[derive(Debug, Default)]
struct Line {
    running: usize,
    waiting: VecDeque<oneshot::Sender<Permit>>,
}

/// The right to run. Given back when dropped.
#[derive(Debug)]
pub struct Permit {
    user: UserId,
    queue: Option<FairQueue>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.give_back(&self.user);
        }
    }
}

impl FairQueue {
    /// At most `runs` at a time, at most `per_user` of one user.
    pub fn new(runs: usize, per_user: usize) -> Self {
        let state = State {
            free: runs,
            per_user,
            waiting: 0,
            users: HashMap::new(),
            turns: VecDeque::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Waits for the user's turn.
    pub async fn turn(&self, user: &UserId) -> Permit {
        let (tell, told) = oneshot::channel();
        {
            let mut state = self.locked();
            let line = state.users.entry(user.clone()).or_default();
            line.waiting.push_back(tell);
            if line.waiting.len() == 1 {
                state.turns.push_back(user.clone());
            }
            state.waiting += 1;
        }
        self.call();
        match told.await {
            Ok(permit) => permit,
            // The queue never drops a waiting sender; were it to, running is better than hanging.
            Err(_) => Permit {
                user: user.clone(),
                queue: None,
            },
        }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.locked().waiting
    }

    fn give_back(&self, user: &UserId) {
        {
            let mut state = self.locked();
            state.free += 1;
            if let Some(line) = state.users.get_mut(user) {
                line.running -= 1;
                if line.running == 0 && line.waiting.is_empty() {
                    state.users.remove(user);
                }
            }
        }
        self.call();
    }

    /// Lets run whoever may.
    fn call(&self) {
        while let Some((waiting, permit)) = self.next() {
            // Whoever stopped waiting gives its permit back by dropping it, outside the lock.
            let _ = waiting.send(permit);
        }
    }

    fn next(&self) -> Option<(oneshot::Sender<Permit>, Permit)> {
        let mut guard = self.locked();
        let state = &mut *guard;
        if state.free == 0 {
            return None;
        }
        let may_run = |user: &UserId| {
            state
                .users
                .get(user)
                .is_some_and(|line| line.running < state.per_user)
        };
        let turn = state.turns.iter().position(may_run)?;
        let user = state.turns.remove(turn)?;
        let line = state.users.get_mut(&user)?;
        let waiting = line.waiting.pop_front()?;
        line.running += 1;
        if !line.waiting.is_empty() {
            state.turns.push_back(user.clone());
        }
        state.free -= 1;
        state.waiting -= 1;
        let permit = Permit {
            user,
            queue: Some(self.clone()),
        };
        Some((waiting, permit))
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn users_take_turns() {
        let queue = FairQueue::new(1, 1);
        let (a, b): (UserId, UserId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let first = queue.turn(&a).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for user in [&a, &a, &a, &b] {
            let (queue, user, order) = (queue.clone(), user.clone(), Arc::clone(&order));
            tasks.push(tokio::spawn(async move {
                let _permit = queue.turn(&user).await;
                order.lock().unwrap().push(user.to_string());
            }));
            tokio::task::yield_now().await;
        }
        assert_eq!(queue.waiting(), 4);
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["a", "b", "a", "a"]);
    }

    #[tokio::test]
    async fn one_user_cannot_take_every_place() {
        let queue = FairQueue::new(4, 2);
        let (a, b): (UserId, UserId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let _first = queue.turn(&a).await;
        let _second = queue.turn(&a).await;
        assert!(
            tokio::time::timeout(Duration::from_millis(20), queue.turn(&a))
                .await
                .is_err()
        );
        let _other = queue.turn(&b).await;
    }

    #[tokio::test]
    async fn a_place_is_not_lost_with_whoever_stopped_waiting() {
        let queue = FairQueue::new(1, 1);
        let a: UserId = "a".parse().unwrap();
        let first = queue.turn(&a).await;
        assert!(
            tokio::time::timeout(Duration::from_millis(5), queue.turn(&a))
                .await
                .is_err()
        );
        drop(first);
        let _next = queue.turn(&a).await;
    }
}
