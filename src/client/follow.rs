//! One submission over one WebSocket at a time: sent once, followed to its reply through lost
//! connections and server restarts.
//!
//! The id is the client's own and the server runs an id once, so sending again is always safe: on
//! a new connection the stream is resumed behind the last frame seen, and only a server that does
//! not know the id is sent the submission again. Input is sent with its offset and kept until the server has
//! it, so that it too may be sent again.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};

use super::connection::{self, Patience, Pulse, Socket, send};
use super::failure::{Failure, chain};
use super::frame::Frame;
use super::http::Api;
use super::message::Message;
use super::progress::{Progress, Taken};
use super::typed::Typed;
use crate::model::Status;

/// Where submissions go.
const PATH: &str = "/ws/code";
/// After Ctrl+C: killing a process tree and writing the reply take well under a second; a second
/// Ctrl+C does not wait.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

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

/// How one connection ended.
enum Talk {
    End(End),
    Lost(String),
}

/// The next thing that happens on a connection.
enum Happening {
    Received(Option<Result<WsMessage, WsError>>),
    Typed(Typed),
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
    /// Input for the program, as it is typed.
    input: Option<mpsc::Receiver<Typed>>,
    interrupts: Signal,
    patience: Patience,
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
            input: None,
            interrupts,
            patience: Patience::default(),
            cancel_until: None,
        })
    }

    /// Hands this on to the program while it runs.
    pub(super) fn with_input(mut self, input: Option<mpsc::Receiver<Typed>>) -> Self {
        self.input = input;
        self
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
                    self.patience.lost(connected);
                    self.view
                        .notice(&format!("connection lost ({cause}); trying again"));
                }
            }
        }
    }

    /// A connection; `None` after Ctrl+C.
    async fn connect(&mut self) -> Result<Option<Socket>, Failure> {
        let interrupts = &mut self.interrupts;
        let interrupted = async || {
            interrupts.recv().await;
        };
        let connected = connection::connect(self.api, PATH, &self.patience, interrupted).await;
        connected.map_err(|failure| self.given_up(failure))
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
        let mut opening = vec![self.progress.opening(&self.message)];
        opening.extend(self.progress.input_again());
        if let Err(cause) = send_all(&mut socket, opening).await {
            return Ok(Talk::Lost(cause));
        }
        if self.cancel_until.is_some()
            && let Err(cause) = send(&mut socket, self.progress.cancel()).await
        {
            return Ok(Talk::Lost(cause));
        }
        let mut pulse = Pulse::new();
        loop {
            match self.next(&mut socket, &mut pulse).await {
                Happening::Received(received) => {
                    pulse.heard();
                    if let Some(talk) = self.received(&mut socket, received).await? {
                        if matches!(talk, Talk::End(_)) {
                            connection::close(socket).await;
                        }
                        return Ok(talk);
                    }
                }
                Happening::Typed(typed) => {
                    if typed.is_none() {
                        self.input = None;
                    }
                    let frames = self.progress.input(typed);
                    if let Err(cause) = send_all(&mut socket, frames).await {
                        return Ok(Talk::Lost(cause));
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
                    if let Err(cause) = pulse.ping(&mut socket).await {
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

    async fn next(&mut self, socket: &mut Socket, pulse: &mut Pulse) -> Happening {
        let cancel_until = self.cancel_until;
        // Who types waits while the server is behind.
        let takes_input = self.progress.takes_input();
        let input = self.input.as_mut().filter(|_| takes_input);
        tokio::select! {
            typed = next_of(input) => Happening::Typed(typed),
            received = socket.next() => Happening::Received(received),
            _ = self.interrupts.recv() => Happening::Interrupted,
            () = pulse.due() => Happening::Tick,
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
            Taken::Unknown => {
                let mut again = vec![self.progress.submit(&self.message)];
                again.extend(self.progress.input_again());
                let lost = send_all(socket, again).await.err();
                Ok(lost.map(Talk::Lost))
            }
            Taken::InputRefused(problem) => {
                let text = format!("{problem}. {}", problem.remediation);
                self.view.notice(&super::render::printable(&text));
                Ok(None)
            }
            Taken::Gap => Ok(Some(Talk::Lost("frames are missing".to_owned()))),
            Taken::Reply(outcome) => {
                // The reply is here: how the connection ends does not matter any more.
                self.view.frame(&frame)?;
                let end = match self.cancel_until {
                    Some(_) => End::Interrupted,
                    None => End::Replied(outcome.status),
                };
                Ok(Some(Talk::End(end)))
            }
        }
    }
}

async fn send_all(socket: &mut Socket, messages: Vec<WsMessage>) -> Result<(), String> {
    for message in messages {
        send(socket, message).await?;
    }
    Ok(())
}

/// The next piece; without any input, nothing ever.
async fn next_of(input: Option<&mut mpsc::Receiver<Typed>>) -> Typed {
    match input {
        // Its thread says when nothing follows.
        Some(input) => input.recv().await.flatten(),
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use futures_util::SinkExt;
    use serde_json::json;

    use super::*;
    use crate::client::connection::HANDSHAKE_TIMEOUT;
    use crate::client::http;
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
    const UNKNOWN: &str = r#""status":"invalid","error":{"code":"not_found","message":"There is no submission","cause":"no submission of yours has this id","remediation":"Check the id"}"#;

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
        /// Input at this offset; no text: the end.
        ExpectInput(u64, &'static str),
        Send(u64, &'static str),
        /// So much input is on the disk.
        Acknowledge(u64),
        /// Something outside the submission's stream.
        Answer(&'static str),
    }
    use Act::{Acknowledge, Answer, Expect, ExpectInput, Send};

    async fn play(connections: Vec<Vec<Act>>) -> (Result<End, Failure>, Vec<String>) {
        play_typing(None, connections).await
    }

    /// The same with input, all of it typed at once.
    async fn play_typing(
        input: Option<&[&str]>,
        connections: Vec<Vec<Act>>,
    ) -> (Result<End, Failure>, Vec<String>) {
        let input = input.map(|pieces| {
            let (tell, told) = mpsc::channel(pieces.len() + 1);
            for piece in pieces {
                tell.try_send(Some((*piece).to_owned())).unwrap();
            }
            tell.try_send(None).unwrap();
            told
        });
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
                        ExpectInput(offset, data) => {
                            let text = socket.next().await.unwrap().unwrap().into_text().unwrap();
                            let sent: serde_json::Value = serde_json::from_str(&text).unwrap();
                            let of = (&sent["stdin"], &sent["offset"], &sent["data"]);
                            assert_eq!(of, (&json!(id), &json!(offset), &json!(data)), "{text}");
                            assert_eq!(sent["eof"] == true, data.is_empty(), "{text}");
                            continue;
                        }
                        Send(seq, rest) => frame(id, seq, rest),
                        Acknowledge(bytes) => frame(id, None, &format!(r#""received":{bytes}"#)),
                        Answer(rest) => frame(id, None, rest),
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
            .with_input(input)
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
            vec![
                Expect("resume"),
                Answer(UNKNOWN),
                Expect("code"),
                Send(1, DEPLOYED),
            ],
        ])
        .await;
        assert_eq!(end.unwrap(), End::Replied(Status::Deployed));
        assert_eq!(shown, ["notice", "1"]);
    }

    #[tokio::test]
    async fn input_that_a_lost_connection_took_along_is_sent_again_with_its_end() {
        let (end, shown) = play_typing(
            Some(&["ü\n", "two\n"]),
            vec![
                vec![Expect("code"), ExpectInput(0, "ü\n")],
                vec![
                    Expect("resume"),
                    ExpectInput(0, "ü\n"),
                    Acknowledge(3),
                    ExpectInput(3, "two\n"),
                    ExpectInput(7, ""),
                ],
                vec![
                    Expect("resume"),
                    ExpectInput(3, "two\n"),
                    ExpectInput(7, ""),
                    Acknowledge(7),
                ],
                vec![Expect("resume"), ExpectInput(7, ""), Send(1, DEPLOYED)],
            ],
        )
        .await;
        assert_eq!(end.unwrap(), End::Replied(Status::Deployed));
        assert_eq!(shown, ["notice", "notice", "notice", "1"]);
    }

    #[tokio::test]
    async fn a_server_that_lost_the_submission_gets_its_input_again_too() {
        let (end, shown) = play_typing(
            Some(&["one\n"]),
            vec![
                vec![Expect("code"), ExpectInput(0, "one\n"), ExpectInput(4, "")],
                vec![
                    Expect("resume"),
                    ExpectInput(0, "one\n"),
                    ExpectInput(4, ""),
                    Answer(UNKNOWN),
                    Answer(UNKNOWN),
                    Answer(UNKNOWN),
                    Expect("code"),
                    ExpectInput(0, "one\n"),
                    ExpectInput(4, ""),
                    Send(1, DEPLOYED),
                ],
            ],
        )
        .await;
        assert_eq!(end.unwrap(), End::Replied(Status::Deployed));
        assert_eq!(shown, ["notice", "1"]);
    }

    #[tokio::test]
    async fn an_invalid_submission_is_not_sent_again() {
        let (end, shown) = play(vec![vec![Expect("code"), Answer(INVALID)]]).await;
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
