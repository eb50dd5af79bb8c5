//! The Kubernetes platform on a real cluster: the contract of every platform, and what only a cluster
//! can break. Needs the bed: `eval "$(scripts/testbed env)"`, then
//! `cargo test --test kubernetes -- --ignored --test-threads 1`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "kubernetes/bed.rs"]
mod bed;
#[path = "kubernetes/bench.rs"]
mod bench;
#[path = "kubernetes/faults.rs"]
mod faults;
#[path = "kubernetes/hostile.rs"]
mod hostile;
#[path = "kubernetes/orders.rs"]
mod orders;
#[path = "kubernetes/outages.rs"]
mod outages;
#[path = "kubernetes/security.rs"]
mod security;
#[path = "kubernetes/settings.rs"]
mod settings;
#[path = "kubernetes/workspace.rs"]
mod workspace;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gantry::model::{Ending, Order, ReleaseState};
use gantry::platform::conformance::{all, finish, python};
use gantry::platform::{Finding, Platform, PlatformError, Sessions};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ResourceQuota};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};

use bed::{Bed, NAMESPACE, SERVER, eventually};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn the_kubernetes_platform_keeps_the_contract() {
    let bed = Bed::start().await;
    forget_conformance(&bed).await;
    for check in bed.platform.checks() {
        println!("{check:?}");
        assert_ne!(check.finding, Finding::Missing, "{check:?}");
    }
    let result = all(&bed.subject()).await;
    forget_conformance(&bed).await;
    result.unwrap();
}

/// Removes what the suite, or one that was cut off, has left: its users, and what is kept of its repls.
async fn forget_conformance(bed: &Bed) {
    let namespaces: Api<Namespace> = Api::all(bed.client.clone());
    let suites = |name: &str| name.starts_with("user-conform-");
    let all = ListParams::default();
    for namespace in namespaces.list(&all).await.unwrap() {
        if let Some(user) = namespace.name_any().strip_prefix("user-")
            && suites(&namespace.name_any())
        {
            bed.forget(user).await;
        }
    }
    let records: Api<ConfigMap> = Api::namespaced(bed.client.clone(), NAMESPACE);
    for record in records.list(&all).await.unwrap() {
        let name = record.name_any();
        if name.starts_with("repl-conform-") {
            records
                .delete(&name, &DeleteParams::default())
                .await
                .unwrap();
        }
    }
    eventually("what an earlier suite left is gone", || async {
        let left = namespaces.list(&all).await.unwrap();
        !left.iter().any(|namespace| suites(&namespace.name_any()))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_namespace_is_repaired_when_somebody_edits_it() {
    let bed = Bed::start().await;
    let user = bed.user("edit");
    let sessions = Sessions::new(bed.shared());
    let ended = finish(&mut sessions.of(&user).start(python("print(1)"))).await;
    assert_eq!(ended.unwrap().stdout, b"1\n");
    let quotas: Api<ResourceQuota> = Api::namespaced(bed.client.clone(), &user.namespace());
    let raised = serde_json::json!({ "spec": { "hard": { "pods": "9999" } } });
    let params = PatchParams::default();
    quotas
        .patch("gantry", &params, &Patch::Merge(&raised))
        .await
        .unwrap();
    eventually("the quota is put right", || async {
        let quota = quotas.get("gantry").await.unwrap();
        quota.spec.unwrap().hard.unwrap()["pods"].0 == "30"
    })
    .await;
    let policies: Api<k8s_openapi::api::networking::v1::NetworkPolicy> =
        Api::namespaced(bed.client.clone(), &user.namespace());
    policies
        .delete("gantry-deny-all", &DeleteParams::default())
        .await
        .unwrap();
    eventually("the policy is back", || async {
        policies.get_opt("gantry-deny-all").await.unwrap().is_some()
    })
    .await;
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_test_pod_keeps_to_what_its_manifest_says() {
    let bed = Bed::start().await;
    let user = bed.user("pod");
    let sessions = Sessions::new(bed.shared());
    let code = "
import os, socket
print(os.path.exists('/var/run/secrets/kubernetes.io'))
for path in ['/etc/x', '/usr/x', '/x']:
    try:
        open(path, 'w')
        print('written', path)
    except OSError:
        pass
print(os.getuid() == 0)
try:
    os.kill(1, 9)
    print('killed the runner')
except OSError:
    pass
print([name for name in os.environ if 'KUBERNETES' in name or 'AWS' in name or 'GANTRY' in name])
";
    let ended = finish(&mut sessions.of(&user).start(python(code)))
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stdout), "False\nFalse\n[]\n");
    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), &user.namespace());
    let pod = pods.get(&format!("{user}-test")).await.unwrap();
    let container = &pod.status.unwrap().container_statuses.unwrap()[0];
    assert_eq!(container.restart_count, 0);
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_release_says_what_was_tested_and_its_variables_are_in_a_secret() {
    let bed = Bed::start().await;
    let user = bed.user("annotated");
    let repl = bed.repl(&user);
    let env = BTreeMap::from([("GREETING".to_owned(), "$(HOME) 'quoted'\nline".to_owned())]);
    let code = format!("VERSION = repr(__import__('os').environ['GREETING'])\n{SERVER}");
    let spec = bed.spec(&user, &repl, &code, env).await;
    let one = bed.platform.ensure_release(&spec).await.unwrap();
    assert_eq!(one.release, 1);
    let page = bed.page(&repl).await;
    assert!(
        page.contains(r"$(HOME) \'quoted\'\nline") || page.contains(r#""$(HOME) 'quoted'\nline""#),
        "{page}"
    );
    let deployments: Api<k8s_openapi::api::apps::v1::Deployment> =
        Api::namespaced(bed.client.clone(), &user.namespace());
    let deployment = deployments.get(repl.as_str()).await.unwrap();
    let said = deployment.annotations();
    assert_eq!(
        said["gantry.dev/submission"],
        spec.submission_id.to_string()
    );
    assert_eq!(said["gantry.dev/code-digest"], spec.tested.code);
    assert_eq!(said["gantry.dev/tests-digest"], spec.tested.tests);
    assert!(
        !format!("{deployment:?}").contains("quoted"),
        "a variable's value is in the open"
    );
    // What a stop removes: everything that served, and nothing that is kept.
    bed.platform.drop_repl(&repl).await.unwrap();
    assert!(deployments.get_opt(repl.as_str()).await.unwrap().is_none());
    let secrets: Api<k8s_openapi::api::core::v1::Secret> =
        Api::namespaced(bed.client.clone(), &user.namespace());
    assert!(
        secrets
            .get_opt(&format!("{repl}-env-1"))
            .await
            .unwrap()
            .is_none()
    );
    // And what is kept is enough to come back.
    bed.platform
        .rollback(&repl, Some(1), &Order::now())
        .await
        .unwrap();
    assert!(bed.page(&repl).await.contains("quoted"));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn another_server_knows_the_same() {
    let bed = Bed::start().await;
    let user = bed.user("two-servers");
    let repl = bed.repl(&user);
    let spec = bed
        .spec(
            &user,
            &repl,
            &format!("VERSION = 'one'\n{SERVER}"),
            BTreeMap::new(),
        )
        .await;
    let one = bed.platform.ensure_release(&spec).await.unwrap();
    let other = Bed::start().await;
    assert_eq!(
        other.platform.owner(&repl).await.unwrap().as_ref(),
        Some(&user)
    );
    let thief = other.user("thief");
    assert_eq!(other.platform.claim(&repl, &thief).await.unwrap(), user);
    let again = other.platform.ensure_release(&spec).await.unwrap();
    assert_eq!(again.release, one.release);
    let releases = other.platform.releases(&repl).await.unwrap();
    assert_eq!(releases.len(), 1);
    assert_eq!(releases[0].state, ReleaseState::Current);
    assert!(other.page(&repl).await.ends_with("one"));
    other.platform.drop_repl(&repl).await.unwrap();
    // The first server hears of it by its watch.
    eventually("the first server sees the stop", || async {
        matches!(
            bed.platform.dial(&repl).await,
            Err(PlatformError::NotFound(_))
        )
    })
    .await;
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_server_started_anew_asks_for_a_stream_and_nothing_else() {
    let first = Bed::start().await;
    let user = first.user("anew");
    let session = Sessions::new(first.shared()).of(&user);
    finish(&mut session.start(python("print(1)")))
        .await
        .unwrap();
    first.platform.shutdown().await;
    let bed = Bed::start().await;
    let before = bed.requests_once_settled().await;
    let session = Sessions::new(bed.shared()).of(&user);
    finish(&mut session.start(python("print(1)")))
        .await
        .unwrap();
    // The exec; what the first server left is as it should be.
    assert_eq!(bed.requests(), before + 1);
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_warm_run_asks_the_api_server_nothing() {
    let bed = Bed::start().await;
    let user = bed.user("warm");
    let session = Sessions::new(bed.shared()).of(&user);
    finish(&mut session.start(python("print(1)")))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = bed.requests();
    let started = Instant::now();
    const RUNS: usize = 50;
    for _ in 0..RUNS {
        let ended = finish(&mut session.start(python("print('Hello')")))
            .await
            .unwrap();
        assert_eq!(ended.report.ending, Ending::Exited(0));
    }
    let took = started.elapsed() / RUNS as u32;
    let asked = bed.requests() - before;
    println!("a warm run: {took:?}; requests of this program to the API server: {asked}");
    assert_eq!(asked, 0);
    // Positive control: something that does ask is counted.
    assert!(bed.platform.releases(&bed.repl(&user)).await.is_err());
    assert_eq!(bed.requests(), before + 1);
    bed.forget(user.as_str()).await;
}
