//! A repl in the cluster that nobody uses: nothing of it runs, and requests to its hosts come to the server.
//!
//! The record says that it is idle, before anything is removed and until everything is made again: a late
//! stop of another replica finds a newer record, and what a server leaves that dies in between is found by it.

use std::time::Duration;

use futures_util::future::try_join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::workspace::{MAKING, START_PATIENCE};
use super::{AWAY_PAUSE, Failure, Instant, Kind, Owner, Releases, Stored, no_release, sleep};
use crate::model::ReplId;
use crate::platform::kubernetes::cache::label;
use crate::platform::kubernetes::cluster::Manifest;
use crate::platform::kubernetes::labels::{IDLE, MANAGED, REPL};
use crate::platform::kubernetes::record::Record;
use crate::platform::kubernetes::rollout::DEPLOY_PATIENCE;
use crate::platform::{AWAY, PlatformError};

/// How often it is looked at whether what was woken serves.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How much later than another machine's clock this one may be.
const SKEW: SignedDuration = SignedDuration::from_secs(30);

impl Releases {
    /// See [`Platform::stop_idle`](crate::platform::Platform::stop_idle).
    pub async fn stop_idle(
        &self,
        repl: &ReplId,
        unused_since: Timestamp,
        looked: Timestamp,
    ) -> Result<bool, PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let failed = |failure: Failure| failure.unavailable("The idle repl could not be stopped");
        let noted = self.records.change(repl, |record| {
            let rests = record.runs() && record.since <= looked;
            if rests {
                record.rest(unused_since);
            }
            rests.then(|| record.clone())
        });
        let Some(Some(record)) = noted.await.map_err(failed)? else {
            return Ok(false);
        };
        self.remove_idle(repl, &record).await.map_err(failed)?;
        Ok(true)
    }

    /// Removes what ran, and has requests come to the server.
    async fn remove_idle(&self, repl: &ReplId, record: &Record) -> Result<(), Failure> {
        let (owner, wake) = self.led_here(repl, record);
        // First, so that there is no moment without somebody who answers. Some ingress controllers refuse a
        // host that two name: there it is done again when the repl's own is gone.
        let early = self.lead_here(wake.as_ref()).await;
        self.prune(&owner).await?;
        match early {
            Ok(()) => Ok(()),
            Err(_) => self.lead_here(wake.as_ref()).await,
        }
    }

    fn led_here(&self, repl: &ReplId, record: &Record) -> (Owner, Option<Manifest>) {
        let owner = Owner {
            user: record.user_id.clone(),
            repl: repl.clone(),
        };
        let own = &self.records.namespace;
        let current = record.current();
        let wake = current.and_then(|stored| self.config.wake_ingress(&owner, stored, own));
        (owner, wake)
    }

    async fn lead_here(&self, wake: Option<&Manifest>) -> Result<(), Failure> {
        match wake {
            Some(wake) => self.cluster.apply(wake).await.map(drop),
            None => Ok(()),
        }
    }

    /// Has an idle repl's host names lead here, after they were changed.
    pub(super) async fn rename_idle(
        &self,
        repl: &ReplId,
        record: &Record,
    ) -> Result<(), PlatformError> {
        let (_, wake) = self.led_here(repl, record);
        let led = self.lead_here(wake.as_ref()).await;
        led.map_err(|f| f.unavailable("The Ingress could not be changed"))
    }

    /// Requests to the repl do not come here any more.
    pub(super) async fn lead_away(&self, repl: &ReplId) -> Result<(), Failure> {
        let labels = format!("{MANAGED},{IDLE}={repl}");
        let own = &self.records.namespace;
        self.cluster.delete_all(Kind::Ingress, own, &labels).await
    }

    /// Requests go to the repl itself again.
    async fn lead_back(&self, owner: &Owner, stored: &Stored) -> Result<(), Failure> {
        let manifests = self.config.manifests(owner, stored, None);
        let ingresses = manifests.iter().filter(|one| one.kind == Kind::Ingress);
        let ingresses: Vec<&Manifest> = ingresses.collect();
        let apply = || try_join_all(ingresses.iter().map(|one| self.cluster.apply(one)));
        // As for the way here: in the order that leaves no gap, or else in the one that is allowed.
        let early = apply().await;
        self.lead_away(&owner.repl).await?;
        match early {
            Ok(_) => Ok(()),
            Err(_) => apply().await.map(drop),
        }
    }

    /// The same when what was woken serves: until then this server answers for it. What does not come up in
    /// time is seen to by [`Releases::settle_idle`] when it does.
    pub(super) fn lead_back_once_up(&self, owner: &Owner, stored: &Stored) {
        let (this, owner, stored) = (self.clone(), owner.clone(), stored.clone());
        tokio::spawn(async move {
            let began = Instant::now();
            while !this.serves(&owner, &stored) {
                if began.elapsed() > DEPLOY_PATIENCE {
                    return;
                }
                sleep(LOOK_AGAIN).await;
            }
            if let Err(failure) = this.settle_one(&owner.repl).await {
                tracing::warn!(repl = %owner.repl, %failure, "requests to a woken repl come by way of this server for a while");
            }
        });
    }

    /// Has requests to a repl, for which there is a way to the server, go where its record says.
    async fn settle_one(&self, repl: &ReplId) -> Result<(), Failure> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let Some(record) = self.records.fresh(repl).await? else {
            return self.lead_away(repl).await;
        };
        let (owner, _) = self.led_here(repl, &record);
        match record.current().filter(|_| record.wanted) {
            None => self.lead_away(repl).await,
            Some(_) if record.idle.is_some() => Ok(()),
            Some(stored) if self.serves(&owner, stored) => self.lead_back(&owner, stored).await,
            Some(_) => Ok(()),
        }
    }

    /// See [`Platform::is_idle`](crate::platform::Platform::is_idle). What a server left unmade that died
    /// while it made it is woken like what is idle.
    pub fn is_idle(&self, repl: &ReplId) -> bool {
        let Some(record) = self.records.known(repl).filter(|record| record.wanted) else {
            return false;
        };
        let owner = Owner {
            user: record.user_id.clone(),
            repl: repl.clone(),
        };
        let left = || {
            Timestamp::now().duration_since(record.since) > MAKING && !self.has_deployment(&owner)
        };
        record.idle.is_some() || left()
    }

    /// See [`Platform::wake`](crate::platform::Platform::wake). While the API server is away it waits.
    pub async fn wake(&self, repl: &ReplId) -> Result<bool, PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let (mut woken, began) = (false, Instant::now());
        loop {
            match self.wake_once(repl, &mut woken).await {
                Err(PlatformError::Unavailable(problem))
                    if problem.code == AWAY && began.elapsed() < START_PATIENCE =>
                {
                    tracing::warn!(%repl, %problem, "an idle repl waits for the API server");
                    sleep(AWAY_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    /// `ours`: it is this call that wakes it, however often it is tried.
    async fn wake_once(&self, repl: &ReplId, ours: &mut bool) -> Result<bool, PlatformError> {
        let woken = self
            .records
            .change(repl, |record| (record.wake(), record.clone()));
        let woken = woken.await;
        let woken = woken.map_err(|f| f.unavailable("The repl could not be recorded"))?;
        let (idle, record) = woken.ok_or_else(|| no_release(repl))?;
        let current = record.current().filter(|_| record.wanted);
        let stored = current.ok_or_else(|| no_release(repl))?;
        let (owner, _) = self.led_here(repl, &record);
        *ours |= idle.is_some();
        // Another server is at it, or was until it died.
        let theirs = Timestamp::now().duration_since(record.since) < MAKING;
        if !*ours && (theirs || self.has_deployment(&owner)) {
            return Ok(false);
        }
        let since = idle.unwrap_or(record.since);
        self.make(&owner, stored, Some(since)).await?;
        Ok(true)
    }

    /// See [`Platform::settle_idle`](crate::platform::Platform::settle_idle).
    pub async fn settle_idle(&self) -> Result<(), Failure> {
        if self.config.wake_service.is_none() {
            return Ok(());
        }
        for (repl, record) in self.records.all() {
            if record.idle.is_some() && self.is_left(&repl, &record) {
                let changing = self.changing(&repl);
                let _one = changing.lock().await;
                // Read now: another server may be waking it.
                let fresh = self.records.fresh(&repl).await?;
                if let Some(record) = fresh.filter(|record| record.idle.is_some()) {
                    tracing::warn!(%repl, "what is left of an idle repl is removed");
                    self.remove_idle(&repl, &record).await?;
                }
            }
        }
        let labels = format!("{MANAGED},{IDLE}");
        let own = Some(self.records.namespace.as_str());
        for ingress in self.cluster.list(Kind::Ingress, own, &labels).await? {
            let repl = ingress
                .labels()
                .get(IDLE)
                .and_then(|repl| repl.parse().ok());
            let Some(repl): Option<ReplId> = repl else {
                continue;
            };
            let idle = |record: &Record| record.idle.is_some();
            if !self.records.known(&repl).as_ref().is_some_and(idle) {
                self.settle_one(&repl).await?;
            }
        }
        Ok(())
    }

    /// Whether a Deployment is there from before the repl was idle.
    fn is_left(&self, repl: &ReplId, record: &Record) -> bool {
        let before = |metadata: &ObjectMeta| {
            let made = metadata.creation_timestamp.as_ref();
            made.is_some_and(|made| record.since.duration_since(made.0) > SKEW)
        };
        let deployments = self.rollouts.deployments.of(&record.user_id.namespace());
        deployments.iter().any(|deployment| {
            label(deployment.as_ref(), REPL) == Some(repl.as_str()) && before(&deployment.metadata)
        })
    }
}
