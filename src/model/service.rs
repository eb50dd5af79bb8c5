//! Services: an image run with N replicas, kept at N when nodes die.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{FieldError, IdError, ImageError, ImageName, Problem, ServiceName, UserId};

/// Most replicas of one service; a large cluster runs some hundred thousand pods.
pub const MAX_REPLICAS: u32 = 10_000;

/// Most services in one body.
const MAX_SERVICES: usize = 500;

/// Most words of a command line, or variables, and their bytes together.
const MAX_WORDS: usize = 100;
const MAX_WORD_BYTES: usize = 16 << 10;

/// What `POST /service` takes, unchecked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicesRequest {
    /// Each service once.
    pub services: Vec<ServiceRequest>,
    /// Whose; the key's own user when it is left out.
    #[serde(default, rename = "userId")]
    pub user_id: Option<String>,
}

/// One service of a body, unchecked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceRequest {
    #[serde(rename = "serviceName")]
    service_name: String,
    replicas: i64,
    container: Option<ContainerRequest>,
}

/// The container of a service, unchecked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerRequest {
    name: String,
    image: String,
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
}

/// What each replica of a service runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// The container's name.
    pub name: String,
    /// Its image.
    pub image: ImageName,
    /// In place of the image's own entrypoint.
    pub command: Vec<String>,
    /// Arguments to it.
    pub args: Vec<String>,
    /// Variables.
    pub env: BTreeMap<String, String>,
}

/// A service as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceSpec {
    /// Its name.
    pub name: ServiceName,
    /// How many replicas.
    pub replicas: u32,
    /// What they run; `None`: what the service runs already.
    pub container: Option<ContainerSpec>,
}

impl ServicesRequest {
    /// Checks every field; the first wrong one is named.
    pub fn validate(self) -> Result<(Option<UserId>, Vec<ServiceSpec>), FieldError> {
        let user = self.user_id.as_deref().map(str::parse);
        let user: Option<UserId> = user
            .transpose()
            .map_err(|error: IdError| FieldError::new("userId", error.to_string()))?;
        if self.services.is_empty() || self.services.len() > MAX_SERVICES {
            let reason = format!("must hold 1 to {MAX_SERVICES} services");
            return Err(FieldError::new("services", reason));
        }
        let mut first = HashMap::new();
        let mut specs = Vec::with_capacity(self.services.len());
        for (index, service) in self.services.into_iter().enumerate() {
            let spec = service.validate(&format!("services[{index}]"))?;
            if let Some(before) = first.insert(spec.name.clone(), index) {
                return Err(FieldError::new(
                    format!("services[{index}].serviceName"),
                    format!(
                        "is {:?}, as in services[{before}]; a body names a service once",
                        spec.name.as_str()
                    ),
                ));
            }
            specs.push(spec);
        }
        Ok((user, specs))
    }
}

impl ServiceRequest {
    fn validate(self, path: &str) -> Result<ServiceSpec, FieldError> {
        let field = |name: &str| format!("{path}.{name}");
        let name = self
            .service_name
            .parse()
            .map_err(|error: IdError| FieldError::new(field("serviceName"), error.to_string()))?;
        let replicas = u32::try_from(self.replicas)
            .ok()
            .filter(|replicas| (1..=MAX_REPLICAS).contains(replicas))
            .ok_or_else(|| {
                let reason = format!(
                    "is {}; it must be 1 to {MAX_REPLICAS} (DELETE /service/{{name}} ends a service)",
                    self.replicas
                );
                FieldError::new(field("replicas"), reason)
            })?;
        let container = self
            .container
            .map(|container| container.validate(&field("container")));
        Ok(ServiceSpec {
            name,
            replicas,
            container: container.transpose()?,
        })
    }
}

impl ContainerRequest {
    fn validate(self, path: &str) -> Result<ContainerSpec, FieldError> {
        let field = |name: &str| format!("{path}.{name}");
        // The same rule as for services: both are labels in the cluster.
        let name: ServiceName = self
            .name
            .parse()
            .map_err(|error: IdError| FieldError::new(field("name"), error.to_string()))?;
        let image = self
            .image
            .parse()
            .map_err(|error: ImageError| FieldError::new(field("image"), error.to_string()))?;
        check_words(&field("command"), self.command.iter())?;
        check_words(&field("args"), self.args.iter())?;
        check_words(
            &field("env"),
            self.env.iter().flat_map(|(name, value)| [name, value]),
        )?;
        if let Some(bad) = self.env.keys().find(|name| !is_variable(name)) {
            let shown: String = bad.chars().take(40).collect();
            return Err(FieldError::new(
                field("env"),
                format!("{shown:?} is not a variable's name"),
            ));
        }
        Ok(ContainerSpec {
            name: name.into(),
            image,
            command: self.command,
            args: self.args,
            env: self.env,
        })
    }
}

fn check_words<'a>(field: &str, words: impl Iterator<Item = &'a String>) -> Result<(), FieldError> {
    let (mut count, mut bytes) = (0, 0);
    for word in words {
        count += 1;
        bytes += word.len();
        if word.contains('\0') {
            return Err(FieldError::new(field, "contains a NUL byte"));
        }
    }
    // A variable is two words.
    if count > 2 * MAX_WORDS || bytes > MAX_WORD_BYTES {
        let reason = format!("is more than {MAX_WORDS} words or {MAX_WORD_BYTES} bytes");
        return Err(FieldError::new(field, reason));
    }
    Ok(())
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// What became of one service of a body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceOutcome {
    /// Which.
    #[serde(rename = "serviceName")]
    pub service_name: ServiceName,
    /// `created`, `rescaled`, `updated`, `unchanged` or `failed`.
    pub outcome: String,
    /// As many as are wanted now.
    pub replicas: u32,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Problem>,
}

/// Whether a node works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// It is heard of.
    Healthy,
    /// It is not heard of, or says that it cannot work.
    Failed,
}

/// A node as `GET /node_state` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// Whether it works.
    pub state: NodeState,
    /// When it was last heard of, by its own clock.
    pub last_heartbeat: Option<Timestamp>,
    /// Why it is `failed`.
    pub reason: Option<String>,
}

/// What a container does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// On its way.
    InQueue,
    /// Running and ready.
    Running,
    /// It ended by itself and well, or is being stopped because it is not wanted any more.
    Completed,
    /// It does not run, and `reason` says why.
    Failed,
}

/// A container as `GET /container_state` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its name: the pod's.
    pub container: String,
    /// Of which service.
    pub service: ServiceName,
    /// Whose.
    #[serde(rename = "userId")]
    pub user_id: UserId,
    /// Where.
    pub node: Option<String>,
    /// What it runs.
    pub image: String,
    /// What it does.
    pub state: ContainerState,
    /// Why, when it does not simply run.
    pub reason: Option<String>,
    /// Since when.
    pub since: Timestamp,
    /// Times it was started again.
    pub restarts: u32,
}

/// What a service does as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceState {
    /// Some of its containers are on their way.
    InQueue,
    /// As many run as are wanted.
    Running,
    /// All its containers ended well.
    Completed,
    /// Some of its containers fail.
    Failed,
}

/// A service as `GET /service_state` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    #[serde(rename = "serviceName")]
    pub service_name: ServiceName,
    /// Whose.
    #[serde(rename = "userId")]
    pub user_id: UserId,
    /// Containers wanted.
    pub replicas: u32,
    /// Containers that run and are ready, on nodes that are heard of.
    pub current_state: u32,
    /// What it does.
    pub state: ServiceState,
    /// Why, when it does not simply run.
    pub reason: Option<String>,
    /// What it runs.
    pub image: String,
}

/// Nodes, containers and services at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Nodes, by name.
    pub nodes: Vec<NodeStatus>,
    /// Containers, by user, service and name.
    pub containers: Vec<ContainerStatus>,
    /// Services, by user and name.
    pub services: Vec<ServiceStatus>,
    /// The cluster cannot be watched since then: what is shown is as old. `None`: it is as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Timestamp>,
}

/// What happened to a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happening {
    /// It was made.
    Created,
    /// More or fewer replicas are wanted.
    Scaled,
    /// It runs another image, or the same otherwise.
    Updated,
    /// A container got its node.
    Placed,
    /// A container got a node in the place of one that was lost.
    Rescheduled,
    /// A container is ready.
    Started,
    /// A container ended and was not stopped.
    Ended,
    /// A container does not start.
    Failed,
    /// A container that did not start was removed, so that another takes its place.
    Replaced,
    /// A container is gone.
    Stopped,
    /// A node with some of its containers is not heard of any more.
    NodeLost,
    /// That node is heard of again.
    NodeBack,
    /// As many containers run as are wanted, for the first time after a node was lost.
    Recovered,
}

/// One line of a service's timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceEvent {
    /// When.
    pub time: Timestamp,
    /// What.
    pub event: Happening,
    /// Which container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Which node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// In words.
    pub message: String,
    /// How long it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn checked(body: Value) -> Result<(Option<UserId>, Vec<ServiceSpec>), FieldError> {
        serde_json::from_value::<ServicesRequest>(body)
            .unwrap()
            .validate()
    }

    fn service(name: &str, replicas: i64, image: &str) -> Value {
        json!({ "serviceName": name, "replicas": replicas, "container": { "name": "main", "image": image } })
    }

    #[test]
    fn what_the_contract_shows_is_taken() {
        let (user, specs) = checked(json!({ "services": [service("shop", 3, "nginx")] })).unwrap();
        assert_eq!(user, None);
        assert_eq!((specs[0].name.as_str(), specs[0].replicas), ("shop", 3));
        let container = specs[0].container.as_ref().unwrap();
        assert_eq!(
            (container.name.as_str(), container.image.as_str()),
            ("main", "nginx")
        );
        let (user, specs) = checked(
            json!({ "userId": "ada", "services": [{ "serviceName": "shop", "replicas": 10_000 }] }),
        )
        .unwrap();
        assert_eq!(user.unwrap().as_str(), "ada");
        assert_eq!(specs[0].container, None);
    }

    #[test]
    fn the_wrong_field_is_named() {
        let one = |service: Value| json!({ "services": [service] });
        let with = |change: fn(&mut Value)| {
            let mut service = service("a", 1, "nginx");
            change(&mut service["container"]);
            one(service)
        };
        for (body, field) in [
            (json!({ "services": [] }), "services"),
            (
                json!({ "services": vec![service("a", 1, "nginx"); 501] }),
                "services",
            ),
            (
                json!({ "userId": "A", "services": [service("a", 1, "nginx")] }),
                "userId",
            ),
            (one(service("a", 0, "nginx")), "services[0].replicas"),
            (one(service("a", -1, "nginx")), "services[0].replicas"),
            (one(service("a", 10_001, "nginx")), "services[0].replicas"),
            (one(service("a", i64::MAX, "nginx")), "services[0].replicas"),
            (one(service("", 1, "nginx")), "services[0].serviceName"),
            (one(service("A", 1, "nginx")), "services[0].serviceName"),
            (one(service("a.b", 1, "nginx")), "services[0].serviceName"),
            (
                one(service(&"a".repeat(51), 1, "nginx")),
                "services[0].serviceName",
            ),
            (
                one(service("a", 1, "no image")),
                "services[0].container.image",
            ),
            (
                with(|c| c["name"] = "_".into()),
                "services[0].container.name",
            ),
            (
                with(|c| c["args"] = json!(["a\u{0}"])),
                "services[0].container.args",
            ),
            (
                with(|c| c["env"] = json!({ "1A": "" })),
                "services[0].container.env",
            ),
            (
                with(|c| c["command"] = json!(["x".repeat(17 << 10)])),
                "services[0].container.command",
            ),
            (
                json!({ "services": [service("a", 1, "nginx"), service("b", 1, "nginx"), service("a", 2, "nginx")] }),
                "services[2].serviceName",
            ),
        ] {
            assert_eq!(checked(body.clone()).unwrap_err().field, field, "{body}");
        }
    }
}
