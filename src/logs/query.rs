//! What can be asked, checked, and what is answered.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::elasticsearch::ElasticsearchError;
use super::record::{self, Level};
use crate::journal::JournalError;
use crate::model::{FieldError, Reason, Record, ReplId, Status, Step, SubmissionId, UserId};

/// Records of a page unless asked otherwise, and at most.
pub(super) const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1_000;
/// Submissions of a page at most.
const MAX_SUBMISSIONS: usize = 500;
/// Longest `q`: a sentence, not a document.
const MAX_WORDS_BYTES: usize = 1 << 10;

const STEPS: [Step; 8] = [
    Step::Receive,
    Step::Sandbox,
    Step::Install,
    Step::Compile,
    Step::Test,
    Step::Publish,
    Step::Deploy,
    Step::Ready,
];
const STATUSES: [Status; 8] = [
    Status::Deployed,
    Status::TestsPassed,
    Status::TestsFailed,
    Status::DeployFailed,
    Status::Superseded,
    Status::Cancelled,
    Status::Invalid,
    Status::Unavailable,
];

/// What to look for in the logs. Everything that is given must match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogQuery {
    /// Of this user; `None` is everybody's, for admins only.
    pub users: Option<UserId>,
    /// Of this repl.
    pub repl_id: Option<ReplId>,
    /// Of this submission.
    pub submission_id: Option<SubmissionId>,
    /// Of this step.
    pub step: Option<String>,
    /// Of exactly this level: `info`, `warn`, `error`.
    pub level: Option<String>,
    /// With all of these words; `"quoted words"` stand together, `word*` begins like this.
    pub q: Option<String>,
    /// Not older than this.
    pub since: Option<Timestamp>,
    /// Not newer than this.
    pub until: Option<Timestamp>,
    /// At most this many, up to 1,000.
    pub limit: usize,
    /// After this place; without it the newest ones.
    pub after: Option<String>,
    /// Who asks, and waits for their own searches only; `None`: an admin.
    #[serde(default)]
    pub asker: Option<UserId>,
}

impl Default for LogQuery {
    fn default() -> Self {
        Self {
            users: None,
            repl_id: None,
            submission_id: None,
            step: None,
            level: None,
            q: None,
            since: None,
            until: None,
            limit: DEFAULT_LIMIT,
            after: None,
            asker: None,
        }
    }
}

/// One record found.
#[derive(Debug, Clone, PartialEq)]
pub struct LogRecord {
    /// The record as Elastic Common Schema.
    pub fields: Map<String, Value>,
    /// Its place: what `after` takes to go on behind it.
    pub cursor: String,
}

/// Records found, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub struct LogPage {
    /// They.
    pub records: Vec<LogRecord>,
    /// What `after` takes to see what comes later, now or in the future. Always there.
    pub next: Option<String>,
}

/// Which submissions to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubmissionQuery {
    /// Of this user; `None` is everybody's, for admins only.
    pub users: Option<UserId>,
    /// Of this repl.
    pub repl_id: Option<ReplId>,
    /// With this status; `running` is every one without a reply.
    pub status: Option<String>,
    /// At most this many, up to 500.
    pub limit: usize,
    /// Older than this place.
    pub before: Option<String>,
    /// Who asks; `None`: an admin.
    pub asker: Option<UserId>,
}

/// One line of the list of submissions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubmissionSummary {
    /// Which.
    pub submission_id: SubmissionId,
    /// Whose.
    pub user_id: UserId,
    /// Where it goes.
    pub repl_id: ReplId,
    /// Its language's name.
    pub language: String,
    /// Absent while it is under way.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<Status>,
    /// How the program failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<Reason>,
    /// The release's number.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub release: Option<u64>,
    /// Where the release is served.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub url: Option<String>,
    /// When it was received.
    pub time: Timestamp,
    /// Milliseconds from receipt to reply.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub duration_ms: Option<u64>,
}

/// Submissions, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubmissionPage {
    /// They.
    pub submissions: Vec<SubmissionSummary>,
    /// What `before` takes to see older ones; absent when there are none.
    pub next: Option<String>,
}

/// Why a search has no answer.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// A field of the query is wrong.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// It took too long.
    #[error(
        "the search took longer than {seconds} s and was stopped; narrow it to a user, a repl, a submission or a time"
    )]
    Slow {
        /// The bound.
        seconds: u64,
    },
    /// Too many searches of the same user wait.
    #[error("too many of your searches are under way already")]
    Busy,
    /// The index file failed.
    #[error(
        "the search index failed: {0}; restart the server, or delete search.sqlite: it is rebuilt from the journal"
    )]
    Database(#[from] rusqlite::Error),
    /// Elasticsearch failed.
    #[error(transparent)]
    Elasticsearch(#[from] ElasticsearchError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The server is stopping, or a search died.
    #[error("the search was broken off because the server is stopping; try again")]
    Closed,
}

/// Words that stand together; the last may be only a beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Phrase {
    words: Vec<String>,
    open_end: bool,
}

/// A log query that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) user: Option<UserId>,
    pub(super) repl: Option<ReplId>,
    pub(super) submission: Option<SubmissionId>,
    pub(super) step: Option<&'static str>,
    pub(super) level: Option<&'static str>,
    phrases: Vec<Phrase>,
    pub(super) since: Option<Timestamp>,
    pub(super) until: Option<Timestamp>,
    pub(super) limit: usize,
    pub(super) after: Option<u64>,
}

impl TryFrom<LogQuery> for Filter {
    type Error = FieldError;

    fn try_from(query: LogQuery) -> Result<Self, FieldError> {
        let level = |level: &Level| level.as_str();
        Ok(Self {
            user: query.users,
            repl: query.repl_id,
            submission: query.submission_id,
            step: one_of("step", query.step, STEPS.map(Step::as_str))?,
            level: one_of("level", query.level, Level::ALL.each_ref().map(level))?,
            phrases: query
                .q
                .map(|q| phrases(&q))
                .transpose()?
                .unwrap_or_default(),
            since: query.since,
            until: query.until,
            limit: query.limit.clamp(1, MAX_LIMIT),
            after: cursor("after", query.after)?,
        })
    }
}

impl Filter {
    /// The phrases in the full-text index's language. Only letters and digits of the query are in
    /// it, inside quotes: nothing a client sends is syntax.
    pub(super) fn full_text(&self) -> Option<String> {
        let quoted = self.phrases.iter().map(|phrase| {
            let star = if phrase.open_end { "*" } else { "" };
            format!("\"{}\"{star}", phrase.words.join(" "))
        });
        (!self.phrases.is_empty()).then(|| quoted.collect::<Vec<_>>().join(" "))
    }

    /// Words that stand together, and whether the last is only a beginning.
    pub(super) fn phrases(&self) -> impl Iterator<Item = (&[String], bool)> {
        let phrases = self.phrases.iter();
        phrases.map(|phrase| (phrase.words.as_slice(), phrase.open_end))
    }

    /// The record's public shape, when it matches.
    pub(super) fn accept(&self, record: &Record) -> Option<Map<String, Value>> {
        let cheap = self
            .user
            .as_ref()
            .is_none_or(|user| record.user_id == *user)
            && self
                .repl
                .as_ref()
                .is_none_or(|repl| record.repl_id == *repl)
            && self
                .submission
                .is_none_or(|id| record.submission_id == Some(id))
            && self.since.is_none_or(|since| record.happened() >= since)
            && self.until.is_none_or(|until| record.happened() <= until)
            && self
                .step
                .is_none_or(|step| record::step(record).is_some_and(|s| s.as_str() == step))
            && self
                .level
                .is_none_or(|level| record::level(record).as_str() == level);
        if !cheap {
            return None;
        }
        let fields = record::ecs(record);
        let words = match self.phrases.is_empty() {
            true => Vec::new(),
            false => words(&searchable(&fields)),
        };
        let found = |phrase: &Phrase| phrase.is_in(&words);
        self.phrases.iter().all(found).then_some(fields)
    }
}

impl Phrase {
    fn is_in(&self, text: &[String]) -> bool {
        let same = |(index, (have, want)): (usize, (&String, &String))| {
            let last = index + 1 == self.words.len();
            if last && self.open_end {
                have.starts_with(want.as_str())
            } else {
                have == want
            }
        };
        text.windows(self.words.len())
            .any(|window| window.iter().zip(&self.words).enumerate().all(same))
    }
}

/// A submission query that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SubmissionFilter {
    pub(super) user: Option<UserId>,
    pub(super) repl: Option<ReplId>,
    /// `""` is no status yet.
    pub(super) status: Option<&'static str>,
    pub(super) limit: usize,
    pub(super) before: Option<u64>,
}

impl TryFrom<SubmissionQuery> for SubmissionFilter {
    type Error = FieldError;

    fn try_from(query: SubmissionQuery) -> Result<Self, FieldError> {
        let status = match query.status.as_deref() {
            Some("running") => Some(""),
            _ => one_of("status", query.status, STATUSES.map(Status::as_str))?,
        };
        Ok(Self {
            user: query.users,
            repl: query.repl_id,
            status,
            limit: query.limit.clamp(1, MAX_SUBMISSIONS),
            before: cursor("before", query.before)?,
        })
    }
}

fn one_of<const N: usize>(
    field: &str,
    value: Option<String>,
    known: [&'static str; N],
) -> Result<Option<&'static str>, FieldError> {
    let Some(value) = value else { return Ok(None) };
    match known.iter().find(|known| **known == value) {
        Some(found) => Ok(Some(found)),
        None => Err(FieldError::new(
            field,
            format!("must be one of {}", known.join(", ")),
        )),
    }
}

/// A place in the journal. Positions stay far below 2^63, SQLite's largest number.
fn cursor(field: &str, value: Option<String>) -> Result<Option<u64>, FieldError> {
    let Some(value) = value else { return Ok(None) };
    match value.parse::<u64>() {
        Ok(position) if position <= i64::MAX as u64 => Ok(Some(position)),
        _ => Err(FieldError::new(
            field,
            "must be a `next` of an earlier answer",
        )),
    }
}

/// The text in which words are looked for.
pub(super) fn searchable(fields: &Map<String, Value>) -> String {
    let text = |name| fields.get(name).and_then(Value::as_str);
    let message = text("message").unwrap_or_default();
    match text("error.message") {
        Some(error) => format!("{message}\n{error}"),
        None => message.to_owned(),
    }
}

/// The searchable text as the words it is made of, one space between two. An index that splits at
/// spaces alone finds in it what [`Filter::accept`] finds in the record.
pub(super) fn spoken(fields: &Map<String, Value>) -> String {
    words(&searchable(fields)).join(" ")
}

/// Runs of letters and digits in lower case, as the full-text index splits text.
fn words(text: &str) -> Vec<String> {
    let split = text.split(|c: char| !c.is_alphanumeric());
    split
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect()
}

fn phrases(q: &str) -> Result<Vec<Phrase>, FieldError> {
    if q.len() > MAX_WORDS_BYTES {
        return Err(FieldError::new(
            "q",
            format!("is longer than {MAX_WORDS_BYTES} bytes"),
        ));
    }
    let mut phrases = Vec::new();
    let mut add = |text: &str| {
        let words = words(text);
        if !words.is_empty() {
            let open_end = text.ends_with('*');
            phrases.push(Phrase { words, open_end });
        }
    };
    // Every second piece is inside quotes; a quote that is not closed reaches to the end.
    for (index, piece) in q.split('"').enumerate() {
        if index % 2 == 1 {
            add(piece);
        } else {
            piece.split_whitespace().for_each(&mut add);
        }
    }
    if phrases.is_empty() && !q.trim().is_empty() {
        return Err(FieldError::new("q", "has no letter or digit to look for"));
    }
    Ok(phrases)
}
