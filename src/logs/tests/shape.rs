//! The shape of records.

use serde_json::{Value, json};

use super::super::ecs;
use super::{output, received};
use crate::model::{
    Ending, Event, Outcome, Problem, Reason, Record, RunReport, Status, Step, StepState,
    SubmissionId, TestOutcome, TestResult, Usage,
};

fn shape(event: Event, seq: Option<u64>) -> Value {
    Value::Object(ecs(&Record {
        position: 7,
        time: "2026-01-31T12:00:00.000123Z".parse().unwrap(),
        user_id: "ada".parse().unwrap(),
        submission_id: Some("0190b6b5-7f3c-7000-8000-000000000000".parse().unwrap()),
        repl_id: "shop".parse().unwrap(),
        seq,
        event,
    }))
}

#[test]
fn a_step_has_every_field_of_the_contract() {
    let step = Event::Step {
        name: Step::Test,
        state: StepState::Passed,
        duration_ms: Some(12),
    };
    let expected = json!({
        "@timestamp": "2026-01-31T12:00:00.000123Z",
        "message": "Testing: passed",
        "log.level": "info",
        "event.action": "test.passed",
        "event.outcome": "success",
        "event.duration": 12_000_000,
        "event.sequence": 3,
        "user.id": "ada",
        "service.name": "gantry",
        "orchestrator.namespace": "user-ada",
        "orchestrator.resource.name": "ada-test",
        "gantry.submission_id": "0190b6b5-7f3c-7000-8000-000000000000",
        "gantry.repl_id": "shop",
        "gantry.step": "test",
    });
    assert_eq!(shape(step, Some(3)), expected);
}

#[test]
fn actions_levels_and_outcomes_tell_whose_failure_it_is() {
    let problem = Problem::new(
        "not_ready",
        "It did not come up",
        "port 3000 is closed",
        "Listen on it.",
    );
    let reply = |status, reason, error: Option<&Problem>| {
        Event::Reply(Box::new(Outcome {
            reason,
            exit_code: Some(3),
            release: Some(4),
            error: error.cloned(),
            ..Outcome::new(status)
        }))
    };
    let step = |name, state| Event::Step {
        name,
        state,
        duration_ms: None,
    };
    let run = |ending| Event::RunEnded {
        run: 0,
        report: RunReport {
            ending,
            duration_ms: 1,
            usage: Usage::default(),
            truncated: false,
            test_report: None,
            listened: false,
        },
    };
    let test = |outcome| {
        Event::Test(TestResult {
            message: Some("1 is not 2".to_owned()),
            ..TestResult::new("adds", outcome, 2)
        })
    };
    let id = SubmissionId::new();
    let exit = Some(Reason::ExitCode);
    let cases = [
        (
            received("ada", id),
            "submission.received",
            "info",
            "unknown",
            "Submission received: python",
        ),
        (
            Event::Queued,
            "submission.queued",
            "info",
            "unknown",
            "Waiting for its turn",
        ),
        (
            step(Step::Test, StepState::Started),
            "test.started",
            "info",
            "unknown",
            "Testing: started",
        ),
        (
            step(Step::Test, StepState::Failed),
            "test.failed",
            "warn",
            "failure",
            "Testing: failed",
        ),
        (
            step(Step::Deploy, StepState::Failed),
            "deploy.failed",
            "error",
            "failure",
            "Deploying: failed",
        ),
        (
            output("a\u{1b}[2J\n"),
            "output.stdout",
            "info",
            "unknown",
            "a\u{1b}[2J\n",
        ),
        (
            run(Ending::Exited(0)),
            "run.ended",
            "info",
            "success",
            "Exited with code 0",
        ),
        (
            run(Ending::Limit(Reason::Memory)),
            "run.ended",
            "warn",
            "failure",
            "Stopped at its limit: memory",
        ),
        (
            test(TestOutcome::Passed),
            "test.result",
            "info",
            "success",
            "adds passed",
        ),
        (
            test(TestOutcome::Failed),
            "test.result",
            "warn",
            "failure",
            "adds failed: 1 is not 2",
        ),
        (
            reply(Status::TestsPassed, None, None),
            "submission.ended",
            "info",
            "success",
            "Tests passed",
        ),
        (
            reply(Status::TestsFailed, exit, None),
            "submission.ended",
            "warn",
            "failure",
            "Tests failed: exit code 3",
        ),
        (
            reply(Status::DeployFailed, None, Some(&problem)),
            "submission.ended",
            "error",
            "failure",
            "Deploy failed: It did not come up",
        ),
        (
            reply(Status::Unavailable, None, Some(&problem)),
            "submission.ended",
            "error",
            "unknown",
            "Unavailable: It did not come up",
        ),
        (
            reply(Status::Cancelled, None, None),
            "submission.ended",
            "warn",
            "unknown",
            "Cancelled",
        ),
    ];
    for (event, action, level, outcome, message) in cases {
        let shape = shape(event, None);
        assert_eq!(shape["event.action"], action);
        assert_eq!(shape["log.level"], level, "{action}");
        assert_eq!(shape["event.outcome"], outcome, "{action}");
        assert_eq!(shape["message"], message, "{action}");
    }
    let failed = shape(reply(Status::DeployFailed, None, Some(&problem)), Some(9));
    assert_eq!(failed["error.code"], "not_ready");
    assert_eq!(
        failed["error.message"],
        "It did not come up: port 3000 is closed. Listen on it."
    );
    assert_eq!(failed["gantry.release"], 4);
    assert_eq!(failed["gantry.status"], "deploy_failed");
    let first = shape(received("ada", id), None);
    assert_eq!(first["gantry.language"], "python");
    let served = Event::Reply(Box::new(Outcome {
        url: Some("http://shop.apps.localhost/".to_owned()),
        ..Outcome::new(Status::Deployed)
    }));
    assert_eq!(
        shape(served, None)["url.full"],
        "http://shop.apps.localhost/"
    );
    assert_eq!(failed["orchestrator.resource.name"], "shop");
    assert_eq!(
        shape(reply(Status::TestsFailed, exit, None), None)["error.type"],
        "exit_code"
    );
}
