//! The platform on the bed, and what the tests do with it.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use gantry::model::{
    Limits, Order, RelativePath, ReplId, Serves, SubmissionId, Tested, Tests, UserId,
};
use gantry::platform::conformance::Subject;
use gantry::platform::kubernetes::{
    BUILT_IN_TEMPLATE, KubernetesConfig, KubernetesPlatform, PipIndex, Template, WakeService,
};
use gantry::platform::{Platform, Recorded, ReleaseSpec};
use gantry::storage::{CodeStore, S3Config, S3Store};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Longest wait for what the cluster does by itself.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the tests' servers keep what they know of repls.
pub const NAMESPACE: &str = "gantry-tests";

/// A program that serves `VERSION`.
pub const SERVER: &str = "
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = VERSION.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.HTTPServer(('', 3000), Handler).serve_forever()
";

/// A platform on the bed.
pub struct Bed {
    pub platform: Arc<KubernetesPlatform>,
    pub store: Arc<S3Store>,
    pub client: Client,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

impl Bed {
    pub async fn start() -> Bed {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut KubernetesConfig)) -> Bed {
        // Chosen by whichever test comes first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        numbers();
        let s3 = S3Config::from_variables(variable)
            .unwrap()
            .expect("the bed's variables are not set: eval \"$(scripts/testbed env)\"");
        let endpoint: axum::http::Uri = s3.endpoint.clone().unwrap().parse().unwrap();
        let host: IpAddr = endpoint.host().unwrap().parse().unwrap();
        let mut config = KubernetesConfig {
            namespace: NAMESPACE.to_owned(),
            template: Template::parse(BUILT_IN_TEMPLATE).unwrap(),
            runner_image: variable("RUNNER_IMAGE").unwrap(),
            database_image: variable("DATABASE_IMAGE").unwrap(),
            bucket: s3.bucket.clone(),
            store: Arc::new(S3Store::open(s3.clone())),
            shared_keys: None,
            store_addresses: vec![(host, endpoint.port_u16().unwrap())],
            domain: "localhost".to_owned(),
            app_domain: "apps.localhost".to_owned(),
            sites: gantry::model::Sites::plain("apps.localhost", "localhost"),
            ingress_class: "nginx".to_owned(),
            ingress_addresses: variable("GANTRY_INGRESS_ADDRESSES")
                .map(|text| vec![text.parse().unwrap()])
                .unwrap_or_default(),
            closed_networks: Vec::new(),
            root_services: false,
            maximum: Limits::MAXIMUM,
            network: false,
            log_refused: false,
            heartbeat_late: Duration::from_secs(5),
            quota: BTreeMap::new(),
            packages: PipIndex::default(),
            forward_modules: false,
            wake_service: Some(WakeService {
                name: "gantry".to_owned(),
                port: 80,
            }),
            drain: Duration::from_secs(10),
        };
        change(&mut config);
        let platform = KubernetesPlatform::start(config, Vec::new()).await.unwrap();
        platform.follow_programs(std::future::ready(Recorded::default()).boxed());
        Bed {
            platform: Arc::new(platform),
            store: Arc::new(S3Store::open(s3)),
            client: Client::try_default().await.unwrap(),
        }
    }

    pub fn shared(&self) -> Arc<dyn Platform> {
        Arc::clone(&self.platform) as Arc<dyn Platform>
    }

    pub fn subject(&self) -> Subject {
        Subject {
            platform: self.shared(),
            store: Arc::clone(&self.store) as Arc<dyn CodeStore>,
        }
    }

    /// A user that no other run of the tests has.
    pub fn user(&self, name: &str) -> UserId {
        let id = SubmissionId::new().to_string();
        format!("{name}-{}", &id[id.len() - 6..]).parse().unwrap()
    }

    pub fn repl(&self, user: &UserId) -> ReplId {
        user.default_repl().unwrap()
    }

    /// A release of this program, published.
    pub async fn spec(
        &self,
        user: &UserId,
        repl: &ReplId,
        code: &str,
        env: BTreeMap<String, String>,
    ) -> ReleaseSpec {
        let path = RelativePath::try_from("main.py".to_owned()).unwrap();
        let files = BTreeMap::from([(path, code.to_owned())]);
        let submission_id = SubmissionId::new();
        self.store
            .publish(repl, submission_id, &files)
            .await
            .unwrap();
        ReleaseSpec {
            user_id: user.clone(),
            repl_id: repl.clone(),
            submission_id,
            order: Order::now(),
            tested: Tested::of(&files, &Tests::ExitCode),
            argv: vec!["python3".to_owned(), "main.py".to_owned()],
            env,
            database: false,
            serves: Serves::Unknown,
        }
    }

    /// What the repl's program answers.
    pub async fn page(&self, repl: &ReplId) -> String {
        let mut stream = self.platform.dial(repl).await.unwrap();
        let request = b"GET / HTTP/1.0\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Lets everything in and out of these namespaces, beside the policies that are there, or no longer.
    pub async fn overrule(&self, namespaces: &[String], on: bool) {
        for namespace in namespaces {
            let policies: Api<NetworkPolicy> = Api::namespaced(self.client.clone(), namespace);
            if !on {
                policies
                    .delete("test-open", &DeleteParams::default())
                    .await
                    .unwrap();
                continue;
            }
            let policy = serde_json::from_value(serde_json::json!({
                "metadata": { "name": "test-open" },
                "spec": { "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}], "egress": [{}] },
            }));
            policies
                .create(&PostParams::default(), &policy.unwrap())
                .await
                .unwrap();
        }
    }

    /// Removes everything of a user's.
    pub async fn forget(&self, user: &str) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let _ = namespaces
            .delete(&format!("user-{user}"), &DeleteParams::default())
            .await;
    }

    /// The same, when what a start does by itself is over: it asks after other tests' programs, too.
    pub async fn requests_once_settled(&self) -> u64 {
        let mut last = self.requests();
        let started = Instant::now();
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = self.requests();
            if now == last {
                return now;
            }
            assert!(started.elapsed() < PATIENCE, "the server never rests");
            last = now;
        }
    }

    /// Requests that this program has made to the API server, streams and watches included.
    pub fn requests(&self) -> u64 {
        let text = numbers().render();
        let line = text
            .lines()
            .find(|line| line.starts_with("gantry_cluster_requests_total "));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok())
            .unwrap_or(0)
    }
}

/// What the program counts of itself.
pub fn numbers() -> &'static PrometheusHandle {
    static NUMBERS: OnceLock<PrometheusHandle> = OnceLock::new();
    NUMBERS.get_or_init(|| PrometheusBuilder::new().install_recorder().unwrap())
}

/// Waits until it is so.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let started = Instant::now();
    while !is_so().await {
        assert!(
            started.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
