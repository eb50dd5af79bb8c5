//! Repls and their releases in the cluster: made, switched, rolled back, stopped.
//!
//! Every step can be done again: a server that died in the middle finds what is there by name, and
//! what it applies a second time is already so.

mod data;
mod idle;
mod keys;
mod settings;
mod turn;
mod workspace;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{try_join, try_join_all};
use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::cache::annotation;
use super::cluster::{Cluster, Failure, Kind, Manifest};
use super::domains::Claims;
use super::labels::{REPL, SUBMISSION, of_repl};
use super::namespace::{Namespaces, of_stopped};
use super::record::{Record, Records, Stored, StoredState};
use super::release::{
    Owner, ReleaseConfig, autoscaler, database_name, database_secret, env_key, env_name,
    env_secret, given_name,
};
use super::rollout::{REPLACED, Rollouts, is_rolled_out};
use super::test_pod;
use crate::model::{Order, Problem, Release, ReplId, SUPERSEDED, Scale, UserId};
use crate::platform::{AWAY, PlatformError, ReleaseSpec, RunningRelease};
use turn::Turn;

/// How long what was removed may be seen in the watches.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// How long a release waits for an API server that is away: a restart takes seconds, a node of its
/// own some minutes.
const AWAY_PATIENCE: Duration = Duration::from_secs(12 * 60);

/// Pause between two tries meanwhile.
const AWAY_PAUSE: Duration = Duration::from_secs(2);

/// Bytes of a database's password, from the system's random numbers.
const PASSWORD_BYTES: usize = 24;

/// What a stop removes, callers first.
pub const STOPPED_KINDS: [Kind; 6] = [
    Kind::HorizontalPodAutoscaler,
    Kind::Ingress,
    Kind::Service,
    Kind::Deployment,
    Kind::StatefulSet,
    Kind::Secret,
];

/// Every repl of the cluster.
#[derive(Debug, Clone)]
pub struct Releases {
    /// The way to the cluster.
    pub cluster: Cluster,
    /// Users' namespaces.
    pub namespaces: Namespaces,
    /// Repls' records.
    pub records: Records,
    /// Which repl has which domain.
    pub claims: Claims,
    /// What rollouts are watched with.
    pub rollouts: Rollouts,
    /// How releases are made.
    pub config: Arc<ReleaseConfig>,
    /// One change of a repl at a time.
    pub changing: Arc<Mutex<HashMap<ReplId, Arc<tokio::sync::Mutex<()>>>>>,
}

impl Releases {
    /// See [`Platform::ensure_release`](crate::platform::Platform::ensure_release). While the API
    /// server is away it waits: every step can be done again.
    pub async fn ensure(&self, spec: &ReleaseSpec) -> Result<RunningRelease, PlatformError> {
        let started = Instant::now();
        loop {
            match self.ensure_once(spec).await {
                Err(PlatformError::Unavailable(problem))
                    if problem.code == AWAY && started.elapsed() < AWAY_PATIENCE =>
                {
                    tracing::warn!(repl = %spec.repl_id, %problem, "a release waits for the API server");
                    sleep(AWAY_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    async fn ensure_once(&self, spec: &ReleaseSpec) -> Result<RunningRelease, PlatformError> {
        let changing = self.changing(&spec.repl_id);
        let _one = changing.lock().await;
        let failed = |failure: Failure| failure.unavailable("The release could not be recorded");
        // Before its name is taken.
        if self.records.known(&spec.repl_id).is_none()
            && let Some(problem) = self.overtaken(spec).await?
        {
            return Err(PlatformError::NotReady(problem));
        }
        let claimed = self.records.claim(&spec.repl_id, &spec.user_id).await;
        if claimed.map_err(failed)? != spec.user_id {
            return Err(PlatformError::NotFound(format!(
                "the repl {}",
                spec.repl_id
            )));
        }
        let owner = Owner {
            user: spec.user_id.clone(),
            repl: spec.repl_id.clone(),
        };
        let wanted = self.stored(spec);
        let reserve =
            |record: &mut Record| match record.is_too_late(wanted.submission_id, &spec.order) {
                Some(problem) => {
                    record.give_up(wanted.submission_id);
                    Err(problem)
                }
                None => Ok(record.reserve(wanted.clone())),
            };
        let reserved = self
            .records
            .change(&owner.repl, reserve)
            .await
            .map_err(failed)?;
        let Some(reserved) = reserved else {
            // It was deleted this very moment.
            return Err(match self.overtaken(spec).await? {
                Some(problem) => PlatformError::NotReady(problem),
                None => PlatformError::NotFound(format!("the repl {}", owner.repl)),
            });
        };
        let stored = reserved.map_err(PlatformError::NotReady)?;
        let done = match stored.state {
            StoredState::Current => self.serves(&owner, &stored),
            // It served, and what came later was wanted later.
            StoredState::Superseded | StoredState::Stopped => true,
            StoredState::Pending | StoredState::Failed => false,
        };
        if done {
            return Ok(self.running(&owner, &stored));
        }
        if !spec.env.is_empty() {
            self.keep_env(&owner, &stored, &spec.env)
                .await
                .map_err(failed)?;
        }
        self.switch(&owner, &stored, &spec.order).await
    }

    /// See [`Platform::overtaken`](crate::platform::Platform::overtaken).
    pub async fn overtaken(&self, spec: &ReleaseSpec) -> Result<Option<Problem>, PlatformError> {
        let records = &self.records;
        let record = records.fresh_or_deleted(&spec.repl_id, &spec.user_id).await;
        let record = record.map_err(|f| f.unavailable("The repl's record could not be read"))?;
        Ok(record.and_then(|record| record.is_too_late(spec.submission_id, &spec.order)))
    }

    /// See [`Platform::ordered`](crate::platform::Platform::ordered).
    pub async fn ordered(&self, repl: &ReplId, order: &Order) -> Result<(), PlatformError> {
        let noted = self.records.change(repl, |record| record.order.note(order));
        let noted = noted.await.map(drop);
        noted.map_err(|f| f.unavailable("What was asked of the repl could not be recorded"))
    }

    /// See [`Platform::rollback`](crate::platform::Platform::rollback).
    pub async fn rollback(
        &self,
        repl: &ReplId,
        release: Option<u64>,
        order: &Order,
    ) -> Result<RunningRelease, PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let record = self.records.fresh(repl).await;
        let record = record.map_err(|f| f.unavailable("The repl's releases could not be read"))?;
        let target = record.as_ref().and_then(|record| record.target(release));
        let (Some(record), Some(target)) = (&record, target) else {
            return Err(PlatformError::NotFound(match release {
                Some(number) => format!("release {number} of {repl} that served"),
                None => format!("an earlier release of {repl}"),
            }));
        };
        let owner = Owner {
            user: record.user_id.clone(),
            repl: repl.clone(),
        };
        let mut target = target.clone();
        target.domains = self.nameable(&owner, record, target.domains).await;
        let switched = self.switch(&owner, &target, order).await;
        let (kept, given_up) = match &switched {
            Ok(_) => (&target.domains, &record.domains),
            Err(_) => (&record.domains, &target.domains),
        };
        self.unclaim(&owner, given_up, kept).await;
        switched
    }

    /// Stops the repl. Its releases, code and database stay.
    pub async fn stop(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let failed = |failure: Failure| failure.unavailable("The repl could not be stopped");
        let mut was_idle = false;
        let stopped = self.records.change(repl, |record| {
            was_idle = record.idle.is_some();
            record.stop();
            record.user_id.clone()
        });
        let Some(user) = stopped.await.map_err(failed)? else {
            return Ok(());
        };
        // Also of one that was woken just now.
        if was_idle || self.config.wake_service.is_some() {
            self.lead_away(repl).await.map_err(failed)?;
        }
        let owner = Owner {
            user,
            repl: repl.clone(),
        };
        self.prune(&owner).await.map_err(failed)
    }

    /// Forgets the repl: one that was `used`, too, with the values of its variables. A database's volume was deleted
    /// before, or is in its user's namespace, where the next who has the name does not get to.
    pub async fn forget(&self, repl: &ReplId, used: bool) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let failed =
            |failure: Failure| failure.unavailable("The repl's name could not be released");
        if used && let Some(user) = self.owner(repl) {
            self.forget_secrets(&user, repl).await.map_err(failed)?;
        }
        let forgotten = self.records.forget(repl, used).await.map_err(failed)?;
        if let Some(record) = forgotten {
            let owner = Owner {
                user: record.user_id,
                repl: repl.clone(),
            };
            self.unclaim(&owner, &record.domains, &[]).await;
        }
        Ok(())
    }

    /// Deletes what is kept of the repl's variables in the server's own namespace, and its database's password, which
    /// no volume needs any more.
    async fn forget_secrets(&self, user: &UserId, repl: &ReplId) -> Result<(), Failure> {
        let kept = format!("{},{REPL}={repl}", self.cluster.made_here());
        let own = self
            .cluster
            .delete_all(Kind::Secret, &self.records.namespace, &kept);
        own.await?;
        if self.data_claims(user, repl).await?.is_empty() {
            let name = database_name(repl);
            let namespace = user.namespace();
            self.cluster
                .delete(Kind::Secret, &namespace, &name, None)
                .await?;
        }
        Ok(())
    }

    /// Whose it is, as far as the watch knows; a name taken this very moment is refused by `claim`.
    pub fn owner(&self, repl: &ReplId) -> Option<UserId> {
        self.records.known(repl).map(|record| record.user_id)
    }

    /// Every release of the repl, newest first.
    pub async fn of(&self, repl: &ReplId) -> Result<Vec<Release>, PlatformError> {
        let record = self.records.fresh(repl).await;
        let record = record.map_err(|f| f.unavailable("The repl's releases could not be read"))?;
        record
            .map(|record| record.listed())
            .ok_or_else(|| PlatformError::NotFound(format!("the repl {repl}")))
    }

    /// What is stored of a release that is asked for.
    fn stored(&self, spec: &ReleaseSpec) -> Stored {
        Stored {
            release: 0,
            submission_id: spec.submission_id,
            time: Timestamp::now(),
            state: StoredState::Pending,
            argv: spec.argv.clone(),
            env_names: spec.env.keys().cloned().collect(),
            given: None,
            domains: Vec::new(),
            database: spec.database,
            serves: Some(spec.serves),
            code_digest: spec.tested.code.clone(),
            tests_digest: spec.tested.tests.clone(),
            image: self.tested_image(&spec.user_id),
        }
    }

    /// The image that the tests ran in, to the digest where the node knows it.
    fn tested_image(&self, user: &UserId) -> String {
        let pods = &self.rollouts.pods;
        let pod = pods.get(&user.namespace(), &test_pod::name(user));
        let statuses = pod
            .as_ref()
            .and_then(|pod| pod.status.as_ref()?.container_statuses.as_ref());
        let container = statuses
            .into_iter()
            .flatten()
            .find(|c| c.name == test_pod::CONTAINER);
        match container {
            Some(container) if !container.image_id.is_empty() => container.image_id.clone(),
            _ => self.config.runner_image.clone(),
        }
    }

    /// Whether the release is the one that serves, as far as the watches know.
    fn serves(&self, owner: &Owner, stored: &Stored) -> bool {
        let submission = stored.submission_id.to_string();
        let deployments = self.rollouts.deployments.of(&owner.user.namespace());
        deployments.iter().any(|deployment| {
            super::cache::label(deployment.as_ref(), super::labels::REPL)
                == Some(owner.repl.as_str())
                && annotation(deployment.as_ref(), SUBMISSION) == Some(&submission)
                && is_rolled_out(deployment)
        })
    }

    /// Makes a release serve, and the one before it go; or everything as it was before. One server does so at
    /// a time.
    async fn switch(
        &self,
        owner: &Owner,
        stored: &Stored,
        order: &Order,
    ) -> Result<RunningRelease, PlatformError> {
        let started = Instant::now();
        loop {
            let (turn, record) = self.take_turn(&owner.repl, Some(order)).await?;
            let stored = record.made_now(stored);
            let switched = self.switch_in_turn(owner, &stored, order, &turn);
            match self.during(&owner.repl, &turn, switched).await {
                Err(error) if turn::is_lost(&error) && started.elapsed() < AWAY_PATIENCE => {
                    tracing::warn!(repl = %owner.repl, "another replica made a release of the repl meanwhile; this one is made again");
                }
                switched => return switched,
            }
        }
    }

    async fn switch_in_turn(
        &self,
        owner: &Owner,
        stored: &Stored,
        order: &Order,
        turn: &Turn,
    ) -> Result<RunningRelease, PlatformError> {
        match self.roll_out(owner, stored).await {
            Ok(()) => {}
            // It is not this release that failed: it is made again, unless something that was asked for later took
            // its place.
            Err(error) if turn::is_lost(&error) => return Err(error),
            // Nothing can be put back either; what was asked for is asked for again.
            Err(PlatformError::Unavailable(problem)) if problem.code == AWAY => {
                return Err(PlatformError::Unavailable(problem));
            }
            Err(error) => {
                self.roll_back(owner, stored, &error, turn).await;
                return Err(error);
            }
        }
        let mut was_idle = false;
        let switched = self.records.change(&owner.repl, |record| {
            if !record.is_turn_of(turn) {
                return Err(turn::lost());
            }
            if let Some(problem) = record.order.supersedes(order) {
                return Err(PlatformError::NotReady(problem));
            }
            let before = record.current().cloned();
            was_idle = record.idle.is_some();
            record.switch(stored.release);
            record.give(stored.given.clone());
            record.name(stored.domains.clone());
            record.order.note(order);
            record.making = None;
            Ok(before.filter(|before| before.release != stored.release))
        });
        let switched = switched.await;
        let switched = switched.map_err(|f| f.unavailable("The release could not be recorded"))?;
        let before = switched.transpose();
        if let Err(error @ PlatformError::NotReady(_)) = &before {
            // It was stopped, say, while this came up.
            self.roll_back(owner, stored, error, turn).await;
        }
        let before = before?;
        if was_idle {
            self.lead_back_once_up(owner, stored);
        }
        if let Some(Some(before)) = before {
            self.forget_env(owner, before.release).await;
            if before.given != stored.given {
                self.forget_given(owner, stored.given.as_ref()).await;
            }
        }
        Ok(self.running(owner, stored))
    }

    /// Has it run and waits until it serves. The turn is lost when somebody applied something else meanwhile.
    async fn roll_out(&self, owner: &Owner, stored: &Stored) -> Result<(), PlatformError> {
        let failed = |failure: Failure| {
            let problem = failure.problem("The release could not be made");
            if failure.is_away() || failure.is_terminating() {
                PlatformError::Unavailable(problem)
            } else {
                PlatformError::NotReady(problem)
            }
        };
        self.prepare(owner, stored).await.map_err(failed)?;
        if stored.database {
            let ready = self.rollouts.database(owner).await;
            ready.map_err(PlatformError::NotReady)?;
        }
        let known = self.records.known(&owner.repl);
        let idle = known.is_some_and(|record| record.idle.is_some());
        let led_to = !idle || self.config.wake_service.is_none();
        let applied = self.apply(owner, stored, led_to).await;
        let (name, generation) = applied.map_err(failed)?;
        let waited = self.rollouts.wait(owner, stored, &name, generation).await;
        waited.map_err(|problem| match problem.code.as_str() {
            REPLACED => turn::lost(),
            _ => PlatformError::NotReady(problem),
        })
    }

    /// Makes what the template's objects refer to.
    async fn prepare(&self, owner: &Owner, stored: &Stored) -> Result<(), Failure> {
        self.namespaces.ensure(&owner.user).await?;
        let prepared = try_join_all([
            Box::pin(self.share_keys(owner)) as std::pin::Pin<Box<dyn Future<Output = _> + Send>>,
            Box::pin(self.place_env(owner, stored)),
            Box::pin(self.place_given(owner, stored)),
            Box::pin(self.make_runner_key(owner)),
            Box::pin(self.apply_database(owner, stored)),
        ]);
        prepared.await.map(drop)
    }

    /// Applies the template's objects; the Deployment's name and what it came to. `led_to`: requests are to
    /// come to it; otherwise the server answers them until it serves.
    async fn apply(
        &self,
        owner: &Owner,
        stored: &Stored,
        led_to: bool,
    ) -> Result<(String, i64), Failure> {
        let scale = self.scale_of(owner, stored);
        if let Some(Scale::Fixed { .. }) = scale {
            // Two would turn the same screw.
            self.end_autoscaling(owner).await?;
        }
        let replicas = scale.map(|scale| scale.replicas(self.replicas_now(owner)));
        let mut manifests = self.config.manifests(owner, stored, replicas);
        manifests.retain(|manifest| led_to || manifest.kind != Kind::Ingress);
        let (releases, others): (Vec<Manifest>, Vec<Manifest>) = manifests
            .into_iter()
            .partition(|m| m.kind == Kind::Deployment);
        let others = try_join_all(others.iter().map(|m| self.cluster.apply(m)));
        let release = try_join_all(releases.iter().map(|m| self.cluster.apply(m)));
        let (applied, _) = try_join(release, others).await?;
        let deployment = applied.first();
        let name = deployment.map(|d| d.name_any()).unwrap_or_default();
        let generation = deployment.and_then(|d| d.metadata.generation);
        if let Some(Scale::Auto(auto)) = scale {
            self.cluster.apply(&autoscaler(owner, &name, auto)).await?;
        }
        Ok((name, generation.unwrap_or_default()))
    }

    /// Puts back what served before; it never stopped serving.
    async fn roll_back(&self, owner: &Owner, failed: &Stored, error: &PlatformError, turn: &Turn) {
        let overtaken =
            matches!(error, PlatformError::NotReady(problem) if problem.code == SUPERSEDED);
        let why = match error {
            PlatformError::NotReady(problem) | PlatformError::Unavailable(problem) => {
                problem.to_string()
            }
            PlatformError::NotFound(what) => format!("{what} does not exist"),
        };
        let noted = self.records.change(&owner.repl, |record| {
            if overtaken || !record.is_turn_of(turn) {
                record.give_up(failed.submission_id);
            } else {
                record.fail(failed.release, &why);
            }
            // Another server makes something else: what it makes is not to be touched.
            let own = record.is_turn_of(turn);
            own.then(|| (record.runs(), record.current().cloned()))
        });
        let undone = match noted.await {
            Ok(Some(Some((true, Some(before))))) if before.release != failed.release => {
                self.put_back(owner, &before).await
            }
            Ok(Some(Some((true, Some(_))) | None) | None) => Ok(()),
            Ok(Some(Some(_))) => self.prune(owner).await,
            Err(failure) => Err(failure),
        };
        match undone {
            Ok(()) => self.forget_env(owner, failed.release).await,
            Err(failure) => {
                tracing::error!(repl = %owner.repl, %failure, "a failed release could not be rolled back; the previous one serves, the next release puts it right");
            }
        }
    }

    /// Applies again what ran before.
    async fn put_back(&self, owner: &Owner, before: &Stored) -> Result<(), Failure> {
        self.place_env(owner, before).await?;
        self.place_given(owner, before).await?;
        self.apply(owner, before, true).await.map(drop)
    }

    /// Removes everything that served the repl, and waits until it is seen to be gone.
    async fn prune(&self, owner: &Owner) -> Result<(), Failure> {
        let namespace = owner.user.namespace();
        let labels = of_stopped(&owner.repl);
        let removed = STOPPED_KINDS.map(|kind| self.cluster.delete_all(kind, &namespace, &labels));
        try_join_all(removed).await?;
        let mut changes = self.rollouts.deployments.changes(&namespace);
        let gone = async {
            while self.has_deployment(owner) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        if timeout(GONE_WITHIN, gone).await.is_err() {
            tracing::warn!(repl = %owner.repl, "a stopped repl's Deployment is still there");
        }
        Ok(())
    }

    fn has_deployment(&self, owner: &Owner) -> bool {
        let deployments = self.rollouts.deployments.of(&owner.user.namespace());
        deployments.iter().any(|deployment| {
            super::cache::label(deployment.as_ref(), super::labels::REPL)
                == Some(owner.repl.as_str())
        })
    }

    /// Makes the database's objects; its Secret only once, since its password is in the volume.
    async fn apply_database(&self, owner: &Owner, stored: &Stored) -> Result<(), Failure> {
        if !stored.database {
            return Ok(());
        }
        let namespace = owner.user.namespace();
        let name = database_name(&owner.repl);
        let there = self.cluster.get(Kind::Secret, &namespace, &name).await?;
        if there.is_none() {
            match self
                .cluster
                .create(&database_secret(owner, &password()?))
                .await
            {
                Err(failure) if !failure.is_conflict() => return Err(failure),
                _ => {}
            }
        }
        let manifests = self.config.database(owner);
        try_join_all(manifests.iter().map(|m| self.cluster.apply(m))).await?;
        Ok(())
    }

    /// Keeps a release's variables for as long as it may be rolled back to: out of the user's
    /// namespace, where a stop removes everything.
    async fn keep_env(
        &self,
        owner: &Owner,
        stored: &Stored,
        env: &BTreeMap<String, String>,
    ) -> Result<(), Failure> {
        let keyed = env
            .iter()
            .map(|(name, value)| (env_key(name), value.clone()))
            .collect();
        let labels = of_repl(&owner.user, &owner.repl);
        let name = kept_env_name(&owner.repl, stored.release);
        let secret = env_secret(&self.records.namespace, &labels, &name, &keyed);
        self.cluster.apply(&secret).await.map(drop)
    }

    /// Puts a release's variables where its pods find them.
    async fn place_env(&self, owner: &Owner, stored: &Stored) -> Result<(), Failure> {
        if stored.env_names.is_empty() {
            return Ok(());
        }
        let kept = kept_env_name(&owner.repl, stored.release);
        let name = env_name(&owner.repl, stored.release);
        let labels = of_repl(&owner.user, &owner.repl);
        self.place(owner, &kept, &name, labels).await
    }

    /// Copies a Secret of the server's own namespace to where pods find it.
    async fn place(
        &self,
        owner: &Owner,
        kept: &str,
        name: &str,
        labels: Value,
    ) -> Result<(), Failure> {
        let kept = self
            .cluster
            .get(Kind::Secret, &self.records.namespace, kept);
        let data = kept.await?.map(|secret| secret.data["data"].clone());
        let metadata =
            json!({ "name": name, "namespace": owner.user.namespace(), "labels": labels });
        let data = data.filter(Value::is_object);
        let data = data.unwrap_or_else(|| Value::Object(serde_json::Map::new()));
        let body = json!({ "metadata": metadata, "type": "Opaque", "data": data });
        let secret = Manifest::new(Kind::Secret, body);
        self.cluster.apply(&secret).await.map(drop)
    }

    /// Removes a release's variables from the user's namespace; they are put there again if it comes
    /// back.
    async fn forget_env(&self, owner: &Owner, release: u64) {
        let name = env_name(&owner.repl, release);
        let namespace = owner.user.namespace();
        let deleted = self.cluster.delete(Kind::Secret, &namespace, &name, None);
        if let Err(failure) = deleted.await {
            tracing::warn!(repl = %owner.repl, %failure, "a past release's variables stay until the repl is stopped");
        }
    }

    fn running(&self, owner: &Owner, stored: &Stored) -> RunningRelease {
        RunningRelease {
            release: stored.release,
            url: self.config.url(&owner.repl),
        }
    }

    /// The lock of a repl's changes.
    pub fn changing(&self, repl: &ReplId) -> Arc<tokio::sync::Mutex<()>> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(changing.entry(repl.clone()).or_default())
    }
}

/// The Secret in the server's own namespace that keeps the variables that a repl was given.
pub fn kept_given_name(repl: &ReplId, revision: i64) -> String {
    format!("repl-{}", given_name(repl, revision))
}

/// The Secret in the server's own namespace that keeps a release's variables.
pub fn kept_env_name(repl: &ReplId, release: u64) -> String {
    format!("repl-{}", env_name(repl, release))
}

/// Random bytes of a secret.
pub fn random<const BYTES: usize>() -> Result<[u8; BYTES], Failure> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes).map_err(|error| {
        let error = std::io::Error::other(error);
        Failure::new("make a secret", kube::Error::ReadEvents(error))
    })?;
    Ok(bytes)
}

fn password() -> Result<String, Failure> {
    use std::fmt::Write;
    Ok(random::<PASSWORD_BYTES>()?
        .iter()
        .fold(String::new(), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        }))
}

/// A repl that is not there, in words.
pub fn no_release(repl: &ReplId) -> PlatformError {
    PlatformError::NotFound(format!("a running release of {repl}"))
}

/// What a caller is told who cannot be connected to a program.
pub fn unreachable(why: String) -> PlatformError {
    PlatformError::Unavailable(Problem::new(
        "program_unreachable",
        "The program cannot be reached",
        why,
        "Look at its log and at its pod; deploy it again if it does not come back.",
    ))
}
