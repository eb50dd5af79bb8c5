//! Who gets in and how much of the server one of them may hold: connections, sessions, names.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use clap::Args;
use secrecy::{ExposeSecret, SecretString};

use super::{ConfigError, Origin, given, parse, switch, wrong};

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
        url.is_some_and(|url| url.text.starts_with("https://"))
    }
}

impl AccessArgs {
    pub(super) fn checked(
        &self,
        api_key: Option<&SecretString>,
    ) -> Result<AccessConfig, ConfigError> {
        self.check_key(api_key)?;
        let expected = "an address with a port, such as 0.0.0.0:8001";
        Ok(AccessConfig {
            public_url: self.public_url()?,
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
