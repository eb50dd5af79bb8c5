//! The way to a repl's runner: tickets, the terminal's WebSocket, saving.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::Uri;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::Edge;
use super::body::{ProblemBody, Query};
use super::caller::{Authenticated, OpenedBy};
use super::problem::HttpProblem;
use super::proxy::{self, Door, HELD};
use super::repls::{owned, platform_problem};
use super::ws::{CodeQuery, caller_of};
use crate::model::ReplId;
use crate::pipeline::{NotSaved, Saved};
use crate::platform::PlatformError;

/// How long a ticket for a runner opens a connection: long enough for a page to load its terminal.
const TICKET_LIFETIME: Duration = Duration::from_secs(60);

/// A ticket for a repl's runner.
#[derive(Debug, Serialize, ToSchema)]
pub struct RunnerTicket {
    /// Goes into `ws://{replId}.DOMAIN/?ticket=`; opens connections to this repl only.
    ticket: String,
    /// Seconds it opens them for; a connection that is open stays.
    expires_in: u64,
}

/// A short-lived ticket for the runner of a repl
#[utoipa::path(post, path = "/repls/{id}/ticket", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = RunnerTicket), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn ticket(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<RunnerTicket>, HttpProblem> {
    let (repl, _) = owned(&edge, &caller, &id).await?;
    awaken(&edge, &repl).await.map_err(platform_problem)?;
    let ticket = issue(&edge, &repl).await.map_err(platform_problem)?;
    Ok(axum::Json(RunnerTicket {
        ticket,
        expires_in: TICKET_LIFETIME.as_secs(),
    }))
}

/// Starts the repl again when it is idle, and waits until it is there.
async fn awaken(edge: &Edge, repl: &ReplId) -> Result<(), PlatformError> {
    let Some(awake) = edge.pipeline.wake(repl) else {
        return Ok(());
    };
    // Who asks next finds out whether it took longer.
    tokio::time::timeout(HELD, awake).await.unwrap_or(Ok(()))
}

/// A ticket for the repl's runner.
pub async fn issue(edge: &Edge, repl: &ReplId) -> Result<String, PlatformError> {
    let key = edge.platform.ticket_key(repl).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let until = now.unwrap_or_default() + TICKET_LIFETIME;
    Ok(key.issue(repl, until.as_secs()))
}

/// The WebSocket of a repl's runner: terminals, files, the program's switch
#[utoipa::path(get, path = "/repls/{id}/terminal", tag = "repls",
    params(("id" = String, Path),
           ("ticket" = Option<String>, Query, description = "from POST /ws/ticket, instead of a key")),
    responses((status = 101, description = "the connection is a WebSocket now"),
              (status = 401, body = ProblemBody), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn terminal(
    State(edge): State<Arc<Edge>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, HttpProblem> {
    let (mut parts, body) = request.into_parts();
    let Query(CodeQuery { ticket }) = Query::from_request_parts(&mut parts, &edge).await?;
    let caller = caller_of(&edge, &parts, ticket).await?;
    let (repl, _) = owned(&edge, &caller, &id).await?;
    awaken(&edge, &repl).await.map_err(platform_problem)?;
    let ticket = issue(&edge, &repl).await.map_err(platform_problem)?;
    // The caller's key ends here.
    for secret in ["x-api-key", "authorization"] {
        parts.headers.remove(secret);
    }
    let target = format!("/?ticket={ticket}");
    parts.uri = Uri::try_from(target)
        .map_err(|error| HttpProblem::internal(format!("the runner's URL: {error}")))?;
    parts.extensions.insert(OpenedBy(caller.key_id.clone()));
    let request = Request::from_parts(parts, body);
    Ok(proxy::forward(&edge, Some(repl), Door::Runner, request).await)
}

/// Put what was edited into the code store now
#[utoipa::path(post, path = "/repls/{id}/save", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn save(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<Saved>, HttpProblem> {
    let (repl, _) = owned(&edge, &caller, &id).await?;
    let saved = edge.pipeline.save(&repl).await;
    saved.map(axum::Json).map_err(|error| match error {
        NotSaved::Gone(error) => platform_problem(error),
        NotSaved::Failed(problem) => HttpProblem::unavailable(problem),
    })
}
