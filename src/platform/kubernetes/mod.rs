//! The Kubernetes platform: a persistent test pod per user over one kube exec, and releases made from a
//! template. State lives in the cluster; this only watches it and asks for changes.

mod cache;
mod checks;
mod cluster;
mod domains;
mod exec;
mod explain;
mod fetches;
mod labels;
mod lease;
mod modules;
mod namespace;
mod orphans;
mod permissions;
mod program_log;
mod programs;
mod record;
mod release;
mod releases;
mod rollout;
mod services;
mod template;
mod test_pod;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    AWAY, ByteStream, CONNECT_TIMEOUT, Check, ConfigureError, Finding, Modules, Opened, Platform,
    PlatformError, ProgramEvent, Recorded, ReleaseSpec, RunningRelease, Services, WorkspaceSpec,
};
use crate::model::{
    Limits, MAX_REPL_REPLICAS, Network, Order, Problem, Release, ReplChange, ReplData, ReplId,
    ReplSettings, ReplStatus, Sites, TicketKey, UserId,
};
use crate::storage::S3Store;
use cache::{Cache, Watched};
use cluster::{Cluster, Kind, Manifest};
use domains::Claims;
use exec::{ExecError, ExecStream};
use fetches::Fetches;
use labels::{GANTRY, MANAGED_BUT_SERVICES, MANAGED_BY};
use modules::{KubernetesModules, Making, Reach};
use namespace::{Namespaces, Surroundings};
use programs::Programs;
use record::Records;
use release::{Owner, ReleaseConfig};
use releases::Releases;
use rollout::Rollouts;
use services::{KubernetesServices, Rules};
use test_pod::{TestPodConfig, TestPods};

pub use modules::PipIndex;
pub use orphans::{CleanUp, Cleaner, Orphan};
pub use permissions::{Permission, permissions};
pub use release::WakeService;
pub use template::{BUILT_IN as BUILT_IN_TEMPLATE, Template};

/// Program output that may wait for the journal: when it cannot keep up, following waits.
const MAX_WAITING_EVENTS: usize = 1_024;

/// Longest wait for the runner's first byte. It greets at once; a pod that has just started may take
/// a moment to listen, and `attach` waits for that.
const GREETING: Duration = Duration::from_secs(3);

/// Silent runners in a row before their pod is made anew. One may be a slow machine.
const MAX_SILENT: u32 = 1;

/// How the Kubernetes platform is set up.
#[derive(Debug, Clone)]
pub struct KubernetesConfig {
    /// The server's own namespace, where records are kept.
    pub namespace: String,
    /// The template of releases.
    pub template: Template,
    /// The runner image.
    pub runner_image: String,
    /// The database image.
    pub database_image: String,
    /// The bucket with the releases.
    pub bucket: String,
    /// It, for what pods fetch from it.
    pub store: Arc<S3Store>,
    /// Its keys, as variables, when the operator shares them with users' namespaces.
    pub shared_keys: Option<BTreeMap<String, String>>,
    /// Where the bucket is, for network policies.
    pub store_addresses: Vec<(IpAddr, u16)>,
    /// `{repl}.{this}` is the terminal.
    pub domain: String,
    /// `{repl}.{this}` is the program.
    pub app_domain: String,
    /// What stands in the URLs of both.
    pub sites: Sites,
    /// The ingress controller's class.
    pub ingress_class: String,
    /// Where the ingress controller's requests come from when it is no pod.
    pub ingress_addresses: Vec<Network>,
    /// What user code may not reach besides what is closed everywhere.
    pub closed_networks: Vec<Network>,
    /// Services may run as root.
    pub root_services: bool,
    /// The most a run may ask for.
    pub maximum: Limits,
    /// Whether test runs may use the network.
    pub network: bool,
    /// Whether the kernel logs the system calls that test runs are refused.
    pub log_refused: bool,
    /// A node counts as failed when its heartbeat is this late.
    pub heartbeat_late: Duration,
    /// What each user's namespace may have, where it is another than the usual.
    pub quota: BTreeMap<String, String>,
    /// Where modules' packages come from.
    pub packages: PipIndex,
    /// Go to modules' pods by port-forward, also where their addresses seem to be reached.
    pub forward_modules: bool,
    /// The server's own Service, which takes the requests to idle repls.
    pub wake_service: Option<WakeService>,
    /// How long a released program may take to answer what it was asked, and again to end after SIGTERM.
    pub drain: Duration,
}

/// The Kubernetes platform.
#[derive(Debug)]
pub struct KubernetesPlatform {
    cluster: Cluster,
    checks: Vec<Check>,
    test_pods: TestPods,
    releases: Releases,
    programs: Programs,
    services: Arc<KubernetesServices>,
    modules: Arc<KubernetesModules>,
    /// Silent runners in a row, by user.
    silent: Mutex<HashMap<UserId, u32>>,
    events: tokio::sync::Mutex<mpsc::Receiver<ProgramEvent>>,
    stop: CancellationToken,
}

impl KubernetesPlatform {
    /// Looks at the cluster and begins to watch it; an error when Gantry cannot work there. `checks`:
    /// what was looked at before, so that everything that is wrong is told at once.
    pub async fn start(config: KubernetesConfig, mut checks: Vec<Check>) -> anyhow::Result<Self> {
        let cluster = Cluster::infer(&config.namespace).await?;
        checks.extend(checks::look(&cluster, &config.namespace, &config.ingress_class).await);
        for check in &checks {
            tracing::info!(name = check.name, finding = ?check.finding, detail = %check.detail, "checked");
        }
        let missing: Vec<String> = checks
            .iter()
            .filter(|check| check.finding == Finding::Missing)
            .map(|check| format!("{}: {}", check.name, check.detail))
            .collect();
        anyhow::ensure!(missing.is_empty(), "{}", missing.join("; "));
        for kind in &config.template.unsupported {
            tracing::warn!(%kind, "the manifest template has an object of a kind that Gantry does not apply; it is skipped");
        }
        check_keys(&config)?;
        make_own_namespace(&cluster, &config.namespace).await?;
        try_template(&cluster, &config).await?;
        let stop = CancellationToken::new();
        let surroundings = Surroundings {
            store: config.store_addresses.clone(),
            index: config.packages.addresses.clone(),
            quota: config.quota.clone(),
            callers: config.ingress_addresses.clone(),
            closed: config.closed_networks.clone(),
        };
        let store = Arc::clone(&config.store);
        let (tell_pods, mut pods_changed) = mpsc::unbounded_channel();
        let watched = |kind| Watched {
            kind,
            namespace: None,
            labels: MANAGED_BUT_SERVICES,
        };
        let pods: Cache<Pod> =
            Cache::watch(&cluster, watched(Kind::Pod), Some(tell_pods), stop.clone());
        let deployments: Cache<Deployment> =
            Cache::watch(&cluster, watched(Kind::Deployment), None, stop.clone());
        let namespaces = Namespaces::start(&cluster, surroundings, &stop);
        let records = Records::start(&cluster, &config.namespace, &stop);
        let claims = Claims::start(&cluster, &config.namespace, &stop);
        let synced = async {
            pods.synced(Kind::Pod).await?;
            deployments.synced(Kind::Deployment).await?;
            namespaces.synced().await?;
            claims.synced().await?;
            records.synced().await
        };
        synced.await.context("the cluster cannot be watched")?;
        let rules = Rules {
            late: config.heartbeat_late,
            root: config.root_services,
            closed: config.closed_networks.clone(),
        };
        let services =
            KubernetesServices::start(&cluster, &namespaces, &config.namespace, rules, &stop);
        let services = services.await.context("services cannot be watched")?;
        let pod_config = TestPodConfig {
            started: Timestamp::now(),
            image: config.runner_image.clone(),
            maximum: config.maximum,
            network: config.network,
            log_refused: config.log_refused,
        };
        let making = Making {
            image: config.runner_image.clone(),
            maximum: config.maximum,
            index: config.packages.clone(),
            app_domain: config.app_domain.clone(),
            app_scheme: config.sites.programs.scheme,
            ingress_class: config.ingress_class.clone(),
        };
        let reach = Reach::new(&cluster, config.forward_modules);
        let modules =
            KubernetesModules::new(&cluster, &namespaces, &deployments, &pods, making, reach);
        let test_pods = TestPods::new(&cluster, &namespaces, &pods, pod_config);
        let releases = Releases {
            cluster: cluster.clone(),
            namespaces,
            records,
            claims,
            rollouts: Rollouts {
                cluster: cluster.clone(),
                deployments,
                pods,
            },
            config: Arc::new(release_config(config)),
            changing: Arc::default(),
        };
        let (tell, events) = mpsc::channel(MAX_WAITING_EVENTS);
        let (to_programs, pod_changes) = mpsc::unbounded_channel();
        let (to_fetches, starting) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(changed) = pods_changed.recv().await {
                // Nobody listens any more when the server ends.
                let _ = to_fetches.send(cache::Changed::clone(&changed));
                let _ = to_programs.send(changed);
            }
        });
        let programs = Programs::start(&releases, tell, pod_changes, stop.clone());
        Fetches::start(&releases, store, starting, stop.clone());
        tokio::spawn(releases.clone().withdraw_keys(stop.clone()));
        Ok(Self {
            cluster,
            checks,
            test_pods,
            releases,
            programs,
            services: Arc::new(services),
            modules: Arc::new(modules),
            silent: Mutex::default(),
            events: tokio::sync::Mutex::new(events),
            stop,
        })
    }

    /// Finds what nobody needs any more, and removes it if that is wanted.
    pub fn cleaner(&self, store: Arc<S3Store>, options: CleanUp) -> Cleaner {
        Cleaner {
            releases: self.releases.clone(),
            test_pods: self.test_pods.clone(),
            store,
            options,
        }
    }

    /// A stream to the user's runner; a runner that does not greet is made anew.
    async fn stream(&self, user: &UserId, deadline: Instant) -> Result<ExecStream, PlatformError> {
        let (namespace, pod) = (user.namespace(), test_pod::name(user));
        loop {
            let life = self.test_pods.ensure(user, deadline).await?;
            let now = self.test_pods.follow(user);
            let client = &self.cluster.client;
            let opened = ExecStream::open(client, &namespace, &pod, &life, now, GREETING).await;
            let error = match opened {
                Ok(stream) => {
                    self.silent().remove(user);
                    return Ok(stream);
                }
                Err(error) => error,
            };
            match &error {
                ExecError::Hung => {
                    let silent = {
                        let mut all = self.silent();
                        let silent = all.entry(user.clone()).or_default();
                        *silent += 1;
                        *silent
                    };
                    if silent >= MAX_SILENT {
                        tracing::warn!(%user, "the runner in the test pod does not answer; the pod is made anew");
                        let removed = self.test_pods.remove_life(user, &life).await;
                        removed.map_err(|f| f.unavailable("The test pod could not be removed"))?;
                        self.silent().remove(user);
                    }
                }
                ExecError::Away(why) => {
                    return Err(PlatformError::Unavailable(Problem::new(
                        AWAY,
                        "The API server cannot be reached",
                        why,
                        "Look whether it runs; Gantry tries again by itself.",
                    )));
                }
                ExecError::Refused(why) => return Err(PlatformError::NotReady(exec_problem(why))),
                ExecError::Gone(why) | ExecError::Failed(why) => {
                    if Instant::now() + RETRY >= deadline {
                        return Err(PlatformError::Unavailable(exec_problem(why)));
                    }
                    tracing::debug!(%user, %why, "the exec failed; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
            if Instant::now() >= deadline {
                let why = "the runner did not answer";
                return Err(PlatformError::Unavailable(exec_problem(why)));
            }
        }
    }

    fn silent(&self) -> std::sync::MutexGuard<'_, HashMap<UserId, u32>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a repl's runner what its program does, so that `repls` knows.
    async fn ask(&self, user: &UserId, repl: &ReplId, spec: &ReleaseSpec) {
        let owner = Owner {
            user: user.clone(),
            repl: repl.clone(),
        };
        let submission = spec.submission_id.to_string();
        for pod in self.releases.rollouts.pods_of(&owner, &submission) {
            self.programs.ask(&pod).await;
        }
    }
}

/// Pause before an exec that failed is tried again.
const RETRY: Duration = Duration::from_millis(250);

fn exec_problem(why: &str) -> Problem {
    Problem::new(
        "test_pod_unreachable",
        "The test pod cannot be reached",
        why,
        "Look at the test pod with kubectl describe, and at the server's log.",
    )
}

/// A template that needs the code store's keys, and an operator who has not shared them, do not go together.
fn check_keys(config: &KubernetesConfig) -> anyhow::Result<()> {
    let needed = release_config(config.clone()).needs_keys()?;
    anyhow::ensure!(
        config.shared_keys.is_some() || !needed,
        "MANIFEST_TEMPLATE reads the Secret {}, which is not made: with the bucket's keys in it, whoever reads it may \
         change every user's code. Copy the files with `gantry-runner fetch`, as infrastructure/service.yaml does, which needs no \
         keys; or set GANTRY_SHARE_STORE_KEYS=true if you trust every user with the whole bucket",
        release::STORE_SECRET
    );
    Ok(())
}

async fn make_own_namespace(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let labels = json!({ MANAGED_BY: GANTRY });
    let body = json!({ "metadata": { "name": name, "labels": labels } });
    match cluster.create(&Manifest::new(Kind::Namespace, body)).await {
        Err(failure) if !failure.is_conflict() => {
            Err(failure).context("Gantry's own namespace could not be made")
        }
        _ => Ok(()),
    }
}

/// Asks the API server what it thinks of the template, with a release that is not stored: better now
/// than at somebody's first deploy.
async fn try_template(cluster: &Cluster, config: &KubernetesConfig) -> anyhow::Result<()> {
    for mut manifest in release_config(config.clone()).sample()? {
        manifest.body["metadata"]["namespace"] = config.namespace.clone().into();
        cluster
            .would_apply(&manifest)
            .await
            .context("MANIFEST_TEMPLATE cannot be used")?;
    }
    Ok(())
}

fn release_config(config: KubernetesConfig) -> ReleaseConfig {
    let KubernetesConfig {
        template,
        runner_image,
        database_image,
        bucket,
        shared_keys,
        domain,
        app_domain,
        sites,
        ingress_class,
        wake_service,
        drain,
        store: _,
        namespace: _,
        store_addresses: _,
        maximum: _,
        network: _,
        log_refused: _,
        heartbeat_late: _,
        quota: _,
        packages: _,
        forward_modules: _,
        ingress_addresses: _,
        closed_networks: _,
        root_services: _,
    } = config;
    ReleaseConfig {
        template,
        runner_image,
        database_image,
        bucket,
        shared_keys,
        domain,
        app_domain,
        sites,
        ingress_class,
        wake_service,
        drain,
    }
}

#[async_trait]
impl Platform for KubernetesPlatform {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn checks(&self) -> Vec<Check> {
        self.checks.clone()
    }

    async fn connect(&self, user: &UserId) -> Result<Box<dyn ByteStream>, PlatformError> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let stream = self.stream(user, deadline).await?;
        Ok(Box::new(stream))
    }

    fn used(&self, user: &UserId) {
        self.releases.namespaces.used(user);
    }

    async fn drop_sandbox(&self, user: &UserId) -> Result<(), PlatformError> {
        let removed = self.test_pods.remove(user).await;
        removed.map_err(|f| f.unavailable("The test pod could not be removed"))
    }

    async fn overtaken(&self, spec: &ReleaseSpec) -> Result<Option<Problem>, PlatformError> {
        self.releases.overtaken(spec).await
    }

    async fn ordered(&self, repl: &ReplId, order: &Order) -> Result<(), PlatformError> {
        self.releases.ordered(repl, order).await
    }

    async fn ensure_release(&self, spec: &ReleaseSpec) -> Result<RunningRelease, PlatformError> {
        let running = self.releases.ensure(spec).await?;
        self.ask(&spec.user_id, &spec.repl_id, spec).await;
        Ok(running)
    }

    async fn rollback(
        &self,
        repl: &ReplId,
        release: Option<u64>,
        order: &Order,
    ) -> Result<RunningRelease, PlatformError> {
        self.releases.rollback(repl, release, order).await
    }

    async fn open_workspace(&self, spec: &WorkspaceSpec) -> Result<Opened, PlatformError> {
        self.releases.open_workspace(spec).await
    }

    async fn stop_idle(
        &self,
        repl: &ReplId,
        unused_since: Timestamp,
        looked: Timestamp,
    ) -> Result<bool, PlatformError> {
        self.releases.stop_idle(repl, unused_since, looked).await
    }

    fn is_idle(&self, repl: &ReplId) -> bool {
        self.releases.is_idle(repl)
    }

    async fn wake(&self, repl: &ReplId) -> Result<bool, PlatformError> {
        self.releases.wake(repl).await
    }

    async fn settle_idle(&self) {
        if let Err(failure) = self.releases.settle_idle().await {
            tracing::warn!(%failure, "what is left of idle repls stays for a while");
        }
    }

    async fn drop_repl(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.stop(repl).await
    }

    async fn data(&self, repl: &ReplId) -> Result<ReplData, PlatformError> {
        self.releases.data(repl).await
    }

    async fn delete_data(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.delete_data(repl).await
    }

    async fn owner(&self, repl: &ReplId) -> Result<Option<UserId>, PlatformError> {
        Ok(self.releases.owner(repl))
    }

    async fn claim(&self, repl: &ReplId, user: &UserId) -> Result<UserId, PlatformError> {
        let claimed = self.releases.records.claim(repl, user).await;
        claimed.map_err(|f| f.unavailable("The repl's name could not be taken"))
    }

    async fn names(&self, user: &UserId) -> Result<usize, PlatformError> {
        Ok(self.releases.records.of(user))
    }

    async fn forget(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.forget(repl, true).await
    }

    async fn forget_unused(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.forget(repl, false).await
    }

    fn most_replicas(&self) -> u32 {
        MAX_REPL_REPLICAS
    }

    async fn settings(&self, repl: &ReplId) -> Result<ReplSettings, PlatformError> {
        self.releases.settings(repl).await
    }

    async fn configure(
        &self,
        repl: &ReplId,
        change: &ReplChange,
    ) -> Result<ReplSettings, ConfigureError> {
        self.releases.configure(repl, change).await
    }

    fn repl_of(&self, host: &str) -> Option<ReplId> {
        let repl = self.releases.claims.holder(host)?;
        // Taken, and given to it: in between it is still decided whether it gets it.
        let record = self.releases.records.known(&repl)?;
        let mut domains = record.domains.iter();
        domains
            .any(|domain| domain.as_str() == host)
            .then_some(repl)
    }

    async fn repls(&self) -> Result<Vec<ReplStatus>, PlatformError> {
        Ok(self.programs.statuses())
    }

    async fn releases(&self, repl: &ReplId) -> Result<Vec<Release>, PlatformError> {
        self.releases.of(repl).await
    }

    async fn dial(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.programs.dial(repl).await
    }

    async fn dial_runner(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.programs.dial_runner(repl).await
    }

    async fn dial_runners(&self, repl: &ReplId) -> Result<Vec<Box<dyn ByteStream>>, PlatformError> {
        self.programs.dial_runners(repl).await
    }

    async fn ticket_key(&self, repl: &ReplId) -> Result<TicketKey, PlatformError> {
        self.releases.ticket_key(repl).await
    }

    fn services(&self) -> Option<Arc<dyn Services>> {
        Some(Arc::clone(&self.services) as Arc<dyn Services>)
    }

    fn modules(&self) -> Arc<dyn Modules> {
        Arc::clone(&self.modules) as Arc<dyn Modules>
    }

    fn follow_programs(&self, recorded: BoxFuture<'static, Recorded>) {
        self.programs.follow_from(recorded);
    }

    async fn next_program_event(&self) -> Option<ProgramEvent> {
        let next = async { self.events.lock().await.recv().await };
        tokio::select! {
            event = next => event,
            () = self.stop.cancelled() => None,
        }
    }

    /// Everything in the cluster outlives the server; only the watching ends.
    async fn shutdown(&self) {
        self.stop.cancel();
    }
}
