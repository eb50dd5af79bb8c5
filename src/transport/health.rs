//! Whether the server lives, whether it can work, and its numbers.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio::time::timeout;
use utoipa::ToSchema;

use super::Edge;
use super::body::ProblemBody;
use super::caller::Authenticated;
use super::problem::HttpProblem;
use crate::auth::Role;
use crate::model::Problem;

/// Longest wait for the platform: less than a probe waits.
const PLATFORM_TIMEOUT: Duration = Duration::from_secs(2);

/// That all is well.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    status: &'static str,
    /// What is wrong although submissions are taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    details: Vec<String>,
}

/// Whether this asks for the server's health.
pub fn is_asked_by<B>(request: &axum::http::Request<B>) -> bool {
    ["/healthz", "/readyz"].contains(&request.uri().path())
}

/// Damaged places told one by one, and files.
const MOST_DETAILS: usize = 20;

/// Files beside the journal that could not be read and were set aside.
fn set_aside(edge: &Edge) -> Vec<String> {
    let mut files = edge.platform.set_aside();
    let name = |path: &std::path::Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
    files.extend(edge.sessions.set_aside().and_then(name));
    files
}

/// What cannot be read. Nobody has to sign in to ask, so that no submission is named.
fn damage(edge: &Edge) -> Vec<String> {
    let damage = edge.journal.damage();
    let mut details: Vec<String> = damage
        .iter()
        .take(MOST_DETAILS)
        .map(|damage| {
            let file = damage
                .file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy();
            let (offset, bytes) = (damage.offset, damage.bytes);
            match bytes {
                0 => format!("journal: {file} is missing"),
                _ => format!("journal: {bytes} bytes at byte {offset} of {file} are passed over"),
            }
        })
        .collect();
    if damage.len() > MOST_DETAILS {
        details.push(format!("journal: {} places in all", damage.len()));
    }
    let replaced = edge.journal.replaced();
    let mut others: Vec<String> = replaced
        .iter()
        .filter_map(|file| file.file_name())
        .map(|file| {
            format!(
                "journal: {} was damaged and has been replaced",
                file.display()
            )
        })
        .collect();
    let set_aside = set_aside(edge);
    others.extend(
        set_aside
            .iter()
            .map(|file| format!("{file} cannot be read and is set aside")),
    );
    let more = others.len().saturating_sub(MOST_DETAILS);
    others.truncate(MOST_DETAILS);
    details.append(&mut others);
    if more > 0 {
        details.push(format!("{more} more files"));
    }
    details
}

/// The server lives
#[utoipa::path(get, path = "/healthz", tag = "health", security(()),
    responses((status = 200, body = Health)))]
pub async fn alive() -> axum::Json<Health> {
    axum::Json(Health {
        status: "ok",
        details: Vec::new(),
    })
}

/// The server can take submissions
#[utoipa::path(get, path = "/readyz", tag = "health", security(()),
    responses((status = 200, body = Health), (status = 503, body = ProblemBody)))]
pub async fn ready(State(edge): State<Arc<Edge>>) -> Result<axum::Json<Health>, HttpProblem> {
    let mut causes = Vec::new();
    if edge.shutdown.token.is_cancelled() {
        causes.push("the server is stopping".to_owned());
    }
    if !edge.journal.healthy() {
        causes.push("the journal cannot be written: its disk is full or failing".to_owned());
    }
    if !edge.peers.acquainted() {
        causes.push("another replica has not answered yet".to_owned());
    }
    let name = edge.platform.name();
    match timeout(PLATFORM_TIMEOUT, edge.platform.repls()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => causes.push(format!("the {name} platform does not answer: {error}")),
        Err(_) => causes.push(format!(
            "the {name} platform did not answer within {} s",
            PLATFORM_TIMEOUT.as_secs()
        )),
    }
    if causes.is_empty() {
        Ok(axum::Json(Health {
            status: "ok",
            details: damage(&edge),
        }))
    } else {
        Err(HttpProblem::unavailable(Problem::new(
            "not_ready",
            "Gantry cannot take submissions now",
            causes.join("; "),
            "It goes on by itself when the cause is gone",
        )))
    }
}

/// Numbers in Prometheus' text format; needs an admin's key, because they are about everybody
#[utoipa::path(get, path = "/metrics", tag = "health",
    responses((status = 200, body = String, content_type = "text/plain"),
              (status = 401, body = ProblemBody), (status = 403, body = ProblemBody)))]
pub async fn numbers(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<Response, HttpProblem> {
    if caller.role != Role::Admin {
        let problem = Problem::new(
            "admins_only",
            "An admin's key is required",
            "the numbers are about every user",
            "Use a key made by `gantry key create --admin`",
        );
        return Err(HttpProblem::new(axum::http::StatusCode::FORBIDDEN, problem));
    }
    let (under_way, waiting) = edge.pipeline.load();
    metrics::gauge!("gantry_submissions_under_way").set(under_way as f64);
    metrics::gauge!("gantry_runs_waiting").set(waiting as f64);
    metrics::gauge!("gantry_files_set_aside").set(set_aside(&edge).len() as f64);
    let folder = edge.journal_folder.clone();
    if let Ok(Ok(bytes)) = tokio::task::spawn_blocking(move || folder_bytes(&folder)).await {
        metrics::gauge!("gantry_journal_bytes").set(bytes as f64);
    }
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, format)], edge.numbers.0.render()).into_response())
}

/// Bytes of the files in a folder.
fn folder_bytes(folder: &std::path::Path) -> std::io::Result<u64> {
    let sizes = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len()));
    sizes.sum()
}
