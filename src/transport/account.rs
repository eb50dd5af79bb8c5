//! Signing a browser in and out, and what the page must know before it can work.

use std::sync::Arc;

use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::body::{Json, ProblemBody};
use super::caller::{self, Authenticated};
use super::problem::HttpProblem;
use super::{Edge, no_content};
use crate::auth::{Role, SESSION_LIFETIME};
use crate::model::LANGUAGES;

/// Who is signed in.
#[derive(Debug, Serialize, ToSchema)]
pub struct Who {
    /// `admin` or `user`.
    role: &'static str,
    /// Whose key it is, for a user's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    /// The key's public name.
    key_id: String,
}

/// Who the key or the session stands for
#[utoipa::path(get, path = "/session", tag = "account",
    responses((status = 200, body = Who), (status = 401, body = ProblemBody)))]
pub async fn session(Authenticated(caller): Authenticated) -> axum::Json<Who> {
    let (role, user_id) = match caller.role {
        Role::Admin => ("admin", None),
        Role::User(user) => ("user", Some(user.into())),
    };
    axum::Json(Who {
        role,
        user_id,
        key_id: caller.key_id,
    })
}

/// What a browser signs in with: one of the two.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SignIn {
    /// The token of a sign-in link; works once.
    #[serde(default, deserialize_with = "secret")]
    #[schema(value_type = Option<String>)]
    token: Option<SecretString>,
    /// A key.
    #[serde(default, deserialize_with = "secret")]
    #[schema(value_type = Option<String>)]
    key: Option<SecretString>,
}

/// Text that must not be printed from here on.
fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SecretString>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(SecretString::from))
}

/// Sign a browser in: answers with the session cookie
#[utoipa::path(post, path = "/session", tag = "account", request_body = SignIn, security(()),
    responses((status = 204), (status = 400, body = ProblemBody), (status = 401, body = ProblemBody)))]
pub async fn sign_in(
    State(edge): State<Arc<Edge>>,
    request: Request,
) -> Result<Response, HttpProblem> {
    let (parts, body) = request.into_parts();
    let request = Request::from_parts(parts.clone(), body);
    let Json(SignIn { token, key }) = Json::from_request(request, &edge).await?;
    let key_id = match (&token, &key) {
        (Some(token), None) => edge
            .sign_ins
            .redeem(token.expose_secret())
            .filter(|key_id| edge.keys.caller(key_id).is_some())
            .ok_or("the sign-in token was used before, is older than an hour, or is not one"),
        (None, Some(key)) => caller::authenticated(&edge, key.expose_secret())
            .await
            .map(|caller| caller.key_id)
            .ok_or("the key is unknown, revoked or mistyped"),
        _ => {
            let cause = "the body needs either token or key";
            return Err(HttpProblem::bad_request(
                "What to sign in with is missing",
                cause,
            ));
        }
    };
    let key_id = key_id.map_err(|cause| caller::failed(&edge, &parts, cause))?;
    edge.rates.sign_in(&key_id).map_err(caller::too_many)?;
    let made = on_disk(&edge, move |edge| edge.sessions.create(&key_id)).await?;
    let cookie = cookie(&edge, made.expose_secret(), SESSION_LIFETIME.as_secs())?;
    tracing::info!("a browser signed in");
    Ok(([(header::SET_COOKIE, cookie)], no_content()).into_response())
}

/// Sign the browser out
#[utoipa::path(delete, path = "/session", tag = "account", security(()), responses((status = 204)))]
pub async fn sign_out(
    State(edge): State<Arc<Edge>>,
    headers: HeaderMap,
) -> Result<Response, HttpProblem> {
    for value in caller::session_cookies(&edge, &headers) {
        let value = value.to_owned();
        on_disk(&edge, move |edge| edge.sessions.end(&value)).await?;
    }
    Ok(([(header::SET_COOKIE, cookie(&edge, "", 0)?)], no_content()).into_response())
}

/// Work that waits for the disk, off the threads that serve.
async fn on_disk<T: Send + 'static>(
    edge: &Arc<Edge>,
    work: impl FnOnce(&Edge) -> Result<T, crate::auth::AuthError> + Send + 'static,
) -> Result<T, HttpProblem> {
    // One at a time: those that wait here hold no thread that the journal may need.
    let _one = edge.signing.lock().await;
    let edge = Arc::clone(edge);
    let done = tokio::task::spawn_blocking(move || work(&edge)).await;
    done.map_err(|error| HttpProblem::internal(error.to_string()))?
        .map_err(|error| {
            tracing::error!(%error, "the session store cannot be written");
            HttpProblem::internal("the session could not be stored")
        })
}

fn cookie(edge: &Edge, value: &str, seconds: u64) -> Result<HeaderValue, HttpProblem> {
    let mut value = HeaderValue::from_str(&edge.cookie.set(value, seconds))
        .map_err(|_| HttpProblem::internal("the cookie could not be made"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// One language of the table.
#[derive(Debug, Serialize, ToSchema)]
pub struct LanguageInfo {
    /// The name a submission uses.
    name: &'static str,
    /// The file that `code` becomes.
    entrypoint: &'static str,
    /// Extensions of its files.
    extensions: &'static [&'static str],
    /// Whether it has a compile step.
    compiled: bool,
    /// What runs test files.
    test_runner: &'static str,
}

/// The languages code can be in.
#[derive(Debug, Serialize, ToSchema)]
pub struct Languages {
    /// In the order the page lists them.
    languages: Vec<LanguageInfo>,
}

/// The languages code can be in
#[utoipa::path(get, path = "/languages", tag = "submissions",
    responses((status = 200, body = Languages), (status = 401, body = ProblemBody)))]
pub async fn languages(_: Authenticated) -> axum::Json<Languages> {
    let info = |language: &crate::model::Language| LanguageInfo {
        name: language.name,
        entrypoint: language.entrypoint,
        extensions: language.extensions,
        compiled: language.compile.is_some(),
        test_runner: language.tests.name(),
    };
    axum::Json(Languages {
        languages: LANGUAGES.iter().map(info).collect(),
    })
}
