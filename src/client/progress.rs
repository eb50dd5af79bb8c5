//! How far a submission's stream has come, and what to send next; no I/O.

use serde_json::json;
use tokio_tungstenite::tungstenite::Message as WsMessage;

use super::frame::{Frame, Kind};
use super::message::Message;
use super::typed::Typed;
use super::unacknowledged::Unacknowledged;
use crate::model::{Outcome, Problem, Status, SubmissionId};

/// The code of the answer to a message about a submission that the server does not know.
const NOT_FOUND: &str = "not_found";

/// What became of a frame.
#[derive(Debug)]
pub(super) enum Taken {
    /// Seen before, not about this submission, or nothing to show.
    Old,
    /// The next event.
    New,
    /// Frames before it are missing.
    Gap,
    /// The server does not know the submission: it is to be sent again.
    Unknown,
    /// Input was not taken; the submission goes on.
    InputRefused(Box<Problem>),
    /// The end.
    Reply(Box<Outcome>),
}

/// How far the submission's stream has come; no I/O.
#[derive(Debug)]
pub(super) struct Progress {
    id: SubmissionId,
    after: u64,
    /// The server may know the submission.
    pub(super) sent: bool,
    resuming: bool,
    input: Unacknowledged,
}

impl Progress {
    pub(super) fn new(id: SubmissionId) -> Self {
        Self {
            id,
            after: 0,
            sent: false,
            resuming: false,
            input: Unacknowledged::default(),
        }
    }

    /// The first message on a new connection.
    pub(super) fn opening(&mut self, message: &Message) -> WsMessage {
        if !self.sent {
            return self.submit(message);
        }
        self.resuming = true;
        WsMessage::text(json!({"resume": self.id, "after": self.after}).to_string())
    }

    pub(super) fn submit(&mut self, message: &Message) -> WsMessage {
        self.sent = true;
        self.resuming = false;
        WsMessage::text(message.text.as_str())
    }

    /// Whether more input may be sent before the server says what it has.
    pub(super) fn takes_input(&self) -> bool {
        self.input.has_room()
    }

    /// Input for the program, kept until the server has it; nothing follows the end.
    pub(super) fn input(&mut self, typed: Typed) -> Vec<WsMessage> {
        messages(self.input.add(self.id, typed))
    }

    /// All input that the server may not have: for a new connection, behind the message that opens it, and for
    /// a submission that is sent again.
    pub(super) fn input_again(&self) -> Vec<WsMessage> {
        messages(self.input.again(self.id))
    }

    pub(super) fn cancel(&self) -> WsMessage {
        WsMessage::text(json!({"cancel": self.id}).to_string())
    }

    pub(super) fn take(&mut self, frame: &Frame) -> Taken {
        // A message that could not be read is answered without an id; only ours go over this connection.
        if frame.submission_id.is_some_and(|id| id != self.id) {
            return Taken::Old;
        }
        if let (Kind::Reply(outcome), None) = (&frame.kind, frame.seq) {
            return self.refusal(outcome);
        }
        if let Some(seq) = frame.seq {
            if seq > self.after + 1 {
                return Taken::Gap;
            }
            if seq <= self.after {
                return Taken::Old;
            }
            self.after = seq;
            self.resuming = false;
        }
        match &frame.kind {
            Kind::Reply(outcome) => Taken::Reply(outcome.clone()),
            Kind::InputReceived(bytes) => {
                self.input.received(*bytes);
                Taken::Old
            }
            Kind::InputRefused(problem) if self.input.refused() => {
                Taken::InputRefused(problem.clone())
            }
            Kind::InputRefused(_) => Taken::Old,
            Kind::Event(_) | Kind::Other => Taken::New,
        }
    }

    /// A reply outside the submission's stream answers one message: it was not taken.
    fn refusal(&self, outcome: &Outcome) -> Taken {
        let code = outcome.error.as_ref().map(|error| error.code.as_str());
        match (outcome.status, code) {
            (Status::Invalid, Some(NOT_FOUND)) if self.resuming => Taken::Unknown,
            // No submission is answered so: it was input or a cancel that came before the submission was sent
            // again, or after it was over.
            (Status::Invalid, Some(NOT_FOUND)) => Taken::Old,
            _ => Taken::Reply(Box::new(outcome.clone())),
        }
    }
}

fn messages(frames: Vec<serde_json::Value>) -> Vec<WsMessage> {
    let frames = frames.into_iter();
    frames
        .map(|frame| WsMessage::text(frame.to_string()))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn progress() -> (Progress, Message) {
        let id = SubmissionId::new();
        (
            Progress::new(id),
            Message {
                id,
                text: "{}".to_owned(),
            },
        )
    }

    fn frame(id: SubmissionId, seq: impl Into<Option<u64>>, rest: &str) -> Frame {
        let seq = seq
            .into()
            .map(|seq: u64| format!(r#","seq":{seq}"#))
            .unwrap_or_default();
        Frame::parse(&format!(r#"{{"submission_id":"{id}"{seq},{rest}}}"#)).unwrap()
    }

    const QUEUED: &str = r#""event":"queued""#;
    const DEPLOYED: &str = r#""status":"deployed""#;
    const INVALID: &str = r#""status":"invalid""#;
    const UNKNOWN: &str = r#""status":"invalid","error":{"code":"not_found","message":"There is no submission","cause":"no submission of yours has this id","remediation":"Check the id"}"#;

    #[test]
    fn every_frame_is_shown_once_however_often_it_is_replayed() {
        let (mut progress, message) = progress();
        let id = message.id;
        progress.opening(&message);
        assert!(matches!(progress.take(&frame(id, 1, QUEUED)), Taken::New));
        assert!(matches!(progress.take(&frame(id, 1, QUEUED)), Taken::Old));
        assert!(matches!(progress.take(&frame(id, 3, QUEUED)), Taken::Gap));
        assert!(matches!(
            progress.take(&frame(SubmissionId::new(), 2, QUEUED)),
            Taken::Old
        ));
        assert!(matches!(
            progress.take(&frame(id, 2, DEPLOYED)),
            Taken::Reply(_)
        ));
    }

    #[test]
    fn a_new_connection_resumes_behind_the_last_frame() {
        let (mut progress, message) = progress();
        assert_eq!(progress.opening(&message).to_text().unwrap(), "{}");
        progress.take(&frame(message.id, 1, QUEUED));
        let resume: serde_json::Value =
            serde_json::from_str(progress.opening(&message).to_text().unwrap()).unwrap();
        assert_eq!(resume, json!({"resume": message.id, "after": 1}));
    }

    #[test]
    fn a_server_that_does_not_know_the_id_is_sent_the_submission_again() {
        let (mut progress, message) = progress();
        progress.opening(&message);
        progress.input(Some("one".to_owned()));
        progress.opening(&message);
        let input = progress.input_again();
        assert_eq!(input.len(), 1);
        assert!(matches!(
            progress.take(&frame(message.id, None, UNKNOWN)),
            Taken::Unknown
        ));
        progress.submit(&message);
        // The answer to the input is none to the submission, which takes it once more.
        assert!(matches!(
            progress.take(&frame(message.id, None, UNKNOWN)),
            Taken::Old
        ));
        assert_eq!(progress.input_again(), input);
        assert!(matches!(
            progress.take(&frame(message.id, None, INVALID)),
            Taken::Reply(_)
        ));
    }

    #[test]
    fn a_refused_cancel_does_not_hide_the_reply() {
        let (mut progress, message) = progress();
        progress.opening(&message);
        progress.take(&frame(message.id, 1, QUEUED));
        progress.cancel();
        assert!(matches!(
            progress.take(&frame(message.id, None, UNKNOWN)),
            Taken::Old
        ));
        assert!(matches!(
            progress.take(&frame(message.id, 2, DEPLOYED)),
            Taken::Reply(_)
        ));
    }
}
