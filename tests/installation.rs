//! An installation in a cluster: its rights, and its clean-up. The server runs here with the account and
//! the role of `infrastructure/role.yaml` and nothing more. Needs the bed:
//! `eval "$(scripts/testbed env)"`, then `cargo test --test installation -- --ignored --test-threads 1`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "kubernetes/bed.rs"]
#[allow(
    dead_code,
    reason = "shared with the platform's suite, which uses all of it"
)]
mod bed;
#[path = "storage/put.rs"]
#[allow(
    dead_code,
    reason = "shared with the stores' suite, which uses all of it"
)]
mod put;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use gantry::model::{
    ModuleSpec, Order, RelativePath, ReplChange, ReplId, ScaleRequest, SubmissionId, UserId,
};
use gantry::platform::conformance::{finish, python};
use gantry::platform::kubernetes::{CleanUp, Cleaner, Orphan, permissions};
use gantry::platform::{Platform, PlatformError, Sessions};
use gantry::storage::{CodeStore, S3Config, release_prefix};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use bed::{Bed, SERVER, eventually, numbers};

/// Everything of these tests: the server's namespace, its account, its role, its bucket.
const NAME: &str = "gantry-installation-test";

/// Longer than any of these tests takes.
const TOKEN_LASTS: &str = "3h";

/// The cluster's administrator, whose rights the server does not have.
struct Admin {
    kubeconfig: String,
    _token: tempfile::TempDir,
}

impl Admin {
    fn kubectl(&self, arguments: &[&str], input: &str) -> String {
        let program = std::env::var("TESTBED_KUBECTL").unwrap_or_else(|_| "kubectl".to_owned());
        let mut child = Command::new(program)
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "kubectl {arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Whether the object is there.
    fn has(&self, what: &[&str]) -> bool {
        let arguments = [&["get", "--ignore-not-found", "-o", "name"], what].concat();
        !self.kubectl(&arguments, "").is_empty()
    }
}

/// Gives this process the rights of an installed server, and no others.
fn installed() -> &'static Admin {
    static ADMIN: OnceLock<Admin> = OnceLock::new();
    ADMIN.get_or_init(|| {
        let token = tempfile::tempdir().unwrap();
        let admin = Admin {
            kubeconfig: std::env::var("KUBECONFIG").expect("the bed's variables are not set"),
            _token: token,
        };
        let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAME}}}\n");
        admin.kubectl(&["apply", "-f", "-"], &namespace);
        let role = include_str!("../infrastructure/role.yaml");
        let subject = "  - kind: ServiceAccount\n    name: gantry\n";
        assert_eq!(role.matches(subject).count(), 2);
        let role = role
            .replace(subject, &format!("{subject}    namespace: {NAME}\n"))
            .replace("name: gantry\n", &format!("name: {NAME}\n"));
        admin.kubectl(&["apply", "-n", NAME, "-f", "-"], &role);
        let admission = include_str!("../infrastructure/admission.yaml");
        assert_eq!(admission.matches(":gantry$").count(), 1);
        let admission = admission
            .replace(":gantry$", &format!(":{NAME}$"))
            .replace("ame: gantry\n", &format!("ame: {NAME}\n"));
        admin.kubectl(&["apply", "-f", "-"], &admission);
        // Made by the first start: an earlier run's would leave the right to make it unused.
        let priority = format!("priorityclass/{NAME}-services");
        admin.kubectl(&["delete", "--ignore-not-found", &priority], "");
        let lasts = format!("--duration={TOKEN_LASTS}");
        let token = admin.kubectl(&["create", "token", NAME, "-n", NAME, &lasts], "");
        let config = admin.kubectl(&["config", "view", "--raw", "-o", "json"], "");
        let mut config: Value = serde_json::from_str(&config).unwrap();
        for user in config["users"].as_array_mut().unwrap() {
            user["user"] = serde_json::json!({ "token": token.trim() });
        }
        let file = admin._token.path().join("kubeconfig");
        std::fs::write(&file, config.to_string()).unwrap();
        // SAFETY: these tests run one at a time, and this is before the first of them starts a thread.
        unsafe {
            std::env::set_var("KUBECONFIG", &file);
            std::env::set_var("S3_BUCKET", NAME);
        }
        admin
    })
}

fn s3() -> S3Config {
    S3Config::from_variables(|name| std::env::var(name).ok())
        .unwrap()
        .unwrap()
}

/// Runs a test with the platform and the administrator.
fn with_bed<F: Future<Output = ()>>(test: impl FnOnce(Bed, &'static Admin) -> F) {
    let admin = installed();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let made = put::client(&s3()).create_bucket().bucket(NAME).send();
        // It is there from an earlier run.
        let _ = made.await;
        let bed = Bed::start_with(|config| config.namespace = NAME.to_owned()).await;
        test(bed, admin).await;
    });
}

/// A clean-up for which everything is old.
fn at_once(bed: &Bed, remove: bool) -> Cleaner {
    let options = CleanUp {
        remove,
        idle: Duration::ZERO,
        settled: Duration::ZERO,
        every: Duration::from_secs(3600),
        lease: Duration::from_secs(3),
    };
    bed.platform.cleaner(Arc::clone(&bed.store), options)
}

async fn deploy(bed: &Bed, user: &UserId, database: bool) -> ReplId {
    let repl = bed.repl(user);
    let env = BTreeMap::from([("GREETING".to_owned(), "hello".to_owned())]);
    let code = format!("VERSION = 'one'\n{SERVER}");
    let mut spec = bed.spec(user, &repl, &code, env).await;
    spec.database = database;
    bed.platform.ensure_release(&spec).await.unwrap();
    repl
}

/// Verb and resource of everything that this program has asked the API server for.
fn permissions_used() -> BTreeSet<(String, String)> {
    let text = numbers().render();
    let lines = text.lines().filter_map(|line| {
        let labels = line.strip_prefix("gantry_cluster_permissions_total{")?;
        let mut values = labels.split('"').skip(1).step_by(2).map(str::to_owned);
        Some((values.next()?, values.next()?))
    });
    lines.collect()
}

/// What found things say that is about this user or repl.
fn about(found: &[Orphan], name: &str) -> Vec<String> {
    let all = found.iter().map(ToString::to_string);
    let mut about: Vec<String> = all.filter(|text| text.contains(name)).collect();
    about.sort();
    about
}

/// Rights that only a newer API server asks for: it takes a WebSocket upgrade for a `create`.
const SINCE_1_35: [(&str, &str); 2] = [("create", "pods/exec"), ("create", "pods/portforward")];

#[test]
#[ignore = "needs a cluster"]
fn an_installed_server_uses_every_right_it_has_and_needs_no_other() {
    with_bed(|bed, _| async move {
        let user = bed.user("rights");
        let sessions = Sessions::new(bed.shared());
        let ran = finish(&mut sessions.of(&user).start(python("print(1)"))).await;
        assert_eq!(ran.unwrap().stdout, b"1\n");
        let repl = deploy(&bed, &user, true).await;
        assert!(bed.page(&repl).await.ends_with("one"));
        // One that fails is explained with its pod's events and last lines.
        let broken = bed.spec(&user, &repl, "raise ValueError('no')", BTreeMap::new());
        let failed = bed.platform.ensure_release(&broken.await).await;
        assert!(
            matches!(failed, Err(PlatformError::NotReady(_))),
            "{failed:?}"
        );
        let code = format!("VERSION = 'two'\n{SERVER}");
        let next = bed.spec(&user, &repl, &code, BTreeMap::new());
        bed.platform.ensure_release(&next.await).await.unwrap();
        bed.platform
            .rollback(&repl, Some(1), &Order::now())
            .await
            .unwrap();
        let auto = json!({ "max": 2, "cpu_percent": 70 });
        for scale in [auto, json!({ "replicas": 1 })] {
            let scale: ScaleRequest = serde_json::from_value(scale).unwrap();
            let change = ReplChange::Scale(scale.checked().unwrap());
            bed.platform.configure(&repl, &change).await.unwrap();
        }
        for domains in [
            vec![format!("{user}.example.com").parse().unwrap()],
            Vec::new(),
        ] {
            let change = ReplChange::Domains(domains);
            bed.platform.configure(&repl, &change).await.unwrap();
        }
        // Packages from an index that is not there; what pip says is read from the pod's log.
        let with_cache = Bed::start_with(|config| {
            config.namespace = NAME.to_owned();
            let index = [
                ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
                ("PIP_RETRIES", "0"),
            ];
            let index = index.map(|(name, value)| (name.to_owned(), value.to_owned()));
            config.packages.variables = Some(index.into());
            config.packages.cache_class = Some("standard".to_owned());
        })
        .await;
        let spec = ModuleSpec {
            name: "iniconfig".parse().unwrap(),
            packages: Some(vec!["iniconfig==2.0.0".to_owned().try_into().unwrap()]),
            scale: None,
        };
        let refused = with_cache.platform.modules().ensure(&user, &spec).await;
        let said = format!("{refused:?}");
        assert!(said.contains("packages_not_installed"), "{said}");
        // A test pod that cannot start is explained by its events.
        let missing = Bed::start_with(|config| {
            config.namespace = NAME.to_owned();
            config.runner_image = "gantry-no-such-image:1".to_owned();
        })
        .await;
        let other = missing.user("no-image");
        assert!(missing.platform.connect(&other).await.is_err());
        bed.platform.drop_repl(&repl).await.unwrap();
        bed.platform.drop_sandbox(&user).await.unwrap();
        let stop = CancellationToken::new();
        let cleaning = at_once(&bed, true).run("one".to_owned(), stop.clone());
        let cleaning = tokio::spawn(cleaning);
        eventually("the unused namespace is gone", || async {
            let used = permissions_used();
            used.contains(&("delete".to_owned(), "namespaces".to_owned()))
        })
        .await;
        stop.cancel();
        cleaning.await.unwrap();

        let used = permissions_used();
        let counted =
            |p: &gantry::platform::kubernetes::Permission| (p.verb.to_owned(), p.counted());
        let granted: BTreeSet<(String, String)> = permissions().iter().map(counted).collect();
        // Everybody may ask what it may do.
        let asked =
            |(_, resource): &&(String, String)| !resource.ends_with(".authorization.k8s.io");
        let more: Vec<_> = used.difference(&granted).filter(asked).collect();
        let newer = |(verb, resource): &&(String, String)| {
            !SINCE_1_35.contains(&(verb.as_str(), resource.as_str()))
        };
        let unused: Vec<_> = granted.difference(&used).filter(newer).collect();
        println!("{} rights, {} used", granted.len(), used.len());
        assert!(more.is_empty(), "used and not in the table: {more:?}");
        assert!(unused.is_empty(), "in the table and not used: {unused:?}");
        bed.forget(user.as_str()).await;
    });
}

#[test]
#[ignore = "needs a cluster"]
fn a_server_without_its_role_does_not_start() {
    with_bed(|_, admin| async move {
        let binding = format!("clusterrolebinding/{NAME}");
        let saved = admin.kubectl(&["get", &binding, "-o", "yaml"], "");
        admin.kubectl(&["delete", &binding], "");
        let refused = tokio::spawn(Bed::start_with(|config| config.namespace = NAME.to_owned()));
        let refused = refused.await;
        admin.kubectl(&["create", "-f", "-"], &saved);
        let panic = refused.err().expect("it started").into_panic();
        let said = panic.downcast_ref::<String>().unwrap();
        assert!(said.contains("may not: "), "{said}");
        assert!(said.contains("patch namespaces"), "{said}");
    });
}

#[test]
#[ignore = "needs a cluster"]
fn what_nobody_needs_is_told_first_and_removed_when_asked() {
    with_bed(|bed, admin| async move {
        let (kept, lost, idle) = (bed.user("kept"), bed.user("lost"), bed.user("idle"));
        let stays = deploy(&bed, &kept, false).await;
        let orphan = deploy(&bed, &lost, true).await;
        let sessions = Sessions::new(bed.shared());
        finish(&mut sessions.of(&idle).start(python("print(1)")))
            .await
            .unwrap();
        drop(sessions);
        // Somebody deletes the record of one repl; another has files that no record has.
        admin.kubectl(
            &["delete", "configmap", "-n", NAME, &format!("repl-{orphan}")],
            "",
        );
        let stray = SubmissionId::new();
        let path = RelativePath::try_from("main.py".to_owned()).unwrap();
        let files = BTreeMap::from([(path, String::new())]);
        bed.store.publish(&stays, stray, &files).await.unwrap();
        // The store counts in seconds, and what was written in this one is not old.
        tokio::time::sleep(Duration::from_millis(1_100)).await;

        let found = at_once(&bed, false).round().await.unwrap();
        assert_eq!(
            about(&found, orphan.as_str()),
            [
                format!("the Secret repl-{orphan}-env-1"),
                format!("the files below code/{orphan}/"),
                format!(
                    "the files below {}",
                    about(&found, &format!("releases/{orphan}/"))[0]
                        .rsplit(' ')
                        .next()
                        .unwrap()
                ),
                format!("the objects of the repl {orphan} in {}", lost.namespace()),
            ]
        );
        let stray_prefix = release_prefix(&stays, stray);
        assert_eq!(
            about(&found, stays.as_str()),
            [format!("the files below {stray_prefix}")]
        );
        assert_eq!(
            about(&found, idle.as_str()),
            [format!("the namespace {}", idle.namespace())]
        );
        // Told, and nothing more.
        assert!(bed.page(&stays).await.ends_with("one"));
        assert!(admin.has(&["deployment", orphan.as_str(), "-n", &lost.namespace()]));
        assert!(admin.has(&["namespace", &idle.namespace()]));

        at_once(&bed, true).round().await.unwrap();
        eventually("the orphan's Deployment is gone", || async {
            !admin.has(&["deployment", orphan.as_str(), "-n", &lost.namespace()])
        })
        .await;
        eventually("the idle namespace is gone", || async {
            !admin.has(&["namespace", &idle.namespace()])
        })
        .await;
        // A database's data is never removed, and so neither is the namespace it is in.
        let claim = format!("data-{orphan}-db-0");
        assert!(admin.has(&["persistentvolumeclaim", &claim, "-n", &lost.namespace()]));
        assert!(admin.has(&["secret", &format!("{orphan}-db"), "-n", &lost.namespace()]));
        assert!(bed.store.list(&stray_prefix, 10).await.unwrap().is_empty());
        let code = bed.store.list(&format!("code/{orphan}/"), 10).await;
        assert!(code.unwrap().is_empty());
        // And what is needed is as it was.
        assert!(bed.page(&stays).await.ends_with("one"));
        bed.platform
            .rollback(&stays, Some(1), &Order::now())
            .await
            .unwrap();
        let again = at_once(&bed, false).round().await.unwrap();
        assert!(about(&again, orphan.as_str()).is_empty(), "{again:?}");
        assert!(about(&again, stays.as_str()).is_empty(), "{again:?}");
        bed.platform.drop_repl(&stays).await.unwrap();
        bed.forget(kept.as_str()).await;
        bed.forget(lost.as_str()).await;
    });
}

fn holder(admin: &Admin) -> String {
    let path = "jsonpath={.spec.holderIdentity}";
    let lease = ["get", "lease", "gantry-clean-up", "-n", NAME];
    admin.kubectl(
        &[&lease[..], &["--ignore-not-found", "-o", path]].concat(),
        "",
    )
}

#[test]
#[ignore = "needs a cluster"]
fn one_replica_cleans_up_and_another_takes_over() {
    with_bed(|bed, admin| async move {
        let stops = [(); 3].map(|()| CancellationToken::new());
        let start = |name: &str, stop: &CancellationToken| {
            let cleaner = at_once(&bed, false);
            tokio::spawn(cleaner.run(name.to_owned(), stop.clone()))
        };
        eventually("the lease of an earlier test is free", || async {
            holder(admin).is_empty()
        })
        .await;
        let first = start("first", &stops[0]);
        eventually("the first holds it", || async { holder(admin) == "first" }).await;
        let second = start("second", &stops[1]);
        let third = start("third", &stops[2]);
        // Twice as long as it lasts: the first renews it all the while.
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(holder(admin), "first");
        // Killed: nobody gives it back.
        first.abort();
        eventually("another takes over", || async { holder(admin) != "first" }).await;
        let heir = holder(admin);
        assert!(["second", "third"].contains(&heir.as_str()), "{heir}");
        // Stopped in order: given back, and taken by the one that is left.
        let (stop, left) = match heir.as_str() {
            "second" => (&stops[1], "third"),
            _ => (&stops[2], "second"),
        };
        stop.cancel();
        eventually("the last one takes over", || async {
            holder(admin) == left
        })
        .await;
        for stop in &stops {
            stop.cancel();
        }
        second.await.unwrap();
        third.await.unwrap();
        assert_eq!(holder(admin), "");
    });
}
