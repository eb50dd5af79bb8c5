//! One released program: its sandbox, what it does, and the way to its port.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use super::launch::FirstProcess;
use super::sandboxes::{Sandbox, Sandboxes};
use crate::model::{
    Ending, Event, OutputStream, Problem, ReplId, ReplState, TicketKey, UserId, begin_with_a_letter,
};
use crate::platform::ProgramEvent;
use crate::runner::app::describe;
use crate::runner::wire::{AppPort, FromApp, ToApp, frames};

/// Lines kept to say why a release did not come up.
const LAST_LINES: usize = 20;

/// How often it is looked whether an ended program's sandbox is gone, and for how long beyond the time that its
/// program may take.
const GONE_PAUSE: Duration = Duration::from_millis(10);
const GONE_PATIENCE: Duration = Duration::from_secs(8);

/// Bytes kept of the lines; one line may be endless.
const LAST_BYTES: usize = 8 << 10;

/// What is known of the program now.
#[derive(Debug, Clone)]
pub struct Standing {
    /// What it is doing.
    pub state: ReplState,
    /// Times it was started again.
    pub restarts: u32,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
    /// Since when it has been in this state.
    pub since: Timestamp,
    /// It serves, or ended well: a release may switch to it.
    pub ready: bool,
    /// It will not be started again.
    pub over: bool,
}

/// A released program that was started.
#[derive(Debug)]
pub struct Program {
    /// Its release.
    pub release: u64,
    /// What tickets for its runner are made with.
    pub key: TicketKey,
    name: String,
    sandbox: Sandbox,
    sandboxes: Arc<Sandboxes>,
    standing: watch::Receiver<Standing>,
    output: Arc<Mutex<VecDeque<u8>>>,
    /// Asks it to end.
    asks: mpsc::Sender<ToApp>,
}

/// Whose program it is.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The user.
    pub user_id: UserId,
    /// The repl.
    pub repl_id: ReplId,
    /// What tickets for its runner are made with.
    pub key: TicketKey,
}

impl Program {
    /// Begins to watch a sandbox whose program starts with the first watcher.
    pub async fn watch(
        name: String,
        sandbox: Sandbox,
        sandboxes: Arc<Sandboxes>,
        owner: Owner,
        release: u64,
        tell: mpsc::Sender<ProgramEvent>,
    ) -> anyhow::Result<Program> {
        let (set, standing) = watch::channel(Standing {
            state: ReplState::Starting,
            restarts: 0,
            last_error: None,
            since: Timestamp::now(),
            ready: false,
            over: false,
        });
        let (asks, asked) = mpsc::channel(1);
        let program = Program {
            release,
            asks,
            key: owner.key.clone(),
            name,
            sandbox,
            sandboxes,
            standing,
            output: Arc::default(),
        };
        let mut stream = program.sandboxes.dial(&program.name).await?;
        stream.write_u8(AppPort::Control.byte()).await?;
        let follower = Follower {
            set,
            output: Arc::clone(&program.output),
            owner,
            release,
            tell,
        };
        tokio::spawn(follower.follow(stream, asked));
        Ok(program)
    }

    /// What is known of it now, and news of it.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// A connection to its port, or to the page that stands in for it; or to its runner's.
    pub async fn dial(&self, port: AppPort) -> std::io::Result<UnixStream> {
        let mut stream = self.sandboxes.dial(&self.name).await?;
        stream.write_u8(port.byte()).await?;
        Ok(stream)
    }

    /// The name of its sandbox.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first process of its sandbox.
    pub fn first_process(&self) -> FirstProcess {
        self.sandbox.process
    }

    /// Whether its sandbox is there.
    pub fn is_alive(&self) -> bool {
        self.sandbox.process.is_alive()
    }

    /// The last lines it wrote.
    pub fn last_lines(&self) -> String {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = output.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    /// Asks it to end, and ends it and its sandbox. `drain`: before it is asked it may answer the requests that
    /// it has, for as long as it may then take to end.
    pub async fn end(&self, patience: Duration, drain: bool) {
        let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        // Asked already, or gone.
        let _ = self.asks.try_send(ToApp::End { patience_ms, drain });
        let most = patience * if drain { 2 } else { 1 } + GONE_PATIENCE;
        let gone = async {
            while self.is_alive() {
                tokio::time::sleep(GONE_PAUSE).await;
            }
        };
        if tokio::time::timeout(most, gone).await.is_err() {
            tracing::warn!(name = %self.name, "a program did not end and is killed with its sandbox");
        }
        self.stop().await;
    }

    /// Ends it and its sandbox at once.
    pub async fn stop(&self) {
        self.sandboxes.forget(&self.name, self.sandbox).await;
    }
}

/// Passes on what a program does.
struct Follower {
    set: watch::Sender<Standing>,
    output: Arc<Mutex<VecDeque<u8>>>,
    owner: Owner,
    release: u64,
    tell: mpsc::Sender<ProgramEvent>,
}

impl Follower {
    async fn follow(self, stream: UnixStream, mut asked: mpsc::Receiver<ToApp>) {
        // The write half stays open: closing it would tell the program that its server is gone.
        let (mut reader, mut writer) = frames(stream);
        let mut ends = false;
        loop {
            let frame = tokio::select! {
                frame = reader.next::<FromApp>() => frame,
                Some(ask) = asked.recv() => {
                    ends = true;
                    // A broken stream shows again when it is read.
                    let _ = writer.send(&ask).await;
                    continue;
                }
            };
            let Ok(frame) = frame else {
                return self.lost();
            };
            let event = ProgramEvent {
                user_id: self.owner.user_id.clone(),
                repl_id: self.owner.repl_id.clone(),
                event: self.event(frame, ends),
            };
            if self.tell.send(event).await.is_err() {
                return;
            }
        }
    }

    fn lost(&self) {
        self.set.send_modify(|standing| {
            if !standing.over {
                standing
                    .last_error
                    .get_or_insert("its sandbox ended".to_owned());
                change(standing, ReplState::Crashed);
            }
            standing.over = true;
        });
    }

    /// What happened, for the journal. `ends`: it was asked to end.
    fn event(&self, frame: FromApp, ends: bool) -> Event {
        let release = self.release;
        match frame {
            FromApp::Started { restarts } => {
                self.set.send_modify(|standing| {
                    standing.restarts = restarts;
                    change(standing, ReplState::Starting);
                });
                repl_event("repl.started", "The program was started", release)
            }
            FromApp::Serving => {
                self.set.send_modify(|standing| {
                    standing.ready = true;
                    change(standing, ReplState::Running);
                });
                repl_event("repl.serving", "The program serves", release)
            }
            FromApp::Output { stream, data } => {
                keep(&self.output, &data);
                output_event(stream, &data, release)
            }
            FromApp::Lost { bytes } => {
                let words = format!(
                    "{bytes} bytes that the program wrote are not recorded: it wrote more than the server could take"
                );
                repl_event("repl.output_lost", &words, release)
            }
            FromApp::Ended { ending, .. } if ends => {
                let words = format!(
                    "The program {} after it was asked to end",
                    describe(&ending)
                );
                let set = |standing: &mut Standing| standing.over = true;
                self.set.send_modify(set);
                repl_event("repl.exited", &words, release)
            }
            FromApp::Ended {
                ending,
                again,
                unready,
            } => {
                let words = match unready {
                    Some(why) => format!("The program was stopped: {why}"),
                    None => format!("The program {}", describe(&ending)),
                };
                let note = |standing: &mut Standing| note_end(standing, &ending, again, &words);
                self.set.send_modify(note);
                exit_event(&ending, again, words, release)
            }
        }
    }
}

fn change(standing: &mut Standing, state: ReplState) {
    standing.state = state;
    standing.since = Timestamp::now();
}

fn note_end(standing: &mut Standing, ending: &Ending, again: bool, words: &str) {
    standing.over = !again;
    match ending {
        Ending::Exited(code) if !again => {
            standing.ready |= *code == 0;
            change(standing, ReplState::Exited(*code));
        }
        _ => change(standing, ReplState::Crashed),
    }
    if *ending != Ending::Exited(0) {
        standing.last_error = Some(words.to_owned());
    }
}

fn keep(output: &Mutex<VecDeque<u8>>, data: &[u8]) {
    let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
    output.extend(data);
    let excess = output.len().saturating_sub(LAST_BYTES);
    output.drain(..excess);
    begin_with_a_letter(&mut output);
}

fn repl_event(action: &str, message: &str, release: u64) -> Event {
    Event::Repl {
        action: action.to_owned(),
        message: message.to_owned(),
        release: numbered(release),
        error: None,
        origin: None,
    }
}

/// A program that ended badly is an error in its user's log, whatever comes of it.
fn exit_event(ending: &Ending, again: bool, words: String, release: u64) -> Event {
    let next = if again {
        "it is started again after a pause"
    } else {
        "it is not started again"
    };
    let error = (*ending != Ending::Exited(0)).then(|| {
        let remediation = "Look at what it wrote before; mend it and submit it again.";
        Problem::new("program_failed", words.clone(), next, remediation)
    });
    Event::Repl {
        action: "repl.exited".to_owned(),
        message: words,
        release: numbered(release),
        error,
        origin: None,
    }
}

/// A workspace is no release.
fn numbered(release: u64) -> Option<u64> {
    (release > 0).then_some(release)
}

fn output_event(stream: OutputStream, data: &[u8], release: u64) -> Event {
    Event::ProgramOutput {
        release,
        stream,
        data: String::from_utf8_lossy(data).into_owned(),
        origin: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_good_end_is_no_error() {
        let failed = |ending| {
            let event = exit_event(&ending, false, describe(&ending), 1);
            matches!(event, Event::Repl { error: Some(_), .. })
        };
        assert!(!failed(Ending::Exited(0)));
        assert!(failed(Ending::Exited(1)) && failed(Ending::Signalled(9)));
    }
}
