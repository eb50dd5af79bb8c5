//! The runner's own port (design.md §5): terminals, files and the program's switch, over one WebSocket for
//! whoever has a ticket of this repl. The protocol is described in README.md.

mod files;
mod listing;
mod protocol;
mod session;
mod terminal;
mod tree;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::app::{App, State};
use super::build::fits;
use super::wire::{Activity, INSTALLED, LINE, LINE_PROTOCOL, LISTING, MAX_BUILD_BYTES, PACKAGES};
use crate::model::{Install, Packages, RelativePath, ReplId, TicketKey};
use files::Entry;
pub(super) use files::Files;
use listing::Listing;
pub use terminal::Terminal;

/// Connections at one time: a person's tabs on some machines.
const MOST_CONNECTIONS: usize = 32;

/// Terminals at one time, of all connections together.
const MOST_TERMINALS: usize = 16;

/// Longest wait for a request's head.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);

/// Whose runner this is, and how its tickets are checked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Identity {
    /// The repl.
    pub repl: ReplId,
    /// The key of its tickets, as text.
    pub key: String,
}

/// Who is let in: whoever has a ticket of the repl's. `None`: nobody.
#[derive(Debug, Clone)]
pub struct Tickets(Option<(ReplId, TicketKey)>);

impl Tickets {
    fn of(identity: Option<Identity>) -> Self {
        Self(identity.and_then(|Identity { repl, key }| {
            let key = TicketKey::from_text(&key);
            Some((repl, key?))
        }))
    }

    /// Whether the request has a ticket: in its URL, for browsers, or as a bearer's.
    pub(super) fn admit(&self, request: &Request<Incoming>) -> bool {
        let Some((repl, key)) = &self.0 else {
            return false;
        };
        let query = request.uri().query().unwrap_or_default();
        let in_url = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("ticket="));
        let header = request.headers().get(header::AUTHORIZATION);
        let borne = header.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(u64::MAX, |now| now.as_secs());
        borne
            .or(in_url)
            .is_some_and(|ticket| key.admits(repl, ticket, now))
    }
}

/// What callers of the runner's port reach.
pub struct Workspace {
    app: Rc<App>,
    tickets: Tickets,
    files: Files,
    listing: RefCell<Listing>,
    /// When those packages were installed that it began with; 0: it had none.
    began_with: u64,
    packing: Cell<bool>,
    terminals: RefCell<BTreeMap<String, Rc<Terminal>>>,
    connections: Cell<usize>,
    last_connection: Cell<u64>,
}

impl Workspace {
    /// Of this program. `brought`: with packages that the code store has, if it has any.
    pub(super) fn new(
        app: Rc<App>,
        identity: Option<Identity>,
        brought: bool,
    ) -> anyhow::Result<Rc<Self>> {
        let tickets = Tickets::of(identity);
        app.let_in(tickets.clone());
        let files = Files::open(app.slot().folder(), app.slot().uid)?;
        let began_with = installed(&files).filter(|_| brought);
        let began_with = began_with.map_or(0, |(when, _)| when);
        // What cannot be listed is told to whoever asks for it.
        let began = files.tree(&BTreeSet::new()).unwrap_or_default();
        let listing = Listing::beginning_with(&began);
        Ok(Rc::new(Self {
            app,
            tickets,
            files,
            listing: RefCell::new(listing),
            began_with,
            packing: Cell::new(false),
            terminals: RefCell::default(),
            connections: Cell::new(0),
            last_connection: Cell::new(0),
        }))
    }

    /// Answers on one connection. `probe` answers what needs no ticket.
    pub async fn serve(
        self: Rc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        probe: impl Fn(&str) -> Option<Response<Full<Bytes>>>,
    ) {
        let service = hyper::service::service_fn(|request: Request<Incoming>| {
            let probed = probe(request.uri().path());
            let this = Rc::clone(&self);
            async move {
                Ok::<_, Infallible>(match probed {
                    Some(response) => response,
                    None => this.answer(request).await,
                })
            }
        });
        let _ = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
    }

    async fn answer(self: Rc<Self>, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !self.tickets.admit(&request) {
            let why =
                "a ticket of this repl is required, and this one is missing, too old or another's";
            return text(StatusCode::UNAUTHORIZED, why);
        }
        let path = request.uri().path();
        if path == "/" {
            return self.open(request);
        }
        if path == LINE {
            return self.take_line(request);
        }
        if path == PACKAGES {
            let query = request.uri().query().unwrap_or_default();
            return self.packages(number_in(query)).await;
        }
        if path == "/files" {
            return self.list(request.uri().query().unwrap_or_default());
        }
        if path == "/activity" {
            return json(&self.activity());
        }
        match path.strip_prefix("/files/").map(decoded) {
            Some(Some(path)) => match self.files.read_whole(&path) {
                Ok(content) => Response::new(Full::new(Bytes::from(content))),
                Err(error) if is_gone(&error) => text(StatusCode::NOT_FOUND, &error.to_string()),
                Err(error) => text(StatusCode::CONFLICT, &error.to_string()),
            },
            _ => text(StatusCode::NOT_FOUND, "there is nothing here"),
        }
    }

    /// Everything there is.
    fn tree(&self) -> io::Result<Vec<Entry>> {
        self.files.tree(self.listing.borrow().there())
    }

    fn activity(&self) -> Activity {
        let unused = match self.connections.get() {
            0 => self.app.unused(),
            _ => Duration::ZERO,
        };
        Activity {
            unused_ms: u64::try_from(unused.as_millis()).unwrap_or(u64::MAX),
            starting: matches!(self.app.state(), State::Starting),
        }
    }

    /// Every file there is, and those that are gone but for what `done` says is known.
    fn list(&self, query: &str) -> Response<Full<Bytes>> {
        match self.tree() {
            Ok(tree) => {
                let done = number_in(query);
                let (entries, number) = self.listing.borrow_mut().next(tree, done);
                let mut response = json(&entries);
                response.headers_mut().insert(LISTING, number.into());
                response
            }
            Err(error) => text(StatusCode::CONFLICT, &error.to_string()),
        }
    }

    /// What was installed, packed, unless who asks has what was installed `done`, or it was here at the beginning.
    async fn packages(self: Rc<Self>, done: u64) -> Response<Full<Bytes>> {
        let newest = installed(&self.files);
        let Some((when, install)) =
            newest.filter(|(when, _)| ![done, self.began_with].contains(when))
        else {
            return text(StatusCode::NOT_FOUND, "nothing was installed");
        };
        if self.packing.replace(true) {
            return text(
                StatusCode::SERVICE_UNAVAILABLE,
                "it is being packed already",
            );
        }
        // It goes on when who asked goes away.
        let packed = tokio::task::spawn_local(async move {
            let packed = self.pack(install).await;
            self.packing.set(false);
            packed
        });
        match packed.await.map_err(anyhow::Error::from).flatten() {
            Ok(packed) => {
                let mut response = Response::new(Full::new(Bytes::from(packed)));
                response.headers_mut().insert(INSTALLED, when.into());
                response
            }
            // The program ended meanwhile, or changed what is packed.
            Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{error:#}")),
        }
    }

    /// What was installed so, as an archive; nothing when that is too much to be kept: then it is installed again
    /// at the next start.
    async fn pack(&self, install: &Install) -> anyhow::Result<Vec<u8>> {
        let mut above: Vec<&str> = Vec::new();
        for folder in install.own {
            above.extend(folder.match_indices('/').map(|(end, _)| &folder[..end]));
        }
        above.sort_unstable();
        above.dedup();
        for folder in above.iter().chain(install.own) {
            // A link would be all that is packed.
            if !self.files.is_folder(folder) {
                return Ok(Vec::new());
            }
        }
        // By the user's own rights: whatever stands there, nothing of anybody else's is packed.
        let pack = format!(
            "tar -cz --hard-dereference --mode=u+rwX --no-recursion {} --recursion {} 2>/dev/null",
            above.join(" "),
            install.own.join(" ")
        );
        let argv = ["sh", "-c", &pack].map(str::to_owned);
        let Some(archive) = self.app.written_by(&argv, MAX_BUILD_BYTES).await? else {
            return Ok(Vec::new());
        };
        let checked = tokio::task::spawn_blocking(move || fits(&archive).then_some(archive));
        Ok(checked.await?.unwrap_or_default())
    }

    /// Makes the connection a line for the program's installer.
    fn take_line(self: Rc<Self>, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if self.app.lines().is_none() {
            return text(StatusCode::NOT_FOUND, "a release installs nothing");
        }
        tokio::task::spawn_local(async move {
            if let (Ok(io), Some(lines)) = (hyper::upgrade::on(request).await, self.app.lines()) {
                lines.lend(Box::new(TokioIo::new(io)));
            }
        });
        let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
        let headers = response.headers_mut();
        headers.remove(header::CONTENT_TYPE);
        let upgrade = header::HeaderValue::from_static("upgrade");
        headers.insert(header::CONNECTION, upgrade);
        let line = header::HeaderValue::from_static(LINE_PROTOCOL);
        headers.insert(header::UPGRADE, line);
        response
    }

    /// Makes the connection a WebSocket.
    fn open(self: Rc<Self>, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let headers = request.headers();
        let upgrade = headers.get(header::UPGRADE);
        let wanted =
            upgrade.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"));
        let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| wanted) else {
            return text(StatusCode::UPGRADE_REQUIRED, "this speaks WebSocket");
        };
        if self.connections.get() >= MOST_CONNECTIONS {
            return text(
                StatusCode::SERVICE_UNAVAILABLE,
                "there are too many connections already",
            );
        }
        let accept = derive_accept_key(key.as_bytes());
        let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
        let switched = [
            (header::CONNECTION, "upgrade"),
            (header::UPGRADE, "websocket"),
            (header::SEC_WEBSOCKET_ACCEPT, accept.as_str()),
        ];
        response.headers_mut().remove(header::CONTENT_TYPE);
        for (name, value) in switched {
            if let Ok(value) = header::HeaderValue::from_str(value) {
                response.headers_mut().insert(name, value);
            }
        }
        let number = self.last_connection.get() + 1;
        self.last_connection.set(number);
        self.connections.set(self.connections.get() + 1);
        tokio::task::spawn_local(async move {
            if let Ok(io) = hyper::upgrade::on(request).await {
                session::run(&self, number, TokioIo::new(io)).await;
            }
            for terminal in self.terminals.borrow().values() {
                terminal.detach(number);
            }
            self.connections.set(self.connections.get() - 1);
            self.app.notice();
        });
        response
    }

    /// The terminal of this name, made when it is not there.
    fn terminal(&self, name: &str, size: (u16, u16)) -> anyhow::Result<(Rc<Terminal>, bool)> {
        let mut terminals = self.terminals.borrow_mut();
        terminals.retain(|_, terminal| {
            let ended = terminal.has_ended();
            if ended {
                self.app.spare(terminal.session(), false);
            }
            !ended
        });
        if let Some(known) = terminals.get(name) {
            return Ok((Rc::clone(known), false));
        }
        anyhow::ensure!(
            terminals.len() < MOST_TERMINALS,
            "there are {MOST_TERMINALS} terminals already; close one"
        );
        let terminal = self.app.start_terminal(name, size)?;
        self.app.spare(terminal.session(), true);
        terminals.insert(name.to_owned(), Rc::clone(&terminal));
        Ok((terminal, true))
    }

    /// Those that have not ended.
    fn terminal_names(&self) -> Vec<String> {
        let terminals = self.terminals.borrow();
        let there = terminals.iter().filter(|(_, one)| !one.has_ended());
        there.map(|(name, _)| name.clone()).collect()
    }

    fn known_terminal(&self, name: &str) -> Option<Rc<Terminal>> {
        self.terminals.borrow().get(name).cloned()
    }
}

/// Whether a file is not there any more, or something else is in its place.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    [NotFound, NotADirectory].contains(&error.kind())
}

/// When packages were installed last, and how.
fn installed(files: &Files) -> Option<(u64, &'static Install)> {
    let times = Packages::installs()
        .filter_map(|install| Some((files.changed(&install.installed())?, install)));
    times.max_by_key(|(when, _)| *when)
}

/// The number that the other side says it has seen to.
fn number_in(query: &str) -> u64 {
    let done = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("done=")?.parse().ok());
    done.unwrap_or_default()
}

fn decoded(path: &str) -> Option<RelativePath> {
    let path = percent_encoding::percent_decode_str(path)
        .decode_utf8()
        .ok()?;
    RelativePath::try_from(path.into_owned()).ok()
}

/// A plain answer.
pub fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

/// An answer for programs.
pub fn json(value: &impl Serialize) -> Response<Full<Bytes>> {
    let Ok(body) = serde_json::to_vec(value) else {
        return text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the answer cannot be written",
        );
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
