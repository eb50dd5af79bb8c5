//! Services over HTTP: what is wanted, what is, and what happened.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::Edge;
use super::body::{Json, ProblemBody, Query, field_refused};
use super::caller::{Authenticated, user_of};
use super::problem::HttpProblem;
use super::repls::platform_problem;
use crate::auth::{Caller, Role};
use crate::model::{
    ContainerStatus, FieldError, NodeStatus, Problem, ServiceEvent, ServiceName, ServiceOutcome,
    ServiceStatus, ServicesRequest, Snapshot, UserId,
};
use crate::platform::{Services, ServicesError};

/// What became of each service.
#[derive(Debug, Serialize, ToSchema)]
pub struct Applied {
    /// In the body's order.
    #[schema(value_type = Vec<Object>)]
    services: Vec<ServiceOutcome>,
}

/// Make services, or make them more, fewer or another image
///
/// Nothing is made when any field is wrong. `container` may be left out for a service that is there.
#[utoipa::path(post, path = "/service", tag = "services",
    request_body(content = Object, description = "`userId`: whose; an admin's own (`admin`) when it is left out",
        example = json!({ "services": [{ "serviceName": "shop", "replicas": 3,
            "container": { "name": "shop", "image": "nginxinc/nginx-unprivileged:1.27", "command": [], "args": [], "env": {} } }] })),
    responses((status = 200, body = Applied), (status = 400, body = ProblemBody),
              (status = 403, body = ProblemBody), (status = 501, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn apply(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    body: Result<Json<ServicesRequest>, HttpProblem>,
) -> Result<axum::Json<Applied>, HttpProblem> {
    // First of all: without a cluster no body is the right one.
    let services = platform(&edge)?;
    let Json(request) = body?;
    let (user, specs) = request.validate().map_err(|error| field_refused(&error))?;
    let user = user_of(&caller, user)?;
    let outcomes = services
        .apply(&user, &specs)
        .await
        .map_err(|error| match error {
            ServicesError::Field(error) => field_refused(&error),
            ServicesError::Platform(error) => platform_problem(error),
        })?;
    let failed = outcomes.iter().find_map(|outcome| outcome.error.clone());
    match failed {
        None => Ok(axum::Json(Applied { services: outcomes })),
        // The first failure, and with it what became of each.
        Some(problem) => {
            tracing::error!(%user, error = %problem, "a service could not be made");
            Err(HttpProblem::unavailable(problem).with("services", json!(outcomes)))
        }
    }
}

/// Whose service a route is about.
#[derive(Debug, Default, Deserialize)]
pub struct Whose {
    #[serde(rename = "userId")]
    user_id: Option<String>,
}

/// What was ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct Removed {
    /// Always true here.
    success: bool,
    /// Which.
    #[serde(rename = "serviceName")]
    service_name: String,
}

/// End a service and everything of it
#[utoipa::path(delete, path = "/service/{name}", tag = "services",
    params(("name" = String, Path), ("userId" = Option<String>, Query, description = "Whose, when an admin asks and several have one of this name")),
    responses((status = 200, body = Removed), (status = 404, body = ProblemBody),
              (status = 501, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn remove(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(name): Path<String>,
    Query(whose): Query<Whose>,
) -> Result<axum::Json<Removed>, HttpProblem> {
    let services = platform(&edge)?;
    let (user, name) = named(&caller, services.as_ref(), &name, whose)?;
    match services.remove(&user, &name).await {
        Ok(true) => Ok(axum::Json(Removed {
            success: true,
            service_name: name.into(),
        })),
        Ok(false) => Err(HttpProblem::not_found("service")),
        Err(error) => Err(platform_problem(error)),
    }
}

/// A service's timeline.
#[derive(Debug, Serialize, ToSchema)]
pub struct Events {
    /// Which.
    #[serde(rename = "serviceName")]
    service_name: String,
    /// Whose.
    #[serde(rename = "userId")]
    user_id: String,
    /// Oldest first; the last 200, since this server watches.
    #[schema(value_type = Vec<Object>)]
    events: Vec<ServiceEvent>,
}

/// What happened to a service, oldest first
#[utoipa::path(get, path = "/service/{name}/events", tag = "services",
    params(("name" = String, Path), ("userId" = Option<String>, Query, description = "Whose, when an admin asks and several have one of this name")),
    responses((status = 200, body = Events), (status = 404, body = ProblemBody),
              (status = 501, body = ProblemBody)))]
pub async fn events(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(name): Path<String>,
    Query(whose): Query<Whose>,
) -> Result<axum::Json<Events>, HttpProblem> {
    let services = platform(&edge)?;
    let (user, name) = named(&caller, services.as_ref(), &name, whose)?;
    let events = services.events(&user, &name);
    Ok(axum::Json(Events {
        events: events.ok_or_else(|| HttpProblem::not_found("service"))?,
        service_name: name.into(),
        user_id: user.into(),
    }))
}

/// Nodes, containers and services
#[utoipa::path(get, path = "/state", tag = "services",
    responses((status = 200, body = Object), (status = 501, body = ProblemBody)))]
pub async fn state(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<axum::Json<Snapshot>, HttpProblem> {
    snapshot(&edge, &caller).map(axum::Json)
}

/// Nodes.
#[derive(Debug, Serialize, ToSchema)]
pub struct Nodes {
    /// By name; an admin sees them, nobody else.
    #[schema(value_type = Vec<Object>)]
    nodes: Vec<NodeStatus>,
}

/// Nodes, and whether they are heard of; for admins
#[utoipa::path(get, path = "/node_state", tag = "services",
    responses((status = 200, body = Nodes), (status = 501, body = ProblemBody)))]
pub async fn node_state(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<axum::Json<Nodes>, HttpProblem> {
    let Snapshot { nodes, .. } = snapshot(&edge, &caller)?;
    Ok(axum::Json(Nodes { nodes }))
}

/// Containers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Containers {
    /// Those of the caller's services; an admin sees everybody's.
    #[schema(value_type = Vec<Object>)]
    containers: Vec<ContainerStatus>,
}

/// Containers, what they do and why
#[utoipa::path(get, path = "/container_state", tag = "services",
    responses((status = 200, body = Containers), (status = 501, body = ProblemBody)))]
pub async fn container_state(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<axum::Json<Containers>, HttpProblem> {
    let Snapshot { containers, .. } = snapshot(&edge, &caller)?;
    Ok(axum::Json(Containers { containers }))
}

/// Services.
#[derive(Debug, Serialize, ToSchema)]
pub struct States {
    /// The caller's; an admin sees everybody's.
    #[schema(value_type = Vec<Object>)]
    services: Vec<ServiceStatus>,
}

/// Services, how many of each run and why not all
#[utoipa::path(get, path = "/service_state", tag = "services",
    responses((status = 200, body = States), (status = 501, body = ProblemBody)))]
pub async fn service_state(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<axum::Json<States>, HttpProblem> {
    let Snapshot { services, .. } = snapshot(&edge, &caller)?;
    Ok(axum::Json(States { services }))
}

fn snapshot(edge: &Edge, caller: &Caller) -> Result<Snapshot, HttpProblem> {
    let of = match &caller.role {
        Role::Admin => None,
        Role::User(user) => Some(user),
    };
    Ok(platform(edge)?.snapshot(of))
}

fn platform(edge: &Edge) -> Result<Arc<dyn Services>, HttpProblem> {
    edge.platform.services().ok_or_else(|| {
        HttpProblem::new(
            StatusCode::NOT_IMPLEMENTED,
            Problem::new(
                "services_need_kubernetes",
                "Services need Kubernetes",
                format!(
                    "this server runs on the {} platform: one machine, on which nothing can be brought back elsewhere",
                    edge.platform.name()
                ),
                "Start the server with GANTRY_PLATFORM=kubernetes and a KUBECONFIG, or install it in a cluster with infrastructure/ (README.md, In a cluster); \
                 without a cluster at hand, scripts/testbed up makes a small one on a Linux machine",
            ),
        )
    })
}

/// The service of this name that the caller means, and whose it is. What is another's looks like what
/// is not there.
fn named(
    caller: &Caller,
    services: &dyn Services,
    name: &str,
    whose: Whose,
) -> Result<(UserId, ServiceName), HttpProblem> {
    let not_found = || HttpProblem::not_found("service");
    let name: ServiceName = name.parse().map_err(|_| not_found())?;
    let mut owners = services.owners(&name);
    owners.retain(|owner| caller.sees(owner));
    if let Some(user) = &whose.user_id {
        owners.retain(|owner| owner.as_str() == user);
    }
    match owners.as_slice() {
        [] => Err(not_found()),
        [owner] => Ok((owner.clone(), name)),
        several => {
            let names: Vec<&str> = several.iter().map(UserId::as_str).collect();
            let reason = format!(
                "is required in the query: {} have a service {name}",
                names.join(", ")
            );
            Err(field_refused(&FieldError::new("userId", reason)))
        }
    }
}
