//! What breaks in a cluster, one fault at a time: never a false pass, never a false failure, never
//! silence.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use gantry::model::{Ending, UserId};
use gantry::platform::conformance::{finish, python};
use gantry::platform::{Platform, PlatformError, Sessions};
use gantry::runner::client::{RunEvent, Session};
use gantry::runner::wire::JobEvent;
use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};

use crate::bed::{Bed, SERVER, eventually};

/// A cause that a user can read comes within this (shared with every platform).
pub const CAUSE_WITHIN: Duration = Duration::from_secs(30);

/// Silence that is taken for death, and one start of a pod on a busy machine.
pub const BACK_WITHIN: Duration = Duration::from_secs(15 + 10);

/// What a cluster may take to make pods again after an outage: its parts' longest pause between two
/// tries, twice, and the start of a pod.
const RECOVERED_WITHIN: Duration = Duration::from_secs(90);

pub async fn hello(session: &Session) -> anyhow::Result<Vec<u8>> {
    Ok(finish(&mut session.start(python("print('Hello')")))
        .await?
        .stdout)
}

pub fn pods(bed: &Bed, user: &UserId) -> Api<Pod> {
    Api::namespaced(bed.client.clone(), &user.namespace())
}

/// A command in the test pod, as an operator would run it.
pub fn exec(user: &UserId, command: &[&str]) -> Command {
    let kubectl = std::env::var("TESTBED_KUBECTL").unwrap_or_else(|_| "kubectl".to_owned());
    let mut exec = Command::new(kubectl);
    exec.args([
        "exec",
        "-n",
        &user.namespace(),
        &format!("{user}-test"),
        "--",
    ]);
    exec.args(command);
    exec
}

/// Runs a script in the test pod.
fn in_pod(user: &UserId, script: &str) {
    let status = exec(user, &["bash", "-c", script]).status().unwrap();
    // A script that ends its own container has no status of its own.
    println!("in {user}-test: {status}");
}

/// What a command in the test pod writes.
pub fn said_in_pod(user: &UserId, command: &[&str]) -> String {
    let output = exec(user, command).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_deleted_test_pod_is_made_anew() {
    let bed = Bed::start().await;
    let user = bed.user("deleted");
    let session = Sessions::new(bed.shared()).of(&user);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    let name = format!("{user}-test");
    let before = pods(&bed, &user).get(&name).await.unwrap().uid();
    let now = DeleteParams::default().grace_period(0);
    pods(&bed, &user).delete(&name, &now).await.unwrap();
    let started = Instant::now();
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    println!("deleted test pod → next answer: {:?}", started.elapsed());
    assert!(started.elapsed() < BACK_WITHIN);
    assert_ne!(pods(&bed, &user).get(&name).await.unwrap().uid(), before);
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_test_pod_deleted_under_a_run_is_no_verdict() {
    let bed = Bed::start().await;
    let user = bed.user("under");
    let session = Sessions::new(bed.shared()).of(&user);
    let mut run = session.start(python(
        "import time\nprint('up', flush=True)\ntime.sleep(8)",
    ));
    assert!(matches!(
        run.next().await,
        RunEvent::Event {
            event: JobEvent::Output { .. },
            ..
        }
    ));
    let now = DeleteParams::default().grace_period(0);
    pods(&bed, &user)
        .delete(&format!("{user}-test"), &now)
        .await
        .unwrap();
    let started = Instant::now();
    // What it wrote is told already, so it is not run again: the outcome is unknown.
    let RunEvent::Lost(why) = run.next().await else {
        panic!("a run whose pod was deleted has a verdict");
    };
    println!("lost after {:?}: {why}", started.elapsed());
    assert!(started.elapsed() < BACK_WITHIN);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_killed_runner_comes_back() {
    let bed = Bed::start().await;
    let user = bed.user("killed");
    let session = Sessions::new(bed.shared()).of(&user);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    // The kernel protects a first process from its own namespace's SIGKILL, not from the node's; a
    // handler for SIGTERM is the runner's way out.
    in_pod(&user, "kill -TERM 1; sleep 1; kill -KILL 1");
    let started = Instant::now();
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    println!("killed runner → next answer: {:?}", started.elapsed());
    assert!(started.elapsed() < BACK_WITHIN);
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_cut_exec_is_attached_again_and_nothing_is_lost() {
    let bed = Bed::start().await;
    let user = bed.user("cut");
    let session = Sessions::new(bed.shared()).of(&user);
    let code = "import time\nfor i in range(40):\n    print(i, flush=True)\n    time.sleep(0.1)";
    let mut run = session.start(python(code));
    assert!(matches!(run.next().await, RunEvent::Event { .. }));
    // The bridge dies in the middle; the agent and the run do not.
    in_pod(
        &user,
        "for p in /proc/[0-9]*; do read -r -d '' a < <(tr '\\0' ' ' < $p/cmdline); \
         case \"$a\" in *'gantry-runner attach'*) kill -9 ${p#/proc/};; esac; done",
    );
    let (mut rest, mut seen) = (Vec::new(), b"0\n".to_vec());
    let ended = loop {
        match run.next().await {
            RunEvent::Event {
                event: JobEvent::Output { data, .. },
                ..
            } => rest.extend(data),
            RunEvent::Event {
                event: JobEvent::Ended(report),
                ..
            } => break report,
            RunEvent::Lost(why) => panic!("{why}"),
        }
    };
    seen.extend(rest);
    let whole: String = (0..40).map(|i| format!("{i}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&seen), whole);
    assert_eq!(ended.ending, Ending::Exited(0));
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_missing_runner_image_is_told() {
    let bed = Bed::start_with(|c| c.runner_image = "localhost/no/such:1".to_owned()).await;
    let user = bed.user("image");
    let session = Sessions::new(bed.shared()).of(&user);
    let started = Instant::now();
    let why = session.ready().await.unwrap_err();
    println!("after {:?}: {why}", started.elapsed());
    assert!(why.contains("localhost/no/such:1"), "{why}");
    assert!(started.elapsed() < CAUSE_WITHIN);
    let repl = bed.repl(&user);
    let spec = bed.spec(&user, &repl, "print(1)", BTreeMap::new()).await;
    let started = Instant::now();
    let Err(PlatformError::NotReady(problem)) = bed.platform.ensure_release(&spec).await else {
        panic!("a release without an image came up");
    };
    println!("after {:?}: {problem}", started.elapsed());
    assert_eq!(problem.code, "image_missing");
    assert!(started.elapsed() < CAUSE_WITHIN);
    // Positive control: the same with the image that is there.
    let well = Bed::start().await;
    assert_eq!(
        hello(&Sessions::new(well.shared()).of(&user))
            .await
            .unwrap(),
        b"Hello\n"
    );
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_full_quota_is_told_and_the_previous_release_serves() {
    let bed = Bed::start().await;
    let user = bed.user("quota");
    let repl = bed.repl(&user);
    let one = bed
        .spec(
            &user,
            &repl,
            &format!("VERSION = 'one'\n{SERVER}"),
            BTreeMap::new(),
        )
        .await;
    bed.platform.ensure_release(&one).await.unwrap();
    // A quota beside Gantry's own, so that nothing puts it right: one pod and no more.
    let quotas: Api<ResourceQuota> = Api::namespaced(bed.client.clone(), &user.namespace());
    let tight = serde_json::json!({
        "apiVersion": "v1", "kind": "ResourceQuota",
        "metadata": { "name": "tight" }, "spec": { "hard": { "pods": "1" } },
    });
    let params = PatchParams::apply("tests");
    quotas
        .patch("tight", &params, &Patch::Apply(&tight))
        .await
        .unwrap();
    eventually("the quota counts", || async {
        let status = quotas.get("tight").await.unwrap().status;
        status
            .and_then(|s| s.used)
            .is_some_and(|used| used["pods"].0 == "1")
    })
    .await;
    let two = bed
        .spec(
            &user,
            &repl,
            &format!("VERSION = 'two'\n{SERVER}"),
            BTreeMap::new(),
        )
        .await;
    let started = Instant::now();
    let Err(PlatformError::NotReady(problem)) = bed.platform.ensure_release(&two).await else {
        panic!("a release came up beyond the quota");
    };
    println!("after {:?}: {problem}", started.elapsed());
    assert_eq!(problem.code, "quota_exceeded");
    assert!(started.elapsed() < CAUSE_WITHIN);
    assert!(bed.page(&repl).await.ends_with("one"));
    // Positive control: without the quota the same release comes up.
    quotas
        .delete("tight", &DeleteParams::default())
        .await
        .unwrap();
    bed.platform.ensure_release(&two).await.unwrap();
    assert!(bed.page(&repl).await.ends_with("two"));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_failed_rollout_leaves_the_previous_release_serving_all_the_while() {
    let bed = Bed::start().await;
    let user = bed.user("rollout");
    let repl = bed.repl(&user);
    let one = bed
        .spec(
            &user,
            &repl,
            &format!("VERSION = 'one'\n{SERVER}"),
            BTreeMap::new(),
        )
        .await;
    bed.platform.ensure_release(&one).await.unwrap();
    let name = running_pods(&bed, &user).await;
    let bad = bed
        .spec(
            &user,
            &repl,
            "raise SystemExit('out of luck')",
            BTreeMap::new(),
        )
        .await;
    let trying = bed.platform.ensure_release(&bad);
    tokio::pin!(trying);
    let mut answers = 0;
    let failed = loop {
        tokio::select! {
            failed = &mut trying => break failed,
            page = bed.page(&repl) => {
                assert!(page.ends_with("one"), "an outage after {answers} answers: {page}");
                answers += 1;
            }
        }
    };
    let Err(PlatformError::NotReady(problem)) = failed else {
        panic!("a program that fails came up: {failed:?}");
    };
    assert!(problem.cause.contains("out of luck"), "{problem:?}");
    assert!(bed.page(&repl).await.ends_with("one"));
    assert!(answers > 0);
    eventually("the failed pod is gone", || async {
        running_pods(&bed, &user).await == name
    })
    .await;
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_release_takes_over_when_it_listens_and_not_before() {
    let bed = Bed::start().await;
    let user = bed.user("listens");
    let repl = bed.repl(&user);
    let code = |word: &str| format!("VERSION = '{word}'\n{SERVER}");
    let one = bed.spec(&user, &repl, &code("one"), BTreeMap::new()).await;
    bed.platform.ensure_release(&one).await.unwrap();
    // Longer than the five seconds after which a worker counts as serving.
    let slow = format!("import time\ntime.sleep(8)\n{}", code("two"));
    let elsewhere = code("three").replace("('', 3000)", "('127.0.0.1', 5000)");
    let failing = "import time\ntime.sleep(8)\nraise SystemExit('no such colour')";
    for (code, serves, word) in [
        (slow.as_str(), "two", None),
        (failing, "two", Some("no such colour")),
        (elsewhere.as_str(), "two", Some("127.0.0.1:5000")),
    ] {
        let next = bed.spec(&user, &repl, code, BTreeMap::new()).await;
        let trying = bed.platform.ensure_release(&next);
        tokio::pin!(trying);
        let tried = loop {
            tokio::select! {
                tried = &mut trying => break tried,
                page = bed.page(&repl) => {
                    assert!(page.ends_with("one") || page.ends_with("two"), "{page}");
                }
            }
        };
        match (tried, word) {
            (Ok(_), None) => {}
            (Err(PlatformError::NotReady(problem)), Some(word)) => {
                assert!(problem.cause.contains(word), "{problem:?}");
            }
            (tried, _) => panic!("{word:?}: {tried:?}"),
        }
        assert!(bed.page(&repl).await.ends_with(serves));
    }
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

async fn running_pods(bed: &Bed, user: &UserId) -> Vec<String> {
    let params = kube::api::ListParams::default().labels("app=prod");
    let list = pods(bed, user).list(&params).await.unwrap();
    let mut names: Vec<String> = list.items.iter().map(ResourceExt::name_any).collect();
    names.sort();
    names
}

/// Breaks or mends something of the bed.
pub fn testbed(words: &[&str]) {
    let status = Command::new("scripts/testbed")
        .args(words)
        .status()
        .unwrap();
    assert!(status.success(), "scripts/testbed {words:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_run_goes_on_while_the_api_server_is_away() {
    let bed = Bed::start().await;
    let user = bed.user("away");
    let session = Sessions::new(bed.shared()).of(&user);
    let code = "import time\nfor i in range(20):\n    print(i, flush=True)\n    time.sleep(0.5)";
    let mut job = python(code);
    job.limits.wall_ms = 60_000;
    let mut run = session.start(job);
    assert!(matches!(run.next().await, RunEvent::Event { .. }));
    testbed(&["part", "stop", "apiserver"]);
    let waits = session.start(python("print('after')"));
    let away = Instant::now();
    // The control: it is away.
    let asked = bed.platform.releases(&bed.repl(&user)).await;
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let outage = Duration::from_secs(if full { 600 } else { 30 });
    tokio::time::sleep(outage.saturating_sub(away.elapsed())).await;
    testbed(&["part", "start", "apiserver"]);
    let Err(PlatformError::Unavailable(problem)) = asked else {
        panic!("an API server that is away answered: {asked:?}");
    };
    assert_eq!(problem.code, gantry::platform::AWAY);
    let started = Instant::now();
    let ended = {
        let mut text = b"0\n".to_vec();
        loop {
            match run.next().await {
                RunEvent::Event {
                    event: JobEvent::Output { data, .. },
                    ..
                } => text.extend(data),
                RunEvent::Event {
                    event: JobEvent::Ended(report),
                    ..
                } => break (report, text),
                RunEvent::Lost(why) => panic!("{why}"),
            }
        }
    };
    println!(
        "the API server is back → the run's end: {:?}",
        started.elapsed()
    );
    let whole: String = (0..20).map(|i| format!("{i}\n")).collect();
    assert_eq!(String::from_utf8_lossy(&ended.1), whole);
    assert_eq!(ended.0.ending, Ending::Exited(0));
    let mut waits = waits;
    assert_eq!(finish(&mut waits).await.unwrap().stdout, b"after\n");
    bed.forget(user.as_str()).await;
    the_cluster_makes_pods_again(&bed).await;
}

/// Waits for the cluster's own parts: after an outage of the API server its scheduler and its kubelets
/// try again at ever longer intervals, up to half a minute. The next test is not about that.
async fn the_cluster_makes_pods_again(bed: &Bed) {
    let user = bed.user("recovered");
    let session = Sessions::new(bed.shared()).of(&user);
    let started = Instant::now();
    while let Err(error) = hello(&session).await {
        assert!(started.elapsed() < RECOVERED_WITHIN, "{error:#}");
        println!("{:?} after an outage: {error:#}", started.elapsed());
    }
    bed.forget(user.as_str()).await;
}
