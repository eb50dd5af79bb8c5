//! Who may reach whom. Every cell is tried from inside the pod's own network namespace, first with the policies
//! overruled, when it must succeed, and then with them as they are.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gantry::model::{ContainerSpec, ModuleSpec, Order, Package, ServiceSpec, UserId};
use gantry::platform::conformance::{finish, python};
use gantry::platform::{Platform, Sessions, WorkspaceSpec};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::json;

use crate::bed::{Bed, PATIENCE, SERVER, eventually};

const PROBE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/kubernetes/security/probe.py"
);

/// Nothing of Gantry's listens on it: a port that no policy may open.
const OTHER_PORT: u16 = 7_777;

/// Who asks.
const TEST_POD: &str = "test pod";
const RELEASE: &str = "release";
const WORKSPACE: &str = "workspace";
const DATABASE: &str = "database";
const MODULE: &str = "module";
const SERVICE: &str = "service";
const INIT: &str = "init container";
const INSTALLER: &str = "module's installer";
const STRANGER: &str = "pod without policies";
const MACHINE: &str = "machine of the ingress controller";

/// Where something answers: protocol, address, port.
type Target = (&'static str, String, u16);

/// A process that goes with the test.
struct Listener(Child);

impl Drop for Listener {
    fn drop(&mut self) {
        // It runs the one that listens as a child, in a group of their own.
        let group = format!("-{}", self.0.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        let _ = self.0.wait();
    }
}

fn listen(address: &str, ports: &[u16]) -> Listener {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new("python3");
    command.args([PROBE, "--listen", address]);
    command.args(ports.iter().map(u16::to_string));
    Listener(command.process_group(0).spawn().unwrap())
}

/// What each of those who ask reaches.
async fn reached(
    from: &BTreeMap<&'static str, Option<String>>,
    to: &BTreeMap<String, Target>,
) -> BTreeMap<String, BTreeSet<String>> {
    let asked = json!({ "from": from, "to": to }).to_string();
    let answer = tokio::task::spawn_blocking(move || {
        let mut command = Command::new("python3");
        command
            .arg(PROBE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(asked.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap().stdout
    });
    serde_json::from_slice(&answer.await.unwrap()).unwrap()
}

/// What of a user's runs.
struct Tenant {
    user: UserId,
    /// Who it is, and its pod's address.
    pods: BTreeMap<&'static str, String>,
}

impl Tenant {
    fn services(&self) -> String {
        format!("services-{}", self.user)
    }
}

/// The addresses of the pods with these labels, when there are so many.
async fn addresses(bed: &Bed, namespace: &str, labels: &str, count: usize) -> Vec<String> {
    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), namespace);
    let started = Instant::now();
    loop {
        let found = pods
            .list(&ListParams::default().labels(labels))
            .await
            .unwrap();
        let status = found.into_iter().filter_map(|pod| pod.status);
        let found: Vec<String> = status.filter_map(|status| status.pod_ip).collect();
        if found.len() == count {
            return found;
        }
        assert!(
            started.elapsed() < PATIENCE,
            "{labels} in {namespace}: {found:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn one(bed: &Bed, namespace: &str, labels: &str) -> String {
    addresses(bed, namespace, labels, 1).await.remove(0)
}

async fn test_pod(bed: &Bed, user: &UserId) -> String {
    let sessions = Sessions::new(bed.shared());
    let ended = finish(&mut sessions.of(user).start(python("print(1)"))).await;
    assert_eq!(ended.unwrap().stdout, b"1\n");
    one(bed, &user.namespace(), "gantry.dev/role=test").await
}

/// A release and its database.
async fn release(bed: &Bed, user: &UserId) -> [String; 2] {
    let repl = bed.repl(user);
    let code = format!("VERSION = 'here'\n{SERVER}");
    let mut spec = bed.spec(user, &repl, &code, BTreeMap::new()).await;
    spec.database = true;
    bed.platform.ensure_release(&spec).await.unwrap();
    let of = |app: &str| format!("gantry.dev/repl={repl},app={app}");
    [
        one(bed, &user.namespace(), &of("prod")).await,
        one(bed, &user.namespace(), &of("database")).await,
    ]
}

/// A workspace with files, or one whose init container finds none and never ends well.
async fn workspace(bed: &Bed, user: &UserId, name: &str, files: bool) -> String {
    let repl = format!("{user}-{name}").parse().unwrap();
    if files {
        bed.spec(user, &repl, "print('here')", BTreeMap::new())
            .await;
    }
    let spec = WorkspaceSpec {
        user_id: user.clone(),
        repl_id: repl.clone(),
        order: Order::now(),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
    };
    bed.platform.open_workspace(&spec).await.unwrap();
    one(bed, &user.namespace(), &format!("gantry.dev/repl={repl}")).await
}

async fn module(bed: &Bed, user: &UserId, name: &str, packages: &[&str]) -> String {
    let packages = packages
        .iter()
        .map(|one| Package::try_from((*one).to_owned()).unwrap());
    let spec = ModuleSpec {
        name: name.parse().unwrap(),
        packages: Some(packages.collect()),
        scale: None,
    };
    let modules = bed.platform.modules();
    let labels = format!("gantry.dev/module={}", spec.name.label());
    let namespace = user.namespace();
    tokio::select! {
        // Its packages never come, so this does not resolve for one that has some.
        made = modules.ensure(user, &spec) => {
            made.unwrap();
            one(bed, &namespace, &labels).await
        }
        address = one(bed, &namespace, &labels) => address,
    }
}

/// The addresses of a service's two replicas.
async fn service(bed: &Bed, user: &UserId) -> Vec<String> {
    let container = ContainerSpec {
        name: "main".to_owned(),
        image: std::env::var("RUNNER_IMAGE").unwrap().parse().unwrap(),
        command: vec!["sleep".to_owned(), "1000".to_owned()],
        args: Vec::new(),
        env: BTreeMap::new(),
    };
    let spec = ServiceSpec {
        name: "shop".parse().unwrap(),
        replicas: 2,
        container: Some(container),
    };
    let services = bed.platform.services().unwrap();
    let outcome = services.apply(user, &[spec]).await.unwrap();
    assert_eq!(outcome[0].outcome, "created", "{outcome:?}");
    let namespace = format!("services-{user}");
    addresses(bed, &namespace, "gantry.dev/service=shop", 2).await
}

/// Everything that a user may have, or as much of it as a neighbour needs to be reached.
async fn tenant(bed: &Bed, name: &str, all: bool) -> (Tenant, String) {
    let user = bed.user(name);
    let more = async {
        if !all {
            return None;
        }
        let opened = workspace(bed, &user, "files", true).await;
        let empty = workspace(bed, &user, "empty", false).await;
        let installer = module(bed, &user, "requests", &["no-such-package==1"]).await;
        Some([opened, empty, installer])
    };
    let (test, [program, database], module, service, more) = tokio::join!(
        test_pod(bed, &user),
        release(bed, &user),
        module(bed, &user, "math", &[]),
        service(bed, &user),
        more,
    );
    let [first, second] = <[String; 2]>::try_from(service).unwrap();
    let mut pods = BTreeMap::from([
        (TEST_POD, test),
        (RELEASE, program),
        (DATABASE, database),
        (MODULE, module),
        (SERVICE, first),
    ]);
    if let Some(more) = more {
        pods.extend([WORKSPACE, INIT, INSTALLER].into_iter().zip(more));
    }
    (Tenant { user, pods }, second)
}

/// A pod in a namespace that no policy closes: a control for every target, and a name server in a pod.
async fn stranger(bed: &Bed, namespace: &str) -> String {
    let namespaces: Api<Namespace> = Api::all(bed.client.clone());
    let made = serde_json::from_value(json!({ "metadata": { "name": namespace } })).unwrap();
    namespaces
        .create(&PostParams::default(), &made)
        .await
        .unwrap();
    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), namespace);
    let pod = serde_json::from_value(json!({
        "metadata": { "name": "stranger", "labels": { "app": "stranger" } },
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "main", "image": std::env::var("RUNNER_IMAGE").unwrap(), "imagePullPolicy": "IfNotPresent",
                "command": ["sleep", "1000"],
            }],
        },
    }));
    let pod = pod.unwrap();
    // The account of a namespace is made a moment after it.
    eventually("the pod is made", || async {
        pods.create(&PostParams::default(), &pod).await.is_ok()
    })
    .await;
    one(bed, namespace, "app=stranger").await
}

/// Resolves when who asks reaches what is expected, and nothing else.
async fn expect(
    what: &str,
    from: &BTreeMap<&'static str, Option<String>>,
    to: &BTreeMap<String, Target>,
    expected: impl Fn(&str, &str) -> bool,
) {
    let started = Instant::now();
    loop {
        let reached = reached(from, to).await;
        let mut wrong = Vec::new();
        for (who, reached) in &reached {
            for target in to.keys() {
                match (expected(who, target), reached.contains(target)) {
                    (true, false) => wrong.push(format!("{who} does not reach {target}")),
                    (false, true) => wrong.push(format!("{who} reaches {target}")),
                    (true, true) | (false, false) => {}
                }
            }
        }
        if wrong.is_empty() {
            println!(
                "{what}: {} cells after {:?}",
                from.len() * to.len(),
                started.elapsed()
            );
            return;
        }
        // A policy is in force a moment after it was changed.
        assert!(
            started.elapsed() < PATIENCE,
            "{what}:\n{}",
            wrong.join("\n")
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What is promised. Whatever is not named here is closed.
fn promised(who: &str, target: &str) -> bool {
    let programs = [RELEASE, WORKSPACE, INIT];
    let resolve = programs.contains(&who) || [INSTALLER, SERVICE].contains(&who);
    let calls = [STRANGER, MACHINE].contains(&who);
    match target.split_once(": ").map_or(target, |(kind, _)| kind) {
        // Nothing tells a policy where the servers of names are, so port 53 of everything is open.
        "names" => resolve || who == STRANGER,
        "internet" => programs.contains(&who) || [SERVICE, STRANGER].contains(&who),
        "store" => programs.contains(&who) || who == STRANGER,
        "package index" => [INSTALLER, STRANGER].contains(&who),
        "API server" | "kubelet" | "cloud" | "private" | "Elasticsearch" => who == STRANGER,
        // A pod reaches itself, too.
        "own database" => programs.contains(&who) || who == DATABASE,
        "own module" => programs.contains(&who) || who == MODULE || calls,
        "own release" => who == RELEASE || calls,
        "own service" => who == SERVICE,
        "neighbour's release" | "neighbour's module" => calls,
        "neighbour" => false,
        other => panic!("nothing is promised of {other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn everybody_reaches_whom_they_may_and_nobody_else() {
    let store = std::env::var("AWS_ENDPOINT_URL").unwrap();
    let store: axum::http::Uri = store.parse().unwrap();
    let host = store.host().unwrap().to_owned();
    let index = std::net::TcpListener::bind((host.as_str(), 0)).unwrap();
    let index_port = index.local_addr().unwrap().port();
    std::thread::spawn(move || index.incoming().for_each(drop));
    let bed = Bed::start_with(|config| {
        config.packages.addresses = Some(vec![(host.parse().unwrap(), index_port)]);
        let url = format!("http://{host}:{index_port}/simple");
        let variables = BTreeMap::from([("PIP_INDEX_URL".to_owned(), url)]);
        config.packages.variables = Some(variables);
    })
    .await;
    let open = bed.user("open").namespace();
    let ((own, other_replica), (neighbour, _), stranger) = tokio::join!(
        tenant(&bed, "own", true),
        tenant(&bed, "next", false),
        stranger(&bed, &open),
    );

    let mut listeners = vec![
        listen(&stranger, &[53]),
        listen(&other_replica, &[OTHER_PORT]),
    ];
    listeners.extend(
        neighbour
            .pods
            .values()
            .map(|address| listen(address, &[OTHER_PORT])),
    );

    let mut pods: BTreeMap<String, Target> = BTreeMap::from([
        (
            "own database".to_owned(),
            ("tcp", own.pods[DATABASE].clone(), 5_432),
        ),
        (
            "own module".to_owned(),
            ("tcp", own.pods[MODULE].clone(), 50_051),
        ),
        (
            "own release".to_owned(),
            ("tcp", own.pods[RELEASE].clone(), 3_000),
        ),
        ("own service".to_owned(), ("tcp", other_replica, OTHER_PORT)),
        (
            "neighbour's release".to_owned(),
            ("tcp", neighbour.pods[RELEASE].clone(), 3_000),
        ),
        (
            "neighbour's module".to_owned(),
            ("tcp", neighbour.pods[MODULE].clone(), 50_051),
        ),
        (
            "neighbour: its database".to_owned(),
            ("tcp", neighbour.pods[DATABASE].clone(), 5_432),
        ),
    ]);
    for (who, address) in &neighbour.pods {
        for protocol in ["tcp", "udp"] {
            let name = format!("neighbour: another port of its {who}, {protocol}");
            pods.insert(name, (protocol, address.clone(), OTHER_PORT));
        }
    }
    let mut to = pods.clone();
    let mut add = |name: &str, protocol, address: &str, port| {
        to.insert(name.to_owned(), (protocol, address.to_owned(), port));
    };
    add("API server: its Service", "tcp", "10.96.0.1", 443);
    add("API server", "tcp", &host, 6_443);
    for number in 1..=3 {
        add(
            &format!("kubelet: node {number}"),
            "tcp",
            &format!("10.245.0.{}", 10 + number),
            10_250,
        );
    }
    add("cloud: metadata", "tcp", "169.254.169.254", 80);
    add("cloud: Azure", "tcp", "168.63.129.16", 80);
    add("cloud: Oracle", "tcp", "192.0.0.192", 80);
    add("cloud: Alibaba", "tcp", "100.100.100.200", 80);
    for address in ["172.16.0.1", "192.168.0.1", "198.18.0.1", "240.0.0.1"] {
        add(&format!("private: {address}"), "tcp", address, 443);
    }
    for protocol in ["tcp", "udp"] {
        add(
            &format!("names: a pod's, {protocol}"),
            protocol,
            &stranger,
            53,
        );
        add(
            &format!("names: the host's, {protocol}"),
            protocol,
            &host,
            53,
        );
        add(
            &format!("names: the Service's, {protocol}"),
            protocol,
            "10.96.0.10",
            53,
        );
        add(
            &format!("names: anybody's, {protocol}"),
            protocol,
            "203.0.113.10",
            53,
        );
    }
    add("store", "tcp", &host, store.port_u16().unwrap());
    add("Elasticsearch", "tcp", &host, 9_200);
    add("package index", "tcp", &host, index_port);
    add("internet: https", "tcp", "203.0.113.10", 443);
    add("internet: http", "tcp", "203.0.113.10", 80);

    let mut from: BTreeMap<&'static str, Option<String>> = BTreeMap::new();
    from.extend(
        own.pods
            .iter()
            .map(|(who, address)| (*who, Some(address.clone()))),
    );
    from.insert(STRANGER, Some(stranger));
    let machine = BTreeMap::from([(MACHINE, None)]);

    let closed = [
        own.user.namespace(),
        own.services(),
        neighbour.user.namespace(),
        neighbour.services(),
    ];
    bed.overrule(&closed, true).await;
    tokio::join!(
        expect("control", &from, &to, |_, _| true),
        expect("control, from the machine", &machine, &pods, |_, _| true),
    );
    bed.overrule(&closed, false).await;
    tokio::join!(
        expect("as promised", &from, &to, promised),
        expect("as promised, from the machine", &machine, &pods, promised),
    );
    drop(listeners);

    for user in [&own.user, &neighbour.user] {
        bed.forget(user.as_str()).await;
    }
    let namespaces: Api<Namespace> = Api::all(bed.client.clone());
    for namespace in [open, own.services(), neighbour.services()] {
        let _ = namespaces
            .delete(&namespace, &DeleteParams::default())
            .await;
    }
}
