//! Where Elasticsearch is and how to get in.

use std::fmt;

use elasticsearch::auth::Credentials;
use elasticsearch::cert::Certificate;
use elasticsearch::http::Url;
use secrecy::{ExposeSecret, SecretString};

use crate::model::Problem;

/// How to get in.
pub(super) enum Login {
    /// No security, or a proxy before it that adds its own.
    None,
    /// A name and a password.
    Basic {
        /// The name.
        user: String,
        /// The password.
        password: SecretString,
    },
    /// An API key as Elasticsearch gives it: `encoded`, or `id:api_key`.
    ApiKey(SecretString),
}

impl Login {
    /// As the client takes it.
    pub(super) fn credentials(&self) -> Option<Credentials> {
        match self {
            Login::None => None,
            Login::Basic { user, password } => Some(Credentials::Basic(
                user.clone(),
                password.expose_secret().to_owned(),
            )),
            Login::ApiKey(key) => Some(match key.expose_secret().split_once(':') {
                Some((id, key)) => Credentials::ApiKey(id.to_owned(), key.to_owned()),
                None => Credentials::EncodedApiKey(key.expose_secret().to_owned()),
            }),
        }
    }
}

/// Everything about the server that comes from outside.
pub struct ElasticsearchSettings {
    /// Without name and password.
    pub(super) url: Url,
    pub(super) login: Login,
    /// How names of indices, templates and policies begin.
    pub(super) prefix: String,
    /// Certificates that are trusted besides the usual ones, as PEM.
    pub(super) authorities: Option<Vec<u8>>,
}

impl fmt::Debug for ElasticsearchSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ElasticsearchSettings")
            .field("url", &self.url.as_str())
            .finish_non_exhaustive()
    }
}

impl ElasticsearchSettings {
    /// What these variables say; `None` when there is no `ELASTICSEARCH_HOST`. They come from the
    /// environment alone, because every process of a machine can read another's arguments.
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, Problem> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let Some(host) = set("ELASTICSEARCH_HOST") else {
            return Ok(None);
        };
        let (url, in_url) = address(host.trim())?;
        let login = match (
            set("ELASTICSEARCH_API_KEY"),
            set("ELASTICSEARCH_USERNAME"),
            set("ELASTICSEARCH_PASSWORD"),
            in_url,
        ) {
            (Some(key), None, None, Login::None) => api_key(key.trim())?,
            (None, Some(user), Some(password), Login::None) => Login::Basic {
                user,
                password: password.into(),
            },
            (None, None, None, in_url) => in_url,
            (None, Some(_), None, _) | (None, None, Some(_), _) => {
                return Err(wrong(
                    "ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD",
                    "only one of them is set",
                    "Set both, or neither",
                ));
            }
            _ => {
                return Err(wrong(
                    "ELASTICSEARCH_API_KEY",
                    "a name and password are set as well",
                    "Set either ELASTICSEARCH_API_KEY or ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD",
                ));
            }
        };
        let authorities = set("ELASTICSEARCH_CA").map(|file| read_authorities(file.trim()));
        let prefix = set("ELASTICSEARCH_INDEX_PREFIX").unwrap_or_else(|| "gantry".to_owned());
        Ok(Some(Self {
            url,
            login,
            prefix: index_prefix(prefix.trim())?,
            authorities: authorities.transpose()?,
        }))
    }
}

fn wrong(variable: &str, cause: &str, remedy: &str) -> Problem {
    Problem::new(
        "elasticsearch_config",
        format!("{variable} cannot be used"),
        cause,
        remedy,
    )
}

/// The server's address, and the name and password that may stand in it.
fn address(host: &str) -> Result<(Url, Login), Problem> {
    let refuse = |cause: &str| {
        wrong(
            "ELASTICSEARCH_HOST",
            cause,
            "Set one address such as http://elasticsearch:9200",
        )
    };
    let mut url: Url = host.parse().map_err(|_| refuse("it is not a URL"))?;
    if !["http", "https"].contains(&url.scheme()) || url.host_str().is_none() {
        return Err(refuse("it is not a URL of http or https"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(refuse("it has a query or a fragment"));
    }
    let user = url.username().to_owned();
    let decoded = |text: &str| {
        percent_encoding::percent_decode_str(text)
            .decode_utf8_lossy()
            .into_owned()
    };
    let login = match (user.as_str(), url.password()) {
        ("", None) => Login::None,
        (user, password) => Login::Basic {
            user: decoded(user),
            password: decoded(password.unwrap_or_default()).into(),
        },
    };
    url.set_username("")
        .and_then(|()| url.set_password(None))
        .map_err(|()| refuse("name and password cannot be taken out of it"))?;
    Ok((url, login))
}

/// A key that can stand in a header: the client would panic at any other.
fn api_key(key: &str) -> Result<Login, Problem> {
    let known = |b: u8| b.is_ascii_alphanumeric() || b"+/=_-:".contains(&b);
    if key.bytes().all(known) {
        return Ok(Login::ApiKey(key.into()));
    }
    Err(wrong(
        "ELASTICSEARCH_API_KEY",
        "it has characters that no key has",
        "Set the value that Elasticsearch calls `encoded`, or `id:api_key`",
    ))
}

/// The beginning of an index's name, without what Elasticsearch forbids there or reads as a pattern.
fn index_prefix(prefix: &str) -> Result<String, Problem> {
    let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let begins = prefix.bytes().next().is_some_and(|b| b != b'-');
    if begins && prefix.len() <= 50 && prefix.bytes().all(known) {
        return Ok(prefix.to_owned());
    }
    Err(wrong(
        "ELASTICSEARCH_INDEX_PREFIX",
        "it is not made of lower-case letters, digits and dashes, at most 50, or begins with a dash",
        "Set a name such as gantry, another for each Gantry that shares the cluster",
    ))
}

fn read_authorities(file: &str) -> Result<Vec<u8>, Problem> {
    let refuse = |cause: String| {
        wrong(
            "ELASTICSEARCH_CA",
            &format!("{file}: {cause}"),
            "Set a file with the authority's certificate as PEM",
        )
    };
    let pem = std::fs::read(file).map_err(|error| refuse(error.to_string()))?;
    Certificate::from_pem(&pem).map_err(|error| refuse(error.to_string()))?;
    Ok(pem)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Option<ElasticsearchSettings>, Problem> {
        ElasticsearchSettings::from_variables(|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nothing_set_is_no_elasticsearch() {
        assert!(settings(&[]).unwrap().is_none());
        assert!(settings(&[("ELASTICSEARCH_HOST", " ")]).unwrap().is_none());
    }

    #[test]
    fn each_way_in_is_taken_and_none_is_printed() {
        let host = ("ELASTICSEARCH_HOST", "https://es:9200/prefix");
        let ways: [&[(&str, &str)]; 4] = [
            &[host, ("ELASTICSEARCH_API_KEY", "aWQ6c2VjcmV0")],
            &[host, ("ELASTICSEARCH_API_KEY", "id:secret")],
            &[
                host,
                ("ELASTICSEARCH_USERNAME", "ada"),
                ("ELASTICSEARCH_PASSWORD", "secret"),
            ],
            &[("ELASTICSEARCH_HOST", "https://ada:s%65cret@es:9200/prefix")],
        ];
        let found = ways.map(|way| {
            let settings = settings(way).unwrap().unwrap();
            assert_eq!(settings.url.as_str(), "https://es:9200/prefix");
            let shown = format!("{settings:?}");
            assert!(
                !shown.contains("secret") && !shown.contains("aWQ6"),
                "{shown}"
            );
            settings.login.credentials().unwrap()
        });
        assert!(matches!(&found[0], Credentials::EncodedApiKey(key) if key == "aWQ6c2VjcmV0"));
        assert!(matches!(&found[1], Credentials::ApiKey(id, key) if id == "id" && key == "secret"));
        for basic in &found[2..] {
            assert!(
                matches!(basic, Credentials::Basic(user, password) if user == "ada" && password == "secret")
            );
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        let host = ("ELASTICSEARCH_HOST", "http://es:9200");
        let cases: [(&[(&str, &str)], &str); 10] = [
            (&[("ELASTICSEARCH_HOST", "es:9200")], "ELASTICSEARCH_HOST"),
            (&[("ELASTICSEARCH_HOST", "ftp://es")], "ELASTICSEARCH_HOST"),
            (
                &[("ELASTICSEARCH_HOST", "http://es/?a=b")],
                "ELASTICSEARCH_HOST",
            ),
            (
                &[host, ("ELASTICSEARCH_API_KEY", "a\nb")],
                "ELASTICSEARCH_API_KEY",
            ),
            (
                &[host, ("ELASTICSEARCH_PASSWORD", "x")],
                "ELASTICSEARCH_PASSWORD",
            ),
            (
                &[
                    ("ELASTICSEARCH_HOST", "http://a:b@es"),
                    ("ELASTICSEARCH_API_KEY", "x"),
                ],
                "ELASTICSEARCH_API_KEY",
            ),
            (
                &[host, ("ELASTICSEARCH_CA", "/no/such/file")],
                "ELASTICSEARCH_CA",
            ),
            (
                &[host, ("ELASTICSEARCH_INDEX_PREFIX", "a*")],
                "ELASTICSEARCH_INDEX_PREFIX",
            ),
            (
                &[host, ("ELASTICSEARCH_INDEX_PREFIX", "-a")],
                "ELASTICSEARCH_INDEX_PREFIX",
            ),
            (
                &[host, ("ELASTICSEARCH_CA", "/dev/null")],
                "ELASTICSEARCH_CA",
            ),
        ];
        for (variables, name) in cases {
            let problem = settings(variables).unwrap_err();
            assert!(problem.message.contains(name), "{problem:?}");
        }
    }
}
