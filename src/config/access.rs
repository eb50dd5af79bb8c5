//! Who gets in and how much of the server one of them may hold: connections, sessions, names.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use clap::Args;
use secrecy::{ExposeSecret, SecretString};

use super::cluster::networks;
use super::{ConfigError, Origin, given, parse, switch, wrong};
use crate::model::{Network, Scheme};

/// Most characters of an admin key in the environment that could be found by trying.
const WEAK_KEY: usize = 15;

/// Names that no program gets when nothing else is set: a person who sees one of them in a URL takes the
/// program for a part of the installation, and several are names of Gantry's own services.
const RESERVED_NAMES: &str = "admin,api,app,apps,auth,autoconfig,autodiscover,cdn,console,dashboard,docs,elasticsearch,\
     ftp,gantry,git,grafana,grpc,health,help,imap,isatap,kibana,kubernetes,localhost,login,mail,metrics,mx,ns,ns1,ns2,\
     oauth,pop,prometheus,proxy,registry,root,s3,signin,smtp,ssh,sso,static,status,storage,support,system,webmail,\
     wpad,www";

/// Most entries of `GANTRY_RESERVED_NAMES`.
const MAX_RESERVED: usize = 1_000;

/// Arguments about access.
#[derive(Debug, Default, Args)]
pub struct AccessArgs {
    /// Where people reach the server, such as https://gantry.example.com. With https the session cookie is
    /// Secure and named __Host-gantry_session [default: http, and DOMAIN]
    #[arg(long, env = "PUBLIC_URL", value_name = "URL")]
    public_url: Option<String>,
    /// How people reach programs: http or https, which a proxy before the server speaks [default: as PUBLIC_URL]
    #[arg(long, env = "APP_SCHEME", value_name = "SCHEME")]
    app_scheme: Option<String>,
    /// Proxies whose X-Forwarded- headers are believed, as addresses or networks separated by commas; programs get
    /// them from nobody else [default: none]
    #[arg(long, env = "GANTRY_TRUSTED_PROXIES", value_name = "NETWORKS")]
    trusted_proxies: Option<String>,
    /// Take an API_KEY of fewer than 16 characters
    #[arg(long, env = "GANTRY_ALLOW_WEAK_KEY", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    allow_weak_key: Option<String>,
    /// Second address, as ADDRESS:PORT, that answers /healthz and /readyz only, whatever goes on at the first
    /// [default: none]
    #[arg(long, env = "GANTRY_HEALTH_LISTEN", value_name = "ADDRESS")]
    health_listen: Option<String>,
    /// Connections from one address that carry no key. Behind a proxy all clients have its address [default: 512]
    #[arg(
        long,
        env = "GANTRY_MAX_CONNECTIONS_PER_ADDRESS",
        value_name = "NUMBER"
    )]
    max_connections_per_address: Option<String>,
    /// Connections of one user's key, WebSockets included; an admin's are not bounded [default: 128]
    #[arg(long, env = "GANTRY_MAX_CONNECTIONS_PER_KEY", value_name = "NUMBER")]
    max_connections_per_key: Option<String>,
    /// Requests to one repl's program that the proxy has under way, WebSockets included [default: 256]
    #[arg(long, env = "GANTRY_MAX_CONNECTIONS_PER_REPL", value_name = "NUMBER")]
    max_connections_per_repl: Option<String>,
    /// Browsers signed in with one key; one more signs the oldest of them out [default: 50]
    #[arg(long, env = "GANTRY_MAX_SESSIONS", value_name = "NUMBER")]
    max_sessions: Option<String>,
    /// Names of repls that one user may have, whether they run or not [default: 200]
    #[arg(long, env = "GANTRY_MAX_NAMES", value_name = "NUMBER")]
    max_names: Option<String>,
    /// Names that no repl can take, separated by commas, in the place of the built-in list (kibana, api, www,
    /// localhost and others); none: every name can be taken
    #[arg(long, env = "GANTRY_RESERVED_NAMES", value_name = "NAMES")]
    reserved_names: Option<String>,
}

/// Who gets in, checked.
#[derive(Debug, Clone)]
pub struct AccessConfig {
    /// Where people reach the server.
    pub public_url: Option<Origin>,
    /// How people reach programs.
    pub app_scheme: Scheme,
    /// Proxies that say truly who asks.
    pub trusted_proxies: Vec<Network>,
    /// Where health is answered besides the server's own address.
    pub health_listen: Option<SocketAddr>,
    /// Most connections from one address that carry no key.
    pub connections_per_address: usize,
    /// Most connections of one user's key.
    pub connections_per_key: usize,
    /// Most requests to one repl's program under way.
    pub connections_per_repl: usize,
    /// Most sessions of one key.
    pub sessions_per_key: usize,
    /// Most names of one user.
    pub names_per_user: usize,
    /// Names nobody gets.
    pub reserved_names: BTreeSet<String>,
}

impl AccessConfig {
    /// Whether browsers reach the server over TLS.
    pub fn is_secure(&self) -> bool {
        let url = self.public_url.as_ref();
        url.is_some_and(|url| url.scheme() == Scheme::Https)
    }
}

impl AccessArgs {
    pub(super) fn checked(
        &self,
        api_key: Option<&SecretString>,
    ) -> Result<AccessConfig, ConfigError> {
        self.check_key(api_key)?;
        let expected = "an address with a port, such as 0.0.0.0:8001";
        let public_url = self.public_url()?;
        Ok(AccessConfig {
            app_scheme: self.app_scheme(public_url.as_ref())?,
            public_url,
            trusted_proxies: networks("GANTRY_TRUSTED_PROXIES", &self.trusted_proxies)?,
            health_listen: parse("GANTRY_HEALTH_LISTEN", &self.health_listen, expected)?,
            connections_per_address: number(
                "GANTRY_MAX_CONNECTIONS_PER_ADDRESS",
                &self.max_connections_per_address,
                512,
            )?,
            connections_per_key: number(
                "GANTRY_MAX_CONNECTIONS_PER_KEY",
                &self.max_connections_per_key,
                128,
            )?,
            connections_per_repl: number(
                "GANTRY_MAX_CONNECTIONS_PER_REPL",
                &self.max_connections_per_repl,
                256,
            )?,
            sessions_per_key: number("GANTRY_MAX_SESSIONS", &self.max_sessions, 50)?,
            names_per_user: number("GANTRY_MAX_NAMES", &self.max_names, 200)?,
            reserved_names: self.reserved()?,
        })
    }

    fn check_key(&self, api_key: Option<&SecretString>) -> Result<(), ConfigError> {
        let weak = |key: &SecretString| key.expose_secret().chars().count() <= WEAK_KEY;
        let allowed = switch("GANTRY_ALLOW_WEAK_KEY", &self.allow_weak_key)?;
        if allowed || !api_key.is_some_and(weak) {
            return Ok(());
        }
        Err(ConfigError {
            variable: "API_KEY",
            value: None,
            expected: format!(
                "is an admin key of fewer than {} characters, which can be found by trying; set a longer one, for example the output of `openssl rand -hex 24`, or allow it with --allow-weak-key",
                WEAK_KEY + 1
            ),
        })
    }

    fn public_url(&self) -> Result<Option<Origin>, ConfigError> {
        let Some(text) = given(&self.public_url) else {
            return Ok(None);
        };
        text.trim_end_matches('/')
            .parse()
            .map(Some)
            .map_err(|why: String| {
                let expected = format!("a URL such as https://gantry.example.com ({why})");
                wrong("PUBLIC_URL", text, expected)
            })
    }

    /// A page that is reached by https can show no program that is not.
    fn app_scheme(&self, public_url: Option<&Origin>) -> Result<Scheme, ConfigError> {
        let given = given(&self.app_scheme).map(str::to_ascii_lowercase);
        match given.as_deref() {
            Some("http") => Ok(Scheme::Http),
            Some("https") => Ok(Scheme::Https),
            Some(other) => Err(wrong("APP_SCHEME", other, "http or https")),
            None => Ok(public_url.map_or(Scheme::Http, Origin::scheme)),
        }
    }

    fn reserved(&self) -> Result<BTreeSet<String>, ConfigError> {
        const VARIABLE: &str = "GANTRY_RESERVED_NAMES";
        let text = given(&self.reserved_names).unwrap_or(RESERVED_NAMES);
        if text == "none" {
            return Ok(BTreeSet::new());
        }
        let names = text.split(',').map(str::trim);
        let names: BTreeSet<String> = names
            .filter(|name| !name.is_empty())
            .map(str::to_ascii_lowercase)
            .collect();
        if let Some(wrongly) = names.iter().find(|name| !crate::model::is_host_label(name)) {
            let expected = "names such as kibana,www with commas between them, or none";
            return Err(wrong(VARIABLE, wrongly, expected));
        }
        if names.len() > MAX_RESERVED {
            let expected = format!("at most {MAX_RESERVED} names");
            return Err(wrong(VARIABLE, &names.len().to_string(), expected));
        }
        Ok(names)
    }
}

fn number(
    variable: &'static str,
    value: &Option<String>,
    default: usize,
) -> Result<usize, ConfigError> {
    let expected = "a number from 1 to 1000000";
    match parse(variable, value, expected)? {
        None => Ok(default),
        Some(number @ 1..=1_000_000) => Ok(number),
        Some(number) => Err(wrong(variable, &number.to_string(), expected)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn a_short_key_is_refused_unless_it_is_allowed() {
        let key = |text: &str| SecretString::from(text.to_owned());
        let args = AccessArgs::default();
        let refused = args.checked(Some(&key("fifteen-letters"))).unwrap_err();
        assert!(refused.to_string().starts_with("API_KEY"), "{refused}");
        assert!(!refused.to_string().contains("fifteen-letters"));
        assert!(args.checked(Some(&key("sixteen-letters-"))).is_ok());
        assert!(args.checked(None).is_ok());
        let allowed = AccessArgs {
            allow_weak_key: some("true"),
            ..AccessArgs::default()
        };
        assert!(allowed.checked(Some(&key("short"))).is_ok());
    }

    #[test]
    fn reserved_names_are_the_built_in_ones_or_those_given() {
        let usual = AccessArgs::default().checked(None).unwrap().reserved_names;
        for name in ["kibana", "api", "www", "localhost"] {
            assert!(usual.contains(name), "{name}");
        }
        assert!(usual.iter().all(|name| crate::model::is_host_label(name)));
        let of = |text: &str| AccessArgs {
            reserved_names: some(text),
            ..AccessArgs::default()
        };
        let own = of("Intranet, wiki,").checked(None).unwrap().reserved_names;
        assert_eq!(own.into_iter().collect::<Vec<_>>(), ["intranet", "wiki"]);
        assert!(of("none").checked(None).unwrap().reserved_names.is_empty());
        assert!(of("a b").checked(None).is_err());
    }

    #[test]
    fn https_is_known_by_the_public_url() {
        let of = |text: &str| {
            let args = AccessArgs {
                public_url: some(text),
                ..AccessArgs::default()
            };
            args.checked(None).map(|access| access.is_secure())
        };
        assert_eq!(of("https://gantry.example/"), Ok(true));
        assert_eq!(of("http://gantry.example:8000"), Ok(false));
        for bad in [
            "gantry.example",
            "ftp://gantry.example",
            "https://gantry.example/path",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn programs_are_reached_as_the_server_is_unless_it_is_said() {
        let of = |public: &str, scheme: &str| {
            let args = AccessArgs {
                public_url: some(public),
                app_scheme: some(scheme),
                ..AccessArgs::default()
            };
            args.checked(None).map(|access| access.app_scheme)
        };
        assert_eq!(of("", ""), Ok(Scheme::Http));
        assert_eq!(of("https://gantry.example", ""), Ok(Scheme::Https));
        assert_eq!(of("https://gantry.example", "http"), Ok(Scheme::Http));
        assert_eq!(of("", "HTTPS"), Ok(Scheme::Https));
        let wrong = of("", "wss").unwrap_err().to_string();
        assert!(wrong.starts_with("APP_SCHEME"), "{wrong}");
    }

    #[test]
    fn trusted_proxies_are_networks() {
        let of = |text: &str| {
            let args = AccessArgs {
                trusted_proxies: some(text),
                ..AccessArgs::default()
            };
            args.checked(None).map(|access| access.trusted_proxies)
        };
        assert!(of("").unwrap().is_empty());
        let two = of("127.0.0.1, fd00::/8").unwrap();
        let shown: Vec<String> = two.iter().map(Network::to_string).collect();
        assert_eq!(shown, ["127.0.0.1/32", "fd00::/8"]);
        for bad in ["proxy.example", "10.0.0.1/8", "*"] {
            let wrong = of(bad).unwrap_err().to_string();
            assert!(wrong.starts_with("GANTRY_TRUSTED_PROXIES"), "{wrong}");
        }
    }

    #[test]
    fn a_bound_that_is_none_is_refused() {
        for bad in ["0", "many", "1000001"] {
            let args = AccessArgs {
                max_sessions: some(bad),
                ..AccessArgs::default()
            };
            assert!(args.checked(None).is_err(), "{bad}");
        }
    }
}
