//! What nobody needs any more: objects without an owner's record, namespaces that were long not used,
//! files of releases that no repl has. By default it is only told; a setting has it removed.
//!
//! Only what this installation made is looked at. One replica of the server does it, by a Lease.
//! A database's data is never removed: it is told, for the operator to decide.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;
use kube::core::DynamicObject;
use tokio_util::sync::CancellationToken;

use super::cache::label;
use super::cluster::{Failure, Kind};
use super::labels::{KEEP, MODULE, PACKAGE_CACHE, REPL, USED, USER};
use super::lease::Lease;
use super::namespace::of_stopped;
use super::record::{Look, Record, StoredState};
use super::releases::{Releases, STOPPED_KINDS, kept_env_name, kept_given_name};
use super::test_pod::TestPods;
use crate::model::{Problem, ReplId, SubmissionId, UserId};
use crate::storage::S3Store;

/// The Lease of the replica that cleans up.
const LEASE: &str = "gantry-clean-up";

/// Most things removed in one round. More at once is rather a mistake than dirt; the rest comes with
/// the next round, and the log has told of all of it.
const MAX_REMOVED: usize = 500;

/// Longest round. The Lease lasts longer, so that no second replica begins meanwhile.
const ROUND: Duration = Duration::from_secs(10 * 60);

/// How far this machine's clock may be from the API server's: what is old by a wrong one may be new.
const MOST_SKEW: Duration = Duration::from_secs(10 * 60);

/// How the cleaning is done.
#[derive(Debug, Clone)]
pub struct CleanUp {
    /// Remove what is found, instead of only telling.
    pub remove: bool,
    /// How long a namespace or files must not have been used.
    pub idle: Duration,
    /// How old an object must be: a younger one may belong to a release that is being made.
    pub settled: Duration,
    /// Between two rounds.
    pub every: Duration,
    /// How long the Lease lasts after its holder was last heard of.
    pub lease: Duration,
}

impl CleanUp {
    /// The usual pace, for things not used for `idle`.
    pub fn new(remove: bool, idle: Duration) -> Self {
        Self {
            remove,
            idle,
            settled: Duration::from_secs(60 * 60),
            every: Duration::from_secs(60 * 60),
            lease: ROUND + Duration::from_secs(5 * 60),
        }
    }
}

/// Something that nobody needs any more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Orphan {
    /// Objects of a repl that has no record, or whose record says that it was stopped.
    Objects {
        /// Where.
        namespace: String,
        /// Of which repl.
        repl: ReplId,
    },
    /// Variables of a release that no record has.
    Variables {
        /// The Secret in the server's own namespace.
        name: String,
    },
    /// A namespace that was long not used and in which nothing is kept.
    Namespace {
        /// Whose.
        user: UserId,
    },
    /// The test pod of such a namespace, in which a database is kept.
    TestPod {
        /// Whose.
        user: UserId,
    },
    /// Files in the bucket.
    Files {
        /// Below which prefix.
        prefix: String,
    },
}

impl fmt::Display for Orphan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Orphan::Objects { namespace, repl } => {
                write!(f, "the objects of the repl {repl} in {namespace}")
            }
            Orphan::Variables { name } => write!(f, "the Secret {name}"),
            Orphan::Namespace { user } => write!(f, "the namespace {}", user.namespace()),
            Orphan::TestPod { user } => write!(f, "the test pod in {}", user.namespace()),
            Orphan::Files { prefix } => write!(f, "the files below {prefix}"),
        }
    }
}

/// Why a round was not finished.
#[derive(Debug, thiserror::Error)]
pub enum CleanUpError {
    /// The API server.
    #[error(transparent)]
    Cluster(#[from] Failure),
    /// The bucket.
    #[error("{0}")]
    Store(#[from] Problem),
}

/// Finds and removes.
#[derive(Debug, Clone)]
pub struct Cleaner {
    /// Repls, their records, the way to the cluster.
    pub releases: Releases,
    /// Users' test pods.
    pub test_pods: TestPods,
    /// The bucket.
    pub store: Arc<S3Store>,
    /// How.
    pub options: CleanUp,
}

impl Cleaner {
    /// Cleans up whenever this replica holds the Lease, until stopped.
    pub async fn run(self, holder: String, stop: CancellationToken) {
        let records = &self.releases.records;
        let cluster = &self.releases.cluster;
        let lasts = self.options.lease;
        let mut lease = Lease::new(cluster, &records.namespace, LEASE, holder, lasts);
        let mut last_round: Option<tokio::time::Instant> = None;
        loop {
            match lease.hold().await {
                Ok(true) if !is_right(lease.skew()) => {
                    tracing::warn!(
                        "this machine's clock is not the API server's; nothing is cleaned up by it"
                    );
                }
                Ok(true) if last_round.is_none_or(|at| at.elapsed() >= self.options.every) => {
                    last_round = Some(tokio::time::Instant::now());
                    let round = tokio::time::timeout(ROUND, self.round());
                    match stop.run_until_cancelled(round).await {
                        None => {}
                        Some(Ok(Ok(_))) => {}
                        Some(Ok(Err(error))) => {
                            tracing::warn!(%error, "a clean-up was not finished; the next one goes on");
                        }
                        Some(Err(_)) => {
                            tracing::warn!(
                                seconds = ROUND.as_secs(),
                                "a clean-up took too long and was ended; the next one goes on"
                            );
                        }
                    }
                }
                Ok(_) => {}
                Err(failure) => {
                    tracing::warn!(%failure, "who cleans up is not known now");
                }
            }
            // Often enough to keep the Lease, and to see another's end.
            let pause = (lasts / 3).min(self.options.every);
            if stop
                .run_until_cancelled(tokio::time::sleep(pause))
                .await
                .is_none()
            {
                break;
            }
        }
        if let Err(failure) = lease.release().await {
            tracing::debug!(%failure, "the Lease of the clean-up is left to run out");
        }
    }

    /// One round: finds, tells, and removes when that is wanted. Returns what was found.
    pub async fn round(&self) -> Result<Vec<Orphan>, CleanUpError> {
        self.releases.records.forget_deleted().await?;
        let found = self.find().await?;
        let remove = self.options.remove;
        for orphan in &found {
            tracing::info!(%orphan, remove, "not needed any more");
        }
        if !remove {
            if !found.is_empty() {
                tracing::info!(
                    count = found.len(),
                    "nothing was removed; GANTRY_CLEAN_UP=remove has it removed"
                );
            }
            return Ok(found);
        }
        let mut removed = 0;
        for orphan in found.iter().take(MAX_REMOVED) {
            match self.remove(orphan).await {
                Ok(true) => removed += 1,
                // It was used again in the meantime.
                Ok(false) => tracing::info!(%orphan, "is needed again and stays"),
                Err(error) => tracing::warn!(%orphan, %error, "could not be removed"),
            }
        }
        tracing::info!(found = found.len(), removed, "a clean-up ended");
        Ok(found)
    }

    /// Everything that nobody needs any more.
    async fn find(&self) -> Result<Vec<Orphan>, CleanUpError> {
        let mut found = self.objects().await?;
        found.extend(self.variables().await?);
        found.extend(self.namespaces().await?);
        found.extend(self.files().await?);
        Ok(found)
    }

    /// Objects of repls that have no record or do not serve.
    async fn objects(&self) -> Result<Vec<Orphan>, Failure> {
        let cluster = &self.releases.cluster;
        let labels = format!("{},{REPL},!{KEEP}", cluster.made_here());
        let mut youngest: BTreeMap<(String, ReplId), bool> = BTreeMap::new();
        for kind in STOPPED_KINDS {
            // Secrets go with the rest of their repl: to list everybody's is more than is needed.
            if kind == Kind::Secret {
                continue;
            }
            for object in cluster.list(kind, None, &labels).await? {
                let repl = object.labels().get(REPL).and_then(|repl| repl.parse().ok());
                let (Some(repl), Some(namespace)) = (repl, object.namespace()) else {
                    continue;
                };
                let settled = self.is_older(&object, self.options.settled);
                let all = youngest.entry((namespace, repl)).or_insert(true);
                *all &= settled && object.metadata.deletion_timestamp.is_none();
            }
        }
        let mut found = Vec::new();
        for ((namespace, repl), settled) in youngest {
            let serves = |record: &Record| is_needed(record, &namespace);
            // The watch knows of nearly all of them; the rest is asked about.
            let known = self.releases.records.known(&repl);
            if !settled || known.as_ref().is_some_and(serves) {
                continue;
            }
            let needed = match self.releases.records.look(&repl).await? {
                Look::Absent => false,
                Look::Record(record) => serves(&record),
                // It may be of one that serves: nothing of it is touched.
                Look::Damaged => true,
            };
            if !needed {
                found.push(Orphan::Objects { namespace, repl });
            }
        }
        Ok(found)
    }

    /// Secrets in the server's own namespace with variables of releases that no record has.
    async fn variables(&self) -> Result<Vec<Orphan>, Failure> {
        let records = &self.releases.records;
        let cluster = &self.releases.cluster;
        let labels = format!("{},{REPL}", cluster.made_here());
        let secrets = cluster.list(Kind::Secret, Some(&records.namespace), &labels);
        let mut found = Vec::new();
        for secret in secrets.await? {
            let repl = secret.labels().get(REPL).and_then(|repl| repl.parse().ok());
            let Some(repl): Option<ReplId> = repl else {
                continue;
            };
            let name = secret.name_any();
            if self.is_older(&secret, self.options.settled)
                && !self.has_release(&repl, &name).await?
            {
                found.push(Orphan::Variables { name });
            }
        }
        Ok(found)
    }

    /// Whether a release of the repl has its variables in the Secret of this name.
    async fn has_release(&self, repl: &ReplId, secret: &str) -> Result<bool, Failure> {
        let record = match self.releases.records.look(repl).await? {
            Look::Absent => return Ok(false),
            Look::Damaged => return Ok(true),
            Look::Record(record) => record,
        };
        let own = record.releases.iter();
        let own = own.map(|stored| kept_env_name(repl, stored.release));
        let given = record.revisions().into_iter();
        let given = given.map(|revision| kept_given_name(repl, revision));
        Ok(own.chain(given).any(|name| name == secret))
    }

    /// Users' namespaces that were long not used.
    async fn namespaces(&self) -> Result<Vec<Orphan>, Failure> {
        let cluster = &self.releases.cluster;
        let labels = format!("{},{USER}", cluster.made_here());
        let namespaces = cluster.list(Kind::Namespace, None, &labels).await?;
        let mut found = Vec::new();
        for namespace in namespaces {
            let Some(user) = self.idle_user(&namespace) else {
                continue;
            };
            let name = user.namespace();
            // What pip has fetched can be fetched again.
            let kept = format!("!{PACKAGE_CACHE}");
            let claims = cluster.list(Kind::PersistentVolumeClaim, Some(&name), &kept);
            if claims.await?.is_empty() {
                found.push(Orphan::Namespace { user });
            } else if self.test_pods.is_there(&user) {
                found.push(Orphan::TestPod { user });
            }
        }
        Ok(found)
    }

    /// The user of a namespace that was long not used, and none of whose repls and modules serves.
    fn idle_user(&self, namespace: &DynamicObject) -> Option<UserId> {
        let user: UserId = namespace.labels().get(USER)?.parse().ok()?;
        let name = user.namespace();
        if namespace.name_any() != name || namespace.metadata.deletion_timestamp.is_some() {
            return None;
        }
        if !self.is_older(namespace, self.options.idle) {
            return None;
        }
        let used = namespace.annotations().get(USED);
        let used = used.and_then(|text| text.parse::<Timestamp>().ok());
        if used.is_some_and(|used| used > before(self.options.idle)) {
            return None;
        }
        // A record that cannot be read may be of a repl that serves.
        if self.releases.records.damaged_of().contains(user.as_str()) {
            return None;
        }
        let records = self.releases.records.all();
        let serves = records.iter().any(|(_, record)| is_needed(record, &name));
        let deployments = self.releases.rollouts.deployments.of(&name);
        let module = |deployment: &Arc<Deployment>| label(deployment.as_ref(), MODULE).is_some();
        (!serves && !deployments.iter().any(module)).then_some(user)
    }

    /// Files in the bucket that no repl has, and that nobody touched for long: an outside service may
    /// put a repl's code there before its first start.
    async fn files(&self) -> Result<Vec<Orphan>, CleanUpError> {
        let mut found = Vec::new();
        for root in ["code/", "releases/"] {
            for prefix in self.store.folders(root).await? {
                let Some(repl) = last_part::<ReplId>(&prefix) else {
                    continue;
                };
                let kept = match self.releases.records.look(&repl).await? {
                    Look::Record(_) if root == "code/" => continue,
                    Look::Damaged => continue,
                    Look::Record(record) => kept_releases(&record),
                    Look::Absent => HashSet::new(),
                };
                let candidates = match root {
                    "code/" => vec![prefix],
                    _ => self.store.folders(&prefix).await?,
                };
                for prefix in candidates {
                    let release = last_part::<SubmissionId>(&prefix);
                    let kept = release.is_some_and(|release| kept.contains(&release));
                    if !kept && self.is_untouched(&prefix).await? {
                        found.push(Orphan::Files { prefix });
                    }
                }
            }
        }
        Ok(found)
    }

    async fn is_untouched(&self, prefix: &str) -> Result<bool, Problem> {
        let newest = self.store.newest(prefix).await?;
        Ok(newest.is_some_and(|newest| newest < before(self.options.idle)))
    }

    /// Removes it, after a last look whether it is still what it was found to be.
    async fn remove(&self, orphan: &Orphan) -> Result<bool, CleanUpError> {
        let cluster = &self.releases.cluster;
        match orphan {
            Orphan::Objects { namespace, repl } => {
                let changing = self.releases.changing(repl);
                let _one = changing.lock().await;
                match self.releases.records.look(repl).await? {
                    Look::Damaged => return Ok(false),
                    Look::Record(record) if is_needed(&record, namespace) => return Ok(false),
                    Look::Record(_) | Look::Absent => {}
                }
                let labels = format!("{},{}", of_stopped(repl), cluster.made_here());
                for kind in STOPPED_KINDS {
                    cluster.delete_all(kind, namespace, &labels).await?;
                }
            }
            Orphan::Variables { name } => {
                let own = &self.releases.records.namespace;
                cluster.delete(Kind::Secret, own, name, None).await?;
            }
            Orphan::Namespace { user } => {
                let labels = format!("{},{USER}={user}", cluster.made_here());
                let now = cluster.list(Kind::Namespace, None, &labels).await?;
                let Some(namespace) = now.iter().find(|now| self.idle_user(now).is_some()) else {
                    return Ok(false);
                };
                cluster.delete_namespace(namespace).await?;
            }
            Orphan::TestPod { user } => self.test_pods.remove(user).await?,
            Orphan::Files { prefix } => {
                if !self.is_untouched(prefix).await? {
                    return Ok(false);
                }
                self.store.remove_all(prefix).await?;
            }
        }
        Ok(true)
    }

    fn is_older(&self, object: &DynamicObject, than: Duration) -> bool {
        let created = object.metadata.creation_timestamp.as_ref();
        created.is_some_and(|created| created.0 < before(than))
    }
}

/// Whether the repl of this record has or gets something in the namespace.
fn is_needed(record: &Record, namespace: &str) -> bool {
    let pending = |s: &super::record::Stored| s.state == StoredState::Pending;
    record.user_id.namespace() == namespace
        && (record.wanted || record.releases.iter().any(pending))
}

/// Releases whose files are needed: those that may be rolled back to, and the one being made.
fn kept_releases(record: &Record) -> HashSet<SubmissionId> {
    let kept = record.releases.iter();
    kept.map(|stored| stored.submission_id).collect()
}

/// The last folder's name of a prefix, if it is a name of ours.
fn last_part<T: std::str::FromStr>(prefix: &str) -> Option<T> {
    prefix
        .trim_end_matches('/')
        .rsplit('/')
        .next()?
        .parse()
        .ok()
}

/// Whether ages can be told by this machine's clock.
fn is_right(skew: Option<SignedDuration>) -> bool {
    skew.is_none_or(|skew| skew.unsigned_abs() < MOST_SKEW)
}

/// So long ago.
fn before(age: Duration) -> Timestamp {
    let age = SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX);
    Timestamp::now().checked_sub(age).unwrap_or(Timestamp::MIN)
}
