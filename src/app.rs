//! The composition root: the only file that names concrete backends.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use secrecy::{ExposeSecret, SecretString};

use crate::auth::{Keys, NewKey, Role, Sessions};
use crate::config::{CleanUpConfig, ClusterConfig, Config, PlatformConfig};
use crate::journal::{Journal, JournalOptions};
use crate::logs::{
    Elasticsearch, ElasticsearchSearch, ElasticsearchSettings, EmbeddedSearch, LogSearch,
    Neighbours, Shipper, ShipperOptions,
};
use crate::model::Packages;
use crate::pipeline::modules::{ModuleCalls, ModuleOptions};
use crate::pipeline::{Bounds, NameRules, Names, Pipeline, PipelineOptions, Revoked, Share};
use crate::platform::kubernetes::{
    BUILT_IN_TEMPLATE, CleanUp, KubernetesConfig, KubernetesPlatform, PipIndex, Template,
    WakeService,
};
use crate::platform::local::{LocalConfig, LocalPlatform};
use crate::platform::{Check, Finding, Platform};
use crate::shutdown::{DRAIN_TIMEOUT, EndSignals, PLATFORM_TIMEOUT, Shutdown};
use crate::storage::{CodeStore, DirectoryStore, S3Config, S3Store};
use crate::transport::{
    Edge, Guard, Numbers, Parts, Peers, Replicas, Server, raise_open_files, router,
};

/// Largest file of the journal. A journal that may have less than sixteen of them has smaller ones,
/// so that what is deleted at once is a small part of it.
const SEGMENT_BYTES: u64 = 64 << 20;

/// Records that wait for Elasticsearch may take this many times the journal's usual size.
const BACKLOG: u64 = 8;

/// Most ids of ended submissions that are remembered: with about a hundred bytes each, 400 MB.
const REMEMBERED_IDS: u64 = 4 << 20;

/// Longest wait for the last save of all workspaces on this machine: a few files each, on its own disk.
const SAVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two clean-ups of the numbers behind `/metrics`: what is asked for every 15 s or so.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Runs the server until a signal ends it.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let open_files = raise_open_files();
    // First of all: who connects while the rest starts waits a moment instead of being refused.
    let server = Server::bind(config.listen, open_files, &config.access)
        .with_context(|| format!("cannot listen on {}; set HOST and PORT", config.listen))?;
    let address = server.address()?;
    let health = health_server(&config)?;
    let numbers = metrics()?;
    let journal = open_journal(&config).await?;
    let keys = Keys::open(&config.data_dir, config.api_key.as_ref())?;
    let new_key = match keys.admin() {
        Some(_) => None,
        None => Some(keys.create(Role::Admin)?),
    };
    let shutdown = Shutdown::default();
    let Backends { platform, store } = backends(&config, address, &shutdown).await?;
    let checks = platform.checks();
    require_sandbox(&config, &checks)?;
    let peers = Arc::new(Peers::new(&config.peers)?);
    // Before anything is appended: from here on the journal keeps what was not shipped.
    let search = log_search(&config, &journal, &peers, &shutdown)?;
    let options = PipelineOptions {
        runs: config.max_runs,
        runs_per_user: match config.platform {
            PlatformConfig::Local => runs_per_user(config.max_runs),
            // A test pod runs one program at a time.
            PlatformConfig::Kubernetes(_) => 1,
        },
        bounds: Bounds {
            submissions: config.max_waiting,
            bytes: config.max_waiting_bytes,
        },
        revoked: {
            let keys = keys.clone();
            Revoked(Arc::new(move |key| keys.is_revoked(key)))
        },
        maximum: config.maximum_limits,
        share: share(&config.platform, &peers),
        name_rules: NameRules {
            reserved: config.access.reserved_names.clone(),
            per_user: config.access.names_per_user,
        },
        repls_per_user: config.max_repls,
        idle_stop: config.idle_stop,
        names: Names::new(config.nameserver, &config.app_domain),
        packages: config.packages.clone(),
    };
    let pipeline = Pipeline::new(journal.clone(), Arc::clone(&platform), store, &options);
    pipeline.recover();
    let options = ModuleOptions {
        calls_per_user: config.max_calls,
        pods_per_user: config.max_module_pods,
        idle: config.module_idle,
    };
    let modules = ModuleCalls::new(platform.modules(), options);
    let parts = Parts {
        keys: keys.clone(),
        sessions: Sessions::open(&config.data_dir, config.access.sessions_per_key)?,
        journal: journal.clone(),
        search,
        pipeline: pipeline.clone(),
        platform: Arc::clone(&platform),
        modules: modules.clone(),
        peers: Arc::clone(&peers),
        numbers: Numbers(numbers.clone()),
        shutdown: shutdown.clone(),
    };
    let edge = Arc::new(Edge::new(parts, &config, Guard::new(&config, address))?);
    let token = shutdown.token.clone();
    shutdown.tasks.spawn(keys.clone().watch(token.clone()));
    let cancelling = cancel_revoked(keys.clone(), pipeline.clone());
    shutdown
        .tasks
        .spawn(token.clone().run_until_cancelled_owned(cancelling));
    if peers.any() {
        shutdown
            .tasks
            .spawn(peers.watch(keys.clone(), token.clone()));
    }
    shutdown.tasks.spawn(upkeep(numbers, token.clone()));
    shutdown.tasks.spawn(modules.stop_idle(token));
    let end_signals = EndSignals::listen().context("cannot wait for signals")?;
    banner(&config, address, &edge, new_key.as_ref(), &checks)?;
    tracing::info!(%address, platform = platform.name(), "serving");
    let accepting = server.run(Arc::clone(&edge), router(Arc::clone(&edge)));
    let accepting = tokio::spawn(accepting);
    if let Some(health) = health {
        tokio::spawn(health.run(Arc::clone(&edge), router(Arc::clone(&edge))));
    }
    let signal = end_signals.received().await;
    tracing::info!(signal, "stopping");
    let (connections_ended, all_ended) = tokio::join!(shutdown.drain(), runs_ended(&pipeline));
    if !connections_ended {
        tracing::warn!("some connections did not end in time and are dropped");
    }
    accepting.abort();
    pipeline.put_down().await;
    if let PlatformConfig::Local = config.platform {
        // Workspaces end with this process.
        let saved = tokio::time::timeout(SAVE_TIMEOUT, pipeline.save_all());
        if saved.await.is_err() {
            tracing::warn!(
                "some workspaces were not saved in time; what was edited lately is lost"
            );
        }
    }
    // What still runs stays unfinished on disk and is taken up at the next start, instead of being
    // recorded as a failure now.
    journal
        .close()
        .await
        .context("the journal could not be closed")?;
    // While runs go on their sandboxes stay; released programs end with this process either way.
    if all_ended
        && tokio::time::timeout(PLATFORM_TIMEOUT, platform.shutdown())
            .await
            .is_err()
    {
        tracing::warn!(
            "the platform did not stop in time; what it left is taken up at the next start"
        );
    }
    Ok(())
}

/// What answers for the server's health whatever goes on at its own address.
fn health_server(config: &Config) -> anyhow::Result<Option<Server>> {
    let Some(address) = config.access.health_listen else {
        return Ok(None);
    };
    let server = Server::bind_health(address)
        .with_context(|| format!("cannot listen on {address}; set GANTRY_HEALTH_LISTEN"))?;
    Ok(Some(server))
}

/// Lets short runs end; `false` when some are left for the next start.
async fn runs_ended(pipeline: &Pipeline) -> bool {
    let ended = tokio::time::timeout(DRAIN_TIMEOUT, pipeline.drain()).await;
    if ended.is_err() {
        tracing::info!(
            under_way = pipeline.load().0,
            "some submissions run on; the next start takes them up"
        );
    }
    ended.is_ok()
}

async fn open_journal(config: &Config) -> anyhow::Result<Journal> {
    let folder = config.data_dir.join("journal");
    let options = JournalOptions {
        segment_bytes: SEGMENT_BYTES.min(config.journal_bytes / 16),
        retain_bytes: config.journal_bytes,
        backlog_bytes: config.journal_bytes.saturating_mul(BACKLOG),
        remember: config.remember,
        remembered_ids: REMEMBERED_IDS,
    };
    let opened = tokio::task::spawn_blocking(move || Journal::open(&folder, options)).await?;
    opened.context("the journal cannot be opened")
}

/// Where records are found again, and what brings them there.
fn log_search(
    config: &Config,
    journal: &Journal,
    peers: &Arc<Peers>,
    shutdown: &Shutdown,
) -> anyhow::Result<Arc<dyn LogSearch>> {
    let token = shutdown.token.clone();
    let Some(settings) = ElasticsearchSettings::from_variables(|name| std::env::var(name).ok())?
    else {
        let file = config.data_dir.join("search.sqlite");
        let search = EmbeddedSearch::open(&file, journal.clone())?;
        shutdown.tasks.spawn(search.clone().run(token));
        return Ok(Arc::new(search));
    };
    let elastic = Elasticsearch::new(&settings)?;
    let options = ShipperOptions::in_folder(config.data_dir.join("shipper"));
    let shipper = Shipper::open(journal.clone(), elastic.clone(), options)
        .context("the folder of the log shipper cannot be used")?;
    shutdown.tasks.spawn(shipper.clone().run(token));
    let others: Option<Arc<dyn Neighbours>> = match peers.any() {
        true => Some(Arc::new(Replicas(Arc::clone(peers)))),
        false => None,
    };
    let search = ElasticsearchSearch::new(elastic, journal.clone(), shipper, others);
    Ok(Arc::new(search))
}

/// The backends this server runs on: the platform and the code store.
struct Backends {
    platform: Arc<dyn Platform>,
    store: Arc<dyn CodeStore>,
}

async fn backends(
    config: &Config,
    address: SocketAddr,
    shutdown: &Shutdown,
) -> anyhow::Result<Backends> {
    match &config.platform {
        PlatformConfig::Local => local(config, address).await,
        PlatformConfig::Kubernetes(cluster) => kubernetes(config, cluster, shutdown).await,
    }
}

async fn kubernetes(
    config: &Config,
    cluster: &ClusterConfig,
    shutdown: &Shutdown,
) -> anyhow::Result<Backends> {
    let text = cluster.manifest_template.as_deref();
    let template = Template::parse(text.unwrap_or(BUILT_IN_TEMPLATE))
        .map_err(|why| anyhow::anyhow!("MANIFEST_TEMPLATE cannot be used: {why}"))?;
    let Some(s3) = S3Config::from_variables(|name| std::env::var(name).ok())? else {
        anyhow::bail!(
            "S3_BUCKET is not set: on Kubernetes released pods fetch their code from a bucket. Set S3_BUCKET and the AWS_ variables"
        );
    };
    let store = Arc::new(S3Store::open(s3.clone()));
    let platform = KubernetesPlatform::start(
        KubernetesConfig {
            namespace: cluster.namespace.clone(),
            template,
            runner_image: cluster.runner_image.clone(),
            database_image: cluster.database_image.clone(),
            bucket: s3.bucket.clone(),
            store: Arc::clone(&store),
            shared_keys: cluster.share_store_keys.then(|| store_variables(&s3)),
            store_addresses: store_addresses(&s3).await,
            domain: config.domain.clone(),
            app_domain: config.app_domain.clone(),
            sites: config.sites(None),
            ingress_class: cluster.ingress_class.clone(),
            ingress_addresses: cluster.ingress_addresses.clone(),
            closed_networks: cluster.closed_networks.clone(),
            root_services: cluster.root_services,
            maximum: config.maximum_limits,
            network: config.allow_network,
            log_refused: config.log_refused,
            heartbeat_late: cluster.heartbeat_late,
            quota: cluster.quota.clone(),
            packages: package_index(&config.packages, cluster).await,
            forward_modules: cluster.module_forward,
            wake_service: cluster.wake_service.as_ref().map(|service| WakeService {
                name: service.name.clone(),
                port: service.port,
            }),
            drain: config.drain,
        },
        vec![
            bucket_check(&store, &s3.bucket).await,
            elasticsearch_check(!config.peers.addresses.is_empty()).await?,
        ],
    );
    let platform = platform
        .await
        .context("the Kubernetes platform cannot start")?;
    if cluster.clean_up != CleanUpConfig::Off {
        let remove = cluster.clean_up == CleanUpConfig::Remove;
        let options = CleanUp::new(remove, cluster.idle);
        let cleaner = platform.cleaner(Arc::clone(&store), options);
        let cleaning = cleaner.run(this_process()?, shutdown.token.clone());
        shutdown.tasks.spawn(cleaning);
    }
    Ok(Backends {
        platform: Arc::new(platform),
        store,
    })
}

async fn bucket_check(store: &S3Store, bucket: &str) -> Check {
    let (finding, detail) = match store.check().await {
        Ok(()) => (Finding::Good, bucket.to_owned()),
        Err(problem) => (Finding::Missing, problem.to_string()),
    };
    Check {
        name: "bucket",
        finding,
        detail,
    }
}

/// Never a reason not to start: records wait in the journal until Elasticsearch takes them.
async fn elasticsearch_check(replicas: bool) -> anyhow::Result<Check> {
    let settings = ElasticsearchSettings::from_variables(|name| std::env::var(name).ok())?;
    let (finding, detail) = match settings {
        None if replicas => (
            Finding::Weaker,
            "ELASTICSEARCH_HOST is not set: each replica lists and searches only what it took in itself"
                .to_owned(),
        ),
        None => (
            Finding::Good,
            "not used; logs are searched in the data folder".to_owned(),
        ),
        Some(settings) => match Elasticsearch::new(&settings)?.check().await {
            Ok(said) => (Finding::Good, said),
            Err(error) => (
                Finding::Weaker,
                format!("{error}. Records wait in the journal meanwhile"),
            ),
        },
    };
    Ok(Check {
        name: "Elasticsearch",
        finding,
        detail,
    })
}

/// A name that no other process has: the machine's, or the pod's, and a random part.
fn this_process() -> anyhow::Result<String> {
    let mut random = [0; 4];
    getrandom::fill(&mut random)
        .map_err(|error| anyhow::anyhow!("the system gives no random numbers: {error}"))?;
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy().into_owned();
    Ok(format!("{host}_{:08x}", u32::from_be_bytes(random)))
}

/// The bucket's keys, as a template that copies with aws-cli needs them.
fn store_variables(s3: &S3Config) -> BTreeMap<String, String> {
    let token = s3.session_token.as_ref();
    let variables = [
        ("AWS_REGION", Some(s3.region.clone())),
        ("AWS_ACCESS_KEY_ID", Some(s3.access_key_id.clone())),
        (
            "AWS_SECRET_ACCESS_KEY",
            Some(s3.secret_access_key.expose_secret().to_owned()),
        ),
        (
            "AWS_SESSION_TOKEN",
            token.map(|token| token.expose_secret().to_owned()),
        ),
        ("AWS_ENDPOINT_URL", s3.endpoint.clone()),
    ];
    let set = variables.into_iter();
    set.filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
}

/// Where modules' packages come from.
async fn package_index(packages: &Packages, cluster: &ClusterConfig) -> PipIndex {
    let cache_class = cluster.package_cache_class.clone();
    let pip = Packages::python();
    let index = pip.and_then(|pip| Some((pip, packages.index(pip)?)));
    let Some((pip, index)) = index else {
        return PipIndex {
            cache_class,
            ..PipIndex::default()
        };
    };
    let variables = pip.variables(index).into_iter();
    let addresses = match index.url == pip.registry.usual {
        // Its addresses are many, and change.
        true => None,
        false => {
            let mut addresses = Vec::new();
            for (host, port) in &index.places {
                addresses.extend(addresses_at(host, *port, "the package index").await);
            }
            Some(addresses)
        }
    };
    PipIndex {
        variables: Some(
            variables
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        ),
        addresses,
        cache_class,
    }
}

/// Where the bucket's server is, when it is not AWS: released pods may go there even when it is in a
/// range that is closed to them.
async fn store_addresses(s3: &S3Config) -> Vec<(IpAddr, u16)> {
    match &s3.endpoint {
        Some(url) => addresses_of(url, "the code store").await,
        None => Vec::new(),
    }
}

/// The addresses behind a URL. `what`: whose it is, for the log.
async fn addresses_of(url: &str, what: &str) -> Vec<(IpAddr, u16)> {
    let Ok(uri) = url.parse::<axum::http::Uri>() else {
        tracing::warn!(
            what,
            "its address is not a URL; network policies do not name it"
        );
        return Vec::new();
    };
    let https = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    addresses_at(host, port, what).await
}

async fn addresses_at(host: &str, port: u16, what: &str) -> Vec<(IpAddr, u16)> {
    match tokio::net::lookup_host((host, port)).await {
        Ok(found) => found
            .map(|address| (address.ip(), address.port()))
            .collect(),
        Err(error) => {
            tracing::warn!(what, %host, %error, "its address is not known; network policies do not name it");
            Vec::new()
        }
    }
}

async fn local(config: &Config, address: SocketAddr) -> anyhow::Result<Backends> {
    if std::env::var_os("S3_BUCKET").is_some_and(|bucket| !bucket.is_empty()) {
        tracing::warn!(
            "S3_BUCKET is set and not used: the local platform keeps code in the data folder"
        );
    }
    let folder = config.data_dir.join("store");
    let store = DirectoryStore::open(folder).context("the code store cannot be opened")?;
    let local = LocalConfig {
        data: config.data_dir.join("local"),
        runner: config.runner.clone(),
        runs_per_user: runs_per_user(config.max_runs),
        maximum: config.maximum_limits,
        network: config.allow_network,
        packages: config.packages.clone(),
        log_refused: config.log_refused,
        drain: config.drain,
        sites: config.sites(Some(address.port())),
        disk: config.disk,
    };
    let platform = LocalPlatform::start(local, store.clone()).await;
    Ok(Backends {
        platform: Arc::new(platform.context("the local platform cannot start")?),
        store: Arc::new(store),
    })
}

/// Cancels what was sent with a key when the key is revoked.
async fn cancel_revoked(keys: Keys, pipeline: Pipeline) {
    let mut changes = keys.changes();
    while changes.changed().await.is_ok() {
        pipeline.cancel_revoked();
    }
}

/// Which repls' programs are recorded here: in a cluster every replica sees all of them.
fn share(platform: &PlatformConfig, peers: &Arc<Peers>) -> Share {
    match platform {
        PlatformConfig::Local => Share(Arc::new(|_| true)),
        PlatformConfig::Kubernetes(_) => {
            let peers = Arc::clone(peers);
            Share(Arc::new(move |repl| peers.records(repl)))
        }
    }
}

/// One user may fill three quarters of the places: the rest is there at once for the next user.
fn runs_per_user(runs: usize) -> usize {
    (runs * 3 / 4).max(1)
}

fn require_sandbox(config: &Config, checks: &[Check]) -> anyhow::Result<()> {
    let short: Vec<String> = checks
        .iter()
        .filter(|check| check.finding != Finding::Good)
        .map(|check| format!("{}: {}", check.name, check.detail))
        .collect();
    if config.require_sandbox && !short.is_empty() {
        anyhow::bail!(
            "GANTRY_REQUIRE_SANDBOX is set, and this machine does not allow the whole sandbox: {}",
            short.join("; ")
        );
    }
    Ok(())
}

fn metrics() -> anyhow::Result<PrometheusHandle> {
    // Seconds, from a warm run to the longest one allowed; buckets keep memory bounded.
    let buckets = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
    ];
    let recorder = PrometheusBuilder::new()
        .set_buckets(&buckets)?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)
        .map_err(|_| anyhow::anyhow!("the metrics recorder was set twice"))?;
    metrics::describe_counter!(
        "gantry_submissions_total",
        "Submissions that ended, by status"
    );
    metrics::describe_histogram!(
        "gantry_submission_seconds",
        metrics::Unit::Seconds,
        "From the start of a submission to its reply"
    );
    metrics::describe_gauge!("gantry_websocket_connections", "WebSockets that are open");
    metrics::describe_gauge!(
        "gantry_submissions_under_way",
        "Submissions that have no reply yet"
    );
    metrics::describe_gauge!("gantry_runs_waiting", "Runs that wait for their turn");
    metrics::describe_counter!(
        "gantry_cluster_requests_total",
        "Requests to the Kubernetes API server"
    );
    metrics::describe_gauge!(
        "gantry_journal_bytes",
        metrics::Unit::Bytes,
        "Size of the journal"
    );
    metrics::describe_counter!(
        "gantry_journal_damaged_total",
        "Places and files of the journal that could not be read, since the start"
    );
    metrics::describe_gauge!(
        "gantry_files_set_aside",
        "Records of repls and modules, and of sessions, that cannot be read and are set aside"
    );
    describe_shipping();
    metrics::gauge!("gantry_websocket_connections").set(0.0);
    Ok(handle)
}

fn describe_shipping() {
    metrics::describe_gauge!(
        "gantry_elasticsearch_up",
        "1 while Elasticsearch takes records, 0 while they wait in the journal"
    );
    metrics::describe_gauge!(
        "gantry_logs_shipping_lag_seconds",
        metrics::Unit::Seconds,
        "Age of the last record shipped, while others wait"
    );
    metrics::describe_counter!(
        "gantry_logs_shipped_total",
        "Records that Elasticsearch has, those it had before included"
    );
    metrics::describe_counter!(
        "gantry_logs_retries_total",
        "Records that were sent and must be sent again"
    );
    metrics::describe_counter!(
        "gantry_logs_refused_total",
        "Records that Elasticsearch refused for good: they are in the dead-letter file"
    );
    metrics::describe_counter!(
        "gantry_logs_damaged_total",
        "Journal files that could not be shipped because they are damaged"
    );
    metrics::describe_counter!(
        "gantry_journal_unshipped_deleted_bytes_total",
        metrics::Unit::Bytes,
        "Journal deleted before it was shipped, because the backlog was too large"
    );
}

async fn upkeep(numbers: PrometheusHandle, stop: tokio_util::sync::CancellationToken) {
    while stop
        .run_until_cancelled(tokio::time::sleep(METRICS_UPKEEP))
        .await
        .is_some()
    {
        numbers.run_upkeep();
    }
}

/// What a person at the terminal needs: where it is, how to get in, what the machine allows.
fn banner(
    config: &Config,
    address: SocketAddr,
    edge: &Edge,
    new_key: Option<&NewKey>,
    checks: &[Check],
) -> anyhow::Result<()> {
    let listens = base_url(address);
    let local = matches!(config.platform, PlatformConfig::Local);
    let programs = config.sites(local.then_some(address.port())).programs;
    let mut text = format!(
        "Gantry {} is at {listens}/\n  data      {}\n  programs  {}://{{replId}}.{}/\n",
        env!("CARGO_PKG_VERSION"),
        config.data_dir.display(),
        programs.scheme.as_str(),
        programs.authority,
    );
    let public = config.access.public_url.as_ref().map(|url| &url.text);
    if let Some(public) = public {
        text.push_str(&format!("  public    {public}/\n"));
    }
    let base = public.unwrap_or(&listens);
    for check in checks {
        let word = match check.finding {
            Finding::Good if local => continue,
            Finding::Good => "good",
            Finding::Weaker => "weaker",
            Finding::Missing => "missing",
        };
        text.push_str(&format!("  {word:<9} {}: {}\n", check.name, check.detail));
    }
    if local && checks.iter().all(|check| check.finding == Finding::Good) {
        text.push_str("  sandbox   complete\n");
    }
    if let Some(key) = new_key {
        let shown = key.text.expose_secret();
        text.push_str(&format!("  admin key {shown} (shown this once)\n"));
    }
    if share_a_site(&config.domain, &config.app_domain) {
        text.push_str(&format!(
            "  warning   programs at *.{} share a site with {}: browsers take cookies for the API from them, and send the API's with requests from them. Set APP_DOMAIN to a domain that is used for nothing else\n",
            config.app_domain, config.domain,
        ));
    }
    if config.api_key.is_none() {
        let token = sign_in_token(edge)?;
        let token = token.expose_secret();
        text.push_str(&format!(
            "  sign in   {base}/#token={token} (once, within an hour)\n"
        ));
    }
    let mut out = std::io::stdout().lock();
    // A closed terminal is no reason not to serve.
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        tracing::warn!(%error, "the start message could not be printed");
    }
    Ok(())
}

/// Whether browsers take both for parts of one site: one is below the other, or both are below one domain that
/// somebody can own. On this machine alone nobody else's programs are.
fn share_a_site(domain: &str, app_domain: &str) -> bool {
    let local = |name: &str| name == "localhost" || name.ends_with(".localhost");
    let below = |name: &str, above: &str| {
        let above = name.strip_suffix(above);
        above.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let owned = |name: &str| {
        let mut labels = name.rsplit('.');
        Some((labels.next()?.to_owned(), labels.next()?.to_owned()))
    };
    if local(domain) && local(app_domain) {
        return false;
    }
    let same_owner = owned(domain).is_some_and(|one| owned(app_domain) == Some(one));
    below(app_domain, domain) || below(domain, app_domain) || same_owner
}

fn sign_in_token(edge: &Edge) -> anyhow::Result<SecretString> {
    let admin = edge
        .keys
        .admin()
        .context("there is no admin key to sign in with")?;
    Ok(edge.sign_ins.issue(&admin.key_id)?)
}

fn base_url(address: SocketAddr) -> String {
    let ip = match address.ip() {
        // What listens everywhere is reached here by this name.
        ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_the_apis_site_are_seen() {
        assert!(share_a_site("gantry.example", "apps.gantry.example"));
        assert!(share_a_site("api.apps.example", "apps.example"));
        assert!(share_a_site("gantry.example.com", "apps.example.com"));
        assert!(!share_a_site("gantry.example", "programs.example"));
        assert!(!share_a_site("gantry.example.com", "apps.example.net"));
        assert!(!share_a_site("localhost", "apps.localhost"));
        assert!(share_a_site("gantry.lan", "apps.gantry.lan"));
    }
}
