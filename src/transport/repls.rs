//! Repls over HTTP: what is deployed, going back, stopping.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::Edge;
use super::body::{Json, ProblemBody, Query, field_refused};
use super::caller::Authenticated;
use super::problem::HttpProblem;
use crate::auth::{Caller, Role};
use crate::model::{FieldError, Problem, Release, ReplId, ReplStatus, UserId};
use crate::pipeline::{DELETED, Holdings, LastSave, STOPPED};
use crate::platform::PlatformError;

/// The repls of a caller.
#[derive(Debug, Serialize, ToSchema)]
pub struct Repls {
    /// State with cause; a user sees its own, an admin everybody's.
    #[schema(value_type = Vec<Object>)]
    repls: Vec<ReplStatus>,
}

/// What is deployed, and how it is
#[utoipa::path(get, path = "/repls", tag = "repls",
    responses((status = 200, body = Repls), (status = 401, body = ProblemBody)))]
pub async fn list(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<axum::Json<Repls>, HttpProblem> {
    let mut repls = edge.platform.repls().await.map_err(platform_problem)?;
    repls.retain(|repl| caller.sees(&repl.user_id));
    Ok(axum::Json(Repls { repls }))
}

/// One repl
#[utoipa::path(get, path = "/repls/{id}", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn one(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<ReplStatus>, HttpProblem> {
    let repls = edge.platform.repls().await.map_err(platform_problem)?;
    let mut own = repls.into_iter().filter(|repl| caller.sees(&repl.user_id));
    match own.find(|repl| repl.repl_id.as_str() == id) {
        Some(status) => Ok(axum::Json(status)),
        None => {
            // Of one whose owner cannot be told, that is what is answered.
            owned(&edge, &caller, &id).await?;
            Err(HttpProblem::not_found("repl"))
        }
    }
}

/// The releases of a repl.
#[derive(Debug, Serialize, ToSchema)]
pub struct Releases {
    /// Newest first.
    #[schema(value_type = Vec<Object>)]
    releases: Vec<Release>,
}

/// The releases of a repl, newest first
#[utoipa::path(get, path = "/repls/{id}/releases", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = Releases), (status = 404, body = ProblemBody)))]
pub async fn releases(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<Releases>, HttpProblem> {
    let (repl, _) = owned(&edge, &caller, &id).await?;
    let releases = edge
        .platform
        .releases(&repl)
        .await
        .map_err(platform_problem)?;
    Ok(axum::Json(Releases { releases }))
}

/// Which release to go back to.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollback {
    /// Its number; left out: the last one before the current that served.
    release: Option<u64>,
}

/// What serves now.
#[derive(Debug, Serialize, ToSchema)]
pub struct RolledBack {
    /// The repl.
    #[serde(rename = "replId")]
    repl_id: String,
    /// The release that serves now.
    release: u64,
    /// Where.
    url: String,
    /// Of a workspace that gave way: `unsaved`, what could not be kept, and why.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    last: LastSave,
}

/// Make an earlier release serve again
#[utoipa::path(post, path = "/repls/{id}/rollback", tag = "repls", params(("id" = String, Path)),
    request_body = Rollback,
    responses((status = 200, body = RolledBack), (status = 404, body = ProblemBody),
              (status = 409, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn rollback(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
    Json(Rollback { release }): Json<Rollback>,
) -> Result<axum::Json<RolledBack>, HttpProblem> {
    let (repl, user) = owned(&edge, &caller, &id).await?;
    let (running, last) = edge
        .pipeline
        .rollback(&user, &repl, release)
        .await
        .map_err(|error| match error {
            PlatformError::NotFound(what) => HttpProblem::new(
                StatusCode::NOT_FOUND,
                Problem::new(
                    "not_found",
                    "There is no such release to go back to",
                    format!("{what} does not exist"),
                    "GET /repls/{id}/releases lists them; one that failed never served",
                ),
            ),
            error => platform_problem(error),
        })?;
    Ok(axum::Json(RolledBack {
        repl_id: repl.into(),
        release: running.release,
        url: running.url,
        last,
    }))
}

/// What confirms that a repl is to be deleted.
#[derive(Debug, Default, Deserialize)]
pub struct Confirmation {
    confirm: Option<String>,
}

/// A repl that was deleted.
#[derive(Debug, Serialize, ToSchema)]
pub struct Deleted {
    /// Always true here; errors carry none.
    success: bool,
}

/// Delete a repl for good: it is stopped, its files, releases, variables and data are removed, and anybody can have
/// its name. `confirm` is its name; without it, 409 `not_confirmed` tells what would be deleted
#[utoipa::path(delete, path = "/repls/{id}", tag = "repls",
    params(("id" = String, Path), ("confirm" = Option<String>, Query, description = "the repl's name once more")),
    responses((status = 200, body = Deleted), (status = 404, body = ProblemBody),
              (status = 409, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn delete(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
    Query(Confirmation { confirm }): Query<Confirmation>,
) -> Result<axum::Json<Deleted>, HttpProblem> {
    let (repl, user) = owned(&edge, &caller, &id).await?;
    if confirm.as_deref() != Some(repl.as_str()) {
        let holdings = edge.pipeline.holdings(&repl).await;
        return Err(not_confirmed(&repl, &holdings.map_err(platform_problem)?));
    }
    // A replica that cannot be told now finds it with the repl, or with what is kept of it.
    edge.peers.overtake(&repl, Some(&user), DELETED).await;
    let deleted = edge.pipeline.delete(&user, &repl).await;
    deleted.map_err(platform_problem)?;
    tracing::info!(%repl, %user, key = %caller.key_id, "a repl was deleted");
    Ok(axum::Json(Deleted { success: true }))
}

fn not_confirmed(repl: &ReplId, holdings: &Holdings) -> HttpProblem {
    let data = match holdings.data.bytes {
        Some(0) => "no data".to_owned(),
        Some(bytes) => format!("{bytes} bytes of data"),
        None => "a database of unknown size".to_owned(),
    };
    let Holdings {
        files,
        releases,
        variables,
        domains,
        data: _,
    } = holdings;
    let counted = |count: usize, one: &str| match count {
        1 => format!("1 {one}"),
        _ => format!("{count} {one}s"),
    };
    let cause = format!(
        "{}, {}, {}, {} and {data} would be deleted for good",
        counted(*files, "file"),
        counted(*releases, "release"),
        counted(*variables, "variable"),
        counted(domains.len(), "domain")
    );
    let problem = Problem::new(
        "not_confirmed",
        format!("{repl} is not deleted without a confirmation"),
        cause,
        format!("If nobody needs that, ask for it with ?confirm={repl}."),
    );
    HttpProblem::new(StatusCode::CONFLICT, problem).with("deletes", json!(holdings))
}

/// Give a name back under which nothing is kept. With `confirm`, the name once more, it is `DELETE /repls/{id}`;
/// without it, where something is kept, 409 `not_confirmed` tells what would be deleted
#[utoipa::path(delete, path = "/repls/{id}/name", tag = "repls",
    params(("id" = String, Path), ("confirm" = Option<String>, Query, description = "the repl's name once more")),
    responses((status = 200, body = Deleted), (status = 404, body = ProblemBody),
              (status = 409, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn release_name(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
    Query(confirmation): Query<Confirmation>,
) -> Result<axum::Json<Deleted>, HttpProblem> {
    if confirmation.confirm.is_some() {
        let (state, caller) = (State(edge), Authenticated(caller));
        return delete(state, caller, Path(id), Query(confirmation)).await;
    }
    let (repl, user) = owned(&edge, &caller, &id).await?;
    let given_up = edge.pipeline.give_up_name(&user, &repl).await;
    if let Some(holdings) = given_up.map_err(platform_problem)? {
        return Err(not_confirmed(&repl, &holdings));
    }
    tracing::info!(%repl, %user, key = %caller.key_id, "the name of an empty repl was given back");
    Ok(axum::Json(Deleted { success: true }))
}

/// What `POST /stop` answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Stopped {
    /// Always true here; errors carry false.
    success: bool,
    /// Of a workspace: `unsaved`, what could not be kept, and why, as `[{path, reason}]`; `unsaved_more`, how much
    /// more there is; `saveError`, why the last changes were not saved.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    last: LastSave,
}

/// What `POST /stop` takes. For the description only: the route itself says what is wrong in its
/// own shape.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Which repl.
    #[serde(rename = "replId")]
    repl_id: ReplIdText,
}

/// A name that is checked when it is used.
pub type ReplIdText = String;

/// Stop a repl; nothing there is fine
#[utoipa::path(post, path = "/stop", tag = "repls", request_body = Stop,
    responses((status = 200, body = Stopped), (status = 400, body = ProblemBody),
              (status = 500, body = ProblemBody)))]
pub async fn stop(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    body: Result<Json<Stop>, HttpProblem>,
) -> Result<axum::Json<Stopped>, HttpProblem> {
    let Json(Stop { repl_id }) = body.map_err(unsuccessful)?;
    let repl: ReplId = repl_id.parse().map_err(|error: crate::model::IdError| {
        let error = FieldError::new("replId", error.to_string());
        unsuccessful(field_refused(&error))
    })?;
    let stopped = match edge.platform.owner(&repl).await {
        Ok(Some(user)) if caller.may_act_for(&user) => edge.pipeline.stop(&user, &repl).await,
        Ok(None) => stop_unclaimed(&edge, &caller, &repl).await,
        // Another's repl looks like one that is not there, and stopping that is fine.
        Ok(_) => Ok(LastSave::default()),
        Err(error) => Err(error),
    };
    let done = |last| {
        Ok(axum::Json(Stopped {
            success: true,
            last,
        }))
    };
    match stopped {
        Ok(last) => done(last),
        Err(PlatformError::NotFound(_)) => done(LastSave::default()),
        Err(PlatformError::Unavailable(problem) | PlatformError::NotReady(problem)) => {
            tracing::error!(repl_id = %repl, error = %problem, "a repl could not be stopped");
            let failed = HttpProblem::new(StatusCode::INTERNAL_SERVER_ERROR, problem.clone());
            Err(unsuccessful(failed).with("error", json!(problem)))
        }
    }
}

/// The repl of this name is nobody's yet: what is under way for it, at whatever replica, is not deployed.
async fn stop_unclaimed(
    edge: &Edge,
    caller: &Caller,
    repl: &ReplId,
) -> Result<LastSave, PlatformError> {
    let own = |user: &UserId| caller.may_act_for(user);
    edge.pipeline.overtake_here(repl, own, STOPPED).await;
    let user = match &caller.role {
        Role::Admin => None,
        Role::User(user) => Some(user),
    };
    match edge.peers.overtake(repl, user, STOPPED).await {
        true => Ok(LastSave::default()),
        false => Err(PlatformError::Unavailable(edge.peers.not_told())),
    }
}

/// The members that `/start` and `/stop` promise with every error.
pub fn unsuccessful(problem: HttpProblem) -> HttpProblem {
    let message = problem.problem().message.clone();
    problem
        .with("success", Value::Bool(false))
        .with("message", Value::String(message))
}

/// The repl of this name and its owner, if it exists for the caller.
pub async fn owned(
    edge: &Edge,
    caller: &Caller,
    id: &str,
) -> Result<(ReplId, UserId), HttpProblem> {
    let not_found = || HttpProblem::not_found("repl");
    let repl: ReplId = id.parse().map_err(|_| not_found())?;
    let owner = edge.platform.owner(&repl).await.map_err(platform_problem)?;
    let user = owner
        .filter(|user| caller.sees(user))
        .ok_or_else(not_found)?;
    Ok((repl, user))
}

/// How a platform's error is told over HTTP.
pub fn platform_problem(error: PlatformError) -> HttpProblem {
    match error {
        PlatformError::NotFound(_) => HttpProblem::not_found("repl"),
        PlatformError::Unavailable(problem) => HttpProblem::unavailable(problem),
        // The previous release serves on: a conflict with what the program does, not a fault here.
        PlatformError::NotReady(problem) => HttpProblem::new(StatusCode::CONFLICT, problem),
    }
}
