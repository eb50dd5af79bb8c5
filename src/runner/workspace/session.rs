//! One connection to the runner's port.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tokio_tungstenite::tungstenite::{self, Message};

use super::Workspace;
use super::files::{Entry, PIECE};
use super::protocol::{Ask, Numbered, Request, frame, is_name, unframe};
use super::terminal::{Listener, Said};
use crate::model::{Ending, MAX_MESSAGE_BYTES, Problem, cut};
use crate::runner::app::{State, Told, describe};
use crate::runner::wire::FromApp;
use crate::websocket;

/// Pieces of output on their way to a client: with the longest piece a quarter of a MiB.
const QUEUE: usize = 16;

/// A client that takes nothing for this long is gone or wants nothing.
const SLOWEST: Duration = Duration::from_secs(10);

/// How often files are looked at, and time itself.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks between two pings, and how long a client may be silent: it answers each.
const PING_EVERY: u32 = 20;
const SILENCE: Duration = Duration::from_secs(60);

/// Most of the program's output that is told again to who asks for its state: all that is kept.
const LAST_OUTPUT: usize = 64 << 10;

/// Changed paths told at once; beyond it the client asks for the tree.
const MOST_CHANGES: usize = 1_000;

type Client<S> = SplitSink<WebSocketStream<S>, Message>;

/// What a file looked like.
type Seen = BTreeMap<String, (u64, i64)>;

enum Next {
    Heard(Option<Result<Message, tungstenite::Error>>),
    Terminal(Said),
    Program(Result<Told, broadcast::error::RecvError>),
    Time,
}

struct Session<'a> {
    workspace: &'a Rc<Workspace>,
    number: u64,
    listener: Listener,
    /// What happens to the program.
    program: broadcast::Receiver<Told>,
    /// The files as the client knows them, when it wants to be told of changes.
    watched: Option<Seen>,
}

/// Serves one client until it goes.
pub async fn run<S: AsyncRead + AsyncWrite + Unpin>(workspace: &Rc<Workspace>, number: u64, io: S) {
    let config = websocket::config(MAX_MESSAGE_BYTES);
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let (mut client, mut heard) = socket.split();
    let (listener, mut said) = mpsc::channel(QUEUE);
    let mut time = interval(LOOK_EVERY);
    time.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last_heard, mut looks) = (Instant::now(), 0);
    let mut session = Session {
        workspace,
        number,
        listener,
        program: workspace.app.events(),
        watched: None,
    };
    loop {
        let next = tokio::select! {
            heard = heard.next() => Next::Heard(heard),
            Some(said) = said.recv() => Next::Terminal(said),
            event = session.program.recv() => Next::Program(event),
            _ = time.tick() => Next::Time,
        };
        let answers = match next {
            // The answer to a ping is taken before anything more is read.
            Next::Heard(Some(Ok(Message::Ping(_)))) => {
                last_heard = Instant::now();
                if !matches!(timeout(SLOWEST, client.flush()).await, Ok(Ok(()))) {
                    return;
                }
                Vec::new()
            }
            Next::Heard(Some(Ok(message))) => {
                last_heard = Instant::now();
                session.heard(message).await
            }
            Next::Heard(Some(Err(tungstenite::Error::Capacity(_)))) => {
                let close = CloseFrame {
                    code: tungstenite::protocol::frame::coding::CloseCode::Size,
                    reason: "a message may have 1 MiB".into(),
                };
                let _ = timeout(SLOWEST, client.send(Message::Close(Some(close)))).await;
                return;
            }
            Next::Heard(_) => return,
            Next::Terminal(Said::Output(name, data)) => vec![Message::Binary(frame(&name, &data))],
            Next::Terminal(Said::Ended(name, code)) => {
                event(json!({ "event": "ended", "terminal": &*name, "exit_code": code }))
            }
            Next::Program(Ok(told)) => told_of(told.event),
            // A client that cannot keep up loses some of the program's output, and is told so.
            Next::Program(Err(broadcast::error::RecvError::Lagged(lost))) => {
                event(json!({ "event": "lost", "events": lost }))
            }
            Next::Program(Err(broadcast::error::RecvError::Closed)) => return,
            Next::Time => {
                looks += 1;
                if last_heard.elapsed() > SILENCE {
                    return;
                }
                let mut answers = session.changes();
                if looks % PING_EVERY == 0 {
                    answers.push(Message::Ping(Bytes::new()));
                }
                answers
            }
        };
        if !send_all(&mut client, answers).await {
            return;
        }
    }
}

async fn send_all<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut Client<S>,
    messages: Vec<Message>,
) -> bool {
    for frame in messages.into_iter().flat_map(websocket::frames) {
        if !matches!(timeout(SLOWEST, client.send(frame)).await, Ok(Ok(()))) {
            return false;
        }
    }
    true
}

fn event(value: Value) -> Vec<Message> {
    vec![Message::text(value.to_string())]
}

fn told_of(told: FromApp) -> Vec<Message> {
    match told {
        FromApp::Started { restarts } => {
            event(json!({ "event": "program", "state": "starting", "restarts": restarts }))
        }
        FromApp::Serving => event(json!({ "event": "program", "state": "serving" })),
        FromApp::Output { stream, data } => event(json!({
            "event": "output", "stream": stream, "data": String::from_utf8_lossy(&data),
        })),
        FromApp::Lost { bytes } => event(json!({ "event": "lost", "bytes": bytes })),
        FromApp::Ended { ending, .. } => {
            let mut told = state_of(&State::Ended(ending));
            told["event"] = "program".into();
            event(told)
        }
    }
}

fn state_of(state: &State) -> Value {
    match state {
        State::Starting => json!({ "state": "starting" }),
        State::Serving => json!({ "state": "serving" }),
        State::Ended(Ending::Exited(code)) => json!({ "state": "ended", "exit_code": code }),
        State::Ended(ending) => json!({ "state": "ended", "reason": describe(ending) }),
    }
}

/// Longest reason, which may repeat what a client sent.
const MAX_REASON_CHARS: usize = 600;

fn refused(why: impl ToString) -> Problem {
    Problem::new(
        "refused",
        "It was not done",
        cut(why.to_string(), MAX_REASON_CHARS),
        "Ask for something else, or mend what stands in the way.",
    )
}

impl Session<'_> {
    async fn heard(&mut self, message: Message) -> Vec<Message> {
        match message {
            Message::Text(text) => match serde_json::from_str::<Request>(&text) {
                Ok(Request { id, ask }) => self.asked(id, ask).await,
                // What is asked for wrongly is answered all the same, when it can be told which.
                Err(error) => event(match serde_json::from_str::<Numbered>(&text) {
                    Ok(Numbered { id }) => json!({ "id": id, "error": refused(error) }),
                    Err(_) => json!({ "event": "error", "error": refused(error) }),
                }),
            },
            Message::Binary(data) => match self.typed(data) {
                Ok(()) => Vec::new(),
                Err(problem) => event(json!({ "event": "error", "error": problem })),
            },
            _ => Vec::new(),
        }
    }

    fn typed(&self, data: Bytes) -> Result<(), Problem> {
        let (name, data) = unframe(data).ok_or_else(|| refused("it is no terminal's frame"))?;
        let terminal = self.workspace.known_terminal(&name);
        let terminal = terminal.ok_or_else(|| refused(format!("no terminal is called {name}")))?;
        if terminal.input(data) {
            Ok(())
        } else {
            Err(refused("its program reads nothing, and much waits already"))
        }
    }

    async fn asked(&mut self, id: u64, ask: Ask) -> Vec<Message> {
        let mut after = Vec::new();
        let mut answer = match self.act(ask, &mut after).await {
            Ok(answer) => answer,
            Err(error) => json!({ "error": refused(format!("{error:#}")) }),
        };
        answer["id"] = id.into();
        let mut messages = event(answer);
        messages.append(&mut after);
        messages
    }

    async fn act(&mut self, ask: Ask, after: &mut Vec<Message>) -> anyhow::Result<Value> {
        let done = || json!({ "ok": true });
        let files = &self.workspace.files;
        Ok(match ask {
            Ask::Open {
                terminal,
                cols,
                rows,
            } => {
                anyhow::ensure!(
                    is_name(&terminal),
                    "a name has 1 to 32 of a-z, A-Z, 0-9, - and _"
                );
                let (found, created) = self.workspace.terminal(&terminal, (cols, rows))?;
                found.resize((cols, rows))?;
                let before = found.attach(self.number, self.listener.clone());
                if !before.is_empty() {
                    after.push(Message::Binary(frame(&terminal, &before)));
                }
                json!({ "ok": true, "created": created })
            }
            Ask::Resize {
                terminal,
                cols,
                rows,
            } => {
                self.of_name(&terminal)?.resize((cols, rows))?;
                done()
            }
            Ask::Close { terminal } => {
                self.of_name(&terminal)?.hang_up();
                done()
            }
            Ask::List => json!({ "ok": true, "terminals": self.workspace.terminal_names() }),
            Ask::Tree => json!({ "ok": true, "files": self.workspace.tree()? }),
            Ask::Read { path, offset } => {
                let (piece, size) = files.read(&path, offset)?;
                read_answer(piece, offset, size)
            }
            Ask::Write {
                path,
                text,
                base64,
                offset,
                more,
            } => {
                let piece = match (text, base64) {
                    (Some(text), None) => text.into_bytes(),
                    (None, Some(text)) => BASE64.decode(text)?,
                    _ => anyhow::bail!("either text or base64 is required"),
                };
                files.write(&path, offset, &piece, !more)?;
                done()
            }
            Ask::Make { path } => {
                files.make(&path)?;
                done()
            }
            Ask::Rename { path, to } => {
                files.rename(&path, &to)?;
                done()
            }
            Ask::Delete { path } => {
                files.delete(&path)?;
                done()
            }
            Ask::Watch { on } => {
                self.watched = match on {
                    true => Some(seen(&self.workspace.tree()?)),
                    false => None,
                };
                done()
            }
            Ask::Run => {
                self.workspace.app.run_again()?;
                done()
            }
            Ask::Restart => {
                self.workspace.app.end().await?;
                self.workspace.app.run_again()?;
                done()
            }
            Ask::Stop => {
                self.workspace.app.end().await?;
                done()
            }
            Ask::State => {
                let app = &self.workspace.app;
                let mut state = state_of(&app.state());
                let output = app.last_output(LAST_OUTPUT);
                state["output"] = String::from_utf8_lossy(&output).into();
                // What was on its way is in it: each piece is told once.
                self.program = app.events();
                state
            }
        })
    }

    fn of_name(&self, name: &str) -> anyhow::Result<Rc<super::Terminal>> {
        let terminal = self.workspace.known_terminal(name);
        terminal.ok_or_else(|| anyhow::anyhow!("no terminal is called so"))
    }

    /// What has changed since the last look.
    fn changes(&mut self) -> Vec<Message> {
        let Some(before) = &self.watched else {
            return Vec::new();
        };
        let Ok(tree) = self.workspace.tree() else {
            return Vec::new();
        };
        let now = seen(&tree);
        let gone = before.keys().filter(|path| !now.contains_key(*path));
        let changed = now
            .iter()
            .filter(|(path, about)| before.get(*path) != Some(about));
        let mut paths: Vec<&String> = gone.chain(changed.map(|(path, _)| path)).collect();
        let more = paths.len() > MOST_CHANGES;
        paths.truncate(MOST_CHANGES);
        let told = match paths.is_empty() {
            true => Vec::new(),
            false => event(json!({ "event": "changed", "paths": paths, "more": more })),
        };
        self.watched = Some(now);
        told
    }
}

fn seen(tree: &[Entry]) -> Seen {
    let about = |entry: &Entry| (entry.path.clone(), (entry.size, entry.modified));
    tree.iter().map(about).collect()
}

fn read_answer(piece: Vec<u8>, offset: u64, size: u64) -> Value {
    let more = offset + (piece.len() as u64) < size && piece.len() as u64 == PIECE;
    let mut answer = json!({ "ok": true, "size": size, "more": more });
    match String::from_utf8(piece) {
        Ok(text) => answer["text"] = text.into(),
        // No text, or cut within a character.
        Err(bytes) => answer["base64"] = BASE64.encode(bytes.as_bytes()).into(),
    }
    answer
}
