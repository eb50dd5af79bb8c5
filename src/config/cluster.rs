//! What only a cluster needs.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{ConfigError, ServeArgs, given, host_name, parse, switch, wrong};
use crate::model::{Network, is_host_label};

/// Each policy names every network, and the API server takes objects of limited size.
const MAX_NETWORKS: usize = 100;

/// Settings of a server whose platform is a cluster.
#[derive(Debug)]
pub struct ClusterConfig {
    /// The server's own namespace.
    pub namespace: String,
    /// The text of the named template; `None`: the one that is built in.
    pub manifest_template: Option<String>,
    /// The ingress controller's class.
    pub ingress_class: String,
    /// Where the ingress controller's requests come from when it is no pod.
    pub ingress_addresses: Vec<Network>,
    /// What user code may not reach besides what is closed everywhere.
    pub closed_networks: Vec<Network>,
    /// Services may run as root.
    pub root_services: bool,
    /// The runner image.
    pub runner_image: String,
    /// The database image.
    pub database_image: String,
    /// What is done about what nobody needs any more.
    pub clean_up: CleanUpConfig,
    /// Without use for this long, a namespace or files count as not needed.
    pub idle: Duration,
    /// A node counts as failed when its heartbeat is this late.
    pub heartbeat_late: Duration,
    /// Bounds of each user's namespace, where they are not the usual ones.
    pub quota: BTreeMap<String, String>,
    /// The storage class of what pip fetched.
    pub package_cache_class: Option<String>,
    /// Put the bucket's keys into users' namespaces.
    pub share_store_keys: bool,
    /// Reach modules' pods by port-forward only.
    pub module_forward: bool,
    /// The Service that leads to this server.
    pub wake_service: Option<ServicePort>,
}

/// What is done about what nobody needs any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CleanUpConfig {
    /// Nothing.
    Off,
    /// The log says what it is.
    Tell,
    /// It is removed.
    Remove,
}

/// A Service in the server's own namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name.
    pub name: String,
    /// Its port.
    pub port: u16,
}

/// The settings among the arguments.
pub(super) fn cluster(args: &ServeArgs) -> Result<ClusterConfig, ConfigError> {
    let namespace = host_name("GANTRY_NAMESPACE", &args.namespace, "gantry")?;
    // `user-…` and `services-…` are users' own, and a dot is not for namespaces.
    let users = ["user-", "services-"]
        .iter()
        .any(|prefix| namespace.starts_with(prefix));
    if users || namespace.contains('.') {
        let expected = "a namespace such as gantry, not starting with user- or services-";
        return Err(wrong("GANTRY_NAMESPACE", &namespace, expected));
    }
    let named = args
        .manifest_template
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty());
    let manifest_template = named.map(|path| {
        std::fs::read_to_string(path).map_err(|error| {
            let shown = path.display().to_string();
            let expected = format!("a file with manifests that can be read ({error})");
            wrong("MANIFEST_TEMPLATE", &shown, expected)
        })
    });
    Ok(ClusterConfig {
        namespace,
        manifest_template: manifest_template.transpose()?,
        ingress_class: host_name("INGRESS_CLASS", &args.ingress_class, "nginx")?,
        ingress_addresses: networks("GANTRY_INGRESS_ADDRESSES", &args.ingress_addresses)?,
        closed_networks: networks("GANTRY_CLOSED_NETWORKS", &args.closed_networks)?,
        root_services: switch("GANTRY_ROOT_SERVICES", &args.root_services)?,
        runner_image: image("RUNNER_IMAGE", &args.runner_image, "gantry-runner:latest")?,
        database_image: image("DATABASE_IMAGE", &args.database_image, "postgres:16")?,
        clean_up: match given(&args.clean_up).unwrap_or("tell") {
            "off" => CleanUpConfig::Off,
            "tell" => CleanUpConfig::Tell,
            "remove" => CleanUpConfig::Remove,
            other => return Err(wrong("GANTRY_CLEAN_UP", other, "off, tell or remove")),
        },
        idle: idle(&args.idle_days)?,
        heartbeat_late: heartbeat_late(&args.heartbeat_late)?,
        quota: user_quota(&args.user_quota)?,
        package_cache_class: storage_class(&args.package_cache_class)?,
        share_store_keys: switch("GANTRY_SHARE_STORE_KEYS", &args.share_store_keys)?,
        module_forward: switch("GANTRY_MODULE_FORWARD", &args.module_forward)?,
        wake_service: wake_service(&args.wake_service)?,
    })
}

pub(super) fn networks(
    variable: &'static str,
    value: &Option<String>,
) -> Result<Vec<Network>, ConfigError> {
    let expected = format!(
        "at most {MAX_NETWORKS} addresses or networks, separated by commas, such as 10.0.0.0/24,203.0.113.7"
    );
    let parts = given(value).into_iter().flat_map(|list| list.split(','));
    let parts = parts.map(str::trim).filter(|part| !part.is_empty());
    let found: Result<Vec<Network>, _> = parts
        .map(|part| part.parse().map_err(|_| wrong(variable, part, &expected)))
        .collect();
    match found? {
        found if found.len() <= MAX_NETWORKS => Ok(found),
        found => Err(wrong(
            variable,
            &format!("{} of them", found.len()),
            expected,
        )),
    }
}

/// Not less than a second: a busy machine's kubelet is late by as much now and then.
fn heartbeat_late(value: &Option<String>) -> Result<Duration, ConfigError> {
    let expected = "a number of seconds from 1 to 3600";
    match parse("GANTRY_HEARTBEAT_LATE", value, expected)? {
        None => Ok(Duration::from_secs(5)),
        Some(seconds @ 1..=3_600) => Ok(Duration::from_secs(seconds)),
        Some(seconds) => {
            let seconds: u64 = seconds;
            Err(wrong(
                "GANTRY_HEARTBEAT_LATE",
                &seconds.to_string(),
                expected,
            ))
        }
    }
}

/// Not less than a day: whoever goes home in the evening finds everything in the morning.
fn idle(value: &Option<String>) -> Result<Duration, ConfigError> {
    let expected = "a number of days from 1 to 3650";
    let days = match parse("GANTRY_IDLE_DAYS", value, expected)? {
        None => 30,
        Some(days @ 1..=3_650) => days,
        Some(days) => return Err(wrong("GANTRY_IDLE_DAYS", &days.to_string(), expected)),
    };
    Ok(Duration::from_secs(days * 24 * 60 * 60))
}

fn image(
    variable: &'static str,
    value: &Option<String>,
    default: &str,
) -> Result<String, ConfigError> {
    let text = given(value).unwrap_or(default);
    let known = |b: u8| b.is_ascii_alphanumeric() || b"-_./:@".contains(&b);
    if text.len() <= 512 && text.bytes().all(known) {
        Ok(text.to_owned())
    } else {
        let expected = "an image such as registry.example/name:tag";
        Err(wrong(variable, text, expected))
    }
}

fn storage_class(value: &Option<String>) -> Result<Option<String>, ConfigError> {
    let named = given(value).map(|_| host_name("GANTRY_PACKAGE_CACHE_CLASS", value, ""));
    named.transpose()
}

pub(super) fn wake_service(value: &Option<String>) -> Result<Option<ServicePort>, ConfigError> {
    let Some(text) = given(value) else {
        return Ok(None);
    };
    let parts = text.split_once(':');
    let found = parts.and_then(|(name, port)| {
        let port = port.parse().ok().filter(|port| *port > 0)?;
        let name = is_host_label(name).then(|| name.to_owned())?;
        Some(ServicePort { name, port })
    });
    let expected = "a Service's name and port in GANTRY_NAMESPACE, such as gantry:80";
    found
        .map(Some)
        .ok_or_else(|| wrong("GANTRY_WAKE_SERVICE", text, expected))
}

/// What can be bounded of a user's namespace.
const BOUNDED: [&str; 9] = [
    "pods",
    "requests.cpu",
    "requests.memory",
    "limits.cpu",
    "limits.memory",
    "persistentvolumeclaims",
    "requests.storage",
    "services",
    "secrets",
];

pub(super) fn user_quota(value: &Option<String>) -> Result<BTreeMap<String, String>, ConfigError> {
    let bounds = given(value).into_iter().flat_map(|list| list.split(','));
    let bounds = bounds.map(str::trim).filter(|bound| !bound.is_empty());
    bounds
        .map(|bound| {
            let (name, amount) = bound.split_once('=').unwrap_or((bound, ""));
            if BOUNDED.contains(&name) && is_shortest(amount) {
                return Ok((name.to_owned(), amount.to_owned()));
            }
            let expected = format!(
                "bounds such as pods=10,limits.memory=8Gi, each amount in its shortest form; known are {}",
                BOUNDED.join(", ")
            );
            Err(wrong("GANTRY_USER_QUOTA", bound, expected))
        })
        .collect()
}

/// Whether this is an amount as the API server writes it: another form of the same would look like
/// somebody's edit.
fn is_shortest(amount: &str) -> bool {
    let digits = amount.len()
        - amount
            .trim_start_matches(|c: char| c.is_ascii_digit())
            .len();
    let (number, unit) = amount.split_at(digits);
    let next = match unit {
        "" | "m" | "k" => 1_000,
        "Ki" | "Mi" | "Gi" | "Ti" => 1_024,
        _ => return false,
    };
    let plain = !(number.len() > 1 && number.starts_with('0'));
    number
        .parse::<u32>()
        .is_ok_and(|n| plain && (n % next != 0 || amount == "0"))
}
