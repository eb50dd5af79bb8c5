//! Modules on Kubernetes: a Deployment and a Service each, in their user's namespace. What a module is to be
//! is kept with its Deployment; this only watches it and asks for changes.

mod direct;
mod manifest;
mod reach;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use tokio::time::{Instant, timeout};

use super::cache::{Cache, WATCH_LAG, annotation, label};
use super::cluster::{Cluster, Failure, Kind};
use super::explain::{CRASH_LOOP, blocked, ended_badly, last_lines};
use super::labels::{AUTHORITY, MANAGED, MODULE, MODULE_OF, PACKAGES, USED};
use super::namespace::Namespaces;
use super::rollout::{is_ready, refused};
use crate::model::{
    ModuleName, ModuleSpec, ModuleState, ModuleStatus, Problem, SecretText, UserId, index_failed,
};
use crate::platform::modules::{Modules, ModulesError, packages_not_allowed};
use crate::platform::{ByteStream, PlatformError};
use manifest::{INSTALLER, Stored, former_index_secret, name_of};
pub use manifest::{Making, PipIndex};
pub use reach::Reach;

/// How long packages may take to be installed: some hundred megabytes over a slow line.
const INSTALL_PATIENCE: Duration = Duration::from_secs(300);

/// How long a pod without packages may take to begin; why it does not is told after that.
const BEGIN_PATIENCE: Duration = Duration::from_secs(20);

/// How long something that may pass (no room, an image that is not there yet) is given.
const CAUSE_AFTER: Duration = Duration::from_secs(10);

/// How long the cluster may take to begin to end pods that nothing asks for any more; seen: a second.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// How often time itself is looked at, when nothing else wakes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How exactly it is known when a module was last used: an annotation each time would be a request for
/// each call.
const NOTE_USE: Duration = Duration::from_secs(10);

/// What goes with a module.
const KINDS: [Kind; 5] = [
    Kind::Ingress,
    Kind::HorizontalPodAutoscaler,
    Kind::Deployment,
    Kind::Service,
    Kind::Secret,
];

type Key = (UserId, ModuleName);

/// Modules on Kubernetes.
#[derive(Debug)]
pub struct KubernetesModules {
    cluster: Cluster,
    namespaces: Namespaces,
    deployments: Cache<Deployment>,
    pods: Cache<Pod>,
    making: Making,
    reach: Reach,
    /// One change of a module at a time.
    changing: Mutex<HashMap<Key, Arc<tokio::sync::Mutex<()>>>>,
    /// When the use of a module was last noted.
    noted: Mutex<HashMap<Key, Instant>>,
}

/// A module as its Deployment has it.
struct Found {
    stored: Stored,
    deployment: Arc<Deployment>,
}

impl Found {
    /// Pods that the Deployment asks for.
    fn replicas(&self) -> u32 {
        let replicas = self.deployment.spec.as_ref().and_then(|spec| spec.replicas);
        u32::try_from(replicas.unwrap_or(1)).unwrap_or(1)
    }

    /// Its host; one that an earlier version made has none.
    fn authority(&self) -> Option<&str> {
        annotation(self.deployment.as_ref(), AUTHORITY)
    }

    fn image(&self) -> Option<&str> {
        let pod = self.deployment.spec.as_ref()?.template.spec.as_ref()?;
        pod.containers.first()?.image.as_deref()
    }
}

/// Why no pod of a module begins.
enum Held {
    /// The installer's last words.
    NotInstalled(String),
    /// The cluster's side, or only slow: its state tells.
    Other,
}

fn stored(deployment: &Deployment) -> Option<Stored> {
    serde_json::from_str(annotation(deployment, MODULE_OF)?).ok()
}

fn owner(deployment: &Deployment) -> Option<UserId> {
    deployment.namespace()?.strip_prefix("user-")?.parse().ok()
}

/// Its container has begun; whether it answers is another thing.
fn is_running(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    status.is_some_and(|s| s.phase.as_deref() == Some("Running") && s.pod_ip.is_some())
}

fn restarts(pod: &Pod) -> u32 {
    let containers = pod
        .status
        .iter()
        .flat_map(|s| s.container_statuses.iter().flatten());
    containers
        .map(|container| u32::try_from(container.restart_count).unwrap_or(0))
        .sum()
}

/// What pip said, when the pod's packages could not be installed.
fn not_installed(pod: &Pod) -> Option<String> {
    let end = ended_badly(pod).filter(|end| end.container == INSTALLER)?;
    Some(match end.words.trim() {
        "" => format!("pip {}", end.how),
        words => words.to_owned(),
    })
}

/// Why the pod does not serve, when something is known.
fn cause(pod: &Pod) -> Option<String> {
    if let Some(words) = not_installed(pod) {
        return Some(format!("its packages could not be installed: {words}"));
    }
    let blocked = blocked(pod)?;
    match ended_badly(pod) {
        Some(end) if blocked.code == CRASH_LOOP && !end.words.trim().is_empty() => Some(format!(
            "its server {}. Its last lines:\n{}",
            end.how,
            end.words.trim()
        )),
        Some(end) if blocked.code == CRASH_LOOP => Some(format!("its server {}", end.how)),
        _ => Some(blocked.why),
    }
}

impl KubernetesModules {
    /// With the platform's watches.
    pub fn new(
        cluster: &Cluster,
        namespaces: &Namespaces,
        deployments: &Cache<Deployment>,
        pods: &Cache<Pod>,
        making: Making,
        reach: Reach,
    ) -> Self {
        Self {
            cluster: cluster.clone(),
            namespaces: namespaces.clone(),
            deployments: deployments.clone(),
            pods: pods.clone(),
            making,
            reach,
            changing: Mutex::default(),
            noted: Mutex::default(),
        }
    }

    fn changing(&self, user: &UserId, name: &ModuleName) -> Arc<tokio::sync::Mutex<()>> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever waits holds one, too.
        changing.retain(|_, one| Arc::strong_count(one) > 1);
        Arc::clone(changing.entry((user.clone(), name.clone())).or_default())
    }

    fn found(&self, user: &UserId, name: &ModuleName) -> Option<Found> {
        let deployment = self.deployments.get(&user.namespace(), &name_of(name))?;
        if deployment.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let stored = stored(&deployment).filter(|stored| stored.module == *name)?;
        Some(Found { stored, deployment })
    }

    /// The module's pods that are not leaving.
    fn pods(&self, user: &UserId, name: &ModuleName) -> Vec<Arc<Pod>> {
        let mut pods = self.pods.of(&user.namespace());
        let wanted = name.label();
        pods.retain(|pod| {
            label(pod.as_ref(), MODULE) == Some(&wanted)
                && pod.metadata.deletion_timestamp.is_none()
        });
        pods
    }

    /// Those of them with the packages that the module is to have.
    fn current(&self, user: &UserId, stored: &Stored) -> Vec<Arc<Pod>> {
        let mut pods = self.pods(user, &stored.module);
        let packages = stored.packages_label();
        pods.retain(|pod| label(pod.as_ref(), PACKAGES) == packages.as_deref());
        pods
    }

    async fn apply(
        &self,
        user: &UserId,
        stored: &Stored,
        now: Option<u32>,
    ) -> Result<(), ModulesError> {
        let replicas = stored.replicas(now);
        let manifests = self.making.manifests(user, stored, replicas);
        let manifests = manifests.map_err(|error| {
            PlatformError::Unavailable(Problem::new(
                "platform_unavailable",
                "The module's manifest could not be written",
                format!("{error:#}"),
                "This is a fault of the server's; look at its log.",
            ))
        })?;
        direct::make_token(&self.cluster, user, &stored.module)
            .await
            .map_err(not_made)?;
        for manifest in &manifests {
            let applied = match manifest.kind {
                // One that is there stays as it is: a claim cannot be changed.
                Kind::PersistentVolumeClaim => match self.cluster.create(manifest).await {
                    Err(failure) if failure.is_conflict() => continue,
                    created => created,
                },
                _ => self.cluster.apply(manifest).await,
            };
            applied.map_err(not_made)?;
        }
        if stored.autoscale().is_none() {
            self.end_autoscaling(user, &stored.module).await?;
        }
        let (namespace, former) = (user.namespace(), former_index_secret(&stored.module));
        let deleted = self.cluster.delete(Kind::Secret, &namespace, &former, None);
        deleted.await.map_err(not_made)?;
        self.seen(user, &stored.module, |now| now == Some(stored))
            .await;
        Ok(())
    }

    async fn end_autoscaling(&self, user: &UserId, name: &ModuleName) -> Result<(), ModulesError> {
        let kind = Kind::HorizontalPodAutoscaler;
        let (namespace, object) = (user.namespace(), name_of(name));
        let deleted = self.cluster.delete(kind, &namespace, &object, None);
        deleted.await.map_err(not_made)
    }

    async fn delete(&self, user: &UserId, name: &ModuleName) -> Result<(), PlatformError> {
        let labels = format!("{MANAGED},{MODULE}={}", name.label());
        let namespace = user.namespace();
        for kind in KINDS {
            let removed = self.cluster.delete_all(kind, &namespace, &labels).await;
            removed.map_err(|failure| {
                failure.unavailable(&format!("The module {name} could not be removed"))
            })?;
        }
        self.seen(user, name, |now| now.is_none()).await;
        self.ended(user, name).await;
        self.noted().remove(&(user.clone(), name.clone()));
        Ok(())
    }

    /// Waits until the watch shows the module as it is to be: who asks right after a change sees it.
    async fn seen(
        &self,
        user: &UserId,
        name: &ModuleName,
        is_so: impl Fn(Option<&Stored>) -> bool,
    ) {
        let mut now = self.deployments.follow(&user.namespace(), &name_of(name));
        let as_wanted = now.wait_for(|deployment| {
            let living = deployment
                .as_deref()
                .filter(|deployment| deployment.metadata.deletion_timestamp.is_none());
            let stored = living.and_then(stored);
            is_so(stored.as_ref())
        });
        let seen = timeout(WATCH_LAG, as_wanted).await.is_ok();
        if !seen {
            tracing::warn!(%user, module = %name, "the watches do not show what was just changed");
        }
    }

    /// Waits until the module's pods are on their way out: who starts it again must not find one of them.
    async fn ended(&self, user: &UserId, name: &ModuleName) {
        let mut changes = self.pods.changes(&user.namespace());
        let gone = async {
            while !self.pods(user, name).is_empty() {
                if changes.changed().await.is_err() {
                    // The watches end with the server only.
                    return;
                }
            }
        };
        if timeout(END_PATIENCE, gone).await.is_err() {
            tracing::warn!(%user, module = %name, "the pods of a module that was ended are still there");
        }
    }

    /// Resolves when a pod with the wanted packages has begun.
    async fn begun(&self, user: &UserId, stored: &Stored) -> Result<(), Held> {
        let started = Instant::now();
        let patience = match stored.packages.is_empty() {
            true => BEGIN_PATIENCE,
            false => INSTALL_PATIENCE,
        };
        let mut changes = self.pods.changes(&user.namespace());
        loop {
            changes.borrow_and_update();
            let pods = self.current(user, stored);
            if pods.iter().any(|pod| is_running(pod)) {
                return Ok(());
            }
            if let Some(pod) = pods.iter().find(|pod| not_installed(pod).is_some()) {
                return Err(Held::NotInstalled(self.words(pod).await));
            }
            let waited = started.elapsed();
            let taken = self
                .deployments
                .get(&user.namespace(), &name_of(&stored.module))
                .is_none_or(|deployment| refused(&deployment).is_none());
            let held = !taken || pods.iter().any(|pod| blocked(pod).is_some());
            if waited >= patience || (held && waited >= CAUSE_AFTER) {
                return Err(Held::Other);
            }
            // Whatever wakes, everything is looked at again.
            let _ = timeout(LOOK_AGAIN, changes.changed()).await;
        }
    }

    /// What the installer said last.
    async fn words(&self, pod: &Pod) -> String {
        let lines = last_lines(&self.cluster, pod, INSTALLER).await;
        match lines.trim() {
            "" => not_installed(pod).unwrap_or_default(),
            lines => lines.to_owned(),
        }
    }

    fn status_of(&self, user: &UserId, found: Found) -> ModuleStatus {
        let pods = self.pods(user, &found.stored.module);
        let ready = pods.iter().filter(|pod| is_ready(pod)).count();
        let ready = u32::try_from(ready).unwrap_or(u32::MAX);
        let replicas = found.replicas();
        let cause = match ready < replicas {
            true => pods
                .iter()
                .find_map(|pod| cause(pod))
                .or_else(|| refused(&found.deployment).map(|blocked| blocked.why)),
            false => None,
        };
        let state = match (found.stored.stopped, ready, &cause) {
            (true, ..) => ModuleState::Stopped,
            (false, 0, Some(_)) => ModuleState::Failed,
            (false, 0, None) => ModuleState::Starting,
            _ => ModuleState::Running,
        };
        let used = annotation(found.deployment.as_ref(), USED).and_then(|text| text.parse().ok());
        let authority = found.authority().map(str::to_owned);
        ModuleStatus {
            user_id: user.clone(),
            namespace: user.namespace(),
            state,
            cause,
            ready,
            replicas: match found.stored.stopped {
                true => found.stored.scale.replicas(None),
                false => replicas,
            },
            autoscale: found.stored.autoscale(),
            restarts: pods.iter().map(|pod| restarts(pod)).sum(),
            authority,
            last_used: used,
            module: found.stored.module,
            packages: found.stored.packages,
            since: found.stored.since,
        }
    }

    fn noted(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Instant>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unreachable(name: &ModuleName, cause: String) -> PlatformError {
    PlatformError::Unavailable(Problem::new(
        "module_unavailable",
        format!("The module {name} cannot be reached"),
        cause,
        "Ask again in a moment; GET /modules tells how it is.",
    ))
}

fn not_made(failure: Failure) -> ModulesError {
    ModulesError::Platform(failure.unavailable("The module's pod could not be made"))
}

fn packages_refused(stored: &Stored, cause: String) -> ModulesError {
    if let Some(why) = index_failed(&cause).map(str::to_owned) {
        return ModulesError::Platform(PlatformError::Unavailable(Problem::new(
            "package_index_unavailable",
            "The package index failed",
            why,
            "Try again; if it lasts, the operator checks the index that the server is set up with.",
        )));
    }
    let names: Vec<&str> = stored.packages.iter().map(|one| one.as_str()).collect();
    ModulesError::Refused(Problem::new(
        "packages_not_installed",
        format!("The packages could not be installed: {}", names.join(" ")),
        cause,
        "Check the names and versions; packages are installed from wheels only. PIP_INDEX_URL, set for the server, names the index, which pods must be able to reach.",
    ))
}

#[async_trait]
impl Modules for KubernetesModules {
    async fn ensure(&self, user: &UserId, spec: &ModuleSpec) -> Result<bool, ModulesError> {
        let changing = self.changing(user, &spec.name);
        let _one = changing.lock().await;
        let before = self.found(user, &spec.name);
        let known = before.as_ref().map(|found| found.stored.clone());
        let wanted = Stored::merged(spec, known.clone());
        let now = before.as_ref().map(Found::replicas);
        let authority = self.making.authority(user, &spec.name);
        let made_alike = before.as_ref().is_some_and(|found| {
            found.image() == Some(self.making.image.as_str())
                && found.authority() == Some(authority.as_str())
        });
        let same = made_alike && known.as_ref() == Some(&wanted);
        if !same {
            if !wanted.packages.is_empty() && self.making.index.variables.is_none() {
                return Err(ModulesError::Refused(packages_not_allowed()));
            }
            self.namespaces.ensure(user).await.map_err(not_made)?;
            self.apply(user, &wanted, now).await?;
        }
        if let Err(Held::NotInstalled(why)) = self.begun(user, &wanted).await {
            // What served before goes on.
            match known.filter(|known| *known != wanted) {
                Some(known) => self.apply(user, &known, now).await?,
                None => self.delete(user, &spec.name).await?,
            }
            return Err(packages_refused(&wanted, why));
        }
        let more = now.is_none_or(|now| now < wanted.replicas(Some(now)));
        let other = known.is_none_or(|known| known.packages != wanted.packages);
        Ok(more || other)
    }

    async fn pause(&self, user: &UserId, name: &ModuleName) -> Result<(), PlatformError> {
        let changing = self.changing(user, name);
        let _one = changing.lock().await;
        let Some(found) = self.found(user, name).filter(|found| !found.stored.stopped) else {
            return Ok(());
        };
        let stopped = Stored {
            stopped: true,
            ..found.stored
        };
        match self.apply(user, &stopped, None).await {
            Ok(()) => {
                self.ended(user, name).await;
                Ok(())
            }
            Err(ModulesError::Platform(error)) => Err(error),
            Err(ModulesError::Refused(problem)) => Err(PlatformError::Unavailable(problem)),
        }
    }

    async fn remove(&self, user: &UserId, name: &ModuleName) -> Result<bool, PlatformError> {
        let changing = self.changing(user, name);
        let _one = changing.lock().await;
        if self.found(user, name).is_none() {
            return Ok(false);
        }
        self.delete(user, name).await?;
        Ok(true)
    }

    async fn list(&self) -> Result<Vec<ModuleStatus>, PlatformError> {
        let deployments = self.deployments.all();
        let mut all: Vec<ModuleStatus> = deployments
            .iter()
            .filter_map(|deployment| {
                let user = owner(deployment)?;
                let found = self.found(&user, &stored(deployment)?.module)?;
                Some(self.status_of(&user, found))
            })
            .collect();
        all.sort_by(|a, b| (&a.user_id, &a.module).cmp(&(&b.user_id, &b.module)));
        Ok(all)
    }

    async fn status(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<ModuleStatus>, PlatformError> {
        let found = self.found(user, name);
        Ok(found.map(|found| self.status_of(user, found)))
    }

    async fn replicas(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<Vec<String>>, PlatformError> {
        let Some(found) = self.found(user, name) else {
            return Ok(None);
        };
        let named = |pods: &[Arc<Pod>], is: fn(&Pod) -> bool| -> Vec<String> {
            let fit = pods.iter().filter(|pod| is(pod));
            fit.map(|pod| pod.name_any()).collect()
        };
        let current = self.current(user, &found.stored);
        let ready = named(&current, is_ready);
        if !ready.is_empty() {
            return Ok(Some(ready));
        }
        // One that just began answers before the kubelet has looked.
        let running = named(&current, is_running);
        if !running.is_empty() {
            return Ok(Some(running));
        }
        // Until the new ones have begun, those before them serve.
        Ok(Some(named(&self.pods(user, name), is_ready)))
    }

    async fn token(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<SecretText>, PlatformError> {
        let token = direct::token(&self.cluster, user, name).await;
        token.map_err(|failure| failure.unavailable("The module's token could not be read"))
    }

    async fn dial(
        &self,
        user: &UserId,
        name: &ModuleName,
        replica: &str,
    ) -> Result<Box<dyn ByteStream>, PlatformError> {
        let pod = self.pods.get(&user.namespace(), replica);
        let pod = pod.ok_or_else(|| unreachable(name, format!("its pod {replica} is gone")))?;
        self.reach
            .open(&pod)
            .await
            .map_err(|why| unreachable(name, cause(&pod).unwrap_or(why)))
    }

    fn used(&self, user: &UserId, name: &ModuleName) {
        let key = (user.clone(), name.clone());
        {
            let mut noted = self.noted();
            if noted.get(&key).is_some_and(|at| at.elapsed() < NOTE_USE) {
                return;
            }
            noted.insert(key, Instant::now());
        }
        let cluster = self.cluster.clone();
        let (user, name) = (user.clone(), name.clone());
        tokio::spawn(async move {
            let (namespace, deployment) = (user.namespace(), name_of(&name));
            let object = (
                Kind::Deployment,
                Some(namespace.as_str()),
                deployment.as_str(),
            );
            let now = Timestamp::now().to_string();
            if let Err(failure) = cluster.annotate(object, USED, &now).await {
                tracing::warn!(%user, module = %name, %failure, "that a module is in use was not noted");
            }
        });
    }
}
