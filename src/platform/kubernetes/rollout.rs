//! A release on its way to serving, watched until it does or cannot.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::{Instant, timeout};

use super::cache::{Cache, annotation, label};
use super::cluster::Cluster;
use super::explain::{
    BadEnd, Blocked, CONTAINER_REFUSED, CRASH_LOOP, blocked, ended_badly, events, last_lines,
};
use super::labels::{REPL, REVISION, SUBMISSION};
use super::record::Stored;
use super::release::{Owner, PROGRAM_CONTAINER, database_name};
use crate::model::Problem;
use crate::platform::{LAST_LINES, LISTEN_OR_END};

/// Longest wait for a release to serve. Its runner gives a program that has to listen 50 s, so this is only met
/// by one that is slow to start and to end, or by a slow cluster.
pub const DEPLOY_PATIENCE: Duration = Duration::from_secs(90);

/// Longest wait for a new database: its volume is made and its files are written first.
const DATABASE_PATIENCE: Duration = Duration::from_secs(120);

/// How long something that may pass (a missing image, no room, a quota) is given. The reason is told
/// within 30 s of the deploy's start (hostile.md).
const CAUSE_AFTER: Duration = Duration::from_secs(10);

/// The same for a container that lacks a Secret or a volume: what was made this moment on a busy cluster
/// is seen by the kubelet at its next look, some ten seconds later.
const LACK_AFTER: Duration = Duration::from_secs(20);

/// The code of a problem that means: something else of the repl was applied meanwhile.
pub const REPLACED: &str = "replaced";

/// How often time itself is looked at, when nothing else wakes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What rollouts are watched with.
#[derive(Debug, Clone)]
pub struct Rollouts {
    /// For events and logs.
    pub cluster: Cluster,
    /// Every Deployment of Gantry's.
    pub deployments: Cache<Deployment>,
    /// Every pod of Gantry's.
    pub pods: Cache<Pod>,
}

/// Where a rollout stands.
enum Progress {
    Done,
    Waiting,
    /// It may pass.
    Held(Blocked),
    /// The program itself failed.
    Ended(String),
    /// Another release took its place.
    Replaced,
}

impl Rollouts {
    /// The pods of a repl's release that are not leaving.
    pub fn pods_of(&self, owner: &Owner, submission: &str) -> Vec<Arc<Pod>> {
        let mut pods = self.pods_of_any(owner);
        pods.retain(|pod| annotation(pod.as_ref(), SUBMISSION) == Some(submission));
        pods
    }

    /// The pods of every release of a repl that are not leaving.
    pub fn pods_of_any(&self, owner: &Owner) -> Vec<Arc<Pod>> {
        let mut pods = self.pods.of(&owner.user.namespace());
        pods.retain(|pod| {
            label(pod.as_ref(), REPL) == Some(owner.repl.as_str())
                && annotation(pod.as_ref(), SUBMISSION).is_some()
                && pod.metadata.deletion_timestamp.is_none()
        });
        pods
    }

    /// Resolves when the release serves and the one before it does not any more; the error says why it
    /// does not. `generation`: what applying the Deployment came to.
    pub async fn wait(
        &self,
        owner: &Owner,
        stored: &Stored,
        deployment: &str,
        generation: i64,
    ) -> Result<(), Problem> {
        let namespace = owner.user.namespace();
        let started = Instant::now();
        let submission = stored.submission_id.to_string();
        let revision = stored
            .given
            .as_ref()
            .map(|given| given.revision.to_string());
        let mut deployed = self.deployments.follow(&namespace, deployment);
        let mut changes = self.pods.changes(&namespace);
        loop {
            let now = deployed.borrow_and_update().clone();
            changes.borrow_and_update();
            let mut pods = self.pods_of(owner, &submission);
            // Those that ran with other variables are on their way out.
            pods.retain(|pod| annotation(pod.as_ref(), REVISION) == revision.as_deref());
            let waited = started.elapsed();
            let pod = pods.first().map(Arc::as_ref);
            match progress(now.as_deref(), &pods, &submission, generation) {
                Progress::Done => return Ok(()),
                Progress::Ended(why) => return Err(self.failed(why, pod).await),
                Progress::Replaced => {
                    return Err(Problem::new(
                        REPLACED,
                        "The release did not come up",
                        "another release of the repl was made at the same time",
                        "Send it again.",
                    ));
                }
                Progress::Held(cause) if waited >= told_after(&cause) => {
                    return Err(self.held(cause, pod).await);
                }
                Progress::Held(_) | Progress::Waiting if waited >= DEPLOY_PATIENCE => {
                    let seconds = DEPLOY_PATIENCE.as_secs();
                    let why = format!("it was not ready within {seconds} s");
                    return Err(self.failed(why, pod).await);
                }
                Progress::Held(_) | Progress::Waiting => {}
            }
            // Whatever wakes, everything is looked at again.
            let _ = timeout(LOOK_AGAIN, async {
                tokio::select! {
                    _ = deployed.changed() => {}
                    _ = changes.changed() => {}
                }
            })
            .await;
        }
    }

    /// Resolves when the repl's database takes connections.
    pub async fn database(&self, owner: &Owner) -> Result<(), Problem> {
        let namespace = owner.user.namespace();
        let name = format!("{}-0", database_name(&owner.repl));
        let started = Instant::now();
        let mut now = self.pods.follow(&namespace, &name);
        loop {
            let pod = now.borrow_and_update().clone();
            if pod.as_deref().is_some_and(is_ready) {
                return Ok(());
            }
            let waited = started.elapsed();
            let cause = pod.as_deref().and_then(blocked);
            if let (true, Some(cause)) = (waited >= CAUSE_AFTER, cause) {
                let why = format!("the database's pod {name}: {}", cause.why);
                return Err(self.held(Blocked { why, ..cause }, pod.as_deref()).await);
            }
            if waited >= DATABASE_PATIENCE {
                let seconds = DATABASE_PATIENCE.as_secs();
                let why = format!("the database's pod {name} was not ready within {seconds} s");
                let slow = Blocked::slow();
                return Err(self.held(Blocked { why, ..slow }, pod.as_deref()).await);
            }
            let _ = timeout(LOOK_AGAIN, now.changed()).await;
        }
    }

    /// The cluster's side stands in the way.
    async fn held(&self, cause: Blocked, pod: Option<&Pod>) -> Problem {
        let told = match pod {
            Some(pod) => events(&self.cluster, pod).await,
            None => Vec::new(),
        };
        let mut why = cause.why;
        if cause.code == CRASH_LOOP
            && let Some(pod) = pod
        {
            why = self.with_lines(why, pod).await;
        }
        if !told.is_empty() {
            why = format!("{why}. The cluster's events: {}", told.join("; "));
        }
        let message = "The release did not come up";
        Problem::new(cause.code, message, why, cause.remediation)
    }

    /// The program did not come to serve.
    async fn failed(&self, why: String, pod: Option<&Pod>) -> Problem {
        let cause = match pod {
            Some(pod) => self.with_lines(why, pod).await,
            None => why,
        };
        Problem::new(
            "deploy_failed",
            "The release did not come up",
            cause,
            LISTEN_OR_END,
        )
    }

    async fn with_lines(&self, why: String, pod: &Pod) -> String {
        let (container, words) = match ended_badly(pod) {
            Some(end) => (end.container, end.words),
            None => (PROGRAM_CONTAINER, String::new()),
        };
        let lines = if words.trim().is_empty() {
            last_lines(&self.cluster, pod, container).await
        } else {
            words
        };
        if lines.is_empty() {
            why
        } else {
            format!("{why}{LAST_LINES}{lines}")
        }
    }
}

fn told_after(cause: &Blocked) -> Duration {
    match cause.code {
        CONTAINER_REFUSED => LACK_AFTER,
        _ => CAUSE_AFTER,
    }
}

fn progress(
    deployment: Option<&Deployment>,
    pods: &[Arc<Pod>],
    submission: &str,
    generation: i64,
) -> Progress {
    let Some(deployment) = deployment else {
        return Progress::Waiting;
    };
    if deployment
        .metadata
        .generation
        .is_none_or(|seen| seen < generation)
    {
        return Progress::Waiting;
    }
    if annotation(deployment, SUBMISSION) != Some(submission) {
        return Progress::Replaced;
    }
    if is_rolled_out(deployment) {
        return Progress::Done;
    }
    for pod in pods {
        if let Some(BadEnd { container, how, .. }) = ended_badly(pod) {
            let init = pod
                .status
                .as_ref()
                .and_then(|s| s.init_container_statuses.as_ref());
            let fetching = init.is_some_and(|all| all.iter().any(|c| c.name == container));
            if !fetching {
                return Progress::Ended(format!("the program {how}"));
            }
            return Progress::Held(Blocked {
                code: CRASH_LOOP,
                why: format!("its container {container} {how}"),
                remediation: "Look whether the code store can be reached from the pod.",
            });
        }
        if let Some(cause) = blocked(pod) {
            return Progress::Held(cause);
        }
    }
    refused(deployment).map_or(Progress::Waiting, Progress::Held)
}

/// Why the cluster does not take the Deployment's pods, when it does not.
pub fn refused(deployment: &Deployment) -> Option<Blocked> {
    let conditions = deployment
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten());
    let message = conditions
        .filter(|c| c.type_ == "ReplicaFailure" && c.status == "True")
        .find_map(|c| c.message.clone())?;
    Some(Blocked {
        code: if message.contains("exceeded quota") {
            "quota_exceeded"
        } else {
            "pod_refused"
        },
        why: format!("the cluster does not take its pod: {message}"),
        remediation: "Stop a repl that is not needed, or ask the operator for a larger quota; when the message names a rule, mend the template.",
    })
}

/// As `kubectl rollout status` sees it: every replica is of this release and available, no other is
/// left.
pub fn is_rolled_out(deployment: &Deployment) -> bool {
    let Some(status) = &deployment.status else {
        return false;
    };
    let wanted = deployment
        .spec
        .as_ref()
        .and_then(|s| s.replicas)
        .unwrap_or(1);
    status.observed_generation == deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) >= wanted
        && status.replicas.unwrap_or(0) <= status.updated_replicas.unwrap_or(0)
        && status.available_replicas.unwrap_or(0) >= status.updated_replicas.unwrap_or(0)
}

/// Whether the pod takes requests.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions
        .filter(|c| c.type_ == "Ready")
        .any(|c| c.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn deployment(status: serde_json::Value) -> Deployment {
        serde_json::from_value(json!({
            "metadata": { "generation": 3, "annotations": { SUBMISSION: "s" } },
            "spec": { "replicas": 1, "selector": {}, "template": {} },
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn a_rollout_is_done_when_only_the_new_release_is_left() {
        let done = json!({ "observedGeneration": 3, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1 });
        assert!(is_rolled_out(&deployment(done.clone())));
        for (field, value) in [
            ("observedGeneration", 2),
            ("replicas", 2),
            ("updatedReplicas", 0),
            ("availableReplicas", 0),
        ] {
            let mut not_yet = done.clone();
            not_yet[field] = value.into();
            assert!(!is_rolled_out(&deployment(not_yet)), "{field}");
        }
    }

    #[test]
    fn a_quota_is_told_and_a_stale_view_is_not_believed() {
        let refused = json!({ "conditions": [{ "type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gantry" }] });
        let deployment = deployment(refused);
        let told = progress(Some(&deployment), &[], "s", 3);
        assert!(matches!(
            told,
            Progress::Held(Blocked {
                code: "quota_exceeded",
                ..
            })
        ));
        assert!(matches!(
            progress(Some(&deployment), &[], "s", 4),
            Progress::Waiting
        ));
        assert!(matches!(
            progress(Some(&deployment), &[], "other", 3),
            Progress::Replaced
        ));
    }

    #[test]
    fn a_program_that_ends_badly_fails_the_rollout_at_once() {
        let pod: Pod = serde_json::from_value(json!({ "metadata": {}, "status": {
            "containerStatuses": [{ "name": "runner", "image": "", "imageID": "", "ready": false,
                "restartCount": 1, "lastState": { "terminated": { "exitCode": 1 } },
                "state": { "waiting": { "reason": "CrashLoopBackOff" } } }] } }))
        .unwrap();
        let told = progress(Some(&deployment(json!({}))), &[Arc::new(pod)], "s", 3);
        assert!(matches!(told, Progress::Ended(why) if why.contains("exit code 1")));
    }
}
