//! Bodies and queries: read whole, bounded, and refused by the field's name.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use serde::Serialize;
use serde::de::DeserializeOwned;
use utoipa::ToSchema;

use super::Edge;
use super::caller::OpenedBy;
use super::problem::HttpProblem;
use super::wire;
use crate::model::{FieldError, Problem};

/// The body of every error.
#[derive(Debug, Serialize, ToSchema)]
pub struct ProblemBody {
    /// `urn:gantry:problem:` and the code.
    pub r#type: String,
    /// The HTTP status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened.
    pub detail: String,
    /// A stable word for programs.
    pub code: String,
    /// Why.
    pub cause: String,
    /// What to do about it.
    pub remediation: String,
    /// The path of the field that is wrong, when one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// A JSON body.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<Edge>> for Json<T> {
    type Rejection = HttpProblem;

    async fn from_request(request: Request, edge: &Arc<Edge>) -> Result<Self, HttpProblem> {
        let opened_by = request.extensions().get::<OpenedBy>().cloned();
        let bytes = Bytes::from_request(request, edge)
            .await
            .map_err(body_refused)?;
        if let Some(key) = opened_by {
            key.still_counts(edge)?;
        }
        // An empty body is an object without fields: most fields have defaults.
        let bytes = if bytes.is_empty() {
            Bytes::from_static(b"{}")
        } else {
            bytes
        };
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            HttpProblem::bad_request("The body is not UTF-8", error.to_string())
        })?;
        wire::fields(text)
            .map(Json)
            .map_err(|error| field_refused(&error))
    }
}

/// A field of a body or a query that is wrong; without a name: the body as a whole.
pub fn field_refused(error: &FieldError) -> HttpProblem {
    let FieldError { field, reason } = error;
    if field.is_empty() {
        return HttpProblem::bad_request("The body is not a JSON object this route takes", reason);
    }
    HttpProblem::new(
        StatusCode::BAD_REQUEST,
        Problem::new(
            "field_invalid",
            format!("{field} {reason}"),
            format!("the field {field} {reason}"),
            format!("Correct {field} and ask again; /docs shows what each route takes"),
        ),
    )
    .with("field", field.as_str().into())
}

fn body_refused(rejection: BytesRejection) -> HttpProblem {
    let status = rejection.status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        return HttpProblem::new(
            status,
            Problem::new(
                "body_too_large",
                "The body is too large",
                format!("a request may hold {} bytes", super::MAX_BODY_BYTES),
                "Send code over the WebSocket /ws/code",
            ),
        );
    }
    HttpProblem::bad_request("The body could not be read", rejection.body_text())
}

/// The query of a URL.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = HttpProblem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, HttpProblem> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(query)| Query(query))
            .map_err(|rejection| {
                HttpProblem::bad_request("The query is not valid", rejection.body_text())
            })
    }
}
