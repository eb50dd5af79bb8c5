//! The listening socket: accepts, bounds and times connections.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::response::IntoResponse;
use hyper::body::{Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::Edge;
use super::connections::{Bounds, Busy, Connections, Full, Place};
use super::problem::HttpProblem;
use super::upstream::poll_read_piece;
use crate::auth::Caller;
use crate::config::AccessConfig;
use crate::model::Problem;

/// How long a client may take to send a request's headers, and to begin the next request. A phone
/// on a bad line takes a second; slow ones on purpose are gone soon.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Header lines of a request; browsers send some twenty.
const MAX_HEADERS: usize = 100;

/// Most bytes of a request's head, and of what is read ahead.
const MAX_HEAD_BYTES: usize = 32 << 10;

/// Unacknowledged bytes for this long end a connection, whatever it carries: the kernel sees a peer
/// that neither reads nor answers without any timer of ours.
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(60);

/// Connections at one time: 10,000 idle WebSockets and room for everything else.
const MAX_CONNECTIONS: usize = 20_000;

/// Files kept free for everything that is not a connection: journal, sandboxes, programs' streams.
const RESERVED_FILES: u64 = 512;

/// After `accept` failed, usually for want of file descriptors: long enough for some to be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that wait to be accepted: a thousand clients that reconnect at once, and more.
const BACKLOG: i32 = 4_096;

/// Connections beyond all places that are told so, or asked for the server's health, at one time.
const OVERFLOW: usize = 64;

/// How long one of them may take: for one short answer.
const OVERFLOW_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections to the address that answers for the server's health only.
const HEALTH_CONNECTIONS: usize = 64;

/// Whom a request comes from. Whoever holds it holds the connection's place.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The other side.
    pub address: SocketAddr,
    /// The connection's place; `None`: it has none and is asked for health only.
    place: Option<Arc<Busy>>,
}

impl Peer {
    /// The connection is this caller's from now on.
    pub fn belongs_to(&self, caller: &Caller) -> Result<(), Full> {
        self.place
            .as_ref()
            .map_or(Ok(()), |busy| busy.place().belongs_to(caller))
    }

    /// The connection is another replica's.
    pub fn belongs_to_replica(&self) {
        if let Some(busy) = &self.place {
            busy.place().belongs_to_replica();
        }
    }
}

/// A bound socket that does not answer yet: clients that connect meanwhile wait.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    connections: Arc<Connections>,
    overflow: Arc<Semaphore>,
    health_only: bool,
}

/// Allows as many open files as the system lets this process have.
pub fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(1 << 20);
    let raised = Rlimit {
        current: Some(most),
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => most,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files could not be raised");
            limit.current.unwrap_or(most)
        }
    }
}

impl Server {
    /// Binds the address. `open_files` bounds the connections.
    pub fn bind(address: SocketAddr, open_files: u64, access: &AccessConfig) -> io::Result<Self> {
        let files =
            usize::try_from(open_files.saturating_sub(RESERVED_FILES)).unwrap_or(usize::MAX);
        let bounds = Bounds {
            // A proxied request holds a second one: a quarter is kept for those.
            all: (files / 4 * 3).clamp(64, MAX_CONNECTIONS),
            per_address: access.connections_per_address,
            per_key: access.connections_per_key,
        };
        Ok(Self {
            listener: listen(address)?,
            connections: Connections::new(bounds),
            overflow: Arc::new(Semaphore::new(OVERFLOW)),
            health_only: false,
        })
    }

    /// Binds an address that answers for the server's health only.
    pub fn bind_health(address: SocketAddr) -> io::Result<Self> {
        let bounds = Bounds {
            all: HEALTH_CONNECTIONS,
            per_address: HEALTH_CONNECTIONS,
            per_key: HEALTH_CONNECTIONS,
        };
        Ok(Self {
            listener: listen(address)?,
            connections: Connections::new(bounds),
            overflow: Arc::new(Semaphore::new(OVERFLOW)),
            health_only: true,
        })
    }

    /// The address really listened on.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until told to stop.
    pub async fn run(self, edge: Arc<Edge>, router: Router) {
        let stop = edge.shutdown.token.clone();
        loop {
            match stop.run_until_cancelled(self.listener.accept()).await {
                None => return,
                Some(Ok((stream, address))) => self.take(&edge, &router, stream, address),
                Some(Err(error)) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Decides what a new connection gets. Never waits: health must be answered whatever the others do.
    fn take(&self, edge: &Arc<Edge>, router: &Router, stream: TcpStream, address: SocketAddr) {
        if let Err(error) = prepare(&stream) {
            // The client hung up before it was looked at.
            tracing::debug!(%error, "a connection could not be set up");
            return;
        }
        let (edge, router) = (Arc::clone(edge), router.clone());
        let tasks = edge.shutdown.tasks.clone();
        match self.connections.open(address.ip()) {
            Some(place) if !self.health_only => {
                drop(tasks.spawn(serve(edge, router, stream, address, place)));
            }
            Some(place) => {
                tasks.spawn(async move {
                    tokio::select! {
                        () = serve_once(edge, router, stream, address) => {}
                        () = place.evicted() => {}
                    }
                });
            }
            None => {
                // With this many told that there is no room, the rest learns it from the closed connection.
                if let Ok(one) = Arc::clone(&self.overflow).try_acquire_owned() {
                    tasks.spawn(async move {
                        serve_once(edge, router, stream, address).await;
                        drop(one);
                    });
                }
            }
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        tokio::net::TcpSocket::new_v4()?
    } else {
        tokio::net::TcpSocket::new_v6()?
    };
    // A restart must not wait for the old connections' last packets.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG as u32)
}

fn http() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES);
    builder
}

async fn serve(
    edge: Arc<Edge>,
    router: Router,
    stream: TcpStream,
    address: SocketAddr,
    place: Place,
) {
    let place = Arc::new(place);
    let stop = edge.shutdown.token.clone();
    let own = Arc::clone(&place);
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        let busy = Arc::new(own.busy());
        request.extensions_mut().insert(Peer {
            address,
            place: Some(Arc::clone(&busy)),
        });
        let request: Request = request.map(Body::new);
        let edge = Arc::clone(&edge);
        let router = router.clone();
        async move {
            let response = edge.answer(&router, request).await;
            Ok::<_, Infallible>(response.map(|body| held(body, busy)))
        }
    });
    let connection = http().serve_connection(TokioIo::new(InPieces(stream)), service);
    let mut connection = std::pin::pin!(connection.with_upgrades());
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = place.evicted() => {
            tracing::debug!(%address, "an idle connection was closed to make room");
            return;
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// A client's connection, read in small pieces.
struct InPieces(TcpStream);

impl AsyncRead for InPieces {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        poll_read_piece(&mut self.0, context, buffer)
    }
}

impl AsyncWrite for InPieces {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// One answer, about the server's health or that there is no room for more.
async fn serve_once(edge: Arc<Edge>, router: Router, stream: TcpStream, address: SocketAddr) {
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let edge = Arc::clone(&edge);
        let router = router.clone();
        async move {
            let health = super::health::is_asked_by(&request);
            let response = match health {
                true => edge.answer_health(&router, request.map(Body::new)).await,
                false => no_room(address).into_response(),
            };
            Ok::<_, Infallible>(response)
        }
    });
    let mut once = http();
    let connection = once
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let _ = tokio::time::timeout(OVERFLOW_TIMEOUT, connection).await;
}

fn no_room(address: SocketAddr) -> HttpProblem {
    HttpProblem::unavailable(Problem::new(
        "too_many_connections",
        "The server takes no more connections now",
        format!("all places are in use, or all that {} may have", address.ip()),
        "Close connections that are not needed and try again. Operators: see GANTRY_MAX_CONNECTIONS_PER_ADDRESS",
    ))
    .retry_after(1)
}

/// The body, on a connection that is in use until its last byte was taken.
fn held(body: Body, busy: Arc<Busy>) -> Body {
    match body.is_end_stream() {
        true => body,
        false => Body::new(Held { body, _busy: busy }),
    }
}

/// See [`held`].
struct Held {
    body: Body,
    _busy: Arc<Busy>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Frames are small and written whole: none may wait for the acknowledgement of the last.
    stream.set_nodelay(true)?;
    let milliseconds = u32::try_from(UNACKNOWLEDGED_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    Ok(())
}
