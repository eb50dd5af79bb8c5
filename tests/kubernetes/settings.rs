//! What a repl runs with, on the bed: replicas, variables in Secrets, and the cluster's own autoscaler.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gantry::model::{
    Autoscale, Domain, Order, ReplChange, ReplId, ReplStatus, Scale, Scheme, UserId,
};
use gantry::platform::{ConfigureError, Platform, PlatformError, ReleaseSpec, WorkspaceSpec};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::api::networking::v1::Ingress;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::bed::{Bed, NAMESPACE, SERVER, eventually};

/// Longest wait for the autoscaler: the bed measures every 15 s, and the cluster looks as often, once
/// a pod is some time old.
const AUTOSCALED: Duration = Duration::from_secs(300);

async fn released(bed: &Bed, user: &UserId, repl: &ReplId, code: &str) -> ReleaseSpec {
    let spec = bed.spec(user, repl, code, BTreeMap::new()).await;
    bed.platform.ensure_release(&spec).await.unwrap();
    spec
}

async fn status(bed: &Bed, repl: &ReplId) -> ReplStatus {
    let repls = bed.platform.repls().await.unwrap();
    repls.into_iter().find(|one| one.repl_id == *repl).unwrap()
}

fn fixed(replicas: u32) -> ReplChange {
    ReplChange::Scale(Scale::Fixed { replicas })
}

fn variables(body: serde_json::Value) -> ReplChange {
    ReplChange::Variables(serde_json::from_value(body).unwrap())
}

fn autoscalers(bed: &Bed, user: &UserId) -> Api<HorizontalPodAutoscaler> {
    Api::namespaced(bed.client.clone(), &user.namespace())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_scaled_repl_keeps_its_replicas_through_a_release_and_a_stop() {
    let bed = Bed::start().await;
    let user = bed.user("w-scaled");
    let repl = bed.repl(&user);
    released(&bed, &user, &repl, &format!("VERSION = 'one'\n{SERVER}")).await;
    bed.platform.configure(&repl, &fixed(3)).await.unwrap();
    let now = status(&bed, &repl).await;
    assert_eq!((now.ready, now.replicas, now.autoscale), (3, 3, None));
    released(&bed, &user, &repl, &format!("VERSION = 'two'\n{SERVER}")).await;
    eventually("the next release has as many", || async {
        let now = status(&bed, &repl).await;
        (now.ready, now.replicas, now.release) == (3, 3, Some(2))
    })
    .await;
    // The cluster's own, and the way back to a number.
    let auto = Autoscale {
        min: 2,
        max: 5,
        cpu_percent: 70,
    };
    let change = ReplChange::Scale(Scale::Auto(auto));
    bed.platform.configure(&repl, &change).await.unwrap();
    let made = autoscalers(&bed, &user).get(repl.as_str()).await.unwrap();
    let spec = made.spec.unwrap();
    assert_eq!((spec.min_replicas, spec.max_replicas), (Some(2), 5));
    let now = status(&bed, &repl).await;
    assert_eq!(
        (now.replicas, now.autoscale),
        (3, Some(auto)),
        "it keeps what it has"
    );
    bed.platform.configure(&repl, &fixed(1)).await.unwrap();
    assert!(
        autoscalers(&bed, &user)
            .get_opt(repl.as_str())
            .await
            .unwrap()
            .is_none()
    );
    eventually("one is left", || async {
        status(&bed, &repl).await.ready == 1
    })
    .await;
    bed.platform.configure(&repl, &change).await.unwrap();
    bed.platform.drop_repl(&repl).await.unwrap();
    let list = ListParams::default();
    assert!(
        autoscalers(&bed, &user)
            .list(&list)
            .await
            .unwrap()
            .items
            .is_empty()
    );
    // A workspace has one pod, whatever its releases have.
    let workspace = WorkspaceSpec {
        user_id: user.clone(),
        repl_id: repl.clone(),
        order: Order::now(),
        argv: vec!["python3".to_owned(), "-V".to_owned()],
    };
    bed.platform.open_workspace(&workspace).await.unwrap();
    assert_eq!(status(&bed, &repl).await.replicas, 1);
    let refused = bed.platform.configure(&repl, &fixed(2)).await.unwrap_err();
    assert!(refused.to_string().contains("not scaled"), "{refused}");
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

/// A program that never rests.
const BUSY: &str = "
import threading
def spin():
    while True: pass
threading.Thread(target=spin, daemon=True).start()
VERSION = 'busy'
";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_busy_repl_gets_more_replicas_by_itself() {
    let bed = Bed::start().await;
    let user = bed.user("w-busy");
    let repl = bed.repl(&user);
    released(&bed, &user, &repl, &format!("{BUSY}{SERVER}")).await;
    let auto = Autoscale {
        min: 1,
        max: 2,
        cpu_percent: 70,
    };
    let change = ReplChange::Scale(Scale::Auto(auto));
    let started = Instant::now();
    bed.platform.configure(&repl, &change).await.unwrap();
    loop {
        let now = status(&bed, &repl).await;
        if (now.replicas, now.ready) == (2, 2) {
            break;
        }
        assert!(started.elapsed() < AUTOSCALED, "{now:?}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    println!("a second replica after {:.0?}", started.elapsed());
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

/// Everything of the namespace's that names the text, but Secrets: their values are encoded.
async fn in_the_open(bed: &Bed, user: &UserId, text: &str) -> bool {
    let deployments: Api<Deployment> = Api::namespaced(bed.client.clone(), &user.namespace());
    let pods: Api<k8s_openapi::api::core::v1::Pod> =
        Api::namespaced(bed.client.clone(), &user.namespace());
    let records: Api<k8s_openapi::api::core::v1::ConfigMap> =
        Api::namespaced(bed.client.clone(), NAMESPACE);
    let list = ListParams::default();
    let found = format!(
        "{:?}{:?}{:?}",
        deployments.list(&list).await.unwrap().items,
        pods.list(&list).await.unwrap().items,
        records.list(&list).await.unwrap().items
    );
    assert!(found.contains(user.as_str()));
    found.contains(text)
}

async fn given(bed: &Bed, namespace: &str, repl: &ReplId) -> usize {
    let secrets: Api<Secret> = Api::namespaced(bed.client.clone(), namespace);
    let all = secrets.list(&ListParams::default()).await.unwrap();
    let own = format!("{repl}-given-");
    all.iter()
        .filter(|one| one.name_any().contains(&own))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn secrets_are_in_secrets_and_past_ones_are_removed() {
    let bed = Bed::start().await;
    let user = bed.user("w-given");
    let repl = bed.repl(&user);
    let code = format!("import os\nVERSION = os.environ.get('TOKEN', 'none')\n{SERVER}");
    released(&bed, &user, &repl, &code).await;
    for round in 0..3 {
        let token = format!("hush-{round}");
        let change = variables(json!({ "secrets": { "TOKEN": token } }));
        bed.platform.configure(&repl, &change).await.unwrap();
        assert!(bed.page(&repl).await.ends_with(&token));
        assert!(!in_the_open(&bed, &user, "hush").await);
        // The same again is no rollout.
        let deployments: Api<Deployment> = Api::namespaced(bed.client.clone(), &user.namespace());
        let before = deployments
            .get(repl.as_str())
            .await
            .unwrap()
            .metadata
            .generation;
        bed.platform.configure(&repl, &change).await.unwrap();
        let after = deployments
            .get(repl.as_str())
            .await
            .unwrap()
            .metadata
            .generation;
        assert_eq!(before, after);
    }
    // Where pods find them, and where they are kept: those that run, and no others.
    assert_eq!(given(&bed, &user.namespace(), &repl).await, 1);
    assert_eq!(given(&bed, NAMESPACE, &repl).await, 1);
    // Another server knows the same.
    let other = Bed::start().await;
    let settings = other.platform.settings(&repl).await.unwrap();
    assert_eq!(settings.secrets, ["TOKEN"]);
    released(&other, &user, &repl, &code).await;
    assert!(other.page(&repl).await.ends_with("hush-2"));
    let change = variables(json!({ "secrets": { "TOKEN": "last" } }));
    other.platform.configure(&repl, &change).await.unwrap();
    assert_eq!(
        given(&bed, NAMESPACE, &repl).await,
        2,
        "the first release keeps its own"
    );
    other
        .platform
        .rollback(&repl, Some(1), &Order::now())
        .await
        .unwrap();
    assert!(other.page(&repl).await.ends_with("hush-2"));
    other.platform.drop_repl(&repl).await.unwrap();
    assert_eq!(given(&bed, &user.namespace(), &repl).await, 0);
    bed.forget(user.as_str()).await;
}

async fn answer(host: &str) -> (u16, String) {
    let address = std::env::var("TESTBED_INGRESS").unwrap();
    let request = reqwest::Client::new().get(format!("http://{address}/"));
    match request.header("host", host).send().await {
        Ok(answer) => (
            answer.status().as_u16(),
            answer.text().await.unwrap_or_default(),
        ),
        Err(_) => (0, String::new()),
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_domain_leads_through_the_ingress_to_its_repl_until_it_is_removed() {
    let (bed, other) = (Bed::start().await, Bed::start().await);
    let user = bed.user("w-named");
    let repl = bed.repl(&user);
    released(&bed, &user, &repl, &format!("VERSION = 'named'\n{SERVER}")).await;
    let host = format!("{user}.example.com");
    let named = |names: &[&str]| {
        let domains = names.iter().map(|name| name.parse::<Domain>().unwrap());
        ReplChange::Domains(domains.collect())
    };
    bed.platform
        .configure(&repl, &named(&[&host]))
        .await
        .unwrap();
    eventually("the domain leads to it", || async {
        answer(&host).await == (200, "named".to_owned())
    })
    .await;
    // Another server sees whose it is, and does not give it away.
    eventually("the other server knows", || async {
        other.platform.repl_of(&host).as_ref() == Some(&repl)
    })
    .await;
    let thief = other.user("w-thief");
    let theirs = other.repl(&thief);
    other.platform.claim(&theirs, &thief).await.unwrap();
    let refused = other
        .platform
        .configure(&theirs, &named(&[&host]))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("cannot be used"), "{refused}");
    // A stopped repl's stays its own.
    bed.platform.drop_repl(&repl).await.unwrap();
    assert!(
        other
            .platform
            .configure(&theirs, &named(&[&host]))
            .await
            .is_err()
    );
    bed.platform
        .rollback(&repl, Some(1), &Order::now())
        .await
        .unwrap();
    eventually("the domain leads to it again", || async {
        answer(&host).await == (200, "named".to_owned())
    })
    .await;
    bed.platform.configure(&repl, &named(&[])).await.unwrap();
    eventually("the domain leads nowhere", || async {
        answer(&host).await.0 == 404
    })
    .await;
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_namespaces_bound_is_named_and_what_ran_before_runs_on() {
    // An installation of its own: another server would take its bound for somebody's edit.
    let bed = Bed::start_with(|config| {
        config.namespace = "gantry-tests-bound".to_owned();
        config.quota.insert("pods".to_owned(), "3".to_owned());
    })
    .await;
    let user = bed.user("w-bound");
    let repl = bed.repl(&user);
    released(&bed, &user, &repl, &format!("VERSION = 'one'\n{SERVER}")).await;
    let refused = bed.platform.configure(&repl, &fixed(5)).await.unwrap_err();
    let ConfigureError::Failed(PlatformError::NotReady(problem)) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(problem.code, "quota_exceeded", "{problem:?}");
    assert!(problem.cause.contains("limited: pods=3"), "{problem:?}");
    assert_eq!(bed.platform.settings(&repl).await.unwrap().scale, None);
    eventually("it is as it was", || async {
        let now = status(&bed, &repl).await;
        (now.ready, now.replicas) == (1, 1)
    })
    .await;
    assert!(bed.page(&repl).await.ends_with("one"));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
    let namespaces: Api<Namespace> = Api::all(bed.client.clone());
    let params = DeleteParams::default();
    namespaces
        .delete("gantry-tests-bound", &params)
        .await
        .unwrap();
}

/// A program that cannot do without a variable, and dies some time after it was found good.
const NEEDY: &str = "
import os, threading, time
def die():
    time.sleep(3)
    os._exit(9)
if 'TOKEN' not in os.environ:
    threading.Thread(target=die, daemon=True).start()
VERSION = 'well'
";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn what_keeps_failing_is_mended_by_the_variable_it_lacks() {
    let bed = Bed::start().await;
    let user = bed.user("w-needy");
    let repl = bed.repl(&user);
    released(&bed, &user, &repl, &format!("{NEEDY}{SERVER}")).await;
    eventually("it fails", || async {
        let failing = status(&bed, &repl).await;
        failing.restarts > 0 || failing.ready == 0
    })
    .await;
    // What failed before says nothing about what begins with other variables.
    let change = variables(json!({ "secrets": { "TOKEN": "here" } }));
    bed.platform.configure(&repl, &change).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(bed.page(&repl).await.ends_with("well"));
    let nobody: ReplId = "w-nobodys".parse().unwrap();
    let settings = bed.platform.settings(&nobody).await;
    assert!(matches!(settings, Err(PlatformError::NotFound(_))));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn where_programs_are_reached_by_https_their_hosts_have_tls() {
    let bed = Bed::start_with(|config| config.sites.programs.scheme = Scheme::Https).await;
    let user = bed.user("w-tls");
    let repl = bed.repl(&user);
    released(&bed, &user, &repl, &format!("VERSION = 'tls'\n{SERVER}")).await;
    let host = format!("{repl}.apps.localhost");
    let url = status(&bed, &repl).await.url;
    assert_eq!(url, format!("https://{host}/"));
    let ingresses: Api<Ingress> = Api::namespaced(bed.client.clone(), &user.namespace());
    let tls = || async {
        let ingress = ingresses.get(repl.as_str()).await.unwrap();
        let entries = ingress.spec.unwrap().tls.unwrap_or_default();
        entries
            .into_iter()
            .flat_map(|entry| entry.hosts.unwrap_or_default())
            .collect::<Vec<_>>()
    };
    // The terminal's host is reached without, here.
    assert_eq!(tls().await, [host]);
    // A server that is told otherwise takes it away with the next release.
    let other = Bed::start().await;
    released(&other, &user, &repl, &format!("VERSION = 'none'\n{SERVER}")).await;
    assert!(tls().await.is_empty());
    other.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}
