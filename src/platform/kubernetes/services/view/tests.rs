#![allow(clippy::unwrap_used)]
use super::super::replica::tests::{MADE, container, pod, running};
use super::*;
use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

struct Bed {
    view: View,
    begin: Moment,
    /// Milliseconds since.
    at: u64,
}

impl Bed {
    fn new() -> Self {
        let begin = Moment {
            wall: MADE.parse().unwrap(),
            steady: Instant::now(),
        };
        let mut bed = Self {
            view: View::new(Duration::from_secs(5)),
            begin,
            at: 0,
        };
        for name in ["n1", "n2"] {
            bed.node(name, "True");
        }
        bed
    }

    fn now(&self) -> Moment {
        let passed = Duration::from_millis(self.at);
        Moment {
            wall: self.begin.wall + passed,
            steady: self.begin.steady + passed,
        }
    }

    fn node(&mut self, name: &str, ready: &str) {
        let node: Node = serde_json::from_value(json!({ "metadata": { "name": name },
            "status": { "conditions": [{ "type": "Ready", "status": ready, "message": "gone",
                "lastHeartbeatTime": MADE }] } }))
        .unwrap();
        self.view.nodes.set(&node);
    }

    fn wanted(&mut self, replicas: i32) {
        let (user, name) = ("ada".parse().unwrap(), "shop".parse().unwrap());
        let container = ContainerSpec {
            name: "main".to_owned(),
            image: "shop:1".parse().unwrap(),
            command: Vec::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
        };
        let count = u32::try_from(replicas).unwrap();
        let making = manifest::Making {
            priority: "p",
            root: false,
            ask_registry: false,
        };
        let mut body = manifest::deployment(&user, &name, count, &container, making).body;
        body["metadata"]["creationTimestamp"] = MADE.into();
        body["status"] = json!({ "updatedReplicas": replicas });
        let now = self.now();
        let deployment = serde_json::from_value(body).unwrap();
        self.view.set_wanted(&deployment, now, true);
    }

    fn pod(&mut self, name: &str, node: &str, status: Value) {
        let mut pod = pod(name, Some(node), status);
        let now = self.now();
        let id = ("services-ada".to_owned(), name.to_owned());
        let made = self
            .view
            .replicas
            .get(&id)
            .map_or(now.wall, |known| known.created);
        pod.metadata.creation_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(made));
        self.view.set_replica(&pod, now, true);
    }

    fn service(&self) -> ServiceStatus {
        self.view.snapshot(None, self.now().wall).services.remove(0)
    }

    fn happened(&self) -> Vec<Happening> {
        let key = ("ada".parse().unwrap(), "shop".parse().unwrap());
        let events = self.view.events(&key).unwrap();
        events.into_iter().map(|event| event.event).collect()
    }
}

#[test]
fn a_lost_node_is_told_and_its_containers_come_back_elsewhere() {
    let mut bed = Bed::new();
    bed.wanted(2);
    for (name, node) in [("a", "n1"), ("b", "n2")] {
        bed.pod(name, node, json!({ "phase": "Pending" }));
        bed.pod(name, node, running());
    }
    assert!(bed.view.look(bed.now()).is_empty());
    let well = bed.service();
    assert_eq!((well.current_state, well.state), (2, ServiceState::Running));
    bed.at = 9_000;
    bed.node("n2", "Unknown");
    bed.view.look(bed.now());
    let lost = bed.service();
    assert_eq!((lost.current_state, lost.state), (1, ServiceState::Failed));
    assert!(lost.reason.unwrap().contains("node n2 is lost"));
    bed.at = 10_000;
    bed.pod("c", "n1", json!({ "phase": "Pending" }));
    bed.at = 12_000;
    bed.pod("c", "n1", running());
    let key = ("ada".parse().unwrap(), "shop".parse().unwrap());
    let events = bed.view.events(&key).unwrap();
    let tail: Vec<_> = events[5..]
        .iter()
        .map(|e| (e.event, e.duration_ms.unwrap()))
        .collect();
    assert_eq!(
        tail,
        [
            (Happening::NodeLost, 9_000),
            (Happening::Rescheduled, 10_000),
            (Happening::Started, 2_000),
            (Happening::Recovered, 12_000),
        ]
    );
    // The node comes back with what was on it, which is not wanted any more: nothing is counted twice.
    bed.at = 20_000;
    let mut old = pod("b", Some("n2"), running());
    old.metadata.deletion_timestamp = old.metadata.creation_timestamp.clone();
    let now = bed.now();
    bed.view.set_replica(&old, now, true);
    bed.node("n2", "True");
    bed.view.look(bed.now());
    assert_eq!(bed.service().current_state, 2);
    assert_eq!(bed.happened().last(), Some(&Happening::NodeBack));
}

#[test]
fn what_does_not_start_is_replaced_after_a_minute_and_then_less_often() {
    let mut bed = Bed::new();
    bed.wanted(1);
    let waiting = json!({ "waiting": { "reason": "ImagePullBackOff", "message": "no" } });
    let status =
        json!({ "phase": "Pending", "containerStatuses": container(waiting, json!({}), 0) });
    bed.pod("a", "n1", status.clone());
    bed.at = 59_900;
    assert!(bed.view.look(bed.now()).is_empty());
    bed.at = 60_100;
    let replaced = bed.view.look(bed.now());
    assert_eq!(replaced.len(), 1);
    assert_eq!(
        (replaced[0].name.as_str(), replaced[0].uid.as_str()),
        ("a", "uid-a")
    );
    assert!(bed.view.look(bed.now()).is_empty(), "it is replaced once");
    let now = bed.now();
    bed.view.remove_replica("services-ada", "a", now);
    bed.pod("b", "n1", status.clone());
    bed.at += 60_100;
    assert_eq!(bed.view.look(bed.now()).len(), 1);
    let now = bed.now();
    bed.view.remove_replica("services-ada", "b", now);
    bed.pod("c", "n1", status);
    bed.at += 60_100;
    assert!(bed.view.look(bed.now()).is_empty(), "the pause doubles");
    assert_eq!(bed.service().state, ServiceState::Failed);
    bed.at += 60_000;
    assert_eq!(bed.view.look(bed.now()).len(), 1);
    let told = bed.happened();
    assert!(
        told.contains(&Happening::Failed) && told.contains(&Happening::Replaced),
        "{told:?}"
    );
}

#[test]
fn nobody_sees_another_users_services_or_any_node() {
    let mut bed = Bed::new();
    bed.wanted(1);
    bed.pod("a", "n1", running());
    let now = bed.now().wall;
    let own = bed.view.snapshot(Some(&"ada".parse().unwrap()), now);
    assert_eq!(
        (own.services.len(), own.containers.len(), own.nodes.len()),
        (1, 1, 0)
    );
    let other = bed.view.snapshot(Some(&"bob".parse().unwrap()), now);
    assert_eq!(
        (
            other.services.len(),
            other.containers.len(),
            other.nodes.len()
        ),
        (0, 0, 0)
    );
    assert_eq!(bed.view.snapshot(None, now).nodes.len(), 2);
}

#[test]
fn while_a_watch_is_broken_nothing_is_replaced_and_the_age_is_told() {
    let mut bed = Bed::new();
    bed.wanted(1);
    bed.pod("a", "n1", json!({ "phase": "Pending" }));
    let broke = bed.now();
    bed.view.watching("Pod", false, broke);
    bed.at = 61_000;
    assert!(bed.view.look(bed.now()).is_empty());
    let stale = bed.view.snapshot(None, bed.now().wall).stale_since;
    assert_eq!(stale, Some(broke.wall));
    let now = bed.now();
    bed.view.watching("Pod", true, now);
    assert_eq!(bed.view.look(now).len(), 1);
    assert_eq!(bed.view.snapshot(None, now.wall).stale_since, None);
}

#[test]
fn a_service_that_is_gone_leaves_nothing() {
    let mut bed = Bed::new();
    bed.wanted(1);
    bed.pod("a", "n1", running());
    let key: Key = ("ada".parse().unwrap(), "shop".parse().unwrap());
    bed.view.remove_wanted(&key);
    assert_eq!(bed.view.events(&key), None);
    assert!(bed.view.owners(&key.1).is_empty());
    let now = bed.now();
    bed.view.remove_replica("services-ada", "a", now);
    assert!(bed.view.services.is_empty() && bed.view.replicas.is_empty());
}
