//! The watches that feed the view: one for each kind.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::manifest::{Found, found};
use super::view::{Key, Life, Moment, View};
use crate::platform::kubernetes::cluster::Failure;
use crate::platform::kubernetes::labels::{IMAGE_CHECK, MANAGED_SERVICES};

/// Longest wait for the first lists: some ten thousand objects take a second or two each.
const FIRST_LIST: Duration = Duration::from_secs(30);

/// Where kubelets keep their Leases.
const NODE_LEASES: &str = "kube-node-lease";

/// Checks of images that are remembered at a time. A server has eight for each body under way.
const MAX_CHECKS: usize = 1_000;

/// A check that is as old was left by a server that died: longer than any waits for one.
const LEFT_BEHIND: Duration = Duration::from_secs(120);

/// Namespace and name.
type Id = (String, String);

/// What is watched, and who waits for it.
#[derive(Clone)]
pub struct Watched {
    view: Arc<Mutex<View>>,
    /// What checks of images found, by pod.
    checks: Arc<Mutex<HashMap<String, Check>>>,
    /// Counts up with every change.
    changed: watch::Sender<u64>,
    /// Kinds that were listed once.
    listed: watch::Sender<usize>,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watched")
    }
}

/// A check of an image.
struct Check {
    found: Option<Found>,
    life: Life,
    /// When it was first seen here.
    seen: Instant,
}

/// What a kind means for the view.
struct Feed<K> {
    kind: &'static str,
    set: fn(&Watched, &K, Moment, bool),
    gone: fn(&Watched, &Id, Moment),
    there: fn(&View) -> Vec<Id>,
}

const KINDS: usize = 4;

impl Watched {
    /// Watches until stopped. `late`: so late a node's heartbeat may be.
    pub fn start(client: &Client, late: Duration, stop: &CancellationToken) -> Self {
        let this = Self {
            view: Arc::new(Mutex::new(View::new(late))),
            checks: Arc::default(),
            changed: watch::channel(0).0,
            listed: watch::channel(0).0,
        };
        let services = watcher::Config::default().labels(MANAGED_SERVICES);
        let all = watcher::Config::default();
        let wanted = (Api::<Deployment>::all(client.clone()), deployments());
        tokio::spawn(this.clone().follow(wanted, services.clone(), stop.clone()));
        let pods = (Api::<Pod>::all(client.clone()), pods());
        tokio::spawn(this.clone().follow(pods, services, stop.clone()));
        let nodes = (Api::<Node>::all(client.clone()), nodes());
        tokio::spawn(this.clone().follow(nodes, all.clone(), stop.clone()));
        let leases = (
            Api::<Lease>::namespaced(client.clone(), NODE_LEASES),
            leases(),
        );
        tokio::spawn(this.clone().follow(leases, all, stop.clone()));
        this
    }

    /// The view.
    pub fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn checks(&self) -> MutexGuard<'_, HashMap<String, Check>> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the check with this pod has found, so far.
    pub fn found(&self, pod: &str) -> Option<Found> {
        self.checks().get(pod)?.found.clone()
    }

    /// Pods of checks that nobody waits for any more; they are forgotten.
    pub fn left_behind(&self, now: Moment) -> Vec<Life> {
        let mut left = Vec::new();
        self.checks().retain(|_, check| {
            let old = now.steady.duration_since(check.seen) > LEFT_BEHIND;
            if old {
                left.push(check.life.clone());
            }
            !old
        });
        left
    }

    /// Counts up with every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Resolves when everything there is has been listed once.
    pub async fn synced(&self) -> Result<(), Failure> {
        let mut listed = self.listed.subscribe();
        match timeout(FIRST_LIST, listed.wait_for(|listed| *listed >= KINDS)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Failure::not_listed("service, node and Lease", FIRST_LIST)),
        }
    }

    async fn follow<K>(
        self,
        (api, feed): (Api<K>, Feed<K>),
        config: watcher::Config,
        stop: CancellationToken,
    ) where
        K: Resource + Clone + fmt::Debug + Send + Sync + DeserializeOwned + 'static,
    {
        let mut events = std::pin::pin!(watcher(api, config).default_backoff());
        let (mut listed, mut live) = (HashSet::new(), false);
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = stop.cancelled() => return,
            };
            let now = Moment::now();
            match event {
                None => return,
                Some(Err(error)) => {
                    tracing::warn!(kind = feed.kind, %error, "a watch was interrupted; it begins again");
                    self.view().watching(feed.kind, false, now);
                    continue;
                }
                Some(Ok(watcher::Event::Init)) => listed.clear(),
                Some(Ok(watcher::Event::InitApply(object))) => {
                    listed.insert(id(&object));
                    (feed.set)(&self, &object, now, live);
                }
                Some(Ok(watcher::Event::Apply(object))) => {
                    (feed.set)(&self, &object, now, live);
                    self.view().watching(feed.kind, true, now);
                }
                Some(Ok(watcher::Event::Delete(object))) => {
                    (feed.gone)(&self, &id(&object), now);
                    self.view().watching(feed.kind, true, now);
                }
                Some(Ok(watcher::Event::InitDone)) => {
                    let there = (feed.there)(&self.view());
                    for gone in there.iter().filter(|id| !listed.contains(id)) {
                        (feed.gone)(&self, gone, now);
                    }
                    listed = HashSet::new();
                    let mut view = self.view();
                    view.watching(feed.kind, true, now);
                    // What was missed meanwhile is no node's fault.
                    view.nodes.forgive(now.steady);
                    drop(view);
                    if !live {
                        live = true;
                        self.listed.send_modify(|listed| *listed += 1);
                    }
                }
            }
            self.changed
                .send_modify(|changes| *changes = changes.wrapping_add(1));
        }
    }
}

fn id<K: Resource>(object: &K) -> Id {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn deployments() -> Feed<Deployment> {
    Feed {
        kind: "Deployment",
        set: |watched, deployment, now, live| {
            watched.view().set_wanted(deployment, now, live);
        },
        gone: |watched, (namespace, name), _| {
            if let Some(key) = super::manifest::owner(namespace, name) {
                watched.view().remove_wanted(&key);
            }
        },
        there: |view| {
            let id = |(user, name): Key| (super::manifest::namespace(&user), String::from(name));
            view.wanted_keys().into_iter().map(id).collect()
        },
    }
}

fn pods() -> Feed<Pod> {
    Feed {
        kind: "Pod",
        set: |watched, pod, now, live| {
            if !pod.labels().contains_key(IMAGE_CHECK) {
                return watched.view().set_replica(pod, now, live);
            }
            let mut checks = watched.checks();
            if let Some(check) = checks.get_mut(&pod.name_any()) {
                check.found = found(pod);
            } else if checks.len() < MAX_CHECKS {
                let check = Check {
                    found: found(pod),
                    life: Life {
                        namespace: pod.namespace().unwrap_or_default(),
                        name: pod.name_any(),
                        uid: pod.uid().unwrap_or_default(),
                    },
                    seen: now.steady,
                };
                checks.insert(pod.name_any(), check);
            }
        },
        gone: |watched, (namespace, name), now| {
            watched.checks().remove(name);
            watched.view().remove_replica(namespace, name, now);
        },
        // Checks are known apart from the view, and forgotten in their time.
        there: View::replica_ids,
    }
}

fn nodes() -> Feed<Node> {
    Feed {
        kind: "Node",
        set: |watched, node, _, _| watched.view().nodes.set(node),
        gone: |watched, (_, name), _| watched.view().nodes.remove(name),
        there: |view| {
            let names = view.nodes.names().into_iter();
            names.map(|name| (String::new(), name)).collect()
        },
    }
}

fn leases() -> Feed<Lease> {
    Feed {
        kind: "Lease",
        set: |watched, lease, now, _| watched.view().nodes.beat(lease, now.steady),
        gone: |watched, (_, name), _| watched.view().nodes.no_beat(name),
        there: |view| {
            let names = view.nodes.with_beats().into_iter();
            names.map(|name| (NODE_LEASES.to_owned(), name)).collect()
        },
    }
}
