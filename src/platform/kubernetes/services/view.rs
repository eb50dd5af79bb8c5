//! All that is known of services, fed by the watches: who asks for states asks no API server.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use tokio::time::Instant;

use super::manifest;
use super::nodes::{Change, Nodes};
use super::replica::{Judged, PENDING_TOO_LONG, Replica, Stage};
use super::timeline::{Line, Timeline};
use crate::model::{
    ContainerSpec, ContainerState, Happening, ServiceEvent, ServiceName, ServiceState,
    ServiceStatus, Snapshot, UserId,
};
use crate::platform::kubernetes::labels::{SERVICE, USER};

/// Containers of one service that are replaced at a time, so that a service that cannot run does not
/// keep the cluster busy.
const REPLACED_AT_ONCE: usize = 10;

/// Rounds of replacing after which the pause between two no longer doubles: 16 minutes.
const MAX_DOUBLINGS: u32 = 4;

/// Whose service, and which.
pub type Key = (UserId, ServiceName);

/// A moment by both clocks: the wall's to be told, the monotonic one to measure.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// The machine's clock.
    pub wall: Timestamp,
    /// Time since the start.
    pub steady: Instant,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self {
            wall: Timestamp::now(),
            steady: Instant::now(),
        }
    }
}

/// What is wanted of a service: its Deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Replicas.
    pub replicas: u32,
    /// What they run.
    pub container: ContainerSpec,
    /// This version of the Deployment.
    pub version: String,
    /// The cluster has acted on the last change, and every container is of the last kind.
    settled: bool,
    /// Why the cluster cannot even make containers.
    refused: Option<String>,
}

/// Nodes were lost with containers of the service on them.
#[derive(Debug)]
struct Outage {
    /// When the first of them was last heard of.
    since: Timestamp,
}

/// A service.
#[derive(Debug, Default)]
struct Service {
    wanted: Option<Wanted>,
    /// Namespaces and names of its pods.
    replicas: BTreeSet<(String, String)>,
    timeline: Timeline,
    outage: Option<Outage>,
    /// Rounds of replacing what did not start, and the last of them.
    replaced: Option<(u32, Instant)>,
}

/// One life of a pod, to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Which pod of that name.
    pub uid: String,
}

/// Everything.
#[derive(Debug)]
pub struct View {
    services: BTreeMap<Key, Service>,
    replicas: HashMap<(String, String), Replica>,
    /// Every node.
    pub nodes: Nodes,
    /// Which watches are broken, and since when.
    broken: BTreeMap<&'static str, Timestamp>,
}

impl View {
    /// Nothing is known yet. `late`: so late a node's heartbeat may be.
    pub fn new(late: Duration) -> Self {
        Self {
            services: BTreeMap::new(),
            replicas: HashMap::new(),
            nodes: Nodes::new(late),
            broken: BTreeMap::new(),
        }
    }

    /// A watch broke, or works again.
    pub fn watching(&mut self, kind: &'static str, works: bool, now: Moment) {
        if works {
            self.broken.remove(kind);
        } else {
            self.broken.entry(kind).or_insert(now.wall);
        }
    }

    /// A Deployment as it is now; `live`: it changes now, and was not there before the watch began.
    pub fn set_wanted(&mut self, deployment: &Deployment, now: Moment, live: bool) {
        let Some((key, wanted)) = read(deployment) else {
            return;
        };
        if deployment.metadata.deletion_timestamp.is_some() {
            return self.remove_wanted(&key);
        }
        let service = self.services.entry(key.clone()).or_default();
        let made = deployment.metadata.creation_timestamp.as_ref();
        match &service.wanted {
            None => {
                let time = if live {
                    now.wall
                } else {
                    made.map_or(now.wall, |time| time.0)
                };
                let what = format!(
                    "made with {} of {}",
                    wanted.replicas, wanted.container.image
                );
                service
                    .timeline
                    .add(Line::new(time, Happening::Created, what));
            }
            Some(before) => {
                if before.replicas != wanted.replicas {
                    let what = format!("scaled from {} to {}", before.replicas, wanted.replicas);
                    service
                        .timeline
                        .add(Line::new(now.wall, Happening::Scaled, what));
                }
                if before.container != wanted.container {
                    let what = format!("runs {} from now on", wanted.container.image);
                    service
                        .timeline
                        .add(Line::new(now.wall, Happening::Updated, what));
                    service.replaced = None;
                }
            }
        }
        service.wanted = Some(wanted);
        self.recovered(&key, now);
    }

    /// The Deployment is gone.
    pub fn remove_wanted(&mut self, key: &Key) {
        if let Some(service) = self.services.get_mut(key) {
            service.wanted = None;
            if service.replicas.is_empty() {
                self.services.remove(key);
            }
        }
    }

    /// A pod as it is now.
    pub fn set_replica(&mut self, pod: &Pod, now: Moment, live: bool) {
        let Some(mut replica) = Replica::of(pod) else {
            return;
        };
        let id = (replica.namespace.clone(), replica.name.clone());
        let key = (replica.user.clone(), replica.service.clone());
        let before = self.replicas.remove(&id);
        let before = before.filter(|before| before.uid == replica.uid);
        replica.first_seen = match &before {
            Some(before) => before.first_seen,
            None if live => now.wall,
            None => replica.created,
        };
        self.replicas.insert(id.clone(), replica.clone());
        let service = self.services.entry(key.clone()).or_default();
        service.replicas.insert(id);
        tell(service, before.as_ref(), &replica, now, live);
        self.recovered(&key, now);
    }

    /// The pod is gone.
    pub fn remove_replica(&mut self, namespace: &str, name: &str, now: Moment) {
        let id = (namespace.to_owned(), name.to_owned());
        let Some(replica) = self.replicas.remove(&id) else {
            return;
        };
        let key = (replica.user.clone(), replica.service.clone());
        let Some(service) = self.services.get_mut(&key) else {
            return;
        };
        service.replicas.remove(&id);
        let line = Line::new(now.wall, Happening::Stopped, "stopped").of(&replica);
        let line = match replica.stopping {
            Some(_) => line,
            None => line.after(replica.first_seen),
        };
        service.timeline.add(line);
        if service.wanted.is_none() && service.replicas.is_empty() {
            self.services.remove(&key);
        }
    }

    /// Every Deployment's namespace and name, to find those that a new list does not have.
    pub fn wanted_keys(&self) -> Vec<Key> {
        let there = self
            .services
            .iter()
            .filter(|(_, service)| service.wanted.is_some());
        there.map(|(key, _)| key.clone()).collect()
    }

    /// Every pod's namespace and name.
    pub fn replica_ids(&self) -> Vec<(String, String)> {
        self.replicas.keys().cloned().collect()
    }

    /// Looks at everything that time alone changes: which nodes failed or came back, and which pods
    /// have to be replaced.
    pub fn look(&mut self, now: Moment) -> Vec<Life> {
        for change in self.nodes.look(now.steady, now.wall) {
            self.tell_of_node(&change, now);
        }
        // What is not seen cannot be judged.
        if !self.broken.is_empty() {
            return Vec::new();
        }
        let mut replace = Vec::new();
        for service in self.services.values_mut() {
            replace.extend(stuck(service, &self.replicas, now));
        }
        replace
    }

    fn tell_of_node(&mut self, change: &Change, now: Moment) {
        let node = change.node.as_str();
        match &change.failed {
            Some(failed) => tracing::warn!(node, why = %failed.why, "a node is lost"),
            None => tracing::info!(node, "a node is back"),
        }
        let mut keys = Vec::new();
        for (key, service) in &mut self.services {
            let here = service
                .replicas
                .iter()
                .filter_map(|id| self.replicas.get(id))
                .filter(|replica| replica.node.as_deref() == Some(node))
                .filter(|replica| replica.wanted() && !matches!(replica.stage, Stage::Ended { .. }))
                .count();
            match (&change.failed, &change.was) {
                (Some(failed), _) if here > 0 => {
                    let since = service
                        .outage
                        .as_ref()
                        .map_or(failed.since, |outage| outage.since);
                    service.outage = Some(Outage { since });
                    let what = format!(
                        "{node} is lost with {here} of its containers: {}",
                        failed.why
                    );
                    let line = Line::new(now.wall, Happening::NodeLost, what);
                    service.timeline.add(line.on(node).after(failed.since));
                }
                (None, Some(was))
                    if service.replicas.iter().any(|id| {
                        self.replicas
                            .get(id)
                            .is_some_and(|replica| replica.node.as_deref() == Some(node))
                    }) =>
                {
                    let what = format!("{node} is heard of again");
                    let line = Line::new(now.wall, Happening::NodeBack, what);
                    service.timeline.add(line.on(node).after(was.since));
                }
                _ => continue,
            }
            keys.push(key.clone());
        }
        for key in keys {
            self.recovered(&key, now);
        }
    }

    /// Ends an outage when as many run as are wanted.
    fn recovered(&mut self, key: &Key, now: Moment) {
        let Some(service) = self.services.get(key) else {
            return;
        };
        let (Some(wanted), Some(outage)) = (&service.wanted, &service.outage) else {
            return;
        };
        let running = self.running(service);
        if running < wanted.replicas {
            return;
        }
        let (since, what) = (outage.since, format!("all {} run again", wanted.replicas));
        if let Some(service) = self.services.get_mut(key) {
            service.outage = None;
            let line = Line::new(now.wall, Happening::Recovered, what);
            service.timeline.add(line.after(since));
        }
    }

    fn of<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Replica> {
        service
            .replicas
            .iter()
            .filter_map(|id| self.replicas.get(id))
    }

    fn judge(&self, replica: &Replica, now: Timestamp) -> Judged {
        let failed = replica
            .node
            .as_deref()
            .and_then(|node| self.nodes.failed(node));
        replica.judge(now, failed)
    }

    /// Containers that serve: ready, wanted, and on a node that is heard of.
    fn running(&self, service: &Service) -> u32 {
        let serves = |replica: &&Replica| {
            let node = replica.node.as_deref();
            replica.ready()
                && replica.wanted()
                && node.is_none_or(|node| self.nodes.failed(node).is_none())
        };
        u32::try_from(self.of(service).filter(serves).count()).unwrap_or(u32::MAX)
    }

    /// What is wanted of the service.
    pub fn wanted(&self, key: &Key) -> Option<&Wanted> {
        self.services.get(key)?.wanted.as_ref()
    }

    /// Everything, or what is one user's.
    pub fn snapshot(&self, of: Option<&UserId>, now: Timestamp) -> Snapshot {
        let mut snapshot = Snapshot {
            nodes: match of {
                None => self.nodes.statuses(),
                Some(_) => Vec::new(),
            },
            containers: Vec::new(),
            services: Vec::new(),
            stale_since: self.broken.values().min().copied(),
        };
        let seen = self
            .services
            .iter()
            .filter(|((user, _), _)| of.is_none_or(|of| of == user));
        for (key, service) in seen {
            let mut tally = Tally::default();
            for replica in self.of(service) {
                let judged = self.judge(replica, now);
                if replica.wanted() {
                    tally.count(&judged);
                }
                snapshot.containers.push(replica.status(judged));
            }
            if let Some(wanted) = &service.wanted {
                let running = self.running(service);
                let (state, reason) = tally.state(wanted, running);
                snapshot.services.push(ServiceStatus {
                    service_name: key.1.clone(),
                    user_id: key.0.clone(),
                    replicas: wanted.replicas,
                    current_state: running,
                    state,
                    reason,
                    image: wanted.container.image.to_string(),
                });
            }
        }
        snapshot
    }

    /// A service's timeline.
    pub fn events(&self, key: &Key) -> Option<Vec<ServiceEvent>> {
        let service = self.services.get(key)?;
        service.wanted.as_ref()?;
        Some(service.timeline.events())
    }

    /// Who has a service of this name.
    pub fn owners(&self, name: &ServiceName) -> Vec<UserId> {
        let named = self
            .services
            .iter()
            .filter(|((_, named), service)| named == name && service.wanted.is_some());
        named.map(|((user, _), _)| user.clone()).collect()
    }
}

/// What the wanted containers of a service do.
#[derive(Default)]
struct Tally {
    failed: u32,
    why_failed: Option<String>,
    completed: u32,
    why_completed: Option<String>,
    queued: u32,
    why_queued: Option<String>,
}

impl Tally {
    fn count(&mut self, judged: &Judged) {
        let (number, why) = match judged.state {
            ContainerState::Running => return,
            ContainerState::Failed => (&mut self.failed, &mut self.why_failed),
            ContainerState::Completed => (&mut self.completed, &mut self.why_completed),
            ContainerState::InQueue => (&mut self.queued, &mut self.why_queued),
        };
        *number += 1;
        if why.is_none() {
            why.clone_from(&judged.reason);
        }
    }

    fn state(self, wanted: &Wanted, running: u32) -> (ServiceState, Option<String>) {
        let of = |number: u32, what: &str, why: Option<String>| {
            let why = why.unwrap_or_default();
            Some(format!("{number} of its containers {what}: {why}"))
        };
        if self.failed > 0 {
            return (
                ServiceState::Failed,
                of(self.failed, "failed", self.why_failed),
            );
        }
        if let Some(refused) = &wanted.refused {
            return (ServiceState::Failed, Some(refused.clone()));
        }
        if running >= wanted.replicas && wanted.settled {
            return (ServiceState::Running, None);
        }
        if self.queued == 0 && self.completed > 0 && self.completed >= wanted.replicas {
            let why = of(self.completed, "completed", self.why_completed);
            return (ServiceState::Completed, why);
        }
        let why = match self.queued {
            0 => Some("the cluster is at work on the last change".to_owned()),
            queued => of(queued, "are on their way", self.why_queued),
        };
        (ServiceState::InQueue, why)
    }
}

/// What a pod's change means to a person.
fn tell(
    service: &mut Service,
    before: Option<&Replica>,
    replica: &Replica,
    now: Moment,
    live: bool,
) {
    // What was there before the watch began has its own times.
    let at = |own: Timestamp| if live { now.wall } else { own };
    let placed = |replica: &Replica| replica.node.is_some();
    if let Some(node) = replica
        .node
        .as_ref()
        .filter(|_| !before.is_some_and(placed))
    {
        let line = match &service.outage {
            Some(outage) if replica.created >= outage.since => Line::new(
                at(replica.placed.unwrap_or(replica.created)),
                Happening::Rescheduled,
                format!("placed on {node} in the place of one that was lost"),
            )
            .after(outage.since),
            _ => Line::new(
                at(replica.placed.unwrap_or(replica.created)),
                Happening::Placed,
                format!("placed on {node}"),
            ),
        };
        service.timeline.add(line.of(replica));
    }
    if replica.ready() && !before.is_some_and(Replica::ready) {
        service.replaced = None;
        if let Stage::Running { since, .. } = replica.stage {
            let line = Line::new(at(since), Happening::Started, "ready");
            service
                .timeline
                .add(line.of(replica).after(replica.created));
        }
    }
    if let Stage::Ended { how, at: ended, .. } = &replica.stage
        && before.is_none_or(|before| before.stage != replica.stage)
        && replica.wanted()
    {
        let line = Line::new(at(*ended), Happening::Ended, how.clone());
        service.timeline.add(line.of(replica));
    }
}

/// Pods of the service that did not start within their time. The pause between two rounds doubles: what
/// cannot run keeps being tried, and does not keep the cluster busy.
fn stuck(
    service: &mut Service,
    replicas: &HashMap<(String, String), Replica>,
    now: Moment,
) -> Vec<Life> {
    if service.wanted.is_none() {
        return Vec::new();
    }
    if let Some((rounds, last)) = service.replaced {
        let pause = PENDING_TOO_LONG * 2_u32.pow(rounds.min(MAX_DOUBLINGS));
        if now.steady.duration_since(last) < pause {
            return Vec::new();
        }
    }
    let own = service.replicas.iter().filter_map(|id| replicas.get(id));
    let stuck: Vec<&Replica> = own
        .filter(|replica| replica.stuck(now.wall))
        .take(REPLACED_AT_ONCE)
        .collect();
    if stuck.is_empty() {
        return Vec::new();
    }
    let rounds = service.replaced.map_or(0, |(rounds, _)| rounds + 1);
    service.replaced = Some((rounds, now.steady));
    for replica in &stuck {
        let why = replica.judge(now.wall, None).reason.unwrap_or_default();
        let line = Line::new(now.wall, Happening::Failed, why).of(replica);
        service.timeline.add(line.after(replica.first_seen));
        let what = "removed, so that another takes its place";
        service
            .timeline
            .add(Line::new(now.wall, Happening::Replaced, what).of(replica));
    }
    let replace = stuck.into_iter().map(|replica| Life {
        namespace: replica.namespace.clone(),
        name: replica.name.clone(),
        uid: replica.uid.clone(),
    });
    replace.collect()
}

/// Whose service a Deployment is, and what it wants.
fn read(deployment: &Deployment) -> Option<(Key, Wanted)> {
    let key = key_of(deployment)?;
    let spec = deployment.spec.as_ref()?;
    let status = deployment.status.as_ref();
    let replicas = spec.replicas.unwrap_or(1);
    let conditions = status
        .and_then(|s| s.conditions.as_deref())
        .unwrap_or_default();
    let refused = conditions
        .iter()
        .find(|c| c.type_ == "ReplicaFailure" && c.status == "True");
    let observed = status.and_then(|s| s.observed_generation) >= deployment.metadata.generation;
    let updated = status.and_then(|s| s.updated_replicas).unwrap_or(0) >= replicas;
    let wanted = Wanted {
        replicas: u32::try_from(replicas).unwrap_or(0),
        container: manifest::container_of(spec.template.spec.as_ref()?.containers.first()?)?,
        version: deployment.resource_version().unwrap_or_default(),
        settled: observed && updated,
        refused: refused.map(|c| {
            let message = c.message.as_deref().unwrap_or_default();
            format!("the cluster makes no containers: {message}")
        }),
    };
    Some((key, wanted))
}

/// Whose service a Deployment is.
pub fn key_of(deployment: &Deployment) -> Option<Key> {
    let labels = deployment.labels();
    Some((
        labels.get(USER)?.parse().ok()?,
        labels.get(SERVICE)?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests;
