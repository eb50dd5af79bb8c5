//! One container of a service, made small: what a pod says that somebody will ask for.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod, PodStatus};
use kube::ResourceExt;

use super::nodes::Failed;
use crate::model::{ContainerState, ContainerStatus, ServiceName, UserId};
use crate::platform::kubernetes::explain::blocked;
use crate::platform::kubernetes::labels::{SERVICE, USER};

/// A container that has not started for so long counts as failed and is replaced.
pub const PENDING_TOO_LONG: Duration = Duration::from_secs(60);

/// Characters kept of what the cluster says about a container.
const MAX_REASON: usize = 300;

/// What a container does, without what depends on its node or on time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// It has not started; why, if the cluster says so.
    Waiting(Option<String>),
    /// It runs; `ready` since then.
    Running {
        /// Whether it is ready.
        ready: bool,
        /// Since when.
        since: Timestamp,
    },
    /// It ended.
    Ended {
        /// With exit code 0.
        well: bool,
        /// In words.
        how: String,
        /// When.
        at: Timestamp,
    },
}

/// A container of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// Its pod's namespace.
    pub namespace: String,
    /// Its pod's name.
    pub name: String,
    /// This life of the pod.
    pub uid: String,
    /// Whose.
    pub user: UserId,
    /// Of which service.
    pub service: ServiceName,
    /// Where.
    pub node: Option<String>,
    /// What it runs.
    pub image: String,
    /// When it was made.
    pub created: Timestamp,
    /// The same as exactly as it is known: the cluster's own times are whole seconds.
    pub first_seen: Timestamp,
    /// When it got its node.
    pub placed: Option<Timestamp>,
    /// When it was told to stop.
    pub stopping: Option<Timestamp>,
    /// What it does.
    pub stage: Stage,
    /// Times it was started again.
    pub restarts: u32,
}

/// What a container counts as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// The state.
    pub state: ContainerState,
    /// Why.
    pub reason: Option<String>,
    /// Since when.
    pub since: Timestamp,
}

impl Replica {
    /// The container that the pod is; `None` when it is not one of a service.
    pub fn of(pod: &Pod) -> Option<Self> {
        let labels = pod.labels();
        let user = labels.get(USER)?.parse().ok()?;
        let service = labels.get(SERVICE)?.parse().ok()?;
        let created = pod.metadata.creation_timestamp.as_ref()?.0;
        let spec = pod.spec.as_ref()?;
        let empty = PodStatus::default();
        let status = pod.status.as_ref().unwrap_or(&empty);
        let conditions = status.conditions.as_deref().unwrap_or_default();
        let since = |type_: &str| {
            let met = conditions
                .iter()
                .find(|c| c.type_ == type_ && c.status == "True")?;
            Some(
                met.last_transition_time
                    .as_ref()
                    .map_or(created, |time| time.0),
            )
        };
        let containers = status.container_statuses.as_deref().unwrap_or_default();
        Some(Self {
            namespace: pod.namespace()?,
            name: pod.name_any(),
            uid: pod.uid()?,
            user,
            service,
            node: spec.node_name.clone(),
            image: spec.containers.first()?.image.clone().unwrap_or_default(),
            created,
            first_seen: created,
            placed: since("PodScheduled").filter(|_| spec.node_name.is_some()),
            stopping: pod.metadata.deletion_timestamp.as_ref().map(|time| time.0),
            stage: stage(pod, status, since("Ready"), created),
            restarts: containers
                .first()
                .map_or(0, |c| c.restart_count.unsigned_abs()),
        })
    }

    /// Whether it is wanted.
    pub fn wanted(&self) -> bool {
        self.stopping.is_none()
    }

    /// Whether it serves, if its node does.
    pub fn ready(&self) -> bool {
        matches!(self.stage, Stage::Running { ready: true, .. })
    }

    /// Whether it has not started for too long.
    pub fn stuck(&self, now: Timestamp) -> bool {
        self.wanted()
            && matches!(self.stage, Stage::Waiting(_))
            && now.duration_since(self.created).unsigned_abs() >= PENDING_TOO_LONG
            && now > self.created
    }

    /// What it counts as, on a node that failed or not.
    pub fn judge(&self, now: Timestamp, node: Option<&Failed>) -> Judged {
        let judged = |state, reason: Option<String>, since| Judged {
            state,
            reason,
            since,
        };
        if let Some((name, failed)) = self.node.as_ref().zip(node) {
            let why = format!("its node {name} is lost: {}", failed.why);
            return judged(ContainerState::Failed, Some(why), failed.since);
        }
        if let Some(at) = self.stopping {
            let why = "it is not wanted any more and is being stopped".to_owned();
            return judged(ContainerState::Completed, Some(why), at);
        }
        match &self.stage {
            Stage::Waiting(why) if self.stuck(now) => {
                let since = self.created.checked_add(PENDING_TOO_LONG).unwrap_or(now);
                let why = why.as_deref().unwrap_or("the cluster names no reason");
                let why = format!("it did not start within a minute: {why}");
                judged(ContainerState::Failed, Some(why), since)
            }
            Stage::Waiting(why) => {
                let why = why.clone().unwrap_or_else(|| match &self.node {
                    None => "it waits for a node".to_owned(),
                    Some(node) => format!("it is being started on {node}"),
                });
                judged(ContainerState::InQueue, Some(why), self.created)
            }
            Stage::Running { ready: true, since } => judged(ContainerState::Running, None, *since),
            Stage::Running { since, .. } => {
                let why = "it runs and is not ready yet".to_owned();
                judged(ContainerState::InQueue, Some(why), *since)
            }
            Stage::Ended { well, how, at } => {
                let state = if *well {
                    ContainerState::Completed
                } else {
                    ContainerState::Failed
                };
                judged(state, Some(how.clone()), *at)
            }
        }
    }

    /// As `GET /container_state` shows it.
    pub fn status(&self, judged: Judged) -> ContainerStatus {
        ContainerStatus {
            container: self.name.clone(),
            service: self.service.clone(),
            user_id: self.user.clone(),
            node: self.node.clone(),
            image: self.image.clone(),
            state: judged.state,
            reason: judged.reason,
            since: judged.since,
            restarts: self.restarts,
        }
    }
}

fn stage(pod: &Pod, status: &PodStatus, ready: Option<Timestamp>, created: Timestamp) -> Stage {
    match status.phase.as_deref() {
        Some("Succeeded") => return ended_whole(status, true, created),
        Some("Failed") => return ended_whole(status, false, created),
        _ => {}
    }
    let container = status.container_statuses.iter().flatten().next();
    let state = container.and_then(|c| c.state.as_ref());
    if let Some(running) = state.and_then(|s| s.running.as_ref()) {
        let started = running.started_at.as_ref().map_or(created, |time| time.0);
        return Stage::Running {
            ready: ready.is_some(),
            since: ready.unwrap_or(started),
        };
    }
    let restarts = container.map_or(0, |c| c.restart_count);
    let terminated = state.and_then(|s| s.terminated.as_ref()).or_else(|| {
        let last = container.and_then(|c| c.last_state.as_ref());
        last.and_then(|s| s.terminated.as_ref())
    });
    match terminated {
        Some(ended) => ended_once(ended, restarts, created),
        None => Stage::Waiting(blocked(pod).map(|blocked| cut(&blocked.why))),
    }
}

fn ended_once(ended: &ContainerStateTerminated, restarts: i32, created: Timestamp) -> Stage {
    let times = match restarts {
        0 => String::new(),
        1 => ", for the second time".to_owned(),
        n => format!(", {} times", n + 1),
    };
    let how = match (ended.reason.as_deref(), ended.exit_code) {
        (Some("OOMKilled"), _) => format!("it was stopped at its memory limit{times}"),
        (_, 0) => format!("it ended with exit code 0{times}"),
        (_, code) => {
            let words = ended.message.as_deref().unwrap_or_default().trim();
            let words = if words.is_empty() {
                String::new()
            } else {
                format!(": {words}")
            };
            format!("it ended with exit code {code}{times}{words}")
        }
    };
    Stage::Ended {
        well: ended.exit_code == 0,
        how: cut(&format!("{how}; it is started again after a pause")),
        at: ended.finished_at.as_ref().map_or(created, |time| time.0),
    }
}

/// The pod itself ended: it was evicted, or its node shut down.
fn ended_whole(status: &PodStatus, well: bool, created: Timestamp) -> Stage {
    let reason = status.reason.as_deref().unwrap_or("it ended");
    let message = status.message.as_deref().unwrap_or_default();
    let container = status.container_statuses.iter().flatten().next();
    let terminated = container
        .and_then(|c| c.state.as_ref())
        .and_then(|s| s.terminated.as_ref());
    Stage::Ended {
        well,
        how: cut(format!("{reason}: {message}").trim_end_matches(": ")),
        at: terminated
            .and_then(|ended| ended.finished_at.as_ref())
            .map_or(created, |time| time.0),
    }
}

fn cut(text: &str) -> String {
    let mut kept: String = text.chars().take(MAX_REASON).collect();
    if kept.len() < text.len() {
        kept.push('…');
    }
    kept
}

#[cfg(test)]
pub mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    pub const MADE: &str = "2026-01-31T12:00:00Z";

    /// A pod of the service `shop` of `ada`.
    pub fn pod(name: &str, node: Option<&str>, status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": name, "namespace": "services-ada", "uid": format!("uid-{name}"),
                "creationTimestamp": MADE, "labels": { USER: "ada", SERVICE: "shop" } },
            "spec": { "nodeName": node, "containers": [{ "name": "main", "image": "shop:1" }] },
            "status": status,
        }))
        .unwrap()
    }

    pub fn container(state: Value, last: Value, restarts: i32) -> Value {
        json!([{ "name": "main", "image": "shop:1", "imageID": "", "ready": true,
            "restartCount": restarts, "state": state, "lastState": last }])
    }

    pub fn running() -> Value {
        json!({ "phase": "Running",
            "conditions": [{ "type": "PodScheduled", "status": "True" }, { "type": "Ready", "status": "True" }],
            "containerStatuses": container(json!({ "running": { "startedAt": MADE } }), json!({}), 0) })
    }

    fn judged(status: Value, second: i64) -> (ContainerState, String) {
        let replica = Replica::of(&pod("a", Some("n"), status)).unwrap();
        let now: Timestamp = MADE.parse().unwrap();
        let judged = replica.judge(now + jiff::SignedDuration::from_secs(second), None);
        (judged.state, judged.reason.unwrap_or_default())
    }

    #[test]
    fn a_container_that_does_not_start_has_a_minute_and_a_reason() {
        let waiting =
            json!({ "waiting": { "reason": "ImagePullBackOff", "message": "not found" } });
        let status =
            json!({ "phase": "Pending", "containerStatuses": container(waiting, json!({}), 0) });
        let (state, why) = judged(status.clone(), 59);
        assert_eq!(state, ContainerState::InQueue);
        assert!(
            why.contains("the image shop:1 cannot be had") && why.contains("not found"),
            "{why}"
        );
        let (state, why) = judged(status, 60);
        assert_eq!(state, ContainerState::Failed);
        assert!(
            why.contains("within a minute") && why.contains("shop:1"),
            "{why}"
        );
        let condition = json!([{ "type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "0/3 nodes are available" }]);
        let (state, why) = judged(json!({ "phase": "Pending", "conditions": condition }), 1);
        assert_eq!(state, ContainerState::InQueue);
        assert!(why.contains("0/3 nodes"), "{why}");
    }

    #[test]
    fn a_job_that_is_done_is_no_crash() {
        let looping = |code: i32, reason: &str| {
            let waiting =
                json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off" } });
            let last =
                json!({ "terminated": { "exitCode": code, "reason": reason, "finishedAt": MADE } });
            judged(
                json!({ "phase": "Running", "containerStatuses": container(waiting, last, 3) }),
                5,
            )
        };
        let (state, why) = looping(0, "Completed");
        assert_eq!(state, ContainerState::Completed, "{why}");
        let (state, why) = looping(3, "Error");
        assert_eq!(state, ContainerState::Failed);
        assert!(why.contains("exit code 3, 4 times"), "{why}");
        let (state, why) = looping(137, "OOMKilled");
        assert_eq!(state, ContainerState::Failed);
        assert!(why.contains("memory limit"), "{why}");
        let done = json!({ "terminated": { "exitCode": 0, "finishedAt": MADE } });
        let first = judged(
            json!({ "phase": "Running", "containerStatuses": container(done, json!({}), 0) }),
            5,
        );
        assert_eq!(first.0, ContainerState::Completed);
        let evicted = judged(
            json!({ "phase": "Failed", "reason": "Evicted", "message": "The node was low on memory" }),
            5,
        );
        assert_eq!(evicted.0, ContainerState::Failed);
        assert!(evicted.1.contains("low on memory"), "{evicted:?}");
    }

    #[test]
    fn a_lost_node_fails_what_is_on_it_also_while_it_is_being_stopped() {
        let mut pod = pod("a", Some("n"), running());
        let now: Timestamp = MADE.parse().unwrap();
        let lost = Failed {
            why: "silence".to_owned(),
            since: now,
        };
        let replica = Replica::of(&pod).unwrap();
        assert_eq!(replica.judge(now, None).state, ContainerState::Running);
        let judged = replica.judge(now, Some(&lost));
        assert_eq!(judged.state, ContainerState::Failed);
        assert_eq!(judged.reason.unwrap(), "its node n is lost: silence");
        pod.metadata.deletion_timestamp = pod.metadata.creation_timestamp.clone();
        let stopping = Replica::of(&pod).unwrap();
        assert!(!stopping.wanted());
        assert_eq!(
            stopping.judge(now, Some(&lost)).state,
            ContainerState::Failed
        );
        assert_eq!(stopping.judge(now, None).state, ContainerState::Completed);
    }

    #[test]
    fn another_pod_is_none_of_a_service() {
        let mut other = pod("a", None, json!({}));
        other.metadata.labels = None;
        assert_eq!(Replica::of(&other), None);
    }
}
