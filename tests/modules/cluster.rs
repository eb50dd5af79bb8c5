//! The same suite on a cluster, and what only a cluster has: pods, quotas, images, ways to a pod.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::server::PATIENCE;
use super::{IDLE, Modules, every_row, packages_and_restart, stopped_when_idle};

/// A cause is told within this (a cause a user can read).
const TOLD_WITHIN: Duration = Duration::from_secs(40);

/// Of a server on the bed.
const KUBERNETES: [(&str, &str); 4] = [
    ("GANTRY_PLATFORM", "kubernetes"),
    ("GANTRY_NAMESPACE", "gantry-modules-test"),
    ("GANTRY_CLEAN_UP", "off"),
    // What is tested here needs no search.
    ("ELASTICSEARCH_HOST", ""),
];

/// Modules of a user that no other run has; dropped, the user's namespace goes.
pub struct OnTheBed(pub Modules);

impl OnTheBed {
    pub async fn start(name: &str, variables: &[(&str, &str)]) -> Self {
        let user = format!("{name}-{:x}", std::process::id());
        Self(Modules::of(&user, &[&KUBERNETES, variables].concat()).await)
    }

    fn namespace(&self) -> String {
        format!("user-{}", self.0.user)
    }

    pub fn kubectl(&self, arguments: &[&str]) -> String {
        let output = kubectl(&[&["-n", &self.namespace()], arguments].concat(), "");
        assert!(output.status.success(), "kubectl {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn pods(&self) -> Vec<String> {
        let names = self.kubectl(&["get", "pods", "-o", "name"]);
        names.lines().map(str::to_owned).collect()
    }
}

impl Drop for OnTheBed {
    fn drop(&mut self) {
        let namespace = self.namespace();
        kubectl(
            &[
                "delete",
                "namespace",
                &namespace,
                "--wait=false",
                "--ignore-not-found",
            ],
            "",
        );
    }
}

fn kubectl(arguments: &[&str], input: &str) -> Output {
    use std::io::Write;
    let program = std::env::var("TESTBED_KUBECTL").unwrap_or_else(|_| "kubectl".to_owned());
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

/// A package index that pods reach: the machine's address on the bed's bridge, with one package.
struct Index {
    process: Child,
    _folder: tempfile::TempDir,
    host: String,
    url: String,
}

impl Index {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let package = folder.path().join("simple").join("iniconfig");
        std::fs::create_dir_all(&package).unwrap();
        let fetched = Command::new("python3")
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary",
                ":all:",
            ])
            .args(["iniconfig==2.0.0", "--dest"])
            .arg(&package)
            .output()
            .unwrap();
        assert!(fetched.status.success(), "{fetched:?}");
        let store = std::env::var("AWS_ENDPOINT_URL").expect("the bed's variables are not set");
        let uri: axum::http::Uri = store.parse().unwrap();
        let host = uri.host().unwrap().to_owned();
        let mut process = Command::new("python3")
            .args([
                "-u",
                "-m",
                "http.server",
                "0",
                "--bind",
                &host,
                "--directory",
            ])
            .arg(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut lines = BufReader::new(process.stdout.take().unwrap());
        lines.read_line(&mut said).unwrap();
        let port = said
            .split("port ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let url = format!("http://{host}:{}/simple", port.unwrap());
        Self {
            process,
            _folder: folder,
            host,
            url,
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn functions_are_called_and_every_failure_has_its_words() {
    let bed = OnTheBed::start("rows", &[]).await;
    every_row(&bed.0).await;
    pods_are_as_restricted_as_there_is(&bed);
    calls_are_spread_over_replicas(&bed.0).await;
    replicas_follow_the_processor_time(&bed).await;
}

/// The strictest Pod Security standard takes the pod as it is.
fn pods_are_as_restricted_as_there_is(bed: &OnTheBed) {
    let strict = format!("{}-strict", bed.namespace());
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": strict,
        "labels": { "pod-security.kubernetes.io/enforce": "restricted" } } });
    assert!(
        kubectl(&["apply", "-f", "-"], &namespace.to_string())
            .status
            .success()
    );
    let deployment = bed.kubectl(&["get", "deployment", "module-math", "-o", "json"]);
    let deployment: Value = serde_json::from_str(&deployment).unwrap();
    let mut spec = deployment["spec"]["template"]["spec"].clone();
    spec["serviceAccountName"] = "default".into();
    spec.as_object_mut().unwrap().remove("serviceAccount");
    let dry = |spec: &Value| {
        let pod = json!({ "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "dry", "namespace": strict }, "spec": spec });
        kubectl(&["create", "--dry-run=server", "-f", "-"], &pod.to_string())
    };
    // The account is made a moment after its namespace.
    let begun = Instant::now();
    let mut taken = dry(&spec);
    while !taken.status.success() && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(200));
        taken = dry(&spec);
    }
    let mut weaker = spec.clone();
    weaker["securityContext"]["runAsNonRoot"] = false.into();
    let refused = dry(&weaker);
    kubectl(&["delete", "namespace", &strict, "--wait=false"], "");
    assert!(taken.status.success(), "{taken:?}");
    assert!(
        !refused.status.success(),
        "the standard is not enforced here"
    );
    assert_eq!(spec["automountServiceAccountToken"], false);
    let name = bed.kubectl(&["get", "pods", "-l", "gantry.dev/module=math", "-o", "name"]);
    let name = name.lines().next().unwrap();
    let token = "/var/run/secrets/kubernetes.io";
    let looked = kubectl(
        &["-n", &bed.namespace(), "exec", name, "--", "ls", token],
        "",
    );
    assert!(!looked.status.success(), "{looked:?}");
}

async fn calls_are_spread_over_replicas(modules: &Modules) {
    modules.created("socket").await;
    let scale = modules.server.post("/modules/socket/scale");
    let (status, told) = modules.ask(scale.json(&json!({ "replicas": 2 }))).await;
    assert_eq!(status, 200, "{told}");
    let begun = Instant::now();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 2 {
        let told = modules.result("socket", "gethostname", json!([])).await;
        seen.insert(told["result"].as_str().unwrap().to_owned());
        assert!(begun.elapsed() < PATIENCE, "{seen:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn replicas_follow_the_processor_time(bed: &OnTheBed) {
    let scaler = || bed.kubectl(&["get", "hpa", "-o", "jsonpath={.items[*].spec.maxReplicas}"]);
    let scale = async |body: Value| {
        let request = bed.0.server.post("/modules/socket/scale").json(&body);
        bed.0.ask(request).await
    };
    let auto = json!({ "min": 1, "max": 3, "cpu_percent": 60 });
    let (status, told) = scale(auto.clone()).await;
    assert_eq!((status, &told["autoscale"]), (200, &auto), "{told}");
    assert_eq!(scaler(), "3");
    let (status, told) = scale(json!({ "replicas": 1 })).await;
    assert_eq!((status, &told["replicas"]), (200, &json!(1)), "{told}");
    assert_eq!(scaler(), "");
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn packages_are_installed_and_modules_come_back_with_the_server() {
    let index = Index::start();
    let mut bed = OnTheBed::start(
        "packages",
        &[
            ("GANTRY_ALLOW_PACKAGES", "true"),
            ("PIP_INDEX_URL", &index.url),
            ("GANTRY_PACKAGE_CACHE_CLASS", "standard"),
        ],
    )
    .await;
    packages_and_restart(&mut bed.0).await;
    let (_, told) = bed.0.ask(bed.0.server.get("/modules")).await;
    let all = told["modules"].as_array().unwrap();
    let iniconfig = all.iter().find(|one| one["module"] == "iniconfig").unwrap();
    assert_eq!(iniconfig["packages"], json!(["iniconfig==2.0.0"]), "{told}");
    let policy = bed.kubectl(&[
        "get",
        "networkpolicy",
        "gantry-module-packages",
        "-o",
        "yaml",
    ]);
    assert!(policy.contains(&format!("{}/32", index.host)), "{policy}");
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn a_module_is_stopped_when_idle_and_a_pod_that_is_lost_is_replaced() {
    let bed = OnTheBed::start("idle", &[IDLE, ("GANTRY_MODULE_FORWARD", "true")]).await;
    stopped_when_idle(&bed.0).await;
    // By port-forward: the stream that is kept breaks with its pod, and another one takes its place.
    let pods = bed.pods();
    assert_eq!(pods.len(), 1, "{pods:?}");
    bed.kubectl(&[
        "delete",
        &pods[0],
        "--grace-period=0",
        "--force",
        "--wait=false",
    ]);
    let begun = Instant::now();
    let body = json!({ "args": [16] });
    loop {
        let (status, told) = bed.0.run("math", "sqrt", &body).await;
        if status == 200 && !bed.pods().contains(&pods[0]) {
            break;
        }
        assert!([200, 503].contains(&status), "{told}");
        assert!(begun.elapsed() < PATIENCE, "{told}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn a_pod_that_cannot_come_up_says_why() {
    for (name, variable, said) in [
        (
            "image",
            ("RUNNER_IMAGE", "gantry-no-such-image:1"),
            "gantry-no-such-image:1",
        ),
        (
            "quota",
            ("GANTRY_USER_QUOTA", "limits.memory=100Mi"),
            "exceeded quota",
        ),
    ] {
        let bed = OnTheBed::start(name, &[variable]).await;
        let begun = Instant::now();
        let (status, told) = bed.0.create("math", json!({})).await;
        assert_eq!(status, 503, "{told}");
        assert!(told["cause"].as_str().unwrap().contains(said), "{told}");
        assert!(begun.elapsed() < TOLD_WITHIN, "{:?}", begun.elapsed());
        let (_, listed) = bed.0.ask(bed.0.server.get("/modules")).await;
        let one = &listed["modules"][0];
        assert_eq!(one["state"], "failed", "{listed}");
        assert!(one["cause"].as_str().unwrap().contains(said), "{listed}");
        let removed = super::client().delete(bed.0.server.url("/pod/math"));
        assert_eq!(bed.0.ask(removed).await.0, 200);
        assert_eq!(bed.kubectl(&["get", super::MADE, "-o", "name"]), "");
    }
}
