//! Who is asking: a key in a header, or a browser's session cookie.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};

use super::Edge;
use super::connections::Full;
use super::peers::Kind;
use super::problem::HttpProblem;
use super::server::Peer;
use crate::auth::{Caller, Role, TooMany};
use crate::model::{Problem, UserId};

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
        let Uncounted(caller) = Uncounted::from_request_parts(parts, edge).await?;
        // The replica that was asked has counted its client's request.
        if !edge.peers.is_peer(&parts.headers) {
            edge.rates.request(&caller.key_id).map_err(too_many)?;
        }
        Ok(Self(caller))
    }
}

/// The same on a route that is bounded in another way than by requests per second.
pub struct Uncounted(pub Caller);

impl FromRequestParts<Arc<Edge>> for Uncounted {
    type Rejection = HttpProblem;

    async fn from_request_parts(parts: &mut Parts, edge: &Arc<Edge>) -> Result<Self, HttpProblem> {
        let caller = match by_peer(edge, parts) {
            Some(caller) => caller,
            None => {
                let caller = match by_key(edge, parts).await? {
                    Some(caller) => caller,
                    None => by_cookie(edge, parts).await?,
                };
                holds(parts, &caller)?;
                caller
            }
        };
        parts.extensions.insert(OpenedBy(caller.key_id.clone()));
        Ok(Self(caller))
    }
}

/// The id of the key that a request or a connection came with, and with which it ends.
#[derive(Debug, Clone)]
pub struct OpenedBy(pub String);

impl OpenedBy {
    /// An error when the key was revoked since: reading a body can take a client as long as it likes.
    pub fn still_counts(&self, edge: &Edge) -> Result<(), HttpProblem> {
        match edge.keys.caller(&self.0) {
            Some(_) => Ok(()),
            None => Err(key_revoked()),
        }
    }
}

/// The answer to a request whose key was revoked while it was under way.
pub fn key_revoked() -> HttpProblem {
    HttpProblem::unauthorized("the key was revoked while the request was under way")
}

/// Counts the request's connection for its caller.
pub fn holds(parts: &Parts, caller: &Caller) -> Result<(), HttpProblem> {
    let Some(peer) = parts.extensions.get::<Peer>() else {
        return Ok(());
    };
    peer.belongs_to(caller).map_err(|Full(most)| {
        let problem = Problem::new(
            "too_many_connections",
            "Too many connections are open with this key",
            format!("a key may have {most} at one time, WebSockets included"),
            "Close connections that are not needed, or send several submissions over one WebSocket. Operators: see GANTRY_MAX_CONNECTIONS_PER_KEY",
        );
        HttpProblem::new(StatusCode::TOO_MANY_REQUESTS, problem).retry_after(1)
    })
}

/// The caller of the key in the headers; `None` without one; a wrong one is an error even beside a
/// valid cookie.
pub async fn by_key(edge: &Edge, parts: &Parts) -> Result<Option<Caller>, HttpProblem> {
    let Some(key) = header_key(&parts.headers) else {
        return Ok(None);
    };
    match authenticated(edge, key).await {
        Some(caller) => Ok(Some(caller)),
        None => Err(failed(
            edge,
            parts,
            "the key is unknown, revoked or mistyped",
        )),
    }
}

/// The caller behind a key's text, whichever replica made it, and however lately.
pub async fn authenticated(edge: &Edge, key: &str) -> Option<Caller> {
    let known = edge.keys.authenticate(key);
    if known.is_some() || !edge.keys.is_strange(key) {
        return known;
    }
    edge.peers.ask_for_keys(&edge.keys).await;
    edge.keys.authenticate(key)
}

/// The caller for whom another replica asks.
pub fn by_peer(edge: &Edge, parts: &Parts) -> Option<Caller> {
    let caller = edge.keys.caller(edge.peers.caller(&parts.headers)?)?;
    // The replica that was asked counts its client.
    if let Some(peer) = parts.extensions.get::<Peer>() {
        peer.belongs_to_replica();
    }
    Some(caller)
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
    let client = edge.forwarded.client(peer.address.ip(), &parts.headers);
    match edge.rates.failure(client.into()) {
        Ok(()) => HttpProblem::unauthorized(cause),
        Err(too_often) => too_many(too_often),
    }
}

/// Whether a request to Gantry itself carries a key or a session that counts, as far as it is known here without
/// asking anybody.
fn is_known(edge: &Edge, headers: &HeaderMap) -> bool {
    let by_session = || {
        let mut sessions = session_cookies(edge, headers).into_iter();
        sessions.any(|cookie| edge.sessions.key_id(cookie).is_some())
    };
    match header_key(headers) {
        Some(key) => edge.keys.authenticate(key).is_some(),
        None => edge.peers.is_peer(headers) || by_session(),
    }
}

/// Counts a request of somebody who is not known; an error when their address asks too often. Those with a key
/// are never counted with them.
pub fn count_strangers(
    edge: &Edge,
    peer: Option<&Peer>,
    headers: &HeaderMap,
) -> Result<(), HttpProblem> {
    let Some(peer) = peer.filter(|_| !is_known(edge, headers)) else {
        return Ok(());
    };
    let client = edge.forwarded.client(peer.address.ip(), headers);
    edge.rates.stranger(client.into()).map_err(too_many)
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

/// Session cookies of one request that are looked up, the last ones.
const MAX_COOKIES: usize = 8;

/// The caller of the last session cookie that is valid: another site may have put more of the name.
async fn by_cookie(edge: &Edge, parts: &Parts) -> Result<Caller, HttpProblem> {
    let mut any = false;
    for cookie in session_cookies(edge, &parts.headers) {
        any = true;
        let key_id = match edge.sessions.key_id(cookie) {
            Some(key_id) => Some(key_id),
            None => edge.peers.redeem(Kind::Session, cookie).await,
        };
        // The key may have been revoked since: its sessions end with it.
        if let Some(caller) = key_id.and_then(|key_id| edge.keys.caller(&key_id)) {
            return Ok(caller);
        }
    }
    if any {
        let cause = "the request carries no key, and its session is unknown or has ended";
        return Err(failed(edge, parts, cause));
    }
    Err(HttpProblem::unauthorized(
        "the request carries no key and no valid session",
    ))
}

/// The values of the session cookie, the last one first.
pub fn session_cookies<'a>(edge: &Edge, headers: &'a HeaderMap) -> Vec<&'a str> {
    let name = edge.cookie.name();
    let pairs = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='));
    let mut values: Vec<&str> = pairs
        .filter(|(named, _)| *named == name)
        .map(|(_, value)| value)
        .collect();
    values.reverse();
    values.truncate(MAX_COOKIES);
    values
}

/// Which cookie a session is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cookie {
    /// Over plain HTTP any page of this host, and with a domain any of its neighbours, can set it.
    Plain,
    /// Browsers take it over TLS only, for this host only.
    Secure,
}

impl Cookie {
    /// Every name of a session cookie: none is a program's affair.
    pub const NAMES: [&str; 2] = [Self::Plain.name(), Self::Secure.name()];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "gantry_session",
            Self::Secure => "__Host-gantry_session",
        }
    }

    /// The header that sets it.
    pub fn set(self, value: &str, seconds: u64) -> String {
        let secure = match self {
            Self::Plain => "",
            Self::Secure => "; Secure",
        };
        let name = self.name();
        format!("{name}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={seconds}{secure}")
    }
}

/// The answer to who asked too often.
pub fn too_many(error: TooMany) -> HttpProblem {
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
