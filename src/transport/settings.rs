//! What a repl runs with, over HTTP: replicas, variables and domains.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::Edge;
use super::body::{Json, ProblemBody, field_refused};
use super::caller::Authenticated;
use super::problem::HttpProblem;
use super::repls::{owned, platform_problem};
use crate::model::{
    Domain, DomainsRequest, Problem, ReplChange, ReplId, ReplSettings, Scale, ScaleRequest,
    VariablesChange,
};
use crate::pipeline::NotNamed;
use crate::platform::ConfigureError;

/// How many replicas there are to be.
#[derive(Debug, Serialize, ToSchema)]
pub struct Scaled {
    /// The repl.
    #[serde(rename = "replId")]
    repl_id: String,
    /// `replicas`, or `min`, `max` and `cpu_percent`.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    scale: Scale,
}

/// Run more or fewer replicas of a repl, or let their processor time decide
///
/// Answers when they run. A repl that does not run has them at its next start.
#[utoipa::path(post, path = "/repls/{id}/scale", tag = "repls", params(("id" = String, Path)),
    request_body(content = Object, description = "`replicas`; or `min`, `max` and `cpu_percent`, a share of the processor time that a replica requests",
        example = json!({ "min": 1, "max": 5, "cpu_percent": 70 })),
    responses((status = 200, body = Scaled), (status = 400, body = ProblemBody),
              (status = 404, body = ProblemBody), (status = 409, body = ProblemBody),
              (status = 501, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn scale(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
    Json(request): Json<ScaleRequest>,
) -> Result<axum::Json<Scaled>, HttpProblem> {
    let (repl, user) = owned(&edge, &caller, &id).await?;
    let scale = request.checked().map_err(|error| field_refused(&error))?;
    if scale.most() > edge.platform.most_replicas() {
        return Err(one_machine());
    }
    let change = ReplChange::Scale(scale);
    let configured = edge.pipeline.configure(&user, &repl, &change).await;
    configured.map_err(configure_problem)?;
    Ok(axum::Json(Scaled {
        repl_id: repl.into(),
        scale,
    }))
}

/// A repl's variables.
#[derive(Debug, Serialize, ToSchema)]
pub struct Variables {
    /// The repl.
    #[serde(rename = "replId")]
    repl_id: String,
    /// Those that are shown, with their values.
    #[schema(value_type = Object)]
    env: std::collections::BTreeMap<String, String>,
    /// The names of those that are not.
    secrets: Vec<String>,
}

impl Variables {
    fn of(repl: ReplId, settings: ReplSettings) -> axum::Json<Self> {
        axum::Json(Self {
            repl_id: repl.into(),
            env: settings.env,
            secrets: settings.secrets,
        })
    }
}

/// A repl's variables; of its secrets the names
#[utoipa::path(get, path = "/repls/{id}/env", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = Variables), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn variables(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<Variables>, HttpProblem> {
    let (repl, _) = owned(&edge, &caller, &id).await?;
    let settings = edge.platform.settings(&repl).await;
    Ok(Variables::of(repl, settings.map_err(platform_problem)?))
}

/// Give a repl its variables
///
/// What runs is started anew with them and takes over when it serves. Each release keeps its own: the next
/// one begins with these, a rollback brings back those it had. A submission's own `env` goes before them.
#[utoipa::path(put, path = "/repls/{id}/env", tag = "repls", params(("id" = String, Path)),
    request_body(content = Object, description = "`env` is shown, `secrets` are not; each takes the place of all of its kind, and stays as it is when it is left out. A secret that is null keeps its value",
        example = json!({ "env": { "COLOUR": "red" }, "secrets": { "TOKEN": "…", "KEPT": null } })),
    responses((status = 200, body = Variables), (status = 400, body = ProblemBody),
              (status = 404, body = ProblemBody), (status = 409, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn set_variables(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
    Json(change): Json<VariablesChange>,
) -> Result<axum::Json<Variables>, HttpProblem> {
    let (repl, user) = owned(&edge, &caller, &id).await?;
    let change = ReplChange::Variables(change);
    let configured = edge.pipeline.configure(&user, &repl, &change).await;
    Ok(Variables::of(repl, configured.map_err(configure_problem)?))
}

/// A repl's domains.
#[derive(Debug, Serialize, ToSchema)]
pub struct Domains {
    /// The repl.
    #[serde(rename = "replId")]
    repl_id: String,
    /// Host names of its own.
    #[schema(value_type = Vec<String>)]
    domains: Vec<Domain>,
}

/// A repl's own domains
#[utoipa::path(get, path = "/repls/{id}/domains", tag = "repls", params(("id" = String, Path)),
    responses((status = 200, body = Domains), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn domains(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
) -> Result<axum::Json<Domains>, HttpProblem> {
    let (repl, _) = owned(&edge, &caller, &id).await?;
    let settings = edge.platform.settings(&repl).await;
    Ok(axum::Json(Domains {
        repl_id: repl.into(),
        domains: settings.map_err(platform_problem)?.domains,
    }))
}

/// Give a repl its own domains
///
/// All of them at once; `[]` removes them. A new one has to be proved first: 409 `domain_not_proved` tells in
/// `proofs` which TXT records are to be in the DNS; when they are, the same request is made again.
#[utoipa::path(put, path = "/repls/{id}/domains", tag = "repls", params(("id" = String, Path)),
    request_body(content = Object, example = json!({ "domains": ["shop.example.com"] })),
    responses((status = 200, body = Domains), (status = 400, body = ProblemBody),
              (status = 404, body = ProblemBody), (status = 409, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn set_domains(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(id): Path<String>,
    Json(request): Json<DomainsRequest>,
) -> Result<axum::Json<Domains>, HttpProblem> {
    let (repl, user) = owned(&edge, &caller, &id).await?;
    let own_names = edge.own_names.each_ref().map(String::as_str);
    let domains = request.checked(&own_names);
    let domains = domains.map_err(|error| field_refused(&error))?;
    match edge.pipeline.name(&user, &repl, domains).await {
        Ok(settings) => Ok(axum::Json(Domains {
            repl_id: repl.into(),
            domains: settings.domains,
        })),
        Err(NotNamed::Failed(error)) => Err(configure_problem(error)),
        Err(NotNamed::Unproved(proofs)) => {
            let texts: Vec<String> = proofs
                .iter()
                .map(|proof| format!("{} TXT \"{}\"", proof.name, proof.value))
                .collect();
            let problem = Problem::new(
                "domain_not_proved",
                "It is not proved whose the domain is",
                format!("the DNS does not have {}", texts.join(", nor ")),
                "Put it there, and ask again when it can be seen: the DNS may take some minutes.",
            );
            let refused = HttpProblem::new(StatusCode::CONFLICT, problem);
            Err(refused.with("proofs", json!(proofs)))
        }
    }
}

fn configure_problem(error: ConfigureError) -> HttpProblem {
    match error {
        ConfigureError::Refused(error) => field_refused(&error),
        ConfigureError::Failed(error) => platform_problem(error),
    }
}

fn one_machine() -> HttpProblem {
    HttpProblem::new(
        StatusCode::NOT_IMPLEMENTED,
        Problem::new(
            "not_supported",
            "A repl has one replica here",
            "the local platform has one machine, and a second replica on it would serve nobody better",
            "Run Gantry in a cluster (GANTRY_PLATFORM=kubernetes) for more.",
        ),
    )
}
