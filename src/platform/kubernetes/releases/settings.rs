//! What a repl runs with in the cluster: replicas and variables, applied as a rollout of what runs, and
//! domains, applied to its Ingress.
//!
//! The record is changed first: it says what is to be, also to a server that finds it after this one died.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use kube::ResourceExt;

use super::turn::{self, Turn};
use super::{
    AWAY_PATIENCE, Failure, Instant, Kind, Owner, Record, Releases, Stored, Value, kept_given_name,
};
use crate::model::{
    Domain, Problem, ReplChange, ReplId, ReplSettings, Scale, SecretText, Variables,
    VariablesChange, domain_taken, workspace_not_scaled,
};
use crate::platform::kubernetes::labels::{MANAGED, REPL, REVISION};
use crate::platform::kubernetes::record::Given;
use crate::platform::kubernetes::release::{
    env_key, env_secret, given_data, given_labels, given_name,
};
use crate::platform::{ConfigureError, PlatformError};

impl Releases {
    /// See [`Platform::settings`](crate::platform::Platform::settings).
    pub async fn settings(&self, repl: &ReplId) -> Result<ReplSettings, PlatformError> {
        let record = self.records.fresh(repl).await;
        let record = record.map_err(|f| f.unavailable("The repl could not be read"))?;
        let record = record.ok_or_else(|| PlatformError::NotFound(format!("the repl {repl}")))?;
        self.shown(repl, &record).await
    }

    /// See [`Platform::configure`](crate::platform::Platform::configure). It has a turn, as a release has: what runs
    /// afterwards is the record's current release, with what the record says.
    pub async fn configure(
        &self,
        repl: &ReplId,
        change: &ReplChange,
    ) -> Result<ReplSettings, ConfigureError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let (mut before, started) = (None, Instant::now());
        let after = loop {
            let (turn, record) = self.take_turn(repl, None).await?;
            let before = before.get_or_insert_with(|| record.clone());
            let configured = self.configure_in_turn(repl, change, before, &record, &turn);
            match self.during(repl, &turn, configured).await {
                Err(ConfigureError::Failed(error))
                    if turn::is_lost(&error) && started.elapsed() < AWAY_PATIENCE =>
                {
                    tracing::warn!(%repl, "another replica made a release of the repl meanwhile; its settings are changed again");
                }
                configured => break configured?,
            }
        };
        Ok(self.shown(repl, &after).await?)
    }

    /// `before`: what the first try found, `now`: what this one finds.
    async fn configure_in_turn(
        &self,
        repl: &ReplId,
        change: &ReplChange,
        before: &Record,
        now: &Record,
        turn: &Turn,
    ) -> Result<Record, ConfigureError> {
        let owner = Owner {
            user: now.user_id.clone(),
            repl: repl.clone(),
        };
        let after = match change {
            ReplChange::Scale(scale) => scaled(now, *scale)?,
            ReplChange::Variables(change) => self.regiven(&owner, now, change).await?,
            ReplChange::Domains(domains) => self.renamed(&owner, now, domains).await?,
        };
        // What an earlier try recorded is still to be brought about.
        if after == *now && now.settings() == before.settings() {
            return Ok(after);
        }
        let after = self.set(&owner, &after, turn).await?;
        let done = match change {
            // What runs stays as it is.
            ReplChange::Domains(_) => self.rename(&owner, &after).await,
            ReplChange::Scale(_) | ReplChange::Variables(_) => {
                self.bring_about(&owner, &after).await
            }
        };
        match done {
            Ok(()) => {
                self.unclaim(&owner, &before.domains, &after.domains).await;
                self.forget_given(&owner, after.given.as_ref()).await;
                Ok(after)
            }
            Err(error) if turn::is_lost(&error) => Err(error.into()),
            Err(error) => {
                self.undo(&owner, before, &after, &error, turn).await;
                self.unclaim(&owner, &after.domains, &before.domains).await;
                Err(error.into())
            }
        }
    }

    async fn shown(&self, repl: &ReplId, record: &Record) -> Result<ReplSettings, PlatformError> {
        let variables = self.given(repl, record.given.as_ref()).await?;
        Ok(ReplSettings::new(record.scale, &variables, &record.domains))
    }

    /// The record with these domains, which are then the repl's.
    async fn renamed(
        &self,
        owner: &Owner,
        before: &Record,
        domains: &[Domain],
    ) -> Result<Record, PlatformError> {
        if !domains.is_empty() && !matches!(self.config.has_program_host(), Ok(true)) {
            return Err(PlatformError::NotReady(Problem::new(
                "template_without_host",
                "The domain cannot be used",
                "the manifest template has no Ingress rule for ${GANTRY_APP_HOST} that one for a domain could be made from",
                "Ask the operator to add that rule to MANIFEST_TEMPLATE.",
            )));
        }
        let fresh = domains
            .iter()
            .filter(|domain| !before.domains.contains(domain));
        for domain in fresh {
            let claimed = self.claims.claim(&self.records, owner, domain).await;
            let claimed = claimed.map_err(|f| f.unavailable("The domain could not be taken"));
            if !matches!(claimed, Ok(true)) {
                self.unclaim(owner, domains, &before.domains).await;
                claimed?;
                return Err(PlatformError::NotReady(domain_taken(domain)));
            }
        }
        let mut after = before.clone();
        after.name(domains.to_vec());
        Ok(after)
    }

    /// What of a release's host names its repl can have again: what no other repl has now.
    pub(super) async fn nameable(
        &self,
        owner: &Owner,
        record: &Record,
        domains: Vec<Domain>,
    ) -> Vec<Domain> {
        let mut nameable = Vec::new();
        for domain in domains {
            let had = record.domains.contains(&domain);
            match had
                || self
                    .claims
                    .claim(&self.records, owner, &domain)
                    .await
                    .unwrap_or(false)
            {
                true => nameable.push(domain),
                false => {
                    tracing::warn!(repl = %owner.repl, %domain, "a domain does not come back with its release: another repl has it");
                }
            }
        }
        nameable
    }

    /// Gives up those domains that are not kept.
    pub(super) async fn unclaim(&self, owner: &Owner, domains: &[Domain], kept: &[Domain]) {
        for domain in domains.iter().filter(|domain| !kept.contains(domain)) {
            if let Err(failure) = self.claims.release(&owner.repl, domain).await {
                tracing::warn!(repl = %owner.repl, %domain, %failure, "a domain is not given up yet; whoever wants it next takes it over");
            }
        }
    }

    /// Makes the Ingress be as the record says.
    async fn rename(&self, owner: &Owner, record: &Record) -> Result<(), PlatformError> {
        let Some(stored) = record.current().filter(|_| record.wanted) else {
            return Ok(());
        };
        if record.idle.is_some() {
            return self.rename_idle(&owner.repl, record).await;
        }
        let named = self.config.manifests(owner, stored, None);
        for ingress in named
            .iter()
            .filter(|manifest| manifest.kind == Kind::Ingress)
        {
            let applied = self.cluster.apply(ingress).await;
            applied.map_err(|f| f.unavailable("The Ingress could not be changed"))?;
        }
        Ok(())
    }

    /// The record with these variables, whose values are then kept.
    async fn regiven(
        &self,
        owner: &Owner,
        before: &Record,
        change: &VariablesChange,
    ) -> Result<Record, ConfigureError> {
        let had = self.given(&owner.repl, before.given.as_ref()).await?;
        let variables = change.applied_to(&had)?;
        let mut after = before.clone();
        if variables == had {
            return Ok(after);
        }
        if variables.is_empty() {
            after.give(None);
            return Ok(after);
        }
        let last = before.revisions().last().copied().unwrap_or_default();
        let revision = Timestamp::now().as_millisecond().max(last + 1);
        let kept = env_secret(
            &self.records.namespace,
            &given_labels(owner, revision),
            &kept_given_name(&owner.repl, revision),
            &given_data(&variables),
        );
        let kept = self.cluster.apply(&kept).await;
        kept.map_err(|f| f.unavailable("The variables could not be kept"))?;
        after.give(Some(Given {
            revision,
            env: variables.env.into_keys().collect(),
            secrets: variables.secrets.into_keys().collect(),
        }));
        Ok(after)
    }

    /// Records these settings; what the record is then.
    async fn set(&self, owner: &Owner, to: &Record, turn: &Turn) -> Result<Record, PlatformError> {
        let set = self.records.change(&owner.repl, |record| {
            if !record.is_turn_of(turn) {
                return Err(turn::lost());
            }
            record.set(to);
            Ok(record.clone())
        });
        let set = set.await;
        let set = set.map_err(|f| f.unavailable("The change could not be recorded"))?;
        set.unwrap_or_else(|| {
            let what = format!("the repl {}", owner.repl);
            Err(PlatformError::NotFound(what))
        })
    }

    /// Makes what runs be as the record says, and waits until it is.
    async fn bring_about(&self, owner: &Owner, record: &Record) -> Result<(), PlatformError> {
        match record.current().filter(|_| record.runs()) {
            Some(stored) => self.roll_out(owner, stored).await,
            None => Ok(()),
        }
    }

    /// Everything as it was; what ran before never stopped. What another server has set or made run since stays.
    async fn undo(
        &self,
        owner: &Owner,
        before: &Record,
        after: &Record,
        error: &PlatformError,
        turn: &Turn,
    ) {
        let undone = async {
            let undone = self.records.change(&owner.repl, |record| {
                if record.settings() == after.settings() {
                    record.set(before);
                }
                record.is_turn_of(turn).then(|| record.clone())
            });
            let Some(Some(record)) = undone.await? else {
                return Ok(());
            };
            if !matches!(record.scale, Some(Scale::Auto(_))) {
                self.end_autoscaling(owner).await?;
            }
            let release = |stored: &Stored| (stored.release, stored.submission_id);
            let same = record.current().map(release) == after.current().map(release);
            if let Some(stored) = record.current().filter(|_| same && record.runs()) {
                self.put_back(owner, stored).await?;
            }
            self.forget_given(owner, record.given.as_ref()).await;
            Ok::<(), Failure>(())
        };
        if let Err(why) = undone.await {
            tracing::error!(repl = %owner.repl, %error, %why, "a change that failed could not be undone; the next one puts it right");
        }
    }

    /// The values of variables that the repl was given.
    async fn given(
        &self,
        repl: &ReplId,
        given: Option<&Given>,
    ) -> Result<Variables, PlatformError> {
        let Some(given) = given else {
            return Ok(Variables::default());
        };
        let name = kept_given_name(repl, given.revision);
        let kept = self
            .cluster
            .get(Kind::Secret, &self.records.namespace, &name);
        let kept = kept.await;
        let kept = kept.map_err(|f| f.unavailable("The repl's variables could not be read"))?;
        let data = kept.map(|secret| secret.data["data"].clone());
        let value = |name: &String| value(data.as_ref()?, name);
        let env = given.env.iter();
        let secrets = given.secrets.iter();
        Ok(Variables {
            env: env
                .filter_map(|name| Some((name.clone(), value(name)?)))
                .collect::<BTreeMap<_, _>>(),
            secrets: secrets
                .filter_map(|name| Some((name.clone(), SecretText::from(value(name)?))))
                .collect(),
        })
    }

    /// Puts the variables that the repl was given where its pods find them.
    pub(super) async fn place_given(&self, owner: &Owner, stored: &Stored) -> Result<(), Failure> {
        let Some(given) = &stored.given else {
            return Ok(());
        };
        let kept = kept_given_name(&owner.repl, given.revision);
        let name = given_name(&owner.repl, given.revision);
        let labels = given_labels(owner, given.revision);
        self.place(owner, &kept, &name, labels).await
    }

    /// Removes variables that do not run any more from the user's namespace, and those that nothing of the
    /// repl has any more for good.
    pub(super) async fn forget_given(&self, owner: &Owner, but: Option<&Given>) {
        let forgotten = async {
            let Some(record) = self.records.fresh(&owner.repl).await? else {
                return Ok(());
            };
            let own = format!("{MANAGED},{REPL}={},{REVISION}", owner.repl);
            let except = |revisions: String| match revisions.as_str() {
                "" => own.clone(),
                _ => format!("{own},{REVISION} notin ({revisions})"),
            };
            let placed = except(but.map(|b| b.revision.to_string()).unwrap_or_default());
            let kept: Vec<String> = record.revisions().iter().map(i64::to_string).collect();
            let kept = except(kept.join(","));
            let (secrets, users) = (Kind::Secret, owner.user.namespace());
            self.cluster.delete_all(secrets, &users, &placed).await?;
            let own = &self.records.namespace;
            self.cluster.delete_all(secrets, own, &kept).await
        };
        let forgotten: Result<(), Failure> = forgotten.await;
        if let Err(failure) = forgotten {
            tracing::warn!(repl = %owner.repl, %failure, "past variables of a repl stay until it is changed again");
        }
    }

    /// How many replicas are wanted, when somebody has said so. A workspace has one.
    pub(super) fn scale_of(&self, owner: &Owner, stored: &Stored) -> Option<Scale> {
        let scale = self.records.known(&owner.repl)?.scale?;
        Some(if stored.is_workspace() {
            Scale::Fixed { replicas: 1 }
        } else {
            scale
        })
    }

    /// How many replicas the repl's Deployment asks for now.
    pub fn replicas_now(&self, owner: &Owner) -> Option<u32> {
        let deployments = self.rollouts.deployments.of(&owner.user.namespace());
        let own = deployments.iter().find(|deployment| {
            deployment.labels().get(REPL).map(String::as_str) == Some(owner.repl.as_str())
        });
        u32::try_from(own?.spec.as_ref()?.replicas?).ok()
    }

    pub(super) async fn end_autoscaling(&self, owner: &Owner) -> Result<(), Failure> {
        let (namespace, name) = (owner.user.namespace(), owner.repl.as_str());
        let kind = Kind::HorizontalPodAutoscaler;
        self.cluster.delete(kind, &namespace, name, None).await
    }
}

/// The record with this many replicas.
fn scaled(before: &Record, scale: Scale) -> Result<Record, PlatformError> {
    let mut current = before.current().into_iter();
    let workspace = current.any(|stored| before.wanted && stored.is_workspace());
    if workspace && scale.most() > 1 {
        return Err(PlatformError::NotReady(workspace_not_scaled()));
    }
    Ok(Record {
        scale: Some(scale),
        ..before.clone()
    })
}

fn value(data: &Value, name: &str) -> Option<String> {
    let text = data[env_key(name)].as_str()?;
    String::from_utf8(BASE64.decode(text).ok()?).ok()
}
