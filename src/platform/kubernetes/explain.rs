//! Why a pod does not come up, in words for its user.

use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};
use kube::api::{ListParams, LogParams};
use kube::{Api, ResourceExt};

use super::cluster::Cluster;

/// How the kubelet begins when it has no log any more; it answers this as if it were one.
const NO_LOG: &str = "unable to retrieve container logs";

/// The code of a container that the node does not start: something it needs is not there.
pub const CONTAINER_REFUSED: &str = "container_refused";

/// The code of a container that ends again and again.
pub const CRASH_LOOP: &str = "crash_loop";

/// Events told; the newest say most.
const MAX_EVENTS: usize = 5;

/// Lines of a program's log that are told.
const LAST_LINES: i64 = 20;

/// Bytes of them; one line may be endless.
const LAST_BYTES: usize = 8 << 10;

/// Why something cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    /// A stable word.
    pub code: &'static str,
    /// In words.
    pub why: String,
    /// What to do.
    pub remediation: &'static str,
}

impl Blocked {
    /// Nothing known stands in the way; it only takes long.
    pub fn slow() -> Self {
        Self {
            code: "pod_slow",
            why: "it was not ready in time, and the cluster names no reason".to_owned(),
            remediation: "Try again; if it lasts, look at the pod with kubectl describe.",
        }
    }
}

/// What keeps the pod from running, if the cluster says so.
pub fn blocked(pod: &Pod) -> Option<Blocked> {
    let status = pod.status.as_ref()?;
    let unscheduled = status.conditions.iter().flatten().find(|c| {
        c.type_ == "PodScheduled"
            && c.status == "False"
            && c.reason.as_deref() == Some("Unschedulable")
    });
    if let Some(condition) = unscheduled {
        let message = condition.message.as_deref().unwrap_or("no node has room");
        return Some(Blocked {
            code: "unschedulable",
            why: format!("no node takes it: {message}"),
            remediation: "Ask the operator for more or larger nodes, or stop what is not needed.",
        });
    }
    let containers = status.init_container_statuses.iter().flatten();
    let mut containers = containers.chain(status.container_statuses.iter().flatten());
    containers.find_map(container_blocked)
}

/// What a busy kubelet says while it still waits for the Secrets and ConfigMaps of a new pod ("failed to
/// sync secret cache: timed out waiting for the condition"). It tries again by itself, in seconds.
const CACHE_NOT_YET: &str = "timed out waiting for the condition";

fn container_blocked(container: &ContainerStatus) -> Option<Blocked> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let message = waiting.message.as_deref().unwrap_or_default();
    let image = matches!(
        reason,
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull"
    );
    if image {
        return Some(Blocked {
            code: "image_missing",
            why: format!(
                "the image {} cannot be had ({reason}): {message}",
                container.image
            ),
            remediation: "Check RUNNER_IMAGE, DATABASE_IMAGE or the template, and that the nodes may pull from its registry.",
        });
    }
    if matches!(
        reason,
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError"
    ) {
        if message.contains(CACHE_NOT_YET) {
            return None;
        }
        return Some(Blocked {
            code: CONTAINER_REFUSED,
            why: format!(
                "its container {} cannot be started ({reason}): {message}",
                container.name
            ),
            remediation: "Mend what the message names: usually a Secret, a volume or the command of the template.",
        });
    }
    if reason == "CrashLoopBackOff" {
        let ended = container
            .last_state
            .as_ref()
            .and_then(|s| s.terminated.as_ref());
        let code = ended.map_or_else(String::new, |t| format!(" with exit code {}", t.exit_code));
        return Some(Blocked {
            code: CRASH_LOOP,
            why: format!(
                "its container {} ended{code}, {} times",
                container.name, container.restart_count
            ),
            remediation: "Look at the pod's log.",
        });
    }
    None
}

/// A container's end that was not a good one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadEnd<'a> {
    /// Which container.
    pub container: &'a str,
    /// How it ended, in words that follow its name.
    pub how: String,
    /// What it left in its termination log: the runner leaves the program's last output.
    pub words: String,
}

/// How a container of the pod ended, when one ended badly.
pub fn ended_badly(pod: &Pod) -> Option<BadEnd<'_>> {
    let status = pod.status.as_ref()?;
    let containers = status.init_container_statuses.iter().flatten();
    let mut containers = containers.chain(status.container_statuses.iter().flatten());
    containers.find_map(|container| {
        let state = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| {
            state.as_ref().and_then(|s| s.terminated.clone())
        };
        let ended = state(&container.state)
            .or_else(|| state(&container.last_state))
            .filter(|ended| ended.exit_code != 0)?;
        let reason = match ended.reason.as_deref() {
            Some("OOMKilled") => "was stopped at its memory limit".to_owned(),
            _ => format!("ended with exit code {}", ended.exit_code),
        };
        Some(BadEnd {
            container: container.name.as_str(),
            how: reason,
            words: ended.message.unwrap_or_default(),
        })
    })
}

/// What the cluster's events say about the pod, newest last. They are for people: when they cannot be
/// read, the rest still stands.
pub async fn events(cluster: &Cluster, pod: &Pod) -> Vec<String> {
    let Some((namespace, uid)) = pod.namespace().zip(pod.uid()) else {
        return Vec::new();
    };
    let api: Api<Event> = Api::namespaced(cluster.client.clone(), &namespace);
    let params = ListParams::default().fields(&format!("involvedObject.uid={uid}"));
    let mut events = match cluster.call("list events", api.list(&params)).await {
        Ok(list) => list.items,
        Err(error) => {
            tracing::warn!(%error, "a pod's events cannot be read");
            return Vec::new();
        }
    };
    events.retain(|event| event.type_.as_deref() == Some("Warning"));
    events.sort_by_key(|event| event.last_timestamp.as_ref().map(|time| time.0));
    let skip = events.len().saturating_sub(MAX_EVENTS);
    let text = |event: Event| {
        let reason = event.reason.unwrap_or_default();
        format!("{reason}: {}", event.message.unwrap_or_default().trim())
    };
    events.into_iter().skip(skip).map(text).collect()
}

/// The last lines that a container wrote, of its previous life when it has begun another.
pub async fn last_lines(cluster: &Cluster, pod: &Pod, container: &str) -> String {
    let (Some(namespace), name) = (pod.namespace(), pod.name_any()) else {
        return String::new();
    };
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &namespace);
    for previous in [true, false] {
        let params = LogParams {
            container: Some(container.to_owned()),
            previous,
            tail_lines: Some(LAST_LINES),
            ..LogParams::default()
        };
        if let Ok(text) = cluster.call("read a log", api.logs(&name, &params)).await
            && !text.trim().is_empty()
            && !text.starts_with(NO_LOG)
        {
            return cut(text.trim_end());
        }
    }
    String::new()
}

/// The end of the text, whole characters.
fn cut(text: &str) -> String {
    let mut from = text.len().saturating_sub(LAST_BYTES);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text.get(from..).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn pod(status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({ "metadata": {}, "status": status })).unwrap()
    }

    fn container(state: serde_json::Value) -> serde_json::Value {
        json!([{ "name": "runner", "image": "no/such:1", "imageID": "", "ready": false,
            "restartCount": 2, "state": state,
            "lastState": { "terminated": { "exitCode": 3 } } }])
    }

    #[test]
    fn what_keeps_a_pod_from_running_is_told() {
        let waiting = |reason: &str| {
            let state = json!({ "waiting": { "reason": reason, "message": "m" } });
            blocked(&pod(json!({ "containerStatuses": container(state) }))).map(|b| b.code)
        };
        assert_eq!(waiting("ImagePullBackOff"), Some("image_missing"));
        assert_eq!(
            waiting("CreateContainerConfigError"),
            Some("container_refused")
        );
        let message = "failed to sync secret cache: timed out waiting for the condition";
        let state =
            json!({ "waiting": { "reason": "CreateContainerConfigError", "message": message } });
        let busy = pod(json!({ "containerStatuses": container(state) }));
        assert_eq!(blocked(&busy), None, "the kubelet tries again");
        assert_eq!(waiting("CrashLoopBackOff"), Some("crash_loop"));
        assert_eq!(waiting("PodInitializing"), None);
        let condition = json!([{ "type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "0/3 nodes are available" }]);
        let told = blocked(&pod(json!({ "conditions": condition }))).unwrap();
        assert_eq!(told.code, "unschedulable");
        assert!(told.why.contains("0/3 nodes"), "{told:?}");
    }

    #[test]
    fn a_bad_end_is_seen_in_this_life_and_the_one_before() {
        let running = pod(json!({ "containerStatuses": container(json!({ "running": {} })) }));
        assert_eq!(ended_badly(&running).unwrap().how, "ended with exit code 3");
        let killed = json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } });
        let killed = pod(json!({ "containerStatuses": container(killed) }));
        assert!(ended_badly(&killed).unwrap().how.contains("memory"));
    }

    #[test]
    fn the_end_of_a_long_line_is_kept() {
        let text = "ü".repeat(LAST_BYTES);
        assert!(cut(&text).len() <= LAST_BYTES && cut(&text).ends_with('ü'));
    }
}
