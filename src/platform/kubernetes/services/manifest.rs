//! What a service is made of in the cluster. Pure: applied elsewhere.

use k8s_openapi::api::core::v1::{Container, Pod};
use serde_json::{Value, json};

use crate::model::{ContainerSpec, Network, ServiceName, UserId};
use crate::platform::kubernetes::cluster::{Kind, Manifest};
use crate::platform::kubernetes::labels::{
    GANTRY, IMAGE_CHECK, MANAGED_BY, SERVICE, SERVICES_OF, USER,
};
use crate::platform::kubernetes::namespace::{internet, names};

/// After its node is given up by the cluster, a container is replaced after this long. The cluster has
/// waited long enough by then, and a replica elsewhere does no harm: a service's replicas are alike.
const LOST_NODE_SECONDS: u32 = 1;

/// How long a container may take to end.
const GRACE_SECONDS: u32 = 10;

/// Services before everything else of Gantry's, when places are short; nobody is driven out.
const PRIORITY: i32 = 1_000;

/// The service account of services; it may do nothing and has no token.
const ACCOUNT: &str = "gantry-service";

/// What root in a container may do where the operator lets services be root: what the usual images need to
/// prepare their folders, to become another user and to listen below 1024. Nothing that reaches the network's
/// packets or devices.
const ROOT_CAPABILITIES: [&str; 6] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "NET_BIND_SERVICE",
    "SETGID",
    "SETUID",
];

/// A check of an image that Gantry did not remove ends by itself.
const CHECK_SECONDS: u32 = 60;

/// What every container of services is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Making<'a> {
    /// The name of the priority.
    pub priority: &'a str,
    /// The operator lets services run as root.
    pub root: bool,
    /// Nodes ask the registry before each start whether the image may be had: one that was fetched with
    /// somebody's credentials is on the node for everybody.
    pub ask_registry: bool,
}

/// The namespace of a user's services: their bounds are others than those of its programs.
pub fn namespace(user: &UserId) -> String {
    format!("services-{user}")
}

/// Whose a service in this namespace with this name is.
pub fn owner(namespace: &str, name: &str) -> Option<(UserId, ServiceName)> {
    let user = namespace.strip_prefix("services-")?.parse().ok()?;
    Some((user, name.parse().ok()?))
}

/// The name of the priority of services. `installation`: the server's own namespace.
pub fn priority_name(installation: &str) -> String {
    format!("{installation}-services")
}

/// The priority of services.
pub fn priority(installation: &str) -> Manifest {
    Manifest::new(
        Kind::PriorityClass,
        json!({
            "metadata": { "name": priority_name(installation), "labels": { MANAGED_BY: GANTRY } },
            "value": PRIORITY,
            "preemptionPolicy": "Never",
            "description": "Services of Gantry: first in the queue after a node was lost, and nobody is driven out for them.",
        }),
    )
}

/// The namespace and everything in it but services. `closed`: what is closed to programs of this
/// installation.
pub fn namespace_parts(user: &UserId, closed: &[Network]) -> Vec<Manifest> {
    let name = namespace(user);
    let labels = json!({ MANAGED_BY: GANTRY, SERVICES_OF: user.as_str() });
    let mut marked = labels.clone();
    marked["pod-security.kubernetes.io/enforce"] = "baseline".into();
    let part = |kind, part: &str, spec: Value| {
        let metadata = json!({ "name": part, "namespace": name, "labels": labels });
        Manifest::new(kind, json!({ "metadata": metadata, "spec": spec }))
    };
    vec![
        Manifest::new(
            Kind::Namespace,
            json!({ "metadata": { "name": name, "labels": marked } }),
        ),
        Manifest::new(
            Kind::ServiceAccount,
            json!({
                "metadata": { "name": ACCOUNT, "namespace": name, "labels": labels },
                "automountServiceAccountToken": false,
            }),
        ),
        part(
            Kind::ResourceQuota,
            "gantry",
            json!({ "hard": {
                "pods": "10000",
                "count/deployments.apps": "1000",
                "services.loadbalancers": "0",
                "services.nodeports": "0",
            } }),
        ),
        part(
            Kind::LimitRange,
            "gantry",
            json!({ "limits": [{ "type": "Container", "max": { "cpu": "4", "memory": "8Gi" } }] }),
        ),
        // A user's services speak to each other, to names and to the internet, and to nobody else here.
        part(
            Kind::NetworkPolicy,
            "gantry-services",
            json!({
                "podSelector": {},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{ "from": [{ "podSelector": {} }] }],
                "egress": [
                    { "to": [{ "podSelector": {} }] },
                    names(),
                    { "to": [internet(closed)] },
                ],
            }),
        ),
    ]
}

fn labels(user: &UserId, name: &ServiceName) -> Value {
    json!({
        MANAGED_BY: GANTRY,
        SERVICES_OF: user.as_str(),
        USER: user.as_str(),
        SERVICE: name.as_str(),
    })
}

/// The Deployment of a service.
pub fn deployment(
    user: &UserId,
    name: &ServiceName,
    replicas: u32,
    container: &ContainerSpec,
    making: Making<'_>,
) -> Manifest {
    let selector = json!({ "matchLabels": { SERVICE: name.as_str() } });
    let labels = labels(user, name);
    let mut pod = pod_spec(container, making);
    pod["terminationGracePeriodSeconds"] = GRACE_SECONDS.into();
    pod["tolerations"] = ["not-ready", "unreachable"]
        .map(|what| {
            json!({
                "key": format!("node.kubernetes.io/{what}"),
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": LOST_NODE_SECONDS,
            })
        })
        .to_vec()
        .into();
    // As evenly as there is room: a service on fewer nodes than it should be is better than none.
    pod["topologySpreadConstraints"] = json!([{
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "nodeTaintsPolicy": "Honor",
        "labelSelector": selector,
    }]);
    Manifest::new(
        Kind::Deployment,
        json!({
            "metadata": { "name": name.as_str(), "namespace": namespace(user), "labels": labels },
            "spec": {
                "replicas": replicas,
                "revisionHistoryLimit": 2,
                "selector": selector,
                "template": { "metadata": { "labels": labels }, "spec": pod },
            },
        }),
    )
}

/// A pod that shows whether the image can be had: its command is in no image, so nothing runs.
pub fn image_check(
    user: &UserId,
    name: &str,
    container: &ContainerSpec,
    making: Making<'_>,
) -> Manifest {
    let container = ContainerSpec {
        command: vec!["/gantry-image-check".to_owned()],
        args: Vec::new(),
        env: Default::default(),
        ..container.clone()
    };
    let mut pod = pod_spec(&container, making);
    pod["restartPolicy"] = "Never".into();
    pod["activeDeadlineSeconds"] = CHECK_SECONDS.into();
    pod["terminationGracePeriodSeconds"] = 0.into();
    let labels = json!({ MANAGED_BY: GANTRY, SERVICES_OF: user.as_str(), IMAGE_CHECK: "true" });
    Manifest::new(
        Kind::Pod,
        json!({
            "metadata": { "name": name, "namespace": namespace(user), "labels": labels },
            "spec": pod,
        }),
    )
}

fn pod_spec(container: &ContainerSpec, making: Making<'_>) -> Value {
    let ContainerSpec {
        name,
        image,
        command,
        args,
        env,
    } = container;
    let env: Vec<Value> = env
        .iter()
        .map(|(name, value)| json!({ "name": name, "value": escaped(value) }))
        .collect();
    let words = |words: &[String]| words.iter().map(|word| escaped(word)).collect::<Vec<_>>();
    let mut container = json!({
        "name": name,
        "image": image.as_str(),
        // Also for `latest`, but for images that not everybody may have: a node that is lost must not make a
        // registry that is away a second fault.
        "imagePullPolicy": if making.ask_registry { "Always" } else { "IfNotPresent" },
        "resources": {
            "requests": { "cpu": "10m", "memory": "32Mi" },
            "limits": { "cpu": "1", "memory": "256Mi" },
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "seccompProfile": { "type": "RuntimeDefault" },
            "capabilities": { "drop": ["ALL"] },
        },
    });
    if making.root {
        container["securityContext"]["capabilities"]["add"] = json!(ROOT_CAPABILITIES);
    } else {
        container["securityContext"]["runAsNonRoot"] = true.into();
    }
    // What is empty is left to the image.
    for (field, value) in [("command", words(command)), ("args", words(args))] {
        if !value.is_empty() {
            container[field] = value.into();
        }
    }
    if !env.is_empty() {
        container["env"] = env.into();
    }
    json!({
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "priorityClassName": making.priority,
        "containers": [container],
    })
}

/// `$(NAME)` is text, not another variable's value: the cluster makes one of two dollars.
fn escaped(text: &str) -> String {
    text.replace('$', "$$")
}

fn plain(text: &str) -> String {
    text.replace("$$", "$")
}

/// What a container of a Deployment was made from.
pub fn container_of(container: &Container) -> Option<ContainerSpec> {
    let words =
        |words: &Option<Vec<String>>| words.iter().flatten().map(|word| plain(word)).collect();
    let env = container.env.iter().flatten();
    Some(ContainerSpec {
        name: container.name.clone(),
        image: container.image.as_deref()?.parse().ok()?,
        command: words(&container.command),
        args: words(&container.args),
        env: env
            .map(|variable| {
                let value = variable.value.as_deref().unwrap_or_default();
                (variable.name.clone(), plain(value))
            })
            .collect(),
    })
}

/// What a check of an image found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A node has it now.
    Image,
    /// It cannot be had, and why.
    Nothing(String),
    /// A node has it, and does not start it as who it wants to be, and why.
    Root(String),
}

/// What the pod of a check says, once it says something.
pub fn found(pod: &Pod) -> Option<Found> {
    let status = pod.status.as_ref()?;
    let container = status.container_statuses.as_ref()?.first()?;
    let waiting = container
        .state
        .as_ref()
        .and_then(|state| state.waiting.as_ref());
    match waiting.and_then(|waiting| waiting.reason.as_deref()) {
        None if !container.image_id.is_empty() => Some(Found::Image),
        // It is there, and the command that is in no image is not.
        Some("RunContainerError" | "CreateContainerError") => Some(Found::Image),
        Some("CreateContainerConfigError") => {
            let said = waiting.and_then(|waiting| waiting.message.clone())?;
            said.contains("runAsNonRoot").then_some(Found::Root(said))
        }
        Some("ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull") => {
            let said = waiting.and_then(|waiting| waiting.message.clone());
            Some(Found::Nothing(said.unwrap_or_default()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use k8s_openapi::api::apps::v1::Deployment;
    use std::collections::BTreeMap;

    const MAKING: Making<'static> = Making {
        priority: "gantry-services",
        root: false,
        ask_registry: false,
    };

    fn spec() -> ContainerSpec {
        ContainerSpec {
            name: "main".to_owned(),
            image: "nginx:1".parse().unwrap(),
            command: vec!["sh".to_owned(), "-c".to_owned()],
            args: vec!["echo $(HOME) $$".to_owned()],
            env: BTreeMap::from([("A".to_owned(), "$(B)".to_owned())]),
        }
    }

    fn deployment_of(container: &ContainerSpec) -> Deployment {
        let (user, name) = ("ada".parse().unwrap(), "shop".parse().unwrap());
        let manifest = deployment(&user, &name, 3, container, MAKING);
        serde_json::from_value(manifest.body).unwrap()
    }

    #[test]
    fn a_service_is_read_back_as_it_was_made() {
        let bare = ContainerSpec {
            command: Vec::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
            ..spec()
        };
        for container in [spec(), bare] {
            let pod = deployment_of(&container)
                .spec
                .unwrap()
                .template
                .spec
                .unwrap();
            assert_eq!(container_of(&pod.containers[0]), Some(container));
        }
    }

    #[test]
    fn a_service_survives_its_nodes() {
        let deployment = deployment_of(&spec());
        let pod = deployment.spec.unwrap().template.spec.unwrap();
        let tolerations = pod.tolerations.unwrap();
        assert_eq!(tolerations.len(), 2);
        assert!(tolerations.iter().all(|t| t.toleration_seconds == Some(1)));
        let spread = &pod.topology_spread_constraints.unwrap()[0];
        assert_eq!(spread.topology_key, "kubernetes.io/hostname");
        assert_eq!(pod.priority_class_name.as_deref(), Some("gantry-services"));
        let limits = pod.containers[0]
            .resources
            .as_ref()
            .unwrap()
            .limits
            .as_ref()
            .unwrap();
        assert!(limits.contains_key("cpu") && limits.contains_key("memory"));
    }

    /// A service and the check of its image, as they are made.
    fn containers(making: Making<'_>) -> [Value; 2] {
        let (user, name) = ("ada".parse().unwrap(), "shop".parse().unwrap());
        let service = deployment(&user, &name, 1, &spec(), making).body;
        let check = image_check(&user, "check", &spec(), making).body;
        [
            service["spec"]["template"]["spec"]["containers"][0].clone(),
            check["spec"]["containers"][0].clone(),
        ]
    }

    #[test]
    fn a_service_is_not_root_and_has_no_capabilities_unless_the_operator_lets_it() {
        for container in containers(MAKING) {
            let expected = json!({
                "allowPrivilegeEscalation": false,
                "runAsNonRoot": true,
                "seccompProfile": { "type": "RuntimeDefault" },
                "capabilities": { "drop": ["ALL"] },
            });
            assert_eq!(container["securityContext"], expected);
        }
        let root = Making {
            root: true,
            ..MAKING
        };
        for container in containers(root) {
            let security = &container["securityContext"];
            assert_eq!(security.get("runAsNonRoot"), None);
            assert_eq!(security["allowPrivilegeEscalation"], false);
            assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
            let added = security["capabilities"]["add"].to_string();
            assert!(added.contains("SETUID"), "{added}");
            assert!(
                !added.contains("NET_RAW") && !added.contains("MKNOD"),
                "{added}"
            );
        }
    }

    #[test]
    fn the_registry_is_asked_each_time_where_images_are_fetched_with_credentials() {
        for (ask_registry, policy) in [(false, "IfNotPresent"), (true, "Always")] {
            let making = Making {
                ask_registry,
                ..MAKING
            };
            for container in containers(making) {
                assert_eq!(container["imagePullPolicy"], policy);
            }
        }
    }

    #[test]
    fn a_check_says_whether_the_image_can_be_had() {
        let pod = |state: Value, image_id: &str| -> Pod {
            serde_json::from_value(json!({ "metadata": {}, "status": { "containerStatuses": [{
                "name": "main", "image": "a", "imageID": image_id, "ready": false, "restartCount": 0,
                "state": state }] } }))
            .unwrap()
        };
        let waiting = |reason: &str| json!({ "waiting": { "reason": reason, "message": "m" } });
        assert_eq!(found(&pod(waiting("ContainerCreating"), "")), None);
        assert_eq!(
            found(&pod(waiting("ErrImagePull"), "")),
            Some(Found::Nothing("m".to_owned()))
        );
        assert_eq!(
            found(&pod(waiting("RunContainerError"), "x")),
            Some(Found::Image)
        );
        let root = "container has runAsNonRoot and image will run as root";
        let refused = |said: &str| json!({ "waiting": { "reason": "CreateContainerConfigError", "message": said } });
        assert_eq!(
            found(&pod(refused(root), "")),
            Some(Found::Root(root.to_owned()))
        );
        assert_eq!(found(&pod(refused("secret not found"), "")), None);
        let ended = json!({ "terminated": { "exitCode": 128, "reason": "StartError" } });
        assert_eq!(found(&pod(ended, "x")), Some(Found::Image));
        assert_eq!(
            found(&pod(
                json!({ "waiting": { "reason": "ContainerCreating" } }),
                "x"
            )),
            None
        );
    }
}
