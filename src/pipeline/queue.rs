//! Who runs next: every user in turn, so that one with a thousand submissions does not keep the
//! others waiting.

use std::collections::{BTreeMap, HashMap, VecDeque};
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
    next_number: u64,
    users: HashMap<UserId, Line>,
    /// Users with somebody waiting, in the order of their turns.
    turns: VecDeque<UserId>,
}

#[derive(Debug, Default)]
struct Line {
    running: usize,
    /// By number, which is the order they came in: one that stops waiting leaves at once.
    waiting: BTreeMap<u64, oneshot::Sender<Permit>>,
}

/// The right to run. Given back when dropped.
#[derive(Debug)]
pub struct Permit {
    user: UserId,
    /// `None`: it was given back already.
    queue: Option<FairQueue>,
}

impl Permit {
    /// Gives it back without calling anybody.
    fn put_back(mut self) {
        if let Some(queue) = self.queue.take() {
            queue.put_back(&self.user);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.put_back(&self.user);
            queue.call();
        }
    }
}

/// A place in a line. Dropped, the one that waited in it no longer does.
struct Place<'a> {
    queue: &'a FairQueue,
    user: &'a UserId,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.queue.leave(self.user, self.number);
    }
}

impl FairQueue {
    /// At most `runs` at a time, at most `per_user` of one user.
    pub fn new(runs: usize, per_user: usize) -> Self {
        let state = State {
            free: runs,
            per_user,
            waiting: 0,
            next_number: 0,
            users: HashMap::new(),
            turns: VecDeque::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Waits for the user's turn.
    pub async fn turn(&self, user: &UserId) -> Permit {
        loop {
            let (tell, told) = oneshot::channel();
            let number = self.enter(user, tell);
            let _place = Place {
                queue: self,
                user,
                number,
            };
            self.call();
            // The queue drops nobody who still waits; were it to, a new place is better than none.
            if let Ok(permit) = told.await {
                return permit;
            }
        }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.locked().waiting
    }

    fn enter(&self, user: &UserId, tell: oneshot::Sender<Permit>) -> u64 {
        let mut state = self.locked();
        let number = state.next_number;
        state.next_number += 1;
        state.waiting += 1;
        let line = state.users.entry(user.clone()).or_default();
        line.waiting.insert(number, tell);
        if line.waiting.len() == 1 {
            state.turns.push_back(user.clone());
        }
        number
    }

    /// Takes out of the line who has not been called yet.
    fn leave(&self, user: &UserId, number: u64) {
        let mut state = self.locked();
        let Some(line) = state.users.get_mut(user) else {
            return;
        };
        if line.waiting.remove(&number).is_none() {
            return;
        }
        let (empty, idle) = (line.waiting.is_empty(), line.running == 0);
        state.waiting -= 1;
        if empty {
            state.turns.retain(|turn| turn != user);
        }
        if empty && idle {
            state.users.remove(user);
        }
    }

    fn put_back(&self, user: &UserId) {
        let mut state = self.locked();
        state.free += 1;
        if let Some(line) = state.users.get_mut(user) {
            line.running -= 1;
            if line.running == 0 && line.waiting.is_empty() {
                state.users.remove(user);
            }
        }
    }

    /// Lets run whoever may.
    fn call(&self) {
        while let Some((waiting, permit)) = self.next() {
            // Nobody takes the permit of one that stops waiting in this very moment. It goes back
            // without a call of its own, which would be one inside the other for each of them.
            if let Err(unused) = waiting.send(permit) {
                unused.put_back();
            }
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
        let (_, waiting) = line.waiting.pop_first()?;
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

    #[tokio::test]
    async fn whoever_stops_waiting_leaves_at_once_and_costs_no_stack() {
        let queue = FairQueue::new(1, 1);
        let (a, b): (UserId, UserId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let first = queue.turn(&a).await;
        let mut waiting: Vec<_> = (0..50_000).map(|_| Box::pin(queue.turn(&a))).collect();
        for turn in &mut waiting {
            assert!(futures_util::poll!(turn).is_pending());
        }
        let mut last = Box::pin(queue.turn(&b));
        assert!(futures_util::poll!(&mut last).is_pending());
        assert_eq!(queue.waiting(), 50_001);
        drop(waiting);
        assert_eq!(queue.waiting(), 1);
        drop(first);
        drop(last.await);
        assert!(queue.locked().users.is_empty() && queue.locked().turns.is_empty());
    }

    #[test]
    fn permits_that_nobody_takes_go_back_one_after_the_other() {
        let queue = FairQueue::new(1, 1);
        let a: UserId = "a".parse().unwrap();
        for _ in 0..200_000 {
            // As one that stops waiting after it was taken out of the line.
            let (tell, told) = oneshot::channel();
            queue.enter(&a, tell);
            drop(told);
        }
        let small = std::thread::Builder::new().stack_size(128 << 10);
        let called = queue.clone();
        small.spawn(move || called.call()).unwrap().join().unwrap();
        assert_eq!((queue.waiting(), queue.locked().free), (0, 1));
    }
}
