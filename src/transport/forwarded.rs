//! What a program is told of a request's way: the headers that proxies pass on.
//!
//! Anybody can send them, and programs trust them. So they are taken from proxies that the operator names only, and
//! are made anew for everybody else.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::model::{Network, Scheme};

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Whose headers are trusted, and what holds without them.
#[derive(Debug)]
pub struct Forwarded {
    proxies: Vec<Network>,
    /// How programs are reached, as far as the server knows.
    scheme: Scheme,
}

impl Forwarded {
    /// With the proxies that are trusted.
    pub fn new(proxies: Vec<Network>, scheme: Scheme) -> Self {
        Self { proxies, scheme }
    }

    fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.proxies.iter().any(|network| network.contains(address))
    }

    /// Whose request it is that came from this address: each trusted proxy adds the address before it, and what
    /// stands before the first that is not trusted is what that one says of itself.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer;
        let lines = headers.get_all(FOR).iter().rev();
        let said = lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
        for text in said {
            let Some(address) = address(text).filter(|_| self.trusts(client)) else {
                break;
            };
            client = address;
        }
        client.to_canonical()
    }

    /// Puts the headers on a request that is passed on to a program.
    pub fn put_on(&self, headers: &mut HeaderMap, peer: Option<IpAddr>) {
        let client = peer.map(|peer| self.client(peer, headers));
        if !peer.is_some_and(|peer| self.trusts(peer)) {
            let said: Vec<HeaderName> = headers
                .keys()
                .filter(|name| tells_of_the_way(name))
                .cloned()
                .collect();
            for name in said {
                headers.remove(name);
            }
        }
        headers.remove(FOR);
        let client = client.map(|client| HeaderValue::from_str(&client.to_string()));
        if let Some(Ok(client)) = client {
            headers.insert(FOR, client);
        }
        let host = headers.get(HOST).or_else(|| headers.get(header::HOST));
        if let Some(host) = host.cloned() {
            headers.insert(HOST, host);
        }
        let scheme = headers.get(PROTO).and_then(first_scheme);
        let scheme = scheme.unwrap_or(self.scheme.as_str());
        headers.insert(PROTO, HeaderValue::from_static(scheme));
    }
}

/// Whether programs learn from this header who asks, and by which address.
fn tells_of_the_way(name: &HeaderName) -> bool {
    let name = name.as_str();
    name.starts_with("x-forwarded-") || ["forwarded", "x-real-ip"].contains(&name)
}

/// The scheme that the client spoke, which stands first.
fn first_scheme(value: &HeaderValue) -> Option<&'static str> {
    let text = value.to_str().ok()?.split(',').next()?.trim();
    let mut known = ["http", "https", "ws", "wss"].into_iter();
    known.find(|known| text.eq_ignore_ascii_case(known))
}

/// An address, as proxies write it: some add the port.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let with_port = || text.parse().ok().map(|socket: SocketAddr| socket.ip());
    let bare = text.trim_start_matches('[').trim_end_matches(']').parse();
    bare.ok().or_else(with_port)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn put(peer: &str, lines: &[(&'static str, &str)]) -> HeaderMap {
        let proxies = vec!["10.0.0.0/8".parse().unwrap(), "fd00::/16".parse().unwrap()];
        let mut headers = headers(lines);
        let forwarded = Forwarded::new(proxies, Scheme::Http);
        forwarded.put_on(&mut headers, Some(peer.parse().unwrap()));
        headers
    }

    const SAID: [(&str, &str); 7] = [
        ("host", "shop.apps.example"),
        ("x-forwarded-for", "203.0.113.7"),
        ("x-forwarded-host", "shop.example"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-port", "443"),
        ("x-real-ip", "203.0.113.7"),
        ("forwarded", "for=203.0.113.7"),
    ];

    #[test]
    fn a_trusted_proxy_is_believed() {
        for peer in ["10.1.2.3", "::ffff:10.1.2.3", "fd00::5"] {
            let headers = put(peer, &SAID);
            for (name, value) in SAID {
                assert_eq!(headers[name], value, "{peer} {name}");
            }
        }
        // What it says nothing of is what is known here.
        let headers = put("10.1.2.3", &[("host", "shop.apps.example")]);
        assert_eq!(headers["x-forwarded-for"], "10.1.2.3");
        assert_eq!(headers["x-forwarded-host"], "shop.apps.example");
        assert_eq!(headers["x-forwarded-proto"], "http");
    }

    #[test]
    fn nobody_else_is() {
        let headers = put("198.51.100.1", &SAID);
        assert_eq!(headers["x-forwarded-for"], "198.51.100.1");
        assert_eq!(headers["x-forwarded-host"], "shop.apps.example");
        assert_eq!(headers["x-forwarded-proto"], "http");
        for gone in ["x-forwarded-port", "x-real-ip", "forwarded"] {
            assert!(!headers.contains_key(gone), "{gone}");
        }
    }

    #[test]
    fn the_client_is_the_first_that_no_trusted_proxy_is() {
        let of = |lines: &[(&'static str, &str)]| put("10.1.2.3", lines)["x-forwarded-for"].clone();
        let line = |text| of(&[("x-forwarded-for", text)]);
        assert_eq!(line("6.6.6.6, 203.0.113.7"), "203.0.113.7");
        assert_eq!(line("6.6.6.6, 203.0.113.7, 10.9.9.9"), "203.0.113.7");
        assert_eq!(line("10.7.7.7,10.9.9.9"), "10.7.7.7");
        assert_eq!(line("203.0.113.7:1234"), "203.0.113.7");
        assert_eq!(line("[2001:db8::1]:99, [fd00::1]"), "2001:db8::1");
        assert_eq!(line("unknown, 10.9.9.9"), "10.9.9.9");
        assert_eq!(line(""), "10.1.2.3");
        let two = [
            ("x-forwarded-for", "6.6.6.6"),
            ("x-forwarded-for", "203.0.113.7, 10.9.9.9"),
        ];
        assert_eq!(of(&two), "203.0.113.7");
    }

    #[test]
    fn a_scheme_that_is_none_is_not_passed_on() {
        let proto =
            |text| put("10.1.2.3", &[("x-forwarded-proto", text)])["x-forwarded-proto"].clone();
        assert_eq!(proto("HTTPS, http"), "https");
        assert_eq!(proto("wss"), "wss");
        assert_eq!(proto("javascript"), "http");
    }
}
