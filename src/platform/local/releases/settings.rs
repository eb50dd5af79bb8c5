//! What a repl runs with on this machine: its variables and domains. There is one of each program.

use super::Releases;
use crate::model::{
    Domain, ReplChange, ReplId, ReplSettings, Scale, domain_taken, workspace_not_scaled,
};
use crate::platform::local::record::{Given, Stored};
use crate::platform::{ConfigureError, PlatformError};

impl Releases {
    /// See [`Platform::settings`](crate::platform::Platform::settings).
    pub fn settings(&self, repl: &ReplId) -> Result<ReplSettings, PlatformError> {
        let given = self.with(repl, |repl| repl.record.given.clone());
        let given = given.ok_or_else(|| unknown(repl))?;
        Ok(ReplSettings::new(None, &given.variables(), &given.domains))
    }

    /// See [`Platform::configure`](crate::platform::Platform::configure).
    pub async fn configure(
        &self,
        repl: &ReplId,
        change: &ReplChange,
    ) -> Result<ReplSettings, ConfigureError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        match change {
            // Callers look at `most_replicas` first.
            ReplChange::Scale(Scale::Fixed { replicas: 1 }) => {}
            ReplChange::Scale(_) => {
                return Err(PlatformError::NotReady(workspace_not_scaled()).into());
            }
            ReplChange::Variables(change) => {
                let given = self.with(repl, |repl| repl.record.given.clone());
                let given = given.ok_or_else(|| unknown(repl))?;
                let before = given.variables();
                let after = change.applied_to(&before)?;
                if after != before {
                    self.run_with(repl, given.with(after)).await?;
                }
            }
            ReplChange::Domains(domains) => self.name(repl, domains)?,
        }
        Ok(self.settings(repl)?)
    }

    /// What runs is started anew with these variables and takes over when it serves; what does not run has
    /// them at its next start.
    async fn run_with(&self, repl: &ReplId, given: Given) -> Result<(), PlatformError> {
        let wanted = self.with(repl, |repl| repl.record.runs()) == Some(true);
        let Some(current) = self.current(repl).filter(|_| wanted) else {
            self.with(repl, |repl| repl.record.give(given));
            return self.save(repl);
        };
        let stored = Stored { given, ..current };
        if !stored.is_workspace() {
            return self.switch(repl, stored, None).await.map(drop);
        }
        // Its files were saved; two of it would be edited apart.
        let program = self.with(repl, |repl| repl.program.take());
        if let Some(program) = program.flatten() {
            program.end(self.inner.config.drain, false).await;
        }
        self.begin(repl, stored, None).await
    }

    /// The repl's host names, unless another has one of them.
    fn name(&self, repl: &ReplId, domains: &[Domain]) -> Result<(), PlatformError> {
        {
            let mut repls = self.locked();
            let mut others = repls.iter().filter(|(id, _)| *id != repl);
            let taken = others.find_map(|(_, other)| {
                domains
                    .iter()
                    .find(|d| other.record.given.domains.contains(d))
            });
            if let Some(taken) = taken {
                return Err(PlatformError::NotReady(domain_taken(taken)));
            }
            let named = repls.get_mut(repl).ok_or_else(|| unknown(repl))?;
            named.record.name(domains.to_vec());
        }
        self.save(repl)
    }

    /// What of a release's host names its repl can have again: what no other repl has now.
    pub(super) fn nameable(&self, repl: &ReplId, mut domains: Vec<Domain>) -> Vec<Domain> {
        let repls = self.locked();
        domains.retain(|domain| {
            let mut others = repls.iter().filter(|(id, _)| *id != repl);
            !others.any(|(_, other)| other.record.given.domains.contains(domain))
        });
        domains
    }

    /// See [`Platform::repl_of`](crate::platform::Platform::repl_of).
    pub fn repl_of(&self, host: &str) -> Option<ReplId> {
        let repls = self.locked();
        let mut named = repls.iter();
        let has = |domains: &[Domain]| domains.iter().any(|domain| domain.as_str() == host);
        let found = named.find(|(_, repl)| has(&repl.record.given.domains));
        found.map(|(id, _)| id.clone())
    }

    /// The variables and domains that the repl's next start begins with.
    pub(super) fn given(&self, repl: &ReplId) -> Given {
        let given = self.with(repl, |repl| repl.record.given.clone());
        given.unwrap_or_default()
    }
}

fn unknown(repl: &ReplId) -> PlatformError {
    PlatformError::NotFound(format!("the repl {repl}"))
}
