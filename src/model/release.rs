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

/// Releases remembered of one repl; older ones can no longer be rolled back to.
pub const MAX_RELEASES: usize = 50;

/// Which of a repl's releases, from the oldest to the newest, is forgotten first: the oldest that never served,
/// and without one the oldest that did. Never the one that serves nor one that is being made (`None`), nor
/// the newest, whose number must not be given out again.
pub fn forgotten_first(releases: &[Option<ReleaseState>]) -> Option<usize> {
    let older = &releases[..releases.len().saturating_sub(1)];
    let failed = |state: &Option<ReleaseState>| *state == Some(ReleaseState::Failed);
    let served = |state: &Option<ReleaseState>| {
        matches!(
            state,
            Some(ReleaseState::Superseded | ReleaseState::Stopped)
        )
    };
    let first = older.iter().position(failed);
    first.or_else(|| older.iter().position(served))
}

/// Whether a release is to listen on its port before it takes over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serves {
    /// It has to: its submission said so, or it listened while it was tested.
    Yes,
    /// It need not: its submission said that it is a worker.
    No,
    /// Nothing was said, and nothing listened while it was tested.
    #[default]
    Unknown,
}

impl Serves {
    /// From what the submission says and what its test run showed.
    pub fn of(declared: Option<bool>, listened: bool) -> Self {
        match (declared, listened) {
            (Some(true), _) | (None, true) => Serves::Yes,
            (Some(false), _) => Serves::No,
            (None, false) => Serves::Unknown,
        }
    }

    /// The word in variables.
    pub fn as_str(self) -> &'static str {
        match self {
            Serves::Yes => "yes",
            Serves::No => "no",
            Serves::Unknown => "unknown",
        }
    }
}

impl std::str::FromStr for Serves {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Serves::Yes, Serves::No, Serves::Unknown];
        let found = known.into_iter().find(|serves| serves.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is not yes, no or unknown"))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_served_is_forgotten_before_what_did() {
        use ReleaseState::{Current, Failed, Stopped, Superseded};
        let first = |states: &[Option<ReleaseState>]| forgotten_first(states);
        assert_eq!(
            first(&[Some(Superseded), Some(Failed), Some(Current)]),
            Some(1)
        );
        assert_eq!(
            first(&[Some(Current), Some(Stopped), Some(Superseded), None]),
            Some(1)
        );
        assert_eq!(first(&[None, Some(Current), Some(Failed)]), None);
        assert_eq!(first(&[]), None);
    }

    #[test]
    fn what_is_declared_counts_more_than_what_was_seen() {
        assert_eq!(Serves::of(Some(false), true), Serves::No);
        assert_eq!(Serves::of(Some(true), false), Serves::Yes);
        assert_eq!(Serves::of(None, true), Serves::Yes);
        assert_eq!(Serves::of(None, false), Serves::Unknown);
        for serves in [Serves::Yes, Serves::No, Serves::Unknown] {
            assert_eq!(serves.as_str().parse::<Serves>(), Ok(serves));
        }
    }
}
