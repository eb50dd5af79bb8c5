//! What may be told to a submission under way: cancel, and input for its program.

use std::sync::{Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::model::Problem;
use crate::runner::client::RunHandle;

/// Most input sent to one submission in frames. The runner keeps what the program has not read.
const MAX_INPUT: usize = 16 << 20;

/// What a frame counts for at least, so that empty ones are bounded too.
const FRAME_COST: usize = 64;

/// The controls of one submission.
#[derive(Debug, Default)]
pub struct Control {
    cancelled: CancellationToken,
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
    /// Past the point where it can be cancelled.
    closed: bool,
}

impl Control {
    /// Asks it to stop; `false` when it is too late.
    pub fn cancel(&self) -> bool {
        let state = self.locked();
        if state.closed {
            return false;
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
        state.input += data.len().max(FRAME_COST);
        if state.input > MAX_INPUT {
            return Err(Problem::new(
                "stdin_too_large",
                "The input was not taken",
                format!("more than {MAX_INPUT} bytes were sent to one submission"),
                "Send less, or put it into a file of the submission.",
            ));
        }
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
