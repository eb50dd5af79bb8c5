//! How a submission ends.

use serde::{Deserialize, Serialize};

use super::{Problem, ReplId, SubmissionId};

/// The one terminal status of a submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Tests passed and the release is serving.
    Deployed,
    /// Tests passed; no deploy was asked for.
    TestsPassed,
    /// The program failed; [`Reason`] says how.
    TestsFailed,
    /// Tests passed, the release did not come up; the previous release still serves.
    DeployFailed,
    /// Tests passed; what was asked of the repl later stands, and nothing was deployed.
    Superseded,
    /// The client asked for it.
    Cancelled,
    /// The message was wrong; nothing ran.
    Invalid,
    /// Gantry's side failed or the outcome is unknown. Never a pass, never the user's failure.
    Unavailable,
}

impl Status {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Deployed => "deployed",
            Status::TestsPassed => "tests_passed",
            Status::TestsFailed => "tests_failed",
            Status::DeployFailed => "deploy_failed",
            Status::Superseded => "superseded",
            Status::Cancelled => "cancelled",
            Status::Invalid => "invalid",
            Status::Unavailable => "unavailable",
        }
    }
}

/// How a program failed its tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Ended by itself with an exit code other than 0.
    ExitCode,
    /// Ended by a signal that Gantry did not send.
    Signal,
    /// Wall-clock limit.
    Timeout,
    /// Processor limit.
    Cpu,
    /// Memory limit.
    Memory,
    /// Output limit.
    Output,
    /// File size or scratch space limit.
    Disk,
    /// Did not compile.
    Compile,
    /// Ran, and a test did not hold.
    Tests,
}

impl Reason {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::ExitCode => "exit_code",
            Reason::Signal => "signal",
            Reason::Timeout => "timeout",
            Reason::Cpu => "cpu",
            Reason::Memory => "memory",
            Reason::Output => "output",
            Reason::Disk => "disk",
            Reason::Compile => "compile",
            Reason::Tests => "tests",
        }
    }
}

/// What a run used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Processor milliseconds of the whole process tree.
    pub cpu_ms: u64,
    /// Peak bytes of memory.
    pub memory_bytes: u64,
}

/// One test's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResult {
    /// Its name.
    pub name: String,
    /// Whether it held.
    pub passed: bool,
    /// Milliseconds it took.
    pub duration_ms: u64,
    /// What it said when it did not hold.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<String>,
    /// What should have come out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expected: Option<String>,
    /// What came out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub actual: Option<String>,
}

/// The reply to a submission: exactly one each, always the last frame for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it ended.
    pub status: Status,
    /// The user's namespace, `user-{user_id}`; absent when the message named no valid user.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub namespace: Option<String>,
    /// Absent when the message was too broken to have one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub submission_id: Option<SubmissionId>,
    /// The repl it went to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub repl_id: Option<ReplId>,
    /// The release's number.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub release: Option<u64>,
    /// Where the release is served.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub url: Option<String>,
    /// How the program failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<Reason>,
    /// The program's exit code.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exit_code: Option<i32>,
    /// The name of the signal that ended the program (`SIGSEGV`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub signal: Option<String>,
    /// Everything written to stdout, up to the limit.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stdout: Option<String>,
    /// Everything written to stderr, up to the limit.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stderr: Option<String>,
    /// Output went past its limit and was cut.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub truncated: bool,
    /// Every test's result, where tests were sent.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub tests: Vec<TestResult>,
    /// Milliseconds from receipt to reply.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub duration_ms: Option<u64>,
    /// What the tested program used.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub usage: Option<Usage>,
    /// What went wrong, for `deploy_failed`, `superseded`, `invalid` and `unavailable`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<Problem>,
    /// The reply's place in the submission's events.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub seq: Option<u64>,
}

impl Outcome {
    /// An outcome with nothing but its status.
    pub fn new(status: Status) -> Self {
        Self {
            status,
            namespace: None,
            submission_id: None,
            repl_id: None,
            release: None,
            url: None,
            reason: None,
            exit_code: None,
            signal: None,
            stdout: None,
            stderr: None,
            truncated: false,
            tests: Vec::new(),
            duration_ms: None,
            usage: None,
            error: None,
            seq: None,
        }
    }
}
