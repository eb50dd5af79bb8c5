//! What a module becomes in a cluster: a Deployment, a Service, and what goes with them. No I/O.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::model::{
    Autoscale, Limits, ModuleName, ModuleSpec, Package, Scale, Scheme, UserId, patient,
};
use crate::platform::kubernetes::cluster::{Kind, Manifest};
use crate::platform::kubernetes::labels::{
    APP, AUTHORITY, MODULE, MODULE_OF, PACKAGE_CACHE, PACKAGES, of_user,
};
use crate::platform::kubernetes::namespace::{MODULE_PORT, PROGRAM_ACCOUNT};

use super::direct::{service_annotations, token_variable};

/// The container that installs packages.
pub const INSTALLER: &str = "packages";

/// Value of [`APP`] on modules' pods.
const APP_MODULE: &str = "module";

/// What the server and the module itself may take beside the calls, as on the local platform.
const SERVER_MEMORY: u64 = 256 << 20;

/// Room for installed packages, and for what pip unpacks on the way.
const PACKAGES_ROOM: &str = "2Gi";

/// Room for what pip has fetched for all of a user's modules.
const CACHE_ROOM: &str = "5Gi";

/// Hexadecimal digits of a set's name in a label, which has at most 63 characters.
const LABEL_DIGITS: usize = 60;

/// How long a call may go on after its pod was asked to end.
const GRACE_SECONDS: u32 = 10;

/// Where packages come from.
#[derive(Debug, Clone, Default)]
pub struct PipIndex {
    /// pip's variables: which index. No password is among them: a package may bring code that pip runs, which reads
    /// what pip could. `None`: the operator does not allow packages.
    pub variables: Option<BTreeMap<String, String>>,
    /// Where it is, for network policies; `None`: somewhere on the internet.
    pub addresses: Option<Vec<(IpAddr, u16)>>,
    /// The storage class of the volume that keeps what was fetched, one for each user; `None`: every pod
    /// fetches for itself.
    pub cache_class: Option<String>,
}

/// What a module is to be, kept with its Deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub module: ModuleName,
    pub packages: Vec<Package>,
    pub scale: Scale,
    pub since: Timestamp,
    /// Nobody called it for long; the next call starts it again.
    #[serde(default)]
    pub stopped: bool,
}

impl Stored {
    /// What is wanted, with what is left out filled in.
    pub fn merged(spec: &ModuleSpec, known: Option<Stored>) -> Self {
        let known = known.unwrap_or_else(|| Stored {
            module: spec.name.clone(),
            packages: Vec::new(),
            scale: Scale::Fixed { replicas: 1 },
            since: Timestamp::now(),
            stopped: false,
        });
        Self {
            packages: spec.packages.clone().unwrap_or(known.packages),
            scale: spec.scale.unwrap_or(known.scale),
            stopped: false,
            ..known
        }
    }

    /// How many pods there are to be when there are `now`.
    pub fn replicas(&self, now: Option<u32>) -> u32 {
        match self.stopped {
            true => 0,
            false => self.scale.replicas(now.filter(|now| *now > 0)),
        }
    }

    /// The label of pods with these packages; `None` without any.
    pub fn packages_label(&self) -> Option<String> {
        let set = Package::set(&self.packages);
        let mut name = Package::set_name(&set, &[]);
        name.truncate(LABEL_DIGITS);
        (!set.is_empty()).then_some(name)
    }

    /// Scaled by processor time.
    pub fn autoscale(&self) -> Option<Autoscale> {
        match self.scale {
            Scale::Auto(auto) => Some(auto),
            Scale::Fixed { .. } => None,
        }
    }
}

/// What every module of an installation is made with.
#[derive(Debug, Clone)]
pub struct Making {
    /// The runner image.
    pub image: String,
    /// The most a run may ask for.
    pub maximum: Limits,
    /// Where packages come from.
    pub index: PipIndex,
    /// Modules' hosts are below it.
    pub app_domain: String,
    /// How what is below it is reached.
    pub app_scheme: Scheme,
    /// The ingress controller's class.
    pub ingress_class: String,
}

/// The name of everything of a module's.
pub fn name_of(module: &ModuleName) -> String {
    format!("module-{}", module.label())
}

/// The name of the Secret with which earlier versions gave pip its variables.
pub fn former_index_secret(module: &ModuleName) -> String {
    format!("{}-index", name_of(module))
}

/// The volume with what pip has fetched.
const CACHE: &str = "gantry-package-cache";

/// Labels of everything of a module's.
pub fn labels(user: &UserId, module: &ModuleName) -> Value {
    let mut labels = of_user(user);
    labels[MODULE] = module.label().into();
    labels[APP] = APP_MODULE.into();
    labels
}

fn bytes(bytes: u64) -> Value {
    bytes.to_string().into()
}

fn variables<'a>(all: impl IntoIterator<Item = (&'a str, String)>) -> Vec<Value> {
    let all = all.into_iter();
    all.map(|(name, value)| json!({ "name": name, "value": value }))
        .collect()
}

fn mount(volume: &str, path: &str, read_only: bool) -> Value {
    json!({ "name": volume, "mountPath": path, "readOnly": read_only })
}

/// No root, no more rights, and nothing of the image written.
fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
    })
}

impl Making {
    /// Everything of a module's but its token, in the order it is applied: the Deployment is last, so that where
    /// it is the rest is, too.
    pub fn manifests(
        &self,
        user: &UserId,
        stored: &Stored,
        replicas: u32,
    ) -> anyhow::Result<Vec<Manifest>> {
        let mut all = Vec::new();
        if !stored.packages.is_empty() {
            all.extend(self.cache(user));
        }
        all.push(service(user, &stored.module));
        all.push(self.ingress(user, &stored.module));
        all.extend(
            stored
                .autoscale()
                .map(|auto| autoscaler(user, &stored.module, auto)),
        );
        all.push(self.deployment(user, stored, replicas)?);
        Ok(all)
    }

    fn deployment(
        &self,
        user: &UserId,
        stored: &Stored,
        replicas: u32,
    ) -> anyhow::Result<Manifest> {
        let labels = labels(user, &stored.module);
        let mut of_pods = labels.clone();
        if let Some(packages) = stored.packages_label() {
            of_pods[PACKAGES] = packages.into();
        }
        let selector = selector(&stored.module);
        let kept = serde_json::to_string(stored)?;
        let authority = self.authority(user, &stored.module);
        let body = json!({
            "metadata": {
                "name": name_of(&stored.module),
                "namespace": user.namespace(),
                "labels": labels,
                "annotations": { MODULE_OF: kept, AUTHORITY: authority },
            },
            "spec": {
                "replicas": replicas,
                "revisionHistoryLimit": 1,
                // Those that serve go when others have come up.
                "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
                "selector": { "matchLabels": selector },
                "template": { "metadata": { "labels": of_pods }, "spec": self.pod(stored, &selector) },
            },
        });
        Ok(Manifest::new(Kind::Deployment, body))
    }

    fn pod(&self, stored: &Stored, selector: &Value) -> Value {
        let room = bytes(self.maximum.file_bytes.max(64 << 20));
        let empty =
            |name: &str, room: &Value| json!({ "name": name, "emptyDir": { "sizeLimit": room } });
        let mut volumes = vec![empty("workspace", &room), empty("tmp", &room)];
        let mut pod = json!({
            "serviceAccountName": PROGRAM_ACCOUNT,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "topologySpreadConstraints": [{
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": { "matchLabels": selector },
            }],
            "containers": [self.server(stored)],
        });
        if !stored.packages.is_empty() {
            volumes.push(empty("packages", &PACKAGES_ROOM.into()));
            volumes.push(empty("install", &PACKAGES_ROOM.into()));
            if self.index.cache_class.is_some() {
                volumes.push(
                    json!({ "name": "cache", "persistentVolumeClaim": { "claimName": CACHE } }),
                );
            }
            pod["initContainers"] = json!([self.installer(stored)]);
        }
        pod["volumes"] = volumes.into();
        pod
    }

    /// The module's server.
    fn server(&self, stored: &Stored) -> Value {
        let memory = self.maximum.memory_bytes;
        let with_packages = !stored.packages.is_empty();
        let packages = if with_packages {
            "/packages"
        } else {
            "/opt/gantry/packages"
        };
        let mut env = vec![token_variable(&stored.module)];
        env.extend(variables([
            ("MODULE_NAME", stored.module.to_string()),
            ("PORT", MODULE_PORT.to_string()),
            ("MODULE_PACKAGES", packages.to_owned()),
            ("MODULE_CALL_MEMORY_BYTES", (memory / 2).to_string()),
            ("MODULE_MEMORY_BYTES", memory.to_string()),
            (
                "PYTHONPATH",
                "/opt/gantry/server:/opt/gantry/tools".to_owned(),
            ),
            // What a call writes to its folder is nothing that the next one imports.
            ("PYTHONSAFEPATH", "1".to_owned()),
            ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
            // A call has a processor; threads for more of them only cost memory.
            ("OPENBLAS_NUM_THREADS", "1".to_owned()),
            ("OMP_NUM_THREADS", "1".to_owned()),
            ("HOME", "/workspace".to_owned()),
        ]));
        let mut mounts = vec![
            mount("workspace", "/workspace", false),
            mount("tmp", "/tmp", false),
        ];
        if with_packages {
            mounts.push(mount("packages", "/packages", true));
        }
        json!({
            "name": APP_MODULE,
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "command": ["python3", "-m", "gantry_module"],
            "workingDir": "/workspace",
            "env": env,
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "ports": [{ "name": "grpc", "containerPort": MODULE_PORT, "protocol": "TCP" }],
            "resources": {
                "requests": { "cpu": "100m", "memory": "128Mi" },
                "limits": { "cpu": "2", "memory": bytes(memory + SERVER_MEMORY) },
            },
            "securityContext": container_security(),
            "volumeMounts": mounts,
            "readinessProbe": {
                "grpc": { "port": MODULE_PORT },
                "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 3,
            },
            // Not gRPC: with all of its threads in calls it lives.
            "livenessProbe": {
                "tcpSocket": { "port": MODULE_PORT },
                "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6,
            },
        })
    }

    /// What installs packages before the server starts. A package's metadata may name another by its URL, and pip
    /// runs what that brings: the container has no credentials, no rights, and nothing that another user's has.
    fn installer(&self, stored: &Stored) -> Value {
        let mut command: Vec<String> = patient().map(str::to_owned).to_vec();
        let pip = [
            "python3",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
            "--no-warn-script-location",
            "--progress-bar",
            "off",
            "--target",
            "/packages",
        ];
        command.extend(pip.map(str::to_owned));
        let mut mounts = vec![
            mount("packages", "/packages", false),
            mount("install", "/install", false),
        ];
        match self.index.cache_class {
            Some(_) => {
                mounts.push(mount("cache", "/cache", false));
                command.extend(["--cache-dir", "/cache"].map(str::to_owned));
            }
            None => command.push("--no-cache-dir".to_owned()),
        }
        command.extend(Package::set(&stored.packages));
        let own = [("HOME", "/install"), ("TMPDIR", "/install")];
        let own = own.map(|(name, value)| (name, value.to_owned()));
        let index = self.index.variables.iter().flatten();
        let index = index.map(|(name, value)| (name.as_str(), value.clone()));
        json!({
            "name": INSTALLER,
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "command": command,
            "workingDir": "/install",
            "env": variables(own.into_iter().chain(index)),
            // Its last words say why.
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "resources": {
                "requests": { "cpu": "100m", "memory": "128Mi" },
                "limits": { "cpu": "1", "memory": "512Mi" },
            },
            "securityContext": container_security(),
            "volumeMounts": mounts,
        })
    }

    /// The volume with what pip has fetched; it is all of a user's modules' and stays when one goes.
    fn cache(&self, user: &UserId) -> Option<Manifest> {
        let class = self.index.cache_class.as_ref()?;
        let mut labels = of_user(user);
        labels[PACKAGE_CACHE] = "pip".into();
        let body = json!({
            "metadata": { "name": CACHE, "namespace": user.namespace(), "labels": labels },
            "spec": {
                "storageClassName": class,
                // Pods of several modules, on several nodes.
                "accessModes": ["ReadWriteMany"],
                "resources": { "requests": { "storage": CACHE_ROOM } },
            },
        });
        Some(Manifest::new(Kind::PersistentVolumeClaim, body))
    }
}

fn selector(module: &ModuleName) -> Value {
    json!({ MODULE: module.label(), APP: APP_MODULE })
}

/// For clients in the cluster, and for an ingress controller, which `appProtocol` tells that it is HTTP/2.
fn service(user: &UserId, module: &ModuleName) -> Manifest {
    let body = json!({
        "metadata": {
            "name": name_of(module),
            "namespace": user.namespace(),
            "labels": labels(user, module),
            "annotations": service_annotations(),
        },
        "spec": {
            "selector": selector(module),
            "ports": [{
                "name": "grpc", "port": MODULE_PORT, "targetPort": MODULE_PORT, "protocol": "TCP",
                "appProtocol": "kubernetes.io/h2c",
            }],
        },
    });
    Manifest::new(Kind::Service, body)
}

fn autoscaler(user: &UserId, module: &ModuleName, auto: Autoscale) -> Manifest {
    let target = Kind::Deployment.resource();
    let body = json!({
        "metadata": {
            "name": name_of(module),
            "namespace": user.namespace(),
            "labels": labels(user, module),
        },
        "spec": {
            "scaleTargetRef": {
                "apiVersion": target.api_version, "kind": target.kind, "name": name_of(module),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use k8s_openapi::api::apps::v1::Deployment;
    use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
    use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Service};
    use k8s_openapi::api::networking::v1::Ingress;

    fn made(packages: &[&str], scale: Scale, cache: bool) -> Vec<Manifest> {
        let packages = packages.iter().map(|one| (*one).to_owned());
        let stored = Stored {
            module: "xml.etree".parse().unwrap(),
            packages: packages
                .map(|one| Package::try_from(one).unwrap())
                .collect(),
            scale,
            since: Timestamp::UNIX_EPOCH,
            stopped: false,
        };
        let index = "https://index.example/simple".to_owned();
        let making = Making {
            image: "gantry-runner:1".to_owned(),
            maximum: Limits::MAXIMUM,
            index: PipIndex {
                variables: Some([("PIP_INDEX_URL".to_owned(), index)].into()),
                addresses: None,
                cache_class: cache.then(|| "shared".to_owned()),
            },
            app_domain: "apps.example".to_owned(),
            app_scheme: Scheme::Https,
            ingress_class: "nginx".to_owned(),
        };
        let user = "test".parse().unwrap();
        making
            .manifests(&user, &stored, stored.replicas(None))
            .unwrap()
    }

    fn kinds(all: &[Manifest]) -> Vec<Kind> {
        all.iter().map(|manifest| manifest.kind).collect()
    }

    fn typed(manifest: &Manifest) {
        let body = manifest.body.clone();
        match manifest.kind {
            Kind::Deployment => drop(serde_json::from_value::<Deployment>(body).unwrap()),
            Kind::Service => drop(serde_json::from_value::<Service>(body).unwrap()),
            Kind::Ingress => drop(serde_json::from_value::<Ingress>(body).unwrap()),
            Kind::HorizontalPodAutoscaler => {
                drop(serde_json::from_value::<HorizontalPodAutoscaler>(body).unwrap());
            }
            Kind::PersistentVolumeClaim => {
                drop(serde_json::from_value::<PersistentVolumeClaim>(body).unwrap());
            }
            other => panic!("nothing of a module's is a {other:?}"),
        }
    }

    #[test]
    fn a_module_has_a_service_a_host_and_a_deployment_which_is_applied_last() {
        let plain = made(&[], Scale::Fixed { replicas: 3 }, true);
        assert_eq!(
            kinds(&plain),
            [Kind::Service, Kind::Ingress, Kind::Deployment]
        );
        assert_eq!(plain[2].body["spec"]["replicas"], 3);
        let auto = Autoscale {
            min: 2,
            max: 5,
            cpu_percent: 70,
        };
        let all = made(&["a==1"], Scale::Auto(auto), true);
        let expected = [
            Kind::PersistentVolumeClaim,
            Kind::Service,
            Kind::Ingress,
            Kind::HorizontalPodAutoscaler,
            Kind::Deployment,
        ];
        assert_eq!(kinds(&all), expected);
        assert_eq!(all[4].body["spec"]["replicas"], 2);
        plain.iter().chain(&all).for_each(typed);
    }

    #[test]
    fn a_modules_pod_has_no_token_and_no_rights_and_its_installer_no_secret() {
        let all = made(&["a==1"], Scale::Fixed { replicas: 1 }, false);
        let deployment = &all.last().unwrap().body;
        let pod = &deployment["spec"]["template"]["spec"];
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        for list in ["containers", "initContainers"] {
            let container = &pod[list][0];
            assert_eq!(container["securityContext"], container_security());
            assert!(container["resources"]["limits"]["memory"].is_string());
        }
        let installer = &pod["initContainers"][0];
        let env = installer["env"].as_array().unwrap();
        assert!(
            env.iter().all(|one| one.get("valueFrom").is_none()),
            "{env:?}"
        );
        assert!(
            env.iter().any(|one| one["name"] == "PIP_INDEX_URL"),
            "{env:?}"
        );
        assert_eq!(installer.get("envFrom"), None);
        let mounts = installer["volumeMounts"].as_array().unwrap();
        let mounts: Vec<&str> = mounts
            .iter()
            .map(|one| one["name"].as_str().unwrap())
            .collect();
        assert_eq!(mounts, ["packages", "install"]);
        for volume in pod["volumes"].as_array().unwrap() {
            assert!(volume.get("emptyDir").is_some(), "{volume}");
        }
        let command = pod["initContainers"][0]["command"].as_array().unwrap();
        assert_eq!(command.last().unwrap(), "a==1");
        assert!(command.contains(&json!("--no-cache-dir")));
    }

    #[test]
    fn the_ingress_leads_the_modules_host_to_its_service_by_http_2() {
        let all = made(&[], Scale::Fixed { replicas: 1 }, false);
        let [service, ingress, deployment] = &all[..] else {
            panic!("{all:?}");
        };
        let rule = &ingress.body["spec"]["rules"][0];
        let tls = &ingress.body["spec"]["tls"];
        assert_eq!(tls[0]["hosts"][0], rule["host"]);
        let host = rule["host"].as_str().unwrap();
        assert!(host.ends_with(".apps.example"), "{host}");
        let told = &deployment.body["metadata"]["annotations"][AUTHORITY];
        assert_eq!(told, host);
        let backend = &rule["http"]["paths"][0]["backend"]["service"];
        let port = &service.body["spec"]["ports"][0];
        assert_eq!(backend["name"], service.name());
        assert_eq!(backend["port"]["number"], port["port"]);
        assert_eq!(port["appProtocol"], "kubernetes.io/h2c");
        let protocol = "nginx.ingress.kubernetes.io/backend-protocol";
        assert_eq!(ingress.body["metadata"]["annotations"][protocol], "GRPC");
        let scheme = "traefik.ingress.kubernetes.io/service.serversscheme";
        assert_eq!(service.body["metadata"]["annotations"][scheme], "h2c");
    }

    #[test]
    fn a_server_does_not_start_without_its_token_which_comes_from_a_secret() {
        let all = made(&[], Scale::Fixed { replicas: 1 }, false);
        let pod = &all.last().unwrap().body["spec"]["template"]["spec"];
        let env = pod["containers"][0]["env"].as_array().unwrap();
        let token = env.iter().find(|one| one["name"] == "MODULE_TOKEN");
        let from = &token.unwrap()["valueFrom"]["secretKeyRef"];
        assert!(from["name"].as_str().unwrap().ends_with("-token"), "{from}");
        assert_eq!(from.get("optional"), None);
    }

    #[test]
    fn pods_tell_which_packages_they_have_and_order_does_not_matter() {
        let label = |packages: &[&str]| {
            let all = made(packages, Scale::Fixed { replicas: 1 }, false);
            all.last().unwrap().body["spec"]["template"]["metadata"]["labels"][PACKAGES].clone()
        };
        assert_eq!(label(&[]), Value::Null);
        assert_eq!(label(&["a==1", "b==2"]), label(&["b==2", "a==1"]));
        assert_eq!(label(&["A_b==1"]), label(&["a-b==1"]));
        assert_ne!(label(&["a==1"]), label(&["a==2"]));
    }

    #[test]
    fn a_stopped_module_has_no_pods_and_comes_back_as_it_was() {
        let spec = ModuleSpec {
            name: "math".parse().unwrap(),
            packages: None,
            scale: Some(Scale::Fixed { replicas: 3 }),
        };
        let mut stored = Stored::merged(&spec, None);
        stored.stopped = true;
        assert_eq!(stored.replicas(Some(3)), 0);
        let wake = ModuleSpec {
            scale: None,
            ..spec
        };
        assert_eq!(Stored::merged(&wake, Some(stored)).replicas(Some(0)), 3);
    }
}
