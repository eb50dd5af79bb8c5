//! What replicas ask each other. Not part of the public interface: only who knows the replicas' secret
//! is answered.

use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::routing::post;

use super::{Answer, Credential, Greeted, Greeting, KeyOf, Kind, Overtaking, Question, follow};
use crate::model::UserId;
use crate::transport::Edge;
use crate::transport::body::Json;
use crate::transport::caller;
use crate::transport::problem::HttpProblem;

/// What replicas ask each other.
pub fn routes() -> Router<Arc<Edge>> {
    Router::new()
        .route("/peer/hello", post(hello))
        .route("/peer/ask", post(ask))
        .route("/peer/overtake", post(overtake))
        .route("/peer/credential", post(credential))
        .route("/peer/follow", post(follow::follow))
}

/// A request of another replica's.
pub struct FromPeer;

impl FromRequestParts<Arc<Edge>> for FromPeer {
    type Rejection = HttpProblem;

    async fn from_request_parts(parts: &mut Parts, edge: &Arc<Edge>) -> Result<Self, HttpProblem> {
        if edge.peers.is_peer(&parts.headers) {
            return Ok(Self);
        }
        let cause = "this route is for other replicas of the server";
        Err(caller::failed(edge, parts, cause))
    }
}

/// Who is there, and which keys it knows.
async fn hello(
    _: FromPeer,
    State(edge): State<Arc<Edge>>,
    Json(greeting): Json<Greeting>,
) -> axum::Json<Greeted> {
    let (version, text) = edge.keys.own();
    axum::Json(Greeted {
        replica: edge.peers.replica.clone(),
        keys: (version != greeting.keys).then_some(text),
        version,
    })
}

/// Whether a submission is here.
async fn ask(
    _: FromPeer,
    State(edge): State<Arc<Edge>>,
    Json(question): Json<Question>,
) -> axum::Json<Answer> {
    let peers = &edge.peers;
    let here = peers.replica.as_str();
    let id = question.submission;
    // The claim first: once it is dropped, the journal knows.
    let mine = peers
        .claims
        .answer(id, question.claim, here, &question.replica)
        || edge.journal.submission(id).is_some();
    axum::Json(Answer {
        replica: here.to_owned(),
        mine,
    })
}

/// Has what is under way here for a repl not be deployed: something else was asked of it later.
async fn overtake(
    _: FromPeer,
    State(edge): State<Arc<Edge>>,
    Json(Overtaking { repl, user, why }): Json<Overtaking>,
) -> axum::Json<Answer> {
    let whose = |owner: &UserId| user.as_ref().is_none_or(|user| user == owner);
    edge.pipeline.overtake_here(&repl, whose, &why).await;
    axum::Json(Answer {
        replica: edge.peers.replica.clone(),
        mine: true,
    })
}

/// The key that a credential of this replica's stands for.
async fn credential(
    _: FromPeer,
    State(edge): State<Arc<Edge>>,
    Json(Credential { kind, text }): Json<Credential>,
) -> axum::Json<KeyOf> {
    let key_id = match kind {
        Kind::Session => edge.sessions.key_id(&text),
        Kind::Ticket => edge.tickets.redeem(&text),
    };
    axum::Json(KeyOf { key_id })
}
