//! Modules over HTTP: a pod for a Python module, calling its functions, what there is to call.

mod failure;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, future, stream};
use hyper::body::Body as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::json;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::body::{Json, ProblemBody, Query, field_refused};
use super::caller::{Authenticated, Uncounted, key_revoked, user_of};
use super::logs::asker;
use super::problem::HttpProblem;
use super::session::revoked;
use super::{Edge, MAX_ANSWER_BYTES, MAX_BODY_BYTES};
use crate::auth::Caller;
use crate::budget::{self, Spent};
use crate::model::{
    FieldError, ModuleName, ModuleRequest, ModuleStatus, Problem, ScaleRequest, SecretText, UserId,
    module_scale,
};
use crate::pipeline::modules::{Call, Happening, MAX_CALL, Returned};
use failure::told;

/// Largest body of a call: its arguments.
pub const MAX_CALL_BYTES: usize = 8 << 20;

/// Longest name of a function: errors repeat it.
const MAX_METHOD_BYTES: usize = 200;

/// Deepest nesting of arguments: Python's own reader goes no deeper than about 1,000.
const MAX_DEPTH: usize = 200;

/// Between two comments on a quiet stream, so that nothing in between takes it for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Whose module a route is about.
#[derive(Debug, Default, Deserialize)]
pub struct Whose {
    #[serde(rename = "userId")]
    user_id: Option<String>,
}

/// A module's pods.
#[derive(Debug, Serialize, ToSchema)]
pub struct Created {
    /// Always true here.
    success: bool,
    /// Whether this request made a pod; false: it was there.
    #[serde(rename = "podCreated")]
    pod_created: bool,
    /// What gRPC clients have to send to its `authority`, in the metadata `authorization: Bearer …`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "exposed")]
    #[schema(value_type = Option<String>)]
    token: Option<SecretText>,
    /// How it is.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    status: ModuleStatus,
}

fn exposed<S: Serializer>(token: &Option<SecretText>, serializer: S) -> Result<S::Ok, S::Error> {
    token.as_ref().map(SecretText::expose).serialize(serializer)
}

/// Start a pod that serves the module over gRPC; again: the same pod
///
/// It answers when the pod does. A module that does not exist leaves no pod. On Kubernetes `authority` and `token` are
/// for gRPC clients that call the module without this server.
#[utoipa::path(post, path = "/create_pod/{module}", tag = "modules",
    params(("module" = String, Path), ("userId" = Option<String>, Query, description = "Whose; an admin's own (`admin`) when it is left out")),
    request_body(content = Object, description = "`packages`: installed for it, `name==version`; `replicas`: how many pods",
        example = json!({ "packages": ["requests==2.32.3"], "replicas": 1 })),
    responses((status = 200, body = Created), (status = 400, body = ProblemBody), (status = 403, body = ProblemBody),
              (status = 404, body = ProblemBody), (status = 422, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn create(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(module): Path<String>,
    Query(whose): Query<Whose>,
    Json(request): Json<ModuleRequest>,
) -> Result<axum::Json<Created>, HttpProblem> {
    let modules = &edge.modules;
    let user = user(&caller, whose.user_id)?;
    let name = named("module", &module)?;
    let spec = request
        .validate(name)
        .map_err(|error| field_refused(&error))?;
    let made = modules.create(&user, &spec).await;
    let (pod_created, status) = made.map_err(|error| told(error, &spec.name, None))?;
    let token = modules.token(&user, &spec.name).await;
    let token = token.map_err(|error| told(error, &spec.name, None))?;
    Ok(axum::Json(Created {
        success: true,
        pod_created,
        token,
        status,
    }))
}

/// Modules.
#[derive(Debug, Serialize, ToSchema)]
pub struct List {
    /// State with cause; a user sees its own, an admin everybody's.
    #[schema(value_type = Vec<Object>)]
    modules: Vec<ModuleStatus>,
}

/// The modules that have pods, and how they are
#[utoipa::path(get, path = "/modules", tag = "modules", responses((status = 200, body = List)))]
pub async fn list(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
) -> Result<axum::Json<List>, HttpProblem> {
    let all = edge.modules.list().await;
    let mut modules = all.map_err(failure::platform)?;
    modules.retain(|module| caller.sees(&module.user_id));
    Ok(axum::Json(List { modules }))
}

/// Which part of a module.
#[derive(Debug, Default, Deserialize)]
pub struct Part {
    #[serde(rename = "userId")]
    user_id: Option<String>,
    #[serde(default)]
    namespace: String,
}

/// What can be called in a module: functions, signatures, docstrings
#[utoipa::path(get, path = "/modules/{module}", tag = "modules",
    params(("module" = String, Path), ("namespace" = Option<String>, Query, description = "A part of it, such as `linalg`"),
           ("userId" = Option<String>, Query, description = "Whose; an admin's own (`admin`) when it is left out")),
    responses((status = 200, body = Object), (status = 404, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn describe(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(module): Path<String>,
    Query(part): Query<Part>,
) -> Result<Response, HttpProblem> {
    let modules = &edge.modules;
    let user = user(&caller, part.user_id)?;
    let name = named("module", &module)?;
    let spent = edge.answers.take(asker(&caller), MAX_ANSWER_BYTES).await;
    let described = modules.describe(&user, &name, &part.namespace).await;
    let described = described.map_err(|error| told(error, &name, Some(&part.namespace)))?;
    large(&described, spent, ())
}

/// What was removed.
#[derive(Debug, Serialize, ToSchema)]
pub struct Removed {
    /// Always true here.
    success: bool,
    /// Which.
    module: String,
}

/// Remove a module's pods
#[utoipa::path(delete, path = "/pod/{module}", tag = "modules",
    params(("module" = String, Path), ("userId" = Option<String>, Query, description = "Whose; an admin's own (`admin`) when it is left out")),
    responses((status = 200, body = Removed), (status = 404, body = ProblemBody), (status = 503, body = ProblemBody)))]
pub async fn remove(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(module): Path<String>,
    Query(whose): Query<Whose>,
) -> Result<axum::Json<Removed>, HttpProblem> {
    let modules = &edge.modules;
    let user = user(&caller, whose.user_id)?;
    let name = named("module", &module)?;
    match modules.remove(&user, &name).await {
        Ok(true) => Ok(axum::Json(Removed {
            success: true,
            module,
        })),
        Ok(false) => Err(failure::no_pod(&name)),
        Err(error) => Err(told(error, &name, None)),
    }
}

/// Have a module served by more or fewer pods; calls are spread over them
#[utoipa::path(post, path = "/modules/{module}/scale", tag = "modules",
    request_body(content = Object, description = "`replicas`: 1 to 16; or, on Kubernetes, by processor time: `max`, `cpu_percent`, and `min` when it is not 1",
        example = json!({ "replicas": 2 })),
    params(("module" = String, Path), ("userId" = Option<String>, Query, description = "Whose; an admin's own (`admin`) when it is left out")),
    responses((status = 200, body = Object), (status = 400, body = ProblemBody), (status = 404, body = ProblemBody),
              (status = 503, body = ProblemBody)))]
pub async fn scale(
    State(edge): State<Arc<Edge>>,
    Authenticated(caller): Authenticated,
    Path(module): Path<String>,
    Query(whose): Query<Whose>,
    Json(request): Json<ScaleRequest>,
) -> Result<axum::Json<ModuleStatus>, HttpProblem> {
    let modules = &edge.modules;
    let user = user(&caller, whose.user_id)?;
    let name = named("module", &module)?;
    let scale = module_scale(request).map_err(|error| field_refused(&error))?;
    let scaled = modules.scale(&user, &name, scale).await;
    scaled
        .map(axum::Json)
        .map_err(|error| told(error, &name, None))
}

/// Which function.
#[derive(Debug, Deserialize)]
pub struct Which {
    module_name: Option<String>,
    method_name: Option<String>,
    #[serde(rename = "userId")]
    user_id: Option<String>,
}

/// What it is called with.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arguments {
    #[serde(default)]
    args: Option<Box<RawValue>>,
    #[serde(default)]
    kwargs: Option<Box<RawValue>>,
    #[serde(default)]
    timeout_ms: Option<u64>,
}

/// Where modules are called.
pub const CALL_PATH: &str = "/run_module";

/// Call a function of a module
///
/// `args` are positional. When they do not fit and there are no `kwargs`, the list is passed as one argument, and
/// `called_with` says so. With `Accept: text/event-stream`: what a generator yields (`item`) and what is printed (`output`)
/// comes while it runs; `result` or `error` is the last event.
#[utoipa::path(post, path = "/run_module", tag = "modules",
    params(("module_name" = String, Query), ("method_name" = String, Query, description = "Dotted where it is inside something: `linalg.norm`"),
           ("userId" = Option<String>, Query, description = "Whose; an admin's own (`admin`) when it is left out")),
    request_body(content = Object, description = "`args`: a list; `kwargs`: an object; `timeout_ms`: at most 60000, else 10000",
        example = json!({ "args": [16, 20, 24], "kwargs": {} })),
    responses((status = 200, body = Object, description = "`{\"result\": …}`"), (status = 400, body = ProblemBody), (status = 403, body = ProblemBody),
              (status = 404, body = ProblemBody), (status = 413, body = ProblemBody), (status = 422, body = ProblemBody),
              (status = 429, body = ProblemBody), (status = 503, body = ProblemBody), (status = 504, body = ProblemBody)))]
pub async fn run(
    State(edge): State<Arc<Edge>>,
    // Bounded by how many are under way, not by how many there were.
    Uncounted(caller): Uncounted,
    Query(which): Query<Which>,
    request: Request,
) -> Result<Response, HttpProblem> {
    let modules = &edge.modules;
    let user = user(&caller, which.user_id)?;
    let name = named("module_name", &required("module_name", which.module_name)?)?;
    let method = required("method_name", which.method_name)?;
    if method.len() > MAX_METHOD_BYTES {
        let reason = format!("is longer than {MAX_METHOD_BYTES} bytes");
        return Err(field_refused(&FieldError::new("method_name", reason)));
    }
    let streams = request
        .headers()
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("text/event-stream"));
    // Before the body, which may be large: many of them at one time would only be refused afterwards.
    let begun = modules.begin(&user, &name).await;
    let begun = begun.map_err(|error| told(error, &name, Some(&method)))?;
    let _spent = match expected_bytes(&request) {
        few if few <= MAX_BODY_BYTES => None,
        many => Some(edge.arguments.take(asker(&caller), many).await),
    };
    let body = Json::<Arguments>::from_request(request, &edge).await;
    let Json(arguments) = body.map_err(too_large)?;
    let call = checked(arguments, method).map_err(|error| field_refused(&error))?;
    if streams {
        let events = tokio::select! {
            events = modules.stream(begun, &call) => events,
            () = revoked(&edge, &caller.key_id) => return Err(key_revoked()),
        };
        let events = events.map_err(|error| told(error, &name, Some(&call.method)))?;
        let (name, method) = (name.clone(), call.method.clone());
        let shown = events.map(move |event| match event {
            Ok(happening) => shown(happening),
            Err(error) => failed(told(error, &name, Some(&method))),
        });
        return Ok(sse(until_revoked(&edge, caller.key_id, shown)));
    }
    let returned = tokio::select! {
        returned = modules.call(begun, &call) => returned,
        () = revoked(&edge, &caller.key_id) => return Err(key_revoked()),
    };
    let returned = returned.map_err(|error| told(error, &name, Some(&call.method)))?;
    Ok(result(returned))
}

/// The length of the body; the most that it may have where the request does not say.
fn expected_bytes(request: &Request) -> usize {
    let exact = request.body().size_hint().exact();
    let exact = exact.and_then(|length| usize::try_from(length).ok());
    exact.unwrap_or(MAX_CALL_BYTES).min(MAX_CALL_BYTES)
}

/// The events until the key is revoked; an error is the last one then.
fn until_revoked(
    edge: &Arc<Edge>,
    key_id: String,
    events: impl Stream<Item = Event> + Send + 'static,
) -> impl Stream<Item = Event> + Send + 'static {
    let edge = Arc::clone(edge);
    let ended = stream::once(async move {
        revoked(&edge, &key_id).await;
        Some(failed(key_revoked()))
    });
    // `None` ends both.
    let end = || stream::once(future::ready(None));
    stream::select(events.map(Some).chain(end()), ended.chain(end()))
        .take_while(|event| future::ready(event.is_some()))
        .filter_map(future::ready)
}

fn sse(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    Sse::new(events.map(Ok::<_, Infallible>))
        .keep_alive(keep_alive)
        .into_response()
}

fn shown(happening: Happening) -> Event {
    match happening {
        Happening::Item(item) => Event::default().event("item").data(text(&item)),
        Happening::Output { stream, data } => {
            let data = String::from_utf8_lossy(&data);
            let told = json!({ "stream": stream, "data": data });
            Event::default().event("output").data(told.to_string())
        }
        Happening::End(returned) => {
            let body = result_bytes(&returned);
            Event::default().event("result").data(text(&body))
        }
    }
}

fn failed(problem: HttpProblem) -> Event {
    Event::default()
        .event("error")
        .data(problem.value().to_string())
}

/// JSON from a pod is ASCII without line breaks.
fn text(json: &[u8]) -> String {
    String::from_utf8_lossy(json).replace(['\n', '\r'], " ")
}

fn result(returned: Returned) -> Response {
    let body = budget::holding(result_bytes(&returned), returned.held);
    json(body)
}

/// An answer that may be large, and counts until it has been sent; so does `held`.
pub fn large(
    answer: &impl Serialize,
    mut spent: Spent,
    held: impl Send + 'static,
) -> Result<Response, HttpProblem> {
    let text = serde_json::to_vec(answer).map_err(|error| {
        HttpProblem::internal(format!("the answer cannot be written as JSON: {error}"))
    })?;
    spent.keep(text.len());
    Ok(json(budget::holding(text, (spent, held))))
}

fn json(body: Bytes) -> Response {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

/// The result is JSON as it came: what is large is not read again.
fn result_bytes(returned: &Returned) -> Vec<u8> {
    const BEFORE: &[u8] = b"{\"result\":";
    let after: &[u8] = match returned.as_list {
        true => b",\"called_with\":\"list\"}",
        false => b"}",
    };
    let mut body = Vec::with_capacity(BEFORE.len() + returned.result.len() + after.len());
    for part in [BEFORE, &returned.result, after] {
        body.extend_from_slice(part);
    }
    body
}

fn too_large(problem: HttpProblem) -> HttpProblem {
    if problem.status() != StatusCode::PAYLOAD_TOO_LARGE {
        return problem;
    }
    HttpProblem::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        Problem::new(
            "body_too_large",
            "The arguments are too large",
            format!("a call may have {MAX_CALL_BYTES} bytes of arguments"),
            "Send less at a time, or have the function fetch it itself",
        ),
    )
}

fn checked(arguments: Arguments, method: String) -> Result<Call, FieldError> {
    let raw = |name: &str, value: Option<Box<RawValue>>, opening: char, words: &str| {
        let Some(value) = value else {
            return Ok(Bytes::new());
        };
        let text = value.get();
        if text == "null" {
            return Ok(Bytes::new());
        }
        if !text.starts_with(opening) {
            return Err(FieldError::new(name, format!("must be {words}")));
        }
        if depth(text) > MAX_DEPTH {
            let reason = format!("is nested deeper than {MAX_DEPTH} levels");
            return Err(FieldError::new(name, reason));
        }
        Ok(Bytes::from(String::from(Box::<str>::from(value))))
    };
    let timeout = arguments.timeout_ms.map(Duration::from_millis);
    if timeout.is_some_and(|timeout| timeout.is_zero() || timeout > MAX_CALL) {
        let most = MAX_CALL.as_millis();
        let reason = format!("must be a number of milliseconds from 1 to {most}");
        return Err(FieldError::new("timeout_ms", reason));
    }
    Ok(Call {
        method,
        args: raw("args", arguments.args, '[', "a list")?,
        kwargs: raw("kwargs", arguments.kwargs, '{', "an object")?,
        timeout,
    })
}

/// How deep lists and objects of a JSON text are nested.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_text, mut escaped) = (false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Whose modules a request is about.
fn user(caller: &Caller, named: Option<String>) -> Result<UserId, HttpProblem> {
    let named = named.filter(|text| !text.is_empty());
    let named: Option<UserId> =
        named
            .map(|text| text.parse())
            .transpose()
            .map_err(|error: crate::model::IdError| {
                field_refused(&FieldError::new("userId", error.to_string()))
            })?;
    user_of(caller, named)
}

fn named(field: &str, text: &str) -> Result<ModuleName, HttpProblem> {
    text.parse()
        .map_err(|error: crate::model::ModuleNameError| {
            field_refused(&FieldError::new(field, error.to_string()))
        })
}

fn required(field: &str, value: Option<String>) -> Result<String, HttpProblem> {
    value
        .filter(|text| !text.is_empty())
        .ok_or_else(|| field_refused(&FieldError::new(field, "is required in the query")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::pipeline::modules::Held;

    fn call(body: &str) -> Result<Call, FieldError> {
        checked(serde_json::from_str(body).unwrap(), "sqrt".to_owned())
    }

    #[test]
    fn arguments_are_passed_on_as_they_came() {
        let made = call(r#"{"args":[1e400, 123456789012345678901234567890],"kwargs":{"a":"]"}}"#);
        let made = made.unwrap();
        assert_eq!(&made.args[..], b"[1e400, 123456789012345678901234567890]");
        assert_eq!(&made.kwargs[..], br#"{"a":"]"}"#);
        assert!(call("{}").unwrap().args.is_empty());
    }

    #[test]
    fn a_wrong_argument_is_named() {
        let refused = |body: &str| call(body).unwrap_err().field;
        assert_eq!(refused(r#"{"args":{}}"#), "args");
        assert_eq!(refused(r#"{"kwargs":[]}"#), "kwargs");
        assert_eq!(refused(r#"{"timeout_ms":0}"#), "timeout_ms");
        assert_eq!(refused(r#"{"timeout_ms":60001}"#), "timeout_ms");
        let deep = format!("{{\"args\":{}{}}}", "[".repeat(300), "]".repeat(300));
        assert_eq!(refused(&deep), "args");
    }

    #[test]
    fn brackets_in_texts_are_no_nesting() {
        assert_eq!(depth(r#"["[[[", "\"[", {"a": []}]"#), 3);
    }

    #[test]
    fn a_result_is_put_into_the_reply_unread() {
        let returned = |as_list| Returned {
            result: Bytes::from_static(b"[16,20,24]"),
            as_list,
            held: Held::default(),
        };
        assert_eq!(
            &result_bytes(&returned(false))[..],
            br#"{"result":[16,20,24]}"#
        );
        assert_eq!(
            &result_bytes(&returned(true))[..],
            br#"{"result":[16,20,24],"called_with":"list"}"#
        );
    }
}
