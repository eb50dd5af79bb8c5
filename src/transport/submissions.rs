//! Submissions over HTTP: the list, and the whole record of one.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::Edge;
use super::body::{ProblemBody, Query};
use super::caller::{Authenticated, Passed};
use super::logs::{given, parse, search_problem, visible_user, wrong};
use super::peers::Found;
use super::problem::HttpProblem;
use super::wire;
use crate::auth::Caller;
use crate::journal::JournalError;
use crate::logs::{SubmissionQuery, SubmissionSummary};
use crate::model::{Event, Outcome, Problem, Record, ReplId, Submission, SubmissionId, UserId};

/// Submissions of a page unless asked otherwise, and at most.
const DEFAULT_LIMIT: usize = 50;
const MAX_LIMIT: usize = 500;

/// What to look for. Everything that is given must match.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct SubmissionParams {
    /// Of this user.
    user_id: Option<String>,
    /// Of this repl.
    repl_id: Option<String>,
    /// With this status.
    status: Option<String>,
    /// At most this many, up to 500.
    limit: Option<String>,
    /// Older than this place: `next` of the page before.
    before: Option<String>,
}

/// Submissions, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct Submissions {
    /// `submission_id, user_id, repl_id, language, status, reason, release, url, time, duration_ms`.
    #[schema(value_type = Vec<Object>)]
    submissions: Vec<SubmissionSummary>,
    /// Where the next page begins.
    next: Option<String>,
}

/// Submissions, newest first
#[utoipa::path(get, path = "/submissions", tag = "submissions", params(SubmissionParams),
    responses((status = 200, body = Submissions), (status = 400, body = ProblemBody),
              (status = 401, body = ProblemBody)))]
pub async fn list(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Query(params): Query<SubmissionParams>,
) -> Result<axum::Json<Submissions>, HttpProblem> {
    let named: Option<UserId> = parse("user_id", params.user_id, "a user's name")?;
    let Some(users) = visible_user(&caller, named) else {
        let nothing = Submissions {
            submissions: Vec::new(),
            next: None,
        };
        return Ok(axum::Json(nothing));
    };
    let limit = parse("limit", params.limit, "a number from 1 to 500")?.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(wrong("limit", "must be a number from 1 to 500"));
    }
    let query = SubmissionQuery {
        users,
        repl_id: parse("repl_id", params.repl_id, "a repl's name")?,
        status: given(params.status),
        limit,
        before: given(params.before),
    };
    let page = edge
        .search
        .submissions(query)
        .await
        .map_err(search_problem)?;
    Ok(axum::Json(Submissions {
        submissions: page.submissions,
        next: page.next,
    }))
}

/// Everything about one submission.
#[derive(Debug, Serialize, ToSchema)]
pub struct WholeSubmission {
    /// Its id.
    #[schema(value_type = String)]
    submission_id: SubmissionId,
    /// Whose.
    #[schema(value_type = String)]
    user_id: UserId,
    /// Where it went.
    #[schema(value_type = String)]
    repl_id: ReplId,
    /// When it was taken in.
    #[schema(value_type = String)]
    time: jiff::Timestamp,
    /// As it was taken in, defaults filled in.
    #[schema(value_type = Object)]
    submission: Option<Box<Submission>>,
    /// Its reply; absent while it is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    reply: Option<Outcome>,
    /// Its event frames as they were streamed.
    #[schema(value_type = Vec<Object>)]
    events: Vec<Value>,
}

/// The whole record of a submission
#[utoipa::path(get, path = "/submissions/{id}", tag = "submissions", params(("id" = String, Path)),
    responses((status = 200, body = WholeSubmission), (status = 401, body = ProblemBody),
              (status = 404, body = ProblemBody)))]
pub async fn one(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Passed(passed): Passed,
    Path(id): Path<String>,
) -> Result<Response, HttpProblem> {
    let not_found = || HttpProblem::not_found("submission");
    let id: SubmissionId = id.parse().map_err(|_| not_found())?;
    let Some(known) = edge.journal.submission(id) else {
        return match passed {
            true => Err(not_found()),
            false => elsewhere(&edge, &caller, id).await,
        };
    };
    if !caller.sees(&known.user_id) {
        return Err(not_found());
    }
    let records = match edge.journal.read_submission(id).await {
        Ok(records) => records,
        Err(JournalError::Unknown) => return Err(not_found()),
        Err(error) => {
            tracing::error!(submission_id = %id, %error, "a submission cannot be read");
            return Err(HttpProblem::unavailable(Problem::new(
                "journal_failed",
                "The submission's record cannot be read",
                error.to_string(),
                "Try again; the server's log says more",
            )));
        }
    };
    let mut whole = WholeSubmission {
        submission_id: id,
        user_id: known.user_id,
        repl_id: known.repl_id,
        time: known.time,
        submission: None,
        reply: None,
        events: Vec::new(),
    };
    for record in records {
        whole.add(record);
    }
    Ok(axum::Json(whole).into_response())
}

/// Another replica's submission, as that one answers.
async fn elsewhere(
    edge: &Edge,
    caller: &Caller,
    id: SubmissionId,
) -> Result<Response, HttpProblem> {
    let peers = &edge.peers;
    match peers.find(id).await {
        Found::Nowhere => Err(HttpProblem::not_found("submission")),
        Found::Unknown => Err(HttpProblem::unavailable(peers.unknown())),
        Found::At(peer) => {
            let path = format!("/submissions/{id}");
            let answer = peers.get(&peer, &path, &caller.key_id).await;
            let (status, body) = answer.map_err(|error| {
                tracing::warn!(peer = peer.address(), %error, "another replica did not answer");
                HttpProblem::unavailable(peers.unknown())
            })?;
            match StatusCode::from_u16(status) {
                Ok(StatusCode::OK) => {
                    let json = (header::CONTENT_TYPE, "application/json");
                    Ok(([json], body).into_response())
                }
                Ok(StatusCode::NOT_FOUND) => Err(HttpProblem::not_found("submission")),
                _ => Err(HttpProblem::unavailable(peers.unknown())),
            }
        }
    }
}

impl WholeSubmission {
    fn add(&mut self, record: Record) {
        if let Some(frame) = wire::event_frame(&record) {
            self.events.extend(serde_json::to_value(frame).ok());
            return;
        }
        match record.event {
            Event::Received { submission, .. } => self.submission = Some(submission),
            Event::Reply(_) => self.reply = wire::reply(record),
            Event::Queued
            | Event::Step { .. }
            | Event::Output { .. }
            | Event::TakenUp
            | Event::PutDown
            | Event::RunEnded { .. }
            | Event::Test(_)
            | Event::ProgramOutput { .. }
            | Event::Repl { .. } => {}
        }
    }
}
