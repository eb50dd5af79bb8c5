//! Where repls are reached from outside: what stands in the URLs that Gantry tells.

use super::ReplId;

/// How a place is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Without TLS.
    Http,
    /// With TLS, which a proxy before the server adds.
    Https,
}

impl Scheme {
    /// As it stands in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// Of a WebSocket in the same place.
    fn websocket(self) -> &'static str {
        match self {
            Self::Http => "ws",
            Self::Https => "wss",
        }
    }
}

/// Hosts below one domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// How they are spoken to.
    pub scheme: Scheme,
    /// The domain, and the port when it is not the scheme's own.
    pub authority: String,
}

/// Where programs and where their runners are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sites {
    /// `{repl}.{this}` is the program.
    pub programs: Site,
    /// `{repl}.{this}` is the runner, with the terminal.
    pub runners: Site,
}

impl Sites {
    /// Both without TLS.
    pub fn plain(programs: &str, runners: &str) -> Self {
        let site = |authority: &str| Site {
            scheme: Scheme::Http,
            authority: authority.to_owned(),
        };
        Self {
            programs: site(programs),
            runners: site(runners),
        }
    }

    /// The URL of the repl's program.
    pub fn program(&self, repl: &ReplId) -> String {
        let Site { scheme, authority } = &self.programs;
        format!("{}://{repl}.{authority}/", scheme.as_str())
    }

    /// The URL of the repl's terminal.
    pub fn terminal(&self, repl: &ReplId) -> String {
        let Site { scheme, authority } = &self.runners;
        format!("{}://{repl}.{authority}/", scheme.websocket())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn urls_name_the_scheme_of_their_site() {
        let repl = "shop".parse().unwrap();
        let mut sites = Sites::plain("apps.localhost:8000", "localhost:8000");
        assert_eq!(sites.program(&repl), "http://shop.apps.localhost:8000/");
        assert_eq!(sites.terminal(&repl), "ws://shop.localhost:8000/");
        sites.programs.scheme = Scheme::Https;
        sites.runners.scheme = Scheme::Https;
        assert_eq!(sites.program(&repl), "https://shop.apps.localhost:8000/");
        assert_eq!(sites.terminal(&repl), "wss://shop.localhost:8000/");
    }
}
