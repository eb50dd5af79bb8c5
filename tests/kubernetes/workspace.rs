//! Repls that are started from what is in the bucket, on the bed.

use std::collections::BTreeMap;

use gantry::model::{RelativePath, ReplId, ReplState, SubmissionId, UserId};
use gantry::platform::{Platform, PlatformError, WorkspaceSpec};
use gantry::storage::CodeStore;
use kube::api::{DynamicObject, ListParams};
use kube::core::ApiResource;
use kube::discovery::{Discovery, Scope};
use kube::{Api, ResourceExt};

use super::bed::{Bed, SERVER, eventually};

fn spec(user: &UserId, repl: &ReplId) -> WorkspaceSpec {
    WorkspaceSpec {
        user_id: user.clone(),
        repl_id: repl.clone(),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
    }
}

/// Puts a program where another service would.
async fn put(bed: &Bed, repl: &ReplId, code: &str) {
    let path = RelativePath::try_from("main.py".to_owned()).unwrap();
    let files = BTreeMap::from([(path, code.to_owned())]);
    let published = bed.store.publish(repl, SubmissionId::new(), &files);
    published.await.unwrap();
}

async fn served(bed: &Bed, repl: &ReplId, says: &str) {
    eventually("the repl serves", || async {
        bed.platform.dial(repl).await.is_ok() && bed.page(repl).await.contains(says)
    })
    .await;
}

/// Everything in the user's namespace that has the repl's name in its own, of every kind there is.
async fn left(bed: &Bed, user: &UserId, repl: &ReplId) -> Vec<String> {
    let discovery = Discovery::new(bed.client.clone()).run().await.unwrap();
    let mut left = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if capabilities.scope == Scope::Namespaced && capabilities.supports_operation("list") {
                left.extend(named(bed, user, repl, &resource).await);
            }
        }
    }
    left
}

async fn named(bed: &Bed, user: &UserId, repl: &ReplId, resource: &ApiResource) -> Vec<String> {
    // What is told of things that were is no thing itself.
    if resource.kind == "Event" {
        return Vec::new();
    }
    let api: Api<DynamicObject> =
        Api::namespaced_with(bed.client.clone(), &user.namespace(), resource);
    let found = api.list(&ListParams::default()).await.unwrap();
    let found = found.into_iter().map(|object| object.name_any());
    found
        .filter(|name| name.contains(repl.as_str()))
        .map(|name| format!("{}/{name}", resource.kind))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_stopped_workspace_leaves_nothing_of_any_kind() {
    let bed = Bed::start().await;
    let user = bed.user("opened");
    let repl = bed.repl(&user);
    put(&bed, &repl, &format!("VERSION = 'current'\n{SERVER}")).await;
    let opened = bed.platform.open_workspace(&spec(&user, &repl)).await;
    assert!(opened.unwrap().created);
    served(&bed, &repl, "current").await;
    // Positive control: what is looked for afterwards is found now.
    let there = left(&bed, &user, &repl).await;
    for kind in ["Deployment", "Service", "Ingress", "Pod"] {
        assert!(there.iter().any(|one| one.starts_with(kind)), "{there:?}");
    }
    bed.platform.drop_repl(&repl).await.unwrap();
    eventually("everything is gone", || async {
        let left = left(&bed, &user, &repl).await;
        println!("left: {left:?}");
        left.is_empty()
    })
    .await;
    assert!(bed.store.has_current(&repl, "main.py").await.unwrap());
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn two_servers_make_a_workspace_once_and_a_dead_ones_work_is_finished() {
    let (one, other) = (Bed::start().await, Bed::start().await);
    let user = one.user("twice");
    let repl = one.repl(&user);
    put(&one, &repl, &format!("VERSION = 'current'\n{SERVER}")).await;
    let spec = spec(&user, &repl);
    let (first, second) = tokio::join!(
        one.platform.open_workspace(&spec),
        other.platform.open_workspace(&spec)
    );
    assert_ne!(first.unwrap().created, second.unwrap().created);
    served(&other, &repl, "current").await;
    // As a server leaves it that dies between its record and the objects.
    let deployments: Api<k8s_openapi::api::apps::v1::Deployment> =
        Api::namespaced(one.client.clone(), &user.namespace());
    let params = kube::api::DeleteParams::background();
    deployments.delete(repl.as_str(), &params).await.unwrap();
    eventually("the Deployment is made again", || async {
        one.platform.open_workspace(&spec).await.unwrap();
        deployments.get_opt(repl.as_str()).await.unwrap().is_some()
    })
    .await;
    served(&one, &repl, "current").await;
    one.platform.drop_repl(&repl).await.unwrap();
    one.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn an_empty_bucket_is_told_in_the_words_of_what_was_to_bring_the_files() {
    let bed = Bed::start().await;
    let user = bed.user("empty");
    let repl = bed.repl(&user);
    let opened = bed.platform.open_workspace(&spec(&user, &repl)).await;
    assert!(opened.unwrap().created);
    let status = || async {
        let repls = bed.platform.repls().await.unwrap();
        repls.into_iter().find(|one| one.repl_id == repl).unwrap()
    };
    eventually("the cause is told", || async {
        let status = status().await;
        let told = status.last_error.unwrap_or_default();
        told.contains("There is no whole code at s3://") && status.state == ReplState::Crashed
    })
    .await;
    let dialled = bed.platform.dial(&repl).await;
    assert!(matches!(dialled, Err(PlatformError::Unavailable(_))));
    // Its user puts files there, and the cluster's next try finds them.
    put(&bed, &repl, &format!("VERSION = 'late'\n{SERVER}")).await;
    served(&bed, &repl, "late").await;
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}
