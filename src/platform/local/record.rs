//! What is remembered of a repl and its releases. Pure: reading and storing it is done elsewhere.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};

use crate::model::{
    Domain, LatestOrder, MAX_RELEASES, Release, ReleaseState, SecretText, Serves, SubmissionId,
    UserId, Variables, forgotten_first,
};

/// A repl as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Whose.
    pub user_id: UserId,
    /// Whether it should be serving.
    pub wanted: bool,
    /// Since when nobody used it, when it was stopped for that: it is wanted still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Timestamp>,
    /// Oldest first.
    pub releases: Vec<Stored>,
    /// Its current files, when they were started as they are, for as long as no release took their
    /// place. Its number is 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Stored>,
    /// What its next release begins with.
    #[serde(default)]
    pub given: Given,
    /// Since when it has been stopped, or known.
    pub since: Timestamp,
    /// An earlier order than this is not carried out any more.
    #[serde(default, skip_serializing_if = "LatestOrder::is_none")]
    pub order: LatestOrder,
}

/// Variables and domains as they are stored: in a file that only the server reads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    env: BTreeMap<String, String>,
    #[serde(serialize_with = "exposed")]
    secrets: BTreeMap<String, SecretText>,
    /// Host names of its own.
    #[serde(default)]
    pub domains: Vec<Domain>,
}

fn exposed<S: Serializer>(
    secrets: &BTreeMap<String, SecretText>,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_map(secrets.iter().map(|(name, value)| (name, value.expose())))
}

impl Given {
    /// The variables.
    pub fn variables(&self) -> Variables {
        Variables {
            env: self.env.clone(),
            secrets: self.secrets.clone(),
        }
    }

    /// The same with these variables.
    pub fn with(self, Variables { env, secrets }: Variables) -> Self {
        Self {
            env,
            secrets,
            ..self
        }
    }
}

/// A release and what it takes to start it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stored {
    /// What is told of it.
    #[serde(flatten)]
    pub release: Release,
    /// Command, entrypoint and arguments.
    pub argv: Vec<String>,
    /// The program's own variables.
    pub env: BTreeMap<String, String>,
    /// The repl's variables and domains that it runs with.
    #[serde(default)]
    pub given: Given,
    /// Whether it has a database.
    pub database: bool,
    /// Whether it has to listen before it serves; `None`: an earlier version's release, or a workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<Serves>,
}

impl Record {
    /// Of a name that was just claimed.
    pub fn new(user_id: UserId) -> Self {
        Self {
            user_id,
            wanted: false,
            idle: None,
            releases: Vec::new(),
            workspace: None,
            given: Given::default(),
            since: Timestamp::now(),
            order: LatestOrder::default(),
        }
    }

    /// The release or the workspace that runs, or should.
    pub fn current(&self) -> Option<&Stored> {
        let current = |stored: &&Stored| stored.release.state == ReleaseState::Current;
        let mut all = self.workspace.iter().chain(&self.releases);
        all.find(current)
    }

    /// Whether anything of it ever ran or was to run.
    pub fn is_used(&self) -> bool {
        self.workspace.is_some() || !self.releases.is_empty()
    }

    /// The release that this submission became, unless it never came up.
    pub fn of(&self, submission: SubmissionId) -> Option<&Stored> {
        self.releases.iter().find(|stored| {
            stored.release.submission_id == submission
                && stored.release.state != ReleaseState::Failed
        })
    }

    /// The highest number given out.
    pub fn last_number(&self) -> u64 {
        let numbers = self.releases.iter().map(|stored| stored.release.release);
        numbers.max().unwrap_or(0)
    }

    /// The release to go back to: the one of this number, or the last that served before the current.
    pub fn earlier(&self, number: Option<u64>) -> Option<&Stored> {
        let current = self.current().filter(|stored| !stored.is_workspace());
        let before = current.map_or(u64::MAX, |s| s.release.release);
        let mut served = self
            .releases
            .iter()
            .rev()
            .filter(|stored| stored.release.state != ReleaseState::Failed);
        served.find(|stored| match number {
            Some(number) => stored.release.release == number,
            None => stored.release.release < before,
        })
    }

    /// Whether it should be serving now.
    pub fn runs(&self) -> bool {
        self.wanted && self.idle.is_none()
    }

    /// Nobody has used it since then, and so it does not run any more.
    pub fn rests(&mut self, unused_since: Timestamp) {
        self.idle = Some(unused_since);
        self.since = Timestamp::now();
    }

    /// This release serves from now on.
    pub fn serves(&mut self, mut stored: Stored) {
        self.wanted = true;
        self.idle = None;
        self.since = Timestamp::now();
        self.end_current(ReleaseState::Superseded);
        let number = stored.release.release;
        stored.release.state = ReleaseState::Current;
        self.given = stored.given.clone();
        match self.numbered(number) {
            Some(known) => *known = stored,
            None => self.releases.push(stored),
        }
    }

    /// The current files run from now on, or a release that is the current one does again.
    pub fn opens(&mut self, stored: Stored) {
        self.wanted = true;
        self.idle = None;
        self.since = Timestamp::now();
        self.given = stored.given.clone();
        if stored.is_workspace() {
            self.workspace = Some(stored);
        }
    }

    /// Its variables and host names are these from now on, those of what runs or is idle, too.
    pub fn give(&mut self, given: Given) {
        let mut all = self.workspace.iter_mut().chain(&mut self.releases);
        let current = all.find(|stored| stored.release.state == ReleaseState::Current);
        if let Some(current) = current {
            current.given.clone_from(&given);
        }
        self.given = given;
    }

    /// Its host names are these from now on, those of what runs, too.
    pub fn name(&mut self, domains: Vec<Domain>) {
        let mut all = self.workspace.iter_mut().chain(&mut self.releases);
        let current = all.find(|stored| stored.release.state == ReleaseState::Current);
        if let Some(current) = current {
            current.given.domains.clone_from(&domains);
        }
        self.given.domains = domains;
    }

    /// This release did not come up. A rollback that failed leaves it as good as it was.
    pub fn failed(&mut self, mut stored: Stored) {
        if self.numbered(stored.release.release).is_none() {
            stored.release.state = ReleaseState::Failed;
            self.releases.push(stored);
        }
    }

    /// Nothing serves any more.
    pub fn stopped(&mut self) {
        self.wanted = false;
        self.idle = None;
        self.since = Timestamp::now();
        self.end_current(ReleaseState::Stopped);
    }

    /// Lets go of releases beyond those that are remembered: see [`forgotten_first`].
    pub fn forget_old(&mut self) -> Vec<SubmissionId> {
        let mut forgotten = Vec::new();
        while self.releases.len() > MAX_RELEASES {
            let states: Vec<_> = self
                .releases
                .iter()
                .map(|s| Some(s.release.state))
                .collect();
            let Some(at) = forgotten_first(&states) else {
                break;
            };
            forgotten.push(self.releases.remove(at).release.submission_id);
        }
        forgotten
    }

    fn numbered(&mut self, number: u64) -> Option<&mut Stored> {
        let mut releases = self.releases.iter_mut();
        releases.find(|stored| stored.release.release == number)
    }

    fn end_current(&mut self, state: ReleaseState) {
        for stored in self.releases.iter_mut().chain(&mut self.workspace) {
            if stored.release.state == ReleaseState::Current {
                stored.release.state = state;
            }
        }
    }
}

impl Stored {
    /// The current files, run by this command.
    pub fn workspace(argv: Vec<String>, given: Given) -> Self {
        Self {
            release: Release {
                release: 0,
                submission_id: SubmissionId::new(),
                time: Timestamp::now(),
                state: ReleaseState::Current,
            },
            argv,
            env: BTreeMap::new(),
            given,
            database: false,
            serves: None,
        }
    }

    /// What its program gets: its own variables go before its repl's.
    pub fn variables(&self) -> BTreeMap<String, String> {
        let given = self.given.variables();
        let given = given.all();
        let mut all: BTreeMap<String, String> = given
            .map(|(name, value)| (name.clone(), value.to_owned()))
            .collect();
        all.extend(self.env.clone());
        all
    }

    /// Whether it is the current files, and no release.
    pub fn is_workspace(&self) -> bool {
        self.release.release == 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn next(record: &Record) -> Stored {
        Stored {
            release: Release {
                release: record.last_number() + 1,
                submission_id: SubmissionId::new(),
                time: Timestamp::now(),
                state: ReleaseState::Current,
            },
            argv: Vec::new(),
            env: BTreeMap::new(),
            given: record.given.clone(),
            database: false,
            serves: None,
        }
    }

    fn record(served: usize, failed: usize) -> Record {
        let mut record = Record::new("t".parse().unwrap());
        for _ in 0..served {
            record.serves(next(&record));
            record.forget_old();
        }
        for _ in 0..failed {
            record.failed(next(&record));
            record.forget_old();
        }
        record
    }

    #[test]
    fn failures_push_out_neither_what_serves_nor_what_served() {
        let mut record = record(2, 200);
        assert_eq!(record.releases.len(), MAX_RELEASES);
        assert_eq!(record.current().unwrap().release.release, 2);
        assert_eq!(record.last_number(), 202);
        let first = record.earlier(None).unwrap().clone();
        assert_eq!(first.release.release, 1);
        record.serves(first);
        assert!(record.forget_old().is_empty());
        assert_eq!(record.current().unwrap().release.release, 1);
    }

    #[test]
    fn the_oldest_is_forgotten_and_its_number_not_given_out_again() {
        let mut full = record(MAX_RELEASES, 0);
        let oldest = full.releases[0].release.submission_id;
        full.serves(next(&full));
        assert_eq!(full.forget_old(), [oldest]);
        // All have served: the newest failure stays for now, for its number.
        full.failed(next(&full));
        full.forget_old();
        assert_eq!(full.last_number(), MAX_RELEASES as u64 + 2);
    }

    #[test]
    fn a_workspace_is_no_release_to_go_back_to_and_gives_way_to_one() {
        let mut record = record(2, 0);
        record.stopped();
        record.opens(Stored::workspace(Vec::new(), Given::default()));
        assert!(record.current().unwrap().is_workspace());
        assert_eq!(record.earlier(None).unwrap().release.release, 2);
        assert!(record.earlier(Some(0)).is_none());
        record.serves(next(&record));
        assert_eq!(record.current().unwrap().release.release, 3);
        record.stopped();
        assert!(record.current().is_none());
    }

    #[test]
    fn what_is_idle_stays_the_current_one_and_comes_back_as_such() {
        let mut record = record(2, 0);
        assert!(record.runs());
        record.rests(Timestamp::UNIX_EPOCH);
        assert!(!record.runs() && record.wanted);
        let current = record.current().unwrap().clone();
        assert_eq!(current.release.release, 2);
        assert_eq!(record.earlier(None).unwrap().release.release, 1);
        record.opens(current);
        assert!(record.runs() && record.workspace.is_none());
        record.rests(Timestamp::UNIX_EPOCH);
        record.stopped();
        assert!(record.idle.is_none() && record.current().is_none());
    }

    #[test]
    fn variables_are_a_releases_and_stored_whole() {
        let given = |value: &str| Given {
            env: BTreeMap::from([("A".to_owned(), value.to_owned())]),
            secrets: BTreeMap::from([("S".to_owned(), SecretText::from(value.to_owned()))]),
            domains: vec![format!("{value}.example").parse().unwrap()],
        };
        let mut record = record(1, 0);
        let changed = Stored {
            given: given("one"),
            ..record.current().unwrap().clone()
        };
        record.serves(changed);
        record.serves(Stored {
            given: given("two"),
            ..next(&record)
        });
        let stored = serde_json::to_vec(&record).unwrap();
        let mut record: Record = serde_json::from_slice(&stored).unwrap();
        assert_eq!(record.given, given("two"));
        assert_eq!(record.earlier(None).unwrap().given, given("one"));
        record.serves(record.earlier(None).unwrap().clone());
        assert_eq!((record.given, record.releases.len()), (given("one"), 2));
    }

    #[test]
    fn a_failed_release_is_not_gone_back_to() {
        let mut record = record(2, 1);
        assert_eq!(record.earlier(None).unwrap().release.release, 1);
        assert!(record.earlier(Some(3)).is_none());
        let current = record.current().unwrap().clone();
        record.failed(current);
        assert_eq!(record.current().unwrap().release.release, 2);
        record.stopped();
        assert!(record.current().is_none() && !record.wanted);
        assert_eq!(record.earlier(None).unwrap().release.release, 2);
    }
}
