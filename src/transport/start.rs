//! `POST /start`: a repl runs from the files that are in the code store, whoever put them there.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::Edge;
use super::body::{Json, ProblemBody, field_refused};
use super::caller::Authenticated;
use super::problem::HttpProblem;
use super::repls::{ReplIdText, platform_problem, unsuccessful};
use super::runner;
use crate::auth::{Caller, Role};
use crate::model::{FieldError, Language, Problem, RelativePath, ReplId, UserId};
use crate::platform::PlatformError;

/// What `POST /start` takes: `replId`, and `language` or `userId` or both.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// Which repl.
    #[serde(rename = "replId")]
    repl_id: Option<ReplIdText>,
    /// Whose it is. Left out: the key's own user; with an admin's key the repl's owner, or, for a new
    /// repl, a user of the repl's name (without `-prod` at its end).
    #[serde(rename = "userId")]
    user_id: Option<String>,
    /// What it is written in. Left out: the language whose entrypoint is among its files.
    language: Option<String>,
    /// Files to begin with, as `{path: text}`. One that the repl has stays as it is.
    #[serde(default)]
    #[schema(value_type = Object)]
    files: BTreeMap<RelativePath, String>,
}

/// What `POST /start` answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Started {
    /// Always true here; errors carry false.
    success: bool,
    /// Whether this request made it run; false: it was running.
    #[serde(rename = "podCreated")]
    pod_created: bool,
    /// The same whenever it runs.
    message: &'static str,
    /// The repl.
    #[serde(rename = "replId")]
    repl_id: String,
    /// Where everything of its user's is.
    namespace: String,
    /// Where its program is served, as soon as it listens.
    url: String,
    /// Where its terminal is, with a ticket that opens it within a minute.
    #[serde(rename = "terminalUrl")]
    terminal_url: String,
}

/// Start a repl from its current files; running is fine
#[utoipa::path(post, path = "/start", tag = "repls", request_body = Start,
    responses((status = 200, body = Started), (status = 400, body = ProblemBody),
              (status = 500, body = ProblemBody)))]
pub async fn start(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    body: Result<Json<Start>, HttpProblem>,
) -> Result<axum::Json<Started>, HttpProblem> {
    let Json(mut body) = body.map_err(unsuccessful)?;
    let files = std::mem::take(&mut body.files);
    let wanted = Wanted::of(&body).map_err(refused)?;
    let repl = wanted.repl;
    let user = match wanted.user {
        Some(user) if caller.may_act_for(&user) => user,
        Some(_) => {
            let error = FieldError::new("userId", "is not one this key may act for");
            return Err(refused(error));
        }
        None => user_of(&edge, &caller, &repl).await?,
    };
    let started = edge.pipeline.start(&user, &repl, wanted.language, files);
    match started.await {
        Ok(opened) => Ok(axum::Json(Started {
            terminal_url: with_ticket(&edge, &repl, opened.terminal_url).await,
            success: true,
            pod_created: opened.created,
            message: "Resources created successfully",
            namespace: user.namespace(),
            repl_id: repl.into(),
            url: opened.url,
        })),
        Err(not) => match not.reason() {
            Ok(reason) => Err(refused(FieldError::new("replId", reason))),
            // Another was faster.
            Err(PlatformError::NotFound(_)) => {
                let error = FieldError::new("replId", "is not available; choose another");
                Err(refused(error))
            }
            Err(PlatformError::Unavailable(problem) | PlatformError::NotReady(problem)) => {
                tracing::error!(repl_id = %repl, error = %problem, "a repl could not be started");
                Err(failed(problem))
            }
        },
    }
}

/// The URL as it can be opened now. Later, and when no ticket could be made, `POST /repls/{id}/ticket`
/// gives one.
async fn with_ticket(edge: &Edge, repl: &ReplId, url: String) -> String {
    match runner::issue(edge, repl).await {
        Ok(ticket) => format!("{url}?ticket={ticket}"),
        Err(error) => {
            tracing::warn!(repl_id = %repl, %error, "a started repl's terminal URL has no ticket");
            url
        }
    }
}

struct Wanted {
    repl: ReplId,
    user: Option<UserId>,
    language: Option<&'static Language>,
}

impl Wanted {
    fn of(body: &Start) -> Result<Self, FieldError> {
        let Some(repl) = body.repl_id.as_deref() else {
            return Err(FieldError::new("replId", "is required"));
        };
        if body.user_id.is_none() && body.language.is_none() {
            return Err(FieldError::new("language", "or userId is required"));
        }
        let user = body.user_id.as_deref().map(str::parse);
        let language = body.language.as_deref().map(|name| {
            Language::named(name).ok_or_else(|| {
                let name: String = name.chars().take(40).collect();
                let known = Language::names();
                FieldError::new(
                    "language",
                    format!("{name:?} is unknown; known are {known}"),
                )
            })
        });
        let wrong =
            |field: &str, error: crate::model::IdError| FieldError::new(field, error.to_string());
        Ok(Self {
            repl: repl.parse().map_err(|error| wrong("replId", error))?,
            user: user.transpose().map_err(|error| wrong("userId", error))?,
            language: language.transpose()?,
        })
    }
}

async fn user_of(edge: &Edge, caller: &Caller, repl: &ReplId) -> Result<UserId, HttpProblem> {
    if let Role::User(user) = &caller.role {
        return Ok(user.clone());
    }
    let kept_for = repl.default_of();
    let owner = edge.platform.owner(repl).await;
    let owner = owner.map_err(|error| failed(platform_problem(error).problem().clone()))?;
    match owner.or(kept_for) {
        Some(user) => Ok(user),
        None => repl
            .as_str()
            .parse()
            .map_err(|error: crate::model::IdError| {
                refused(FieldError::new("userId", error.to_string()))
            }),
    }
}

fn refused(error: FieldError) -> HttpProblem {
    unsuccessful(field_refused(&error))
}

/// Gantry's side or the operator's: one message for all, and what is wrong beside it.
fn failed(problem: Problem) -> HttpProblem {
    let error = json!(problem);
    let problem = HttpProblem::new(StatusCode::INTERNAL_SERVER_ERROR, problem);
    unsuccessful(problem)
        .with("message", "Failed to create resources".into())
        .with("error", error)
}
