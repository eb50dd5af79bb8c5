//! Elasticsearch: where records are shipped to and searched.
//!
//! The crate `elasticsearch` carries the requests; what it does not do stands here: a time limit on
//! every call, an error that says what to do, and no secret in anything that is printed.

mod cursor;
mod find;
mod follow;
mod search;
mod settings;
mod template;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use elasticsearch::cert::{Certificate, CertificateValidation};
use elasticsearch::http::headers::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue};
use elasticsearch::http::transport::{SingleNodeConnectionPool, Transport, TransportBuilder};
use serde_json::Value;

pub(super) use cursor::Cursor;
pub use elasticsearch::http::Method;
pub use search::ElasticsearchSearch;
pub use settings::ElasticsearchSettings;
pub(super) use template::{answers, install, installed};

/// For a call about a template, a policy or the like. A cluster that is busy takes seconds.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// For the look at the start, which nothing depends on: one that is away must not hold the start up.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest cause that is repeated: the beginning says it, the rest is the request itself.
const MAX_CAUSE: usize = 500;

/// Why Elasticsearch gave no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ElasticsearchError {
    /// The settings make no client.
    #[error("no client can be made for Elasticsearch: {cause}; check ELASTICSEARCH_CA")]
    Client {
        /// What the client said.
        cause: String,
    },
    /// No answer came.
    #[error(
        "Elasticsearch at {url} does not answer: {cause}; check that it runs and that ELASTICSEARCH_HOST is its address"
    )]
    Unreachable {
        /// Where it should be.
        url: String,
        /// What happened instead.
        cause: String,
    },
    /// Whoever answers there is not known.
    #[error(
        "Elasticsearch at {url} is not trusted: {cause}; set ELASTICSEARCH_CA to a file with the certificate of the authority that signed its own"
    )]
    Untrusted {
        /// Where it should be.
        url: String,
        /// What is wrong with its certificate.
        cause: String,
    },
    /// The login is not taken or may not do this.
    #[error(
        "Elasticsearch refuses the login: {cause}; check ELASTICSEARCH_API_KEY, or ELASTICSEARCH_USERNAME and ELASTICSEARCH_PASSWORD, and their rights on gantry-*"
    )]
    Forbidden {
        /// What it said.
        cause: String,
    },
    /// It answered with a failure.
    #[error("Elasticsearch answered with status {status}: {cause}; its own log says more")]
    Failed {
        /// The HTTP status.
        status: u16,
        /// What it said.
        cause: String,
    },
    /// The answer is not what this call gives.
    #[error(
        "Elasticsearch gave an answer that is not one ({cause}); check that ELASTICSEARCH_HOST is the address of Elasticsearch itself"
    )]
    Nonsense {
        /// What is wrong with it.
        cause: String,
    },
}

/// What a request carries.
pub(super) enum Payload {
    /// Nothing.
    None,
    /// JSON.
    Json(Value),
    /// Lines of JSON, compressed.
    Lines(Bytes),
}

/// A status and a body.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Bytes,
}

/// The connection to one cluster. Clones are the same.
#[derive(Clone)]
pub struct Elasticsearch(Arc<Inner>);

struct Inner {
    url: String,
    prefix: String,
    transport: Transport,
}

impl fmt::Debug for Elasticsearch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The transport would print its credentials.
        f.debug_tuple("Elasticsearch").field(&self.0.url).finish()
    }
}

impl Elasticsearch {
    /// A client; connects to nothing yet.
    pub fn new(settings: &ElasticsearchSettings) -> Result<Self, ElasticsearchError> {
        let failed = |error: &dyn std::error::Error| ElasticsearchError::Client {
            cause: chain(error),
        };
        let pool = SingleNodeConnectionPool::new(settings.url.clone());
        let mut builder = TransportBuilder::new(pool).enable_meta_header(false);
        if let Some(credentials) = settings.login.credentials() {
            builder = builder.auth(credentials);
        }
        if let Some(pem) = &settings.authorities {
            let authorities = Certificate::from_pem(pem).map_err(|error| failed(&error))?;
            builder = builder.cert_validation(CertificateValidation::Full(authorities));
        }
        Ok(Self(Arc::new(Inner {
            url: settings.url.to_string(),
            prefix: settings.prefix.clone(),
            transport: builder.build().map_err(|error| failed(&error))?,
        })))
    }

    /// Whether it answers and lets us in; what it says of itself.
    pub async fn check(&self) -> Result<String, ElasticsearchError> {
        let path = "/_cluster/health";
        let health = self.call(Method::Get, path, &[], Payload::None, CHECK_TIMEOUT);
        let health = health.await?;
        let said = |name: &str| health[name].as_str().unwrap_or("?").to_owned();
        Ok(format!("{} is {}", said("cluster_name"), said("status")))
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// How everything of this installation begins.
    fn prefix(&self) -> &str {
        &self.0.prefix
    }

    /// Every index of records: the records' own day follows.
    pub(super) fn logs(&self) -> String {
        format!("{}-logs-", self.0.prefix)
    }

    /// One document per journal: how far it was shipped.
    pub(super) fn journals(&self) -> String {
        format!("{}-journals", self.0.prefix)
    }

    /// Makes template and index of today: on a busy machine that takes longer than a search waits.
    #[cfg(test)]
    pub(super) async fn make_today(&self) -> Result<(), ElasticsearchError> {
        install(self).await?;
        let today = jiff::Timestamp::now().strftime("%Y.%m.%d");
        let index = format!("/{}{today}", self.logs());
        self.call(Method::Put, &index, &[], Payload::None, CALL_TIMEOUT)
            .await
            .map(|_| ())
    }

    /// Removes everything that begins with its prefix.
    #[cfg(test)]
    pub(super) async fn remove_all(&self) {
        let logs = self.logs();
        let template = logs.trim_end_matches('-');
        for index in [format!("{logs}*"), format!("{}*", self.journals())] {
            let found = self
                .call(
                    Method::Get,
                    &format!("/{index}/_settings"),
                    &[],
                    Payload::None,
                    CALL_TIMEOUT,
                )
                .await;
            let indices = found.ok().and_then(|found| found.as_object().cloned());
            for name in indices.unwrap_or_default().keys() {
                self.remove(&format!("/{name}")).await;
            }
        }
        self.remove(&format!("/_index_template/{template}")).await;
        self.remove(&format!("/_index_template/{}", self.journals()))
            .await;
    }

    #[cfg(test)]
    async fn remove(&self, path: &str) {
        let _ = self
            .send(Method::Delete, path, &[], Payload::None, CALL_TIMEOUT)
            .await;
    }

    /// One request, whatever status it is answered with.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        payload: Payload,
        limit: Duration,
    ) -> Result<Answer, ElasticsearchError> {
        let unreachable = |error: &dyn std::error::Error| {
            let (url, cause) = (self.0.url.clone(), chain(error));
            // The words of rustls; no type of it comes through the client.
            match cause.contains("invalid peer certificate") {
                true => ElasticsearchError::Untrusted { url, cause },
                false => ElasticsearchError::Unreachable { url, cause },
            }
        };
        let mut headers = HeaderMap::new();
        let body = match payload {
            Payload::None => None,
            Payload::Json(value) => Some(Bytes::from(value.to_string())),
            Payload::Lines(lines) => {
                let ndjson = HeaderValue::from_static("application/x-ndjson");
                headers.insert(CONTENT_TYPE, ndjson);
                headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                Some(lines)
            }
        };
        let sent = self
            .0
            .transport
            .send(method, path, headers, Some(query), body, Some(limit));
        let response = sent.await.map_err(|error| unreachable(&error))?;
        let status = response.status_code().as_u16();
        let body = response
            .bytes()
            .await
            .map_err(|error| unreachable(&error))?;
        Ok(Answer { status, body })
    }

    /// One request whose answer is JSON; any other status than success is an error.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        payload: Payload,
        limit: Duration,
    ) -> Result<Value, ElasticsearchError> {
        let answer = self.send(method, path, query, payload, limit).await?;
        answer.json()
    }
}

impl Answer {
    /// The body, when the status is success.
    pub(super) fn json(&self) -> Result<Value, ElasticsearchError> {
        if !(200..300).contains(&self.status) {
            return Err(self.error());
        }
        serde_json::from_slice(&self.body).map_err(|error| ElasticsearchError::Nonsense {
            cause: error.to_string(),
        })
    }

    /// What a status that is no success says.
    pub(super) fn error(&self) -> ElasticsearchError {
        let said: Option<Value> = serde_json::from_slice(&self.body).ok();
        let said = said.as_ref().map(|body| &body["error"]);
        let cause = match said {
            Some(Value::String(text)) => text.clone(),
            Some(error) if error["type"].is_string() => format!(
                "{}: {}",
                error["type"].as_str().unwrap_or_default(),
                error["reason"].as_str().unwrap_or_default()
            ),
            _ => String::from_utf8_lossy(&self.body).into_owned(),
        };
        let cause: String = cause.chars().take(MAX_CAUSE).collect();
        match self.status {
            401 | 403 => ElasticsearchError::Forbidden { cause },
            status => ElasticsearchError::Failed { status, cause },
        }
    }
}

/// An error with everything behind it: the first words alone say only that something failed.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text.chars().take(MAX_CAUSE).collect()
}
