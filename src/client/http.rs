//! Asking the server over HTTP, and telling its errors.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use futures_util::StreamExt;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::failure::{Exit, Failure, chain};
use crate::model::Problem;

/// Longest wait for a TCP connection: three retransmissions of a lost SYN (1 + 2 + 4 s).
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(7);
/// How long a server that refuses the first connection is asked again: one that was started in the
/// same moment is ready within a second.
pub(super) const FIRST_CONTACT: Duration = Duration::from_secs(2);
/// Longest wait for an answer: a rollback answers when the release serves, which has 60 s itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// Largest answer read, so that a server gone wrong cannot fill the memory. Far above what pages of log
/// records come to; a page of nothing but the largest records would pass it and is refused.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Largest error text read.
const MAX_PROBLEM_BYTES: usize = 1 << 20;

/// A server and the key to it.
#[derive(Debug, Clone)]
pub(super) struct Api {
    client: Client,
    base: Url,
    key: SecretString,
}

impl Api {
    pub(super) fn new(base: Url, key: SecretString) -> Result<Self, Failure> {
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            // The key must not take a way that only HTTP takes: the WebSocket uses no proxy either.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("gantry/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| {
                Failure::unavailable(
                    "the HTTP client cannot be set up",
                    chain(&error),
                    "Check the limits on open files and threads.",
                )
            })?;
        Ok(Self { client, base, key })
    }

    /// The address, for messages.
    pub(super) fn address(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// A WebSocket's address.
    pub(super) fn websocket(&self, path: &str) -> String {
        let rest = self.address().trim_start_matches("http");
        format!("ws{rest}{path}")
    }

    pub(super) fn key(&self) -> &SecretString {
        &self.key
    }

    /// `GET`, its JSON parsed.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<T, Failure> {
        let request = self
            .request(Method::GET, path)
            .query(query)
            .timeout(ANSWER_TIMEOUT);
        self.parsed(path, self.send(request).await?).await
    }

    /// `POST` with a JSON body, its JSON parsed.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &Value,
    ) -> Result<T, Failure> {
        let request = self
            .request(Method::POST, path)
            .json(body)
            .timeout(ANSWER_TIMEOUT);
        self.parsed(path, self.send(request).await?).await
    }

    /// `PUT` with a JSON body, its JSON parsed.
    pub(super) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &Value,
    ) -> Result<T, Failure> {
        let request = self
            .request(Method::PUT, path)
            .json(body)
            .timeout(ANSWER_TIMEOUT);
        self.parsed(path, self.send(request).await?).await
    }

    /// `DELETE`, the JSON of the answer parsed.
    pub(super) async fn delete<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<T, Failure> {
        let request = self
            .request(Method::DELETE, path)
            .query(query)
            .timeout(ANSWER_TIMEOUT);
        self.parsed(path, self.send(request).await?).await
    }

    /// `GET` of an event stream, from behind the event `last_id`. It has no timeout of its own.
    pub(super) async fn event_stream(
        &self,
        path: &str,
        query: &[(&str, String)],
        last_id: Option<&str>,
    ) -> Result<Response, Failure> {
        let mut request = self
            .request(Method::GET, path)
            .query(query)
            .header(header::ACCEPT, "text/event-stream");
        if let Some(id) = last_id {
            request = request.header("Last-Event-ID", id);
        }
        self.send(request).await
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let address = format!("{}{path}", self.address());
        self.client
            .request(method, address)
            .header("X-API-Key", self.key.expose_secret())
    }

    /// Sends it. A connection that is refused is tried again for a moment: nothing was sent yet.
    async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let attempt = || async {
            match request.try_clone() {
                Some(request) => request.send().await.map_err(Some),
                None => Err(None),
            }
        };
        let response = attempt
            .retry(
                ExponentialBuilder::default()
                    .with_min_delay(Duration::from_millis(50))
                    .without_max_times()
                    .with_total_delay(Some(FIRST_CONTACT)),
            )
            .when(|error| error.as_ref().is_some_and(reqwest::Error::is_connect))
            .await
            .map_err(|error| self.unreachable(error.as_ref()))?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(refusal(response).await)
        }
    }

    fn unreachable(&self, error: Option<&reqwest::Error>) -> Failure {
        let cause = error.map_or_else(
            || "the request cannot be sent".to_owned(),
            |error| chain(error),
        );
        unreachable(self.address(), cause)
    }

    async fn parsed<T: DeserializeOwned>(
        &self,
        path: &str,
        response: Response,
    ) -> Result<T, Failure> {
        let body = read(response, MAX_ANSWER_BYTES).await.map_err(|cause| {
            Failure::unavailable(
                format!("the answer to {path} was cut"),
                cause,
                "Try again; ask for less if it stays.",
            )
        })?;
        serde_json::from_slice(&body).map_err(|error| {
            Failure::unavailable(
                format!("the answer to {path} is not understood"),
                error.to_string(),
                format!(
                    "Check that {} is a Gantry server of this version.",
                    self.address()
                ),
            )
        })
    }
}

/// The server does not answer at all.
pub(super) fn unreachable(address: &str, cause: String) -> Failure {
    Failure::unavailable(
        format!("{address} cannot be reached"),
        cause,
        "Check that the server runs (`gantry serve`) and that --server or GANTRY_SERVER names it.",
    )
}

async fn read(response: Response, most: usize) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    let mut pieces = response.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| chain(&error))?;
        if body.len() + piece.len() > most {
            return Err(format!("it is longer than {most} bytes"));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

async fn refusal(response: Response) -> Failure {
    let status = response.status();
    let body = read(response, MAX_PROBLEM_BYTES).await.unwrap_or_default();
    refused(status, &body)
}

/// An answer that is an error: RFC 9457 problem details, or whatever a proxy in between said.
pub(super) fn refused(status: StatusCode, body: &[u8]) -> Failure {
    #[derive(Default, Deserialize)]
    struct Details {
        code: Option<String>,
        title: Option<String>,
        detail: Option<String>,
        cause: Option<String>,
        remediation: Option<String>,
    }
    let details: Details = serde_json::from_slice(body).unwrap_or_default();
    // The title names the HTTP status; the detail says what happened.
    let message = details
        .detail
        .or(details.title)
        .unwrap_or_else(|| format!("the server answered {status}"));
    let cause = details.cause.unwrap_or_else(|| match status {
        StatusCode::UNAUTHORIZED => "the key is missing, wrong or revoked".to_owned(),
        StatusCode::FORBIDDEN => "the key does not allow this".to_owned(),
        _ => format!("{status}, without a cause"),
    });
    let remediation = match (status, details.remediation) {
        // The server's words are about headers; here the key comes from somewhere else.
        (StatusCode::UNAUTHORIZED, _) | (StatusCode::FORBIDDEN, None) => {
            "Check API_KEY or --key-file; `gantry key list`, where the server runs, shows the keys."
                .to_owned()
        }
        (_, Some(remediation)) => remediation,
        (_, None) => "Check --server; look into the server's own log.".to_owned(),
    };
    let code = details
        .code
        .unwrap_or_else(|| format!("http_{}", status.as_u16()));
    let problem = Problem::new(&code, message, cause, remediation);
    // Overloaded, starting, or a proxy whose server restarts.
    let passes = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
    let key_refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    let exit = if passes || key_refused {
        Exit::Unavailable
    } else {
        Exit::Failed
    };
    Failure {
        passes,
        ..Failure::new(exit, problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problem_details_are_told_and_anything_else_still_says_what_to_do() {
        let told = refused(
            StatusCode::NOT_FOUND,
            br#"{"title":"Not Found","status":404,"detail":"There is no such repl","code":"not_found","cause":"x is not yours"}"#,
        );
        assert_eq!(told.exit, Exit::Failed);
        assert_eq!(told.problem.message, "There is no such repl");
        assert_eq!(told.problem.cause, "x is not yours");
        let proxy = refused(StatusCode::BAD_GATEWAY, b"<html>");
        assert_eq!(proxy.exit, Exit::Unavailable);
        assert!(proxy.problem.message.contains("502"));
        assert_eq!(
            refused(StatusCode::UNAUTHORIZED, b"").exit,
            Exit::Unavailable
        );
        assert_eq!(
            refused(StatusCode::TOO_MANY_REQUESTS, b"").exit,
            Exit::Unavailable
        );
    }
}
