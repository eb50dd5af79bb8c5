//! A host name of a user's own, and how it is proved to be theirs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FieldError, Problem, UserId};

/// Most domains of a repl.
pub const MAX_DOMAINS: usize = 20;

/// Longest host name (RFC 1035), so that the name of its proof is one, too.
const MAX_LENGTH: usize = 253 - PROOF_LABEL.len() - 1;

/// The label below a domain where its proof is.
const PROOF_LABEL: &str = "_gantry";

/// What a proof begins with, so that it is known for one among a name's other texts.
const PROOF_PREFIX: &str = "gantry-domain=";

/// Names that lead to no owner: those of machines and networks.
const RESERVED: [&str; 7] = [
    "localhost",
    "local",
    "internal",
    "invalid",
    "onion",
    "arpa",
    "test",
];

/// A host name, in lower case and without the last dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Domain(String);

impl Domain {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is this name or one below it.
    pub fn is_under(&self, name: &str) -> bool {
        self.0 == name
            || self
                .0
                .strip_suffix(name)
                .is_some_and(|rest| rest.ends_with('.'))
    }

    /// Where the proof is looked for: a TXT record of this name.
    pub fn proof_name(&self) -> String {
        format!("{PROOF_LABEL}.{}", self.0)
    }

    /// What is looked for there: that this user may have the domain at this installation. It need not be
    /// secret, since only the domain's owner can put it there.
    pub fn proof(&self, installation: &str, user: &UserId) -> String {
        use std::fmt::Write;
        let of = format!("{installation}\0{user}\0{}", self.0);
        let digest = Sha256::digest(of.as_bytes());
        let mut text = PROOF_PREFIX.to_owned();
        for byte in digest.iter().take(20) {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

/// Whether this may stand between the dots of a host name (RFC 1123).
pub fn is_host_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

impl FromStr for Domain {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if !name.is_ascii() {
            return Err("has letters outside ASCII; write it as it is in the DNS (xn--…)");
        }
        let last = name.rsplit('.').next().unwrap_or_default();
        // A last label of digits is an address's.
        let named = last.bytes().any(|b| b.is_ascii_alphabetic());
        if name.len() > MAX_LENGTH
            || !name.contains('.')
            || !name.split('.').all(is_host_label)
            || !named
        {
            return Err(
                "is not a host name such as shop.example.com, without scheme, port or path",
            );
        }
        if RESERVED.contains(&last) {
            return Err("is a name of machines and networks that nobody owns");
        }
        Ok(Self(name))
    }
}

impl TryFrom<String> for Domain {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> String {
        domain.0
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Domains as somebody sends them: all that a repl is to have.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainsRequest {
    /// Their names.
    pub domains: Option<Vec<String>>,
}

impl DomainsRequest {
    /// Checks every name. `taken`: hosts under which Gantry serves by itself.
    pub fn checked(self, taken: &[&str]) -> Result<Vec<Domain>, FieldError> {
        let Some(names) = self.domains else {
            return Err(FieldError::new("domains", "is required; [] removes all"));
        };
        if names.len() > MAX_DOMAINS {
            return Err(FieldError::new(
                "domains",
                format!("has more than {MAX_DOMAINS} names"),
            ));
        }
        let mut domains: Vec<Domain> = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let field = || format!("domains[{index}]");
            let domain: Domain = name
                .parse()
                .map_err(|why: &str| FieldError::new(field(), why))?;
            if taken.iter().any(|taken| domain.is_under(taken)) {
                return Err(FieldError::new(
                    field(),
                    "is among this server's own host names",
                ));
            }
            if !domains.contains(&domain) {
                domains.push(domain);
            }
        }
        Ok(domains)
    }
}

/// What is to be put into the DNS before a domain is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DomainProof {
    /// Which domain.
    pub domain: Domain,
    /// The record's name.
    pub name: String,
    /// The record's type.
    pub r#type: &'static str,
    /// The record's text.
    pub value: String,
}

/// What the one is told who comes second.
pub fn domain_taken(domain: &Domain) -> Problem {
    Problem::new(
        "domain_taken",
        format!("{domain} cannot be used"),
        "another repl has it",
        "Remove it there first, or use another name.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_domain_is_a_host_name_that_somebody_can_own() {
        let good = |text: &str| text.parse::<Domain>().map(String::from);
        assert_eq!(good("Shop.Example.COM."), Ok("shop.example.com".to_owned()));
        assert_eq!(
            good("xn--bcher-kva.example"),
            Ok("xn--bcher-kva.example".to_owned())
        );
        let label = "a".repeat(63);
        let long = [label.as_str(); 4].join(".");
        for bad in [
            "",
            ".",
            "com",
            "a..b",
            "-a.b",
            "a-.b",
            "a_b.c",
            "*.example.com",
            "http://a.b",
            "a.b:80",
            "a.b/c",
            "127.0.0.1",
            "1.2",
            "[::1]",
            "bücher.example",
            "a b.c",
            "a.b\n",
            "localhost",
            "x.localhost",
            "metadata.google.internal",
            "a.cluster.local",
            &long,
        ] {
            assert!(good(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn no_name_of_the_server_is_taken_and_none_is_there_twice() {
        let check = |names: &[&str]| {
            let domains = Some(names.iter().map(ToString::to_string).collect());
            DomainsRequest { domains }.checked(&["gantry.example", "apps.gantry.example"])
        };
        let two = check(&["A.example", "a.example.", "notgantry.example"]).unwrap();
        assert_eq!(
            two.iter().map(Domain::as_str).collect::<Vec<_>>(),
            ["a.example", "notgantry.example"]
        );
        for bad in [
            "gantry.example",
            "other-prod.apps.gantry.example",
            "API.Gantry.Example.",
        ] {
            let told = check(&["ok.example", bad]).unwrap_err();
            assert_eq!(told.field, "domains[1]", "{bad}");
        }
        assert!(check(&["a.example"; MAX_DOMAINS + 1]).is_err());
        assert!(DomainsRequest::default().checked(&[]).is_err());
    }

    #[test]
    fn a_proof_is_of_one_user_one_domain_and_one_installation() {
        let proof = |domain: &str, at: &str, user: &str| {
            domain
                .parse::<Domain>()
                .unwrap()
                .proof(at, &user.parse().unwrap())
        };
        let one = proof("a.example", "apps.here", "ann");
        assert_eq!(one, proof("A.example", "apps.here", "ann"));
        assert_eq!(one.len(), PROOF_PREFIX.len() + 40);
        for other in [
            proof("b.example", "apps.here", "ann"),
            proof("a.example", "apps.there", "ann"),
            proof("a.example", "apps.here", "bob"),
        ] {
            assert_ne!(one, other);
        }
    }
}
