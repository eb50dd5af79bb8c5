//! Services on Kubernetes: a Deployment each. The cluster keeps the state and does the placing; this
//! makes what is wanted, watches what is, and says why when they differ.

mod manifest;
mod nodes;
mod replica;
mod timeline;
mod view;
mod watch;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::try_join_all;
use futures_util::{StreamExt, stream};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::cache::WATCH_LAG;
use super::cluster::{Cluster, Failure, Kind};
use super::labels::{MANAGED_SERVICES, SERVICE};
use super::namespace::Namespaces;
use crate::model::{
    ContainerSpec, FieldError, ImageName, Network, ServiceEvent, ServiceName, ServiceOutcome,
    ServiceSpec, Snapshot, UserId,
};
use crate::platform::PlatformError;
use crate::platform::services::{Services, ServicesError};
#[cfg(test)]
pub(super) use manifest::namespace_parts;
use manifest::{Found, Making};
use view::{Key, Life, Moment};
use watch::Watched;

/// How often it is looked for what time alone changes: often enough that a late heartbeat is told to
/// within a quarter of a second.
const LOOK: Duration = Duration::from_millis(250);

/// Longest wait for what a check of an image finds. A registry says in a second or two that it does not
/// have it; an image that takes longer to fetch is there.
const CHECK: Duration = Duration::from_secs(15);

/// A namespace that was just made is not counted at once; it takes a moment.
const COUNTED: Duration = Duration::from_secs(5);

/// Pause between two tries meanwhile.
const RETRY: Duration = Duration::from_millis(200);

/// Services of one body that are applied at a time.
const AT_ONCE: usize = 8;

/// What the operator says of services.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// So late a node's heartbeat may be.
    pub late: Duration,
    /// They may run as root.
    pub root: bool,
    /// What is closed to them besides what is closed everywhere.
    pub closed: Vec<Network>,
}

/// Services on Kubernetes.
#[derive(Debug, Clone)]
pub struct KubernetesServices {
    cluster: Cluster,
    namespaces: Namespaces,
    rules: Arc<Rules>,
    watched: Watched,
    priority: Arc<str>,
    /// Users whose namespace was made, or made sure of, by this server.
    made: Arc<Mutex<HashSet<UserId>>>,
}

/// A service with what it runs.
struct Resolved<'a> {
    name: &'a ServiceName,
    replicas: u32,
    container: ContainerSpec,
    /// Its place in the body.
    index: usize,
    outcome: &'static str,
}

impl KubernetesServices {
    /// Begins to watch. `installation`: the server's own namespace.
    pub async fn start(
        cluster: &Cluster,
        namespaces: &Namespaces,
        installation: &str,
        rules: Rules,
        stop: &CancellationToken,
    ) -> Result<Self, Failure> {
        cluster.apply(&manifest::priority(installation)).await?;
        let this = Self {
            cluster: cluster.clone(),
            namespaces: namespaces.clone(),
            watched: Watched::start(&cluster.client, rules.late, stop),
            rules: Arc::new(rules),
            priority: manifest::priority_name(installation).into(),
            made: Arc::default(),
        };
        this.watched.synced().await?;
        tokio::spawn(this.clone().look(stop.clone()));
        Ok(this)
    }

    async fn look(self, stop: CancellationToken) {
        let mut every = tokio::time::interval(LOOK);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = every.tick() => {}
                () = stop.cancelled() => return,
            }
            let now = Moment::now();
            let replace = self.watched.view().look(now);
            let left = self.watched.left_behind(now);
            if !left.is_empty() {
                // A server did not live to remove them.
                let what = "an old check of an image";
                tokio::spawn(self.clone().remove_pods(what, left));
            }
            if !replace.is_empty() {
                // Not waited for: a slow API server must not make nodes look healthy.
                let what = "a container that did not start within a minute";
                tokio::spawn(self.clone().remove_pods(what, replace));
            }
        }
    }

    /// Removes pods; `what` they are, in words. Every replica of this server does: the first one's wish
    /// is granted, and the others' finds another life.
    async fn remove_pods(self, what: &'static str, all: Vec<Life>) {
        for Life {
            namespace,
            name,
            uid,
        } in all
        {
            let removed = self.cluster.delete_life(Kind::Pod, &namespace, &name, &uid);
            match removed.await {
                Ok(()) => tracing::info!(%namespace, %name, "{what} is removed"),
                Err(failure) => {
                    tracing::warn!(%namespace, %name, %failure, "{what} could not be removed");
                }
            }
        }
    }

    /// How services are made now.
    fn making(&self) -> Making<'_> {
        Making {
            priority: &self.priority,
            root: self.rules.root,
            ask_registry: self.namespaces.pulls_with_secrets(),
        }
    }

    /// Fills in what a service runs already.
    fn resolve<'a>(
        &self,
        user: &UserId,
        services: &'a [ServiceSpec],
    ) -> Result<Vec<Resolved<'a>>, FieldError> {
        let view = self.watched.view();
        let all = services.iter().enumerate().map(|(index, service)| {
            let key = (user.clone(), service.name.clone());
            let before = view.wanted(&key);
            let container = match (&service.container, before) {
                (Some(container), _) => container.clone(),
                (None, Some(before)) => before.container.clone(),
                (None, None) => {
                    let reason = format!("is required: there is no service {} yet", service.name);
                    return Err(FieldError::new(
                        format!("services[{index}].container"),
                        reason,
                    ));
                }
            };
            let outcome = match before {
                None => "created",
                Some(before) if before.container != container => "updated",
                Some(before) if before.replicas != service.replicas => "rescaled",
                Some(_) => "unchanged",
            };
            Ok(Resolved {
                name: &service.name,
                replicas: service.replicas,
                container,
                index,
                outcome,
            })
        });
        all.collect()
    }

    /// Makes the user's namespace for services, once in this server's life.
    async fn ensure_namespace(&self, user: &UserId) -> Result<(), Failure> {
        if self.made().contains(user) {
            return Ok(());
        }
        let parts = manifest::namespace_parts(user, &self.rules.closed);
        let (namespace, parts) = parts.split_at(1);
        for manifest in namespace {
            self.cluster.apply(manifest).await?;
        }
        try_join_all(parts.iter().map(|part| self.cluster.apply(part))).await?;
        self.made().insert(user.clone());
        Ok(())
    }

    fn made(&self) -> std::sync::MutexGuard<'_, HashSet<UserId>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks whether every image can be had that no node is known to have, before anything is made.
    async fn check_images(
        &self,
        user: &UserId,
        services: &[Resolved<'_>],
        making: Making<'_>,
    ) -> Result<(), ServicesError> {
        let mut unknown: BTreeMap<&ImageName, &Resolved<'_>> = BTreeMap::new();
        {
            let view = self.watched.view();
            for service in services {
                let image = &service.container.image;
                let key = (user.clone(), service.name.clone());
                let runs = view
                    .wanted(&key)
                    .is_some_and(|before| before.container.image == *image);
                // On a node an image may be somebody else's.
                if !runs && (making.ask_registry || !view.nodes.has(image)) {
                    unknown.entry(image).or_insert(service);
                }
            }
        }
        // Collected: a lazy list of futures cannot be sent to another thread.
        let checks: Vec<_> = unknown
            .into_values()
            .map(|service| self.check_image(user, service, making))
            .collect();
        let found: Vec<_> = stream::iter(checks).buffered(AT_ONCE).collect().await;
        found.into_iter().collect()
    }

    async fn check_image(
        &self,
        user: &UserId,
        service: &Resolved<'_>,
        making: Making<'_>,
    ) -> Result<(), ServicesError> {
        let failed = |failure: Failure| failure.unavailable("The image could not be looked for");
        let namespace = manifest::namespace(user);
        let name = format!("image-check-{}", uuid::Uuid::now_v7().simple());
        let check = manifest::image_check(user, &name, &service.container, making);
        let mut changes = self.watched.changes();
        let begun = Instant::now();
        while let Err(failure) = self.cluster.create(&check).await {
            if !failure.is_uncounted() || begun.elapsed() > COUNTED {
                return Err(failed(failure).into());
            }
            tokio::time::sleep(RETRY).await;
        }
        let finding = async {
            loop {
                if let Some(found) = self.watched.found(&name) {
                    return Some(found);
                }
                changes.changed().await.ok()?;
            }
        };
        let found = timeout(CHECK, finding).await.ok().flatten();
        let removed = self
            .cluster
            .delete(Kind::Pod, &namespace, &name, Some(0))
            .await;
        if let Err(failure) = removed {
            tracing::warn!(%namespace, %name, %failure, "the check of an image could not be removed; it ends by itself");
        }
        let image = &service.container.image;
        let refused = |why: String| {
            let field = format!("services[{}].container.image", service.index);
            Err(ServicesError::Field(FieldError::new(field, why)))
        };
        match found {
            Some(Found::Nothing(said)) => {
                refused(format!("is {image}, which cannot be had: {said}"))
            }
            Some(Found::Root(said)) => refused(format!(
                "is {image}, which runs as root, and services may not ({said}): give it a numeric USER other than 0, \
                 or ask the operator for GANTRY_ROOT_SERVICES"
            )),
            // Not known within the time is no reason to refuse: the service's state tells it.
            Some(Found::Image) | None => Ok(()),
        }
    }

    /// Makes one service be as it is wanted, and waits until that is seen.
    async fn apply_one(
        &self,
        user: &UserId,
        service: &Resolved<'_>,
        making: Making<'_>,
    ) -> ServiceOutcome {
        let manifest = manifest::deployment(
            user,
            service.name,
            service.replicas,
            &service.container,
            making,
        );
        let mut applied = self.cluster.apply(&manifest).await;
        if applied
            .as_ref()
            .is_err_and(|f| f.is_not_found() || f.is_terminating())
        {
            // Somebody removed the namespace.
            self.made().remove(user);
            applied = match self.ensure_namespace(user).await {
                Ok(()) => self.cluster.apply(&manifest).await,
                Err(failure) => Err(failure),
            };
        }
        let outcome = |outcome: &str, error| ServiceOutcome {
            service_name: service.name.clone(),
            outcome: outcome.to_owned(),
            replicas: service.replicas,
            error,
        };
        if let Err(failure) = applied {
            let message = format!("The service {} could not be made", service.name);
            return outcome("failed", Some(failure.problem(&message)));
        }
        let key = (user.clone(), service.name.clone());
        self.seen(|view| {
            view.wanted(&key).is_some_and(|wanted| {
                wanted.replicas == service.replicas && wanted.container == service.container
            })
        })
        .await;
        outcome(service.outcome, None)
    }

    /// Waits until the watches show it: who asks for states right after a change sees the change.
    async fn seen(&self, is_so: impl Fn(&view::View) -> bool) {
        let mut changes = self.watched.changes();
        let seen = async {
            while !is_so(&self.watched.view()) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        if timeout(WATCH_LAG, seen).await.is_err() {
            tracing::warn!("the watches do not show what was just changed");
        }
    }

    fn key(user: &UserId, name: &ServiceName) -> Key {
        (user.clone(), name.clone())
    }
}

#[async_trait]
impl Services for KubernetesServices {
    async fn apply(
        &self,
        user: &UserId,
        services: &[ServiceSpec],
    ) -> Result<Vec<ServiceOutcome>, ServicesError> {
        let resolved = self.resolve(user, services).map_err(ServicesError::Field)?;
        self.ensure_namespace(user).await.map_err(|failure| {
            failure.unavailable("The namespace of the services could not be made")
        })?;
        let making = self.making();
        self.check_images(user, &resolved, making).await?;
        let applied: Vec<_> = resolved
            .iter()
            .map(|service| self.apply_one(user, service, making))
            .collect();
        Ok(stream::iter(applied).buffered(AT_ONCE).collect().await)
    }

    async fn remove(&self, user: &UserId, name: &ServiceName) -> Result<bool, PlatformError> {
        let key = Self::key(user, name);
        if self.watched.view().wanted(&key).is_none() {
            return Ok(false);
        }
        let labels = format!("{MANAGED_SERVICES},{SERVICE}={name}");
        let namespace = manifest::namespace(user);
        let deleted = self
            .cluster
            .delete_all(Kind::Deployment, &namespace, &labels);
        deleted.await.map_err(|failure| {
            failure.unavailable(&format!("The service {name} could not be removed"))
        })?;
        self.seen(|view| view.wanted(&key).is_none()).await;
        Ok(true)
    }

    fn snapshot(&self, of: Option<&UserId>) -> Snapshot {
        self.watched.view().snapshot(of, Moment::now().wall)
    }

    fn events(&self, user: &UserId, name: &ServiceName) -> Option<Vec<ServiceEvent>> {
        self.watched.view().events(&Self::key(user, name))
    }

    fn owners(&self, name: &ServiceName) -> Vec<UserId> {
        self.watched.view().owners(name)
    }
}
