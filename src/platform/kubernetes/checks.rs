//! What is looked at before the server serves: it stops on what it cannot work without.

use futures_util::future::join_all;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::networking::v1::IngressClass;
use kube::Api;
use kube::api::{ListParams, PostParams};

use super::cluster::{Cluster, Failure};
use super::permissions::{Permission, permissions};
use crate::platform::{Check, Finding};

/// The oldest API server whose fields the manifests use: a `sleep` before a pod stops needs 1.30.
const OLDEST: (u32, u32) = (1, 30);

/// Looks at the cluster. `own`: the server's namespace.
pub async fn look(cluster: &Cluster, own: &str, ingress_class: &str) -> Vec<Check> {
    let version = version(cluster).await;
    let reached = version.finding != Finding::Missing;
    let mut checks = vec![version];
    if !reached {
        return checks;
    }
    let (rights, class, policies) = tokio::join!(
        rights(cluster, own),
        class(cluster, ingress_class),
        policies(cluster)
    );
    checks.extend([rights, class, policies]);
    checks
}

fn check(name: &'static str, finding: Finding, detail: impl Into<String>) -> Check {
    Check {
        name,
        finding,
        detail: detail.into(),
    }
}

async fn version(cluster: &Cluster) -> Check {
    let name = "API server";
    let answer = cluster.call("ask for the version", cluster.client.apiserver_version());
    let version = match answer.await {
        Ok(version) => version,
        Err(failure) => return check(name, Finding::Missing, failure.to_string()),
    };
    // Some distributions write "34+".
    let number = |text: &str| {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        digits.parse::<u32>().unwrap_or(0)
    };
    let found = (number(&version.major), number(&version.minor));
    if found >= OLDEST {
        check(name, Finding::Good, version.git_version)
    } else {
        let (major, minor) = OLDEST;
        let detail = format!("{} is older than {major}.{minor}", version.git_version);
        check(name, Finding::Missing, detail)
    }
}

/// Asks for each right by itself: a role that lacks one is told by name, not met in the middle of a
/// deploy.
async fn rights(cluster: &Cluster, own: &str) -> Check {
    let name = "permissions";
    let permissions = permissions();
    let answers = permissions.iter().map(|p| allowed(cluster, *p, own));
    let mut lacking = Vec::new();
    for (permission, answer) in permissions.iter().zip(join_all(answers).await) {
        match answer {
            Ok(true) => {}
            Ok(false) => {
                let place = if permission.own {
                    " in its own namespace"
                } else {
                    ""
                };
                lacking.push(format!(
                    "{} {}{place}",
                    permission.verb, permission.resource
                ));
            }
            Err(failure) => return check(name, Finding::Missing, failure.to_string()),
        }
    }
    if lacking.is_empty() {
        let detail = format!("all {} that are used", permissions.len());
        return check(name, Finding::Good, detail);
    }
    let detail = format!(
        "Gantry's account may not: {}. infrastructure/ has the whole role",
        lacking.join(", ")
    );
    check(name, Finding::Missing, detail)
}

async fn allowed(cluster: &Cluster, permission: Permission, own: &str) -> Result<bool, Failure> {
    let mut parts = permission.resource.split('/');
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some(permission.group.to_owned()),
                resource: parts.next().map(str::to_owned),
                subresource: parts.next().map(str::to_owned),
                verb: Some(permission.verb.to_owned()),
                namespace: permission.own.then(|| own.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let api: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let params = PostParams::default();
    let asked = cluster.call("ask what is allowed", api.create(&params, &review));
    Ok(asked.await?.status.is_some_and(|status| status.allowed))
}

async fn class(cluster: &Cluster, wanted: &str) -> Check {
    let name = "ingress class";
    let api: Api<IngressClass> = Api::all(cluster.client.clone());
    let params = ListParams::default();
    let listed = cluster.call("list ingress classes", api.list(&params));
    let classes: Vec<String> = match listed.await {
        Ok(list) => list
            .items
            .into_iter()
            .filter_map(|c| c.metadata.name)
            .collect(),
        Err(failure) => return check(name, Finding::Missing, failure.to_string()),
    };
    if classes.iter().any(|class| class == wanted) {
        return check(name, Finding::Good, wanted);
    }
    // Some controllers serve a class that nobody declared.
    let known = if classes.is_empty() {
        "none".to_owned()
    } else {
        classes.join(", ")
    };
    let detail = format!(
        "no IngressClass is named {wanted:?} (there is: {known}); programs are served through it only if a controller takes it all the same. Set INGRESS_CLASS"
    );
    check(name, Finding::Weaker, detail)
}

/// Names of the agents of network plugins that enforce policies.
const ENFORCING: [&str; 7] = [
    "calico-node",
    "cilium",
    "antrea-agent",
    "kube-router",
    "weave-net",
    "aws-node",
    "canal",
];

/// Whether network policies are more than words. The API server does not know: it stores them either
/// way. So the agents of plugins that are known to enforce them are looked for.
async fn policies(cluster: &Cluster) -> Check {
    use k8s_openapi::api::apps::v1::DaemonSet;
    let name = "network policies";
    let api: Api<DaemonSet> = Api::all(cluster.client.clone());
    let params = ListParams::default();
    let listed = match cluster.call("list network agents", api.list(&params)).await {
        Ok(list) => list.items,
        Err(failure) => return check(name, Finding::Weaker, failure.to_string()),
    };
    let mut names = listed.into_iter().filter_map(|set| set.metadata.name);
    match names.find(|name| ENFORCING.contains(&name.as_str())) {
        Some(agent) => check(name, Finding::Good, format!("enforced by {agent}")),
        None => check(
            name,
            Finding::Weaker,
            "no network plugin that is known to enforce them was found: test runs are kept off the network by the runner alone, released programs not at all",
        ),
    }
}
