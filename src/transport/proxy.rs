//! The reverse proxy: `{replId}.APP_DOMAIN` is the repl's own program, HTTP and WebSocket.
//!
//! A program's host never shows Gantry's API, and a program never sees Gantry's session cookie.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header};
use axum::response::{IntoResponse, Response};
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use super::Edge;
use super::caller::{Cookie, OpenedBy};
use super::connections::Taken;
use super::forwarded::Forwarded;
use super::server::Peer;
use super::session::revoked;
use super::upload::{self, Sent, Unanswered};
use super::upstream::{Answer, Exchange, Upstream, Waiting};
use crate::auth::Keys;
use crate::model::{Problem, ReplId};
use crate::platform::{ByteStream, LAST_LINES, PlatformError};

/// How long reaching the program may take: it is on this machine or in this cluster.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request waits for an idle repl: shorter than the minute that proxies before this one commonly
/// wait for an answer.
pub const HELD: Duration = Duration::from_secs(50);

/// How long the program may think before its headers, once it has the request: what proxies commonly allow.
/// As long a client may pause while it sends the request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Most header lines of a program's answer: a bound, far above what programs send. Their bytes are bounded by
/// hyper's buffer, about 400 KiB.
const MAX_ANSWER_HEADERS: usize = 2_000;

/// Headers that are between two neighbours only (RFC 9110 §7.6.1). `Trailer` is not: it names what comes after
/// the body, which is passed on.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
];

/// Headers that the list in `Connection` does not remove: what a program, or Gantry, decides by, and how long
/// the body is. A client that lists them would have them removed after they were checked.
const NEVER_HOP_BY_HOP: [HeaderName; 13] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::COOKIE,
    header::SET_COOKIE,
    header::AUTHORIZATION,
    header::ORIGIN,
    header::FORWARDED,
    header::TRAILER,
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-proto"),
    HeaderName::from_static("x-api-key"),
];

/// Which of a repl's two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// The program's.
    Program,
    /// The runner's.
    Runner,
}

/// Who comes in, each with a share of its own: strangers at the program must not keep the owner out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entrance {
    /// Anybody, to the program.
    Program,
    /// Anybody, to the runner, which asks for a ticket.
    Runner,
    /// A caller that may use the repl, to the runner.
    Owner,
}

/// One of the requests that may be under way to a repl through one entrance.
type Share = Taken<(ReplId, Entrance)>;

/// Passes a request on to the repl's program, or to its runner, and the answer back.
pub async fn forward(
    edge: &Arc<Edge>,
    repl: Option<ReplId>,
    door: Door,
    request: Request,
) -> Response {
    let Some(repl) = repl else {
        return error_page(
            StatusCode::NOT_FOUND,
            "There is no program here",
            "This name cannot be a repl's.",
        );
    };
    let visit = is_visit(&request);
    // Before anything is waited for: who waits for an idle repl holds a connection, too.
    let entrance = match door {
        Door::Program => Entrance::Program,
        Door::Runner if request.extensions().get::<OpenedBy>().is_some() => Entrance::Owner,
        Door::Runner => Entrance::Runner,
    };
    let Some(share) = edge.proxied.take(&(repl.clone(), entrance)) else {
        let cause = format!(
            "{} requests to {repl} are under way, as many as there may be at one time.",
            edge.proxied.most()
        );
        return later("The program is busy", &cause, visit);
    };
    if let Some(answered) = rouse(edge, &repl, door, visit).await {
        return answered;
    }
    let dialled = async {
        match door {
            Door::Program => edge.platform.dial(&repl).await,
            Door::Runner => edge.platform.dial_runner(&repl).await,
        }
    };
    let stream = match timeout(DIAL_TIMEOUT, dialled).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(PlatformError::NotFound(_))) => {
            return error_page(
                StatusCode::NOT_FOUND,
                "There is no program here",
                &format!("Nothing is deployed as {repl}."),
            );
        }
        Ok(Err(PlatformError::Unavailable(problem) | PlatformError::NotReady(problem))) => {
            let cause = for_strangers(&problem);
            return later("The program does not serve now", &cause, visit);
        }
        Err(_) => {
            let cause = format!(
                "{repl} did not take the connection within {} s.",
                DIAL_TIMEOUT.as_secs()
            );
            return error_page(
                StatusCode::GATEWAY_TIMEOUT,
                "The program does not answer",
                &cause,
            );
        }
    };
    match exchange(edge, request, stream, share).await {
        Ok(response) => response,
        Err(Failure::Unsent) => {
            let cause = format!(
                "The rest of the request did not come within {} s.",
                ANSWER_TIMEOUT.as_secs()
            );
            error_page(
                StatusCode::REQUEST_TIMEOUT,
                "The request is not whole",
                &cause,
            )
        }
        Err(Failure::Late) => {
            let cause = format!(
                "{repl} sent no answer within {} s.",
                ANSWER_TIMEOUT.as_secs()
            );
            error_page(
                StatusCode::GATEWAY_TIMEOUT,
                "The program does not answer",
                &cause,
            )
        }
        Err(Failure::Broken(error)) => {
            tracing::debug!(repl_id = %repl, %error, "a proxied request failed");
            let cause = format!("{repl} closed the connection or did not speak HTTP ({error}).");
            error_page(
                StatusCode::BAD_GATEWAY,
                "The program's answer cannot be passed on",
                &cause,
            )
        }
    }
}

/// Starts an idle repl again. The answer for who does not wait; `None`: the request can be passed on.
///
/// A person is shown at once that it starts; a program's request waits for it, since programs seldom try
/// again.
async fn rouse(edge: &Edge, repl: &ReplId, door: Door, visit: bool) -> Option<Response> {
    if door == Door::Runner {
        // Without a ticket of a runner that runs there is nothing behind this door.
        return edge.platform.is_idle(repl).then(|| {
            let cause = format!(
                "{repl} is idle. POST /repls/{repl}/ticket starts it again and gives a ticket."
            );
            later("The repl is idle", &cause, false)
        });
    }
    let awake = edge.pipeline.wake(repl)?;
    let failed = |error: PlatformError| {
        let cause = match error {
            PlatformError::Unavailable(problem) | PlatformError::NotReady(problem) => {
                for_strangers(&problem)
            }
            PlatformError::NotFound(what) => format!("{what} does not exist"),
        };
        later("The program could not be started again", &cause, false)
    };
    if visit {
        return match awake.peek() {
            Some(Err(error)) => Some(failed(error.clone())),
            Some(Ok(())) => None,
            // Its own page stands in until it answers.
            None => match timeout(DIAL_TIMEOUT, edge.platform.dial(repl)).await {
                Ok(Ok(_)) => None,
                _ => Some(later(
                    "The program is starting",
                    "Nobody used it for a while, so it was stopped. This page shows it as soon as it is there.",
                    true,
                )),
            },
        };
    }
    match timeout(HELD, awake).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(failed(error)),
        Err(_) => Some(later(
            "The program is starting",
            &format!("{repl} was idle and does not serve yet."),
            false,
        )),
    }
}

/// Why a program does not answer, without what it wrote.
fn for_strangers(problem: &Problem) -> String {
    let cause = problem.cause.split(LAST_LINES).next().unwrap_or_default();
    format!("{}: {cause}", problem.message)
}

/// Whether a browser asks for a page to show.
fn is_visit(request: &Request) -> bool {
    let accept = request.headers().get(header::ACCEPT);
    let html = accept.is_some_and(|accept| accept.as_bytes().windows(9).any(|w| w == b"text/html"));
    html && request.method() == Method::GET && upgrade_wanted(request.headers()).is_none()
}

/// Not now; in a moment. `again`: a browser asks again by itself.
fn later(title: &str, cause: &str, again: bool) -> Response {
    let mut response = page(StatusCode::SERVICE_UNAVAILABLE, title, cause, again);
    let soon = HeaderValue::from_static("2");
    response.headers_mut().insert(header::RETRY_AFTER, soon);
    response
}

enum Failure {
    /// The client stopped sending the request.
    Unsent,
    /// The program does not answer.
    Late,
    Broken(hyper::Error),
}

impl From<Unanswered> for Failure {
    fn from(unanswered: Unanswered) -> Self {
        match unanswered {
            Unanswered::Unsent => Self::Unsent,
            Unanswered::Late => Self::Late,
        }
    }
}

async fn exchange(
    edge: &Arc<Edge>,
    mut request: Request,
    stream: Box<dyn ByteStream>,
    share: Share,
) -> Result<Response, Failure> {
    let peer = request.extensions().get::<Peer>().cloned();
    let opened_by = request.extensions().get::<OpenedBy>().cloned();
    let wanted = upgrade_wanted(request.headers());
    let client_side = wanted.is_some().then(|| hyper::upgrade::on(&mut request));
    prepare_request(
        &mut request,
        wanted.as_ref(),
        &edge.forwarded,
        &edge.keys,
        peer.as_ref(),
    );
    let (request, sent) = upload::watched(request);
    let (mut sender, connection) = http1::Builder::new()
        .max_headers(MAX_ANSWER_HEADERS)
        .handshake::<_, Body>(TokioIo::new(Upstream::new(stream, sent.clone())))
        .await
        .map_err(Failure::Broken)?;
    let stop = edge.shutdown.token.clone();
    let share = Arc::new(share);
    let own = Arc::clone(&share);
    let exchange = Exchange::new(sent.clone());
    // From here on whatever ends without a whole answer ends the connection, too.
    let waiting = Waiting(exchange.clone());
    edge.shutdown.tasks.spawn(async move {
        // Its error comes out at the request or in the body.
        tokio::select! {
            _ = connection.with_upgrades() => {}
            () = stop.cancelled() => {}
            () = exchange.over(ANSWER_TIMEOUT) => {}
        }
        drop(own);
    });
    let answer = upload::answered(sender.send_request(request), &sent, ANSWER_TIMEOUT);
    let mut response = answer.await?.map_err(Failure::Broken)?;
    // That of the connection to the client is settled between the two.
    *response.version_mut() = Version::HTTP_11;
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let program_side = switched.then(|| hyper::upgrade::on(&mut response));
    let upgraded_to = upgrade_wanted(response.headers());
    remove_hop_by_hop(response.headers_mut());
    keep_session_cookie_ours(response.headers_mut());
    if let (Some(client_side), Some(program_side)) = (client_side, program_side) {
        put_upgrade(response.headers_mut(), upgraded_to.as_ref());
        let joined = join(edge, client_side, program_side, (peer, share), sent);
        match opened_by {
            Some(OpenedBy(key)) => {
                let (tasks, edge) = (edge.shutdown.tasks.clone(), Arc::clone(edge));
                tasks.spawn(async move {
                    tokio::select! {
                        () = joined => {}
                        () = revoked(&edge, &key) => {}
                    }
                });
            }
            None => drop(edge.shutdown.tasks.spawn(joined)),
        }
    }
    Ok(response.map(|body| Body::new(Answer::new(body, waiting))))
}

/// Copies bytes both ways until one side ends, the program takes nothing, or the server stops.
fn join(
    edge: &Edge,
    client: OnUpgrade,
    program: OnUpgrade,
    held: (Option<Peer>, Arc<Share>),
    sent: Sent,
) -> impl Future<Output = ()> + Send + 'static {
    let stop = edge.shutdown.token.clone();
    async move {
        let copied = async {
            let (client, program) = tokio::try_join!(client, program).ok()?;
            let (client, program) = (TokioIo::new(client), TokioIo::new(program));
            let (mut from_client, mut to_client) = tokio::io::split(client);
            let (mut from_program, mut to_program) = tokio::io::split(program);
            let up = pass(&mut from_client, &mut to_program);
            let down = pass(&mut from_program, &mut to_client);
            tokio::pin!(up, down);
            // What one side ended, the other has its time to end.
            tokio::select! {
                done = &mut up => done.ok()?,
                done = &mut down => {
                    done.ok()?;
                    return timeout(ANSWER_TIMEOUT, up).await.ok()?.ok();
                }
            }
            timeout(ANSWER_TIMEOUT, down).await.ok()?.ok()
        };
        let copied = async {
            tokio::select! {
                _ = copied => {}
                () = untaken(&sent) => {}
            }
        };
        stop.run_until_cancelled(copied).await;
        drop(held);
    }
}

/// Copies bytes until there are no more, and says so to who gets them.
async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    tokio::io::copy(from, to).await?;
    to.shutdown().await
}

/// Resolves when the program has taken nothing of what it is sent for long.
async fn untaken(sent: &Sent) {
    let long = |since: Instant| since.elapsed() >= ANSWER_TIMEOUT;
    while !sent.blocked().is_some_and(long) {
        tokio::time::sleep(ANSWER_TIMEOUT / 4).await;
    }
}

/// The protocol a message wants to change to, when it says so properly.
fn upgrade_wanted(headers: &HeaderMap) -> Option<HeaderValue> {
    connection_tokens(headers)
        .any(|token| token.eq_ignore_ascii_case("upgrade"))
        .then(|| headers.get(header::UPGRADE).cloned())
        .flatten()
}

fn connection_tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::CONNECTION).iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn put_upgrade(headers: &mut HeaderMap, protocol: Option<&HeaderValue>) {
    if let Some(protocol) = protocol {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol.clone());
    }
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    // The length of a body in chunks is that of its chunks (RFC 9112 §6.3).
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    let named: Vec<HeaderName> = connection_tokens(headers)
        .filter_map(|token| token.parse().ok())
        .filter(|name| !NEVER_HOP_BY_HOP.contains(name))
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    headers.remove(header::UPGRADE);
}

fn prepare_request(
    request: &mut Request,
    upgrade: Option<&HeaderValue>,
    forwarded: &Forwarded,
    keys: &Keys,
    peer: Option<&Peer>,
) {
    *request.version_mut() = Version::HTTP_11;
    // hyper sends the body of a GET only when its headers tell of one.
    let in_chunks = request.headers().contains_key(header::TRANSFER_ENCODING)
        && !request.body().is_end_stream();
    let authority = request.uri().authority().map(ToString::to_string);
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    let headers = request.headers_mut();
    if let Some(Ok(host)) = authority.map(|authority| HeaderValue::from_str(&authority)) {
        headers.insert(header::HOST, host);
    }
    let takes_trailers = takes_trailers(headers);
    remove_hop_by_hop(headers);
    put_upgrade(headers, upgrade);
    if takes_trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.append(header::CONNECTION, HeaderValue::from_static("te"));
    }
    if in_chunks {
        let chunked = HeaderValue::from_static("chunked");
        headers.insert(header::TRANSFER_ENCODING, chunked);
    }
    strip_session_cookie(headers);
    strip_keys(headers, keys);
    forwarded.put_on(headers, peer.map(|peer| peer.address.ip()));
}

/// Whether the client takes fields behind an answer's body.
fn takes_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::TE).iter();
    let mut tokens = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    tokens.any(|token| token.trim().eq_ignore_ascii_case("trailers"))
}

/// Takes keys of Gantry's out of a request to a program, which could use them. What its own users sign in
/// with stays.
fn strip_keys(headers: &mut HeaderMap, keys: &Keys) {
    for name in [header::AUTHORIZATION, HeaderName::from_static("x-api-key")] {
        let all = headers.get_all(&name).iter();
        let foreign: Vec<HeaderValue> =
            all.filter(|value| !has_key(value, keys)).cloned().collect();
        headers.remove(&name);
        for value in foreign {
            headers.append(&name, value);
        }
    }
}

/// Whether the value is a key that counts, by itself or behind the word for how it is sent.
fn has_key(value: &HeaderValue, keys: &Keys) -> bool {
    let text = value.to_str().unwrap_or_default().trim();
    let (_, behind) = text.split_once(' ').unwrap_or_default();
    [text, behind.trim()]
        .into_iter()
        .any(|text| !text.is_empty() && keys.authenticate(text).is_some())
}

/// Takes Gantry's own cookies out of a request to a program.
fn strip_session_cookie(headers: &mut HeaderMap) {
    let ours = |pair: &str| {
        let name = pair.split('=').next().unwrap_or_default().trim();
        Cookie::NAMES.contains(&name)
    };
    let kept: Vec<HeaderValue> = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| {
            let Ok(text) = value.to_str() else {
                // Not text, so it cannot be read by us either: only bytes that spell our name matter.
                // The longer name ends with the shorter one.
                let name = Cookie::Plain.name().as_bytes();
                let spelled = value.as_bytes().windows(name.len()).any(|w| w == name);
                return (!spelled).then(|| value.clone());
            };
            let pairs: Vec<&str> = text
                .split(';')
                .map(str::trim)
                .filter(|pair| !ours(pair))
                .collect();
            let text = pairs.join("; ");
            if text.is_empty() {
                None
            } else {
                HeaderValue::from_str(&text).ok()
            }
        })
        .collect();
    headers.remove(header::COOKIE);
    for value in kept {
        headers.append(header::COOKIE, value);
    }
}

/// A program must not set a cookie that Gantry would take for its own. A cookie without a name is sent back as
/// its value alone, which may spell a name and a value.
fn keep_session_cookie_ours(headers: &mut HeaderMap) {
    let kept: Vec<HeaderValue> = headers
        .get_all(header::SET_COOKIE)
        .iter()
        .filter(|value| {
            let pair = value.as_bytes().split(|byte| *byte == b';').next();
            let mut parts = pair.unwrap_or_default().splitn(2, |byte| *byte == b'=');
            let name = parts.next().unwrap_or_default().trim_ascii();
            let ours = |own: &&str| name.eq_ignore_ascii_case(own.as_bytes());
            parts.next().is_some() && !name.is_empty() && !Cookie::NAMES.iter().any(ours)
        })
        .cloned()
        .collect();
    headers.remove(header::SET_COOKIE);
    for value in kept {
        headers.append(header::SET_COOKIE, value);
    }
}

fn error_page(status: StatusCode, title: &str, cause: &str) -> Response {
    page(status, title, cause, false)
}

fn page(status: StatusCode, title: &str, cause: &str, again: bool) -> Response {
    let refresh = match again {
        true => "<meta http-equiv=\"refresh\" content=\"1\">",
        false => "",
    };
    let escape = |text: &str| {
        text.replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
            .replace('"', "&quot;")
    };
    let (title, cause) = (escape(title), escape(cause));
    let page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">{refresh}\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>{title}</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:20vh auto;padding:0 1rem}}\
         pre{{white-space:pre-wrap}}</style>\
         <h1>{title}</h1><pre>{cause}</pre><p>{code} from Gantry</p></html>\n",
        code = status.as_u16(),
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'",
        ),
    ];
    (status, headers, page).into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn request(headers: &[(&str, &str)]) -> Request {
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = "http://a-prod.apps.localhost:8000/x?y=1".parse().unwrap();
        for (name, value) in headers {
            let name: HeaderName = name.parse().unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        request
    }

    fn prepare(request: &mut Request, upgrade: Option<&HeaderValue>) {
        let forwarded = Forwarded::new(Vec::new(), crate::model::Scheme::Http);
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(folder.path(), None).unwrap();
        prepare_request(request, upgrade, &forwarded, &keys, None);
    }

    #[test]
    fn the_session_cookie_is_taken_out_and_others_stay() {
        let mut request = request(&[
            ("cookie", "a=1; gantry_session=secret; b=2"),
            ("cookie", "gantry_session=again"),
            ("cookie", "__Host-gantry_session=more; gantry_session =odd"),
        ]);
        prepare(&mut request, None);
        let cookies: Vec<_> = request.headers().get_all("cookie").iter().collect();
        assert_eq!(cookies, ["a=1; b=2"]);
    }

    #[test]
    fn gantrys_keys_are_taken_out_and_a_programs_own_stay() {
        use crate::auth::Role;
        use secrecy::ExposeSecret;

        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(folder.path(), Some(&"words of the operator".into())).unwrap();
        let made = || keys.create(Role::User("ann".parse().unwrap())).unwrap();
        let (key, revoked) = (made(), made());
        keys.revoke(&revoked.id).unwrap();
        let (key, revoked) = (key.text.expose_secret(), revoked.text.expose_secret());
        let passed = |name: &str, value: &str| {
            let mut request = request(&[(name, value), (name, "a program's own")]);
            let forwarded = Forwarded::new(Vec::new(), crate::model::Scheme::Http);
            prepare_request(&mut request, None, &forwarded, &keys, None);
            let all = request.headers().get_all(name).iter();
            all.filter(|left| *left == value).count() == 1 && request.headers().contains_key(name)
        };
        for ours in [key, "words of the operator"] {
            assert!(!passed("x-api-key", ours));
            assert!(!passed("authorization", &format!("Bearer {ours}")));
            assert!(!passed("authorization", &format!("bearer   {ours}")));
        }
        for own in [
            "Bearer abc",
            "Basic YTpi",
            "token",
            &format!("Bearer {revoked}"),
        ] {
            assert!(passed("authorization", own), "{own}");
        }
        assert!(passed("x-api-key", "abc"));
    }

    #[test]
    fn a_program_cannot_set_the_session_cookie() {
        let mut headers = HeaderMap::new();
        headers.append("set-cookie", "gantry_session=x; Path=/".parse().unwrap());
        headers.append("set-cookie", " gantry_session =x".parse().unwrap());
        for without_name in ["=gantry_session=x", "gantry_session", " =x", "; a=b", ""] {
            headers.append("set-cookie", without_name.parse().unwrap());
        }
        headers.append("set-cookie", "__host-gantry_session=x".parse().unwrap());
        headers.append("set-cookie", "mine=1".parse().unwrap());
        keep_session_cookie_ours(&mut headers);
        let kept: Vec<_> = headers.get_all("set-cookie").iter().collect();
        assert_eq!(kept, ["mine=1"]);
    }

    #[test]
    fn hop_by_hop_headers_end_here_and_the_host_goes_on() {
        let mut request = request(&[
            ("connection", "keep-alive, X-Secret-Hop"),
            ("x-secret-hop", "1"),
            ("te", "gzip;q=0.5"),
            ("transfer-encoding", "chunked"),
            ("content-length", "3"),
            ("trailer", "Checksum"),
            ("x-forwarded-for", "6.6.6.6"),
            ("accept", "*/*"),
        ]);
        prepare(&mut request, None);
        let headers = request.headers();
        for gone in [
            "connection",
            "x-secret-hop",
            "te",
            "transfer-encoding",
            "content-length",
            "x-forwarded-for",
        ] {
            assert!(!headers.contains_key(gone), "{gone}");
        }
        assert_eq!(headers["accept"], "*/*");
        assert_eq!(headers["trailer"], "Checksum");
        assert_eq!(headers["host"], "a-prod.apps.localhost:8000");
        assert_eq!(request.uri(), "/x?y=1");
    }

    #[test]
    fn a_program_learns_that_its_client_takes_trailers() {
        let mut request = request(&[("te", "gzip, Trailers"), ("connection", "te")]);
        prepare(&mut request, None);
        assert_eq!(request.headers()["te"], "trailers");
        assert_eq!(request.headers()["connection"], "te");
    }

    #[test]
    fn a_body_in_chunks_is_passed_on_whatever_the_method() {
        let mut chunked = request(&[("transfer-encoding", "chunked"), ("content-length", "9")]);
        *chunked.body_mut() = Body::from("body");
        prepare(&mut chunked, None);
        assert_eq!(chunked.headers()["transfer-encoding"], "chunked");
        assert!(!chunked.headers().contains_key("content-length"));
    }

    #[test]
    fn a_client_cannot_list_away_what_a_program_decides_by() {
        let mut request = request(&[
            ("host", "a-prod.apps.localhost:8000"),
            (
                "connection",
                "host, Cookie, content-length, x-forwarded-for",
            ),
            ("connection", "authorization, x-forwarded-host"),
            ("cookie", "a=1"),
            ("content-length", "3"),
            ("authorization", "Basic eA=="),
        ]);
        *request.uri_mut() = Uri::from_static("/x");
        prepare(&mut request, None);
        let headers = request.headers();
        assert_eq!(headers["host"], "a-prod.apps.localhost:8000");
        assert_eq!(headers["x-forwarded-host"], "a-prod.apps.localhost:8000");
        for kept in ["cookie", "content-length", "authorization"] {
            assert!(headers.contains_key(kept), "{kept}");
        }
        assert!(!headers.contains_key("connection"));
    }

    #[test]
    fn a_stranger_is_not_told_what_a_program_wrote() {
        let cause = format!("it ended{LAST_LINES}password=x");
        let problem = Problem::new("deploy_failed", "It did not come up", cause, "");
        assert_eq!(for_strangers(&problem), "It did not come up: it ended");
    }

    #[test]
    fn an_upgrade_is_passed_on() {
        let mut request = request(&[("connection", "Upgrade"), ("upgrade", "websocket")]);
        let wanted = upgrade_wanted(request.headers());
        assert!(wanted.is_some());
        prepare(&mut request, wanted.as_ref());
        assert_eq!(request.headers()["connection"], "upgrade");
        assert_eq!(request.headers()["upgrade"], "websocket");
    }

    #[test]
    fn an_error_page_cannot_be_made_to_carry_markup() {
        let page = error_page(StatusCode::BAD_GATEWAY, "t", "<script>alert(1)</script>");
        let body =
            futures_util::FutureExt::now_or_never(axum::body::to_bytes(page.into_body(), 9_999));
        let body = body.unwrap().unwrap();
        assert!(!String::from_utf8_lossy(&body).contains("<script"));
    }
}
