//! A server that fails on purpose in ways a real one seldom does. It keeps documents as the real one
//! does: an id is created once.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, post};
use serde_json::{Value, json};

/// What a bulk request meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// Every third record is refused for now.
    BusyForSome,
    /// The whole request is.
    Busy,
    /// Everything is taken, and the answer is a failure.
    FailsAfterTaking,
    /// Everything is taken, and the answer breaks off.
    CutAfterTaking,
    /// Nothing is taken and the answer breaks off.
    Cut,
    /// A proxy answers instead.
    Nonsense,
    /// The login is not taken.
    Forbidden,
    /// The disk is full: every index is closed to writing.
    Blocked,
}

#[derive(Default)]
pub(super) struct Seen {
    /// By id.
    pub(super) documents: BTreeMap<String, (String, Value)>,
    /// What was put elsewhere, by path.
    pub(super) put: BTreeMap<String, Value>,
    pub(super) faults: VecDeque<Fault>,
    pub(super) bulks: usize,
    /// Bytes of a body past which it is too large.
    pub(super) most_bytes: Option<usize>,
    /// It has lifecycle management and data streams.
    pub(super) full: bool,
    /// Templates and policies may not be changed.
    pub(super) read_only: bool,
    pub(super) authorization: Option<String>,
    /// How far journals were shipped, as it was told.
    pub(super) journals: BTreeMap<String, Value>,
    pub(super) search: Search,
}

/// How a search goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Search {
    /// Nothing is found.
    #[default]
    Empty,
    /// It is given up there.
    GivenUp,
    /// No answer comes.
    Hangs,
}

impl Seen {
    /// Forgets everything, as another server in its place would not know it.
    pub(super) fn wipe(&mut self) {
        self.documents.clear();
        self.put.clear();
        self.journals.clear();
    }
}

#[derive(Clone, Default)]
pub(super) struct Scripted(Arc<Mutex<Seen>>);

impl Scripted {
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Seen) -> T) -> T {
        work(&mut self.0.lock().unwrap())
    }

    /// Serves until the runtime ends.
    pub(super) async fn serve(&self, at: SocketAddr) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new()
            .route("/_bulk", post(bulk))
            .route("/{*path}", any(other))
            .with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }
}

/// An answer that ends before it is whole.
fn cut() -> Response {
    let pieces = futures_util::stream::iter([
        Ok(Bytes::from_static(b"{\"items\":[")),
        Err(std::io::Error::other("cut")),
    ]);
    Body::from_stream(pieces).into_response()
}

async fn bulk(State(server): State<Scripted>, headers: HeaderMap, body: Bytes) -> Response {
    assert_eq!(headers["content-encoding"], "gzip");
    server.with(|seen| {
        seen.bulks += 1;
        let login = headers.get("authorization");
        seen.authorization = login.map(|login| login.to_str().unwrap().to_owned());
        let mut text = String::new();
        flate2::read::GzDecoder::new(&body[..])
            .read_to_string(&mut text)
            .unwrap();
        if seen.most_bytes.is_some_and(|most| text.len() > most) {
            return StatusCode::PAYLOAD_TOO_LARGE.into_response();
        }
        let fault = seen.faults.pop_front().unwrap_or(Fault::None);
        match fault {
            Fault::Cut => return cut(),
            Fault::Busy => return StatusCode::TOO_MANY_REQUESTS.into_response(),
            Fault::Nonsense => return "<html>Welcome</html>".into_response(),
            Fault::Forbidden => return StatusCode::FORBIDDEN.into_response(),
            _ => {}
        }
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let items: Vec<Value> = lines
            .chunks(2)
            .enumerate()
            .map(|(n, pair)| json!({"create": create(seen, fault, n, &pair[0], &pair[1])}))
            .collect();
        match fault {
            Fault::FailsAfterTaking => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            Fault::CutAfterTaking => cut(),
            _ => axum::Json(json!({"items": items})).into_response(),
        }
    })
}

fn create(seen: &mut Seen, fault: Fault, n: usize, action: &Value, document: &Value) -> Value {
    let text = |name: &str| action["create"][name].as_str().unwrap().to_owned();
    let (index, id) = (text("_index"), text("_id"));
    let error = |status: u16, kind: &str| json!({"status": status, "error": {"type": kind, "reason": "scripted"}});
    if fault == Fault::BusyForSome && n.is_multiple_of(3) {
        return error(429, "es_rejected_execution_exception");
    }
    if fault == Fault::Blocked {
        return error(403, "cluster_block_exception");
    }
    if document["message"].as_str().unwrap().contains("refuse me") {
        return error(400, "document_parsing_exception");
    }
    if seen.documents.contains_key(&id) {
        return error(409, "version_conflict_engine_exception");
    }
    seen.documents.insert(id, (index, document.clone()));
    json!({"status": 201})
}

async fn other(
    State(server): State<Scripted>,
    method: Method,
    uri: Uri,
    Path(path): Path<String>,
    body: Bytes,
) -> Response {
    let searches = path.ends_with("_search");
    if searches && server.with(|seen| seen.search) == Search::Hangs {
        std::future::pending::<()>().await;
    }
    server.with(|seen| match (method, path.as_str()) {
        (Method::PUT, _) if path.contains("_doc/") => {
            let document = serde_json::from_slice(&body).unwrap();
            seen.journals.insert(path, document);
            axum::Json(json!({})).into_response()
        }
        (Method::GET, _) if path.contains("_doc/") => match seen.journals.get(&path) {
            Some(document) => axum::Json(document.clone()).into_response(),
            None => StatusCode::NOT_FOUND.into_response(),
        },
        (Method::POST, _) if path.ends_with("_refresh") => axum::Json(json!({})).into_response(),
        (Method::POST, _) if searches => {
            let given_up = seen.search == Search::GivenUp;
            let found =
                json!({"timed_out": given_up, "_shards": {"failed": 0}, "hits": {"hits": []}});
            axum::Json(found).into_response()
        }
        (Method::GET, "_index_template/gantry-*") => {
            let names = seen
                .put
                .keys()
                .filter_map(|path| path.strip_prefix("_index_template/"));
            let found: Vec<Value> = names.map(|name| json!({"name": name})).collect();
            axum::Json(json!({"index_templates": found})).into_response()
        }
        (Method::PUT, _) if seen.read_only => StatusCode::FORBIDDEN.into_response(),
        (Method::PUT, _) => {
            seen.put
                .insert(path, serde_json::from_slice(&body).unwrap());
            axum::Json(json!({"acknowledged": true})).into_response()
        }
        (_, "_ilm/status") if !seen.full => StatusCode::METHOD_NOT_ALLOWED.into_response(),
        (_, "_data_stream/gantry-logs-*") if !seen.full => StatusCode::BAD_REQUEST.into_response(),
        (_, "_ilm/status" | "_data_stream/gantry-logs-*") => axum::Json(json!({})).into_response(),
        (Method::GET, _) => match seen.put.get(&path) {
            Some(body) => {
                let found = json!({"index_templates": [{"index_template": body}]});
                axum::Json(found).into_response()
            }
            None => StatusCode::NOT_FOUND.into_response(),
        },
        _ => panic!("{uri} is not part of the script"),
    })
}
