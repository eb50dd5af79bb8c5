//! Hostile programs in a real pod: the cases of every platform, with the same endings and controls,
//! and what only a cluster has around a sandbox.
//!
//! Needs the bed's nodes on this machine: the pod's processes are looked at from outside.

#[allow(
    dead_code,
    reason = "shared with the local platform's suite, where isolation may be missing"
)]
#[path = "../hostile/cases.rs"]
mod cases;
#[path = "../hostile/judge.rs"]
mod judge;
#[allow(
    dead_code,
    reason = "some programs are the local platform's neighbours'"
)]
#[path = "../hostile/programs.rs"]
mod programs;
#[path = "../hostile/traces.rs"]
mod traces;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use gantry::model::{Ending, UserId};
use gantry::platform::conformance::{finish, python};
use gantry::platform::{Platform, Sessions};
use gantry::runner::client::Session;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::api::{ListParams, LogParams};
use kube::{Api, ResourceExt};

use crate::bed::{Bed, SERVER, eventually};
use cases::Case;
use judge::{KILLED_WITHIN_IN_COMPANY, check, hello, tell};
use programs::Surroundings;
use traces::Processes;

/// Cases at one time, each in a test pod of its own: most of them wait.
const LANES: usize = 3;

/// Repeats of a case with one ending.
const REPEATS: usize = 2;
const FULL_REPEATS: usize = 20;

/// A pod has one user id to give, and so one slot.
const SLOTS: usize = 1;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn hostile_programs_end_as_they_should_in_a_pod_and_leave_nothing_behind() {
    let data = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(data.path().join("keys")).unwrap();
    std::fs::write(data.path().join("keys/admin"), "a key").unwrap();
    // Left open for whatever this test starts: the controls on the machine see it.
    let key = std::fs::File::open(data.path().join("keys/admin")).unwrap();
    rustix::io::fcntl_setfd(&key, rustix::io::FdFlags::empty()).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("gantry-hostile-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let surroundings = Surroundings {
        data: data.path().to_owned(),
        port: tcp.local_addr().unwrap().port(),
        name,
    };
    let bed = Arc::new(Bed::start().await);
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let word = std::env::var("GANTRY_TEST_CASE").unwrap_or_default();
    let mut cases: Vec<Case> = cases::all(full, &surroundings)
        .into_iter()
        .filter_map(in_a_pod)
        .collect();
    cases.retain(|case| case.name.contains(&word));
    cases.reverse();
    let lanes = Lanes {
        cases: Arc::new(Mutex::new(cases)),
        sessions: Sessions::new(bed.shared()),
        repeats: if full { FULL_REPEATS } else { REPEATS },
        bed,
    };
    let lanes: Vec<_> = (0..LANES)
        .map(|lane| tokio::spawn(lanes.clone().run(lane)))
        .collect();
    let mut failures = Vec::new();
    for lane in lanes {
        failures.extend(lane.await.unwrap());
    }
    assert!(
        failures.is_empty(),
        "{} cases failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// What a pod shows that the local platform hides. A container of a cluster may neither mount nor make
/// namespaces, so user code sees its image's own folders and that its pod has other processes; what
/// matters about them is asked for all the same.
fn in_a_pod(mut case: Case) -> Option<Case> {
    match case.name.as_str() {
        // A file of the server's: there is none in a pod. Its agent's socket has a test of its own.
        "unix sockets of the server" => return None,
        "host paths" => case.output = Some(|stdout, _| nothing_but(stdout, |line| line == "/opt")),
        "sweep of /proc and /sys" => {
            case.output =
                Some(|stdout, _| nothing_but(stdout, |line| line.starts_with("process ")));
        }
        "setuid programs" => {
            case.output =
                Some(|stdout, _| nothing_but(stdout, |line| line.starts_with("setuid works on ")));
        }
        _ => {}
    }
    Some(case)
}

/// Every line is one of those that do no harm.
fn nothing_but(stdout: &[u8], harmless: fn(&str) -> bool) -> Result<(), String> {
    let text = String::from_utf8_lossy(stdout);
    let found: Vec<&str> = text.lines().filter(|line| !harmless(line)).collect();
    match found.is_empty() {
        true => Ok(()),
        false => Err(format!("{found:?}")),
    }
}

#[derive(Clone)]
struct Lanes {
    cases: Arc<Mutex<Vec<Case>>>,
    sessions: Sessions,
    repeats: usize,
    bed: Arc<Bed>,
}

impl Lanes {
    /// Takes cases until there are none; what failed is returned.
    async fn run(self, lane: usize) -> Vec<String> {
        let user = self.bed.user(&format!("hostile-{lane}"));
        let session = self.sessions.of(&user);
        let failures = self.cases_of(&session, &user).await;
        self.bed.forget(user.as_str()).await;
        failures.unwrap_or_else(|error| vec![format!("lane {lane}: {error:#}")])
    }

    async fn cases_of(&self, session: &Session, user: &UserId) -> anyhow::Result<Vec<String>> {
        hello(session).await?;
        let mut failures = Vec::new();
        let mut pod = TestPod::of(&self.bed, user).await?;
        loop {
            let Some(case) = self.cases.lock().unwrap().pop() else {
                return Ok(failures);
            };
            let started = Instant::now();
            let patience = KILLED_WITHIN_IN_COMPANY;
            let mut result = check(session, &case, self.repeats, patience).await;
            if let Err(error) = self.nothing_is_left(session, &pod).await {
                let log = pod.log().await;
                result = result.and(Err(error.context(format!("afterwards; its log: {log}"))));
                // What is broken now is not the next case's doing.
                if hello(session).await.is_ok() {
                    pod = TestPod::of(&self.bed, user).await?;
                }
            }
            tell(&case, started.elapsed(), result, &mut failures);
        }
    }

    /// What has to hold after every case.
    async fn nothing_is_left(&self, session: &Session, pod: &TestPod) -> anyhow::Result<()> {
        let since = Instant::now();
        let second = Duration::from_secs(1);
        pod.processes.is_empty_within(second, since).await?;
        hello(session).await?;
        pod.is_the_same().await?;
        pod.processes.has_its_descriptors_back().await
    }
}

/// A test pod as it was when it was met.
struct TestPod {
    pods: Api<Pod>,
    name: String,
    container: String,
    processes: Processes,
}

impl TestPod {
    async fn of(bed: &Bed, user: &UserId) -> anyhow::Result<Self> {
        let pods: Api<Pod> = Api::namespaced(bed.client.clone(), &user.namespace());
        let name = format!("{user}-test");
        let container = container(&pods.get(&name).await?)?;
        let (_, id) = container.rsplit_once('/').context("no container id")?;
        let agents = processes(id, "agent");
        let agent = *agents
            .first()
            .context("the agent is not among this machine's processes")?;
        Ok(Self {
            processes: Processes::of(agent, SLOTS)?,
            pods,
            name,
            container,
        })
    }

    /// The container that was met is still there, and its runner gave up nothing.
    async fn is_the_same(&self) -> anyhow::Result<()> {
        let now = container(&self.pods.get(&self.name).await?)?;
        ensure!(now == self.container, "the runner was started again: {now}");
        let log = self.log().await;
        ensure!(!log.contains("given up"), "the agent lost its slot: {log}");
        Ok(())
    }

    async fn log(&self) -> String {
        let params = LogParams {
            tail_lines: Some(20),
            ..LogParams::default()
        };
        let log = self.pods.logs(&self.name, &params).await;
        log.unwrap_or_else(|error| error.to_string())
    }
}

fn container(pod: &Pod) -> anyhow::Result<String> {
    let status = pod.status.as_ref().context("no status")?;
    let containers = status
        .container_statuses
        .as_ref()
        .context("no containers")?;
    containers[0].container_id.clone().context("no container")
}

/// The runner's processes in a container, as this machine numbers them: `agent`, or `attach`.
pub fn processes(container: &str, role: &str) -> Vec<i32> {
    let is_one = |pid: &i32| {
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"));
        let command = std::fs::read(format!("/proc/{pid}/cmdline"));
        let role = Some(role.as_bytes());
        cgroup.is_ok_and(|cgroup| cgroup.contains(container))
            && command.is_ok_and(|command| command.split(|b| *b == 0).nth(1) == role)
    };
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(is_one).collect()
}

/// What a cluster has within reach of a pod, by name.
async fn around(bed: &Bed, neighbour: &UserId) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let from = |name: &str| {
        let value = std::env::var(name).unwrap();
        let value = value.trim_end_matches('/');
        value
            .rsplit_once("//")
            .map_or(value, |(_, rest)| rest)
            .to_owned()
    };
    all.insert("Elasticsearch".to_owned(), from("ELASTICSEARCH_HOST"));
    all.insert("S3".to_owned(), from("AWS_ENDPOINT_URL"));
    all.insert("the ingress controller".to_owned(), from("TESTBED_INGRESS"));
    let services: Api<Service> = Api::namespaced(bed.client.clone(), "default");
    let kubernetes = services.get("kubernetes").await.unwrap();
    let cluster_ip = kubernetes.spec.unwrap().cluster_ip.unwrap();
    all.insert("the API server".to_owned(), format!("{cluster_ip}:443"));
    let nodes: Api<Node> = Api::all(bed.client.clone());
    for node in nodes.list(&ListParams::default()).await.unwrap() {
        let addresses = node.status.clone().unwrap().addresses.unwrap();
        let address = &addresses
            .iter()
            .find(|a| a.type_ == "InternalIP")
            .unwrap()
            .address;
        all.insert(
            format!("the kubelet of {}", node.name_any()),
            format!("{address}:10250"),
        );
    }
    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), &neighbour.namespace());
    let released = ListParams::default().labels("app=prod");
    let pod = pods.list(&released).await.unwrap().items.remove(0);
    let address = pod.status.unwrap().pod_ip.unwrap();
    all.insert(
        "a neighbour's program".to_owned(),
        format!("{address}:3000"),
    );
    all.insert("a neighbour's runner".to_owned(), format!("{address}:3001"));
    all
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn test_runs_reach_nothing_of_the_cluster() {
    let bed = Bed::start().await;
    let neighbour = bed.user("neighbour");
    let repl = bed.repl(&neighbour);
    let code = format!("VERSION = 'one'\n{SERVER}");
    let spec = bed.spec(&neighbour, &repl, &code, BTreeMap::new()).await;
    bed.platform.ensure_release(&spec).await.unwrap();
    let mut targets = around(&bed, &neighbour).await;
    // Stands for Gantry itself: a port of the machine that the bed's pods can reach.
    let host = targets["S3"].split(':').next().unwrap().to_owned();
    let gantry = TcpListener::bind((host.as_str(), 0)).unwrap();
    let address = gantry.local_addr().unwrap().to_string();
    targets.insert("Gantry".to_owned(), address);
    let program = format!(
        "
import json, socket
for name, address in json.loads({:?}).items():
    host, port = address.rsplit(':', 1)
    try:
        socket.create_connection((host, int(port)), 3).close()
        print('connected', name)
    except OSError:
        pass
",
        serde_json::to_string(&targets).unwrap()
    );
    let user = bed.user("closed");
    let sessions = Sessions::new(bed.shared());
    let ended = finish(&mut sessions.of(&user).start(python(&program))).await;
    let ended = ended.unwrap();
    assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
    assert_eq!(String::from_utf8_lossy(&ended.stdout), "");
    // Positive control: the same program where the operator allows the network, and no policy closes it, reaches
    // all of it.
    let open = Bed::start_with(|config| config.network = true).await;
    let other = open.user("open");
    let sessions = Sessions::new(open.shared());
    let first = finish(&mut sessions.of(&other).start(python("print(1)"))).await;
    assert_eq!(first.unwrap().stdout, b"1\n");
    bed.overrule(&[neighbour.namespace(), other.namespace()], true)
        .await;
    let expected: String = targets
        .keys()
        .map(|name| format!("connected {name}\n"))
        .collect();
    // A policy is in force a moment after it was made.
    eventually("everything is reached", || async {
        let ended = finish(&mut sessions.of(&other).start(python(&program))).await;
        let reached = String::from_utf8_lossy(&ended.unwrap().stdout).into_owned();
        println!("reached: {reached:?}");
        reached == expected
    })
    .await;
    bed.platform.drop_repl(&repl).await.unwrap();
    for user in [&neighbour, &user, &other] {
        bed.forget(user.as_str()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_run_cannot_speak_to_its_agent_or_in_its_name() {
    let program = "
import os, socket
for act in (lambda: socket.socket(socket.AF_UNIX).connect('/run/gantry/agent/socket'),
            lambda: os.listdir('/run/gantry/agent'),
            lambda: os.rename('/run/gantry/agent', '/run/gantry/other'),
            lambda: open('/run/gantry/hook/sitecustomize.py', 'a').close()):
    try:
        act()
        print('done')
    except OSError as error:
        print(type(error).__name__)
";
    let bed = Bed::start().await;
    let user = bed.user("agent");
    let session = Sessions::new(bed.shared()).of(&user);
    let ended = finish(&mut session.start(python(program))).await.unwrap();
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(!said.contains("done"), "{said}");
    assert_eq!(said.lines().count(), 4, "{said}");
    // Positive control: an operator in the pod, who is root, can connect.
    let connect =
        "import socket; socket.socket(socket.AF_UNIX).connect('/run/gantry/agent/socket')";
    let said = crate::faults::said_in_pod(
        &user,
        &["python3", "-c", &format!("{connect}; print('done')")],
    );
    assert_eq!(said, "done\n");
    bed.forget(user.as_str()).await;
}
