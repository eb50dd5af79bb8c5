//! The code store's keys in users' namespaces: where older servers put them, they are withdrawn; where the operator
//! shares them, for a template of another kind, they are placed.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use k8s_openapi::api::apps::v1::Deployment;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Failure, Kind, Owner, Record, Releases};
use crate::model::ReplId;
use crate::platform::PlatformError;
use crate::platform::kubernetes::cache::label;
use crate::platform::kubernetes::labels::REPL;
use crate::platform::kubernetes::release::{STORE_SECRET, names_keys};

/// Pauses after the rounds. The second round finds what a replica of an older version did while it was replaced;
/// later ones, what could not be done before.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(60),
    Duration::from_secs(10 * 60),
    Duration::from_secs(60 * 60),
];

/// Namespaces at one time.
const PARALLEL: usize = 8;

impl Releases {
    /// Places the keys in the user's namespace, if the operator shares them.
    pub(super) async fn share_keys(&self, owner: &Owner) -> Result<(), Failure> {
        match self.config.store_secret(&owner.user) {
            Some(secret) => self.cluster.apply(&secret).await.map(drop),
            None => Ok(()),
        }
    }

    /// Takes the keys out of users' namespaces, unless the operator shares them. What was made to start with them is
    /// made again first, so that it can start again.
    pub async fn withdraw_keys(self, stop: CancellationToken) {
        if self.config.shared_keys.is_some() {
            return;
        }
        for (number, pause) in PAUSES.into_iter().enumerate() {
            let round = self.withdraw_once();
            match stop.run_until_cancelled(round).await {
                None => return,
                Some(left) if left.is_empty() && number > 0 => return,
                Some(left) if left.is_empty() => {}
                Some(left) => {
                    tracing::warn!(namespaces = ?left, "the code store's keys could not be taken out of these namespaces yet");
                }
            }
            if stop.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// One round; the namespaces in which the keys still are.
    pub async fn withdraw_once(&self) -> BTreeSet<String> {
        let mut held = BTreeSet::new();
        for deployment in self.rollouts.deployments.all() {
            let repl: Option<ReplId> =
                label(deployment.as_ref(), REPL).and_then(|repl| repl.parse().ok());
            if let Some(repl) = repl.filter(|_| starts_with_keys(&deployment))
                && let Err(error) = self.make_without_keys(&repl).await
            {
                tracing::warn!(%repl, %error, "a repl could not be made again without the code store's keys");
                held.extend(deployment.metadata.namespace.clone());
            }
        }
        let namespaces = self.namespaces.of_users().into_iter();
        let namespaces: Vec<String> = namespaces.filter(|one| !held.contains(one)).collect();
        let removed = namespaces.into_iter().map(|namespace| async move {
            let removed = self
                .cluster
                .delete(Kind::Secret, &namespace, STORE_SECRET, None)
                .await;
            removed.err().map(|failure| {
                tracing::warn!(%namespace, %failure, "the Secret with the code store's keys is still there");
                namespace
            })
        });
        let left: Vec<Option<String>> = stream::iter(removed)
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        held.extend(left.into_iter().flatten());
        held
    }

    /// Applies what a repl runs once more: its pods are replaced, without a gap where the template has none. A release
    /// that another server makes meanwhile is waited for: it starts without the keys as well.
    async fn make_without_keys(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let record = self.records.fresh(repl).await;
        let record = record.map_err(|f| f.unavailable("The repl could not be read"))?;
        if !record.is_some_and(|record| record.runs()) {
            // What is left of it goes with the next clean-up, and need not start again.
            return Ok(());
        }
        let (turn, record) = self.take_turn(repl, None).await?;
        let made = self.make_again(repl, &record);
        self.during(repl, &turn, made).await
    }

    async fn make_again(&self, repl: &ReplId, record: &Record) -> Result<(), PlatformError> {
        let Some(stored) = record.current().filter(|_| record.runs()) else {
            return Ok(());
        };
        let owner = Owner {
            user: record.user_id.clone(),
            repl: repl.clone(),
        };
        tracing::info!(%repl, "is made again without the code store's keys");
        let made = self.put_back(&owner, stored).await;
        made.map_err(|f| f.unavailable("The repl could not be made again"))
    }
}

fn starts_with_keys(deployment: &Deployment) -> bool {
    let spec = deployment.spec.as_ref().map(|spec| &spec.template);
    spec.and_then(|template| serde_json::to_value(template).ok())
        .is_some_and(|template| names_keys(&template))
}
