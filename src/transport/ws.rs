//! The way in to `/ws/code`: who is asking is settled before the upgrade.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use utoipa::ToSchema;

use super::Edge;
use super::body::{ProblemBody, Query};
use super::caller::{self, Authenticated};
use super::peers::Kind;
use super::problem::HttpProblem;
use super::server::Peer;
use super::session;
use crate::auth::Caller;
use crate::model::Problem;

/// A ticket for one WebSocket.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ticket {
    /// Goes into `/ws/code?ticket=`; works once.
    ticket: String,
    /// Seconds it works for.
    expires_in: u64,
}

/// A single-use ticket, for browsers: they cannot send headers with a WebSocket
#[utoipa::path(post, path = "/ws/ticket", tag = "submissions",
    responses((status = 200, body = Ticket), (status = 401, body = ProblemBody)))]
pub async fn ticket(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<axum::Json<Ticket>, HttpProblem> {
    let issued = edge.tickets.issue(&caller.key_id);
    let ticket = issued.map_err(|error| HttpProblem::internal(error.to_string()))?;
    Ok(axum::Json(Ticket {
        ticket: ticket.expose_secret().to_owned(),
        expires_in: edge.tickets.lifetime().as_secs(),
    }))
}

/// The query of the upgrade request.
#[derive(Debug, Deserialize)]
pub struct CodeQuery {
    /// From `POST /ws/ticket`.
    pub ticket: Option<String>,
}

/// The WebSocket: submissions in, events and replies out (design.md §3)
#[utoipa::path(get, path = "/ws/code", tag = "submissions",
    params(("ticket" = Option<String>, Query, description = "from POST /ws/ticket, instead of a key")),
    responses((status = 101, description = "the connection is a WebSocket now"),
              (status = 401, body = ProblemBody), (status = 403, body = ProblemBody),
              (status = 426, body = ProblemBody)))]
pub async fn code(
    State(edge): State<Arc<Edge>>,
    mut request: Request,
) -> Result<Response, HttpProblem> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (mut parts, _) = request.into_parts();
    let Query(CodeQuery { ticket }) = Query::from_request_parts(&mut parts, &edge).await?;
    let passed = edge.peers.is_peer(&parts.headers);
    let caller = caller_of(&edge, &parts, ticket).await?;
    let accept = accept_key(&parts.headers)?;
    let peer = parts.extensions.get::<Peer>().cloned();
    let task_edge = Arc::clone(&edge);
    edge.shutdown.tasks.spawn(async move {
        if let Ok(io) = upgrade.await {
            session::run(task_edge, caller, passed, io).await;
        }
        // Held until here: an upgraded connection counts as one.
        drop(peer);
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_ACCEPT, accept),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response())
}

/// Who asks for a WebSocket: by key, or by the ticket in the URL.
pub async fn caller_of(
    edge: &Edge,
    parts: &axum::http::request::Parts,
    ticket: Option<String>,
) -> Result<Caller, HttpProblem> {
    if let Some(caller) = caller::by_peer(edge, parts) {
        return Ok(caller);
    }
    if let Some(caller) = caller::by_key(edge, parts).await? {
        caller::holds(parts, &caller)?;
        return Ok(caller);
    }
    let Some(ticket) = ticket else {
        return Err(HttpProblem::unauthorized(
            "the request carries no key and no ticket",
        ));
    };
    let key_id = match edge.tickets.redeem(&ticket) {
        Some(key_id) => Some(key_id),
        None => edge.peers.redeem(Kind::Ticket, &ticket).await,
    };
    let caller = key_id
        .and_then(|key_id| edge.keys.caller(&key_id))
        .ok_or_else(|| {
            let cause = "the ticket was used before, is older than 30 s, or is not one";
            caller::failed(edge, parts, cause)
        })?;
    caller::holds(parts, &caller)?;
    Ok(caller)
}

/// Checks the handshake of RFC 6455 §4.2.1 and answers its challenge.
fn accept_key(headers: &HeaderMap) -> Result<HeaderValue, HttpProblem> {
    let has = |name: HeaderName, token: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|value| value.trim().eq_ignore_ascii_case(token))
    };
    if !has(header::CONNECTION, "upgrade") || !has(header::UPGRADE, "websocket") {
        return Err(needs_upgrade(
            "the request asks for no upgrade to websocket",
        ));
    }
    if !has(header::SEC_WEBSOCKET_VERSION, "13") {
        return Err(needs_upgrade("the WebSocket version is not 13"));
    }
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .ok_or_else(|| needs_upgrade("the header Sec-WebSocket-Key is missing"))?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| needs_upgrade("the header Sec-WebSocket-Key is not valid"))
}

fn needs_upgrade(cause: &str) -> HttpProblem {
    HttpProblem::new(
        StatusCode::UPGRADE_REQUIRED,
        Problem::new(
            "upgrade_required",
            "This route speaks WebSocket",
            cause,
            "Connect with a WebSocket client, such as wscat -c ws://HOST:PORT/ws/code",
        ),
    )
}
