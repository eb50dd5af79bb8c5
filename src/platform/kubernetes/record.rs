//! A repl's record: whose it is and every release it had. One ConfigMap per repl in the server's own
//! namespace, so that state lives in the cluster and every replica of the server sees the same.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::core::DynamicObject;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, WATCH_LAG, Watched};
use super::cluster::{Cluster, Failure, Kind, Manifest};
use super::labels::{GANTRY, MANAGED_BY, REPL, USER};
use crate::model::{
    Domain, LatestOrder, MAX_KNOWN_DELETED, MAX_RELEASES, Order, Problem, Release, ReleaseState,
    ReplId, Scale, Serves, SubmissionId, UserId, forgotten_first, is_known_after,
};

/// Most bytes of a record: a ConfigMap may have 1 MiB.
const MAX_BYTES: usize = 900 << 10;

/// Tries to change a record that others change at the same time.
const MAX_TRIES: u32 = 20;

/// Marks the ConfigMaps that are records.
const RECORDS: &str = "app.kubernetes.io/managed-by=gantry,gantry.dev/record=repl";

/// The label that does so, and its value.
const RECORD: &str = "gantry.dev/record";
const OF_REPL: &str = "repl";

/// Its value while the repl is deleted, and only what was asked of it last is kept. No watch shows such a record.
const OF_DELETED: &str = "deleted-repl";

/// Marks these.
const DELETED: &str = "app.kubernetes.io/managed-by=gantry,gantry.dev/record=deleted-repl";

/// Where a release stands, in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredState {
    /// Being made; a server that died meanwhile goes on with it.
    Pending,
    /// It serves.
    Current,
    /// A later one serves.
    Superseded,
    /// It never came up.
    Failed,
    /// Its repl was stopped.
    Stopped,
}

impl StoredState {
    /// For callers; `None`: it is no release yet.
    fn told(self) -> Option<ReleaseState> {
        match self {
            StoredState::Pending => None,
            StoredState::Current => Some(ReleaseState::Current),
            StoredState::Superseded => Some(ReleaseState::Superseded),
            StoredState::Failed => Some(ReleaseState::Failed),
            StoredState::Stopped => Some(ReleaseState::Stopped),
        }
    }
}

/// Which of the variables that a repl was given. Their values are in a Secret of this revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// When they were given: milliseconds of the Unix clock, another one for each time.
    pub revision: i64,
    /// Names of those that are shown.
    pub env: Vec<String>,
    /// Names of those that are not.
    pub secrets: Vec<String>,
}

/// A release as it is stored: all that is needed to make it again, to the byte.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// Its number.
    pub release: u64,
    /// The submission whose tests passed.
    pub submission_id: SubmissionId,
    /// When it was made.
    pub time: Timestamp,
    /// Where it stands.
    pub state: StoredState,
    /// Command, entrypoint and arguments.
    pub argv: Vec<String>,
    /// Names of the program's own variables; values are in a Secret.
    pub env_names: Vec<String>,
    /// The repl's variables that it runs with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<Given>,
    /// Host names of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<Domain>,
    /// Whether it has a database.
    pub database: bool,
    /// Whether it has to listen before it serves; `None`: an earlier version's release, or a workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<Serves>,
    /// SHA-256 of the files that were tested.
    pub code_digest: String,
    /// SHA-256 of the tests that passed.
    pub tests_digest: String,
    /// The image the tests ran in.
    pub image: String,
}

/// Who makes something of a repl serve now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Making {
    /// The turn's name, which no other has.
    pub by: String,
    /// Signs of life since.
    pub beat: u64,
}

/// What is known of a repl.
#[derive(Debug)]
pub enum Look {
    /// Nothing.
    Absent,
    /// Its record.
    Record(Box<Record>),
    /// There is a record that cannot be read: the repl may be anything.
    Damaged,
}

/// A repl's record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Whose it is.
    pub user_id: UserId,
    /// Whether it should be serving.
    pub wanted: bool,
    /// Since when.
    pub since: Timestamp,
    /// Since when nobody used it, when it was stopped for that: it is wanted still, and nothing of it is
    /// there until somebody comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Timestamp>,
    /// Why the last release did not come up, if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Every release, oldest first.
    pub releases: Vec<Stored>,
    /// Its current files, when they were started as they are. Its number is 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Stored>,
    /// The variables that its next release begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<Given>,
    /// The host names that its next release begins with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<Domain>,
    /// How many replicas, when somebody has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// An earlier order than this is not carried out any more.
    #[serde(default, skip_serializing_if = "LatestOrder::is_none")]
    pub order: LatestOrder,
    /// Which server makes something of it serve now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub making: Option<Making>,
}

impl Stored {
    /// The current files, run by this command. The id is this start's.
    pub fn workspace(argv: Vec<String>, image: String) -> Self {
        Self {
            release: 0,
            submission_id: SubmissionId::new(),
            time: Timestamp::now(),
            state: StoredState::Current,
            argv,
            env_names: Vec::new(),
            given: None,
            domains: Vec::new(),
            database: false,
            serves: None,
            code_digest: String::new(),
            tests_digest: String::new(),
            image,
        }
    }

    /// Whether it is the current files, and no release.
    pub fn is_workspace(&self) -> bool {
        self.release == 0
    }
}

impl Record {
    /// Of a name that was just claimed.
    pub fn new(user: &UserId) -> Self {
        Self {
            user_id: user.clone(),
            wanted: false,
            since: Timestamp::now(),
            idle: None,
            last_error: None,
            releases: Vec::new(),
            workspace: None,
            given: None,
            domains: Vec::new(),
            scale: None,
            order: LatestOrder::default(),
            making: None,
        }
    }

    /// The same of a submission; one that was released before stays as it is.
    pub fn is_too_late(&self, submission: SubmissionId, order: &Order) -> Option<Problem> {
        let mut own = self.releases.iter();
        let own = own.find(|stored| stored.submission_id == submission);
        let made =
            |stored: &Stored| !matches!(stored.state, StoredState::Pending | StoredState::Failed);
        match own.is_some_and(made) {
            true => None,
            false => self.order.supersedes(order),
        }
    }

    /// Whether this one of a repl that was deleted tells what still counts for what the user sent before.
    fn counts_for(&self, user: &UserId) -> bool {
        self.user_id == *user && is_known_after(self.since)
    }

    /// The submission is not to be released any more.
    pub fn give_up(&mut self, submission: SubmissionId) {
        for stored in &mut self.releases {
            if stored.submission_id == submission && stored.state == StoredState::Pending {
                stored.state = StoredState::Failed;
            }
        }
    }

    /// The release or the workspace that runs.
    pub fn current(&self) -> Option<&Stored> {
        let mut all = self.workspace.iter().chain(&self.releases);
        all.find(|s| s.state == StoredState::Current)
    }

    /// Whether it should be serving now.
    pub fn runs(&self) -> bool {
        self.wanted && self.idle.is_none()
    }

    /// Nobody has used it since then, and so it does not run any more.
    pub fn rest(&mut self, unused_since: Timestamp) {
        self.idle = Some(unused_since);
        self.since = Timestamp::now();
    }

    /// It runs again; since when nobody had used it.
    pub fn wake(&mut self) -> Option<Timestamp> {
        let idle = self.idle.take()?;
        self.since = Timestamp::now();
        self.last_error = None;
        Some(idle)
    }

    /// What runs, and whether this makes it run.
    pub fn open(&mut self, mut stored: Stored) -> (Stored, bool) {
        if self.wanted
            && let Some(current) = self.current()
        {
            let current = current.clone();
            return (current, self.wake().is_some());
        }
        self.wanted = true;
        self.since = Timestamp::now();
        self.last_error = None;
        stored.given.clone_from(&self.given);
        stored.domains.clone_from(&self.domains);
        self.workspace = Some(stored.clone());
        (stored, true)
    }

    /// Whether anything of it ever ran or was to run.
    pub fn is_used(&self) -> bool {
        let made = |s: &Stored| s.state != StoredState::Pending;
        self.workspace.is_some() || self.releases.iter().any(made)
    }

    /// Whether there is nothing but the name.
    pub fn is_new(&self) -> bool {
        self.workspace.is_none() && self.releases.is_empty()
    }

    /// The release to roll back to: this one, or the last before the current that served.
    pub fn target(&self, release: Option<u64>) -> Option<&Stored> {
        let served = |s: &&Stored| {
            matches!(
                s.state,
                StoredState::Current | StoredState::Superseded | StoredState::Stopped
            )
        };
        let mut served = self.releases.iter().rev().filter(served);
        let current = self.current().filter(|stored| !stored.is_workspace());
        let before = current.map_or(u64::MAX, |s| s.release);
        match release {
            Some(number) => served.find(|s| s.release == number),
            None => served.find(|s| s.release < before),
        }
    }

    /// Gives a submission its number: the one it had, or the next.
    pub fn reserve(&mut self, mut stored: Stored) -> Stored {
        let same = |s: &&mut Stored| s.submission_id == stored.submission_id;
        if let Some(known) = self.releases.iter_mut().find(same) {
            if known.state == StoredState::Failed {
                known.state = StoredState::Pending;
            }
            return known.clone();
        }
        stored.release = self.releases.iter().map(|s| s.release).max().unwrap_or(0) + 1;
        stored.state = StoredState::Pending;
        stored.given.clone_from(&self.given);
        stored.domains.clone_from(&self.domains);
        self.releases.push(stored.clone());
        stored
    }

    /// This release serves now.
    pub fn switch(&mut self, release: u64) {
        for stored in self.releases.iter_mut().chain(&mut self.workspace) {
            if stored.release == release {
                stored.state = StoredState::Current;
            } else if stored.state == StoredState::Current {
                stored.state = StoredState::Superseded;
            }
        }
        if let Some(current) = self.current().cloned() {
            self.given = current.given;
            self.domains = current.domains;
        }
        self.wanted = true;
        self.idle = None;
        self.last_error = None;
        self.since = Timestamp::now();
    }

    /// Its variables are these from now on, those of what runs, too.
    pub fn give(&mut self, given: Option<Given>) {
        let mut all = self.workspace.iter_mut().chain(&mut self.releases);
        if let Some(current) = all.find(|s| s.state == StoredState::Current) {
            current.given.clone_from(&given);
        }
        self.given = given;
    }

    /// Its host names are these from now on, those of what runs, too.
    pub fn name(&mut self, domains: Vec<Domain>) {
        let mut all = self.workspace.iter_mut().chain(&mut self.releases);
        if let Some(current) = all.find(|s| s.state == StoredState::Current) {
            current.domains.clone_from(&domains);
        }
        self.domains = domains;
    }

    /// What it is set to: replicas, variables and host names.
    pub fn settings(&self) -> (Option<Scale>, Option<&Given>, &[Domain]) {
        (self.scale, self.given.as_ref(), &self.domains)
    }

    /// Its settings are those of the other.
    pub fn set(&mut self, to: &Self) {
        self.scale = to.scale;
        self.give(to.given.clone());
        self.name(to.domains.clone());
    }

    /// The release with the settings that it runs with when it is made now: they may have been changed since its
    /// number was given out. A rollback brings back its own.
    pub fn made_now(&self, stored: &Stored) -> Stored {
        let mut all = self.workspace.iter().chain(&self.releases);
        let known = all.find(|known| known.release == stored.release);
        let mut stored = stored.clone();
        if known
            .is_some_and(|known| matches!(known.state, StoredState::Pending | StoredState::Current))
        {
            stored.given.clone_from(&self.given);
            stored.domains.clone_from(&self.domains);
        }
        stored
    }

    /// The revisions of variables that something of it has.
    pub fn revisions(&self) -> BTreeSet<i64> {
        let all = self.workspace.iter().chain(&self.releases);
        let given = all.map(|stored| &stored.given).chain([&self.given]);
        given.flatten().map(|given| given.revision).collect()
    }

    /// This release did not come up. One that served before is as good as it was.
    pub fn fail(&mut self, release: u64, why: &str) {
        let pending = |s: &&mut Stored| s.release == release && s.state == StoredState::Pending;
        if let Some(stored) = self.releases.iter_mut().find(pending) {
            stored.state = StoredState::Failed;
        }
        self.last_error = Some(why.to_owned());
    }

    /// It was stopped.
    pub fn stop(&mut self) {
        self.wanted = false;
        self.idle = None;
        self.since = Timestamp::now();
        for stored in self.releases.iter_mut().chain(&mut self.workspace) {
            if stored.state == StoredState::Current {
                stored.state = StoredState::Stopped;
            }
        }
    }

    /// Every release for callers, newest first. What is being made is none yet.
    pub fn listed(&self) -> Vec<Release> {
        let release = |s: &Stored| {
            Some(Release {
                release: s.release,
                submission_id: s.submission_id,
                time: s.time,
                state: s.state.told()?,
            })
        };
        self.releases.iter().rev().filter_map(release).collect()
    }

    /// The text to store; when it is too long, releases go: see [`forgotten_first`].
    fn text(&mut self) -> serde_json::Result<String> {
        loop {
            let text = serde_json::to_string(self)?;
            if self.releases.len() <= MAX_RELEASES && text.len() <= MAX_BYTES {
                return Ok(text);
            }
            let states: Vec<_> = self.releases.iter().map(|s| s.state.told()).collect();
            let Some(at) = forgotten_first(&states) else {
                return Ok(text);
            };
            self.releases.remove(at);
        }
    }
}

/// Every repl's record.
#[derive(Debug, Clone)]
pub struct Records {
    cluster: Cluster,
    /// The server's own namespace.
    pub namespace: String,
    cache: Cache<ConfigMap>,
}

impl Records {
    /// Watches the records of this namespace until stopped.
    pub fn start(cluster: &Cluster, namespace: &str, stop: &CancellationToken) -> Self {
        let watched = Watched {
            kind: Kind::ConfigMap,
            namespace: Some(namespace.to_owned()),
            labels: RECORDS,
        };
        Self {
            cluster: cluster.clone(),
            namespace: namespace.to_owned(),
            cache: Cache::watch(cluster, watched, None, stop.clone()),
        }
    }

    /// Resolves when every record has been seen.
    pub async fn synced(&self) -> Result<(), Failure> {
        self.cache.synced(Kind::ConfigMap).await
    }

    /// The record as the watch last saw it.
    pub fn known(&self, repl: &ReplId) -> Option<Record> {
        read(self.cache.get(&self.namespace, &name(repl)).as_deref()?)
    }

    /// Every record as the watch last saw it.
    pub fn all(&self) -> Vec<(ReplId, Record)> {
        let objects: Vec<Arc<ConfigMap>> = self.cache.all();
        let one = |object: &Arc<ConfigMap>| {
            let repl = super::cache::label(object.as_ref(), REPL)?.parse().ok()?;
            Some((repl, read(object)?))
        };
        objects.iter().filter_map(one).collect()
    }

    /// The record as it is now.
    pub async fn fresh(&self, repl: &ReplId) -> Result<Option<Record>, Failure> {
        match self.look(repl).await? {
            Look::Absent => Ok(None),
            Look::Record(record) => Ok(Some(*record)),
            Look::Damaged => Err(broken(
                repl,
                &"it is damaged; restore the ConfigMap, or delete it to forget the repl",
            )),
        }
    }

    /// What is there of the record now. One that cannot be read is not taken for one that is not there.
    pub async fn look(&self, repl: &ReplId) -> Result<Look, Failure> {
        let Some(object) = self.read(repl).await? else {
            return Ok(Look::Absent);
        };
        let object = object.try_parse::<ConfigMap>().ok();
        let record = object.and_then(|object| read(&object));
        Ok(record.map_or(Look::Damaged, |record| Look::Record(Box::new(record))))
    }

    /// The record as it is now; of a repl of this user's that was deleted not long ago, what was asked of it last.
    pub async fn fresh_or_deleted(
        &self,
        repl: &ReplId,
        user: &UserId,
    ) -> Result<Option<Record>, Failure> {
        let Some(object) = self.read_any(repl).await? else {
            return Ok(None);
        };
        let record = parsed(repl, &object)?;
        let counts = !is_deleted(&object) || record.counts_for(user);
        Ok(counts.then_some(record))
    }

    /// Removes what is kept of repls that were deleted long ago.
    pub async fn forget_deleted(&self) -> Result<(), Failure> {
        self.forget_deleted_but(DELETED, usize::MAX).await
    }

    /// The same of those with these labels, and of all but the last so many.
    async fn forget_deleted_but(&self, labels: &str, most: usize) -> Result<(), Failure> {
        let own = Some(self.namespace.as_str());
        let found = self.cluster.list(Kind::ConfigMap, own, labels).await?;
        let since = |object: &DynamicObject| {
            let text = object.data["data"]["record"].as_str().unwrap_or_default();
            let record: Option<Record> = serde_json::from_str(text).ok();
            record.map(|record| record.since)
        };
        let mut found: Vec<_> = found.iter().map(|object| (since(object), object)).collect();
        found.sort_by_key(|(since, _)| std::cmp::Reverse(*since));
        for (number, (since, object)) in found.into_iter().enumerate() {
            if number >= most || !since.is_some_and(is_known_after) {
                self.cluster.delete_as_read(Kind::ConfigMap, object).await?;
            }
        }
        Ok(())
    }

    /// Users with a record that cannot be read, as the watch last saw them.
    pub fn damaged_of(&self) -> BTreeSet<String> {
        let objects: Vec<Arc<ConfigMap>> = self.cache.all();
        let damaged = objects.iter().filter(|object| read(object).is_none());
        damaged
            .filter_map(|object| super::cache::label(object.as_ref(), USER).map(str::to_owned))
            .collect()
    }

    /// How many names are the user's, as the watch last saw them.
    pub fn of(&self, user: &UserId) -> usize {
        let objects: Vec<Arc<ConfigMap>> = self.cache.all();
        let owner =
            |object: &Arc<ConfigMap>| super::cache::label(object.as_ref(), USER).map(str::to_owned);
        let own = objects
            .iter()
            .filter(|object| owner(object).as_deref() == Some(user.as_str()));
        own.count()
    }

    /// Removes the record, but for what was asked of the repl last, and waits until the watch shows that it is gone:
    /// one that was `used`, too. What it was; `None`: it is not there, or stays.
    pub async fn forget(&self, repl: &ReplId, used: bool) -> Result<Option<Record>, Failure> {
        let mut tried = 0;
        let (record, name) = loop {
            tried += 1;
            let Some(mut object) = self.read(repl).await? else {
                return Ok(None);
            };
            let record = parsed(repl, &object)?;
            if !used && (record.is_used() || !record.releases.is_empty()) {
                return Ok(None);
            }
            let name = name(repl);
            if record.order.is_none() {
                let uid = object.metadata.uid.unwrap_or_default();
                self.cluster
                    .delete_life(Kind::ConfigMap, &self.namespace, &name, &uid)
                    .await?;
                break (record, name);
            }
            let mut last = Record::new(&record.user_id);
            last.order.clone_from(&record.order);
            fill(repl, &mut object, &mut last, OF_DELETED)?;
            match self.cluster.replace(Kind::ConfigMap, &object).await {
                Ok(_) => break (record, name),
                Err(failure) if failure.is_conflict() && tried < MAX_TRIES => {}
                Err(failure) if failure.is_not_found() => return Ok(None),
                Err(failure) => return Err(failure),
            }
        };
        if !record.order.is_none() {
            let own = format!("{DELETED},{USER}={}", record.user_id);
            if let Err(failure) = self.forget_deleted_but(&own, MAX_KNOWN_DELETED).await {
                tracing::warn!(%repl, %failure, "records of repls that the user has deleted stay until the next clean-up");
            }
        }
        let mut now = self.cache.follow(&self.namespace, &name);
        if timeout(WATCH_LAG, now.wait_for(Option::is_none))
            .await
            .is_err()
        {
            tracing::warn!(%repl, "the watch still shows a record that was removed");
        }
        Ok(Some(record))
    }

    /// Takes the name for the user unless it is taken; says whose it is now.
    pub async fn claim(&self, repl: &ReplId, user: &UserId) -> Result<UserId, Failure> {
        if let Some(known) = self.known(repl) {
            return Ok(known.user_id);
        }
        let mut record = Record::new(user);
        let text = record.text().map_err(|e| broken(repl, &e))?;
        let labels = json!({
            MANAGED_BY: GANTRY, USER: user.as_str(), REPL: repl.as_str(), RECORD: OF_REPL,
        });
        let metadata = json!({ "name": name(repl), "namespace": self.namespace, "labels": labels });
        let body = json!({ "metadata": metadata, "data": { "record": text } });
        match self
            .cluster
            .create(&Manifest::new(Kind::ConfigMap, body))
            .await
        {
            Ok(made) => {
                self.seen(repl, &made).await;
                Ok(user.clone())
            }
            Err(failure) if failure.is_conflict() => self.claim_again(repl, user).await,
            Err(failure) => Err(failure),
        }
    }

    /// The same where a record is there: somebody's, or that of a repl that was deleted.
    async fn claim_again(&self, repl: &ReplId, user: &UserId) -> Result<UserId, Failure> {
        let mut tried = 0;
        loop {
            tried += 1;
            let Some(mut object) = self.read_any(repl).await? else {
                // It went this very moment; whoever needs it now says that it is not there.
                return Ok(user.clone());
            };
            let known = parsed(repl, &object)?;
            if !is_deleted(&object) {
                return Ok(known.user_id);
            }
            let mut record = Record::new(user);
            if known.counts_for(user) {
                record.order = known.order;
            }
            fill(repl, &mut object, &mut record, OF_REPL)?;
            match self.cluster.replace(Kind::ConfigMap, &object).await {
                Ok(made) => {
                    self.seen(repl, &made).await;
                    return Ok(user.clone());
                }
                Err(failure) if failure.is_conflict() && tried < MAX_TRIES => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Changes the record; again from its newest state when another was faster. `None`: there is none.
    ///
    /// What the watch shows is tried first, which saves a request: the API server refuses it when it is not
    /// the newest. That nothing is to be changed is only believed of what was read now.
    pub async fn change<T>(
        &self,
        repl: &ReplId,
        mut change: impl FnMut(&mut Record) -> T,
    ) -> Result<Option<T>, Failure> {
        let mut known = self.cached(repl);
        for tried in 1.. {
            let seen = known.take();
            let is_fresh = seen.is_none();
            let found = match seen {
                Some(object) => Some(object),
                None => self.read(repl).await?,
            };
            let Some(mut object) = found else {
                return Ok(None);
            };
            let before = parsed(repl, &object)?;
            let mut record = before.clone();
            let result = change(&mut record);
            if record == before {
                if is_fresh {
                    return Ok(Some(result));
                }
                continue;
            }
            object.data["data"]["record"] = record.text().map_err(|e| broken(repl, &e))?.into();
            object.metadata.managed_fields = None;
            match self.cluster.replace(Kind::ConfigMap, &object).await {
                Ok(changed) => {
                    self.seen(repl, &changed).await;
                    return Ok(Some(result));
                }
                Err(failure) if failure.is_conflict() && tried < MAX_TRIES => {}
                // The watch still showed one that is gone.
                Err(failure) if failure.is_not_found() && !is_fresh => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(None)
    }

    /// The record's object as it is now, unless the repl was deleted.
    async fn read(&self, repl: &ReplId) -> Result<Option<DynamicObject>, Failure> {
        let object = self.read_any(repl).await?;
        Ok(object.filter(|object| !is_deleted(object)))
    }

    async fn read_any(&self, repl: &ReplId) -> Result<Option<DynamicObject>, Failure> {
        let name = name(repl);
        self.cluster
            .get(Kind::ConfigMap, &self.namespace, &name)
            .await
    }

    /// The record's object as the watch last saw it.
    fn cached(&self, repl: &ReplId) -> Option<DynamicObject> {
        let object = self.cache.get(&self.namespace, &name(repl))?;
        let mut object = serde_json::to_value(&*object).ok()?;
        // Lists leave out what each of their objects is.
        let kind = Kind::ConfigMap.resource();
        object["apiVersion"] = kind.api_version.into();
        object["kind"] = kind.kind.into();
        serde_json::from_value(object).ok()
    }

    /// Resolves when the watch shows what was just written, or something newer: who was told that a
    /// repl serves may ask for it at once.
    async fn seen(&self, repl: &ReplId, written: &DynamicObject) {
        let Some(written) = version(&written.metadata) else {
            return;
        };
        let mut now = self.cache.follow(&self.namespace, &name(repl));
        let shown = now.wait_for(|now| {
            let shown = now.as_ref().and_then(|now| version(&now.metadata));
            shown.is_some_and(|shown| shown >= written)
        });
        if timeout(WATCH_LAG, shown).await.is_err() {
            tracing::warn!(%repl, "the watch does not show a record that was just written");
        }
    }
}

/// How new an object is, among those of its kind.
fn version(metadata: &ObjectMeta) -> Option<u64> {
    metadata.resource_version.as_ref()?.parse().ok()
}

fn name(repl: &ReplId) -> String {
    format!("repl-{repl}")
}

/// Whether the object only tells what was asked last of a repl that was deleted.
fn is_deleted(object: &DynamicObject) -> bool {
    object.labels().get(RECORD).map(String::as_str) == Some(OF_DELETED)
}

/// The record in the object.
fn parsed(repl: &ReplId, object: &DynamicObject) -> Result<Record, Failure> {
    let text = object.data["data"]["record"].as_str().unwrap_or_default();
    serde_json::from_str(text).map_err(|e| broken(repl, &e))
}

/// Puts the record into the object, as one of this kind.
fn fill(
    repl: &ReplId,
    object: &mut DynamicObject,
    record: &mut Record,
    kind: &str,
) -> Result<(), Failure> {
    object.data["data"]["record"] = record.text().map_err(|e| broken(repl, &e))?.into();
    object.metadata.managed_fields = None;
    for (label, value) in [(RECORD, kind), (USER, record.user_id.as_str())] {
        object
            .labels_mut()
            .insert(label.to_owned(), value.to_owned());
    }
    Ok(())
}

fn read(object: &ConfigMap) -> Option<Record> {
    let empty = String::new();
    let data = object.data.as_ref();
    let text = data.and_then(|data| data.get("record")).unwrap_or(&empty);
    match serde_json::from_str(text) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::error!(name = ?object.metadata.name, %error, "a repl's record is damaged; delete the ConfigMap to forget the repl");
            None
        }
    }
}

fn broken(repl: &ReplId, why: &dyn std::fmt::Display) -> Failure {
    Failure::damaged(&format!("read the record of {repl}"), why)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn stored() -> Stored {
        Stored {
            release: 0,
            submission_id: SubmissionId::new(),
            time: Timestamp::UNIX_EPOCH,
            state: StoredState::Failed,
            argv: vec!["x".repeat(64 << 10)],
            env_names: Vec::new(),
            given: None,
            domains: Vec::new(),
            database: false,
            serves: None,
            code_digest: String::new(),
            tests_digest: String::new(),
            image: String::new(),
        }
    }

    #[test]
    fn a_submission_has_one_number_however_often_it_is_tried() {
        let mut record = Record::new(&"u".parse().unwrap());
        let one = stored();
        assert_eq!(record.reserve(one.clone()).release, 1);
        assert_eq!(record.reserve(stored()).release, 2);
        assert_eq!(record.reserve(one).release, 1);
        assert!(
            record.listed().is_empty(),
            "what is being made is no release yet"
        );
    }

    #[test]
    fn only_what_served_can_be_rolled_back_to() {
        let mut record = Record::new(&"u".parse().unwrap());
        for number in 1..=4 {
            record.reserve(stored());
            match number {
                2 => record.fail(2, "no"),
                _ => record.switch(number),
            }
        }
        assert_eq!(record.current().unwrap().release, 4);
        assert_eq!(record.target(None).unwrap().release, 3);
        assert_eq!(record.target(Some(2)), None);
        record.stop();
        assert_eq!(record.target(None).unwrap().release, 4);
    }

    #[test]
    fn a_workspace_is_opened_once_and_gives_way_to_a_release() {
        let mut record = Record::new(&"u".parse().unwrap());
        record.reserve(stored());
        record.switch(1);
        let open = |record: &mut Record| record.open(Stored::workspace(Vec::new(), String::new()));
        assert!(!open(&mut record).1, "the release runs");
        record.stop();
        let (one, fresh) = open(&mut record);
        let (same, again) = open(&mut record);
        assert!(fresh && !again && one == same && one.is_workspace());
        assert_eq!(record.target(None).unwrap().release, 1);
        assert_eq!(record.target(Some(0)), None);
        let two = record.reserve(stored()).release;
        record.switch(two);
        assert_eq!(record.current().unwrap().release, two);
        record.stop();
        assert!(record.current().is_none() && open(&mut record).1);
    }

    #[test]
    fn what_is_idle_stays_the_current_one_until_it_is_woken_or_stopped() {
        let mut record = Record::new(&"u".parse().unwrap());
        let open = |record: &mut Record| record.open(Stored::workspace(Vec::new(), String::new()));
        let (one, _) = open(&mut record);
        record.rest(Timestamp::UNIX_EPOCH);
        assert!(!record.runs() && record.wanted && record.current() == Some(&one));
        assert_eq!(
            open(&mut record),
            (one, true),
            "a start wakes what was there"
        );
        assert!(record.runs() && record.wake().is_none());
        record.rest(Timestamp::UNIX_EPOCH);
        record.reserve(stored());
        record.switch(1);
        assert!(record.runs() && record.current().unwrap().release == 1);
        record.rest(Timestamp::UNIX_EPOCH);
        assert_eq!(record.wake(), Some(Timestamp::UNIX_EPOCH));
        record.rest(Timestamp::UNIX_EPOCH);
        record.stop();
        assert!(record.wake().is_none() && !record.wanted);
    }

    #[test]
    fn variables_are_inherited_by_the_next_release_and_brought_back_by_a_rollback() {
        let given = |revision| {
            let (env, secrets) = (vec!["A".to_owned()], Vec::new());
            Some(Given {
                revision,
                env,
                secrets,
            })
        };
        let mut record = Record::new(&"u".parse().unwrap());
        record.give(given(1));
        record.reserve(stored());
        record.switch(1);
        assert_eq!(record.current().unwrap().given, given(1));
        assert_eq!(record.reserve(stored()).given, given(1));
        record.switch(2);
        record.give(given(2));
        assert_eq!(record.current().unwrap().given, given(2));
        assert_eq!(record.revisions(), BTreeSet::from([1, 2]));
        record.switch(1);
        assert_eq!((&record.given, record.revisions().len()), (&given(1), 2));
        // Changed while the next release was being made: it has them, and one that is gone back to has its own.
        let next = record.reserve(stored());
        record.give(given(2));
        assert_eq!(record.made_now(&next).given, given(2));
        let back = record.target(Some(2)).unwrap().clone();
        record.give(given(1));
        assert_eq!(record.made_now(&back).given, given(2));
        record.stop();
        // What was stopped stays as it was; what starts next has the new ones.
        record.give(given(3));
        let open = record.open(Stored::workspace(Vec::new(), String::new()));
        assert_eq!(open.0.given, given(3));
        assert_eq!(record.target(Some(1)).unwrap().given, given(1));
    }

    #[test]
    fn a_record_stays_within_its_bounds_and_keeps_what_serves_and_served() {
        for bytes in [1, 64 << 10] {
            let stored = || Stored {
                argv: vec!["x".repeat(bytes)],
                ..stored()
            };
            let mut record = Record::new(&"u".parse().unwrap());
            for number in 1..=2 {
                record.reserve(stored());
                record.switch(number);
            }
            for number in 3..=62 {
                assert_eq!(record.reserve(stored()).release, number);
                record.fail(number, "no");
                let text = record.text().unwrap();
                assert!(text.len() <= MAX_BYTES && record.releases.len() <= MAX_RELEASES);
            }
            assert_eq!(record.current().unwrap().release, 2);
            assert_eq!(record.target(None).unwrap().release, 1);
        }
    }
}
