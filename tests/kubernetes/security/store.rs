//! Who may read and write what in the code store, and what the cluster lets Gantry do.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use gantry::model::{ReplId, UserId};
use gantry::platform::Platform;
use gantry::platform::kubernetes::{BUILT_IN_TEMPLATE, Template};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::Api;
use kube::api::{DeleteParams, ListParams};

use crate::bed::{Bed, SERVER, eventually};

/// The Secret that older servers made.
const KEYS: &str = "gantry-store";

/// An installation of these tests' own: a start takes the keys out of all of its namespaces.
const INSTALLATION: &str = "gantry-store-tests";

async fn start() -> Bed {
    Bed::start_with(|config| config.namespace = INSTALLATION.to_owned()).await
}

fn program(version: &str) -> String {
    format!("VERSION = '{version}'\n{SERVER}")
}

async fn serves(bed: &Bed, repl: &ReplId, version: &str) {
    eventually(&format!("{repl} serves {version}"), || async {
        let Ok(mut stream) = bed.platform.dial(repl).await else {
            return false;
        };
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut answer = Vec::new();
        let asked = async {
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
            stream.read_to_end(&mut answer).await
        };
        let asked = tokio::time::timeout(Duration::from_secs(5), asked).await;
        matches!(asked, Ok(Ok(_))) && String::from_utf8_lossy(&answer).ends_with(version)
    })
    .await;
}

/// Removes the repl's pods; others come in their place.
async fn restart(bed: &Bed, user: &UserId, repl: &ReplId) {
    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), &user.namespace());
    let of_repl = ListParams::default().labels(&format!("gantry.dev/repl={repl}"));
    let before = pods.list(&of_repl).await.unwrap().items;
    assert!(!before.is_empty());
    for pod in before {
        let name = pod.metadata.name.unwrap();
        let at_once = DeleteParams::default().grace_period(0);
        pods.delete(&name, &at_once).await.unwrap();
    }
}

async fn has_keys(bed: &Bed, user: &UserId) -> bool {
    let secrets: Api<Secret> = Api::namespaced(bed.client.clone(), &user.namespace());
    secrets.get_opt(KEYS).await.unwrap().is_some()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn no_key_of_the_bucket_comes_into_a_users_namespace() {
    let bed = start().await;
    let user = bed.user("keys");
    let repl = bed.repl(&user);
    let spec = bed
        .spec(&user, &repl, &program("one"), BTreeMap::new())
        .await;
    bed.platform.ensure_release(&spec).await.unwrap();
    serves(&bed, &repl, "one").await;
    let secrets: Api<Secret> = Api::namespaced(bed.client.clone(), &user.namespace());
    let secrets = secrets.list(&ListParams::default()).await.unwrap().items;
    let key = std::env::var("AWS_SECRET_ACCESS_KEY").unwrap();
    // The control: there are Secrets, and their text is read.
    let texts: Vec<String> = secrets
        .iter()
        .flat_map(|secret| secret.data.iter().flatten())
        .map(|(name, value)| format!("{name}={}", String::from_utf8_lossy(&value.0)))
        .collect();
    assert!(
        texts.iter().any(|text| text.starts_with("KEY=")),
        "{secrets:?}"
    );
    assert!(
        !texts.iter().any(|text| text.contains(&key)),
        "a Secret holds the key"
    );
    assert!(!has_keys(&bed, &user).await);
    let pods: Api<Pod> = Api::namespaced(bed.client.clone(), &user.namespace());
    for pod in pods.list(&ListParams::default()).await.unwrap() {
        let text = serde_json::to_string(&pod).unwrap();
        assert!(!text.contains(&key) && !text.contains(KEYS), "{text}");
        assert!(!text.contains("AWS_"), "{text}");
    }
    bed.platform.shutdown().await;
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_pod_that_starts_again_gets_its_files_and_waits_for_a_server_that_is_away() {
    let bed = start().await;
    let user = bed.user("again");
    let repl = bed.repl(&user);
    let spec = bed
        .spec(&user, &repl, &program("one"), BTreeMap::new())
        .await;
    bed.platform.ensure_release(&spec).await.unwrap();
    restart(&bed, &user, &repl).await;
    serves(&bed, &repl, "one").await;

    bed.platform.shutdown().await;
    let client = bed.client.clone();
    restart(&bed, &user, &repl).await;
    drop(bed);
    let pods: Api<Pod> = Api::namespaced(client, &user.namespace());
    eventually("the new pod waits in its init container", || async {
        let pods = pods.list(&ListParams::default()).await.unwrap();
        pods.iter().any(|pod| {
            let statuses = pod.status.iter();
            let statuses = statuses.flat_map(|s| s.init_container_statuses.iter().flatten());
            let running = |s: &k8s_openapi::api::core::v1::ContainerState| s.running.is_some();
            statuses.filter_map(|s| s.state.as_ref()).any(running)
        })
    })
    .await;
    // The next server.
    let bed = start().await;
    serves(&bed, &repl, "one").await;
    bed.platform.shutdown().await;
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn a_program_that_plays_the_init_container_is_brought_its_own_files_at_most() {
    let bed = start().await;
    let user = bed.user("plays");
    let repl = bed.repl(&user);
    let code = format!(
        "import socket, threading
VERSION = 'nobody'
def play():
    global VERSION
    listener = socket.create_server(('127.0.0.1', 3004))
    while True:
        stream, _ = listener.accept()
        stream.sendall(b'gantry-fetch 1\\n')
        VERSION = stream.recv(65536).decode() or VERSION
threading.Thread(target=play, daemon=True).start()
{SERVER}"
    );
    let spec = bed.spec(&user, &repl, &code, BTreeMap::new()).await;
    bed.platform.ensure_release(&spec).await.unwrap();
    // A server that does not know yet that the files are there may come: what it brings reads this release only.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let page = bed.page(&repl).await;
    let own = format!("/releases/{repl}/{}/", spec.submission_id);
    let brought = page.matches("X-Amz-Signature=").count();
    assert!(page.ends_with("nobody") || brought > 0, "{page}");
    assert!(page.matches(&own).count() >= brought, "{page}");
    bed.platform.shutdown().await;
    bed.forget(user.as_str()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn keys_that_an_older_server_left_are_withdrawn() {
    // As older servers made it: the init container has the keys from the Secret.
    let with_keys = BUILT_IN_TEMPLATE.replace(
        "command: [\"gantry-runner\", \"fetch\"]\n",
        "command: [\"gantry-runner\", \"fetch\"]\n          envFrom: [{secretRef: {name: gantry-store}}]\n",
    );
    assert_ne!(with_keys, BUILT_IN_TEMPLATE);
    let keys = BTreeMap::from([("AWS_REGION".to_owned(), "x".to_owned())]);
    let bed = Bed::start_with(|config| {
        config.namespace = INSTALLATION.to_owned();
        config.template = Template::parse(&with_keys).unwrap();
        config.shared_keys = Some(keys);
    })
    .await;
    let user = bed.user("older");
    let repl = bed.repl(&user);
    let spec = bed
        .spec(&user, &repl, &program("one"), BTreeMap::new())
        .await;
    bed.platform.ensure_release(&spec).await.unwrap();
    assert!(has_keys(&bed, &user).await);
    bed.platform.shutdown().await;
    drop(bed);

    let bed = Arc::new(start().await);
    eventually("the Secret is gone", || async {
        !has_keys(&bed, &user).await
    })
    .await;
    serves(&bed, &repl, "one").await;
    restart(&bed, &user, &repl).await;
    serves(&bed, &repl, "one").await;
    bed.platform.shutdown().await;
    bed.forget(user.as_str()).await;
}

/// The policy's own namespace in this test; the account in it is called as the installed one.
const OWN: &str = "gantry-admission-test";

fn kubectl(arguments: &[&str], input: &str) -> Result<String, String> {
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
    let output = child.wait_with_output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// As Gantry's account.
fn as_gantry(arguments: &[&str], input: &str) -> Result<String, String> {
    let account = format!("--as=system:serviceaccount:{OWN}:gantry");
    kubectl(&[&[account.as_str()], arguments].concat(), input)
}

fn namespace(name: &str, labels: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n")
}

fn object(kind: &str, namespace: &str, name: &str, labels: &str) -> String {
    let spec = match kind {
        "Pod" => "spec: {containers: [{name: c, image: \"registry.invalid/none:1\"}]}\n",
        _ => "",
    };
    format!(
        "apiVersion: v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n{spec}"
    )
}

const MANAGED: &str = "app.kubernetes.io/managed-by: gantry";
const BASELINE: &str = "pod-security.kubernetes.io/enforce: baseline";

/// A policy's refusal, not one of the role's.
fn refused(what: &str, tried: Result<String, String>) {
    let said = tried.expect_err(what);
    assert!(
        said.contains("ValidatingAdmissionPolicy 'gantry-admission-test'"),
        "{what}: {said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster"]
async fn gantrys_account_is_held_to_the_namespaces_of_its_users() {
    let (users, victim) = ("user-admission-test", "admission-victim");
    let clean = || {
        for name in [
            OWN,
            users,
            victim,
            "user-admission-bare",
            "user-admission-priv",
        ] {
            let _ = kubectl(
                &[
                    "delete",
                    "namespace",
                    name,
                    "--ignore-not-found",
                    "--wait=true",
                ],
                "",
            );
        }
        for kind in [
            "validatingadmissionpolicybinding",
            "validatingadmissionpolicy",
        ] {
            let _ = kubectl(&["delete", kind, OWN, "--ignore-not-found"], "");
        }
        for name in [format!("{OWN}-services"), "admission-test-other".to_owned()] {
            let _ = kubectl(
                &["delete", "priorityclass", &name, "--ignore-not-found"],
                "",
            );
        }
    };
    clean();
    let admin = |text: &str| kubectl(&["apply", "-f", "-"], text).unwrap();
    admin(&namespace(OWN, MANAGED));
    admin(&namespace(victim, ""));
    for (name, labels) in [
        ("gantry", ""),
        ("theirs", "gantry.dev/installation: gantry-admission-test"),
    ] {
        admin(&object("Secret", OWN, name, labels));
    }
    admin(&object("Pod", victim, "pod", ""));
    let subject = "  - kind: ServiceAccount\n    name: gantry\n";
    let role = include_str!("../../../infrastructure/role.yaml")
        .replace(subject, &format!("{subject}    namespace: {OWN}\n"))
        .replace(
            "kind: ClusterRole\n  name: gantry\n",
            &format!("kind: ClusterRole\n  name: {OWN}\n"),
        )
        .replace(
            "kind: ClusterRole\nmetadata:\n  name: gantry\n",
            &format!("kind: ClusterRole\nmetadata:\n  name: {OWN}\n"),
        )
        .replace(
            "kind: ClusterRoleBinding\nmetadata:\n  name: gantry\n",
            &format!("kind: ClusterRoleBinding\nmetadata:\n  name: {OWN}\n"),
        );
    kubectl(&["apply", "-n", OWN, "-f", "-"], &role).unwrap();
    // The control: the role alone allows it.
    as_gantry(
        &["create", "-f", "-"],
        &object("Secret", victim, "control", ""),
    )
    .unwrap();

    let policy = include_str!("../../../infrastructure/admission.yaml");
    admin(&policy.replace("ame: gantry\n", &format!("ame: {OWN}\n")));
    eventually("the policy is in force", || async {
        let secret = object("Secret", victim, "control", "");
        as_gantry(
            &[
                "apply",
                "--dry-run=server",
                "--server-side",
                "--force-conflicts",
                "-f",
                "-",
            ],
            &secret,
        )
        .is_err()
    })
    .await;

    // What the server does.
    let good = namespace(users, &format!("{MANAGED}, {BASELINE}"));
    let apply = ["apply", "--server-side", "-f", "-"];
    as_gantry(&apply, &good).unwrap();
    as_gantry(&apply, &object("Secret", users, "s", MANAGED)).unwrap();
    as_gantry(
        &["create", "-f", "-"],
        &object("Pod", users, "pod", MANAGED),
    )
    .unwrap();
    let mine = "gantry.dev/installation: gantry-admission-test";
    as_gantry(
        &["create", "-f", "-"],
        &object("ConfigMap", OWN, "record", mine),
    )
    .unwrap();
    as_gantry(&["delete", "configmap", "record", "-n", OWN], "").unwrap();
    let of_own = format!("{OWN}-services");
    as_gantry(&["create", "priorityclass", &of_own, "--value=1"], "").unwrap();
    as_gantry(&["auth", "can-i", "list", "pods"], "").unwrap();

    // What a thief of its token would.
    for other in ["kube-system", "default", victim] {
        let create = ["create", "-f", "-"];
        refused(
            other,
            as_gantry(&create, &object("Secret", other, "s", MANAGED)),
        );
        refused(
            other,
            as_gantry(&create, &object("Pod", other, "p", MANAGED)),
        );
    }
    refused(
        "delete",
        as_gantry(&["delete", "pod", "pod", "-n", victim], ""),
    );
    let all = format!("/api/v1/namespaces/{victim}/secrets");
    refused("delete all", as_gantry(&["delete", "--raw", &all], ""));
    refused(
        "exec",
        as_gantry(&["exec", "-n", victim, "pod", "--", "true"], ""),
    );
    let force = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
    let adopted = namespace("kube-system", MANAGED);
    refused("adopt", as_gantry(&force, &adopted));
    let raw = |name: &str| format!("/api/v1/namespaces/{name}");
    refused("remove", as_gantry(&["delete", "--raw", &raw(victim)], ""));
    refused("own", as_gantry(&["delete", "--raw", &raw(OWN)], ""));
    refused(
        "other name",
        as_gantry(
            &["create", "-f", "-"],
            &namespace("admission-other", &format!("{MANAGED}, {BASELINE}")),
        ),
    );
    refused(
        "bare",
        as_gantry(
            &["create", "-f", "-"],
            &namespace("user-admission-bare", MANAGED),
        ),
    );
    let privileged = format!("{MANAGED}, pod-security.kubernetes.io/enforce: privileged");
    refused(
        "privileged",
        as_gantry(
            &["create", "-f", "-"],
            &namespace("user-admission-priv", &privileged),
        ),
    );
    refused("loosen", as_gantry(&force, &namespace(users, &privileged)));
    refused(
        "own pod",
        as_gantry(&["create", "-f", "-"], &object("Pod", OWN, "p", mine)),
    );
    refused(
        "own secret",
        as_gantry(&["delete", "secret", "gantry", "-n", OWN], ""),
    );
    as_gantry(&["delete", "secret", "theirs", "-n", OWN], "").unwrap();
    refused(
        "priority",
        as_gantry(
            &[
                "create",
                "priorityclass",
                "admission-test-other",
                "--value=1",
            ],
            "",
        ),
    );

    as_gantry(&["delete", "--raw", &raw(users)], "").unwrap();
    clean();
}
