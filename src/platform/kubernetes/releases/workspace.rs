//! A repl's workspace in the cluster: the template's objects for its current files.

use jiff::{SignedDuration, Timestamp};

use super::{Failure, Owner, Record, Releases, Stored};
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
