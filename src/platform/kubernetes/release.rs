//! What a release consists of in the cluster, as manifests.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::cluster::{Kind, Manifest};
use super::labels::{
    APP, CODE_DIGEST, DATABASE, GANTRY, IDLE, IMAGE, KEEP, MANAGED_BY, RELEASE, REPL, REVISION,
    SUBMISSION, TESTS_DIGEST, USER, of_repl, of_user,
};
use super::record::Stored;
use super::template::{SERVICE_NAME, Template};
use crate::model::{Autoscale, Domain, ReplId, Scheme, Sites, TicketKey, UserId, Variables};
use crate::storage::release_prefix;

/// The Secret that older servers put into each user's namespace, with the code store's keys. Only an operator who
/// shares the keys, for a template of another kind, still has it.
pub const STORE_SECRET: &str = "gantry-store";

/// The container of the template that is the program's; a template without one means its first.
pub const PROGRAM_CONTAINER: &str = "runner";

/// Seconds of a pod's end beside what its program gets: proxies learn that it goes, and what is left is killed.
const BEFORE_AND_AFTER: u64 = 4;

/// The user id of the usual database image.
const DATABASE_UID: u32 = 999;

/// Where and how releases are made.
#[derive(Debug, Clone)]
pub struct ReleaseConfig {
    /// The template.
    pub template: Template,
    /// The runner image.
    pub runner_image: String,
    /// The database's image.
    pub database_image: String,
    /// The bucket with the releases.
    pub bucket: String,
    /// The code store's keys, as variables, when the operator shares them with users' namespaces.
    pub shared_keys: Option<BTreeMap<String, String>>,
    /// `{repl}.{this}` is the terminal.
    pub domain: String,
    /// `{repl}.{this}` is the program.
    pub app_domain: String,
    /// What stands in the URLs of both.
    pub sites: Sites,
    /// The ingress controller's class.
    pub ingress_class: String,
    /// The server's own Service, which takes the requests to idle repls.
    pub wake_service: Option<WakeService>,
    /// How long a program may take to answer what it was asked, and again to end after SIGTERM.
    pub drain: Duration,
}

/// A Service in the server's own namespace that leads to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WakeService {
    /// Its name.
    pub name: String,
    /// Its port.
    pub port: u16,
}

/// Whose release it is.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The user.
    pub user: UserId,
    /// The repl.
    pub repl: ReplId,
}

impl ReleaseConfig {
    /// Where the repl's program is served.
    pub fn url(&self, repl: &ReplId) -> String {
        self.sites.program(repl)
    }

    /// Where the repl's terminal is.
    pub fn terminal_url(&self, repl: &ReplId) -> String {
        self.sites.terminal(repl)
    }

    fn words(&self, owner: &Owner, stored: &Stored) -> BTreeMap<&'static str, String> {
        let Owner { user, repl } = owner;
        let prefix = prefix(repl, stored);
        BTreeMap::from([
            (SERVICE_NAME, repl.to_string()),
            ("${GANTRY_NAMESPACE}", user.namespace()),
            ("${GANTRY_USER}", user.to_string()),
            ("${GANTRY_RUNNER_IMAGE}", self.runner_image.clone()),
            ("${GANTRY_BUCKET}", self.bucket.clone()),
            ("${GANTRY_PREFIX}", prefix),
            ("${GANTRY_HOST}", format!("{repl}.{}", self.domain)),
            ("${GANTRY_APP_HOST}", format!("{repl}.{}", self.app_domain)),
            (
                "${GANTRY_APP_SCHEME}",
                self.sites.programs.scheme.as_str().to_owned(),
            ),
            ("${GANTRY_INGRESS_CLASS}", self.ingress_class.clone()),
        ])
    }

    /// The template's objects for a release, ready to apply. Without `replicas` there are as many as the
    /// template says.
    pub fn manifests(
        &self,
        owner: &Owner,
        stored: &Stored,
        replicas: Option<u32>,
    ) -> Vec<Manifest> {
        let mut manifests = self.template.fill(&self.words(owner, stored));
        for manifest in &mut manifests {
            manifest.body["metadata"]["namespace"] = owner.user.namespace().into();
            let labels = of_repl(&owner.user, &owner.repl);
            merge(&mut manifest.body, "/metadata", "labels", &labels, true);
            if manifest.kind == Kind::Ingress {
                self.add_domains(&mut manifest.body, owner, &stored.domains);
                self.keep_tls(&mut manifest.body, owner, &stored.domains);
            }
            if manifest.kind == Kind::Deployment {
                dress(&mut manifest.body, owner, stored, self.drain);
                if let Some(replicas) = replicas {
                    manifest.body["spec"]["replicas"] = replicas.into();
                }
            }
        }
        manifests
    }

    /// A rule for each domain beside the one for the program's host, and as that one.
    fn add_domains(&self, ingress: &mut Value, owner: &Owner, domains: &[Domain]) {
        let host = format!("{}.{}", owner.repl, self.app_domain);
        let Some(rules) = ingress
            .pointer_mut("/spec/rules")
            .and_then(Value::as_array_mut)
        else {
            return;
        };
        let Some(program) = rules.iter().find(|rule| rule["host"] == *host).cloned() else {
            return;
        };
        for domain in domains {
            let mut rule = program.clone();
            rule["host"] = domain.as_str().into();
            rules.push(rule);
        }
    }

    /// Of the template's TLS entries those whose hosts are reached by https. A domain has one as the program's
    /// host has, and a certificate of its own when that one's is named.
    fn keep_tls(&self, ingress: &mut Value, owner: &Owner, domains: &[Domain]) {
        let program = format!("{}.{}", owner.repl, self.app_domain);
        let runner = format!("{}.{}", owner.repl, self.domain);
        let secure = |host: &Value| {
            let site = match host.as_str() {
                Some(host) if host == program => &self.sites.programs,
                Some(host) if host == runner => &self.sites.runners,
                // The operator's own.
                _ => return true,
            };
            site.scheme == Scheme::Https
        };
        let Some(entries) = ingress
            .pointer_mut("/spec/tls")
            .and_then(Value::as_array_mut)
        else {
            return;
        };
        let kept = |entry: &mut Value| -> Option<bool> {
            let hosts = entry.get_mut("hosts")?.as_array_mut()?;
            hosts.retain(secure);
            Some(!hosts.is_empty())
        };
        // An entry without hosts is for all of them.
        entries.retain_mut(|entry| kept(entry).unwrap_or(true));
        let of_program = entries.iter().find(|entry| {
            let hosts = entry["hosts"].as_array();
            hosts.is_some_and(|hosts| hosts.iter().any(|host| *host == program))
        });
        if let Some(entry) = of_program.cloned() {
            for domain in domains {
                let mut own = entry.clone();
                own["hosts"] = json!([domain.as_str()]);
                if let Some(secret) = entry["secretName"].as_str() {
                    own["secretName"] = format!("{secret}-{}", domain.as_str()).into();
                }
                entries.push(own);
            }
        }
        let none = entries.is_empty();
        if let Some(spec) = ingress["spec"].as_object_mut().filter(|_| none) {
            spec.remove("tls");
        }
    }

    /// What leads requests to an idle repl's hosts to the server, in the server's own namespace: its Service
    /// there needs no upkeep, whatever becomes of the server's pods. The ingress controller is told the same
    /// about it as about the repl's own.
    pub fn wake_ingress(&self, owner: &Owner, stored: &Stored, own: &str) -> Option<Manifest> {
        let service = self.wake_service.as_ref()?;
        let manifests = self.manifests(owner, stored, None);
        let ingresses = manifests.iter().filter(|one| one.kind == Kind::Ingress);
        let ingresses: Vec<&Value> = ingresses.map(|one| &one.body).collect();
        let annotations = ingresses.iter().filter_map(|one| {
            let annotations = one["metadata"]["annotations"].as_object()?;
            Some(annotations.clone())
        });
        let annotations: Map<String, Value> = annotations.flatten().collect();
        let rules = ingresses
            .iter()
            .filter_map(|one| one.pointer("/spec/rules")?.as_array());
        let hosts: BTreeSet<&str> = rules
            .flatten()
            .filter_map(|rule| rule["host"].as_str())
            .collect();
        if hosts.is_empty() {
            return None;
        }
        let backend = json!({ "service": {
            "name": service.name, "port": { "number": service.port } } });
        let paths = json!([{ "path": "/", "pathType": "Prefix", "backend": backend }]);
        let rules: Vec<Value> = hosts
            .iter()
            .map(|host| json!({ "host": host, "http": { "paths": paths } }))
            .collect();
        let labels = json!({
            MANAGED_BY: GANTRY, USER: owner.user.as_str(), IDLE: owner.repl.as_str(),
        });
        let entries = ingresses
            .iter()
            .filter_map(|one| one.pointer("/spec/tls")?.as_array());
        // The repl's own certificates are in its user's namespace.
        let hosts = entries
            .flatten()
            .filter_map(|entry| entry["hosts"].as_array());
        let hosts: Vec<&Value> = hosts.flatten().collect();
        let mut body = json!({
            "metadata": {
                "name": format!("idle-{}", owner.repl), "namespace": own, "labels": labels,
                "annotations": annotations,
            },
            "spec": { "ingressClassName": self.ingress_class, "rules": rules },
        });
        if !hosts.is_empty() {
            body["spec"]["tls"] = json!([{ "hosts": hosts }]);
        }
        Some(Manifest::new(Kind::Ingress, body))
    }

    /// Whether every request passes the runner: only then it knows when the last one came.
    pub fn sees_requests(&self) -> bool {
        let Ok(sample) = self.sample() else {
            return false;
        };
        let services = sample.iter().filter(|one| one.kind == Kind::Service);
        let ports = services.filter_map(|one| one.body.pointer("/spec/ports")?.as_array());
        let targets = |wanted: &Value| *wanted == 3_002 || *wanted == "front";
        let mut seen = ports.flatten().map(|port| &port["targetPort"]);
        seen.any(targets)
    }

    /// Whether the template has a rule for the program's host, which those for domains are made from.
    pub fn has_program_host(&self) -> anyhow::Result<bool> {
        let sample = self.sample()?;
        let host = format!("gantry-sample.{}", self.app_domain);
        let mut rules = sample
            .iter()
            .filter(|manifest| manifest.kind == Kind::Ingress)
            .filter_map(|manifest| manifest.body.pointer("/spec/rules")?.as_array())
            .flatten();
        Ok(rules.any(|rule| rule["host"] == *host))
    }

    /// The template's objects for a release that will never be.
    pub fn sample(&self) -> anyhow::Result<Vec<Manifest>> {
        let owner = Owner {
            user: "gantry-sample".parse()?,
            repl: "gantry-sample".parse()?,
        };
        let stored = Stored {
            release: 1,
            submission_id: crate::model::SubmissionId::new(),
            time: jiff::Timestamp::now(),
            state: super::record::StoredState::Pending,
            argv: vec!["true".to_owned()],
            env_names: Vec::new(),
            given: None,
            domains: Vec::new(),
            database: false,
            serves: None,
            code_digest: String::new(),
            tests_digest: String::new(),
            image: String::new(),
        };
        Ok(self.manifests(&owner, &stored, None))
    }

    /// The Secret with the code store's keys, when they are shared.
    pub fn store_secret(&self, user: &UserId) -> Option<Manifest> {
        let keys = self.shared_keys.as_ref()?;
        let metadata =
            json!({ "name": STORE_SECRET, "namespace": user.namespace(), "labels": of_user(user) });
        Some(Manifest::new(
            Kind::Secret,
            json!({ "metadata": metadata, "type": "Opaque", "stringData": keys }),
        ))
    }

    /// Whether the template's pods need the Secret with the code store's keys.
    pub fn needs_keys(&self) -> anyhow::Result<bool> {
        Ok(self.sample()?.iter().any(|one| names_keys(&one.body)))
    }

    /// The repl's database but for its Secret: a name and one pod with a volume.
    pub fn database(&self, owner: &Owner) -> [Manifest; 2] {
        let name = database_name(&owner.repl);
        let labels = of_repl(&owner.user, &owner.repl);
        let metadata =
            json!({ "name": name, "namespace": owner.user.namespace(), "labels": labels });
        let selector = json!({ APP: DATABASE, REPL: owner.repl.as_str() });
        let service = json!({
            "metadata": metadata,
            "spec": {
                // The pod's own address: there is one pod.
                "clusterIP": "None",
                "selector": selector,
                "ports": [{ "name": "postgres", "port": 5_432, "targetPort": 5_432, "protocol": "TCP" }],
            },
        });
        let mut pod_labels = labels;
        pod_labels[APP] = DATABASE.into();
        let kept = json!({
            MANAGED_BY: GANTRY, USER: owner.user.as_str(), REPL: owner.repl.as_str(), KEEP: DATABASE,
        });
        let claim = json!({
            "metadata": { "name": "data", "labels": kept },
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": { "requests": { "storage": DATABASE_ROOM.to_string() } },
            },
        });
        let set = json!({
            "metadata": metadata,
            "spec": {
                "replicas": 1,
                "serviceName": name,
                "selector": { "matchLabels": selector },
                "template": {
                    "metadata": { "labels": pod_labels },
                    "spec": self.database_pod(&name),
                },
                "volumeClaimTemplates": [claim],
            },
        });
        [
            Manifest::new(Kind::Service, service),
            Manifest::new(Kind::StatefulSet, set),
        ]
    }

    fn database_pod(&self, name: &str) -> Value {
        // Asked as its own user asks: over the socket, and only once it takes questions.
        let ready = json!({ "command": ["sh", "-c", "pg_isready -q -h 127.0.0.1 -U app -d app"] });
        json!({
            "serviceAccountName": super::namespace::PROGRAM_ACCOUNT,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 30,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": DATABASE_UID,
                "runAsGroup": DATABASE_UID,
                "fsGroup": DATABASE_UID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": "postgres",
                "image": self.database_image,
                "imagePullPolicy": "IfNotPresent",
                "ports": [{ "name": "postgres", "containerPort": 5_432, "protocol": "TCP" }],
                "envFrom": [{ "secretRef": { "name": name } }],
                // A folder of the volume's own: a file system's root may hold lost+found.
                "env": [{ "name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata" }],
                "resources": {
                    "requests": { "cpu": "50m", "memory": "128Mi" },
                    "limits": { "cpu": "1", "memory": "512Mi" },
                },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": { "drop": ["ALL"] },
                },
                "startupProbe": { "exec": ready, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 120 },
                "readinessProbe": { "exec": ready, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3 },
                "volumeMounts": [
                    { "name": "data", "mountPath": "/var/lib/postgresql/data" },
                    { "name": "run", "mountPath": "/var/run/postgresql" },
                    { "name": "tmp", "mountPath": "/tmp" },
                ],
            }],
            "volumes": [
                { "name": "run", "emptyDir": { "sizeLimit": "16Mi" } },
                { "name": "tmp", "emptyDir": { "sizeLimit": "256Mi" } },
            ],
        })
    }
}

/// Where the code store has what a release or a workspace consists of.
pub fn prefix(repl: &ReplId, stored: &Stored) -> String {
    if stored.is_workspace() {
        format!("code/{repl}/")
    } else {
        release_prefix(repl, stored.submission_id)
    }
}

/// Whether a manifest has something from the Secret with the code store's keys, as variables or as a volume.
pub fn names_keys(body: &Value) -> bool {
    match body {
        Value::Object(fields) => fields.iter().any(|(field, value)| {
            let from_secret = matches!(field.as_str(), "secretRef" | "secretKeyRef" | "secret");
            let named = |name: &str| value[name] == STORE_SECRET;
            (from_secret && (named("name") || named("secretName"))) || names_keys(value)
        }),
        Value::Array(items) => items.iter().any(names_keys),
        _ => false,
    }
}

/// Bytes of a database's volume.
pub const DATABASE_ROOM: u64 = 1 << 30;

/// The name of a repl's database: its StatefulSet, its Service, its Secret.
pub fn database_name(repl: &ReplId) -> String {
    format!("{repl}-db")
}

/// The Secret of a new database. Made once: its password is in the volume from then on.
pub fn database_secret(owner: &Owner, password: &str) -> Manifest {
    let name = database_name(&owner.repl);
    let mut labels = of_repl(&owner.user, &owner.repl);
    labels[KEEP] = DATABASE.into();
    let metadata = json!({ "name": name, "namespace": owner.user.namespace(), "labels": labels });
    let url = format!("postgresql://app:{password}@{name}:5432/app");
    let data = json!({
        "POSTGRES_USER": "app",
        "POSTGRES_DB": "app",
        "POSTGRES_PASSWORD": password,
        "DATABASE_URL": url,
    });
    Manifest::new(
        Kind::Secret,
        json!({ "metadata": metadata, "type": "Opaque", "stringData": data }),
    )
}

/// The name of the Secret with what tickets for the repl's runner are made with, and its key there.
pub fn runner_name(repl: &ReplId) -> String {
    format!("{repl}-runner")
}
pub const RUNNER_KEY: &str = "KEY";

/// That Secret. Made once in a repl's life: pods of two releases are there at one time.
pub fn runner_secret(owner: &Owner, key: &TicketKey) -> Manifest {
    let metadata = json!({
        "name": runner_name(&owner.repl),
        "namespace": owner.user.namespace(),
        "labels": of_repl(&owner.user, &owner.repl),
    });
    let body = json!({
        "metadata": metadata, "type": "Opaque", "stringData": { RUNNER_KEY: key.text() },
    });
    Manifest::new(Kind::Secret, body)
}

/// What changes the number of a release's replicas by their processor time.
pub fn autoscaler(owner: &Owner, deployment: &str, auto: Autoscale) -> Manifest {
    let target = Kind::Deployment.resource();
    let body = json!({
        "metadata": {
            "name": owner.repl.as_str(),
            "namespace": owner.user.namespace(),
            "labels": of_repl(&owner.user, &owner.repl),
        },
        "spec": {
            "scaleTargetRef": {
                "apiVersion": target.api_version, "kind": target.kind, "name": deployment,
            },
            "minReplicas": auto.min,
            "maxReplicas": auto.max,
            "metrics": [{ "type": "Resource", "resource": {
                "name": "cpu",
                "target": { "type": "Utilization", "averageUtilization": auto.cpu_percent },
            } }],
        },
    });
    Manifest::new(Kind::HorizontalPodAutoscaler, body)
}

/// The name of the Secret with the variables that a repl was given.
pub fn given_name(repl: &ReplId, revision: i64) -> String {
    format!("{repl}-given-{revision}")
}

/// Labels of that Secret, wherever it is.
pub fn given_labels(owner: &Owner, revision: i64) -> Value {
    let mut labels = of_repl(&owner.user, &owner.repl);
    labels[REVISION] = revision.to_string().into();
    labels
}

/// That Secret's text.
pub fn given_data(variables: &Variables) -> BTreeMap<String, String> {
    let all = variables.all();
    all.map(|(name, value)| (env_key(name), value.to_owned()))
        .collect()
}

/// The name of the Secret with a release's own variables.
pub fn env_name(repl: &ReplId, release: u64) -> String {
    format!("{repl}-env-{release}")
}

/// The Secret with a release's own variables.
pub fn env_secret(
    namespace: &str,
    labels: &Value,
    name: &str,
    env: &BTreeMap<String, String>,
) -> Manifest {
    let metadata = json!({ "name": name, "namespace": namespace, "labels": labels });
    Manifest::new(
        Kind::Secret,
        json!({ "metadata": metadata, "type": "Opaque", "stringData": env }),
    )
}

/// Adds to a Deployment what makes it this release.
fn dress(body: &mut Value, owner: &Owner, stored: &Stored, drain: Duration) {
    let mut annotations = json!({
        SUBMISSION: stored.submission_id.to_string(),
        RELEASE: stored.release.to_string(),
        CODE_DIGEST: stored.code_digest,
        TESTS_DIGEST: stored.tests_digest,
        IMAGE: stored.image,
    });
    if let Some(given) = &stored.given {
        // Other variables are other pods.
        annotations[REVISION] = given.revision.to_string().into();
    }
    if stored.is_workspace() {
        // Two pods of a workspace would be edited apart.
        body["spec"]["strategy"] = json!({ "type": "Recreate" });
    }
    merge(body, "/metadata", "annotations", &annotations, true);
    if let Some(pod) = body.pointer_mut("/spec/template/spec") {
        let template = pod["terminationGracePeriodSeconds"].as_u64().unwrap_or(0);
        let needed = 2 * drain.as_secs() + BEFORE_AND_AFTER;
        pod["terminationGracePeriodSeconds"] = template.max(needed).into();
    }
    let path = "/spec/template/metadata";
    merge(body, path, "annotations", &annotations, true);
    // What the template says of these stands: its selector may name them.
    merge(
        body,
        path,
        "labels",
        &json!({ APP: super::labels::PROD }),
        false,
    );
    merge(
        body,
        path,
        "labels",
        &of_repl(&owner.user, &owner.repl),
        false,
    );
    let Some(containers) = body
        .pointer_mut("/spec/template/spec/containers")
        .and_then(Value::as_array_mut)
    else {
        return;
    };
    let program = containers
        .iter()
        .position(|c| c["name"] == PROGRAM_CONTAINER)
        .unwrap_or_default();
    if let Some(container) = containers.get_mut(program) {
        equip(container, owner, stored, drain);
    }
}

/// Gives the program's container its command and its variables.
fn equip(container: &mut Value, owner: &Owner, stored: &Stored, drain: Duration) {
    let argv = Value::from(stored.argv.clone()).to_string();
    let mut env = vec![
        json!({ "name": "GANTRY_APP_ARGV", "value": literal(&argv) }),
        json!({ "name": "PORT", "value": "3000" }),
        json!({ "name": "GANTRY_REPL", "value": owner.repl.as_str() }),
        json!({ "name": "GANTRY_RUNNER_KEY", "valueFrom": { "secretKeyRef": {
            "name": runner_name(&owner.repl), "key": RUNNER_KEY } } }),
    ];
    let seconds = drain.as_secs().to_string();
    env.push(json!({ "name": "GANTRY_DRAIN_SECONDS", "value": seconds }));
    if stored.is_workspace() {
        env.push(json!({ "name": "GANTRY_WORKSPACE", "value": "1" }));
    }
    if let Some(serves) = stored.serves {
        env.push(json!({ "name": "GANTRY_SERVES", "value": serves.as_str() }));
    }
    if stored.database {
        let key = json!({ "name": database_name(&owner.repl), "key": "DATABASE_URL" });
        env.push(json!({ "name": "DATABASE_URL", "valueFrom": { "secretKeyRef": key } }));
    }
    let from = |secret: String| {
        move |name: &String| {
            let key = json!({ "name": secret, "key": env_key(name) });
            json!({ "name": name, "valueFrom": { "secretKeyRef": key } })
        }
    };
    if let Some(given) = &stored.given {
        let names = given.env.iter().chain(&given.secrets);
        env.extend(names.map(from(given_name(&owner.repl, given.revision))));
    }
    let own = env_name(&owner.repl, stored.release);
    env.extend(stored.env_names.iter().map(from(own)));
    // Of two of one name the later one is meant.
    let mut named = HashSet::new();
    env.reverse();
    env.retain(|entry| named.insert(entry["name"].clone()));
    env.reverse();
    let ours: Vec<Value> = env.iter().map(|entry| entry["name"].clone()).collect();
    let known = container["env"].as_array().cloned().unwrap_or_default();
    let mut all: Vec<Value> = known
        .into_iter()
        .filter(|entry| !ours.contains(&entry["name"]))
        .collect();
    all.extend(env);
    container["env"] = all.into();
}

/// A variable may have a name that a Secret's key may not.
pub fn env_key(name: &str) -> String {
    use std::fmt::Write;
    let mut key = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'_' {
            key.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(key, ".{byte:02x}");
        }
    }
    key
}

/// A variable's value is searched for `$(NAME)` by the kubelet; `$$` stands for `$`.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

/// Adds fields to an object inside the body, which is made if it is not there.
fn merge(body: &mut Value, parent: &str, name: &str, fields: &Value, over: bool) {
    let (Some(parent), Some(fields)) = (body.pointer_mut(parent), fields.as_object()) else {
        return;
    };
    if !parent[name].is_object() {
        parent[name] = Value::Object(Map::new());
    }
    if let Some(target) = parent[name].as_object_mut() {
        for (name, value) in fields {
            if over || !target.contains_key(name) {
                target.insert(name.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::{Serves, SubmissionId};
    use crate::platform::kubernetes::record::{Given, StoredState};
    use crate::platform::kubernetes::template::BUILT_IN;
    use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
    use k8s_openapi::api::core::v1::PodSpec;

    fn config() -> ReleaseConfig {
        ReleaseConfig {
            template: Template::parse(BUILT_IN).unwrap(),
            runner_image: "gantry-runner:1".to_owned(),
            database_image: "postgres:16".to_owned(),
            bucket: "bucket".to_owned(),
            shared_keys: None,
            domain: "localhost".to_owned(),
            app_domain: "apps.localhost".to_owned(),
            sites: Sites::plain("apps.localhost", "localhost"),
            ingress_class: "nginx".to_owned(),
            wake_service: Some(WakeService {
                name: "gantry".to_owned(),
                port: 80,
            }),
            drain: Duration::from_secs(7),
        }
    }

    #[test]
    fn requests_to_an_idle_repl_come_to_the_server_by_each_of_its_hosts() {
        let made = config()
            .wake_ingress(&owner(), &stored(), "gantry")
            .unwrap();
        let ingress: k8s_openapi::api::networking::v1::Ingress =
            serde_json::from_value(made.body).unwrap();
        assert_eq!(ingress.metadata.namespace.as_deref(), Some("gantry"));
        // What a stop of a repl removes, and what the clean-up looks at, is by another label.
        assert!(!ingress.metadata.labels.unwrap().contains_key(REPL));
        let spec = ingress.spec.unwrap();
        let rules = spec.rules.unwrap();
        let hosts: Vec<_> = rules
            .iter()
            .map(|rule| rule.host.as_deref().unwrap())
            .collect();
        let expected = [
            "shop.example.com",
            "test-prod.apps.localhost",
            "test-prod.localhost",
        ];
        assert_eq!(hosts, expected);
        for rule in rules {
            let path = rule.http.unwrap().paths.remove(0);
            let service = path.backend.service.unwrap();
            assert_eq!(service.name, "gantry");
            assert_eq!(service.port.unwrap().number, Some(80));
        }
        let none = ReleaseConfig {
            wake_service: None,
            ..config()
        };
        assert!(none.wake_ingress(&owner(), &stored(), "gantry").is_none());
    }

    /// The TLS entries of a release's Ingress, and of the one while it is idle.
    fn tls(config: &ReleaseConfig) -> [Value; 2] {
        let manifests = config.manifests(&owner(), &stored(), None);
        let ingress = manifests.iter().find(|one| one.kind == Kind::Ingress);
        let idle = config.wake_ingress(&owner(), &stored(), "gantry").unwrap();
        [ingress.unwrap(), &idle].map(|one| one.body["spec"]["tls"].clone())
    }

    #[test]
    fn hosts_that_are_reached_by_https_have_tls_and_others_none() {
        assert_eq!(tls(&config()), [Value::Null, Value::Null]);
        let mut programs = config();
        programs.sites.programs.scheme = Scheme::Https;
        let of_program = json!([
            { "hosts": ["test-prod.apps.localhost"] }, { "hosts": ["shop.example.com"] },
        ]);
        let idle = json!([{ "hosts": ["test-prod.apps.localhost", "shop.example.com"] }]);
        assert_eq!(tls(&programs), [of_program, idle]);
        let mut both = programs.clone();
        both.sites.runners.scheme = Scheme::Https;
        assert_eq!(tls(&both)[0][0]["hosts"], json!(["test-prod.localhost"]));
        let url = both.url(&owner().repl);
        assert_eq!(url, "https://test-prod.apps.localhost/");
        let terminal = both.terminal_url(&owner().repl);
        assert_eq!(terminal, "wss://test-prod.localhost/");
        let made = both.manifests(&owner(), &stored(), None);
        let ingress = made.into_iter().find(|one| one.kind == Kind::Ingress);
        serde_json::from_value::<k8s_openapi::api::networking::v1::Ingress>(ingress.unwrap().body)
            .unwrap();
    }

    #[test]
    fn a_certificate_that_a_template_names_is_one_for_each_repl_and_domain() {
        let host = "    - hosts: [\"${GANTRY_APP_HOST}\"]\n";
        let named = BUILT_IN.replace(
            host,
            &format!("{host}      secretName: service_name-tls\n    - hosts: [fixed.example]\n"),
        );
        let mut config = ReleaseConfig {
            template: Template::parse(&named).unwrap(),
            ..config()
        };
        // What the operator wrote without a word stays as it is.
        assert_eq!(tls(&config)[0], json!([{ "hosts": ["fixed.example"] }]));
        config.sites.programs.scheme = Scheme::Https;
        let [entries, idle] = tls(&config);
        assert_eq!(entries[0]["secretName"], "test-prod-tls");
        assert_eq!(entries[2]["hosts"], json!(["shop.example.com"]));
        assert_eq!(entries[2]["secretName"], "test-prod-tls-shop.example.com");
        assert!(idle[0].get("secretName").is_none());
    }

    #[test]
    fn only_a_template_that_leads_to_the_runner_tells_when_a_repl_was_used() {
        assert!(config().sees_requests());
        let past = BUILT_IN.replace("targetPort: 3002", "targetPort: 3000");
        let past = ReleaseConfig {
            template: Template::parse(&past).unwrap(),
            ..config()
        };
        assert!(!past.sees_requests());
    }

    fn owner() -> Owner {
        Owner {
            user: "test".parse().unwrap(),
            repl: "test-prod".parse().unwrap(),
        }
    }

    fn stored() -> Stored {
        Stored {
            release: 7,
            submission_id: SubmissionId::new(),
            time: jiff::Timestamp::UNIX_EPOCH,
            state: StoredState::Pending,
            argv: vec!["python3".to_owned(), "$(HOME).py".to_owned()],
            env_names: vec!["A B".to_owned()],
            given: Some(Given {
                revision: 9,
                env: vec!["A B".to_owned(), "COLOUR".to_owned()],
                secrets: vec!["DATABASE_URL".to_owned()],
            }),
            domains: vec!["shop.example.com".parse().unwrap()],
            database: true,
            serves: Some(Serves::Yes),
            code_digest: "c0de".to_owned(),
            tests_digest: "7e57".to_owned(),
            image: "sha256:1".to_owned(),
        }
    }

    fn deployment() -> Deployment {
        let manifests = config().manifests(&owner(), &stored(), Some(3));
        let body = manifests
            .iter()
            .find(|m| m.kind == Kind::Deployment)
            .unwrap();
        serde_json::from_value(body.body.clone()).unwrap()
    }

    /// What Pod Security `restricted` asks for.
    fn assert_restricted(spec: &PodSpec) {
        let pod = spec.security_context.as_ref().unwrap();
        assert_eq!(pod.run_as_non_root, Some(true));
        assert_eq!(
            pod.seccomp_profile.as_ref().unwrap().type_,
            "RuntimeDefault"
        );
        assert_eq!(spec.automount_service_account_token, Some(false));
        let all = spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers);
        for container in all {
            let security = container.security_context.as_ref().unwrap();
            assert_eq!(
                security.allow_privilege_escalation,
                Some(false),
                "{}",
                container.name
            );
            let drop = security
                .capabilities
                .as_ref()
                .unwrap()
                .drop
                .as_ref()
                .unwrap();
            assert_eq!(drop, &["ALL".to_owned()]);
            assert!(container.resources.as_ref().unwrap().limits.is_some());
        }
    }

    #[test]
    fn a_release_says_what_was_tested_and_takes_over_without_a_gap() {
        let deployment = deployment();
        let annotations = deployment.metadata.annotations.unwrap();
        let said: Vec<&str> = [CODE_DIGEST, TESTS_DIGEST, IMAGE, RELEASE]
            .map(|name| annotations[name].as_str())
            .to_vec();
        assert_eq!(said, ["c0de", "7e57", "sha256:1", "7"]);
        assert_eq!(annotations[REVISION], "9");
        let spec = deployment.spec.unwrap();
        assert_eq!(spec.replicas, Some(3));
        let rolling = spec.strategy.unwrap().rolling_update.unwrap();
        assert_eq!(serde_json::to_value(rolling.max_unavailable).unwrap(), 0);
        let pod = spec.template.metadata.unwrap();
        let labels = pod.labels.unwrap();
        assert_eq!(
            (labels[APP].as_str(), labels[REPL].as_str()),
            ("prod", "test-prod")
        );
        for (name, value) in spec.selector.match_labels.unwrap() {
            assert_eq!(labels[&name], value);
        }
        let pod = spec.template.spec.unwrap();
        assert_eq!(pod.termination_grace_period_seconds, Some(18));
        assert_restricted(&pod);
    }

    #[test]
    fn a_program_gets_its_command_its_variables_and_its_database() {
        let spec = deployment().spec.unwrap().template.spec.unwrap();
        let container = spec
            .containers
            .iter()
            .find(|c| c.name == PROGRAM_CONTAINER)
            .unwrap();
        let env = serde_json::to_value(&container.env).unwrap();
        insta::assert_json_snapshot!(env, @r#"
        [
          {
            "name": "GANTRY_APP_ARGV",
            "value": "[\"python3\",\"$$(HOME).py\"]"
          },
          {
            "name": "PORT",
            "value": "3000"
          },
          {
            "name": "GANTRY_REPL",
            "value": "test-prod"
          },
          {
            "name": "GANTRY_RUNNER_KEY",
            "valueFrom": {
              "secretKeyRef": {
                "key": "KEY",
                "name": "test-prod-runner"
              }
            }
          },
          {
            "name": "GANTRY_DRAIN_SECONDS",
            "value": "7"
          },
          {
            "name": "GANTRY_SERVES",
            "value": "yes"
          },
          {
            "name": "COLOUR",
            "valueFrom": {
              "secretKeyRef": {
                "key": "COLOUR",
                "name": "test-prod-given-9"
              }
            }
          },
          {
            "name": "DATABASE_URL",
            "valueFrom": {
              "secretKeyRef": {
                "key": "DATABASE_URL",
                "name": "test-prod-given-9"
              }
            }
          },
          {
            "name": "A B",
            "valueFrom": {
              "secretKeyRef": {
                "key": "A.20B",
                "name": "test-prod-env-7"
              }
            }
          }
        ]
        "#);
    }

    #[test]
    fn no_pod_gets_a_key_of_the_code_store_unless_the_operator_shares_them() {
        let init = deployment().spec.unwrap().template.spec.unwrap();
        let init = init.init_containers.unwrap().remove(0);
        assert_eq!(
            init.command.as_deref(),
            Some(&["gantry-runner".to_owned(), "fetch".to_owned()][..])
        );
        assert!(init.env.is_none() && init.env_from.is_none(), "{init:?}");
        assert!(!config().needs_keys().unwrap());
        assert!(config().store_secret(&owner().user).is_none());
        let aws_cli = include_str!("../../../infrastructure/examples/aws-cli.yaml");
        let shared = ReleaseConfig {
            template: Template::parse(aws_cli).unwrap(),
            shared_keys: Some(BTreeMap::from([("AWS_REGION".to_owned(), "eu".to_owned())])),
            ..config()
        };
        assert!(shared.needs_keys().unwrap());
        let secret = shared.store_secret(&owner().user).unwrap();
        assert_eq!(secret.body["stringData"]["AWS_REGION"], "eu");
    }

    #[test]
    fn a_manifest_that_names_the_keys_is_known() {
        for with in [
            json!({ "envFrom": [{ "secretRef": { "name": STORE_SECRET } }] }),
            json!({ "env": [{ "valueFrom": { "secretKeyRef": { "name": STORE_SECRET, "key": "k" } } }] }),
            json!({ "volumes": [{ "secret": { "secretName": STORE_SECRET } }] }),
            json!({ "volumes": [{ "projected": { "sources": [{ "secret": { "name": STORE_SECRET } }] } }] }),
        ] {
            assert!(names_keys(&json!({ "spec": with })));
        }
        let other = json!({ "metadata": { "name": STORE_SECRET },
            "envFrom": [{ "secretRef": { "name": "other" } }] });
        assert!(!names_keys(&other));
    }

    #[test]
    fn a_workspace_is_made_of_the_current_files_and_stays() {
        let stored = Stored::workspace(vec!["true".to_owned()], String::new());
        assert_eq!(prefix(&owner().repl, &stored), "code/test-prod/");
        let manifests = config().manifests(&owner(), &stored, Some(1));
        let text = format!("{manifests:?}");
        assert!(text.contains("GANTRY_WORKSPACE"));
        let strategy = &manifests[1].body["spec"]["strategy"];
        assert_eq!(*strategy, json!({ "type": "Recreate" }));
    }

    #[test]
    fn a_database_is_restricted_and_its_volume_and_password_outlive_a_stop() {
        let [_, set] = config().database(&owner());
        let set: StatefulSet = serde_json::from_value(set.body).unwrap();
        let spec = set.spec.unwrap();
        assert_restricted(&spec.template.spec.unwrap());
        let claim = &spec.volume_claim_templates.unwrap()[0];
        assert_eq!(claim.metadata.labels.as_ref().unwrap()[KEEP], DATABASE);
        let secret = database_secret(&owner(), "p").body;
        assert_eq!(secret["metadata"]["labels"][KEEP], DATABASE);
        assert_eq!(
            secret["stringData"]["DATABASE_URL"],
            "postgresql://app:p@test-prod-db:5432/app"
        );
    }

    #[test]
    fn a_domain_leads_where_the_programs_host_does() {
        use k8s_openapi::api::networking::v1::Ingress;
        let manifests = config().manifests(&owner(), &stored(), None);
        let ingress = manifests.iter().find(|m| m.kind == Kind::Ingress).unwrap();
        let ingress: Ingress = serde_json::from_value(ingress.body.clone()).unwrap();
        let rules = ingress.spec.unwrap().rules.unwrap();
        let hosts: Vec<_> = rules
            .iter()
            .map(|rule| rule.host.clone().unwrap())
            .collect();
        let expected = [
            "test-prod.localhost",
            "test-prod.apps.localhost",
            "shop.example.com",
        ];
        assert_eq!(hosts, expected);
        assert_eq!(rules[1].http, rules[2].http);
        assert!(config().has_program_host().unwrap());
        let elsewhere = BUILT_IN.replace("${GANTRY_APP_HOST}", "service_name.example.org");
        let config = ReleaseConfig {
            template: Template::parse(&elsewhere).unwrap(),
            ..config()
        };
        assert!(!config.has_program_host().unwrap());
    }

    #[test]
    fn an_autoscaler_follows_the_processor_time_of_the_releases_deployment() {
        use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
        let auto = Autoscale {
            min: 1,
            max: 5,
            cpu_percent: 70,
        };
        let body = autoscaler(&owner(), "other", auto).body;
        let spec = serde_json::from_value::<HorizontalPodAutoscaler>(body)
            .unwrap()
            .spec
            .unwrap();
        assert_eq!((spec.min_replicas, spec.max_replicas), (Some(1), 5));
        assert_eq!(spec.scale_target_ref.name, "other");
        let target = &spec.metrics.unwrap()[0].resource.clone().unwrap().target;
        assert_eq!(target.average_utilization, Some(70));
    }

    #[test]
    fn a_template_of_another_keeps_its_own_labels() {
        let text = BUILT_IN
            .replace("app: prod", "app: service_name")
            .replace("- name: runner", "- name: web");
        let config = ReleaseConfig {
            template: Template::parse(&text).unwrap(),
            ..config()
        };
        let manifests = config.manifests(&owner(), &stored(), Some(3));
        let body = &manifests[1].body["spec"]["template"];
        assert_eq!(body["metadata"]["labels"][APP], "test-prod");
        assert_eq!(
            body["spec"]["containers"][0]["env"][0]["name"],
            "GANTRY_APP_ARGV"
        );
    }
}
