//! What may be told to a submission under way: cancel, and input for its program.

use std::sync::{Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use super::intake::Kept;
use crate::model::{Problem, Submission};
use crate::runner::client::RunHandle;

/// Most input sent to one submission in frames. The runner keeps what the program has not read.
const MAX_INPUT: usize = 16 << 20;

/// What a frame counts for at least, so that empty ones are bounded too.
const FRAME_COST: usize = 64;

/// The controls of one submission.
#[derive(Debug)]
pub struct Control {
    cancelled: CancellationToken,
    kept: Kept,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    run: Option<RunHandle>,
    /// The program is being compiled: what may be cancelled, and takes no input.
    compiler: Option<RunHandle>,
    /// Input that came before the program ran.
    early: Vec<(Vec<u8>, bool)>,
    input: usize,
    /// The key that it was sent with, where that is known.
    key: Option<String>,
    /// Why it was cancelled, when its sender did not ask for it.
    why: Option<Problem>,
    /// Past the point where it can be cancelled.
    closed: bool,
}

impl Control {
    /// Of a submission that keeps so much, and was sent with this key.
    pub fn new(kept: Kept, key: Option<String>) -> Self {
        let state = State {
            key,
            ..State::default()
        };
        Self {
            cancelled: CancellationToken::new(),
            kept,
            state: Mutex::new(state),
        }
    }

    /// The submission was read back from the journal, with the key that it was sent with.
    pub fn read_back(&self, submission: &Submission, key: Option<String>) {
        self.kept.read_back(submission);
        self.locked().key = key;
    }

    /// Whether the key that it was sent with is one of these.
    pub fn was_sent_with(&self, is_one: impl FnOnce(&str) -> bool) -> bool {
        self.locked().key.as_deref().is_some_and(is_one)
    }

    /// Why it was cancelled, when its sender did not ask for it.
    pub fn why(&self) -> Option<Problem> {
        self.locked().why.clone()
    }

    /// Asks it to stop; `false` when it is too late.
    pub fn cancel(&self) -> bool {
        self.cancel_because(None)
    }

    /// Asks it to stop, and has its reply say why.
    pub fn cancel_because(&self, why: Option<Problem>) -> bool {
        let mut state = self.locked();
        if state.closed {
            return false;
        }
        if !self.cancelled.is_cancelled() {
            state.why = why;
        }
        self.cancelled.cancel();
        for run in state.run.iter().chain(&state.compiler) {
            run.cancel();
        }
        true
    }

    /// Resolves when it was asked to stop.
    pub async fn cancelled(&self) {
        self.cancelled.cancelled().await;
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }

    /// From here on it can no longer be cancelled: its release is being made.
    pub fn close(&self) {
        self.locked().closed = true;
    }

    /// Hands input to the program, now or when it runs.
    pub fn input(&self, data: Vec<u8>, eof: bool) -> Result<(), Problem> {
        let mut state = self.locked();
        let cost = data.len().max(FRAME_COST);
        if state.input + cost > MAX_INPUT {
            return Err(Problem::new(
                "stdin_too_large",
                "The input was not taken",
                format!("more than {MAX_INPUT} bytes were sent to one submission"),
                "Send less, or put it into a file of the submission.",
            ));
        }
        self.kept.grow(cost)?;
        state.input += cost;
        match &state.run {
            Some(run) => run.stdin(data, eof),
            None => state.early.push((data, eof)),
        }
        Ok(())
    }

    /// Compiling has begun: input is kept for the program.
    pub fn compiling(&self, run: RunHandle) {
        let mut state = self.locked();
        if self.cancelled.is_cancelled() {
            run.cancel();
        }
        state.compiler = Some(run);
    }

    /// A run has begun.
    pub fn running(&self, run: RunHandle) {
        let mut state = self.locked();
        if self.cancelled.is_cancelled() {
            run.cancel();
        }
        for (data, eof) in state.early.drain(..) {
            run.stdin(data, eof);
        }
        state.run = Some(run);
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
