//! A WebSocket to the server: opened, opened again when it is lost, and kept an eye on.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use futures_util::SinkExt;
use reqwest::StatusCode;
use secrecy::ExposeSecret;
use tokio::net::TcpStream;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Request;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use super::failure::{Failure, chain};
use super::http::{self, Api};

/// Longest wait for a TCP connection and the WebSocket handshake on it.
pub(super) const HANDSHAKE_TIMEOUT: Duration = http::CONNECT_TIMEOUT;
/// How long a lost server is waited for: a restart takes a second, a machine's reboot most of this.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// First and longest pause between two attempts: a restarted server is back soon, and a server that
/// is away longer is not to be knocked at more often than a person would.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A connection that lived this long was a good one: the next loss is waited for anew.
const STABLE_AFTER: Duration = Duration::from_secs(3);
/// Between two pings: half of the 60 s after which many proxies and NAT tables forget a quiet TCP connection.
const PING_EVERY: Duration = Duration::from_secs(30);
/// Nothing received for this long, pongs included, is a dead connection: two pings went unanswered.
const QUIET_TIMEOUT: Duration = Duration::from_secs(75);
/// Longest wait for one message to leave: the largest, 1 MiB, over 150 kbit/s.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest farewell: what was wanted is here, and a server that does not answer a close is not waited for.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// Largest message taken from the server: 16 MiB of output, the most a run may write, sixfold as
/// JSON escapes, and room for the tests.
const MAX_FRAME_BYTES: usize = 128 << 20;

pub(super) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// When a lost server is given up.
#[derive(Debug, Default)]
pub(super) struct Patience(Option<Instant>);

impl Patience {
    fn until(&self) -> Instant {
        self.0
            .unwrap_or_else(|| Instant::now() + http::FIRST_CONTACT)
    }

    /// A connection that was opened then is lost now.
    pub(super) fn lost(&mut self, opened: Instant) {
        let now = Instant::now();
        if self.0.is_none() || now - opened > STABLE_AFTER {
            self.0 = Some(now + GIVE_UP_AFTER);
        }
    }
}

/// A connection, tried again for as long as there is patience; `None` when `leave` comes first.
pub(super) async fn connect(
    api: &Api,
    path: &str,
    patience: &Patience,
    mut leave: impl AsyncFnMut(),
) -> Result<Option<Socket>, Failure> {
    let until = patience.until();
    let mut pauses = ExponentialBuilder::default()
        .with_min_delay(PAUSES.0)
        .with_max_delay(PAUSES.1)
        .with_jitter()
        .without_max_times()
        .build();
    loop {
        let attempt = tokio::select! {
            attempt = open(api, path) => attempt,
            () = leave() => return Ok(None),
        };
        let failure = match attempt {
            Ok(socket) => return Ok(Some(socket)),
            Err(failure) if failure.passes => failure,
            Err(failure) => return Err(failure),
        };
        let pause = pauses.next().unwrap_or(PAUSES.1);
        if Instant::now() + pause > until {
            return Err(failure);
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = leave() => return Ok(None),
        }
    }
}

/// One attempt.
pub(super) async fn open(api: &Api, path: &str) -> Result<Socket, Failure> {
    let address = api.websocket(path);
    let unreachable = |cause| http::unreachable(api.address(), cause);
    let request = handshake(api, &address).map_err(unreachable)?;
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES));
    // Small frames are the rule: none of them waits for the next.
    let connecting = connect_async_with_config(request, Some(config), true);
    match timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok((socket, _))) => Ok(socket),
        Ok(Err(WsError::Http(response))) => {
            let status = StatusCode::from_u16(response.status().as_u16())
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            Err(http::refused(
                status,
                response.body().as_deref().unwrap_or_default(),
            ))
        }
        Ok(Err(error)) => Err(unreachable(chain(&error))),
        Err(_) => Err(unreachable(format!(
            "no answer for {} s",
            HANDSHAKE_TIMEOUT.as_secs()
        ))),
    }
}

fn handshake(api: &Api, address: &str) -> Result<Request, String> {
    let mut request = address
        .into_client_request()
        .map_err(|error| chain(&error))?;
    let mut key =
        HeaderValue::from_str(api.key().expose_secret()).map_err(|error| chain(&error))?;
    key.set_sensitive(true);
    request.headers_mut().insert("X-API-Key", key);
    Ok(request)
}

/// Sends a message, or says why the connection is lost.
pub(super) async fn send(socket: &mut Socket, message: WsMessage) -> Result<(), String> {
    match timeout(SEND_TIMEOUT, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!(
            "nothing could be sent for {} s",
            SEND_TIMEOUT.as_secs()
        )),
    }
}

/// Says good-bye.
pub(super) async fn close(mut socket: Socket) {
    let _ = timeout(CLOSE_TIMEOUT, socket.close(None)).await;
}

/// Whether a connection is alive.
pub(super) struct Pulse {
    heard: Instant,
    ticks: Interval,
}

impl Pulse {
    /// Of a connection that was just opened.
    pub(super) fn new() -> Self {
        let mut ticks = interval(PING_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        let heard = Instant::now();
        Self { heard, ticks }
    }

    /// Something came.
    pub(super) fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// Resolves when it is time for [`Pulse::ping`].
    pub(super) async fn due(&mut self) {
        self.ticks.tick().await;
    }

    /// Asks for a sign of life, or says that there were none for too long.
    pub(super) async fn ping(&self, socket: &mut Socket) -> Result<(), String> {
        if self.heard.elapsed() > QUIET_TIMEOUT {
            return Err(format!("silent for {} s", QUIET_TIMEOUT.as_secs()));
        }
        send(socket, WsMessage::Ping(Vec::new().into())).await
    }
}
