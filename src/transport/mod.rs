//! People and programs come in here: one list of routes, one WebSocket, one page, one proxy.
//!
//! Every request passes [`Edge::answer`]: its `Host` says whether it is for Gantry or for a
//! deployed program; a foreign `Host` or `Origin` and a key in the URL end there.

mod account;
mod body;
mod caller;
mod connections;
mod data;
mod forwarded;
mod guard;
mod health;
mod logs;
mod modules;
mod page;
mod peers;
mod problem;
mod proxy;
mod repls;
mod runner;
mod server;
mod services;
mod session;
mod settings;
mod start;
mod submissions;
mod upload;
mod upstream;
mod wire;
mod ws;

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::future::Either;
use metrics_exporter_prometheus::PrometheusHandle;
use tower::ServiceExt;
use utoipa::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

use crate::auth::{Keys, OneTime, RateLimits, Sessions};
use crate::budget::Budgets;
use crate::config::Config;
use crate::journal::Journal;
use crate::logs::{LogSearch, Places};
use crate::model::{ReplId, UserId};
use crate::pipeline::Pipeline;
use crate::pipeline::modules::ModuleCalls;
use crate::platform::Platform;
use crate::shutdown::Shutdown;

use caller::{Cookie, KeySchemes};
use connections::Shares;
use forwarded::Forwarded;
pub use guard::Guard;
use guard::Target;
pub use peers::{Peers, Replicas};
use problem::HttpProblem;
pub use server::{Server, raise_open_files};

/// Largest body of an HTTP request to Gantry itself: a few names and numbers. Code comes over the
/// WebSocket.
const MAX_BODY_BYTES: usize = 64 << 10;

/// Pause before the answer to who asked too often: at most four of them a second on one connection.
const TOO_MANY_PAUSE: Duration = Duration::from_millis(250);

/// Room that is made for an answer whose size is not known yet: what a module may answer at most.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Bytes of one user's answers that are not read yet: two of the largest.
const MAX_ANSWERS_BYTES: u32 = 32 << 20;

/// Bytes of the arguments of one user's calls that are under way: three of the largest.
const MAX_ARGUMENTS_BYTES: u32 = 24 << 20;

/// Longest answer of a route: a rollback waits until the release is ready, which has its own,
/// shorter bound. Streams count until their headers are sent.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long a WebSocket ticket lives (design.md §3).
const TICKET_LIFETIME: Duration = Duration::from_secs(30);

/// Tickets that may wait to be used: 10,000 pages that reconnect at once, and as many again.
const MAX_TICKETS: usize = 20_000;

/// How long a sign-in link works: long enough to find the terminal's output again.
const SIGN_IN_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// Tickets of one key: far more than the pages that one person has open.
const MAX_TICKETS_PER_KEY: usize = 1_000;

/// Sign-in links that may wait: one is made at each start.
const MAX_SIGN_INS: usize = 16;

/// What the routes share.
#[derive(Debug)]
pub struct Edge {
    /// Who may do what.
    pub keys: Keys,
    /// Browsers that are signed in.
    pub sessions: Sessions,
    /// Which cookie sessions are in.
    cookie: Cookie,
    /// Held while the session store is written.
    signing: tokio::sync::Mutex<()>,
    /// Submissions that are followed over WebSockets, by whose they are.
    followed: Shares<UserId>,
    /// Who is behind a proxy.
    forwarded: Forwarded,
    /// Requests to repls that the proxy has under way.
    proxied: Shares<(ReplId, proxy::Entrance)>,
    /// Tickets for WebSockets.
    pub tickets: OneTime,
    /// Tokens of sign-in links.
    pub sign_ins: OneTime,
    /// How often one may ask.
    pub rates: RateLimits,
    /// Which hosts and origins are answered.
    pub guard: Guard,
    /// What happened.
    pub journal: Journal,
    /// What happened, to be searched.
    pub search: Arc<dyn LogSearch>,
    /// Who follows the logs.
    pub followers: Places,
    /// Who searches them.
    pub searchers: Places,
    /// What answers that are not read yet may take of the memory; admins together are one.
    pub answers: Budgets<Option<UserId>>,
    /// The same for arguments of modules' calls.
    pub arguments: Budgets<Option<UserId>>,
    /// The same for messages of a key's WebSockets that have not come whole.
    unfinished: Budgets<String>,
    /// What happens next.
    pub pipeline: Pipeline,
    /// Who owns sandboxes and releases.
    pub platform: Arc<dyn Platform>,
    /// Python modules.
    pub modules: ModuleCalls,
    /// Other replicas of this server.
    pub peers: Arc<Peers>,
    /// Numbers for `/metrics`.
    pub numbers: Numbers,
    /// When to stop.
    pub shutdown: Shutdown,
    /// Where the journal is, to measure it.
    pub journal_folder: PathBuf,
    /// The content security policy of the page.
    pub policy: HeaderValue,
    /// What this server serves under, so that it is nobody else's.
    pub own_names: [String; 2],
}

/// What [`Edge::new`] puts together.
#[derive(Debug)]
pub struct Parts {
    /// See [`Edge::keys`].
    pub keys: Keys,
    /// See [`Edge::sessions`].
    pub sessions: Sessions,
    /// See [`Edge::journal`].
    pub journal: Journal,
    /// See [`Edge::search`].
    pub search: Arc<dyn LogSearch>,
    /// See [`Edge::pipeline`].
    pub pipeline: Pipeline,
    /// See [`Edge::platform`].
    pub platform: Arc<dyn Platform>,
    /// See [`Edge::modules`].
    pub modules: ModuleCalls,
    /// See [`Edge::peers`].
    pub peers: Arc<Peers>,
    /// See [`Edge::numbers`].
    pub numbers: Numbers,
    /// See [`Edge::shutdown`].
    pub shutdown: Shutdown,
}

/// The handle that renders `/metrics`.
#[derive(Clone)]
pub struct Numbers(pub PrometheusHandle);

impl std::fmt::Debug for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Numbers")
    }
}

impl Edge {
    /// Puts the edge together.
    pub fn new(parts: Parts, config: &Config, guard: Guard) -> anyhow::Result<Self> {
        Ok(Self {
            keys: parts.keys,
            sessions: parts.sessions,
            tickets: OneTime::new(TICKET_LIFETIME, MAX_TICKETS, MAX_TICKETS_PER_KEY),
            sign_ins: OneTime::new(SIGN_IN_LIFETIME, MAX_SIGN_INS, MAX_SIGN_INS),
            cookie: match config.access.is_secure() {
                true => Cookie::Secure,
                false => Cookie::Plain,
            },
            signing: tokio::sync::Mutex::default(),
            followed: Shares::new(config.max_waiting.max(session::FOLLOWED_PER_USER)),
            forwarded: Forwarded::new(
                config.access.trusted_proxies.clone(),
                config.access.app_scheme,
            ),
            proxied: Shares::new(config.access.connections_per_repl),
            rates: RateLimits::default(),
            guard,
            journal: parts.journal,
            search: parts.search,
            followers: Places::new(logs::MAX_FOLLOWERS),
            searchers: Places::new(logs::MAX_SEARCHES),
            answers: Budgets::new(MAX_ANSWERS_BYTES),
            arguments: Budgets::new(MAX_ARGUMENTS_BYTES),
            unfinished: Budgets::new(session::MAX_UNFINISHED_BYTES),
            pipeline: parts.pipeline,
            modules: parts.modules,
            platform: parts.platform,
            peers: parts.peers,
            numbers: parts.numbers,
            shutdown: parts.shutdown,
            journal_folder: config.data_dir.join("journal"),
            policy: content_security_policy(&config.app_domain)?,
            own_names: [config.domain.clone(), config.app_domain.clone()],
        })
    }

    /// Answers one request.
    pub async fn answer(self: &Arc<Self>, router: &Router, mut request: Request) -> Response {
        let target = match self.guard.target(request.uri(), request.headers()) {
            Ok(target) => target,
            // A name that is not this server's may be a repl's own.
            Err(problem) => match self.repl_of(&request) {
                Some(repl) => Target::Program(Some(repl)),
                None => return self.finish(None, problem.into_response()),
            },
        };
        match target {
            // A program's answers are its own: none of Gantry's headers or rules are put on them.
            Target::Program(repl) => {
                proxy::forward(self, repl, proxy::Door::Program, request).await
            }
            Target::Runner(repl) => {
                proxy::forward(self, Some(repl), proxy::Door::Runner, request).await
            }
            Target::Api => {
                let cors = self.guard.cors_origin(request.headers()).map(str::to_owned);
                // Routes see a path, however the client wrote the URL.
                if let Some(path) = request.uri().path_and_query().cloned() {
                    *request.uri_mut() = path.into();
                }
                let response = self.route(router, request).await;
                self.finish(cors.as_deref(), response)
            }
        }
    }

    /// Answers a request about the server's health, whatever host it names: who watches over a server asks its
    /// address.
    async fn answer_health(&self, router: &Router, request: Request) -> Response {
        let response = self.route(router, request).await;
        self.finish(None, response)
    }

    fn repl_of(&self, request: &Request) -> Option<ReplId> {
        let name = self.guard.host_name(request.uri(), request.headers())?;
        self.platform.repl_of(&name)
    }

    async fn route(&self, router: &Router, request: Request) -> Response {
        let refused = self
            .guard
            .check_origin(request.uri(), request.headers())
            .and_then(|()| guard::check_query(request.uri()));
        if let Err(problem) = refused {
            return problem.into_response();
        }
        let peer = request.extensions().get::<server::Peer>().cloned();
        if !health::is_asked_by(&request) {
            let headers = request.headers();
            if let Err(problem) = caller::count_strangers(self, peer.as_ref(), headers) {
                tokio::time::sleep(TOO_MANY_PAUSE).await;
                return problem.into_response();
            }
        }
        if guard::is_preflight(request.method(), request.headers()) {
            return StatusCode::NO_CONTENT.into_response();
        }
        let whole = is_done_whole(&request);
        let answered = AssertUnwindSafe(router.clone().oneshot(request)).catch_unwind();
        let answered = match whole {
            true => Either::Left(self.shutdown.tasks.spawn(async move {
                // The connection's place is taken until it is done: hanging up does not make room for more.
                let _place = peer;
                answered.await
            })),
            false => Either::Right(answered.map(Ok)),
        };
        match tokio::time::timeout(ROUTE_TIMEOUT, answered).await {
            Ok(Ok(Ok(Ok(response)))) => as_problem(response),
            Ok(Ok(Ok(Err(never)))) => match never {},
            // Nobody cancels it but the end of the server.
            Ok(Err(gone)) => HttpProblem::internal(gone.to_string()).into_response(),
            Ok(Ok(Err(panic))) => {
                tracing::error!(panic = panic_message(panic.as_ref()), "a route panicked");
                HttpProblem::internal("a fault in the server").into_response()
            }
            Err(_) => {
                let cause = format!("no answer within {} s", ROUTE_TIMEOUT.as_secs());
                HttpProblem::internal(cause).into_response()
            }
        }
    }

    /// Puts the headers on that every answer of Gantry's own has.
    fn finish(&self, cors: Option<&str>, mut response: Response) -> Response {
        let headers = response.headers_mut();
        let mut set = |name: HeaderName, value: &'static str| {
            headers
                .entry(name)
                .or_insert(HeaderValue::from_static(value));
        };
        set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
        set(header::X_FRAME_OPTIONS, "DENY");
        set(header::REFERRER_POLICY, "no-referrer");
        set(
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        );
        set(header::CACHE_CONTROL, "no-store");
        headers.insert(header::CONTENT_SECURITY_POLICY, self.policy.clone());
        if let Some(Ok(origin)) = cors.map(HeaderValue::from_str) {
            allow_origin(headers, origin);
        } else {
            // The browsers' default, said plainly: other pages may not even embed what is here.
            headers.insert(
                HeaderName::from_static("cross-origin-resource-policy"),
                HeaderValue::from_static("same-origin"),
            );
        }
        response
    }
}

fn allow_origin(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::VARY, HeaderValue::from_static("origin"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, POST, PUT, DELETE"),
    );
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("authorization, content-type, last-event-id, x-api-key"),
    );
    headers.insert(
        header::ACCESS_CONTROL_MAX_AGE,
        HeaderValue::from_static("600"),
    );
}

fn content_security_policy(app_domain: &str) -> anyhow::Result<HeaderValue> {
    // Deployed programs are shown in frames, on their own hosts; everything else is the page's own.
    let policy = format!(
        "default-src 'self'; style-src 'self' 'unsafe-inline'; \
         frame-src http://*.{app_domain}:* https://*.{app_domain}:*; \
         connect-src 'self' ws: wss:; img-src 'self' data:; \
         frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'"
    );
    Ok(HeaderValue::from_str(&policy)?)
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Errors that come from below the routes get the shape all errors have.
fn as_problem(response: Response) -> Response {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let is_problem = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value == problem::CONTENT_TYPE);
    if !is_error || is_problem {
        return response;
    }
    let title = status.canonical_reason().unwrap_or("Error");
    let problem = crate::model::Problem::new(
        &title.to_ascii_lowercase().replace(' ', "_"),
        title,
        "the request does not fit any route",
        "/docs shows every route",
    );
    let mut made = HttpProblem::new(status, problem).into_response();
    if let Some(allow) = response.headers().get(header::ALLOW) {
        made.headers_mut().insert(header::ALLOW, allow.clone());
    }
    made
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Gantry",
        description = "Code sent over a WebSocket is tested in its own sandbox and, when it passes, \
                       running under its own URL. Every error is RFC 9457 application/problem+json."
    ),
    components(schemas(body::ProblemBody)),
    modifiers(&KeySchemes),
    security(("key" = []), ("bearer" = []))
)]
struct Api;

/// Every route there is. The description at `/openapi.json` is made from the same list.
pub fn router(edge: Arc<Edge>) -> Router {
    let (routes, api) = OpenApiRouter::with_openapi(Api::openapi())
        .routes(routes!(ws::code))
        .routes(routes!(ws::ticket))
        .routes(routes!(
            account::session,
            account::sign_in,
            account::sign_out
        ))
        .routes(routes!(account::languages))
        .routes(routes!(submissions::list))
        .routes(routes!(submissions::one))
        .routes(routes!(repls::list))
        .routes(routes!(repls::one, repls::delete))
        .routes(routes!(repls::releases))
        .routes(routes!(repls::rollback))
        .routes(routes!(repls::release_name))
        .routes(routes!(settings::scale))
        .routes(routes!(settings::variables, settings::set_variables))
        .routes(routes!(settings::domains, settings::set_domains))
        .routes(routes!(data::show, data::delete))
        .routes(routes!(start::start))
        .routes(routes!(runner::ticket))
        .routes(routes!(runner::terminal))
        .routes(routes!(runner::save))
        .routes(routes!(repls::stop))
        .routes(routes!(services::apply))
        .routes(routes!(services::remove))
        .routes(routes!(services::events))
        .routes(routes!(services::state))
        .routes(routes!(services::node_state))
        .routes(routes!(services::container_state))
        .routes(routes!(services::service_state))
        .routes(routes!(modules::create))
        .routes(routes!(modules::run).layer(DefaultBodyLimit::max(modules::MAX_CALL_BYTES)))
        .routes(routes!(modules::list))
        .routes(routes!(modules::describe))
        .routes(routes!(modules::scale))
        .routes(routes!(modules::remove))
        .routes(routes!(logs::search))
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
        .routes(routes!(health::numbers))
        .split_for_parts();
    let docs = utoipa_swagger_ui::SwaggerUi::new("/docs").url("/openapi.json", api);
    routes
        .route("/", axum::routing::get(page::index))
        .route("/assets/{*path}", axum::routing::get(page::asset))
        .merge(peers::routes())
        .with_state(edge)
        .merge(docs)
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(axum::middleware::map_response(keep_waiting))
}

/// Whether it goes on when its client leaves or its time is over: what changes something is never left half
/// done. A call of a module ends with its client.
fn is_done_whole(request: &Request) -> bool {
    let changes = !matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::OPTIONS
    );
    changes && request.uri().path() != modules::CALL_PATH
}

/// Who asks too often is told so after a pause: a client that does not heed the answer would keep a processor
/// busy with answers.
async fn keep_waiting(response: Response) -> Response {
    if response.status() == StatusCode::TOO_MANY_REQUESTS {
        tokio::time::sleep(TOO_MANY_PAUSE).await;
    }
    response
}

async fn no_route() -> HttpProblem {
    HttpProblem::new(
        StatusCode::NOT_FOUND,
        crate::model::Problem::new(
            "not_found",
            "There is no such route",
            "nothing is served at this path",
            "/docs shows every route",
        ),
    )
}

async fn wrong_method(method: Method) -> HttpProblem {
    HttpProblem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        crate::model::Problem::new(
            "method_not_allowed",
            format!("This route does not take {method}"),
            "the path exists, the method does not",
            "/docs shows what each route takes",
        ),
    )
}

/// A response without a body.
fn no_content() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}
