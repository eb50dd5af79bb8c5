//! Submissions over HTTP: the list, and the whole record of one.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::timeout;
use utoipa::{IntoParams, ToSchema};

use super::Edge;
use super::body::{ProblemBody, Query};
use super::caller::{Authenticated, Passed};
use super::logs::{asker, given, parse, search_problem, visible_user, wrong};
use super::peers::Found;
use super::problem::HttpProblem;
use super::wire;
use crate::auth::Caller;
use crate::journal::{Item, Journal, JournalError};
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
        asker: asker(&caller),
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

/// Everything about one submission, as [`Writing`] writes it.
#[derive(Debug, ToSchema)]
#[expect(
    dead_code,
    reason = "it describes the answer, which is written piece by piece"
)]
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
    #[schema(value_type = Option<Object>)]
    reply: Option<Outcome>,
    /// Its event frames as they were streamed.
    #[schema(value_type = Vec<Object>)]
    events: Vec<Value>,
}

/// The whole record of a submission
#[utoipa::path(get, path = "/submissions/{id}", tag = "submissions", params(("id" = String, Path)),
    responses((status = 200, body = WholeSubmission), (status = 401, body = ProblemBody),
              (status = 404, body = ProblemBody), (status = 410, body = ProblemBody)))]
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
    // The first page also says whether it can be read at all: after it, the status is sent.
    let first = edge.journal.page_of_submission(id, 0).await;
    let first = first.map_err(|error| unreadable(id, error))?;
    let head = Head {
        submission_id: id,
        user_id: known.user_id,
        repl_id: known.repl_id,
        time: known.time,
    };
    let (pieces, body) = mpsc::channel(1);
    let journal = edge.journal.clone();
    tokio::spawn(async move {
        let writing = Writing {
            pieces,
            position: 0,
            place: Place::Head,
        };
        writing.run(&journal, id, &head, first).await;
    });
    let body = stream::unfold(body, |mut body| async move {
        let piece: Option<Result<Vec<u8>, JournalError>> = body.recv().await;
        Some((piece?, body))
    });
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((json, Body::from_stream(body)).into_response())
}

/// How it is told that a submission's record cannot be read.
fn unreadable(id: SubmissionId, error: JournalError) -> HttpProblem {
    match error {
        JournalError::Unknown => HttpProblem::not_found("submission"),
        gone @ JournalError::Gone { .. } => {
            HttpProblem::new(StatusCode::GONE, wire::gone_problem(id, &gone))
        }
        error => {
            tracing::error!(submission_id = %id, %error, "a submission cannot be read");
            HttpProblem::unavailable(Problem::new(
                "journal_failed",
                "The submission's record cannot be read",
                error.told(),
                "Try again; the server's log says more",
            ))
        }
    }
}

/// A client that takes nothing for this long has its answer ended.
const STALL: Duration = Duration::from_secs(60);

/// The first members of the answer.
#[derive(Serialize)]
struct Head {
    submission_id: SubmissionId,
    user_id: UserId,
    repl_id: ReplId,
    time: jiff::Timestamp,
}

/// Writes a [`WholeSubmission`] as it is read: one page of records is in memory, and the next is read
/// when the client has taken it.
struct Writing {
    pieces: mpsc::Sender<Result<Vec<u8>, JournalError>>,
    /// Of the last record written.
    position: u64,
    place: Place,
}

/// How much of the answer is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Its first members.
    Head,
    /// The submission as well.
    Submission,
    /// At least one event as well; the list is open.
    Events,
    /// All of it.
    Ended,
}

/// The client has gone, or does not read.
struct Gone;

impl Writing {
    async fn run(mut self, journal: &Journal, id: SubmissionId, head: &Head, first: Vec<Item>) {
        let written = self.all(journal, id, head, first).await;
        if let Ok(Err(error)) = written {
            tracing::error!(submission_id = %id, %error, "an answer breaks off");
            // The client sees that it is not whole.
            let _ = timeout(STALL, self.pieces.send(Err(error))).await;
        }
    }

    async fn all(
        &mut self,
        journal: &Journal,
        id: SubmissionId,
        head: &Head,
        first: Vec<Item>,
    ) -> Result<Result<(), JournalError>, Gone> {
        let mut text = wire::text(head);
        text.pop();
        let mut page = first;
        loop {
            for item in page {
                self.position = item.position();
                match item {
                    Item::Record(record) => self.record(&mut text, *record),
                    Item::Large(reply) => {
                        self.close_events(&mut text);
                        text.push_str(",\"reply\":");
                        self.send(std::mem::take(&mut text).into_bytes()).await?;
                        let mut pieces = Box::pin(reply.pieces());
                        while let Some(piece) = pieces.next().await {
                            match piece {
                                Ok(piece) => self.send(piece).await?,
                                Err(error) => return Ok(Err(error)),
                            }
                        }
                        self.send(b"}".to_vec()).await?;
                        return Ok(Ok(()));
                    }
                }
            }
            if self.place == Place::Ended {
                self.send(text.into_bytes()).await?;
                return Ok(Ok(()));
            }
            if !text.is_empty() {
                self.send(std::mem::take(&mut text).into_bytes()).await?;
            }
            page = match journal.page_of_submission(id, self.position).await {
                Ok(page) if page.is_empty() => {
                    self.close_events(&mut text);
                    text.push('}');
                    self.send(text.into_bytes()).await?;
                    return Ok(Ok(()));
                }
                Ok(page) => page,
                Err(error) => return Ok(Err(error)),
            };
        }
    }

    fn record(&mut self, text: &mut String, record: Record) {
        if let Some(frame) = wire::event_frame(&record) {
            self.open_events(text);
            text.push_str(&wire::text(&frame));
            return;
        }
        match record.event {
            Event::Received { submission, .. } => {
                self.place = Place::Submission;
                text.push_str(",\"submission\":");
                text.push_str(&wire::text(&submission));
            }
            Event::Reply(_) => {
                self.close_events(text);
                if let Some(reply) = wire::reply(record) {
                    text.push_str(",\"reply\":");
                    text.push_str(&wire::text(&reply));
                }
                text.push('}');
                self.place = Place::Ended;
            }
            Event::Queued
            | Event::Step { .. }
            | Event::Output { .. }
            | Event::TakenUp
            | Event::PutDown
            | Event::Input { .. }
            | Event::Cancelled { .. }
            | Event::Overtaken { .. }
            | Event::RunEnded { .. }
            | Event::Test(_)
            | Event::ProgramOutput { .. }
            | Event::Repl { .. } => {}
        }
    }

    /// Begins another event.
    fn open_events(&mut self, text: &mut String) {
        text.push_str(match self.place {
            Place::Head => ",\"submission\":null,\"events\":[",
            Place::Submission => ",\"events\":[",
            Place::Events | Place::Ended => ",",
        });
        self.place = Place::Events;
    }

    fn close_events(&mut self, text: &mut String) {
        text.push_str(match self.place {
            Place::Head => ",\"submission\":null,\"events\":[]",
            Place::Submission => ",\"events\":[]",
            Place::Events => "]",
            Place::Ended => "",
        });
    }

    async fn send(&self, piece: Vec<u8>) -> Result<(), Gone> {
        match timeout(STALL, self.pieces.send(Ok(piece))).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }
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
                    Ok(([json], Body::from_stream(body)).into_response())
                }
                Ok(StatusCode::NOT_FOUND) => Err(HttpProblem::not_found("submission")),
                Ok(StatusCode::GONE) => {
                    let problem = [(header::CONTENT_TYPE, super::problem::CONTENT_TYPE)];
                    let body = Body::from_stream(body);
                    Ok((StatusCode::GONE, problem, body).into_response())
                }
                _ => Err(HttpProblem::unavailable(peers.unknown())),
            }
        }
    }
}
