//! The one way to the API server: every request has a bound, every failure says what it means.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::client::ConfigExt;
use kube::client::retry::RetryPolicy;
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client, Config};
use serde_json::{Value, json};
use tokio::time::timeout;
use tower::retry::RetryLayer;
use tower::{BoxError, ServiceBuilder};

use super::labels::{INSTALLATION, MANAGED};
use super::permissions::Counting;
use crate::model::Problem;
use crate::platform::{AWAY, PlatformError};

/// Field manager of everything Gantry applies (design.md §5).
pub const FIELD_MANAGER: &str = "gantry";

/// Longest wait for one answer of the API server, which gives a request 60 s itself but answers in
/// milliseconds when it is well. Streams (watch, exec, port-forward) are not bound by it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Objects asked for at a time: the API server's own tools ask for as many.
const LIST_PAGE: u32 = 500;

/// Longest wait for a connection to the API server; it is in the same network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What kinds of objects Gantry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A user's namespace, or the server's own.
    Namespace,
    /// The bound on all of a user's objects.
    ResourceQuota,
    /// Bounds and defaults of each container.
    LimitRange,
    /// Who may speak to whom.
    NetworkPolicy,
    /// Pods' identity; without token.
    ServiceAccount,
    /// Credentials and variables.
    Secret,
    /// A repl's record.
    ConfigMap,
    /// A test pod.
    Pod,
    /// A name for pods.
    Service,
    /// A database.
    StatefulSet,
    /// A release.
    Deployment,
    /// What changes a release's number of replicas by their processor time.
    HorizontalPodAutoscaler,
    /// A release's host names.
    Ingress,
    /// A database's volume.
    PersistentVolumeClaim,
    /// Which replica of the server does what only one may do.
    Lease,
    /// What comes first when places are short.
    PriorityClass,
}

impl Kind {
    /// Where the API server keeps it.
    pub fn resource(self) -> ApiResource {
        let (group, version, kind, plural) = match self {
            Kind::Namespace => ("", "v1", "Namespace", "namespaces"),
            Kind::ResourceQuota => ("", "v1", "ResourceQuota", "resourcequotas"),
            Kind::LimitRange => ("", "v1", "LimitRange", "limitranges"),
            Kind::NetworkPolicy => (
                "networking.k8s.io",
                "v1",
                "NetworkPolicy",
                "networkpolicies",
            ),
            Kind::ServiceAccount => ("", "v1", "ServiceAccount", "serviceaccounts"),
            Kind::Secret => ("", "v1", "Secret", "secrets"),
            Kind::ConfigMap => ("", "v1", "ConfigMap", "configmaps"),
            Kind::Pod => ("", "v1", "Pod", "pods"),
            Kind::Service => ("", "v1", "Service", "services"),
            Kind::StatefulSet => ("apps", "v1", "StatefulSet", "statefulsets"),
            Kind::Deployment => ("apps", "v1", "Deployment", "deployments"),
            Kind::HorizontalPodAutoscaler => (
                "autoscaling",
                "v2",
                "HorizontalPodAutoscaler",
                "horizontalpodautoscalers",
            ),
            Kind::Ingress => ("networking.k8s.io", "v1", "Ingress", "ingresses"),
            Kind::PersistentVolumeClaim => {
                ("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
            }
            Kind::Lease => ("coordination.k8s.io", "v1", "Lease", "leases"),
            Kind::PriorityClass => (
                "scheduling.k8s.io",
                "v1",
                "PriorityClass",
                "priorityclasses",
            ),
        };
        let api_version = if group.is_empty() {
            version.to_owned()
        } else {
            format!("{group}/{version}")
        };
        ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version,
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        }
    }
}

/// A manifest and what it is a manifest of.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// What.
    pub kind: Kind,
    /// All of it but `apiVersion` and `kind`.
    pub body: Value,
}

impl Manifest {
    /// A manifest; `apiVersion` and `kind` are filled in.
    pub fn new(kind: Kind, mut body: Value) -> Self {
        let resource = kind.resource();
        if let Some(map) = body.as_object_mut() {
            map.insert("apiVersion".to_owned(), resource.api_version.into());
            map.insert("kind".to_owned(), resource.kind.into());
        }
        Self { kind, body }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.body["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// Its namespace.
    pub fn namespace(&self) -> Option<&str> {
        self.body["metadata"]["namespace"].as_str()
    }
}

/// The API server.
#[derive(Clone)]
pub struct Cluster {
    /// For streams.
    pub client: Client,
    /// The server's own namespace, which is on everything this server makes: what another installation
    /// made is not this one's to remove.
    installation: Arc<str>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cluster")
    }
}

impl Cluster {
    /// The cluster that `KUBECONFIG` or the pod this runs in names, for the server of this namespace.
    pub async fn infer(installation: &str) -> anyhow::Result<Self> {
        let mut config = Config::infer().await.map_err(|error| {
            anyhow::anyhow!(
                "no cluster is configured: set KUBECONFIG, or run inside a cluster with a service account ({error})"
            )
        })?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // Streams are idle for as long as nobody submits; heartbeats tell whether they live.
        config.read_timeout = None;
        config.write_timeout = None;
        let tls = config.rustls_https_connector_with_connector(connector(&config))?;
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(tls);
        let busy = config.default_retry;
        let service = ServiceBuilder::new()
            .layer(Counting)
            .layer(config.base_uri_layer())
            .option_layer(busy.then(|| RetryLayer::new(RetryPolicy::server_retry())))
            .option_layer(config.auth_layer()?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .service(http);
        Ok(Self {
            client: Client::new(service, config.default_namespace),
            installation: installation.into(),
        })
    }

    /// One request, within its bound.
    pub async fn call<T>(
        &self,
        what: &str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Failure> {
        match timeout(REQUEST_TIMEOUT, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(Failure::new(what, error)),
            Err(_) => Err(Failure::silent(what)),
        }
    }

    /// Objects of a kind, in a namespace or cluster-wide.
    pub fn api(&self, kind: Kind, namespace: Option<&str>) -> Api<DynamicObject> {
        let resource = kind.resource();
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    /// Makes the object be as the manifest says, whatever it was.
    pub async fn apply(&self, manifest: &Manifest) -> Result<DynamicObject, Failure> {
        self.patch(manifest, PatchParams::apply(FIELD_MANAGER).force())
            .await
    }

    /// Whether the API server would take the manifest; nothing is stored.
    pub async fn would_apply(&self, manifest: &Manifest) -> Result<DynamicObject, Failure> {
        let params = PatchParams::apply(FIELD_MANAGER).force().dry_run();
        self.patch(manifest, params).await
    }

    async fn patch(
        &self,
        manifest: &Manifest,
        params: PatchParams,
    ) -> Result<DynamicObject, Failure> {
        let name = manifest.name();
        let what = format!("apply the {:?} {name}", manifest.kind);
        let api = self.api(manifest.kind, manifest.namespace());
        let params = params.validation_strict();
        let body = self.marked(manifest);
        self.call(&what, api.patch(name, &params, &Patch::Apply(&body)))
            .await
    }

    /// Makes the object; a conflict when it is there.
    pub async fn create(&self, manifest: &Manifest) -> Result<DynamicObject, Failure> {
        let name = manifest.name();
        let what = format!("create the {:?} {name}", manifest.kind);
        let api = self.api(manifest.kind, manifest.namespace());
        let object: DynamicObject = serde_json::from_value(self.marked(manifest))
            .map_err(|error| Failure::new(&what, kube::Error::SerdeError(error)))?;
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        self.call(&what, api.create(&params, &object)).await
    }

    /// The manifest with the label that says whose it is.
    fn marked(&self, manifest: &Manifest) -> Value {
        let mut body = manifest.body.clone();
        body["metadata"]["labels"][INSTALLATION] = self.installation.as_ref().into();
        body
    }

    /// Whether this installation made the object.
    pub fn made(&self, object: &DynamicObject) -> bool {
        let labels = object.metadata.labels.as_ref();
        let made_by = labels.and_then(|labels| labels.get(INSTALLATION));
        made_by.map(String::as_str) == Some(&*self.installation)
    }

    /// Selects what this installation made.
    pub fn made_here(&self) -> String {
        format!("{MANAGED},{INSTALLATION}={}", self.installation)
    }

    /// Every object of a kind with these labels, in a namespace or cluster-wide.
    pub async fn list(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        labels: &str,
    ) -> Result<Vec<DynamicObject>, Failure> {
        let api = self.api(kind, namespace);
        let what = format!("list the {kind:?}s with {labels}");
        let mut params = ListParams::default().labels(labels).limit(LIST_PAGE);
        let mut objects = Vec::new();
        loop {
            let page = self.call(&what, api.list(&params)).await?;
            objects.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(objects),
            }
        }
    }

    /// Sets one annotation of an object, and nothing else of it.
    pub async fn annotate(
        &self,
        (kind, namespace, object): (Kind, Option<&str>, &str),
        name: &str,
        value: &str,
    ) -> Result<(), Failure> {
        let api = self.api(kind, namespace);
        let patch = json!({ "metadata": { "annotations": { name: value } } });
        // Not `gantry`: what that one applies again without naming it, it removes.
        let params = PatchParams {
            field_manager: Some("gantry-use".to_owned()),
            ..PatchParams::default()
        };
        let what = format!("annotate the {kind:?} {object}");
        self.call(&what, api.patch(object, &params, &Patch::Merge(&patch)))
            .await
            .map(drop)
    }

    /// Removes a namespace and all that is in it, unless it was changed since it was read.
    pub async fn delete_namespace(&self, read: &DynamicObject) -> Result<(), Failure> {
        let name = read.metadata.name.clone().unwrap_or_default();
        let mut params = DeleteParams::background();
        params.preconditions = Some(Preconditions {
            resource_version: read.metadata.resource_version.clone(),
            uid: read.metadata.uid.clone(),
        });
        let what = format!("delete the namespace {name}");
        let api = self.api(Kind::Namespace, None);
        self.call(&what, api.delete(&name, &params)).await.map(drop)
    }

    /// The object, if it is there.
    pub async fn get(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Option<DynamicObject>, Failure> {
        let api = self.api(kind, Some(namespace));
        self.call(&format!("read the {kind:?} {name}"), api.get_opt(name))
            .await
    }

    /// Puts the object in the place of the one with its `resourceVersion`; a conflict when that has
    /// changed since.
    pub async fn replace(
        &self,
        kind: Kind,
        object: &DynamicObject,
    ) -> Result<DynamicObject, Failure> {
        let name = object.metadata.name.clone().unwrap_or_default();
        let api = self.api(kind, object.metadata.namespace.as_deref());
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let what = format!("update the {kind:?} {name}");
        self.call(&what, api.replace(&name, &params, object)).await
    }

    /// Removes the object; absent is well. `grace`: seconds its processes get.
    pub async fn delete(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        grace: Option<u32>,
    ) -> Result<(), Failure> {
        let api = self.api(kind, Some(namespace));
        let mut params = DeleteParams::background();
        params.grace_period_seconds = grace;
        let what = format!("delete the {kind:?} {name}");
        match self.call(&what, api.delete(name, &params)).await {
            Err(failure) if failure.is_not_found() => Ok(()),
            result => result.map(drop),
        }
    }

    /// Removes this life of the object; one that is gone, or another of the name, is well.
    pub async fn delete_life(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<(), Failure> {
        let life = Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        };
        self.delete_if(kind, namespace, name, life).await
    }

    /// Removes the object unless it was changed since it was read; one that is gone is well, too.
    pub async fn delete_as_read(&self, kind: Kind, object: &DynamicObject) -> Result<(), Failure> {
        let metadata = &object.metadata;
        let read = Preconditions {
            uid: metadata.uid.clone(),
            resource_version: metadata.resource_version.clone(),
        };
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let name = metadata.name.as_deref().unwrap_or_default();
        self.delete_if(kind, namespace, name, read).await
    }

    async fn delete_if(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        conditions: Preconditions,
    ) -> Result<(), Failure> {
        let api = self.api(kind, Some(namespace));
        let mut params = DeleteParams::background();
        params.preconditions = Some(conditions);
        let what = format!("delete the {kind:?} {name}");
        match self.call(&what, api.delete(name, &params)).await {
            Err(failure) if failure.is_not_found() || failure.is_conflict() => Ok(()),
            result => result.map(drop),
        }
    }

    /// Removes every object of a kind with these labels.
    pub async fn delete_all(
        &self,
        kind: Kind,
        namespace: &str,
        labels: &str,
    ) -> Result<(), Failure> {
        let api = self.api(kind, Some(namespace));
        let list = ListParams::default().labels(labels);
        let what = format!("delete the {kind:?}s with {labels}");
        let params = DeleteParams::background();
        let deleted = self.call(&what, api.delete_collection(&params, &list));
        match deleted.await {
            Err(failure) if failure.is_not_found() => Ok(()),
            result => result.map(drop),
        }
    }
}

/// Connections that send at once. kube's own wait with a small piece for the acknowledgement of the one
/// before (Nagle's algorithm), which the other side delays by 40 ms when it has nothing to say: a run
/// started right after another one would wait as long.
fn connector(config: &Config) -> HttpConnector {
    let mut connector = HttpConnector::new();
    // TLS is put around it.
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(config.connect_timeout);
    connector
}

/// Why the API server did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("could not {what}: {why}")]
pub struct Failure {
    what: String,
    why: String,
    /// The HTTP status, when it answered.
    pub code: Option<u16>,
}

impl Failure {
    /// What a failed request means.
    pub fn new(what: &str, error: kube::Error) -> Self {
        let (code, why) = match &error {
            kube::Error::Api(status) => (Some(status.code), status.message.clone()),
            other => (None, with_sources(other)),
        };
        Self {
            what: what.to_owned(),
            why,
            code,
        }
    }

    /// What was read is not what was written.
    pub fn damaged(what: &str, why: &dyn std::fmt::Display) -> Self {
        Self {
            what: what.to_owned(),
            why: why.to_string(),
            // As the API server says of what it cannot understand: to wait is no help.
            code: Some(422),
        }
    }

    /// The first list of a kind did not come.
    pub fn not_listed(kind: &str, within: Duration) -> Self {
        Self {
            what: format!("list every {kind}"),
            why: format!("the API server did not do so within {} s", within.as_secs()),
            code: None,
        }
    }

    fn silent(what: &str) -> Self {
        let seconds = REQUEST_TIMEOUT.as_secs();
        Self {
            what: what.to_owned(),
            why: format!("the API server did not answer within {seconds} s"),
            code: None,
        }
    }

    /// The object is not there.
    pub fn is_not_found(&self) -> bool {
        self.code == Some(404)
    }

    /// Somebody else made or changed it first.
    pub fn is_conflict(&self) -> bool {
        self.code == Some(409)
    }

    /// The namespace, or the object, is on its way out.
    pub fn is_terminating(&self) -> bool {
        self.code == Some(403) && self.why.contains("being terminated")
    }

    /// A quota was made this moment and has not been counted yet.
    pub fn is_uncounted(&self) -> bool {
        self.code == Some(403) && self.why.contains("status unknown for quota")
    }

    /// The API server cannot be reached or is not itself.
    pub fn is_away(&self) -> bool {
        self.code.is_none_or(|code| code == 429 || code >= 500)
    }

    /// What it means for who asked.
    pub fn problem(&self, message: &str) -> Problem {
        let (code, remediation) = match self.code {
            _ if self.is_away() => (
                AWAY,
                "Look whether the API server runs and can be reached; Gantry tries again by itself.",
            ),
            Some(403) if self.why.contains("exceeded quota") => (
                "quota_exceeded",
                "Stop a repl that is not needed, or ask the operator for a larger quota.",
            ),
            Some(403) => (
                "cluster_forbidden",
                "Give Gantry's service account what the message names; infrastructure/ has the whole role.",
            ),
            Some(400 | 422) => (
                "manifest_refused",
                "Mend the manifest template, or Gantry's settings that the message names.",
            ),
            _ => ("cluster_refused", "Look at the server's log and try again."),
        };
        Problem::new(code, message, self.to_string(), remediation)
    }

    /// The same as a platform's error.
    pub fn unavailable(&self, message: &str) -> PlatformError {
        PlatformError::Unavailable(self.problem(message))
    }
}

/// An error with all that caused it: hyper's own words say little.
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}
