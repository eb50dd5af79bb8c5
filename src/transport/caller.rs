//! Who is asking: a key in a header, or a browser's session cookie.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};

use super::Edge;
use super::peers::Kind;
use super::problem::HttpProblem;
use super::server::Peer;
use crate::auth::{Caller, Role, TooMany};
use crate::model::{Problem, UserId};

/// Name of the session cookie.
pub const COOKIE: &str = "gantry_session";

/// Adds the ways to send a key to the API's description.
pub struct KeySchemes;

impl utoipa::Modify for KeySchemes {
    fn modify(&self, api: &mut OpenApi) {
        let components = api.components.get_or_insert_default();
        let header = ApiKey::Header(ApiKeyValue::new("X-API-Key"));
        components.add_security_scheme("key", SecurityScheme::ApiKey(header));
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    }
}

/// Whose things an admin's are when the request names nobody.
const ADMIN: &str = "admin";

/// Whose things a request is about: those of the user it names, or the key's own.
pub fn user_of(caller: &Caller, named: Option<UserId>) -> Result<UserId, HttpProblem> {
    let user = match (&caller.role, named) {
        (_, Some(named)) => named,
        (Role::User(own), None) => own.clone(),
        (Role::Admin, None) => ADMIN
            .parse()
            .map_err(|_| HttpProblem::internal("the admin's name is not a user's"))?,
    };
    if caller.may_act_for(&user) {
        return Ok(user);
    }
    Err(HttpProblem::new(
        StatusCode::FORBIDDEN,
        Problem::new(
            "forbidden",
            format!("This key may not act for {user}"),
            "userId names another user than the key's",
            "Leave userId out, or use a key of that user's",
        ),
    ))
}

/// A caller that may use HTTP routes: by key or by cookie, and not too often.
pub struct Authenticated(pub Caller);

impl FromRequestParts<Arc<Edge>> for Authenticated {
    type Rejection = HttpProblem;

    async fn from_request_parts(parts: &mut Parts, edge: &Arc<Edge>) -> Result<Self, HttpProblem> {
        if let Some(caller) = by_peer(edge, &parts.headers) {
            // The replica that was asked has counted it.
            return Ok(Self(caller));
        }
        let Uncounted(caller) = Uncounted::from_request_parts(parts, edge).await?;
        edge.rates.request(&caller.key_id).map_err(too_many)?;
        Ok(Self(caller))
    }
}

/// The same on a route that is bounded in another way than by requests per second.
pub struct Uncounted(pub Caller);

impl FromRequestParts<Arc<Edge>> for Uncounted {
    type Rejection = HttpProblem;

    async fn from_request_parts(parts: &mut Parts, edge: &Arc<Edge>) -> Result<Self, HttpProblem> {
        if let Some(caller) = by_peer(edge, &parts.headers) {
            return Ok(Self(caller));
        }
        let caller = match by_key(edge, parts)? {
            Some(caller) => caller,
            None => by_cookie(edge, &parts.headers).await.ok_or_else(|| {
                HttpProblem::unauthorized("the request carries no key and no valid session")
            })?,
        };
        Ok(Self(caller))
    }
}

/// The caller of the key in the headers; `None` without one; a wrong one is an error even beside a
/// valid cookie.
pub fn by_key(edge: &Edge, parts: &Parts) -> Result<Option<Caller>, HttpProblem> {
    let Some(key) = header_key(&parts.headers) else {
        return Ok(None);
    };
    match edge.keys.authenticate(key) {
        Some(caller) => Ok(Some(caller)),
        None => Err(failed(
            edge,
            parts,
            "the key is unknown, revoked or mistyped",
        )),
    }
}

/// The caller for whom another replica asks.
pub fn by_peer(edge: &Edge, headers: &HeaderMap) -> Option<Caller> {
    edge.keys.caller(edge.peers.caller(headers)?)
}

/// Whether another replica asks: then what is not here is not looked for elsewhere.
pub struct Passed(pub bool);

impl FromRequestParts<Arc<Edge>> for Passed {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(
        parts: &mut Parts,
        edge: &Arc<Edge>,
    ) -> Result<Self, Self::Rejection> {
        Ok(Self(edge.peers.is_peer(&parts.headers)))
    }
}

/// Counts a failure to sign in and says so.
pub fn failed(edge: &Edge, parts: &Parts, cause: &str) -> HttpProblem {
    let Some(peer) = parts.extensions.get::<Peer>() else {
        return HttpProblem::unauthorized(cause);
    };
    match edge.rates.failure(peer.address.ip()) {
        Ok(()) => HttpProblem::unauthorized(cause),
        Err(too_often) => too_many(too_often),
    }
}

fn header_key(headers: &HeaderMap) -> Option<&str> {
    if let Some(key) = headers.get("x-api-key") {
        // Not text: no key, but one was sent; it must not fall back to the cookie.
        return Some(key.to_str().unwrap_or_default());
    }
    let value = headers
        .get(header::AUTHORIZATION)?
        .to_str()
        .unwrap_or_default();
    let (scheme, key) = value.split_once(' ').unwrap_or((value, ""));
    Some(if scheme.eq_ignore_ascii_case("bearer") {
        key.trim()
    } else {
        ""
    })
}

async fn by_cookie(edge: &Edge, headers: &HeaderMap) -> Option<Caller> {
    let cookie = session_cookie(headers)?;
    let key_id = match edge.sessions.key_id(cookie) {
        Some(key_id) => key_id,
        None => edge.peers.redeem(Kind::Session, cookie).await?,
    };
    // The key may have been revoked since: its sessions end with it.
    edge.keys.caller(&key_id)
}

/// The session cookie of a request.
pub fn session_cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .find_map(|pair| pair.trim().strip_prefix(COOKIE)?.strip_prefix('='))
}

fn too_many(error: TooMany) -> HttpProblem {
    HttpProblem::new(
        StatusCode::TOO_MANY_REQUESTS,
        Problem::new(
            "too_many_requests",
            "Too many requests",
            error.to_string(),
            "Wait as long as Retry-After says; submissions over /ws/code are not limited this way",
        ),
    )
    .retry_after(error.retry_after.as_secs())
}
