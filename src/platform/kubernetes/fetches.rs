//! Hands each starting pod of a repl the list of its files: `gantry-runner fetch` waits for it in an init container.
//!
//! The server goes into the pod by port-forward. So the bucket's keys stay with the server, no pod needs a way to
//! the server, and the list, whose URLs are valid for minutes, goes through the API server's TLS to this pod alone.
//! A pod that starts again gets a new list; one that starts while no server is there waits, since every server looks
//! at all pods when it starts. Several servers may come to one pod: it takes the first list.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use kube::{Api, ResourceExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::cache::{Changed, annotation, label};
use super::labels::{REPL, SUBMISSION, USER};
use super::release::prefix;
use super::releases::Releases;
use crate::model::{Problem, ReplId, UserId};
use crate::storage::{
    FETCH_GREETING, FETCH_PORT, FETCH_TAKEN, MAX_OFFER_BYTES, Offer, REFUSED, S3Store,
};

/// Longest wait for a connection into a pod: the API server asks the kubelet, as for an exec.
const DIAL: Duration = Duration::from_secs(10);

/// Longest wait for the greeting, which is sent at once. A `fetch` that listens to another server greets later.
const GREETING: Duration = Duration::from_secs(3);

/// Longest wait until the pod has taken the list: 24 MiB through the API server at most.
const TAKING: Duration = Duration::from_secs(20);

/// The pauses between two tries: a pod that was just placed listens within a second or two.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A pod that could not be reached for this long is named in the log.
const WORTH_TELLING: Duration = Duration::from_secs(30);

/// Lists that are made and sent at one time: in all, for the memory of the largest lists, and for one user, so that
/// nobody's pods wait for another's.
const AT_ONCE: usize = 8;
const AT_ONCE_OF_ONE: usize = 2;

/// Hands out lists until stopped.
#[derive(Debug, Clone)]
pub struct Fetches {
    releases: Releases,
    store: Arc<S3Store>,
    /// The pods, by their uid, that somebody sees to.
    seen_to: Arc<Mutex<HashSet<String>>>,
    at_once: Arc<Semaphore>,
    of_user: Arc<Mutex<HashMap<UserId, Arc<Semaphore>>>>,
    stop: CancellationToken,
}

/// Why a pod has no list yet.
enum NotYet {
    /// Nobody listens there so far, or another server was there first.
    Unreached(String),
    /// It is not the pod of anything that is recorded: somebody else's.
    Unknown(String),
}

impl Fetches {
    /// Hands out lists until stopped. `changes`: which pods changed.
    pub fn start(
        releases: &Releases,
        store: Arc<S3Store>,
        mut changes: mpsc::UnboundedReceiver<Changed>,
        stop: CancellationToken,
    ) {
        let this = Self {
            releases: releases.clone(),
            store,
            seen_to: Arc::default(),
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
            of_user: Arc::default(),
            stop,
        };
        tokio::spawn(async move {
            while let Some(Some((namespace, name))) =
                this.stop.run_until_cancelled(changes.recv()).await
            {
                this.look(&namespace, &name);
            }
        });
    }

    /// Sees to a pod that waits for its list, unless that is done already.
    fn look(&self, namespace: &str, name: &str) {
        let pod = self.releases.rollouts.pods.get(namespace, name);
        let Some(pod) = pod.filter(|pod| is_waiting(pod)) else {
            return;
        };
        let Some(uid) = pod.uid() else { return };
        if !self.locked().insert(uid.clone()) {
            return;
        }
        let (this, namespace, name) = (self.clone(), namespace.to_owned(), name.to_owned());
        tokio::spawn(async move {
            let stop = this.stop.clone();
            stop.run_until_cancelled(this.see_to(&namespace, &name, &uid))
                .await;
            this.locked().remove(&uid);
            // What changed in the last moment.
            if !stop.is_cancelled() {
                this.look(&namespace, &name);
            }
        });
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.seen_to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries until the pod has its list, for as long as it waits for one.
    async fn see_to(&self, namespace: &str, name: &str, uid: &str) {
        let mut now = self.releases.rollouts.pods.follow(namespace, name);
        let (began, mut pause, mut told) = (Instant::now(), PAUSES.0, false);
        // The life of the container that has a list: it may end without having copied everything.
        let mut served: Option<i32> = None;
        loop {
            let pod = now.borrow_and_update().clone();
            let Some(pod) = pod.filter(|pod| pod.uid().as_deref() == Some(uid) && is_waiting(pod))
            else {
                return;
            };
            let life = restarts(&pod);
            if served != Some(life) && may_listen(&pod) {
                match self.hand_over(&pod).await {
                    Ok(()) => served = Some(life),
                    Err(NotYet::Unknown(why)) => {
                        if !told {
                            told = true;
                            tracing::warn!(%namespace, %name, %why, "a pod that waits for files gets none");
                        }
                        // What is recorded is seen a moment later.
                        pause = PAUSES.1;
                    }
                    Err(NotYet::Unreached(why)) => {
                        tracing::debug!(%namespace, %name, %why, "a pod does not take its list of files yet");
                        if !told && began.elapsed() > WORTH_TELLING {
                            told = true;
                            tracing::warn!(%namespace, %name, %why, "a pod waits for its files and cannot be reached; it is tried on");
                        }
                    }
                }
            }
            if timeout(pause, now.changed()).await.is_ok() {
                pause = PAUSES.0;
            } else {
                pause = (pause * 3 / 2).min(PAUSES.1);
            }
        }
    }

    /// Brings the pod its list.
    async fn hand_over(&self, pod: &Pod) -> Result<(), NotYet> {
        let (user, prefix) = self.belonging(pod).map_err(NotYet::Unknown)?;
        let of_user = self.semaphore_of(&user);
        let closed = |_| NotYet::Unreached("the server ends".to_owned());
        let _mine = of_user.acquire().await.map_err(closed)?;
        self.bring(pod, &prefix).await.map_err(NotYet::Unreached)
    }

    fn semaphore_of(&self, user: &UserId) -> Arc<Semaphore> {
        let mut all = self.of_user.lock().unwrap_or_else(PoisonError::into_inner);
        // Only those that somebody holds are needed.
        all.retain(|known, semaphore| known == user || Arc::strong_count(semaphore) > 1);
        let semaphore = all.entry(user.clone());
        Arc::clone(semaphore.or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE_OF_ONE))))
    }

    /// Whose pod it is and what it may read: what the record of its repl says, in the namespace of the repl's user.
    fn belonging(&self, pod: &Pod) -> Result<(UserId, String), String> {
        let repl: Option<ReplId> = label(pod, REPL).and_then(|repl| repl.parse().ok());
        let user: Option<UserId> = label(pod, USER).and_then(|user| user.parse().ok());
        let (Some(repl), Some(user)) = (repl, user) else {
            return Err("its labels name no repl and no user".to_owned());
        };
        let record = self.releases.records.known(&repl);
        let record = record.ok_or_else(|| format!("the repl {repl} has no record"))?;
        if record.user_id != user || pod.namespace() != Some(user.namespace()) {
            return Err(format!("the repl {repl} is not of this namespace's user"));
        }
        let submission = annotation(pod, SUBMISSION).unwrap_or_default();
        let mut all = record.workspace.iter().chain(&record.releases);
        let stored = all.find(|stored| stored.submission_id.to_string() == submission);
        let stored = stored.ok_or_else(|| format!("{repl} has no release {submission}"))?;
        Ok((user, prefix(&repl, stored)))
    }

    async fn bring(&self, pod: &Pod, prefix: &str) -> Result<(), String> {
        let client = self.releases.cluster.client.clone();
        let api: Api<Pod> = Api::namespaced(client, &pod.namespace().unwrap_or_default());
        let name = pod.name_any();
        let opened = timeout(DIAL, api.portforward(&name, &[FETCH_PORT])).await;
        let mut forwarder = opened
            .map_err(|_| format!("no connection within {} s", DIAL.as_secs()))?
            .map_err(|error| super::cluster::with_sources(&error))?;
        let stream = forwarder.take_stream(FETCH_PORT);
        let mut stream = stream.ok_or_else(|| "the port-forward gave no stream".to_owned())?;
        let mut greeting = [0; FETCH_GREETING.len()];
        match timeout(GREETING, stream.read_exact(&mut greeting)).await {
            Ok(Ok(_)) if greeting == FETCH_GREETING.as_bytes() => {}
            Ok(Ok(_)) => return Err("something else listens there".to_owned()),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("it does not greet".to_owned()),
        }
        // Only now: a node that is lost takes its time to say nothing.
        let permit = self.at_once.acquire().await;
        let _one = permit.map_err(|_| "the server ends".to_owned())?;
        let offer = self.store.grant(prefix).await;
        let offer = offer.unwrap_or_else(|problem| {
            tracing::warn!(pod = %name, %prefix, %problem, "a pod's files cannot be named");
            Offer::Refused(problem)
        });
        let line = line_of(&offer, prefix)?;
        let handing = async {
            stream.write_all(&line).await?;
            stream.flush().await?;
            let mut taken = [0; FETCH_TAKEN.len()];
            stream.read_exact(&mut taken).await?;
            Ok::<bool, std::io::Error>(taken == FETCH_TAKEN.as_bytes())
        };
        match timeout(TAKING, handing).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err("it did not take the list".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!(
                "the list was not taken within {} s",
                TAKING.as_secs()
            )),
        }
    }
}

fn line_of(offer: &Offer, prefix: &str) -> Result<Vec<u8>, String> {
    let json = |offer: &Offer| {
        let mut line = serde_json::to_vec(offer).map_err(|error| error.to_string())?;
        line.push(b'\n');
        Ok::<_, String>(line)
    };
    let line = json(offer)?;
    if line.len() <= MAX_OFFER_BYTES {
        return Ok(line);
    }
    json(&Offer::Refused(Problem::new(
        REFUSED,
        format!("The files below {prefix} are not copied"),
        format!("the list of their names is longer than {MAX_OFFER_BYTES} bytes"),
        "Keep fewer files, or give them shorter names.",
    )))
}

/// The init container that waits for a list: one that runs `gantry-runner fetch`.
fn fetcher(pod: &Pod) -> Option<&Container> {
    let containers = pod.spec.as_ref()?.init_containers.as_ref()?;
    containers.iter().find(|container| {
        let command = container.command.iter().chain(&container.args).flatten();
        let words: Vec<&str> = command.map(String::as_str).take(2).collect();
        let [program, "fetch"] = words[..] else {
            return false;
        };
        program.rsplit('/').next() == Some("gantry-runner")
    })
}

fn status(pod: &Pod) -> Option<&ContainerStatus> {
    let name = &fetcher(pod)?.name;
    let statuses = pod.status.as_ref()?.init_container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == *name)
}

fn restarts(pod: &Pod) -> i32 {
    status(pod).map_or(0, |status| status.restart_count)
}

/// Whether the pod is on a node and its files are not there yet.
fn is_waiting(pod: &Pod) -> bool {
    let placed = pod
        .spec
        .as_ref()
        .is_some_and(|spec| spec.node_name.is_some());
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let over = matches!(phase, Some("Succeeded" | "Failed"));
    let fetched = status(pod)
        .and_then(|status| status.state.as_ref()?.terminated.as_ref())
        .is_some_and(|ended| ended.exit_code == 0);
    let of_repl = label(pod, REPL).is_some() && annotation(pod, SUBMISSION).is_some();
    let stays = pod.metadata.deletion_timestamp.is_none();
    of_repl && stays && placed && !over && fetcher(pod).is_some() && !fetched
}

/// Whether it may listen now, as far as is known: what is known is up to a second old, and a container that has just
/// been started is better asked too early than too late. One that failed is left alone until it is started again.
fn may_listen(pod: &Pod) -> bool {
    let state = status(pod).and_then(|status| status.state.as_ref());
    let Some(state) = state else { return true };
    let reason = state.waiting.as_ref().and_then(|w| w.reason.as_deref());
    state.terminated.is_none() && !matches!(reason, Some("CrashLoopBackOff"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn pod(command: Value, state: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "labels": { REPL: "shop" }, "annotations": { SUBMISSION: "s" } },
            "spec": { "nodeName": "n", "containers": [],
                "initContainers": [{ "name": "files", "command": command }] },
            "status": { "phase": "Pending", "initContainerStatuses": [{ "name": "files", "image": "",
                "imageID": "", "ready": false, "restartCount": 2, "state": state }] },
        }))
        .unwrap()
    }

    #[test]
    fn a_pod_waits_until_its_files_are_there() {
        let fetch = json!(["/usr/bin/gantry-runner", "fetch"]);
        let running = pod(fetch.clone(), json!({ "running": {} }));
        assert!(is_waiting(&running) && may_listen(&running));
        assert_eq!(restarts(&running), 2);
        let done = pod(fetch.clone(), json!({ "terminated": { "exitCode": 0 } }));
        assert!(!is_waiting(&done));
        let failed = pod(fetch.clone(), json!({ "terminated": { "exitCode": 3 } }));
        assert!(is_waiting(&failed) && !may_listen(&failed));
        let pausing = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        let pausing = pod(fetch.clone(), pausing);
        assert!(is_waiting(&pausing) && !may_listen(&pausing));
        let mut unplaced = running.clone();
        unplaced.spec.as_mut().unwrap().node_name = None;
        assert!(!is_waiting(&unplaced));
        let mut others = running;
        others.metadata.labels = None;
        assert!(!is_waiting(&others));
    }

    #[test]
    fn only_the_runners_fetch_is_brought_a_list() {
        for other in [
            json!(["aws", "s3", "cp"]),
            json!(["gantry-runner", "app"]),
            json!(["sh", "-c", "gantry-runner fetch"]),
            Value::Null,
        ] {
            assert!(!is_waiting(&pod(other, json!({ "running": {} }))));
        }
    }

    #[test]
    fn a_list_that_is_too_long_is_refused_in_words() {
        let files = Offer::Files {
            place: "x".repeat(MAX_OFFER_BYTES),
            files: Vec::new(),
        };
        let line = String::from_utf8(line_of(&files, "code/shop/").unwrap()).unwrap();
        assert!(line.len() < 1_000 && line.contains("code/shop/") && line.ends_with('\n'));
    }
}
