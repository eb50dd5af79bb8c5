//! What the cluster holds, fed by watches, so that a warm submission asks nobody.
//!
//! Every object has a channel of its own: whoever waits for a pod wakes when that pod changes, and
//! not with every other user's.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use kube::core::DynamicObject;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, Failure, Kind};

/// Longest wait for the first list of a kind: some ten thousand objects take a second or two.
const FIRST_LIST: Duration = Duration::from_secs(30);

/// How far a watch may be behind; usually milliseconds.
pub const WATCH_LAG: Duration = Duration::from_secs(2);

/// An object as it is now; `None`: it is not there.
pub type Now<K> = watch::Receiver<Option<Arc<K>>>;

/// The objects of one namespace.
struct Room<K> {
    names: BTreeMap<String, watch::Sender<Option<Arc<K>>>>,
    /// Told of every change in it.
    changed: watch::Sender<()>,
}

impl<K> Default for Room<K> {
    fn default() -> Self {
        Self {
            names: BTreeMap::new(),
            changed: watch::channel(()).0,
        }
    }
}

type Objects<K> = HashMap<String, Room<K>>;

/// Every object of one kind that Gantry made.
pub struct Cache<K> {
    objects: Arc<Mutex<Objects<K>>>,
    synced: watch::Receiver<bool>,
}

impl<K> Clone for Cache<K> {
    fn clone(&self) -> Self {
        Self {
            objects: Arc::clone(&self.objects),
            synced: self.synced.clone(),
        }
    }
}

impl<K> fmt::Debug for Cache<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cache")
    }
}

/// Namespace and name of an object that changed or went.
pub type Changed = (String, String);

/// What to watch.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The kind.
    pub kind: Kind,
    /// The namespace; `None`: all.
    pub namespace: Option<String>,
    /// Labels of what is wanted.
    pub labels: &'static str,
}

impl<K> Cache<K>
where
    K: Resource + Clone + fmt::Debug + Send + Sync + DeserializeOwned + 'static,
{
    /// Watches until stopped; `tell` hears of every change.
    pub fn watch(
        cluster: &Cluster,
        watched: Watched,
        tell: Option<mpsc::UnboundedSender<Changed>>,
        stop: CancellationToken,
    ) -> Self {
        let api = cluster.api(watched.kind, watched.namespace.as_deref());
        let config = watcher::Config::default().labels(watched.labels);
        let (set_synced, synced) = watch::channel(false);
        let this = Self {
            objects: Arc::default(),
            synced,
        };
        let cache = this.clone();
        let kind = watched.kind;
        tokio::spawn(async move {
            let events = watcher(api, config).default_backoff();
            let mut events = std::pin::pin!(events);
            let mut listed = HashSet::new();
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    () = stop.cancelled() => return,
                };
                match event {
                    None => return,
                    Some(Err(error)) => {
                        tracing::warn!(?kind, %error, "a watch was interrupted; it begins again");
                    }
                    Some(Ok(event)) => {
                        let complete = cache.take_in(event, &mut listed, tell.as_ref());
                        if complete {
                            set_synced.send_replace(true);
                        }
                    }
                }
            }
        });
        this
    }

    /// One event of the watch; `true` after a complete list.
    fn take_in(
        &self,
        event: watcher::Event<DynamicObject>,
        listed: &mut HashSet<Changed>,
        tell: Option<&mpsc::UnboundedSender<Changed>>,
    ) -> bool {
        let key =
            |object: &DynamicObject| (object.namespace().unwrap_or_default(), object.name_any());
        let mut changed = Vec::new();
        let mut complete = false;
        match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(object) => {
                listed.insert(key(&object));
                changed.extend(self.set(key(&object), Some(object)));
            }
            watcher::Event::Apply(object) => changed.extend(self.set(key(&object), Some(object))),
            watcher::Event::Delete(object) => changed.extend(self.set(key(&object), None)),
            watcher::Event::InitDone => {
                complete = true;
                let gone: Vec<Changed> = {
                    let objects = self.locked();
                    let all = objects.iter().flat_map(|(namespace, room)| {
                        room.names
                            .keys()
                            .map(|name| (namespace.clone(), name.clone()))
                    });
                    all.filter(|key| !listed.contains(key)).collect()
                };
                for key in gone {
                    changed.extend(self.set(key, None));
                }
                listed.clear();
            }
        }
        for key in changed {
            // Nobody listens any more when the server ends.
            let _ = tell.map(|tell| tell.send(key));
        }
        complete
    }

    fn set(&self, key: Changed, object: Option<DynamicObject>) -> Option<Changed> {
        let object = match object {
            None => None,
            Some(mut object) => {
                // Who set which field takes as much room as all the rest.
                object.metadata.managed_fields = None;
                match object.try_parse::<K>() {
                    Ok(object) => Some(Arc::new(object)),
                    Err(error) => {
                        tracing::warn!(?key, %error, "an object cannot be read and is passed over");
                        return None;
                    }
                }
            }
        };
        let mut objects = self.locked();
        let room = objects.entry(key.0.clone()).or_default();
        let names = &mut room.names;
        match object {
            Some(object) => {
                let entry = names.entry(key.1.clone());
                let sender = entry.or_insert_with(|| watch::channel(None).0);
                sender.send_replace(Some(object));
            }
            None => {
                let followed = names.get(&key.1).is_some_and(|sender| {
                    sender.send_replace(None);
                    sender.receiver_count() > 0
                });
                if !followed {
                    names.remove(&key.1);
                }
            }
        }
        room.changed.send_replace(());
        if room.names.is_empty() && room.changed.receiver_count() == 0 {
            objects.remove(&key.0);
        }
        Some(key)
    }

    /// Resolves when everything there is has been listed once.
    pub async fn synced(&self, kind: Kind) -> Result<(), Failure> {
        let mut synced = self.synced.clone();
        match timeout(FIRST_LIST, synced.wait_for(|synced| *synced)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Failure::not_listed(&format!("{kind:?}"), FIRST_LIST)),
        }
    }

    /// The object now.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let objects = self.locked();
        let sender = objects.get(namespace)?.names.get(name)?;
        sender.borrow().clone()
    }

    /// The object, now and from now on.
    pub fn follow(&self, namespace: &str, name: &str) -> Now<K> {
        let mut objects = self.locked();
        let room = objects.entry(namespace.to_owned()).or_default();
        let sender = room
            .names
            .entry(name.to_owned())
            .or_insert_with(|| watch::channel(None).0);
        sender.subscribe()
    }

    /// Wakes at every change in a namespace.
    pub fn changes(&self, namespace: &str) -> watch::Receiver<()> {
        let mut objects = self.locked();
        let room = objects.entry(namespace.to_owned()).or_default();
        room.changed.subscribe()
    }

    /// Every object of a namespace.
    pub fn of(&self, namespace: &str) -> Vec<Arc<K>> {
        let objects = self.locked();
        let senders = objects.get(namespace).into_iter();
        let senders = senders.flat_map(|room| room.names.values());
        senders
            .filter_map(|sender| sender.borrow().clone())
            .collect()
    }

    /// Every object.
    pub fn all(&self) -> Vec<Arc<K>> {
        let objects = self.locked();
        let all = objects.values().flat_map(|room| room.names.values());
        all.filter_map(|sender| sender.borrow().clone()).collect()
    }

    fn locked(&self) -> MutexGuard<'_, Objects<K>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The labels of an object that was read as one of the API's own types.
pub fn label<'a, K: Resource>(object: &'a K, name: &str) -> Option<&'a str> {
    object.meta().labels.as_ref()?.get(name).map(String::as_str)
}

/// The annotations of such an object.
pub fn annotation<'a, K: Resource>(object: &'a K, name: &str) -> Option<&'a str> {
    object
        .meta()
        .annotations
        .as_ref()?
        .get(name)
        .map(String::as_str)
}
