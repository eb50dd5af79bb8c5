//! What every request passes before a route sees it: Host, Origin, no key in the URL.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, Method, StatusCode, Uri, header};

use super::problem::HttpProblem;
use crate::config::{Config, Origin};
use crate::model::{Problem, ReplId};

/// Query names that people put keys into. A URL ends up in histories, logs and `Referer` headers.
const SECRET_NAMES: &[&str] = &[
    "api_key",
    "apikey",
    "api-key",
    "x-api-key",
    "key",
    "token",
    "access_token",
    "bearer",
    "secret",
    "password",
];

/// Whom a request is for, by its `Host`.
#[derive(Debug, PartialEq, Eq)]
pub enum Target {
    /// Gantry itself.
    Api,
    /// A deployed program; `None` when the name cannot be a repl's.
    Program(Option<ReplId>),
    /// The runner of a repl.
    Runner(ReplId),
}

/// The hosts and origins this server answers to.
#[derive(Debug)]
pub struct Guard {
    listen: SocketAddr,
    domain: String,
    program_suffix: String,
    runner_suffix: String,
    cors_origins: Vec<Origin>,
    /// Where people reach the server, through a proxy.
    public: Option<Origin>,
}

impl Guard {
    /// From the checked configuration and the address really listened on.
    pub fn new(config: &Config, listen: SocketAddr) -> Self {
        Self {
            listen,
            domain: config.domain.clone(),
            program_suffix: format!(".{}", config.app_domain),
            runner_suffix: format!(".{}", config.domain),
            cors_origins: config.cors_origins.clone(),
            public: config.access.public_url.clone(),
        }
    }

    /// Whom the request is for, or why it is refused. Checking names keeps a foreign page from
    /// reaching this server by pointing its own DNS name here.
    pub fn target(&self, uri: &Uri, headers: &HeaderMap) -> Result<Target, HttpProblem> {
        let host = request_host(uri, headers)
            .ok_or_else(|| forbidden_host("(none, several, or another than the URL's)"))?;
        let host = host.to_ascii_lowercase();
        let (name, port) = split_port(&host).ok_or_else(|| forbidden_host(&host))?;
        if let Some(label) = name.strip_suffix(self.program_suffix.as_str()) {
            return Ok(Target::Program(label.parse().ok()));
        }
        if self.is_own(name, port) {
            return Ok(Target::Api);
        }
        let repl = name.strip_suffix(self.runner_suffix.as_str());
        match repl.and_then(|label| label.parse().ok()) {
            Some(repl) => Ok(Target::Runner(repl)),
            None => Err(forbidden_host(&host)),
        }
    }

    /// The host's name that a request is for, without its port.
    pub fn host_name(&self, uri: &Uri, headers: &HeaderMap) -> Option<String> {
        let host = request_host(uri, headers)?.to_ascii_lowercase();
        let (name, _) = split_port(&host)?;
        Some(name.trim_end_matches('.').to_owned())
    }

    fn is_own(&self, name: &str, port: Option<u16>) -> bool {
        // DOMAIN may be served through a proxy on any port.
        if name == self.domain && self.domain != "localhost" {
            return true;
        }
        let literal: Option<IpAddr> = name.trim_matches(['[', ']']).parse().ok();
        let everywhere = self.listen.ip().is_unspecified();
        // A container's port may be published under another number.
        let public = self.public.as_ref().and_then(Origin::port);
        let own_port = |port| port == self.listen.port() || Some(port) == public;
        let port_fits = everywhere || port.is_none_or(own_port);
        let name_fits = match literal {
            // An address cannot be rebound by DNS, and one that listens everywhere has many.
            Some(ip) => ip.is_loopback() || ip == self.listen.ip() || everywhere,
            None => name == "localhost",
        };
        if name_fits && port_fits {
            return true;
        }
        let authority =
            |origin: &Origin| split_port(&origin.authority).map(|(host, _)| host == name);
        self.cors_origins
            .iter()
            .any(|origin| authority(origin) == Some(true))
    }

    /// Refuses requests that another page's script sends.
    pub fn check_origin(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), HttpProblem> {
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let Some(origin) = origins.next() else {
            return Ok(());
        };
        let host = request_host(uri, headers)
            .unwrap_or_default()
            .to_ascii_lowercase();
        let allowed = origins.next().is_none()
            && origin
                .to_str()
                .ok()
                .and_then(|text| text.parse::<Origin>().ok())
                .is_some_and(|origin| {
                    // A proxy may pass the host on without its port.
                    let public = self.public.as_ref() == Some(&origin);
                    public || origin.authority == host || self.is_listed(&origin)
                });
        if allowed {
            return Ok(());
        }
        let shown: String = String::from_utf8_lossy(origin.as_bytes())
            .chars()
            .take(100)
            .collect();
        Err(HttpProblem::new(
            StatusCode::FORBIDDEN,
            Problem::new(
                "foreign_origin",
                "Requests from this origin are not allowed",
                format!("the Origin header is {shown:?}, not this server's own"),
                "Open the page from this server, or add the origin to CORS_ORIGINS",
            ),
        ))
    }

    fn is_listed(&self, origin: &Origin) -> bool {
        self.cors_origins.iter().any(|listed| listed == origin)
    }

    /// The listed origin a request comes from, for CORS headers.
    pub fn cors_origin(&self, headers: &HeaderMap) -> Option<&str> {
        let origin: Origin = headers.get(header::ORIGIN)?.to_str().ok()?.parse().ok()?;
        let listed = self.cors_origins.iter().find(|listed| **listed == origin)?;
        Some(&listed.text)
    }
}

/// Whether a request is a browser's question before the real one.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Refuses a key in the URL, so that nobody gets used to it.
pub fn check_query(uri: &Uri) -> Result<(), HttpProblem> {
    let query = uri.query().unwrap_or_default();
    let names = query
        .split('&')
        .map(|pair| pair.split('=').next().unwrap_or_default());
    for name in names {
        let name = name.to_ascii_lowercase();
        if SECRET_NAMES.contains(&name.as_str()) {
            return Err(HttpProblem::unauthorized(
                "the URL carries a key: URLs end up in histories and logs, so keys in them are \
                 never read. Use the header X-API-Key, and consider this key known to others",
            ));
        }
    }
    Ok(())
}

/// The host a request names: its one `Host` header. A client that sends an absolute URL has to name the same
/// host in both: a proxy before this server may have decided by the other one.
fn request_host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().map(|host| host.to_str());
    if hosts.next().is_some() {
        return None;
    }
    match (uri.authority(), host) {
        (None, Some(Ok(host))) => Some(host),
        (Some(url), Some(Ok(host))) => url.as_str().eq_ignore_ascii_case(host).then_some(host),
        // HTTP/1.0 has no Host.
        (Some(url), None) => Some(url.as_str()),
        (_, Some(Err(_))) | (None, None) => None,
    }
}

fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let end = authority.rfind(']').unwrap_or(0);
    match authority[end..].rfind(':') {
        None => Some((authority, None)),
        Some(colon) => {
            let (host, port) = authority.split_at(end + colon);
            Some((host, Some(port[1..].parse().ok()?)))
        }
    }
}

fn forbidden_host(host: &str) -> HttpProblem {
    let shown: String = host.chars().take(100).collect();
    HttpProblem::new(
        StatusCode::FORBIDDEN,
        Problem::new(
            "foreign_host",
            "This server does not answer to that host name",
            format!("the Host header is {shown:?}"),
            "Use the address the server printed, or set DOMAIN to the name it is reached by",
        ),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn guard(listen: &str) -> Guard {
        Guard {
            listen: listen.parse().unwrap(),
            domain: "gantry.example".to_owned(),
            program_suffix: ".apps.localhost".to_owned(),
            runner_suffix: ".gantry.example".to_owned(),
            cors_origins: vec!["https://ide.example:8443".parse().unwrap()],
            public: Some("https://localhost:4443".parse().unwrap()),
        }
    }

    fn headers(host: &str, origin: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        headers
    }

    fn target(guard: &Guard, host: &str) -> Option<Target> {
        guard
            .target(&Uri::from_static("/"), &headers(host, None))
            .ok()
    }

    #[test]
    fn only_own_names_are_answered() {
        let guard = guard("127.0.0.1:8000");
        for own in [
            "127.0.0.1:8000",
            "localhost:8000",
            "LOCALHOST:8000",
            "[::1]:8000",
            "localhost",
            "gantry.example",
            "gantry.example:443",
            "ide.example:8443",
        ] {
            assert_eq!(target(&guard, own), Some(Target::Api), "{own}");
        }
        for foreign in [
            "evil.example",
            "localhost:9000",
            "127.0.0.1.evil.example:8000",
            "10.0.0.1:8000",
            "",
            "localhost.evil.example",
            "x.localhost:8000",
            "localhost:x",
            "apps.localhost:8000",
        ] {
            assert_eq!(target(&guard, foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_program_has_its_own_host() {
        let guard = guard("127.0.0.1:8000");
        let repl = "test-prod".parse().unwrap();
        assert_eq!(
            target(&guard, "Test-Prod.apps.localhost:8000"),
            Some(Target::Program(Some(repl)))
        );
        assert_eq!(
            target(&guard, "a.b.apps.localhost"),
            Some(Target::Program(None))
        );
        assert_eq!(
            target(&guard, ".apps.localhost"),
            Some(Target::Program(None))
        );
    }

    #[test]
    fn a_runner_has_its_own_host() {
        let guard = guard("127.0.0.1:8000");
        let repl = "test-prod".parse().unwrap();
        let host = "Test-Prod.gantry.example:8000";
        assert_eq!(target(&guard, host), Some(Target::Runner(repl)));
        for foreign in [
            "a.b.gantry.example",
            ".gantry.example",
            "x_y.gantry.example",
        ] {
            assert_eq!(target(&guard, foreign), None, "{foreign}");
        }
    }

    #[test]
    fn listening_everywhere_answers_to_addresses_but_not_to_names() {
        let guard = guard("0.0.0.0:8000");
        assert_eq!(target(&guard, "10.0.0.1:9000"), Some(Target::Api));
        assert_eq!(target(&guard, "localhost:9000"), Some(Target::Api));
        assert_eq!(target(&guard, "evil.example:8000"), None);
    }

    #[test]
    fn the_port_that_people_reach_it_by_is_its_own() {
        let guard = guard("127.0.0.1:8000");
        assert_eq!(target(&guard, "localhost:4443"), Some(Target::Api));
        assert_eq!(target(&guard, "localhost:4444"), None);
    }

    #[test]
    fn foreign_origins_are_refused() {
        let guard = guard("127.0.0.1:8000");
        let ok = |host: &str, origin: Option<&str>| {
            let headers = headers(host, origin);
            guard.check_origin(&Uri::from_static("/"), &headers).is_ok()
        };
        assert!(ok("localhost:8000", None));
        assert!(ok("localhost:8000", Some("http://localhost:8000")));
        assert!(ok("localhost:8000", Some("https://ide.example:8443")));
        // As people reach the server, whatever a proxy makes of the host.
        assert!(ok("localhost", Some("https://localhost:4443")));
        for foreign in [
            "http://evil.example",
            "null",
            "http://localhost:9000",
            "http://ide.example:8443",
            "http://test-prod.apps.localhost:8000",
            "file://",
            "",
        ] {
            assert!(!ok("localhost:8000", Some(foreign)), "{foreign}");
        }
    }

    #[test]
    fn a_second_host_header_is_refused() {
        let guard = guard("127.0.0.1:8000");
        let mut headers = headers("localhost:8000", None);
        headers.append(header::HOST, "evil.example".parse().unwrap());
        assert!(guard.target(&Uri::from_static("/"), &headers).is_err());
    }

    #[test]
    fn an_absolute_url_names_the_same_host_as_the_header() {
        let guard = guard("127.0.0.1:8000");
        let target = |url: &str, host: &str| {
            let uri: Uri = url.parse().unwrap();
            guard.target(&uri, &headers(host, None)).ok()
        };
        let own = "http://LOCALHOST:8000/session";
        assert_eq!(target(own, "localhost:8000"), Some(Target::Api));
        assert_eq!(target(own, "evil.example"), None);
        assert_eq!(target(own, "ann-prod.apps.localhost:8000"), None);
        assert_eq!(target("http://evil.example/", "localhost:8000"), None);
        let uri: Uri = own.parse().unwrap();
        assert!(guard.target(&uri, &HeaderMap::new()).is_ok());
    }

    #[test]
    fn a_key_in_the_url_is_refused_and_words_like_it_are_not() {
        for bad in [
            "/x?api_key=a",
            "/x?q=1&KEY=a",
            "/x?token=",
            "/x?access_token",
        ] {
            assert!(check_query(&bad.parse().unwrap()).is_err(), "{bad}");
        }
        for good in [
            "/x",
            "/x?q=key",
            "/x?ticket=1",
            "/x?monkey=1",
            "/keys?q=api_key",
        ] {
            assert!(check_query(&good.parse().unwrap()).is_ok(), "{good}");
        }
    }
}
