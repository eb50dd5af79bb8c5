//! The listening socket: accepts, bounds and times connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Edge;

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

/// Whom a connection comes from. Whoever holds it holds the connection's place.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The other side.
    pub address: SocketAddr,
    _place: Arc<OwnedSemaphorePermit>,
}

/// A bound socket that does not answer yet: clients that connect meanwhile wait.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    connections: usize,
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
    pub fn bind(address: SocketAddr, open_files: u64) -> std::io::Result<Self> {
        let socket = if address.is_ipv4() {
            tokio::net::TcpSocket::new_v4()?
        } else {
            tokio::net::TcpSocket::new_v6()?
        };
        // A restart must not wait for the old connections' last packets.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG as u32)?;
        let files =
            usize::try_from(open_files.saturating_sub(RESERVED_FILES)).unwrap_or(usize::MAX);
        Ok(Self {
            listener,
            // A proxied request holds a second one: a quarter is kept for those.
            connections: (files / 4 * 3).clamp(64, MAX_CONNECTIONS),
        })
    }

    /// The address really listened on.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until told to stop.
    pub async fn run(self, edge: Arc<Edge>, router: Router) {
        let places = Arc::new(Semaphore::new(self.connections));
        let stop = edge.shutdown.token.clone();
        loop {
            let accepted = async {
                // With every place taken, new clients wait in the kernel's queue.
                let place = Arc::clone(&places).acquire_owned().await.ok()?;
                Some((self.listener.accept().await, place))
            };
            match stop.run_until_cancelled(accepted).await.flatten() {
                None => return,
                Some((Ok((stream, address)), place)) => {
                    let peer = Peer {
                        address,
                        _place: Arc::new(place),
                    };
                    let connection = serve(Arc::clone(&edge), router.clone(), stream, peer);
                    edge.shutdown.tasks.spawn(connection);
                }
                Some((Err(error), _)) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn serve(edge: Arc<Edge>, router: Router, stream: TcpStream, peer: Peer) {
    if let Err(error) = prepare(&stream) {
        // The client hung up before it was looked at.
        tracing::debug!(%error, "a connection could not be set up");
        return;
    }
    let stop = edge.shutdown.token.clone();
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        let request: Request = request.map(Body::new);
        let edge = Arc::clone(&edge);
        let router = router.clone();
        async move { Ok::<_, std::convert::Infallible>(edge.answer(&router, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    // Frames are small and written whole: none may wait for the acknowledgement of the last.
    stream.set_nodelay(true)?;
    let milliseconds = u32::try_from(UNACKNOWLEDGED_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    Ok(())
}
