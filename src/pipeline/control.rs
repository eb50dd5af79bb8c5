//! What may be told to a submission under way: cancel, and input for its program. Both are in its
//! record, so that a server that takes it up again knows of them.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::intake::Kept;
use crate::journal::Journal;
use crate::model::{Problem, ReplId, Submission, UserId};
use crate::runner::client::{Piece, RunHandle};

/// Most input sent to one submission in frames. The runner keeps what the program has not read.
const MAX_INPUT: usize = 16 << 20;

/// What a frame counts for at least, so that empty ones are bounded too.
const FRAME_COST: usize = 64;

/// The controls of one submission.
#[derive(Debug)]
pub struct Control {
    /// Whose it is.
    pub user: UserId,
    /// The repl that it goes to.
    pub repl: ReplId,
    /// Held while a piece of input is recorded, and while the record is read back: the order of the
    /// record is the program's.
    pub recording: tokio::sync::Mutex<()>,
    cancelled: CancellationToken,
    kept: Kept,
    state: Mutex<State>,
    /// Told when there may be input to hand over.
    handed: Notify,
}

#[derive(Debug, Default)]
struct State {
    run: Option<RunHandle>,
    /// The program is being compiled: what may be cancelled, and takes no input.
    compiler: Option<RunHandle>,
    /// Not in memory until the record is read back: it is all in there.
    input: Option<Input>,
    /// What its input counts for.
    cost: usize,
    /// Whether it takes input in frames; not known before it was read back.
    interactive: Option<bool>,
    /// The key that it was sent with, where that is known.
    key: Option<String>,
    /// Why it was cancelled, when its sender did not ask for it.
    why: Option<Problem>,
    /// What was asked of its repl later, and stands.
    overtaken: Option<String>,
    /// Past the point where it can be cancelled.
    closed: bool,
}

/// All input that came in frames.
#[derive(Debug, Default)]
struct Input {
    /// Each with its place in the journal.
    pieces: Vec<(u64, Piece)>,
    bytes: u64,
    eof: bool,
    /// Pieces that this run has.
    delivered: usize,
}

impl Input {
    fn add(&mut self, position: u64, data: Bytes, eof: bool) {
        let offset = self.bytes;
        self.bytes += data.len() as u64;
        self.eof |= eof;
        self.pieces.push((position, Piece { offset, data, eof }));
    }
}

/// What was recorded of a submission's input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// How many bytes.
    pub bytes: u64,
    /// Nothing more is taken.
    pub eof: bool,
}

/// What asking a submission to stop came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelling {
    /// It stops.
    First,
    /// It was asked before.
    Again,
    /// Its release is being made.
    TooLate,
}

/// A piece of input as the journal has it.
pub type Recorded = (u64, String, bool);

impl Control {
    /// Of a submission that keeps so much and was sent with this key. Its record has no input yet.
    pub fn new(kept: Kept, submission: &Submission, key: String) -> Self {
        let state = State {
            key: Some(key),
            input: Some(Input::default()),
            interactive: Some(submission.interactive),
            ..State::default()
        };
        let (user, repl) = (submission.user_id.clone(), submission.repl_id.clone());
        Self::with(kept, user, repl, state)
    }

    /// Of one that an earlier server left, and whose record was not read yet.
    pub fn unread(kept: Kept, user: UserId, repl: ReplId) -> Self {
        Self::with(kept, user, repl, State::default())
    }

    fn with(kept: Kept, user: UserId, repl: ReplId, state: State) -> Self {
        Self {
            user,
            repl,
            recording: tokio::sync::Mutex::default(),
            cancelled: CancellationToken::new(),
            kept,
            state: Mutex::new(state),
            handed: Notify::new(),
        }
    }

    /// The submission was read back from the journal, with the key that it was sent with and all of its
    /// input. Whoever calls holds `recording`.
    pub fn read_back(&self, submission: &Submission, key: Option<String>, recorded: Vec<Recorded>) {
        self.kept.read_back(submission);
        let mut state = self.locked();
        state.key = key;
        state.interactive = Some(submission.interactive);
        let mut input = Input::default();
        let recorded = match submission.interactive {
            true => recorded,
            // It came before that was known, and no run takes it.
            false => Vec::new(),
        };
        let cost: usize = recorded.iter().map(|(_, data, _)| cost(data)).sum();
        for (position, data, eof) in recorded {
            input.add(position, data.into(), eof);
        }
        // What came since this server started is counted already.
        self.kept.read_input(cost.saturating_sub(state.cost));
        state.cost = cost;
        state.input = Some(input);
    }

    /// Whether it takes input in frames is known, before all of its record is read back.
    pub fn note_interactive(&self, interactive: bool) {
        self.locked().interactive = Some(interactive);
    }

    /// Refuses input in frames where the submission did not say that it takes any.
    pub fn takes_input(&self) -> Result<(), Problem> {
        if self.locked().interactive != Some(false) {
            return Ok(());
        }
        Err(Problem::new(
            "not_interactive",
            "The input was not taken",
            "the submission did not say that it takes input while it runs, so its program found the end of its input",
            "Send \"interactive\": true with the submission, or all of its input in \"stdin\".",
        ))
    }

    /// What was recorded of its input; `None` until the record was read back.
    pub fn received(&self) -> Option<Received> {
        let state = self.locked();
        state.input.as_ref().map(|input| Received {
            bytes: input.bytes,
            eof: input.eof,
        })
    }

    /// Whether the key that it was sent with is one of these.
    pub fn was_sent_with(&self, is_one: impl FnOnce(&str) -> bool) -> bool {
        self.locked().key.as_deref().is_some_and(is_one)
    }

    /// Why it was cancelled, when its sender did not ask for it.
    pub fn why(&self) -> Option<Problem> {
        self.locked().why.clone()
    }

    /// Asks it to stop, and has its reply say why.
    pub fn cancel_because(&self, why: Option<Problem>) -> Cancelling {
        let mut state = self.locked();
        if state.closed {
            return Cancelling::TooLate;
        }
        let asked = match self.cancelled.is_cancelled() {
            true => Cancelling::Again,
            false => Cancelling::First,
        };
        if asked == Cancelling::First {
            state.why = why;
        }
        self.cancelled.cancel();
        for run in state.run.iter().chain(&state.compiler) {
            run.cancel();
        }
        asked
    }

    /// Resolves when it was asked to stop.
    pub async fn cancelled(&self) {
        self.cancelled.cancelled().await;
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }

    /// From here on it can no longer be cancelled: its release is being made. `false`: it was cancelled.
    pub fn close(&self) -> bool {
        let mut state = self.locked();
        state.closed = !self.cancelled.is_cancelled();
        state.closed
    }

    /// What was asked of its repl later stands: it is not deployed any more.
    pub fn overtake(&self, by: &str) {
        self.locked().overtaken.get_or_insert_with(|| by.to_owned());
    }

    /// What was asked of its repl later, and stands.
    pub fn overtaken(&self) -> Option<String> {
        self.locked().overtaken.clone()
    }

    /// Makes room for more input, or says why there is none.
    pub fn admit(&self, data: &str) -> Result<(), Problem> {
        let mut state = self.locked();
        let cost = cost(data);
        if state.cost + cost > MAX_INPUT {
            return Err(Problem::new(
                "stdin_too_large",
                "The input was not taken",
                format!("more than {MAX_INPUT} bytes were sent to one submission"),
                "Send less, or put it into a file of the submission.",
            ));
        }
        self.kept.grow(cost)?;
        state.cost += cost;
        Ok(())
    }

    /// This input is in the journal, at this position. Whoever calls holds `recording`.
    pub fn recorded(&self, position: u64, data: String, eof: bool) {
        if let Some(input) = &mut self.locked().input {
            input.add(position, data.into(), eof);
        }
        self.handed.notify_one();
    }

    /// Hands input to the program while it runs, each piece as soon as it is on the disk: what a program was
    /// given is given again by a server that takes it up. Ends only with who waits for it.
    pub async fn hand_over(&self, journal: &Journal) {
        loop {
            let next = self.undelivered();
            match next {
                None => self.handed.notified().await,
                Some(position) if journal.durable(position).await.is_ok() => self.deliver(position),
                // The next server hands it over.
                Some(_) => std::future::pending().await,
            }
        }
    }

    /// The last piece that the run does not have.
    fn undelivered(&self) -> Option<u64> {
        let state = self.locked();
        state.run.as_ref()?;
        let input = state.input.as_ref()?;
        let (position, _) = input.pieces.last()?;
        (input.delivered < input.pieces.len()).then_some(*position)
    }

    fn deliver(&self, durable: u64) {
        let mut state = self.locked();
        let State {
            run: Some(run),
            input: Some(input),
            ..
        } = &mut *state
        else {
            return;
        };
        let pieces = input.pieces[input.delivered..].iter();
        for (_, piece) in pieces.take_while(|(position, _)| *position <= durable) {
            run.stdin(piece.clone());
            input.delivered += 1;
        }
    }

    /// A run that takes no input has begun: it is kept for the program.
    pub fn closed_run(&self, run: RunHandle) {
        let mut state = self.locked();
        if self.cancelled.is_cancelled() {
            run.cancel();
        }
        state.compiler = Some(run);
    }

    /// A run has begun that takes all input from the beginning.
    pub fn open_run(&self, run: RunHandle) {
        let mut state = self.locked();
        if self.cancelled.is_cancelled() {
            run.cancel();
        }
        state.run = Some(run);
        if let Some(input) = &mut state.input {
            input.delivered = 0;
        }
        self.handed.notify_one();
    }

    /// What ran or compiled has ended.
    pub fn not_running(&self) {
        let mut state = self.locked();
        state.run = None;
        state.compiler = None;
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a piece of input counts for.
fn cost(data: &str) -> usize {
    data.len().max(FRAME_COST)
}

/// What of this input is new, when so much was received; the error says why it cannot be told.
/// `offset`: how many bytes its sender says came before it.
pub fn beyond(data: &str, offset: u64, received: u64) -> Result<&str, Problem> {
    let refuse = |cause: String| {
        Problem::new(
            "stdin_offset",
            "The input was not taken",
            cause,
            format!("Send the input from byte {received} on, with \"offset\":{received}."),
        )
    };
    let Some(known) = received.checked_sub(offset) else {
        return Err(refuse(format!(
            "{received} bytes were received, and this begins at byte {offset}: what lies between is missing"
        )));
    };
    let known = usize::try_from(known).unwrap_or(usize::MAX);
    if known >= data.len() {
        return Ok("");
    }
    data.get(known..).ok_or_else(|| {
        refuse(format!(
            "{received} bytes were received, which ends inside a character of this input: it is not what was sent before"
        ))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn input_that_is_sent_again_is_passed_over_and_a_gap_is_refused() {
        assert_eq!(beyond("abc", 0, 0).unwrap(), "abc");
        assert_eq!(beyond("abc", 0, 2).unwrap(), "c");
        assert_eq!(beyond("abc", 1, 9).unwrap(), "");
        assert_eq!(beyond("", 4, 4).unwrap(), "");
        let gap = beyond("abc", 5, 4).unwrap_err();
        assert_eq!(gap.code, "stdin_offset");
        assert!(gap.remediation.contains("\"offset\":4"), "{gap}");
        assert!(beyond("ü", 0, 1).is_err());
    }
}
