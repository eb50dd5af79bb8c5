//! `GET /logs`: searched as JSON, followed as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, KeepAliveStream, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::body::{ProblemBody, Query, field_refused};
use super::caller::Authenticated;
use super::modules::large;
use super::problem::HttpProblem;
use super::{Edge, MAX_ANSWER_BYTES};
use crate::auth::{Caller, Role};
use crate::logs::{LogQuery, LogRecord, Place, SearchError};
use crate::model::{FieldError, Problem, UserId};

/// Between comments on a stream on which nothing happens: half of what proxies commonly allow.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Requests of one user that follow the logs at a time: more windows than a person looks at.
pub const MAX_FOLLOWERS: usize = 16;

/// Searches of one user from the request until the answer has been read: what a page that is loaded asks for at
/// once.
pub const MAX_SEARCHES: usize = 8;

/// Records of a page unless asked otherwise, and at most.
const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1_000;

/// What to look for. Everything that is given must match.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LogParams {
    /// Of this user.
    user_id: Option<String>,
    /// Of this repl.
    repl_id: Option<String>,
    /// Of this submission.
    submission_id: Option<String>,
    /// Of this step.
    step: Option<String>,
    /// Of this level.
    level: Option<String>,
    /// With these words in the message.
    q: Option<String>,
    /// Not older than this time (RFC 3339).
    since: Option<String>,
    /// Not newer than this time (RFC 3339).
    until: Option<String>,
    /// At most this many records, up to 1,000.
    limit: Option<String>,
    /// After this place: `next` of the page before, or a stream's last event id.
    after: Option<String>,
}

/// Records found.
#[derive(Debug, Serialize, ToSchema)]
pub struct LogsFound {
    /// Elastic Common Schema, oldest first.
    #[schema(value_type = Vec<Object>)]
    records: Vec<serde_json::Map<String, serde_json::Value>>,
    /// Where the next page begins.
    next: Option<String>,
}

/// Search what happened; with `Accept: text/event-stream`, follow it
#[utoipa::path(get, path = "/logs", tag = "logs", params(LogParams),
    responses((status = 200, body = LogsFound), (status = 400, body = ProblemBody),
              (status = 401, body = ProblemBody)))]
pub async fn search(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    headers: HeaderMap,
    Query(params): Query<LogParams>,
) -> Result<Response, HttpProblem> {
    let follows = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("text/event-stream"));
    let Some(mut query) = log_query(&edge, &caller, params)? else {
        let nothing = LogsFound {
            records: Vec::new(),
            next: None,
        };
        return Ok(axum::Json(nothing).into_response());
    };
    if follows {
        // A browser that reconnects says how far it came.
        let last = headers
            .get("last-event-id")
            .and_then(|value| value.to_str().ok());
        query.after = last.map(str::to_owned).or(query.after);
        check(&edge, &query)?;
        let place = edge.followers.take(query.asker.as_ref());
        let place = place.ok_or_else(|| {
            too_many(&format!(
                "{MAX_FOLLOWERS} requests of yours follow the logs already"
            ))
        })?;
        return Ok(follow(&edge, &caller, query, place).into_response());
    }
    let place = edge.searchers.take(query.asker.as_ref());
    let place = place.ok_or_else(|| {
        too_many(&format!(
            "{MAX_SEARCHES} searches of yours are under way, or their answers are not read yet"
        ))
    })?;
    let spent = edge
        .answers
        .take(query.asker.clone(), MAX_ANSWER_BYTES)
        .await;
    let page = edge.search.query(query).await.map_err(search_problem)?;
    let found = LogsFound {
        records: page
            .records
            .into_iter()
            .map(|record| record.fields)
            .collect(),
        next: page.next,
    };
    large(&found, spent, place)
}

fn follow(
    edge: &Arc<Edge>,
    caller: &Caller,
    query: LogQuery,
    place: Place,
) -> Sse<KeepAliveStream<BoxStream<'static, Result<Event, Infallible>>>> {
    let ended = ended(Arc::clone(edge), caller.key_id.clone());
    let events = edge
        .search
        .follow(query)
        .map(move |record| {
            // Given back with the stream.
            let _held = &place;
            Ok(stream_event(record))
        })
        .take_until(Box::pin(ended));
    Sse::new(events.boxed()).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

/// Resolves when the stream must end: the server stops or the key no longer counts.
async fn ended(edge: Arc<Edge>, key_id: String) {
    let mut changes = edge.keys.changes();
    while edge.keys.caller(&key_id).is_some() {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = edge.shutdown.token.cancelled() => return,
        }
    }
}

fn stream_event(record: Result<LogRecord, SearchError>) -> Event {
    match record {
        Ok(record) => match serde_json::to_string(&record.fields) {
            Ok(text) => Event::default().id(record.cursor).data(text),
            Err(error) => Event::default().comment(error.to_string()),
        },
        Err(error) => {
            tracing::error!(%error, "logs cannot be followed");
            Event::default()
                .event("problem")
                .data(super::wire::text(&failed(&error)))
        }
    }
}

/// The query; `None` when it asks for what the caller cannot see.
fn log_query(
    edge: &Edge,
    caller: &Caller,
    params: LogParams,
) -> Result<Option<LogQuery>, HttpProblem> {
    let named: Option<UserId> = parse("user_id", params.user_id, "a user's name")?;
    let Some(user) = visible_user(caller, named) else {
        return Ok(None);
    };
    let limit = parse("limit", params.limit, "a number from 1 to 1000")?.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(wrong("limit", "must be a number from 1 to 1000"));
    }
    let query = LogQuery {
        users: user,
        repl_id: parse("repl_id", params.repl_id, "a repl's name")?,
        submission_id: parse("submission_id", params.submission_id, "a submission's id")?,
        step: given(params.step),
        level: given(params.level),
        q: given(params.q),
        since: parse::<Timestamp>("since", params.since, "a time such as 2026-01-31T12:00:00Z")?,
        until: parse::<Timestamp>("until", params.until, "a time such as 2026-01-31T12:00:00Z")?,
        limit,
        after: given(params.after),
        asker: asker(caller),
    };
    check(edge, &query)?;
    Ok(Some(query))
}

fn check(edge: &Edge, query: &LogQuery) -> Result<(), HttpProblem> {
    let checked = edge.search.check(query);
    checked.map_err(|error| wrong(&error.field, &error.reason))
}

/// Whose things to look through: `Some(None)` is everybody's, `None` is nothing at all.
pub fn visible_user(caller: &Caller, named: Option<UserId>) -> Option<Option<UserId>> {
    match (&caller.role, named) {
        (Role::Admin, named) => Some(named),
        (Role::User(own), None) => Some(Some(own.clone())),
        (Role::User(own), Some(named)) => (*own == named).then_some(Some(named)),
    }
}

/// Whose searches a search of this caller's waits for: admins' together, a user's their own.
pub fn asker(caller: &Caller) -> Option<UserId> {
    match &caller.role {
        Role::Admin => None,
        Role::User(user) => Some(user.clone()),
    }
}

/// An empty value is one that was not given: forms send them.
pub fn given(value: Option<String>) -> Option<String> {
    value.filter(|text| !text.is_empty())
}

/// A value of the query, refused by its name.
pub fn parse<T: std::str::FromStr>(
    name: &str,
    value: Option<String>,
    expected: &str,
) -> Result<Option<T>, HttpProblem> {
    given(value)
        .map(|text| {
            text.parse()
                .map_err(|_| wrong(name, &format!("must be {expected}")))
        })
        .transpose()
}

/// A value of the query that cannot be used.
pub fn wrong(name: &str, reason: &str) -> HttpProblem {
    field_refused(&FieldError::new(name, reason))
}

fn failed(error: &SearchError) -> Problem {
    if let SearchError::Slow { seconds } = error {
        return Problem::new(
            "search_slow",
            "The search took too long and was stopped",
            format!("it had no answer within {seconds} s"),
            "Narrow it to a user, a repl, a submission or a time",
        );
    }
    Problem::new(
        "search_failed",
        "The logs cannot be searched now",
        match error {
            SearchError::Journal(error) => error.told(),
            error => error.to_string(),
        },
        "Try again; submissions are not affected",
    )
}

fn too_many(cause: &str) -> HttpProblem {
    HttpProblem::new(
        StatusCode::TOO_MANY_REQUESTS,
        Problem::new(
            "too_many_searches",
            "Too many searches at a time",
            cause,
            "Wait for the answers of those under way, or close a page that follows the logs",
        ),
    )
    .retry_after(1)
}

/// How a search that failed is told.
pub fn search_problem(error: SearchError) -> HttpProblem {
    if let SearchError::Field(error) = &error {
        return wrong(&error.field, &error.reason);
    }
    if let SearchError::Busy = &error {
        return too_many(&error.to_string());
    }
    tracing::error!(%error, "a search failed");
    HttpProblem::unavailable(failed(&error))
}
