//! `gantry shell`: a terminal of a repl, in this one.
//!
//! The terminal lives in the repl and outlives this program: after a lost connection, and for whoever
//! opens it again by its name, it shows what it showed last.

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};

use super::connection::{self, Patience, Pulse, Socket, send};
use super::failure::{Exit, Failure, chain};
use super::http::Api;
use super::render::printable;
use super::server::ServerArgs;
use super::stdout;
use crate::model::{Problem, ReplId};

/// Ctrl+], as telnet has it: no shell and no editor wants it for itself.
const LEAVE: u8 = 0x1d;
/// Most bytes that are typed or pasted at once.
const PIECE: usize = 4 << 10;
/// Pieces that were typed while the last ones are sent.
const TYPED: usize = 16;
/// Longest wait for an answer: ending a program that does not want to end takes most of it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// What a window has that does not tell its size.
const SIZE: (u16, u16) = (80, 24);

pub(super) const AFTER_HELP: &str = "\
Ctrl+] leaves; what runs in the terminal goes on, and the same command comes back to it.
The exit code is the shell's own when it ends, and 0 after Ctrl+].";

#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The repl
    repl: ReplId,

    /// The terminal's name; one that is there is taken up as it was left
    #[arg(long, short, value_name = "NAME", default_value = "cli")]
    terminal: String,

    #[command(flatten)]
    server: ServerArgs,
}

/// What a runner says.
#[derive(Debug, Deserialize)]
struct Told {
    id: Option<u64>,
    event: Option<String>,
    terminal: Option<String>,
    exit_code: Option<i32>,
    error: Option<Problem>,
}

/// How one connection ended.
enum Talk {
    /// The shell ended.
    Ended(i32),
    /// Its user left.
    Left,
    Lost(String),
}

enum Happening {
    Received(Option<Result<WsMessage, WsError>>),
    Typed(Option<Bytes>),
    Resized,
    Tick,
}

pub(super) async fn run(args: ShellArgs) -> Result<ExitCode, Failure> {
    let api = args.server.api()?;
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(Failure::usage(
            "a terminal is needed",
            "standard input or standard output is a file or a pipe",
            "Run it in a terminal.",
        ));
    }
    let resized = signal(SignalKind::window_change()).map_err(|error| no_terminal(&error))?;
    let mut shell = Shell {
        path: path_of(&args.repl),
        api: &api,
        terminal: args.terminal,
        resized,
        typed: typed(),
        patience: Patience::default(),
        again: false,
    };
    // Opened before the keys are taken: what is refused is said in a terminal that is as it was. What is
    // typed meanwhile waits.
    let first = connection::connect(&api, &shell.path, &shell.patience, std::future::pending)
        .await
        .map_err(|failure| refused(failure, &args.repl))?;
    let raw = Raw::begin().map_err(|error| no_terminal(&error))?;
    let ended = shell.keep(first).await;
    drop(raw);
    Ok(match ended? {
        Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        None => {
            eprintln!("\nleft; `gantry shell {}` comes back to it", args.repl);
            Exit::Done.into()
        }
    })
}

/// Asks a repl's runner for one thing.
pub(super) async fn ask(api: &Api, repl: &ReplId, mut request: Value) -> Result<(), Failure> {
    let path = path_of(repl);
    let mut socket = connection::open(api, &path)
        .await
        .map_err(|failure| refused(failure, repl))?;
    request["id"] = 1.into();
    let lost = |cause: String| {
        let remediation = "Try again; `gantry ps` shows how the repl is.";
        Failure::unavailable(format!("{repl} did not answer"), cause, remediation)
    };
    let sent = send(&mut socket, WsMessage::text(request.to_string())).await;
    sent.map_err(lost)?;
    let answered = timeout(ANSWER_TIMEOUT, async {
        while let Some(message) = socket.next().await {
            let WsMessage::Text(text) = message.map_err(|error| chain(&error))? else {
                continue;
            };
            let told: Told = serde_json::from_str(&text).map_err(|error| chain(&error))?;
            if told.id == Some(1) {
                return Ok(told.error);
            }
        }
        Err("the connection was closed".to_owned())
    });
    let late = |_| lost(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()));
    let answer = answered.await.map_err(late)?.map_err(lost)?;
    connection::close(socket).await;
    match answer {
        Some(problem) => Err(Failure::new(Exit::Failed, problem)),
        None => Ok(()),
    }
}

fn path_of(repl: &ReplId) -> String {
    format!("/repls/{repl}/terminal")
}

fn refused(mut failure: Failure, repl: &ReplId) -> Failure {
    // The second is what a proxy in between makes of it.
    if ["not_found", "http_404"].contains(&&*failure.problem.code) {
        failure.problem.remediation =
            format!("`gantry ps` lists the repls; `gantry start {repl}` starts one.");
    }
    failure
}

fn no_terminal(error: &dyn std::error::Error) -> Failure {
    Failure::usage(
        "this terminal cannot be used",
        chain(error),
        "Run it in another one.",
    )
}

/// What is typed, in pieces. Standard input is read by a thread: it can only be waited for so without
/// changing it for every program that shares it.
fn typed() -> mpsc::Receiver<Bytes> {
    let (sender, typed) = mpsc::channel(TYPED);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(length) if length > 0 => {
                    let piece = Bytes::copy_from_slice(&buffer[..length]);
                    if sender.blocking_send(piece).is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    });
    typed
}

/// This terminal while every key goes to the other one; as it was before when this ends.
struct Raw(Termios);

impl Raw {
    fn begin() -> io::Result<Self> {
        let before = tcgetattr(rustix::stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.0);
    }
}

struct Shell<'a> {
    api: &'a Api,
    path: String,
    terminal: String,
    resized: Signal,
    typed: mpsc::Receiver<Bytes>,
    patience: Patience,
    /// It is not the first connection.
    again: bool,
}

impl Shell<'_> {
    /// A connection; `None` when its user left.
    async fn connect(&mut self) -> Result<Option<Socket>, Failure> {
        let typed = &mut self.typed;
        // What is typed meanwhile has nobody to go to.
        let left =
            async || while let Some(false) = typed.recv().await.map(|piece| leaves(&piece)) {};
        connection::connect(self.api, &self.path, &self.patience, left).await
    }

    /// Until the shell ends, with its exit code, or its user leaves.
    async fn keep(&mut self, first: Option<Socket>) -> Result<Option<i32>, Failure> {
        let mut next = first;
        while let Some(mut socket) = next {
            let opened = Instant::now();
            let talk = self.converse(&mut socket).await?;
            match talk {
                Talk::Ended(code) => {
                    connection::close(socket).await;
                    return Ok(Some(code));
                }
                Talk::Left => {
                    connection::close(socket).await;
                    return Ok(None);
                }
                Talk::Lost(cause) => {
                    self.patience.lost(opened);
                    self.again = true;
                    eprint!("\r\n[connection lost ({cause}); trying again, Ctrl+] leaves]\r\n");
                }
            }
            next = self.connect().await?;
        }
        Ok(None)
    }

    async fn converse(&mut self, socket: &mut Socket) -> Result<Talk, Failure> {
        let mut pulse = Pulse::new();
        let mut sent = send(socket, self.sized("terminal.open", 1)).await;
        loop {
            if let Err(cause) = sent {
                return Ok(Talk::Lost(cause));
            }
            let next = tokio::select! {
                received = socket.next() => Happening::Received(received),
                typed = self.typed.recv() => Happening::Typed(typed),
                _ = self.resized.recv() => Happening::Resized,
                () = pulse.due() => Happening::Tick,
            };
            sent = match next {
                Happening::Received(received) => {
                    pulse.heard();
                    if let Some(talk) = self.received(received)? {
                        return Ok(talk);
                    }
                    Ok(())
                }
                Happening::Typed(Some(piece)) if !leaves(&piece) => {
                    send(socket, self.framed(&piece)).await
                }
                Happening::Typed(_) => return Ok(Talk::Left),
                Happening::Resized => send(socket, self.sized("terminal.resize", 2)).await,
                Happening::Tick => pulse.ping(socket).await,
            };
        }
    }

    fn received(
        &mut self,
        received: Option<Result<WsMessage, WsError>>,
    ) -> Result<Option<Talk>, Failure> {
        let text = match received {
            None => return Ok(Some(Talk::Lost("closed by the server".to_owned()))),
            Some(Err(error)) => return Ok(Some(Talk::Lost(chain(&error)))),
            Some(Ok(WsMessage::Binary(frame))) => {
                let from = 1 + usize::from(frame.first().copied().unwrap_or_default());
                stdout::write(frame.get(from..).unwrap_or_default())?;
                return Ok(None);
            }
            Some(Ok(WsMessage::Text(text))) => text,
            // The close handshake goes on; the end of the stream follows.
            Some(Ok(_)) => return Ok(None),
        };
        let told: Told = serde_json::from_str(&text).map_err(|error| {
            let remediation = "Check that the server is of this version.";
            Failure::unavailable(
                "the repl's words are not understood",
                chain(&error),
                remediation,
            )
        })?;
        match (told.id, told.event.as_deref(), told.error) {
            (Some(1), _, Some(problem)) => Err(Failure::new(Exit::Failed, problem)),
            (Some(1), _, None) if self.again => {
                // It shows again what it showed last.
                stdout::write(b"\x1b[H\x1b[2J")?;
                Ok(None)
            }
            (None, Some("ended"), _) if told.terminal.as_deref() == Some(&*self.terminal) => {
                Ok(Some(Talk::Ended(told.exit_code.unwrap_or(1))))
            }
            (None, Some("error"), Some(problem)) => {
                eprint!("\r\n[{}]\r\n", printable(&problem.cause));
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn sized(&self, op: &str, id: u64) -> WsMessage {
        let size = tcgetwinsize(rustix::stdio::stdout()).ok();
        let (cols, rows) = size
            .map(|size| (size.ws_col, size.ws_row))
            .filter(|(cols, rows)| *cols > 0 && *rows > 0)
            .unwrap_or(SIZE);
        let request =
            json!({ "id": id, "op": op, "terminal": self.terminal, "cols": cols, "rows": rows });
        WsMessage::text(request.to_string())
    }

    fn framed(&self, piece: &[u8]) -> WsMessage {
        let name = self.terminal.as_bytes();
        let mut frame = Vec::with_capacity(1 + name.len() + piece.len());
        frame.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        frame.extend_from_slice(name);
        frame.extend_from_slice(piece);
        WsMessage::binary(frame)
    }
}

fn leaves(piece: &[u8]) -> bool {
    piece.contains(&LEAVE)
}
