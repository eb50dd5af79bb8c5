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

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TestOutcome {
    /// It ran and held.
    Passed,
    /// It did not hold, or could not be run.
    Failed,
    /// It was left out.
    Skipped,
    /// It is still to be written, or to be made to pass: whether it holds does not count.
    Todo,
}

impl TestOutcome {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            TestOutcome::Passed => "passed",
            TestOutcome::Failed => "failed",
            TestOutcome::Skipped => "skipped",
            TestOutcome::Todo => "todo",
        }
    }
}

/// A test's outcome as two fields: `passed`, which was there first, and `outcome`.
mod held {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::TestOutcome;

    #[derive(Serialize, Deserialize)]
    struct Held {
        passed: bool,
        /// Absent in what older servers recorded.
        #[serde(default)]
        outcome: Option<TestOutcome>,
    }

    pub fn serialize<S: Serializer>(outcome: &TestOutcome, to: S) -> Result<S::Ok, S::Error> {
        let held = Held {
            passed: *outcome == TestOutcome::Passed,
            outcome: Some(*outcome),
        };
        held.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<TestOutcome, D::Error> {
        let held = Held::deserialize(from)?;
        Ok(held.outcome.unwrap_or(match held.passed {
            true => TestOutcome::Passed,
            false => TestOutcome::Failed,
        }))
    }
}

/// One test's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResult {
    /// Its name, with what it is in before it.
    pub name: String,
    /// How it ended; also on the wire as `passed`.
    #[serde(flatten, with = "held")]
    pub outcome: TestOutcome,
    /// Milliseconds it took.
    pub duration_ms: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<Reason>,
    /// The exit code of its run, where it had one of its own.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exit_code: Option<i32>,
    /// The name of the signal that ended its run.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub signal: Option<String>,
    /// What its run used.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub usage: Option<Usage>,
    /// What it said when it did not hold.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<String>,
    /// What should have come out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expected: Option<String>,
    /// What came out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub actual: Option<String>,
    /// The end of what its own run wrote to stdout, when it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stdout: Option<String>,
    /// The end of what its own run wrote to stderr, when it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stderr: Option<String>,
    /// Its run wrote more than is here.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub truncated: bool,
}

impl TestResult {
    /// Nothing but how it ended.
    pub fn new(name: impl Into<String>, outcome: TestOutcome, duration_ms: u64) -> Self {
        Self {
            name: name.into(),
            outcome,
            duration_ms,
            reason: None,
            exit_code: None,
            signal: None,
            usage: None,
            message: None,
            expected: None,
            actual: None,
            stdout: None,
            stderr: None,
            truncated: false,
        }
    }

    /// Whether it makes the whole fail.
    pub fn failed(&self) -> bool {
        self.outcome == TestOutcome::Failed
    }
}

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestCounts {
    /// Ran and held.
    pub passed: usize,
    /// Did not hold.
    pub failed: usize,
    /// Were left out.
    pub skipped: usize,
    /// Do not count yet.
    pub todo: usize,
}

impl TestCounts {
    /// Of these tests.
    pub fn of(tests: &[TestResult]) -> Self {
        let mut counts = Self::default();
        tests.iter().for_each(|test| counts.add(test.outcome));
        counts
    }

    /// One more.
    pub fn add(&mut self, outcome: TestOutcome) {
        let count = match outcome {
            TestOutcome::Passed => &mut self.passed,
            TestOutcome::Failed => &mut self.failed,
            TestOutcome::Skipped => &mut self.skipped,
            TestOutcome::Todo => &mut self.todo,
        };
        *count = count.saturating_add(1);
    }

    /// All of them.
    pub fn all(&self) -> usize {
        [self.passed, self.failed, self.skipped, self.todo]
            .into_iter()
            .fold(0, usize::saturating_add)
    }
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
    /// The tests' results, where tests were sent. Of very many not all are here: those that failed come first
    /// then.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub tests: Vec<TestResult>,
    /// How many tests ended how, all of them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub test_counts: Option<TestCounts>,
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
            test_counts: None,
            duration_ms: None,
            usage: None,
            error: None,
            seq: None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_an_older_server_recorded_of_a_test_is_read() {
        let read = |passed: &str| {
            let text = format!(r#"{{"name":"a","passed":{passed},"duration_ms":1}}"#);
            serde_json::from_str::<TestResult>(&text).unwrap()
        };
        assert_eq!(read("true").outcome, TestOutcome::Passed);
        assert_eq!(read("false").outcome, TestOutcome::Failed);
    }

    #[test]
    fn only_a_test_that_passed_says_so() {
        for (outcome, passed) in [
            (TestOutcome::Passed, true),
            (TestOutcome::Failed, false),
            (TestOutcome::Skipped, false),
            (TestOutcome::Todo, false),
        ] {
            let test = TestResult::new("a", outcome, 1);
            let text = serde_json::to_value(&test).unwrap();
            assert_eq!(text["passed"], passed);
            assert_eq!(text["outcome"], outcome.as_str());
            assert_eq!(serde_json::from_value::<TestResult>(text).unwrap(), test);
        }
    }
}
