//! Which repl has a domain: one ConfigMap per domain in the server's own namespace. The API server makes a
//! name once, so that of two servers that give a domain away at the same time one comes second.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, WATCH_LAG, Watched};
use super::cluster::{Cluster, Failure, Kind, Manifest};
use super::labels::{GANTRY, MANAGED_BY, REPL, USER};
use super::record::Records;
use super::release::Owner;
use crate::model::{Domain, ReplId};

/// Marks the ConfigMaps that are claims.
const CLAIMS: &str = "app.kubernetes.io/managed-by=gantry,gantry.dev/record=domain";

/// A claim that no record knows after this time is what a server left that died in between.
const SETTLED: SignedDuration = SignedDuration::from_mins(2);

/// Tries to get a claim that others change at the same time.
const MAX_TRIES: u32 = 5;

/// Every domain that a repl has.
#[derive(Debug, Clone)]
pub struct Claims {
    cluster: Cluster,
    namespace: String,
    cache: Cache<ConfigMap>,
}

impl Claims {
    /// Watches the claims of this namespace until stopped.
    pub fn start(cluster: &Cluster, namespace: &str, stop: &CancellationToken) -> Self {
        let watched = Watched {
            kind: Kind::ConfigMap,
            namespace: Some(namespace.to_owned()),
            labels: CLAIMS,
        };
        Self {
            cluster: cluster.clone(),
            namespace: namespace.to_owned(),
            cache: Cache::watch(cluster, watched, None, stop.clone()),
        }
    }

    /// Resolves when every claim has been seen.
    pub async fn synced(&self) -> Result<(), Failure> {
        self.cache.synced(Kind::ConfigMap).await
    }

    /// The repl that has this host name, as the watch last saw it.
    pub fn holder(&self, host: &str) -> Option<ReplId> {
        held_by(self.cache.get(&self.namespace, &name(host)).as_deref()?)
    }

    /// Takes the domain for the repl; `false`: another has it.
    pub async fn claim(
        &self,
        records: &Records,
        owner: &Owner,
        domain: &Domain,
    ) -> Result<bool, Failure> {
        for _ in 0..MAX_TRIES {
            let made = match self.cluster.create(&self.manifest(owner, domain)).await {
                Ok(_) => true,
                Err(failure) if failure.is_conflict() => {
                    match self.take_over(records, owner, domain).await? {
                        Some(taken) => taken,
                        None => continue,
                    }
                }
                Err(failure) => return Err(failure),
            };
            if made {
                self.seen(&owner.repl, domain).await;
            }
            return Ok(made);
        }
        Ok(false)
    }

    /// A claim that is there: ours, another's, or nobody's any more. `None`: it has just changed.
    async fn take_over(
        &self,
        records: &Records,
        owner: &Owner,
        domain: &Domain,
    ) -> Result<Option<bool>, Failure> {
        let name = name(domain.as_str());
        let found = self.cluster.get(Kind::ConfigMap, &self.namespace, &name);
        let Some(mut object) = found.await? else {
            return Ok(None);
        };
        let holder = object.data["data"]["repl"]
            .as_str()
            .and_then(|repl| repl.parse().ok());
        if holder.as_ref() == Some(&owner.repl) {
            return Ok(Some(true));
        }
        let record = match &holder {
            Some(holder) => records.fresh(holder).await?,
            None => None,
        };
        let made = object.metadata.creation_timestamp.as_ref();
        let young = made.is_none_or(|made| Timestamp::now().duration_since(made.0) < SETTLED);
        if young || record.is_some_and(|record| record.domains.contains(domain)) {
            return Ok(Some(false));
        }
        let manifest = self.manifest(owner, domain).body;
        object.data["data"] = manifest["data"].clone();
        for label in [REPL, USER] {
            let value = manifest["metadata"]["labels"][label]
                .as_str()
                .unwrap_or_default();
            let labels = object.metadata.labels.get_or_insert_default();
            labels.insert(label.to_owned(), value.to_owned());
        }
        object.metadata.managed_fields = None;
        match self.cluster.replace(Kind::ConfigMap, &object).await {
            Ok(_) => Ok(Some(true)),
            Err(failure) if failure.is_conflict() || failure.is_not_found() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Gives the domain up, if the repl has it.
    pub async fn release(&self, repl: &ReplId, domain: &Domain) -> Result<(), Failure> {
        let name = name(domain.as_str());
        let found = self.cluster.get(Kind::ConfigMap, &self.namespace, &name);
        let Some(object) = found.await? else {
            return Ok(());
        };
        let uid = object.metadata.uid.clone().unwrap_or_default();
        if object.data["data"]["repl"] != repl.as_str() {
            return Ok(());
        }
        let (kind, own) = (Kind::ConfigMap, &self.namespace);
        self.cluster.delete_life(kind, own, &name, &uid).await
    }

    fn manifest(&self, owner: &Owner, domain: &Domain) -> Manifest {
        let labels = json!({
            MANAGED_BY: GANTRY, USER: owner.user.as_str(), REPL: owner.repl.as_str(),
            "gantry.dev/record": "domain",
        });
        let metadata = json!({
            "name": name(domain.as_str()), "namespace": self.namespace, "labels": labels,
        });
        let data = json!({ "domain": domain.as_str(), "repl": owner.repl.as_str() });
        Manifest::new(
            Kind::ConfigMap,
            json!({ "metadata": metadata, "data": data }),
        )
    }

    /// Resolves when the watch shows whose it is: who was told so may use it at once.
    async fn seen(&self, repl: &ReplId, domain: &Domain) {
        let mut now = self.cache.follow(&self.namespace, &name(domain.as_str()));
        let shown = now.wait_for(|now| now.as_deref().and_then(held_by).as_ref() == Some(repl));
        if timeout(WATCH_LAG, shown).await.is_err() {
            tracing::warn!(%repl, %domain, "the watch does not show a domain that was just taken");
        }
    }
}

fn held_by(object: &ConfigMap) -> Option<ReplId> {
    object.data.as_ref()?.get("repl")?.parse().ok()
}

/// A name of fixed length: a host's may be as long as an object's.
fn name(host: &str) -> String {
    use std::fmt::Write;
    let mut name = "domain-".to_owned();
    for byte in Sha256::digest(host.as_bytes()).iter().take(20) {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}
