//! A journal record as Elastic Common Schema (design.md §6).

use serde_json::{Map, Value};

use crate::model::{Ending, Event, Outcome, Problem, Record, RunReport, Status, Step, StepState};

/// The value of `log.level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    Info,
    /// The user's program failed, or the user stopped it.
    Warn,
    /// Gantry's side failed, or a release did not come up.
    Error,
}

impl Level {
    pub(super) const ALL: [Level; 3] = [Level::Info, Level::Warn, Level::Error];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        }
    }
}

const SUCCESS: &str = "success";
const FAILURE: &str = "failure";
const UNKNOWN: &str = "unknown";

/// What differs from event to event.
struct Parts<'a> {
    action: String,
    message: String,
    level: Level,
    outcome: &'static str,
    duration_ms: Option<u64>,
    step: Option<Step>,
    release: Option<u64>,
    /// `error.type`: how the program failed.
    error_type: Option<&'static str>,
    error: Option<&'a Problem>,
    /// Whether it happened in the user's sandbox; otherwise it concerns the repl.
    in_sandbox: bool,
    /// `gantry.language`, of a submission that came in.
    language: Option<&'static str>,
    /// `gantry.status` and `url.full`, of one that ended.
    ended: Option<&'a Outcome>,
}

impl Parts<'_> {
    fn new(action: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            action: action.into(),
            message: message.into(),
            level: Level::Info,
            outcome: UNKNOWN,
            duration_ms: None,
            step: None,
            release: None,
            error_type: None,
            error: None,
            in_sandbox: false,
            language: None,
            ended: None,
        }
    }
}

/// The record as it is shipped, searched and shown: literal dotted names, no nesting.
pub fn ecs(record: &Record) -> Map<String, Value> {
    let parts = parts(&record.event);
    let user = record.user_id.as_str();
    let resource = if parts.in_sandbox {
        format!("{user}-test")
    } else {
        record.repl_id.to_string()
    };
    let mut map = Map::new();
    let mut put = |name: &str, value: Value| {
        map.insert(name.to_owned(), value);
    };
    put("@timestamp", record.happened().to_string().into());
    put("message", parts.message.into());
    put("log.level", parts.level.as_str().into());
    put("event.action", parts.action.into());
    put("event.outcome", parts.outcome.into());
    if let Some(ms) = parts.duration_ms {
        put("event.duration", ms.saturating_mul(1_000_000).into());
    }
    if let Some(seq) = record.seq {
        put("event.sequence", seq.into());
    }
    put("user.id", user.into());
    put("service.name", "gantry".into());
    put("orchestrator.namespace", record.user_id.namespace().into());
    put("orchestrator.resource.name", resource.into());
    if let Some(id) = record.submission_id {
        put("gantry.submission_id", id.to_string().into());
    }
    put("gantry.repl_id", record.repl_id.as_str().into());
    if let Some(release) = parts.release {
        put("gantry.release", release.into());
    }
    if let Some(step) = parts.step {
        put("gantry.step", step.as_str().into());
    }
    if let Some(language) = parts.language {
        put("gantry.language", language.into());
    }
    if let Some(outcome) = parts.ended {
        put("gantry.status", outcome.status.as_str().into());
        if let Some(url) = &outcome.url {
            put("url.full", url.as_str().into());
        }
    }
    if let Some(kind) = parts.error_type {
        put("error.type", kind.into());
    }
    if let Some(problem) = parts.error {
        let Problem {
            code,
            message,
            cause,
            remediation,
        } = problem;
        put("error.code", code.as_str().into());
        put(
            "error.message",
            format!("{message}: {cause}. {remediation}").into(),
        );
    }
    map
}

/// The level of a record, without making all of it.
pub(super) fn level(record: &Record) -> Level {
    parts(&record.event).level
}

/// The step a record belongs to.
pub(super) fn step(record: &Record) -> Option<Step> {
    parts(&record.event).step
}

fn parts(event: &Event) -> Parts<'_> {
    match event {
        Event::Received { submission, .. } => Parts {
            step: Some(Step::Receive),
            language: Some(submission.language.name),
            ..Parts::new(
                "submission.received",
                match submission.files.len() {
                    1 => format!("Submission received: {}", submission.language.name),
                    n => format!(
                        "Submission received: {}, {n} files",
                        submission.language.name
                    ),
                },
            )
        },
        Event::TakenUp => Parts::new(
            "submission.taken_up",
            "Taken up again by a server that started",
        ),
        Event::PutDown => Parts::new("submission.put_down", "Left to the next server"),
        Event::Input { data, eof } => Parts {
            step: Some(Step::Test),
            in_sandbox: true,
            ..Parts::new(
                "input.received",
                format!(
                    "Input for the program: {} bytes{}",
                    data.len(),
                    if *eof { ", and nothing more" } else { "" }
                ),
            )
        },
        Event::Cancelled { why } => Parts {
            level: Level::Warn,
            error: why.as_ref(),
            ..Parts::new("submission.cancelled", "Asked to end")
        },
        Event::Overtaken { by } => Parts::new(
            "submission.overtaken",
            format!("Will not be deployed: {by}"),
        ),
        Event::Queued => Parts::new("submission.queued", "Waiting for its turn"),
        Event::Step {
            name,
            state,
            duration_ms,
        } => step_parts(*name, *state, *duration_ms),
        Event::Output { stream, data, .. } => Parts {
            step: Some(Step::Test),
            in_sandbox: true,
            ..Parts::new(format!("output.{}", stream.as_str()), data.as_str())
        },
        Event::RunEnded { report, .. } => run_parts(report),
        Event::Test(result) => {
            let (failed, ended) = (result.failed(), result.outcome.as_str());
            let message = match &result.message {
                Some(message) if failed => format!("{} {ended}: {message}", result.name),
                _ => format!("{} {ended}", result.name),
            };
            Parts {
                level: if failed { Level::Warn } else { Level::Info },
                outcome: if failed { FAILURE } else { SUCCESS },
                duration_ms: Some(result.duration_ms),
                step: Some(Step::Test),
                in_sandbox: true,
                ..Parts::new("test.result", message)
            }
        }
        Event::Reply(outcome) => reply_parts(outcome),
        Event::ProgramOutput {
            release,
            stream,
            data,
            ..
        } => Parts {
            release: Some(*release),
            ..Parts::new(format!("output.{}", stream.as_str()), data.as_str())
        },
        Event::Repl {
            action,
            message,
            release,
            error,
            ..
        } => Parts {
            level: if error.is_some() {
                Level::Error
            } else {
                Level::Info
            },
            outcome: if error.is_some() { FAILURE } else { SUCCESS },
            release: *release,
            error: error.as_ref(),
            ..Parts::new(action.as_str(), message.as_str())
        },
    }
}

fn step_parts(name: Step, state: StepState, duration_ms: Option<u64>) -> Parts<'static> {
    let subject = match name {
        Step::Receive => "Receiving the submission",
        Step::Sandbox => "Preparing the sandbox",
        Step::Install => "Installing packages",
        Step::Compile => "Compiling",
        Step::Test => "Testing",
        Step::Publish => "Publishing the files",
        Step::Deploy => "Deploying",
        Step::Ready => "Waiting for the release to serve",
    };
    let in_sandbox = matches!(
        name,
        Step::Sandbox | Step::Install | Step::Compile | Step::Test
    );
    let (level, outcome) = match (state, name) {
        (StepState::Started, _) => (Level::Info, UNKNOWN),
        (StepState::Passed, _) => (Level::Info, SUCCESS),
        // The program's own doing; everything else is Gantry's side.
        (StepState::Failed, Step::Receive | Step::Install | Step::Compile | Step::Test) => {
            (Level::Warn, FAILURE)
        }
        (StepState::Failed, _) => (Level::Error, FAILURE),
    };
    Parts {
        level,
        outcome,
        duration_ms,
        step: Some(name),
        in_sandbox,
        ..Parts::new(
            format!("{}.{}", name.as_str(), state.as_str()),
            format!("{subject}: {}", state.as_str()),
        )
    }
}

fn run_parts(report: &RunReport) -> Parts<'_> {
    let (message, level, outcome, error_type) = match &report.ending {
        Ending::Exited(0) => ("Exited with code 0".to_owned(), Level::Info, SUCCESS, None),
        Ending::Exited(code) => (
            format!("Exited with code {code}"),
            Level::Warn,
            FAILURE,
            Some("exit_code"),
        ),
        Ending::Signalled(signal) => (
            format!("Ended by signal {signal}"),
            Level::Warn,
            FAILURE,
            Some("signal"),
        ),
        Ending::Limit(reason) => (
            format!("Stopped at its limit: {}", reason.as_str()),
            Level::Warn,
            FAILURE,
            Some(reason.as_str()),
        ),
        Ending::Cancelled => ("Cancelled".to_owned(), Level::Warn, UNKNOWN, None),
        Ending::Starved { waited_ms } => (
            format!("Stopped: it waited {waited_ms} ms for a processor"),
            Level::Error,
            UNKNOWN,
            None,
        ),
        Ending::NotStarted(cause) => (
            format!("Could not be started: {cause}"),
            Level::Error,
            UNKNOWN,
            None,
        ),
    };
    Parts {
        level,
        outcome,
        duration_ms: Some(report.duration_ms),
        step: Some(Step::Test),
        error_type,
        in_sandbox: true,
        ..Parts::new("run.ended", message)
    }
}

fn reply_parts(outcome: &Outcome) -> Parts<'_> {
    let (words, level, result) = match outcome.status {
        Status::Deployed => ("Deployed", Level::Info, SUCCESS),
        Status::TestsPassed => ("Tests passed", Level::Info, SUCCESS),
        Status::TestsFailed => ("Tests failed", Level::Warn, FAILURE),
        Status::DeployFailed => ("Deploy failed", Level::Error, FAILURE),
        Status::Cancelled => ("Cancelled", Level::Warn, UNKNOWN),
        Status::Superseded => ("Superseded", Level::Info, UNKNOWN),
        Status::Invalid => ("Invalid", Level::Warn, FAILURE),
        // Neither a pass nor the user's failure.
        Status::Unavailable => ("Unavailable", Level::Error, UNKNOWN),
    };
    let mut message = words.to_owned();
    let detail = match (
        &outcome.url,
        outcome.reason,
        outcome.exit_code,
        &outcome.signal,
    ) {
        (Some(url), ..) => Some(url.clone()),
        (_, Some(crate::model::Reason::ExitCode), Some(code), _) => {
            Some(format!("exit code {code}"))
        }
        (_, Some(_), _, Some(signal)) => Some(signal.clone()),
        (_, Some(reason), ..) => Some(reason.as_str().replace('_', " ")),
        _ => outcome.error.as_ref().map(|e| e.message.clone()),
    };
    if let Some(detail) = detail {
        message.push_str(": ");
        message.push_str(&detail);
    }
    Parts {
        level,
        outcome: result,
        duration_ms: outcome.duration_ms,
        release: outcome.release,
        error_type: outcome.reason.map(crate::model::Reason::as_str),
        error: outcome.error.as_ref(),
        ended: Some(outcome),
        ..Parts::new("submission.ended", message)
    }
}
