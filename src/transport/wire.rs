//! The frames of `/ws/code`, in and out. Pure: bytes to values and values to bytes.

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::journal::JournalError;
use crate::model::{
    Event, FieldError, Outcome, OutputStream, Problem, Record, Status, Step, StepState,
    SubmissionId, SubmissionRequest, TestResult, UserId,
};

/// A frame from a client.
#[derive(Debug)]
pub enum Frame {
    /// Code to test and deploy.
    Submission(Box<SubmissionRequest>),
    /// Replay and follow.
    Resume(Resume),
    /// Stop it.
    Cancel(Cancel),
    /// Input for the running program.
    Stdin(Stdin),
}

/// `{"resume":id,"after":seq}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resume {
    /// Which submission.
    #[serde(rename = "resume")]
    pub id: SubmissionId,
    /// The last sequence number the client has.
    #[serde(default)]
    pub after: u64,
}

/// `{"cancel":id}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// Which submission.
    #[serde(rename = "cancel")]
    pub id: SubmissionId,
}

/// `{"stdin":id,"data":"…","offset":bytes,"eof":bool}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stdin {
    /// Which submission.
    #[serde(rename = "stdin")]
    pub id: SubmissionId,
    /// What to write.
    #[serde(default)]
    pub data: String,
    /// Bytes of input that were sent before it: what was received already is passed over, and the answer
    /// says how much was received.
    #[serde(default)]
    pub offset: Option<u64>,
    /// Nothing follows.
    #[serde(default)]
    pub eof: bool,
}

/// A frame that was refused, with what could be read of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// The submission it names, when that much could be read.
    pub submission_id: Option<SubmissionId>,
    /// The user it names, when that much could be read.
    pub user_id: Option<UserId>,
    /// What is wrong. An empty field: the message as a whole.
    pub error: FieldError,
}

/// Reads one frame. Duplicate names, unknown fields and deep nesting are refused, not guessed at.
pub fn parse(text: &str) -> Result<Frame, Box<Refused>> {
    let mut outline = Outline::default();
    if let Err(error) = outline.read(text) {
        return Err(outline.refused(error));
    }
    let parsed = if outline.has("resume") {
        fields(text).map(Frame::Resume)
    } else if outline.has("cancel") {
        fields(text).map(Frame::Cancel)
    } else if outline.has("stdin") && !["user_id", "code", "files"].iter().any(|n| outline.has(n)) {
        fields(text).map(Frame::Stdin)
    } else {
        fields(text).map(|request| Frame::Submission(Box::new(request)))
    };
    parsed.map_err(|error| outline.refused(error))
}

/// Reads a JSON document into a type; an error names the field by its path.
pub fn fields<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, FieldError> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = match error.path().to_string() {
            root if root == "." => String::new(),
            path => path,
        };
        field_error(path, &error.into_inner().to_string())
    })?;
    json.end().map_err(not_json)?;
    Ok(value)
}

fn not_json(error: serde_json::Error) -> FieldError {
    FieldError::new("", format!("is not JSON: {error}"))
}

/// Turns serde's words into a field and a reason.
fn field_error(path: String, message: &str) -> FieldError {
    // serde_json appends the place in the text; the field says it better.
    let message = message
        .rsplit_once(" at line ")
        .map_or(message, |(message, _)| message);
    for (start, reason) in [
        ("missing field `", "is required"),
        ("duplicate field `", "is there twice"),
        ("unknown field `", "is not a field of this message"),
    ] {
        let Some(rest) = message.strip_prefix(start) else {
            continue;
        };
        let (name, rest) = rest.split_once('`').unwrap_or((rest, ""));
        let name = name.to_owned();
        let known = rest
            .strip_prefix(", expected ")
            .map_or_else(String::new, |known| {
                format!(
                    "; known are {}",
                    known.trim_start_matches("one of ").replace('`', "")
                )
            });
        let path = match path.as_str() {
            path if path.is_empty() || path == name => name,
            path if path.ends_with(&format!(".{name}")) => path.to_owned(),
            path => format!("{path}.{name}"),
        };
        return FieldError::new(path, format!("{reason}{known}"));
    }
    if path == "tests" && message.contains("did not match any variant") {
        return FieldError::new(
            path,
            "must be cases [{name, stdin, args, expected_stdout, compare, timeout_ms}], file names \
             [\"test_a.py\"] or files {\"test_a.py\": \"…\"}",
        );
    }
    let reason = wrong_type(message).unwrap_or_else(|| message.to_owned());
    FieldError::new(path, reason)
}

/// Says in a user's words what serde says in Rust's.
fn wrong_type(message: &str) -> Option<String> {
    if let Some(why) = message.strip_prefix("UUID parsing failed: ") {
        return Some(format!("is not a UUID: {why}"));
    }
    let rest = ["invalid type: ", "invalid value: "]
        .iter()
        .find_map(|start| message.strip_prefix(start))?;
    let (found, expected) = rest.rsplit_once(", expected ")?;
    let expected = match expected {
        "u64" => "a whole number, 0 or more",
        "a sequence" => "a list",
        "a map" => "an object",
        other if other.starts_with("struct ") => "an object",
        other => other,
    };
    Some(format!(
        "must be {expected}, not {}",
        found.replace('`', "")
    ))
}

/// What is found by walking through the whole message once, before any of it is believed.
#[derive(Debug, Default)]
struct Outline {
    names: Vec<String>,
    submission_id: Option<SubmissionId>,
    user_id: Option<UserId>,
    path: String,
    duplicate: Option<String>,
}

impl Outline {
    fn read(&mut self, text: &str) -> Result<(), FieldError> {
        let mut json = serde_json::Deserializer::from_str(text);
        let walked = Walk {
            outline: self,
            top: true,
        }
        .deserialize(&mut json)
        .and_then(|is_object| json.end().map(|()| is_object));
        match walked {
            Ok(true) => Ok(()),
            Ok(false) => Err(FieldError::new("", "is not a JSON object")),
            Err(error) => Err(match self.duplicate.take() {
                Some(path) => FieldError::new(path, "is there twice"),
                None => not_json(error),
            }),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    fn note(&mut self, name: &str, value: &str) {
        match name {
            "submission_id" | "resume" | "cancel" | "stdin" => {
                self.submission_id = self.submission_id.or_else(|| value.parse().ok());
            }
            "user_id" => self.user_id = value.parse().ok(),
            _ => {}
        }
    }

    fn refused(self, error: FieldError) -> Box<Refused> {
        Box::new(Refused {
            submission_id: self.submission_id,
            user_id: self.user_id,
            error,
        })
    }
}

/// Visits every value; answers whether it is an object. How deep it may go is serde_json's own
/// bound of 128.
struct Walk<'a> {
    outline: &'a mut Outline,
    top: bool,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
        Ok(false)
    }
    fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
        Ok(false)
    }
    fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
        Ok(false)
    }
    fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
        Ok(false)
    }
    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }
    fn visit_str<E>(self, value: &str) -> Result<bool, E> {
        let name = std::mem::take(&mut self.outline.path);
        self.outline.note(&name, value);
        self.outline.path = name;
        Ok(false)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
        let length = self.outline.path.len();
        let mut index = 0_usize;
        loop {
            self.outline.path.push_str(&format!("[{index}]"));
            let next = seq.next_element_seed(Walk {
                outline: self.outline,
                top: false,
            })?;
            self.outline.path.truncate(length);
            if next.is_none() {
                return Ok(false);
            }
            index += 1;
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let length = self.outline.path.len();
        let mut seen = std::collections::HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            let shown: String = name.chars().take(80).collect();
            if length > 0 {
                self.outline.path.push('.');
            }
            self.outline.path.push_str(&shown);
            if self.top {
                self.outline.names.push(shown);
            }
            if !seen.insert(name) {
                self.outline.duplicate = Some(self.outline.path.clone());
                return Err(A::Error::custom("duplicate name"));
            }
            map.next_value_seed(Walk {
                outline: self.outline,
                top: false,
            })?;
            self.outline.path.truncate(length);
        }
        Ok(true)
    }
}

/// An event as the client sees it: flat, with its place in the submission's stream.
#[derive(Debug, Serialize)]
pub struct EventFrame<'a> {
    event: &'static str,
    submission_id: SubmissionId,
    seq: u64,
    time: jiff::Timestamp,
    #[serde(flatten)]
    body: Body<'a>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Body<'a> {
    Empty {},
    Step {
        name: Step,
        state: StepState,
        #[serde(skip_serializing_if = "Option::is_none")]
        duration_ms: Option<u64>,
    },
    Output {
        stream: OutputStream,
        data: &'a str,
    },
    Test(&'a TestResult),
}

/// The event frame of a record; `None` for what is not streamed and for the reply, which is a frame
/// of its own kind.
pub fn event_frame(record: &Record) -> Option<EventFrame<'_>> {
    let (event, body) = match &record.event {
        Event::Queued => ("queued", Body::Empty {}),
        Event::Step {
            name,
            state,
            duration_ms,
        } => (
            "step",
            Body::Step {
                name: *name,
                state: *state,
                duration_ms: *duration_ms,
            },
        ),
        Event::Output { stream, data, .. } => (
            "output",
            Body::Output {
                stream: *stream,
                data,
            },
        ),
        Event::Test(result) => ("test", Body::Test(result)),
        Event::Received { .. }
        | Event::TakenUp
        | Event::PutDown
        | Event::Input { .. }
        | Event::Cancelled { .. }
        | Event::Overtaken { .. }
        | Event::RunEnded { .. }
        | Event::Reply(_)
        | Event::ProgramOutput { .. }
        | Event::Repl { .. } => return None,
    };
    Some(EventFrame {
        event,
        submission_id: record.submission_id?,
        seq: record.seq?,
        time: record.time,
        body,
    })
}

/// The reply of a record, if that is what it holds, with its place in the stream.
pub fn reply(record: Record) -> Option<Outcome> {
    let Event::Reply(mut outcome) = record.event else {
        return None;
    };
    outcome.seq = outcome.seq.or(record.seq);
    outcome.submission_id = outcome.submission_id.or(record.submission_id);
    Some(*outcome)
}

/// A value as the text of a frame.
pub fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| {
        // Nothing that is sent has keys that are not text or numbers that are not finite.
        tracing::error!(%error, "a frame could not be written as JSON");
        "{\"status\":\"unavailable\"}".to_owned()
    })
}

/// The problem of a field.
pub fn field_problem(error: &FieldError) -> Problem {
    if error.field.is_empty() {
        return Problem::new(
            "message_invalid",
            format!("The message {}", error.reason),
            error.reason.clone(),
            "Send one JSON object as one text frame, such as \
             {\"user_id\":\"test\",\"code\":\"print('Hello')\"}",
        );
    }
    Problem::new(
        "field_invalid",
        format!("{} {}", error.field, error.reason),
        format!("the field {} {}", error.field, error.reason),
        format!(
            "Correct {} and send the message again; nothing ran",
            error.field
        ),
    )
}

/// The reply to a message that was wrong.
pub fn invalid(refused: &Refused) -> Outcome {
    Outcome {
        namespace: refused.user_id.as_ref().map(UserId::namespace),
        submission_id: refused.submission_id,
        error: Some(field_problem(&refused.error)),
        ..Outcome::new(Status::Invalid)
    }
}

/// The reply that says Gantry could not do its part.
pub fn unavailable(id: Option<SubmissionId>, user: Option<&UserId>, problem: Problem) -> Outcome {
    Outcome {
        namespace: user.map(UserId::namespace),
        submission_id: id,
        error: Some(problem),
        ..Outcome::new(Status::Unavailable)
    }
}

/// What is said of a submission that ended so long ago that its record is deleted.
pub fn gone_problem(id: SubmissionId, cause: &JournalError) -> Problem {
    Problem::new(
        "gone",
        format!("The record of submission {id} is no longer kept"),
        cause.to_string(),
        "To run it again send it under another submission_id; the operator can keep more with \
         GANTRY_JOURNAL_BYTES",
    )
}

/// What a frame about a submission gets that the caller cannot see, whether or not it exists.
pub fn not_found(id: SubmissionId) -> Outcome {
    Outcome {
        submission_id: Some(id),
        error: Some(Problem::new(
            "not_found",
            format!("There is no submission {id}"),
            "no submission of yours has this id",
            "Check the id; GET /submissions lists yours",
        )),
        ..Outcome::new(Status::Invalid)
    }
}

/// Says how much input is on the disk, for a client that counts what it sends. Not a reply.
pub fn stdin_received(id: SubmissionId, received: u64) -> String {
    #[derive(Serialize)]
    struct StdinReceived {
        submission_id: SubmissionId,
        received: u64,
    }
    text(&StdinReceived {
        submission_id: id,
        received,
    })
}

/// Says that input did not reach the program. Not a reply: the submission goes on.
pub fn stdin_refused(id: SubmissionId, error: &Problem) -> String {
    #[derive(Serialize)]
    struct StdinRefused<'a> {
        submission_id: SubmissionId,
        error: &'a Problem,
    }
    text(&StdinRefused {
        submission_id: id,
        error,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::TestOutcome;

    const ID: &str = "01900000-0000-7000-8000-000000000001";

    fn refused_field(text: &str) -> String {
        parse(text).unwrap_err().error.field
    }

    #[test]
    fn every_kind_of_frame_is_told_apart() {
        let is = |text: &str| parse(text).unwrap();
        assert!(matches!(
            is(r#"{"user_id":"t","code":""}"#),
            Frame::Submission(_)
        ));
        assert!(matches!(
            is(r#"{"user_id":"t","code":"","stdin":"x"}"#),
            Frame::Submission(_)
        ));
        assert!(matches!(
            is(&format!(r#"{{"resume":"{ID}"}}"#)),
            Frame::Resume(_)
        ));
        assert!(matches!(
            is(&format!(r#"{{"cancel":"{ID}"}}"#)),
            Frame::Cancel(_)
        ));
        let Frame::Stdin(stdin) = is(&format!(r#"{{"stdin":"{ID}","data":"a","eof":true}}"#))
        else {
            panic!("not stdin");
        };
        assert!(stdin.eof && stdin.data == "a");
    }

    #[test]
    fn a_refusal_names_the_field() {
        for (text, field) in [
            ("", ""),
            ("{", ""),
            ("[]", ""),
            ("42", ""),
            ("{} {}", ""),
            ("{}", "user_id"),
            (r#"{"user_id":"A"}"#, "user_id"),
            (r#"{"user_id":"t","bogus":1}"#, "bogus"),
            (r#"{"user_id":"t","user_id":"t"}"#, "user_id"),
            (r#"{"user_id":"t","files":{"a":"1","a":"2"}}"#, "files.a"),
            (r#"{"user_id":"t","env":{"A":"1","B":"","A":"2"}}"#, "env.A"),
            (
                r#"{"user_id":"t","tests":[{"name":"a"},{"name":"b","name":"c"}]}"#,
                "tests[1].name",
            ),
            (r#"{"user_id":"t","code":1}"#, "code"),
            (r#"{"user_id":"t","limits":{"wall":1}}"#, "limits.wall"),
            (
                r#"{"user_id":"t","limits":{"wall_ms":-1}}"#,
                "limits.wall_ms",
            ),
            (r#"{"user_id":"t","args":["a",1]}"#, "args[1]"),
            (r#"{"user_id":"t","tests":5}"#, "tests"),
            (r#"{"user_id":"t","submission_id":"x"}"#, "submission_id"),
            (r#"{"resume":"x"}"#, "resume"),
            (r#"{"cancel":5}"#, "cancel"),
        ] {
            assert_eq!(refused_field(text), field, "{text}");
        }
    }

    #[test]
    fn a_refusal_speaks_of_json_not_of_rust() {
        for (text, reason) in [
            (
                r#"{"resume":"x"}"#,
                "is not a UUID: invalid character: found `x` at 0",
            ),
            (
                r#"{"user_id":"t","args":"x"}"#,
                "must be a list, not string \"x\"",
            ),
            (
                r#"{"user_id":"t","env":[]}"#,
                "must be an object, not sequence",
            ),
            (
                r#"{"user_id":"t","limits":5}"#,
                "must be an object, not integer 5",
            ),
            (
                r#"{"user_id":"t","limits":{"wall_ms":1.5}}"#,
                "must be a whole number, 0 or more, not floating point 1.5",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().error.reason, reason, "{text}");
        }
    }

    #[test]
    fn a_hundred_thousand_brackets_are_refused() {
        for bracket in ["[", "{\"a\":"] {
            let deep = format!("{{\"user_id\":\"t\",\"code\":{}", bracket.repeat(100_000));
            let refused = parse(&deep).unwrap_err();
            assert!(
                refused.error.reason.contains("recursion limit"),
                "{refused:?}"
            );
        }
        let fine = format!("{{\"a\":{}{}}}", "[".repeat(50), "]".repeat(50));
        assert_eq!(refused_field(&fine), "a");
    }

    #[test]
    fn a_refusal_keeps_the_ids_it_could_read() {
        let text = format!(r#"{{"submission_id":"{ID}","user_id":"ann","bogus":1}}"#);
        let refused = parse(&text).unwrap_err();
        let frame: serde_json::Value =
            serde_json::from_str(&super::text(&invalid(&refused))).unwrap();
        assert_eq!(frame["submission_id"], ID);
        assert_eq!(frame["namespace"], "user-ann");
        assert_eq!(frame["status"], "invalid");
        assert_eq!(frame["error"]["code"], "field_invalid");
    }

    #[test]
    fn a_reply_begins_with_status_and_namespace() {
        let mut outcome = Outcome::new(Status::TestsFailed);
        outcome.namespace = Some("user-test".to_owned());
        outcome.exit_code = Some(1);
        assert_eq!(
            text(&outcome),
            r#"{"status":"tests_failed","namespace":"user-test","exit_code":1}"#
        );
    }

    fn record(event: Event) -> Record {
        Record {
            position: 9,
            time: "2026-01-02T03:04:05Z".parse().unwrap(),
            user_id: "t".parse().unwrap(),
            submission_id: Some(ID.parse().unwrap()),
            repl_id: "t-prod".parse().unwrap(),
            seq: Some(3),
            event,
        }
    }

    #[test]
    fn event_frames_are_flat() {
        let head = format!(r#""submission_id":"{ID}","seq":3,"time":"2026-01-02T03:04:05Z""#);
        let step = record(Event::Step {
            name: Step::Test,
            state: StepState::Passed,
            duration_ms: Some(7),
        });
        assert_eq!(
            text(&event_frame(&step).unwrap()),
            format!(r#"{{"event":"step",{head},"name":"test","state":"passed","duration_ms":7}}"#)
        );
        let output = record(Event::Output {
            stream: OutputStream::Stderr,
            data: "a\n".to_owned(),
            run: 0,
            run_seq: 1,
        });
        assert_eq!(
            text(&event_frame(&output).unwrap()),
            format!(r#"{{"event":"output",{head},"stream":"stderr","data":"a\n"}}"#)
        );
        let queued = record(Event::Queued);
        assert_eq!(
            text(&event_frame(&queued).unwrap()),
            format!(r#"{{"event":"queued",{head}}}"#)
        );
        let test = TestResult::new("a", TestOutcome::Passed, 1);
        let test = record(Event::Test(test));
        assert_eq!(
            text(&event_frame(&test).unwrap()),
            format!(
                r#"{{"event":"test",{head},"name":"a","passed":true,"outcome":"passed","duration_ms":1}}"#
            )
        );
    }

    #[test]
    fn the_reply_carries_its_place_in_the_stream() {
        let outcome = reply(record(Event::Reply(Box::new(Outcome::new(
            Status::Deployed,
        )))))
        .unwrap();
        assert_eq!(outcome.seq, Some(3));
        assert!(reply(record(Event::Queued)).is_none());
    }
}
