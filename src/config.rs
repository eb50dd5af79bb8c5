//! Arguments and environment, checked once and turned into a [`Config`] that cannot be wrong.

mod access;
mod cluster;
mod packages;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use secrecy::{ExposeSecret, SecretString};

use crate::model::{DiskBounds, Limits, Packages, Scheme, Site, Sites, is_host_label};
use access::AccessArgs;
pub use access::AccessConfig;
use cluster::cluster;
pub use cluster::{CleanUpConfig, ClusterConfig, ServicePort};
use packages::PackageArgs;

/// Where the key store is; every command that works on it needs this.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// Folder for the journal, the key store and the releases [default: the XDG data folder]
    #[arg(long, env = "GANTRY_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
}

/// Arguments of `gantry serve`. All text: what is wrong is said in terms of the variable's name.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, env = "HOST", value_name = "ADDRESS")]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 8000]
    #[arg(long, env = "PORT", value_name = "NUMBER")]
    port: Option<String>,
    /// What owns sandboxes and releases: local or kubernetes [default: local]
    #[arg(long, env = "GANTRY_PLATFORM", value_name = "NAME")]
    platform: Option<String>,
    /// Host name of the API behind a proxy [default: localhost]
    #[arg(long, env = "DOMAIN", value_name = "HOST")]
    domain: Option<String>,
    /// Deployed programs are served at {replId}.APP_DOMAIN [default: apps.localhost]
    #[arg(long, env = "APP_DOMAIN", value_name = "HOST")]
    app_domain: Option<String>,
    /// Other origins that may call the API from a browser, separated by commas
    #[arg(long, env = "CORS_ORIGINS", value_name = "ORIGINS")]
    cors_origins: Option<String>,
    /// Name server that is asked whose a domain is, as ADDRESS or ADDRESS:PORT [default: the machine's]
    #[arg(long, env = "GANTRY_NAMESERVER", value_name = "ADDRESS")]
    nameserver: Option<String>,
    /// Do not start unless the machine allows every layer of the sandbox
    #[arg(long, env = "GANTRY_REQUIRE_SANDBOX", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    require_sandbox: Option<String>,
    #[command(flatten)]
    access: AccessArgs,
    /// Let test runs use the network
    #[arg(long, env = "GANTRY_ALLOW_NETWORK", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    allow_network: Option<String>,
    /// Let the kernel log each system call that user code is refused
    #[arg(long, env = "GANTRY_LOG_REFUSED_CALLS", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    log_refused_calls: Option<String>,
    #[command(flatten)]
    packages: PackageArgs,
    /// Runs at one time, all users together [default: twice the cores, at least 4]
    #[arg(long, env = "GANTRY_MAX_RUNS", value_name = "NUMBER")]
    max_runs: Option<String>,
    /// Submissions of one user that are under way at one time: waiting, running or being deployed [default: 1000]
    #[arg(long, env = "GANTRY_MAX_WAITING", value_name = "NUMBER")]
    max_waiting: Option<String>,
    /// Bytes of code and input that these keep in memory [default: 33554432]
    #[arg(long, env = "GANTRY_MAX_WAITING_BYTES", value_name = "NUMBER")]
    max_waiting_bytes: Option<String>,
    /// Repls of one user that run at one time [default: any number]
    #[arg(long, env = "GANTRY_MAX_REPLS", value_name = "NUMBER")]
    max_repls: Option<String>,
    /// Calls of module functions of one user at one time [default: 64]
    #[arg(long, env = "GANTRY_MAX_CALLS", value_name = "NUMBER")]
    max_calls: Option<String>,
    /// Pods of all modules of one user [default: 24]
    #[arg(long, env = "GANTRY_MAX_MODULE_PODS", value_name = "NUMBER")]
    max_module_pods: Option<String>,
    /// Stop modules that nobody has called for so long, such as 30m; the next call starts them again [default: off]
    #[arg(long, env = "GANTRY_MODULE_IDLE", value_name = "TIME")]
    module_idle: Option<String>,
    /// Most wall-clock milliseconds a submission may ask for
    #[arg(long, env = "GANTRY_MAX_WALL_MS", value_name = "NUMBER")]
    max_wall_ms: Option<String>,
    /// Most processor milliseconds a submission may ask for
    #[arg(long, env = "GANTRY_MAX_CPU_MS", value_name = "NUMBER")]
    max_cpu_ms: Option<String>,
    /// Most bytes of memory a submission may ask for
    #[arg(long, env = "GANTRY_MAX_MEMORY_BYTES", value_name = "NUMBER")]
    max_memory_bytes: Option<String>,
    /// Most processes a submission may ask for
    #[arg(long, env = "GANTRY_MAX_PROCESSES", value_name = "NUMBER")]
    max_processes: Option<String>,
    /// Most bytes of one file a submission may ask for
    #[arg(long, env = "GANTRY_MAX_FILE_BYTES", value_name = "NUMBER")]
    max_file_bytes: Option<String>,
    /// Most bytes of output a submission may ask for
    #[arg(long, env = "GANTRY_MAX_OUTPUT_BYTES", value_name = "NUMBER")]
    max_output_bytes: Option<String>,
    /// Bytes of the journal, past which the oldest records of the users with the most are deleted [default: 1 GiB]
    #[arg(long, env = "GANTRY_JOURNAL_BYTES", value_name = "NUMBER")]
    journal_bytes: Option<String>,
    /// Days for which the id of an ended submission is remembered after its record was deleted [default: 30]
    #[arg(long, env = "GANTRY_REMEMBER_DAYS", value_name = "NUMBER")]
    remember_days: Option<String>,
    /// Most bytes of one repl's data on this machine, such as its database [default: 1 GiB]
    #[arg(long, env = "GANTRY_MAX_REPL_DATA_BYTES", value_name = "NUMBER")]
    max_repl_data_bytes: Option<String>,
    /// Most bytes of all data and releases of one user on this machine [default: 4 GiB]
    #[arg(long, env = "GANTRY_MAX_USER_DISK_BYTES", value_name = "NUMBER")]
    max_user_disk_bytes: Option<String>,
    /// Bytes of this machine's disk that user code leaves free for the server [default: a twentieth, at most 1 GiB]
    #[arg(long, env = "GANTRY_DISK_RESERVE_BYTES", value_name = "NUMBER")]
    disk_reserve_bytes: Option<String>,
    /// Stop repls that nobody has used for so long, such as 30m; the next request starts them again [default: off]
    #[arg(long, env = "GANTRY_IDLE_STOP", value_name = "TIME")]
    idle_stop: Option<String>,
    /// How long a release that is replaced may take to answer the requests that it has, and any program to end
    /// after SIGTERM, before SIGKILL [default: 10s]
    #[arg(long, env = "GANTRY_DRAIN", value_name = "TIME")]
    drain: Option<String>,
    /// Kubernetes: Service in the server's own namespace that leads to the server, as NAME:PORT; needed for
    /// GANTRY_IDLE_STOP
    #[arg(long, env = "GANTRY_WAKE_SERVICE", value_name = "SERVICE")]
    wake_service: Option<String>,
    /// Kubernetes: namespace of the server's own objects [default: gantry]
    #[arg(long, env = "GANTRY_NAMESPACE", value_name = "NAME")]
    namespace: Option<String>,
    /// Kubernetes: manifests of a release [default: built in]
    #[arg(long, env = "MANIFEST_TEMPLATE", value_name = "FILE")]
    manifest_template: Option<PathBuf>,
    /// Kubernetes: class of the ingress controller [default: nginx]
    #[arg(long, env = "INGRESS_CLASS", value_name = "NAME")]
    ingress_class: Option<String>,
    /// Kubernetes: addresses or networks that the ingress controller's requests come from when it is no pod, such as
    /// 10.0.0.0/24: nodes whose network it uses, or a load balancer outside the cluster
    #[arg(long, env = "GANTRY_INGRESS_ADDRESSES", value_name = "NETWORKS")]
    ingress_addresses: Option<String>,
    /// Kubernetes: addresses or networks that user code may not reach, besides private and reserved ones: public ones
    /// of nodes, pods and the API server
    #[arg(long, env = "GANTRY_CLOSED_NETWORKS", value_name = "NETWORKS")]
    closed_networks: Option<String>,
    /// Kubernetes: services may run as root, with the few capabilities that usual images need
    #[arg(long, env = "GANTRY_ROOT_SERVICES", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    root_services: Option<String>,
    /// Kubernetes: image with gantry-runner and the languages [default: gantry-runner:latest]
    #[arg(long, env = "RUNNER_IMAGE", value_name = "IMAGE")]
    runner_image: Option<String>,
    /// Kubernetes: image of a release's database [default: postgres:16]
    #[arg(long, env = "DATABASE_IMAGE", value_name = "IMAGE")]
    database_image: Option<String>,
    /// Kubernetes: what is done about what nobody needs any more: off, tell or remove [default: tell]
    #[arg(long, env = "GANTRY_CLEAN_UP", value_name = "WHAT")]
    clean_up: Option<String>,
    /// Kubernetes: days without use after which a namespace or files count as not needed [default: 30]
    #[arg(long, env = "GANTRY_IDLE_DAYS", value_name = "NUMBER")]
    idle_days: Option<String>,
    /// Kubernetes: a node counts as failed when its heartbeat is this many seconds late [default: 5]
    #[arg(long, env = "GANTRY_HEARTBEAT_LATE", value_name = "SECONDS")]
    heartbeat_late: Option<String>,
    /// Kubernetes: bounds of each user's namespace, where they are not the usual ones, such as pods=10,limits.memory=8Gi
    #[arg(long, env = "GANTRY_USER_QUOTA", value_name = "BOUNDS")]
    user_quota: Option<String>,
    /// Kubernetes: storage class of a volume of each user's that keeps what pip fetched for modules [default: none is kept]
    #[arg(long, env = "GANTRY_PACKAGE_CACHE_CLASS", value_name = "NAME")]
    package_cache_class: Option<String>,
    /// Kubernetes: put the bucket's keys into the Secret gantry-store of each user's namespace, for a MANIFEST_TEMPLATE of your own that needs them
    #[arg(long, env = "GANTRY_SHARE_STORE_KEYS", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    share_store_keys: Option<String>,
    /// Kubernetes: reach modules' pods by port-forward only, never by their addresses
    #[arg(long, env = "GANTRY_MODULE_FORWARD", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    module_forward: Option<String>,
    /// The program that runs inside sandboxes [default: this one]
    #[arg(long, env = "GANTRY_RUNNER", value_name = "FILE")]
    runner: Option<PathBuf>,
    /// Other replicas of this server, as host:port separated by commas; this one may be among them
    #[arg(long, env = "GANTRY_PEERS", value_name = "ADDRESSES")]
    peers: Option<String>,
    /// This replica's name, which no other has [default: the machine's name]
    #[arg(long, env = "GANTRY_REPLICA", value_name = "NAME")]
    replica: Option<String>,
    /// What to log, such as info or gantry=debug [default: info]
    #[arg(long, env = "GANTRY_LOG", value_name = "FILTER")]
    log: Option<String>,
}

/// Everything the server needs to know before it starts.
#[derive(Debug)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Folder of everything that lasts.
    pub data_dir: PathBuf,
    /// The admin key of the environment.
    pub api_key: Option<SecretString>,
    /// Who gets in, and how much of the server one of them may hold.
    pub access: AccessConfig,
    /// Host name of the API.
    pub domain: String,
    /// Deployed programs are served below this host name.
    pub app_domain: String,
    /// Origins besides its own that may call the API.
    pub cors_origins: Vec<Origin>,
    /// The name server that is asked whose a domain is; `None`: the machine's own.
    pub nameserver: Option<SocketAddr>,
    /// Refuse to start with a weaker sandbox.
    pub require_sandbox: bool,
    /// Test runs may use the network.
    pub allow_network: bool,
    /// The kernel logs each system call that user code is refused.
    pub log_refused: bool,
    /// Where what programs depend on may be installed from.
    pub packages: Packages,
    /// Runs at one time.
    pub max_runs: usize,
    /// Most submissions of a user that are under way at one time.
    pub max_waiting: usize,
    /// Most bytes that these keep in memory.
    pub max_waiting_bytes: usize,
    /// Most repls of a user that run at one time.
    pub max_repls: Option<usize>,
    /// Most calls of module functions of one user at one time.
    pub max_calls: usize,
    /// Most pods of all modules of one user.
    pub max_module_pods: u32,
    /// How long nobody may call a module before it is stopped.
    pub module_idle: Option<Duration>,
    /// A repl that nobody has used for so long is stopped until the next request.
    pub idle_stop: Option<Duration>,
    /// How long a release that is replaced may take to answer what it was asked, and any to end after SIGTERM.
    pub drain: Duration,
    /// Most bytes of the journal.
    pub journal_bytes: u64,
    /// How long the ids of ended submissions are remembered.
    pub remember: Duration,
    /// The most a submission may ask for.
    pub maximum_limits: Limits,
    /// How much of this machine's disk is whose.
    pub disk: DiskBounds,
    /// The `gantry-runner` program.
    pub runner: PathBuf,
    /// What owns sandboxes and releases.
    pub platform: PlatformConfig,
    /// Other replicas.
    pub peers: PeersConfig,
    /// The log filter.
    pub log: String,
}

/// Other replicas of this server.
#[derive(Debug)]
pub struct PeersConfig {
    /// This one's name.
    pub replica: String,
    /// `host:port` of each; this one may be among them.
    pub addresses: Vec<String>,
    /// The secret they know each other by.
    pub key: Option<SecretString>,
}

/// The secrets of the environment: never flags, because every process of the machine can read those.
#[derive(Debug, Default)]
pub struct Secrets {
    /// `API_KEY`: an admin key.
    pub api_key: Option<SecretString>,
    /// `GANTRY_PEER_KEY`: what replicas know each other by.
    pub peer_key: Option<SecretString>,
}

impl Secrets {
    /// Those that are set and not empty.
    pub fn from_environment() -> Self {
        let secret = |name| {
            let value = std::env::var(name).ok();
            value
                .filter(|text| !text.is_empty())
                .map(SecretString::from)
        };
        Self {
            api_key: secret("API_KEY"),
            peer_key: secret("GANTRY_PEER_KEY"),
        }
    }
}

/// What owns sandboxes and releases.
#[derive(Debug)]
pub enum PlatformConfig {
    /// This machine.
    Local,
    /// A cluster.
    Kubernetes(Box<ClusterConfig>),
}

/// A browser's origin: scheme, host and port, as it stands in the `Origin` header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `http://` or `https://`, host, port when it is not the scheme's own.
    pub text: String,
    /// Host and port as a `Host` header has them.
    pub authority: String,
}

impl Origin {
    /// How it is spoken to.
    pub fn scheme(&self) -> Scheme {
        match self.text.starts_with("https://") {
            true => Scheme::Https,
            false => Scheme::Http,
        }
    }

    /// Its port, when it is not the scheme's own.
    pub fn port(&self) -> Option<u16> {
        let (_, port) = self.authority.rsplit_once(':')?;
        port.parse().ok()
    }
}

impl FromStr for Origin {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let uri: axum::http::Uri = text.parse().map_err(|_| "not a URL".to_owned())?;
        let scheme = uri.scheme_str().unwrap_or_default();
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let bare = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
        if !["http", "https"].contains(&scheme) || authority.is_empty() || !bare {
            return Err("not scheme://host[:port]".to_owned());
        }
        if authority.contains('@') || authority.contains('*') {
            return Err("names are taken as they stand, without patterns".to_owned());
        }
        let authority = authority.to_ascii_lowercase();
        Ok(Self {
            text: format!("{scheme}://{authority}"),
            authority,
        })
    }
}

/// A setting that cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError {
    variable: &'static str,
    value: Option<String>,
    expected: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => {
                let value: String = value.chars().take(100).collect();
                write!(
                    f,
                    "{} is {value:?}; expected {}",
                    self.variable, self.expected
                )
            }
            None => write!(f, "{}: {}", self.variable, self.expected),
        }
    }
}

impl std::error::Error for ConfigError {}

fn wrong(variable: &'static str, value: &str, expected: impl Into<String>) -> ConfigError {
    ConfigError {
        variable,
        value: Some(value.to_owned()),
        expected: expected.into(),
    }
}

impl DataArgs {
    /// The data folder, made if it is not there, for its owner only.
    pub fn folder(&self) -> Result<PathBuf, ConfigError> {
        use std::os::unix::fs::DirBuilderExt;
        let named = self
            .data_dir
            .clone()
            .filter(|path| !path.as_os_str().is_empty());
        let folder = match named {
            Some(folder) => folder,
            None => xdg_data_folder().ok_or_else(|| ConfigError {
                variable: "GANTRY_DATA_DIR",
                value: None,
                expected: "is required: neither XDG_DATA_HOME nor HOME says where data goes"
                    .to_owned(),
            })?,
        };
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .and_then(|()| folder.canonicalize());
        made.map_err(|error| {
            let shown = folder.display().to_string();
            wrong(
                "GANTRY_DATA_DIR",
                &shown,
                format!("a folder that can be made and written ({error})"),
            )
        })
    }
}

fn xdg_data_folder() -> Option<PathBuf> {
    let absolute = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let base = absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local").join("share")))?;
    Some(base.join("gantry"))
}

impl Config {
    /// Checks every argument.
    pub fn new(args: ServeArgs, secrets: Secrets) -> Result<Self, ConfigError> {
        let platform = match given(&args.platform).unwrap_or("local") {
            "local" => PlatformConfig::Local,
            "kubernetes" => PlatformConfig::Kubernetes(Box::new(cluster(&args)?)),
            other => return Err(wrong("GANTRY_PLATFORM", other, "local or kubernetes")),
        };
        let log = given(&args.log).unwrap_or("info").to_owned();
        if let Err(error) = crate::telemetry::parse_filter(&log) {
            let expected = format!("a level or a list such as gantry=debug,info ({error:#})");
            return Err(wrong("GANTRY_LOG", &log, expected));
        }
        let access = args.access.checked(secrets.api_key.as_ref())?;
        let config = Self {
            listen: SocketAddr::new(
                parse(
                    "HOST",
                    &args.host,
                    "an IP address such as 127.0.0.1 or 0.0.0.0",
                )?
                .unwrap_or(IpAddr::from([127, 0, 0, 1])),
                parse("PORT", &args.port, "a number from 0 to 65535")?.unwrap_or(8_000),
            ),
            api_key: secrets.api_key,
            peers: peers(&args, secrets.peer_key)?,
            domain: domain(&args.domain, &access)?,
            app_domain: host_name("APP_DOMAIN", &args.app_domain, "apps.localhost")?,
            access,
            cors_origins: origins(&args.cors_origins)?,
            nameserver: nameserver(&args.nameserver)?,
            require_sandbox: switch("GANTRY_REQUIRE_SANDBOX", &args.require_sandbox)?,
            allow_network: switch("GANTRY_ALLOW_NETWORK", &args.allow_network)?,
            log_refused: switch("GANTRY_LOG_REFUSED_CALLS", &args.log_refused_calls)?,
            packages: args.packages.checked(|name| std::env::var(name).ok())?,
            max_runs: max_runs(&args.max_runs)?,
            max_waiting: max_waiting(&args.max_waiting)?,
            max_waiting_bytes: max_waiting_bytes(&args.max_waiting_bytes)?,
            max_repls: max_repls(&args.max_repls)?,
            max_calls: max_calls(&args.max_calls)?,
            max_module_pods: max_module_pods(&args.max_module_pods)?,
            journal_bytes: journal_bytes(&args.journal_bytes)?,
            remember: remember(&args.remember_days)?,
            module_idle: unused("GANTRY_MODULE_IDLE", &args.module_idle, LEAST_MODULE_IDLE)?,
            idle_stop: unused("GANTRY_IDLE_STOP", &args.idle_stop, LEAST_IDLE_STOP)?,
            drain: drain(&args.drain)?,
            maximum_limits: maximum_limits(&args)?,
            disk: disk(&args)?,
            runner: runner(args.runner)?,
            platform,
            log,
            data_dir: args.data.folder()?,
        };
        if config.domain == config.app_domain {
            let expected = "a name other than DOMAIN: programs must not share the API's origin";
            return Err(wrong("APP_DOMAIN", &config.app_domain, expected));
        }
        if let (PlatformConfig::Kubernetes(cluster), Some(_)) = (&config.platform, config.idle_stop)
            && cluster.wake_service.is_none()
        {
            return Err(ConfigError {
                variable: "GANTRY_WAKE_SERVICE",
                value: None,
                expected: "is required with GANTRY_IDLE_STOP: the Service that leads to this server, such as gantry:80, takes the requests that start an idle repl again".to_owned(),
            });
        }
        Ok(config)
    }
}

impl Config {
    /// Where repls are reached. `port` is the server's own, where it serves them itself.
    pub fn sites(&self, port: Option<u16>) -> Sites {
        let public = self.access.public_url.as_ref();
        let site = |domain: &str, scheme: Scheme| {
            let port = match public.filter(|url| url.scheme() == scheme) {
                // Where the server is reached, programs are: the same proxy is before both.
                Some(url) => url.port(),
                // The server itself speaks no TLS.
                None if scheme == Scheme::Https => None,
                None => port,
            };
            Site {
                scheme,
                authority: match port {
                    Some(port) => format!("{domain}:{port}"),
                    None => domain.to_owned(),
                },
            }
        };
        Sites {
            programs: site(&self.app_domain, self.access.app_scheme),
            runners: site(&self.domain, public.map_or(Scheme::Http, Origin::scheme)),
        }
    }
}

/// An empty variable is one that is not set: compose files pass them that way.
fn given(value: &Option<String>) -> Option<&str> {
    value
        .as_deref()
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

fn parse<T: FromStr>(
    variable: &'static str,
    value: &Option<String>,
    expected: &str,
) -> Result<Option<T>, ConfigError> {
    given(value)
        .map(|text| text.parse().map_err(|_| wrong(variable, text, expected)))
        .transpose()
}

fn switch(variable: &'static str, value: &Option<String>) -> Result<bool, ConfigError> {
    match given(value).map(str::to_ascii_lowercase).as_deref() {
        None | Some("0" | "false" | "no" | "off") => Ok(false),
        Some("1" | "true" | "yes" | "on") => Ok(true),
        Some(other) => Err(wrong(variable, other, "true or false")),
    }
}

fn host_name(
    variable: &'static str,
    value: &Option<String>,
    default: &str,
) -> Result<String, ConfigError> {
    let text = given(value).unwrap_or(default);
    let name = text.to_ascii_lowercase();
    if name.len() <= 200 && name.split('.').all(is_host_label) {
        Ok(name)
    } else {
        Err(wrong(
            variable,
            text,
            "a host name such as example.com, without scheme or port",
        ))
    }
}

/// The API's host name: the one people reach it by.
fn domain(value: &Option<String>, access: &AccessConfig) -> Result<String, ConfigError> {
    let Some(url) = &access.public_url else {
        return host_name("DOMAIN", value, "localhost");
    };
    let uri: Option<axum::http::Uri> = url.text.parse().ok();
    let host = uri.as_ref().and_then(axum::http::Uri::host);
    let host = host.unwrap_or_default().to_owned();
    if given(value).is_some_and(|domain| !domain.eq_ignore_ascii_case(&host)) {
        let expected = "a URL whose host is DOMAIN";
        return Err(wrong("PUBLIC_URL", &url.text, expected));
    }
    host_name("PUBLIC_URL", &Some(host), "")
}

/// The port of the DNS.
const DNS_PORT: u16 = 53;

fn nameserver(value: &Option<String>) -> Result<Option<SocketAddr>, ConfigError> {
    let Some(text) = given(value) else {
        return Ok(None);
    };
    let alone = text.parse().map(|ip: IpAddr| SocketAddr::new(ip, DNS_PORT));
    let address = alone.or_else(|_| text.parse());
    address.map(Some).map_err(|_| {
        let expected = "the address of a name server such as 10.96.0.10 or [fd00::53]:5353";
        wrong("GANTRY_NAMESERVER", text, expected)
    })
}

fn origins(value: &Option<String>) -> Result<Vec<Origin>, ConfigError> {
    let texts = given(value).into_iter().flat_map(|list| list.split(','));
    texts
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .map(|text| {
            text.trim_end_matches('/').parse().map_err(|why: String| {
                let expected =
                    format!("origins such as https://example.com, separated by commas ({why})");
                wrong("CORS_ORIGINS", text, expected)
            })
        })
        .collect()
}

/// A peer key that is shorter can be guessed, and whoever has it may act for everybody.
const SHORTEST_PEER_KEY: usize = 32;

fn peers(args: &ServeArgs, key: Option<SecretString>) -> Result<PeersConfig, ConfigError> {
    let texts = given(&args.peers)
        .into_iter()
        .flat_map(|list| list.split(','));
    let texts = texts.map(str::trim).filter(|text| !text.is_empty());
    let addresses: Vec<String> = texts
        .map(|text| {
            let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-.:[]".contains(&b);
            if port.parse::<u16>().is_ok() && !host.is_empty() && host.bytes().all(plain) {
                Ok(text.to_owned())
            } else {
                let expected = "addresses such as gantry-0.gantry-peers:8000, separated by commas";
                Err(wrong("GANTRY_PEERS", text, expected))
            }
        })
        .collect::<Result<_, _>>()?;
    let long = |key: &SecretString| key.expose_secret().len() >= SHORTEST_PEER_KEY;
    if !addresses.is_empty() && !key.as_ref().is_some_and(long) {
        return Err(ConfigError {
            variable: "GANTRY_PEER_KEY",
            value: None,
            expected: format!(
                "is required with GANTRY_PEERS: one secret of at least {SHORTEST_PEER_KEY} characters for all replicas"
            ),
        });
    }
    let replica = match given(&args.replica) {
        Some(name) => name.to_owned(),
        None => rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
    };
    Ok(PeersConfig {
        replica,
        addresses,
        key,
    })
}

fn max_runs(value: &Option<String>) -> Result<usize, ConfigError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runs = parse("GANTRY_MAX_RUNS", value, "a number from 1 to 1024")?;
    match runs {
        None => Ok((2 * cores).max(4)),
        Some(runs @ 1..=1_024) => Ok(runs),
        Some(runs) => Err(wrong(
            "GANTRY_MAX_RUNS",
            &runs.to_string(),
            "a number from 1 to 1024",
        )),
    }
}

/// A batch of some hundreds, or a class that shares one key, waits at the same time; ten such users fit.
const WAITING: usize = 1_000;

/// The input of one submission, 16 MiB at most, and as much again.
const WAITING_BYTES: usize = 32 << 20;

fn max_waiting(value: &Option<String>) -> Result<usize, ConfigError> {
    let expected = "a number from 1 to 10000";
    match parse("GANTRY_MAX_WAITING", value, expected)? {
        None => Ok(WAITING),
        Some(waiting @ 1..=10_000) => Ok(waiting),
        Some(waiting) => Err(wrong("GANTRY_MAX_WAITING", &waiting.to_string(), expected)),
    }
}

fn max_waiting_bytes(value: &Option<String>) -> Result<usize, ConfigError> {
    let expected = "a number of bytes from 1048576 to 268435456";
    match parse("GANTRY_MAX_WAITING_BYTES", value, expected)? {
        None => Ok(WAITING_BYTES),
        Some(bytes) if (1 << 20..=256 << 20).contains(&bytes) => Ok(bytes),
        Some(bytes) => Err(wrong(
            "GANTRY_MAX_WAITING_BYTES",
            &bytes.to_string(),
            expected,
        )),
    }
}

fn max_repls(value: &Option<String>) -> Result<Option<usize>, ConfigError> {
    let expected = "a number from 1 to 1000000";
    match parse("GANTRY_MAX_REPLS", value, expected)? {
        Some(repls @ 1..=1_000_000) => Ok(Some(repls)),
        Some(repls) => Err(wrong("GANTRY_MAX_REPLS", &repls.to_string(), expected)),
        None => Ok(None),
    }
}

/// Smaller than this, one user's large reply would be all that a journal holds.
const SMALLEST_JOURNAL: u64 = 16 << 20;

fn journal_bytes(value: &Option<String>) -> Result<u64, ConfigError> {
    let expected = "a number of bytes from 16777216 (16 MiB) to 1099511627776 (1 TiB)";
    match parse("GANTRY_JOURNAL_BYTES", value, expected)? {
        None => Ok(1 << 30),
        Some(bytes) if (SMALLEST_JOURNAL..=1 << 40).contains(&bytes) => Ok(bytes),
        Some(bytes) => Err(wrong("GANTRY_JOURNAL_BYTES", &bytes.to_string(), expected)),
    }
}

fn remember(value: &Option<String>) -> Result<Duration, ConfigError> {
    let expected = "a number of days from 1 to 3650";
    let days = match parse("GANTRY_REMEMBER_DAYS", value, expected)? {
        None => 30,
        Some(days @ 1..=3_650) => days,
        Some(days) => return Err(wrong("GANTRY_REMEMBER_DAYS", &days.to_string(), expected)),
    };
    Ok(Duration::from_secs(days * 24 * 3600))
}

fn max_calls(value: &Option<String>) -> Result<usize, ConfigError> {
    let expected = "a number from 1 to 1024";
    match parse("GANTRY_MAX_CALLS", value, expected)? {
        None => Ok(64),
        Some(calls @ 1..=1_024) => Ok(calls),
        Some(calls) => Err(wrong("GANTRY_MAX_CALLS", &calls.to_string(), expected)),
    }
}

/// Each is a process of some 40 MB that takes a processor while it starts: ninety of them kept everybody
/// else waiting for seconds.
const MODULE_PODS: u32 = 24;

fn max_module_pods(value: &Option<String>) -> Result<u32, ConfigError> {
    let expected = "a number from 1 to 10000";
    match parse("GANTRY_MAX_MODULE_PODS", value, expected)? {
        None => Ok(MODULE_PODS),
        Some(pods @ 1..=10_000) => Ok(pods),
        Some(pods) => Err(wrong("GANTRY_MAX_MODULE_PODS", &pods.to_string(), expected)),
    }
}

/// Less, and a module would be started and stopped more than it is called.
const LEAST_MODULE_IDLE: Duration = Duration::from_secs(10);

/// What a repl starts has come up by then.
const LEAST_IDLE_STOP: Duration = Duration::from_secs(1);

/// A length of time, such as `30m`.
fn time(text: &str) -> Option<Duration> {
    let span: jiff::Span = text.parse().ok()?;
    let days = jiff::SpanRelativeTo::days_are_24_hours();
    Duration::try_from(span.to_duration(days).ok()?).ok()
}

/// Ten seconds are what many a server needs to answer its last requests.
const DRAIN: Duration = Duration::from_secs(10);

/// Longer, and whoever stops a repl waits for minutes.
const MOST_DRAIN: Duration = Duration::from_secs(300);

fn drain(value: &Option<String>) -> Result<Duration, ConfigError> {
    let Some(text) = given(value) else {
        return Ok(DRAIN);
    };
    let whole = |time: &Duration| time.subsec_nanos() == 0 && *time <= MOST_DRAIN;
    time(text).filter(whole).ok_or_else(|| {
        let expected = "whole seconds from 0s to 300s, such as 10s";
        wrong("GANTRY_DRAIN", text, expected)
    })
}

/// After how long without use something is stopped; `None`: never.
fn unused(
    variable: &'static str,
    value: &Option<String>,
    least: Duration,
) -> Result<Option<Duration>, ConfigError> {
    let text = match given(value) {
        None | Some("off") => return Ok(None),
        Some(text) => text,
    };
    let time = time(text);
    let most = Duration::from_secs(365 * 24 * 60 * 60);
    match time.filter(|time| (least..=most).contains(time)) {
        Some(time) => Ok(Some(time)),
        None => {
            let least = least.as_secs();
            let expected = format!("off, or a time from {least}s to 365d, such as 30m or 2h");
            Err(wrong(variable, text, expected))
        }
    }
}

/// An operator may lower what a submission may ask for, not raise it: the rest of the system is
/// measured and bounded for these maxima.
fn maximum_limits(args: &ServeArgs) -> Result<Limits, ConfigError> {
    let lower = |variable: &'static str, value: &Option<String>, maximum: u64| {
        let expected = format!("a number from 1 to {maximum}");
        match parse(variable, value, &expected)? {
            None => Ok(maximum),
            Some(limit) if (1..=maximum).contains(&limit) => Ok(limit),
            Some(limit) => Err(wrong(variable, &limit.to_string(), expected)),
        }
    };
    let max = Limits::MAXIMUM;
    Ok(Limits {
        wall_ms: lower("GANTRY_MAX_WALL_MS", &args.max_wall_ms, max.wall_ms)?,
        cpu_ms: lower("GANTRY_MAX_CPU_MS", &args.max_cpu_ms, max.cpu_ms)?,
        memory_bytes: lower(
            "GANTRY_MAX_MEMORY_BYTES",
            &args.max_memory_bytes,
            max.memory_bytes,
        )?,
        processes: lower("GANTRY_MAX_PROCESSES", &args.max_processes, max.processes)?,
        file_bytes: lower(
            "GANTRY_MAX_FILE_BYTES",
            &args.max_file_bytes,
            max.file_bytes,
        )?,
        output_bytes: lower(
            "GANTRY_MAX_OUTPUT_BYTES",
            &args.max_output_bytes,
            max.output_bytes,
        )?,
    })
}

/// Bounds below this leave no room for a database, nor for a release.
const LEAST_DISK: u64 = 1 << 20;

fn disk(args: &ServeArgs) -> Result<DiskBounds, ConfigError> {
    let bytes = |variable: &'static str, value: &Option<String>| {
        let expected = format!("a number of bytes, at least {LEAST_DISK}");
        match parse::<u64>(variable, value, &expected)? {
            Some(bytes) if bytes < LEAST_DISK => Err(wrong(variable, &bytes.to_string(), expected)),
            bytes => Ok(bytes),
        }
    };
    let usual = DiskBounds::USUAL;
    Ok(DiskBounds {
        repl_bytes: bytes("GANTRY_MAX_REPL_DATA_BYTES", &args.max_repl_data_bytes)?
            .unwrap_or(usual.repl_bytes),
        user_bytes: bytes("GANTRY_MAX_USER_DISK_BYTES", &args.max_user_disk_bytes)?
            .unwrap_or(usual.user_bytes),
        reserve_bytes: bytes("GANTRY_DISK_RESERVE_BYTES", &args.disk_reserve_bytes)?,
    })
}

fn runner(named: Option<PathBuf>) -> Result<PathBuf, ConfigError> {
    let Some(path) = named.filter(|path| !path.as_os_str().is_empty()) else {
        // This very program, even when its file was replaced by a newer build in the meantime:
        // server and runner always speak the same frames.
        return Ok(PathBuf::from("/proc/self/exe"));
    };
    if path.is_file() {
        return Ok(path);
    }
    let expected = "a gantry-runner program, or nothing for the one built into this program";
    Err(wrong(
        "GANTRY_RUNNER",
        &path.display().to_string(),
        expected,
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::cluster::{user_quota, wake_service};
    use super::*;

    fn args() -> (tempfile::TempDir, ServeArgs) {
        use clap::{Args as _, FromArgMatches as _};
        let dir = tempfile::tempdir().unwrap();
        let runner = dir.path().join("gantry-runner");
        std::fs::write(&runner, "").unwrap();
        let command = ServeArgs::augment_args(clap::Command::new("serve"))
            .mut_args(|arg| arg.env(None::<&str>));
        let matches = command.get_matches_from(["serve"]);
        let mut args = ServeArgs::from_arg_matches(&matches).unwrap();
        args.data.data_dir = Some(dir.path().join("data"));
        args.runner = Some(runner);
        (dir, args)
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let (_dir, args) = args();
        let config = Config::new(args, Secrets::default()).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:8000");
        assert_eq!(config.domain, "localhost");
        assert_eq!(config.app_domain, "apps.localhost");
        assert_eq!(config.maximum_limits, Limits::MAXIMUM);
        assert!(config.max_runs >= 4 && !config.allow_network && !config.require_sandbox);
        assert!(config.api_key.is_none());
    }

    #[test]
    fn a_cluster_has_settings_of_its_own() {
        type Set = fn(&mut ServeArgs, Option<String>);
        let cluster = || {
            let (dir, mut args) = args();
            args.platform = Some("kubernetes".to_owned());
            (dir, args)
        };
        let (_dir, args) = cluster();
        let PlatformConfig::Kubernetes(found) =
            Config::new(args, Secrets::default()).unwrap().platform
        else {
            panic!("not the platform that was named");
        };
        assert_eq!(
            (found.namespace.as_str(), found.ingress_class.as_str()),
            ("gantry", "nginx")
        );
        assert_eq!(found.runner_image, "gantry-runner:latest");
        assert_eq!(found.database_image, "postgres:16");
        assert!(found.manifest_template.is_none());
        assert_eq!(found.clean_up, CleanUpConfig::Tell);
        assert_eq!(found.idle.as_secs(), 30 * 86_400);
        assert_eq!(found.heartbeat_late.as_secs(), 5);
        let cases: [(&str, Set, &str); 20] = [
            ("GANTRY_NAMESPACE", |a, v| a.namespace = v, "services-x"),
            ("GANTRY_NAMESPACE", |a, v| a.namespace = v, "user-x"),
            ("GANTRY_NAMESPACE", |a, v| a.namespace = v, "a.b"),
            ("INGRESS_CLASS", |a, v| a.ingress_class = v, "a b"),
            ("RUNNER_IMAGE", |a, v| a.runner_image = v, "a b"),
            ("GANTRY_CLEAN_UP", |a, v| a.clean_up = v, "yes"),
            ("GANTRY_IDLE_DAYS", |a, v| a.idle_days = v, "0"),
            ("GANTRY_HEARTBEAT_LATE", |a, v| a.heartbeat_late = v, "0"),
            (
                "GANTRY_PACKAGE_CACHE_CLASS",
                |a, v| a.package_cache_class = v,
                "a b",
            ),
            (
                "GANTRY_SHARE_STORE_KEYS",
                |a, v| a.share_store_keys = v,
                "2",
            ),
            ("GANTRY_MODULE_FORWARD", |a, v| a.module_forward = v, "2"),
            ("GANTRY_ROOT_SERVICES", |a, v| a.root_services = v, "2"),
            (
                "GANTRY_INGRESS_ADDRESSES",
                |a, v| a.ingress_addresses = v,
                "10.0.0.1/8",
            ),
            (
                "GANTRY_CLOSED_NETWORKS",
                |a, v| a.closed_networks = v,
                "203.0.113.0/24,x",
            ),
            ("GANTRY_USER_QUOTA", |a, v| a.user_quota = v, "pods"),
            ("GANTRY_USER_QUOTA", |a, v| a.user_quota = v, "pods=-1"),
            ("GANTRY_USER_QUOTA", |a, v| a.user_quota = v, "more=1"),
            (
                "GANTRY_USER_QUOTA",
                |a, v| a.user_quota = v,
                "limits.memory=8192Mi",
            ),
            (
                "GANTRY_USER_QUOTA",
                |a, v| a.user_quota = v,
                "pods=1,limits.cpu=2000m",
            ),
            (
                "MANIFEST_TEMPLATE",
                |a, v| a.manifest_template = v.map(PathBuf::from),
                "/no/such/file",
            ),
        ];
        for (variable, set, value) in cases {
            let (_dir, mut args) = cluster();
            set(&mut args, Some(value.to_owned()));
            let message = Config::new(args, Secrets::default())
                .unwrap_err()
                .to_string();
            assert!(message.starts_with(variable), "{message}");
        }
    }

    #[test]
    fn a_bad_value_is_refused_by_its_variables_name() {
        type Set = fn(&mut ServeArgs, Option<String>);
        let cases: [(&str, Set, &str); 19] = [
            ("GANTRY_MAX_WAITING", |a, v| a.max_waiting = v, "0"),
            (
                "GANTRY_MAX_WAITING_BYTES",
                |a, v| a.max_waiting_bytes = v,
                "1",
            ),
            ("HOST", |a, v| a.host = v, "localhost:80"),
            ("PORT", |a, v| a.port = v, "65536"),
            ("GANTRY_PLATFORM", |a, v| a.platform = v, "docker"),
            ("DOMAIN", |a, v| a.domain = v, "http://x"),
            ("APP_DOMAIN", |a, v| a.app_domain = v, "localhost"),
            ("CORS_ORIGINS", |a, v| a.cors_origins = v, "*"),
            (
                "GANTRY_REQUIRE_SANDBOX",
                |a, v| a.require_sandbox = v,
                "maybe",
            ),
            ("GANTRY_MAX_RUNS", |a, v| a.max_runs = v, "0"),
            ("GANTRY_MAX_REPLS", |a, v| a.max_repls = v, "0"),
            ("GANTRY_MAX_CALLS", |a, v| a.max_calls = v, "0"),
            ("GANTRY_MAX_MODULE_PODS", |a, v| a.max_module_pods = v, "0"),
            ("GANTRY_MODULE_IDLE", |a, v| a.module_idle = v, "9s"),
            ("GANTRY_NAMESERVER", |a, v| a.nameserver = v, "dns.example"),
            ("GANTRY_IDLE_STOP", |a, v| a.idle_stop = v, "30"),
            ("GANTRY_DRAIN", |a, v| a.drain = v, "6m"),
            ("GANTRY_MAX_WALL_MS", |a, v| a.max_wall_ms = v, "60001"),
            ("GANTRY_LOG", |a, v| a.log = v, "gantry=loud"),
        ];
        for (variable, set, value) in cases {
            let (_dir, mut args) = args();
            set(&mut args, Some(value.to_owned()));
            let message = Config::new(args, Secrets::default())
                .unwrap_err()
                .to_string();
            assert!(message.starts_with(variable), "{message}");
            assert!(message.contains("expected "), "{message}");
        }
    }

    #[test]
    fn bounds_are_taken_as_they_stand() {
        let bounds = user_quota(&Some(
            "pods=10, limits.memory=8Gi,requests.cpu=1500m,".to_owned(),
        ));
        let bounds: Vec<_> = bounds.unwrap().into_iter().collect();
        let expected = [
            ("limits.memory", "8Gi"),
            ("pods", "10"),
            ("requests.cpu", "1500m"),
        ];
        assert_eq!(
            bounds,
            expected.map(|(name, amount)| (name.to_owned(), amount.to_owned()))
        );
        let one = |text: &str| {
            nameserver(&Some(text.to_owned()))
                .unwrap()
                .unwrap()
                .to_string()
        };
        assert_eq!(
            (one("10.0.0.1").as_str(), one("[::1]:5353").as_str()),
            ("10.0.0.1:53", "[::1]:5353")
        );
    }

    #[test]
    fn an_idle_repl_needs_somebody_who_takes_its_requests() {
        let time = |text: &str| unused("GANTRY_IDLE_STOP", &Some(text.to_owned()), LEAST_IDLE_STOP);
        assert_eq!(time("off"), Ok(None));
        assert_eq!(time("90s"), Ok(Some(Duration::from_secs(90))));
        assert_eq!(time("1h 30m"), Ok(Some(Duration::from_secs(5_400))));
        assert_eq!(time("2d"), Ok(Some(Duration::from_secs(172_800))));
        for bad in ["0s", "500ms", "-1h", "soon", "400d"] {
            assert!(time(bad).is_err(), "{bad}");
        }
        for bad in [
            "gantry",
            "gantry:0",
            "gantry.other:80",
            ":80",
            "gantry:http",
        ] {
            assert!(wake_service(&Some(bad.to_owned())).is_err(), "{bad}");
        }
        let (_dir, mut args) = args();
        args.platform = Some("kubernetes".to_owned());
        args.idle_stop = Some("30m".to_owned());
        args.wake_service = Some("gantry:80".to_owned());
        let PlatformConfig::Kubernetes(cluster) =
            Config::new(args, Secrets::default()).unwrap().platform
        else {
            panic!("it is another platform");
        };
        let service = cluster.wake_service.unwrap();
        assert_eq!((service.name.as_str(), service.port), ("gantry", 80));
    }

    #[test]
    fn an_empty_variable_is_not_set() {
        let (_dir, mut args) = args();
        args.port = Some(String::new());
        args.cors_origins = Some(" ".to_owned());
        let config = Config::new(args, Secrets::default()).unwrap();
        assert_eq!(config.listen.port(), 8_000);
        assert!(config.api_key.is_none() && config.cors_origins.is_empty());
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let origin: Origin = "https://Example.com:8443".parse().unwrap();
        assert_eq!(origin.text, "https://example.com:8443");
        assert_eq!(origin.authority, "example.com:8443");
        for bad in [
            "example.com",
            "ftp://a",
            "http://a/b",
            "http://*.a",
            "http://u@a",
            "null",
        ] {
            assert!(bad.parse::<Origin>().is_err(), "{bad}");
        }
    }
}
