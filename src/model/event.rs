//! What happens to a submission, one event at a time.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Outcome, Problem, ReplId, Submission, SubmissionId, TestResult, UserId};

/// A stage of a submission's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The message was parsed and allowed.
    Receive,
    /// The user's sandbox is there.
    Sandbox,
    /// What the program depends on was installed.
    Install,
    /// Languages that compile.
    Compile,
    /// The code or its tests ran.
    Test,
    /// The files are in the store.
    Publish,
    /// The new release was started.
    Deploy,
    /// The new release serves.
    Ready,
}

impl Step {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Step::Receive => "receive",
            Step::Sandbox => "sandbox",
            Step::Install => "install",
            Step::Compile => "compile",
            Step::Test => "test",
            Step::Publish => "publish",
            Step::Deploy => "deploy",
            Step::Ready => "ready",
        }
    }
}

/// How far a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Begun.
    Started,
    /// Ended well.
    Passed,
    /// Ended badly.
    Failed,
}

impl StepState {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            StepState::Started => "started",
            StepState::Passed => "passed",
            StepState::Failed => "failed",
        }
    }
}

/// Which of a program's two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl OutputStream {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            OutputStream::Stdout => "stdout",
            OutputStream::Stderr => "stderr",
        }
    }
}

/// One thing that happened. What the journal stores and streams replay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// The submission as it was taken in; not streamed.
    Received {
        /// All of it, so that it can be run after a restart and read back later.
        submission: Box<Submission>,
        /// The id of the key that it was sent with.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        key: Option<String>,
    },
    /// A server that started again goes on with it; not streamed. On the disk before it does
    /// anything, so that a submission that ends every server is found out.
    TakenUp,
    /// A server that was asked to end left it to the next one; not streamed.
    PutDown,
    /// Input for its program came in a frame of its own; not streamed. On the disk before the program
    /// gets it, so that a server that takes the submission up again has all that was given.
    Input {
        /// What of it was new.
        data: String,
        /// Nothing follows.
        eof: bool,
    },
    /// It is to end; not streamed.
    Cancelled {
        /// Why, when its sender did not ask for it.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        why: Option<Problem>,
    },
    /// Something that was asked of its repl later stands, and it is not to be deployed; not streamed.
    Overtaken {
        /// What that was, in words.
        by: String,
    },
    /// Waiting for its turn.
    Queued,
    /// A step started or ended.
    Step {
        /// Which.
        name: Step,
        /// How far.
        state: StepState,
        /// Milliseconds, when it ended.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        duration_ms: Option<u64>,
    },
    /// The program wrote something.
    Output {
        /// Where to.
        stream: OutputStream,
        /// What, as text: bytes that are not UTF-8 become U+FFFD.
        data: String,
        /// The run it came from.
        run: u32,
        /// The last of the runner's own sequence numbers this covers; where to re-attach from.
        run_seq: u64,
    },
    /// A run ended; not streamed. The verdict and the reply are made from it.
    RunEnded {
        /// The run's number within the submission.
        run: u32,
        /// What the supervisor saw.
        report: RunReport,
    },
    /// One test's result.
    Test(TestResult),
    /// The end: nothing follows it.
    Reply(Box<Outcome>),
    /// A released program wrote something; belongs to a repl, not to a submission's stream.
    ProgramOutput {
        /// Which release.
        release: u64,
        /// Where to.
        stream: OutputStream,
        /// What.
        data: String,
        /// Where it was read, when that outlives the server's reading.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        origin: Option<Origin>,
    },
    /// Something else about a repl: started, stopped, rolled back, crashed.
    Repl {
        /// `repl.started`, `repl.stopped`, `repl.rolled_back`, `repl.exited`.
        action: String,
        /// In words.
        message: String,
        /// The release concerned.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        release: Option<u64>,
        /// What went wrong, if anything did.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        error: Option<Problem>,
        /// What tells it apart, when several servers see it.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        origin: Option<Origin>,
    },
}

/// Where something about a released program comes from. Whichever server reads it, and how often, it is the
/// same: records of one origin are one record.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The life of the container that it is about.
    pub container: String,
    /// Of a line: when it was written, by its machine's clock. Of anything else: when that life began.
    pub time: Timestamp,
    /// CRC-32 of the line, or of the event's action.
    pub checksum: u32,
    /// Of a long line: which of its pieces, from 0. Of anything else: which time in this life.
    pub part: u32,
}

impl Event {
    /// Where it comes from, if several servers may see it.
    pub fn origin(&self) -> Option<&Origin> {
        match self {
            Event::ProgramOutput { origin, .. } | Event::Repl { origin, .. } => origin.as_ref(),
            _ => None,
        }
    }

    /// Whether somebody waits for it to be on the disk: who is told that a submission is taken in, or how it
    /// ended, and who goes on with one.
    pub fn is_awaited(&self) -> bool {
        matches!(
            self,
            Event::Received { .. }
                | Event::TakenUp
                | Event::Input { .. }
                | Event::Cancelled { .. }
                | Event::Overtaken { .. }
                | Event::Reply(_)
        )
    }

    /// Whether it is part of the stream a client sees, and so has a sequence number.
    pub fn streamed(&self) -> bool {
        match self {
            Event::Queued
            | Event::Step { .. }
            | Event::Output { .. }
            | Event::Test(_)
            | Event::Reply(_) => true,
            Event::Received { .. }
            | Event::TakenUp
            | Event::PutDown
            | Event::Input { .. }
            | Event::Cancelled { .. }
            | Event::Overtaken { .. }
            | Event::RunEnded { .. }
            | Event::ProgramOutput { .. }
            | Event::Repl { .. } => false,
        }
    }
}

/// What the runner saw of one run: the only source of a verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// How it ended.
    pub ending: Ending,
    /// Milliseconds it took, by the monotonic clock.
    pub duration_ms: u64,
    /// What it used.
    pub usage: super::Usage,
    /// Output went past its limit and was cut.
    pub truncated: bool,
    /// The test runner's report, where one was asked for.
    pub test_report: Option<String>,
    /// Something of it was seen to listen on a TCP port.
    #[serde(default)]
    pub listened: bool,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// By itself, with this code.
    Exited(i32),
    /// By a signal that Gantry did not send.
    Signalled(i32),
    /// Stopped at a limit. Never `ExitCode`, `Signal` or `Tests`.
    Limit(super::Reason),
    /// Stopped because the client asked.
    Cancelled,
    /// Never started: the sandbox's side failed. Not the user's failure.
    NotStarted(String),
    /// Stopped since the machine was too busy to let it run. Not the user's failure.
    Starved {
        /// Milliseconds for which it could have run and had no processor.
        waited_ms: u64,
    },
}

/// One journal record: an event, what it belongs to, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its place in the journal; strictly increasing, never used twice.
    pub position: u64,
    /// When it was made.
    pub time: Timestamp,
    /// Whose.
    pub user_id: UserId,
    /// The submission, unless it is about a repl only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub submission_id: Option<SubmissionId>,
    /// The repl.
    pub repl_id: ReplId,
    /// Its place in the submission's stream, from 1 without gaps; absent when not streamed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub seq: Option<u64>,
    /// What happened.
    pub event: Event,
}

impl Record {
    /// When it happened: a program's line says itself when it was written, which may be long before a server
    /// read it.
    pub fn happened(&self) -> Timestamp {
        match &self.event {
            Event::ProgramOutput {
                origin: Some(origin),
                ..
            } => origin.time,
            _ => self.time,
        }
    }
}
