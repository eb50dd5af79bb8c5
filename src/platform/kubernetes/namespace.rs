//! A user's namespace: made on first use, bounded, closed, and put right when somebody edits it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::try_join_all;
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use kube::core::DynamicObject;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, Changed, WATCH_LAG, Watched};
use super::cluster::{Cluster, Failure, Kind, Manifest};
use super::labels::{
    APP, DATABASE, MANAGED, MODULE, PACKAGES, REPL, SERVICES_OF, USED, USER, of_user,
};
use crate::model::{Network, UserId};

/// The service account of test pods; it may do nothing and has no token.
pub const TEST_ACCOUNT: &str = "gantry-test";

/// The service account of released pods; an operator may bind it to the bucket.
pub const PROGRAM_ACCOUNT: &str = "gantry-program";

/// The gRPC port of a module.
pub const MODULE_PORT: u16 = 50_051;

/// How exactly it is known when a namespace was last used.
const NOTE_USE: SignedDuration = SignedDuration::from_hours(1);

/// The kinds that make up a namespace, in the order they are applied after the namespace itself.
const PARTS: [Kind; 4] = [
    Kind::ResourceQuota,
    Kind::LimitRange,
    Kind::NetworkPolicy,
    Kind::ServiceAccount,
];

/// Addresses that no program may reach: the metadata services of clouds hand out credentials, the private
/// ranges hold nodes, the API server and other users' pods, and what is reserved may be used like a private
/// range. Of IPv6 no program may reach anything: pods and nodes often have public addresses there, so leaving
/// out the private ones would not do.
pub const CLOSED_RANGES: [&str; 12] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    // Azure's services for virtual machines have this public address.
    "168.63.129.16/32",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

/// Where programs may go on the internet: everywhere but for the ranges that are closed to all of them and to
/// those of this installation.
pub fn internet(closed: &[Network]) -> Value {
    let own = closed.iter().filter(|network| network.is_ipv4());
    let except: Vec<String> = CLOSED_RANGES
        .map(str::to_owned)
        .into_iter()
        .chain(own.map(Network::to_string))
        .collect();
    json!({ "ipBlock": { "cidr": "0.0.0.0/0", "except": except } })
}

/// Names. The servers may be pods, or programs on a node, as with NodeLocal DNSCache: nothing tells a policy
/// which, so this names nobody, and pods that may ask for names reach port 53 of any machine.
pub fn names() -> Value {
    json!({ "ports": [{ "protocol": "UDP", "port": 53 }, { "protocol": "TCP", "port": 53 }] })
}

/// What depends on the installation.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// Where the code store is, for the policies: released pods fetch their files from there.
    pub store: Vec<(IpAddr, u16)>,
    /// Where modules' packages come from; `None`: from the internet.
    pub index: Option<Vec<(IpAddr, u16)>>,
    /// What a namespace may have, where it is another than the usual.
    pub quota: BTreeMap<String, String>,
    /// Where callers of programs and modules come from that are no pods.
    pub callers: Vec<Network>,
    /// What is closed to programs besides what is closed everywhere.
    pub closed: Vec<Network>,
}

/// Everything a user's namespace consists of.
pub fn manifests(user: &UserId, surroundings: &Surroundings) -> Vec<Manifest> {
    let mut all = vec![
        namespace(user),
        quota(user, &surroundings.quota),
        limit_range(user),
    ];
    all.extend(policies(user, surroundings));
    all.extend([TEST_ACCOUNT, PROGRAM_ACCOUNT].map(|name| service_account(user, name)));
    all
}

fn namespace(user: &UserId) -> Manifest {
    let mut labels = of_user(user);
    // Not `restricted`, because of the test pod alone: its runner has to be root with the few
    // capabilities named in test_pod.rs to run programs under other user ids than its own.
    labels["pod-security.kubernetes.io/enforce"] = "baseline".into();
    labels["pod-security.kubernetes.io/warn"] = "restricted".into();
    labels["pod-security.kubernetes.io/audit"] = "restricted".into();
    Manifest::new(
        Kind::Namespace,
        json!({ "metadata": { "name": user.namespace(), "labels": labels } }),
    )
}

fn part(kind: Kind, user: &UserId, name: &str, mut body: Value) -> Manifest {
    body["metadata"] =
        json!({ "name": name, "namespace": user.namespace(), "labels": of_user(user) });
    Manifest::new(kind, body)
}

/// One user's share: a test pod, some repls with a second pod each while a release takes over, and
/// their databases.
fn quota(user: &UserId, other: &BTreeMap<String, String>) -> Manifest {
    let mut hard = json!({
        "pods": "30",
        "requests.cpu": "8",
        "requests.memory": "8Gi",
        "limits.cpu": "40",
        "limits.memory": "24Gi",
        "persistentvolumeclaims": "10",
        "requests.storage": "50Gi",
        "services": "30",
        "services.loadbalancers": "0",
        "services.nodeports": "0",
        "secrets": "100",
    });
    for (name, value) in other {
        hard[name] = value.as_str().into();
    }
    part(
        Kind::ResourceQuota,
        user,
        "gantry",
        json!({ "spec": { "hard": hard } }),
    )
}

/// With a quota on limits every container needs some; this is what one gets that names none. What it writes
/// to its node's disk is bounded, and room for it is not set aside: the largest of Gantry's own pods, a
/// module's with packages, has volumes of some 4 GiB.
fn limit_range(user: &UserId) -> Manifest {
    let limits = json!([{
        "type": "Container",
        "default": { "cpu": "1", "memory": "256Mi", "ephemeral-storage": "5Gi" },
        "defaultRequest": { "cpu": "50m", "memory": "64Mi", "ephemeral-storage": "0" },
        "max": { "cpu": "4", "memory": "8Gi" },
    }]);
    part(
        Kind::LimitRange,
        user,
        "gantry",
        json!({ "spec": { "limits": limits } }),
    )
}

/// Nobody speaks to anybody, but for: callers to programs, programs to the internet, to their own
/// database, to their user's modules, to names, and to the code store. Test pods get nothing at all.
fn policies(user: &UserId, surroundings: &Surroundings) -> Vec<Manifest> {
    // By the repl: what a template of one's own calls its pods is its own affair.
    let prod = json!({ "matchExpressions": [
        { "key": REPL, "operator": "Exists" },
        { "key": APP, "operator": "NotIn", "values": [DATABASE] },
    ] });
    let database = json!({ "matchLabels": { APP: DATABASE } });
    let module = json!({ "matchExpressions": [{ "key": MODULE, "operator": "Exists" }] });
    let with_packages = json!({ "matchExpressions": [
        { "key": MODULE, "operator": "Exists" },
        { "key": PACKAGES, "operator": "Exists" },
    ] });
    let policy =
        |name: &str, spec: Value| part(Kind::NetworkPolicy, user, name, json!({ "spec": spec }));
    let port = |protocol: &str, port: u16| json!({ "protocol": protocol, "port": port });
    let internet = internet(&surroundings.closed);
    let block = |network: Network| json!({ "ipBlock": { "cidr": network.to_string() } });
    let there = |(address, number): &(IpAddr, u16)| {
        let address = block(Network::from(*address));
        json!({ "to": [address], "ports": [port("TCP", *number)] })
    };
    let mut to_index = vec![names()];
    match &surroundings.index {
        Some(index) => to_index.extend(index.iter().map(there)),
        None => to_index.push(json!({ "to": [internet.clone()], "ports": [port("TCP", 443)] })),
    }
    let mut out = vec![
        names(),
        json!({ "to": [{ "podSelector": database }], "ports": [port("TCP", 5_432)] }),
        json!({ "to": [{ "podSelector": module }], "ports": [port("TCP", MODULE_PORT)] }),
        json!({ "to": [internet] }),
    ];
    out.extend(surroundings.store.iter().map(there));
    // Callers come through an ingress controller, which is in no user's namespace, or no pod at all.
    let strangers = json!({ "matchExpressions": [
        { "key": USER, "operator": "DoesNotExist" },
        { "key": SERVICES_OF, "operator": "DoesNotExist" },
    ] });
    let mut strangers = vec![json!({ "namespaceSelector": strangers })];
    strangers.extend(surroundings.callers.iter().map(|network| block(*network)));
    let callers = json!({
        "from": strangers.clone(),
        "ports": [port("TCP", 3_000), port("TCP", 3_001), port("TCP", 3_002)],
    });
    strangers.push(json!({ "podSelector": {} }));
    let own_programs = json!({
        "from": [{ "podSelector": prod }],
        "ports": [port("TCP", 5_432)],
    });
    vec![
        policy(
            "gantry-deny-all",
            json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"] }),
        ),
        policy(
            "gantry-programs",
            json!({
                "podSelector": prod,
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [callers],
                "egress": out,
            }),
        ),
        policy(
            "gantry-databases",
            json!({
                "podSelector": database,
                "policyTypes": ["Ingress"],
                "ingress": [own_programs],
            }),
        ),
        // The server, an ingress controller and the user's own pods reach modules; modules reach nobody,
        // but for those that have packages to install: a policy is a pod's, not a container's.
        policy(
            "gantry-modules",
            json!({
                "podSelector": module,
                "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": strangers,
                    "ports": [port("TCP", MODULE_PORT)],
                }],
            }),
        ),
        policy(
            "gantry-module-packages",
            json!({
                "podSelector": with_packages,
                "policyTypes": ["Egress"],
                "egress": to_index,
            }),
        ),
    ]
}

fn service_account(user: &UserId, name: &str) -> Manifest {
    part(
        Kind::ServiceAccount,
        user,
        name,
        json!({ "automountServiceAccountToken": false }),
    )
}

/// Whether the object is what the manifest says: everything the manifest names is there as it says;
/// what it does not name is somebody else's.
pub fn agrees(wanted: &Value, actual: &Value) -> bool {
    match (wanted, actual) {
        (Value::Object(wanted), Value::Object(actual)) => wanted.iter().all(|(name, wanted)| {
            match actual.get(name) {
                Some(actual) => agrees(wanted, actual),
                // The API server leaves out what is empty.
                None => wanted.as_object().is_some_and(|map| map.is_empty()),
            }
        }),
        (Value::Array(wanted), Value::Array(actual)) => {
            wanted.len() == actual.len()
                && wanted
                    .iter()
                    .zip(actual)
                    .all(|(wanted, actual)| agrees(wanted, actual))
        }
        (wanted, actual) => wanted == actual,
    }
}

/// Keeps users' namespaces as they should be.
#[derive(Debug, Clone)]
pub struct Namespaces {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cluster: Cluster,
    surroundings: Surroundings,
    namespaces: Cache<DynamicObject>,
    parts: HashMap<Kind, Cache<DynamicObject>>,
    /// One repair of a namespace at a time.
    repairing: Mutex<HashMap<UserId, Arc<tokio::sync::Mutex<()>>>>,
    /// Whose use is being noted.
    noting: Mutex<HashSet<UserId>>,
}

impl Namespaces {
    /// Watches every user's namespace and repairs what is edited until stopped.
    pub fn start(cluster: &Cluster, surroundings: Surroundings, stop: &CancellationToken) -> Self {
        let (tell, changes) = mpsc::unbounded_channel();
        let watched = |kind, labels| Watched {
            kind,
            namespace: None,
            labels,
        };
        let cache = |kind| {
            let watched = watched(kind, MANAGED);
            Cache::watch(cluster, watched, Some(tell.clone()), stop.clone())
        };
        let this = Self {
            inner: Arc::new(Inner {
                cluster: cluster.clone(),
                surroundings,
                namespaces: cache(Kind::Namespace),
                parts: PARTS.into_iter().map(|kind| (kind, cache(kind))).collect(),
                repairing: Mutex::default(),
                noting: Mutex::default(),
            }),
        };
        tokio::spawn(this.clone().repair(changes, stop.clone()));
        this
    }

    /// Resolves when everything there is has been seen.
    pub async fn synced(&self) -> Result<(), Failure> {
        self.inner.namespaces.synced(Kind::Namespace).await?;
        for (kind, cache) in &self.inner.parts {
            cache.synced(*kind).await?;
        }
        Ok(())
    }

    /// Makes the user's namespace be as it should; asks nobody when it is.
    pub async fn ensure(&self, user: &UserId) -> Result<(), Failure> {
        self.put_right(user, |_| true).await
    }

    /// Makes it as far as a pod needs it: closed, and with accounts. The bounds may come after the
    /// first pod: a new quota takes the cluster a while to count, in which it lets nothing in.
    pub async fn ensure_closed(&self, user: &UserId) -> Result<(), Failure> {
        let bounds = [Kind::ResourceQuota, Kind::LimitRange];
        self.put_right(user, |kind| !bounds.contains(&kind)).await
    }

    /// Makes everything of these kinds be as it should.
    async fn put_right(&self, user: &UserId, of: impl Fn(Kind) -> bool) -> Result<(), Failure> {
        let wrong = || {
            let mut wrong = self.wrong(user);
            wrong.retain(|manifest| of(manifest.kind));
            wrong
        };
        if wrong().is_empty() {
            return Ok(());
        }
        let repairing = {
            let mut repairing = self
                .inner
                .repairing
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            Arc::clone(repairing.entry(user.clone()).or_default())
        };
        let _one = repairing.lock().await;
        let wrong = wrong();
        let (namespace, parts): (Vec<_>, Vec<_>) =
            wrong.into_iter().partition(|m| m.kind == Kind::Namespace);
        for manifest in &namespace {
            self.inner.cluster.apply(manifest).await?;
        }
        try_join_all(parts.iter().map(|part| self.inner.cluster.apply(part))).await?;
        // The watches tell of it in a moment; until then the next submission would apply it again.
        let seen = try_join_all(namespace.iter().chain(&parts).map(|m| self.seen(m)));
        if timeout(WATCH_LAG, seen).await.is_err() {
            tracing::warn!(%user, "the watches do not show what was just applied");
        }
        Ok(())
    }

    /// Resolves when the watch shows the object as it should be.
    async fn seen(&self, manifest: &Manifest) -> Result<(), watch::error::RecvError> {
        let cache = match manifest.kind {
            Kind::Namespace => Some(&self.inner.namespaces),
            kind => self.inner.parts.get(&kind),
        };
        let Some(cache) = cache else {
            return Ok(());
        };
        let mut now = cache.follow(manifest.namespace().unwrap_or_default(), manifest.name());
        let as_wanted = |now: &Option<Arc<DynamicObject>>| {
            now.as_ref()
                .is_some_and(|actual| is_as_wanted(manifest, actual))
        };
        now.wait_for(as_wanted).await.map(drop)
    }

    /// Notes that the user's namespace is in use, at most once an hour: a warm submission asks the API
    /// server nothing.
    pub fn used(&self, user: &UserId) {
        let name = user.namespace();
        let Some(namespace) = self.inner.namespaces.get("", &name) else {
            // It is made by this use.
            return;
        };
        let noted = namespace.annotations().get(USED);
        let noted = noted.and_then(|text| text.parse().ok());
        let made = namespace.metadata.creation_timestamp.as_ref();
        let Some(known) = noted.or(made.map(|made| made.0)) else {
            return;
        };
        let now = Timestamp::now();
        if now.duration_since(known) < NOTE_USE || !self.noting().insert(user.clone()) {
            return;
        }
        let (this, user) = (self.clone(), user.clone());
        tokio::spawn(async move {
            let now = now.to_string();
            let namespace = (Kind::Namespace, None, name.as_str());
            let noted = this.inner.cluster.annotate(namespace, USED, &now).await;
            if let Err(failure) = noted {
                tracing::warn!(%user, %failure, "that a namespace is in use was not noted");
            }
            // The watch shows it in a moment; a second note until then does no harm.
            this.noting().remove(&user);
        });
    }

    fn noting(&self) -> std::sync::MutexGuard<'_, HashSet<UserId>> {
        self.inner
            .noting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any account of services brings credentials for registries along: somebody else than this
    /// server names them there.
    pub fn pulls_with_secrets(&self) -> bool {
        let accounts = self.inner.parts.get(&Kind::ServiceAccount);
        let mut accounts = accounts.into_iter().flat_map(Cache::all);
        accounts.any(|account| {
            let secrets = account.data["imagePullSecrets"].as_array();
            secrets.is_some_and(|secrets| !secrets.is_empty())
                && account.labels().contains_key(SERVICES_OF)
        })
    }

    /// What is not there or not as it should be.
    fn wrong(&self, user: &UserId) -> Vec<Manifest> {
        let name = user.namespace();
        let mut manifests = manifests(user, &self.inner.surroundings);
        manifests.retain(|manifest| {
            let actual = match manifest.kind {
                Kind::Namespace => self.inner.namespaces.get("", &name),
                kind => self
                    .inner
                    .parts
                    .get(&kind)
                    .and_then(|cache| cache.get(&name, manifest.name())),
            };
            !actual.is_some_and(|actual| is_as_wanted(manifest, &actual))
        });
        manifests
    }

    /// Puts right what somebody changed.
    async fn repair(self, mut changes: mpsc::UnboundedReceiver<Changed>, stop: CancellationToken) {
        // Until everything was seen once, much seems to be missing.
        while self.synced().await.is_err() {
            if stop.is_cancelled() {
                return;
            }
        }
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = stop.cancelled() => return,
            };
            let Some((namespace, name)) = change else {
                return;
            };
            let namespace = if namespace.is_empty() {
                name
            } else {
                namespace
            };
            let Some(user) = self.user_of(&namespace) else {
                continue;
            };
            let wrong: Vec<String> = self
                .wrong(&user)
                .iter()
                .map(|m| format!("{:?} {}", m.kind, m.name()))
                .collect();
            // A namespace that is being made passes here too; then there is nothing to tell.
            if wrong.is_empty() || self.is_being_made(&user) {
                continue;
            }
            match self.ensure(&user).await {
                Ok(()) => {
                    tracing::warn!(%namespace, ?wrong, "somebody changed a namespace; it was put right")
                }
                Err(error) => {
                    tracing::warn!(%namespace, %error, "a namespace could not be put right; the next submission tries again")
                }
            }
        }
    }

    /// The user of a namespace that lives and that this installation made. One that is being deleted is
    /// let go.
    fn user_of(&self, namespace: &str) -> Option<UserId> {
        let object = self.inner.namespaces.get("", namespace)?;
        if object.metadata.deletion_timestamp.is_some() || !self.inner.cluster.made(&object) {
            return None;
        }
        object.metadata.labels.as_ref()?.get(USER)?.parse().ok()
    }

    /// The names of users' namespaces that live and that this installation made.
    pub fn of_users(&self) -> Vec<String> {
        let all = self.inner.namespaces.all().into_iter();
        let names = all.map(|namespace| namespace.name_any());
        names.filter(|name| self.user_of(name).is_some()).collect()
    }

    fn is_being_made(&self, user: &UserId) -> bool {
        let repairing = self
            .inner
            .repairing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        repairing
            .get(user)
            .is_some_and(|one| one.try_lock().is_err())
    }
}

fn is_as_wanted(manifest: &Manifest, actual: &DynamicObject) -> bool {
    if actual.metadata.deletion_timestamp.is_some() {
        return false;
    }
    let Ok(mut actual) = serde_json::to_value(actual) else {
        return false;
    };
    // Lists leave out what each of their objects is.
    for field in ["apiVersion", "kind"] {
        actual[field] = manifest.body[field].clone();
    }
    agrees(&manifest.body, &actual)
}

/// Selects what a stop of the repl removes.
pub fn of_stopped(repl: &crate::model::ReplId) -> String {
    format!("{MANAGED},{REPL}={repl},!{}", super::labels::KEEP)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use k8s_openapi::api::core::v1 as core;
    use k8s_openapi::api::networking::v1::NetworkPolicy;

    fn all() -> Vec<Manifest> {
        let surroundings = Surroundings {
            store: vec![("10.1.2.3".parse().unwrap(), 7_070)],
            index: Some(vec![("10.1.2.4".parse().unwrap(), 3_141)]),
            quota: BTreeMap::from([("pods".to_owned(), "7".to_owned())]),
            callers: vec!["10.0.0.0/24".parse().unwrap()],
            closed: vec!["203.0.113.0/24".parse().unwrap()],
        };
        manifests(&"test".parse().unwrap(), &surroundings)
    }

    #[test]
    fn a_namespace_has_everything_it_needs() {
        let names: Vec<String> = all()
            .iter()
            .map(|m| format!("{:?}/{}", m.kind, m.name()))
            .collect();
        insta::assert_json_snapshot!(names, @r#"
        [
          "Namespace/user-test",
          "ResourceQuota/gantry",
          "LimitRange/gantry",
          "NetworkPolicy/gantry-deny-all",
          "NetworkPolicy/gantry-programs",
          "NetworkPolicy/gantry-databases",
          "NetworkPolicy/gantry-modules",
          "NetworkPolicy/gantry-module-packages",
          "ServiceAccount/gantry-test",
          "ServiceAccount/gantry-program"
        ]
        "#);
        let hard = &all()[1].body["spec"]["hard"];
        assert_eq!(
            (&hard["pods"], &hard["services"]),
            (&json!("7"), &json!("30"))
        );
        for manifest in all() {
            let body = manifest.body.clone();
            match manifest.kind {
                Kind::NetworkPolicy => drop(serde_json::from_value::<NetworkPolicy>(body).unwrap()),
                Kind::ResourceQuota => {
                    drop(serde_json::from_value::<core::ResourceQuota>(body).unwrap());
                }
                Kind::LimitRange => drop(serde_json::from_value::<core::LimitRange>(body).unwrap()),
                _ => {}
            }
        }
    }

    #[test]
    fn test_pods_are_allowed_nothing() {
        let policies: Vec<Manifest> = all()
            .into_iter()
            .filter(|m| m.kind == Kind::NetworkPolicy)
            .collect();
        let closed = &policies[0].body["spec"];
        assert_eq!(closed["podSelector"], json!({}));
        assert!(closed.get("ingress").is_none() && closed.get("egress").is_none());
        for open in &policies[1..] {
            let selector = &open.body["spec"]["podSelector"];
            let database = selector["matchLabels"][APP] == DATABASE;
            let of = |key: &str| {
                selector["matchExpressions"][0] == json!({ "key": key, "operator": "Exists" })
            };
            // Test pods are of no repl and of no module.
            assert!(database || of(REPL) || of(MODULE), "{selector}");
        }
    }

    #[test]
    fn modules_reach_the_index_when_they_have_packages_and_else_nobody() {
        let egress = |index: Option<Vec<(IpAddr, u16)>>| {
            let surroundings = Surroundings {
                index,
                ..Surroundings::default()
            };
            let all = policies(&"test".parse().unwrap(), &surroundings);
            let of_modules: Vec<&Value> = all
                .iter()
                .map(|policy| &policy.body["spec"])
                .filter(|spec| {
                    let keys = spec["podSelector"]["matchExpressions"].to_string();
                    spec.get("egress").is_some() && keys.contains(MODULE)
                })
                .collect();
            assert_eq!(of_modules.len(), 1, "{of_modules:?}");
            let keys = of_modules[0]["podSelector"]["matchExpressions"].to_string();
            assert!(keys.contains(PACKAGES), "{keys}");
            of_modules[0]["egress"].clone()
        };
        let own = egress(Some(vec![("10.1.2.4".parse().unwrap(), 3_141)]));
        assert_eq!(own.as_array().unwrap().len(), 2);
        assert_eq!(own[1]["to"][0]["ipBlock"]["cidr"], "10.1.2.4/32");
        let internet = egress(None);
        assert_eq!(
            internet[1]["to"][0]["ipBlock"]["except"],
            json!(CLOSED_RANGES)
        );
    }

    /// Ports of this address that these egress rules name, and whether one of them names none, which means all.
    fn ports(egress: &Value, address: &str) -> (Vec<u64>, bool) {
        let address: IpAddr = address.parse().unwrap();
        let inside = |network: &Value| {
            let network: Network = network.as_str().unwrap().parse().unwrap();
            network.contains(address)
        };
        let mut named = Vec::new();
        let mut all = false;
        for rule in egress.as_array().unwrap() {
            let reached = rule.get("to").is_none_or(|to| {
                to.as_array().unwrap().iter().any(|peer| {
                    let Some(block) = peer.get("ipBlock") else {
                        return false;
                    };
                    let except = block["except"].as_array();
                    inside(&block["cidr"]) && !except.into_iter().flatten().any(inside)
                })
            });
            match rule.get("ports").and_then(Value::as_array) {
                _ if !reached => {}
                Some(ports) => named.extend(ports.iter().filter_map(|port| port["port"].as_u64())),
                None => all = true,
            }
        }
        named.sort_unstable();
        named.dedup();
        (named, all)
    }

    #[test]
    fn no_policy_leads_to_the_cloud_the_nodes_or_a_private_network() {
        let closed = vec!["203.0.113.0/24".parse().unwrap()];
        let surroundings = Surroundings {
            closed: closed.clone(),
            ..Surroundings::default()
        };
        let user = "test".parse().unwrap();
        let mut all = policies(&user, &surroundings);
        let services = super::super::services::namespace_parts(&user, &closed);
        all.extend(
            services
                .into_iter()
                .filter(|m| m.kind == Kind::NetworkPolicy),
        );
        let egress = all
            .iter()
            .filter_map(|policy| policy.body["spec"].get("egress"));
        let egress: Vec<&Value> = egress.collect();
        assert_eq!(egress.len(), 3, "programs, modules' installers, services");
        let unreachable = [
            // Metadata and other services of clouds.
            "169.254.169.254",
            "169.254.170.2",
            "168.63.129.16",
            "192.0.0.192",
            "100.100.100.200",
            // Nodes, pods, the API server; reserved addresses.
            "10.0.0.1",
            "10.255.255.255",
            "172.16.0.1",
            "172.31.255.254",
            "192.168.1.1",
            "100.64.0.1",
            "198.18.0.1",
            "198.19.255.254",
            "240.0.0.1",
            "255.255.255.255",
            "224.0.0.1",
            "0.0.0.0",
            "127.0.0.1",
            // What the operator closed.
            "203.0.113.7",
            // IPv6: local, private, metadata, what stands for IPv4 addresses, and everything else.
            "::1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b:1::a00:1",
            "2002:a00:1::1",
            "2001:db8::1",
        ];
        for egress in egress {
            for address in unreachable {
                assert_eq!(
                    ports(egress, address),
                    (vec![53], false),
                    "{address}: {egress}"
                );
            }
            let (named, all) = ports(egress, "198.51.100.7");
            assert!(
                all || named.contains(&443),
                "the internet can be reached: {egress}"
            );
        }
    }

    #[test]
    fn callers_are_the_ingress_controller_and_never_another_users_pods() {
        let all = all();
        let named = |name: &str| {
            let found = all.iter().find(|m| m.name() == name).unwrap();
            found.body["spec"]["ingress"][0]["from"].clone()
        };
        for name in ["gantry-programs", "gantry-modules"] {
            let from = named(name);
            let strangers = from[0]["namespaceSelector"]["matchExpressions"].to_string();
            assert!(
                strangers.contains(USER) && strangers.contains(SERVICES_OF),
                "{strangers}"
            );
            assert_eq!(from[1]["ipBlock"]["cidr"], "10.0.0.0/24");
        }
        let databases = named("gantry-databases");
        assert_eq!(
            databases.as_array().unwrap().len(),
            1,
            "the repl's program alone: {databases}"
        );
    }

    #[test]
    fn what_a_list_shows_is_as_wanted() {
        for manifest in all() {
            let mut listed = manifest.body.clone();
            listed.as_object_mut().unwrap().remove("kind");
            listed.as_object_mut().unwrap().remove("apiVersion");
            let mut listed: DynamicObject = serde_json::from_value(listed).unwrap();
            assert!(is_as_wanted(&manifest, &listed), "{manifest:?}");
            listed.metadata.labels = None;
            assert!(!is_as_wanted(&manifest, &listed), "{manifest:?}");
        }
    }

    #[test]
    fn an_edit_is_seen_and_additions_are_not_an_edit() {
        let wanted = json!({ "spec": { "hard": { "pods": "30" }, "podSelector": {} } });
        let mut actual = json!({ "spec": { "hard": { "pods": "30", "more": "1" } }, "status": {} });
        assert!(agrees(&wanted, &actual));
        actual["spec"]["hard"]["pods"] = "31".into();
        assert!(!agrees(&wanted, &actual));
        assert!(!agrees(&json!([1]), &json!([1, 2])));
    }
}
