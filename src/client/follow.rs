//! One submission over one WebSocket at a time: sent once, followed to its reply through lost
//! connections and server restarts.
//!
//! The id is the client's own and the server runs an id once, so sending again is always safe: on
//! a new connection the stream is resumed behind the last frame seen, and only a server that does
//! not know the id is sent the submission again.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use futures_util::{SinkExt, StreamExt};
use reqwest::StatusCode;
use secrecy::ExposeSecret;
use tokio::net::TcpStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Request;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use super::failure::{Failure, chain};
use super::frame::Frame;
use super::http::{self, Api};
use super::message::Message;
use super::progress::{Progress, Taken};
use crate::model::Status;

/// Longest wait for a TCP connection and the WebSocket handshake on it.
const HANDSHAKE_TIMEOUT: Duration = http::CONNECT_TIMEOUT;
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
/// After Ctrl+C: killing a process tree and writing the reply take well under a second; a second
/// Ctrl+C does not wait.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest farewell: the reply is here, and a server that does not answer a close is not waited for.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// Largest message taken from the server: 16 MiB of output, the most a run may write, sixfold as
/// JSON escapes, and room for the tests.
const MAX_FRAME_BYTES: usize = 128 << 20;

/// Who shows what is going on.
pub(super) trait View {
    /// One frame, each once and in order; the reply is the last.
    fn frame(&mut self, frame: &Frame) -> Result<(), Failure>;
    /// Something about the connection that a person may want to know.
    fn notice(&mut self, text: &str);
}

/// How following ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// With the submission's reply.
    Replied(Status),
    /// By Ctrl+C.
    Interrupted,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// How one connection ended.
enum Talk {
    End(End),
    Lost(String),
}

/// The next thing that happens on a connection.
enum Happening {
    Received(Option<Result<WsMessage, WsError>>),
    Interrupted,
    Tick,
    CancelTimeout,
}

/// Follows one submission to its end.
pub(super) struct Follower<'a, V> {
    api: &'a Api,
    message: Message,
    view: V,
    progress: Progress,
    interrupts: Signal,
    /// When a lost server is given up.
    give_up_at: Option<Instant>,
    /// After Ctrl+C: when the reply is no longer waited for.
    cancel_until: Option<Instant>,
}

impl<'a, V: View> Follower<'a, V> {
    pub(super) fn new(api: &'a Api, message: Message, view: V) -> Result<Self, Failure> {
        let interrupts = signal(SignalKind::interrupt()).map_err(|error| {
            Failure::unavailable(
                "Ctrl+C cannot be listened for",
                error.to_string(),
                "Check the limit on open files.",
            )
        })?;
        Ok(Self {
            api,
            progress: Progress::new(message.id),
            message,
            view,
            interrupts,
            give_up_at: None,
            cancel_until: None,
        })
    }

    pub(super) async fn run(mut self) -> Result<End, Failure> {
        loop {
            let Some(socket) = self.connect().await? else {
                return Ok(self.interrupted_without_connection());
            };
            let connected = Instant::now();
            match self.converse(socket).await? {
                Talk::End(end) => return Ok(end),
                Talk::Lost(cause) => {
                    let now = Instant::now();
                    if self.give_up_at.is_none() || now - connected > STABLE_AFTER {
                        self.give_up_at = Some(now + GIVE_UP_AFTER);
                    }
                    self.view
                        .notice(&format!("connection lost ({cause}); trying again"));
                }
            }
        }
    }

    /// A connection; `None` after Ctrl+C.
    async fn connect(&mut self) -> Result<Option<Socket>, Failure> {
        let until = self
            .give_up_at
            .unwrap_or_else(|| Instant::now() + http::FIRST_CONTACT);
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(PAUSES.0)
            .with_max_delay(PAUSES.1)
            .with_jitter()
            .without_max_times()
            .build();
        loop {
            let attempt = tokio::select! {
                attempt = open(self.api) => attempt,
                _ = self.interrupts.recv() => return Ok(None),
            };
            let failure = match attempt {
                Ok(socket) => return Ok(Some(socket)),
                Err(failure) if failure.passes => failure,
                Err(failure) => return Err(self.given_up(failure)),
            };
            let pause = pauses.next().unwrap_or(PAUSES.1);
            if Instant::now() + pause > until {
                return Err(self.given_up(failure));
            }
            tokio::select! {
                () = sleep(pause) => {}
                _ = self.interrupts.recv() => return Ok(None),
            }
        }
    }

    /// What cannot be followed any more may still be running: that must be said.
    fn given_up(&self, mut failure: Failure) -> Failure {
        if self.progress.sent {
            failure.problem.remediation.push_str(&format!(
                "\nThe submission may be running on: `gantry logs --submission {}` tells how it ends.",
                self.message.id
            ));
        }
        failure
    }

    fn interrupted_without_connection(&mut self) -> End {
        if self.progress.sent {
            let id = self.message.id;
            self.view.notice(&format!(
                "not connected, so it could not be cancelled; `gantry logs --submission {id}` tells how it ends"
            ));
        }
        End::Interrupted
    }

    /// Everything on one connection.
    async fn converse(&mut self, mut socket: Socket) -> Result<Talk, Failure> {
        let opening = self.progress.opening(&self.message);
        if let Err(cause) = send(&mut socket, opening).await {
            return Ok(Talk::Lost(cause));
        }
        if self.cancel_until.is_some()
            && let Err(cause) = send(&mut socket, self.progress.cancel()).await
        {
            return Ok(Talk::Lost(cause));
        }
        let mut heard = Instant::now();
        let mut ticks = ticks();
        loop {
            match self.next(&mut socket, &mut ticks).await {
                Happening::Received(received) => {
                    heard = Instant::now();
                    if let Some(talk) = self.received(&mut socket, received).await? {
                        return Ok(talk);
                    }
                }
                Happening::Interrupted if self.cancel_until.is_some() => {
                    return Ok(Talk::End(End::Interrupted));
                }
                Happening::Interrupted => {
                    self.cancel_until = Some(Instant::now() + CANCEL_TIMEOUT);
                    self.view.notice("cancelling");
                    if let Err(cause) = send(&mut socket, self.progress.cancel()).await {
                        return Ok(Talk::Lost(cause));
                    }
                }
                Happening::Tick => {
                    if heard.elapsed() > QUIET_TIMEOUT {
                        return Ok(Talk::Lost(format!(
                            "silent for {} s",
                            QUIET_TIMEOUT.as_secs()
                        )));
                    }
                    if let Err(cause) = send(&mut socket, WsMessage::Ping(Vec::new().into())).await
                    {
                        return Ok(Talk::Lost(cause));
                    }
                }
                Happening::CancelTimeout => {
                    self.view.notice("no reply to the cancelling; leaving");
                    return Ok(Talk::End(End::Interrupted));
                }
            }
        }
    }

    async fn next(&mut self, socket: &mut Socket, ticks: &mut Interval) -> Happening {
        let cancel_until = self.cancel_until;
        tokio::select! {
            received = socket.next() => Happening::Received(received),
            _ = self.interrupts.recv() => Happening::Interrupted,
            _ = ticks.tick() => Happening::Tick,
            () = sleep_until(cancel_until) => Happening::CancelTimeout,
        }
    }

    async fn received(
        &mut self,
        socket: &mut Socket,
        received: Option<Result<WsMessage, WsError>>,
    ) -> Result<Option<Talk>, Failure> {
        let text = match received {
            None => return Ok(Some(Talk::Lost("closed by the server".to_owned()))),
            Some(Err(error)) => return Ok(Some(Talk::Lost(chain(&error)))),
            Some(Ok(WsMessage::Text(text))) => text,
            Some(Ok(WsMessage::Close(Some(close)))) if close.code == CloseCode::Size => {
                return Err(Failure::usage(
                    "the server does not take a message of this size",
                    close.reason.to_string(),
                    "Make the code, the tests or the input smaller.",
                ));
            }
            Some(Ok(WsMessage::Close(Some(close)))) if !close.reason.is_empty() => {
                return Ok(Some(Talk::Lost(super::render::printable(&close.reason))));
            }
            // The close handshake goes on; the end of the stream follows.
            Some(Ok(_)) => return Ok(None),
        };
        let frame = Frame::parse(&text)?;
        match self.progress.take(&frame) {
            Taken::Old => Ok(None),
            Taken::New => {
                self.view.frame(&frame)?;
                Ok(None)
            }
            // It never arrived, and is not wanted any more.
            Taken::Unknown if self.cancel_until.is_some() => Ok(Some(Talk::End(End::Interrupted))),
            Taken::Unknown => match send(socket, self.progress.submit(&self.message)).await {
                Ok(()) => Ok(None),
                Err(cause) => Ok(Some(Talk::Lost(cause))),
            },
            Taken::Gap => Ok(Some(Talk::Lost("frames are missing".to_owned()))),
            Taken::Reply(outcome) => {
                self.view.frame(&frame)?;
                // The reply is here: how the connection ends does not matter any more.
                let _ = timeout(CLOSE_TIMEOUT, socket.close(None)).await;
                let end = match self.cancel_until {
                    Some(_) => End::Interrupted,
                    None => End::Replied(outcome.status),
                };
                Ok(Some(Talk::End(end)))
            }
        }
    }
}

fn ticks() -> Interval {
    let mut ticks = interval(PING_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    ticks
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn send(socket: &mut Socket, message: WsMessage) -> Result<(), String> {
    match timeout(SEND_TIMEOUT, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!(
            "nothing could be sent for {} s",
            SEND_TIMEOUT.as_secs()
        )),
    }
}

async fn open(api: &Api) -> Result<Socket, Failure> {
    let address = api.websocket();
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::model::SubmissionId;

    fn frame(id: SubmissionId, seq: impl Into<Option<u64>>, rest: &str) -> Frame {
        let seq = seq
            .into()
            .map(|seq: u64| format!(r#","seq":{seq}"#))
            .unwrap_or_default();
        Frame::parse(&format!(r#"{{"submission_id":"{id}"{seq},{rest}}}"#)).unwrap()
    }

    const QUEUED: &str = r#""event":"queued""#;
    const DEPLOYED: &str = r#""status":"deployed""#;
    const INVALID: &str = r#""status":"invalid""#;

    /// What the follower showed.
    #[derive(Default)]
    struct Seen(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

    impl View for Seen {
        fn frame(&mut self, frame: &Frame) -> Result<(), Failure> {
            self.0
                .lock()
                .unwrap()
                .push(frame.seq.unwrap_or_default().to_string());
            Ok(())
        }
        fn notice(&mut self, _: &str) {
            self.0.lock().unwrap().push("notice".to_owned());
        }
    }

    /// What a scripted server does; after its last act on a connection it hangs up.
    enum Act {
        Expect(&'static str),
        Send(u64, &'static str),
        Refuse,
    }
    use Act::{Expect, Refuse, Send};

    async fn play(connections: Vec<Vec<Act>>) -> (Result<End, Failure>, Vec<String>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let id = SubmissionId::new();
        let text = json!({"code": "", "submission_id": id}).to_string();
        let server = tokio::spawn(async move {
            for acts in connections {
                let (stream, _) = listener.accept().await.unwrap();
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                for act in acts {
                    let answer = match act {
                        Expect(word) => {
                            let text = socket.next().await.unwrap().unwrap().into_text().unwrap();
                            assert!(text.contains(word), "{text} has no {word}");
                            continue;
                        }
                        Send(seq, rest) => frame(id, seq, rest),
                        Refuse => frame(id, None, INVALID),
                    };
                    socket
                        .send(WsMessage::text(answer.json.to_string()))
                        .await
                        .unwrap();
                }
            }
        });
        let api = Api::new(address.parse().unwrap(), "key".to_owned().into()).unwrap();
        let seen = Seen::default();
        let shown = seen.0.clone();
        let end = Follower::new(&api, Message { id, text }, seen)
            .unwrap()
            .run()
            .await;
        server.await.unwrap();
        let shown = shown.lock().unwrap().clone();
        (end, shown)
    }

    #[tokio::test]
    async fn a_cut_connection_is_resumed_without_gap_or_double() {
        let (end, shown) = play(vec![
            vec![Expect("code"), Send(1, QUEUED), Send(2, QUEUED)],
            vec![
                Expect(r#""after":2"#),
                Send(2, QUEUED),
                Send(3, QUEUED),
                Send(5, QUEUED),
            ],
            vec![Expect(r#""after":3"#), Send(4, QUEUED), Send(5, DEPLOYED)],
        ])
        .await;
        assert_eq!(end.unwrap(), End::Replied(Status::Deployed));
        assert_eq!(shown, ["1", "2", "notice", "3", "notice", "4", "5"]);
    }

    #[tokio::test]
    async fn a_server_that_lost_the_submission_gets_it_again() {
        let (end, shown) = play(vec![
            vec![Expect("code")],
            vec![Expect("resume"), Refuse, Expect("code"), Send(1, DEPLOYED)],
        ])
        .await;
        assert_eq!(end.unwrap(), End::Replied(Status::Deployed));
        assert_eq!(shown, ["notice", "1"]);
    }

    #[tokio::test]
    async fn an_invalid_submission_is_not_sent_again() {
        let (end, shown) = play(vec![vec![Expect("code"), Refuse]]).await;
        assert_eq!(end.unwrap(), End::Replied(Status::Invalid));
        assert_eq!(shown, ["0"]);
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_unavailable_soon() {
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let api = Api::new(
            format!("http://{free}").parse().unwrap(),
            "key".to_owned().into(),
        );
        let message = Message {
            id: SubmissionId::new(),
            text: "{}".to_owned(),
        };
        let api = api.unwrap();
        let begun = Instant::now();
        let failure = Follower::new(&api, message, Seen::default())
            .unwrap()
            .run()
            .await
            .unwrap_err();
        assert_eq!(failure.exit, crate::client::failure::Exit::Unavailable);
        assert!(failure.problem.cause.contains("refused"), "{failure:?}");
        assert!(
            !failure.problem.remediation.contains("running on"),
            "nothing was sent"
        );
        assert!(begun.elapsed() < http::FIRST_CONTACT + HANDSHAKE_TIMEOUT);
    }
}
