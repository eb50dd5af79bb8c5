//! Every open connection, and how many of them one client may have.
//!
//! What a connection counts for: its client's network until a request on it carries a key, that key from then
//! on. Nothing here waits: a new connection takes a place, takes that of an idle one without a key, or is
//! told at once that there is none.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::auth::{Caller, Network, Role};

/// How many connections there may be.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Of all clients.
    pub all: usize,
    /// Without a key, from one network.
    pub per_address: usize,
    /// Of one user's key.
    pub per_key: usize,
}

/// The connections of one listening socket.
#[derive(Debug)]
pub struct Connections {
    bounds: Bounds,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<u64, Open>,
    next: u64,
    /// Idle ones without a key, the one that has been idle longest first.
    idle: BTreeMap<u64, u64>,
    networks: HashMap<Network, Networked>,
    keys: HashMap<String, usize>,
}

/// What one network has without a key.
#[derive(Debug, Default)]
struct Networked {
    count: usize,
    idle: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Open {
    holder: Holder,
    network: Network,
    /// Requests under way: at most one, and its place in `idle` is empty then.
    busy: usize,
    /// Since when it is idle, as a number that grows.
    idle: Option<u64>,
    close: CancellationToken,
}

/// Whose a connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Holder {
    /// Nobody's that is known.
    Network,
    /// Of this user's key.
    Key(String),
    /// Of somebody who is trusted with as many as there are: an admin, or another replica.
    Trusted,
}

/// The key has as many connections as it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full(pub usize);

/// The place of one open connection, until it is dropped.
#[derive(Debug)]
pub struct Place {
    connections: Arc<Connections>,
    id: u64,
    close: CancellationToken,
}

/// A request under way on a connection, until it is dropped.
#[derive(Debug)]
pub struct Busy {
    place: Arc<Place>,
}

impl Connections {
    /// None yet.
    pub fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            state: Mutex::default(),
        })
    }

    /// A place for a new connection, another's if need be; `None`: there is none.
    pub fn open(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let network = Network::from(address);
        let mut state = self.locked();
        let of_network = state.networks.get(&network);
        if of_network.is_some_and(|known| known.count >= self.bounds.per_address) {
            let longest = of_network.and_then(|known| first(&known.idle))?;
            state.evict(longest);
        }
        if state.open.len() >= self.bounds.all {
            let longest = first(&state.idle)?;
            state.evict(longest);
        }
        let (id, close) = (state.number(), CancellationToken::new());
        let open = Open {
            holder: Holder::Network,
            network,
            busy: 0,
            idle: None,
            close: close.clone(),
        };
        state.open.insert(id, open);
        state.networks.entry(network).or_default().count += 1;
        state.rest(id);
        Some(Place {
            connections: Arc::clone(self),
            id,
            close,
        })
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn first(idle: &BTreeMap<u64, u64>) -> Option<u64> {
    idle.first_key_value().map(|(_, id)| *id)
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn evict(&mut self, id: u64) {
        if let Some(open) = self.remove(id) {
            open.close.cancel();
        }
    }

    fn remove(&mut self, id: u64) -> Option<Open> {
        self.work(id);
        let open = self.open.remove(&id)?;
        self.leave(&open.holder, open.network);
        Some(open)
    }

    /// One connection fewer of this holder's.
    fn leave(&mut self, holder: &Holder, network: Network) {
        match holder {
            Holder::Network => {
                if let Some(known) = self.networks.get_mut(&network) {
                    known.count -= 1;
                    if known.count == 0 {
                        self.networks.remove(&network);
                    }
                }
            }
            Holder::Key(key) => give_back(&mut self.keys, key.as_str()),
            Holder::Trusted => {}
        }
    }

    /// Nothing is under way on it.
    fn rest(&mut self, id: u64) {
        let since = self.number();
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        if open.holder == Holder::Network && open.busy == 0 && open.idle.is_none() {
            open.idle = Some(since);
            self.idle.insert(since, id);
            let known = self.networks.entry(open.network).or_default();
            known.idle.insert(since, id);
        }
    }

    /// Something is under way on it.
    fn work(&mut self, id: u64) {
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        if let Some(since) = open.idle.take() {
            self.idle.remove(&since);
            if let Some(known) = self.networks.get_mut(&open.network) {
                known.idle.remove(&since);
            }
        }
    }

    /// From now on it is this holder's.
    fn belong(&mut self, id: u64, holder: Holder, most: usize) -> Result<(), Full> {
        let Some(open) = self.open.get(&id).filter(|open| open.holder != holder) else {
            return Ok(());
        };
        if let Holder::Key(key) = &holder {
            let count = self.keys.get(key).copied().unwrap_or_default();
            if count >= most {
                return Err(Full(most));
            }
        }
        let (before, network) = (open.holder.clone(), open.network);
        self.work(id);
        self.leave(&before, network);
        if let Holder::Key(key) = &holder {
            *self.keys.entry(key.clone()).or_default() += 1;
        }
        if let Some(open) = self.open.get_mut(&id) {
            open.holder = holder;
        }
        Ok(())
    }
}

impl Place {
    /// A request has come in on it.
    pub fn busy(self: &Arc<Self>) -> Busy {
        let mut state = self.connections.locked();
        state.work(self.id);
        if let Some(open) = state.open.get_mut(&self.id) {
            open.busy += 1;
        }
        Busy {
            place: Arc::clone(self),
        }
    }

    /// The caller of a request on it: the connection is its key's now.
    pub fn belongs_to(&self, caller: &Caller) -> Result<(), Full> {
        let holder = match &caller.role {
            Role::Admin => Holder::Trusted,
            Role::User(_) => Holder::Key(caller.key_id.clone()),
        };
        let most = self.connections.bounds.per_key;
        self.connections.locked().belong(self.id, holder, most)
    }

    /// It is another replica's.
    pub fn belongs_to_replica(&self) {
        let mut state = self.connections.locked();
        // Never full: nothing is counted for it.
        let _ = state.belong(self.id, Holder::Trusted, usize::MAX);
    }

    /// Resolves when a newer connection needs the place.
    pub async fn evicted(&self) {
        self.close.cancelled().await;
    }
}

impl Busy {
    /// The connection's place.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.locked().remove(self.id);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.place.connections.locked();
        if let Some(open) = state.open.get_mut(&self.place.id) {
            open.busy -= 1;
        }
        state.rest(self.place.id);
    }
}

/// How many of each are in use, at most so many of one.
#[derive(Debug)]
pub struct Shares<K: Hash + Eq> {
    most: usize,
    used: Arc<Mutex<HashMap<K, usize>>>,
}

/// One of a key's share, until it is dropped.
#[derive(Debug)]
pub struct Taken<K: Hash + Eq> {
    key: K,
    used: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Hash + Eq + Clone> Shares<K> {
    /// None in use; at most so many of each.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            used: Arc::default(),
        }
    }

    /// The most of one.
    pub fn most(&self) -> usize {
        self.most
    }

    /// One of this key's; `None`: all of them are in use.
    pub fn take(&self, key: &K) -> Option<Taken<K>> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let count = used.get(key).copied().unwrap_or_default();
        if count >= self.most {
            return None;
        }
        used.insert(key.clone(), count + 1);
        Some(Taken {
            key: key.clone(),
            used: Arc::clone(&self.used),
        })
    }
}

impl<K: Hash + Eq> Drop for Taken<K> {
    fn drop(&mut self) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        give_back(&mut used, &self.key);
    }
}

fn give_back<K, Q>(counts: &mut HashMap<K, usize>, key: &Q)
where
    K: Hash + Eq + Borrow<Q>,
    Q: Hash + Eq + ?Sized,
{
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn connections(all: usize, per_address: usize) -> Arc<Connections> {
        Connections::new(Bounds {
            all,
            per_address,
            per_key: 2,
        })
    }

    fn open(connections: &Arc<Connections>, last: u8) -> Option<Arc<Place>> {
        let place = connections.open(IpAddr::from([10, 0, 0, last]));
        place.map(Arc::new)
    }

    fn user() -> Caller {
        Caller {
            role: Role::User("ann".parse().unwrap()),
            key_id: "k".to_owned(),
        }
    }

    #[test]
    fn an_idle_connection_without_a_key_makes_room_for_a_new_one() {
        let all = connections(3, 3);
        let first = open(&all, 1).unwrap();
        let second = open(&all, 2).unwrap();
        let keyed = open(&all, 3).unwrap();
        keyed.belongs_to(&user()).unwrap();
        // The first has just been used: the second has been idle longer.
        drop(first.busy());
        let _new = open(&all, 4).unwrap();
        assert!(second.close.is_cancelled());
        assert!(!first.close.is_cancelled() && !keyed.close.is_cancelled());
    }

    #[test]
    fn there_is_no_room_where_nothing_is_idle() {
        let all = connections(2, 2);
        let (one, two) = (open(&all, 1).unwrap(), open(&all, 2).unwrap());
        let busy = (one.busy(), two.busy());
        assert!(open(&all, 3).is_none());
        drop(busy);
        assert!(open(&all, 3).is_some());
    }

    #[test]
    fn one_address_fills_its_own_share_only() {
        let all = connections(100, 2);
        let other = open(&all, 2).unwrap();
        let own: Vec<Arc<Place>> = (0..10).map(|_| open(&all, 1).unwrap()).collect();
        assert!(own[7].close.is_cancelled() && !own[8].close.is_cancelled());
        assert!(!other.close.is_cancelled());
        let _busy: Vec<Busy> = own[8..].iter().map(Place::busy).collect();
        assert!(open(&all, 1).is_none());
        assert!(open(&all, 2).is_some());
    }

    #[test]
    fn a_key_has_its_own_share_and_an_admin_any() {
        let all = connections(100, 100);
        let places: Vec<Arc<Place>> = (0..4).map(|_| open(&all, 1).unwrap()).collect();
        places[0].belongs_to(&user()).unwrap();
        places[0].belongs_to(&user()).unwrap();
        places[1].belongs_to(&user()).unwrap();
        assert_eq!(places[2].belongs_to(&user()), Err(Full(2)));
        let admin = Caller {
            role: Role::Admin,
            key_id: "a".to_owned(),
        };
        for place in &places {
            place.belongs_to(&admin).unwrap();
        }
        assert!(places[2].belongs_to(&user()).is_ok());
    }

    #[test]
    fn what_has_ended_is_not_counted() {
        let all = connections(100, 100);
        for _ in 0..1_000 {
            let place = open(&all, 1).unwrap();
            place.belongs_to(&user()).unwrap();
            drop(place.busy());
        }
        let place = open(&all, 1).unwrap();
        drop(place.busy());
        drop(place);
        let state = all.locked();
        assert!(state.open.is_empty() && state.idle.is_empty());
        assert!(state.networks.is_empty() && state.keys.is_empty());
    }

    #[test]
    fn a_share_is_given_back() {
        let shares = Shares::new(2);
        let (one, two) = (shares.take(&"a").unwrap(), shares.take(&"a").unwrap());
        assert!(shares.take(&"a").is_none() && shares.take(&"b").is_some());
        drop((one, two));
        assert!(shares.take(&"a").is_some());
        assert!(shares.used.lock().unwrap().is_empty());
    }
}
