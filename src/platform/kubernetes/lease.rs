//! A Lease: what only one replica of the server may do at a time.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::core::DynamicObject;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::cluster::{Cluster, Failure, Kind, Manifest};

/// A Lease that this replica holds or would like to.
#[derive(Debug)]
pub struct Lease {
    cluster: Cluster,
    namespace: String,
    name: &'static str,
    /// This replica, in this life.
    holder: String,
    lasts: Duration,
    /// The last sign of life of another holder, and when it was seen here: clocks of two machines
    /// differ, so their times are never compared.
    seen: Option<(Value, Instant)>,
    /// How far this machine's clock was from the API server's, when the lease was last renewed.
    skew: Option<SignedDuration>,
}

impl Lease {
    /// Nothing is asked for yet.
    pub fn new(
        cluster: &Cluster,
        namespace: &str,
        name: &'static str,
        holder: String,
        lasts: Duration,
    ) -> Self {
        Self {
            cluster: cluster.clone(),
            namespace: namespace.to_owned(),
            name,
            holder,
            lasts,
            seen: None,
            skew: None,
        }
    }

    /// How far this machine's clock was from the API server's, when the lease was last renewed.
    pub fn skew(&self) -> Option<SignedDuration> {
        self.skew
    }

    /// Takes the lease when it is free or its holder was not heard of for as long as it lasts; renews
    /// it when it is held. `true`: it is this replica's, for as long as it lasts from now.
    pub async fn hold(&mut self) -> Result<bool, Failure> {
        let found = self
            .cluster
            .get(Kind::Lease, &self.namespace, self.name)
            .await?;
        let taken = match found {
            None => {
                let metadata = json!({ "name": self.name, "namespace": self.namespace });
                let body = json!({ "metadata": metadata, "spec": self.spec(&Value::Null) });
                let lease = Manifest::new(Kind::Lease, body);
                self.cluster
                    .create(&lease)
                    .await
                    .map(|made| self.look_at_clock(&made))
            }
            Some(mut lease) => {
                if !self.may_take(&lease) {
                    return Ok(false);
                }
                lease.data["spec"] = self.spec(&lease.data["spec"]);
                self.replace(lease).await
            }
        };
        match taken {
            Ok(()) => Ok(true),
            // Another replica was faster.
            Err(failure) if failure.is_conflict() => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// Gives it back, if it is held, so that the next does not have to wait.
    pub async fn release(&mut self) -> Result<(), Failure> {
        let found = self
            .cluster
            .get(Kind::Lease, &self.namespace, self.name)
            .await?;
        match found {
            Some(mut lease) if lease.data["spec"]["holderIdentity"] == self.holder.as_str() => {
                lease.data["spec"]["holderIdentity"] = "".into();
                self.replace(lease).await
            }
            _ => Ok(()),
        }
    }

    async fn replace(&mut self, mut lease: DynamicObject) -> Result<(), Failure> {
        lease.metadata.managed_fields = None;
        let replaced = self.cluster.replace(Kind::Lease, &lease).await?;
        self.look_at_clock(&replaced);
        Ok(())
    }

    /// The API server writes down by its own clock when an object was changed.
    fn look_at_clock(&mut self, written: &DynamicObject) {
        let fields = written.metadata.managed_fields.iter().flatten();
        let newest = fields
            .filter_map(|field| field.time.as_ref())
            .map(|time| time.0)
            .max();
        self.skew = newest.map(|theirs| Timestamp::now().duration_since(theirs));
    }

    fn may_take(&mut self, lease: &DynamicObject) -> bool {
        let spec = &lease.data["spec"];
        let holder = spec["holderIdentity"].as_str().unwrap_or_default();
        if holder.is_empty() || holder == self.holder {
            return true;
        }
        let sign = json!([holder, spec["renewTime"]]);
        match &self.seen {
            Some((seen, at)) if *seen == sign => at.elapsed() >= self.lasts,
            _ => {
                self.seen = Some((sign, Instant::now()));
                false
            }
        }
    }

    /// The lease as this replica's, after what it was.
    fn spec(&self, before: &Value) -> Value {
        // The API's MicroTime has six digits, neither more nor fewer.
        let now = format!("{:.6}", Timestamp::now());
        let mine = before["holderIdentity"] == self.holder.as_str();
        let changes = before["leaseTransitions"].as_i64().unwrap_or(0);
        json!({
            "holderIdentity": self.holder,
            "leaseDurationSeconds": self.lasts.as_secs().max(1),
            "acquireTime": if mine { before["acquireTime"].clone() } else { now.clone().into() },
            "renewTime": now,
            "leaseTransitions": if mine || before.is_null() { changes } else { changes + 1 },
        })
    }
}
