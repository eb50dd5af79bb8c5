//! The server's frames, as a client reads them.

use serde::Deserialize;
use serde_json::Value;

use super::failure::Failure;
use crate::model::{Outcome, OutputStream, Problem, SubmissionId, TestResult};

/// One frame from the server.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    /// As it came.
    pub(super) json: Value,
    /// Which submission it belongs to; absent when the server could not tell.
    pub(super) submission_id: Option<SubmissionId>,
    /// Its place in the submission's stream.
    pub(super) seq: Option<u64>,
    /// What it says.
    pub(super) kind: Kind,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Event(Event),
    Reply(Box<Outcome>),
    /// So many bytes of input are on the server's disk.
    InputReceived(u64),
    /// Input did not reach the program, which goes on.
    InputRefused(Box<Problem>),
    /// Something a newer server may send.
    Other,
}

/// An event frame; names are text so that a newer server's steps can be shown.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event {
    Queued,
    Step {
        name: String,
        state: String,
        duration_ms: Option<u64>,
    },
    Output {
        stream: OutputStream,
        data: String,
    },
    Test(Box<TestResult>),
    #[serde(other)]
    Unknown,
}

impl Frame {
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
        let json: Value = serde_json::from_str(text).map_err(|error| not_understood(&error))?;
        let field = |name| json.get(name).filter(|value| !value.is_null());
        let submission_id = field("submission_id").and_then(Value::as_str);
        let kind = if field("event").is_some() {
            Kind::Event(Event::deserialize(&json).map_err(|error| not_understood(&error))?)
        } else if field("status").is_some_and(Value::is_string) {
            let outcome = Outcome::deserialize(&json).map_err(|error| not_understood(&error))?;
            Kind::Reply(Box::new(outcome))
        } else if let Some(bytes) = field("received").and_then(Value::as_u64) {
            Kind::InputReceived(bytes)
        } else if let Some(Ok(problem)) = field("error").map(Problem::deserialize) {
            Kind::InputRefused(Box::new(problem))
        } else {
            Kind::Other
        };
        Ok(Self {
            submission_id: submission_id.and_then(|id| id.parse().ok()),
            seq: field("seq").and_then(Value::as_u64),
            kind,
            json,
        })
    }
}

fn not_understood(error: &serde_json::Error) -> Failure {
    Failure::unavailable(
        "a frame from the server is not understood",
        error.to_string(),
        "Check that the server is Gantry, of the same version as this program.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::Status;

    fn kind(text: &str) -> Kind {
        Frame::parse(text).unwrap().kind
    }

    #[test]
    fn every_kind_of_frame_is_read_and_newer_ones_are_kept_apart() {
        let output =
            kind(r#"{"event":"output","submission_id":"x","seq":3,"stream":"stderr","data":"é"}"#);
        assert!(matches!(
            output,
            Kind::Event(Event::Output {
                stream: OutputStream::Stderr,
                ..
            })
        ));
        let test = kind(r#"{"event":"test","seq":4,"name":"a","passed":true,"duration_ms":1}"#);
        assert!(matches!(test, Kind::Event(Event::Test(result)) if !result.failed()));
        assert!(matches!(
            kind(r#"{"event":"sparkle","seq":5}"#),
            Kind::Event(Event::Unknown)
        ));
        assert!(matches!(kind(r#"{"hello":1}"#), Kind::Other));
        assert!(matches!(
            kind(r#"{"submission_id":"x","received":7}"#),
            Kind::InputReceived(7)
        ));
        let refused = kind(
            r#"{"submission_id":"x","error":{"code":"a","message":"b","cause":"c","remediation":"d"}}"#,
        );
        assert!(matches!(refused, Kind::InputRefused(problem) if problem.code == "a"));
        let reply =
            Frame::parse(r#"{"status":"deployed","namespace":"user-test","seq":9,"new":1}"#)
                .unwrap();
        assert_eq!(reply.seq, Some(9));
        assert!(matches!(reply.kind, Kind::Reply(outcome) if outcome.status == Status::Deployed));
    }

    #[test]
    fn what_is_not_gantry_is_said_to_be_so() {
        for bad in [
            "",
            "hello",
            "{\"status\":\"great\"}",
            "{\"event\":\"output\"}",
        ] {
            assert!(Frame::parse(bad).is_err(), "{bad:?}");
        }
    }
}
