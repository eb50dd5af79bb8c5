//! What a repl keeps beside its code, over HTTP: how much it is, and deleting it.

use std::sync::Arc;

use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::Edge;
use super::body::ProblemBody;
use super::caller::Authenticated;
use super::problem::HttpProblem;
use super::repls::{owned, platform_problem};
use crate::model::{ReplData, ReplId};

/// What a repl keeps beside its code.
#[derive(Debug, Serialize, ToSchema)]
pub struct Data {
    /// The repl.
    #[serde(rename = "replId")]
    repl_id: String,
    /// `bytes`, and `limit_bytes` that they may be; the same of all data and code of its user as `user_bytes`
    /// and `user_limit_bytes`. What the platform cannot tell is left out.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    data: ReplData,
}

/// What a repl keeps beside its code, such as its database, and how much it may be
#[utoipa::path(get, path = "/repls/{id}/data", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = Data), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn show(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<Data>, HttpProblem> {
    let (repl, _) = owned(&edge, &caller, &id).await?;
    show_of(&edge, repl).await
}

async fn show_of(edge: &Edge, repl: ReplId) -> Result<axum::Json<Data>, HttpProblem> {
    let data = edge.platform.data(&repl).await.map_err(platform_problem)?;
    Ok(axum::Json(Data {
        repl_id: repl.into(),
        data,
    }))
}

/// Delete what a stopped repl keeps beside its code, for good; nothing there is fine
#[utoipa::path(delete, path = "/repls/{id}/data", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = Data), (status = 404, body = ProblemBody),
              (status = 409, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn delete(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<Data>, HttpProblem> {
    let (repl, user) = owned(&edge, &caller, &id).await?;
    let deleted = edge.pipeline.delete_data(&user, &repl).await;
    deleted.map_err(platform_problem)?;
    show_of(&edge, repl).await
}
