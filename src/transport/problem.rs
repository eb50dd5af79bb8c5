//! Errors over HTTP: RFC 9457 `application/problem+json`, always with cause and remedy.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::model::{Problem, cut};

/// The media type of every error.
pub const CONTENT_TYPE: &str = "application/problem+json";

/// An error as it is sent.
#[derive(Debug)]
pub struct HttpProblem(Box<Inner>);

#[derive(Debug)]
struct Inner {
    status: StatusCode,
    problem: Problem,
    /// Members that a route's contract adds.
    extra: Map<String, Value>,
    retry_after: Option<u64>,
}

impl HttpProblem {
    /// A problem with its HTTP status.
    pub fn new(status: StatusCode, problem: Problem) -> Self {
        Self(Box::new(Inner {
            status,
            problem,
            extra: Map::new(),
            retry_after: None,
        }))
    }

    /// The problem itself.
    pub fn problem(&self) -> &Problem {
        &self.0.problem
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// Adds a member.
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.0.extra.insert(name.to_owned(), value);
        self
    }

    /// The body, for streams whose status is sent already.
    pub fn value(&self) -> Value {
        let Inner {
            status,
            problem,
            extra,
            retry_after: _,
        } = &*self.0;
        let mut body = Map::new();
        body.insert(
            "type".into(),
            json!(format!("urn:gantry:problem:{}", problem.code)),
        );
        body.insert(
            "title".into(),
            json!(status.canonical_reason().unwrap_or("Error")),
        );
        body.insert("status".into(), json!(status.as_u16()));
        body.insert("detail".into(), json!(problem.message));
        body.insert("code".into(), json!(problem.code));
        body.insert("cause".into(), json!(problem.cause));
        body.insert("remediation".into(), json!(problem.remediation));
        body.extend(extra.clone());
        Value::Object(body)
    }

    /// Says when to ask again.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.0.retry_after = Some(seconds);
        self
    }

    /// What is not there, or not there for this caller: the same words for both.
    pub fn not_found(what: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            Problem::new(
                "not_found",
                format!("There is no such {what}"),
                format!("no {what} of yours has this name"),
                "Check the name; the lists show what is yours",
            ),
        )
    }

    /// No key, or not one that is known.
    pub fn unauthorized(cause: &str) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            Problem::new(
                "unauthorized",
                "A valid key is required",
                cause,
                "Send it in the header X-API-Key or Authorization: Bearer; \
                 `gantry key create` makes one",
            ),
        )
    }

    /// Longest cause of a wrong request, which may repeat what a client sent.
    const MAX_CAUSE_CHARS: usize = 600;

    /// The request is wrong.
    pub fn bad_request(message: impl Into<String>, cause: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            Problem::new(
                "bad_request",
                message,
                cut(cause.into(), Self::MAX_CAUSE_CHARS),
                "Correct the request; /docs shows what each route takes",
            ),
        )
    }

    /// Gantry's own side failed.
    pub fn internal(cause: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            Problem::new(
                "internal",
                "Gantry failed to answer this request",
                cause,
                "Try again; the server's log says more",
            ),
        )
    }

    /// Gantry cannot do it now.
    pub fn unavailable(problem: Problem) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, problem)
    }
}

impl IntoResponse for HttpProblem {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.value().to_string()));
        let Inner {
            status,
            retry_after,
            ..
        } = *self.0;
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}
