//! One deployment of a repl at a time: of two that pass together, the one sent later is made last or alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::model::ReplId;

type Turn = Arc<tokio::sync::Mutex<()>>;

/// Whose turn it is, for each repl that is being deployed.
#[derive(Debug, Default)]
pub struct Deployments {
    turns: Mutex<HashMap<ReplId, Turn>>,
}

impl Deployments {
    /// Waits until nothing else of the repl is being deployed.
    pub async fn turn(&self, repl: &ReplId) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            // One that nobody holds or waits for is not needed.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(repl.clone()).or_default())
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_repl_is_deployed_to_once_at_a_time_and_nothing_is_kept_of_it() {
        let deployments = Deployments::default();
        let (one, other): (ReplId, ReplId) = ("one".parse().unwrap(), "other".parse().unwrap());
        let first = deployments.turn(&one).await;
        let second = tokio::time::timeout(Duration::from_millis(10), deployments.turn(&one));
        assert!(second.await.is_err());
        drop(deployments.turn(&other).await);
        drop(first);
        drop(deployments.turn(&one).await);
        drop(deployments.turn(&other).await);
        assert!(deployments.turns.lock().unwrap().len() <= 1);
    }
}
