//! Names of container images.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name: what image registries take (255) and a digest.
const MAX_BYTES: usize = 255 + 72;

/// Longest tag that registries take.
const MAX_TAG: usize = 128;

/// Where an image without a registry in its name comes from.
const DEFAULT_REGISTRY: &str = "docker.io";

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not the name of an image: {why}")]
pub struct ImageError {
    value: String,
    why: &'static str,
}

/// The name of an image as a person writes it: `nginx`, `nginx:1.27`, `registry:5000/team/shop@sha256:…`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName(String);

impl ImageName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name with everything that is meant when it is left out: `docker.io/library/nginx:latest`.
    /// Nodes list their images by these names.
    pub fn normalized(&self) -> String {
        let (rest, digest) = match self.0.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (self.0.as_str(), None),
        };
        let (registry, path) = split_registry(rest);
        let (path, tag) = split_tag(path);
        let library = if registry.is_none() && !path.contains('/') {
            "library/"
        } else {
            ""
        };
        let registry = registry.unwrap_or(DEFAULT_REGISTRY);
        match (digest, tag) {
            // Nodes name what is pinned without its tag.
            (Some(digest), _) => format!("{registry}/{library}{path}@{digest}"),
            (None, Some(tag)) => format!("{registry}/{library}{path}:{tag}"),
            (None, None) => format!("{registry}/{library}{path}:latest"),
        }
    }
}

/// The registry is the part before the first `/`, when it cannot be a part of the path.
fn split_registry(text: &str) -> (Option<&str>, &str) {
    match text.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            (Some(first), rest)
        }
        _ => (None, text),
    }
}

fn split_tag(path: &str) -> (&str, Option<&str>) {
    match path.rsplit_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (path, None),
    }
}

fn check(text: &str) -> Result<(), &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > MAX_BYTES {
        return Err("it is too long");
    }
    let rest = match text.split_once('@') {
        None => text,
        Some((rest, digest)) => {
            let hex = digest.strip_prefix("sha256:");
            let whole = hex.is_some_and(|hex| {
                hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            });
            if !whole {
                return Err("after '@' comes sha256: and 64 digits of 0-9 and a-f");
            }
            rest
        }
    };
    let (registry, path) = split_registry(rest);
    if let Some(registry) = registry {
        let (host, port) = match registry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (registry, None),
        };
        let label = |label: &str| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !host.split('.').all(label) || port.is_some_and(|port| port.parse::<u16>().is_err()) {
            return Err("its registry is not a host name with a port");
        }
    }
    let (path, tag) = split_tag(path);
    let good_tag = |tag: &str| {
        (1..=MAX_TAG).contains(&tag.len())
            && !tag.starts_with(['.', '-'])
            && tag
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    if tag.is_some_and(|tag| !good_tag(tag)) {
        return Err("a tag is 1 to 128 letters, digits, '_', '.' and '-'");
    }
    if !path.split('/').all(is_component) {
        return Err(
            "its path is a-z and 0-9, with single '.', '_' and '-' between them and '/' between parts",
        );
    }
    Ok(())
}

/// Letters and digits, with separators between them: `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let known = text.bytes().all(|b| alphanumeric(b) || b"._-".contains(&b));
    let ends = text.bytes().next().is_some_and(alphanumeric)
        && text.bytes().next_back().is_some_and(alphanumeric);
    let separators = text.split(|c: char| c.is_ascii_alphanumeric());
    known
        && ends
        && separators
            .filter(|separator| !separator.is_empty())
            .all(|separator| {
                matches!(separator, "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
            })
}

impl FromStr for ImageName {
    type Err = ImageError;
    fn from_str(text: &str) -> Result<Self, ImageError> {
        check(text)
            .map(|()| Self(text.to_owned()))
            .map_err(|why| ImageError {
                value: text.chars().take(80).collect(),
                why,
            })
    }
}

impl TryFrom<String> for ImageName {
    type Error = ImageError;
    fn try_from(text: String) -> Result<Self, ImageError> {
        text.parse()
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> String {
        name.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn names_mean_what_registries_take_them_for() {
        for (text, whole) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("team/shop", "docker.io/team/shop:latest"),
            ("localhost/a:b", "localhost/a:b"),
            ("registry:5000/a/b__c:V_1", "registry:5000/a/b__c:V_1"),
            ("ghcr.io/a/b-c", "ghcr.io/a/b-c:latest"),
        ] {
            assert_eq!(text.parse::<ImageName>().unwrap().normalized(), whole);
        }
        let pinned: ImageName = format!("nginx:1@{DIGEST}").parse().unwrap();
        assert_eq!(
            pinned.normalized(),
            format!("docker.io/library/nginx@{DIGEST}")
        );
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(400);
        for bad in [
            "",
            " ",
            "Nginx",
            "nginx:",
            "nginx:-a",
            "a//b",
            "/a",
            "a/",
            "a b",
            "a\n",
            "a:b:c",
            "a@b",
            "a@sha256:12",
            "-a",
            "a.",
            "a..b",
            "a___b",
            "http://a/b",
            "host:port/a",
            "é",
            "${x}",
            &long,
        ] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad:?}");
        }
    }
}
