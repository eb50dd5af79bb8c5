//! Memory that the server holds for its users, such as answers that a client has not read yet. Each user has
//! a budget of bytes: who has used it up waits until some are given back.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The budgets of all users.
#[derive(Debug)]
pub struct Budgets<U> {
    each: u32,
    users: Mutex<HashMap<U, Arc<Semaphore>>>,
}

/// Bytes of a user's budget, given back when this is dropped.
#[derive(Debug)]
pub struct Spent(OwnedSemaphorePermit);

impl<U: Eq + Hash> Budgets<U> {
    /// So many bytes for each user.
    pub fn new(each: u32) -> Self {
        Self {
            each,
            users: Mutex::default(),
        }
    }

    /// Waits until the user has so many bytes left, and takes them all at once: two that wait for each
    /// other's bytes cannot be. More than a whole budget counts as a whole one.
    pub async fn take(&self, user: U, bytes: usize) -> Spent {
        let own = {
            let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
            // Forgets users who hold no permit and wait for none.
            users.retain(|_, own| Arc::strong_count(own) > 1);
            let own = users.entry(user);
            let whole = || Arc::new(Semaphore::new(self.each as usize));
            Arc::clone(own.or_insert_with(whole))
        };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.each);
        match own.acquire_many_owned(bytes).await {
            Ok(permit) => Spent(permit),
            // Nothing closes these.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Spent {
    /// Keeps this many bytes and gives back the rest.
    pub fn keep(&mut self, bytes: usize) {
        let surplus = self.0.num_permits().saturating_sub(bytes);
        drop(self.0.split(surplus));
    }
}

/// Bytes that hold `held` for as long as any part of them is kept, such as in a connection's buffer.
pub fn holding<H: Send + 'static>(bytes: Vec<u8>, held: H) -> Bytes {
    struct Holding<H>(Vec<u8>, H);
    impl<H> AsRef<[u8]> for Holding<H> {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Holding(bytes, held))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn taken(budgets: &Budgets<&str>, user: &'static str, bytes: usize) -> Option<Spent> {
        let wait = Duration::from_millis(10);
        timeout(wait, budgets.take(user, bytes)).await.ok()
    }

    #[tokio::test]
    async fn who_uses_a_budget_up_waits_alone() {
        let budgets = Budgets::new(100);
        let first = taken(&budgets, "a", 60).await.unwrap();
        assert!(taken(&budgets, "a", 60).await.is_none());
        assert!(taken(&budgets, "b", 60).await.is_some());
        drop(first);
        assert!(taken(&budgets, "a", 60).await.is_some());
    }

    #[tokio::test]
    async fn a_part_of_the_bytes_holds_the_budget() {
        let budgets = Budgets::new(100);
        let spent = taken(&budgets, "a", 100).await.unwrap();
        let mut bytes = holding(vec![b'x'; 100], spent);
        let last = bytes.split_off(99);
        drop(bytes);
        assert!(taken(&budgets, "a", 1).await.is_none());
        drop(last);
        assert!(taken(&budgets, "a", 1).await.is_some());
    }

    #[tokio::test]
    async fn more_than_a_budget_is_a_whole_one() {
        let budgets = Budgets::new(100);
        let mut whole = taken(&budgets, "a", 1000).await.unwrap();
        assert!(taken(&budgets, "a", 1).await.is_none());
        whole.keep(40);
        assert!(taken(&budgets, "a", 61).await.is_none());
        assert!(taken(&budgets, "a", 60).await.is_some());
        assert_eq!(budgets.users.lock().unwrap().len(), 1);
        drop(whole);
        assert!(taken(&budgets, "b", 1).await.is_some());
        assert_eq!(budgets.users.lock().unwrap().len(), 1);
    }
}
