//! A repl's workspace in the cluster: the template's objects for its current files.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::{SignedDuration, Timestamp};

use super::{
    AWAY_PAUSE, Duration, Failure, Instant, Kind, Owner, Record, Releases, Stored, no_release,
    random, sleep,
};
use crate::model::{LatestOrder, Problem, ReplId, TicketKey};
use crate::platform::kubernetes::release::{RUNNER_KEY, runner_name, runner_secret};
use crate::platform::{AWAY, Opened, PlatformError, WorkspaceSpec};

/// How long another server gets to make what it has recorded. After that it has died in between.
pub(super) const MAKING: SignedDuration = SignedDuration::from_secs(30);

/// How long a start is tried anew while the API server does not answer, or says that it is too busy: many
/// starts at once in one namespace wait for each other, because its quota counts them one by one. With the
/// last try, whose requests have bounds of their own, it stays below the bound of the caller's request.
pub(super) const START_PATIENCE: Duration = Duration::from_secs(30);

impl Releases {
    /// See [`Platform::open_workspace`](crate::platform::Platform::open_workspace). The record says what
    /// is to be, and who wrote it made it; whoever finds something missing makes that, too. While the API
    /// server is away it waits: every step can be done again.
    pub async fn open_workspace(&self, spec: &WorkspaceSpec) -> Result<Opened, PlatformError> {
        let changing = self.changing(&spec.repl_id);
        let _one = changing.lock().await;
        // One start, however often it is tried: its id says whether the record is of this one.
        let wanted = Stored::workspace(spec.argv.clone(), self.config.runner_image.clone());
        let (mut opening, began) = (Opening::default(), Instant::now());
        loop {
            match self.open_once(spec, &wanted, &mut opening).await {
                Err(PlatformError::Unavailable(problem))
                    if problem.code == AWAY && began.elapsed() < START_PATIENCE =>
                {
                    tracing::warn!(repl = %spec.repl_id, %problem, "a start waits for the API server");
                    sleep(AWAY_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    async fn open_once(
        &self,
        spec: &WorkspaceSpec,
        wanted: &Stored,
        opening: &mut Opening,
    ) -> Result<Opened, PlatformError> {
        let repl = &spec.repl_id;
        let failed = |failure: Failure| failure.unavailable("The repl could not be recorded");
        let claimed = self.records.claim(repl, &spec.user_id).await;
        let not_found = || PlatformError::NotFound(format!("the repl {repl}"));
        if claimed.map_err(failed)? != spec.user_id {
            return Err(not_found());
        }
        let open = |record: &mut Record| {
            let (since, idle, first) = (record.since, record.idle, record.is_new());
            let before = record.order.clone();
            let (stored, opened) = record.open(wanted.clone());
            // One that comes back from being idle is what it was.
            if opened && idle.is_none() {
                record.order.note(&spec.order);
            }
            (stored, opened, since, idle, first, before)
        };
        let opened = self.records.change(repl, open).await.map_err(failed)?;
        let (stored, opened, since, idle, first, before) = opened.ok_or_else(not_found)?;
        opening.first |= first;
        if opened {
            opening.before = before;
        }
        // Also when it was recorded by an earlier try of this start.
        opening.fresh |= opened || stored.submission_id == wanted.submission_id;
        opening.idle = opening.idle.or(idle);
        let Opening { fresh, idle, .. } = *opening;
        let owner = Owner {
            user: spec.user_id.clone(),
            repl: repl.clone(),
        };
        let there = !fresh && self.has_deployment(&owner);
        if !there && let Err(error) = self.make(&owner, &stored, idle).await {
            self.never_was(spec, &stored, opening).await;
            return Err(error);
        }
        let being_made = Timestamp::now().duration_since(since) < MAKING;
        Ok(Opened {
            created: fresh || !(there || being_made),
            url: self.config.url(repl),
            terminal_url: self.config.terminal_url(repl),
        })
    }

    /// A workspace that could not be made stands in nobody's way, and when it was the first of its repl it leaves no
    /// trace in the record: its name can be given back. One that is still wanted may come up yet.
    async fn never_was(&self, spec: &WorkspaceSpec, stored: &Stored, opening: &Opening) {
        let repl = &spec.repl_id;
        let undone = self.records.change(repl, |record| {
            let same = |one: &mut Stored| one.submission_id == stored.submission_id;
            if !record.wanted {
                record.order.withdraw(&spec.order, &opening.before);
                if opening.first {
                    drop(record.workspace.take_if(same));
                }
            }
        });
        if let Err(failure) = undone.await {
            tracing::warn!(%repl, %failure, "the record of a repl that did not start stays");
        }
    }

    /// See [`Platform::ticket_key`](crate::platform::Platform::ticket_key).
    pub async fn ticket_key(&self, repl: &ReplId) -> Result<TicketKey, PlatformError> {
        let record = self.records.known(repl).filter(Record::runs);
        let record = record.ok_or_else(|| no_release(repl))?;
        let name = runner_name(repl);
        let namespace = record.user_id.namespace();
        let secret = self.cluster.get(Kind::Secret, &namespace, &name).await;
        let secret = secret.map_err(|f| f.unavailable("The runner's key could not be read"))?;
        let text = secret
            .as_ref()
            .and_then(|s| s.data["data"][RUNNER_KEY].as_str());
        let text = text.and_then(|text| BASE64.decode(text).ok());
        let key = text.and_then(|text| TicketKey::from_text(std::str::from_utf8(&text).ok()?));
        key.ok_or_else(|| no_release(repl))
    }

    /// Makes what tickets for the repl's runner are made with, unless it is there. A repl without a
    /// Deployment hardly has one: there it is made without a look before.
    pub(super) async fn make_runner_key(&self, owner: &Owner) -> Result<(), Failure> {
        let (namespace, name) = (owner.user.namespace(), runner_name(&owner.repl));
        if self.has_deployment(owner) {
            let found = self.cluster.get(Kind::Secret, &namespace, &name);
            if found.await?.is_some() {
                return Ok(());
            }
        }
        let key = TicketKey::new(random()?);
        match self.cluster.create(&runner_secret(owner, &key)).await {
            Err(failure) if !failure.is_conflict() => Err(failure),
            _ => Ok(()),
        }
    }

    /// Applies everything; what the cluster refuses is taken back. While the API server is away it cannot
    /// be: the record stands, and the next call goes on from it. `idle`: since when nobody had used what is
    /// woken.
    pub(super) async fn make(
        &self,
        owner: &Owner,
        stored: &Stored,
        idle: Option<Timestamp>,
    ) -> Result<(), PlatformError> {
        let led_here = idle.is_some() && self.config.wake_service.is_some();
        let failure = match self.make_all(owner, stored, !led_here).await {
            Ok(()) => {
                if led_here {
                    self.lead_back_once_up(owner, stored);
                }
                return Ok(());
            }
            Err(MakeError::Refused(failure)) => failure,
            // It is being made, and may come up yet.
            Err(MakeError::Database(problem)) => return Err(PlatformError::NotReady(problem)),
        };
        let error = failure.unavailable("The repl could not be started");
        if !failure.is_away() {
            let stopped = self.records.change(&owner.repl, |record| {
                match idle {
                    Some(since) => record.rest(since),
                    None => record.stop(),
                }
                record.last_error = Some(failure.to_string());
            });
            let undone = match stopped.await {
                Ok(_) => self.prune(owner).await,
                Err(failure) => Err(failure),
            };
            if let Err(failure) = undone {
                tracing::warn!(repl = %owner.repl, %failure, "what was made of a refused repl stays until it is stopped");
            }
        }
        Err(error)
    }

    async fn make_all(
        &self,
        owner: &Owner,
        stored: &Stored,
        led_to: bool,
    ) -> Result<(), MakeError> {
        self.prepare(owner, stored).await?;
        if stored.database {
            let ready = self.rollouts.database(owner).await;
            ready.map_err(MakeError::Database)?;
        }
        Ok(self.apply(owner, stored, led_to).await.map(drop)?)
    }
}

/// What the tries of one start have come to.
#[derive(Debug, Default)]
struct Opening {
    /// It is this start that makes it run.
    fresh: bool,
    /// Since when nobody had used it, when it was idle.
    idle: Option<Timestamp>,
    /// Nothing of the repl was there before.
    first: bool,
    /// The latest order before this start.
    before: LatestOrder,
}

/// Why something was not made.
enum MakeError {
    /// The API server did not do it.
    Refused(Failure),
    /// The repl's database does not come up.
    Database(Problem),
}

impl From<Failure> for MakeError {
    fn from(failure: Failure) -> Self {
        Self::Refused(failure)
    }
}
