//! Which nodes are heard of: by the Leases that their kubelets renew, long before the cluster itself
//! gives a node up.
//!
//! Clocks of two machines differ, so a heartbeat counts when it is seen here. When no node at all is
//! heard of, it is the API server that is silent, and nothing is said about nodes.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use tokio::time::Instant;

use crate::model::{ImageName, NodeState, NodeStatus};

/// A kubelet renews its Lease this often while it lasts: Kubernetes' own fraction.
const RENEWALS: u32 = 4;

/// How long a kubelet's Lease lasts that does not say so: Kubernetes' default.
const LEASE_LASTS: i32 = 40;

/// A node.
#[derive(Debug, Default)]
struct Known {
    /// What the cluster says: why it is not ready.
    not_ready: Option<String>,
    /// When its status was last written; for nodes without a Lease.
    reported: Option<Timestamp>,
    /// The images it has, by their whole names.
    images: HashSet<String>,
    /// There is such a node: a Lease may come first, and stay longer.
    exists: bool,
    beat: Option<Beat>,
    /// As it was last told.
    failed: Option<Failed>,
}

#[derive(Debug)]
struct Beat {
    /// The kubelet's own time.
    time: Option<Timestamp>,
    /// When it was seen here.
    seen: Instant,
    every: Duration,
}

/// Why a node counts as failed, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// In words.
    pub why: String,
    /// When it was last heard of.
    pub since: Timestamp,
}

/// A node that failed, or came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its name.
    pub node: String,
    /// As it is now.
    pub failed: Option<Failed>,
    /// As it was.
    pub was: Option<Failed>,
}

/// Every node.
#[derive(Debug)]
pub struct Nodes {
    all: BTreeMap<String, Known>,
    /// So late a heartbeat may be.
    late: Duration,
    /// When any node was last heard of.
    heard: Option<Instant>,
}

impl Nodes {
    /// None is known yet.
    pub fn new(late: Duration) -> Self {
        Self {
            all: BTreeMap::new(),
            late,
            heard: None,
        }
    }

    /// What the cluster says of a node.
    pub fn set(&mut self, node: &Node) {
        let Some(name) = node.metadata.name.clone() else {
            return;
        };
        let status = node.status.as_ref();
        let conditions = status
            .and_then(|s| s.conditions.as_deref())
            .unwrap_or_default();
        let ready = conditions.iter().find(|c| c.type_ == "Ready");
        let images = status.and_then(|s| s.images.as_deref()).unwrap_or_default();
        let known = self.all.entry(name).or_default();
        known.exists = true;
        known.reported = ready
            .and_then(|c| c.last_heartbeat_time.as_ref())
            .map(|time| time.0);
        known.not_ready = match ready {
            Some(ready) if ready.status == "True" => None,
            Some(ready) => Some(ready.message.clone().unwrap_or_default()),
            None => Some("it has not reported yet".to_owned()),
        };
        known.images = images
            .iter()
            .flat_map(|image| image.names.iter().flatten().cloned())
            .collect();
    }

    /// The node is no part of the cluster any more.
    pub fn remove(&mut self, name: &str) {
        self.all.remove(name);
    }

    /// Names of all, to find those that a new list does not have.
    pub fn names(&self) -> Vec<String> {
        let there = self.all.iter().filter(|(_, known)| known.exists);
        there.map(|(name, _)| name.clone()).collect()
    }

    /// Names of those with a Lease.
    pub fn with_beats(&self) -> Vec<String> {
        let beating = self.all.iter().filter(|(_, known)| known.beat.is_some());
        beating.map(|(name, _)| name.clone()).collect()
    }

    /// A kubelet's Lease as it is now.
    pub fn beat(&mut self, lease: &Lease, now: Instant) {
        let (Some(name), Some(spec)) = (lease.metadata.name.clone(), lease.spec.as_ref()) else {
            return;
        };
        let time = spec.renew_time.as_ref().map(|time| time.0);
        let lasts = spec.lease_duration_seconds.unwrap_or(LEASE_LASTS).max(1);
        let every = Duration::from_secs(u64::from(lasts.unsigned_abs())) / RENEWALS;
        let before = self.all.get(&name).and_then(|known| known.beat.as_ref());
        if before.is_some_and(|before| before.time == time) {
            return;
        }
        // The first after a silence of all: the others get the time to be heard, too.
        if self.silent(now) {
            self.forgive(now);
        }
        self.heard = Some(now);
        self.all.entry(name).or_default().beat = Some(Beat {
            time,
            seen: now,
            every,
        });
    }

    /// The Lease is gone, and with it what is known of heartbeats.
    pub fn no_beat(&mut self, name: &str) {
        if let Some(known) = self.all.get_mut(name) {
            known.beat = None;
            if !known.exists {
                self.all.remove(name);
            }
        }
    }

    /// Counts every node that has not failed as heard of now: what was missed while nothing was
    /// watched is nobody's fault.
    pub fn forgive(&mut self, now: Instant) {
        for known in self.all.values_mut().filter(|known| known.failed.is_none()) {
            if let Some(beat) = &mut known.beat {
                beat.seen = now;
            }
        }
        self.heard = self.heard.map(|_| now);
    }

    /// No node at all was heard of for clearly longer than any takes between two heartbeats.
    fn silent(&self, now: Instant) -> bool {
        let beats = self.all.values().filter_map(|known| known.beat.as_ref());
        let every = beats.map(|beat| beat.every).max().unwrap_or_default();
        self.heard
            .is_some_and(|heard| now.duration_since(heard) > every + every / 2)
    }

    /// Looks at every node again: which failed, and which came back.
    pub fn look(&mut self, now: Instant, wall: Timestamp) -> Vec<Change> {
        // With all of them silent, time stands still. No node is late by more than the others' silence:
        // it was heard of at most one heartbeat before the last of them.
        let until = match self.heard {
            Some(heard) if now.duration_since(heard) > self.late => heard,
            _ => now,
        };
        let mut changes = Vec::new();
        for (name, known) in self.all.iter_mut().filter(|(_, known)| known.exists) {
            let failed = known.failure(until, self.late, now, wall);
            let is = failed.is_some();
            // Its words change with every second; the news is whether it failed.
            if is != known.failed.is_some() {
                changes.push(Change {
                    node: name.clone(),
                    failed: failed.clone(),
                    was: known.failed.take(),
                });
                known.failed = failed;
            }
        }
        changes
    }

    /// Why the node counts as failed, if it does.
    pub fn failed(&self, name: &str) -> Option<&Failed> {
        self.all.get(name)?.failed.as_ref()
    }

    /// Whether a node that works has the image.
    pub fn has(&self, image: &ImageName) -> bool {
        let whole = image.normalized();
        let mut well = self.all.values().filter(|known| known.failed.is_none());
        well.any(|known| known.images.contains(&whole))
    }

    /// Every node, by name.
    pub fn statuses(&self) -> Vec<NodeStatus> {
        let there = self.all.iter().filter(|(_, known)| known.exists);
        there
            .map(|(name, known)| NodeStatus {
                node: name.clone(),
                state: match known.failed {
                    None => NodeState::Healthy,
                    Some(_) => NodeState::Failed,
                },
                last_heartbeat: known.last(),
                reason: known.failed.as_ref().map(|failed| failed.why.clone()),
            })
            .collect()
    }
}

impl Known {
    fn last(&self) -> Option<Timestamp> {
        let beat = self.beat.as_ref().and_then(|beat| beat.time);
        beat.or(self.reported)
    }

    fn failure(
        &self,
        until: Instant,
        late: Duration,
        now: Instant,
        wall: Timestamp,
    ) -> Option<Failed> {
        if let Some(beat) = &self.beat
            && until.duration_since(beat.seen) > beat.every + late
        {
            let silent = now.duration_since(beat.seen);
            let since = wall.checked_sub(silent).unwrap_or(wall);
            let why = format!(
                "no heartbeat for more than {} s; one is due every {} s",
                (beat.every + late).as_secs_f64(),
                beat.every.as_secs_f64()
            );
            return Some(Failed { why, since });
        }
        let message = self.not_ready.as_ref()?;
        Some(Failed {
            why: format!("the cluster says that it is not ready: {message}"),
            since: self.last().unwrap_or(wall),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn node(name: &str, ready: &str) -> Node {
        let conditions = json!([{ "type": "Ready", "status": ready, "message": "m" }]);
        let images = json!([{ "names": ["docker.io/library/nginx:1"] }]);
        serde_json::from_value(json!({ "metadata": { "name": name },
            "status": { "conditions": conditions, "images": images } }))
        .unwrap()
    }

    fn lease(name: &str, second: u32) -> Lease {
        serde_json::from_value(json!({ "metadata": { "name": name },
            "spec": { "leaseDurationSeconds": 8, "renewTime": format!("2026-01-31T12:00:{second:02}.000000Z") } }))
        .unwrap()
    }

    struct Bed {
        nodes: Nodes,
        begin: Instant,
        wall: Timestamp,
    }

    impl Bed {
        fn new() -> Self {
            let mut nodes = Nodes::new(Duration::from_secs(5));
            for name in ["a", "b", "c"] {
                nodes.set(&node(name, "True"));
            }
            Self {
                nodes,
                begin: Instant::now(),
                wall: "2026-01-31T12:00:00Z".parse().unwrap(),
            }
        }

        fn at(&self, second: u32) -> Instant {
            self.begin + Duration::from_secs(second.into())
        }

        fn beat(&mut self, names: &[&str], second: u32) {
            let now = self.at(second);
            for name in names {
                self.nodes.beat(&lease(name, second), now);
            }
        }

        fn look(&mut self, second: u32) -> Vec<String> {
            let (now, wall) = (
                self.at(second),
                self.wall + Duration::from_secs(second.into()),
            );
            let changes = self.nodes.look(now, wall);
            let word =
                |c: Change| format!("{}{}", if c.failed.is_some() { "-" } else { "+" }, c.node);
            changes.into_iter().map(word).collect()
        }
    }

    #[test]
    fn a_node_fails_when_its_heartbeat_is_late_and_is_back_with_the_next() {
        let mut bed = Bed::new();
        bed.beat(&["a", "b", "c"], 0);
        for second in [2, 4, 6, 8] {
            bed.beat(&["a", "b"], second);
            // Every 2 s, and 5 s late.
            let expected: &[&str] = if second == 8 { &["-c"] } else { &[] };
            assert_eq!(bed.look(second), expected, "{second}");
        }
        let status = &bed.nodes.statuses()[2];
        assert_eq!(status.state, NodeState::Failed);
        assert_eq!(
            status.last_heartbeat.unwrap().to_string(),
            "2026-01-31T12:00:00Z"
        );
        assert!(
            status.reason.as_ref().unwrap().contains("more than 7 s"),
            "{status:?}"
        );
        assert_eq!(bed.nodes.failed("c").unwrap().since, bed.wall);
        bed.beat(&["a", "b", "c"], 9);
        assert_eq!(bed.look(9), ["+c"]);
    }

    #[test]
    fn a_silent_api_server_is_no_failure_of_nodes() {
        let mut bed = Bed::new();
        bed.beat(&["a", "b", "c"], 0);
        bed.beat(&["b"], 1);
        for second in 1..59 {
            assert!(bed.look(second).is_empty(), "{second}");
        }
        // The first to be heard again is ahead of the others by a little.
        bed.beat(&["a"], 59);
        assert!(bed.look(59).is_empty());
    }

    #[test]
    fn what_a_new_list_repeats_is_no_heartbeat() {
        let mut bed = Bed::new();
        bed.beat(&["a", "b", "c"], 0);
        for second in [2, 4, 6] {
            bed.beat(&["a", "b"], second);
        }
        let now = bed.at(8);
        bed.nodes.beat(&lease("c", 0), now);
        bed.beat(&["a", "b"], 8);
        assert_eq!(bed.look(8), ["-c"]);
    }

    #[test]
    fn what_the_cluster_says_counts_as_well() {
        let mut bed = Bed::new();
        bed.beat(&["a", "b", "c"], 0);
        bed.nodes.set(&node("b", "Unknown"));
        assert_eq!(bed.look(1), ["-b"]);
        assert!(
            bed.nodes.statuses()[1]
                .reason
                .as_ref()
                .unwrap()
                .contains("not ready: m")
        );
    }

    #[test]
    fn an_image_is_there_when_a_node_that_works_has_it() {
        let mut bed = Bed::new();
        assert!(bed.nodes.has(&"nginx:1".parse().unwrap()));
        assert!(!bed.nodes.has(&"nginx:2".parse().unwrap()));
        for name in ["a", "b", "c"] {
            bed.nodes.set(&node(name, "False"));
        }
        bed.look(1);
        assert!(!bed.nodes.has(&"nginx:1".parse().unwrap()));
    }
}
