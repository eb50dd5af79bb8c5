//! What released programs are doing: their states for `repls`, their output for the journal, and the
//! way to their ports.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::Request;
use axum::http::header::HOST;
use bytes::Bytes;
use futures_util::future::{BoxFuture, try_join_all};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::{Api, ResourceExt};
use serde::Deserialize;
use tokio::sync::{SetOnce, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::cache::{Changed, annotation, label};
use super::explain::{blocked, ended_badly};
use super::labels::{RELEASE, REPL, SUBMISSION};
use super::program_log::ProgramLog;
use super::record::Record;
use super::release::{Owner, PROGRAM_CONTAINER};
use super::releases::{Releases, no_release, unreachable};
use super::rollout::{is_ready, refused};
use crate::model::{Event, Origin, Problem, ReplId, ReplState, ReplStatus, Scale, idle_cause};
use crate::platform::{ByteStream, PlatformError, ProgramEvent, Recorded};

/// The program's port, the one that shows what happens until it listens there, and the runner's own.
const PROGRAM_PORT: u16 = 3_000;
const FRONT_PORT: u16 = 3_002;
const RUNNER_PORT: u16 = 3_001;

/// Longest wait for a connection into a pod: the API server asks the kubelet, as for an exec.
const DIAL: Duration = Duration::from_secs(10);

/// Longest wait for the runner's answer about the program, which it has at hand.
const ANSWER: Duration = Duration::from_secs(2);

/// Largest such answer.
const MAX_ANSWER: usize = 16 << 10;

/// Longest wait for what is left of a log whose container has ended. It is there and is read at once; when the way
/// to it breaks just then, it is tried again.
const LAST_WORDS: Duration = Duration::from_secs(20);

/// What the runner says of its program.
#[derive(Debug, Clone, Deserialize)]
struct Said {
    state: String,
    #[serde(default)]
    exit_code: Option<i32>,
    #[serde(default)]
    restarts: u32,
}

/// One life of a released program's container: its pod, and its own id.
pub(super) type LifeId = (String, String);

/// Every released program of the cluster.
#[derive(Debug, Clone)]
pub struct Programs {
    releases: Releases,
    /// What runners said last, by pod.
    said: Arc<Mutex<HashMap<LifeId, Said>>>,
    following: Arc<Mutex<HashMap<LifeId, CancellationToken>>>,
    /// What was recorded before; nothing is followed until it is known.
    recorded: Arc<SetOnce<Recorded>>,
    tell: mpsc::Sender<ProgramEvent>,
    began: Timestamp,
    stop: CancellationToken,
}

impl Programs {
    /// Follows every released program until stopped, once [`Programs::follow_from`] has said from where.
    pub fn start(
        releases: &Releases,
        tell: mpsc::Sender<ProgramEvent>,
        changes: mpsc::UnboundedReceiver<Changed>,
        stop: CancellationToken,
    ) -> Self {
        let this = Self {
            releases: releases.clone(),
            said: Arc::default(),
            following: Arc::default(),
            recorded: Arc::default(),
            tell,
            began: Timestamp::now(),
            stop,
        };
        tokio::spawn(this.clone().keep_up(changes));
        this
    }

    /// Begins to follow where what was recorded ends.
    pub fn follow_from(&self, recorded: BoxFuture<'static, Recorded>) {
        let this = self.clone();
        tokio::spawn(async move {
            if let Some(recorded) = this.stop.run_until_cancelled(recorded).await {
                // Set before: it is followed already.
                let _ = this.recorded.set(recorded);
            }
        });
    }

    /// When this server began.
    pub(super) fn began(&self) -> Timestamp {
        self.began
    }

    /// The last that was recorded of what this container wrote.
    pub(super) fn recorded_of(&self, container: &str) -> Option<&Origin> {
        self.recorded.get()?.output.get(container)
    }

    /// Where this pod is among others.
    pub(super) fn pods_of(&self, pod: &Pod) -> Api<Pod> {
        let client = self.releases.cluster.client.clone();
        Api::namespaced(client, &pod.namespace().unwrap_or_default())
    }

    /// An error when nobody listens any more.
    pub(super) async fn tell(
        &self,
        event: ProgramEvent,
    ) -> Result<(), mpsc::error::SendError<ProgramEvent>> {
        self.tell.send(event).await
    }

    /// Every repl that has or had a release, or was started.
    pub fn statuses(&self) -> Vec<ReplStatus> {
        let records = self.releases.records.all();
        let mut statuses: Vec<ReplStatus> = records
            .into_iter()
            .filter(|(_, record)| record.is_used())
            .map(|(repl, record)| self.status(repl, &record))
            .collect();
        statuses.sort_by(|a, b| a.repl_id.cmp(&b.repl_id));
        statuses
    }

    fn status(&self, repl: ReplId, record: &Record) -> ReplStatus {
        let owner = Owner {
            user: record.user_id.clone(),
            repl: repl.clone(),
        };
        let current = record.current().filter(|_| record.wanted);
        let running = current.filter(|_| record.runs());
        let pods = running.map_or_else(Vec::new, |current| {
            let submission = current.submission_id.to_string();
            self.releases.rollouts.pods_of(&owner, &submission)
        });
        let ready = pods.iter().filter(|pod| is_ready(pod)).count();
        let pod = pods.iter().max_by_key(|pod| is_ready(pod)).map(Arc::as_ref);
        let said = pod
            .and_then(life)
            .and_then(|life| self.locked_said().get(&life).cloned());
        let (state, cause) = match pod {
            None if record.idle.is_some() => (ReplState::Idle, None),
            None if record.wanted => (ReplState::Starting, self.refused(&owner)),
            None => (ReplState::Stopped, None),
            Some(pod) => state_of(pod, said.as_ref()),
        };
        let restarts = pod.and_then(program).map_or(0, |c| c.restart_count);
        ReplStatus {
            url: self.releases.config.url(&repl),
            domains: record.domains.clone(),
            repl_id: repl,
            user_id: record.user_id.clone(),
            state,
            ready: u32::try_from(ready).unwrap_or(u32::MAX),
            replicas: match self.releases.replicas_now(&owner) {
                Some(replicas) if record.runs() => replicas,
                _ => u32::from(record.runs()),
            },
            autoscale: match record.scale {
                Some(Scale::Auto(auto)) => Some(auto),
                _ => None,
            },
            restarts: u32::try_from(restarts).unwrap_or(0) + said.map_or(0, |said| said.restarts),
            release: current
                .map(|current| current.release)
                .filter(|number| *number > 0),
            cause: record.idle.map(idle_cause),
            last_error: cause.or_else(|| record.last_error.clone()),
            since: pod.and_then(since).unwrap_or(record.since),
        }
    }

    /// Why the cluster does not take the repl's pods, when it does not.
    fn refused(&self, owner: &Owner) -> Option<String> {
        let deployments = &self.releases.rollouts.deployments;
        let deployments = deployments.of(&owner.user.namespace());
        let own = |d: &&Arc<Deployment>| label(d.as_ref(), REPL) == Some(owner.repl.as_str());
        let deployment = deployments.iter().find(own)?;
        refused(deployment).map(|blocked| blocked.why)
    }

    /// A connection to the repl's program.
    pub async fn dial(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.dial_port(repl, PROGRAM_PORT).await
    }

    /// A connection to the repl's runner.
    pub async fn dial_runner(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.dial_port(repl, RUNNER_PORT).await
    }

    /// Connections to the runners of all of the repl's pods.
    pub async fn dial_runners(
        &self,
        repl: &ReplId,
    ) -> Result<Vec<Box<dyn ByteStream>>, PlatformError> {
        let record = self.releases.records.known(repl).filter(Record::runs);
        let record = record.ok_or_else(|| no_release(repl))?;
        if !self.releases.config.sees_requests() {
            let why = "the manifest template leads callers past its runner (targetPort 3002)";
            return Err(unreachable(why.to_owned()));
        }
        let owner = Owner {
            user: record.user_id,
            repl: repl.clone(),
        };
        let pods = self.releases.rollouts.pods_of_any(&owner);
        let dialled = pods.iter().map(|pod| self.forward(pod, RUNNER_PORT));
        try_join_all(dialled).await.map_err(unreachable)
    }

    async fn dial_port(
        &self,
        repl: &ReplId,
        port: u16,
    ) -> Result<Box<dyn ByteStream>, PlatformError> {
        let record = self.releases.records.known(repl);
        let record = record.filter(Record::runs);
        let record = record.ok_or_else(|| no_release(repl))?;
        let owner = Owner {
            user: record.user_id.clone(),
            repl: repl.clone(),
        };
        let submission = self.serving(&owner).ok_or_else(|| no_release(repl))?;
        let pods = self.releases.rollouts.pods_of_any(&owner);
        // While a release takes over, or does not come up, the one before it serves.
        let up = pods
            .iter()
            .filter(|pod| is_ready(pod) || life(pod).is_some());
        let newest = |pod: &Arc<Pod>| annotation(pod.as_ref(), SUBMISSION) == Some(&submission);
        let Some(pod) = up.max_by_key(|pod| (is_ready(pod), newest(pod))) else {
            let why = pods.iter().find_map(|pod| blocked(pod));
            let why = why.map_or_else(|| "none of its pods is ready".to_owned(), |b| b.why);
            return Err(unreachable(why));
        };
        let port = match port {
            PROGRAM_PORT if has_front(pod) => FRONT_PORT,
            port => port,
        };
        self.forward(pod, port).await.map_err(unreachable)
    }

    /// The submission that the repl's Deployment runs.
    fn serving(&self, owner: &Owner) -> Option<String> {
        let deployments = self
            .releases
            .rollouts
            .deployments
            .of(&owner.user.namespace());
        let deployment = deployments
            .iter()
            .find(|d| label(d.as_ref(), REPL) == Some(owner.repl.as_str()))?;
        annotation(deployment.as_ref(), SUBMISSION).map(str::to_owned)
    }

    async fn forward(&self, pod: &Pod, port: u16) -> Result<Box<dyn ByteStream>, String> {
        let (api, name) = (self.pods_of(pod), pod.name_any());
        let opened = timeout(DIAL, api.portforward(&name, &[port])).await;
        let mut forwarder = match opened {
            Ok(Ok(forwarder)) => forwarder,
            Ok(Err(error)) => return Err(super::cluster::with_sources(&error)),
            Err(_) => {
                return Err(format!(
                    "no connection to {name} within {} s",
                    DIAL.as_secs()
                ));
            }
        };
        let stream = forwarder.take_stream(port);
        let stream = stream.ok_or_else(|| format!("{name} gave no stream"))?;
        Ok(Box::new(stream))
    }

    /// Asks the runner in the pod what its program is doing, and keeps the answer.
    pub async fn ask(&self, pod: &Pod) {
        let Some(life) = life(pod) else {
            return;
        };
        let answer = timeout(DIAL + ANSWER, self.answer(pod)).await;
        match answer.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
            Ok(said) => {
                let before = self.locked_said().insert(life, said.clone());
                if before.is_none_or(|before| before.state != said.state) {
                    self.tell_of(pod, &said).await;
                }
            }
            Err(why) => {
                tracing::debug!(pod = %pod.name_any(), %why, "a runner does not say what its program does")
            }
        }
    }

    /// A program that began or ended to serve is an event of its repl.
    async fn tell_of(&self, pod: &Pod, said: &Said) {
        let (action, message, failed) = match (said.state.as_str(), said.exit_code) {
            ("serving", _) => ("repl.serving", "The program serves".to_owned(), false),
            ("ended", Some(code)) => {
                let message = format!("The program ended with exit code {code}");
                ("repl.exited", message, code != 0)
            }
            _ => return,
        };
        let error = failed.then(|| {
            let cause = "its supervisor saw it end so";
            let remediation = "Look at what it wrote before; mend it and submit it again.";
            Problem::new("program_failed", message.clone(), cause, remediation)
        });
        self.tell_once(pod, action, message, error, said.restarts)
            .await;
    }

    /// Tells what happened to a released program, unless it is recorded already. `time`: the how many-eth time
    /// in its container's life.
    async fn tell_once(
        &self,
        pod: &Pod,
        action: &str,
        message: String,
        error: Option<Problem>,
        time: u32,
    ) {
        let origin = life(pod).zip(since(pod)).map(|((_, id), since)| Origin {
            container: container_name(&id),
            time: since,
            checksum: crc32fast::hash(action.as_bytes()),
            part: time,
        });
        let recorded = self.recorded.get().zip(origin.as_ref());
        if recorded.is_some_and(|(all, origin)| all.events.contains(origin)) {
            return;
        }
        let event = |release| Event::Repl {
            action: action.to_owned(),
            message,
            release: Some(release).filter(|number| *number > 0),
            error,
            origin,
        };
        if let Some(told) = about(pod, event) {
            // Nobody listens any more when the server ends.
            let _ = self.tell.send(told).await;
        }
    }

    async fn answer(&self, pod: &Pod) -> Result<Said, String> {
        let stream = self.forward(pod, RUNNER_PORT).await?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|e| e.to_string())?;
        let request = Request::get("/state").header(HOST, "runner");
        let request = request.body(Empty::<Bytes>::new());
        let request = request.map_err(|e| e.to_string())?;
        let answer = async {
            let answer = sender.send_request(request).await;
            let body = answer.map_err(|e| e.to_string())?.into_body();
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            let body = body.map_err(|e| e.to_string())?.to_bytes();
            let broken = |error| format!("{error}: {:?}", String::from_utf8_lossy(&body));
            serde_json::from_slice(&body).map_err(broken)
        };
        // The answer is complete by its length. The way out of a pod tells of a connection's end a
        // second late; what breaks it comes out at the request.
        let carried = async {
            let _ = connection.await;
            std::future::pending().await
        };
        tokio::select! {
            answer = answer => answer,
            never = carried => never,
        }
    }

    /// Begins to follow pods that come, and forgets those that go.
    async fn keep_up(self, mut changes: mpsc::UnboundedReceiver<Changed>) {
        if self
            .stop
            .run_until_cancelled(self.recorded.wait())
            .await
            .is_none()
        {
            return;
        }
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = self.stop.cancelled() => return,
            };
            let Some((namespace, name)) = change else {
                return;
            };
            let pod = self.releases.rollouts.pods.get(&namespace, &name);
            let alive = pod
                .as_deref()
                .filter(|pod| annotation(*pod, SUBMISSION).is_some());
            let life = alive.and_then(life);
            self.forget_but(&namespace, &name, life.as_ref());
            if let (Some(pod), Some(life)) = (&pod, life) {
                self.follow(pod, life);
            }
        }
    }

    /// Lets go of other lives of this pod.
    fn forget_but(&self, namespace: &str, name: &str, life: Option<&LifeId>) {
        let pod = format!("{namespace}/{name}");
        let other = |id: &LifeId| id.0 == pod && Some(id) != life;
        self.locked_following().retain(|id, token| {
            let gone = other(id);
            if gone {
                token.cancel();
            }
            !gone
        });
        self.locked_said().retain(|id, _| !other(id));
    }

    fn follow(&self, pod: &Arc<Pod>, life: LifeId) {
        let token = {
            let mut following = self.locked_following();
            if following.contains_key(&life) {
                return;
            }
            let token = self.stop.child_token();
            following.insert(life.clone(), token.clone());
            token
        };
        let (this, pod) = (self.clone(), Arc::clone(pod));
        tokio::spawn(async move {
            let passing = async {
                this.tell_of_restart(&pod).await;
                ProgramLog::new(&this, &pod, &life).pass_on(&token).await;
            };
            let given_up = async {
                token.cancelled().await;
                tokio::time::sleep(LAST_WORDS).await;
            };
            tokio::select! {
                () = passing => {}
                () = given_up => {}
                () = this.stop.cancelled() => {}
            }
        });
    }

    /// A container that died and was started again is an event of its repl.
    async fn tell_of_restart(&self, pod: &Pod) {
        let Some(restart) = program(pod).filter(|c| c.restart_count > 0) else {
            return;
        };
        let how = ended_badly(pod).map_or_else(|| "ended".to_owned(), |end| end.how);
        let message = format!(
            "The program's container {how} and was started again, {} so far",
            match restart.restart_count {
                1 => "once".to_owned(),
                count => format!("{count} times"),
            }
        );
        let error = Problem::new(
            "program_restarted",
            message.clone(),
            "its container ended by itself or was stopped at a limit",
            "Look at what it wrote before; mend it and submit it again.",
        );
        self.tell_once(pod, "repl.restarted", message, Some(error), 0)
            .await;
    }

    fn locked_said(&self) -> std::sync::MutexGuard<'_, HashMap<LifeId, Said>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locked_following(&self) -> std::sync::MutexGuard<'_, HashMap<LifeId, CancellationToken>> {
        self.following
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The container's name in records: of its 64 digits as many as tell it from all others.
pub(super) fn container_name(id: &str) -> String {
    let digits = id.rsplit_once('/').map_or(id, |(_, digits)| digits);
    digits.chars().take(16).collect()
}

/// An event of this released pod's repl.
pub(super) fn about(pod: &Pod, event: impl FnOnce(u64) -> Event) -> Option<ProgramEvent> {
    Some(ProgramEvent {
        user_id: label(pod, super::labels::USER)?.parse().ok()?,
        repl_id: label(pod, REPL)?.parse().ok()?,
        event: event(annotation(pod, RELEASE)?.parse().ok()?),
    })
}

pub(super) fn program(pod: &Pod) -> Option<&ContainerStatus> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    containers
        .iter()
        .find(|c| c.name == PROGRAM_CONTAINER)
        .or_else(|| containers.first())
}

/// Whether the pod's runner shows what happens until the program listens: a template of one's own need
/// not name its port.
fn has_front(pod: &Pod) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports.any(|port| port.container_port == i32::from(FRONT_PORT))
}

/// The running life of the pod's program.
pub(super) fn life(pod: &Pod) -> Option<LifeId> {
    let container = program(pod)?;
    container.state.as_ref()?.running.as_ref()?;
    let name = format!("{}/{}", pod.namespace()?, pod.name_any());
    Some((name, container.container_id.clone()?))
}

pub(super) fn since(pod: &Pod) -> Option<Timestamp> {
    let running = program(pod)?.state.as_ref()?.running.as_ref()?;
    Some(running.started_at.as_ref()?.0)
}

/// What a released pod is doing, and why not more.
fn state_of(pod: &Pod, said: Option<&Said>) -> (ReplState, Option<String>) {
    if let Some(said) = said
        && said.state == "ended"
    {
        return (ReplState::Exited(said.exit_code.unwrap_or_default()), None);
    }
    let cause = || {
        let ended = ended_badly(pod).map(|end| {
            if has_ended_before_the_program(pod, end.container) {
                // It was to bring the files: what it says is all that its user can go by.
                format!(
                    "the container {} {}: {}",
                    end.container,
                    end.how,
                    end.words.trim()
                )
            } else {
                format!("the program {}", end.how)
            }
        });
        ended.or_else(|| blocked(pod).map(|blocked| blocked.why))
    };
    if is_ready(pod) {
        return (ReplState::Running, cause());
    }
    match ended_badly(pod) {
        Some(_) => (ReplState::Crashed, cause()),
        None => (ReplState::Starting, cause()),
    }
}

/// Whether this is one of the pod's init containers.
fn has_ended_before_the_program(pod: &Pod, container: &str) -> bool {
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.init_container_statuses.as_ref());
    containers.is_some_and(|all| all.iter().any(|c| c.name == container))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn pod(ready: &str, last: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "p", "namespace": "n" },
            "status": {
                "conditions": [{ "type": "Ready", "status": ready }],
                "containerStatuses": [{ "name": "runner", "image": "", "imageID": "", "ready": true,
                    "restartCount": 1, "containerID": "c", "state": { "running": {} }, "lastState": last }],
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_programs_state_has_a_cause() {
        let well = pod("True", json!({}));
        assert_eq!(state_of(&well, None), (ReplState::Running, None));
        let said = Said {
            state: "ended".to_owned(),
            exit_code: Some(0),
            restarts: 0,
        };
        assert_eq!(state_of(&well, Some(&said)).0, ReplState::Exited(0));
        let crashed = pod("False", json!({ "terminated": { "exitCode": 9 } }));
        let (state, cause) = state_of(&crashed, None);
        assert_eq!(state, ReplState::Crashed);
        assert!(cause.unwrap().contains("exit code 9"));
        assert_eq!(
            state_of(&pod("False", json!({})), None).0,
            ReplState::Starting
        );
    }

    #[test]
    fn the_words_of_what_was_to_bring_the_files_are_told() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {},
            "status": { "initContainerStatuses": [{ "name": "fetch", "image": "", "imageID": "",
                "ready": false, "restartCount": 1, "state": { "terminated": {
                    "exitCode": 4, "message": "There is no whole code at s3://b/code/x/\n" } } }] },
        }))
        .unwrap();
        let (state, cause) = state_of(&pod, None);
        assert_eq!(state, ReplState::Crashed);
        let cause = cause.unwrap();
        assert!(cause.contains("fetch ended with exit code 4"), "{cause}");
        assert!(
            cause.ends_with("no whole code at s3://b/code/x/"),
            "{cause}"
        );
    }
}
