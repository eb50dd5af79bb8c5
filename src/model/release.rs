//! Repls and their releases.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Autoscale, Domain, ReplId, SubmissionId, UserId};

/// Where a release stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseState {
    /// It serves.
    Current,
    /// A later one serves.
    Superseded,
    /// It never came up.
    Failed,
    /// Its repl was stopped.
    Stopped,
}

/// One deployed version of a repl: immutable, numbered from 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Its number within the repl.
    pub release: u64,
    /// The submission whose tests passed.
    pub submission_id: SubmissionId,
    /// When it was made.
    pub time: Timestamp,
    /// Where it stands.
    pub state: ReleaseState,
}

/// What a repl's program is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ReplState {
    /// Coming up.
    Starting,
    /// Serving.
    Running,
    /// The program ended with this code; its output is shown in its place.
    Exited(i32),
    /// It failed and is started again after a pause; the last error says how.
    Crashed,
    /// Stopped by its user.
    Stopped,
    /// Stopped because nobody used it; the next request starts it again.
    Idle,
}

impl ReplState {
    /// Whether something of it runs or is to.
    pub fn is_on(self) -> bool {
        !matches!(self, ReplState::Stopped | ReplState::Idle)
    }
}

impl From<ReplState> for String {
    fn from(state: ReplState) -> String {
        match state {
            ReplState::Starting => "starting".to_owned(),
            ReplState::Running => "running".to_owned(),
            ReplState::Exited(code) => format!("exited({code})"),
            ReplState::Crashed => "crashed".to_owned(),
            ReplState::Stopped => "stopped".to_owned(),
            ReplState::Idle => "idle".to_owned(),
        }
    }
}

impl TryFrom<String> for ReplState {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let exited = || {
            let code = text.strip_prefix("exited(")?.strip_suffix(')')?;
            code.parse().ok().map(ReplState::Exited)
        };
        match text.as_str() {
            "starting" => Ok(ReplState::Starting),
            "running" => Ok(ReplState::Running),
            "crashed" => Ok(ReplState::Crashed),
            "stopped" => Ok(ReplState::Stopped),
            "idle" => Ok(ReplState::Idle),
            _ => exited().ok_or_else(|| format!("{text:?} is not a repl state")),
        }
    }
}

/// A repl as `GET /repls` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplStatus {
    /// Which.
    #[serde(rename = "replId")]
    pub repl_id: ReplId,
    /// Whose.
    #[serde(rename = "userId")]
    pub user_id: UserId,
    /// What its program is doing.
    pub state: ReplState,
    /// Replicas that serve.
    pub ready: u32,
    /// Replicas wanted.
    pub replicas: u32,
    /// Between which numbers the cluster chooses how many are wanted, when it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<Autoscale>,
    /// Times the program was started again after it failed.
    pub restarts: u32,
    /// Where it is served.
    pub url: String,
    /// Host names of its own under which it is served, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<Domain>,
    /// The current release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub release: Option<u64>,
    /// Why it is in its state, where nothing went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// The last thing that went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Since when it has been in this state.
    pub since: Timestamp,
}

/// Why an idle repl does not run.
pub fn idle_cause(since: Timestamp) -> String {
    let since = since.strftime("%Y-%m-%d %H:%M:%S UTC");
    format!("stopped: idle since {since}; the next request starts it again")
}
