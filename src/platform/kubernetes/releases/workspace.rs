//! A repl's workspace in the cluster: the template's objects for its current files.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::{SignedDuration, Timestamp};

use super::{Failure, Kind, Owner, Record, Releases, Stored, no_release, random};
use crate::model::{ReplId, TicketKey};
use crate::platform::kubernetes::release::{RUNNER_KEY, runner_name, runner_secret};
use crate::platform::{Opened, PlatformError, WorkspaceSpec};

/// How long another server gets to make what it has recorded. After that it has died in between.
const MAKING: SignedDuration = SignedDuration::from_secs(30);

impl Releases {
    /// See [`Platform::open_workspace`](crate::platform::Platform::open_workspace). The record says what
    /// is to be, and who wrote it made it; whoever finds something missing makes that, too.
    pub async fn open_workspace(&self, spec: &WorkspaceSpec) -> Result<Opened, PlatformError> {
        let repl = &spec.repl_id;
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let failed = |failure: Failure| failure.unavailable("The repl could not be recorded");
        let claimed = self.records.claim(repl, &spec.user_id).await;
        let not_found = || PlatformError::NotFound(format!("the repl {repl}"));
        if claimed.map_err(failed)? != spec.user_id {
            return Err(not_found());
        }
        let wanted = Stored::workspace(spec.argv.clone(), self.config.runner_image.clone());
        let open = |record: &mut Record| {
            let since = record.since;
            let (stored, fresh) = record.open(wanted.clone());
            (stored, fresh, since)
        };
        let opened = self.records.change(repl, open).await.map_err(failed)?;
        let (stored, fresh, since) = opened.ok_or_else(not_found)?;
        let owner = Owner {
            user: spec.user_id.clone(),
            repl: repl.clone(),
        };
        let there = !fresh && self.has_deployment(&owner);
        if !there {
            self.make(&owner, &stored).await?;
        }
        let being_made = Timestamp::now().duration_since(since) < MAKING;
        Ok(Opened {
            created: fresh || !(there || being_made),
            url: self.config.url(repl),
            terminal_url: self.config.terminal_url(repl),
        })
    }

    /// See [`Platform::ticket_key`](crate::platform::Platform::ticket_key).
    pub async fn ticket_key(&self, repl: &ReplId) -> Result<TicketKey, PlatformError> {
        let record = self.records.known(repl).filter(|record| record.wanted);
        let record = record.ok_or_else(|| no_release(repl))?;
        let name = runner_name(repl);
        let namespace = record.user_id.namespace();
        let secret = self.cluster.get(Kind::Secret, &namespace, &name).await;
        let secret = secret.map_err(|f| f.unavailable("The runner's key could not be read"))?;
        let text = secret
            .as_ref()
            .and_then(|s| s.data["data"][RUNNER_KEY].as_str());
        let text = text.and_then(|text| BASE64.decode(text).ok());
        let key = text.and_then(|text| TicketKey::from_text(std::str::from_utf8(&text).ok()?));
        key.ok_or_else(|| no_release(repl))
    }

    /// Makes what tickets for the repl's runner are made with, unless it is there.
    pub(super) async fn make_runner_key(&self, owner: &Owner) -> Result<(), Failure> {
        let (namespace, name) = (owner.user.namespace(), runner_name(&owner.repl));
        if self
            .cluster
            .get(Kind::Secret, &namespace, &name)
            .await?
            .is_some()
        {
            return Ok(());
        }
        let key = TicketKey::new(random()?);
        match self.cluster.create(&runner_secret(owner, &key)).await {
            Err(failure) if !failure.is_conflict() => Err(failure),
            _ => Ok(()),
        }
    }

    /// Applies everything; what the cluster refuses is taken back. While the API server is away it cannot
    /// be: the record stands, and the next call goes on from it.
    async fn make(&self, owner: &Owner, stored: &Stored) -> Result<(), PlatformError> {
        let made = match self.prepare(owner, stored).await {
            Ok(()) => self.apply(owner, stored).await.map(drop),
            Err(failure) => Err(failure),
        };
        let Err(failure) = made else {
            return Ok(());
        };
        let error = failure.unavailable("The repl could not be started");
        if !failure.is_away() {
            let stopped = self.records.change(&owner.repl, |record| {
                record.stop();
                record.last_error = Some(failure.to_string());
            });
            let undone = match stopped.await {
                Ok(_) => self.prune(owner).await,
                Err(failure) => Err(failure),
            };
            if let Err(failure) = undone {
                tracing::warn!(repl = %owner.repl, %failure, "what was made of a refused repl stays until it is stopped");
            }
        }
        Err(error)
    }
}
