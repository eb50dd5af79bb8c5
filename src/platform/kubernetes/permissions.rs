//! What Gantry may do with the API server, and what it does: one table, which the role in
//! `infrastructure/` grants, the start asks about, and every request is counted against.

use std::task::{Context, Poll};

use axum::http::{Method, Request, Response, StatusCode, Uri};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use kube::client::Body;
use tower::{Layer, Service};

/// One permission: API group, resource (with its subresource), verb, and whether it is only needed in
/// the server's own namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Permission {
    /// The API group; "" is the core one.
    pub group: &'static str,
    /// `pods` or `pods/exec`.
    pub resource: &'static str,
    /// What is done with it.
    pub verb: &'static str,
    /// Needed in the server's own namespace only.
    pub own: bool,
}

/// An API group, a resource of it, and what is done with it.
type Row = (&'static str, &'static str, &'static [&'static str]);

const EVERYWHERE: [Row; 22] = [
    (
        "",
        "namespaces",
        &["list", "watch", "patch", "create", "delete"],
    ),
    ("", "resourcequotas", &["list", "watch", "patch", "create"]),
    ("", "limitranges", &["list", "watch", "patch", "create"]),
    ("", "serviceaccounts", &["list", "watch", "patch", "create"]),
    (
        "networking.k8s.io",
        "networkpolicies",
        &["list", "watch", "patch", "create"],
    ),
    ("", "pods", &["get", "list", "watch", "create", "delete"]),
    // A WebSocket upgrade is a GET; since Kubernetes 1.35 `create` is asked for as well.
    ("", "pods/exec", &["get", "create"]),
    ("", "pods/portforward", &["get", "create"]),
    ("", "pods/log", &["get"]),
    ("", "events", &["list"]),
    (
        "",
        "secrets",
        &["get", "create", "patch", "delete", "deletecollection"],
    ),
    (
        "",
        "services",
        &["list", "create", "patch", "deletecollection"],
    ),
    ("", "persistentvolumeclaims", &["list", "create", "delete"]),
    (
        "apps",
        "deployments",
        &["list", "watch", "create", "patch", "deletecollection"],
    ),
    (
        "apps",
        "statefulsets",
        &["list", "create", "patch", "deletecollection"],
    ),
    (
        "autoscaling",
        "horizontalpodautoscalers",
        &["list", "create", "patch", "delete", "deletecollection"],
    ),
    (
        "networking.k8s.io",
        "ingresses",
        &["list", "create", "patch", "deletecollection"],
    ),
    ("networking.k8s.io", "ingressclasses", &["list"]),
    ("apps", "daemonsets", &["list"]),
    ("", "nodes", &["list", "watch"]),
    ("coordination.k8s.io", "leases", &["list", "watch"]),
    ("scheduling.k8s.io", "priorityclasses", &["create", "patch"]),
];

const OWN: [Row; 3] = [
    (
        "",
        "configmaps",
        &["get", "list", "watch", "create", "update", "delete"],
    ),
    ("", "secrets", &["list"]),
    (
        "coordination.k8s.io",
        "leases",
        &["get", "create", "update"],
    ),
];

/// Everything Gantry does with the API server. `infrastructure/role.yaml` grants these and no others.
pub fn permissions() -> Vec<Permission> {
    let everywhere = EVERYWHERE.iter().map(|row| (row, false));
    let all = everywhere.chain(OWN.iter().map(|row| (row, true)));
    all.flat_map(|((group, resource, verbs), own)| {
        verbs.iter().map(move |verb| Permission {
            group,
            resource,
            verb,
            own,
        })
    })
    .collect()
}

/// Counts what requests need, as the API server's authorizer sees it.
#[derive(Debug, Clone, Copy)]
pub struct Counting;

impl<S> Layer<S> for Counting {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner }
    }
}

/// A way to the API server whose requests are counted.
#[derive(Debug, Clone)]
pub struct Counted<S> {
    inner: S,
}

impl<S, B> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // Every request, streams and watches included, whoever makes it.
        metrics::counter!("gantry_cluster_requests_total").increment(1);
        let needed = needed(request.method(), request.uri());
        let answer = self.inner.call(request);
        async move {
            let answer = answer.await;
            if let Some((verb, resource)) = needed {
                let created = |answer: &Response<B>| answer.status() == StatusCode::CREATED;
                // What is applied and was not there is created: the authorizer asks for both.
                if verb == "patch" && answer.as_ref().is_ok_and(created) {
                    count("create", resource.clone());
                }
                count(verb, resource);
            }
            answer
        }
        .boxed()
    }
}

fn count(verb: &'static str, resource: String) {
    metrics::counter!("gantry_cluster_permissions_total", "verb" => verb, "resource" => resource)
        .increment(1);
}

/// The verb and the resource (`pods/exec`, `deployments.apps`) of a request; `None` for what is no
/// resource, such as the version.
fn needed(method: &Method, uri: &Uri) -> Option<(&'static str, String)> {
    let mut parts = uri.path().trim_matches('/').split('/');
    let group = match parts.next()? {
        "api" => "",
        "apis" => parts.next()?,
        _ => return None,
    };
    // The version.
    parts.next()?;
    let rest: Vec<&str> = parts.collect();
    let (resource, name, sub) = match rest[..] {
        ["namespaces", _, resource] => (resource, None, None),
        ["namespaces", _, resource, name] => (resource, Some(name), None),
        ["namespaces", _, resource, name, sub, ..] => (resource, Some(name), Some(sub)),
        [resource] => (resource, None, None),
        [resource, name] => (resource, Some(name), None),
        _ => return None,
    };
    let watches = || {
        let mut pairs = uri.query().unwrap_or_default().split('&');
        pairs.any(|pair| matches!(pair, "watch" | "watch=1" | "watch=true"))
    };
    let verb = match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if name.is_none() => "deletecollection",
        Method::DELETE => "delete",
        _ if name.is_some() => "get",
        _ if watches() => "watch",
        _ => "list",
    };
    Some((verb, full_name(group, resource, sub)))
}

/// `pods/exec`, `deployments.apps`.
fn full_name(group: &str, resource: &str, sub: Option<&str>) -> String {
    let mut name = resource.to_owned();
    if let Some(sub) = sub {
        name = format!("{name}/{sub}");
    }
    if !group.is_empty() {
        name = format!("{name}.{group}");
    }
    name
}

impl Permission {
    /// Its resource as it is counted: `pods/exec`, `deployments.apps`.
    pub fn counted(&self) -> String {
        full_name(self.group, self.resource, None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeSet;

    #[test]
    fn no_permission_is_named_twice() {
        let all = permissions();
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one), "{one:?}");
        }
    }

    /// Group, resource, verb, whether in its own namespace only.
    type Granted = BTreeSet<(String, String, String, bool)>;

    fn granted(role: &str) -> Granted {
        let documents: Vec<Value> = serde_saphyr::from_multiple(role).unwrap();
        let texts = |rule: &Value, name: &str| -> Vec<String> {
            let list = rule[name].as_array().unwrap().iter();
            list.map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        let mut all = Granted::new();
        for role in &documents {
            let own = match role["kind"].as_str().unwrap() {
                "ClusterRole" => false,
                "Role" => true,
                _ => continue,
            };
            for rule in role["rules"].as_array().unwrap() {
                let fields = rule.as_object().unwrap().keys();
                assert_eq!(fields.len(), 3, "a rule with more than a verb says: {rule}");
                for group in texts(rule, "apiGroups") {
                    for resource in texts(rule, "resources") {
                        for verb in texts(rule, "verbs") {
                            all.insert((group.clone(), resource.clone(), verb, own));
                        }
                    }
                }
            }
        }
        all
    }

    #[test]
    fn the_role_grants_what_is_used_and_nothing_else() {
        let role = include_str!("../../../infrastructure/role.yaml");
        let wanted: Granted = permissions()
            .iter()
            .map(|p| {
                (
                    p.group.to_owned(),
                    p.resource.to_owned(),
                    p.verb.to_owned(),
                    p.own,
                )
            })
            .collect();
        let granted = granted(role);
        let lacking: Vec<_> = wanted.difference(&granted).collect();
        let unused: Vec<_> = granted.difference(&wanted).collect();
        assert!(
            lacking.is_empty() && unused.is_empty(),
            "lacking {lacking:?}, unused {unused:?}"
        );
    }

    #[test]
    fn a_request_is_counted_as_the_authorizer_sees_it() {
        let seen = |method: &str, uri: &str| {
            let needed = needed(&method.parse().unwrap(), &uri.parse().unwrap());
            needed.map(|(verb, resource)| format!("{verb} {resource}"))
        };
        let cases = [
            ("GET", "/api/v1/pods?labelSelector=a", "list pods"),
            ("GET", "/api/v1/pods?watch=true&x=1", "watch pods"),
            ("GET", "/api/v1/namespaces", "list namespaces"),
            (
                "PATCH",
                "/api/v1/namespaces/user-a?force",
                "patch namespaces",
            ),
            ("DELETE", "/api/v1/namespaces/user-a", "delete namespaces"),
            (
                "GET",
                "/api/v1/namespaces/a/pods/b/exec?command=x",
                "get pods/exec",
            ),
            ("POST", "/api/v1/namespaces/a/pods", "create pods"),
            (
                "DELETE",
                "/apis/apps/v1/namespaces/a/deployments?labelSelector=b",
                "deletecollection deployments.apps",
            ),
            (
                "PUT",
                "/apis/coordination.k8s.io/v1/namespaces/a/leases/b",
                "update leases.coordination.k8s.io",
            ),
        ];
        for (method, uri, expected) in cases {
            assert_eq!(seen(method, uri).as_deref(), Some(expected), "{uri}");
        }
        assert_eq!(seen("GET", "/version"), None);
    }
}
