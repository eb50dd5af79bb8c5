//! What breaks around pods: streams that freeze, evictions, memory, kubelets, nodes, the scheduler, the
//! code store. The same promise as for every fault, each with a control that the fault was there.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gantry::model::{Ending, UserId};
use gantry::platform::conformance::{finish, python};
use gantry::platform::kubernetes::{BUILT_IN_TEMPLATE, Template};
use gantry::platform::{Platform, PlatformError, Sessions};
use gantry::runner::client::{Run, RunEvent};
use gantry::runner::wire::{Job, JobEvent};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{Bed, SERVER, eventually};
use crate::faults::{BACK_WITHIN, CAUSE_WITHIN, exec, hello, pods, testbed};
use crate::hostile::processes;

/// A lost node is seen by the cluster after 10 s of silence and its pods are given up 5 s later, on this
/// bed; then a pod has to start elsewhere.
const ELSEWHERE_WITHIN: Duration = Duration::from_secs(45);

/// A line each half second, for this many lines, within one minute.
fn ticking(lines: u32) -> Job {
    let mut job = python(&format!(
        "import time\nfor i in range({lines}):\n    print(i, flush=True)\n    time.sleep(0.5)"
    ));
    job.limits.wall_ms = 60_000;
    job
}

fn lines(count: u32) -> String {
    (0..count).map(|i| format!("{i}\n")).collect()
}

/// All that a run writes from here on, how it ends, and its longest silence.
async fn follow(run: &mut Run) -> (String, Ending, Duration) {
    let (mut text, mut longest, mut heard) = (Vec::new(), Duration::ZERO, Instant::now());
    loop {
        let event = run.next().await;
        longest = longest.max(heard.elapsed());
        heard = Instant::now();
        match event {
            RunEvent::Event {
                event: JobEvent::Output { data, .. },
                ..
            } => text.extend(data),
            RunEvent::Event {
                event: JobEvent::Ended(report),
                ..
            } => {
                return (
                    String::from_utf8_lossy(&text).into_owned(),
                    report.ending,
                    longest,
                );
            }
            RunEvent::Lost(why) => panic!("the run was lost: {why}"),
        }
    }
}

/// The container of the user's test pod, as it is now.
async fn container(bed: &Bed, user: &UserId) -> String {
    let pod = pods(bed, user).get(&format!("{user}-test")).await.unwrap();
    let status = pod.status.unwrap().container_statuses.unwrap().remove(0);
    let id = status.container_id.unwrap();
    id.rsplit_once('/').unwrap().1.to_owned()
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_frozen_stream_is_given_up_and_its_run_attached_again() {
    let bed = Bed::start().await;
    let user = bed.user("frozen");
    let session = Sessions::new(bed.shared()).of(&user);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    let mut run = session.start(ticking(60));
    let container = container(&bed, &user).await;
    let bridges = processes(&container, "attach");
    assert!(!bridges.is_empty(), "there is no bridge to freeze");
    // Nothing is closed and nothing is reset: there is only silence.
    for bridge in &bridges {
        signal(*bridge, Signal::STOP);
    }
    let (text, ending, longest) = follow(&mut run).await;
    for bridge in bridges {
        let _ = kill_process(Pid::from_raw(bridge).unwrap(), Signal::KILL);
    }
    println!("a frozen stream: the longest silence was {longest:?}");
    assert_eq!(text, lines(60));
    assert_eq!(ending, Ending::Exited(0));
    // The control: it was frozen. The bound: 15 s of silence, its heartbeat's 5, and a new exec.
    assert!(longest > Duration::from_secs(10), "{longest:?}");
    assert!(longest < BACK_WITHIN, "{longest:?}");
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_run_that_wrote_nothing_is_repeated_when_its_pod_is_evicted() {
    let bed = Bed::start().await;
    let user = bed.user("evicted");
    let session = Sessions::new(bed.shared()).of(&user);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    let name = format!("{user}-test");
    let before = pods(&bed, &user).get(&name).await.unwrap().uid();
    let mut run = session.start(python("import time\ntime.sleep(4)\nprint('done')"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let params = kube::api::EvictParams::default();
    pods(&bed, &user).evict(&name, &params).await.unwrap();
    let ended = finish(&mut run).await.unwrap();
    assert_eq!(ended.stdout, b"done\n");
    assert_eq!(ended.report.ending, Ending::Exited(0));
    let after = pods(&bed, &user).get(&name).await.unwrap().uid();
    assert_ne!(after, before, "it was not evicted");
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_pod_out_of_memory_costs_no_run_its_verdict() {
    let bed = Bed::start().await;
    let user = bed.user("memory");
    let session = Sessions::new(bed.shared()).of(&user);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    let before = container(&bed, &user).await;
    let mut run = session.start(ticking(40));
    assert!(matches!(run.next().await, RunEvent::Event { .. }));
    // An operator's command in the pod asks for more than the pod has: the kernel takes the largest.
    let hog = exec(&user, &["python3", "-c", "x = b'x' * (2 << 30)"]).status();
    // The control: the memory did run out.
    assert_eq!(hog.unwrap().code(), Some(137));
    let (text, ending, _) = follow(&mut run).await;
    assert_eq!(format!("0\n{text}"), lines(40));
    assert_eq!(ending, Ending::Exited(0));
    assert_eq!(container(&bed, &user).await, before, "the runner was taken");
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_runner_killed_under_a_run_is_no_verdict_and_comes_back() {
    let bed = Bed::start().await;
    let user = bed.user("killed-under");
    let session = Sessions::new(bed.shared()).of(&user);
    // Again and again, so that the kubelet's pauses between two starts count as well.
    for kill in 0..3 {
        let mut run = session.start(ticking(80));
        assert!(matches!(run.next().await, RunEvent::Event { .. }));
        let container = container(&bed, &user).await;
        signal(processes(&container, "agent")[0], Signal::KILL);
        let started = Instant::now();
        let why = run.next_lost().await;
        println!("kill {kill}: lost after {:?}: {why}", started.elapsed());
        assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
        println!("kill {kill}: next answer after {:?}", started.elapsed());
        assert!(started.elapsed() < BACK_WITHIN);
    }
    bed.forget(user.as_str()).await;
}

async fn node_of(pods: &Api<Pod>, name: &str) -> String {
    let pod = pods.get(name).await.unwrap();
    pod.spec.unwrap().node_name.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_run_goes_on_while_kubelet_and_containerd_are_restarted() {
    let bed = Bed::start().await;
    let user = bed.user("bounced");
    let session = Sessions::new(bed.shared()).of(&user);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    let name = format!("{user}-test");
    let before = container(&bed, &user).await;
    let node = node_of(&pods(&bed, &user), &name).await;
    let mut run = session.start(ticking(50));
    assert!(matches!(run.next().await, RunEvent::Event { .. }));
    testbed(&["node", "bounce", &node]);
    let (text, ending, longest) = follow(&mut run).await;
    println!("kubelet and containerd restarted: the longest silence was {longest:?}");
    assert_eq!(format!("0\n{text}"), lines(50));
    assert_eq!(ending, Ending::Exited(0));
    assert_eq!(
        container(&bed, &user).await,
        before,
        "the pod was restarted"
    );
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_lost_nodes_pods_are_back_on_others() {
    let bed = Bed::start().await;
    let user = bed.user("lost");
    let session = Sessions::new(bed.shared()).of(&user);
    assert_eq!(hello(&session).await.unwrap(), b"Hello\n");
    let repl = bed.repl(&user);
    let code = format!("VERSION = 'one'\n{SERVER}");
    let spec = bed.spec(&user, &repl, &code, BTreeMap::new()).await;
    bed.platform.ensure_release(&spec).await.unwrap();
    let name = format!("{user}-test");
    let node = node_of(&pods(&bed, &user), &name).await;
    let mut run = session.start(ticking(20));
    assert!(matches!(run.next().await, RunEvent::Event { .. }));
    testbed(&["node", "kill", &node]);
    let started = Instant::now();
    let lost = run.next_lost().await;
    let told = started.elapsed();
    let answered = hello(&session).await;
    let back = started.elapsed();
    let served = is_served(&bed, &user, &node).await;
    let serving = started.elapsed();
    let elsewhere = node_of(&pods(&bed, &user), &name).await;
    testbed(&["node", "restart", &node]);
    println!(
        "a lost node: told after {told:?} ({lost}), answered after {back:?}, served after {serving:?}"
    );
    assert_eq!(answered.unwrap(), b"Hello\n");
    assert!(back < ELSEWHERE_WITHIN, "{back:?}");
    assert!(served, "the release is not served");
    assert_ne!(elsewhere, node);
    assert!(bed.page(&repl).await.ends_with("one"));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

/// Whether a pod of the user's release is ready on another node, in time.
async fn is_served(bed: &Bed, user: &UserId, lost: &str) -> bool {
    let started = Instant::now();
    let params = ListParams::default().labels("app=prod");
    while started.elapsed() < ELSEWHERE_WITHIN {
        let found = pods(bed, user).list(&params).await.unwrap();
        let ready = |pod: &Pod| {
            let conditions = pod
                .status
                .iter()
                .flat_map(|s| s.conditions.iter().flatten());
            let mut conditions = conditions.filter(|c| c.type_ == "Ready");
            pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) != Some(lost)
                && conditions.any(|c| c.status == "True")
        };
        if found.items.iter().any(ready) {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    false
}

trait NextLost {
    async fn next_lost(&mut self) -> String;
}

impl NextLost for Run {
    /// Why the run is lost; what it still says before that is passed over.
    async fn next_lost(&mut self) -> String {
        loop {
            match self.next().await {
                RunEvent::Lost(why) => return why,
                RunEvent::Event {
                    event: JobEvent::Ended(report),
                    ..
                } => panic!("a run whose runner is gone has a verdict: {report:?}"),
                RunEvent::Event { .. } => {}
            }
        }
    }
}

/// Lets the scheduler use every node, or none.
async fn let_pods_in(bed: &Bed, open: bool) {
    let nodes: Api<Node> = Api::all(bed.client.clone());
    let change = serde_json::json!({ "spec": { "unschedulable": !open } });
    for node in nodes.list(&ListParams::default()).await.unwrap() {
        let params = PatchParams::default();
        nodes
            .patch(&node.name_any(), &params, &Patch::Merge(&change))
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_pod_that_finds_no_node_is_told() {
    let bed = Bed::start().await;
    let user = bed.user("pending");
    let session = Sessions::new(bed.shared()).of(&user);
    let_pods_in(&bed, false).await;
    let started = Instant::now();
    let told = session.ready().await;
    let took = started.elapsed();
    let_pods_in(&bed, true).await;
    let why = told.unwrap_err();
    println!("after {took:?}: {why}");
    assert!(why.contains("nodes are available"), "{why}");
    assert!(took < CAUSE_WITHIN);
    // Positive control: with nodes the same pod comes up.
    eventually("the pod has a node", || async {
        hello(&session).await.is_ok_and(|said| said == b"Hello\n")
    })
    .await;
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_release_whose_files_cannot_be_fetched_is_told_and_the_previous_one_serves() {
    let bed = Bed::start().await;
    let user = bed.user("store");
    let repl = bed.repl(&user);
    let program = |version: &str| format!("VERSION = '{version}'\n{SERVER}");
    let one = bed
        .spec(&user, &repl, &program("one"), BTreeMap::new())
        .await;
    bed.platform.ensure_release(&one).await.unwrap();
    let two = bed
        .spec(&user, &repl, &program("two"), BTreeMap::new())
        .await;
    testbed(&["part", "stop", "s3"]);
    let started = Instant::now();
    let failed = bed.platform.ensure_release(&two).await;
    let took = started.elapsed();
    let page = bed.page(&repl).await;
    testbed(&["part", "start", "s3"]);
    let Err(PlatformError::NotReady(problem)) = failed else {
        panic!("a release without files came up: {failed:?}");
    };
    println!("after {took:?}: {problem}");
    assert!(took < Duration::from_secs(75), "{took:?}");
    assert!(
        problem.cause.contains("gantry-runner fetch: "),
        "{problem:?}"
    );
    assert!(page.ends_with("one"), "{page}");
    // Positive control: with the store the same release comes up.
    bed.platform.ensure_release(&two).await.unwrap();
    assert!(bed.page(&repl).await.ends_with("two"));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_release_that_is_never_ready_is_told_and_the_previous_one_serves() {
    let bed = Bed::start().await;
    let user = bed.user("unready");
    let repl = bed.repl(&user);
    let program = |version: &str| {
        format!("VERSION = '{version}'\nprint('I am {version}', flush=True)\n{SERVER}")
    };
    let one = bed
        .spec(&user, &repl, &program("one"), BTreeMap::new())
        .await;
    bed.platform.ensure_release(&one).await.unwrap();
    let two = bed
        .spec(&user, &repl, &program("two"), BTreeMap::new())
        .await;
    // An operator's template whose probe asks for something that is not there.
    let deaf = BUILT_IN_TEMPLATE.replace("path: /ready", "path: /nothing");
    let other = Bed::start_with(|config| config.template = Template::parse(&deaf).unwrap()).await;
    let failed = other.platform.ensure_release(&two).await;
    let Err(PlatformError::NotReady(problem)) = failed else {
        panic!("a release that is never ready came up: {failed:?}");
    };
    println!("{problem}");
    assert!(
        problem.cause.contains("not ready within 60 s"),
        "{problem:?}"
    );
    assert!(problem.cause.contains("I am two"), "{problem:?}");
    assert!(bed.page(&repl).await.ends_with("one"));
    // Positive control: with the template that is built in the same release comes up.
    bed.platform.ensure_release(&two).await.unwrap();
    assert!(bed.page(&repl).await.ends_with("two"));
    bed.platform.drop_repl(&repl).await.unwrap();
    bed.forget(user.as_str()).await;
}
