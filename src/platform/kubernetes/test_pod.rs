//! A user's test pod: made once, kept, made anew when it is dead.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::json;
use tokio::time::{Instant, sleep, timeout_at};

use super::cache::{Cache, Now, annotation};
use super::cluster::{Cluster, Failure, Kind, Manifest};
use super::explain::{Blocked, CRASH_LOOP, blocked, events};
use super::labels::{FRAMES, MADE_BY, ROLE, TEST, of_user};
use super::namespace::{Namespaces, TEST_ACCOUNT};
use crate::model::{Limits, Problem, UserId};
use crate::platform::PlatformError;
use crate::runner::wire::{BUILD_SCRATCH_BYTES, VERSION, scratch_bytes};

/// The container that the runner lives in.
pub const CONTAINER: &str = "runner";

/// What the agent needs of root's power, and nothing else. It cannot do with less, because it runs
/// programs under another user id than its own, so that they can neither signal, trace nor read it.
const CAPABILITIES: [&str; 5] = [
    // Both: to become the slot's user before a program starts, and to end in its name what it left.
    "SETUID",
    "SETGID",
    // To give the slot's folders and files to that user.
    "CHOWN",
    // To write into folders that only that user may enter, and to clear those that nobody may.
    "DAC_OVERRIDE",
    // To clear folders with the sticky bit, and to take modes back.
    "FOWNER",
];

/// Memory beside the runs: the agent, waiting interpreters, and what is in the memory-backed folders
/// between runs.
const RUNNER_MEMORY: u64 = 512 << 20;

/// How the pods are to be.
#[derive(Debug, Clone)]
pub struct TestPodConfig {
    /// The runner image.
    pub image: String,
    /// When this server started. Of two whose images differ, the one that started last says which is used.
    pub started: Timestamp,
    /// The most a run may ask for.
    pub maximum: Limits,
    /// Whether test runs may use the network.
    pub network: bool,
    /// Whether the node's kernel logs the system calls that user code is refused.
    pub log_refused: bool,
}

/// The pod's name.
pub fn name(user: &UserId) -> String {
    format!("{user}-test")
}

/// A test pod's manifest.
pub fn manifest(user: &UserId, config: &TestPodConfig) -> Manifest {
    let mut labels = of_user(user);
    labels[ROLE] = TEST.into();
    // One run at a time: a pod has one user id to give.
    let run = config
        .maximum
        .memory_bytes
        .max(Limits::COMPILE.memory_bytes);
    // Scratch space is memory, and a compiler may fill both.
    let memory = run + RUNNER_MEMORY + BUILD_SCRATCH_BYTES;
    let program = scratch_bytes(&config.maximum);
    let workspace = program.max(BUILD_SCRATCH_BYTES);
    let folder = |name: &str, bytes: u64| json!({ "name": name, "emptyDir": { "medium": "Memory", "sizeLimit": bytes.to_string() } });
    let mount = |name: &str| json!({ "name": name, "mountPath": format!("/{name}") });
    let container = json!({
        "name": CONTAINER,
        "image": config.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["gantry-runner", "agent"],
        "env": [
            { "name": "GANTRY_ALLOW_NETWORK", "value": config.network.to_string() },
            { "name": "GANTRY_LOG_REFUSED_CALLS", "value": config.log_refused.to_string() },
            { "name": "GANTRY_SCRATCH_BYTES", "value": program.to_string() },
        ],
        "resources": {
            "requests": { "cpu": "100m", "memory": "128Mi" },
            "limits": { "cpu": "2", "memory": memory.to_string() },
        },
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": CAPABILITIES },
        },
        "volumeMounts": [mount("workspace"), mount("tmp"), mount("run")],
    });
    let spec = json!({
        "restartPolicy": "Always",
        "serviceAccountName": TEST_ACCOUNT,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        // Nothing in it is worth waiting for: what runs is run again or reported as unknown.
        "terminationGracePeriodSeconds": 1,
        // A node that is lost is given up as soon as the cluster says so.
        "tolerations": [
            { "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5 },
            { "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5 },
        ],
        "securityContext": { "seccompProfile": { "type": "RuntimeDefault" } },
        "containers": [container],
        "volumes": [
            folder("workspace", workspace),
            // Compilers' own files, and packages while they are unpacked.
            folder("tmp", 256 << 20),
            folder("run", 16 << 20),
        ],
    });
    let made_by = json!({
        MADE_BY: config.started.as_microsecond().to_string(),
        FRAMES: VERSION.to_string(),
    });
    let metadata = json!({
        "name": name(user), "namespace": user.namespace(), "labels": labels, "annotations": made_by,
    });
    Manifest::new(Kind::Pod, json!({ "metadata": metadata, "spec": spec }))
}

/// One life of a pod's container. A stream belongs to one; the next knows nothing of its runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// The pod's id.
    pub uid: String,
    /// The container's id.
    pub container: String,
}

/// The life that is running now, or why there is none.
pub fn life(pod: &Pod) -> Option<Life> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() != Some("Running") {
        return None;
    }
    let containers = status.container_statuses.as_ref()?;
    let container = containers.iter().find(|c| c.name == CONTAINER)?;
    container.state.as_ref()?.running.as_ref()?;
    Some(Life {
        uid: pod.uid()?,
        container: container.container_id.clone()?,
    })
}

/// What is to be done with a pod as it is.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    /// There is none.
    Absent,
    /// It lives.
    Alive(Life),
    /// It may come up; wait.
    Coming,
    /// Its runner ended again and again, and the kubelet waits ever longer before it starts it.
    Looping,
    /// It will not run again; remove it.
    Dead,
    /// It is being removed.
    Leaving,
}

fn standing(pod: Option<&Pod>, config: &TestPodConfig) -> Standing {
    let Some(pod) = pod else {
        return Standing::Absent;
    };
    if pod.metadata.deletion_timestamp.is_some() {
        return Standing::Leaving;
    }
    let status = pod.status.as_ref();
    let phase = status.and_then(|s| s.phase.as_deref());
    if matches!(phase, Some("Failed" | "Succeeded")) {
        return Standing::Dead;
    }
    // A runner of another image may speak other frames. One that a later server made stays: two replicas,
    // one of which is being replaced, would remove each other's pods, and what runs in them, for ever.
    let made_by = annotation(pod, MADE_BY).and_then(|text| text.parse::<i64>().ok());
    let newer = made_by.is_some_and(|made_by| made_by > config.started.as_microsecond());
    // The same image by name may be an older one: it was made for a server that spoke other frames.
    let version = VERSION.to_string();
    let speaks_other = annotation(pod, FRAMES) != Some(version.as_str());
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    if containers
        .filter(|c| c.name == CONTAINER)
        .any(|c| speaks_other || c.image.as_deref() != Some(config.image.as_str()))
        && !newer
    {
        return Standing::Dead;
    }
    match life(pod) {
        Some(life) => Standing::Alive(life),
        None if blocked(pod).is_some_and(|cause| cause.code == CRASH_LOOP) => Standing::Looping,
        None => Standing::Coming,
    }
}

/// How long a pod that cannot start is watched before its cause is told: images are tried again, and
/// nodes may be added, but a user waits (hostile.md: a cause within 30 s).
const CAUSE_AFTER: Duration = Duration::from_secs(8);

/// How long a pod that is leaving may take before it is removed by force: its node may be gone.
const LEAVING: Duration = Duration::from_secs(3);

/// Pause while a new quota is being counted, which takes the cluster a few milliseconds.
const UNCOUNTED: Duration = Duration::from_millis(10);

/// Every user's test pod.
#[derive(Debug, Clone)]
pub struct TestPods {
    cluster: Cluster,
    namespaces: Namespaces,
    pods: Cache<Pod>,
    config: TestPodConfig,
    /// One making of a user's pod at a time.
    making: Arc<Mutex<HashMap<UserId, Arc<tokio::sync::Mutex<()>>>>>,
}

impl TestPods {
    /// Test pods of this kind.
    pub fn new(
        cluster: &Cluster,
        namespaces: &Namespaces,
        pods: &Cache<Pod>,
        config: TestPodConfig,
    ) -> Self {
        Self {
            cluster: cluster.clone(),
            namespaces: namespaces.clone(),
            pods: pods.clone(),
            config,
            making: Arc::default(),
        }
    }

    /// Whether the user has one.
    pub fn is_there(&self, user: &UserId) -> bool {
        self.pods.get(&user.namespace(), &name(user)).is_some()
    }

    /// The user's pod, from now on.
    pub fn follow(&self, user: &UserId) -> Now<Pod> {
        self.pods.follow(&user.namespace(), &name(user))
    }

    /// A pod whose runner has started, made first if need be.
    pub async fn ensure(&self, user: &UserId, deadline: Instant) -> Result<Life, PlatformError> {
        let making = {
            let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(making.entry(user.clone()).or_default())
        };
        let _one = making.lock().await;
        let refused = |failure: Failure| failure.unavailable("The test pod could not be made");
        let closed = self.namespaces.ensure_closed(user).await;
        closed.map_err(refused)?;
        let mut now = self.follow(user);
        if now.borrow().is_none() {
            self.create(user, deadline).await?;
        }
        self.namespaces.ensure(user).await.map_err(refused)?;
        let mut waiting_since = Instant::now();
        let mut made_anew = false;
        loop {
            let pod = now.borrow_and_update().clone();
            let wait_until = match standing(pod.as_deref(), &self.config) {
                Standing::Alive(life) => return Ok(life),
                Standing::Absent => {
                    self.create(user, deadline).await?;
                    waiting_since = Instant::now();
                    deadline
                }
                Standing::Dead => {
                    self.remove(user).await.map_err(refused)?;
                    deadline
                }
                // A new pod starts at once. When that one loops too, the reason is told below.
                Standing::Looping if !made_anew => {
                    made_anew = true;
                    self.remove(user).await.map_err(refused)?;
                    deadline
                }
                Standing::Leaving => {
                    let by_force = waiting_since + LEAVING;
                    if Instant::now() >= by_force {
                        self.remove(user).await.map_err(refused)?;
                        waiting_since = Instant::now();
                    }
                    deadline.min(waiting_since + LEAVING)
                }
                Standing::Coming | Standing::Looping => {
                    let told = waiting_since + CAUSE_AFTER;
                    let cause = pod.as_deref().and_then(blocked);
                    if let (true, Some(cause)) = (Instant::now() >= told, cause) {
                        return Err(self.blocked(user, cause).await);
                    }
                    if Instant::now() >= told {
                        deadline
                    } else {
                        deadline.min(told)
                    }
                }
            };
            match timeout_at(wait_until, now.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(stopping()),
                Err(_) if Instant::now() >= deadline => {
                    return Err(self.blocked(user, Blocked::slow()).await);
                }
                Err(_) => {}
            }
        }
    }

    async fn create(&self, user: &UserId, deadline: Instant) -> Result<(), PlatformError> {
        loop {
            let failure = match self.cluster.create(&manifest(user, &self.config)).await {
                Ok(_) => return Ok(()),
                // Another replica was first; its pod is this user's pod.
                Err(failure) if failure.is_conflict() => return Ok(()),
                Err(failure) => failure,
            };
            if failure.is_uncounted() && Instant::now() < deadline {
                sleep(UNCOUNTED).await;
                continue;
            }
            let problem = failure.problem("The test pod could not be made");
            // A quota does not grow by trying again.
            return Err(if failure.is_away() || failure.is_terminating() {
                PlatformError::Unavailable(problem)
            } else {
                PlatformError::NotReady(problem)
            });
        }
    }

    /// Removes the pod, whatever it is doing.
    pub async fn remove(&self, user: &UserId) -> Result<(), Failure> {
        self.cluster
            .delete(Kind::Pod, &user.namespace(), &name(user), Some(0))
            .await
    }

    /// Removes this life of the pod; the next one, which another task may have made, stays.
    pub async fn remove_life(&self, user: &UserId, life: &Life) -> Result<(), Failure> {
        let pod = self.pods.get(&user.namespace(), &name(user));
        if pod.and_then(|pod| pod.uid()).as_ref() == Some(&life.uid) {
            return self.remove(user).await;
        }
        Ok(())
    }

    async fn blocked(&self, user: &UserId, cause: Blocked) -> PlatformError {
        let pod = self.pods.get(&user.namespace(), &name(user));
        let mut why = cause.why;
        if let Some(pod) = pod.as_deref() {
            let told = events(&self.cluster, pod).await;
            if !told.is_empty() {
                why = format!("{why}. The cluster's events: {}", told.join("; "));
            }
        }
        PlatformError::NotReady(Problem::new(
            cause.code,
            "The test pod does not start",
            why,
            cause.remediation,
        ))
    }
}

fn stopping() -> PlatformError {
    PlatformError::Unavailable(Problem::new(
        "stopping",
        "The server is stopping",
        "its watches have ended",
        "Send it again.",
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    fn config() -> TestPodConfig {
        TestPodConfig {
            image: "gantry-runner:latest".to_owned(),
            started: Timestamp::UNIX_EPOCH,
            maximum: Limits::MAXIMUM,
            network: false,
            log_refused: false,
        }
    }

    fn pod(status: serde_json::Value) -> Pod {
        let mut body = manifest(&"test".parse().unwrap(), &config()).body;
        body["metadata"]["uid"] = "u".into();
        body["status"] = status;
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn the_pod_has_no_token_no_root_to_write_and_the_capabilities_named() {
        let pod = pod(json!({}));
        let spec = pod.spec.unwrap();
        assert_eq!(pod.metadata.name.as_deref(), Some("test-test"));
        assert_eq!(spec.automount_service_account_token, Some(false));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
        let container = &spec.containers[0];
        let security = container.security_context.as_ref().unwrap();
        assert_eq!(security.read_only_root_filesystem, Some(true));
        assert_eq!(security.allow_privilege_escalation, Some(false));
        let capabilities = security.capabilities.as_ref().unwrap();
        assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
        // What Pod Security `baseline` lets a container add.
        let baseline = [
            "AUDIT_WRITE",
            "CHOWN",
            "DAC_OVERRIDE",
            "FOWNER",
            "FSETID",
            "KILL",
            "MKNOD",
            "NET_BIND_SERVICE",
            "SETFCAP",
            "SETGID",
            "SETPCAP",
            "SETUID",
            "SYS_CHROOT",
        ];
        let added = capabilities.add.as_ref().unwrap();
        assert!(
            added.iter().all(|c| baseline.contains(&c.as_str())),
            "{added:?}"
        );
        let size = |limit: &Quantity| limit.0.parse::<u64>().unwrap();
        let mut scratch = 0;
        for volume in spec.volumes.unwrap() {
            let folder = volume.empty_dir.unwrap();
            assert_eq!(folder.medium.as_deref(), Some("Memory"));
            if volume.name == "workspace" {
                scratch = size(folder.size_limit.as_ref().unwrap());
            }
            assert!(folder.size_limit.is_some());
        }
        // A build fits, beside the compiler; a program is held to its own.
        assert_eq!(scratch, BUILD_SCRATCH_BYTES);
        let limits = container
            .resources
            .as_ref()
            .unwrap()
            .limits
            .as_ref()
            .unwrap();
        assert!(size(&limits["memory"]) >= scratch + Limits::COMPILE.memory_bytes);
        let mut set = container.env.iter().flatten();
        let program = set.find(|one| one.name == "GANTRY_SCRATCH_BYTES").unwrap();
        let expected = scratch_bytes(&Limits::MAXIMUM).to_string();
        assert_eq!(program.value.as_deref(), Some(&*expected));
    }

    #[test]
    fn a_dead_pod_is_told_from_one_that_is_coming() {
        let config = config();
        let of = |pod: &Pod| standing(Some(pod), &config);
        assert_eq!(standing(None, &config), Standing::Absent);
        assert_eq!(of(&pod(json!({ "phase": "Pending" }))), Standing::Coming);
        assert_eq!(
            of(&pod(json!({ "phase": "Failed", "reason": "Evicted" }))),
            Standing::Dead
        );
        let running = json!({ "phase": "Running", "containerStatuses": [{
            "name": CONTAINER, "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "containerID": "c", "state": { "running": {} },
        }]});
        let mut alive = pod(running.clone());
        let life = Life {
            uid: "u".to_owned(),
            container: "c".to_owned(),
        };
        assert_eq!(of(&alive), Standing::Alive(life.clone()));
        let other = |started: i64| TestPodConfig {
            image: "other:1".to_owned(),
            started: Timestamp::from_second(started).unwrap(),
            ..config.clone()
        };
        assert_eq!(standing(Some(&alive), &other(1)), Standing::Dead);
        let mut older = alive.clone();
        let annotations = older.metadata.annotations.as_mut().unwrap();
        annotations.insert(FRAMES.to_owned(), (VERSION - 1).to_string());
        assert_eq!(of(&older), Standing::Dead);
        // Of two servers with different images, one replaces the other's pod, and not both.
        assert_eq!(standing(Some(&alive), &other(-1)), Standing::Alive(life));
        alive.metadata.deletion_timestamp =
            serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        assert_eq!(of(&alive), Standing::Leaving);
        let mut waiting = running;
        waiting["containerStatuses"][0]["state"] =
            json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        assert_eq!(of(&pod(waiting.clone())), Standing::Looping);
        waiting["containerStatuses"][0]["state"] =
            json!({ "waiting": { "reason": "ContainerCreating" } });
        assert_eq!(of(&pod(waiting)), Standing::Coming);
    }
}
